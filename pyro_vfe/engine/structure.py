r"""What a plan sees of a factor graph: names, sizes and plates, no numbers.

    unroll_i( v in plates {i, j} )  =  v[i=0], ..., v[i=n-1] in plates {j}

A structure is hashable, so that a plan is found once per structure. Unrolling a plate replaces each variable inside it
by one copy per element; the sources say which factor, and which element of the plate, each new factor is.

A variable may form a chain along one of its plates: a factor then has an axis for its value at the element before.
"""

from collections.abc import Iterable
from typing import NamedTuple

from pyro_vfe.errors import CostError, PlateError

MAX_COPIES = 20_000
"""The largest number of factors that unrolling one plate may make."""


def previous(name: str) -> str:
    """Returns the axis of a chain variable's value at the element before."""
    return f"{name}[t-1]"


class FactorShape(NamedTuple):
    """A factor without its numbers."""

    name: str
    axes: tuple[str, ...]
    plates: frozenset[str]


class VariableShape(NamedTuple):
    """A variable without its scale."""

    name: str
    size: int
    plates: frozenset[str]
    chain: str | None = None


class Structure(NamedTuple):
    """A factor graph without its numbers; hashable."""

    factors: tuple[FactorShape, ...]
    variables: tuple[VariableShape, ...]
    plates: tuple[tuple[str, int], ...]


class Unrolling(NamedTuple):
    """One plate written out: which variables were copied, how often."""

    plate: str
    size: int
    variables: tuple[str, ...]

    def copies(self, name: str) -> tuple[str, ...]:
        """Returns the names of a variable's copies, in the order of the plate's elements."""
        return tuple(f"{name}[{self.plate}={element}]" for element in range(self.size))


class Source(NamedTuple):
    """Where an unrolled factor came from."""

    factor: int
    """Position among the factors before unrolling."""

    element: int | None
    """The element of the plate it is for; None for a factor left as it was."""


def tied_inside(structure: Structure, plate: str, seeds: Iterable[str]) -> tuple[str, ...]:
    """Returns the variables inside `plate` that share factors with `seeds`, directly or through others inside it."""
    inside = {v.name for v in structure.variables if plate in v.plates}
    earlier = {previous(name): name for name in inside}
    readers: dict[str, list[tuple[str, ...]]] = {}
    for factor in structure.factors:
        scope = tuple(dict.fromkeys(a for a in (earlier.get(axis, axis) for axis in factor.axes) if a in inside))
        for axis in scope:
            readers.setdefault(axis, []).append(scope)
    found = dict.fromkeys(name for name in seeds if name in inside)
    queue = list(found)
    while queue:
        for scope in readers.get(queue.pop(), ()):
            fresh = [name for name in scope if name not in found]
            found.update(dict.fromkeys(fresh))
            queue.extend(fresh)
    return tuple(v.name for v in structure.variables if v.name in found)


def unrolled(structure: Structure, unrolling: Unrolling) -> tuple[Structure, tuple[Source, ...]]:
    """Returns the structure with one plate written out for some variables, and where each new factor came from.

    Raises:
        CostError: The copies would number more than `MAX_COPIES`.
    """
    copied = {*unrolling.variables, *map(previous, unrolling.variables)}
    touched = [not copied.isdisjoint(factor.axes) for factor in structure.factors]
    _guard(structure, unrolling, touched)
    factors: list[FactorShape] = []
    sources: list[Source] = []
    for position, factor in enumerate(structure.factors):
        elements: Iterable[int | None] = range(unrolling.size) if touched[position] else (None,)
        for element in elements:
            factors.append(factor if element is None else _sliced(factor, unrolling, element))
            sources.append(Source(position, element))
    variables: list[VariableShape] = []
    for variable in structure.variables:
        if variable.name in copied:
            if variable.chain == unrolling.plate:
                raise _chain_written_out(variable)
            inner = variable.plates - {unrolling.plate}
            copies = unrolling.copies(variable.name)
            variables.extend(VariableShape(name, variable.size, inner, variable.chain) for name in copies)
        else:
            variables.append(variable)
    return Structure(tuple(factors), tuple(variables), structure.plates), tuple(sources)


def _sliced(factor: FactorShape, unrolling: Unrolling, element: int) -> FactorShape:
    suffix = f"[{unrolling.plate}={element}]"
    renamed = {name: name + suffix for name in unrolling.variables}
    renamed |= {previous(name): previous(copy) for name, copy in renamed.items()}
    axes = tuple(renamed.get(axis, axis) for axis in factor.axes if axis != unrolling.plate)
    return FactorShape(factor.name + suffix, axes, factor.plates - {unrolling.plate})


def _chain_written_out(variable: VariableShape) -> PlateError:
    return PlateError(
        f"Site '{variable.name}' is a chain along plate '{variable.chain}', and latents tie that plate's elements to"
        " another plate's, so the chain would have to be written out.",
        hint="Write the chain as a Python loop, or move the latents that cross it; where the guide has the chain, give "
        "it these latents too.",
    )


def _guard(structure: Structure, unrolling: Unrolling, touched: list[bool]) -> None:
    count = sum(touched) * unrolling.size
    if count > MAX_COPIES:
        sites = sorted(unrolling.variables)
        raise CostError(
            f"The sites {sites[:8]} are tied across the elements of plate '{unrolling.plate}', so its"
            f" {unrolling.size} elements would have to be written out: {count:,} factors.",
            hint="Make the plate smaller, or let the guide draw one of the sites that ties its elements together "
            "(infer={'enumerate': None}).",
            sites=sites,
        )
