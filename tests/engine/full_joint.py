"""The oracle: the full joint log table of a plated factor graph, one dimension per copy of a variable, in float64."""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from pyro_vfe.engine import FactorGraph, Table

Copy = tuple[str, tuple[tuple[str, int], ...]]
"""A variable and the element of each of its plates."""


@dataclass(frozen=True, eq=False)
class FullJoint:
    """Every assignment of every copy, enumerated."""

    copies: list[Copy]
    log_table: Tensor

    @property
    def log_normalizer(self) -> Tensor:
        return sum_exp(self.log_table, list(range(self.log_table.dim())))

    def log_marginal(self, wanted: list[Copy]) -> Tensor:
        """The log table over some copies, the others summed out."""
        others = [n for n, copy in enumerate(self.copies) if copy not in wanted]
        table = sum_exp(self.log_table, others)
        left = [copy for copy in self.copies if copy in wanted]
        return table.permute([left.index(copy) for copy in wanted])


def sum_exp(values: Tensor, dims: list[int]) -> Tensor:
    """The log-sum-exp by its definition after one global shift."""
    if not dims:
        return values
    shift = values.max() if values.max() > -torch.inf else values.new_zeros(())
    return (values - shift).exp().sum(dims).log() + shift


def elements(plates: frozenset[str], sizes: dict[str, int]) -> list[dict[str, int]]:
    """Every element of the product of some plates."""
    names = sorted(plates)
    return [dict(zip(names, at, strict=True)) for at in product(*(range(sizes[plate]) for plate in names))]


def copy_of(graph: FactorGraph, name: str, at: dict[str, int]) -> Copy:
    """The copy of a variable that a factor's element reads."""
    return name, tuple((plate, at[plate]) for plate in sorted(graph.variables[name].plates))


def full_joint(graph: FactorGraph) -> FullJoint:
    """Expands plates and adds every factor element to one table."""
    sizes = dict(graph.plates)
    copies = [copy_of(graph, name, at) for name, v in graph.variables.items() for at in elements(v.plates, sizes)]
    shape = [graph.variables[name].size for name, _ in copies]
    total = torch.zeros(shape, dtype=torch.float64)
    for factor in graph.factors:
        for at in elements(factor.plates, sizes):
            total = total + placed(graph, factor.table, at, copies)
    return FullJoint(copies, total)


def placed(graph: FactorGraph, table: Table, at: dict[str, int], copies: list[Copy]) -> Tensor:
    """One element of a factor, its dimensions put where its copies are."""
    values = table.values[tuple(at[axis] if axis in at else slice(None) for axis in table.axes)].double()
    scope = [copies.index(copy_of(graph, axis, at)) for axis in table.axes if axis not in at]
    order = sorted(range(len(scope)), key=lambda n: scope[n])
    values = values.permute(order)
    shape = [1] * len(copies)
    for n, size in zip(sorted(scope), values.shape, strict=True):
        shape[n] = size
    return values.reshape(shape)
