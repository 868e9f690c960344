"""Parameters that an earlier program left in Pyro's store: they are seen, and values can be handed over past the store.

The oracle of a mixture's evidence is written out here, in numpy.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.nn import PyroModule, PyroParam
from pyro.optim import Adam
from torch import Tensor, nn
from torch.distributions import constraints

import pyro_vfe as vfe
from pyro_vfe.errors import NameClashError, StructureError, VFEError

U = torch.cat([torch.linspace(centre - 1, centre + 1, 12, dtype=torch.float64) for centre in (-4, 0, 4)])

Model = Callable[..., Any]


def components(u: Tensor, weights: Tensor, means: Tensor) -> None:
    with pyro.plate("data", len(u)):
        v = pyro.sample("v", dist.Categorical(weights))
        pyro.sample("u", dist.Normal(means[v], 1.0), obs=u)


def surprise(weights: Any, means: Any) -> float:
    """-log p(u) of the mixture of unit normals, in numpy."""
    weights, means, u = (np.asarray(values, dtype=np.float64) for values in (weights, means, U))
    densities = np.exp(-0.5 * (u[:, None] - means) ** 2) / np.sqrt(2 * np.pi)
    return float(-np.log(densities @ weights).sum())


def of_tensors(size: int) -> Model:
    def model(u: Tensor) -> None:
        weights = pyro.param("weights", torch.ones(size) / size, constraint=constraints.simplex)
        components(u, weights, pyro.param("means", torch.linspace(-1, 1, size)))

    return model


def of_functions(size: int) -> Model:
    def model(u: Tensor) -> None:
        weights = pyro.param("weights", lambda: torch.ones(size) / size, constraint=constraints.simplex)
        components(u, weights, pyro.param("means", lambda: torch.linspace(-1, 1, size)))

    return model


class OfPyroParams(PyroModule):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weights = PyroParam(torch.ones(size) / size, constraint=constraints.simplex)
        self.means = PyroParam(torch.linspace(-1, 1, size))

    def forward(self, u: Tensor) -> None:
        components(u, self.weights, self.means)


class OfModuleParameters(PyroModule):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weights = PyroParam(torch.ones(size) / size, constraint=constraints.simplex)
        self.means = nn.Parameter(torch.linspace(-1, 1, size))

    def forward(self, u: Tensor) -> None:
        components(u, self.weights, self.means)


def around_a_module(size: int) -> Model:
    module = OfPyroParams(size)
    return lambda u: module(u)


def behind_handlers(size: int) -> Model:
    model: Model = poutine.scale(poutine.block(OfPyroParams(size), hide=[]), scale=1.0)
    return model


MODELS = [of_tensors, of_functions, OfPyroParams, OfModuleParameters]


def adam() -> Any:
    return Adam({"lr": 0.01})


def em(model: Model, *args: Any, **options: Any) -> vfe.EMRun:
    return vfe.EM(model).run(*args, progress_bar=False, **options)


def fitted(model: Model, guide: Any, *args: Any, **options: Any) -> vfe.SVIRun:
    return vfe.fit(model, guide, *args, **{"optim": adam(), "num_steps": 2, "progress_bar": False, **options})


def awake(model: Model, u: Tensor, **options: Any) -> vfe.WakeSleepRun:
    def guide(u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            pyro.sample("v", dist.Categorical(torch.ones(len(u), 2)))

    return vfe.WakeSleep(model, guide, adam(), adam()).run(u, num_steps=2, progress_bar=False, **options)


LOOKS: dict[str, Callable[[Model], Any]] = {
    "EM": lambda model: em(model, U),
    "EM with restarts": lambda model: em(model, U, n_init=3),
    "EM on batches": lambda model: vfe.EM(model).run_batches(U.split(12), progress_bar=False),
    "an E-phase": lambda model: vfe.EM(model).e_phase(U),
    "fit": lambda model: fitted(model, None, U),
    "fit with Pyro's loss": lambda model: fitted(model, vfe.AutoMeanField(model), U, elbo=Trace_ELBO()),
    "wake-sleep": lambda model: awake(model, U),
    "loss": lambda model: vfe.FreeEnergy().loss(model, None, U),
    "gradients": lambda model: vfe.FreeEnergy().loss_and_grads(model, None, U),
    "decompose": lambda model: vfe.FreeEnergy().decompose(model, None, U),
    "the exact guide": lambda model: vfe.FreeEnergy().loss(model, vfe.AutoPosterior(model), U),
    "posterior": lambda model: vfe.posterior(model, U),
    "bounds": lambda model: vfe.bounds(model, None, U, num_particles=2),
    "explain": lambda model: vfe.explain(model, None, U),
    "dream": lambda model: vfe.dream(model, U),
    "tree": lambda model: vfe.to_datatree(model, None, U, num_samples=2),
    "mean field": lambda model: vfe.AutoMeanField(model)(U),
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("model", MODELS)
def test_every_look_at_a_model_sees_what_a_smaller_one_has_left(model: Callable[[int], Model], look: str) -> None:
    vfe.posterior(model(2), U)
    with pytest.raises(StructureError, match=r"Parameter '(weights|means)' .*shape \(2,\).*\(3,\).*fresh=True"):
        LOOKS[look](model(3))


@pytest.mark.parametrize("model", [around_a_module, behind_handlers])
def test_a_module_is_seen_behind_what_wraps_it(model: Callable[[int], Model]) -> None:
    vfe.posterior(model(2), U)
    with pytest.raises(StructureError, match=r"Parameter 'weights'"):
        vfe.posterior(model(3), U)


def test_a_left_over_that_broadcasts_is_seen() -> None:
    def one_scale(u: Tensor, shape: tuple[int, ...]) -> None:
        scale = pyro.param("scale", torch.ones(shape), constraint=constraints.positive)
        with pyro.plate("data", len(u)):
            v = pyro.sample("v", dist.Categorical(torch.ones(3)))
            pyro.sample("u", dist.Normal(torch.tensor([-4.0, 0.0, 4.0])[v], scale.expand(3)[v]), obs=u)

    em(one_scale, U, ())
    with pytest.raises(StructureError, match=r"Parameter 'scale' in Pyro's store has shape \(\), .*shape \(3,\)"):
        em(one_scale, U, (3,))
    assert em(one_scale, U, (3,), fresh=True).params["scale"].shape == (3,)


def test_a_left_over_of_another_range_is_seen() -> None:
    pyro.param("weights", torch.tensor([1.0, 2.0]))
    with pytest.raises(StructureError, match=r"'weights' .*constraint Real\(\).*breaks Simplex\(\).*fresh=True"):
        vfe.posterior(of_tensors(2), U)
    run = em(of_tensors(2), U, fresh=True)
    assert float(run.params["weights"].sum()) == pytest.approx(1.0)
    pyro.clear_param_store()
    pyro.param("weights", torch.tensor([0.25, 0.75]))  # within the range: it may be meant
    found = vfe.posterior(of_tensors(2), U)
    assert float(-found.log_evidence) == pytest.approx(surprise([0.25, 0.75], [-1.0, 1.0]))


def test_chains_of_more_states_are_not_fitted_by_those_of_fewer() -> None:
    def chain(size: int) -> Model:
        def model(u: Tensor) -> None:
            initial = pyro.param("initial", torch.ones(size) / size, constraint=constraints.simplex)
            transition = pyro.param("transition", torch.eye(size) / 2 + 0.5 / size, constraint=constraints.simplex)
            means = pyro.param("means", torch.linspace(-4, 4, size))
            with pyro.plate("time", len(u)):
                v = pyro.sample("v", vfe.MarkovChain(initial, transition))
                pyro.sample("u", dist.Normal(means[v], 1.0), obs=u)

        return model

    em(chain(2), U, max_iter=2, tol=10.0)
    with pytest.raises(StructureError, match="Parameter 'initial'"):
        em(chain(3), U)
    run = em(chain(3), U, max_iter=2, tol=10.0, fresh=True)
    found = vfe.posterior(chain(3), U, params=run.params)
    torch.testing.assert_close(-found.log_evidence, torch.tensor(run.free_energy))


@pytest.mark.parametrize("look", ["loss", "gradients", "decompose"])
@pytest.mark.parametrize("start", ["tensor", "function", "partial", "function of a function"])
def test_a_size_that_changes_for_a_pair_that_is_known_is_seen(start: str, look: str) -> None:
    sizes = {"now": 2}

    def ones(size: int) -> Tensor:
        return torch.ones(size)

    def model(u: Tensor, size: int) -> None:
        starts: dict[str, Any] = {
            "tensor": torch.ones(size),
            "function": lambda: torch.ones(size),
            "function of a function": lambda: ones(sizes["now"]),
        }
        if start == "partial":
            from functools import partial

            starts["partial"] = partial(torch.ones, size)
        weights = pyro.param("weights", starts[start], constraint=constraints.positive)
        components(u, weights / weights.sum(), torch.zeros(4))

    loss = getattr(vfe.FreeEnergy(), {"loss": "loss", "gradients": "loss_and_grads", "decompose": "decompose"}[look])
    for _ in range(2):
        loss(model, None, U, 2)
    sizes["now"] = 3
    with pytest.raises(StructureError, match=r"Parameter 'weights'.*\(2,\).*\(3,\)"):
        loss(model, None, U, 3)


def test_a_size_in_an_attribute_is_seen() -> None:
    class Mixture:
        size = 2

        def __call__(self, u: Tensor) -> None:
            weights = pyro.param("weights", lambda: torch.ones(self.size) / self.size, constraint=constraints.simplex)
            components(u, weights, torch.zeros(4))

    model, elbo = Mixture(), vfe.FreeEnergy()
    elbo.loss(model, None, U)
    model.size = 3
    with pytest.raises(StructureError, match="Parameter 'weights'"):
        elbo.loss(model, None, U)


def test_a_function_is_called_once_and_leaves_the_random_state_alone() -> None:
    calls: list[int] = []

    def start() -> Tensor:
        calls.append(1)
        return torch.randn(3)

    def model(u: Tensor) -> None:
        components(u, torch.ones(3) / 3, pyro.param("means", start))

    elbo = vfe.FreeEnergy()
    for _ in range(4):
        elbo.loss_and_grads(model, None, U)
    assert len(calls) == 1
    pyro.clear_param_store()
    pyro.param("means", torch.zeros(3))
    state = torch.get_rng_state()
    elbo.loss_and_grads(model, None, U)
    assert torch.equal(state, torch.get_rng_state())


def test_what_fits_is_no_left_over() -> None:
    def model(u: Tensor) -> None:
        means = pyro.param("means", torch.zeros(3))
        weights = pyro.param("weights", torch.ones(3) / 3, constraint=constraints.simplex)
        with pyro.plate("data", 36, subsample_size=12) as rows:
            shift = pyro.param("shift", torch.zeros(36), event_dim=0)
            v = pyro.sample("v", dist.Categorical(weights))
            pyro.sample("u", dist.Normal(means[v] + shift, 1.0), obs=u[rows])

    for _ in range(2):
        vfe.FreeEnergy().loss(model, None, U)
        vfe.FreeEnergy().loss(poutine.substitute(of_tensors(3), data={"means": torch.zeros(4)}), None, U)


@pytest.mark.parametrize("start", [lambda u: u[:3], lambda u: lambda: u[torch.randperm(len(u))[:3]]])
def test_fewer_data_than_a_start_has_entries_are_no_other_program(start: Callable[[Tensor], Any]) -> None:
    def model(u: Tensor) -> None:
        components(u, torch.ones(3) / 3, pyro.param("means", start(u)))

    run = em(model, U)
    for given in ({}, {"params": run.params}):
        found = vfe.posterior(model, U[:1], **given)
        joint = dist.Normal(run.params["means"], 1.0).log_prob(U[:1]).exp()
        torch.testing.assert_close(found.marginal("v")[0], joint / joint.sum())
    with pytest.raises(StructureError, match="Parameter 'means'"):
        vfe.posterior(lambda u: components(u, torch.ones(2), pyro.param("means", u[:2])), U)


def test_a_module_that_computes_with_its_own_tensors_is_right_whatever_the_store_has() -> None:
    class Means(PyroModule):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.means = nn.Parameter(torch.linspace(-4, 4, size))

        def forward(self, u: Tensor) -> None:
            size = len(self.means)
            components(u, torch.ones(size) / size, self.means)

    for size in (2, 3):
        expected = surprise(np.ones(size) / size, np.linspace(-4, 4, size))
        assert float(vfe.FreeEnergy().decompose(Means(size), None, U).surprise) == pytest.approx(expected)
        tree = vfe.to_datatree(Means(size), None, U, num_samples=2)
        assert tree.posterior["means"].shape[-1] == size


@pytest.mark.parametrize("size", [2, 3])
def test_em_learns_no_tensor_that_a_module_does_not_compute_with(size: int) -> None:
    em(OfModuleParameters(3), U)
    del pyro.get_param_store()["weights"]
    with pytest.raises(NameClashError, match=r"'means'.*fresh=True"):
        em(OfModuleParameters(size), U)
    run = em(OfModuleParameters(size), U, fresh=True)
    assert run.free_energy == pytest.approx(surprise(run.params["weights"], run.params["means"]))


def around(size: int) -> Model:
    def model(u: Tensor) -> None:
        means = pyro.sample("means", dist.Normal(torch.zeros(size), 5.0).to_event(1))
        with pyro.plate("data", len(u)):
            pyro.sample("u", dist.Normal(means.mean(), 1.0), obs=u)

    return model


@pytest.mark.parametrize("elbo", [vfe.FreeEnergy(strict_enumeration_warning=False), Trace_ELBO()])
@pytest.mark.parametrize("auto", [AutoNormal, AutoDelta])
def test_a_guide_that_was_left_over_is_named_and_can_be_called_again(auto: Any, elbo: Any) -> None:
    def guide(size: int) -> Any:
        return auto(poutine.block(around(size), expose=["means"]))

    fitted(around(2), guide(2), U, elbo=elbo)
    later = guide(3)
    with pytest.raises(StructureError, match=rf"'{auto.__name__}(.locs)?.means'.*\(2,\).*\(3,\).*clear_param_store"):
        fitted(around(3), later, U, elbo=elbo)
    pyro.clear_param_store()
    fitted(around(3), later, U, elbo=elbo)
    run = fitted(around(2), guide(2), U, elbo=elbo, fresh=True)
    assert {value.shape for value in run.params.values()} == {(2,)}


def test_a_left_over_of_a_model_is_named_where_a_guide_sets_itself_up() -> None:
    def model(size: int) -> Model:
        def model(u: Tensor) -> None:
            means = pyro.param("means", torch.linspace(-1, 1, size))
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
            components(u, torch.ones(size) / size, means[torch.arange(size)] + shift)

        return model

    vfe.FreeEnergy().loss(poutine.condition(model(2), data={"shift": torch.zeros(())}), None, U)
    for elbo in (None, Trace_ELBO()):
        with pytest.raises(StructureError, match="Parameter 'means'"):
            fitted(model(3), AutoNormal(poutine.block(model(3), expose=["shift"])), U, elbo=elbo)


@contextmanager
def unchanged_store(*modules: nn.Module) -> Iterator[None]:
    """Pyro's store has the same tensors with the same values after the block, and modules have their own."""
    store = pyro.get_param_store()
    before = {name: (leaf, leaf.detach().clone(), store._constraints[name]) for name, leaf in store._params.items()}
    own = [(leaf, leaf.detach().clone()) for module in modules for leaf in module.parameters()]
    yield
    assert list(store._params) == list(before) == list(store._constraints)
    for name, (leaf, value, constraint) in before.items():
        assert store._params[name] is leaf and store._constraints[name] is constraint
        assert torch.equal(leaf, value) and store.param_name(leaf) == name
    assert all(torch.equal(leaf, value) for leaf, value in own)


@pytest.mark.parametrize("model", MODELS)
def test_a_loop_over_sizes_hands_its_results_over_past_the_store(model: Callable[[int], Model]) -> None:
    models = {size: model(size) for size in (2, 3)}
    runs = {size: em(models[size], U, fresh=True) for size in models}
    modules = [own for own in models.values() if isinstance(own, nn.Module)]
    assert [run.notes for run in runs.values()] == [(), ()]
    for size, run in runs.items():
        expected = surprise(run.params["weights"], run.params["means"])
        assert run.free_energy == pytest.approx(expected)
        given = {"params": run.params}
        for own in (models[size], model(size)):  # its tensors are not in the store
            with unchanged_store(*modules):
                assert float(-vfe.posterior(own, U, **given).log_evidence) == pytest.approx(expected)
                assert float(vfe.FreeEnergy().decompose(own, None, U, **given).free_energy) == pytest.approx(expected)
                assert vfe.FreeEnergy().loss(own, None, U, **given) == pytest.approx(expected)
                marginals = vfe.FreeEnergy().compute_marginals(own, None, U, **given)
                assert marginals["v"].probs.shape[-1] == size
                vfe.FreeEnergy().sample_posterior(own, None, U, **given)
                assert float(-vfe.bounds(own, None, U, num_particles=2, **given).lower) == pytest.approx(expected)
                vfe.explain(own, None, U, **given)
                assert int(vfe.dream(own, U, **given).latents["v"].max()) < size
                tree = vfe.to_datatree(own, None, U, num_samples=2, **given)
                np.testing.assert_allclose(tree.posterior["means"][0, 0], run.params["means"].numpy())
                assert float(tree["variational"]["surprise"]) == pytest.approx(expected)


RUNS: dict[str, Callable[[Model], Any]] = {
    "EM": lambda model: em(model, U, n_init=2),
    "EM on batches": lambda model: vfe.EM(model).run_batches(U.split(12), num_epochs=5, tol=100.0, progress_bar=False),
    "fit": lambda model: fitted(model, vfe.AutoMeanField(model), U),
    "wake-sleep": lambda model: awake(model, U),
}


@pytest.mark.parametrize("kind", RUNS)
def test_runs_of_all_kinds_hand_on_their_parameters(kind: str) -> None:
    model = of_functions(2)
    run = RUNS[kind](model)
    expected = surprise(run.params["weights"], run.params["means"])
    own = {name: run.params[name] for name in ("weights", "means")}
    pyro.clear_param_store()
    with unchanged_store():
        found = vfe.posterior(model, U, params=run.params)  # names of a guide are left aside
    assert float(-found.log_evidence) == pytest.approx(expected)
    starts = {
        "EM": em(model, U, params=run.params, n_init=2).history.surprise[0],
        "fit": fitted(model, None, U, params=run.params).losses[0],
        "wake-sleep": awake(model, U, params=own).history.surprise[0],
    }
    assert starts == pytest.approx(dict.fromkeys(starts, expected))
    batches = vfe.EM(model).run_batches([U], num_epochs=5, tol=100.0, params=own, progress_bar=False)
    assert batches.history.surprise[0] == pytest.approx(expected)
    assert not [note for note in batches.notes if "store" in note]
    trained = fitted(model, vfe.AutoMeanField(model), U, params=own)  # the guide starts from its own values
    assert trained.history.surprise[0] == pytest.approx(expected, abs=1.0)
    with pytest.raises(VFEError, match=r"params= is a .*Pass run.params"):
        vfe.posterior(model, U, params=run)


def test_a_guide_that_is_new_reads_the_values_of_the_one_that_was_trained() -> None:
    model = around(3)

    def guide() -> Any:
        return AutoNormal(poutine.block(model, expose=["means"]))

    quiet = vfe.FreeEnergy(strict_enumeration_warning=False)
    run = fitted(model, guide(), U, num_steps=30, elbo=quiet)
    trained = run.params["AutoNormal.locs.means"]
    pyro.clear_param_store()
    new = guide()
    with unchanged_store():
        guess = vfe.FreeEnergy(num_particles=20, strict_enumeration_warning=False)
        quiet.loss(model, new, U, params=run.params)
        pyro.set_rng_seed(1)
        found = guess.loss(model, new, U, params=run.params)
    pyro.get_param_store().clear()
    for name, value in run.params.items():
        pyro.param(name, value.clone(), constraint=constraints.positive if "scales" in name else constraints.real)
    pyro.set_rng_seed(1)
    assert found == pytest.approx(guess.loss(model, guide(), U))
    pyro.clear_param_store()
    new(U)
    assert not torch.equal(pyro.get_param_store()["AutoNormal.locs.means"], trained)


def test_the_exact_guide_reads_what_the_model_does() -> None:
    run = em(of_functions(3), U)
    pyro.clear_param_store()
    model = of_functions(3)
    terms = vfe.FreeEnergy().decompose(model, vfe.AutoPosterior(model), U, params=run.params)
    assert float(terms.gap) == pytest.approx(0.0, abs=1e-8)
    assert float(terms.surprise) == pytest.approx(surprise(run.params["weights"], run.params["means"]))


def test_networks_compute_with_what_is_given() -> None:
    def parts() -> tuple[Model, Model, nn.Module]:
        net = nn.Linear(1, 2)

        def guide(u: Tensor) -> None:
            pyro.module("net", net)
            with pyro.plate("data", len(u)):
                pyro.sample("v", dist.Categorical(logits=net(u[:, None])))

        return of_functions(2), guide, net

    model, guide, net = parts()
    run = fitted(model, guide, U)
    other_model, other_guide, other_net = parts()
    with unchanged_store(net, other_net):
        one = vfe.FreeEnergy().decompose(model, guide, U, params=run.params)
        other = vfe.FreeEnergy().decompose(other_model, other_guide, U, params=run.params)
    torch.testing.assert_close(one.free_energy, other.free_energy)
    assert float(one.free_energy) == pytest.approx(run.free_energy)
    with unchanged_store(net, other_net), pytest.raises(VFEError, match=r"shape \(3,\).*'net\$\$\$bias'.*\(2,\)"):
        vfe.FreeEnergy().decompose(model, guide, U, params={**run.params, "net$$$bias": torch.zeros(3)})


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"weights": torch.ones(2) / 2}, r"lacks parameter 'means'.*it has 'weights'"),
    "misspelt": ({"weights": torch.ones(2) / 2, "mean": torch.zeros(2)}, "lacks parameter 'means'.*'mean', 'weights'"),
    "none at all": ({}, "lacks parameter 'weights'"),
    "of another shape": ({"weights": torch.ones(2) / 2, "means": torch.zeros(3)}, r"shape \(3,\).*'means'.*\(2,\)"),
    "outside of the constraint": (
        {"weights": torch.ones(2), "means": torch.zeros(2)},
        "'weights' .*constraint, Simplex",
    ),
    "unconstrained": ({"weights": torch.tensor([-1.0, 2.0]), "means": torch.zeros(2)}, "'weights' .*constraint"),
    "no number": ({"weights": torch.ones(2) / 2, "means": torch.tensor([0.0, torch.nan])}, "'means' .*constraint"),
    "no tensor": ({"weights": torch.ones(2) / 2, "means": "zero"}, "a str for parameter 'means'"),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("wrong", WRONG)
def test_values_that_are_not_the_programs_are_refused_and_nothing_changes(
    model: Callable[[int], Model], wrong: str
) -> None:
    params, words = WRONG[wrong]
    own = model(2)
    em(own, U)
    with unchanged_store(*[own] if isinstance(own, nn.Module) else []):
        for look in (
            lambda: vfe.posterior(own, U, params=params),
            lambda: vfe.FreeEnergy().decompose(own, None, U, params=params),
            lambda: vfe.dream(own, U, params=params),
            lambda: vfe.to_datatree(own, None, U, params=params, num_samples=2),
        ):
            with pytest.raises(VFEError, match=words):
                look()


@pytest.mark.parametrize("wrong", ["misspelt", "of another shape", "outside of the constraint", "no tensor"])
def test_a_run_that_is_to_start_from_wrong_values_changes_nothing(wrong: str) -> None:
    params, _ = WRONG[wrong]
    name = "'mean'" if wrong == "misspelt" else f"'{'weights' if 'constraint' in wrong else 'means'}'"
    model = OfModuleParameters(2)
    em(model, U)
    with unchanged_store(model):
        for run in (em, lambda *args, **kwargs: fitted(args[0], None, args[1], **kwargs), awake):
            with pytest.raises(VFEError, match=name):
                run(model, U, params=params)


def test_the_fix_for_a_missing_value_works() -> None:
    run = em(of_functions(2), U)
    del run.params["means"]  # type: ignore[attr-defined]
    with pytest.raises(VFEError, match=r"add 'means': pyro.param\('means'\)"):
        vfe.posterior(of_functions(2), U, params=run.params)
    params = {**run.params, "means": pyro.param("means")}
    assert float(-vfe.posterior(of_functions(2), U, params=params).log_evidence) == pytest.approx(run.free_energy)


@pytest.mark.parametrize("model", [of_tensors, of_functions])
def test_a_fresh_start_is_that_of_an_empty_store(model: Callable[[int], Model]) -> None:
    runs = [em(model(3), U).params, fitted(model(3), vfe.AutoMeanField(model(3)), U, fresh=True).params]
    again = em(model(3), U, fresh=True)
    assert again.notes == ()
    torch.testing.assert_close(dict(again.params), dict(runs[0]), rtol=0, atol=0)
    pyro.clear_param_store()
    cleared = fitted(model(3), vfe.AutoMeanField(model(3)), U)
    torch.testing.assert_close(dict(cleared.params), dict(runs[1]), rtol=0, atol=0)


def test_a_fresh_start_leaves_what_other_programs_made() -> None:
    pyro.param("other", torch.tensor(7.0))
    em(of_functions(2), U)
    run = em(of_functions(3), U, fresh=True)
    assert list(pyro.get_param_store()) == ["other", "weights", "means"]
    assert pyro.param("other").item() == 7.0
    torch.testing.assert_close(pyro.param("means"), run.params["means"])
    goes_on = em(of_functions(3), U)
    assert goes_on.free_energy == pytest.approx(run.free_energy)


@pytest.mark.parametrize("when", ["at the first look", "later"])
@pytest.mark.parametrize("start", [{"fresh": True}, {"params": {"weights": torch.ones(3) / 3}}])
def test_an_error_leaves_the_store_as_it_was(start: dict[str, Any], when: str) -> None:
    module = OfModuleParameters(3)
    em(module, U)
    calls: list[int] = []

    def model(u: Tensor) -> None:
        pyro.param("new", torch.zeros(3))
        module(u)
        if when == "at the first look":
            raise RuntimeError("no")

    def callback(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("no")

    with unchanged_store(module):
        with pytest.raises(RuntimeError, match="no"):
            vfe.EM(model, fixed="new").run(U, callback=callback, progress_bar=False, **start)
        calls.clear()
        monitor = vfe.Monitor(model, None, every=1, callback=callback, progress_bar=False)
        with pytest.raises(RuntimeError, match="no"):
            fitted(model, None, U, num_steps=9, monitor=monitor, **start)


def test_a_start_made_outside_of_the_program_stays_what_it_is() -> None:
    start = torch.linspace(-1, 1, 3)

    def model(u: Tensor) -> None:
        components(u, torch.ones(3) / 3, pyro.param("means", start))

    first = em(model, U)
    torch.testing.assert_close(start, torch.linspace(-1, 1, 3))
    again = em(model, U, fresh=True)
    torch.testing.assert_close(again.params["means"], first.params["means"], rtol=0, atol=0)
    pyro.clear_param_store()
    pyro.param("means", start)  # Pyro itself makes the tensor the parameter
    with pytest.raises(VFEError, match=r"'means' starts from a tensor that is made outside.*clone"):
        em(model, U, fresh=True)


def test_a_run_says_what_it_started_from() -> None:
    words = "Started from what Pyro's store had for parameters 'weights', 'means'; fresh=True starts anew."
    model = of_functions(2)
    assert em(model, U).notes == ()
    for run in (em(model, U), fitted(model, None, U), awake(model, U)):
        assert words in run.notes
    batches = vfe.EM(model).run_batches(U.split(12), num_epochs=5, tol=100.0, progress_bar=False)
    assert words in batches.notes
    assert "note: Started from" in str(em(model, U))
    assert not [n for n in fitted(model, None, U, fresh=True).notes if "store" in n]


def test_a_fresh_start_says_what_is_no_start_of_a_program() -> None:
    module = OfPyroParams(2)
    em(module, U)

    def model(u: Tensor) -> None:
        shift = pyro.param("shift") if "shift" in pyro.get_param_store() else pyro.param("other")
        module(u + 0 * shift)

    pyro.param("other", torch.zeros(()))
    run = vfe.EM(model, fixed="other").run(U, fresh=True, progress_bar=False)
    assert run.notes == (
        "Started from what Pyro's store had for parameters 'other', 'weights', 'means'; a module holds them, or no "
        "program makes them.",
    )
    assert float(-vfe.posterior(model, U, params=run.params).log_evidence) == pytest.approx(run.free_energy)


def test_what_is_given_does_not_reach_the_programs() -> None:
    seen: list[Any] = []

    def model(u: Tensor, **kwargs: Any) -> None:
        seen.append(kwargs)
        of_functions(2)(u)

    params = em(model, U, fresh=True).params
    vfe.posterior(model, U, params=params)
    fitted(model, None, U, params=params)
    vfe.dream(model, U, params=params)
    assert not any(seen)


def test_one_em_for_several_sizes_reports_the_parameters_of_the_last() -> None:
    def model(u: Tensor, size: int) -> None:
        means = torch.stack([pyro.param(f"mean_{i}", torch.tensor(float(i))) for i in range(size)])
        components(u, torch.ones(size) / size, means)

    own = vfe.EM(model)
    assert list(own.run(U, 3, progress_bar=False).params) == ["mean_0", "mean_1", "mean_2"]
    assert list(own.run(U, 2, progress_bar=False, fresh=True).params) == ["mean_0", "mean_1"]
