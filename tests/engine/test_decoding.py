"""Modes and draws against the full joint table."""

import pytest
import torch
from engine.full_joint import FullJoint, elements, full_joint
from engine.graphs import GRAPHS, INF, graph_of, plated_graphs, values_of, with_values
from hypothesis import given, settings
from torch import Tensor

from pyro_vfe.engine import SAMPLE, FactorGraph, Table, decoding, mode, sample
from pyro_vfe.errors import ImpossibleDataError

close = torch.testing.assert_close
POSSIBLE = {name: graph for name, graph in GRAPHS.items() if full_joint(graph).log_normalizer > -INF}


def log_joint_at(joint: FullJoint, assignment: dict[str, Table]) -> Tensor:
    """The joint table read at assignments with draws along their first axis."""
    return joint.log_table[
        tuple(assignment[name].values[(slice(None), *(e for _, e in at))] for name, at in joint.copies)
    ]


def as_one_draw(assignment: dict[str, Table]) -> dict[str, Table]:
    return {name: Table(table.values[None], (SAMPLE, *table.axes)) for name, table in assignment.items()}


@pytest.mark.parametrize("name", POSSIBLE)
def test_the_mode_has_the_largest_entry_of_the_full_joint_table(name: str) -> None:
    joint = full_joint(POSSIBLE[name])
    close(log_joint_at(joint, as_one_draw(mode(POSSIBLE[name])))[0], joint.log_table.max())


@settings(max_examples=50, deadline=None)
@given(plated_graphs(zeros=False))
def test_the_mode_of_random_graphs_has_the_largest_entry(graph: FactorGraph) -> None:
    joint = full_joint(graph)
    found = mode(graph)
    close(log_joint_at(joint, as_one_draw(found)).reshape(()), joint.log_table.max())
    for name, table in found.items():
        assert table.axes == tuple(sorted(graph.variables[name].plates))
        assert table.values.dtype == torch.int64


def test_ties_are_broken_jointly() -> None:
    graph = graph_of({"a": (2, ""), "b": (2, "")}, [("ab", "", "")], {})
    found = mode(with_values(graph, [torch.tensor([[0.0, -INF], [-INF, 0.0]])]))
    assert found["a"].values == found["b"].values


@pytest.mark.parametrize("name", POSSIBLE)
def test_draws_have_the_probabilities_of_the_full_joint_table(name: str) -> None:
    torch.manual_seed(0)
    graph, n = POSSIBLE[name], 4000
    joint = full_joint(graph)
    draws = sample(graph, n)
    assert (log_joint_at(joint, draws) > -INF).all()
    for copy in joint.copies:
        variable, at = copy
        assert draws[variable].axes == (SAMPLE, *(plate for plate, _ in at))
        column = draws[variable].values[(slice(None), *(element for _, element in at))]
        frequency = torch.bincount(column, minlength=graph.variables[variable].size) / n
        probs = (joint.log_marginal([copy]) - joint.log_normalizer).exp()
        assert ((frequency - probs).abs() < 5 * (probs * (1 - probs) / n).sqrt() + 1e-9).all()


@pytest.mark.parametrize("name", ["loop", "mixture", "multiplicity", "crossing plates", "zeros in a chain"])
def test_draws_are_right_jointly(name: str) -> None:
    torch.manual_seed(0)
    joint = full_joint(POSSIBLE[name])
    log_probs = log_joint_at(joint, sample(POSSIBLE[name], 4000)) - joint.log_normalizer
    probs = (joint.log_table - joint.log_normalizer).exp()
    surprise = -(joint.log_table - joint.log_normalizer).masked_fill(probs == 0, 0.0)
    mean = (probs * surprise).sum()
    deviation = (probs * (surprise - mean) ** 2).sum().sqrt()
    assert (-log_probs.mean() - mean).abs() < 5 * deviation / 4000**0.5 + 1e-9


def test_elements_that_share_a_table_are_drawn_apart() -> None:
    draws = sample(graph_of({"b": (2, "i")}, [("b", "", "")], {"i": 50}), 10)["b"].values
    assert 0 < (draws[:, 1:] != draws[:, :1]).double().mean() < 1
    assert len(elements(frozenset("i"), {"i": 50})) == 50


def test_nothing_is_drawn_from_impossible_data() -> None:
    graph = GRAPHS["one variable"]
    impossible = with_values(graph, [torch.full_like(v, -INF) for v in values_of(graph)])
    for decide in (mode, lambda graph: sample(graph, 3)):
        with pytest.raises(ImpossibleDataError, match="'f0'"):
            decide(impossible)


def test_draws_are_made_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "CHUNK", 30)
    draws = sample(GRAPHS["mixture"], 7)
    assert draws["a"].values.shape == (7,)
    assert draws["b"].values.shape == (7, 4)
    assert sample(GRAPHS["mixture"], 0)["b"].values.shape == (0, 4)
