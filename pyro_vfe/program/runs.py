"""Enumerated runs of guide and model: every latent along its own axis with its whole support.

One run of each program makes all tables; where the programs branch on a latent there is one run per value.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_vfe.engine.factors import Factor
from pyro_vfe.program.assembly import Run, assembled, joined_runs
from pyro_vfe.program.branches import Assignment, Paths
from pyro_vfe.program.buffers import one_advance
from pyro_vfe.program.chain_gaps import UNOBSERVED, has_gaps
from pyro_vfe.program.enumeration import Enumeration, SiteKey, not_here
from pyro_vfe.program.escapes import NO_SITES, Escaped, StructureChanged
from pyro_vfe.program.impossible_values import without_impossible
from pyro_vfe.program.layout import Layout, Program
from pyro_vfe.program.masking import unmasked
from pyro_vfe.program.masks import Absent, absences, mask_guide, masked_alone, masked_below, pins, presences, unread
from pyro_vfe.program.operations import Observer, Operations
from pyro_vfe.program.places import Places
from pyro_vfe.program.plate_violations import plate_violation
from pyro_vfe.program.portions import PortionedRun
from pyro_vfe.program.provenance import Provenance, untracked
from pyro_vfe.program.randomness import random_state, set_random_state
from pyro_vfe.program.recorder import ROLES, Plate, Role, Site, at_all_elements, record_both
from pyro_vfe.program.site_structure import elements_of
from pyro_vfe.program.sizeless import SizelessPlates
from pyro_vfe.program.stars import Star, index_of
from pyro_vfe.program.supports import common_support, finite_support
from pyro_vfe.program.tables import DrawScorer, Labeller, Scorer, counts_otherwise
from pyro_vfe.program.written_out import put_together, site_parts
from pyro_vfe.program.zeros import watched_zeros


def enumerate_programs(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    layout: Layout,
    *,
    given: Mapping[str, Tensor] | None = None,
    subsamples: Mapping[str, Tensor] | None = None,
    share: bool = False,
    differentiable: bool = True,
    pin_masked: bool = False,
    observer: Callable[[], Observer] = Operations,
) -> Enumeration:
    """Returns the factors of guide and model from one enumerated run (one per value where the programs branch).

    Args:
        model: The generative model.
        guide: The guide.
        args: Arguments of both.
        kwargs: Keyword arguments of both.
        layout: Where each latent goes.
        given: Values of draws to use instead of new ones.
        subsamples: Subsample indices to use instead of new ones.
        share: Do equal computations of a run once.
        differentiable: Whether the tables carry the graph that the programs made.
        pin_masked: Whether a latent that only the model has does not exist where it is masked, unless something reads
            it there; otherwise it has its prior there. The sums are the same, and its expected counts are not.
        observer: Makes what looks at the operations of each path of choices.

    Raises:
        StructureChanged: The programs no longer fit the layout.
        Unshareable: The programs write into what was shared.
    """
    runner = _Runner(layout, given or {}, subsamples or {}, share, differentiable, pin_masked, observer=observer)
    runs = runner.all_paths(model, guide, args, kwargs)
    return assembled(runs, layout, tuple(one for one in runner.observers if isinstance(one, Operations)))


def tables_at(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    layout: Layout,
    only: Mapping[str, int],
    *,
    given: Mapping[str, Tensor],
    subsamples: Mapping[str, Tensor],
    pin_masked: bool = False,
) -> dict[SiteKey, Factor]:
    """Returns the factors of guide and model where some latents have one value each: no other value is computed.

    Args:
        model: The generative model.
        guide: The guide.
        args: Arguments of both.
        kwargs: Keyword arguments of both.
        layout: Where each latent goes.
        only: The index of the one value of each of these latents.
        given: Values of all draws.
        subsamples: Subsample indices.
        pin_masked: As in `enumerate_programs`.
    """
    runner = _Runner(layout, given, subsamples, False, True, pin_masked, only)
    return joined_runs(runner.all_paths(model, guide, args, kwargs), layout)


class _Runner:
    """One run of both programs along one path of choices."""

    def __init__(
        self,
        layout: Layout,
        given: Mapping[str, Tensor],
        subsamples: Mapping[str, Tensor],
        share: bool,
        differentiable: bool,
        pin_masked: bool,
        only: Mapping[str, int] | None = None,
        observer: Callable[[], Observer] = Observer,
    ) -> None:
        self.pin_masked = pin_masked
        self.differentiable = differentiable
        self.layout = layout
        self.given = given
        self.subsamples = subsamples
        self.share = share and not layout.stars  # A distribution that is shared is made out of sight.
        self.only = only or {}
        self.paths = Paths()
        self.new_observer = observer
        self.observers: list[Observer] = []
        """What looked at the operations of each path."""
        self._begin()

    def _begin(self) -> None:
        """Forgets the run before."""
        self.observer = self.new_observer()
        self.places = Places(self.observer) if self.layout.stars else None
        self.provenance = Provenance(share=self.share, observer=self.places or self.observer)
        wholes = self.layout.wholes
        self.provenance.parts = {name: frozenset(elements_of(name, plates)) for name, plates in wholes.items()}
        self.supports: dict[str, Tensor] = {}
        self.choices: dict[str, int] = {}
        """The index of each latent that has one value in the run."""
        self.values: dict[object, tuple[Tensor, Tensor]] = {}

    def all_paths(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> dict[Assignment, Run]:
        """Runs guide and model once for each path of choices.

        Raises:
            StructureChanged: The programs no longer fit the layout.
        """
        if not self.layout.sequential and not self.layout.groups:
            return {(): self._one_path(model, guide, args, kwargs)}
        runs: dict[Assignment, Run] = {}
        state = random_state()
        with one_advance() as begin:
            for _ in self.paths:
                # Runs must agree in what they draw before they branch.
                set_random_state(state)
                begin()
                runs[self.paths.assignment()] = self._one_path(model, guide, args, kwargs)
        return runs

    def _one_path(self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Run:
        self._begin()
        try:
            run = self.run(model, guide, args, kwargs)
        except Escaped as escape:
            raise StructureChanged(f"latent '{min(escape.sites)}' leaves torch by {escape}") from escape
        self.observers.append(self.observer)
        return run

    def run(self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Run:
        """Runs guide and model once and returns their sites with their factors."""
        unvalidated = pyro.validation_enabled(False) if self.layout.unvalidated else nullcontext()
        with self.provenance.kept.saving() if self.layout.overwrites_saved else nullcontext(), unvalidated:
            first, second = record_both(
                model,
                guide,
                args,
                kwargs,
                self._latent_value,
                given=self.given,
                subsamples=self.subsamples,
                sizeless=SizelessPlates(self.layout.sizes_around),
                sequential=self.layout.sequential,
                unread=self.layout.unread,
                provenance=self.provenance,
            )
        for name, site in second.sites.items():
            guide_site = first.sites.get(name)
            if guide_site is not None and guide_site.follows_model:
                guide_site.scale = site.scale
        every = (*first.sites.values(), *second.sites.values())
        sites: dict[SiteKey, Site] = {(site.role, site.name): site for site in every if site.kind != "unread"}
        if self.layout.wholes:
            sites = {key: part for site in sites.values() for key, part in self._parts(site).items()}
        undrawn = absences(sites, kind="sampled")
        mask_guide(sites)
        self._close_chains(sites)
        self._check_unread(sites)
        self._check_room(sites)
        reads = self._reads(sites)
        sites, labeller = self._validated(sites)
        stars = labeller.stars
        plate = self._portioned_plate(sites)
        parameters = (*first.parameters, *second.parameters)
        with watched_zeros() as found:
            if plate is not None:
                run = self._portioned(sites, plate, replace(labeller, ran=sites), second.subsamples)
                return replace(run, zeros=found.any, parameters=parameters)
            factors, absent = self._factors(labeller, sites.keys(), sites)
        pinned = pins(absent, sites)

        def label(some: Mapping[SiteKey, Site], scorer: Scorer) -> dict[SiteKey, Factor]:
            return replace(labeller, scorer=scorer).factors(some, pinned)

        own = self._scores(labeller, sites)
        presence = presences({**absent, **undrawn}, sites, self.layout)
        self.provenance.finish()
        lost = frozenset(labeller.lost)
        made = sites, factors, self.supports, second.subsamples, lost, label, found.any, parameters, own
        return Run(*made, presence=presence, reads=reads, stars=stars)

    def _parts(self, site: Site) -> dict[SiteKey, Site]:
        """The site, or those of its elements where it is written out."""
        if site.name not in self.layout.wholes or site.kind != "enumerated":
            return {(site.role, site.name): site}
        with self.provenance:
            found = site_parts(site, self.layout.wholes)
        for part in found.values():
            part.value = part.value.view_as(part.value)
            self.provenance.originate(part.value, part.name)
        return found

    def _reads(self, sites: Mapping[SiteKey, Site]) -> dict[SiteKey, dict[int, str]]:
        """The latent that each site reads of each group of those whose values are taken one by one."""
        if not self.layout.groups:
            return {}
        homes = {site.name: site.plate_names for site in sites.values() if site.kind == "enumerated"}
        unseen, groups = self.layout.unseen, self.layout.groups
        scopes = {key: site.reads(self.provenance) | unseen.get(key, NO_SITES) for key, site in sites.items()}
        found = {}
        for key, site in sites.items():
            scope = scopes[key]
            if site.kind == "enumerated":  # Where one program masks a latent, it has no value in the other.
                scope = scope.union(*(scopes[role, site.name] for role in ROLES if (role, site.name) in sites))
            own = sorted(scope & groups.keys() & self.supports.keys())
            found[key] = {groups[name]: name for name in own}
            if len(found[key]) < len(own):
                raise StructureChanged(f"site '{key[1]}' reads {own}, and some of them have their values together")
            for latent in own:
                for plate in () if self.layout.stars.get(key) == latent else homes[latent] - site.plate_names:
                    raise plate_violation(site.name, site.role, latent, plate)
        return found

    def _validated(self, sites: dict[SiteKey, Site]) -> tuple[dict[SiteKey, Site], Labeller]:
        """The sites, valid where they were not validated, and what makes factors of them."""
        labeller = self._labeller(sites)
        if not self.layout.unvalidated:
            return sites, labeller
        valid, without = without_impossible(sites, self.layout, self.provenance)
        return valid, replace(labeller, ran=sites, impossible=without)

    def _close_chains(self, sites: dict[SiteKey, Site]) -> None:
        """Scores an observed chain at its data, where nothing is missing but ends that no site reads."""
        for key, site in list(sites.items()):
            name = site.reveals
            # With `obs_mask=` the latent has been asked for; and all paths of choices have the same latents.
            if name is None or name != site.name + UNOBSERVED or ("guide", name) in sites or self.layout.sequential:
                continue
            latent, mask = (site.role, name), unmasked(site)[1]
            others = (other for own, other in sites.items() if own not in (key, latent))
            gaps = isinstance(mask, Tensor) and has_gaps(mask)
            if not gaps and not any(name in other.reads(self.provenance) for other in others):
                sites[key] = replace(site, fn=sites.pop(latent).fn)
                del self.supports[name]

    def _factors(
        self, labeller: Labeller, keys: Collection[SiteKey], sites: Mapping[SiteKey, Site]
    ) -> tuple[dict[SiteKey, Factor], Absent]:
        """The factors of some of the sites, and where latents do not exist."""
        absent, alone = absences(sites), masked_alone(sites)
        wanted = {key: site for key, site in sites.items() if key in keys}
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.differentiable):
            factors = labeller.factors(wanted, pins(absent, sites))
            out = alone if self.pin_masked else masked_below(absent, alone, factors)
            if out:
                absent |= unread(out, sites, factors, self.layout)[0]
                again = {key: site for key, site in wanted.items() if key[1] in out}
                factors |= labeller.factors(again, pins(absent, sites))
        return factors, absent

    def _scores(self, labeller: Labeller, sites: Mapping[SiteKey, Site]) -> dict[SiteKey, Factor]:
        """The log-probabilities of those draws whose factors are something else."""
        found = {key: site for key, site in sites.items() if counts_otherwise(site, self.layout.nesting)}
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.differentiable):
            return replace(labeller, scorer=DrawScorer()).factors(found, {}) if found else {}

    def _portioned(
        self, sites: Mapping[SiteKey, Site], plate: str, labeller: Labeller, subsamples: dict[str, Tensor]
    ) -> Run:
        """The run with its tables withheld, which are made a portion of a plate at a time."""
        portioned = PortionedRun(
            sites, plate, lambda keys, portion: self._factors(labeller, keys, portion)[0], labeller.scale
        )
        portioned.scores = partial(self._scores, labeller)
        self.provenance.finish()
        factors = portioned.withheld()
        lost = frozenset(labeller.lost)
        return Run(dict(sites), factors, self.supports, subsamples, lost, not_here, portioned=portioned)

    def _portioned_plate(self, sites: Mapping[SiteKey, Site]) -> str | None:
        """The plate that is summed in portions, where it has more elements than one."""
        wanted = self.layout.portioning
        if wanted is None or self.layout.unvalidated:
            return None
        sizes = {plate.size for site in sites.values() for plate in site.plates if plate.name == wanted.plate}
        return wanted.plate if max(sizes, default=0) > wanted.length else None

    def _check_room(self, sites: Mapping[SiteKey, Site]) -> None:
        """Checks that plates have not grown by so much that their tables might not fit."""
        known, portioning = self.layout.plate_sizes, self.layout.portioning
        around = {id(site.plates): site.plates for site in sites.values()}
        for plates in around.values():
            rest = [plate for plate in plates if portioning is None or plate.name != portioning.plate]
            grown = prod(max(1.0, plate.size / max(1, known.get(plate.name, plate.size))) for plate in rest)
            if grown > self.layout.room:
                raise StructureChanged("a plate has grown so much that the tables may no longer fit")

    def _latent_value(self, name: str, role: Role, fn: Any, plates: tuple[Plate, ...]) -> Tensor:
        with untracked():
            if name in self.layout.sequential:
                support = self.supports[name] = self._own_values(name, fn)
                index = self.choices[name] = self.paths.choose(name, len(support))
                return support[index].clone()
            if any(-plate.dim > self.layout.nesting for plate in plates):
                raise StructureChanged(f"latent '{name}' lies in more plates")
            wholes = self.layout.wholes.get(name)
            if wholes is None:
                return self._value(name, fn, plates)
            if not set(wholes) <= set(plates):
                raise StructureChanged(f"latent '{name}' lies in other plates")
            others = tuple(plate for plate in plates if plate not in wholes)
            parts = [self._value(element, fn, others) for element in elements_of(name, wholes)]
            return put_together(parts, wholes, len(fn.event_shape))

    def _value(self, name: str, fn: Any, plates: tuple[Plate, ...]) -> Tensor:
        """The values of a latent, or of an element of one: all along its dim, or one of them."""
        if name in self.layout.groups:
            return self._one_value(name, fn, plates)
        dim = self.layout.dims.get(name)
        if dim is None:
            raise StructureChanged(f"latent '{name}' is new")
        return self._all_values(name, fn, dim)

    def _one_value(self, name: str, fn: Any, plates: tuple[Plate, ...]) -> Tensor:
        """One value of a latent, the same for all elements of its plates, in the shape of a draw."""
        support = self.supports[name] = self._own_values(name, fn)
        group = self.layout.groups[name]
        index = min(self.paths.choose(group, self.layout.group_sizes[group]), len(support) - 1)
        self.choices[name] = index
        value = at_all_elements(support[index], plates)
        if self.places is not None and name in self.layout.stars.values():
            self.places.originate(value, name)
        return value

    def _all_values(self, name: str, fn: Any, dim: int) -> Tensor:
        """The support along batch dim `dim`: one tensor for all latents with the same values there, where equal steps
        are shared."""
        shared = self.provenance.shared
        kind = common_support(fn) if shared is not None else None
        known = self.values.get((kind, dim))
        if known is None:
            support = self._own_values(name, fn)
            known = support, support.reshape(support.shape[:1] + (1,) * (-dim - 1) + support.shape[1:])
            if shared is not None and kind is not None:
                self.values[kind, dim] = known
                shared.protect(known[1])
        self.supports[name] = known[0]
        # The program may write into a value, and the support stays what it is.
        return known[1].clone() if kind is None else self.provenance.alias(known[1], NO_SITES)

    def _own_values(self, name: str, fn: Any) -> Tensor:
        """The values that a latent takes: its support, or one of it."""
        support = finite_support(fn, name)
        return support if name not in self.only else support[self.only[name]].unsqueeze(0)

    def _check_unread(self, sites: Mapping[SiteKey, Site]) -> None:
        for site in sites.values() if self.layout.unread else ():
            read = site.reads(self.provenance) & self.layout.unread
            if read:
                raise StructureChanged(f"site '{site.name}' reads '{min(read)}', which nothing read before")

    def _labeller(self, sites: Mapping[SiteKey, Site]) -> Labeller:
        homes = {site.name: site.plate_names for site in sites.values() if site.kind == "enumerated"}
        draws = frozenset(site.name for site in sites.values() if site.needs_score)
        return Labeller(self.layout, self.provenance, homes, self.choices, draws, stars=self._stars(sites))

    def _stars(self, sites: Mapping[SiteKey, Site]) -> dict[SiteKey, Star]:
        """Which elements of a latent of another plate some sites read.

        Raises:
            PlateError: A site reads more than one of them at an element.
        """
        home = {site.name: site.plates for site in sites.values() if site.kind == "enumerated"}
        found = {}
        for key, latent in self.layout.stars.items():
            if key in sites and self.places is not None:
                index = index_of(sites[key], self.places, partial(self._was_computed_from, latent))
                if index is None:
                    outside = {plate.name for plate in home[latent]} - sites[key].plate_names
                    raise plate_violation(key[1], key[0], latent, min(outside))
                found[key] = Star(home[latent], index)
        return found

    def _was_computed_from(self, latent: str, tensor: object) -> bool:
        return latent in self.provenance.of(tensor)
