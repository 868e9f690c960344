"""An SVI step and a decomposition, beside TraceEnum_ELBO's step (or our own loss) on the same program and data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from timed_programs import Model, as_it_is, empty, gaussian_mixture, hidden_markov, small_chain

import pyro_vfe as vfe


@dataclass(frozen=True)
class Case:
    """One comparison and the ratio it should stay below."""

    ours: Callable[[], Model]
    peer: Callable[[], Model]
    nesting: int
    target: float
    rounds: int


CASES = {
    "SVI step, Gaussian mixture N=100,000 K=10 D=8": Case(
        lambda: gaussian_mixture(100_000, 10, 8), lambda: gaussian_mixture(100_000, 10, 8), 1, 1.0, 7
    ),
    "SVI step, Python-loop HMM B=64 T=300 K=32": Case(
        lambda: hidden_markov(64, 300, 32, 32, as_it_is), lambda: hidden_markov(64, 300, 32, 32, pyro.markov), 1, 0.5, 5
    ),
    "SVI step, 10 sites": Case(lambda: small_chain(5), lambda: small_chain(5), 0, 1.5, 60),
}


def step(loss: Any, model: Model) -> Callable[[], float]:
    """A step of gradient descent without the optimiser."""

    def run() -> float:
        value: float = loss.loss_and_grads(model, empty)
        for _, parameter in pyro.get_param_store().named_parameters():
            parameter.grad = None
        return value

    return run


@pytest.mark.parametrize("who", ["ours", "peer"])
@pytest.mark.parametrize("case", CASES)
def test_step(benchmark: Any, case: str, who: str) -> None:
    """Times loss and gradients; analysis and spot check come before the clock starts."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    setup = CASES[case]
    ours = who == "ours"
    loss = vfe.FreeEnergy() if ours else TraceEnum_ELBO(max_plate_nesting=setup.nesting)
    benchmark.group, benchmark.extra_info["target"] = case, setup.target
    benchmark.pedantic(step(loss, setup.ours() if ours else setup.peer()), rounds=setup.rounds, warmup_rounds=2)


@pytest.mark.parametrize("who", ["ours", "peer"])
@pytest.mark.parametrize("case", CASES)
def test_decompose(benchmark: Any, case: str, who: str) -> None:
    """Times decompose beside our own loss without gradients."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    setup = CASES[case]
    elbo, model = vfe.FreeEnergy(), setup.ours()
    benchmark.group, benchmark.extra_info["target"] = case.replace("SVI step", "decompose beside loss"), 2.0
    measured = elbo.decompose if who == "ours" else elbo.loss
    benchmark.pedantic(measured, args=(model, empty), rounds=setup.rounds, warmup_rounds=2)
