r"""The search for a cheap tree of pairwise products: several quick ones, and a longer one where it repays.

    effort  <=  min( MOST_EFFORT, work of the best tree / WORK_PER_EFFORT )

Candidates: elimination by smallest weight, smallest fill and smallest weighted fill; in the program's order, which
suits the rows of a grid; opt_einsum's greedy path, and randomised ones where it is not far off; cotengra's, where that
is installed. Then greedy orders with random ties and some noise, for as long as the effort lasts. Subtrees of each are
improved, and the cheapest tree wins. Effort is counted in units of work, not in time, and the numbers are drawn from a
seeded generator: the same graph has the same plan everywhere. Names and sizes only; no tensors.

References:
    Kjaerulff (1990), Triangulation of graphs: algorithms giving small total state space.
    Gogate and Dechter (2004), A complete anytime algorithm for treewidth (randomised min-fill).
    Smith and Gray (2018), opt_einsum: a Python package for optimizing contraction order for einsum-like expressions.
    Gray and Kourtis (2021), Hyper-optimized tensor network contraction.
"""

import heapq
from collections.abc import Iterator, Sequence
from itertools import count
from math import exp, inf
from random import Random
from typing import Any, NamedTuple

from opt_einsum.paths import ssa_greedy_optimize

from pyro_vfe.engine.contraction_trees import ContractionTree, Cost, Pairs, pairs_of_order
from pyro_vfe.engine.elimination_orders import (
    Greedy,
    Measure,
    min_fill,
    min_weight,
    neighbourhoods,
    simplicial_first,
    weighted_min_fill,
)

try:
    import cotengra  # type: ignore[import-not-found, unused-ignore]
except ImportError:
    cotengra = None  # type: ignore[assignment, unused-ignore]

MOST_EFFORT = 4_000_000
"""The most units of effort of a search, of about half a microsecond each."""

WORK_PER_EFFORT = 4
"""How much work of the plan allows for one unit of effort: a plan is made once and executed many times."""

RANDOM_GREEDY = 8
"""How many randomised greedy paths are tried."""

_NOISE = (0.0, 0.25, 0.5, 1.0)
"""Bits of noise of the randomised orders, in turn."""

_MEASURES = 2
"""How many orders come before the random ones."""

_HOPELESS = 10
"""How many times the best work a greedy path may have so that randomised ones are tried."""

_NEAR = 1.5
"""How many times the least work of cliques an order may have so that its subtrees are improved: that halves some."""

_FINALISTS = 3
_QUICK_WIDTH, _QUICK_PASSES, _QUICK_SHARE = 6, 3, 0.25
"""The most leaves, passes and share of the effort left, to improve a candidate; next, to improve the finalists."""

_FINAL_WIDTH, _FINAL_PASSES = 8, 10


class Search(NamedTuple):
    """What was searched for a component."""

    method: str
    """The candidate that won."""

    tried: int
    """How many candidates competed."""

    effort: int
    """Units of effort: neighbours and splits looked at."""


class Contraction(NamedTuple):
    """Factors to be multiplied, and variables to be summed out of them, as numbers."""

    scopes: tuple[frozenset[int], ...]
    """The variables of each factor."""

    sizes: tuple[int, ...]
    """The size of each variable."""

    n_summed: int
    """How many of the first variables are summed out, in the program's order."""


def search(
    contraction: Contraction, first: Pairs, limit: float = inf, most_effort: int = MOST_EFFORT
) -> tuple[Pairs, Search]:
    """Returns the best products found, and what was searched.

    Args:
        contraction: What is contracted.
        first: The products of elimination by smallest weight.
        limit: Entries of all results together; trees that keep to it are preferred.
        most_effort: The most units of effort.
    """
    return _Searcher(contraction, limit, most_effort).run(first)


class _Searcher:
    def __init__(self, contraction: Contraction, limit: float, most_effort: int) -> None:
        self.contraction = contraction
        self.masks = [sum(1 << v for v in scope) for scope in contraction.scopes]
        self.limit = limit
        self.most_effort = most_effort
        self.effort = 0
        self.tried = 0
        self.least = Cost(inf, inf)
        self.best: list[tuple[Cost, int, str, ContractionTree]] = []

    def run(self, first: Pairs) -> tuple[Pairs, Search]:
        """Searches, and returns the best."""
        self._enter("min-weight", first)
        if self._left() > 32 * self.contraction.n_summed:
            self._enter_order("program order", range(self.contraction.n_summed))
            self._enter_orders()
        for _, _, _, tree in self.best:
            self._improve(tree, _FINAL_WIDTH, _FINAL_PASSES)
        _, _, method, tree = min((tree.cost(self.limit), n, name, tree) for _, n, name, tree in self.best)
        return tree.pairs(), Search(method, self.tried, self.effort)

    def _left(self) -> float:
        """Returns how much effort is left."""
        repays = self.least.work // WORK_PER_EFFORT if self.least.excess <= self.limit else self.most_effort
        return min(self.most_effort, repays) - self.effort

    def _enter(self, method: str, pairs: Pairs) -> None:
        tree = ContractionTree(self.masks, self.contraction.sizes, self.contraction.n_summed, pairs)
        self.tried += 1
        self._improve(tree, _QUICK_WIDTH, _QUICK_PASSES, _QUICK_SHARE)
        self.best.append((tree.cost(self.limit), self.tried, method, tree))
        self.best = sorted(self.best)[:_FINALISTS]

    def _improve(self, tree: ContractionTree, width: int, passes: int, share: float = 1.0) -> None:
        self.least = min(self.least, tree.cost(self.limit))
        self.effort += tree.improve(width, passes, share * self._left())
        self.least = min(self.least, tree.cost(self.limit))

    def _enter_order(self, method: str, order: Sequence[int]) -> None:
        # A product above the best tree's whole work cannot be part of a better one.
        pairs = pairs_of_order(self.contraction.scopes, order, self.contraction.sizes, self.least.work)
        if pairs is not None:
            self._enter(method, pairs)

    def _enter_greedy_paths(self) -> None:
        effort = _effort_of_greedy(self.contraction)
        random: Random | None = None
        for _ in range(1 + RANDOM_GREEDY):
            if effort > self._left() / 8:
                break
            self.effort += effort
            pairs = greedy_pairs(self.contraction, random)
            self._enter("opt_einsum random-greedy" if random else "opt_einsum greedy", pairs)
            tree = ContractionTree(self.masks, self.contraction.sizes, self.contraction.n_summed, pairs)
            if tree.cost(self.limit).work > _HOPELESS * self.least.work:
                break
            random = random or Random(0)
        if cotengra is not None and effort < self._left() / 8:
            self._enter("cotengra", _cotengra_pairs(self.contraction))

    def _enter_orders(self) -> None:
        """Enters greedy orders: the variables that cost nothing first, and then the core as each measure says."""
        graph = neighbourhoods(self.masks, self.contraction.sizes, self.contraction.n_summed)
        begin, core, names = simplicial_first(graph)
        least = inf
        for turn, (method, measure, noise, random) in enumerate(_measures()):
            if turn == _MEASURES:
                self._enter_greedy_paths()
            if self._left() <= 0 or (random and not core.count):
                break
            greedy = Greedy(core)
            found = greedy.order(measure, noise=noise, random=random, limit=_NEAR * least)
            self.effort += greedy.effort
            if found is None:
                self.tried += 1
                continue
            least = min(least, found[1])
            self._enter_order(method, [*begin, *(names[v] for v in found[0])])


def _measures() -> Iterator[tuple[str, Measure, float, Random | None]]:
    """Yields the greedy orders to try: each measure once, and then two of them with random ties and noise, for ever."""
    yield "min-fill", min_fill, 0.0, None
    yield "weighted min-fill", weighted_min_fill, 0.0, None
    random = Random(0)
    for turn in count():
        noise = _NOISE[turn % len(_NOISE)]
        yield "randomised min-fill", min_fill, noise, random
        yield "randomised min-weight", min_weight, noise, random


def greedy_pairs(contraction: Contraction, random: Random | None = None) -> Pairs:
    """Returns the products of opt_einsum's greedy path; with `random`, each choice drawn among the best few."""
    output = frozenset(v for scope in contraction.scopes for v in scope if v >= contraction.n_summed)
    sizes: Any = dict(enumerate(contraction.sizes))
    chooser = None if random is None else _Chooser(random)
    path: Any = ssa_greedy_optimize(list(contraction.scopes), output, sizes, chooser)
    return [(pair[0], pair[1]) for pair in path if len(pair) == 2]


def _effort_of_greedy(contraction: Contraction) -> int:
    """Returns the effort of a greedy path, which looks at each pair of factors that share a variable."""
    holders = [0] * contraction.n_summed
    for scope in contraction.scopes:
        for v in scope:
            if v < contraction.n_summed:
                holders[v] += 1
    return 32 * sum(n * n for n in holders)


class _Chooser:
    """Draws among the eight best candidates with probability proportional to exp(-cost / temperature)."""

    def __init__(self, random: Random, branches: int = 8) -> None:
        self.random = random
        self.branches = branches

    def __call__(self, queue: list[Any], remaining: dict[Any, int]) -> Any:
        choices: list[Any] = []
        while queue and len(choices) < self.branches:
            candidate = heapq.heappop(queue)
            if candidate[1] in remaining and candidate[2] in remaining:
                choices.append(candidate)
        if not choices:
            return None
        costs = [choice[0][0] for choice in choices]
        temperature = max(1.0, abs(costs[0]))
        weights = [exp(-(cost - costs[0]) / temperature) for cost in costs]
        chosen = choices.pop(self.random.choices(range(len(choices)), weights)[0])
        for other in choices:
            heapq.heappush(queue, other)
        return chosen


def _cotengra_pairs(contraction: Contraction) -> Pairs:
    """Returns the products of cotengra's randomised greedy path, whose positions shift as operands are consumed."""
    output = {v for scope in contraction.scopes for v in scope if v >= contraction.n_summed}
    optimizer = cotengra.RandomGreedyOptimizer(max_repeats=32, seed=0, parallel=False)
    path = optimizer(
        [sorted(scope) for scope in contraction.scopes], sorted(output), dict(enumerate(contraction.sizes))
    )
    alive = list(range(len(contraction.scopes)))
    pairs: Pairs = []
    fresh = len(alive)
    for picked in path:
        operands = [alive[position] for position in picked]
        for position in sorted(picked, reverse=True):
            del alive[position]
        while len(operands) > 1:
            pairs.append((operands.pop(0), operands.pop(0)))
            operands.insert(0, fresh)
            fresh += 1
        alive.append(operands[0])
    return pairs
