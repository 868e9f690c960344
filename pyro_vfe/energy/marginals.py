r"""The marginal probabilities of single latents, under Q and under the exact posterior, over the same runs.

    Q(v_i | w)        and        P(v_i | w, u)

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
    return _mean([_single(joint_graph(run), (f.name for f in run.model_latents), max_bytes) for run in runs])


def _q_marginals(run: Enumeration, max_bytes: float | None) -> Marginals:
    own = [factor.name for factor in run.model_latents if factor.name not in run.guided]
    found = _single(guide_graph(run), (f.name for f in run.guide_latents if f.name in run.guided), max_bytes)
    return {**found, **(_single(responsibility_graph(run), own, max_bytes) if own else {})}


def _single(graph: FactorGraph, names: Iterable[str], max_bytes: float | None) -> Marginals:
    tables = marginals(graph, [(name,) for name in names], max_bytes=max_bytes)
    return {name: table for (name,), table in tables.items()}


def _mean(found: Sequence[Mapping[str, Table]]) -> Marginals:
    first = found[0]
    return {
        name: Table(torch.stack([one[name].aligned(table.axes) for one in found]).mean(0), table.axes)
        for name, table in first.items()
    }
