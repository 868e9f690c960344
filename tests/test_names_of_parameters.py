"""Pyro's store keeps one tensor of a name: a module whose tensor is another one would never learn, and is refused."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

import pyro_vfe as vfe
from pyro_vfe.errors import NameClashError

Linear = PyroModule[nn.Linear]


class Generative(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.middle = Linear(2, 3)
        self.pixels = Linear(3, 4)

    def forward(self, u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            middle = pyro.sample("v", dist.Bernoulli(logits=self.middle(torch.ones(len(u), 2))).to_event(1))
            pyro.sample("u", dist.Bernoulli(logits=self.pixels(middle)).to_event(1), obs=u)


class Recognition(PyroModule):
    def __init__(self, name: str = "", width: int = 4) -> None:
        super().__init__(name)
        self.middle = Linear(width, 3)
        self.width = width

    def forward(self, u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            pyro.sample("v", dist.Bernoulli(logits=self.middle(u[:, : self.width])).to_event(1))


def adam() -> pyro.optim.PyroOptim:
    return pyro.optim.Adam({"lr": 0.1})


def by_fit(model: Any, guide: Any, u: Tensor) -> None:
    vfe.fit(model, guide, u, optim=adam(), num_steps=1, progress_bar=False)


def by_wake_sleep(model: Any, guide: Any, u: Tensor) -> None:
    vfe.WakeSleep(model, guide, adam(), adam()).step(u)


def by_reweighted_wake_sleep(model: Any, guide: Any, u: Tensor) -> None:
    vfe.WakeSleep(model, guide, adam(), adam(), reweighted=True).step(u)


WAYS = {way.__name__: way for way in (by_fit, by_wake_sleep, by_reweighted_wake_sleep)}


@pytest.fixture
def u() -> Tensor:
    pyro.set_rng_seed(0)
    return (torch.rand(5, 4) < 0.5).to(torch.get_default_dtype())


@pytest.mark.parametrize("first", ["neither", "model", "guide"])
@pytest.mark.parametrize("width", [2, 4], ids=["same shape", "another shape"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_model_and_guide_whose_modules_share_a_name_are_refused(
    way: Callable[..., None], width: int, first: str, u: Tensor
) -> None:
    model, guide = Generative(), Recognition(width=width)
    programs = {"neither": [], "model": [model], "guide": [guide]}[first]
    for program in programs:
        program(u)
    before = [value.detach().clone() for program in (model, guide) for value in program.parameters()]
    with pytest.raises(NameClashError, match=r"'middle\.weight'.*__init__\('guide'\)"):
        way(model, guide, u)
    after = [value for program in (model, guide) for value in program.parameters()]
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new.detach(), old, rtol=0, atol=0)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_with_names_of_their_own_every_parameter_learns(way: Callable[..., None], u: Tensor) -> None:
    model, guide = Generative(), Recognition("guide")
    before = [value.detach().clone() for program in (model, guide) for value in program.parameters()]
    way(model, guide, u)
    after = [value.detach() for program in (model, guide) for value in program.parameters()]
    assert all(bool((old != new).any()) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_module_made_anew_beside_what_an_older_one_left_in_the_store_is_refused(
    way: Callable[..., None], u: Tensor
) -> None:
    way(Generative(), Recognition("guide"), u)
    with pytest.raises(NameClashError, match="clear_param_store"):
        way(Generative(), Recognition("guide"), u)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_module_that_takes_over_the_stored_tensors_learns_on(way: Callable[..., None], u: Tensor) -> None:
    pixels = nn.Linear(3, 4)

    def model(u: Tensor) -> None:
        down = pyro.module("down", pixels, update_module_params=True)
        with pyro.plate("data", len(u)):
            v = pyro.sample("v", dist.Bernoulli(0.5 * torch.ones(3)).to_event(1))
            pyro.sample("u", dist.Bernoulli(logits=down(v)).to_event(1), obs=u)

    way(model, Recognition("guide"), u)
    first, pixels = pixels.weight, nn.Linear(3, 4)
    before = first.detach().clone()
    way(model, Recognition("another"), u)
    assert pixels.weight is first
    assert bool((pixels.weight != before).any())


@pytest.mark.parametrize("learns", [False, True], ids=["the exact posterior", "a network"])
def test_a_run_of_wake_sleep_notes_a_guide_that_has_nothing_to_learn(learns: bool, u: Tensor) -> None:
    model = Generative()
    machine = vfe.WakeSleep(model, Recognition("guide") if learns else vfe.AutoPosterior(model), adam(), adam())
    run = machine.run(u, num_steps=1, progress_bar=False)
    assert any("no parameters of its own" in note for note in run.notes) == (not learns)
