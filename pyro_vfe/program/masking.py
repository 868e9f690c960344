"""Masks around a site.

masked(log p, m)  =  log p where m holds, 0 elsewhere
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import transform_to

from pyro_vfe.engine.shapes import broadcast_shapes

if TYPE_CHECKING:
    from pyro_vfe.program.recorder import Site


def unmasked(site: "Site") -> tuple[Any, Tensor | bool | None]:
    """The site's distribution and its mask, from `poutine.mask` and from `fn.mask(...)` together."""
    fn, mask = site.fn, site.mask
    while type(fn).__name__ == "MaskedDistribution":
        own = fn._mask
        mask = own if mask is None or mask is True else mask & own if not isinstance(mask, bool) else False
        fn = fn.base_dist
    return fn, None if mask is True else mask


def masked(values: Tensor, mask: Tensor | bool | None) -> Tensor:
    """The values where the mask holds, and zero elsewhere."""
    if mask is None or mask is True:
        return values
    if mask is False:
        return torch.zeros_like(values)
    return torch.where(mask, values, values.new_zeros(()))


def without_gaps(site: "Site") -> Tensor:
    """The site's observed value; where its mask hides a NaN, with a value that the distribution can take.

    A gradient through a hidden NaN would be NaN, and so would the mean of the data.
    """
    if site.mask is None and type(site.fn).__name__ != "MaskedDistribution":
        return site.value
    (fn, mask), value = unmasked(site), site.value
    if mask is None or not value.is_floating_point() or not bool(value.isnan().any()):
        return value
    event = tuple(range(-len(fn.event_shape), 0))
    missing = value.isnan().any(event) if event else value.isnan()
    hidden = missing & ~_anywhere(torch.as_tensor(mask, device=value.device), missing.shape)
    filler = value[~missing][0] if bool((~missing).any()) else _possible(fn, value)
    return torch.where(hidden.reshape(hidden.shape + (1,) * len(event)), filler, value)


def _anywhere(mask: Tensor, shape: torch.Size) -> Tensor:
    """Whether the mask holds for an element anywhere along the dims that the element lacks."""
    whole = mask.expand(broadcast_shapes(mask.shape, shape))
    return whole.long().sum_to_size(shape) > 0


def _possible(fn: Any, like: Tensor) -> Tensor:
    """A value in the support of a distribution, for one event."""
    try:
        transform = transform_to(fn.support)
    except NotImplementedError:  # The supports of counts and of answers, which begin at 0.
        return like.new_zeros(fn.event_shape)
    return transform(like.new_zeros(transform.inverse_shape(fn.event_shape)))
