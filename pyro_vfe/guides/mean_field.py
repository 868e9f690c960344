r"""The mean-field guide: every latent by itself.

    Q(v)  =  prod_sites prod_elements  Q(v_site[n]) ,        Q(v_site[n] = value_k)  =  softmax(logits[n])_k

References:
    Saul, Jaakkola and Jordan (1996), Mean field theory for sigmoid belief networks.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from operator import attrgetter
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.utils import deep_setattr
from pyro.nn import PyroModule
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from pyro_vfe.energy.posterior import posterior
from pyro_vfe.engine.factors import Table
from pyro_vfe.errors import StructureError
from pyro_vfe.program.finite import Finite
from pyro_vfe.program.layout import SiteStructure, discrete_latents
from pyro_vfe.program.parameters import other_shape
from pyro_vfe.program.randomness import undisturbed_randomness
from pyro_vfe.program.recorder import FOLLOWS_MODEL, Plate
from pyro_vfe.program.tables import over_dims

Program = Callable[..., Any]


class AutoMeanField(AutoGuide):
    """A guide with an independent categorical for each discrete latent site and plate element.

    A `pyro.infer.autoguide.AutoGuide`: combine it with a guide for other latents in an `AutoGuideList`. Its
    parameters are
    logits named after the sites, `guide.logits.<site>` with shape `(*batch_shape, K)` over whole plates; a subsample
    uses its own rows. They start where `init` says.
    """

    def __init__(
        self,
        model: Program,
        *,
        init: Literal["uniform", "posterior"] = "uniform",
        init_scale: float = 0.0,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        """Args:
        model: The generative model; its discrete latents with finite support are found at the first call.
        init: Where the probabilities start: all equal, or at the exact posterior marginals under the model's parameters
            as they are at the first call (a good start where the posterior is sharp; the whole data are needed).
        init_scale: Standard deviation of noise on the starting logits. The uniform start is a saddle point where
        latents
            are exchangeable: give a little noise to break the symmetry there.
        create_plates: As for Pyro's guides, plates to use instead of the model's, for subsampling.
        """
        super().__init__(model, create_plates=create_plates)  # type: ignore[no-untyped-call]
        self.init = init
        self.init_scale = init_scale
        self._latents: dict[str, SiteStructure] = {}

    @property
    def whole_plates(self) -> tuple[str, ...]:
        """The names of the plates around the latents that were not subsampled at the first call, outermost first."""
        plates = [plate for site in self._latents.values() for plate in site.plates]
        return tuple(dict.fromkeys(plate.name for plate in plates if plate.size == plate.full_size))

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        with undisturbed_randomness(), pyro.poutine.block():
            self._latents = discrete_latents(self.model, args, kwargs)
        if not self._latents:
            raise StructureError(
                "AutoMeanField found no discrete latent with a finite support in the model.",
                hint="Use one of Pyro's autoguides for continuous latents.",
            )
        self.prototype_trace = pyro.poutine.Trace()
        self.logits = PyroModule()
        for site in self._latents.values():
            for plate in site.plates:
                self._prototype_frames[plate.name] = _frame(plate)
            deep_setattr(self.logits, _attribute(site.name), torch.nn.Parameter(self._initial_logits(site)))
        if self.init == "posterior":
            self._start_at_posterior(args, kwargs)

    def _start_at_posterior(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(plate.size != plate.full_size for site in self._latents.values() for plate in site.plates):
            raise StructureError(
                "AutoMeanField(init='posterior') was first called with a subsampled plate.",
                hint="Call it once with the whole data, or use init='uniform'.",
            )
        with undisturbed_randomness(), pyro.poutine.block(), torch.no_grad():
            exact = posterior(self.model, *args, **kwargs)
            for site in self._latents.values():
                logits = _logits(self, site.name)
                probabilities = over_dims(exact.marginal_table(site.name), site.plates).to(logits)
                logits.add_(probabilities.clamp(min=torch.finfo(logits.dtype).tiny).log())

    def _initial_logits(self, site: SiteStructure) -> Tensor:
        assert site.support is not None
        return self.init_scale * torch.randn(_shape(site), device=site.support.device)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Samples every discrete latent and returns the values by site name.

        Args:
            *args: The model's arguments.
            **kwargs: The model's keyword arguments.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)  # type: ignore[no-untyped-call]
        return {name: self._sample(site, plates) for name, site in self._latents.items()}

    def _sample(self, site: SiteStructure, plates: dict[str, Any]) -> Tensor:
        logits = _logits(self, site.name)
        with ExitStack() as stack:
            for plate in site.plates:
                stack.enter_context(plates[plate.name])
                indices = plates[plate.name]._indices
                if indices is not None:
                    logits = logits.index_select(plate.dim - 1, indices.to(logits.device))
            infer: Any = {FOLLOWS_MODEL: True}
            value: Tensor = pyro.sample(site.name, _distribution(site, logits), infer=infer)
        return value

    def probabilities(self, name: str) -> Tensor:
        """Returns Q(v) of a latent's values, shape `(*batch_shape, K)`, detached.

        Args:
            name: The latent's site.
        """
        return _logits(self, name).detach().softmax(-1)

    @property
    def latents(self) -> tuple[str, ...]:
        """The sites whose factors it holds; known after its first call."""
        return tuple(self._latents)

    def parameter_name(self, name: str) -> str:
        """Returns the name in Pyro's store of a latent's logits.

        Args:
            name: The latent's site.
        """
        return str(pyro.get_param_store().param_name(_logits(self, name)))

    def set_log_probs(self, name: str, log_probs: Table, chosen: Table, subsamples: Mapping[str, Tensor]) -> None:
        """Sets the logits of some elements of a latent, in place.

        Args:
            name: The latent's site.
            log_probs: log Q(v) over the plates and the values, as subsampled.
            chosen: Which elements to set, over the plates.
            subsamples: The elements of each plate that are present; all of a plate that is not named.
        """
        site, logits = self._latents[name], _logits(self, name)
        values, where = over_dims(log_probs, site.plates), over_dims(chosen, site.plates)
        rows = [torch.arange(size, device=logits.device) for size in logits.shape[:-1]]
        for plate in site.plates:
            rows[plate.dim] = subsamples.get(plate.name, rows[plate.dim]).to(logits.device)
        places = torch.meshgrid(*rows, indexing="ij") if rows else ()
        with torch.no_grad():
            logits[tuple(place[where] for place in places) if rows else where] = values[where].to(logits)


def _attribute(name: str) -> str:
    """The attribute path of a site: its name, with `_` behind parts that modules use themselves."""
    return ".".join(f"{part}_" if hasattr(PyroModule, part) else part for part in name.split("."))


def _logits(guide: AutoMeanField, name: str) -> Tensor:
    logits: Tensor = attrgetter(_attribute(name))(guide.logits)
    own = _shape(guide._latents[name])
    if logits.shape != own:  # The store keeps what it has under the name, that of a guide for other data.
        raise other_shape(str(pyro.get_param_store().param_name(logits)), logits.shape, own)
    return logits


def _shape(site: SiteStructure) -> torch.Size:
    """The shape of a latent's logits, over whole plates."""
    shape = [1] * max((-plate.dim for plate in site.plates), default=0)
    for plate in site.plates:
        shape[plate.dim] = plate.full_size
    return torch.Size([*shape, site.size])


def _frame(plate: Plate) -> Any:
    return CondIndepStackFrame(plate.name, plate.dim, plate.size, 0, plate.full_size)


def _distribution(site: SiteStructure, logits: Tensor) -> Any:
    """The kind of distribution that has the site's values."""
    if site.family == "Categorical":
        return dist.Categorical(logits=logits)
    if site.family == "OneHotCategorical":
        return dist.OneHotCategorical(logits=logits)
    assert site.support is not None
    return Finite(site.support, logits)
