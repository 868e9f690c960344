"""What EM on batches cannot serve: the site or parameter, the fact, the way out."""

import inspect
from collections.abc import Mapping

import torch

from pyro_vfe.errors import StructureError, VFEError
from pyro_vfe.guides.mean_field import AutoMeanField
from pyro_vfe.guides.structured import AutoStructured
from pyro_vfe.learning.closed_form import ClosedForm
from pyro_vfe.learning.coordinate import Coordinate
from pyro_vfe.learning.data_plate import Share
from pyro_vfe.learning.e_phases import Annealed
from pyro_vfe.learning.em_checks import check_ranges
from pyro_vfe.learning.minibatch import BatchMethod
from pyro_vfe.learning.pair import Pair
from pyro_vfe.learning.phases import EPhase, MPhase
from pyro_vfe.program.enumeration import Enumeration
from pyro_vfe.program.given import check_option


def check_options(m_phase: MPhase, method: object, num_epochs: int, tol: float, num_data: int | None) -> None:
    """Checks what a user asks for.

    Args:
        m_phase: The M-phase that EM was given.
        method: How it is to learn from batches.
        num_epochs: The most epochs.
        tol: The tolerance.
        num_data: The number of elements of the data plate.

    Raises:
        VFEError: It cannot be had.
    """
    check_option("method", method, BatchMethod, "way to learn from batches", "vfe.Incremental() or vfe.Online()")
    check_ranges(("num_epochs", num_epochs, 1), ("tol", tol, 0), ("num_data", num_data, 1))
    if not isinstance(m_phase, ClosedForm):
        raise VFEError(
            f"EM was given the M-phase {type(m_phase).__name__}, which needs all data at once.",
            hint="On batches leave m_phase out: parameters are learned in closed form, from pooled statistics. With "
            "all data call run; for networks on batches use SVI with loss=vfe.FreeEnergy().",
        )


def check_e_phase(e_phase: EPhase, pair: Pair, share: Share) -> None:
    """Checks that a phase can see one batch at a time.

    Args:
        e_phase: The phase.
        pair: The programs.
        share: The part of all data that the first batch is.

    Raises:
        VFEError: It cannot.
    """
    if isinstance(e_phase, Annealed):
        raise VFEError(
            "The E-phase Annealed lowers the temperature from iteration to iteration, and an epoch is no iteration.",
            hint="Call run with all data, or leave e_phase out.",
        )
    guide = inspect.unwrap(pair.guide)
    modules = guide.modules() if isinstance(guide, torch.nn.Module) else ()
    by_datum = [type(module).__name__ for module in modules if isinstance(module, AutoMeanField | AutoStructured)]
    if (by_datum or isinstance(e_phase, Coordinate)) and share.full_size is None:
        who = (*by_datum, "AutoMeanField")[0]
        raise VFEError(
            f"{who} holds a factor for each element of {share.words}, which is as long as the batch: the "
            "batches would overwrite each other's factors.",
            hint="Let the plate be a subsample of all data in model and guide, pyro.plate(name, num_data, "
            f"subsample=indices) (create_plates= of {who}), or leave the guide out: Q is then the exact "
            "posterior.",
        )


def check_subsamples(first: Enumeration, pair: Pair) -> None:
    """Checks that the arguments say which data a batch has.

    Args:
        first: The programs at the first batch.
        pair: The same.

    Raises:
        StructureError: A plate draws other elements each time.
    """
    if not first.subsamples:
        return
    again = pair.enumerate().subsamples
    for plate, elements in first.subsamples.items():
        if not elements.equal(again[plate]):
            raise StructureError(
                f"Plate '{plate}' draws its subsample at random, each time anew: which data a batch has is not known.",
                hint="Let the batches hold the indices: pyro.plate(name, num_data, subsample=indices).",
            )


def no_closed_form(refused: Mapping[str, str]) -> VFEError:
    """The error for parameters that cannot be learned from pooled statistics.

    Args:
        refused: The reasons, by parameter.
    """
    reasons = "; ".join(f"'{name}' ({reason})" for name, reason in refused.items())
    return VFEError(
        f"EM on batches keeps nothing but pooled statistics, and learns in closed form, which there is not for: "
        f"{reasons}.",
        hint="Call run with all data, which searches where there is no closed form (vfe.Numerical), use SVI with "
        "loss=vfe.FreeEnergy(), or hold them by fixed=.",
    )
