r"""Orders of elimination from the graph of who meets whom, with sets of variables as the bits of integers.

    clique(v)  =  v and its neighbours           eliminating v:  clique(u) |= clique(v) - v   for each u in clique(v)
    weight     =  prod over clique(v) of size    fill  =  pairs in clique(v) that are no neighbours

Greedy orders take the smallest weight, the smallest fill, or the smallest weighted fill, where a pair counts as the
product of its sizes. A variable of fill zero can be eliminated first at no loss; what is left is the core, where the
search is. Names and sizes only; no tensors.

References:
    Kjaerulff (1990), Triangulation of graphs: algorithms giving small total state space.
    Bodlaender, Koster and van den Eijkhof (2005), Preprocessing rules for triangulation of probabilistic networks.
    Gogate and Dechter (2004), A complete anytime algorithm for treewidth (randomised min-fill).
"""

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf, log2, prod
from random import Random

ENTRY_WORK = 16
"""What a number of a result costs, in multiply-adds: it is written, read, exponentiated and its log taken."""


@dataclass(frozen=True)
class Neighbourhoods:
    """Who meets whom: `closed[v]` has the bits of v and its neighbours; the first `count` can be eliminated."""

    closed: tuple[int, ...]
    sizes: tuple[int, ...]
    count: int


Measure = Callable[[int, Sequence[int], Sequence[int]], int]
"""What a greedy order minimises: takes a variable, the closed neighbourhoods and the sizes."""


def bits(mask: int) -> list[int]:
    """Returns the positions of the ones, lowest first."""
    found: list[int] = []
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return found


def neighbourhoods(scopes: Iterable[int], sizes: Sequence[int], count: int) -> Neighbourhoods:
    """Returns who meets whom in some scopes, given as bits; what is never eliminated counts as all joined."""
    closed = [1 << v for v in range(len(sizes))]
    for scope in scopes:
        for v in bits(scope):
            closed[v] |= scope
    rest = ((1 << len(sizes)) - 1) >> count << count
    for v in range(count, len(sizes)):
        closed[v] |= rest
    return Neighbourhoods(tuple(closed), tuple(sizes), count)


def min_weight(v: int, closed: Sequence[int], sizes: Sequence[int]) -> int:
    """Returns the size of the clique."""
    weight = 1
    for u in bits(closed[v]):
        weight *= sizes[u]
    return weight


def min_fill(v: int, closed: Sequence[int], sizes: Sequence[int]) -> int:
    """Returns the number of pairs in the clique that are no neighbours, each counted twice."""
    clique = closed[v]
    lacking = 0
    for u in bits(clique):
        lacking += (clique & ~closed[u]).bit_count()
    return lacking


def weighted_min_fill(v: int, closed: Sequence[int], sizes: Sequence[int]) -> int:
    """Returns the sum of the products of sizes of the pairs that are no neighbours, each counted twice."""
    clique = closed[v]
    lacking = 0
    for u in bits(clique):
        missing = clique & ~closed[u]
        if missing:
            lacking += sizes[u] * sum(sizes[w] for w in bits(missing))
    return lacking


def simplicial_first(graph: Neighbourhoods) -> tuple[list[int], Neighbourhoods, list[int]]:
    """Returns the variables that cost nothing to eliminate first, the core that is left, and its variables' numbers."""
    closed = list(graph.closed)
    alive = (1 << len(closed)) - 1
    first: list[int] = []
    queue = list(range(graph.count))[::-1]
    while queue:
        v = queue.pop()
        if not alive >> v & 1 or min_fill(v, closed, graph.sizes):
            continue
        first.append(v)
        alive ^= 1 << v
        for u in bits(closed[v] & alive):
            closed[u] &= alive
            if u < graph.count:
                queue.append(u)
    names = bits(alive)
    position = {v: n for n, v in enumerate(names)}
    masks = tuple(sum(1 << position[u] for u in bits(closed[v] & alive)) for v in names)
    sizes = tuple(graph.sizes[v] for v in names)
    return first, Neighbourhoods(masks, sizes, sum(v < graph.count for v in names)), names


@dataclass
class Greedy:
    """Greedy orders of one graph; counts the neighbours it looks at, which is the effort it makes."""

    graph: Neighbourhoods
    effort: int = 0

    def order(
        self, measure: Measure, *, noise: float = 0.0, random: Random | None = None, limit: float = inf
    ) -> tuple[list[int], float] | None:
        """Returns an order and the work of its cliques; None where that exceeds `limit`.

        Args:
            measure: What is smallest next.
            noise: The mean, in bits, of a random amount that is added to the log of each measure.
            random: Breaks ties at random; without it the least recently touched comes first.
            limit: The most work.
        """
        closed, sizes = list(self.graph.closed), self.graph.sizes
        touched = [0] * self.graph.count

        def key(v: int) -> tuple[float, float, int]:
            amount = measure(v, closed, sizes)
            if random is None:
                return amount, touched[v], v
            return log2(amount + 1) + noise * random.expovariate(1.0), random.random(), v

        keys = [key(v) for v in range(self.graph.count)]
        heap = list(keys)
        heapq.heapify(heap)
        order: list[int] = []
        alive = (1 << self.graph.count) - 1
        work = 0
        while heap:
            found = heapq.heappop(heap)
            v = found[2]
            if found is not keys[v] or not alive >> v & 1:
                continue
            order.append(v)
            alive ^= 1 << v
            weight = min_weight(v, closed, sizes)
            work += weight + ENTRY_WORK * (weight // max(1, sizes[v]))
            if work > limit:
                return None
            for u in bits(_eliminate(v, closed, further=measure is not min_weight) & alive):
                self.effort += closed[u].bit_count()
                touched[u] = len(order)
                keys[u] = key(u)
                heapq.heappush(heap, keys[u])
        return order, work


def _eliminate(v: int, closed: list[int], *, further: bool) -> int:
    """Joins the neighbours of v, and returns those whose weight changed, `further` also those whose fill did."""
    affected = closed[v]
    rest = affected & ~(1 << v)
    for u in bits(rest):
        missing = rest & ~closed[u]
        closed[u] = (closed[u] | rest) & ~(1 << v)
        if missing and further:
            for w in bits(missing):
                affected |= closed[u] & closed[w]
    return affected


def min_weight_order(scopes: Iterable[frozenset[int]], count: int, sizes: Sequence[int]) -> list[int]:
    """Returns the order of the smallest clique first; with sets, near-linear for chains and trees of any length."""
    neighbours: list[set[int]] = [set() for _ in range(count)]
    for scope in scopes:
        for v in scope:
            if v < count:
                neighbours[v] |= scope
    weight = [prod(sizes[u] for u in near) for near in neighbours]
    # Among equals the least recently touched comes first: on a grid that works inward from all sides.
    keys = [(weight[v], 0, v) for v in range(count)]
    heap = list(keys)
    heapq.heapify(heap)
    order: list[int] = []
    gone: set[int] = set()
    while heap:
        found = heapq.heappop(heap)
        v = found[2]
        if v in gone or found is not keys[v]:
            continue
        order.append(v)
        gone.add(v)
        clique = neighbours[v] - {v}
        for u in clique:
            if u < count:
                gained = clique - neighbours[u]
                neighbours[u] |= gained
                neighbours[u].remove(v)
                # A size of zero leaves no weight to divide.
                weight[u] = weight[u] * prod(sizes[w] for w in gained) // sizes[v] if sizes[v] else 0
                keys[u] = (weight[u], len(order), u)
                heapq.heappush(heap, keys[u])
    return order
