r"""The sleep phase: the guide learns from what the model makes up.

    phi  <-  descend  E_{P(v, u)} [ -log Q(v | u; phi) ]  =  E_{P(u)} [ KL( P(v|u) || Q(v|u) ) ]  +  const,    G held

The posterior is on the other side of the divergence than in F, and u is dreamt: a sleep phase can raise F.

References:
    Hinton, Dayan, Frey and Neal (1995), The "wake-sleep" algorithm for unsupervised neural networks.
"""

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_vfe.energy.parts import joint_graph
from pyro_vfe.energy.portioned import normalizer_of
from pyro_vfe.errors import MissingGuideSiteError, StructureError
from pyro_vfe.learning.machine import Machine, check_finite, gradients
from pyro_vfe.program.drawing_runs import IsEnumerable, run_guide_at, total_log_prob
from pyro_vfe.program.dreams import Dream, DreamToArgs, dreamt
from pyro_vfe.program.layout import Program, no_guide
from pyro_vfe.program.masking import unmasked
from pyro_vfe.program.programs import Programs


class Sleep:
    """The loss of a sleep phase and its gradient, as `Stepper` asks for them."""

    def __init__(self, machine: Machine, num_dreams: int, dream_to_args: DreamToArgs | None, weight: float) -> None:
        """Args:
        machine: The programs.
        num_dreams: How many dreams are averaged.
        dream_to_args: Makes the programs' arguments of a dream where names do not tell.
        weight: Of the gradient.
        """
        self._machine = machine
        self._num_dreams = num_dreams
        self._dream_to_args = dream_to_args
        self._weight = weight
        self._at_dream = _AtDream(machine.guide_at_dreams)
        self._programs = Programs(check=machine.programs.check, max_bytes=machine.max_bytes)

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Returns -log Q of a dream in nats and writes its gradient in the guide's parameters.

        Args:
            model: Of no interest: the machine's is run.
            guide: Likewise.
            *args: Arguments of both programs: the data, for their shapes.
            **kwargs: Keyword arguments of both.
        """
        machine = self._machine
        machine.look(args, kwargs)
        losses = [self._of_dream(args, kwargs) for _ in range(self._num_dreams)]
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        gradients(loss if self._weight == 1.0 else self._weight * loss, machine.phi, machine.strangers)
        return loss.item()

    def _of_dream(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        machine = self._machine
        return self.loss(dreamt(machine.hidden_model, machine.given_model, args, kwargs, self._dream_to_args))

    def loss(self, made_up: Dream) -> Tensor:
        """Returns -log Q of the latents of a dream given its observations, a scalar in nats.

        Args:
            made_up: The dream.

        Raises:
            StructureError: The guide draws something that no dream has, and that cannot be summed out.
            NotFiniteError: The guide gives the dream probability zero.
        """
        try:
            run = self._machine.as_given.run(
                lambda look: run_guide_at(
                    self._machine.guide_at_dreams,
                    made_up.args,
                    made_up.kwargs,
                    made_up.latents,
                    made_up.subsamples,
                    look,
                )
            )
        except IsEnumerable:
            return self._with_own_latents_summed(made_up)
        for site in run.sites.values():
            if site.kind == "sampled" and site.name not in made_up.latents:
                raise _not_dreamt(site.name, type(site.fn).__name__)
            if site.name in made_up.masks and unmasked(site)[1] is None:
                site.mask = made_up.masks[site.name]  # Nothing is learned of what does not exist.
        loss = -total_log_prob(run.sites.values())
        check_finite(loss, run.sites.values())
        return loss

    def _with_own_latents_summed(self, made_up: Dream) -> Tensor:
        """-log of the sum of Q over what only the guide has: its surprise at the dream, the guide read as a model."""
        self._at_dream.made_up = made_up
        try:
            run = self._programs.enumerate(
                self._at_dream, no_guide, made_up.args, made_up.kwargs, subsamples=made_up.subsamples
            )
        except MissingGuideSiteError as error:
            raise _not_dreamt(error.site, error.latent) from error
        return -normalizer_of(run, joint_graph, max_bytes=self._machine.max_bytes).total


class _AtDream:
    """A guide that observes the latents of a dream."""

    def __init__(self, guide: Program) -> None:
        self._guide = guide
        self.made_up: Dream

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with pyro.condition(data=dict(self.made_up.latents)):
            return self._guide(*args, **kwargs)


def _not_dreamt(name: str, family: str) -> StructureError:
    return StructureError(
        f"Site '{name}' of the guide ({family}) is none of the model's: a dream has no value for it, and it cannot be "
        "summed out.",
        hint="Let the guide sample what the model samples; sites of its own have to be discrete, and not set to be "
        "sampled (infer={'enumerate': None}).",
    )
