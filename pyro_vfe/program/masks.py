"""Latents that a mask removes from guide and model.

Where the model masks a latent that the guide has, the latent does not exist: in both programs it is pinned to its first
value at no cost. A masked latent that only the model has keeps its prior, which sums to one. Either way the element
adds nothing to F.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from pyro_vfe.engine.factors import Factor, Table
from pyro_vfe.engine.structure import previous
from pyro_vfe.errors import ScaleError, StructureError
from pyro_vfe.program.chain_sites import drawn_along, time_plate
from pyro_vfe.program.enumeration import SiteKey
from pyro_vfe.program.escapes import Sites
from pyro_vfe.program.layout import Layout
from pyro_vfe.program.masking import Pin, unmasked
from pyro_vfe.program.recorder import Kind, Role, Site
from pyro_vfe.program.tables import Labeller


def absences(
    sites: Mapping[SiteKey, Site], *, alone: bool = False, kind: Kind = "enumerated"
) -> dict[str, Tensor | bool]:
    """Returns where each latent of both programs is masked out.

    Args:
        sites: The sites of both programs.
        alone: Whether to say it of the latents that only the model has, too.
        kind: Of which latents to say it.

    Raises:
        ScaleError: The guide masks the latent and the model does not, or they mask it differently.
    """
    result: dict[str, Tensor | bool] = {}
    for (role, name), site in sites.items():
        guide_site = sites.get(("guide", name))
        if role != "model" or site.kind != kind or (guide_site is None and not alone):
            continue
        mask, guide_mask = unmasked(site)[1], None if guide_site is None else unmasked(guide_site)[1]
        if guide_mask is not None and not _same_mask(mask, guide_mask):
            raise _masked_differently(name)
        if mask is None:
            continue
        result[name] = ~mask if isinstance(mask, Tensor) else not mask
    return result


def pins(absent: Mapping[str, Tensor | bool], sites: Mapping[SiteKey, Site]) -> dict[SiteKey, Pin]:
    """Returns where each latent has a given value: its first where it is absent; in the guide, what the data reveal.

    Args:
        absent: Where latents are masked out.
        sites: The sites of both programs.
    """
    first = torch.zeros((), dtype=torch.long)
    roles: tuple[Role, ...] = ("guide", "model")
    result = {(role, name): Pin(where, first) for name, where in absent.items() for role in roles}
    for site in _revealing(sites):
        result["guide", str(site.reveals)] = Pin(torch.as_tensor(unmasked(site)[1]), site.value.long())
    return result


def _revealing(sites: Mapping[SiteKey, Site]) -> list[Site]:
    """The model's sites whose data are states of a latent that the guide has."""
    return [site for (role, _), site in sites.items() if role == "model" and ("guide", site.reveals) in sites]


def mask_draws(sites: Mapping[SiteKey, Site]) -> None:
    """Takes over the model's mask for each draw of the guide: where the model masks it, it does not exist.

    What the data reveal of a draw is drawn no more.

    Raises:
        ScaleError: The guide masks the draw and the model does not, or the draw is made from an auxiliary site.
        StructureError: It draws a chain of which the data reveal states.
    """
    for (role, name), site in sites.items():
        guide_site = sites.get(("guide", name))
        if role != "model" or site.kind != "sampled" or guide_site is None:
            continue
        mask, guide_mask = unmasked(site)[1], unmasked(guide_site)[1]
        if guide_mask is not None and not _same_mask(mask, guide_mask):
            raise _masked_differently(name)
        if mask is None or guide_mask is not None:
            continue
        if type(guide_site.fn).__name__ == "Delta" and any(s.auxiliary and s.role == "guide" for s in sites.values()):
            raise ScaleError(
                f"Site '{name}' is masked in the model, and the guide makes it from an auxiliary site, whose density "
                "would count where the site does not exist.",
                hint=f"Give the guide a site '{name}' with a distribution of its own.",
            )
        guide_site.mask = mask
    for site in _revealing(sites):
        drawn = sites["guide", str(site.reveals)]
        if drawn.kind != "sampled":
            continue
        if drawn_along(drawn) is not None:
            raise StructureError(
                f"Site '{drawn.name}' of the guide is a chain that is drawn, and site '{site.name}' observes some of "
                "its states: the draw goes on from other states than these.",
                hint="Leave it out of the guide, and it is summed out inside the model; or draw its steps one by one, "
                "from a Categorical in the time plate.",
            )
        drawn.mask = ~torch.as_tensor(unmasked(site)[1])


def _masked_differently(name: str) -> ScaleError:
    return ScaleError(
        f"Site '{name}' is masked in the guide where the model does not mask it: the free energy would not split into "
        "surprise and gap.",
        hint="Put the same poutine.mask around the site in both programs, or in the model alone.",
    )


def presences(
    absent: Mapping[str, Tensor | bool], sites: Mapping[SiteKey, Site], layout: Layout
) -> dict[SiteKey, Table]:
    """Returns where latents of the model exist: over their plates, and the latents that their masks read.

    Args:
        absent: Where they are masked out.
        sites: The sites of both programs.
        layout: Where each latent went.
    """
    homes = {site.name: site.plate_names for site in sites.values() if site.kind == "enumerated"}
    labeller = Labeller(layout, None, homes, {})
    result: dict[SiteKey, Table] = {}
    for name, where in absent.items():
        site = sites["model", name]
        there = ~torch.as_tensor(where, device=site.value.device)
        result["model", name] = labeller.labelled(there, site, _scope(layout, name))
    return result


def check_absences(presence: Mapping[SiteKey, Table], sites: Mapping[SiteKey, Site], factors: Iterable[Factor]) -> None:
    """Checks that nothing reads a latent where it does not exist.

    Args:
        presence: Where masked latents of both programs exist.
        sites: The sites of both programs.
        factors: Their factors.

    Raises:
        ScaleError: A site that is present reads a latent that is masked out.
    """
    for name, reader in _read_where_absent(presence, sites, factors):
        if name == reader:
            raise ScaleError(
                f"Latent site '{name}' is a chain that is masked out at a step of plate "
                f"'{time_plate(sites['model', name])}' and goes on after it.",
                hint="Mask the tail of a sequence only; for a missing observation mask the observation alone.",
            )
        raise ScaleError(
            f"Latent site '{name}' is masked out where site '{reader}' still reads it.",
            hint=f"Mask '{reader}' there as well, or unmask '{name}'; to skip a missing observation mask "
            "the observation alone.",
        )


def read_where_masked(
    absent: Mapping[str, Tensor | bool],
    sites: Mapping[SiteKey, Site],
    factors: Mapping[SiteKey, Factor],
    layout: Layout,
) -> set[str]:
    """Returns the latents of the model alone that something present reads where they are masked out.

    Args:
        absent: Where latents are masked out.
        sites: The sites of both programs.
        factors: Their factors, with absent latents pinned.
        layout: Where each latent went.
    """
    alone = {name: where for name, where in absent.items() if ("guide", name) not in sites}
    return {name for name, _ in _read_where_absent(presences(alone, sites, layout), sites, factors.values())}


def _read_where_absent(
    where: Mapping[SiteKey, Table], sites: Mapping[SiteKey, Site], factors: Iterable[Factor]
) -> Iterator[tuple[str, str]]:
    """Yields latents that are read where they are masked out, each with its reader: itself, if it is a chain."""
    presence = {name: table for (_, name), table in where.items()}
    for factor in factors if presence else ():
        site = sites.get(("model", factor.name))
        time = None if site is None or factor.first is None else time_plate(site)
        if time is not None and factor.name in presence and _goes_on(factor, time, presence[factor.name]):
            yield factor.name, factor.name
        for name in presence.keys() & set(factor.axes) - {factor.name}:
            beside = _beside(factor, presence[name], time)
            if any(_varies(table, name, there) for table, there in beside if name in table.axes):
                yield name, factor.name


def _beside(factor: Factor, presence: Table, time: str | None) -> Iterator[tuple[Table, Table]]:
    """The tables of a factor, each with where something exists at the elements that it is of."""
    if factor.first is None or time not in presence.axes:
        yield from ((table, presence) for table in factor.tables)
    else:
        yield factor.table, presence.narrowed(time, 1, presence.sizes[time] - 1)
        yield factor.first, presence.selected(time, 0)


def _scope(layout: Layout, name: str) -> Sites | None:
    """The latents that a latent of the model reads, its mask included."""
    known = layout.sites.get(("model", name))
    return None if known is None else known.scope


def _goes_on(factor: Factor, time: str, presence: Table) -> bool:
    """Whether a chain goes on after a step at which it is masked."""
    before = presence.narrowed(time, 0, presence.sizes.get(time, 1) - 1)
    return previous(factor.name) in factor.table.axes and _varies(factor.table, previous(factor.name), before)


def _varies(table: Table, axis: str, presence: Table) -> bool:
    """Whether the table varies along `axis` anywhere that what the axis is of does not exist."""
    axes = (axis, *dict.fromkeys((*(a for a in table.axes if a != axis), *presence.axes)))
    values = table.aligned(axes)
    return bool(((values != values[:1]) & ~presence.aligned(axes)).any())


def _same_mask(one: Tensor | bool | None, other: Tensor | bool | None) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(*torch.broadcast_tensors(one, other))
    return one is other
