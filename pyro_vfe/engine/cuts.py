r"""Which variables to sum value by value, so that what is held at a time fits.

    sum_{x, c} prod_f f(x, c)  =  sum_c [ sum_x prod_f f(x, c) ]        held: one value's tables        slices = |c|

A variable that is cut leaves every table; what was made of such a table is made anew for each value. Chosen greedily:
the variable that saves the most memory per factor of work. Names and sizes only; no tensors.

References:
    Darwiche (2001), Recursive conditioning.
    Gray and Kourtis (2021), Hyper-optimized tensor network contraction (slicing).
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from math import log2

MOST_SLICES = 4096
"""The most slices that a component is cut into."""

Sized = tuple[frozenset[str], int]
"""Axes, and how many entries a table over them has."""


def cut_to_fit(
    products: Sequence[Sized],
    tables: Sequence[Sized],
    variables: Iterable[str],
    sizes: Mapping[str, int],
    limit: float,
    result: int = 1,
) -> tuple[str, ...]:
    """Returns the variables to cut so that at most `limit` numbers are held at a time; none where that cannot be.

    Args:
        products: What is multiplied out: the work.
        tables: What is held.
        variables: The variables that may be cut.
        sizes: The size of each.
        limit: The most numbers.
        result: Entries of what is left of a slice.
    """
    cut: list[str] = []
    slices = 1
    left = {name for name in variables if sizes[name] > 1}
    while _total(tables) + held_beside(slices, result) > limit:
        largest = max(tables, key=lambda table: table[1])
        within = sorted(name for name in largest[0] & left if slices * sizes[name] <= MOST_SLICES)
        if not within:
            return ()
        best = max(within, key=lambda name: _saving(products, tables, name, sizes[name]))
        cut.append(best)
        left.remove(best)
        slices *= sizes[best]
        products, tables = _without(products, best, sizes[best]), _without(tables, best, sizes[best])
    return tuple(cut)


def held_beside(slices: int, result: int) -> int:
    """Returns how many numbers the slices' results have, which are held until they are summed."""
    return slices * result if slices > 1 else 0


def dependent(
    inputs: Mapping[int, Iterable[str]],
    operands: Iterable[tuple[int, int | None]],
    cut: Container[str],
    first_slot: int,
) -> set[int]:
    """Returns the slots whose tables differ from slice to slice.

    Args:
        inputs: The axes of each input slot, those of the cut variables included.
        operands: The slots that each step reads.
        cut: The variables that are cut.
        first_slot: The slot of the first step's result.
    """
    found = {slot for slot, axes in inputs.items() if any(axis in cut for axis in axes)}
    for slot, (left, right) in enumerate(operands, first_slot):
        if left in found or right in found:
            found.add(slot)
    return found


def _saving(products: Sequence[Sized], tables: Sequence[Sized], name: str, size: int) -> float:
    """Returns by how many powers the memory shrinks for each power by which the work grows."""
    before, after = _total(tables), _total(_without(tables, name, size))
    work, more = _total(products), size * _total(_without(products, name, size))
    return log2(before / max(1, after)) / (log2(max(1, more) / max(1, work)) + 0.1)


def _total(tables: Sequence[Sized]) -> int:
    return sum(entries for _, entries in tables)


def _without(tables: Sequence[Sized], name: str, size: int) -> list[Sized]:
    return [(axes, entries // size if name in axes else entries) for axes, entries in tables]
