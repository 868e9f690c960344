r"""How far a free energy can be trusted: what rounding alone may change.

    |F - F(rounded)|  <=  c eps sum |weights * tables|

This holds for the sums. What goes on inside a log-probability (a large count times a log rate, less a log factorial) is
seen by moving every parameter by a unit in its last place.
"""

from dataclasses import dataclass
from math import isfinite

import torch

from pyro_vfe.learning.belief import Belief
from pyro_vfe.learning.guided import surprise_of
from pyro_vfe.learning.pair import Pair
from pyro_vfe.program.enumeration import Enumeration
from pyro_vfe.program.parameters import restore, snapshot
from pyro_vfe.program.supports import unwrapped

SAFETY = 8.0
"""How many roundings in a row each number is taken to go through."""

_FAR = 1e3
"""Changes so many times the floor are not measured against a new one."""

_NUDGES = (2.0, -2.0, 3.0)
"""By how many units in the last place parameters are moved."""


def resolution(enumeration: Enumeration) -> float:
    """Returns the relative rounding of the model's log-probabilities as the program computes them.

    Args:
        enumeration: A run of the programs.
    """
    steps = [torch.finfo(torch.float64).eps]
    for site in enumeration.sites.values():
        parts = [*vars(unwrapped(site.fn)).values(), site.value]
        dtypes = [part.dtype for part in parts if isinstance(part, torch.Tensor) and part.is_floating_point()]
        if site.role == "model" and dtypes:
            steps.append(max(torch.finfo(dtype).eps for dtype in dtypes if dtype == _widest(dtypes)))
    return max(steps)


def _widest(dtypes: list[torch.dtype]) -> torch.dtype:
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest


def magnitude(belief: Belief, enumeration: Enumeration) -> float:
    """Returns the sum of the absolute terms of F, in nats: what rounding is relative to.

    Args:
        belief: Q.
        enumeration: The factors that it is of.
    """
    sizes = [belief.expected_log_q.abs()]
    for key, weights in belief.weights.items():
        for weight, table in zip(weights, enumeration.factors[key].tables, strict=True):
            sizes.append(torch.where(weight != 0, weight * table.values, 0.0).abs().sum())
    return float(torch.stack(sizes).sum().detach())


@dataclass(eq=False)
class Rounding:
    """What rounding may change in one run's free energies; measured when it matters, and kept."""

    pair: Pair
    eps: float
    """The relative rounding of the programs' log-probabilities."""
    floor: float = 0.0
    """The largest change so far, in nats, that is known to mean nothing."""
    repeats: bool = True
    """Whether the programs give the same tables when they run twice."""
    probed: bool = False
    """Whether the effect of a last place has been measured."""
    reported: str | None = None
    """What has been said of a rise beyond rounding, by any start."""

    def includes(self, change: float, belief: Belief, enumeration: Enumeration) -> bool:
        """Whether rounding explains a change of F.

        Args:
            change: In nats.
            belief: Q, at the present parameters.
            enumeration: The present factors.
        """
        known_to_be_large = self.floor > 0 and abs(change) > _FAR * self.floor
        if abs(change) > self.floor and not known_to_be_large:
            self.floor = self.at(belief, enumeration)
        return abs(change) <= self.floor

    def at(self, belief: Belief, enumeration: Enumeration) -> float:
        """Returns the change of F that rounding explains, as far as it is known, in nats.

        Args:
            belief: Q, at the present parameters.
            enumeration: The present factors.
        """
        return max(self.floor, SAFETY * self.eps * magnitude(belief, enumeration))

    def probe(self, belief: Belief) -> None:
        """Measures what a change in the last place of every parameter does to the surprise.

        Args:
            belief: Q, at the present parameters.
        """
        known, self.probed = float(belief.surprise), True
        if not isfinite(known):
            return
        kept = snapshot(self.pair.parameters.readers)
        self.repeats = abs(self._surprise() - known) <= max(self.floor, SAFETY * self.eps * abs(known))
        changes = []
        try:
            for units in _NUDGES:
                nudged = {name: value * (1 + units * torch.finfo(value.dtype).eps) for name, value in kept.items()}
                restore(nudged)
                changes.append(abs(self._surprise() - known))
        finally:
            restore(kept)
        if self.repeats:
            self.floor = max(self.floor, SAFETY * max(changes))

    def _surprise(self) -> float:
        return float(surprise_of(self.pair.enumerate(), self.pair.max_bytes))
