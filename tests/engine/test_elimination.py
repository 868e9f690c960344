"""Sums against the full joint table."""

from math import log

import pytest
import torch
from engine.full_joint import copy_of, elements, full_joint
from engine.graphs import GRAPHS, INF, graph_of, plated_graphs, values_of, with_values
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyro_vfe.engine import FactorGraph, eliminate, log_normalizer
from pyro_vfe.errors import PlateError

close = torch.testing.assert_close


def total(graph: FactorGraph) -> Tensor:
    return log_normalizer(graph).total


@pytest.mark.parametrize("name", GRAPHS)
def test_log_normalizer_equals_the_full_joint_table(name: str) -> None:
    close(total(GRAPHS[name]), full_joint(GRAPHS[name]).log_normalizer)


@settings(max_examples=80, deadline=None)
@given(plated_graphs())
def test_log_normalizer_equals_the_full_joint_table_of_random_graphs(graph: FactorGraph) -> None:
    close(total(graph), full_joint(graph).log_normalizer)


@pytest.mark.parametrize("name", GRAPHS)
def test_gradients_equal_those_of_the_full_joint_table(name: str) -> None:
    graph = GRAPHS[name]
    values = [v.clone().requires_grad_() for v in values_of(graph)]
    found = torch.autograd.grad(total(with_values(graph, values)), values, materialize_grads=True, allow_unused=True)
    expected = torch.autograd.grad(full_joint(with_values(graph, values)).log_normalizer, values, allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        close(one, other.nan_to_num())


@pytest.mark.parametrize("name", ["chain", "grid", "nested plates", "crossing plates", "multiplicity"])
def test_second_derivatives_are_right(name: str) -> None:
    graph = GRAPHS[name]
    values = [v.clone().requires_grad_() for v in values_of(graph)]
    assert torch.autograd.gradgradcheck(lambda *tables: total(with_values(graph, list(tables))), values)


@pytest.mark.parametrize(
    "name", ["chain", "loop", "mixture", "nested plates", "crossing plates under a global", "zeros in a plate"]
)
def test_every_variable_can_be_kept(name: str) -> None:
    graph = GRAPHS[name]
    for kept in graph.variables:
        left = eliminate(graph, keep=frozenset([kept]))
        remaining = FactorGraph(
            left.factors, {n: v for n, v in left.graph.variables.items() if n.split("[")[0] == kept}, graph.plates
        )
        close(total(remaining), full_joint(graph).log_normalizer)
        if not left.unrollings:
            joint, reduced = full_joint(graph), full_joint(remaining)
            close(reduced.log_table, joint.log_marginal(reduced.copies))


def test_factors_that_no_summed_variable_touches_come_back_as_they_were() -> None:
    graph = GRAPHS["mixture"]
    left = eliminate(graph, keep=frozenset("a"))
    assert graph.factors[0] in left.factors


def test_a_kept_variable_in_a_plate_is_written_out_when_a_summed_one_ties_its_copies() -> None:
    graph = GRAPHS["mixture"]
    left = eliminate(graph, keep=frozenset("b"))
    assert [(u.plate, u.variables) for u in left.unrollings] == [("i", ("b",))]
    assert {a for f in left.factors for a in f.table.axes} == {f"b[i={n}]" for n in range(4)}


def test_kept_plates_report_each_element() -> None:
    graph = graph_of(
        {"a": (2, ""), "b": (3, "i"), "c": (2, "ij")},
        [("a", "", ""), ("b", "i", ""), ("bc", "ij", ""), ("", "i", "")],
        {"i": 3, "j": 2},
    )
    found = log_normalizer(graph, keep_plates=frozenset("i"))
    close(found.total, full_joint(graph).log_normalizer)
    close(found.outside, graph.factors[0].table.values.logsumexp(0))
    for n in range(3):
        alone = [f for f in graph.factors if "i" in f.plates]
        one = with_values(
            graph,
            [v[n : n + 1] if "i" in f.table.axes else v for v, f in zip(values_of(graph), graph.factors, strict=True)],
        )
        single = FactorGraph(
            tuple(f for f, g in zip(one.factors, graph.factors, strict=True) if g in alone),
            {k: graph.variables[k] for k in "bc"},
            {"i": 1, "j": 2},
        )
        close(found.inside.values[n], full_joint(single).log_normalizer)


def test_a_plate_whose_axis_no_table_has_is_kept_at_its_full_size() -> None:
    found = log_normalizer(graph_of({"b": (3, "i")}, [("b", "", "")], {"i": 4}), keep_plates=frozenset("i"))
    assert found.inside.values.shape == (4,)


def test_a_variable_that_ties_the_elements_of_a_kept_plate_is_named() -> None:
    with pytest.raises(PlateError, match=r"Site 'a' is outside plate 'i' and tied to factors inside it"):
        log_normalizer(GRAPHS["mixture"], keep_plates=frozenset("i"))


def test_only_what_is_tied_to_a_crossing_plate_is_written_out() -> None:
    left = eliminate(GRAPHS["crossing plates under a global"])
    assert [(u.plate, u.variables) for u in left.unrollings] == [("j", ("b",))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_underflowing_matrix_product_is_summed_with_care(dtype: torch.dtype) -> None:
    graph = graph_of({"a": (2, ""), "b": (2, ""), "c": (2, "")}, [("ba", "", ""), ("ac", "", "")], {})
    left = torch.tensor([[0.0, -800.0], [-3.0, -1.0]], dtype=dtype).requires_grad_()
    right = torch.tensor([[-800.0, 0.0], [0.0, -INF]], dtype=dtype).requires_grad_()
    (found,) = eliminate(with_values(graph, [left, right]), keep=frozenset("bc")).factors
    expected = (left[:, :, None] + right).logsumexp(1)
    close(found.table.aligned("bc"), expected)
    gradients = [torch.autograd.grad(table[0, 0], [left, right]) for table in (found.table.aligned("bc"), expected)]
    close(*gradients, rtol=1e-4, atol=1e-4)
    close(found.table.aligned("bc")[0, 0], torch.tensor(-800 + log(2), dtype=dtype))


def test_impossible_data_have_log_normalizer_minus_infinity_and_no_gradient() -> None:
    graph = GRAPHS["chain"]
    values = [
        torch.full_like(v, -INF).requires_grad_() if n == 2 else v.clone().requires_grad_()
        for n, v in enumerate(values_of(graph))
    ]
    found = total(with_values(graph, values))
    assert found == -INF
    assert all((g == 0).all() for g in torch.autograd.grad(found, values))


def test_elements_of_the_oracle_are_the_products_of_plates() -> None:
    graph = GRAPHS["nested plates"]
    assert len(elements(frozenset("ij"), dict(graph.plates))) == 6
    assert copy_of(graph, "b", {"i": 1, "j": 0}) == ("b", (("i", 1),))


@settings(max_examples=50, deadline=None)
@given(plated_graphs(), st.data())
def test_whatever_is_kept_the_rest_of_the_sum_is_right(graph: FactorGraph, data: st.DataObject) -> None:
    kept = data.draw(st.sets(st.sampled_from(sorted(graph.variables))) if graph.variables else st.just(set()))
    left = eliminate(graph, keep=frozenset(kept))
    copies = {name: v for name, v in left.graph.variables.items() if name.split("[")[0] in kept}
    close(total(FactorGraph(left.factors, copies, graph.plates)), full_joint(graph).log_normalizer)


@settings(max_examples=50, deadline=None)
@given(plated_graphs(), st.sampled_from(["i", "j", "ij"]))
def test_kept_plates_add_up_or_name_what_ties_them(graph: FactorGraph, kept: str) -> None:
    assume(set(kept) <= graph.plates.keys())
    try:
        found = log_normalizer(graph, keep_plates=frozenset(kept))
    except PlateError as error:
        assert any(f"Site '{name}" in str(error) for name in graph.variables)
        return
    assert found.inside.values.shape == tuple(graph.plates[plate] for plate in kept)
    close(found.total, full_joint(graph).log_normalizer)
