"""Small plated factor graphs, named once, and a strategy that draws them at random."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from pyro_vfe.engine import Factor, FactorGraph, Table, Variable

INF = float("inf")


def graph_of(
    variables: dict[str, tuple[int, str]],
    factors: list[tuple[str, str, str]],
    plates: dict[str, int],
    seed: int = 0,
    zeros: float = 0.0,
) -> FactorGraph:
    """Builds a graph of random tables; a factor is its scope, the plates it varies along, and others it is in."""
    generator = torch.Generator().manual_seed(seed)
    known = {name: Variable(name, size, frozenset(inside)) for name, (size, inside) in variables.items()}
    made = []
    for number, (scope, varies, repeated) in enumerate(factors):
        axes = (*varies, *scope)
        shape = [known[axis].size if axis in known else plates[axis] for axis in axes]
        values = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
        values = values.masked_fill(torch.rand(shape, generator=generator) < zeros, -INF)
        inside = frozenset(varies + repeated).union(*(known[name].plates for name in scope))
        made.append(Factor(f"f{number}", Table(values, axes), inside))
    return FactorGraph(tuple(made), known, plates)


GRAPHS: dict[str, FactorGraph] = {
    "one variable": graph_of({"a": (3, "")}, [("a", "", "")], {}),
    "a variable nobody mentions": graph_of({"a": (3, ""), "b": (4, "i")}, [("a", "", "")], {"i": 2}),
    "a constant": graph_of({"a": (2, "")}, [("", "", ""), ("", "i", ""), ("", "", "i"), ("a", "", "")], {"i": 3}),
    "chain": graph_of(
        dict.fromkeys("abcde", (3, "")),
        [("a", "", ""), ("ab", "", ""), ("bc", "", ""), ("cd", "", ""), ("ed", "", "")],
        {},
    ),
    "tree": graph_of(
        dict.fromkeys("abcde", (3, "")),
        [("ab", "", ""), ("ca", "", ""), ("bd", "", ""), ("be", "", ""), ("e", "", "")],
        {},
    ),
    "loop": graph_of(
        dict.fromkeys("abcd", (3, "")), [("ab", "", ""), ("bc", "", ""), ("cd", "", ""), ("da", "", "")], {}
    ),
    "grid": graph_of(
        dict.fromkeys("abcdefghi", (2, "")),
        [(pair, "", "") for pair in ("ab", "bc", "de", "ef", "gh", "hi", "ad", "be", "cf", "dg", "eh", "fi", "abe")],
        {},
    ),
    "two components": graph_of(dict.fromkeys("abcd", (2, "")), [("ab", "", ""), ("cd", "", "")], {}),
    "mixture": graph_of({"a": (2, ""), "b": (3, "i")}, [("a", "", ""), ("ab", "i", ""), ("b", "", "")], {"i": 4}),
    "multiplicity": graph_of({"a": (2, ""), "b": (3, "i")}, [("a", "", ""), ("ab", "", ""), ("a", "", "i")], {"i": 4}),
    "nested plates": graph_of(
        {"a": (2, ""), "b": (2, "i"), "c": (2, "ij")},
        [("a", "", ""), ("ab", "", ""), ("bc", "ij", ""), ("ac", "j", "i")],
        {"i": 2, "j": 3},
    ),
    "chain in a plate": graph_of(
        dict.fromkeys("abc", (2, "i")) | {"z": (2, "")},
        [("az", "", ""), ("ab", "", ""), ("bc", "", ""), ("c", "i", "")],
        {"i": 3},
    ),
    "crossing plates": graph_of(
        {"a": (2, "i"), "b": (2, "j"), "c": (2, "ij")},
        [("a", "", ""), ("b", "j", ""), ("abc", "ij", "")],
        {"i": 3, "j": 2},
    ),
    "crossing plates under a global": graph_of(
        {"a": (2, "i"), "b": (2, "j"), "z": (2, ""), "d": (2, "i")},
        [("az", "", ""), ("bz", "j", ""), ("ab", "ij", ""), ("d", "i", ""), ("da", "", "")],
        {"i": 3, "j": 2},
    ),
    "three crossing plates": graph_of(
        {"a": (2, "i"), "b": (2, "j"), "c": (2, "k")},
        [("ab", "ij", ""), ("bc", "jk", ""), ("ac", "", "")],
        {"i": 2, "j": 2, "k": 2},
    ),
    "size one": graph_of({"a": (1, "i"), "b": (2, "i")}, [("ab", "i", ""), ("b", "", "")], {"i": 3}),
    "plate of one": graph_of({"a": (2, ""), "b": (2, "i")}, [("ab", "i", ""), ("a", "", "i")], {"i": 1}),
    "zeros in a chain": graph_of(
        dict.fromkeys("abcd", (4, "")),
        [("a", "", ""), ("ab", "", ""), ("bc", "", ""), ("cd", "", "")],
        {},
        seed=3,
        zeros=0.4,
    ),
    "zeros in a plate": graph_of(
        {"a": (3, ""), "b": (4, "i")}, [("ab", "i", ""), ("b", "", "")], {"i": 3}, seed=1, zeros=0.3
    ),
}


@st.composite
def plated_graphs(draw: st.DrawFn, zeros: bool = True) -> FactorGraph:
    """Draws a graph whose full joint table has at most 4096 entries."""
    plates = {plate: draw(st.integers(1, 3)) for plate in draw(st.sampled_from(["", "i", "ij", "ijk"]))}
    subsets = st.sets(st.sampled_from(sorted(plates)), max_size=2).map(sorted).map("".join) if plates else st.just("")
    variables: dict[str, tuple[int, str]] = {}
    entries = 1
    for name in "abcde":
        size, inside = draw(st.integers(1, 3)), draw(subsets)
        copies = 1
        for plate in inside:
            copies *= plates[plate]
        if entries * size**copies <= 4096:
            entries *= size**copies
            variables[name] = (size, inside)
    scopes = (
        st.lists(st.sampled_from(sorted(variables)), unique=True, max_size=3).map("".join) if variables else st.just("")
    )
    factors = []
    for _ in range(draw(st.integers(1, 6))):
        scope = draw(scopes)
        needed = set().union(*(variables[name][1] for name in scope))
        varies = draw(st.sets(st.sampled_from(sorted(plates)))) if plates else set()
        repeated = draw(subsets)
        factors.append((scope, "".join(sorted(varies)), "".join(sorted((needed | set(repeated)) - varies))))
    seed = draw(st.integers(0, 2**16))
    return graph_of(variables, factors, plates, seed, draw(st.sampled_from([0.0, 0.0, 0.3])) if zeros else 0.0)


def with_values(graph: FactorGraph, values: list[Tensor]) -> FactorGraph:
    """The graph with other numbers in its tables."""
    return graph.with_tables([Table(v, f.table.axes) for v, f in zip(values, graph.factors, strict=True)])


def values_of(graph: FactorGraph) -> list[Tensor]:
    """The numbers of the graph's tables."""
    return [factor.table.values for factor in graph.factors]
