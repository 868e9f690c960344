"""The example of the bars: its entropy and its machine's terms by sums written out, and what a few steps do to F."""

from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from itertools import product
from math import log

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import pyro_vfe as vfe
from examples import helmholtz_bars as example

close = torch.testing.assert_close

FEW = 20
METHODS = tuple(example.RATES)


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    """The example sets it as it starts."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def ways_to_be_drawn() -> Counter[bytes]:
    """The probability of each image, in 2 * 10^4ths: three tenths of the draws of a bar are on."""
    ways: Counter[bytes] = Counter()
    for bars in product([0] * 7 + [1] * 3, repeat=example.SIDE):
        rows = np.tile(np.array(bars, dtype=np.int8)[:, None], (1, example.SIDE))
        ways.update([rows.tobytes(), rows.T.tobytes()])
    return ways


def log_bernoulli(value: Tensor, logits: Tensor) -> Tensor:
    return (value * logsigmoid(logits) + (1 - value) * logsigmoid(-logits)).sum(-1)


def terms_written_out(machine: example.Machine, data: example.Bars) -> tuple[Tensor, Tensor]:
    """F and surprise per image, by the sum over all 2 * 2^8 values of the latents."""
    down, up = machine.generative, machine.recognition
    hidden = torch.tensor(list(product((0.0, 1.0), repeat=example.NUM_HIDDEN)))
    free_energy, evidence = torch.zeros(len(data.images)), torch.zeros(len(data.images))
    for top in torch.eye(2)[:, 1:]:
        prior = log_bernoulli(top, down.top) + log_bernoulli(hidden, down.hidden(top))
        log_joint = prior + log_bernoulli(data.images[:, None], down.u(hidden))
        log_q = log_bernoulli(hidden, up.hidden(data.images)[:, None]) + log_bernoulli(top, up.top(hidden))
        free_energy = free_energy + (log_q.exp() * (log_q - log_joint)).sum(-1)
        evidence = evidence + log_joint.exp().sum(-1)
    return data.probs @ free_energy, -data.probs @ evidence.log()


def test_the_images_and_their_entropy_are_those_of_all_draws_counted() -> None:
    data, ways = example.bars(), ways_to_be_drawn()
    total = sum(ways.values())
    assert len(data.images) == len(ways) == 30
    for image, prob in zip(data.images.numpy().astype(np.int8), data.probs.tolist(), strict=True):
        assert prob == pytest.approx(float(Fraction(ways[image.tobytes()], total)), rel=1e-12)
    assert data.entropy == pytest.approx(-sum(n / total * log(n / total) for n in ways.values()), rel=1e-12)


def test_fresh_images_come_as_often_as_they_should() -> None:
    torch.manual_seed(0)
    data = example.bars()
    drawn = data.drawn(40_000)
    frequencies = (drawn[:, None] == data.images).all(-1).double().mean(0)
    errors = (data.probs * (1 - data.probs) / len(drawn)).sqrt()
    assert ((frequencies - data.probs).abs() < 5 * errors).all()
    assert [len(batch) for batch in data.batches(3)] == 3 * [example.BATCH]


@pytest.mark.parametrize("method", METHODS)
def test_F_and_surprise_are_expectations_over_images_and_F_has_fallen(method: str) -> None:
    data, machine = example.bars(), example.Machine()
    with torch.no_grad():
        free_energy, _ = terms_written_out(machine, data)
    one, run = example.learn(method, data, FEW)
    history = run.history
    first = run.losses[0] if method == "descent on F" else history.free_energy[0]
    assert first == pytest.approx(float(free_energy), rel=1e-9)
    assert one.terms.free_energy < free_energy
    assert history.free_energy[-1] == pytest.approx(float(one.terms.free_energy), rel=1e-9)
    close(one.terms.free_energy, one.terms.surprise + one.terms.gap)
    assert 0 < one.model_excess < one.excess
    kl_divergence = (data.probs * (data.probs / one.image_probs).log()).sum()
    assert one.model_excess == pytest.approx(float(kl_divergence), rel=1e-9)


def test_terms_of_a_machine_are_those_written_out() -> None:
    data, machine = example.bars(), example.Machine()
    with torch.no_grad():
        for values in [*machine.generative.parameters(), *machine.recognition.parameters()]:
            values.normal_()
        free_energy, surprise = terms_written_out(machine, data)
    terms = vfe.FreeEnergy().decompose(machine.model, machine.guide, data.images, data.probs)
    close(terms.free_energy, free_energy)
    close(terms.surprise, surprise)
    assert terms.gap > 1


def test_a_second_run_ends_where_the_first_did() -> None:
    data = example.bars()
    for method in METHODS:
        one, other = (example.learn(method, data, 5)[0] for _ in range(2))
        assert one.terms.free_energy == other.terms.free_energy
        assert (one.dreams == other.dreams).all()


def test_a_sleep_phase_leaves_the_surprise_and_a_wake_phase_lowers_F() -> None:
    _, run = example.learn("wake-sleep", example.bars(), FEW)
    history = run.history
    asleep, awake = (np.array(history.phase) == phase for phase in ("sleep", "wake"))
    np.testing.assert_allclose(history.d_surprise[asleep], 0, atol=1e-12)
    assert history.d_free_energy[awake].sum() < 0
    assert example.rises_in_sleep(run) == ((history.d_gap[asleep] > 0).sum(), FEW)


def test_the_machine_that_is_written_down_loses_one_bit_on_one_image_alone() -> None:
    data, machine = example.bars(), example.written_down()
    with torch.no_grad():
        free_energy, surprise = terms_written_out(machine, data)
    assert float(surprise) == pytest.approx(data.entropy, abs=1e-6)
    assert float(free_energy - surprise) == pytest.approx(example.ON**example.SIDE * log(2), abs=1e-6)
    one = example.score("written down", machine, data)
    gaps = vfe.FreeEnergy().decompose(machine.model, machine.guide, data.images).by("images").gap
    close(gaps, log(2) * data.images.all(-1), rtol=0, atol=1e-6)
    assert one.bars_dreamt == pytest.approx(1, abs=1e-6)
    known = {tuple(image) for image in data.images.tolist()}
    assert {tuple(image) for image in one.dreams.tolist()} <= known
    close(one.units[1:].round().sum(-1), torch.full((example.NUM_HIDDEN,), 4.0))


def test_the_table_gives_the_whole_excess_away() -> None:
    data = example.bars()
    rows = example.as_table([example.learn(method, data, 3)[0] for method in METHODS]).splitlines()[1:]
    for row in rows:
        *_, models, recognitions, _ = (float(cell.rstrip("%")) for cell in row[22:].split())
        assert models + recognitions == pytest.approx(100, abs=0.11)
