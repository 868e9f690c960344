r"""A table of log-probabilities as one matrix product.

    log p(x_n | theta_k)  =  T(x_n) . eta_k - A_k + log h(x_n)                (N, D) @ (D, K)

This is what a broadcast log-probability is where data vary along plates and parameters along latents, without the
(K, N, D) numbers in between. T(x) is made a chunk of data at a time, forward and backward, and never kept.

The terms may be larger than their sum: x^2 / s^2 is, for data far from zero. So x is centred, the product is summed in
double precision, and where even that is not enough the table is left to broadcasting.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from pyro_vfe.engine.shapes import broadcast_shapes
from pyro_vfe.program.families import Form, form_of, unwrapped
from pyro_vfe.program.families_forms import BERNOULLI, BERNOULLI_OUTCOMES
from pyro_vfe.program.log_prob import slim

WORTHWHILE = 2**17
"""Numbers that broadcasting would make; for fewer it takes less time than setting up the product."""

TOLERANCE = {torch.float64: 1e-12}
"""The rounding error in nats per element of the event, by a bound; for other types, eight units of single precision."""

CHUNK = {"cpu": 2**18}
"""Numbers in the statistics that are made at a time: what a cache holds."""

LARGE_CHUNK = 2**25
"""The same on devices that want much work at a time."""


def product_table(fn: Any, value: Tensor) -> Tensor | None:
    """The log-probability of `value` by a matrix product; None where that is not to be had, or no gain, or inexact.

    Args:
        fn: A distribution without a mask.
        value: What to score; varies along batch dims along which the parameters do not.

    Returns:
        A tensor in nats that broadcasts to the full log-probability, without the axes that plates only repeat.

    Raises:
        ValueError: The value is outside of the support, and the distribution validates its arguments.
    """
    if _entries((*fn.batch_shape, *fn.event_shape), value.shape) < WORTHWHILE:
        return None
    form = form_of(fn)
    if form is None or form.family.width is None or value.device.type == "mps":
        return None
    if any(form.parameters[name].requires_grad for name in form.family.fixed):
        return None
    own_dims = len(form.independent) + form.family.event_dim
    x = slim(value, own_dims)
    batch, data = form.batch_shape(), form.batch_shape(fixed=True)
    data = broadcast_shapes(data, x.shape[: max(0, x.dim() - own_dims)])
    depth = max(len(batch), len(data))
    batch, data = (torch.Size((1,) * (depth - len(shape)) + tuple(shape)) for shape in (batch, data))
    if any(a > 1 and b > 1 for a, b in zip(batch, data, strict=True)):
        return None
    event_size = math.prod(fn.event_shape[len(fn.event_shape) - form.family.event_dim :])
    independent, rows, columns = (math.prod(shape) for shape in (form.independent, batch, data))
    if not _is_gain(rows, columns, independent * event_size, independent * form.family.width(event_size)):
        return None
    _validate(fn, form, value)
    wide = _with_outcomes(form).to(torch.float64).centred(x)
    natural = wide.natural.reshape(rows, -1)
    offset = -wide.log_normalizer.reshape(-1, 1).expand(rows, 1)
    statistics = ChunkedStatistics.of(wide, x, data, natural.shape[1])
    product = _product(natural, offset, statistics, _result_type(form, value), independent * event_size)
    return None if product is None else _paired(product, batch, data)


@dataclass(frozen=True, eq=False)
class ChunkedStatistics:
    """T(x) and log h(x) of N data, made anew whenever they are asked for."""

    form: Form
    """In double precision; fixed parameters that vary along the data have shape `(N, *independent)`. The others have
    their shapes alone: T(x) and h(x) read no more of them."""
    x: Tensor
    """The data, shape `(N, *independent, *event)`."""
    width: int
    """D."""

    @staticmethod
    def of(form: Form, x: Tensor, data: torch.Size, width: int) -> "ChunkedStatistics":
        """The statistics of data `x` that vary along plates of sizes `data`, D = `width` of them."""
        event = x.shape[x.dim() - form.family.event_dim :]
        x = x.expand([*data, *form.independent, *event]).reshape(-1, *form.independent, *event)
        fixed = {
            name: form.parameters[name].expand([*data, *form.independent]).reshape(-1, *form.independent)
            for name in form.family.fixed
        }
        # A backward pass keeps this: one table's parameters would stay for each portion of the data.
        shapes = {name: values.new_zeros(()).expand(values.shape) for name, values in form.parameters.items()}
        return ChunkedStatistics(replace(form, parameters={**shapes, **fixed}), x, width)

    def slices(self) -> Iterator[slice]:
        """The data, so many at a time as a cache holds the statistics of."""
        step = max(1, CHUNK.get(self.x.device.type, LARGE_CHUNK) // self.width)
        for start in range(0, len(self.x), step):
            yield slice(start, start + step)

    def statistic(self, where: slice) -> Tensor:
        """T(x) of some data, shape `(n, D)`."""
        return self._form(where).statistic(self.x[where].double())

    def log_base_measure(self, where: slice) -> Tensor:
        """log h(x) of some data, shape `(n,)` or `()`."""
        return self._form(where).log_base_measure(self.x[where].double())

    def weighted(self, weights: Tensor) -> Tensor:
        """The sums of T(x) under weights `(K, N)`, shape `(K, D)`, in double precision."""
        sums = [weights[:, where].double() @ self.statistic(where).double() for where in self.slices()]
        return torch.stack(sums).sum(0)

    def _form(self, where: slice) -> Form:
        fixed = {name: self.form.parameters[name][where] for name in self.form.family.fixed}
        return replace(self.form, parameters={**self.form.parameters, **fixed}) if fixed else self.form


def _product(
    natural: Tensor, offset: Tensor, statistics: ChunkedStatistics, dtype: torch.dtype, elements: int
) -> Tensor | None:
    """The product, shape `(K, N)`, unless its rounding error might pass the tolerance."""
    forbidden = natural.detach().isneginf()
    some_forbidden = bool(forbidden.any())
    if some_forbidden:
        natural = natural.masked_fill(forbidden, 0.0)
    table = natural.new_empty(len(natural), len(statistics.x), dtype=dtype)
    tolerance = TOLERANCE.get(dtype, 8 * torch.finfo(torch.float32).eps) * elements
    largest, most = _largest(natural), _largest(offset)
    with torch.no_grad():
        for where in statistics.slices():
            statistic, log_base = statistics.statistic(where), statistics.log_base_measure(where)
            error = torch.finfo(torch.float64).eps / 2 * float(_largest(statistic) @ largest + most)
            if not error <= tolerance:
                return None
            table[:, where] = torch.addmm(offset + log_base, natural, statistic.mT)
            if some_forbidden:
                # 0 * -inf is 0: a value is impossible where it has something of what has probability zero.
                if bool((statistic < 0).any()):
                    return None
                table[:, where] = table[:, where].masked_fill(forbidden.double() @ statistic.mT > 0, -torch.inf)
    if some_forbidden and statistics.x.requires_grad:
        return None
    if statistics.x.requires_grad:
        everything = slice(None)
        statistic, log_base = statistics.statistic(everything), statistics.log_base_measure(everything)
        return torch.addmm(offset + log_base, natural, statistic.mT).to(dtype)
    if not natural.requires_grad:
        return table
    product: Tensor = _Table.apply(natural, offset, statistics, (table,))  # type: ignore[no-untyped-call]
    return product


class _Table(torch.autograd.Function):
    """The table is linear in eta and -A; its adjoint sums statistics, whose adjoint is a table again."""

    @staticmethod
    def forward(
        ctx: Any, natural: Tensor, offset: Tensor, statistics: ChunkedStatistics, made: tuple[Tensor]
    ) -> Tensor:
        """The table that was made, `(K, N)`."""
        # Saved, so that torch notices where data are overwritten before the backward pass, and can make them again.
        ctx.save_for_backward(statistics.x)
        ctx.statistics = replace(statistics, x=statistics.x.new_empty(0))
        return made[0]

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """The weighted sums of statistics, and of ones."""
        statistics = replace(ctx.statistics, x=ctx.saved_tensors[0])
        return *_Sums.apply(weights[0], statistics), None, None  # type: ignore[no-untyped-call]


class _Sums(torch.autograd.Function):
    """sum_n weights_kn T(x_n), shape `(K, D)`, and sum_n weights_kn, shape `(K, 1)`."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, statistics: ChunkedStatistics) -> tuple[Tensor, Tensor]:
        """Both sums, in double precision."""
        ctx.statistics, ctx.dtype = statistics, weights.dtype
        return statistics.weighted(weights), weights.sum(1, keepdim=True, dtype=torch.float64)

    @staticmethod
    def backward(ctx: Any, *coefficients: Tensor) -> tuple[Tensor, None]:
        """The table of the coefficients in place of eta and -A."""
        natural, offset = coefficients
        rows = (ctx.statistics.statistic(where) for where in ctx.statistics.slices())
        table = torch.cat([torch.addmm(offset, natural, part.mT).to(ctx.dtype) for part in rows], 1).detach()
        return _Table.apply(natural, offset, ctx.statistics, (table,)), None  # type: ignore[no-untyped-call]


def _with_outcomes(form: Form) -> Form:
    """The form; where a Bernoulli's probabilities hold zero or one, that of its outcomes."""
    probs = form.parameters.get("probs")
    if form.family is not BERNOULLI or probs is None or not bool(((probs == 0) | (probs == 1)).any()):
        return form
    return replace(form, family=BERNOULLI_OUTCOMES)


def _entries(*shapes: Sequence[int]) -> int:
    """How many numbers shapes make together when they are broadcast."""
    return math.prod(max(sizes) for sizes in zip_longest(*(reversed(shape) for shape in shapes), fillvalue=1))


def _is_gain(rows: int, columns: int, elements: int, statistics: int) -> bool:
    """Whether broadcasting makes more numbers: the product makes its statistics, and its table in two precisions."""
    return rows * columns * elements >= WORTHWHILE and rows * elements > 2 * rows + statistics


def _largest(values: Tensor) -> Tensor:
    """The largest magnitude in each column."""
    values = values.detach()
    return torch.maximum(values.amax(0), -values.amin(0))


def _paired(product: Tensor, batch: Sequence[int], data: Sequence[int]) -> Tensor:
    """The product with its rows' and columns' dims, of which no two vary at one place, laid over each other."""
    depth = len(data)
    pairs = product.reshape(*batch, *data).permute([d + k * depth for d in range(depth) for k in (0, 1)])
    return pairs.reshape([a * b for a, b in zip(batch, data, strict=True)])


def _validate(fn: Any, form: Form, value: Tensor) -> None:
    """Checks the value against the support once, not once for each repetition of a fixed parameter."""
    base, _ = unwrapped(fn)
    if not base._validate_args:
        return
    given = {name: form.parameters[name] for name in form.family.fixed if name in base.__dict__}
    if given:
        base = copy.copy(base)
        base.__dict__.update(given)
    base._validate_sample(value)


def _result_type(form: Form, value: Tensor) -> torch.dtype:
    learned = (values.dtype for name, values in form.parameters.items() if name not in form.family.fixed)
    dtype = reduce(torch.promote_types, learned, value.dtype)
    return dtype if dtype.is_floating_point else torch.get_default_dtype()
