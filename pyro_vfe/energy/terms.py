r"""The numbers of a decomposition, from one enumeration.

    energy - entropy        =  E[-log P(v, w, u)] - E[-log Q(v, w)]
    surprise + gap          =  log q(w) - log p(w, u)   +   KL( Q(v | w) || P(v | w, u) )
    complexity - accuracy   =  E[log Q(v, w) - log P(v, w)] - E[log P(u | v, w)]

w are the latents that the guide draws, continuous ones and discrete ones alike, v those that are summed. On average
over draws the surprise is above -log p(u) by KL( q(w) || p(w | u) ); the gap is exact for each draw.

The data's log-probabilities are large and common to both sides of the gap. Their maxima over the latents are taken out
first and added back to energy, surprise and accuracy alone: a gap of 1e-12 stands beside a surprise of 1e5.

References:
    Neal and Hinton (1998), A view of the EM algorithm that justifies incremental, sparse, and other variants.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_vfe.energy.parts import (
    Parts,
    conditionals_of,
    guide_graph,
    joint_graph,
    log_joint,
    log_likelihood,
    log_prior,
    log_q,
)
from pyro_vfe.energy.portioned import NO_PLATES, put_together
from pyro_vfe.engine.elimination import log_normalizer
from pyro_vfe.engine.expectation import Expectation, expected
from pyro_vfe.engine.factors import Factor, FactorGraph, Table
from pyro_vfe.engine.inference import marginals
from pyro_vfe.errors import ScaleError, StructureError
from pyro_vfe.program.enumeration import Enumeration


@dataclass(frozen=True, eq=False)
class Terms:
    """The terms of one free energy in nats: scalars, or one per element of a plate."""

    energy: Tensor
    entropy: Tensor
    surprise: Tensor
    gap: Tensor
    complexity: Tensor
    accuracy: Tensor
    unsplit: str | None = None
    """Why surprise and gap are NaN, in words; None where they are known."""

    @property
    def free_energy(self) -> Tensor:
        """The free energy itself."""
        return self.energy - self.entropy


NAMES = ("energy", "entropy", "surprise", "gap", "complexity", "accuracy")


def mean_terms(terms: Sequence[Terms]) -> Terms:
    """The mean over particles, term by term."""
    return Terms(
        **{name: torch.stack([getattr(term, name) for term in terms]).mean(0) for name in NAMES},
        unsplit=_unsplit(terms),
    )


def stacked_terms(terms: Sequence[Terms]) -> Terms:
    """Terms of several elements as one, with one entry per element."""
    return Terms(
        **{name: torch.stack([getattr(term, name) for term in terms]) for name in NAMES}, unsplit=_unsplit(terms)
    )


def _unsplit(terms: Sequence[Terms]) -> str | None:
    return next((term.unsplit for term in terms if term.unsplit is not None), None)


def together(inside: Terms, outside: Terms) -> Terms:
    """What is inside all elements, and what is outside of them, as one: term by term."""
    return Terms(
        **{name: getattr(inside, name).sum() + getattr(outside, name) for name in NAMES}, unsplit=inside.unsplit
    )


def measured(
    enumeration: Enumeration, *, keep_plates: frozenset[str] = NO_PLATES, max_bytes: float | None = None
) -> tuple[Terms, Terms]:
    """Returns the terms inside the kept plates, one per element, and the terms outside of them.

    Args:
        enumeration: The factors, in the precision that sums are to have.
        keep_plates: Plates whose elements are kept apart; with none all terms are outside.
        max_bytes: The most that intermediate tables may take.

    Raises:
        PlateError: A latent outside a kept plate ties its elements together.
        CostError: An elimination would not fit.
    """
    if enumeration.portions is None:
        return _measured(enumeration, keep_plates, max_bytes)
    found = [_measured(part, keep_plates, max_bytes) for part in enumeration.portions]
    inside = {
        name: put_together([getattr(own, name) for own, _ in found], enumeration.portions, keep_plates)
        for name in NAMES
    }
    outside = stacked_terms([own for _, own in found])
    why = outside.unsplit
    return Terms(**inside, unsplit=why), Terms(**{n: getattr(outside, n).sum() for n in NAMES}, unsplit=why)


def _measured(enumeration: Enumeration, keep_plates: frozenset[str], max_bytes: float | None) -> tuple[Terms, Terms]:
    shifted, offsets = _shifted(enumeration)
    measure = _Measure(shifted, keep_plates)
    q, joint = (measure(part(shifted, max_bytes, keep_plates)) for part in (log_q, log_joint))
    likelihood = log_likelihood(shifted)
    data = None if likelihood is None else measure(likelihood)
    common = measure(Parts(shifted.graph(), (), offsets))
    drawn = _log_q_of_draws(shifted, keep_plates, max_bytes, measure)
    # Where the model sums out all its latents, their prior sums to one and the joint is log p(w, u) already.
    trivial = not shifted.guided and not shifted.model_draws
    prior = measure(Parts(shifted.graph(), (), ()) if trivial else log_prior(shifted, max_bytes, keep_plates))
    evidence, unsplit = _log_evidence(shifted, keep_plates, max_bytes) if shifted.guided else (joint, None)
    found = (
        _assembled(q[i], joint[i], prior[i], None if data is None else data[i], common[i], evidence[i], drawn[i])
        for i in range(2)
    )
    return tuple(replace(terms, unsplit=unsplit) for terms in found)  # type: ignore[return-value]


Pair = tuple[Tensor, Tensor]
"""What is inside the kept plates, and what is outside."""


def _assembled(
    q: Tensor, joint: Tensor, prior: Tensor, data: Tensor | None, common: Tensor, evidence: Tensor, drawn: Tensor
) -> Terms:
    free_energy, surprise = q - joint, drawn - evidence
    complexity = q - prior
    accuracy = complexity - free_energy if data is None else data
    gap = torch.where(free_energy.isposinf(), free_energy, free_energy - surprise)
    return Terms(
        energy=-(joint + common),
        entropy=-q,
        surprise=surprise - common,
        gap=gap,
        complexity=complexity,
        accuracy=accuracy + common,
    )


class _Measure:
    """The expectation of a part: directly, or given draws that tell of the latents, under Q(v | w)."""

    def __init__(self, enumeration: Enumeration, keep_plates: frozenset[str]) -> None:
        self.enumeration = enumeration
        self.keep_plates = keep_plates
        self.tied = enumeration.draws_tell_of_latents

    def __call__(self, part: Parts) -> Pair:
        if self.tied:
            return _pair(_expected_given_draws(part, self.enumeration, self.keep_plates))
        return _pair(part.expectation(self.keep_plates))


def _expected_given_draws(part: Parts, enumeration: Enumeration, keep_plates: frozenset[str]) -> Expectation:
    """The expectation of the costs under Q(v | w), from marginals of the guide's graph with the draws in it."""
    if part.graph.variables.keys() - enumeration.variables.keys():
        raise StructureError(
            "The guide draws a site that depends on a latent it enumerates, while latents that only the model "
            "has tie the "
            "elements of a plate together: this free energy has no decomposition here.",
            hint="Give the guide those latents too.",
        )
    chains = [factor.name for factor in (*enumeration.guide_latents, *part.costs) if factor.first is not None]
    if chains:
        raise StructureError(
            f"The guide draws a site that depends on a latent it enumerates, while '{chains[0]}' is a chain: this free"
            " energy has no decomposition here.",
            hint="Draw the site without looking at the latents, or write the chain as a Python loop.",
        )
    factors = (*conditionals_of(enumeration), *enumeration.guide_draws)
    costs = [_without_draws(factor, enumeration) for factor in part.costs]
    known = enumeration.graph(*factors, *costs)
    variables = {name: v for name, v in known.variables.items() if name not in enumeration.draws}
    graph = replace(known, factors=tuple(_without_draws(f, enumeration) for f in factors), variables=variables)
    scopes = dict.fromkeys(tuple(graph.scope(cost)) for cost in costs if graph.scope(cost))
    probabilities = marginals(graph, scopes)
    averaged = [_averaged(cost, graph, probabilities) for cost in costs]
    return expected(graph, (), averaged, keep_plates=keep_plates)


def _averaged(cost: Factor, graph: FactorGraph, probabilities: dict[tuple[str, ...], Table]) -> Factor:
    scope = tuple(graph.scope(cost))
    if not scope:
        return cost
    weights = probabilities[scope]
    plates = tuple(dict.fromkeys(axis for axis in (*cost.table.axes, *weights.axes) if axis not in scope))
    q, values = weights.aligned((*plates, *scope)), cost.table.aligned((*plates, *scope))
    total = torch.where(q > 0, q * values, 0.0).sum(tuple(range(-len(scope), 0)))
    return replace(cost, table=Table(total, plates))


def _without_draws(factor: Factor, enumeration: Enumeration) -> Factor:
    """The factor without the axes of size one that stand for draws."""
    return replace(factor, table=factor.table.without(enumeration.draws))


def _log_q_of_draws(
    enumeration: Enumeration, keep_plates: frozenset[str], max_bytes: float | None, measure: _Measure
) -> Pair:
    """log q(w)."""
    if measure.tied:
        return _normalizer(guide_graph(enumeration), keep_plates, max_bytes)
    return _pair(Parts(enumeration.graph(), (), enumeration.guide_draws).expectation(keep_plates))


def _log_evidence(
    enumeration: Enumeration, keep_plates: frozenset[str], max_bytes: float | None
) -> tuple[Pair, str | None]:
    """log p(w, u); NaN, and why, where weights leave the sum over all latents no value."""
    try:
        return _normalizer(joint_graph(enumeration), keep_plates, max_bytes), None
    except ScaleError as error:
        inside = [enumeration.plates[plate] for plate in sorted(keep_plates)]
        return (torch.full(inside, torch.nan), torch.tensor(torch.nan)), error.problem


def _normalizer(graph: FactorGraph, keep_plates: frozenset[str], max_bytes: float | None) -> Pair:
    result = log_normalizer(graph, keep_plates=keep_plates, max_bytes=max_bytes)
    return result.inside.values, result.outside


def _pair(expectation: Expectation) -> Pair:
    return expectation.inside.values, expectation.outside


def _shifted(enumeration: Enumeration) -> tuple[Enumeration, tuple[Factor, ...]]:
    """The enumeration with each datum's largest log-probability taken out, and what was taken."""
    factors, offsets = dict(enumeration.factors), []
    for key, factor in enumeration.factors.items():
        dims = [dim for dim, axis in enumerate(factor.table.axes) if axis in enumeration.variables]
        if key[0] != "model" or enumeration.sites[key].kind != "observed":
            continue
        peak = factor.table.values.amax(dims, keepdim=True) if dims else factor.table.values
        peak = torch.where(peak.isfinite(), peak, 0.0)
        axes = tuple(axis for axis in factor.table.axes if axis not in enumeration.variables)
        factors[key] = replace(factor, table=Table(factor.table.values - peak, factor.table.axes))
        offsets.append(replace(factor, table=Table(peak.squeeze(dims) if dims else peak, axes)))
    return enumeration.with_factors(factors, enumeration.variables), tuple(offsets)
