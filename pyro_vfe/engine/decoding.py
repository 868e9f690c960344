r"""The most probable assignment, and draws from the posterior: eliminate forward, then decide backward.

    x_s ~ P(x_s | x_later)  proportional to  exp( left(x_s, x_later) + right(x_s, x_later) )

Every step that summed variables s out of two tables holds their conditional given what is summed later; so the steps
are undone in reverse, each read at what was decided already, for all draws and plate elements at once. A chain is
decided by one sweep, after what it depends on and before what was summed at its steps.

References:
    Dawid (1992), Applications of a general propagation algorithm for probabilistic expert systems.
    Rabiner (1989), A tutorial on hidden Markov models, section III.B (Viterbi).
"""

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from pyro_vfe.engine.chain_decoding import (
    SAMPLE,
    Paths,
    after_start,
    at_start,
    decide_chain,
    joined,
    path_score,
    unravelled,
)
from pyro_vfe.engine.chain_elimination import ChainTables, LocalSum, sweeps_of, without_sweeps
from pyro_vfe.engine.chain_groups import ChainGroup
from pyro_vfe.engine.chains import chain_log_normalizer, chain_mode, chain_sample
from pyro_vfe.engine.execution import NO_NAMES, Execution, execute, execute_sum, without_plates
from pyro_vfe.engine.factors import FactorGraph, Table
from pyro_vfe.engine.inference import check_possible
from pyro_vfe.engine.logspace import broadcast_contract, picked_at
from pyro_vfe.engine.ordering import Component, Plan
from pyro_vfe.engine.paths import Step
from pyro_vfe.engine.sum_order import check_sums
from pyro_vfe.engine.unrolling import stitch

CHUNK = 2**24
"""Entries of the conditionals that are formed at a time when drawing."""

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
        ScaleError: The sum's weights leave it no one value, or a biased one.
    """

    def best(part: FactorGraph, kept: frozenset[str], plates: frozenset[str]) -> Execution:
        return execute(part, MaxProduct(), kept, plates, max_bytes, entries_of=_broadcast_entries)

    graph.check()
    check_sums(graph, NO_NAMES)
    sweeps = sweeps_of(graph, NO_NAMES, NO_NAMES, best, max_bytes)
    scores = [path_score(sweep.unary, sweep.pairs, chain_mode(sweep.unary, sweep.pairs)) for sweep in sweeps]
    execution = best(without_sweeps(graph, sweeps, scores), NO_NAMES, NO_NAMES)
    decided = _decide(execution, sweeps, 1, lambda logits: logits.argmax(-1), chain_mode)
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
        ScaleError: The sum's weights leave it no one value, or a biased one.
    """

    def summed(part: FactorGraph, kept: frozenset[str], plates: frozenset[str]) -> Execution:
        return execute_sum(part, kept, plates, max_bytes)

    graph.check()
    check_sums(graph, NO_NAMES)
    sweeps = sweeps_of(graph, NO_NAMES, NO_NAMES, summed, max_bytes)
    sums = [chain_log_normalizer(sweep.unary, sweep.pairs) for sweep in sweeps]
    execution = summed(without_sweeps(graph, sweeps, sums), NO_NAMES, NO_NAMES)
    at_once = max(1, CHUNK // _entries_per_draw(execution, sweeps))
    portions = [min(at_once, num_samples - done) for done in range(0, num_samples, at_once)] or [0]
    draws = [_decide(execution, sweeps, portion, _drawn, _drawn_paths) for portion in portions]
    return {
        name: Table(torch.cat([portion[name].values for portion in draws]), table.axes)
        for name, table in draws[0].items()
    }


def _drawn_paths(unary: Tensor, pairs: Tensor) -> Tensor:
    return chain_sample(unary, pairs, 1)[0]


def _drawn(logits: Tensor) -> Tensor:
    return torch.multinomial(logits.softmax(-1), 1)[:, 0] if len(logits) else logits.new_zeros(0, dtype=torch.int64)


def _entries_per_draw(execution: Execution, sweeps: Sequence[ChainTables]) -> int:
    """Returns the size of the largest table of conditionals that one draw needs."""
    graph = execution.graph
    work = ((c.plates, step.summed) for c in execution.plan.components for step in c.steps)
    sizes = [prod(graph.size(axis) for axis in (*plates, *summed)) for plates, summed in work]
    sizes += [sweep.unary.numel() for sweep in sweeps]
    return max(sizes, default=1) or 1


def _broadcast_entries(plan: Plan) -> int:
    return plan.entries + max((step.flops for step in plan.steps), default=0)


def _decide(
    execution: Execution, sweeps: Sequence[ChainTables], num_samples: int, choose: Choice, paths: Paths
) -> dict[str, Table]:
    graph = execution.graph
    check_possible(
        sum((without_plates(f, f.plates, graph).table.values for f in execution.factors), torch.zeros(())), graph
    )
    decided: dict[str, Table] = {}
    _undo_all(execution, num_samples, choose, decided)
    decided = stitch(decided, execution.plan.unrollings)
    for sweep in sweeps:
        decide_chain(sweep, graph.plates, num_samples, paths, decided)
        for local in sweep.local:
            _decide_local(local, sweep.group, num_samples, choose, decided)
    return {name: _in_order(table) for name, table in decided.items()}


def _decide_local(
    local: LocalSum, group: ChainGroup, num_samples: int, choose: Choice, decided: dict[str, Table]
) -> None:
    """Decides what was summed at each step of a chain, given the chain."""
    if local.together is not None:
        _undo_all(local.together, num_samples, choose, decided)
        return
    parts: list[dict[str, Table]] = []
    for execution, known in ((local.first, at_start(decided, group)), (local.later, after_start(decided, group))):
        if execution is not None:
            before = set(known)
            _undo_all(execution, num_samples, choose, known)
            parts.append({name: table for name, table in known.items() if name not in before})
    decided.update({name: joined([part[name] for part in parts], group.plate) for name in parts[0]})


def _undo_all(execution: Execution, num_samples: int, choose: Choice, decided: dict[str, Table]) -> None:
    for component in reversed(execution.plan.components):
        for step in reversed(component.steps):
            if step.summed:
                _undo(step, component, execution, num_samples, choose, decided)


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
    for name, index in zip(step.summed, unravelled(choose(rows), support), strict=True):
        decided[name] = Table(index.reshape(tuple(sizes.values())), batch)


def _in_order(table: Table) -> Table:
    axes = (SAMPLE, *sorted(axis for axis in table.axes if axis != SAMPLE))
    return Table(table.aligned(axes), axes)
