r"""A Q that is a product of independent factors, and the best of each given the others.

    d E_Q[ f(v) ] / d q_i(k)  =  sum over the other latents of f's table   prod_j q_j(v_j) f(v_j, v_i = k)

summed over the tables f of log P(v, u). A table's value -inf where the others have weight makes k impossible: q_i(k) is
then exactly zero. Latents that only the model has are summed out of it first; where that ties the elements of a plate
together, they are variables of their own and change one after the other.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from pyro_vfe.energy.parts import log_joint
from pyro_vfe.engine.factors import Factor, FactorGraph, Table
from pyro_vfe.engine.scales import applied
from pyro_vfe.engine.structure import previous
from pyro_vfe.program.enumeration import Enumeration, SiteKey


@dataclass(frozen=True, eq=False)
class _Read:
    """What an axis of a cost's table reads."""

    variable: str
    start: int = 0
    """The first element that is read along the time plate."""


@dataclass(frozen=True, eq=False)
class _Cost:
    """A table of log P; one of a chain stands as two, for the first element and for those after it."""

    values: Tensor
    """The table, with 0 in place of -inf."""
    impossible: Tensor | None
    """One where the table is -inf, else zero; None where it nowhere is."""
    axes: tuple[str, ...]
    plates: Mapping[str, int]
    """The plates it is repeated over, with the number of elements."""
    time: str | None
    """The plate whose elements it reads a part of."""
    reads: Mapping[str, _Read]
    """For each axis of a latent, what it reads."""


class FactoredQ:
    """The factors of Q as tables of log q, with the tables of the model that they meet."""

    def __init__(self, enumeration: Enumeration, max_bytes: float | None = None) -> None:
        """Args:
        enumeration: The factors of both programs in float64; each latent of the guide is independent of the others.
        max_bytes: The most memory that intermediate tables may take.
        """
        self._axes: dict[str, tuple[str, ...]] = {}
        self._shapes: dict[str, list[int]] = {}
        self._entries: dict[str, slice] = {}
        flat = [self._laid_out(factor, enumeration) for factor in enumeration.guide_latents]
        self._log_q = torch.cat(flat)
        self._start = self._log_q.clone()
        self._connect(enumeration, max_bytes)

    def _connect(self, enumeration: Enumeration, max_bytes: float | None) -> None:
        """Finds the variables of log P, the entries of Q that each has, and the tables that read it."""
        # The guide's tables hold the numbers of their entries here: which entries a variable has is read off.
        numbered: dict[SiteKey, Factor] = {("guide", name): self._numbered(name, enumeration) for name in self._axes}
        known = enumeration.with_factors({**enumeration.factors, **numbered}, enumeration.variables)
        parts = log_joint(known, max_bytes)
        self._graph = parts.graph
        self._index = {
            factor.name: factor.table.aligned((*sorted(self._graph.variables[factor.name].plates), factor.name)).long()
            for factor in parts.conditionals
        }
        site_of = {entries.start: site for site, entries in self._entries.items()}
        begins = sorted(site_of)
        self._variables: dict[str, list[str]] = {site: [] for site in self._axes}
        for name, index in self._index.items():
            begin = begins[bisect_right(begins, int(index.min())) - 1]
            self._variables[site_of[begin]].append(name)
        self._scales = {factor.name: factor.scale for factor in parts.conditionals}
        self._readers: dict[str, list[tuple[_Cost, str]]] = {name: [] for name in self._index}
        earlier = {previous(name): name for name in self._graph.variables}
        for cost in (part for factor in parts.costs for part in _costs(applied(factor), self._graph, earlier)):
            for axis, read in cost.reads.items():
                self._readers[read.variable].append((cost, axis))

    def table(self, site: str) -> Table:
        """The log probabilities of a site's values, shape `(*plates, K)`."""
        return self._shaped(self._log_q, site)

    def changed(self, site: str) -> Table:
        """Which elements of a site have other probabilities than in the guide, over its plates."""
        new, old = self.table(site), self._shaped(self._start, site)
        return Table((new.values != old.values).any(-1), new.axes[:-1])

    def improve(self, site: str) -> bool:
        """Sets a site's factors to the best ones; False where the others leave an element no possible value.

        Args:
            site: The name of a latent of the guide.
        """
        possible = True
        for name in self._variables[site]:
            for part in self._parts(name):
                possible &= self._improve(name, part)
        return possible

    def _improve(self, name: str, part: Tensor) -> bool:
        """Sets the elements of a variable that are in `part`, a mask over its plates."""
        index, scale = self._index[name], self._scale(name)
        gradient, impossible = self._gradient(name)
        weighted = part & (scale[..., 0] != 0)
        log_q = (gradient / scale).masked_fill(impossible > 0, -torch.inf)
        stuck = weighted & log_q.isneginf().all(-1)
        chosen = weighted & ~stuck
        self._log_q[index[chosen]] = log_q[chosen].log_softmax(-1)
        return not bool(stuck.any())

    def _gradient(self, name: str) -> tuple[Tensor, Tensor]:
        """The derivative of E_Q[log P] in the factors of a variable, and the weight of -inf in it."""
        gradient = self._log_q.new_zeros(self._index[name].shape)
        impossible = torch.zeros_like(gradient)
        for cost, axis in self._readers[name]:
            self._window(gradient, cost, axis).add_(self._expected(cost, cost.values, axis))
            if cost.impossible is not None:
                self._window(impossible, cost, axis).add_(self._expected(cost, cost.impossible, axis))
        return gradient, impossible

    def _expected(self, cost: _Cost, values: Tensor, axis: str) -> Tensor:
        """A cost's table averaged over all latents but that of one axis, over that variable's plates and values."""
        operands = [Table(values, cost.axes)]
        for other, read in cost.reads.items():
            if other != axis:
                probs = self._log_q[self._index[read.variable]].exp()
                operands.append(Table(self._window(probs, cost, other), (*self._plates(read.variable), other)))
        present = {name for operand in operands for name in operand.axes}
        # A plate that no table has counts each of its elements.
        operands += [Table(values.new_ones(size), (p,)) for p, size in cost.plates.items() if p not in present]
        number = {name: n for n, name in enumerate({name: None for op in operands for name in op.axes})}
        terms = [item for op in operands for item in (op.values, [number[name] for name in op.axes])]
        wanted = [number[name] for name in (*self._plates(cost.reads[axis].variable), axis)]
        result: Tensor = torch.einsum(*terms, wanted)
        return result

    def _window(self, values: Tensor, cost: _Cost, axis: str) -> Tensor:
        """The elements of a variable's table that a cost reads along an axis, a view."""
        read = cost.reads[axis]
        plates = self._plates(read.variable)
        if cost.time is None or cost.time not in plates:
            return values
        return values.narrow(plates.index(cost.time), read.start, cost.plates[cost.time])

    def _parts(self, name: str) -> list[Tensor]:
        """Masks over a variable's plates: elements of one part do not meet in any table."""
        every = torch.ones(self._index[name].shape[:-1], dtype=torch.bool, device=self._log_q.device)
        if not any({name, previous(name)} <= cost.reads.keys() for cost, _ in self._readers[name]):
            return [every]
        plates = self._plates(name)
        time = plates.index(self._graph.variables[name].chain or "")
        steps = torch.arange(every.shape[time], device=every.device)
        even = (steps % 2 == 0).reshape([-1 if dim == time else 1 for dim in range(len(plates))])
        return [every & even, every & ~even]

    def _scale(self, name: str) -> Tensor:
        """How often each element of a variable counts, shape `(*plates, 1)`."""
        scale = self._scales[name]
        values = scale.aligned(self._plates(name)) if isinstance(scale, Table) else self._log_q.new_tensor(scale)
        return values.expand(self._index[name].shape[:-1]).unsqueeze(-1)

    def _plates(self, name: str) -> tuple[str, ...]:
        return tuple(sorted(self._graph.variables[name].plates))

    def _laid_out(self, factor: Factor, enumeration: Enumeration) -> Tensor:
        """The entries of a site's table over all of its plates, whose places are noted."""
        variable = enumeration.variables[factor.name]
        axes = (*sorted(variable.plates), factor.name)
        shape = [*(enumeration.plates[plate] for plate in axes[:-1]), variable.size]
        begin = next((entries.stop for entries in reversed(self._entries.values())), 0)
        self._axes[factor.name], self._shapes[factor.name] = axes, shape
        self._entries[factor.name] = slice(begin, begin + prod(shape))
        return factor.table.aligned(axes).expand(shape).reshape(-1)

    def _shaped(self, flat: Tensor, site: str) -> Table:
        axes = self._axes[site]
        return Table(flat[self._entries[site]].reshape(self._shapes[site]), axes)

    def _numbered(self, site: str, enumeration: Enumeration) -> Factor:
        entries = self._entries[site]
        numbers = torch.arange(entries.start, entries.stop, dtype=torch.float64, device=self._log_q.device)
        factor = enumeration.factors["guide", site]
        return replace(factor, table=Table(numbers.reshape(self._shapes[site]), self._axes[site]))


def _costs(factor: Factor, graph: FactorGraph, earlier: Mapping[str, str]) -> list[_Cost]:
    """A factor of scale one as costs.

    Args:
        factor: What is expected.
        graph: Knows the sizes and the chains.
        earlier: The variable of each axis of previous values.
    """
    sizes = {plate: graph.plates[plate] for plate in factor.plates}
    reads = {axis: _Read(axis) for axis in factor.axes if axis in graph.variables}
    before = {axis: _Read(earlier[axis]) for axis in factor.axes if axis in earlier}
    if factor.first is None or not before:
        return [_cost(factor.table, sizes, None, reads)]
    time = graph.variables[next(iter(before.values())).variable].chain
    assert time is not None
    later = {axis: replace(read, start=1) for axis, read in reads.items()} | before
    return [
        _cost(factor.first.narrowed(time, 0, 1), {**sizes, time: 1}, time, reads),
        _cost(factor.table, {**sizes, time: sizes[time] - 1}, time, later),
    ]


def _cost(table: Table, plates: Mapping[str, int], time: str | None, reads: Mapping[str, _Read]) -> _Cost:
    own = {axis: read for axis, read in reads.items() if axis in table.axes}
    values, impossible = table.values.detach(), table.values.detach().isneginf()
    weight = impossible.to(values) if bool(impossible.any()) else None
    return _Cost(values.masked_fill(impossible, 0.0), weight, table.axes, plates, time, own)
