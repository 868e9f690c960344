"""What a newcomer stumbles over: the message names the site, the fact and what to write instead."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs.case import positive, simplex, tensor
from torch import Tensor

import pyro_vfe as vfe
from pyro_vfe.errors import (
    DegenerateError,
    MissingGuideSiteError,
    NameClashError,
    ShapeError,
    StructureError,
    SupportError,
    VFEError,
    VFEWarning,
)
from pyro_vfe.program import branches

DATA = tensor([2.0, 0.0, 1.0, 12.0, 8.0, 13.0])
RATES = tensor([1.0, 9.0])


def coins(probs: Tensor | None = None) -> Any:
    return dist.Categorical(torch.ones(2) / 2 if probs is None else probs)


def model(u: Tensor) -> None:
    rates = positive("rates", 2)
    with pyro.plate("data", len(u)):
        v = pyro.sample("v", coins())
        pyro.sample("u", dist.Poisson(rates[v]), obs=u)


def uncertain(u: Tensor) -> None:
    rates = pyro.sample("rates", dist.Gamma(1.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(u)):
        v = pyro.sample("v", coins())
        pyro.sample("u", dist.Poisson(rates[v]), obs=u)


def test_posterior_says_how_to_give_a_continuous_latent_a_value_and_that_works() -> None:
    with pytest.raises(MissingGuideSiteError, match=r"'rates'.*posterior takes no guide.*poutine\.condition"):
        vfe.posterior(uncertain, DATA)
    conditioned = pyro.poutine.condition(uncertain, data={"rates": RATES})
    likelihood = (dist.Poisson(RATES).log_prob(DATA[:, None]).exp() / 2).sum(-1).log().sum()
    prior = dist.Gamma(1.0, 1.0).log_prob(RATES).sum()
    torch.testing.assert_close(vfe.posterior(conditioned, DATA).log_evidence, likelihood + prior)


OPTIM = {"lr": 0.1}
GUIDED: dict[str, Callable[[Any], Any]] = {
    "EM": lambda guide: vfe.EM(model, guide),
    "decompose": lambda guide: vfe.FreeEnergy().decompose(model, guide, DATA),
    "loss": lambda guide: vfe.FreeEnergy().loss(model, guide, DATA),
    "loss_and_grads": lambda guide: vfe.FreeEnergy().loss_and_grads(model, guide, DATA),
    "differentiable_loss": lambda guide: vfe.FreeEnergy().differentiable_loss(model, guide, DATA),
    "ELBOModule": lambda guide: vfe.FreeEnergy()(model, guide)(DATA),
    "compute_marginals": lambda guide: vfe.FreeEnergy().compute_marginals(model, guide, DATA),
    "fit": lambda guide: vfe.fit(
        model, guide, DATA, optim=pyro.optim.Adam(OPTIM), num_steps=1, progress_bar=False, monitor=False
    ),
    "Monitor": lambda guide: vfe.Monitor(model, guide),
    "explain": lambda guide: vfe.explain(model, guide, DATA),
    "to_datatree": lambda guide: vfe.to_datatree(model, guide, DATA),
}


@pytest.mark.parametrize("name", GUIDED)
def test_data_in_the_place_of_the_guide_are_told(name: str) -> None:
    with pytest.raises(VFEError, match=r"guide is a Tensor, which cannot be called.*the data after them"):
        GUIDED[name](DATA)


@pytest.mark.parametrize("name", ["loss", "loss_and_grads", "differentiable_loss", "ELBOModule"])
def test_None_stands_for_a_guide_without_sites(name: str) -> None:
    evidence = (dist.Poisson(RATES).log_prob(DATA[:, None]).exp() / 2).sum(-1).log().sum()
    pyro.param("rates", RATES, constraint=dist.constraints.positive)
    assert float(torch.as_tensor(GUIDED[name](None)).detach()) == pytest.approx(-float(evidence))


def one_latent(u: Tensor) -> None:
    v = pyro.sample("v", coins())
    pyro.sample("u", dist.Poisson(RATES[v]), obs=u)


def latents_side_by_side(u: Tensor) -> None:
    v = pyro.sample("v", coins(torch.ones(len(u), 2) / 2))
    pyro.sample("u", dist.Poisson(RATES[v]), obs=u)


def repeated_latents(u: Tensor) -> None:
    v = pyro.sample("v", coins().expand([len(u)]))
    pyro.sample("u", dist.Poisson(RATES[v]), obs=u)


def repeated_data(u: Tensor) -> None:
    v = pyro.sample("v", coins())
    pyro.sample("u", dist.Poisson(RATES[v]).expand([6]), obs=tensor(2.0))


@pytest.mark.parametrize("size", [2, 6])
@pytest.mark.parametrize("plateless", [one_latent, latents_side_by_side, repeated_latents, repeated_data])
@pytest.mark.parametrize("check", ["first", False])
def test_data_without_a_plate_are_told_to_take_one(plateless: Any, size: int, check: Any) -> None:
    with pytest.raises(StructureError, match=r"of the model has.*no plate around it.*with pyro\.plate\(name, [26]"):
        vfe.posterior(plateless, DATA[:size], check=check)


def test_the_missing_plate_is_told_to_who_makes_a_mean_field_guide_too() -> None:
    with pytest.raises(StructureError, match=r"'u' of the model has.*no plate around it"):
        vfe.FreeEnergy().loss(one_latent, vfe.AutoMeanField(one_latent), DATA)


def test_missing_data_are_told_to_be_masked_and_other_data_are_not() -> None:
    gap = DATA.clone()
    gap[1] = torch.nan
    with pytest.raises(SupportError, match=r"observes NaN.*obs_mask=~u\.isnan\(\)"):
        vfe.posterior(model, gap)
    with pytest.raises(SupportError, match="Observe a value that the distribution can take"):
        vfe.posterior(model, -DATA)


def test_a_prior_that_wants_probability_zero_is_named_as_the_cause() -> None:
    def sparse(u: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.full((3,), 0.2)))
        with pyro.plate("data", len(u)):
            v = pyro.sample("v", dist.Categorical(weights))
            pyro.sample("u", dist.Poisson(tensor([1.0, 9.0, 500.0])[v]), obs=u)

    guide = pyro.infer.autoguide.AutoDelta(pyro.poutine.block(sparse, expose=["weights"]))
    with pytest.raises(DegenerateError, match=r"concentrations of at least one") as caught:
        vfe.EM(sparse, guide).run(DATA, progress_bar=False)
    assert "the parameter a prior" not in str(caught.value)


def test_a_plate_made_in_each_step_of_a_loop_is_told_to_be_made_once_and_that_works() -> None:
    def chain(u: Tensor, once: bool) -> None:
        plate = pyro.plate("data", 2)
        for t in range(3):
            with plate if once else pyro.plate("data", 2):
                z = pyro.sample(f"z_{t}", coins())
                pyro.sample(f"u_{t}", dist.Poisson(RATES[z]), obs=u[2 * t : 2 * t + 2])

    with pytest.raises(NameClashError, match=r"two plates.*make it once, before the loop"):
        vfe.posterior(chain, DATA, False)
    evidence = (dist.Poisson(RATES).log_prob(DATA[:, None]).exp() / 2).sum(-1).log().sum()
    torch.testing.assert_close(vfe.posterior(chain, DATA, True).log_evidence, evidence)


def test_zero_has_no_sign_in_print() -> None:
    def certain(u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            pyro.sample("u", dist.Normal(0.0, 1.0), obs=u)

    run = vfe.EM(model, e_phase=vfe.Hard()).run(DATA, progress_bar=False, max_iter=3)
    tables = (run, run.history, vfe.FreeEnergy().decompose(certain, None, DATA))
    assert all("-0.0000" not in str(table) for table in tables)


def of_two_sizes(u: Tensor, size: int) -> None:
    rates = pyro.param("rates", lambda: torch.arange(1.0, size + 1))
    with pyro.plate("data", len(u)):
        v = pyro.sample("v", dist.Categorical(torch.ones(size) / size))
        pyro.sample("u", dist.Poisson(rates[v]), obs=u)


def one_for_each_datum(u: Tensor, size: int) -> None:
    means = pyro.param("means", torch.zeros(len(u)))
    with pyro.plate("data", len(u)):
        v = pyro.sample("v", coins())
        pyro.sample("u", dist.Normal(means + v, 1.0), obs=u)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("changing", [of_two_sizes, one_for_each_datum])
def test_a_parameter_left_in_another_shape_is_named(changing: Any, seed: int) -> None:
    torch.manual_seed(seed)
    vfe.posterior(changing, DATA, 2)
    with pytest.raises(StructureError, match=r"Parameter '(rates|means)' in Pyro's store.*clear_param_store"):
        vfe.posterior(changing, DATA[:4], 4)
    pyro.clear_param_store()
    assert vfe.posterior(changing, DATA[:4], 4).marginal("v").shape[0] == 4


@pytest.mark.parametrize("size", [4, 12])
@pytest.mark.parametrize("init", ["uniform", "posterior"])
def test_logits_left_from_data_of_another_size_are_named(size: int, init: Any) -> None:
    def plain(u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            v = pyro.sample("v", coins())
            pyro.sample("u", dist.Poisson(RATES[v]), obs=u)

    vfe.FreeEnergy().loss(plain, vfe.AutoMeanField(plain), DATA)
    with pytest.raises(StructureError, match=rf"'AutoMeanField.logits.v'.*shape \(6, 2\).*shape \({size}, 2\)"):
        vfe.FreeEnergy().loss(plain, vfe.AutoMeanField(plain, init=init), DATA.repeat(2)[:size])


def test_a_table_that_is_too_short_is_told_in_one_sentence() -> None:
    def short(u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            v = pyro.sample("v", dist.Categorical(tensor([1.0, 0.0])))
            pyro.sample("u", dist.Poisson(RATES[:1][v]), obs=u)

    with pytest.raises(ShapeError, match=r"out of range.*one entry for each value") as caught:
        vfe.posterior(short, DATA)
    assert ".. " not in str(caught.value)


def alike_notes(u: Tensor, child: Tensor, rates: Tensor, present: bool) -> list[str]:
    def family(u: Tensor) -> None:
        weights = simplex("weights", 2)
        with pyro.plate("data", len(u)), pyro.poutine.mask(mask=torch.tensor(present)):
            v = pyro.sample("v", dist.Categorical(weights))
            w = pyro.sample("w", dist.Categorical(child[v]))
            pyro.sample("u", dist.Poisson(rates[w]), obs=u)
            pyro.sample("beside", dist.Poisson(torch.ones(2)[v]), obs=torch.ones(len(u)))
        pyro.sample("x", dist.Normal(pyro.param("mean", tensor(0.0)), 1.0), obs=tensor(1.0))

    notes = vfe.EM(family).run(u, progress_bar=False).notes
    return [note for note in notes if "components are alike" in note]


def test_components_are_alike_where_no_child_tells_them_apart() -> None:
    apart, same = tensor([[0.9, 0.1], [0.2, 0.8]]), tensor([[0.5, 0.5], [0.5, 0.5]])
    assert alike_notes(DATA, apart, RATES, True) == []
    assert len(alike_notes(DATA, same, RATES, True)) == 1
    assert len(alike_notes(DATA, apart, torch.ones(2), True)) == 1
    assert alike_notes(DATA, same, torch.ones(2), False) == []


def branching(u: Tensor) -> None:
    z: Any = 0
    for t in pyro.plate("time", 6):
        z = pyro.sample(f"z_{t}", coins(tensor([0.3, 0.7]) if z else tensor([0.6, 0.4])))
        pyro.sample(f"u_{t}", dist.Poisson(RATES[z]), obs=u[t])


def test_who_branches_on_many_latents_is_told_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    vfe.posterior(branching, DATA)  # is quick enough
    monkeypatch.setattr(branches, "PATIENCE", 0.0)
    with pytest.warns(VFEWarning, match=r"'z_0'.*perhaps 32 joint values.*torch\.where"):
        vfe.posterior(branching, DATA)
