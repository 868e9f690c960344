"""A Gaussian mixture with diagonal covariances: one gradient step, or one iteration of EM."""

from collections.abc import Callable

from contest import Case, Contestant, ratio

SIZES = {"size": 100_000, "components": 10, "dims": 8}
ARGUMENTS = {"program": "mixture", "sizes": tuple(SIZES.values())}


def test_mixture(contest: Callable[[str, Case], None]) -> None:
    """The full gradient, from all data."""
    numpyro = ("contestants.numpyro_mixtures", SIZES)
    peers = {
        "Pyro": Contestant("contestants.steps", "pyros", ARGUMENTS),
        "NumPyro, MixtureSameFamily": Contestant(numpyro[0], "marginal", SIZES),
        "NumPyro, enumerated": Contestant(numpyro[0], "enumerated", SIZES),
    }
    beside = {
        "scikit-learn, an EM iteration": Contestant("contestants.em_mixtures", "scikit_learn", SIZES),
        "pomegranate, an EM iteration": Contestant("contestants.em_mixtures", "pomegranate", SIZES),
    }
    one = (ratio(1.0),)
    targets = {"Pyro": (ratio(0.6),), "NumPyro, MixtureSameFamily": one, "NumPyro, enumerated": one}
    ours = Contestant("contestants.steps", "ours", ARGUMENTS)
    contest("Step, Gaussian mixture N=100,000 K=10 D=8", Case(ours, peers, targets, beside))
