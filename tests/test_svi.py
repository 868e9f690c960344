"""FreeEnergy where TraceEnum_ELBO stands: in SVI, as a module, under torch.optim, and when a step fails."""

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import gradients, oracle
from programs import BAD_PROGRAMS, INFINITE, PROGRAMS, BadProgram
from programs.case import categorical, empty, noise, positive, real, simplex, tensor
from programs.networks import POINTS, MixtureModule, RecognitionModule
from programs.plates import COUNTS, mixture, mixture_guide
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from pyro.infer.elbo import ELBO
from torch import Tensor

import pyro_vfe as vfe
from pyro_vfe.errors import VFEError

LEARNABLE = ("mixture", "mixture_guided", "chain", "chain_mean_field", "global_guided", "subsampled_guided")
TWICE = (
    "mixture_of_one_datum",
    "mixed_globals_guided",
    "global_guided",
    "alarm_or_summed_out",
    "branch_in_both",
    "crossing_site_alone",
)


def parameters() -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in pyro.get_param_store().named_parameters()}


def trajectory(loss: Any, model: Callable[..., Any], guide: Callable[..., Any], args: Any) -> list[Any]:
    """The losses and the parameters after each of 8 steps from the programs' own start."""
    pyro.clear_param_store()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=loss)
    return [(svi.step(*args), parameters()) for _ in range(8)]


@pytest.mark.parametrize("name", LEARNABLE)
def test_SVI_takes_the_same_steps_as_with_TraceEnum_ELBO(name: str) -> None:
    program = PROGRAMS[name]
    elbo = TraceEnum_ELBO(max_plate_nesting=program.pyro_nesting)
    guided = set(pyro.poutine.trace(program.guide).get_trace(*program.args).nodes)
    model = pyro.poutine.infer_config(
        program.model, lambda site: {} if site["name"] in guided else {"enumerate": "parallel"}
    )
    theirs = trajectory(elbo, model, config_enumerate(program.guide, default="parallel"), program.args)
    ours = trajectory(vfe.FreeEnergy(), program.model, program.guide, program.args)
    for (loss, values), (their_loss, their_values) in zip(ours, theirs, strict=True):
        assert loss == pytest.approx(their_loss, rel=1e-9)
        torch.testing.assert_close(values, their_values, rtol=1e-8, atol=1e-9)


def test_an_ELBO_module_trains_PyroModules_under_torch_optim() -> None:
    def losses(elbo: ELBO, annotate: Callable[..., Any]) -> list[float]:
        module = elbo(annotate(MixtureModule()), annotate(RecognitionModule()))
        module(POINTS)
        optimizer = torch.optim.Adam(module.parameters(), lr=0.03)
        found = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = module(POINTS)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    with pyro.settings.context(module_local_params=True):
        ours = losses(vfe.FreeEnergy(), lambda module: module)
        theirs = losses(TraceEnum_ELBO(max_plate_nesting=1), _enumerated)
        assert not list(pyro.get_param_store().keys())
    assert ours == pytest.approx(theirs, rel=1e-9)
    assert ours[-1] < ours[0]


def _enumerated(module: Any) -> Any:
    """The module, with Pyro's enumeration of its sites switched on in a guide."""
    if isinstance(module, RecognitionModule):
        module.forward = config_enumerate(module.forward, default="parallel")
    return module


def test_an_ELBO_module_holds_the_parameters_of_both_modules() -> None:
    with pyro.settings.context(module_local_params=True):
        model, guide = MixtureModule(), RecognitionModule()
        module = vfe.FreeEnergy()(model, guide)
        module(POINTS).backward()
        held = {id(parameter) for parameter in module.parameters()}
        assert held == {id(p) for part in (model, guide) for p in part.parameters()}
        assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize("name", TWICE)
def test_second_derivatives_equal_those_of_the_full_joint_table(name: str) -> None:
    program = PROGRAMS[name]
    expected = curvature(oracle(program.model, program.guide, *program.args).terms["free_energy"])
    found = curvature(vfe.FreeEnergy().differentiable_loss(program.model, program.guide, *program.args))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def curvature(loss: Tensor) -> dict[str, Tensor]:
    """The gradient of the loss's squared gradient: twice the Hessian times the gradient."""
    leaves = [leaf for _, leaf in pyro.get_param_store().named_parameters()]
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    return gradients(sum((grad**2).sum() for grad in first))


def test_the_differentiable_loss_can_be_differentiated_again() -> None:
    loss = vfe.FreeEnergy().differentiable_loss(mixture, mixture_guide, COUNTS)
    first = gradients(loss)
    torch.testing.assert_close(gradients(loss), first, rtol=0, atol=0)
    torch.testing.assert_close(gradients(3 * loss), {name: 3 * grad for name, grad in first.items()})


def test_retain_graph_is_passed_to_backward() -> None:
    leaf = noise(3, seed=1).requires_grad_(True)
    shared = leaf.exp()

    def model() -> None:
        z = categorical("z", tensor([0.2, 0.3, 0.5]))
        pyro.sample("u", dist.Poisson(shared[z]), obs=tensor(2.0))

    keeping = vfe.FreeEnergy(retain_graph=True)
    keeping.loss_and_grads(model, empty)
    once = leaf.grad.clone()
    keeping.loss_and_grads(model, empty)
    torch.testing.assert_close(leaf.grad, 2 * once)
    forgetting = vfe.FreeEnergy()
    forgetting.loss_and_grads(model, empty)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        forgetting.loss_and_grads(model, empty)


def test_the_constructor_takes_the_arguments_of_TraceEnum_ELBO_with_their_defaults() -> None:
    theirs = {name: p.default for name, p in inspect.signature(TraceEnum_ELBO).parameters.items()}
    del theirs["max_iarange_nesting"]  # Pyro's deprecated name for max_plate_nesting.
    ours = {name: p.default for name, p in inspect.signature(vfe.FreeEnergy).parameters.items()}
    assert {name: ours[name] for name in theirs} == theirs


@pytest.mark.parametrize(
    "options",
    [
        {"max_plate_nesting": 1},
        {"max_plate_nesting": 4},
        {"ignore_jit_warnings": True},
        {"jit_options": {"check_trace": False}},
        {"retain_graph": True},
        {"tail_adaptive_beta": 0.5},
        {"strict_enumeration_warning": False},
        {"num_particles": 3},
        {"num_particles": 3, "vectorize_particles": True},
    ],
    ids=str,
)
def test_no_argument_of_TraceEnum_ELBO_changes_an_exact_free_energy(options: dict[str, Any]) -> None:
    expected = oracle(mixture, mixture_guide, COUNTS[:2]).terms["free_energy"]
    elbo = vfe.FreeEnergy(**options)
    assert elbo.loss(mixture, mixture_guide, COUNTS[:2]) == pytest.approx(expected.item(), rel=1e-10)
    found = gradients(elbo.differentiable_loss(mixture, mixture_guide, COUNTS[:2]))
    torch.testing.assert_close(found, gradients(expected), rtol=1e-8, atol=1e-8)


def nothing_discrete() -> None:
    pyro.sample("u", dist.Normal(real("loc", seed=1), 1.0), obs=tensor(0.3))


def test_a_program_without_discrete_latents_warns_that_nothing_is_enumerated() -> None:
    with pytest.warns(UserWarning, match="no discrete latent"):
        loss = vfe.FreeEnergy().loss(nothing_discrete, empty)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        silent = vfe.FreeEnergy(strict_enumeration_warning=False).loss(nothing_discrete, empty)
        vfe.FreeEnergy().loss(mixture, empty, COUNTS)
    expected = -dist.Normal(noise(seed=1), 1.0).log_prob(tensor(0.3))
    assert loss == silent == pytest.approx(expected.item(), rel=1e-12)


def impossible_label() -> None:
    z = categorical("z", simplex("z_probs", 2))
    pyro.sample("u", dist.Categorical(tensor([[0.5, 0.5, 0.0], [0.9, 0.1, 0.0]])[z]), obs=torch.tensor(2))


def starts_at_nan() -> None:
    rate = pyro.param("rate", tensor([1.0, torch.nan]))
    z = categorical("z", simplex("z_probs", 2))
    pyro.sample("u", dist.Normal(rate[z], 1.0), obs=tensor(2.0))


_MISSED = INFINITE["or_missed_by_the_guide"]
FAILING = {
    "infinite_gap": BadProgram(_MISSED.model, _MISSED.guide, ("'rings'", "summed out inside the model"), _MISSED.args),
    "impossible_data": BadProgram(impossible_label, empty, ("'u'", "probability zero")),
    "nan_parameter": BadProgram(starts_at_nan, empty, ("'rate'", "NaN")),
    "nan_factor": BAD_PROGRAMS["nan_factor"],
}


@pytest.mark.parametrize("name", FAILING)
def test_a_step_that_fails_names_the_site_and_leaves_parameters_and_gradients_untouched(name: str) -> None:
    program = FAILING[name]
    svi = SVI(program.model, program.guide, pyro.optim.Adam({"lr": 0.1}), loss=vfe.FreeEnergy())
    with pytest.raises(VFEError):
        svi.step(*program.args)
    before, leaves = parameters(), dict(pyro.get_param_store().named_parameters())
    assert before
    assert all(leaf.grad is None for leaf in leaves.values())
    for leaf in leaves.values():
        leaf.grad = torch.full_like(leaf, 7.0)
    with pytest.raises(VFEError) as refusal:
        svi.step(*program.args)
    assert all(word in str(refusal.value) for word in program.words)
    torch.testing.assert_close(parameters(), before, rtol=0, atol=0, equal_nan=True)
    assert all(bool((leaf.grad == 7.0).all()) for leaf in leaves.values())


class OwnError(ValueError):
    """An error of the user's own kind."""


OWN_ERRORS = (OwnError, ValueError, KeyError, IndexError, RuntimeError, ZeroDivisionError, NotImplementedError)


@pytest.mark.parametrize("kind", OWN_ERRORS)
@pytest.mark.parametrize("at_call", [1, 2])
def test_an_exception_of_the_users_own_passes_through_unchanged(kind: type[Exception], at_call: int) -> None:
    error = kind("the file of counts is empty")

    def model(counts: Tensor, fails: bool) -> None:
        mixture(counts)
        if fails:
            raise error

    elbo = vfe.FreeEnergy()
    for _ in range(at_call - 1):
        elbo.loss_and_grads(model, empty, COUNTS, False)
    with pytest.raises(kind) as caught:
        elbo.loss_and_grads(model, empty, COUNTS, True)
    assert caught.value is error


@pytest.mark.parametrize("name", ["mixture_guided", "chain_mean_field", "branch_in_both", "factorial_chain"])
def test_a_program_without_draws_leaves_the_random_stream_where_it_was(name: str) -> None:
    program, elbo = PROGRAMS[name], vfe.FreeEnergy()
    found = []
    for call in (elbo.loss, elbo.loss, elbo.loss_and_grads, elbo.decompose, elbo.loss):
        pyro.set_rng_seed(3)
        call(program.model, program.guide, *program.args)
        found.append(torch.rand(()).item())
    pyro.set_rng_seed(3)
    assert found == [torch.rand(()).item()] * 5


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda elbo: pickle.loads(pickle.dumps(elbo))], ids=["copy", "pickle"]
)
def test_a_copy_computes_the_same(copied: Callable[[Any], Any], used: bool) -> None:
    elbo = vfe.FreeEnergy(max_bytes=1e9, retain_graph=True, check="always")
    expected = oracle(mixture, mixture_guide, COUNTS[:2]).terms["free_energy"].item()
    if used:
        elbo.loss(mixture, mixture_guide, COUNTS[:2])
    other = copied(elbo)
    assert (other.max_bytes, other.retain_graph) == (1e9, True)
    assert other.loss(mixture, mixture_guide, COUNTS[:2]) == pytest.approx(expected, rel=1e-10)
    assert elbo.loss(mixture, mixture_guide, COUNTS[:2]) == pytest.approx(expected, rel=1e-10)


@pytest.mark.filterwarnings("ignore:At each of the last 9 calls")
def test_programs_that_come_and_go_are_not_taken_for_one_another() -> None:
    elbo = vfe.FreeEnergy()
    for size in range(2, 70):
        probs = noise(size % 7 + 2, seed=size).softmax(-1)
        expected = -(probs @ dist.Normal(torch.arange(float(len(probs))), 1.0).log_prob(tensor(1.5)).exp()).log()
        assert elbo.loss(partial(labelled, probs), empty) == pytest.approx(expected.item(), rel=1e-12)


def labelled(probs: Tensor) -> None:
    z = categorical("z", probs)
    pyro.sample("u", dist.Normal(z.double(), 1.0), obs=tensor(1.5))


def test_more_steps_lower_the_free_energy_to_the_maximum_likelihood() -> None:
    def model(labels: Tensor) -> None:
        with pyro.plate("data", len(labels)):
            z = pyro.sample("z", dist.Categorical(simplex("weights", 2)))
            pyro.sample("u", dist.Categorical(tensor([[0.9, 0.1], [0.1, 0.9]])[z]), obs=labels)

    labels = torch.tensor([0] * 6 + [1] * 4)
    svi = SVI(model, empty, pyro.optim.Adam({"lr": 0.1}), loss=vfe.FreeEnergy())
    losses = [svi.step(labels) for _ in range(150)]
    assert losses[-1] == pytest.approx(-(6 * tensor(0.6).log() + 4 * tensor(0.4).log()).item(), rel=1e-6)


def test_positive_parameters_stay_in_their_range() -> None:
    svi = SVI(mixture, mixture_guide, pyro.optim.Adam({"lr": 0.5}), loss=vfe.FreeEnergy())
    first = svi.evaluate_loss(COUNTS)
    for _ in range(20):
        svi.step(COUNTS)
    assert svi.evaluate_loss(COUNTS) < first
    assert bool((positive("rates", 3) > 0).all())
    assert simplex("weights", 3).sum().item() == pytest.approx(1.0)
