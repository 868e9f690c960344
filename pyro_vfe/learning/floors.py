r"""Floors of parameters that are searched: what they bound, and coordinates in which the bound is a point like others.

    entries     theta  =  low + w^2,    low + (high - low) sin(w)^2              theta: unconstrained
    rows        p      =  floor + (1 - K floor) w^2 / sum w^2                    K entries are not exactly 0
    matrices    S      =  least variance I + W W'

In slack variables that are squared a minimum at the bound is one like any other: the slope is zero there, and where the
objective rises away from the bound the curvature is positive. So a search without bounds ends exactly at the floor.

References:
    Bertsekas (1999), Nonlinear programming, section 3.3.2 (inequalities turned into equations by squared slack).
    Burer and Monteiro (2003), A nonlinear programming algorithm for solving semidefinite programs via low-rank
    factorization.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import constraints, transform_to

from pyro_vfe.errors import ProbabilityError, VFEError
from pyro_vfe.learning.count_solutions import CANCELLED, check_room, probability_at_end
from pyro_vfe.learning.entries import floor_of, is_named
from pyro_vfe.learning.pair import Pair
from pyro_vfe.program.enumeration import Enumeration
from pyro_vfe.program.extraction import slots_by_parameter
from pyro_vfe.program.parameters import Parameters, constraint_of, unconstrained

_OPENED = 0.1
"""How far a search that starts at a floor is moved off it, in w: by a hundredth of a unit in theta."""

_END = 36.0
"""The log-odds of one rounding: as far as the end of a range is away."""

Given = Literal["scale_tril", "covariance_matrix", "precision_matrix"]


class Chart(ABC):
    """Coordinates w of the values of one parameter that respect its floor; float64 and unconstrained on both sides."""

    @abstractmethod
    def coordinates(self, theta: Tensor) -> Tensor:
        """The coordinates of a value; of the nearest that respects the floor, more or less, where it does not.

        Args:
            theta: The unconstrained value.
        """

    @abstractmethod
    def theta(self, w: Tensor) -> Tensor:
        """The unconstrained value at some coordinates, differentiable in them.

        Args:
            w: What `coordinates` gives.
        """

    @abstractmethod
    def opened(self, w: Tensor) -> Tensor:
        """The coordinates moved off the floor, where no slope would tell whether to leave it.

        Args:
            w: What `coordinates` gives.
        """

    @abstractmethod
    def is_low(self, w: Tensor) -> Tensor:
        """Which entries (rows, matrices) are at the floor.

        Args:
            w: What `coordinates` gives.
        """

    def unbounded(self, direction: Tensor) -> Tensor:
        """A direction of theta with zeros where the floor is in the way.

        Args:
            direction: Of each entry.
        """
        return torch.zeros_like(direction)


def _is_zero(w: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    return w.square() <= CANCELLED * torch.finfo(w.dtype).eps * scale


@dataclass(frozen=True, eq=False)
class Entries(Chart):
    """Numbers between bounds; what is at the end of its range already is not touched."""

    low: Tensor
    high: Tensor
    """Of theta; infinite for none."""
    held: Tensor
    """Which entries are not touched."""
    start: Tensor
    """Theta, for those."""

    def coordinates(self, theta: Tensor) -> Tensor:
        """The root of the distance from the bound, or the angle between the two."""
        inside = theta.clamp(self.low, self.high)
        w = (inside - self.low).sqrt()
        if not self._is_one_sided:
            w = (w / (self.high - self.low).sqrt()).asin()
        return w.masked_fill(self.held, math.inf)

    def theta(self, w: Tensor) -> Tensor:
        """The bound, and the square of w or of its sine."""
        inside = w.masked_fill(self.held, 0.0)
        square = inside.square() if self._is_one_sided else (self.high - self.low) * inside.sin().square()
        return torch.where(self.held, self.start, self.low + square)

    def opened(self, w: Tensor) -> Tensor:
        """Not below a tenth, nor as near to the other bound."""
        most = math.inf if self._is_one_sided else math.pi / 2 - _OPENED
        return torch.where(self.held, w, w.clamp(_OPENED, most))

    def is_low(self, w: Tensor) -> Tensor:
        """Entries without distance from a bound."""
        low = _is_zero(w) if self._is_one_sided else _is_zero(w.sin()) | _is_zero(w.cos())
        return ~self.held & low

    def unbounded(self, direction: Tensor) -> Tensor:
        """Upwards only, if there is no other bound."""
        return direction.clamp(min=0) if self._is_one_sided else torch.zeros_like(direction)

    @property
    def _is_one_sided(self) -> bool:
        return bool(self.high.isinf().all())


@dataclass(frozen=True, eq=False)
class Rows(Chart):
    """Probabilities that sum to one along the last dim; those that are exactly 0 stay."""

    floor: float

    def coordinates(self, theta: Tensor) -> Tensor:
        """Roots of the shares of what the floor leaves; infinite for a zero."""
        probs = theta.softmax(-1)
        held = theta.isneginf()
        share = torch.where(held, 0.0, (probs - self.floor).clamp(min=0))
        root = (share / share.sum(-1, keepdim=True)).sqrt()
        return torch.where(held, theta, root)

    def theta(self, w: Tensor) -> Tensor:
        """Logs of probabilities."""
        held = w.isneginf()
        square = torch.where(held, 0.0, w).square()
        mass = 1 - self.floor * (~held).sum(-1, keepdim=True)
        probs = self.floor + mass * square / square.sum(-1, keepdim=True)
        return torch.where(held, w, probs.where(~held, 1.0).log())

    def opened(self, w: Tensor) -> Tensor:
        """Not below a tenth of the root of an even share."""
        return torch.where(w.isfinite(), w.abs().clamp(min=_OPENED / math.sqrt(w.shape[-1])), w)

    def is_low(self, w: Tensor) -> Tensor:
        """Entries that have the floor and no more."""
        norm = torch.where(w.isfinite(), w, 0.0).square().sum(-1, keepdim=True)
        return w.isfinite() & _is_zero(w, norm * self.floor)


@dataclass(frozen=True, eq=False)
class Matrices(Chart):
    """Covariances with a least variance in any direction, as their parameter gives them."""

    least: float
    """The variance."""
    given: Given
    constraint: Any
    unit: Tensor
    """The standard deviations that w counts in, one for each matrix, `(*batch, 1, 1)`."""

    def coordinates(self, theta: Tensor) -> Tensor:
        """The root of the covariance less its least variance."""
        variance, axes = torch.linalg.eigh(covariance_given(self._value(theta), self.given))
        root = (variance - self.least).clamp(min=0).sqrt()
        w: Tensor = (axes * root[..., None, :]) @ axes.mT / self.unit
        return w

    def theta(self, w: Tensor) -> Tensor:
        """The parameter of the least variance and the square of w."""
        unit_matrix = torch.eye(w.shape[-1], dtype=w.dtype, device=w.device)
        if self.given == "covariance_matrix":
            value = w @ w.mT * self.unit.square() + self.least * unit_matrix
        else:
            # The covariance is A A^T, and its factor comes of A: a least variance is lost in the sum by rounding.
            root = torch.cat([w * self.unit, math.sqrt(self.least) * unit_matrix.expand_as(w)], -1)
            factor = torch.linalg.qr(root.mT).R.mT
            value = factor * torch.where(factor.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[..., None, :]
            value = torch.cholesky_inverse(value) if self.given == "precision_matrix" else value
        result: Tensor = transform_to(self.constraint).inv(value)
        return result

    def opened(self, w: Tensor) -> Tensor:
        """The least variance raised by a hundredth."""
        left, values, right = torch.linalg.svd(w)
        least = _OPENED * math.sqrt(self.least) / self.unit[..., 0]
        opened: Tensor = (left * torch.maximum(values, least)[..., None, :]) @ right
        return opened

    def is_low(self, w: Tensor) -> Tensor:
        """Matrices with a direction of the least variance."""
        least = torch.linalg.svdvals(w).amin(-1)
        return _is_zero(least, self.least / self.unit[..., 0, 0].square() + w.square().sum((-2, -1)))

    def _value(self, theta: Tensor) -> Tensor:
        result: Tensor = transform_to(self.constraint)(theta)
        return result


@dataclass(frozen=True, eq=False)
class Inverses(Chart):
    """Precision matrices without a floor, by the logarithmic Cholesky factors of their inverses.

    A covariance that collapses is a matrix without bound, whose own coordinates are a valley too narrow to walk in.
    """

    def coordinates(self, theta: Tensor) -> Tensor:
        """The unconstrained Cholesky factor of the covariance."""
        covariance = torch.linalg.inv(transform_to(constraints.positive_definite)(theta))
        w: Tensor = transform_to(constraints.lower_cholesky).inv(torch.linalg.cholesky(covariance))
        return w

    def theta(self, w: Tensor) -> Tensor:
        """The unconstrained precision matrix."""
        precision = torch.cholesky_inverse(transform_to(constraints.lower_cholesky)(w))
        theta: Tensor = transform_to(constraints.positive_definite).inv(precision)
        return theta

    def opened(self, w: Tensor) -> Tensor:
        """The coordinates themselves."""
        return w

    def is_low(self, w: Tensor) -> Tensor:
        """None."""
        return torch.zeros(w.shape[:-2], dtype=torch.bool)

    def unbounded(self, direction: Tensor) -> Tensor:
        """All of it."""
        return direction


def covariance_given(value: Tensor, given: Given) -> Tensor:
    """Covariances of which a parameter is the Cholesky factor, themselves or the inverse.

    Args:
        value: Constrained, `(*batch, size, size)`.
        given: Which.
    """
    if given == "covariance_matrix":
        return value
    return value @ value.mT if given == "scale_tril" else torch.linalg.inv(value)


def charts_of(pair: Pair, names: Collection[str], enumeration: Enumeration) -> dict[str, Chart]:
    """The charts of parameters that have a floor, and of precision matrices.

    A parameter's constraint says what its floor bounds; where it does not, the distribution that takes it does. A floor
    for all parameters is none for those of which nothing says what it would bound: locations, coefficients, weights of
    networks.

    Args:
        pair: The programs, and their floors.
        names: The parameters.
        enumeration: A run with the graph from the parameters to the distributions.

    Raises:
        VFEError: A floor was given by name to a parameter of which nothing says what it would bound.
        ProbabilityError: No probabilities respect the floor.
    """
    charts: dict[str, Chart] = {}
    for name in names:
        least = floor_of(pair.floor, name)
        if not unconstrained(name).requires_grad:
            continue
        if least is None:
            if _is_precision(name, enumeration, pair.parameters):
                charts[name] = Inverses()
            continue
        chart = _chart(name, least, enumeration, pair.parameters)
        if chart is not None:
            charts[name] = chart
        elif is_named(pair.floor, name):
            raise VFEError(
                f"EM was given a floor for '{name}', and its constraint, {constraint_of(name)}, does not say what that "
                "would bound.",
                hint="Floors are for scales, variances, rates and probabilities: give the parameter the constraint "
                "positive, unit_interval, simplex, lower_cholesky or positive_definite, or one with the bound that is "
                "meant, constraints.greater_than(c).",
            )
    return charts


def _chart(name: str, least: float, enumeration: Enumeration, parameters: Parameters) -> Chart | None:
    constraint = _inner(constraint_of(name))
    theta = unconstrained(name).detach().double().cpu()
    if isinstance(constraint, type(constraints.simplex)):
        return _rows(name, theta, least)
    if isinstance(constraint, type(constraints.lower_cholesky)):
        return _matrices(theta, least * least, "scale_tril", constraint)
    if hasattr(constraint, "lower_bound"):
        return _entries(name, least)
    slots = slots_by_parameter(enumeration, parameters).get(name, set())
    if ("logits", 0) in slots:
        end = torch.tensor(math.log1p(-least) - math.log(least), dtype=torch.float64)
        return Entries(-end, end, theta.isinf(), theta)
    if ("logits", 1) in slots:
        return _rows(name, theta, least)
    if isinstance(constraint, type(constraints.positive_definite)):
        given: tuple[Given, ...] = ("covariance_matrix", "precision_matrix")
        for own in given:
            if (own, 2) in slots:
                return _matrices(theta, least, own, constraint)
    return None


def _inner(constraint: constraints.Constraint) -> constraints.Constraint:
    """What holds for each entry, row or matrix of a parameter."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint


def _is_precision(name: str, enumeration: Enumeration, parameters: Parameters) -> bool:
    if not isinstance(constraint_of(name), type(constraints.positive_definite)):
        return False
    return ("precision_matrix", 2) in slots_by_parameter(enumeration, parameters).get(name, set())


def _entries(name: str, least: float) -> Entries | None:
    """Bounds on numbers that have a least value of their own, and on probabilities from above too."""
    leaf = unconstrained(name).detach()
    constraint: Any = _inner(constraint_of(name))
    value = transform_to(constraint)(leaf)
    held = value == 0
    below, above = (
        torch.as_tensor(getattr(constraint, side, end), dtype=torch.float64)
        for side, end in (("lower_bound", 0.0), ("upper_bound", math.inf))
    )
    low, high = below.clamp(min=least), above
    if bool((below >= 0).all() and (above <= 1).all()):
        high = above.clamp(max=1 - least)
        held = probability_at_end(value)
    if bool((low >= high).any()):
        raise ProbabilityError(
            f"The floor {least:g} of '{name}' leaves nothing of its constraint, {constraint}.",
            hint="Choose a smaller one.",
        )
    if torch.equal(low, below) and torch.equal(high, above):
        return None
    transform = transform_to(constraint)
    # A bound of the constraint's own is where rounding makes it the end of the range.
    ends = torch.where(low == below, -_END, transform.inv(low)), torch.where(high == above, _END, transform.inv(high))
    ends = ends[0], ends[1] if bool(high.isfinite().all()) else high
    return Entries(*ends, held.cpu(), leaf.double().cpu())


def _rows(name: str, theta: Tensor, least: float) -> Rows:
    check_room(name, ~theta.isneginf(), least)
    return Rows(least)


def _matrices(theta: Tensor, least: float, given: Given, constraint: Any) -> Matrices:
    covariance = covariance_given(transform_to(constraint)(theta), given)
    variance = covariance.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=least)
    return Matrices(least, given, constraint, variance.sqrt()[..., None, None])


def hold_floors(pair: Pair, enumeration: Enumeration) -> None:
    """Raises what is learned and has come to be below its floor, where a phase or a jump knows of none.

    Args:
        pair: The programs.
        enumeration: A run of them with the graph from the parameters to the distributions.
    """
    if pair.floor is None:
        return
    for name, chart in charts_of(pair, pair.learned, enumeration).items():
        leaf = unconstrained(name)
        present = leaf.detach().double().cpu()
        raised = chart.theta(chart.coordinates(present))
        rounding = 4 * torch.finfo(leaf.dtype).eps
        if not torch.allclose(raised, present, rtol=rounding, atol=rounding):
            with torch.no_grad():
                leaf.copy_(raised)
