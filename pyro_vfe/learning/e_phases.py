r"""E-phases that need no guide: Q is computed from the model.

    Exact         Q(v)  =  P(v | u)                  F  =  -log p(u)
    Hard          Q(v)  =  [v = v*]                  F  =  -log P(v*, u),      v*  =  argmax_v P(v, u)
    MonteCarlo    Q(v)  =  P(v | u)                  the M-phase sees draws from Q instead of Q
    Annealed      Q(v)  ~  P(v, u)^beta              F  =  -log p(u) + KL(Q || P(v | u))

In a chain the weights are those of neighbouring states: expected transitions, or counts of those of a path.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from pyro_vfe.energy.impossible import impossible_data
from pyro_vfe.energy.parts import guide_graph
from pyro_vfe.engine.chain_decoding import SAMPLE
from pyro_vfe.engine.decoding import mode, sample
from pyro_vfe.engine.elimination import log_normalizer
from pyro_vfe.engine.execution import reference_tensor
from pyro_vfe.engine.factors import Factor, FactorGraph, Table
from pyro_vfe.engine.inference import evidence, log_normalizer_and_expected_tables
from pyro_vfe.engine.lookup import read_factor
from pyro_vfe.engine.scales import applied
from pyro_vfe.engine.structure import previous
from pyro_vfe.errors import ImpossibleDataError, VFEError
from pyro_vfe.learning.belief import Belief, Weights, expected_log_joint
from pyro_vfe.learning.phases import EPhase
from pyro_vfe.program.enumeration import Enumeration, SiteKey
from pyro_vfe.program.options import check_fields


@dataclass(frozen=True)
class Exact(EPhase):
    """Q is the exact posterior P(v | u, G): the Q of least F.

    F is then the surprise, the gap is zero, and an exact M-phase after it never raises the surprise.

    References:
        Dempster, Laird and Rubin (1977), Maximum likelihood from incomplete data via the EM algorithm.
        Neal and Hinton (1998), A view of the EM algorithm that justifies incremental, sparse, and other variants.
    """

    monotone = True

    def belief(self, enumeration: Enumeration, iteration: int, max_bytes: float | None = None) -> Belief:
        """Q as the M-phase needs it: the gradient of log p(u) in the model's tables.

        Args:
            enumeration: The factors of the model, and of a guide that gives point estimates, in float64.
            iteration: Not read.
            max_bytes: The most memory that intermediate tables may take.

        Raises:
            ImpossibleDataError: The data have probability zero.
            CostError: The elimination would not fit.
        """
        return _tempered(enumeration, 1.0, max_bytes)


@dataclass(frozen=True)
class Hard(EPhase):
    """Q is all on one most probable assignment v* (hard EM, Viterbi training, k-means).

    F is -log P(v*, u), an upper bound on the surprise. Among such Q this one has the least F, so that F never rises
    from one iteration to the next; the surprise may.

    References:
        Juang and Rabiner (1990), The segmental K-means algorithm for estimating parameters of hidden Markov models.
        Celeux and Govaert (1992), A classification EM algorithm for clustering and two stochastic versions.
    """

    monotone = True

    def belief(self, enumeration: Enumeration, iteration: int, max_bytes: float | None = None) -> Belief:
        """Q as the M-phase needs it: how often the assignment meets each entry of the tables, times the scale.

        Args:
            enumeration: The factors of the model, and of a guide that gives point estimates, in float64.
            iteration: Not read.
            max_bytes: The most memory that intermediate tables may take.

        Raises:
            ImpossibleDataError: The data have probability zero.
            CostError: The elimination would not fit.
        """
        graph = _model_graph(enumeration)
        log_evidence = evidence(graph, max_bytes=max_bytes)
        if bool(log_evidence.isneginf()):
            raise impossible_data(enumeration)
        weights = _by_site(enumeration, _counts(graph, mode(graph, max_bytes=max_bytes), 1))
        drawn = log_q_of_draws(enumeration, max_bytes)
        return Belief(
            weights=weights,
            expected_log_q=drawn,
            surprise=drawn - log_evidence,
            free_energy=drawn - expected_log_joint(weights, enumeration).detach(),
        )


@dataclass(frozen=True)
class MonteCarlo(EPhase):
    """Q is the exact posterior, of which the M-phase sees draws: what EM would be if the posterior had to be sampled.

    F is that of the exact posterior. The draws come from torch's global generator, anew in each iteration, so F may
    rise.

    References:
        Wei and Tanner (1990), A Monte Carlo implementation of the EM algorithm and the poor man's data augmentation
        algorithms.
    """

    num_samples: int
    """How many joint draws of all latents are averaged; one makes it stochastic EM."""

    monotone = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.num_samples < 1:
            raise VFEError(f"MonteCarlo was given num_samples={self.num_samples}.", hint="Draw at least one sample.")

    def belief(self, enumeration: Enumeration, iteration: int, max_bytes: float | None = None) -> Belief:
        """Q as the M-phase needs it, and under `sampled` what draws from Q say of it.

        Args:
            enumeration: The factors of the model, and of a guide that gives point estimates, in float64.
            iteration: Not read.
            max_bytes: The most memory that intermediate tables may take.

        Raises:
            ImpossibleDataError: The data have probability zero.
            CostError: The elimination would not fit.
        """
        exact = _tempered(enumeration, 1.0, max_bytes)
        graph = _model_graph(enumeration)
        draws = sample(graph, self.num_samples, max_bytes=max_bytes)
        return replace(exact, sampled=_by_site(enumeration, _counts(graph, draws, self.num_samples)))


@dataclass(frozen=True)
class Annealed(EPhase):
    """Q is the posterior at an inverse temperature beta: Q(v) proportional to P(v, u)^beta (deterministic annealing).

    A small beta makes the latents undecided and F smooth in the parameters; as beta rises to 1, Q becomes the exact
    posterior. F is that of Q, so its gap, KL(Q || P(v | u)), is what the temperature costs. While beta is below 1, F
    may rise; at 1 the phase is `Exact`.

    References:
        Ueda and Nakano (1998), Deterministic annealing EM algorithm.
    """

    schedule: Sequence[float] | Callable[[int], float]
    """The inverse temperature of each iteration, the last of which stays; or a function of the number of iterations
    before this one. Above 0, at most 1."""

    monotone = False

    def __post_init__(self) -> None:
        if callable(self.schedule):
            return
        if isinstance(self.schedule, str) or not isinstance(self.schedule, Sized) or not len(self.schedule):
            raise VFEError(
                f"Annealed was given the schedule {self.schedule!r}.",
                hint="Give it inverse temperatures up to 1, [0.2, 0.5, 1.0], or a function of the iteration.",
            )
        for position, beta in enumerate(self.schedule):
            _check_inverse_temperature(beta, position)

    def inverse_temperature(self, iteration: int) -> float:
        """Returns beta, above 0 and at most 1.

        Args:
            iteration: The number of iterations before this one.

        Raises:
            VFEError: The schedule gives another number.
        """
        if not callable(self.schedule):
            return float(self.schedule[min(iteration, len(self.schedule) - 1)])
        beta = float(self.schedule(iteration))
        _check_inverse_temperature(beta, iteration)
        return beta

    def belief(self, enumeration: Enumeration, iteration: int, max_bytes: float | None = None) -> Belief:
        """Q as the M-phase needs it, at this iteration's inverse temperature.

        Args:
            enumeration: The factors of the model, and of a guide that gives point estimates, in float64.
            iteration: The number of iterations before this one.
            max_bytes: The most memory that intermediate tables may take.

        Raises:
            ImpossibleDataError: The data have probability zero.
            CostError: The elimination would not fit.
            VFEError: The schedule gives no inverse temperature.
        """
        return _tempered(enumeration, self.inverse_temperature(iteration), max_bytes)


def _check_inverse_temperature(beta: float, iteration: int) -> None:
    if not 0 < beta <= 1:
        raise VFEError(
            f"Annealed's schedule gives the inverse temperature {beta:g} for iteration {iteration}.",
            hint="Give numbers above 0 and at most 1, such as [0.1, 0.2, 0.4, 0.8, 1.0].",
        )


def model_keys(enumeration: Enumeration) -> list[SiteKey]:
    """The model's sites in the order of the factors of its joint graph.

    Args:
        enumeration: The factors of both programs.
    """
    kinds = ("enumerated", "sampled", "observed")
    sites = enumeration.sites.items()
    return [key for kind in kinds for key, site in sites if site.role == "model" and site.kind == kind]


def leaf(table: Table) -> Table:
    """The table as a leaf of the graph.

    Args:
        table: A log table.
    """
    return Table(table.values.detach().requires_grad_(), table.axes)


def log_q_of_draws(enumeration: Enumeration, max_bytes: float | None = None) -> Tensor:
    """log q(w) of what the guide gives as point estimates, a scalar in nats: zero for a Delta of no other density.

    Args:
        enumeration: The factors of both programs.
        max_bytes: The most memory that intermediate tables may take.
    """
    if not enumeration.guide_draws:
        return reference_tensor(_model_graph(enumeration)).new_zeros(())
    if enumeration.draws_tell_of_latents:
        return evidence(guide_graph(enumeration), max_bytes=max_bytes)
    draws = enumeration.graph(*enumeration.guide_draws)
    return log_normalizer(draws, max_bytes=max_bytes).outside.detach()


def _model_graph(enumeration: Enumeration) -> FactorGraph:
    return enumeration.graph(*(enumeration.factors[key] for key in model_keys(enumeration)))


def _by_site(enumeration: Enumeration, tensors: Iterable[Tensor]) -> Weights:
    """Tensors in the order of the joint graph's tables, by site; they lie in memory as the tables do."""
    left = iter(tensors)
    factors = enumeration.factors
    return {key: tuple(_laid_as(next(left), t.values) for t in factors[key].tables) for key in model_keys(enumeration)}


def _laid_as(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor with the memory layout of another of its shape, so that both are read in one order."""
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like).copy_(tensor)


def _tempered(enumeration: Enumeration, beta: float, max_bytes: float | None) -> Belief:
    """Q proportional to P(v, u)^beta: its weights are the gradient of log Z_beta in the tempered tables."""
    graph = _model_graph(enumeration)
    try:
        log_z, tables = log_normalizer_and_expected_tables(_to_the_power(graph, beta), max_bytes=max_bytes)
        log_evidence = log_z if beta == 1 else evidence(graph, max_bytes=max_bytes)
    except ImpossibleDataError as error:
        raise impossible_data(enumeration) from error
    weights = _by_site(enumeration, tables)
    log_joint = expected_log_joint(weights, enumeration).detach()
    drawn = log_q_of_draws(enumeration, max_bytes)
    surprise = drawn - log_evidence
    return Belief(
        weights=weights,
        expected_log_q=drawn + beta * log_joint - log_z,
        surprise=surprise,
        free_energy=surprise if beta == 1 else drawn - (1 - beta) * log_joint - log_z,
    )


def _to_the_power(graph: FactorGraph, beta: float) -> FactorGraph:
    if beta == 1:
        return graph
    return graph.with_tables(Table(beta * table.values, table.axes) for table in graph.tables)


def _counts(graph: FactorGraph, assignment: Mapping[str, Table], num_draws: int) -> list[Tensor]:
    """How often, per draw, an assignment meets each entry of the tables, times the scale: a gradient once more."""
    with torch.enable_grad():
        leaves = [leaf(table) for table in graph.tables]
        known = graph.with_tables(leaves)
        parts = [_log_value(factor, known, assignment, num_draws) for factor in known.factors]
        found = torch.autograd.grad(parts, [table.values for table in leaves])
    return [gradient / num_draws for gradient in found]


def _log_value(factor: Factor, graph: FactorGraph, assignment: Mapping[str, Table], num_draws: int) -> Tensor:
    """The factor's part of log P at an assignment, summed over plates and draws."""
    axes = (SAMPLE, *sorted(factor.plates))
    values = read_factor(applied(factor), assignment, axes, _time_of(factor, graph))
    sizes = (num_draws, *(graph.plates[plate] for plate in axes[1:]))
    repeats = prod(sizes) // values.numel() if values.numel() else 0
    return values.sum() * repeats


def _time_of(factor: Factor, graph: FactorGraph) -> str | None:
    """The plate along which the factor reads neighbours."""
    chains = (v.chain for v in graph.variables.values() if previous(v.name) in factor.axes)
    return next(chains, None)
