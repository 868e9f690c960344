"""What a user passes in the wrong place or of the wrong kind: one error each, with a fix that works."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor
from torch.distributions import constraints

import pyro_vfe as vfe
from pyro_vfe.errors import StructureError, VFEError, VFEWarning

U = torch.tensor([1.0, 0.0, 2.0, 9.0, 8.0, 12.0], dtype=torch.float64)
QUIET: dict[str, Any] = {"progress_bar": False}


def model(u: Tensor) -> None:
    rates = pyro.param("rates", torch.tensor([1.0, 9.0], dtype=torch.float64), constraint=constraints.positive)
    with pyro.plate("data", len(u)):
        v = pyro.sample("v", dist.Categorical(torch.ones(2, dtype=torch.float64) / 2))
        pyro.sample("u", dist.Poisson(rates[v]), obs=u)


def guide(u: Tensor) -> None:
    start = torch.ones(len(u), 2, dtype=torch.float64) / 2
    with pyro.plate("data", len(u)):
        pyro.sample("v", dist.Categorical(pyro.param("q", start, constraint=constraints.simplex)))


class Module(PyroModule):
    def forward(self, u: Tensor) -> None:
        model(u)


def adam() -> Any:
    return pyro.optim.Adam({"lr": 0.05})


def fit(own_model: Any, own_guide: Any, *args: Any, **options: Any) -> Any:
    return vfe.fit(own_model, own_guide, *args, **{"optim": adam(), "num_steps": 2, **QUIET, **options})


def wake_sleep(own_model: Any, own_guide: Any, *args: Any) -> Any:
    return vfe.WakeSleep(own_model, own_guide, adam(), adam()).run(*args, num_steps=2, **QUIET)


def em(own_model: Any, own_guide: Any, *args: Any) -> Any:
    return vfe.EM(own_model, own_guide).run(*args, max_iter=2, tol=1e9, **QUIET)


def step_of_svi(own_model: Any, own_guide: Any, *args: Any) -> Any:
    return pyro.infer.SVI(own_model, own_guide, adam(), vfe.FreeEnergy()).step(*args)


ENTRIES: dict[str, Callable[..., Any]] = {
    "loss": lambda *given: vfe.FreeEnergy().loss(*given),
    "loss_and_grads": lambda *given: vfe.FreeEnergy().loss_and_grads(*given),
    "decompose": lambda *given: vfe.FreeEnergy().decompose(*given),
    "SVI": step_of_svi,
    "EM": em,
    "fit": fit,
    "WakeSleep": wake_sleep,
    "bounds": vfe.bounds,
    "explain": vfe.explain,
    "to_datatree": partial(vfe.to_datatree, num_samples=3, **QUIET),
}
"""Called with model, guide and data."""

OF_A_MODEL: dict[str, Callable[..., Any]] = {
    "posterior": vfe.posterior,
    "dream": vfe.dream,
    "AutoMeanField": lambda own, u: vfe.AutoMeanField(own)(u),
    "AutoStructured": lambda own, u: vfe.AutoStructured(own)(u),
    "AutoPosterior": lambda own, u: vfe.AutoPosterior(own)(u),
    "AutoAmortized": lambda own, u: vfe.AutoAmortized(own, torch.nn.Linear(6, 12))(u),
}

NO_GUIDES = {
    "class": (vfe.AutoMeanField, r"the class AutoMeanField, .*: guide = vfe.AutoMeanField\(model\)"),
    "class of two arguments": (vfe.AutoAmortized, r"guide = vfe.AutoAmortized\(model, network\)"),
    "class of Pyro's": (pyro.infer.autoguide.AutoDelta, r"guide = AutoDelta\(model\)"),
    "class with a first argument": (partial(vfe.AutoMeanField, model), "the class AutoMeanField"),
    "what makes a guide": (lambda u: vfe.AutoMeanField(model), "samples nothing, and returns an AutoMeanField"),
    "what makes a class": (lambda u: vfe.AutoMeanField, "returns the class AutoMeanField"),
    "what makes a function": (lambda u: guide, "returns the function guide"),
    "what makes a network": (lambda u: torch.nn.Linear(1, 2), "returns a Linear. Make it once, before the call"),
    "what makes a distribution": (lambda u: dist.Bernoulli(0.5), "returns a Bernoulli. Sample from it"),
    "generator": (lambda u: (yield), "makes a generator, whose code does not run"),
    "ELBO": (vfe.FreeEnergy(), "a FreeEnergy, which is no program"),
    "optimiser": (adam(), "a PyroOptim, which is no program"),
    "distribution": (dist.Bernoulli(0.5), "a Bernoulli, which is no program"),
    "data": (U, "a Tensor, which cannot be called"),
    "what a guide returned": ({"v": U}, "a dict, which cannot be called"),
    "text": ("AutoMeanField", "'AutoMeanField', which cannot be called"),
}

NO_MODELS = {
    "class": (Module, r"the class Module, .*: model = Module\(\)"),
    "what makes a module": (lambda u: Module(), "The model samples nothing, and returns a Module. Make it once"),
    "what makes a function": (lambda u: model, "The model samples nothing, and returns the function model"),
    "ELBO": (vfe.FreeEnergy(), "a FreeEnergy, which is no program"),
    "data": (U, "The programs come first"),
    "what a model returned": (None, "The programs come first"),
}


@pytest.mark.parametrize("given", NO_GUIDES)
@pytest.mark.parametrize("entry", ENTRIES)
def test_what_is_no_guide_is_told_with_the_way_out(entry: str, given: str) -> None:
    stranger, words = NO_GUIDES[given]
    with pytest.raises(VFEError, match=words):
        ENTRIES[entry](model, stranger, U)


@pytest.mark.parametrize("given", NO_MODELS)
@pytest.mark.parametrize("entry", [*ENTRIES, *OF_A_MODEL])
def test_what_is_no_model_is_told_with_the_way_out(entry: str, given: str) -> None:
    stranger, words = NO_MODELS[given]
    with pytest.raises(VFEError, match=words), warnings.catch_warnings():
        warnings.simplefilter("ignore", VFEWarning)
        if entry in ENTRIES:
            ENTRIES[entry](stranger, lambda u: None if entry != "WakeSleep" else guide(u), U)
        else:
            OF_A_MODEL[entry](stranger, U)


@pytest.mark.parametrize("entry", ENTRIES)
def test_swapped_programs_are_told(entry: str) -> None:
    with pytest.raises(StructureError, match=r"are swapped|importance weights bound nothing"):
        ENTRIES[entry](guide, model, U)
    with pytest.raises(VFEError, match="The model is an AutoMeanField, which is a guide"):
        ENTRIES[entry](vfe.AutoMeanField(model), model, U)


def test_a_guide_that_observes_what_the_model_observes_is_refused() -> None:
    with pytest.raises(StructureError, match="'u' of the guide weighs the values of latent 'v'"):
        vfe.FreeEnergy().loss(model, model, U)


@pytest.mark.parametrize("entry", [name for name in ENTRIES if name not in ("WakeSleep", "bounds")])
def test_a_guide_that_samples_and_returns_nothing_is_silent(entry: str) -> None:
    ENTRIES[entry](model, lambda u: None, U)
    ENTRIES[entry](model, lambda u: {}, U)


def test_a_guide_that_returns_what_it_made_and_samples_is_silent() -> None:
    def returns_itself(u: Tensor) -> Any:
        guide(u)
        return guide

    assert vfe.FreeEnergy().loss(model, returns_itself, U) == vfe.FreeEnergy().loss(model, guide, U)


def test_a_network_as_a_guide_draws_a_warning() -> None:
    with pytest.warns(VFEWarning, match="The guide samples nothing, and returns a Tensor"):
        vfe.FreeEnergy().decompose(model, torch.nn.Linear(6, 2, dtype=torch.float64), U)


def test_wake_sleep_needs_a_guide_with_sites() -> None:
    with pytest.raises(VFEError, match="given a guide that samples nothing: there is nothing that could learn"):
        wake_sleep(model, lambda u: None, U)


@pytest.mark.parametrize("given", [vfe.Hard, "hard", vfe.ClosedForm(), adam(), False, lambda: None])
def test_an_e_phase_is_an_instance(given: Any) -> None:
    with pytest.raises(VFEError, match=r"e_phase= is .*, which is no E-phase. Pass .*vfe.Hard\(\)"):
        vfe.EM(model, e_phase=given)


@pytest.mark.parametrize("given", [vfe.ClosedForm, "closed", vfe.Hard(), adam(), False])
def test_an_m_phase_is_an_instance(given: Any) -> None:
    with pytest.raises(VFEError, match=r"m_phase= is .*, which is no M-phase. Pass .*vfe.ClosedForm\(\)"):
        vfe.EM(model, m_phase=given)


@pytest.mark.parametrize("given", [vfe.Online, "online", vfe.Hard()])
def test_a_method_of_batches_is_an_instance(given: Any) -> None:
    with pytest.raises(VFEError, match=r"method= is .* Pass vfe.Incremental\(\) or vfe.Online\(\)"):
        vfe.EM(model).run_batches(U.split(3), method=given, **QUIET)


@pytest.mark.parametrize(
    "given", ["adam", {"lr": 0.1}, None, pyro.optim.Adam, torch.optim.Adam([torch.zeros(1, requires_grad=True)])]
)
def test_an_optimiser_of_a_phase_is_one(given: Any) -> None:
    with pytest.raises(VFEError, match=r"optim= is .*, which makes no optimiser.*Pass one of Pyro's"):
        vfe.Gradient(given, 3)


def test_what_makes_an_optimiser_of_pyros_is_to_be_called() -> None:
    with pytest.raises(VFEError, match=r"the function Adam, which makes an optimiser.*Call it: pyro.optim.Adam\(\{"):
        fit(model, guide, U, optim=pyro.optim.Adam)


def test_free_energy_is_made_before_it_is_asked() -> None:
    for call in (
        lambda: vfe.FreeEnergy(model, guide),  # type: ignore[arg-type]
        lambda: vfe.FreeEnergy("vimco"),  # type: ignore[arg-type]
        lambda: pyro.infer.SVI(model, guide, adam(), loss=vfe.FreeEnergy).step(U),
        lambda: vfe.FreeEnergy.decompose(model, guide, U),  # type: ignore[arg-type]
        lambda: vfe.EM.run(U),  # type: ignore[arg-type]
    ):
        with pytest.raises(VFEError, match=r"vfe.FreeEnergy\(|Pass a whole number|vfe.EM\(...\).run\(...\)"):
            call()


@pytest.mark.parametrize("name", ENTRIES)
def test_data_that_a_program_does_not_take_are_told(name: str) -> None:
    def lacks_data() -> None:
        pass

    with pytest.raises(VFEError, match=r"The (guide|model), which takes \(u\), cannot be called.*argument: 'u'"):
        ENTRIES[name](model, guide)
    with pytest.raises(VFEError, match=r"The model, which takes \(u\), cannot.*too many positional arguments"):
        ENTRIES[name](model, guide, U, U)
    with pytest.raises(VFEError, match=r"The guide, which takes \(\), cannot be called.*Let the guide take"):
        ENTRIES[name](model, lacks_data, U)


def test_what_a_call_lacks_is_named() -> None:
    with pytest.raises(
        VFEError, match=r"WakeSleep is missing a required argument: 'optim_guide'.*Its arguments are: model"
    ):
        vfe.WakeSleep(model, guide, adam())  # type: ignore[call-arg]
    with pytest.raises(VFEError, match=r"fit is missing a required argument: 'num_steps'.*Its arguments are: model"):
        vfe.fit(model, guide, U, optim=adam())  # type: ignore[call-arg]
    with pytest.raises(VFEError, match=r"posterior is missing a required argument: 'model'"):
        vfe.posterior()  # type: ignore[call-arg]


@pytest.mark.parametrize("num_samples", [0, -1])
def test_a_posterior_is_drawn_from_once_at_least(num_samples: int) -> None:
    with pytest.raises(VFEError, match=f"num_samples is {num_samples}. Draw one at least"):
        vfe.posterior(model, U).sample(num_samples)


def test_edges_that_are_none_are_told() -> None:
    with pytest.raises(StructureError, match="AutoStructured was given edges=3"):
        vfe.AutoStructured(model, edges=3)  # type: ignore[arg-type]


def test_an_error_within_a_program_is_its_own() -> None:
    with pytest.raises(TypeError, match="has no len") as caught:
        vfe.posterior(lambda u: model(len(3)), U)  # type: ignore[arg-type]
    assert caught.value.__cause__ is None


def test_programs_among_the_data_are_told() -> None:
    with pytest.raises(VFEError, match=r"posterior was given the function guide among the data.*After the model come"):
        vfe.posterior(model, guide, U)
    with pytest.raises(VFEError, match=r"EM.run was given the function model among the data.*It has its programs"):
        vfe.EM(model).run(model, U)
    with pytest.raises(VFEError, match=r"EM was given a Tensor after its positional arguments \(model, guide\)"):
        vfe.EM(model, guide, U)  # type: ignore[misc]


def test_a_function_may_be_data() -> None:
    def of_a_function(u: Tensor, rate: Callable[[Tensor], Tensor]) -> None:
        with pyro.plate("data", len(u)):
            v = pyro.sample("v", dist.Categorical(torch.ones(2, dtype=torch.float64) / 2))
            pyro.sample("u", dist.Poisson(rate(v)), obs=u)

    rates = torch.tensor([1.0, 9.0], dtype=torch.float64)
    found = vfe.posterior(of_a_function, U, lambda v: rates[v]).log_evidence
    assert found.item() == pytest.approx(vfe.posterior(model, U).log_evidence.item())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: vfe.EM(model).run(U, max_iters=3), r"EM.run was given max_iters=.*Did you mean max_iter=\?"),
        (lambda: vfe.EM(model).run(U, progress=False), "Did you mean progress_bar="),
        (lambda: vfe.EM(model).run(U, e_phase=vfe.Hard()), r"It is an option of EM: vfe.EM\(..., e_phase=...\)"),
        (lambda: vfe.EM(model, max_iter=3), r"an option of EM.run: vfe.EM\(...\).run\(..., max_iter=...\)"),
        (lambda: vfe.EM(model).run_batches([U], num_epoch=3), "Did you mean num_epochs="),
        (lambda: vfe.fit(model, guide, U, optim=adam(), num_step=3), "fit was given num_step=.*num_steps="),
        (lambda: fit(model, guide, U, loss=vfe.FreeEnergy()), r"Did you mean elbo=\?"),
        (lambda: fit(model, guide, U, callbacks=print), "Did you mean callback="),
        (lambda: vfe.WakeSleep(model, guide, adam(), adam()).run(U, steps=3), "Did you mean num_steps="),
        (lambda: vfe.posterior(model, U, max_byte=1e9), "Did you mean max_bytes="),
        (lambda: vfe.bounds(model, guide, U, num_particle=3), "Did you mean num_particles="),
        (lambda: vfe.to_datatree(model, guide, U, num_sample=3), "Did you mean num_samples="),
        (lambda: vfe.to_inference_data(model, guide, U, num_sample=3), "Did you mean num_samples="),
        (lambda: vfe.dream(model, U, dream_to_arg=print), "Did you mean dream_to_args="),
        (lambda: vfe.explain(model, guide, U, max_byte=1), "Did you mean max_bytes="),
        (lambda: vfe.FreeEnergy().loss(model, guide, U, num_particles=3), "It is an option of FreeEnergy: vfe.Free"),
        (lambda: vfe.Monitor(model, guide, evry=3), "Did you mean every="),
        (lambda: vfe.posterior(model, data=U), "Its options are: check, max_bytes"),
    ],
)
def test_an_option_that_is_none_is_told_with_the_one_that_was_meant(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(VFEError, match=words):
        call()


def test_what_the_model_takes_is_handed_on() -> None:
    def steps_of(u: Tensor, max_iters: int = 1, **others: Any) -> None:
        model(u * max_iters)

    doubled = vfe.posterior(model, 2 * U).log_evidence
    assert vfe.posterior(steps_of, U, max_iters=2).log_evidence == doubled
    assert vfe.posterior(steps_of, U, max_iters=2, max_byte=3).log_evidence == doubled
    assert em(partial(steps_of, max_iters=2), None, U).history.free_energy[0] == pytest.approx(-float(doubled))


@pytest.mark.parametrize(
    "call",
    [
        lambda: vfe.EM(model).run(U, max_iter="5"),
        lambda: vfe.EM(model).run(U, tol=None),
        lambda: vfe.EM(model).run(U, n_init=2.5),
        lambda: vfe.EM(model).run(U, callback=3),
        lambda: vfe.EM(model, floor="small"),
        lambda: vfe.EM(model, fixed=3),
        lambda: vfe.EM(model, check="allways"),
        lambda: vfe.posterior(model, U, max_bytes="1GB"),
        lambda: vfe.posterior(model, U).sample("3"),
        lambda: vfe.bounds(model, guide, U, num_particles="3"),
        lambda: vfe.WakeSleep(model, guide, adam(), adam(), insomnia="x"),
        lambda: vfe.WakeSleep(model, guide, adam(), adam(), dream_to_args=3),
        lambda: vfe.to_datatree(model, guide, U, dims=3),
        lambda: vfe.AutoMeanField(model, init="x"),
        lambda: vfe.MonteCarlo("3"),
        lambda: vfe.Annealed(0.5),
        lambda: vfe.Online("x"),
        lambda: vfe.Settled(tol="x"),
        lambda: vfe.GapBelow(None),
        lambda: vfe.Numerical(max_iter=None),
        lambda: vfe.Gradient(adam(), "3"),
    ],
)
def test_a_value_of_another_kind_is_told_with_what_to_pass(call: Callable[[], Any]) -> None:
    with pytest.raises(VFEError, match=r"was given (the schedule )?.*(Pass|Give)"):
        call()


def test_a_whole_number_may_be_written_as_a_float() -> None:
    assert vfe.EM(model).run(U, max_iter=1e3, n_init=2.0, **QUIET).converged
