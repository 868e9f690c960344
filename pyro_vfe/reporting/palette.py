"""What all pictures share: axes, colours that do not carry anything alone, numbers, legends that cover no data.

Every colour goes with a hatch, a marker or a line style, and the colours differ in lightness too: the pictures can be
read in grey and by the colour-blind.

References:
    Okabe and Ito (2008), Color universal design: how to make figures and presentations that are friendly to colorblind
    people.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyro_vfe.errors import VFEError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

Numbers = NDArray[np.float64]

DARK = "#0b3c5d"
"""The model's share, Q, what is highlighted."""

LIGHT = "#e69f00"
"""The guide's share, the exact posterior, what stands beside."""

PALE = "#b8c4cc"
"""What is there for comparison only."""

LIGHT_HATCH = "///"
"""Goes with `LIGHT`: in grey the two are told apart by it."""

STATE_COLORS = ("#0072b2", "#e69f00", "#3a3a3a", "#56b4e9", "#d55e00", "#f0e442", "#009e73", "#cc79a7")
"""One per value of a latent, in turn: neighbours differ in lightness."""

STATE_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*")
"""As many as have no divisor in common with the colours, so that the pairs of both repeat after 88 values only."""

STATE_HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---", "|||")
"""Goes with the colours on areas."""

MANY = 2000
"""From so many points on, pictures are pixels inside of vector files too."""

_SMALL = 7.5
"""The least height of a line of text, in points, for which there is room."""


def axes_or_new(ax: "Axes | None", size: tuple[float, float] = (6.4, 4.0)) -> "Axes":
    """Returns the axes to draw into: the user's, or those of a new figure, which notebooks show.

    Args:
        ax: The user's, or None.
        size: Of a new figure, in inches.

    Raises:
        VFEError: matplotlib is missing, or `ax` is something else.
    """
    try:
        from matplotlib.axes import Axes
    except ImportError as error:
        raise VFEError(
            "Pictures need matplotlib, which is not installed.", hint="Run: pip install 'pyro-vfe[plots]'."
        ) from error
    if ax is None:
        from matplotlib import pyplot

        return pyplot.subplots(figsize=size, layout="constrained")[1]
    if not isinstance(ax, Axes):
        raise VFEError(
            f"A picture is drawn into one matplotlib Axes, and ax is {article(ax)}.",
            hint="Pass one of them, such as axes[0], or nothing for a new figure.",
        )
    return ax


def figure_of(ax: "Axes") -> "Figure | SubFigure":
    """Returns the figure that axes are in.

    Args:
        ax: Axes.
    """
    figure = ax.figure
    assert figure is not None
    return figure


def ink(ax: "Axes") -> Any:
    """Returns the colour of lines that must be seen, on a dark page too: that of the axes' labels.

    Args:
        ax: The axes.
    """
    return ax.xaxis.label.get_color()


def article(thing: object) -> str:
    """Returns a thing's type with its article, for errors.

    Args:
        thing: Anything.
    """
    name = type(thing).__name__
    return f"{'an' if name[0].lower() in 'aeio' or name.startswith(('nd', 'SVI')) else 'a'} {name}"


def array(values: ArrayLike) -> Numbers:
    """Returns numbers of torch (on any device, in any graph), NumPy or Python as an array of NumPy.

    Args:
        values: The numbers.
    """
    detached: Any = values
    if hasattr(detached, "detach"):
        detached = detached.detach().cpu().double().numpy()
    return np.asarray(detached, dtype=np.float64)


def number(value: float) -> str:
    """Returns nats as a person reads them: two decimals, or two digits of a small number.

    Args:
        value: In nats.
    """
    if math.isnan(value):
        return "unknown"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if 0 < abs(value) < 0.005:
        return signed_minus(f"{value:.1e}")
    if abs(value) >= 1e5:
        return signed_minus(f"{value:,.0f}" if abs(value) < 1e10 else f"{value:.4g}")
    if value == 0:
        return "0"
    return signed_minus(f"{value:,.2f}")


def signed_minus(text: str) -> str:
    """Returns a number with the minus sign that matplotlib's ticks have.

    Args:
        text: The number.
    """
    return text.replace("-", "−")


def unit(num_data: int) -> str:
    """Returns the unit of a sum over data, for the label of an axis.

    Args:
        num_data: The number of data in the sum.
    """
    return "nats" if num_data == 1 else f"nats, sum over {num_data:,} data"


def state_color(state: int) -> str:
    """Returns the colour of a value of a latent.

    Args:
        state: The value's index in the support.
    """
    return STATE_COLORS[state % len(STATE_COLORS)]


def state_marker(state: int) -> str:
    """Returns the marker of a value of a latent.

    Args:
        state: The value's index in the support.
    """
    return STATE_MARKERS[state % len(STATE_MARKERS)]


def state_hatch(state: int) -> str:
    """Returns the hatch of a value of a latent.

    Args:
        state: The value's index in the support.
    """
    return STATE_HATCHES[state % len(STATE_HATCHES)]


def mixed_colors(probs: Numbers) -> Numbers:
    """Returns the states' colours, mixed by probability, shape `(N, 3)`.

    Args:
        probs: Shape `(N, K)`.
    """
    from matplotlib.colors import to_rgb

    states = range(probs.shape[-1])
    mixed = probs @ np.array([to_rgb(state_color(state)) for state in states])
    return np.asarray(mixed.clip(0.0, 1.0), dtype=np.float64)


def legend_above(
    ax: "Axes", handles: Sequence[Any], labels: Sequence[str], *, share_of_height: float = 1.0, **options: Any
) -> None:
    """Puts a legend inside the axes into room made for it above the data, so that it covers none.

    Args:
        ax: The axes; their limits in y are those of the data.
        handles: What is explained.
        labels: What it says.
        share_of_height: How much of the axes' height the limits in y will have in the end.
        **options: Of the legend.
    """
    if not handles:
        return
    points_wide, points_high = _size_in_points(ax)
    size = _SMALL + 1
    columns = _columns(labels, points_wide / size)
    rows = math.ceil(len(labels) / columns)
    needed = (rows * 1.45 + 1.2) * size / (points_high * share_of_height)
    share = min(0.6, needed)
    low, high = ax.get_ylim()
    ax.set_ylim(low, low + (high - low) / (1 - share))
    legend = ax.legend(
        handles,
        # matplotlib leaves out what begins with an underscore, and names of sites may.
        [f" {label}" if label.startswith("_") else label for label in labels],
        loc="upper left",
        ncols=columns,
        fontsize=size,
        frameon=False,
        borderpad=0.2,
        columnspacing=1.2,
        **options,
    )
    # It lies inside the axes: a layout of many axes shall not make room for it.
    legend.set_in_layout(False)


def _columns(labels: Sequence[str], room: float) -> int:
    """How many columns of a legend fit into a width, in units of the size of its letters."""
    for columns in range(len(labels), 1, -1):
        parts = np.array_split(np.array([len(label) for label in labels]), columns)
        if sum(4.2 + 0.56 * part.max() for part in parts) <= room:
            return columns
    return 1


def lines_of_text(ax: "Axes", share: float = 1.0) -> int:
    """Returns how many lines of small text fit into a share of the axes' height, at least 2.

    Args:
        ax: The axes.
        share: Of their height.
    """
    return max(2, int(_size_in_points(ax)[1] * share / (1.3 * _SMALL)))


def words_across(ax: "Axes", length: int) -> int:
    """Returns how many words of small text fit beside each other, at least 2.

    Args:
        ax: The axes.
        length: Of the longest word, in letters.
    """
    return max(2, int(_size_in_points(ax)[0] / (0.62 * _SMALL * (length + 2))))


def text_share(ax: "Axes", length: int) -> float:
    """Returns which share of the axes' width a small text takes.

    Args:
        ax: The axes.
        length: The number of its letters.
    """
    return 0.65 * (_SMALL + 1) * length / _size_in_points(ax)[0]


def whole_numbers(ax: "Axes", at: Sequence[float]) -> None:
    """Puts the ticks of the x-axis at whole numbers, in round steps.

    Args:
        ax: The axes.
        at: Where something is drawn.
    """
    from matplotlib.ticker import FixedLocator, MaxNLocator

    several = MaxNLocator(nbins="auto", integer=True, steps=[1, 2, 5, 10])
    ax.xaxis.set_major_locator(several if len(at) > 1 else FixedLocator(list(at)))


def thinned(count: int, room: int) -> range:
    """Returns indices for as many labels as there is room for: all, or every second, fifth, tenth and so on.

    Args:
        count: The number of things.
        room: How many of them can have a label.
    """
    steps = (digit * 10**power for power in range(12) for digit in (1, 2, 5))
    return range(0, count, next(step for step in steps if count <= step * room))


def shortened(text: str, length: int = 24) -> str:
    """Returns a text of at most so many letters.

    Args:
        text: The text.
        length: The most letters.
    """
    return text if len(text) <= length else text[: length - 1] + "…"


def _size_in_points(ax: "Axes") -> tuple[float, float]:
    """The width and height of axes."""
    scale = 72.0 / figure_of(ax).dpi
    return max(1.0, ax.bbox.width * scale), max(1.0, ax.bbox.height * scale)
