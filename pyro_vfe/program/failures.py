"""What is to be said of programs that fail while they are enumerated: why, and the way out."""

from collections.abc import Mapping, Sequence
from typing import Any

from pyro_vfe.errors import StructureError, SupportError, VFEError
from pyro_vfe.program.arrays import no_mask
from pyro_vfe.program.indices import out_of_range
from pyro_vfe.program.layout import Program
from pyro_vfe.program.left_over import stale_parameter
from pyro_vfe.program.parameters import nan_explained


def explained(
    error: Exception, programs: Sequence[Program], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> VFEError | None:
    """Returns why a run failed: a mask, parameters that are NaN or left over, an index; None for other reasons.

    Args:
        error: What a distribution or an operation said.
        programs: What ran.
        args: Arguments of the programs.
        kwargs: Keyword arguments of the programs.
    """
    if isinstance(error, VFEError) and not isinstance(error, SupportError):
        return None
    found = (no_mask(error) or nan_explained(error, *programs)) if isinstance(error, ValueError) else None
    return found or stale_parameter(programs, args, kwargs) or out_of_range(error)


def unstable(error: Exception) -> StructureError:
    """Returns the error for programs with other sites, or other reads, at each run.

    Args:
        error: In what two runs differed.
    """
    return StructureError(
        f"The structure of the programs changes from one run to the next: {error}.",
        hint="Let the sites depend on the arguments and on the latents only, not on other randomness.",
    )
