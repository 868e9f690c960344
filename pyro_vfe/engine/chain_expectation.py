r"""Expectations under chains of the guide: forward marginals, then one contraction per cost.

    q_t(s)     =  sum_r q_{t-1}(r) Q_t(s | r)
    E[f]       =  sum_s q_0(s) f_0(s)  +  sum_t sum_{r,s} q_{t-1}(r) Q_t(s | r) f_t(r, s)

Variables are tied where some conditional or cost reads a previous value; they form one state with what their
conditionals read inside the plate, and what that is read from there: all of it changes from step to step.

References:
    Saul and Jordan (1996), Exploiting tractable substructures in intractable networks (chains as guides).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from math import prod
from typing import Literal

import torch

from pyro_vfe.engine.chain_elimination import after_first, at_first, stacked_pairs
from pyro_vfe.engine.chains import chain_marginals
from pyro_vfe.engine.factors import Factor, FactorGraph, Table, total
from pyro_vfe.engine.logspace import linear_contract
from pyro_vfe.engine.shapes import broadcast_shapes
from pyro_vfe.engine.structure import previous
from pyro_vfe.errors import PlateError

Time = Literal["summed", "kept", "split"]


@dataclass(frozen=True, eq=False)
class ChainMarginals:
    """The marginals of one joint chain, and its transitions."""

    plate: str
    states: tuple[str, ...]

    states_at: Table
    """q_t(s), over the plate, the batch and the states."""

    transitions: Table
    """Q_t(s | r), over what it varies along, the previous and the present states."""

    def expected(self, table: Table, first: Table | None, time: Time, careful: bool) -> tuple[Table, Table | None]:
        """Returns the expectation of a cost over the states, and apart from it that of the first element if asked.

        Args:
            table: The cost, or the cost of the elements after the first.
            first: The cost of the first element, where the cost reads previous values.
            time: Whether the elements of the plate are summed, kept apart, or stay split into the first and the others.
            careful: Whether an infinite cost of probability zero counts nothing.
        """
        keep = {self.plate} if time != "summed" else set()
        if first is None:
            return self._contracted(self.states_at, table, keep, careful), None
        at_start = self._contracted(self.states_at.selected(self.plate, 0), first, keep, careful)
        later = self._later(table, keep, careful)
        if time == "split":
            return later, at_start
        return (_joined(at_start, later, self.plate) if time == "kept" else total((at_start, later))), None

    def _later(self, table: Table, keep: set[str], careful: bool) -> Table:
        """The expectation of a cost of the elements after the first."""
        earlier = {name: previous(name) for name in self.states}
        steps = self.states_at.sizes[self.plate] - 1
        if set(earlier.values()).isdisjoint(table.axes):
            return self._contracted(self.states_at.narrowed(self.plate, 1, steps), table, keep, careful)
        before = self.states_at.narrowed(self.plate, 0, steps)
        before = Table(before.values, tuple(earlier.get(axis, axis) for axis in before.axes))
        return self._contracted(before, self._averaged(self.transitions, table, careful), keep, careful)

    def _averaged(self, transitions: Table, table: Table, careful: bool) -> Table:
        """The cost's mean over the present states, given the previous ones."""
        union = tuple(dict.fromkeys((*transitions.axes, *table.axes)))
        weights, values = transitions.aligned(union), table.aligned(union)
        if careful:
            values = torch.where(weights > 0, values, 0.0)
        dims = [dim for dim, axis in enumerate(union) if axis in self.states]
        return Table((weights * values).sum(dims), tuple(axis for axis in union if axis not in self.states))

    def _contracted(self, weights: Table, table: Table, keep: set[str], careful: bool) -> Table:
        gone = {self.plate, *self.states, *map(previous, self.states)} - keep
        union = tuple(dict.fromkeys((*weights.axes, *table.axes)))
        if careful:
            table = Table(torch.where(weights.aligned(union) > 0, table.aligned(union), 0.0), union)
        axes = tuple(axis for axis in union if axis not in gone)
        return Table(linear_contract(weights, table, axes), axes)


def chain_marginals_of(conditionals: Sequence[Factor], plate: str, graph: FactorGraph) -> ChainMarginals:
    """Returns the marginals of the chain that some conditionals make up.

    Args:
        conditionals: The log-probability of each variable of the joint state, in order of sampling.
        plate: The plate along which the chains run.
        graph: Knows the sizes.

    Raises:
        PlateError: The variables are not all in the same plates.
    """
    states = tuple(factor.name for factor in conditionals)
    _check_plates(states, graph)
    firsts = [at_first(factor, plate).table for factor in conditionals]
    pairs = [after_first(factor, plate).table for factor in conditionals]
    own = {plate, *states, *map(previous, states)}
    batch = tuple(dict.fromkeys(axis for table in (*firsts, *pairs) for axis in table.axes if axis not in own))
    sizes, state_sizes = ([graph.size(axis) for axis in axes] for axes in (batch, states))
    initial = total(firsts).aligned((*batch, *states))
    initial = initial.expand(*sizes, *state_sizes).reshape(prod(sizes), prod(state_sizes)).exp()
    probs = stacked_pairs(pairs, plate, states, batch, graph).exp()
    steps = graph.plates[plate]
    values = chain_marginals(initial, probs, steps).reshape(steps, *sizes, *state_sizes)
    states_at = Table(values, (plate, *batch, *states))
    varying = ((plate,) if probs.shape[0] > 1 else ()) + (batch if probs.shape[1] > 1 else ())
    shape = [steps - 1 if axis == plate else graph.size(axis) for axis in varying]
    axes = (*varying, *map(previous, states), *states)
    return ChainMarginals(plate, states, states_at, Table(probs.reshape(*shape, *state_sizes, *state_sizes), axes))


def tied_groups(
    conditionals: Sequence[Factor], costs: Iterable[Sequence[str]], graph: FactorGraph
) -> list[list[Factor]]:
    """Returns the conditionals in an order of sampling, those of one joint chain together.

    Args:
        conditionals: The log-probability of each variable given earlier ones, in order of sampling.
        costs: The axes of what is expected.
        graph: Variables and plates.
    """
    if all(variable.chain is None for variable in graph.variables.values()):
        return [[factor] for factor in conditionals]
    by_name = {factor.name: factor for factor in conditionals}
    read = {axis for axes in (*(factor.axes for factor in conditionals), *costs) for axis in axes}
    group_of = {name: [name] for name in by_name}
    for name in by_name:
        plate = graph.variables[name].chain
        if previous(name) not in read or plate is None:
            continue
        for parent in _read_inside(plate, name, by_name, graph):
            _merge(group_of, name, parent)
    return [
        [by_name[name] for name in by_name if group_of[name] is group] for group in _sorted(group_of, by_name, graph)
    ]


def _read_inside(plate: str, name: str, by_name: dict[str, Factor], graph: FactorGraph) -> list[str]:
    """What a variable's conditional reads inside a plate, and what these read there, and so on; itself first."""
    found = {name: None}
    queue = [name]
    while queue:
        read = graph.scope(by_name[queue.pop()])
        fresh = [v for v in read if v in by_name and v not in found and plate in graph.variables[v].plates]
        found |= dict.fromkeys(fresh)
        queue += fresh
    return list(found)


def _merge(group_of: dict[str, list[str]], one: str, other: str) -> None:
    first, second = group_of[one], group_of[other]
    if first is not second:
        first.extend(second)
        group_of.update(dict.fromkeys(second, first))


def _sorted(group_of: dict[str, list[str]], by_name: dict[str, Factor], graph: FactorGraph) -> list[list[str]]:
    """The groups, parents first."""
    groups = {id(group): group for group in group_of.values()}
    sorter: TopologicalSorter[int] = TopologicalSorter(dict.fromkeys(groups, ()))
    for name, factor in by_name.items():
        for parent in graph.scope(factor):
            if parent in group_of and group_of[parent] is not group_of[name]:
                sorter.add(id(group_of[name]), id(group_of[parent]))
    return [groups[key] for key in sorter.static_order()]


def _check_plates(states: Sequence[str], graph: FactorGraph) -> None:
    for name in states:
        if graph.variables[name].plates != graph.variables[states[0]].plates:
            raise PlateError(
                f"The chain '{states[0]}' in the plates {sorted(graph.variables[states[0]].plates)} and '{name}' in the"
                f" plates {sorted(graph.variables[name].plates)} depend on each other at every step.",
                hint="Put both in the same plates.",
            )


def _joined(first: Table, rest: Table, plate: str) -> Table:
    """The tables of a chain's first element and of the others, one after the other."""
    axes = (plate, *dict.fromkeys(axis for axis in (*first.axes, *rest.axes) if axis != plate))
    one, other = first.aligned(axes), rest.aligned(axes)
    shape = broadcast_shapes(one.shape[1:], other.shape[1:])
    return Table(torch.cat([one.expand(-1, *shape), other.expand(-1, *shape)]), axes)
