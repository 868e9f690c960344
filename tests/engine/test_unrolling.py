"""Plates written out, against the same graph with its plates."""

import pytest
import torch
from engine.full_joint import full_joint
from engine.graphs import GRAPHS, graph_of, values_of

from pyro_vfe.engine import Table, apply_unrolling, log_normalizer, marginals, unroll
from pyro_vfe.engine.unrolling import stitch

close = torch.testing.assert_close
PLATED = {name: graph for name, graph in GRAPHS.items() if "i" in graph.plates}


@pytest.mark.parametrize("name", PLATED)
def test_a_plate_written_out_leaves_the_sum_as_it_was(name: str) -> None:
    graph, _ = unroll(PLATED[name], "i")
    close(log_normalizer(graph).total, full_joint(PLATED[name]).log_normalizer)


def test_only_variables_tied_inside_the_plate_are_copied() -> None:
    graph = graph_of(
        {"a": (2, "i"), "b": (2, "i"), "c": (2, "i"), "z": (2, "")}, [("abz", "i", ""), ("cz", "i", "")], {"i": 2}
    )
    unrolled, unrolling = unroll(graph, "i", ["a"])
    assert unrolling.variables == ("a", "b")
    assert set(unrolled.variables) == {"a[i=0]", "a[i=1]", "b[i=0]", "b[i=1]", "c", "z"}
    assert [factor.name for factor in unrolled.factors] == ["f0[i=0]", "f0[i=1]", "f1"]
    close(log_normalizer(unrolled).total, log_normalizer(graph).total)


def test_another_graph_is_written_out_the_same_way() -> None:
    model, unrolling = unroll(GRAPHS["crossing plates"], "j", ["b"])
    guide = graph_of({"b": (2, "j"), "q": (2, "j")}, [("b", "j", ""), ("q", "", "")], {"i": 3, "j": 2})
    copied = apply_unrolling(guide, unrolling)
    assert {name for name in copied.variables if name.startswith("b")} <= model.variables.keys()
    assert "q" in copied.variables
    close(copied.factors[1].table.values, values_of(guide)[0][1])


def test_copies_are_stitched_back_along_their_plate() -> None:
    graph = GRAPHS["crossing plates"]
    unrolled, unrolling = unroll(graph, "i", ["a"])
    assert unrolling.variables == ("a", "c")
    found = marginals(unrolled, [(name,) for name in unrolled.variables])
    stitched = stitch({name: Table(t.values, (*t.axes[:-1], "value")) for (name,), t in found.items()}, [unrolling])
    for (name,), expected in marginals(graph, [(name,) for name in graph.variables]).items():
        close(stitched[name].aligned((*expected.axes[:-1], "value")), expected.values)
