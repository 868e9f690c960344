"""From a site's tensors to a table with named axes.

Batch dims to the right belong to plates, dims further left to enumerated latents: `(*latents, *plates)`. An axis of
size one is dropped: nothing varies along it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_vfe.engine.factors import Factor, Scale, Table
from pyro_vfe.errors import StructureError
from pyro_vfe.program.chain_sites import chain_factor, is_chain
from pyro_vfe.program.families_table import product_table
from pyro_vfe.program.layout import Layout, plate_violation
from pyro_vfe.program.log_prob import log_prob, support_table
from pyro_vfe.program.provenance import NO_SITES, Provenance, Sites
from pyro_vfe.program.recorder import Plate, Site


class StructureChanged(Exception):
    """A run did not fit the layout: the programs are to be laid out again."""


@dataclass(eq=False)
class Labeller:
    """Turns the sites of one enumerated run into factors."""

    layout: Layout
    provenance: Provenance | None
    homes: Mapping[str, frozenset[str]]
    """The plates of each enumerated latent."""
    choices: Mapping[str, int]
    """The index that each sequentially enumerated latent takes in this run."""
    draws: frozenset[str] = NO_SITES
    """Draws that count as variables with one value, so that terms know which of them they read."""
    lost: set[tuple[str, str, str]] = field(default_factory=set)
    """Program, site and latent where the site reads the latent and does not vary with it."""
    _latents_at: dict[int, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, dim in self.layout.dims.items():
            self._latents_at.setdefault(dim, []).append(name)

    def factor(self, site: Site, *, absent: Tensor | bool | None) -> Factor:
        """The factor of `site`: its log-probability under its mask, and its scale.

        Args:
            site: A site of an enumerated run.
            absent: Where a latent of guide and model does not exist: it is pinned there to its first value.
        """
        if is_chain(site):
            return self._noted(site, chain_factor(site, self, self._scope(site), absent))
        fn, mask = unmasked(site)
        values = self._values(site, fn)
        if site.kind != "enumerated":
            values = masked(values, mask)
        elif absent is not None and absent is not False:
            values = self._pinned(values, site, absent)
        scale = site.scale
        if scale_reads_latents(site, self.layout.nesting):
            values, scale = values * scale, 1.0
        scope = self._scope(site)
        return self._noted(
            site, Factor(site.name, self.labelled(values, site, scope), site.plate_names, self._weight(scale, site))
        )

    def scale(self, site: Site) -> Scale:
        """The weight of a site: a number, or one per plate element."""
        return self._weight(site.scale, site)

    def _weight(self, scale: Tensor | float, site: Site) -> Scale:
        return self.labelled(scale, site, NO_SITES) if isinstance(scale, Tensor) and scale.dim() else float(scale)

    def _noted(self, site: Site, factor: Factor) -> Factor:
        """The factor; reads of the site along which none of its tables varies are noted."""
        scope = self._scope(site) or NO_SITES
        axes = {*factor.table.axes, *(factor.first.axes if factor.first else ())}
        for name in scope - axes:
            if name in self.homes and name != site.name:
                self.lost.add((site.role, site.name, name))
        return factor

    def _values(self, site: Site, fn: Any) -> Tensor:
        if site.kind == "enumerated" and site.name not in self.layout.sequential:
            values = support_table(fn, self.layout.dims[site.name])
            if values is not None:
                return values
        values = product_table(fn, site.value)
        return log_prob(fn, site.value) if values is None else values

    def _pinned(self, values: Tensor, site: Site, absent: Tensor | bool) -> Tensor:
        """A latent that is masked in guide and model takes its first value there, at no cost."""
        if site.name in self.layout.sequential:
            first = values.new_tensor(0.0 if self.choices[site.name] == 0 else -torch.inf)
            return torch.where(torch.as_tensor(absent, device=values.device), first, values)
        dim = self.layout.dims[site.name]
        size = values.shape[dim]
        first = torch.full((size, *(1,) * (-dim - 1)), -torch.inf, dtype=values.dtype, device=values.device)
        first[0] = 0.0
        return torch.where(torch.as_tensor(absent, device=values.device), first, values)

    def _scope(self, site: Site) -> Sites | None:
        """The sites that the log-probability reads; None where each dim names its latent by itself."""
        if self.provenance is None:
            return None
        own = {site.name} if site.name in self.draws else NO_SITES
        return site.reads(self.provenance).union(own)

    def labelled(self, values: Tensor, site: Site, scope: Sites | None) -> Table:
        """The table of a tensor whose dims lie as the layout says; see `labelled_before`."""
        return self.labelled_before(values, site, scope, ())

    def labelled_before(self, values: Tensor, site: Site, scope: Sites | None, trailing: tuple[str, ...]) -> Table:
        """The table of a tensor whose dims lie as the layout says, but for the last ones, which have names.

        Raises:
            PlateError: It varies along a latent from outside one of the latent's plates.
            StructureError: It varies along a batch dim that is no plate.
            StructureChanged: It varies along a latent that it is not known to read.
        """
        plate_at = {plate.dim: plate for plate in site.plates}
        axes, keep = [], []
        batch_shape = values.shape[: values.dim() - len(trailing)]
        for position, size in enumerate(batch_shape):
            if size == 1:
                continue
            dim = position - len(batch_shape)
            if -dim > self.layout.nesting:
                axes.append(self._latent(dim, site, scope))
            elif dim in plate_at and plate_at[dim].size == size:
                axes.append(plate_at[dim].name)
            else:
                raise _no_plate(site, batch_shape, dim)
            keep.append(size)
        drawn = tuple(sorted(scope & self.draws)) if scope else ()
        shape = [*keep, *(1,) * len(drawn), *values.shape[len(batch_shape) :]]
        return Table(values.reshape(shape), (*axes, *drawn, *trailing))

    def _latent(self, dim: int, site: Site, scope: Sites | None) -> str:
        candidates = self._latents_at.get(dim, [])
        if scope is not None:
            candidates = [name for name in candidates if name in scope]
        if len(candidates) != 1:
            raise StructureChanged(f"site '{site.name}' varies along dim {dim}, which is of {candidates}")
        name = candidates[0]
        home = self.homes.get(name)
        if home is None:
            raise StructureChanged(f"site '{site.name}' reads '{name}', which did not run")
        outside = home - site.plate_names
        if outside:
            raise plate_violation(site.name, site.role, name, min(outside))
        return name


def scale_reads_latents(site: Site, nesting: int) -> bool:
    """Whether the site's scale varies with an enumerated latent: it is then part of the table."""
    scale = site.scale
    return isinstance(scale, Tensor) and any(size > 1 for size in scale.shape[: max(0, scale.dim() - nesting)])


def batch_axes(plates: tuple[Plate, ...]) -> list[str]:
    """A name for each batch dim of a site in these plates, left to right: the plate's, or a stand-in for a gap."""
    by_dim = {plate.dim: plate.name for plate in plates}
    return [by_dim.get(dim, f"_{dim}") for dim in range(min(by_dim, default=0), 0)]


def over_dims(table: Table, plates: tuple[Plate, ...]) -> Tensor:
    """A table over plates as a tensor: batch dims lie where the plates' dims do, other axes follow on the right."""
    axes = batch_axes(plates)
    return table.aligned((*axes, *(axis for axis in table.axes if axis not in axes)))


def unmasked(site: Site) -> tuple[Any, Tensor | bool | None]:
    """The site's distribution and its mask, from `poutine.mask` and from `fn.mask(...)` together."""
    fn, mask = site.fn, site.mask
    while type(fn).__name__ == "MaskedDistribution":
        own = fn._mask
        mask = own if mask is None or mask is True else mask & own if not isinstance(mask, bool) else False
        fn = fn.base_dist
    return fn, None if mask is True else mask


def masked(values: Tensor, mask: Tensor | bool | None) -> Tensor:
    """The values where the mask holds, and zero elsewhere."""
    if mask is None or mask is True:
        return values
    if mask is False:
        return torch.zeros_like(values)
    return torch.where(mask, values, values.new_zeros(()))


def _no_plate(site: Site, shape: torch.Size, dim: int) -> StructureError:
    plates = ", ".join(f"'{plate.name}' (dim {plate.dim}, size {plate.size})" for plate in site.plates) or "none"
    return StructureError(
        f"Site '{site.name}' of the {site.role} has a log-probability of shape {tuple(shape)}, and its dim {dim} is no "
        f"plate around it (plates: {plates}).",
        hint="Enclose it in `with pyro.plate(name, size)` if its elements are independent, or make them one event "
        "with `.to_event(n)`.",
    )
