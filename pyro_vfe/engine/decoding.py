r"""The most probable assignment, and draws from the posterior: eliminate forward, then decide backward.

    x_s ~ P(x_s | x_later)  proportional to  exp( left(x_s, x_later) + right(x_s, x_later) )

Every step that summed variables s out of two tables holds their conditional given what is summed later; so the steps
are undone in reverse, each read at what was decided already, for all draws and plate elements at once.

References:
    Dawid (1992), Applications of a general propagation algorithm for probabilistic expert systems.
    Rabiner (1989), A tutorial on hidden Markov models, section III.B (Viterbi).
"""

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from pyro_vfe.engine.elimination import Execution, execute, execute_sum, without_plates
from pyro_vfe.engine.factors import FactorGraph, Table
from pyro_vfe.engine.inference import check_possible
from pyro_vfe.engine.logspace import broadcast_contract, picked_at
from pyro_vfe.engine.ordering import Component, Plan
from pyro_vfe.engine.paths import Step
from pyro_vfe.engine.unrolling import stitch

CHUNK = 2**24
"""Entries of the conditionals that are formed at a time when drawing."""

SAMPLE = "__sample__"
"""The axis of the draws."""

Choice = Callable[[Tensor], Tensor]
"""Takes logits `(N, K)`, gives one index per row, `(N,)`."""


class MaxProduct:
    """Contracts pairs of log tables by the maximum."""

    def contract(self, left: Table, right: Table | None, axes: tuple[str, ...], summed: tuple[str, ...]) -> Table:
        """Returns the product of two log tables, maximised over `summed`, over `axes`."""
        return broadcast_contract(left, right, axes, summed, lambda values, dims: values.amax(tuple(dims)))


@torch.no_grad()
def mode(graph: FactorGraph, *, max_bytes: float | None = None) -> dict[str, Table]:
    """Returns one most probable joint assignment: for each variable its indices, int64, shape `(*sorted(plates))`.

    Args:
        graph: The factors.
        max_bytes: The most memory that intermediate tables may take; half of the free memory by default.

    Raises:
        ImpossibleDataError: Every assignment has probability zero.
    """
    execution = execute(graph, MaxProduct(), max_bytes=max_bytes, entries_of=_broadcast_entries)
    decided = _decide(execution, 1, lambda logits: logits.argmax(-1))
    return {name: Table(table.values[0], table.axes[1:]) for name, table in decided.items()}


@torch.no_grad()
def sample(graph: FactorGraph, num_samples: int, *, max_bytes: float | None = None) -> dict[str, Table]:
    """Returns independent draws from the joint: for each variable int64 indices, `(num_samples, *sorted(plates))`.

    Args:
        graph: The factors.
        num_samples: The number of draws; the first axis, named `SAMPLE`.
        max_bytes: The most memory that intermediate tables may take; half of the free memory by default.

    Raises:
        ImpossibleDataError: Every assignment has probability zero.
    """
    execution = execute_sum(graph, max_bytes=max_bytes)
    at_once = max(1, CHUNK // _entries_per_draw(execution))
    portions = [min(at_once, num_samples - done) for done in range(0, num_samples, at_once)] or [0]
    draws = [_decide(execution, portion, _drawn) for portion in portions]
    return {
        name: Table(torch.cat([portion[name].values for portion in draws]), table.axes)
        for name, table in draws[0].items()
    }


def _drawn(logits: Tensor) -> Tensor:
    return torch.multinomial(logits.softmax(-1), 1)[:, 0] if len(logits) else logits.new_zeros(0, dtype=torch.int64)


def _entries_per_draw(execution: Execution) -> int:
    """Returns the size of the largest table of conditionals that one draw needs."""
    graph = execution.graph
    work = ((c.plates, step.summed) for c in execution.plan.components for step in c.steps)
    return max((prod(graph.size(axis) for axis in (*plates, *summed)) for plates, summed in work), default=1) or 1


def _broadcast_entries(plan: Plan) -> int:
    return plan.entries + max((step.flops for step in plan.steps), default=0)


def _decide(execution: Execution, num_samples: int, choose: Choice) -> dict[str, Table]:
    graph = execution.graph
    check_possible(
        sum((without_plates(f, f.plates, graph).table.values for f in execution.factors), torch.zeros(())), graph
    )
    decided: dict[str, Table] = {}
    for component in reversed(execution.plan.components):
        for step in reversed(component.steps):
            if step.summed:
                _undo(step, component, execution, num_samples, choose, decided)
    stitched = stitch(decided, execution.plan.unrollings)
    return {name: _in_order(table) for name, table in stitched.items()}


def _undo(
    step: Step, component: Component, execution: Execution, num_samples: int, choose: Choice, decided: dict[str, Table]
) -> None:
    """Decides the variables that a step summed, given those summed later."""
    sizes = {SAMPLE: num_samples} | {plate: execution.graph.plates[plate] for plate in sorted(component.plates)}
    batch = tuple(sizes)
    tables = [execution.slots[slot].table for slot in (step.left, step.right) if slot is not None]
    axes = {axis for table in tables for axis in table.axes}.difference(step.summed)
    device = tables[0].values.device
    position = {
        axis: (decided[axis] if axis in decided else Table(torch.arange(sizes[axis], device=device), (axis,))).aligned(
            batch
        )
        for axis in axes
    }
    logits = sum(picked_at(table, position, step.summed) for table in tables)
    assert isinstance(logits, Tensor)
    support = [execution.graph.variables[name].size for name in step.summed]
    rows = logits.expand(*sizes.values(), *support).flatten(0, len(batch) - 1).flatten(1)
    for name, index in zip(step.summed, _unravelled(choose(rows), support), strict=True):
        decided[name] = Table(index.reshape(tuple(sizes.values())), batch)


def _unravelled(index: Tensor, support: Sequence[int]) -> list[Tensor]:
    """Returns a flat index as one index per axis."""
    parts: list[Tensor] = []
    for size in reversed(support):
        parts.append(index % size)
        index = index // size
    return parts[::-1]


def _in_order(table: Table) -> Table:
    axes = (SAMPLE, *sorted(axis for axis in table.axes if axis != SAMPLE))
    return Table(table.aligned(axes), axes)
