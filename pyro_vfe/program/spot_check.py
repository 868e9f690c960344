"""Enumerated tables against ordinary runs at a few assignments.

    table[z = z*]  =  log p(site) of a run in which every latent z was z*

What provenance cannot see (a program that reshapes away the enumerated dims, a scripted function) shows here.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from functools import reduce
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_vfe.engine.factors import Factor, Table
from pyro_vfe.engine.logspace import times
from pyro_vfe.engine.lookup import read, read_factor
from pyro_vfe.errors import SpotCheckError
from pyro_vfe.program.assignments import assignment_of, rounds_of
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
from pyro_vfe.program.single_values import with_own_dims
from pyro_vfe.program.site_structure import elements_of
from pyro_vfe.program.sizeless import SizelessPlates
from pyro_vfe.program.spot_check_plates import agree, check_elements, ordinary_log_prob, own_elements, own_stretch
from pyro_vfe.program.tables import batch_axes, over_dims
from pyro_vfe.program.written_out import folded_table, number_parts, site_parts

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
    together = frozenset((mixing.mixed | layout.groups.keys()) & enumeration.supports.keys())
    plan = rounds_of(enumeration, together, layout.row_bytes, alike=layout.only_enumerated)

    def run(number: int, given: Mapping[str, Tensor] = draws) -> _Round:
        assignment = assignment_of(enumeration, plan, number)
        set_random_state(state)
        return _Round(assignment, *_ordinary_run(model, guide, args, kwargs, enumeration, assignment, given, layout))

    # A point that an autoguide computes from a draw follows it.
    made = {name: value for name, value in draws.items() if is_random(seen.sites["guide", name])}
    check_elements(enumeration, lambda changed: run(0, {**made, **changed})[1:], weighs_data)
    if enumeration.portions is None:
        for number in range(plan.number):
            _compare(enumeration, run(number))
    else:
        everything = [run(number) for number in range(plan.number)]
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
    alike = layout.only_enumerated
    plan = rounds_of(enumeration, frozenset(), layout.row_bytes, at_most=1, alike=alike)
    assignment = assignment_of(enumeration, plan, 0)
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
        value = support[over_dims(reduce(own_stretch, plates, index), plates).to(support.device)]
        return with_own_dims(value, fn, -layout.dims.get(name, 0)) if layout.only_enumerated else value

    given = {name: _at(value, name, enumeration, assignment, layout) for name, value in draws.items()}
    model = closing(model, enumeration.closed.__contains__) if enumeration.closed else model
    with pyro.validation_enabled(False) if layout.unvalidated else nullcontext():
        first, second = record_both(
            model,
            guide,
            args,
            kwargs,
            chosen,
            given=given,
            subsamples=dict(enumeration.subsamples),
            sizeless=SizelessPlates(layout.sizes_around),
            look=look,
        )
    met = [site for site in (*first.sites.values(), *second.sites.values()) if site.kind != "unread"]
    sites = {key: part for site in met for key, part in site_parts(site, layout.wholes).items()}
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
    chain = enumeration.chain_plate(site.name)
    return own_elements(read_factor(factor, assignment, batch_axes(site.plates), chain), site)


def _not_in_scale(weight: Tensor | float, factor: Factor, site: Site, assignment: Mapping[str, Table]) -> Tensor:
    """How many times a factor's table has to hold what the site says: once where its scale is the site's weight."""
    scale, weights = factor.scale, torch.as_tensor(weight)
    own = read(scale, assignment, batch_axes(site.plates)) if isinstance(scale, Table) else torch.tensor(scale)
    own = own_elements(own, site)
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
