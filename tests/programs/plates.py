"""Plates: nested, crossing, sequential, subsampled, scaled, and a global latent over a plate of local ones."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from oracles import TERMS, oracle
from torch import Tensor

from programs.case import Program, bernoulli, categorical, noise, positive, simplex, tensor, unit

COUNTS = tensor([1.0, 4.0, 2.0, 7.0])
GRID = noise(2, 2, seed=11)
BATCH = torch.tensor([1, 4, 6])
SERIES = noise(10, seed=12)
SCALES = tensor([2.0, 0.5, 1.5, 3.0])


def mixture(counts: Tensor) -> None:
    weights, rates = simplex("weights", 3), positive("rates", 3, seed=1)
    with pyro.plate("data", len(counts)):
        z = categorical("z", weights)
        pyro.sample("u", dist.Poisson(rates[z]), obs=counts)


def mixture_guide(counts: Tensor) -> None:
    with pyro.plate("data", len(counts)):
        categorical("z", simplex("q", len(counts), 3, seed=2))


def one_plate_two_sites(counts: Tensor) -> None:
    a_probs, b_probs, rates = (
        simplex("a_probs", 3, 3),
        simplex("b_probs", 3, 2, seed=1),
        positive("rates", 3, 2, seed=2),
    )
    with pyro.plate("data", len(counts), dim=-2):
        a = categorical("a", a_probs.unsqueeze(-2))
        b = categorical("b", b_probs[a])
        pyro.sample("u", dist.Poisson(rates[a, b]), obs=counts.unsqueeze(-1))


def one_plate_two_sites_guide(counts: Tensor) -> None:
    with pyro.plate("data", len(counts), dim=-2):
        b = categorical("b", simplex("q_b", 3, 1, 2, seed=3))
        categorical("a", simplex("q_a", 2, 3, seed=4)[b])


def nested(grid: Tensor) -> None:
    rates = noise(2, 2, seed=1)
    with pyro.plate("outer", 2, dim=-1):
        a = bernoulli("a", unit("a_prob"))
        with pyro.plate("inner", 2, dim=-2):
            b = bernoulli("b", unit("b_prob", 2, seed=2)[a.long()])
            pyro.sample("u", dist.Normal(rates[a.long(), b.long()], positive("sigma", seed=3)), obs=grid)


def nested_guide(grid: Tensor) -> None:
    with pyro.plate("outer", 2, dim=-1):
        a = bernoulli("a", unit("q_a", 2, seed=4))
        with pyro.plate("inner", 2, dim=-2):
            bernoulli("b", 0.1 + 0.4 * unit("q_b", 2, 2, seed=5) + 0.3 * a)


def nested_guide_of_the_outer(grid: Tensor) -> None:
    with pyro.plate("outer", 2, dim=-1):
        bernoulli("a", unit("q_a", 2, seed=4))


def nested_guide_of_the_inner(grid: Tensor) -> None:
    with pyro.plate("outer", 2, dim=-1), pyro.plate("inner", 2, dim=-2):
        bernoulli("b", unit("q_b", 2, 2, seed=5))


def global_over_local(counts: Tensor) -> None:
    rates = positive("rates", 3, 2, seed=1)
    g = categorical("g", simplex("g_probs", 3))
    with pyro.plate("data", len(counts)):
        z = categorical("z", simplex("z_probs", 3, 2, seed=2)[g])
        pyro.sample("u", dist.Poisson(rates[g, z]), obs=counts)


def guide_of_both(counts: Tensor) -> None:
    g = categorical("g", simplex("q_g", 3, seed=3))
    with pyro.plate("data", len(counts)) as n:
        categorical("z", simplex("q_z", 3, 4, 2, seed=4)[g, n])


def guide_of_the_global(counts: Tensor) -> None:
    categorical("g", simplex("q_g", 3, seed=3))


def guide_of_the_local(counts: Tensor) -> None:
    with pyro.plate("data", len(counts)):
        categorical("z", simplex("q_z", 4, 2, seed=4))


def guide_of_both_apart(counts: Tensor) -> None:
    with pyro.plate("data", len(counts)):
        categorical("z", simplex("q_z", 4, 2, seed=4))
    categorical("g", simplex("q_g", 3, seed=3))


def global_over_data(counts: Tensor) -> None:
    g = categorical("g", simplex("g_probs", 3))
    with pyro.plate("data", len(counts)):
        pyro.sample("u", dist.Poisson(positive("rates", 3, seed=1)[g]), obs=counts)


def unobserved_local(counts: Tensor) -> None:
    g = categorical("g", simplex("g_probs", 3))
    pyro.sample("total", dist.Poisson(positive("rates", 3, seed=1)[g]), obs=counts.sum())
    with pyro.plate("data", 4):
        categorical("z", simplex("z_probs", 3, 2, seed=2)[g])


def crossing(grid: Tensor) -> None:
    i_plate, j_plate = pyro.plate("i", 2, dim=-2), pyro.plate("j", 2, dim=-1)
    with i_plate:
        a = bernoulli("a", unit("a_prob", 2, 1))
    with j_plate:
        b = bernoulli("b", unit("b_prob", seed=1))
    with i_plate, j_plate:
        c = bernoulli("c", unit("c_prob", 2, 2, seed=2)[a.long(), b.long()])
        pyro.sample("u", dist.Normal(c * noise(2, 2, seed=3) + a - b, 0.7), obs=grid)


def crossing_site_alone(grid: Tensor) -> None:
    with pyro.plate("i", 2, dim=-2), pyro.plate("j", 2, dim=-1):
        c = bernoulli("c", unit("c_prob", 2, 1, seed=2))
        pyro.sample("u", dist.Normal(c * noise(2, 2, seed=3), 0.7), obs=grid)


def crossing_guide_of_the_edges(grid: Tensor) -> None:
    with pyro.plate("i", 2, dim=-2):
        bernoulli("a", unit("q_a", 2, 1, seed=4))
    with pyro.plate("j", 2, dim=-1):
        bernoulli("b", unit("q_b", 2, seed=5))


def crossing_guide_of_one_edge(grid: Tensor) -> None:
    with pyro.plate("i", 2, dim=-2):
        bernoulli("a", unit("q_a", 2, 1, seed=4))


def crossing_guide_of_all(grid: Tensor) -> None:
    i_plate, j_plate = pyro.plate("i", 2, dim=-2), pyro.plate("j", 2, dim=-1)
    with i_plate:
        a = bernoulli("a", unit("q_a", 2, 1, seed=4))
    with j_plate:
        bernoulli("b", unit("q_b", 2, seed=5))
    with i_plate, j_plate:
        bernoulli("c", 0.1 + 0.5 * unit("q_c", 2, 2, seed=6) + 0.2 * a)


def sequential(counts: Tensor) -> None:
    weights, rates = simplex("weights", 3), positive("rates", 3, seed=1)
    for n in pyro.plate("data", len(counts)):
        z = categorical(f"z_{n}", weights)
        pyro.sample(f"u_{n}", dist.Poisson(rates[z]), obs=counts[n])


def sequential_guide(counts: Tensor) -> None:
    for n in pyro.plate("data", len(counts)):
        categorical(f"z_{n}", simplex("q", len(counts), 3, seed=2)[n])


def sequential_under_global(counts: Tensor) -> None:
    g, rates = categorical("g", simplex("g_probs", 3)), positive("rates", 3, 2, seed=1)
    for n in pyro.plate("data", len(counts)):
        z = categorical(f"z_{n}", simplex("z_probs", 3, 2, seed=2)[g])
        pyro.sample(f"u_{n}", dist.Poisson(rates[g, z]), obs=counts[n])


def sequential_around_vectorised(grid: Tensor) -> None:
    for i in pyro.plate("outer", 2):
        a = bernoulli(f"a_{i}", unit("a_prob"))
        with pyro.plate(f"inner_{i}", 2):
            b = bernoulli(f"b_{i}", unit("b_prob", 2, seed=2)[a.long()])
            pyro.sample(f"u_{i}", dist.Normal(a + 2 * b, 1.0), obs=grid[i])


def subsampled(series: Tensor) -> None:
    weights, means = simplex("weights", 2), noise(2, seed=1)
    with pyro.plate("data", len(series), subsample=BATCH) as batch:
        z = categorical("z", weights)
        pyro.sample("u", dist.Normal(means[z], positive("sigma", seed=2)), obs=series[batch])


def subsampled_guide(series: Tensor) -> None:
    with pyro.plate("data", len(series), subsample=BATCH) as batch:
        categorical("z", simplex("q", 10, 2, seed=3)[batch])


def subsampled_under_global(series: Tensor) -> None:
    means, g = noise(3, 2, seed=1), categorical("g", simplex("g_probs", 3))
    with pyro.plate("data", len(series), subsample=BATCH):
        z = categorical("z", simplex("z_probs", 3, 2, seed=2)[g])
        pyro.sample("u", dist.Normal(means[g, z], positive("sigma", seed=2)), obs=pyro.subsample(series, event_dim=0))


def subsampled_guide_of_both(series: Tensor) -> None:
    g = categorical("g", simplex("q_g", 3, seed=3))
    with pyro.plate("data", len(series), subsample=BATCH) as batch:
        categorical("z", simplex("q_z", 3, 10, 2, seed=4)[g, batch])


def scaled(counts: Tensor) -> None:
    with pyro.plate("data", 4), pyro.poutine.scale(scale=SCALES):
        z = categorical("z", simplex("weights", 3))
        pyro.sample("u", dist.Poisson(positive("rates", 3, seed=1)[z]), obs=counts)


def scaled_guide(counts: Tensor) -> None:
    with pyro.plate("data", 4), pyro.poutine.scale(scale=SCALES):
        categorical("z", simplex("q", 4, 3, seed=2))


def scaled_under_global(counts: Tensor) -> None:
    rates, g = positive("rates", 3, 2, seed=1), categorical("g", simplex("g_probs", 3))
    with pyro.plate("data", 4), pyro.poutine.scale(scale=SCALES):
        z = categorical("z", simplex("z_probs", 3, 2, seed=2)[g])
        pyro.sample("u", dist.Poisson(rates[g, z]), obs=counts)


def scaled_guide_of_both(counts: Tensor) -> None:
    g = categorical("g", simplex("q_g", 3, seed=3))
    with pyro.plate("data", 4) as n, pyro.poutine.scale(scale=SCALES):
        categorical("z", simplex("q_z", 3, 4, 2, seed=4)[g, n])


def halved(program: Callable[..., Any]) -> Callable[..., Any]:
    return pyro.poutine.scale(program, scale=0.5)


def halved_terms() -> dict[str, Tensor]:
    terms = oracle(global_over_local, guide_of_both, COUNTS).terms
    return {name: 0.5 * terms[name] for name in TERMS if name != "surprise" and name != "gap"}


def terms_of_a_subsample(guide: Callable[..., Any]) -> Callable[[], dict[str, Tensor]]:
    """What is known of a latent above a subsample that the guide has: all but surprise and gap."""

    def terms() -> dict[str, Tensor]:
        found = oracle(subsampled_under_global, guide, SERIES, scaled_plate="data").terms
        return {name: found[name] for name in TERMS if name != "surprise" and name != "gap"}

    return terms


DATA, EDGES = ("data",), ("i", "j")

PLATES = {
    "mixture": Program(mixture, args=(COUNTS,), plates=DATA, pyro_nesting=1, marginals=(("z",),)),
    "mixture_guided": Program(mixture, mixture_guide, (COUNTS,), plates=DATA, pyro_nesting=1),
    "mixture_called_by_name": Program(mixture, mixture_guide, kwargs={"counts": COUNTS}, plates=DATA, pyro_nesting=1),
    "mixture_of_one_datum": Program(mixture, mixture_guide, (COUNTS[:1],), plates=DATA, pyro_nesting=1),
    "plate_at_dim_2": Program(
        one_plate_two_sites, args=(COUNTS[:3],), plates=DATA, pyro_nesting=2, marginals=(("b", "a"),)
    ),
    "plate_guided_in_reverse": Program(
        one_plate_two_sites, one_plate_two_sites_guide, (COUNTS[:3],), plates=DATA, pyro_nesting=2
    ),
    "nested": Program(nested, args=(GRID,), plates=("outer",), pyro_nesting=2, marginals=(("a",), ("a", "b"))),
    "nested_guided": Program(nested, nested_guide, (GRID,), plates=("outer",), pyro_nesting=2),
    "nested_outer_guided": Program(nested, nested_guide_of_the_outer, (GRID,), plates=("outer",), pyro_nesting=2),
    "nested_inner_guided": Program(nested, nested_guide_of_the_inner, (GRID,), plates=("outer",)),
    "global_over_local": Program(
        global_over_local, args=(COUNTS,), pyro_nesting=1, marginals=(("g",), ("z",), ("g", "z"))
    ),
    "global_and_local_guided": Program(global_over_local, guide_of_both, (COUNTS,), pyro_nesting=1),
    "global_and_local_guided_apart": Program(global_over_local, guide_of_both_apart, (COUNTS,)),
    "global_guided": Program(global_over_local, guide_of_the_global, (COUNTS,), pyro_nesting=1),
    "local_guided": Program(global_over_local, guide_of_the_local, (COUNTS,)),
    "global_over_data": Program(global_over_data, args=(COUNTS,), pyro_nesting=1, marginals=(("g",),)),
    "unobserved_local": Program(unobserved_local, args=(COUNTS,), pyro_nesting=1, marginals=(("z",), ("z", "g"))),
    "crossing": Program(crossing, args=(GRID,), marginals=(("a",), ("b",), ("c",), ("a", "b", "c"))),
    "crossing_site_alone": Program(crossing_site_alone, args=(GRID,), plates=EDGES, pyro_nesting=2),
    "crossing_edges_guided": Program(crossing, crossing_guide_of_the_edges, (GRID,), pyro_nesting=2),
    "crossing_one_edge_guided": Program(crossing, crossing_guide_of_one_edge, (GRID,)),
    "crossing_all_guided": Program(crossing, crossing_guide_of_all, (GRID,), pyro_nesting=2),
    "sequential": Program(sequential, args=(COUNTS,), plates=DATA, pyro_nesting=0, marginals=(("z_2",),)),
    "sequential_guided": Program(sequential, sequential_guide, (COUNTS,), plates=DATA, pyro_nesting=0),
    "sequential_under_global": Program(sequential_under_global, args=(COUNTS,), pyro_nesting=0),
    "sequential_around_vectorised": Program(
        sequential_around_vectorised, args=(GRID,), plates=("outer",), pyro_nesting=1
    ),
    "subsampled": Program(subsampled, args=(SERIES,), scaled_plate="data", plates=DATA, pyro_nesting=1),
    "subsampled_guided": Program(
        subsampled, subsampled_guide, (SERIES,), scaled_plate="data", plates=DATA, pyro_nesting=1
    ),
    "subsampled_under_guided_global": Program(
        subsampled_under_global,
        guide_of_the_global,
        (SERIES,),
        scaled_plate="data",
        pyro_nesting=1,
        expected=terms_of_a_subsample(guide_of_the_global),
    ),
    "subsampled_global_and_local_guided": Program(
        subsampled_under_global,
        subsampled_guide_of_both,
        (SERIES,),
        scaled_plate="data",
        pyro_nesting=1,
        expected=terms_of_a_subsample(subsampled_guide_of_both),
    ),
    "scaled_per_datum": Program(scaled, args=(COUNTS,), scaled_plate="data", plates=DATA),
    "scaled_per_datum_guided": Program(
        scaled, scaled_guide, (COUNTS,), scaled_plate="data", plates=DATA, pyro_nesting=1
    ),
    "scaled_under_global": Program(scaled_under_global, args=(COUNTS,), scaled_plate="data"),
    "scaled_under_guided_global": Program(scaled_under_global, guide_of_the_global, (COUNTS,), scaled_plate="data"),
    "scaled_global_and_local_guided": Program(
        scaled_under_global, scaled_guide_of_both, (COUNTS,), scaled_plate="data", pyro_nesting=1
    ),
    "scaled_as_a_whole": Program(
        halved(global_over_local), halved(guide_of_both), (COUNTS,), pyro_nesting=1, expected=halved_terms
    ),
}

UNSPLIT = ("subsampled_under_guided_global", "subsampled_global_and_local_guided")
"""The programs whose F is an estimate that has no surprise and no gap."""
