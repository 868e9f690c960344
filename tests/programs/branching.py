"""Programs that branch on a latent in Python, and sites that only the guide has."""

from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor

from programs.case import Program, bernoulli, categorical, noise, positive, simplex, tensor, unit

COUNTS = tensor([1.0, 4.0, 2.0])


def branch(counts: Tensor) -> None:
    a = bernoulli("a", unit("a_prob"))
    if a:
        b = categorical("b", simplex("b_probs", 3))
        pyro.sample("u", dist.Poisson(positive("rates", 3, seed=1)[b]), obs=counts[1])
    else:
        pyro.sample("u", dist.Poisson(positive("rate", seed=2)), obs=counts[1])


def guide_of_a(counts: Tensor) -> None:
    bernoulli("a", unit("q_a", seed=3))


def branching_guide(counts: Tensor) -> None:
    if bernoulli("a", unit("q_a", seed=3)):
        categorical("b", simplex("q_b", 3, seed=4))


def two_sites(counts: Tensor) -> None:
    a = bernoulli("a", unit("a_prob"))
    b = categorical("b", simplex("b_probs", 2, 3, seed=1)[a.long()])
    pyro.sample("u", dist.Poisson(positive("rates", 2, 3, seed=2)[a.long(), b]), obs=counts[1])


def guide_that_branches_on_values(counts: Tensor) -> None:
    a = bernoulli("a", unit("q_a", seed=3))
    probs = simplex("q_b_on", 3, seed=4) if a else simplex("q_b_off", 3, seed=5)
    categorical("b", probs)


def counted_loop(counts: Tensor) -> None:
    n = int(categorical("n", simplex("n_probs", 3)))
    total = tensor(0.0)
    for k in range(n):
        total = total + bernoulli(f"x_{k}", unit("x_prob", 3, seed=1)[k])
    pyro.sample("u", dist.Poisson(1 + total), obs=counts[1])


def counted_loop_guide(counts: Tensor) -> None:
    n = int(categorical("n", simplex("q_n", 3, seed=2)))
    for k in range(n):
        bernoulli(f"x_{k}", unit("q_x", 3, 3, seed=3)[n, k])


def two_branches(counts: Tensor) -> None:
    a, b = bernoulli("a", unit("a_prob")), bernoulli("b", unit("b_prob", seed=1))
    rate = positive("rate", seed=2) if a else tensor(1.0)
    if b.item() > 0:
        rate = rate + bernoulli("c", unit("c_prob", seed=3))
    pyro.sample("u", dist.Poisson(rate + a * b), obs=counts[1])


def branch_over_a_plate(counts: Tensor) -> None:
    g = bernoulli("g", unit("g_prob"))
    rates = positive("rates", 2, seed=1) if g else tensor([1.0, 2.0])
    with pyro.plate("data", 3):
        z = bernoulli("z", unit("z_prob", seed=2) if g else 0.3)
        pyro.sample("u", dist.Poisson(rates[z.long()]), obs=counts)


def branch_over_a_plate_guide(counts: Tensor) -> None:
    g = bernoulli("g", unit("q_g", seed=3))
    with pyro.plate("data", 3):
        bernoulli("z", unit("q_on", 3, seed=4) if g else unit("q_off", seed=5))


def branch_in_sequential_plate(counts: Tensor) -> None:
    for n in pyro.plate("data", 3):
        if bernoulli(f"z_{n}", unit("z_prob")):
            pyro.sample(f"u_{n}", dist.Poisson(positive("rate", seed=1)), obs=counts[n])
        else:
            pyro.sample(f"u_{n}", dist.Poisson(1.5), obs=counts[n])


def lookup_in_a_list(counts: Tensor) -> None:
    rates = [tensor(0.5), positive("rate"), tensor(4.0)]
    z = categorical("z", simplex("z_probs", 3, seed=1))
    pyro.sample("u", dist.Poisson(rates[z.item()]), obs=counts[1])


def auxiliary_guide(counts: Tensor) -> None:
    a = categorical("mood", simplex("q_mood", 3, seed=6), is_auxiliary=True)
    bernoulli("a", unit("q_a", 3, seed=3)[a])
    categorical("b", simplex("q_b", 3, 3, seed=4)[a])


def auxiliary_guide_without_a_mark(counts: Tensor) -> None:
    a = categorical("mood", simplex("q_mood", 3, seed=6))
    bernoulli("a", unit("q_a", 3, seed=3)[a])


def plated(counts: Tensor) -> None:
    with pyro.plate("data", 3):
        z = categorical("z", simplex("z_probs", 2))
        pyro.sample("u", dist.Normal(noise(2, seed=1)[z], positive("sigma", seed=2)), obs=counts / 2)


def plated_auxiliary_guide(counts: Tensor) -> None:
    with pyro.plate("data", 3):
        mood = categorical("mood", simplex("q_mood", 3, 2, seed=3), is_auxiliary=True)
        categorical("z", simplex("q_z", 2, 2, seed=4)[mood])


def global_auxiliary_guide(counts: Tensor) -> None:
    mood = categorical("mood", simplex("q_mood", 2, seed=3), is_auxiliary=True)
    with pyro.plate("data", 3) as n:
        categorical("z", simplex("q_z", 3, 2, 2, seed=4)[n, mood])


CALLS: tuple[Any, ...] = (COUNTS,)

BRANCHING = {
    "branch_in_model": Program(branch, args=CALLS, marginals=(("a",), ("b",), ("b", "a"))),
    "branch_in_model_guided_above": Program(branch, guide_of_a, CALLS),
    "branch_in_both": Program(branch, branching_guide, CALLS),
    "branch_in_guide": Program(two_sites, guide_that_branches_on_values, CALLS),
    "counted_loop": Program(counted_loop, args=CALLS, marginals=(("n",), ("x_0",), ("x_0", "x_1"))),
    "counted_loop_guided": Program(counted_loop, counted_loop_guide, CALLS),
    "two_branches": Program(two_branches, args=CALLS, marginals=(("a", "b"), ("c",), ("c", "a"))),
    "two_branches_guided": Program(two_branches, guide_of_a, CALLS),
    "branch_over_a_plate": Program(branch_over_a_plate, args=CALLS, marginals=(("g", "z"),)),
    "branch_over_a_plate_guided": Program(branch_over_a_plate, branch_over_a_plate_guide, CALLS),
    "branch_in_sequential_plate": Program(branch_in_sequential_plate, args=CALLS),
    "lookup_in_a_list": Program(lookup_in_a_list, args=CALLS, marginals=(("z",),)),
    "auxiliary_site": Program(two_sites, auxiliary_guide, CALLS),
    "auxiliary_site_without_a_mark": Program(two_sites, auxiliary_guide_without_a_mark, CALLS),
    "auxiliary_site_in_a_plate": Program(plated, plated_auxiliary_guide, CALLS, plates=("data",)),
    "auxiliary_site_above_a_plate": Program(plated, global_auxiliary_guide, CALLS),
}
