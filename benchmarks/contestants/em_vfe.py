"""Ours: iterations of EM on a Pyro program in float64, always the first ones; and EM on batches made as read."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from worker import Prepared
from workloads import Array, evidence_number, mixture, norms

import pyro_vfe as vfe
from contestants.laps import Laps
from contestants.programs import Model, diagonal_gaussians, gaussian_mixture
from contestants.vfe_chains import markov_chain
from pyro_vfe.learning.em_loop import e_step, m_step

PROGRAMS: Mapping[str, Callable[..., Model]] = {"mixture": gaussian_mixture, "chain": markov_chain}

BATCH = 1_000

Found = tuple[float, Laps]
"""The log evidence before the last M-phase, and when each iteration ended."""


def run(program: str, sizes: list[int], iterations: int) -> Prepared:
    """A run with its history; timed is the mean of all iterations but the first."""
    em = vfe.EM(PROGRAMS[program](*sizes, dtype=torch.float64))

    def call(_: None) -> Found:
        laps = Laps()

        def after_phase(_: int, row: Mapping[str, Any]) -> None:
            if row["phase"] == "E" and row["iteration"] > 0:
                laps.end()

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # It is stopped before it converges.
            found = em.run(max_iter=iterations, tol=0.0, progress_bar=False, callback=after_phase)
        return -float(found.history.of("E").surprise[iterations - 1]), laps

    return _prepared(call)


def phases(program: str, sizes: list[int], iterations: int) -> Prepared:
    """The phases of a run without its history: F, surprise and gap are not written down, and F does not matter."""
    em = vfe.EM(PROGRAMS[program](*sizes, dtype=torch.float64))

    def call(_: None) -> Found:
        laps, log_evidence = Laps(), 0.0
        pair, first = em._looked_at((), {})
        state = e_step(pair, em._e_phase_for(first), 0)
        for iteration in range(1, iterations + 1):
            log_evidence = -float(state.belief.surprise)
            m_step(pair, em._m_phase, state)
            state = e_step(pair, em._e_phase_for(first), iteration)
            laps.end()
        return log_evidence, laps

    return _prepared(call)


@dataclass(frozen=True)
class Stream:
    """Batches of noise around means, made as they are read, the same in every pass."""

    size: int
    means: Array

    def __iter__(self) -> Iterator[tuple[Tensor]]:
        rng = np.random.default_rng(0)
        for _ in range(self.size // BATCH):
            own = self.means[rng.integers(len(self.means), size=BATCH)]
            yield (torch.as_tensor(own + rng.standard_normal(own.shape)),)


def batches(size: int, components: int, dims: int) -> Prepared:
    """One pass of online EM over data of which one batch is in memory at a time."""
    stream = Stream(size, mixture(components, components, dims).means)

    def model(points: Tensor) -> None:
        diagonal_gaussians(points, torch.tensor(stream.means))

    def call(_: None) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # One pass is not to converge.
            vfe.EM(model).run_batches(
                stream, method=vfe.Online(alpha=0.7), num_epochs=1, num_data=size, tol=0.0, progress_bar=False
            )

    return Prepared(call, lambda _: {}, _restarted)


def _prepared(call: Callable[[None], Found]) -> Prepared:
    return Prepared(call, _numbers, _restarted, lambda found: found[1].mean)


def _numbers(found: Found) -> Mapping[str, float]:
    """The log evidence before the last M-phase, and the parameters after it."""
    learned = {name: value.detach() for name, value in pyro.get_param_store().items()}
    return {**evidence_number(found[0]), **norms(learned)}


def _restarted() -> None:
    pyro.clear_param_store()
