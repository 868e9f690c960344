"""From programs at their arguments to groups of named arrays, as a tree in ArviZ's schema has them."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vfe.energy.parts import normalized
from pyro_vfe.energy.pointwise import Plates
from pyro_vfe.energy.presence import present_at
from pyro_vfe.engine.chain_decoding import SAMPLE
from pyro_vfe.engine.factors import Table
from pyro_vfe.errors import StructureError
from pyro_vfe.learning.history import History
from pyro_vfe.program.buffers import unchanged_buffers
from pyro_vfe.program.data import likely_data, number_of_data
from pyro_vfe.program.enumeration import Enumeration, SiteKey
from pyro_vfe.program.layout import Program
from pyro_vfe.program.parameters import Parameters
from pyro_vfe.program.programs import Programs
from pyro_vfe.program.recorder import Plate, Site
from pyro_vfe.reporting.moments import Averages, Moment, moment
from pyro_vfe.reporting.simulation import Draw, Simulator, Variables
from pyro_vfe.reporting.variables import (
    repeated,
    site_variable,
    stacked,
    table_variable,
    variable,
    whole_numbers,
    with_presence,
)

if TYPE_CHECKING:
    import xarray

JOINT = "joint"
"""The name of the log-likelihood of several observed sites together."""

NATS = {"units": "nats"}

_PATIENCE = 1.0
"""Seconds after which a progress bar is shown."""

_WITHOUT_A_GUIDE = ("free_energy", "surprise", "gap")
"""The terms that tell something of the exact posterior, too."""


@dataclass(frozen=True, eq=False)
class Gathered:
    """What a tree is made of."""

    groups: dict[str, Variables]
    """Variables by group; those of groups with draws have the dimension 'draw' in front."""
    coords: dict[str, np.ndarray]
    """Labels of dimensions: the values of discrete latents."""
    attrs: dict[str, Any] = field(default_factory=dict)
    """Of the whole."""


@dataclass(eq=False)
class Gatherer:
    """A model and a guide at their arguments, and the draws that describe them."""

    model: Program
    guide: Program
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    num_samples: int
    max_bytes: float | None = None
    progress_bar: bool = False
    draws: list[Draw] = field(default_factory=list)
    averages: Averages = field(default_factory=Averages)
    plates: Plates = ()
    outside: frozenset[SiteKey] = frozenset()
    """What belongs to no datum."""

    def __post_init__(self) -> None:
        self._parameters = Parameters()
        self._programs = Programs(max_bytes=self.max_bytes, needs_data=True)
        self._watched = self._parameters.watched(self.model, "model")

    @torch.no_grad()
    @unchanged_buffers()
    def gather(self, prior: bool, posterior_predictive: bool, history: History | None) -> Gathered:
        """Returns all groups.

        Args:
            prior: Whether to draw from the prior.
            posterior_predictive: Whether to simulate data at the draws.
            history: Of training.
        """
        posterior, sample_stats, log_likelihood = self._draw()
        simulator = Simulator(self.model, self.args, self.kwargs, self.draws)
        observed = simulator.observed()
        inside = [name for name in observed if ("model", name) not in self.outside]
        name = inside[0] if len(inside) == 1 else JOINT
        groups: dict[str, Variables] = {
            "posterior": posterior,
            "log_likelihood": {name: log_likelihood} if observed else {},
            "sample_stats": sample_stats,
        }
        if posterior_predictive:
            groups["posterior_predictive"] = simulator.posterior_predictive()
        if prior:
            groups["prior"], groups["prior_predictive"] = simulator.prior()
        groups["observed_data"] = {name: site_variable(site) for name, site in observed.items()}
        groups["constant_data"] = self._constant_data(observed)
        groups["variational"] = {**self._variational(), **({} if history is None else history_variables(history))}
        return Gathered(groups, self._coords(), {"data_plates": ", ".join(self.plates), "num_data": self._num_data()})

    def _draw(self) -> "tuple[Variables, Variables, xarray.Variable]":
        """Draws the latents; fills `draws` and `averages`."""
        stats: dict[str, list[Tensor]] = {"lp": [], "log_q": [], "lp_marginal": [], "log_q_marginal": []}
        log_likelihoods: list[Tensor] = []
        sampled = False
        for run, count in self._runs():
            sampled = run.is_sampled
            if not self.draws:
                data = likely_data(run)
                self.plates, self.outside = data.plates, data.outside if data.plates else frozenset()
            found = moment(run, count, self.plates, self.max_bytes)
            self.averages.add(found)
            indices = found.draws.indices
            self.draws.append(
                Draw(self._kept(run), _of_the_model(indices, run), count, _drawn_values(run), _present(run, indices))
            )
            log_likelihoods.append(found.log_likelihood)
            _append(stats, found, count)
        columns = {name: torch.cat(values) for name, values in stats.items()}
        if not sampled:
            del columns["lp_marginal"], columns["log_q_marginal"]
        columns["log_weight"] = columns["lp"] - columns["log_q"]
        named = {name: variable(name, values, draws=True) for name, values in columns.items()}
        for values in named.values():
            values.attrs.update(NATS)
        return self._posterior(), named, self._log_likelihood(log_likelihoods)

    def _kept(self, run: Enumeration) -> Enumeration:
        """The tables of the first run, which are enough, with all sites that have run."""
        if not self.draws:
            return run
        known = self.draws[-1].run
        if run.sites.keys() <= known.sites.keys():
            return known
        return replace(known, sites={**run.sites, **known.sites}, supports={**run.supports, **known.supports})

    def _runs(self) -> Iterator[tuple[Enumeration, int]]:
        """Enumerations, one per draw of w, and how many draws of v each is for."""
        done = 0
        with tqdm(total=self.num_samples, desc="draws", delay=_PATIENCE, disable=not self.progress_bar) as bar:
            while done < self.num_samples:
                run = self._programs.enumerate_given_draws(self._watched, self.guide, self.args, self.kwargs)
                run = normalized(run, torch.float64).numbers()
                if not self.draws:
                    _check_unweighted(run)
                count = 1 if run.is_sampled else self.num_samples
                yield run, count
                bar.update(count)
                done += count

    def _posterior(self) -> Variables:
        found: Variables = {}
        present: Variables = {}
        run = self.draws[-1].run
        for (role, name), site in run.sites.items():
            if role == "model" and site.kind in ("enumerated", "sampled"):
                found[name] = self._indexed(site) if name in run.supports else self._drawn(site)
                present[name] = self._presence(site)
        optional = {name for draw in self.draws for name in draw.present}
        store = pyro.get_param_store()
        for name in self._parameters.of("model"):
            # Weights of networks, under names that pyro.module makes, describe no one's beliefs.
            if "$$$" not in name and name not in found:
                own = self._parameters.strangers.get(name)  # what its module computes with
                found[name] = repeated(variable(name, store[name] if own is None else own), self.num_samples)
        return with_presence(found, present, optional)

    def _indexed(self, site: Site) -> "xarray.Variable":
        """The draws of a discrete latent; its first value where a draw lacks it."""
        values, nothing = whole_numbers(self.draws[-1].run.supports[site.name]), Table(torch.tensor(0), ())
        index = self._over_draws(site, [draw.indices.get(site.name, nothing) for draw in self.draws])
        return self._in_order(site, values[index], values.dim() - 1)

    def _drawn(self, site: Site) -> "xarray.Variable":
        """What the guide drew of a latent; zero where a draw lacks it."""
        values = [draw.others.get(site.name) for draw in self.draws]
        like = next(value for value in values if value is not None)
        parts = [site_variable(site, values=like.new_zeros(like.shape) if v is None else v) for v in values]
        return repeated(parts[0], self.num_samples) if len(parts) == 1 else stacked(parts)

    def _presence(self, site: Site) -> "xarray.Variable":
        """Which draws have a latent."""
        always, never = (Table(torch.tensor(there), ()) for there in (True, False))
        name = site.name
        has_it = [always if name in draw.indices or name in draw.others else never for draw in self.draws]
        there = [draw.present.get(name, has) for draw, has in zip(self.draws, has_it, strict=True)]
        return self._in_order(site, self._over_draws(site, there), 0)

    def _over_draws(self, site: Site, tables: Sequence[Table]) -> Tensor:
        """Tables of all draws as one tensor: draws, then the site's plates in the order of their dims."""
        order = sorted(site.plates, key=lambda plate: plate.dim)
        axes = (SAMPLE, *(plate.name for plate in order))
        sizes = [plate.size for plate in order]
        counts = [draw.count for draw in self.draws]
        return torch.cat([own.aligned(axes).cpu().expand(n, *sizes) for own, n in zip(tables, counts, strict=True)])

    def _in_order(self, site: Site, values: Tensor, event_dim: int) -> "xarray.Variable":
        order = sorted(site.plates, key=lambda plate: plate.dim)
        close = tuple(Plate(p.name, i - len(order), p.size, p.full_size) for i, p in enumerate(order))
        return variable(site.name, values, close, event_dim, draws=True)

    def _log_likelihood(self, found: list[Tensor]) -> "xarray.Variable":
        import xarray

        order = self._plates_in_order()
        values = [table_variable(Table(own, self.plates), order, {}) for own in found]
        whole = repeated(values[0], self.num_samples) if len(values) == 1 else stacked(values)
        return xarray.Variable(whole.dims, whole.values, NATS)

    def _plates_in_order(self) -> list[Plate]:
        """The data's plates, the leftmost batch dim first."""
        run = self.draws[-1].run
        known = {plate.name: plate for site in run.sites.values() for plate in site.plates}
        return [known.get(name, Plate(name, -1, 0, 0)) for name in self.plates]

    def _num_data(self) -> int:
        return number_of_data(self.draws[0].run)

    def _variational(self) -> Variables:
        found: Variables = {}
        order, sites = self._plates_in_order(), self.draws[-1].run.sites
        for group, ending in (("q", "_q"), ("posterior", "_posterior")):
            for name, table in (self.averages.marginals(group) or {}).items():
                last = {name: f"{name}_value"}
                found[name + ending] = table_variable(table, sites["model", name].plates, last)
        guided = bool(self.draws[0].run.guided) or bool(self.draws[0].others)
        for name, value in (self.averages.terms("terms") or {}).items():
            if guided or name in _WITHOUT_A_GUIDE:
                found[name] = variable(name, value.double())
        for name, value in (self.averages.terms("data_terms") or {}).items():
            if name in _WITHOUT_A_GUIDE:
                found[f"{name}_by_datum"] = table_variable(Table(value, self.plates), order, {})
        if self.averages.stderr is not None:
            found["free_energy_stderr"] = variable("free_energy_stderr", self.averages.stderr)
        for name, values in found.items():
            values.attrs.update({} if name.endswith(("_q", "_posterior")) else NATS)
        return found

    def _coords(self) -> dict[str, np.ndarray]:
        supports = self.draws[-1].run.supports
        return {f"{name}_value": whole_numbers(v).cpu().numpy() for name, v in supports.items() if v.dim() == 1}

    def _constant_data(self, observed: Mapping[str, Site]) -> Variables:
        """The model's arguments that hold numbers and are no observations."""
        known = [site.value for site in observed.values()]
        found: Variables = {}
        for name, argument in _arguments(self.model, self.args, self.kwargs).items():
            if isinstance(argument, (bool, int, float, np.ndarray, Tensor)):
                value = torch.as_tensor(argument)
                if not any(_same_data(value, other) for other in known):
                    found[name] = variable(name, value)
        return found


def _append(stats: dict[str, list[Tensor]], found: Moment, count: int) -> None:
    stats["lp"].append(found.draws.log_joint)
    stats["log_q"].append(found.draws.log_q)
    stats["lp_marginal"].append(found.log_joint.expand(count))
    stats["log_q_marginal"].append(found.log_q.expand(count))


def _drawn_values(run: Enumeration) -> dict[str, Tensor]:
    """w: what the guide draws of the model's latents."""
    return {
        site.name: run.sites["guide", site.name].value
        for (role, _), site in run.sites.items()
        if role == "model" and site.kind == "sampled"
    }


def _of_the_model(indices: Mapping[str, Table], run: Enumeration) -> dict[str, Table]:
    """Without what only the guide has, and without draws of w."""
    return {name: own for name, own in indices.items() if name in run.supports and ("model", name) in run.sites}


def _present(run: Enumeration, indices: Mapping[str, Table]) -> dict[str, Table]:
    """Where the model's latents are there that are not always."""
    plates = {name: sorted(run.sites["model", name].plate_names) for role, name in run.presence if role == "model"}
    return {name: present_at(run, name, indices, (SAMPLE, *own)) for name, own in plates.items()}


def _check_unweighted(run: Enumeration) -> None:
    for plate, _, _ in run.subsampled:
        raise StructureError(
            f"Plate '{plate}' is subsampled: its elements stand for others, and are no data of their own.",
            hint="Give the tree the whole data set, without subsampling.",
        )
    heavy = [name for name, own in run.variables.items() if own.scale != 1.0]
    drawn = [site for site in run.sites.values() if site.kind == "sampled"]
    heavy += [site.name for site in drawn if not bool((torch.as_tensor(site.scale) == 1).all())]
    if heavy:
        raise StructureError(
            f"Latent '{heavy[0]}' carries a weight (poutine.scale): it has a free energy, but no distribution to draw "
            "from.",
            hint="Call to_datatree on the programs without poutine.scale.",
        )


def _arguments(model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by name, as the model's signature names them."""
    function = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return {**{f"argument_{i}": value for i, value in enumerate(args)}, **kwargs}
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named |= {f"{name}_{i}": own for i, own in enumerate(value)}
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        else:
            named[name] = value
    return named


def _same_data(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors share memory, or are equal, gaps included."""
    if one.device == other.device and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr():
        return one.numel() > 0
    return one.shape == other.shape and np.array_equal(
        one.detach().cpu().numpy(), other.detach().cpu().numpy(), equal_nan=one.is_floating_point()
    )


def history_variables(history: History) -> Variables:
    """Returns a history of training as variables along `history_step`.

    Args:
        history: Of EM, or of SVI.
    """
    found = history.to_xarray().rename({"step": "history_step"})
    names = ("free_energy", "surprise", "gap", "iteration", "phase")
    return {f"history_{name}": found[name].variable for name in names}
