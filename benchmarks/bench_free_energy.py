"""A gradient step and a decomposition, beside TraceEnum_ELBO's step (or our own loss) on the same program and data."""

from collections.abc import Callable

import pytest
from contest import Case, Contestant, ratio

PROGRAMS = {
    "Gaussian mixture N=100,000 K=10 D=8": ("mixture", (100_000, 10, 8)),
    "Python-loop HMM 64x300x32": ("loop", (64, 300, 32)),
    "Python-loop HMM 256x100x8": ("loop", (256, 100, 8)),
    "Python-loop HMM 64x1000x32": ("loop", (64, 1000, 32)),
    "10 sites": ("small", (5,)),
}
STEPS = {
    "Python-loop HMM 64x300x32": 0.5,
    "Python-loop HMM 256x100x8": 1 / 8,
    "Python-loop HMM 64x1000x32": 1 / 10,
    "10 sites": 1.5,
}
DECOMPOSITIONS = ("Gaussian mixture N=100,000 K=10 D=8", "Python-loop HMM 64x300x32", "10 sites")


def contestant(function: str, program: str) -> Contestant:
    """What is done with a program."""
    kind, sizes = PROGRAMS[program]
    return Contestant("contestants.steps", function, {"program": kind, "sizes": sizes})


@pytest.mark.parametrize("program", STEPS)
def test_step(contest: Callable[[str, Case], None], program: str) -> None:
    """Loss and gradients."""
    peers = {"Pyro": contestant("pyros", program)}
    contest(f"Step, {program}", Case(contestant("ours", program), peers, {"Pyro": (ratio(STEPS[program]),)}))


@pytest.mark.parametrize("program", DECOMPOSITIONS)
def test_decomposition(contest: Callable[[str, Case], None], program: str) -> None:
    """All the terms of F, in float64, beside F alone."""
    peers = {"our loss": contestant("our_loss", program)}
    case = Case(contestant("our_decomposition", program), peers, {"our loss": (ratio(2.0),)})
    contest(f"Decomposition, {program}", case)
