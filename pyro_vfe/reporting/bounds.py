r"""Bounds on log p(u) where it cannot be computed.

    E log 1/K sum_k P(v_k, u) / Q(v_k|u)   <=   log p(u),       v_1, ..., v_K ~ Q(v|u)
                                           >=   log p(u),       v_1 ~ P(v|u),  v_2, ..., v_K ~ Q(v|u)

References:
    Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders.
    Grosse, Ghahramani and Adams (2015), Sandwiching the marginal likelihood using bidirectional Monte Carlo.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyro_vfe.program.dreams import Dream
from pyro_vfe.program.layout import Program


@dataclass(frozen=True, eq=False)
class Bounds:
    """An interval for log p(u), in nats."""

    lower: Tensor
    """An unbiased estimate of a lower bound on log p(u)."""

    upper: Tensor | None
    """An unbiased estimate of an upper bound on log p(u); None without a dream."""


def bounds(
    model: Program, guide: Program, *args: Any, num_particles: int = 100, dream: Dream | None = None, **kwargs: Any
) -> Bounds:
    """Returns an interval for log p(u).

    Args:
        model: The generative model.
        guide: The guide.
        *args: Arguments of both programs.
        num_particles: K, the number of draws.
        dream: A dream whose log p(u) is bounded, from above too.
        **kwargs: Keyword arguments of both programs.
    """
    raise NotImplementedError
