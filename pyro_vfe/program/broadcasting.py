"""What is to be said of programs that take one value for each element, and not what enumeration gives them."""

from pyro_vfe.errors import StructureError


def cannot_broadcast(error: Exception) -> StructureError:
    """Returns the error for programs that run with single values and not with all at once.

    Args:
        error: What came of running them.
    """
    said = str(error).rstrip(". ")
    return StructureError(
        f"The programs run with sampled values but not with enumerated ones: {type(error).__name__}: {said}.",
        hint="Enumerated values carry extra dims to the left of the plates: index with `table[z]`, broadcast, use "
        "`[..., None]` and dims counted from the right, not `view`, `flatten`, `x[:, z]` or sums over dim 0; "
        "join latents by torch.stack(torch.broadcast_tensors(...), -1). A table that a latent indexes needs an entry "
        "for each of its values.",
    )
