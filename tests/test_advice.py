"""Advice is a claim: each kind of finding where it is true, where it is not and nothing is said, and that it helps.

finding              true, not true, followed
support-mismatch     a guide that leaves the impossible out has a finite F
guide-bottleneck     only at rest; leaving the latents out gains the gap, to the last digit
guide-collapsed      a start at the posterior gains what is said
guide-ignores-data   the same
plate-element        the element's own posterior gains what is said
phase-raised         test_diagnose
diverging            a smaller learning rate ends lower by what is said
not-settled          going on gains what is said
spread-*             the particles that are advised bring the error below its limit; what is random is named
unused-state         a model without the state is no worse
states-alike         another start gains what is said, and nothing where components are too many
model-bottleneck     no guide saves more than the gap
not-finite           test_diagnose
"""

import itertools
import math
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs.case import empty, noise, tensor
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.distributions import constraints

import pyro_vfe as vfe
from pyro_vfe.learning.history import History, Row
from pyro_vfe.reporting.findings import Diagnosis

SPIKES = tensor([2.0, 1.0, 3.0, 11.0, 9.0, 14.0, 0.0, 10.0, 2.0, 5.0, 12.0, 1.0])
COUNTS = SPIKES.repeat(5)
Model = Callable[..., Any]


def of_two_rates(u: Tensor) -> None:
    """The model of the README."""
    weights = pyro.param("weights", torch.ones(2) / 2, constraint=constraints.simplex)
    rates = pyro.param("rates", tensor([2.0, 8.0]).to(u), constraint=constraints.positive)
    with pyro.plate("data", len(u)):
        v = pyro.sample("v", dist.Categorical(weights))
        pyro.sample("u", dist.Poisson(rates[v]), obs=u)


def of_chains(u: Tensor) -> None:
    stay = pyro.param("stay", tensor([[0.8, 0.2], [0.2, 0.8]]), constraint=constraints.simplex)
    rates = pyro.param("rates", tensor([2.0, 8.0]), constraint=constraints.positive)
    with pyro.plate("time", len(u)):
        v = pyro.sample("v", vfe.MarkovChain(torch.ones(2) / 2, stay))
        pyro.sample("u", dist.Poisson(rates[v]), obs=u)


ANSWERS = torch.bernoulli(
    tensor([[0.9, 0.8, 0.9], [0.2, 0.3, 0.1]])[torch.arange(40) % 2],
    generator=torch.Generator().manual_seed(3),
)


def of_classes(answers: Tensor) -> None:
    weights = pyro.param("weights", torch.ones(2) / 2, constraint=constraints.simplex)
    probs = pyro.param("probs", tensor([[0.6] * 3, [0.4] * 3]).to(answers), constraint=constraints.unit_interval)
    with pyro.plate("people", len(answers)):
        v = pyro.sample("v", dist.Categorical(weights))
        pyro.sample("u", dist.Bernoulli(probs[v]).to_event(1), obs=answers)


def fitted(model: Model, guide: Any, u: Tensor, num_steps: int, lr: float = 0.05, **options: Any) -> vfe.SVIRun:
    adam = pyro.optim.Adam({"lr": lr})
    return vfe.fit(model, guide, u, optim=adam, num_steps=num_steps, progress_bar=False, **options)


def every(model: Model, guide: Any, steps: int, **options: Any) -> vfe.Monitor:
    return vfe.Monitor(model, guide, every=steps, progress_bar=False, **options)


def kinds(diagnosis: Diagnosis) -> set[str]:
    return {finding.kind for finding in diagnosis}


def left_out(diagnosis: Diagnosis) -> str:
    return " ".join(diagnosis.not_looked_at)


# Rest


@pytest.mark.parametrize(("num_steps", "steps"), [(100, 20), (200, 20), (200, 50)])
def test_a_guide_of_an_exact_family_is_no_bottleneck_while_F_falls(num_steps: int, steps: int) -> None:
    guide = vfe.AutoMeanField(of_two_rates)
    run = fitted(of_two_rates, guide, SPIKES, num_steps, monitor=every(of_two_rates, guide, steps))
    found = vfe.diagnose(run)
    assert kinds(found) <= {"not-settled"}
    assert found.of("not-settled") or "Not known yet" in left_out(found)
    assert not vfe.diagnose(vfe.FreeEnergy().decompose(of_two_rates, guide, SPIKES), run).of("guide-bottleneck")


OF_EXACT_FAMILIES = {
    "README": (of_two_rates, vfe.AutoMeanField, SPIKES),
    "classes": (of_classes, vfe.AutoMeanField, ANSWERS),
    "chains": (of_chains, vfe.AutoStructured, SPIKES),
}


@pytest.mark.parametrize("name", OF_EXACT_FAMILIES)
def test_going_on_where_F_falls_gains_at_least_its_last_fall(name: str) -> None:
    model, family, u = OF_EXACT_FAMILIES[name]
    guide = family(model)
    run = fitted(model, guide, u, 30, lr=0.1, monitor=every(model, guide, 5))
    (finding,) = vfe.diagnose(run)
    assert finding.kind == "not-settled"
    further = fitted(model, guide, u, 200, lr=0.2, monitor=every(model, guide, 5))
    assert run.free_energy - further.free_energy >= finding.severity > 0
    assert kinds(vfe.diagnose(further)) == {"model-bottleneck"}


def test_few_readings_are_not_known_yet_whatever_they_are() -> None:
    for count in range(1, 10):
        rows = tuple(Row(20 * i, "step", 30.0, 25.0, 5.0) for i in range(count))
        found = vfe.diagnose(History(rows, num_data=12))
        assert not found and "Not known yet" in left_out(found)


def test_em_that_was_stopped_is_not_at_rest_though_it_falls_by_little() -> None:
    em = vfe.EM(of_two_rates)
    with pytest.warns(UserWarning, match="max_iter"):
        run = em.run(SPIKES, max_iter=4, progress_bar=False)
    (finding,) = vfe.diagnose(run)
    assert finding.kind == "not-settled" and "had not converged" in finding.problem
    assert finding.value < 1e-3
    further = em.run(SPIKES, progress_bar=False)
    assert run.free_energy - further.free_energy > 0
    assert kinds(vfe.diagnose(further)) == {"model-bottleneck"}


def test_at_rest_no_guide_saves_more_than_the_gap_that_is_told() -> None:
    guide = vfe.AutoMeanField(of_two_rates)
    run = fitted(of_two_rates, guide, SPIKES, 150, lr=0.2, monitor=every(of_two_rates, guide, 5))
    (finding,) = vfe.diagnose(run)
    match = re.search(r"beside a gap of ([\d.e-]+) nats per datum", finding.problem)
    exact = vfe.FreeEnergy().loss(of_two_rates, empty, SPIKES)
    assert match is not None
    assert 0 < (run.free_energy - exact) / len(SPIKES) <= 1.2 * float(match[1])


# The guide


def coupled(u: Tensor) -> None:
    """Two causes of one datum, which explain each other away."""
    with pyro.plate("data", len(u)):
        a = pyro.sample("a", dist.Bernoulli(0.5))
        b = pyro.sample("b", dist.Bernoulli(0.5))
        pyro.sample("u", dist.Normal(3 * (a + b), 1.0), obs=u)


def test_a_bottleneck_at_rest_costs_what_leaving_its_latents_out_gains() -> None:
    u = torch.full((20,), 3.0)
    guide = vfe.AutoMeanField(coupled, init_scale=0.1)
    run = fitted(coupled, guide, u, 200, lr=0.2, monitor=every(coupled, guide, 5))
    terms = vfe.FreeEnergy().decompose(coupled, guide, u)
    alone, both = vfe.diagnose(run).of("guide-bottleneck"), vfe.diagnose(terms, run).of("guide-bottleneck")
    (of_history,), (of_terms,) = alone, both
    gained = float(terms.free_energy) - vfe.FreeEnergy().loss(coupled, empty, u)
    assert of_terms.severity == pytest.approx(gained)
    assert of_history.severity == pytest.approx(gained, rel=0.02)


def guide_with(probs: Tensor) -> Model:
    def guide(u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            pyro.sample("v", dist.Categorical(probs))

    return guide


@pytest.mark.parametrize(
    ("probs", "kind"),
    [
        (tensor([0.998, 0.002]).expand(12, 2), "guide-collapsed"),
        (tensor([0.5, 0.5]).expand(12, 2), "guide-ignores-data"),
    ],
)
def test_a_start_at_the_posterior_gains_what_a_bad_guide_of_a_latent_is_said_to_cost(probs: Tensor, kind: str) -> None:
    before = vfe.FreeEnergy().decompose(of_two_rates, guide_with(probs), SPIKES)
    (finding,) = vfe.diagnose(before).of(kind)
    guide = vfe.AutoMeanField(of_two_rates, init="posterior")
    after = vfe.FreeEnergy().decompose(of_two_rates, guide, SPIKES)
    assert float(before.free_energy - after.free_energy) == pytest.approx(finding.severity)
    assert not vfe.diagnose(after)


def test_the_posterior_of_an_element_gains_what_the_element_is_said_to_cost() -> None:
    exact = vfe.posterior(of_two_rates, SPIKES).marginal("v")
    probs = exact.clone()
    probs[4] = probs[4].flip(-1)
    before = vfe.FreeEnergy().decompose(of_two_rates, guide_with(probs), SPIKES)
    (finding,) = vfe.diagnose(before).of("plate-element")
    after = vfe.FreeEnergy().decompose(of_two_rates, guide_with(exact), SPIKES)
    assert finding.indices == (4,)
    assert float(before.free_energy - after.free_energy) == pytest.approx(finding.severity)
    assert not vfe.diagnose(after)


def test_leaving_out_a_latent_that_others_determine_makes_F_finite() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Bernoulli(0.4))
        b = pyro.sample("b", dist.Categorical(torch.eye(2)[a.long()]))
        pyro.sample("u", dist.Normal(1.0 * b, 1.0), obs=torch.tensor(0.7))

    def guide(names: str) -> Model:
        return lambda: [pyro.sample(name, dist.Categorical(torch.ones(2))) for name in names] and None

    (finding,) = vfe.diagnose(vfe.FreeEnergy().decompose(model, guide("ab"))).of("support-mismatch")
    assert finding.severity == math.inf
    assert math.isfinite(vfe.FreeEnergy().loss(model, guide("a")))


def test_where_the_posterior_is_symmetric_noise_at_the_start_frees_mean_field_from_its_saddle() -> None:
    model = spins(3, 0.8)

    def ended(guide: vfe.AutoMeanField) -> float:
        em = vfe.EM(model, guide, e_phase=vfe.Coordinate())
        return [em.e_phase().free_energy for _ in range(20)][-1]

    stuck = vfe.AutoMeanField(model)
    before = ended(stuck)
    (finding,) = vfe.diagnose(vfe.FreeEnergy().decompose(model, stuck)).of("guide-bottleneck")
    assert "init_scale=0.1 where latents are exchangeable" in finding.advice
    assert before - vfe.FreeEnergy().loss(model, empty) == pytest.approx(finding.severity)
    pyro.clear_param_store()
    assert ended(vfe.AutoMeanField(model, init_scale=0.1)) < before - 1.0


# What is random


def subsampled(u: Tensor) -> None:
    rates = pyro.param("rates", tensor([2.0, 8.0]), constraint=constraints.positive)
    with pyro.plate("data", len(u), subsample_size=10) as index:
        v = pyro.sample("v", dist.Categorical(torch.ones(2)))
        pyro.sample("u", dist.Poisson(rates[v]), obs=u[index])


def with_a_rate(u: Tensor) -> None:
    rate = pyro.sample("rate", dist.LogNormal(1.0, 1.0))
    with pyro.plate("data", len(u)):
        v = pyro.sample("v", dist.Categorical(torch.ones(2)))
        pyro.sample("u", dist.Poisson(rate * (1.0 + 3.0 * v)), obs=u)


def of_rates(u: Tensor) -> None:
    rates = pyro.param("rates", tensor([2.0, 8.0]), constraint=constraints.positive)
    with pyro.plate("data", len(u)):
        v = pyro.sample("v", dist.Categorical(torch.ones(2)))
        pyro.sample("u", dist.Poisson(rates[v]), obs=u)


@cache
def random_runs() -> dict[str, Any]:
    drawn = AutoNormal(pyro.poutine.block(with_a_rate, expose=["rate"]))
    sleeper = vfe.AutoAmortized(of_rates, torch.nn.Linear(1, 2), inputs=lambda u: u[:, None])
    adams = [pyro.optim.Adam({"lr": 0.01}) for _ in range(2)]
    optim, batches = pyro.optim.Adam({"lr": 0.05}), [COUNTS[3:20], COUNTS[:12], COUNTS[30:40]]
    runs = {
        "subsample": fitted(subsampled, empty, COUNTS, 5, monitor=every(subsampled, empty, 1)),
        "batch": vfe.fit(of_rates, None, optim=optim, num_steps=40, batches=batches, progress_bar=False),
        "draws": fitted(with_a_rate, drawn, COUNTS, 5, monitor=every(with_a_rate, drawn, 1)),
        "dreams": vfe.WakeSleep(of_rates, sleeper, *adams).run(COUNTS, num_steps=10, progress_bar=False),
        "nothing": fitted(of_rates, None, COUNTS, 5, monitor=every(of_rates, None, 1)),
    }
    return runs


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("subsample", ("the subsample of plate 'data'",)),
        ("batch", ("the mini-batch of each reading",)),
        ("draws", ("the guide's draws of 'rate'",)),
        ("dreams", ("the dreams of sleep phases",)),
        ("nothing", ()),
    ],
)
def test_what_is_random_in_a_run_is_named_and_nothing_else(name: str, words: tuple[str, ...]) -> None:
    run = random_runs()[name]
    assert run.history.random == words
    text = " ".join(str(vfe.diagnose(run)).split())
    assert ("draws of the guide" in text or "guide's draws" in text) == (name == "draws")
    if name in ("subsample", "draws"):
        (finding,) = vfe.diagnose(run).of("spread-unknown")
        assert words[0] in finding.problem


@pytest.mark.parametrize(
    ("model", "words"), [(subsampled, "subsample of plate 'data'"), (with_a_rate, "draws of 'rate'")]
)
def test_particles_as_advised_tell_the_spread_and_bring_it_below_its_limit(model: Model, words: str) -> None:
    guide = empty if model is subsampled else AutoNormal(pyro.poutine.block(model, expose=["rate"]))
    more = vfe.FreeEnergy(num_particles=10)
    run = fitted(model, guide, COUNTS, 4, monitor=every(model, guide, 1, elbo=more))
    assert not vfe.diagnose(run).of("spread-unknown")
    terms = more.decompose(model, guide, COUNTS)
    assert words in str(terms)
    limit = float(terms.stderr) / terms.num_data / 3  # type: ignore[arg-type]
    (finding,) = vfe.diagnose(terms, spread=limit).of("spread-too-large")
    assert words in finding.problem
    advised = re.search(r"num_particles=([\d,]+)", finding.advice)
    assert advised is not None
    enough = vfe.FreeEnergy(num_particles=int(advised[1].replace(",", ""))).decompose(model, guide, COUNTS)
    assert not vfe.diagnose(enough, spread=limit).of("spread-too-large")


# The model


def test_a_learning_rate_that_is_smaller_ends_lower_by_what_F_has_risen() -> None:
    def ending_with(lr: float) -> vfe.SVIRun:
        pyro.clear_param_store()
        monitor = every(of_rates, None, 1)
        fitted(of_rates, None, COUNTS, 20, monitor=monitor)
        return fitted(of_rates, None, COUNTS, 10, lr=lr, monitor=monitor)

    wild, calm = ending_with(1.0), ending_with(0.05)
    (finding,) = vfe.diagnose(wild).of("diverging")
    assert finding.severity > 0
    assert wild.history.free_energy[-5:].mean() - calm.free_energy >= finding.severity
    assert not vfe.diagnose(calm).of("diverging")


def test_a_model_without_an_unused_state_is_no_worse() -> None:
    def of(locs: Tensor) -> Model:
        def model(u: Tensor) -> None:
            with pyro.plate("data", len(u)):
                v = pyro.sample("v", dist.Categorical(torch.ones(len(locs))))
                pyro.sample("u", dist.Normal(locs[v], 1.0), obs=u)

        return model

    u, locs = noise(40, seed=1) + tensor([-2.0, 2.0]).repeat(20), tensor([-2.0, 30.0, 2.0])
    with_it = vfe.FreeEnergy().decompose(of(locs), empty, u)
    (finding,) = vfe.diagnose(with_it)
    assert (finding.kind, finding.indices) == ("unused-state", (1,))
    without = vfe.FreeEnergy().decompose(of(locs[[0, 2]]), empty, u)
    assert without.free_energy <= with_it.free_energy
    assert not vfe.diagnose(without)


# Components that are alike


def equal_rates(u: Tensor) -> None:
    weights = pyro.param("weights", torch.ones(2) / 2, constraint=constraints.simplex)
    rates = pyro.param("rates", tensor([4.0, 4.0]), constraint=constraints.positive)
    with pyro.plate("data", len(u)):
        v = pyro.sample("v", dist.Categorical(weights))
        pyro.sample("u", dist.Poisson(rates[v]), obs=u)


def two_of_three_equal(u: Tensor) -> None:
    weights = pyro.param("weights", torch.ones(3) / 3, constraint=constraints.simplex)
    rates = pyro.param("rates", tensor([1.0, 9.0, 9.0]), constraint=constraints.positive)
    with pyro.plate("data", len(u)):
        v = pyro.sample("v", dist.Categorical(weights))
        pyro.sample("u", dist.Poisson(rates[v]), obs=u)


def equal_states(u: Tensor) -> None:
    transition = pyro.param("transition", torch.ones(2, 2) / 2, constraint=constraints.simplex)
    rates = pyro.param("rates", tensor([4.0, 4.0]), constraint=constraints.positive)
    with pyro.plate("time", len(u)):
        v = pyro.sample("v", vfe.MarkovChain(torch.ones(2) / 2, transition))
        pyro.sample("u", dist.Poisson(rates[v]), obs=u)


def equal_classes(answers: Tensor) -> None:
    weights = pyro.param("weights", torch.ones(2) / 2, constraint=constraints.simplex)
    probs = pyro.param("probs", torch.full((2, 3), 0.5), constraint=constraints.unit_interval)
    with pyro.plate("people", len(answers)):
        v = pyro.sample("v", dist.Categorical(weights))
        pyro.sample("u", dist.Bernoulli(probs[v]).to_event(1), obs=answers)


THREE_RATES = tensor([0.0, 1, 2, 9, 8, 10, 30, 28, 31, 33, 1, 0, 7, 11]).repeat(3)


@pytest.mark.parametrize(
    ("model", "u"),
    [(equal_rates, COUNTS), (equal_states, COUNTS), (equal_classes, ANSWERS), (two_of_three_equal, THREE_RATES)],
)
def test_a_saddle_of_equal_components_costs_what_another_start_gains(model: Model, u: Tensor) -> None:
    run = vfe.EM(model).run(u, progress_bar=False)
    found = vfe.diagnose(run)
    assert run.converged and found[0].kind == "states-alike" and found[0].site == "v"
    assert "a saddle point" in found[0].problem and "n_init=10" in found[0].advice
    assert not found.of("model-bottleneck")
    pyro.clear_param_store()
    free = vfe.EM(model).run(u, n_init=10, progress_bar=False)
    assert run.free_energy - free.free_energy >= found[0].severity - 1e-6 > 1.0
    assert not vfe.diagnose(free).of("states-alike") and not free.alike


def test_looking_for_another_start_leaves_the_run_as_it_is() -> None:
    pyro.set_rng_seed(5)
    run = vfe.EM(equal_rates).run(COUNTS, progress_bar=False)
    after = torch.rand(3)
    pyro.set_rng_seed(5)
    torch.testing.assert_close(after, torch.rand(3))
    torch.testing.assert_close(pyro.param("rates").detach(), run.params["rates"])
    torch.testing.assert_close(run.params["rates"], COUNTS.mean().expand(2))


EVEN = tensor([3.0, 4, 4, 5, 3, 4, 5, 4]).repeat(8)
"""Counts that vary by less than any Poisson's: one component fits as well as any number (Lindsay 1983)."""
CONSTANT = torch.ones(24, 3)


@pytest.mark.parametrize(("model", "u"), [(equal_rates, EVEN), (equal_states, EVEN), (equal_classes, CONSTANT)])
def test_components_that_are_too_many_are_no_saddle(model: Model, u: Tensor) -> None:
    run = vfe.EM(model).run(u, progress_bar=False)
    (finding,) = vfe.diagnose(run).of("states-alike")
    assert finding.severity == 0 and "fewer components do as well" in finding.advice and "saddle" not in finding.problem
    pyro.clear_param_store()
    again = vfe.EM(model).run(u, n_init=5, progress_bar=False)
    assert run.free_energy - again.free_energy < 1.0


def test_components_that_differ_are_not_called_alike() -> None:
    for model, u in ((of_two_rates, SPIKES), (of_chains, SPIKES), (of_classes, ANSWERS)):
        pyro.clear_param_store()
        run = vfe.EM(model).run(u, progress_bar=False)
        assert not run.alike and run.gain_elsewhere is None
        assert not vfe.diagnose(run).of("states-alike")


def test_the_steps_of_a_loop_are_told_of_together() -> None:
    def model(u: Tensor) -> None:
        rates = pyro.param("rates", tensor([4.0, 4.0]), constraint=constraints.positive)
        for i in range(len(u)):
            v = pyro.sample(f"v_{i}", dist.Categorical(torch.ones(2)))
            pyro.sample(f"u_{i}", dist.Poisson(rates[v]), obs=u[i])

    run = vfe.EM(model).run(SPIKES, progress_bar=False)
    (note,), (finding,) = run.notes, vfe.diagnose(run)
    assert "'v_0', 'v_1', 'v_2' and 9 more" in note and "n_init=10" in note
    assert finding.kind == "states-alike" and finding.severity > 1


def test_values_that_are_alike_by_design_are_left_in_peace() -> None:
    def model(u: Tensor) -> None:
        rates = pyro.param("rates", tensor([2.0, 8.0]), constraint=constraints.positive)
        with pyro.plate("data", len(u)):
            v = pyro.sample("v", dist.Categorical(torch.ones(4)))
            pyro.sample("u", dist.Poisson(rates[v % 2]), obs=u)

    for rates in ([2.0, 8.0], [0.1, 0.1 + 1e-9]):  # At an optimum, and near a saddle point: v and v + 2 stay alike.
        pyro.clear_param_store()
        pyro.param("rates", tensor(rates), constraint=constraints.positive)
        run = vfe.EM(model).run(SPIKES, tol=1e-3, progress_bar=False)
        assert not any("alike" in note for note in run.notes)
        assert not vfe.diagnose(run).of("states-alike")


def test_svi_at_a_saddle_says_that_its_components_are_alike_and_that_the_price_is_not_known() -> None:
    run = fitted(equal_rates, None, COUNTS, 120, lr=0.2, monitor=every(equal_rates, None, 4))
    (note,) = run.notes
    assert "'v'" in note and "only another start shows" in note
    found = vfe.diagnose(run)
    assert kinds(found) == {"states-alike"} and "costs nats" not in str(found)
    assert "another start may lower the surprise" in left_out(found)
    pyro.clear_param_store()
    pyro.param("rates", tensor([3.0, 5.0]), constraint=constraints.positive)
    apart = fitted(equal_rates, None, COUNTS, 120, lr=0.2, monitor=every(equal_rates, None, 4))
    assert run.free_energy - apart.free_energy > 10
    assert not any("alike" in note for note in apart.notes) and kinds(vfe.diagnose(apart)) == {"model-bottleneck"}


def test_wake_sleep_and_batches_at_a_saddle_say_so_too() -> None:
    batches = vfe.EM(equal_rates).run_batches(COUNTS.split(20), progress_bar=False)
    assert any("another start" in note for note in batches.notes)
    assert kinds(vfe.diagnose(batches)) == {"states-alike"}
    guide = vfe.AutoMeanField(equal_rates)
    adams = [pyro.optim.Adam({"lr": 0.01}) for _ in range(2)]
    run = vfe.WakeSleep(equal_rates, guide, *adams).run(COUNTS, num_steps=4, progress_bar=False)
    assert any("another start" in note for note in run.notes) == bool(run.history.alike)


# What draws are worth


def spins(size: int, coupling: float) -> Model:
    cells = list(itertools.product(range(size), repeat=2))
    bonds = [(a, b) for a, b in itertools.combinations(cells, 2) if abs(a[0] - b[0]) + abs(a[1] - b[1]) == 1]

    def model() -> None:
        spin = {cell: 2 * pyro.sample(f"s_{cell[0]}_{cell[1]}", dist.Bernoulli(0.5)) - 1 for cell in cells}
        for a, b in bonds:
            pyro.factor(f"bond_{a}_{b}", coupling * spin[a] * spin[b])

    return model


def brute_force_share(log_p: Tensor, log_q: Tensor) -> float:
    return float((2 * log_p.logsumexp(0) - (2 * log_p - log_q).logsumexp(0)).exp())


def test_a_mode_that_the_guide_never_draws_is_told_though_no_draw_knows_of_it() -> None:
    model = spins(4, 0.8)
    states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=16)))
    grid = (2 * states - 1).reshape(-1, 4, 4)
    log_p = 16 * math.log(0.5) + 0.8 * (
        (grid[:, 1:] * grid[:, :-1]).sum((1, 2)) + (grid[:, :, 1:] * grid[:, :, :-1]).sum((1, 2))
    )
    up = 0.97

    def guide() -> None:
        for i, j in itertools.product(range(4), repeat=2):
            pyro.sample(f"s_{i}_{j}", dist.Bernoulli(up))

    log_q = (states * math.log(up) + (1 - states) * math.log(1 - up)).sum(1)
    found = vfe.bounds(model, guide)
    assert float(found.exact_share) == pytest.approx(brute_force_share(log_p, log_q), rel=1e-9)  # type: ignore[arg-type]
    assert float(found.effective_sample_size) > 10 and not bool((found.worst_pareto_k > 0.7).any())
    assert found.lower + 4 * found.lower_stderr < vfe.posterior(model).log_evidence  # type: ignore[operator]
    (caution,) = found.notes
    assert "exactly, less than a tenth" in caution and "exactly 0.0" in str(found)


def test_each_datum_has_the_share_of_its_own_weights() -> None:
    u = tensor([2.0, 5.0, 9.0])
    guide = guide_with(tensor([[0.5, 0.5], [0.9, 0.1], [0.999, 0.001]]))
    found = vfe.bounds(of_rates, guide, u, num_particles=50)
    log_p = dist.Poisson(tensor([2.0, 8.0])).log_prob(u[:, None]) + math.log(0.5)
    log_q = tensor([[0.5, 0.5], [0.9, 0.1], [0.999, 0.001]]).log()
    expected = [brute_force_share(p, q) for p, q in zip(log_p, log_q, strict=True)]
    assert found.exact_share is not None
    torch.testing.assert_close(found.exact_share, tensor(expected))
    (caution,) = found.notes
    assert "for 1 of 3 data" in caution
    # The advice: a latent that is left out is summed.
    assert not [note for note in vfe.bounds(of_rates, empty, u).notes if "tenth" in note]


def test_a_guide_that_rules_out_a_part_of_the_posterior_is_told_of_it() -> None:
    def guide(u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            pyro.sample("v", dist.Categorical(tensor([1.0, 0.0])))

    u = tensor([4.0])
    missed = float(vfe.posterior(of_rates, u).marginal("v")[0, 1])
    found = vfe.bounds(of_rates, guide, u)
    assert any(f"probability zero to {100 * missed:.2g}% of the posterior" in note for note in found.notes)
    assert float(found.lower - vfe.posterior(of_rates, u).log_evidence) == pytest.approx(math.log1p(-missed))


def test_what_cannot_be_summed_is_left_to_the_draws_and_good_draws_get_no_caution() -> None:
    found = vfe.bounds(with_a_rate, AutoNormal(pyro.poutine.block(with_a_rate, expose=["rate"])), COUNTS)
    assert found.exact_share is None and "exactly" not in str(found)
    exact = vfe.bounds(of_rates, guide_with(vfe.posterior(of_rates, SPIKES).marginal("v")), SPIKES)
    assert exact.exact_share is not None and not exact.notes
    torch.testing.assert_close(exact.exact_share, torch.ones(12))


def test_bounds_of_a_subsample_are_said_to_be_estimates_and_of_the_whole_are_not() -> None:
    def part(u: Tensor) -> None:
        with pyro.plate("data", len(u), subsample=torch.arange(4)) as index:
            v = pyro.sample("v", dist.Categorical(torch.ones(2)))
            pyro.sample("u", dist.Poisson(tensor([2.0, 8.0])[v]), obs=u[index])

    def guide(u: Tensor) -> None:
        with pyro.plate("data", len(u), subsample=torch.arange(4)):
            pyro.sample("v", dist.Categorical(torch.ones(2)))

    assert any("a plate is subsampled" in note for note in vfe.bounds(part, guide, SPIKES).notes)
    whole = vfe.bounds(of_rates, guide_with(torch.ones(12, 2)), SPIKES)
    assert not any("subsampled" in note for note in whole.notes)


def test_leaving_latents_out_mends_a_guide_whose_elements_are_those_of_other_batches() -> None:
    def ended(guide: Any) -> vfe.SVIRun:
        pyro.clear_param_store()
        batches, optim = [SPIKES[:6], SPIKES[6:]], pyro.optim.Adam({"lr": 0.05})
        return vfe.fit(of_rates, guide, optim=optim, num_steps=41, batches=batches, progress_bar=False)

    own, none = ended(vfe.AutoMeanField(of_rates)), ended(None)
    assert any("leave the latents out of the guide" in note for note in own.notes)
    assert not any("own parameters" in note for note in none.notes)
    assert none.free_energy < own.free_energy - 1.0


# Jumps, and rounding


@pytest.mark.parametrize(("model", "u"), [(of_two_rates, COUNTS), (of_chains, COUNTS), (of_classes, ANSWERS)])
def test_no_row_of_an_E_phase_lowers_the_surprise_and_jumps_are_called_so(model: Model, u: Tensor) -> None:
    history = vfe.EM(model).run(u, acceleration="squarem", progress_bar=False).history
    moved = np.nan_to_num(history.d_surprise)
    is_e = np.array(history.phase) == "E"
    assert np.abs(moved[is_e]).max() < 1e-9
    jumps = np.array(history.phase) == "jump"
    assert jumps.any() and (moved[jumps] <= 0).all()
    assert list(history.of("E", "jump").iteration) == list(range(history.iteration[-1] + 1))
    assert "jump" in str(history)
    assert "jump" not in vfe.EM(model).run(u, progress_bar=False).history.phase


@pytest.mark.parametrize(("model", "u"), [(of_two_rates, SPIKES), (of_classes, ANSWERS)])
def test_what_rounding_explains_is_no_change_of_F(model: Model, u: Tensor) -> None:
    def ended(dtype: torch.dtype) -> vfe.EMRun:
        torch.set_default_dtype(dtype)
        pyro.clear_param_store()
        return vfe.EM(model).run(u.to(dtype), progress_bar=False)

    rough = ended(torch.float32)
    assert rough.history.rounding > 1e-7
    assert not re.search(r"\+\d\.\de-0[5-9]", str(rough.history)) and "rounding" in str(rough.history)
    assert not vfe.diagnose(rough).of("phase-raised")
    fine = ended(torch.float64)
    assert fine.history.rounding < 1e-10


def test_a_change_beyond_rounding_is_printed_as_it_is() -> None:
    rows = (Row(0, "E", 10.0, 10.0, 0.0), Row(1, "M", 10.0 + 2e-6, 10.0, 2e-6), Row(1, "E", 9.99, 9.99, 0.0))
    assert "+2.0e-06" in str(History(rows)) and "~0" not in str(History(rows))
    text = str(History(rows, rounding=1e-5))
    assert "+2.0e-06" not in text and "~0: up to 1e-05 nats are rounding" in text and "-0.0100" in text
    assert "~0" in History(rows, rounding=1e-5)._repr_html_()
