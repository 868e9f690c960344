"""Which element of a latent's plate each number of a run was computed from, where a plate is read by index in another.

    z of items, y of labels:    place(z) = (0, 1, ..., I - 1),    place(z[item]) = item,    place(mu[z[item]]) = item

What moves numbers moves their places; what computes number by number leaves them where they are. After anything else
nobody knows the place.
"""

from typing import Any

import torch
from torch import Tensor

from pyro_vfe.program.escapes import Sites
from pyro_vfe.program.operations import Observer

_MOVING = frozenset(
    """
    __getitem__ index_select gather take take_along_dim expand expand_as broadcast_to reshape view view_as flatten
    unflatten ravel squeeze unsqueeze permute transpose swapaxes movedim t T mT select narrow repeat repeat_interleave
    tile clone contiguous detach flip roll
    """.split()  # noqa: SIM905
)

_LISTING = frozenset(
    """
    stack cat concat concatenate hstack vstack unbind split chunk tensor_split meshgrid
    """.split()  # noqa: SIM905
)
"""Operations that put tensors together, or take one apart."""

_BY_NUMBER = frozenset(
    """
    long int float double half bool to type type_as bfloat16 add sub mul div true_divide floor_divide remainder fmod pow
    where clamp clamp_min clamp_max minimum maximum lerp abs neg exp log log1p expm1 sqrt sigmoid logit softplus tanh
    relu sin cos square reciprocal sign round floor ceil eq ne lt le gt ge logical_not logical_and logical_or
    logical_xor bitwise_not bitwise_and bitwise_or masked_fill float_power rsub positive logsigmoid erf logaddexp
    """.split()  # noqa: SIM905
)

_WIDENING = frozenset(["one_hot", "embedding"])
"""Operations that add dims on the right of each number."""

_ALONG_A_DIM = frozenset(
    """
    sum mean prod logsumexp amax amin softmax log_softmax softmin cumsum cumprod logcumsumexp var std norm vector_norm
    normalize flip sort argmax argmin
    """.split()  # noqa: SIM905
)
"""Operations that join numbers along a dim: those of one place."""

_PRODUCTS = frozenset(["matmul", "linear", "mv"])
"""Operations that join numbers along their last dim: those of one place."""


class Places(Observer):
    """Keeps the places of a latent's elements on the tensors of a run, and lets another observer look too."""

    def __init__(self, other: Observer) -> None:
        self.other = other
        self.latents: set[str] = set()
        """Whose elements have places."""
        self.before, self.will = other.before, other.will  # type: ignore[method-assign]
        self.again, self.reached = other.again, other.reached  # type: ignore[method-assign]

    def originate(self, value: Tensor, name: str) -> None:
        """Numbers the elements of a latent without event dims."""
        self.latents.add(name)
        self._keep(value, torch.arange(value.numel(), device=value.device).reshape(value.shape))

    def of(self, tensor: object) -> Tensor | None:
        """The place of each number of a tensor, of its shape; None where nobody knows."""
        mark, sites = getattr(tensor, "_vfe_place", None), getattr(tensor, "_vfe_sites", None)
        if mark is None and sites is not None and sites[2] is not None:  # handed out for an earlier result
            return self.of(sites[2])
        return mark[1] if mark is not None and mark[0] is self else None

    def _is_lost(self, tensor: object) -> bool:
        """Whether a tensor was computed from a latent, and nobody knows from which of its elements."""
        mark = getattr(tensor, "_vfe_sites", None)
        return mark is not None and not self.latents.isdisjoint(mark[1]) and self.of(tensor) is None

    def did(self, func: Any, name: str, args: Any, kwargs: Any, result: Any, sites: Sites, before: Any = None) -> None:
        """Gives what an operation made the places of what it was made from."""
        self.other.did(func, name, args, kwargs, result, sites, before)
        made = (result,) if isinstance(result, Tensor) else result if isinstance(result, (tuple, list)) else ()
        if not made or not args or any(map(self._is_lost, _flat((*args, *kwargs.values())))):
            return
        with torch._C.DisableTorchFunction(), torch.no_grad():
            try:
                if name == "broadcast_tensors":
                    places = self._broadcast(_flat(args), made[0].shape)
                elif name in _LISTING:
                    places = self._listed(func, args, kwargs)
                else:
                    places = [self._after(func, name.strip("_"), args, kwargs, result)]
            except (RuntimeError, IndexError, TypeError, ValueError):  # An operation of a kind not thought of.
                return
            for one, place in zip(made, places, strict=False):
                if place is not None and place.shape == one.shape and not any(one is given for given in _flat(args)):
                    self._keep(one, place)

    def _broadcast(self, tensors: list[Any], shape: torch.Size) -> list[Tensor | None]:
        """The places of tensors that were brought to one shape: those of constants count for made from the others."""
        known = [None if (place := self.of(one)) is None else place.expand(shape) for one in tensors]
        common = self._together([one for one in tensors if self.of(one) is not None], shape)
        return [common if own is None else own for own in known]

    def _listed(self, func: Any, args: Any, kwargs: Any) -> list[Tensor | None]:
        """The places after tensors were put together, or taken apart."""
        given = args[0]
        places = [self.of(one) for one in (given if isinstance(given, (tuple, list)) else [given])]
        if any(one is None for one in places):
            return []
        moved = func(places if isinstance(given, (tuple, list)) else places[0], *args[1:], **kwargs)
        return [moved] if isinstance(moved, Tensor) else list(moved)

    def _after(self, func: Any, name: str, args: Any, kwargs: Any, result: Tensor) -> Tensor | None:
        first = self.of(args[0])
        others = [one for one in (*_flat(args[1:]), *_flat(kwargs.values())) if self.of(one) is not None]
        if name in ("get", "getitem", *_MOVING) and first is not None and not others:
            moved = func(first, *args[1:], **kwargs)
            return moved if isinstance(moved, Tensor) else None
        if name == "getitem" and first is None:
            return self._looked_up(args[1], result)
        if name in ("index_select", "gather", "take", "take_along_dim") and first is None and len(others) == 1:
            return self._chosen(func, name, args, kwargs, others[0])
        if name in _ALONG_A_DIM and first is not None and not others:
            return _along(first, kwargs.get("dim", args[1] if len(args) > 1 else None), result)
        if name in _PRODUCTS and first is not None and not others:
            row = _along(first, -1, first[..., 0])
            return row if row is None or result.dim() < first.dim() else row.unsqueeze(-1).expand(result.shape)
        if name in _WIDENING:
            given = [one for one in (first, *map(self.of, others)) if one is not None]
            return given[0].reshape(given[0].shape + (1,) * (result.dim() - given[0].dim())).expand(result.shape)
        if name in _BY_NUMBER or name.removeprefix("r").removeprefix("i") in _BY_NUMBER:
            return self._together([one for one in (args[0], *others) if self.of(one) is not None], result.shape)
        return None

    def _together(self, tensors: list[Any], shape: torch.Size) -> Tensor | None:
        """The place of what was computed from several tensors number by number, if it is one."""
        places = [place.expand(shape) for place in map(self.of, tensors) if place is not None]
        return places[0] if places and all(torch.equal(places[0], other) for other in places[1:]) else None

    def _chosen(self, func: Any, name: str, args: Any, kwargs: Any, index: Tensor) -> Tensor | None:
        """The place of what was taken out of a table by a latent: that of the index, along the index's dims."""
        place = self.of(index)
        assert place is not None, "asked for an index that has places"
        if name != "index_select":
            return place
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        sizes = args[0].shape
        dim = dim % len(sizes)
        return place.reshape(-1, *(1,) * (len(sizes) - dim - 1)).expand(*sizes[:dim], -1, *sizes[dim + 1 :])

    def _looked_up(self, index: Any, result: Tensor) -> Tensor | None:
        """The place of the entries of a table that a latent indexes."""
        parts = index if isinstance(index, tuple) else (index,)
        tensors = [part for part in parts if isinstance(part, Tensor)]
        shape = torch.broadcast_shapes(*(part.shape for part in tensors))
        place = self._together([part for part in tensors if self.of(part) is not None], shape)
        if place is None or any(part.dtype == torch.bool for part in tensors):
            return None
        is_index = [isinstance(part, (Tensor, int)) for part in parts]
        first, last = is_index.index(True), len(parts) - 1 - is_index[::-1].index(True)
        if not all(is_index[first : last + 1]):
            before = 0  # Indices that are apart come first.
        elif any(part is Ellipsis for part in parts[:first]):
            before = result.dim() - len(shape) - len(parts[last + 1 :])
        else:
            before = first
        right = result.dim() - before - len(shape)
        return place.reshape(*shape, *(1,) * right).expand(result.shape)

    def _keep(self, tensor: Tensor, place: Tensor) -> None:
        tensor._vfe_place = (self, place)  # type: ignore[attr-defined]


def _along(place: Tensor, dim: Any, result: Tensor) -> Tensor | None:
    """The places after numbers were joined along dims, in which each joins numbers of one place."""
    dims = dim if isinstance(dim, (tuple, list)) else (dim,)
    whole = place
    for one in dims:
        if not isinstance(one, int):
            return None
        first = place.narrow(one, 0, 1)
        if not bool((place == first).all()):
            return None
        place = first
    if result.shape == whole.shape:
        return whole
    return place.reshape(result.shape) if place.numel() == result.numel() else None


def _flat(values: Any) -> list[Any]:
    found: list[Any] = []
    for value in values:
        found += _flat(value) if isinstance(value, (list, tuple)) else [value]
    return found
