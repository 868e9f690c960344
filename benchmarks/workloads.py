"""The data and parameters that all contestants are given, from NumPy alone."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SYMBOLS = 32


@dataclass(frozen=True)
class ChainWorkload:
    """A hidden Markov model and sequences for it."""

    initial: Array
    """Shape (K,)."""

    transition: Array
    """Shape (K, K)."""

    emission: Array
    """Shape (K, SYMBOLS)."""

    data: NDArray[np.int64]
    """Symbols, shape (B, T)."""


def chain(sequences: int, steps: int, states: int) -> ChainWorkload:
    """Returns a hidden Markov model with 32 symbols, and random symbols."""
    rng = np.random.default_rng(0)
    return ChainWorkload(
        rng.dirichlet(np.ones(states)),
        rng.dirichlet(np.ones(states), states),
        rng.dirichlet(np.ones(SYMBOLS), states),
        rng.integers(0, SYMBOLS, (sequences, steps)),
    )


def counts(initial: Array, transition: Array, emission: Array) -> dict[str, float]:
    """Returns numbers that differ where expected counts do: the root of the sum of their squares."""
    named = {"initial counts": initial, "transition counts": transition, "emission counts": emission}
    return {name: float(np.sqrt((np.asarray(table, np.float64) ** 2).sum())) for name, table in named.items()}


@dataclass(frozen=True)
class MixtureWorkload:
    """Data, and the means that a mixture of diagonal Gaussians starts from; its weights are equal, its scales one."""

    data: Array
    """Shape (N, D)."""

    means: Array
    """Shape (K, D)."""


def mixture(size: int, components: int, dims: int) -> MixtureWorkload:
    """Returns standard normal data and means."""
    rng = np.random.default_rng(0)
    return MixtureWorkload(rng.standard_normal((size, dims)), rng.standard_normal((components, dims)))
