"""Torch's L-BFGS on an objective: steps by value, and last steps by the gradient alone.

A search by values cannot tell points apart whose values differ by less than rounding: the last steps go by the
gradient.

References:
    Nocedal (1980), Updating quasi-Newton matrices with limited storage.
    Nocedal and Wright (2006), Numerical optimization, algorithms 3.5 and 3.6 (the strong Wolfe conditions).
"""

import math

import torch
from torch import Tensor

from pyro_vfe.learning.objective import Objective, Point

_MEMORY = 50
"""How many steps L-BFGS learns curvatures from."""

_LINE_SEARCH = 25
"""The most evaluations of one line search: torch's own limit."""

_LAST_STEPS = 100
"""The most steps by the gradient alone."""

_PATIENCE = 8
"""How many of them in turn may fail to halve the gradient."""


class Search:
    """One run of torch's L-BFGS on a vector of its own."""

    def __init__(self, objective: Objective, start: Tensor, tolerance: float, rounding: float) -> None:
        self.objective = objective
        self.place = start.clone().requires_grad_()
        self.optimizer = torch.optim.LBFGS(
            [self.place],
            history_size=_MEMORY,
            tolerance_grad=tolerance,
        )
        self.rounding = rounding

    def steps_by_value(self, max_iter: int) -> tuple[Point, int]:
        """Takes steps by line search and returns where they led, and how many they were."""
        before = self.iterations
        if before == 0:
            # Torch begins with a step of length one, which single precision may not resolve. Curvatures are about one.
            (options,) = self.optimizer.param_groups
            options.update(lr=max(1.0, float(self.objective(self.place.detach()).gradient.abs().sum())))
            self.step(1, by_value=True)
            options.update(lr=1.0)
        return self.step(max_iter, by_value=True), self.iterations - before

    def step(self, max_iter: int, *, by_value: bool) -> Point:
        """Takes steps, by line search on the value or as long as L-BFGS proposes, and returns where they led."""
        (options,) = self.optimizer.param_groups
        options.update(max_iter=max_iter, max_eval=max_iter * _LINE_SEARCH)
        options.update(line_search_fn="strong_wolfe" if by_value else None)
        # torch holds both the change of f and the step against it, and f changes by the square of a step.
        options.update(tolerance_change=min(self.rounding, math.sqrt(self.rounding)) if by_value else 0.0)
        self.optimizer.step(self._closure)
        return self.objective(self.place.detach())

    @property
    def iterations(self) -> int:
        """How many iterations it has made."""
        return int(self.optimizer.state[self.place].get("n_iter", 0))

    def _closure(self) -> float:
        point = self.objective(self.place.detach())
        self.place.grad = point.gradient.clone()
        return point.value


def by_gradient(search: Search, best: Point, tolerance: float, rounding: float) -> Point:
    """The point with the smallest gradient that L-BFGS finds from the best one, among those of no larger value."""
    found = best
    failures = 0
    for _ in range(_LAST_STEPS):
        if best.steepest <= tolerance or failures > _PATIENCE or found.value > best.value + 2 * rounding:
            break
        found = search.step(1, by_value=False)
        lower, no_higher = found.value < best.value - rounding, found.value <= best.value + rounding
        failures = 0 if lower or found.steepest <= best.steepest / 2 else failures + 1
        best = found if lower or (no_higher and found.steepest < best.steepest) else best
    return best
