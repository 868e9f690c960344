r"""The picture of a chain's states: the data over time, and how probable each state is at each step.

P(v_t = k | u)
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyro_vfe.energy.decomposition import Decomposition
from pyro_vfe.energy.posterior import Posterior
from pyro_vfe.errors import ShapeError
from pyro_vfe.reporting.palette import (
    MANY,
    Numbers,
    array,
    axes_or_new,
    figure_of,
    ink,
    lines_of_text,
    state_color,
    state_hatch,
    state_marker,
    thinned,
    whole_numbers,
)
from pyro_vfe.reporting.probabilities import Probabilities, Sites, elements, most_probable, probabilities, state_labels
from pyro_vfe.reporting.state_marks import check_count, columns_for, legend_of_states, probability_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BAND = 0.28
"""The share of the axes' height that the probabilities have."""

_ROOM = 0.05
"""The share between the probabilities and the data."""

_FEW_STATES, _FEW_STEPS = 7, 500
"""Up to so many states, at so many steps, are stacked areas; more are rows of an image."""


def plot_states(
    source: Posterior | Decomposition | ArrayLike, site: Sites, data: ArrayLike, *, ax: "Axes | None" = None
) -> "Axes":
    """Returns axes with data over time, coloured and marked by the most probable state of each step.

    Below the data stand the probabilities of the states: stacked areas of height 1 in all, or, for more than 7 states
    or 500 steps, an image with a row for each state. They are those of each step by itself (the marginals); where the
    most probable path of a posterior (`mode()`) takes another state, a bar above the probabilities says so.

    >>> axes = plot_states([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]], "v", [2.0, 1.0, 9.0])
    >>> axes.get_title(), axes.get_xlabel()
    ("Most probable states of 'v' at 3 steps", 'step')

    Args:
        source: A posterior, a decomposition (for Q), or probabilities of shape `(T, K)`.
        site: The latent. Of a Python loop, the sites in order, or a pattern such as `z_{}`.
        data: One number per step, shape `(T,)`; NaN where it is missing.
        ax: Where to draw; by default in a new figure.

    Raises:
        PlateKeptError: No guide gave Q.
        ProbabilityError: A tensor is not one of probabilities.
        ShapeError: The data are not one series, or not as long as the chain; or there are several chains.
        VFEError: There is no such latent; or matplotlib is missing.
    """
    found = probabilities(source, site)
    probs = elements(found)
    series = _series(data, len(probs), found.site)
    ax = axes_or_new(ax, (7.2, 4.6))
    states = probs.argmax(-1)
    path = most_probable(source, site) if isinstance(source, Posterior) else states
    _draw_data(ax, series, states)
    areas = len(found.labels) <= _FEW_STATES and len(series) <= _FEW_STEPS
    above = 1 - _BAND - _ROOM
    legend_of_states(
        ax, state_labels(found), states, share_of_height=above, areas=areas, further=_differs(ax, path != states)
    )
    _make_room_below(ax, series)
    draw_strip = _stacked_strip if areas else _image_strip
    draw_strip(ax, ax.inset_axes((0.0, 0.0, 1.0, _BAND), sharex=ax), found, path != states)
    steps = f"{len(series):,} step{'s' if len(series) > 1 else ''}"
    ax.set(title=f"Most probable states of '{found.site}' at {steps}", ylabel="data", xlabel=_time(found))
    ax.set_xlim(-0.5 - 0.01 * len(series), len(series) - 0.5 + 0.01 * len(series))
    whole_numbers(ax, range(len(series)))
    return ax


def _series(data: ArrayLike, count: int, site: str) -> Numbers:
    series = array(data)
    if series.ndim == 2 and series.shape[-1] == 1:
        series = series[:, 0]
    if series.ndim != 1:
        raise ShapeError(
            f"The data have the shape {series.shape}, and this picture is of one number per step.",
            hint="Pass an array of shape (T,): one chain, and one column of its data.",
        )
    check_count(len(series), count, site)
    return series


def _time(found: Probabilities) -> str:
    """The name of the plate, where there is one."""
    named = [plate for plate, size in zip(found.plates, found.values.shape, strict=False) if size > 1]
    return named[0] if named and not named[0].startswith("dim ") else "step"


def _draw_data(ax: "Axes", series: Numbers, states: NDArray[np.int64]) -> None:
    at = np.arange(len(series))
    many = len(series) > MANY
    if not many:
        ax.plot(at, np.where(np.isfinite(series), series, np.nan), color="0.6", linewidth=0.8, zorder=1)
    size = float(np.clip(12000 / len(series), 6, 32))
    for state in np.unique(states):
        here = (states == state) & np.isfinite(series)
        ax.scatter(
            at[here],
            series[here],
            s=size,
            color=state_color(int(state)),
            marker=state_marker(int(state)),
            edgecolors="black",
            linewidths=0.4,
            zorder=2,
            rasterized=many,
        )
    finite = series[np.isfinite(series)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    ax.set_ylim(low - room, high + room)


def _make_room_below(ax: "Axes", series: Numbers) -> None:
    """Moves the lower limit down, and keeps the ticks to where data are."""
    low, high = ax.get_ylim()
    finite = series[np.isfinite(series)]
    ticks = [tick for tick in ax.get_yticks() if low <= tick <= (finite.max() if len(finite) else low) + 1e-9]
    ax.set_yticks(ticks)
    ax.set_ylim(high - (high - low) / (1 - _BAND - _ROOM), high)


def _differs(ax: "Axes", differs: NDArray[np.bool_]) -> list[tuple[Any, str]]:
    """The legend's entry for steps where the most probable path takes another state."""
    from matplotlib.lines import Line2D

    if not differs.any():
        return []
    return [(Line2D([], [], color=ink(ax), linewidth=3), "the most probable path differs")]


def _stacked_strip(ax: "Axes", strip: "Axes", found: Probabilities, differs: NDArray[np.bool_]) -> None:
    """The probabilities as areas of height 1 in all."""
    probs = elements(found)
    edges = np.arange(len(probs) + 1) - 0.5
    tops = probs.cumsum(-1)
    for state, (top, own) in enumerate(zip(tops.T, probs.T, strict=True)):
        style: Any = {"facecolor": state_color(state), "hatch": state_hatch(state), "edgecolor": "black"}
        strip.stairs(top, edges, baseline=top - own, fill=True, linewidth=0.3, **style)
    _finish_strip(strip, differs, 0.0, 1.0)
    strip.set_yticks([0, 1])
    strip.set_ylabel("probability")


def _image_strip(ax: "Axes", strip: "Axes", found: Probabilities, differs: NDArray[np.bool_]) -> None:
    """The probabilities as an image, with a row per state."""
    probs = elements(found)
    image = probability_image(strip, probs, columns_for(ax, len(probs)), 0.0)
    _finish_strip(strip, differs, float(probs.shape[-1]), 0.0)
    shown = thinned(probs.shape[-1], lines_of_text(ax, _BAND))
    strip.set_yticks([k + 0.5 for k in shown], [found.labels[k] for k in shown])
    strip.set_ylabel(f"value of {found.symbol}")
    scale = ax.inset_axes((1.02, _BAND + _ROOM, 0.02, 1 - _BAND - _ROOM))
    figure_of(ax).colorbar(image, cax=scale, label="probability")


def _finish_strip(strip: "Axes", differs: NDArray[np.bool_], foot: float, top: float) -> None:
    """Ticks on the right, and bars above where the most probable path differs."""
    strip.yaxis.tick_right()
    strip.yaxis.set_label_position("right")
    strip.tick_params(axis="x", bottom=False, labelbottom=False)
    strip.set_ylim(foot, top + 0.14 * (top - foot))
    at = np.flatnonzero(differs)
    strip.hlines(np.full(len(at), top + 0.07 * (top - foot)), at - 0.5, at + 0.5, color=ink(strip), linewidth=3)
