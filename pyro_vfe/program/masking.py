"""Masks around a site.

masked(log p, m)  =  log p where m holds, 0 elsewhere
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import transform_to

from pyro_vfe.engine.shapes import broadcast_shapes

if TYPE_CHECKING:
    from pyro_vfe.program.recorder import Role, Site


@dataclass(frozen=True, eq=False)
class Pin:
    """Where a latent has one value, at no cost: where it does not exist, or where the data say what it is."""

    where: Tensor | bool
    index: Tensor
    """The value's position in the support, of a shape that broadcasts to the batch."""


def unmasked(site: "Site") -> tuple[Any, Tensor | bool | None]:
    """The site's distribution and its mask, from `poutine.mask` and from `fn.mask(...)` together."""
    return without_mask(site.fn, site.mask)


def without_mask(fn: Any, mask: Tensor | bool | None) -> tuple[Any, Tensor | bool | None]:
    """A distribution without the masks of its own, and what they leave of a mask around it."""
    while type(fn).__name__ == "MaskedDistribution":
        own = fn._mask
        mask = own if mask is None or mask is True else mask & own if not isinstance(mask, bool) else False
        fn = fn.base_dist
    return fn, None if mask is True else mask


def mask_of_elements(fn: Any) -> Tensor | bool | None:
    """The mask of single elements of one event, `fn.mask(mask).to_event(1)`; None where there is none."""
    inner, mask = without_mask(fn, None)[0], None
    while type(inner).__name__ in ("Independent", "ExpandedDistribution"):
        inner, mask = without_mask(inner.base_dist, mask)
    return mask


def hand_over_masks(sites: "Mapping[tuple[Role, str], Site]") -> None:
    """Gives latents of the guide the masks that the model alone has around them: where they hold, both exist.

    Args:
        sites: The sites of both programs.
    """
    for (role, name), site in sites.items():
        guide_site = sites.get(("guide", name))
        if role == "model" and site.kind in ("enumerated", "sampled") and guide_site is not None:
            mask = unmasked(site)[1]
            if mask is not None and unmasked(guide_site)[1] is None:
                guide_site.mask = mask


def masked(values: Tensor, mask: Tensor | bool | None) -> Tensor:
    """The values where the mask holds, and zero elsewhere."""
    if mask is None or mask is True:
        return values
    if mask is False:
        return torch.zeros_like(values)
    return torch.where(mask, values, values.new_zeros(()))


def without_gaps(site: "Site") -> Tensor:
    """The site's observed value; where its mask hides a NaN, a -1 or the like, with a value of the distribution's.

    A distribution refuses to score what it cannot take, a gradient through a hidden NaN would be NaN, and so would the
    mean of the data.
    """
    if site.mask is None and type(site.fn).__name__ != "MaskedDistribution":
        return site.value
    (fn, mask), value = unmasked(site), site.value
    if mask is None:
        return value
    impossible = _impossible(fn, value)
    if not bool(impossible.any()):
        return value
    hidden = impossible & ~_anywhere(torch.as_tensor(mask, device=value.device), impossible.shape)
    filler = value[~impossible][0] if bool((~impossible).any()) else _possible(fn, value)
    return torch.where(hidden.reshape(hidden.shape + (1,) * len(fn.event_shape)), filler, value)


def _impossible(fn: Any, value: Tensor) -> Tensor:
    """Which events are no values of a distribution, whatever its other elements are."""
    try:
        outside, reduced = ~fn.support.check(value), fn.support.event_dim
    except RuntimeError:  # A support that nobody wrote down, or a value that does not fit, which scoring says.
        outside, reduced = value.isnan(), 0
    for _ in range(len(fn.event_shape) - reduced):
        outside = outside.any(-1)
    return outside.long().sum_to_size(value.shape[: value.dim() - len(fn.event_shape)]) > 0


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
