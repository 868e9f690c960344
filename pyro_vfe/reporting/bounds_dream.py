"""The latents of a dream as a particle: an exact draw from the posterior given what was dreamt.

References:
    Grosse, Ghahramani and Adams (2015), Sandwiching the marginal likelihood using bidirectional Monte Carlo.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pyro_vfe.energy.particles import Particles, Sampler, drawn_sites
from pyro_vfe.errors import StructureError, VFEError
from pyro_vfe.program.dreams import Dream
from pyro_vfe.program.enumeration import Enumeration, is_random


def arguments_of(
    dream: Dream, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments that a dream stands in.

    Args:
        dream: A dream.
        args: Positional arguments that were given beside it.
        kwargs: Keyword arguments that were given beside it.

    Raises:
        VFEError: There are some.
    """
    if not isinstance(dream, Dream):
        raise VFEError(f"dream is a {type(dream).__name__}.", hint="Pass what vfe.dream(model, *args) returns.")
    if args or kwargs:
        raise VFEError(
            "bounds was given a dream and arguments of the programs.",
            hint="A dream carries the arguments that its observations stand in: leave the others out.",
        )
    return dream.args, dict(dream.kwargs)


def log_weights_of(dream: Dream, sampler: Sampler, drawn: Particles) -> Tensor:
    """Returns the log weights of a dream's own latents, shape `(*plates)`.

    Args:
        dream: A dream.
        sampler: The programs at the dream's arguments.
        drawn: Particles of the guide there.

    Raises:
        StructureError: The dream is not of this model, or the guide has draws that it has no values for.
    """
    run = drawn.first
    for plate, _, _ in run.subsampled:
        raise StructureError(
            f"Plate '{plate}' is subsampled: the dream's latents are those of other elements.",
            hint="Dream of the whole plate, and call bounds without subsampling.",
        )
    for name, site in drawn_sites(run).items():
        value = dream.latents.get(name, site.value)
        if value.shape != site.value.shape:
            raise StructureError(
                f"Latent '{name}' has shape {tuple(value.shape)} in the dream and {tuple(site.value.shape)} in the "
                "guide.",
                hint="Take the dream of this very model, at these arguments.",
            )
    dreamt = sampler.given(dream.latents)
    _check_latents(dream, dreamt.first)
    log_weights = dreamt.weights.by_datum[0]
    if bool(log_weights.isneginf().any()):
        raise StructureError(
            f"The dream has probability zero at site '{dreamt.ruled_out[0]}' of the model.",
            hint="Take the dream of this very model, with the parameters that it has now.",
        )
    return log_weights


def _check_latents(dream: Dream, run: Enumeration) -> None:
    """Checks that all that the guide draws is the dream's."""
    known = {name for (role, name), site in run.sites.items() if role == "model" and site.kind != "observed"}
    drawn = drawn_sites(run)
    lacking = sorted((drawn.keys() & known) - dream.latents.keys())
    if lacking:
        raise StructureError(
            f"The dream lacks latent '{lacking[0]}', which guide and model have.",
            hint="Take the dream of this very model: vfe.dream(model, ...).",
        )
    own = sorted(drawn.keys() - known)
    points = sorted(name for name, site in drawn.items() if not is_random(site))
    if own or points:
        fact = (
            f"The guide draws '{own[0]}', of which the dream holds no value"
            if own
            else f"The guide has a point estimate of '{points[0]}' (a Delta), and the dream another value of it"
        )
        raise StructureError(
            f"{fact}: there is no upper bound from this dream.",
            hint="Use a guide that draws the model's own latents; hold a parameter fixed in the model by "
            "pyro.poutine.condition before dreaming.",
        )
