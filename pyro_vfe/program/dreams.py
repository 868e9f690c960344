r"""Dreams: what a model makes up when nothing is observed.

    (v, u)  ~  P(v, u | G)

The latents of a dream are a draw from the exact posterior of its own observations.

References:
    Hinton, Dayan, Frey and Neal (1995), The "wake-sleep" algorithm for unsupervised neural networks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyro_vfe.program.layout import Program

DreamToArgs = Callable[..., tuple[tuple[Any, ...], Mapping[str, Any]]]


@dataclass(frozen=True, eq=False)
class Dream:
    """Latents and observations drawn from a model, and the arguments that stand for the observations."""

    latents: Mapping[str, Tensor]
    """The value of each latent site: an exact draw from the posterior given the observations."""

    observations: Mapping[str, Tensor]
    """The value of each site that the model observes."""

    args: tuple[Any, ...]
    """Positional arguments of the programs, with the dreamt observations in the data's place."""

    kwargs: Mapping[str, Any]
    """Keyword arguments of the programs, likewise."""


def dream(model: Program, *args: Any, dream_to_args: DreamToArgs | None = None, **kwargs: Any) -> Dream:
    """Returns latents and observations drawn from the model.

    Args:
        model: The generative model.
        *args: Its arguments: the data, for their shapes.
        dream_to_args: Makes the programs' arguments of a dream where names do not tell.
        **kwargs: Its keyword arguments.
    """
    raise NotImplementedError
