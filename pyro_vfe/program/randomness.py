"""The user's random state: looking at a program must not change what it will draw."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch
from torch import Tensor


@contextmanager
def undisturbed_randomness() -> Iterator[None]:
    """Runs a block whose draws leave the user's random state as it was."""
    python, arrays = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(_devices())):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)


def random_state() -> list[Tensor]:
    """The state of the generators of all devices in use."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in range(_devices()))]


def set_random_state(states: list[Tensor]) -> None:
    """Puts the generators back to where they were."""
    torch.set_rng_state(states[0])
    for device, state in enumerate(states[1:]):
        torch.cuda.set_rng_state(state, device)


def _devices() -> int:
    return torch.cuda.device_count() if torch.cuda.is_initialized() else 0
