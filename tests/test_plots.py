"""What the pictures draw is what the numbers say: bars, areas, lines and images, held against the full joint table."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from math import inf, nan
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.container import BarContainer
from oracles import oracle
from programs import PROGRAMS
from programs.case import Program, empty, noise
from torch import Tensor

import pyro_vfe as vfe
from pyro_vfe.errors import PlateKeptError, ProbabilityError, ShapeError, VFEError
from pyro_vfe.learning.history import History, Row
from pyro_vfe.reporting import palette
from pyro_vfe.reporting.palette import state_color, state_hatch, state_marker

MIXTURE = PROGRAMS["mixture_guided"]
LOOP = PROGRAMS["chain_mean_field"]
EM_ROWS = (
    Row(0, "start", 12.0, 10.0, 2.0),
    Row(0, "E", 10.0, 10.0, 0.0),
    Row(1, "M", 9.0, 8.5, 0.5),
    Row(1, "E", 8.5, 8.5, 0.0),
    Row(2, "M", 8.25, 8.0, 0.25),
    Row(2, "E", 8.0, 8.0, 0.0),
)
SVI_ROWS = tuple(Row(10 * i, "step", 9.0 - i, nan, nan, stderr=0.5) for i in range(4))
SURE = [[0.95, 0.05], [0.2, 0.8], [0.02, 0.98]]
POINTS = [[0.0, 1.0], [2.0, 3.0], [2.5, 2.0]]
SERIES = [1.0, 5.0, 4.0]


@pytest.fixture(autouse=True)
def no_figures_left() -> Iterator[None]:
    yield
    pyplot.close("all")


def decomposed(program: Program) -> vfe.Decomposition:
    return vfe.FreeEnergy().decompose(program.model, program.guide, *program.args, **program.kwargs)


def posterior_of(program: Program) -> vfe.Posterior:
    return vfe.posterior(program.model, *program.args, **program.kwargs)


def of_numbers(**terms: float) -> vfe.Decomposition:
    """A decomposition of any numbers."""
    return replace(decomposed(MIXTURE), **{name: torch.tensor(value) for name, value in terms.items()})


def by_element(gap: Any) -> vfe.Decomposition:
    return replace(decomposed(MIXTURE).by("data"), gap=torch.as_tensor(gap))


def drawn(ax: Axes) -> None:
    """Renders the whole figure: what matplotlib cannot draw, it says only then."""
    assert ax.figure is not None
    ax.figure.canvas.draw()


def areas(ax: Axes) -> dict[str, np.ndarray]:
    """The corners of every filled area, by label."""
    return {str(area.get_label()): area.get_paths()[0].vertices for area in ax.collections if area.get_paths()}


def steps_of(corners: np.ndarray) -> np.ndarray:
    """The heights of an area of steps that are 1 wide and not empty, from left to right."""
    left, right = np.split(corners[corners[:, 1] > 0].reshape(-1, 2, 2), 2, axis=1)
    np.testing.assert_array_equal(right[..., 0], left[..., 0] + 1.0)
    np.testing.assert_array_equal(right[..., 1], left[..., 1])
    return np.asarray(left[:, 0, 1])


def bars(ax: Axes) -> list[BarContainer]:
    return [found for found in ax.containers if isinstance(found, BarContainer)]


def heights(container: BarContainer) -> np.ndarray:
    return np.array([bar.get_height() for bar in container.patches])


def legend_texts(ax: Axes) -> list[str]:
    legend = ax.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def pictures() -> dict[str, Callable[..., Axes]]:
    """Every picture at small input."""
    return {
        "free_energy": lambda **ax: vfe.plot_free_energy(History(EM_ROWS), **ax),
        "decomposition": lambda **ax: vfe.plot_decomposition(decomposed(MIXTURE), **ax),
        "gap": lambda **ax: vfe.plot_gap(decomposed(MIXTURE).by("data"), **ax),
        "marginals": lambda **ax: vfe.plot_marginals(decomposed(MIXTURE), "z", **ax),
        "responsibilities": lambda **ax: vfe.plot_responsibilities(SURE, "v", POINTS, **ax),
        "states": lambda **ax: vfe.plot_states(SURE, "v", SERIES, **ax),
    }


@pytest.mark.parametrize("name", pictures())
def test_a_picture_is_drawn_into_the_axes_that_are_given_and_nowhere_else(name: str) -> None:
    figure, (left, right) = pyplot.subplots(1, 2)
    current, settings = pyplot.gca(), dict(pyplot.rcParams)
    assert pictures()[name](ax=left) is left
    assert left.get_title() != ""
    assert not right.has_data() and right.get_title() == ""
    assert pyplot.get_fignums() == [figure.number] and pyplot.gca() is current
    assert dict(pyplot.rcParams) == settings
    drawn(left)


@pytest.mark.parametrize("name", pictures())
def test_without_axes_there_is_one_new_figure(name: str) -> None:
    ax = pictures()[name]()
    assert pyplot.get_fignums() == [ax.figure.number]
    drawn(ax)


@pytest.mark.parametrize("name", pictures())
def test_without_matplotlib_the_error_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [module for module in sys.modules if module.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(VFEError, match=r"matplotlib.*pip install 'pyro-vfe\[plots\]'"):
        pictures()[name]()


@pytest.mark.parametrize("name", pictures())
def test_an_array_of_axes_is_refused(name: str) -> None:
    _, both = pyplot.subplots(1, 2)
    with pytest.raises(VFEError, match=r"ax is an ndarray.*axes\[0\]"):
        pictures()[name](ax=both)


@pytest.mark.parametrize("name", pictures())
def test_a_picture_goes_into_a_part_of_a_figure(name: str) -> None:
    figure = pyplot.figure(layout="constrained")
    part, _ = figure.subfigures(1, 2)
    drawn(pictures()[name](ax=part.subplots()))


@pytest.mark.parametrize("name", pictures())
def test_a_layout_of_many_pictures_leaves_room_for_each(name: str) -> None:
    _, grid = pyplot.subplots(2, 3, figsize=(10, 5.5), layout="constrained")
    for ax in grid.flat:
        pictures()[name](ax=ax)
    drawn(grid[0, 0])
    for ax in grid.flat:
        assert ax.get_position().width > 0.18 and ax.get_position().height > 0.25


@pytest.mark.parametrize("name", pictures())
def test_on_a_dark_page_no_line_is_black(name: str) -> None:
    with pyplot.style.context("dark_background"):
        ax = pictures()[name]()
        drawn(ax)
    for line in ax.lines:
        assert to_rgba(line.get_color()) != to_rgba("black") or to_rgba(line.get_markeredgecolor()) != to_rgba("black")
    for text in ax.texts:
        if text.get_bbox_patch() is not None:
            assert to_rgba(text.get_color()) != to_rgba(text.get_bbox_patch().get_facecolor())


@pytest.mark.parametrize("name", ["free_energy", "decomposition"])
def test_what_is_in_nats_says_so(name: str) -> None:
    ax = pictures()[name]()
    assert "nats" in ax.get_title()
    assert (ax.get_ylabel() if name == "free_energy" else ax.get_xlabel()).startswith("nats")


# F over iterations


def test_the_gap_is_stacked_on_the_surprise_and_F_is_the_line_on_top() -> None:
    history = History(EM_ROWS, num_data=3)
    ax = vfe.plot_free_energy(history)
    (line,) = [line for line in ax.lines if line.get_label() == "F"]
    np.testing.assert_array_equal(line.get_ydata(), history.free_energy)
    np.testing.assert_array_equal(line.get_xdata(), [-0.5, 0.0, 0.5, 1.0, 1.5, 2.0])
    surprise = next(corners for label, corners in areas(ax).items() if label.startswith("surprise"))
    foot = ax.get_ylim()[0]
    for x, at in zip(line.get_xdata(), history.surprise, strict=True):
        assert set(surprise[surprise[:, 0] == x, 1]) == {at, foot}
    gap = areas(ax)["gap"]
    for x, row in zip(line.get_xdata(), EM_ROWS, strict=True):
        assert set(gap[gap[:, 0] == x, 1]) == {row.surprise, row.surprise + row.gap}
    assert ax.get_ylabel() == "nats, sum over 3 data"
    assert ax.get_title() == "F from 12.00 to 8.00 nats"


def test_phases_are_marked_where_they_end() -> None:
    ax = vfe.plot_free_energy(History(EM_ROWS))
    marks = {str(line.get_label()): line for line in ax.lines if line.get_marker() != "None"}
    np.testing.assert_array_equal(marks["after an E-phase"].get_ydata(), [10.0, 8.5, 8.0])
    np.testing.assert_array_equal(marks["after an M-phase"].get_ydata(), [9.0, 8.25])
    np.testing.assert_array_equal(marks["the start"].get_ydata(), [12.0])
    assert len({line.get_marker() for line in marks.values()}) == len(marks)


def test_limits_that_are_set_later_leave_the_layout_of_the_figure_as_it_is() -> None:
    figure, axes = pyplot.subplots(1, 2, layout="constrained")
    vfe.plot_free_energy(History(EM_ROWS), ax=axes[0])
    vfe.plot_gap(by_element([1.5, inf, 0.5, nan, inf]), ax=axes[1])
    figure.draw_without_rendering()
    before = [ax.get_position().width for ax in axes]
    axes[0].set(ylim=(100.0, 101.0))
    axes[1].set(xlim=(1000.0, 1001.0))
    figure.draw_without_rendering()
    np.testing.assert_allclose([ax.get_position().width for ax in axes], before, rtol=0.2)


def test_five_hundred_iterations_have_few_marks_and_those_of_two_phases_take_turns() -> None:
    rows = [Row(0, "E", 100.0, 100.0, 0.0)]
    for i in range(1, 501):
        rows += [Row(i, "M", 100.5 - i / 10, 100.0 - i / 10, 0.5), Row(i, "E", 100.0 - i / 10, 100.0 - i / 10, 0.0)]
    ax = vfe.plot_free_energy(History(tuple(rows)))
    of_e, of_m = (
        next(line for line in ax.lines if str(line.get_label()).startswith(f"after an {phase}-phase")) for phase in "EM"
    )
    assert 10 <= len(of_e.get_xdata()) <= 20 and 10 <= len(of_m.get_xdata()) <= 20
    later = of_m.get_xdata()[1:]  # the first M-phase is marked wherever it is
    assert np.abs(np.subtract.outer(later, of_e.get_xdata())).min() > 10
    np.testing.assert_allclose(of_e.get_ydata(), 100.0 - of_e.get_xdata() / 10)


def test_where_surprise_and_gap_are_unknown_F_is_a_line_with_its_standard_error() -> None:
    ax = vfe.plot_free_energy(History(SVI_ROWS))
    assert set(areas(ax)) == {"± standard error"}
    band = areas(ax)["± standard error"]
    for row in SVI_ROWS:
        at = band[band[:, 0] == row.iteration, 1]
        assert at.min() == row.free_energy - 0.5 and at.max() == row.free_energy + 0.5
    assert ax.get_xlabel() == "step"


def test_rows_of_different_data_are_shown_per_datum() -> None:
    rows = (Row(1, "batch", 32.0, 30.0, 2.0, num_data=16), Row(2, "batch", 9.0, 8.0, 1.0, num_data=6))
    ax = vfe.plot_free_energy(History(rows, num_data=22))
    (line,) = [line for line in ax.lines if line.get_label() == "F"]
    np.testing.assert_allclose(line.get_ydata(), [2.0, 1.5])
    assert ax.get_ylabel() == "nats per datum"


@pytest.mark.parametrize("level", [-1000.0, -9.0, 1e6])
def test_the_fall_of_F_fills_the_picture_at_any_level(level: float) -> None:
    rows = tuple(replace(row, free_energy=row.free_energy + level, surprise=row.surprise + level) for row in EM_ROWS)
    ax = vfe.plot_free_energy(History(rows))
    low, high = ax.get_ylim()
    assert low < 8.0 + level and high > 12.0 + level
    assert (12.0 - 8.0) / (high - low) > 0.4
    assert any("cut at" in text for text in legend_texts(ax))


def test_areas_start_at_zero_where_their_proportions_can_be_read() -> None:
    ax = vfe.plot_free_energy(History((Row(0, "E", 10.0, 9.0, 1.0), Row(1, "E", 2.0, 1.0, 1.0))))
    assert ax.get_ylim()[0] == 0.0
    assert not any("cut" in text for text in legend_texts(ax))


@pytest.mark.parametrize(
    "rows",
    [
        (Row(0, "start", inf, 10.0, inf), *EM_ROWS[1:]),
        (Row(0, "start", inf, nan, nan), Row(1, "E", inf, inf, 0.0)),
        EM_ROWS[:1],
        (Row(0, "E", 3.0, 3.0, 0.0), Row(1, "E", 3.0, 3.0, 0.0)),
        (Row(0, "E", 0.0, 0.0, 0.0),),
        (Row(0, "E", nan, nan, nan), Row(1, "E", 1.0, 1.0, 0.0)),
        (Row(1, "epoch", 3.0, 2.0, 1.0), Row(1, "final", 2.0, 2.0, 0.0)),
    ],
    ids=["infinite start", "all infinite", "one row", "constant", "zero", "nan", "final"],
)
def test_strange_histories_have_a_picture(rows: tuple[Row, ...]) -> None:
    ax = vfe.plot_free_energy(History(rows))
    drawn(ax)
    assert np.isfinite(ax.get_ylim()).all()
    infinite = [line for line in ax.lines if line.get_label() == "F infinite"]
    assert sum(len(line.get_xdata()) for line in infinite) == sum(row.free_energy == inf for row in rows)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (History(()), "no rows"),
        (History(EM_ROWS).of("e"), "no rows"),
        ([3.0, 2.0], "a list"),
        (type("EMRun", (), {"history": History(EM_ROWS)})(), r"an EMRun.*run\.history"),
    ],
    ids=["empty", "no such phase", "losses", "run"],
)
def test_what_is_no_history_is_refused(wrong: Any, words: str) -> None:
    with pytest.raises(VFEError, match=words):
        vfe.plot_free_energy(wrong)


# The four readings


def rows_of(ax: Axes) -> dict[str, tuple[float, float]]:
    """Start and width of the bar in each row, by the row's name."""
    names = {tick: label.get_text() for tick, label in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True)}
    found = {}
    for container in bars(ax):
        (bar,) = container.patches
        middle = bar.get_y() + bar.get_height() / 2
        found[names[min(names, key=lambda tick: abs(tick - middle))]] = (bar.get_x(), bar.get_width())
    return found


def assert_all_readings_end_at_F(ax: Axes, terms: vfe.Decomposition) -> None:
    drawn_bars = rows_of(ax)
    signs = {"free energy": 1, "surprise": 1, "gap": 1, "energy": 1, "entropy": -1, "complexity": 1, "accuracy": -1}
    assert list(drawn_bars) == list(signs)
    for name, (start, width) in drawn_bars.items():
        value = float(getattr(terms, name.replace(" ", "_")))
        assert width == pytest.approx(signs[name] * value, abs=1e-12)
        if name in ("gap", "entropy", "accuracy"):
            assert start + width == pytest.approx(float(terms.free_energy), abs=1e-9)
        else:
            assert start == 0.0


def test_every_bar_is_a_term_of_the_full_joint_table_and_every_reading_ends_at_F() -> None:
    expected = oracle(MIXTURE.model, MIXTURE.guide, *MIXTURE.args).terms
    ax = vfe.plot_decomposition(decomposed(MIXTURE))
    for name, (_, width) in rows_of(ax).items():
        sign = -1 if name in ("entropy", "accuracy") else 1
        assert width == pytest.approx(sign * expected[name.replace(" ", "_")].item(), rel=1e-9)
    assert_all_readings_end_at_F(ax, decomposed(MIXTURE))
    (line,) = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert line.get_xdata()[0] == pytest.approx(expected["free_energy"].item())
    assert ax.get_xlabel() == "nats, sum over 4 data"


def test_every_term_is_written_as_it_stands_in_the_equation() -> None:
    terms = of_numbers(energy=32.5, entropy=1.25, surprise=31.0, gap=0.25, complexity=7.0, accuracy=-24.25)
    texts = [text.get_text() for text in vfe.plot_decomposition(terms).texts]
    assert texts == ["31.25", "31.00", "+ 0.25", "32.50", "− 1.25", "7.00", "− (−24.25)"]


@pytest.mark.parametrize(
    "terms",
    [
        {"energy": -40.0, "entropy": 5.0, "surprise": -50.0, "gap": 5.0, "complexity": 12.0, "accuracy": 57.0},
        {"energy": 4.0, "entropy": 9.0, "surprise": -8.0, "gap": 3.0, "complexity": 6.0, "accuracy": 11.0},
        {"energy": 0.0, "entropy": 0.0, "surprise": 0.0, "gap": 0.0, "complexity": 0.0, "accuracy": 0.0},
        {"energy": 1e6, "entropy": 3.0, "surprise": 1e6 - 4, "gap": 1.0, "complexity": 9.0, "accuracy": 12 - 1e6},
    ],
    ids=["densities", "across zero", "zero", "large"],
)
def test_readings_of_any_sign_end_at_F_inside_the_axes(terms: dict[str, float]) -> None:
    numbers = of_numbers(**terms)
    ax = vfe.plot_decomposition(numbers)
    assert_all_readings_end_at_F(ax, numbers)
    drawn(ax)
    low, high = ax.get_xlim()
    assert all(low <= start and low <= start + width <= high for start, width in rows_of(ax).values())
    box = ax.get_window_extent()
    for text in ax.texts:
        assert box.x0 <= text.get_window_extent().x0 and text.get_window_extent().x1 <= box.x1


def test_an_infinite_gap_is_an_arrow_and_says_so() -> None:
    terms = of_numbers(energy=inf, entropy=5.0, surprise=30.0, gap=inf, complexity=12.0, accuracy=-inf)
    ax = vfe.plot_decomposition(terms)
    drawn(ax)
    assert [text.get_text() for text in ax.texts] == ["∞", "30.00", "+ ∞", "∞", "− 5.00", "12.00", "− (−∞)"]
    assert sum(line.get_marker() == ">" for line in ax.lines) == 4
    assert rows_of(ax)["surprise"] == (0.0, 30.0)
    assert ax.get_title() == "Four readings of F = ∞ nats"


def test_the_standard_error_is_drawn_and_written() -> None:
    terms = replace(of_numbers(energy=30.0, entropy=5.0), stderr=torch.tensor(2.0), exact=False)
    ax = vfe.plot_decomposition(terms)
    assert "25.00 ± 2.00 nats" in ax.get_title()
    (spread,) = [found for found in ax.containers if not isinstance(found, BarContainer)]
    np.testing.assert_allclose(spread[2][0].get_segments()[0][:, 0], [23.0, 27.0])


def test_one_particle_has_no_standard_error_and_the_title_says_that_part_is_sampled() -> None:
    assert "partly sampled" in vfe.plot_decomposition(replace(decomposed(MIXTURE), exact=False)).get_title()


def test_the_readings_of_an_element_are_refused() -> None:
    with pytest.raises(PlateKeptError, match=r"plate 'data'.*plot_gap"):
        vfe.plot_decomposition(decomposed(MIXTURE).by("data"))
    with pytest.raises(VFEError, match="a History"):
        vfe.plot_decomposition(History(EM_ROWS))  # type: ignore[arg-type]


# The gap by element


def test_every_bar_is_the_gap_of_its_element() -> None:
    expected = oracle(MIXTURE.model, MIXTURE.guide, *MIXTURE.args).by("data")["gap"].detach().numpy()
    ax = vfe.plot_gap(decomposed(MIXTURE).by("data"))
    found = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for group in bars(ax) for bar in group.patches}
    np.testing.assert_allclose([found[i] for i in range(len(expected))], expected, rtol=1e-9)
    assert ax.get_ylabel() == "gap, nats" and ax.get_xlabel() == "data"
    assert f"{expected.sum():,.2f} nats" in ax.get_title()


@pytest.mark.parametrize("size", [1, 12, 60])
def test_those_that_stand_out_carry_half_and_fewer_do_not(size: int) -> None:
    gap = noise(size, seed=3).exp().numpy()
    ax = vfe.plot_gap(by_element(gap))
    carriers = np.sort(heights(bars(ax)[0]))
    assert carriers.sum() >= gap.sum() / 2 > carriers[1:].sum()
    assert f"; {len(carriers)} of {size} carr" in ax.get_title()
    largest = [str(i) for i in np.argsort(-gap)[: len(carriers)]]
    assert ", ".join(largest[:8]) in legend_texts(ax)[0]


def test_many_elements_are_sorted_areas_and_the_rest_is_told() -> None:
    gap = noise(10_000, seed=3).mul(2).exp().numpy()
    ax = vfe.plot_gap(by_element(gap))
    carriers, others = (steps_of(corners) for corners in areas(ax).values())
    shown = np.concatenate([carriers, others])
    np.testing.assert_array_equal(shown, np.sort(gap)[::-1][: len(shown)])
    assert 0.99 * gap.sum() <= shown.sum() < gap.sum()
    assert f"the other {10_000 - len(shown):,} have {gap.sum() - shown.sum():,.2f} nats" in ax.get_xlabel()
    assert carriers.sum() >= gap.sum() / 2 > carriers[:-1].sum()
    assert len(ax.patches) == 0


def test_a_subsampled_plate_is_named_by_the_indices_of_the_whole() -> None:
    data = noise(10, seed=12)

    def model() -> None:
        with pyro.plate("data", 10, subsample=torch.tensor([1, 4, 6])) as index:
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)))
            pyro.sample("u", dist.Normal(z, 1.0), obs=data[index])

    def guide() -> None:
        with pyro.plate("data", 10, subsample=torch.tensor([1, 4, 6])):
            pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))

    ax = vfe.plot_gap(vfe.FreeEnergy().decompose(model, guide).by("data"))
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "4", "6"]


@pytest.mark.parametrize("size", [12, 100])
def test_roundings_are_no_gap(size: int) -> None:
    ax = vfe.plot_gap(by_element(np.full(size, 1e-17)))
    assert ax.get_title() == f"No gap in any of {size} elements"
    assert ax.get_ylim()[1] >= 1.0 and ax.get_legend() is None


def test_infinite_gaps_stand_out_and_unknown_ones_are_crosses() -> None:
    ax = vfe.plot_gap(by_element([1.5, inf, 0.5, nan, inf]))
    drawn(ax)
    assert ax.get_title() == "The gap is infinite in 2 of 5 elements"
    assert legend_texts(ax)[0] == "infinite: 1, 4"
    marks = {line.get_marker(): list(line.get_xdata()) for line in ax.lines}
    assert marks["^"] == [1, 4] and marks["X"] == [3]
    assert (heights(bars(ax)[0]) >= 1.5).all() and list(heights(bars(ax)[1])) == [1.5, 0.5, 0.0]


def test_a_total_has_no_elements_and_the_error_names_the_plates() -> None:
    with pytest.raises(PlateKeptError, match=r"\.by\('data'\)"):
        vfe.plot_gap(decomposed(MIXTURE))
    with pytest.raises(PlateKeptError, match="no plate"):
        vfe.plot_gap(decomposed(LOOP))
    with pytest.raises(VFEError, match="a Tensor"):
        vfe.plot_gap(torch.ones(3))  # type: ignore[arg-type]


# Marginals


def test_rows_of_bars_are_Q_beside_the_exact_posterior_of_the_full_joint_table() -> None:
    ax = vfe.plot_marginals(decomposed(MIXTURE), "z")
    q, exact = pyro.param("q").detach(), oracle(MIXTURE.model, MIXTURE.guide, *MIXTURE.args).posterior.marginal("z")
    by_set = {"Q": q, "exact posterior": exact}
    for name, probs in by_set.items():
        groups = [group for group in bars(ax) if group.get_label() == name]
        np.testing.assert_allclose(np.stack([heights(group) for group in groups], -1), probs.numpy(), rtol=1e-9)
        feet = [group.patches[0].get_y() for group in groups]
        assert feet == sorted(feet, reverse=True)
        assert min(-np.diff(feet)) > 1.0
    assert legend_texts(ax) == ["Q", "exact posterior"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "1", "2"]
    assert len({group.patches[0].get_hatch() for group in bars(ax)}) == 2
    assert ax.get_xlabel() == "data"


def test_a_posterior_is_drawn_alone() -> None:
    ax = vfe.plot_marginals(posterior_of(MIXTURE), "z")
    exact = oracle(MIXTURE.model, empty, *MIXTURE.args).posterior.marginal("z")
    np.testing.assert_allclose(np.stack([heights(group) for group in bars(ax)], -1), exact.numpy(), rtol=1e-9)
    assert legend_texts(ax) == ["exact posterior"]


def test_a_latent_outside_of_plates_has_a_bar_for_each_value() -> None:
    ax = vfe.plot_marginals(decomposed(LOOP), "z_1")
    exact = oracle(LOOP.model, LOOP.guide, *LOOP.args).posterior.marginal("z_1")
    of_q, of_posterior = bars(ax)
    np.testing.assert_allclose(heights(of_q), pyro.param("q")[1].detach().numpy())
    np.testing.assert_allclose(heights(of_posterior), exact.numpy().reshape(-1), rtol=1e-9)
    assert ax.get_ylabel() == "probability"


@pytest.mark.parametrize("site", ["z_{}", ["z_0", "z_1", "z_2", "z_3"]], ids=["pattern", "list"])
def test_the_sites_of_a_loop_are_one_latent_along_its_steps(site: str | list[str]) -> None:
    table = oracle(LOOP.model, LOOP.guide, *LOOP.args).posterior
    exact = torch.stack([table.marginal(f"z_{t}").reshape(-1) for t in range(4)]).numpy()
    for source in (decomposed(LOOP), posterior_of(LOOP)):
        ax = vfe.plot_marginals(source, site)
        groups = [group for group in bars(ax) if group.get_label() == "exact posterior"]
        np.testing.assert_allclose(np.stack([heights(group) for group in groups], -1), exact, rtol=1e-9)
        assert ax.get_title().startswith("'z_0 to z_3'") and ax.get_xlabel() == "step"


def test_the_steps_of_a_pattern_are_in_the_order_of_their_numbers() -> None:
    def model() -> None:
        for t in reversed(range(12)):
            pyro.sample(f"z_{t}", dist.Bernoulli(torch.tensor(t / 12.0)))

    ax = vfe.plot_marginals(vfe.posterior(model), "z_{}")
    np.testing.assert_allclose(heights(bars(ax)[1]), np.arange(12) / 12)


def binary_mixture(u: Tensor) -> None:
    with pyro.plate("data", len(u)):
        v = pyro.sample("v", dist.Categorical(torch.ones(3)))
        pyro.sample("u", dist.Normal(torch.tensor([-2.0, 0.0, 2.0])[v], 1.0), obs=u)


def flat_guide(u: Tensor) -> None:
    with pyro.plate("data", len(u)):
        pyro.sample("v", dist.Categorical(torch.tensor([0.5, 0.25, 0.25])))


def bayes(u: Tensor) -> np.ndarray:
    """The posterior of the mixture by Bayes' rule, shape `(N, 3)`."""
    log_joint = -0.5 * (u[:, None] - torch.tensor([-2.0, 0.0, 2.0])) ** 2
    return log_joint.softmax(-1).numpy()


def test_many_data_are_an_image_with_Q_above_the_posterior_on_one_scale() -> None:
    u = noise(100, seed=5) * 2
    ax = vfe.plot_marginals(vfe.FreeEnergy().decompose(binary_mixture, flat_guide, u), "v")
    above, below = ax.images
    np.testing.assert_allclose(above.get_array(), np.tile([[0.5], [0.25], [0.25]], 100))
    np.testing.assert_allclose(below.get_array(), bayes(u).T, rtol=1e-9)
    assert above.get_clim() == below.get_clim() == (0.0, 1.0)
    foot_of_q, top_of_posterior = above.get_extent()[2], below.get_extent()[3]
    assert ax.yaxis_inverted() and foot_of_q < top_of_posterior
    assert [text.get_text().strip() for text in ax.texts] == ["Q", "exact posterior"]
    assert ax.figure.axes[-1].get_ylabel() == "probability"
    assert ax.get_xlabel() == "data"


def test_more_data_than_pixels_are_sorted_and_shown_as_means() -> None:
    u = noise(10_000, seed=5) * 2
    ax = vfe.plot_marginals(vfe.posterior(binary_mixture, u), "v")
    (image,) = ax.images
    shown = np.asarray(image.get_array()).T
    assert len(shown) < ax.bbox.width
    width = -(-10_000 // len(shown))
    assert f"sorted by most probable value, columns are means of {width}" in ax.get_xlabel()
    probs = bayes(u)
    order = np.lexsort((-probs.max(-1), probs.argmax(-1)))
    np.testing.assert_allclose(shown[3], probs[order][3 * width : 4 * width].mean(0), rtol=1e-9)
    np.testing.assert_allclose(shown[-1], probs[order][(len(shown) - 1) * width :].mean(0), rtol=1e-9)


def long_chain(u: Tensor) -> None:
    with pyro.plate("time", len(u)):
        v = pyro.sample("v", vfe.MarkovChain(torch.tensor([0.5, 0.5]), torch.tensor([[0.9, 0.1], [0.2, 0.8]])))
        pyro.sample("u", dist.Normal(v * 2.0, 1.0), obs=u)


def test_a_long_chain_keeps_its_order() -> None:
    u = noise(3000, seed=1)
    posterior = vfe.posterior(long_chain, u)
    ax = vfe.plot_marginals(posterior, "v")
    shown = np.asarray(ax.images[0].get_array()).T
    width = -(-3000 // len(shown))
    assert "sorted" not in ax.get_xlabel() and ax.get_xlabel().startswith("time")
    np.testing.assert_allclose(shown[7], posterior.marginal("v")[7 * width : 8 * width].mean(0), rtol=1e-9)


def test_several_plates_are_laid_out_with_the_last_running_fastest() -> None:
    program = PROGRAMS["nested"]
    posterior = posterior_of(program)
    table = posterior.marginal_table("b")
    assert table.axes[:-1] == ("inner", "outer")
    ax = vfe.plot_marginals(posterior, "b")
    np.testing.assert_allclose(heights(bars(ax)[1]), table.values[..., 1].reshape(-1))
    assert ax.get_xlabel() == "inner; inside each of them outer (0 to 1)"


def test_many_values_are_an_image_with_labels_that_have_room() -> None:
    def model() -> None:
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Categorical(torch.ones(200)))

    ax = vfe.plot_marginals(vfe.posterior(model), "z")
    drawn(ax)
    np.testing.assert_allclose(ax.images[0].get_array(), 1 / 200)
    boxes = [label.get_window_extent() for label in ax.get_yticklabels()]
    assert len(boxes) > 5
    assert all(not first.overlaps(second) for first, second in pairwise(boxes))


def test_values_of_a_joint_latent_are_written_out() -> None:
    ax = vfe.plot_marginals(posterior_of(PROGRAMS["bits"]), "z")
    support = posterior_of(PROGRAMS["bits"]).support("z")
    expected = ["".join(f"{int(bit)}" for bit in value) for value in support]
    shown = [label.get_text() for label in ax.get_yticklabels()] + [label.get_text() for label in ax.get_xticklabels()]
    assert set(expected) <= set(shown)


def test_a_site_that_only_the_guide_has_is_summed_out_of_Q() -> None:
    def guide(u: Tensor) -> None:
        a = pyro.sample("a", dist.Bernoulli(torch.tensor(0.25)), infer={"is_auxiliary": True})
        with pyro.plate("data", len(u)):
            pyro.sample("v", dist.Categorical(torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]])[a.long()]))

    terms = vfe.FreeEnergy().decompose(binary_mixture, guide, noise(3, seed=1))
    groups = [group for group in bars(vfe.plot_marginals(terms, "v")) if group.get_label() == "Q"]
    np.testing.assert_allclose([heights(group)[0] for group in groups], [0.425, 0.2375, 0.3375])
    with pytest.raises(VFEError, match="'a' is no enumerated latent"):
        vfe.plot_marginals(terms, "a")


@pytest.mark.parametrize("site", ["zz", "zz_{}", ["z_0", "zz"]])
def test_an_unknown_latent_is_refused_with_those_there_are(site: str | list[str]) -> None:
    for source in (decomposed(LOOP), posterior_of(LOOP)):
        with pytest.raises(VFEError, match=r"'zz.*'z_0'.*pattern"):
            vfe.plot_marginals(source, site)


def test_other_sources_and_sites_are_refused() -> None:
    with pytest.raises(VFEError, match="a Tensor"):
        vfe.plot_marginals(torch.ones(3), "z")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="a, b are no steps of one latent"):
        vfe.plot_marginals(posterior_of(PROGRAMS["nested"]), ["a", "b"])
    with pytest.raises(ShapeError, match="empty list"):
        vfe.plot_marginals(posterior_of(MIXTURE), [])
    without_guide = vfe.EM(MIXTURE.model).run(*MIXTURE.args, progress_bar=False).decomposition()
    for picture in (lambda: vfe.plot_marginals(without_guide, "z"), lambda: vfe.plot_states(without_guide, "z", [1.0])):
        with pytest.raises(PlateKeptError, match=r"vfe\.posterior"):
            picture()


# Mixtures in two dimensions


def scattered(ax: Axes) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, str]]:
    """Points, faces and edges of every group that was drawn, and its corners."""
    return [
        (np.asarray(group.get_offsets()), group.get_facecolors(), group.get_edgecolors(), str(group.get_paths()[0]))
        for group in ax.collections
    ]


def test_each_datum_has_the_marker_of_its_most_probable_state_and_the_mixed_colour() -> None:
    ax = vfe.plot_responsibilities(SURE, "v", POINTS)
    found = {tuple(points[0]): (faces[0], edges[0]) for points, faces, edges, _ in scattered(ax) if len(points) == 1}
    colors = np.array([to_rgba(state_color(state))[:3] for state in range(2)])
    np.testing.assert_allclose(found[0.0, 1.0][0][:3], np.array(SURE[0]) @ colors)
    np.testing.assert_allclose(found[2.5, 2.0][0][:3], np.array(SURE[2]) @ colors)
    face, edge = found[2.0, 3.0]
    np.testing.assert_allclose(face[:3], 1.0)  # uncertain: hollow
    np.testing.assert_allclose(edge[:3], np.array(SURE[1]) @ colors)
    shapes = {tuple(points[0]): shape for points, _, _, shape in scattered(ax)}
    assert shapes[0.0, 1.0] != shapes[2.0, 3.0] == shapes[2.5, 2.0]
    assert legend_texts(ax) == ["v = 0", "v = 1", "hollow: below 0.9"]


def test_posterior_decomposition_and_tensor_are_taken_alike() -> None:
    u = torch.stack([noise(50, seed=5) * 2, noise(50, seed=6)], -1)
    terms = vfe.FreeEnergy().decompose(binary_mixture, flat_guide, u[:, 0])
    posterior = vfe.posterior(binary_mixture, u[:, 0])
    of_posterior = scattered(vfe.plot_responsibilities(posterior, "v", u))
    of_tensor = scattered(vfe.plot_responsibilities(posterior.marginal("v").requires_grad_(), "v", u))
    for first, second in zip(of_posterior, of_tensor, strict=True):
        np.testing.assert_array_equal(first[0], second[0])
        np.testing.assert_array_equal(first[1], second[1])
    of_q = vfe.plot_responsibilities(terms, "v", u)
    assert of_q.get_title() == "States of 50 data by 'v': 50 uncertain"


def test_twenty_states_of_ten_thousand_data_are_a_few_collections() -> None:
    probs = (noise(10_000, 20, seed=1) * 4).softmax(-1)
    ax = vfe.plot_responsibilities(probs, "v", noise(10_000, 2, seed=2))
    drawn(ax)
    assert sum(len(points) for points, *_ in scattered(ax)) == 10_000
    assert len(ax.collections) <= 40
    assert len(legend_texts(ax)) == 21


@pytest.mark.parametrize("picture", ["responsibilities", "states"])
def test_the_legend_covers_no_data(picture: str) -> None:
    probs = (noise(300, 12, seed=1) * 4).softmax(-1)
    if picture == "states":
        small = pyplot.subplots(figsize=(4.5, 3.5), layout="constrained")[1]
        ax = vfe.plot_states(probs, "v", noise(300, seed=2).sign(), ax=small)
    else:
        ax = vfe.plot_responsibilities(probs, "v", noise(300, 2, seed=2).sign())
    drawn(ax)
    box = ax.get_legend().get_window_extent()
    points = np.concatenate([np.asarray(group.get_offsets()) for group in ax.collections])
    assert (ax.transData.transform(points)[:, 1] < box.y0).all()
    assert box.x1 <= ax.get_window_extent().x1


@pytest.mark.parametrize(
    ("probs", "data", "error", "words"),
    [
        (SURE, POINTS[:2], ShapeError, "2 data, and latent 'v' has 3"),
        (SURE, [[0.0, 1.0, 2.0]] * 3, ShapeError, r"\(3, 3\).*two of the columns"),
        (SURE, [0.0, 1.0, 2.0], ShapeError, r"\(3,\)"),
        ([[0.9, 0.2]] * 3, POINTS, ProbabilityError, "do not sum to 1"),
        ([[1.2, -0.2]] * 3, POINTS, ProbabilityError, "negative"),
        ([[nan, 1.0]] * 3, POINTS, ProbabilityError, "not finite"),
        ([], POINTS, ShapeError, r"\(N, K\)"),
        ("v", POINTS, VFEError, "a str"),
        ([[[0.5, 0.5]] * 2] * 3, POINTS, ShapeError, "several plates"),
    ],
)
def test_what_does_not_fit_is_refused(probs: Any, data: Any, error: type[VFEError], words: str) -> None:
    with pytest.raises(error, match=words):
        vfe.plot_responsibilities(probs, "v", data)


def test_any_name_of_a_site_is_in_the_legend() -> None:
    assert legend_texts(vfe.plot_responsibilities(SURE, "_v", POINTS))[0].strip() == "_v = 0"
    ax = vfe.plot_states(SURE, "a_long_name_of_a_latent", SERIES)
    assert legend_texts(ax)[0].endswith("… = 0") and len(legend_texts(ax)[0]) < 22


# Chains


def strip_of(ax: Axes) -> Axes:
    """The axes of the probabilities at the foot."""
    return ax.child_axes[0]


def test_the_band_stacks_the_probabilities_of_each_step() -> None:
    ax = vfe.plot_states(SURE, "v", SERIES)
    first, second = strip_of(ax).patches
    np.testing.assert_array_equal(first.get_data().baseline, 0.0)
    np.testing.assert_allclose(first.get_data().values, [0.95, 0.2, 0.02])
    np.testing.assert_allclose(second.get_data().baseline, first.get_data().values)
    np.testing.assert_allclose(second.get_data().values, 1.0)
    np.testing.assert_array_equal(first.get_data().edges, [-0.5, 0.5, 1.5, 2.5])
    assert first.get_hatch() != second.get_hatch()
    assert strip_of(ax).get_ylabel() == "probability"


def test_each_datum_of_a_chain_has_the_marker_and_colour_of_its_most_probable_state() -> None:
    ax = vfe.plot_states(SURE, "v", SERIES)
    quiet, active = scattered(ax)
    np.testing.assert_array_equal(quiet[0], [[0.0, 1.0]])
    np.testing.assert_array_equal(active[0], [[1.0, 5.0], [2.0, 4.0]])
    np.testing.assert_allclose(quiet[1][0], to_rgba(state_color(0)))
    assert quiet[3] != active[3]


@pytest.mark.parametrize("name", ["markov_chain_with_mean_field", "chain_mean_field"])
def test_the_band_of_a_chain_is_that_of_the_full_joint_table(name: str) -> None:
    program = PROGRAMS[name]
    table = oracle(program.model, program.guide, *program.args).posterior
    site = "z" if name.startswith("markov") else "z_{}"
    exact = (
        table.marginal("z") if site == "z" else torch.stack([table.marginal(f"z_{t}").reshape(-1) for t in range(4)])
    )
    tops = {
        "posterior": (vfe.plot_states(posterior_of(program), site, program.args[0]), exact.cumsum(-1).numpy()),
        "Q": (vfe.plot_states(decomposed(program), site, program.args[0]), pyro.param("q").detach().cumsum(-1).numpy()),
    }
    for ax, expected in tops.values():
        found = np.stack([patch.get_data().values for patch in strip_of(ax).patches], -1)
        np.testing.assert_allclose(found, expected, rtol=1e-9)
        assert ax.get_xlabel() == ("time" if site == "z" else "step")


def test_bars_stand_where_the_most_probable_path_takes_another_state() -> None:
    u = noise(60, seed=4) + 1.0
    posterior = vfe.posterior(long_chain, u)
    differs = np.flatnonzero((posterior.marginal("v").argmax(-1) != posterior.mode()["v"]).numpy())
    assert len(differs) > 0
    ax = vfe.plot_states(posterior, "v", u)
    (lines,) = strip_of(ax).collections
    np.testing.assert_allclose(
        [segment[:, 0] for segment in lines.get_segments()], [(t - 0.5, t + 0.5) for t in differs]
    )
    assert "the most probable path differs" in legend_texts(ax)


@pytest.mark.parametrize(("num_steps", "num_states"), [(100, 20), (10_000, 3)])
def test_many_states_or_steps_are_an_image(num_steps: int, num_states: int) -> None:
    probs = noise(num_steps, num_states, seed=1).softmax(-1)
    ax = vfe.plot_states(probs, "v", noise(num_steps, seed=2))
    drawn(ax)
    (image,) = strip_of(ax).images
    shown = np.asarray(image.get_array())
    width = -(-num_steps // shown.shape[1])
    np.testing.assert_allclose(shown[:, 2], probs[2 * width : 3 * width].mean(0))
    assert image.get_clim() == (0.0, 1.0)
    assert len(strip_of(ax).patches) == 0


def test_data_stay_above_the_band_and_missing_ones_leave_theirs() -> None:
    ax = vfe.plot_states(SURE, "v", [1.0, nan, inf])
    drawn(ax)
    assert sum(len(points) for points, *_ in scattered(ax)) == 1
    np.testing.assert_allclose(strip_of(ax).patches[0].get_data().values, [0.95, 0.2, 0.02])
    top_of_band = strip_of(ax).get_window_extent().y1
    assert ax.transData.transform((0.0, 1.0))[1] > top_of_band
    assert all(ax.transData.transform((0.0, tick))[1] >= top_of_band for tick in ax.get_yticks())


@pytest.mark.parametrize("data", [[2.0], [0.0], [nan]])
def test_one_step_has_a_picture(data: list[float]) -> None:
    ax = vfe.plot_states([[0.6, 0.4]], "v", data)
    drawn(ax)
    assert ax.get_title() == "Most probable states of 'v' at 1 step"
    drawn(vfe.plot_states([[1.0]], "v", data))


@pytest.mark.parametrize(
    ("data", "words"),
    [([[1.0, 2.0]] * 3, r"\(3, 2\).*one column"), ([1.0], "1 data, and latent 'v' has 3 elements")],
)
def test_data_that_are_no_series_of_the_chain_are_refused(data: Any, words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        vfe.plot_states(SURE, "v", data)


def test_several_chains_are_refused_with_a_way_to_take_one() -> None:
    program = PROGRAMS["markov_chains"]
    with pytest.raises(ShapeError, match=r"'sequences' \(2\) and 'time' \(3\).*marginal\('z'\)\[0\]"):
        vfe.plot_states(posterior_of(program), "z", program.args[0])
    one = posterior_of(program).marginal("z")[0]
    assert vfe.plot_states(one, "z", program.args[0][0]).get_title().endswith("at 3 steps")


# Colours


def lightness(color: str) -> float:
    """CIE L* of a colour."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgba(color)[:3]]
    luminance = float(np.dot([0.2126, 0.7152, 0.0722], linear))
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance


def test_no_two_of_eighty_eight_states_share_colour_and_marker() -> None:
    assert len({(state_color(state), state_marker(state)) for state in range(88)}) == 88
    assert len({(state_color(state), state_hatch(state)) for state in range(56)}) == 56


def test_what_stands_side_by_side_differs_in_grey() -> None:
    pairs = [(palette.DARK, palette.LIGHT), (palette.DARK, palette.PALE)]
    pairs += [(state_color(state), state_color(state + 1)) for state in range(5)]
    for first, second in pairs:
        assert abs(lightness(first) - lightness(second)) > 15


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (31.2299, "31.23"),
        (-24.2176, "−24.22"),
        (1e-12, "1.0e−12"),
        (0.0049, "4.9e−03"),
        (1234567.4, "1,234,567"),
        (3.2e12, "3.2e+12"),
        (inf, "∞"),
        (-inf, "−∞"),
        (nan, "unknown"),
    ],
)
def test_nats_are_written_as_a_person_reads_them(value: float, text: str) -> None:
    assert palette.number(value) == text
