r"""The exact posterior as a guide.

    Q(v)  =  P(v | u, G)  =  prod_i  P( v_i | v_S(i), u, G )

S(i) is the smallest set of earlier latents that separates v_i from the other earlier ones.

References:
    Dayan, Hinton, Neal and Zemel (1995), The Helmholtz machine (the recognition model that costs nothing).
    Koller and Friedman (2009), Probabilistic Graphical Models, chapter 4 (separation).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from pyro_vfe.energy.conditionals import Around, Parents, conditionals, separators
from pyro_vfe.energy.parts import joint_graph
from pyro_vfe.energy.posterior import Posterior
from pyro_vfe.errors import MissingGuideSiteError, PlateError, StructureError
from pyro_vfe.guides.base import OwnGuide
from pyro_vfe.guides.conditionals import Logits, logits_of, sample_given
from pyro_vfe.guides.tables import Latent, check_size, find_latents
from pyro_vfe.program.buffers import unchanged_buffers
from pyro_vfe.program.calls import kept
from pyro_vfe.program.drawn_guide import draws_so_far
from pyro_vfe.program.entry_points import entry_point
from pyro_vfe.program.enumeration import PARTICLES, Enumeration
from pyro_vfe.program.layout import Program, no_guide
from pyro_vfe.program.programs import Programs
from pyro_vfe.program.provenance import out_of_sight, untracked
from pyro_vfe.program.randomness import random_state, undisturbed_randomness
from pyro_vfe.program.supports import unwrapped


class AutoPosterior(OwnGuide):
    """The exact posterior of the model's discrete latents, as a guide; for small models.

    Each call computes P(v | u) under the model's parameters as they are, and samples every latent from its exact
    conditional given those before it. The gap is zero, and F the surprise: in value, and in the gradient that the
    model's parameters get. The guide itself has no parameters, and its tables carry no gradient.

    In an `AutoGuideList` it stands behind the guides of the other latents, with the whole model for its own (nothing
    blocked): its posterior is then that given what they drew.
    """

    @entry_point()
    def __init__(
        self, model: Program, *, max_bytes: float | None = None, create_plates: Callable[..., Any] | None = None
    ) -> None:
        """Args:
        model: The generative model.
        max_bytes: The most memory that tables may take; half of what is free by default.
        create_plates: As for Pyro's guides, plates to use instead of the model's, for subsampling.
        """
        super().__init__(model, create_plates=create_plates)
        self.max_bytes = max_bytes
        self._programs = Programs(max_bytes=max_bytes)
        self._draws: dict[str, Tensor] = {}
        self._sees_all_draws = False

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Samples every discrete latent from the exact posterior and returns the values by site name.

        Args:
            *args: The model's arguments.
            **kwargs: The model's keyword arguments.

        Raises:
            MissingGuideSiteError: The model has another latent, which no guide has drawn before.
            PlateError: The posterior ties the elements of a plate together, or the steps of two chains.
            ImpossibleDataError: The data have probability zero.
            CostError: A table would not fit.
        """
        if self.prototype_trace is None:
            with out_of_sight():
                find_latents(self, "AutoPosterior", args, kwargs)
            self.prototype_trace = pyro.poutine.Trace()
        plates = self._subsampling_plates(args, kwargs)
        exact = self._exact(args, kwargs, {name: plate._indices for name, plate in plates.items()})
        for latent in exact.latents.values():
            for plate in latent.plates:
                if plate.name not in plates:
                    plates[plate.name] = pyro.plate(plate.name, plate.full_size, dim=plate.dim)
        values: dict[str, Tensor] = {}
        for name, latent in exact.latents.items():
            given = tuple(exact.latents[parent] for parent in exact.parents[name])
            values[name] = sample_given(latent, given, values, exact.logits[name], plates)
        return values

    def _subsampling_plates(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The plates of which the posterior has to know which elements are present; an AutoGuideList has all."""
        frames: dict[str, CondIndepStackFrame] = self._prototype_frames
        if self.master is None:
            self._prototype_frames = {name: f for name, f in frames.items() if f.size != f.full_size}
        try:
            return dict(self._create_plates(*args, **kwargs))  # type: ignore[no-untyped-call]
        finally:
            self._prototype_frames = frames

    def _exact(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], subsamples: Mapping[str, Tensor]) -> "_Exact":
        """The posterior's conditionals; made once for all runs of a call that look at the same data and draws."""
        draws = _single_draws()
        store = kept()
        known = store.get(self)
        if known is not None and _same(known[0], draws) and _same(known[1], subsamples):
            return known[2]  # type: ignore[no-any-return]
        self._draws = draws
        try:
            with out_of_sight(), undisturbed_randomness(), unchanged_buffers(), pyro.poutine.block(), torch.no_grad():
                exact = _exact(self._enumeration(args, kwargs, subsamples), self.max_bytes)
        except MissingGuideSiteError as error:
            raise MissingGuideSiteError(error.latent, site=error.site, hint=_OTHERS) from error
        finally:
            self._draws = {}
        store[self] = (draws, dict(subsamples), exact)
        return exact

    def _enumeration(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], subsamples: Mapping[str, Tensor]
    ) -> Enumeration:
        def enumeration() -> Enumeration:
            return self._programs.enumerate(
                self._given_draws, no_guide, args, kwargs, subsamples=subsamples, differentiable=False
            )

        found = enumeration()
        if not self._sees_all_draws:
            before = random_state()
            found = enumeration()
            draws_itself = any(site.kind in ("sampled", "unread") for site in found.sites.values())
            if not draws_itself and not all(map(torch.equal, before, random_state())):
                raise StructureError(
                    "The model of AutoPosterior draws something out of its sight (a latent hidden by "
                    "pyro.poutine.block, say): its posterior would be that given some other draw than the guide's.",
                    hint="Give it the whole model, vfe.AutoPosterior(model): it finds the discrete latents, and takes "
                    "what the guides before it in an AutoGuideList drew of the others.",
                )
            self._sees_all_draws = True
        return found

    def _given_draws(self, *args: Any, **kwargs: Any) -> Any:
        """The model, at the values that other guides have drawn."""
        with pyro.poutine.condition(data=self._draws):
            return self.model(*args, **kwargs)


_OTHERS = (
    "Put a guide that draws it before the AutoPosterior: guide = AutoGuideList(model); "
    "guide.append(AutoNormal(pyro.poutine.block(model, hide=[...the discrete latents...]))); "
    "guide.append(vfe.AutoPosterior(model)). Or leave the discrete latents out of the guide: they are then summed "
    "exactly inside the model, at no gap."
)


@dataclass(frozen=True, eq=False)
class _Exact:
    """The posterior, ready to be sampled site by site."""

    latents: dict[str, Latent]
    """In an order of sampling."""

    parents: Parents
    """What each is conditioned on."""

    logits: dict[str, Logits]
    """The conditionals, over the elements of plates that are present."""


def _exact(enumeration: Enumeration, max_bytes: float | None) -> _Exact:
    """The conditionals of an enumeration's posterior, in the precision of its tables.

    Raises:
        PlateError: A latent is read as a whole from outside of its plate.
    """
    for name, (plate, *_) in enumeration.wholes.items():
        raise PlateError(
            f"AutoPosterior has no guide for latent '{name}', which the model reads as a whole from outside plate "
            f"'{plate.name}': under the posterior its elements are tied.",
            hint=f"Give '{name}' a sequential plate (for i in pyro.plate('{plate.name}', {plate.size})), or no guide: "
            "the model then sums it out, and the gap is 0 all the same.",
        )
    posterior = Posterior(enumeration, max_bytes=max_bytes)
    graph = joint_graph(posterior.enumeration)
    around = {
        name: Around(graph.variables[name].plates, graph.variables[name].chain, ("model", name) in enumeration.presence)
        for name in posterior.sites
    }
    parents = separators([frozenset(factor.axes) for factor in graph.factors], around)
    latents = {name: _latent(name, enumeration) for name in parents}
    for name, latent in latents.items():
        sizes = {parent: latents[parent].size for parent in parents[name]}
        entries = latent.size ** (1 if latent.chain is None else 2)
        for count in (*sizes.values(), *(plate.size for plate in latent.plates)):
            entries *= count
        check_size("AutoPosterior", latent, sizes, entries, max_bytes, _CHEAPER)
    dtype = enumeration.model_latents[0].table.values.dtype
    found = conditionals(graph, parents, max_bytes=max_bytes)
    return _Exact(latents, parents, {name: logits_of(latents[name], found[name], dtype) for name in parents})


_CHEAPER = (
    "The posterior is too entangled to be a guide: leave the latents out, which sums them inside the model, or use "
    "vfe.AutoStructured"
)


def _single_draws() -> dict[str, Tensor]:
    """What the guides before this one drew, detached.

    Raises:
        StructureError: They drew many at once, side by side.
    """
    draws = draws_so_far()
    for name, (_, plates) in reversed(draws.items()):  # An autoguide draws a site's own value last.
        for plate in sorted(plates & _SIDE_BY_SIDE):
            raise StructureError(
                f"AutoPosterior takes one draw of '{name}' at a time, and here many stand side by side in plate "
                f"'{plate}'.",
                hint="Use FreeEnergy(vectorize_particles=False), Predictive(parallel=False).",
            )
    return {name: value.detach() for name, (value, _) in draws.items()}


_SIDE_BY_SIDE = frozenset([PARTICLES, "_num_predictive_samples"])
"""The plates in which this library and Pyro's Predictive run a program many times at once."""


def _latent(name: str, enumeration: Enumeration) -> Latent:
    site = enumeration.sites["model", name]
    family = type(unwrapped(site.fn)).__name__
    return Latent(name, family, site.plates, enumeration.supports[name], enumeration.chain_plate(name))


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two sets of values are the same; asked so that no program counts as branching on them."""
    if one.keys() != other.keys():
        return False
    with untracked():
        return all(one[name] is other[name] or torch.equal(one[name], other[name]) for name in one)
