r"""From Q's expected tables to the sufficient statistics of a model's sites.

    weights  ->  counts and sums of T(x), for each entry of each distribution's parameters  ->  which parameter that is

Only sites that read a parameter are looked at. A parameter that some site reads in another way than as a selection of
its entries, by a network say, is named with the reason.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform

from pyro_vfe.engine.factors import Table
from pyro_vfe.errors import StructureError
from pyro_vfe.program.enumeration import Enumeration, SiteKey
from pyro_vfe.program.families import Form, form_of, unwrapped
from pyro_vfe.program.families_forms import BERNOULLI, CATEGORICAL, MULTINOMIAL, ONE_HOT_CATEGORICAL
from pyro_vfe.program.log_prob import slim
from pyro_vfe.program.markov_chain import MarkovChain
from pyro_vfe.program.masking import unmasked
from pyro_vfe.program.parameters import Parameters
from pyro_vfe.program.probes import Probe, Prober
from pyro_vfe.program.recorder import Site
from pyro_vfe.program.selection import Origins
from pyro_vfe.program.statistics import PriorStatistics, SiteStatistics, Slot, Statistics

_NORMALISED = (CATEGORICAL, ONE_HOT_CATEGORICAL, MULTINOMIAL)

_COVARIANCES = ("covariance_matrix", "precision_matrix", "scale_tril")


def statistics_of(
    enumeration: Enumeration, weights: Mapping[SiteKey, Sequence[Tensor]], parameters: Parameters
) -> Statistics:
    """Returns the expected sufficient statistics of all sites of the model that read parameters.

    Args:
        enumeration: A run with the graph from the parameters to the distributions.
        weights: Q's expected entries of each site's tables, in the shape of the tables.
        parameters: What the programs read, and what was found of it in earlier runs.
    """
    origins = Origins(enumeration.parameters, parameters.known)
    indirect: dict[str, str] = {}
    priors: list[PriorStatistics] = []
    probed: dict[SiteKey, bool] = {}
    for key, site in ((key, site) for path in enumeration.paths for key, site in path.items()):
        reads = origins.of(*tensors_of(site.fn), site.mask, site.scale, site.value) if site.role == "model" else ()
        if not reads:
            continue
        reason = _reason(site, enumeration, origins)
        if reason is not None:
            indirect.update(dict.fromkeys(reads, reason))
        probed[key] = probed.get(key, True) and reason is None
    for key in [key for key, ready in probed.items() if ready and enumeration.sites[key].kind == "sampled"]:
        priors.append(_prior(enumeration.sites[key], origins))
        del probed[key]
    sites = _probed(enumeration, weights, [key for key, ready in probed.items() if ready], origins)
    for statistics in sites:
        for slot in statistics.slots.values():
            if slot.selection is None:
                where = f"site '{statistics.sites[0]}' computes with it"
                indirect.update(dict.fromkeys(slot.depends_on, where))
    return Statistics(sites, tuple(priors), indirect)


def parameter_roles(enumeration: Enumeration, parameters: Parameters) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the parameters of the model, point estimates that the guide gives among them, and those of the guide.

    Args:
        enumeration: A run with the graph from the parameters to the distributions.
        parameters: Which programs read which parameter.

    Raises:
        StructureError: A parameter is of both kinds.
    """
    origins = Origins(enumeration.parameters)
    free = [name for name, value in enumeration.parameters.items() if value.requires_grad]
    points: set[str] = set()
    recognition = {name for name in free if parameters.readers[name] == {"guide"}}
    for site in (site for path in enumeration.paths for site in path.values()):
        if site.role != "guide":
            continue
        reached = origins.of(*tensors_of(site.fn))
        if site.kind == "sampled":
            points |= reached
            continue
        both = [name for name in free if name in reached and name not in recognition]
        if both:
            raise StructureError(
                f"Parameter '{both[0]}' is read by the model and by the guide's site '{site.name}': no phase can hold"
                " the one program and change the other.",
                hint="Give the guide a parameter of its own.",
            )
        both = [name for name in free if name in reached & points]
        if both:
            raise StructureError(
                f"Parameter '{both[0]}' of the guide is a point estimate and feeds its site '{site.name}' as well.",
                hint="Give the site a parameter of its own.",
            )
    learned = tuple(name for name in free if name not in recognition or name in points)
    return learned, tuple(name for name in free if name in recognition - points)


def slots_by_parameter(enumeration: Enumeration, parameters: Parameters) -> dict[str, set[tuple[str, int]]]:
    """Returns what distributions of the model take parameters as: the names of their slots, and their event dims.

    Args:
        enumeration: A run with the graph from the parameters to the distributions.
        parameters: What the programs read, and what was found of it in earlier runs.
    """
    origins = Origins(enumeration.parameters, parameters.known)
    found: dict[str, set[tuple[str, int]]] = {}
    for site in (site for path in enumeration.paths for site in path.values() if site.role == "model"):
        fn, _ = unmasked(site)
        form = form_of(fn)
        slots = {} if form is None else _slots(fn, form, origins, site.name)
        for name, slot in slots.items():
            if form is not None and slot.selection is not None:
                own = {"logits": "probs"}.get(name, "scale_tril" if name in _COVARIANCES else name)
                found.setdefault(slot.selection.parameter, set()).add((name, form.family.parameters[own]))
    return found


def tensors_of(holder: object, around: tuple[object, ...] = ()) -> Iterable[Tensor]:
    """All tensors that a distribution holds, at any depth; a transform and its inverse hold each other."""
    if isinstance(holder, Tensor):
        yield holder
    elif isinstance(holder, Mapping):
        for part in holder.values():
            yield from tensors_of(part, around)
    elif isinstance(holder, (list, tuple)):
        for part in holder:
            yield from tensors_of(part, around)
    elif isinstance(holder, torch.nn.Module):
        yield from holder.parameters()
    elif isinstance(holder, (Distribution, Transform)) and not any(holder is other for other in around):
        yield from tensors_of(holder.__dict__, (*around, holder))


def _reason(site: Site, enumeration: Enumeration, origins: Origins) -> str | None:
    """Why the parameters that a site reads have no closed form; None where they may have."""
    fn, mask = unmasked(site)
    base, _ = unwrapped(fn)
    is_prior = site.kind == "sampled"
    if origins.of(site.scale) or (isinstance(mask, Tensor) and (is_prior or origins.of(mask))):
        return f"the mask or scale of site '{site.name}' depends on it"
    if not is_prior and origins.of(site.value):
        return f"the value of site '{site.name}' depends on it"
    if is_prior and not enumeration.supports.keys().isdisjoint(enumeration.factors[site.role, site.name].axes):
        return f"its prior, site '{site.name}', depends on a latent"
    if isinstance(base, MarkovChain):
        return None if base.num_steps > 1 else f"site '{site.name}' is a chain of one step"
    event_dim = len(fn.event_shape)
    if event_dim and not is_prior and site.value.shape[-event_dim:] != fn.event_shape:
        return f"the value of site '{site.name}' has another event shape than its distribution"
    if form_of(fn) is None:
        return f"site '{site.name}' is {type(base).__name__}, which has no exponential-family form here"
    return None


def _prior(site: Site, origins: Origins) -> PriorStatistics:
    fn, _ = unmasked(site)
    form = form_of(fn)
    assert form is not None
    weight = torch.as_tensor(site.scale, dtype=torch.float64)
    value = origins.slot(site.value, (site.name, "value"))
    return PriorStatistics(site.name, form.family, value, _slots(fn, form, origins, site.name), weight)


def _slots(fn: Any, form: Form, origins: Origins, site: str) -> dict[str, Slot]:
    """The parameters of a distribution as they were given."""
    base, own_dims = unwrapped(fn)
    slots = {}
    for name in form.parameters:
        event_dim = form.family.parameters.get("probs" if name == "logits" else name, 0)
        if name == "scale_tril":
            name = next((given for given in _COVARIANCES if given in base.__dict__), name)
        values = slim(torch.as_tensor(getattr(base, name)), own_dims + event_dim)
        slots[name] = origins.slot(values, (site, name), normalised=form.family in _NORMALISED)
    return slots


def _probed(
    enumeration: Enumeration, weights: Mapping[SiteKey, Sequence[Tensor]], keys: Sequence[SiteKey], origins: Origins
) -> tuple[SiteStatistics, ...]:
    """The statistics of some sites, from one backward pass."""
    prober = Prober()
    with torch.enable_grad():
        factors = enumeration.rescored(frozenset(keys), prober)
        tables, given = [], []
        for key, factor in factors.items():
            for table, own, weight in zip(factor.tables, enumeration.factors[key].tables, weights[key], strict=True):
                if table.values.requires_grad:  # what is masked altogether tells of nothing
                    tables.append(table.values)
                    given.append(rearranged(Table(weight, own.axes), table))
    leaves = [leaf for probe in prober.probes for leaf in probe.leaves]
    found = (
        torch.autograd.grad(tables, leaves, given, materialize_grads=True) if tables else map(torch.zeros_like, leaves)
    )
    gradients = iter(found)
    return tuple(_statistics(probe, [next(gradients) for _ in probe.leaves], origins) for probe in prober.probes)


def rearranged(weight: Table, like: Table) -> Tensor:
    """Weights with the axes of another table of the same site, summed over those that it lacks.

    Args:
        weight: Q's expected entries.
        like: The other table.
    """
    if weight.axes == like.axes:
        return weight.values
    gone = [dim for dim, axis in enumerate(weight.axes) if axis not in like.axes]
    kept = tuple(axis for axis in weight.axes if axis in like.axes)
    summed = Table(weight.values.sum(gone) if gone else weight.values, kept)
    return summed.aligned(like.axes)


def _statistics(probe: Probe, gradients: Sequence[Tensor], origins: Origins) -> SiteStatistics:
    if probe.slot is not None:
        table = probe.fn.initial if probe.slot == "initial" else probe.fn.transition
        slot = origins.slot(table, (probe.sites[0], probe.slot), normalised=True)
        sums = gradients[0].reshape(table.shape)
        return SiteStatistics(probe.sites, CATEGORICAL, {"probs": slot}, sums.sum(-1), sums, None)
    form = probe.form or form_of(probe.fn)
    assert form is not None
    slots = _slots(probe.fn, form, origins, probe.sites[0])
    if probe.form is not None:
        sums, counts = gradients
        batch, elements = counts.shape, form.independent
        counts = counts.reshape([*batch, *(1,) * len(elements)]).expand([*batch, *elements])
        return SiteStatistics(probe.sites, form.family, slots, counts, sums, form.centre)
    (sums,) = gradients
    counts = sums.sum(-1)
    if form.family is BERNOULLI:
        sums = sums[..., 1:]
    return SiteStatistics(probe.sites, form.family, slots, counts, sums, None)
