"""The errors for latents whose plates are not those of what has, or reads, them."""

from collections.abc import Iterable

from pyro_vfe.errors import PlateError, StructureError
from pyro_vfe.program.recorder import Role


def different_plates(name: str, guide: Iterable[str], model: Iterable[str]) -> StructureError:
    """The error for a latent whose plates are not the same in guide and model."""
    return StructureError(
        f"Latent site '{name}' lies in the plates {sorted(guide)} in the guide and in {sorted(model)} in the model.",
        hint="Sample it in the same plates in both.",
    )


def plate_violation(reader: str, role: Role, latent: str, plate: str) -> PlateError:
    """The error for a site that reads a latent from outside one of its plates."""
    return PlateError(
        f"Site '{reader}' of the {role} reads latent '{latent}' from outside plate '{plate}': that joins all "
        f"elements of the plate, and elimination over them is not defined.",
        hint=f"Move '{reader}' into the plate, or give '{latent}' a sequential plate (for i in pyro.plate(...)).",
    )
