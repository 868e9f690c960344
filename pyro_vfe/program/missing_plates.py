"""Batch dims that belong to no plate: what a site has there would count once, or as the values of some latent."""

import torch

from pyro_vfe.engine.shapes import broadcast_shapes
from pyro_vfe.errors import StructureError
from pyro_vfe.program.missing_data import shown_gaps
from pyro_vfe.program.recorder import Site


def check_batch_dims(site: Site) -> None:
    """Checks that each batch dim of a site in an ordinary run is that of a plate around it.

    Args:
        site: A site as it ran with sampled values.

    Raises:
        StructureError: One is not, most often as there is no plate around the data.
    """
    shape = site.fn.batch_shape
    if site.kind == "observed":
        try:
            shape = broadcast_shapes(shape, site.value.shape[: site.value.dim() - site.fn.event_dim])
        except RuntimeError:  # Value and distribution do not fit together, which scoring says.
            return
    sizes = {plate.dim: plate.size for plate in site.plates}
    for dim in range(-len(shape), 0):
        if shape[dim] not in (1, sizes.get(dim)):
            raise no_plate(site, shape, dim)


def no_plate(site: Site, shape: torch.Size, dim: int) -> StructureError:
    """The error for a batch dim that is no plate.

    Args:
        site: The site.
        shape: The shape of its log-probability.
        dim: The dim, negative.
    """
    plates = ", ".join(f"'{plate.name}' (dim {plate.dim}, size {plate.size})" for plate in site.plates) or "none"
    return StructureError(
        f"Site '{site.name}' of the {site.role} has a log-probability of shape {tuple(shape)}, and its dim {dim} is no "
        f"plate around it (plates: {plates}).",
        hint="If its elements are independent, put the site, and the latents that each element has of its own, into "
        f"`with pyro.plate(name, {shape[dim]}, dim={dim})`; otherwise make them one event with `.to_event(n)`.",
    )


def cannot_score(site: Site, error: Exception) -> tuple[str, str]:
    """The fact and the way out for an observation that its distribution does not score.

    Args:
        site: The site.
        error: What the distribution said.
    """
    said = str(error).partition("\n")[0].removesuffix(", but found invalid values:")  # and then all of them
    fact = f"Site '{site.name}' of the {site.role} cannot score its value: {said}."
    gaps = shown_gaps([site])
    if gaps is not None:
        return gaps
    if "not broadcastable" in str(error):
        return fact, "Give the data the size of the site's plates and of one event."
    return fact, "Observe a value that the distribution can take."
