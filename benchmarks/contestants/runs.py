"""The enumerated run of a Pyro program, and the same code under Pyro with its latents set to their supports."""

from collections.abc import Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from worker import Prepared

from contestants.programs import empty, hidden_markov, small_chain, unlike_sites
from pyro_vfe.program.programs import Programs

PROGRAMS = {"loop": hidden_markov, "small": small_chain, "unlike": unlike_sites}


def ours(program: str, sizes: list[int]) -> Prepared:
    """Every site's table, from a run that was laid out before."""
    programs, model = Programs(check=False), PROGRAMS[program](*sizes)
    return Prepared(lambda: programs.enumerate(model, empty, (), {}), lambda _: {})


def alone(program: str, sizes: list[int]) -> Prepared:
    """The program's own code."""
    model = PROGRAMS[program](*sizes)
    supports = _Supports(Programs(check=False).layout(model, empty, (), {}).dims)

    def call() -> None:
        with supports:
            model()

    return Prepared(call, lambda _: {})


class _Supports(Messenger):
    """Sets each Categorical latent to its support along its dim, and does nothing else."""

    def __init__(self, dims: Mapping[str, int]) -> None:
        super().__init__()
        self._dims = dims

    def _pyro_sample(self, msg: Any) -> None:
        dim = self._dims.get(msg["name"])
        if msg["is_observed"] or dim is None:
            return
        size = msg["fn"].enumerate_support(expand=False).numel()
        msg["value"] = torch.arange(size).reshape((size,) + (1,) * (-dim - 1))
        msg["done"] = True
