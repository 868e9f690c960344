r"""Expectations under a directed, normalised distribution, by iterated conditional expectation.

    E[c]  =  sum_{x_1} q(x_1) sum_{x_2} q(x_2 | x_1) ... c(x_1, x_2, ...)          summed from the last variable to
    the first

What is expected is linear, so each cost keeps its own small scope: when a variable is summed out, only the costs that
read it are multiplied by its conditional, and those that end up with one scope are merged. Plain autograd through the
result gives the exact gradient in one backward pass; no marginal is ever formed.

References:
    Dayan, Hinton, Neal and Zemel (1995), The Helmholtz machine (the expectation of the free energy).
    Foerster et al. (2018), DiCE: the infinitely differentiable Monte Carlo estimator (draws as variables of one value).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from pyro_vfe.engine.chain_elimination import after_first, at_first
from pyro_vfe.engine.chain_expectation import Time, chain_marginals_of, tied_groups
from pyro_vfe.engine.factors import Factor, FactorGraph, Table, total
from pyro_vfe.engine.logspace import linear_contract
from pyro_vfe.engine.scales import applied
from pyro_vfe.engine.structure import previous


@dataclass(frozen=True, eq=False)
class Expectation:
    """The expectation of a sum of costs, split by plates that were kept."""

    inside: Table
    """What lies in the kept plates, one entry per element, axes in sorted order."""

    outside: Tensor
    """What lies outside of them; a scalar. With no kept plates everything is here."""

    downstream: Mapping[str, Table]
    """For each variable asked for: the costs that read it or what depends on it, over its plates."""

    @property
    def total(self) -> Tensor:
        """The whole expectation, a scalar."""
        return self.inside.values.sum() + self.outside if self.inside.axes else self.outside


@dataclass(frozen=True, eq=False)
class _Term:
    """A cost on its way: a table of numbers (not logs) and the plates it is still repeated over."""

    table: Table
    plates: frozenset[str]
    first: Table | None = None
    """The cost of a chain's first element, where it reads previous values."""

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes of its tables."""
        return self.table.axes if self.first is None else tuple(dict.fromkeys((*self.table.axes, *self.first.axes)))

    def mapped(self, function: Callable[[Table], Table]) -> "_Term":
        """The term with its tables replaced."""
        return _Term(function(self.table), self.plates, None if self.first is None else function(self.first))


def expected(
    graph: FactorGraph,
    conditionals: Sequence[Factor],
    costs: Iterable[Factor],
    *,
    keep_plates: frozenset[str] = frozenset(),
    downstream_of: frozenset[str] = frozenset(),
) -> Expectation:
    """Returns the expectation of the sum of `costs` under the product of `conditionals`.

    Args:
        graph: Variables and plates (its factors are not read).
        conditionals: The log-probability of each variable given earlier ones, in order of sampling; a conditional has
            its variable's name.
        costs: Tables whose (weighted) sum is expected; entries may be infinite where the probability is zero.
        keep_plates: Plates whose elements are kept apart.
        downstream_of: Variables whose downstream costs are returned as well.
    """
    terms = [_Term(cost.table, cost.plates, cost.first) for cost in map(applied, costs)]
    order = tied_groups(conditionals, [term.axes for term in terms], graph)
    plain = _Pass(graph, keep_plates, downstream_of, careful=False)
    result = plain.run(order, terms)
    # 0 * inf is 0 here. Where an infinity met anything, the plain products are not finite.
    if math.isfinite(result.total.item()):
        return result
    careful = _Pass(graph, keep_plates, downstream_of, careful=True).run(order, terms)
    if not math.isfinite(careful.total.item()):
        return careful
    # Every infinity has probability zero: without them value and gradient are those of the plain products.
    return plain.run(order, [term.mapped(_without_infinities) for term in terms])


class _Pass:
    def __init__(
        self, graph: FactorGraph, keep_plates: frozenset[str], downstream_of: frozenset[str], *, careful: bool
    ) -> None:
        self.graph = graph
        self.keep_plates = keep_plates
        self.downstream_of = downstream_of
        self.careful = careful
        self.downstream: dict[str, Table] = {}

    def run(self, groups: Sequence[Sequence[Factor]], terms: Sequence[_Term]) -> Expectation:
        """Sums the variables out from the last to the first, those of a chain together."""
        self.downstream = {}
        waiting: dict[int, list[_Term]] = {}
        position = {conditional.name: n for n, group in enumerate(groups) for conditional in group}
        position |= {previous(name): n for name, n in position.items()}
        done: list[_Term] = []

        def file(term: _Term) -> None:
            """Hands the term to the last-sampled variable it reads."""
            read = [position[axis] for axis in term.axes if axis in position]
            (waiting.setdefault(max(read), []) if read else done).append(term)

        for term in terms:
            file(term)
        for n in reversed(range(len(groups))):
            touching = [self._reduced(term) for term in waiting.pop(n, [])]
            for conditional in groups[n]:
                assert all(position.get(axis, -1) <= n for axis in conditional.axes), "conditionals out of order"
                if conditional.name in self.downstream_of:
                    self.downstream[conditional.name] = self._downstream(conditional.name, touching)
            for left in self._summed(groups[n], touching):
                file(left)
        return self._collected(done)

    def _summed(self, group: Sequence[Factor], touching: Sequence[_Term]) -> Iterable[_Term]:
        if len(group) == 1 and group[0].first is None and all(self._is_present(group[0].name, t) for t in touching):
            name = group[0].name
            return [self._summed_out(name, group[0], term) for term in self._grouped(name, group[0], touching)]
        return self._summed_along(group, touching) if touching else []

    def _is_present(self, name: str, term: _Term) -> bool:
        """Whether a term reads the variable's own value alone."""
        return previous(name) not in term.table.axes

    def _summed_along(self, group: Sequence[Factor], touching: Sequence[_Term]) -> Iterable[_Term]:
        """The expectations of terms under the chain of some conditionals."""
        # What a chain reads inside its plate belongs to its state, and need be no chain itself.
        plates = (self.graph.variables[conditional.name].chain for conditional in group)
        plate = next((plate for plate in plates if plate is not None), None)
        assert plate is not None
        chain = chain_marginals_of(group, plate, self.graph)
        names = {conditional.name for conditional in group}
        around = self.graph.variables[group[0].name].plates
        for term in touching:
            time = self._time_left(term, names, plate)
            table, first = chain.expected(term.table, term.first, time, self.careful)
            yield _Term(
                table, (term.plates | around) - (frozenset([plate]) if time == "summed" else frozenset()), first
            )

    def _time_left(self, term: _Term, summed: set[str], plate: str) -> Time:
        """What becomes of the elements of a chain's plate in a term: others may still read them, or those before."""
        gone = summed | {previous(name) for name in summed}
        left = [axis for axis in term.axes if axis not in gone]
        inside = [v.name for v in self.graph.variables.values() if plate in v.plates]
        if term.first is not None and any(previous(name) in left for name in inside):
            return "split"
        return "kept" if plate in self.keep_plates or any(name in left for name in inside) else "summed"

    def _reduced(self, term: _Term, keep: frozenset[str] | None = None) -> _Term:
        """Sums the term over plates that hold none of its variables and are not kept."""
        needed = self.keep_plates if keep is None else keep
        for axis in term.axes:
            if axis in self.graph.variables:
                needed = needed | self.graph.variables[axis].plates
        surplus = term.plates - needed
        if not surplus:
            return term
        reduced = term.mapped(lambda table: self._summed_over(table, surplus))
        return _Term(reduced.table, term.plates & needed, reduced.first)

    def _summed_over(self, table: Table, surplus: frozenset[str]) -> Table:
        dims = [dim for dim, axis in enumerate(table.axes) if axis in surplus]
        repeats = math.prod(self.graph.plates[plate] for plate in surplus if plate not in table.axes)
        values = table.values.sum(dims) if dims else table.values
        axes = tuple(axis for axis in table.axes if axis not in surplus)
        return Table(values * repeats if repeats != 1 else values, axes)

    def _grouped(self, name: str, conditional: Factor, terms: Sequence[_Term]) -> Iterable[_Term]:
        """Adds up terms that will have the same variables and plates once `name` is summed out."""
        parents = {axis for axis in conditional.axes if axis in self.graph.variables}
        groups: dict[object, list[_Term]] = {}
        for term in terms:
            after = parents.union(axis for axis in term.axes if axis in self.graph.variables) - {name}
            groups.setdefault((frozenset(after), term.plates, term.first is None), []).append(term)
        return [_added(group) for group in groups.values()]

    def _summed_out(self, name: str, conditional: Factor, term: _Term) -> _Term:
        plates = term.plates | conditional.plates
        if term.first is None:
            return _Term(self._averaged(name, conditional.table, term.table), plates)
        # The term is for neighbours along a chain: its entries along time are for the elements after the first.
        time = self._time_of(term)
        later, first = after_first(conditional, time).table, at_first(conditional, time).table
        return _Term(self._averaged(name, later, term.table), plates, self._averaged(name, first, term.first))

    def _time_of(self, term: _Term) -> str:
        chains = (v.chain for v in self.graph.variables.values() if previous(v.name) in term.table.axes)
        return next(plate for plate in chains if plate is not None)

    def _averaged(self, name: str, log_weights: Table, table: Table) -> Table:
        weights = Table(log_weights.values.exp(), log_weights.axes)
        axes = tuple(dict.fromkeys(axis for axis in (*table.axes, *weights.axes) if axis != name))
        if self.careful:
            union = (*axes, name)
            possible = weights.aligned(union) > 0
            table = Table(torch.where(possible, table.aligned(union), 0.0), union)
        if set(weights.axes) == set(table.axes):
            # One small dot product per element: faster as multiply and sum than as that many matrix products.
            return Table((weights.aligned((*axes, name)) * table.aligned((*axes, name))).sum(-1), axes)
        return Table(linear_contract(weights, table, axes), axes)

    def _downstream(self, name: str, terms: Sequence[_Term]) -> Table:
        """The costs after `name`, summed over other plates and averaged over other variables."""
        plates = self.graph.variables[name].plates
        total: _Term | None = None
        for term in terms:
            others = [d for d, axis in enumerate(term.table.axes) if axis in self.graph.variables]
            axes = tuple(axis for axis in term.table.axes if axis not in self.graph.variables)
            values = term.table.values.detach()
            mean = _Term(Table(values.mean(others) if others else values, axes), term.plates)
            reduced = self._reduced(mean, keep=plates)
            total = reduced if total is None else _added([total, reduced])
        return Table(torch.zeros(()), ()) if total is None else total.table

    def _collected(self, done: Sequence[_Term]) -> Expectation:
        axes = tuple(sorted(self.keep_plates))
        outside: list[Tensor] = []
        inside: Tensor = torch.zeros([self.graph.plates[plate] for plate in axes])
        for term in map(self._reduced, map(self._without_variables, done)):
            if self.keep_plates and term.plates >= self.keep_plates:
                inside = inside.to(term.table.values) + term.table.aligned(axes)
            else:
                outside.append(self._reduced(term, keep=frozenset()).table.values)
        return Expectation(Table(inside, axes), reduce(torch.add, outside or [torch.zeros(())]), self.downstream)

    def _without_variables(self, term: _Term) -> _Term:
        """Drops the axes of variables that no conditional sums: draws, which have one value."""
        surplus = tuple(dim for dim, axis in enumerate(term.table.axes) if axis not in self.graph.plates)
        if not surplus:
            return term
        axes = tuple(axis for axis in term.table.axes if axis in self.graph.plates)
        return _Term(Table(term.table.values.squeeze(surplus), axes), term.plates)


def _without_infinities(table: Table) -> Table:
    return Table(table.values.masked_fill(table.values.isinf(), 0.0), table.axes)


def _added(terms: Sequence[_Term]) -> _Term:
    if len(terms) == 1:
        return terms[0]
    plates = frozenset().union(*(term.plates for term in terms))
    firsts = [term.first for term in terms if term.first is not None]
    return _Term(total([term.table for term in terms]), plates, total(firsts) if firsts else None)
