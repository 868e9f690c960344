"""One law of gradients: that of the linear-domain sum, sum_v dP(v, u) / dtheta, also where P(v, u) = 0.

Every expected number is the derivative of probabilities that are multiplied and added, never logged before the end.
"""

import gc
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs.case import bernoulli, categorical, empty, tensor
from torch import Tensor
from torch.distributions import constraints

import pyro_vfe as vfe
from pyro_vfe.errors import NotFiniteError

POINTS = tensor([0.0, 1.0, 2.0])
COUNTS = tensor([0.0, 0.0, 2.0, 5.0, 1.0, 0.0])


def leaf(values: Any) -> Tensor:
    return tensor(values).requires_grad_()


def normal(x: Tensor | float, loc: Tensor | float, scale: Tensor | float = 1.0) -> Tensor:
    return dist.Normal(torch.as_tensor(loc), torch.as_tensor(scale)).log_prob(torch.as_tensor(x)).exp()


def check(model: Callable[[], None], leaves: list[Tensor], evidence: Tensor, guide: Any = None) -> None:
    """F and its gradient are those of -log of the evidence, a scalar in the linear domain with a graph."""
    expected = torch.autograd.grad(-evidence.log(), leaves)
    for leaf_ in leaves:
        leaf_.grad = None
    loss = vfe.FreeEnergy(strict_enumeration_warning=False).loss_and_grads(model, guide)
    torch.testing.assert_close(tensor(loss), -evidence.log().detach(), rtol=1e-12, atol=1e-12)
    for leaf_, gradient in zip(leaves, expected, strict=True):
        assert leaf_.grad is not None
        torch.testing.assert_close(leaf_.grad, gradient, rtol=1e-9, atol=1e-9)


def normalised(p: Tensor) -> Tensor:
    return p / p.sum(-1, keepdim=True)


def test_a_category_of_probability_zero() -> None:
    p = leaf([0.0, 0.4, 0.6])

    def model() -> None:
        pyro.sample("u", dist.Normal(POINTS[categorical("z", p)], 1.0), obs=tensor(0.2))

    check(model, [p], (normalised(p) * normal(0.2, POINTS)).sum())
    assert p.grad is not None
    torch.testing.assert_close(p.grad, tensor([-1.39540925, -0.77456282, 0.51637521]), rtol=0, atol=5e-9)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_a_bernoulli_that_cannot_be_otherwise(p: float) -> None:
    q = leaf(p)

    def model() -> None:
        pyro.sample("u", dist.Normal(bernoulli("z", q), 1.0), obs=tensor(0.7))

    check(model, [q], (1 - q) * normal(0.7, 0.0) + q * normal(0.7, 1.0))


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_binomial_latents_and_vectors_of_bits(p: float) -> None:
    q = leaf(p)

    def model() -> None:
        n = pyro.sample("n", dist.Binomial(2, q))
        bits = pyro.sample("bits", dist.Bernoulli(torch.stack([q, q / 2])).to_event(1))
        pyro.sample("u", dist.Normal(n + bits.sum(-1), 1.0), obs=tensor(1.7))

    counts = torch.stack([(1 - q) ** 2, 2 * q * (1 - q), q**2])
    sums = torch.stack([(1 - q) * (1 - q / 2), q * (1 - q / 2) + (1 - q) * q / 2, q * q / 2])
    values = tensor([0.0, 1.0, 2.0])
    check(model, [q], (counts[:, None] * sums * normal(1.7, values[:, None] + values)).sum())


def chain_evidence(start: Tensor, move: Tensor, data: Tensor) -> Tensor:
    alpha = normalised(start) * normal(data[0], POINTS)
    for datum in data[1:]:
        alpha = (alpha @ normalised(move)) * normal(datum, POINTS)
    return alpha.sum()


@pytest.mark.parametrize("as_loop", [True, False])
def test_a_chain_at_the_identity(as_loop: bool) -> None:
    start, move, data = leaf([0.5, 0.5, 0.0]), torch.eye(3).requires_grad_(), tensor([0.1, 0.3, 1.2, 1.9])

    def loop() -> None:
        z = categorical("z_0", start)
        pyro.sample("u_0", dist.Normal(POINTS[z], 1.0), obs=data[0])
        for t in range(1, 4):
            z = categorical(f"z_{t}", move[z])
            pyro.sample(f"u_{t}", dist.Normal(POINTS[z], 1.0), obs=data[t])

    def chain() -> None:
        with pyro.plate("time", 4):
            z = pyro.sample("z", vfe.MarkovChain(start, move))
            pyro.sample("u", dist.Normal(POINTS[z], 1.0), obs=data)

    check(loop if as_loop else chain, [start, move], chain_evidence(start, move, data))


def test_observed_outcomes_that_a_component_rules_out() -> None:
    weights, faces = leaf([0.3, 0.7]), leaf([[0.0, 0.5, 0.5], [0.2, 0.3, 0.5]])
    data = torch.tensor([0, 1, 0, 2])

    def model() -> None:
        z = categorical("z", weights)
        with pyro.plate("data", 4):
            pyro.sample("u", dist.Categorical(faces[z]), obs=data)

    check(model, [weights, faces], (normalised(weights) * normalised(faces)[:, data].prod(-1)).sum())


def test_observed_chains_that_a_component_rules_out() -> None:
    weights, moves = leaf([0.3, 0.7]), leaf([[[1.0, 0.0], [0.0, 1.0]], [[0.5, 0.5], [0.1, 0.9]]])
    start, path = tensor([0.5, 0.5]), torch.tensor([0, 1, 1])

    def model() -> None:
        z = categorical("z", weights)
        with pyro.plate("time", 3):
            pyro.sample("u", vfe.MarkovChain(start, moves[z]), obs=path)

    rows = normalised(moves)
    check(model, [weights, moves], (normalised(weights) * 0.5 * rows[:, 0, 1] * rows[:, 1, 1]).sum())


def test_many_data_whose_table_is_one_product() -> None:
    p = torch.full((3, 4), 0.4).index_put((torch.tensor(0), torch.tensor(0)), tensor(0.0)).requires_grad_()
    data = (torch.rand(20_000, 4, generator=torch.Generator().manual_seed(0)) < 0.4).double()
    data[:3, 0] = 1.0

    def model() -> None:
        with pyro.plate("data", len(data)):
            z = categorical("z", tensor([0.2, 0.3, 0.5]))
            pyro.sample("u", dist.Bernoulli(p[z]).to_event(1), obs=data)

    each = (p * data[:, None] + (1 - p) * (1 - data[:, None])).prod(-1) @ tensor([0.2, 0.3, 0.5])
    expected = torch.autograd.grad(-each.log().sum(), p)[0]
    vfe.FreeEnergy().loss_and_grads(model, None)
    torch.testing.assert_close(p.grad, expected, rtol=1e-9, atol=1e-6)


def test_what_is_summed_in_portions_has_the_gradient_of_the_whole() -> None:
    p = torch.full((64,), 1 / 63).index_put((torch.tensor([0]),), tensor([0.0])).requires_grad_()
    locs, data = torch.linspace(-3, 3, 64), torch.linspace(-2, 2, 1000)

    def model() -> None:
        with pyro.plate("data", 1000):
            pyro.sample("u", dist.Normal(locs[categorical("z", p)], 1.0), obs=data)

    evidence = (normalised(p) * normal(data[:, None], locs)).sum(-1)
    vfe.FreeEnergy(max_bytes=2**18).loss_and_grads(model, None)
    torch.testing.assert_close(p.grad, torch.autograd.grad(-evidence.log().sum(), p)[0], rtol=1e-9, atol=1e-6)


def test_a_latent_of_the_guide_beside_one_that_the_model_sums_out() -> None:
    p, q = leaf([[0.0, 1.0], [0.3, 0.7]]), tensor([0.6, 0.4])

    def model() -> None:
        a = categorical("a", tensor([0.5, 0.5]))
        pyro.sample("u", dist.Normal(POINTS[categorical("b", p[a])], 1.0), obs=tensor(0.2))

    rows = (normalised(p) * normal(0.2, POINTS[:2])).sum(-1)
    expected = torch.autograd.grad((q * (q.log() - (0.5 * rows).log())).sum(), p)[0]
    vfe.FreeEnergy().loss_and_grads(model, lambda: categorical("a", q))
    torch.testing.assert_close(p.grad, expected)


def test_zeros_that_no_parameter_moves_stay_out_of_the_gradient() -> None:
    theta = leaf([0.2, -0.3, 0.5])

    def probabilities() -> Tensor:
        return normalised(torch.where(tensor([1.0, 0.0, 1.0]) > 0, theta.exp(), 0.0))

    def model() -> None:
        pyro.sample("u", dist.Normal(POINTS[categorical("z", probabilities())], 1.0), obs=tensor(0.2))

    check(model, [theta], (probabilities() * normal(0.2, POINTS)).sum())


def test_a_guide_whose_zero_moves_is_told_so_and_one_whose_zero_is_held_is_not() -> None:
    q = leaf([0.0, 0.4, 0.6])

    def model() -> None:
        pyro.sample("u", dist.Normal(POINTS[categorical("z", tensor([0.0, 0.5, 0.5]))], 1.0), obs=tensor(0.2))

    with pytest.raises(NotFiniteError, match=r"'z' of the guide has a probability that is exactly zero.*hold it"):
        vfe.FreeEnergy().loss_and_grads(model, lambda: categorical("z", q))
    assert q.grad is None

    def held() -> None:
        categorical("z", torch.where(tensor([0.0, 1.0, 1.0]) > 0, q, 0.0))

    vfe.FreeEnergy().loss_and_grads(model, held)
    own = normalised(q[1:])
    cost = (own * (own.log() - (0.5 * normal(0.2, POINTS[1:])).log())).sum()
    torch.testing.assert_close(q.grad, torch.autograd.grad(cost, q)[0])


def zero_inflated(rate: Tensor, gate: Tensor) -> Callable[[], None]:
    def model() -> None:
        with pyro.plate("data", len(COUNTS)):
            z = bernoulli("z", gate)
            pyro.sample("u", dist.Poisson(rate * (1 - z)), obs=COUNTS)

    return model


def evidence_of_zero_inflated(rate: Tensor, gate: Tensor) -> Tensor:
    poisson = dist.Poisson(rate).log_prob(COUNTS).exp()
    return torch.where(COUNTS == 0, gate + (1 - gate) * poisson, (1 - gate) * poisson).prod()


def test_zero_inflation_differentiates() -> None:
    rate, gate = leaf(3.0), leaf(0.3)
    check(zero_inflated(rate, gate), [rate, gate], evidence_of_zero_inflated(rate, gate))


def with_factor(value: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Callable[[], None]]:
    def of(t: Tensor) -> Callable[[], None]:
        def model() -> None:
            pyro.factor("f", value(bernoulli("z", 0.4), t))

        return model

    return of


def of_two_latents(t: Tensor) -> Callable[[], None]:
    def model() -> None:
        a, b = bernoulli("a", 0.4), bernoulli("b", 0.7)
        pyro.sample("u", dist.Normal(0.0, 1 + torch.sqrt(t * a * (1 - b))), obs=tensor(0.7))

    return model


def of_a_loop(t: Tensor) -> Callable[[], None]:
    def model() -> None:
        z = tensor(0.0)
        for n in range(3):
            z = bernoulli(f"z_{n}", 0.2 + 0.5 * z)
            pyro.sample(f"u_{n}", dist.Normal(0.0, 1 + torch.sqrt(t * z)), obs=tensor(0.7))

    return model


def of_a_chain(t: Tensor) -> Callable[[], None]:
    def model() -> None:
        with pyro.plate("time", 3):
            z = pyro.sample("z", vfe.MarkovChain(tensor([0.8, 0.2]), tensor([[0.8, 0.2], [0.3, 0.7]])))
            pyro.sample("u", dist.Normal(0.0, 1 + torch.sqrt(t * z)), obs=tensor([0.7, 0.7, 0.7]))

    return model


def of_a_branch(t: Tensor) -> Callable[[], None]:
    def model() -> None:
        a = bernoulli("a", 0.4)
        if a.item():
            pyro.sample("u", dist.Normal(0.0, 1 + torch.sqrt(t * bernoulli("b", 0.7))), obs=tensor(0.7))

    return model


def of_a_mixture_of_sums(t: Tensor) -> Callable[[], None]:
    def model() -> None:
        z = pyro.sample("z", dist.OneHotCategorical(tensor([0.2, 0.3, 0.5])))
        with pyro.plate("data", 2):
            loc = (z * torch.stack([t, t**2, t.new_zeros(())])).sum(-1)
            pyro.sample("u", dist.Normal((loc**2) ** 0.5, 1.0), obs=tensor([0.7, 0.1]))

    return model


def three_steps(t: Tensor) -> Tensor:
    emission = torch.stack([normal(0.7, 0.0), normal(0.7, 0.0, 1 + t.sqrt())])
    alpha, move = tensor([0.8, 0.2]) * emission, tensor([[0.8, 0.2], [0.3, 0.7]])
    for _ in range(2):
        alpha = (alpha @ move) * emission
    return alpha.sum()


def spread(t: Tensor) -> Tensor:
    return normal(0.7, 0.0, 1 + t.sqrt())


STILL: dict[str, tuple[Callable[[Tensor], Callable[[], None]], Callable[[Tensor], Tensor]]] = {
    "the log of a product": (with_factor(lambda z, t: torch.log(t * z)), lambda t: 0.4 * t),
    "where around a log": (
        with_factor(lambda z, t: torch.where(z > 0, torch.log(t * z), 0.0)),
        lambda t: 0.6 + 0.4 * t,
    ),
    "a power": (with_factor(lambda z, t: -((t * z) ** 0.5)), lambda t: 0.6 + 0.4 * (-(t**0.5)).exp()),
    "two latents": (of_two_latents, lambda t: 0.4 * 0.3 * spread(t) + (1 - 0.4 * 0.3) * normal(0.7, 0.0)),
    "a loop": (of_a_loop, three_steps),
    "a chain": (of_a_chain, three_steps),
    "a branch": (of_a_branch, lambda t: 0.6 + 0.4 * (0.7 * spread(t) + 0.3 * normal(0.7, 0.0))),
    "one of three": (
        of_a_mixture_of_sums,
        lambda t: (
            0.2 * (normal(0.7, t) * normal(0.1, t))
            + 0.3 * (normal(0.7, t**2) * normal(0.1, t**2))
            + 0.5 * normal(0.7, 0.0) * normal(0.1, 0.0)
        ),
    ),
}


@pytest.mark.parametrize("name", STILL)
def test_a_value_that_no_parameter_moves_adds_nothing_where_autograd_says_nan(name: str) -> None:
    model, evidence = STILL[name]
    t = leaf(2.0)
    check(model(t), [t], evidence(t))


def test_where_one_value_has_weight_and_no_slope() -> None:
    t = leaf(2.0)

    def model() -> None:
        pyro.sample("u", dist.Normal(0.0, 1 + torch.sqrt(t * bernoulli("z", 0.4))), obs=tensor(0.7))

    assert vfe.FreeEnergy().loss_and_grads(model, None) == pytest.approx(1.38337711, abs=5e-9)
    assert t.grad is not None
    assert float(t.grad) == pytest.approx(0.03390572, abs=5e-9)


@pytest.mark.parametrize("count", [0.0, 1.0, 2.0])
def test_a_rate_of_zero_has_the_derivative_to_its_right(count: float) -> None:
    rates = leaf([0.0, 2.0])

    def model() -> None:
        pyro.sample("u", dist.Poisson(rates[bernoulli("z", 0.4).long()]), obs=tensor(count))

    poisson = (-rates).exp() * rates**count / max(count, 1.0)
    check(model, [rates], (tensor([0.6, 0.4]) * poisson).sum())


def test_a_draw_that_a_value_reads_keeps_its_gradient() -> None:
    loc = leaf(1.3)

    def guide() -> None:
        pyro.sample("w", dist.Delta(loc))

    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("u", dist.Normal(0.0, 1 + torch.sqrt(w * bernoulli("z", 0.4))), obs=tensor(0.7))

    evidence = normal(loc, 0.0) * (0.6 * normal(0.7, 0.0) + 0.4 * spread(loc))
    check(model, [loc], evidence, guide)


ENDS = {
    "no derivative": (lambda t, z: 1 + z * torch.sqrt(t), "no finite derivative"),
    "two derivatives": (lambda t, z: 1 + z * (t**2).sqrt(), "to the left and to the right"),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_parameter_without_a_derivative_is_named_with_its_site_and_value(name: str) -> None:
    scale, words = ENDS[name]

    def model() -> None:
        t = pyro.param("t", tensor(0.0))
        pyro.sample("u", dist.Normal(0.0, scale(t, bernoulli("z", 0.4))), obs=tensor(0.7))

    with pytest.raises(NotFiniteError, match=rf"site 'u' of the model at z = 1.0 .* 't'.*{words}"):
        vfe.FreeEnergy().loss_and_grads(model, None)
    assert pyro.get_param_store()._params["t"].grad is None
    pyro.clear_param_store()
    pyro.param("t", tensor(0.5), constraint=constraints.greater_than(1e-3))
    assert vfe.FreeEnergy().loss_and_grads(model, None) > 0


def test_too_many_parameters_at_their_end_are_refused() -> None:
    t = leaf([0.0] * 300)

    def model() -> None:
        pyro.sample("u", dist.Normal(0.0, 1 + bernoulli("z", 0.4) * torch.sqrt(t).sum()), obs=tensor(0.7))

    with pytest.raises(NotFiniteError, match="more than 256"):
        vfe.FreeEnergy().loss_and_grads(model, None)


def comes_to_an_end(t: Tensor) -> Callable[[], None]:
    def model() -> None:
        pyro.sample("u", dist.Normal(0.0, 1 + bernoulli("z", 0.4) * torch.sqrt(t)), obs=tensor(0.7))

    return model


def test_a_gradient_that_is_not_finite_is_not_written() -> None:
    t, elbo = leaf(1.0), vfe.FreeEnergy()
    model = comes_to_an_end(t)
    elbo.loss_and_grads(model, None)
    assert t.grad is not None
    before = t.grad.clone()
    t.data.zero_()
    with pytest.raises(NotFiniteError):
        elbo.loss_and_grads(model, None)
    assert torch.equal(t.grad, before)
    t.data.fill_(1.0)
    elbo.differentiable_loss(model, None).backward()
    torch.testing.assert_close(t.grad, 2 * before)


def test_a_module_refuses_a_gradient_that_has_become_nan_and_the_hooks_go_with_the_graph() -> None:
    t, elbo = leaf(1.0), vfe.FreeEnergy()
    model = comes_to_an_end(t)
    elbo.differentiable_loss(model, None)
    t.data.zero_()
    with pytest.raises(NotFiniteError, match=r"gradient of a parameter .* is not finite"):
        elbo.differentiable_loss(model, None).backward()
    assert t.grad is None
    gc.collect()
    assert not t._backward_hooks


def test_one_nan_of_another_loss_is_none_of_ours() -> None:
    t = leaf(0.0)
    loss = vfe.FreeEnergy().differentiable_loss(with_factor(lambda z, t: t * z)(t), None)
    torch.sqrt(t).backward()
    assert t.grad is not None
    assert t.grad.isinf()
    t.grad = None
    loss.backward()
    assert t.grad.isfinite()


def test_single_precision_follows_the_law_in_its_digits() -> None:
    p = torch.tensor([0.0, 0.4, 0.6], dtype=torch.float32, requires_grad=True)

    def model() -> None:
        z = pyro.sample("z", dist.Categorical(p))
        pyro.sample("u", dist.Normal(POINTS.float()[z], torch.tensor(1.0).float()), obs=torch.tensor(0.2).float())

    vfe.FreeEnergy().loss_and_grads(model, None)
    assert p.grad is not None
    torch.testing.assert_close(p.grad, tensor([-1.39540925, -0.77456282, 0.51637521]).float(), rtol=1e-4, atol=1e-6)


def test_a_derivative_beyond_all_numbers_is_refused() -> None:
    p = leaf([0.0, 1.0])

    def model() -> None:
        pyro.sample("u", dist.Normal(tensor([0.0, 40.0])[categorical("z", p)], 1.0), obs=tensor(0.2))

    with pytest.raises(NotFiniteError, match="beyond all numbers"):
        vfe.FreeEnergy().loss_and_grads(model, None)
    assert p.grad is None


def test_gradients_add_up_as_in_torch() -> None:
    rate, gate = leaf(3.0), leaf(0.3)
    model, elbo = zero_inflated(rate, gate), vfe.FreeEnergy()
    elbo.loss_and_grads(model, None)
    assert rate.grad is not None
    once = rate.grad.clone()
    elbo.loss_and_grads(model, None)
    torch.testing.assert_close(rate.grad, 2 * once)


def learned_zero_inflated(u: Tensor) -> None:
    gate = pyro.param("gate", tensor(0.5), constraint=constraints.unit_interval)
    rate = pyro.param("rate", tensor(3.0), constraint=constraints.positive)
    zero_inflated(rate, gate)()


def maximum_likelihood() -> tuple[float, float]:
    """rate / (1 - exp(-rate)) is the mean of the positive counts, and (1 - gate) (1 - exp(-rate)) their share."""
    positive = COUNTS[COUNTS > 0]
    rate = positive.mean()
    for _ in range(200):
        rate = positive.mean() * (1 - (-rate).exp())
    return float(1 - len(positive) / len(COUNTS) / (1 - (-rate).exp())), float(rate)


def test_em_fits_zero_inflated_counts_with_the_gate_in_closed_form() -> None:
    run = vfe.EM(learned_zero_inflated).run(COUNTS, tol=1e-14, max_iter=2000, progress_bar=False)
    gate, rate = maximum_likelihood()
    assert float(run.params["gate"]) == pytest.approx(gate, abs=1e-5)
    assert float(run.params["rate"]) == pytest.approx(rate, abs=1e-5)
    assert run.updates["gate"].startswith("closed form")


def test_svi_fits_zero_inflated_counts() -> None:
    run = vfe.fit(
        learned_zero_inflated, None, COUNTS, optim=pyro.optim.Adam({"lr": 0.3}), num_steps=80, progress_bar=False
    )
    gate, rate = maximum_likelihood()
    assert float(run.params["gate"]) == pytest.approx(gate, abs=1e-2)
    assert float(run.params["rate"]) == pytest.approx(rate, abs=1e-2)


def test_pyros_svi_takes_steps_from_a_probability_of_zero() -> None:
    p = torch.nn.Parameter(tensor([0.0, 0.4, 0.6]))

    class Mixture(pyro.nn.PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.p = p

        def forward(self) -> None:
            pyro.sample("u", dist.Normal(POINTS[categorical("z", self.p)], 1.0), obs=tensor(0.2))

    module = vfe.FreeEnergy()(Mixture(), empty)
    optimizer = torch.optim.SGD([p], lr=0.01)
    module().backward()
    optimizer.step()
    assert p.detach()[0] == pytest.approx(0.01395409, abs=1e-8)


def test_wake_phases_follow_the_same_law() -> None:
    def model(u: Tensor) -> None:
        p = pyro.param("p", tensor([0.0, 0.4, 0.6]))
        a = categorical("a", tensor([0.5, 0.5]))
        pyro.sample("u", dist.Normal(POINTS[categorical("z", p)] + a, 1.0), obs=u)

    def guide(u: Tensor) -> None:
        categorical("a", pyro.param("q", tensor([0.6, 0.4]), constraint=constraints.simplex))

    machine = vfe.WakeSleep(model, guide, pyro.optim.SGD({"lr": 1.0}), pyro.optim.SGD({"lr": 1.0}))
    machine.wake(tensor(0.2))
    p = leaf([0.0, 0.4, 0.6])
    each = (normalised(p) * normal(0.2, POINTS + tensor([[0.0], [1.0]]))).sum(-1)
    expected = torch.autograd.grad(-(tensor([0.6, 0.4]) * each.log()).sum(), p)[0]
    torch.testing.assert_close(pyro.param("p").detach(), p.detach() - expected)
