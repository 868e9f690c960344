r"""Log normaliser and marginals in two passes over the same steps, in the scaled linear domain.

    up      Z  =  sum_x prod_f F_f(x),  F_f  =  exp(f - max f)                    each step's table X is kept
    down    X'  =  dZ / dX                                                        from the result to the factors
    read    P(x_s)  =  sum of X X' over the other axes, divided by Z              for any table X over s and others

The passes know, for every table, a number below and a number above all its entries that are not zero: products of what
is known of the operands. While these are in range no product can underflow or overflow, so that every entry has full
relative precision, and an entry is zero only where no term of it is possible. Where they leave the range, the operands
are measured and divided by their largest entry; a table whose own entries span more than the range is not for this
module, which then says so instead of returning a number.

References:
    Shafer and Shenoy (1990), Probability propagation.
    Darwiche (2003), A differential approach to inference in Bayesian networks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pyro_vfe.engine.cost import check_cost
from pyro_vfe.engine.execution import reference_tensor, with_uniform_factors
from pyro_vfe.engine.factors import FactorGraph
from pyro_vfe.engine.schedule import NO_NAMES, Schedule, Turn, schedule_of
from pyro_vfe.engine.unrolling import structure_of
from pyro_vfe.errors import CostError

Array = npt.NDArray[np.float64]

LOWEST, HIGHEST = 1e-290, 1e290
"""Entries that are not zero lie between these."""

_FAINT = 1e-140
"""The least that weights may sum to where single ones may have underflowed: those are below 1e-160 of the sum."""

_NOTHING: tuple[Array, float, float] = (np.ones(0), 1.0, 1.0)


class _OutOfRangeError(ArithmeticError):
    """A table spans more than the range of the linear domain, or is zero throughout."""


@dataclass(frozen=True, eq=False)
class Propagation:
    """The log normaliser and what was asked for beside it."""

    log_normalizer: Tensor
    """A scalar in nats, detached."""

    probabilities: tuple[Tensor, ...]
    """The probability of each entry of the scopes, then of the factors' tables if wanted; each sums to one."""


def propagate(
    graph: FactorGraph,
    scopes: Sequence[tuple[str, ...]],
    *,
    own_tables: bool = False,
    max_bytes: float | None = None,
) -> Propagation | None:
    """Returns the log normaliser and joint probabilities of each scope, in the order of its names.

    Args:
        graph: The factors.
        scopes: Tuples of known variables, each at most once.
        own_tables: Whether the probabilities of each factor's own entries are wanted too.
        max_bytes: The most memory that intermediate tables may take; half of the free memory by default.

    Returns:
        None where this does not apply: there are plates or scales, the tables are not on the CPU or would not fit, the
        sum is zero or not a number, or its terms span more than float64 can hold.

    Raises:
        VFEError: The graph is inconsistent.
    """
    if not _applies(graph):
        return None
    graph.check()
    full = with_uniform_factors(graph, NO_NAMES)
    schedule = schedule_of(structure_of(full), tuple(scopes), len(graph.factors) if own_tables else 0)
    if schedule is None:
        return None
    like = reference_tensor(graph)
    try:
        check_cost(schedule.plan, np.dtype(np.float64).itemsize, like.device, max_bytes)
        passes = _Passes(schedule, full)
        log_normalizer = passes.up()
        passes.down()
    except (CostError, _OutOfRangeError):
        return None
    return Propagation(like.new_tensor(log_normalizer), passes.probabilities(like.dtype))


def _applies(graph: FactorGraph) -> bool:
    return all(
        factor.scale == 1.0 and not factor.plates and factor.table.values.device.type == "cpu"
        for factor in graph.factors
    ) and all(variable.scale == 1.0 and not variable.plates and variable.size for variable in graph.variables.values())


class _Passes:
    """The tables of one propagation, and between which numbers their entries lie."""

    def __init__(self, schedule: Schedule, graph: FactorGraph) -> None:
        """Args:
        schedule: What to do.
        graph: Its factors' tables are the inputs.

        Raises:
            _OutOfRangeError: A table is impossible throughout, not a number, or spans too much.
        """
        self.schedule = schedule
        lengths = np.array([prod(turn.shape) for turn in schedule.inputs])
        ends = lengths.cumsum()
        starts = ends - lengths
        flat = _logs(graph)
        peaks = np.maximum.reduceat(flat, starts)
        if not np.isfinite(peaks).all():
            raise _OutOfRangeError
        flat -= peaks.repeat(lengths)
        least = np.exp(np.minimum.reduceat(np.where(flat == -np.inf, 0.0, flat), starts))
        if least.min() < LOWEST:
            raise _OutOfRangeError
        np.exp(flat, out=flat)
        self.log_scale = float(peaks.sum())
        shares = [flat[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        inputs = [*map(_turned, shares, schedule.inputs), *map(np.ones, schedule.ones)]
        self.tables: dict[int, Array] = dict(enumerate(inputs))
        self.low: list[float] = [*least.tolist(), *[1.0] * len(schedule.ones)]
        self.high: list[float] = [1.0] * len(inputs)
        self.n_inputs = len(inputs)
        self.slopes: dict[int, tuple[Array, float, float]] = {}
        self.weights: dict[int, Array] = {}

    def up(self) -> float:
        """Returns the log normaliser; keeps every table on the way."""
        tables, low, high = self.tables, self.low, self.high
        for left, right, made, inner, turn, _, _ in self.schedule.products:
            below, above = low[left] * low[right], high[left] * high[right] * inner
            if below < LOWEST or above > HIGHEST:
                self.log_scale += log(self._measure(left)) + log(self._measure(right))
                below, above = low[left] * low[right], float(inner)
                if below < LOWEST:
                    raise _OutOfRangeError
            tables[made] = _turned(_product(tables[left], tables[right], inner), turn)
            low.append(below)
            high.append(above)
        value = self.log_scale
        for slot in self.schedule.results:
            scalar = float(tables[slot].reshape(()))
            if scalar == 0.0:
                raise _OutOfRangeError
            value += log(scalar)
        return value

    def down(self) -> None:
        """Takes the derivative of the normaliser in every table where it is needed, and reads the marginals."""
        tables, low, high = self.tables, self.low, self.high
        for slot in self.schedule.results:
            self._arrive(slot, np.ones((1, 1, 1)), 1.0, 1.0)
        for left, right, made, _, _, turn, onward in reversed(self.schedule.products):
            slope, least, most = self.slopes.pop(made, _NOTHING)
            if onward:
                slope = _turned(slope, turn)
            for own, other, n_terms in onward:
                below, above = least * low[other], most * high[other] * n_terms
                if below < LOWEST or above > HIGHEST:
                    self._measure(other)
                    _, least = _measured(slope)
                    most, below, above = 1.0, least * low[other], float(n_terms)
                    if below < LOWEST:
                        raise _OutOfRangeError
                factor = tables[other].transpose(0, 2, 1)
                found = _product(slope, factor, n_terms) if own == left else _product(factor, slope, n_terms)
                self._arrive(own, found, below, above)
            del tables[left], tables[right]

    def _arrive(self, slot: int, slope: Array, least: float, most: float) -> None:
        """Takes the derivative in a table, and reads what is wanted of it."""
        if slot in self.schedule.reads:
            least, most = self._read(slot, slope, least, most)
        if slot >= self.n_inputs:
            self.slopes[slot] = slope, least, most

    def _read(self, slot: int, slope: Array, least: float, most: float) -> tuple[float, float]:
        """Sums table times derivative for each marginal that is wanted; returns the bounds of the derivative."""
        faint = least * self.low[slot] < LOWEST
        if faint or most * self.high[slot] > HIGHEST:
            self._measure(slot)
            _, least = _measured(slope)
            most = 1.0
        weights = slope * self.tables[slot]
        if faint and weights.sum() < _FAINT:
            raise _OutOfRangeError
        for position, shape, summed, dims in self.schedule.reads[slot]:
            table = weights.reshape(shape)
            table = np.add.reduce(table, summed) if summed else table
            self.weights[position] = (table if dims is None else table.transpose(dims)).reshape(-1)
        return least, most

    def probabilities(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Returns what was read, each divided by its sum and laid out flat."""
        starts = np.array(self.schedule.starts)
        if len(starts) == 1:
            return ()
        flat = np.concatenate([self.weights[position] for position in range(len(starts) - 1)])
        lengths = np.diff(starts)
        flat /= np.add.reduceat(flat, starts[:-1]).repeat(lengths)
        parts: tuple[Tensor, ...] = torch.from_numpy(flat).to(dtype).split(lengths.tolist())
        return parts

    def _measure(self, slot: int) -> float:
        """Divides a table by its largest entry, which is returned."""
        peak, self.low[slot] = _measured(self.tables[slot])
        self.high[slot] = 1.0
        return peak


def _logs(graph: FactorGraph) -> Array:
    """Returns the numbers of all factors, laid end to end: a copy."""
    with torch.no_grad():
        flat = torch.cat([factor.table.values.reshape(-1) for factor in graph.factors])
    logs: Array = flat.to(torch.float64).numpy()
    return logs


def _product(left: Array, right: Array, n_terms: int) -> Array:
    """Returns a batch of matrix products; sums of one term are products of entries."""
    return left * right if n_terms == 1 else np.matmul(left, right)


def _turned(table: Array, turn: Turn) -> Array:
    shape, dims, becomes = turn
    if dims is None:
        return table.reshape(becomes)
    return table.reshape(shape).transpose(dims).reshape(becomes)


def _measured(table: Array) -> tuple[float, float]:
    """Divides a table by its largest entry; returns that, and the smallest entry then that is not zero."""
    peak = float(table.max())
    if peak == 0.0:
        raise _OutOfRangeError
    lowest = float(table.min(where=table > 0, initial=peak)) / peak
    if lowest < LOWEST:
        raise _OutOfRangeError
    table /= peak
    return peak, lowest
