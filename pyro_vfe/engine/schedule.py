r"""A plan written out for two passes: which tables are multiplied, in which order of their axes, going up and down.

    up      C[b, r, c]   =  sum_i A[b, r, i] B[b, i, c]            each step of the plan: a batch of matrix products
    down    A'[b, r, i]  =  sum_c C'[b, r, c] B[b, i, c]           X' is the derivative of Z in the table X
            B'[b, i, c]  =  sum_r A[b, r, i] C'[b, r, c]

Names and sizes only, cached by structure; propagation.py has the numbers.

References:
    Darwiche (2003), A differential approach to inference in Bayesian networks.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from math import prod
from typing import NamedTuple

from pyro_vfe.engine.ordering import Plan, plan
from pyro_vfe.engine.structure import FactorShape, Structure

Axes = tuple[str, ...]
NO_NAMES: frozenset[str] = frozenset()


class Turn(NamedTuple):
    """How a table is rewritten with its axes in another order."""

    shape: tuple[int, ...]
    """The size of each axis as it is."""

    dims: tuple[int, ...] | None
    """The permutation of these axes; None where they stay."""

    becomes: tuple[int, ...]
    """The shape in the end, with neighbouring axes taken together."""


class Product(NamedTuple):
    """One step of the plan as a batch of matrix products; every table is kept as the step that uses it needs it."""

    left: int
    """Slot of A, kept as (batch, rows, inner)."""

    right: int
    """Slot of B, kept as (batch, inner, columns)."""

    made: int
    """Slot of C."""

    inner: int
    """The number of terms of each sum."""

    up: Turn
    """From C as it is made, (batch, rows, columns), to C as it is used."""

    down: Turn
    """From C' as it comes to (batch, rows, columns)."""

    onward: tuple[tuple[int, int, int], ...]
    """Those of A' and B' that are needed: the slot, the other operand's slot, and the number of terms of each sum."""


class Read(NamedTuple):
    """Where a wanted marginal is found: as the sum of X X' over the axes of X that are not wanted."""

    position: int
    """Its place in the request."""

    shape: tuple[int, ...]
    """The shape in which X X' is summed."""

    summed: tuple[int, ...]
    """The axes to sum over."""

    dims: tuple[int, ...] | None
    """The order of the axes that are left; None where it is right."""


class Schedule(NamedTuple):
    """What two passes do; slots are the factors, the tables of ones, and then what the steps make."""

    plan: Plan
    inputs: tuple[Turn, ...]
    """The factors, from their own axes to those in which the first step uses them."""

    ones: tuple[tuple[int, ...], ...]
    """Shapes of tables of ones: the other operand where a table is summed alone, and scopes that no factor has."""

    products: tuple[Product, ...]
    results: tuple[int, ...]
    """Slots of the scalars whose product is Z."""

    reads: Mapping[int, tuple[Read, ...]]
    """What is wanted of which slot."""

    starts: tuple[int, ...]
    """Where each wanted marginal begins when all are laid end to end, and where the last one ends."""


@lru_cache(maxsize=256)
def schedule_of(structure: Structure, scopes: tuple[Axes, ...], n_own: int) -> Schedule | None:
    """Returns the two passes for a structure without plates; None where nothing is to be done.

    Args:
        structure: Names and sizes; each variable is an axis of some factor.
        scopes: The scopes whose marginals are wanted.
        n_own: Of how many factors, from the first, the probabilities of their own entries are wanted as well.
    """
    held = [frozenset(factor.axes) for factor in structure.factors]
    lacking = [scope for scope in scopes if len(scope) > 1 and not any(own.issuperset(scope) for own in held)]
    probes = tuple(FactorShape("marginal", scope, NO_NAMES) for scope in lacking)
    full = structure._replace(factors=(*structure.factors, *probes))
    order = plan(full, NO_NAMES, NO_NAMES)
    return _Writer(order, len(structure.factors), scopes, n_own).written() if order.results else None


class _Step(NamedTuple):
    left: int
    right: int
    made: int
    rows: int
    inner: int
    columns: int


class _Writer:
    """Writes a schedule; an axis of size one is left out throughout."""

    def __init__(self, order: Plan, n_factors: int, scopes: tuple[Axes, ...], n_own: int) -> None:
        self.plan = order
        self.n_factors = n_factors
        self.size = {v.name: v.size for v in order.structure.variables}
        self.scopes = scopes
        self.n_own = n_own
        # Slots: factors, probes, then ones for steps of one operand, then what steps make.
        self.made: list[Axes] = [self._shown(factor.axes) for factor in order.structure.factors]
        self.used: dict[int, Axes] = {}
        self.final: dict[int, tuple[int, ...]] = {}
        self.user: dict[int, int] = {}
        self.steps: list[_Step] = []
        self.results = self._add_steps()

    def _shown(self, axes: Iterable[str]) -> Axes:
        return tuple(axis for axis in axes if self.size[axis] > 1)

    def _entries(self, axes: Iterable[str]) -> int:
        return prod(self.size[axis] for axis in axes)

    def _add_steps(self) -> tuple[int, ...]:
        """Lays out each step of the plan; returns the slots of the results."""
        alone = sum(step.right is None for step in self.plan.steps)
        first_one = len(self.made)
        self.made.extend([()] * alone)
        one = first_one
        slot_of = list(range(first_one))
        for component in self.plan.components:
            last = slot_of[component.inputs[0]]
            for step in component.steps:
                right = one if step.right is None else slot_of[step.right]
                if step.right is None:
                    self.made[one] = self._shown(step.summed)
                    one += 1
                last = self._add_step(slot_of[step.left], right, frozenset(step.axes))
                slot_of.append(last)
            slot_of.append(last)
        results = tuple(slot_of[slot] for slot in self.plan.results)
        for slot in results:
            self.used[slot], self.final[slot] = (), (1, 1, 1)
        return results

    def _add_step(self, left: int, right: int, axes: frozenset[str]) -> int:
        """Lays out one product: the larger table's axes keep their order as far as they can."""
        if self._entries(self.made[left]) < self._entries(self.made[right]):
            left, right = right, left
        own, other = self.made[left], self.made[right]
        batch = tuple(a for a in own if a in other and a in axes)
        rows = tuple(a for a in own if a not in other)
        inner = tuple(a for a in own if a in other and a not in axes)
        columns = tuple(a for a in other if a not in own)
        n_batch, n_rows, n_inner, n_columns = map(self._entries, (batch, rows, inner, columns))
        self.used[left], self.final[left] = (*batch, *rows, *inner), (n_batch, n_rows, n_inner)
        self.used[right], self.final[right] = (*batch, *inner, *columns), (n_batch, n_inner, n_columns)
        self.user[left] = self.user[right] = len(self.steps)
        made = len(self.made)
        self.made.append((*batch, *rows, *columns))
        self.steps.append(_Step(left, right, made, n_rows, n_inner, n_columns))
        return made

    def written(self) -> Schedule:
        """Returns the schedule."""
        wanted, places, needed = self._places()
        reads: dict[int, list[Read]] = {}
        for position, (slot, scope) in enumerate(places):
            reads.setdefault(slot, []).append(self._read(position, slot, scope, wanted[position]))
        factors, ones = range(self.n_factors), range(self.n_factors, len(self.made) - len(self.steps))
        return Schedule(
            self.plan,
            tuple(self._turn(self.made[slot], self.used[slot], self.final[slot]) for slot in factors),
            tuple(self.final[slot] for slot in ones),
            tuple(self._product(step, needed) for step in self.steps),
            self.results,
            {slot: tuple(found) for slot, found in reads.items()},
            (0, *accumulate(self._entries(scope) for scope in wanted)),
        )

    def _product(self, step: _Step, needed: set[int]) -> Product:
        left, right, made, rows, inner, columns = step
        onward = ((left, right, columns), (right, left, rows))
        return Product(
            left,
            right,
            made,
            inner,
            self._turn(self.made[made], self.used[made], self.final[made]),
            self._turn(self.used[made], self.made[made], (self.final[left][0], rows, columns)),
            tuple(one for one in onward if one[0] in needed),
        )

    def _turn(self, axes: Axes, wanted: Axes, becomes: tuple[int, ...]) -> Turn:
        dims = None if axes == wanted else tuple(map(axes.index, wanted))
        return Turn(tuple(self.size[axis] for axis in axes), dims, becomes)

    def _places(self) -> tuple[list[Axes], list[tuple[int, Axes]], set[int]]:
        """Returns what is wanted, in which slot each is read, and all slots whose derivatives that needs."""
        holders = self._holders()
        needed = set(self.results)
        scopes = [self._shown(scope) for scope in self.scopes]
        for scope in scopes:
            self._require(self._topmost(scope, holders), needed)
        places = [(self._smallest(scope, holders, needed), scope) for scope in scopes]
        for slot in range(self.n_own):
            self._require(slot, needed)
            places.append((slot, self.made[slot]))
        own = [factor.axes for factor in self.plan.structure.factors[: self.n_own]]
        return [*self.scopes, *own], places, needed

    def _holders(self) -> dict[str, list[int]]:
        """Returns the slots that have an axis; what only counts a table's entries, as ones, is none."""
        holders: dict[str, list[int]] = {}
        ones = range(len(self.plan.structure.factors), len(self.made) - len(self.steps))
        for slot, axes in enumerate(self.made):
            for axis in axes if slot not in ones else ():
                holders.setdefault(axis, []).append(slot)
        return holders

    def _require(self, slot: int, needed: set[int]) -> None:
        """Adds a slot and all that its derivative is computed from."""
        while slot not in needed:
            needed.add(slot)
            slot = self.steps[self.user[slot]].made

    def _topmost(self, scope: Axes, holders: Mapping[str, Sequence[int]]) -> int:
        """Returns the slot with all of a scope that needs the fewest further derivatives."""
        if not scope:
            return self.results[0]
        common = set(holders[scope[0]]).intersection(*(holders[axis] for axis in scope[1:]))
        last = max(self.user[slot] for slot in common)
        # What a step made is likely to be passed on the way to other variables; a factor is not.
        return min(
            (slot for slot in common if self.user[slot] == last),
            key=lambda slot: (slot < self.n_factors, self._entries(self.made[slot])),
        )

    def _smallest(self, scope: Axes, holders: Mapping[str, Sequence[int]], needed: set[int]) -> int:
        if not scope:
            return self.results[0]
        common = needed.intersection(*(holders[axis] for axis in scope))
        return min(common, key=lambda slot: (self._entries(self.made[slot]), slot))

    def _read(self, position: int, slot: int, scope: Axes, wanted: Axes) -> Read:
        axes = self.used[slot]
        if len(scope) == 1:
            # Neighbouring axes are taken together: numpy sums three dims faster than many.
            at = axes.index(scope[0])
            before, after = self._entries(axes[:at]), self._entries(axes[at + 1 :])
            summed = tuple(dim for dim, size in ((0, before), (2, after)) if size > 1)
            return Read(position, (before, self.size[scope[0]], after), summed, None)
        left = [axis for axis in axes if axis in scope]
        summed = tuple(dim for dim, axis in enumerate(axes) if axis not in scope)
        dims = None if tuple(left) == scope else tuple(map(left.index, scope))
        return Read(position, tuple(self.size[axis] for axis in axes), summed, dims)
