"""The data, parameters and networks that all contestants are given, from NumPy and the standard library alone."""

import gzip
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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


def evidence_number(log_evidence: float) -> dict[str, float]:
    """Returns a log evidence by its name."""
    return {"log evidence": float(log_evidence)}


def counts(initial: Array, transition: Array, emission: Array) -> dict[str, float]:
    """Returns numbers that differ where expected counts do: the root of the sum of their squares."""
    return norms({"initial counts": initial, "transition counts": transition, "emission counts": emission})


def norms(parameters: Mapping[str, Any]) -> dict[str, float]:
    """Returns numbers that differ where parameters do: for each name, the root of the sum of its squares."""
    return {name: float(np.sqrt((np.asarray(value, np.float64) ** 2).sum())) for name, value in parameters.items()}


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


@dataclass(frozen=True)
class HelmholtzWorkload:
    """A Helmholtz machine of 64 binary pixels under 12 and 8 hidden units, and pictures for it."""

    data: Array
    """Pixels, 0 or 1, shape (N, 64)."""

    top: Array
    """The generative logits of the top layer, shape (8,)."""

    generative: tuple[Array, Array]
    """Weights from the top layer to the middle one, shape (12, 8), and from there to the pixels, shape (64, 12)."""

    recognition: tuple[Array, Array]
    """Weights from the pixels to the middle layer, shape (12, 64), and from there to the top one, shape (8, 12)."""


def helmholtz(size: int) -> HelmholtzWorkload:
    """Returns a Helmholtz machine with random weights, and random pixels; its biases are zero."""
    rng = np.random.default_rng(0)
    pixels, middle, top = 64, 12, 8
    return HelmholtzWorkload(
        rng.integers(0, 2, (size, pixels)).astype(np.float64),
        rng.normal(size=top),
        (rng.normal(size=(middle, top)), rng.normal(size=(pixels, middle))),
        (0.3 * rng.normal(size=(middle, pixels)), rng.normal(size=(top, middle))),
    )


@dataclass(frozen=True)
class NetworkWorkload:
    """A Bayesian network as text in the BIF format, and what is observed."""

    text: str

    nodes: tuple[str, ...]
    """All nodes, in the order of the file."""

    observed: tuple[str, ...]
    """The first five leaves in the order of the file; each has its first state."""

    @property
    def latents(self) -> tuple[str, ...]:
        """The nodes that are not observed."""
        return tuple(node for node in self.nodes if node not in self.observed)


def network(name: str) -> NetworkWorkload:
    """Returns a network that the package pgmpy carries."""
    package = find_spec("pgmpy")
    assert package is not None and package.origin is not None
    packed = Path(package.origin).parent / "utils" / "example_models" / f"{name}.bif.gz"
    text = gzip.decompress(packed.read_bytes()).decode()
    nodes = tuple(re.findall(r"^variable (\S+)", text, re.MULTILINE))
    conditions = re.findall(r"^probability \( \S+ \| ([^)]+)\)", text, re.MULTILINE)
    parents = {parent.strip() for condition in conditions for parent in condition.split(",")}
    return NetworkWorkload(text, nodes, tuple(node for node in nodes if node not in parents)[:5])


def posterior_numbers(evidence: float, marginals: Iterable[Any]) -> dict[str, float]:
    """Returns numbers that differ where an evidence or marginals differ."""
    return {"log evidence": float(np.log(evidence)), **marginal_numbers(marginals)}


def marginal_numbers(marginals: Iterable[Any]) -> dict[str, float]:
    """Returns a number that differs where marginals differ; each is an array, or has `toarray`."""
    arrays = [np.asarray(marginal.toarray() if hasattr(marginal, "toarray") else marginal) for marginal in marginals]
    return {"mean squared marginal": sum(float((array**2).sum()) for array in arrays) / len(arrays)}
