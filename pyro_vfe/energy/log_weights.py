r"""Importance weights of draws from a guide, each datum by itself where the plates make the data independent.

    log w_n  =  log P(v_n, u_n)  -  log Q(v_n | u)              E_Q[ w_n ]  =  p(u_n)

Discrete latents that only the model has are summed out of P, those that only the guide has out of Q.

References:
    Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_vfe.energy.parts import normalized
from pyro_vfe.energy.pointwise import Plates
from pyro_vfe.engine.elimination import log_normalizer
from pyro_vfe.engine.factors import Scale, Table
from pyro_vfe.engine.inference import holds_log_probabilities
from pyro_vfe.engine.scales import applied, of_other_scale, rescaled
from pyro_vfe.errors import NotFiniteError, ScaleError, SpotCheckError, StructureError
from pyro_vfe.program.data import Data, data_of
from pyro_vfe.program.enumeration import PARTICLES, Enumeration, SiteKey
from pyro_vfe.program.missing_data import way_out_of_nan
from pyro_vfe.program.recorder import Role

_TOLERANCE = 1e-6
"""By how much, of itself, what stands outside of the data may differ by rounding."""


@dataclass(frozen=True, eq=False)
class LogWeights:
    """The log weights of the particles of one run, in nats and float64."""

    by_datum: Tensor
    """Those of each datum, without the weight of its plate; `(particles, *plates)`, or `(particles, data)` where data
    are of several kinds, one kind after the other."""

    outside: Tensor
    """log P - log Q of what belongs to no datum; `(particles,)`."""

    scale: Tensor
    """How often each datum counts: a subsample's elements stand for others; `(*plates)` or `(data)`."""


def log_weights(run: Enumeration, data: Data, max_bytes: float | None = None) -> LogWeights:
    """Returns the log weights of a run's particles.

    Args:
        run: Programs whose guide drew its latents.
        data: What `weighed_data` says of the run.
        max_bytes: The most memory that tables may take.

    Raises:
        ScaleError: Sites of one datum have different weights.
        StructureError: The guide is not normalised.
        NotFiniteError: A log-probability is NaN.
    """
    _check_normalised(run)
    run = normalized(without_draws(run), torch.float64)
    _check_numbers(run)
    found, scales = [], []
    for kind in data.kinds:
        weights = [weight_of(run, part, kind.axes) for part in kind.parts]
        parts = zip(kind.parts, weights, strict=True)
        own = [log_weight(run, part, kind.axes, weight, max_bytes) for part, weight in parts]
        each = [over_plates(weight, kind.axes, run).to(own[0].device) for weight in weights]
        found.append(own[0] if kind.axes == kind.plates else torch.stack(own, -1))
        scales.append(each[0] if kind.axes == kind.plates else torch.stack(each))
    if len(data.kinds) > 1:
        found, scales = [own.reshape(len(own), -1) for own in found], [own.flatten() for own in scales]
    return LogWeights(
        by_datum=torch.cat(found, -1) if len(found) > 1 else found[0],
        outside=outside_of(run, data, max_bytes),
        scale=torch.cat(scales) if len(scales) > 1 else scales[0],
    )


def weighed_data(run: Enumeration, summed: Collection[str] | None = None) -> Data:
    """Returns what the data of a run are whose weights are independent of each other.

    Args:
        run: Of programs whose guide draws.
        summed: The latents that are summed inside of a weight; those that only one of the programs has by default, as
            the others are averaged over.
    """
    return data_of(run.sites, run.reads, run.supports.keys() - run.guided if summed is None else summed)


def outside_of(run: Enumeration, data: Data, max_bytes: float | None = None) -> Tensor:
    """Returns log P - log Q of what belongs to no datum in nats, `(particles,)`, weights made use of.

    Args:
        run: Programs whose guide draws.
        data: What its data are.
        max_bytes: The most memory that tables may take.
    """
    weighted = {key: applied(factor) if key in data.outside else factor for key, factor in run.factors.items()}
    return log_weight(run.with_factors(weighted, run.variables), data.outside, (), 1.0, max_bytes)


def check_constant(outside: Tensor) -> None:
    """Checks that what stands outside of the data is the same for all particles.

    Args:
        outside: `(particles,)`, in nats.

    Raises:
        SpotCheckError: It is not: it reads a draw unseen.
    """
    if not bool(torch.isclose(outside, outside[:1], rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True).all()):
        raise SpotCheckError(
            "Something outside of the plates of the data differs from draw to draw and is not seen to read one: what "
            "it computes with has left torch, through a compiled or vmapped function, say.",
            hint="Compute it by plain operations of torch.",
        )


def without_draws(run: Enumeration) -> Enumeration:
    """Returns the enumeration without the axes and variables that stand for draws: they have one value each.

    Args:
        run: Programs whose guide drew its latents.
    """
    if not run.draws:
        return run
    factors = {key: factor.mapped(lambda table: table.without(run.draws)) for key, factor in run.factors.items()}
    return run.with_factors(factors, {name: v for name, v in run.variables.items() if name not in run.draws})


def weight_of(run: Enumeration, keys: Collection[SiteKey], plates: Plates) -> Scale:
    """Returns the one weight of some sites of a datum.

    Args:
        run: Whose sites they are.
        keys: The sites.
        plates: What the data are elements of.

    Raises:
        ScaleError: They have different ones.
    """
    factors = [factor for key, factor in run.factors.items() if key in keys]
    other = of_other_scale(factors)
    if other is not None:
        raise unlike_weights(factors[0].name, other.name)
    scale = factors[0].scale if factors else 1.0
    if isinstance(scale, Table) and not set(scale.axes) <= set(plates):
        raise ScaleError(
            f"The weights along the plates {scale.axes} differ inside of one datum: the mean of the importance "
            "weights bounds nothing.",
            hint=_ONE_WEIGHT,
        )
    return scale


_ONE_WEIGHT = (
    "Put all sites of a datum under one weight, with all drawn latents inside the subsampled plate; or leave the "
    "subsampling and poutine.scale out."
)


def unlike_weights(one: str, other: str) -> ScaleError:
    """The error for two sites of one datum."""
    return ScaleError(
        f"Sites '{one}' and '{other}' carry different weights (a subsample, or poutine.scale) and belong to one datum: "
        "the mean of their importance weights bounds nothing.",
        hint=_ONE_WEIGHT,
    )


def over_plates(scale: Scale, plates: Plates, run: Enumeration) -> Tensor:
    """Returns a weight for each element of some plates, shape `(*plates)`."""
    values = scale.aligned(plates).double() if isinstance(scale, Table) else torch.tensor(scale, dtype=torch.float64)
    return values.expand([run.plates[plate] for plate in plates])


def log_weight(
    run: Enumeration, keys: Collection[SiteKey], plates: Plates, weight: Scale, max_bytes: float | None
) -> Tensor:
    """Returns log P - log Q of some sites in nats, shape `(particles, *plates)`.

    Args:
        run: Whose sites they are.
        keys: The sites.
        plates: Vectorised plates whose elements are kept apart.
        weight: What the sites count as, which is left out; a site with another weight has it relative to this one.
        max_bytes: The most memory that tables may take.
    """
    log_p, log_q = (_log_prob(run, keys, role, plates, weight, max_bytes) for role in ("model", "guide"))
    return torch.where(log_p.isneginf(), log_p, log_p - log_q)


def _log_prob(
    run: Enumeration,
    keys: Collection[SiteKey],
    role: Role,
    plates: Plates,
    weight: Scale,
    max_bytes: float | None,
) -> Tensor:
    own = [rescaled(run.factors[key], weight) for key in run.factors if key in keys and key[0] == role]
    factors = [replace(factor, scale=1.0) for factor in own]
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
            hint=way_out_of_nan(run.sites.values()),
        )
