r"""The wake phase: the model learns from what the guide makes of the data.

    theta  <-  descend  E_{Q(v|u)} [ -log P(v, u | theta) ],        Q held

The expectation is exact for what is enumerated, and a mean over draws for the rest. Reweighted, draws count by how well
they explain the data, each datum by itself, and the guide learns from them too:

    w_k  =  P(v_k, u) / Q(v_k | u),        W_k = w_k / sum_j w_j
    theta  <-  descend  - sum_k W_k log P(v_k, u | theta),        phi  <-  descend  - sum_k W_k log Q(v_k | u; phi)

What is enumerated is summed inside each draw. Where everything is, this is the limit of infinitely many draws: W is the
exact posterior, and the model descends its surprise.

References:
    Hinton, Dayan, Frey and Neal (1995), The "wake-sleep" algorithm for unsupervised neural networks.
    Bornschein and Bengio (2015), Reweighted wake-sleep.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vfe.energy.at_zeros import with_filled_zeros, with_gradient_at_zeros
from pyro_vfe.energy.impossible import not_finite
from pyro_vfe.energy.parts import log_joint
from pyro_vfe.energy.portioned import HasExpectation, PortionedParts
from pyro_vfe.errors import NotFiniteError, VFEError
from pyro_vfe.learning.held_weights import check_weights, latents_of
from pyro_vfe.learning.machine import Machine, check_finite, gradients
from pyro_vfe.learning.reweighting import Losses, drawn_losses, enumerated_losses
from pyro_vfe.program.drawing_runs import total_log_prob
from pyro_vfe.program.enumeration import Enumeration
from pyro_vfe.program.layout import Program


class Wake:
    """The loss of a wake phase and its gradient, as `Stepper` asks for them."""

    def __init__(self, machine: Machine, num_particles: int) -> None:
        """Args:
        machine: The programs.
        num_particles: How many draws are averaged.
        """
        self._machine = machine
        self._num_particles = num_particles

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Returns E_Q[-log P(v, u)] in nats and writes its gradient in the model's parameters.

        Args:
            model: Of no interest: the machine's is run.
            guide: Likewise.
            *args: Arguments of both programs.
            **kwargs: Keyword arguments of both.
        """
        machine = self._machine
        machine.look(args, kwargs)
        losses = [
            machine.either(
                lambda fitted: self._enumerated(fitted, args, kwargs),
                lambda: self._drawn(args, kwargs),
                machine.held_guide,
                args,
                kwargs,
            )
            for _ in range(self._num_particles)
        ]
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        gradients(loss, machine.theta, machine.strangers)
        return loss.item()

    def _enumerated(self, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        machine = self._machine
        run = machine.programs.enumerate(machine.model, guide, args, kwargs)
        for path in run.paths:
            check_weights(path.values(), latents_of(path.values()))

        def energy(runs: Sequence[Sequence[Enumeration]]) -> Tensor:
            return -_log_joint(runs[0][0], machine.max_bytes).expectation().total

        loss = energy([[run]])
        if not math.isfinite(loss.item()):
            raise not_finite([run], loss.item(), (machine.given_model, machine.given_guide))
        return with_gradient_at_zeros(loss, [[run]], energy)

    def _drawn(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        machine = self._machine
        guide, run = machine.drawn(machine.held_guide, args, kwargs)
        check_weights(run.sites.values(), latents_of(guide.sites.values()))
        loss = -total_log_prob(run.sites.values())
        check_finite(loss, run.sites.values())
        return loss


def _log_joint(run: Enumeration, max_bytes: float | None) -> HasExpectation:
    """log P as a term under Q, summed in portions where the tables are made so."""
    if run.portions is None:
        return log_joint(run, max_bytes)
    return PortionedParts(run.portions, lambda part: [log_joint(part, max_bytes)])


class ReweightedWake:
    """The losses of a reweighted wake phase and their gradients, as `Stepper` asks for them."""

    def __init__(self, machine: Machine, num_particles: int, insomnia: float) -> None:
        """Args:
        machine: The programs.
        num_particles: How many draws are weighed.
        insomnia: The weight of the guide's gradient.
        """
        self._machine = machine
        self._num_particles = num_particles
        self._insomnia = insomnia

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Returns the estimate of -log p(u) in nats and writes gradients in the parameters of model and guide.

        Args:
            model: Of no interest: the machine's is run.
            guide: Likewise.
            *args: Arguments of both programs.
            **kwargs: Keyword arguments of both.
        """
        machine = self._machine
        machine.look(args, kwargs)
        losses = machine.either(
            lambda fitted: self._enumerated(fitted, args, kwargs),
            lambda: self._drawn(args, kwargs),
            machine.learning_guide,
            args,
            kwargs,
        )
        if self._insomnia > 0:
            _check_covers(losses.guide)
            gradients(self._insomnia * losses.guide, machine.phi, machine.strangers)
        gradients(losses.model, machine.theta, machine.strangers)
        return losses.surprise

    def _enumerated(self, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Losses:
        machine = self._machine

        def enumerate_once() -> Enumeration:
            run = machine.programs.enumerate_given_draws(machine.model, guide, args, kwargs)
            return with_filled_zeros(run)

        runs = [enumerate_once()]
        if runs[0].is_sampled:
            self._check_particles()
            runs += [enumerate_once() for _ in range(self._num_particles - 1)]
        return enumerated_losses(runs, machine.max_bytes)

    def _drawn(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Losses:
        machine = self._machine
        self._check_particles()
        machine.check_elements(args, kwargs)
        runs = [machine.drawn(machine.learning_guide, args, kwargs) for _ in range(self._num_particles)]
        return drawn_losses([(guide.sites.values(), model.sites.values()) for guide, model in runs], machine.reads)

    def _check_particles(self) -> None:
        if self._num_particles < 2:
            raise VFEError(
                "Reweighted wake-sleep was given one particle: weights that sum to 1 say nothing of a single draw.",
                hint="Use num_particles=10, say; or let the latents be enumerated (no infer={'enumerate': None}), "
                "where the weights are the exact posterior.",
            )


def _check_covers(loss: Tensor) -> None:
    """Checks that the guide holds possible what the posterior does.

    Raises:
        NotFiniteError: It does not.
    """
    if not math.isfinite(loss.item()):
        raise NotFiniteError(
            f"The guide's loss is {loss.item():g}: it gives probability zero to values of the latents that the data do "
            "not rule out.",
            hint="Give the guide zeros only where the model has them; or take insomnia=0, where it learns from dreams "
            "alone. This phase changed nothing.",
        )
