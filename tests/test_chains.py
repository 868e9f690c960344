"""A chain as one site against the same chain as a Python loop, and what users ask of chains."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs.case import categorical, empty, noise, positive, simplex, tensor
from programs.chains import chain as loop
from programs.markov_chains import changing_chain_guide as chain_guide
from programs.markov_chains import hidden_markov as chain
from recursions import forward_recursion
from torch import Tensor

import pyro_vfe as vfe
from pyro_vfe.errors import PlateKeptError, StructureError

close = torch.testing.assert_close
COUNTS = tensor([1.0, 4.0, 2.0, 7.0, 3.0, 0.0, 5.0, 2.0, 2.0, 6.0])


def loop_guide(counts: Tensor) -> None:
    transition = simplex("q_steps", len(counts) - 1, 3, 3, seed=6)
    z: Any = None
    for t in range(len(counts)):
        z = categorical(f"z_{t}", simplex("q_initial", 3, seed=4) if z is None else transition[t - 1, z])


def gradients(model: Callable[..., None], guide: Callable[..., None]) -> tuple[float, dict[str, Tensor]]:
    pyro.clear_param_store()
    loss = vfe.FreeEnergy().loss_and_grads(model, guide, COUNTS)
    named = pyro.get_param_store().named_parameters()
    return loss, {name: parameter.grad.clone() for name, parameter in named}


@pytest.mark.parametrize("guided", [False, True])
def test_a_chain_and_a_loop_have_the_same_loss_and_gradients(guided: bool) -> None:
    one, own = gradients(chain, chain_guide if guided else empty)
    other, theirs = gradients(loop, loop_guide if guided else empty)
    assert one == pytest.approx(other, rel=1e-12)
    assert own.keys() == theirs.keys()
    for name in own:
        close(own[name], theirs[name], rtol=1e-10, atol=1e-10)


def test_a_chain_and_a_loop_have_the_same_terms() -> None:
    elbo = vfe.FreeEnergy()
    one, other = elbo.decompose(chain, chain_guide, COUNTS), elbo.decompose(loop, loop_guide, COUNTS)
    for term in ("free_energy", "surprise", "gap", "energy", "entropy", "accuracy", "complexity"):
        close(getattr(one, term), getattr(other, term), rtol=1e-12, atol=1e-12)


def test_a_chain_and_a_loop_have_the_same_posterior() -> None:
    one, other = vfe.posterior(chain, COUNTS), vfe.posterior(loop, COUNTS)
    close(one.log_evidence, other.log_evidence)
    close(one.entropy(), other.entropy())
    close(one.marginal("z"), torch.stack([other.marginal(f"z_{t}") for t in range(len(COUNTS))]))
    close(one.log_prob(one.mode()), other.log_prob(other.mode()))
    apart = {f"z_{t}": value for t, value in enumerate(one.mode()["z"])}
    close(one.log_prob(one.mode()), other.log_prob(apart))


def test_samples_of_a_chain_have_its_marginals_and_its_transitions() -> None:
    torch.manual_seed(0)
    size = 20_000
    found = vfe.posterior(chain, COUNTS)
    z = found.sample(size)["z"]
    assert z.shape == (size, len(COUNTS))
    frequencies = torch.nn.functional.one_hot(z, 3).double().mean(0)
    close(frequencies, found.marginal("z"), rtol=0, atol=5 / size**0.5)
    close(found.log_prob({"z": z}).mean(), -found.entropy(), rtol=0.02, atol=0)


def test_a_long_chain_has_the_evidence_of_the_forward_recursion() -> None:
    counts = torch.poisson(3 * torch.ones(3_000, dtype=torch.float64), generator=torch.Generator().manual_seed(0))
    evidence = vfe.posterior(chain, counts).log_evidence
    initial, transition = simplex("initial", 3).detach(), simplex("transition", 3, 3, seed=1).detach()
    emissions = dist.Poisson(positive("rates", 3, seed=2)).log_prob(counts[:, None]).detach()
    close(evidence, forward_recursion(initial, transition, emissions))


def test_the_chain_of_a_guide_that_is_the_posterior_leaves_no_gap() -> None:
    initial, transition = tensor([0.6, 0.4]), tensor([[0.7, 0.3], [0.2, 0.8]])

    def prior() -> None:
        with pyro.plate("time", 5):
            pyro.sample("z", vfe.MarkovChain(initial, transition))

    assert abs(float(vfe.FreeEnergy().decompose(prior, prior).gap)) < 1e-12


def test_shares_of_the_gap_of_chains_add_up() -> None:
    def classes(counts: Tensor) -> None:
        c = categorical("c", tensor([0.5, 0.5]))
        with pyro.plate("time", len(counts)):
            z = pyro.sample("z", vfe.MarkovChain(simplex("initial", 2), simplex("transition", 2, 2, 2)[c]))
            pyro.sample("u", dist.Poisson(positive("rates", 2, seed=2)[z]), obs=counts)

    def guide(counts: Tensor) -> None:
        categorical("c", simplex("q_c", 2, seed=3))
        with pyro.plate("time", len(counts)):
            pyro.sample("z", vfe.MarkovChain(simplex("q_0", 2, seed=4), simplex("q", 2, 2, seed=5)))

    terms = vfe.FreeEnergy().decompose(classes, guide, COUNTS)
    shares = terms.gap_by_site()
    assert shares.keys() == {"c", "z"}
    close(sum(shares.values()), terms.gap)


def test_mean_field_of_a_chain_starts_at_its_marginals() -> None:
    guide = vfe.AutoMeanField(chain, init="posterior")
    with torch.no_grad():
        vfe.FreeEnergy().loss(chain, guide, COUNTS)
    close(vfe.posterior(guide, COUNTS).marginal("z"), vfe.posterior(chain, COUNTS).marginal("z"), rtol=1e-6, atol=1e-6)


def test_a_draw_inside_the_steps_of_a_chain_is_summed_over_its_states() -> None:
    """Each w_t is drawn per state; F is then the mean over z and w of what Q and P differ by."""
    torch.manual_seed(1)

    def model(data: Tensor) -> None:
        with pyro.plate("time", len(data)):
            z = pyro.sample("z", vfe.MarkovChain(tensor([0.6, 0.4]), tensor([[0.7, 0.3], [0.2, 0.8]])))
            w = pyro.sample("w", dist.Normal(2.0 * z, 1.0))
            pyro.sample("u", dist.Normal(w, 1.0), obs=data)

    def guide(data: Tensor) -> None:
        with pyro.plate("time", len(data)):
            z = pyro.sample("z", vfe.MarkovChain(tensor([0.5, 0.5]), tensor([[0.6, 0.4], [0.3, 0.7]])))
            pyro.sample("w", dist.Normal(2.0 * z, 1.0))

    def expected_energy(data: Tensor) -> Tensor:
        q = vfe.MarkovChain(tensor([0.5, 0.5]), tensor([[0.6, 0.4], [0.3, 0.7]]), num_steps=len(data))
        p = vfe.MarkovChain(tensor([0.6, 0.4]), tensor([[0.7, 0.3], [0.2, 0.8]]), num_steps=len(data))
        square = (data[:, None] - tensor([0.0, 2.0])) ** 2 + 1
        likelihood = -0.5 * square - 0.5 * torch.log(torch.tensor(2 * torch.pi))
        return torch.distributions.kl_divergence(q, p).sum() - (q.marginals() * likelihood).sum()

    data = tensor([0.3, 1.9, 2.2, -0.4])
    elbo = vfe.FreeEnergy(num_particles=4_000, vectorize_particles=True)
    assert elbo.loss(model, guide, data) == pytest.approx(float(expected_energy(data)), abs=0.15)
    with pytest.raises(StructureError, match="'z' is a chain"):
        vfe.FreeEnergy().decompose(model, guide, data)


def test_the_time_plate_has_no_terms_of_its_own_and_says_so() -> None:
    terms = vfe.FreeEnergy().decompose(chain, chain_guide, COUNTS)
    with pytest.raises(PlateKeptError, match="'time'"):
        terms.by("time")


def test_hmmlearn_gives_the_same_evidence_and_marginals() -> None:
    hmmlearn = pytest.importorskip("hmmlearn.hmm")
    symbols = torch.randint(0, 4, (60,), generator=torch.Generator().manual_seed(0))
    initial, transition = noise(3, seed=1).softmax(-1), noise(3, 3, seed=2).softmax(-1)
    emission = noise(3, 4, seed=3).softmax(-1)

    def model() -> None:
        with pyro.plate("time", len(symbols)):
            z = pyro.sample("z", vfe.MarkovChain(initial, transition))
            pyro.sample("x", dist.Categorical(emission[z]), obs=symbols)

    peer = hmmlearn.CategoricalHMM(3, n_features=4)
    peer.startprob_, peer.transmat_, peer.emissionprob_ = initial.numpy(), transition.numpy(), emission.numpy()
    evidence, marginals = peer.score_samples(symbols.numpy()[:, None])
    found = vfe.posterior(model)
    assert float(found.log_evidence) == pytest.approx(evidence, rel=1e-10)
    close(found.marginal("z"), torch.as_tensor(marginals), rtol=1e-9, atol=1e-12)
