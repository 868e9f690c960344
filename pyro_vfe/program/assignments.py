"""Which values latents have in the ordinary runs of the spot check.

Shifts go through the values, and the elements of plates differ by the digits of their numbers: those that were equal in
every round would pass for one another, and with them a program in which one reads the other. Where a run could not hold
what it makes of all elements (`row_sizes`), those of one plate differ at a time.
"""

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vfe.engine.factors import Table
from pyro_vfe.program.enumeration import Enumeration
from pyro_vfe.program.row_sizes import fits

_MOST_ROUNDS = 6
"""Each round is an ordinary run. With fewer than so many values, a latent outside of plates takes all of them; of fewer
than `num_values ** _MOST_ROUNDS` elements in plates any two differ in some round."""

_MOST_JOINT_ROUNDS = 512
"""The most rounds where values meet in some operation: so many joint values are all taken."""

_Turn = frozenset[str] | None
"""The plates whose elements differ in a round; None for all."""


class Rounds(NamedTuple):
    """Which values latents have in each round."""

    number: int
    digits: int
    """In how many rounds elements of a plate differ by their digits."""
    equal: int
    """From which round on they differ once more; before it they were equal."""
    values: Mapping[str, Tensor]
    """For each latent the index of the value of element 0, round by round."""
    turns: tuple[_Turn, ...]
    """Which plates' elements differ, in turn."""


def rounds_of(
    enumeration: Enumeration,
    mixed: frozenset[str],
    row_bytes: float,
    *,
    at_most: int | None = None,
    alike: bool = False,
) -> Rounds:
    """Returns a few rounds that go through values from a random start; all joint values of latents whose values meet.

    Args:
        enumeration: What is checked.
        mixed: Latents whose values meet in some operation.
        row_bytes: The most that an ordinary run makes for each element of a latent.
        at_most: How many rounds to take; as many as tell elements apart where that is None.
        alike: Whether all elements of a plate have one value in each round.
    """
    sizes = {name: enumeration.variables[name].size for name in enumeration.supports}
    turns = (frozenset[str](),) if alike else _turns(enumeration, row_bytes)
    digits = at_most or min(_MOST_ROUNDS, max((_rounds_for(enumeration, name) for name in sizes), default=1))
    joint = prod(sizes[name] for name in mixed)
    count = at_most or digits * len(turns)
    count += min(joint, _MOST_JOINT_ROUNDS) if mixed else 0
    equal = count
    if any(enumeration.variables[name].plates for name in mixed):  # Equal elements show what others do not.
        count += min(joint, _MOST_JOINT_ROUNDS)
    values, stride = {}, 1
    for name, size in sizes.items():
        values[name] = (torch.randint(size, ()) + torch.arange(count) // (stride if name in mixed else 1)) % size
        if name in mixed and joint > _MOST_JOINT_ROUNDS:
            values[name] = torch.cat([torch.randperm(size) for _ in range(-(-count // size))])
        stride *= size if name in mixed else 1
    if len(turns) > 1:
        first = int(torch.randint(len(turns), ()))
        turns = (*turns[first:], *turns[:first])
    return Rounds(count, digits, equal, values, turns)


def assignment_of(enumeration: Enumeration, rounds: Rounds, number: int) -> dict[str, Table]:
    """Returns a value index for every latent element, and for every draw that is a variable of its own.

    Args:
        enumeration: What is checked.
        rounds: Of the check.
        number: Of the round.
    """
    assignment = {}
    place, turn = divmod(number, len(rounds.turns))
    for name, values in rounds.values.items():
        axes = _axes(enumeration, name, rounds.turns[turn])
        size, shape = enumeration.variables[name].size, [enumeration.plates[plate] for plate in axes]
        own = place if number < rounds.equal else place % _needed_digits(prod(shape), size, rounds.digits)
        digits = _digits(prod(shape), size, own, rounds.digits).reshape(shape)
        assignment[name] = Table((values[number] + digits) % size, axes)
    for name in enumeration.draws:
        assignment[name] = Table(torch.zeros((), dtype=torch.long), ())
    return enumeration.with_path(assignment)


def _turns(enumeration: Enumeration, row_bytes: float) -> tuple[_Turn, ...]:
    """All plates at once; one after the other where a run could not hold what it makes of all elements of a latent."""
    large: dict[str, None] = {}
    for name in enumeration.supports:
        axes = _axes(enumeration, name, None)
        if not fits(prod(enumeration.plates[plate] for plate in axes) * row_bytes):
            large |= dict.fromkeys(axes)
    if not large:
        return (None,)
    fit = [frozenset([plate]) for plate in large if fits(enumeration.plates[plate] * row_bytes)]
    return tuple(fit) or (frozenset(),)


def _rounds_for(enumeration: Enumeration, name: str) -> int:
    """As many as a latent has values, or as the numbers of its elements have digits; where these are many, one random
    round tells them apart."""
    axes = _axes(enumeration, name, None)
    num_values, count = enumeration.variables[name].size, prod(enumeration.plates[plate] for plate in axes)
    if num_values == 1 or count > num_values**_MOST_ROUNDS:
        return max(num_values, 2)
    return max(num_values, next(digits for digits in range(_MOST_ROUNDS + 1) if num_values**digits >= count))


def _needed_digits(count: int, base: int, most: int) -> int:
    """How many digits tell 0 ... count - 1 apart, at most so many."""
    return next((digits for digits in range(1, most) if base**digits >= count), most)


def _digits(count: int, base: int, place: int, places: int) -> Tensor:
    """The digits of 0 ... count - 1 at a place; random ones at the last place where they have more places."""
    if place == places - 1 and base**places < count:
        return torch.randint(base, (count,), generator=torch.Generator().manual_seed(0))
    if place >= places or base**place >= count:
        return torch.zeros(count, dtype=torch.long)
    return torch.arange(count) // base**place % base


def _axes(enumeration: Enumeration, name: str, turn: _Turn) -> tuple[str, ...]:
    """The plates along which a latent's elements differ; a chain's steps always do."""
    own = sorted(enumeration.variables[name].plates)
    return tuple(plate for plate in own if turn is None or plate in turn or plate == enumeration.chain_plate(name))
