"""Latents that are not always there: some branches of a program lack them, or a mask removes them.

What is said of a latent is said of where it is there; the full joint table has no such latent in its other rows.
"""

import math
import warnings
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from checks import assert_equal
from oracles import oracle
from programs.case import bernoulli, categorical, empty, tensor
from pyro.distributions import constraints
from torch import Tensor

import pyro_vfe as vfe
from pyro_vfe.energy.marginals import posterior_marginals
from pyro_vfe.errors import NameClashError, ScaleError, StructureError, VFEError, VFEWarning
from pyro_vfe.reporting.diagnose_views import views_of

DATA = tensor([0.4, 2.0, -1.0])


def normal(name: str, loc: Any, value: Tensor = DATA[0]) -> None:
    pyro.sample(name, dist.Normal(torch.as_tensor(loc, dtype=torch.float64), 1.0), obs=value)


def branch() -> None:
    if bernoulli("a", 0.3):
        normal("o", bernoulli("b", 0.6))
    else:
        normal("o", 3.0)


def nested() -> None:
    """A branch within a branch, and the latent after it reads what is there."""
    level = tensor(0.0)
    if bernoulli("a", 0.6):
        b = categorical("b", tensor([0.2, 0.5, 0.3]))
        level = level + b
        if b == 1:
            level = level + 2 * bernoulli("c", 0.3)
    normal("o", level)


def two_deciders() -> None:
    a, b = bernoulli("a", 0.3), bernoulli("b", 0.6)
    level = a - b
    if a.item() + b.item() == 1:
        level = level + categorical("c", tensor([0.1, 0.2, 0.7]))
    normal("o", level)


def other_distributions() -> None:
    """Three values of which one lacks the latent, and the others have it with other probabilities."""
    k = int(categorical("k", tensor([0.2, 0.3, 0.5])))
    if k:
        normal("o", bernoulli("b", [0.0, 0.1, 0.7][k]) * k)
    else:
        normal("o", 1.0)


def inside_a_plate() -> None:
    if bernoulli("a", 0.4):
        with pyro.plate("n", 3):
            z = categorical("z", tensor([0.3, 0.3, 0.4]))
            normal("o", z, DATA)
    else:
        with pyro.plate("n", 3):
            normal("o", 0.5, DATA)


def until_tails() -> None:
    """As many coins as come up heads, and one."""
    heads = 0
    while heads < 3 and bernoulli(f"coin_{heads}", 0.6):
        heads += 1
    normal("o", heads)


def numbered_steps() -> None:
    """A chain of sites, in one branch alone."""
    if bernoulli("a", 0.3):
        z = categorical("z_0", START)
        normal("o_0", z, DATA[0])
        for t in (1, 2):
            z = categorical(f"z_{t}", STEP[z])
            normal(f"o_{t}", z, DATA[t])
    else:
        for t in range(3):
            normal(f"o_{t}", 2.0, DATA[t])


START, STEP = tensor([0.3, 0.7]), tensor([[0.8, 0.2], [0.4, 0.6]])
MODELS = (branch, nested, two_deciders, other_distributions, inside_a_plate, until_tails, numbered_steps)


@pytest.mark.parametrize("model", MODELS)
def test_marginals_are_of_the_rows_that_have_the_latents(model: Callable[[], None]) -> None:
    posterior, expected = vfe.posterior(model), oracle(model, empty).posterior
    terms = vfe.FreeEnergy().decompose(model, None)
    for site in posterior.sites:
        assert_equal(posterior.marginal(site), expected.marginal(site), 1e-12)
        for probs in (posterior.marginals(), terms.posterior_marginals(), terms.q_marginals()):
            assert_equal(probs[site], expected.marginal(site), 1e-12)
    for pair in combinations(posterior.sites, 2):
        shared = [row for row in expected.rows if set(pair) <= row.values.keys()]
        joint = posterior.marginal(*pair)
        assert_equal(joint, expected.marginal(*pair) if shared else torch.zeros_like(joint), 1e-12)


@pytest.mark.parametrize("model", MODELS)
def test_the_mode_and_its_presence_are_those_of_the_best_row(model: Callable[[], None]) -> None:
    mode, best = vfe.posterior(model).mode(), oracle(model, empty).posterior.mode()
    assert isinstance(mode, dict)
    for site, value in mode.items():
        there = mode.present(site)
        assert there.dtype == torch.bool and there.shape == value.shape
        assert bool(there.all()) == bool(there.any()) == (site in best.values)
        if site in best.values:
            assert torch.equal(value, best.values[site])


@pytest.mark.parametrize("model", MODELS)
def test_draws_are_present_as_often_as_the_rows_say(model: Callable[[], None]) -> None:
    pyro.set_rng_seed(0)
    draws, expected = vfe.posterior(model).sample(2000), oracle(model, empty).posterior
    for site, values in draws.items():
        there = draws.present(site)
        assert there.shape == values.shape
        probs = expected.marginal(site)
        for k in range(probs.shape[-1]):
            share = ((values == k) & there).double().mean(0)
            spread = (probs[..., k] * (1 - probs[..., k]) / 2000).sqrt() + 1e-12
            assert bool(((share - probs[..., k]).abs() < 5 * spread).all()), site


@pytest.mark.parametrize("model", MODELS)
def test_the_log_probability_does_not_look_at_what_is_absent(model: Callable[[], None]) -> None:
    posterior, expected = vfe.posterior(model), oracle(model, empty).posterior
    last = {site: posterior.support(site)[-1].expand(posterior.mode()[site].shape) for site in posterior.sites}
    for row, prob in list(zip(expected.rows, expected.probs, strict=True))[:12]:
        assert_equal(posterior.log_prob(row.values), prob.log(), 1e-12)
        assert_equal(posterior.log_prob({**last, **row.values}), prob.log(), 1e-12)
    draws = posterior.sample(5)
    one_by_one = [posterior.log_prob({site: value[n] for site, value in draws.items()}) for n in range(5)]
    assert_equal(posterior.log_prob(draws), torch.stack(one_by_one), 1e-12)


def test_a_latent_that_is_there_has_to_have_a_value() -> None:
    posterior = vfe.posterior(branch)
    assert_equal(posterior.log_prob({"a": tensor(0.0)}).exp(), posterior.marginal("a")[0], 1e-12)
    with pytest.raises(VFEError, match="lacks latent 'b'"):
        posterior.log_prob({"a": tensor(1.0)})
    with pytest.raises(VFEError, match="'b' a value that is not in its support"):
        posterior.log_prob({"a": tensor([0.0, 1.0]), "b": tensor([0.5, 0.5])})
    with pytest.raises(VFEError, match="'c' is no discrete latent"):
        posterior.mode().present("c")


def test_the_chain_of_one_branch_has_the_marginals_of_its_sites() -> None:
    def chained() -> None:
        a = bernoulli("a", 0.3)
        with pyro.plate("time", 3):
            if a:
                normal("o", pyro.sample("z", vfe.MarkovChain(START, STEP)), DATA)
            else:
                normal("o", 2.0, DATA)

    posterior, expected = vfe.posterior(chained), oracle(numbered_steps, empty).posterior
    for t in range(3):
        assert_equal(posterior.marginal("z")[t], expected.marginal(f"z_{t}"), 1e-12)
    assert_equal(posterior.log_prob({"a": tensor(0.0)}).exp(), posterior.marginal("a")[0], 1e-12)
    assert_equal(posterior.log_prob(posterior.mode()), expected.probs.max().log(), 1e-12)
    draws = posterior.sample(3)
    assert torch.equal(draws.present("z"), (draws["a"] == 1)[:, None].expand(3, 3))


def everywhere(*args: Any) -> None:
    bernoulli("a", 0.7)
    bernoulli("b", 0.2)


def test_a_guide_that_samples_it_everywhere_has_it_where_the_model_does() -> None:
    q = vfe.FreeEnergy().decompose(branch, everywhere).q_marginals()
    assert_equal(q["b"], tensor([0.7 * 0.8, 0.7 * 0.2]), 1e-12)


def test_the_distribution_of_a_latent_is_that_where_it_is_there() -> None:
    found = vfe.FreeEnergy().compute_marginals(branch, lambda: bernoulli("a", 0.7))
    exact = oracle(branch, empty).posterior.marginal("b")
    assert_equal(found["b"].probs, exact[1] / exact.sum(), 1e-12)
    assert "b" not in vfe.FreeEnergy().compute_marginals(branch, lambda: bernoulli("a", 0.0))


def test_a_decider_that_is_drawn_counts_in_the_mean_over_draws() -> None:
    def guide() -> None:
        if pyro.sample("a", dist.Bernoulli(0.5), infer={"enumerate": None}):
            bernoulli("b", 0.2)

    pyro.set_rng_seed(1)
    share = vfe.FreeEnergy(num_particles=200).decompose(branch, guide).q_marginals()["b"]
    assert 0.3 < float(share.sum()) < 0.7
    assert_equal(share / share.sum(), tensor([0.8, 0.2]), 1e-12)


@pytest.mark.parametrize("guide", [lambda: bernoulli("b", 0.2), lambda: (bernoulli("b", 0.2), bernoulli("a", 0.7))])
def test_what_decides_is_sampled_in_the_guide_before(guide: Callable[[], Any]) -> None:
    with pytest.raises(StructureError, match=r"'b', which the model has for some values of 'a' only.*Sample 'a'"):
        vfe.FreeEnergy(check=False).loss(branch, guide)
    assert_equal(tensor(vfe.FreeEnergy().loss(branch, everywhere)), oracle(branch, aligned).terms["free_energy"], 1e-12)


def aligned() -> None:
    if bernoulli("a", 0.7):
        bernoulli("b", 0.2)


def test_a_masked_element_has_no_probabilities() -> None:
    mask = torch.tensor([True, False, True])

    def model() -> None:
        with pyro.plate("n", 3), pyro.poutine.mask(mask=mask):
            normal("o", categorical("z", tensor([0.2, 0.8])), DATA)

    def guide() -> None:
        with pyro.plate("n", 3):
            categorical("z", tensor([0.3, 0.7]))

    terms = vfe.FreeEnergy().decompose(model, guide)
    assert_equal(terms.q_marginals()["z"], tensor([[0.3, 0.7], [0.0, 0.0], [0.3, 0.7]]), 1e-12)
    likelihood = dist.Normal(tensor([0.0, 1.0]), 1.0).log_prob(DATA[:, None]).exp() * tensor([0.2, 0.8])
    exact = likelihood / likelihood.sum(-1, keepdim=True) * mask[:, None]
    assert_equal(terms.posterior_marginals()["z"], exact, 1e-12)
    tree = vfe.to_datatree(model, guide, num_samples=20, progress_bar=False)
    for group in ("posterior", "prior"):
        assert (tree[group]["z_present"].values == mask.numpy()).all()


def test_chains_that_end_together_have_no_states_after_it() -> None:
    def model(length: int, upto: int) -> None:
        mask = torch.arange(length) < upto
        with pyro.plate("time", length), pyro.poutine.mask(mask=mask):
            z = pyro.sample("z", vfe.MarkovChain(START, STEP))
            y = pyro.sample("y", vfe.MarkovChain(START, torch.stack([STEP, STEP.flip(0)])[z], num_steps=length))
            normal("o", y, DATA[:length])

    def guide(length: int, upto: int) -> None:
        with pyro.plate("time", length):
            pyro.sample("z", vfe.MarkovChain(START, STEP))
            pyro.sample("y", vfe.MarkovChain(START, STEP))

    longer, shorter = (vfe.FreeEnergy().decompose(model, guide, length, 2) for length in (3, 2))
    assert_equal(longer.free_energy, shorter.free_energy, 1e-12)
    for found, expected in (
        (longer.q_marginals(), shorter.q_marginals()),
        (longer.posterior_marginals(), shorter.posterior_marginals()),
    ):
        for site, probs in expected.items():
            assert_equal(found[site], torch.cat([probs, torch.zeros(1, 2)]), 1e-12)


def test_a_diagnosis_counts_the_elements_that_are_there() -> None:
    mask = torch.arange(40) < 30

    def model() -> None:
        with pyro.plate("n", 40), pyro.poutine.mask(mask=mask):
            normal("o", categorical("z", tensor([0.5, 0.5 - 1e-9, 1e-9])), DATA[0].expand(40))

    def guide() -> None:
        with pyro.plate("n", 40):
            categorical("z", tensor([0.5, 0.5 - 1e-9, 1e-9]))

    terms = vfe.FreeEnergy().decompose(model, guide)
    (view,) = views_of(terms.runs[0], posterior_marginals(terms.runs), None, None)
    assert view.count == 30
    assert_equal(view.used(view.posterior).sum(), tensor(30.0), 1e-12)


def masked_by_a_branch(reader: float) -> None:
    a = bernoulli("a", 0.3)
    with pyro.poutine.mask(mask=bool(a)):
        b = bernoulli("b", 0.6)
    normal("o", b * (reader if not a else 1.0))


def test_a_mask_of_one_branch_is_looked_at_in_each() -> None:
    with pytest.raises(ScaleError, match="'b' is masked out where site 'o' still reads it"):
        vfe.FreeEnergy().loss(masked_by_a_branch, everywhere, 1.0)
    terms = vfe.FreeEnergy().decompose(masked_by_a_branch, everywhere, 0.0)
    assert_equal(terms.q_marginals()["b"], tensor([0.7 * 0.8, 0.7 * 0.2]), 1e-12)


def test_a_tree_says_of_which_draws_a_latent_is() -> None:
    pyro.set_rng_seed(0)
    tree = vfe.to_datatree(branch, num_samples=1000, progress_bar=False)
    exact = oracle(branch, empty).posterior.marginal("b")
    for group, there, one in (("posterior", exact.sum(), exact[1] / exact.sum()), ("prior", 0.3, 0.6)):
        found = tree[group].dataset
        assert (found["b_present"] == found["a"]).all()
        assert abs(float(found["b_present"].mean()) - there) < 0.07
        assert abs(float(found["b"].where(found["b_present"] == 1).mean()) - one) < 0.14
    assert tree["posterior"]["b"].dtype.kind == tree["posterior"]["b_present"].dtype.kind == "i"
    assert_equal(torch.as_tensor(tree["variational"]["b_posterior"].values), exact, 1e-12)


def test_arviz_summarises_the_draws_where_a_latent_is() -> None:
    az = pytest.importorskip("arviz")
    found = vfe.to_datatree(branch, num_samples=200, prior=False, progress_bar=False)["posterior"].dataset
    there = found.assign(b=found["b"].where(found["b_present"] == 1))[["b"]]
    mean = az.summary(there, kind="stats", skipna=True, round_to="none").loc["b", "mean"]
    values, present = found["b"].values, found["b_present"].values == 1
    assert abs(mean - values[present].mean()) < 1e-12


def test_a_site_may_not_have_the_name_of_what_says_where_another_is() -> None:
    def model() -> None:
        bernoulli("b_present", 0.5)
        branch()

    with pytest.raises(NameClashError, match="'b_present'"):
        vfe.to_datatree(model, num_samples=4, progress_bar=False)


def test_a_tree_has_what_other_branches_observe() -> None:
    def model() -> None:
        if bernoulli("a", 0.3):
            normal("one", 1.0)
        else:
            normal("other", 0.0)

    tree = vfe.to_datatree(model, num_samples=50, progress_bar=False)
    assert set(tree["observed_data"].data_vars) == {"one", "other"}
    assert set(tree["log_likelihood"].data_vars) == {"joint"}
    found = tree["posterior_predictive"].dataset
    assert (found["one_present"] == tree["posterior"]["a"]).all()
    assert (found["one"].isnull() == (found["one_present"] == 0)).all()


def drawn_branch() -> None:
    if bernoulli("a", 0.3):
        normal("o", pyro.sample("w", dist.Normal(0.0, 1.0)))
    else:
        normal("o", 3.0)


def drawn_there() -> None:
    if bernoulli("a", 0.7):
        pyro.sample("w", dist.Normal(0.2, 0.7))


def drawn_everywhere() -> None:
    bernoulli("a", 0.7)
    pyro.sample("w", dist.Normal(0.2, 0.7))


def exact_free_energy() -> float:
    """F of either guide, by quadrature over w."""
    w = torch.linspace(-6.0, 6.0, 20_001)
    q = dist.Normal(0.2, 0.7).log_prob(w)
    p = dist.Normal(0.0, 1.0).log_prob(w) + dist.Normal(w, 1.0).log_prob(DATA[0])
    with_w = math.log(0.7 / 0.3) + float(torch.trapezoid(q.exp() * (q - p), w))
    without = math.log(0.3 / 0.7) - float(dist.Normal(3.0, 1.0).log_prob(DATA[0]))
    return 0.7 * with_w + 0.3 * without


@pytest.mark.parametrize("guide", [drawn_there, drawn_everywhere])
def test_a_draw_that_a_branch_lacks_costs_nothing_there(guide: Callable[[], None]) -> None:
    pyro.set_rng_seed(0)
    loss = vfe.FreeEnergy(num_particles=60).loss(drawn_branch, guide)
    assert abs(loss - exact_free_energy()) < 0.02
    terms = vfe.FreeEnergy(num_particles=60).decompose(drawn_branch, guide)
    assert terms.stderr is not None
    assert abs(terms.free_energy - exact_free_energy()) < 5 * terms.stderr
    assert abs(float(terms.q_marginals()["a"][1]) - 0.7) < 0.3
    assert terms.gap > -1e-12


def test_a_draw_made_from_an_auxiliary_site_is_there_in_every_branch() -> None:
    def guide() -> None:
        bernoulli("a", 0.7)
        raw = pyro.sample("raw", dist.Normal(0.2, 0.7), infer={"is_auxiliary": True})
        pyro.sample("w", dist.Delta(raw))

    with pytest.raises(StructureError, match=r"lacks 'w' in a branch.*a distribution of its own"):
        vfe.FreeEnergy().loss(drawn_branch, guide)


def test_a_tree_has_no_numbers_for_a_draw_that_is_not_there() -> None:
    pyro.set_rng_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = vfe.to_datatree(drawn_branch, drawn_there, num_samples=50, progress_bar=False)["posterior"].dataset
    assert (found["w_present"] == found["a"]).all()
    assert (found["w"].isnull() == (found["a"] == 0)).all()


def test_tables_start_at_the_posterior_of_where_the_latent_is() -> None:
    def model() -> None:
        if bernoulli("a", 0.3):
            normal("o", categorical("b", tensor([0.0, 0.6, 0.4])))
        else:
            normal("o", 3.0)

    exact = oracle(model, empty).posterior.marginal("b")
    for init, table, gap in (("posterior", exact / exact.sum(), 0.0), ("uniform", tensor([0.0, 0.5, 0.5]), None)):
        pyro.clear_param_store()
        guide = vfe.AutoStructured(model, edges=[], init=init)
        terms = vfe.FreeEnergy().decompose(model, guide)
        assert_equal(guide.probabilities("b"), table, 1e-12)
        assert terms.gap.isfinite() if gap is None else abs(terms.gap) < 1e-12
    pyro.clear_param_store()
    guide = vfe.AutoMeanField(model, init="posterior")
    guide()
    assert_equal(guide.probabilities("b"), exact / exact.sum(), 1e-12)


def test_em_does_not_count_a_latent_where_it_is_absent() -> None:
    def model() -> None:
        share = pyro.param("share", tensor([0.3, 0.3, 0.4]), constraint=constraints.simplex)
        for i in pyro.plate("data", 3):
            if bernoulli(f"a_{i}", 0.4):
                normal(f"o_{i}", 2 * categorical(f"b_{i}", share), DATA[i])
            else:
                normal(f"o_{i}", 3.0, DATA[i])

    probs = oracle(model, empty).posterior
    counts = sum(probs.marginal(f"b_{i}") for i in range(3))
    with pytest.warns(VFEWarning, match="max_iter=1"):
        vfe.EM(model).run(max_iter=1, progress_bar=False)
    assert_equal(pyro.param("share"), counts / counts.sum(), 1e-12)


def test_pictures_show_that_a_latent_is_absent() -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    posterior = vfe.posterior(branch)
    heights = [bar.get_height() for bar in vfe.plot_marginals(posterior, "b").patches]
    assert_equal(tensor(heights), torch.cat([posterior.marginal("b"), posterior.marginal("a")[:1]]), 1e-12)
    states = vfe.plot_states(vfe.posterior(until_tails), "coin_{}", [0.0, 1.0, 2.0])
    assert "absent" in str([text.get_text() for text in states.get_legend().get_texts()])
    plt.close("all")
