"""What torch is told outside of a call: no gradients, inference mode, autocast. Numbers are those without it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pyro_vfe as vfe
from pyro_vfe.errors import VFEError

U = torch.tensor([1.0, 0.0, 2.0, 9.0, 8.0, 12.0], dtype=torch.float64)
QUIET: dict[str, Any] = {"progress_bar": False}


def model(u: Tensor) -> None:
    start = torch.tensor([1.0, 9.0], dtype=torch.float64)
    rates = pyro.param("rates", start, constraint=constraints.positive)
    with pyro.plate("data", len(u)):
        v = pyro.sample("v", dist.Categorical(torch.ones(2, dtype=torch.float64) / 2))
        pyro.sample("u", dist.Poisson(rates[v]), obs=u)


def guide(u: Tensor) -> None:
    start = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    with pyro.plate("data", len(u)):
        q = pyro.param("q", torch.stack([1 - start, start], -1), constraint=constraints.simplex)
        pyro.sample("v", dist.Categorical(q))


def drawing(u: Tensor) -> None:
    with pyro.poutine.infer_config(config_fn=lambda site: {"enumerate": None}):
        guide(u)


def adam() -> Any:
    return pyro.optim.Adam({"lr": 0.05})


def stored() -> dict[str, list[float]]:
    return {name: value.detach().flatten().tolist() for name, value in pyro.get_param_store().items()}


def gradients(elbo: vfe.FreeEnergy, own_guide: Any, u: Tensor) -> Any:
    loss = elbo.loss_and_grads(model, own_guide, u)
    leaves = pyro.get_param_store()._params.items()
    return loss, {name: None if leaf.grad is None else leaf.grad.flatten().tolist() for name, leaf in leaves}


def steps_of_svi(u: Tensor) -> Any:
    svi = pyro.infer.SVI(model, guide, adam(), vfe.FreeEnergy())
    return [svi.step(u) for _ in range(3)], stored()


def run_of_em(u: Tensor, own_guide: Any = None, **options: Any) -> Any:
    run = vfe.EM(model, own_guide, **options).run(u, max_iter=3, tol=1e3, **QUIET)
    return run.history.free_energy.tolist(), stored()


def batches_of_em(u: Tensor, method: Any) -> Any:
    run = vfe.EM(model).run_batches(u.split(3), method=method, num_epochs=3, tol=1e3, **QUIET)
    return run.history.free_energy.tolist(), stored()


def single_phases(u: Tensor) -> Any:
    em = vfe.EM(model, guide, e_phase=vfe.Gradient(adam(), 2))
    return em.e_phase(u).free_energy, em.m_phase(u).free_energy, em.e_phase(u).free_energy, stored()


def run_of_fit(u: Tensor, own_guide: Any = guide) -> Any:
    run = vfe.fit(model, own_guide, u, optim=adam(), num_steps=3, **QUIET)
    return run.losses.tolist(), run.history.gap.tolist(), stored()


def run_of_wake_sleep(u: Tensor, **options: Any) -> Any:
    run = vfe.WakeSleep(model, guide, adam(), adam(), **options).run(u, num_steps=2, **QUIET)
    return run.losses.tolist(), run.history.free_energy.tolist(), stored()


def tree(u: Tensor) -> Any:
    found = vfe.to_datatree(model, guide, u, num_samples=3, **QUIET)
    return found["variational"]["gap"].values.tolist(), found["log_likelihood"]["u"].values.tolist()


def terms(u: Tensor) -> vfe.Decomposition:
    return vfe.FreeEnergy().decompose(model, guide, u)


def module_loss(u: Tensor) -> Any:
    return vfe.FreeEnergy()(model, guide)(u).item()


LEARNS: dict[str, Callable[[Tensor], Any]] = {
    "loss_and_grads": lambda u: gradients(vfe.FreeEnergy(), guide, u),
    "disarm": lambda u: gradients(vfe.FreeEnergy(gradient="disarm", strict_enumeration_warning=False), drawing, u),
    "vimco": lambda u: gradients(
        vfe.FreeEnergy(gradient="vimco", num_particles=3, strict_enumeration_warning=False), drawing, u
    ),
    "SVI": steps_of_svi,
    "EM": run_of_em,
    "EM, searched": lambda u: run_of_em(u, m_phase=vfe.Numerical()),
    "EM, by steps": lambda u: run_of_em(u, m_phase=vfe.Gradient(adam(), 2)),
    "EM, hard": lambda u: run_of_em(u, e_phase=vfe.Hard()),
    "EM of a mean field": lambda u: run_of_em(u, vfe.AutoMeanField(model)),
    "EM on batches": lambda u: batches_of_em(u, vfe.Incremental()),
    "EM online": lambda u: batches_of_em(u, vfe.Online()),
    "single phases": single_phases,
    "fit": run_of_fit,
    "fit of a mean field": lambda u: run_of_fit(u, vfe.AutoMeanField(model)),
    "wake-sleep": run_of_wake_sleep,
    "wake-sleep, reweighted": lambda u: run_of_wake_sleep(u, reweighted=True),
}

EVALUATES: dict[str, Callable[[Tensor], Any]] = {
    "loss": lambda u: vfe.FreeEnergy().loss(model, guide, u),
    "module": module_loss,
    "decompose": lambda u: terms(u).gap.item(),
    "by": lambda u: terms(u).by("data").gap.tolist(),
    "gap_by_site": lambda u: terms(u).gap_by_site()["v"].tolist(),
    "q_marginals": lambda u: terms(u).q_marginals()["v"].tolist(),
    "posterior_marginals": lambda u: terms(u).posterior_marginals()["v"].tolist(),
    "diagnose": lambda u: str(vfe.diagnose(terms(u))),
    "marginal": lambda u: vfe.posterior(model, u).marginal("v").tolist(),
    "marginals": lambda u: vfe.posterior(model, u).marginals()["v"].tolist(),
    "sample": lambda u: vfe.posterior(model, u).sample(3)["v"].tolist(),
    "mode": lambda u: vfe.posterior(model, u).mode()["v"].tolist(),
    "entropy": lambda u: vfe.posterior(model, u).entropy().item(),
    "compute_marginals": lambda u: vfe.FreeEnergy().compute_marginals(model, None, u)["v"].probs.tolist(),
    "bounds": lambda u: str(vfe.bounds(model, guide, u, num_particles=20)),
    "bounds of a dream": lambda u: str(vfe.bounds(model, guide, dream=vfe.dream(model, u), num_particles=20)),
    "explain": lambda u: str(vfe.explain(model, guide, u)),
    "to_datatree": tree,
    "AutoPosterior": lambda u: vfe.FreeEnergy().decompose(model, vfe.AutoPosterior(model), u).gap.item(),
    "AutoStructured": lambda u: vfe.FreeEnergy().decompose(model, vfe.AutoStructured(model), u).gap.item(),
}

EVERYTHING = {**LEARNS, **EVALUATES}


def anew(call: Callable[[Tensor], Any], u: Tensor) -> Any:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    return call(u)


@pytest.mark.parametrize("call", EVERYTHING)
def test_without_gradients_numbers_are_the_same(call: str) -> None:
    expected = anew(EVERYTHING[call], U)
    with torch.no_grad():
        assert anew(EVERYTHING[call], U) == expected


@pytest.mark.parametrize("call", EVERYTHING)
def test_in_inference_mode_numbers_are_the_same(call: str) -> None:
    expected = anew(EVERYTHING[call], U)
    with torch.inference_mode():
        assert anew(EVERYTHING[call], 1.0 * U) == expected


@pytest.mark.parametrize("call", EVERYTHING)
def test_data_made_in_inference_mode_are_data(call: str) -> None:
    expected = anew(EVERYTHING[call], U)
    with torch.inference_mode():
        made = 1.0 * U
    assert made.is_inference()
    assert anew(EVERYTHING[call], made) == expected


def test_what_evaluates_leaves_gradients_off() -> None:
    with torch.no_grad():
        assert not vfe.FreeEnergy().differentiable_loss(model, guide, U).requires_grad
    with torch.inference_mode():
        assert not vfe.FreeEnergy().differentiable_loss(model, guide, U).requires_grad
    assert vfe.FreeEnergy().differentiable_loss(model, guide, U).requires_grad


def test_results_can_be_asked_in_inference_mode_later() -> None:
    found, posterior = terms(U), vfe.posterior(model, U)
    expected = found.gap_by_site()["v"].tolist(), posterior.entropy().item()
    with torch.inference_mode():
        assert (found.gap_by_site()["v"].tolist(), posterior.entropy().item()) == expected


def test_batches_made_in_inference_mode_are_data() -> None:
    with torch.inference_mode():
        batches = [{"u": part * 1.0} for part in U.split(3)]

    def own(u: Tensor) -> None:
        model(u)

    run = vfe.fit(own, vfe.AutoPosterior(own), optim=adam(), num_steps=4, batches=batches, **QUIET)
    assert run.losses[2:].sum() < run.losses[:2].sum()


def test_what_is_learned_in_inference_mode_can_be_learned_on_outside() -> None:
    with torch.inference_mode():
        run_of_fit(U)
    assert not any(leaf.is_inference() for leaf in pyro.get_param_store()._params.values())
    before = stored()
    run_of_fit(U)
    assert stored() != before


@pytest.mark.parametrize("learns", [run_of_fit, run_of_em, run_of_wake_sleep])
def test_parameters_made_in_inference_mode_are_refused_by_name(learns: Callable[[Tensor], Any]) -> None:
    with torch.inference_mode():
        model(U)
        guide(U)
    with pytest.raises(VFEError, match=r"made under torch\.inference_mode.*'rates'.*pyro\.clear_param_store"):
        learns(U)
    pyro.clear_param_store()
    learns(U)


def test_a_network_made_in_inference_mode_is_refused_by_name() -> None:
    with torch.inference_mode():
        network = torch.nn.Linear(1, 2, dtype=torch.float64)
    own = vfe.AutoAmortized(model, network, inputs=lambda u: u[:, None])
    with pytest.raises(VFEError, match=r"made under torch\.inference_mode.*'network.weight'"):
        vfe.fit(model, own, U, optim=adam(), num_steps=2, **QUIET)


@contextmanager
def strict() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("call", ["EM", "fit", "wake-sleep", "gap_by_site", "to_datatree"])
def test_deterministic_algorithms_give_the_same_numbers(call: str) -> None:
    expected = anew(EVERYTHING[call], U)
    with strict():
        assert anew(EVERYTHING[call], U) == expected


def test_a_network_learns_under_autocast() -> None:
    """Autocast keeps half-precision copies of weights for as long as it lasts: they shall be those of each step."""

    def losses() -> Tensor:
        pyro.clear_param_store()
        network = torch.nn.Linear(1, 2, dtype=torch.float32)
        with torch.no_grad():
            network.weight.fill_(0.1)
            network.bias.fill_(0.0)
        own = vfe.AutoAmortized(model, network, inputs=lambda u: u[:, None].to(torch.float32))
        return torch.tensor(vfe.fit(model, own, U, optim=adam(), num_steps=6, **QUIET).losses)

    expected = losses()
    with torch.autocast("cpu"):
        torch.testing.assert_close(losses(), expected, rtol=0.01, atol=0.0)
