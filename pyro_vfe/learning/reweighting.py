r"""Importance weights, per datum, and what model and guide learn from weighted draws.

    w_k(n)  =  sum_v P(v, x_k, u_n)  /  sum_v Q(v, x_k | u_n),        W_k(n)  =  w_k(n) / sum_j w_j(n)
    model      - sum_n sum_k W_k(n) log sum_v P(v, x_k, u_n)
    guide      - sum_n sum_k W_k(n) E_{P(v | x_k, u_n)} [ log Q(v, x_k | u_n) ]

x are the draws, v what is enumerated: summed inside each draw. What a datum is, `program.data` says; what belongs to
none has no weight. In a weighted plate (a subsample) the weights are of the unweighted probabilities, and the losses
are weighted.

References:
    Bornschein and Bengio (2015), Reweighted wake-sleep.
    Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_vfe.energy.log_weights import (
    check_constant,
    log_weight,
    outside_of,
    over_plates,
    unlike_weights,
    weighed_data,
    weight_of,
    without_draws,
)
from pyro_vfe.energy.parts import log_q
from pyro_vfe.energy.pointwise import Plates
from pyro_vfe.energy.weight_means import log_mean_exp
from pyro_vfe.engine.factors import Factor, FactorGraph, Scale, Subsample, Table
from pyro_vfe.engine.inference import log_normalizer_and_expected_tables
from pyro_vfe.errors import ScaleError, StructureError
from pyro_vfe.learning.e_phases import model_keys
from pyro_vfe.learning.held_weights import check_weights, latents_of, with_weights_in_tables
from pyro_vfe.learning.machine import check_finite
from pyro_vfe.program.data import Reads, data_of, parts_of
from pyro_vfe.program.drawing_runs import log_prob_of
from pyro_vfe.program.enumeration import Enumeration, SiteKey, is_random
from pyro_vfe.program.recorder import Role, Site


@dataclass(frozen=True, eq=False)
class Losses:
    """What a reweighted wake phase descends, in nats."""

    model: Tensor
    """A scalar whose gradient in the model's parameters is that of the estimate of -log p(u)."""
    guide: Tensor
    """The weighted mean of -log Q, a scalar."""
    surprise: float
    """The estimate of -log p(u) itself; exact where nothing was drawn."""


def drawn_losses(runs: Sequence[tuple[Collection[Site], Collection[Site]]], reads: Reads) -> Losses:
    """Returns the losses of ordinary runs, weighed against each other.

    Args:
        runs: The sites of the guide and those of the model, for each draw.
        reads: What the log-probability of each site depends on.

    Raises:
        ScaleError: The latents of one datum differ in their weights, or lie above a subsample.
        NotFiniteError: A datum has probability zero in every draw.
    """
    sites = [{(s.role, s.name): s for own in run for s in own if s.kind != "unread"} for run in runs]
    _check_subsamples(sites[0].values())
    drawn = [site for (role, _), site in sites[0].items() if role == "guide" and site.kind != "observed"]
    check_weights([site for (role, _), site in sites[0].items() if role == "model"], latents_of(drawn))
    data = [data_of(own, reads) for own in sites]
    log_p, log_q = _log_probs(sites, [own.outside for own in data], ())
    check_constant((log_p - log_q).detach())
    model, guide, surprise = -log_p.mean(), -log_q.mean(), (log_q - log_p).detach().mean()
    for plates, parts in parts_of(data):
        log_p, log_q = _log_probs(sites, parts, plates)
        latents = [sites[0][key] for key in parts[0] if key[0] == "guide" and sites[0][key].kind != "observed"]
        scale = _common_scale(latents, plates)
        with torch.no_grad():
            weights, bound = _weighed((log_p - log_q) / scale, scale)
            surprise = surprise - bound
        model, guide = (
            loss - torch.where(weights > 0, weights * own, 0.0).sum() for loss, own in ((model, log_p), (guide, log_q))
        )
    check_finite(surprise, [site for own in sites for site in own.values()])
    return Losses(model, guide, surprise.item())


def _weighed(log_weights: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The normalised weights of draws, `(K, *plates)`, and the bound on log p(u) that they make, a scalar in nats."""
    return log_weights.softmax(0), (scale * log_mean_exp(log_weights)).sum()


def _log_probs(
    sites: Sequence[Mapping[SiteKey, Site]], keys: Sequence[Collection[SiteKey]], plates: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """log P and log Q of some sites of each run, weighted, shape `(K, *plates)`."""
    both = list(zip(sites, keys, strict=True))

    def of(role: Role) -> Tensor:
        own = ([run[key] for key in run if key in part and key[0] == role] for run, part in both)
        return torch.stack([_by_datum(some, plates) for some in own])

    return of("model"), of("guide")


def _check_subsamples(sites: Collection[Site]) -> None:
    """Draws that weigh a subsample as a whole would have the weights of its elements as powers inside of their mean."""
    around = frozenset[Subsample]().union(*(site.subsampled for site in sites))
    for latent in (site for site in sites if around and site.role == "guide" and is_random(site)):
        own = frozenset[Subsample]().union(*(site.subsampled for site in sites if site.name == latent.name))
        for plate, size, full_size in around - own:
            raise ScaleError(
                f"Latent '{latent.name}' is drawn above plate '{plate}', which shows {size} of its {full_size} "
                "elements: the log of the mean of such importance weights is biased.",
                hint=f"Use reweighted=False, or take all of '{plate}'.",
            )


def _by_datum(sites: Iterable[Site], plates: Sequence[str]) -> Tensor:
    """The weighted log-probabilities of each element of the plates, shape `(*plates)`."""
    return sum((_reduced(log_prob_of(site), site, plates) for site in sites), torch.zeros(()))


def _reduced(values: Tensor, site: Site, plates: Sequence[str]) -> Tensor:
    """The sum over all batch dims but those of the plates, which come in the order of their names."""
    dims = {plate.name: plate.dim for plate in site.plates}
    missing = max((-dims[name] for name in plates), default=0) - values.dim()
    if missing > 0:
        values = values.reshape((1,) * missing + tuple(values.shape))
    kept = [values.dim() + dims[name] for name in plates]
    others = [dim for dim in range(values.dim()) if dim not in kept]
    if not values.dim():
        return values
    values = values.permute(*kept, *others)
    return values.flatten(len(kept)).sum(-1) if others else values


def _common_scale(latents: Sequence[Site], plates: Sequence[str]) -> Tensor:
    """The weight of each datum's latents: a number, or one per element of the plates."""
    found = torch.ones(())
    for position, site in enumerate(latents):
        scale = torch.as_tensor(site.scale)
        if scale.dim():
            whole = scale.expand(log_prob_of(site).shape)
            scale = _reduced(whole, site, plates) / _reduced(torch.ones_like(whole), site, plates)
        if position and not torch.allclose(scale, found):
            raise unlike_weights(latents[0].name, site.name)
        found = scale
    return found


def enumerated_losses(runs: Sequence[Enumeration], max_bytes: float | None = None) -> Losses:
    """Returns the losses of enumerated runs, weighed against each other where there are several.

    Args:
        runs: One for each draw of what is drawn.
        max_bytes: The most memory that tables may take.

    Raises:
        ImpossibleDataError: The data have probability zero.
        ScaleError: The latents of one datum differ in their weights, or lie above a subsample.
        StructureError: The guide has latents of its own in plates that would have to be written out.
    """
    runs = [with_weights_in_tables(run) for run in runs]
    if len(runs) == 1:
        model, guide, log_evidence = _expected(runs[0], None, max_bytes)
        return Losses(model, guide, -log_evidence.item())
    _check_subsamples(runs[0].sites.values())
    data = [weighed_data(run, run.supports.keys()) for run in runs]
    with torch.no_grad():
        outside = torch.cat([outside_of(run, own, max_bytes) for run, own in zip(runs, data, strict=True)])
        check_constant(outside)
    surprise, weighed = -outside.mean(), list[tuple[Plates, Sequence[frozenset[SiteKey]], Tensor]]()
    if data[0].outside:
        weighed.append(((), [own.outside for own in data], torch.full_like(outside, 1 / len(runs))))
    for plates, parts in parts_of(data):
        with torch.no_grad():
            weights, bound = _weights(runs, parts, plates, max_bytes)
        surprise = surprise - bound
        weighed.append((plates, parts, weights))
    losses = [
        _expected(run.restricted(part), Table(weight, plates), max_bytes)
        for plates, parts, weights in weighed
        for run, part, weight in zip(runs, parts, weights, strict=True)
    ]
    return Losses(
        torch.stack([own[0] for own in losses]).sum(), torch.stack([own[1] for own in losses]).sum(), surprise.item()
    )


def _weights(
    runs: Sequence[Enumeration], parts: Sequence[frozenset[SiteKey]], plates: Plates, max_bytes: float | None
) -> tuple[Tensor, Tensor]:
    """What `_weighed` says of some sites of enumerated runs."""
    first = runs[0]
    latents = [key for key in parts[0] if first.sites[key].kind in ("enumerated", "sampled")]
    weight = weight_of(first, latents, plates)
    own = [log_weight(without_draws(r), part, plates, weight, max_bytes) for r, part in zip(runs, parts, strict=True)]
    log_weights = torch.cat(own)
    return _weighed(log_weights, over_plates(weight, plates, first).to(log_weights))


def _expected(run: Enumeration, weight: Table | None, max_bytes: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """-E log P and -E log Q under the model's exact posterior given the draws, and the log normaliser.

    The expectations' gradients are those of -log p(u, x) and of -E log Q: the posterior is held.
    """
    model = tuple(run.factors[key] for key in model_keys(run))
    guide = _guide_factors(run, max_bytes)
    probes = tuple(factor.mapped(lambda table: Table(torch.zeros_like(table.values), table.axes)) for factor in guide)
    graph = _weighted(run.graph(*model, *probes), weight)
    log_evidence, tables = log_normalizer_and_expected_tables(graph, max_bytes=max_bytes)
    left = iter(tables)
    losses = [
        -sum((_dot(next(left), table.values) for factor in own for table in factor.tables), torch.zeros(()))
        for own in (model, guide)
    ]
    return losses[0], losses[1], log_evidence


def _guide_factors(run: Enumeration, max_bytes: float | None) -> tuple[Factor, ...]:
    """log Q over the latents that both programs have, those of the guide alone summed out."""
    parts = log_q(run, max_bytes)
    if parts.graph.variables.keys() - run.variables.keys():
        raise StructureError(
            "The guide has latents of its own that tie the elements of a plate together: what it learns in a "
            "reweighted wake phase cannot be summed here.",
            hint="Use reweighted=False, or let the guide sample what the model does.",
        )
    return parts.costs


def _dot(weight: Tensor, values: Tensor) -> Tensor:
    """The sum of products, with 0 * -inf = 0."""
    values = values.to(weight.dtype)
    if bool(values.detach().isfinite().all()):
        return (weight * values).sum()
    return torch.where(weight > 0, weight * values, 0.0).sum()


def _weighted(graph: FactorGraph, weight: Table | None) -> FactorGraph:
    """The graph in which each datum counts as often as its weight says."""
    if weight is None:
        return graph
    factors = tuple(replace(factor, scale=_product(factor.scale, weight)) for factor in graph.factors)
    variables = {name: replace(own, scale=_product(own.scale, weight)) for name, own in graph.variables.items()}
    return replace(graph, factors=factors, variables=variables)


def _product(scale: Scale, weight: Table) -> Scale:
    if not weight.axes and not isinstance(scale, Table):
        return float(weight.values) * scale
    own = scale if isinstance(scale, Table) else Table(torch.tensor(scale), ())
    axes = tuple(dict.fromkeys((*own.axes, *weight.axes)))
    return Table(own.aligned(axes) * weight.aligned(axes), axes)
