"""Parameters that are local to their modules: what learns and reports finds them as if they were in Pyro's store."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from checks import assert_equal
from programs.case import tensor
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

import pyro_vfe as vfe
from pyro_vfe.errors import NameClashError, VFEError

U = tensor([0.1, 2.0, -1.0, 3.0, 2.5])


class Mixture(PyroModule):
    """A mixture with constrained parameters."""

    def __init__(self, name: str = "") -> None:
        super().__init__(name)
        self.means = PyroParam(tensor([0.0, 1.0]))
        self.weights = PyroParam(tensor([0.4, 0.6]), constraints.simplex)

    def forward(self, u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            z = pyro.sample("z", dist.Categorical(self.weights))
            pyro.sample("u", dist.Normal(self.means[z], 1.0), obs=u)


class Network(PyroModule):
    """A mixture whose means come from layers: one that is a PyroModule, one that is torch's, and a Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = PyroModule[nn.Linear](2, 3)
        self.second = nn.Linear(3, 1)
        self.shift = nn.Parameter(tensor(0.3))

    def forward(self, u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            z = pyro.sample("z", dist.Categorical(tensor([0.4, 0.6])))
            means = self.second(self.first(torch.eye(2)[z.long()]).tanh())[..., 0] + self.shift
            pyro.sample("u", dist.Normal(means, 1.0), obs=u)


class Recognition(PyroModule):
    """A network from the data to the latents."""

    def __init__(self, name: str = "recognition") -> None:
        super().__init__(name)
        self.first = PyroModule[nn.Linear](1, 2)

    def forward(self, u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            pyro.sample("z", dist.Categorical(logits=self.first(u[:, None])))


def adam(**options: Any) -> Any:
    return pyro.optim.Adam({"lr": 0.05, **options})


def em(model: Any) -> Any:
    run = vfe.EM(model).run(U, max_iter=400, progress_bar=False)
    assert not run.notes and set(run.updates) == {"means", "weights"}
    return run.free_energy, run.params


def em_by_phases(model: Any) -> Any:
    steps = vfe.EM(model)
    found = []
    for _ in range(3):
        steps.e_phase(U)
        steps.m_phase(U)
        found.append(vfe.FreeEnergy().loss(model, None, U))
    return found


def fit(model: Any) -> Any:
    run = vfe.fit(model, Recognition(), U, optim=adam(), num_steps=7, progress_bar=False)
    return run.losses.tolist(), run.params


def automatic(model: Any) -> Any:
    run = vfe.fit(model, vfe.AutoMeanField(model), U, optim=adam(), num_steps=7, progress_bar=False)
    return run.losses.tolist(), run.params


def wake_sleep(model: Any) -> Any:
    run = vfe.WakeSleep(model, Recognition(), adam(), adam()).run(U, num_steps=5, progress_bar=False)
    return run.params


def svi(model: Any) -> Any:
    steps = pyro.infer.SVI(model, vfe.AutoMeanField(model), adam(), vfe.FreeEnergy())
    return [steps.step(U) for _ in range(7)]


def given(model: Any) -> Any:
    params = {"means": tensor([-1.0, 2.0]), "weights": tensor([0.2, 0.8])}
    return vfe.posterior(model, U, params=params).log_evidence, vfe.posterior(model, U).log_evidence


def fresh(model: Any) -> Any:
    params = {"means": tensor([-1.0, 2.0])}
    run = vfe.EM(model).run(U, params=params, max_iter=400, progress_bar=False)
    return run.params, run.free_energy


def tree(model: Any) -> Any:
    found = vfe.to_datatree(model, None, U, num_samples=3)["posterior"]
    return {name: torch.tensor(found[name].values) for name in ("means", "weights")}


CALLS: dict[str, Callable[[Any], Any]] = {
    call.__name__: call for call in (em, em_by_phases, fit, automatic, wake_sleep, svi, given, fresh, tree)
}


def found(call: Callable[[Any], Any], kind: type, *, local: bool) -> tuple[Any, list[Tensor]]:
    """What a call gives, and what the module has after it."""
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    with pyro.settings.context(module_local_params=local):
        model = kind()
        result = call(model)
        assert not local or not pyro.get_param_store().keys()
        return result, [leaf.detach().clone() for leaf in model.parameters()]


@pytest.mark.parametrize("name", CALLS)
def test_local_parameters_are_learned_and_reported_as_those_in_the_store(name: str) -> None:
    one, other = (found(CALLS[name], Mixture, local=local) for local in (False, True))
    torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["fit", "automatic", "svi", "wake_sleep"])
def test_weights_of_networks_are_learned_as_those_in_the_store(name: str) -> None:
    one, other = (found(CALLS[name], Network, local=local) for local in (False, True))
    torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)


def test_em_of_a_local_mixture_ends_at_the_best_values() -> None:
    with pyro.settings.context(module_local_params=True):
        model = Mixture()
        run = vfe.EM(model).run(U, max_iter=400, progress_bar=False)
        log_joint = run.params["weights"].log() + dist.Normal(run.params["means"], 1.0).log_prob(U[:, None])
        responsibilities = log_joint.softmax(-1)
        assert_equal(torch.tensor(run.free_energy), -log_joint.logsumexp(-1).sum(), 1e-8)
        means = (responsibilities * U[:, None]).sum(0) / responsibilities.sum(0)
        assert_equal(model.means, means, 1e-3)
        assert_equal(model.weights, responsibilities.mean(0), 1e-3)


def test_em_goes_on_from_what_the_module_has() -> None:
    def twice(model: Any) -> Any:
        for _ in range(2):
            run = vfe.EM(model).run(U, max_iter=60, tol=1e-3, progress_bar=False)
        return run.params, run.free_energy

    one, other = (found(twice, Mixture, local=local) for local in (False, True))
    torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)


def test_what_functions_make_stays_in_the_store_and_what_is_there_stays_what_it_is() -> None:
    pyro.param("means", tensor([7.0, 8.0, 9.0]))
    module = Mixture()

    def model(u: Tensor) -> None:
        shift = pyro.param("shift", tensor(0.5))
        module(u - shift)

    with pyro.settings.context(module_local_params=True):
        module = Mixture()
        run = vfe.EM(model).run(U, max_iter=5, tol=1.0, progress_bar=False)
        assert run.params.keys() == {"shift", "means", "weights"}
        assert pyro.param("means").tolist() == [7.0, 8.0, 9.0]
        assert set(pyro.get_param_store().keys()) == {"means", "shift"}
        assert_equal(pyro.param("shift"), run.params["shift"], 1e-12)
        assert_equal(module.means, run.params["means"], 1e-12)


def test_two_parameters_of_one_name_are_told() -> None:
    with pyro.settings.context(module_local_params=True):
        with pytest.raises(NameClashError, match=r"'first\.weight'") as caught:
            vfe.fit(Network(), Recognition(""), U, optim=adam(), num_steps=1, progress_bar=False)
        assert 'super().__init__("guide")' in str(caught.value)
        vfe.fit(Network(), Recognition("guide"), U, optim=adam(), num_steps=1, progress_bar=False)
        # What needs no names takes them as they are.
        vfe.FreeEnergy().loss_and_grads(model := Network(), guide := Recognition(""), U)
        assert all(leaf.grad is not None for part in (model, guide) for leaf in part.parameters())


def test_a_function_that_makes_a_parameter_of_a_modules_name_is_told() -> None:
    with pyro.settings.context(module_local_params=True):
        module = Mixture()

        def model(u: Tensor) -> None:
            module(u - pyro.param("means", tensor(0.5)))

        with pytest.raises(NameClashError, match="'means'"):
            vfe.EM(model).run(U, progress_bar=False)


def test_modules_can_be_copied_and_saved_after_a_call() -> None:
    with pyro.settings.context(module_local_params=True):
        model = Mixture()
        expected = vfe.EM(model).run(U, max_iter=400, progress_bar=False).free_energy
        vfe.FreeEnergy().loss_and_grads(model, None, U)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_equal(tensor(vfe.FreeEnergy().loss(other, None, U)), tensor(expected), 1e-8)


def test_an_error_leaves_the_setting_and_the_store_as_they_were() -> None:
    with pyro.settings.context(module_local_params=True):
        pyro.param("kept", tensor(1.0))
        with pytest.raises(VFEError):
            vfe.EM(Mixture()).run(U * torch.nan, progress_bar=False)
        assert pyro.settings.get("module_local_params")
        assert list(pyro.get_param_store().keys()) == ["kept"]
