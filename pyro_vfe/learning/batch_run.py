"""What a run of EM on batches hands back."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pyro_vfe.learning.em_run import counted, parameter_table
from pyro_vfe.learning.history import History


@dataclass(frozen=True, eq=False)
class BatchRun:
    """The end of EM on batches and the way there; of the size of the parameters, not of the data."""

    converged: bool
    """Whether the sum of F over an epoch fell by no more than the tolerance, or than rounding explains."""
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
        lines = [
            f"EM on {self.num_batches} {'batch' if self.num_batches == 1 else 'batches'}: {verdict} after {counted(self.n_iter, 'epoch')}, "
            f"F = {self.free_energy:,.4f} nats ({per_datum:,.4f} per datum, N={self.history.num_data})",
            "",
            str(self.history),
            "",
            *parameter_table(self.params, self.updates),
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
