"""Two optimisers in the place of one: each changes the parameters of its own program."""

from types import SimpleNamespace

from pyro.optim import PyroOptim
from torch import Tensor

from pyro_vfe.learning.machine import Machine
from pyro_vfe.learning.svi_report import Loss
from pyro_vfe.learning.svi_step import name_of_optimiser, step_scheduler
from pyro_vfe.program.parameters import stored_tensors


class Both:
    """Changes the model's parameters by one optimiser and the guide's by another."""

    def __init__(self, optim_model: PyroOptim, optim_guide: PyroOptim, machine: Machine) -> None:
        """Args:
        optim_model: What changes the model's parameters.
        optim_guide: What changes the guide's.
        machine: Knows which parameters are whose.
        """
        self._optims = optim_model, optim_guide
        self._machine = machine
        names = dict.fromkeys(map(name_of_optimiser, self._optims))
        self.pt_optim_constructor = SimpleNamespace(__name__=" and ".join(names))

    def __call__(self, leaves: list[Tensor]) -> None:
        """Changes parameters along their gradients.

        Args:
            leaves: Their unconstrained values.
        """
        known = {id(leaf) for leaf in stored_tensors(self._machine.theta)}
        for optim, of_model in zip(self._optims, (True, False), strict=True):
            own = [leaf for leaf in leaves if (id(leaf) in known) is of_model]
            if own:
                optim(own)

    def step_schedulers(self, loss: Loss, *, alone: bool) -> None:
        """Lets the learning rates take their course after a wake phase.

        Args:
            loss: Of the phase.
            alone: Whether no sleep phase will do it for the guide's.
        """
        step_scheduler(self._optims[0], loss)
        if alone:
            step_scheduler(self._optims[1], loss)
