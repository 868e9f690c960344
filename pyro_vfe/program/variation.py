"""Along which plates the table of each site can vary: an ordinary run that a plate cannot tell apart.

    log p(mid | top)  in a plate of a million data, top on an axis of its own        varies along top and mid alone

Each latent takes one value, the same for all elements, as its whole support has no plate either when it is enumerated.
What varies along a plate then (data, an inference network's output, a mask) is what the tables vary along.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from pyro_vfe.engine.shapes import broadcast_shapes
from pyro_vfe.errors import VFEError
from pyro_vfe.program.chain_sites import is_chain
from pyro_vfe.program.families import form_of
from pyro_vfe.program.layout import Layout, Program
from pyro_vfe.program.log_prob import is_listed, listed, slim
from pyro_vfe.program.masking import unmasked
from pyro_vfe.program.narrowing import narrowed_site
from pyro_vfe.program.recorder import Plate, Role, Site, record_both
from pyro_vfe.program.site_structure import Variation
from pyro_vfe.program.sizeless import SizelessPlates
from pyro_vfe.program.supports import finite_support


def with_variations(
    layout: Layout, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Layout:
    """The layout with what each site's table can vary along; as it was where the programs do not run so.

    Args:
        layout: The layout of the programs.
        model: The generative model.
        guide: The guide.
        args: Arguments of both.
        kwargs: Keyword arguments of both.
    """

    def first_value(name: str, role: Role, fn: Any, plates: tuple[Plate, ...]) -> Tensor:
        support = finite_support(fn, name)
        return support[0].reshape((1,) * -layout.dims.get(name, 0) + support.shape[1:])

    try:
        first, second = record_both(
            model,
            guide,
            args,
            kwargs,
            first_value,
            sequential=layout.sequential,
            sizeless=SizelessPlates(layout.sizes_around),
        )
        sites = (*first.sites.values(), *second.sites.values())
        found = {(site.role, site.name): _variation(site) for site in sites if (site.role, site.name) in layout.sites}
    except (VFEError, RuntimeError, ValueError, IndexError, TypeError):
        return layout  # The enumerated run tells what is wrong with programs that cannot take one value for all.
    return replace(layout, sites={key: replace(site, variation=found.get(key)) for key, site in layout.sites.items()})


def _variation(site: Site) -> Variation | None:
    if site.kind == "unread" or is_chain(site):
        return None
    fn, mask = unmasked(site)
    batch, elements = _shape(site, fn)
    shapes = [batch, *(part.shape for part in (mask, site.scale) if isinstance(part, Tensor))]
    separable = (plate.name for plate in site.plates if narrowed_site(site, plate.name, 0, 1) is not None)
    return Variation(_along(site.plates, broadcast_shapes(*shapes)), elements, frozenset(separable))


def _shape(site: Site, fn: Any) -> tuple[torch.Size, int]:
    """The batch shape along which a log-probability varies, and the numbers that are made for each entry."""
    if site.kind == "enumerated" and is_listed(fn):
        return listed(fn).shape[:-1], 1
    event_dims = len(fn.event_shape)
    value = slim(site.value, event_dims)
    data = value.shape[: value.dim() - event_dims]
    form = form_of(fn)
    if form is None:
        return broadcast_shapes(fn.batch_shape, data), prod(fn.event_shape)
    batch, data = form.batch_shape(), broadcast_shapes(data, form.batch_shape(fixed=True))
    both = any(a > 1 and b > 1 for a, b in zip(reversed(batch), reversed(data), strict=False))
    is_product = form.family.width is not None and not both
    return broadcast_shapes(batch, data), 1 if is_product else prod(fn.event_shape)


def _along(plates: Iterable[Plate], shape: torch.Size) -> frozenset[str]:
    return frozenset(plate.name for plate in plates if -plate.dim <= len(shape) and shape[plate.dim] > 1)
