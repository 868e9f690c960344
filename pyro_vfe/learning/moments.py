r"""What normal data say about locations and covariances, in sums that can be added.

    -2 log p  =  sum_pairs  c log |S|  +  tr S^-1 ( M2 - M1 d' - d M1' + w d d' )  +  const,      d = loc - centre

M1 and M2 are first and second moments about a centre, for each pair of a location and a covariance that data share.
A normal distribution is one of size 1. What is known takes no part: data of a known location are taken about it, data
of a known covariance tell of the location alone,  -2 log p = d' L d - 2 d' h + const.

References:
    Chan, Golub and LeVeque (1983), Algorithms for computing the sample variance.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of data about centres, R pairs of a location and a covariance; float64."""

    location: Tensor
    """Which location the data have, `(R,)`; 0 where it is known."""
    spread: Tensor
    """Which covariance the data have, `(R,)`."""
    count: Tensor
    """How often the log-determinant counts, `(R,)`."""
    weight: Tensor
    """How often the square counts, `(R,)`; not `count` for priors."""
    first: Tensor
    """sum w (x - centre), `(R, size)`."""
    second: Tensor
    """sum w (x - centre)(x - centre)', `(R, size, size)`."""
    centre: Tensor
    """`(R, size)`; zero where the location is known, as x is taken about it."""
    magnitude: Tensor
    """The size of the squares that were summed, `(R, size)`: the measure of what rounding can do."""

    def about(self, centre: Tensor) -> "Moments":
        """The same moments about other centres.

        Args:
            centre: The new ones, `(R, size)`.
        """
        shift = self.centre - centre
        moved = self.weight[:, None] * shift
        cross = self.first[:, :, None] * shift[:, None, :]
        return replace(
            self,
            first=self.first + moved,
            second=self.second + cross + cross.mT + moved[:, :, None] * shift[:, None, :],
            centre=centre,
            magnitude=self.magnitude + moved.abs() * shift.abs(),
        )

    def pooled(self) -> "Moments":
        """The same moments with each pair once."""
        key = self.location * (int(self.spread.max()) + 1 if len(self.spread) else 1) + self.spread
        pairs, group = key.unique(return_inverse=True)
        if len(pairs) == len(key):
            return self
        rows = representatives(group, self.weight.abs(), len(pairs))
        moved = self.about(self.centre[rows][group])
        summed = {
            name: summed_by(group, getattr(moved, name), len(pairs))
            for name in ("count", "weight", "first", "second", "magnitude")
        }
        return replace(self, location=self.location[rows], spread=self.spread[rows], centre=self.centre[rows], **summed)

    def scaled(self, factor: float) -> "Moments":
        """The same moments with every weight multiplied.

        Args:
            factor: What to multiply by; may be negative, to take away.
        """
        names = ("count", "weight", "first", "second", "magnitude")
        return replace(self, **{name: getattr(self, name) * factor for name in names})

    def squares(self, locations: Tensor | None) -> tuple[Tensor, Tensor]:
        """Each pair's sum w (x - loc)(x - loc)', `(R, size, size)`, and the size of what was summed, `(R, size)`.

        Args:
            locations: All locations, `(L, size)`; None where they are known.
        """
        if locations is None:
            return self.second, self.magnitude
        moved = self.about(locations[self.location])
        return moved.second, moved.magnitude


def joined(parts: Sequence[Moments]) -> Moments:
    """The moments of several parts together, each pair once.

    Args:
        parts: At least one, of one size.
    """
    if len(parts) == 1:
        return parts[0].pooled()
    columns = {field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Moments)}
    return Moments(**columns).pooled()


@dataclass(frozen=True, eq=False)
class Evidence:
    """What is known of L locations from data of known covariance, or a prior of known covariance; float64."""

    precision: Tensor
    """L, the sum of w S^-1, `(L, size, size)`."""
    information: Tensor
    """h, the sum of w S^-1 (x - centre), `(L, size)`."""
    centre: Tensor
    """`(L, size)`."""

    def about(self, centre: Tensor) -> "Evidence":
        """The same about other centres.

        Args:
            centre: The new ones, `(L, size)`.
        """
        shift = self.centre - centre
        moved = (self.precision @ shift[..., None])[..., 0]
        return replace(self, information=self.information + moved, centre=centre)

    def __add__(self, other: "Evidence") -> "Evidence":
        mine, theirs = (_trace(evidence.precision).abs()[:, None] for evidence in (self, other))
        centre = torch.where(mine >= theirs, self.centre, other.centre)
        a, b = self.about(centre), other.about(centre)
        return Evidence(a.precision + b.precision, a.information + b.information, centre)

    def scaled(self, factor: float) -> "Evidence":
        """The same with every weight multiplied.

        Args:
            factor: What to multiply by.
        """
        return replace(self, precision=self.precision * factor, information=self.information * factor)


def evidence(location: Tensor, precision: Tensor, first: Tensor, centre: Tensor, count: int) -> Evidence:
    """What R pieces of data say about locations.

    Args:
        location: Which location each piece is about, `(R,)`.
        precision: Their weights times their precisions, `(R, size, size)`.
        first: Their precisions times their weighted sums about the centre, `(R, size)`.
        centre: `(R, size)`.
        count: How many locations there are.
    """
    rows = representatives(location, _trace(precision).abs(), count)
    present = rows < len(location)
    reference = centre.new_zeros(count, centre.shape[-1])
    reference[present] = centre[rows[present]]
    moved = Evidence(precision, first, centre).about(reference[location])
    return Evidence(summed_by(location, precision, count), summed_by(location, moved.information, count), reference)


def summed_by(group: Tensor, values: Tensor, count: int) -> Tensor:
    """The sums of values by group, `(count, *rest)`.

    Args:
        group: The group of each row, `(R,)`.
        values: `(R, *rest)`.
        count: How many groups there are.
    """
    return values.new_zeros(count, *values.shape[1:]).index_add(0, group, values)


def representatives(group: Tensor, weight: Tensor, count: int) -> Tensor:
    """The first row of the largest weight in each group, `(count,)`; R for a group without rows.

    A group takes over the centre of one of its rows, so that equal centres are not moved at all.

    Args:
        group: The group of each row, `(R,)`.
        weight: Each row's weight, `(R,)`, not negative.
        count: How many groups there are.
    """
    largest = weight.new_zeros(count).scatter_reduce(0, group, weight, "amax")
    number = torch.arange(len(group), device=group.device)
    candidate = torch.where(weight == largest[group], number, len(group))
    return candidate.new_full((count,), len(group)).scatter_reduce(0, group, candidate, "amin")


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)
