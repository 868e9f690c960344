"""What pictures of states have in common: the legend of the states, and data that go with a latent's elements."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pyro_vfe.errors import ShapeError
from pyro_vfe.reporting.palette import Numbers, legend_above, state_color, state_hatch, state_marker

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

MOST_STATES = 20
"""More states than so many have no legend of all."""

_PIXELS = 2
"""The least width of a column of an image."""


def check_count(num_data: int, num_elements: int, site: str) -> None:
    """Raises an error where data and a latent's elements do not pair up.

    Args:
        num_data: The number of data.
        num_elements: The number of the latent's elements.
        site: The latent.

    Raises:
        ShapeError: They differ.
    """
    if num_data != num_elements:
        raise ShapeError(
            f"There are {num_data} data, and latent '{site}' has {num_elements} elements.",
            hint="Pass the data that the probabilities were computed for.",
        )


def columns_for(ax: "Axes", count: int) -> int:
    """Returns how many elements share a column of an image, so that every column can be seen.

    Args:
        ax: Where the image will be.
        count: The number of elements.
    """
    return max(1, -(-count // max(1, int(ax.bbox.width / _PIXELS))))


def probability_image(ax: "Axes", probs: Numbers, width: int, top: float) -> "AxesImage":
    """Returns the image of probabilities, a row per value downwards, on the scale from 0 to 1.

    Args:
        ax: Where to draw; its limits are left to the caller.
        probs: Shape `(N, K)`.
        width: How many elements share a column, as their mean.
        top: Where the first row begins, in y; rows are 1 high.
    """
    starts = np.arange(0, len(probs), width)
    sizes = np.diff(starts, append=len(probs))
    columns = np.add.reduceat(probs, starts, axis=0) / sizes[:, None]
    # The last column may be wider than its elements; the limits of the axes cut it.
    extent = (-0.5, len(starts) * width - 0.5, top + probs.shape[-1], top)
    style: Any = {"cmap": "Blues", "vmin": 0.0, "vmax": 1.0, "aspect": "auto", "interpolation": "nearest"}
    return ax.imshow(columns.T, extent=extent, **style)


def legend_of_states(
    ax: "Axes",
    labels: Sequence[str],
    states: NDArray[np.int64],
    *,
    areas: bool = False,
    share_of_height: float = 1.0,
    further: Sequence[tuple[Any, str]] = (),
) -> None:
    """Says above the data which state has which marker, and which area.

    Args:
        ax: Where the states are drawn.
        labels: The states in words.
        states: The most probable state of each datum: of more than 20 states, the most frequent ones are explained.
        share_of_height: How much of the axes' height the limits in y will have in the end.
        areas: Whether states have areas too.
        further: Other entries.
    """
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    counts = np.bincount(states, minlength=len(labels))
    shown = sorted(np.argsort(-counts, kind="stable")[:MOST_STATES])
    entries: list[tuple[Any, str]] = []
    for state in shown:
        line: Any = {"marker": state_marker(state), "color": state_color(state), "markeredgecolor": "black"}
        mark = Line2D([], [], linestyle="none", markersize=6, markeredgewidth=0.5, **line)
        area = Patch(facecolor=state_color(state), hatch=state_hatch(state), edgecolor="black", linewidth=0.5)
        entries.append(((mark, area) if areas else mark, labels[state]))
    entries += further
    if len(labels) > len(shown):
        entries.append((Line2D([], [], linestyle="none"), f"and {len(labels) - len(shown)} more"))
    handlers = {"handler_map": {tuple: HandlerTuple(ndivide=None, pad=0.3)}} if areas else {}
    legend_above(
        ax,
        [handle for handle, _ in entries],
        [label for _, label in entries],
        share_of_height=share_of_height,
        **handlers,
    )
