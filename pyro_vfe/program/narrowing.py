"""Sites restricted to a stretch of one of their batch dims: what a program would say of a part of the data.

    log p(u_n | v)  for n in [start, start + length)        from the distribution and the values of those n alone

What `expand` repeated along the dim stays repeated, so that slim tables stay slim.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from pyro_vfe.program.log_prob import event_dims_of
from pyro_vfe.program.recorder import Plate, Site


def narrowed(fn: Any, dim: int, start: int, length: int) -> Any:
    """The distribution of a stretch of a batch dim; None for a family whose tensors' dims are not known.

    Args:
        fn: A distribution of torch or Pyro.
        dim: The batch dim, negative.
        start: The first element.
        length: How many.
    """
    if -dim > len(fn.batch_shape) or fn.batch_shape[dim] == 1:
        return fn
    kind = type(fn).__name__
    if kind in ("ExpandedDistribution", "MaskedDistribution") or isinstance(fn, Independent):
        return _narrowed_wrapper(fn, dim, start, length)
    family: Any = type(fn)
    event_dims = event_dims_of(family)
    if event_dims is None:
        return None
    made: dict[int, Tensor] = {}  # one tensor may have two names, by which a family knows what it was given
    changed: dict[str, Any] = {}
    for name, part in fn.__dict__.items():
        if isinstance(part, Tensor):
            event_dim = event_dims.get("probs" if name == "_param" else name)
            if event_dim is None:
                return None
            if id(part) not in made:
                made[id(part)] = stretch(part, dim - event_dim, start, length)
            changed[name] = made[id(part)]
        elif isinstance(part, Distribution):
            changed[name] = narrowed(part, dim, start, length)
            if changed[name] is None:
                return None
    return _copy(fn, changed, dim, length)


def narrowed_site(site: Site, name: str, start: int, length: int) -> Site | None:
    """The site for a stretch of one of its plates; None where its distribution cannot be restricted.

    Args:
        site: A site in the plate.
        name: The plate.
        start: The first element.
        length: How many.
    """
    dim = next(plate.dim for plate in site.plates if plate.name == name)
    fn = narrowed(site.fn, dim, start, length)
    if fn is None:
        return None
    return replace(
        site,
        fn=fn,
        value=stretch(site.value, dim - len(site.fn.event_shape), start, length),
        mask=stretch(site.mask, dim, start, length) if isinstance(site.mask, Tensor) else site.mask,
        scale=stretch(site.scale, dim, start, length) if isinstance(site.scale, Tensor) else site.scale,
        plates=tuple(_shortened(plate, length) if plate.name == name else plate for plate in site.plates),
    )


def _narrowed_wrapper(fn: Any, dim: int, start: int, length: int) -> Any:
    inner = dim - fn.reinterpreted_batch_ndims if isinstance(fn, Independent) else dim
    base = narrowed(fn.base_dist, inner, start, length)
    if base is None:
        return None
    changed: dict[str, Any] = {"base_dist": base}
    if isinstance(fn.__dict__.get("_mask"), Tensor):
        changed["_mask"] = stretch(fn._mask, dim, start, length)
    return _copy(fn, changed, dim, length)


def _copy(fn: Any, changed: dict[str, Any], dim: int, length: int) -> Any:
    result = object.__new__(type(fn))
    result.__dict__.update(fn.__dict__)
    result.__dict__.update(changed)
    shape = list(fn.batch_shape)
    shape[dim] = length
    result._batch_shape = torch.Size(shape)
    return result


def stretch(values: Tensor, dim: int, start: int, length: int) -> Tensor:
    """A stretch of a tensor along a dim, counted from the right; itself where it lacks the dim."""
    if -dim > values.dim() or values.shape[dim] == 1:
        return values
    return values.narrow(dim, start, length)


def _shortened(plate: Plate, length: int) -> Plate:
    return replace(plate, size=length)
