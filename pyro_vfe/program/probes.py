r"""Sufficient statistics as gradients: tables that hold T(x) . s + c in place of log-probabilities.

    d <weights, table> / d s  =  sum_n weight_n T(x_n)        d <weights, table> / d c  =  sum_n weight_n

The tables are labelled, masked, scaled and put together as those of log-probabilities are, so whatever a program does
to its sites is done to their statistics. They are zeros: only their gradients are wanted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_vfe.engine.shapes import broadcast_shapes
from pyro_vfe.program.equal_sites import stacked_log_prob
from pyro_vfe.program.families import Form, form_of, unwrapped
from pyro_vfe.program.families_forms import CATEGORICAL
from pyro_vfe.program.families_table import ChunkedStatistics
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
        base, own_dims = unwrapped(fn)
        if isinstance(base, MarkovChain):
            steps = base.read(site.value, *self.chain(site, base))
            return steps.sum(tuple(range(-own_dims, 0))) if own_dims else steps
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
        family = form.family
        x = slim(value, len(form.independent) + family.event_dim)
        wide = form.to(torch.float64).centred(x)
        if wide.centre is not None and not bool(wide.centre.isfinite().all()):
            wide = form.to(torch.float64).centred(x.nan_to_num(0.0, 0.0, 0.0))  # what is masked may be anything
        shape, width = form.batch_shape(), wide.natural.shape[-1]
        elements = (*form.independent, width // math.prod(form.independent))
        counts = torch.zeros(shape, dtype=torch.float64, device=x.device, requires_grad=True)
        sums = torch.zeros((*shape, *elements), dtype=torch.float64, device=x.device, requires_grad=True)
        self.probes.append(Probe(sites, fn, None, wide, None, sums, counts))
        table: Tensor = _Table.apply(sums, counts, x, wide)  # type: ignore[no-untyped-call]
        return table


class _Table(torch.autograd.Function):
    """Zeros, whose gradients are weighted sums of statistics."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, counts: Tensor, x: Tensor, form: Form) -> Tensor:
        """Zeros of the shape to which batch and data broadcast."""
        own_dims = len(form.independent) + form.family.event_dim
        ctx.data = broadcast_shapes(form.batch_shape(fixed=True), x.shape[: max(0, x.dim() - own_dims)])
        ctx.x, ctx.form, ctx.batch, ctx.shape = x, form, counts.shape, sums.shape
        return sums.new_zeros(()).expand(broadcast_shapes(ctx.batch, ctx.data))

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """The weighted sums of statistics, and of ones."""
        (weight,) = weights
        sums = _product(weight, ctx.form, ctx.x, ctx.batch, ctx.data)
        if sums is None or not bool(sums.isfinite().all()):  # what is masked has no weight, and may be anything
            sums = _contraction(weight, ctx.form, ctx.x, ctx.batch)
        return sums.reshape(ctx.shape), weight.sum_to_size(ctx.batch), None, None


def _product(weight: Tensor, form: Form, x: Tensor, batch: torch.Size, data: torch.Size) -> Tensor | None:
    """The sums `(K, D)` as one matrix product; None where something varies along batch and data alike."""
    depth = weight.dim()
    padded = [(1,) * (depth - len(shape)) + tuple(shape) for shape in (batch, data)]
    rows, columns = ([dim for dim in range(depth) if shape[dim] > 1] for shape in padded)
    if not set(rows).isdisjoint(columns):
        return None
    chunks = ChunkedStatistics.of(form, x, data, form.natural.shape[-1])
    rest = [dim for dim in range(depth) if dim not in rows and dim not in columns]
    return chunks.weighted(weight.permute([*rest, *rows, *columns]).reshape(math.prod(batch), math.prod(data)))


def _contraction(weight: Tensor, form: Form, x: Tensor, batch: torch.Size) -> Tensor:
    """The sums `(*batch, D)` over all dims of the data that the batch lacks."""
    statistic = form.statistic(x.double()).double()
    statistic = statistic.where(statistic.isfinite(), 0.0)
    depth = weight.dim()
    data = (1,) * (depth - statistic.dim() + 1) + tuple(statistic.shape[:-1])
    kept = (1,) * (depth - len(batch)) + tuple(batch)
    present = [[dim for dim in range(depth) if shape[dim] != 1] for shape in (weight.shape, data, kept)]
    rows = statistic.reshape([*(data[dim] for dim in present[1]), statistic.shape[-1]])
    return torch.einsum(weight.squeeze(), present[0], rows, [*present[1], depth], [*present[2], depth])
