r"""The picture of how F fell, in nats.

F  =  surprise + gap
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vfe.errors import VFEError
from pyro_vfe.learning.history import History
from pyro_vfe.reporting.palette import (
    DARK,
    LIGHT,
    LIGHT_HATCH,
    Numbers,
    article,
    axes_or_new,
    ink,
    legend_above,
    number,
    unit,
    whole_numbers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKS = {
    "start": "s",
    "E": "o",
    "M": "D",
    "jump": "P",
    "epoch": "o",
    "final": "*",
    "batch": "o",
    "step": "o",
    "wake": "D",
    "sleep": "o",
}
"""One marker per phase."""

_NAMES = {
    "start": "the start",
    "E": "after an E-phase",
    "M": "after an M-phase",
    "jump": "after a jump",
    "epoch": "an epoch",
    "final": "all batches, at the end",
    "batch": "a batch",
    "step": "a step",
    "wake": "after a wake phase",
    "sleep": "after a sleep phase",
}

_HALF = 0.5
"""An M-phase stands half an iteration before its E-phase, and a last look at all batches half after the last epoch."""

_FEW_MARKS = 30
"""From so many rows of a phase on, marks stand at some of them only."""


def plot_free_energy(history: History, *, ax: "Axes | None" = None) -> "Axes":
    """Returns axes with F over the iterations, as the surprise and, stacked on it, the gap; in nats.

    A mark says where a phase ended: an E-phase at its iteration, an M-phase half an iteration before; a sleep phase at
    its step, the wake phase before it half a step earlier. The surprise's
    area is cut at the axis where its fall would be too small to see from zero. Where surprise and gap are unknown
    (NaN), F is a line alone; a standard error is a band around it. Rows that sum over different numbers of data are
    shown per datum.

    >>> from pyro_vfe.learning.history import History, Row
    >>> rows = Row(0, "start", 12.0, 10.0, 2.0), Row(0, "E", 10.0, 10.0, 0.0), Row(1, "M", 9.0, 8.5, 0.5)
    >>> plot_free_energy(History(rows, num_data=5)).get_ylabel()
    'nats, sum over 5 data'

    Args:
        history: Of EM, of EM on batches, of SVI, or of wake-sleep. `history.per_datum` shows nats per datum.
        ax: Where to draw; by default in a new figure.

    Raises:
        VFEError: It is no history, or an empty one; or matplotlib is missing.
    """
    _check_history(history)
    same_data = len({row.num_data or history.num_data for row in history.rows}) == 1
    rows = history if same_data else history.per_datum
    ax = axes_or_new(ax)
    x, free_energy = _positions(rows), rows.free_energy
    low, high, from_zero = _limits(np.concatenate([free_energy, rows.surprise, *_band(rows)]))
    handles = _areas(ax, x, rows, low, from_zero)
    handles += _spread(ax, x, rows)
    handles += ax.plot(*_wide(x, free_energy), color=ink(ax), linewidth=1.4, label="F", zorder=3)
    handles += _phases(ax, x, rows, high)
    ax.set_ylim(low, high)
    ax.margins(x=0.02)
    num_data = rows.rows[0].num_data or rows.num_data
    ax.set(title=_fall(free_energy), xlabel=_x_label(rows), ylabel=unit(num_data) if same_data else "nats per datum")
    whole_numbers(ax, list(x))
    legend_above(ax, handles, [str(handle.get_label()) for handle in handles])
    return ax


def _check_history(history: History) -> None:
    if not isinstance(history, History):
        hint = (
            "Pass its history: plot_free_energy(run.history)."
            if hasattr(history, "history")
            else "Pass the history of a run of EM, of vfe.fit, of a vfe.Monitor or of a vfe.WakeSleep."
        )
        raise VFEError(f"F is drawn over the rows of a History, and this is {article(history)}.", hint=hint)
    if not len(history):
        raise VFEError(
            "The history has no rows.",
            hint="Its phases are in history.phase; of(phase) keeps those of that name alone.",
        )


def _positions(history: History) -> Numbers:
    """Where each row stands: at its iteration, or half before or after."""
    phases = set(history.phase)
    before = {"M", "start"} if {"M", "E"} <= phases else {"wake"} if {"wake", "sleep"} <= phases else set()
    shifts = [-_HALF if phase in before else _HALF if phase == "final" else 0.0 for phase in history.phase]
    return np.asarray(history.iteration + np.array(shifts), dtype=np.float64)


def _band(history: History) -> tuple[Numbers, Numbers]:
    return history.free_energy - history.stderr, history.free_energy + history.stderr


def _limits(values: Numbers) -> tuple[float, float, bool]:
    """The limits in y, and whether areas start at zero: where their proportions can be read from there."""
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0, True
    low, high = float(values.min()), float(values.max())
    if 0 <= low < 0.5 * high:
        return 0.0, 1.05 * high, True
    room = 0.1 * (high - low) or 0.01 * abs(high) or 1.0
    return low - room, high + 0.5 * room, False


def _wide(x: Numbers, *values: Numbers) -> tuple[Numbers, ...]:
    """The same points; a single one as a short stretch, so that there is an area to see."""
    if len(x) > 1:
        return (x, *values)
    return (x + np.array([-_HALF, _HALF]), *(np.repeat(value, 2) for value in values))


def _areas(ax: "Axes", x: Numbers, history: History, low: float, from_zero: bool) -> list[Any]:
    """The surprise down to the lower limit, and the gap on it; nothing where they are unknown."""
    x, surprise, gap = _wide(x, history.surprise, history.gap)
    known = np.isfinite(surprise)
    if not known.any():
        return []
    line: Any = {"linewidth": 0.0}
    label = "surprise" if from_zero else f"surprise (cut at {number(low)})"
    areas: list[Any] = [ax.fill_between(x, low, surprise, where=known, color=DARK, label=label, **line)]
    top = surprise + gap
    areas.append(
        ax.fill_between(
            x,
            surprise,
            top,
            where=np.isfinite(top),
            facecolor=LIGHT,
            edgecolor="black",
            hatch=LIGHT_HATCH,
            label="gap",
            **line,
        )
    )
    return areas[::-1]


def _spread(ax: "Axes", x: Numbers, history: History) -> list[Any]:
    lower, upper = _band(history)
    if not (history.stderr > 0).any():
        return []
    x, lower, upper = _wide(x, lower, upper)
    known = np.isfinite(lower) & np.isfinite(upper)
    label = "± standard error"
    return [
        ax.fill_between(x, lower, upper, where=known, color="0.45", alpha=0.5, linewidth=0.0, label=label, zorder=2.5)
    ]


def _phases(ax: "Axes", x: Numbers, history: History, high: float) -> list[Any]:
    """A mark at the end of each phase, at some where there are many; and one at the top where F is infinite."""
    marks = []
    phases = np.array(history.phase)
    for turn, phase in enumerate(sorted(set(history.phase))):
        here = np.flatnonzero((phases == phase) & np.isfinite(history.free_energy))
        step = -(-len(here) // (_FEW_MARKS // 2)) if len(here) > _FEW_MARKS else 1
        if not len(here) or (step > 1 and len(set(history.phase)) == 1):
            continue
        # The marks of two phases take turns, so that none hides the other.
        shift = (step + 1) // 2 if turn % 2 else 0
        some = here[((history.iteration[here] - shift) % step == 0) | (here == here[0])]
        name = _NAMES.get(phase, phase)
        marks += ax.plot(
            x[some],
            history.free_energy[some],
            _MARKS.get(phase, "o"),
            color=ax.get_facecolor() if phase in ("M", "wake") else ink(ax),
            markeredgecolor=ink(ax),
            markersize=10 if phase == "final" else 4.5,
            label=f"{name} (1 in {step})" if step > 1 else name,
            zorder=4,
        )
    infinite = np.isinf(history.free_energy)
    if infinite.any():
        at_top = np.full(int(infinite.sum()), high)
        marks += ax.plot(x[infinite], at_top, "^", color=ink(ax), markersize=8, label="F infinite", zorder=4)
    return marks


def _fall(free_energy: Numbers) -> str:
    first, last = float(free_energy[0]), float(free_energy[-1])
    if len(free_energy) == 1:
        return f"F = {number(last)} nats"
    return f"F from {number(first)} to {number(last)} nats"


def _x_label(history: History) -> str:
    phases = set(history.phase)
    if phases & {"step", "wake", "sleep"}:
        return "step"
    return "epoch" if phases & {"epoch", "final", "batch"} else "iteration"
