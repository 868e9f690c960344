"""Operations that join what a latent has for different values: a mean over its enumeration dim, a sort, an element.

    op(x[order])  =  op(x)[order]        where values stay apart, `order` being some of them along the latent's dim

The operations of an enumerated run are done once more with few of each latent's values, in another order. Where its dim
is lost, or the numbers do not follow, what comes out for one value may depend on the others.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from pyro_vfe.program.escapes import Sites, by_a_statement
from pyro_vfe.program.operations import Observer
from pyro_vfe.program.randomness import random_state, set_random_state
from pyro_vfe.program.sharing import KEEPS_NUMBERS

_CREATING = "new_"
"""What makes a tensor of its own numbers."""

_COUNTING = frozenset(["batch_norm", "instance_norm"])
"""Operations that write into statistics."""


class Mixing(Observer):
    """Finds the latents that some operation mixes over their values."""

    def __init__(self, dims: Mapping[str, int], sizes: Mapping[str, int]) -> None:
        """Args:
        dims: The batch dim of each latent.
        sizes: The number of its values.
        """
        self.dims = {name: dim for name, dim in dims.items() if sizes[name] > 1}
        self.sizes = sizes
        self.mixed: set[str] = set()
        """The latents whose values meet."""
        self.draws = False
        """Whether an operation draws something for each value, which may be alike by chance."""

    def before(self, written: Any) -> Any:
        """A copy of what is about to be written into."""
        return written.clone() if isinstance(written, Tensor) else None

    def did(self, func: Any, name: str, args: Any, kwargs: Any, result: Any, sites: Sites, before: Any = None) -> None:
        """Looks whether an operation joined values."""
        latents = (sites & self.dims.keys()) - self.mixed
        if not latents or name.startswith(_CREATING) or name in KEEPS_NUMBERS or by_a_statement():
            return
        target = None if before is None else kwargs["out"] if "out" in kwargs else args[0]
        given, outcome = _tensors((args, kwargs)), _tensors(result if target is None else target)
        for latent in sorted(latents) if outcome else ():
            dims = {id(one): dim for one in given if (dim := self._dim(one, latent)) is not None}
            if dims:
                call = _Operation(func, args, kwargs, target, before, name in _COUNTING, dims, self.sizes[latent])
                found = call.dims_after(outcome)
                self.draws |= call.draws
                if found is None:
                    self.mixed.add(latent)
                for one, dim in zip(outcome, found or (), strict=False):
                    self._mark(one, latent, dim)

    def _mark(self, tensor: Tensor, latent: str, dim: int) -> None:
        known = getattr(tensor, "_vfe_dims", None)
        own = known[1] if known is not None and known[0] is self else {}
        tensor._vfe_dims = (self, {**own, latent: dim})  # type: ignore[attr-defined]

    def _dim(self, tensor: Tensor, latent: str) -> int | None:
        """The dim of a tensor along which a latent takes its values, negative."""
        mark = getattr(tensor, "_vfe_sites", None)
        if mark is None or latent not in mark[1]:
            return None
        tensor = tensor if mark[2] is None else mark[2]
        known = getattr(tensor, "_vfe_dims", None)
        if known is not None and known[0] is self and latent in known[1]:
            return known[1][latent]
        # A value itself, a draw, or what a distribution holds: as far to the right as it fits.
        fits = [
            dim for dim in range(self.dims[latent], -tensor.dim() - 1, -1) if tensor.shape[dim] == self.sizes[latent]
        ]
        return (fits[-1] if len(mark[1]) == 1 else fits[0]) if fits else None


@dataclass(eq=False)
class _Operation:
    """An operation, to be done once more with the values of a latent in another order."""

    func: Any
    args: Any
    kwargs: Any
    target: Tensor | None
    """What it wrote into."""
    before: Any
    """What that held before."""
    counts: bool
    """Whether it writes into other arguments too."""
    dims: Mapping[int, int]
    """The latent's dim of each tensor that has it, by the tensor's identity."""
    size: int
    """The number of the latent's values."""
    draws: bool = False
    """Whether it was seen to take random numbers."""

    def dims_after(self, outcome: list[Tensor]) -> list[int] | None:
        """The latent's dim of each result; None where values were joined."""
        state = random_state()
        # A size, or several, may have been read off a tensor, and a tensor made of such a size knows of no latent.
        for sizes, shift in product((0, 1, 64), (None, 0, 1, 2)):
            try:
                again = self._again(sizes, shift)
            except Exception:  # Whatever an operation says of a size that it does not expect.
                continue
            if not all(map(torch.equal, state, random_state())):
                self.draws = True
                set_random_state(state)
            if len(again) == len(outcome):
                found = [self._dim_after(*pair) for pair in zip(outcome, again, strict=True)]
                if None not in found:
                    return found  # type: ignore[return-value]
        return None

    @property
    def _order(self) -> list[int]:
        """A few values, other than all of them and not in their order."""
        return [self.size - 2, 0] if self.size > 2 else [1, 0, 0]

    def _again(self, sizes: int, shift: int | None) -> list[Tensor]:
        """What the operation gives for the other order, with so many sizes and perhaps other tensors following it."""
        into: list[Tensor] = []
        left = iter(range(sizes))

        def change(value: Any) -> Any:
            if isinstance(value, Tensor):
                dim = self.dims.get(id(value))
                if dim is None and shift is not None:
                    dim = next(iter(self.dims.values())) - shift
                    dim = dim if -dim <= value.dim() and value.shape[dim] == self.size else None
                changed = self.before if value is self.target else value
                if dim is not None:
                    changed = changed.index_select(dim, torch.tensor(self._order, device=value.device))
                elif self.counts or value is self.target:
                    changed = changed.clone()
                if value is self.target:
                    into.append(changed)
                return changed
            if isinstance(value, (list, tuple)):
                parts = [change(part) for part in value]
                return parts if isinstance(value, list) else tuple(parts)
            if isinstance(value, dict):
                return {key: change(part) for key, part in value.items()}
            is_size = type(value) is int and value == self.size
            return len(self._order) if is_size and next(left, None) is not None else value

        with torch.no_grad():
            result = self.func(*change(self.args), **change(self.kwargs))
        return into[:1] if into else _tensors(result)

    def _dim_after(self, one: Tensor, other: Tensor) -> int | None:
        if one.dim() != other.dim():
            return None
        changed = [dim for dim in range(-one.dim(), 0) if one.shape[dim] != other.shape[dim]]
        if len(changed) != 1 or (one.shape[changed[0]], other.shape[changed[0]]) != (self.size, len(self._order)):
            return None
        order = torch.tensor(self._order, device=one.device)
        same = self.draws or _close(one.detach().index_select(changed[0], order), other)
        return changed[0] if same else None


def _close(one: Tensor, other: Tensor) -> bool:
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    tolerance = 1e-9 if one.dtype == torch.float64 else 1e-3
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of arguments or results, at any depth."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]
