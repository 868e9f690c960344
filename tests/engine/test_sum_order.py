"""Weights and the order of sums: either every order that the plates allow gives one number, or there is none."""

from dataclasses import replace

import pytest
import torch
from engine.graphs import graph_of, plated_graphs
from engine.nested_sums import allowed_orders, value_in_order
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_vfe.engine import FactorGraph, Scale, Subsample, Table, eliminate, log_normalizer, mode, sample
from pyro_vfe.errors import ScaleError

LOCAL, MOST_COPIES = frozenset("i"), 9


@st.composite
def weighted_graphs(draw: st.DrawFn) -> FactorGraph:
    graph = draw(plated_graphs(zeros=False))
    weights = st.sampled_from([1.0, 1.0, 2.0, 0.5])

    def scale(plates: frozenset[str]) -> Scale:
        if plates and draw(st.integers(0, 5)) == 0:
            plate = draw(st.sampled_from(sorted(plates)))
            return Table(torch.tensor([draw(weights) for _ in range(graph.plates[plate])]), (plate,))
        return draw(weights)

    factors = tuple(replace(factor, scale=scale(factor.plates)) for factor in graph.factors)
    variables = {name: replace(v, scale=scale(v.plates)) for name, v in graph.variables.items()}
    return replace(graph, factors=factors, variables=variables)


@given(weighted_graphs())
@settings(max_examples=60, deadline=None)
def test_a_weighted_sum_has_the_value_of_every_order_that_the_plates_allow_or_is_refused(graph: FactorGraph) -> None:
    orders = allowed_orders(graph, 6, seed=0)
    if len(orders[0]) > MOST_COPIES:
        return
    try:
        found = float(log_normalizer(graph).total)
    except ScaleError:
        return
    for order in orders:
        assert value_in_order(graph, order) == pytest.approx(found, rel=1e-9, abs=1e-9)


def crossing(sizes: dict[str, int], a: float, b: float) -> FactorGraph:
    """Two plates that cross, a variable in each, and data in both."""
    graph = graph_of({"a": (2, "i"), "b": (2, "j")}, [("a", "i", ""), ("b", "j", ""), ("ab", "ij", "")], sizes)
    scales = {"a": a, "b": b}
    variables = {name: replace(v, scale=scales[name]) for name, v in graph.variables.items()}
    return replace(graph, variables=variables)


@pytest.mark.parametrize("sizes", [{"i": 2, "j": 1}, {"i": 2, "j": 2}, {"i": 2, "j": 3}])
def test_sums_in_crossing_plates_have_no_order_if_their_weights_differ(sizes: dict[str, int]) -> None:
    graph = crossing(sizes, 2.0, 1.0)
    values = {round(value_in_order(graph, order), 6) for order in allowed_orders(graph, 8, seed=1)}
    assert len(values) > 1
    for wanted in (log_normalizer, mode, lambda part: sample(part, 1)):
        with pytest.raises(
            ScaleError, match=r"'a' and 'b' .* scales 2 and 1.*which is summed first.*one poutine.scale"
        ):
            wanted(graph)
    alike = crossing(sizes, 2.0, 2.0)
    expected = value_in_order(alike, allowed_orders(alike, 1, seed=1)[0])
    assert float(log_normalizer(alike).total) == pytest.approx(expected, rel=1e-12)


def test_a_sum_that_comes_after_both_holds_them_apart() -> None:
    graph = graph_of(
        {"z": (2, ""), "a": (2, "i"), "b": (2, "j")},
        [("za", "i", ""), ("zb", "j", ""), ("z", "", "")],
        {"i": 2, "j": 2},
    )
    scales = {"z": 1.0, "a": 2.0, "b": 0.5}
    graph = replace(graph, variables={name: replace(v, scale=scales[name]) for name, v in graph.variables.items()})
    for order in allowed_orders(graph, 4, seed=2):
        assert value_in_order(graph, order) == pytest.approx(float(log_normalizer(graph).total), rel=1e-12)


def test_what_is_kept_holds_sums_apart_that_have_no_order() -> None:
    graph = graph_of({"a": (2, "i"), "b": (2, ""), "c": (2, "j")}, [("ab", "", ""), ("bc", "", "")], {"i": 2, "j": 2})
    scales = {"a": 2.0, "b": 1.0, "c": 0.5}
    graph = replace(graph, variables={name: replace(v, scale=scales[name]) for name, v in graph.variables.items()})
    left = eliminate(graph, keep=frozenset("b")).factors
    found = sum(factor.table.values for factor in left)
    a, c = (table.values for table in graph.tables)
    expected = 2 * 2 * (a / 2).logsumexp(0) + 2 * 0.5 * (c / 0.5).logsumexp(1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("plates", ["i", "ij"])
def test_a_table_that_lacks_a_plate_of_its_weights_gets_it_before_the_plan(plates: str) -> None:
    graph = graph_of(
        {"a": (2, ""), "w": (2, plates), "x": (2, "i")},
        [("aw", plates[1:], ""), ("wx", plates[1:], "")],
        {"i": 2, "j": 1},
    )
    scale = Table(torch.tensor([1.0, 2.0]), ("i",))
    variables = {name: replace(v, scale=scale) if name != "a" else v for name, v in graph.variables.items()}
    graph = replace(graph, variables=variables)
    (order,) = allowed_orders(graph, 1, seed=0)
    assert float(log_normalizer(graph).total) == pytest.approx(value_in_order(graph, order), rel=1e-12)


def test_a_variable_is_not_summed_above_a_subsample_but_inside_of_it_and_without_one() -> None:
    graph = graph_of({"a": (2, ""), "z": (2, "i")}, [("a", "", ""), ("az", "i", ""), ("z", "i", "")], {"i": 2})
    inside = frozenset([Subsample("i", 2, 6)])
    names = {"f1": inside, "f2": inside, "z": inside}
    with pytest.raises(ScaleError, match="'a' is summed out above plate 'i', which shows 2 of its 6 elements"):
        log_normalizer(replace(graph, subsampled=names))
    eliminate(replace(graph, subsampled=names), keep=frozenset("a"))
    log_normalizer(replace(graph, subsampled=names, normalized=True))
