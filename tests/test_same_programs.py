"""Which programs are the same, so that what is known of one is not found out again."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate
from torch import Tensor

import pyro_vfe as vfe
from pyro_vfe.errors import VFEWarning

U = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
RUNS: list[str] = []


@pytest.fixture(autouse=True)
def no_runs() -> None:
    RUNS.clear()
    pyro.clear_param_store()


def mixture(u: Tensor, locs: Tensor | None = None, weight: float = 1.0) -> None:
    RUNS.append("model")
    locs = torch.tensor([-1.0, 1.0], dtype=torch.float64) if locs is None else locs
    with pyro.plate("data", len(u)):
        v = pyro.sample("v", dist.Categorical(torch.ones(len(locs)).double()))
        with pyro.poutine.scale(scale=weight):
            pyro.sample("u", dist.Normal(locs[v], 1.0), obs=u)


def tables(u: Tensor) -> None:
    RUNS.append("guide")
    with pyro.plate("data", len(u)):
        pyro.sample("v", dist.Categorical(logits=pyro.param("logits", torch.zeros(len(u), 2).double())))


class Holder:
    def guide(self, u: Tensor) -> None:
        tables(u)


def closure(program: Callable[[Tensor], None]) -> Callable[..., None]:
    def guide(u: Tensor, *, power: float = 1.0, names: tuple[str, ...] = ("v",)) -> None:
        assert power == 1.0 and names
        program(u)

    return guide


def defined_in_a_loop() -> Callable[[Tensor], None]:
    def guide(u: Tensor, own: Callable[[Tensor], None] = tables) -> None:
        own(u)

    return guide


def handled() -> Callable[[Tensor], None]:
    inner = pyro.poutine.block(tables, hide=["nothing"])
    return pyro.poutine.scale(pyro.poutine.condition(inner, data={"w": U}), scale=1.0)


HOLDER = Holder()
FRESH: dict[str, Callable[[], Any]] = {
    "a lambda": lambda: lambda u: tables(u),
    "a function that a loop defines": defined_in_a_loop,
    "a closure over a function": lambda: closure(tables),
    "a closure over a fresh closure": lambda: closure(closure(tables)),
    "a partial": lambda: partial(tables),
    "a partial of a partial": lambda: partial(partial(closure(tables), power=1.0), names=("v",)),
    "a bound method": lambda: HOLDER.guide,
    "Pyro's handlers": handled,
    "config_enumerate": lambda: config_enumerate(tables),
    "a lambda over a handler": lambda: closure(pyro.poutine.scale(tables, scale=1.0)),
}


@pytest.mark.parametrize("name", FRESH)
def test_a_function_made_anew_of_the_same_things_is_not_looked_at_anew(name: str) -> None:
    elbo = vfe.FreeEnergy()
    expected = elbo.loss_and_grads(mixture, FRESH[name](), U)
    RUNS.clear()
    for _ in range(12):
        assert elbo.loss_and_grads(mixture, FRESH[name](), U) == expected
    assert RUNS == ["guide", "model"] * (12 + 3)  # the 2nd, 4th and 8th call have one run more


OTHER: dict[str, Callable[[int], Any]] = {
    "a tensor": lambda n: partial(mixture, locs=torch.tensor([float(n), 1.0], dtype=torch.float64)),
    "a size": lambda n: partial(mixture, locs=torch.arange(2.0 + n % 3).double()),
    "a number": lambda n: lambda u: mixture(u, None, 1.0 + n),
    "a default": lambda n: _with_default(1.0 + n),
    "a handler's number": lambda n: pyro.poutine.scale(mixture, scale=1.0 + n),
    "a function's": lambda n: closure(lambda u: mixture(u, None, 1.0 + n)),
}


def _with_default(given: float) -> Callable[[Tensor], None]:
    def model(u: Tensor, weight: float = given) -> None:
        mixture(u, None, weight)

    return model


@pytest.mark.parametrize("name", OTHER)
def test_functions_of_one_code_that_hold_other_things_are_other_programs(name: str) -> None:
    elbo = vfe.FreeEnergy()
    for number in (0, 1, 2, 0, 2, 1):
        assert elbo.loss(OTHER[name](number), None, U) == vfe.FreeEnergy().loss(OTHER[name](number), None, U)


def test_a_function_whose_closure_changes_stays_the_same_program() -> None:
    weight = 1.0

    def model(u: Tensor) -> None:
        mixture(u, None, weight)

    elbo = vfe.FreeEnergy()
    elbo.loss(model, None, U)
    RUNS.clear()
    for weight in (2.0, 3.0):
        assert elbo.loss(model, None, U) == vfe.FreeEnergy(check=False).loss(partial(mixture, weight=weight), None, U)
        assert elbo.loss(lambda u: model(u), None, U) > 0
    assert RUNS.count("model") < 20


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda n: lambda u: mixture(u, None, 1.0 + n), r"the model was a new function .*another 'n' in its closure"),
        (lambda n: partial(mixture, weight=1.0 + n), r"the model was a new function of the same code \(mixture, "),
        (lambda n: pyro.poutine.scale(mixture, scale=1.0 + n), r"of the same code \(mixture, "),
    ],
)
def test_programs_that_are_new_at_each_call_are_told_once(make: Callable[[int], Any], words: str) -> None:
    elbo = vfe.FreeEnergy()
    for number in range(8):
        elbo.loss(make(number), None, U)
    with pytest.warns(VFEWarning, match=words):
        elbo.loss(make(8), None, U)
    for number in range(9, 14):
        elbo.loss(make(number), None, U)


def test_many_models_that_are_each_called_more_than_once_are_not_told() -> None:
    elbo = vfe.FreeEnergy()
    for number in range(12):
        model = partial(mixture, weight=1.0 + number)
        elbo.loss(model, None, U)
        elbo.loss(model, None, U)
