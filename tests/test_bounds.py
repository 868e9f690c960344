"""Bounds on log p(u): against the exact value, against every tuple of draws, and against weights made by hand."""

import copy
import math
import pickle
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from checks import oracle_of
from oracles import matches
from programs import PROGRAMS, SAMPLED_PROGRAMS
from programs.case import bernoulli, categorical, noise, simplex, tensor, unit
from programs.plates import COUNTS, global_over_local, guide_of_both, mixture, mixture_guide
from torch import Tensor

import pyro_vfe as vfe
from pyro_vfe.energy.weight_means import (
    effective_sample_size,
    jackknife,
    log_mean_exp,
    log_means_without_each,
    means_without_each,
)
from pyro_vfe.errors import PlateKeptError, ScaleError, StructureError, VFEError
from pyro_vfe.program.dreams import Dream

DRAWS_NOTHING = ("the guide draws nothing: all weights are equal",)
LARGE = ("ising", "120", "chain_of_1000")
SLOW = ("branch", "two_branches", "counted", "lookup", "auxiliary")
"""Programs that take one draw at a time."""

NORMAL_ERRORS = 5.0
"""Standard errors by which a mean of independent terms is off once in a million times."""

GUIDED = sorted(
    name
    for name, program in PROGRAMS.items()
    if program.guide.__class__.__name__ != "function" or program.guide.__name__ != "empty"
    if not name.startswith(LARGE) and name not in ("point_estimate_of_w", "scaled_per_datum_guided")
    if "global" not in name or not name.startswith(("subsampled", "scaled"))
)
LARGE_TABLES = ("chain_on_chain", "mixed", "crossing_all", "crossing_edges", "plated_words", "factorial_markov")
LARGE_TABLES += ("markov_chain_with_transitions", "markov_chains_by_class", "markov_chain_with_mixture")
COUNTED = [
    name for name in GUIDED if not name.startswith(("subsampled", "scaled", "pyro_module", "network", *LARGE_TABLES))
]
"""Programs with a full joint table that is soon made."""


NOT_SUMMED = ("auxiliary_site_above_a_plate", "local_guided", "nested_inner_guided", "crossing_one_edge_guided")
NOT_SUMMED += ("branch_in_both", "branch_in_model_guided_above", "auxiliary_site_without_a_mark")
NOT_SUMMED += ("counted_loop_guided", "two_branches_guided")
"""Programs whose weights are sums over latents that tie what is drawn, or lack some of it."""


def bounds_of(name: str, num_particles: int, **options: Any) -> vfe.Bounds:
    program = PROGRAMS[name]
    return vfe.bounds(
        program.model, program.guide, *program.args, num_particles=num_particles, **options, **program.kwargs
    )


def evidence_of(name: str) -> Tensor:
    program = PROGRAMS[name]
    return vfe.posterior(program.model, *program.args, **program.kwargs).log_evidence


@cache
def many_of(name: str) -> vfe.Bounds:
    return bounds_of(name, 25 if name.startswith(SLOW) else 400)


def coin(u: Tensor) -> None:
    """A latent of three values, a datum that tells of it, and no plate."""
    v = categorical("v", tensor([0.5, 0.3, 0.2]))
    pyro.sample("u", dist.Poisson(tensor([1.0, 4.0, 9.0])[v]), obs=u)


Q_COIN = tensor([0.2, 0.5, 0.3])


def coin_guide(u: Tensor) -> None:
    categorical("v", Q_COIN)


COIN = tensor(5.0)


def coin_weights(u: Tensor) -> tuple[Tensor, Tensor]:
    """log P(v, u) and log Q(v) of every value, by hand."""
    log_prior = tensor([0.5, 0.3, 0.2]).log()
    rates = tensor([1.0, 4.0, 9.0])
    log_likelihood = u * rates.log() - rates - torch.lgamma(u + 1)
    return log_prior + log_likelihood, Q_COIN.log()


def exact_lower(num_particles: int) -> Tensor:
    """E log 1/K sum w over all tuples of draws."""
    log_joint, log_q = coin_weights(COIN)
    total = tensor(0.0)
    for draws in product(range(3), repeat=num_particles):
        index = torch.tensor(draws)
        total += log_q[index].sum().exp() * log_mean_exp((log_joint - log_q)[index])
    return total


def exact_upper(num_particles: int) -> Tensor:
    """The same where the first draw is from the posterior."""
    log_joint, log_q = coin_weights(COIN)
    posterior = log_joint.softmax(0)
    total = tensor(0.0)
    for first, *others in product(range(3), repeat=num_particles):
        index = torch.tensor([first, *others])
        prob = posterior[first] * log_q[index[1:]].sum().exp()
        total += prob * log_mean_exp((log_joint - log_q)[index])
    return total


def test_the_lower_bound_rises_to_the_evidence_and_the_upper_bound_falls_to_it() -> None:
    log_evidence = coin_weights(COIN)[0].logsumexp(0)
    lower = torch.stack([exact_lower(count) for count in range(1, 7)])
    upper = torch.stack([exact_upper(count) for count in range(1, 7)])
    assert bool((lower.diff() > 0).all()) and bool((upper.diff() < 0).all())
    assert lower[-1] < log_evidence < upper[-1]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_mean_of_estimates_is_the_exact_bound_of_all_tuples_of_draws(count: int) -> None:
    draws = vfe.bounds(coin, coin_guide, COIN, num_particles=count * 2000).log_weights
    estimates = log_mean_exp(draws.reshape(count, 2000))
    stderr = estimates.std() / math.sqrt(2000)
    assert abs(estimates.mean() - exact_lower(count)) < NORMAL_ERRORS * stderr


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_mean_of_upper_estimates_is_the_exact_bound_of_all_tuples_of_draws(count: int) -> None:
    log_joint, log_q = coin_weights(COIN)
    latents = dist.Categorical(logits=log_joint).sample((2000,))
    others = vfe.bounds(coin, coin_guide, COIN, num_particles=count * 2000).log_weights.reshape(count, 2000)
    own = torch.stack(
        [
            vfe.bounds(coin, coin_guide, dream=Dream({"v": v}, {}, (COIN,), {}), num_particles=1).upper  # type: ignore[misc]
            for v in torch.arange(3)
        ]
    )
    torch.testing.assert_close(own, log_joint - log_q)
    estimates = log_mean_exp(torch.cat([own[latents][None], others[1:]]))
    assert abs(estimates.mean() - exact_upper(count)) < NORMAL_ERRORS * estimates.std() / math.sqrt(2000)


def test_estimates_are_means_of_the_weights_that_they_come_with() -> None:
    log_joint, log_q = coin_weights(COIN)
    dream = Dream({"v": torch.tensor(2)}, {"u": COIN}, (COIN,), {})
    found = vfe.bounds(coin, coin_guide, dream=dream, num_particles=7)
    weights = found.log_weights.exp()
    own = (log_joint - log_q)[2].exp()
    assert bool(torch.isclose(weights[:, None], (log_joint - log_q).exp()).any(1).all())
    torch.testing.assert_close(found.lower, weights.mean().log())
    torch.testing.assert_close(found.upper, ((own + weights[1:].sum()) / 7).log())
    torch.testing.assert_close(found.width, found.upper - found.lower)  # type: ignore[operator]
    torch.testing.assert_close(found.free_energy, -weights.log().mean())
    torch.testing.assert_close(found.gap_at_least, found.free_energy + found.lower)
    torch.testing.assert_close(found.effective_sample_size, weights.sum() ** 2 / (weights**2).sum())


def test_one_particle_bounds_by_minus_the_free_energy() -> None:
    found = vfe.bounds(mixture, mixture_guide, COUNTS, num_particles=1)
    torch.testing.assert_close(found.lower, -found.free_energy)
    assert found.gap_at_least == 0
    assert found.lower_stderr is None and found.free_energy_stderr is None and found.gap_at_least_stderr is None


def weights_in_the_table(name: str) -> Tensor:
    """log P(v, u) - log Q(v) of every v; inf where the guide rules out what the model does not."""
    table, known = oracle_of(name), []
    for guide, model in matches(table.guide, table.model):
        log_joint, log_q = (torch.stack([row.log_joint.detach() for row in rows]) for rows in (model, guide))
        known.append(log_joint.logsumexp(0) - log_q.logsumexp(0))
    return torch.stack(known)


def all_among(found: Tensor, known: Tensor) -> bool:
    """Whether each number is one of some known ones, infinite ones included."""
    same = torch.isclose(found[:, None], known, rtol=1e-9, atol=1e-9)
    return bool(same.any(1).all())


@pytest.mark.parametrize("name", COUNTED)
def test_each_weight_is_that_of_some_draw_in_the_full_joint_table(name: str) -> None:
    found = many_of(name)
    total = found.log_weights.reshape(found.num_particles, -1).sum(1) + found.outside
    assert all_among(total, weights_in_the_table(name))


def share_in_the_table(name: str) -> float:
    """E_Q[w]^2 / E_Q[w^2] over every v that the guide draws."""
    table, log_weights, log_qs = oracle_of(name), [], []
    for guide, model in matches(table.guide, table.model):
        log_joint, log_q = (torch.stack([row.log_joint.detach() for row in rows]) for rows in (model, guide))
        log_qs.append(log_q.logsumexp(0))
        log_weights.append(log_joint.logsumexp(0) - log_qs[-1])
    probs, weights = torch.stack(log_qs).exp(), torch.stack(log_weights)
    drawn = probs > 0
    probs, weights = probs[drawn], (weights[drawn] - weights[drawn].max()).exp()
    return float((probs @ weights) ** 2 / (probs @ weights**2))


@pytest.mark.parametrize("name", COUNTED)
def test_what_draws_are_worth_is_exactly_what_the_full_joint_table_says(name: str) -> None:
    found = many_of(name)
    if found.exact_share is None:
        assert name in NOT_SUMMED
        return
    # Data that are independent: E[prod w]^2 / E[(prod w)^2] is the product.
    assert float(found.exact_share.prod()) == pytest.approx(share_in_the_table(name), rel=1e-6)


@pytest.mark.parametrize("name", COUNTED)
def test_a_draw_from_the_exact_posterior_bounds_the_evidence_from_above(name: str) -> None:
    program = PROGRAMS[name]
    posterior = vfe.posterior(program.model, *program.args, **program.kwargs)
    latents = {site: value[0] for site, value in posterior.sample(1).items()}
    dream = Dream(latents, {}, program.args, program.kwargs)
    found = vfe.bounds(program.model, program.guide, dream=dream, num_particles=10)
    assert found.dream_log_weights is not None
    assert all_among((found.dream_log_weights.sum() + found.outside)[None], weights_in_the_table(name))
    low, high = found.interval(1 - 1e-6)
    assert high is not None and low < posterior.log_evidence < high


@pytest.mark.parametrize("name", GUIDED)
def test_log_p_lies_within_its_interval_and_near_the_lower_bound_of_many_draws(name: str) -> None:
    found, log_evidence = many_of(name), evidence_of(name)
    if bool((found.weight == 1).all()):
        assert found.interval(1 - 1e-6)[0] <= log_evidence
    stderr = found.lower_stderr
    assert stderr is not None
    assert found.lower - log_evidence < NORMAL_ERRORS * stderr + 1e-9


@pytest.mark.parametrize("name", [name for name in GUIDED if PROGRAMS[name].scaled_plate is None])
def test_the_mean_over_draws_is_the_free_energy(name: str) -> None:
    program, found = PROGRAMS[name], many_of(name)
    free_energy = vfe.FreeEnergy().decompose(program.model, program.guide, *program.args, **program.kwargs).free_energy
    stderr = found.free_energy_stderr
    assert stderr is not None
    if not free_energy.isfinite():
        assert found.free_energy == free_energy
    elif name != "auxiliary_site_without_a_mark":
        assert abs(found.free_energy - free_energy) < NORMAL_ERRORS * stderr + 1e-9


@pytest.mark.parametrize(
    "name", ["v_depends_on_w", "w_depends_on_v_both_guided", "poisson_w", "discrete_site_kept_sampled"]
)
def test_the_mean_over_draws_is_the_free_energy_where_latents_are_continuous(name: str) -> None:
    program = SAMPLED_PROGRAMS[name]
    found = vfe.bounds(program.model, program.guide, *program.args, num_particles=2000)
    assert program.moments is not None and found.free_energy_stderr is not None
    assert abs(found.free_energy - program.moments()[0]) < NORMAL_ERRORS * found.free_energy_stderr


def line(points: Tensor) -> None:
    with pyro.plate("data", len(points)):
        z = bernoulli("z", tensor(0.3))
        w = pyro.sample("w", dist.Normal(2 * z, 1.0))
        pyro.sample("u", dist.Normal(w, 0.5), obs=points)


POINTS = tensor([0.3, 1.9, -0.7])


def line_evidence() -> Tensor:
    """log p(u_n), in closed form."""
    prior = tensor([0.7, 0.3]).log()
    return (prior + dist.Normal(tensor([0.0, 2.0]), math.sqrt(1.25)).log_prob(POINTS[:, None])).logsumexp(-1)


def line_posterior(points: Tensor) -> None:
    with pyro.plate("data", len(points)):
        prior = tensor([0.7, 0.3]).log()
        logits = prior + dist.Normal(tensor([0.0, 2.0]), math.sqrt(1.25)).log_prob(points[:, None])
        z = pyro.sample("z", dist.Bernoulli(logits=logits[..., 1] - logits[..., 0]))
        pyro.sample("w", dist.Normal((2 * z + 4 * points) / 5, math.sqrt(0.2)))


def line_posterior_of_w_alone(points: Tensor) -> None:
    with pyro.plate("data", len(points)):
        pyro.sample("w", dist.Normal(points, 1.0))


def test_under_the_exact_posterior_every_draw_has_the_weight_of_the_evidence() -> None:
    found = vfe.bounds(line, line_posterior, POINTS, num_particles=50)
    torch.testing.assert_close(found.log_weights, line_evidence().expand(50, 3))
    torch.testing.assert_close(found.effective_sample_size, torch.full((3,), 50.0))
    assert found.gap_at_least.abs() < 1e-12 and bool((found.pareto_k == -math.inf).all())


def test_a_latent_that_only_the_model_has_is_summed_out_of_each_weight() -> None:
    found = vfe.bounds(line, line_posterior_of_w_alone, POINTS, num_particles=4000)
    assert found.plates == ("data",)
    stderr = jackknife(log_means_without_each(found.log_weights))
    assert bool(((found.lower_by_datum - line_evidence()).abs() < NORMAL_ERRORS * stderr).all())
    w = 0.37 * torch.ones(3)
    given = vfe.bounds(line, line_posterior_of_w_alone, dream=Dream({"w": w}, {}, (POINTS,), {}), num_particles=1)
    means = tensor([0.0, 2.0])
    log_joint = (tensor([0.7, 0.3]).log() + dist.Normal(means, 1.0).log_prob(w[:, None])).logsumexp(-1)
    log_joint = log_joint + dist.Normal(w, 0.5).log_prob(POINTS)
    torch.testing.assert_close(given.upper_by_datum, log_joint - dist.Normal(POINTS, 1.0).log_prob(w))


def test_data_in_a_plate_have_weights_of_their_own() -> None:
    found = vfe.bounds(mixture, mixture_guide, COUNTS, num_particles=2000)
    surprise = vfe.FreeEnergy().decompose(mixture, mixture_guide, COUNTS).by("data").surprise
    assert found.plates == ("data",) and found.num_data == len(COUNTS)
    stderr = found.by("data").lower_stderr
    assert stderr is not None
    assert bool(((found.by("data").lower + surprise).abs() < NORMAL_ERRORS * stderr).all())
    torch.testing.assert_close(found.by("data").lower.sum(), found.lower)
    torch.testing.assert_close((stderr**2).sum().sqrt(), found.lower_stderr)
    assert found.lower > log_mean_exp(found.log_weights[:20].sum(1))


def test_what_ties_the_data_together_makes_them_one_datum() -> None:
    found = vfe.bounds(global_over_local, guide_of_both, COUNTS, num_particles=3)
    assert found.plates == () and found.log_weights.shape == (3,)
    assert "all 4 data are one datum here" in str(found)
    with pytest.raises(PlateKeptError, match="Here everything is one datum"):
        found.by("data")


def test_the_steps_of_a_chain_are_one_datum() -> None:
    found = bounds_of("markov_chain_with_chain_guide", 3)
    assert found.plates == () and found.num_data == 4


@pytest.mark.parametrize("alone", [False, True])
def test_draws_that_are_read_outside_of_their_plate_make_the_data_one(alone: bool) -> None:
    def model(points: Tensor) -> None:
        with pyro.plate("data", len(points)):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("u", dist.Normal(w, 1.0), obs=points)
        if alone:
            assert w.dim() == 1
        pyro.factor("pull", -(w**2).sum(-1, keepdim=not alone))

    found = vfe.bounds(model, line_posterior_of_w_alone, POINTS, num_particles=200 if alone else 2000)
    precision, mean = 4.0, POINTS / 4.0
    exact = (0.5 * math.log(1 / precision) + 0.5 * precision * mean**2 - 0.5 * POINTS**2).sum()
    exact = exact - 1.5 * math.log(2 * math.pi)
    assert found.plates == () and found.lower_stderr is not None
    assert abs(found.lower - exact) < NORMAL_ERRORS * found.lower_stderr


def test_each_of_several_steps_of_a_sequential_plate_is_a_datum() -> None:
    found = bounds_of("sequential_guided", 2000)
    exact = vfe.FreeEnergy().decompose(
        PROGRAMS["sequential_guided"].model, PROGRAMS["sequential_guided"].guide, *PROGRAMS["sequential_guided"].args
    )
    stderr = found.by("data").lower_stderr
    assert found.plates == ("data",) and stderr is not None
    assert bool(((found.lower_by_datum + exact.by("data").surprise).abs() < NORMAL_ERRORS * stderr).all())


def only_the_first(counts: Tensor) -> None:
    """Right alone, and wrong side by side: it takes the first draw for all."""
    v = categorical("v", simplex("v_probs", 3))
    pyro.sample("u", dist.Poisson(tensor([1.0, 4.0, 9.0])[v.reshape(-1)[0]]).expand([1]), obs=counts[:1])


def turned_into_a_number(counts: Tensor) -> None:
    v = categorical("v", simplex("v_probs", 3))
    pyro.sample("u", dist.Poisson([1.0, 4.0, 9.0][int(v)]), obs=counts[0])


def guide_of_v(counts: Tensor) -> None:
    categorical("v", simplex("q_v", 3, seed=1))


@pytest.mark.parametrize("model", [only_the_first, turned_into_a_number], ids=["mixed_up", "number"])
def test_draws_stand_side_by_side_only_where_each_has_the_weight_that_it_has_alone(
    model: Callable[[Tensor], None],
) -> None:
    found = vfe.bounds(model, guide_of_v, COUNTS, num_particles=30).log_weights
    rates, u = tensor([1.0, 4.0, 9.0]), COUNTS[0]
    by_hand = (simplex("v_probs", 3) / simplex("q_v", 3, seed=1)).log() + u * rates.log() - rates - torch.lgamma(u + 1)
    assert bool(torch.isclose(found[:, None], by_hand.detach()).any(1).all())
    assert len(found.unique()) > 1


def test_many_draws_are_made_in_pieces_that_fit_into_memory() -> None:
    runs = []

    def model(counts: Tensor) -> None:
        runs.append(counts)
        mixture(counts)

    counted = []
    for max_bytes in (1e9, 2.0**14):
        runs.clear()
        found = vfe.bounds(model, mixture_guide, COUNTS, num_particles=2000, max_bytes=max_bytes)
        counted.append(len(runs))
        assert len(found.log_weights) == 2000
    assert counted[0] < counted[1] < 1000


@pytest.mark.parametrize("check", ["first", "always", False])
def test_checks_change_nothing_but_what_is_drawn_next(check: Any) -> None:
    log_joint, log_q = coin_weights(COIN)
    found = vfe.bounds(coin, coin_guide, COIN, num_particles=30, check=check).log_weights
    assert bool(torch.isclose(found[:, None], log_joint - log_q).any(1).all())


def test_a_guide_that_draws_nothing_gives_every_draw_the_evidence() -> None:
    found = vfe.bounds(mixture, None, COUNTS, num_particles=5)
    torch.testing.assert_close(found.lower, vfe.posterior(mixture, COUNTS).log_evidence)
    assert found.remarks == DRAWS_NOTHING and found.lower_stderr is not None and found.lower_stderr < 1e-9


def test_the_elements_of_a_subsample_stand_for_the_others() -> None:
    series = noise(6, seed=3)

    def guide(series: Tensor) -> None:
        with pyro.plate("data", 6, subsample_size=2):
            bernoulli("z", unit("q_z"))

    def model(series: Tensor) -> None:
        with pyro.plate("data", 6, subsample_size=2) as index:
            z = bernoulli("z", tensor(0.4))
            pyro.sample("u", dist.Normal(z, 1.0), obs=series[index])

    found = vfe.bounds(model, guide, series, num_particles=50)
    assert found.weight.tolist() == [3.0, 3.0] and found.num_data == 6
    torch.testing.assert_close(found.lower, 3 * found.lower_by_datum.sum())
    torch.testing.assert_close(found.by("data").lower, 3 * found.lower_by_datum)
    assert "a plate is subsampled" in str(found)
    with pytest.raises(ScaleError, match="Data carry weights"):
        found.interval()
    with pytest.raises(StructureError, match="Plate 'data' is subsampled"):
        vfe.bounds(model, guide, dream=Dream({"z": torch.ones(2)}, {}, (series,), {}))


@pytest.mark.parametrize("name", ["subsampled_global_and_local_guided", "scaled_global_and_local_guided"])
def test_weights_that_differ_inside_of_a_datum_are_refused(name: str) -> None:
    with pytest.raises(ScaleError, match="belong to one datum"):
        bounds_of(name, 5)


def test_the_prior_of_a_point_estimate_counts_once() -> None:
    program = PROGRAMS["point_estimate_of_w"]
    found = vfe.bounds(program.model, program.guide, *program.args, num_particles=3)
    exact = vfe.FreeEnergy().decompose(program.model, program.guide, *program.args).surprise
    torch.testing.assert_close(found.lower, -exact)
    assert found.plates == ("data",) and found.outside != 0
    assert "the bounds are on log p(u, w) at that point" in str(found)


def is_four(u: Tensor) -> None:
    with pyro.plate("data", 2):
        v = categorical("v", tensor([0.5, 0.5]))
        pyro.sample("u", dist.Categorical(tensor([[1.0, 0.0], [0.5, 0.5]])[v]), obs=u)


def guide_of_four(u: Tensor) -> None:
    with pyro.plate("data", 2):
        categorical("v", tensor([[0.5, 0.5], [1.0, 0.0]]))


TWO_ZEROS = torch.tensor([0, 0])


def test_an_impossible_draw_has_no_weight_and_impossible_draws_alone_no_bound() -> None:
    found = vfe.bounds(is_four, guide_of_four, torch.tensor([1, 1]), num_particles=40)
    assert found.lower_by_datum[0].isfinite() and found.lower_by_datum[1] == -math.inf
    assert found.lower == -math.inf and found.free_energy == math.inf
    assert found.effective_sample_size[1] == 0 and found.by("data").gap_at_least[1] == 0
    assert "all draws of a datum have probability zero at site 'u' of the model" in str(found)
    some = vfe.bounds(is_four, guide_of_four, torch.tensor([1, 0]), num_particles=40)
    torch.testing.assert_close(some.lower_by_datum[1], tensor(0.5).log())
    assert "some draws of a datum have probability zero at site 'u'" in str(some)
    assert some.lower.isfinite() and some.free_energy == math.inf and some.gap_at_least == math.inf


def test_a_guide_that_rules_the_dream_out_gives_no_upper_bound() -> None:
    dream = Dream({"v": torch.tensor([1, 1])}, {}, (torch.tensor([1, 0]),), {})
    found = vfe.bounds(is_four, guide_of_four, dream=dream, num_particles=10)
    assert found.upper == math.inf
    assert "gives the dream's own latents probability zero: there is no upper bound" in str(found)


def machine(sizes: tuple[int, int, int]) -> tuple[Callable[[Tensor], None], Callable[[Tensor], None]]:
    """Two layers of latents above the data, and a recognition model, with weights that are always the same."""
    top, middle, data = sizes
    down, below, up, above = (
        noise(a, b, seed=i) for i, (a, b) in enumerate([(top, middle), (middle, data), (data, middle), (middle, top)])
    )

    def model(u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            t = pyro.sample("top", dist.Bernoulli(logits=torch.zeros(top)).to_event(1))
            m = pyro.sample("middle", dist.Bernoulli(logits=t @ down).to_event(1))
            pyro.sample("u", dist.Bernoulli(logits=m @ below - 1).to_event(1), obs=u)

    def guide(u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            m = pyro.sample("middle", dist.Bernoulli(logits=u @ up / 2).to_event(1))
            pyro.sample("top", dist.Bernoulli(logits=m @ above / 2).to_event(1))

    return model, guide


def test_bounds_of_a_dreamt_layered_net_enclose_its_evidence() -> None:
    model, guide = machine((3, 5, 9))
    dream = vfe.dream(model, torch.zeros(40, 9))
    exact = vfe.posterior(model, *dream.args).log_evidence
    widths = []
    for count in (1, 10, 100, 1000):
        found = vfe.bounds(model, guide, dream=dream, num_particles=count)
        low, high = found.interval(0.999)
        assert found.upper is not None and found.width is not None and found.width_stderr is not None
        assert low < exact and high is not None and exact < high
        widths.append(found.width)
    assert found.lower_stderr is not None and found.upper_stderr is not None
    assert abs(found.lower - exact) < NORMAL_ERRORS * found.lower_stderr
    assert abs(found.upper - exact) < NORMAL_ERRORS * found.upper_stderr
    assert widths[0] > widths[1] > widths[2] > widths[3] > 0


def test_dreams_bound_the_evidence_from_above_on_average() -> None:
    model, guide = machine((2, 2, 4))
    dream = vfe.dream(model, torch.zeros(1500, 4))
    found = vfe.bounds(model, guide, dream=dream, num_particles=3)
    exact = -vfe.FreeEnergy().decompose(model, None, *dream.args).surprise
    upper, lower = found.upper, found.lower
    assert upper is not None and found.width_stderr is not None
    assert lower < exact < upper


@pytest.mark.parametrize("count", [20, 200])
def test_standard_errors_are_the_spread_of_estimates(count: int) -> None:
    repeats = 4000
    log_weights = noise(count, repeats, seed=5)
    for estimates, stderr in (
        (log_mean_exp(log_weights), jackknife(log_means_without_each(log_weights))),
        (
            log_mean_exp(log_weights) - log_weights.mean(0),
            jackknife(log_means_without_each(log_weights) - means_without_each(log_weights)),
        ),
    ):
        torch.testing.assert_close((stderr**2).mean().sqrt(), estimates.std(), rtol=0.1, atol=0.0)
        covered = ((estimates - estimates.mean()).abs() < 2 * stderr).double().mean()
        assert 0.85 < covered < 0.99


def test_the_jackknife_leaves_each_weight_out_in_turn() -> None:
    log_weights = tensor([[0.3, -60.0], [1.2, 0.0], [-0.5, -70.0], [0.1, -math.inf]])
    without = log_means_without_each(log_weights)
    for k in range(4):
        others = log_weights[[i for i in range(4) if i != k]]
        torch.testing.assert_close(without[k], others.logsumexp(0) - math.log(3))
    torch.testing.assert_close(jackknife(without)[0], (9 / 4 * without[:, 0].var()).sqrt())
    assert jackknife(log_means_without_each(tensor([[0.0], [-math.inf]]))) == math.inf


def test_even_weights_are_worth_their_number_and_a_single_one_is_worth_one() -> None:
    log_weights = tensor([[800.0, 0.0, -math.inf], [800.0, -90.0, -math.inf]])
    torch.testing.assert_close(effective_sample_size(log_weights), tensor([2.0, 1.0, 0.0]))


@pytest.mark.filterwarnings("ignore:\\s*ArviZ is undergoing:FutureWarning")
def test_pareto_k_of_each_datum_is_arviz_s() -> None:
    import arviz

    found = vfe.bounds(line, line_posterior_of_w_alone, POINTS, num_particles=400)
    expected = [arviz.psislw(column)[1] for column in found.log_weights.T.numpy()]
    torch.testing.assert_close(found.pareto_k, tensor([float(k) for k in expected]))


def narrow_guide(points: Tensor) -> None:
    with pyro.plate("data", len(points)):
        pyro.sample("w", dist.Normal(points - 2, 0.1))


def test_uneven_weights_are_warned_of_in_words() -> None:
    found = vfe.bounds(line, narrow_guide, POINTS, num_particles=400)
    assert bool((found.pareto_k > 0.7).any())
    assert any("Pareto k exceeds 0.7 for" in note for note in found.notes)
    assert found.notes[-1] in str(found) and "Pareto k exceeds 0.7" in found._repr_html_()


def test_a_printout_speaks_of_estimates_of_bounds_and_never_of_log_p_itself() -> None:
    model, guide = machine((2, 3, 4))
    dream = vfe.dream(model, torch.zeros(5, 4))
    for found in (
        vfe.bounds(model, guide, *dream.args, num_particles=50),
        vfe.bounds(model, guide, dream=dream, num_particles=50),
    ):
        text = str(found)
        assert "estimate of a lower bound on log p(u)" in text
        assert ("estimate of an upper bound on log p(u)" in text) == (found.upper is not None)
        assert "log p(u) =" not in text and "exact" not in text.split("K = 50 draws")[0]
        assert f"{float(found.lower):,.4f}" in text and f"{float(found.lower):,.4f}" in found._repr_html_()
        assert f"{float(found.lower):,.4f}" in str(found.by("data"))
        assert "K = 50 draws" in text and "each element of 'data'" in text


def test_an_interval_moves_the_estimates_apart_by_what_markov_s_inequality_asks() -> None:
    dream = Dream({"v": torch.tensor(1)}, {}, (COIN,), {})
    one, both = (vfe.bounds(coin, coin_guide, *args, dream=d) for args, d in (((COIN,), None), ((), dream)))
    low, high = one.interval(0.9)
    torch.testing.assert_close(low, one.lower + math.log(0.1))
    assert high is None
    low, high = both.interval(0.9)
    torch.testing.assert_close(low, both.lower + math.log(0.05))
    torch.testing.assert_close(high, both.upper - math.log(0.05))  # type: ignore[operator]
    for confidence in (0.0, 1.0, 95.0):
        with pytest.raises(VFEError, match="Use a number between 0 and 1"):
            one.interval(confidence)


@pytest.mark.parametrize("risk", [0.5, 0.1])
def test_an_interval_misses_no_more_often_than_it_says(risk: float) -> None:
    log_joint, log_q = coin_weights(COIN)
    log_evidence = log_joint.logsumexp(0)
    misses = {}
    for sign, first in ((1, log_q.exp()), (-1, log_joint.softmax(0))):
        total = tensor(0.0)
        for draws in product(range(3), repeat=3):
            index = torch.tensor(draws)
            prob = first[index[0]] * log_q[index[1:]].sum().exp()
            total += prob * (sign * (log_mean_exp((log_joint - log_q)[index]) - log_evidence) > -math.log(risk))
        misses[sign] = total
    assert misses[1] <= risk and misses[-1] <= risk


def test_the_same_seed_gives_the_same_draws_and_results_are_kept_in_files() -> None:
    found = []
    for _ in range(2):
        pyro.set_rng_seed(4)
        found.append(vfe.bounds(mixture, mixture_guide, COUNTS, num_particles=10))
    assert torch.equal(found[0].log_weights, found[1].log_weights)
    again = pickle.loads(pickle.dumps(copy.deepcopy(found[0])))
    assert torch.equal(again.lower, found[0].lower) and str(again) == str(found[0])


def test_programs_in_single_precision_have_the_same_weights_summed_in_double_precision() -> None:
    log_joint, log_q = coin_weights(COIN)
    torch.set_default_dtype(torch.float32)
    found = vfe.bounds(coin, coin_guide, COIN.float(), num_particles=20).log_weights
    assert found.dtype == torch.float64
    assert bool(torch.isclose(found[:, None], log_joint - log_q, rtol=1e-5, atol=1e-5).any(1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_decomposition_keeps_the_probability_of_a_draw_in_either_precision(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    program = SAMPLED_PROGRAMS["discrete_site_kept_sampled"]
    terms = vfe.FreeEnergy().decompose(program.model, program.guide, program.args[0].to(dtype))
    known = -pyro.param("q_g").detach().double().log()
    assert bool(torch.isclose(terms.entropy, known, rtol=1e-5).any())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: vfe.bounds(coin, coin_guide, COIN, num_particles=0), "num_particles is 0"),
        (
            lambda: vfe.bounds(coin, coin_guide, COIN, dream=Dream({}, {}, (COIN,), {})),
            "given a dream and arguments of the programs",
        ),
        (lambda: vfe.bounds(coin, coin_guide, dream=COIN), "dream is a Tensor"),  # type: ignore[arg-type]
        (
            lambda: vfe.bounds(coin, coin_guide, dream=Dream({"w": COIN}, {}, (COIN,), {})),
            "The dream lacks latent 'v', which guide and model have",
        ),
        (
            lambda: vfe.bounds(coin, coin_guide, dream=Dream({"v": torch.zeros(4).long()}, {}, (COIN,), {})),
            r"Latent 'v' has shape \(4,\) in the dream and \(\) in the guide",
        ),
        (
            lambda: vfe.bounds(
                is_four, guide_of_four, dream=Dream({"v": torch.tensor([0, 0])}, {}, (torch.ones(2),), {})
            ),
            "The dream has probability zero at site 'u' of the model",
        ),
    ],
    ids=["no_particles", "both", "no_dream", "another_model", "shape", "impossible"],
)
def test_calls_that_make_no_sense_are_refused(call: Callable[[], object], words: str) -> None:
    with pytest.raises(VFEError, match=words):
        call()


def test_a_guide_with_a_factor_is_refused() -> None:
    def guide(u: Tensor) -> None:
        v = categorical("v", Q_COIN)
        pyro.factor("tilt", -1.0 * v)

    with pytest.raises(StructureError, match="Site 'tilt' of the guide weighs its draws by a factor"):
        vfe.bounds(coin, guide, COIN)


def test_point_estimates_and_draws_of_the_guide_alone_have_no_upper_bound() -> None:
    program = PROGRAMS["point_estimate_of_w"]
    latents = {"w": tensor(0.2), "z": torch.ones(3)}
    dream = Dream(latents, {"u": program.args[0]}, program.args, {})
    with pytest.raises(StructureError, match="point estimate of 'w'"):
        vfe.bounds(program.model, program.guide, dream=dream)
    guide = pyro.infer.autoguide.AutoMultivariateNormal(pyro.poutine.block(program.model, hide=["z"]))
    with pytest.raises(StructureError, match="of which the dream holds no value"):
        vfe.bounds(program.model, guide, dream=dream)


def test_a_transformed_guide_of_continuous_latents_is_weighed_with_its_jacobian() -> None:
    def model(points: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(points)):
            pyro.sample("u", dist.Poisson(rate), obs=points)

    counts = tensor([1.0, 3.0, 2.0])
    guide = pyro.infer.autoguide.AutoMultivariateNormal(model, init_scale=0.5)
    found = vfe.bounds(model, guide, counts, num_particles=4000)
    total = counts.sum()
    exact = torch.lgamma(2 + total) - (2 + total) * math.log(4.0) - torch.lgamma(counts + 1).sum()
    assert found.plates == () and found.lower_stderr is not None
    assert abs(found.lower - exact) < NORMAL_ERRORS * found.lower_stderr


def test_bounds_hold_where_everything_is_too_large_to_be_summed() -> None:
    found = bounds_of("ising_10_by_10_mean_field", 200)
    exact = PROGRAMS["ising_10_by_10_mean_field"].expected
    assert exact is not None
    low, _ = found.interval(1 - 1e-6)
    assert low < -exact()["surprise"]


def test_a_latent_of_the_guide_alone_is_summed_out_of_it() -> None:
    found = bounds_of("auxiliary_site_in_a_plate", 30)
    assert found.plates == ("data",)
    assert "which the model lacks, is summed out of the guide" in str(found)


def test_parameters_are_left_alone() -> None:
    vfe.bounds(mixture, mixture_guide, COUNTS, num_particles=5)
    before = {name: value.clone() for name, value in pyro.get_param_store().items()}
    vfe.bounds(mixture, mixture_guide, COUNTS, num_particles=5)
    assert before
    assert all(torch.equal(value, before[name]) for name, value in pyro.get_param_store().items())
