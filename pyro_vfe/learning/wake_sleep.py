r"""The wake-sleep algorithm.

    wake     theta  <-  descend  E_{Q(v|u)} [ -log P(v, u | theta) ],        u the data
    sleep    phi    <-  descend  E_{P(v,u)} [ -log Q(v | u; phi) ],          (v, u) a dream

References:
    Hinton, Dayan, Frey and Neal (1995), The "wake-sleep" algorithm for unsupervised neural networks.
    Bornschein and Bengio (2015), Reweighted wake-sleep.
"""

from typing import Any

from pyro.optim import PyroOptim

from pyro_vfe.program.dreams import DreamToArgs
from pyro_vfe.program.layout import Program


class WakeSleep:
    """Learns a generative model and its recognition model from each other."""

    def __init__(
        self,
        model: Program,
        guide: Program,
        optim_model: PyroOptim,
        optim_guide: PyroOptim,
        *,
        num_particles: int = 1,
        reweighted: bool = False,
        dream_to_args: DreamToArgs | None = None,
        **options: Any,
    ) -> None:
        """Args:
        model: The generative model.
        guide: The recognition model.
        optim_model: What changes the model's parameters.
        optim_guide: What changes the guide's parameters.
        num_particles: How many draws of what is sampled are averaged or weighed.
        reweighted: Whether draws of the wake phase are weighed by importance.
        dream_to_args: Makes the programs' arguments of a dream where names do not tell.
        **options: To come.
        """
        raise NotImplementedError
