r"""The plan of an elimination: from names and sizes alone, cached by structure.

    P         a maximal set of plates that factors still lie in
    local     the variables whose plates are exactly P: summed first, one connected component at a time
    target    the plates of what remains of the component, and the kept plates inside P
    result    product over the elements of P - target

Where target = P although variables of fewer plates remain to be summed, the plates cross: one of them is written out,
and planned again.

References:
    Obermeyer et al. (2019), Tensor variable elimination for plated factor graphs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf, prod
from typing import NamedTuple

from pyro_vfe.engine.cuts import dependent, held_beside
from pyro_vfe.engine.paths import AT_ONCE, Step, Steps, contraction_steps
from pyro_vfe.engine.search import Search
from pyro_vfe.engine.structure import FactorShape, Structure, Unrolling, tied_inside, unrolled
from pyro_vfe.errors import PlateError


class Component(NamedTuple):
    """Factors of the same plates that variables of these plates connect."""

    plates: frozenset[str]
    """The plates its factors lie in."""

    inputs: tuple[int, ...]
    """Slots of its factors."""

    variables: tuple[str, ...]
    """The variables summed here; empty where only plates are reduced."""

    steps: tuple[Step, ...]
    """Pairwise contractions; each makes the next slot."""

    target: frozenset[str]
    """The plates of the result, which is the slot after the steps' ones."""

    search: Search = AT_ONCE
    """What was searched for the steps."""

    cut: tuple[str, ...] = ()
    """Variables that are summed value by value around all the steps, whose axes the steps lack."""

    slices: int = 1
    """How often the steps that depend on `cut` are executed: once for each of its joint values."""

    flops: int = 0
    """Multiply-adds of all slices."""

    @property
    def held(self) -> int:
        """Numbers that are held for a gradient: those of one slice, and what sums the slices' results."""
        one = sum(step.held for step in self.steps)
        return one + held_beside(self.slices, self.steps[-1].entries) if self.steps else one


class Largest(NamedTuple):
    """The largest table a plan makes."""

    scope: tuple[str, ...]
    entries: int


@dataclass(frozen=True)
class Plan:
    """What an elimination will do and what it costs.

    Slots 0..n-1 are the factors; each step makes the next slot, and each component one more after its steps.
    """

    structure: Structure
    """The graph to be eliminated, after any unrolling."""

    unrollings: tuple[Unrolling, ...]
    """The plates that were written out, in this order."""

    components: tuple[Component, ...]
    """The work, in order."""

    results: tuple[int, ...]
    """The slots that make up the result."""

    @property
    def steps(self) -> tuple[Step, ...]:
        """All pairwise contractions, in order."""
        return tuple(step for component in self.components for step in component.steps)

    @property
    def variables(self) -> tuple[str, ...]:
        """The variables in the order in which they are summed; those that are cut come after what they surround."""
        return tuple(
            name
            for component in self.components
            for name in (*(name for step in component.steps for name in step.summed), *component.cut)
        )

    @property
    def flops(self) -> int:
        """Multiply-adds of all contractions."""
        return sum(component.flops for component in self.components)

    @property
    def entries(self) -> int:
        """Numbers in all intermediate tables together; of a component that is cut, those of one slice."""
        return sum(step.entries for step in self.steps)

    @property
    def held(self) -> int:
        """Numbers that are held at a time if gradients are taken; slices are formed again for theirs."""
        cut = max((component.held for component in self.components if component.cut), default=0)
        return cut + sum(component.held for component in self.components if not component.cut)

    @property
    def bytes(self) -> int:
        """Memory of all intermediate tables together, in float64."""
        return 8 * self.entries

    @property
    def largest(self) -> Largest:
        """The largest intermediate table."""
        if not self.steps:
            return Largest((), 1)
        step = max(self.steps, key=lambda step: step.entries)
        return Largest(step.axes, step.entries)

    def __str__(self) -> str:
        rows = [
            (listed(s.summed) or "-", listed(s.axes) or "1", f"{s.flops:,}", f"{8 * s.entries:,}") for s in self.steps
        ]
        rows.append(("total", "", f"{self.flops:,}", f"{self.bytes:,}"))
        notes = [note for component in self.components for note in _notes(component)]
        return "\n".join([aligned_rows([("sum over", "leaves", "flops", "bytes"), *rows]), *notes])


def _notes(component: Component) -> list[str]:
    """Returns what is worth telling of a component: a search, and what is cut."""
    of = f"{len(component.variables)} variables"
    method, tried, effort = component.search
    notes = [f"order of {of}: {method}, the best of {tried:,} tried; effort {effort:,}"] if effort else []
    if component.cut:
        notes.append(
            f"the steps of {of} are done {component.slices:,} times, for each value of {listed(component.cut)}"
        )
    return notes


def listed(names: Sequence[str], most: int = 6) -> str:
    """Returns names separated by commas, the first few of many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def aligned_rows(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows of text in columns: words to the left, the last two columns, numbers, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    words = len(widths) - 2
    lines = (
        "  ".join(
            cell.ljust(width) if n < words else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


@lru_cache(maxsize=256)
def plan(
    structure: Structure,
    keep: frozenset[str] = frozenset(),
    keep_plates: frozenset[str] = frozenset(),
    limit: float = inf,
) -> Plan:
    """Returns how to sum every variable that is not kept, and at what cost.

    Args:
        structure: Names and sizes of the factor graph.
        keep: Variables that stay.
        keep_plates: Plates that are never multiplied out.
        limit: The most numbers to hold at a time: variables are cut to keep to it, where that is possible.

    Raises:
        PlateError: A variable outside a kept plate is tied to factors inside it.
        CostError: Crossing plates would have to be written out into too many factors.
    """
    found = _planned(structure, keep, keep_plates, limit)
    # Each component may keep to the limit and all together exceed it: then each is given less.
    for tighter in _TIGHTER:
        if found.held <= limit:
            break
        rival = _planned(structure, keep, keep_plates, limit / tighter)
        found = rival if rival.held <= limit else found
    return found


def _planned(structure: Structure, keep: frozenset[str], keep_plates: frozenset[str], limit: float) -> Plan:
    unrollings: list[Unrolling] = []
    while True:
        planner = _Planner(structure, keep, keep_plates, limit)
        stuck = planner.run()
        if stuck is None:
            return Plan(structure, tuple(unrollings), tuple(planner.components), tuple(planner.results))
        unrollings.append(_way_out(structure, stuck))
        structure, _ = unrolled(structure, unrollings[-1])
        copies = {name: unrollings[-1].copies(name) for name in unrollings[-1].variables}
        keep = frozenset(copy for name in keep for copy in copies.get(name, (name,)))


_TIGHTER = (2, 8, 32)
"""By how much the limit of each component is divided, in turn, where all together exceed it."""


class _Stuck(NamedTuple):
    """A component that plates keep from shrinking."""

    plates: frozenset[str]
    variables: tuple[str, ...]
    unsummed: tuple[str, ...]


def _way_out(structure: Structure, stuck: _Stuck) -> Unrolling:
    """Returns the smallest plate whose unrolling helps: one that some variable still to be summed lies outside."""
    plates_of = {v.name: v.plates for v in structure.variables}
    sizes = dict(structure.plates)
    outside = [p for p in stuck.plates if any(p not in plates_of[name] for name in stuck.unsummed)]
    plate = min(outside, key=lambda p: (sizes[p], p))
    return Unrolling(plate, sizes[plate], tied_inside(structure, plate, stuck.variables))


class _Planner:
    """One attempt: takes the largest plate sets first and stops where it is stuck."""

    def __init__(self, structure: Structure, keep: frozenset[str], keep_plates: frozenset[str], limit: float) -> None:
        self.keep_plates = keep_plates
        self.limit = limit
        self.position = {v.name: n for n, v in enumerate(structure.variables)}
        self.plates_of = {v.name: v.plates for v in structure.variables}
        self.sizes = {v.name: v.size for v in structure.variables} | dict(structure.plates)
        self.to_sum = self.plates_of.keys() - keep
        self.axes: list[tuple[str, ...]] = [factor.axes for factor in structure.factors]
        self.components: list[Component] = []
        self.results: list[int] = []
        self.waiting: dict[frozenset[str], list[int]] = {}
        for slot, factor in enumerate(structure.factors):
            self._file(slot, factor)

    def _file(self, slot: int, factor: FactorShape) -> None:
        if self.to_sum.isdisjoint(factor.axes):
            self.results.append(slot)
        else:
            self.waiting.setdefault(factor.plates, []).append(slot)

    def run(self) -> _Stuck | None:
        """Returns None when all is planned, or the component that is stuck."""
        while self.waiting:
            plates = max(self.waiting, key=lambda p: (len(p), sorted(p)))
            for slots, local in self._connected(self.waiting.pop(plates), plates):
                stuck = self._add_component(plates, slots, local)
                if stuck is not None:
                    return stuck
        return None

    def _connected(self, slots: list[int], plates: frozenset[str]) -> Iterable[tuple[list[int], list[str]]]:
        local = {name for name in self.to_sum if self.plates_of[name] == plates}
        scopes = {slot: [axis for axis in self.axes[slot] if axis in local] for slot in slots}
        return [(group, sorted(names, key=self.position.__getitem__)) for group, names in connected(scopes)]

    def _add_component(self, plates: frozenset[str], slots: list[int], local: list[str]) -> _Stuck | None:
        scope = dict.fromkeys(axis for slot in slots for axis in self.axes[slot] if axis in self.plates_of)
        inside = set(local)
        left = [name for name in scope if name not in inside]
        unsummed = tuple(name for name in left if name in self.to_sum)
        self._check_kept_plates(plates, (*local, *unsummed))
        target = frozenset().union(*(self.plates_of[name] for name in left)) | (self.keep_plates & plates)
        if target == plates and unsummed:
            return _Stuck(plates, tuple(scope), unsummed)
        found = Steps((), AT_ONCE)
        slices, flops = 1, 0
        if local:
            inputs, first_slot = {slot: self.axes[slot] for slot in slots}, len(self.axes)
            found = contraction_steps(inputs, local, self.sizes, first_slot, self.limit)
            slices = prod(self.sizes[name] for name in found.cut)
            again = dependent(inputs, [(s.left, s.right) for s in found.steps], found.cut, first_slot)
            flops = sum(s.flops * (slices if n in again else 1) for n, s in enumerate(found.steps, first_slot))
            self.axes.extend(step.axes for step in found.steps)
        last = self.axes[-1 if found.steps else slots[0]]
        result = FactorShape("", tuple(a for a in last if a not in plates - target and a not in found.cut), target)
        self.components.append(
            Component(plates, tuple(slots), tuple(local), found.steps, target, found.search, found.cut, slices, flops)
        )
        self.axes.append(result.axes)
        self._file(len(self.axes) - 1, result)
        return None

    def _check_kept_plates(self, plates: frozenset[str], summed: Iterable[str]) -> None:
        for name in summed:
            crossed = sorted((self.keep_plates & plates) - self.plates_of[name])
            if crossed:
                raise PlateError(
                    f"Site '{name}' is outside plate '{crossed[0]}' and tied to factors inside it, so the elements of"
                    f" '{crossed[0]}' have no terms of their own.",
                    hint=f"Ask for the total, keep '{name}' as well, or keep another plate.",
                )


def connected(scopes: Mapping[int, Sequence[str]]) -> list[tuple[list[int], list[str]]]:
    """Returns the groups of slots that share names, directly or through others, each with its names."""
    holders: dict[str, list[int]] = {}
    for slot, scope in scopes.items():
        for name in scope:
            holders.setdefault(name, []).append(slot)
    seen: set[int] = set()
    groups: list[tuple[list[int], list[str]]] = []
    for start in scopes:
        if start in seen:
            continue
        seen.add(start)
        slots: list[int] = []
        names: dict[str, None] = {}
        queue = [start]
        while queue:
            slot = queue.pop()
            slots.append(slot)
            for name in scopes[slot]:
                if name not in names:
                    names[name] = None
                    fresh = [other for other in holders[name] if other not in seen]
                    seen.update(fresh)
                    queue.extend(fresh)
        groups.append((sorted(slots), list(names)))
    return groups
