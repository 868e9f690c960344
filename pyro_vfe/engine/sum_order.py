r"""Sums whose weights leave them one value: from names, plates and scales, before there is a plan.

    c_x log sum_x exp( c_y / c_x  log sum_y exp( f(x, y) / c_y ) )

is another number with the sums the other way round, unless c_x = c_y. The plates say which is inside: a variable in
more plates than another stands for elements of it, and is summed first. Where they do not say it, and x and y are tied
while both are there to be summed, there is no such number. And the elements of a subsampled plate stand for others
outside of logs alone:

    E[ N / B  sum_{n in B} f_n ]  =  sum_n f_n        but        E[ log sum_x exp( N / B  sum_{n in B} f_n(x) ) ]

is below log sum_x exp( sum_n f_n(x) ) or above it, in value and in gradient.

References:
    Hoffman, Blei, Wang and Paisley (2013), Stochastic variational inference (unbiased subsamples).
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations_with_replacement

from pyro_vfe.engine.factors import FactorGraph, Scale, Subsample, Variable
from pyro_vfe.engine.ordering import connected
from pyro_vfe.engine.scales import same_scale, shown
from pyro_vfe.errors import ScaleError

_NOTHING: frozenset[Subsample] = frozenset()


def check_sums(graph: FactorGraph, keep: frozenset[str]) -> None:
    """Checks that the weights of a graph leave the sum over all variables that are not kept one value, and unbiased.

    Args:
        graph: The factors, before any plate of theirs is written out.
        keep: Variables that stay.

    Raises:
        ScaleError: A variable is summed above a subsampled plate, or two whose weights differ have no order.
    """
    if graph.normalized:
        return
    is_weighted = len({variable.scale for variable in graph.variables.values()}) > 1
    if not (is_weighted or graph.subsampled):
        return
    # One value leaves nothing to sum: a draw, say.
    summed = {v.name: v for v in graph.variables.values() if v.name not in keep and v.size > 1}
    _check_subsamples(graph, summed)
    if is_weighted:
        _check_order(graph, summed)


def _check_subsamples(graph: FactorGraph, summed: Mapping[str, Variable]) -> None:
    for factor in graph.factors:
        around = graph.subsampled.get(factor.name, _NOTHING)
        for name in graph.scope(factor) if around else ():
            above = around - graph.subsampled.get(name, _NOTHING) if name in summed else _NOTHING
            for plate, size, full_size in above:
                raise ScaleError(
                    f"Latent '{name}' is summed out above plate '{plate}', which shows {size} of its {full_size} "
                    "elements: their weights would stand as powers inside of the sum, whose log is then biased.",
                    hint=f"Let both guide and model have '{name}', for an F without bias; or take all of '{plate}'.",
                )


def _check_order(graph: FactorGraph, summed: Mapping[str, Variable]) -> None:
    kind = _kinds(summed.values())
    scopes = {n: [name for name in graph.scope(factor) if name in summed] for n, factor in enumerate(graph.factors)}
    plates = dict.fromkeys(variable.plates for variable in summed.values())
    for one, other in combinations_with_replacement(plates, 2):
        if one < other or other < one:
            continue
        # What lies in fewer plates than either is summed after it, and holds the two apart.
        between = {name for name, v in summed.items() if not (v.plates < one or v.plates < other)}
        together = {n: [name for name in scope if name in between] for n, scope in scopes.items()}
        for _, names in connected(together):
            pair = _unlike(
                [name for name in names if summed[name].plates == one],
                [name for name in names if summed[name].plates == other],
                kind,
            )
            if pair is not None:
                raise _without_order(*(summed[name] for name in pair))


def _kinds(variables: Iterable[Variable]) -> dict[str, int]:
    """The number of each variable's scale among all that differ."""
    known: list[Scale] = []
    kinds: dict[str, int] = {}
    for variable in variables:
        kind = next((n for n, scale in enumerate(known) if same_scale(scale, variable.scale)), len(known))
        if kind == len(known):
            known.append(variable.scale)
        kinds[variable.name] = kind
    return kinds


def _unlike(first: Sequence[str], second: Sequence[str], kind: Mapping[str, int]) -> tuple[str, str] | None:
    if len({kind[name] for name in (*first, *second)}) < 2:
        return None
    return next(((one, other) for one in first for other in second if kind[one] != kind[other]), None)


def _without_order(one: Variable, other: Variable) -> ScaleError:
    return ScaleError(
        f"Sites '{one.name}' and '{other.name}' depend on each other and are summed together, but have the scales "
        f"{shown(one.scale)} and {shown(other.scale)}, and neither is inside of the other's plates: the number would "
        "depend on which is summed first.",
        hint="Put both sites under one poutine.scale (and take all elements of a plate that only one is in), or let "
        "both guide and model have them, for F alone.",
    )
