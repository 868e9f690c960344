"""Which of the values of its support a latent has: the index by which a table is read."""

import math

import torch
from torch import Tensor

COUNTED = ("Categorical", "MarkovChain")
"""Families whose values are 0 to K - 1."""

ONE_HOT = ("OneHotCategorical", "OneHotCategoricalStraightThrough")
"""Families whose values are one-hot vectors, the one at the value's index."""

_MAX_CODE = 2**62


def position(family: str, support: Tensor, value: Tensor) -> Tensor:
    """Returns the indices of values in a support, int64 `(*batch,)`; no value leaves torch.

    Args:
        family: The name of the distribution's class: of some the values tell their indices.
        support: Shape `(K, *event_shape)`.
        value: Values from the support, `(*batch, *event_shape)`.
    """
    if family in (*COUNTED, "Bernoulli"):
        return value.long()
    if family in ONE_HOT:
        return value.argmax(-1)
    support = support.to(value.device)
    event_dims = support.dim() - 1
    if not event_dims:
        return _rank(support, value)
    columns, wanted = support.flatten(1), value.flatten(-event_dims)
    code, base = _codes(columns)
    if code is None:
        return (wanted.unsqueeze(-2) == columns).all(-1).long().argmax(-1)
    found = sum(_digit(level, wanted[..., n]) * weight for n, (level, weight) in enumerate(base))
    return _rank(code, torch.as_tensor(found))


def _rank(support: Tensor, value: Tensor) -> Tensor:
    """The indices of numbers in an unordered list of them."""
    ordered, order = support.sort()
    return order[torch.searchsorted(ordered, value.to(ordered.dtype).contiguous()).clamp(max=len(support) - 1)]


def _codes(columns: Tensor) -> tuple[Tensor | None, list[tuple[Tensor, int]]]:
    """Each row of a table as one number, in a system with a digit per column; None where that would be too long."""
    levels = [column.unique() for column in columns.unbind(1)]
    sizes = [len(level) for level in levels]
    if math.prod(sizes) > _MAX_CODE:
        return None, []
    weights = [math.prod(sizes[n + 1 :]) for n in range(len(sizes))]
    base = list(zip(levels, weights, strict=True))
    code = sum(_digit(level, columns[:, n]) * weight for n, (level, weight) in enumerate(base))
    return torch.as_tensor(code), base


def _digit(levels: Tensor, value: Tensor) -> Tensor:
    return torch.searchsorted(levels, value.to(levels.dtype).contiguous())
