"""A monitor tells F, surprise and gap of a training loop as decompose has them, and disturbs nothing."""

import random
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import oracle
from programs import PROGRAMS
from programs.case import empty, real, simplex, tensor
from programs.networks import POINTS, MixtureModule, RecognitionModule
from programs.plates import COUNTS, mixture, mixture_guide
from programs.sampled import SAMPLED_PROGRAMS
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from pyro.nn import PyroModule
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

import pyro_vfe as vfe
from pyro_vfe.errors import CostError, VFEError, VFEWarning
from pyro_vfe.learning.history import History

SAMPLED = SAMPLED_PROGRAMS["v_depends_on_w_both_guided"]


def new_svi(model: Any = mixture, guide: Any = mixture_guide, elbo: Any = None) -> SVI:
    return SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=elbo or vfe.FreeEnergy())


def quiet(*args: Any, **options: Any) -> vfe.Monitor:
    return vfe.Monitor(*args, progress_bar=False, **options)


# What is read


def test_readings_are_the_terms_of_the_full_joint_table_at_their_step() -> None:
    svi, expected = new_svi(), []
    with quiet(mixture, mixture_guide, every=3) as monitor:
        for step in range(1, 8):
            monitor.step(svi.step(COUNTS), COUNTS)
            if step in (1, 3, 6, 7):
                terms = oracle(mixture, mixture_guide, COUNTS).terms
                expected.append([terms[name].item() for name in ("free_energy", "surprise", "gap")])
    history = monitor.history
    assert history.iteration.tolist() == [1, 3, 6, 7]
    found = np.stack([history.free_energy, history.surprise, history.gap], -1)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    assert history.num_data == len(COUNTS) and set(history.phase) == {"step"}
    assert not history.stderr.any()


@pytest.mark.parametrize("held_out", [COUNTS[1:3], (COUNTS[1:3],), [COUNTS[1:3]], {"counts": COUNTS[1:3]}])
def test_held_out_arguments_are_a_tensor_a_tuple_or_a_mapping(held_out: Any) -> None:
    svi = new_svi(guide=empty)
    with quiet(mixture, empty, held_out=held_out) as monitor:
        monitor.step(svi.step(COUNTS), COUNTS)
    expected = oracle(mixture, empty, COUNTS[1:3]).terms["free_energy"].item()
    assert monitor.history.free_energy.tolist() == pytest.approx([expected], rel=1e-10)
    assert monitor.history.num_data == 2
    assert monitor.is_held_out


def test_programs_without_arguments_can_be_held_out_and_called_by_name() -> None:
    program = PROGRAMS["mixture_called_by_name"]
    svi = new_svi(program.model, program.guide)
    with (
        quiet(program.model, program.guide, held_out=program.kwargs) as held,
        quiet(program.model, program.guide) as own,
    ):
        loss = svi.step(**program.kwargs)
        held.step(loss, **program.kwargs)
        own.step(loss, **program.kwargs)
    assert held.history.rows == own.history.rows != ()


def test_the_last_step_is_read_on_leaving_and_never_twice() -> None:
    svi = new_svi()
    with quiet(mixture, mixture_guide, every=5) as monitor:
        for _ in range(5):
            monitor.step(svi.step(COUNTS), COUNTS)
    assert monitor.history.iteration.tolist() == [1, 5]
    monitor.step(svi.step(COUNTS), COUNTS)
    monitor.close()
    monitor.close()
    assert monitor.history.iteration.tolist() == [1, 5, 6]
    monitor.step(svi.step(COUNTS), COUNTS)
    monitor.close(read=False)
    assert monitor.history.iteration.tolist() == [1, 5, 6]
    with quiet(mixture, mixture_guide) as unused:
        pass
    assert len(unused.history) == 0 and unused.stopped is None


def test_an_interrupted_loop_keeps_its_history() -> None:
    svi = new_svi()
    with pytest.raises(KeyboardInterrupt), quiet(mixture, mixture_guide, every=2) as monitor:
        for step in range(1, 9):
            monitor.step(svi.step(COUNTS), COUNTS)
            if step == 5:
                raise KeyboardInterrupt
    assert monitor.history.iteration.tolist() == [1, 2, 4]


def test_particles_tell_the_standard_error() -> None:
    svi = new_svi(SAMPLED.model, SAMPLED.guide)
    loss = svi.step(*SAMPLED.args)
    one, many = (
        quiet(SAMPLED.model, SAMPLED.guide, elbo=vfe.FreeEnergy(num_particles=count), every=1) for count in (1, 30)
    )
    for monitor in (one, many):
        pyro.set_rng_seed(1)
        monitor.step(loss, *SAMPLED.args)
    assert np.isnan(one.history.stderr).all()
    pyro.set_rng_seed(1)
    draws = [vfe.FreeEnergy().loss(SAMPLED.model, SAMPLED.guide, *SAMPLED.args) for _ in range(30)]
    assert many.history.stderr[0] == pytest.approx(np.std(draws, ddof=1) / 30**0.5, rel=1e-9)
    assert many.history.free_energy[0] == pytest.approx(np.mean(draws), rel=1e-9)
    assert "±" in str(many.history) and "±" not in str(one.history)


# Nothing is disturbed


@pytest.mark.parametrize(
    ("model", "guide", "args"),
    [(mixture, mixture_guide, (COUNTS,)), (SAMPLED.model, SAMPLED.guide, SAMPLED.args)],
    ids=["exact", "sampled"],
)
def test_losses_parameters_and_random_states_are_those_of_a_run_without_it(model: Any, guide: Any, args: Any) -> None:
    def trained(monitored: bool) -> Any:
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        monitor = quiet(model, guide, every=2, elbo=vfe.FreeEnergy(num_particles=3))
        svi, losses = new_svi(model, guide), []
        for _ in range(11):
            losses.append(svi.step(*args))
            if monitored:
                monitor.step(losses[-1], *args)
        monitor.close()
        assert len(monitor.history) == 7 * monitored
        values = {name: value.detach() for name, value in pyro.get_param_store().items()}
        return losses, values, (torch.rand(2), np.random.rand(), random.random())

    (losses, values, after), (their_losses, their_values, theirs_after) = trained(True), trained(False)
    assert losses == their_losses
    torch.testing.assert_close(values, their_values, rtol=0, atol=0)
    assert torch.equal(after[0], theirs_after[0]) and after[1:] == theirs_after[1:]


def test_a_reading_between_backward_and_update_leaves_gradients_and_graphs() -> None:
    with pyro.settings.context(module_local_params=True):
        model, guide = MixtureModule(), RecognitionModule()
        module = vfe.FreeEnergy()(model, guide)
        first = module(POINTS)
        monitor = quiet(model, guide, every=1)
        monitor.step(first, POINTS)
        first.backward()
        gradients = [parameter.grad.clone() for parameter in module.parameters()]
        monitor.step(first, POINTS)
        for parameter, gradient in zip(module.parameters(), gradients, strict=True):
            assert torch.equal(parameter.grad, gradient)
        assert not list(pyro.get_param_store().keys())
    assert monitor.history.free_energy.tolist() == pytest.approx([first.item()] * 2, rel=1e-12)


@pytest.mark.parametrize("local", [True, False])
def test_a_loop_over_modules_with_a_torch_optimiser_is_read_as_it_trains(local: bool) -> None:
    def trained(monitor: Any) -> list[float]:
        pyro.clear_param_store()
        model, guide = MixtureModule(), RecognitionModule()
        module = vfe.FreeEnergy()(model, guide)
        module(POINTS)
        optim, losses = torch.optim.Adam(module.parameters(), lr=0.05), []
        watch = monitor(model, guide)
        for _ in range(12):
            optim.zero_grad()
            loss = module(POINTS)
            loss.backward()
            optim.step()
            watch.step(loss, POINTS)
            losses.append(loss.item())
        watch.close()
        histories.append(watch.history)
        return losses

    histories: list[History] = []
    with pyro.settings.context(module_local_params=local):
        often = trained(lambda model, guide: quiet(model, guide, every=1))
        seldom = trained(lambda model, guide: quiet(model, guide, every=100))
    assert often == seldom
    np.testing.assert_allclose(histories[0].free_energy[:-1], often[1:], rtol=1e-10)
    assert histories[1].iteration.tolist() == [1, 12]


class Normed(PyroModule):
    """A guide with a BatchNorm, whose running means move at every call in training mode, and a mean of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2, dtype=torch.float64)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, points: Tensor) -> None:
        self.calls = self.calls + 1
        with pyro.plate("data", len(points)):
            pyro.sample("z", dist.Categorical(logits=self.norm(points)))


@pytest.mark.parametrize("training", [True, False])
def test_buffers_and_modes_of_modules_stay_as_they_are(training: bool) -> None:
    def model(points: Tensor) -> None:
        with pyro.plate("data", len(points)):
            pyro.sample("z", dist.Categorical(simplex("weights", 2)))

    guide = Normed()
    guide.train(training)
    svi = new_svi(model, guide)
    loss = svi.step(POINTS)
    before = {name: buffer.clone() for name, buffer in guide.named_buffers()}
    assert before["calls"] > 0 and bool(before["norm.running_mean"].any()) == training
    monitor = quiet(model, guide, held_out=10 + POINTS, every=1)
    monitor.step(loss, POINTS)
    torch.testing.assert_close(dict(guide.named_buffers()), before, rtol=0, atol=0)
    assert guide.training == training
    assert np.isfinite(monitor.history.gap).all()


# Where F cannot be taken apart


def all_pairs() -> None:
    """Sixteen spins, each coupled with each: F of a mean field needs tables of pairs, the surprise one of all."""
    spins = [pyro.sample(f"z_{i}", dist.Bernoulli(torch.sigmoid(real("field", seed=1)))) for i in range(16)]
    for i, j in combinations(range(16), 2):
        pyro.sample(f"u_{i}_{j}", dist.Normal(spins[i] * spins[j], 1.0), obs=tensor(0.3))


def all_alone() -> None:
    probs = torch.sigmoid(real("q", 16, seed=2))
    for i in range(16):
        pyro.sample(f"z_{i}", dist.Bernoulli(probs[i]))


def test_where_the_sum_is_too_large_F_alone_is_told_and_training_goes_on() -> None:
    elbo = vfe.FreeEnergy(max_bytes=1e4)
    svi, expected = new_svi(all_pairs, all_alone, elbo), []
    with (
        pytest.warns(
            VFEWarning, match=r"After step 1, at the arguments of the step: F cannot be taken apart\. Sum"
        ) as told,
        quiet(all_pairs, all_alone, every=1, elbo=elbo, stop=vfe.GapBelow(1e9)) as monitor,
    ):
        for _ in range(3):
            assert not monitor.step(svi.step())
            expected.append(vfe.FreeEnergy().loss(all_pairs, all_alone))
    assert len(told) == 1
    history = monitor.history
    np.testing.assert_allclose(history.free_energy, expected, rtol=1e-10)
    assert np.isnan(history.surprise).all() and np.isnan(history.gap).all() and np.isnan(history.stderr).all()
    assert "nan" not in str(history)


def test_what_was_refused_is_seldom_tried_again() -> None:
    class Counting(vfe.FreeEnergy):
        tries: tuple[int, ...] = ()

        def decompose(self, *args: Any, **kwargs: Any) -> Any:
            self.tries = (*self.tries, len(monitor.history) + 1)
            if len(self.tries) < 4:
                raise CostError("Too large.", hint="Take less.")
            return super().decompose(*args, **kwargs)

    elbo, svi = Counting(), new_svi()
    monitor = quiet(mixture, mixture_guide, every=1, elbo=elbo)
    with pytest.warns(VFEWarning, match="Too large"):
        for _ in range(13):
            monitor.step(svi.step(COUNTS), COUNTS)
    assert elbo.tries == (1, 3, 6, 11, 12, 13)
    assert np.isnan(monitor.history.gap[:10]).all() and np.isfinite(monitor.history.gap[10:]).all()
    assert np.isfinite(monitor.history.free_energy).all()


def test_where_F_itself_is_too_large_the_loss_stands_for_it() -> None:
    annotated = config_enumerate(all_alone, default="parallel")
    svi = new_svi(all_pairs, annotated, TraceEnum_ELBO(max_plate_nesting=0))
    refusing = vfe.FreeEnergy(max_bytes=1)
    monitor = quiet(all_pairs, annotated, every=1, elbo=refusing)
    held_out = quiet(all_pairs, annotated, every=1, elbo=refusing, held_out=())
    losses = [svi.step() for _ in range(2)]
    for watch, words in ((monitor, "cannot be taken apart"), (held_out, "held-out arguments")):
        with pytest.warns(VFEWarning, match=words):
            for loss in losses:
                watch.step(loss)
    assert monitor.history.free_energy.tolist() == losses
    assert np.isnan(held_out.history.free_energy).all()


def test_a_guide_with_parameters_for_every_datum_has_none_for_held_out_data() -> None:
    guide = vfe.AutoMeanField(mixture)
    svi = new_svi(guide=guide)
    monitor = quiet(mixture, guide, every=1, held_out=COUNTS[:3])
    with pytest.warns(VFEWarning, match="After step 1, at the held-out arguments"):
        for _ in range(3):
            monitor.step(svi.step(COUNTS), COUNTS)
    assert len(monitor.history) == 3
    assert np.isnan(monitor.history.free_energy).all()


def undecided(labels: Tensor) -> None:
    with pyro.plate("data", len(labels)):
        pyro.sample("z", dist.Categorical(simplex("q", 2)))


@pytest.mark.parametrize(
    ("guide", "held_out", "parts", "words"),
    [
        (empty, [3], (np.inf, np.nan), "probability zero"),
        (
            undecided,
            [2],
            (None, np.inf),
            "F is infinite: the guide gives positive probability to data element 0, z = 0",
        ),
    ],
    ids=["impossible_data", "infinite_gap"],
)
def test_held_out_data_at_which_F_is_infinite_are_recorded_as_infinite(
    guide: Any, held_out: list[int], parts: Any, words: str
) -> None:
    def model(labels: Tensor) -> None:
        with pyro.plate("data", len(labels)):
            z = pyro.sample("z", dist.Categorical(simplex("weights", 2)))
            table = tensor([[0.5, 0.5, 0.0, 0.0], [0.9, 0.0, 0.1, 0.0]])
            pyro.sample("u", dist.Categorical(table[z]), obs=labels)

    labels = torch.tensor([0, 0, 0])
    svi = new_svi(model, guide)
    monitor = quiet(model, guide, every=1, held_out=torch.tensor(held_out))
    with pytest.warns(VFEWarning, match=words) as told:
        for _ in range(3):
            monitor.step(svi.step(labels), labels)
    assert len(told) == 1
    history = monitor.history
    surprise, gap = parts
    if surprise is None:
        surprise = oracle(model, empty, torch.tensor(held_out)).terms["surprise"].item()
    assert np.isposinf(history.free_energy).all()
    np.testing.assert_allclose([history.surprise[-1], history.gap[-1]], [surprise, gap])


def test_parameters_that_are_no_numbers_are_recorded_as_such() -> None:
    svi = new_svi()
    loss = svi.step(COUNTS)
    pyro.get_param_store()["rates"] = tensor([1.0, torch.nan, 2.0])
    with pytest.warns(VFEWarning, match="'rates'"), quiet(mixture, mixture_guide, every=1) as monitor:
        monitor.step(loss, COUNTS)
    assert np.isnan(monitor.history.free_energy).all()


def test_an_error_of_the_programs_own_is_raised() -> None:
    svi = new_svi()
    with pytest.raises(TypeError), quiet(mixture, mixture_guide, every=1) as monitor:
        monitor.step(svi.step(COUNTS), COUNTS, 1)


# Callbacks and rules


def test_TensorBoard_holds_what_the_history_does(tmp_path: Path) -> None:
    svi = new_svi()
    with SummaryWriter(tmp_path) as writer:

        def log(step: int, values: dict[str, float]) -> list[None]:
            return [writer.add_scalar(tag, value, step) for tag, value in values.items()]

        with quiet(mixture, mixture_guide, every=2, callback=log) as monitor:
            losses = []
            for _ in range(5):
                losses.append(svi.step(COUNTS))
                assert not monitor.step(losses[-1], COUNTS)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    history = monitor.history
    expected = {
        "free_energy/total": history.free_energy,
        "free_energy/surprise": history.surprise,
        "free_energy/gap": history.gap,
        "free_energy/per_datum": history.per_datum.free_energy,
        "loss": np.array(losses)[[0, 1, 3, 4]],
    }
    assert set(events.Tags()["scalars"]) == set(expected)
    for tag, values in expected.items():
        written = events.Scalars(tag)
        assert [event.step for event in written] == [1, 2, 4, 5] == history.iteration.tolist()
        np.testing.assert_allclose([event.value for event in written], values, rtol=1e-6)


def test_a_callback_gets_plain_floats() -> None:
    kinds: set[type] = set()
    svi = new_svi()
    with quiet(
        mixture, mixture_guide, every=1, callback=lambda step, values: kinds.update(map(type, (step, *values.values())))
    ) as monitor:
        monitor.step(torch.tensor(svi.step(COUNTS), requires_grad=True), COUNTS)
        monitor.step((1.0, 2.0), COUNTS)
    assert kinds == {int, float}


@pytest.mark.parametrize(
    ("answer", "stops"), [(True, True), (np.True_, True), (1, False), ([None], False), ("x", False)]
)
def test_only_True_from_a_callback_asks_for_an_end(answer: Any, stops: bool) -> None:
    svi = new_svi()
    monitor = quiet(mixture, mixture_guide, every=2, callback=lambda step, values: answer)
    assert monitor.step(svi.step(COUNTS), COUNTS) is stops
    assert (monitor.stopped is not None) is stops


def test_a_rule_stops_a_loop_and_keeps_asking_for_the_end() -> None:
    seen: list[int] = []

    def third(history: History) -> str | None:
        seen.append(len(history))
        return "three readings" if len(history) == 3 else None

    svi = new_svi()
    with quiet(mixture, mixture_guide, every=5, stop=[vfe.GapBelow(1e-12), third]) as monitor:
        asked = [monitor.step(svi.step(COUNTS), COUNTS) for _ in range(13)]
    assert asked == [False] * 9 + [True] * 4
    assert monitor.stopped == "three readings"
    assert seen == [1, 2, 3]


def test_a_new_start_forgets_why_it_was_stopped_and_what_rules_have_seen() -> None:
    second = lambda history: "two readings" if len(history) == 2 else None  # noqa: E731
    svi, monitor = new_svi(), quiet(mixture, mixture_guide, every=1, stop=second)
    assert [monitor.step(svi.step(COUNTS), COUNTS) for _ in range(2)] == [False, True]
    monitor.start()
    assert monitor.stopped is None
    assert [monitor.step(svi.step(COUNTS), COUNTS) for _ in range(2)] == [False, True]
    assert len(monitor.history) == 4


def test_the_bar_shows_the_readings_beside_the_count(capsys: pytest.CaptureFixture[str]) -> None:
    svi = new_svi()
    with vfe.Monitor(mixture, mixture_guide, every=2) as monitor:
        for _ in range(3):
            monitor.step(svi.step(COUNTS), COUNTS)
    shown = capsys.readouterr().err.split("\r")[-1]
    last = monitor.history.rows[-1]
    assert "3it" in shown
    assert f"F={last.free_energy:,.4f}, surprise={last.surprise:,.4f}, gap={last.gap:.3g}, loss=" in shown
    quiet(mixture, mixture_guide, every=2).step(svi.step(COUNTS), COUNTS)
    assert capsys.readouterr().err == ""


# What is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": 0}, "every=0"),
        ({"every": 2.5}, "every=2.5"),
        ({"every": True}, "every=True"),
        ({"elbo": TraceEnum_ELBO()}, "a TraceEnum_ELBO as elbo="),
        ({"stop": 0.1}, "no stop rule"),
        ({"stop": vfe.GapBelow}, "no stop rule"),
        ({"stop": [vfe.Settled(), None]}, "no stop rule"),
    ],
    ids=["no steps", "half a step", "a truth", "another elbo", "a number", "a class", "nothing in a list"],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(VFEError, match=words):
        vfe.Monitor(mixture, mixture_guide, **options)


@pytest.mark.parametrize("loss", [COUNTS, None, "1.0"])
def test_a_loss_that_is_none_is_refused(loss: Any) -> None:
    monitor = quiet(mixture, mixture_guide)
    with pytest.raises(VFEError, match=r"monitor.step\(svi.step\(u\), u\)"):
        monitor.step(loss, COUNTS)
    assert len(monitor.history) == 0
