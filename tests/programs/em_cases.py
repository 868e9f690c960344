"""Programs that EM learns, each with its data, its start and the oracle that takes the same path."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import em_oracles as by_hand
import numpy as np
import torch
from em_oracles import Array, Point, Step, Values
from torch import Tensor

from examples.earthquakes import COUNTS
from programs import em
from programs.case import empty, tensor
from programs.em import Model, NormalInverseGamma

LINKAGE = np.array([125.0, 18.0, 20.0, 34.0])
HEADS = np.array([5.0, 9.0, 8.0, 4.0, 7.0])
EARTHQUAKES = np.array(COUNTS, dtype=float)
SURVEY = np.array([20.0, 2, 9, 2, 6, 1, 4, 1, 38, 7, 24, 6, 25, 6, 23, 42])
"""How often each pattern 1111, 1112, ..., 2222 of four answers was given."""

PATTERNS = by_hand.answer_patterns(4)


def renamed(values: Values) -> Values:
    return values


@dataclass(frozen=True, eq=False)
class Case:
    """A program that EM learns."""

    model: Model
    args: tuple[Tensor, ...]
    step: Step
    """The oracle's iteration."""
    start: Values
    """The oracle's parameters at the start."""
    guide: Callable[[], Callable[..., Any]] = lambda: empty
    """Makes the guide; one without sites where there is none."""
    read: Callable[[Values], Values] = renamed
    """From the program's parameters, the oracle's."""
    iterations: int = 6
    tolerance: float = 1e-9
    """How far apart, relatively, parameters may be."""


def random() -> np.random.Generator:
    """Numbers that are always the same."""
    return np.random.default_rng(0)


def clusters(size: int, dims: int) -> Array:
    """Points of three overlapping clusters of several shapes, far from the origin."""
    rng = random()
    locs, mixing = rng.normal(0, 2, (3, dims)), rng.normal(0, 0.7, (3, dims, dims)) + np.eye(dims)
    z = rng.choice(3, size, p=[0.5, 0.3, 0.2])
    return 5 + locs[z] + np.einsum("nij,nj->ni", mixing[z], rng.normal(size=(size, dims)))


def with_holes(values: Array, share: float, seed: int = 1) -> Array:
    """The values with a share of them NaN."""
    return np.where(np.random.default_rng(seed).random(values.shape) < share, np.nan, values)


# Linkage


def linkage(model: Model, **options: Any) -> Case:
    start = {"theta": np.array(0.5)}
    return Case(model, (tensor(LINKAGE),), by_hand.linkage(LINKAGE), start, iterations=8, **options)


HALF = {"theta": 0.5}
LINKAGES = {
    "linkage_masked": linkage(em.linkage(HALF, "masked")),
    "linkage_selected": linkage(em.linkage(HALF, "selected"), read=lambda found: {"theta": found["theta"][0]}),
    "linkage_indirect": linkage(em.linkage_indirect(HALF), tolerance=1e-6),
}

# Mixtures

TWO_COINS = {"probs": np.array([0.6, 0.5])}
TWO_RATES = {"weights": np.array([0.4, 0.6]), "rates": np.array([10.0, 30.0])}
POINTS = clusters(150, 3)
GAPPED_POINTS = with_holes(POINTS, 0.2)
CLUSTERS = {"weights": np.array([0.3, 0.3, 0.4]), "loc": POINTS[:3]}
SCALES = np.array([[1.0, 1.5, 2.0], [2.0, 1.0, 1.5], [1.5, 2.0, 1.0]])
DIAGONAL = {**CLUSTERS, "scale": SCALES}
TIED_DIAGONAL = {**CLUSTERS, "scale": SCALES[0]}
VARIANCES = {**CLUSTERS, "covariance": SCALES**2}
MATRIX = np.array([[2.0, 0.3, 0.1], [0.3, 1.5, -0.2], [0.1, -0.2, 1.0]])
TIED = {**CLUSTERS, "covariance": MATRIX}
FULL = {**CLUSTERS, "covariance": np.stack([MATRIX, 2 * MATRIX, np.eye(3)])}
CHOLESKY = {**CLUSTERS, "scale_tril": np.linalg.cholesky(FULL["covariance"])}


def classes(number: int, seed: int = 0) -> Values:
    """A start for latent classes."""
    probs = np.random.default_rng(seed).uniform(0.2, 0.8, (number, 4))
    return {"weights": np.full(number, 1 / number), "probs": probs}


def survey(number: int) -> Case:
    """Latent classes of the survey; a single one is found in one iteration."""
    start, args = classes(number), (tensor(PATTERNS), tensor(SURVEY))
    step, iterations = by_hand.latent_classes(PATTERNS, SURVEY), 1 if number == 1 else 6
    return Case(em.latent_classes(start), args, step, start, iterations=iterations)


def squared(found: Values) -> Values:
    """Scales as variances."""
    return {**{name: value for name, value in found.items() if name != "scale"}, "covariance": found["scale"] ** 2}


def variances(found: Values) -> Values:
    """Variances by scikit-learn's word."""
    return {**{name: value for name, value in found.items() if name != "variance"}, "covariance": found["variance"]}


def multiplied(found: Values) -> Values:
    """Cholesky factors as covariances."""
    factor = found["scale_tril"]
    others = {name: value for name, value in found.items() if name != "scale_tril"}
    return {**others, "covariance": factor @ np.swapaxes(factor, -1, -2)}


def gapped(values: Array) -> tuple[Tensor, Tensor]:
    """The values, with zeros where they are missing, and which are seen."""
    return tensor(np.nan_to_num(values)), torch.tensor(~np.isnan(values))


GAPPED_ANSWERS = with_holes(np.repeat(PATTERNS, SURVEY.astype(int), 0), 0.25)
WITHOUT_COUNTS = np.ones(len(GAPPED_ANSWERS))
ANSWERS = gapped(GAPPED_ANSWERS)
DATA = (tensor(POINTS),)
VARIANCE = {**CLUSTERS, "variance": SCALES**2}
SKLEARN = {kind: by_hand.scikit_learn_mixture(POINTS, kind) for kind in ("diag", "full", "tied")}

MIXTURES = {
    "coins": Case(em.coins(TWO_COINS), (tensor(HEADS),), by_hand.coins(HEADS, 10), TWO_COINS, iterations=10),
    "poisson_mixture": Case(
        em.poisson_mixture(TWO_RATES), (tensor(EARTHQUAKES),), by_hand.poisson_mixture(EARTHQUAKES), TWO_RATES
    ),
    "masked_components_that_are_read": Case(
        em.poisson_mixture(TWO_RATES),
        (tensor(EARTHQUAKES), torch.arange(len(EARTHQUAKES)) % 3 > 0),
        by_hand.poisson_mixture(EARTHQUAKES),
        TWO_RATES,
    ),
    "one_latent_class": survey(1),
    "two_latent_classes": survey(2),
    "three_latent_classes": survey(3),
    "latent_classes_with_gaps": Case(
        em.latent_classes_with_gaps(classes(2)),
        ANSWERS,
        by_hand.latent_classes(np.nan_to_num(GAPPED_ANSWERS), WITHOUT_COUNTS, seen=~np.isnan(GAPPED_ANSWERS)),
        classes(2),
    ),
    "diagonal_mixture": Case(em.diagonal_mixture(DIAGONAL), DATA, by_hand.diagonal_mixture(POINTS), DIAGONAL),
    "diagonal_mixture_of_scikit_learn": Case(
        em.diagonal_mixture(DIAGONAL), DATA, SKLEARN["diag"], VARIANCES, read=squared
    ),
    "tied_diagonal_mixture": Case(
        em.diagonal_mixture(TIED_DIAGONAL, tied=True),
        DATA,
        by_hand.diagonal_mixture(POINTS, tied=True),
        TIED_DIAGONAL,
    ),
    "diagonal_mixture_with_gaps": Case(
        em.diagonal_mixture_with_gaps(DIAGONAL),
        gapped(GAPPED_POINTS),
        by_hand.diagonal_mixture(GAPPED_POINTS),
        DIAGONAL,
    ),
    "variances": Case(em.variance_mixture(VARIANCE), DATA, SKLEARN["diag"], VARIANCES, read=variances),
    "variances_selected_first": Case(
        em.variance_mixture(VARIANCE, "after"), DATA, SKLEARN["diag"], VARIANCES, read=variances
    ),
    "full_mixture": Case(em.full_mixture(FULL), DATA, SKLEARN["full"], FULL),
    "full_mixture_by_cholesky": Case(
        em.full_mixture(CHOLESKY, "scale_tril"), DATA, SKLEARN["full"], FULL, read=multiplied
    ),
    "tied_mixture": Case(em.full_mixture(TIED, tied=True), DATA, SKLEARN["tied"], TIED),
}

# Hidden Markov models

QUAKES = {
    "initial": np.array([0.5, 0.5]),
    "transition": np.array([[0.9, 0.1], [0.1, 0.9]]),
    "rates": TWO_RATES["rates"],
}
CHAIN = {
    "initial": np.array([0.5, 0.3, 0.2]),
    "transition": np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.2, 0.2, 0.6]]),
}
CHAIN_RATES = {**CHAIN, "rates": np.array([2.0, 6.0, 12.0])}
COUNT_TABLE = random().poisson(random().choice([2.0, 6.0, 12.0], (5, 20))).astype(float)
SYMBOLS = random().integers(0, 4, (5, 20))
EMISSION = {**CHAIN, "emission": random().dirichlet(np.ones(4), 3)}
TRAJECTORIES = clusters(100, 3).reshape(5, 20, 3)
OF_STATES = {**CHAIN, "loc": TRAJECTORIES[0, :3]}
CHAIN_DIAGONAL = {**OF_STATES, "scale": SCALES}
LENGTHS = np.array([20, 7, 13, 1, 20])
THERE = np.arange(20) < LENGTHS[:, None]
SEEN = random().random((5, 20)) > 0.3


def chain(kind: str, start: Values, sequences: Array, **options: Any) -> Case:
    """Several sequences, against hmmlearn."""
    own = {**start, "covariance": start["scale"] ** 2} if kind == "diag" else start
    compared = {name: value for name, value in own.items() if name != "scale"}
    data = torch.as_tensor(sequences)
    step = by_hand.hmmlearn(kind, list(sequences))
    return Case(em.hidden_markov(start, kind), (data,), step, compared, **options)


def incomplete(kind: str, start: Values, sequences: Array, emission: Callable[..., by_hand.Emission]) -> Case:
    """Several sequences of which some observations are missing."""
    step = by_hand.baum_welch(emission(sequences, SEEN))
    return Case(em.hidden_markov(start, kind), (tensor(sequences), torch.tensor(SEEN)), step, start)


def of_lengths(kind: str, start: Values, sequences: Array) -> Case:
    """Sequences of different lengths, against hmmlearn."""
    args = (tensor(sequences), torch.tensor(True), torch.tensor(THERE))
    step = by_hand.hmmlearn(kind, [row[:length] for row, length in zip(sequences.astype(int), LENGTHS, strict=True)])
    return Case(em.hidden_markov(start, kind), args, step, start)


ONE_SEQUENCE = by_hand.baum_welch(by_hand.poisson_emission(EARTHQUAKES[None]))
CHAINS = {
    "earthquakes_loop": Case(
        em.hidden_markov_loop(QUAKES, "poisson"), (tensor(EARTHQUAKES),), ONE_SEQUENCE, QUAKES, iterations=2
    ),
    "earthquakes_chain": Case(em.hidden_markov(QUAKES, "poisson"), (tensor(EARTHQUAKES[None]),), ONE_SEQUENCE, QUAKES),
    "poisson_chain": chain("poisson", CHAIN_RATES, COUNT_TABLE.astype(int)),
    "categorical_chain": chain("categorical", EMISSION, SYMBOLS),
    "diagonal_chain": chain("diag", CHAIN_DIAGONAL, TRAJECTORIES, read=squared),
    "full_chain": chain("full", {**OF_STATES, "covariance": FULL["covariance"]}, TRAJECTORIES),
    "tied_chain": chain("tied", {**OF_STATES, "covariance": MATRIX}, TRAJECTORIES),
    "poisson_chain_with_gaps": incomplete("poisson", CHAIN_RATES, COUNT_TABLE, by_hand.poisson_emission),
    "diagonal_chain_with_gaps": incomplete("diag", CHAIN_DIAGONAL, TRAJECTORIES, by_hand.gaussian_emission),
    "poisson_chains_of_lengths": of_lengths("poisson", CHAIN_RATES, COUNT_TABLE),
    "poisson_chain_masked_within": Case(
        em.hidden_markov(CHAIN_RATES, "poisson"),
        (tensor(COUNT_TABLE), torch.tensor(True), torch.tensor(SEEN)),
        by_hand.baum_welch(by_hand.poisson_emission(COUNT_TABLE, SEEN)),
        CHAIN_RATES,
    ),
}

# Priors

GAMMA, BETA, NORMAL = (3.0, 0.2), (2.0, 3.0), (0.5, 2.0)
CONCENTRATIONS = {
    "initial": np.array([2.0, 3.0, 1.5]),
    "transition": np.array([[5.0, 2.0, 1.5], [1.2, 4.0, 2.0], [2.0, 2.0, 2.0]]),
}
VARIANCE_PRIOR = NormalInverseGamma(centre=4.0, weight=0.7, shape=2.5, scale=1.5)
KNOWN_SCALE = {"weights": np.array([0.5, 0.5]), "means": np.array([3.0, 7.0])}
CHAIN_VARIANCES = {**OF_STATES, "variance": SCALES**2}


def log_prior_of_chain(parameters: Values) -> float:
    """The log density of the Dirichlet priors."""
    return sum(by_hand.log_dirichlet(parameters[name], CONCENTRATIONS[name]) for name in ("initial", "transition"))


def log_prior_of_gaussians(parameters: Values) -> float:
    """The log density of all priors of the Gaussian chain."""
    prior, variance = VARIANCE_PRIOR, parameters["covariance"]
    loc = by_hand.log_normal(parameters["loc"], prior.centre, variance / prior.weight).sum()
    spread = by_hand.log_inverse_gamma(variance, prior.shape, prior.scale)
    return log_prior_of_chain(parameters) + float(loc) + spread


def hmmlearn_priors(prior: NormalInverseGamma | None = None) -> Mapping[str, Any]:
    """The priors by hmmlearn's names; its variances divide by covars_weight - 1 + n, ours by 2 shape + 3 + n."""
    of_tables = {"startprob_prior": CONCENTRATIONS["initial"], "transmat_prior": CONCENTRATIONS["transition"]}
    if prior is None:
        return of_tables
    of_means = {"means_prior": prior.centre, "means_weight": prior.weight}
    return {**of_tables, **of_means, "covars_prior": 2 * prior.scale, "covars_weight": 2 * prior.shape + 4}


RATE_PRIORS = Case(
    em.poisson_mixture_with_priors(2, GAMMA, 1.5),
    (tensor(EARTHQUAKES),),
    by_hand.poisson_mixture(EARTHQUAKES, GAMMA, 1.5),
    TWO_RATES,
    guide=lambda: em.delta_guide(TWO_RATES),
)


def only(values: Values, *names: str) -> Values:
    return {name: values[name] for name in names}


def points_of(model: Model, start: Values) -> Callable[[], Callable[..., Any]]:
    """Makes AutoDelta from a start."""
    return lambda: em.point_guide(model, start)


BETA_MODEL = em.latent_classes_with_prior(classes(2), BETA)
NORMAL_MODEL = em.known_scale_mixture_with_prior(KNOWN_SCALE, 1.2, NORMAL)
DIRICHLET_MODEL = em.hidden_markov_with_priors(EMISSION, CONCENTRATIONS)
GAUSSIAN_MODEL = em.hidden_markov_with_priors(CHAIN_VARIANCES, CONCENTRATIONS, VARIANCE_PRIOR)

PRIORS = {
    "gamma_and_dirichlet_by_delta": RATE_PRIORS,
    "gamma_and_dirichlet": Case(
        RATE_PRIORS.model,
        RATE_PRIORS.args,
        RATE_PRIORS.step,
        TWO_RATES,
        guide=points_of(RATE_PRIORS.model, TWO_RATES),
    ),
    "beta": Case(
        BETA_MODEL,
        (tensor(PATTERNS), tensor(SURVEY)),
        by_hand.latent_classes(PATTERNS, SURVEY, beta=BETA),
        classes(2),
        guide=points_of(BETA_MODEL, only(classes(2), "probs")),
    ),
    "normal": Case(
        NORMAL_MODEL,
        (tensor(POINTS[:, 0]),),
        by_hand.known_scale_mixture(POINTS[:, 0], 1.2, NORMAL),
        KNOWN_SCALE,
        guide=points_of(NORMAL_MODEL, only(KNOWN_SCALE, "means")),
    ),
    "dirichlet_of_a_chain": Case(
        DIRICHLET_MODEL,
        (torch.tensor(SYMBOLS),),
        by_hand.with_log_prior(by_hand.hmmlearn("categorical", list(SYMBOLS), **hmmlearn_priors()), log_prior_of_chain),
        EMISSION,
        guide=points_of(DIRICHLET_MODEL, CHAIN),
    ),
    "normal_inverse_gamma_of_a_chain": Case(
        GAUSSIAN_MODEL,
        (tensor(TRAJECTORIES),),
        by_hand.with_log_prior(
            by_hand.hmmlearn("diag", list(TRAJECTORIES), **hmmlearn_priors(VARIANCE_PRIOR)), log_prior_of_gaussians
        ),
        variances(CHAIN_VARIANCES),
        guide=points_of(GAUSSIAN_MODEL, CHAIN_VARIANCES),
        read=variances,
    ),
}

CASES = {**LINKAGES, **MIXTURES, **CHAINS, **PRIORS}


@cache
def path_of(name: str) -> list[Point]:
    """The oracle's start, and its points after each iteration."""
    case = CASES[name]
    return by_hand.path(case.step, case.start, case.iterations)
