"""Reading a table at an assignment.

table[z = z*(n), n]        one number per plate element (and per draw, if the assignment has draws)
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_vfe.engine.factors import Table


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
