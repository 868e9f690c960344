"""The sizes of plates that one program leaves to the other: the model takes over the subsample that the guide drew."""

from collections.abc import Mapping
from typing import Any

import torch

from pyro_vfe.errors import StructureError


def check_size(name: str, fn: Any, subsample: Any, full_sizes: Mapping[str, int]) -> None:
    """Checks that a plate can take over the indices that are known of the plate of its name.

    Args:
        name: The plate.
        fn: The distribution of its indices: Pyro's `_Subsample`.
        subsample: The known indices.
        full_sizes: The size of the whole of each plate of the guide.

    Raises:
        StructureError: The two plates are of different sizes, or the model alone says that some elements are present.
    """
    full_size = full_sizes.get(name)
    present = fn.size if fn.subsample_size is None else min(fn.subsample_size, fn.size)
    if full_size is not None and full_size != fn.size:
        raise StructureError(
            f"Plate '{name}' has {full_size} elements in the guide and {fn.size} in the model.",
            hint="Make both of one size; a guide that was set up for one data set does not fit another.",
        )
    if len(subsample) == present or (full_size is not None and fn.subsample_size is None):
        return  # Pyro makes the plate as long as its indices, and its scale from both sizes.
    if full_size is not None:
        raise StructureError(
            f"Plate '{name}' of the model is subsampled ({present} of {fn.size} elements), and the guide's has "
            f"{len(subsample)} of them: it runs first, and would have latents of elements that the model lacks.",
            hint=f"State the subsample in the guide: pyro.plate('{name}', {fn.size}, {present}); the model takes the "
            f"guide's indices, and may say pyro.plate('{name}', {fn.size}).",
        )
    raise StructureError(
        f"Plate '{name}' had {len(subsample)} elements before and has {present} now.",
        hint="Make both of one size; a guide that was set up for one data set does not fit another.",
    )


def check_same_subsample(name: str, known: Any, value: Any) -> None:
    """Checks that guide and model look at the same elements.

    Args:
        name: The plate.
        known: The indices of the one.
        value: The indices of the other.

    Raises:
        StructureError: They do not.
    """
    if known is not value and not torch.equal(torch.as_tensor(known), torch.as_tensor(value)):
        raise StructureError(
            f"Plate '{name}' has one subsample in the guide and another in the model.",
            hint="Pass the same indices to both (for an autoguide: create_plates), or let the guide draw them.",
        )
