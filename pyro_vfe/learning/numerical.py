r"""The M-phase by numerical search, for parameters without a closed form.

    minimise over theta    - E_Q log P(v, u | theta)        under the parameters' floors

References:
    Nocedal (1980), Updating quasi-Newton matrices with limited storage.
"""

from collections.abc import Mapping
from functools import partial

from pyro_vfe.errors import VFEError
from pyro_vfe.learning.degeneracy import check_run_off, check_sharpness
from pyro_vfe.learning.lbfgs import Search, by_gradient
from pyro_vfe.learning.objective import STEEP, UNIT, Objective, Point
from pyro_vfe.learning.phases import MPhase, Problem
from pyro_vfe.program.entry_points import entry_point
from pyro_vfe.program.parameters import restored_on_error, snapshot

_BLOCK = 20
"""After so many iterations the search is looked at, whether a density collapses."""

_RESCALINGS = 4
"""How often at most a search that has come to a halt is taken up again in other coordinates."""

_WORTH = 1e-4
"""What F would have to fall by for that, in nats."""


class Numerical(MPhase):
    """L-BFGS with a strong Wolfe line search on the unconstrained parameters; never raises F beyond rounding.

    Floors are bounds on the search: the solution is the best of those that respect them.
    """

    monotone = True

    @entry_point()
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
            DegenerateError: The best value is none that a parameter can have: F falls as long as a scale goes to zero,
                or log-odds to infinity; all stay as they were.
            VFEError: A floor was given to a parameter of which nothing says what it would bound.
        """
        with restored_on_error(snapshot(problem.names)):
            objective = Objective(problem, self.tolerance_grad)
            if not objective.size:
                return dict.fromkeys(problem.names, "held: no finite entry that has a gradient")
            run = _Run(objective, self.max_iter)
            run.search()
        problem.notes.extend([*objective.at_floor(run.best.place), *run.halt()])
        words = f"L-BFGS, {objective.evaluations} evaluation{'s' * (objective.evaluations != 1)}"
        if run.left <= 0:
            words += f", stopped at max_iter={self.max_iter}"
        return dict.fromkeys(problem.names, words)


class _Run:
    """One search from the present parameters."""

    def __init__(self, objective: Objective, max_iter: int) -> None:
        self.objective = objective
        self.best = objective.at_start
        self.left = max_iter
        """How many iterations are left."""
        self.expected = 0.0
        """What F would fall by, in nats, were it a parabola where the search came to a halt."""

    def search(self) -> None:
        """Writes the best point found, and checks that it is one.

        Raises:
            DegenerateError: There is none.
        """
        objective = self.objective
        self.best = objective.opened()
        self._descend()
        for _ in range(_RESCALINGS):
            self.expected = objective.expected(self.best)
            if self.left <= 0 or self.expected <= _WORTH:
                break
            before = self.best
            self.best = objective.rescaled(before)
            self.expected = objective.expected(self.best)
            if self.expected <= _WORTH:
                break
            self._descend()
            if not self._is_below(before):
                self.best = objective.stepped(self.best)
            if not self._is_below(before):
                break
        start = objective.at_start
        if self.best.value > start.value + objective.rounding(start):
            self.best = start
        self._check()
        objective.write(self.best.place)

    def halt(self) -> list[str]:
        """What is to be said of a search that found no way down although F is not flat."""
        if self.left <= 0 or self.expected <= _WORTH:
            return []
        names = ", ".join(f"'{name}'" for name in self.objective.names)
        return [
            f"The search for {names} came to a halt where F has a slope, at a kink or at the limit of rounding: it may "
            "be lower nearby."
        ]

    def _is_below(self, point: Point) -> bool:
        return point.value - self.best.value > max(self.objective.rounding(point), _WORTH / UNIT)

    def _descend(self) -> None:
        """Goes down until the slope is gone, or the search comes to a halt."""
        objective, stalled = self.objective, False
        search: Search | None = None
        while self.best.steepest > objective.tolerance and self.left > 0 and not stalled:
            rounding = objective.rounding(self.best)
            search = search or Search(objective, self.best.place, objective.tolerance, rounding)
            found, used = search.steps_by_value(min(self.left, _BLOCK))
            self.left -= max(1, used)
            stalled = self.best.value - found.value <= rounding
            self.best = min(self.best, found, key=lambda point: point.value)
            if used >= _BLOCK and not stalled:
                self._check_sharpness()
                continue
            if self.left > 0 and self.best is found:
                self.best = by_gradient(search, self.best, objective.tolerance, rounding)
            search = None

    def _check(self) -> None:
        """Checks the end of a search, which was not cut short."""
        self._check_sharpness()
        objective, slope = self.objective, self.objective.slope(self.best)
        end = objective.thetas(self.best.place)
        steep = [power for power in objective.trail if 10.0**power > STEEP * max(slope, objective.vanished)]
        vanished = bool(steep) or slope <= STEEP * objective.vanished
        if self.left > 0 and (steep or not vanished):
            start = objective.trail[min(steep)] if steep else objective.at_start.place / objective.scale
            slopes = partial(objective.slopes_along, end)
            check_run_off(objective.thetas_of(start), end, slopes, vanished=vanished)

    def _check_sharpness(self) -> None:
        self.objective.write(self.best.place)
        objective = self.objective
        check_sharpness(objective.problem, objective.names, objective.charts, halted=self.expected > _WORTH)
