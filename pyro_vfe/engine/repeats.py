r"""Loops in a factor graph: variables that repeat one pattern of factors, found from names and sizes alone.

    z_0, w_0, z_1, w_1, ..., z_T-1, w_T-1        block t = (z_t, w_t), tied to block t - 1 by the same factors each time

Each factor belongs to its last variable in the program's order. A loop is a run of variables, every p-th of which has
the same ties to others at the same distances; the block before the run is its first element, whatever it is tied by.
What a variable has alone (its data) is free: a step may lack it.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from pyro_vfe.engine.structure import FactorShape, Structure, VariableShape, previous

FEWEST_STEPS = 8
"""Shorter loops are summed variable by variable."""

_LONGEST_BLOCK = 6
"""The most variables that a step of a loop may have."""

_MOST_TIES = 4 * _LONGEST_BLOCK
"""A variable that is tied to more axes than so many is not of a loop, though a loop may read it."""


class Strand(NamedTuple):
    """The variables at one place of all blocks: one variable along time."""

    name: str
    variables: tuple[str, ...]
    is_read_later: bool
    """Whether the next block reads it."""


class Thread(NamedTuple):
    """The factors of one kind of all blocks: one factor along time."""

    factors: tuple[int | None, ...]
    """Their positions, one per block; None where a block has none."""

    axes: tuple[str, ...]
    """The axes of each, with strands for variables."""

    plates: frozenset[str]

    @property
    def is_first_alone(self) -> bool:
        """Whether the first block has it and no other."""
        return all(factor is None for factor in self.factors[1:])

    @property
    def reads_earlier(self) -> bool:
        """Whether it ties neighbouring blocks: the first block then has none."""
        return self.factors[0] is None and any(axis.endswith(_EARLIER) for axis in self.axes)


_EARLIER = previous("")


class Loop(NamedTuple):
    """A loop: its variables and factors along time."""

    time: str
    """The name of the plate that the blocks make."""

    strands: tuple[Strand, ...]
    threads: tuple[Thread, ...]

    @property
    def steps(self) -> int:
        """The number of blocks."""
        return len(self.strands[0].variables)


@lru_cache(maxsize=256)
def find_loop(structure: Structure, keep: frozenset[str]) -> Loop | None:
    """Returns the longest loop among the variables to be summed; None if there is none worth the name.

    Args:
        structure: The graph.
        keep: Variables that stay.
    """
    variables = [v for v in structure.variables if v.name not in keep and v.chain is None]
    if len(variables) < FEWEST_STEPS:
        return None
    hubs = _hubs(structure)
    variables = [v for v in variables if v.name not in hubs]
    ties = _Ties(structure, variables)
    runs = [run for block in range(1, _LONGEST_BLOCK + 1) for run in ties.runs(block)]
    for start, stop, block in sorted(runs, key=lambda run: (run[0] - run[1], run[2], run[0])):
        if ties.is_closed(start, stop, block):
            return _loop(ties, start, stop, block)
    return None


def rolled_structure(structure: Structure, loop: Loop) -> Structure:
    """Returns the structure with a loop as chains along a plate of their own.

    Args:
        structure: The graph that the loop was found in.
        loop: Its loop.
    """
    gone = {name for strand in loop.strands for name in strand.variables}
    sizes = {v.name: v for v in structure.variables}
    variables = [v for v in structure.variables if v.name not in gone]
    for strand in loop.strands:
        some = sizes[strand.variables[0]]
        chain = loop.time if strand.is_read_later else None
        variables.append(VariableShape(strand.name, some.size, some.plates | {loop.time}, chain))
    taken = {factor for thread in loop.threads for factor in thread.factors}
    left = [factor for position, factor in enumerate(structure.factors) if position not in taken]
    made = [FactorShape(loop.time, (loop.time, *t.axes), t.plates | {loop.time}) for t in loop.threads]
    return Structure((*left, *made), tuple(variables), (*structure.plates, (loop.time, loop.steps)))


def _hubs(structure: Structure) -> set[str]:
    """The variables that many others are tied to: they stand outside of loops."""
    near: dict[str, set[str]] = {v.name: set() for v in structure.variables}
    for factor in structure.factors:
        for axis in factor.axes:
            if axis in near:
                near[axis].update(factor.axes)
    return {name for name, others in near.items() if len(others) > _MOST_TIES}


class _Ties:
    """Which factors belong to which variable, and what they tie it to."""

    def __init__(self, structure: Structure, variables: Sequence[VariableShape]) -> None:
        self.factors = structure.factors
        self.variables = variables
        self.position = {v.name: n for n, v in enumerate(variables)}
        self.plates = {v.name: v.plates for v in structure.variables}
        self.scopes = [[self.position[axis] for axis in f.axes if axis in self.position] for f in structure.factors]
        self.owned: list[list[int]] = [[] for _ in variables]
        for factor, scope in enumerate(self.scopes):
            if scope:
                self.owned[max(scope)].append(factor)
        self.patterns = [self._pattern(n) for n in range(len(variables))]

    def _pattern(self, n: int) -> tuple[object, ...]:
        """What a variable is and what it is tied to, at which distances."""
        tied = [self._relative(self.factors[f], n) for f in self.owned[n] if len(self.scopes[f]) > 1]
        variable = self.variables[n]
        return variable.size, variable.plates, tuple(sorted(tied, key=repr))

    def _relative(self, factor: FactorShape, n: int) -> tuple[object, ...]:
        axes = tuple(self.position[axis] - n if axis in self.position else axis for axis in factor.axes)
        return axes, factor.plates

    def runs(self, block: int) -> list[tuple[int, int, int]]:
        """The stretches in which patterns repeat after `block` variables: start, stop and block."""
        found = []
        start = 0
        for n in range(block, len(self.variables) + 1):
            if n == len(self.variables) or self.patterns[n] != self.patterns[n - block]:
                for begin in range(max(start, block), max(start, block) + block):
                    stop = n - (n - begin) % block
                    if stop - begin >= block * (FEWEST_STEPS - 1):
                        found.append((begin, stop, block))
                start = n - block + 1
        return found

    def is_closed(self, start: int, stop: int, block: int) -> bool:
        """Whether the blocks from before `start` to `stop` are tied to their neighbours alone."""
        first = start - block
        like = all(self.variables[first + i][1:3] == self.variables[start + i][1:3] for i in range(block))
        reach = all(m >= first for n in range(start, start + block) for f in self.owned[n] for m in self.scopes[f])
        own = all(m >= first for n in range(first, start) for f in self.owned[n] for m in self.scopes[f])
        tied = any(m < start for n in range(start, start + block) for f in self.owned[n] for m in self.scopes[f])
        after = all(m >= stop for n in range(stop, len(self.variables)) for f in self.owned[n] for m in self.scopes[f])
        return like and reach and own and tied and after and self._stands_alone(first, start + block)

    def _stands_alone(self, first: int, stop: int) -> bool:
        """Whether what the blocks read outside of the loop lies in no plate that they do not lie in."""
        around = frozenset.intersection(*(self.variables[n].plates for n in range(first, stop)))
        axes = {axis for n in range(first, stop) for f in self.owned[n] for axis in self.factors[f].axes}
        return all(self.plates[axis] <= around for axis in axes if axis in self.plates and axis not in self.position)


class _Kind(NamedTuple):
    """What makes factors of different blocks the same one along time."""

    axes: tuple[str, ...]
    plates: frozenset[str]
    stem: str
    occurrence: int


def _loop(ties: _Ties, start: int, stop: int, block: int) -> Loop:
    first = start - block
    names = [v.name for v in ties.variables[first:stop]]
    strand_of = {i: f"{names[i]}..{names[i - block]}" for i in range(block)}
    threads: dict[_Kind, list[int | None]] = {}
    steps = len(names) // block
    for n in range(first, stop):
        step = (n - first) // block
        for factor in ties.owned[n]:
            axes = tuple(_renamed(axis, ties, first, block, step, strand_of) for axis in ties.factors[factor].axes)
            kind = _Kind(axes, ties.factors[factor].plates, _stem(ties.factors[factor].name), 0)
            while threads.setdefault(kind, [None] * steps)[step] is not None:
                kind = kind._replace(occurrence=kind.occurrence + 1)
            threads[kind][step] = factor
    made = tuple(Thread(tuple(factors), kind.axes, kind.plates) for kind, factors in threads.items())
    read = {axis for thread in made for axis in thread.axes}
    strands = tuple(Strand(strand_of[i], tuple(names[i::block]), previous(strand_of[i]) in read) for i in range(block))
    return Loop(f"steps of {strand_of[0]}", strands, made)


def _renamed(axis: str, ties: _Ties, first: int, block: int, step: int, strand_of: dict[int, str]) -> str:
    if axis not in ties.position:
        return axis
    at, place = divmod(ties.position[axis] - first, block)
    return strand_of[place] if at == step else previous(strand_of[place])


def _stem(name: str) -> str:
    """The name without its numbers: what the sites of a loop have in common."""
    return re.sub(r"\d+", "#", name)
