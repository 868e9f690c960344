"""What ordinary runs make for each element of a latent in plates: a row of a table, which may be long.

    ph[z]       of V numbers for each of D x N elements       where enumeration has the K rows of ph alone

An enumerated latent has no plate along its values, so its tables stay small, and an ordinary run would be what needs
the memory. So where that is much, the elements of plates take one value together there, which broadcasts all the same.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from pyro_vfe.engine.shapes import broadcast_shapes
from pyro_vfe.program.escapes import Sites
from pyro_vfe.program.markov_chain import MarkovChain
from pyro_vfe.program.operations import Observer
from pyro_vfe.program.recorder import Plate
from pyro_vfe.program.supports import unwrapped

_MOST_BYTES = 2**28
"""What a tensor of an ordinary run may take: 256 MB."""


def fits(size: float) -> bool:
    """Returns whether an ordinary run may make a tensor.

    Args:
        size: Its bytes.
    """
    return size <= _MOST_BYTES


class TooLarge(Exception):
    """A program is about to make, or has made, more of a latent's elements than an ordinary run should."""


class Rows(Observer):
    """Measures what a run makes of latents in plates."""

    def __init__(self) -> None:
        self.row_bytes = 0.0
        """The most that was made for each element of a latent."""
        self.together = False
        """Whether elements take one value together, where what is made of them is too large; else that ends the run."""
        self._elements: dict[str, int] = {}

    def drawn(self, name: str, fn: Any, value: Tensor, plates: tuple[Plate, ...]) -> Tensor:
        """Returns a latent's value; one for all elements of its plates where what is made of them would be too large.

        Args:
            name: The latent.
            fn: Its distribution.
            value: A draw.
            plates: The plates around it.
        """
        batch = prod(fn.batch_shape)
        if self.together and not fits(batch * self.row_bytes):
            kept = {-1} if isinstance(unwrapped(fn), MarkovChain) else set()
            for dim in {plate.dim for plate in plates} - kept:
                if -dim <= len(fn.batch_shape):
                    value = value.narrow(dim - len(fn.event_shape), 0, 1)
            value, batch = value.clone(), 1
        self._elements[name] = batch
        return value

    def will(self, name: str, args: Any, sites: Sites) -> None:
        """Notes how large the rows are that an operation is about to select."""
        numbers = _selected(name, args)
        if numbers:
            self._note(numbers, sites)

    def did(self, func: Any, name: str, args: Any, kwargs: Any, result: Any, sites: Sites, before: Any = None) -> None:
        """Notes how large a result is; what `expand` repeats takes no memory."""
        if isinstance(result, Tensor) and result.numel() > 1 and result.layout is torch.strided:
            repeated = [size for size, stride in zip(result.shape, result.stride(), strict=True) if stride == 0]
            self._note(result.numel() // max(1, prod(repeated)) * result.element_size(), sites)

    def _note(self, size: int, sites: Sites) -> None:
        elements = max((self._elements.get(name, 1) for name in sites), default=1)
        if elements > 1:
            self.row_bytes = max(self.row_bytes, size / elements)
            if not self.together and not fits(size):
                raise TooLarge


def _selected(name: str, args: Any) -> int:
    """How many bytes an operation that selects rows is about to make; 0 for others, and where it is not known."""
    if name == "index_select" and len(args) > 2 and isinstance(args[1], int) and isinstance(args[2], Tensor):
        table, dim, index = args
        return int(index.numel() * table.numel() // max(1, table.shape[dim]) * table.element_size())
    if name == "embedding" and len(args) > 1 and isinstance(args[0], Tensor) and isinstance(args[1], Tensor):
        return int(args[0].numel() * args[1].shape[-1] * args[1].element_size())
    tensors = [part for part in args if isinstance(part, Tensor)]
    if name in ("matmul", "__matmul__") and len(tensors) == 2 and min(part.dim() for part in tensors) > 1:
        return int(args[0].numel() // max(1, args[0].shape[-1]) * args[1].shape[-1] * args[1].element_size())
    if name != "__getitem__":
        return 0
    table, index = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
    indices = [part for part in index if isinstance(part, Tensor)]
    if not indices or any(part.dtype is torch.bool for part in indices) or any(map(_is_odd, index)):
        return 0
    ends = [place for place, part in enumerate(index) if part is ...] or [len(index)]
    left, right = ([part for part in side if part is not None] for side in (index[: ends[0]], index[ends[0] + 1 :]))
    dims = list(table.shape)
    whole = dims[len(left) : len(dims) - len(right)]
    parts = zip((*left, *right), (*dims[: len(left)], *dims[len(dims) - len(right) :]), strict=False)
    whole += [size for part, size in parts if isinstance(part, slice)]
    try:
        picked = prod(broadcast_shapes(*(part.shape for part in indices)))
    except RuntimeError:  # which the operation itself says
        return 0
    return int(picked * prod(whole) * table.element_size())


def _is_odd(part: object) -> bool:
    """Whether part of an index is anything but a tensor, a number, a slice, a new dim or an ellipsis."""
    return not (part is None or part is ... or isinstance(part, (Tensor, int, slice)))
