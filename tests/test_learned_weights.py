"""Weights of sites (poutine.scale) that parameters, draws or latents decide: in value and in gradient."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from pyro.poutine import scale
from torch import Tensor, tensor

import pyro_vfe as vfe
from pyro_vfe.engine.factors import Table
from pyro_vfe.engine.logspace import weighted
from pyro_vfe.errors import ScaleError, SpotCheckError
from pyro_vfe.learning.machine import Machine
from pyro_vfe.learning.wake_phase import ReweightedWake, Wake

Program = Callable[..., Any]

POSITIVE = dist.constraints.positive
LOC, PRIOR = tensor([-1.0, 1.0]).double(), tensor([0.3, 0.7], dtype=torch.float64)
U, DATA = tensor(0.3, dtype=torch.float64), tensor([0.3, 1.2, -0.7, 2.2, -1.5], dtype=torch.float64)


def categorical(name: str, probs: Tensor) -> Tensor:
    return pyro.sample(name, dist.Categorical(probs), infer={"enumerate": "parallel"})


def weight(value: float = 1.7) -> Tensor:
    return pyro.param("w", tensor(value), constraint=POSITIVE)


def weights() -> Tensor:
    return pyro.param("p", tensor([0.5, 2.0]))


def observe(z: Tensor) -> None:
    pyro.sample("u", dist.Normal(LOC[z], 1.0), obs=U)


def nothing(*args: Any) -> None:
    pass


def of_z(*args: Any) -> None:
    categorical("z", pyro.param("q", tensor([0.4, 0.6]), constraint=dist.constraints.simplex))


def q_v() -> Tensor:
    a = pyro.param("a", tensor(0.4))
    return torch.stack([1 - a, a])


def of_v_and_z() -> None:
    categorical("v", q_v())
    of_z()


def all_of_it() -> None:
    with scale(scale=weight()):
        observe(categorical("z", PRIOR))


def data_alone() -> None:
    z = categorical("z", PRIOR)
    with scale(scale=weight()):
        observe(z)


def a_latent_decides() -> None:
    v, z = categorical("v", tensor([0.7, 0.3])), categorical("z", PRIOR)
    with scale(scale=weights()[v]):
        observe(z)


def a_branch_decides() -> None:
    v, z = categorical("v", tensor([0.7, 0.3])), categorical("z", PRIOR)
    with scale(scale=weights()[1] if v else weights()[0]):
        observe(z)


def a_latent_decides_another() -> None:
    v = categorical("v", tensor([0.7, 0.3]))
    with scale(scale=weights()[v]):
        z = categorical("z", PRIOR)
    observe(z)


def a_branch_decides_another() -> None:
    v = categorical("v", tensor([0.7, 0.3]))
    with scale(scale=weights()[1] if v else weights()[0]):
        z = categorical("z", PRIOR)
    observe(z)


def guide_of_another() -> None:
    v = categorical("v", q_v())
    with scale(scale=weights()[v]):
        of_z()


def guide_of_another_by_branches() -> None:
    v = categorical("v", q_v())
    with scale(scale=weights()[1] if v else weights()[0]):
        of_z()


def and_one_that_the_model_sums() -> None:
    a_latent_decides_another()
    y = categorical("y", tensor([0.25, 0.75]))
    pyro.sample("x", dist.Normal(LOC[y], 2.0), obs=tensor(1.2))


def value_and_gradients(
    elbo: Any, model: Program, guide: Program, *args: Any, **start: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    pyro.clear_param_store()
    for name, value in start.items():
        pyro.param(name, value)
    loss = elbo.differentiable_loss(model, guide, *args)
    leaves = {name: pyro.get_param_store()._params[name] for name in sorted(pyro.get_param_store().keys())}
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True, allow_unused=True)
    return loss.detach(), dict(zip(leaves, gradients, strict=True))


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad:UserWarning")  # in Pyro
@pytest.mark.parametrize(
    ("model", "guide"),
    [
        (all_of_it, nothing),
        (data_alone, of_z),
        (a_latent_decides, of_v_and_z),
        (a_latent_decides_another, guide_of_another),
        (and_one_that_the_model_sums, guide_of_another),
    ],
)
def test_a_weight_with_a_gradient_has_the_value_and_the_gradient_of_pyro(model: Program, guide: Program) -> None:
    pyros = value_and_gradients(TraceEnum_ELBO(max_plate_nesting=0), model, guide)
    torch.testing.assert_close(value_and_gradients(vfe.FreeEnergy(), model, guide), pyros)


@pytest.mark.parametrize("values", [(0.5, 2.0), (1.0, 1.0)])
@pytest.mark.parametrize(
    ("branching", "plain", "guide", "plain_guide"),
    [
        (a_branch_decides, a_latent_decides, of_v_and_z, of_v_and_z),
        (a_branch_decides_another, a_latent_decides_another, guide_of_another_by_branches, guide_of_another),
    ],
)
def test_a_weight_that_a_branch_decides_is_that_of_each_branch(
    branching: Program, plain: Program, guide: Program, plain_guide: Program, values: tuple[float, ...]
) -> None:
    """Branches whose weights are equal in value differ in their derivatives."""
    start = tensor(values)
    found = value_and_gradients(vfe.FreeEnergy(), branching, guide, p=start)
    torch.testing.assert_close(found, value_and_gradients(vfe.FreeEnergy(), plain, plain_guide, p=start))


def test_one_learned_weight_around_a_branch_is_one_weight() -> None:
    """Each branch reads the parameter anew; that the latent is summed in the model needs one weight for all of them."""

    def model() -> None:
        v = categorical("v", tensor([0.7, 0.3]))
        loc = tensor([-1.0, 1.0]) if v else tensor([0.5, 2.0])
        with scale(scale=weight(1.3)):
            pyro.sample("u", dist.Normal(loc[categorical("z", PRIOR)], 1.0), obs=U)

    def guide() -> None:
        categorical("v", q_v())

    loss, gradients = value_and_gradients(vfe.FreeEnergy(), model, guide)
    a, w = tensor(0.4, requires_grad=True), tensor(1.3, requires_grad=True)
    q = torch.stack([1 - a, a])
    logs = torch.stack([_log_mean(loc) for loc in ([0.5, 2.0], [-1.0, 1.0])])
    expected = (q * (q / tensor([0.7, 0.3])).log()).sum() - w * (q * logs).sum()
    of_a, of_w = torch.autograd.grad(expected, [a, w])
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradients, {"a": of_a, "w": of_w * 1.3})  # in log w


def _log_mean(loc: list[float]) -> Tensor:
    return (PRIOR.log() + dist.Normal(tensor(loc), 1.0).log_prob(U)).logsumexp(0)


@pytest.mark.parametrize("beta", [1.0, 0.6])
def test_annealing_has_its_gradient_where_the_weight_is_one_too(beta: float) -> None:
    def model() -> None:
        with scale(scale=pyro.param("beta", tensor(beta))):
            z = categorical("z", PRIOR)
        observe(z)

    _, gradients = value_and_gradients(vfe.FreeEnergy(), model, nothing)
    b = tensor(beta, requires_grad=True)
    expected = -b * (PRIOR.log() + dist.Normal(LOC, 1.0).log_prob(U) / b).logsumexp(0)
    torch.testing.assert_close(gradients["beta"], torch.autograd.grad(expected, b)[0])


def test_an_impossible_value_teaches_a_weight_nothing() -> None:
    def model() -> None:
        z = categorical("z", tensor([0.2, 0.3, 0.5]))
        with scale(scale=pyro.param("w", tensor(1.5))):
            pyro.sample("u", dist.Bernoulli(tensor([0.0, 0.4, 0.7])[z]), obs=tensor(1.0))

    def guide() -> None:
        categorical("z", tensor([0.0, 0.6, 0.4]))

    _, gradients = value_and_gradients(vfe.FreeEnergy(), model, guide)
    torch.testing.assert_close(gradients["w"], -(tensor([0.6, 0.4]) * tensor([0.4, 0.7]).log()).sum())


def test_a_weight_of_zero_learns_what_is_possible() -> None:
    weight = torch.zeros((), requires_grad=True)
    table = weighted(Table(tensor([-torch.inf, -2.0]), ("z",)), Table(weight, ()))
    torch.testing.assert_close(table.values.detach(), tensor([0.0, 0.0]))
    torch.testing.assert_close(torch.autograd.grad(table.values.sum(), weight)[0], tensor(-2.0))


def test_a_weight_for_each_element_of_a_plate_may_be_all_that_tells_them_apart() -> None:
    own = tensor([0.5, 2.0, 1.5])

    def model(around_latents: bool) -> None:
        with pyro.plate("data", 3):
            with scale(scale=pyro.param("own", own) if around_latents else tensor(1.0)):
                z = categorical("z", PRIOR)
            with scale(scale=tensor(1.0) if around_latents else pyro.param("own", own)):
                observe(z)

    for around_latents in (False, True):
        loss, gradients = value_and_gradients(vfe.FreeEnergy(), model, nothing, around_latents)
        c = own.clone().requires_grad_()
        log_u = dist.Normal(LOC, 1.0).log_prob(U)
        if around_latents:
            expected = -(c * (PRIOR.log() + log_u / c[:, None]).logsumexp(-1)).sum()
        else:
            expected = -(PRIOR.log() + c[:, None] * log_u).logsumexp(-1).sum()
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(gradients["own"], torch.autograd.grad(expected, c)[0])


@pytest.mark.parametrize("plated", [False, True])
def test_the_latents_of_a_loop_have_one_learned_weight(plated: bool) -> None:
    transition, own = tensor([[0.7, 0.3], [0.2, 0.8]]), tensor([1.0, 1.0, 2.5] if plated else [1.3])
    series = torch.randn(12)

    def model() -> None:
        w = pyro.param("own", own)
        with pyro.plate("sequences", len(own)):
            z = torch.zeros(len(own), dtype=torch.long)
            for t in range(12):
                with scale(scale=w if plated else w[0]):
                    z = categorical(f"z_{t}", transition[z])
                pyro.sample(f"u_{t}", dist.Normal(LOC[z], 1.0), obs=series[t])

    loss, gradients = value_and_gradients(vfe.FreeEnergy(), model, nothing)
    c = own.clone().requires_grad_()
    alpha = transition[0].log().expand(len(own), 2)
    for t in range(12):
        emitted = alpha + dist.Normal(LOC, 1.0).log_prob(series[t]) / c[:, None]
        alpha = (emitted[:, :, None] + transition.log()).logsumexp(1)
    expected = -(c * emitted.logsumexp(-1)).sum()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradients["own"], torch.autograd.grad(expected, c)[0])


def test_a_draw_that_decides_a_weight_has_the_cost_that_it_weighs() -> None:
    """On average over draws the gradient is that of the sum over their values."""

    def drawn(program: Program) -> Program:
        return pyro.poutine.infer_config(program, lambda site: {"enumerate": None} if site["name"] == "v" else {})

    elbo = vfe.FreeEnergy(num_particles=4000, vectorize_particles=True)
    for model, guide in ((a_latent_decides, of_v_and_z), (a_latent_decides_another, guide_of_another)):
        _, exact = value_and_gradients(vfe.FreeEnergy(), model, guide)
        _, found = value_and_gradients(elbo, drawn(model), drawn(guide))
        for name, gradient in exact.items():
            torch.testing.assert_close(found[name], gradient, rtol=0.05, atol=0.05)


def test_a_weight_that_is_drawn_has_the_gradient_along_the_draw() -> None:
    def model() -> None:
        w = pyro.sample("w", dist.Gamma(2.0, 2.0))
        with scale(scale=w):
            observe(categorical("z", PRIOR))

    def guide() -> None:
        pyro.sample("w", dist.LogNormal(pyro.param("m", tensor(0.4)), 0.3))

    pyro.set_rng_seed(1)
    loss, gradients = value_and_gradients(vfe.FreeEnergy(), model, guide)
    pyro.set_rng_seed(1)
    m = tensor(0.4, requires_grad=True)
    w = dist.LogNormal(m, 0.3).rsample()
    expected = dist.LogNormal(m, 0.3).log_prob(w) - dist.Gamma(2.0, 2.0).log_prob(w) - w * _log_mean([-1.0, 1.0])
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradients["m"], torch.autograd.grad(expected, m)[0])


def test_a_latent_weighed_by_another_has_a_free_energy_and_no_split_and_data_weighed_by_it_have_both() -> None:
    marked = vfe.FreeEnergy().decompose(a_latent_decides_another, guide_of_another)
    assert marked.unsplit is not None
    assert "'z' has a scale that varies with 'v'" in marked.unsplit
    assert marked.surprise.isnan()
    torch.testing.assert_close(
        marked.free_energy, tensor(vfe.FreeEnergy().loss(a_latent_decides_another, guide_of_another))
    )
    with pytest.raises(ScaleError, match="'z' has a scale that varies with 'v'"):
        vfe.FreeEnergy().loss(a_latent_decides_another, lambda: categorical("v", q_v()))
    terms = vfe.FreeEnergy().decompose(a_latent_decides, of_v_and_z)
    log_u = weights()[:, None] * dist.Normal(LOC, 1.0).log_prob(U)
    evidence = (tensor([0.7, 0.3]).log()[:, None] + PRIOR.log() + log_u).logsumexp((0, 1))
    torch.testing.assert_close(terms.surprise, -evidence.detach())
    torch.testing.assert_close(terms.free_energy, tensor(vfe.FreeEnergy().loss(a_latent_decides, of_v_and_z)))


def test_a_weight_that_leaves_torch_unseen_is_found_by_the_spot_check() -> None:
    calls = iter(range(1, 100))

    def model() -> None:
        z = categorical("z", PRIOR)
        with scale(scale=float(next(calls))):
            observe(z)

    with pytest.raises(SpotCheckError, match="Site 'u'"):
        vfe.FreeEnergy().loss(model, None)


def learns_the_weight_of_its_data(data: Tensor) -> None:
    w, loc = weight(0.7), pyro.param("loc", LOC.clone())
    with pyro.plate("data", len(data)):
        z = categorical("z", PRIOR)
        with scale(scale=w):
            pyro.sample("u", dist.Normal(loc[z], 1.0), obs=data)
    pyro.factor("prior", 8 * w.log())


def learns_the_weight_of_its_latents(data: Tensor, held: bool = False) -> None:
    w, loc = weight(0.7), pyro.param("loc", LOC.clone())
    with pyro.plate("data", len(data)), scale(scale=w.detach() if held else w):
        z = categorical("z", PRIOR)
        pyro.sample("u", dist.Normal(loc[z], 1.0), obs=data)


def test_em_learns_the_weight_of_its_data() -> None:
    run = vfe.EM(learns_the_weight_of_its_data).run(DATA, tol=1e-12, progress_bar=False)
    w, loc = (run.params[name].clone().requires_grad_() for name in ("w", "loc"))
    logs = PRIOR.log() + w * dist.Normal(loc, 1.0).log_prob(DATA[:, None])
    expected = -logs.logsumexp(-1).sum() - 8 * w.log()
    assert run.free_energy == pytest.approx(expected.item())
    for slope in torch.autograd.grad(expected, [w, loc]):
        torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-4)
    assert abs(w.item() - 0.7) > 0.1


def test_em_refuses_to_learn_the_weight_of_a_latent_and_holds_it() -> None:
    with pytest.raises(ScaleError, match=r"The weight of latent site 'z'.*depends on a parameter"):
        vfe.EM(learns_the_weight_of_its_latents).run(DATA, progress_bar=False)
    pyro.clear_param_store()
    detached = vfe.EM(learns_the_weight_of_its_latents).run(DATA, held=True, tol=1e-12, progress_bar=False)
    pyro.clear_param_store()
    fixed = vfe.EM(learns_the_weight_of_its_latents, fixed=["w"]).run(DATA, tol=1e-12, progress_bar=False)
    torch.testing.assert_close(detached.params["loc"], fixed.params["loc"])
    pyro.clear_param_store()
    svi = vfe.fit(
        learns_the_weight_of_its_latents,
        nothing,
        DATA,
        optim=pyro.optim.Adam({"lr": 0.02}),
        num_steps=5,
        progress_bar=False,
    )
    assert svi.params["w"].item() != 0.7


def guide_of_data(data: Tensor) -> None:
    with pyro.plate("data", len(data)):
        of_z()


def weighed_guide_of_data(data: Tensor) -> None:
    with scale(scale=weight(0.7)):
        guide_of_data(data)


def _machine(model: Program, guide: Program) -> Machine:
    return Machine(model, guide, check="first", max_bytes=None, on_cost="raise", weighs_data=False)


def test_wake_phases_learn_the_weight_of_data() -> None:
    pyro.clear_param_store()
    Wake(_machine(learns_the_weight_of_its_data, guide_of_data), 1).loss_and_grads(nothing, nothing, DATA)
    awake = pyro.get_param_store()._params["w"].grad
    pyro.clear_param_store()
    reweighted = ReweightedWake(_machine(learns_the_weight_of_its_data, guide_of_data), 1, 0.0)
    reweighted.loss_and_grads(nothing, nothing, DATA)
    learned = pyro.get_param_store()._params["w"].grad
    w = tensor(0.7, requires_grad=True)
    log_u = dist.Normal(LOC, 1.0).log_prob(DATA[:, None])
    expected = -(tensor([0.4, 0.6]) * w * log_u).sum() - 8 * w.log()
    torch.testing.assert_close(awake, torch.autograd.grad(expected, w)[0] * 0.7)
    surprise = -(PRIOR.log() + w * log_u).logsumexp(-1).sum() - 8 * w.log()
    torch.testing.assert_close(learned, torch.autograd.grad(surprise, w)[0] * 0.7)


@pytest.mark.parametrize("reweighted", [False, True])
def test_wake_phases_refuse_to_learn_the_weight_of_a_latent(reweighted: bool) -> None:
    machine = _machine(learns_the_weight_of_its_latents, weighed_guide_of_data)
    phase = ReweightedWake(machine, 2, 0.0) if reweighted else Wake(machine, 1)
    with pytest.raises(ScaleError, match="The weight of latent site 'z'"):
        phase.loss_and_grads(nothing, nothing, DATA)
