"""The shape that tensors broadcast to.

`torch.broadcast_shapes` would do, but imports sympy at its first call: half a second.
"""

from collections.abc import Sequence

import torch


def broadcast_shapes(*shapes: Sequence[int]) -> torch.Size:
    """Returns the shape that all shapes broadcast to.

    Args:
        *shapes: What is to be broadcast.

    Raises:
        RuntimeError: They do not fit together.
    """
    num_dims = max(map(len, shapes), default=0)
    padded = [(1,) * (num_dims - len(shape)) + tuple(shape) for shape in shapes]
    sizes = [{size for size in along if size != 1} or {1} for along in zip(*padded, strict=True)]
    if any(len(found) > 1 for found in sizes):
        raise RuntimeError(f"Shapes {', '.join(str(tuple(shape)) for shape in shapes)} are not broadcastable.")
    return torch.Size(size for found in sizes for size in found)
