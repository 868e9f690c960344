r"""Bounds on log p(u) where it cannot be computed.

    E log 1/K sum_k P(v_k, u) / Q(v_k|u)   <=   log p(u),       v_1, ..., v_K ~ Q(v|u)
                                           >=   log p(u),       v_1 ~ P(v|u),  v_2, ..., v_K ~ Q(v|u)

The bounds hold in expectation, and what is returned estimates them. One estimate misses on the wrong side by b nats
with a probability of at most exp(-b), by Markov's inequality: `Bounds.interval` makes use of that.

References:
    Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders.
    Grosse, Ghahramani and Adams (2015), Sandwiching the marginal likelihood using bidirectional Monte Carlo.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_vfe.energy.particles import Particles, Sampler, drawn_sites
from pyro_vfe.energy.weight_means import (
    effective_sample_size,
    jackknife,
    log_mean_exp,
    log_means_without_each,
    means_without_each,
)
from pyro_vfe.energy.weight_shares import WeightShares, weight_shares
from pyro_vfe.engine.cost import table_limit
from pyro_vfe.errors import PlateKeptError, ScaleError, VFEError
from pyro_vfe.program.buffers import unchanged_buffers
from pyro_vfe.program.data import number_of_data
from pyro_vfe.program.dreams import Dream
from pyro_vfe.program.entry_points import entry_point
from pyro_vfe.program.enumeration import is_random
from pyro_vfe.program.given import given_guide
from pyro_vfe.program.given_parameters import reading
from pyro_vfe.program.layout import Program
from pyro_vfe.program.programs import Check, Programs
from pyro_vfe.program.randomness import undisturbed_randomness
from pyro_vfe.reporting.bounds_dream import arguments_of, log_weights_of
from pyro_vfe.reporting.bounds_remarks import cautions, remarks_on
from pyro_vfe.reporting.bounds_views import as_html, as_text
from pyro_vfe.reporting.pareto import pareto_k

_MOST_LOOKED_AT = 1000
"""To estimate a Pareto k takes about a millisecond."""

_MOST_BYTES = 2**28
"""Sums that tell what draws are worth shall not cost more than the draws."""


@dataclass(frozen=True, eq=False)
class Bounds:
    """Estimates of a lower and an upper bound on log p(u), in nats and float64: scalars, or one per element of a plate.

    All of them are random: made from draws of the guide. log p(u) lies between their expectations; `interval` is an
    interval that holds it with a given probability.
    """

    log_weights: Tensor
    """log P(v_k, u_n) - log Q(v_k|u) of each draw and datum, shape `(K, *plates)`; `(K, data)` where data are of
    several kinds, in plates that have nothing to do with each other: one kind after the other."""

    dream_log_weights: Tensor | None
    """The same for the latents of the dream, shape `(*plates)`; None without a dream."""

    weight: Tensor
    """How often each datum counts, shape `(*plates)`: 1, but in a subsampled plate or under poutine.scale."""

    outside: Tensor
    """What belongs to no datum, a scalar in nats: a prior of parameters at their point estimates, say."""

    plates: tuple[str, ...]
    """The plates whose elements are the data, each with weights of its own; none where everything is one datum, or
    data are of several kinds."""

    num_data: int
    """The number of data: elements of the plates that the data share, as the whole data set has them."""

    remarks: tuple[str, ...] = ()
    """What the programs gave cause to say."""

    exact_share: Tensor | None = None
    """E_Q[w]^2 / E_Q[w^2] of each datum, shape `(*plates)`: what part of many draws even ones would be worth as much,
    by a sum over all that the guide may draw. None where it draws what is not discrete, or the sum does not fit."""

    plate: str | None = None
    """The plate that entries are elements of; None for scalars."""

    @property
    def num_particles(self) -> int:
        """K: the number of draws."""
        return len(self.log_weights)

    @cached_property
    def lower_by_datum(self) -> Tensor:
        """The estimate of the lower bound of each datum, not weighted, shape `(*plates)`."""
        return log_mean_exp(self.log_weights)

    @cached_property
    def upper_by_datum(self) -> Tensor | None:
        """The estimate of the upper bound of each datum, not weighted, shape `(*plates)`; None without a dream.

        Of K weights one is the dream's, and the others are those of all draws but the first.
        """
        if self.dream_log_weights is None:
            return None
        return log_mean_exp(torch.cat([self.dream_log_weights.unsqueeze(0), self.log_weights[1:]]))

    @property
    def lower(self) -> Tensor:
        """An estimate of a lower bound on log p(u): the bound is its expectation, and rises with K."""
        return self._summed(self.lower_by_datum) + self._outside

    @property
    def lower_stderr(self) -> Tensor | None:
        """The standard error of `lower`, by the jackknife over draws; None for a single draw."""
        if self.num_particles < 2:
            return None
        return self._added(jackknife(log_means_without_each(self.log_weights)))

    @property
    def upper(self) -> Tensor | None:
        """An estimate of an upper bound on log p(u): the bound is its expectation, and falls with K; None without a
        dream."""
        return None if self.upper_by_datum is None else self._summed(self.upper_by_datum) + self._outside

    @property
    def upper_stderr(self) -> Tensor | None:
        """At least the standard error of `upper` for many data: `width_stderr` and `lower_stderr` together.

        A dream holds one draw of each datum's posterior. How far another draw would take the upper bound shows only in
        how it differs from datum to datum: None for fewer than two data, for elements of a plate and for one draw.
        """
        if self.width_stderr is None or self.lower_stderr is None:
            return None
        return self.width_stderr + self.lower_stderr

    @property
    def width(self) -> Tensor | None:
        """`upper - lower`: an estimate of how far the bounds are apart; None without a dream."""
        return None if self.upper is None else self.upper - self.lower

    @property
    def width_stderr(self) -> Tensor | None:
        """At least the standard error of `width`, from how it varies over data; None for fewer than two data."""
        if self.upper_by_datum is None or self.plate is not None or self.lower_by_datum.numel() < 2:
            return None
        widths = ((self.upper_by_datum - self.lower_by_datum) * self.weight).flatten()
        return widths.std() * math.sqrt(len(widths))

    @property
    def free_energy(self) -> Tensor:
        """An estimate of F, the mean of -log weight over the same draws."""
        return self._summed(-self.log_weights.mean(0)) - self._outside

    @property
    def free_energy_stderr(self) -> Tensor | None:
        """The standard error of `free_energy`; None for a single draw."""
        if self.num_particles < 2:
            return None
        return self._added(jackknife(means_without_each(-self.log_weights)))

    @property
    def gap_at_least(self) -> Tensor:
        """`free_energy + lower`, F - F_K: an estimate of a lower bound on the gap F + log p(u); never below zero.

        A datum all of whose draws are impossible counts nothing.
        """
        found = self.lower_by_datum - self.log_weights.mean(0)
        return self._summed(torch.where(self.lower_by_datum.isneginf(), 0.0, found))

    @property
    def gap_at_least_stderr(self) -> Tensor | None:
        """The standard error of `gap_at_least`, by the jackknife over draws; None for one draw or two.

        Without one of two draws a single one is left, which has no gap whatever it is.
        """
        if self.num_particles < 3:
            return None
        without = log_means_without_each(self.log_weights) - means_without_each(self.log_weights)
        return self._added(jackknife(without))

    @cached_property
    def effective_sample_size(self) -> Tensor:
        """How many even weights the K weights of each datum are worth as far as they tell, shape `(*plates)`.

        Draws that have missed a mode know nothing of it: `exact_share` does.
        """
        return effective_sample_size(self.log_weights)

    @cached_property
    def pareto_k(self) -> Tensor:
        """The Pareto k of the weights of each datum, shape `(*plates)`.

        -inf where the largest weights are equal, NaN where there are too few different ones; `reporting.pareto` says
        what its values mean.
        """
        return _pareto_k(self._columns).reshape(self.log_weights.shape[1:])

    def interval(self, confidence: float = 0.95) -> tuple[Tensor, Tensor | None]:
        """Returns ends between which log p(u) lies with at least a given probability, over draws (and the dream).

        `lower` exceeds log p(u) by b nats with a probability of at most exp(-b), and `upper` falls short of it so
        seldom, whatever the guide: the ends are `lower` and `upper`, moved apart. It is the probability that this
        computation goes right, for data that are given; each element of a plate has an interval of its own.

        Args:
            confidence: The probability, less than 1.

        Raises:
            VFEError: The confidence is no probability, or data carry weights (a subsample, poutine.scale).
        """
        if not 0 < confidence < 1:
            raise VFEError(f"The confidence is {confidence}.", hint="Use a number between 0 and 1, such as 0.95.")
        if bool((self.weight != 1).any()):
            raise ScaleError(
                "Data carry weights (a subsample or poutine.scale): how the elements that were left out would move "
                "log p(u) is not known.",
                hint="Call bounds on the whole data, without subsampling and scale.",
            )
        risk = (1 - confidence) / (1 if self.upper is None else 2)
        return self.lower + math.log(risk), None if self.upper is None else self.upper - math.log(risk)

    def by(self, plate: str) -> "Bounds":
        """Returns the bounds of each element of a plate of the data, shape `(size,)`, weighted as in the sum.

        Args:
            plate: One of `plates`.

        Raises:
            PlateKeptError: The weights are not by elements of this plate.
        """
        if plate not in self.plates or self.plate is not None:
            raise PlateKeptError(
                f"These bounds have no weights for each element of plate '{plate}'.",
                hint=self._data_in_words,
            )
        return replace(self, plate=plate)

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know of the numbers: in words."""
        return (*self.remarks, *cautions(self))

    def __str__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self)

    @property
    def _data_in_words(self) -> str:
        if self.plates:
            return f"They have them by {self.plates}."
        several = self.log_weights.dim() > 1
        return "Here data of several kinds stand side by side." if several else "Here everything is one datum."

    @property
    def _columns(self) -> Tensor:
        """The log weights of each datum, `(data, K)`."""
        return self.log_weights.reshape(self.num_particles, -1).T

    @cached_property
    def worst_pareto_k(self) -> Tensor:
        """The Pareto k of the data whose draws are worth least: of 1,000, or of all where there are fewer."""
        worth = self.effective_sample_size.flatten()
        worst = worth.topk(min(_MOST_LOOKED_AT, len(worth)), largest=False).indices
        return _pareto_k(self._columns[worst])

    @property
    def _outside(self) -> Tensor:
        return self.outside if self.plate is None else torch.zeros_like(self.outside)

    def _summed(self, by_datum: Tensor) -> Tensor:
        return self._over_others(torch.where(self.weight == 0, 0.0, by_datum * self.weight))

    def _added(self, stderr: Tensor) -> Tensor:
        """The standard error of a sum over data, which are independent."""
        return self._over_others(torch.where(self.weight == 0, 0.0, stderr * self.weight) ** 2).sqrt()

    def _over_others(self, values: Tensor) -> Tensor:
        if self.plate is None:
            return values.sum()
        return values.movedim(self.plates.index(self.plate), 0).flatten(1).sum(1) if values.dim() > 1 else values


@entry_point()
def bounds(
    model: Program,
    guide: Program | None,
    *args: Any,
    num_particles: int = 100,
    dream: Dream | None = None,
    check: Check = "first",
    max_bytes: float | None = None,
    params: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Bounds:
    """Returns estimates of a lower bound on log p(u), and for a dream of an upper one too, from draws of the guide.

    All latents of the guide are drawn, discrete and continuous ones; discrete latents that only the model has are
    summed out, which makes the bounds tighter. Where plates make the data independent, each datum has weights of its
    own: sum_n log 1/K sum_k w_kn is far closer to log p(u) than one weight for all data could bring it.

    Args:
        model: The generative model.
        guide: The guide: Q.
        *args: Arguments of both programs.
        num_particles: K, the number of draws.
        dream: A dream of the model (`vfe.dream`), whose log p(u) is bounded, from above too; it has the arguments.
        check: When enumerated tables are compared with ordinary runs, and draws side by side with single ones: at the
            "first" run, "always", or never (False).
        max_bytes: The most memory that tables may take.
        params: Values of the programs' parameters by name, all of them, such as `run.params`, in place of those in
            Pyro's store, which stays as it is. Names that the programs do not read are left aside.
        **kwargs: Keyword arguments of both programs.

    Raises:
        VFEError: There is no draw; or a dream and arguments; or a dream that is not of this model.
        ScaleError: Drawn latents carry weights (a subsample, poutine.scale) under which the mean weight bounds nothing.
        StructureError: The guide is not normalised, or has latents beside those of the dream.

    Example:
        >>> import pyro, pyro.distributions as dist, pyro_vfe as vfe
        >>> def model(u):
        ...     with pyro.plate("data", len(u)):
        ...         v = pyro.sample("v", dist.Bernoulli(0.3))
        ...         pyro.sample("u", dist.Normal(v, 1.0), obs=u)
        >>> def guide(u):
        ...     with pyro.plate("data", len(u)):
        ...         pyro.sample("v", dist.Bernoulli(logits=u - 1.0))
        >>> dream = vfe.dream(model, torch.zeros(100))
        >>> found = vfe.bounds(model, guide, dream=dream, num_particles=1000)
        >>> low, high = found.interval(0.999)
        >>> low < vfe.posterior(model, *dream.args).log_evidence < high
        tensor(True)

    References:
        Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders.
        Grosse, Ghahramani and Adams (2015), Sandwiching the marginal likelihood using bidirectional Monte Carlo.
    """
    own = given_guide(model, guide)
    if num_particles < 1:
        raise VFEError(f"num_particles is {num_particles}.", hint="Use at least one particle.")
    if dream is not None:
        args, kwargs = arguments_of(dream, args, kwargs)
    sampler = Sampler(model, own, args, kwargs, check, max_bytes)
    with reading(params, args, kwargs):
        drawn = sampler.particles(num_particles)
        dreamt = None if dream is None else log_weights_of(dream, sampler, drawn)
        shares = _weight_shares(sampler, drawn)
    return Bounds(
        log_weights=drawn.weights.by_datum,
        dream_log_weights=dreamt,
        weight=drawn.weights.scale,
        outside=drawn.weights.outside[0],
        plates=drawn.data.plates,
        num_data=number_of_data(drawn.first),
        remarks=remarks_on(drawn, shares),
        exact_share=None if shares is None else shares.share,
    )


def _weight_shares(sampler: Sampler, drawn: Particles) -> WeightShares | None:
    """What the weights are worth exactly; None where the guide draws what cannot be summed, or too much."""
    random = [site for site in drawn_sites(drawn.first).values() if is_random(site)]
    if not random:
        return None
    limit = min(table_limit(sampler.max_bytes), _MOST_BYTES)
    try:
        unchanged = unchanged_buffers(sampler.model, sampler.guide)
        with torch.no_grad(), unchanged, undisturbed_randomness(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = Programs(check=sampler.check, max_bytes=limit).enumerate(
                sampler.model,
                sampler.guide,
                sampler.args,
                sampler.kwargs,
                subsamples=sampler.subsamples,
                differentiable=False,
            )
            shares = None if run.is_sampled else weight_shares(run, drawn.data, limit)
    except Exception:  # What can be drawn need not be what can be enumerated: then there is no more than the draws.
        return None
    return shares if shares is not None and bool(shares.share.isfinite().all()) else None


def _pareto_k(columns: Tensor) -> Tensor:
    return torch.tensor([pareto_k(column) for column in columns.cpu().numpy()], dtype=torch.float64)
