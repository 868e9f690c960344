"""The two written-out passes against the full joint table and against gradients, and where they must step aside."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from engine.full_joint import full_joint
from engine.graphs import GRAPHS, INF, graph_of, plated_graphs, values_of, with_values
from hypothesis import given, settings
from torch import Tensor

from pyro_vfe.engine import Factor, FactorGraph, Table, Variable, expected_tables, log_normalizer, marginals
from pyro_vfe.engine.inference import evidence, log_normalizer_and_marginals
from pyro_vfe.engine.propagation import _measured, propagate
from pyro_vfe.errors import CostError, ImpossibleDataError, VFEError

close = torch.testing.assert_close
PLATELESS = {
    name: graph for name, graph in GRAPHS.items() if not graph.plates and full_joint(graph).log_normalizer > -INF
}
NO_PLATES: frozenset[str] = frozenset()


def gradients(graph: FactorGraph) -> list[Tensor]:
    """What autograd makes of the elimination in logs."""
    values = [v.clone().requires_grad_() for v in values_of(graph)]
    return list(torch.autograd.grad(log_normalizer(with_values(graph, values)).total, values))


def all_scopes(graph: FactorGraph) -> list[tuple[str, ...]]:
    names = list(graph.variables)
    return [(), *((a,) for a in names), *((a, b) for a in names for b in names if a != b), tuple(names)]


def assert_equals_the_full_joint_table(graph: FactorGraph) -> None:
    joint = full_joint(graph)
    scopes = all_scopes(graph)
    found = propagate(graph, scopes)
    assert found is not None
    close(found.log_normalizer, joint.log_normalizer)
    for scope, probs in zip(scopes, found.probabilities, strict=True):
        expected = (joint.log_marginal([(name, ()) for name in scope]) - joint.log_normalizer).exp()
        close(probs, expected.reshape(-1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", PLATELESS)
def test_every_marginal_equals_the_full_joint_table(name: str) -> None:
    assert_equals_the_full_joint_table(PLATELESS[name])


def without_plates(graph: FactorGraph) -> FactorGraph:
    """The graph with its plates turned into variables."""
    free = {name: Variable(name, v.size, NO_PLATES) for name, v in graph.variables.items()}
    free |= {plate: Variable(plate, size, NO_PLATES) for plate, size in graph.plates.items()}
    return FactorGraph(tuple(Factor(f.name, f.table, NO_PLATES) for f in graph.factors), free, {})


@settings(max_examples=60, deadline=None)
@given(plated_graphs())
def test_random_graphs_equal_the_full_joint_table(graph: FactorGraph) -> None:
    free = without_plates(graph)
    if full_joint(free).log_normalizer == -INF:
        assert propagate(free, all_scopes(free)) is None
    else:
        assert_equals_the_full_joint_table(free)


@pytest.mark.parametrize("name", GRAPHS)
def test_the_evidence_is_the_log_normalizer_with_plates_and_without(name: str) -> None:
    close(evidence(GRAPHS[name]), full_joint(GRAPHS[name]).log_normalizer)


@pytest.mark.parametrize("name", PLATELESS)
def test_expected_tables_equal_the_gradients(name: str) -> None:
    graph = PLATELESS[name]
    assert propagate(graph, (), own_tables=True) is not None
    for found, expected in zip(expected_tables(graph), gradients(graph), strict=True):
        close(found, expected, rtol=1e-12, atol=1e-14)


def long_chain(length: int, spread: float, dtype: torch.dtype = torch.float64) -> FactorGraph:
    """A chain whose tables reach from one down to exp(-spread)."""
    generator = torch.Generator().manual_seed(1)
    names = [f"v{t}" for t in range(length)]
    factors = [
        Factor(f"f{t}", Table((-spread * torch.rand(3, 3, generator=generator)).to(dtype), (a, b)), NO_PLATES)
        for t, (a, b) in enumerate(pairwise(names))
    ]
    return FactorGraph(tuple(factors), {name: Variable(name, 3, NO_PLATES) for name in names}, {})


@pytest.mark.parametrize("spread", [10.0, 200.0])
def test_long_products_are_rescaled_before_they_underflow(spread: float) -> None:
    graph = long_chain(300, spread)
    found = propagate(graph, (), own_tables=True)
    assert found is not None
    close(found.log_normalizer, log_normalizer(graph).total, rtol=1e-13, atol=1e-11)
    for probs, expected in zip(found.probabilities, gradients(graph), strict=True):
        close(probs, expected.reshape(-1), rtol=1e-9, atol=1e-300)


def test_a_sum_that_grows_beyond_the_largest_number_is_rescaled() -> None:
    zeros = torch.zeros(1000, 2, dtype=torch.float64)
    names = [f"v{n}" for n in range(120)]
    factors = tuple(Factor(name, Table(zeros, (name, "hub")), NO_PLATES) for name in names)
    variables = {name: Variable(name, 1000, NO_PLATES) for name in names} | {"hub": Variable("hub", 2, NO_PLATES)}
    found = propagate(FactorGraph(factors, variables, {}), [("hub",), ("v0",)])
    assert found is not None
    close(float(found.log_normalizer), 120 * math.log(1000) + math.log(2))
    close(found.probabilities[0], torch.tensor([0.5, 0.5], dtype=torch.float64))
    close(found.probabilities[1], torch.full((1000,), 1e-3, dtype=torch.float64))


@pytest.mark.parametrize("first", [True, False])
def test_entries_far_below_a_peak_that_later_evidence_rules_out_are_not_lost(first: bool) -> None:
    ones, single = torch.zeros(1000, dtype=torch.float64), torch.full((1000,), -INF, dtype=torch.float64)
    logs = torch.stack([ones, single, single], 1)
    logs[0, 1:] = torch.tensor([-3 * math.log(10), 0.0])
    names = [f"v{n}" for n in range(140)]
    factors = [Factor(name, Table(logs, (name, "hub")), NO_PLATES) for name in names]
    evidence_on_hub = torch.tensor([-INF, 0.0, -600.0], dtype=torch.float64)
    factors.insert(0 if first else len(factors), Factor("e", Table(evidence_on_hub, ("hub",)), NO_PLATES))
    variables = {name: Variable(name, 1000, NO_PLATES) for name in names} | {"hub": Variable("hub", 3, NO_PLATES)}
    log_z, found = log_normalizer_and_marginals(FactorGraph(tuple(factors), variables, {}), [("hub",)])
    weights = torch.tensor([-INF, -420 * math.log(10), -600.0], dtype=torch.float64)
    close(log_z, weights.logsumexp(0))
    close(found["hub",].values, weights.softmax(0))


def test_a_measured_table_keeps_every_entry_or_is_refused() -> None:
    with pytest.raises(ArithmeticError):
        _measured(np.array([[[1e280, 1e-100]]]))
    assert _measured(np.array([[[1e100, 0.0, 1e-100]]])) == (1e100, pytest.approx(1e-200))


@pytest.mark.parametrize(
    "tables",
    [
        pytest.param([[0.0, -800.0], [-800.0, 0.0]], id="a product underflows although no table does"),
        pytest.param([[0.0, -1600.0], [0.0, 0.0]], id="a table underflows by itself"),
        pytest.param([[0.0, -600.0], [0.0, -600.0]], id="an entry of a product underflows"),
    ],
)
def test_tables_that_span_too_much_are_left_to_sums_in_logs(tables: list[list[float]]) -> None:
    graph = graph_of({"a": (2, "")}, [("a", "", ""), ("a", "", "")], {})
    graph = with_values(graph, [torch.tensor(t, dtype=torch.float64) for t in tables])
    assert propagate(graph, [("a",)]) is None
    log_z, found = log_normalizer_and_marginals(graph, [("a",)])
    close(log_z, full_joint(graph).log_normalizer)
    close(found["a",].values, (torch.tensor(tables).double().sum(0) - log_z).exp())


@pytest.mark.parametrize(
    "tables",
    [
        pytest.param(
            {"b": [-500.0, 0.0], "ba": [[-600.0, 0.0], [0.0, -660.0]], "a": [0.0, 0.0]}, id="a derivative underflows"
        ),
        pytest.param({"a": [-660.0, 0.0], "ba": [[0.0, -INF], [-600.0, -INF]]}, id="what remains is faint"),
    ],
)
def test_tables_whose_products_span_too_much_are_left_to_sums_in_logs(tables: dict[str, Any]) -> None:
    graph = of_tables(tables)
    assert propagate(graph, [("a",), ("b",)]) is None
    log_z, found = log_normalizer_and_marginals(graph, [("a",), ("b",)])
    joint = full_joint(graph)
    close(log_z, joint.log_normalizer)
    for name in "ab":
        close(found[name,].values, (joint.log_marginal([(name, ())]) - joint.log_normalizer).exp())


def test_a_product_that_is_zero_throughout_is_left_to_sums_in_logs() -> None:
    ones = [[-INF, 0.0], [-INF, -INF]]
    graph = of_tables({"ba": [[0.0, -600.0], [-INF, -600.0]], "b": [0.0, -660.0], "ab": ones})
    assert propagate(graph, [("a",), ("b",)]) is None
    with pytest.raises(ImpossibleDataError):
        log_normalizer_and_marginals(graph, [("a",), ("b",)])


def of_tables(tables: dict[str, Any]) -> FactorGraph:
    """A graph of two binary variables from log tables, each under the names of its axes."""
    factors = [Factor(axes, Table(torch.tensor(t).double(), tuple(axes)), NO_PLATES) for axes, t in tables.items()]
    return FactorGraph(tuple(factors), {name: Variable(name, 2, NO_PLATES) for name in "ab"}, {})


def test_impossible_values_cost_nothing_of_the_range() -> None:
    graph = graph_of(
        dict.fromkeys("abc", (3, "")), [("ab", "", ""), ("bc", "", ""), ("c", "", "")], {}, zeros=0.4, seed=5
    )
    assert propagate(graph, [("a",)]) is not None
    for probs, expected in zip(expected_tables(graph), gradients(graph), strict=True):
        close(probs, expected, rtol=1e-12, atol=0)
        assert ((probs == 0) == (expected == 0)).all()


def test_float32_tables_give_float32_results_that_were_computed_in_float64() -> None:
    single, double = long_chain(200, 30.0, torch.float32), long_chain(200, 30.0).to(torch.float32).to(torch.float64)
    scopes = [(name,) for name in single.variables]
    log_z, found = log_normalizer_and_marginals(single, scopes)
    exact_log_z, exact = log_normalizer_and_marginals(double, scopes)
    assert log_z.dtype == torch.float32
    close(log_z, exact_log_z.float())
    for scope in scopes:
        close(found[scope].values, exact[scope].values.float())


@pytest.mark.parametrize("name", ["mixture", "crossing plates", "a variable nobody mentions"])
def test_plates_are_left_to_gradients(name: str) -> None:
    assert propagate(GRAPHS[name], [("a",)]) is None


def test_scales_are_left_to_gradients() -> None:
    graph = PLATELESS["chain"]
    scaled = FactorGraph(
        tuple(Factor(f.name, f.table, f.plates, 2.0) for f in graph.factors),
        {name: Variable(name, v.size, v.plates, 2.0) for name, v in graph.variables.items()},
        {},
    )
    assert propagate(scaled, [("a",)]) is None


def test_an_uncoupled_variable_is_uniform() -> None:
    graph = graph_of({"a": (3, ""), "b": (4, "")}, [("a", "", "")], {})
    found = log_normalizer_and_marginals(graph, [("b",), ("a", "b")])[1]
    close(found["b",].values, torch.full((4,), 0.25, dtype=torch.float64))
    assert len(expected_tables(graph)) == 1
    assert_equals_the_full_joint_table(graph)


def test_a_graph_without_factors_has_the_value_one() -> None:
    assert marginals(FactorGraph((), {}, {}), []) == {}


def test_results_are_detached_and_the_callers_tables_are_left_alone() -> None:
    graph = PLATELESS["loop"]
    values = [v.clone().requires_grad_() for v in values_of(graph)]
    before = [v.detach().clone() for v in values]
    log_z, found = log_normalizer_and_marginals(with_values(graph, values), [("a",)])
    assert not log_z.requires_grad and not found["a",].values.requires_grad
    for value, old in zip(values, before, strict=True):
        assert value.grad is None
        close(value.detach(), old, rtol=0, atol=0)


def test_one_table_may_stand_for_several_factors_and_be_a_view() -> None:
    table = Table(torch.randn(3, 3, dtype=torch.float64).t(), ("a", "b"))
    expanded = Table(torch.randn(3, 1, dtype=torch.float64).expand(3, 3), ("b", "a"))
    sizes = {name: Variable(name, 3, NO_PLATES) for name in "ab"}
    factors = (Factor("f", table, NO_PLATES), Factor("g", table, NO_PLATES), Factor("h", expanded, NO_PLATES))
    assert_equals_the_full_joint_table(FactorGraph(factors, sizes, {}))


@pytest.mark.parametrize("bad", [float("nan"), INF])
def test_what_is_not_a_number_is_refused(bad: float) -> None:
    graph = graph_of({"a": (2, "")}, [("a", "", "")], {})
    with pytest.raises(VFEError, match="not a number"):
        marginals(with_values(graph, [torch.tensor([0.0, bad])]), [("a",)])


def test_impossible_data_are_an_error() -> None:
    graph = graph_of({"a": (2, "")}, [("a", "", ""), ("a", "", "")], {})
    impossible = with_values(graph, [torch.tensor([0.0, -INF]), torch.tensor([-INF, 0.0])])
    assert evidence(impossible) == -INF
    with pytest.raises(ImpossibleDataError, match="jointly"):
        log_normalizer_and_marginals(impossible, [("a",)])


def test_what_does_not_fit_is_refused_before_it_is_made() -> None:
    assert propagate(PLATELESS["grid"], [("a",)], max_bytes=8) is None
    with pytest.raises(CostError):
        marginals(PLATELESS["grid"], [("a",)], max_bytes=8)


def test_a_table_of_the_wrong_size_is_refused() -> None:
    graph = PLATELESS["chain"]
    wrong = [v[:2] if n == 0 else v for n, v in enumerate(values_of(graph))]
    with pytest.raises(VFEError, match="size 2"):
        marginals(with_values(graph, wrong), [("a",)])
