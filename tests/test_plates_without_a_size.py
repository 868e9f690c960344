"""`pyro.plate("data")` without a size is as long as the sites in it, in guide and model alike."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import Tensor, tensor

import pyro_vfe as vfe
from pyro_vfe.errors import StructureError

LOC = tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
START = tensor([0.2, 0.3, 0.5], dtype=torch.float64)
STEPS = torch.softmax(torch.arange(9, dtype=torch.float64).reshape(3, 3).sin(), -1)


@pytest.fixture(autouse=True)
def _clean() -> None:
    pyro.clear_param_store()
    pyro.set_rng_seed(3)


def _no_guide(*args: Any) -> None:
    """Leaves all to the model."""


def _data(n: int) -> Tensor:
    return torch.linspace(-2.0, 3.0, n, dtype=torch.float64)


def _weights() -> Tensor:
    return pyro.param("weights", START, constraint=dist.constraints.simplex)


def _beliefs(n: int) -> Tensor:
    start = torch.softmax(torch.arange(n * 3, dtype=torch.float64).reshape(n, 3).sin(), -1)
    return pyro.param(f"beliefs_{n}", start, constraint=dist.constraints.simplex)


def _mixture(x: Tensor) -> None:
    w = _weights()
    with pyro.plate("data"):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(LOC[z], 1.0), obs=x)


def _mixture_guide(x: Tensor) -> None:
    with pyro.plate("data"):
        pyro.sample("z", dist.Categorical(_beliefs(len(x))))


def test_a_mixture_with_a_guide() -> None:
    energy = vfe.FreeEnergy()
    for n in (5, 5, 8):
        x = _data(n)
        w, q = _weights(), _beliefs(n)
        joint = w.log() + dist.Normal(LOC, 1.0).log_prob(x[:, None])
        expected = (q * (q.log() - joint)).sum()
        leaves = [pyro.param(name).unconstrained() for name in ("weights", f"beliefs_{n}")]
        loss = energy.differentiable_loss(_mixture, _mixture_guide, x)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves))
        parts = energy.decompose(_mixture, _mixture_guide, x)
        assert float(parts.surprise) == pytest.approx(-joint.logsumexp(-1).sum().item())
        assert parts.by("data").free_energy.shape == (n,)
        torch.testing.assert_close(parts.posterior_marginals()["z"], joint.softmax(-1).detach())


def test_a_latent_that_reads_another_latent_of_the_plate() -> None:
    x = _data(4)

    def model(x: Tensor) -> None:
        with pyro.plate("data"):
            a = pyro.sample("a", dist.Categorical(START))
            b = pyro.sample("b", dist.Categorical(STEPS[a]))
            pyro.sample("x", dist.Normal(LOC[b], 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data"):
            a = pyro.sample("a", dist.Categorical(_beliefs(4)))
            pyro.sample("b", dist.Categorical(STEPS.T[a] / STEPS.T[a].sum(-1, keepdim=True)))

    joint = (START[:, None] * STEPS).log() + dist.Normal(LOC, 1.0).log_prob(x[:, None, None])
    q = _beliefs(4)[:, :, None] * (STEPS.T / STEPS.T.sum(-1, keepdim=True))
    assert vfe.FreeEnergy().loss(model, guide, x) == pytest.approx((q * (q.log() - joint)).sum().item())
    parts = vfe.FreeEnergy().decompose(model, guide, x)
    assert float(parts.surprise) == pytest.approx(-joint.logsumexp((-1, -2)).sum().item())


def _wide(x: Tensor, sized: bool) -> None:
    with pyro.plate("data", len(x)) if sized else pyro.plate("data"):
        z = pyro.sample("z", dist.Categorical(START.expand(len(x), 3)))
        pyro.sample("x", dist.Normal(LOC[z], 1.0), obs=x)


def test_without_a_guide_as_with_the_size() -> None:
    x = _data(4)
    joint = START.log() + dist.Normal(LOC, 1.0).log_prob(x[:, None])
    for sized in (False, True):
        found = vfe.posterior(_wide, x, sized)
        assert float(found.log_evidence) == pytest.approx(joint.logsumexp(-1).sum().item())
        torch.testing.assert_close(found.marginals()["z"], joint.softmax(-1))


def test_a_latent_before_the_data_is_one_of_each_element() -> None:
    """Its distribution has one batch element, and Pyro's enumeration has a latent for each datum."""

    def model(x: Tensor, where: str) -> None:
        if where == "outside":
            z = pyro.sample("z", dist.Categorical(_weights()))
        with pyro.plate("data", len(x)) if where == "sized" else pyro.plate("data"):
            if where != "outside":
                z = pyro.sample("z", dist.Categorical(_weights()))
            pyro.sample("x", dist.Normal(LOC[z], 1.0), obs=x)

    elbo, theirs = vfe.FreeEnergy(), TraceEnum_ELBO(max_plate_nesting=1)
    for n in (4, 4, 6, 4):
        x = _data(n)
        terms = START.log() + dist.Normal(LOC, 1.0).log_prob(x[:, None])
        shared = START.log() + dist.Normal(LOC, 1.0).log_prob(x[:, None]).sum(0)
        expected = -terms.logsumexp(-1)
        found = elbo.decompose(model, _no_guide, x, "inside")
        assert float(found.surprise) == pytest.approx(expected.sum().item(), rel=1e-12)
        torch.testing.assert_close(found.by("data").surprise, expected)
        assert theirs.loss(config_enumerate(model), _no_guide, x, "inside") == pytest.approx(expected.sum().item())
        posterior = vfe.posterior(model, x, "inside")
        torch.testing.assert_close(posterior.marginals()["z"], terms.softmax(-1))
        assert posterior.sample(3)["z"].shape == (3, n)
        sized, outside = (float(vfe.posterior(model, x, where).log_evidence) for where in ("sized", "outside"))
        assert sized == pytest.approx(-expected.sum().item())
        assert outside == pytest.approx(shared.logsumexp(-1).item())


def test_em_learns_a_mixture_in_a_plate_without_a_size() -> None:
    def model(x: Tensor, sized: bool) -> None:
        locs = pyro.param("locs", LOC)
        with pyro.plate("data", len(x)) if sized else pyro.plate("data"):
            z = pyro.sample("z", dist.Categorical(_weights()))
            pyro.sample("x", dist.Normal(locs[z], 1.0), obs=x)

    runs = []
    for sized in (True, False):
        pyro.clear_param_store()
        runs.append(vfe.EM(model).run(_data(9), sized, progress_bar=False, max_iter=400))
    assert runs[1].free_energy == pytest.approx(runs[0].free_energy, rel=1e-9)
    for name, value in runs[0].params.items():
        torch.testing.assert_close(runs[1].params[name], value, rtol=1e-6, atol=1e-6)


def test_nested_plates_without_sizes() -> None:
    x = torch.arange(6, dtype=torch.float64).reshape(3, 2)

    def model(x: Tensor) -> None:
        with pyro.plate("rows", dim=-2):
            z = pyro.sample("z", dist.Categorical(START.expand(3, 1, 3)))
            with pyro.plate("columns", dim=-1):
                pyro.sample("x", dist.Normal(LOC[z], 1.0), obs=x)

    joint = START.log() + dist.Normal(LOC, 1.0).log_prob(x[..., None]).sum(1)
    assert float(vfe.posterior(model, x).log_evidence) == pytest.approx(joint.logsumexp(-1).sum().item())


def test_two_sizes_are_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Categorical(START.expand(3, 3)))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=z.sum().double())

    said: Any = r"'data' has no size of its own, and site 'z' has 3 elements along its dim -1, site 'x' 4"
    with pytest.raises(StructureError, match=said):
        vfe.posterior(model, _data(4))
