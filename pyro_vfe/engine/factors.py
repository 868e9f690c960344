r"""Plated factor graphs: log tables with named axes.

    log Z  =  log sum_{x} exp( sum_f sum_{n in plates(f)} f(x_scope(f), n) )

A variable inside plates stands for one copy per element, and so does a factor. A table carries only the axes along
which it varies; a plate of the factor that the table lacks means the same table for each element.

Along one of its plates a variable may be a chain: a factor that reads its previous value has a table for the elements
after the first (one entry fewer along the plate's axis) and another, without previous values, for the first.

References:
    Kschischang, Frey and Loeliger (2001), Factor graphs and the sum-product algorithm.
    Obermeyer et al. (2019), Tensor variable elimination for plated factor graphs.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vfe.engine.structure import previous
from pyro_vfe.errors import ScaleError, VFEError


@dataclass(frozen=True, eq=False)
class Table:
    """A tensor with one name per dimension."""

    values: Tensor
    """The numbers, shape `(*axes)`."""

    axes: tuple[str, ...]
    """The name of each dimension, all different."""

    def __post_init__(self) -> None:
        if self.values.dim() != len(self.axes) or len(set(self.axes)) != len(self.axes):
            raise VFEError(
                f"A table of shape {tuple(self.values.shape)} was given the axes {self.axes}.",
                hint="Name each dimension once.",
            )

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each axis."""
        return dict(zip(self.axes, self.values.shape, strict=True))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the numbers."""
        return self.values.dtype

    def aligned(self, axes: Sequence[str]) -> Tensor:
        """Returns the values with their dimensions in the order `axes`; an axis the table lacks has size 1.

        Args:
            axes: Names that include all of the table's own.

        Raises:
            VFEError: The table has an axis that is not among `axes`.
        """
        wanted = tuple(axes)
        if wanted == self.axes:
            return self.values
        dims, index = _alignment(self.axes, wanted)
        values = self.values.permute(dims)
        return values if index is None else values[index]

    def selected(self, axis: str, index: int) -> "Table":
        """Returns the table at one index of an axis, without that axis; itself where it lacks the axis."""
        if axis not in self.axes:
            return self
        rest = tuple(other for other in self.axes if other != axis)
        return Table(self.values.select(self.axes.index(axis), index), rest)

    def narrowed(self, axis: str, start: int, length: int) -> "Table":
        """Returns a stretch of the table along an axis; itself where it lacks the axis."""
        if axis not in self.axes:
            return self
        return Table(self.values.narrow(self.axes.index(axis), start, length), self.axes)

    def without(self, axes: Collection[str]) -> "Table":
        """Returns the table without some axes, which have size 1.

        Args:
            axes: Names; those that the table lacks are of no matter.
        """
        dims = tuple(dim for dim, axis in enumerate(self.axes) if axis in axes)
        if not dims:
            return self
        return Table(self.values.squeeze(dims), tuple(axis for axis in self.axes if axis not in axes))

    def to(self, dtype: torch.dtype) -> "Table":
        """Returns the table with values of another dtype."""
        return Table(self.values.to(dtype), self.axes)


@lru_cache(maxsize=2**16)
def _alignment(
    own: tuple[str, ...], wanted: tuple[str, ...]
) -> tuple[tuple[int, ...], tuple[slice | None, ...] | None]:
    """Returns the permutation, and the index that inserts the axes that are lacking; None where none are."""
    present = [axis for axis in wanted if axis in own]
    if len(present) != len(own):
        missing = [axis for axis in own if axis not in wanted]
        raise VFEError(f"A table over {own} cannot be aligned to {wanted}.", hint=f"Sum over {missing} first.")
    index = tuple(slice(None) if axis in own else None for axis in wanted)
    return tuple(map(own.index, present)), index if len(present) < len(wanted) else None


def total(tables: Sequence[Table]) -> Table:
    """Returns the sum of tables, over the axes of all."""
    axes = tuple(dict.fromkeys(axis for table in tables for axis in table.axes))
    values = tables[0].aligned(axes)
    for table in tables[1:]:
        values = values + table.aligned(axes)
    return Table(values, axes)


Scale = Table | float
"""The weight of a term: one number, or one per plate element."""


class Subsample(NamedTuple):
    """A plate of which some elements are present, each of them for several."""

    plate: str
    """Its name."""

    size: int
    """The number of elements that are present."""

    full_size: int
    """The number of all."""


@dataclass(frozen=True, eq=False)
class Variable:
    """A discrete variable, one copy per element of its plates."""

    name: str
    """The site it came from."""

    size: int
    """The number of its values."""

    plates: frozenset[str]
    """The plates it is repeated over."""

    scale: Scale = 1.0
    """The weight of its sum: the log of the sum counts this many times."""

    chain: str | None = None
    """The plate along which its elements form a chain, if they do."""


@dataclass(frozen=True, eq=False)
class Factor:
    """A log table, repeated over plates."""

    name: str
    """The site it came from."""

    table: Table
    """Log values in nats; its axes are the variables and plates along which it varies."""

    plates: frozenset[str]
    """Every plate it is repeated over: a superset of its table's plates and of its variables' plates."""

    scale: Scale = 1.0
    """The weight of each element: it enters the exponent as `scale * table`."""

    first: Table | None = None
    """The table of a chain's first element; None for a factor that reads no previous value."""

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes of its tables: the table's, then what the first element's has beside them."""
        if self.first is None:
            return self.table.axes
        return tuple(dict.fromkeys((*self.table.axes, *self.first.axes)))

    @property
    def tables(self) -> tuple[Table, ...]:
        """Its table, and the first element's where there is one."""
        return (self.table,) if self.first is None else (self.table, self.first)

    def mapped(self, function: Callable[[Table], Table]) -> "Factor":
        """Returns the factor with its tables replaced by what `function` makes of them."""
        table, first = function(self.table), None if self.first is None else function(self.first)
        return Factor(self.name, table, self.plates, self.scale, first)


@dataclass(frozen=True, eq=False)
class FactorGraph:
    """Factors over plated variables; its value is the log of a sum over all variables."""

    factors: tuple[Factor, ...]
    """The terms of the exponent."""

    variables: Mapping[str, Variable]
    """Every variable by name; one that no table mentions counts as uniform."""

    plates: Mapping[str, int]
    """The size of each plate."""

    subsampled: Mapping[str, frozenset[Subsample]] = field(default_factory=dict)
    """What is subsampled around a variable or factor, by name; one that lies in no such plate may be left out."""

    normalized: bool = False
    """Whether each sum is one, given what stands outside of it: its weight then changes nothing."""

    def scope(self, factor: Factor) -> tuple[str, ...]:
        """Returns the variables that the factor's axes are of, previous values included, in the table's order."""
        earlier = {previous(name): name for name in self.variables} if factor.first is not None else {}
        named = (earlier.get(axis, axis) for axis in factor.axes)
        return tuple(dict.fromkeys(axis for axis in named if axis in self.variables))

    def size(self, axis: str) -> int:
        """Returns the size of a variable or plate."""
        return self.variables[axis].size if axis in self.variables else self.plates[axis]

    def with_factors(self, *factors: Factor) -> "FactorGraph":
        """Returns the graph with more factors."""
        return replace(self, factors=(*self.factors, *factors))

    @property
    def tables(self) -> tuple[Table, ...]:
        """All log tables in the order of the factors, a chain's first element after its others."""
        return tuple(table for factor in self.factors for table in factor.tables)

    def with_tables(self, tables: Iterable[Table]) -> "FactorGraph":
        """Returns the graph with its tables replaced, in the order of `tables`."""
        left = iter(tables)
        return replace(self, factors=tuple(factor.mapped(lambda _: next(left)) for factor in self.factors))

    def to(self, dtype: torch.dtype) -> "FactorGraph":
        """Returns the graph with tables and scales of another dtype."""
        factors = (
            replace(f.mapped(lambda table: table.to(dtype)), scale=_scale_to(f.scale, dtype)) for f in self.factors
        )
        variables = {name: replace(v, scale=_scale_to(v.scale, dtype)) for name, v in self.variables.items()}
        return replace(self, factors=tuple(factors), variables=variables)

    def check(self) -> None:
        """Checks that names, sizes and plates agree.

        Raises:
            VFEError: An axis is unknown or has the wrong size, or a factor lies outside a plate it needs.
        """
        for variable in self.variables.values():
            _check_plates(f"Variable '{variable.name}'", variable.plates, variable.scale, self.plates)
        for factor in self.factors:
            _check_plates(f"Factor '{factor.name}'", factor.plates, factor.scale, self.plates)
            _check_table(factor, factor.table, self)
            if factor.first is not None:
                _check_table(factor, factor.first, self)


def _scale_to(scale: Scale, dtype: torch.dtype) -> Scale:
    return scale.to(dtype) if isinstance(scale, Table) else scale


def _check_plates(who: str, plates: frozenset[str], scale: Scale, known: Mapping[str, int]) -> None:
    unknown = [plate for plate in plates if plate not in known]
    if unknown:
        raise VFEError(f"{who} is in the plates {sorted(unknown)}, whose sizes the graph lacks.", hint="Add them.")
    if isinstance(scale, Table) and not plates.issuperset(scale.axes):
        other = sorted(set(scale.axes) - plates)
        raise ScaleError(
            f"{who} has a scale that varies with {', '.join(map(repr, other))}: a weight multiplies the log of a sum "
            "from outside, and stands for all of it.",
            hint="Let the scale of a latent vary over its own plates only, or put poutine.scale around the "
            "observations instead. F itself, FreeEnergy().loss, is defined where the guide has the latent too.",
        )


def _check_table(factor: Factor, table: Table, graph: FactorGraph) -> None:
    needed: set[str] = set()
    earlier = {previous(name): v for name, v in graph.variables.items()} if factor.first is not None else {}
    shortened = {v.chain for axis, v in earlier.items() if axis in table.axes}
    for axis, size in table.sizes.items():
        variable = graph.variables.get(axis) or earlier.get(axis)
        if variable is None and axis not in graph.plates:
            raise VFEError(
                f"Factor '{factor.name}' has an axis '{axis}', which is no variable and no plate.", hint="Add it."
            )
        needed.update(variable.plates if variable else (axis,))
        expected = variable.size if variable else graph.plates[axis] - (axis in shortened)
        if size != expected:
            raise VFEError(
                f"Factor '{factor.name}' has size {size} along '{axis}', which has {expected} elements.",
                hint="Drop an axis along which nothing varies.",
            )
    if not factor.plates.issuperset(needed):
        outside = sorted(needed - factor.plates)
        raise VFEError(
            f"Factor '{factor.name}' lies outside the plates {outside} of what it reads.",
            hint="Put its site inside those plates.",
        )
