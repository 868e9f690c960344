"""A history adds up, prints, and becomes a dataset."""

import numpy as np
import pytest
import xarray

from pyro_vfe.learning.history import History, Row

ROWS = (
    Row(0, "start", 12.0, 10.0, 2.0),
    Row(0, "E", 10.0, 10.0, 0.0),
    Row(1, "M", 9.0, 8.5, 0.5),
    Row(1, "E", 8.5, 8.5, 0.0),
)
HISTORY = History(ROWS, num_data=5)


def long_history(length: int) -> History:
    return History(tuple(Row(i, "E", 100.0 - i, 100.0 - i, 0.0) for i in range(length)))


def test_each_change_of_F_is_surprise_plus_gap() -> None:
    np.testing.assert_array_equal(HISTORY.d_free_energy[1:], [-2.0, -1.0, -0.5])
    np.testing.assert_array_equal(HISTORY.d_surprise[1:], [0.0, -1.5, 0.0])
    np.testing.assert_array_equal(HISTORY.d_gap[1:], [-2.0, 0.5, -0.5])
    np.testing.assert_allclose(HISTORY.d_free_energy, HISTORY.d_surprise + HISTORY.d_gap)
    assert np.isnan(HISTORY.d_free_energy[0])


def test_the_rows_of_one_phase_can_be_taken() -> None:
    np.testing.assert_array_equal(HISTORY.of("E").free_energy, [10.0, 8.5])
    assert HISTORY.of("E").num_data == 5
    assert len(HISTORY.of("no such phase")) == 0


def test_the_dataset_has_every_column_in_nats_with_iteration_and_phase_beside() -> None:
    dataset = HISTORY.to_xarray()
    assert isinstance(dataset, xarray.Dataset)
    assert dataset.sizes == {"step": 4}
    assert list(dataset.phase.values) == ["start", "E", "M", "E"]
    assert list(dataset.iteration.values) == [0, 0, 1, 1]
    assert dataset.attrs["num_data"] == 5
    for name in ("free_energy", "surprise", "gap", "d_free_energy", "d_surprise", "d_gap"):
        assert dataset[name].attrs["units"] == "nats"
        np.testing.assert_array_equal(dataset[name].values, getattr(HISTORY, name))


def test_it_prints_an_aligned_table() -> None:
    lines = str(HISTORY).splitlines()
    assert len(lines) == 5
    assert len({len(line) for line in lines if line.split()[1] != "start"}) == 1
    assert lines[2].split() == ["0", "E", "10.0000", "10.0000", "0.0000", "-2.0000", "+0.0000", "-2.0000"]


@pytest.mark.parametrize("length", [1, 16, 17, 1000])
def test_a_long_history_prints_its_beginning_and_its_end(length: int) -> None:
    lines = str(long_history(length)).splitlines()
    assert len(lines) <= 18
    assert lines[1].split()[0] == "0"
    assert lines[-1].split()[0] == str(length - 1)
    shown = [line for line in lines[1:] if "more" not in line]
    left_out = [int(line.split()[1]) for line in lines if "more" in line]
    assert len(shown) + sum(left_out) == length


def test_a_notebook_shows_the_same_cells() -> None:
    page = long_history(40)._repr_html_()
    assert page.count("<tr>") == str(long_history(40)).count("\n") + 1
    assert "24 more" in page


def test_a_small_change_keeps_its_magnitude() -> None:
    rows = (Row(0, "E", 1e5, 1e5, 0.0), Row(1, "E", 1e5 - 2**-20, 1e5 - 2**-20, 0.0))
    assert "-9.5e-07" in str(History(rows))


def steps(**columns: list[float]) -> History:
    """Readings of SVI."""
    length = len(next(iter(columns.values())))
    rows = [{name: values[i] for name, values in columns.items()} for i in range(length)]
    return History(tuple(Row(10 * i, "step", **{"gap": 1.0, **row}) for i, row in enumerate(rows)), num_data=4)


def test_a_history_of_steps_has_no_column_of_phases() -> None:
    header, first, _ = str(steps(free_energy=[3.0, 2.0], surprise=[2.0, 1.0])).splitlines()
    assert header.split()[:4] == ["step", "F", "surprise", "gap"]
    assert first.split() == ["0", "3.0000", "2.0000", "1.0000"]


def test_errors_are_printed_where_F_is_sampled() -> None:
    sampled = steps(free_energy=[3.0, 2.0], surprise=[2.0, 1.0], stderr=[0.25, 0.125])
    assert str(sampled).splitlines()[1].split() == ["0", "3.0000", "0.2500", "2.0000", "1.0000"]
    assert "±" in str(sampled) and "±" in sampled._repr_html_()
    one_particle = steps(free_energy=[3.0, 2.0], surprise=[2.0, 1.0], stderr=[np.nan, np.nan])
    assert "±" not in str(one_particle)
    np.testing.assert_array_equal(sampled.to_xarray().free_energy_stderr, [0.25, 0.125])
    np.testing.assert_array_equal(one_particle.to_xarray().free_energy_stderr, [np.nan, np.nan])
    assert "free_energy_stderr" not in HISTORY.to_xarray()


def test_sizes_are_printed_and_divided_by_where_they_differ() -> None:
    rows = (Row(1, "step", 12.0, 10.0, 2.0, num_data=4), Row(2, "step", 6.0, 5.0, 1.0, num_data=2))
    mixed = History(rows, num_data=2)
    assert [line.split()[4] for line in str(mixed).splitlines()] == ["N", "4", "2"]
    np.testing.assert_array_equal(mixed.per_datum.free_energy, [3.0, 3.0])
    np.testing.assert_array_equal(mixed.to_xarray().num_data, [4, 2])
    assert "N" not in str(HISTORY).splitlines()[0].split()


def test_what_is_not_known_has_a_dash_and_is_a_number_nowhere() -> None:
    history = steps(free_energy=[np.inf, np.inf, 2.0], surprise=[np.nan, np.inf, 1.0], gap=[np.nan, np.nan, 1.0])
    lines = str(history).splitlines()
    assert lines[1].split() == ["0", "inf", "—", "—"]
    assert "nan" not in str(history) and "nan" not in history._repr_html_()
    assert np.isnan(history.d_free_energy[1]) and history.d_free_energy[2] == -np.inf
    dataset = history.to_xarray()
    np.testing.assert_array_equal(dataset.surprise, [np.nan, np.inf, 1.0])
    np.testing.assert_array_equal(history.per_datum.free_energy, [np.inf, np.inf, 0.5])


def test_an_empty_history_prints_its_titles_and_becomes_a_dataset() -> None:
    assert str(History(())).split()[:3] == ["iteration", "phase", "F"]
    assert History(()).to_xarray().sizes == {"step": 0}
    assert "<table>" in History(())._repr_html_()


def test_rows_over_different_numbers_of_data_have_no_printed_difference() -> None:
    history = History(tuple(Row(i, "step", 10.0 * n, 10.0 * n, 0.0, num_data=n) for i, n in enumerate((3, 3, 1, 1))))
    assert [len(line.split()) for line in str(history).splitlines()[1:]] == [5, 8, 5, 8]
