r"""What a history tells: where F rose, whether it rests or still falls, and what is left of it once it rests.

Phases of EM are compared row by row. Readings of SVI and of batches may be noisy and are compared by windows of them,
as `learning.rest` has it: F rests, or falls, or nobody knows yet.

References:
    von Neumann, Kent, Bellinson and Hart (1941), The mean square successive difference.
"""

from dataclasses import dataclass

import numpy as np

from pyro_vfe.learning.alike import APART, UNKNOWN
from pyro_vfe.learning.history import (
    BATCH,
    EPOCH,
    JUMP,
    SLEEP,
    START,
    STEP,
    WAKE,
    History,
    Numbers,
    Row,
)
from pyro_vfe.learning.rest import WINDOW, Change, change_of
from pyro_vfe.reporting.diagnose_notebook import Notebook, nats, per_datum

_PHASES = (START, "E", "M", JUMP)
_FEWEST = 4
"""Fewer readings than this tell of no trend."""
_VERY_SURE = 6.0
"""By so many standard errors F has risen from its lowest window, which is the lowest of many."""
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
    random: tuple[str, ...]
    """What makes readings differ beside what was learned, in words."""
    window: int
    """How many readings are averaged; one where F is exact."""

    @property
    def is_exact(self) -> bool:
        """Whether readings differ by F alone."""
        return self.window == 1

    @property
    def change(self) -> Change | None:
        """How F changed over the last two windows; None where there are too few readings for these."""
        return change_of(self.free_energy, self.window)

    def fall(self, flat: float) -> Change | None:
        """How F fell at the end, if it is known to: over long windows where there are many readings, or short ones.

        Args:
            flat: A change that is none, nats per datum.
        """
        count = len(self.rows)
        windows = {self.window} if self.is_exact else {min(self.window, count // 2), max(self.window, count // 10)}
        changes = [change_of(self.free_energy, window) for window in sorted(windows)]
        return next((change for change in changes if change is not None and change.falls(flat)), None)


def look_at_history(
    history: History,
    rounding: float | None,
    gap_known_to_be: float | None,
    converged: bool | None,
    notebook: Notebook,
) -> None:
    """Writes down what is wrong with how F fell, and what is left of it.

    Args:
        history: The readings.
        rounding: A rise that is none, nats; None where it is not known.
        gap_known_to_be: The gap at the end in nats, where a decomposition says so.
        converged: What the run says of itself; None where it says nothing.
        notebook: Where to write.
    """
    _look_at_phases(history, rounding, notebook)
    series = series_of(history, converged)
    if series is None or not _is_readable(series, notebook):
        return
    _look_at_alike(history, notebook)
    notebook.look("whether F rose or still falls")
    if gap_known_to_be is None:
        _look_at_spread(series, notebook)
    if not _diverges(series, notebook) and not _still_falls(series, converged, notebook):
        if rests(series, converged, notebook.thresholds.flat):
            _look_at_rest(series, gap_known_to_be, notebook)
        else:
            notebook.skip("whether F rests", _why_not_known(series, converged, notebook.thresholds.flat))


def series_of(history: History, converged: bool | None) -> Series | None:
    """Returns the readings that tell of a trend.

    Args:
        history: All readings.
        converged: What the run says of itself; None where it says nothing.
    """
    for phases in ((STEP,), ("E", JUMP), (EPOCH,), (BATCH,), (SLEEP,), (WAKE,)):
        rows = history.of(*phases).rows
        if rows:
            sizes = [row.num_data or history.num_data for row in rows]
            values = np.array([row.free_energy for row in rows]) / np.array(sizes)
            is_exact = (phases[0] == "E" and not history.random) or (phases[0] == EPOCH and converged is True)
            return Series(phases[0], rows, values, sizes[-1], history.random, 1 if is_exact else WINDOW)
    return None


def rests(series: Series, converged: bool | None, flat: float) -> bool:
    """Whether F is known to rest at the end of some readings.

    Args:
        series: The readings.
        converged: What the run says of itself; None where it says nothing.
        flat: A change that is none, nats per datum.
    """
    change = series.change
    return change is not None and change.rests(flat) and not (series.is_exact and converged is False)


def _is_readable(series: Series, notebook: Notebook) -> bool:
    """Whether readings tell of a trend; writes down why they do not."""
    what = "whether F has settled"
    if np.isnan(series.free_energy).all():
        notebook.skip(what, "No reading of the history knows F; where a run or a Monitor was given, its notes say why.")
    elif not np.isfinite(series.free_energy[-1]):
        _find_not_finite(series, notebook)
    elif not np.isfinite(series.free_energy).all():
        notebook.skip(what, "Some of its readings are not finite.")
    elif len(series.rows) < (2 if series.is_exact else _FEWEST):
        notebook.skip(what, f"Not known yet: the history has too few readings ({len(series.rows)}).")
    else:
        return True
    return False


def _look_at_alike(history: History, notebook: Notebook) -> None:
    """Writes down latents whose components no reading told apart."""
    names = [name for name in history.alike if name not in notebook.alike]
    if names:
        notebook.may_be_a_saddle = True
        listed = f"'{names[0]}'" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        fact = f"At every reading all that depends on {listed} is equally probable under every value."
        notebook.find("states-alike", names[0], 0.0, f"{fact} {UNKNOWN}", APART)


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
    of_what = " and ".join(series.random) or "what is drawn at random"
    if np.isnan(stderr):
        notebook.find(
            "spread-unknown",
            None,
            1,
            f"Each reading of F hangs on {of_what}, and is of one particle, which does not tell how far it is off.",
            "Let the readings have more: vfe.Monitor(model, guide, elbo=vfe.FreeEnergy(num_particles=10)).",
        )
    elif stderr > notebook.thresholds.spread * series.num_data:
        notebook.find(
            "spread-too-large",
            None,
            stderr,
            f"F of the last reading has a standard error of {nats(stderr)} over particles, from {of_what}: differences "
            "of that size between readings mean nothing.",
            "Let the readings have more: vfe.Monitor(model, guide, elbo=vfe.FreeEnergy(num_particles=...)).",
            stderr,
        )


def _find_not_finite(series: Series, notebook: Notebook) -> None:
    last = series.rows[-1].free_energy
    kind = "support-mismatch" if np.isposinf(last) else "not-finite"
    if notebook.of(kind):
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
    window, values = series.window, series.free_energy
    if series.is_exact or len(values) < 2 * window:
        return False
    window = max(window, len(values) // 10)
    means = np.convolve(values, np.ones(window) / window, mode="valid")
    rise = float(means[-1] - means.min())
    place = int(means.argmin())
    error = np.sqrt((values[place : place + window].var(ddof=1) + values[-window:].var(ddof=1)) / window)
    if not rise > max(_RISEN * notebook.thresholds.flat, _VERY_SURE * error):
        return False
    lowest = series.rows[place + window - 1].iteration
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


def _still_falls(series: Series, converged: bool | None, notebook: Notebook) -> bool:
    """Whether F fell at the end, or a run of EM that F was falling in was stopped."""
    change = series.fall(notebook.thresholds.flat)
    if change is None and series.is_exact and converged is False and series.change and series.change.nats < 0:
        change = series.change
    if change is None:
        return False
    num_data, steps = series.num_data, np.diff(series.free_energy[-2 * change.window :])
    # Where no reading is above the one before, the last step tells more than means of windows.
    fall = -float(steps[-1]) if (steps < 0).all() else -change.nats
    over = "at the last reading" if (steps < 0).all() else f"from {change.window} readings to the next {change.window}"
    stopped = ", and the run had not converged" if converged is False else ""
    notebook.find(
        "not-settled",
        series.phase,
        fall,
        f"F still falls: by {per_datum(fall, num_data)} {over}{stopped}.",
        "Go on: more steps (or iterations), until F rests. Judge guide and model then.",
        fall * num_data,
    )
    return True


def _why_not_known(series: Series, converged: bool | None, flat: float) -> str:
    """Why it is not known yet whether F rests, in words."""
    change, count = series.change, len(series.rows)
    if series.is_exact and converged is False:
        return "Not known yet: the run had not converged."
    if change is None:
        return f"Not known yet: that takes {2 * series.window} readings, and the history has {count}."
    noise = f" Readings differ by {' and '.join(series.random)}: {_steadier(series.random)}." if series.random else ""
    return (
        f"Not known yet: from {change.window} readings to the next {change.window} it changed by "
        f"{per_datum(change.nats, series.num_data)}, give or take {nats(2 * change.error)}, where no more than "
        f"{nats(flat)} counts as rest (flat=).{noise}"
    )


def _steadier(random: tuple[str, ...]) -> str:
    """What makes readings differ less, in words."""
    ways = {
        "mini-batch": "let the Monitor read held-out data (held_out=)",
        "guide's draws": "let it average over more particles (elbo=vfe.FreeEnergy(num_particles=...))",
        "subsample": "let it average over more particles (elbo=vfe.FreeEnergy(num_particles=...))",
    }
    found = [way for source, way in ways.items() if any(source in words for words in random)]
    return "; ".join(dict.fromkeys(found)) or "take more draws, or smaller steps, at the end"


def _look_at_rest(series: Series, gap_known_to_be: float | None, notebook: Notebook) -> None:
    """Writes down whose share is left, once F rests."""
    num_data, last = series.num_data, series.rows[-series.window :]
    gap = float(np.mean([row.gap / (row.num_data or num_data) for row in last]))
    if gap_known_to_be is not None:
        gap = gap_known_to_be / num_data
    if not np.isfinite(gap):
        notebook.skip("whose share of F is left", "The history does not know the gap.")
        return
    if notebook.may_be_a_saddle:
        notebook.skip("whose share of F is left", "Components are alike: another start may lower the surprise.")
        return
    notebook.look("whose share of F is left")
    surprise = float(np.mean([row.surprise / (row.num_data or num_data) for row in last]))
    is_small_share = gap_known_to_be is not None and not notebook.of("guide-bottleneck")
    if gap < notebook.thresholds.gap_per_datum or is_small_share:
        _find_model(surprise, gap, series, notebook)
    elif gap_known_to_be is None:
        _find_guide(gap, series, notebook)


def _find_model(surprise: float, gap: float, series: Series, notebook: Notebook) -> None:
    num_data = series.num_data
    # Of latents that are sampled the history has no gap: what their part of the guide costs is in the surprise.
    is_drawn = any("guide's draws" in source for source in series.random)
    is_drawn |= not series.random and series.rows[-1].stderr != 0
    left = (
        "the surprise is an estimate from draws of the guide, which includes what the guide costs for the latents that "
        "are drawn. A richer guide for these may lower it."
        if is_drawn
        else "at these parameters a richer guide would save no more than the gap, and steps like the last ones little."
    )
    notebook.find(
        "model-bottleneck",
        None,
        surprise,
        f"F rests. What is left is surprise, {per_datum(surprise, num_data)}, beside a gap of "
        f"{per_datum(max(gap, 0.0), num_data)}: {left}",
        "If it is not low enough, try other starts, or change the model: more states, another likelihood. Compare "
        "models by held-out surprise, or with az.loo and az.compare on vfe.to_inference_data(...).",
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
        "Give the guide more freedom, or another start. To see where: vfe.diagnose(vfe.FreeEnergy().decompose(model, "
        "guide, ...)) names the site and the data.",
        gap * series.num_data,
    )


def _moment(phase: str) -> str:
    return {STEP: "step", EPOCH: "epoch", BATCH: "batch"}.get(phase, "iteration")
