"""Plans and their cost, and the large graphs that only a good plan can do."""

import time
from itertools import pairwise

import pytest
import torch
from engine.graphs import GRAPHS, graph_of
from torch import Tensor

from pyro_vfe.engine import (
    Factor,
    FactorGraph,
    FactorShape,
    Structure,
    Table,
    Variable,
    VariableShape,
    cost,
    eliminate,
    log_normalizer,
    mode,
    plan,
    plan_of,
    structure,
)
from pyro_vfe.errors import CostError, VFEError

close = torch.testing.assert_close
NOWHERE: frozenset[str] = frozenset()


def hidden_markov_structure(steps: int, size: int) -> Structure:
    names = [f"z_{t}" for t in range(steps)]
    transitions = [FactorShape(b, (a, b), NOWHERE) for a, b in pairwise(names)]
    emissions = [FactorShape(f"x_{t}", (name,), NOWHERE) for t, name in enumerate(names)]
    variables = tuple(VariableShape(name, size, NOWHERE) for name in names)
    return Structure((FactorShape("z_0", ("z_0",), NOWHERE), *transitions, *emissions), variables, ())


def ising_grid(rows: int, coupling: Tensor, field: Tensor) -> FactorGraph:
    names = [[f"s_{r}_{c}" for c in range(rows)] for r in range(rows)]
    pair = Table(coupling, ("left", "right"))
    neighbours = [(names[r][c], names[r][c + 1]) for r in range(rows) for c in range(rows - 1)]
    neighbours += [(names[r][c], names[r + 1][c]) for r in range(rows - 1) for c in range(rows)]
    factors = [Factor(f"{a} {b}", Table(pair.values, (a, b)), NOWHERE) for a, b in neighbours]
    factors += [Factor(name, Table(field, (name,)), NOWHERE) for row in names for name in row]
    return FactorGraph(tuple(factors), {name: Variable(name, 2, NOWHERE) for row in names for name in row}, {})


def transfer_matrix(rows: int, coupling: Tensor, field: Tensor) -> Tensor:
    """The log normaliser of a square grid, one whole row of spins at a time."""
    spins = (torch.arange(2**rows)[:, None] >> torch.arange(rows)) & 1
    within = coupling[spins[:, :-1], spins[:, 1:]].sum(1) + field[spins].sum(1)
    between = coupling[spins[:, None], spins[None]].sum(-1)
    message = within
    for _ in range(rows - 1):
        message = (message[:, None] + between).logsumexp(0) + within
    return message.logsumexp(0)


def test_a_long_chain_is_planned_in_quadratic_steps() -> None:
    start = time.perf_counter()
    found = plan(hidden_markov_structure(1000, 32))
    assert time.perf_counter() - start < 5
    assert max(step.flops for step in found.steps) == 32**2
    assert found.flops <= 1000 * (32**2 + 3 * 32)
    assert found.largest.entries == 32


def test_a_plan_prints_as_a_table() -> None:
    lines = str(plan(hidden_markov_structure(3, 2))).splitlines()
    assert lines[0].split() == ["sum", "over", "leaves", "flops", "bytes"]
    assert lines[-1].split()[0] == "total"
    assert len({len(line) for line in lines}) == 1


def test_a_plan_is_found_once_per_structure() -> None:
    assert plan_of(GRAPHS["grid"]) is plan_of(GRAPHS["grid"])


def test_a_large_grid_agrees_with_its_transfer_matrix() -> None:
    coupling = torch.tensor([[0.4, -0.4], [-0.3, 0.5]], dtype=torch.float64)
    field = torch.tensor([0.1, -0.2], dtype=torch.float64)
    close(log_normalizer(ising_grid(10, coupling, field)).total, transfer_matrix(10, coupling, field))


def test_a_large_grid_is_planned_near_its_treewidth() -> None:
    graph = ising_grid(10, torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    assert plan_of(graph).largest.entries <= 2**13
    assert plan_of(graph).flops <= 100 * 2**11


def test_a_star_is_planned_in_linear_time() -> None:
    leaves = {f"b_{n}": (3, "") for n in range(300)}
    variables = {"a": Variable("a", 4, NOWHERE)} | {n: Variable(n, 3, NOWHERE) for n in leaves}
    factors = tuple(Factor(n, Table(torch.zeros(4, 3, dtype=torch.float64), ("a", n)), NOWHERE) for n in leaves)
    graph = FactorGraph(factors, variables, {})
    assert plan_of(graph).flops < 300 * 20
    close(
        log_normalizer(graph).total,
        torch.tensor(300 * 3.0).double() * 0
        + 300 * torch.tensor(3.0).double().log()
        + torch.tensor(4.0).double().log(),
    )


def clique(size: int, states: int) -> FactorGraph:
    names = [f"v_{n}" for n in range(size)]
    pairs = [(a, b) for n, a in enumerate(names) for b in names[:n]]
    zeros = torch.zeros(states, states, dtype=torch.float64)
    factors = tuple(Factor(f"{a}{b}", Table(zeros, (a, b)), NOWHERE) for a, b in pairs)
    return FactorGraph(factors, {n: Variable(n, states, NOWHERE) for n in names}, {})


@pytest.mark.parametrize("decide", [eliminate, log_normalizer, mode])
def test_a_clique_of_forty_raises_before_anything_is_allocated(decide: type[object]) -> None:
    with pytest.raises(
        CostError, match=r"largest table is over 'v_.* PiB.* Let the guide draw one of these sites|largest table"
    ):
        decide(clique(40, 3))


def test_the_limit_is_the_callers() -> None:
    close(log_normalizer(clique(10, 2)).total, torch.tensor(2.0**10).double().log())
    with pytest.raises(CostError, match=r"limit of 100.0 bytes"):
        log_normalizer(clique(10, 2), max_bytes=100)


def test_the_default_limit_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "default_limit", lambda device: 1.0)
    with pytest.raises(CostError, match=r"limit of 1.0 bytes"):
        log_normalizer(clique(30, 2))


def test_a_crossing_plate_too_large_to_write_out_names_its_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structure, "MAX_COPIES", 3)
    graph = graph_of({"a": (2, "i"), "b": (2, "j")}, [("ab", "ij", "")], {"i": 6, "j": 5})
    with pytest.raises(CostError, match=r"\['b'\] .* plate 'j'.* 5 elements"):
        log_normalizer(graph)


def test_an_inconsistent_graph_is_refused() -> None:
    graph = graph_of({"a": (2, "i")}, [("a", "i", "")], {"i": 3})
    wrong = FactorGraph(graph.factors, {"a": Variable("a", 3, frozenset("i"))}, {"i": 3})
    with pytest.raises(VFEError, match="size 2 along 'a'"):
        log_normalizer(wrong)
    outside = FactorGraph((Factor("f", graph.factors[0].table, NOWHERE),), graph.variables, {"i": 3})
    with pytest.raises(VFEError, match=r"'f' lies outside the plates \['i'\]"):
        log_normalizer(outside)
    with pytest.raises(VFEError, match="cannot be aligned"):
        graph.factors[0].table.aligned(("i",))
