"""The enumerated run of guide and model: two factor graphs over the same variables.

    log Q(v, w)     =  sum of guide_latents and guide_draws
    log P(v, w, u)  =  sum of model_latents, model_draws and observed

Every latent stands along its own axis with its whole support, so one run of each program makes all tables.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from pyro_vfe.engine.factors import Factor, FactorGraph, Subsample, Table, Variable
from pyro_vfe.errors import PlateError
from pyro_vfe.program.branches import Assignment
from pyro_vfe.program.operations import Operations
from pyro_vfe.program.path_axis import PATH, path_at
from pyro_vfe.program.recorder import Plate, Role, Site
from pyro_vfe.program.site_structure import elements_of
from pyro_vfe.program.stars import Star
from pyro_vfe.program.supports import is_point

SiteKey = tuple[Role, str]

Rescored = Callable[[Collection[SiteKey], Any], dict[SiteKey, Factor]]

PARTICLES = "num_particles_vectorized"
"""The plate of particles."""


def not_here(keys: Collection[SiteKey], scorer: Any) -> dict[SiteKey, Factor]:
    """What stands in for the making of other tables where runs, or whole tables, are not kept: nothing may ask for it.

    Args:
        keys: The sites.
        scorer: What would make their numbers.
    """
    raise AssertionError("statistics are taken where programs have been run and their tables made whole")


def is_random(site: Site) -> bool:
    """Whether a latent is drawn at random; a point estimate, a Delta, is not.

    Args:
        site: A site of either program.
    """
    return site.kind == "sampled" and not is_point(site.fn)


def _only_where(table: Table, here: Table) -> Table:
    """A log table with zero probability elsewhere."""
    axes = tuple(dict.fromkeys((*table.axes, *here.axes)))
    return Table(table.aligned(axes).where(here.aligned(axes), -math.inf), axes)


@dataclass(frozen=True, eq=False)
class Portions:
    """The elements of a plate a portion at a time: enumerations of it, made when they are asked for."""

    plate: str
    """The plate; nothing ties its elements together."""
    size: int
    """The number of its elements."""
    length: int
    """How many of them make a portion."""
    make: "Callable[[int, int], Enumeration]"
    """Makes the enumeration of some elements, from their first and their number. What lies outside of the plate is in
    the portion that begins with element 0."""

    @property
    def stretches(self) -> list[tuple[int, int]]:
        """The first element and the number of elements of each portion."""
        return [(start, min(self.length, self.size - start)) for start in range(0, self.size, self.length)]

    def __iter__(self) -> "Iterator[Enumeration]":
        return (self.make(*stretch) for stretch in self.stretches)

    def mapped(self, function: "Callable[[Enumeration], Enumeration]") -> "Portions":
        """The portions with something done to each when it is made."""
        return replace(self, make=lambda start, length: function(self.make(start, length)))

    def within(self, context: "Callable[[], AbstractContextManager[Any]]") -> "Portions":
        """The portions, each made within a context."""

        def make(start: int, length: int) -> "Enumeration":
            with context():
                return self.make(start, length)

        return replace(self, make=make)


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
    presence: Mapping[SiteKey, Table]
    """Where each latent of the model exists that a branch lacks or a mask removes, and each draw of the guide that a
    branch lacks: booleans, over the latents that decide it and its plates. Elsewhere an enumerated latent is pinned to
    its first value, which means nothing."""
    lost: frozenset[tuple[str, str, str]]
    """Program, site and latent where a site reads a latent and does not vary with it: to be checked against a run."""
    full_plates: Mapping[str, int]
    """The size of each plate before subsampling."""
    subsamples: Mapping[str, Tensor]
    """The elements of each plate that are present."""
    paths: tuple[Mapping[SiteKey, Site], ...]
    """The sites of each path of choices, where the programs branch on a latent; otherwise of the one run."""
    rescored: Rescored
    """Makes the factors of some sites again, of what a scorer says in place of log-probabilities."""
    portions: Portions | None = None
    """Where tables are too large to be made whole: the enumeration in portions. The tables are withheld then."""
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    """The constrained parameters that the run read, in the graph of its distributions; only where they are watched."""
    own_scores: Mapping[str, Factor] = field(default_factory=dict)
    """The log-probabilities of draws whose factors are something else: under a mask, or weighted by a latent."""
    read: tuple[Tensor, ...] = ()
    """What the programs read of parameters, and other leaves of the tables' graph: what gradients are written to."""
    zeros: bool = False
    """Whether some probability of exactly zero carries a gradient."""
    limits: Mapping[SiteKey, Factor] = field(default_factory=dict)
    """Factors with impossible entries that parameters can make possible, filled with what no sum tells from zero: F's
    gradient in these is theirs."""
    scores: Mapping[str, Factor | None] = field(default_factory=dict)
    """What gives a draw its gradient in place of its log-probability; None where other runs give it."""
    followed: Mapping[SiteKey, frozenset[str]] = field(default_factory=dict)
    """What each site read in an ordinary run: draws that are no variables, too."""
    stars: Mapping[SiteKey, Star] = field(default_factory=dict)
    """Which elements of a latent of another plate some sites read: their tables are added up there."""
    wholes: Mapping[str, tuple[Plate, ...]] = field(default_factory=dict)
    """The plates along which a latent is written out, one latent per element."""
    operations: tuple[Operations, ...] = ()
    """The operations of each path of choices."""
    uneven: Mapping[str, int] = field(default_factory=dict)
    """The largest size of each plate that differs in size from path to path."""
    choices: tuple[Assignment, ...] = ()
    """The path that each value of `PATH` means, where that is a variable: it has no site, and hangs on the latents."""

    def __getstate__(self) -> dict[str, Any]:
        """All but the programs' runs themselves: results can be pickled, and be read where the programs are not."""
        parameters = {name: value.detach() for name, value in self.parameters.items()}
        return {
            **self.__dict__,
            "rescored": not_here,
            "parameters": parameters,
            "own_scores": {},
            "scores": {},
            "limits": {},
            "read": (),
            "portions": None,
            "operations": (),
        }

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

    def numbers(self) -> "Enumeration":
        """The enumeration for who keeps it: without the runs that could make its factors again."""
        portions = None if self.portions is None else self.portions.mapped(Enumeration.numbers)
        nothing: dict[str, Any] = {name: {} for name in ("parameters", "own_scores", "scores", "limits")}
        paths = self.paths if self.uneven else ()  # They say how many data there are.
        return replace(self, paths=paths, rescored=not_here, read=(), portions=portions, operations=(), **nothing)

    @property
    def parts(self) -> "Iterable[Enumeration]":
        """The enumeration in portions, if it is made so; itself otherwise."""
        return (self,) if self.portions is None else self.portions

    def _group(self, role: Role, *kinds: str) -> tuple[Factor, ...]:
        return tuple(self.factors[key] for key, site in self.sites.items() if site.role == role and site.kind in kinds)

    def with_factors(self, factors: Mapping[SiteKey, Factor], variables: Mapping[str, Variable]) -> "Enumeration":
        """The enumeration with other tables."""
        return replace(self, factors=factors, variables=variables)

    def holding(self, draws: Collection[str]) -> "Enumeration":
        """The enumeration with all branches ruled out in which the guide makes other draws.

        Args:
            draws: The sites that it drew.
        """
        factors = dict(self.factors)
        for (role, name), where in self.presence.items():
            if role == "guide" and self.sites[role, name].kind == "sampled":
                here = where if name in draws else Table(~where.values, where.axes)
                for key in factors.keys() & {("guide", name), ("model", name)}:
                    factors[key] = factors[key].mapped(partial(_only_where, here=here))
        return replace(self, factors=factors)

    def with_path(self, indices: Mapping[str, Table]) -> dict[str, Table]:
        """The indices of latents' values, and of the path that they lead to where there is such a variable."""
        return {**indices, PATH: path_at(self.choices, indices)} if self.choices else dict(indices)

    def chain_plate(self, name: str) -> str | None:
        """The plate along which a latent is a chain, if it is one."""
        return self.variables[name].chain if name in self.variables else None

    @cached_property
    def closed(self) -> frozenset[str]:
        """What would be latent chains, had those that are observed in their place more than an end missing."""
        revealed = (site.reveals for site in self.sites.values() if site.reveals is not None)
        return frozenset(name for name in revealed if ("model", name) not in self.sites)

    @cached_property
    def draws(self) -> frozenset[str]:
        """The draws that count as variables with one value."""
        return frozenset(name for name in self.variables if name not in self.supports and name != PATH)

    @cached_property
    def guided(self) -> frozenset[str]:
        """The latents that both programs have: what F compares Q and P on."""
        return frozenset(f.name for f in self.guide_latents) & frozenset(f.name for f in self.model_latents)

    @cached_property
    def reads(self) -> dict[SiteKey, frozenset[str]]:
        """The latents, and the draws of the guide, on which the log-probability of each site depends."""
        drawn = frozenset(site.name for site in self.sites.values() if site.role == "guide" and is_random(site))
        graph = FactorGraph((), self.variables, self.plates)
        return {
            key: (self.followed.get(key, drawn) - self.variables.keys()).union(graph.scope(factor))
            for key, factor in self.factors.items()
        }

    @property
    def is_sampled(self) -> bool:
        """Whether the guide draws anything at random; a point estimate, a Delta, is not."""
        return any(site.role == "guide" and is_random(site) for site in self.sites.values())

    @cached_property
    def subsampled(self) -> tuple[Subsample, ...]:
        """The plates of which some elements are present, vectorised and sequential, by name."""
        return tuple(sorted(frozenset[Subsample]().union(*self._subsampled_around.values())))

    @cached_property
    def _subsampled_around(self) -> dict[str, frozenset[Subsample]]:
        """The subsampled plates around each site; a guide need not say it where the model does."""
        found: dict[str, frozenset[Subsample]] = {}
        for site in self.sites.values():
            if site.subsampled:
                found[site.name] = found.get(site.name, frozenset()) | site.subsampled
        return found

    @cached_property
    def drawn(self) -> dict[str, Tensor]:
        """What the guide drew, or gave as a point estimate, by site name."""
        return {
            name: site.value for (role, name), site in self.sites.items() if role == "guide" and site.kind == "sampled"
        }

    @cached_property
    def draws_tell_of_latents(self) -> bool:
        """Whether the guide draws something that depends on a latent it enumerates: Q(v) is then not Q(v | w)."""
        return any(not self.supports.keys().isdisjoint(factor.table.axes) for factor in self.guide_draws)

    @property
    def all_plates(self) -> tuple[str, ...]:
        """The names of all plates, vectorised and sequential."""
        sequential = (name for site in self.sites.values() for name in site.steps)
        return tuple(dict.fromkeys((*self.plates, *sequential)))

    def parts_of(self, name: str) -> tuple[str, ...]:
        """The latents that stand for one of the programs: itself, or its elements where it is written out."""
        return elements_of(name, self.wholes[name]) if name in self.wholes else (name,)

    def folded(self, names: Iterable[str]) -> tuple[str, ...]:
        """Names with the programs' own latents in place of their elements."""
        whole_of = {part: name for name in self.wholes for part in self.parts_of(name)}
        return tuple(dict.fromkeys(whole_of.get(name, name) for name in names))

    def batch_plates(self, name: str) -> tuple[Plate, ...]:
        """The plates around a latent of the model as the program has it."""
        plates = self.sites["model", self.parts_of(name)[0]].plates
        return (*plates, *self.wholes.get(name, ()))

    def check_kept(self, plates: Iterable[str]) -> None:
        """Checks that no site of these plates reads latents of others by index, which ties their elements together.

        Args:
            plates: The plates whose elements are to be told apart.

        Raises:
            PlateError: One does.
        """
        for (_, name), star in self.stars.items():
            inside = self.sites["model", name].plate_names - {plate.name for plate in star.home}
            for plate in sorted(inside.intersection(plates)):
                raise PlateError(
                    f"Site '{name}' reads a latent of another plate by index, and elements of '{plate}' that read the "
                    "same element of it are tied together.",
                    hint=f"Ask for the whole, or by '{star.home[0].name}'.",
                )

    def steps(self, plate: str) -> list["Enumeration"]:
        """The enumeration of each step of a sequential plate by itself.

        Raises:
            PlateError: A latent of one step, or outside of the plate, is read in another.
        """
        step_of = {key: self._step(site, plate) for key, site in self.sites.items()}
        count = max((step for step in step_of.values() if step is not None), default=-1) + 1
        home = {site.name: step_of[key] for key, site in self.sites.items() if site.kind == "enumerated"}
        for key, factor in self.factors.items():
            for name in factor.axes:
                if name in home and home[name] != step_of[key]:
                    raise PlateError(
                        f"Site '{factor.name}' reads latent '{name}' of another step of plate '{plate}', or "
                        f"from outside.",
                        hint="",
                    )
        return [self.restricted({key for key, own in step_of.items() if own == step}) for step in range(count)]

    def _step(self, site: Site, plate: str) -> int | None:
        """Which step of a sequential plate a site is of; a guide need not say it where the model does."""
        counterpart = self.sites.get(("model", site.name), site)
        return site.steps.get(plate, counterpart.steps.get(plate))

    def costs_of(self, keys: Collection[SiteKey]) -> "Enumeration":
        """The enumeration with the terms of some sites alone, under all of the guide's conditionals.

        Args:
            keys: The sites.
        """
        return replace(self, sites={key: site for key, site in self.sites.items() if key in keys})

    def restricted(self, keys: Collection[SiteKey]) -> "Enumeration":
        """The enumeration of some sites alone.

        Args:
            keys: The sites; what they read is among them.
        """
        sites = {key: site for key, site in self.sites.items() if key in keys}
        return replace(self, sites=sites, factors={key: self.factors[key] for key in sites})

    def graph(self, *factors: Factor) -> FactorGraph:
        """The given factors as a graph over this run's variables."""
        present = {axis for factor in factors for axis in factor.axes}
        present |= {factor.name for factor in factors}
        variables = {name: variable for name, variable in self.variables.items() if name in present}
        return FactorGraph(factors, variables, self.plates, self._subsampled_around)
