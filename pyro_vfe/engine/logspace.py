r"""Sums of exponentials that stay right at -inf, in value and in gradient.

    log sum_s exp(a_s + b_s)  =  A + B + log sum_s exp(a_s - A) exp(b_s - B),        A = max_s a_s,  B = max_s b_s

The right-hand side is a matrix product, several times faster than the left. It is as exact, unless all products
underflow although the sum is not zero (a = [0, -800], b = [-800, 0]): entries so small are found and summed anew in the
broadcast form of the left-hand side. A sum of zeros alone is -inf and has gradient zero.

References:
    Blanchard, Higham and Higham (2021), Accurately computing the log-sum-exp and softmax functions.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vfe.engine.factors import Scale, Table

CHUNK = 2**22
"""Entries of a broadcast sum that are formed at a time when underflown entries are summed anew."""

_SAFE = {torch.float64: 1e-290, torch.float32: 1e-30}


def safe_floor(dtype: torch.dtype) -> float:
    """Returns the smallest number that a scaled linear sum may have and still be trusted."""
    return _SAFE.get(dtype, torch.finfo(dtype).tiny)


def log_sum_exp(values: Tensor, dims: Sequence[int]) -> Tensor:
    """Returns log sum exp over `dims`; where all terms are -inf, -inf with gradient zero."""
    if not dims:
        return values
    peak = _peak(values, dims)
    total = (values - peak).exp().sum(tuple(dims))
    dead = total.detach() == 0
    return total.masked_fill(dead, 1.0).log().masked_fill(dead, -torch.inf) + peak.reshape(total.shape)


def _peak(values: Tensor, dims: Sequence[int]) -> Tensor:
    """Returns the largest value along `dims`, kept as size 1; finite for all -inf, so that -inf - peak is -inf."""
    return values.detach().amax(tuple(dims), keepdim=True).clamp(min=torch.finfo(values.dtype).min)


class SumProduct:
    """Contracts pairs of log tables by log-sum-exp.

    Args:
        careful: Check every step by itself (one synchronisation each). Otherwise the caller asks `underflowed` once, at
            the end.
    """

    def __init__(self, *, careful: bool) -> None:
        self.careful = careful
        self._smallest: list[Tensor] = []

    def contract(self, left: Table, right: Table | None, axes: tuple[str, ...], summed: tuple[str, ...]) -> Table:
        """Returns the product of two log tables with `summed`, axes of both, summed out, over `axes`."""
        if right is None or not summed or _is_subset(left, right) or _is_subset(right, left):
            return broadcast_contract(left, right, axes, summed, log_sum_exp)
        return Table(self._linear(left, right, axes, summed), axes)

    def underflowed(self) -> bool:
        """Returns whether some entry fell below what a linear sum can be trusted with; one synchronisation."""
        if not self._smallest:
            return False
        smallest = torch.stack(self._smallest).min()
        return bool(smallest < safe_floor(smallest.dtype))

    def _linear(self, left: Table, right: Table, axes: tuple[str, ...], summed: tuple[str, ...]) -> Tensor:
        layout = matrix_layout(left.axes, right.axes, axes)
        rows, columns = layout.matrices(left.values, right.values)
        row_peak, column_peak = _peak(rows, (-1,)), _peak(columns, (-2,))
        total = (rows - row_peak).exp() @ (columns - column_peak).exp()
        low = total.detach() < safe_floor(total.dtype)
        if not self.careful:
            self._smallest.append(total.detach().amin())
        some_low = not self.careful or bool(low.any())
        logs = total.masked_fill(low, 1.0).log().masked_fill(low, -torch.inf) if some_low else total.log()
        result = layout.restored(logs + row_peak + column_peak, left.values, right.values)
        if not self.careful or not some_low:
            return result
        return _summed_anew(result, layout.restored(low, left.values, right.values), left, right, axes, summed)


def broadcast_contract(
    left: Table,
    right: Table | None,
    axes: tuple[str, ...],
    summed: tuple[str, ...],
    reduce: Callable[[Tensor, Sequence[int]], Tensor],
) -> Table:
    """Returns the sum of two tables, reduced over `summed`: the whole product is formed."""
    union = (*axes, *summed)
    values = left.aligned(union) if right is None else left.aligned(union) + right.aligned(union)
    return Table(reduce(values, range(len(axes), len(union))) if summed else values, axes)


class MatrixLayout(NamedTuple):
    """How the axes of two tables become those of a batched matrix product: batch, rows, inner and columns."""

    left: tuple[int, ...]
    """Dimensions of the left table in the order batch, rows, inner."""

    right: tuple[int, ...]
    """Dimensions of the right table in the order batch, inner, columns."""

    n_batch: int
    n_inner: int
    back: tuple[int, ...]
    """Dimensions of (batch, rows, columns) in the order wanted."""

    def matrices(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Returns two matrices, with one batch dimension in front if there is any batch."""
        left, right = left.permute(self.left), right.permute(self.right)
        batch = (prod(left.shape[: self.n_batch]),) if self.n_batch else ()
        inner = prod(left.shape[left.dim() - self.n_inner :])
        rows = prod(left.shape[self.n_batch : left.dim() - self.n_inner])
        columns = prod(right.shape[self.n_batch + self.n_inner :])
        return left.reshape(*batch, rows, inner), right.reshape(*batch, inner, columns)

    def restored(self, product: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Returns a product of the matrices with the dimensions that were wanted."""
        shape = [left.shape[dim] for dim in self.left[: len(self.left) - self.n_inner]]
        shape += [right.shape[dim] for dim in self.right[self.n_batch + self.n_inner :]]
        return product.reshape(shape).permute(self.back)


@lru_cache(maxsize=2**16)
def matrix_layout(left: tuple[str, ...], right: tuple[str, ...], axes: tuple[str, ...]) -> MatrixLayout:
    """Returns how a contraction is laid out as a matrix product; an axis outside `axes` is one of both tables.

    Args:
        left: The axes of the left table.
        right: The axes of the right table.
        axes: The axes of the product.
    """
    batch = [a for a in axes if a in left and a in right]
    rows = [a for a in axes if a in left and a not in right]
    columns = [a for a in axes if a in right and a not in left]
    inner = [a for a in left if a in right and a not in axes]
    made = [*batch, *rows, *columns]
    return MatrixLayout(
        left=tuple(map(left.index, [*batch, *rows, *inner])),
        right=tuple(map(right.index, [*batch, *inner, *columns])),
        n_batch=len(batch),
        n_inner=len(inner),
        back=tuple(map(made.index, axes)),
    )


def linear_contract(left: Table, right: Table, axes: tuple[str, ...]) -> Tensor:
    """Returns the product of two tables of numbers, not logs, with the axes outside `axes` summed."""
    left, right = _summed_alone(left, right, axes), _summed_alone(right, left, axes)
    layout = matrix_layout(left.axes, right.axes, axes)
    rows, columns = layout.matrices(left.values, right.values)
    return layout.restored(rows @ columns, left.values, right.values)


def _summed_alone(table: Table, other: Table, axes: tuple[str, ...]) -> Table:
    """Returns the table with those axes summed that neither the other table nor the product has."""
    alone = [n for n, axis in enumerate(table.axes) if axis not in axes and axis not in other.axes]
    if not alone:
        return table
    return Table(table.values.sum(alone), tuple(axis for n, axis in enumerate(table.axes) if n not in alone))


def weighted(table: Table, scale: Scale) -> Table:
    """Returns `scale * table`, where a weight of zero makes zero even of -inf."""
    if isinstance(scale, float | int):
        if scale == 1.0:
            return table
        nothing = table.values.where(torch.zeros((), dtype=torch.bool, device=table.values.device), 0.0)
        return Table(table.values * scale if scale else nothing, table.axes)
    axes = (*table.axes, *(axis for axis in scale.axes if axis not in table.axes))
    return Table(times(table.aligned(axes), scale.aligned(axes).to(table.values)), axes)


def times(values: Tensor, weights: Tensor) -> Tensor:
    """Returns `weights * values`, where a weight of zero makes zero even of -inf; none has a gradient of infinity."""
    if not weights.requires_grad:
        return values.where(weights != 0, 0.0) * weights
    finite = values.detach().isfinite()
    product = values.where(finite, 0.0) * weights
    return product.where(finite | (weights == 0), values * weights.detach())


def _is_subset(inner: Table, outer: Table) -> bool:
    return set(inner.axes) <= set(outer.axes)


def _summed_anew(
    result: Tensor, low: Tensor, left: Table, right: Table, axes: tuple[str, ...], summed: tuple[str, ...]
) -> Tensor:
    """Returns `result` with its `low` entries summed in the broadcast form, unless no term of theirs is above -inf."""
    dtype = result.dtype
    left_support, right_support = (Table((t.values.detach() > -torch.inf).to(dtype), t.axes) for t in (left, right))
    reachable = low & (linear_contract(left_support, right_support, axes) > 0)
    where = reachable.nonzero()
    if not len(where):
        return result
    sizes = left.sizes | right.sizes
    width = prod(sizes[axis] for axis in summed)
    parts = [_entries(left, right, axes, summed, part) for part in where.split(max(1, CHUNK // width))]
    return result.index_put(tuple(where.unbind(-1)), torch.cat(parts))


def _entries(left: Table, right: Table, axes: tuple[str, ...], summed: tuple[str, ...], where: Tensor) -> Tensor:
    """Returns the log-sum-exp for the entries at the positions `where`, shape `(N, len(axes))`."""
    position = dict(zip(axes, where.unbind(-1), strict=True))
    terms = picked_at(left, position, summed) + picked_at(right, position, summed)
    return log_sum_exp(terms, range(1, terms.dim()))


def picked_at(table: Table, position: Mapping[str, Tensor], free: tuple[str, ...]) -> Tensor:
    """Returns the table's values at given positions along its axes.

    Args:
        table: The table.
        position: An index for each axis that is not free, all of shapes that broadcast to `(*batch,)`.
        free: Axes that stay; one that the table lacks has size 1.

    Returns:
        Values of a shape that broadcasts to `(*batch, *free)`.
    """
    fixed = tuple(axis for axis in table.axes if axis not in free)
    values = table.aligned((*fixed, *free))
    return values[tuple(position[axis] for axis in fixed)] if fixed else values
