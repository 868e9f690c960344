"""EM: an iteration beside scikit-learn's and hmmlearn's, what a run adds to its phases, and memory on batches."""

from collections.abc import Callable, Mapping

import pytest
from contest import FASTEST, Case, Contestant, peak_ratio, ratio

Sizes = Mapping[str, int]

MIXTURE = {"size": 100_000, "components": 10, "dims": 8}
CHAINS = {
    "256x100x8": {"sequences": 256, "steps": 100, "states": 8},
    "64x1000x32": {"sequences": 64, "steps": 1000, "states": 32},
}
ITERATIONS = 10


def ours(function: str, program: str, sizes: Sizes, iterations: int) -> Contestant:
    """EM's phases alone, or a run of them."""
    arguments = {"program": program, "sizes": tuple(sizes.values()), "iterations": iterations}
    return Contestant("contestants.em_vfe", function, arguments)


def of_mixture(function: str, sizes: Sizes = MIXTURE, iterations: int = 1) -> Case:
    """Against scikit-learn, with pomegranate beside it, in float64 all."""
    arguments = {**sizes, "iterations": iterations}
    peers = {"scikit-learn": Contestant("contestants.em_mixtures", "scikit_learn", arguments)}
    precise = {**arguments, "precision": "float64"}
    beside = {"pomegranate": Contestant("contestants.em_mixtures", "pomegranate", precise)}
    return Case(ours(function, "mixture", sizes, iterations), peers, {"scikit-learn": (ratio(0.7),)}, beside)


def of_chain(function: str, sizes: Sizes, iterations: int = 1) -> Case:
    """Against hmmlearn's faster implementation."""
    peers = {
        f"hmmlearn {name}": Contestant(
            "contestants.em_hmmlearn", "iteration", {**sizes, "implementation": name, "iterations": iterations}
        )
        for name in ("scaling", "log")
    }
    return Case(ours(function, "chain", sizes, iterations), peers, {FASTEST: (ratio(1.0),)})


def of_history(program: str, sizes: Sizes) -> Case:
    """A run, which writes F, surprise and gap after every phase, beside its phases alone."""
    peers = {"its phases alone": ours("phases", program, sizes, ITERATIONS)}
    return Case(ours("run", program, sizes, ITERATIONS), peers, {FASTEST: (ratio(1.05),)})


def of_batches(size: int) -> Contestant:
    """One pass over batches that are made as they are read."""
    return Contestant("contestants.em_vfe", "batches", {**MIXTURE, "size": size})


SMALL_CHAIN, LARGE_CHAIN = CHAINS.values()
CASES = {
    "EM iteration, Gaussian mixture N=100,000 K=10 D=8": of_mixture("phases"),
    "EM iteration, MarkovChain 256x100x8": of_chain("phases", SMALL_CHAIN),
    "EM iteration, MarkovChain 64x1000x32": of_chain("phases", LARGE_CHAIN),
    "EM run of 10 iterations, Gaussian mixture N=100,000 K=10 D=8": of_mixture("run", iterations=ITERATIONS),
    "EM run of 10 iterations, MarkovChain 256x100x8": of_chain("run", SMALL_CHAIN, ITERATIONS),
    "EM run of 10 iterations, MarkovChain 64x1000x32": of_chain("run", LARGE_CHAIN, ITERATIONS),
    "EM history, Gaussian mixture N=100,000 K=10 D=8": of_history("mixture", MIXTURE),
    "EM history, MarkovChain 256x100x8": of_history("chain", SMALL_CHAIN),
    "EM on batches, ten times the data: N=1,000,000": Case(
        of_batches(1_000_000), {"N=100,000": of_batches(100_000)}, {FASTEST: (peak_ratio(1.1),)}, alike=False
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_em(contest: Callable[[str, Case], None], case: str) -> None:
    """Log evidence before the last M-phase and parameters after it."""
    contest(case, CASES[case])
