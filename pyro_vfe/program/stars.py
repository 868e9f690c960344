r"""One plate read by index in another: labels of items, the long format.

    sum_l log p(y_l | z[item_l])  =  sum_i T(i, z_i)        T(i, k) = sum over the labels l of item i of log p(y_l | k)

A site in plate `labels` that reads one latent of plate `items` at a constant index is a star: its table (labels x K) is
added up by item, and is a factor of the items' plate from then on.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from pyro_vfe.program.masking import unmasked
from pyro_vfe.program.places import Places
from pyro_vfe.program.recorder import Plate, Site


@dataclass(frozen=True, eq=False)
class Star:
    """Where the elements of a site are added up."""

    home: tuple[Plate, ...]
    """The plates of the latent that the site reads."""
    index: Tensor
    """The element of the latent that each element of the site reads, counted through its plates; the batch's shape."""

    def site(self, site: Site) -> Site:
        """The site as one in the plates of the latent."""
        return replace(site, plates=self.home, scale=1.0 if isinstance(site.scale, Tensor) else site.scale)

    def added(self, values: Tensor, site: Site, nesting: int) -> Tensor:
        """The site's numbers, weighted where its weights are its elements' own, added up by element of the latent.

        Args:
            values: Numbers of the site's batch shape, with dims of other latents on the left of `nesting` dims.
            site: The site.
            nesting: How many batch dims belong to plates.
        """
        if isinstance(site.scale, Tensor):
            values = values * site.scale
        batch = self.index.shape
        values = values.reshape((1,) * (nesting - values.dim()) + values.shape)
        others = values.shape[: values.dim() - nesting]
        flat = values.expand(*others, *(1,) * (nesting - len(batch)), *batch).reshape(*others, -1)
        sizes = {plate.dim: plate.size for plate in self.home}
        shape = [sizes.get(dim, 1) for dim in range(-nesting, 0)]
        sums = flat.new_zeros(*others, prod(shape)).index_add(-1, self.index.reshape(-1), flat)
        return sums.reshape(*others, *shape)


def index_of(site: Site, places: Places, reads: Callable[[object], bool]) -> Tensor | None:
    """Returns which element of a latent each element of a site reads; None where that is not known to be one.

    Args:
        site: The site.
        places: The places of the latent's elements.
        reads: Whether a tensor was computed from the latent.
    """
    fn, mask = unmasked(site)
    sizes = {plate.dim: plate.size for plate in site.plates}
    batch = tuple(sizes.get(dim, 1) for dim in range(min(sizes), 0))
    held = [*_held(fn), (site.value, fn.event_dim), (mask, 0), (site.scale, 0)]
    found = [_reduced(places.of(tensor), event_dims, batch) for tensor, event_dims in held if reads(tensor)]
    first = found[0] if found else None
    same = (one is not None and first is not None and torch.equal(one, first) for one in found)
    return first if all(same) else None


def _held(fn: Any, one_event: int = 0) -> Iterator[tuple[Any, int]]:
    """The parameters of a distribution, and the number of dims that belong to an event in each."""
    one_event += fn.__dict__.get("reinterpreted_batch_ndims", 0)
    for name, constraint in getattr(fn, "arg_constraints", {}).items():
        yield fn.__dict__.get(name), one_event + getattr(constraint, "event_dim", 0)
    if "base_dist" in fn.__dict__:
        yield from _held(fn.base_dist, one_event)


def _reduced(place: Tensor | None, event_dims: int, batch: tuple[int, ...]) -> Tensor | None:
    """The places along the batch dims, where they are the same along an event's dims and those of other latents."""
    if place is None:
        return None
    others = place.dim() - event_dims - len(batch)
    for dim in (*[-1] * min(event_dims, place.dim()), *[0] * others):
        first = place.select(dim, 0)
        if not bool((place == first.unsqueeze(dim)).all()):
            return None
        place = first
    try:
        return place.expand(batch)
    except RuntimeError:
        return None
