r"""The marginal probabilities of single latents: under Q, under the exact posterior, and under the prior.

    Q(v_i | w)        P(v_i | w, u)        P(v_i | w)

Where a latent is not always there they are those of its values and that it is there, and sum to less than one.
Latents that only the model has are part of Q too, at their posterior given what the guide provides.
"""

from collections.abc import Iterable, Mapping, Sequence

from pyro_vfe.energy.parts import guide_graph, joint_graph
from pyro_vfe.energy.presence import marginals_where_present
from pyro_vfe.energy.responsibilities import responsibility_graph
from pyro_vfe.engine.factors import FactorGraph, Table, total
from pyro_vfe.program.enumeration import Enumeration

Marginals = dict[str, Table]
"""Probabilities of each latent's values by site name: axes are its plates, sorted by name, and the latent itself."""


def q_marginals(runs: Sequence[Enumeration], max_bytes: float | None = None) -> Marginals:
    """Returns the probabilities of each latent's values under Q, averaged over runs, in the order of its support.

    Args:
        runs: Enumerations of the same programs at one draw each.
        max_bytes: The most memory that tables may take.

    Raises:
        StructureError: Latents that only the model has tie the elements of a plate of the guide's latents together.
    """
    return _mean([_q_marginals(run, max_bytes) for run in runs])


def posterior_marginals(runs: Sequence[Enumeration], max_bytes: float | None = None) -> Marginals:
    """Returns the probabilities of each latent's values under the exact posterior given the draws, averaged over runs.

    Args:
        runs: Enumerations of the same programs at one draw each.
        max_bytes: The most memory that tables may take.

    Raises:
        ImpossibleDataError: The data have probability zero.
    """
    return _mean([single_marginals(run, joint_graph(run), _names(run), max_bytes) for run in runs])


def prior_marginals(run: Enumeration, max_bytes: float | None = None) -> Marginals:
    """Returns the probabilities of each latent's values before the data, given the run's draws.

    Args:
        run: An enumeration of the programs.
        max_bytes: The most memory that tables may take.
    """
    return single_marginals(run, run.graph(*run.model_latents, *run.model_draws), _names(run), max_bytes)


def single_marginals(
    run: Enumeration, graph: FactorGraph, names: Iterable[str], max_bytes: float | None = None
) -> Marginals:
    """Returns the probabilities of some latents' values, each latent by itself, from one backward pass.

    Args:
        run: Which latents are not always there.
        graph: Of the joint distribution.
        names: The latents.
        max_bytes: The most memory that tables may take.
    """
    tables = marginals_where_present(run, graph, [(name,) for name in names], max_bytes)
    return {name: table for (name,), table in tables.items()}


def _q_marginals(run: Enumeration, max_bytes: float | None) -> Marginals:
    own = [factor.name for factor in run.model_latents if factor.name not in run.guided]
    guided = [factor.name for factor in run.guide_latents if factor.name in run.guided]
    found = single_marginals(run, guide_graph(run), guided, max_bytes)
    return {**found, **(single_marginals(run, responsibility_graph(run), own, max_bytes) if own else {})}


def _names(run: Enumeration) -> list[str]:
    return [factor.name for factor in run.model_latents]


def _mean(found: Sequence[Mapping[str, Table]]) -> Marginals:
    """The mean over runs; what a run lacks, in a branch that its draws did not take, is not there."""
    names = dict.fromkeys(name for one in found for name in one)
    sums = {name: total([one[name] for one in found if name in one]) for name in names}
    return {name: Table(table.values / len(found), table.axes) for name, table in sums.items()}
