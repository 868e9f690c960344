"""How entries of parameters are named in messages, and which floor holds for them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Floor = Mapping[str, float] | float | None
"""The least value of scales, variances, rates and probabilities: for all parameters, by name, or none."""

ABOVE = 8
"""A floor is held so many roundings above itself: none of those on the way to a program takes a value below it."""

NAMED = 3
"""How many entries a message names; the others are counted."""


def floor_of(floor: Floor, name: str) -> float | None:
    """The floor of one parameter; None where it has none.

    Args:
        floor: One number for all, or numbers by name.
        name: The parameter.
    """
    own = floor.get(name) if isinstance(floor, Mapping) else floor
    return None if own is None else own * (1 + ABOVE * torch.finfo(torch.float64).eps)


def is_named(floor: Floor, name: str) -> bool:
    """Whether a floor was given for a parameter by its name.

    Args:
        floor: One number for all, or numbers by name.
        name: The parameter.
    """
    return isinstance(floor, Mapping) and name in floor


def named(name: str, chosen: Tensor, shape: Sequence[int]) -> str:
    """The chosen entries of a parameter as text: `'transition'[3] and 2 more`.

    Args:
        name: The parameter.
        chosen: Which entries, a mask of as many elements as `shape` has.
        shape: The shape that the entries are laid out in; none for a parameter that is one entry.
    """
    flat = chosen.flatten().nonzero()[:, 0]
    if not shape:
        return f"'{name}'"
    places = torch.stack(torch.unravel_index(flat[:NAMED], tuple(shape)), -1).tolist()
    texts = [f"'{name}'[{', '.join(map(str, place))}]" for place in places]
    rest = len(flat) - len(texts)
    return ", ".join(texts) + (f" and {rest} more" if rest else "")
