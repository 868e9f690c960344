r"""The structured guide: free conditional tables along edges between the latents.

    Q(v)  =  prod_sites prod_elements  Q( v_site[n] | v_parents(site)[n] )

References:
    Saul and Jordan (1996), Exploiting tractable substructures in intractable networks.
    Ghahramani and Jordan (1997), Factorial hidden Markov models (chains as the substructure).
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyro_vfe.energy.conditionals import Conditional, conditionals, uniform_conditionals
from pyro_vfe.energy.parts import joint_graph
from pyro_vfe.energy.posterior import posterior
from pyro_vfe.energy.presence import given_present
from pyro_vfe.engine.cost import table_limit
from pyro_vfe.errors import ImpossibleDataError, StructureError, VFEError
from pyro_vfe.guides.base import OwnGuide
from pyro_vfe.guides.conditionals import Logits, logits_of, present, sample_given
from pyro_vfe.guides.edges import Edges, Parents, pairs_of, parents_of
from pyro_vfe.guides.tables import (
    Init,
    Latent,
    check_size,
    check_start,
    create_missing,
    find_latents,
    latent_of,
    read_parameter,
    whole_plates,
)
from pyro_vfe.program.buffers import unchanged_buffers
from pyro_vfe.program.entry_points import entry_point
from pyro_vfe.program.enumeration import Enumeration
from pyro_vfe.program.layout import Program, no_guide
from pyro_vfe.program.programs import Programs
from pyro_vfe.program.provenance import out_of_sight
from pyro_vfe.program.randomness import undisturbed_randomness
from pyro_vfe.program.site_structure import SiteStructure


class AutoStructured(OwnGuide):
    """A guide with a free conditional table for each discrete latent, given the latents it has edges from.

    A `pyro.infer.autoguide.AutoGuide`: combine it with a guide for other latents in an `AutoGuideList`. Its parameters
    are logits named after the sites, over whole plates; a subsample uses its own rows::

        guide.logits.<site>            (*batch_shape, *K_parents, K)
        guide.logits.<chain>           (*batch_shape but time, T - 1, *K_parents, K, K)      from each state to the next
        guide.initial_logits.<chain>   (*batch_shape but time, *K_parents, K)

    They are made at the first call, or by `load_state_dict` before it. A `vfe.MarkovChain` of the model is a
    `vfe.MarkovChain` of the guide. With the model's own edges F reaches the surprise on chains and trees; elsewhere
    (two causes of one datum, say) the posterior has dependencies that the prior lacks, and naming them closes the gap.
    """

    holders = ("logits", "initial_logits")

    @entry_point()
    def __init__(
        self,
        model: Program,
        edges: Edges = "model",
        *,
        init: Init = "uniform",
        init_scale: float = 0.0,
        max_bytes: float | None = None,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        """Args:
            model: The generative model; its discrete latents with finite support are found at the first call.
            edges: "model" for the model's own dependencies: each latent given those that its prior reads. Or pairs of
                latents' names (parent, child); an empty list is the mean field, but for chains.
            init: Where the tables start: all values equally probable, but for those that the model and the data rule
                out; or at the exact posterior conditionals under the model's parameters as they are at the first call
                (the whole data are needed).
            init_scale: Standard deviation of noise on the starting logits.
            max_bytes: The most memory that one table may take; half of what is free by default.
            create_plates: As for Pyro's guides, plates to use instead of the model's, for subsampling.

        Raises:
            VFEError: `init` is neither of the two.
        """
        super().__init__(model, create_plates=create_plates)
        self.edges: Edges = edges if isinstance(edges, str) else pairs_of(edges, "AutoStructured")
        self.init = init
        self.init_scale = init_scale
        self.max_bytes = max_bytes
        self._latents: dict[str, Latent] = {}
        self._parents: Parents = {}
        self.logits = PyroModule()
        self.initial_logits = PyroModule()

    @property
    def latents(self) -> tuple[str, ...]:
        """The sites that it samples, in its order; known after its first call."""
        return tuple(self._latents)

    @property
    def whole_plates(self) -> tuple[str, ...]:
        """The names of the plates around the latents that were not subsampled at the first call, outermost first."""
        return whole_plates(latent.plates for latent in self._latents.values())

    def parents(self, name: str) -> tuple[str, ...]:
        """Returns the latents that a latent depends on, in the order of its table's axes; known after the first call.

        Args:
            name: The latent's site.
        """
        return self._parents[name]

    def probabilities(self, name: str) -> Tensor:
        """Returns Q(v | parents), shape `(*batch_shape, *K_parents, K)`, detached.

        Of a chain, the probabilities of each state after each, from the second step on: `(..., T - 1, *K_parents, K,
        K)`.

        Args:
            name: The latent's site.
        """
        return self._logits(name).table.detach().softmax(-1)

    def initial_probabilities(self, name: str) -> Tensor:
        """Returns Q of a chain's first state given its parents, shape `(*batch_shape but time, *K_parents, K)`.

        Args:
            name: The chain's site.

        Raises:
            StructureError: The site is no chain.
        """
        initial = self._logits(name).initial
        if initial is None:
            raise StructureError(f"Latent '{name}' is no chain.", hint="Use probabilities(...).")
        return initial.detach().softmax(-1)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Samples every discrete latent, each after its parents, and returns the values by site name.

        Args:
            *args: The model's arguments.
            **kwargs: The model's keyword arguments.

        Raises:
            StructureError: An edge names an unknown latent, or the edges form a cycle.
            PlateError: An edge leads out of a plate.
            CostError: A table would not fit.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)  # type: ignore[no-untyped-call]
        values: dict[str, Tensor] = {}
        for name, latent in self._latents.items():
            given = tuple(self._latents[parent] for parent in self._parents[name])
            logits = present(latent, self._logits(name), len(given), plates)
            values[name] = sample_given(latent, given, values, logits, plates)
        return values

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        with out_of_sight():
            self._set_up(args, kwargs)
        self.prototype_trace = pyro.poutine.Trace()

    def _set_up(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        found, branches = find_latents(self, "AutoStructured", args, kwargs)
        check_start("AutoStructured", self.init, found)
        reads = _reads(self.model, found, branches, args, kwargs) if self.edges == "model" else {}
        parents = parents_of(self.edges, found, reads)
        latents = {name: latent_of(found[name]) for name in parents}
        for name, latent in latents.items():
            sizes = {parent: latents[parent].size for parent in parents[name]}
            check_size("AutoStructured", latent, sizes, _shapes(latent, sizes)[0].numel(), self.max_bytes, _CHEAPER)
        self._latents, self._parents = latents, parents
        starts = self._posterior_start(args, kwargs) if self.init == "posterior" else self._uniform_start(args, kwargs)
        for name in latents:
            table, initial = self._shapes(name)
            start = starts.get(name, Logits(torch.zeros(()), torch.zeros(())))
            create_missing(self.logits, name, partial(self._start, name, table, start.table))
            if initial is not None and start.initial is not None:
                create_missing(self.initial_logits, name, partial(self._start, name, initial, start.initial))

    def _start(self, name: str, shape: torch.Size, start: Tensor) -> Tensor:
        values = torch.zeros(shape, device=self._latents[name].support.device)
        values = values + start.to(values)
        return values + self.init_scale * torch.randn_like(values) if self.init_scale else values

    def _posterior_start(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Logits]:
        with undisturbed_randomness(), unchanged_buffers(), pyro.poutine.block(), torch.no_grad():
            exact = posterior(self.model, *args, **kwargs)
            found = self._where_present(conditionals, exact.enumeration, self.max_bytes)
        return {name: logits_of(self._latents[name], conditional) for name, conditional in found.items()}

    def _where_present(
        self, start: Callable[..., dict[str, Conditional] | None], run: Enumeration, max_bytes: float | None
    ) -> dict[str, Conditional]:
        """Conditionals of each latent given that it is there; what certainly is not has none."""
        graph = joint_graph(run)
        optional = [name for name in self._parents if ("model", name) in run.presence]
        always = {name: own for name, own in self._parents.items() if name not in optional}
        found = start(graph, always, max_bytes=max_bytes) or {}
        for name in optional:
            with suppress(ImpossibleDataError):
                there = given_present(run, graph, name)
                found |= start(there, {name: self._parents[name]}, max_bytes=max_bytes) or {}
        return found

    def _uniform_start(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Logits]:
        """Where the model rules values out, the tables are uniform over the others: F would start at infinity."""
        if any(plate.size != plate.full_size for latent in self._latents.values() for plate in latent.plates):
            return {}
        room = min(table_limit(self.max_bytes), _LOOK_BYTES)
        try:
            with undisturbed_randomness(), unchanged_buffers(), pyro.poutine.block(), torch.no_grad():
                enumeration = Programs(check=False, max_bytes=room).enumerate(self.model, no_guide, args, kwargs)
                found = self._where_present(uniform_conditionals, enumeration, room)
        except VFEError:  # Other latents have to be drawn, or the model is too large: F tells where zeros clash.
            return {}
        return {name: logits_of(self._latents[name], one) for name, one in found.items()}

    def _shapes(self, name: str) -> tuple[torch.Size, torch.Size | None]:
        return _shapes(self._latents[name], {parent: self._latents[parent].size for parent in self._parents[name]})

    def _logits(self, name: str) -> Logits:
        table, initial = self._shapes(name)
        return Logits(
            read_parameter(self.logits, name, table),
            None if initial is None else read_parameter(self.initial_logits, name, initial),
        )


_LOOK_BYTES = 2**28
"""What a look for values that are ruled out may take: it is not worth more than a step of training."""

_CHEAPER = "Give it fewer parents (edges=[...]), or use vfe.AutoMeanField or vfe.AutoAmortized"


def _shapes(latent: Latent, parents: Mapping[str, int]) -> tuple[torch.Size, torch.Size | None]:
    """The shapes of a latent's table and, for a chain, of that of its first state."""
    batch, given = latent.batch_shape, tuple(parents.values())
    if latent.chain is None:
        return torch.Size((*batch, *given, latent.size)), None
    around = batch[:-1]
    pair = (latent.size, latent.size)
    return torch.Size((*around, latent.steps - 1, *given, *pair)), torch.Size((*around, *given, latent.size))


def _reads(
    model: Program,
    latents: Mapping[str, SiteStructure],
    branches: frozenset[str],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> dict[str, Collection[str]]:
    """For each latent, those that its prior reads; where the model branches on one, by what differs between paths."""
    names = latents.keys()
    reads: dict[str, Collection[str]] = {name: (site.scope & names) - {name} for name, site in latents.items()}
    if not branches:
        return reads
    try:
        with undisturbed_randomness(), unchanged_buffers(), pyro.poutine.block(), torch.no_grad():
            enumeration = Programs(check=False).enumerate(model, no_guide, args, kwargs)
        return {factor.name: (names & set(factor.axes)) - {factor.name} for factor in enumeration.model_latents}
    except VFEError:  # Other latents have to be drawn, say: whatever comes after a branch may then depend on it.
        before: list[str] = []
        for name in latents:
            reads[name] = {*reads[name], *before}
            before += [name] if name in branches else []
        return reads
