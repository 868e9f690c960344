"""The E-step of hidden Markov models: log evidence and all expected counts."""

from collections.abc import Callable

import pytest
from contest import FASTEST, Case, Contestant, peak_gibibytes, ratio

Sizes = tuple[int, int, int]

PEERS = {
    "hmmlearn scaling": ("hmmlearn_chains", "e_step", {"implementation": "scaling"}),
    "hmmlearn log": ("hmmlearn_chains", "e_step", {"implementation": "log"}),
    "dynamax": ("dynamax_chains", "e_step", {}),
    "NumPyro, forward recursion": ("numpyro_chains", "forward", {}),
    "NumPyro, enumerated": ("numpyro_chains", "enumerated", {}),
}


def ours(sizes: Sizes, function: str = "program") -> Contestant:
    """The program with a MarkovChain, or the engine alone."""
    return Contestant("contestants.vfe_chains", function, _named(sizes))


def peers(sizes: Sizes, *names: str) -> dict[str, Contestant]:
    """Peers by name."""
    return {
        name: Contestant(f"contestants.{module}", function, {**_named(sizes), **extra})
        for name, (module, function, extra) in PEERS.items()
        if name in names or not names
    }


def _named(sizes: Sizes) -> dict[str, int]:
    return dict(zip(("sequences", "steps", "states"), sizes, strict=True))


def _e_step(sizes: Sizes, limit: float) -> Case:
    return Case(ours(sizes), peers(sizes), {FASTEST: (ratio(limit),)}, {"the engine alone": ours(sizes, "engine")})


def _twice(sizes: Sizes, half: Sizes) -> Case:
    return Case(ours(sizes), {"half of it": ours(half)}, {FASTEST: (ratio(2.3),)}, alike=False)


MILLION = (1, 1_000_000, 4)
CASES = {
    "E-step 256x100x8": _e_step((256, 100, 8), 0.5),
    "E-step 64x1000x32": _e_step((64, 1000, 32), 0.5),
    "E-step 1x20,000x8": _e_step((1, 20_000, 8), 1.0),
    "E-step 1x1,000,000x4": Case(
        ours(MILLION),
        peers(MILLION, "hmmlearn scaling", "hmmlearn log", "dynamax"),
        {"hmmlearn scaling": (ratio(2.0), peak_gibibytes(2.0))},
        {"the engine alone": ours(MILLION, "engine")},
    ),
    "E-step, twice the steps: 64x2000x8": _twice((64, 2000, 8), (64, 1000, 8)),
    "E-step, twice the steps: 1x40,000x8": _twice((1, 40_000, 8), (1, 20_000, 8)),
    "E-step, twice the sequences: 1024x100x8": _twice((1024, 100, 8), (512, 100, 8)),
}


@pytest.mark.parametrize("case", CASES)
def test_e_step(contest: Callable[[str, Case], None], case: str) -> None:
    """Log evidence and expected counts of one set of parameters."""
    contest(case, CASES[case])
