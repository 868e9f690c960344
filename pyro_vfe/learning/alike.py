r"""Components that are alike: a point of F that no gradient and no M-phase leaves, whatever lies beside it.

    P(u, .. | v = j)  =  P(u, .. | v = k)    for all that depends on v    =>    Q(v = j) / Q(v = k) is the prior's

so that both components learn the same. It is a saddle point where they fit the data better apart, and an optimum where
there are more components than the data tell apart: only another start tells which.

References:
    Fukumizu and Amari (2000), Local minima and plateaus in hierarchical structures of multilayer perceptrons.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vfe.program.enumeration import Enumeration
from pyro_vfe.program.masking import unmasked
from pyro_vfe.program.recorder import Site

_ALIKE = 1e-9
"""The relative difference between log-probabilities up to which components count as alike."""

WORTH = 1.0
"""A parameter is worth so many nats (Akaike 1974): a random start that gains less shows no saddle."""

UNKNOWN = "No step tells them apart, and whether F is at a saddle point only another start shows."
APART = "Start their parameters at different values, at random, or let vfe.EM(...).run(n_init=10) find a start."

Alike = Mapping[str, tuple[tuple[int, ...], ...]]
"""For each latent with such values the groups of them that are alike, as indices of its support."""

Facts = Mapping[tuple[str, ...], str]
"""What is alike in words, by the names of the latents."""

_NAMED = 3
"""So many latents are named."""


def alike_states(enumeration: Enumeration) -> Alike:
    """Returns the values of latents under which all that depends on them is equally probable.

    Args:
        enumeration: The factors.
    """
    groups: dict[str, list[list[int]]] = {}
    for factor in (*enumeration.observed, *enumeration.model_latents):
        hidden = _is_hidden(enumeration.sites["model", factor.name])
        for table in () if hidden else factor.tables:
            for name in table.axes:
                if name == factor.name or name not in enumeration.variables:
                    continue
                known = groups.get(name, [list(range(table.sizes[name]))])
                if known:
                    rows = table.values.detach().movedim(table.axes.index(name), 0)
                    rows = rows.reshape(len(rows), -1)
                    groups[name] = [part for group in known for part in _parts(group, rows)]
    return {name: tuple(map(tuple, found)) for name, found in groups.items() if found}


def alike_latents(enumeration: Enumeration) -> Facts:
    """Returns latents none of whose values the data tell apart although they read them, and the fact in words.

    Args:
        enumeration: The factors.
    """
    return facts(whole(alike_states(enumeration), enumeration), enumeration)


def note_on(fact: str) -> str:
    """A note of a run that does not know what a random start would gain.

    Args:
        fact: What is alike.
    """
    return f"{fact} {UNKNOWN} {APART}"


def worth_saying(alike: Alike, gain: float | None, enumeration: Enumeration) -> Facts:
    """Returns what is alike at the end of a run of EM and should not be, in words.

    Args:
        alike: Which values are.
        gain: By how much a random start ended lower that told them apart, in nats; None where there was none.
        enumeration: The factors at the end.
    """
    # Some of the values may be alike by design.
    return facts(alike if gain is not None and gain > WORTH else whole(alike, enumeration), enumeration)


def facts(alike: Alike, enumeration: Enumeration) -> Facts:
    """Returns what is alike, in words, by latents, those together of which the same is true: the steps of a loop, say.

    Args:
        alike: Groups of values by latent.
        enumeration: The factors.
    """
    together: dict[tuple[Any, ...], list[str]] = {}
    for name, groups in alike.items():
        together.setdefault((enumeration.variables[name].size, groups), []).append(name)
    return {tuple(names): _fact(names, groups, size) for (size, groups), names in together.items()}


def _fact(names: Sequence[str], groups: tuple[tuple[int, ...], ...], size: int) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    listed = ", ".join(f"'{name}'" for name in names[:_NAMED]) + more
    own = listed if len(names) == 1 else "each"
    if len(groups[0]) == size:
        return f"What depends on {listed} is equally probable under every value of {own}: the components are alike."
    values = "; ".join(", ".join(map(str, group)) for group in groups)
    return f"What depends on {listed} is equally probable under some values of {own} ({values}): these are alike."


def verdict(gain: float | None) -> tuple[str, str]:
    """What follows for a run of EM, and the way out, in words.

    Args:
        gain: By how much a random start ended lower, in nats; None where there was none.
    """
    if gain is None:
        return UNKNOWN, APART
    if gain > WORTH:
        return f"F is at a saddle point: a random start, which told them apart, ended {gain:.4g} nats lower.", APART
    return (
        f"Random starts, of a few iterations each, gained {max(gain, 0.0):.2g} nats by telling them apart, no more "
        "than a parameter is worth.",
        "As far as these starts tell, fewer components do as well.",
    )


def whole(alike: Alike, enumeration: Enumeration) -> Alike:
    """Returns the latents all of whose values are alike.

    Args:
        alike: Groups of values.
        enumeration: The factors.
    """
    sizes = {name: enumeration.variables[name].size for name in alike}
    return {name: groups for name, groups in alike.items() if len(groups[0]) == sizes[name]}


def _is_hidden(site: Site) -> bool:
    """Whether a site is masked out everywhere: it then tells nothing of what it reads."""
    mask = unmasked(site)[1]
    return mask is not None and not bool(torch.as_tensor(mask).any())


def _parts(group: list[int], rows: Tensor) -> list[list[int]]:
    """The members of a group whose rows are equal, but for rounding, those together that are."""
    # A sum per row tells most of them apart.
    sums = rows.nan_to_num(neginf=-1.0).sum(1).tolist()
    parts: list[list[int]] = []
    for state in group:
        for part in parts:
            size = 1 + abs(sums[state])
            if abs(sums[part[0]] - sums[state]) <= _SUM * size and _are_equal(rows[part[0]], rows[state]):
                part.append(state)
                break
        else:
            parts.append([state])
    return [part for part in parts if len(part) > 1]


_SUM = 1e-6
"""Sums of rows that are alike differ by no more, relative to themselves."""


def _are_equal(one: Tensor, other: Tensor) -> bool:
    # Where one value is impossible (-inf) and another is not, their difference is infinite.
    return bool(((one == other) | ((one - other).abs() <= _ALIKE * (1 + one.abs()))).all())
