r"""The steps in which variables are summed, pairwise, and what each costs.

    flops(i, j -> k)  =  prod over axes(i) | axes(j) of size          entries(k)  =  prod over axes(k) of size

A variable is summed at the step after which no other factor has it. Elimination by smallest clique is taken at once
where it never forms a product larger than the largest factor, as in chains and trees; otherwise the search is asked.
What would exceed a limit of entries is cut: summed value by value over a few variables. Names and sizes only; no
tensors.

References:
    Kjaerulff (1990), Triangulation of graphs: algorithms giving small total state space.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from math import inf, prod
from typing import NamedTuple

from pyro_vfe.engine.contraction_trees import Pairs, pairs_of_order
from pyro_vfe.engine.cuts import cut_to_fit, held_beside
from pyro_vfe.engine.elimination_orders import min_weight_order
from pyro_vfe.engine.search import MOST_EFFORT, Contraction, Search, search

AT_ONCE = Search("smallest clique", 1, 0)
"""No search was needed."""

CUT_EFFORT = MOST_EFFORT // 4
"""The most effort of each further search, where a plan has to be made to fit."""


MOST_VARIABLES = 5_000
"""Above, a search over sets of variables takes too long, and only the program's order competes."""


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

    formed: int
    """Size of the product where it is formed whole and summed: where one operand has all axes. Otherwise 0."""

    @property
    def held(self) -> int:
        """Numbers that are held for a gradient: the result, and the product that was formed."""
        return self.entries + self.formed


class Steps(NamedTuple):
    """How a connected component is summed."""

    steps: tuple[Step, ...]
    """Pairwise contractions; where variables are cut, those for one of their values, and without their axes."""

    search: Search
    """What was searched."""

    cut: tuple[str, ...] = ()
    """The variables that are summed value by value around all the steps."""


def contraction_steps(
    inputs: Mapping[int, Sequence[str]],
    eliminated: Iterable[str],
    sizes: Mapping[str, int],
    first_slot: int,
    limit: float = inf,
) -> Steps:
    """Returns the cheapest found pairwise steps that sum `eliminated` out of the product of `inputs`.

    Args:
        inputs: The axes in each slot; the slots are connected by the eliminated variables.
        eliminated: The variables to sum out, in the program's order; each is an axis of some input.
        sizes: The size of each axis.
        first_slot: The number of the first new slot.
        limit: The most entries that may be held; what exceeds it is cut, if that is possible.
    """
    chosen = tuple(eliminated)
    whole = _uncut(inputs, chosen, sizes, first_slot, inf, MOST_EFFORT)
    if _held(whole.steps) <= limit:
        return whole
    fitted = _uncut(inputs, chosen, sizes, first_slot, limit, CUT_EFFORT)
    if _held(fitted.steps) <= limit:
        return fitted
    products = [(frozenset((*step.axes, *step.summed)), step.flops) for step in fitted.steps]
    results = [(frozenset(step.axes), step.entries) for step in fitted.steps]
    formed = [product for product, step in zip(products, fitted.steps, strict=True) if step.formed]
    result = fitted.steps[-1].entries
    cut = cut_to_fit(products, results + formed, chosen, sizes, limit, result)
    if not cut:
        return whole
    left = {slot: tuple(axis for axis in axes if axis not in cut) for slot, axes in inputs.items()}
    rest = tuple(name for name in chosen if name not in cut)
    sliced = _uncut(left, rest, sizes, first_slot, limit, CUT_EFFORT)
    slices = prod(sizes[name] for name in cut)
    fits = _held(sliced.steps) + held_beside(slices, result) <= limit
    return Steps(sliced.steps, sliced.search, cut) if fits else whole


def _held(steps: Iterable[Step]) -> int:
    return sum(step.held for step in steps)


def _uncut(
    inputs: Mapping[int, Sequence[str]],
    eliminated: tuple[str, ...],
    sizes: Mapping[str, int],
    first_slot: int,
    limit: float,
    most_effort: int,
) -> Steps:
    position = {
        name: n for n, name in enumerate(dict.fromkeys((*eliminated, *(a for s in inputs.values() for a in s))))
    }
    scopes = tuple(frozenset(map(position.__getitem__, axes)) for axes in inputs.values())
    contraction = Contraction(scopes, tuple(sizes[name] for name in position), len(eliminated))
    first = pairs_of_order(scopes, min_weight_order(scopes, len(eliminated), contraction.sizes), contraction.sizes)
    assert first is not None
    steps = _pairwise(inputs, first, eliminated, sizes, first_slot)
    # No order can do better than to never form a product larger than the largest factor.
    largest_input = max(prod(sizes[a] for a in axes) for axes in inputs.values())
    if len(inputs) < 3 or max(step.flops for step in steps) <= largest_input:
        return Steps(steps, AT_ONCE)
    if len(eliminated) > MOST_VARIABLES:
        work = sum(step.flops for step in steps)
        rival = pairs_of_order(scopes, range(len(eliminated)), contraction.sizes, work)
        in_order = steps if rival is None else _pairwise(inputs, rival, eliminated, sizes, first_slot)
        better = sum(step.flops for step in in_order) < work
        return Steps(in_order, AT_ONCE._replace(method="program order")) if better else Steps(steps, AT_ONCE)
    pairs, report = _searched(contraction, tuple(first), limit, most_effort)
    return Steps(_pairwise(inputs, pairs, eliminated, sizes, first_slot), report)


@lru_cache(maxsize=64)
def _searched(
    contraction: Contraction, first: tuple[tuple[int, int], ...], limit: float, most_effort: int
) -> tuple[Pairs, Search]:
    return search(contraction, list(first), limit, most_effort)


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
            steps.append(_step(slots[position], None, scopes[position], (), alone, sizes))
            slots[position], scopes[position] = first_slot + len(steps) - 1, steps[-1].axes
    for left, right in pairs:
        summed = _last_met(scopes[left], scopes[right], remaining)
        steps.append(_step(slots[left], slots[right], scopes[left], scopes[right], summed, sizes))
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
    left: int,
    right: int | None,
    left_axes: tuple[str, ...],
    right_axes: tuple[str, ...],
    summed: tuple[str, ...],
    sizes: Mapping[str, int],
) -> Step:
    union = tuple(dict.fromkeys(left_axes + right_axes))
    axes = tuple(axis for axis in union if axis not in summed)
    flops, entries = prod(sizes[a] for a in union), prod(sizes[a] for a in axes)
    whole = bool(summed) and (len(union) == len(left_axes) or len(union) == len(right_axes))
    return Step(left, right, axes, summed, flops, entries, flops if whole else 0)
