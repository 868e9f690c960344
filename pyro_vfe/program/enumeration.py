"""The enumerated run of guide and model: two factor graphs over the same variables.

    log Q(v, w)     =  sum of guide_latents and guide_draws
    log P(v, w, u)  =  sum of model_latents, model_draws and observed

Every latent stands along its own axis with its whole support, so one run of each program makes all tables.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_vfe.engine.factors import Factor, FactorGraph, Scale, Table, Variable
from pyro_vfe.errors import NameClashError, PlateError, ScaleError, StructureError, SupportError
from pyro_vfe.program.branches import Assignment, Paths, joined
from pyro_vfe.program.layout import Layout, Program
from pyro_vfe.program.masks import absences, check_absences
from pyro_vfe.program.provenance import Escaped, Provenance
from pyro_vfe.program.recorder import Plate, Recorder, Role, Site
from pyro_vfe.program.supports import check_same_support, finite_support, is_enumerable, support_size
from pyro_vfe.program.tables import Labeller, StructureChanged

SiteKey = tuple[Role, str]

PARTICLES = "num_particles_vectorized"
"""The plate of particles."""


@dataclass(frozen=True, eq=False)
class Enumeration:
    """What one enumerated run of a guide and a model says, in factors."""

    variables: Mapping[str, Variable]
    """Every enumerated latent, and every draw whose gradient needs the score function (with one value)."""
    plates: Mapping[str, int]
    """The size of each plate, as subsampled."""
    supports: Mapping[str, Tensor]
    """The values of each enumerated latent, shape `(K, *event_shape)`."""
    sites: Mapping[SiteKey, Site]
    """The sites of the (last) run, as they ran."""
    factors: Mapping[SiteKey, Factor]
    """The factor of each site."""
    full_plates: Mapping[str, int]
    """The size of each plate before subsampling."""
    subsamples: Mapping[str, Tensor]
    """The elements of each plate that are present."""

    @cached_property
    def guide_latents(self) -> tuple[Factor, ...]:
        """log Q(x | parents), one per enumerated latent of the guide, in order of sampling."""
        return self._group("guide", "enumerated")

    @cached_property
    def guide_draws(self) -> tuple[Factor, ...]:
        """log Q(w | parents) at the drawn values, and other log factors of the guide."""
        return self._group("guide", "sampled", "observed")

    @cached_property
    def model_latents(self) -> tuple[Factor, ...]:
        """log P(x | parents), one per enumerated latent of the model."""
        return self._group("model", "enumerated")

    @cached_property
    def model_draws(self) -> tuple[Factor, ...]:
        """log P(w | parents) at the guide's values."""
        return self._group("model", "sampled")

    @cached_property
    def observed(self) -> tuple[Factor, ...]:
        """log P(u | parents) of what is observed, and `pyro.factor` terms."""
        return self._group("model", "observed")

    def _group(self, role: Role, *kinds: str) -> tuple[Factor, ...]:
        return tuple(
            self.factors[key] for key, site in self.sites.items() if site.role == role and site.kind in kinds
        )

    def with_factors(self, factors: Mapping[SiteKey, Factor], variables: Mapping[str, Variable]) -> "Enumeration":
        """The enumeration with other tables."""
        return replace(self, factors=factors, variables=variables)

    @property
    def draws(self) -> frozenset[str]:
        """The draws that count as variables with one value."""
        return frozenset(name for name in self.variables if name not in self.supports)

    @property
    def guided(self) -> frozenset[str]:
        """The latents that both programs have: what F compares Q and P on."""
        return frozenset(f.name for f in self.guide_latents) & frozenset(f.name for f in self.model_latents)

    @property
    def num_data(self) -> int:
        """The number of data: elements, before subsampling, of the plates that all observed sites share."""
        seen = [site for site in self.sites.values() if site.role == "model" and site.kind == "observed"]
        seen = [site for site in seen if type(site.fn).__name__ != "Unit"] or seen
        shared = frozenset.intersection(*(site.plate_names for site in seen)) if seen else frozenset()
        return math.prod(self.full_plates[name] for name in shared - {PARTICLES})

    @property
    def draws_tell_of_latents(self) -> bool:
        """Whether the guide draws something that depends on a latent it enumerates: Q(v) is then not Q(v | w)."""
        return any(not self.supports.keys().isdisjoint(factor.table.axes) for factor in self.guide_draws)

    @property
    def all_plates(self) -> tuple[str, ...]:
        """The names of all plates, vectorised and sequential."""
        sequential = (name for site in self.sites.values() for name in site.steps)
        return tuple(dict.fromkeys((*self.plates, *sequential)))

    def steps(self, plate: str) -> list["Enumeration"]:
        """The enumeration of each step of a sequential plate by itself.

        Raises:
            PlateError: A latent of one step, or outside of the plate, is read in another.
        """
        count = max((site.steps[plate] for site in self.sites.values() if plate in site.steps), default=-1) + 1
        home = {site.name: site.steps.get(plate) for site in self.sites.values() if site.kind == "enumerated"}
        for key, factor in self.factors.items():
            for name in factor.table.axes:
                if name in home and home[name] != self.sites[key].steps.get(plate):
                    raise PlateError(
                        f"Site '{factor.name}' reads latent '{name}' of another step of plate '{plate}', or from outside.",
                        hint="Ask for the whole instead.",
                    )
        return [self._restricted(plate, step) for step in range(count)]

    def _restricted(self, plate: str, step: int) -> "Enumeration":
        sites = {key: site for key, site in self.sites.items() if site.steps.get(plate) == step}
        return replace(self, sites=sites, factors={key: self.factors[key] for key in sites})

    def graph(self, *factors: Factor) -> FactorGraph:
        """The given factors as a graph over this run's variables."""
        present = {axis for factor in factors for axis in factor.table.axes}
        present |= {factor.name for factor in factors}
        variables = {name: variable for name, variable in self.variables.items() if name in present}
        return FactorGraph(factors, variables, self.plates)


@dataclass(eq=False)
class _Run:
    """One path of choices: its sites and their factors."""

    sites: dict[SiteKey, Site]
    factors: dict[SiteKey, Factor]
    supports: dict[str, Tensor]
    subsamples: dict[str, Tensor]


def enumerate_programs(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    layout: Layout,
    *,
    given: Mapping[str, Tensor] | None = None,
    subsamples: Mapping[str, Tensor] | None = None,
    track: bool = False,
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
        track: Track the run even where the layout does not need it.

    Raises:
        StructureChanged: The programs no longer fit the layout.
    """
    runs: dict[Assignment, _Run] = {}
    paths = Paths()
    generator_state = torch.get_rng_state() if layout.sequential else None
    for _ in paths:
        if generator_state is not None:
            torch.set_rng_state(generator_state)
        try:
            run = _Runner(layout, paths, given or {}, subsamples or {}, track).run(model, guide, args, kwargs)
        except Escaped as escape:
            raise StructureChanged(str(escape)) from escape
        runs[paths.assignment()] = run
    return _collected(runs, layout)


class _Runner:
    """One run of both programs along one path of choices."""

    def __init__(
        self,
        layout: Layout,
        paths: Paths,
        given: Mapping[str, Tensor],
        subsamples: Mapping[str, Tensor],
        track: bool,
    ) -> None:
        self.layout = layout
        self.paths = paths
        self.given = given
        self.subsamples = subsamples
        self.provenance = Provenance() if track or layout.tracked else None
        self.supports: dict[str, Tensor] = {}

    def run(self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Run:
        first = Recorder(
            "guide",
            self._latent_value,
            given=self.given,
            subsamples=self.subsamples,
            sequential=self.layout.sequential,
            provenance=self.provenance,
        )
        first.run(guide, args, kwargs)
        second = Recorder(
            "model",
            self._latent_value,
            given={name: site.value for name, site in first.sites.items() if site.kind != "observed"},
            enumerated=frozenset(first.enumerated),
            subsamples=first.subsamples,
            sequential=self.layout.sequential,
            unread=self.layout.unread,
            provenance=self.provenance,
        )
        second.run(model, args, kwargs)
        sites: dict[SiteKey, Site] = {
            (site.role, site.name): site
            for site in (*first.sites.values(), *second.sites.values())
            if site.kind != "unread"
        }
        for name, site in second.sites.items():
            guide_site = first.sites.get(name)
            if guide_site is not None and guide_site.follows_model:
                guide_site.scale = site.scale
        return _Run(sites, self._factors(sites), self.supports, second.subsamples)

    def _latent_value(self, name: str, role: Role, fn: Any, plates: tuple[Plate, ...]) -> Tensor:
        support = finite_support(fn, name)
        self.supports[name] = support
        if name in self.layout.sequential:
            return support[self.paths.choose(name, len(support))]
        dim = self.layout.dims.get(name)
        if dim is None:
            raise StructureChanged(f"latent '{name}' is new")
        if any(-plate.dim > self.layout.nesting for plate in plates):
            raise StructureChanged(f"latent '{name}' lies in more plates")
        return support.reshape(support.shape[:1] + (1,) * (-dim - 1) + support.shape[1:])

    def _factors(self, sites: Mapping[SiteKey, Site]) -> dict[SiteKey, Factor]:
        homes = {site.name: site.plate_names for site in sites.values() if site.kind == "enumerated"}
        draws = frozenset(key[1] for key, site in sites.items() if _is_score_draw(key, site, self.layout))
        choices = dict(self.paths.assignment())
        labeller = Labeller(self.layout, self.provenance, homes, choices, draws)
        absent = absences(sites)
        for site in sites.values() if self.layout.unread else ():
            read = labeller.reads(site) & self.layout.unread
            if read:
                raise StructureChanged(f"site '{site.name}' reads '{min(read)}', which nothing read before")
        return {key: labeller.factor(site, absent=absent.get(site.name)) for key, site in sites.items()}


def _collected(runs: Mapping[Assignment, _Run], layout: Layout) -> Enumeration:
    """All runs as one enumeration."""
    last = list(runs.values())[-1]
    supports: dict[str, Tensor] = {}
    sites: dict[SiteKey, Site] = {}
    for run in runs.values():
        for name, support in run.supports.items():
            if name in supports and supports[name].shape != support.shape:
                raise SupportError(
                    f"Latent site '{name}' has {len(supports[name])} values in one branch of the program and "
                    f"{len(support)} in another.",
                    hint="Give the two sites different names.",
                )
            supports[name] = support
        sites.update(run.sites)
    _check_supports(sites, supports)
    if len(runs) == 1 and not layout.sequential:
        factors = last.factors
    else:
        factors = _joined_factors(runs, layout, supports, sites)
    return _enumeration(factors, sites, supports, last.subsamples, layout)


def _joined_factors(
    runs: Mapping[Assignment, _Run], layout: Layout, supports: Mapping[str, Tensor], sites: Mapping[SiteKey, Site]
) -> dict[SiteKey, Factor]:
    """Each site's tables of all runs, as one table with an axis per sequential latent."""
    sizes = {name: len(support) for name, support in supports.items()}
    made = [_choices_made(run, layout) for run in runs.values()]
    result = {}
    for key, site in sites.items():
        some = next(run.factors[key] for run in runs.values() if key in run.factors)
        tables = {path: _table_in(run, key, sites) for path, run in runs.items()}
        absent = _absent_table(some.table, site, sizes.get(site.name, 1))
        table = joined(tables, max(count.get(key, 0) for count in made), sizes, absent)
        result[key] = Factor(site.name, table, some.plates, some.scale)
    return result


def _table_in(run: _Run, key: SiteKey, sites: Mapping[SiteKey, Site]) -> Table | None:
    """The site's table in one run; None where the branch lacks the site, or where the model lacks the guide's latent."""
    role, name = key
    both = ("guide", name) in sites and ("model", name) in sites
    if not both or sites[key].kind != "enumerated":
        return run.factors[key].table if key in run.factors else None
    if ("model", name) in run.factors and ("guide", name) not in run.factors:
        raise StructureError(
            f"The model has latent site '{name}' in a branch where the guide, which has it elsewhere, has not.",
            hint=f"Sample '{name}' in the guide wherever the model does, or leave it out of the guide altogether.",
        )
    if role == "guide" and key in run.factors and ("model", name) not in run.factors:
        readers = [f.name for f in run.factors.values() if f.name != name and name in f.table.axes]
        if readers:
            raise StructureError(
                f"The guide has latent site '{name}' in a branch where the model has not, and '{readers[0]}' reads it.",
                hint=f"Sample '{name}' in the guide only where the model does.",
            )
        return None
    return run.factors[key].table if key in run.factors else None


def _choices_made(run: _Run, layout: Layout) -> dict[SiteKey, int]:
    """For each site of a run, how many sequential latents had their values when it was recorded."""
    met: set[str] = set()
    result = {}
    for key in run.sites:
        if key[1] in layout.sequential:
            met.add(key[1])
        result[key] = len(met)
    return result


def _absent_table(like: Table, site: Site, size: int) -> Table:
    """What stands for a site in a branch that lacks it: an observation costs nothing, a latent is its first value."""
    if site.kind != "enumerated" or size == 1:
        return Table(like.values.new_zeros(()), ())
    pinned = torch.full((size,), -torch.inf, dtype=like.values.dtype, device=like.values.device)
    pinned[0] = 0.0
    return Table(pinned, (site.name,))


def _check_supports(sites: Mapping[SiteKey, Site], supports: Mapping[str, Tensor]) -> None:
    """Guide and model must mean the same values."""
    for (role, name), site in sites.items():
        guide_site = sites.get(("guide", name))
        if role != "model" or guide_site is None or guide_site.kind == "observed":
            continue
        if site.kind == "observed":
            raise StructureError(
                f"Site '{name}' is observed in the model and sampled in the guide.",
                hint="Remove it from the guide, or do not observe it.",
            )
        if site.kind != "enumerated":
            continue
        if not is_enumerable(site.fn) or support_size(site.fn) != len(supports[name]):
            check_same_support(name, site.fn, guide_site.fn)


def _enumeration(
    factors: Mapping[SiteKey, Factor],
    sites: Mapping[SiteKey, Site],
    supports: Mapping[str, Tensor],
    subsamples: Mapping[str, Tensor],
    layout: Layout,
) -> Enumeration:
    variables: dict[str, Variable] = {}
    plates: dict[str, Plate] = {}
    for key, site in sites.items():
        for plate in site.plates:
            _check_plate(plates.setdefault(plate.name, plate), plate)
        if site.kind == "enumerated":
            factor = factors[key]
            size = len(supports[site.name])
            variable = Variable(site.name, size, site.plate_names, factor.scale)
            _check_scales(variables.setdefault(site.name, variable), variable)
        elif _is_score_draw(key, site, layout):
            variables[site.name] = Variable(site.name, 1, site.plate_names, factors[key].scale)

    result = Enumeration(
        variables=variables,
        plates={name: plate.size for name, plate in plates.items()},
        supports=supports,
        sites=sites,
        factors=factors,
        subsamples=subsamples,
        full_plates={name: plate.full_size for name, plate in plates.items()},
    )
    check_absences(result.guided, sites, factors.values(), layout)
    return result


def _check_plate(known: Plate, plate: Plate) -> None:
    if known.size != plate.size:
        raise NameClashError(
            f"Plate '{plate.name}' has size {known.size} at one site and {plate.size} at another.",
            hint="Give the two plates different names, or the same subsample.",
        )


def _check_scales(known: Variable, variable: Variable) -> None:
    if not same_scale(known.scale, variable.scale):
        raise ScaleError(
            f"Latent site '{variable.name}' has different scales in the guide and in the model: the free energy would "
            "not split into surprise and gap.",
            hint="Put the site under the same poutine.scale and the same subsampling in both programs.",
        )


def same_scale(one: Scale, other: Scale) -> bool:
    """Whether two weights are equal."""
    if isinstance(one, Table) and isinstance(other, Table):
        return one.axes == other.axes and torch.equal(one.values, other.values)
    return not isinstance(one, Table) and not isinstance(other, Table) and one == other


def _is_score_draw(key: SiteKey, site: Site, layout: Layout) -> bool:
    known = layout.sites.get(key)
    return site.kind == "sampled" and known is not None and known.needs_score
