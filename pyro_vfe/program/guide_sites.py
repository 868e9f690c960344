"""What the sites of a guide may be beside those of the model."""

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pyro_vfe.errors import StructureError, VFEWarning
from pyro_vfe.program.recorder import Role

if TYPE_CHECKING:
    from pyro_vfe.program.site_structure import SiteStructure

    Sites = Mapping[tuple[Role, str], SiteStructure]


def check_masks(sites: "Sites") -> None:
    """Checks that a mask of the model's around a latent of the guide reads latents that the guide has.

    Args:
        sites: The sites of both programs.

    Raises:
        StructureError: It reads another.
    """
    for site in sites.values():
        lacking = sorted(name for name in site.scope if ("guide", name) not in sites)
        if site.role == "guide" and lacking:
            raise StructureError(
                f"The model masks latent '{site.name}' by the value of '{lacking[0]}', which the guide lacks.",
                hint=f"Give the guide a site '{lacking[0]}' too: it decides whether '{site.name}' exists.",
            )


def check_guide(sites: "Sites") -> None:
    """Checks that the guide is a distribution over the model's latents; a draw beside them counts in log Q alone.

    Args:
        sites: The sites of both programs.

    Raises:
        StructureError: It weighs values by an observation or a factor, or is the model.
    """
    latents = {site.name for site in sites.values() if site.size > 1}
    for site in sites.values():
        if site.role != "guide":
            continue
        read = sorted(site.scope & latents)
        if site.kind == "observed" and read:
            raise _weighs(site.name, read[0], sites)
        if ("model", site.name) in sites:
            continue
        if site.kind == "enumerated":
            _warn_of_auxiliary(site)
        elif site.kind == "sampled" and not site.auxiliary:
            warnings.warn(
                f"The guide samples '{site.name}', which the model lacks: its log-probability counts in F with nothing "
                "beside it. If that is meant, mark it with infer={'is_auxiliary': True}.",
                stacklevel=2,
            )


def _weighs(name: str, latent: str, sites: "Sites") -> StructureError:
    if not any(site.role == "model" and site.kind == "observed" for site in sites.values()):
        return StructureError(
            f"The guide observes site '{name}', and the model observes nothing: the two are swapped.",
            hint="The programs come first, the model and then the guide, and the data after them.",
        )
    return StructureError(
        f"Site '{name}' of the guide weighs the values of latent '{latent}' by a factor: Q is then not normalised, and "
        "F is no bound.",
        hint="Put the weight into the distribution of the latent itself; what is observed belongs into the model.",
    )


def _warn_of_auxiliary(site: "SiteStructure") -> None:
    if not site.auxiliary:
        warnings.warn(
            f"The guide has a discrete latent '{site.name}', which the model lacks: it is summed out of the guide, and "
            "a latent of the model that it was meant for is summed out of the model. Compare the spelling of the "
            "names; if it is meant so, mark it with infer={'is_auxiliary': True}.",
            VFEWarning,
            stacklevel=2,
        )
