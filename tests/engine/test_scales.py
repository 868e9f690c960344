"""Weighted data: every sum against explicit loops over elements."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from engine.graphs import GRAPHS, INF, graph_of, values_of, with_values
from torch import Tensor

from pyro_vfe.engine import FactorGraph, Scale, Table, expected_tables, log_normalizer, marginals, mode, sample
from pyro_vfe.errors import VFEError

close = torch.testing.assert_close
MIXTURE = graph_of(
    {"a": (2, ""), "b": (3, "i")}, [("a", "", ""), ("ab", "i", ""), ("b", "", ""), ("", "i", "")], {"i": 4}
)
WEIGHTS = Table(torch.tensor([2.0, 0.5, 0.0, 3.0], dtype=torch.float64), ("i",))


def scaled(graph: FactorGraph, scale: Scale, other: Scale | None = None) -> FactorGraph:
    """The graph with a scale on all that is inside plate i; `other`, an equal one, goes to the variables."""
    factors = tuple(replace(f, scale=scale) if "i" in f.plates else f for f in graph.factors)
    variables = {n: replace(v, scale=other or scale) if "i" in v.plates else v for n, v in graph.variables.items()}
    return replace(graph, factors=factors, variables=variables)


def weighted_log_joint(weights: Tensor) -> Tensor:
    """log p(a) + sum_i weight_i log sum_b exp(...), by loops."""
    prior, pair, local, data = values_of(MIXTURE)
    terms = [weights[i] * ((pair[i] + local).logsumexp(1) + data[i]) for i in range(4)]
    return prior + torch.stack(terms).sum(0)


@pytest.mark.parametrize("weights", [2.5, 0.0, WEIGHTS], ids=["float", "zero", "table"])
def test_a_scale_multiplies_the_log_of_the_inner_sum(weights: Scale) -> None:
    expected = weights.values if isinstance(weights, Table) else torch.full((4,), weights, dtype=torch.float64)
    close(log_normalizer(scaled(MIXTURE, weights)).total, weighted_log_joint(expected).logsumexp(0))


def test_equal_scales_that_are_different_objects_are_the_same_scale() -> None:
    copy = Table(WEIGHTS.values.clone(), ("i",))
    close(log_normalizer(scaled(MIXTURE, WEIGHTS, copy)).total, weighted_log_joint(WEIGHTS.values).logsumexp(0))


def test_a_factor_of_another_scale_enters_with_the_ratio() -> None:
    graph = graph_of({"b": (3, "i")}, [("b", "i", ""), ("b", "", "")], {"i": 2})
    first, second = values_of(graph)
    weights = Table(torch.tensor([2.0, 4.0], dtype=torch.float64), ("i",))
    factors = (replace(graph.factors[0], scale=weights), replace(graph.factors[1], scale=3.0))
    graph = replace(graph, factors=factors, variables={"b": replace(graph.variables["b"], scale=weights)})
    expected = sum(c * (first[i] + 3 / c * second).logsumexp(0) for i, c in enumerate((2.0, 4.0)))
    close(log_normalizer(graph).total, expected)


@pytest.mark.parametrize("max_bytes", [None, 8000], ids=["whole", "cut"])
def test_weights_may_be_all_that_tells_the_elements_of_a_plate_apart(max_bytes: float | None) -> None:
    names = "abcd"
    graph = graph_of(dict.fromkeys(names, (6, "i")), [(a + b, "", "") for a, b in combinations(names, 2)], {"i": 3})
    weights = Table(torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64), ("i",))
    factors = tuple(replace(factor, plates=frozenset("i")) for factor in graph.factors)
    variables = {name: replace(variable, scale=weights) for name, variable in graph.variables.items()}
    graph = replace(graph, factors=factors, variables=variables)
    exponent = torch.stack([f.table.aligned(names).expand(6, 6, 6, 6) for f in factors]).sum(0)
    expected = sum(c * (exponent / c).flatten().logsumexp(0) for c in weights.values)
    close(log_normalizer(graph, max_bytes=max_bytes).total, expected)
    best = torch.stack(torch.unravel_index(exponent.argmax(), exponent.shape))
    found = mode(graph)
    close(torch.stack([found[name].values for name in names]), best[:, None].expand(4, 3))


def test_kept_plates_carry_their_weights() -> None:
    graph = graph_of({"b": (3, "i")}, [("b", "i", "")], {"i": 4})
    (values,) = values_of(graph)
    found = log_normalizer(scaled(graph, WEIGHTS), keep_plates=frozenset("i"))
    close(found.inside.values, WEIGHTS.values * values.logsumexp(1))


def test_marginals_under_weights_condition_on_weighted_evidence() -> None:
    found = marginals(scaled(MIXTURE, WEIGHTS), [("a",), ("b",), ("a", "b")])
    probs = weighted_log_joint(WEIGHTS.values).softmax(0)
    _, pair, local, _ = values_of(MIXTURE)
    conditional = (pair + local).softmax(-1)
    close(found["a",].values, probs)
    close(found["a", "b"].values, probs[:, None] * conditional)
    close(found["b",].values, (probs[:, None] * conditional).sum(1))


def test_expected_tables_carry_the_weights() -> None:
    graph = scaled(MIXTURE, WEIGHTS)
    close(expected_tables(graph)[1].sum((1, 2)), WEIGHTS.values)


def test_an_element_of_weight_zero_may_be_impossible() -> None:
    values = [v.clone() for v in values_of(MIXTURE)]
    values[3][2] = -INF
    values[1][2] = -INF
    values[1].requires_grad_()
    found = log_normalizer(scaled(with_values(MIXTURE, values), WEIGHTS)).total
    close(found, weighted_log_joint(WEIGHTS.values).logsumexp(0))
    assert torch.autograd.grad(found, values[1])[0].isfinite().all()


def test_different_scales_that_meet_in_one_sum_are_refused_by_name() -> None:
    graph = GRAPHS["chain"]
    variables = dict(graph.variables) | {"b": replace(graph.variables["b"], scale=2.0)}
    with pytest.raises(VFEError, match=r"'a' and 'b' .* scales 1 and 2.*one poutine.scale"):
        log_normalizer(replace(graph, variables=variables))


def test_a_scale_of_zero_on_a_latent_alone_is_refused() -> None:
    graph = graph_of({"b": (3, "i")}, [("b", "i", "")], {"i": 4})
    with pytest.raises(VFEError, match="scale 0"):
        log_normalizer(replace(graph, variables={"b": replace(graph.variables["b"], scale=WEIGHTS)}))


def crossing(weights: list[float]) -> FactorGraph:
    graph = graph_of(
        {"a": (2, "i"), "b": (2, "j")}, [("a", "i", ""), ("b", "j", ""), ("ab", "ij", "")], {"i": 2, "j": 3}
    )
    scale = Table(torch.tensor(weights, dtype=torch.float64), ("i",))
    factors = tuple(replace(f, scale=scale if "i" in f.plates else 2.0) for f in graph.factors)
    variables = {"a": replace(graph.variables["a"], scale=scale), "b": replace(graph.variables["b"], scale=2.0)}
    return replace(graph, factors=factors, variables=variables)


def test_weights_survive_writing_a_plate_out() -> None:
    graph = crossing([2.0, 2.0])
    plain = replace(graph, factors=tuple(replace(f, scale=1.0) for f in graph.factors))
    plain = replace(plain, variables={name: replace(v, scale=1.0) for name, v in graph.variables.items()})
    close(log_normalizer(graph).total, 2 * log_normalizer(plain).total)


def test_elements_of_different_weights_cannot_be_tied_by_a_crossing_plate() -> None:
    with pytest.raises(VFEError, match=r"'a' and 'b'.*one poutine.scale"):
        log_normalizer(crossing([2.0, 3.0]))


def test_mode_and_samples_follow_the_weights() -> None:
    graph = scaled(MIXTURE, WEIGHTS)
    prior, pair, local, data = values_of(MIXTURE)
    score = prior + torch.stack([WEIGHTS.values[i] * ((pair[i] + local).amax(1) + data[i]) for i in range(4)]).sum(0)
    assert mode(graph)["a"].values == score.argmax()
    frequency = sample(graph, 20_000)["a"].values.double().mean()
    close(frequency, weighted_log_joint(WEIGHTS.values).softmax(0)[1], atol=0.02, rtol=0)
