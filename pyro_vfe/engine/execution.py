r"""Executes a plan: pairwise contractions, then products over plates.

    log Z  =  log sum_x exp( sum_f scale_f f(x) )

In one component the summed variables share a scale c, and the exponent of a factor is (scale_f / c) f; the result has
scale c. Where plates are reduced, scale * table is summed over the plate, once per element for a plate whose axis the
table lacks, and the scale becomes 1.

References:
    Obermeyer et al. (2019), Tensor variable elimination for plated factor graphs.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from pyro_vfe.engine.cost import check_cost, plan_within
from pyro_vfe.engine.factors import Factor, FactorGraph, Table
from pyro_vfe.engine.logspace import SumProduct
from pyro_vfe.engine.ordering import Component, Plan, plan
from pyro_vfe.engine.scales import applied, common_scale, rescaled, with_axes_of_scales
from pyro_vfe.engine.slicing import sum_over_slices
from pyro_vfe.engine.unrolling import apply_unrolling, structure_of

NO_NAMES: frozenset[str] = frozenset()


class Semiring(Protocol):
    """How two log tables are contracted."""

    def contract(self, left: Table, right: Table | None, axes: tuple[str, ...], summed: tuple[str, ...]) -> Table:
        """Returns the product of two log tables with `summed` reduced, over `axes`."""


@dataclass(frozen=True, eq=False)
class Execution:
    """A plan, its graph and all tables it made."""

    plan: Plan
    graph: FactorGraph
    slots: list[Factor]
    """Every factor by its slot; those that feed a contraction are weighted as it needs them."""

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The factors that are left."""
        return tuple(self.slots[slot] for slot in self.plan.results)


def execute_sum(
    graph: FactorGraph,
    keep: frozenset[str] = NO_NAMES,
    keep_plates: frozenset[str] = NO_NAMES,
    max_bytes: float | None = None,
    *,
    cut: bool = False,
) -> Execution:
    """Returns the executed sum-product elimination; off the CPU, done again with care if a product underflowed."""
    like = reference_tensor(graph)
    on_cpu = like.device.type == "cpu"
    first = SumProduct(careful=on_cpu)
    execution = execute(graph, first, keep, keep_plates, max_bytes, cut=cut)
    if not first.underflowed():
        return execution
    return execute(graph, SumProduct(careful=True), keep, keep_plates, max_bytes, cut=cut)


def execute(
    graph: FactorGraph,
    semiring: Semiring,
    keep: frozenset[str] = NO_NAMES,
    keep_plates: frozenset[str] = NO_NAMES,
    max_bytes: float | None = None,
    entries_of: Callable[[Plan], int] | None = None,
    *,
    cut: bool = False,
) -> Execution:
    """Returns the executed plan of a graph.

    Args:
        graph: The factors.
        semiring: How tables are contracted.
        keep: Variables that stay.
        keep_plates: Plates that are not multiplied out.
        max_bytes: The most memory that intermediate tables may take.
        entries_of: How many numbers the semiring makes of a plan; the plan's intermediates by default.
        cut: Sum value by value over some variables where the plan would not fit. Their components have no tables of
            their steps in the slots then, only of the result.
    """
    graph.check()
    graph = with_axes_of_scales(with_uniform_factors(graph, keep))
    like = reference_tensor(graph)
    structure = structure_of(graph)
    if cut:
        order = plan_within(structure, keep, keep_plates, like.element_size(), like.device, max_bytes)
    else:
        order = plan(structure, keep, keep_plates)
    check_cost(order, like.element_size(), like.device, max_bytes, entries=entries_of(order) if entries_of else None)
    for unrolling in order.unrollings:
        graph = apply_unrolling(graph, unrolling)
    slots = list(graph.factors)
    for component in order.components:
        _run_component(component, slots, graph, semiring)
    return Execution(order, graph, slots)


def _run_component(component: Component, slots: list[Factor], graph: FactorGraph, semiring: Semiring) -> None:
    assert all(slots[slot].first is None for slot in component.inputs), "a chain is to be summed before the plan"
    result = slots[component.inputs[0]]
    if component.steps or component.cut:
        scale = common_scale([graph.variables[name] for name in component.variables])
        for slot in component.inputs:
            slots[slot] = rescaled(slots[slot], scale)
        name = _result_name(component.variables)
        if component.cut:
            result = Factor(name, _sliced(component, slots, graph, semiring), component.plates, scale)
            slots.extend([result] * len(component.steps))
        for step in () if component.cut else component.steps:
            right = None if step.right is None else slots[step.right].table
            table = semiring.contract(slots[step.left].table, right, step.axes, step.summed)
            result = Factor(name, table, component.plates, scale)
            slots.append(result)
    reduced = component.plates - component.target
    slots.append(without_plates(result, reduced, graph) if reduced else result)


def _sliced(component: Component, slots: list[Factor], graph: FactorGraph, semiring: Semiring) -> Table:
    inputs = {slot: slots[slot].table for slot in component.inputs}
    cut = {name: graph.variables[name].size for name in component.cut}
    return sum_over_slices(inputs, component.steps, cut, len(slots), semiring.contract)


def without_plates(factor: Factor, plates: Iterable[str], graph: FactorGraph) -> Factor:
    """Returns the factor, its scale applied, multiplied out over plates, also those whose axis it lacks."""
    gone = frozenset(plates)
    whole = applied(factor)
    first = None if whole.first is None else _multiplied_out(whole.first, gone, graph)
    return Factor(whole.name, _multiplied_out(whole.table, gone, graph), whole.plates - gone, whole.scale, first)


def _multiplied_out(table: Table, gone: frozenset[str], graph: FactorGraph) -> Table:
    reduced = [n for n, axis in enumerate(table.axes) if axis in gone]
    values = table.values.sum(reduced) if reduced else table.values
    copies = 1
    for plate in gone.difference(table.axes):
        copies *= graph.plates[plate]
    axes = tuple(axis for axis in table.axes if axis not in gone)
    return Table(values * copies if copies != 1 else values, axes)


def with_uniform_factors(graph: FactorGraph, keep: frozenset[str]) -> FactorGraph:
    """Returns the graph with a table of zeros for each summed variable that no table mentions: it counts log size."""
    mentioned = {axis for factor in graph.factors for axis in factor.axes}
    missing = [v for v in graph.variables.values() if v.name not in mentioned and v.name not in keep]
    if not missing:
        return graph
    like = reference_tensor(graph)
    zeros = (Factor(v.name, Table(like.new_zeros(v.size), (v.name,)), v.plates, v.scale) for v in missing)
    return replace(graph, factors=(*graph.factors, *zeros))


def reference_tensor(graph: FactorGraph) -> Tensor:
    """Returns a tensor of the graph's dtype and device."""
    return graph.factors[0].table.values if graph.factors else torch.zeros(())


def _result_name(variables: Sequence[str]) -> str:
    shown = ", ".join(variables[:3])
    return f"sum over {shown}" if len(variables) <= 3 else f"sum over {shown} and {len(variables) - 3} more"
