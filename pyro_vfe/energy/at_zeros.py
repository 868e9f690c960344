r"""The gradient of F in probabilities that are exactly zero: that of the sum in the linear domain.

    dF / d theta  =  - sum_v dP(v, u) / d theta  /  sum_v P(v, u)           where the model sums v out

In logs this is lost where P(v, u) = 0. So where a parameter moves a zero, F is taken once more with the zero filled
by what no sum can tell from it: the number is the same, and has the derivative.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyro_vfe.engine.factors import Factor, Table
from pyro_vfe.errors import NotFiniteError
from pyro_vfe.program.enumeration import Enumeration, SiteKey
from pyro_vfe.program.singular import leaves_of
from pyro_vfe.program.tables import Scorer
from pyro_vfe.program.zeros import filled_zeros, tiny

_SAME = 1e-6
"""How much of itself F may change where zeros are filled, in the precision of its tables at the least."""

_ROUNDING = 1e3
"""How many units of rounding a probability's derivative may have and still be none."""

Estimate = Callable[[Sequence[Sequence[Enumeration]]], Tensor]


def with_gradient_at_zeros(loss: Tensor, particles: Sequence[Sequence[Enumeration]], estimate: Estimate) -> Tensor:
    """Returns a loss with the gradient that it has in the linear domain.

    Args:
        loss: A scalar in nats, finite.
        particles: The runs that it was estimated from.
        estimate: Makes it of these.

    Raises:
        NotFiniteError: The derivative is infinite: the guide's, in an entry of its own that is zero and moves.
    """
    if not torch.is_grad_enabled() or not any(run.zeros or run.limits for own in particles for run in own):
        return loss
    filled = [[with_filled_zeros(run) for run in own] for own in particles]
    if all(a is b for one, other in zip(filled, particles, strict=True) for a, b in zip(one, other, strict=True)):
        return loss
    limit = estimate(filled)
    if not abs(float(limit.detach() - loss.detach())) <= _SAME * max(1.0, abs(float(loss.detach()))):
        raise NotFiniteError(
            "A value of probability zero would explain the data so much better than all others that the derivative of "
            "F in that probability is beyond all numbers.",
            hint="Give it a probability that is small instead of zero.",
        )
    return limit + (loss - limit).detach()


def with_filled_zeros(run: Enumeration) -> Enumeration:
    """Returns the run with those zeros filled that parameters move; itself where there are none.

    Args:
        run: With the graph to the parameters.

    Raises:
        NotFiniteError: They are the guide's.
    """
    if run.portions is not None:
        return replace(run, portions=run.portions.within(filled_zeros)) if run.zeros else run
    factors = {key: factor for key, factor in run.limits.items() if factor is not run.factors[key]}
    factors |= _moved_zeros(run) if run.zeros else {}
    return run.with_factors({**run.factors, **factors}, run.variables) if factors else run


def _moved_zeros(run: Enumeration) -> dict[SiteKey, Factor]:
    """The filled factors of sites with zeros that parameters move."""
    own = {key: factor for key, factor in run.factors.items() if key not in run.limits}
    keys = frozenset(key for key, factor in own.items() if any(map(_has_zeros, factor.tables)))
    with filled_zeros():
        factors = run.rescored(keys, Scorer())
    moved = {key: factor for key, factor in factors.items() if _moves(factor, run.factors[key], key[0])}
    for role, name in moved:
        if role == "guide":
            raise NotFiniteError(
                f"Site '{name}' of the guide has a probability that is exactly zero and moves with the parameters: the "
                "derivative of F in it is infinite, as that of q log q is.",
                hint="Give the value a positive probability, or hold it at zero whatever the parameters "
                "(torch.where(possible, q, 0.)).",
            )
    return moved


def _has_zeros(table: Table) -> bool:
    return table.values.requires_grad and bool(table.values.isneginf().any())


def _moves(filled: Factor, exact: Factor, role: str) -> bool:
    """Whether the parameters move entries that are impossible; what is not finite is not for them to say.

    The model's are filled wherever they may move, which changes no number; the guide's must move by more than rounding
    (p / p has a derivative of 1e-17), for they are refused.
    """
    pairs = [
        (own.values, table.values.isneginf().reshape(own.values.shape) & own.values.detach().isfinite())
        for own, table in zip(filled.tables, exact.tables, strict=True)
        if own.values.requires_grad
    ]
    tables, generator = [own for own, _ in pairs], torch.Generator().manual_seed(0)
    weights = [tiny(own.dtype) * torch.rand(own.shape, generator=generator).to(own) * zero for own, zero in pairs]
    found = torch.autograd.grad(tables, leaves_of(tables), weights, retain_graph=True, allow_unused=True)
    least = _ROUNDING * torch.finfo(tables[0].dtype).eps if role == "guide" and tables else 0.0
    return any(bool((gradient.abs() > least).any()) for gradient in found if gradient is not None)
