"""From a tree in ArviZ's schema to what the installed ArviZ takes."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import xarray


def inference_data_of(tree: "xarray.DataTree") -> Any:
    """Returns the tree as an `arviz.InferenceData` for ArviZ 0.2x, and as it is for ArviZ 1, which works on trees.

    Args:
        tree: A tree in ArviZ's schema; groups that the schema does not name pass too.
    """
    import arviz

    library: Any = arviz
    # ArviZ 1 may know the name InferenceData, which is no longer what its functions take.
    return library.from_datatree(tree) if hasattr(library, "from_datatree") else tree
