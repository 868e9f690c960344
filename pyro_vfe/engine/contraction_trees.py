r"""Trees of pairwise products, and their improvement one subtree at a time.

    work(i, j -> k)  =  prod over scope(i) | scope(j) of size  +  ENTRY_WORK * prod over scope(k) of size

A variable leaves at the step after which no other scope has it. A subtree of a few leaves is replaced by the best tree
over the same leaves, found among all by dynamic programming over subsets; a pass visits the steps that carry the work.
Names and sizes only; no tensors.

References:
    Pfeifer, Haegeman and Verstraete (2014), Faster identification of optimal contraction sequences for tensor networks.
    Gray and Kourtis (2021), Hyper-optimized tensor network contraction (subtree reconfiguration).
"""

import heapq
from collections.abc import Sequence
from math import inf
from typing import NamedTuple

from pyro_vfe.engine.elimination_orders import ENTRY_WORK, bits

Pairs = list[tuple[int, int]]
"""Positions to combine: inputs are 0..n-1 in their order, and each pair makes the next position."""


class Cost(NamedTuple):
    """What a tree costs; the smaller is the better."""

    excess: float
    """Entries of all results together, or the limit where they fit it."""

    work: float
    """Multiply-adds, and `ENTRY_WORK` for each entry."""


class ContractionTree:
    """Pairwise products of scopes, given as bits; positions as in `Pairs`.

    Args:
        scopes: The scopes of the inputs.
        sizes: The size of each bit.
        count: How many of the first bits are summed out.
        pairs: The products, the last of which has everything.
    """

    def __init__(self, scopes: Sequence[int], sizes: Sequence[int], count: int, pairs: Pairs) -> None:
        self.sizes = sizes
        self.inputs = len(scopes)
        self.scopes = list(scopes)
        self.children: list[tuple[int, int] | None] = [None] * len(scopes)
        self._volumes: dict[int, int] = {}
        summed = (1 << count) - 1
        holders = [0] * count
        for scope in scopes:
            for v in bits(scope & summed):
                holders[v] += 1
        for n, scope in enumerate(scopes):
            for v in bits(scope & summed):
                if holders[v] == 1:
                    self.scopes[n] &= ~(1 << v)
        for left, right in pairs:
            scope = self.scopes[left] | self.scopes[right]
            for v in bits(self.scopes[left] & self.scopes[right] & summed):
                holders[v] -= 1
                if holders[v] == 1:
                    scope &= ~(1 << v)
            self.scopes.append(scope)
            self.children.append((left, right))
        self.root = len(self.scopes) - 1

    def volume(self, scope: int) -> int:
        """Returns the number of entries over a scope."""
        found = self._volumes.get(scope)
        if found is None:
            found = 1
            for v in bits(scope):
                found *= self.sizes[v]
            self._volumes[scope] = found
        return found

    def work(self, node: int) -> int:
        """Returns the work of one product; zero for an input."""
        pair = self.children[node]
        if pair is None:
            return 0
        return self.volume(self.scopes[pair[0]] | self.scopes[pair[1]]) + ENTRY_WORK * self.volume(self.scopes[node])

    def cost(self, limit: float) -> Cost:
        """Returns the cost, where tables of `limit` entries together are as good as fewer."""
        products = [node for node in self.top_down() if self.children[node] is not None]
        entries = sum(self.volume(self.scopes[node]) for node in products)
        return Cost(max(entries, limit), sum(map(self.work, products)))

    def top_down(self) -> list[int]:
        """Returns the positions, each before those it is made of."""
        order: list[int] = []
        stack = [self.root]
        while stack:
            node = stack.pop()
            order.append(node)
            stack.extend(self.children[node] or ())
        return order

    def pairs(self) -> Pairs:
        """Returns the products in an order in which they can be made."""
        position = {node: node for node in range(self.inputs)}
        made: Pairs = []
        for node in reversed(self.top_down()):
            pair = self.children[node]
            if pair is not None:
                made.append((position[pair[0]], position[pair[1]]))
                position[node] = self.inputs + len(made) - 1
        return made

    def improve(self, width: int, passes: int, most_effort: float = inf) -> int:
        """Replaces subtrees by better ones until a pass finds none; returns the effort, the splits looked at.

        Args:
            width: The most leaves of a subtree.
            passes: The most passes.
            most_effort: The effort after which it stops.
        """
        effort = 0
        for _ in range(passes):
            products = self.top_down()
            total = sum(map(self.work, products))
            found = False
            for node in products:
                # A step below a fraction of the whole cannot repay the time to look at it.
                if self.work(node) > total // 500 and effort < most_effort:
                    leaves, inner = self._subtree(node, width, total // 10_000)
                    effort += 3 ** len(leaves) // 4
                    found = self._improve_at(node, leaves, inner) or found
            if not found:
                break
        return effort

    def _improve_at(self, node: int, leaves: Sequence[int], inner: Sequence[int]) -> bool:
        """Replaces the subtree below a node by the best one over the same leaves; returns whether it is better."""
        if len(leaves) < 3:
            return False
        best, cut, scopes = self._best_tree([self.scopes[leaf] for leaf in leaves], self.scopes[node])
        if best >= sum(map(self.work, inner)):
            return False
        free = [other for other in inner if other != node]
        stack = [(node, len(cut) - 1)]
        while stack:
            parent, subset = stack.pop()
            self.scopes[parent] = scopes[subset]
            halves: list[int] = []
            for half in (cut[subset], subset ^ cut[subset]):
                if half & (half - 1):
                    stack.append((free.pop(), half))
                    halves.append(stack[-1][0])
                else:
                    halves.append(leaves[half.bit_length() - 1])
            self.children[parent] = (halves[0], halves[1])
        return True

    def _subtree(self, node: int, width: int, least: int) -> tuple[list[int], list[int]]:
        """Returns the leaves and the products of a subtree that was opened where the work is largest."""
        leaves, inner = [node], list[int]()
        while len(leaves) < width:
            opened = max((leaf for leaf in leaves if self.children[leaf]), key=self.work, default=None)
            if opened is None or (inner and self.work(opened) < least):
                break
            leaves.remove(opened)
            leaves.extend(self.children[opened] or ())
            inner.append(opened)
        return leaves, inner

    def _best_tree(self, leaves: Sequence[int], outer: int) -> tuple[float, list[int], list[int]]:
        """Returns the least work, and for each subset of the leaves one half of its best split, and its scope."""
        everything = (1 << len(leaves)) - 1
        union = [0] * (everything + 1)
        for subset in range(1, everything + 1):
            low = subset & -subset
            union[subset] = union[subset ^ low] | leaves[low.bit_length() - 1]
        scopes = [union[subset] & (union[everything ^ subset] | outer) for subset in range(everything + 1)]
        # A leaf keeps its scope: what it alone has of the outer scope is in it already.
        best: list[float] = [0.0] * (everything + 1)
        cut = [0] * (everything + 1)
        volumes, volume = self._volumes, self.volume
        for subset in range(3, everything + 1):
            low = subset & -subset
            rest = half = subset ^ low
            if not rest:
                continue
            least = inf
            while half:
                work = best[half] + best[subset ^ half]
                if work < least:
                    scope = scopes[half] | scopes[subset ^ half]
                    work += volumes.get(scope) or volume(scope)
                    if work < least:
                        least, cut[subset] = work, half
                half = (half - 1) & rest
            best[subset] = least + ENTRY_WORK * volume(scopes[subset])
        return best[everything], cut, scopes


def pairs_of_order(
    scopes: Sequence[frozenset[int]], order: Sequence[int], sizes: Sequence[int], limit: float = inf
) -> Pairs | None:
    """Returns the pairs that eliminate variables in `order`, smallest factors first, and join what is left.

    None where a product has more than `limit` entries.
    """
    current = dict(enumerate(scopes))
    holders: dict[int, set[int]] = {v: set() for v in order}
    for position, scope in current.items():
        for v in scope & holders.keys():
            holders[v].add(position)
    pairs: Pairs = []
    largest = 0

    def joined(positions: set[int]) -> int:
        nonlocal largest
        queue = [(_volume(current[p], sizes), p) for p in positions]
        heapq.heapify(queue)
        while len(queue) > 1:
            left, right = heapq.heappop(queue)[1], heapq.heappop(queue)[1]
            pairs.append((left, right))
            fresh = len(scopes) + len(pairs) - 1
            current[fresh] = current.pop(left) | current.pop(right)
            for v in current[fresh] & holders.keys():
                holders[v] -= {left, right}
                holders[v].add(fresh)
            heapq.heappush(queue, (_volume(current[fresh], sizes), fresh))
            largest = max(largest, queue[0][0] if len(queue) == 1 else 0)
        return queue[0][1]

    for v in order:
        last = joined(holders[v])
        if largest > limit:
            return None
        current[last] -= {v}
        del holders[v]
    joined(set(current))
    return pairs


def _volume(scope: frozenset[int], sizes: Sequence[int]) -> int:
    volume = 1
    for v in scope:
        volume *= sizes[v]
    return volume
