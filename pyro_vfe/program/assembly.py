"""The runs of a pair of programs put together as one enumeration.

    table[z = k, ...]  =  the table of the run in which z was k

Where the programs branch there is a run per path of choices; otherwise there is one run, and its tables are taken as
they are.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from torch import Tensor

from pyro_vfe.engine.factors import Factor, Table, Variable
from pyro_vfe.engine.scales import applied, one_scale
from pyro_vfe.errors import StructureError, SupportError
from pyro_vfe.program.agreement import check_decided, check_same, check_supports, common_order
from pyro_vfe.program.branches import Assignment, joined
from pyro_vfe.program.chain_sites import drawn_along, time_plate
from pyro_vfe.program.enumeration import Enumeration, Portions, Rescored, SiteKey
from pyro_vfe.program.escapes import StructureChanged
from pyro_vfe.program.layout import Layout
from pyro_vfe.program.masks import absences, check_absences, presences
from pyro_vfe.program.operations import Operations
from pyro_vfe.program.path_axis import PATH, by_path, check_room, over_paths, side_by_side
from pyro_vfe.program.portions import PortionedRun
from pyro_vfe.program.recorder import ROLES, Site
from pyro_vfe.program.stars import Star
from pyro_vfe.program.tables import Scorer
from pyro_vfe.program.uneven_plates import check_uneven, filled, largest_plates, present


@dataclass(eq=False)
class Run:
    """One path of choices: its sites and their factors."""

    sites: dict[SiteKey, Site]
    factors: dict[SiteKey, Factor]
    supports: dict[str, Tensor]
    subsamples: dict[str, Tensor]
    lost: frozenset[tuple[str, str, str]]
    label: Callable[[Mapping[SiteKey, Site], Scorer], dict[SiteKey, Factor]]
    """Makes factors of some of its sites again, of other numbers than log-probabilities."""
    zeros: bool = False
    """Whether some probability of exactly zero carries a gradient."""
    parameters: tuple[Tensor, ...] = ()
    """What the programs read of parameters."""
    scores: dict[SiteKey, Factor] = field(default_factory=dict)
    """The log-probabilities of those draws whose factors are something else, by masks or weights."""
    portioned: PortionedRun | None = None
    """Where the tables are withheld: what makes them a portion of a plate at a time."""
    presence: Mapping[SiteKey, Table] = field(default_factory=dict)
    """Where masked latents of the model exist."""
    stars: Mapping[SiteKey, Star] = field(default_factory=dict)
    """Which elements of a latent of another plate some sites read."""
    reads: Mapping[SiteKey, Mapping[int, str]] = field(default_factory=dict)
    """The latent that each site reads of each group of those whose values are taken one by one."""


def assembled(runs: Mapping[Assignment, Run], layout: Layout, operations: tuple[Operations, ...] = ()) -> Enumeration:
    """Returns all runs as one enumeration.

    Args:
        runs: Each path of choices with what ran on it.
        layout: Where each latent went.
        operations: What each did to latents.

    Raises:
        SupportError: A latent has different values in guide and model, or in different branches.
        StructureError: Guide and model do not have the same latents in each branch.
    """
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
    if len(runs) > 1:
        sites = {key: sites[key] for key in common_order([run.sites for run in runs.values()])}
    check_supports(sites, supports)
    factors = _factors(runs, layout, supports, sites)
    if len(runs) > 1:
        check_decided(factors, sites, supports)
    presence = _presence(runs, layout, supports, sites)

    def rescored(keys: Collection[SiteKey], scorer: Scorer) -> dict[SiteKey, Factor]:
        again = {path: _labelled_again(run, keys, scorer) for path, run in runs.items()}
        return _factors(again, layout, supports, {key: site for key, site in sites.items() if key in keys})

    scores = _scores(runs, layout, supports, sites)
    if last.portioned is None:
        factors, scores = _of_one_type(factors, scores)
    whole = _enumeration(runs, factors, sites, supports, scores, presence, rescored, operations, layout)
    if last.portioned is not None:
        return replace(whole, paths=(sites,), portions=_portions(whole, last, last.portioned, layout))
    masked = {key for run in runs.values() for key in run.presence if key[1] in whole.guided}
    check_absences({key: presence[key] for key in masked & presence.keys()}, sites, whole.factors, layout)
    return whole


def joined_runs(runs: Mapping[Assignment, Run], layout: Layout) -> dict[SiteKey, Factor]:
    """Returns the factors of all runs together, where no sums are to be taken over them.

    Args:
        runs: Each path of choices with what ran on it.
        layout: Where each latent went.
    """
    supports = {name: support for run in runs.values() for name, support in run.supports.items()}
    sites = {key: site for run in runs.values() for key, site in run.sites.items()}
    return _factors(runs, layout, supports, sites)


def _portions(whole: Enumeration, run: Run, portioned: PortionedRun, layout: Layout) -> Portions:
    """What makes the enumeration of a run whose tables are withheld, a portion at a time."""
    assert layout.portioning is not None
    plate, length = layout.portioning.plate, layout.portioning.length

    def made(start: int, length: int) -> Enumeration:
        sites = portioned.restricted(start, length)
        part = replace(run, sites=sites, factors=portioned.factors(sites), portioned=None)
        part.scores, part.presence = portioned.scores(sites), presences(absences(sites), sites, layout)
        return replace(assembled({(): part}, layout), plates={**whole.plates, plate: length})

    return Portions(plate, portioned.size, length, made)


def _factors(
    runs: Mapping[Assignment, Run], layout: Layout, supports: Mapping[str, Tensor], sites: Mapping[SiteKey, Site]
) -> dict[SiteKey, Factor]:
    """The factors of all runs together."""
    if len(runs) == 1 and not layout.sequential and not layout.groups:
        return next(iter(runs.values())).factors
    return _joined_factors(runs, layout, supports, sites)


def _of_one_type(
    factors: dict[SiteKey, Factor], scores: dict[str, Factor]
) -> tuple[dict[SiteKey, Factor], dict[str, Factor]]:
    """All tables in the widest type that one of them has: they are multiplied with each other."""
    types = {table.dtype for factor in (*factors.values(), *scores.values()) for table in factor.tables}
    if len(types) < 2:
        return factors, scores
    widest = reduce(torch.promote_types, types)

    def converted(factor: Factor) -> Factor:
        return factor.mapped(lambda table: table.to(widest))

    return {k: converted(f) for k, f in factors.items()}, {k: converted(f) for k, f in scores.items()}


def _scores(
    runs: Mapping[Assignment, Run], layout: Layout, supports: Mapping[str, Tensor], sites: Mapping[SiteKey, Site]
) -> dict[str, Factor]:
    """The log-probabilities of draws that have other factors in some run, or another scale in each."""
    several = len(runs) > 1
    keys = [
        key
        for key, site in sites.items()
        if (several and site.needs_score) or any(key in run.scores for run in runs.values())
    ]
    if not keys:
        return {}

    def unweighted(run: Run) -> Run:
        own = {key: run.scores.get(key, run.factors.get(key)) for key in keys}
        return replace(run, factors={key: replace(f, scale=1.0) for key, f in own.items() if f is not None})

    again = {path: unweighted(run) for path, run in runs.items()}
    found = _factors(again, layout, supports, {key: sites[key] for key in keys})
    return {key[1]: found[key] for key in keys}


def _labelled_again(run: Run, keys: Collection[SiteKey], scorer: Scorer) -> Run:
    """The run with other numbers in the factors of some of its sites; the others have none."""
    return replace(run, factors=run.label({key: site for key, site in run.sites.items() if key in keys}, scorer))


def _joined_factors(
    runs: Mapping[Assignment, Run], layout: Layout, supports: Mapping[str, Tensor], sites: Mapping[SiteKey, Site]
) -> dict[SiteKey, Factor]:
    """Each site's tables of all runs, as one table with an axis per sequential latent."""
    sizes = {name: len(support) for name, support in supports.items()}
    made, sparse = _choices_made(runs, layout), by_path(_sites(runs), sizes)
    uneven = check_uneven(run.sites for run in runs.values())
    if uneven:
        runs = {path: _filled(run, uneven) for path, run in runs.items()}
    if sparse:
        check_room({path: run.factors for path, run in runs.items()}, sizes)
    result = {}
    for key, site in sites.items():
        some = next(run.factors[key] for run in runs.values() if key in run.factors)
        found = {path: _factor_in(run, key, sites) for path, run in runs.items()}
        scale = one_scale([factor.scale for factor in found.values() if factor is not None] or [some.scale])
        if scale is None and site.kind != "enumerated":
            found = {path: None if factor is None else applied(factor) for path, factor in found.items()}
            scale = 1.0
        absent = _absent_table(some.table, site, sizes.get(site.name, 1))
        since = made[key]
        if any(found[path] is not run.factors.get(key) for path, run in runs.items()):
            since = max(made.get((role, site.name), 0) for role in ROLES)  # The other program decides, too.
        tables = {path: None if factor is None else factor.table for path, factor in found.items()}
        if sparse:
            result[key] = over_paths(site, some, found, absent, sizes)
            continue
        read = _read_by_value(runs, key)
        table = joined(tables, since, sizes, absent, read)
        if scale is None:
            scales = {path: None if factor is None else _scale_table(factor) for path, factor in found.items()}
            scale = joined(scales, since, sizes, _scale_table(replace(some, scale=1.0)), read)
        result[key] = Factor(site.name, table, some.plates, scale)
        if some.first is not None:
            firsts = {path: None if factor is None else factor.first for path, factor in found.items()}
            result[key] = replace(result[key], first=joined(firsts, since, sizes, absent, read))
    return result


def _read_by_value(runs: Mapping[Assignment, Run], key: SiteKey) -> dict[int, str]:
    """The latents that a site reads, in some run, of those whose values are taken one by one, by their groups."""
    read: dict[int, str] = {}
    for run in runs.values():
        for group, name in run.reads.get(key, {}).items():
            if read.setdefault(group, name) != name:
                raise StructureChanged(f"site '{key[1]}' reads '{read[group]}', and then '{name}'")
    return read


def _sites(runs: Mapping[Assignment, Run]) -> dict[Assignment, Mapping[SiteKey, Site]]:
    return {path: run.sites for path, run in runs.items()}


def _filled(run: Run, sizes: Mapping[str, int]) -> Run:
    factors = {key: filled(factor, run.sites[key], sizes) for key, factor in run.factors.items()}
    return replace(run, factors=factors)


def _scale_table(factor: Factor) -> Table:
    scale = factor.scale
    return scale if isinstance(scale, Table) else Table(factor.table.values.new_tensor(scale), ())


def _factor_in(run: Run, key: SiteKey, sites: Mapping[SiteKey, Site]) -> Factor | None:
    """The site's factor in one run; None where the branch lacks the site, or the model lacks the guide's latent."""
    role, name = key
    both = ("guide", name) in sites and ("model", name) in sites
    if not both or sites[key].kind == "observed":
        return run.factors.get(key)
    if sites[key].kind == "sampled":
        return run.factors.get(key) or _cancelling(run, name)
    if ("model", name) in run.factors and ("guide", name) not in run.factors:
        raise StructureError(
            f"The model has latent site '{name}' in a branch where the guide, which has it elsewhere, has not.",
            hint=f"Sample '{name}' in the guide wherever the model does, or leave it out of the guide altogether.",
        )
    if role == "guide" and key in run.factors and ("model", name) not in run.factors:
        others = {other: f for other, f in run.factors.items() if f.name != name and name in f.axes}
        # A reader of the guide that the model lacks here too is pinned itself: it reads nothing.
        readers = [f.name for other, f in others.items() if other[0] == "model" or ("model", f.name) in run.factors]
        if readers:
            raise StructureError(
                f"The guide has latent site '{name}' in a branch where the model has not, and '{readers[0]}' reads it.",
                hint=f"Sample '{name}' in the guide only where the model does.",
            )
        return None
    return run.factors.get(key)


def _cancelling(run: Run, name: str) -> Factor | None:
    """What stands in the model for a draw of the guide that it lacks here: log q, so that the draw costs nothing."""
    site = run.sites.get(("guide", name))
    if site is not None and type(site.fn).__name__ == "Delta" and any(s.auxiliary for s in run.sites.values()):
        raise StructureError(
            f"The model lacks '{name}' in a branch, and the guide makes it from an auxiliary site, whose density would "
            "count where the latent does not exist.",
            hint=f"Give the guide a site '{name}' with a distribution of its own, where the model has it.",
        )
    return run.factors.get(("guide", name))


def _presence(
    runs: Mapping[Assignment, Run], layout: Layout, supports: Mapping[str, Tensor], sites: Mapping[SiteKey, Site]
) -> dict[SiteKey, Table]:
    """Where latents of the model and draws of the guide exist that are not always there: over what decides it."""
    kinds = {"model": ("enumerated", "sampled"), "guide": ("sampled",)}
    latents = [key for key, site in sites.items() if site.kind in kinds[key[0]]]
    if uneven := check_uneven(run.sites for run in runs.values()):
        runs = {path: _with_presence(run, latents, uneven) for path, run in runs.items()}
    optional = [key for key in latents if any(key not in run.sites or key in run.presence for run in runs.values())]
    if not optional:
        return {}
    sizes, made = {name: len(support) for name, support in supports.items()}, _choices_made(runs, layout)
    sparse = by_path(_sites(runs), sizes)
    like = next(run.factors[optional[0]] for run in runs.values() if optional[0] in run.factors).table.values
    always, never = (Table(like.new_full((), exists, dtype=torch.bool), ()) for exists in (True, False))
    result = {}
    for key in optional:
        tables = {path: run.presence.get(key, always) if key in run.sites else never for path, run in runs.items()}
        if sparse:
            table = side_by_side(tables, never)
        else:
            table = joined(tables, made[key], sizes, never, _read_by_value(runs, key)).selected(key[1], 0)
        if never in tables.values() or not bool(table.values.all()):
            result[key] = table
    return result


def _with_presence(run: Run, latents: Collection[SiteKey], sizes: Mapping[str, int]) -> Run:
    found = {
        key: present(run.presence.get(key), run.sites[key], sizes, run.factors[key].table.values)
        for key in latents
        if key in run.sites
    }
    return replace(run, presence={key: table for key, table in found.items() if table is not None})


def _choices_made(runs: Mapping[Assignment, Run], layout: Layout) -> dict[SiteKey, int]:
    """For each site, how many sequential latents had their values when it was recorded, in the run with most."""
    result: dict[SiteKey, int] = {}
    for run in runs.values():
        met: set[str] = set()
        for key in run.sites:
            if key[1] in layout.sequential:
                met.add(key[1])
            result[key] = max(result.get(key, 0), len(met))
    return result


def _absent_table(like: Table, site: Site, size: int) -> Table:
    """What stands for a site in a branch that lacks it: an observation costs nothing, a latent is its first value."""
    if site.kind != "enumerated" or size == 1:
        return Table(like.values.new_zeros(()), ())
    pinned = torch.full((size,), -torch.inf, dtype=like.values.dtype, device=like.values.device)
    pinned[0] = 0.0
    return Table(pinned, (site.name,))


def _enumeration(
    runs: Mapping[Assignment, Run],
    factors: Mapping[SiteKey, Factor],
    sites: Mapping[SiteKey, Site],
    supports: Mapping[str, Tensor],
    scores: Mapping[str, Factor],
    presence: Mapping[SiteKey, Table],
    rescored: Rescored,
    operations: tuple[Operations, ...],
    layout: Layout,
) -> Enumeration:
    variables: dict[str, Variable] = {}
    plates = largest_plates(run.sites for run in runs.values())
    for key, site in sites.items():
        if site.kind == "enumerated":
            factor = factors[key]
            size = len(supports[site.name])
            variable = Variable(site.name, size, site.plate_names, factor.scale, time_plate(site))
            known = variables.setdefault(site.name, variable)
            check_same(known, variable)
            if known.chain is None:
                variables[site.name] = variable
        elif site.needs_score:
            variables[site.name] = _draw(site, factors, sites.get(("model", site.name), site))

    choices = _paths_of(runs, supports) if (several := len(runs) > 1) else ()
    if choices:
        variables[PATH] = Variable(PATH, len(choices), frozenset())
    return Enumeration(
        variables=variables,
        plates={name: plate.size for name, plate in plates.items()},
        supports=supports,
        sites=sites,
        factors=factors,
        subsamples=_subsamples(runs) if several else next(iter(runs.values())).subsamples,
        presence=presence,
        lost=frozenset().union(*(run.lost for run in runs.values())),
        full_plates={name: plate.full_size for name, plate in plates.items()},
        paths=tuple(run.sites for run in runs.values()),
        rescored=rescored,
        followed=layout.reads,
        own_scores=scores,
        zeros=any(run.zeros for run in runs.values()),
        read=tuple(value for run in runs.values() for value in run.parameters),
        operations=operations,
        wholes=layout.wholes,
        stars={key: star for run in runs.values() for key, star in run.stars.items()},
        uneven=check_uneven(run.sites for run in runs.values()) if several else {},
        choices=choices,
    )


def _paths_of(runs: Mapping[Assignment, Run], supports: Mapping[str, Tensor]) -> tuple[Assignment, ...]:
    """All paths, where the tables have one axis for them."""
    sizes = {name: len(support) for name, support in supports.items()}
    return tuple(runs) if by_path(_sites(runs), sizes) else ()


def _subsamples(runs: Mapping[Assignment, Run]) -> dict[str, Tensor]:
    """The elements that are present; where a latent decides how many there are, each run has its own."""
    *others, last = (run.subsamples for run in runs.values())
    return {k: own for k, own in last.items() if all(len(other.get(k, own)) == len(own) for other in others)}


def _draw(site: Site, factors: Mapping[SiteKey, Factor], counterpart: Site) -> Variable:
    """A draw as a variable, in the plates of all that reads it: what is outside of a plate reads all its elements.

    A chain's elements hang on those before them, in the guide or in the model: it is one draw, outside of its plate.
    """
    readers = (factor.plates for factor in factors.values() if site.name in factor.axes)
    plates = site.plate_names.intersection(*readers) - {drawn_along(site), drawn_along(counterpart)}
    scale = factors[site.role, site.name].scale
    return Variable(site.name, 1, plates, scale if not isinstance(scale, Table) or plates >= set(scale.axes) else 1.0)
