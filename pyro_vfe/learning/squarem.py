r"""SQUAREM: two steps of EM, and a jump along their parabola.

    r = theta_1 - theta_0,    v = (theta_2 - theta_1) - r,    a = -||r|| / ||v||
    theta'  =  theta_0 - 2 a r + a^2 v

A step length a of -1 gives theta_2 back; the longer, the slower EM is. All of it in unconstrained parameters.

References:
    Varadhan and Roland (2008), Simple and globally convergent methods for accelerating the convergence of any EM
    algorithm (scheme S3).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Point = Mapping[str, Tensor]
"""Unconstrained parameters by name."""


@dataclass(eq=False)
class Squarem:
    """Proposes a jump after every second step of EM."""

    steps: list[Point] = field(default_factory=list)
    """Where the steps since the last jump began."""

    def proposal(self, before: Point, after: Point) -> dict[str, Tensor] | None:
        """Returns where to jump, or None for no jump.

        Args:
            before: The parameters before one step of EM.
            after: The parameters after it.
        """
        self.steps.append(before)
        if len(self.steps) < 2:
            return None
        first, second = self.steps
        self.steps.clear()
        return extrapolated(first, second, after)


def extrapolated(first: Point, second: Point, third: Point) -> dict[str, Tensor] | None:
    """Returns the end of the jump; None where it would lead no further than the third point.

    Entries that are not finite at any of the points stay as they are at the third.

    Args:
        first: The parameters before two steps of EM.
        second: Those between the two.
        third: Those after.
    """
    r, v, finite = {}, {}, {}
    for name, end in third.items():
        finite[name] = first[name].isfinite() & second[name].isfinite() & end.isfinite()
        zero = torch.zeros_like(end)
        r[name] = torch.where(finite[name], second[name] - first[name], zero)
        v[name] = torch.where(finite[name], end - second[name], zero) - r[name]
    length, curvature = _norm(r), _norm(v)
    if curvature == 0 or length <= curvature:
        return None
    step = -length / curvature
    return {
        name: torch.where(finite[name], first[name] - 2 * step * r[name] + step**2 * v[name], end)
        for name, end in third.items()
    }


def _norm(vector: Point) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in vector.values()))
