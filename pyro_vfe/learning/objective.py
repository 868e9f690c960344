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
        self.vanished = max(tolerance_grad, 4 * self.eps)
        """The slope that has vanished, in nats per term and unit of w."""
        self.tolerance = self.vanished * self.stretch
        """The same, of f in z."""
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
        self._leave_trail(self.last)

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
        """What is to be said of the entries that are at a floor, rows and matrices together."""
        parts = self._split(place / self.scale)
        low = {name: chart.is_low(parts[name]) for name, chart in self.charts.items()}
        texts = [named(name, mask, mask.shape) for name, mask in low.items() if bool(mask.any())]
        return [f"At the floor: {text}." for text in texts]

    def write(self, place: Tensor) -> None:
        """Sets the parameters to a point."""
        self.set(self.thetas(place))

    def set(self, thetas: Mapping[str, Tensor]) -> None:
        """Sets the parameters to unconstrained values."""
        with torch.no_grad():
            for name, leaf in zip(self.names, self.leaves, strict=True):
                leaf.copy_(thetas[name])

    def slopes_along(
        self, thetas: Mapping[str, Tensor], factor: float, steps: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | None:
        """The derivatives of F along each entry's own step, by parameter in nats; None where F has none.

        Args:
            thetas: Unconstrained parameters where the steps begin.
            factor: Where on the way they are wanted, 1 at the end of the steps.
            steps: By parameter.
        """
        try:
            self.set({name: theta + factor * steps[name] for name, theta in thetas.items()})
            value, gradients = self._differentiated()
        except (ValueError, ArithmeticError, RuntimeError):
            return None
        slopes = {name: gradient * steps[name] for name, gradient in zip(self.names, gradients, strict=True)}
        finite = math.isfinite(value) and all(bool(slope.isfinite().all()) for slope in slopes.values())
        return slopes if finite else None

    def expected(self, point: Point) -> float:
        """How much F would fall from a point, in nats, were it a parabola of curvature one along each coordinate."""
        return float(point.gradient.square().sum()) * UNIT / 2

    def rescaled(self, best: Point) -> Point:
        """Takes coordinates in which curvatures are about one at a point, or less, and returns it in them."""
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
        return self.last

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
        self._leave_trail(self.last)
        return self.last

    def _leave_trail(self, point: Point) -> None:
        slope = self.slope(point)
        if point.value < self._lowest and slope > 0:
            self._lowest, self.trail[round(math.log10(slope))] = point.value, point.place / self.scale

    def slope(self, point: Point) -> float:
        """The largest entry of the gradient at a point, in nats per term and unit of w, whatever the scale of z."""
        return float((point.gradient * self.scale).abs().max()) * UNIT / self.num_terms

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
