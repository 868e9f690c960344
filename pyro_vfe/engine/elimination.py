r"""Summing variables out of a plated factor graph.

    log Z  =  log sum_x exp( sum_f scale_f f(x) )

Loops are taken for the chains they are, and chains are summed first, by a sweep along their plate each; what is left is
eliminated by a plan.

References:
    Obermeyer et al. (2019), Tensor variable elimination for plated factor graphs.
    Rabiner (1989), A tutorial on hidden Markov models and selected applications in speech recognition.
"""

from dataclasses import dataclass

from torch import Tensor

from pyro_vfe.engine.chain_elimination import sweeps_of, without_steps, without_sweeps
from pyro_vfe.engine.chains import chain_log_normalizer
from pyro_vfe.engine.execution import (
    NO_NAMES,
    Execution,
    execute_sum,
    reference_tensor,
    with_uniform_factors,
    without_plates,
)
from pyro_vfe.engine.factors import Factor, FactorGraph, Table
from pyro_vfe.engine.ordering import Plan, plan
from pyro_vfe.engine.rolling import rolled
from pyro_vfe.engine.scales import with_axes_of_scales
from pyro_vfe.engine.structure import Unrolling
from pyro_vfe.engine.sum_order import check_sums
from pyro_vfe.engine.unrolling import structure_of


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
        ScaleError: The sum's weights leave it no one value, or a biased one.
        VFEError: The graph is inconsistent.

    References:
        Obermeyer et al. (2019), Tensor variable elimination for plated factor graphs.
    """
    graph.check()
    check_sums(graph, keep)
    graph = without_chains(rolled(graph, keep), keep, keep_plates, max_bytes)
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
        ScaleError: The sum's weights leave it no one value, or a biased one.
    """
    check_sums(graph, keep)
    return plan(structure_of(with_axes_of_scales(with_uniform_factors(graph, keep))), keep, keep_plates)


def without_chains(
    graph: FactorGraph, keep: frozenset[str], keep_plates: frozenset[str], max_bytes: float | None = None
) -> FactorGraph:
    """Returns the graph with the chains summed that are not kept, and what is tied to them inside their plates.

    Args:
        graph: The factors.
        keep: Variables that stay.
        keep_plates: Plates whose elements are kept apart.
        max_bytes: The most memory that intermediate tables may take.

    Raises:
        PlateError: A chain is tied to something inside its plate that cannot be summed with it.
        CostError: A sweep would not fit.
    """
    if all(factor.first is None for factor in graph.factors):
        return graph

    def executor(part: FactorGraph, kept: frozenset[str], plates: frozenset[str]) -> Execution:
        return execute_sum(part, kept, plates, max_bytes, cut=True)

    sweeps = sweeps_of(graph, keep, keep_plates, executor, max_bytes)
    log_sums = [chain_log_normalizer(sweep.unary, sweep.pairs) for sweep in sweeps]
    return without_steps(without_sweeps(graph, sweeps, log_sums), keep, executor)
