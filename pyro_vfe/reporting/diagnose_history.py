r"""What a history tells: where F rose, whether it still falls, and what is left of it once it rests.

Phases of EM are compared row by row. Readings of SVI and of batches are noisy and are compared by windows of them:

    fall  =  mean(the window before the last) - mean(the last window)
    noise^2  =  (variance of successive differences) / 2                what varies besides a trend

References:
    von Neumann, Kent, Bellinson and Hart (1941), The mean square successive difference.
"""

from dataclasses import dataclass

import numpy as np

from pyro_vfe.learning.history import BATCH, EPOCH, SLEEP, START, STEP, WAKE, History, Numbers, Row
from pyro_vfe.reporting.diagnose_notebook import Notebook, nats, per_datum

_PHASES = (START, "E", "M")
_NOISY = (STEP, EPOCH, BATCH, SLEEP, WAKE)
_FEWEST = 4
"""Fewer readings than this tell of no trend."""
_WINDOW = 5
_SURE = 3.0
"""A fall by so many standard errors is one."""
_VERY_SURE = 6.0
"""So many for a rise from the lowest window, which is the lowest of many."""
_RISEN = 10.0
"""F has risen if it did by so many times what counts as flat."""

_RISES = (
    "Exact phases never raise F. Annealed, Hard, MonteCarlo and Gradient phases, and a start below a floor, may. "
    "Without one of those, look for a parameter that the program detaches or changes itself, and for data that change "
    "from call to call."
)
_INFINITE_RISES = (
    "A parameter came to the end of its range: a scale of 0, or a probability that underflows to 0, as it soon does in "
    "single precision. Learn in float64 (torch.set_default_dtype(torch.float64)), or give the parameter a floor."
)


@dataclass(frozen=True, eq=False)
class Series:
    """Readings of one kind, nats per datum."""

    phase: str
    rows: tuple[Row, ...]
    free_energy: Numbers
    num_data: int
    """The number of data of the last reading."""

    @property
    def is_noisy(self) -> bool:
        """Whether the readings differ by more than F."""
        return self.phase in _NOISY

    @property
    def window(self) -> int:
        """How many readings are averaged."""
        count = len(self.rows)
        return max(count // 10, min(_WINDOW, count // _FEWEST), 1) if self.is_noisy else 1

    @property
    def scatter(self) -> float:
        """The standard deviation of single readings beside their trend."""
        changes = np.diff(self.free_energy[len(self.rows) // 2 :])  # the beginning falls steeply
        return float(changes.std() / np.sqrt(2))

    @property
    def noise(self) -> float:
        """The standard error of the difference of two windows' means."""
        return float(self.scatter * np.sqrt(2 / self.window)) if self.is_noisy else 0.0


def look_at_history(
    history: History, rounding: float | None, gap_known_to_be: float | None, notebook: Notebook
) -> None:
    """Writes down what is wrong with how F fell, and what is left of it.

    Args:
        history: The readings.
        rounding: A rise that is none, nats; None where it is not known.
        gap_known_to_be: The gap at the end in nats, where a decomposition says so.
        notebook: Where to write.
    """
    _look_at_phases(history, rounding, notebook)
    series = _series(history)
    if series is None:
        notebook.skip("whether F has settled", "The history has no readings to tell it by.")
        return
    if np.isnan(series.free_energy).all():
        notebook.skip(
            "whether F has settled",
            "No reading of the history knows F; where a run or a Monitor was given, its notes say why.",
        )
        return
    if not np.isfinite(series.free_energy[-1]):
        _find_not_finite(series, notebook)
        return
    if not np.isfinite(series.free_energy).all():
        notebook.skip("whether F has settled", "Some of its readings are not finite.")
        return
    fewest = _FEWEST if series.is_noisy else 2
    if len(series.rows) < fewest:
        notebook.skip("whether F has settled", f"The history has too few readings ({len(series.rows)}).")
        return
    notebook.look("whether F rose or still falls")
    if gap_known_to_be is None:
        _look_at_spread(series, notebook)
    if not _diverges(series, notebook) and not _still_falls(series, notebook):
        _look_at_rest(series, gap_known_to_be, notebook)


def _series(history: History) -> Series | None:
    """The readings that tell of a trend."""
    for phase in (STEP, "E", EPOCH, BATCH, SLEEP, WAKE):
        rows = history.of(phase).rows
        if rows:
            sizes = [row.num_data or history.num_data for row in rows]
            values = np.array([row.free_energy for row in rows]) / np.array(sizes)
            return Series(phase, rows, values, sizes[-1])
    return None


def _look_at_phases(history: History, rounding: float | None, notebook: Notebook) -> None:
    """Writes down the largest rise from one phase of EM to the next."""
    rows = [row for row in history.rows if row.phase in _PHASES]
    values = np.array([row.free_energy for row in rows])
    if len(rows) < 2 or not {row.phase for row in rows} - {START}:
        return
    notebook.look("whether a phase of EM raised F")
    with np.errstate(invalid="ignore"):
        rises = np.diff(values)
    finite = np.isfinite(values)
    largest = np.abs(values[finite]).max() if finite.any() else 0.0
    limit = notebook.thresholds.rounding * max(float(largest), 1.0) if rounding is None else rounding
    rises = np.where(np.isnan(rises) | np.isneginf(rises), 0.0, rises)
    beyond = np.flatnonzero(rises > limit)
    if not len(beyond):
        return
    worst = int(rises.argmax())
    row, rise = rows[worst + 1], float(rises[worst])
    often = "once" if len(beyond) == 1 else f"{len(beyond)} times"
    is_finite = bool(np.isfinite(rise))
    size = f"by {nats(rise)}, where rounding explains {nats(limit)}" if is_finite else "F was infinite after it"
    notebook.find(
        "phase-raised",
        row.phase,
        rise,
        f"F rose {often} from one phase to the next, most in the {row.phase}-phase of iteration {row.iteration}: "
        f"{size}.",
        _RISES if is_finite else _INFINITE_RISES,
        # What was infinite for a moment is lost no longer: the end says whether F is.
        rise if is_finite else 0.0,
        (int(row.iteration),),
    )


def _look_at_spread(series: Series, notebook: Notebook) -> None:
    """Writes down whether the last reading is too rough to be read by itself."""
    stderr = float(series.rows[-1].stderr)
    if np.isnan(stderr):
        notebook.find(
            "spread-unknown",
            None,
            1,
            "Part of F is sampled, and readings of one particle each do not tell how far they are off.",
            "Let the readings have more: vfe.Monitor(model, guide, elbo=vfe.FreeEnergy(num_particles=10)).",
        )
    elif stderr > notebook.thresholds.spread * series.num_data:
        notebook.find(
            "spread-too-large",
            None,
            stderr,
            f"F of the last reading has a standard error of {nats(stderr)} over particles: differences of that size "
            "between readings mean nothing.",
            "Let the readings have more: vfe.Monitor(model, guide, elbo=vfe.FreeEnergy(num_particles=...)).",
            stderr,
        )


def _find_not_finite(series: Series, notebook: Notebook) -> None:
    last = series.rows[-1].free_energy
    kind = "support-mismatch" if np.isposinf(last) else "not-finite"
    if any(finding.kind == kind for finding in notebook.findings):
        return
    notebook.find(
        kind,
        None,
        last,
        f"F is {last} at the last reading.",
        "Take the end apart, vfe.FreeEnergy().decompose(model, guide, ...): it names the site."
        if kind == "support-mismatch"
        else "Look for a parameter that is NaN or outside of its range; a smaller learning rate keeps them inside.",
        float("inf"),
    )


def _diverges(series: Series, notebook: Notebook) -> bool:
    """Whether the last window is well above the lowest."""
    if not series.is_noisy:
        return False
    means = np.convolve(series.free_energy, np.ones(series.window) / series.window, mode="valid")
    rise = float(means[-1] - means.min())
    if not rise > max(_RISEN * notebook.thresholds.flat, _VERY_SURE * series.noise):
        return False
    lowest = series.rows[int(means.argmin()) + series.window - 1].iteration
    notebook.find(
        "diverging",
        series.phase,
        rise,
        f"F is {per_datum(rise, series.num_data)} above where it was lowest, at {_moment(series.phase)} {lowest}.",
        "Take a smaller learning rate, or let it fall over the run; keep the parameters of the lowest F. If these are "
        "readings of held-out data, the model has begun to overfit: stop there.",
        rise * series.num_data,
        (int(lowest),),
    )
    return True


def _still_falls(series: Series, notebook: Notebook) -> bool:
    """Whether F fell over the last two windows."""
    width, values = series.window, series.free_energy
    fall = float(values[-2 * width : -width].mean() - values[-width:].mean())
    if not fall > max(notebook.thresholds.flat, _SURE * series.noise):
        return False
    over = f"the last {2 * width} readings" if width > 1 else "the last two readings"
    notebook.find(
        "not-settled",
        series.phase,
        fall,
        f"F still falls: by {per_datum(fall, series.num_data)} over {over}.",
        "Go on: more steps (or iterations), until F rests. Judge guide and model then.",
        fall * series.num_data,
    )
    return True


def _look_at_rest(series: Series, gap_known_to_be: float | None, notebook: Notebook) -> None:
    """Writes down whose share is left, once F rests."""
    num_data, last = series.num_data, series.rows[-series.window :]
    gap = float(np.mean([row.gap / (row.num_data or num_data) for row in last]))
    if gap_known_to_be is not None:
        gap = gap_known_to_be / num_data
    if not np.isfinite(gap):
        notebook.skip("whose share of F is left", "The history does not know the gap.")
        return
    notebook.look("whose share of F is left")
    surprise = float(np.mean([row.surprise / (row.num_data or num_data) for row in last]))
    is_small_share = gap_known_to_be is not None and not any(f.kind == "guide-bottleneck" for f in notebook.findings)
    if gap < notebook.thresholds.gap_per_datum or is_small_share:
        _find_model(surprise, gap, series, notebook)
    elif gap_known_to_be is None:
        _find_guide(gap, series, notebook)


def _find_model(surprise: float, gap: float, series: Series, notebook: Notebook) -> None:
    num_data = series.num_data
    is_rough = series.noise > notebook.thresholds.flat
    # Of latents that are sampled the history has no gap: what their part of the guide costs is in the surprise.
    is_sampled = series.rows[-1].stderr != 0
    left = (
        "the surprise is an estimate from draws of the guide, which includes what the guide costs for the latents that "
        "are drawn. A richer guide for these may lower it."
        if is_sampled
        else "neither more steps nor a richer guide can lower it."
    )
    noise = f", as far as readings tell that scatter by {per_datum(series.scatter, num_data)}" if is_rough else ""
    notebook.find(
        "model-bottleneck",
        None,
        surprise,
        f"F rests{noise}. What is left is surprise, {per_datum(surprise, num_data)}, beside a gap of "
        f"{per_datum(max(gap, 0.0), num_data)}: {left}",
        "If it is not low enough, change the model: more states, another likelihood, other starts. Compare models by "
        "held-out surprise, or with az.loo and az.compare on vfe.to_inference_data(...).",
    )


def _find_guide(gap: float, series: Series, notebook: Notebook) -> None:
    start = series.rows[0]
    first = start.gap / (start.num_data or series.num_data)
    from_where = f", from {nats(first)} at the first reading" if np.isfinite(first) and len(series.rows) > 1 else ""
    notebook.find(
        "guide-bottleneck",
        None,
        gap,
        f"F rests with a gap of {per_datum(gap, series.num_data)}{from_where}: so much is the guide's.",
        "Give the guide more freedom. To see where: vfe.diagnose(vfe.FreeEnergy().decompose(model, guide, ...)) names "
        "the site and the data.",
        gap * series.num_data,
    )


def _moment(phase: str) -> str:
    return {STEP: "step", EPOCH: "epoch", BATCH: "batch"}.get(phase, "iteration")
