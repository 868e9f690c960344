r"""Forward and backward messages of a chain as scaled probabilities, both directions in one loop.

    a_t+1  =  (a_t A_t) * e_t+1        e_t = exp(unary_t - max unary_t)
    b_t    =  (b_t+1 A_t') * e_t       A_t = exp(pairs_t) / (largest sum of a row)

Both have one form, so that a step is one batched matrix product and one product of entries. As e <= 1 and the rows of A
sum to at most 1, messages never grow; every few steps they are scaled to sum to one. Chunks are swept as if they were
sequences of their own, once the messages at their ends are known from their transfer matrices.

Shapes: L steps per chunk, D directions (forward, backward), C chunks, N sequences, K values. A backward message lies at
the index of its sweep, that is mirrored in time within its chunk. Where all rows share a matrix, values lie before
sequences in memory, whatever the order of the dimensions: a product with such columns is twice as fast.

References:
    Rabiner (1989), A tutorial on hidden Markov models, section V.A (scaling).
    Särkkä and García-Fernández (2021), Temporal parallelization of Bayesian smoothers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vfe.engine.chain_plan import Stretch, plan_sweep

Factors = tuple[tuple[Tensor, Tensor], ...]
"""Entries of a message, each with the emissions that multiply them."""


@dataclass(frozen=True)
class Run:
    """Messages of chunks that were swept side by side."""

    stretch: Stretch
    """Which steps."""

    emissions: Tensor
    """e in the order of time, `(L + 1, C, N, K)`."""

    matrices: Tensor
    """What columns are multiplied by, A' and A, `(L or 1, D, 1 or C * N, K, K)`."""

    messages: Tensor
    """a and b, `(L + 1, D, C, N, K)`."""

    scales: Tensor
    """What messages were divided by, every so many steps, `(R, D, C, N, 1)`."""

    every: int
    """After how many steps messages are scaled."""

    def at_least(self, floor: float) -> Tensor:
        """Returns which sequences have no entry below `floor`, neither before nor after scaling, `(N,)`."""
        after, before = self.messages, self.messages[self.every :: self.every] * self.scales
        reach = torch.ones(after.shape[3], dtype=torch.bool, device=after.device)
        for entries in (after, before):
            if entries.numel() and not bool(entries.amin() >= floor):
                reach &= entries.amin((0, 1, 2, 4)) >= floor
        return reach

    def log_growth(self) -> Tensor:
        """Returns the log of the forward mass at the ends of the chunks, `(N,)`."""
        ends = self.messages[-1, 0].sum(-1).log().sum(0)
        return ends + self.scales[:, 0].log().sum((0, 1)).squeeze(-1)


@dataclass(frozen=True)
class Sweeps:
    """Messages of whole sequences."""

    runs: tuple[Run, ...]
    """One per stretch of the plan."""

    offset: Tensor
    """The log of what e and A were divided by, `(N,)`."""

    boundary: Run | None
    """Messages at the ends of the chunks, where there are several: each chunk is a step, its matrix the transfer."""

    def at_least(self, floor: float) -> Tensor:
        """Returns which sequences have no entry below `floor`, `(N,)`."""
        runs = (*self.runs, self.boundary) if self.boundary else self.runs
        return torch.stack([run.at_least(floor) for run in runs]).all(0)

    def log_normalizer(self) -> Tensor:
        """Returns the log sum over the paths of each sequence, `(N,)`."""
        return self.offset + torch.stack([run.log_growth() for run in self.runs]).sum(0)


def swept(
    unary: Tensor, pairs: Tensor, *, both: bool, every: int, floor: float = 0.0, plan: Sequence[Stretch] | None = None
) -> Sweeps:
    """Returns the messages of all sequences.

    Args:
        unary: Log potentials, `(T, N, K)`.
        pairs: Log potentials, `(T - 1 or 1, N or 1, K, K)`.
        both: Sweep backward as well.
        every: Messages are scaled after so many steps.
        floor: Entries are raised to it, so that messages are bounds from above; 0 leaves them.
        plan: Which steps are swept side by side; the cheapest by default.
    """
    T = len(unary)
    plan = plan or sweep_plan(unary, pairs)
    peaks = _finite(unary.amax(-1, keepdim=True))
    rows = _finite(pairs.logsumexp(-1).amax(-1))
    potentials = (pairs - rows[..., None, None]).exp()
    offset = peaks.double().sum(0).squeeze(-1)
    if T > 1:
        offset = offset + (rows.double().sum(0) if len(pairs) == T - 1 else rows[0].double() * (T - 1))
    directions = 2 if both else 1
    loaded = [_load(stretch, unary, peaks, potentials, directions) for stretch in plan]
    if sum(stretch.count for stretch in plan) == 1:
        (emissions, matrices), boundary = loaded[0], None
        starts = [torch.stack([emissions[0], emissions[-1]][:directions])]
    else:
        transfers = [_transfer(*both_of, every, floor) for both_of in loaded]
        boundary = _across(torch.cat(transfers), loaded[0][0][0, 0], directions, every, floor)
        starts = _ends(plan, boundary.messages, loaded)
    runs = []
    for stretch, (emissions, matrices), start in zip(plan, loaded, starts, strict=True):
        groups = matrices.shape[2]
        messages = _empty(emissions, (len(emissions), directions, *emissions.shape[1:]), groups == 1)
        messages[0] = start.clamp(min=floor)
        scales = _sweep_all(messages, matrices, emissions, every, floor)
        runs.append(Run(stretch, emissions, matrices, messages, scales, every))
    return Sweeps(tuple(runs), offset.to(unary.dtype), boundary)


def sweep_plan(unary: Tensor, pairs: Tensor) -> tuple[Stretch, ...]:
    """Returns which steps are best swept side by side."""
    T, N, K = unary.shape
    return plan_sweep(T - 1, N, K, len(pairs) > 1 or pairs.shape[1] > 1)


def _finite(peaks: Tensor) -> Tensor:
    """Returns peaks of which none is -inf, so that -inf less its peak is -inf."""
    return peaks.clamp(min=torch.finfo(peaks.dtype).min)


def _load(stretch: Stretch, unary: Tensor, peaks: Tensor, potentials: Tensor, directions: int) -> tuple[Tensor, Tensor]:
    """Returns emissions `(L + 1, C, N, K)` and matrices `(L or 1, D, 1 or C * N, K, K)` of a stretch."""
    (_, N, K), C, L = unary.shape, stretch.count, stretch.length
    shared = potentials.shape[1] == 1 and (len(potentials) == 1 or C == 1)
    emissions = _empty(unary, (L + 1, C, N, K), shared)
    torch.sub(_windows(unary, stretch), _windows(peaks, stretch), out=emissions).exp_()
    steps = potentials[stretch.first : stretch.last] if len(potentials) > 1 else potentials
    if not shared:
        steps = steps.unflatten(0, (C, -1)) if len(potentials) > 1 else steps[None]
        steps = steps.transpose(0, 1).expand(-1, C, N, K, K).flatten(1, 2)
    if directions == 1:
        return emissions, steps.mT[:, None]
    return emissions, torch.stack([steps.mT, steps.flip(0)], 1)


def _empty(like: Tensor, shape: Sequence[int], shared: bool) -> Tensor:
    """Returns memory for `(..., C, N, K)`, values before sequences if these share a matrix."""
    if not shared:
        return like.new_empty(*shape)
    *outer, C, N, K = shape
    return like.new_empty(*outer, K, C, N).movedim(-3, -1)


def columns(messages: Tensor, groups: int) -> Tensor:
    """Returns a view of `(L, D, C, N, K)` as `(L, G, K, M)`, where `groups` = 1 or C * N share a matrix each."""
    if groups == 1:
        return messages.movedim(-1, 2).flatten(3)
    return messages.flatten(1, 3)[..., None]


def _windows(values: Tensor, stretch: Stretch) -> Tensor:
    """Returns a view of `(T, N, K)` as chunks that share their ends, `(L + 1, C, N, K)`."""
    stop = stretch.last + 1
    chunks = values[stretch.first : stop].unfold(0, stretch.length + 1, max(stretch.length, 1))
    return chunks.permute(3, 0, 1, 2)


def _sweep_all(messages: Tensor, matrices: Tensor, emissions: Tensor | None, every: int, floor: float) -> Tensor:
    """Fills `messages[1:]` from `messages[0]` and returns the scales, `(R, D, C, N, 1)`."""
    groups = matrices.shape[2]
    factors: list[Factors] = [()] * len(messages)
    if emissions is not None:
        there, back = messages[:, 0].unbind(0), messages[:, -1].unbind(0)
        e = emissions.unbind(0)
        both = messages.shape[1] == 2
        factors = [
            ((there[t], e[t]), (back[t], e[-1 - t])) if both else ((there[t], e[t]),) for t in range(len(messages))
        ]
    scales = _sweep(columns(messages, groups).unbind(0), factors, matrices.flatten(1, 2), every, floor)
    return scales.view(-1, *messages.shape[1:4], 1)


def _sweep(
    messages: Sequence[Tensor],
    factors: Sequence[Factors],
    matrices: Tensor,
    every: int,
    floor: float,
) -> Tensor:
    """Runs one recursion in place.

    Args:
        messages: Those of each step as columns, `(G, K, M)`; the first is given.
        factors: Parts of each message, and what they are multiplied by.
        matrices: `(L or 1, G, K, K)`.
        every: As for `swept`.
        floor: As for `swept`.

    Returns:
        The scales, `(R, G, 1, M)`.
    """
    tiny = torch.finfo(messages[0].dtype).tiny
    steps = matrices.unbind(0) if len(matrices) > 1 else matrices.unbind(0) * (len(messages) - 1)
    scales = []
    for t in range(1, len(messages)):
        message = torch.bmm(steps[t - 1], messages[t - 1], out=messages[t])
        for entries, emissions in factors[t]:
            entries.mul_(emissions)
        if floor:
            message.clamp_(min=floor)
        if t % every == 0:
            scales.append(message.sum(1, keepdim=True).clamp_(min=tiny))
            message.div_(scales[-1])
    return torch.stack(scales) if scales else matrices.new_empty(0, len(messages[0]), 1, messages[0].shape[2])


def _transfer(emissions: Tensor, matrices: Tensor, every: int, floor: float) -> Tensor:
    """Returns the transfer matrix of every chunk, `(C, N, K, K)`, its largest row summing to about one."""
    length, (C, N, K), groups = len(emissions) - 1, emissions.shape[1:], matrices.shape[2]
    factors = columns(emissions[:, None], groups)
    factors = factors.reshape(length + 1, *((K, 1, C * N) if groups == 1 else (C * N, K, 1)))
    state = torch.eye(K, dtype=emissions.dtype, device=emissions.device)
    state = state[..., None].expand(K, K, C * N) if groups == 1 else state.expand(C * N, K, K)
    entries = (state.contiguous(), torch.empty_like(state, memory_format=torch.contiguous_format))
    messages = [entry.view(groups, K, -1) for entry in entries]
    scales = _sweep(
        [messages[t % 2] for t in range(length + 1)],
        [((entries[t % 2], factor),) for t, factor in enumerate(factors.unbind(0))],
        matrices[:, 0],
        every,
        floor,
    )
    logs, last = scales.log().sum(0), messages[length % 2]
    if groups == 1:
        last, logs = last.view(K, K, C * N).permute(2, 0, 1), logs.view(K, C * N).T
    logs = logs.reshape(C, N, K)
    sizes = (logs - logs.amax(-1, keepdim=True)).exp()
    return last.mT.reshape(C, N, K, K) * sizes[..., None]


def _across(transfers: Tensor, first: Tensor, directions: int, every: int, floor: float) -> Run:
    """Returns the messages at the ends of the chunks; those backward lack the emission at their own time.

    Args:
        transfers: A matrix per chunk, `(C, N, K, K)`.
        first: Emissions at the beginning, `(N, K)`.
        directions: 1 or 2.
        every: As for `swept`.
        floor: As for `swept`.
    """
    C, N, K, _ = transfers.shape
    both = (transfers.mT, transfers.flip(0))[:directions]
    matrices = torch.stack(both, 1)
    messages = _empty(first, (C + 1, directions, 1, N, K), N == 1)
    messages[0, 0, 0] = first.clamp(min=floor)
    messages[0, 1:] = 1.0
    scales = _sweep_all(messages, matrices, None, every, floor)
    return Run(Stretch(0, 1, C), messages, matrices, messages, scales, every)


def _ends(plan: Sequence[Stretch], boundary: Tensor, loaded: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Returns the messages that each stretch starts its sweeps from, `(D, C, N, K)`."""
    masses = boundary.sum(-1, keepdim=True)
    masses[0] = 1.0
    boundary, starts, begin = boundary / masses, [], 0
    for stretch, (emissions, _) in zip(plan, loaded, strict=True):
        stop = begin + stretch.count
        forward = boundary[begin:stop, 0, 0]
        if boundary.shape[1] == 1:
            starts.append(forward[None])
        else:
            backward = boundary[:, 1, 0].flip(0)[begin + 1 : stop + 1]
            starts.append(torch.stack([forward, backward * emissions[-1]]))
        begin = stop
    return starts
