r"""The end of wake-sleep and the way there.

F(end) - F(start)  =  sum over wake phases of d F  +  sum over sleep phases of d F        d F of a wake phase <= 0 in
the limit of small steps; that of a sleep phase may be of any sign
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor

from pyro_vfe.learning.em_run import counted
from pyro_vfe.learning.history import SLEEP, WAKE, History, Numbers, Row
from pyro_vfe.learning.svi_report import ending, run_as_html, run_as_text


@dataclass(frozen=True, eq=False)
class WakeSleepRun:
    """The end of wake-sleep and the way there."""

    params: Mapping[str, Tensor]
    """Copies of all parameters that the programs read, constrained."""
    history: History
    """F, surprise and gap before the first step ('start') and after both phases ('wake', 'sleep') of those steps that
    were read, in nats. What changed in a sleep row is what that sleep phase did; what changed in a wake row is what all
    steps since the row before did, and that wake phase."""
    losses: Numbers
    """The losses of the wake phase and of the sleep phase of every step, shape `(num_steps, 2)`: in nats, at the
    parameters before the phase."""
    num_steps: int
    """The number of steps that were done."""
    stopped: str | None
    """Why there were fewer than asked for, in words; None if there were not."""
    updates: Mapping[str, str]
    """How each parameter was updated, in words."""
    notes: tuple[str, ...] = ()
    """What a reader should know."""

    @property
    def free_energy(self) -> float:
        """F at the end, in nats: that of the last reading."""
        return self.history.rows[-1].free_energy

    @property
    def changes_asleep(self) -> Numbers:
        """By how much each sleep phase that was read exactly changed F, in nats: positive where it rose."""
        rows = self.history.rows
        pairs = [(before, after) for before, after in pairwise(rows) if _is_sleep(before, after)]
        return np.array([after.free_energy - before.free_energy for before, after in pairs], dtype=np.float64)

    def __str__(self) -> str:
        return run_as_text(self, self._headline())

    def _repr_html_(self) -> str:
        return run_as_html(self, self._headline())

    def _headline(self) -> list[str]:
        lines = ending("wake-sleep", self.num_steps, self.stopped, self.history)
        changes = self.changes_asleep
        changes = changes[np.isfinite(changes)]
        if len(changes):
            lines.append(
                f"{counted(len(changes), 'sleep phase')} read: together they changed F by {changes.sum():+,.4f} nats, "
                f"{int((changes > 0).sum())} raised it"
            )
        return lines


def _is_sleep(before: Row, after: Row) -> bool:
    """Whether nothing but a sleep phase lies between two rows that are exact."""
    if before.stderr != 0 or after.stderr != 0:
        return False
    return (before.phase, after.phase) == (WAKE, SLEEP) and before.iteration == after.iteration
