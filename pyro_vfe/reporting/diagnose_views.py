r"""The latents as a reader counts them: every element a row, with what Q, the posterior and the prior say of its value.

    q[n, k]  =  Q(v_n = value_k)        p[n, k]  =  P(v_n = value_k | u)        prior[n, k]  =  P(v_n = value_k)

The sites of a Python loop, z_0, ..., z_T, are the elements of one latent here; the parts of a vector of latents
(`to_event`) are latents of their own.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from pyro.distributions import BetaBinomial, Binomial
from torch import Tensor

from pyro_vfe.engine.factors import Table
from pyro_vfe.program.enumeration import Enumeration
from pyro_vfe.program.supports import unwrapped
from pyro_vfe.reporting.variables import is_one_hot

_COUNTER = re.compile(r"\d+")
_LOOP = 3
"""So many sites with consecutive counters are a loop."""


@dataclass(frozen=True, eq=False)
class View:
    """A latent with its elements in rows."""

    site: str
    """Its name, or that of the first and the last site of a loop."""
    members: tuple[str, ...]
    """The sites."""
    values: tuple[str, ...]
    """Its K values, in words."""
    weights: Tensor
    """How much each element counts, `(N,)`: 1, but for `poutine.scale`."""
    posterior: Tensor
    """P(v_n | u), shape `(N, K)`."""
    q: Tensor | None
    """Q(v_n), shape `(N, K)`; None where it is not known."""
    prior: Tensor | None
    """P(v_n) before the data, shape `(N, K)`; None where it is not known."""
    has_labels: bool
    """Whether the values are names, rather than counts of something."""
    is_many: bool
    """Whether there are elements at all: a plate, a chain or a loop."""

    def used(self, probabilities: Tensor) -> Tensor:
        """How many elements have each value, expected, shape `(K,)`.

        Args:
            probabilities: Of each element's values, shape `(N, K)`.
        """
        return self.weights @ probabilities

    @property
    def count(self) -> float:
        """How many elements there are, by weight."""
        return float(self.weights.sum())


def views_of(
    run: Enumeration,
    posterior: Mapping[str, Table],
    q: Mapping[str, Table] | None,
    prior: Mapping[str, Table] | None,
) -> list[View]:
    """Returns the discrete latents of a model, those of their elements that are there.

    Those that only some values of other latents have are left out.

    Args:
        run: The factors.
        posterior: The marginals under the exact posterior.
        q: Those under Q, if they are known.
        prior: Those before the data, if they are known.
    """
    presence = {name: table for (role, name), table in run.presence.items() if role == "model"}
    unsure = {name for name, table in presence.items() if not run.supports.keys().isdisjoint(table.axes)}
    known = [name for name in posterior if name in run.supports and name not in unsure]
    single = {name: _view(name, run, posterior, q, prior) for name in known}
    loops = [[single.pop(name) for name in names] for names in _loops(run, single)]
    views = [*single.values(), *(_joined(members) for members in loops)]
    return [part for view in views for part in _parts(view, run.supports[view.members[0]])]


def _view(
    name: str,
    run: Enumeration,
    posterior: Mapping[str, Table],
    q: Mapping[str, Table] | None,
    prior: Mapping[str, Table] | None,
) -> View:
    axes = posterior[name].axes
    plates = tuple(axis for axis in axes if axis != name)
    rows = posterior[name].values.shape[:-1]
    there = run.presence.get(("model", name), Table(torch.tensor(True), ())).aligned(plates).expand(rows).reshape(-1)

    def flat(known: Mapping[str, Table] | None) -> Tensor | None:
        if known is None or name not in known:
            return None
        values = known[name].aligned(axes)
        return values.expand(*rows, values.shape[-1]).reshape(-1, values.shape[-1])[there]

    own = flat(posterior)
    assert own is not None
    scale = run.variables[name].scale
    # A subsample counts as what it is: so many elements that were looked at.
    share = prod(size / full_size for _, size, full_size in run.sites["model", name].subsampled)
    weights = scale.aligned(plates) if isinstance(scale, Table) else torch.tensor(float(scale))
    fn = run.sites["model", name].fn
    return View(
        site=name,
        members=(name,),
        values=tuple(f"{k}" for k in range(own.shape[-1])),
        weights=(weights.to(own) * share).expand(rows).reshape(-1)[there],
        posterior=own,
        q=flat(q),
        prior=flat(prior),
        has_labels=not isinstance(_innermost(fn), (Binomial, BetaBinomial)),
        is_many=bool(plates),
    )


def _innermost(fn: object) -> object:
    fn = unwrapped(fn)
    while hasattr(fn, "base_dist"):
        fn = unwrapped(fn.base_dist)
    return fn


def _loops(run: Enumeration, views: Mapping[str, View]) -> list[list[str]]:
    """The names of sites that are steps of one loop: equal but for their counters."""
    alike = defaultdict(list)
    for name in views:
        support = run.supports[name]
        site = run.sites["model", name]
        key = (_COUNTER.sub("#", name), tuple(support.shape), site.plate_names, tuple(site.steps))
        alike[key].append(name)
    return [names for names in alike.values() if len(names) > 1 and _is_loop(names, run)]


def _is_loop(names: Sequence[str], run: Enumeration) -> bool:
    """Whether sites whose names differ in numbers alone are steps, rather than latents each with its own meaning."""
    first = run.sites["model", names[0]]
    if any(not torch.equal(run.supports[name], run.supports[names[0]]) for name in names):
        return False
    if first.steps:
        return True
    counters = zip(*([int(digits) for digits in _COUNTER.findall(name)] for name in names), strict=True)
    columns = [sorted(set(column)) for column in counters]
    if len(names) < _LOOP or any(column[-1] - column[0] != len(column) - 1 for column in columns):
        return False
    if not first.plate_names:
        return True
    # Latents of a plate may be numbered without being steps, as the factors of a factorial model are.
    return any(other in run.factors["model", name].axes for name in names for other in names if other != name)


def _joined(members: Sequence[View]) -> View:
    """The steps of a loop as the elements of one latent."""
    first, last = members[0], members[-1]

    def stacked(tables: Sequence[Tensor | None]) -> Tensor | None:
        known = [table for table in tables if table is not None]
        return torch.cat(known) if len(known) == len(tables) else None

    return replace(
        first,
        site=f"{first.site} ... {last.site}",
        members=tuple(name for member in members for name in member.members),
        weights=torch.cat([member.weights for member in members]),
        posterior=torch.cat([member.posterior for member in members]),
        q=stacked([member.q for member in members]),
        prior=stacked([member.prior for member in members]),
        is_many=True,
    )


def _parts(view: View, support: Tensor) -> Iterator[View]:
    """The latent with its values in words; if it is a vector that takes every combination, its parts."""
    flat = support.reshape(len(support), -1)
    levels = [flat[:, part].unique() for part in range(flat.shape[1])]
    if support.dim() == 1 or prod(map(len, levels)) != len(flat):
        yield replace(view, values=_words(support))
        return
    for part, values in enumerate(levels):
        belongs = (flat[:, part, None] == values).to(view.posterior)
        yield replace(
            view,
            site=f"{view.site}[{part}]",
            values=_words(values),
            posterior=view.posterior @ belongs,
            q=None if view.q is None else view.q @ belongs,
            prior=None if view.prior is None else view.prior @ belongs,
        )


def _words(support: Tensor) -> tuple[str, ...]:
    """The values in words; of a one-hot vector, which entry is 1."""
    flat = support.reshape(len(support), -1)
    if is_one_hot(support):
        return tuple(str(k) for k in range(len(flat)))
    return tuple(f"{row.item():g}" if row.numel() == 1 else str(row.tolist()) for row in flat)
