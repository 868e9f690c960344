r"""The mean-field guide: every latent by itself.

    Q(v)  =  prod_sites prod_elements  Q(v_site[n]) ,        Q(v_site[n] = value_k)  =  softmax(logits[n])_k

References:
    Saul, Jaakkola and Jordan (1996), Mean field theory for sigmoid belief networks.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyro_vfe.energy.posterior import posterior
from pyro_vfe.engine.factors import Table
from pyro_vfe.guides.base import OwnGuide
from pyro_vfe.guides.tables import (
    Init,
    check_start,
    create_missing,
    distribution,
    find_latents,
    read_parameter,
    rows,
    sampled,
    whole_batch,
    whole_plates,
)
from pyro_vfe.program.entry_points import entry_point
from pyro_vfe.program.layout import Program
from pyro_vfe.program.randomness import undisturbed_randomness
from pyro_vfe.program.site_structure import SiteStructure
from pyro_vfe.program.tables import over_dims


class AutoMeanField(OwnGuide):
    """A guide with an independent categorical for each discrete latent site and plate element.

    A `pyro.infer.autoguide.AutoGuide`: combine it with a guide for other latents in an `AutoGuideList`. Its parameters
    are logits named after the sites, `guide.logits.<site>` with shape `(*batch_shape, K)` over whole plates; a
    subsample uses its own rows. They are made at the first call, where `init` says, or by `load_state_dict` before it.
    """

    holders = ("logits",)

    @entry_point()
    def __init__(
        self,
        model: Program,
        *,
        init: Init = "uniform",
        init_scale: float = 0.0,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        """Args:
        model: The generative model; its discrete latents with finite support are found at the first call.
        init: Where the probabilities start: all equal, or at the exact posterior marginals under the model's parameters
            as they are at the first call (a good start where the posterior is sharp; the whole data are needed).
        init_scale: Standard deviation of noise on the starting logits. The uniform start is a saddle point where
            latents are exchangeable: give a little noise to break the symmetry there.
        create_plates: As for Pyro's guides, plates to use instead of the model's, for subsampling.
        """
        super().__init__(model, create_plates=create_plates)
        self.init = init
        self.init_scale = init_scale
        self._latents: dict[str, SiteStructure] = {}
        self.logits = PyroModule()

    @property
    def whole_plates(self) -> tuple[str, ...]:
        """The names of the plates around the latents that were not subsampled at the first call, outermost first."""
        return whole_plates(site.plates for site in self._latents.values())

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        latents, _ = find_latents(self, "AutoMeanField", args, kwargs)
        check_start("AutoMeanField", self.init, latents)
        starts = self._posterior_start(latents, args, kwargs) if self.init == "posterior" else {}
        for name, site in latents.items():
            create_missing(self.logits, name, partial(self._start, site, starts.get(name)))
        self._latents = latents
        self.prototype_trace = pyro.poutine.Trace()

    def _posterior_start(
        self, latents: Mapping[str, SiteStructure], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Tensor]:
        with undisturbed_randomness(), pyro.poutine.block(), torch.no_grad():
            exact = posterior(self.model, *args, **kwargs)
            return {name: over_dims(exact.marginal_table(name), site.plates) for name, site in latents.items()}

    def _start(self, site: SiteStructure, probabilities: Tensor | None) -> Tensor:
        assert site.support is not None
        logits = self.init_scale * torch.randn(_shape(site), device=site.support.device)
        if probabilities is None:
            return logits
        return logits + probabilities.to(logits).clamp(min=torch.finfo(logits.dtype).tiny).log()

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
        own = rows(logits, site.plates, plates, logits.dim() - 1)
        return sampled(site.name, site.plates, lambda: distribution(site, own), plates)

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


def _logits(guide: AutoMeanField, name: str) -> Tensor:
    return read_parameter(guide.logits, name, _shape(guide._latents[name]))


def _shape(site: SiteStructure) -> torch.Size:
    """The shape of a latent's logits, over whole plates."""
    return torch.Size([*whole_batch(site.plates), site.size])
