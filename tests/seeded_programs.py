"""Random programs that are named by a number: scaled and subsampled plates, branches, chains, masks, zeros in tables.

Beside `random_programs.py`: a seed, and not a strategy, decides, so that a failure is named by its number. A
specification lists sites in the order in which the program meets them. A table is read at the parents' values; the
tables of probabilities, means and rates are leaves in Pyro's store, whose entries may be exactly 0 or 1.
"""

import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_vfe as vfe

MAX_ASSIGNMENTS = 400
"""Of the model's latents, the elements of plates apart."""

SIZES = {"categorical_2": 2, "categorical_3": 3, "bernoulli": 2, "one_hot_3": 3, "binomial_2": 3, "chain_2": 2}
"""Kinds of sites with a finite support, and how many values they have."""

MASKS = ("fixed", "of_fn", "obs_mask", "latent")

DATA = ("normal", "poisson", "bernoulli", "categorical_3")

KINDS = {
    "chain": 0.25,
    "gaps": 0.8,
    "branch": 0.35,
    "subsample": 0.35,
    "scale": 0.35,
    "zeros": 0.45,
    "mask": 0.45,
    "in_place": 0.25,
    "absent": 0.1,
}
"""What a program may have, and how often it has it."""


class _Shown:
    """Prints as the call that makes it, without what is as usual."""

    def __repr__(self) -> str:
        usual = {field.name: field.default for field in fields(self)}  # type: ignore[arg-type]
        given = [f"{name}={value!r}" for name, value in vars(self).items() if value != usual[name]]
        return f"{type(self).__name__}({', '.join(given)})"


@dataclass(frozen=True, repr=False)
class PlateSpec(_Shown):
    """One plate."""

    name: str
    size: int
    dim: int
    kept: tuple[int, ...] | None = None
    """The indices of a subsample."""

    @property
    def length(self) -> int:
        """How many elements are there."""
        return self.size if self.kept is None else len(self.kept)

    @property
    def weight(self) -> float:
        """For how many elements of the data set one element stands."""
        return self.size / self.length


@dataclass(frozen=True, repr=False)
class SiteSpec(_Shown):
    """One site."""

    name: str
    kind: str
    """A key of SIZES, or one of DATA."""

    plates: tuple[str, ...] = ()
    parents: tuple[str, ...] = ()
    """Latents that its table is indexed by."""

    when: tuple[tuple[str, int], ...] = ()
    """The site is there only where these latents have these values; the program branches on them in Python."""

    observed: bool = False
    zeros: str = ""
    """Exact zeros in the table: a "column", some "cells", or all but one entry of each row ("certain")."""

    logits: bool = False
    """Whether the table's leaf holds logits."""

    tilted: bool = False
    """Whether the table differs from element to element."""

    scale: str = ""
    """A scale of its own: a "number", a number for each of the "elements" of its plates, or a "parameter"."""

    mask: str = ""
    """How elements are taken out: a "fixed" poutine.mask, a mask "of_fn", an "obs_mask", the program's "running" mask,
    or what the first parent says ("latent")."""


@dataclass(frozen=True, repr=False)
class ProgramSpec(_Shown):
    """A model, a guide over some of its latents, and the plates of both."""

    seed: int
    plates: tuple[PlateSpec, ...]
    model: tuple[SiteSpec, ...]
    guide: tuple[SiteSpec, ...]
    scaled: tuple[tuple[str, str], ...] = ()
    """Plates around whose sites both programs put a poutine.scale, each with its kind (`SiteSpec.scale`)."""

    running: tuple[str, ...] | None = None
    """The plates of a mask that the model changes in place after each statement that stands under it."""

    @property
    def kinds(self) -> list[str]:
        """What is in the program, for the reader of a failure."""
        sites = (*self.model, *self.guide)
        has = {
            "subsample": any(plate.kept for plate in self.plates),
            "crossing": any(len(site.plates) > 1 for site in self.model),
            "scale": bool(self.scaled) or any(site.scale for site in self.model),
            "branch": any(site.when for site in self.model),
            "chain": any(site.kind == "chain_2" for site in sites),
            "gaps": any(site.kind == "chain_2" and site.observed and site.mask for site in self.model),
            "absent": any(not site.observed and site.mask for site in self.model),
            "mask": any(site.observed and site.mask not in ("", "running") for site in self.model),
            "in_place": self.running is not None,
            "zeros": any(site.zeros for site in sites),
            "guide": bool(self.guide),
        }
        return [kind for kind, there in has.items() if there]

    def plates_of(self, site: SiteSpec) -> tuple[PlateSpec, ...]:
        """The plates around a site, from left to right."""
        return tuple(sorted((plate for plate in self.plates if plate.name in site.plates), key=lambda p: p.dim))

    def batch_shape(self, plates: Iterable[str]) -> tuple[int, ...]:
        """The shape of a tensor over some plates."""
        sizes = {plate.dim: plate.length for plate in self.plates if plate.name in plates}
        return tuple(sizes.get(dim, 1) for dim in range(min(sizes), 0)) if sizes else ()

    def numbers(self, key: str, *shape: int) -> Tensor:
        """Standard normal numbers that belong to a word."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {key}".encode()))
        return torch.randn(shape, generator=generator, dtype=torch.float64)


# The numbers of a specification, which the programs and the oracle read alike.


def table(spec: ProgramSpec, site: SiteSpec, prefix: str) -> Tensor:
    """The leaf of a site's probabilities, `(*parents, K)`; `(*parents,)` of a yes, `(*parents, K, K)` of a chain."""
    return _leaf(spec, site, f"{prefix}_{site.name}", _of_a_yes(site), site.kind == "chain_2")


def beginning(spec: ProgramSpec, site: SiteSpec, prefix: str) -> Tensor:
    """The leaf of the probabilities of a chain's first state, `(K,)`."""
    return _leaf(spec, replace(site, parents=(), zeros="", logits=False), f"{prefix}_{site.name}_first", False, False)


def _leaf(spec: ProgramSpec, site: SiteSpec, name: str, of_a_yes: bool, moves: bool) -> Tensor:
    num_values = SIZES.get(site.kind, 3)
    shape = tuple(SIZES[_kind_of(spec, parent)] for parent in site.parents) + (num_values,) * moves
    logits = spec.numbers(name, *shape, 2 if of_a_yes else num_values)
    keep = _kept_entries(site, logits)
    if site.logits:
        return pyro.param(name, logits.where(keep, -torch.inf))
    probs = logits.softmax(-1).where(keep, 0.0)
    probs = probs / probs.sum(-1, keepdim=True)
    return pyro.param(name, probs[..., 1].clone() if of_a_yes else probs)


def _kept_entries(site: SiteSpec, logits: Tensor) -> Tensor:
    num_values = logits.shape[-1]
    if site.zeros == "column":
        return (torch.arange(num_values) != zlib.crc32(site.name.encode()) % num_values).expand(logits.shape)
    if site.zeros == "cells":
        return torch.ones_like(logits).bool().scatter(-1, logits.argmin(-1, keepdim=True), False)
    if site.zeros == "certain":
        return torch.zeros_like(logits).bool().scatter(-1, logits.argmax(-1, keepdim=True), True)
    return torch.ones_like(logits).bool()


def _of_a_yes(site: SiteSpec) -> bool:
    return site.kind in ("bernoulli", "binomial_2")


def _kind_of(spec: ProgramSpec, name: str) -> str:
    return next(site.kind for site in spec.model if site.name == name)


def tilt(spec: ProgramSpec, site: SiteSpec, prefix: str) -> Tensor:
    """What a table is multiplied by, from element to element: `(*batch, K)`, or `(*batch,)` of a yes."""
    shape = spec.batch_shape(site.plates)
    if _of_a_yes(site):
        return 0.4 + 0.6 * spec.numbers(f"tilt {prefix} {site.name}", *shape).sigmoid()
    return (0.5 * spec.numbers(f"tilt {prefix} {site.name}", *shape, SIZES.get(site.kind, 3))).exp()


def means(spec: ProgramSpec, site: SiteSpec) -> Tensor:
    """The leaf of a normal datum's means, `(*parents,)`."""
    shape = [SIZES[_kind_of(spec, parent)] for parent in site.parents]
    return pyro.param(f"mean_{site.name}", spec.numbers(f"mean {site.name}", *shape))


def rates(spec: ProgramSpec, site: SiteSpec) -> Tensor:
    """A leaf of one number times what opens and shuts it: a count's rates, `(*parents,)`, exactly 0 here and there."""
    shape = [SIZES[_kind_of(spec, parent)] for parent in site.parents]
    gate = spec.numbers(f"gate {site.name}", *shape).exp()
    if site.zeros and shape:
        gate = gate * torch.ones(shape[0]).index_fill(0, torch.tensor(0), 0.0).reshape(-1, *[1] * (len(shape) - 1))
    return pyro.param(f"rate_{site.name}", spec.numbers(f"rate {site.name}").exp()) * gate


def datum(spec: ProgramSpec, site: SiteSpec) -> Tensor:
    """What was observed, of the site's batch shape."""
    noise = spec.numbers(f"datum {site.name}", *spec.batch_shape(site.plates))
    if site.kind == "normal":
        return noise
    if site.kind == "poisson":
        return (noise.abs() * 1.5).floor()
    if site.kind in ("chain_2", "bernoulli"):
        return (noise > 0).to(torch.float64 if site.kind == "bernoulli" else torch.int64)
    return (noise.abs() * 2).floor().clamp(max=2).long()


def fixed_mask(spec: ProgramSpec, site: SiteSpec) -> Tensor:
    """Which elements of a site are there; a latent chain may lack its end alone."""
    shape = spec.batch_shape(site.plates)
    mask = spec.numbers(f"mask {site.name}", *shape) < 0.4
    return mask.cummin(-1).values if site.kind == "chain_2" and not site.observed else mask


def running_mask(spec: ProgramSpec) -> Tensor:
    """The running mask as it begins."""
    return spec.numbers("running", *spec.batch_shape(spec.running or ())) < 0.3


def change_mask(spec: ProgramSpec, site: SiteSpec, mask: Tensor) -> None:
    """Changes the running mask in place, after a site."""
    new = spec.numbers(f"running {site.name}", *mask.shape)
    if zlib.crc32(site.name.encode()) % 2:
        mask |= new > 0.3
    else:
        mask &= new > -0.3


def scale_of(spec: ProgramSpec, name: str, kind: str, plates: Iterable[str]) -> float | Tensor:
    """A scale: of a plate's sites or of one site."""
    number = 0.5 + 2 * float(spec.numbers(f"scale {name}").sigmoid())
    if kind == "number":
        return round(number, 2)
    if kind == "parameter":
        return pyro.param(f"scale_{name}", torch.tensor(number, dtype=torch.float64))
    return 0.5 + spec.numbers(f"scales {name}", *spec.batch_shape(plates)).exp()


# The Pyro programs


def model_of(spec: ProgramSpec) -> Callable[[], None]:
    """The Pyro model of a specification."""

    def model() -> None:
        _run(spec, spec.model, "theta")

    return model


def guide_of(spec: ProgramSpec) -> Callable[[], None]:
    """The Pyro guide of a specification."""

    def guide() -> None:
        _run(spec, spec.guide, "phi")

    return guide


def _run(spec: ProgramSpec, sites: tuple[SiteSpec, ...], prefix: str) -> None:
    values: dict[str, Tensor] = {}
    plates = {
        plate.name: pyro.plate(
            plate.name,
            plate.size,
            dim=plate.dim,
            subsample=None if plate.kept is None else torch.tensor(plate.kept),
        )
        for plate in spec.plates
    }
    running = running_mask(spec)
    for site in sites:
        if not all(values[name].item() == value for name, value in site.when):
            values[site.name] = torch.tensor(0)
            continue
        with ExitStack() as stack:
            for name in site.plates:
                stack.enter_context(plates[name])
            for context in _contexts(spec, site, values, running):
                stack.enter_context(context)
            fn = _distribution(spec, site, prefix, values)
            if site.mask == "of_fn":
                fn = fn.mask(fixed_mask(spec, site))
            obs = datum(spec, site) if site.observed else None
            obs_mask = fixed_mask(spec, site) if site.mask == "obs_mask" else None
            value = pyro.sample(site.name, fn, obs=obs, obs_mask=obs_mask)
        values[site.name] = value.argmax(-1) if site.kind == "one_hot_3" else value.long()
        if site.mask == "running":
            change_mask(spec, site, running)


def _contexts(spec: ProgramSpec, site: SiteSpec, values: dict[str, Tensor], running: Tensor) -> Iterator[Any]:
    for name, kind in spec.scaled:
        if name in site.plates:
            yield pyro.poutine.scale(scale=scale_of(spec, name, kind, (name,)))
    if site.scale:
        yield pyro.poutine.scale(scale=scale_of(spec, site.name, site.scale, site.plates))
    if site.mask == "fixed":
        yield pyro.poutine.mask(mask=fixed_mask(spec, site))
    if site.mask == "running":
        yield pyro.poutine.mask(mask=running)
    if site.mask == "latent":
        yield pyro.poutine.mask(mask=values[site.parents[0]] != 0)


def _distribution(spec: ProgramSpec, site: SiteSpec, prefix: str, values: dict[str, Tensor]) -> Any:
    index = tuple(values[parent] for parent in site.parents)
    if site.kind == "normal":
        return dist.Normal(means(spec, site)[index], 0.8)
    if site.kind == "poisson":
        return dist.Poisson(rates(spec, site)[index])
    read = table(spec, site, prefix)[index]
    if site.kind == "chain_2":
        timed = any("time" in parent.plates for parent in spec.model if parent.name in site.parents)
        steps = next(plate.length for plate in spec.plates if plate.name == "time") if timed else None
        moves = read.softmax(-1) if site.logits else read
        return vfe.MarkovChain(beginning(spec, site, prefix), moves, num_steps=steps)
    if site.logits and _of_a_yes(site):
        read = read.softmax(-1)[..., 1]
    elif site.logits:
        return _of_kind(site, logits=read + tilt(spec, site, prefix).log() if site.tilted else read)
    return _of_kind(site, probs=read * tilt(spec, site, prefix) if site.tilted else read)


def _of_kind(site: SiteSpec, **given: Tensor) -> Any:
    if site.kind == "bernoulli":
        return dist.Bernoulli(**given)
    if site.kind == "binomial_2":
        return dist.Binomial(2, **given)
    return dist.OneHotCategorical(**given) if site.kind == "one_hot_3" else dist.Categorical(**given)


# Drawing specifications


def program_spec(seed: int, without: Iterable[str] = ()) -> ProgramSpec:
    """The program of a number.

    Args:
        seed: The number.
        without: Keys of KINDS that no program is to have.
    """
    return _Draw(seed, frozenset(without)).program()


def _may_switch(site: SiteSpec) -> bool:
    """Whether a program can branch on a latent."""
    return not site.plates and not site.mask and site.kind != "one_hot_3"


class _Draw:
    """One specification in the making."""

    def __init__(self, seed: int, without: frozenset[str]) -> None:
        self.seed, self.random = seed, random.Random(seed)
        self.wants = {kind: self.random.random() < often for kind, often in KINDS.items()}
        self.wants = {kind: wanted and kind not in without for kind, wanted in self.wants.items()}
        if self.wants["zeros"]:  # A power of zero has no gradient to compare.
            self.wants["scale"] = False
        self.plates = self._plates()
        self.latents: list[SiteSpec] = []
        self.sites: list[SiteSpec] = []
        inside = tuple(plate.name for plate in self.plates if self.chance(0.6))
        self.running = inside if self.wants["in_place"] else None

    def chance(self, often: float) -> bool:
        """Whether it happens."""
        return self.random.random() < often

    def program(self) -> ProgramSpec:
        """Draws latents, the data that hang on them, and a guide."""
        for n in range(self.random.randint(1, 6)):
            self._add_latent(f"v_{n}")
            for _ in range(self.random.choice((0, 1, 1, 2))):
                self._add_datum()
        if self.wants["chain"] and self.chance(0.5):
            self._add(self._observed_chain())
        if not any(site.observed for site in self.sites):
            self._add_datum()
        scaled = tuple((plate.name, self._scale(("number", "elements", "parameter"))) for plate in self.plates)
        scaled = tuple((name, kind) for name, kind in scaled if self.wants["scale"] and self.chance(0.4))
        running = self.running if any(site.mask == "running" for site in self.sites) else None
        return ProgramSpec(self.seed, self.plates, tuple(self.sites), self._guide(), scaled, running)

    def _plates(self) -> tuple[PlateSpec, ...]:
        if self.wants["chain"]:
            plates = [PlateSpec("time", self.random.randint(2, 4), -1)]
            if self.chance(0.5):
                plates.append(PlateSpec("sequences", 2, -2))
        else:
            plates = [
                PlateSpec(f"plate_{n}", self.random.randint(2, 3), -1 - n)
                for n in range(self.random.choice((0, 1, 1, 2, 2)))
            ]
        return tuple(
            self._subsampled(plate) if self.wants["subsample"] and plate.name != "time" and self.chance(0.6) else plate
            for plate in plates
        )

    def _subsampled(self, plate: PlateSpec) -> PlateSpec:
        size = plate.size + self.random.randint(0, 2)
        kept = self.random.sample(range(size), self.random.randint(1, min(size, 2)))
        return replace(plate, size=size, kept=tuple(sorted(kept)))

    def _some_plates(self) -> tuple[str, ...]:
        return tuple(plate.name for plate in self.plates if self.chance(0.5))

    def _add_latent(self, name: str) -> None:
        if self.wants["chain"] and (not self.latents or self.chance(0.3)):
            plates = tuple(plate.name for plate in self.plates if plate.name == "time" or self.chance(0.6))
            kind = "chain_2"
        elif self.wants["branch"] and not any(map(_may_switch, self.latents)):
            plates, kind = (), self.random.choice(("categorical_2", "categorical_3", "bernoulli", "binomial_2"))
        else:
            plates, kind = self._some_plates(), self.random.choice([kind for kind in SIZES if kind != "chain_2"])
        when = self._when()
        site = SiteSpec(
            name,
            kind,
            plates,
            self._parents(plates, when),
            when,
            zeros=self._zeros(),
            logits=kind != "chain_2" and self.chance(0.3),
            tilted=kind != "chain_2" and self.chance(0.5),
            scale=self._scale(("number", "elements", "parameter")) if self.wants["scale"] and self.chance(0.25) else "",
            mask="fixed" if self.wants["absent"] and plates and self.chance(0.5) else "",
        )
        if self._assignments((*self.latents, site)) <= MAX_ASSIGNMENTS:
            self._add(site)
            self.latents.append(site)

    def _add_datum(self) -> None:
        """A datum of one or two latents, in the plates of both and perhaps in more."""
        parents = self.random.sample(self.latents, min(len(self.latents), self.random.choice((1, 1, 2))))
        inside = {name for parent in parents for name in parent.plates} | set(self._some_plates())
        when = max((parent.when for parent in parents), key=len, default=())
        when = when if all(parent.when == when[: len(parent.when)] for parent in parents) else ()
        site = SiteSpec(
            f"u_{len(self.sites)}",
            self.random.choice(DATA),
            tuple(plate.name for plate in self.plates if plate.name in inside),
            tuple(parent.name for parent in parents),
            when,
            observed=True,
            zeros=self._zeros() if self.chance(0.6) else "",
            scale=self._scale(("number", "elements", "parameter")) if self.wants["scale"] and self.chance(0.25) else "",
            mask=self.random.choice(("fixed", "of_fn", "obs_mask", "latent"))
            if self.wants["mask"] and self.chance(0.4)
            else "",
        )
        if site.mask == "latent" and not parents:
            site = replace(site, mask="fixed")
        self._add(site)
        if self.running is not None and set(self.running) <= inside and not when:
            self.sites[-1] = replace(site, mask="running")
            self._add(replace(site, name=f"{site.name}_again", mask="running"))

    def _observed_chain(self) -> SiteSpec:
        plates = tuple(plate.name for plate in self.plates)
        parents = tuple(site.name for site in self.latents if "time" not in site.plates and not site.when)[:1]
        mask = "fixed" if self.wants["gaps"] else ""
        site = SiteSpec(f"u_{len(self.sites)}", "chain_2", plates, parents, observed=True, mask=mask)
        return site if self._assignments((*self.latents, site)) <= MAX_ASSIGNMENTS else replace(site, mask="")

    def _add(self, site: SiteSpec) -> None:
        self.sites.append(site)

    def _assignments(self, sites: Iterable[SiteSpec]) -> int:
        lengths = {plate.name: plate.length for plate in self.plates}
        return prod(SIZES[site.kind] ** prod(lengths[name] for name in site.plates) for site in sites)

    def _zeros(self) -> str:
        return (
            self.random.choice(("column", "cells", "cells", "certain"))
            if self.wants["zeros"] and self.chance(0.4)
            else ""
        )

    def _scale(self, kinds: tuple[str, ...]) -> str:
        return self.random.choice(kinds)

    def _when(self) -> tuple[tuple[str, int], ...]:
        """A branch on one or two earlier latents outside of plates; the second lives in the branch of the first."""
        if not self.wants["branch"] or not self.chance(0.6):
            return ()
        found: list[tuple[str, int]] = []
        for site in self.latents:
            if _may_switch(site) and site.when == tuple(found) and len(found) < 2 and self.chance(0.7):
                found.append((site.name, self.random.randrange(SIZES[site.kind])))
        return tuple(found)

    def _parents(
        self, plates: tuple[str, ...], when: tuple[tuple[str, int], ...], earlier: Any = None
    ) -> tuple[str, ...]:
        """Up to two earlier latents whose plates are around, of the same branch but for a few."""
        fit = [
            site.name
            for site in (self.latents if earlier is None else earlier)
            if set(site.plates) <= set(plates)
            and (site.when == when[: len(site.when)] or self.chance(0.3))
            and (earlier is not None or site.kind != "chain_2" or "time" in plates)
        ]
        return tuple(self.random.sample(fit, min(len(fit), self.random.choice((0, 1, 1, 2)))))

    def _guide(self) -> tuple[SiteSpec, ...]:
        """A guide of none, some or all latents, which branches as the model does and has most of its zeros."""
        often = self.random.choice((0.0, 0.5, 0.5, 1.0, 1.0))
        guide: list[SiteSpec] = []
        order = list(self.latents)
        if self.chance(0.4):
            order.sort(key=lambda site: (len(site.when), self.random.random()))
        for site in order:
            given = {other.name for other in guide}
            if not self.chance(often) or not all(name in given for name, _ in site.when):
                continue
            if site.zeros in ("cells", "certain") and self.chance(0.85):
                continue
            kind = site.kind if site.kind != "chain_2" or self.chance(0.6) else "categorical_2"
            chain = kind == "chain_2"
            guide.append(
                replace(
                    site,
                    kind=kind,
                    parents=self._parents(site.plates, site.when, guide),
                    zeros=site.zeros if site.zeros == "column" and self.chance(0.85) else "",
                    logits=bool(site.zeros) or (not chain and self.chance(0.5)),
                    tilted=not chain and self.chance(0.5),
                    mask=site.mask if self.chance(0.5) else "",
                )
            )
        return tuple(guide)
