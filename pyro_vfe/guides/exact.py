r"""The exact posterior as a guide.

    Q(v|u)  =  P(v|u, G)

References:
    Dayan, Hinton, Neal and Zemel (1995), The Helmholtz machine.
"""

from collections.abc import Callable
from typing import Any

from pyro.infer.autoguide import AutoGuide


class AutoPosterior(AutoGuide):
    """The exact posterior of the model's discrete latents, as a guide; for small models."""

    def __init__(self, model: Callable[..., Any]) -> None:
        """Args:
        model: The generative model.
        """
        super().__init__(model)  # type: ignore[no-untyped-call]
        raise NotImplementedError
