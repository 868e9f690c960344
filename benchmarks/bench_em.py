"""EM: an iteration beside scikit-learn's and hmmlearn's, what its history costs, and its memory on batches."""

from collections.abc import Callable, Mapping

import pytest
from contest import FASTEST, Case, Contestant, peak_ratio, ratio

Sizes = Mapping[str, int]

MIXTURE = {"size": 100_000, "components": 10, "dims": 8}
CHAINS = {
    "256x100x8": {"sequences": 256, "steps": 100, "states": 8},
    "64x1000x32": {"sequences": 64, "steps": 1000, "states": 32},
}
ITERATIONS = 6
"""How many iterations a call does; timed is the mean of all but the first."""


def ours(function: str, program: str, sizes: Sizes) -> Contestant:
    """A run of EM, or its phases without a history."""
    arguments = {"program": program, "sizes": tuple(sizes.values()), "iterations": ITERATIONS}
    return Contestant("contestants.em_vfe", function, arguments)


def of_mixture(sizes: Sizes) -> Case:
    """Against scikit-learn, with pomegranate beside it, all in float64."""
    arguments = {**sizes, "iterations": ITERATIONS}
    peers = {"scikit-learn": Contestant("contestants.em_mixtures", "scikit_learn", arguments)}
    precise = {**arguments, "precision": "float64"}
    beside = {"pomegranate": Contestant("contestants.em_mixtures", "pomegranate", precise)}
    return Case(ours("run", "mixture", sizes), peers, {"scikit-learn": (ratio(0.7),)}, beside)


def of_chain(sizes: Sizes) -> Case:
    """Against the faster of hmmlearn's two implementations."""
    peers = {
        f"hmmlearn {name}": Contestant(
            "contestants.em_hmmlearn", "iterations", {**sizes, "implementation": name, "iterations": ITERATIONS}
        )
        for name in ("scaling", "log")
    }
    return Case(ours("run", "chain", sizes), peers, {FASTEST: (ratio(1.0),)})


def of_history(program: str, sizes: Sizes) -> Case:
    """A run, which writes F, surprise and gap after every phase, beside its phases alone."""
    peers = {"its phases alone": ours("phases", program, sizes)}
    return Case(ours("run", program, sizes), peers, {FASTEST: (ratio(1.05),)})


def of_batches(size: int) -> Contestant:
    """One pass over batches that are made as they are read."""
    return Contestant("contestants.em_vfe", "batches", {**MIXTURE, "size": size})


CASES = {
    "EM iteration, Gaussian mixture N=100,000 K=10 D=8": of_mixture(MIXTURE),
    **{f"EM iteration, MarkovChain {name}": of_chain(sizes) for name, sizes in CHAINS.items()},
    "EM history, Gaussian mixture N=100,000 K=10 D=8": of_history("mixture", MIXTURE),
    **{f"EM history, MarkovChain {name}": of_history("chain", sizes) for name, sizes in CHAINS.items()},
    "EM on batches, ten times the data: N=1,000,000": Case(
        of_batches(1_000_000), {"N=100,000": of_batches(100_000)}, {FASTEST: (peak_ratio(1.1),)}, alike=False
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_em(contest: Callable[[str, Case], None], case: str) -> None:
    """Log evidence before the last M-phase, and parameters after it."""
    contest(case, CASES[case])
