"""EM on batches against EM by hand with all data, and against incremental and online EM by hand."""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import em_oracles as by_hand
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from em_oracles import Array, Step, Values
from programs import em
from programs.case import categorical, empty, tensor
from programs.em_cases import CASES, Case
from pyro.infer.autoguide import AutoDelta
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import pyro_vfe as vfe
from pyro_vfe.errors import DegenerateError, StructureError, VFEError, VFEWarning
from pyro_vfe.learning import batch_loop
from pyro_vfe.learning.minibatch import Memory
from pyro_vfe.learning.pools import Pools
from pyro_vfe.learning.site_pools import data_pools

close = np.testing.assert_allclose
parametrize = pytest.mark.parametrize

START: Values = {"weights": np.array([0.3, 0.3, 0.4]), "rates": np.array([4.0, 10.0, 25.0])}
TRUTH = {"weights": np.array([0.5, 0.3, 0.2]), "rates": np.array([2.0, 12.0, 40.0])}
GAMMA, CONCENTRATION = (3.0, 0.2), 4.0


def counts_of(size: int, seed: int = 0) -> Array:
    """Draws from a mixture of Poissons."""
    rng = np.random.default_rng(seed)
    return rng.poisson(TRUTH["rates"][rng.choice(3, size, p=TRUTH["weights"])]).astype(float)


COUNTS = counts_of(230)
BATCHES = tensor(COUNTS).split(50)
MIXTURE = em.poisson_mixture(START)


def subsampled(counts: Tensor, indices: Tensor) -> None:
    """The mixture of Poissons, of which a batch shows some data."""
    weights, rates = em.learned("weights", START), em.learned("rates", START)
    with pyro.plate("data", len(counts), subsample=indices):
        z = categorical("z", weights)
        pyro.sample("u", dist.Poisson(rates[z]), obs=counts[indices])


def with_priors(counts: Tensor, indices: Tensor | None = None) -> None:
    """Gamma and Dirichlet priors; a subsample where indices are given."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((3,), CONCENTRATION)))
    rates = pyro.sample("rates", dist.Gamma(*GAMMA).expand([3]).to_event(1))
    shown = counts if indices is None else counts[indices]
    with pyro.plate("data", len(counts), subsample=indices, subsample_size=len(shown)):
        z = categorical("z", weights)
        pyro.sample("u", dist.Poisson(rates[z]), obs=shown)


INDEXED = [(tensor(COUNTS), indices) for indices in torch.arange(len(COUNTS)).split(50)]
WITH_PRIORS: Step = by_hand.poisson_mixture(COUNTS, GAMMA, CONCENTRATION)


def parameters() -> Values:
    """What Pyro's store holds, without the prefixes of guides."""
    store = pyro.get_param_store()
    return {name.split(".")[-1]: value.detach().numpy().copy() for name, value in store.items()}


def learner(case: Case, **options: Any) -> "vfe.EM":
    """EM for a case; a program without sites stands for no guide."""
    guide = case.guide()
    return vfe.EM(case.model, None if guide is empty else guide, **options)


def run_batches(learner: "vfe.EM", batches: Iterable[Any], num_epochs: int, **options: Any) -> "vfe.BatchRun":
    """A run of so many epochs, which is not to converge."""
    with pytest.warns(VFEWarning, match="before it had converged"):
        return learner.run_batches(batches, num_epochs=num_epochs, tol=0.0, progress_bar=False, **options)


def settled(learner: "vfe.EM", batches: Sequence[Any], **options: Any) -> "vfe.BatchRun":
    """Runs until the parameters stand still, which F, flat at its minimum, shows too early."""
    for _ in range(100):
        before = parameters()
        run = learner.run_batches(batches, num_epochs=1000, tol=1e-12, progress_bar=False, **options)
        after = parameters()
        if before and all(np.abs(after[name] - before[name]).max() < 1e-11 for name in after):
            return run
    raise AssertionError("the parameters do not stand still")


def fixed_point(step: Step, start: Values, iterations: int = 3000) -> Values:
    """Where EM by hand, with all data, stands still."""
    for _ in range(iterations):
        start = step(start)[1]
    return start


def assert_same(found: Values, expected: Values, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        close(found[name], value, rtol=tolerance, atol=tolerance, err_msg=name)


# Incremental EM


@parametrize("name", ["poisson_mixture", "diagonal_mixture", "full_mixture", "poisson_chain", "mixture_with_priors"])
def test_one_batch_is_em_with_all_data(name: str) -> None:
    case = MIXTURE_WITH_PRIORS if name == "mixture_with_priors" else CASES[name]
    run = run_batches(learner(case), [case.args], 4)
    point = by_hand.path(case.step, case.start, 4)
    assert_same(case.read(parameters()), point[-1].parameters, 1e-9)
    assert run.n_iter == 4 and run.num_batches == 1
    close(run.history.free_energy, [where.free_energy for where in point], rtol=1e-10)
    assert run.history.phase == ("epoch",) * 4 + ("final",)


MIXTURE_WITH_PRIORS = Case(
    with_priors,
    (tensor(COUNTS),),
    WITH_PRIORS,
    START,
    guide=lambda: em.point_guide(with_priors, START),
)


def loop_over_sequences(sequences: Tensor) -> None:
    """Hidden Markov models written as a Python loop, side by side."""
    start = SEQUENCES_START
    probs, transition, rates = (em.learned(name, start) for name in ("initial", "transition", "rates"))
    with pyro.plate("sequences", len(sequences)):
        for t in range(sequences.shape[1]):
            z = categorical(f"z_{t}", probs)
            pyro.sample(f"u_{t}", dist.Poisson(rates[z]), obs=sequences[:, t])
            probs = transition[z]


SEQUENCES_START = {
    "initial": np.array([0.6, 0.4]),
    "transition": np.array([[0.7, 0.3], [0.3, 0.7]]),
    "rates": np.array([3.0, 15.0]),
}


def drawn_sequences(number: int = 12, steps: int = 8) -> Array:
    """Sequences of two states that last."""
    rng = np.random.default_rng(3)
    z = (rng.random((number, 1)) < 0.5) ^ (np.cumsum(rng.random((number, steps)) < 0.25, 1) % 2 == 1)
    return rng.poisson(np.where(z, 20.0, 2.0)).astype(float)


SEQUENCES = drawn_sequences()
BAUM_WELCH = by_hand.baum_welch(by_hand.poisson_emission(SEQUENCES))
POINTS = np.concatenate(
    [np.random.default_rng(1).normal(0, 1, (60, 2)), np.random.default_rng(2).normal(4, 2, (45, 2))]
)
GAUSSIANS = {"weights": np.array([0.5, 0.5]), "loc": np.array([[0.5, 0.0], [3.0, 3.0]]), "scale": np.ones((2, 2))}
FULL = {"weights": GAUSSIANS["weights"], "loc": GAUSSIANS["loc"], "covariance": np.stack([np.eye(2)] * 2)}

FIXED_POINTS = {
    "poisson_mixture": (MIXTURE, BATCHES, by_hand.poisson_mixture(COUNTS), START),
    "subsampled_poisson_mixture": (subsampled, INDEXED, by_hand.poisson_mixture(COUNTS), START),
    "chain": (
        em.hidden_markov(SEQUENCES_START, "poisson"),
        tensor(SEQUENCES).split(5),
        BAUM_WELCH,
        SEQUENCES_START,
    ),
    "loop": (loop_over_sequences, tensor(SEQUENCES).split(5), BAUM_WELCH, SEQUENCES_START),
}


@parametrize("name", FIXED_POINTS)
def test_incremental_em_ends_where_em_with_all_data_does(name: str) -> None:
    model, batches, step, start = FIXED_POINTS[name]
    run = settled(vfe.EM(model), batches)
    expected = fixed_point(step, start)
    assert_same(parameters(), expected, 1e-8)
    close(run.free_energy, step(expected)[0], rtol=1e-11)
    assert run.converged and run.num_batches == len(batches)


SHUFFLED_POINTS = tensor(np.random.default_rng(4).permutation(POINTS)).split(20)


def test_incremental_em_of_a_diagonal_mixture_ends_where_em_with_all_data_does() -> None:
    settled(vfe.EM(em.diagonal_mixture(GAUSSIANS)), SHUFFLED_POINTS)
    assert_same(parameters(), fixed_point(by_hand.diagonal_mixture(POINTS), GAUSSIANS, 1000), 1e-8)


def test_incremental_em_of_a_full_mixture_ends_where_scikit_learn_stands_still() -> None:
    settled(vfe.EM(em.full_mixture(FULL)), SHUFFLED_POINTS)
    _, following = by_hand.scikit_learn_mixture(POINTS, "full")(parameters())
    assert_same(following, parameters(), 1e-8)


@parametrize("size", [1, 2, 4])
def test_batches_too_small_for_a_covariance_do_for_all_of_them(size: int) -> None:
    batches = tensor(POINTS).split(size)
    run_batches(vfe.EM(em.full_mixture(FULL)), batches, 1)
    assert_same(parameters(), by_hand.scikit_learn_mixture(POINTS, "full")(FULL)[1], 1e-8)


def incremental_free_energy(visited: Sequence[Values], now: Values) -> float:
    """sum_b E_{Q_b} [log Q_b - log P], where Q_b is the posterior at the parameters of its last visit."""
    total = 0.0
    for batch, then in zip(BATCHES, visited, strict=True):
        share, log_joint = (posterior_and_log_joint(batch.numpy(), values)[i] for i, values in ((0, then), (1, now)))
        total += float((share * (np.log(np.maximum(share, 1e-300)) - log_joint)).sum())
    return total


def posterior_and_log_joint(counts: Array, values: Values) -> tuple[Array, Array]:
    log_joint = np.log(values["weights"]) + counts[:, None] * np.log(values["rates"]) - values["rates"]
    log_joint = log_joint - by_hand.log_factorial(counts)[:, None]
    share = np.exp(log_joint - by_hand.log_sum_exp(log_joint, -1)[:, None])
    return share, log_joint


def test_the_incremental_free_energy_never_rises() -> None:
    visited: list[Values] = [START] * len(BATCHES)
    path, position, now = [incremental_free_energy(visited, START)], 0, START

    def follow(count: int, row: dict[str, Any]) -> None:
        nonlocal position, now
        learned = parameters()
        if row["phase"] == "batch" and row["iteration"] > 1:
            visited[position % len(BATCHES)] = now
            path.append(incremental_free_energy(visited, now))
            position += 1
        now = learned
        path.append(incremental_free_energy(visited, now))

    run_batches(vfe.EM(MIXTURE), BATCHES, 6, callback=follow)
    assert position == 5 * len(BATCHES)
    assert max(np.diff(path)) < 1e-10 * abs(path[0])
    assert path[-1] < path[0] - 100
    assert path[-1] < fixed_point_free_energy() + 0.01


def fixed_point_free_energy() -> float:
    step = by_hand.poisson_mixture(COUNTS)
    return step(fixed_point(step, START))[0]


def test_equal_batches_count_as_often_as_they_are_there() -> None:
    batches = [BATCHES[0], BATCHES[1], BATCHES[0]]
    settled(vfe.EM(MIXTURE), batches)
    assert_same(parameters(), fixed_point(by_hand.poisson_mixture(torch.cat(batches).numpy()), START), 1e-8)


def test_batches_may_come_in_any_order() -> None:
    shuffled = DataLoader(list(BATCHES), batch_size=None, shuffle=True)
    settled(vfe.EM(MIXTURE), shuffled)
    assert_same(parameters(), fixed_point(by_hand.poisson_mixture(COUNTS), START), 1e-8)


@parametrize("priors", [False, True], ids=["without_priors", "with_priors"])
def test_whole_plates_and_subsamples_take_the_same_path(priors: bool) -> None:
    paths = []
    for batches, model in (
        (BATCHES, with_priors if priors else MIXTURE),
        (INDEXED, with_priors if priors else subsampled),
    ):
        pyro.clear_param_store()
        learner = vfe.EM(model, em.point_guide(with_priors, START) if priors else None)
        run = run_batches(learner, batches, 3)
        paths.append((parameters(), run.history.free_energy))
    assert_same(paths[0][0], paths[1][0], 1e-11)
    close(paths[0][1], paths[1][1], rtol=1e-12)


# Online EM


def online_by_hand(batches: Iterable[Array], alpha: float, delay: int) -> Iterator[Values]:
    """Cappe and Moulines: the mean statistics move to those of each batch by (t + 2)^-alpha, the first begins."""
    values, s0, s1 = START, np.zeros(3), np.zeros(3)
    for t, counts in enumerate(batches, -1):
        step = (t + 2.0) ** -alpha
        share, _ = posterior_and_log_joint(counts, values)
        s0 = (1 - step) * s0 + step * share.mean(0)
        s1 = (1 - step) * s1 + step * (share * counts[:, None]).mean(0)
        if t + 1 >= delay:
            values = {"weights": s0 / s0.sum(), "rates": s1 / s0}
        yield values


@parametrize("model", [MIXTURE, subsampled], ids=["whole_plate", "subsample"])
@parametrize(("alpha", "delay"), [(0.7, 1), (0.6, 3), (1.0, 0)])
def test_online_em_is_that_of_cappe_and_moulines_step_by_step(model: em.Model, alpha: float, delay: int) -> None:
    batches = BATCHES if model is MIXTURE else INDEXED
    found: list[Values] = []

    def follow(count: int, row: dict[str, Any]) -> None:
        if row["phase"] == "batch":
            found.append(parameters())

    run = vfe.EM(model).run_batches(
        batches, method=vfe.Online(alpha, delay), num_epochs=3, tol=0.0, progress_bar=False, callback=follow
    )
    expected = list(online_by_hand([batch.numpy() for batch in BATCHES * 3], alpha, delay))
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other, 1e-10)
    assert not run.converged and run.n_iter == 3


def test_online_em_of_many_data_comes_to_the_truth() -> None:
    loader = DataLoader(TensorDataset(tensor(counts_of(20_000))), batch_size=200, shuffle=True)
    vfe.EM(MIXTURE).run_batches(loader, method=vfe.Online(), num_epochs=1, progress_bar=False)
    close(parameters()["weights"], TRUTH["weights"], atol=0.02)
    close(parameters()["rates"], TRUTH["rates"], rtol=0.02)


# Priors


PRIOR_BATCHES: dict[str, Sequence[Any]] = {"whole_plate": BATCHES, "subsample": INDEXED}


@parametrize("kind", PRIOR_BATCHES)
def test_priors_count_once_in_incremental_em(kind: str) -> None:
    learner = vfe.EM(with_priors, em.point_guide(with_priors, START))
    run = settled(learner, PRIOR_BATCHES[kind])
    expected = fixed_point(WITH_PRIORS, START)
    assert_same(parameters(), expected, 1e-8)
    close(run.free_energy, WITH_PRIORS(expected)[0], rtol=1e-11)
    guide = em.point_guide(with_priors, expected)
    pyro.clear_param_store()
    close(run.free_energy, vfe.FreeEnergy().loss(with_priors, guide, tensor(COUNTS)), rtol=1e-10)


@parametrize("kind", PRIOR_BATCHES)
def test_priors_count_once_in_online_em(kind: str) -> None:
    learner = vfe.EM(with_priors, em.point_guide(with_priors, START))
    batches = PRIOR_BATCHES[kind]
    num_data = len(COUNTS) if kind == "whole_plate" else None
    online = vfe.Online(alpha=1.0, delay=len(batches) - 1)
    even = [batch[:30] if isinstance(batch, Tensor) else (batch[0], batch[1][:30]) for batch in batches]
    with pytest.warns(VFEWarning, match=r"have 150 elements of the data plate, not the 230"):
        learner.run_batches(even, method=online, num_epochs=1, num_data=num_data, progress_bar=False)
    shown = np.concatenate([batch[:30].numpy() for batch in BATCHES])
    share, _ = posterior_and_log_joint(shown, START)
    count, total = (230 / 150 * values for values in (share.sum(0), (share * shown[:, None]).sum(0)))
    expected = {
        "weights": by_hand.normalised(count, CONCENTRATION),
        "rates": (total + GAMMA[0] - 1) / (count + GAMMA[1]),
    }
    assert_same(parameters(), expected, 1e-10)


@parametrize("name", ["dirichlet_of_a_chain", "normal_inverse_gamma_of_a_chain"])
def test_priors_of_chains_count_once(name: str) -> None:
    case = CASES[name]
    batches = list(zip(*(argument.split(2) for argument in case.args), strict=True))
    run_batches(learner(case), batches, 1)
    assert_same(case.read(parameters()), case.step(case.start)[1], 1e-8)


# Every model in batches


@parametrize(
    "name", ["latent_classes_with_gaps", "diagonal_mixture_with_gaps", "poisson_chains_of_lengths", "variances"]
)
def test_the_first_epoch_is_an_iteration_with_all_data(name: str) -> None:
    case = CASES[name]
    size = len(case.args[0])
    batches = [
        tuple(argument[rows] if argument.dim() else argument for argument in case.args)
        for rows in torch.arange(size).split(max(2, size // 3))
    ]
    run = run_batches(learner(case), batches, 1)
    point = by_hand.path(case.step, case.start, 1)
    assert_same(case.read(parameters()), point[1].parameters, 1e-8)
    close(run.history.free_energy, [where.free_energy for where in point], rtol=1e-10)


# E-phases


def test_hard_em_on_one_batch_is_hard_em() -> None:
    run_batches(vfe.EM(MIXTURE, e_phase=vfe.Hard()), [BATCHES[0]], 2)
    found = parameters()
    pyro.clear_param_store()
    with pytest.warns(UserWarning, match="converge"):
        vfe.EM(MIXTURE, e_phase=vfe.Hard()).run(BATCHES[0], max_iter=2, tol=0.0, progress_bar=False)
    assert_same(found, parameters(), 1e-12)


def test_monte_carlo_em_on_one_batch_is_monte_carlo_em() -> None:
    def sampled() -> "vfe.EM":
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        return vfe.EM(MIXTURE, e_phase=vfe.MonteCarlo(5))

    run_batches(sampled(), [BATCHES[0]], 3)
    found = parameters()
    with pytest.warns(UserWarning, match="converge"):
        sampled().run(BATCHES[0], max_iter=3, tol=0.0, progress_bar=False)
    assert_same(found, parameters(), 1e-12)


def test_mean_field_factors_of_subsamples_are_kept_from_visit_to_visit() -> None:
    guide = vfe.AutoMeanField(
        subsampled, create_plates=lambda counts, indices: pyro.plate("data", len(counts), subsample=indices)
    )
    settled(vfe.EM(subsampled, guide), INDEXED)
    found = parameters()
    close(np.exp(found.pop("z")), posterior_and_log_joint(COUNTS, found)[0], atol=1e-9)
    assert_same(found, fixed_point(by_hand.poisson_mixture(COUNTS), START), 1e-8)


def test_a_guide_for_any_datum_is_learned_on_batches() -> None:
    def guide(counts: Tensor) -> None:
        slope, offset = pyro.param("slope", torch.zeros(3)), pyro.param("offset", torch.zeros(3))
        with pyro.plate("data", len(counts)):
            pyro.sample("z", dist.Categorical(logits=offset + slope * counts[:, None].log1p()))

    gradient = vfe.Gradient(pyro.optim.Adam({"lr": 0.1}), 5)
    run = run_batches(vfe.EM(MIXTURE, guide, e_phase=gradient), BATCHES, 20)
    loss = vfe.FreeEnergy().loss(MIXTURE, guide, tensor(COUNTS))
    close(run.free_energy, loss, rtol=1e-10)
    assert 0 < run.history.gap[-1] < 0.5 * run.history.gap[0]
    assert fixed_point_free_energy() < run.free_energy < run.history.free_energy[0]
    assert run.updates["slope"] == "E-phase: Gradient"


# What a run says


def test_batches_are_arguments_by_order_or_by_name() -> None:
    by_name = [{"counts": counts} for counts in BATCHES]
    run_batches(vfe.EM(MIXTURE), by_name, 2)
    found = parameters()
    for batches in ([(counts,) for counts in BATCHES], [[counts] for counts in BATCHES], BATCHES):
        pyro.clear_param_store()
        run_batches(vfe.EM(MIXTURE), batches, 2)
        assert_same(parameters(), found, 0.0)


def test_the_result_prints_and_has_the_parameters() -> None:
    run = vfe.EM(MIXTURE, fixed="weights").run_batches(BATCHES, progress_bar=False)
    text = str(run)
    assert f"EM on 5 batches: converged after {run.n_iter} epochs, F = {run.free_energy:,.4f} nats" in text
    assert "N=230" in text and "held fixed" in text
    assert run.updates == {"weights": "held fixed", "rates": "closed form: expected counts over exposure"}
    assert_same({name: value.numpy() for name, value in run.params.items()}, parameters(), 0.0)
    close(run.params["weights"], START["weights"], rtol=1e-12)


def test_a_state_that_is_never_visited_keeps_its_rows() -> None:
    start = {**SEQUENCES_START, "initial": np.array([1.0, 0.0]), "transition": np.eye(2)}
    run = run_batches(vfe.EM(em.hidden_markov(start, "poisson")), tensor(SEQUENCES).split(5), 3)
    close(run.params["rates"], [SEQUENCES.mean(), 15.0], rtol=1e-10)
    close(run.params["transition"], np.eye(2), atol=1e-12)
    assert any("'rates'[1]" in note and "Never visited" in note for note in run.notes)


def test_a_stream_is_read_once_by_online_em() -> None:
    run = vfe.EM(MIXTURE).run_batches(
        (batch for batch in BATCHES), method=vfe.Online(), num_epochs=1, progress_bar=False
    )
    expected = list(online_by_hand([batch.numpy() for batch in BATCHES], 0.7, 1))
    assert_same(parameters(), expected[-1], 1e-10)
    assert run.history.phase == ("epoch",) and "can be read only once" in run.notes[0]
    at_visit = [START, START, *expected[1:-1]]
    visits = [by_hand.poisson_mixture(b.numpy())(v)[0] for b, v in zip(BATCHES, at_visit, strict=True)]
    close(run.free_energy, sum(visits), rtol=1e-10)


def test_the_callback_ends_the_run_after_a_batch() -> None:
    seen = []

    def stop(count: int, row: dict[str, Any]) -> bool:
        seen.append((row["phase"], row["iteration"]))
        return len(seen) == 8

    run = vfe.EM(MIXTURE).run_batches(BATCHES, progress_bar=False, callback=stop)
    assert seen[:8] == [("batch", 1)] * 5 + [("epoch", 1)] + [("batch", 2)] * 2
    assert not run.converged and any("stopped by the callback in epoch 2" in note for note in run.notes)
    close(run.free_energy, by_hand.poisson_mixture(COUNTS)(parameters())[0], rtol=1e-10)


def test_a_delay_longer_than_the_data_is_told_of() -> None:
    with pytest.warns(VFEWarning, match="no M-phase"):
        run = vfe.EM(MIXTURE).run_batches(BATCHES, method=vfe.Online(delay=5), num_epochs=1, progress_bar=False)
    assert run.updates == {"weights": "not updated", "rates": "not updated"}
    assert_same(parameters(), START, 1e-12)


# Memory


class Remembered(vfe.Incremental):
    """Incremental EM whose statistics can be looked at after the run."""

    def memory(self) -> Memory:
        """Statistics, kept in a list."""
        self.kept.append(super().memory())
        return self.kept[-1]

    kept: ClassVar[list[Memory]] = []


def bytes_reached(root: object) -> int:
    """The size of the storages of all tensors that an object holds, at any depth."""
    found: dict[int, int] = {}
    waiting, seen = [root], set()
    while waiting:
        held = waiting.pop()
        if id(held) in seen or isinstance(held, (type, type(gc), type(bytes_reached))):
            continue
        seen.add(id(held))
        if isinstance(held, Tensor):
            found[held.untyped_storage().data_ptr()] = held.untyped_storage().nbytes()
        waiting += gc.get_referents(held)
    return sum(found.values())


@parametrize("model", ["poisson", "diagonal"])
def test_what_is_kept_does_not_grow_with_the_data(model: str) -> None:
    sizes = []
    for size in (400, 4000):
        pyro.clear_param_store()
        data = tensor(counts_of(size))
        program = MIXTURE
        if model == "diagonal":
            program, data = em.diagonal_mixture(GAUSSIANS), data[:, None].expand(-1, 2)
        run = run_batches(vfe.EM(program), data.split(size // 4), 2, method=Remembered())
        sizes.append(bytes_reached(Remembered.kept.pop()) + bytes_reached(run))
    assert sizes[0] == sizes[1] < 10_000


@parametrize("method", [vfe.Incremental(), vfe.Online()], ids=["incremental", "online"])
def test_no_batch_outlives_the_next(method: Any) -> None:
    def alive(number: int) -> int:
        pyro.clear_param_store()
        most = 0

        class Loader:
            def __iter__(self) -> Iterator[Tensor]:
                return (tensor(counts_of(1000, seed)) for seed in range(number))

        def measure(count: int, row: dict[str, Any]) -> None:
            nonlocal most
            if row["phase"] == "batch":
                return
            gc.collect()
            held = [thing for thing in gc.get_objects() if type(thing) is Tensor and thing.dim()]
            most = max(most, sum(len(tensor) >= 1000 for tensor in held))

        gc.collect()
        gc.freeze()  # what other tests left is not looked through at every batch
        try:
            with pytest.warns(VFEWarning, match="converged") if method.monotone else nullcontext():
                vfe.EM(MIXTURE).run_batches(
                    Loader(), method=method, num_epochs=2, tol=0.0, progress_bar=False, callback=measure
                )
        finally:
            gc.unfreeze()
        return most

    assert alive(2) == alive(8)


# Refusals


def refused(model: em.Model, match: str, batches: Any = BATCHES, guide: Any = None, **options: Any) -> None:
    """A run on batches raises an error, and leaves the parameters as they were."""
    of_em = {name: options.pop(name) for name in ("e_phase", "m_phase") if name in options}
    learner = vfe.EM(model, guide, **of_em)
    with pytest.raises(VFEError, match=match):
        learner.run_batches(batches, progress_bar=False, **options)
    for name, value in parameters().items():
        if name in START:
            close(value, START[name], rtol=1e-12)


def with_global_latent(counts: Tensor) -> None:
    kind = categorical("kind", tensor([0.5, 0.5]))
    with pyro.plate("data", len(counts)):
        z = categorical("z", em.learned("weights", START))
        pyro.sample("u", dist.Poisson(em.learned("rates", START)[z] * (1 + kind)), obs=counts)


def with_summary(counts: Tensor) -> None:
    MIXTURE(counts)
    pyro.sample("total", dist.Poisson(em.learned("rates", START).sum()), obs=counts.sum())


def with_network(counts: Tensor) -> None:
    slope = pyro.param("slope", tensor([0.1, 0.2, 0.3]))
    with pyro.plate("data", len(counts)):
        z = categorical("z", em.learned("weights", START))
        pyro.sample("u", dist.Poisson(slope[z].exp() * 5), obs=counts)


def without_plate(counts: Tensor) -> None:
    for i, count in enumerate(counts[:3]):
        z = categorical(f"z_{i}", em.learned("weights", START))
        pyro.sample(f"u_{i}", dist.Poisson(em.learned("rates", START)[z]), obs=count)


def drawing_a_subsample(counts: Tensor) -> None:
    weights, rates = em.learned("weights", START), em.learned("rates", START)
    with pyro.plate("data", len(counts), subsample_size=10) as indices:
        z = categorical("z", weights)
        pyro.sample("u", dist.Poisson(rates[z]), obs=counts[indices])


def with_a_point_for_each_datum(counts: Tensor) -> None:
    with pyro.plate("data", len(counts)):
        z = categorical("z", em.learned("weights", START))
        exposure = pyro.sample("exposure", dist.Gamma(2.0, 2.0))
        pyro.sample("u", dist.Poisson(em.learned("rates", START)[z] * exposure), obs=counts)


def subsampled_inside(counts: Tensor, indices: Tensor) -> None:
    with pyro.plate("data", len(counts), dim=-2):
        z = categorical("z", em.learned("weights", START))
        with pyro.plate("repeats", 10, subsample=indices, dim=-1):
            pyro.sample("u", dist.Poisson(em.learned("rates", START)[z]), obs=counts[:, None].expand(-1, len(indices)))


@parametrize(
    ("model", "match"),
    [
        (with_global_latent, "latent site 'kind' is outside of plate 'data' and ties the batches together"),
        (with_summary, "observed site 'total' is outside of plate 'data' and would count once for each batch"),
        (without_plate, r"Site 'z_0' is in no vectorised plate.*with pyro\.plate"),
        (with_network, r"In batch 1 of epoch 1: .*'slope' \(.*site 'u'.*\).*vfe\.Numerical.*SVI"),
        (drawing_a_subsample, "Plate 'data' draws its subsample at random"),
    ],
)
def test_programs_whose_batches_are_tied_are_refused(model: em.Model, match: str) -> None:
    refused(model, match)


def test_statistics_that_are_not_the_programs_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_other_exposure(statistics: Any, values: Any) -> Pools:
        pools = data_pools(statistics, values)
        counts, exposure = pools.coefficients["rates"]
        return replace(pools, coefficients={**pools.coefficients, "rates": torch.stack([counts, 2 * exposure])})

    monkeypatch.setattr(batch_loop, "data_pools", with_other_exposure)
    refused(MIXTURE, "'rates'.*the programs' own gradient does not vanish there")


def test_points_for_each_datum_are_refused() -> None:
    guide = AutoDelta(pyro.poutine.block(with_a_point_for_each_datum, expose=["exposure"]))
    refused(with_a_point_for_each_datum, "Site 'exposure' is a point estimate for each datum", guide=guide)


def test_a_subsample_of_what_is_no_data_plate_is_refused() -> None:
    batches = [(batch, torch.arange(5)) for batch in BATCHES]
    refused(subsampled_inside, "Plate 'repeats' of site 'u' is subsampled, and not all", batches)


def test_a_single_chain_is_refused() -> None:
    def chain(sequence: Tensor) -> None:
        with pyro.plate("time", len(sequence)):
            z = pyro.sample("z", vfe.MarkovChain(*(em.learned(n, SEQUENCES_START) for n in ("initial", "transition"))))
            pyro.sample("u", dist.Poisson(em.learned("rates", SEQUENCES_START)[z]), obs=sequence)

    with pytest.raises(StructureError, match="Site 'z' is in no vectorised plate but that of a chain"):
        vfe.EM(chain).run_batches(list(tensor(SEQUENCES)), progress_bar=False)


@parametrize(
    ("batches", "options", "match"),
    [
        (tensor(COUNTS), {}, r"Tensor, which is no iterable of batches\. .*u\.split"),
        ({"counts": BATCHES}, {}, "dict, which is no iterable of batches"),
        ([], {}, r"The list of batches \(of length 0\) gave none in epoch 1"),
        (BATCHES, {"num_epochs": 0}, "num_epochs=0"),
        (BATCHES, {"tol": -1.0}, "tol=-1"),
        (BATCHES, {"num_data": 0}, "num_data=0"),
        (INDEXED, {"num_data": 100}, r"The data are 230 elements, plate 'data' says, and 100 elements by num_data="),
        (BATCHES, {"m_phase": vfe.Numerical()}, "M-phase Numerical, which needs all data at once"),
        (BATCHES, {"e_phase": vfe.Annealed([0.5, 1.0])}, "E-phase Annealed"),
    ],
)
def test_what_cannot_be_had_is_said(batches: Any, options: dict[str, Any], match: str) -> None:
    refused(subsampled if batches is INDEXED else MIXTURE, match, batches, **options)


def test_a_generator_is_refused_for_more_than_one_epoch() -> None:
    refused(MIXTURE, "a generator, which can be read only once, and num_epochs=100", (b for b in BATCHES))


def test_mean_field_factors_as_long_as_a_batch_are_refused() -> None:
    refused(MIXTURE, "AutoMeanField holds a factor for each element of plate 'data'", guide=vfe.AutoMeanField(MIXTURE))


@parametrize("alpha", [0.5, 1.01, float("nan")])
def test_step_sizes_that_do_not_settle_are_refused(alpha: float) -> None:
    with pytest.raises(VFEError, match=f"alpha={alpha:g}"):
        vfe.Online(alpha)


def test_a_negative_delay_is_refused() -> None:
    with pytest.raises(VFEError, match="delay=-1"):
        vfe.Online(delay=-1)


def test_online_em_asks_how_many_data_stand_next_to_a_prior() -> None:
    guide = em.point_guide(with_priors, START)
    refused(with_priors, r"Site 'weights' is a prior.*Pass num_data=", guide=guide, method=vfe.Online())


def test_incremental_em_refuses_batches_that_change() -> None:
    loader = DataLoader(TensorDataset(tensor(COUNTS)), batch_size=50, shuffle=True)
    with pytest.raises(VFEError, match=r"In batch 1 of epoch 2: A batch comes up that was not there.*vfe\.Online"):
        vfe.EM(MIXTURE).run_batches(loader, progress_bar=False)
    assert_same(parameters(), by_hand.poisson_mixture(COUNTS)(START)[1], 1e-10)


def test_batches_that_cannot_be_recognised_are_refused_by_incremental_em_alone() -> None:
    def model(counts: Tensor, transform: Callable[[Tensor], Tensor]) -> None:
        MIXTURE(transform(counts))

    batches = [(counts, lambda counts: 2 * counts) for counts in BATCHES]
    refused(model, "an argument of type function cannot be read", batches)
    vfe.EM(model).run_batches(batches, method=vfe.Online(), num_epochs=1, progress_bar=False)


def test_incremental_em_refuses_to_lose_batches() -> None:
    class Fewer:
        left = 6

        def __iter__(self) -> Iterator[Tensor]:
            self.left -= 1
            return iter(BATCHES[: self.left])

    with pytest.raises(VFEError, match="1 of the 5 batches of the first epoch did not come up again"):
        vfe.EM(MIXTURE).run_batches(Fewer(), progress_bar=False)


@parametrize("method", [vfe.Incremental(), vfe.Online(delay=0)], ids=["incremental", "online"])
def test_a_failing_batch_leaves_the_parameters_as_before_it(method: Any) -> None:
    history: list[Values] = []
    bad = torch.full((5,), -1.0)

    class Failing:
        epochs = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.epochs += 1
            return iter([*BATCHES[:3], bad if self.epochs == 2 else BATCHES[3]])

    def follow(count: int, row: dict[str, Any]) -> None:
        history.append(parameters())

    with pytest.raises(ValueError, match="Poisson"):
        vfe.EM(MIXTURE).run_batches(Failing(), method=method, progress_bar=False, callback=follow)
    assert len(history) == 8
    assert_same(parameters(), history[-1], 0.0)


def test_a_degenerate_component_is_named_and_nothing_is_written() -> None:
    start = {"weights": np.array([0.5, 0.5]), "loc": np.array([[0.0], [5.0]]), "scale": np.ones((2, 1))}
    points = tensor([[0.0], [0.0], [0.0], [0.0]])
    with pytest.raises(DegenerateError, match="'scale'"):
        vfe.EM(em.diagonal_mixture(start)).run_batches(points.split(2), progress_bar=False)
    assert_same(parameters(), start, 1e-12)
