"""Whether a tensor holds bits, found in a fraction of the time that the check of a distribution's support takes."""

import torch
from torch import Tensor

_PORTION = 2**17
"""So many elements are looked at together: what is computed of them stays in the cache, and takes no memory."""


def are_bits(value: Tensor) -> bool:
    """Whether all elements of a tensor of floating point are 0 or 1.

    Args:
        value: The tensor.
    """
    return all(map(_hold_bits, value.reshape(-1).split(_PORTION)))


def _hold_bits(values: Tensor) -> bool:
    if values.numel() == 0:
        return True
    # v - v v is zero at 0 and 1 alone, after rounding too, and NaN at NaN and infinity.
    least, most = torch.addcmul(values, values, values, value=-1).aminmax()
    return least.item() == 0 == most.item()
