r"""The M-phase by numerical search, for parameters without a closed form.

    minimise over theta    f(theta)  =  - E_Q log P(v, u | theta) / unit       in z = sqrt(n / unit) theta

theta are the unconstrained parameters and n is the number of terms of the log joint: f has curvatures around one in z
whatever the number of data. A search by values cannot tell points apart whose values differ by less than rounding; the
last steps go by the gradient alone.

References:
    Nocedal (1980), Updating quasi-Newton matrices with limited storage.
    Nocedal and Wright (2006), Numerical optimization, algorithms 3.5 and 3.6 (the strong Wolfe conditions).
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vfe.errors import DegenerateError, NotFiniteError, VFEError
from pyro_vfe.learning.entries import named
from pyro_vfe.learning.phases import MPhase, Problem
from pyro_vfe.program.parameters import constraint_of, restored_on_error, snapshot, unconstrained

_UNIT = 1e-12
"""The unit of f in nats. Torch's L-BFGS learns no curvature from a step that changes f by less than about 1e-10."""

_REFUSED = 1e3
"""A step to a point without a finite value counts as this much worse, in units of the start's value."""

_BLOCK = 20
"""After so many iterations the search is looked at, whether it runs off to where f has no lower bound."""

_COLLAPSED = 1e-30
"""What is left of a positive parameter, relative to its start, that has collapsed."""

_FALLING = 1e-3
"""A slope of f, in nats per unit of an unconstrained parameter, that has not come to an end."""

_MEMORY = 50
"""How many steps L-BFGS learns curvatures from."""

_LINE_SEARCH = 25
"""The most evaluations of one line search: torch's own limit."""

_LAST_STEPS = 100
"""The most steps by the gradient alone."""

_PATIENCE = 8
"""How many of them in turn may fail to halve the gradient."""


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
            DegenerateError: A positive parameter runs off to zero: F has no lower bound; all stay as they were.
        """
        objective = _Objective(problem)
        if not objective.size:
            return dict.fromkeys(problem.names, "held: no finite entry that has a gradient")
        with restored_on_error(snapshot(problem.names)):
            cut_short = self._searched(objective)
        words = f"L-BFGS, {objective.evaluations} evaluation{'s' * (objective.evaluations != 1)}"
        if cut_short:
            words += f", stopped at max_iter={self.max_iter}"
        return dict.fromkeys(problem.names, words)

    def _searched(self, objective: "_Objective") -> bool:
        """Writes the best point found, and returns whether max_iter cut the search short."""
        best = objective.at_start
        tolerance = max(self.tolerance_grad, 4 * objective.eps) * objective.stretch
        rounding = objective.eps * max(1.0, abs(best.value))
        left, stalled = self.max_iter, False
        search: _Search | None = None
        while best.steepest > tolerance and left > 0 and not stalled:
            search = search or _Search(objective, best.place, tolerance, rounding)
            found, used = search.steps_by_value(min(left, _BLOCK))
            left -= max(1, used)
            stalled = best.value - found.value <= rounding
            best = min(best, found, key=lambda point: point.value)
            objective.check_bounded(best)
            if used >= _BLOCK and not stalled:
                continue
            if left > 0 and best is found:
                best = _by_gradient(search, best, tolerance, rounding)
            search = None
        objective.write(best.place)
        return best.steepest > tolerance and left <= 0


class _Point(NamedTuple):
    """Where f was evaluated."""

    place: Tensor
    """z, float64."""
    value: float
    """f; a point without a finite value has a large one."""
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
        self.names = [name for name in problem.names if unconstrained(name).requires_grad]
        self.leaves = [unconstrained(name) for name in self.names]
        self.finite = [leaf.detach().isfinite() for leaf in self.leaves]
        self.size = sum(int(mask.sum()) for mask in self.finite)
        weights = problem.belief.learned_from
        self.num_terms = max(1.0, float(sum(table.sum() for own in weights.values() for table in own)))
        self.stretch = math.sqrt(self.num_terms / _UNIT)
        self.eps = max((torch.finfo(leaf.dtype).eps for leaf in self.leaves), default=0.0)
        self.evaluations = 0
        if self.size:
            self._begin()

    def _begin(self) -> None:
        present = [leaf.detach()[mask].double().cpu() for leaf, mask in zip(self.leaves, self.finite, strict=True)]
        value, gradient = self._evaluated()
        if not math.isfinite(value) or not bool(gradient.isfinite().all()):
            names = ", ".join(f"'{name}'" for name in self.problem.names)
            raise NotFiniteError(
                f"Where the search for {names} starts, the expected log joint is {-value * _UNIT:g}, or its gradient "
                "not finite.",
                hint="Start them where every value that Q finds possible has a positive probability.",
            )
        place = torch.cat(present) * self.stretch
        self.at_start = self.last = _Point(place, value, gradient)

    def write(self, place: Tensor) -> None:
        """Sets the parameters to a point."""
        theta, offset = place / self.stretch, 0
        with torch.no_grad():
            for leaf, mask in zip(self.leaves, self.finite, strict=True):
                count = int(mask.sum())
                leaf[mask] = theta[offset : offset + count].to(leaf)
                offset += count

    def check_bounded(self, point: _Point) -> None:
        """Checks that no positive parameter runs off to zero with f still falling.

        Raises:
            DegenerateError: One does, a variance say: f has no lower bound.
        """
        theta, slope, offset = point.place / self.stretch, point.gradient, 0
        start = self.at_start.place / self.stretch
        for name, leaf, mask in zip(self.names, self.leaves, self.finite, strict=True):
            entries = slice(offset, offset + int(mask.sum()))
            offset = entries.stop
            if not _is_positive(name):
                continue
            falling = slope[entries] * self.stretch * _UNIT > _FALLING
            collapsed = mask.clone()
            collapsed[mask] = falling & (theta[entries] < start[entries] + math.log(_COLLAPSED)).to(falling)
            if bool(collapsed.any()):
                raise DegenerateError(
                    f"F has no lower bound: it falls as long as {named(name, collapsed, leaf.shape)} goes to zero.",
                    hint="A component has collapsed onto its data, say. Give the parameter a prior (a pyro.sample site "
                    "with AutoDelta as its guide), or a constraint with a lower bound, constraints.greater_than(1e-3).",
                )

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
        found: Sequence[Tensor | None] = [None] * len(self.leaves)
        if loss.requires_grad:
            found = torch.autograd.grad(loss, self.leaves, allow_unused=True)
        gradients = [
            (torch.zeros_like(leaf) if gradient is None else gradient)[mask].double().cpu()
            for leaf, gradient, mask in zip(self.leaves, found, self.finite, strict=True)
        ]
        return float(loss.detach()) / _UNIT, torch.cat(gradients) / (_UNIT * self.stretch)


def _is_positive(name: str) -> bool:
    """Whether a parameter is the exponential of its unconstrained value."""
    constraint = constraint_of(name)
    return getattr(constraint, "lower_bound", None) == 0 and not hasattr(constraint, "upper_bound")


class _Search:
    """One run of torch's L-BFGS on a vector of its own."""

    def __init__(self, objective: _Objective, start: Tensor, tolerance: float, rounding: float) -> None:
        self.objective = objective
        self.place = start.clone().requires_grad_()
        self.optimizer = torch.optim.LBFGS(
            [self.place],
            history_size=_MEMORY,
            tolerance_grad=tolerance,
        )
        self.rounding = rounding

    def steps_by_value(self, max_iter: int) -> tuple[_Point, int]:
        """Takes steps by line search and returns where they led, and how many they were."""
        before = self.iterations
        if before == 0:
            # Torch begins with a step of length one, which single precision may not resolve. Curvatures are about one.
            (options,) = self.optimizer.param_groups
            options.update(lr=max(1.0, float(self.objective(self.place.detach()).gradient.abs().sum())))
            self.step(1, by_value=True)
            options.update(lr=1.0)
        return self.step(max_iter, by_value=True), self.iterations - before

    def step(self, max_iter: int, *, by_value: bool) -> _Point:
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


def _by_gradient(search: _Search, best: _Point, tolerance: float, rounding: float) -> _Point:
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
