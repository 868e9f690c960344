"""Every candidate of the search is a valid contraction, the cheapest wins, and a graph is searched once."""

import random
from itertools import combinations, pairwise
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyro_vfe.engine import FactorShape, Structure, VariableShape, ordering, paths, plan, search
from pyro_vfe.engine.contraction_trees import ContractionTree, Pairs, pairs_of_order
from pyro_vfe.engine.elimination_orders import (
    Greedy,
    bits,
    min_fill,
    min_weight,
    min_weight_order,
    neighbourhoods,
    simplicial_first,
    weighted_min_fill,
)
from pyro_vfe.engine.search import Contraction, greedy_pairs

close = torch.testing.assert_close
NOWHERE: frozenset[str] = frozenset()


def contraction_of(scopes: list[set[int]], sizes: list[int], kept: int = 0) -> Contraction:
    """The last `kept` variables stay."""
    return Contraction(tuple(map(frozenset, scopes)), tuple(sizes), len(sizes) - kept)


def grid(side: int, size: int = 2) -> Contraction:
    at = [[row * side + column for column in range(side)] for row in range(side)]
    across = [{a, b} for row in at for a, b in pairwise(row)]
    down = [{a, b} for upper, lower in pairwise(at) for a, b in zip(upper, lower, strict=True)]
    return contraction_of(across + down, [size] * side**2)


def structure_of(contraction: Contraction) -> Structure:
    factors = tuple(
        FactorShape(f"f{n}", tuple(f"v{v}" for v in sorted(scope)), NOWHERE)
        for n, scope in enumerate(contraction.scopes)
    )
    variables = tuple(VariableShape(f"v{v}", size, NOWHERE) for v, size in enumerate(contraction.sizes))
    return Structure(factors, variables, ())


def masks_of(contraction: Contraction) -> list[int]:
    return [sum(1 << v for v in scope) for scope in contraction.scopes]


def tree_of(contraction: Contraction, pairs: Pairs) -> ContractionTree:
    return ContractionTree(masks_of(contraction), contraction.sizes, contraction.n_summed, pairs)


def by_weight(contraction: Contraction) -> Pairs:
    order = min_weight_order(contraction.scopes, contraction.n_summed, contraction.sizes)
    pairs = pairs_of_order(contraction.scopes, order, contraction.sizes)
    assert pairs is not None
    return pairs


def candidates(contraction: Contraction) -> dict[str, Pairs]:
    """The pairs of every method, by name."""
    graph = neighbourhoods(masks_of(contraction), contraction.sizes, contraction.n_summed)
    begin, core, names = simplicial_first(graph)
    orders = {"program order": list(range(contraction.n_summed))}
    for measure in (min_weight, min_fill, weighted_min_fill):
        for drawn in (None, random.Random(1)):
            found = Greedy(core).order(measure, noise=0.5, random=drawn)
            assert found is not None
            orders[f"{measure.__name__} {drawn is not None}"] = [*begin, *(names[v] for v in found[0])]
    made = {name: pairs_of_order(contraction.scopes, order, contraction.sizes) for name, order in orders.items()}
    pairs = {name: found for name, found in made.items() if found is not None} | {"min-weight": by_weight(contraction)}
    pairs["opt_einsum greedy"] = greedy_pairs(contraction)
    pairs["random-greedy"] = greedy_pairs(contraction, random.Random(0))
    pairs["search"], _ = search.search(contraction, by_weight(contraction))
    improved = tree_of(contraction, pairs["program order"])
    improved.improve(6, 3)
    return pairs | {"improved": improved.pairs()}


def value_of(contraction: Contraction, pairs: Pairs, tables: list[Tensor]) -> Tensor:
    """The sum of the product of some tables, one pair after another."""
    tree = tree_of(contraction, pairs)
    scopes = [bits(mask) for mask in masks_of(contraction)]
    made = [torch.einsum(t, s, bits(tree.scopes[n])) for n, (t, s) in enumerate(zip(tables, scopes, strict=True))]
    for position, (left, right) in enumerate(pairs, len(tables)):
        left_axes, right_axes, axes = (bits(tree.scopes[n]) for n in (left, right, position))
        made.append(torch.einsum(made[left], left_axes, made[right], right_axes, axes))
    return made[-1]


@st.composite
def contractions(draw: st.DrawFn) -> Contraction:
    n = draw(st.integers(2, 7))
    scopes = draw(st.lists(st.sets(st.integers(0, n - 1), min_size=1, max_size=3), min_size=3, max_size=9))
    scopes += [{v} for v in range(n) if not any(v in scope for scope in scopes)]
    sizes = draw(st.lists(st.integers(1, 3), min_size=n, max_size=n))
    return contraction_of(scopes, sizes, kept=draw(st.integers(0, n - 1)))


@settings(deadline=None, max_examples=60)
@given(contractions())
def test_every_candidate_gives_the_brute_force_sum(contraction: Contraction) -> None:
    generator = torch.Generator().manual_seed(0)
    scopes = [sorted(scope) for scope in contraction.scopes]
    tables = [
        torch.rand([contraction.sizes[v] for v in scope], generator=generator, dtype=torch.float64) for scope in scopes
    ]
    kept = sorted({v for scope in scopes for v in scope if v >= contraction.n_summed})
    wanted = torch.einsum(*(part for pair in zip(tables, scopes, strict=True) for part in pair), kept)
    for name, pairs in candidates(contraction).items():
        close(value_of(contraction, pairs, tables), wanted, msg=name)


@pytest.mark.parametrize("contraction", [grid(6), grid(5, 3)], ids=["binary", "ternary"])
def test_the_cheapest_candidate_wins(contraction: Contraction, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "WORK_PER_EFFORT", 0.1)
    made = candidates(contraction)
    works = {name: tree_of(contraction, pairs).cost(0).work for name, pairs in made.items()}
    assert works["search"] == min(works.values())


def test_a_grid_that_a_greedy_path_spoils_is_done_near_its_treewidth() -> None:
    contraction = grid(14)
    greedy = tree_of(contraction, greedy_pairs(contraction)).cost(0)
    found = plan(structure_of(contraction))
    assert found.flops < greedy.work / 4
    assert found.largest.entries <= 2**15


@pytest.mark.parametrize("seed", range(5))
def test_a_tree_is_summed_without_a_product_above_its_largest_factor(seed: int) -> None:
    drawn = random.Random(seed)
    scopes = [{n, drawn.randrange(n)} for n in range(1, 60)]
    found = plan(structure_of(contraction_of(scopes, [drawn.randint(2, 5) for _ in range(60)])))
    assert max(step.flops for step in found.steps) <= 25
    assert all(component.search == paths.AT_ONCE for component in found.components)


def test_a_chain_of_twenty_thousand_is_not_searched() -> None:
    found = plan(structure_of(contraction_of([{n, n + 1} for n in range(19_999)], [2] * 20_000)))
    assert found.flops <= 4 * 20_000
    assert found.largest.entries == 2


def test_a_ladder_too_long_for_a_search_is_done_with_cliques_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "MOST_VARIABLES", 10)
    rungs = [{2 * n, 2 * n + 1} for n in range(50)]
    rails = [{2 * n + side, 2 * n + 2 + side} for n in range(49) for side in (0, 1)]
    found = plan(structure_of(contraction_of(rungs + rails, [3] * 100)))
    assert max(step.flops for step in found.steps) == 27


def test_variables_of_a_chordal_graph_all_come_first() -> None:
    scopes = [set(trio) for trio in zip(range(30), range(1, 31), range(2, 32), strict=True)]
    contraction = contraction_of(scopes, [2] * 32)
    first, core, names = simplicial_first(neighbourhoods(masks_of(contraction), contraction.sizes, 32))
    assert sorted(first) == list(range(32))
    assert not core.count and not names


def test_the_same_graph_has_the_same_plan_and_no_global_generator_is_touched() -> None:
    contraction = grid(8)
    before = random.getstate()
    first = search.search(contraction, by_weight(contraction))
    assert search.search(contraction, by_weight(contraction)) == first
    assert random.getstate() == before


def test_the_effort_is_bounded_and_shown() -> None:
    contraction = grid(12)
    _, least = search.search(contraction, by_weight(contraction), most_effort=1)
    assert least.tried == 1
    found = plan(structure_of(contraction))
    report = found.components[0].search
    assert report.tried > least.tried
    assert report.effort <= 1.5 * search.MOST_EFFORT
    assert report.method in str(found) and f"{report.tried:,} tried" in str(found)


def test_a_plan_that_fits_wins_over_a_cheaper_one() -> None:
    contraction = grid(7)
    pairs, _ = search.search(contraction, by_weight(contraction))
    entries = tree_of(contraction, pairs).cost(0).excess
    tight, _ = search.search(contraction, by_weight(contraction), limit=1, most_effort=200_000)
    assert tree_of(contraction, tight).cost(0).excess <= entries


def test_the_second_call_does_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(contraction: Contraction, *args: object) -> object:
        calls.append(contraction.n_summed)
        return search.search(contraction, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(paths, "search", counted)
    ordering.plan.cache_clear()
    paths._searched.cache_clear()
    contraction = grid(5)
    first = plan(structure_of(contraction))
    assert plan(structure_of(contraction)) is first
    assert calls == [25]
    renamed = Structure(
        tuple(FactorShape(f.name, tuple(f"u{a}" for a in f.axes), NOWHERE) for f in structure_of(contraction).factors),
        tuple(VariableShape(f"u{v.name}", v.size, NOWHERE) for v in structure_of(contraction).variables),
        (),
    )
    assert plan(renamed).flops == first.flops
    assert calls == [25]


class _InOrder:
    """Stands for cotengra's optimizer: contracts the first two operands until one is left."""

    asked: ClassVar[list[int]] = []

    def __init__(self, **options: object) -> None:
        assert options["seed"] == 0

    def __call__(self, inputs: list[list[int]], output: list[int], sizes: dict[int, int]) -> list[tuple[int, int]]:
        assert {v for scope in inputs for v in scope} == sizes.keys()
        self.asked.append(len(inputs))
        return [(0, 1)] * (len(inputs) - 1)


def test_cotengra_competes_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    small = grid(3)
    tables = [torch.rand(2, 2, dtype=torch.float64) for _ in small.scopes]
    monkeypatch.setattr(search, "cotengra", SimpleNamespace(RandomGreedyOptimizer=_InOrder))
    close(value_of(small, search._cotengra_pairs(small), tables), value_of(small, by_weight(small), tables))
    monkeypatch.setattr(search, "WORK_PER_EFFORT", 0.01)
    before = len(_InOrder.asked)
    search.search(small, by_weight(small))
    assert len(_InOrder.asked) == before + 1
    monkeypatch.setattr(search, "cotengra", None)
    search.search(small, by_weight(small))
    assert len(_InOrder.asked) == before + 1


def test_a_clique_needs_no_longer_search_than_its_one_order() -> None:
    contraction = contraction_of([set(pair) for pair in combinations(range(12), 2)], [2] * 12)
    _, report = search.search(contraction, by_weight(contraction))
    assert report.tried < 20
