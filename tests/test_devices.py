"""On CUDA as on the CPU: the same loss, gradients, terms and posterior. Tables live where the programs put them."""

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import TERMS
from programs.case import empty, noise
from torch import Tensor
from torch.distributions import constraints

import pyro_vfe as vfe
from pyro_vfe.errors import VFEError, VFEWarning

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:.*CUDA.*:UserWarning"),
]


@pytest.fixture(autouse=True)
def default_device() -> Iterator[None]:
    """Puts torch's default device back to the CPU."""
    yield
    torch.set_default_device("cpu")


def on(device: str, *shape: int, seed: int) -> Tensor:
    return noise(*shape, seed=seed).to(device)


def probs(name: str, device: str, *shape: int, seed: int) -> Tensor:
    return pyro.param(name, lambda: on(device, *shape, seed=seed).softmax(-1), constraint=constraints.simplex)


def mixture(device: str) -> None:
    g = pyro.sample("g", dist.Categorical(probs("g_probs", device, 3, seed=1)))
    with pyro.plate("data", 5, device=device):
        z = pyro.sample("z", dist.Categorical(probs("z_probs", device, 3, 2, seed=2)[g]))
        means = pyro.param("means", lambda: on(device, 2, seed=3))
        pyro.sample("u", dist.Normal(means[z], on(device, seed=3).exp()), obs=on(device, 5, seed=4))


def mixture_guide(device: str) -> None:
    pyro.sample("g", dist.Categorical(probs("q_g", device, 3, seed=5)))


def chain(device: str) -> None:
    transition, means = probs("transition", device, 3, 3, seed=1), pyro.param("means", lambda: on(device, 3, seed=2))
    z = pyro.sample("z_0", dist.Categorical(transition[0]))
    for t in range(16):
        z = z if t == 0 else pyro.sample(f"z_{t}", dist.Categorical(transition[z]))
        pyro.sample(f"u_{t}", dist.Normal(means[z], torch.ones((), device=device)), obs=on(device, 16, seed=3)[t])


def chain_guide(device: str) -> None:
    table = probs("q", device, 16, 3, seed=4)
    for t in range(16):
        pyro.sample(f"z_{t}", dist.Categorical(table[t]))


def branch(device: str) -> None:
    a = pyro.sample("a", dist.Bernoulli(probs("a_probs", device, 2, seed=1)[1]))
    if a:
        b = pyro.sample("b", dist.Categorical(probs("b_probs", device, 3, seed=2)))
        pyro.sample("u", dist.Normal(on(device, 3, seed=3)[b], 1.0), obs=on(device, seed=4))
    else:
        pyro.sample("u", dist.Normal(on(device, seed=5), 1.0), obs=on(device, seed=4))


def branch_guide(device: str) -> None:
    pyro.sample("a", dist.Bernoulli(probs("q_a", device, 2, seed=6)[1]))


def bits(device: str) -> None:
    z = pyro.sample("z", dist.Bernoulli(probs("z_probs", device, 3, seed=1)).to_event(1))
    b = pyro.sample("b", dist.Binomial(2, probs("b_probs", device, 2, seed=2)[0]))
    hot = pyro.sample("hot", dist.OneHotCategorical(probs("hot_probs", device, 3, seed=3)))
    mask = torch.tensor([True, False, True], device=device)
    with pyro.plate("data", 3, device=device), pyro.poutine.mask(mask=mask):
        pyro.sample("u", dist.Normal((z * hot).sum(-1) + b, 1.0), obs=on(device, 3, seed=4))


PROGRAMS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "mixture": (mixture, empty),
    "mixture_guided": (mixture, mixture_guide),
    "chain": (chain, empty),
    "chain_guided": (chain, chain_guide),
    "branch": (branch, empty),
    "branch_guided": (branch, branch_guide),
    "bits": (bits, empty),
}


def on_both(compute: Callable[[str], Any]) -> tuple[Any, Any]:
    """What a computation gives on the CPU and on CUDA, each from fresh parameters."""
    results = []
    for device in ("cpu", "cuda"):
        pyro.clear_param_store()
        results.append(compute(device))
    return results[0], results[1]


def same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, check_device=False)


@pytest.mark.parametrize("name", PROGRAMS)
def test_loss_and_gradients_are_those_of_the_CPU(name: str) -> None:
    def compute(device: str) -> tuple[float, dict[str, Tensor]]:
        loss = vfe.FreeEnergy(check="always").loss_and_grads(*PROGRAMS[name], device)
        leaves = dict(pyro.get_param_store().named_parameters())
        assert all(leaf.grad is None or leaf.grad.device.type == device for leaf in leaves.values())
        return loss, {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}

    (loss, grads), (cuda_loss, cuda_grads) = on_both(compute)
    assert cuda_loss == pytest.approx(loss, rel=1e-10)
    assert cuda_grads.keys() == grads.keys()
    for key, grad in grads.items():
        same(cuda_grads[key], grad)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_decomposition_is_that_of_the_CPU(name: str) -> None:
    terms, cuda_terms = on_both(lambda device: vfe.FreeEnergy().decompose(*PROGRAMS[name], device))
    for term in TERMS:
        same(getattr(cuda_terms, term), getattr(terms, term))
    assert str(cuda_terms) == str(terms)
    assert cuda_terms.to_xarray().equals(cuda_terms.to_xarray())
    shares, cuda_shares = terms.gap_by_site(), cuda_terms.gap_by_site()
    assert shares.keys() == cuda_shares.keys()
    for site, share in shares.items():
        same(cuda_shares[site], share)


@pytest.mark.parametrize("name", ["mixture", "chain", "branch", "bits"])
def test_a_posterior_is_that_of_the_CPU(name: str) -> None:
    exact, cuda = on_both(lambda device: vfe.posterior(PROGRAMS[name][0], device))
    same(cuda.log_evidence, exact.log_evidence)
    same(cuda.entropy(), exact.entropy())
    for site, probabilities in exact.marginals().items():
        same(cuda.marginal(site), probabilities)
    same(cuda.mode(), exact.mode())
    same(cuda.log_prob(cuda.mode()), exact.log_prob(exact.mode()))
    draws = cuda.sample(50)
    same(cuda.log_prob(draws), exact.log_prob({site: value.cpu() for site, value in draws.items()}))


def test_marginals_and_posterior_runs_are_on_the_device() -> None:
    exact, cuda = on_both(lambda device: vfe.FreeEnergy().compute_marginals(mixture, mixture_guide, device))
    same(cuda["z"].probs, exact["z"].probs)
    assert cuda["z"].probs.device.type == "cuda"
    pyro.clear_param_store()
    assert vfe.FreeEnergy().sample_posterior(mixture, mixture_guide, "cuda") is None


@pytest.mark.parametrize("init", ["uniform", "posterior"])
def test_the_mean_field_guide_follows_the_models_device(init: Any) -> None:
    def compute(device: str) -> Tensor:
        guide = vfe.AutoMeanField(chain, init=init)
        loss = vfe.FreeEnergy().differentiable_loss(chain, guide, device)
        assert guide.logits.z_0.device.type == device
        return loss.detach()

    loss, cuda_loss = on_both(compute)
    same(cuda_loss, loss)


def test_the_default_device_may_be_CUDA() -> None:
    def compute(device: str) -> float:
        torch.set_default_device(device)
        return vfe.FreeEnergy().loss(mixture, mixture_guide, device)

    loss, cuda_loss = on_both(compute)
    assert cuda_loss == pytest.approx(loss, rel=1e-10)


def test_the_random_stream_of_the_device_stays_where_it_was() -> None:
    elbo, found = vfe.FreeEnergy(), []
    for _ in range(2):
        pyro.set_rng_seed(3)
        elbo.loss(branch, branch_guide, "cuda")
        found.append(torch.rand((), device="cuda").item())
    assert found[0] == found[1]


def test_sampled_latents_on_the_device_average_to_the_CPU() -> None:
    def model(device: str) -> None:
        w = pyro.sample("w", dist.Normal(on(device, seed=1), 1.0))
        z = pyro.sample("z", dist.Bernoulli(torch.sigmoid(w)))
        pyro.sample("u", dist.Normal(w + z, 1.0), obs=on(device, seed=2))

    def guide(device: str) -> None:
        pyro.sample("w", dist.Normal(on(device, seed=3), torch.ones((), device=device)))

    elbo = vfe.FreeEnergy(num_particles=20_000, vectorize_particles=True)
    loss, cuda_loss = on_both(lambda device: elbo.loss(model, guide, device))
    spread = vfe.FreeEnergy(num_particles=50).decompose(model, guide, "cpu").stderr.item() * 50**0.5
    assert abs(loss - cuda_loss) < 5 * spread * (2 / 20_000) ** 0.5


def test_errors_name_the_site_there_too() -> None:
    def model(device: str) -> None:
        z = pyro.sample("z", dist.Categorical(torch.ones(2, device=device) / 2))
        table = torch.tensor([[1.0, 0.0], [1.0, 0.0]], device=device)
        pyro.sample("u", dist.Categorical(table[z]), obs=torch.tensor(1, device=device))

    with pytest.raises(VFEError, match="'u'"):
        vfe.FreeEnergy().loss(model, empty, "cuda")


@pytest.mark.parametrize("name", ["mixture", "chain"])
def test_EM_goes_the_way_of_the_CPU(name: str) -> None:
    def compute(device: str) -> tuple[Tensor, Any]:
        with pytest.warns(VFEWarning, match="max_iter=3"):
            run = vfe.EM(PROGRAMS[name][0], check="always").run(device, max_iter=3, progress_bar=False)
        assert all(value.device.type == device for value in run.params.values())
        return torch.tensor(run.history.free_energy), dict(run.params)

    (path, params), (cuda_path, cuda_params) = on_both(compute)
    same(cuda_path, path)
    for key, value in params.items():
        same(cuda_params[key], value)
