r"""The picture of which data carry the gap, in nats.

gap  =  sum_n  KL( Q(v_n) || P(v_n | u_n) )
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pyro_vfe.energy.decomposition import Decomposition
from pyro_vfe.errors import PlateKeptError, VFEError
from pyro_vfe.reporting.palette import (
    DARK,
    MANY,
    PALE,
    Numbers,
    array,
    article,
    axes_or_new,
    ink,
    legend_above,
    number,
    thinned,
    words_across,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FEW_ELEMENTS = 60
"""Up to so many elements of a plate have a bar each, in their order; more are sorted."""

_HALF, _NEARLY_ALL = 0.5, 0.99
"""The share of the gap whose carriers stand out, and the share that is shown of many elements."""

_NO_GAP = 1e-10
"""Nats in all that are a rounding: nobody carries them."""

_NAMED = 8
"""The most elements whose index is written."""


def plot_gap(terms: Decomposition, *, ax: "Axes | None" = None) -> "Axes":
    """Returns axes with the gap of every element of a plate, in nats; the fewest that carry half of it stand out.

    Few elements are in their order. Many are sorted by their gap, the largest first, and the largest are named by
    their index.

    Args:
        terms: Those of each element: `decomposition.by(plate)`.
        ax: Where to draw; by default in a new figure.

    Raises:
        PlateKeptError: The terms are a total.
        VFEError: They are no terms at all; or matplotlib is missing.
    """
    _check_elements(terms)
    ax = axes_or_new(ax)
    gap = array(terms.gap)
    few = len(gap) <= _FEW_ELEMENTS
    falling = np.argsort(-np.nan_to_num(gap, nan=-np.inf, posinf=np.inf), kind="stable")
    half = falling[: _carry(gap[falling], _HALF)]
    order = np.arange(len(gap)) if few else falling[: max(_FEW_ELEMENTS, _carry(gap[falling], _NEARLY_ALL) or len(gap))]
    low, high = _limits(gap, nobody=not len(half))
    heights = np.nan_to_num(gap[order], nan=0.0, posinf=high)
    names = _names(terms, len(gap))
    what = "infinite" if np.isposinf(gap).any() else "carry half of the gap"
    handles = _bars(ax, heights, np.isin(order, half), [names[i] for i in half], what)
    _marks_at_top(ax, order, gap, high)
    ax.set(xlim=(-0.6, len(order) - 0.4), ylim=(low, high), ylabel="gap, nats", title=_title(gap, len(half)))
    ax.set_xlabel(str(terms.plate) if few else _what_is_sorted(terms, gap, order))
    if few:
        shown = thinned(len(gap), words_across(ax, max(map(len, names))))
        ax.set_xticks(shown, [names[i] for i in shown])
    legend_above(ax, handles, [str(handle.get_label()) for handle in handles])
    return ax


def _check_elements(terms: Decomposition) -> None:
    if not isinstance(terms, Decomposition):
        raise VFEError(
            f"The gap of each element is part of a Decomposition, and this is {article(terms)}.",
            hint="Pass vfe.FreeEnergy().decompose(model, guide, ...).by(plate).",
        )
    if terms.plate is None:
        plates = terms.runs[0].all_plates if terms.runs else ()
        names = " or ".join(f".by('{plate}')" for plate in plates)
        raise PlateKeptError(
            "These terms are a total, which no element carries.",
            hint=f"Ask for those of each element: {names}." if names else "There is no plate whose elements could.",
        )


def _carry(falling: Numbers, share: float) -> int:
    """How many of the largest gaps are needed for a share of the whole: the infinite ones, or none where it is zero."""
    if np.isposinf(falling).any():
        return int(np.isposinf(falling).sum())
    sums = np.cumsum(np.nan_to_num(falling, nan=0.0))
    if not len(sums) or sums[-1] <= _NO_GAP:
        return 0
    return int(np.argmax(sums >= share * sums[-1])) + 1


def _limits(gap: Numbers, *, nobody: bool) -> tuple[float, float]:
    """The limits in y; where nobody carries a gap, a rounding shall not look like one."""
    finite = gap[np.isfinite(gap)]
    if nobody or not finite.any():
        return 0.0, 1.0
    return min(0.0, float(finite.min())), 1.08 * max(0.0, float(finite.max()))


def _names(terms: Decomposition, size: int) -> list[str]:
    """The index of each element in the whole data set, also where the plate is subsampled."""
    present = terms.runs[0].subsamples.get(str(terms.plate)) if terms.runs else None
    if present is None or len(present) != size:
        return [str(i) for i in range(size)]
    return [str(int(i)) for i in present]


def _bars(ax: "Axes", heights: Numbers, carries: NDArray[np.bool_], largest: list[str], what: str) -> list[Any]:
    """One patch per element, or where there are many one for those that carry half and one for all."""
    few = len(heights) <= _FEW_ELEMENTS
    highlight: Any = {"facecolor": DARK, "edgecolor": "black", "label": f"{what}: {_listed(largest)}"}
    rest: Any = {"facecolor": PALE, "edgecolor": "0.3", "label": "the others"}
    handles: list[Any] = []
    for chosen, style in ((carries, highlight), (~carries, rest)):
        at = np.flatnonzero(chosen)
        if not len(at):
            continue
        if few:
            handles.append(ax.bar(at, heights[at], 0.8, linewidth=0.6, **style))
        else:
            edges = np.arange(at[0], at[-1] + 2) - 0.5
            corners, tops = np.repeat(edges, 2)[1:-1], np.repeat(heights[at], 2)
            handles.append(ax.fill_between(corners, tops, linewidth=0.0, rasterized=len(heights) > MANY, **style))
    return handles if carries.any() else []


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")


def _marks_at_top(ax: "Axes", order: NDArray[np.int64], gap: Numbers, high: float) -> None:
    """An arrow where a gap is infinite, and a cross where it is unknown."""
    # Above the lower edge, and inside of the axes: marks outside would break layouts once the limits are changed.
    for found, marker, y in ((np.isposinf(gap[order]), "^", high), (np.isnan(gap[order]), "X", 0.03 * high)):
        at = np.flatnonzero(found)
        if len(at):
            style: Any = {"color": ink(ax), "markeredgecolor": ax.get_facecolor(), "markersize": 7}
            ax.plot(at, np.full(len(at), y), marker, linestyle="none", zorder=4, **style)


def _what_is_sorted(terms: Decomposition, gap: Numbers, order: NDArray[np.int64]) -> str:
    left = len(gap) - len(order)
    if not left:
        return f"{terms.plate}, the largest gap first"
    rest = float(np.nansum(np.delete(gap, order)))
    return f"{terms.plate}, the largest gap first (the other {left:,} have {number(rest)} nats in all)"


def _title(gap: Numbers, carriers: int) -> str:
    if np.isnan(gap).all():
        return "The gap is not known"
    total = float(np.nansum(gap))
    of_all = f"{carriers:,} of {len(gap):,}"
    if np.isinf(total):
        return f"The gap is infinite in {of_all} elements"
    if not carriers:
        return f"No gap in any of {len(gap):,} elements" if np.isfinite(gap).all() else f"Gap {number(total)} nats"
    carry = "carries" if carriers == 1 else "carry"
    return f"Gap {number(total)} nats; {of_all} {carry} half of it"
