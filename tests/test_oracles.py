"""The oracles against hand-made numbers, each other and, where it is exact, Pyro's TraceEnum_ELBO."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_log_prob import exact_log_prob, support_of
from oracles import TERMS, gradients, oracle
from pyro.infer import TraceEnum_ELBO, config_enumerate
from recursions import forward_recursion, ising_transfer_matrix
from torch import Tensor
from torch.distributions import constraints

COUNTS = torch.tensor([2.0, 5.0, 1.0], dtype=torch.float64)


def empty(*args: Any) -> None:
    """A guide without latents."""


def mixture(counts: Tensor) -> None:
    weights = pyro.param("weights", torch.tensor([0.2, 0.8]), constraint=constraints.simplex)
    rates = pyro.param("rates", torch.tensor([1.5, 4.0]), constraint=constraints.positive)
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("u", dist.Poisson(rates[z]), obs=counts)


def mixture_guide(counts: Tensor) -> None:
    probs = pyro.param("probs", torch.tensor([[0.3, 0.7], [0.1, 0.9], [0.6, 0.4]]), constraint=constraints.simplex)
    with pyro.plate("data", 3):
        pyro.sample("z", dist.Categorical(probs))


def chain(counts: Tensor) -> None:
    transition = pyro.param("transition", torch.tensor([[0.9, 0.1], [0.3, 0.7]]), constraint=constraints.simplex)
    rates = pyro.param("rates", torch.tensor([1.5, 4.0]), constraint=constraints.positive)
    z = torch.tensor(0)
    for t in pyro.markov(range(3)):
        z = pyro.sample(f"z_{t}", dist.Categorical(transition[z]))
        pyro.sample(f"u_{t}", dist.Poisson(rates[z]), obs=counts[t])


def chain_guide(counts: Tensor) -> None:
    logits = pyro.param("logits", torch.tensor([[0.3, -0.2], [0.1, 0.9], [0.6, 0.4]]))
    for t in pyro.markov(range(3)):
        pyro.sample(f"z_{t}", dist.Categorical(logits=logits[t]))


def global_over_local(counts: Tensor) -> None:
    g = pyro.sample("g", dist.Bernoulli(pyro.param("p", torch.tensor(0.3), constraint=constraints.unit_interval)))
    rates = pyro.param("rates", torch.tensor([1.5, 4.0]), constraint=constraints.positive)
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Bernoulli(0.2 + 0.5 * g))
        pyro.sample("u", dist.Poisson(rates[z.long()] + g), obs=counts)


def global_guide(counts: Tensor) -> None:
    pyro.sample("g", dist.Bernoulli(pyro.param("q", torch.tensor(0.6), constraint=constraints.unit_interval)))


PAIRS: dict[str, tuple[Callable[..., None], Callable[..., None]]] = {
    "mixture, summed out": (mixture, empty),
    "mixture, guided": (mixture, mixture_guide),
    "chain, summed out": (chain, empty),
    "chain, guided": (chain, chain_guide),
    "global and local, summed out": (global_over_local, empty),
    "global guided, local summed out": (global_over_local, global_guide),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_the_free_energy_and_its_gradients_are_those_of_TraceEnum_ELBO(pair: str) -> None:
    model, guide = PAIRS[pair]
    free_energy = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(
        config_enumerate(model), config_enumerate(guide), COUNTS
    )
    exact = oracle(model, guide, COUNTS)
    torch.testing.assert_close(exact.terms["free_energy"], free_energy, rtol=1e-12, atol=0)
    for name, gradient in gradients(free_energy).items():
        torch.testing.assert_close(exact.gradients()[name], gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pair", PAIRS)
def test_the_four_readings_agree_and_the_gap_is_not_negative(pair: str) -> None:
    terms = oracle(*PAIRS[pair], COUNTS).terms
    assert set(terms) == set(TERMS)
    for reading in (terms["energy"] - terms["entropy"], terms["complexity"] - terms["accuracy"]):
        torch.testing.assert_close(reading, terms["surprise"] + terms["gap"])
    assert terms["gap"] >= -1e-12


def test_a_mixture_has_the_surprise_of_its_closed_form() -> None:
    joint = torch.tensor([0.2, 0.8]).log() + dist.Poisson(torch.tensor([1.5, 4.0])).log_prob(COUNTS.unsqueeze(-1))
    exact = oracle(mixture, mixture_guide, COUNTS)
    torch.testing.assert_close(exact.terms["surprise"].detach(), -joint.logsumexp(-1).sum())
    torch.testing.assert_close(exact.posterior.marginal("z"), joint.softmax(-1))
    torch.testing.assert_close(exact.posterior.entropy(), dist.Categorical(logits=joint).entropy().sum())
    torch.testing.assert_close(exact.posterior.mode().values["z"], joint.argmax(-1))


@pytest.mark.parametrize("guide", [mixture_guide, empty])
def test_the_terms_of_each_datum_add_up_to_the_total(guide: Callable[..., None]) -> None:
    exact = oracle(mixture, guide, COUNTS)
    for name, by_datum in exact.by("data").items():
        assert by_datum.shape == (3,)
        torch.testing.assert_close(by_datum.sum(), exact.terms[name])


def test_the_scale_of_a_datum_weighs_its_log_evidence_under_each_global_value() -> None:
    scale = torch.tensor([2.0, 0.5, 1.5])

    def scaled(counts: Tensor) -> None:
        g = pyro.sample("g", dist.Bernoulli(0.3))
        with pyro.plate("data", 3), pyro.poutine.scale(scale=scale):
            z = pyro.sample("z", dist.Bernoulli(0.2 + 0.5 * g))
            pyro.sample("u", dist.Poisson(1 + 2 * z + g), obs=counts)

    def log_evidence(g: float) -> Tensor:
        off = math.log(0.8 - 0.5 * g) + dist.Poisson(torch.tensor(1.0 + g)).log_prob(COUNTS)
        on = math.log(0.2 + 0.5 * g) + dist.Poisson(torch.tensor(3.0 + g)).log_prob(COUNTS)
        return math.log(0.3 if g else 0.7) + (scale * torch.logaddexp(off, on)).sum()

    by_hand = -torch.logaddexp(log_evidence(0.0), log_evidence(1.0))
    exact = oracle(scaled, empty, COUNTS, scaled_plate="data")
    torch.testing.assert_close(exact.terms["surprise"], by_hand)
    torch.testing.assert_close(exact.terms["free_energy"], by_hand)


def test_a_run_that_branches_counts_each_path_once() -> None:
    def model() -> None:
        if pyro.sample("a", dist.Bernoulli(0.3)):
            pyro.sample("b", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))

    exact = oracle(model, empty)
    assert len(exact.model) == 4
    torch.testing.assert_close(exact.posterior.log_evidence, torch.tensor(0.0))


def test_an_auxiliary_site_is_summed_out_of_the_guide() -> None:
    def model() -> None:
        pyro.sample("z", dist.Bernoulli(0.3))

    def guide() -> None:
        a = pyro.sample("a", dist.Bernoulli(0.4), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Bernoulli(0.1 + 0.6 * a))

    on = 0.6 * 0.1 + 0.4 * 0.7
    by_hand = on * math.log(on / 0.3) + (1 - on) * math.log((1 - on) / 0.7)
    torch.testing.assert_close(oracle(model, guide).terms["free_energy"], torch.tensor(by_hand))


@pytest.mark.parametrize(
    "make",
    [
        lambda: dist.Categorical(torch.tensor([[0.0, 0.4, 0.6], [0.5, 0.5, 0.0]])),
        lambda: dist.Categorical(logits=torch.tensor([0.3, -1.0])).expand([2]),
        lambda: dist.OneHotCategorical(torch.tensor([0.0, 1.0])),
        lambda: dist.Bernoulli(torch.tensor([0.0, 1.0, 0.25])),
        lambda: dist.Bernoulli(logits=torch.tensor([0.3])),
        lambda: dist.Binomial(3, torch.tensor([0.0, 0.4, 1.0])),
        lambda: dist.Bernoulli(torch.tensor([0.2, 1.0])).to_event(1),
        lambda: dist.Categorical(torch.tensor([[0.2, 0.8], [1.0, 0.0]])).to_event(1).expand([3]),
    ],
)
def test_exact_probabilities_sum_to_one_over_the_support(make: Callable[[], Any]) -> None:
    fn = make()
    support = support_of(fn)
    values = support.reshape(len(support), *(1 for _ in fn.batch_shape), *fn.event_shape)
    probs = torch.stack([exact_log_prob(fn, value.expand(fn.batch_shape + fn.event_shape)) for value in values]).exp()
    torch.testing.assert_close(probs.sum(0), torch.ones(fn.batch_shape))
    assert not (probs == torch.finfo(probs.dtype).eps).any()


def test_the_forward_recursion_equals_the_joint_table() -> None:
    transition = torch.tensor([[0.9, 0.1], [0.3, 0.7]])
    log_likelihood = dist.Poisson(torch.tensor([1.5, 4.0])).log_prob(COUNTS.unsqueeze(-1))
    evidence = forward_recursion(transition[0], transition, log_likelihood)
    torch.testing.assert_close(-evidence, oracle(chain, empty, COUNTS).terms["surprise"].detach())


def test_the_transfer_matrix_equals_the_sum_over_all_spins() -> None:
    right, down, fields = torch.randn(3, 2), torch.randn(2, 3), torch.randn(3, 3)
    spins = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 9).reshape(-1, 3, 3)
    energies = (spins * fields).sum((1, 2)) + (spins[:, :, 1:] * spins[:, :, :-1] * right).sum((1, 2))
    energies = energies + (spins[:, 1:] * spins[:, :-1] * down).sum((1, 2))
    torch.testing.assert_close(ising_transfer_matrix(right, down, fields), energies.logsumexp(0))
