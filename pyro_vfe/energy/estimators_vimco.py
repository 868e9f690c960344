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
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyro_vfe.energy.parts import Parts, conditionals_of, free_energy_parts
from pyro_vfe.energy.weight_means import log_mean_exp, means_without_each
from pyro_vfe.engine.factors import Factor, Scale, Table
from pyro_vfe.engine.logspace import times
from pyro_vfe.engine.scales import of_other_scale
from pyro_vfe.errors import CostError, PlateError, ScaleError
from pyro_vfe.program.enumeration import PARTICLES, Enumeration, is_random

Plates = frozenset[str]


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
    plates, inside, outside = _by_datum(plain, side_by_side, max_bytes)
    weight = _weight(runs[0], plates)
    log_weights = -inside
    bound = log_mean_exp(log_weights)
    loss = outside - _weighted(bound, weight, plates).sum()
    if torch.is_grad_enabled() and runs[0].draws and bool(loss.isfinite()):
        signals = bound.detach() - _without_own(log_weights.detach())
        loss = loss - (_weighted(signals, weight, plates) * _scores(runs, plates, side_by_side)).sum()
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


def _by_datum(runs: Sequence[Enumeration], side_by_side: int, max_bytes: float | None) -> tuple[Plates, Tensor, Tensor]:
    """The plates of data, F of each particle and datum, shape `(K, *plates)`, and what belongs to no datum."""
    for plates in _candidates(runs[0]):
        if plates and _others_tell_particles_apart(runs, plates):
            continue
        own = [_without_scale(run, plates) for run in runs]
        try:
            return plates, *_measured(own, plates, side_by_side, max_bytes)
        except PlateError:
            if not plates:
                raise
    raise AssertionError("the whole is one datum")


def _candidates(run: Enumeration) -> Iterator[Plates]:
    """Sets of plates whose elements may be data, those with most elements first: no draw lies outside of them."""
    random = [site.plate_names for site in run.sites.values() if site.role == "guide" and is_random(site)]
    random += [run.variables[name].plates for name in run.draws]
    chains = {variable.chain for variable in run.variables.values()}
    shared = run.plates_of_data[0].intersection(*random) - chains
    yield from (frozenset(own) for own in (*run.plate_sets(shared), ()))


def _others_tell_particles_apart(runs: Sequence[Enumeration], plates: Plates) -> bool:
    """Whether what lies outside of the data depends on their draws: then they are not independent."""
    for key, factor in runs[0].factors.items():
        if not plates <= factor.plates:
            for table, *more in zip(*(run.factors[key].tables for run in runs), strict=True):
                if any(not torch.equal(table.values, other.values) for other in more) or _varies(table):
                    return True
    return False


def _varies(table: Table) -> bool:
    if PARTICLES not in table.axes:
        return False
    dim = table.axes.index(PARTICLES)
    return bool((table.values != table.values.narrow(dim, 0, 1)).any())


def _measured(
    runs: Sequence[Enumeration], plates: Plates, side_by_side: int, max_bytes: float | None
) -> tuple[Tensor, Tensor]:
    keep = plates | {PARTICLES} if side_by_side > 1 else plates
    found = [_measured_once(_whole_parts(run, max_bytes, keep), keep, plates) for run in runs]
    inside = torch.cat([own for own, _ in found]) if side_by_side > 1 else torch.stack([own for own, _ in found])
    outside = torch.stack([other for _, other in found]).sum() / len(inside)
    return inside, outside


def _whole_parts(run: Enumeration, max_bytes: float | None, keep: Plates) -> list[Parts]:
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


def _measured_once(parts: Sequence[Parts], keep: Plates, plates: Plates) -> tuple[Tensor, Tensor]:
    """F of each element of the plates, the particles' first, and what lies outside of them."""
    axes = (*sorted(keep - plates), *sorted(plates))
    inside, outside = _expected(parts, keep, axes)
    infinite = inside.detach() == math.inf
    if keep and bool(infinite.any()):
        # A draw without weight has no gradient either; the infinities would make it NaN.
        cleared = [Parts(part.graph, part.conditionals, tuple(map(_cleared, part.costs))) for part in parts]
        inside = _expected(cleared, keep, axes)[0].masked_fill(infinite, math.inf)
    return (inside, outside) if keep else (inside + outside, torch.zeros_like(outside))


def _expected(parts: Sequence[Parts], keep: Plates, axes: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The expectations of all parts together; one without costs is a zero of no device in particular."""
    device = next(cost.table.values.device for part in parts for cost in part.costs)
    found = [part.expectation(keep) for part in parts]
    inside, outside = (
        torch.stack([values.to(device) for values in own]).sum(0)
        for own in zip(*((one.inside.aligned(axes), one.outside) for one in found), strict=True)
    )
    return inside, outside


def _cleared(cost: Factor) -> Factor:
    return cost.mapped(lambda table: Table(table.values.masked_fill(table.values.isinf(), 0.0), table.axes))


def _scores(runs: Sequence[Enumeration], plates: Plates, side_by_side: int) -> Tensor:
    """log q of all draws of each particle and datum, zero in value: it is there for its gradient."""
    axes = (PARTICLES, *sorted(plates))
    found = []
    for run in runs:
        own = [_summed(draw.table, axes) for draw in conditionals_of(run) if draw.name in run.draws]
        nothing = own[0].new_zeros([side_by_side, *(run.plates[plate] for plate in axes[1:])])
        found.append(sum(own, nothing))
    return torch.cat(found)


def _summed(table: Table, axes: Sequence[str]) -> Tensor:
    """The table summed over all other axes: each value of an enumerated latent has draws of its own."""
    gone = [dim for dim, axis in enumerate(table.axes) if axis not in axes]
    left = tuple(axis for axis in table.axes if axis in axes)
    return Table(table.values.sum(gone) if gone else table.values, left).aligned(axes)


def _members(run: Enumeration, plates: Plates) -> list[Factor]:
    return [factor for factor in run.factors.values() if plates <= factor.plates]


def _weight(run: Enumeration, plates: Plates) -> Scale:
    """How many times each datum counts.

    Raises:
        ScaleError: Its sites differ in that.
    """
    members = _members(run, plates)
    first = members[0]
    known = frozenset(first.scale.axes) if isinstance(first.scale, Table) else frozenset[str]()
    other = of_other_scale(members)
    if other is not None or not known <= plates:
        names = f"'{first.name}' and '{(other or first).name}'"
        what = "plate " + " and ".join(f"'{plate}'" for plate in sorted(plates)) if plates else "the data as a whole"
        raise ScaleError(
            f"The importance-weighted bound is for {what}, because the draws leave nothing smaller independent, and "
            f"its sites {names} carry different weights (a subsample or poutine.scale): inside the logarithm they "
            "would bound nothing.",
            hint='Use gradient="leave-one-out" or "disarm", give all sites one weight, or draw inside the plate that '
            "is subsampled.",
        )
    return first.scale


def _without_scale(run: Enumeration, plates: Plates) -> Enumeration:
    """The run with the data's own weights taken off: they multiply the bound from outside."""
    _weight(run, plates)
    factors = {key: replace(f, scale=1.0) if plates <= f.plates else f for key, f in run.factors.items()}
    variables = {name: replace(v, scale=1.0) if plates <= v.plates else v for name, v in run.variables.items()}
    return run.with_factors(factors, variables)


def _weighted(values: Tensor, weight: Scale, plates: Plates) -> Tensor:
    """Each datum's values as many times as it counts: a datum of weight 0 counts nothing, whatever it is."""
    if not isinstance(weight, Table):
        return values * weight if weight else torch.zeros_like(values)
    return times(values, weight.aligned(sorted(plates)))
