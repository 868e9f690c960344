"""From a site's tensors to a table with named axes.

Batch dims to the right belong to plates, dims further left to enumerated latents: `(*latents, *plates)`. An axis of
size one is dropped: nothing varies along it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vfe.engine.factors import Factor, Scale, Table
from pyro_vfe.engine.logspace import times
from pyro_vfe.engine.stacks import Stack, StackedTable
from pyro_vfe.errors import SupportError
from pyro_vfe.program.chain_sites import certain, chain_factor, is_chain
from pyro_vfe.program.enumeration import SiteKey
from pyro_vfe.program.equal_sites import stacked_log_prob
from pyro_vfe.program.escapes import NO_SITES, Sites, StructureChanged, blame
from pyro_vfe.program.families_table import product_table
from pyro_vfe.program.impossible_values import nowhere
from pyro_vfe.program.layout import Layout
from pyro_vfe.program.log_prob import is_listed, listed, log_prob
from pyro_vfe.program.markov_chain import MarkovChain
from pyro_vfe.program.masking import Pin, masked, unmasked
from pyro_vfe.program.missing_plates import cannot_score, no_plate
from pyro_vfe.program.plate_violations import plate_violation
from pyro_vfe.program.provenance import Provenance
from pyro_vfe.program.recorder import Plate, Site
from pyro_vfe.program.stars import Star


@dataclass(frozen=True, eq=False)
class _Pattern:
    """A tensor along what it varies; equal sites have one pattern, and names of their own for its latents."""

    values: Tensor
    """The numbers, without the dims along which nothing varies."""
    dims: tuple[int | str, ...]
    """For each dim its plate, the enumeration dim of its latent, or the sign for the site's own values."""
    own: bool
    """Whether the site's own values are listed along a dim of their own, so that none of the others is theirs."""


_OWN = 0
"""Stands for the dim of a site's own values; enumeration dims are negative."""


class _Reading(NamedTuple):
    """What one site reads."""

    fn: Any
    """Its distribution, without masks."""
    mask: Tensor | bool | None
    scope: Sites | None
    """The sites that its log-probability depends on; None where each dim names its latent by itself."""
    own: bool
    """Whether it is a latent all of whose values can be listed along an axis of their own."""
    identity: object
    """What its distribution has in common with others that are the same function."""


class Scorer:
    """Makes the tensors of tables: log-probabilities. Others may stand in their place, of the same shapes."""

    of_draws = False
    """Whether the numbers are of how a draw came about: masks and weights, which say how it counts, do not touch it."""

    def listed(self, site: Site, fn: Any) -> Tensor:
        """One number for each value of a latent, shape `(*batch, K)`.

        Args:
            site: The latent.
            fn: Its distribution, without masks.
        """
        return listed(fn)

    def scored(self, site: Site, fn: Any) -> Tensor:
        """The numbers of a site's value, of a shape that broadcasts to the batch.

        Args:
            site: The site.
            fn: Its distribution, without masks.
        """
        return _scored(site, fn)

    def stacked(self, sites: Sequence[Site]) -> Tensor | None:
        """The numbers of equal sites one after the other, shape `(T, *batch)`; None where they differ after all.

        Args:
            sites: Sites with equal distributions.
        """
        return stacked_log_prob(sites)

    def chain(self, site: Site, chain: MarkovChain) -> tuple[Tensor, Tensor]:
        """The numbers of a chain's first states, `(*b, K)`, and of its transitions, `(*b, S, K, K)`.

        Args:
            site: The chain.
            chain: Its distribution.
        """
        return chain.log_initial(), chain.log_transition()


class DrawScorer(Scorer):
    """Scores draws by their log-probabilities alone."""

    of_draws = True


def counts_otherwise(site: Site, nesting: int) -> bool:
    """Whether a draw counts otherwise than it is drawn: under a mask, or with a weight that is part of its table.

    Args:
        site: A site of the guide.
        nesting: How many batch dims belong to plates.
    """
    return site.needs_score and (unmasked(site)[1] is not None or scale_reads_latents(site, nesting))


@dataclass(eq=False)
class Labeller:
    """Turns the sites of one enumerated run into factors."""

    layout: Layout
    provenance: Provenance | None
    homes: Mapping[str, frozenset[str]]
    """The plates of each enumerated latent."""
    choices: Mapping[str, int]
    """The index that each latent takes in this run that has one value in it."""
    draws: frozenset[str] = NO_SITES
    """Draws that count as variables with one value, so that terms know which of them they read."""
    lost: set[tuple[str, str, str]] = field(default_factory=set)
    """Program, site and latent where the site reads the latent and does not vary with it."""
    scorer: Scorer = field(default_factory=Scorer)
    """What the tables hold."""
    stars: Mapping[SiteKey, Star] = field(default_factory=dict)
    """Which elements of a latent of another plate some sites read."""
    impossible: Mapping[SiteKey, Tensor] = field(default_factory=dict)
    """Where sites have no distribution, at values that are impossible."""
    ran: Mapping[SiteKey, Site] = field(default_factory=dict)
    """The sites as they ran, where those that are labelled are parts of them: they know what they were made from."""

    def factors(self, sites: Mapping[SiteKey, Site], pins: Mapping[SiteKey, Pin]) -> dict[SiteKey, Factor]:
        """The factor of each site; those of equal sites share their numbers.

        Args:
            sites: The sites of an enumerated run.
            pins: Where latents have given values.
        """
        readings = {key: self._reading(site) for key, site in sites.items()}
        factors: dict[SiteKey, Factor] = {}
        for group in self._groups(sites, readings, pins):
            if len(group) == 1 or not self._label_group(group, sites, readings, factors):
                for key in group:
                    try:
                        factors[key] = self._factor(sites[key], readings[key], pins.get(key))
                    except Exception as error:
                        blame(error, readings[key].scope or NO_SITES)
                        raise
        return {key: factors[key] for key in sites}

    def _reading(self, site: Site) -> "_Reading":
        """What a site reads, and how it can be had."""
        fn, mask = unmasked(site)
        if self.provenance is None:
            return _Reading(fn, mask, None, self._may_be_listed(site, fn), None)
        of = self.provenance.of
        site = self._as_it_ran(site)
        sites, identity = self.provenance.look(site.fn)
        sites = sites.union(of(site.mask), of(site.scale), site.controls)
        listed_own = self._may_be_listed(site, fn) and site.name not in sites
        own = {site.name} if site.kind == "enumerated" or site.name in self.draws else NO_SITES
        return _Reading(fn, mask, sites.union(own, of(site.value)), listed_own, identity)

    def _may_be_listed(self, site: Site, fn: Any) -> bool:
        return site.kind == "enumerated" and site.name not in self.choices and is_listed(fn)

    def _groups(
        self, sites: Mapping[SiteKey, Site], readings: Mapping[SiteKey, "_Reading"], pins: Mapping[SiteKey, Pin]
    ) -> Iterable[list[SiteKey]]:
        """Sites that differ in nothing but which latents they read and which data they score."""
        shares = self.provenance is not None and self.provenance.shared is not None
        groups: dict[object, list[SiteKey]] = {}
        for key, site in sites.items():
            likeness = self._likeness(site, readings[key]) if shares and key not in pins else None
            groups.setdefault(key if likeness is None else likeness, []).append(key)
        return groups.values()

    def _likeness(self, site: Site, reading: "_Reading") -> object:
        """What equal sites have in common; None for a site that stands for itself."""
        alone = self.stars.keys() | self.impossible.keys()
        if (isinstance(site.scale, Tensor) and site.scale.dim()) or (site.role, site.name) in alone:
            return None
        if self.draws and reading.scope and not reading.scope.isdisjoint(self.draws):
            return None
        if reading.own:
            return site.role, site.plates, reading.identity
        if site.kind != "observed":
            return None
        value, mask = site.value, reading.mask
        masked_as = (mask.shape, mask.dtype) if isinstance(mask, Tensor) else mask
        return site.role, site.plates, reading.identity, value.shape, value.dtype, value.device, masked_as

    def _label_group(
        self,
        group: list[SiteKey],
        sites: Mapping[SiteKey, Site],
        readings: Mapping[SiteKey, "_Reading"],
        factors: dict[SiteKey, Factor],
    ) -> bool:
        """Labels equal sites together; returns whether that was possible."""
        first = sites[group[0]]
        if first.kind == "enumerated":
            pattern = self._pattern(self.scorer.listed(first, readings[group[0]].fn), first, own=True)
            tables = [Table(pattern.values, self._axes(pattern, sites[key], readings[key].scope)) for key in group]
        else:
            values = self.scorer.stacked([sites[key] for key in group])
            if values is None:
                return False
            pattern = self._pattern(values, first, stacked=True)
            stack = Stack(pattern.values)
            tables = [
                StackedTable(stack, index, self._axes(pattern, sites[key], readings[key].scope))
                for index, key in enumerate(group)
            ]
        for key, table in zip(group, tables, strict=True):
            factors[key] = self._finished(sites[key], readings[key].scope, table, sites[key].scale)
        return True

    def _factor(self, site: Site, reading: "_Reading", pin: Pin | None) -> Factor:
        """The factor of `site`: its log-probability under its mask, and its scale."""
        scope, own = reading.scope, reading.own
        if is_chain(site):
            return self._noted(site, scope, chain_factor(site, self, scope, pin, self.scorer.chain))
        values = self.scorer.listed(site, reading.fn) if own else self.scorer.scored(site, reading.fn)
        values = nowhere(values, self.impossible.get((site.role, site.name)), own)
        if site.kind != "enumerated":
            values = values if self.scorer.of_draws else masked(values, reading.mask)
        elif pin is not None:
            values = self._pinned(values, site, pin, own)
        star = self.stars.get((site.role, site.name))
        if star is not None:
            values, site = star.added(values, site, self.layout.nesting), star.site(site)
        scale = site.scale
        if site.kind != "enumerated" and scale_reads_latents(site, self.layout.nesting):
            values, scale = values if self.scorer.of_draws else times(values, torch.as_tensor(scale).to(values)), 1.0
        pattern = self._pattern(values, site, own=own)
        axes = self._axes(pattern, site, scope)
        drawn = tuple(sorted(scope & self.draws)) if scope else ()
        values = pattern.values
        table = Table(values.reshape([*values.shape, *(1,) * len(drawn)]) if drawn else values, (*axes, *drawn))
        return self._finished(site, scope, table, scale)

    def _finished(self, site: Site, scope: Sites | None, table: Table, scale: Tensor | float) -> Factor:
        return self._noted(site, scope, Factor(site.name, table, site.plate_names, self._weight(scale, site)))

    def _noted(self, site: Site, scope: Sites | None, factor: Factor) -> Factor:
        """The factor; reads of the site along which it does not vary are noted."""
        for name in scope.difference(factor.axes) if scope is not None else ():
            if name in self.homes and name != site.name and name not in self.choices:
                self.lost.add((site.role, site.name, name))
        return factor

    def scale(self, site: Site) -> Scale:
        """The weight of a site: a number, or one per plate element."""
        return self._weight(site.scale, site)

    def _weight(self, scale: Tensor | float, site: Site) -> Scale:
        if not isinstance(scale, Tensor):
            return float(scale)
        if not scale.dim() and not (scale.requires_grad and torch.is_grad_enabled()):
            return float(scale.detach())
        reads = None if self.provenance is None else self.provenance.of(self._as_it_ran(site).scale)
        return self.labelled(scale, site, reads)

    def _as_it_ran(self, site: Site) -> Site:
        """The site that knows what its tensors were made from."""
        return self.ran.get((site.role, site.name), site)

    def _pinned(self, values: Tensor, site: Site, pin: Pin, own: bool) -> Tensor:
        """The log-probabilities of a latent with its given value where it has one, at no cost."""
        where, index = torch.as_tensor(pin.where, device=values.device), pin.index.to(values.device)
        if site.name in self.choices:
            return torch.where(where, certain(index, torch.tensor(self.choices[site.name]), values), values)
        dim = -1 if own else self.layout.dims[site.name]
        every = torch.arange(values.shape[dim], device=values.device).reshape(-1, *(1,) * (-dim - 1))
        where, index = (part[..., None] if own and part.dim() else part for part in (where, index))
        return torch.where(where, certain(index, every, values), values)

    def labelled(self, values: Tensor, site: Site, scope: Sites | None) -> Table:
        """The table of a tensor whose dims lie as the layout says.

        Raises:
            PlateError: It varies along a latent from outside one of the latent's plates.
            StructureError: It varies along a batch dim that is no plate.
            StructureChanged: It varies along a latent that it is not known to read.
        """
        pattern = self._pattern(values, site)
        return Table(pattern.values, self._axes(pattern, site, scope))

    def labelled_before(self, values: Tensor, site: Site, scope: Sites | None, trailing: tuple[str, ...]) -> Table:
        """The table of a tensor whose dims lie as the layout says, but for the last ones, which have names."""
        pattern = self._pattern(values, site, trailing=len(trailing))
        axes = self._axes(pattern, site, None if scope is None else scope - {site.name})
        drawn = tuple(sorted(scope & self.draws)) if scope else ()
        shape = [*pattern.values.shape[: len(axes)], *(1,) * len(drawn), *pattern.values.shape[len(axes) :]]
        return Table(pattern.values.reshape(shape), (*axes, *drawn, *trailing))

    def _pattern(
        self, values: Tensor, site: Site, *, own: bool = False, stacked: bool = False, trailing: int = 0
    ) -> "_Pattern":
        """What of a tensor varies, and along what.

        Args:
            values: The tensor.
            site: A site around which its plates lie.
            own: Whether the last dim is that of the site's own values.
            stacked: Whether the first dim counts equal sites.
            trailing: How many of the last dims stay as they are, and get no name here.
        """
        plate_at = {plate.dim: plate for plate in site.plates}
        start, stop = int(stacked), values.dim() - int(own) - trailing
        dims: list[int | str] = []
        keep = list(values.shape[:start])
        for position, size in enumerate(values.shape[start:stop], start):
            if size == 1:
                continue
            dim = position - stop
            if -dim > self.layout.nesting:
                dims.append(dim)
            elif dim in plate_at and plate_at[dim].size == size:
                dims.append(plate_at[dim].name)
            else:
                raise no_plate(site, values.shape[start:stop], dim)
            keep.append(size)
        if own and values.shape[-1] != 1:
            dims.append(_OWN)
            keep.append(values.shape[-1])
        return _Pattern(values.reshape([*keep, *values.shape[values.dim() - trailing :]]), tuple(dims), own)

    def _axes(self, pattern: "_Pattern", site: Site, scope: Sites | None) -> tuple[str, ...]:
        """The names of a pattern's dims at a site."""
        if pattern.own and scope is not None:
            scope = scope - {site.name}
        return tuple(
            dim if isinstance(dim, str) else site.name if dim == _OWN else self._latent(dim, site, scope)
            for dim in pattern.dims
        )

    def _latent(self, dim: int, site: Site, scope: Sites | None) -> str:
        dims = self.layout.dims
        if scope is None:
            candidates = [name for name, its_dim in dims.items() if its_dim == dim]
        else:
            candidates = [name for name in scope if dims.get(name) == dim]
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


def _scored(site: Site, fn: Any) -> Tensor:
    try:
        values = product_table(fn, site.value)
        return log_prob(fn, site.value) if values is None else values
    except ValueError as error:
        if site.kind != "observed":
            raise
        fact, way_out = cannot_score(site, error)
        raise SupportError(fact, hint=way_out) from error


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
