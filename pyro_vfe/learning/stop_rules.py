"""When SVI may end: what its history says."""

from collections.abc import Callable
from dataclasses import dataclass

from pyro_vfe.learning.history import History

StopRule = Callable[[History], str | None]
"""Says in words why to stop, or None."""


@dataclass(frozen=True)
class Settled:
    """F per datum no longer changes."""

    tol: float = 1e-3
    """Nats per datum."""
    window: int = 5
    """How many readings are averaged, and compared with as many before them."""

    def __call__(self, history: History) -> str | None:
        """Returns why to stop, or None."""
        raise NotImplementedError


@dataclass(frozen=True)
class GapBelow:
    """The gap per datum has fallen below a bound."""

    bound: float
    """Nats per datum."""

    def __call__(self, history: History) -> str | None:
        """Returns why to stop, or None."""
        raise NotImplementedError
