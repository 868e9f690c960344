r"""Sufficient statistics as gradients: tables that hold T(x) . s - c in place of log-probabilities.

    d <weights, table> / d s  =  sum_n weight_n T(x_n)        d <weights, table> / d c  =  sum_n weight_n

The tables are labelled, masked, scaled and put together as those of log-probabilities are, so whatever a program does
to its sites is done to their statistics. They are zeros: only their gradients are wanted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_vfe.program.equal_sites import stacked_log_prob
from pyro_vfe.program.families import Form, form_of
from pyro_vfe.program.families_forms import CATEGORICAL
from pyro_vfe.program.log_prob import listed, looked_up, slim
from pyro_vfe.program.markov_chain import MarkovChain
from pyro_vfe.program.recorder import Site
from pyro_vfe.program.tables import Scorer


@dataclass(frozen=True, eq=False)
class Probe:
    """The statistics of one distribution, to be had as the gradients of its leaves."""

    sites: tuple[str, ...]
    """The sites that have the distribution."""
    fn: Any
    """The distribution; a chain stands for its first step or for the others."""
    slot: str | None
    """The table of a chain that this is, "initial" or "transition"."""
    form: Form | None
    """The form in which data are scored: centred, in double precision; None where the values are counted."""
    counted: Tensor | None
    """A leaf of the shape of the table of all values, `(*batch, K)`: its gradient counts them."""
    sums: Tensor | None
    """A leaf `(*batch, *independent, D)`: its gradient is the sum of T(x)."""
    counts: Tensor | None
    """A leaf `(*batch)`: its gradient is the number of observations."""

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What to take gradients in."""
        return tuple(leaf for leaf in (self.counted, self.sums, self.counts) if leaf is not None)


@dataclass(eq=False)
class Prober(Scorer):
    """Makes tables whose gradients are sufficient statistics, and keeps the probes."""

    probes: list[Probe] = field(default_factory=list)
    """One for each table, in order of making."""

    def listed(self, site: Site, fn: Any) -> Tensor:
        """A number for each value, which will count it.

        Args:
            site: The latent.
            fn: Its distribution.
        """
        return self._counting((site.name,), fn, listed(fn))

    def scored(self, site: Site, fn: Any) -> Tensor:
        """A table of zeros whose gradients are sums over the site's data.

        Args:
            site: The site.
            fn: Its distribution.
        """
        return self._summing((site.name,), fn, site.value)

    def stacked(self, sites: Sequence[Site]) -> Tensor | None:
        """The same for equal sites together.

        Args:
            sites: Sites with equal distributions.
        """
        names = tuple(site.name for site in sites)
        return stacked_log_prob(sites, lambda fn, value: self._summing(names, fn, value))

    def chain(self, site: Site, chain: MarkovChain) -> tuple[Tensor, Tensor]:
        """Numbers for each first state and each transition, which will count them.

        Args:
            site: The chain.
            chain: Its distribution.
        """
        names = (site.name,)
        first = self._counting(names, chain, chain.initial, "initial")
        return first, self._counting(names, chain, chain.log_transition(), "transition")

    def _counting(self, sites: tuple[str, ...], fn: Any, like: Tensor, slot: str | None = None) -> Tensor:
        leaf = torch.zeros(like.shape, dtype=torch.float64, device=like.device, requires_grad=True)
        self.probes.append(Probe(sites, fn, slot, None, leaf, None, None))
        return leaf

    def _summing(self, sites: tuple[str, ...], fn: Any, value: Tensor) -> Tensor:
        form = form_of(fn)
        assert form is not None
        if form.family is CATEGORICAL and not form.independent:
            counting = self._counting(sites, fn, next(iter(form.parameters.values())))
            return looked_up(counting, value.long())
        x = slim(value, len(form.independent) + form.family.event_dim).double()
        wide = form.to(torch.float64).centred(x.nan_to_num(0.0, 0.0, 0.0))
        statistic = wide.element_statistic(x)
        shape = form.batch_shape()
        counts = torch.zeros(shape, dtype=torch.float64, device=x.device, requires_grad=True)
        events = statistic.shape[statistic.dim() - 1 - len(form.independent) :]
        sums = torch.zeros((*shape, *events), dtype=torch.float64, device=x.device, requires_grad=True)
        self.probes.append(Probe(sites, fn, None, wide, None, sums, counts))
        table: Tensor = _Table.apply(sums, counts, statistic)  # type: ignore[no-untyped-call]
        return table


class _Table(torch.autograd.Function):
    """Zeros, whose gradients are weighted sums of statistics."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, counts: Tensor, statistic: Tensor) -> Tensor:
        """Zeros of the shape to which batch and data broadcast."""
        ctx.statistic, ctx.batch, ctx.events = statistic, counts.shape, sums.shape[counts.dim() :]
        data = statistic.shape[: statistic.dim() - len(ctx.events)]
        return sums.new_zeros(()).expand(torch.broadcast_shapes(counts.shape, data))

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> tuple[Tensor, Tensor, None]:
        """The weighted sums of statistics, and of ones."""
        (weight,) = weights
        rows = ctx.statistic.flatten(ctx.statistic.dim() - len(ctx.events))
        sums = _summed(weight, rows, ctx.batch)
        if not bool(sums.isfinite().all()):  # what is masked has no weight, and may be anything
            sums = _summed(weight, rows.where(rows.isfinite(), 0.0), ctx.batch)
        return sums.reshape(*ctx.batch, *ctx.events), weight.sum_to_size(ctx.batch), None


def _summed(weight: Tensor, rows: Tensor, batch: torch.Size) -> Tensor:
    """sum of weight times rows over the dims that the batch lacks: `(*batch, D)`."""
    depth = weight.dim()
    data = (1,) * (depth - rows.dim() + 1) + tuple(rows.shape[:-1])
    kept = (1,) * (depth - len(batch)) + tuple(batch)
    present = [[d for d in range(depth) if shape[d] != 1] for shape in (weight.shape, data, kept)]
    operands = (
        (weight.squeeze(), present[0]),
        (rows.reshape([*(data[d] for d in present[1]), -1]), [*present[1], depth]),
    )
    product = torch.einsum(operands[0][0], operands[0][1], operands[1][0], operands[1][1], [*present[2], depth])
    return product.reshape(*batch, -1)
