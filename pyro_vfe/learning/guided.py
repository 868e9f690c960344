r"""Q as a guide says it, for the M-phase.

    weights  =  d E_Q[ log P(v, u) ] / d log tables of P

Latents that only the model has are summed inside it: to the M-phase they are part of Q, at their posterior given what
the guide provides.
"""

import torch
from torch import Tensor

from pyro_vfe.energy.impossible import culprits, impossible_data
from pyro_vfe.energy.parts import joint_graph, log_joint, log_q
from pyro_vfe.engine.inference import evidence
from pyro_vfe.errors import CostError, NotFiniteError, ScaleError
from pyro_vfe.learning.belief import Belief, Weights, expected_log_joint
from pyro_vfe.learning.e_phases import leaf, log_q_of_draws, model_keys
from pyro_vfe.program.enumeration import Enumeration


def guided_belief(enumeration: Enumeration, max_bytes: float | None = None) -> Belief:
    """Returns Q as the guide has it; the surprise is nan where it cannot be summed exactly.

    Args:
        enumeration: The factors of both programs, in float64.
        max_bytes: The most memory that intermediate tables may take.

    Raises:
        ImpossibleDataError: The data have probability zero under the model.
        NotFiniteError: The guide gives mass to what the model forbids.
        CostError: The latents that only the model has cannot be summed out.

    References:
        Neal and Hinton (1998), A view of the EM algorithm that justifies incremental, sparse, and other variants.
    """
    surprise = surprise_of(enumeration, max_bytes)
    expected, weights = _expected_log_joint_and_weights(enumeration, max_bytes)
    with torch.no_grad():
        free_energy = log_q(enumeration, max_bytes).expectation().total - expected
        if not bool(free_energy.isfinite()):
            raise NotFiniteError(
                f"F is {float(free_energy):g}: {'; '.join(map(str, culprits(enumeration)))}.",
                hint="Give the guide the same zeros as the model.",
            )
        expected_log_q = free_energy + expected_log_joint(weights, enumeration)
    return Belief(
        weights=weights,
        expected_log_q=expected_log_q.detach(),
        surprise=surprise,
        free_energy=free_energy.detach(),
    )


def surprise_of(enumeration: Enumeration, max_bytes: float | None = None) -> Tensor:
    """-log p(u | G), a scalar in nats; nan where the model is too large to be summed exactly, or weights forbid it.

    Args:
        enumeration: The factors of both programs.
        max_bytes: The most memory that intermediate tables may take.

    Raises:
        ImpossibleDataError: The data have probability zero under the model.
    """
    drawn = log_q_of_draws(enumeration, max_bytes)
    try:
        log_evidence = evidence(joint_graph(enumeration), max_bytes=max_bytes)
    except (CostError, ScaleError):
        return torch.full_like(drawn, torch.nan)
    if bool(log_evidence.isneginf()):
        raise impossible_data(enumeration)
    return drawn - log_evidence


def _expected_log_joint_and_weights(enumeration: Enumeration, max_bytes: float | None) -> tuple[Tensor, Weights]:
    keys = model_keys(enumeration)
    with torch.enable_grad():
        factors = {key: enumeration.factors[key].mapped(leaf) for key in keys}
        known = enumeration.with_factors({**enumeration.factors, **factors}, enumeration.variables)
        total = log_joint(known, max_bytes).expectation().total
        leaves = [table.values for key in keys for table in factors[key].tables]
        found = torch.autograd.grad(total, leaves, materialize_grads=True)
    left = iter(found)
    return total.detach(), {key: tuple(next(left) for _ in factors[key].tables) for key in keys}
