"""Programs that do not broadcast over the values of some latents: one run per value, and the tables put together.

    table[z = k, ...]  =  the table of the run in which z was k, at all elements of z's plates at once

Latents that no site reads together share a run: the runs are as many as the joint values of those that some site reads.
What the program computes out of sight of torch's functions, in a scripted function say, is found by moving one latent
at a time.
"""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_vfe.errors import (
    CostError,
    VFEError,
    VFEWarning,
    callers_level,
)
from pyro_vfe.program.branches import MAX_RUNS
from pyro_vfe.program.colouring import coloured
from pyro_vfe.program.enumeration import SiteKey
from pyro_vfe.program.escapes import NO_SITES, Sites, blamed
from pyro_vfe.program.layout import Layout, Program
from pyro_vfe.program.log_prob import log_prob
from pyro_vfe.program.masking import masked, unmasked, without_gaps
from pyro_vfe.program.randomness import random_state, set_random_state
from pyro_vfe.program.recorder import Plate, Role, Site, at_all_elements, record_both
from pyro_vfe.program.sizeless import SizelessPlates
from pyro_vfe.program.spot_check_plates import agree
from pyro_vfe.program.supports import finite_support

_MOST_MOVES = 256
"""The most ordinary runs in which one latent is moved."""

_Arguments = tuple[Program, Program, tuple[Any, ...], Mapping[str, Any]]


def values_apart(layout: Layout, error: Exception, programs: _Arguments, given: Mapping[str, Tensor]) -> Layout | None:
    """Returns a layout in which further latents take their values one at a time; None where that mends nothing.

    Args:
        layout: With which the programs failed, or differed from an ordinary run.
        error: What was raised.
        programs: The model, the guide, and the arguments of both.
        given: Values of draws to use instead of new ones.

    Raises:
        CostError: They would take too many runs.
        PlateError: A latent is read from outside one of its plates, out of sight of torch's functions.
    """
    left = frozenset(layout.dims) - {site.name for site in layout.sites.values() if site.chain is not None}
    fault = blamed(error)
    if not left or (isinstance(error, VFEError) and fault is None):  # what programs say of each other, say
        return None
    runs = _OrdinaryRuns(layout, programs, given)
    try:
        if not runs.repeat():
            return None
        unseen = layout.unseen or runs.unseen()
    except VFEError:
        raise
    except Exception:  # The programs fail by themselves: what was raised first says how.
        return None
    names = (fault or left) & left or left.intersection(*unseen.values())
    return _grouped(replace(layout, unseen=unseen), names | layout.groups.keys()) if names else None


def warn_of_runs(layout: Layout) -> None:
    """Says once that programs run several times, and why.

    Args:
        layout: Where each latent went.
    """
    apart = [name for name in layout.groups if name not in layout.stars.values()]
    if apart:
        names = ", ".join(f"'{name}'" for name in apart[:5]) + ", ..." * (len(apart) > 5)
        warnings.warn(
            f"The programs do not broadcast over the values of {names}: they run {layout.num_runs:,} times, once for "
            "each joint value that some site reads. The numbers are exact. One run is enough where a latent indexes a "
            "table (table[z]), is compared (torch.where(z == 1, a, b)), or has its dims counted from the right.",
            VFEWarning,
            stacklevel=callers_level(),
        )


def with_stars(layout: Layout) -> Layout:
    """Returns the layout in which latents that are read by index from other plates take their values one at a time.

    Args:
        layout: Where each latent went.
    """
    return _grouped(layout, frozenset(layout.stars.values()) - layout.sequential) if layout.stars else layout


def _grouped(layout: Layout, names: Sites) -> Layout:
    """The layout in which these latents take their values one at a time."""
    read = ((site, site.scope | layout.unseen.get(key, NO_SITES)) for key, site in layout.sites.items())
    scopes = [scope | {site.name} & names for site, scope in read]
    ordered = [name for name in dict.fromkeys(site.name for site in layout.sites.values()) if name in names]
    dims = {name: dim for name, dim in layout.dims.items() if name not in names}
    found = replace(layout, dims=dims, groups=coloured(ordered, scopes), portioning=None)
    if found.num_runs > MAX_RUNS:
        shown = ", ".join(f"'{name}'" for name in ordered[:5]) + ", ..." * (len(ordered) > 5)
        raise CostError(
            f"The programs do not broadcast over the values of {shown}, and would have to run {found.num_runs:,} "
            f"times, once for each joint value that some site reads (at most {MAX_RUNS:,}).",
            hint="Write what reads them so that all values share one run: index a table (table[z]), compare "
            "(torch.where(z == 1, a, b)), count dims from the right, join latents by "
            "torch.stack(torch.broadcast_tensors(...), -1).",
            sites=ordered,
            excess=found.num_runs / MAX_RUNS,
        )
    return found


class _OrdinaryRuns:
    """Ordinary runs of a pair of programs at chosen values of their latents."""

    def __init__(self, layout: Layout, programs: _Arguments, given: Mapping[str, Tensor]) -> None:
        self.layout = layout
        self.programs = programs
        self.drawn = dict(given)
        """What the guide drew in the first run."""
        self.values: dict[str, int] = {}
        """The index of the value of each latent; a random one where none is chosen."""

    def repeat(self) -> bool:
        """Whether two runs at equal values of everything that has a site say the same, whatever else is random."""
        one, _ = self._run(NO_SITES, 0)
        torch.rand(1)
        other, _ = self._run(NO_SITES, 0)
        return one.keys() == other.keys() and all(agree(one[key], other[key]) for key in one)

    def unseen(self) -> dict[SiteKey, Sites]:
        """The latents that each site turns out to read, and that nobody saw it read."""
        found: dict[SiteKey, Sites] = {}
        names = [name for name in self.layout.sizes if name not in self.layout.sequential]
        if sum(self.layout.sizes[name] - 1 for name in names) > _MOST_MOVES:
            return found
        state = random_state()
        before = self._run(NO_SITES, 0)
        for name in names:
            for value in range(1, self.layout.sizes[name]):
                set_random_state(state)
                after = self._run(frozenset((name,)), value)
                for key in self._moved(before, after):
                    site = self.layout.sites.get(key)
                    if site is not None and name not in site.scope | {key[1]}:
                        found[key] = found.get(key, NO_SITES) | {name}
        set_random_state(state)
        return found

    def _moved(self, before: "_Said", after: "_Said") -> Iterator[SiteKey]:
        """The sites that say something else, or have another gradient: parameters may be equal to begin with."""
        for key, values in before[0].items():
            other = after[0].get(key)
            same = other is not None and agree(values, other)
            if not same or not all(map(_equal, before[1].get(key, ()), after[1].get(key, ()))):
                yield key

    def _run(self, moved: Sites, value: int) -> "_Said":
        """What each site says with some latents at another value than their first, and the gradients of that."""
        said: dict[SiteKey, Tensor] = {}

        def chosen(name: str, role: Role, fn: Any, plates: tuple[Plate, ...]) -> Tensor:
            support = finite_support(fn, name)
            return at_all_elements(support[min(value if name in moved else 0, len(support) - 1)], plates)

        def look(site: Site) -> None:
            if site.kind == "sampled" and site.role == "guide":
                self.drawn.setdefault(site.name, site.value)
            if site.kind != "unread":
                fn, mask = unmasked(site)
                said[site.role, site.name] = masked(log_prob(fn, without_gaps(site)), mask)

        model, guide, args, kwargs = self.programs
        with torch.enable_grad():
            plates = SizelessPlates(self.layout.sizes_around)
            both = record_both(model, guide, args, kwargs, chosen, given=self.drawn, sizeless=plates, look=look)
            parameters = [value for record in both for value in record.parameters if value.requires_grad]
            return said, {key: _gradients(values, parameters) for key, values in said.items()}


_Said = tuple[dict[SiteKey, Tensor], dict[SiteKey, tuple[Tensor | None, ...]]]


def _gradients(values: Tensor, parameters: list[Tensor]) -> tuple[Tensor | None, ...]:
    if not parameters or not values.requires_grad:
        return ()
    return torch.autograd.grad(values.sum(), parameters, retain_graph=True, allow_unused=True)


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return (one is None and other is None) or (one is not None and other is not None and agree(one, other))
