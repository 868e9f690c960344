r"""When training may end: what the history of its free energy says.

    settled:    |change| + 2 errors  <=  tol       from one window of readings of F per datum to the next (`rest`)

Batches and particles make F noisy, and two noisy means are close by chance now and then. Their difference counts with
twice its standard error: rather than not knowing of a change, the rule knows that there is none beyond the tolerance.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pyro_vfe.errors import VFEError
from pyro_vfe.learning.history import History
from pyro_vfe.learning.rest import WINDOW, change_of
from pyro_vfe.program.options import check_fields

StopRule = Callable[[History], str | None]
"""Says in words why to stop, or None. Called with the history after each reading."""


@dataclass(frozen=True)
class Settled:
    """F per datum no longer changes, neither falls nor rises: over two windows of readings, by more than a tolerance.

    The change between the windows' means counts with twice its standard error. Where readings are noisier than the
    tolerance, as those of mini-batches are, the rule waits: take a larger window, a larger tolerance, or let the
    `Monitor` read held-out data. What `diagnose` calls rest is the same.

    Example:
        >>> from pyro_vfe.learning.history import Row
        >>> falling = History(tuple(Row(i, "step", 100.0 - i, 90.0, 10.0 - i) for i in range(10)), num_data=100)
        >>> Settled(tol=0.01)(falling) is None
        True
        >>> Settled(tol=0.1)(falling)
        'F per datum has settled: it changed by -0.05 nats (tol=0.1) between the last two windows of 5 readings'
    """

    tol: float = 1e-3
    """The change that counts as none, in nats per datum."""
    window: int = WINDOW
    """How many readings are averaged, and compared with as many before them."""

    def __post_init__(self) -> None:
        """Raises:
        VFEError: The tolerance is no number of at least 0, or the window too short to have a spread.
        """
        check_fields(self)
        if not (self.tol >= 0 and math.isfinite(self.tol)):
            raise VFEError(f"Settled was given tol={self.tol}.", hint="Pass nats per datum, such as 1e-3.")
        if int(self.window) != self.window or self.window < 2:
            raise VFEError(
                f"Settled was given window={self.window}.", hint="Pass a number of readings of at least 2, such as 5."
            )

    def __call__(self, history: History) -> str | None:
        """Returns why to stop, or None.

        Args:
            history: Of all readings so far; those whose F is not finite settle nothing.
        """
        change = change_of(_last(history, 2 * self.window).free_energy, self.window)
        if change is None or not change.rests(self.tol):
            return None
        return (
            f"F per datum has settled: it changed by {change.nats:.2g} nats (tol={self.tol:g}) between the last two "
            f"windows of {self.window} readings"
        )


@dataclass(frozen=True)
class GapBelow:
    """The gap per datum is below a bound: the guide is as good as it needs to be.

    A gap that is not known does not stop anything.

    Example:
        >>> from pyro_vfe.learning.history import Row
        >>> history = History((Row(1, "step", 12.0, 10.0, 2.0), Row(2, "step", 10.5, 10.0, 0.5)), num_data=10)
        >>> GapBelow(0.1)(history)
        'the gap per datum is 0.05 nats, below 0.1'
        >>> GapBelow(0.1, window=2)(history) is None
        True
    """

    bound: float
    """Nats per datum."""
    window: int = 1
    """How many readings in a row have to be below; more than one where readings are noisy."""

    def __post_init__(self) -> None:
        """Raises:
        VFEError: The bound is no positive number, or the window no number of readings.
        """
        check_fields(self)
        if not (self.bound > 0 and math.isfinite(self.bound)):
            raise VFEError(
                f"GapBelow was given bound={self.bound}.",
                hint="Pass a positive number of nats per datum, such as 0.01.",
            )
        if int(self.window) != self.window or self.window < 1:
            raise VFEError(f"GapBelow was given window={self.window}.", hint="Pass a number of readings of at least 1.")

    def __call__(self, history: History) -> str | None:
        """Returns why to stop, or None.

        Args:
            history: Of all readings so far.
        """
        gaps = _last(history, self.window).gap
        if len(gaps) < self.window or not bool((gaps < self.bound).all()):
            return None
        times = "" if self.window == 1 else f", the last {self.window} readings"
        return f"the gap per datum is {gaps[-1]:.2g} nats, below {self.bound:g}{times}"


def without_a_gap(rules: Iterable[StopRule]) -> str:
    """What is to be said of rules where the gap is not known: that they will stop nothing. "" where none reads it.

    Args:
        rules: Of a run.
    """
    return "".join(f" {rule} has no gap to read, and stops nothing." for rule in rules if isinstance(rule, GapBelow))


def _last(history: History, number: int) -> History:
    """The last readings, per datum."""
    return History(history.rows[-number:], history.num_data).per_datum
