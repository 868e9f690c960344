"""Everything that is known of a model, a guide and data, as a tree in ArviZ's schema."""

from typing import TYPE_CHECKING, Any

from pyro_vfe.program.layout import Program

if TYPE_CHECKING:
    import xarray


def to_datatree(model: Program, guide: Program | None = None, *args: Any, **kwargs: Any) -> "xarray.DataTree":
    """Returns a tree in ArviZ's schema."""
    raise NotImplementedError


def to_inference_data(model: Program, guide: Program | None = None, *args: Any, **kwargs: Any) -> Any:
    """Returns what the installed ArviZ takes."""
    raise NotImplementedError
