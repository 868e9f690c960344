"""What a run of EM on batches hands back."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pyro_vfe.errors import VFEWarning, callers_level
from pyro_vfe.learning.alike import note_on
from pyro_vfe.learning.batch_loop import BatchLoop
from pyro_vfe.learning.em_loop import params_and_updates
from pyro_vfe.learning.em_run import counted, parameter_table
from pyro_vfe.learning.history import History
from pyro_vfe.learning.start import Start


@dataclass(frozen=True, eq=False)
class BatchRun:
    """The end of EM on batches and the way there; of the size of the parameters, not of the data."""

    converged: bool
    """Whether F, summed over an epoch, changed twice in a row by no more than the tolerance, or than rounding."""
    n_iter: int
    """The number of epochs: passes over all batches that learned, the last look not counted."""
    num_batches: int
    """The number of batches of the last epoch."""
    history: History
    """One row per epoch, phase 'epoch': F, surprise and gap summed over the batches, each as its E-phase found it at
    the parameters of that moment, so that the sum is of no single G (but in the first epoch of `Incremental`, which
    changes nothing until its end). The part of priors is that of the last visit. The last row, phase 'final', is exact:
    all batches once more, at the parameters of the end; it is absent where the batches can be read only once."""
    params: Mapping[str, Tensor]
    """Copies of all parameters that the programs read, constrained."""
    updates: Mapping[str, str]
    """How each parameter was updated (the last time), in words."""
    notes: tuple[str, ...]
    """What a reader should know: states that were never visited, floors that were met, data that were not shown."""

    @property
    def free_energy(self) -> float:
        """F of all batches at the end, in nats: the last row of the history."""
        return self.history.rows[-1].free_energy

    def __str__(self) -> str:
        verdict = "converged" if self.converged else "not converged"
        per_datum = self.free_energy / self.history.num_data
        batches = "batch" if self.num_batches == 1 else "batches"
        lines = [
            f"EM on {self.num_batches} {batches}: {verdict} after {counted(self.n_iter, 'epoch')}, "
            f"F = {self.free_energy:,.4f} nats ({per_datum:,.4f} per datum, N={self.history.num_data:,})",
            "",
            str(self.history),
            "",
            *parameter_table(self.params, self.updates),
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def batch_run(loop: BatchLoop, looked: bool, origin: Start) -> BatchRun:
    """Returns the result of a run, and warns of what a user will not expect.

    Args:
        loop: The run, at its end.
        looked: Whether the last row is of a last look at all batches.
        origin: What it started from.
    """
    assert loop.pair is not None and loop.e_phase is not None
    warned = _warnings(loop)
    for text in warned:
        warnings.warn(text, VFEWarning, stacklevel=callers_level())
    notes = [*warned, *loop.remarks, *map(note_on, loop.alike.values())]
    if not looked:
        notes.append("The batches can be read only once: F is that of the batches as they were visited.")
    if loop.stopped:
        notes.append(f"stopped by the callback in epoch {loop.epoch}")
    params, updates = params_and_updates(loop.pair, loop.e_phase, loop.updates)
    return BatchRun(
        converged=loop.converged,
        n_iter=loop.epoch,
        num_batches=loop.last.num_batches,
        history=History(
            tuple(loop.rows),
            round(loop.last.num_data),
            rounding=loop.rounding,
            alike=tuple(name for names in loop.alike for name in names),
        ),
        params=params,
        updates=updates,
        notes=(*notes, *origin.notes(params)),
    )


def _warnings(loop: BatchLoop) -> list[str]:
    """What is there and is not what was asked for."""
    texts = []
    known, found = loop.full_size or loop.num_data, loop.last.num_elements
    if known is not None and known != found and not loop.stopped:
        texts.append(
            f"The batches of an epoch have {found} elements of the data plate, not the {known} that "
            f"{'num_data' if loop.full_size is None else 'the plate'} says. Let them have each datum once "
            "(drop_last=False), or mend the number."
        )
    if loop.method.monotone and not (loop.converged or loop.stopped):
        texts.append(
            f"EM stopped at num_epochs={loop.epoch} before it had converged. Pass more epochs (or call run_batches "
            "again: it goes on from these parameters), or a larger tol."
        )
    if not loop.updates:
        texts.append("There was no M-phase: the batches were over before Online's delay. Pass a smaller delay.")
    return texts
