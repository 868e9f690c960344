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
from pyro_vfe.errors import ScaleError, VFEWarning
from pyro_vfe.program.chain_sites import time_plate
from pyro_vfe.program.enumeration import Enumeration, SiteKey
from pyro_vfe.program.layout import Layout
from pyro_vfe.program.masking import unmasked
from pyro_vfe.program.recorder import Role, Site
from pyro_vfe.program.tables import Labeller, over_dims

Absent = dict[str, Tensor]
"""Where latents are masked out, by name: booleans that broadcast to the site's batch."""


def absences(sites: Mapping[SiteKey, Site]) -> Absent:
    """Returns where each latent of both programs is masked out.

    Args:
        sites: The sites of both programs.

    Raises:
        ScaleError: The guide masks the latent and the model does not, or they mask it differently.
    """
    result: Absent = {}
    for (role, name), site in sites.items():
        guide_site = sites.get(("guide", name))
        if role != "model" or site.kind != "enumerated" or guide_site is None:
            continue
        mask, guide_mask = unmasked(site)[1], unmasked(guide_site)[1]
        if guide_mask is not None and not _same_mask(mask, guide_mask):
            raise _masked_differently(name)
        if mask is not None:
            result[name] = ~torch.as_tensor(mask)
    return result


def masked_alone(sites: Mapping[SiteKey, Site]) -> Absent:
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


def mask_draws(sites: Mapping[tuple[Role, str], Site]) -> None:
    """Takes over the model's mask for each draw of the guide: where the model masks it, it does not exist.

    Raises:
        ScaleError: The guide masks the draw and the model does not, or the draw is made from an auxiliary site.
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


def _masked_differently(name: str) -> ScaleError:
    return ScaleError(
        f"Site '{name}' is masked in the guide where the model does not mask it: the free energy would not split into "
        "surprise and gap.",
        hint="Put the same poutine.mask around the site in both programs, or in the model alone.",
    )


def check_absences(
    guided: frozenset[str], sites: Mapping[SiteKey, Site], factors: Mapping[SiteKey, Factor], layout: Layout
) -> None:
    """Checks that nothing reads a latent where it does not exist.

    Raises:
        ScaleError: A site that is present reads a latent that is masked out.
    """
    absent = {name: where for name, where in absences(sites).items() if name in guided}
    for name, reader, _ in _Masked(sites, factors, layout, absent).readings():
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


def read_where_masked(
    sites: Mapping[SiteKey, Site], factors: Mapping[SiteKey, Factor], layout: Layout
) -> dict[str, str]:
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
        for name, reader in read_where_masked(part.sites, part.factors, layout).items():
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
    where: Absent, sites: Mapping[SiteKey, Site], factors: Mapping[SiteKey, Factor], layout: Layout
) -> tuple[Absent, dict[str, str]]:
    """Returns those of the elements that nothing present reads, and for each latent something that reads others of its.

    A latent at an element that nothing present reads is not present itself.

    Args:
        where: Elements at which latents that only one program has are masked out, in the order of the programs.
        sites: The sites of both programs.
        factors: Their factors.
        layout: Where each latent went.
    """
    masked = _Masked(sites, factors, layout, dict(where))
    readers: dict[str, str] = {}
    for name in reversed(where):
        for _, reader, read in masked.readings_of(name):
            readers[name], masked.absent[name] = reader, masked.absent[name] & ~read
    return masked.absent, readers


class _Masked:
    """Latents that are masked out, and what reads them."""

    def __init__(
        self, sites: Mapping[SiteKey, Site], factors: Mapping[SiteKey, Factor], layout: Layout, absent: Absent
    ) -> None:
        self.sites, self.layout, self.absent = sites, layout, absent
        homes = {site.name: site.plate_names for site in sites.values() if site.kind == "enumerated"}
        self._labeller = Labeller(layout, None, homes, {})
        self._readers: dict[str, list[Factor]] = {}
        for factor in factors.values() if absent else ():
            for name in absent.keys() & set(factor.axes):
                self._readers.setdefault(name, []).append(factor)

    def readings(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yields latents that are read where they are masked out, what reads them, and at which elements."""
        return (reading for name in self.absent for reading in self.readings_of(name))

    def readings_of(self, name: str) -> Iterator[tuple[str, str, Tensor]]:
        """The same for one latent; a chain that goes on after such an element reads all of itself."""
        for factor in self._readers.get(name, ()):
            for parts in self._parts(factor, name) if factor.name != name else ():
                read = _elements(*parts, name, self._site(name).plate_names)
                if bool(read.values.any()):
                    yield name, factor.name, over_dims(read, self._site(name).plates)
        for factor in self._readers.get(name, ()):
            if factor.name == name and self._goes_on(factor):
                yield name, name, torch.ones_like(self.absent[name])

    def _site(self, name: str) -> Site:
        return self.sites.get(("model", name)) or self.sites["guide", name]

    def _gone(self, name: str, factor: Factor) -> Table:
        """Where a latent is absent, as a table beside those of a factor; nowhere, for a site that is present."""
        device = factor.table.values.device
        if name not in self.absent:
            return Table(torch.zeros((), dtype=torch.bool, device=device), ())
        site = self._site(name)
        known = self.layout.sites.get((site.role, name))  # The mask may depend on latents.
        return self._labeller.labelled(self.absent[name].to(device), site, None if known is None else known.scope)

    def _parts(self, factor: Factor, name: str) -> Iterator[tuple[Table, Table, Table]]:
        """A factor's tables, each with where a latent is absent, and where the factor's own is."""
        gone, own = self._gone(name, factor), self._gone(factor.name, factor)
        if factor.first is None:
            yield factor.table, gone, own
            return
        time = time_plate(self._site(factor.name))
        assert time is not None
        yield factor.first, gone.selected(time, 0), own.selected(time, 0)
        gone, own = (where.narrowed(time, 1, where.sizes.get(time, 2) - 1) for where in (gone, own))
        yield factor.table, gone, own

    def _goes_on(self, factor: Factor) -> bool:
        """Whether a chain goes on after a step at which it is masked."""
        if factor.first is None or previous(factor.name) not in factor.table.axes:
            return False
        time, gone = time_plate(self._site(factor.name)), self._gone(factor.name, factor)
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


def _same_mask(one: Tensor | bool | None, other: Tensor | bool | None) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(*torch.broadcast_tensors(one, other))
    return one is other
