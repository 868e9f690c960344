"""The Helmholtz machine of digits in examples/, small: its formulas, and what its histories must have in common."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyro
import pytest
import torch
import torch.distributions as td

from examples import helmholtz_digits as example

close = torch.testing.assert_close


@pytest.fixture
def digits() -> Iterator[example.Digits]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    every = example.binary_digits()
    yield replace(
        every, trained=every.trained[:100], held_out=every.held_out[:30], held_out_labels=every.held_out_labels[:30]
    )
    torch.set_default_dtype(before)
    pyro.clear_param_store()


def with_large_weights(machine: example.Machine) -> example.Machine:
    """The same with weights that make units depend on each other."""
    with torch.no_grad():
        for program in (machine.generative, machine.recognition):
            for parameter in program.parameters():
                parameter.copy_(1.5 * torch.randn(parameter.shape))
    return machine


def test_F_and_surprise_are_those_of_the_formulas(digits: example.Digits) -> None:
    machine = with_large_weights(example.start(digits))
    free_energy, surprise = example.by_hand(machine, digits.held_out.numpy())
    terms = machine.decompose(digits.held_out).by("digits")
    np.testing.assert_allclose(terms.free_energy, free_energy, rtol=1e-10)
    np.testing.assert_allclose(terms.surprise, surprise, rtol=1e-10)


def test_the_log_probability_of_a_dream_is_its_layers(digits: example.Digits) -> None:
    machine = with_large_weights(example.start(digits))
    dream = example.vfe.dream(machine.generative, digits.held_out)
    top, middle, pixels = dream.latents["top"], dream.latents["middle"], dream.observations["pixels"]
    up, down = machine.recognition, machine.generative
    layers = {
        down: [(down.to_top.expand_as(top), top), (down.to_middle(top), middle), (down.to_pixels(middle), pixels)],
        up: [(up.from_pixels(pixels), middle), (up.from_middle(middle), top)],
    }
    for program, pairs in layers.items():
        log_prob = sum(td.Bernoulli(logits=logits).log_prob(units).sum().item() for logits, units in pairs)
        assert example.log_prob(program, dream) == pytest.approx(log_prob, rel=1e-12)


def test_sleep_moves_the_gap_alone(digits: example.Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "NUM_READINGS", 3)
    history = example.by_wake_sleep("wake-sleep", digits, num_steps=3).history
    asleep = np.array(history.phase) == "sleep"
    np.testing.assert_array_equal(history.d_surprise[asleep], 0)
    assert np.all(history.d_gap[asleep] != 0)


def test_all_ways_of_learning_start_from_the_same_machine(digits: example.Digits) -> None:
    first = example.by_wake_sleep("wake-sleep", digits, num_steps=1).history.rows[0]
    second = example.by_wake_sleep("reweighted wake-sleep", digits, num_steps=1, reweighted=True).history.rows[0]
    exact = example.start(digits).decompose(digits.held_out)
    assert first.free_energy == second.free_energy == pytest.approx(float(exact.free_energy), rel=1e-12)


def test_sleep_alone_leaves_the_machine_that_it_is_shown_as_it_is(digits: example.Digits) -> None:
    machine = with_large_weights(example.start(digits))
    before = machine.decompose(digits.trained)
    asleep = example.sleep_alone(machine, digits, (0, 30))
    assert asleep[0].gap == pytest.approx(float(before.gap) / len(digits.trained), rel=1e-10)
    assert asleep[-1].divergence < asleep[0].divergence
    close(machine.decompose(digits.trained).free_energy, before.free_energy)
