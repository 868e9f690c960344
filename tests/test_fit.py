"""fit does what a hand-written loop over pyro.infer.SVI does, to the last bit, and tells of F, surprise and gap."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import PROGRAMS
from programs.case import empty, positive, real, simplex, tensor
from programs.networks import POINTS, MixtureModule, RecognitionModule
from programs.plates import COUNTS, mixture, mixture_guide
from programs.sampled import SAMPLED_PROGRAMS
from pyro.infer import SVI, ReweightedWakeSleep, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import Tensor
from torch.distributions import constraints
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import pyro_vfe as vfe
from pyro_vfe.errors import ImpossibleDataError, NotFiniteError, VFEError, VFEWarning

Programs = tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]

_S = PROGRAMS["subsampled_guided"]
_W = SAMPLED_PROGRAMS["v_depends_on_w_both_guided"]
CASES: dict[str, Programs] = {
    "exact": (mixture, mixture_guide, (COUNTS,)),
    "subsampled": (
        PROGRAMS["subsampled_guided"].model,
        PROGRAMS["subsampled_guided"].guide,
        PROGRAMS["subsampled"].args,
    ),
    "sampled": (_W.model, _W.guide, _W.args),
}
MONITORS: dict[str, Any] = {
    "default": lambda model, guide, args: None,
    "none": lambda model, guide, args: False,
    "every_step": lambda model, guide, args: vfe.Monitor(model, guide, every=1),
    "two_particles": lambda model, guide, args: vfe.Monitor(
        model, guide, every=2, held_out=args, elbo=vfe.FreeEnergy(num_particles=2)
    ),
}
OPTIMISERS: dict[str, Callable[[], Any]] = {
    "adam": lambda: pyro.optim.Adam({"lr": 0.05}),
    "clipped": lambda: pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.9}),
    "clip_norm": lambda: pyro.optim.PyroOptim(torch.optim.SGD, {"lr": 0.05}, {"clip_norm": 0.1}),
    "exponential": lambda: pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.8}
    ),
    "plateau": lambda: pyro.optim.ReduceLROnPlateau(
        {"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.2}, "factor": 0.5, "patience": 0}
    ),
}


def adam(rate: float = 0.05) -> Any:
    return pyro.optim.Adam({"lr": rate})


def parameters() -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


def by_hand(model: Any, guide: Any, arguments: Iterator[Any], optim: Any, elbo: Any) -> tuple[list[Any], Any]:
    """Losses and constrained parameters of a loop as Pyro's tutorials have it."""
    pyro.clear_param_store()
    pyro.set_rng_seed(7)
    svi, losses = SVI(model, guide, optim, loss=elbo), []
    for args in arguments:
        losses.append(svi.step(*args))
        if isinstance(optim, pyro.optim.PyroLRScheduler):
            plateau = optim.pt_scheduler_constructor is torch.optim.lr_scheduler.ReduceLROnPlateau
            optim.step(*(losses[-1:] if plateau else ()))
    return losses, parameters()


def fitted(model: Any, guide: Any, *args: Any, **options: Any) -> Any:
    pyro.clear_param_store()
    pyro.set_rng_seed(7)
    return vfe.fit(model, guide, *args, progress_bar=False, **options)


@pytest.mark.parametrize("monitor", MONITORS)
@pytest.mark.parametrize("name", CASES)
def test_the_losses_and_parameters_are_those_of_a_loop_over_SVI(name: str, monitor: str) -> None:
    model, guide, args = CASES[name]
    losses, values = by_hand(model, guide, iter([args] * 25), adam(), vfe.FreeEnergy())
    run = fitted(model, guide, *args, optim=adam(), num_steps=25, monitor=MONITORS[monitor](model, guide, args))
    assert run.losses.dtype == np.float64
    assert run.losses.tolist() == losses
    torch.testing.assert_close(run.params, values, rtol=0, atol=0)
    torch.testing.assert_close(parameters(), values, rtol=0, atol=0)
    assert not any(value.requires_grad for value in run.params.values())


@pytest.mark.parametrize("name", OPTIMISERS)
def test_any_optimiser_of_Pyro_takes_the_steps_it_takes_in_SVI_and_schedulers_are_stepped(name: str) -> None:
    losses, values = by_hand(mixture, mixture_guide, iter([(COUNTS,)] * 12), OPTIMISERS[name](), vfe.FreeEnergy())
    run = fitted(mixture, mixture_guide, COUNTS, optim=OPTIMISERS[name](), num_steps=12)
    assert run.losses.tolist() == losses
    torch.testing.assert_close(run.params, values, rtol=0, atol=0)


def test_TraceEnum_ELBO_trains_while_F_is_read_exactly() -> None:
    model, guide = mixture, config_enumerate(mixture_guide, default="parallel")
    losses, values = by_hand(model, guide, iter([(COUNTS,)] * 8), adam(), TraceEnum_ELBO(max_plate_nesting=1))
    run = fitted(model, guide, COUNTS, optim=adam(), num_steps=8, elbo=TraceEnum_ELBO(max_plate_nesting=1))
    assert run.losses.tolist() == losses
    torch.testing.assert_close(run.params, values, rtol=0, atol=0)
    terms = vfe.FreeEnergy().decompose(mixture, mixture_guide, COUNTS)
    assert run.free_energy == pytest.approx(terms.free_energy.item(), rel=1e-12)


def test_a_sampled_ELBO_of_Pyro_trains_while_F_is_read_exactly() -> None:
    def model(counts: Tensor) -> None:
        with pyro.plate("data", len(counts)):
            pyro.sample("z", dist.Categorical(simplex("weights", 3)))

    losses, _ = by_hand(model, mixture_guide, iter([(COUNTS,)] * 20), adam(), Trace_ELBO(num_particles=2))
    run = fitted(model, mixture_guide, COUNTS, optim=adam(), num_steps=20, elbo=Trace_ELBO(num_particles=2))
    assert run.losses.tolist() == losses
    assert run.history.stderr.tolist() == [0.0, 0.0]
    np.testing.assert_allclose(run.history.surprise, 0.0, atol=1e-12)


def test_an_ELBO_of_two_losses_keeps_both() -> None:
    def elbo() -> Any:
        return ReweightedWakeSleep(num_particles=2, vectorize_particles=False, model_has_params=True)

    losses, values = by_hand(mixture, mixture_guide, iter([(COUNTS,)] * 5), adam(), elbo())
    run = fitted(mixture, mixture_guide, COUNTS, optim=adam(), num_steps=5, elbo=elbo())
    np.testing.assert_array_equal(run.losses, losses)
    assert run.losses.shape == (5, 2)
    torch.testing.assert_close(run.params, values, rtol=0, atol=0)
    assert "F = " in str(run)


def test_it_ends_where_EM_does() -> None:
    learned = vfe.EM(mixture).run(COUNTS, progress_bar=False)
    run = fitted(mixture, mixture_guide, COUNTS, optim=adam(0.2), num_steps=300)
    assert run.free_energy == pytest.approx(learned.free_energy, abs=1e-3)
    assert run.stopped is None and run.num_steps == len(run.losses) == 300


# Readings


@pytest.mark.parametrize(("num_steps", "read"), [(1, [1]), (7, [1, 7]), (20, [1, 20]), (65, [1, 20, 40, 60, 65])])
def test_readings_are_taken_at_the_first_step_between_and_at_the_end(num_steps: int, read: list[int]) -> None:
    run = fitted(mixture, mixture_guide, COUNTS, optim=adam(), num_steps=num_steps)
    assert run.history.iteration.tolist() == read
    assert set(run.history.phase) == {"step"}


def test_the_last_reading_is_at_the_final_parameters() -> None:
    run = fitted(mixture, mixture_guide, COUNTS, optim=adam(), num_steps=33)
    terms = vfe.FreeEnergy().decompose(mixture, mixture_guide, COUNTS)
    last = run.history.rows[-1]
    found = (run.free_energy, last.surprise, last.gap, last.num_data)
    assert found == (terms.free_energy.item(), terms.surprise.item(), terms.gap.item(), len(COUNTS))
    assert run.free_energy < run.losses[-1]


def test_a_long_run_has_about_fifty_readings() -> None:
    pyro.clear_param_store()
    model = lambda u: pyro.sample("z", dist.Bernoulli(torch.sigmoid(real("logit", seed=1))), obs=u)  # noqa: E731
    elbo = vfe.FreeEnergy(strict_enumeration_warning=False)
    run = vfe.fit(model, empty, torch.tensor(1.0), elbo=elbo, optim=adam(), num_steps=1050, progress_bar=False)
    assert 50 <= len(run.history) <= 53


def test_without_a_monitor_the_history_is_empty() -> None:
    run = fitted(mixture, mixture_guide, COUNTS, optim=adam(), num_steps=3, monitor=False)
    assert len(run.history) == 0 and np.isnan(run.free_energy)
    assert f"{run.losses[-1]:.4f}" in str(run)
    assert "loss" in run._repr_html_()


def test_a_monitor_of_ones_own_is_the_history_and_goes_on_in_the_next_run() -> None:
    monitor = vfe.Monitor(mixture, mixture_guide, every=4)
    first = fitted(mixture, mixture_guide, COUNTS, optim=adam(), num_steps=10, monitor=monitor)
    assert first.history.iteration.tolist() == [1, 4, 8, 10]
    second = vfe.fit(mixture, mixture_guide, COUNTS, optim=adam(), num_steps=5, monitor=monitor, progress_bar=False)
    assert second.history.iteration.tolist() == [1, 4, 8, 10, 12, 15]
    assert second.num_steps == 5
    assert second.history.rows[:4] == first.history.rows


def test_held_out_data_are_read_while_others_are_learned_from() -> None:
    held_out = tensor([3.0, 9.0])
    guide = lambda counts: None  # noqa: E731
    monitor = vfe.Monitor(mixture, guide, every=5, held_out=held_out)
    run = fitted(mixture, guide, COUNTS, optim=adam(), num_steps=10, monitor=monitor)
    terms = vfe.FreeEnergy().decompose(mixture, guide, held_out)
    assert run.free_energy == terms.free_energy.item()
    assert run.history.rows[-1].num_data == 2
    assert not run.notes


# Batches


def amortised(counts: Tensor) -> None:
    weight = pyro.param("slope", lambda: tensor([0.1, 0.0, -0.1]))
    with pyro.plate("data", len(counts)):
        pyro.sample("z", dist.Categorical(logits=counts[:, None] * weight))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shuffling_DataLoader_is_cycled_as_a_loop_over_epochs_does(workers: int) -> None:
    def loader() -> Any:
        data = TensorDataset(torch.arange(7.0), torch.arange(7.0))
        return DataLoader(data, batch_size=3, shuffle=True, num_workers=workers)

    def model(counts: Tensor, same: Tensor) -> None:
        assert torch.equal(counts, same)
        mixture(counts)

    def epochs() -> Iterator[Any]:
        found = 0
        batches = loader()
        while True:
            for batch in batches:
                yield batch
                found += 1
                if found == 8:
                    return

    guide = lambda counts, same: amortised(counts)  # noqa: E731
    losses, values = by_hand(model, guide, epochs(), adam(), vfe.FreeEnergy())
    run = fitted(model, guide, optim=adam(), num_steps=8, batches=loader())
    assert run.losses.tolist() == losses
    torch.testing.assert_close(run.params, values, rtol=0, atol=0)
    assert run.notes == ("Each reading of F is of the batch of its step.",)


def test_the_random_state_after_a_run_is_that_of_the_loop() -> None:
    loader = DataLoader(TensorDataset(torch.arange(6.0)), batch_size=2, shuffle=True)
    pyro.set_rng_seed(7)
    for _ in range(2):
        list(loader)
    expected = torch.rand(3)
    fitted(mixture, amortised, optim=adam(), num_steps=6, batches=loader)
    assert torch.equal(torch.rand(3), expected)


def test_batches_are_tensors_tuples_or_mappings_and_share_keywords() -> None:
    def model(counts: Tensor, scale: float = 1.0) -> None:
        with pyro.poutine.scale(scale=scale):
            mixture(counts)

    def guide(counts: Tensor, scale: float = 1.0) -> None:
        with pyro.poutine.scale(scale=scale):
            amortised(counts)

    kinds = {
        "tensor": COUNTS.split(2),
        "tuple": [(part,) for part in COUNTS.split(2)],
        "mapping": [{"counts": part} for part in COUNTS.split(2)],
    }
    runs = [fitted(model, guide, optim=adam(), num_steps=5, batches=b, scale=2.0) for b in kinds.values()]
    losses, _ = by_hand(
        model, guide, iter([(COUNTS[i : i + 2], 2.0) for i in (0, 2, 0, 2, 0)]), adam(), vfe.FreeEnergy()
    )
    assert all(run.losses.tolist() == losses for run in runs)


def test_readings_of_unequal_batches_know_their_sizes() -> None:
    monitor = vfe.Monitor(mixture, amortised, every=1)
    run = fitted(mixture, amortised, optim=adam(), num_steps=4, batches=COUNTS.split(3), monitor=monitor)
    assert [row.num_data for row in run.history.rows] == [3, 1, 3, 1]
    np.testing.assert_allclose(run.history.per_datum.free_energy, run.history.free_energy / [3, 1, 3, 1])
    assert str(run.history).splitlines()[0].split()[:5] == ["step", "F", "surprise", "gap", "N"]
    assert "N=1" not in str(run)


def test_readings_do_not_meet_the_same_batch_of_every_epoch() -> None:
    batches = [*COUNTS.repeat(7).split(3)][:10]
    run = fitted(mixture, empty, optim=adam(), num_steps=63, batches=[*batches, COUNTS[:1], *batches[:9]])
    assert run.history.iteration.tolist() == [1, 21, 42, 63]
    stream = DataLoader(Stream(), batch_size=2)
    run = fitted(mixture, empty, optim=adam(), num_steps=21, batches=stream)
    assert run.history.iteration.tolist() == [1, 20, 21]


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Data of unknown number."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(COUNTS)


def test_a_subsampled_plate_has_the_whole_data_in_its_readings() -> None:
    def model(batch: Tensor) -> None:
        weights, rates = simplex("weights", 3), positive("rates", 3, seed=1)
        with pyro.plate("data", 4, subsample=batch):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("u", dist.Poisson(rates[z]), obs=COUNTS[batch])

    def guide(batch: Tensor) -> None:
        with pyro.plate("data", 4, subsample=batch):
            pyro.sample("z", dist.Categorical(simplex("q", 4, 3, seed=2)[batch]))

    indices = torch.arange(4).split(2)
    losses, values = by_hand(model, guide, iter([(indices[i % 2],) for i in range(7)]), adam(), vfe.FreeEnergy())
    run = fitted(model, guide, optim=adam(), num_steps=7, batches=indices)
    assert run.losses.tolist() == losses
    torch.testing.assert_close(run.params, values, rtol=0, atol=0)
    assert [row.num_data for row in run.history.rows] == [4, 4]


def test_batches_that_can_be_read_once_end_the_run_with_nothing_lost() -> None:
    with pytest.warns(VFEWarning, match="2 of num_steps=5 steps: the generator of batches ended"):
        run = fitted(mixture, amortised, optim=adam(), num_steps=5, batches=(b for b in COUNTS.split(2)))
    assert run.num_steps == 2
    assert "cannot be read again" in str(run.stopped)
    assert "stopped: the generator" in str(run)
    assert run.history.iteration.tolist() == [1, 2]
    torch.testing.assert_close(dict(run.params), parameters(), rtol=0, atol=0)


# What is refused


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "torch_class": ({"optim": torch.optim.Adam}, r'pyro.optim.Adam\(\{"lr": 0.01\}\)'),
    "torch_instance": (
        {"optim": torch.optim.RMSprop([torch.zeros(1, requires_grad=True)], lr=0.3)},
        r'pyro.optim.RMSprop\(\{"lr": 0.3\}\)',
    ),
    "not_called": ({"optim": pyro.optim.Adam}, "makes an optimiser and is none"),
    "a_number": ({"optim": 0.01}, r"optim= is 0\.01"),
    "no_steps": ({"num_steps": 0}, "num_steps=0"),
    "half_a_step": ({"num_steps": 1.5}, "num_steps=1.5"),
    "elbo_class": ({"elbo": TraceEnum_ELBO}, "pass an instance"),
    "elbo_module": ({"elbo": vfe.FreeEnergy()(MixtureModule(), RecognitionModule())}, "has its programs inside"),
    "batches_and_data": ({"batches": [COUNTS]}, "1 positional argument"),
    "one_tensor_of_batches": ({"batches": COUNTS}, "no iterable of batches"),
    "monitor_true": ({"monitor": 3}, "monitor= is 3"),
    "callback_without_readings": ({"monitor": False, "callback": print}, "callback="),
    "rule_without_readings": ({"monitor": False, "stop": vfe.Settled()}, "stop="),
    "two_callbacks": ({"monitor": vfe.Monitor(mixture, mixture_guide), "callback": print}, "Give callback= to the"),
    "rule_class": ({"stop": vfe.Settled}, "no stop rule"),
    "rule_number": ({"stop": 0.01}, "no stop rule"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_fit_cannot_use_is_refused_before_anything_changes(name: str) -> None:
    options, words = REFUSED[name]
    with pytest.raises(VFEError, match=words):
        vfe.fit(mixture, mixture_guide, COUNTS, **{"optim": adam(), "num_steps": 2, "progress_bar": False, **options})
    assert not list(pyro.get_param_store().keys())


def test_other_things_that_are_no_programs_or_batches_are_refused() -> None:
    with pytest.raises(VFEError, match="guide is a Tensor"):
        fitted(mixture, COUNTS, optim=adam(), num_steps=2)
    with pytest.raises(VFEError, match="gave none in epoch 1"):
        fitted(mixture, mixture_guide, optim=adam(), num_steps=2, batches=[])
    with pytest.raises(VFEError, match="'counts', and fit was given another"):
        fitted(mixture, mixture_guide, optim=adam(), num_steps=2, batches=[{"counts": COUNTS}], counts=COUNTS)


def test_no_batches_at_all_are_refused_with_readings_too() -> None:
    with pytest.raises(VFEError, match="gave none in epoch 1"):
        vfe.fit(mixture, mixture_guide, optim=adam(), num_steps=2, batches=[], progress_bar=False)


def test_whole_numbers_of_NumPy_are_numbers_of_steps() -> None:
    monitor = vfe.Monitor(mixture, mixture_guide, every=np.int64(2), progress_bar=False)
    run = vfe.fit(
        mixture, mixture_guide, COUNTS, optim=adam(), num_steps=np.int64(4), monitor=monitor, progress_bar=False
    )
    assert run.num_steps == 4 and run.history.iteration.tolist() == [1, 2, 4]


def test_what_could_not_be_read_is_in_the_notes_and_F_is_not_known() -> None:
    guide = vfe.AutoMeanField(mixture)
    monitor = vfe.Monitor(mixture, guide, held_out=COUNTS[:3], progress_bar=False)
    with pytest.warns(VFEWarning, match="at the held-out arguments") as caught:
        run = vfe.fit(mixture, guide, COUNTS, optim=adam(), num_steps=2, monitor=monitor, progress_bar=False)
    assert {Path(warning.filename) for warning in caught} == {Path(__file__)}
    assert "F is not known" in str(run) and run.notes[0] == monitor.notes[0]
    assert "has its own parameters for each element of plate 'data'" in run.notes[1]


def test_a_guide_with_parameters_for_every_element_is_noted_where_batches_change() -> None:
    half = len(COUNTS) // 2
    notes = {}
    for name, batches in (("one", [COUNTS[:half]]), ("two", [COUNTS[:half], COUNTS[-half:]])):
        guide = vfe.AutoMeanField(mixture)
        run = vfe.fit(mixture, guide, optim=adam(), num_steps=2, batches=batches, progress_bar=False)
        notes[name] = " ".join(run.notes)
        pyro.clear_param_store()
    assert "own parameters" in notes["two"] and "own parameters" not in notes["one"]


def test_programs_without_parameters_have_nothing_to_learn() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(tensor(0.3)))
        pyro.sample("u", dist.Normal(z, 1.0), obs=tensor(0.5))

    with pytest.raises(VFEError, match="no parameters"):
        fitted(model, empty, optim=adam(), num_steps=2)


def test_PyroModules_are_trained_in_the_store() -> None:
    losses, values = by_hand(MixtureModule(), RecognitionModule(), iter([(POINTS,)] * 5), adam(), vfe.FreeEnergy())
    model, guide = MixtureModule(), RecognitionModule()
    run = fitted(model, guide, POINTS, optim=adam(), num_steps=5)
    assert run.losses.tolist() == losses
    torch.testing.assert_close(run.params, values, rtol=0, atol=0)
    torch.testing.assert_close(model.weights.detach(), run.params["weights"])


# Steps that fail


def test_data_of_probability_zero_name_the_step_and_change_nothing() -> None:
    seven, eight = torch.tensor([0, 1, 1]), torch.tensor([0, 1, 2])

    def model(labels: Tensor) -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Categorical(simplex("weights", 2)))
            pyro.sample("u", dist.Categorical(tensor([[0.5, 0.5, 0.0], [0.9, 0.1, 0.0]])[z]), obs=labels)

    _, expected = by_hand(model, empty, iter([(seven,)] * 2), adam(), vfe.FreeEnergy())
    with pytest.raises(ImpossibleDataError, match=r"^In step 3: .*'u'"):
        fitted(model, empty, optim=adam(), num_steps=9, batches=[seven, seven, eight])
    torch.testing.assert_close(parameters(), expected, rtol=0, atol=0)


def root_of_rate(counts: Tensor) -> None:
    """F is finite everywhere, and its gradient is not where the rate's offset is 0."""
    offset = pyro.param("offset", tensor([0.0, 1.0]))
    with pyro.plate("data", len(counts)):
        z = pyro.sample("z", dist.Categorical(simplex("weights", 2)))
        pyro.sample("u", dist.Poisson(1.0 + offset.clamp(min=0).sqrt()[z]), obs=counts)


@pytest.mark.parametrize(
    "elbo", [vfe.FreeEnergy(), TraceEnum_ELBO(max_plate_nesting=1)], ids=lambda elbo: type(elbo).__name__
)
def test_a_gradient_that_is_not_finite_names_the_parameter_and_changes_nothing(elbo: Any) -> None:
    guide = config_enumerate(lambda counts: None)
    enumerated = {"enumerate": "parallel"}
    model = pyro.poutine.infer_config(root_of_rate, lambda site: enumerated if site["name"] == "z" else {})
    with pytest.raises(NotFiniteError, match=r"^In step 1: .*parameter 'offset'.* not finite"):
        fitted(model, guide, COUNTS, optim=adam(), num_steps=3, elbo=elbo)
    torch.testing.assert_close(parameters()["offset"], tensor([0.0, 1.0]), rtol=0, atol=0)
    for _, leaf in pyro.get_param_store().named_parameters():
        assert leaf.grad is None or not leaf.grad.any()


def test_a_tensor_with_two_names_is_updated_once() -> None:
    net = torch.nn.Linear(1, 3, dtype=torch.float64)
    start = {name: value.detach().clone() for name, value in net.named_parameters()}

    def guide(counts: Tensor) -> None:
        once, again = pyro.module("once", net), pyro.module("again", net)
        with pyro.plate("data", len(counts)):
            pyro.sample("z", dist.Categorical(logits=once(counts[:, None]) + again(counts[:, None])))

    losses, values = by_hand(mixture, guide, iter([(COUNTS,)] * 4), adam(), vfe.FreeEnergy())
    net.load_state_dict(start)
    run = fitted(mixture, guide, COUNTS, optim=adam(), num_steps=4)
    assert run.losses.tolist() == losses
    torch.testing.assert_close(run.params, values, rtol=0, atol=0)
    torch.testing.assert_close(run.params["once$$$weight"], run.params["again$$$weight"])


def test_a_large_gradient_is_no_failure() -> None:
    def model() -> None:
        a, b = (pyro.param(name, torch.tensor(1e20, dtype=torch.float32)) for name in "ab")
        pyro.sample(
            "u", dist.Delta(tensor(0.0), log_density=-(torch.stack([a, b]).double() ** 2).sum()), obs=tensor(0.0)
        )

    losses, values = by_hand(model, empty, iter([()] * 2), adam(), Trace_ELBO())
    run = fitted(model, empty, optim=adam(), num_steps=2, elbo=Trace_ELBO(), monitor=False)
    assert run.losses.tolist() == losses and np.isfinite(losses).all()
    torch.testing.assert_close(run.params, values, rtol=0, atol=0)


@pytest.mark.parametrize("monitor", [None, False])
def test_an_update_that_spoils_parameters_is_taken_back(monitor: Any) -> None:
    def optim() -> Any:
        return pyro.optim.LambdaLR(
            {
                "optimizer": torch.optim.SGD,
                "optim_args": {"lr": 1.0},
                "lr_lambda": lambda step: 0.01 if step < 2 else 1e6,
            }
        )

    run = fitted(mixture, mixture_guide, COUNTS, optim=optim(), num_steps=2)
    with pytest.raises(NotFiniteError, match=r"^In step 3: The update by SGD made parameter '.*pyro.optim.ClippedAdam"):
        fitted(mixture, mixture_guide, COUNTS, optim=optim(), num_steps=5, monitor=monitor)
    torch.testing.assert_close(parameters(), dict(run.params), rtol=0, atol=0)


def test_an_update_that_spoils_parameters_in_the_last_step_is_taken_back() -> None:
    def optim(rate: float) -> Any:
        return pyro.optim.SGD({"lr": rate})

    with pytest.raises(NotFiniteError, match=r"^In step 1: The update by SGD"):
        fitted(mixture, mixture_guide, COUNTS, optim=optim(1e6), num_steps=1, monitor=False)
    values = parameters()
    pyro.clear_param_store()
    vfe.FreeEnergy().loss(mixture, mixture_guide, COUNTS)
    torch.testing.assert_close(values, parameters(), rtol=0, atol=0)


def test_an_infinite_entry_that_was_there_from_the_start_is_the_users_own() -> None:
    def model(counts: Tensor) -> None:
        logits = pyro.param("logits", tensor([0.0, 0.5, -torch.inf]))
        with pyro.plate("data", len(counts)):
            z = pyro.sample("z", dist.Categorical(logits=logits))
            pyro.sample("u", dist.Poisson(positive("rates", 3, seed=1)[z]), obs=counts)

    run = fitted(model, empty, COUNTS, optim=adam(), num_steps=3)
    assert run.params["logits"][2] == -torch.inf
    assert run.params["logits"][:2].isfinite().all()


def test_a_loss_of_another_ELBO_that_is_not_finite_stops_the_run() -> None:
    def model() -> None:
        rate = pyro.param("rate", tensor(1.0), constraint=constraints.positive)
        pyro.sample("u", dist.Poisson(rate), obs=tensor(torch.inf))

    with (
        pyro.validation_enabled(False),
        pytest.warns(UserWarning, match="Encountered"),
        pytest.raises(NotFiniteError, match=r"^In step 1: The loss is"),
    ):
        fitted(model, empty, optim=adam(), num_steps=3, elbo=Trace_ELBO())
    assert parameters()["rate"].item() == pytest.approx(1.0, abs=1e-15)


class Stop(Exception):
    """An error of the user's own kind."""


@pytest.mark.parametrize("kind", [Stop, KeyboardInterrupt])
def test_an_error_of_the_programs_own_passes_and_leaves_the_last_whole_step(kind: type[BaseException]) -> None:
    _, expected = by_hand(mixture, mixture_guide, iter([(COUNTS,)] * 2), adam(), vfe.FreeEnergy())
    error = kind("enough")
    calls = []

    def model(counts: Tensor, step: int) -> None:
        mixture(counts)
        if step == 3:
            raise error

    def guide(counts: Tensor, step: int) -> None:
        calls.append(step)
        mixture_guide(counts)

    monitor = vfe.Monitor(model, guide, every=1)
    with pytest.raises(kind) as caught:
        fitted(model, guide, optim=adam(), num_steps=9, batches=[(COUNTS, i) for i in (1, 2, 3)], monitor=monitor)
    assert caught.value is error
    torch.testing.assert_close(parameters(), expected, rtol=0, atol=0)
    assert monitor.history.iteration.tolist() == [1, 2]
    assert calls[-1] == 3


def test_an_interrupt_of_the_optimiser_takes_the_whole_step_back() -> None:
    class Interrupted(torch.optim.SGD):
        steps = 0

        def step(self, closure: Any = None) -> Any:
            result = super().step(closure)
            Interrupted.steps += 1
            if Interrupted.steps == 5:
                raise KeyboardInterrupt
            return result

    _, expected = by_hand(mixture, mixture_guide, iter([(COUNTS,)]), pyro.optim.SGD({"lr": 0.01}), vfe.FreeEnergy())
    assert len(expected) == 3
    with pytest.raises(KeyboardInterrupt):
        fitted(mixture, mixture_guide, COUNTS, optim=pyro.optim.PyroOptim(Interrupted, {"lr": 0.01}), num_steps=4)
    torch.testing.assert_close(parameters(), expected, rtol=0, atol=0)


# Stopping


def test_a_rule_ends_the_run_at_its_reading() -> None:
    run = fitted(
        mixture, mixture_guide, COUNTS, optim=adam(0.1), num_steps=5000, stop=[vfe.Settled(1e-9), vfe.GapBelow(0.05)]
    )
    assert run.stopped is not None and "below 0.05" in run.stopped
    assert run.num_steps == len(run.losses) == run.history.iteration[-1] < 5000
    gaps = run.history.per_datum.gap
    assert gaps[-1] < 0.05 <= gaps[:-1].min()
    assert f"stopped: {run.stopped}" in str(run)


def test_a_rule_that_is_met_at_the_last_step_stopped_nothing() -> None:
    run = fitted(mixture, mixture_guide, COUNTS, optim=adam(), num_steps=1, stop=vfe.GapBelow(1e9))
    assert run.stopped is None and run.num_steps == 1


def test_where_a_rule_waits_readings_come_at_least_every_fifty_steps() -> None:
    waits = lambda history: "enough" if len(history) == 4 else None  # noqa: E731
    run = fitted(mixture, mixture_guide, COUNTS, optim=adam(), num_steps=10**6, stop=waits)
    assert run.history.iteration.tolist() == [1, 50, 100, 150]
    assert run.stopped == "enough"


def test_the_callback_gets_every_reading_and_ends_the_run() -> None:
    seen: list[tuple[int, dict[str, float]]] = []

    def watch(step: int, values: dict[str, float]) -> bool:
        seen.append((step, values))
        return step == 40

    run = fitted(mixture, mixture_guide, COUNTS, optim=adam(), num_steps=100, callback=watch)
    assert [step for step, _ in seen] == [1, 20, 40] == run.history.iteration.tolist()
    assert run.stopped == "the callback asked for it"
    assert run.num_steps == 40
    assert [values["free_energy/total"] for _, values in seen] == run.history.free_energy.tolist()


# What is printed


def test_it_prints_F_its_parts_the_history_and_the_parameters() -> None:
    run = fitted(mixture, mixture_guide, COUNTS, optim=adam(), num_steps=25)
    text, page = str(run), run._repr_html_()
    each = run.history.per_datum.rows[-1]
    for words in (
        "SVI: 25 steps",
        f"F = {run.free_energy:,.4f} nats ({each.free_energy:,.4f} per datum, N=4)",
        f"= surprise {run.history.surprise[-1]:,.4f} ({each.surprise:,.4f} per datum)",
        f"+ gap {run.history.gap[-1]:,.4f} ({each.gap:,.4f} per datum)",
    ):
        assert words in text and words in page
    rows = {tuple(line.split()) for line in text.splitlines()}
    assert {("weights", "3", "by", "Adam"), ("rates", "3", "by", "Adam"), ("q", "4x3", "by", "Adam")} <= rows
    assert str(run.history) in text
    assert run.history._repr_html_() in page


def test_a_parameter_without_a_gradient_is_told_of() -> None:
    def model(counts: Tensor) -> None:
        mixture(counts)
        real("unused", 2)

    run = fitted(model, mixture_guide, COUNTS, optim=adam(), num_steps=2)
    assert run.updates["unused"] == "not: F has no gradient in it"
    assert run.updates["rates"] == "by Adam"


def test_the_bar_shows_F_and_its_parts(capsys: pytest.CaptureFixture[str]) -> None:
    vfe.fit(mixture, mixture_guide, COUNTS, optim=adam(), num_steps=3)
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert all(f"{name}=" in shown for name in ("F", "surprise", "gap", "loss"))
    vfe.fit(mixture, mixture_guide, COUNTS, optim=adam(), num_steps=3, monitor=False)
    shown = capsys.readouterr().err
    assert "loss=" in shown and "gap=" not in shown
    vfe.fit(mixture, mixture_guide, COUNTS, optim=adam(), num_steps=3, progress_bar=False)
    own = vfe.Monitor(mixture, mixture_guide, progress_bar=False)
    vfe.fit(mixture, mixture_guide, COUNTS, optim=adam(), num_steps=3, monitor=own)
    assert capsys.readouterr().err == ""
