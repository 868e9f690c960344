"""Marginals and expectations against the full joint table."""

import pytest
import torch
from engine.full_joint import copy_of, elements, full_joint
from engine.graphs import GRAPHS, INF, graph_of, plated_graphs, values_of, with_values
from hypothesis import given, settings

from pyro_vfe.engine import FactorGraph, Table, expected_tables, log_normalizer, marginals
from pyro_vfe.errors import ImpossibleDataError, VFEError

close = torch.testing.assert_close
POSSIBLE = {name: graph for name, graph in GRAPHS.items() if full_joint(graph).log_normalizer > -INF}


def assert_marginal_is_right(graph: FactorGraph, scope: tuple[str, ...], found: Table) -> None:
    joint = full_joint(graph)
    plates = frozenset[str]().union(*(graph.variables[name].plates for name in scope))
    assert found.axes == (*sorted(plates), *scope)
    for at in elements(plates, dict(graph.plates)):
        expected = (joint.log_marginal([copy_of(graph, name, at) for name in scope]) - joint.log_normalizer).exp()
        close(found.values[tuple(at[plate] for plate in sorted(plates))], expected)


@pytest.mark.parametrize("name", POSSIBLE)
def test_every_single_and_pair_marginal_equals_the_full_joint_table(name: str) -> None:
    graph = POSSIBLE[name]
    names = list(graph.variables)
    scopes = [(a,) for a in names] + [(a, b) for a in names for b in names if a != b]
    for scope, table in marginals(graph, scopes).items():
        assert_marginal_is_right(graph, scope, table)


@settings(max_examples=50, deadline=None)
@given(plated_graphs(zeros=False))
def test_marginals_of_random_graphs_equal_the_full_joint_table(graph: FactorGraph) -> None:
    names = list(graph.variables)
    scopes = [(a,) for a in names] + [tuple(names[:2]), tuple(names[:-3:-1])]
    for scope, table in marginals(graph, [scope for scope in scopes if scope]).items():
        assert_marginal_is_right(graph, scope, table)


def test_marginals_are_found_under_no_grad_and_leave_the_callers_tables_alone() -> None:
    graph = GRAPHS["mixture"]
    values = [v.clone().requires_grad_() for v in values_of(graph)]
    with torch.no_grad():
        found = marginals(with_values(graph, values), [("b",)])["b",]
    assert not found.values.requires_grad
    assert all(v.grad is None for v in values)


@pytest.mark.parametrize("name", POSSIBLE)
def test_expected_tables_are_the_gradient_of_the_log_normalizer(name: str) -> None:
    graph = POSSIBLE[name]
    values = [v.clone().requires_grad_() for v in values_of(graph)]
    gradients = torch.autograd.grad(log_normalizer(with_values(graph, values)).total, values)
    for found, expected, v in zip(expected_tables(graph), gradients, values, strict=True):
        close(found, expected)
        assert (found[v == -INF] == 0).all()


def test_impossible_data_name_their_site() -> None:
    graph = GRAPHS["chain"]
    impossible = with_values(graph, [torch.full_like(v, -INF) if n == 2 else v for n, v in enumerate(values_of(graph))])
    with pytest.raises(ImpossibleDataError, match=r"Site 'f2' has probability zero"):
        marginals(impossible, [("a",)])


def test_sites_that_are_impossible_only_together_are_called_so() -> None:
    graph = graph_of({"a": (2, "")}, [("a", "", ""), ("a", "", "")], {})
    with pytest.raises(ImpossibleDataError, match="jointly"):
        expected_tables(with_values(graph, [torch.tensor([0.0, -INF]), torch.tensor([-INF, 0.0])]))


def test_an_unknown_variable_in_a_scope_is_refused() -> None:
    with pytest.raises(VFEError, match=r"unknown variables \['q'\]"):
        marginals(GRAPHS["chain"], [("a", "q")])


def test_not_a_number_is_not_called_impossible() -> None:
    graph = graph_of({"a": (2, "")}, [("a", "", "")], {})
    with pytest.raises(VFEError, match="not a number"):
        marginals(with_values(graph, [torch.tensor([0.0, float("nan")])]), [("a",)])
