r"""The gap, split over latent sites.

    gap     =  sum_t share_t
    share_t =  F_t - F_{t-1} =  E_Q[ log Q(v_t | v_<t) - log P(v_t | v_<t, u) ]          F_0 = surprise, F_T = F

A chain is one latent: its share is over its plates but time. F_t is the free energy when the guide handles v_1..v_t and
the model sums the others out. Going backwards through the guide's order each step removes one latent from the model's
tables, so all shares come from one elimination.

References:
    Cover and Thomas (2006), Elements of Information Theory, section 2.5 (the chain rule of relative entropy).
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from pyro_vfe.energy.parts import conditionals_of, log_joint, negative
from pyro_vfe.engine.elimination import eliminate
from pyro_vfe.engine.expectation import expected
from pyro_vfe.engine.factors import Factor, FactorGraph, Table
from pyro_vfe.engine.scales import applied
from pyro_vfe.engine.structure import previous
from pyro_vfe.errors import PlateError, StructureError
from pyro_vfe.program.enumeration import Enumeration


def gap_shares(enumeration: Enumeration, max_bytes: float | None = None) -> dict[str, Tensor]:
    """Returns each guide latent's share of the gap in nats, over its plates (sorted by name; a chain's but time).

    Args:
        enumeration: The factors, in the precision that sums are to have.
        max_bytes: The most memory that intermediate tables may take.

    Raises:
        StructureError: The guide has latents that the model lacks, draws that depend on its latents, or no finite gap.
    """
    _check(enumeration)
    if not enumeration.guide_latents:
        return {}
    joint = log_joint(enumeration, max_bytes)
    graph, remaining = joint.graph, list(joint.costs)
    if graph.variables.keys() - enumeration.variables.keys():
        raise StructureError(
            "The gap has no shares by site here: latents that only the model has tie the elements of a plate together.",
            hint="Give the guide those latents too, unless their plates cross its own; or ask for the whole gap.",
        )
    costs: list[Factor] = []
    weights: dict[str, Table] = {}
    for conditional in reversed(enumeration.guide_latents):
        name = conditional.name
        touching = [factor for factor in remaining if name in factor.axes]
        remaining = [factor for factor in remaining if name not in factor.axes]
        plates = _own_plates(name, (conditional, *touching), graph)
        left = _summed_out(name, plates, touching, graph, max_bytes)
        remaining.extend(left)
        weights[name] = _ones(plates, enumeration)
        share = (conditional, *negative(touching), *left)
        costs.extend(_weighted(factor, weights[name]) for factor in share)
    with torch.enable_grad():
        total = expected(graph, conditionals_of(enumeration), costs).total
        names = list(reversed(weights))
        gradients = torch.autograd.grad(total, [weights[name].values for name in names], allow_unused=True)
    zeros = {name: torch.zeros_like(weights[name].values) for name in names}
    return {n: zeros[n] if g is None else g for n, g in zip(names, gradients, strict=True)}


def _check(enumeration: Enumeration) -> None:
    own = {factor.name for factor in enumeration.guide_latents} - enumeration.guided
    if own or enumeration.draws_tell_of_latents:
        what = f"latents of its own ({sorted(own)})" if own else "draws that depend on its latents"
        raise StructureError(
            f"The gap has no shares by site where the guide has {what}.", hint="Ask for the whole gap instead."
        )


def _own_plates(name: str, factors: Iterable[Factor], graph: FactorGraph) -> frozenset[str]:
    """The plates whose elements have shares of their own."""
    variable = graph.variables[name]
    is_chain = any(previous(name) in factor.axes for factor in factors)
    return variable.plates - {variable.chain} if is_chain else variable.plates


def _summed_out(
    name: str, plates: frozenset[str], touching: list[Factor], graph: FactorGraph, max_bytes: float | None
) -> list[Factor]:
    if not touching:
        return []
    mentioned = {axis for factor in touching for axis in factor.axes}
    variables = {key: variable for key, variable in graph.variables.items() if key in mentioned}
    part = replace(graph, factors=tuple(touching), variables=variables)
    try:
        elimination = eliminate(part, keep=frozenset(variables) - {name}, keep_plates=plates, max_bytes=max_bytes)
    except PlateError as error:
        raise StructureError(
            f"The gap has no shares by site: the chain '{name}' cannot be summed out before latents that it is tied to"
            " at every step.",
            hint="Ask for the whole gap.",
        ) from error
    if elimination.unrollings:
        raise StructureError(
            f"The gap has no shares by site in the guide's order: summing '{name}' out before the latents that "
            f"the guide "
            f"samples earlier would write out plate '{elimination.unrollings[0].plate}'.",
            hint="Let the guide sample latents outside a plate before those inside, or ask for the whole gap.",
        )
    return list(elimination.factors)


def _ones(names: frozenset[str], enumeration: Enumeration) -> Table:
    plates = tuple(sorted(names))
    like = enumeration.guide_latents[0].table.values
    ones = torch.ones([enumeration.plates[plate] for plate in plates], dtype=like.dtype, device=like.device)
    return Table(ones.requires_grad_(True), plates)


def _weighted(factor: Factor, weight: Table) -> Factor:
    """The factor times a weight per element; entries that are -inf have probability zero here and are dropped."""
    usable = tuple(axis for axis in weight.axes if axis in factor.plates)
    with torch.enable_grad():
        level = weight if usable == weight.axes else Table(weight.values.sum() / weight.values.numel(), ())
        return applied(factor).mapped(lambda table: _product(table, level))


def _product(table: Table, level: Table) -> Table:
    values = torch.where(table.values.isfinite(), table.values, 0.0)
    axes = tuple(dict.fromkeys((*table.axes, *level.axes)))
    return Table(Table(values, table.axes).aligned(axes) * level.aligned(axes), axes)
