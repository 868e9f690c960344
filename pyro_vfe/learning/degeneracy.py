r"""Whether a search has an end: what shows that the best value of a parameter is none that it can have.

    sharp      log p(u)  -  1/2 [ log p(u + d) + log p(u - d) ]  >  1/20         d: the rounding of the data
    run off    theta goes on to move while the slope vanishes, or F falls as it does from where it began

A density that tells data apart from their own rounding has collapsed onto them: for a normal that is s < d, where the
closed form calls a variance zero too. And where there is no minimum the slope vanishes like exp(-theta) or slower: its
last factor of a thousand takes the search several units of theta, near a minimum it takes none.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, transform_to

from pyro_vfe.engine.factors import Table
from pyro_vfe.errors import DegenerateError
from pyro_vfe.learning.belief import Weights
from pyro_vfe.learning.count_solutions import CANCELLED
from pyro_vfe.learning.entries import named
from pyro_vfe.learning.floors import Chart
from pyro_vfe.learning.phases import Problem
from pyro_vfe.program.enumeration import Enumeration, SiteKey
from pyro_vfe.program.equal_sites import stacked_log_prob
from pyro_vfe.program.extraction import rearranged
from pyro_vfe.program.log_prob import log_prob
from pyro_vfe.program.masking import unmasked, without_gaps
from pyro_vfe.program.parameters import constraint_of, unconstrained
from pyro_vfe.program.recorder import Site
from pyro_vfe.program.tables import Scorer

_SHARP = 0.05
"""Of a normal it is (d / s)^2 / 2: where the scale is a few roundings of the data."""

_AT_A_HALT = 1e-2
"""Where a search comes to a halt so much of it will do: a scale of some ten roundings more."""

_BLAMED = 0.1
"""Entries that share so much of the largest effect are named with it."""

_SHARPER = 1.1
"""By so much at least a scale makes a density sharper that falls by a factor of e."""

_NEGLIGIBLE = 1e-6
"""A change of the sharpness with a parameter that is none, relative to the sharpness: it is at a bound of its own."""

_RUNS = 2.0
"""How far a parameter has to have run, in units of an unconstrained one, to be looked at."""

_HALFWAY = 0.1
"""More of the slope is left halfway to a minimum, half of it or so; less where it falls like exp(-theta)."""

_SOON = 10.0
"""Units of theta over which exp(-theta) is as good as gone."""

_FAR = 1e30
"""Where a parameter that runs off is taken to be in the end; no finite value is as large as the root of its square."""

_GOLDEN = 0.6180339887498949


@dataclass(eq=False)
class Blur(Scorer):
    """Makes tables of how much log-probability data lose when they are moved by their rounding."""

    steps: Mapping[str, Tensor]
    """How far the data of each site are moved, in unconstrained coordinates, `(*event)`."""

    def scored(self, site: Site, fn: Any) -> Tensor:
        """The loss, of the shape of the site's log-probability.

        Args:
            site: The site.
            fn: Its distribution.
        """
        return _loss(fn, without_gaps(site), self.steps[site.name])

    def stacked(self, sites: Sequence[Site]) -> Tensor | None:
        """The same for equal sites together.

        Args:
            sites: Sites with equal distributions.
        """
        step = self.steps[sites[0].name]
        return stacked_log_prob(sites, lambda fn, value: _loss(fn, value, step))


def _loss(fn: Any, value: Tensor, step: Tensor) -> Tensor:
    """The largest loss of moving data either way, along a few directions of an event."""
    transform = biject_to(fn.support)
    place, here = transform.inv(value), log_prob(fn, value)
    losses = []
    for direction in _directions(step):
        sides = [log_prob(fn, transform(place + sign * direction)) for sign in (1, -1)]
        losses.append(here - (sides[0] + sides[1]) / 2)
    return losses[0] if len(losses) == 1 else torch.maximum(*losses)


def _directions(step: Tensor) -> list[Tensor]:
    """Ways to move an event: unequal steps of the same and of alternate signs, not all along a plane of data."""
    if step.numel() <= 1:
        return [step]
    number = torch.arange(step.numel(), dtype=step.dtype, device=step.device).reshape(step.shape)
    unequal = step * (1 + (number * _GOLDEN).frac())
    return [unequal, unequal * (1 - 2 * (number % 2))]


def steps_of(enumeration: Enumeration) -> dict[SiteKey, Tensor]:
    """How far the values of each site with a density are moved: what the closed form of a variance calls no spread.

    That is relative to the spread of all values of that kind, and no less than their own rounding.

    Args:
        enumeration: A run of the model.
    """
    kinds: dict[object, list[SiteKey]] = {}
    places: dict[SiteKey, Tensor] = {}
    found: dict[SiteKey, Tensor] = {}
    for key, site in enumeration.sites.items():
        fn, _ = unmasked(site)
        if key[0] != "model" or site.kind == "enumerated" or not isinstance(site.value, Tensor):
            continue
        transform = _unconstraining(fn)
        if transform is None or not site.value.is_floating_point() or not site.value.numel():
            continue
        place = transform.inv(without_gaps(site).detach())
        event = place.shape[place.dim() - transform.domain.event_dim :]
        places[key] = place.reshape(math.prod(place.shape[: place.dim() - len(event)]), *event)
        kinds.setdefault((type(transform), place.dtype, event, site.kind), []).append(key)
    for keys in kinds.values():
        found.update(dict.fromkeys(keys, _step(torch.cat([places[key] for key in keys]))))
    return found


def _unconstraining(fn: Any) -> Any:
    """What makes values of real numbers; None for counts, and for a support of which nobody knows how."""
    try:
        return None if fn.support.is_discrete else biject_to(fn.support)
    except (AttributeError, NotImplementedError, ValueError):
        return None


def _step(values: Tensor) -> Tensor:
    known = values.isfinite()
    count = known.sum(0).clamp(min=1)
    mean = values.where(known, 0.0).sum(0) / count
    spread = ((values - mean).where(known, 0.0).square().sum(0) / count).sqrt()
    size = values.where(known, 0.0).abs().amax(0)
    relative, rounding = (CANCELLED * torch.finfo(dtype).eps for dtype in (torch.float64, values.dtype))
    # Equal data have no spread to compare with but their own size; zeros have none at all.
    scale = torch.where(spread > 0, spread, torch.where(size > 0, size, 1.0))
    return torch.maximum(math.sqrt(relative) * scale, rounding * size)


def sharpness(enumeration: Enumeration, weights: Weights, least: float) -> Tensor:
    """How much expected log-probability data lose by being moved, where a density tells them from their rounding; nats.

    Args:
        enumeration: A run with the graph from the parameters to the distributions.
        weights: Q's expected tables.
        least: What a datum has to lose to be counted.
    """
    steps = steps_of(enumeration)
    total = torch.zeros(())
    with torch.enable_grad():
        losses = enumeration.rescored(frozenset(steps), Blur({key[1]: step for key, step in steps.items()}))
        for key, factor in losses.items():
            for table, own, weight in zip(factor.tables, enumeration.factors[key].tables, weights[key], strict=True):
                there = rearranged(Table(weight, own.axes), table)
                total = total + torch.where((there > 0) & (table.values > least), there * table.values, 0.0).sum()
    return total


def check_sharpness(problem: Problem, names: Sequence[str], charts: Mapping[str, Chart], *, halted: bool) -> None:
    """Checks that no density has collapsed onto its data at the present parameters.

    Args:
        problem: What is searched for.
        names: The parameters that are searched.
        charts: Of those that have a floor, which ends their way down.
        halted: Whether the search has come to a halt with F falling: rounding shows a little before.

    Raises:
        DegenerateError: One has, by entries of the parameters that are free to move on.
    """
    weights = problem.belief.learned_from
    least = _SHARP * (_AT_A_HALT if halted else 1.0)
    sharp = sharpness(problem.pair.enumerate(), weights, least)
    size = float(sharp.detach())
    if not size > 0 or not sharp.requires_grad:
        return
    leaves = [unconstrained(name) for name in names]
    found = torch.autograd.grad(sharp, leaves, allow_unused=True, materialize_grads=True)
    slopes = {
        name: charts[name].unbounded(slope) if name in charts else slope
        for name, slope in zip(names, found, strict=True)
    }
    moving = {name: slope for name, slope in slopes.items() if float(slope.abs().max()) > _NEGLIGIBLE * size}
    # A location off its data changes the sharpness too, but cannot raise it by going on.
    causes = {name: slope for name, slope in moving.items() if _raises(problem, name, slope, size, least)}
    if causes or (moving and not charts):
        raise _degenerate(
            "F has no lower bound, as a density has collapsed onto its data: it falls as long as", causes or moving
        )


def _raises(problem: Problem, name: str, slope: Tensor, sharp: float, least: float) -> bool:
    """Whether a parameter that goes on along a slope makes densities sharper still; a covariance always may."""
    if constraint_of(name).event_dim == 2:
        return True
    leaf = unconstrained(name)
    before = leaf.detach().clone()
    try:
        with torch.no_grad():
            leaf.add_(_foremost(slope).sign())
        return (
            float(sharpness(problem.pair.enumerate(), problem.belief.learned_from, least).detach()) > _SHARPER * sharp
        )
    except ValueError:
        return False
    finally:
        with torch.no_grad():
            leaf.copy_(before)


def _foremost(direction: Tensor) -> Tensor:
    """The largest entries of a direction; zero for the others."""
    if not direction.numel():
        return direction
    size = direction.abs()
    return direction.where(size >= _BLAMED * size.max(), 0.0)


Slopes = Callable[[float, Mapping[str, Tensor]], Mapping[str, Tensor] | None]
"""Of F along each entry's own step from the end of a search, at a multiple of the steps; None where F has none."""


def check_run_off(start: Mapping[str, Tensor], end: Mapping[str, Tensor], slopes: Slopes, *, vanished: bool) -> None:
    """Checks that a search has come to a minimum.

    Args:
        start: Unconstrained parameters where the slope was far larger than at the end.
        end: Those at the end.
        slopes: F along steps from there.
        vanished: Whether the slope is gone at the end. Then F has a limit, and a parameter may be at the end of its
            range where it has a value there: a probability at 0.

    Raises:
        DegenerateError: Parameters run to where they have no value, with F falling.
    """
    runs = {name: torch.where(last.isfinite(), last - start[name], 0.0) for name, last in end.items()}
    if not vanished:
        now = slopes(0.0, runs)
        _check_falling(
            runs if now is None else {name: run.where(now[name] < 0, 0.0) for name, run in runs.items()}, slopes
        )
        return
    to_no_value = _leading({name: run.masked_fill(_has_end(name, end[name], run), 0.0) for name, run in runs.items()})
    if _farthest(to_no_value) >= _RUNS:  # On the way to a minimum half of the slope is left halfway.
        first, halfway = (_total(slopes(factor, to_no_value)) for factor in (-1.0, -0.5))
        if _HALFWAY * first < halfway <= 0:
            raise _degenerate("F has no minimum: it falls as long as", to_no_value)
    _check_falling({name: run.where(_at_end(name, end[name], run), 0.0) for name, run in runs.items()}, slopes)


def _check_falling(runs: Mapping[str, Tensor], slopes: Slopes) -> None:
    """Checks that F does not fall without end: on the way to an end of its range a parameter soon has no slope left."""
    runs, far = _leading(runs), _farthest(runs)
    if far < _RUNS:
        return
    first, later = (_total(slopes(factor, runs)) for factor in (-1.0, min(0.5, _SOON / far) - 1.0))
    beyond = _total(slopes(1.0, runs))
    if later <= first / 2 < 0 and not beyond > 0:
        raise _degenerate("F has no lower bound: it falls as long as", runs)


def _leading(runs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The longest of runs; zero for the others."""
    far = _farthest(runs)
    return {name: run.where(run.abs() >= _BLAMED * far, 0.0) for name, run in runs.items()}


def _farthest(runs: Mapping[str, Tensor]) -> float:
    return max((float(run.abs().max()) for run in runs.values() if run.numel()), default=0.0)


def _total(slopes: Mapping[str, Tensor] | None) -> float:
    """The slope along all steps together; NaN, of which nothing is true, where there is none."""
    return math.nan if slopes is None else sum(float(own.sum()) for own in slopes.values())


def _limit(name: str, end: Tensor, run: Tensor) -> Tensor:
    """The constrained value that a parameter comes to if its foremost entries run on."""
    limit: Tensor = transform_to(constraint_of(name))(end + _foremost(run).sign() * _FAR)
    return limit


def _at_end(name: str, end: Tensor, run: Tensor) -> Tensor:
    """Which entries rounding has at the end of their range already."""
    return _by_entry(transform_to(constraint_of(name))(end) == _limit(name, end, run), run)


def _has_end(name: str, end: Tensor, run: Tensor) -> Tensor:
    """Which entries have a value where they run to: a probability of 0, a bound that the user gave."""
    constraint, limit = constraint_of(name), _limit(name, end, run)
    possible = _by_entry(constraint.check(limit), run) & _by_entry(limit.abs() < math.sqrt(_FAR), run)
    bound = torch.as_tensor(getattr(constraint, "lower_bound", 0.0))
    return possible | (_by_entry(limit == bound, run) & (bound != 0))


def _by_entry(mask: Tensor, run: Tensor) -> Tensor:
    """What holds for constrained entries, rows or matrices by unconstrained entry; not at all where they differ."""
    if mask.shape == run.shape:
        return mask
    if mask.dim() < run.dim():
        return mask.reshape(mask.shape + (1,) * (run.dim() - mask.dim())).expand(run.shape)
    return torch.zeros_like(run, dtype=torch.bool)


def _degenerate(fact: str, directions: Mapping[str, Tensor]) -> DegenerateError:
    """The error for parameters that run off.

    Args:
        fact: What F does.
        directions: Where each unconstrained entry goes; zero for those that stay.
    """
    texts: list[str] = []
    floors: list[str] = []
    bounds: list[str] = []
    for name, direction in directions.items():
        foremost = _foremost(direction).sign()
        if constraint_of(name).event_dim == 2 and bool(foremost.any()):
            matrices = (foremost != 0).any(-1).any(-1)
            texts.append(f"{named(name, matrices, matrices.shape)} becomes singular")
            floors.append(name)
            continue
        for sign in (-1, 1):
            if bool((foremost == sign).any()):
                texts.append(f"{named(name, foremost == sign, direction.shape)} {_whither(name, sign < 0)}")
                (floors if sign < 0 and hasattr(constraint_of(name), "lower_bound") else bounds).append(name)
    prior = "a prior (a pyro.sample site, with AutoDelta as its guide)"
    if floors and not bounds:
        own = ", ".join(f"'{name}': 1e-3" for name in floors)
        hint = f"Give a floor, floor={{{own}}}, or {prior}; or use fewer components."
    else:
        names = " and ".join(f"'{name}'" for name in dict.fromkeys([*floors, *bounds]))
        hint = f"Give {names} {prior}, or bounds, constraints.interval(low, high); or use fewer components."
    return DegenerateError(f"{fact} {', '.join(texts)}.", hint=hint)


def _whither(name: str, down: bool) -> str:
    if not down:
        return "grows"
    return "goes to zero" if getattr(constraint_of(name), "lower_bound", None) == 0 else "falls"
