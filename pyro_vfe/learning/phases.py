"""What the two kinds of phases of EM have in common.

    E-phase    lowers F(Q, G) over Q        M-phase    lowers F(Q, G) over G

References:
    Neal and Hinton (1998), A view of the EM algorithm that justifies incremental, sparse, and other variants.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from pyro_vfe.learning.belief import Belief, expected_log_joint
from pyro_vfe.learning.pair import Pair
from pyro_vfe.program.enumeration import Enumeration


class EPhase(ABC):
    """Chooses Q with the model held."""

    monotone: bool
    """Whether F never rises, but for rounding."""

    def update(self, pair: Pair, iteration: int) -> None:  # noqa: B027
        """Changes the guide's parameters; a Q that is computed from the model has none.

        Args:
            pair: The programs.
            iteration: The number of iterations before this one.
        """

    def forget(self) -> None:  # noqa: B027
        """Forgets what an optimiser keeps from step to step: another start is about to begin."""

    @abstractmethod
    def belief(self, enumeration: Enumeration, iteration: int, max_bytes: float | None = None) -> Belief:
        """Q as the M-phase needs it.

        Args:
            enumeration: The factors of both programs after `update`, in float64.
            iteration: The number of iterations before this one.
            max_bytes: The most memory that intermediate tables may take.
        """


@dataclass(frozen=True, eq=False)
class Problem:
    """What an M-phase has to solve: Q is held, the named parameters are free."""

    pair: Pair
    enumeration: Enumeration
    """The factors at the present parameters; the graph from the parameters to the distributions is there."""
    belief: Belief
    names: tuple[str, ...]
    """The parameters to change."""
    notes: list[str] = field(default_factory=list)
    """What a user should know of the solution; the phase adds to it."""

    def expected_log_joint(self) -> Tensor:
        """E_Q log P(v, u) in nats at the present parameters, anew, with the graph to the unconstrained parameters."""
        weights = self.belief.learned_from
        return expected_log_joint(weights, self.pair.enumerate(differentiable=True))


class MPhase(ABC):
    """Chooses the model's parameters with Q held."""

    monotone: bool
    """Whether F never rises, but for rounding."""

    def forget(self) -> None:  # noqa: B027
        """Forgets what an optimiser keeps from step to step: another start is about to begin."""

    @abstractmethod
    def update(self, problem: Problem) -> Mapping[str, str]:
        """Writes new parameters and returns, for each name, how it was updated, in a few words.

        Args:
            problem: What to solve. Where an error is raised the parameters are as they were.
        """
