r"""Summing chains out of a factor graph: each group becomes the two kinds of tables that a sweep takes.

    unary[t](s)      =  sum of the log tables over state s at element t          the first element's own among them
    pairs[t](r, s)   =  sum of the log tables over state r at element t - 1 and s at element t

What is summed at each step alone goes first, with the chain's states kept. Where it reads previous states as well there
are two such sums: one for the elements after the first, where the previous state is one more variable, and one for the
first.

References:
    Rabiner (1989), A tutorial on hidden Markov models and selected applications in speech recognition.
    Ghahramani and Jordan (1997), Factorial hidden Markov models (several chains as one state).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from pyro_vfe.engine.chain_groups import ChainGroup, chain_groups
from pyro_vfe.engine.cost import check_cost
from pyro_vfe.engine.execution import Execution, reference_tensor, without_plates
from pyro_vfe.engine.factors import Factor, FactorGraph, Scale, Table, Variable, total
from pyro_vfe.engine.ordering import connected
from pyro_vfe.engine.scales import common_scale, rescaled
from pyro_vfe.engine.structure import previous
from pyro_vfe.engine.unrolling import structure_of
from pyro_vfe.errors import PlateError, VFEError

Executor = Callable[[FactorGraph, frozenset[str], frozenset[str]], Execution]
"""Sums a graph's variables, but for those kept, with the elements of the kept plates apart."""


@dataclass(frozen=True, eq=False)
class ChainTables:
    """A group of chains, ready for a sweep."""

    group: ChainGroup
    batch: tuple[str, ...]
    """The axes that the sequences stand for."""

    batch_sizes: tuple[int, ...]
    """The size of each."""

    state_sizes: tuple[int, ...]
    """The number of values of each of the group's states."""

    unary: Tensor
    """Log potentials of each element's state, shape `(T, N, K)`."""

    pairs: Tensor
    """Log potentials of neighbouring states, shape `(T - 1 or 1, N or 1, K, K)`."""

    scale: Scale
    """The weight of the group's sum."""

    local: tuple["LocalSum", ...]
    """What was summed at each step, before the sweep."""


@dataclass(frozen=True, eq=False)
class LocalSum:
    """Variables summed at each step: apart for the first element where they are tied to previous states."""

    together: Execution | None = None
    """The sum for all elements alike."""

    first: Execution | None = None
    """The sum for the first element."""

    later: Execution | None = None
    """The sum for the elements after the first; None where there are none."""


@dataclass
class _Pieces:
    """The tables of a group by kind."""

    unary: list[Table]
    first: list[Table]
    pairs: list[Table]

    @property
    def tables(self) -> tuple[Table, ...]:
        """All of them."""
        return (*self.unary, *self.first, *self.pairs)


def sweeps_of(
    graph: FactorGraph,
    keep: frozenset[str],
    keep_plates: frozenset[str],
    executor: Executor,
    max_bytes: float | None = None,
) -> list[ChainTables]:
    """Returns the tables of every group of chains that is to be summed.

    Args:
        graph: The factors.
        keep: Variables that stay.
        keep_plates: Plates whose elements are kept apart.
        executor: How variables are summed at each step.
        max_bytes: The most memory that a sweep may take; half of the free memory by default.

    Raises:
        PlateError: A chain is tied to something inside its plate that cannot be summed with it.
        CostError: A sweep would not fit.
    """
    groups = chain_groups(structure_of(graph), keep, keep_plates)
    like = reference_tensor(graph)
    for group in groups:
        check_cost(group, like.element_size(), like.device, max_bytes)
    return [chain_tables(graph, group, executor) for group in groups]


def chain_tables(graph: FactorGraph, group: ChainGroup, executor: Executor) -> ChainTables:
    """Returns the log potentials of a group of chains, with everything else inside its plate summed.

    Args:
        graph: The factors.
        group: The chains.
        executor: How variables are summed at each step.

    Raises:
        CostError: The sum at a step would not fit.
        VFEError: The group's variables differ in their scales, or the scale varies along the chain.
    """
    scale = _chain_scale(graph, group)
    factors = [_within(graph.factors[position], group, graph) for position in group.factors]
    local = set(group.local)
    pieces = _Pieces([], [], [])
    sums: list[LocalSum] = []
    scopes = {n: [axis for axis in factor.axes if axis in local] for n, factor in enumerate(factors)}
    for members, names in connected(scopes):
        part = [factors[n] for n in members]
        if names:
            sums.append(_local_sum(part, graph, group, executor))
            _add_sum(sums[-1], pieces, scale)
        else:
            _add_factors([rescaled(factor, scale) for factor in part], pieces)
    batch = tuple(axis for axis in group.batch if any(axis in table.axes for table in pieces.tables))
    return ChainTables(
        group,
        batch,
        tuple(graph.size(axis) for axis in batch),
        tuple(graph.size(name) for name in group.states),
        _unary(pieces, batch, graph, group),
        stacked_pairs(pieces.pairs or [_nothing(graph)], group.plate, group.states, batch, graph),
        scale,
        tuple(sums),
    )


def _chain_scale(graph: FactorGraph, group: ChainGroup) -> Scale:
    beside = [name for name in group.local if graph.variables[name].plates == group.plates]
    scale = common_scale([graph.variables[name] for name in (*group.states, *beside)])
    if isinstance(scale, Table) and group.plate in scale.axes:
        raise VFEError(
            f"Site '{group.states[0]}' is a chain along plate '{group.plate}', and its scale varies along it.",
            hint="Give the steps of a chain one scale; to leave out a step's data, mask the observation.",
        )
    return scale


def _add_factors(factors: Iterable[Factor], pieces: _Pieces) -> None:
    for factor in factors:
        if factor.first is None:
            pieces.unary.append(factor.table)
        else:
            pieces.pairs.append(factor.table)
            pieces.first.append(factor.first)


def _add_sum(done: LocalSum, pieces: _Pieces, scale: Scale) -> None:
    for execution, where in ((done.together, pieces.unary), (done.first, pieces.first), (done.later, pieces.pairs)):
        if execution is not None:
            where.extend(rescaled(factor, scale).table for factor in execution.factors)


def _within(factor: Factor, group: ChainGroup, graph: FactorGraph) -> Factor:
    """The factor with plates inside the chains' multiplied out, unless variables there are still to be summed."""
    if not set(group.local).isdisjoint(factor.axes) or factor.plates <= group.plates:
        return factor
    return without_plates(factor, factor.plates - group.plates, graph)


def _local_sum(part: Sequence[Factor], graph: FactorGraph, group: ChainGroup, executor: Executor) -> LocalSum:
    if all(factor.first is None for factor in part):
        return LocalSum(together=_summed(part, graph, group, group.steps, executor))
    firsts = [at_first(factor, group.plate) for factor in part]
    first = _summed(firsts, graph, group, None, executor)
    if group.steps == 1:
        return LocalSum(first=first)
    later = [after_first(factor, group.plate) for factor in part]
    return LocalSum(first=first, later=_summed(later, graph, group, group.steps - 1, executor))


def _summed(
    part: Sequence[Factor], graph: FactorGraph, group: ChainGroup, steps: int | None, executor: Executor
) -> Execution:
    """Sums the group's local variables out of some factors in which a previous state is a variable of its own.

    Args:
        part: The factors.
        graph: The graph that they are of.
        group: The chains.
        steps: The number of elements along time; None for a single one without that axis.
        executor: How variables are summed.
    """
    time = frozenset([group.plate])
    earlier = {previous(name): name for name in group.states}
    mentioned = {axis for factor in part for axis in factor.table.axes}
    variables: dict[str, Variable] = {}
    for axis in (*graph.variables, *earlier):
        if axis in mentioned:
            known = graph.variables[earlier.get(axis, axis)]
            plates = known.plates - time if steps is None else known.plates
            variables[axis] = replace(known, name=axis, plates=plates, chain=None)
    sizes = {**graph.plates, group.plate: 1 if steps is None else steps}
    keep = frozenset(variables).difference(group.local)
    kept_plates = group.plates - time if steps is None else group.plates
    return executor(FactorGraph(tuple(part), variables, sizes), keep, kept_plates)


def at_first(factor: Factor, plate: str) -> Factor:
    """Returns the factor at the first element of the chains along `plate`."""
    table = (factor.table if factor.first is None else factor.first).selected(plate, 0)
    return replace(factor, table=table, first=None, plates=factor.plates - {plate})


def after_first(factor: Factor, plate: str) -> Factor:
    """Returns the factor at the elements after the first."""
    if factor.first is not None:
        return replace(factor, first=None)
    return replace(factor, table=factor.table.narrowed(plate, 1, factor.table.sizes.get(plate, 1) - 1))


def _unary(pieces: _Pieces, batch: tuple[str, ...], graph: FactorGraph, group: ChainGroup) -> Tensor:
    inner = (*batch, *group.states)
    shape = [graph.size(axis) for axis in inner]
    every = total(pieces.unary or [_nothing(graph)]).aligned((group.plate, *inner)).expand(group.steps, *shape)
    if pieces.first and group.steps:
        every = torch.cat([every[:1] + total(pieces.first).aligned(inner), every[1:]])
    return every.reshape(group.steps, prod(shape[: len(batch)]), group.n_states)


def stacked_pairs(
    tables: Sequence[Table], plate: str, states: Sequence[str], batch: Sequence[str], graph: FactorGraph
) -> Tensor:
    """Returns the sum of tables over neighbouring states, shape `(T - 1 or 1, N or 1, K, K)`.

    Args:
        tables: Each over some of the plate, the batch, the previous and the present states.
        plate: The plate along which the chains run.
        states: The variables of the joint state.
        batch: The axes that sequences stand for.
        graph: Knows the sizes.
    """
    outer = (plate, *batch)
    varying = {axis for axis in outer if any(axis in table.axes for table in tables)}
    axes = (*outer, *map(previous, states), *states)
    values = total(tables).aligned(axes)
    sizes = [graph.size(name) for name in states]
    time = graph.plates[plate] - 1 if plate in varying else 1
    sequences = [graph.size(axis) if varying - {plate} else 1 for axis in batch]
    return values.expand(time, *sequences, *sizes, *sizes).reshape(time, prod(sequences), prod(sizes), prod(sizes))


def _nothing(graph: FactorGraph) -> Table:
    """A table that adds nothing."""
    return Table(reference_tensor(graph).new_zeros(()), ())


def chain_factor(tables: ChainTables, log_sums: Tensor) -> Factor:
    """Returns what is left of a group: the log sums of its sequences as a factor.

    Args:
        tables: The group.
        log_sums: One number per sequence, shape `(N,)`.
    """
    values = log_sums.reshape(tables.batch_sizes)
    names = ", ".join(tables.group.states)
    return Factor(
        f"sum over {names}", Table(values, tables.batch), tables.group.plates - {tables.group.plate}, tables.scale
    )


def without_sweeps(graph: FactorGraph, sweeps: Sequence[ChainTables], log_sums: Sequence[Tensor]) -> FactorGraph:
    """Returns the graph with each group of chains replaced by what is left of it.

    Args:
        graph: The graph.
        sweeps: Groups of its chains.
        log_sums: For each, one number per sequence.
    """
    groups = [sweep.group for sweep in sweeps]
    left = [chain_factor(sweep, log_sum) for sweep, log_sum in zip(sweeps, log_sums, strict=True)]
    gone = frozenset().union(*(group.factors for group in groups))
    summed = frozenset().union(*(group.summed for group in groups))
    factors = [factor for position, factor in enumerate(graph.factors) if position not in gone]
    variables = {name: variable for name, variable in graph.variables.items() if name not in summed}
    return replace(graph, factors=(*factors, *left), variables=variables)


def without_steps(graph: FactorGraph, keep: frozenset[str], executor: Executor) -> FactorGraph:
    """Returns the graph with variables summed that are tied, step by step, to chains which stay.

    Args:
        graph: The graph, whose other chains have been summed.
        keep: Variables that stay, chains among them.
        executor: How variables are summed at each step.

    Raises:
        PlateError: A variable outside a chain's plate is tied to the chain: its sum would depend on all steps at once.
    """
    scopes = {n: [a for a in f.axes if a in graph.variables and a not in keep] for n, f in enumerate(graph.factors)}
    left: dict[int, Factor] = dict(enumerate(graph.factors))
    summed: set[str] = set()
    for members, names in connected(scopes):
        part = [graph.factors[n] for n in members]
        if names and any(factor.first is not None for factor in part):
            result = _beside_a_chain(part, names, graph, keep, executor)
            left = {n: factor for n, factor in left.items() if n not in members} | {members[0]: result}
            summed.update(names)
    variables = {name: variable for name, variable in graph.variables.items() if name not in summed}
    return replace(graph, factors=tuple(left[n] for n in sorted(left)), variables=variables)


def _beside_a_chain(
    part: Sequence[Factor], names: Sequence[str], graph: FactorGraph, keep: frozenset[str], executor: Executor
) -> Factor:
    chain = next(v for v in graph.variables.values() if any(previous(v.name) in factor.axes for factor in part))
    assert chain.chain is not None
    for name in names:
        if not graph.variables[name].plates >= chain.plates:
            raise PlateError(
                f"Latent '{name}' is to be summed out above the chain '{chain.name}', whose steps in plate"
                f" '{chain.chain}' all depend on it: the sum would depend on all steps at once.",
                hint=f"Give the guide '{name}' too, or leave '{chain.name}' out of it.",
            )
    states = tuple(v.name for v in graph.variables.values() if v.chain == chain.chain and v.name in keep)
    group = ChainGroup.of_kept(chain.chain, states, tuple(names), chain.plates, graph.plates[chain.chain])
    done = _local_sum(part, graph, group, executor)
    pieces = _Pieces([], [], [])
    _add_sum(done, pieces, chain.scale)
    table, first = total(pieces.pairs or [_nothing(graph)]), total(pieces.first)
    return Factor(f"sum over {', '.join(names)}", table, chain.plates, chain.scale, first)
