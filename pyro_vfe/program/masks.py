"""Latents that a mask removes from guide and model.

Where the model masks a latent that the guide has, the latent does not exist: in both programs it is pinned to its first
value at no cost. A masked latent that only one program has keeps its prior, which sums to one; below a latent that does
not exist there is no prior, and neither does it exist. Either way the element adds nothing to F.
"""

import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from pyro_vfe.engine.factors import Factor, Table
from pyro_vfe.engine.structure import previous
from pyro_vfe.errors import ScaleError, StructureError, VFEWarning
from pyro_vfe.program.chain_sites import drawn_along, time_plate
from pyro_vfe.program.enumeration import Enumeration, SiteKey
from pyro_vfe.program.layout import Layout
from pyro_vfe.program.masking import Pin, hand_over_masks, mask_of_elements, unmasked
from pyro_vfe.program.recorder import Kind, Site
from pyro_vfe.program.tables import Labeller, over_dims

Sites = Mapping[SiteKey, Site]

Absent = dict[str, Tensor]
"""Where latents are masked out, by name: booleans that broadcast to the site's batch."""


def absences(sites: Sites, *, kind: Kind = "enumerated") -> Absent:
    """Returns where each latent of both programs is masked out.

    Args:
        sites: The sites of both programs.
        kind: Of which latents to say it.

    Raises:
        ScaleError: The guide masks the latent and the model does not, or they mask it differently.
    """
    result: Absent = {}
    for (role, name), site in sites.items():
        guide_site = sites.get(("guide", name))
        if role != "model" or site.kind != kind or guide_site is None:
            continue
        mask, guide_mask = unmasked(site)[1], unmasked(guide_site)[1]
        if guide_mask is not None and not _same_mask(mask, guide_mask):
            raise _masked_differently(name)
        if mask is not None:
            result[name] = ~torch.as_tensor(mask)
    return result


def masked_alone(sites: Sites) -> Absent:
    """Returns where each latent that only one of the programs has is masked out.

    Args:
        sites: The sites of both programs.
    """
    result: Absent = {}
    for (role, name), site in sites.items():
        if site.kind == "enumerated" and ("guide" if role == "model" else "model", name) not in sites:
            mask = unmasked(site)[1]
            if mask is not None:
                result[name] = ~torch.as_tensor(mask)
    return result


def masked_below(absent: Absent, alone: Absent, factors: Mapping[SiteKey, Factor]) -> Absent:
    """Returns where latents of one program alone are masked out and read a latent that does not exist there.

    Args:
        absent: Where latents do not exist.
        alone: Where latents that only one program has are masked out.
        factors: The factors of the sites, in the order of the programs.
    """
    found: Absent = {}
    for factor in factors.values() if absent and alone else ():
        for parent in factor.axes if factor.name in alone else ():
            gone = found.get(parent, absent.get(parent)) if parent != factor.name else None
            if gone is not None:
                where = alone[factor.name] & gone.to(alone[factor.name].device)
                found[factor.name] = found[factor.name] | where if factor.name in found else where
    return found


def pins(absent: Absent, sites: Sites) -> dict[SiteKey, Pin]:
    """Returns where each latent has a given value: its first where it is absent; in the guide, what the data reveal.

    Args:
        absent: Where latents are masked out.
        sites: The sites of both programs.
    """
    result: dict[SiteKey, Pin] = {}
    for name, where in absent.items():
        result["guide", name] = result["model", name] = Pin(where, torch.zeros((), dtype=torch.long))
    for site in _revealing(sites):
        result["guide", str(site.reveals)] = Pin(torch.as_tensor(unmasked(site)[1]), site.value.long())
    return result


def _revealing(sites: Mapping[SiteKey, Site]) -> list[Site]:
    """The model's sites whose data are states of a latent that the guide has."""
    return [site for (role, _), site in sites.items() if role == "model" and ("guide", site.reveals) in sites]


def mask_guide(sites: Mapping[SiteKey, Site]) -> None:
    """Takes over the model's mask for each latent of the guide: where the model masks it, it does not exist.

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
        if not _same_mask(mask_of_elements(site.fn), mask_of_elements(guide_site.fn)):
            raise ScaleError(
                f"Site '{name}' is one event, of which a mask hides other elements in the guide than in the model: F "
                "would count the one's and not the other's.",
                hint="Mask the same elements in both programs; or give them a plate in place of to_event, with "
                "poutine.mask around them in the model.",
            )
        is_made = type(guide_site.fn).__name__ == "Delta" and mask is not None and guide_mask is None
        if is_made and any(s.auxiliary and s.role == "guide" for s in sites.values()):
            raise ScaleError(
                f"Site '{name}' is masked in the model, and the guide makes it from an auxiliary site, whose density "
                "would count where the site does not exist.",
                hint=f"Give the guide a site '{name}' with a distribution of its own.",
            )
    hand_over_masks(sites)
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


def presences(absent: Absent, sites: Sites, layout: Layout) -> dict[SiteKey, Table]:
    """Returns where latents of the model exist: over their plates, and the latents that their masks read.

    Args:
        absent: Where they are masked out.
        sites: The sites of both programs.
        layout: Where each latent went.
    """
    own = {name: ~where for name, where in absent.items() if ("model", name) in sites}
    return {("model", name): table for name, table in _labelled(own, sites, layout).items()}


def _labelled(where: Absent, sites: Sites, layout: Layout) -> dict[str, Table]:
    homes = {site.name: site.plate_names for site in sites.values() if site.kind == "enumerated"}
    labeller = Labeller(layout, None, homes, {})
    result = {}
    for name, values in where.items():
        site = _site(name, sites)
        known = layout.sites.get((site.role, name))  # The mask may depend on latents.
        scope = None if known is None else known.scope
        result[name] = labeller.labelled(values.to(site.value.device), site, scope)
    return result


def _site(name: str, sites: Sites) -> Site:
    return sites.get(("model", name)) or sites["guide", name]


def check_absences(
    presence: Mapping[SiteKey, Table], sites: Sites, factors: Mapping[SiteKey, Factor], layout: Layout
) -> None:
    """Checks that nothing reads a latent where it does not exist.

    Args:
        presence: Where masked latents of both programs exist.
        sites: The sites of both programs.
        factors: Their factors.
        layout: Where each latent went.

    Raises:
        ScaleError: A site that is present reads a latent that is masked out.
    """
    gone = {name: Table(~table.values, table.axes) for (_, name), table in presence.items()}
    for name, reader, _ in _Masked(sites, factors, gone).readings():
        if name == reader:
            raise ScaleError(
                f"Latent site '{name}' is a chain that is masked out at a step of plate "
                f"'{time_plate(sites['model', name])}' and goes on after it.",
                hint="Mask the tail of a sequence only; for a missing observation mask the observation alone.",
            )
        present = read_where_masked(sites, factors, layout).get(reader, reader)
        between = f" '{reader}' is masked out too, but '{present}' reads it." if present != reader else ""
        raise ScaleError(
            f"Latent site '{name}' is masked out where site '{reader}' still reads it.{between}",
            hint=f"Mask '{present}' there as well, and what reads it; or unmask '{name}' in both programs; to skip a "
            "missing observation mask the observation alone.",
        )


def read_where_masked(sites: Sites, factors: Mapping[SiteKey, Factor], layout: Layout) -> dict[str, str]:
    """Returns the latents of one program alone that something present reads where they are masked out, and what does.

    Args:
        sites: The sites of both programs.
        factors: Their factors.
        layout: Where each latent went.
    """
    return unread(masked_alone(sites), sites, factors, layout)[1]


def warn_of_priors(run: Enumeration, layout: Layout) -> None:
    """Says of a latent that is masked out, and read there by what is present, that it has its prior.

    Args:
        run: An enumerated run.
        layout: Where each latent went.
    """
    for part in run.parts if masked_alone(run.sites) else ():
        # A chain that is observed in part goes on for who reads it, and nobody wrote its mask.
        revealed = {site.reveals for site in part.sites.values()}
        for name, reader in read_where_masked(part.sites, part.factors, layout).items():
            if name in revealed:
                continue
            who, value = f"site '{reader}'", f"; for some value there write {name} = torch.where(mask, {name}, value)"
            if reader == name:
                who, value = "its own next step", ""
            below = name in masked_below(absences(part.sites), masked_alone(part.sites), part.factors)
            less = f"'{name}' masked only where what it reads is" if below else f"no mask around '{name}'"
            warnings.warn(
                f"Latent site '{name}' is masked out where {who} reads it, and keeps its prior there, as in Pyro: F is "
                f"what it is with {less} (write it so, and this is not said). If {who} shall not count there, put it "
                f"under the mask too{value}.",
                VFEWarning,
                stacklevel=2,
            )
            return


def unread(
    where: Absent, sites: Sites, factors: Mapping[SiteKey, Factor], layout: Layout
) -> tuple[Absent, dict[str, str]]:
    """Returns those of the elements that nothing present reads, and for each latent something that reads others of its.

    A latent at an element that nothing present reads is not present itself.

    Args:
        where: Elements at which latents that only one program has are masked out, in the order of the programs.
        sites: The sites of both programs.
        factors: Their factors.
        layout: Where each latent went.
    """
    absent, readers = dict(where), dict[str, str]()
    masked = _Masked(sites, factors, _labelled(where, sites, layout))
    for name in reversed(where):
        for _, reader, read in masked.readings_of(name):
            readers[name] = reader
            absent[name] = absent[name] & ~over_dims(read, _site(name, sites).plates)
            masked.gone[name] = _but(masked.gone[name], read)
    return absent, readers


class _Masked:
    """Latents that are masked out, and what reads them."""

    def __init__(self, sites: Sites, factors: Mapping[SiteKey, Factor], gone: Mapping[str, Table]) -> None:
        """Args:
        sites: The sites of both programs.
        factors: Their factors.
        gone: Where latents are masked out.
        """
        self.sites, self.gone = sites, dict(gone)
        self._readers: dict[str, list[Factor]] = {}
        for factor in factors.values() if gone else ():
            for name in gone.keys() & set(factor.axes):
                self._readers.setdefault(name, []).append(factor)

    def readings(self) -> Iterator[tuple[str, str, Table]]:
        """Yields latents that are read where they are masked out, what reads them, and at which elements."""
        return (reading for name in self.gone for reading in self.readings_of(name))

    def readings_of(self, name: str) -> Iterator[tuple[str, str, Table]]:
        """The same for one latent; a chain that goes on after such an element reads all of itself."""
        for factor in self._readers.get(name, ()):
            for parts in self._parts(factor, name) if factor.name != name else ():
                read = _elements(*parts, name, _site(name, self.sites).plate_names)
                if bool(read.values.any()):
                    yield name, factor.name, read
        for factor in self._readers.get(name, ()):
            if factor.name == name and self._goes_on(factor):
                yield name, name, Table(self.gone[name].values.new_ones(()), ())

    def _gone(self, name: str, factor: Factor) -> Table:
        """Where a latent is absent; nowhere, for a site that is present."""
        nowhere = Table(torch.zeros((), dtype=torch.bool, device=factor.table.values.device), ())
        return self.gone.get(name, nowhere)

    def _parts(self, factor: Factor, name: str) -> Iterator[tuple[Table, Table, Table]]:
        """A factor's tables, each with where a latent is absent, and where the factor's own is."""
        gone, own = self._gone(name, factor), self._gone(factor.name, factor)
        if factor.first is None:
            yield factor.table, gone, own
            return
        time = time_plate(_site(factor.name, self.sites))
        assert time is not None
        yield factor.first, gone.selected(time, 0), own.selected(time, 0)
        gone, own = (where.narrowed(time, 1, where.sizes.get(time, 2) - 1) for where in (gone, own))
        yield factor.table, gone, own

    def _goes_on(self, factor: Factor) -> bool:
        """Whether a chain goes on after a step at which it is masked."""
        if factor.first is None or previous(factor.name) not in factor.table.axes:
            return False
        time, gone = time_plate(_site(factor.name, self.sites)), self._gone(factor.name, factor)
        assert time is not None
        before, own = (gone.narrowed(time, start, gone.sizes.get(time, 1) - 1) for start in (0, 1))
        return bool(_elements(factor.table, before, own, previous(factor.name), frozenset()).values.any())


def _elements(table: Table, gone: Table, own: Table, axis: str, plates: frozenset[str]) -> Table:
    """At which elements of some plates a table varies along `axis`, where that is gone and the table's own is not."""
    axes = (axis, *dict.fromkeys(other for part in (table, gone, own) for other in part.axes if other != axis))
    values = table.aligned(axes)
    varies = (values != values[:1]) & gone.aligned(axes) & ~own.aligned(axes)
    others = [dim for dim, other in enumerate(axes) if other not in plates]
    return Table(varies.any(others), tuple(other for other in axes if other in plates))


def _but(gone: Table, read: Table) -> Table:
    """Where a latent is masked out and not read."""
    axes = tuple(dict.fromkeys((*gone.axes, *read.axes)))
    return Table(gone.aligned(axes) & ~read.aligned(axes), axes)


def _same_mask(one: Tensor | bool | None, other: Tensor | bool | None) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(*torch.broadcast_tensors(one, other))
    return one is other
