r"""The marginal probabilities of single latents: under Q, under the exact posterior, and under the prior.

    Q(v_i | w)        P(v_i | w, u)        P(v_i | w)

Latents that only the model has are part of Q too, at their posterior given what the guide provides.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch

from pyro_vfe.energy.parts import guide_graph, joint_graph
from pyro_vfe.energy.responsibilities import responsibility_graph
from pyro_vfe.engine.factors import FactorGraph, Table
from pyro_vfe.engine.inference import marginals
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
    return _mean([single_marginals(joint_graph(run), _names(run), max_bytes) for run in runs])


def prior_marginals(run: Enumeration, max_bytes: float | None = None) -> Marginals:
    """Returns the probabilities of each latent's values before the data, given the run's draws.

    Args:
        run: An enumeration of the programs.
        max_bytes: The most memory that tables may take.
    """
    return single_marginals(run.graph(*run.model_latents, *run.model_draws), _names(run), max_bytes)


def single_marginals(graph: FactorGraph, names: Iterable[str], max_bytes: float | None = None) -> Marginals:
    """Returns the probabilities of some latents' values, each latent by itself, from one backward pass.

    Args:
        graph: Of the joint distribution.
        names: The latents.
        max_bytes: The most memory that tables may take.
    """
    tables = marginals(graph, [(name,) for name in names], max_bytes=max_bytes)
    return {name: table for (name,), table in tables.items()}


def _q_marginals(run: Enumeration, max_bytes: float | None) -> Marginals:
    own = [factor.name for factor in run.model_latents if factor.name not in run.guided]
    found = single_marginals(guide_graph(run), (f.name for f in run.guide_latents if f.name in run.guided), max_bytes)
    return {**found, **(single_marginals(responsibility_graph(run), own, max_bytes) if own else {})}


def _names(run: Enumeration) -> list[str]:
    return [factor.name for factor in run.model_latents]


def _mean(found: Sequence[Mapping[str, Table]]) -> Marginals:
    first = found[0]
    return {
        name: Table(torch.stack([one[name].aligned(table.axes) for one in found]).mean(0), table.axes)
        for name, table in first.items()
    }
