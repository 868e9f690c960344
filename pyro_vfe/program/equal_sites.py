"""Sites that say the same of different latents or of different data.

    log p(u_t | z_t, theta) for t = 1, ..., T     =     one call of log_prob, with the data along a new first dim

Equal computations of a run are shared, so that the distributions of equal steps of a loop hold the same tensors.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vfe.program.log_prob import log_prob
from pyro_vfe.program.masking import masked, unmasked
from pyro_vfe.program.provenance import Provenance
from pyro_vfe.program.recorder import Site
from pyro_vfe.program.sharing import FAMILIES
from pyro_vfe.program.supports import unwrapped


def reads_itself(site: Site, provenance: Provenance) -> bool:
    """Whether the distribution of a latent depends on the latent, by a draw that was made once per value of it."""
    name = site.name
    return name in provenance.of_distribution(site.fn) or name in provenance.of(site.scale) | provenance.of(site.mask)


def stacked_log_prob(sites: Sequence[Site], score: Callable[[Any, Tensor], Tensor] = log_prob) -> Tensor | None:
    """The log-probabilities of the data of equal sites under the distribution of the first, one after the other.

    Args:
        sites: Sites that differ in their data and latents alone.
        score: What is computed of a distribution and its data.

    Returns:
        Shape `(T, *batch)`; None where the distribution is of a kind that may not take several data at a time, or
        where some datum is not in its support.
    """
    fn, mask = unmasked(sites[0])
    inner = unwrapped(fn)
    while hasattr(inner, "base_dist"):
        inner = unwrapped(inner.base_dist)
    if type(inner) not in FAMILIES:
        return None
    event_dims = len(fn.event_shape)
    batch_dims = max(len(fn.batch_shape), sites[0].value.dim() - event_dims)
    values = _stacked([site.value for site in sites], batch_dims + event_dims)
    try:
        result = score(fn, values)
    except ValueError:
        return None
    if result.dim() != batch_dims + 1 or len(result) != len(sites):
        return None
    if isinstance(mask, Tensor):
        masks = [m for m in (unmasked(site)[1] for site in sites) if isinstance(m, Tensor)]
        return masked(result, _stacked(masks, batch_dims))
    return masked(result, mask)


def _stacked(tensors: Sequence[Tensor], dims: int) -> Tensor:
    """Tensors of one shape along a new dim left of `dims` others."""
    stacked = torch.stack(list(tensors))
    shape = stacked.shape
    return stacked.reshape((shape[0],) + (1,) * (dims + 1 - len(shape)) + shape[1:])
