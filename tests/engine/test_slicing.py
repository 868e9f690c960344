"""A contraction that is cut has the value, the gradients and the marginals of the whole, and holds less."""

from collections.abc import Callable

import pytest
import torch
from engine.full_joint import full_joint
from engine.graphs import GRAPHS, graph_of, plated_graphs, values_of, with_values
from hypothesis import given, settings
from torch import Tensor

from pyro_vfe.engine import FactorGraph, cost, eliminate, log_normalizer, marginals, ordering, paths, plan_of, sample
from pyro_vfe.engine.cost import plan_within
from pyro_vfe.engine.cuts import cut_to_fit
from pyro_vfe.engine.ordering import Plan
from pyro_vfe.engine.unrolling import structure_of
from pyro_vfe.errors import CostError

close = torch.testing.assert_close
CPU = torch.device("cpu")
NONE: frozenset[str] = frozenset()

PAIRS = [(a + b, "", "") for n, a in enumerate("abcdefgh") for b in "abcdefgh"[:n]]
CLIQUE = graph_of(dict.fromkeys("abcdefgh", (3, "")), PAIRS, {}, seed=5)
ZEROS = graph_of(dict.fromkeys("abcdefgh", (3, "")), PAIRS, {}, seed=6, zeros=0.2)
PLATED = graph_of(
    dict.fromkeys("abcde", (3, "i")) | {"z": (2, "")},
    [(a + b, "i", "") for n, a in enumerate("abcde") for b in "abcde"[:n]] + [("az", "i", ""), ("z", "", "")],
    {"i": 2},
)
TIED = graph_of(dict.fromkeys("abcdefgh", (3, "")), [*PAIRS, ("abcdef", "", "")], {}, seed=7)
CUT = {"clique": CLIQUE, "zeros": ZEROS, "inside a plate": PLATED, "beside a large factor": TIED}


def tight(graph: FactorGraph, share: float = 3) -> float:
    """A limit in bytes that a part of the whole plan's numbers fits."""
    return 8 * plan_of(graph).held / share


def cut_plan(graph: FactorGraph, max_bytes: float) -> Plan:
    return plan_within(structure_of(graph), NONE, NONE, 8, CPU, max_bytes)


def gradients(graph: FactorGraph, max_bytes: float | None) -> tuple[Tensor, ...]:
    tables = [values.clone().requires_grad_() for values in values_of(graph)]
    return torch.autograd.grad(log_normalizer(with_values(graph, tables), max_bytes=max_bytes).total, tables)


@pytest.mark.parametrize("name", CUT)
def test_what_is_cut_fits_and_equals_the_full_joint_table(name: str) -> None:
    graph = CUT[name]
    limit = tight(graph)
    found = cut_plan(graph, limit)
    assert any(component.cut for component in found.components)
    assert 8 * found.held <= limit
    assert sorted(found.variables) == sorted(plan_of(graph).variables)
    close(log_normalizer(graph, max_bytes=limit).total, full_joint(graph).log_normalizer)


@pytest.mark.parametrize("name", CUT)
def test_gradients_through_slices_equal_those_of_the_whole(name: str) -> None:
    graph = CUT[name]
    for cut, whole in zip(gradients(graph, tight(graph)), gradients(graph, None), strict=True):
        close(cut, whole)


def test_a_second_derivative_through_slices_is_right() -> None:
    graph = graph_of(dict.fromkeys("abcde", (4, "")), [pair for pair in PAIRS if set(pair[0]) <= set("abcde")], {})

    def total(*tables: Tensor) -> Tensor:
        return log_normalizer(with_values(graph, list(tables)), max_bytes=tight(graph, 1.5)).total

    assert any(component.cut for component in cut_plan(graph, tight(graph, 1.5)).components)
    tables = [values.requires_grad_() for values in values_of(graph)]
    assert torch.autograd.gradgradcheck(total, tables, fast_mode=True)


def test_marginals_fit_as_well() -> None:
    wanted = [("a",), ("b", "h")]
    found = marginals(CLIQUE, wanted, max_bytes=tight(CLIQUE, 3))
    for scope, table in marginals(CLIQUE, wanted).items():
        close(found[scope].values, table.values)


def test_the_backward_pass_keeps_a_part_of_the_whole() -> None:
    pairs = [pair for pair in PAIRS if set(pair[0]) <= set("abcdef")]
    graph = graph_of(dict.fromkeys("abcdef", (8, "")), pairs, {})

    def bytes_kept(max_bytes: float | None) -> int:
        kept: list[Tensor] = []
        tables = [values.clone().requires_grad_() for values in values_of(graph)]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            log_normalizer(with_values(graph, tables), max_bytes=max_bytes)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        return sum(storages.values())

    assert bytes_kept(tight(graph, 8)) < bytes_kept(None) / 3


def test_kept_variables_are_not_cut() -> None:
    whole = eliminate(CLIQUE, keep=frozenset("ab"))
    cut = eliminate(CLIQUE, keep=frozenset("ab"), max_bytes=tight(CLIQUE, 3))

    def total(factors: object) -> Tensor:
        return sum((f.table.aligned(("a", "b")) for f in factors), torch.zeros(1, 1))  # type: ignore[attr-defined]

    close(total(cut.factors), total(whole.factors))


@settings(deadline=None, max_examples=80)
@given(plated_graphs())
def test_a_cut_graph_equals_its_full_joint_table(graph: FactorGraph) -> None:
    limit = 8 * plan_of(graph).held / 2
    try:
        found = log_normalizer(graph, max_bytes=limit).total
    except CostError:
        return
    close(found, full_joint(graph).log_normalizer.to(found))


@pytest.mark.parametrize("name", ["chain", "grid", "nested plates", "crossing plates", "zeros in a chain"])
def test_named_graphs_keep_their_value_at_every_limit_that_they_fit(name: str) -> None:
    graph = GRAPHS[name]
    for share in (1, 2, 3):
        if cut_plan(graph, tight(graph, share)).held * 8 <= tight(graph, share):
            found = log_normalizer(graph, max_bytes=tight(graph, share)).total
            close(found, full_joint(graph).log_normalizer.to(found))


def test_what_cannot_be_cut_to_fit_is_refused_and_names_its_sites() -> None:
    with pytest.raises(CostError, match=r"largest table is over '[a-h]'"):
        log_normalizer(CLIQUE, max_bytes=8)
    large = graph_of(dict.fromkeys("abcdefgh", (3, "")), PAIRS, {})
    with pytest.raises(CostError, match="largest table is over"):
        eliminate(large, keep=frozenset("abcdefg"), max_bytes=1000)


def test_draws_need_every_table_and_are_not_cut() -> None:
    with pytest.raises(CostError, match="above the limit"):
        sample(CLIQUE, 2, max_bytes=tight(CLIQUE))


def test_the_slices_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = [(frozenset("abc"), 27), (frozenset("ab"), 9)]
    sizes = dict.fromkeys("abc", 3)
    assert cut_to_fit(tables, tables, "abc", sizes, 16) == ("a",)
    monkeypatch.setattr("pyro_vfe.engine.cuts.MOST_SLICES", 2)
    assert cut_to_fit(tables, tables, "abc", sizes, 16) == ()


def test_the_variable_that_most_tables_have_is_cut_first() -> None:
    tables = [(frozenset("ab"), 16), (frozenset("ac"), 16), (frozenset("ad"), 15)]
    assert cut_to_fit(tables, tables, "abcd", dict.fromkeys("abcd", 4), 20) == ("a",)


def test_a_plan_shows_what_is_cut_and_counts_each_slice() -> None:
    found = cut_plan(CLIQUE, tight(CLIQUE))
    component = next(component for component in found.components if component.cut)
    assert f"done {component.slices:,} times" in str(found)
    assert component.slices == 3 ** len(component.cut)
    once = sum(step.flops for step in component.steps)
    assert once < found.flops <= component.slices * once


def test_a_cut_plan_is_searched_once_though_free_memory_varies(monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([1.00e6, 1.02e6, 1.05e6])
    monkeypatch.setattr(cost, "UNASKED", 0)
    monkeypatch.setattr(cost, "default_limit", lambda device: next(free) / 100)
    searches: list[object] = []
    original: Callable[..., paths.Steps] = paths.contraction_steps

    def counted(*args: object) -> paths.Steps:
        searches.append(args)
        return original(*args)

    monkeypatch.setattr(ordering, "contraction_steps", counted)
    ordering.plan.cache_clear()
    plans = [plan_within(structure_of(CLIQUE), NONE, NONE, 8, CPU, None) for _ in range(2)]
    after = len(searches)
    plans.append(plan_within(structure_of(CLIQUE), NONE, NONE, 8, CPU, None))
    assert len(searches) == after
    assert plans[0] is plans[1] is plans[2]
