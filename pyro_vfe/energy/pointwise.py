r"""How probable each datum is, with the discrete latents summed out.

    log p(u_n | w)  =  log sum_v P(v, w_n, u_n)  -  log sum_v P(v, w_n)

Given a drawn v, log P(u_n | v_n) would say how well one guess of the latents predicts: it is another number, tens of
nats away, and of no use for comparing models.

References:
    Merkle, Furr and Rabe-Hesketh (2019), Bayesian comparison of latent variable models: conditional versus marginal
    likelihoods.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_vfe.energy.parts import joint_graph, prior_graph
from pyro_vfe.energy.portioned import normalizer_of
from pyro_vfe.energy.terms import Terms, measured, stacked_terms, together
from pyro_vfe.engine.elimination import LogNormalizer
from pyro_vfe.engine.factors import FactorGraph
from pyro_vfe.errors import PlateError, StructureError
from pyro_vfe.program.enumeration import Enumeration

Plates = tuple[str, ...]
"""Vectorised plates, sorted by name, or one sequential plate; with none, everything is one datum."""


def log_likelihood(run: Enumeration, plates: Plates, max_bytes: float | None = None) -> Tensor:
    """Returns log p(u_n | w) of each datum in nats, shape `(*plates)`.

    Args:
        run: Enumerated programs, in float64.
        plates: What the data are elements of.
        max_bytes: The most memory that tables may take.

    Raises:
        PlateError: A latent outside of the plates ties their elements together.
        CostError: The latents cannot be summed out.
    """
    if _is_sequential(run, plates):
        return torch.stack([log_likelihood(step, (), max_bytes) for step in run.steps(plates[0])])
    return _given_draws(_by(run, joint_graph, plates, max_bytes), run, plates, max_bytes)


def log_joint_and_likelihood(run: Enumeration, plates: Plates, max_bytes: float | None = None) -> tuple[Tensor, Tensor]:
    """Returns log p(w, u), a scalar in nats, and what `log_likelihood` does, from the same sums.

    Args:
        run: Enumerated programs, in float64.
        plates: What the data are elements of.
        max_bytes: The most memory that tables may take.

    Raises:
        PlateError: A latent outside of the plates ties their elements together.
        CostError: The latents cannot be summed out.
    """
    if _is_sequential(run, plates):
        return normalizer_of(run, joint_graph, max_bytes=max_bytes).total, log_likelihood(run, plates, max_bytes)
    joint = normalizer_of(run, joint_graph, keep_plates=frozenset(plates), max_bytes=max_bytes)
    return joint.total, _given_draws(_of_data(joint, plates), run, plates, max_bytes)


def terms_in_all_and_by(run: Enumeration, plates: Plates, max_bytes: float | None = None) -> tuple[Terms, Terms | None]:
    """Returns the terms of F, and those of each element of some plates, from the same sums where that can be.

    Args:
        run: Enumerated programs, in float64.
        plates: What to keep apart.
        max_bytes: The most memory that tables may take.

    Raises:
        StructureError: F has no decomposition here.
    """
    try:
        if plates and not _is_sequential(run, plates):
            inside, outside = measured(run, keep_plates=frozenset(plates), max_bytes=max_bytes)
            return together(inside, outside), inside
    except (PlateError, StructureError):
        pass  # F may have its terms without having them by datum.
    whole = measured(run, max_bytes=max_bytes)[1]
    try:
        return whole, terms_by(run, plates, max_bytes) if plates else None
    except (PlateError, StructureError):
        return whole, None


def terms_by(run: Enumeration, plates: Plates, max_bytes: float | None = None) -> Terms:
    """Returns the terms of F of each element of some plates, shape `(*plates)`.

    Args:
        run: Enumerated programs, in float64.
        plates: What to keep apart.
        max_bytes: The most memory that tables may take.

    Raises:
        PlateError: A latent outside of the plates ties their elements together.
    """
    run.check_kept(plates)
    if _is_sequential(run, plates):
        return stacked_terms([measured(step, max_bytes=max_bytes)[1] for step in run.steps(plates[0])])
    inside, outside = measured(run, keep_plates=frozenset(plates), max_bytes=max_bytes)
    return inside if plates else outside


def _is_sequential(run: Enumeration, plates: Plates) -> bool:
    return len(plates) == 1 and plates[0] not in run.plates


def _given_draws(joint: Tensor, run: Enumeration, plates: Plates, max_bytes: float | None) -> Tensor:
    """log p(u | w) from log p(w, u), by data."""
    if not run.model_draws:
        return joint
    return joint - _by(run, prior_graph, plates, max_bytes)


def _by(
    run: Enumeration, graph_of: Callable[[Enumeration], FactorGraph], plates: Plates, max_bytes: float | None
) -> Tensor:
    return _of_data(normalizer_of(run, graph_of, keep_plates=frozenset(plates), max_bytes=max_bytes), plates)


def _of_data(found: LogNormalizer, plates: Plates) -> Tensor:
    return found.inside.values if plates else found.outside
