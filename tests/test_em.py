"""The loop of EM: what it reports, when it stops, what it refuses, and what it leaves behind when something fails."""

import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from em_oracles import path, poisson_mixture
from hypothesis import given, settings
from hypothesis import strategies as st
from programs.case import empty, noise, tensor
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import Tensor
from torch.distributions import constraints

import pyro_vfe as vfe
from pyro_vfe.errors import (
    DegenerateError,
    ImpossibleDataError,
    MissingGuideSiteError,
    NotFiniteError,
    PlateKeptError,
    StructureError,
    UnenumerableError,
    VFEError,
    VFEWarning,
)
from pyro_vfe.learning.phases import MPhase, Problem

COUNTS = tensor([2.0, 0.0, 1.0, 12.0, 8.0, 13.0, 5.0, 1.0])
START = {"weights": [0.3, 0.7], "rates": [1.0, 9.0]}


def mixture(counts: Tensor) -> None:
    weights = pyro.param("weights", tensor(START["weights"]), constraint=constraints.simplex)
    rates = pyro.param("rates", tensor(START["rates"]), constraint=constraints.positive)
    with pyro.plate("data", len(counts)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("u", dist.Poisson(rates[z]), obs=counts)


def loop(counts: Tensor) -> None:
    initial = pyro.param("initial", tensor([0.5, 0.5]), constraint=constraints.simplex)
    transition = pyro.param("transition", tensor([[0.8, 0.2], [0.3, 0.7]]), constraint=constraints.simplex)
    rates = pyro.param("rates", tensor(START["rates"]), constraint=constraints.positive)
    z = pyro.sample("z_0", dist.Categorical(initial))
    for t, count in enumerate(counts):
        if t:
            z = pyro.sample(f"z_{t}", dist.Categorical(transition[z]))
        pyro.sample(f"u_{t}", dist.Poisson(rates[z]), obs=count)


def quiet(em: "vfe.EM", *args: Any, **options: Any) -> "vfe.EMRun":
    """A run without a bar whose limit of iterations is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "EM stopped at max_iter", VFEWarning)
        return em.run(*args, progress_bar=False, **options)


def stored() -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


# What a run reports


def test_F_after_each_iteration_is_that_of_the_textbook() -> None:
    run = quiet(vfe.EM(mixture), COUNTS, max_iter=6, tol=0)
    start = {name: np.array(value) for name, value in START.items()}
    expected = path(poisson_mixture(COUNTS.numpy()), start, 6)
    np.testing.assert_allclose(run.history.of("E").free_energy, [point.free_energy for point in expected], rtol=1e-12)
    for name, value in expected[-1].parameters.items():
        np.testing.assert_allclose(run.params[name].numpy(), value, rtol=1e-10)


@pytest.mark.parametrize("model", [mixture, loop])
def test_history_has_the_start_and_two_phases_per_iteration(model: Callable[..., None]) -> None:
    run = quiet(vfe.EM(model), COUNTS, max_iter=3, tol=0)
    assert run.history.phase == ("start", "E", "M", "E", "M", "E", "M", "E")
    assert run.history.iteration.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert run.history.num_data == (len(COUNTS) if model is mixture else 1)


@pytest.mark.parametrize("model", [mixture, loop])
def test_an_M_phase_opens_a_gap_that_the_E_phase_closes(model: Callable[..., None]) -> None:
    run = quiet(vfe.EM(model), COUNTS, max_iter=1)
    middle = run.history.rows[2]
    assert middle.gap > 0
    assert run.history.d_surprise[3] == 0
    assert middle.surprise == pytest.approx(run.free_energy, rel=1e-14)


def test_the_gap_after_an_M_phase_is_the_divergence_of_the_old_posterior_from_the_new() -> None:
    quiet(vfe.EM(mixture), COUNTS, max_iter=0)
    old = vfe.posterior(mixture, COUNTS).marginal("z")
    run = quiet(vfe.EM(mixture), COUNTS, max_iter=1)
    new = vfe.posterior(mixture, COUNTS).marginal("z")
    divergence = (old * (old / new).log()).sum()
    assert run.history.rows[2].gap == pytest.approx(float(divergence), rel=1e-8)


def test_the_decomposition_is_that_of_the_exact_posterior() -> None:
    run = quiet(vfe.EM(mixture), COUNTS)
    terms, posterior = run.decomposition(), vfe.posterior(mixture, COUNTS)
    shares, weights = posterior.marginal("z"), run.params["weights"]
    assert terms.entropy == pytest.approx(float(posterior.entropy()), rel=1e-10)
    assert terms.surprise == pytest.approx(-float(posterior.log_evidence), rel=1e-12)
    assert terms.complexity == pytest.approx(float((shares * (shares / weights).log()).sum()), rel=1e-10)
    log_density = dist.Poisson(run.params["rates"]).log_prob(COUNTS[:, None])
    assert terms.accuracy == pytest.approx(float((shares * log_density).sum()), rel=1e-10)
    assert terms.gap == 0
    assert terms.free_energy == pytest.approx(run.free_energy, rel=1e-12)


@pytest.mark.parametrize("split", [lambda terms: terms.by("data"), lambda terms: terms.gap_by_site()])
def test_terms_of_the_exact_posterior_are_not_split(split: Callable[[vfe.Decomposition], Any]) -> None:
    terms = quiet(vfe.EM(mixture), COUNTS, max_iter=1).decomposition()
    with pytest.raises(PlateKeptError, match="guide that has no sites"):
        split(terms)


def test_the_decomposition_under_a_guide_is_the_one_that_FreeEnergy_gives() -> None:
    guide = vfe.AutoMeanField(loop)
    run = quiet(vfe.EM(loop, guide), COUNTS, max_iter=4)
    found, expected = run.decomposition(), vfe.FreeEnergy().decompose(loop, guide, COUNTS)
    assert found.gap == pytest.approx(float(expected.gap), abs=1e-12)
    assert found.free_energy == pytest.approx(run.free_energy, rel=1e-12)
    assert np.nanmax(run.history.d_free_energy) <= 1e-10
    assert any("Coordinate" in words for words in run.updates.values())


def test_a_run_says_how_each_parameter_was_updated_and_prints() -> None:
    run = quiet(vfe.EM(mixture, fixed=["weights"]), COUNTS)
    assert run.updates["weights"] == "held fixed"
    assert run.updates["rates"].startswith("closed form")
    for word in ("converged after", "weights", "held fixed", "surprise", f"N={len(COUNTS)}"):
        assert word in str(run)


def test_the_parameters_are_copies_and_the_store_holds_the_end() -> None:
    run = quiet(vfe.EM(mixture), COUNTS)
    torch.testing.assert_close(dict(run.params), stored(), rtol=0, atol=0)
    with torch.no_grad():
        pyro.get_param_store()._params["rates"].add_(1.0)
    assert not torch.equal(run.params["rates"], pyro.param("rates"))
    assert not run.params["rates"].requires_grad


@pytest.mark.parametrize("read", [lambda run: run.free_energy, lambda run: float(run.decomposition().accuracy)])
def test_a_run_can_be_pickled(read: Callable[[vfe.EMRun], float]) -> None:
    run = quiet(vfe.EM(mixture), COUNTS)
    assert read(pickle.loads(pickle.dumps(run))) == read(run)


def test_terms_and_posteriors_can_be_pickled() -> None:
    terms, posterior = vfe.FreeEnergy().decompose(mixture, empty, COUNTS), vfe.posterior(mixture, COUNTS)
    same_terms, same_posterior = pickle.loads(pickle.dumps((terms, posterior)))
    torch.testing.assert_close(same_terms.by("data").surprise, terms.by("data").surprise, rtol=0, atol=0)
    torch.testing.assert_close(same_posterior.marginal("z"), posterior.marginal("z"), rtol=0, atol=0)


# Monotone


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), states=st.integers(1, 4), number=st.integers(1, 12), is_loop=st.booleans())
def test_F_never_rises(seed: int, states: int, number: int, is_loop: bool) -> None:
    pyro.clear_param_store()
    numbers = torch.Generator().manual_seed(seed)
    counts = torch.poisson(torch.full((number,), 4.0), generator=numbers).double()
    pyro.param("weights", torch.rand(states, generator=numbers).softmax(-1), constraint=constraints.simplex)
    rows = torch.rand(states, states, generator=numbers).mul(3).softmax(-1)
    rates = 0.1 + 9 * torch.rand(states, generator=numbers)
    names = ("weights", "transition", "rates") if is_loop else ("weights", "rates")
    pyro.param("transition", rows, constraint=constraints.simplex)
    pyro.param("rates", rates, constraint=constraints.positive)

    def model(counts: Tensor) -> None:
        weights, transition, rates = (pyro.param(name) for name in ("weights", "transition", "rates"))
        if not is_loop:
            with pyro.plate("data", len(counts)):
                pyro.sample("u", dist.Poisson(rates[pyro.sample("z", dist.Categorical(weights))]), obs=counts)
            return
        z = None
        for t, count in enumerate(counts):
            z = pyro.sample(f"z_{t}", dist.Categorical(weights if z is None else transition[z]))
            pyro.sample(f"u_{t}", dist.Poisson(rates[z]), obs=count)

    run = quiet(vfe.EM(model, floor=1e-8), counts, max_iter=8)
    changes = run.history.d_free_energy[1:]
    assert changes.max() <= 1e-10 * max(1.0, abs(run.free_energy))
    np.testing.assert_allclose(changes, (run.history.d_surprise + run.history.d_gap)[1:], atol=1e-10)
    assert not run.notes or "raised F" not in " ".join(run.notes)
    assert set(names) <= set(run.params)


# When it stops


def test_convergence_is_a_decrease_of_F_per_datum_below_the_tolerance() -> None:
    run = quiet(vfe.EM(mixture), COUNTS, tol=1e-3)
    decreases = -np.diff(run.history.of("E").free_energy) / len(COUNTS)
    assert run.converged
    assert decreases[-1] <= 1e-3 < decreases[:-1].min()
    assert run.n_iter == len(decreases)


def test_the_limit_of_iterations_gives_a_warning_with_the_last_decrease() -> None:
    with pytest.warns(VFEWarning, match=r"max_iter=2 .* lowered F by .* nats per datum"):
        run = vfe.EM(mixture).run(COUNTS, max_iter=2, progress_bar=False)
    assert not run.converged
    assert run.n_iter == 2


def test_running_again_goes_on_from_the_end() -> None:
    whole = quiet(vfe.EM(mixture), COUNTS, max_iter=6, tol=0)
    pyro.clear_param_store()
    em = vfe.EM(mixture)
    quiet(em, COUNTS, max_iter=3, tol=0)
    assert quiet(em, COUNTS, max_iter=3, tol=0).free_energy == whole.free_energy


def test_without_iterations_only_Q_is_found() -> None:
    run = quiet(vfe.EM(mixture), COUNTS, max_iter=0)
    assert run.history.phase == ("start", "E")
    torch.testing.assert_close(run.params["rates"], tensor(START["rates"]))


def test_without_a_tolerance_it_stops_where_only_rounding_is_left() -> None:
    run = vfe.EM(mixture).run(COUNTS, tol=0, max_iter=2000, progress_bar=False)
    assert run.converged
    assert not run.notes


def test_in_single_precision_parameters_keep_their_closed_forms_to_the_end() -> None:
    counts = torch.tensor([2.0, 1.0, 3.0, 11.0, 9.0, 14.0, 0.0, 10.0, 2.0, 5.0, 12.0, 1.0])

    def model(counts: Tensor) -> None:
        weights = pyro.param("weights", torch.ones(2, dtype=counts.dtype) / 2, constraint=constraints.simplex)
        rates = pyro.param("rates", torch.tensor([2.0, 8.0], dtype=counts.dtype), constraint=constraints.positive)
        with pyro.plate("data", len(counts)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("u", dist.Poisson(rates[z]), obs=counts)

    precise = vfe.EM(model).run(counts, progress_bar=False)
    pyro.clear_param_store()
    run = vfe.EM(model).run(counts.float(), progress_bar=False)
    assert all("closed form:" in words and "no closed form" not in words for words in run.updates.values())
    assert run.free_energy == pytest.approx(precise.free_energy, abs=1e-4)


def test_in_single_precision_rounding_neither_goes_on_for_ever_nor_is_reported() -> None:
    torch.set_default_dtype(torch.float32)

    def model(counts: Tensor) -> None:
        weights = pyro.param("weights", torch.tensor([0.3, 0.7]), constraint=constraints.simplex)
        rates = pyro.param("rates", torch.tensor([900.0, 1100.0]), constraint=constraints.positive)
        with pyro.plate("data", len(counts)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("u", dist.Poisson(rates[z]), obs=counts)

    rates = torch.tensor([950.0, 1050.0]).repeat(100)
    counts = torch.poisson(rates, generator=torch.Generator().manual_seed(1))
    run = vfe.EM(model).run(counts, max_iter=1000, progress_bar=False)
    assert run.converged
    assert run.params["rates"].dtype == torch.float32
    assert not run.notes


def test_a_callback_sees_every_phase_and_stops_after_an_E_phase() -> None:
    seen: list[tuple[int, dict[str, Any]]] = []

    def watch(step: int, values: dict[str, Any]) -> bool:
        seen.append((step, values))
        return bool(values["iteration"] == 2)

    run = vfe.EM(mixture).run(COUNTS, tol=0, callback=watch, progress_bar=False)
    assert [step for step, _ in seen] == list(range(6))
    assert [values["phase"] for _, values in seen] == list(run.history.phase)
    assert [values["free_energy/total"] for _, values in seen] == run.history.free_energy.tolist()
    assert run.n_iter == 2
    assert not run.converged
    assert "stopped by the callback" in run.notes


def test_only_True_from_a_callback_stops() -> None:
    expected = vfe.EM(mixture).run(COUNTS, max_iter=30, tol=1e-4, progress_bar=False)
    pyro.clear_param_store()
    lists = lambda step, values: [None, None]  # noqa: E731
    run = vfe.EM(mixture).run(COUNTS, max_iter=30, tol=1e-4, progress_bar=False, callback=lists)
    assert run.converged and run.n_iter == expected.n_iter > 1


def test_the_progress_bar_shows_the_start_and_F(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VFEWarning)
        vfe.EM(mixture).run(COUNTS, n_init=2, max_iter=3)
    shown = capsys.readouterr().err
    assert "EM 2/2" in shown
    assert "F=" in shown and "surprise=" in shown and "gap=" in shown


# Phases by themselves


@pytest.mark.parametrize("guided", [False, True])
def test_a_loop_of_ones_own_takes_the_steps_of_run(guided: bool) -> None:
    def made() -> "vfe.EM":
        return vfe.EM(loop, vfe.AutoMeanField(loop) if guided else None)

    run = quiet(made(), COUNTS, max_iter=3, tol=0)
    pyro.clear_param_store()
    em, rows = made(), []
    for _ in range(3):
        rows += [em.e_phase(COUNTS), em.m_phase(COUNTS)]
    rows.append(em.e_phase(COUNTS))
    assert [row.phase for row in rows] == list(run.history.phase[1:])
    np.testing.assert_allclose([row.free_energy for row in rows], run.history.free_energy[1:], rtol=1e-13)
    np.testing.assert_allclose([row.surprise for row in rows], run.history.surprise[1:], rtol=1e-13)
    torch.testing.assert_close(stored(), dict(run.params), rtol=0, atol=1e-14)


def test_an_M_phase_without_an_E_phase_takes_Q_at_the_present_parameters() -> None:
    expected = quiet(vfe.EM(mixture), COUNTS, max_iter=1)
    pyro.clear_param_store()
    em = vfe.EM(mixture)
    result = em.m_phase(COUNTS)
    assert result.free_energy == pytest.approx(expected.history.rows[2].free_energy, rel=1e-14)
    assert result.updates["rates"].startswith("closed form")
    assert em.m_phase(COUNTS).free_energy == pytest.approx(result.free_energy, rel=1e-12)


def test_an_M_phase_after_a_run_does_not_take_Q_from_before_it() -> None:
    em = vfe.EM(mixture)
    em.e_phase(COUNTS)
    run = quiet(em, COUNTS)
    assert em.m_phase(COUNTS).free_energy <= run.free_energy + 1e-10


# Starts


def test_restarts_are_reported_and_the_best_is_kept() -> None:
    run = quiet(vfe.EM(mixture), COUNTS, n_init=3)
    assert [restart.start for restart in run.restarts] == [0, 1, 2]
    assert run.free_energy <= min(restart.free_energy for restart in run.restarts) + 1e-8 * len(COUNTS)
    assert vfe.posterior(mixture, COUNTS).log_evidence == pytest.approx(-run.free_energy, rel=1e-12)
    assert all(restart.converged for restart in run.restarts)


def test_restarts_are_the_same_for_the_same_seed_and_leave_the_random_stream_alone() -> None:
    ends = []
    for seed in (1, 1, 2):
        pyro.clear_param_store()
        state = torch.get_rng_state()
        run = quiet(vfe.EM(mixture), COUNTS, n_init=3, seed=seed, max_iter=2, tol=0)
        assert torch.equal(torch.get_rng_state(), state)
        ends.append([restart.free_energy for restart in run.restarts])
    assert ends[0] == ends[1] != ends[2]
    assert len(set(ends[0])) == 3


def clusters(points: Tensor) -> None:
    weights = pyro.param("weights", lambda: torch.ones(5) / 5, constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: torch.zeros(5))
    scale = pyro.param("scale", lambda: torch.ones(5), constraint=constraints.positive)
    with pyro.plate("data", len(points)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=points)


def test_ten_starts_find_five_clusters() -> None:
    centres = tensor([-6.0, -3.0, 0.0, 2.5, 7.0])
    points = (centres + 0.6 * noise(400, 5, seed=3)).flatten()
    found = quiet(vfe.EM(clusters), points, n_init=10, max_iter=100, tol=1e-6)
    pyro.clear_param_store()
    pyro.param("loc", centres)
    best = quiet(vfe.EM(clusters), points, tol=1e-8)
    assert found.free_energy == pytest.approx(best.free_energy, abs=0.1)


def test_a_start_that_fails_is_reported_and_passed_over() -> None:
    run = quiet(vfe.EM(mixture, m_phase=Fails(at=3)), COUNTS, n_init=3, max_iter=2, tol=0)
    assert [restart.error is None for restart in run.restarts] == [True, False, True]
    assert "no luck" in str(run)
    pyro.clear_param_store()
    with pytest.raises(DegenerateError, match="no luck"):
        quiet(vfe.EM(mixture, m_phase=Fails(at=1, to=99)), COUNTS, n_init=3)
    torch.testing.assert_close(pyro.param("rates").detach(), tensor(START["rates"]))


def test_a_chain_that_only_moves_right_still_does_after_a_random_start() -> None:
    allowed = tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])

    def model(counts: Tensor) -> None:
        rows = pyro.param("rows", allowed / allowed.sum(-1, keepdim=True), constraint=constraints.simplex)
        rates = pyro.param("rates", tensor([3.0, 4.0, 5.0]), constraint=constraints.positive)
        z = torch.tensor(0)
        for t, count in enumerate(counts):
            z = pyro.sample(f"z_{t}", dist.Categorical(rows[z]))
            pyro.sample(f"u_{t}", dist.Poisson(rates[z]), obs=count)

    run = quiet(vfe.EM(model, floor={"rates": 1e-6}), COUNTS, n_init=3, max_iter=20)
    assert bool((run.params["rows"][allowed == 0] < 1e-12).all())
    assert len({restart.free_energy for restart in run.restarts}) == 3


# What fails leaves nothing half done


class Fails(MPhase):
    """Closed forms, and an error in some calls after the parameters have been changed."""

    monotone = True

    def __init__(self, at: int, to: int | None = None, error: BaseException | None = None) -> None:
        self.calls = 0
        self.bad = range(at, (to or at) + 1)
        self.error = error or DegenerateError("no luck.", hint="Try again.")

    def update(self, problem: Problem) -> dict[str, str]:
        self.calls += 1
        words = dict(vfe.ClosedForm().update(problem))
        if self.calls in self.bad:
            raise self.error
        return words


@pytest.mark.parametrize("error", [DegenerateError("no luck.", hint=""), KeyboardInterrupt(), RuntimeError("mine")])
def test_an_M_phase_that_fails_is_taken_back(error: BaseException) -> None:
    before = quiet(vfe.EM(mixture), COUNTS, max_iter=2, tol=0).params
    pyro.clear_param_store()
    with pytest.raises(type(error)) as caught:
        quiet(vfe.EM(mixture, m_phase=Fails(at=3, error=error)), COUNTS, tol=0)
    assert caught.value is error
    assert not isinstance(error, VFEError) or "M-phase of iteration 3" in str(error)
    torch.testing.assert_close(stored(), dict(before), rtol=0, atol=0)


class Ruins(MPhase):
    """Makes the data impossible in its second call."""

    monotone = True
    calls = 0

    def update(self, problem: Problem) -> dict[str, str]:
        self.calls += 1
        words = dict(vfe.ClosedForm().update(problem))
        if self.calls == 2:
            with torch.no_grad():
                pyro.get_param_store()._params["rates"].fill_(-torch.inf)
        return words


def test_an_E_phase_that_fails_takes_the_M_phase_before_it_back() -> None:
    before = quiet(vfe.EM(mixture), COUNTS, max_iter=1).params
    pyro.clear_param_store()
    with pytest.raises((ImpossibleDataError, NotFiniteError), match="E-phase of iteration 2"):
        quiet(vfe.EM(mixture, m_phase=Ruins()), COUNTS)
    torch.testing.assert_close(stored(), dict(before), rtol=0, atol=0)


def test_an_interrupt_in_an_E_phase_keeps_the_M_phase_before_it() -> None:
    after_one = quiet(vfe.EM(mixture), COUNTS, max_iter=1).params
    pyro.clear_param_store()
    interrupted = False

    def model(counts: Tensor) -> None:
        mixture(counts)
        if interrupted:
            raise KeyboardInterrupt

    class ThenInterrupts(MPhase):
        monotone = True

        def update(self, problem: Problem) -> dict[str, str]:
            nonlocal interrupted
            words = dict(vfe.ClosedForm().update(problem))
            interrupted = True
            return words

    with pytest.raises(KeyboardInterrupt):
        quiet(vfe.EM(model, m_phase=ThenInterrupts()), COUNTS)
    torch.testing.assert_close(stored(), dict(after_one), rtol=0, atol=0)


def test_a_fixed_parameter_keeps_its_bits() -> None:
    pyro.param("weights", tensor([0.3, 0.7]), constraint=constraints.simplex)
    before = pyro.get_param_store()._params["weights"].detach().clone()
    quiet(vfe.EM(mixture, fixed="weights"), COUNTS, n_init=2)
    assert torch.equal(pyro.get_param_store()._params["weights"], before)


# Programs that are not what EM takes them for


class Creeps(MPhase):
    """Pretends never to raise F."""

    monotone = True

    def update(self, problem: Problem) -> dict[str, str]:
        with torch.no_grad():
            pyro.get_param_store()._params["rates"].add_(0.1)
        return dict.fromkeys(problem.names, "crept")


def test_a_phase_that_raises_F_is_reported_once() -> None:
    with pytest.warns(VFEWarning, match=r"The M-phase of iteration 1 raised F by") as caught:
        quiet(vfe.EM(mixture, m_phase=Creeps()), COUNTS, max_iter=5)
    (warning,) = (warning for warning in caught if "raised F" in str(warning.message))
    assert warning.filename == __file__
    pyro.clear_param_store()
    with pytest.warns(VFEWarning):
        assert any("raised F" in note for note in quiet(vfe.EM(mixture, m_phase=Creeps()), COUNTS, max_iter=5).notes)


def test_a_program_that_depends_on_its_calls_is_told_of() -> None:
    calls = 0

    def model(counts: Tensor) -> None:
        nonlocal calls
        calls += 1
        mixture(counts + calls)

    with (
        pytest.warns(VFEWarning, match="depends on how often it is called"),
        pytest.warns(VFEWarning, match="'calls' in the closure of model"),
    ):
        quiet(vfe.EM(model, check=False), COUNTS, max_iter=12, tol=0)


def continuous(counts: Tensor) -> None:
    scale = pyro.param("scale", tensor(1.0), constraint=constraints.positive)
    rate = pyro.sample("rate", dist.Gamma(2.0, scale))
    with pyro.plate("data", len(counts)):
        pyro.sample("u", dist.Poisson(rate), obs=counts)


def constant(counts: Tensor) -> None:
    with pyro.plate("data", len(counts)):
        z = pyro.sample("z", dist.Categorical(tensor([0.5, 0.5])))
        pyro.sample("u", dist.Poisson(tensor([1.0, 9.0])[z]), obs=counts)


def subsampled(counts: Tensor) -> None:
    rates = pyro.param("rates", tensor([1.0, 9.0]), constraint=constraints.positive)
    with pyro.plate("data", len(counts), subsample_size=3) as index:
        z = pyro.sample("z", dist.Categorical(tensor([0.5, 0.5])))
        pyro.sample("u", dist.Poisson(rates[z]), obs=counts[index])


REFUSED: dict[str, tuple[Callable[[], "vfe.EM"], type[VFEError], str]] = {
    "continuous latent": (lambda: vfe.EM(continuous), MissingGuideSiteError, r"'rate'.*AutoDelta.*SVI"),
    "guide that draws": (lambda: vfe.EM(continuous, AutoNormal(continuous)), UnenumerableError, r"random.*SVI"),
    "nothing to learn": (lambda: vfe.EM(constant), VFEError, r"no parameters to learn.*pyro.param"),
    "all fixed": (lambda: vfe.EM(mixture, fixed=["weights", "rates"]), VFEError, r"are fixed"),
    "unknown fixed": (lambda: vfe.EM(mixture, fixed=["rate"]), VFEError, r"fixed= names 'rate'.*'weights', 'rates'"),
    "unknown floor": (lambda: vfe.EM(mixture, floor={"rate": 1.0}), VFEError, r"floor= names 'rate'"),
    "negative floor": (lambda: vfe.EM(mixture, floor=-1.0), VFEError, r"floor -1\..*positive"),
    "floor of NaN": (lambda: vfe.EM(mixture, floor={"rates": float("nan")}), VFEError, r"floor nan for 'rates'"),
    "guide beside an exact posterior": (
        lambda: vfe.EM(mixture, vfe.AutoMeanField(mixture), e_phase=vfe.Hard()),
        StructureError,
        r"Hard makes Q of the model alone.*'z'.*Coordinate",
    ),
    "subsample": (lambda: vfe.EM(subsampled), StructureError, r"'data' shows 3 of its 8.*mini-batch"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_EM_cannot_serve_is_refused_with_the_way_out(name: str) -> None:
    made, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        made().run(COUNTS, progress_bar=False)


@pytest.mark.parametrize("options", [{"max_iter": -1}, {"tol": -1e-3}, {"tol": float("nan")}, {"n_init": 0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(VFEError, match=next(iter(options))):
        vfe.EM(mixture).run(COUNTS, **options)


def test_a_start_below_the_floor_is_raised_to_it_without_a_report() -> None:
    run = quiet(vfe.EM(mixture, floor={"rates": 8.0}), COUNTS)
    assert run.history.d_free_energy[2] > 0
    assert not any("raised F" in note for note in run.notes)
    torch.testing.assert_close(run.params["rates"].min(), tensor(8.0))


def test_a_single_m_phase_says_what_it_kept() -> None:
    pyro.param("weights", tensor([1.0, 0.0]), constraint=constraints.simplex)
    result = vfe.EM(mixture).m_phase(COUNTS)
    assert result.notes == ("Never visited, and left as before: 'rates'[1].",)


def test_a_model_without_latents_is_maximum_likelihood_in_one_M_phase() -> None:
    def model(counts: Tensor) -> None:
        rate = pyro.param("rate", tensor(3.0), constraint=constraints.positive)
        with pyro.plate("data", len(counts)):
            pyro.sample("u", dist.Poisson(rate), obs=counts)

    run = quiet(vfe.EM(model), COUNTS)
    assert run.n_iter == 2
    torch.testing.assert_close(run.params["rate"], COUNTS.mean())


def test_a_point_estimate_of_a_guide_is_learned() -> None:
    guide = AutoDelta(continuous)
    run = quiet(vfe.EM(continuous, guide, fixed=["scale"]), COUNTS)
    (rate,) = (value for name, value in run.params.items() if name != "scale")
    torch.testing.assert_close(rate, (1 + COUNTS.sum()) / (1 + len(COUNTS)))


def test_a_guide_without_sites_is_no_guide() -> None:
    found = quiet(vfe.EM(mixture, empty), COUNTS)
    pyro.clear_param_store()
    assert found.free_energy == quiet(vfe.EM(mixture), COUNTS).free_energy


def test_single_precision_comes_to_the_optimum_by_a_search_too() -> None:
    """A first step that single precision does not resolve would end the search short of the optimum."""

    def model(counts: Tensor) -> None:
        weights = pyro.param("weights", torch.ones(2).to(counts) / 2, constraint=constraints.simplex)
        rates = pyro.param("rates", torch.tensor([2.0, 8.0]).to(counts), constraint=constraints.positive)
        with pyro.plate("data", len(counts)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("u", dist.Poisson(rates[z]), obs=counts)

    counts = torch.tensor([2.0, 1.0, 3.0, 11.0, 9.0, 14.0, 0.0, 10.0, 2.0, 5.0, 12.0, 1.0])
    ends = {}
    for dtype in (torch.float64, torch.float32):
        for phase in (vfe.ClosedForm(), vfe.Numerical()):
            pyro.clear_param_store()
            run = vfe.EM(model, m_phase=phase).run(counts.to(dtype), progress_bar=False)
            ends[dtype, type(phase)] = run.free_energy
    assert max(ends.values()) - min(ends.values()) < 1e-4


def test_a_start_of_equal_components_is_noted_and_random_starts_leave_it() -> None:
    def model(counts: Tensor) -> None:
        weights = pyro.param("weights", torch.ones(2) / 2, constraint=constraints.simplex)
        rates = pyro.param("rates", torch.tensor([5.0, 5.0]), constraint=constraints.positive)
        with pyro.plate("data", len(counts)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("u", dist.Poisson(rates[z]), obs=counts)

    stuck = vfe.EM(model).run(COUNTS, progress_bar=False)
    assert any("under every value of 'z'" in note for note in stuck.notes)
    pyro.clear_param_store()
    free = vfe.EM(model).run(COUNTS, n_init=3, progress_bar=False)
    assert free.free_energy < stuck.free_energy - 1 and not free.notes
    ends = [restart.free_energy for restart in free.restarts[1:]]
    assert max(ends) - min(ends) < 1e-6


def test_components_that_forbid_each_others_data_are_not_called_alike() -> None:
    def model(symbols: Tensor) -> None:
        weights = pyro.param("weights", tensor([0.5, 0.5]), constraint=constraints.simplex)
        with pyro.plate("data", len(symbols)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("u", dist.Categorical(torch.eye(2)[z]), obs=symbols)

    run = vfe.EM(model).run(torch.tensor([0, 0, 0, 1]), progress_bar=False)
    torch.testing.assert_close(run.params["weights"], tensor([0.75, 0.25]))
    assert not run.notes


def test_random_starts_on_equal_data_differ() -> None:
    """Two components may be drawn the same element's data: the random part of their weights still sets them apart."""
    patterns = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]).repeat(1, 2)
    data = patterns.repeat_interleave(torch.tensor([40, 3, 4, 30]), 0)

    def model(u: Tensor) -> None:
        weights = pyro.param("weights", torch.ones(2) / 2, constraint=constraints.simplex)
        probs = pyro.param("probs", torch.full((2, 4), 0.5), constraint=constraints.unit_interval)
        with pyro.plate("data", len(u)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("u", dist.Bernoulli(probs[z]).to_event(1), obs=u)

    run = vfe.EM(model).run(data, n_init=8, progress_bar=False)
    saddle, *ends = (restart.free_energy for restart in run.restarts)
    assert max(ends) < saddle - 10


def test_of_ends_that_tie_the_first_is_kept() -> None:
    run = vfe.EM(mixture).run(COUNTS, n_init=4, progress_bar=False)
    best = min(restart.free_energy for restart in run.restarts)
    first = next(restart for restart in run.restarts if restart.free_energy <= best + 1e-8 * len(COUNTS))
    assert run.n_iter == first.n_iter


def test_a_single_E_phase_needs_nothing_to_learn() -> None:
    em = vfe.EM(mixture, fixed=["weights", "rates"])
    assert em.e_phase(COUNTS).gap == pytest.approx(0.0)
    with pytest.raises(VFEError, match="are fixed"):
        em.m_phase(COUNTS)


def test_data_that_are_no_numbers_are_refused_by_name() -> None:
    with pytest.raises(StructureError, match=r"Site 'u' observes a ndarray that holds objects.*np\.asarray"):
        vfe.EM(mixture).run(COUNTS.numpy().astype(object), progress_bar=False)
