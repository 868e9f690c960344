"""Graphs with chains, and the same graphs with their chains written out by hand."""

from dataclasses import replace

import torch

from pyro_vfe.engine import Factor, FactorGraph, Table, Variable
from pyro_vfe.engine.structure import previous

TIME = "time"


def table(seed: int, sizes: dict[str, int], *axes: str, short: bool = False) -> Table:
    """A random log table; along time it has one entry fewer where it is for the elements after the first."""
    generator = torch.Generator().manual_seed(seed)
    known = {**sizes, **{previous(name): size for name, size in sizes.items()}}
    shape = [known[axis] - (short and axis == TIME) for axis in axes]
    return Table(torch.randn(shape, generator=generator, dtype=torch.float64), axes)


def _graph(steps: int, name: str) -> FactorGraph:
    sizes = {TIME: steps, "seq": 2, "x": 2, "z": 3, "c": 2, "w": 2, "word": 2, "v": 2}
    inside, around = frozenset([TIME]), frozenset([TIME, "seq"])

    def f(seed: int, plates: frozenset[str], *axes: str) -> Factor:
        return Factor(f"f{seed}", table(seed, sizes, *axes), plates)

    def pair(seed: int, plates: frozenset[str], axes: tuple[str, ...], first: tuple[str, ...]) -> Factor:
        return Factor(f"p{seed}", table(seed, sizes, *axes, short=True), plates, first=table(-seed, sizes, *first))

    def chain(variable: str, plates: frozenset[str]) -> Variable:
        return Variable(variable, sizes[variable], plates, chain=TIME)

    zz = (previous("z"), "z")
    factors: dict[str, list[Factor]] = {
        "one chain": [pair(1, inside, zz, ("z",)), f(2, inside, TIME, "z")],
        "varying transitions": [pair(1, inside, (TIME, *zz), ("z",)), f(2, inside, "z", TIME)],
        "no data": [pair(1, inside, zz, ("z",))],
        "sequences": [pair(1, around, zz, ("z",)), f(2, around, "z", "seq", TIME)],
        "sequences with their own transitions": [pair(1, around, ("seq", *zz), ("seq", "z")), f(2, around, "z", TIME)],
        "transitions by class": [
            pair(1, around, ("c", *zz), ("c", "z")),
            f(2, around, "z", "seq", TIME),
            f(3, frozenset(["seq"]), "c", "seq"),
        ],
        "factorial": [
            pair(1, inside, zz, ("z",)),
            pair(2, inside, (previous("x"), "x"), ("x",)),
            f(3, inside, TIME, "z", "x"),
        ],
        "chain on chain": [
            pair(1, inside, ("x", *zz), ("x", "z")),
            pair(2, inside, (previous("x"), "x"), ("x",)),
            f(3, inside, TIME, "z"),
        ],
        "a latent at each step": [pair(1, inside, zz, ("z",)), f(2, inside, "z", "w"), f(3, inside, TIME, "w")],
        "transitions by a latent at each step": [
            pair(1, inside, ("w", *zz), ("w", "z")),
            f(2, inside, "w"),
            f(3, inside, TIME, "w", "z"),
        ],
        "words inside steps": [
            pair(1, inside, zz, ("z",)),
            f(2, frozenset([TIME, "word"]), "z", "v"),
            f(3, frozenset([TIME, "word"]), "v", TIME, "word"),
        ],
    }
    chosen = tuple(factors[name])
    used = {axis.removesuffix("[t-1]") for factor in chosen for axis in factor.table.axes}
    plates_of = {"c": frozenset(["seq"]), "w": inside, "v": frozenset([TIME, "word"])}
    variables = {
        n: Variable(n, sizes[n], plates_of[n]) if n in plates_of else chain(n, chosen[0].plates)
        for n in ("c", "x", "z", "w", "v")
        if n in used
    }
    return FactorGraph(chosen, variables, {p: sizes[p] for p in (TIME, "seq", "word")})


NAMES = (
    "one chain",
    "varying transitions",
    "no data",
    "sequences",
    "sequences with their own transitions",
    "transitions by class",
    "factorial",
    "chain on chain",
    "a latent at each step",
    "transitions by a latent at each step",
    "words inside steps",
)

CHAIN_GRAPHS = {f"{name}, {steps} steps": _graph(steps, name) for name in NAMES for steps in (1, 2, 3)}


def written_out(graph: FactorGraph) -> FactorGraph:
    """The graph with a variable and a factor of its own for every element of time."""
    inside = {name for name, v in graph.variables.items() if TIME in v.plates}
    variables = {name: v for name, v in graph.variables.items() if name not in inside}
    for name in inside:
        v = graph.variables[name]
        for t in range(graph.plates[TIME]):
            variables[f"{name}{t}"] = Variable(f"{name}{t}", v.size, v.plates - {TIME}, v.scale)
    factors = []
    for factor in graph.factors:
        if TIME not in factor.plates:
            factors.append(factor)
            continue
        for t in range(graph.plates[TIME]):
            source = factor.first if t == 0 and factor.first is not None else factor.table
            element = t - 1 if factor.first is not None else t
            factors.append(_at(factor, source, element, t, inside))
    return FactorGraph(tuple(factors), variables, graph.plates)


def _at(factor: Factor, source: Table, element: int, t: int, inside: set[str]) -> Factor:
    values, axes = source.values, source.axes
    if TIME in axes:
        values = values.select(axes.index(TIME), element)
        axes = tuple(axis for axis in axes if axis != TIME)
    names = {name: f"{name}{t}" for name in inside} | {previous(name): f"{name}{t - 1}" for name in inside}
    renamed = Table(values, tuple(names.get(axis, axis) for axis in axes))
    return replace(factor, name=f"{factor.name}{t}", table=renamed, plates=factor.plates - {TIME}, first=None)
