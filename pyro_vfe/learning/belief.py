r"""What a phase of EM needs to know of Q.

    F(Q, G)  =  - sum_tables <weights, log P tables of G>  +  E_Q log Q

The weights are Q's probabilities of the entries of each table of the model, times the scale, summed over the plates
that the table lacks. With Q held, the first term alone changes with G.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vfe.program.enumeration import Enumeration, SiteKey

Weights = Mapping[SiteKey, tuple[Tensor, ...]]
"""For each site of the model, one tensor for each of its factor's tables (`Factor.tables`), of the table's shape."""


@dataclass(frozen=True, eq=False)
class Belief:
    """Q after an E-phase; all in float64, detached."""

    weights: Weights
    """Q's expected tables."""
    expected_log_q: Tensor
    """E_Q log Q in nats, a scalar, the draws' log q included: minus the entropy."""
    surprise: Tensor
    """-log p(u | G) in nats at the parameters of the E-phase, a scalar."""
    free_energy: Tensor
    """F(Q, G) in nats at the parameters of the E-phase, a scalar."""
    sampled: Weights | None = None
    """The weights that the M-phase learns from, where they are an estimate (samples) of those of Q."""

    @property
    def learned_from(self) -> Weights:
        """The weights that the M-phase learns from."""
        return self.sampled or self.weights


def expected_log_joint(weights: Weights, enumeration: Enumeration) -> Tensor:
    """E_Q log P(v, u) in nats, a scalar, from the tables of an enumeration; -inf only where Q has weight.

    A weight whose share of the whole the parameters cannot hold in their precision is none: what an M-phase learned
    from it has become 0, and 0 times -inf would be an infinity where F has moved by nothing.

    Args:
        weights: Q's expected tables.
        enumeration: A run of the model, of the structure that the weights have.
    """
    pairs = [
        (weight, table.values)
        for key, own in weights.items()
        for weight, table in zip(own, enumeration.factors[key].tables, strict=True)
    ]
    plain = torch.stack([_dot(weight, values) for weight, values in pairs]).sum()
    if bool(plain.detach().isfinite()):
        return plain
    # 0 * inf is 0 here.
    least = _least_share(enumeration)
    parts = [
        torch.where(weight.abs() > least * weight.abs().sum(), weight * values, 0.0).sum() for weight, values in pairs
    ]
    return torch.stack(parts).sum()


def _least_share(enumeration: Enumeration) -> float:
    """The smallest probability that every parameter can hold, in its precision."""
    dtypes = {value.dtype for value in enumeration.parameters.values() if value.is_floating_point()}
    return max((torch.finfo(dtype).tiny for dtype in dtypes), default=0.0)


def _dot(weight: Tensor, values: Tensor) -> Tensor:
    """The sum of products, read in the order in which the values lie in memory."""
    order = sorted(range(values.dim()), key=values.stride, reverse=True)
    return torch.dot(weight.permute(order).flatten(), values.permute(order).flatten())
