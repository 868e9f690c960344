r"""Tables that are slices of one tensor: what equal steps of a loop say of different data.

    table_t  =  stack[t],    t = 0, ..., T - 1

The sites of a loop that score different data under the same parameters are scored together, in one call. Each site's
table is then a slice of the result, made when somebody asks for it: who sums the whole chain takes the stack as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from pyro_vfe.engine.factors import Table
from pyro_vfe.errors import VFEError


@dataclass(frozen=True, eq=False)
class Stack:
    """Tensors of one shape, one after the other along a first dim."""

    values: Tensor
    """All of them, shape `(T, *shape)`."""

    @cached_property
    def parts(self) -> tuple[Tensor, ...]:
        """The T tensors, as views: taken apart together, their gradients are put together in one operation."""
        return self.values.unbind(0)


class StackedTable(Table):
    """A table that is entry `index` of a stack; its `values` are selected when they are first asked for."""

    stack: Stack
    """The stack, shared by all tables that are slices of it."""

    index: int
    """Which entry of the stack this table is."""

    def __init__(self, stack: Stack, index: int, axes: tuple[str, ...]) -> None:
        """Args:
        stack: Tensors whose dims are `axes`.
        index: Which of them.
        axes: The name of each dim of the entry, all different.
        """
        if stack.values.dim() != len(axes) + 1 or len(set(axes)) != len(axes):
            raise VFEError(
                f"A table of shape {tuple(stack.values.shape[1:])} was given the axes {axes}.",
                hint="Name each dimension once.",
            )
        for name, value in (("stack", stack), ("index", index), ("axes", axes)):
            object.__setattr__(self, name, value)

    @cached_property
    def values(self) -> Tensor:
        """The numbers, shape `(*axes)`."""
        return self.stack.parts[self.index]

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each axis."""
        return dict(zip(self.axes, self.stack.values.shape[1:], strict=True))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the numbers."""
        return self.stack.values.dtype

    def renamed(self, axes: tuple[str, ...]) -> "StackedTable":
        """Returns the same entry with other names for its dims."""
        return StackedTable(self.stack, self.index, axes)


def whole_stack(tables: Sequence[Table]) -> Tensor | None:
    """Returns the stack whose slices 0, ..., T - 1 the tables are, in this order, shape `(T, *shape)`.

    Args:
        tables: Tables whose dims correspond; their axes may have other names.

    Returns:
        None where they are not the whole of one stack in order.
    """
    first = tables[0]
    if not isinstance(first, StackedTable) or len(first.stack.values) != len(tables):
        return None
    for index, table in enumerate(tables):
        if not isinstance(table, StackedTable) or table.stack is not first.stack or table.index != index:
            return None
    return first.stack.values


def stacked_values(tables: Sequence[Table]) -> Tensor:
    """Returns the tables' values one after the other, shape `(T, *shape)`, without a copy where there is no need.

    Args:
        tables: Tables of one shape whose dims correspond; slices of one stack are taken from it as they are.
    """
    whole = whole_stack(tables)
    if whole is not None:
        return whole
    first = tables[0]
    if isinstance(first, StackedTable):
        own = [table.index for table in tables if isinstance(table, StackedTable) and table.stack is first.stack]
        if len(own) == len(tables):
            steps = {after - before for before, after in pairwise(own)}
            if steps == {1}:
                return first.stack.values[own[0] : own[-1] + 1]
            return first.stack.values.index_select(0, torch.tensor(own, device=first.stack.values.device))
    if all(table.values is first.values for table in tables):
        return first.values.expand(len(tables), *first.values.shape)
    return torch.stack([table.values for table in tables])
