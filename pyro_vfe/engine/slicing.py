r"""Executing the steps of a component that is cut: one value of the cut variables at a time.

    log sum_{x, c} exp f(x, c)  =  log sum_c exp( log sum_x exp f(x, c) )

What does not depend on the cut variables is formed once. Where gradients are taken, nothing else but the result of a
slice is kept: the backward pass forms each slice again.

References:
    Chen, Xu, Zhang and Guestrin (2016), Training deep nets with sublinear memory cost.
    Darwiche (2001), Recursive conditioning.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyro_vfe.engine.cuts import dependent
from pyro_vfe.engine.factors import Table
from pyro_vfe.engine.logspace import log_sum_exp
from pyro_vfe.engine.paths import Step

Contract = Callable[[Table, Table | None, tuple[str, ...], tuple[str, ...]], Table]
"""Contracts two log tables, as a semiring does: left, right, the axes of the result, the variables summed."""


def sum_over_slices(
    inputs: Mapping[int, Table], steps: Sequence[Step], cut: Mapping[str, int], first_slot: int, contract: Contract
) -> Table:
    """Returns the log table that is left of a component, summed over the cut variables too.

    Args:
        inputs: The tables by slot.
        steps: The contractions of one slice.
        cut: The cut variables and their sizes.
        first_slot: The slot of the first step's result.
        contract: How two tables are contracted.
    """
    operands = [(step.left, step.right) for step in steps]
    varying = dependent({slot: table.axes for slot, table in inputs.items()}, operands, cut, first_slot)
    tables = dict(inputs)
    for slot, step in enumerate(steps, first_slot):
        if slot not in varying:
            tables[slot] = _contracted(tables, step, contract)
    again = [(slot, step) for slot, step in enumerate(steps, first_slot) if slot in varying]
    axes = {slot: tuple(axis for axis in table.axes if axis not in cut) for slot, table in tables.items()}
    gone = {*cut, *(axis for step in steps for axis in step.summed)}
    first = steps[-1].axes if steps else ()
    left = tuple(dict.fromkeys((*first, *(axis for own in axes.values() for axis in own if axis not in gone))))

    def one_slice(*values: Tensor) -> Tensor:
        made = {slot: Table(part, axes[slot]) for slot, part in zip(tables, values, strict=True)}
        for slot, step in again:
            made[slot] = _contracted(made, step, contract)
        return made[again[-1][0] if again else min(varying)].aligned(left)

    parts = [
        _formed_again(one_slice, [_read(table, dict(zip(cut, index, strict=True))) for table in tables.values()])
        for index in product(*map(range, cut.values()))
    ]
    return Table(log_sum_exp(torch.stack(parts), [0]), left)


def _contracted(tables: Mapping[int, Table], step: Step, contract: Contract) -> Table:
    return contracted(tables[step.left], None if step.right is None else tables[step.right], step, contract)


def contracted(left: Table, right: Table | None, step: Step, contract: Contract) -> Table:
    """Returns what a step makes of its tables: over its axes, and plates that weights have brought to the tables.

    Args:
        left: The first table.
        right: The second, if there is one.
        step: The step.
        contract: How two tables are contracted.
    """
    known = (*step.axes, *step.summed)
    tables = (left,) if right is None else (left, right)
    added = dict.fromkeys(axis for table in tables for axis in table.axes if axis not in known)
    return contract(left, right, (*step.axes, *added), step.summed)


def _read(table: Table, at: Mapping[str, int]) -> Tensor:
    """Returns the table's values at some positions; a view."""
    return table.values[tuple(at.get(axis, slice(None)) for axis in table.axes)]


def _formed_again(function: Callable[..., Tensor], values: Sequence[Tensor]) -> Tensor:
    """Returns the function's value, and forms it again for its gradient."""
    if not torch.is_grad_enabled() or not any(value.requires_grad for value in values):
        return function(*values)
    result = checkpoint(function, *values, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(result, Tensor)
    return result
