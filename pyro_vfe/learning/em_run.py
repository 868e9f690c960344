r"""What a run of EM hands back.

F(Q, G)  =  surprise + gap        of the last Q, which is the optimum for the last G where the E-phase is exact
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_vfe.energy.decomposition import Decomposition, decomposition
from pyro_vfe.learning.alike import Alike
from pyro_vfe.learning.belief import Belief, expected_log_joint
from pyro_vfe.learning.history import History
from pyro_vfe.program.data import number_of_data
from pyro_vfe.program.enumeration import Enumeration, SiteKey


@dataclass(frozen=True)
class PhaseResult:
    """Where a single phase ended, in nats."""

    phase: str
    """'E' or 'M'."""
    free_energy: float
    """F(Q, G) after the phase."""
    surprise: float
    """-log p(u | G) after the phase."""
    gap: float
    """KL(Q || posterior) after the phase."""
    updates: Mapping[str, str]
    """How each parameter that the phase may change was updated, in words."""
    notes: tuple[str, ...] = ()
    """What a reader should know: states that were never visited, floors that were met."""


@dataclass(frozen=True)
class Restart:
    """Where one start of EM led."""

    start: int
    """0 for the parameters as they were; the others are random starts."""
    free_energy: float
    """F at the end, in nats; NaN where the start failed."""
    n_iter: int
    """The number of iterations."""
    converged: bool
    """Whether F had stopped falling."""
    error: str | None = None
    """Why the start failed, if it did."""


@dataclass(frozen=True, eq=False)
class EMRun:
    """The end of EM and the way there."""

    converged: bool
    """Whether the last iteration changed F by no more than the tolerance, or did not lower it, but for rounding."""
    n_iter: int
    """The number of iterations: M-phases, each followed by an E-phase."""
    history: History
    """F, surprise and gap after every phase, in nats."""
    params: Mapping[str, Tensor]
    """Copies of all parameters that the programs read, constrained."""
    updates: Mapping[str, str]
    """How each parameter was updated (in the last iteration), in words."""
    notes: tuple[str, ...]
    """What a reader should know: a phase that raised F, states that were never visited, floors that were met."""
    restarts: tuple[Restart, ...]
    """Every start and its end; one where there were no others."""
    enumeration: Enumeration = field(repr=False)
    """The factors of both programs at the end."""
    belief: Belief = field(repr=False)
    """Q at the end."""
    max_bytes: float | None = field(default=None, repr=False)
    """The most memory that further tables may take."""
    alike: Alike = field(default_factory=dict, repr=False)
    """Latents with values under which all that depends on them is equally probable, and these values."""
    gain_elsewhere: float | None = None
    """Where there are such and EM converged: by how much a random start ended lower, in nats; None where all failed."""

    @property
    def free_energy(self) -> float:
        """F(Q, G) at the end, in nats."""
        return float(self.belief.free_energy)

    def decomposition(self) -> Decomposition:
        """Returns the four readings of F at the end.

        Without latents in the guide, Q is the E-phase's: the exact posterior by default, so that the gap is 0 and the
        entropy is the posterior's. The terms of such a Q are not split by plate or site.
        """
        if self.enumeration.guided:
            with torch.no_grad():
                return decomposition((self.enumeration,), self.max_bytes)
        return decomposition_of_belief(self.belief, self.enumeration)

    def __str__(self) -> str:
        verdict = "converged" if self.converged else "not converged"
        per_datum = self.free_energy / self.history.num_data
        lines = [
            f"EM: {verdict} after {counted(self.n_iter, 'iteration')}, F = {self.free_energy:,.4f} nats "
            f"({per_datum:,.4f} per datum, N={self.history.num_data:,})",
            "",
            str(self.history),
            "",
            *parameter_table(self.params, self.updates),
        ]
        if len(self.restarts) > 1:
            lines += ["", *_table(("start", "F", "iterations", ""), map(_restart_row, self.restarts))]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def decomposition_of_belief(belief: Belief, enumeration: Enumeration) -> Decomposition:
    """Returns the four readings of F for a Q that no guide gives.

    Args:
        belief: Q.
        enumeration: The factors that it is of.
    """
    accuracy = expected_log_probs(belief, enumeration, "observed")
    prior = expected_log_probs(belief, enumeration, "enumerated", "sampled")
    gap = belief.free_energy - belief.surprise
    unsplit = "The sum over the model's latents would not fit, or its weights leave it without a value."
    return Decomposition(
        energy=-(prior + accuracy),
        entropy=-belief.expected_log_q,
        surprise=belief.surprise,
        gap=gap,
        complexity=belief.expected_log_q - prior,
        accuracy=accuracy,
        exact=True,
        stderr=None,
        num_data=number_of_data(enumeration),
        clashes=(),
        unsplit=unsplit if bool(belief.surprise.isnan()) else None,
    )


def expected_log_probs(belief: Belief, enumeration: Enumeration, *kinds: str) -> Tensor:
    """E_Q of the log-probabilities of the model's sites of some kinds, a scalar in nats.

    Args:
        belief: Q.
        enumeration: The factors that it is of.
        *kinds: Of sites.
    """
    weights: dict[SiteKey, tuple[Tensor, ...]] = {
        key: own for key, own in belief.weights.items() if enumeration.sites[key].kind in kinds
    }
    if not weights:
        return torch.zeros_like(belief.free_energy)
    return expected_log_joint(weights, enumeration)


def _restart_row(restart: Restart) -> tuple[str, ...]:
    verdict = restart.error or ("converged" if restart.converged else "not converged")
    return str(restart.start), f"{restart.free_energy:,.4f}", str(restart.n_iter), verdict


def parameter_table(params: Mapping[str, Tensor], updates: Mapping[str, str]) -> list[str]:
    """The lines of a table of parameters.

    Args:
        params: Their values.
        updates: How each was updated.
    """
    rows = [
        (name, "x".join(map(str, value.shape)) or "scalar", updates.get(name, "")) for name, value in params.items()
    ]
    return _table(("parameter", "shape", "updated"), rows)


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    cells = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def counted(number: int, what: str) -> str:
    """A number of things, in words.

    Args:
        number: How many.
        what: One of them.
    """
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
