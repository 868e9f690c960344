r"""Weights of factors and variables: a term counts as many times as its scale says.

    log sum over x weighted by c  =  c log sum_x exp( (s / c) f(x) )

In one sum all variables share a scale c, and the exponent of a factor of scale s is (s / c) f.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from pyro_vfe.engine.factors import Factor, FactorGraph, Scale, Table, Variable
from pyro_vfe.engine.logspace import weighted
from pyro_vfe.errors import ScaleError, VFEError


def same_scale(first: Scale, second: Scale) -> bool:
    """Returns whether two scales are equal; compares values only where the objects differ."""
    if first is second:
        return True
    one, other = _slim(first), _slim(second)
    if not isinstance(one, Table) or not isinstance(other, Table):
        return one is other or one == other
    return one.sizes == other.sizes and bool((one.aligned(other.axes) == other.values).all())


def _slim(scale: Scale) -> Scale:
    """The scale without axes along which it does not vary; one number where none is left."""
    if not isinstance(scale, Table):
        return scale
    for axis in scale.axes:
        first = scale.selected(axis, 0)
        if bool((scale.values == first.aligned(scale.axes)).all()):
            scale = first
    return scale if scale.axes else scale.values.item()


def _is_learned(scale: Scale) -> bool:
    """Whether a scale has a gradient: one of the same value may still be another."""
    return isinstance(scale, Table) and scale.values.requires_grad


def one_scale(scales: Sequence[Scale]) -> Scale | None:
    """Returns the scale that all of some are; None where two differ, in value or in derivative."""
    if not all(same_scale(scale, scales[0]) for scale in scales[1:]):
        return None
    learned = [scale.values for scale in scales if isinstance(scale, Table) and scale.values.requires_grad]
    is_one = not learned or (len(learned) == len(scales) and _have_one_derivative(learned))
    return scales[0] if is_one else None


def _have_one_derivative(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors of one shape change alike with whatever they were computed from."""
    leaves: list[Tensor] = []
    seen, left = set(), [get_gradient_edge(tensor).node for tensor in tensors]
    while left:
        node = left.pop()
        if node not in seen:
            seen.add(node)
            left += [follower for follower, _ in node.next_functions if follower is not None]
            leaves += [node.variable] if hasattr(node, "variable") else []
    irregular = torch.arange(1.0, 1.0 + tensors[0].numel(), dtype=torch.float64).sqrt().reshape(tensors[0].shape)
    slopes = [
        torch.autograd.grad(t, leaves, irregular.to(t), retain_graph=True, materialize_grads=True) for t in tensors
    ]
    return all(torch.allclose(a, b) for own in slopes[1:] for a, b in zip(own, slopes[0], strict=True))


def of_other_scale(factors: Sequence[Factor]) -> Factor | None:
    """Returns the first of some factors whose scale is not that of the first; None where all have one scale."""
    return next((factor for factor in factors if not same_scale(factor.scale, factors[0].scale)), None)


def common_scale(variables: Sequence[Variable]) -> Scale:
    """Returns the scale of variables that are summed together.

    Raises:
        ScaleError: They differ.
    """
    scale = variables[0].scale
    for variable in variables[1:]:
        if not same_scale(variable.scale, scale):
            raise ScaleError(
                f"Sites '{variables[0].name}' and '{variable.name}' depend on each other and are summed together, but"
                f" have the scales {shown(scale)} and {shown(variable.scale)}.",
                hint="Put both sites under one poutine.scale.",
            )
    return scale


def shown(scale: Scale) -> str:
    """Returns a scale in words."""
    if isinstance(scale, Table) and scale.axes:
        return f"of a table over {scale.axes}"
    return f"{scale.values.item() if isinstance(scale, Table) else scale:g}"


def applied(factor: Factor) -> Factor:
    """Returns the factor with its tables multiplied by its scale, which becomes 1."""
    if not isinstance(factor.scale, Table) and factor.scale == 1.0:
        return factor
    return replace(factor.mapped(lambda table: weighted(table, factor.scale)), scale=1.0)


def with_axes_of_scales(graph: FactorGraph) -> FactorGraph:
    """Returns the graph with every table over the plates along which weights will multiply it: a plan has to know."""
    scales = (*(variable.scale for variable in graph.variables.values()), *(factor.scale for factor in graph.factors))
    if not any(isinstance(scale, Table) for scale in scales):
        return graph
    return replace(graph, factors=tuple(_over_its_scales(factor, graph) for factor in graph.factors))


def _over_its_scales(factor: Factor, graph: FactorGraph) -> Factor:
    scales = (factor.scale, *(graph.variables[name].scale for name in graph.scope(factor)))
    along = dict.fromkeys(axis for scale in scales if isinstance(scale, Table) for axis in scale.axes)
    missing = tuple(axis for axis in along if axis not in factor.axes)
    # Weights that all share stay outside of the sum, and meet the table where the plates are multiplied out.
    shared = factor.plates.issubset(along) and all(same_scale(scale, factor.scale) for scale in scales)
    if shared or not missing:
        return factor
    sizes = [graph.plates[axis] for axis in missing]
    return factor.mapped(lambda table: Table(table.values.expand(*sizes, *table.values.shape), (*missing, *table.axes)))


def rescaled(factor: Factor, scale: Scale) -> Factor:
    """Returns the factor with the exponent it has relative to a common scale."""
    if factor.scale is scale:
        return factor
    learned = _is_learned(factor.scale) or _is_learned(scale)
    if not learned and same_scale(factor.scale, scale):
        return factor
    ratio = _ratio(factor.scale, scale)
    return replace(factor.mapped(lambda table: weighted(table, ratio)), scale=scale)


def _ratio(numerator: Scale, denominator: Scale) -> Scale:
    """Returns numerator / denominator, where 0 / 0 is 1: an element of weight zero counts nothing either way."""
    plates = tuple(dict.fromkeys(axis for s in (numerator, denominator) if isinstance(s, Table) for axis in s.axes))
    above, below = (
        s.aligned(plates) if isinstance(s, Table) else torch.tensor(s, dtype=torch.float64)
        for s in (numerator, denominator)
    )
    if bool(((below == 0) & (above != 0)).any()):
        raise VFEError(
            "A latent site has scale 0 and a site that reads it has not.",
            hint="Put both sites under one poutine.scale.",
        )
    ratio = (above / below.where(below != 0, 1.0)).where(below != 0, 1.0)
    return Table(ratio, plates) if plates or ratio.requires_grad else float(ratio)
