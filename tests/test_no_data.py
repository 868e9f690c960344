"""Models that observe nothing: said where F or learning is asked for, and where nothing depends on data it is not."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pyro_vfe as vfe
from pyro_vfe.errors import VFEWarning

U = torch.tensor([1.0, 0.0, 2.0, 9.0, 8.0, 12.0], dtype=torch.float64)
HALF = torch.ones(2, dtype=torch.float64) / 2
QUIET: dict[str, Any] = {"progress_bar": False}


def rates() -> Tensor:
    start = torch.tensor([1.0, 9.0], dtype=torch.float64)
    return pyro.param("rates", start, constraint=constraints.positive)


def forgotten(u: Tensor) -> None:
    own = rates()
    with pyro.plate("data", len(u)):
        v = pyro.sample("v", dist.Categorical(HALF))
        pyro.sample("u", dist.Poisson(own[v]))


def forgotten_bits(u: Tensor) -> None:
    own = rates()
    with pyro.plate("data", len(u)):
        v = pyro.sample("v", dist.Bernoulli(HALF[0]))
        pyro.sample("u", dist.Bernoulli(logits=v * own[0]))


def forgotten_chain(u: Tensor) -> None:
    transition = pyro.param("transition", torch.stack([HALF, HALF]), constraint=constraints.simplex)
    with pyro.plate("time", len(u), dim=-1):
        z = pyro.sample("z", vfe.MarkovChain(HALF, transition, num_steps=len(u)))
        pyro.sample("u", dist.Poisson(1.0 + 5.0 * z.to(torch.float64)))


def without_data(u: Tensor | None = None) -> None:
    own = rates()
    with pyro.plate("data", 6):
        v = pyro.sample("v", dist.Categorical(HALF))
        pyro.sample("u", dist.Normal(own[v], 1.0), obs=u if u is not None and len(u) > 6 else None)


def adam() -> Any:
    return pyro.optim.Adam({"lr": 0.05})


def monitored(model: Any) -> Any:
    return vfe.Monitor(model, None, **QUIET).step(1.0, U)


NEED_DATA: dict[str, Callable[[Any], Any]] = {
    "EM": lambda model: vfe.EM(model).run(U, **QUIET),
    "fit": lambda model: vfe.fit(model, None, U, optim=adam(), num_steps=2, **QUIET),
    "SVI": lambda model: pyro.infer.SVI(model, lambda u: None, adam(), vfe.FreeEnergy()).step(U),
    "decompose": lambda model: vfe.FreeEnergy().decompose(model, None, U),
    "WakeSleep": lambda model: vfe.WakeSleep(model, vfe.AutoMeanField(model), adam(), adam()).run(
        U, num_steps=1, **QUIET
    ),
    "to_datatree": lambda model: vfe.to_datatree(model, None, U, num_samples=2, **QUIET),
    "Monitor": monitored,
}
NEED_NONE: dict[str, Callable[[Any], Any]] = {
    "posterior": lambda model: vfe.posterior(model, U),
    "dream": lambda model: vfe.dream(model, U),
    "explain": lambda model: vfe.explain(model, None, U),
    "bounds": lambda model: vfe.bounds(model, vfe.AutoMeanField(model), U, num_particles=2),
}


@pytest.mark.parametrize("model", [forgotten, forgotten_bits, forgotten_chain, without_data])
@pytest.mark.parametrize("entry", NEED_DATA)
def test_a_forgotten_obs_is_said_with_the_site(entry: str, model: Any) -> None:
    with pytest.warns(VFEWarning, match=r"The model observes nothing.*Nothing reads site u\. .*obs=data"):
        NEED_DATA[entry](model)


@pytest.mark.parametrize("model", [forgotten, forgotten_chain])
@pytest.mark.parametrize("entry", NEED_NONE)
def test_where_no_data_are_needed_nothing_is_said(entry: str, model: Any) -> None:
    NEED_NONE[entry](model)


def test_the_way_out_of_a_forgotten_obs_works() -> None:
    def observed(u: Tensor) -> None:
        own = rates()
        with pyro.plate("data", len(u)):
            v = pyro.sample("v", dist.Categorical(HALF))
            pyro.sample("u", dist.Poisson(own[v]), obs=u)

    surprise = vfe.FreeEnergy().decompose(observed, None, U).surprise
    assert vfe.FreeEnergy().decompose(pyro.condition(forgotten, data={"u": U}), None, U).surprise == surprise
    by_hand = -torch.logsumexp(dist.Poisson(rates().detach()[:, None]).log_prob(U), 0).sum() + 6 * torch.log(
        torch.tensor(2.0, dtype=torch.float64)
    )
    assert surprise.item() == pytest.approx(by_hand.item())


def with_factor(u: Tensor) -> None:
    own = rates()
    with pyro.plate("data", len(u)):
        v = pyro.sample("v", dist.Categorical(HALF))
        pyro.factor("u", dist.Poisson(own[v]).log_prob(u))


def with_missing(u: Tensor) -> None:
    own = rates()
    with pyro.plate("data", len(u)):
        v = pyro.sample("v", dist.Categorical(HALF))
        pyro.sample("u", dist.Poisson(own[v]), obs=u, obs_mask=u > 1)


def all_masked(u: Tensor) -> None:
    own = rates()
    with pyro.plate("data", len(u)), pyro.poutine.mask(mask=torch.zeros(len(u), dtype=torch.bool)):
        v = pyro.sample("v", dist.Categorical(HALF))
        pyro.sample("u", dist.Poisson(own[v]), obs=u)


def predicting_beside(u: Tensor) -> None:
    own = rates()
    with pyro.plate("data", len(u)):
        v = pyro.sample("v", dist.Categorical(HALF))
        pyro.sample("u", dist.Poisson(own[v]), obs=u)
        pyro.sample("next", dist.Poisson(own[v]))


def subsampled(u: Tensor) -> None:
    own = rates()
    with pyro.plate("data", len(u), subsample_size=3) as index:
        v = pyro.sample("v", dist.Categorical(HALF))
        pyro.sample("u", dist.Poisson(own[v]), obs=u[index])


def observed_chain(u: Tensor) -> None:
    transition = pyro.param("transition", torch.stack([HALF, HALF]), constraint=constraints.simplex)
    with pyro.plate("time", len(u), dim=-1):
        pyro.sample("z", vfe.MarkovChain(HALF, transition, num_steps=len(u)), obs=(u > 5).long())


@pytest.mark.parametrize(
    "model",
    [
        with_factor,
        with_missing,
        all_masked,
        predicting_beside,
        subsampled,
        observed_chain,
        pyro.condition(forgotten, data={"u": U}),
    ],
)
def test_what_does_observe_draws_no_warning(model: Any) -> None:
    elbo = vfe.FreeEnergy(strict_enumeration_warning=False)
    elbo.decompose(model, None, U)
    vfe.fit(model, None, U, optim=adam(), num_steps=2, elbo=elbo, **QUIET)


def test_a_prior_that_a_guide_approximates_draws_no_warning() -> None:
    def prior() -> None:
        a = pyro.sample("a", dist.Bernoulli(torch.tensor(0.3, dtype=torch.float64)))
        pyro.sample("b", dist.Bernoulli(torch.tensor([0.1, 0.8], dtype=torch.float64)[a.long()]))

    terms = vfe.FreeEnergy().decompose(prior, vfe.AutoMeanField(prior))
    p = torch.tensor([[0.7 * 0.9, 0.7 * 0.1], [0.3 * 0.2, 0.3 * 0.8]], dtype=torch.float64)
    assert terms.free_energy.item() == pytest.approx((0.25 * (0.25 / p).log()).sum().item())  # KL(Q || P), Q uniform


def test_an_automatic_guide_hides_no_forgotten_obs() -> None:
    def emitting(u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            v = pyro.sample("v", dist.Bernoulli(HALF[0]))
            pyro.sample("emission", dist.Bernoulli(0.1 + 0.8 * v))

    for guide in (vfe.AutoMeanField(emitting), vfe.AutoStructured(emitting)):
        with pytest.warns(VFEWarning, match="Nothing reads site emission"):
            vfe.FreeEnergy().decompose(emitting, guide, U)


def test_explain_says_that_nothing_reads_a_site_and_that_nothing_is_observed() -> None:
    said = str(vfe.explain(forgotten, None, U))
    assert "read by nothing: it integrates to 1 (Poisson)" in said
    assert "the model observes nothing: log p(u) = 0" in said
    assert "observes nothing" not in str(vfe.explain(predicting_beside, None, U))


def test_programs_without_sites_are_explained() -> None:
    assert str(vfe.explain(lambda u: None, None, U)) == "The programs have no sample sites."


def test_a_model_is_said_once_to_observe_nothing() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        partial(vfe.fit, forgotten, None, U, optim=adam(), num_steps=60, **QUIET)()
    assert len([one for one in said if "observes nothing" in str(one.message)]) == 1
