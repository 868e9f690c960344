r"""The M-phase in closed form: the best parameters given pooled statistics.

    theta'  =  argmax_theta  E_Q log P(v, u | theta) + log P(theta)

References:
    Dempster, Laird and Rubin (1977), Maximum likelihood from incomplete data via the EM algorithm.
    Gelman et al. (2013), Bayesian data analysis, chapter 13, for the modes under priors.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_vfe.learning.count_solutions import at_floor, best_counts, is_at_end, is_known, rounded_off, slope_of_counts
from pyro_vfe.learning.entries import Floor, floor_of, is_named, named
from pyro_vfe.learning.moments import summed_by
from pyro_vfe.learning.normal_solutions import batch_shape, best_normals, covariance_of, is_weighed, slopes_of_normals
from pyro_vfe.learning.pools import Pools

TOLERANCE = 1e4
"""A gradient has vanished when it is smaller than this many roundings of the terms that it is made of."""

NORMAL_KINDS = ("location", "spread")


@dataclass(frozen=True, eq=False)
class Proposal:
    """New values for parameters, and what is to be said about them."""

    values: Mapping[str, Tensor]
    """Constrained values of the parameters that have a closed form, in their shapes and dtypes."""
    words: Mapping[str, str]
    """How each of them was found."""
    notes: tuple[str, ...]
    """What a user should know: entries that were kept, or are at their floor."""
    refused: Mapping[str, str]
    """The parameters that have no closed form, with the reason."""
    at_floor: frozenset[str]
    """The parameters of which some entry is at its floor: the gradient does not vanish there."""


def solve(
    pools: Pools,
    priors: Pools,
    values: Mapping[str, Tensor],
    names: Collection[str],
    floor: Floor = None,
    constraints: Mapping[str, Constraint] | None = None,
) -> Proposal:
    """The best values of parameters, where there is a closed form; every one is certified by its gradient.

    Args:
        pools: The data's part, of `data_pools`, perhaps of several batches.
        priors: The priors' part, of `prior_pools`.
        values: The present constrained values of all parameters that the pools know.
        names: The parameters to change; the others are held.
        floor: The least value of scales, variances, rates and probabilities (of 1 and of 0), for all parameters or by
            name. For matrices: the least standard deviation in any direction (scale_tril) or the least variance
            (covariance_matrix, precision_matrix). The solution is the best of those that respect it; entries that are
            exactly 0 (a probability also exactly 1) stay.
        constraints: The parameters' constraints: a solution that violates its own is refused.

    Raises:
        DegenerateError: The best value is none that the parameter can have: a variance of zero, an infinite rate.
        ProbabilityError: No probabilities respect the floor.
    """
    total = pools + priors
    located = [name for name, form in total.forms.items() if form.kind == "location" and is_named(floor, name)]
    refused = without_closed_form(total, names, dict.fromkeys(located, "a location has no floor in closed form"))
    while True:
        accepted = [name for name in names if name not in refused]
        found, sweeps = _solutions(total, values, accepted, floor)
        proposed = {name: found[name].to(values[name].dtype) for name in accepted}
        failed = _outside(proposed, constraints or {})
        held = _certified(total, {**values, **proposed}, accepted, floor)
        failed |= {name: "its gradient does not vanish at the closed form" for name in accepted if not held[name]}
        if not failed:
            break
        refused = without_closed_form(total, names, {**refused, **failed})
    words = {name: _words(name, total, sweeps) for name in accepted}
    notes, at_floor = _notes(total, proposed, floor)
    return Proposal(proposed, words, tuple(notes), refused, at_floor)


def gradient(pools: Pools, priors: Pools, values: Mapping[str, Tensor], floor: Floor = None) -> dict[str, Tensor]:
    """The gradient of the pooled objective at some values, by parameter, in nats.

    It is taken in coordinates in which it is zero at a maximum on the boundary too: a - theta sum a for a simplex,
    a (1 - theta) - b theta for a probability, a - b theta for a rate; a location counts in units of its standard
    error, a covariance by the logarithm of its scales, along its own axes. At a floor what points below it is zero.

    Args:
        pools: The data's part.
        priors: The priors' part.
        values: Constrained values.
        floor: As in `solve`.
    """
    total = pools + priors
    return {name: slope for name, (slope, _) in _slopes(total, values, _pooled(total), floor).items()}


def certified(
    pools: Pools,
    priors: Pools,
    values: Mapping[str, Tensor],
    names: Collection[str],
    floor: Floor = None,
) -> dict[str, bool]:
    """Whether the gradient of the pooled objective vanishes, by parameter, next to the rounding of its terms.

    Args:
        pools: The data's part.
        priors: The priors' part.
        values: Constrained values; their dtype says how exact they can be.
        names: The parameters of interest.
        floor: As in `solve`.
    """
    return _certified(pools + priors, values, names, floor)


def _certified(total: Pools, values: Mapping[str, Tensor], names: Collection[str], floor: Floor) -> dict[str, bool]:
    result = {}
    for name, (slope, size) in _slopes(total, values, names, floor).items():
        rounding = TOLERANCE * torch.finfo(values[name].dtype).eps
        result[name] = bool((slope.abs() <= rounding * size).all())
    return result


def _pooled(total: Pools) -> list[str]:
    return [name for name, form in total.forms.items() if form.kind != "several"]


def without_closed_form(total: Pools, names: Collection[str], known: Mapping[str, str]) -> dict[str, str]:
    """The parameters without a closed form, and those read beside them, whose best value goes with theirs.

    Args:
        total: Data and priors.
        names: The parameters to change.
        known: Those that are known to have none, with the reason in words.
    """
    refused = dict(known)
    for name in names:
        if name in total.refusals:
            refused.setdefault(name, total.refusals[name])
        elif name not in total.forms:
            refused.setdefault(name, "no site tells of it")
    several = {name for name, form in total.forms.items() if form.kind == "several"}
    waiting = [*refused, *several]
    while waiting:
        other = waiting.pop()
        for name in total.partners.get(other, frozenset()):
            if name in names and name not in refused:
                refused[name] = f"'{other}', which a site reads beside it, has no closed form"
                waiting.append(name)
    return refused


def _solutions(
    total: Pools, values: Mapping[str, Tensor], names: list[str], floor: Floor
) -> tuple[dict[str, Tensor], int]:
    """New values in float64, and how many turns locations and covariances took."""
    found = {}
    for name in names:
        if total.forms[name].kind not in NORMAL_KINDS:
            own = floor_of(floor, name)
            found[name] = best_counts(name, total.forms[name], total.coefficients[name], values[name], own)
    normal = [name for name in names if name not in found]
    if not normal:
        return found, 0
    solution, sweeps = best_normals(total, values, normal, floor)
    return {**found, **solution}, sweeps


def _outside(proposed: Mapping[str, Tensor], constraints: Mapping[str, Constraint]) -> dict[str, str]:
    return {
        name: f"the closed form violates its constraint, {constraints[name]}"
        for name, value in proposed.items()
        if name in constraints and not bool(constraints[name].check(value).all())
    }


def _slopes(
    total: Pools, values: Mapping[str, Tensor], names: Collection[str], floor: Floor
) -> dict[str, tuple[Tensor, Tensor]]:
    slopes = {}
    normal = []
    for name in names:
        form = total.forms[name]
        if form.kind in NORMAL_KINDS:
            normal.append(name)
        else:
            slopes[name] = slope_of_counts(form, total.coefficients[name], values[name], floor_of(floor, name))
    return slopes | (slopes_of_normals(total, values, normal, floor) if normal else {})


WHAT = {
    "simplex": "shares of expected counts",
    "unit": "share of expected counts",
    "rate": "expected counts over exposure",
    "location": "weighted mean",
    "spread": "weighted mean square about the mean",
}


def _words(name: str, total: Pools, sweeps: int) -> str:
    kind = total.forms[name].kind
    text = f"closed form: {WHAT[kind]}"
    if name in total.priors:
        text += f", with {total.priors[name]} prior"
    return text + (f", {sweeps} sweeps" if kind in NORMAL_KINDS and sweeps > 2 else "")


def _notes(total: Pools, proposed: Mapping[str, Tensor], floor: Floor) -> tuple[list[str], frozenset[str]]:
    """What is to be said of entries that were kept or are at a floor, and which parameters are."""
    notes, floored = [], set()
    for name, value in proposed.items():
        known, low, shape = _state(name, total, value, floor_of(floor, name))
        if not bool(known.all()):
            notes.append(f"Never visited, and left as before: {named(name, ~known, shape)}.")
        if bool((low & known).any()):
            notes.append(f"At the floor: {named(name, low & known, shape)}.")
            floored.add(name)
    return notes, frozenset(floored)


def _state(name: str, total: Pools, value: Tensor, floor: float | None) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Which entries something is known of, which are at the floor, and the shape in which they are laid out."""
    form = total.forms[name]
    wide = value.to(torch.float64)
    if form.kind == "spread":
        count = _sum_of_counts(total, name, wide.numel() // form.size**2)
        least = torch.linalg.eigvalsh(covariance_of(wide, form)).amin(-1)
        square = floor is not None and form.given in ("scale", "scale_tril")
        low = at_floor(least, floor * floor if square and floor is not None else floor, value.dtype)
        return is_weighed(count), low, batch_shape(form, value)
    if form.kind == "location":
        weight = _sum_of_weights(total, name, wide.numel() // form.size)
        shape = tuple(value.shape) if form.size == 1 else tuple(value.shape[:-1])
        return is_weighed(weight), torch.zeros_like(weight, dtype=torch.bool), shape
    known = is_known(form, rounded_off(total.coefficients[name]).reshape(-1, *value.shape))
    probs = wide
    if form.given == "logits":
        probs = wide.softmax(-1) if form.kind == "simplex" else wide.sigmoid()
    least = torch.minimum(probs, 1 - probs) if form.kind == "unit" else probs
    low = at_floor(least, floor, value.dtype) & ~is_at_end(form, value)
    if form.kind == "simplex":
        return known[..., 0], low.any(-1), tuple(value.shape[:-1])
    return known, low, tuple(value.shape)


def _sum_of_counts(total: Pools, name: str, entries: int) -> Tensor:
    """How often each covariance of a parameter counts, `(entries,)`."""
    parts = [
        summed_by(moments.spread, moments.count, entries)
        for (_, spread), moments in total.moments.items()
        if spread == name
    ]
    return torch.stack(parts).sum(0)


def _sum_of_weights(total: Pools, name: str, entries: int) -> Tensor:
    """The weight of what tells of each location of a parameter, `(entries,)`; in any unit."""
    parts = [
        summed_by(moments.location, moments.weight, entries)
        for (location, _), moments in total.moments.items()
        if location == name
    ]
    if name in total.evidence:
        parts.append(total.evidence[name].precision.diagonal(dim1=-2, dim2=-1).sum(-1))
    return torch.stack(parts).sum(0)
