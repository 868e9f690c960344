"""Ours: iterations of EM on a Pyro program in float64, always the first ones; and EM on batches made as read."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from worker import Prepared
from workloads import evidence_number, mixture, norms

import pyro_vfe as vfe
from contestants.programs import Model, diagonal_gaussians, gaussian_mixture
from contestants.vfe_chains import markov_chain

PROGRAMS: Mapping[str, Callable[..., Model]] = {"mixture": gaussian_mixture, "chain": markov_chain}

BATCH = 1_000


def phases(program: str, sizes: list[int], iterations: int = 1) -> Prepared:
    """Single phases, as in a loop that a user writes."""
    em = vfe.EM(PROGRAMS[program](*sizes, dtype=torch.float64))

    def call(_: None) -> float:
        log_evidence = 0.0
        for _ in range(iterations):
            log_evidence = -float(em.e_phase().surprise)
            em.m_phase()
        return log_evidence

    return Prepared(call, learned, _restarted)


def run(program: str, sizes: list[int], iterations: int) -> Prepared:
    """A run with its history."""
    em = vfe.EM(PROGRAMS[program](*sizes, dtype=torch.float64))

    def call(_: None) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # It is stopped before it converges.
            found = em.run(max_iter=iterations, tol=0.0, progress_bar=False)
        return -float(found.history.of("E").surprise[iterations - 1])

    return Prepared(call, learned, _restarted)


def batches(size: int, components: int, dims: int) -> Prepared:
    """One pass over data of which one batch is in memory at a time."""
    means = mixture(components, components, dims).means

    def stream() -> Iterator[tuple[Any, ...]]:
        rng = np.random.default_rng(0)
        for _ in range(size // BATCH):
            yield (torch.as_tensor(means[rng.integers(components, size=BATCH)] + rng.standard_normal((BATCH, dims))),)

    def model(points: Tensor) -> None:
        diagonal_gaussians(points, torch.tensor(means))

    def call(_: None) -> None:
        vfe.EM(model).run_batches(stream(), method=vfe.Online(alpha=0.7), progress_bar=False)

    return Prepared(call, lambda _: {}, _restarted)


def learned(log_evidence: float) -> Mapping[str, float]:
    """The log evidence before the last M-phase, and the parameters after it."""
    return {**evidence_number(log_evidence), **norms({n: v.detach() for n, v in pyro.get_param_store().items()})}


def _restarted() -> None:
    pyro.clear_param_store()
