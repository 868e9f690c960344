"""What would not fit is drawn: F stays an unbiased estimate, its gradient too, and the result says so."""

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vfe as vfe
from pyro_vfe.energy.free_energy import surrogate_loss
from pyro_vfe.errors import CostError, VFEError, VFEWarning
from pyro_vfe.program.programs import Programs

Program = Callable[..., Any]

U = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
TOP = torch.tensor([[1.0, -2.0, 0.5], [0.3, 1.1, -0.7]], dtype=torch.float64)
DOWN = torch.tensor([[0.4, -1.0, 2.0], [1.5, 0.2, -0.6], [-0.8, 0.9, 0.1]], dtype=torch.float64)


def net(u: Tensor) -> None:
    """Two binary layers above the data."""
    with pyro.plate("data", len(u)):
        top = pyro.sample("top", dist.Bernoulli(logits=torch.zeros(2, dtype=torch.float64)).to_event(1))
        mid = pyro.sample("mid", dist.Bernoulli(logits=top @ TOP).to_event(1))
        pyro.sample("u", dist.Bernoulli(logits=mid @ DOWN).to_event(1), obs=u)


def recognition(u: Tensor) -> None:
    up = pyro.param("up", torch.full((3, 3), 0.2, dtype=torch.float64))
    back = pyro.param("back", torch.tensor([[0.1, -0.4], [0.5, 0.3], [-0.2, 0.2]], dtype=torch.float64))
    with pyro.plate("data", len(u)):
        mid = pyro.sample("mid", dist.Bernoulli(logits=u @ up).to_event(1))
        pyro.sample("top", dist.Bernoulli(logits=mid @ back).to_event(1))


def sampling(max_bytes: float, **options: Any) -> vfe.FreeEnergy:
    return vfe.FreeEnergy(on_cost="sample", max_bytes=max_bytes, strict_enumeration_warning=False, **options)


TOO_SMALL = 200.0
"""Bytes that hold the tables of two data with four values of 'top', and not with eight of 'mid' besides."""


def test_by_default_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(CostError, match="'mid'"):
        vfe.FreeEnergy(max_bytes=TOO_SMALL).loss(net, recognition, U)


def test_what_fits_is_not_drawn() -> None:
    exact = vfe.FreeEnergy().decompose(net, recognition, U)
    found = vfe.FreeEnergy(on_cost="sample").decompose(net, recognition, U)
    assert found.exact
    assert found.free_energy == exact.free_energy


def test_a_warning_names_what_is_drawn_and_comes_once() -> None:
    elbo = sampling(TOO_SMALL)
    with pytest.warns(VFEWarning, match="'mid'.*drawn from the guide"):
        elbo.loss(net, recognition, U)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        elbo.loss(net, recognition, U)


@pytest.mark.filterwarnings("ignore:Summing all latents")
@pytest.mark.parametrize("vectorize", [False, True])
def test_the_mean_of_sampled_losses_is_the_exact_one(vectorize: bool) -> None:
    pyro.set_rng_seed(0)
    exact = vfe.FreeEnergy().loss(net, recognition, U)
    elbo = sampling(TOO_SMALL, num_particles=400, vectorize_particles=vectorize)
    found = elbo.decompose(net, recognition, U)
    assert not found.exact
    assert found.stderr is not None
    assert 0 < found.stderr < 1
    assert abs(found.free_energy - exact) < 4 * found.stderr
    assert abs(elbo.loss(net, recognition, U) - exact) < 4 * found.stderr


@pytest.mark.filterwarnings("ignore:Summing all latents")
def test_a_drawn_surprise_is_an_upper_bound_in_the_mean_and_f_still_splits() -> None:
    pyro.set_rng_seed(0)
    exact = vfe.FreeEnergy().decompose(net, recognition, U)
    found = sampling(TOO_SMALL, num_particles=400).decompose(net, recognition, U)
    assert exact.surprise < found.surprise < exact.free_energy
    torch.testing.assert_close(found.surprise + found.gap, found.free_energy)


@pytest.mark.filterwarnings("ignore:Summing all latents")
def test_no_more_is_drawn_than_it_takes() -> None:
    found = sampling(TOO_SMALL).decompose(net, recognition, U)
    assert {name for (_, name), site in found.runs[0].sites.items() if site.kind == "sampled"} == {"mid"}
    assert found.runs[0].supports.keys() == {"top"}


@pytest.mark.filterwarnings("ignore:Summing all latents")
def test_a_layer_too_wide_to_list_is_drawn() -> None:
    def wide(u: Tensor) -> None:
        v = pyro.sample("v", dist.Bernoulli(torch.full((40,), 0.5)).to_event(1))
        pyro.sample("u", dist.Normal(v.sum(-1), 1.0), obs=u)

    def guide(u: Tensor) -> None:
        pyro.sample("v", dist.Bernoulli(logits=pyro.param("logits", torch.zeros(40))).to_event(1))

    pyro.set_rng_seed(0)
    with pytest.raises(CostError, match="'v' has 2 to the power 40"):
        vfe.FreeEnergy().loss(wide, guide, torch.tensor(20.0))
    # Q is the prior, so F is the expected cost of the data: v's sum has mean 20 and variance 10.
    elbo = sampling(1e9, num_particles=2000, vectorize_particles=True)
    expected = 0.5 * torch.log(torch.tensor(2 * torch.pi)) + 0.5 * 10
    assert abs(elbo.loss(wide, guide, torch.tensor(20.0)) - expected) < 4 * (2 * 10**2 / 4 / 2000) ** 0.5


def test_latents_that_the_guide_lacks_cannot_be_drawn() -> None:
    def wide(u: Tensor) -> None:
        v = pyro.sample("v", dist.Bernoulli(torch.full((40,), 0.5)).to_event(1))
        pyro.sample("u", dist.Normal(v.sum(-1), 1.0), obs=u)

    with pytest.raises(CostError, match="a site of that name in the guide"):
        vfe.FreeEnergy(on_cost="sample").loss(wide, None, torch.tensor(20.0))


def test_on_cost_is_one_of_two() -> None:
    with pytest.raises(VFEError, match="on_cost='draw'"):
        vfe.FreeEnergy(on_cost="draw")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:Summing all latents")
def test_a_grid_is_drawn_until_the_rest_fits() -> None:
    side = 5
    u = torch.linspace(-1, 1, side * side, dtype=torch.float64)

    def grid(u: Tensor) -> None:
        z: dict[tuple[int, int], Tensor] = {}
        for i, j in itertools.product(range(side), repeat=2):
            above, left = z.get((i - 1, j), torch.tensor(0.5)), z.get((i, j - 1), torch.tensor(0.5))
            z[i, j] = pyro.sample(f"z_{i}_{j}", dist.Bernoulli(logits=above + left - 1.0))
            pyro.sample(f"u_{i}_{j}", dist.Normal(z[i, j].double(), 1.0), obs=u[i * side + j])

    pyro.set_rng_seed(0)
    guide = vfe.AutoMeanField(grid)
    exact = vfe.FreeEnergy().decompose(grid, guide, u)
    found = sampling(1200, num_particles=60).decompose(grid, guide, u)
    assert found.stderr is not None
    assert abs(found.free_energy - exact.free_energy) < 4 * found.stderr
    drawn = {name for (_, name), site in found.runs[0].sites.items() if site.kind == "sampled"}
    assert 0 < len(drawn) < side * side / 2


RATES = torch.tensor([1.0, 4.0], dtype=torch.float64)
COUNTS = torch.tensor([1.0, 5.0, 3.0], dtype=torch.float64)


def hidden_chain(u: Tensor) -> None:
    transition = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
    with pyro.plate("time", len(u)):
        z = pyro.sample("z", vfe.MarkovChain(torch.ones(2, dtype=torch.float64) / 2, transition))
        pyro.sample("u", dist.Poisson(RATES[z]), obs=u)


def chain_guide(u: Tensor, drawn: bool) -> None:
    initial = pyro.param("initial", torch.tensor([0.3, -0.2], dtype=torch.float64))
    transition = pyro.param("transition", torch.tensor([[0.5, -0.3], [0.1, 0.9]], dtype=torch.float64))
    with pyro.plate("time", len(u)):
        chain = vfe.MarkovChain(initial.softmax(-1), transition.softmax(-1))
        pyro.sample("z", chain, infer={"enumerate": None} if drawn else {})


def gradient_of(loss: Tensor) -> Tensor:
    leaves = [pyro.get_param_store()._params[name] for name in ("initial", "transition")]
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, leaves)])


def test_the_gradient_of_a_drawn_chain_counts_what_comes_later() -> None:
    """The mean over all draws, with their probabilities, is the exact gradient."""
    exact = gradient_of(vfe.FreeEnergy().differentiable_loss(hidden_chain, lambda u: chain_guide(u, False), COUNTS))
    total = torch.zeros(6, dtype=torch.float64)

    def guide(u: Tensor) -> None:
        chain_guide(u, True)

    for states in itertools.product(range(2), repeat=3):
        z = torch.tensor(states)
        run = Programs().enumerate(hidden_chain, guide, (COUNTS,), {}, given={"z": z})
        weight = pyro.poutine.trace(pyro.poutine.condition(guide, {"z": z})).get_trace(COUNTS).log_prob_sum().exp()
        total += weight.detach() * gradient_of(surrogate_loss([run]))
    torch.testing.assert_close(total, exact)
