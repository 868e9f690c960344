r"""The parts of a free energy, as factors: what is expected, and under what.

    log Q(v, w)       guide-only latents summed out of the guide
    log P(v, w, u)    model-only latents summed out of the model
    log P(v, w)       the same without the data

v are the latents that both programs have, w the draws. All three are lists of tables over the same variables.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from pyro_vfe.energy.portioned import NO_PLATES, HasExpectation, PortionedParts
from pyro_vfe.engine.elimination import eliminate
from pyro_vfe.engine.execution import without_plates
from pyro_vfe.engine.expectation import Expectation, expected
from pyro_vfe.engine.factors import Factor, FactorGraph, Scale, Table, Variable
from pyro_vfe.engine.logspace import log_sum_exp
from pyro_vfe.engine.scales import applied, same_scale
from pyro_vfe.engine.structure import Unrolling, tied_inside, unrolled
from pyro_vfe.engine.sum_order import check_sums
from pyro_vfe.engine.unrolling import apply_unrolling, structure_of
from pyro_vfe.errors import ScaleError
from pyro_vfe.program.enumeration import Enumeration
from pyro_vfe.program.path_axis import PATH


@dataclass(frozen=True, eq=False)
class Parts:
    """A term of F: its tables, and the guide under which they are expected."""

    graph: FactorGraph
    """Variables and plates, with plates written out where the elimination had to."""

    conditionals: tuple[Factor, ...]
    """The guide's conditionals, in order of sampling; a draw that needs the score function is one of value one."""

    costs: tuple[Factor, ...]
    """What is expected."""

    def expectation(
        self, keep_plates: frozenset[str] = NO_PLATES, downstream_of: frozenset[str] = NO_PLATES
    ) -> Expectation:
        """The expectation of the costs under the guide."""
        return expected(self.graph, self.conditionals, self.costs, keep_plates=keep_plates, downstream_of=downstream_of)


def conditionals_of(enumeration: Enumeration) -> tuple[Factor, ...]:
    """The guide's conditionals in order of sampling, its score-function draws among them."""
    result = []
    for (role, name), factor in enumeration.factors.items():
        if role != "guide" or name not in enumeration.variables:
            continue
        if name not in enumeration.draws:
            result.append(factor)
            continue
        score = enumeration.scores.get(name, enumeration.own_scores.get(name, factor))
        if score is not None:
            # One value, with weight exp(0) = 1 and gradient d log q: the estimator DiCE.
            score = _drawn_as_one(score, enumeration)
            values = score.table.values.masked_fill(score.table.values.isneginf(), 0.0)
            result.append(replace(score, table=Table(values - values.detach(), score.table.axes)))
    return tuple(result)


def _drawn_as_one(factor: Factor, enumeration: Enumeration) -> Factor:
    """The factor of a draw over the plates of its variable.

    A chain is one draw, since later elements hang on it, and so is what is read from outside of a plate.
    """
    variable = enumeration.variables[factor.name]
    along = factor.plates - variable.plates
    if not along:
        return factor
    whole = without_plates(replace(factor, scale=1.0), along, enumeration.graph(factor))
    return replace(whole, scale=variable.scale)


def log_q(enumeration: Enumeration, max_bytes: float | None = None, keep_plates: frozenset[str] = NO_PLATES) -> Parts:
    """log Q(v, w), with guide-only latents summed out."""
    own = frozenset(factor.name for factor in enumeration.guide_latents) - enumeration.guided
    factors = (*enumeration.guide_latents, *enumeration.guide_draws)
    return _parts(enumeration, factors, own, max_bytes, keep_plates)


def log_joint(
    enumeration: Enumeration, max_bytes: float | None = None, keep_plates: frozenset[str] = NO_PLATES
) -> Parts:
    """log P(v, w, u), with model-only latents summed out."""
    factors = (*enumeration.model_latents, *enumeration.model_draws, *enumeration.observed)
    return _parts(enumeration, factors, _model_only(enumeration), max_bytes, keep_plates)


def log_prior(
    enumeration: Enumeration, max_bytes: float | None = None, keep_plates: frozenset[str] = NO_PLATES
) -> Parts:
    """log P(v, w), with model-only latents summed out."""
    factors = (*enumeration.model_latents, *enumeration.model_draws)
    return _parts(enumeration, factors, _model_only(enumeration), max_bytes, keep_plates)


def log_likelihood(enumeration: Enumeration) -> Parts | None:
    """log P(u | v, w); None where model-only latents tie data and latents together."""
    if _model_only(enumeration):
        return None
    return _parts(enumeration, enumeration.observed, NO_PLATES, None, NO_PLATES)


def joint_graph(enumeration: Enumeration) -> FactorGraph:
    """log P(v, w, u) over all latents of the model: its normaliser is log p(w, u)."""
    return enumeration.graph(*enumeration.model_latents, *enumeration.model_draws, *enumeration.observed)


def prior_graph(enumeration: Enumeration) -> FactorGraph:
    """log P(v, w) over all latents of the model: its normaliser is log p(w)."""
    return enumeration.graph(*enumeration.model_latents, *enumeration.model_draws)


def guide_graph(enumeration: Enumeration) -> FactorGraph:
    """log Q(v, w) over all latents of the guide: its normaliser is log q(w)."""
    graph = enumeration.graph(*enumeration.guide_latents, *enumeration.guide_draws)
    # Draws that depend on the latents weigh them: only without these is each sum over a latent one.
    return replace(graph, normalized=not enumeration.draws_tell_of_latents)


def unweighted(graph: FactorGraph) -> FactorGraph:
    """The graph without its weights, but for those of zero: for what can be at all, which weights do not change.

    Args:
        graph: The factors.
    """
    factors = tuple(applied(replace(factor, scale=_counts(factor.scale))) for factor in graph.factors)
    variables = {name: replace(variable, scale=1.0) for name, variable in graph.variables.items()}
    return replace(graph, factors=factors, variables=variables, subsampled={})


def _counts(scale: Scale) -> Scale:
    """One where something counts at all, zero elsewhere."""
    if not isinstance(scale, Table):
        return float(scale != 0)
    return Table((scale.values != 0).to(scale.values.dtype), scale.axes)


def free_energy_parts(
    enumeration: Enumeration, max_bytes: float | None = None, keep_plates: frozenset[str] = NO_PLATES
) -> Sequence[HasExpectation]:
    """log Q - log P as one part where guide and model share a graph, as two where one had plates written out.

    One part that sums portions, where the tables are made so.
    """
    if enumeration.portions is not None:
        return [PortionedParts(enumeration.portions, partial(free_energy_parts, max_bytes=max_bytes))]
    q, joint = log_q(enumeration, max_bytes, keep_plates), log_joint(enumeration, max_bytes, keep_plates)
    joint = Parts(joint.graph, joint.conditionals, negative(joint.costs))
    if q.graph.variables.keys() | joint.graph.variables.keys() <= enumeration.variables.keys():
        everything = enumeration.graph(*q.conditionals, *q.costs, *joint.costs)
        return [Parts(everything, q.conditionals, (*q.costs, *joint.costs))]
    return [q, joint]


def negative(parts: Sequence[Factor]) -> tuple[Factor, ...]:
    """The factors with their signs turned."""
    return tuple(factor.mapped(lambda table: Table(-table.values, table.axes)) for factor in parts)


def normalized(enumeration: Enumeration, dtype: torch.dtype) -> Enumeration:
    """The enumeration in another precision, with the guide's conditionals normalised to that precision."""

    def converted(role: str, factor: Factor) -> Factor:
        scale = factor.scale.to(dtype) if isinstance(factor.scale, Table) else factor.scale
        # A draw has one value, whose probability is not 1.
        is_guide = role == "guide" and factor.name not in enumeration.draws
        return replace(
            factor.mapped(lambda table: _precise(table, dtype, factor.name if is_guide else None)), scale=scale
        )

    if enumeration.portions is not None:
        return replace(enumeration, portions=enumeration.portions.mapped(partial(normalized, dtype=dtype)))
    factors = {key: converted(key[0], factor) for key, factor in enumeration.factors.items()}
    variables = {
        name: replace(variable, scale=variable.scale.to(dtype) if isinstance(variable.scale, Table) else variable.scale)
        for name, variable in enumeration.variables.items()
    }
    return enumeration.with_factors(factors, variables)


def _precise(table: Table, dtype: torch.dtype, normalized_over: str | None) -> Table:
    values = table.to(dtype)
    if normalized_over not in values.axes or table.values.dtype == dtype:
        return values
    total = log_sum_exp(values.values, (values.axes.index(normalized_over),))
    rest = tuple(axis for axis in values.axes if axis != normalized_over)
    return Table(values.values - Table(total, rest).aligned(values.axes), values.axes)


def _model_only(enumeration: Enumeration) -> frozenset[str]:
    path = (PATH,) if enumeration.choices else ()
    return frozenset((*(factor.name for factor in enumeration.model_latents), *path)) - enumeration.guided


def _parts(
    enumeration: Enumeration,
    factors: tuple[Factor, ...],
    summed: frozenset[str],
    max_bytes: float | None,
    keep_plates: frozenset[str],
) -> Parts:
    conditionals = conditionals_of(enumeration)
    graph = enumeration.graph(*conditionals, *factors)
    if not summed:
        return Parts(graph, conditionals, factors)
    check_sums(replace(graph, factors=factors), frozenset(graph.variables) - summed)
    _check_weights(graph, factors, summed)
    # A weight that a latent decides stays with a latent of the guide, which is not summed here.
    factors = tuple(applied(factor) if _weighed_by_latents(factor) else factor for factor in factors)
    while True:
        part = replace(graph, factors=factors, variables=_mentioned(graph, factors, summed))
        kept = frozenset(part.variables) - summed
        elimination = eliminate(part, keep=kept, keep_plates=keep_plates, max_bytes=max_bytes)
        if not elimination.unrollings:
            return Parts(graph, conditionals, elimination.factors)
        first = elimination.unrollings[0]
        graph, conditionals, factors, unrolling = _unrolled(graph, conditionals, factors, first)
        summed = frozenset(copy for name in summed for copy in _copies(name, unrolling))


def _check_weights(graph: FactorGraph, factors: Sequence[Factor], summed: frozenset[str]) -> None:
    """A latent summed out of the model may not tie together weighted latents of the guide inside a plate it is above.

    The weights would stand inside its sum as powers, and F would bound nothing.
    """
    others = graph.variables.keys() - summed
    if not others:
        return
    tied = {name: name for name in graph.variables}

    def root(name: str) -> str:
        while tied[name] != name:
            name = tied[name]
        return name

    for factor in factors:
        scope = graph.scope(factor)
        for name in scope if not summed.isdisjoint(scope) else ():
            tied[root(name)] = root(scope[0])
    for name in summed:
        for other in others:
            inside = not graph.variables[other].plates <= graph.variables[name].plates
            one, two = graph.variables[name].scale, graph.variables[other].scale
            if inside and root(name) == root(other) and not same_scale(one, two):
                is_above = graph.variables[name].plates < graph.variables[other].plates
                or_without = f", or leave '{other}' out of it" if is_above else ""
                raise ScaleError(
                    f"Latent '{name}' is summed out inside the model above plate latents '{other}' of the guide, which "
                    "carry weights (poutine.scale): the weighted sum is no bound on anything.",
                    hint=f"Give the guide '{name}' too{or_without}.",
                )


def _weighed_by_latents(term: Factor | Variable) -> bool:
    return isinstance(term.scale, Table) and not term.plates.issuperset(term.scale.axes)


def _mentioned(graph: FactorGraph, factors: Sequence[Factor], summed: frozenset[str]) -> dict[str, Variable]:
    """The variables of some factors; one that stays, and whose weight is in its factor, has none of its own."""
    names = {axis for factor in factors for axis in factor.axes}
    return {
        name: replace(variable, scale=1.0) if name not in summed and _weighed_by_latents(variable) else variable
        for name, variable in graph.variables.items()
        if name in names
    }


def _unrolled(
    graph: FactorGraph,
    conditionals: tuple[Factor, ...],
    factors: tuple[Factor, ...],
    wanted: Unrolling,
) -> tuple[FactorGraph, tuple[Factor, ...], tuple[Factor, ...], Unrolling]:
    """Writes a plate out in the guide and in the model alike."""
    both = replace(graph, factors=(*conditionals, *factors))
    structure = structure_of(both)
    unrolling = wanted._replace(variables=tied_inside(structure, wanted.plate, wanted.variables))
    _, sources = unrolled(structure, unrolling)
    result = apply_unrolling(both, unrolling)
    split = sum(source.factor < len(conditionals) for source in sources)
    return replace(result, factors=()), result.factors[:split], result.factors[split:], unrolling


def _copies(name: str, unrolling: Unrolling) -> tuple[str, ...]:
    return unrolling.copies(name) if name in unrolling.variables else (name,)
