"""The tree of a model, a guide and data: every number in it against the full joint table or the programs themselves."""

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from oracles import Oracle, oracle
from programs import PROGRAMS, Program
from programs.case import bernoulli, categorical, empty, noise, positive, simplex, tensor, unit
from programs.plates import (
    COUNTS,
    mixture,
    mixture_guide,
    subsampled,
    subsampled_guide,
)
from programs.sampled import POINTS, guide_of_w, guide_of_w_and_v, v_depends_on_w
from torch import Tensor

import pyro_vfe as vfe
from pyro_vfe.errors import ImpossibleDataError, StructureError, VFEError, VFEWarning

IS_OLD = hasattr(az, "from_datatree")
"""Whether ArviZ works on InferenceData."""

pytestmark = [
    # ArviZ 0.23 with the pandas and the matplotlib of today
    pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.sort_values:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping:DeprecationWarning"),
]

GUIDED = (
    *("chain_mean_field", "chain_forward_guide", "mixture_guided", "nested_guided", "global_and_local_guided"),
    *("crossing_all_guided", "sequential_guided", "mixed_guided", "bits_guided", "markov_chain_with_chain_guide"),
)
"""Guides of all latents."""

PARTLY_GUIDED = ("nested_outer_guided", "global_guided", "collider_guide_of_the_child", "chain_guide_of_the_middle")
"""Guides that leave latents to the model."""

EXACT = (
    *("chain", "tree", "collider", "mixture", "nested", "global_over_local", "crossing", "sequential"),
    *("left_right_chain", "bits", "mixed", "masked_data", "branch_over_a_plate"),
)
"""Models without a guide."""


def tree_of(program: Program, with_guide: bool = True, **options: Any) -> xarray.DataTree:
    """The tree, whatever the guide is worth."""
    guide = program.guide if with_guide else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VFEWarning)
        return vfe.to_datatree(program.model, guide, *program.args, **{**program.kwargs, **options})


def draws_of(program: Program, with_guide: bool = True, **options: Any) -> xarray.DataTree:
    """The tree without simulations."""
    return tree_of(program, with_guide, **options, prior=False, posterior_predictive=False)


@cache
def table_of(name: str, with_guide: bool = True) -> Oracle:
    program = PROGRAMS[name]
    return oracle(program.model, program.guide if with_guide else empty, *program.args, **program.kwargs)


def close(actual: Any, expected: Any, tolerance: float = 1e-9) -> None:
    values = expected.detach().numpy() if isinstance(expected, Tensor) else np.asarray(expected)
    np.testing.assert_allclose(np.asarray(actual).reshape(values.shape), values, rtol=tolerance, atol=tolerance)


def elpd(found: Any) -> float:
    return float(found.elpd_loo if IS_OLD else found.elpd)


# The log-likelihood: every datum with the discrete latents summed out


@pytest.mark.parametrize("with_guide", [True, False])
@pytest.mark.parametrize("name", ["mixture_guided", "sequential_guided"])
def test_elpd_of_a_mixture_is_the_exact_log_score_of_its_data(name: str, with_guide: bool) -> None:
    tree = draws_of(PROGRAMS[name], with_guide, num_samples=200)
    expected = table_of(name, False).by("data")["surprise"].detach()
    (values,) = tree["log_likelihood"].data_vars.values()
    assert values.dims == ("chain", "draw", "data")
    close(values[0, 17], -expected)
    found = az.loo(az.from_datatree(tree) if IS_OLD else tree)
    assert elpd(found) == pytest.approx(-float(expected.sum()), rel=1e-10)
    assert not found.warning


def test_nested_plates_of_data_are_one_datum_where_a_latent_ties_them() -> None:
    tree = draws_of(PROGRAMS["nested_guided"], num_samples=30)
    values = tree["log_likelihood"]["u"]
    assert values.dims == ("chain", "draw", "outer")
    close(values[0, 3], -table_of("nested_guided").by("outer")["surprise"])


def test_data_tied_by_a_global_latent_are_one_datum() -> None:
    tree = draws_of(PROGRAMS["global_over_local"], num_samples=30)
    values = tree["log_likelihood"]["u"]
    assert values.dims == ("chain", "draw")
    close(values[0, 3], -table_of("global_over_local").terms["surprise"])


def two_observations(counts: Tensor) -> None:
    with pyro.plate("data", len(counts)):
        z = categorical("z", simplex("weights", 2))
        pyro.sample("u", dist.Poisson(positive("rates", 2, seed=1)[z]), obs=counts)
        pyro.sample("s", dist.Bernoulli(unit("probs", 2, seed=2)[z]), obs=(counts > 3).double())


def test_sites_that_are_observed_together_make_one_datum() -> None:
    tree = vfe.to_datatree(two_observations, None, COUNTS, num_samples=30)
    assert list(tree["log_likelihood"].data_vars) == ["joint"]
    close(tree["log_likelihood"]["joint"][0, 0], -oracle(two_observations, empty, COUNTS).by("data")["surprise"])
    assert set(tree["observed_data"].data_vars) == {"u", "s"}


@pytest.mark.parametrize("guide", [guide_of_w, guide_of_w_and_v])
def test_with_sampled_latents_each_draw_has_its_own_log_likelihood(guide: Callable[..., Any]) -> None:
    program = Program(v_depends_on_w, guide, (POINTS,))
    tree = draws_of(program, num_samples=12)
    for draw in range(12):
        w = torch.as_tensor(tree["posterior"]["w"].values[0, draw])
        held = pyro.poutine.condition(v_depends_on_w, data={"w": w})
        expected = oracle(held, empty, POINTS).by("data")["surprise"]
        close(tree["log_likelihood"]["u"][0, draw], -expected)


# Draws


def frequencies(values: np.ndarray, support: np.ndarray) -> np.ndarray:
    """How often each value was drawn, `(*batch, K)`, of draws `(draws, *batch, *event)`."""
    event = support.ndim - 1
    same = np.expand_dims(values, values.ndim - event) == support
    return same.all(tuple(range(-event, 0))).mean(0) if event else same.mean(0)


def within_monte_carlo_error(found: np.ndarray, probs: np.ndarray, count: int) -> None:
    """Five standard deviations of a frequency, plus one draw for rare values."""
    allowed = 5 * (probs * (1 - probs) / count) ** 0.5 + 1 / count
    assert np.all(np.abs(found - probs) <= allowed), np.abs(found - probs).max()


@pytest.mark.parametrize("name", EXACT)
def test_draws_without_a_guide_have_the_frequencies_of_the_exact_posterior(name: str) -> None:
    program, count = PROGRAMS[name], 1500
    tree = draws_of(program, with_guide=False, num_samples=count)
    posterior = vfe.posterior(program.model, *program.args, **program.kwargs)
    for site in posterior.sites:
        values = tree["posterior"][site].values[0]
        probs = table_of(name).posterior.marginal(site).numpy()
        found = frequencies(values, posterior.support(site).numpy())
        within_monte_carlo_error(found.reshape(probs.shape), probs, count)


@pytest.mark.parametrize("name", GUIDED)
def test_draws_of_a_guide_have_the_frequencies_of_its_own_table(name: str) -> None:
    program, count = PROGRAMS[name], 1500
    tree = draws_of(program, num_samples=count)
    guide = table_of(name).guide
    rows = torch.stack([row.log_joint for row in guide]).exp().detach().numpy()
    for site, scored in guide[0].sites.items():
        support = vfe_support(program, site)
        values = tree["posterior"][site].values[0].reshape(count, max(1, scored.log_prob.numel()), *support.shape[1:])
        for flat in range(values.shape[1]):
            chosen = np.array([row.assignment[site, flat] for row in guide])
            probs = np.array([rows[chosen == k].sum() for k in range(len(support))])
            within_monte_carlo_error(frequencies(values[:, flat], support), probs, count)


def vfe_support(program: Program, site: str) -> np.ndarray:
    """The values of a latent, in order."""
    return vfe.posterior(program.model, *program.args, **program.kwargs).support(site).numpy()


@pytest.mark.parametrize("name", PARTLY_GUIDED)
def test_latents_that_the_guide_leaves_out_are_drawn_given_the_others(name: str) -> None:
    """The joint draws average P(v, u) / (Q(guided) P(rest | guided, u)) = P(guided, u) / Q(guided) to p(u)."""
    program, count = PROGRAMS[name], 1000
    tree = draws_of(program, num_samples=count)
    for site, probs in tree["variational"].data_vars.items():
        if site.endswith("_q"):
            drawn = tree["posterior"][site.removesuffix("_q")].values[0]
            support = vfe_support(program, site.removesuffix("_q"))
            within_monte_carlo_error(frequencies(drawn, support), probs.values, count)
    weights = np.exp(tree["sample_stats"]["log_weight"].values[0] + float(table_of(name).terms["surprise"].detach()))
    assert abs(weights.mean() - 1) < 5 * weights.std() / count**0.5


def test_draws_are_joint() -> None:
    """Pairs of a global latent and a local one under it, in the posterior."""
    program, count = PROGRAMS["global_over_local"], 4000
    tree = draws_of(program, with_guide=False, num_samples=count)
    g, z = (tree["posterior"][site].values[0] for site in ("g", "z"))
    probs = table_of("global_over_local").posterior.marginal("g", "z").numpy()
    for datum, pairs in enumerate(probs):
        found = np.array([[np.mean((g == a) & (z[:, datum] == b)) for b in range(2)] for a in range(3)])
        within_monte_carlo_error(found, pairs, count)


def test_discrete_latents_are_whole_numbers_and_others_are_not() -> None:
    tree = tree_of(Program(v_depends_on_w, guide_of_w_and_v, (POINTS,)), num_samples=20)
    assert tree["posterior"]["z"].dtype == np.int64
    assert tree["posterior"]["w"].dtype == np.float64
    assert tree["posterior"]["z"].dims == ("chain", "draw", "data")
    assert tree["posterior"]["w"].dims == ("chain", "draw")


def test_sampled_latents_are_distributed_as_the_guide_says() -> None:
    tree = draws_of(Program(v_depends_on_w, guide_of_w, (POINTS,)), num_samples=100)
    loc, scale = (float(pyro.param(name).detach()) for name in ("loc", "scale"))
    draws = tree["posterior"]["w"].values[0]
    assert abs(draws.mean() - loc) < 5 * scale / 100**0.5
    assert abs(draws.std() - scale) < 5 * scale / 200**0.5


def test_parameters_of_the_model_stand_beside_the_draws() -> None:
    tree = draws_of(PROGRAMS["mixture_guided"], num_samples=30)
    for name in ("rates", "weights"):
        expected = pyro.param(name).detach().numpy()
        np.testing.assert_array_equal(tree["posterior"][name].values[0], np.broadcast_to(expected, (30, 3)))
    assert "q" not in tree["posterior"]


def test_the_same_seed_gives_the_same_tree() -> None:
    trees = []
    for _ in range(2):
        pyro.set_rng_seed(7)
        trees.append(tree_of(PROGRAMS["nested_guided"], num_samples=50))
    assert trees[0].equals(trees[1])
    assert not trees[0].equals(tree_of(PROGRAMS["nested_guided"], num_samples=50))


def test_the_parameters_are_left_as_they_were() -> None:
    tree_of(PROGRAMS["mixture_guided"], num_samples=30)
    before = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    tree_of(PROGRAMS["mixture_guided"], num_samples=30)
    assert set(pyro.get_param_store()) == set(before)
    for name, value in before.items():
        assert torch.equal(pyro.param(name), value)
        assert pyro.param(name).requires_grad


# The programs' own log-probabilities at the stored draws


def log_prob_at(program: Callable[..., Any], args: tuple[Any, ...], tree: xarray.DataTree, draw: int) -> float:
    """The log-probability of an ordinary run whose latents have the values of one draw."""
    trace = pyro.poutine.trace(program).get_trace(*args)
    data = {}
    for name in trace.stochastic_nodes:
        if name in tree["posterior"].data_vars and not trace.nodes[name].get("is_observed"):
            site = trace.nodes[name]
            stored = torch.as_tensor(tree["posterior"][name].values[0, draw])
            data[name] = stored.reshape(site["value"].shape).to(site["value"].dtype)
    conditioned = pyro.poutine.condition(program, data=data)
    return float(pyro.poutine.trace(conditioned).get_trace(*args).log_prob_sum().detach())


SCORED = {
    **{name: PROGRAMS[name] for name in GUIDED},
    "sampled": Program(v_depends_on_w, guide_of_w_and_v, (POINTS,)),
}


@pytest.mark.parametrize("name", SCORED)
def test_sample_stats_are_the_programs_log_probabilities_of_the_draws(name: str) -> None:
    program = SCORED[name]
    tree = draws_of(program, num_samples=5)
    stats = tree["sample_stats"]
    for draw in range(5):
        close(stats["lp"][0, draw], log_prob_at(program.model, program.args, tree, draw), 1e-7)
        close(stats["log_q"][0, draw], log_prob_at(program.guide, program.args, tree, draw), 1e-7)
    close(stats["log_weight"], (stats["lp"] - stats["log_q"]).values)


def test_with_sampled_latents_the_discrete_ones_are_also_summed_out() -> None:
    tree = draws_of(Program(v_depends_on_w, guide_of_w_and_v, (POINTS,)), num_samples=10)
    loc, scale = pyro.param("loc"), pyro.param("scale")
    for draw in range(10):
        w = torch.as_tensor(tree["posterior"]["w"].values[0, draw])
        held = pyro.poutine.condition(v_depends_on_w, data={"w": w})
        expected = -oracle(held, empty, POINTS).terms["surprise"]
        close(tree["sample_stats"]["lp_marginal"][0, draw], expected)
        close(tree["sample_stats"]["log_q_marginal"][0, draw], dist.Normal(loc, scale).log_prob(w))


def trained() -> vfe.EMRun:
    """A few iterations, which end with an E-phase."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VFEWarning)
        return vfe.EM(mixture, mixture_guide).run(COUNTS, max_iter=2, progress_bar=False)


def bad_guide(counts: Tensor) -> None:
    with pyro.plate("data", len(counts)):
        categorical("z", tensor([0.98, 0.01, 0.01]))


def test_a_guide_that_is_far_from_the_posterior_is_warned_of() -> None:
    with pytest.warns(VFEWarning, match="importance weights"):
        vfe.to_datatree(mixture, bad_guide, tensor([3.0, 1.0, 9.0, 30.0, 25.0, 14.0]), num_samples=1000)


def test_a_guide_that_is_the_posterior_is_not() -> None:
    probs = vfe.posterior(mixture, COUNTS).marginal("z")

    def posterior_guide(counts: Tensor) -> None:
        with pyro.plate("data", len(counts)):
            categorical("z", probs)

    tree = vfe.to_datatree(mixture, posterior_guide, COUNTS, num_samples=500)
    close(tree["variational"]["gap"], 0.0)


# Data from the model


def within_standard_errors(draws: np.ndarray, mean: np.ndarray) -> None:
    """Means over the first axis, within five standard errors."""
    assert np.all(np.abs(draws.mean(0) - mean) <= 5 * draws.std(0) / len(draws) ** 0.5 + 1e-12)


def test_predictions_from_the_prior_have_the_models_moments() -> None:
    tree = tree_of(PROGRAMS["mixture_guided"], num_samples=5000)
    weights, rates = pyro.param("weights").detach().numpy(), pyro.param("rates").detach().numpy()
    u = tree["prior_predictive"]["u"].values[0]
    assert u.shape == (5000, 4)
    within_standard_errors(u, weights @ rates)
    within_standard_errors(u**2, weights @ (rates + rates**2))
    z = tree["prior"]["z"].values[0]
    within_monte_carlo_error(frequencies(z, np.arange(3)), np.broadcast_to(weights, (4, 3)), 5000)
    # u is drawn at the same draw's z
    within_standard_errors(((u - rates[z]) * rates[z]).reshape(len(u), -1), np.zeros(4))


@pytest.mark.parametrize("with_guide", [True, False])
def test_predictions_from_the_posterior_have_its_moments(with_guide: bool) -> None:
    tree = tree_of(PROGRAMS["mixture_guided"], with_guide, num_samples=5000)
    rates = pyro.param("rates").detach().numpy()
    probs = pyro.param("q").detach() if with_guide else table_of("mixture", False).posterior.marginal("z")
    u = tree["posterior_predictive"]["u"].values[0]
    within_standard_errors(u, probs.numpy() @ rates)
    within_standard_errors(u**2, probs.numpy() @ (rates + rates**2))
    z = tree["posterior"]["z"].values[0]
    within_standard_errors((u - rates[z]) * rates[z], np.zeros(4))


def test_predictions_with_sampled_latents_are_made_at_each_draw() -> None:
    tree = tree_of(Program(v_depends_on_w, guide_of_w_and_v, (POINTS,)), num_samples=100)
    w, z = (tree["posterior"][name].values[0] for name in ("w", "z"))
    u = tree["posterior_predictive"]["u"].values[0]
    residual = (u - w[:, None] * (1 + z)) / float(pyro.param("sigma").detach())
    within_standard_errors(residual, np.zeros(3))
    within_standard_errors(residual**2, np.ones(3))
    prior_w, prior_z = (tree["prior"][name].values[0] for name in ("w", "z"))
    assert abs(prior_w.mean() - 0.3) < 5 * 1.5 / 100**0.5
    within_standard_errors(prior_z - 1 / (1 + np.exp(0.4 - prior_w[:, None])), np.zeros(3))


def test_groups_that_are_not_wanted_are_not_there() -> None:
    tree = tree_of(PROGRAMS["mixture_guided"], num_samples=30, prior=False, posterior_predictive=False)
    groups = {"posterior", "log_likelihood", "sample_stats", "observed_data", "variational"}
    assert set(tree.children) == groups


# The data


def test_the_data_are_in_the_tree_as_they_were_given() -> None:
    tree = tree_of(PROGRAMS["mixture_guided"], num_samples=30)
    np.testing.assert_array_equal(tree["observed_data"]["u"], COUNTS)
    assert tree["observed_data"]["u"].dims == ("data",)
    assert "constant_data" not in tree


def regression(inputs: Tensor, counts: Tensor) -> None:
    with pyro.plate("data", len(counts)):
        z = bernoulli("z", unit("prob"))
        pyro.sample("u", dist.Poisson((0.3 * inputs * (1 + z)).exp()), obs=counts)


def test_arguments_that_are_no_observations_are_constants() -> None:
    inputs = noise(4, seed=5)
    tree = vfe.to_datatree(regression, None, inputs, COUNTS, num_samples=30)
    assert list(tree["constant_data"].data_vars) == ["inputs"]
    np.testing.assert_array_equal(tree["constant_data"]["inputs"], inputs)


# Exact numbers


@pytest.mark.parametrize("name", GUIDED)
def test_the_variational_group_holds_the_exact_marginals(name: str) -> None:
    program = PROGRAMS[name]
    terms = vfe.FreeEnergy().decompose(program.model, program.guide, *program.args, **program.kwargs)
    found = draws_of(program, num_samples=30)["variational"]
    for ending, marginals in (("_q", terms.q_marginals()), ("_posterior", terms.posterior_marginals())):
        assert {site + ending for site in marginals} == {site for site in found.data_vars if site.endswith(ending)}
        for site, probs in marginals.items():
            plates = sorted(found[site + ending].dims[:-1])
            close(found[site + ending].transpose(*plates, ...), probs, 1e-12)
            close(found[site + ending].sum(f"{site}_value"), np.ones(probs.shape[:-1]))
    for site in terms.posterior_marginals():
        expected = table_of(name).posterior.marginal(site)
        plates = sorted(found[f"{site}_posterior"].dims[:-1])
        close(found[f"{site}_posterior"].transpose(*plates, ...), expected)


@pytest.mark.parametrize("name", GUIDED)
def test_the_variational_group_holds_the_decomposition(name: str) -> None:
    found = draws_of(PROGRAMS[name], num_samples=30)["variational"]
    for term, expected in table_of(name).terms.items():
        close(found[term], expected)
        assert found[term].attrs == {"units": "nats"}


@pytest.mark.parametrize(
    ("name", "plate"), [("mixture_guided", "data"), ("nested_guided", "outer"), ("sequential_guided", "data")]
)
def test_the_variational_group_says_what_each_datum_costs(name: str, plate: str) -> None:
    found = draws_of(PROGRAMS[name], num_samples=30)["variational"]
    for term in ("free_energy", "surprise", "gap"):
        assert found[f"{term}_by_datum"].dims == (plate,)
        close(found[f"{term}_by_datum"], table_of(name).by(plate)[term])


def test_without_a_guide_the_gap_is_zero() -> None:
    found = tree_of(PROGRAMS["mixture_guided"], with_guide=False, num_samples=30)["variational"]
    close(found["gap"], 0.0)
    close(found["surprise"], table_of("mixture_guided").terms["surprise"])
    close(found["z_posterior"], table_of("mixture_guided").posterior.marginal("z"))


def test_the_history_of_training_is_in_the_tree() -> None:
    run = trained()
    for source in (run, run.history):
        found = vfe.to_datatree(mixture, mixture_guide, COUNTS, num_samples=30, history=source)["variational"]
        for column in ("free_energy", "surprise", "gap", "iteration"):
            np.testing.assert_array_equal(found[f"history_{column}"], getattr(run.history, column))
        assert tuple(found["history_phase"].values) == run.history.phase
        close(found["free_energy"], run.history.free_energy[-1])


# Names and labels


def test_dims_are_the_plates_and_the_values_of_latents() -> None:
    tree = tree_of(PROGRAMS["nested_guided"], num_samples=30)
    assert tree["posterior"]["a"].dims == ("chain", "draw", "outer")
    assert tree["posterior"]["b"].dims == ("chain", "draw", "inner", "outer")
    assert tree["observed_data"]["u"].dims == ("inner", "outer")
    assert tree["posterior_predictive"]["u"].dims == ("chain", "draw", "inner", "outer")
    assert tree["variational"]["b_q"].dims == ("inner", "outer", "b_value")
    assert tree["variational"].coords["b_value"].values.tolist() == [0, 1]


def test_the_user_names_and_labels_dims() -> None:
    tree = tree_of(
        PROGRAMS["mixture_guided"],
        num_samples=30,
        dims={"rates": ["kind"], "weights": ["kind"]},
        coords={"kind": ["rare", "usual", "often"], "data": list("abcd"), "z_value": ["r", "u", "o"]},
    )
    close(tree["posterior"]["rates"].sel(kind="usual")[0, 0], pyro.param("rates")[1])
    assert tree["log_likelihood"].coords["data"].values.tolist() == list("abcd")
    close(tree["variational"]["z_q"].sel(data="c", z_value="o"), pyro.param("q")[2, 2])


def pixels(images: Tensor) -> None:
    probs = unit("probs", 2, 3)
    with pyro.plate("data", len(images)):
        z = categorical("z", simplex("weights", 2))
        pyro.sample("u", dist.Bernoulli(probs[z]).to_event(1), obs=images)


def test_event_dims_can_be_named_and_are_no_data() -> None:
    images = (noise(5, 3, seed=3) > 0).double()
    tree = vfe.to_datatree(pixels, None, images, num_samples=30, dims={"u": ["pixel"], "probs": ["z_value", "pixel"]})
    assert tree["observed_data"]["u"].dims == ("data", "pixel")
    assert tree["prior_predictive"]["u"].dims == ("chain", "draw", "data", "pixel")
    assert tree["posterior"]["probs"].dims == ("chain", "draw", "z_value", "pixel")
    assert tree["log_likelihood"]["u"].dims == ("chain", "draw", "data")
    close(tree["log_likelihood"]["u"][0, 0], -oracle(pixels, empty, images).by("data")["surprise"])


# ArviZ at work


def arviz_of(counts: Tensor, model: Callable[..., Any] = mixture, guide: Any = None, **options: Any) -> Any:
    return vfe.to_inference_data(model, guide, counts, **{"num_samples": 200, **options})


@cache
def arviz_of_sampled_latents() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VFEWarning)
        return arviz_of(POINTS, v_depends_on_w, guide_of_w_and_v, num_samples=50)


def test_arviz_gets_what_it_works_on() -> None:
    assert isinstance(arviz_of(COUNTS), az.InferenceData if IS_OLD else xarray.DataTree)


@pytest.mark.filterwarnings("ignore:invalid value encountered in scalar divide:RuntimeWarning")
def test_arviz_summarises_draws_and_estimates() -> None:
    table = az.summary(arviz_of(COUNTS))
    assert set(table.index) == {
        f"{name}[{i}]" for name, size in (("z", 4), ("rates", 3), ("weights", 3)) for i in range(size)
    }


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_arviz_compares_models_by_their_exact_scores() -> None:
    def one_rate(counts: Tensor) -> None:
        with pyro.plate("data", len(counts)):
            bernoulli("z", 0.5)
            pyro.sample("u", dist.Poisson(3.5), obs=counts)

    table = az.compare({"mixture": arviz_of(COUNTS), "one rate": arviz_of(COUNTS, one_rate)})
    scores = table["elpd_loo" if IS_OLD else "elpd"].astype(float)
    exact = {
        "mixture": -table_of("mixture_guided").terms["surprise"].detach(),
        "one rate": dist.Poisson(3.5).log_prob(COUNTS).sum(),
    }
    for name, score in exact.items():
        assert scores[name] == pytest.approx(float(score), rel=1e-9 if IS_OLD else 0.02)
    assert table.index[0] == max(exact, key=lambda name: float(exact[name]))


PLOTS = ["plot_trace", "plot_posterior", "plot_forest"] if IS_OLD else ["plot_trace_dist", "plot_dist", "plot_forest"]


@pytest.mark.parametrize("name", PLOTS)
def test_arviz_plots_the_draws(name: str) -> None:
    getattr(az, name)(arviz_of_sampled_latents(), var_names=["w", "z"])
    assert plt.get_fignums()
    plt.close("all")


@pytest.mark.filterwarnings("ignore:Variables u in '(observed|predictive)' look discrete:UserWarning")
@pytest.mark.parametrize("group", ["posterior", "prior"])
def test_arviz_plots_predictions_beside_the_data(group: str) -> None:
    data = arviz_of(COUNTS)
    if IS_OLD:
        az.plot_ppc(data, group=group, num_pp_samples=20)
    else:
        az.plot_ppc_dist(data, group=f"{group}_predictive", num_samples=20)
    assert plt.get_fignums()
    plt.close("all")


def test_a_tree_comes_back_from_netcdf_as_it_was(tmp_path: Path) -> None:
    tree = tree_of(PROGRAMS["mixture_guided"], num_samples=30, history=trained(), coords={"z_value": ["a", "b", "c"]})
    tree.to_netcdf(tmp_path / "tree.nc", engine="h5netcdf")
    with xarray.open_datatree(tmp_path / "tree.nc", engine="h5netcdf") as back:
        xarray.testing.assert_identical(back.load(), tree)
    (az.from_datatree(tree) if IS_OLD else tree).to_netcdf(tmp_path / "arviz.nc")
    again = az.from_netcdf(tmp_path / "arviz.nc")
    xarray.testing.assert_equal(
        again["variational"].load(), tree["variational"].to_dataset() if IS_OLD else tree["variational"]
    )


# What cannot be served


def test_a_subsampled_plate_is_refused() -> None:
    with pytest.raises(StructureError, match="'data' is subsampled"):
        vfe.to_datatree(subsampled, subsampled_guide, noise(10, seed=12))


@pytest.mark.parametrize("num_samples", [0, -1, 2.5, True])
def test_a_number_of_draws_that_is_none_is_refused(num_samples: Any) -> None:
    with pytest.raises(VFEError, match="num_samples"):
        vfe.to_datatree(mixture, None, COUNTS, num_samples=num_samples)


def test_a_history_that_is_none_is_refused() -> None:
    with pytest.raises(VFEError, match="history"):
        vfe.to_datatree(mixture, None, COUNTS, history=[1.0, 2.0])


def test_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(VFEError, match=r"'data' .*4 elements.* 2 labels"):
        vfe.to_datatree(mixture, None, COUNTS, num_samples=30, coords={"data": [1, 2]})


def impossible(counts: Tensor) -> None:
    with pyro.plate("data", len(counts)):
        z = bernoulli("z", 0.5)
        pyro.sample("u", dist.Categorical(torch.eye(2)[z.long()]), obs=torch.full((len(counts),), 1))
        pyro.sample("s", dist.Categorical(torch.eye(2)[z.long()]), obs=torch.zeros(len(counts)).long())


def test_impossible_data_are_refused() -> None:
    with pytest.raises(ImpossibleDataError, match="No joint value of the latents"):
        vfe.to_datatree(impossible, None, COUNTS, num_samples=30)
