r"""The importance-weighted bound of many particles and its gradient: VIMCO.

    F_K  =  -E log 1/K sum_k exp(-F(w_k))            for each datum, w_1 ... w_K drawn from the guide

F(w) is the free energy given draws w, with the enumerated latents v summed under Q. So F_K is an upper bound on the
surprise, F_1 = F, and more particles make it tighter:

    exp(-F(w))  <=  sum_v Q(v|w) P(v, w, u) / (Q(v|w) q(w))  <=  p(w, u) / q(w)        Jensen, the log inside Q's sum
    F_K  >=  -log E exp(-F(w))  >=  -log p(u)                                          Jensen, the log outside

The score of particle k is weighted by what it adds to the bound: the log of the mean weight, less the same with the
log weight of k replaced by the mean of the others'.

References:
    Mnih and Rezende (2016), Variational inference for Monte Carlo objectives (VIMCO).
    Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders (the bound).
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyro_vfe.energy.log_weights import check_constant, weighed_data, weight_of
from pyro_vfe.energy.parts import Parts, conditionals_of, free_energy_parts
from pyro_vfe.energy.pointwise import Plates
from pyro_vfe.energy.weight_means import log_mean_exp, means_without_each
from pyro_vfe.engine.factors import Factor, Scale, Table
from pyro_vfe.engine.logspace import times
from pyro_vfe.errors import CostError
from pyro_vfe.program.data import parts_of
from pyro_vfe.program.enumeration import PARTICLES, Enumeration, SiteKey


def vimco_loss(runs: Sequence[Enumeration], side_by_side: int = 1, max_bytes: float | None = None) -> Tensor:
    """Returns an estimate of F_K, in nats, whose gradient is an unbiased estimate of F_K's.

    Args:
        runs: One enumeration per run of the programs.
        side_by_side: How many particles each run holds.
        max_bytes: The most memory that intermediate tables may take.

    Raises:
        ScaleError: The sites of one datum differ in weight.
    """
    # What is drawn gets its gradient below, all at once.
    plain = [replace(run, scores=dict.fromkeys(run.draws)) for run in runs]
    data = [weighed_data(run) for run in runs]
    outside = _free_energies(plain, [own.outside for own in data], (), side_by_side, max_bytes)
    check_constant(outside.detach())
    loss = outside.mean()
    for plates, parts in parts_of(data):
        weight = weight_of(runs[0], parts[0], plates)
        own = [_without_scale(run, part) for run, part in zip(plain, parts, strict=True)]
        log_weights = -_free_energies(own, parts, plates, side_by_side, max_bytes)
        bound = log_mean_exp(log_weights)
        loss = loss - _weighted(bound, weight, plates).sum()
        if torch.is_grad_enabled() and runs[0].draws and bool(loss.isfinite()):
            signals = bound.detach() - _without_own(log_weights.detach())
            loss = loss - (_weighted(signals, weight, plates) * _scores(runs, parts, plates, side_by_side)).sum()
    return loss


def _without_own(log_weights: Tensor) -> Tensor:
    """For each particle, the bound with its log weight replaced by the mean of the others': shape `(K, *plates)`."""
    finite = log_weights.isfinite()
    mean = means_without_each(log_weights.where(finite, 0.0))
    impossible = (~finite).sum(0) - (~finite).long() > 0
    mean = mean.masked_fill(impossible, -math.inf)
    nothing = torch.full_like(log_weights[:1], -math.inf)
    before = torch.cat([nothing, log_weights[:-1].logcumsumexp(0)])
    after = torch.cat([log_weights[1:].flip(0).logcumsumexp(0).flip(0), nothing])
    level = torch.stack([before, after, mean]).logsumexp(0) - math.log(len(log_weights))
    # Any number that does not depend on the particle serves, where the others have no weight at all.
    return level.masked_fill(level.isinf(), 0.0)


def _free_energies(
    runs: Sequence[Enumeration],
    keys: Sequence[frozenset[SiteKey]],
    plates: Plates,
    side_by_side: int,
    max_bytes: float | None,
) -> Tensor:
    """What some sites cost each particle and element of the plates, shape `(K, *plates)`."""
    if not keys[0]:
        return torch.zeros(len(runs) * side_by_side)
    keep = frozenset((*plates, PARTICLES) if side_by_side > 1 else plates)
    costs = [_whole_parts(run.costs_of(own), max_bytes, keep) for run, own in zip(runs, keys, strict=True)]
    found = [_measured(parts, keep, plates) for parts in costs]
    return torch.cat(found) if side_by_side > 1 else torch.stack(found)


def _whole_parts(run: Enumeration, max_bytes: float | None, keep: frozenset[str]) -> list[Parts]:
    """The parts of F, whose elements can be kept apart.

    Raises:
        CostError: The tables do not fit at once.
    """
    if run.portions is not None:
        raise CostError(
            f"The tables fit only in portions of plate '{run.portions.plate}', and the importance-weighted bound needs "
            "them whole.",
            hint='Use gradient="leave-one-out" or "disarm", subsample the plate, or raise max_bytes.',
        )
    return [part for part in free_energy_parts(run, max_bytes, keep) if isinstance(part, Parts)]


def _measured(parts: Sequence[Parts], keep: frozenset[str], plates: Plates) -> Tensor:
    """F of each element of the plates, the particles' first."""
    axes = (*sorted(keep.difference(plates)), *plates)
    found = _expected(parts, keep, axes)
    infinite = found.detach() == math.inf
    if keep and bool(infinite.any()):
        # A draw without weight has no gradient either; the infinities would make it NaN.
        cleared = [Parts(part.graph, part.conditionals, tuple(map(_cleared, part.costs))) for part in parts]
        found = _expected(cleared, keep, axes).masked_fill(infinite, math.inf)
    return found


def _expected(parts: Sequence[Parts], keep: frozenset[str], axes: Sequence[str]) -> Tensor:
    """The expectations of all parts together; one without costs is a zero of no device in particular."""
    device = next(cost.table.values.device for part in parts for cost in part.costs)
    found = [part.expectation(keep) for part in parts]
    return torch.stack([(one.inside.aligned(axes) if keep else one.outside).to(device) for one in found]).sum(0)


def _cleared(cost: Factor) -> Factor:
    return cost.mapped(lambda table: Table(table.values.masked_fill(table.values.isinf(), 0.0), table.axes))


def _scores(
    runs: Sequence[Enumeration], keys: Sequence[frozenset[SiteKey]], plates: Plates, side_by_side: int
) -> Tensor:
    """log q of all draws of each particle and datum, zero in value: it is there for its gradient."""
    axes = (PARTICLES, *plates)
    found = []
    for run, inside in zip(runs, keys, strict=True):
        drawn = [draw for draw in conditionals_of(run) if draw.name in run.draws and ("guide", draw.name) in inside]
        own = [_summed(draw.table, axes) for draw in drawn]
        nothing = torch.zeros([side_by_side, *(run.plates[plate] for plate in plates)])
        found.append(sum(own, nothing))
    return torch.cat(found)


def _summed(table: Table, axes: Sequence[str]) -> Tensor:
    """The table summed over all other axes: each value of an enumerated latent has draws of its own."""
    gone = [dim for dim, axis in enumerate(table.axes) if axis not in axes]
    left = tuple(axis for axis in table.axes if axis in axes)
    return Table(table.values.sum(gone) if gone else table.values, left).aligned(axes)


def _without_scale(run: Enumeration, keys: frozenset[SiteKey]) -> Enumeration:
    """The run with the weights of some sites taken off: they multiply the bound from outside."""
    names = {name for _, name in keys}
    factors = {key: replace(factor, scale=1.0) if key in keys else factor for key, factor in run.factors.items()}
    variables = {name: replace(own, scale=1.0) if name in names else own for name, own in run.variables.items()}
    return run.with_factors(factors, variables)


def _weighted(values: Tensor, weight: Scale, plates: Plates) -> Tensor:
    """Each datum's values as many times as it counts: a datum of weight 0 counts nothing, whatever it is."""
    if not isinstance(weight, Table):
        return values * weight if weight else torch.zeros_like(values)
    return times(values, weight.aligned(plates))
