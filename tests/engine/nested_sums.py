"""The oracle of weighted sums: every copy of every variable by itself, summed in an order that the plates allow."""

import random

import torch
from engine.full_joint import Copy, copy_of, elements
from torch import Tensor

from pyro_vfe.engine import FactorGraph, Scale, Table

Grounded = list[tuple[list[Copy], Tensor]]
"""The copies that each element of each factor reads, and its weighted log values."""


def weight(scale: Scale, at: dict[str, int]) -> float:
    """The scale of one element."""
    return float(scale.values[tuple(at[axis] for axis in scale.axes)]) if isinstance(scale, Table) else scale


def grounded(graph: FactorGraph) -> Grounded:
    """Every element of every factor, weighted."""
    found: Grounded = []
    for factor in graph.factors:
        for at in elements(factor.plates, dict(graph.plates)):
            values = factor.table.values[tuple(at.get(axis, slice(None)) for axis in factor.table.axes)]
            scope = [copy_of(graph, axis, at) for axis in factor.table.axes if axis in graph.variables]
            found.append((scope, weight(factor.scale, at) * values))
    return found


def value_in_order(graph: FactorGraph, order: list[Copy]) -> float:
    """The log normaliser with the copies summed one after the other: c log sum exp(f / c) for a copy of weight c."""
    left = grounded(graph)
    for copy in order:
        variable, c = graph.variables[copy[0]], weight(graph.variables[copy[0]].scale, dict(copy[1]))
        touching = [part for part in left if copy in part[0]]
        axes = list(dict.fromkeys([copy, *(other for scope, _ in touching for other in scope)]))
        total = torch.zeros([graph.variables[name].size for name, _ in axes])
        for scope, values in touching:
            places = sorted(range(len(scope)), key=lambda n: axes.index(scope[n]))
            shape = [graph.variables[axis[0]].size if axis in scope else 1 for axis in axes]
            total = total + values.permute(places).reshape(shape)
        assert total.shape[0] == variable.size
        left = [part for part in left if copy not in part[0]] + [(axes[1:], c * (total / c).logsumexp(0))]
    return sum(float(values) for _, values in left)


def allowed_orders(graph: FactorGraph, number: int, seed: int) -> list[list[Copy]]:
    """Random orders in which a variable goes before those of fewer plates, in every other all its copies together."""
    generator = random.Random(seed)
    orders = []
    for n in range(number):
        blocks = [
            [copy_of(graph, name, at) for at in elements(v.plates, dict(graph.plates))] for name, v in _all(graph)
        ]
        waiting = blocks if n % 2 else [[copy] for block in blocks for copy in block]
        order: list[Copy] = []
        while waiting:
            plates = [graph.variables[block[0][0]].plates for block in waiting]
            free = [b for b, own in zip(waiting, plates, strict=True) if not any(other > own for other in plates)]
            order += (chosen := generator.choice(free))
            waiting = [block for block in waiting if block is not chosen]
        orders.append(order)
    return orders


def _all(graph: FactorGraph) -> list[tuple[str, object]]:
    return list(graph.variables.items())
