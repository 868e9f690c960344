r"""The pools of a model's sites.

coefficient of theta[i]  =  sum over the entries n with index_n = i  of  what n's statistics say
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vfe.learning.moments import Moments, evidence, summed_by
from pyro_vfe.learning.pools import Kind, ObjectiveForm, Pools
from pyro_vfe.program import families_forms as families
from pyro_vfe.program.statistics import Selection, SiteStatistics, Slot, Statistics

Numbers = Mapping[str, Tensor]

NORMALS = (families.NORMAL, families.LOG_NORMAL, families.HALF_NORMAL, families.MULTIVARIATE_NORMAL)
"""The families whose parameters are locations and covariances."""


@dataclass(frozen=True)
class _Rule:
    """How a family's statistics are coefficients of one of its parameters."""

    kind: Kind
    slots: tuple[str, ...]
    """The names that the parameter goes by."""
    coefficients: Callable[[SiteStatistics, Numbers], tuple[Tensor, ...]]
    """a, or a and b, of the shape of the counts (and K for a simplex), given the values of the other slots."""


def _counts_of_categories(site: SiteStatistics, _: Numbers) -> tuple[Tensor, ...]:
    return (site.sums,)


def _ones_and_zeros(site: SiteStatistics, _: Numbers) -> tuple[Tensor, ...]:
    return site.sums[..., 0], (site.counts - site.sums[..., 0]).clamp(min=0)


def _successes_and_failures(site: SiteStatistics, _: Numbers) -> tuple[Tensor, ...]:
    return site.sums[..., 0], site.sums[..., 1]


def _counts_and_sums(site: SiteStatistics, _: Numbers) -> tuple[Tensor, ...]:
    return site.counts, site.sums[..., 0]


def _sums_and_counts(site: SiteStatistics, _: Numbers) -> tuple[Tensor, ...]:
    return site.sums[..., 0], site.counts


def _concentrations_and_sums(site: SiteStatistics, known: Numbers) -> tuple[Tensor, ...]:
    return site.counts * known["concentration"].to(site.counts), site.sums[..., 1]


PROBS = ("probs", "logits")

RULES: tuple[tuple[families.Family, _Rule], ...] = (
    (families.CATEGORICAL, _Rule("simplex", PROBS, _counts_of_categories)),
    (families.ONE_HOT_CATEGORICAL, _Rule("simplex", PROBS, _counts_of_categories)),
    (families.MULTINOMIAL, _Rule("simplex", PROBS, _counts_of_categories)),
    (families.BERNOULLI, _Rule("unit", PROBS, _ones_and_zeros)),
    (families.BINOMIAL, _Rule("unit", PROBS, _successes_and_failures)),
    (families.NEGATIVE_BINOMIAL, _Rule("unit", PROBS, _successes_and_failures)),
    (families.GEOMETRIC, _Rule("unit", PROBS, _counts_and_sums)),
    (families.POISSON, _Rule("rate", ("rate",), _sums_and_counts)),
    (families.EXPONENTIAL, _Rule("rate", ("rate",), _counts_and_sums)),
    (families.GAMMA, _Rule("rate", ("rate",), _concentrations_and_sums)),
    (families.INVERSE_GAMMA, _Rule("rate", ("rate",), _concentrations_and_sums)),
)


def data_pools(statistics: Statistics, values: Numbers) -> Pools:
    """The data's part of statistics, pooled by parameter; priors are apart, as they count once.

    Args:
        statistics: Expected statistics of a model's sites.
        values: The parameters' constrained values, whose sizes matter.
    """
    total = Pools(refusals=dict(statistics.indirect))
    for site in statistics.sites:
        total = total + _site_pools(site, values)
    return total


def _site_pools(site: SiteStatistics, values: Numbers) -> Pools:
    """What one site adds, with the parameters that it reads beside each other and those that it cannot serve."""
    if any(site.family is family for family in NORMALS):
        own = _normal_pools(site, values)
    else:
        own = _count_pools(site, values)
    read = frozenset[str]().union(*map(parameters_of, site.slots.values()))
    served = own.forms.keys()
    where = quoted(site)
    refusals = dict.fromkeys(read - served, f"{where} reads it otherwise than by selecting entries")
    refusals |= own.refusals
    partners = {name: read - {name} for name in read}
    return Pools(own.forms, own.coefficients, own.moments, own.evidence, partners, refusals)


def parameters_of(slot: Slot) -> frozenset[str]:
    """The parameters that a slot reads.

    Args:
        slot: One parameter of a distribution.
    """
    return slot.depends_on | ({slot.selection.parameter} if slot.selection else set())


def quoted(site: SiteStatistics) -> str:
    """The sites as text.

    Args:
        site: The statistics of one site, or of several equal ones.
    """
    more = f" and {len(site.sites) - 1} more" if len(site.sites) > 1 else ""
    return f"site '{site.sites[0]}'{more}"


def _count_pools(site: SiteStatistics, values: Numbers) -> Pools:
    rule = next((rule for family, rule in RULES if family is site.family), None)
    refusals: dict[str, str] = {}
    pools = Pools()
    for slot_name, slot in site.slots.items():
        chosen = slot.selection
        if chosen is None:
            continue
        if rule is None or slot_name not in rule.slots:
            refusals[chosen.parameter] = f"there is no closed form for the {slot_name} of {quoted(site)}"
        elif chosen.through != "itself":
            refusals[chosen.parameter] = f"{quoted(site)} takes its {chosen.through} as {slot_name}"
        elif rule.kind == "simplex" and not selects_rows(chosen.index, site.sums.shape[-1], values[chosen.parameter]):
            refusals[chosen.parameter] = f"{quoted(site)} does not select whole rows of it"
        else:
            pools = _selected(site, rule, slot_name, chosen, values)
    return Pools(pools.forms, pools.coefficients, refusals=refusals)


def _selected(site: SiteStatistics, rule: _Rule, slot_name: str, chosen: Selection, values: Numbers) -> Pools:
    known = {name: slot.values for name, slot in site.slots.items()}
    parts = torch.stack(torch.broadcast_tensors(*rule.coefficients(site, known)))
    index = chosen.index.expand(parts.shape[1:]).flatten()
    pooled = summed_by(index, parts.reshape(len(parts), -1).mT, values[chosen.parameter].numel()).mT
    form = ObjectiveForm(rule.kind, slot_name, parts.shape[-1] if rule.kind == "simplex" else 1)
    return Pools({chosen.parameter: form}, {chosen.parameter: pooled})


def selects_rows(index: Tensor, size: int, value: Tensor) -> bool:
    """Whether entries are selected by whole rows of a parameter, in any order inside a row.

    Args:
        index: Which entries, `(*batch, size)`.
        size: How many entries one selected row has.
        value: The parameter.
    """
    if value.dim() == 0 or value.shape[-1] != size or index.shape[-1:] != (size,):
        return False
    ordered = index.sort(-1).values
    first = ordered[..., :1]
    return bool(((first % size == 0) & (ordered == first + torch.arange(size, device=index.device))).all())


def blocks(index: Tensor, size: int, event_dim: int) -> Tensor | None:
    """Which block of adjacent entries each selected vector or matrix is; None where it is no such block.

    Args:
        index: Which entries, `(*batch, *event)`.
        size: How many entries one block has.
        event_dim: How many dims one block has.
    """
    flat = index.flatten(index.dim() - event_dim) if event_dim else index.unsqueeze(-1)
    first = flat[..., :1]
    adjacent = flat == first + torch.arange(size, device=index.device)
    return first[..., 0] // size if flat.shape[-1] == size and bool((adjacent & (first % size == 0)).all()) else None


GIVEN = {("scale", "itself"): "scale", ("scale", "sqrt"): "variance"}
"""What a parameter is that a scale was made of."""


def _normal_pools(site: SiteStatistics, values: Numbers) -> Pools:
    """The pools of a site that has a location and a covariance, each of them learned or known."""
    event_dim = site.family.event_dim
    size = site.slots["loc"].values.shape[-1] if event_dim else 1
    spread_name = next(name for name in site.slots if name != "loc")
    forms: dict[str, ObjectiveForm] = {}
    refusals: dict[str, str] = {}
    rows: dict[str, Tensor] = {}
    for name, slot in site.slots.items():
        dims = event_dim * (1 if name == "loc" else 2)
        chosen = slot.selection
        if chosen is None:
            continue
        block = blocks(chosen.index, size**dims if event_dim else 1, dims)
        given = "loc" if name == "loc" else GIVEN.get((name, chosen.through), name)
        if block is None:
            refusals[chosen.parameter] = f"{quoted(site)} does not select whole rows of it"
        elif chosen.through != "itself" and name != "scale":
            refusals[chosen.parameter] = f"{quoted(site)} takes its {chosen.through} as {name}"
        elif chosen.parameter in forms:
            refusals[chosen.parameter] = f"{quoted(site)} takes it as loc and as {name}"
        else:
            forms[chosen.parameter] = ObjectiveForm("location" if name == "loc" else "spread", given, size)
            rows[name] = block.expand(site.counts.shape).flatten()
    if refusals or not rows:
        return Pools(refusals=refusals)
    return _pooled_moments(site, size, spread_name, forms, rows, values)


def _pooled_moments(
    site: SiteStatistics,
    size: int,
    spread_name: str,
    forms: dict[str, ObjectiveForm],
    rows: dict[str, Tensor],
    values: Numbers,
) -> Pools:
    """The moments of a site whose learned slots select the given rows."""
    own = _moments(site, size, rows.get("loc"), rows.get(spread_name))
    location = next((name for name, form in forms.items() if form.kind == "location"), None)
    if "loc" not in rows:
        own = _taken_about(own, site.slots.get("loc"), site, size)
    if spread_name in rows:
        spread = next(name for name, form in forms.items() if form.kind == "spread")
        return Pools(forms, moments={(location, spread): own.pooled()})
    assert location is not None
    precision = precision_of(site.slots[spread_name].values.to(own.first), spread_name)
    event = precision.shape[-2:]
    precision = precision.expand(*site.counts.shape, *event).reshape(-1, *event)
    said = evidence(
        own.location,
        own.weight[:, None, None] * precision,
        (precision @ own.first[..., None])[..., 0],
        own.centre,
        values[location].numel() // size,
    )
    return Pools(forms, evidence={location: said})


def _moments(site: SiteStatistics, size: int, location: Tensor | None, spread: Tensor | None) -> Moments:
    """The statistics of a site as moments, one row per entry of its batch."""
    counts = site.counts.flatten()
    sums = site.sums.expand(*site.counts.shape, -1).reshape(len(counts), -1)
    first = sums[:, :size] if "loc" in site.slots else sums.new_zeros(len(counts), size)
    second = sums[:, -size * size :].unflatten(-1, (size, size))
    nowhere = torch.zeros(len(counts), dtype=torch.int64, device=counts.device)
    centre = counts.new_zeros(()) if site.centre is None else site.centre.to(counts)
    if site.family.event_dim == 0:
        centre = centre.unsqueeze(-1)
    return Moments(
        location=nowhere if location is None else location,
        spread=nowhere if spread is None else spread,
        count=counts,
        weight=counts,
        first=first,
        second=second,
        centre=centre.expand(*site.counts.shape, size).reshape(-1, size),
        magnitude=second.diagonal(dim1=-2, dim2=-1),
    )


def _taken_about(own: Moments, loc: Slot | None, site: SiteStatistics, size: int) -> Moments:
    """The moments of x less a known location."""
    if loc is None:
        return own
    known = loc.values.to(own.first)
    if site.family.event_dim == 0:
        known = known.unsqueeze(-1)
    moved = own.about(known.expand(*site.counts.shape, size).reshape(-1, size))
    zero = torch.zeros_like(moved.first)
    return Moments(moved.location, moved.spread, moved.count, moved.weight, zero, moved.second, zero, moved.magnitude)


def precision_of(values: Tensor, given: str) -> Tensor:
    """The precisions of known covariances, `(*batch, size, size)`.

    Args:
        values: Covariances as given, `(*batch)` for scales and `(*batch, size, size)` for matrices.
        given: As what they are given.
    """
    if given == "scale":
        return (values**-2)[..., None, None]
    if given == "precision_matrix":
        return values
    tril = values if given == "scale_tril" else torch.linalg.cholesky(values)
    return torch.cholesky_inverse(tril)
