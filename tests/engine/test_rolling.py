"""Loops as chains against the same loops summed variable by variable."""

from collections.abc import Iterator

import pytest
import torch
from engine.full_joint import full_joint
from torch import Tensor

from pyro_vfe.engine import Factor, FactorGraph, Table, Variable, log_normalizer, repeats
from pyro_vfe.engine.repeats import find_loop
from pyro_vfe.engine.rolling import rolled
from pyro_vfe.engine.unrolling import structure_of

close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def short_loops_count(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(repeats, "FEWEST_STEPS", 3)
    find_loop.cache_clear()
    yield
    find_loop.cache_clear()


def table(seed: int, sizes: dict[str, int], *axes: str) -> Table:
    shape = [sizes[axis.rstrip("0123456789")] for axis in axes]
    return Table(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), axes)


def loop(kind: str, steps: int = 4) -> FactorGraph:
    """A loop with something that a rolled graph must keep."""
    sizes = {"z": 2, "w": 3, "c": 2, "seq": 2}
    none: frozenset[str] = frozenset()
    seq = frozenset(["seq"])
    shared = table(1, sizes, "z0", "z1").values
    factors: list[Factor] = []
    variables: dict[str, Variable] = {}
    plates = seq if kind == "in a plate" else none
    if kind == "under a class":
        variables["c"] = Variable("c", 2, none)
        factors.append(Factor("c", table(99, sizes, "c"), none))
    for t in range(steps):
        variables[f"z{t}"] = Variable(f"z{t}", 2, plates)
        own = ("c",) if kind == "under a class" else ("seq",) if kind == "in a plate" else ()
        if t and kind == "shared transitions":
            factors.append(Factor(f"z{t}", Table(shared, (f"z{t - 1}", f"z{t}")), none))
        elif t:
            factors.append(Factor(f"z{t}", table(t, sizes, *own, f"z{t - 1}", f"z{t}"), plates))
        else:
            factors.append(Factor("z0", table(50, sizes, "z0"), plates))
        if kind == "with a mixture":
            variables[f"w{t}"] = Variable(f"w{t}", 3, none)
            factors.append(Factor(f"w{t}", table(20 + t, sizes, f"z{t}", f"w{t}"), none))
            factors.append(Factor(f"u{t}", table(30 + t, sizes, f"w{t}"), none))
        elif not (kind == "a datum missing" and t in (0, 2)):
            factors.append(Factor(f"u{t}", table(30 + t, sizes, *own, f"z{t}"), plates))
    if kind == "one more factor":
        factors.append(Factor("extra", table(77, sizes, "z2"), none))
    if kind == "a plate at the first step":
        factors.append(Factor("extra", table(77, sizes, "seq", "z0"), seq))
    return FactorGraph(tuple(factors), variables, {"seq": 2})


KINDS = (
    "plain",
    "shared transitions",
    "in a plate",
    "under a class",
    "with a mixture",
    "a datum missing",
    "one more factor",
    "a plate at the first step",
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_is_found_and_has_the_sum_of_the_full_joint_table(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "_MOST_TIES", 4)
    graph = loop(kind)
    chain = rolled(graph, frozenset())
    assert len(chain.variables) < len(graph.variables)
    chain.check()
    close(log_normalizer(graph).total, full_joint(graph).log_normalizer)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_loop(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "_MOST_TIES", 4)
    graph = loop(kind)

    def gradients(total: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(total, [table.values for table in graph.tables])

    for t in graph.tables:
        t.values.requires_grad_()
    for one, other in zip(
        gradients(log_normalizer(graph).total), gradients(full_joint(graph).log_normalizer), strict=True
    ):
        close(one, other)


def test_what_a_step_has_beside_the_chain_counts_even_where_only_the_first_has_data() -> None:
    graph = loop("plain")
    sizes = {"w": 3}
    beside = {f"w{t}": Variable(f"w{t}", 3, frozenset()) for t in range(4)}
    variables = {
        name: v for t in range(4) for name, v in ((f"z{t}", graph.variables[f"z{t}"]), (f"w{t}", beside[f"w{t}"]))
    }
    priors = [Factor(f"w{t}", table(60 + t, sizes, f"w{t}"), frozenset()) for t in range(4)]
    datum = Factor("only", table(70, sizes, "w0"), frozenset())
    graph = FactorGraph((*graph.factors, *priors, datum), variables, graph.plates)
    assert len(rolled(graph, frozenset()).variables) == 2
    close(log_normalizer(graph).total, full_joint(graph).log_normalizer)


def test_transitions_that_all_steps_share_are_one_table() -> None:
    chain = rolled(loop("shared transitions"), frozenset())
    pair = next(factor for factor in chain.factors if factor.first is not None)
    assert not set(pair.table.axes) & chain.plates.keys()


@pytest.mark.parametrize("keep", ["z0", "z2", "z3"])
def test_what_is_kept_is_left_alone(keep: str) -> None:
    assert keep in rolled(loop("plain", 9), frozenset([keep])).variables


def test_a_loop_that_a_later_variable_reads_in_its_middle_is_left_alone() -> None:
    graph = loop("plain")
    late = Factor("late", table(5, {"z": 2, "y": 2}, "z1", "y"), frozenset())
    graph = FactorGraph((*graph.factors, late), {**graph.variables, "y": Variable("y", 2, frozenset())}, graph.plates)
    assert find_loop(structure_of(graph), frozenset()) is None
    close(log_normalizer(graph).total, full_joint(graph).log_normalizer)
