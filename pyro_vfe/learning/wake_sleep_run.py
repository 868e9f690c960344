"""The end of wake-sleep and the way there."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pyro_vfe.learning.history import History


@dataclass(frozen=True, eq=False)
class WakeSleepRun:
    """The end of wake-sleep and the way there."""

    params: Mapping[str, Tensor]
    """Copies of all parameters that the programs read, constrained."""

    history: History
    """F, surprise and gap after every recorded phase, in nats."""
