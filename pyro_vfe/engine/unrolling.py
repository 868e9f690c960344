r"""Writing a plate out: one copy of each variable per element, and back.

    v in plates {i, j}   ->   v[i=0], ..., v[i=n-1] in plates {j}        and stitched:   v(i, j) = v[i](j)

Needed where plates cross: a_i, b_j and c_ij cannot be summed plate by plate. Slices are views of the tables they come
from, so gradients reach the original tables.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from pyro_vfe.engine.factors import Factor, FactorGraph, Scale, Table, Variable
from pyro_vfe.engine.structure import FactorShape, Structure, Unrolling, VariableShape, tied_inside, unrolled


def structure_of(graph: FactorGraph) -> Structure:
    """Returns what a plan sees of a graph."""
    return Structure(
        tuple(FactorShape(f.name, f.axes, f.plates) for f in graph.factors),
        tuple(VariableShape(v.name, v.size, v.plates, v.chain) for v in graph.variables.values()),
        tuple(graph.plates.items()),
    )


def unroll(graph: FactorGraph, plate: str, variables: Iterable[str] | None = None) -> tuple[FactorGraph, Unrolling]:
    """Returns the graph with a plate written out, and what was copied.

    Args:
        plate: The plate to write out.
        variables: Variables to copy; those tied to them inside the plate are copied as well. All inside it by default.

    Raises:
        CostError: The copies would be too many.
    """
    structure = structure_of(graph)
    seeds = graph.variables if variables is None else variables
    unrolling = Unrolling(plate, graph.plates[plate], tied_inside(structure, plate, seeds))
    return apply_unrolling(graph, unrolling), unrolling


def apply_unrolling(graph: FactorGraph, unrolling: Unrolling) -> FactorGraph:
    """Returns the graph with the copies that `unrolling` names."""
    structure, sources = unrolled(structure_of(graph), unrolling)
    slices = _Slices(unrolling.plate)
    factors = [
        graph.factors[source.factor]
        if source.element is None
        else _sliced(graph.factors[source.factor], shape, source.element, slices)
        for shape, source in zip(structure.factors, sources, strict=True)
    ]
    variables: dict[str, Variable] = {}
    for variable in graph.variables.values():
        if variable.name not in unrolling.variables:
            variables[variable.name] = variable
            continue
        plates = variable.plates - {unrolling.plate}
        for element, name in enumerate(unrolling.copies(variable.name)):
            scale = slices.scale(variable.scale, element)
            variables[name] = Variable(name, variable.size, plates, scale, variable.chain)
    return replace(graph, factors=tuple(factors), variables=variables)


def stitch(tables: Mapping[str, Table], unrollings: Sequence[Unrolling]) -> dict[str, Table]:
    """Returns tables per original variable: the copies' tables stacked along the plates that were written out."""
    stitched = dict(tables)
    for unrolling in reversed(unrollings):
        for name in unrolling.variables:
            copies = [stitched.pop(copy) for copy in unrolling.copies(name)]
            axes = copies[0].axes
            stacked = torch.stack([copy.aligned(axes) for copy in copies], -1)
            stitched[name] = Table(stacked, (*axes, unrolling.plate))
    return stitched


class _Slices:
    """Slices of scales, made once, so that scales that were one object stay one object."""

    def __init__(self, plate: str) -> None:
        self.plate = plate
        self._made: dict[tuple[int, int], Table] = {}

    def scale(self, scale: Scale, element: int) -> Scale:
        """The scale of one element."""
        if not isinstance(scale, Table) or self.plate not in scale.axes:
            return scale
        key = (id(scale), element)
        if key not in self._made:
            self._made[key] = scale.selected(self.plate, element)
        return self._made[key]


def _sliced(factor: Factor, shape: FactorShape, element: int, slices: _Slices) -> Factor:
    names = dict(zip((axis for axis in factor.axes if axis != slices.plate), shape.axes, strict=True))

    def renamed(table: Table) -> Table:
        chosen = table.selected(slices.plate, element)
        return Table(chosen.values, tuple(names.get(axis, axis) for axis in chosen.axes))

    return replace(
        factor.mapped(renamed), name=shape.name, plates=shape.plates, scale=slices.scale(factor.scale, element)
    )
