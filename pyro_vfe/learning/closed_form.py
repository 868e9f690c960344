r"""The M-phase in closed form, for every parameter that has one; a search for the others.

    counts and sums of T(x)  ->  pooled by parameter  ->  theta'  ->  certificate: dF(Q, theta')/dtheta = 0

The certificate is taken twice: in every M-phase from the pooled statistics, and in the first one of a parameter from
the programs themselves, by autograd through their tables. What fails it goes to the search.

References:
    Dempster, Laird and Rubin (1977), Maximum likelihood from incomplete data via the EM algorithm.
"""

from collections.abc import Mapping, Sequence
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
from pyro_vfe.program.parameters import constraint_of, restore, restored_on_error, snapshot, unconstrained, write

_FRACTION = 1e-6
"""How small a certified gradient is next to the one at the old parameters, in double precision."""

_ROUNDINGS = 1e3
"""It is no smaller than so many roundings, which counts in single precision."""


class ClosedForm(MPhase):
    """Closed forms from expected sufficient statistics, where a parameter feeds its distributions directly.

    Directly: as it is, expanded, or selected by a latent or by data; probabilities also as logits, a scale also as the
    root of a variance. The families are those of counts (Bernoulli, Categorical, OneHotCategorical, Binomial,
    Multinomial, Geometric, NegativeBinomial, MarkovChain), of rates (Poisson, Exponential, Gamma, InverseGamma) and of
    normals (Normal, LogNormal, HalfNormal, MultivariateNormal). A point estimate with a conjugate prior is its
    posterior mode.
    """

    def __init__(self, fallback: MPhase | None = None) -> None:
        """Args:
        fallback: The M-phase for parameters without a closed form; by default `Numerical()`.
        """
        self.fallback = fallback or Numerical()
        self._pair: ref[Pair] | None = None
        self._looked_at = frozenset[str]()
        self._uncertified: dict[str, str] = {}

    @property
    def monotone(self) -> bool:  # type: ignore[override]
        """Whether F never rises, but for rounding: where the fallback does not raise it."""
        return self.fallback.monotone

    def forget(self) -> None:
        """Lets the fallback forget."""
        self.fallback.forget()

    def update(self, problem: Problem) -> Mapping[str, str]:
        """Writes new parameters and returns, for each name, how it was updated.

        Args:
            problem: What to solve.

        Raises:
            DegenerateError: The likelihood is unbounded: a component has collapsed onto its data.
        """
        if self._pair is None or self._pair() is not problem.pair:  # Other data may open other branches.
            self._pair, self._looked_at, self._uncertified = ref(problem.pair), frozenset(), {}
        data, priors = self.pooled(problem)
        proposal = self._proposed(problem, data, priors)
        new = proposal.values.keys() - self._looked_at
        failed = uncertified(problem, proposal) if new else {}
        self._looked_at |= new
        if not new.isdisjoint(failed):
            self._uncertified |= {name: reason for name, reason in failed.items() if name in new}
            proposal = self._proposed(problem, data, priors)
        words = dict(proposal.words)
        rest = tuple(name for name in problem.names if name not in proposal.values)
        with restored_on_error(snapshot(problem.names)):
            write(proposal.values)
            found = self.fallback.update(replace(problem, names=rest)) if rest else {}
        problem.notes.extend(proposal.notes)
        reasons = {**proposal.refused, **self._uncertified}
        return words | {name: f"{how} (no closed form: {reasons.get(name, '')})" for name, how in found.items()}

    def pooled(self, problem: Problem) -> tuple[Pools, Pools]:
        """The statistics of a problem pooled by parameter: the data's, and the priors'.

        Args:
            problem: What to solve.
        """
        weights = problem.belief.learned_from
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
    """The parameters whose proposed values are not the best by the programs' own tables, with the reason in words.

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
    failed, size = {}, abs(start)
    for name in names:
        eps = torch.finfo(unconstrained(name).dtype).eps
        # From a start at the optimum all that is left is rounding: little next to what one datum says.
        noise = eps**0.5 * size / max(1, problem.enumeration.num_data)
        largest = max(_FRACTION, _ROUNDINGS * eps) * float(old_slopes[name].abs().max()) + noise
        if not float(slopes[name].abs().max()) <= largest and name not in proposal.at_floor:
            failed[name] = "the programs' own gradient does not vanish there"
    coarsest = max((torch.finfo(unconstrained(name).dtype).eps for name in names), default=0.0)
    if not failed and not proposal.at_floor and end < start - coarsest**0.5 * size:  # At a bound all slopes vanish.
        return dict.fromkeys(names, "the programs' own log-probability falls")
    return failed


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
