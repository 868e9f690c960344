r"""Pictures of discrete latents: Q beside the exact posterior, and the states of a two-dimensional mixture.

Q(v_n = k)        and        P(v_n = k | u)
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyro_vfe.energy.decomposition import Decomposition
from pyro_vfe.energy.posterior import Posterior
from pyro_vfe.errors import ShapeError
from pyro_vfe.reporting.palette import (
    DARK,
    LIGHT,
    LIGHT_HATCH,
    MANY,
    Numbers,
    array,
    axes_or_new,
    figure_of,
    ink,
    legend_above,
    lines_of_text,
    mixed_colors,
    state_marker,
    thinned,
    whole_numbers,
    words_across,
)
from pyro_vfe.reporting.probabilities import (
    Q_NAME,
    Probabilities,
    Sites,
    elements,
    known_sets,
    probabilities,
    state_labels,
)
from pyro_vfe.reporting.state_marks import check_count, columns_for, legend_of_states, probability_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FEW_BARS = 40
"""Up to so many elements, and so few values, have bars; more are an image."""

_FEW_VALUES = 8

_ROW = 1.25
"""From the foot of one row of bars to that of the next; a probability of one is 1 high."""

_UNCERTAIN = 0.9
"""Below this probability of its most probable value, an element counts as uncertain."""


def plot_marginals(terms: Decomposition | Posterior, site: Sites, *, ax: "Axes | None" = None) -> "Axes":
    """Returns axes with the probabilities of a latent's values under Q, beside those of the exact posterior.

    One element has a bar for each value; up to 40 elements have a row of bars for each value, one bar as high as its
    row being a probability of 1; more elements, or more than 8 values, are an image, Q above and the posterior below. A
    latent of several plates is laid out in one line, the last plate running fastest. Where there are more elements than
    can be told apart, a column of the image is the mean of several; elements that are no chain's are then sorted by
    their most probable value. A latent that is not always there has one value more, "absent".

    Args:
        terms: A decomposition; or a posterior, which is then drawn alone.
        site: The latent. Of a Python loop, the sites in order, or a pattern such as `z_{}`.
        ax: Where to draw; by default in a new figure.

    Raises:
        PlateKeptError: No guide gave Q.
        ShapeError: The sites of a list differ in their shape.
        VFEError: There is no such latent; or matplotlib is missing.
    """
    sets = known_sets(terms, site)
    num_elements, num_values = sets[0].rows.shape
    few = num_elements <= _FEW_BARS and num_values <= _FEW_VALUES
    ax = axes_or_new(ax, (6.4, 4.0 if few else 4.8))
    if num_elements == 1:
        _bars_per_value(ax, sets)
    elif few:
        _rows_of_bars(ax, sets)
    else:
        _image(ax, sets)
    names = " and the ".join(found.name for found in sets)
    ax.set_title(f"'{sets[0].site}': {names}")
    return ax


def _style(found: Probabilities) -> dict[str, Any]:
    if found.name == Q_NAME:
        return {"facecolor": DARK, "edgecolor": "black", "linewidth": 0.6, "label": found.name}
    return {"facecolor": LIGHT, "edgecolor": "black", "linewidth": 0.6, "hatch": LIGHT_HATCH, "label": found.name}


def _beside(sets: tuple[Probabilities, ...]) -> list[tuple[Probabilities, float, float]]:
    """Each set with its bars' offset and width."""
    width = 0.8 / len(sets)
    return [(found, (i - (len(sets) - 1) / 2) * width, width) for i, found in enumerate(sets)]


def _bars_per_value(ax: "Axes", sets: tuple[Probabilities, ...]) -> None:
    at = np.arange(len(sets[0].labels))
    handles = [ax.bar(at + shift, found.rows[0], width, **_style(found)) for found, shift, width in _beside(sets)]
    shown = thinned(len(at), words_across(ax, max(map(len, sets[0].labels))))
    ax.set_xticks(shown, [sets[0].labels[k] for k in shown])
    ax.set(xlabel=f"value of {sets[0].symbol}", ylabel="probability", xlim=(-0.6, len(at) - 0.4), ylim=(0, 1))
    legend_above(ax, handles, [found.name for found in sets])
    ax.set_yticks(np.linspace(0, 1, 6))


def _rows_of_bars(ax: "Axes", sets: tuple[Probabilities, ...]) -> None:
    """A row per value, the first at the top."""
    num_elements, num_values = sets[0].rows.shape
    at = np.arange(num_elements)
    feet = _ROW * np.arange(num_values)[::-1]
    handles = []
    for found, shift, width in _beside(sets):
        for foot, probs in zip(feet, found.rows.T, strict=True):
            bars = ax.bar(at + shift, probs, width, bottom=foot, **_style(found))
        handles.append(bars)
    for foot in feet:
        ax.axhline(foot, color=ink(ax), linewidth=0.8)
        ax.axhline(foot + 1, color="0.6", linewidth=0.6, linestyle=":")
    ax.set_yticks(feet + 0.5, sets[0].labels)
    ax.tick_params(axis="y", length=0)
    ax.set(ylim=(0, feet[0] + 1.1), ylabel=f"value of {sets[0].symbol} (dotted: probability 1)")
    _element_ticks(ax, sets[0])
    legend_above(ax, handles, [found.name for found in sets])


def _image(ax: "Axes", sets: tuple[Probabilities, ...]) -> None:
    """A block of rows for each set, its name above it, all on one scale of colours."""
    num_elements, num_values = sets[0].rows.shape
    width = columns_for(ax, num_elements)
    is_sorted = width > 1 and not sets[0].is_sequence and len(sets[0].plates) == 1
    order = _by_value(sets[-1].rows) if is_sorted else np.arange(num_elements)
    room = 0.08 * num_values * len(sets)
    ticks, labels = [], []
    shown = thinned(num_values, lines_of_text(ax, 0.8 / len(sets)))
    top = 0.0
    for found in sets:
        image = probability_image(ax, found.rows[order], width, top + room)
        ax.text(-0.5, top + 0.85 * room, f" {found.name}", va="bottom", ha="left", fontsize="small")
        ticks += [top + room + k + 0.5 for k in shown]
        labels += [found.labels[k] for k in shown]
        top += room + num_values
    ax.set_yticks(ticks, labels)
    ax.set(ylim=(top, 0), ylabel=f"value of {sets[0].symbol}")
    figure_of(ax).colorbar(image, ax=ax, label="probability", pad=0.02)
    _element_ticks(ax, sets[0])
    notes = ["sorted by most probable value"] if is_sorted else []
    notes += [f"columns are means of {width}"] if width > 1 else []
    ax.set_xlabel(", ".join([ax.get_xlabel(), *notes]))


def _by_value(rows: Numbers) -> NDArray[np.int64]:
    """The order of elements by their most probable value, the surest first."""
    return np.lexsort((-rows.max(-1), rows.argmax(-1)))


def _element_ticks(ax: "Axes", found: Probabilities) -> None:
    """The indices of the elements; where one plate is laid out inside another, lines between the outer one's."""
    *outer, inner = found.values.shape[:-1]
    num_outer = int(np.prod(outer))
    ax.set_xlim(-0.5, num_outer * inner - 0.5)
    if num_outer == 1:
        whole_numbers(ax, range(inner))
        ax.set_xlabel(found.plates[-1])
        return
    shown = thinned(num_outer, words_across(ax, 4))
    ax.set_xticks([(i + 0.5) * inner - 0.5 for i in shown], [str(i) for i in shown])
    ax.set_xlabel(f"{', '.join(found.plates[:-1])}; inside each of them {found.plates[-1]} (0 to {inner - 1})")
    for i in range(1, num_outer) if num_outer <= _FEW_BARS else ():
        ax.axvline(i * inner - 0.5, color=ink(ax), linewidth=0.8)


def plot_responsibilities(
    source: Posterior | Decomposition | ArrayLike, site: Sites, data: ArrayLike, *, ax: "Axes | None" = None
) -> "Axes":
    """Returns axes with two-dimensional data, coloured and marked by the states that a mixture takes them for.

    The colour mixes those of the states by probability; the marker is that of the most probable one, and hollow where
    that has a probability below 0.9.

    >>> axes = plot_responsibilities([[1.0, 0.0], [0.2, 0.8]], "v", [[0.0, 1.0], [2.0, 3.0]])
    >>> axes.get_title()
    "States of 2 data by 'v': 1 uncertain"

    Args:
        source: A posterior, a decomposition (for Q), or probabilities of shape `(N, K)`.
        site: The latent. Of a Python loop, the sites in order, or a pattern such as `z_{}`.
        data: Shape `(N, 2)`.
        ax: Where to draw; by default in a new figure.

    Raises:
        PlateKeptError: No guide gave Q.
        ProbabilityError: A tensor is not one of probabilities.
        ShapeError: The data are not two-dimensional, or not as many as the latent's elements.
        VFEError: There is no such latent; or matplotlib is missing.
    """
    found = probabilities(source, site)
    probs = elements(found)
    points = _points(data, len(probs), found.site)
    ax = axes_or_new(ax, (6.0, 4.8))
    states = probs.argmax(-1)
    uncertain = probs.max(-1) < _UNCERTAIN
    for unsure in (False, True):  # the uncertain ones on top
        for state in np.unique(states[uncertain == unsure]):
            here = (states == state) & (uncertain == unsure)
            _scatter(ax, points[here], mixed_colors(probs[here]), int(state), hollow=unsure, count=len(points))
    name = f"States of {len(points):,} data by '{found.site}': {int(uncertain.sum()):,} uncertain"
    ax.set(title=name, xlabel="first dim of the data", ylabel="second dim of the data")
    legend_of_states(ax, state_labels(found), states, further=_hollow(ax, uncertain))
    return ax


def _points(data: ArrayLike, count: int, site: str) -> Numbers:
    points = array(data)
    if points.ndim != 2 or points.shape[-1] != 2:
        raise ShapeError(
            f"The data have the shape {points.shape}, and this picture has two dimensions.",
            hint="Pass an array of shape (N, 2): two of the columns, or the first two principal components.",
        )
    check_count(len(points), count, site)
    return points


def _scatter(ax: "Axes", points: Numbers, colors: Numbers, state: int, *, hollow: bool, count: int) -> None:
    """The data of one state: filled, or hollow with a coloured edge."""
    size = float(np.clip(6000 / count, 8, 36))
    ax.scatter(
        points[:, 0],
        points[:, 1],
        s=size,
        marker=state_marker(state),
        facecolors=ax.get_facecolor() if hollow else colors,
        edgecolors=list(map(tuple, colors)) if hollow else "black",
        linewidths=0.25 * np.sqrt(size) if hollow else 0.3,
        rasterized=count > MANY,
    )


def _hollow(ax: "Axes", uncertain: NDArray[np.bool_]) -> list[tuple[Any, str]]:
    """The legend's entry for hollow markers, where there are any."""
    from matplotlib.lines import Line2D

    if not uncertain.any():
        return []
    style: Any = {"color": ax.get_facecolor(), "markeredgecolor": ink(ax), "markeredgewidth": 1.3}
    mark = Line2D([], [], marker="o", linestyle="none", **style)
    return [(mark, f"hollow: below {_UNCERTAIN:g}")]
