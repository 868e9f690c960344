"""The finite support of a distribution, as one table of values.

    support(fn)  =  (value_0, ..., value_{K-1}),    shape (K, *event_shape)

`to_event(n)` of a discrete distribution has the cartesian product of its elements' supports.
"""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Independent

from pyro_vfe.errors import CostError, ScaleError, SupportError, UnenumerableError
from pyro_vfe.program.masking import mask_of_elements

MAX_VALUES = 2**20
"""A site with more joint values than this is never listed."""


def unwrapped(fn: Any) -> Any:
    """The distribution inside expansion and mask wrappers."""
    while type(fn).__name__ in ("ExpandedDistribution", "MaskedDistribution"):
        fn = fn.base_dist
    return fn


def is_point(fn: Any) -> bool:
    """Whether `fn` is a Delta: a point estimate, and nothing that is drawn at random."""
    fn = unwrapped(fn)
    return is_point(fn.base_dist) if isinstance(fn, Independent) else type(fn).__name__ == "Delta"


def is_enumerable(fn: Any) -> bool:
    """Whether the values of `fn` can be listed."""
    fn = unwrapped(fn)
    if isinstance(fn, Independent):
        return is_enumerable(fn.base_dist)
    return bool(getattr(fn, "has_enumerate_support", False))


def support_size(fn: Any) -> int:
    """The number of values of `fn`, without listing them."""
    fn = unwrapped(fn)
    if isinstance(fn, Independent):
        return int(support_size(fn.base_dist) ** math.prod(_event_part(fn)))
    if hasattr(fn, "_num_events"):
        return int(fn._num_events)
    return len(finite_support(fn, "?"))


def finite_support(fn: Any, name: str) -> Tensor:
    """All values of `fn`, shape `(K, *event_shape)`.

    Args:
        fn: A distribution for which `is_enumerable` holds.
        name: The site, for the error.

    Raises:
        CostError: The cartesian product is too large to list.
        UnenumerableError: The elements of a batch differ in their supports.
    """
    fn = unwrapped(fn)
    if isinstance(fn, Independent):
        return _product_support(fn, name)
    if isinstance(fn, Categorical):
        return _first_integers(fn._num_events, fn._param.device).clone()
    try:
        values = fn.enumerate_support(expand=False)
    except NotImplementedError as error:
        raise UnenumerableError(
            f"Latent site '{name}' is {type(fn).__name__}, whose elements differ in their support ({error}).",
            hint="Give the elements one support, or let the guide draw the site: infer={'enumerate': None} there.",
        ) from error
    return values.reshape(values.shape[:1] + fn.event_shape)


def common_support(fn: Any) -> object:
    """What distributions with the same support have in common, for families where that is plain; None elsewhere."""
    fn = unwrapped(fn)
    if isinstance(fn, Categorical):
        return Categorical, fn._num_events, fn._param.device
    if isinstance(fn, Bernoulli):
        return Bernoulli, fn._param.dtype, fn._param.device
    return None


@lru_cache(maxsize=256)
def _first_integers(count: int, device: torch.device) -> Tensor:
    """0, ..., count - 1: chains ask for it at every step, and copying is quicker than counting."""
    return torch.arange(count, device=device)


def check_same_support(name: str, fn: Any, guide_fn: Any) -> None:
    """Checks that guide and model mean the same values of a latent.

    Raises:
        SupportError: They do not.
    """
    if is_enumerable(fn):
        values, guide_values = finite_support(fn, name), finite_support(guide_fn, name)
        if values.shape == guide_values.shape and bool((values == guide_values).all()):
            return
    raise SupportError(
        f"Latent site '{name}' is {_described(guide_fn)} in the guide and {_described(fn)} in the model.",
        hint="Give both the same support.",
    )


def _described(fn: Any) -> str:
    values = f" with {support_size(fn)} values" if is_enumerable(fn) else ""
    return f"{type(unwrapped(fn)).__name__}{values}"


def _event_part(fn: Independent) -> torch.Size:
    batch_shape = fn.base_dist.batch_shape
    return batch_shape[len(batch_shape) - fn.reinterpreted_batch_ndims :]


def _product_support(fn: Independent, name: str) -> Tensor:
    mask = mask_of_elements(fn)
    if mask is not None and not bool(torch.as_tensor(mask).all()):
        raise ScaleError(
            f"Latent site '{name}' is one event, of which a mask hides some elements: their values would be summed as "
            "if each had probability 1.",
            hint="Give the elements a plate in place of to_event, with poutine.mask around them.",
        )
    elements, base = _event_part(fn), finite_support(fn.base_dist, name)
    size = len(base) ** math.prod(elements)
    if size > MAX_VALUES:
        raise CostError(
            f"Latent site '{name}' has {len(base)} to the power {math.prod(elements)} joint values.",
            hint="Give its elements a plate of their own instead of to_event, or sample it: a site of that name in the "
            "guide with infer={'enumerate': None}, or with vfe.FreeEnergy(on_cost=\"sample\").",
            sites=(name,),
        )
    count = math.prod(elements)
    index = torch.arange(size, device=base.device)
    powers = len(base) ** torch.arange(count - 1, -1, -1, device=base.device)
    digits = index.unsqueeze(-1) // powers % len(base)
    return base[digits].reshape((size, *elements, *base.shape[1:]))
