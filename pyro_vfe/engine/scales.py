r"""Weights of factors and variables: a term counts as many times as its scale says.

    log sum over x weighted by c  =  c log sum_x exp( (s / c) f(x) )

In one sum all variables share a scale c, and the exponent of a factor of scale s is (s / c) f.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from pyro_vfe.engine.factors import Factor, Scale, Table, Variable
from pyro_vfe.engine.logspace import weighted
from pyro_vfe.errors import VFEError


def same_scale(first: Scale, second: Scale) -> bool:
    """Returns whether two scales are equal; compares values only where the objects differ."""
    if first is second:
        return True
    if not isinstance(first, Table) and not isinstance(second, Table):
        return first == second
    sizes = [scale.sizes if isinstance(scale, Table) else {} for scale in (first, second)]
    if sizes[0] != sizes[1]:
        return False
    axes = tuple(sizes[0])
    one, other = (scale.aligned(axes) if isinstance(scale, Table) else scale for scale in (first, second))
    return bool(torch.as_tensor(one == other).all())


def of_other_scale(factors: Sequence[Factor]) -> Factor | None:
    """Returns the first of some factors whose scale is not that of the first; None where all have one scale."""
    return next((factor for factor in factors if not same_scale(factor.scale, factors[0].scale)), None)


def common_scale(variables: Sequence[Variable]) -> Scale:
    """Returns the scale of variables that are summed together.

    Raises:
        VFEError: They differ.
    """
    scale = variables[0].scale
    for variable in variables[1:]:
        if not same_scale(variable.scale, scale):
            raise VFEError(
                f"Sites '{variables[0].name}' and '{variable.name}' depend on each other and are summed together, but"
                f" have the scales {_shown(scale)} and {_shown(variable.scale)}.",
                hint="Put both sites under one poutine.scale.",
            )
    return scale


def _shown(scale: Scale) -> str:
    return f"of a table over {scale.axes}" if isinstance(scale, Table) else f"{scale:g}"


def applied(factor: Factor) -> Factor:
    """Returns the factor with its tables multiplied by its scale, which becomes 1."""
    return replace(factor.mapped(lambda table: weighted(table, factor.scale)), scale=1.0)


def rescaled(factor: Factor, scale: Scale) -> Factor:
    """Returns the factor with the exponent it has relative to a common scale."""
    if same_scale(factor.scale, scale):
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
    ratio = (above / below).where(above != below, 1.0)
    return Table(ratio, plates) if plates else float(ratio)
