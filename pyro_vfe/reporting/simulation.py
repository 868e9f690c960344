"""Data that a model would give: at draws of its latents, and at draws from its prior."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_vfe.engine.chain_decoding import SAMPLE
from pyro_vfe.engine.factors import Table
from pyro_vfe.program.enumeration import Enumeration
from pyro_vfe.program.layout import Program
from pyro_vfe.program.masking import unmasked
from pyro_vfe.program.programs import in_particles
from pyro_vfe.program.recorder import Plate, Site
from pyro_vfe.program.replays import replayed, takes_draws_side_by_side
from pyro_vfe.program.tables import over_dims
from pyro_vfe.reporting.variables import joined, presence_variable, site_variable, stacked, with_presence

if TYPE_CHECKING:
    import xarray

CHUNK = 2**24
"""Numbers that are drawn at a time."""

_CHECKED = 8
"""How many draws are looked at alone, too."""


@dataclass(frozen=True, eq=False)
class Draw:
    """Draws of all latents at one draw of w."""

    run: Enumeration
    indices: Mapping[str, Table]
    """Of the discrete latents, over `SAMPLE` and plates."""
    count: int
    """How many."""
    others: Mapping[str, Tensor]
    """w, by site name."""
    present: Mapping[str, Table]
    """Where latents are there that are not always, over `SAMPLE` and plates; one that is in no table here, in `indices`
    or in `others` is never."""

    def given(self, start: int, count: int, nesting: int) -> dict[str, Tensor]:
        """Values of the latents as one run of the model takes them: draws along batch dim `-nesting`, if it is not 0.

        Args:
            start: The first draw.
            count: How many draws.
            nesting: The batch dim of the draws, counted from the right; 0 for one draw without such a dim.
        """
        return {**self.others, **{name: self._values(name, start, count, nesting) for name in self.indices}}

    def _values(self, name: str, start: int, count: int, nesting: int) -> Tensor:
        plates = self.run.sites["model", name].plates
        index = self.indices[name].narrowed(SAMPLE, start, count)
        if nesting:
            return self.run.supports[name][over_dims(index, (*plates, Plate(SAMPLE, -nesting, count, count)))]
        return self.run.supports[name][over_dims(index.selected(SAMPLE, 0), plates)]


Variables = dict[str, "xarray.Variable"]


class Simulator:
    """Runs a model for data: many draws side by side where that is known to be the same, otherwise one by one."""

    def __init__(self, model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], draws: Sequence[Draw]) -> None:
        """Args:
        model: The generative model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        draws: Of its latents.
        """
        self.model, self.args, self.kwargs, self.draws = model, args, kwargs, draws
        first = draws[0]
        self.nesting = 1 + max((-plate.dim for site in first.run.sites.values() for plate in site.plates), default=0)
        self.as_it_ran = replayed(model, args, kwargs, first.given(0, 1, 0), simulate=False)
        self.optional = {name for draw in draws for name in draw.present}
        numbers = sum(site.value.numel() for site in self.as_it_ran.sites.values())
        self.at_once = max(1, CHUNK // max(1, numbers))

    def observed(self) -> dict[str, Site]:
        """What the model observes, with gaps as the data have them; also in branches that this run did not take."""
        sites = (*self.draws[-1].run.sites.values(), *self.as_it_ran.sites.values())
        data = (site for site in sites if site.role == "model" and site.kind == "observed")
        return {site.name: site for site in data if type(site.fn).__name__ != "Unit"}

    def posterior_predictive(self) -> Variables:
        """Returns simulated observations at each draw of the latents."""
        if self._wide():
            draw = self.draws[0]
            parts = [
                self._simulated(draw.given(start, count, self.nesting), count)
                for start, count in self._portions(draw.count)
            ]
            return self._only_observed(_all_joined(parts), True)
        singles = [self._simulated(draw.given(i, 1, 0)) for draw in self.draws for i in range(draw.count)]
        return self._only_observed(_all_stacked(singles), True)

    def prior(self) -> tuple[Variables, Variables]:
        """Returns as many draws of the latents from the prior, and of what the model would observe then."""
        count = sum(draw.count for draw in self.draws)
        if self._wide() and not self._draws_more_than_enumerated():
            found = _all_joined([self._simulated({}, own) for _, own in self._portions(count)])
        else:
            found = _all_stacked([self._simulated({}) for _ in range(count)])
        return self._only_observed(found, False), self._only_observed(found, True)

    def _only_observed(self, found: "_Simulation", observed: bool) -> Variables:
        """What is observed, or what is not, with what says of which draws it is where some lack it."""
        names = [name for name in found.values if (name in self.observed()) == observed]
        present = {name: found.present[name] for name in names}
        return with_presence({name: found.values[name] for name in names}, present, self.optional)

    def _draws_more_than_enumerated(self) -> bool:
        return any(
            site.kind != "observed" and name not in self.draws[0].indices for name, site in self.as_it_ran.sites.items()
        )

    def _wide(self) -> bool:
        """Whether many draws can stand side by side: the same w for all, and the model says of each what is known."""
        draw = self.draws[0]
        count = min(self.at_once, draw.count)
        if len(self.draws) > 1 or count < 2 or any(self.draws[0].run.sites[k].controls for k in draw.run.sites):
            return False
        given = draw.given(0, count, self.nesting)
        single = {i: draw.given(i, 1, 0) for i in range(0, count, -(-count // _CHECKED))}
        return takes_draws_side_by_side(self.model, self.args, self.kwargs, given, single, count, self.nesting)

    def _portions(self, total: int) -> list[tuple[int, int]]:
        """Where each portion of the draws starts, and how many it has: never one alone."""
        starts = list(range(0, total, self.at_once))
        return [(start, min(self.at_once, total - start)) for start in starts]

    def _simulated(self, given: Mapping[str, Tensor], count: int | None = None) -> "_Simulation":
        if count is None:
            sites = replayed(self.model, self.args, self.kwargs, given, simulate=True).sites
            present = {name: presence_variable(site, self._there(site)) for name, site in sites.items()}
            return _Simulation({name: site_variable(site) for name, site in sites.items()}, present)
        wide = in_particles(self.model, count, self.nesting) if count > 1 else self.model
        sites = replayed(wide, self.args, self.kwargs, given, simulate=True).sites
        present = {
            name: presence_variable(site, self._draws_in_front(self._there(site), 0, count), draws=True)
            for name, site in sites.items()
        }
        return _Simulation({name: self._wide_variable(site, count) for name, site in sites.items()}, present)

    def _there(self, site: Site) -> Tensor:
        """Where a site that ran is there: everywhere, but for where a mask removes a latent."""
        mask = unmasked(site)[1] if site.name in self.optional else None
        return torch.as_tensor(True if mask is None else mask)

    def _wide_variable(self, site: Site, count: int) -> "xarray.Variable":
        return site_variable(site, draws=True, values=self._draws_in_front(site.value, site.fn.event_dim, count))

    def _draws_in_front(self, values: Tensor, event_dim: int, count: int) -> Tensor:
        """Values whose draws lie along batch dim `-nesting`, with the draws in front."""
        batch, event = values.shape[: values.dim() - event_dim], values.shape[values.dim() - event_dim :]
        padded = (1,) * (self.nesting - len(batch)) + batch
        return values.reshape(padded + event).expand(count, *padded[1:], *event)


@dataclass(frozen=True, eq=False)
class _Simulation:
    """What runs of the model drew."""

    values: Variables
    """By site."""
    present: Variables
    """Whether each site is there, over draws and its plates."""


def _all_joined(parts: Sequence[_Simulation]) -> _Simulation:
    values, present = [part.values for part in parts], [part.present for part in parts]
    return _Simulation(*({name: joined([part[name] for part in all]) for name in all[0]} for all in (values, present)))


def _all_stacked(singles: Sequence[_Simulation]) -> _Simulation:
    """Variables of single draws as one; a site that some draws lack, in branches not taken, is zero there."""
    values, present = [single.values for single in singles], [single.present for single in singles]
    return _Simulation(_stacked_with_gaps(values), _stacked_with_gaps(present))


def _stacked_with_gaps(singles: Sequence[Variables]) -> Variables:
    found = {name: values for single in singles for name, values in single.items()}
    return {name: stacked([single.get(name, 0 * like) for single in singles]) for name, like in found.items()}
