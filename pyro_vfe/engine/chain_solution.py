r"""Log normalisers of chains and their gradients: for each sequence the fastest way that is proved right.

    d log Z / d unary_t(i)       =  a_t(i) b_t(i) / (e_t(i) Z_t)                      the marginals
    d log Z / d pairs_t(i, j)    =  a_t(i) A_t(i, j) b_t+1(j) / Z_t,t+1               the expected transitions

An entry of a message may underflow although it matters later. Let tiny be the smallest normal number. A sum of K
products loses at most about K tiny, so that an entry of at least `floor` = 4 K tiny / eps is right to rounding. Hence:

1. If every entry of every message is at least `floor`, so is everything computed from them right.
2. Otherwise the sequence is swept twice more, scaled at every step. In one sweep entries are raised to `floor`: these
   messages a', b' bound the true ones from above, since they gain at least what the true recursion could lose. What
   is added at time t, at most `floor` per entry, ends up in paths whose share of the sum is at most
   K floor / (s_t Z'_t), with Z'_t = a'_t-1 A b'_t and s_t what b'_t was divided by: all is in units of the same time,
   so no scale has to be carried along. Backward messages add as much. So do transfer matrices: weighted by the message
   that enters a chunk, their rows are its forward messages. The plain sweep, cut into the same chunks, loses no more
   than the raised one gains. So if these shares add up to at most eps, the plain messages are right, to eps in the log
   normaliser and (absolutely) in every marginal, and true zeros in them are exact.
3. The remaining sequences are done in log space.

In float32 a sequence that fails test 1 is done in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vfe.engine.chain_logspace import LogChain, swept_in_logs
from pyro_vfe.engine.chain_plan import Stretch
from pyro_vfe.engine.chain_sweeps import Run, Sweeps, columns, sweep_plan, swept

SCALED_EVERY = {torch.float64: 32, torch.float32: 8}
"""Steps between scalings; a step rarely shrinks a message by more than a factor of 1e-4."""

BOUND = 12.0
"""Shares are counted for both directions, transfers and division by a bound from above: together less than this."""


@dataclass(frozen=True)
class Counts:
    """Marginals and expected transitions of a stretch, before they are weighted."""

    stretch: Stretch
    """Which steps."""

    forward: Tensor
    """a, `(L + 1, C, N, K)`."""

    backward: Tensor
    """b in the order of time, `(L + 1, C, N, K)`."""

    joint: Tensor
    """a b / e, `(L + 1, C, N, K)`: proportional to the marginals."""

    total: Tensor
    """Its sum over values, `(L + 1, C, N, 1)`."""

    pair_total: Tensor
    """The sum of a_t A_t b_t+1 over both values, `(L, C, N, 1)`."""

    potentials: Tensor
    """A, `(C * L or 1, N or 1, K, K)`."""

    def select(self, where: Tensor) -> "Counts":
        """Returns those of some sequences."""
        parts = (self.forward, self.backward, self.joint, self.total, self.pair_total)
        own = self.potentials.shape[1] > 1
        potentials = self.potentials.index_select(1, where) if own else self.potentials
        forward, backward, joint, total, pair_total = (part.index_select(2, where) for part in parts)
        return Counts(self.stretch, forward, backward, joint, total, pair_total, potentials)

    def add_gradients(self, weights: Tensor, unary: Tensor, pairs: Tensor) -> None:
        """Adds weighted marginals to `unary` `(T, N, K)` and weighted transitions to `pairs` `(T - 1 or 1, ...)`."""
        first, C, L = self.stretch.first, self.stretch.count, self.stretch.length
        weights = weights[:, None]
        if first == 0:
            unary[0] = self.joint[0, 0] * (weights / self.total[0, 0])
        if L == 0:
            return
        target = unary[first + 1 : self.stretch.last + 1].view(C, L, *unary.shape[1:]).transpose(0, 1)
        torch.mul(self.joint[1:], weights / self.total[1:], out=target)
        leading = self.backward[1:] * (weights / self.pair_total)
        counts = _transitions(self.forward[:-1], leading, len(pairs) > 1, pairs.shape[1] > 1)
        steps = pairs[first : self.stretch.last] if len(pairs) > 1 else pairs
        steps.add_(counts.reshape(self.potentials.shape) * self.potentials)


def _transitions(forward: Tensor, leading: Tensor, varying: bool, own: bool) -> Tensor:
    """Returns the products of neighbours, summed over what shares a matrix."""
    _, C, N, K = forward.shape
    if varying or own or C * N < K:
        axes = ("cl" if varying else "") + ("n" if own else "") + "ij"
        return torch.einsum(f"lcni,lcnj->{axes}", forward, leading)
    # A product per step is no larger than the messages here, and takes them as they lie in memory.
    here, there = (columns(messages[:, None], 1).squeeze(1) for messages in (forward, leading))
    return torch.bmm(here, there.mT).sum(0)


@dataclass(frozen=True)
class LinearChain:
    """Sequences that scaled messages are right for."""

    log_normalizer: Tensor
    """Log sums over paths, `(N,)`."""

    counts: tuple[Counts, ...]
    """One per stretch; none where no gradient was wanted."""

    shape: torch.Size
    """That of the unary potentials."""

    pairs_shape: torch.Size
    """That of the pairs."""

    def select(self, where: Tensor) -> "LinearChain":
        """Returns some of the sequences."""
        own = self.pairs_shape[1] > 1
        return LinearChain(
            self.log_normalizer[where],
            tuple(counts.select(where) for counts in self.counts),
            torch.Size((self.shape[0], len(where), self.shape[2])),
            torch.Size((self.pairs_shape[0], len(where) if own else 1, *self.pairs_shape[2:])),
        )

    def gradients(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gradients of `weights @ log_normalizer` for `unary` and `pairs`."""
        unary, pairs = weights.new_empty(self.shape), weights.new_zeros(self.pairs_shape)
        for counts in self.counts:
            counts.add_gradients(weights, unary, pairs)
        return unary, pairs


@dataclass(frozen=True)
class Part:
    """Some of the sequences, solved."""

    where: Tensor | None
    """Which sequences; None for all."""

    chain: LinearChain | LogChain
    """How."""


def floor_of(dtype: torch.dtype, num_values: int) -> float:
    """Returns the smallest entry of a message that is right to rounding."""
    numbers = torch.finfo(dtype)
    return 4.0 * num_values * numbers.tiny / numbers.eps


def solve(unary: Tensor, pairs: Tensor, *, gradient: bool, plan: Sequence[Stretch] | None = None) -> list[Part]:
    """Returns the chains, in parts that are solved in different ways.

    Args:
        unary: Log potentials, `(T, N, K)`, float32 or float64.
        pairs: Log potentials, `(T - 1 or 1, N or 1, K, K)`.
        gradient: Whether gradients will be asked for.
        plan: Which steps are swept side by side; the cheapest by default.
    """
    chain, trusted = _scaled(unary, pairs, gradient, SCALED_EVERY[unary.dtype], plan)
    if bool(trusted.all()):
        return [Part(None, chain)]
    good, rest = trusted.nonzero().squeeze(1), (~trusted).nonzero().squeeze(1)
    parts = [Part(good, chain.select(good))] if len(good) else []
    del chain
    smaller = _sequences(unary, pairs, rest)
    if unary.dtype != torch.float64:
        deeper = solve(smaller[0].double(), smaller[1].double(), gradient=gradient, plan=plan)
    else:
        deeper = _solve_carefully(*smaller, gradient, plan)
    return parts + [Part(rest if part.where is None else rest[part.where], part.chain) for part in deeper]


def gradients(parts: Sequence[Part], weights: Tensor, unary: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of `weights @ log_normalizer`, the sequences of all parts together.

    Args:
        parts: From `solve`.
        weights: `(N,)`.
        unary: What was solved.
        pairs: What was solved.
    """
    if len(parts) == 1 and parts[0].where is None:
        return parts[0].chain.gradients(weights)
    d_unary, d_pairs = torch.empty_like(unary), torch.zeros_like(pairs)
    for part in parts:
        where = torch.arange(len(weights), device=weights.device) if part.where is None else part.where
        some_unary, some_pairs = part.chain.gradients(weights[where].to(part.chain.log_normalizer.dtype))
        d_unary.index_copy_(1, where, some_unary.to(unary.dtype))
        if pairs.shape[1] > 1:
            d_pairs.index_add_(1, where, some_pairs.to(pairs.dtype))
        else:
            d_pairs.add_(some_pairs)
    return d_unary, d_pairs


def _solve_carefully(unary: Tensor, pairs: Tensor, gradient: bool, plan: Sequence[Stretch] | None) -> list[Part]:
    """Returns the chains whose messages have small entries: those that are proved right, then the others."""
    floor = floor_of(unary.dtype, unary.shape[-1])
    # What is proved of one plan need not hold for another, and fewer sequences would get another.
    plan = plan or sweep_plan(unary, pairs)
    bound = swept(unary, pairs, both=True, every=1, floor=floor, plan=plan)
    right = _share_lost(bound, floor) <= torch.finfo(unary.dtype).eps
    del bound
    parts = []
    good, rest = right.nonzero().squeeze(1), (~right).nonzero().squeeze(1)
    if len(good):
        chain, _ = _scaled(*_sequences(unary, pairs, good), gradient, 1, plan)
        parts.append(Part(good, chain))
    if len(rest):
        parts.append(Part(rest, swept_in_logs(*_sequences(unary, pairs, rest))))
    return parts


def _sequences(unary: Tensor, pairs: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    return unary.index_select(1, where), pairs.index_select(1, where) if pairs.shape[1] > 1 else pairs


def _scaled(
    unary: Tensor, pairs: Tensor, gradient: bool, every: int, plan: Sequence[Stretch] | None
) -> tuple[LinearChain, Tensor]:
    """Returns the chains by scaled messages, and for which sequences they are right for sure, `(N,)`."""
    floor = floor_of(unary.dtype, unary.shape[-1])
    sweeps = swept(unary, pairs, both=gradient, every=every, plan=plan)
    trusted = sweeps.at_least(floor)
    counts = tuple(_counts(run, unary.shape[1], pairs) for run in sweeps.runs) if gradient else ()
    for part in counts:
        trusted = trusted & (part.total.amin((0, 1, 3)) >= floor)
    return LinearChain(sweeps.log_normalizer(), counts, unary.shape, pairs.shape), trusted


def _counts(run: Run, num_sequences: int, pairs: Tensor) -> Counts:
    """Returns the marginals of a run; its emissions are overwritten."""
    forward, backward = run.messages[:, 0], run.messages[:, 1].flip(0)
    emissions = run.emissions.clamp_(min=torch.finfo(forward.dtype).tiny)
    joint = torch.div(forward, emissions, out=emissions).mul_(backward)
    total = joint.sum(-1, keepdim=True)
    pair_total = total[1:].clone()
    pair_total[run.every - 1 :: run.every] *= run.scales[:, 0]
    C, N, K = run.stretch.count, num_sequences, forward.shape[-1]
    steps = run.matrices[:, 0].mT
    if len(pairs) > 1 and C > 1:
        steps = steps.unflatten(1, (C, N)).transpose(0, 1).flatten(0, 1)[:, : pairs.shape[1]]
    elif pairs.shape[1] > 1:
        steps = steps.unflatten(1, (C, N))[:, 0]
    return Counts(run.stretch, forward, backward, joint, total, pair_total, steps.reshape(-1, pairs.shape[1], K, K))


def _share_lost(bound: Sweeps, floor: float) -> Tensor:
    """Returns the share of each sum over paths that messages without a floor may lack, `(N,)`."""
    shares = [_run_share(run) for run in bound.runs]
    if bound.boundary is not None:
        run = bound.boundary
        meeting = (run.messages[:, 0] * run.messages[:, 1].flip(0)).sum(-1)
        shares += [(1 / meeting).sum((0, 1))]
        shares += [(1 / (run.scales[:, 0, ..., 0] * meeting[1:])).sum((0, 1))]
        shares += [(1 / (run.scales[:, 1, ..., 0] * meeting.flip(0)[1:])).sum((0, 1))]
    num_values = bound.runs[0].messages.shape[-1]
    return BOUND * num_values * floor * torch.stack(shares).sum(0)


def _run_share(run: Run) -> Tensor:
    """Returns the sum over time of 1 / (s_t Z'_t), `(N,)`."""
    length, _, C, N, K = run.messages.shape
    if length == 1:
        return 1 / run.messages[0, 0].sum((0, 2))
    matrices = run.matrices[:, 0]
    arriving = torch.matmul(matrices, columns(run.messages[:-1, :1], matrices.shape[1]))
    arriving = arriving.movedim(2, 3).reshape(length - 1, C, N, K)
    meeting = (arriving * run.messages[:, 1].flip(0)[1:]).sum(-1)
    scales = torch.ones_like(meeting)
    scales[:-1] = run.scales[:-1, 1, ..., 0].flip(0)
    return (1 / (scales * meeting)).sum((0, 1)) + (1 / meeting[0]).sum(0)
