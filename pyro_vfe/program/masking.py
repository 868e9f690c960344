"""Masks around a site.

masked(log p, m)  =  log p where m holds, 0 elsewhere
"""

from typing import Any

import torch
from torch import Tensor

from pyro_vfe.program.recorder import Site


def unmasked(site: Site) -> tuple[Any, Tensor | bool | None]:
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
