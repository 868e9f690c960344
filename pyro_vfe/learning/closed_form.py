r"""The M-phase in closed form, for every parameter that has one; a search for the others.

    counts and sums of T(x)  ->  pooled by parameter  ->  theta'  ->  certificate: dF(Q, theta')/dtheta = 0

The certificate is taken twice: in every M-phase from the pooled statistics, and in the first one of a pair of programs
and their data from the programs themselves, by autograd through their tables. What fails it goes to the search.

References:
    Dempster, Laird and Rubin (1977), Maximum likelihood from incomplete data via the EM algorithm.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from weakref import ref

import pyro
import torch
from torch import Tensor

from pyro_vfe.learning.closed_forms import Proposal, solve
from pyro_vfe.learning.numerical import Numerical
from pyro_vfe.learning.pair import Pair
from pyro_vfe.learning.phases import MPhase, Problem
from pyro_vfe.learning.pools import Pools
from pyro_vfe.learning.prior_pools import prior_pools
from pyro_vfe.learning.site_pools import data_pools
from pyro_vfe.program.extraction import statistics_of
from pyro_vfe.program.parameters import constraint_of, restore, snapshot, unconstrained, write

_FRACTION = 1e-6
"""How small a certified gradient is next to the one at the old parameters, in double precision."""


def _no_pair() -> None:
    """None, as a reference to nothing."""


class ClosedForm(MPhase):
    """Closed forms from expected sufficient statistics, where a parameter feeds its distributions directly.

    Directly: as it is, expanded, or selected by a latent or by data; probabilities also as logits, a scale also as the
    root of a variance. The families are those of counts (Bernoulli, Categorical, OneHotCategorical, Binomial,
    Multinomial, Geometric, NegativeBinomial, MarkovChain), of rates (Poisson, Exponential, Gamma) and of normals
    (Normal, LogNormal, HalfNormal, MultivariateNormal). A point estimate with a conjugate prior is its posterior mode.
    """

    def __init__(self, fallback: MPhase | None = None) -> None:
        """Args:
        fallback: The M-phase for parameters without a closed form; by default `Numerical()`.
        """
        self.fallback = fallback or Numerical()
        self._pair: Callable[[], Pair | None] = _no_pair
        self._uncertified: dict[str, str] = {}

    @property
    def monotone(self) -> bool:  # type: ignore[override]
        """Whether F never rises, but for rounding: where the fallback does not raise it."""
        return self.fallback.monotone

    def update(self, problem: Problem) -> Mapping[str, str]:
        """Writes new parameters and returns, for each name, how it was updated.

        Args:
            problem: What to solve.

        Raises:
            DegenerateError: The likelihood is unbounded: a component has collapsed onto its data.
        """
        is_first = self._pair() is not problem.pair
        if is_first:
            self._pair, self._uncertified = ref(problem.pair), {}
        data, priors = self.pooled(problem)
        proposal = self._proposed(problem, data, priors)
        if is_first and proposal.values:
            self._uncertified = uncertified(problem, proposal)
            if self._uncertified:
                proposal = self._proposed(problem, data, priors)
        write(proposal.values)
        problem.notes.extend(proposal.notes)
        words = dict(proposal.words)
        rest = tuple(name for name in problem.names if name not in proposal.values)
        if rest:
            problem.pair.parameters.forget()
            found = self.fallback.update(replace(problem, names=rest))
            reasons = {**proposal.refused, **self._uncertified}
            words |= {name: f"{how} (no closed form: {reasons.get(name, '')})" for name, how in found.items()}
        return words

    def pooled(self, problem: Problem) -> tuple[Pools, Pools]:
        """The statistics of a problem pooled by parameter: the data's, and the priors'.

        Args:
            problem: What to solve.
        """
        weights = problem.belief.sampled or problem.belief.weights
        statistics = statistics_of(problem.enumeration, weights, problem.pair.parameters)
        values = present_values(problem.pair)
        data = data_pools(statistics, values)
        return data, prior_pools(statistics, values, data)

    def _proposed(self, problem: Problem, data: Pools, priors: Pools) -> Proposal:
        names = [name for name in problem.names if name not in self._uncertified]
        return proposed(problem.pair, data, priors, names)


def proposed(pair: Pair, data: Pools, priors: Pools, names: Sequence[str]) -> Proposal:
    """The best values of parameters given pooled statistics.

    Args:
        pair: The programs, which have run before.
        data: The data's part.
        priors: The priors' part.
        names: The parameters to change.

    Raises:
        DegenerateError: The likelihood is unbounded.
    """
    constraints = {name: constraint_of(name) for name in names}
    return solve(data, priors, present_values(pair), names, pair.floor, constraints)


def uncertified(problem: Problem, proposal: Proposal) -> dict[str, str]:
    """The parameters whose proposed values are not the best by the programs' own gradient, with the reason in words.

    Args:
        problem: What was solved; its enumeration can be differentiated no more. The parameters stay as they are.
        proposal: The solution of its statistics and priors.
    """
    names = list(proposal.values)
    before = snapshot(names)
    old_slopes, start = _slopes(problem, names)
    try:
        write(proposal.values)
        slopes, end = _slopes(problem, names)
    finally:
        restore(before)
    size = abs(start)
    failed = {}
    for name in names:
        eps = torch.finfo(unconstrained(name).dtype).eps
        noise = eps**0.5 * size / max(1, problem.enumeration.num_data)
        largest = max(_FRACTION, 1e3 * eps) * float(old_slopes[name].abs().max()) + noise
        if not bool((_free(slopes[name], name, proposal.low[name]).abs() <= largest).all()):
            failed[name] = "the programs' own gradient does not vanish there"
    is_raised = any(bool(low.any()) for low in proposal.low.values())
    noise = max((torch.finfo(unconstrained(name).dtype).eps for name in names), default=0.0) ** 0.5 * size
    if not failed and not is_raised and end < start - noise:  # at a bound all slopes vanish
        return dict.fromkeys(names, "the programs' own log-probability falls")
    return failed


def _free(slope: Tensor, name: str, low: Tensor) -> Tensor:
    """The slopes of what is above its floor: at a floor they need not vanish.

    A constraint that binds numbers of which only some are at their floor lets none of them be told apart.
    """
    if not bool(low.any()):
        return slope
    shape = unconstrained(name).shape
    rows = shape[: len(shape) - constraint_of(name).event_dim]
    return slope.reshape(len(low), -1)[~low] if rows.numel() == len(low) else slope.new_zeros(0)


def present_values(pair: Pair) -> dict[str, Tensor]:
    """The present constrained values of the parameters, detached.

    Args:
        pair: The programs, which have run before.
    """
    return {name: pyro.get_param_store()[name].detach() for name in pair.parameters.readers}


def _slopes(problem: Problem, names: Sequence[str]) -> tuple[dict[str, Tensor], float]:
    """The gradient of the expected log joint in the unconstrained parameters at present, and its value, in nats."""
    value = problem.expected_log_joint()
    leaves = [unconstrained(name) for name in names]
    gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    return dict(zip(names, gradients, strict=True)), float(value.detach())
