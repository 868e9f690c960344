"""Chains against the full joint table of the same graph with its chains written out."""

import pytest
import torch
from engine.chain_graphs import CHAIN_GRAPHS, TIME, written_out
from engine.full_joint import Copy, FullJoint, full_joint
from torch import Tensor

from pyro_vfe.engine import FactorGraph, Table, log_normalizer, mode, sample

close = torch.testing.assert_close


def total(graph: FactorGraph) -> Tensor:
    return log_normalizer(graph).total


def with_tables(graph: FactorGraph, values: list[Tensor]) -> FactorGraph:
    return graph.with_tables(Table(v, table.axes) for v, table in zip(values, graph.tables, strict=True))


@pytest.mark.parametrize("name", CHAIN_GRAPHS)
def test_log_normalizer_equals_the_full_joint_table(name: str) -> None:
    graph = CHAIN_GRAPHS[name]
    graph.check()
    close(total(graph), full_joint(written_out(graph)).log_normalizer)


@pytest.mark.parametrize("name", CHAIN_GRAPHS)
def test_gradients_equal_those_of_the_graph_written_out(name: str) -> None:
    graph = CHAIN_GRAPHS[name]
    values = [table.values.clone().requires_grad_() for table in graph.tables]
    one = torch.autograd.grad(total(with_tables(graph, values)), values, materialize_grads=True, allow_unused=True)
    plain = total(written_out(with_tables(graph, values)))
    other = torch.autograd.grad(plain, values, materialize_grads=True, allow_unused=True)
    for found, expected in zip(one, other, strict=True):
        close(found, expected)


@pytest.mark.parametrize("name", CHAIN_GRAPHS)
def test_mode_is_a_best_assignment_of_the_graph_written_out(name: str) -> None:
    graph = CHAIN_GRAPHS[name]
    best = mode(graph)
    plain = full_joint(written_out(graph))
    close(score(graph, best, plain), plain.log_table.max())


@pytest.mark.parametrize("name", ["transitions by class, 3 steps", "transitions by a latent at each step, 3 steps"])
def test_samples_have_the_frequencies_of_the_graph_written_out(name: str) -> None:
    torch.manual_seed(0)
    graph, size = CHAIN_GRAPHS[name], 40_000
    plain = full_joint(written_out(graph))
    drawn = sample(graph, size)
    index = [at(drawn, copy, 1) for copy in plain.copies]
    counts = torch.zeros_like(plain.log_table).index_put(
        tuple(index), torch.ones(size, dtype=torch.float64), accumulate=True
    )
    probs = (plain.log_table - plain.log_normalizer).exp()
    assert bool(((counts / size - probs).abs() < 5 * (probs / size).sqrt() + 1e-3).all())


def at(decided: dict[str, Table], copy: Copy, leading: int) -> Tensor:
    """The index that a copy of the graph written out takes."""
    name, where = copy
    inside = name not in decided
    table = decided[name.rstrip("0123456789")] if inside else decided[name]
    values = table.values
    elements = dict(where) | ({TIME: int(name.lstrip("xzwv"))} if inside else {})
    for axis in table.axes[leading:]:
        values = values.select(leading, elements[axis])
    return values


def score(graph: FactorGraph, decided: dict[str, Table], plain: FullJoint) -> Tensor:
    return plain.log_table[tuple(at(decided, copy, 0) for copy in plain.copies)]
