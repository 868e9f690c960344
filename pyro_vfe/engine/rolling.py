r"""Loops of a program as chains: the tables of equal steps are stacked along a plate of their own.

    table[t, z', z]  =  table_t(z', z)        one table without the axis t where all steps share it

The inverse of writing a plate out. Numbers and gradients are those of the loop; the sum is one sweep.
"""

from collections.abc import Sequence

import torch

from pyro_vfe.engine.execution import reference_tensor
from pyro_vfe.engine.factors import Factor, FactorGraph, Scale, Table, Variable
from pyro_vfe.engine.repeats import Loop, Thread, find_loop
from pyro_vfe.engine.scales import rescaled, same_scale
from pyro_vfe.engine.stacks import stacked_values
from pyro_vfe.engine.unrolling import structure_of


def rolled(graph: FactorGraph, keep: frozenset[str]) -> FactorGraph:
    """Returns the graph with its longest loop as a chain; the graph itself where there is no loop.

    Args:
        graph: The factors.
        keep: Variables that stay as they are.
    """
    loop = find_loop(structure_of(graph), keep)
    if loop is None:
        return graph
    scale = _scale_of(loop, graph)
    if scale is None:
        return graph
    variables = dict(graph.variables)
    for strand in loop.strands:
        some = graph.variables[strand.variables[0]]
        for name in strand.variables:
            del variables[name]
        chain = loop.time if strand.is_read_later else None
        variables[strand.name] = Variable(strand.name, some.size, some.plates | {loop.time}, scale, chain)
    gone = {position for thread in loop.threads for position in thread.factors}
    left = [factor for position, factor in enumerate(graph.factors) if position not in gone]
    plates = {**graph.plates, loop.time: loop.steps}
    return FactorGraph((*left, *_factors(loop, graph, scale)), variables, plates)


def _scale_of(loop: Loop, graph: FactorGraph) -> Scale | None:
    """The scale of all the loop's variables; None where they differ."""
    variables = [graph.variables[name] for strand in loop.strands for name in strand.variables]
    scale = variables[0].scale
    return scale if all(same_scale(variable.scale, scale) for variable in variables) else None


def _factors(loop: Loop, graph: FactorGraph, scale: Scale) -> list[Factor]:
    zero = Table(reference_tensor(graph).new_zeros(()), ())
    chains = {strand.name for strand in loop.strands if strand.is_read_later}
    made: list[Factor] = []
    for thread in loop.threads:
        plates = thread.plates | {loop.time}
        if thread.is_first_alone and not chains.isdisjoint(thread.axes):
            first = _along(thread, thread.factors[:1], graph, scale)
            made.append(Factor(loop.time, zero, plates, scale, first=first))
        elif thread.reads_earlier:
            table = _along(thread, thread.factors[1:], graph, scale, loop.time)
            made.append(Factor(loop.time, table, plates, scale, first=zero))
        else:
            made.append(Factor(loop.time, _along(thread, thread.factors, graph, scale, loop.time), plates, scale))
    return made


def _along(
    thread: Thread, positions: Sequence[int | None], graph: FactorGraph, scale: Scale, time: str | None = None
) -> Table:
    """The tables of some of a thread's factors as one: along time, unless they are all the same."""
    found = [None if n is None else rescaled(graph.factors[n], scale).table for n in positions]
    first, some = next((n, table) for n, table in enumerate(found) if table is not None)
    missing = [n for n, table in enumerate(found) if table is None]
    tables = [Table(torch.zeros_like(some.values), some.axes) if table is None else table for table in found]
    depth = len(thread.axes)
    brought = tuple(dict.fromkeys(axis for table in tables for axis in table.axes[depth:]))  # by weights
    axes = (*thread.axes, *brought)
    if brought:
        tables = [_spread(table, depth, brought, graph) for table in tables]
    if time is None:
        return Table(tables[first].values, axes)
    values = stacked_values(tables)
    if values.stride(0) == 0 and not missing:
        return Table(values[0], axes)
    return Table(values, (time, *axes))


def _spread(table: Table, depth: int, plates: tuple[str, ...], graph: FactorGraph) -> Table:
    """The table over some plates too, behind its first axes."""
    axes = (*table.axes[:depth], *plates)
    values = table.aligned(axes)
    return Table(values.expand(*values.shape[:depth], *(graph.plates[plate] for plate in plates)), axes)
