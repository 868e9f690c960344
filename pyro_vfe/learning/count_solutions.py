r"""The best probabilities and rates given pooled counts.

    simplex   theta_k = a_k / sum a          unit   theta = a / (a + b)          rate   theta = a / b

With a floor they are the best of those that respect it. For what is exactly 0 (a probability also 1) it is none.
"""

import torch
from torch import Tensor

from pyro_vfe.errors import DegenerateError, ProbabilityError
from pyro_vfe.learning.entries import named
from pyro_vfe.learning.pools import ObjectiveForm

CANCELLED = 64
"""A coefficient this many roundings below zero is zero: weights that were added have been taken away again."""

FLOOR = "Give a floor, floor={{'{name}': 1e-6}}, or the parameter a prior."
CONCENTRATION = (
    "Give that prior concentrations of at least one; or give a floor, floor={{'{name}': 1e-6}}, which keeps the "
    "probability inside."
)
PRIOR = "Give '{name}' a prior: a floor is no ceiling."


def best_counts(name: str, form: ObjectiveForm, coefficients: Tensor, value: Tensor, floor: float | None) -> Tensor:
    """The best value of a parameter, in its shape; entries that nothing is known of keep their old values.

    Args:
        name: The parameter.
        form: Its form: simplex, unit or rate.
        coefficients: a, or a and b, `(1, entries)` or `(2, entries)`.
        value: The old value; for entries at the end of their range the floor is none.
        floor: The least probability or rate.

    Raises:
        DegenerateError: There is no best value among those that the parameter can have.
        ProbabilityError: No probabilities respect the floor.
    """
    own, old = rounded_off(coefficients).reshape(-1, *value.shape), value.detach()
    held = is_at_end(form, old)
    known = is_known(form, own)
    if form.kind == "simplex":
        found = _best_simplex(name, own[0], held, floor)
    elif form.kind == "unit":
        found = _best_unit(name, own[0], own[1], held, floor)
    else:
        known = known & ~held
        found = _best_rate(name, own[0].where(known, 0.0), own[1].where(known, 0.0), floor)
    if form.given == "logits" and form.kind == "simplex":
        found = found.log()
    elif form.given == "logits":
        infinite = known & ~held & ((found == 0) | (found == 1))
        _refuse(name, infinite, value.shape, "Log-odds are infinite, as all their data agree")
        found = found.log() - torch.log1p(-found)
    return torch.where(known, found, old.to(found))


def is_at_end(form: ObjectiveForm, value: Tensor) -> Tensor:
    """Which entries are at the end of their range: 0, a probability of one outcome also 1, as near as it is stored.

    Such an entry is part of the model (a transition that is none), and no floor is meant for it.

    Args:
        form: The parameter's form.
        value: The parameter.
    """
    if form.given == "logits":
        return value.isneginf() if form.kind == "simplex" else value.isinf()
    return probability_at_end(value) if form.kind == "unit" else value == 0


def probability_at_end(value: Tensor) -> Tensor:
    """Which probabilities are 0 or 1: torch keeps them a rounding away from either.

    Args:
        value: Probabilities, in the type that they are stored in.
    """
    kind = torch.finfo(value.dtype)
    return (value <= kind.tiny) | (value >= 1 - kind.eps)


def rounded_off(coefficients: Tensor) -> Tensor:
    """The coefficients, with zero for those that are negative by rounding alone.

    Args:
        coefficients: `(parts, entries)`.
    """
    size = coefficients.abs().amax() if coefficients.numel() else 0.0
    noise = CANCELLED * torch.finfo(coefficients.dtype).eps * size
    return torch.where((coefficients < 0) & (coefficients > -noise), 0.0, coefficients)


def is_known(form: ObjectiveForm, coefficients: Tensor) -> Tensor:
    """Whether there is anything to learn an entry from, of the parameter's shape; a row of a simplex goes together.

    Args:
        form: The parameter's form.
        coefficients: a, or a and b, `(parts, *shape)`.
    """
    known = (coefficients.abs() >= torch.finfo(coefficients.dtype).tiny).any(0)
    return known.any(-1, keepdim=True).expand(known.shape) if form.kind == "simplex" else known


def _best_simplex(name: str, counts: Tensor, held: Tensor, floor: float | None) -> Tensor:
    if floor is None:
        fact = "The best probability is zero, as the prior's concentration is below one"
        _refuse(name, counts < 0, counts.shape, fact, CONCENTRATION)
        return counts / counts.sum(-1, keepdim=True).where(counts.sum(-1, keepdim=True) > 0, 1.0)
    check_room(name, ~held, floor)
    least = torch.where(held, 0.0, floor)
    free = counts > 0
    while True:  # those at the floor take from the others, which may bring more of these to the floor
        mass = 1 - least.where(~free, 0.0).sum(-1, keepdim=True)
        kept = counts.where(free, 0.0)
        total = kept.sum(-1, keepdim=True)
        share = torch.where(free, kept / total.where(total > 0, 1.0) * mass, least)
        below = free & (share < floor)
        if not bool(below.any()):
            alone = ~free.any(-1, keepdim=True) & (counts < 0).any(-1, keepdim=True)
            _refuse(
                name,
                alone.expand(counts.shape),
                counts.shape,
                "There is no best probability without counts, as the prior's concentration is below one",
            )
            return share
        free = free & ~below


def _best_unit(name: str, successes: Tensor, failures: Tensor, held: Tensor, floor: float | None) -> Tensor:
    total = successes + failures
    share = successes / total.where(total > 0, 1.0)
    if floor is None:
        unbounded = (successes < 0) | (failures < 0)
        fact = "The best probability is 0 or 1, as the prior's concentration is below one"
        _refuse(name, unbounded, total.shape, fact, CONCENTRATION)
        return share
    if floor >= 0.5:
        raise ProbabilityError(
            f"The floor {floor:g} of '{name}' leaves no probability: that of 0 has it too.",
            hint="Choose a smaller one, by name: floor={'" + name + "': 1e-6, ...}.",
        )
    inside = torch.where((successes >= 0) & (failures >= 0), share, floor).clamp(floor, 1 - floor)
    candidates = torch.stack([inside, torch.full_like(share, floor), torch.full_like(share, 1 - floor)])
    worth = torch.xlogy(successes, candidates) + torch.special.xlog1py(failures, -candidates)
    return torch.where(held, share, candidates.gather(0, worth.argmax(0, keepdim=True))[0])


def _best_rate(name: str, events: Tensor, exposure: Tensor, floor: float | None) -> Tensor:
    known = (events != 0) | (exposure != 0)
    unbounded = known & (exposure <= 0) & (events > 0)
    _refuse(name, unbounded, events.shape, "A rate grows beyond all numbers, as all its data are zero", PRIOR)
    rate = events / exposure.where(exposure > 0, 1.0)
    if floor is None:
        _refuse(name, known & (events <= 0), events.shape, "A rate falls to zero, as it has nothing to explain")
        return rate
    return rate.clamp(min=floor)


def check_room(name: str, free: Tensor, floor: float) -> None:
    """Checks that a floor leaves probabilities to choose between.

    Args:
        name: The parameter.
        free: Which entries have the floor, `(*rows, K)`.
        floor: The least probability.

    Raises:
        ProbabilityError: They sum to one or more at the floor.
    """
    most = int(free.sum(-1).max())
    if floor * most >= 1:
        raise ProbabilityError(
            f"The floor {floor:g} of '{name}' leaves no probabilities: {most} of them sum to one.",
            hint="Choose a smaller one; by name, floor={'" + name + "': 1e-6, ...}, where others shall have more.",
        )


def _refuse(name: str, chosen: Tensor, shape: torch.Size, fact: str, hint: str = FLOOR) -> None:
    if bool(chosen.any()):
        raise DegenerateError(f"{fact}: {named(name, chosen, shape)}.", hint=hint.format(name=name))


def slope_of_counts(
    form: ObjectiveForm, coefficients: Tensor, value: Tensor, floor: float | None
) -> tuple[Tensor, Tensor]:
    """The gradient of the objective, and the size of what it is made of; both of the parameter's shape.

    The coordinate is one in which a maximum on the boundary has gradient zero too: a - theta sum a for a simplex,
    a (1 - theta) - b theta, a - b theta. At a floor what points below it is zero.

    Args:
        form: The parameter's form.
        coefficients: a, or a and b, `(parts, entries)`.
        value: The parameter's value.
        floor: Its floor.
    """
    own = rounded_off(coefficients).reshape(-1, *value.shape)
    probs = value.detach().to(own)
    if form.given == "logits":
        probs = probs.softmax(-1) if form.kind == "simplex" else probs.sigmoid()
    low = at_floor(probs, floor, value.dtype)
    if form.kind == "simplex":
        probs = probs / probs.sum(-1, keepdim=True)
        free_mass = probs.where(~low, 0.0).sum(-1, keepdim=True)
        price = own[0].where(~low, 0.0).sum(-1, keepdim=True) / free_mass.where(free_mass > 0, 1.0)
        gradient = own[0] - probs * price
        gradient = torch.where(free_mass > 0, gradient, 0.0)
        return torch.where(low, gradient.clamp(min=0), gradient), own[0].abs().sum(-1, keepdim=True).expand(probs.shape)
    a, b = own
    gradient = a * (1 - probs) - b * probs if form.kind == "unit" else a - b * probs
    size = a.abs() + b.abs() * (1.0 if form.kind == "unit" else probs)
    gradient = torch.where(low, gradient.clamp(min=0), gradient)
    if form.kind == "unit":
        gradient = torch.where(at_floor(1 - probs, floor, value.dtype), gradient.clamp(max=0), gradient)
    return gradient, size


def at_floor(values: Tensor, floor: float | None, dtype: torch.dtype) -> Tensor:
    """Which values are at the floor, but for rounding.

    Args:
        values: Scales, variances, rates or probabilities.
        floor: The floor, or None.
        dtype: The type that they are kept in.
    """
    if floor is None:
        return torch.zeros_like(values, dtype=torch.bool)
    return values <= floor * (1 + CANCELLED * torch.finfo(dtype).eps)
