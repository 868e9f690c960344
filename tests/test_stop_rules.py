"""Stop rules stop where there is nothing left to wait for, and are not fooled by noise."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pyro_vfe as vfe
from pyro_vfe.errors import VFEError
from pyro_vfe.learning.history import STEP, History, Row

NUM_DATA = 100


def history(per_datum: Any, gap: Any = 0.0, num_data: int = NUM_DATA) -> History:
    """Readings of F and of its gap, given per datum."""
    free_energies = np.asarray(per_datum, dtype=np.float64)
    gaps = np.broadcast_to(np.asarray(gap, dtype=np.float64), free_energies.shape)
    rows = [
        Row(i, STEP, num_data * f, num_data * (f - g), num_data * g)
        for i, (f, g) in enumerate(zip(free_energies, gaps, strict=True))
    ]
    return History(tuple(rows), num_data)


def stopped_at(rule: Callable[[History], str | None], whole: History) -> int | None:
    """The number of readings after which a rule stops, asked after each."""
    for count in range(1, len(whole) + 1):
        if rule(History(whole.rows[:count], whole.num_data)):
            return count
    return None


def test_a_curve_that_flattens_settles_where_the_means_of_two_windows_differ_by_the_tolerance() -> None:
    curve = 2.0 + np.exp(-0.3 * np.arange(60))
    stop = stopped_at(vfe.Settled(tol=1e-3, window=5), history(curve))
    assert stop is not None
    before, after = curve[stop - 10 : stop - 5], curve[stop - 5 : stop]
    assert before.mean() - after.mean() <= 1e-3
    one_earlier = curve[stop - 11 : stop - 6].mean() - curve[stop - 6 : stop - 1].mean()
    assert one_earlier + 2 * np.sqrt(2 * curve[stop - 11 : stop - 6].var(ddof=1) / 5) > 1e-3


def test_two_windows_have_to_be_full() -> None:
    flat = history(np.full(20, 3.0))
    assert stopped_at(vfe.Settled(window=5), flat) == 10
    assert stopped_at(vfe.Settled(window=2), flat) == 4


def test_a_steady_fall_above_the_tolerance_never_settles_and_one_below_it_does() -> None:
    steady = -np.arange(200.0)
    assert stopped_at(vfe.Settled(tol=1e-3, window=5), history(3e-4 * steady)) is None
    assert stopped_at(vfe.Settled(tol=1e-3, window=5), history(1e-4 * steady)) == 10


def test_a_rise_is_no_rest() -> None:
    assert stopped_at(vfe.Settled(tol=1e-3), history(0.01 * np.arange(50))) is None


@pytest.mark.parametrize("spread", [0.005, 0.02, 0.1])
def test_noise_above_the_tolerance_is_not_taken_for_rest(spread: float) -> None:
    """50 noisy runs of 200 readings that fall by 5e-3 from window to window: chance equalities are many."""
    random = np.random.default_rng(0)
    fall = -1e-3 * np.arange(200)
    rule, equal_by_chance, stopped = vfe.Settled(tol=1e-3, window=5), 0, 0
    for _ in range(50):
        curve = fall + spread * random.standard_normal(200)
        means = np.convolve(curve, np.full(5, 0.2), mode="valid")
        equal_by_chance += bool((np.abs(means[5:] - means[:-5]) <= 1e-3).any())
        stopped += stopped_at(rule, history(curve)) is not None
    assert equal_by_chance >= 38
    assert stopped <= 1


def test_noise_below_the_tolerance_does_not_keep_a_flat_curve_from_settling() -> None:
    random = np.random.default_rng(1)
    rule = vfe.Settled(tol=1e-2, window=5)
    stops = [stopped_at(rule, history(3.0 + 2e-3 * random.standard_normal(50))) for _ in range(100)]
    assert all(stop is not None and stop <= 20 for stop in stops)


def test_a_larger_window_settles_what_a_small_one_cannot_tell() -> None:
    random = np.random.default_rng(2)
    curve = history(3.0 + 0.01 * random.standard_normal(400))
    assert stopped_at(vfe.Settled(tol=5e-3, window=100), curve) is not None
    assert stopped_at(vfe.Settled(tol=5e-3, window=5), curve) is None


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_readings_that_are_not_finite_settle_nothing(value: float) -> None:
    curve = np.full(30, 3.0)
    curve[[4, 12, 20, 28]] = value
    assert stopped_at(vfe.Settled(window=5), history(curve)) is None


def test_both_rules_count_nats_per_datum_of_each_reading() -> None:
    rows = [Row(i, STEP, 2.5 * n, 2.0 * n, 0.5 * n, num_data=n) for i, n in enumerate((10, 7, 10, 3))]
    mixed = History(tuple(rows), 3)
    assert vfe.Settled(tol=1e-6, window=2)(mixed)
    assert vfe.GapBelow(0.51, window=4)(mixed)
    assert vfe.GapBelow(0.49)(mixed) is None


def test_the_gap_stops_where_it_is_below_its_bound() -> None:
    falling = history(np.full(10, 3.0), gap=1.0 / np.arange(1, 11))
    assert stopped_at(vfe.GapBelow(0.3), falling) == 4
    assert stopped_at(vfe.GapBelow(0.3, window=3), falling) == 6
    assert stopped_at(vfe.GapBelow(0.05), falling) is None


@pytest.mark.parametrize("gap", [np.nan, np.inf])
def test_a_gap_that_is_not_known_stops_nothing(gap: float) -> None:
    gaps = np.array([gap, 0.01, gap])
    assert vfe.GapBelow(0.1)(history(np.full(3, 3.0), gap=gaps)) is None
    assert vfe.GapBelow(0.1, window=2)(history(np.full(2, 3.0), gap=gaps[:2])) is None


def test_no_reading_stops_nothing() -> None:
    assert vfe.Settled()(History(())) is None
    assert vfe.GapBelow(1.0)(History(())) is None


def test_the_words_have_the_numbers() -> None:
    assert "tol=0.001" in str(vfe.Settled()(history(np.full(10, 3.0))))
    assert vfe.GapBelow(0.1)(history([3.0], gap=0.05)) == "the gap per datum is 0.05 nats, below 0.1"


@pytest.mark.parametrize(
    "make",
    [
        lambda: vfe.Settled(tol=-1e-3),
        lambda: vfe.Settled(tol=np.nan),
        lambda: vfe.Settled(tol=np.inf),
        lambda: vfe.Settled(window=1),
        lambda: vfe.Settled(window=2.5),
        lambda: vfe.GapBelow(0.0),
        lambda: vfe.GapBelow(-1.0),
        lambda: vfe.GapBelow(np.nan),
        lambda: vfe.GapBelow(0.1, window=0),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(VFEError, match="was given"):
        make()
