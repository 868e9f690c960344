"""Each kind of finding where it must fire, its number by hand, and a near twin where it must not."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import INFINITE, PROGRAMS, SAMPLED_PROGRAMS, UNSPLIT
from programs.case import empty, tensor
from torch import Tensor
from torch.distributions import constraints

import pyro_vfe as vfe
from examples.earthquakes import COUNTS, learn
from pyro_vfe.engine.factors import Table
from pyro_vfe.errors import VFEError
from pyro_vfe.learning.history import History, Row
from pyro_vfe.reporting.diagnose_views import views_of
from pyro_vfe.reporting.findings import KINDS, Diagnosis, Finding, sorted_findings

LOCS = tensor([-2.0, 0.0, 3.0])
U = tensor([-2.4, -2.1, -1.9, -1.0, -0.3, 0.1, 0.4, 0.9, 1.5, 1.7, 2.6, 2.9, 3.0, 3.3, 3.8, -1.6, 0.2, 2.2])
LARGE = ("chain_of", "ising", "120")


def mixture(locs: Tensor = LOCS, weights: Tensor | None = None) -> Callable[..., None]:
    def model(u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            v = pyro.sample("v", dist.Categorical(torch.ones(len(locs)) if weights is None else weights))
            pyro.sample("u", dist.Normal(locs[v], 1.0), obs=u)

    return model


def posterior_by_hand(u: Tensor, locs: Tensor = LOCS) -> Tensor:
    """Bayes' rule under equal weights, shape (N, K)."""
    return (-0.5 * (u[:, None] - locs) ** 2).softmax(-1)


def guide_with(probs: Tensor) -> Callable[..., None]:
    def guide(*args: Any) -> None:
        with pyro.plate("data", len(probs)):
            pyro.sample("v", dist.Categorical(probs))

    return guide


def kl(q: Tensor, p: Tensor) -> Tensor:
    return (torch.xlogy(q, q) - torch.xlogy(q, p)).sum(-1)


def of_mixture(probs: Tensor, u: Tensor = U, **thresholds: float) -> Diagnosis:
    terms = vfe.FreeEnergy().decompose(mixture(), guide_with(probs), u)
    return vfe.diagnose(terms, **thresholds)


def kinds(diagnosis: Diagnosis) -> set[str]:
    return {finding.kind for finding in diagnosis}


def exactly(model: Callable[..., Any], *args: Any) -> Diagnosis:
    return vfe.diagnose(vfe.FreeEnergy().decompose(model, empty, *args))


def only(diagnosis: Diagnosis, kind: str) -> Finding:
    (finding,) = diagnosis.of(kind)
    return finding


def readings(values: Any, phase: str = "step", gap: float = 0.0, num_data: int = 10) -> History:
    rows = (Row(10 * i, phase, float(f), float(f) - gap, gap) for i, f in enumerate(values))
    return History(tuple(rows), num_data=num_data)


# No false alarms


@pytest.mark.parametrize("name", [name for name in PROGRAMS if not name.startswith(LARGE) and name not in UNSPLIT])
def test_nothing_is_found_where_every_latent_is_summed_out(name: str) -> None:
    program = PROGRAMS[name]
    guide = program.guide if name == "point_estimate_of_w" else empty
    diagnosis = vfe.diagnose(vfe.FreeEnergy().decompose(program.model, guide, *program.args, **program.kwargs))
    assert not diagnosis, str(diagnosis)
    assert diagnosis.looked_at


def test_the_exact_posterior_as_a_guide_has_nothing_wrong() -> None:
    diagnosis = of_mixture(posterior_by_hand(U))
    assert len(diagnosis) == 0
    assert str(diagnosis).startswith("Nothing found.\n\nLooked at: ")


def test_a_fitted_hidden_markov_model_rests_with_its_surprise_and_no_more() -> None:
    run = learn(2, tensor(COUNTS[:40]))
    diagnosis = vfe.diagnose(run)
    assert kinds(diagnosis) == {"model-bottleneck"}
    assert only(diagnosis, "model-bottleneck").value == pytest.approx(run.free_energy)


# The guide


def test_the_gap_of_a_guide_is_weighed_against_its_complexity() -> None:
    exact = posterior_by_hand(U)
    probs = 0.5 * exact + 0.5 / 3
    gap, complexity = kl(probs, exact).sum(), kl(probs, torch.full((3,), 1 / 3)).sum()
    finding = only(of_mixture(probs), "guide-bottleneck")
    assert finding.site == "v"
    assert finding.value == pytest.approx(float(gap) / len(U))
    assert finding.severity == pytest.approx(float(gap))
    share = float(gap / (gap + complexity))
    assert of_mixture(probs, gap_share=share * 0.999).of("guide-bottleneck")
    assert not of_mixture(probs, gap_share=share * 1.001).of("guide-bottleneck")
    assert not of_mixture(probs, gap_per_datum=float(gap) / len(U) * 1.001).of("guide-bottleneck")


def test_a_guide_that_is_nearly_exact_is_no_bottleneck() -> None:
    assert not of_mixture(0.99 * posterior_by_hand(U) + 0.01 / 3)


def test_the_bottleneck_names_the_latent_with_the_largest_share_of_the_gap() -> None:
    def model() -> None:
        for name, prob in (("right", 0.3), ("wrong", 0.2)):
            x = pyro.sample(name, dist.Bernoulli(prob))
            pyro.sample(f"u_{name}", dist.Normal(2 * x, 1.0), obs=torch.tensor(1.0))

    def guide() -> None:
        # At u = 1 both values are equally probable: the posterior is the prior.
        pyro.sample("right", dist.Bernoulli(0.3))
        pyro.sample("wrong", dist.Bernoulli(0.7))

    finding = only(vfe.diagnose(vfe.FreeEnergy().decompose(model, guide)), "guide-bottleneck")
    assert finding.site == "wrong"
    assert finding.value == pytest.approx(0.7 * math.log(0.7 / 0.2) + 0.3 * math.log(0.3 / 0.8))


def test_a_share_of_F_plays_no_part_densities_may_make_it_negative() -> None:
    def dense(u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            v = pyro.sample("v", dist.Categorical(torch.ones(3)))
            pyro.sample("u", dist.Normal(LOCS[v] * 1e-3, 1e-3), obs=u * 1e-3)

    probs = 0.5 * posterior_by_hand(U) + 0.5 / 3
    terms = vfe.FreeEnergy().decompose(dense, guide_with(probs), U)
    assert terms.free_energy < 0
    (found,), (expected,) = vfe.diagnose(terms), of_mixture(probs)
    assert found.value == pytest.approx(expected.value)
    assert (found.kind, found.site) == (expected.kind, expected.site)


def test_a_guide_on_one_value_has_collapsed() -> None:
    probs = tensor([[0.001, 0.998, 0.001]]).expand(len(U), 3)
    exact = posterior_by_hand(U)
    diagnosis = of_mixture(probs)
    finding = only(diagnosis, "guide-collapsed")
    assert (finding.site, finding.indices) == ("v", (1,))
    assert finding.value == pytest.approx(0.998)
    assert finding.severity == pytest.approx(float(kl(probs, exact).sum()))
    assert kinds(diagnosis) == {"guide-collapsed", "guide-bottleneck"}


def test_a_guide_that_is_the_same_for_all_data_ignores_them() -> None:
    probs = posterior_by_hand(U).mean(0).expand(len(U), 3)
    diagnosis = of_mixture(probs)
    finding = only(diagnosis, "guide-ignores-data")
    assert finding.value == pytest.approx(0.0, abs=1e-12)
    assert finding.severity == pytest.approx(float(kl(probs, posterior_by_hand(U)).sum()))
    assert kinds(diagnosis) == {"guide-ignores-data", "guide-bottleneck"}


def test_a_guide_that_looks_at_the_data_a_little_does_not_ignore_them() -> None:
    exact = posterior_by_hand(U)
    assert not of_mixture(0.6 * exact.mean(0) + 0.4 * exact).of("guide-ignores-data")


def test_a_mean_field_guide_at_its_uniform_start_ignores_the_data() -> None:
    model = mixture()
    terms = vfe.FreeEnergy().decompose(model, vfe.AutoMeanField(model), U)
    assert vfe.diagnose(terms).of("guide-ignores-data")


def test_a_state_that_the_posterior_uses_and_Q_does_not_is_the_guides_loss() -> None:
    exact = posterior_by_hand(U)
    probs = torch.stack([exact[:, 0], 1 - exact[:, 0] - 1e-12, torch.full((len(U),), 1e-12)], -1)
    finding = only(of_mixture(probs), "unused-state")
    assert finding.indices == (2,)
    assert finding.severity == pytest.approx(float(kl(probs, exact).sum()))
    assert f"{float(exact[:, 2].sum()):.2g} under the exact posterior" in finding.problem


# The model


def test_a_component_far_from_all_data_is_never_used() -> None:
    locs = tensor([-2.0, 0.0, 30.0, 3.0])
    u = U.repeat(2)
    finding = only(exactly(mixture(locs), u), "unused-state")
    assert (finding.site, finding.indices, finding.severity) == ("v", (2,), 0.0)
    assert finding.value == pytest.approx(float(posterior_by_hand(u, locs)[:, 2].sum()), rel=1e-6)
    assert "State 2 of 'v'" in finding.problem
    assert not exactly(mixture(LOCS), u)


def test_a_posterior_on_one_value_is_the_models_and_not_a_collapse_of_Q() -> None:
    locs = tensor([0.0, 30.0])
    probs = posterior_by_hand(U, locs)
    diagnosis = vfe.diagnose(vfe.FreeEnergy().decompose(mixture(locs), guide_with(probs), U))
    assert kinds(diagnosis) == {"unused-state"}


def test_few_data_may_leave_states_unused() -> None:
    assert not exactly(mixture(tensor([-2.0, 0.0, 30.0, 3.0])), U[:10])


def test_a_state_that_is_rare_by_design_may_stay_away() -> None:
    def with_outliers(prob: float) -> Callable[[Tensor], None]:
        def model(u: Tensor) -> None:
            with pyro.plate("data", len(u)):
                is_outlier = pyro.sample("is_outlier", dist.Bernoulli(prob))
                pyro.sample("u", dist.Normal(0.0, 1 + 20 * is_outlier), obs=u)

        return model

    u = torch.linspace(-1, 1, 100)
    assert not exactly(with_outliers(0.02), u)
    finding = only(exactly(with_outliers(1e-6), u), "unused-state")
    assert "State 1 of 'is_outlier'" in finding.problem


def hidden_markov(states: list[int], num_states: int) -> Callable[[], None]:
    """A loop whose data leave no doubt of the states."""

    def model() -> None:
        probs = torch.ones(num_states)
        for t, state in enumerate(states):
            z = pyro.sample(f"z_{t}", dist.Categorical(probs))
            pyro.sample(f"u_{t}", dist.Normal(20.0 * z, 1.0), obs=torch.tensor(20.0 * state))
            probs = torch.eye(num_states)[z] + 0.5

    return model


def test_the_steps_of_a_loop_use_states_together() -> None:
    assert not exactly(hidden_markov([0, 1, 2, 2, 1, 0, 0, 1, 2, 1, 0, 2, 2, 0, 1], 3))
    finding = only(exactly(hidden_markov([0, 0, 2, 2, 0, 0, 0, 0, 2, 2, 0, 2, 2, 0, 2, 2, 0, 0], 3)), "unused-state")
    assert (finding.site, finding.indices) == ("z_0 ... z_17", (1,))


def test_the_steps_of_a_sequential_plate_use_states_together() -> None:
    def model(u: Tensor) -> None:
        for i in pyro.plate("data", len(u)):
            v = pyro.sample(f"v_{i}", dist.Categorical(torch.ones(3)))
            pyro.sample(f"u_{i}", dist.Normal(tensor([-2.0, 30.0, 2.0])[v], 1.0), obs=u[i])

    finding = only(exactly(model, U), "unused-state")
    assert (finding.site, finding.indices) == ("v_0 ... v_17", (1,))


def test_latents_of_a_plate_that_are_numbered_are_not_taken_for_steps() -> None:
    def model(u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            parts = [pyro.sample(f"v{i}", dist.Bernoulli(prob)) for i, prob in enumerate((0.5, 0.5, 1e-9))]
            pyro.sample("u", dist.Normal(3 * parts[0] - 2 * parts[1] + parts[2], 1.0), obs=u)

    finding = only(exactly(model, U), "unused-state")
    assert (finding.site, finding.indices) == ("v2", (1,))


def test_a_single_latent_may_be_sure_of_its_value() -> None:
    def model(u: Tensor) -> None:
        v = pyro.sample("v", dist.Categorical(torch.ones(2)))
        with pyro.plate("data", len(u)):
            pyro.sample("u", dist.Normal(30.0 * v, 1.0), obs=u)

    assert not exactly(model, U)


def test_a_markov_chain_is_counted_over_its_steps() -> None:
    def model(u: Tensor) -> None:
        with pyro.plate("time", len(u)):
            z = pyro.sample("z", vfe.MarkovChain(torch.ones(3) / 3, torch.eye(3) * 0.4 + 0.2))
            pyro.sample("u", dist.Normal(tensor([-2.0, 30.0, 2.0])[z], 1.0), obs=u)

    finding = only(exactly(model, U), "unused-state")
    assert (finding.site, finding.indices) == ("z", (1,))
    assert finding.value == pytest.approx(float(vfe.posterior(model, U).marginal("z")[:, 1].sum()))


def vectors(make: Callable[[], Any], mean: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    def model(u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            v = pyro.sample("v", make())
            pyro.sample("u", dist.Normal(mean(v), 1.0), obs=u)

    return model


def test_a_one_hot_latent_names_its_entry() -> None:
    model = vectors(lambda: dist.OneHotCategorical(torch.ones(3)), lambda v: v @ tensor([-2.0, 30.0, 2.0]))
    finding = only(exactly(model, U), "unused-state")
    assert (finding.site, finding.indices) == ("v", (1,))
    assert "State 1 of 'v'" in finding.problem


def test_a_vector_of_latents_is_looked_at_part_by_part() -> None:
    def bits(never: float) -> Callable[[Tensor], None]:
        weights = tensor([4.0, -2.5, never])
        return vectors(lambda: dist.Bernoulli(torch.full((3,), 0.5)).to_event(1), lambda v: v @ weights - 1)

    # Eight joint values and 18 data: some of the eight come to nothing, none of the parts does.
    assert not exactly(bits(0.5), U)
    finding = only(exactly(bits(50.0), U), "unused-state")
    assert (finding.site, finding.indices) == ("v[2]", (1,))


def test_counts_may_leave_values_out() -> None:
    model = vectors(lambda: dist.Binomial(3, 0.5), lambda v: 10 * (v - 1))
    u = torch.zeros(40)
    assert float(vfe.posterior(model, u).marginal("v")[:, 3].sum()) < 1e-6
    assert not exactly(model, u)


def test_states_that_start_equal_are_told() -> None:
    def model(u: Tensor) -> None:
        locs = pyro.param("locs", torch.zeros(2))
        weights = pyro.param("weights", tensor([0.4, 0.6]), constraint=constraints.simplex)
        with pyro.plate("data", len(u)):
            v = pyro.sample("v", dist.Categorical(weights))
            pyro.sample("u", dist.Normal(locs[v], 1.0), obs=u)

    assert only(exactly(model, U), "states-alike").site == "v"
    pyro.get_param_store()["locs"] = tensor([0.0, 0.1])
    assert not exactly(model, U)


def test_a_subsample_counts_as_the_data_that_were_looked_at() -> None:
    def model(size: int) -> Callable[[], None]:
        def program() -> None:
            with pyro.plate("data", 1000, subsample=torch.arange(size)):
                v = pyro.sample("v", dist.Categorical(torch.ones(3)))
                pyro.sample("u", dist.Normal(tensor([-2.0, 30.0, 2.0])[v], 1.0), obs=U[:size])

        return program

    assert not exactly(model(6)).of("unused-state")
    finding = only(exactly(model(18)), "unused-state")
    assert "18 elements" in finding.problem


# Plates


def with_one_wrong(index: int) -> Tensor:
    probs = posterior_by_hand(U)
    probs[index] = probs[index].flip(-1) * 0.99 + 0.01 / 3
    return probs


def test_one_element_that_carries_the_gap_is_named() -> None:
    probs = 0.999 * with_one_wrong(11) + 0.001 / 3
    gaps = kl(probs, posterior_by_hand(U))
    finding = only(of_mixture(probs), "plate-element")
    assert (finding.site, finding.indices) == ("data", (11,))
    assert finding.value == pytest.approx(float(gaps[11] / gaps.sum()))
    assert finding.severity == pytest.approx(float(gaps[11]))
    assert "Element 11 of plate 'data'" in finding.problem


def test_few_elements_among_many_are_named_together() -> None:
    u = U.repeat(6)
    exact = posterior_by_hand(u)
    probs = exact.clone()
    probs[[29, 11]] = tensor([0.01, 0.98, 0.01])
    finding = only(of_mixture(probs, u), "plate-element")
    gaps = kl(probs, exact)[[29, 11]]
    assert set(finding.indices) == {11, 29}
    assert finding.severity == pytest.approx(float(gaps.sum()))
    assert "2 elements of plate 'data'" in finding.problem
    probs[[47, 65, 83, 101]] = tensor([0.01, 0.98, 0.01])
    assert not of_mixture(probs, u).of("plate-element")


def test_a_gap_that_all_elements_share_is_no_elements_own() -> None:
    assert not of_mixture(0.5 * posterior_by_hand(U) + 0.5 / 3).of("plate-element")


def test_a_plate_whose_elements_are_tied_is_said_to_be_left_out() -> None:
    program = PROGRAMS["global_and_local_guided"]
    terms = vfe.FreeEnergy().decompose(program.model, program.guide, *program.args)
    (left_out,) = vfe.diagnose(terms).not_looked_at
    assert "plate 'data'" in left_out and "'g'" in left_out


def test_a_gap_without_shares_by_site_is_said_to_be_left_out() -> None:
    program = PROGRAMS["factorial_markov_chain_with_half_mean_field"]
    terms = vfe.FreeEnergy().decompose(program.model, program.guide, *program.args)
    with pytest.raises(VFEError, match="no shares by site"):
        terms.gap_by_site()
    diagnosis = vfe.diagnose(terms)
    assert only(diagnosis, "guide-bottleneck").site is None
    assert any(line.startswith("the gap of each latent. ") for line in diagnosis.not_looked_at)


# Infinite, and sampled


@pytest.mark.parametrize(("name", "site"), [("mass_on_the_impossible", "z_1"), ("or_missed_by_the_guide", "rings")])
def test_mass_on_the_impossible_comes_first(name: str, site: str) -> None:
    program = INFINITE[name]
    diagnosis = vfe.diagnose(vfe.FreeEnergy().decompose(program.model, program.guide, *program.args))
    worst = diagnosis[0]
    assert worst.kind == "support-mismatch"
    assert worst.severity == math.inf
    assert site in [finding.site for finding in diagnosis.of("support-mismatch")]
    assert "F is infinite" in str(diagnosis)


def test_one_particle_cannot_be_judged_and_many_can() -> None:
    program = SAMPLED_PROGRAMS["v_depends_on_w"]

    def with_particles(number: int, **thresholds: float) -> tuple[vfe.Decomposition, Diagnosis]:
        pyro.set_rng_seed(0)
        terms = vfe.FreeEnergy(num_particles=number).decompose(program.model, program.guide, *program.args)
        return terms, vfe.diagnose(terms, **thresholds)

    _, one = with_particles(1)
    assert only(one, "spread-unknown").severity == 0
    terms, few = with_particles(4)
    assert terms.stderr is not None
    assert only(few, "spread-too-large").value == pytest.approx(float(terms.stderr))
    assert not few.of("spread-unknown")
    readable = float(terms.stderr) / terms.num_data * 1.001
    assert not with_particles(4, spread=readable)[1].of("spread-too-large")


def test_what_is_exact_has_no_spread() -> None:
    program = PROGRAMS["point_estimate_of_w"]
    diagnosis = vfe.diagnose(vfe.FreeEnergy().decompose(program.model, program.guide, *program.args))
    assert not kinds(diagnosis) & {"spread-unknown", "spread-too-large"}


# Histories


def em_rows(*values: float) -> History:
    phases = ["start", *("E", "M") * len(values)][: len(values)]
    rows = (Row((i + 1) // 2, phase, f, f, 0.0) for i, (phase, f) in enumerate(zip(phases, values, strict=True)))
    return History(tuple(rows), num_data=1)


def test_a_phase_that_raised_F_is_named_with_its_iteration() -> None:
    finding = only(vfe.diagnose(em_rows(9.0, 8.0, 7.5, 7.4, 7.65, 7.3, 7.3)), "phase-raised")
    assert (finding.site, finding.indices) == ("M", (2,))
    assert finding.value == finding.severity == pytest.approx(0.25)


def test_rounding_is_no_rise() -> None:
    assert not vfe.diagnose(em_rows(9.0, 8.0, 7.5, 7.5 + 1e-7, 7.5, 7.5 + 1e-7)).of("phase-raised")


def test_em_in_single_precision_has_no_phase_that_raised_F() -> None:
    torch.set_default_dtype(torch.float32)
    run = vfe.EM(mixture_to_learn).run(U.float(), progress_bar=False)
    assert run.params["locs"].dtype == torch.float32
    assert kinds(vfe.diagnose(run)) == {"model-bottleneck"}
    assert not vfe.diagnose(run.history).of("phase-raised")


def test_an_annealed_run_that_raised_F_says_so() -> None:
    pyro.set_rng_seed(0)
    run = vfe.EM(mixture_to_learn, e_phase=vfe.Annealed([0.05, 0.3, 0.6, 1.0])).run(U, progress_bar=False)
    rises = np.diff(run.history.free_energy)
    found = vfe.diagnose(run).of("phase-raised")
    assert (rises.max() > 1e-6) == bool(found)
    assert all(finding.value == pytest.approx(rises.max()) for finding in found)


def mixture_to_learn(u: Tensor) -> None:
    weights = pyro.param("weights", torch.ones(3) / 3, constraint=constraints.simplex)
    locs = pyro.param("locs", LOCS.to(u))
    with pyro.plate("data", len(u)):
        v = pyro.sample("v", dist.Categorical(weights))
        pyro.sample("u", dist.Normal(locs[v], 1.0), obs=u)


def test_em_that_was_stopped_early_still_falls() -> None:
    with pytest.warns(UserWarning, match="max_iter"):
        run = vfe.EM(mixture_to_learn).run(U, max_iter=1, progress_bar=False)
    fall = run.history.of("E").free_energy[0] - run.free_energy
    finding = only(vfe.diagnose(run), "not-settled")
    assert finding.severity == pytest.approx(fall)
    assert not vfe.diagnose(run).of("model-bottleneck")


NOISE = np.random.default_rng(0).normal(0.0, 1.0, (200, 60))


def test_noise_that_stays_where_it_is_neither_rises_nor_falls() -> None:
    found = [vfe.diagnose(readings(100 + noise)) for noise in NOISE]
    assert not any(one.of("diverging") for one in found)
    assert sum(bool(one.of("not-settled")) for one in found) <= 2
    assert not any(one.of("model-bottleneck") for one in found)
    assert sum("Not known yet" in " ".join(one.not_looked_at) for one in found) >= 198
    coarse = [kinds(vfe.diagnose(readings(100 + noise), flat=0.5)) for noise in NOISE]
    assert all(one == {"model-bottleneck"} for one in coarse)


def test_a_fall_beyond_the_noise_is_seen() -> None:
    falling = [vfe.diagnose(readings(100 - 2 * np.arange(60) + noise)) for noise in NOISE]
    assert all(only(one, "not-settled").severity > 0 for one in falling)


def test_F_far_above_its_lowest_has_diverged() -> None:
    valley = 0.05 * (np.arange(60) - 30.0) ** 2
    for noise in NOISE[:20]:
        diagnosis = vfe.diagnose(readings(100 + valley + noise))
        finding = only(diagnosis, "diverging")
        assert finding.severity == pytest.approx(valley[-6:].mean(), abs=4.0)
        assert abs(finding.indices[0] - 300) <= 80
        assert not diagnosis.of("model-bottleneck")


def test_readings_that_scatter_are_said_to() -> None:
    (why,) = vfe.diagnose(readings(100 + NOISE[0])).not_looked_at
    before, after = NOISE[0][-10:-5] / 10, NOISE[0][-5:] / 10
    error = np.sqrt((before.var(ddof=1) + after.var(ddof=1)) / 5)
    assert f"changed by {after.mean() - before.mean():.3g} nats per datum, give or take {2 * error:.3g} nats" in why
    assert only(vfe.diagnose(readings(100 + NOISE[0]), flat=0.5), "model-bottleneck").value == pytest.approx(
        (100 + NOISE[0][-5:].mean()) / 10
    )


def test_rest_is_what_Settled_calls_so() -> None:
    """Curves that fall to rest, and noise of all sizes: one definition."""
    random = np.random.default_rng(1)
    agreed = []
    for rate, noise in ((0.1, 0.0), (0.3, 0.0), (0.3, 1e-4), (0.5, 1e-3), (0.2, 0.1)):
        curve = 20 + 10 * np.exp(-rate * np.arange(60)) + noise * random.standard_normal(60)
        for count in range(4, 60):
            history = readings(10 * curve[:count])
            settled = vfe.Settled()(history) is not None
            found = vfe.diagnose(history)
            assert settled == bool(found.of("model-bottleneck"))
            assert settled or found.of("not-settled") or "Not known yet" in " ".join(found.not_looked_at)
            agreed.append(settled)
    assert 0.1 < np.mean(agreed) < 0.9


def test_a_rise_and_a_fall_whose_means_are_equal_is_no_rest() -> None:
    hump = [100.0] * 20 + [100, 101, 102, 103, 104, 104, 103, 102, 101, 100]
    assert vfe.Settled()(readings(hump)) is None
    assert not vfe.diagnose(readings(hump)).of("model-bottleneck")


def test_readings_of_few_particles_are_judged_like_decompositions() -> None:
    def ending_in(stderr: float) -> Diagnosis:
        rows = tuple(Row(i, "step", 100.0, 99.0, 0.01, stderr=stderr) for i in range(8))
        return vfe.diagnose(History(rows, num_data=10))

    assert not kinds(ending_in(0.0)) & {"spread-unknown", "spread-too-large"}
    assert not kinds(ending_in(0.4)) & {"spread-unknown", "spread-too-large"}
    assert only(ending_in(0.6), "spread-too-large").value == 0.6
    assert ending_in(math.nan).of("spread-unknown")


def test_a_run_of_svi_that_was_too_short_still_falls_and_a_long_one_rests() -> None:
    def ending_after(num_steps: int, rate: float) -> Diagnosis:
        pyro.clear_param_store()
        model, optim = mixture(), pyro.optim.Adam({"lr": rate})
        guide = vfe.AutoMeanField(model)
        return vfe.diagnose(vfe.fit(model, guide, U, optim=optim, num_steps=num_steps, progress_bar=False))

    assert kinds(ending_after(100, 0.01)) == {"not-settled"}
    assert kinds(ending_after(1000, 0.1)) == {"model-bottleneck"}


def test_the_mean_of_each_reading_is_per_datum() -> None:
    rows = tuple(
        Row(i, "batch", 2.5 * size, 2.5 * size, 0.0, num_data=size) for i, size in enumerate((5, 9, 7, 2, 8) * 2)
    )
    finding = only(vfe.diagnose(History(rows, num_data=31)), "model-bottleneck")
    assert finding.value == pytest.approx(2.5)


def test_a_history_that_rests_with_a_gap_blames_the_guide() -> None:
    finding = only(vfe.diagnose(readings([100.0] * 20, gap=3.0)), "guide-bottleneck")
    assert (finding.value, finding.severity) == (pytest.approx(0.3), pytest.approx(3.0))
    assert not vfe.diagnose(readings([100.0] * 20, gap=3.0)).of("model-bottleneck")
    assert kinds(vfe.diagnose(readings([100.0] * 20, gap=0.05))) == {"model-bottleneck"}


def test_a_gap_that_is_not_known_is_left_out() -> None:
    diagnosis = vfe.diagnose(readings([100.0] * 20, gap=math.nan))
    assert not diagnosis
    assert any("does not know the gap" in line for line in diagnosis.not_looked_at)


@pytest.mark.parametrize(("last", "kind"), [(math.nan, "not-finite"), (math.inf, "support-mismatch")])
def test_an_end_that_is_not_finite_comes_first(last: float, kind: str) -> None:
    assert vfe.diagnose(readings([*range(20, 10, -1), last]))[0].kind == kind


def test_a_history_that_never_knew_F_is_no_alarm() -> None:
    diagnosis = vfe.diagnose(readings([math.nan] * 5, gap=math.nan))
    assert not diagnosis and "No reading of the history knows F" in diagnosis.not_looked_at[0]
    assert str(diagnosis).startswith("Nothing could be looked at.")


@pytest.mark.parametrize("stderr", [0.001, math.nan])
def test_where_latents_are_drawn_a_richer_guide_may_lower_the_surprise(stderr: float) -> None:
    rows = tuple(Row(i, "step", 100.0, 100.0, 0.0, stderr) for i in range(20))
    problem = only(vfe.diagnose(History(rows, num_data=10)), "model-bottleneck").problem
    assert "A richer guide for these may lower it" in problem and "neither" not in problem


def test_an_M_phase_after_which_F_was_infinite_is_told_though_F_is_finite_in_the_end() -> None:
    diagnosis = vfe.diagnose(em_rows(9.0, 8.0, math.inf, 7.5, 7.5, 7.5))
    finding = only(diagnosis, "phase-raised")
    assert (finding.site, finding.value, finding.severity) == ("M", math.inf, 0.0)


def test_an_infinite_start_is_no_finding() -> None:
    diagnosis = vfe.diagnose(em_rows(math.inf, 8.0, 7.5, 7.5, 7.5, 7.5))
    assert kinds(diagnosis) == {"model-bottleneck"}


def test_a_short_history_tells_of_no_trend() -> None:
    diagnosis = vfe.diagnose(readings([3.0, 2.0]))
    assert not diagnosis
    assert any("too few readings (2)" in line for line in diagnosis.not_looked_at)


# Subjects


def test_a_decomposition_and_a_history_tell_more_than_one_of_them() -> None:
    terms = vfe.FreeEnergy().decompose(mixture(), guide_with(posterior_by_hand(U)), U)
    history = readings([float(terms.free_energy)] * 10, num_data=len(U))
    assert not vfe.diagnose(terms)
    finding = only(vfe.diagnose(terms, history), "model-bottleneck")
    assert finding.value == pytest.approx(float(terms.surprise) / len(U))
    of_a_bad_guide = vfe.FreeEnergy().decompose(mixture(), guide_with(torch.full((len(U), 3), 1 / 3)), U)
    both = vfe.diagnose(of_a_bad_guide, history)
    assert len(both.of("guide-bottleneck")) == 1
    assert not both.of("model-bottleneck")


def test_anything_with_a_history_can_be_asked() -> None:
    class Run:
        history = readings([100.0] * 10)
        notes = ("the weather was fine",)

    diagnosis = vfe.diagnose(Run())
    assert kinds(diagnosis) == {"model-bottleneck"}
    assert "The run notes: the weather was fine" in str(diagnosis)


def test_the_run_of_a_guide_is_looked_at_site_by_site() -> None:
    guide = vfe.AutoMeanField(mixture_to_learn)
    run = vfe.EM(mixture_to_learn, guide, e_phase=vfe.Coordinate()).run(U, progress_bar=False)
    assert kinds(vfe.diagnose(run)) == {"model-bottleneck"}


def test_a_run_whose_E_phase_is_not_exact_says_that_its_Q_is_not_looked_at() -> None:
    run = vfe.EM(mixture_to_learn, e_phase=vfe.Hard()).run(U, progress_bar=False)
    terms, diagnosis = run.decomposition(), vfe.diagnose(run)
    assert any("its Q is not kept" in line for line in diagnosis.not_looked_at)
    (finding,) = diagnosis.of("guide-bottleneck")
    assert finding.severity == pytest.approx(float(terms.gap))
    assert "vfe.Exact()" in finding.advice


def test_parts_and_pairs_of_one_kind_are_refused() -> None:
    terms = vfe.FreeEnergy().decompose(mixture(), guide_with(posterior_by_hand(U)), U)
    with pytest.raises(VFEError, match=r"plate 'data'.*not terms.by\('data'\)"):
        vfe.diagnose(terms.by("data"))
    with pytest.raises(VFEError, match=r"per datum.*not terms.per_datum"):
        vfe.diagnose(terms.per_datum)
    with pytest.raises(VFEError, match="more than one decomposition"):
        vfe.diagnose(terms, terms)
    with pytest.raises(VFEError, match="more than one history"):
        vfe.diagnose(readings([1.0]), readings([1.0]))
    with pytest.raises(VFEError, match="nothing"):
        vfe.diagnose()
    with pytest.raises(VFEError, match="given str"):
        vfe.diagnose("terms")  # type: ignore[arg-type]
    with pytest.raises(VFEError, match="flat=-1"):
        vfe.diagnose(terms, flat=-1.0)


# Results


def a_diagnosis() -> Diagnosis:
    return of_mixture(tensor([[0.001, 0.998, 0.001]]).expand(len(U), 3))


def test_the_worst_comes_first() -> None:
    found = [
        Finding("model-bottleneck", None, 1.0, "p", "a", 0.0),
        Finding("unused-state", "v", 1.0, "p", "a", 0.0),
        Finding("plate-element", "data", 1.0, "p", "a", 2.0),
        Finding("support-mismatch", "v", math.inf, "p", "a", math.inf),
        Finding("guide-bottleneck", "v", 1.0, "p", "a", 5.0),
    ]
    ordered = [finding.kind for finding in sorted_findings(found)]
    assert ordered == ["support-mismatch", "guide-bottleneck", "plate-element", "unused-state", "model-bottleneck"]


def test_a_diagnosis_is_a_sequence_of_findings() -> None:
    diagnosis = a_diagnosis()
    assert bool(diagnosis)
    assert list(diagnosis) == list(diagnosis.findings) == [diagnosis[i] for i in range(len(diagnosis))]
    assert diagnosis.of("guide-collapsed")[0] in diagnosis.findings
    with pytest.raises(VFEError, match="no findings of kind 'collapse'"):
        diagnosis.of("collapse")
    assert all(finding.kind in KINDS and finding.title for finding in diagnosis)


def test_advice_is_not_printed_twice_in_a_row() -> None:
    program = PROGRAMS["left_right_chain"]
    guide = vfe.AutoMeanField(program.model)
    diagnosis = vfe.diagnose(vfe.FreeEnergy().decompose(program.model, guide, *program.args))
    assert {finding.site for finding in diagnosis.of("support-mismatch")} == {"z_0", "z_1", "z_2"}
    assert str(diagnosis).count("Give the guide the same zeros") == 1
    assert all("Give the guide the same zeros" in finding.advice for finding in diagnosis.of("support-mismatch"))


def test_it_prints_every_finding_with_its_site_and_number_and_within_the_page() -> None:
    diagnosis = a_diagnosis()
    text = str(diagnosis)
    assert max(map(len, text.splitlines())) <= 110
    flat = " ".join(text.split())
    for finding in diagnosis:
        assert " ".join(finding.problem.split()) in flat
        assert " ".join(finding.advice.split()) in flat
    assert "Q has 99.8% of the 18 elements at value 1 of 'v'" in flat


def test_a_notebook_shows_the_same_words_and_fetches_nothing() -> None:
    finding = Finding("unused-state", "<v>", 0.0, "p & q", "a", 0.0)
    page = Diagnosis((finding,), ("b < c",))._repr_html_()
    assert "&lt;v&gt;" in page and "p &amp; q" in page and "b &lt; c" in page
    assert "http" not in page and "src=" not in page
    assert "Nothing found." in Diagnosis(())._repr_html_()


def test_it_becomes_a_dataset() -> None:
    diagnosis = a_diagnosis()
    dataset = diagnosis.to_xarray()
    assert list(dataset.kind.values) == [finding.kind for finding in diagnosis]
    np.testing.assert_allclose(dataset.severity, [finding.severity for finding in diagnosis])
    assert Diagnosis(()).to_xarray().sizes == {"finding": 0}


def test_the_rows_of_a_view_are_the_elements_of_its_sites() -> None:
    terms = vfe.FreeEnergy().decompose(hidden_markov([0, 1, 0, 1], 2), empty)
    run = terms.runs[0]
    posterior = terms.posterior_marginals()
    tables = {name: Table(values, (name,)) for name, values in posterior.items()}
    (view,) = views_of(run, tables, tables, None)
    assert view.members == ("z_0", "z_1", "z_2", "z_3")
    torch.testing.assert_close(view.posterior, torch.stack(list(posterior.values())))
    torch.testing.assert_close(view.used(view.posterior), torch.stack(list(posterior.values())).sum(0))
