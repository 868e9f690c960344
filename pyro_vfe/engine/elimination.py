r"""Summing variables out of a plated factor graph: executes a plan.

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
from pyro_vfe.engine.factors import Factor, FactorGraph, Scale, Table
from pyro_vfe.engine.logspace import SumProduct, weighted
from pyro_vfe.engine.ordering import Component, Plan, plan
from pyro_vfe.engine.slicing import sum_over_slices
from pyro_vfe.engine.structure import Unrolling
from pyro_vfe.engine.unrolling import apply_unrolling, structure_of
from pyro_vfe.errors import VFEError

NO_NAMES: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Elimination:
    """What is left of a graph when variables were summed out of it."""

    factors: tuple[Factor, ...]
    """Factors over kept variables, or over plates alone; one that mentions no summed variable is as it was."""

    graph: FactorGraph
    """The graph that was summed: the caller's, or with plates written out."""

    unrollings: tuple[Unrolling, ...]
    """The plates that had to be written out; a copy of v for element 3 of plate i is named 'v[i=3]'."""


@dataclass(frozen=True, eq=False)
class LogNormalizer:
    """The log normaliser in nats, split at the kept plates; the total is `inside.sum() + outside`."""

    inside: Table
    """The terms of each element of the kept plates, shape `(*sorted(keep_plates))`."""

    outside: Tensor
    """What does not belong to an element: a scalar."""

    @property
    def total(self) -> Tensor:
        """The log normaliser itself, a scalar."""
        return self.inside.values.sum() + self.outside


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


def eliminate(
    graph: FactorGraph,
    *,
    keep: frozenset[str] = NO_NAMES,
    keep_plates: frozenset[str] = NO_NAMES,
    max_bytes: float | None = None,
) -> Elimination:
    """Returns the graph's factors with every variable summed out that is not kept; differentiable in the tables.

    Args:
        graph: The factors.
        keep: Variables that stay.
        keep_plates: Plates that are not multiplied out.
        max_bytes: The most memory that intermediate tables may take; half of the free memory by default.

    Raises:
        CostError: The plan would not fit.
        PlateError: A summed variable outside a kept plate is tied to factors inside it.
        VFEError: Variables that are summed together have different scales, or the graph is inconsistent.

    References:
        Obermeyer et al. (2019), Tensor variable elimination for plated factor graphs.
    """
    execution = execute_sum(graph, keep, keep_plates, max_bytes, cut=True)
    return Elimination(execution.factors, execution.graph, execution.plan.unrollings)


def log_normalizer(
    graph: FactorGraph, *, keep_plates: frozenset[str] = NO_NAMES, max_bytes: float | None = None
) -> LogNormalizer:
    """Returns the log of the sum over all variables, with one entry per element of the kept plates.

    Args:
        graph: The factors.
        keep_plates: Plates to report by; a factor inside all of them counts as inside.
        max_bytes: The most memory that intermediate tables may take; half of the free memory by default.

    Raises:
        CostError: The plan would not fit.
        PlateError: A variable outside a kept plate is tied to factors inside it.
    """
    axes = tuple(sorted(keep_plates))
    like = reference_tensor(graph)
    inside = like.new_zeros([graph.plates[plate] for plate in axes])
    outside = like.new_zeros(())
    for factor in eliminate(graph, keep_plates=keep_plates, max_bytes=max_bytes).factors:
        if keep_plates and keep_plates <= factor.plates:
            inside = inside + without_plates(factor, factor.plates - keep_plates, graph).table.aligned(axes)
        else:
            outside = outside + without_plates(factor, factor.plates, graph).table.values
    return LogNormalizer(Table(inside, axes), outside)


def plan_of(graph: FactorGraph, keep: frozenset[str] = NO_NAMES, keep_plates: frozenset[str] = NO_NAMES) -> Plan:
    """Returns the plan by which `eliminate` would sum the graph.

    Raises:
        PlateError: A summed variable outside a kept plate is tied to factors inside it.
    """
    return plan(structure_of(with_uniform_factors(graph, keep)), keep, keep_plates)


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
    graph = with_uniform_factors(graph, keep)
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
    result = slots[component.inputs[0]]
    if component.steps or component.cut:
        scale = _common_scale(component, graph)
        for slot in component.inputs:
            slots[slot] = _rescaled(slots[slot], scale)
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
    table = weighted(factor.table, factor.scale)
    reduced = [n for n, axis in enumerate(table.axes) if axis in gone]
    values = table.values.sum(reduced) if reduced else table.values
    copies = 1
    for plate in gone - set(table.axes):
        copies *= graph.plates[plate]
    axes = tuple(axis for axis in table.axes if axis not in gone)
    return Factor(factor.name, Table(values * copies if copies != 1 else values, axes), factor.plates - gone)


def with_uniform_factors(graph: FactorGraph, keep: frozenset[str]) -> FactorGraph:
    """Returns the graph with a table of zeros for each summed variable that no table mentions: it counts log size."""
    mentioned = {axis for factor in graph.factors for axis in factor.table.axes}
    missing = [v for v in graph.variables.values() if v.name not in mentioned and v.name not in keep]
    if not missing:
        return graph
    like = reference_tensor(graph)
    zeros = (Factor(v.name, Table(like.new_zeros(v.size), (v.name,)), v.plates, v.scale) for v in missing)
    return replace(graph, factors=(*graph.factors, *zeros))


def reference_tensor(graph: FactorGraph) -> Tensor:
    """Returns a tensor of the graph's dtype and device."""
    return graph.factors[0].table.values if graph.factors else torch.zeros(())


def same_scale(first: Scale, second: Scale) -> bool:
    """Returns whether two scales are equal; compares values only where the objects differ."""
    if first is second:
        return True
    if not isinstance(first, Table) and not isinstance(second, Table):
        return first == second
    sizes = [scale.sizes if isinstance(scale, Table) else {} for scale in (first, second)]
    if sizes[0] != sizes[1]:
        return False
    axes = tuple(sizes[0])
    one, other = (scale.aligned(axes) if isinstance(scale, Table) else scale for scale in (first, second))
    return bool(torch.as_tensor(one == other).all())


def _common_scale(component: Component, graph: FactorGraph) -> Scale:
    variables = [graph.variables[name] for name in component.variables]
    scale = variables[0].scale
    for variable in variables[1:]:
        if not same_scale(variable.scale, scale):
            raise VFEError(
                f"Sites '{variables[0].name}' and '{variable.name}' depend on each other and are summed together, but"
                f" have the scales {_shown(scale)} and {_shown(variable.scale)}.",
                hint="Put both sites under one poutine.scale.",
            )
    return scale


def _shown(scale: Scale) -> str:
    return f"of a table over {scale.axes}" if isinstance(scale, Table) else f"{scale:g}"


def _rescaled(factor: Factor, scale: Scale) -> Factor:
    """Returns the factor with the exponent it has relative to a common scale."""
    if same_scale(factor.scale, scale):
        return factor
    return replace(factor, table=weighted(factor.table, _ratio(factor.scale, scale)), scale=scale)


def _ratio(numerator: Scale, denominator: Scale) -> Scale:
    """Returns numerator / denominator, where 0 / 0 is 1: an element of weight zero counts nothing either way."""
    plates = tuple(dict.fromkeys(axis for s in (numerator, denominator) if isinstance(s, Table) for axis in s.axes))
    above, below = (
        s.aligned(plates) if isinstance(s, Table) else torch.tensor(s, dtype=torch.float64)
        for s in (numerator, denominator)
    )
    if bool(((below == 0) & (above != 0)).any()):
        raise VFEError(
            "A latent site has scale 0 and a site that reads it has not.",
            hint="Put both sites under one poutine.scale.",
        )
    ratio = (above / below).where(above != below, 1.0)
    return Table(ratio, plates) if plates else float(ratio)


def _result_name(variables: Sequence[str]) -> str:
    shown = ", ".join(variables[:3])
    return f"sum over {shown}" if len(variables) <= 3 else f"sum over {shown} and {len(variables) - 3} more"
