r"""The order in which variables are summed, as pairwise steps, and what each step costs.

    flops(i, j -> k)  =  prod over axes(i) | axes(j) of size          entries(k)  =  prod over axes(k) of size

A variable is summed at the step after which no other factor has it. Three candidates compete: variable elimination,
cheapest clique first; variable elimination in the program's order, which suits the rows of a grid; and opt_einsum's
greedy path. Names and sizes only; no tensors.

References:
    Kjaerulff (1990), Triangulation of graphs: algorithms giving small total state space.
    Smith and Gray (2018), opt_einsum: a Python package for optimizing contraction order for einsum-like expressions.
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from math import inf, prod
from typing import NamedTuple

from opt_einsum.paths import greedy

Scope = frozenset[str]


class Step(NamedTuple):
    """One pairwise contraction; slots are numbered as they come to be."""

    left: int
    """Slot of the first operand."""

    right: int | None
    """Slot of the second operand; None where one table alone is summed."""

    axes: tuple[str, ...]
    """Axes of the result."""

    summed: tuple[str, ...]
    """Variables summed out in this step."""

    flops: int
    """Size of the product before summing."""

    entries: int
    """Size of the result."""


def contraction_steps(
    inputs: Mapping[int, Sequence[str]], eliminated: Iterable[str], sizes: Mapping[str, int], first_slot: int
) -> tuple[Step, ...]:
    """Returns the cheapest found pairwise steps that sum `eliminated` out of the product of `inputs`.

    Args:
        inputs: The axes in each slot; the slots are connected by the eliminated variables.
        eliminated: The variables to sum out, in the program's order; each is an axis of some input.
        sizes: The size of each axis.
        first_slot: The number of the first new slot.
    """
    chosen = tuple(eliminated)
    by_weight = _by_variable(inputs, _min_weight(inputs, chosen, sizes), sizes)
    assert by_weight is not None
    steps = _pairwise(inputs, by_weight, chosen, sizes, first_slot)
    # No order can do better than to never form a product larger than the largest factor.
    largest_input = max(prod(sizes[a] for a in axes) for axes in inputs.values())
    if len(inputs) < 3 or max(step.flops for step in steps) <= largest_input:
        return steps
    rivals = (_by_variable(inputs, chosen, sizes, _cost(steps)[0]), _by_opt_einsum(inputs, chosen, sizes))
    return min(steps, *(_pairwise(inputs, r, chosen, sizes, first_slot) for r in rivals if r is not None), key=_cost)


def _cost(steps: tuple[Step, ...]) -> tuple[int, int]:
    return sum(step.flops for step in steps), sum(step.entries for step in steps)


def _min_weight(inputs: Mapping[int, Sequence[str]], eliminated: Sequence[str], sizes: Mapping[str, int]) -> list[str]:
    """Returns the variables in the order of the smallest clique first; near-linear for chains and trees."""
    neighbours: dict[str, set[str]] = {name: set() for name in eliminated}
    for axes in inputs.values():
        for name in axes:
            if name in neighbours:
                neighbours[name].update(axes)
    weight = {name: prod(sizes[a] for a in near) for name, near in neighbours.items()}
    # Among equals the least recently touched comes first: on a grid that works inward from all sides.
    rank = {name: (0, position) for position, name in enumerate(eliminated)}
    heap = [(weight[name], rank[name], name) for name in eliminated]
    heapq.heapify(heap)
    order: list[str] = []
    while heap:
        found, since, name = heapq.heappop(heap)
        if name not in neighbours or (found, since) != (weight[name], rank[name]):
            continue
        order.append(name)
        clique = neighbours.pop(name) - {name}
        for other in clique & neighbours.keys():
            gained = clique - neighbours[other]
            neighbours[other] |= gained
            neighbours[other].remove(name)
            weight[other] = weight[other] * prod(sizes[a] for a in gained) // sizes[name]
            rank[other] = (len(order), rank[other][1])
            heapq.heappush(heap, (weight[other], rank[other], other))
    return order


Pairs = list[tuple[int, int]]
"""Positions to combine: inputs are 0..n-1 in their order, and each pair makes the next position."""


def _by_variable(
    inputs: Mapping[int, Sequence[str]], order: Sequence[str], sizes: Mapping[str, int], limit: float = inf
) -> Pairs | None:
    """Returns the pairs that eliminate variables in `order`, smallest factors first; None if one costs over `limit`."""
    scopes: dict[int, Scope] = {position: frozenset(axes) for position, axes in enumerate(inputs.values())}
    holders: dict[str, set[int]] = {name: set() for name in order}
    for position, scope in scopes.items():
        for name in scope & holders.keys():
            holders[name].add(position)
    pairs: Pairs = []
    fresh = len(scopes)
    for name in order:
        queue = [(prod(sizes[a] for a in scopes[p]), p) for p in holders[name]]
        heapq.heapify(queue)
        while len(queue) > 1:
            left, right = heapq.heappop(queue)[1], heapq.heappop(queue)[1]
            pairs.append((left, right))
            scopes[fresh] = scopes[left] | scopes[right]
            for axis in scopes[fresh] & holders.keys():
                holders[axis] -= {left, right}
                holders[axis].add(fresh)
            flops = prod(sizes[a] for a in scopes[fresh])
            if flops > limit:
                return None
            heapq.heappush(queue, (flops, fresh))
            fresh += 1
        last = queue[0][1]
        scopes[last] = scopes[last] - {name}
        del holders[name]
    return pairs


def _by_opt_einsum(inputs: Mapping[int, Sequence[str]], eliminated: Sequence[str], sizes: Mapping[str, int]) -> Pairs:
    """Returns the pairs of opt_einsum's greedy path, whose positions shift as operands are consumed."""
    summed = frozenset(eliminated)
    scopes = [frozenset(axes) for axes in inputs.values()]
    output = frozenset().union(*scopes) - summed
    alive = list(range(len(scopes)))
    pairs: Pairs = []
    fresh = len(scopes)
    for picked in greedy(scopes, output, dict(sizes)):
        operands = [alive[position] for position in picked]
        for position in sorted(picked, reverse=True):
            del alive[position]
        while len(operands) > 1:
            pairs.append((operands.pop(0), operands.pop(0)))
            operands.insert(0, fresh)
            fresh += 1
        alive.append(operands[0])
    return pairs


def _pairwise(
    inputs: Mapping[int, Sequence[str]],
    pairs: Pairs,
    eliminated: Sequence[str],
    sizes: Mapping[str, int],
    first_slot: int,
) -> tuple[Step, ...]:
    """Returns the steps of a list of pairs: each variable is summed where it is last met."""
    slots = list(inputs)
    scopes: list[tuple[str, ...]] = [tuple(axes) for axes in inputs.values()]
    remaining = dict.fromkeys(eliminated, 0)
    for scope in scopes:
        for axis in scope:
            if axis in remaining:
                remaining[axis] += 1
    steps: list[Step] = []
    for position in range(len(scopes)):
        alone = _last_met(scopes[position], (), remaining)
        if alone:
            steps.append(_step(slots[position], None, scopes[position], alone, sizes))
            slots[position], scopes[position] = first_slot + len(steps) - 1, steps[-1].axes
    for left, right in pairs:
        union = tuple(dict.fromkeys(scopes[left] + scopes[right]))
        summed = _last_met(scopes[left], scopes[right], remaining)
        steps.append(_step(slots[left], slots[right], union, summed, sizes))
        slots.append(first_slot + len(steps) - 1)
        scopes.append(steps[-1].axes)
    return tuple(steps)


def _last_met(left: Sequence[str], right: Sequence[str], remaining: dict[str, int]) -> tuple[str, ...]:
    """Returns the variables that only these two scopes still hold, and counts the two as one for the others."""
    summed: list[str] = []
    for axis in dict.fromkeys((*left, *right)):
        if axis in remaining:
            holders = (axis in left) + (axis in right)
            if remaining[axis] == holders:
                summed.append(axis)
            else:
                remaining[axis] -= holders - 1
    return tuple(summed)


def _step(
    left: int, right: int | None, union: tuple[str, ...], summed: tuple[str, ...], sizes: Mapping[str, int]
) -> Step:
    axes = tuple(axis for axis in union if axis not in summed)
    return Step(left, right, axes, summed, prod(sizes[a] for a in union), prod(sizes[a] for a in axes))
