"""A step of gradient descent on a Pyro program without the optimiser: ours, or Pyro's own; and our decomposition."""

from collections.abc import Callable, Mapping
from typing import Any

import pyro
from pyro.infer import TraceEnum_ELBO
from worker import Prepared
from workloads import evidence_number

import pyro_vfe as vfe
from contestants.programs import Model, empty, gaussian_mixture, hidden_markov, small_chain

OURS: Mapping[str, Callable[..., Model]] = {
    "mixture": gaussian_mixture,
    "loop": hidden_markov,
    "small": small_chain,
}
PYROS: Mapping[str, tuple[Callable[..., Model], int]] = {
    "mixture": (gaussian_mixture, 1),
    "loop": (lambda *sizes: hidden_markov(*sizes, times=pyro.markov), 1),
    "small": (small_chain, 0),
}


def ours(program: str, sizes: list[int]) -> Prepared:
    """FreeEnergy's loss and gradients."""
    return Prepared(step(vfe.FreeEnergy(), OURS[program](*sizes)), evidence_number)


def pyros(program: str, sizes: list[int]) -> Prepared:
    """TraceEnum_ELBO's loss and gradients; the loop is annotated with pyro.markov."""
    make, nesting = PYROS[program]
    return Prepared(step(TraceEnum_ELBO(max_plate_nesting=nesting), make(*sizes)), evidence_number)


def our_loss(program: str, sizes: list[int]) -> Prepared:
    """FreeEnergy's loss without gradients."""
    elbo, model = vfe.FreeEnergy(), OURS[program](*sizes)
    return Prepared(lambda: -elbo.loss(model, empty), evidence_number)


def our_decomposition(program: str, sizes: list[int]) -> Prepared:
    """FreeEnergy's decomposition."""
    elbo, model = vfe.FreeEnergy(), OURS[program](*sizes)
    return Prepared(lambda: elbo.decompose(model, empty), lambda terms: evidence_number(-terms.surprise))


def step(loss: Any, model: Model) -> Callable[[], float]:
    """Loss and gradients, which are then thrown away; returns the log evidence."""

    def run() -> float:
        value: float = loss.loss_and_grads(model, empty)
        for _, parameter in pyro.get_param_store().named_parameters():
            parameter.grad = None
        return -value

    return run
