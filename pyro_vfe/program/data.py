r"""What a datum is: an element of plates whose elements nothing ties together.

    log w  =  sum over data n of  c_n log w_n   +   what stands outside

A latent that is summed, or a draw that is averaged over, ties together all that reads it, and a plate all that stands
in it. What hangs together is data of one kind: the elements of the plates around all of it. Outside stands what reads
none of these latents: a prior or a penalty of parameters, a point estimate. It counts once, beside the data.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pyro_vfe.program.enumeration import PARTICLES, Enumeration, SiteKey, is_random
from pyro_vfe.program.markov_chain import MarkovChain
from pyro_vfe.program.recorder import Site
from pyro_vfe.program.supports import unwrapped

Sites = Mapping[SiteKey, Site]

Reads = Mapping[SiteKey, frozenset[str]]

_NO_PLATE = ""
"""What stands in no plate stands there together."""


@dataclass(frozen=True)
class Kind:
    """Data that are elements of the same plates."""

    plates: tuple[str, ...]
    """Vectorised plates, sorted by name, or one sequential plate; with none, everything of this kind is one datum."""
    axes: tuple[str, ...]
    """The vectorised ones of the plates."""
    parts: tuple[frozenset[SiteKey], ...]
    """The sites of a datum: one set, which the axes multiply, or one for each step of a sequential plate."""


@dataclass(frozen=True)
class Data:
    """What the data of two programs are."""

    kinds: tuple[Kind, ...]
    """More than one where data lie in plates that have nothing to do with each other."""
    outside: frozenset[SiteKey]
    """The sites that belong to no datum."""

    @property
    def plates(self) -> tuple[str, ...]:
        """The plates of the data; none where they are of several kinds."""
        return self.kinds[0].plates if len(self.kinds) == 1 else ()


def data_of(sites: Sites, reads: Reads, summed: Collection[str] = ()) -> Data:
    """Returns the data whose importance weights are independent of each other.

    Args:
        sites: The sites of a run of both programs.
        reads: What the log-probability of each site depends on; a site of which that is not known reads every draw.
        summed: The latents that are summed inside of a weight.
    """
    draws = {name: site for (role, name), site in sites.items() if role == "guide" and is_random(site)}
    # Whatever is drawn outside of all plates is taken to reach every site.
    outside = (name for name, site in draws.items() if not _around(site) | _steps(sites, ("guide", name)).keys())
    everywhere = frozenset(outside)
    ties = draws.keys() | summed
    tied = {key: everywhere.union(reads.get(key, draws), [key[1]]).intersection(ties) for key in sites}
    observed = observed_data(sites, reads)
    return _data(sites, {key: own for key, own in tied.items() if own} or dict.fromkeys(observed, frozenset()))


def parts_of(data: Sequence[Data]) -> Iterator[tuple[tuple[str, ...], tuple[frozenset[SiteKey], ...]]]:
    """Yields, for each kind of data and each step, the plates that multiply them, and their sites in each of some runs.

    Args:
        data: What the data of each run are.
    """
    for kinds in zip(*(own.kinds for own in data), strict=True):
        for parts in zip(*(kind.parts for kind in kinds), strict=True):
            yield kinds[0].axes, parts


def likely_data(run: Enumeration) -> Data:
    """Returns the data that have a likelihood of their own given the draws, with the latents summed out.

    Args:
        run: Enumerated programs.
    """
    model = {key: site for key, site in run.sites.items() if key[0] == "model"}
    tied = {key: run.reads[key] & run.supports.keys() for key in model}
    # Values in plates of their own may be data that no latent tells of.
    alone = [key for key, site in model.items() if _is_value(site) and _around(site)]
    observed = {*observed_data(model, run.reads), *alone}
    return _data(run.sites, {key: own for key, own in tied.items() if own or key in observed})


def number_of_data(run: Enumeration) -> int:
    """Returns the number of data: elements of the plates that data of one kind share, before subsampling, and steps.

    Args:
        run: Enumerated programs.
    """
    if run.uneven:  # A latent says which datum is in which plate: it is one of them in each branch.
        return max(_count(run, sites, {**run.full_plates, **_own_sizes(sites)}) for sites in run.paths)
    return _count(run, run.sites, run.full_plates)


def _own_sizes(sites: Sites) -> dict[str, int]:
    return {plate.name: plate.full_size for site in sites.values() for plate in site.plates}


def _count(run: Enumeration, sites: Sites, full_plates: Mapping[str, int]) -> int:
    observed = observed_data(sites, run.reads)
    whole = {plate: full_size for plate, _, full_size in run.subsampled}
    count = 0
    for keys in _together(sites, dict.fromkeys(observed, frozenset())):
        seen = {plate: 1 + max(sites[key].steps[plate] for key in keys) for plate in _steps_around(sites, keys)}
        steps = (whole.get(plate, size) for plate, size in seen.items())
        count += math.prod((*(full_plates[plate] for plate in _plates_around(sites, keys)), *steps))
    return max(1, count)


def observed_data(sites: Sites, reads: Reads) -> list[SiteKey]:
    """Returns what of all that the model observes are data: what reads a latent; where nothing does, what has a plate.

    A prior of a parameter, observed beside data that read latents, is none. Factors are data where nothing else is.

    Args:
        sites: The sites of a run of both programs.
        reads: What the log-probability of each site depends on.
    """
    seen = [key for key, site in sites.items() if key[0] == "model" and site.kind == "observed"]
    values = [key for key in seen if _is_value(sites[key])]
    found = ([key for key in some if reads.get(key)] for some in (values, seen))
    in_plates = ([key for key in some if _around(sites[key])] for some in (values, seen))
    return next((some for some in (*found, *in_plates) if some), values or seen)


def _is_value(site: Site) -> bool:
    """Whether a site is observed, and no `pyro.factor`."""
    return site.kind == "observed" and type(site.fn).__name__ != "Unit"


def _data(sites: Sites, labels: Mapping[SiteKey, frozenset[str]]) -> Data:
    if not labels:
        return Data((Kind((), (), (frozenset(sites),)),), frozenset())
    left = set(sites)
    kinds = []
    chains = _chain_plates(sites)
    for keys in _together(sites, labels):
        kind = _kind(sites, {key: labels[key] for key in keys}, chains, left)
        left = left.difference(*kind.parts)
        kinds.append(kind)
    return Data(tuple(kinds), frozenset(left))


def _together(sites: Sites, labels: Mapping[SiteKey, frozenset[str]]) -> list[list[SiteKey]]:
    """The sites that hang together: by what they are labelled with, by plates, or by standing in none."""
    classes: list[tuple[set[str], list[SiteKey]]] = []
    for key, own in labels.items():
        names, keys = {*own, *(_around(sites[key]) | _steps(sites, key).keys() or {_NO_PLATE})}, [key]
        for other in [known for known in classes if not names.isdisjoint(known[0])]:
            classes.remove(other)
            names, keys = names | other[0], other[1] + keys
        classes.append((names, keys))
    return [keys for _, keys in classes]


def _kind(
    sites: Sites, labels: Mapping[SiteKey, frozenset[str]], chains: frozenset[str], left: Collection[SiteKey]
) -> Kind:
    """The data that some sites make, which hang together."""
    plates = _plates_around(sites, labels) - chains
    if plates:
        axes = tuple(sorted(plates))
        return Kind(axes, axes, (frozenset(key for key in left if plates <= _around(sites[key])),))
    for plate in sorted(_steps_around(sites, labels)):
        step_of = {key: _steps(sites, key)[plate] for key in left if plate in _steps(sites, key)}
        homes = {(name, step_of[key]) for key, own in labels.items() for name in own}
        if len(homes) == len({name for name, _ in homes}):
            steps = (frozenset(key for key in step_of if step_of[key] == i) for i in range(1 + max(step_of.values())))
            return Kind((plate,), (), tuple(steps))
    return Kind((), (), (frozenset(labels),))


def _around(site: Site) -> frozenset[str]:
    return site.plate_names - {PARTICLES}


def _steps(sites: Sites, key: SiteKey) -> Mapping[str, int]:
    """Which step of each sequential plate a site is of; a guide need not say it where the model does."""
    return {**sites.get(("model", key[1]), sites[key]).steps, **sites[key].steps}


def _plates_around(sites: Sites, keys: Iterable[SiteKey]) -> frozenset[str]:
    return frozenset.intersection(*(_around(sites[key]) for key in keys))


def _steps_around(sites: Sites, keys: Iterable[SiteKey]) -> frozenset[str]:
    return frozenset.intersection(*(frozenset(_steps(sites, key)) for key in keys))


def _chain_plates(sites: Sites) -> frozenset[str]:
    """The plates along which a latent is a chain, drawn or not: their elements depend on each other."""
    chains = (
        site
        for site in sites.values()
        if site.kind in ("sampled", "enumerated") and isinstance(unwrapped(site.fn), MarkovChain)
    )
    return frozenset(plate.name for site in chains for plate in site.plates if plate.dim == -1)
