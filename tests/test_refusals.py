"""Refusals that no other test provokes: each, switched off, would leave a number without a word."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import oracle
from programs.case import categorical, empty, simplex, tensor
from torch import Tensor

import pyro_vfe as vfe
from pyro_vfe.errors import ScaleError, SpotCheckError

RATES = tensor([1.0, 5.0, 9.0])
COUNTS = tensor([4.0, 0.0, 7.0])

# A read that stops varying: what provenance says of a site, and its table no longer shows.

COLLAPSED: dict[str, Callable[[Tensor], Tensor]] = {
    "the first entry": lambda z: z.reshape(-1)[0],
    "the largest of all values": lambda z: z.max(),
    "the sum of all values": lambda z: z.sum() % 3,
}


@pytest.mark.parametrize("ask", ["loss", "decompose", "differentiable_loss"])
@pytest.mark.parametrize("read", COLLAPSED)
def test_a_read_that_stops_varying_at_a_later_call_is_looked_at_anew(read: str, ask: str) -> None:
    """Scalars in an ordinary run, all of these are the latent itself; enumerated, they are one of its values."""

    def model(collapses: bool) -> None:
        z = categorical("z", tensor([0.2, 0.3, 0.5]))
        pyro.sample("u", dist.Poisson(RATES[COLLAPSED[read](z) if collapses else z]), obs=tensor(4.0))

    elbo = vfe.FreeEnergy()
    getattr(elbo, ask)(model, empty, False)
    with pytest.raises(SpotCheckError, match="'u'"):
        getattr(elbo, ask)(model, empty, True)


def test_a_read_that_rightly_stops_varying_keeps_its_number() -> None:
    def model(rates: Tensor) -> None:
        z = categorical("z", tensor([0.2, 0.3, 0.5]))
        pyro.sample("u", dist.Poisson(rates[z]), obs=tensor(4.0))

    elbo = vfe.FreeEnergy()
    for rates in (RATES, torch.full((3,), 5.0), RATES):
        expected = float(oracle(model, empty, rates).terms["surprise"].detach())
        assert elbo.loss(model, empty, rates) == pytest.approx(expected)


# Weights of the guide's latents inside a plate, under a latent that only the model has.


def weighted(scale: float, with_group: bool, is_model: bool) -> None:
    g = categorical("g", simplex("groups" if is_model else "q_g", 2, seed=1)) if with_group else torch.tensor(0)
    with pyro.plate("data", 3), pyro.poutine.scale(scale=scale):
        probs = simplex("members", 2, 3, seed=2)[g] if is_model else simplex("q_z", 3, 3, seed=3)
        z = categorical("z", probs)
        if is_model:
            pyro.sample("u", dist.Poisson(RATES[z]), obs=COUNTS)


def weighted_model(scale: float) -> None:
    weighted(scale, True, True)


def guide_of_members(scale: float) -> None:
    weighted(scale, False, False)


def guide_of_both(scale: float) -> None:
    weighted(scale, True, False)


@pytest.mark.parametrize("ask", ["loss", "loss_and_grads", "decompose"])
def test_weighted_latents_of_the_guide_may_not_lie_under_a_latent_of_the_model_alone(ask: str) -> None:
    with pytest.raises(ScaleError, match="'g'"):
        getattr(vfe.FreeEnergy(), ask)(weighted_model, guide_of_members, 2.0)


@pytest.mark.parametrize(("scale", "guide"), [(2.0, guide_of_both), (1.0, guide_of_members)])
def test_the_guide_may_have_both_or_the_plate_no_weight(scale: float, guide: Callable[..., Any]) -> None:
    expected = oracle(weighted_model, guide, scale, scaled_plate="data").terms["free_energy"]
    assert vfe.FreeEnergy().loss(weighted_model, guide, scale) == pytest.approx(float(expected.detach()))
