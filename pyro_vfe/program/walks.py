r"""Paths of Markov chains, drawn for all steps at once where that is faster.

    z_t  =  f_t(z_t-1) ,        f_t(k)  =  the state whose share of [0, 1) under P(z_t | z_t-1 = k) holds u_t

Each step is a random map of states to states. Maps compose, so a walk over T steps is one over T / 2 maps of two steps
each, and so on: log2 T operations instead of T, which draw the same path from the same levels u.

References:
    Diaconis and Freedman (1999), Iterated random functions.
    Blelloch (1990), Prefix sums and their applications.
"""

import torch
from torch import Tensor

WIDE = 2**12
"""Table entries per step above which a step costs more than calling torch for it does."""

BLOCK = 2**22
"""Table entries that are held at a time."""


def drawn(probs: Tensor, level: Tensor) -> Tensor:
    """Returns the state whose share of [0, 1) holds the level; one of probability zero never.

    Args:
        probs: Probabilities of the states, `(*batch, K)`.
        level: Uniform random numbers, `(*batch,)`.
    """
    return _state_at(_thresholds(probs), level)


def walk(start: Tensor, conditionals: Tensor, rows: Tensor, levels: Tensor) -> Tensor:
    """Returns the states after each step of M walks, int64 `(T, M)`.

    Args:
        start: States before the first step, `(M,)`.
        conditionals: Probabilities of the next state (last axis) given the one before, `(T or 1, R, K, K)`.
        rows: Which of the R tables each walk follows, `(M,)`.
        levels: Uniform random numbers, `(T, M)`.
    """
    entries = len(start) * conditionals.shape[-1] ** 2
    length = 1 if entries > WIDE else BLOCK // max(entries, 1)
    same = len(conditionals) == 1
    tables = _thresholds(conditionals) if same else conditionals
    state, path = start, [levels.new_empty((0, len(start)), dtype=torch.int64)]
    for t in range(0, len(levels), length):
        level, table = levels[t : t + length], tables if same else tables[t : t + length]
        if length == 1:
            row = table[0, rows, state]
            after = _state_at(row if same else _thresholds(row), level[0])[None]
        else:
            table = table[:, rows]
            after = _followed(state, _state_at(table if same else _thresholds(table), level[..., None]))
        state = after[-1]
        path.append(after)
    return torch.cat(path)


def _thresholds(probs: Tensor) -> Tensor:
    """Returns the level below which each state or one before it is drawn; the last possible state takes the rest."""
    cumulative = probs.cumsum(-1)
    return cumulative.masked_fill(cumulative >= cumulative[..., -1:], torch.inf)


def _state_at(thresholds: Tensor, level: Tensor) -> Tensor:
    return (thresholds <= level[..., None]).sum(-1)


def _followed(start: Tensor, maps: Tensor) -> Tensor:
    """Returns where each walk is after each of its maps, `(T, M)`, from `(M,)` and `(T, M, K)`."""
    if len(maps) == 1:
        return maps[0].gather(-1, start[:, None]).T
    even, odd = maps[0::2], maps[1::2]
    after_odd = _followed(start, odd.gather(-1, even[: len(odd)]))
    before_even = torch.cat([start[None], after_odd])[: len(even)]
    path = maps.new_empty(maps.shape[:-1])
    path[0::2] = even.gather(-1, before_even[..., None]).squeeze(-1)
    path[1::2] = after_odd
    return path
