r"""Importance weights of draws from a guide, each datum by itself where the plates make the data independent.

    log w_n  =  log P(v_n, u_n)  -  log Q(v_n | u)              E_Q[ w_n ]  =  p(u_n)

Discrete latents that only the model has are summed out of P, those that only the guide has out of Q.

References:
    Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_vfe.energy.parts import normalized
from pyro_vfe.energy.pointwise import Plates
from pyro_vfe.engine.elimination import log_normalizer
from pyro_vfe.engine.factors import Factor, FactorGraph, Scale, Table
from pyro_vfe.engine.inference import holds_log_probabilities
from pyro_vfe.engine.scales import applied, of_other_scale
from pyro_vfe.errors import NotFiniteError, PlateError, ScaleError, StructureError
from pyro_vfe.program.enumeration import PARTICLES, Enumeration, SiteKey, is_random
from pyro_vfe.program.markov_chain import MarkovChain
from pyro_vfe.program.recorder import Role
from pyro_vfe.program.supports import unwrapped


@dataclass(frozen=True, eq=False)
class LogWeights:
    """The log weights of the particles of one run, in nats and float64."""

    by_datum: Tensor
    """Those of each datum, without the weight of its plate; `(particles, *plates)`."""

    outside: Tensor
    """log P - log Q of what belongs to no datum; `(particles,)`."""

    scale: Tensor
    """How often each datum counts: a subsample's elements stand for others; `(*plates)`."""


@dataclass(frozen=True, eq=False)
class _Data:
    """A run's factors, those of the data and the others."""

    run: Enumeration
    groups: tuple[frozenset[SiteKey], ...]
    """One group that the plates multiply, or one for each step of a sequential plate."""
    others: frozenset[SiteKey]
    plates: Plates
    """The vectorised plates around the groups."""


def log_weights(run: Enumeration, plates: Plates, max_bytes: float | None = None) -> LogWeights:
    """Returns the log weights of a run's particles.

    Args:
        run: Programs whose guide drew its latents.
        plates: What the data are elements of, as `independent_plates` finds them; with none everything is one datum.
        max_bytes: The most memory that tables may take.

    Raises:
        PlateError: Something outside of the plates ties their elements together.
        ScaleError: Sites of one datum have different weights.
        StructureError: The guide is not normalised.
        NotFiniteError: A log-probability is NaN.
    """
    _check_normalised(run)
    data = _split(normalized(without_draws(run), torch.float64), plates)
    _check_numbers(data.run)
    scales = [_scale(data, group) for group in data.groups]
    found = [_log_weight(data, group, data.plates, max_bytes) for group in data.groups]
    sequential = len(plates) == 1 and not data.plates
    return LogWeights(
        by_datum=torch.stack(found, -1) if sequential else found[0],
        outside=_log_weight(_weighted(data), data.others, (), max_bytes),
        scale=(torch.stack(scales) if sequential else scales[0]).to(found[0].device),
    )


def independent_plates(run: Enumeration, max_bytes: float | None = None) -> Plates:
    """Returns the plates whose elements are independent given the parameters: of those around all observed sites.

    Args:
        run: Programs whose guide drew its latents.
        max_bytes: The most memory that tables may take.
    """
    shared, in_steps = run.plates_of_data
    for plates in (*run.plate_sets(shared - _chain_plates(run)), *((plate,) for plate in sorted(in_steps))):
        try:
            data = _split(run, plates)
            _check_nothing_random(data)
            log_weights(run, plates, max_bytes)
        except (PlateError, ScaleError):
            continue
        return plates
    return ()


def without_draws(run: Enumeration) -> Enumeration:
    """Returns the enumeration without the axes and variables that stand for draws: they have one value each.

    Args:
        run: Programs whose guide drew its latents.
    """
    factors = {key: factor.mapped(lambda table: table.without(run.draws)) for key, factor in run.factors.items()}
    return run.with_factors(factors, {name: v for name, v in run.variables.items() if name not in run.draws})


def _split(run: Enumeration, plates: Plates) -> _Data:
    if not plates:
        return _Data(run, (frozenset(run.factors),), frozenset(), ())
    if plates[0] in run.plates:
        inside = frozenset(key for key, factor in run.factors.items() if factor.plates.issuperset(plates))
        groups: tuple[frozenset[SiteKey], ...] = (inside,)
        around = plates
    else:
        groups, around = tuple(frozenset(step.factors) for step in run.steps(plates[0])), ()
    data = _Data(run, groups, frozenset(run.factors).difference(*groups), around)
    _check_apart(data)
    return data


def _check_apart(data: _Data) -> None:
    """Raises where a discrete latent is read in two groups, or in one and outside of all."""
    home: dict[str, int] = {}
    for number, group in enumerate((*data.groups, data.others)):
        for key in group:
            for axis in _read(data.run, data.run.factors[key]):
                if home.setdefault(axis, number) != number:
                    raise PlateError(f"Latent '{axis}' ties elements of a plate together.", hint="")


def _read(run: Enumeration, factor: Factor) -> Iterable[str]:
    """The latents that a factor reads, those with a draw among them."""
    scope = FactorGraph((), run.variables, run.plates).scope(factor)
    return (name for name in (*scope, *factor.axes) if name in run.variables)


def _check_nothing_random(data: _Data) -> None:
    for key in data.others:
        # Whether a latent of the model is random is for the guide to say.
        site = data.run.sites.get(("guide", key[1]), data.run.sites[key])
        read = [name for name in data.run.factors[key].axes if name in data.run.draws]
        if is_random(site) or any(is_random(data.run.sites["guide", name]) for name in read):
            raise PlateError(f"Site '{site.name}' is drawn outside of a plate of the data, or reads draws.", hint="")


def _chain_plates(run: Enumeration) -> frozenset[str]:
    """The plates along which a latent is a chain, drawn or not: their elements depend on each other."""
    chains = (
        site
        for site in run.sites.values()
        if site.kind in ("sampled", "enumerated") and isinstance(unwrapped(site.fn), MarkovChain)
    )
    return frozenset(plate.name for site in chains for plate in site.plates if plate.dim == -1)


def _scale(data: _Data, keys: Collection[SiteKey]) -> Tensor:
    """The one weight of all sites of a group, over the plates."""
    factors = [data.run.factors[key] for key in keys]
    other = of_other_scale(factors)
    if other is not None:
        raise ScaleError(
            f"Sites '{factors[0].name}' and '{other.name}' carry different weights (a subsample, or poutine.scale) "
            "and belong to one datum: the mean of their importance weights bounds nothing.",
            hint="Put all sites of a datum under one weight, with all drawn latents inside the subsampled plate; "
            "or call bounds without subsampling and scale.",
        )
    sizes = [data.run.plates[plate] for plate in data.plates]
    return _over(factors[0].scale if factors else 1.0, data.plates).expand(sizes)


def _over(scale: Scale, plates: Plates) -> Tensor:
    if not isinstance(scale, Table):
        return torch.tensor(scale, dtype=torch.float64)
    if not set(scale.axes) <= set(plates):
        raise ScaleError(
            f"The weights along the plates {scale.axes} differ inside of one datum: the mean of the importance "
            "weights bounds nothing.",
            hint="Call bounds without poutine.scale.",
        )
    return scale.aligned(plates).double()


def _weighted(data: _Data) -> _Data:
    """What is outside of the data, its weights made use of."""
    factors = {key: applied(factor) if key in data.others else factor for key, factor in data.run.factors.items()}
    return replace(data, run=data.run.with_factors(factors, data.run.variables))


def _log_weight(data: _Data, keys: Collection[SiteKey], plates: Plates, max_bytes: float | None) -> Tensor:
    """log P - log Q of some sites, shape `(particles, *plates)`; their weights are left out."""
    log_p, log_q = (_log_prob(data.run, keys, role, plates, max_bytes) for role in ("model", "guide"))
    return torch.where(log_p.isneginf(), log_p, log_p - log_q)


def _log_prob(
    run: Enumeration, keys: Collection[SiteKey], role: Role, plates: Plates, max_bytes: float | None
) -> Tensor:
    factors = [replace(run.factors[key], scale=1.0) for key in run.factors if key in keys and key[0] == role]
    axes = (*((PARTICLES,) if PARTICLES in run.plates else ()), *plates)
    sizes = [run.plates[axis] for axis in axes]
    if not factors:
        found = next(iter(run.factors.values())).table.values.new_zeros(sizes) if run.factors else torch.zeros(sizes)
    else:
        graph = run.graph(*factors)
        graph = replace(graph, variables={name: replace(v, scale=1.0) for name, v in graph.variables.items()})
        normaliser = log_normalizer(graph, keep_plates=frozenset(axes), max_bytes=max_bytes)
        found = normaliser.inside.aligned(axes) if axes else normaliser.outside
    return found if PARTICLES in axes else found.unsqueeze(0)


def _check_normalised(run: Enumeration) -> None:
    for (role, name), site in run.sites.items():
        if role == "guide" and site.kind == "observed" and bool((run.factors[role, name].table.values != 0).any()):
            raise StructureError(
                f"Site '{name}' of the guide weighs its draws by a factor: Q is then not normalised, and its "
                "importance weights bound nothing.",
                hint="Put the weight into the distribution of the latent itself.",
            )


def _check_numbers(run: Enumeration) -> None:
    names = [f"'{name}' of the {role}" for (role, name), f in run.factors.items() if not holds_log_probabilities(f)]
    if names:
        raise NotFiniteError(
            f"The log-probabilities of {', '.join(names[:5])} hold NaN or +inf.",
            hint="Look for a parameter that is NaN, or at the end of its range or outside of it.",
        )
