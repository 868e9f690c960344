r"""What a numerical M-phase minimises, in coordinates that a search can walk in.

    f(theta)  =  - E_Q log P(v, u | theta) / unit      in z = sqrt(n / unit) w,   theta = w, or theta(w) under a floor

theta are the unconstrained parameters and n is the number of terms of the log joint: f has curvatures around one in z
whatever the number of data. Where it has not, z counts in units of sqrt(1 / curvature).
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vfe.errors import NotFiniteError
from pyro_vfe.learning.entries import named
from pyro_vfe.learning.floors import charts_of
from pyro_vfe.learning.phases import Problem
from pyro_vfe.program.parameters import unconstrained

UNIT = 1e-12
"""The unit of f in nats. Torch's L-BFGS learns no curvature from a step that changes f by less than about 1e-10."""

_REFUSED = 1e3
"""A step to a point without a finite value counts as this much worse, in units of the start's value."""

STEEP = 1e3
"""A slope that is so many times what is asked for says that a search has not come to its end, or was not near it."""

_TRIED = 4
"""How many coordinates are tried one at a time."""

_NUDGE = 8
"""Curvatures are taken from gradients so many roundings apart."""


class Point(NamedTuple):
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


class Objective:
    """f over the finite entries of the parameters' coordinates, joined to one float64 vector."""

    def __init__(self, problem: Problem, tolerance_grad: float) -> None:
        """Args:
        problem: What to solve.
        tolerance_grad: The slope that has vanished, in nats per term and unit of an unconstrained parameter.

        Raises:
            NotFiniteError: The expected log joint is not finite at the present parameters.
            VFEError: A floor was given to a parameter of which nothing says what it would bound.
        """
        self.problem = problem
        self.names = [name for name in problem.names if unconstrained(name).requires_grad]
        self.leaves = [unconstrained(name) for name in self.names]
        self.charts = charts_of(problem.pair, self.names, problem.enumeration)
        present = {name: leaf.detach().double().cpu() for name, leaf in zip(self.names, self.leaves, strict=True)}
        self.present = {
            name: self.charts[name].coordinates(theta) if name in self.charts else theta
            for name, theta in present.items()
        }
        self.finite = {name: w.isfinite() for name, w in self.present.items()}
        self.size = sum(int(mask.sum()) for mask in self.finite.values())
        weights = problem.belief.learned_from
        self.num_terms = max(1.0, float(sum(table.sum() for own in weights.values() for table in own)))
        self.stretch = math.sqrt(self.num_terms / UNIT)
        self.scale = torch.full((self.size,), self.stretch, dtype=torch.float64)
        self.eps = max((torch.finfo(leaf.dtype).eps for leaf in self.leaves), default=0.0)
        self.tolerance = max(tolerance_grad, 4 * self.eps) * self.stretch
        """The slope that has vanished, of f in z."""
        self.trail: dict[int, Tensor] = {}
        """The coordinates w of the lowest point so far, by the power of ten of its slope."""
        self._lowest = math.inf
        self.evaluations = 0
        if self.size:
            self._begin()

    def _begin(self) -> None:
        place = self._joined(self.present) * self.scale
        self.write(place)
        value, gradient = self._evaluated(place)
        if not math.isfinite(value) or not bool(gradient.isfinite().all()):
            names = ", ".join(f"'{name}'" for name in self.problem.names)
            raise NotFiniteError(
                f"Where the search for {names} starts, the expected log joint is {-value * UNIT:g}, or its gradient "
                "not finite.",
                hint="Start them where every value that Q finds possible has a positive probability.",
            )
        self.at_start = self.last = Point(place, value, gradient)

    def opened(self) -> Point:
        """The start, moved off the floors."""
        opened = {name: self.charts[name].opened(w) if name in self.charts else w for name, w in self.present.items()}
        return self(self._joined(opened) * self.scale)

    def rounding(self, point: Point) -> float:
        """What rounding may do to f at a point."""
        return self.eps * max(1.0, abs(point.value))

    def thetas(self, place: Tensor) -> dict[str, Tensor]:
        """The unconstrained parameters at a point."""
        return self.thetas_of(place / self.scale)

    def thetas_of(self, w: Tensor) -> dict[str, Tensor]:
        """The unconstrained parameters at some coordinates."""
        with torch.no_grad():
            return {
                name: self.charts[name].theta(own) if name in self.charts else own
                for name, own in self._split(w).items()
            }

    def at_floor(self, place: Tensor) -> list[str]:
        """What is to be said of the entries that are at a floor."""
        low = self.low(place)
        texts = [named(name, mask, mask.shape) for name, mask in low.items() if bool(mask.any())]
        return [f"At the floor: {text}." for text in texts]

    def low(self, place: Tensor) -> dict[str, Tensor]:
        """Which entries of the parameters that have a floor are at it; rows and matrices together."""
        parts = self._split(place / self.scale)
        return {name: chart.is_low(parts[name]) for name, chart in self.charts.items()}

    def write(self, place: Tensor) -> None:
        """Sets the parameters to a point."""
        self.set(self.thetas(place))

    def set(self, thetas: Mapping[str, Tensor]) -> None:
        """Sets the parameters to unconstrained values."""
        with torch.no_grad():
            for name, leaf in zip(self.names, self.leaves, strict=True):
                leaf.copy_(thetas[name])

    def slope_along(self, thetas: Mapping[str, Tensor], factor: float, steps: Mapping[str, Tensor]) -> float | None:
        """The derivative of f along a step of the unconstrained parameters; None where it has none.

        Args:
            thetas: Where the step begins.
            factor: Where on the way it is wanted, 1 at the end of the step.
            steps: By parameter.
        """
        self.set({name: theta + factor * steps[name] for name, theta in thetas.items()})
        try:
            value, gradients = self._differentiated()
        except (ValueError, ArithmeticError, RuntimeError):
            return None
        slope = sum(float((gradient * step).sum()) for gradient, step in zip(gradients, steps.values(), strict=True))
        return slope if math.isfinite(value) and math.isfinite(slope) else None

    def rescaled(self, best: Point) -> tuple[Point, float]:
        """Takes coordinates in which curvatures are about one at a point, and returns it in them.

        Returns:
            The point, and how much f would fall if it were a parabola along each coordinate by itself, in nats.
        """
        w, slope = best.place / self.scale, best.gradient * self.scale * UNIT
        nudge = _NUDGE * self.eps * w.abs().clamp(min=1.0)
        signs = torch.where(torch.arange(self.size) % 2 == 0, 1.0, -1.0).double()
        found = [
            (self((w + nudge * sign) * self.scale).gradient * self.scale * UNIT - slope).abs() / nudge
            for sign in (torch.ones_like(signs), signs)
        ]
        curvature = torch.maximum(*found).clamp(min=self.num_terms)
        old, self.scale = self.scale, (curvature / UNIT).sqrt()
        self.at_start, self.last = (
            Point(point.place / old * self.scale, point.value, point.gradient * old / self.scale)
            for point in (self.at_start, best)
        )
        return self.last, float((slope.square() / curvature).sum() / 2)

    def __call__(self, place: Tensor) -> Point:
        """Value and gradient at a point; one that the programs refuse is far worse than the start, and flat."""
        if torch.equal(place, self.last.place):
            return self.last
        try:
            self.write(place)
            value, gradient = self._evaluated(place)
        except (ValueError, ArithmeticError, RuntimeError):
            value, gradient = math.inf, torch.zeros_like(place)
        if not math.isfinite(value) or not bool(gradient.isfinite().all()):
            start = self.at_start.value
            value, gradient = start + _REFUSED * max(1.0, abs(start)), torch.zeros_like(place)
        self.last = Point(place.clone(), value, gradient)
        if value < self._lowest and self.last.steepest > 0:
            self._lowest, self.trail[round(math.log10(self.last.steepest))] = value, place / self.scale
        return self.last

    def stepped(self, best: Point) -> Point:
        """The best point that is a slope away in one coordinate, of those with the largest slopes, or in all."""
        _, order = best.gradient.abs().topk(min(_TRIED, self.size))
        single = [torch.zeros_like(best.gradient).index_copy(0, one[None], best.gradient[one][None]) for one in order]
        return min(best, *(self(best.place - step) for step in (best.gradient, *single)), key=lambda point: point.value)

    def _evaluated(self, place: Tensor) -> tuple[float, Tensor]:
        """f and df/dz at the present parameters, which are those of a place."""
        value, gradients = self._differentiated()
        slopes = {}
        for (name, w), slope in zip(self._split(place / self.scale).items(), gradients, strict=True):
            slopes[name] = slope
            if name in self.charts:
                with torch.enable_grad():
                    inside = w.requires_grad_()
                    (slopes[name],) = torch.autograd.grad(self.charts[name].theta(inside), inside, slope)
        return value, self._joined(slopes) / (UNIT * self.scale)

    def _differentiated(self) -> tuple[float, list[Tensor]]:
        """f, and its gradient in nats in each unconstrained parameter; zero where an entry is not finite."""
        self.evaluations += 1
        loss = -self.problem.expected_log_joint()
        found: Sequence[Tensor | None] = [None] * len(self.leaves)
        if loss.requires_grad:
            found = torch.autograd.grad(loss, self.leaves, allow_unused=True)
        gradients = [
            torch.zeros_like(leaf) if gradient is None else gradient.masked_fill(~leaf.detach().isfinite(), 0.0)
            for leaf, gradient in zip(self.leaves, found, strict=True)
        ]
        return float(loss.detach()) / UNIT, [gradient.double().cpu() for gradient in gradients]

    def _joined(self, parts: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([parts[name][mask] for name, mask in self.finite.items()])

    def _split(self, w: Tensor) -> dict[str, Tensor]:
        """The coordinates by parameter; entries that are not finite as they were."""
        parts = w.split([int(mask.sum()) for mask in self.finite.values()])
        return {
            name: self.present[name].masked_scatter(mask, part)
            for (name, mask), part in zip(self.finite.items(), parts, strict=True)
        }
