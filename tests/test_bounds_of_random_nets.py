"""The nets of Saul, Jaakkola and Jordan in the benchmark, against sums over all 64 states and scipy."""

from itertools import product

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from benchmarks import random_nets
from benchmarks.random_nets import HIDDEN, TOP, VISIBLE, Nets, best_bounds, bounded_twice, paper_bound

close = torch.testing.assert_close

STATES = torch.tensor(list(product((0.0, 1.0), repeat=TOP + HIDDEN)), dtype=torch.float64)


def log_joint(nets: Nets) -> Tensor:
    """log P(v, nothing on) of every state of what is hidden, shape `(N, 64)`."""
    top, hidden = STATES.split((TOP, HIDDEN), 1)
    z_hidden = torch.einsum("si,nij->nsj", top, nets.hidden_weight) + nets.hidden_bias[:, None]
    z_visible = torch.einsum("si,nij->nsj", hidden, nets.visible_weight) + nets.visible_bias[:, None]
    log_probs = log_bernoulli(top, nets.top_bias[:, None]) + log_bernoulli(hidden, z_hidden)
    return log_probs + logsigmoid(-z_visible).sum(-1)


def log_bernoulli(value: Tensor, logits: Tensor) -> Tensor:
    return (value * logsigmoid(logits) + (1 - value) * logsigmoid(-logits)).sum(-1)


def free_energy(log_probs: Tensor, q_logits: Tensor) -> Tensor:
    """F of a factorised Q by the sum over all states."""
    log_q = log_bernoulli(STATES, q_logits[..., None, :])
    return (log_q.exp() * (log_q - log_probs)).sum(-1)


def lowest_of_scipy(log_probs: Tensor, num_starts: int) -> float:
    """The lowest F that L-BFGS finds from some starts."""

    def value_and_gradient(q_logits: np.ndarray) -> tuple[float, np.ndarray]:
        at = torch.tensor(q_logits, requires_grad=True)
        value = free_energy(log_probs, at)
        return float(value.detach()), torch.autograd.grad(value, at)[0].numpy()

    starts = np.random.default_rng(0).normal(scale=3, size=(num_starts, TOP + HIDDEN))
    options = {"ftol": 1e-15, "gtol": 1e-10}
    ends = [minimize(value_and_gradient, start, jac=True, method="L-BFGS-B", options=options) for start in starts]
    return min(end.fun for end in ends)


def test_weights_and_biases_fill_the_interval() -> None:
    nets = random_nets.random_nets(2000)
    for values in (nets.top_bias, nets.hidden_weight, nets.hidden_bias, nets.visible_weight, nets.visible_bias):
        assert -1 <= values.min() < -0.99 and 0.99 < values.max() <= 1
        assert abs(values.mean()) < 0.05 and abs(values.var() - 1 / 3) < 0.02
    assert nets.visible_weight.shape == (2000, HIDDEN, VISIBLE)


def test_the_surprise_of_20_nets_is_the_sum_over_all_states() -> None:
    nets = random_nets.random_nets(20)
    close(best_bounds(nets, num_starts=1).surprise, -log_joint(nets).logsumexp(-1))


@pytest.mark.parametrize("seed", [0, 1])
def test_scipy_finds_no_better_factorised_Q(seed: int) -> None:
    nets = random_nets.random_nets(4, seed)
    bounds = best_bounds(nets, num_starts=3, seed=seed)
    by_scipy = torch.tensor([lowest_of_scipy(table, 6) for table in log_joint(nets)], dtype=torch.float64)
    close(bounds.free_energy, by_scipy, rtol=0, atol=1e-9)
    assert bounds.num_sweeps < random_nets.MOST_SWEEPS
    assert (bounds.ends >= bounds.free_energy).all()


def test_the_first_start_has_all_probabilities_at_one_half_and_sweeps_lower_its_F() -> None:
    nets = random_nets.random_nets(3, seed=5)
    guide = random_nets.started(nets, 1, seed=0)
    halves = torch.zeros(len(nets), TOP + HIDDEN, dtype=torch.float64)
    assert all((logits == 0).all() for logits in guide.parameters())
    assert (best_bounds(nets, 1).free_energy < free_energy(log_joint(nets), halves)).all()


def test_the_second_bound_lies_above_F_at_every_Q_and_xi() -> None:
    torch.manual_seed(0)
    nets = random_nets.random_nets(50)
    for _ in range(20):
        q_logits = 2 * torch.randn(len(nets), TOP + HIDDEN, dtype=torch.float64)
        xi = torch.rand(len(nets), HIDDEN + VISIBLE, dtype=torch.float64)
        assert (paper_bound(nets, q_logits.sigmoid(), xi) > free_energy(log_joint(nets), q_logits)).all()


def test_the_second_bound_of_known_inputs_is_F() -> None:
    # Without weights no input varies, and xi = sigmoid(bias) makes the bound an equality.
    nets = random_nets.random_nets(5)
    nets = Nets(nets.top_bias, 0 * nets.hidden_weight, nets.hidden_bias, 0 * nets.visible_weight, nets.visible_bias)
    q_logits = torch.randn(5, TOP + HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    xi = torch.cat([nets.hidden_bias, nets.visible_bias], -1).sigmoid()
    close(paper_bound(nets, q_logits.sigmoid(), xi), free_energy(log_joint(nets), q_logits))
    close(bounded_twice(nets), softplus(nets.visible_bias).sum(-1), rtol=0, atol=1e-6)


def test_a_section_counts_every_net_once_and_names_what_it_measured() -> None:
    nets = random_nets.random_nets(40)
    bounds, twice = best_bounds(nets, num_starts=2), bounded_twice(nets)
    assert (bounds.surprise < bounds.free_energy).all() and (bounds.free_energy < twice).all()
    lines = random_nets.section(bounds, twice).splitlines()
    counts = [int(line.split()[4]) for line in lines if " to " in line and "%" in line and line[0] != "|"]
    assert sum(counts) == 40
    row = next(line for line in lines if line.startswith("| F of the best factorised Q |"))
    assert float(row.split("|")[2]) == pytest.approx(100 * float(bounds.looseness.mean()), abs=0.005)
