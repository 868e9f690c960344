r"""EM by hand, in numpy: every parameter and F after every iteration, from formulas written out for each model.

    E    r_nk  =  p(u_n | k) w_k / p(u_n)          M    parameter  =  sum_n r_nk T(u_n)  /  sum_n r_nk
    F    =  -sum_n log p(u_n)  -  sum log p(parameter)          the second sum: priors, where there are any

Nothing here comes from the library or from torch. scikit-learn and hmmlearn stand beside it, one iteration at a time.

References:
    Dempster, Laird and Rubin (1977), Maximum likelihood from incomplete data via the EM algorithm.
    Baum, Petrie, Soules and Weiss (1970), A maximization technique occurring in the statistical analysis of
    probabilistic functions of Markov chains.
    Do and Batzoglou (2008), What is the expectation maximization algorithm?
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from hmmlearn import hmm
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

Array = NDArray[np.float64]
Values = Mapping[str, Array]
Step = Callable[[Values], tuple[float, Values]]
"""From parameters: F at them, in nats, and the parameters of one iteration later."""


@dataclass(frozen=True)
class Point:
    """Where EM is after some iterations."""

    parameters: Values
    free_energy: float
    """F at these parameters, in nats: the surprise, and -log of the priors' densities."""


def path(step: Step, start: Values, iterations: int) -> list[Point]:
    """Returns the start and the points after each iteration.

    Args:
        step: One iteration.
        start: The parameters to start from.
        iterations: How many.
    """
    points, parameters = [], start
    for _ in range(iterations + 1):
        free_energy, following = step(parameters)
        points.append(Point(parameters, free_energy))
        parameters = following
    return points


def limit(step: Step, start: Values, tolerance: float = 1e-12, most: int = 20_000) -> Point:
    """Returns where EM ends: F changes by less than the tolerance, relative to F."""
    last, parameters = math.inf, start
    for _ in range(most):
        free_energy, following = step(parameters)
        if last - free_energy < tolerance * abs(free_energy):
            return Point(parameters, free_energy)
        last, parameters = free_energy, following
    raise AssertionError(f"EM did not end within {most} iterations.")


def log(probs: Array) -> Array:
    """Returns the log, -inf for the probabilities of zero that EM comes to."""
    with np.errstate(divide="ignore"):
        return np.log(probs)


def log_sum_exp(logs: Array, axis: int) -> Array:
    """Returns the log of a sum of exponentials."""
    largest = logs.max(axis, keepdims=True)
    return np.squeeze(largest, axis) + np.log(np.exp(logs - largest).sum(axis))


def log_factorial(counts: Array) -> Array:
    """Returns log n! for each count."""
    return np.vectorize(math.lgamma)(counts + 1.0)


# Priors: log densities and their modes with counts


def log_dirichlet(probs: Array, concentration: Array) -> float:
    """Returns the sum of log densities of rows of probabilities."""
    rows = np.broadcast_to(concentration, probs.shape).reshape(-1, probs.shape[-1])
    constants = [math.lgamma(row.sum()) - sum(map(math.lgamma, row)) for row in rows]
    return float(sum(constants) + ((rows - 1) * np.log(probs.reshape(rows.shape))).sum())


def log_beta(probs: Array, a: float, b: float) -> float:
    """Returns the sum of log densities of probabilities of yes."""
    constant = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return float((constant + (a - 1) * np.log(probs) + (b - 1) * np.log1p(-probs)).sum())


def log_gamma(rates: Array, shape: float, rate: float) -> float:
    """Returns the sum of log densities of rates."""
    constant = shape * math.log(rate) - math.lgamma(shape)
    return float((constant + (shape - 1) * np.log(rates) - rate * rates).sum())


def log_inverse_gamma(variances: Array, shape: float, scale: float) -> float:
    """Returns the sum of log densities of variances."""
    constant = shape * math.log(scale) - math.lgamma(shape)
    return float((constant - (shape + 1) * np.log(variances) - scale / variances).sum())


def log_normal(x: Array, mean: Array | float, variance: Array | float) -> Array:
    """Returns the log density of each element."""
    return np.asarray(-0.5 * (np.log(2 * np.pi * variance) + (x - mean) ** 2 / variance))


def normalised(counts: Array, concentration: Array | float = 1.0) -> Array:
    """Returns the mode of probabilities over the last axis, under a Dirichlet prior."""
    posterior = counts + concentration - 1.0
    return np.asarray(posterior / posterior.sum(-1, keepdims=True))


# Mixtures: a component for each datum


def responsibilities(weights: Array, log_density: Array) -> tuple[Array, Array]:
    """Returns log p(u_n), shape `(N,)`, and P(k | u_n), shape `(N, K)`."""
    log_joint = log(weights) + log_density
    log_evidence = log_sum_exp(log_joint, -1)
    return log_evidence, np.exp(log_joint - log_evidence[:, None])


def linkage(counts: Array) -> Step:
    """Dempster, Laird and Rubin's first example: the first of four cells is the sum of two.

    Args:
        counts: Of the cells with probabilities 1/2 + t/4, (1 - t)/4, (1 - t)/4, t/4.
    """

    def step(parameters: Values) -> tuple[float, Values]:
        theta = float(parameters["theta"])
        probs = np.array([0.5 + theta / 4, (1 - theta) / 4, (1 - theta) / 4, theta / 4])
        linked = counts[0] * (theta / 4) / (0.5 + theta / 4) + counts[3]
        return -float(counts @ np.log(probs)), {"theta": np.asarray(linked / (linked + counts[1] + counts[2]))}

    return step


def coins(heads: Array, tosses: int) -> Step:
    """Which of several equally probable coins was tossed in each set is unknown."""
    choices = np.array([math.comb(tosses, int(n)) for n in heads])

    def step(parameters: Values) -> tuple[float, Values]:
        probs = parameters["probs"]
        density = choices[:, None] * probs ** heads[:, None] * (1 - probs) ** (tosses - heads[:, None])
        total = density.mean(-1)
        share = density / density.sum(-1, keepdims=True)
        return -float(np.log(total).sum()), {"probs": heads @ share / (tosses * share.sum(0))}

    return step


def poisson_mixture(counts: Array, gamma: tuple[float, float] | None = None, concentration: float = 1.0) -> Step:
    """A mixture of Poissons; with a Gamma prior (shape, rate) on rates and a Dirichlet prior on weights, or without."""
    shape, rate = gamma or (1.0, 0.0)

    def step(parameters: Values) -> tuple[float, Values]:
        weights, rates = parameters["weights"], parameters["rates"]
        log_density = counts[:, None] * np.log(rates) - rates - log_factorial(counts)[:, None]
        log_evidence, share = responsibilities(weights, log_density)
        priors = 0.0 if gamma is None else log_gamma(rates, *gamma)
        priors += log_dirichlet(weights, np.asarray(concentration)) if concentration != 1.0 else 0.0
        new = {
            "weights": normalised(share.sum(0), concentration),
            "rates": (share.T @ counts + shape - 1) / (share.sum(0) + rate),
        }
        return -float(log_evidence.sum()) - priors, new

    return step


def latent_classes(
    answers: Array, counts: Array, *, seen: Array | None = None, beta: tuple[float, float] | None = None
) -> Step:
    """Latent classes: within a class the answers are independent.

    Args:
        answers: 0 or 1, shape `(P, J)`; anything where not seen.
        counts: How often each pattern was given, shape `(P,)`.
        seen: Which answers there are, shape `(P, J)`; all by default.
        beta: The prior (a, b) of each probability of a 1; None for none.
    """
    here = np.ones_like(answers) if seen is None else seen.astype(float)
    ones = np.where(here > 0, answers, 0.0)
    a, b = beta or (1.0, 1.0)

    def step(parameters: Values) -> tuple[float, Values]:
        weights, probs = parameters["weights"], parameters["probs"]
        log_density = ones @ np.log(probs).T + (here - ones) @ np.log1p(-probs).T
        log_evidence, share = responsibilities(weights, log_density)
        share = share * counts[:, None]
        new = {"weights": normalised(share.sum(0)), "probs": (share.T @ ones + a - 1) / (share.T @ here + a + b - 2)}
        prior = 0.0 if beta is None else log_beta(probs, a, b)
        return -float(counts @ log_evidence) - prior, new

    return step


def diagonal_mixture(points: Array, *, tied: bool = False) -> Step:
    """A mixture of Gaussians with independent dims, of which each datum may lack some (NaN).

    Args:
        points: Shape `(N, D)`.
        tied: Whether all components have the same scales, shape `(D,)`; else `(K, D)`.
    """
    seen = ~np.isnan(points)
    here, x = seen.astype(float), np.where(seen, points, 0.0)

    def step(parameters: Values) -> tuple[float, Values]:
        loc, scale = parameters["loc"], parameters["scale"]
        elements = np.where(seen[:, None], log_normal(x[:, None], loc, scale**2), 0.0)
        log_evidence, share = responsibilities(parameters["weights"], elements.sum(-1))
        count = share.T @ here
        new_loc = share.T @ x / count
        squares = np.einsum("nk,nkd->kd", share, seen[:, None] * (x[:, None] - new_loc) ** 2)
        variance = squares.sum(0) / count.sum(0) if tied else squares / count
        new = {"weights": normalised(share.sum(0)), "loc": new_loc, "scale": np.sqrt(variance)}
        return -float(log_evidence.sum()), new

    return step


def known_scale_mixture(points: Array, scale: float, prior: tuple[float, float]) -> Step:
    """A mixture of Normals on the line with one known scale and a Normal prior (loc, scale) on the means."""
    loc, spread = prior

    def step(parameters: Values) -> tuple[float, Values]:
        means = parameters["means"]
        log_evidence, share = responsibilities(parameters["weights"], log_normal(points[:, None], means, scale**2))
        precision = share.sum(0) / scale**2 + 1 / spread**2
        new = (share.T @ points / scale**2 + loc / spread**2) / precision
        log_prior = float(log_normal(means, loc, spread**2).sum())
        return -float(log_evidence.sum()) - log_prior, {"weights": normalised(share.sum(0)), "means": new}

    return step


# Hidden Markov models: Baum and Welch


@dataclass(frozen=True)
class Emission:
    """What a state emits: its log density, and new parameters from P(z_t = k | u)."""

    log_density: Callable[[Values], Array]
    """Shape `(B, T, K)`, zero where nothing is seen."""
    update: Callable[[Array], Values]


def poisson_emission(counts: Array, seen: Array | None = None) -> Emission:
    """Poisson counts, shape `(B, T)`, some of them missing."""
    here = np.ones(counts.shape, bool) if seen is None else seen
    x = np.where(here, counts, 0.0)

    def log_density(parameters: Values) -> Array:
        rates = parameters["rates"]
        return np.where(here[..., None], x[..., None] * np.log(rates) - rates - log_factorial(x)[..., None], 0.0)

    def update(share: Array) -> Values:
        share = share * here[..., None]
        return {"rates": np.einsum("btk,bt->k", share, x) / share.sum((0, 1))}

    return Emission(log_density, update)


def gaussian_emission(points: Array, seen: Array | None = None) -> Emission:
    """Gaussian points with independent dims, shape `(B, T, D)`, some of them missing."""
    here = np.ones(points.shape[:2], bool) if seen is None else seen
    x = np.where(here[..., None], points, 0.0)

    def log_density(parameters: Values) -> Array:
        elements = log_normal(x[..., None, :], parameters["loc"], parameters["scale"] ** 2)
        return np.where(here[..., None], elements.sum(-1), 0.0)

    def update(share: Array) -> Values:
        share = share * here[..., None]
        count = share.sum((0, 1))[:, None]
        loc = np.einsum("btk,btd->kd", share, x) / count
        variance = np.einsum("btk,btkd->kd", share, (x[..., None, :] - loc) ** 2) / count
        return {"loc": loc, "scale": np.sqrt(variance)}

    return Emission(log_density, update)


def baum_welch(emission: Emission, lengths: NDArray[np.int64] | None = None) -> Step:
    """A hidden Markov model of several sequences.

    Args:
        emission: What the states emit.
        lengths: How many steps each sequence has; all by default.
    """

    def step(parameters: Values) -> tuple[float, Values]:
        log_density = emission.log_density(parameters)
        initial, transition = parameters["initial"], parameters["transition"]
        start, moves, share, total = np.zeros_like(initial), np.zeros_like(transition), np.zeros_like(log_density), 0.0
        for b, own in enumerate(log_density):
            steps = len(own) if lengths is None else int(lengths[b])
            log_evidence, states, pairs = forward_backward(initial, transition, own[:steps])
            total, start, moves = total + log_evidence, start + states[0], moves + pairs
            share[b, :steps] = states
        return -total, {"initial": normalised(start), "transition": normalised(moves), **emission.update(share)}

    return step


def forward_backward(initial: Array, transition: Array, log_density: Array) -> tuple[float, Array, Array]:
    """Returns log p(u), P(z_t = k | u) of shape `(T, K)`, and the expected numbers of moves, shape `(K, K)`."""
    log_move = log(transition)
    forward, backward = np.empty_like(log_density), np.zeros_like(log_density)
    forward[0] = log(initial) + log_density[0]
    for t in range(1, len(log_density)):
        forward[t] = log_sum_exp(forward[t - 1][:, None] + log_move, 0) + log_density[t]
    for t in range(len(log_density) - 1, 0, -1):
        backward[t - 1] = log_sum_exp(log_move + log_density[t] + backward[t], 1)
    log_evidence = float(log_sum_exp(forward[-1], 0))
    ahead = (log_density + backward)[1:, None, :]
    pairs = np.exp(forward[:-1, :, None] + log_move + ahead - log_evidence)
    return log_evidence, np.exp(forward + backward - log_evidence), pairs.sum(0)


# scikit-learn and hmmlearn, one iteration at a time


def scikit_learn_mixture(points: Array, covariance_type: str) -> Step:
    """`GaussianMixture.fit` without regularisation; `covariance` holds variances `(K, D)` for "diag", else matrices."""

    def step(parameters: Values) -> tuple[float, Values]:
        covariance = parameters["covariance"]
        model = GaussianMixture(
            len(parameters["weights"]),
            covariance_type=covariance_type,
            weights_init=parameters["weights"],
            means_init=parameters["loc"],
            precisions_init=1 / covariance if covariance_type == "diag" else np.linalg.inv(covariance),
            init_params="random_from_data",
            max_iter=1,
            tol=0.0,
            reg_covar=0.0,
            random_state=0,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(points)
        new = {"weights": model.weights_, "loc": model.means_, "covariance": model.covariances_}
        return -len(points) * float(model.lower_bounds_[0]), new

    return step


@dataclass(frozen=True)
class Peer:
    """A model of hmmlearn: how its attributes are called here, and how a setting is given to it."""

    make: Callable[..., Any]
    names: Mapping[str, str]
    """Its attribute for each of our parameters."""


PEERS = {
    "diag": Peer(hmm.GaussianHMM, {"loc": "means_", "covariance": "_covars_"}),
    "full": Peer(hmm.GaussianHMM, {"loc": "means_", "covariance": "_covars_"}),
    "tied": Peer(hmm.GaussianHMM, {"loc": "means_", "covariance": "_covars_"}),
    "poisson": Peer(hmm.PoissonHMM, {"rates": "lambdas_"}),
    "categorical": Peer(hmm.CategoricalHMM, {"emission": "emissionprob_"}),
}


def hmmlearn(kind: str, sequences: list[Array], **priors: Any) -> Step:
    """`fit` of one of hmmlearn's models; without priors, maximum likelihood. F is the surprise, without priors.

    Args:
        kind: One of PEERS.
        sequences: Each of shape `(T,)` or `(T, D)`.
        priors: hmmlearn's own, by its names.
    """
    peer, lengths = PEERS[kind], [len(sequence) for sequence in sequences]
    data = np.concatenate([sequence.reshape(len(sequence), -1) for sequence in sequences])
    names = {"initial": "startprob_", "transition": "transmat_", **peer.names}
    options: dict[str, Any] = {}
    if peer.make is hmm.GaussianHMM:
        options = {"covariance_type": kind, "covars_prior": 0.0, "covars_weight": 0.0}
    elif kind == "poisson":
        options = {"lambdas_prior": 0.0, "lambdas_weight": 0.0}

    def step(parameters: Values) -> tuple[float, Values]:
        model = peer.make(len(parameters["initial"]), n_iter=1, init_params="", **{**options, **priors})
        if kind == "categorical":
            model.n_features = parameters["emission"].shape[-1]
        for name, attribute in names.items():
            value = np.array(parameters[name])
            setattr(model, attribute, value[:, None] if name == "rates" else value)
        model.fit(data, lengths)
        new = {name: np.array(getattr(model, attribute)) for name, attribute in names.items()}
        if kind == "poisson":
            new["rates"] = new["rates"][:, 0]
        return -float(model.monitor_.history[0]), new

    return step


def with_log_prior(step: Step, log_prior: Callable[[Values], float]) -> Step:
    """The step of a peer that has priors and leaves them out of what it reports."""

    def added(parameters: Values) -> tuple[float, Values]:
        free_energy, following = step(parameters)
        return free_energy - log_prior(parameters), following

    return added


def answer_patterns(items: int) -> Array:
    """Returns all patterns of 0 and 1, the last item changing fastest, shape `(2 ** items, items)`."""
    return np.array(list(product([0.0, 1.0], repeat=items)))


def best_of(step: Step, start: Callable[[int], Values], restarts: int) -> Point:
    """Returns the best end of EM from several starts.

    Args:
        step: One iteration.
        start: The parameters to start from, by seed.
        restarts: How many.
    """
    return min((limit(step, start(seed), 1e-11) for seed in range(restarts)), key=lambda point: point.free_energy)
