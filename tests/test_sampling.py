r"""What is sampled: F and its gradient are right on average, and the baseline makes them steadier.

E[ gradient estimate ]  =  gradient of E[F]

For discrete draws the right side is the full joint table, which enumerates what the library was told to sample; for
continuous draws it is an integral over w on a grid of the free energy given w, written out by hand.
"""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import gradients, oracle
from programs.case import noise, positive, real, tensor, unit
from torch import Tensor
from torch.distributions import constraints

import pyro_vfe as vfe

POINTS = tensor([0.5, -1.0, 2.0])
SAMPLED = {"enumerate": None}
GRID = torch.linspace(-20.0, 20.0, 2001, dtype=torch.float64)
Program = Callable[[], Any]

MODES: dict[str, tuple[dict[str, Any], int]] = {
    "one_particle": ({}, 100),
    "loop": ({"num_particles": 3}, 30),
    "vectorized": ({"num_particles": 80, "vectorize_particles": True}, 20),
}
"""Arguments of FreeEnergy, and how many estimates are averaged."""

BY_ONE = ("w_in_plate", "w_depends_on_v", "chain")
"""Programs that are also drawn one particle at a time, which takes longer."""


def simplex(name: str, *shape: int, seed: int = 0) -> Tensor:
    """Probabilities that are none of them small: averages over few draws then know their standard error."""
    return pyro.param(name, lambda: (0.4 * noise(*shape, seed=seed)).softmax(-1), constraint=constraints.simplex)


def drawn(name: str, probs: Tensor) -> Tensor:
    return pyro.sample(name, dist.Categorical(probs), infer=dict(SAMPLED))


def summed(name: str, probs: Tensor) -> Tensor:
    return pyro.sample(name, dist.Categorical(probs))


def normal_data(means: Tensor) -> None:
    pyro.sample("u", dist.Normal(means, 0.8), obs=POINTS[:2])


def w_above_plate() -> Tensor:
    w = drawn("w", simplex("w_probs", 2))
    with pyro.plate("data", 2):
        v = summed("v", simplex("v_probs", 2, 3, seed=1)[w])
        normal_data(real("means", 2, 3, seed=2)[w, v])
    return w


def w_above_plate_guide() -> None:
    drawn("w", simplex("q_w", 2, seed=3))


def w_in_plate() -> None:
    with pyro.plate("data", 2):
        w = drawn("w", simplex("w_probs", 2))
        v = summed("v", simplex("v_probs", 2, 3, seed=1)[w])
        normal_data(real("means", 2, 3, seed=2)[w, v])


def w_in_plate_guide() -> None:
    with pyro.plate("data", 2):
        drawn("w", simplex("q_w", 2, 2, seed=3))


def v_before_w_guide() -> None:
    """The draw depends on a latent that the guide enumerates."""
    with pyro.plate("data", 2):
        v = summed("v", simplex("q_v", 2, 3, seed=4))
        drawn("w", simplex("q_w", 3, 2, seed=3)[v])


def w_before_v_guide() -> None:
    """A latent that the guide enumerates depends on the draw."""
    with pyro.plate("data", 2):
        w = drawn("w", simplex("q_w", 2, 2, seed=3))
        summed("v", simplex("q_v", 2, 3, seed=4)[w])


def chain() -> Tensor:
    transition, means = simplex("transition", 3, 3), real("means", 3, seed=2)
    z = [summed("z_0", transition[0])]
    z.append(drawn("z_1", transition[z[0]]))
    z.append(summed("z_2", transition[z[1]]))
    for t in range(3):
        pyro.sample(f"u_{t}", dist.Normal(means[z[t]], 0.8), obs=POINTS[t])
    return z[1]


def chain_guide() -> None:
    z = summed("z_0", simplex("q_0", 3, seed=3))
    z = drawn("z_1", simplex("q_1", 3, 3, seed=4)[z])
    summed("z_2", simplex("q_2", 3, 3, seed=5)[z])


def global_v_over_w() -> None:
    v = summed("v", simplex("v_probs", 2))
    with pyro.plate("data", 2):
        w = drawn("w", simplex("w_probs", 2, 3, seed=1)[v])
        normal_data(real("means", 2, 3, seed=2)[v, w])


def global_v_over_w_guide() -> None:
    v = summed("v", simplex("q_v", 2, seed=3))
    with pyro.plate("data", 2) as n:
        drawn("w", simplex("q_w", 2, 2, 3, seed=4)[n, v])


def two_draws() -> Tensor:
    a = drawn("a", simplex("a_probs", 2))
    b = drawn("b", simplex("b_probs", 2, 2, seed=1)[a])
    v = summed("v", simplex("v_probs", 2, 2, 3, seed=2)[a, b])
    pyro.sample("u", dist.Normal(real("means", 3, seed=3)[v] + b, 0.8), obs=POINTS[0])
    return b


def two_draws_guide() -> None:
    a = drawn("a", simplex("q_a", 2, seed=4))
    drawn("b", simplex("q_b", 2, 2, seed=5)[a])


DISCRETE: dict[str, tuple[Program, Program]] = {
    "w_above_plate": (w_above_plate, w_above_plate_guide),
    "w_in_plate": (w_in_plate, w_in_plate_guide),
    "w_depends_on_v": (w_in_plate, v_before_w_guide),
    "v_depends_on_w": (w_in_plate, w_before_v_guide),
    "chain": (chain, chain_guide),
    "w_in_plate_depends_on_v_above": (global_v_over_w, global_v_over_w_guide),
    "w_depends_on_w": (two_draws, two_draws_guide),
}


def estimates(model: Program, guide: Program, options: dict[str, Any], count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Estimates of F and of its gradient, stacked."""
    elbo = vfe.FreeEnergy(**options)
    losses, found = [], []
    for _ in range(count):
        loss = elbo.differentiable_loss(model, guide)
        losses.append(loss.detach())
        found.append(gradients(loss))
    return torch.stack(losses), {name: torch.stack([one[name] for one in found]) for name in found[0]}


def assert_unbiased(draws: Tensor, expected: Tensor, what: str) -> None:
    mean, stderr = draws.mean(0), draws.std(0) / math.sqrt(len(draws))
    error = (mean - expected.detach()).abs()
    assert bool((error <= 5 * stderr + 1e-9).all()), f"{what}: {mean} for {expected}, standard error {stderr}"


@pytest.mark.parametrize(
    ("name", "mode"), [(name, mode) for name in DISCRETE for mode in MODES if mode == "vectorized" or name in BY_ONE]
)
def test_score_function_estimates_average_to_the_full_joint_table(name: str, mode: str) -> None:
    model, guide = DISCRETE[name]
    exact = oracle(model, guide)
    expected = exact.gradients()
    losses, found = estimates(model, guide, *MODES[mode])
    assert_unbiased(losses, exact.terms["free_energy"], "F")
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert_unbiased(found[parameter], gradient, parameter)


def normal(name: str, loc: Any, scale: Any, has_rsample: bool = True) -> Tensor:
    return pyro.sample(name, dist.Normal(loc, scale).has_rsample_(has_rsample))


def continuous_model() -> None:
    w = pyro.sample("w", dist.Normal(0.3, 1.5))
    with pyro.plate("data", 2):
        v = pyro.sample("v", dist.Bernoulli(torch.sigmoid(w - 0.4)))
        normal_data(w * (1 + v) * real("slope", seed=4))


def continuous_guide(has_rsample: bool) -> Program:
    def guide() -> None:
        w = normal("w", real("loc", seed=1), positive("scale", seed=2) / 2, has_rsample)
        with pyro.plate("data", 2):
            pyro.sample("v", dist.Bernoulli(torch.sigmoid(real("tilt", 2, seed=3) * w)))

    return guide


def cross(q: Tensor, log_ratio: Tensor) -> Tensor:
    """E_q[log_ratio] over the last axis, 0 where q is 0."""
    return torch.where(q > 0, q * log_ratio, 0.0).sum(-1)


def bernoulli_logits(logits: Tensor) -> Tensor:
    """log P(v = 0), log P(v = 1)."""
    return torch.stack([-torch.nn.functional.softplus(logits), -torch.nn.functional.softplus(-logits)], -1)


def continuous_free_energy() -> Tensor:
    w, v = GRID.reshape(-1, 1), tensor([0.0, 1.0])
    q_w = dist.Normal(real("loc"), positive("scale") / 2)
    log_q = bernoulli_logits(real("tilt") * w)
    log_p = bernoulli_logits(w - 0.4)
    data = dist.Normal(w.unsqueeze(-1) * (1 + v) * real("slope"), 0.8).log_prob(POINTS[:2].unsqueeze(-1))
    given_w = cross(log_q.exp(), log_q - log_p - data).sum(-1)
    costs = q_w.log_prob(GRID) - dist.Normal(0.3, 1.5).log_prob(GRID) + given_w
    return torch.trapezoid(q_w.log_prob(GRID).exp() * costs, GRID)


def plated_model() -> None:
    with pyro.plate("data", 2):
        w = pyro.sample("w", dist.Normal(0.3, 1.5))
        v = pyro.sample("v", dist.Bernoulli(unit("v_prob", seed=5)))
        normal_data(w * (1 + v) * real("slope", seed=4))


def plated_guide(has_rsample: bool) -> Program:
    """The draw depends on a latent that the guide enumerates."""

    def guide() -> None:
        with pyro.plate("data", 2):
            v = pyro.sample("v", dist.Bernoulli(unit("q_v", 2, seed=3)))
            normal("w", real("locs", 2, seed=1)[v.long()], positive("scale", seed=2) / 2, has_rsample)

    return guide


def plated_free_energy() -> Tensor:
    q, p = unit("q_v").unsqueeze(-1), unit("v_prob")
    log_q, log_p = torch.cat([1 - q, q], -1).log(), torch.stack([1 - p, p]).log()
    w, v = GRID.reshape(-1, 1, 1), tensor([0.0, 1.0])
    q_w = dist.Normal(real("locs"), positive("scale") / 2)
    data = dist.Normal(w * (1 + v) * real("slope"), 0.8).log_prob(POINTS[:2].unsqueeze(-1))
    costs = q_w.log_prob(w) - dist.Normal(0.3, 1.5).log_prob(w) - data
    given_v = torch.trapezoid(q_w.log_prob(w).exp() * costs, GRID, dim=0)
    return cross(log_q.exp(), log_q - log_p + given_v).sum()


CONTINUOUS = {
    "above_plate": (continuous_model, continuous_guide, continuous_free_energy),
    "in_plate_after_v": (plated_model, plated_guide, plated_free_energy),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("has_rsample", [True, False], ids=["pathwise", "score"])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_estimates_average_to_the_integral(name: str, has_rsample: bool, mode: str) -> None:
    model, guide_of, free_energy = CONTINUOUS[name]
    options, count = MODES[mode]
    losses, found = estimates(model, guide_of(has_rsample), options, count)
    expected = free_energy()
    assert_unbiased(losses, expected, "F")
    for parameter, gradient in gradients(expected).items():
        assert_unbiased(found[parameter], gradient, parameter)


def far(program: Program, reads_the_draw: bool = True) -> Program:
    """The model with a large cost that is the same for every draw."""

    def model() -> None:
        w = program()
        pyro.factor("offset", tensor(-40.0) + (0.0 * w if reads_the_draw else 0.0))

    return model


@pytest.mark.parametrize("vectorized", [False, True], ids=["loop", "vectorized"])
@pytest.mark.parametrize(("name", "parameter"), [("w_above_plate", "q_w"), ("w_depends_on_w", "q_a")])
def test_the_leave_one_out_baseline_lowers_the_variance(name: str, parameter: str, vectorized: bool) -> None:
    model, guide = DISCRETE[name]
    model, particles = far(model), 6
    _, single = estimates(model, guide, {}, 40)
    _, several = estimates(model, guide, {"num_particles": particles, "vectorize_particles": vectorized}, 12)
    without_baseline = single[parameter].var(0).sum() / particles
    assert several[parameter].var(0).sum() < 0.1 * without_baseline


def test_a_cost_that_reads_no_draw_adds_no_variance() -> None:
    found = {}
    for reads_the_draw in (False, True):
        pyro.set_rng_seed(1)
        _, found[reads_the_draw] = estimates(far(w_above_plate, reads_the_draw), w_above_plate_guide, {}, 20)
    pyro.set_rng_seed(1)
    _, plain = estimates(w_above_plate, w_above_plate_guide, {}, 20)
    torch.testing.assert_close(found[False], plain)
    assert found[True]["q_w"].var() > 10 * plain["q_w"].var()


def test_particles_do_not_change_what_is_exact() -> None:
    def model() -> None:
        with pyro.plate("data", 2):
            v = summed("v", simplex("v_probs", 2, seed=1))
            normal_data(real("means", 2, seed=2)[v])

    def guide() -> None:
        with pyro.plate("data", 2):
            summed("v", simplex("q_v", 2, 2, seed=3))

    exact = oracle(model, guide)
    for options, _ in MODES.values():
        losses, found = estimates(model, guide, options, 2)
        torch.testing.assert_close(losses, exact.terms["free_energy"].detach().expand(2), rtol=1e-12, atol=1e-12)
        for parameter, gradient in exact.gradients().items():
            torch.testing.assert_close(found[parameter][0], gradient, rtol=1e-9, atol=1e-10)


def test_every_estimate_of_F_is_one_of_its_values_given_the_draw() -> None:
    """w has two values, so F has: log q(w) - log p(w, u)."""
    losses, _ = estimates(w_above_plate, w_above_plate_guide, {}, 60)
    w_probs, q = simplex("w_probs").detach(), simplex("q_w").detach()
    v_probs, means = simplex("v_probs").detach(), real("means").detach()
    data = dist.Normal(means.unsqueeze(-2), 0.8).log_prob(POINTS[:2].reshape(1, 2, 1))
    given_w = (v_probs.unsqueeze(-2).log() + data).logsumexp(-1).sum(-1)
    expected = q.log() - w_probs.log() - given_w
    assert {round(x, 9) for x in losses.tolist()} == {round(x, 9) for x in expected.tolist()}
