"""Reading a table at an assignment.

table[z = z*(n), n]        one number per plate element (and per draw, if the assignment has draws)

Along a chain: first[z_0], then table[z_{t-1}, z_t, t] for the elements after the first.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_vfe.engine.factors import Factor, Table
from pyro_vfe.engine.shapes import broadcast_shapes
from pyro_vfe.engine.structure import previous


def read(table: Table, assignment: Mapping[str, Table], axes: Sequence[str]) -> Tensor:
    """Returns the entries of `table` at an assignment of its variables.

    Args:
        table: What to read; each of its axes is either in `assignment` or in `axes`.
        assignment: Indices (int64) by variable, each over some of `axes`.
        axes: The order of the result's dims; one along which nothing varies has size 1.
    """
    index: list[Tensor] = []
    for axis, size in table.sizes.items():
        chosen = assignment.get(axis)
        if chosen is None:
            chosen = Table(torch.arange(size, device=table.values.device), (axis,))
        index.append(chosen.aligned(axes))
    if not index:
        return table.values.reshape((1,) * len(axes))
    return table.values[tuple(index)]


def read_factor(factor: Factor, assignment: Mapping[str, Table], axes: Sequence[str], time: str | None) -> Tensor:
    """Returns the entries of a factor's tables at an assignment, as `read` does for one table.

    Args:
        factor: What to read.
        assignment: Indices (int64) by variable, each over some of `axes`.
        axes: The order of the result's dims; one along which nothing varies has size 1.
        time: The plate along which the factor's variable is a chain, where it is one.
    """
    if factor.first is None or time is None:
        return read(factor.table, assignment, axes)
    steps = max(table.sizes.get(time, 1) for table in assignment.values())
    at_first = {name: table.narrowed(time, 0, 1) for name, table in assignment.items()}
    later = {name: table.narrowed(time, 1, steps - 1) for name, table in assignment.items()}
    earlier = {previous(name): table.narrowed(time, 0, steps - 1) for name, table in assignment.items()}
    parts = [read(factor.first, at_first, axes), read(factor.table, later | earlier, axes)]
    shape = broadcast_shapes(*(part.movedim(axes.index(time), 0).shape[1:] for part in parts))
    aligned = [part.movedim(axes.index(time), 0) for part in parts]
    whole = torch.cat([aligned[0].expand(1, *shape), aligned[1].expand(steps - 1, *shape)])
    return whole.movedim(0, axes.index(time))
