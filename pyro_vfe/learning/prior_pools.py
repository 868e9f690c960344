r"""Conjugate priors as pools: what they add to the coefficients of the data.

    Dirichlet, Beta    a += alpha - 1                      Gamma     a += alpha - 1,  b += beta
    Normal             L += 1 / s^2,  about its mean   InverseGamma on a variance   c += 2 (alpha + 1),  M2 += 2 beta
    Normal with a scale that follows the variance, s^2 = variance / k:   c += 1,  w += k,  about its mean

References:
    Gelman et al. (2013), Bayesian data analysis, chapters 2 and 3.
    Murphy (2012), Machine learning: a probabilistic perspective, chapters 3 and 4.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_vfe.learning.moments import Evidence, Moments, evidence, summed_by
from pyro_vfe.learning.pools import Kind, ObjectiveForm, Pools
from pyro_vfe.learning.site_pools import blocks, parameters_of, precision_of, selects_rows
from pyro_vfe.program import families_forms as families
from pyro_vfe.program.statistics import PriorStatistics, Statistics

Numbers = Mapping[str, Tensor]

NAMES: tuple[tuple[families.Family, str], ...] = (
    (families.DIRICHLET, "Dirichlet"),
    (families.BETA, "Beta"),
    (families.GAMMA, "Gamma"),
    (families.EXPONENTIAL, "Exponential"),
    (families.INVERSE_GAMMA, "InverseGamma"),
    (families.NORMAL, "Normal"),
    (families.MULTIVARIATE_NORMAL, "MultivariateNormal"),
)
"""The families that are conjugate to something, and what they are called."""


def prior_pools(statistics: Statistics, values: Numbers, data: Pools) -> Pools:
    """The priors' part of statistics, pooled by parameter; add it to the pools of the data, once.

    Args:
        statistics: Expected statistics of a model's sites.
        values: The parameters' constrained values at which the statistics were made.
        data: The pools of the data, which say what a parameter is.
    """
    total = Pools()
    for prior in statistics.priors:
        total = total + _pools_of(prior, values, data)
    return total


def _pools_of(prior: PriorStatistics, values: Numbers, data: Pools) -> Pools:
    chosen = prior.value.selection
    read = frozenset[str]().union(*map(parameters_of, prior.slots.values()))
    if chosen is None or chosen.through != "itself":
        reason = f"the value of site '{prior.site}' is made of it otherwise than by selecting entries"
        return _refused(parameters_of(prior.value) | read, reason)
    name = chosen.parameter
    family = next((text for known, text in NAMES if known is prior.family), None)
    form = data.forms.get(name)
    own = None
    if family == "Normal" and len(read) == 1:
        own = _following_the_variance(prior, name, next(iter(read)), values, data)
    elif family is not None and not read:
        own = _conjugate(prior, family, name, form, values)
    if own is None:
        reason = f"its prior, site '{prior.site}', is not conjugate" + (f" to {form}" if form else "")
        return _refused({name}, reason) + _refused(read, f"the prior of '{name}', site '{prior.site}', reads it")
    return Pools(own.forms, own.coefficients, own.moments, own.evidence, own.partners, priors={name: family or ""})


def _refused(names: frozenset[str] | set[str], reason: str) -> Pools:
    return Pools(refusals=dict.fromkeys(names, reason))


def _conjugate(
    prior: PriorStatistics, family: str, name: str, form: ObjectiveForm | None, values: Numbers
) -> Pools | None:
    """The pools of a prior whose parameters are known; None where it is not conjugate to the form."""
    if family in ("Normal", "MultivariateNormal"):
        return _of_location(prior, name, form, values[name])
    if family == "InverseGamma":
        return _of_variance(prior, name) if form and form.given == "variance" else None
    kind: Kind = {"Dirichlet": "simplex", "Beta": "unit"}.get(family, "rate")  # type: ignore[assignment]
    given = "rate" if kind == "rate" else "probs"
    if form is not None and (form.kind, form.given) != (kind, given):
        return None
    return _of_counts(prior, name, ObjectiveForm(kind, given, _size(prior) if kind == "simplex" else 1), values[name])


def _size(prior: PriorStatistics) -> int:
    return prior.value.values.shape[-1]


def _of_counts(prior: PriorStatistics, name: str, form: ObjectiveForm, value: Tensor) -> Pools | None:
    assert prior.value.selection is not None
    index = prior.value.selection.index
    if form.kind == "simplex" and not selects_rows(index, form.size, value):
        return None
    weight = prior.weight.unsqueeze(-1) if form.kind == "simplex" else prior.weight
    parts = torch.stack([(weight * part).expand(index.shape) for part in _pseudo_counts(prior)])
    pooled = summed_by(index.flatten(), parts.reshape(len(parts), -1).mT, value.numel()).mT
    return Pools({name: form}, {name: pooled})


def _pseudo_counts(prior: PriorStatistics) -> tuple[Tensor, ...]:
    """What a prior adds to a, or to a and b."""
    slots = {name: slot.values.to(prior.weight) for name, slot in prior.slots.items()}
    if prior.family is families.DIRICHLET:
        return (slots["concentration"] - 1,)
    if prior.family is families.BETA:
        return slots["concentration1"] - 1, slots["concentration0"] - 1
    if prior.family is families.EXPONENTIAL:
        return torch.zeros_like(slots["rate"]), slots["rate"]
    return slots["concentration"] - 1, slots["rate"]


def _of_location(prior: PriorStatistics, name: str, form: ObjectiveForm | None, value: Tensor) -> Pools | None:
    """The pools of a normal prior of known covariance."""
    assert prior.value.selection is not None
    event_dim = prior.family.event_dim
    size = _size(prior) if event_dim else 1
    own = form or ObjectiveForm("location", "loc", size)
    index = prior.value.selection.index
    block = blocks(index, size, event_dim)
    if own.kind != "location" or block is None or (event_dim and own.size != size):
        return None
    spread = next(key for key in prior.slots if key != "loc")
    precision = precision_of(prior.slots[spread].values.to(prior.weight), spread)
    precision = (prior.weight[..., None, None] * precision).expand(*block.shape, size, size).reshape(-1, size, size)
    loc = prior.slots["loc"].values.to(prior.weight)
    loc = (loc if event_dim else loc.unsqueeze(-1)).expand(*block.shape, size).reshape(-1, size)
    said = evidence(block.flatten(), precision, torch.zeros_like(loc), loc, value.numel() // size)
    return Pools({name: own}, evidence={name: said if event_dim else _in_rows(said, own.size)})


def _in_rows(single: Evidence, size: int) -> Evidence:
    """What is known of single numbers, as what is known of vectors of them."""
    return Evidence(
        torch.diag_embed(single.precision.reshape(-1, size)),
        single.information.reshape(-1, size),
        single.centre.reshape(-1, size),
    )


def _of_variance(prior: PriorStatistics, name: str) -> Pools:
    """The pools of an inverse gamma prior of a variance."""
    assert prior.value.selection is not None
    index = prior.value.selection.index
    shape, rate = (prior.slots[key].values.to(prior.weight) for key in ("concentration", "rate"))
    count = (2 * prior.weight * (shape + 1)).expand(index.shape).flatten()
    square = (2 * prior.weight * rate).expand(index.shape).flatten()
    zero = torch.zeros_like(square)
    entries = index.flatten()
    own = Moments(
        location=torch.zeros_like(entries),
        spread=entries,
        count=count,
        weight=zero,
        first=zero[:, None],
        second=square[:, None, None],
        centre=zero[:, None],
        magnitude=square[:, None],
    )
    return Pools({name: ObjectiveForm("spread", "variance")}, moments={(None, name): own.pooled()})


def _following_the_variance(
    prior: PriorStatistics, name: str, spread: str, values: Numbers, data: Pools
) -> Pools | None:
    """The pools of a normal prior whose scale is sqrt(variance / k); None where it is not known which variance.

    That the scale goes with the root of the variance is taken for granted here: the gradient at the solution shows it.
    """
    form, spread_form = data.forms.get(name), data.forms.get(spread)
    scale = prior.slots["scale"]
    if (
        form != ObjectiveForm("location", "loc")
        or spread_form is None
        or spread_form.given not in ("scale", "variance")
    ):
        return None
    if spread not in parameters_of(scale) or parameters_of(prior.slots["loc"]):
        return None
    assert prior.value.selection is not None
    index = prior.value.selection.index
    location = index.flatten()
    entry = _spread_of(location, data, name, spread, values)
    if scale.selection is not None:  # the scale is that of the data: k = 1
        through = "sqrt" if spread_form.given == "variance" else "itself"
        entry = scale.selection.index.expand(index.shape).flatten() if scale.selection.through == through else None
    if entry is None:
        return None
    variance = values[spread].detach().to(prior.weight).flatten()[entry]
    if spread_form.given == "scale":
        variance = variance * variance
    follows = variance / scale.values.to(prior.weight).expand(index.shape).flatten() ** 2
    weight = prior.weight.expand(index.shape).flatten()
    centre = prior.slots["loc"].values.to(prior.weight).expand(index.shape).reshape(-1, 1)
    zero = torch.zeros_like(centre)
    own = Moments(location, entry, weight, weight * follows, zero, zero[:, :, None], centre, zero)
    forms = {name: form, spread: spread_form}
    return Pools(forms, moments={(name, spread): own.pooled()})


def _spread_of(location: Tensor, data: Pools, name: str, spread: str, values: Numbers) -> Tensor | None:
    """Which entry of a variance the data of each location have; None where they have several, or there are none."""
    if values[spread].numel() == 1:
        return torch.zeros_like(location)
    pairs = data.moments.get((name, spread))
    if pairs is None:
        return None
    times = torch.zeros(values[name].numel(), dtype=torch.int64, device=location.device)
    times.index_add_(0, pairs.location, torch.ones_like(pairs.location))
    entries = torch.zeros_like(times).index_copy(0, pairs.location, pairs.spread)
    return entries[location] if bool((times[location] == 1).all()) else None
