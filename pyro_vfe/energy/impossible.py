"""Free energies that are not finite: which site, at which value, and the way out.

F = +inf        exactly where Q(v|u) > 0 and P(v, u|G) = 0 for some v
surprise = +inf exactly where P(v, u|G) = 0 for every v
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vfe.energy.parts import free_energy_parts, guide_graph, joint_graph, unweighted
from pyro_vfe.energy.portioned import normalizer_of
from pyro_vfe.energy.terms import NAMES, Terms, measured
from pyro_vfe.engine.factors import Factor, FactorGraph, Table
from pyro_vfe.engine.inference import holds_log_probabilities, marginals
from pyro_vfe.errors import ImpossibleDataError, NotFiniteError, VFEError
from pyro_vfe.program.enumeration import Enumeration
from pyro_vfe.program.layout import Program
from pyro_vfe.program.missing_data import shown_gaps, way_out_of_nan
from pyro_vfe.program.parameters import nan_parameters

_MOST_NAMED = 5


def check_possible(terms: Terms, enumeration: Enumeration) -> None:
    """Checks that the data have positive probability under the model and that nothing is NaN.

    Raises:
        ImpossibleDataError: log p(u) is -inf.
        NotFiniteError: Some table holds NaN or +inf.
    """
    if enumeration.portions is not None and _are_finite(terms):
        return  # Tables that are made in portions are not made once more to look at them.
    check_numbers(enumeration)
    unknown = terms.unsplit is not None and bool(terms.free_energy.isposinf().any())
    if bool(terms.surprise.isposinf().any()) or (unknown and _is_impossible(enumeration)):
        raise impossible_data(enumeration)


def check_numbers(enumeration: Enumeration) -> None:
    """Checks that all tables hold log-probabilities.

    Raises:
        NotFiniteError: Some table holds NaN or +inf.
    """
    part, _ = _portion_where(enumeration, lambda part: bool(_without_numbers(part)))
    names = _without_numbers(part)
    if names:
        raise NotFiniteError(
            f"The log-probabilities of {', '.join(names[:_MOST_NAMED])} hold NaN or +inf.",
            hint=way_out_of_nan(part.sites.values()),
        )


def _are_finite(terms: Terms) -> bool:
    return all(bool(getattr(terms, name).isfinite().all()) for name in NAMES)


def _without_numbers(enumeration: Enumeration) -> list[str]:
    """The sites whose tables hold NaN or +inf."""
    return [f"'{f.name}'" for f in enumeration.factors.values() if not holds_log_probabilities(f)]


def _portion_where(
    enumeration: Enumeration, holds: Callable[[Enumeration], bool]
) -> tuple[Enumeration, dict[str, int]]:
    """The first portion for which something holds, and the element that it begins with; otherwise the last.

    An enumeration that is made whole is its only portion.
    """
    if enumeration.portions is None:
        return enumeration, {}
    for start, length in enumeration.portions.stretches:
        part = enumeration.portions.make(start, length)
        if holds(part):
            break
    return part, {enumeration.portions.plate: start}


def _is_impossible(enumeration: Enumeration) -> bool:
    return bool(normalizer_of(enumeration, lambda part: unweighted(joint_graph(part))).total.isneginf())


def _is_forbidden(enumeration: Enumeration) -> bool:
    return bool(measured(enumeration)[1].gap.isposinf())


def impossible_data(enumeration: Enumeration) -> VFEError:
    """The error for data of probability zero, naming the observations that rule everything out.

    Where something is drawn it may be the draw that is impossible, and not the data.
    """
    enumeration, begin = _portion_where(enumeration, _is_impossible)
    drawn = _ruled_out(enumeration.model_draws, enumeration, begin)
    if drawn:
        return NotFiniteError(
            f"F is +inf: the model gives probability zero to what the guide drew at {drawn}.",
            hint="Give the guide the same zeros as the model.",
        )
    given = " at what the guide drew" if enumeration.is_sampled else ""
    ruled_out = _ruled_out(enumeration.observed, enumeration, begin)
    if ruled_out:
        fact = f"Observed site {ruled_out} has probability zero under every value of the latents{given}"
    else:
        fact = f"No joint value of the latents explains all observations{given}: each has probability zero"
    return ImpossibleDataError(
        f"The data have probability zero under the model{given}. {fact}.",
        hint="Check the data and the parameters, or give the model a probability that is small instead of zero.",
    )


def _ruled_out(factors: Iterable[Factor], enumeration: Enumeration, begin: Mapping[str, int]) -> str:
    """The sites that are impossible by themselves, whatever the latents that are enumerated, with the first place."""
    names = []
    for factor in factors:
        dims = [dim for dim, axis in enumerate(factor.table.axes) if axis in enumeration.variables]
        axes = tuple(axis for axis in factor.table.axes if axis not in enumeration.variables)
        best = factor.table.values.amax(dims) if dims else factor.table.values
        if bool(best.isneginf().any()):
            names.append(f"'{factor.name}'{_first_place(best.isneginf(), axes, begin)}")
    return ", ".join(names[:_MOST_NAMED])


@dataclass(frozen=True)
class Clash:
    """Where the guide puts mass that the model forbids."""

    words: str
    """Site, values and place."""
    site: str | None = None
    """The model's site that forbids it; None where no single one does."""
    latents: tuple[str, ...] = ()
    """The latents at whose values it does."""

    def __str__(self) -> str:
        return self.words


def culprits(enumeration: Enumeration) -> tuple[Clash, ...]:
    """Where the guide puts mass that the model forbids."""
    enumeration, begin = _portion_where(enumeration, _is_forbidden)
    result = []
    guide = unweighted(guide_graph(enumeration))
    known = frozenset(f.name for f in enumeration.guide_latents)
    for (role, _), factor in enumeration.factors.items():
        scope = tuple(axis for axis in factor.table.axes if axis in enumeration.supports)
        if role == "guide" or factor.first is not None or not known.issuperset(scope):
            continue
        some = bool(factor.table.values.isneginf().any())
        found = _forbidden(factor, scope, guide, enumeration, begin) if some else None
        if found:
            words = f"the guide gives positive probability to {found}, where site '{factor.name}' has probability zero"
            result.append(Clash(words, factor.name, scope))
    return tuple(result[:_MOST_NAMED]) or (
        Clash("the guide puts mass where the model, with its own latents summed out, has none"),
    )


def _forbidden(
    factor: Factor, scope: tuple[str, ...], guide: FactorGraph, enumeration: Enumeration, begin: Mapping[str, int]
) -> str | None:
    certain = Table(factor.table.values.new_ones(()), ())
    weights = marginals(guide, [scope])[scope] if scope else certain
    axes = (*dict.fromkeys(a for a in (*weights.axes, *factor.table.axes) if a not in scope), *scope)
    both = (weights.aligned(axes) > 0) & factor.table.aligned(axes).isneginf()
    places = both.nonzero()
    if not len(places):
        return None
    words = []
    for axis, index in zip(axes, places[0].tolist(), strict=True):
        if axis in enumeration.supports:
            words.append(f"{axis} = {_shown(enumeration.supports[axis][index])}")
        elif axis in enumeration.plates:
            words.append(f"{axis} element {index + begin.get(axis, 0)}")
    return ", ".join(words) or "this draw"


def not_finite(
    runs: Sequence[Enumeration],
    value: float,
    programs: tuple[Program, Program],
) -> VFEError:
    """The error for a training step whose free energy is not finite: nothing is differentiated then.

    Args:
        runs: What the free energy was computed from.
        value: What it is.
        programs: The model and the guide.
    """
    with torch.no_grad():
        if not math.isnan(value) and value > 0:
            run = next((run for run in runs if _is_infinite(run)), runs[0]) if len(runs) > 1 else runs[0]
            if _is_impossible(run):
                return impossible_data(run)
            return NotFiniteError(
                f"F is +inf: {'; '.join(map(str, culprits(run)))}.",
                hint="Give the guide the same zeros as the model. A site that others determine (an OR, say) is best "
                "left out of the guide: it is then summed out inside the model.",
            )
        return _not_a_number(runs[0], value, programs)


def _is_infinite(run: Enumeration) -> bool:
    """Whether the draws of a run are the impossible ones."""
    return any(part.expectation().total.item() == math.inf for part in free_energy_parts(run))


def _not_a_number(
    enumeration: Enumeration,
    value: float,
    programs: tuple[Program, Program],
) -> NotFiniteError:
    enumeration, _ = _portion_where(enumeration, lambda part: bool(_without_numbers(part)))
    bad = [
        f"'{factor.name}' of the {role}"
        for (role, _), factor in enumeration.factors.items()
        if not holds_log_probabilities(factor)
    ]
    names = nan_parameters(*programs)
    cause = f" Parameters that hold NaN: {', '.join(names)}." if names else ""
    where = f" It comes from the log-probability of site {', '.join(bad[:_MOST_NAMED])}." if bad else ""
    gaps = shown_gaps(enumeration.sites.values())
    return NotFiniteError(
        f"F is {value}.{where}{cause}",
        hint=" ".join(gaps)
        if gaps is not None
        else "Set the parameters to finite values (a smaller learning rate keeps them so); this step changed nothing.",
    )


def _first_place(where: Tensor, axes: Sequence[str], begin: Mapping[str, int]) -> str:
    if not axes:
        return ""
    index = where.nonzero()[0].tolist()
    places = (f"{axis} element {i + begin.get(axis, 0)}" for axis, i in zip(axes, index, strict=True))
    return f" ({', '.join(places)})"


def _shown(value: Tensor) -> str:
    return f"{value.item():g}" if value.dim() == 0 else str(value.tolist())
