r"""Phases that descend F by the steps of an optimiser.

    E-phase    phi    <-  step along  d F(Q_phi, G_theta) / d phi,                theta held
    M-phase    theta  <-  step along  d -E_Q log P(v, u | theta) / d theta,       Q held

Each differentiates by the parameters of its own side alone: nothing is left on those of the other.

References:
    Neal and Hinton (1998), A view of the EM algorithm that justifies incremental, sparse, and other variants.
    Dempster, Laird and Rubin (1977), section 1 (generalised EM: an M-phase that improves and does not maximise).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import torch
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_vfe.energy.at_zeros import with_gradient_at_zeros
from pyro_vfe.energy.estimators import surrogate_loss
from pyro_vfe.energy.impossible import not_finite
from pyro_vfe.errors import NotFiniteError, StructureError, VFEError
from pyro_vfe.learning.belief import Belief
from pyro_vfe.learning.guided import guided_belief
from pyro_vfe.learning.pair import Pair
from pyro_vfe.learning.phases import EPhase, MPhase, Problem
from pyro_vfe.learning.svi_checks import check_maker
from pyro_vfe.program.entry_points import entry_point
from pyro_vfe.program.enumeration import Enumeration
from pyro_vfe.program.parameters import restore, snapshot, unconstrained


class Gradient(EPhase, MPhase):
    """Steps of an optimiser: an E-phase for any guide, an M-phase for networks. F may rise."""

    monotone = False

    @entry_point()
    def __init__(self, optim: PyroOptim | Callable[..., torch.optim.Optimizer], num_steps: int) -> None:
        """Args:
        optim: A Pyro optimiser, `pyro.optim.Adam({"lr": 0.01})` say; or what makes a torch optimiser of a list of
            tensors, `functools.partial(torch.optim.Adam, lr=0.01)` say.
        num_steps: How many steps one phase takes.

        Raises:
            VFEError: There is no step to take, or no optimiser to take it.
        """
        if num_steps < 1:
            raise VFEError(f"Gradient was given num_steps={num_steps}.", hint="Take at least one step.")
        check_maker(optim)
        self.optim = optim if isinstance(optim, PyroOptim) else PyroOptim(optim, {})
        self.num_steps = num_steps

    @overload
    def update(self, pair: Pair, iteration: int) -> None:
        """Changes the guide's parameters."""

    @overload
    def update(self, problem: Problem) -> Mapping[str, str]:
        """Changes the named parameters, and says how."""

    def update(self, *args: Any, **kwargs: Any) -> Mapping[str, str] | None:
        """Changes the guide's parameters, given a pair; or the named ones, given a problem, and says how.

        Args:
            *args: The pair of programs and the number of iterations before this one, or the problem of an M-phase.
            **kwargs: The same by name.

        Raises:
            StructureError: The guide has no parameters to change.
            NotFiniteError: F is not finite; the parameters are those before the phase.
        """
        (subject, *_) = (*args, *kwargs.values())
        if isinstance(subject, Pair):
            self._descend_guide(subject)
            return None
        return self._descend_model(subject)

    def forget(self) -> None:
        """Forgets the optimiser's moments and step counts."""
        self.optim.optim_objs.clear()

    def belief(self, enumeration: Enumeration, iteration: int, max_bytes: float | None = None) -> Belief:
        """Q as the guide has it.

        Args:
            enumeration: The factors of both programs after `update`, in float64.
            iteration: The number of iterations before this one.
            max_bytes: The most memory that intermediate tables may take.
        """
        return guided_belief(enumeration, max_bytes)

    def _descend_guide(self, pair: Pair) -> None:
        def free_energy() -> Tensor:
            enumeration = pair.enumerate(differentiable=True)
            if not pair.recognition:
                raise StructureError(
                    "Gradient is the E-phase of a guide that has no parameters to change.",
                    hint="Give the guide parameters, do not fix them, or leave the guide out: Q is then the posterior.",
                )

            def estimate(runs: Sequence[Sequence[Enumeration]]) -> Tensor:
                return surrogate_loss(runs[0], 1, pair.max_bytes)

            loss = estimate([[enumeration]])
            if not math.isfinite(loss.item()):
                raise not_finite([enumeration], loss.item(), (pair.model, pair.guide))
            return with_gradient_at_zeros(loss, [[enumeration]], estimate)

        self._descend(free_energy, lambda: pair.recognition)

    def _descend_model(self, problem: Problem) -> Mapping[str, str]:
        def energy() -> Tensor:
            loss = -problem.expected_log_joint()
            if not math.isfinite(loss.item()):
                raise NotFiniteError(
                    f"The expected log joint is {-loss.item():g} after a step of Gradient.",
                    hint="A smaller learning rate keeps the parameters where it is finite; this phase changed nothing.",
                )
            return loss

        self._descend(energy, lambda: problem.names)
        steps = "1 gradient step" if self.num_steps == 1 else f"{self.num_steps} gradient steps"
        return dict.fromkeys(problem.names, steps)

    def _descend(self, loss: Callable[[], Tensor], names: Callable[[], Sequence[str]]) -> None:
        """Takes all steps, or none where one fails. The names of a guide's parameters are known after a first run."""
        before: Mapping[str, Tensor] | None = None
        try:
            for _ in range(self.num_steps):
                value = loss()
                before = snapshot(names()) if before is None else before
                self._step(value, names())
        except Exception:
            restore(before or {})
            raise

    def _step(self, loss: Tensor, names: Sequence[str]) -> None:
        """One step of the optimiser along the gradient; entries that are not finite, logs of exact zeros, stay."""
        leaves = [leaf for leaf in map(unconstrained, names) if leaf.requires_grad]
        if not leaves or not loss.requires_grad:
            return
        gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
        before = [leaf.detach().clone() for leaf in leaves]
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient.masked_fill(~leaf.detach().isfinite(), 0.0)
        self.optim(leaves)
        with torch.no_grad():
            for leaf, value in zip(leaves, before, strict=True):
                leaf.grad = None
                leaf.copy_(torch.where(value.isfinite(), leaf, value))
