"""The enumerated run of guide and model: two factor graphs over the same variables.

    log Q(v, w)     =  sum of guide_latents and guide_draws
    log P(v, w, u)  =  sum of model_latents, model_draws and observed

Every latent stands along its own axis with its whole support, so one run of each program makes all tables.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from typing import Any

from torch import Tensor

from pyro_vfe.engine.factors import Factor, FactorGraph, Variable
from pyro_vfe.errors import PlateError, StructureError
from pyro_vfe.program.recorder import Role, Site
from pyro_vfe.program.supports import unwrapped

SiteKey = tuple[Role, str]

Rescored = Callable[[Collection[SiteKey], Any], dict[SiteKey, Factor]]

PARTICLES = "num_particles_vectorized"
"""The plate of particles."""


def _not_here(keys: Collection[SiteKey], scorer: Any) -> dict[SiteKey, Factor]:
    """What stands in for `rescored` where the runs are not kept.

    Raises:
        StructureError: Always.
    """
    raise StructureError(
        f"The factors of {len(keys)} sites were to be made again from a result, which holds numbers and no runs.",
        hint="Run the programs where the statistics are wanted.",
    )


def is_random(site: Site) -> bool:
    """Whether a latent is drawn at random; a point estimate, a Delta, is not.

    Args:
        site: A site of either program.
    """
    return site.kind == "sampled" and type(unwrapped(site.fn)).__name__ != "Delta"


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
    optional: frozenset[str]
    """Latents that some branch of the programs lacks: pinned there to their first value."""
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
    scores: Mapping[str, Factor | None] = field(default_factory=dict)
    """What gives a draw its gradient in place of its log-probability; None where other runs give it."""

    def __getstate__(self) -> dict[str, Any]:
        """All but the programs' runs themselves: results can be pickled, and be read where the programs are not."""
        parameters = {name: value.detach() for name, value in self.parameters.items()}
        return {
            **self.__dict__,
            "rescored": _not_here,
            "parameters": parameters,
            "own_scores": {},
            "scores": {},
            "portions": None,
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
        return replace(self, paths=(), rescored=_not_here, parameters={}, own_scores={}, scores={}, portions=portions)

    @property
    def parts(self) -> "Iterable[Enumeration]":
        """The enumeration in portions, if it is made so; itself otherwise."""
        return (self,) if self.portions is None else self.portions

    def _group(self, role: Role, *kinds: str) -> tuple[Factor, ...]:
        return tuple(self.factors[key] for key, site in self.sites.items() if site.role == role and site.kind in kinds)

    def with_factors(self, factors: Mapping[SiteKey, Factor], variables: Mapping[str, Variable]) -> "Enumeration":
        """The enumeration with other tables."""
        return replace(self, factors=factors, variables=variables)

    def chain_plate(self, name: str) -> str | None:
        """The plate along which a latent is a chain, if it is one."""
        return self.variables[name].chain if name in self.variables else None

    @cached_property
    def draws(self) -> frozenset[str]:
        """The draws that count as variables with one value."""
        return frozenset(name for name in self.variables if name not in self.supports)

    @cached_property
    def guided(self) -> frozenset[str]:
        """The latents that both programs have: what F compares Q and P on."""
        return frozenset(f.name for f in self.guide_latents) & frozenset(f.name for f in self.model_latents)

    @cached_property
    def data_sites(self) -> tuple[Site, ...]:
        """What the model observes; factors count where nothing else is observed."""
        seen = tuple(site for site in self.sites.values() if site.role == "model" and site.kind == "observed")
        return tuple(site for site in seen if type(site.fn).__name__ != "Unit") or seen

    @cached_property
    def plates_of_data(self) -> tuple[frozenset[str], frozenset[str]]:
        """The plates that all sites of data share: vectorised ones, and sequential ones."""
        if not self.data_sites:
            return frozenset(), frozenset()
        shared = frozenset.intersection(*(site.plate_names for site in self.data_sites))
        return shared - {PARTICLES}, frozenset.intersection(*(frozenset(site.steps) for site in self.data_sites))

    @property
    def num_data(self) -> int:
        """The number of data: elements of the plates that all observed sites share, before subsampling, and steps."""
        shared, in_steps = self.plates_of_data
        steps = (1 + max(site.steps[name] for site in self.data_sites) for name in in_steps)
        return math.prod((*(self.full_plates[name] for name in shared), *steps))

    @property
    def is_sampled(self) -> bool:
        """Whether the guide draws anything at random; a point estimate, a Delta, is not."""
        return any(site.role == "guide" and is_random(site) for site in self.sites.values())

    def plate_sets(self, plates: Collection[str]) -> list[tuple[str, ...]]:
        """Returns the sets of some vectorised plates, each sorted by name, those with the most elements first.

        Args:
            plates: The plates.
        """
        sets = (own for size in range(1, len(plates) + 1) for own in combinations(sorted(plates), size))
        return sorted(sets, key=lambda own: -math.prod(self.plates[plate] for plate in own))

    @cached_property
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
        return [self._restricted({key for key, own in step_of.items() if own == step}) for step in range(count)]

    def _step(self, site: Site, plate: str) -> int | None:
        """Which step of a sequential plate a site is of; a guide need not say it where the model does."""
        counterpart = self.sites.get(("model", site.name), site)
        return site.steps.get(plate, counterpart.steps.get(plate))

    def _restricted(self, keys: Collection[SiteKey]) -> "Enumeration":
        sites = {key: site for key, site in self.sites.items() if key in keys}
        return replace(self, sites=sites, factors={key: self.factors[key] for key in sites})

    def graph(self, *factors: Factor) -> FactorGraph:
        """The given factors as a graph over this run's variables."""
        present = {axis for factor in factors for axis in factor.axes}
        present |= {factor.name for factor in factors}
        variables = {name: variable for name, variable in self.variables.items() if name in present}
        return FactorGraph(factors, variables, self.plates)
