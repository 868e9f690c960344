"""The errors for latents whose plates are not those of what has, or reads, them."""

from collections.abc import Iterable, Mapping

from pyro_vfe.errors import CostError, PlateError, StructureError
from pyro_vfe.program.recorder import Role
from pyro_vfe.program.written_out import MOST_JOINT_VALUES


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


def not_written_out(reader: str, role: Role, plates: Mapping[str, str], bits: float) -> PlateError | CostError:
    """The error for a site that reads latents of plates as wholes, of too many elements to be written out.

    Args:
        reader: The site.
        role: Its program.
        plates: The plate of each latent.
        bits: The logarithm, to base 2, of how many joint values they have.
    """
    if len(plates) == 1:
        ((latent, plate),) = plates.items()
        return plate_violation(reader, role, latent, plate)
    latents = " and ".join(f"'{name}' of plate '{plate}'" for name, plate in plates.items())
    return CostError(
        f"Site '{reader}' of the {role} reads latents of several plates, {latents}, and ties all their elements "
        f"together: 2^{bits:.0f} joint values, where at most {MOST_JOINT_VALUES:,} are written out.",
        hint="Let the guide draw one of them, infer={'enumerate': None}: the other is summed out given the draws.",
        sites=[*plates, *plates.values()],
        excess=2.0 ** min(bits, 1000.0) / MOST_JOINT_VALUES,
    )
