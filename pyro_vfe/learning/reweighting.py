r"""Importance weights, per datum, and what model and guide learn from weighted draws.

    w_k(n)  =  sum_v P(v, x_k, u_n)  /  sum_v Q(v, x_k | u_n),        W_k(n)  =  w_k(n) / sum_j w_j(n)
    model      - sum_n sum_k W_k(n) log sum_v P(v, x_k, u_n)
    guide      - sum_n sum_k W_k(n) E_{P(v | x_k, u_n)} [ log Q(v, x_k | u_n) ]

x are the draws, v what is enumerated: summed inside each draw. Data are the elements of those plates that are around
all sites of both programs; a latent outside of all plates makes the whole data set one datum. In a weighted plate
(a subsample) the weights are of the unweighted probabilities, and the losses are weighted.

References:
    Bornschein and Bengio (2015), Reweighted wake-sleep.
    Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_vfe.energy.parts import guide_graph, joint_graph, log_q
from pyro_vfe.energy.weight_means import log_mean_exp
from pyro_vfe.engine.elimination import log_normalizer
from pyro_vfe.engine.factors import Factor, FactorGraph, Scale, Table
from pyro_vfe.engine.inference import log_normalizer_and_expected_tables
from pyro_vfe.engine.scales import of_other_scale
from pyro_vfe.errors import ScaleError, StructureError
from pyro_vfe.learning.e_phases import model_keys
from pyro_vfe.learning.held_weights import check_weights, latents_of, with_weights_in_tables
from pyro_vfe.learning.machine import check_finite
from pyro_vfe.program.drawing_runs import log_prob_of
from pyro_vfe.program.enumeration import Enumeration
from pyro_vfe.program.recorder import Site


@dataclass(frozen=True, eq=False)
class Losses:
    """What a reweighted wake phase descends, in nats."""

    model: Tensor
    """A scalar whose gradient in the model's parameters is that of the estimate of -log p(u)."""
    guide: Tensor
    """The weighted mean of -log Q, a scalar."""
    surprise: float
    """The estimate of -log p(u) itself; exact where nothing was drawn."""


def drawn_losses(runs: Sequence[tuple[Collection[Site], Collection[Site]]]) -> Losses:
    """Returns the losses of ordinary runs, weighed against each other.

    Args:
        runs: The sites of the guide and those of the model, for each draw.

    Raises:
        ScaleError: The latents of one datum differ in their weights.
        NotFiniteError: A datum has probability zero in every draw.
    """
    guides = [[site for site in guide if site.kind != "unread"] for guide, _ in runs]
    models = [[site for site in model if site.kind != "unread"] for _, model in runs]
    plates = _plates_around_all([*guides[0], *models[0]])
    log_q, log_p = (torch.stack([_by_datum(sites, plates) for sites in own]) for own in (guides, models))
    latents = [site for site in guides[0] if site.kind != "observed"]
    check_weights(models[0], latents_of(latents))
    scale = _common_scale_of_sites(latents, plates)
    with torch.no_grad():
        log_weights = (log_p - log_q) / scale
        surprise = -(scale * log_mean_exp(log_weights)).sum()
        check_finite(surprise, [site for sites in (*models, *guides) for site in sites])
        weights = log_weights.softmax(0)
    model, guide = (-torch.where(weights > 0, weights * own, 0.0).sum() for own in (log_p, log_q))
    return Losses(model, guide, surprise.item())


def _plates_around_all(sites: Iterable[Site]) -> tuple[str, ...]:
    """The plates that are around every site, by name: nothing outside of them ties their elements together."""
    around = [site.plate_names for site in sites]
    return tuple(sorted(frozenset.intersection(*around))) if around else ()


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


def _common_scale_of_sites(latents: Sequence[Site], plates: Sequence[str]) -> Tensor:
    """The weight of each datum's latents: a number, or one per element of the plates."""
    found = torch.ones(())
    for position, site in enumerate(latents):
        scale = torch.as_tensor(site.scale)
        if scale.dim():
            whole = scale.expand(log_prob_of(site).shape)
            scale = _reduced(whole, site, plates) / _reduced(torch.ones_like(whole), site, plates)
        if position and not torch.allclose(scale, found):
            raise _other_weights(latents[0].name, site.name)
        found = scale
    return found


def _other_weights(one: str, other: str) -> ScaleError:
    return ScaleError(
        f"Latents '{one}' and '{other}' carry different weights (a subsample or poutine.scale): draws of both cannot "
        "be weighed together.",
        hint="Put both sites under one poutine.scale, or use reweighted=False.",
    )


def enumerated_losses(runs: Sequence[Enumeration], max_bytes: float | None = None) -> Losses:
    """Returns the losses of enumerated runs, weighed against each other where there are several.

    Args:
        runs: One for each draw of what is drawn.
        max_bytes: The most memory that tables may take.

    Raises:
        ImpossibleDataError: The data have probability zero.
        ScaleError: The latents of one datum differ in their weights.
        StructureError: The guide has latents of its own in plates that would have to be written out.
    """
    runs = [with_weights_in_tables(run) for run in runs]
    if len(runs) == 1:
        model, guide, log_evidence = _expected(runs[0], None, max_bytes)
        return Losses(model, guide, -log_evidence.item())
    weights, surprise = _weights(runs, max_bytes)
    parts = [_expected(run, weight, max_bytes) for run, weight in zip(runs, weights, strict=True)]
    return Losses(
        torch.stack([part[0] for part in parts]).sum(), torch.stack([part[1] for part in parts]).sum(), surprise
    )


def _weights(runs: Sequence[Enumeration], max_bytes: float | None) -> tuple[list[Table], float]:
    """The normalised weight of each run for each datum, and the estimate of -log p(u)."""
    plates = _plates_around_all(runs[0].sites.values())

    def by_datum(graph: FactorGraph) -> Tensor:
        found = log_normalizer(graph, keep_plates=frozenset(plates), max_bytes=max_bytes)
        return found.inside.aligned(plates) if plates else found.outside

    with torch.no_grad():
        scale = _common_scale_of_factors(runs[0], plates)
        ratios = [by_datum(joint_graph(run)) - by_datum(guide_graph(run)) for run in runs]
        log_weights = torch.stack(ratios) / scale
        surprise = -(scale * log_mean_exp(log_weights)).sum()
        weights = log_weights.softmax(0)
    return [Table(weight, plates) for weight in weights], surprise.item()


def _common_scale_of_factors(run: Enumeration, plates: Sequence[str]) -> Tensor:
    factors = (*run.guide_latents, *run.guide_draws, *run.model_latents)
    other = of_other_scale(factors)
    if other is not None:
        raise _other_weights(factors[0].name, other.name)
    scale = factors[0].scale if factors else 1.0
    return scale.aligned(plates) if isinstance(scale, Table) else torch.tensor(scale)


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
