r"""The M-phase by numerical search, for parameters without a closed form.

    minimise over theta    f(theta)  =  - E_Q log P(v, u | theta)          in z = sqrt(n) theta, n the number of terms

theta are the unconstrained parameters. A unit of z is of the size of a standard error, so f has curvatures around one
in z whatever the number of data. A search by values cannot tell points apart whose values differ by less than rounding;
the last steps go by the gradient alone.

References:
    Nocedal (1980), Updating quasi-Newton matrices with limited storage.
    Nocedal and Wright (2006), Numerical optimization, algorithms 3.5 and 3.6 (the strong Wolfe conditions).
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vfe.errors import NotFiniteError, VFEError
from pyro_vfe.learning.phases import MPhase, Problem
from pyro_vfe.program.parameters import restore, snapshot, unconstrained

_REFUSED = 1e3
"""A step to a point without a finite value counts as this much worse, in units of the start's value."""

_LAST_STEPS = 50
"""The most steps by the gradient alone."""


class Numerical(MPhase):
    """L-BFGS with a strong Wolfe line search on the unconstrained parameters; never raises F beyond rounding."""

    monotone = True

    def __init__(self, *, max_iter: int = 1000, tolerance_grad: float = 1e-12) -> None:
        """Args:
        max_iter: The most L-BFGS iterations of one M-phase.
        tolerance_grad: The search ends where no entry of the gradient of the expected log joint in an unconstrained
            parameter, in nats per term of the log joint, is larger.

        Raises:
            VFEError: One of them is not positive.
        """
        for name, value in (("max_iter", max_iter), ("tolerance_grad", tolerance_grad)):
            if not value > 0:
                raise VFEError(f"Numerical was given {name}={value}.", hint="Pass a positive number.")
        self.max_iter = max_iter
        self.tolerance_grad = tolerance_grad

    def update(self, problem: Problem) -> Mapping[str, str]:
        """Writes better parameters and returns, for each name, the method and its number of evaluations.

        Args:
            problem: What to solve. Entries that are not finite, the log of an exact zero, stay as they are.

        Raises:
            NotFiniteError: The expected log joint is not finite at the present parameters.
        """
        before = snapshot(problem.names)
        objective = _Objective(problem)
        if not objective.size:
            return dict.fromkeys(problem.names, "held: no finite entry that has a gradient")
        try:
            left = self._searched(objective)
        except Exception:
            restore(before)
            raise
        finally:
            problem.pair.parameters.forget()
        words = f"L-BFGS, {objective.evaluations} evaluations"
        if left > 1:
            words += f", stopped at max_iter={self.max_iter}"
        return dict.fromkeys(problem.names, words)

    def _searched(self, objective: "_Objective") -> float:
        """Minimises, writes the best point, and returns how far max_iter left it from where values tell no more."""
        start = objective.at_start
        tolerance = max(self.tolerance_grad, 4 * objective.eps) * math.sqrt(objective.num_terms)
        rounding = objective.eps * max(1.0, abs(start.value))
        best, iterations, stalled = start, 0, False
        while best.steepest > tolerance and iterations < self.max_iter and not stalled:
            found, used, search = _line_searched(objective, best, self.max_iter - iterations, tolerance, rounding)
            iterations += used
            stalled = best.value - found.value <= rounding
            best = min(best, found, key=lambda point: point.value)
            best = _by_gradient(objective, search, best, found, tolerance, rounding)
        objective.write(best.place)
        return best.steepest / tolerance if iterations >= self.max_iter and not stalled else 0.0


class _Point(NamedTuple):
    """Where f was evaluated."""

    place: Tensor
    """z, float64."""
    value: float
    """f in nats; a point without a finite value has a large one."""
    gradient: Tensor
    """df/dz."""

    @property
    def steepest(self) -> float:
        """The largest entry of the gradient."""
        return float(self.gradient.abs().max())


class _Objective:
    """f over the finite entries of the unconstrained parameters, joined to one float64 vector."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.leaves = [leaf for leaf in map(unconstrained, problem.names) if leaf.requires_grad]
        self.finite = [leaf.detach().isfinite() for leaf in self.leaves]
        self.size = sum(int(mask.sum()) for mask in self.finite)
        weights = problem.belief.sampled or problem.belief.weights
        self.num_terms = max(1.0, float(sum(table.sum() for own in weights.values() for table in own)))
        self.eps = max((torch.finfo(leaf.dtype).eps for leaf in self.leaves), default=0.0)
        self.evaluations = 0
        if self.size:
            self._begin()

    def _begin(self) -> None:
        present = [leaf.detach()[mask].double().cpu() for leaf, mask in zip(self.leaves, self.finite, strict=True)]
        value, gradient = self._evaluated()
        if not math.isfinite(value) or not bool(gradient.isfinite().all()):
            raise NotFiniteError(
                f"The expected log joint is {-value:g} at the parameters {', '.join(map(repr, self.problem.names))}"
                f"{'' if math.isfinite(value) else ', before any step'}, or its gradient is not finite.",
                hint="Start them where every value that Q finds possible has a positive probability.",
            )
        place = torch.cat(present) * math.sqrt(self.num_terms)
        self.at_start = self.last = _Point(place, value, gradient)

    def write(self, place: Tensor) -> None:
        """Sets the parameters to a point."""
        theta, offset = place / math.sqrt(self.num_terms), 0
        with torch.no_grad():
            for leaf, mask in zip(self.leaves, self.finite, strict=True):
                count = int(mask.sum())
                leaf[mask] = theta[offset : offset + count].to(leaf)
                offset += count

    def __call__(self, place: Tensor) -> _Point:
        """Value and gradient at a point; one that the programs refuse is far worse than the start, and flat."""
        if torch.equal(place, self.last.place):
            return self.last
        self.write(place)
        try:
            value, gradient = self._evaluated()
        except (ValueError, ArithmeticError, RuntimeError):
            value, gradient = math.inf, torch.zeros_like(place)
        if not math.isfinite(value) or not bool(gradient.isfinite().all()):
            start = self.at_start.value
            value, gradient = start + _REFUSED * max(1.0, abs(start)), torch.zeros_like(place)
        self.last = _Point(place.clone(), value, gradient)
        return self.last

    def _evaluated(self) -> tuple[float, Tensor]:
        self.evaluations += 1
        loss = -self.problem.expected_log_joint()
        found = torch.autograd.grad(loss, self.leaves, allow_unused=True) if loss.requires_grad else ()
        found = found or (None,) * len(self.leaves)
        gradients = [
            (torch.zeros_like(leaf) if gradient is None else gradient)[mask].double().cpu()
            for leaf, gradient, mask in zip(self.leaves, found, self.finite, strict=True)
        ]
        return float(loss.detach()), torch.cat(gradients) / math.sqrt(self.num_terms)


class _Search:
    """One run of torch's L-BFGS on a vector of its own."""

    def __init__(self, objective: _Objective, start: Tensor, tolerance: float, rounding: float) -> None:
        self.objective = objective
        self.place = start.clone().requires_grad_()
        self.optimizer = torch.optim.LBFGS(
            [self.place],
            history_size=50,
            tolerance_grad=tolerance,
        )
        self.rounding = rounding

    def step(self, max_iter: int, *, by_value: bool) -> _Point:
        """Takes steps, by line search on the value or as long as L-BFGS proposes, and returns where they led."""
        (options,) = self.optimizer.param_groups
        options.update(max_iter=max_iter, max_eval=max_iter * 25)
        options.update(line_search_fn="strong_wolfe" if by_value else None)
        options.update(tolerance_change=self.rounding if by_value else 0.0)
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


def _line_searched(
    objective: _Objective, start: _Point, max_iter: int, tolerance: float, rounding: float
) -> tuple[_Point, int, _Search]:
    """Where a search by values ends, how many iterations it took, and the search."""
    search = _Search(objective, start.place, tolerance, rounding)
    found = search.step(max_iter, by_value=True)
    return found, max(1, search.iterations), search


def _by_gradient(
    objective: _Objective, search: _Search, best: _Point, found: _Point, tolerance: float, rounding: float
) -> _Point:
    """The point with the smallest gradient near the best one, among those whose values cannot be told from its own."""
    if found.value > best.value:
        return best
    limit, failures = best.value + rounding, 0
    for _ in range(_LAST_STEPS):
        if best.steepest <= tolerance or failures > 2:
            break
        found = search.step(1, by_value=False)
        better = found.value <= limit and found.steepest < best.steepest
        failures = failures + 1 if found.steepest > best.steepest / 2 else 0
        best = found if better else best
        if found.value > limit + rounding:
            break
    return best
