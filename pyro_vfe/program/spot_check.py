"""Enumerated tables against ordinary runs at a few assignments.

    table[z = z*]  =  log p(site) of a run in which every latent z was z*

What provenance cannot see (a program that reshapes away the enumerated dims, a scripted function) shows here.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from math import prod
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_vfe.engine.factors import Factor, Table
from pyro_vfe.engine.logspace import times
from pyro_vfe.engine.lookup import read, read_factor
from pyro_vfe.errors import SpotCheckError
from pyro_vfe.program.chain_gaps import closing
from pyro_vfe.program.enumeration import Enumeration, Portions, SiteKey, is_random
from pyro_vfe.program.escapes import NO_SITES, blame
from pyro_vfe.program.keeping import own_value, replaced
from pyro_vfe.program.layout import Layout, Program
from pyro_vfe.program.masking import masked, unmasked
from pyro_vfe.program.masks import absences, mask_guide, masked_alone, masked_below, pins
from pyro_vfe.program.mixing import Mixing
from pyro_vfe.program.narrowing import narrowed_site, stretch
from pyro_vfe.program.randomness import random_state, set_random_state
from pyro_vfe.program.recorder import Plate, Role, Site, record_both
from pyro_vfe.program.runs import enumerate_programs
from pyro_vfe.program.site_structure import elements_of
from pyro_vfe.program.spot_check_plates import agree, check_elements, ordinary_log_prob
from pyro_vfe.program.tables import batch_axes, over_dims
from pyro_vfe.program.written_out import folded_table, number_parts, site_parts

_MOST_ROUNDS = 6
"""Each round is an ordinary run. With fewer than so many values, a latent outside of plates takes all of them; of fewer
than `num_values ** _MOST_ROUNDS` elements in plates any two differ in some round."""

_MOST_JOINT_ROUNDS = 512
"""The most rounds where values meet in some operation: so many joint values are all taken."""


_MOST_SITES = 16
"""The most sites that are compared at a later call, at random."""

_SLIGHT = 10.0
"""A difference of so many tolerances may still be rounding: no way of running the programs mends it."""

_MOST_ATTEMPTS = 8
"""How often a program is looked at that draws something for each value."""


def spot_check(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    layout: Layout,
    seen: Enumeration,
    *,
    share: bool = False,
    weighs_data: bool = False,
) -> frozenset[str]:
    """Compares each site's enumerated log-probability with an ordinary run's at joint assignments from a random start.

    Args:
        model: The generative model.
        guide: The guide.
        args: Arguments of both.
        kwargs: Keyword arguments of both.
        layout: Where each latent went.
        seen: An enumeration of the same programs; its draws and subsamples are used again.
        share: Whether it shared equal computations.
        weighs_data: Whether each datum's draws have importance weights of their own.

    Returns:
        The latents whose values meet in some operation.

    Raises:
        SpotCheckError: Some site differs.
    """
    mixing = Mixing(layout.dims, layout.sizes)
    for attempt in range(_MOST_ATTEMPTS):
        if attempt == 0 or mixing.draws:  # Masks of dropout, say, may be alike for all values by chance.
            _check(model, guide, args, kwargs, layout, seen, share, weighs_data, mixing)
    return frozenset(mixing.mixed)


def _check(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    layout: Layout,
    seen: Enumeration,
    share: bool,
    weighs_data: bool,
    mixing: Mixing,
) -> None:
    state = random_state()
    draws, subsamples = _held(seen)
    enumeration = enumerate_programs(
        model, guide, args, kwargs, layout, given=draws, subsamples=subsamples, share=share, observer=lambda: mixing
    )
    set_random_state(state)
    together = (mixing.mixed | layout.groups.keys()) & enumeration.supports.keys()
    plan = _plan(enumeration, frozenset(together))

    def run(number: int, given: Mapping[str, Tensor] = draws) -> _Round:
        assignment = _assignment(enumeration, plan, number)
        set_random_state(state)
        return _Round(assignment, *_ordinary_run(model, guide, args, kwargs, enumeration, assignment, given, layout))

    # A point that an autoguide computes from a draw follows it.
    made = {name: value for name, value in draws.items() if is_random(seen.sites["guide", name])}
    check_elements(enumeration, lambda changed: run(0, {**made, **changed})[1:], weighs_data)
    if enumeration.portions is None:
        for number in range(plan.rounds):
            _compare(enumeration, run(number))
    else:
        everything = [run(number) for number in range(plan.rounds)]
        for stretch in enumeration.portions.stretches:  # Each portion's tables are made once, for all rounds.
            _compare_portion(enumeration.portions, everything, stretch)


def agrees_at_random(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    layout: Layout,
    enumeration: Enumeration,
    state: list[Tensor],
) -> bool:
    """Whether an enumeration agrees with one ordinary run at a random assignment; where it does not, ask `spot_check`.

    Args:
        model: The generative model.
        guide: The guide.
        args: Arguments of both.
        kwargs: Keyword arguments of both.
        layout: Where each latent went.
        enumeration: What is looked at: some of its sites, and a portion of it where it is in portions.
        state: The random state in which it was made.
    """
    draws, _ = _held(enumeration)
    assignment = _assignment(enumeration, _plan(enumeration, frozenset(), rounds=1), 0)
    keys = list(enumeration.factors)
    some = {keys[index] for index in torch.randperm(len(keys))[:_MOST_SITES].tolist()}
    set_random_state(state)
    try:
        with torch.no_grad(), pyro.validation_enabled(False):  # The enumerated run was validated.
            ordinary = _ordinary_run(model, guide, args, kwargs, enumeration, assignment, draws, layout, some)
        run = _Round(assignment, *ordinary)
        if enumeration.portions is None:
            _compare(enumeration, run)
        else:
            stretches = enumeration.portions.stretches
            _compare_portion(enumeration.portions, [run], stretches[int(torch.randint(len(stretches), ()))])
    except Exception:  # A program may want gradients, or be run anew each time: the whole check tells.
        return False
    return True


def _held(seen: Enumeration) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The draws and subsamples of an enumeration."""
    draws = {site.name: site.value for site in seen.sites.values() if site.role == "guide" and site.kind == "sampled"}
    return draws, dict(seen.subsamples)


class _Round(NamedTuple):
    """An ordinary run at an assignment."""

    assignment: Mapping[str, Table]
    """The index of each latent's value, over its plates."""
    sites: Mapping[SiteKey, Site]
    """The sites as they ran."""
    log_probs: Mapping[SiteKey, Tensor]
    """What each said of its value when it was reached."""

    def narrowed(self, plate: str, start: int, length: int) -> "_Round":
        """What it says of some elements of a plate; what lies outside of the plate is with the first of them."""
        sites, log_probs = {}, {}
        for key, site in self.sites.items():
            inside = plate in site.plate_names
            if key in self.log_probs and (inside or start == 0):
                part = narrowed_site(site, plate, start, length) if inside else site
                assert part is not None, "a portion has only sites that can be restricted"
                sites[key] = part
                dim = next((around.dim for around in site.plates if around.name == plate), 0)
                log_probs[key] = stretch(self.log_probs[key], dim, start, length) if inside else self.log_probs[key]
        assignment = {name: table.narrowed(plate, start, length) for name, table in self.assignment.items()}
        return _Round(assignment, sites, log_probs)


def _compare_portion(portions: Portions, runs: Sequence[_Round], stretch: tuple[int, int]) -> None:
    with torch.no_grad():
        part = portions.make(*stretch)
    for run in runs:
        _compare(part, run.narrowed(portions.plate, *stretch))


def _compare(enumeration: Enumeration, run: _Round) -> None:
    assignment, ordinary, log_probs = run
    absent = absences(ordinary)
    absent |= masked_below(absent, masked_alone(ordinary), enumeration.factors)
    pinned = pins(absent, ordinary)
    for key in log_probs:
        site, star = ordinary[key], enumeration.stars.get(key)
        counterpart: SiteKey = ("model", site.name)
        if site.kind == "enumerated" and counterpart in enumeration.factors and counterpart not in ordinary:
            continue  # The model lacks the guide's latent in this branch: it is pinned there.
        expected = log_probs[key]
        if star is not None:
            nesting = max(expected.dim(), *(-plate.dim for plate in (*site.plates, *star.home)))
            expected, site = star.added(expected, site, nesting), star.site(site)
        enumerated = _entries(enumeration, key, site, assignment)
        if key in enumeration.factors:
            weight = (ordinary.get(counterpart, site) if site.follows_model else site).scale
            expected = times(expected, _not_in_scale(weight, enumeration.factors[key], site, assignment).to(expected))
        if site.kind == "sampled" and site.role == "guide" and counterpart in ordinary:
            expected = masked(expected, unmasked(ordinary[counterpart])[1])  # The model's mask decides.
        if key in pinned and enumerated is not None:
            present = ~torch.as_tensor(pinned[key].where)
            enumerated, expected = masked(enumerated, present), masked(expected, present)
        if enumerated is None or not agree(enumerated, expected):
            error = _difference(site, enumerated, expected)
            if enumerated is None or not agree(enumerated, expected, slack=_SLIGHT):
                blame(error, enumeration.followed.get(key, NO_SITES))
            raise error


class _Plan(NamedTuple):
    """Which values latents have in each round."""

    rounds: int
    digits: int
    """In how many rounds elements of a plate differ by their digits."""
    equal: int
    """From which round on they differ again; before it they were equal."""
    values: Mapping[str, Tensor]
    """For each latent the index of the value of element 0, round by round."""


def _plan(enumeration: Enumeration, mixed: frozenset[str], rounds: int | None = None) -> _Plan:
    """A few rounds that go through values from a random start; all joint values of latents whose values meet."""
    sizes = {name: enumeration.variables[name].size for name in enumeration.supports}
    digits = rounds or min(_MOST_ROUNDS, max((_rounds_for(enumeration, name) for name in sizes), default=1))
    joint = prod(sizes[name] for name in mixed)
    equal = count = digits + min(joint, _MOST_JOINT_ROUNDS) if mixed else digits
    if any(enumeration.variables[name].plates for name in mixed):
        count += count - digits
    values, stride = {}, 1
    for name, size in sizes.items():
        values[name] = (torch.randint(size, ()) + torch.arange(count) // (stride if name in mixed else 1)) % size
        if name in mixed and joint > _MOST_JOINT_ROUNDS:
            values[name] = torch.cat([torch.randperm(size) for _ in range(-(-count // size))])
        stride *= size if name in mixed else 1
    return _Plan(count, digits, equal, values)


def _rounds_for(enumeration: Enumeration, name: str) -> int:
    """As many as a latent has values, or as the numbers of its elements have digits; where these are many, one random
    round tells them apart."""
    num_values, count = enumeration.variables[name].size, prod(_plate_sizes(enumeration, name))
    if num_values == 1 or count > num_values**_MOST_ROUNDS:
        return max(num_values, 2)
    return max(num_values, next(digits for digits in range(_MOST_ROUNDS + 1) if num_values**digits >= count))


def _assignment(enumeration: Enumeration, plan: _Plan, number: int) -> dict[str, Table]:
    """A value index for every latent element: shifts go through the values, and elements differ by their digits.

    Elements that were equal in every round would pass for one another, and with them a program in which one reads the
    other.
    """
    assignment = {}
    for name, values in plan.values.items():
        size, shape = enumeration.variables[name].size, _plate_sizes(enumeration, name)
        # Elements that are all equal show what others do not, and the other way round.
        place = number if number < plan.equal else number % _needed_digits(prod(shape), size, plan.digits)
        digits = _digits(prod(shape), size, place, plan.digits).reshape(shape)
        assignment[name] = Table((values[number] + digits) % size, _plate_axes(enumeration, name))
    for name in enumeration.draws:
        assignment[name] = Table(torch.zeros((), dtype=torch.long), ())
    return assignment


def _digits(count: int, base: int, place: int, places: int) -> Tensor:
    """The digits of 0 ... count - 1 at a place; random ones at the last place where they have more places."""
    if place == places - 1 and base**places < count:
        return torch.randint(base, (count,), generator=torch.Generator().manual_seed(0))
    if place >= places or base**place >= count:
        return torch.zeros(count, dtype=torch.long)
    return torch.arange(count) // base**place % base


def _needed_digits(count: int, base: int, most: int) -> int:
    """How many digits tell 0 ... count - 1 apart, at most so many."""
    return next((digits for digits in range(1, most) if base**digits >= count), most)


def _plate_axes(enumeration: Enumeration, name: str) -> tuple[str, ...]:
    return tuple(sorted(enumeration.variables[name].plates))


def _plate_sizes(enumeration: Enumeration, name: str) -> list[int]:
    return [enumeration.plates[plate] for plate in _plate_axes(enumeration, name)]


def _ordinary_run(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    enumeration: Enumeration,
    assignment: Mapping[str, Table],
    draws: Mapping[str, Tensor],
    layout: Layout,
    keys: Collection[SiteKey] | None = None,
) -> tuple[dict[tuple[Role, str], Site], dict[tuple[Role, str], Tensor]]:
    """The sites of an ordinary run, and what each, or some of them, said of its value when it was reached."""
    log_probs: dict[tuple[Role, str], Tensor] = {}

    def look(site: Site) -> None:
        if site.kind != "unread" and (keys is None or (site.role, site.name) in keys):
            log_probs.update(number_parts(ordinary_log_prob(site, layout.unvalidated), site, layout.wholes))
        site.fn, mask = unmasked(site)
        site.mask, site.scale = replaced((mask, site.scale), Tensor.clone)
        own_value(site)

    def chosen(name: str, role: Role, fn: Any, plates: tuple[Plate, ...]) -> Tensor:
        index, support = assignment.get(name), enumeration.supports.get(name)
        if name in layout.wholes:
            index = folded_table(assignment, name, layout.wholes[name])
            support = enumeration.supports[elements_of(name, layout.wholes[name])[0]]
        if index is None or support is None:
            point: Tensor = fn.sample()
            return point
        return support[over_dims(index, plates).to(support.device)]

    given = {name: _at(value, name, enumeration, assignment, layout) for name, value in draws.items()}
    model = closing(model, enumeration.closed.__contains__) if enumeration.closed else model
    with pyro.validation_enabled(False) if layout.unvalidated else nullcontext():
        first, second = record_both(
            model, guide, args, kwargs, chosen, given=given, subsamples=dict(enumeration.subsamples), look=look
        )
    every = (*first.sites.values(), *second.sites.values())
    sites: dict[SiteKey, Site] = {}
    for site in every:
        if site.kind != "unread":
            sites.update(site_parts(site, layout.wholes))
    mask_guide(sites)
    return sites, log_probs


def _at(value: Tensor, name: str, enumeration: Enumeration, assignment: Mapping[str, Table], layout: Layout) -> Tensor:
    """A draw made once per value of the latents before it, read at the assignment."""
    site = enumeration.sites["guide", name]
    event_dims = len(site.fn.event_shape)
    batch_dims = value.dim() - event_dims
    if batch_dims <= layout.nesting:
        return value
    latent_at: dict[int, str] = {}
    for latent, dim in layout.dims.items():
        if -dim <= batch_dims and value.shape[batch_dims + dim] > 1 and latent in assignment:
            latent_at.setdefault(dim, latent)
    plates = {plate.dim: plate.name for plate in site.plates}
    names = [plates.get(dim, f"_{dim}") for dim in range(-layout.nesting, 0)]
    index = []
    for dim in range(-batch_dims, 0):
        size = value.shape[batch_dims + dim]
        if dim in latent_at:
            index.append(assignment[latent_at[dim]].aligned(names))
        elif size == 1:
            index.append(torch.zeros((1,) * len(names), dtype=torch.long))
        else:
            index.append(Table(torch.arange(size), (names[dim],)).aligned(names))
    return value[tuple(index)]


def _entries(
    enumeration: Enumeration, key: tuple[Role, str], site: Site, assignment: Mapping[str, Table]
) -> Tensor | None:
    """The site's enumerated log-probabilities at the assignment; None if the enumeration lacks the site."""
    factor = enumeration.factors.get(key)
    if factor is None:
        return None
    return read_factor(factor, assignment, batch_axes(site.plates), enumeration.chain_plate(site.name))


def _not_in_scale(weight: Tensor | float, factor: Factor, site: Site, assignment: Mapping[str, Table]) -> Tensor:
    """How many times a factor's table has to hold what the site says: once where its scale is the site's weight."""
    scale, weights = factor.scale, torch.as_tensor(weight)
    own = read(scale, assignment, batch_axes(site.plates)) if isinstance(scale, Table) else torch.tensor(scale)
    return torch.where(weights == own, 1.0, weights / own)


def _difference(site: Site, enumerated: Tensor | None, expected: Tensor) -> SpotCheckError:
    if enumerated is None:
        return SpotCheckError(
            f"Site '{site.name}' of the {site.role} ran at a random assignment but not in the enumerated run: the "
            "structure of the program changes from run to run.",
            hint="Make its sites depend on arguments and latents only, not on other randomness.",
        )
    return SpotCheckError(
        f"Site '{site.name}' of the {site.role} has log-probability {_shown(expected)} in an ordinary run and "
        f"{_shown(enumerated)} when enumerated, at the same values of all latents.",
        hint="Enumerated values carry extra dims to the left of the plates: index with `table[z]`, broadcast, use "
        "`[..., None]` and dims counted from the right, not `view`, `flatten`, `x[:, z]` or sums over dim 0. Or NumPy "
        "or a compiled function changes in place what the site was given (give it a copy of it), or it "
        "uses random numbers of NumPy or Python, or passes a latent through torch.nn.Dropout (call .eval() on the "
        "network). If you are sure, pass check=False.",
    )


def _shown(values: Tensor) -> str:
    flat = values.detach().flatten()
    shown = ", ".join(f"{float(number):.6g}" for number in flat[:3])
    return f"[{shown}{', ...' if len(flat) > 3 else ''}]" if len(flat) > 1 else shown
