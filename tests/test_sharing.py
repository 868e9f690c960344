"""Equal computations are done once; what a program does to one result may not show in another."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import gradients, oracle
from programs.case import categorical, empty, noise, simplex, tensor
from torch import Tensor

import pyro_vfe as vfe
from pyro_vfe.engine.stacks import StackedTable, whole_stack
from pyro_vfe.program.enumeration import Enumeration
from pyro_vfe.program.programs import Programs

STEPS, STATES = 4, 2
DATA = noise(STEPS, seed=1)
EDGE = noise(STATES, STATES, seed=2).softmax(-1)
FIRST = tensor([0.3, 0.7])
MEANS = tensor([-1.0, 2.0])


@pytest.fixture(autouse=True)
def _few_dims(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents of short programs share dims here as those of long ones do."""
    monkeypatch.setattr("pyro_vfe.program.colouring._OWN_DIMS", 0)


def chain(step: Callable[[int, Tensor], None] | None = None, edge: Callable[[Tensor], Tensor] | None = None) -> Any:
    def model() -> None:
        z = categorical("z_0", simplex("first", STATES))
        transition = simplex("transition", STATES, STATES, seed=3)
        for t in range(1, STEPS):
            z = categorical(f"z_{t}", transition[z] if edge is None else edge(transition[z]))
            if step is None:
                pyro.sample(f"x_{t}", dist.Normal(MEANS[z], 1.0), obs=DATA[t])
            else:
                step(t, z)

    return model


def enumerated(model: Callable[..., Any]) -> tuple[Enumeration, bool]:
    programs = Programs()
    result = programs.enumerate(model, empty, (), {})
    ((_, pair),) = programs._pairs.items()
    return result, pair.shares


def assert_right(model: Callable[..., Any], shares: bool | None = None) -> None:
    """Value and gradients against the full joint table, in the first run and in the next."""
    exact = oracle(model, empty)
    elbo = vfe.FreeEnergy()
    for _ in range(2):
        loss = elbo.differentiable_loss(model, empty)
        assert loss.item() == pytest.approx(float(exact.terms["surprise"].detach()), rel=1e-12)
        for name, gradient in gradients(loss).items():
            assert torch.allclose(gradient, exact.gradients()[name], rtol=1e-10, atol=1e-12)
    if shares is not None:
        assert enumerated(model)[1] == shares


def test_equal_steps_have_one_transition_table_and_one_stack_of_data() -> None:
    result, shares = enumerated(chain())
    transitions = [result.factors["model", f"z_{t}"].table for t in range(1, STEPS)]
    assert shares
    assert len({id(table.values) for table in transitions}) == 1
    assert [table.axes for table in transitions] == [(f"z_{t - 1}", f"z_{t}") for t in range(1, STEPS)]
    stack = whole_stack([result.factors["model", f"x_{t}"].table for t in range(1, STEPS)])
    expected = dist.Normal(MEANS, 1.0).log_prob(DATA[1:, None])
    assert stack is not None and torch.allclose(stack, expected)
    assert_right(chain(), True)


FAMILIES = {
    "Categorical": lambda z: dist.Categorical(noise(STATES, 4, seed=4).softmax(-1)[z]),
    "Categorical of logits": lambda z: dist.Categorical(logits=noise(STATES, 4, seed=4)[z]),
    "OneHotCategorical": lambda z: dist.OneHotCategorical(noise(STATES, 4, seed=4).softmax(-1)[z]),
    "Bernoulli": lambda z: dist.Bernoulli(torch.sigmoid(MEANS)[z]),
    "Poisson": lambda z: dist.Poisson(MEANS.exp()[z]),
    "Normal": lambda z: dist.Normal(MEANS[z], 1.0 + MEANS[z] ** 2),
    "Normal of a number": lambda z: dist.Normal(z.double(), 2.0),
    "Normal of an event": lambda z: dist.Normal(noise(STATES, 2, seed=5)[z], 1.0).to_event(1),
    "MultivariateNormal": lambda z: dist.MultivariateNormal(noise(STATES, 2, seed=5)[z], torch.eye(2).double()),
    "StudentT": lambda z: dist.StudentT(3.0, MEANS[z], 1.0),
    "LogNormal": lambda z: dist.LogNormal(MEANS[z], 1.0),
    "Mixture": lambda z: dist.MixtureSameFamily(
        dist.Categorical(noise(STATES, 2, seed=6).softmax(-1)[z]), dist.Normal(noise(STATES, 2, seed=7)[z], 1.0)
    ),
    "Binomial": lambda z: dist.Binomial(5, torch.sigmoid(MEANS)[z]),
    "masked": lambda z: dist.Normal(MEANS[z], 1.0).mask(z != 1),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plated", [False, True])
def test_data_of_equal_steps_are_scored_right(family: str, plated: bool) -> None:
    make = FAMILIES[family]
    torch.manual_seed(0)
    data = [make(torch.tensor(t % STATES)).expand([2] if plated else []).sample() for t in range(STEPS)]

    def step(t: int, z: Tensor) -> None:
        pyro.sample(f"x_{t}", make(z), obs=data[t])

    def plates() -> None:
        with pyro.plate("sequences", 2):
            chain(step)()

    assert_right(plates if plated else chain(step))


def test_masks_and_scales_of_steps_stay_their_own() -> None:
    masks = noise(STEPS, 2, seed=8) > 0

    def model() -> None:
        with pyro.plate("sequences", 2):
            z = categorical("z_0", simplex("first", STATES))
            for t in range(1, STEPS):
                z = categorical(f"z_{t}", EDGE[z])
                with pyro.poutine.mask(mask=masks[t]):
                    pyro.sample(f"x_{t}", dist.Normal(MEANS[z], 1.0), obs=DATA[t] + torch.arange(2.0))

    assert_right(model, True)


WRITERS = {
    "without a new version": lambda p: p.data[..., 0].mul_(3.0) is None or p,
    "into a shared result": lambda p: p.mul_(0.5).add_(1 / 6),
    "into an element": lambda p: p.__setitem__((..., 0), p[..., 0] * 1.5) or p,
    "through a view": lambda p: p.unsqueeze(0).mul_(0.5) is None or p,
    "through detached memory": lambda p: p.detach().mul_(0.5) is None or p,
    "by an operator": lambda p: p.__imul__(2.0),
    "by out=": lambda p: torch.mul(p.detach(), 2.0, out=p.detach().clone()),
}


@pytest.mark.parametrize("write", WRITERS)
def test_a_write_into_one_result_does_not_show_in_another(write: str) -> None:
    def edge(probs: Tensor) -> Tensor:
        with torch.no_grad():
            changed = WRITERS[write](probs)
        return changed / changed.sum(-1, keepdim=True)

    def model() -> None:
        z = categorical("z_0", FIRST)
        for t in range(1, STEPS):
            probs = EDGE[z] * 1.0
            z = categorical(f"z_{t}", edge(probs) if t % 2 else probs)
            pyro.sample(f"x_{t}", dist.Normal(MEANS[z], 1.0), obs=DATA[t])

    assert_right(model)


def test_a_write_that_no_mode_sees_does_not_show_at_earlier_steps() -> None:
    """As compiled code may make it."""

    def step(t: int, z: Tensor) -> None:
        loc = MEANS[z] * 1.0
        if t == STEPS - 1:
            with torch._C.DisableTorchFunction():
                loc[...] = loc + 1
        pyro.sample(f"x_{t}", dist.Normal(loc, 1.0), obs=DATA[t])

    assert_right(chain(step), False)


def test_a_program_that_writes_into_one_of_two_results_is_run_without_sharing() -> None:
    def edge(probs: Tensor) -> Tensor:
        kept, changed = probs * 1.0, probs * 1.0
        changed[..., 0] = changed[..., 0] * 2
        return (kept + changed) / (kept + changed).sum(-1, keepdim=True)

    model = chain(edge=edge)
    result, shares = enumerated(model)
    assert not shares
    assert not isinstance(result.factors["model", "x_2"].table, StackedTable)
    assert_right(model, False)


def test_a_table_that_is_written_between_steps_is_read_anew() -> None:
    def model() -> None:
        edge = EDGE.clone()
        z = categorical("z_0", FIRST)
        for t in range(1, STEPS):
            edge[0] = edge[0].flip(-1)
            z = categorical(f"z_{t}", edge[z])
            edge.data[1] = edge.data[1].flip(-1)
            pyro.sample(f"x_{t}", dist.Normal(MEANS[z], 1.0), obs=DATA[t])

    assert_right(model, True)


def test_a_table_whose_memory_is_exchanged_is_read_anew() -> None:
    def model() -> None:
        edge = EDGE.clone()
        z = categorical("z_0", FIRST)
        for t in range(1, STEPS):
            edge.data = edge.data.flip(-1)
            z = categorical(f"z_{t}", edge[z])
            pyro.sample(f"x_{t}", dist.Normal(MEANS[z], 1.0), obs=DATA[t])

    assert_right(model)


def test_a_table_that_begins_to_need_a_gradient_gets_it() -> None:
    edge = EDGE.clone()

    def model() -> None:
        edge.requires_grad_(False)
        z = categorical("z_0", FIRST)
        for t in range(1, STEPS):
            z = categorical(f"z_{t}", edge[z])
            pyro.sample(f"x_{t}", dist.Normal(MEANS[z], 1.0), obs=DATA[t])
            edge.requires_grad_(t >= 2)

    elbo = vfe.FreeEnergy()
    (ours,) = torch.autograd.grad(elbo.differentiable_loss(model, empty), edge)

    late = EDGE.clone().requires_grad_()

    def split() -> None:
        z = categorical("z_0", FIRST)
        for t in range(1, STEPS):
            z = categorical(f"z_{t}", (late if t >= 3 else EDGE)[z])
            pyro.sample(f"x_{t}", dist.Normal(MEANS[z], 1.0), obs=DATA[t])

    (theirs,) = torch.autograd.grad(vfe.FreeEnergy().differentiable_loss(split, empty), late)
    assert torch.allclose(ours, theirs)


def test_a_step_without_gradient_stays_without() -> None:
    table = EDGE.clone().requires_grad_()

    def steps(free: Callable[[int], bool]) -> Callable[[], None]:
        def model() -> None:
            z = categorical("z_0", FIRST)
            for t in range(1, STEPS):
                with torch.set_grad_enabled(free(t)):
                    probs = table[z]
                z = categorical(f"z_{t}", probs)
                pyro.sample(f"x_{t}", dist.Normal(MEANS[z], 1.0), obs=DATA[t])

        return model

    def gradient(model: Callable[[], None]) -> Tensor:
        return torch.autograd.grad(vfe.FreeEnergy().differentiable_loss(model, empty), table)[0]

    parts = [gradient(steps(lambda t, one=one: t == one)) for one in range(1, STEPS)]
    assert torch.allclose(sum(parts), gradient(steps(lambda t: True)))
    assert all(not torch.allclose(parts[0], part) for part in parts[1:])


def test_hooks_on_one_result_see_its_own_gradient() -> None:
    seen: list[Tensor] = []

    def edge(probs: Tensor) -> Tensor:
        if probs.requires_grad:
            probs.register_hook(seen.append)
        return probs

    model, elbo = chain(edge=edge), vfe.FreeEnergy(check=False)
    elbo.differentiable_loss(model, empty)  # The first call looks at gradients itself.
    seen.clear()
    elbo.differentiable_loss(model, empty).backward()
    assert len(seen) == STEPS - 1
    assert all(not torch.allclose(seen[0], other) for other in seen[1:])


def test_numbers_that_compare_equal_are_not_the_same_argument() -> None:
    def model() -> None:
        z = categorical("z_0", FIRST)
        shifted = [z * one for one in (1, 1.0, True)]
        assert [part.dtype for part in shifted] == [torch.int64, torch.get_default_dtype(), torch.int64]
        signs = [(1.0 / (z * zero)).sign().amax() for zero in (0.0, -0.0)]
        pyro.sample("u", dist.Normal(shifted[1] + signs[0] - signs[1], 1.0), obs=tensor(1.0))
        assert (shifted[0] is shifted[2]) is False

    vfe.FreeEnergy(check=False).loss(model, empty)


def test_every_value_is_a_tensor_of_its_own() -> None:
    def model() -> None:
        first, second = categorical("a", EDGE[0]), categorical("b", EDGE[0])
        assert first is not second
        assert MEANS[first] is not MEANS[first]
        one, other = dist.Normal(MEANS[first], 1.0), dist.Normal(MEANS[first], 1.0)
        assert one is not other and one.loc is not other.loc
        pyro.sample("u", dist.Normal(one.loc + other.loc - MEANS[second], one.scale), obs=tensor(1.0))

    assert_right(model, True)


def test_a_parameter_of_a_shared_distribution_knows_its_own_latent() -> None:
    def model() -> None:
        zs = [categorical(f"z_{t}", EDGE[0]) for t in range(14)]
        fns = [dist.Categorical(EDGE[z]) for z in zs]
        pyro.sample("u", dist.Normal(fns[0].probs[..., 0] + 10 * fns[13].probs[..., 1], 0.5), obs=tensor(3.0))

    result, shares = enumerated(model)
    assert shares
    assert set(result.factors["model", "u"].table.axes) == {"z_0", "z_13"}


def test_one_parameter_of_a_distribution_may_be_read_by_itself() -> None:
    def model() -> None:
        a, b = categorical("a", EDGE[0]), categorical("b", FIRST)
        covariance = (1.0 + b.double())[..., None, None] * torch.eye(2).double()
        fn = dist.MultivariateNormal(MEANS[a][..., None] * tensor([1.0, 2.0]), covariance)
        pyro.sample("u", dist.Normal(fn.loc[..., 0], 1.0), obs=tensor(1.0))
        pyro.sample("v", fn, obs=tensor([1.0, 0.0]))

    assert_right(model, True)


def test_bad_parameters_and_data_get_their_errors() -> None:
    def bad_scale() -> None:
        chain(lambda t, z: pyro.sample(f"x_{t}", dist.Normal(MEANS[z], -1.0 if t == 3 else 1.0), obs=DATA[t]))()

    def bad_datum() -> None:
        chain(lambda t, z: pyro.sample(f"x_{t}", dist.Poisson(MEANS.exp()[z]), obs=tensor(-1.0 if t == 3 else 1.0)))()

    with pytest.raises(ValueError, match="scale"):
        vfe.FreeEnergy().loss(bad_scale, empty)
    with pytest.raises(ValueError, match=r"'x_3'.*support"):
        vfe.FreeEnergy().loss(bad_datum, empty)


def test_nothing_of_one_run_is_taken_over_by_the_next() -> None:
    kept: list[Tensor] = []

    def model() -> None:
        z = categorical("z", EDGE[0])
        kept.append(z)
        rate = MEANS[kept[0]] if len(kept) > 1 and kept[0].shape == z.shape else MEANS[z]
        pyro.sample("u", dist.Normal(rate, 1.0), obs=tensor(1.0))

    programs = Programs(check=False)
    for _ in range(2):
        result = programs.enumerate(model, empty, (), {})
    assert result is not None
    with pytest.warns(vfe.errors.VFEWarning, match="do not broadcast"):
        loss = vfe.FreeEnergy(check="always").loss(model, empty)
    assert any(loss == pytest.approx(-dist.Normal(mean, 1.0).log_prob(tensor(1.0)).item()) for mean in MEANS)


def test_inference_mode_is_served() -> None:
    with torch.inference_mode():
        loss = vfe.FreeEnergy().loss(chain(), empty)
    assert loss == pytest.approx(float(oracle(chain(), empty).terms["surprise"].detach()))
