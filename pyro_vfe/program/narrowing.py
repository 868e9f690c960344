"""Sites restricted to a stretch of one of their batch dims: what a program would say of a part of the data.

    log p(u_n | v)  for n in [start, start + length)        from the distribution and the values of those n alone

What `expand` repeated along the dim stays repeated, so that slim tables stay slim.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Transform
from torch.distributions.constraints import Constraint

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
            if event_dim is None or not _lies_over(part.shape[: part.dim() - event_dim], fn.batch_shape):
                return None
            if id(part) not in made:
                made[id(part)] = stretch(part, dim - event_dim, start, length)
            changed[name] = made[id(part)]
        elif isinstance(part, Distribution):
            changed[name] = _narrowed_part(part, fn, dim, start, length)
            if changed[name] is None:
                return None
        elif not _is_same_for_all(part):
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


def _narrowed_part(part: Any, fn: Any, dim: int, start: int, length: int) -> Any:
    """A distribution of which another is made; its batch dims are the other's, and more at the right."""
    more = len(part.batch_shape) - len(fn.batch_shape)
    if more < 0 or not _lies_over(part.batch_shape[: len(fn.batch_shape)], fn.batch_shape):
        return None
    return narrowed(part, dim - more, start, length)


def _lies_over(shape: Sequence[int], batch: Sequence[int]) -> bool:
    """Whether a tensor of the shape has, along each batch dim, an entry for each element or one for all."""
    pairs = zip(reversed(shape), reversed(batch), strict=False)
    return len(shape) <= len(batch) and all(size in (1, whole) for size, whole in pairs)


def _is_same_for_all(part: Any) -> bool:
    """Whether what a distribution holds besides tensors and distributions is the same for all elements, for certain."""
    if isinstance(part, list | tuple):
        return all(_is_same_for_all(item) for item in part)
    if isinstance(part, Transform):
        own = part.inv if type(part).__name__ == "_InverseTransform" else part  # The two hold each other.
        return all(_is_same_for_all(item) for name, item in own.__dict__.items() if name not in ("_inv", "_cached_x_y"))
    return part is None or isinstance(part, bool | int | float | str | Constraint)


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
