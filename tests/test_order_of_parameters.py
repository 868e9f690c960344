"""Optimisers get parameters in the order in which the programs read them: other processes have that order too."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import PyroOptim
from torch import Tensor, tensor

import pyro_vfe as vfe
from pyro_vfe.learning.svi_step import Stepper

NAMES = [f"p_{7 * i % 40}" for i in range(40)]
"""Neither sorted nor reversed."""


class Recording(PyroOptim):  # type: ignore[misc]
    """Plain gradient descent that notes what it was given."""

    def __init__(self) -> None:
        super().__init__(torch.optim.SGD, {"lr": 1e-6})
        self.seen: list[list[str]] = []

    def __call__(self, params: list[Tensor], *args: Any, **kwargs: Any) -> None:
        """Does a step."""
        self.seen.append([pyro.get_param_store()._param_to_name[leaf] for leaf in params])
        super().__call__(params, *args, **kwargs)


def total(names: list[str]) -> Tensor:
    return torch.stack([pyro.param(name, tensor(0.01 * n)) for n, name in enumerate(names)]).sum()


def model() -> None:
    z = pyro.sample("z", dist.Bernoulli(0.3))
    pyro.sample("u", dist.Normal(z + total(NAMES[20:]), 1.0), obs=tensor(1.0))


def guide() -> None:
    pyro.sample("z", dist.Bernoulli(logits=total(NAMES[:20])))


def by_steps(optim: Recording) -> list[list[str]]:
    stepper = Stepper(model, guide, optim, vfe.FreeEnergy())
    for number in (1, 2):
        stepper.step(number, (), {})
    return [NAMES, NAMES]


def by_fit(optim: Recording) -> list[list[str]]:
    vfe.fit(model, guide, optim=optim, num_steps=2, progress_bar=False)
    return [NAMES, NAMES]


def by_wake_and_sleep(optim: Recording) -> list[list[str]]:
    machine = vfe.WakeSleep(model, guide, optim, optim, dream_to_args=lambda dream: ((), {}))
    machine.run(num_steps=1, progress_bar=False)
    return [NAMES[20:], NAMES[:20]]


@pytest.mark.parametrize("trained", [by_steps, by_fit, by_wake_and_sleep])
def test_an_optimiser_gets_parameters_in_the_order_of_the_programs(
    trained: Callable[[Recording], list[list[str]]],
) -> None:
    optim = Recording()
    assert trained(optim) == optim.seen
