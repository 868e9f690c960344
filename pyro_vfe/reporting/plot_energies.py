r"""The picture of a free energy taken apart, in nats: its four readings on one scale.

F  =  surprise + gap  =  energy - entropy  =  complexity - accuracy
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vfe.energy.decomposition import Decomposition
from pyro_vfe.errors import PlateKeptError, VFEError
from pyro_vfe.reporting.palette import (
    DARK,
    LIGHT,
    LIGHT_HATCH,
    array,
    article,
    axes_or_new,
    ink,
    number,
    text_share,
    unit,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_READINGS = (
    (("free energy", "free_energy", 1),),
    (("surprise", "surprise", 1), ("gap", "gap", 1)),
    (("energy", "energy", 1), ("entropy", "entropy", -1)),
    (("complexity", "complexity", 1), ("accuracy", "accuracy", -1)),
)
"""The terms of each reading: in words, in the decomposition, and the sign with which they enter F."""

_BAR = 0.72
"""The height of a bar; rows are 1 apart."""

_BETWEEN = 0.45
"""The room between two readings."""

_ROUNDING = 1e-9
"""Nats below zero that are a rounding, as in the printed table."""


@dataclass(frozen=True)
class _Step:
    """One term on its way from one value to another, in nats."""

    name: str
    """In words."""
    value: float
    """The term itself."""
    start: float
    """Where the terms before it led."""
    end: float
    """Where it leads."""
    text: str
    """The term as it stands in the equation."""
    row: float
    """Where it is drawn."""
    is_second: bool
    """Whether it goes on where another one ended."""


def plot_decomposition(terms: Decomposition, *, ax: "Axes | None" = None) -> "Axes":
    """Returns axes with the four readings of F as bars on one scale, every term with its number of nats.

    Each reading starts at zero, its second term goes on where its first one ends, and all of them end at F: a line. A
    term that is subtracted goes to the left, or to the right where it is negative, as the accuracy often is.

    Args:
        terms: In total; `terms.per_datum` shows nats per datum.
        ax: Where to draw; by default in a new figure.

    Raises:
        PlateKeptError: The terms are those of a plate's elements.
        VFEError: They are no terms at all; or matplotlib is missing.
    """
    _check_total(terms)
    ax = axes_or_new(ax, (6.8, 4.2))
    steps = _steps(terms)
    spread = 0.0 if terms.stderr is None else float(array(terms.stderr))
    low, high = _reach(ax, steps, spread)
    free_energy = steps[0].end
    for step in steps:
        _draw_bar(ax, step, low, high)
        _write(ax, step, free_energy + (spread if step is steps[0] and np.isfinite(spread) else 0.0), low, high)
    if np.isfinite(free_energy):
        ax.axvline(free_energy, color=ink(ax), linewidth=1.2, linestyle="--", zorder=3)
    if np.isfinite(spread) and spread > 0 and np.isfinite(free_energy):
        ax.errorbar(free_energy, steps[0].row, xerr=spread, color=ink(ax), capsize=4, zorder=4)
    ax.axvline(0.0, color=ink(ax), linewidth=0.8, zorder=3)
    ax.set_yticks([step.row for step in steps], [step.name for step in steps])
    ax.tick_params(axis="y", length=0)
    ax.set(xlim=(low, high), ylim=(steps[-1].row + 0.6, -0.6), xlabel=unit(terms.num_data), title=_title(terms, spread))
    return ax


def _check_total(terms: Decomposition) -> None:
    if not isinstance(terms, Decomposition):
        raise VFEError(
            f"The four readings are those of a Decomposition, and this is {article(terms)}.",
            hint="Pass vfe.FreeEnergy().decompose(model, guide, ...), or run.decomposition() of a run of EM.",
        )
    if terms.plate is not None:
        raise PlateKeptError(
            f"These terms are those of each element of plate '{terms.plate}', and the four readings are of one F.",
            hint="Pass the decomposition that .by() was asked of; plot_gap shows the gap of each element.",
        )


def _steps(terms: Decomposition) -> list[_Step]:
    """All terms, where they are drawn, and between which values."""
    steps = []
    row = 0.0
    for reading in _READINGS:
        end = 0.0
        for place, (name, field, sign) in enumerate(reading):
            value = float(array(getattr(terms, field)))
            value = 0.0 if -_ROUNDING < value < 0 else value
            start, end = end, end + sign * value
            shown = f"({number(value)})" if value < 0 and place else number(value)
            text = f"{'+' if sign > 0 else '−'} {shown}" if place else shown
            steps.append(_Step(name, value, start, end, text, row, place > 0))
            row += 1.0
        row += _BETWEEN
    return steps


def _reach(ax: "Axes", steps: list[_Step], spread: float) -> tuple[float, float]:
    """The limits in x: all ends that are finite, and room for the numbers to the right of them."""
    ends = np.array([0.0, *(step.end for step in steps), steps[0].end + spread])
    ends = ends[np.isfinite(ends)]
    low, high = float(ends.min()), float(ends.max())
    width = (high - low) or 1.0
    low -= 0.04 * width if low < 0 else 0.0
    room = min(0.5, text_share(ax, max(len(step.text) for step in steps)) + 0.03)
    return low, low + (high - low or 1.0) / (1 - room)


def _draw_bar(ax: "Axes", step: _Step, low: float, high: float) -> None:
    """A bar, as far as the axes go, and the line on which it goes on from the one above."""
    if not np.isfinite(step.start) or np.isnan(step.end):
        return
    start, end = np.clip([step.start, step.end], low, high)
    style: Any = {"color": LIGHT, "hatch": LIGHT_HATCH} if step.is_second else {"color": DARK}
    ax.barh(step.row, end - start, _BAR, left=start, edgecolor="black", linewidth=0.8, zorder=2, **style)
    if np.isinf(step.end):
        # At the edge of the axes, whatever limits they get later: a mark outside would break a layout.
        edge, marker = (1.0, ">") if step.end > 0 else (0.0, "<")
        at_edge: Any = {"transform": ax.get_yaxis_transform(), "clip_on": False}
        ax.plot(edge, step.row, marker, color=ink(ax), markersize=9, zorder=5, **at_edge)
    if step.is_second:
        ax.plot([start, start], [step.row - 1, step.row], color=ink(ax), linewidth=0.8, zorder=1)


def _write(ax: "Axes", step: _Step, line: float, low: float, high: float) -> None:
    """The term's number: to the right of its bar, and of a line that would cross it; on a bar without end, inside."""
    ends = np.array([step.start, step.end]) if np.isfinite(step.start) and not np.isnan(step.end) else np.zeros(2)
    right = float(np.clip(ends, low, high).max())
    if right <= line <= right + (high - low) * (text_share(ax, len(step.text)) + 0.02):
        right = line
    inside = bool(np.isposinf(ends).any())
    ax.annotate(
        step.text,
        (right, step.row),
        (-10 if inside else 5, 0),
        textcoords="offset points",
        va="center",
        ha="right" if inside else "left",
        fontsize="small",
        bbox={"facecolor": ax.get_facecolor(), "edgecolor": "none", "pad": 0.8},
        zorder=4,
    ).set_in_layout(False)  # there is room for it inside the axes


def _title(terms: Decomposition, spread: float) -> str:
    sampled = "" if terms.exact else f" ± {number(spread)}" if spread > 0 else " (partly sampled)"
    return f"Four readings of F = {number(float(array(terms.free_energy)))}{sampled} nats"
