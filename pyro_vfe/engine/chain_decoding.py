r"""Paths of chains: the best one, or draws, given what was decided outside of their plate.

    path  =  argmax or draw of exp( sum_t unary[t](s_t) + pairs[t](s_{t-1}, s_t) )        at the decided values

References:
    Viterbi (1967), Error bounds for convolutional codes and an asymptotically optimum decoding algorithm.
    Chib (1996), Calculating posterior distributions and modal estimates in Markov mixture models (backward draws).
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from pyro_vfe.engine.chain_elimination import ChainTables
from pyro_vfe.engine.chain_groups import ChainGroup
from pyro_vfe.engine.factors import Table
from pyro_vfe.engine.structure import previous

SAMPLE = "__sample__"
"""The axis of the draws."""

Paths = Callable[[Tensor, Tensor], Tensor]
"""Takes log potentials `(T, N, K)` and `(T - 1 or 1, N or 1, K, K)`, gives one path per sequence, `(T, N)`."""


def path_score(unary: Tensor, pairs: Tensor, path: Tensor) -> Tensor:
    """Returns the log weight of one path per sequence, `(N,)`.

    Args:
        unary: Log potentials of the states, `(T, N, K)`.
        pairs: Log potentials of neighbours, `(T - 1 or 1, N or 1, K, K)`.
        path: The states, int64 `(T, N)`.
    """
    score = unary.gather(-1, path.unsqueeze(-1)).squeeze(-1).sum(0)
    if len(path) == 1:
        return score
    step = torch.arange(len(path) - 1, device=path.device).unsqueeze(-1) % pairs.shape[0]
    sequence = torch.arange(path.shape[1], device=path.device) % pairs.shape[1]
    return score + pairs[step, sequence, path[:-1], path[1:]].sum(0)


def decide_chain(
    sweep: ChainTables, plates: Mapping[str, int], num_samples: int, paths: Paths, decided: dict[str, Table]
) -> None:
    """Adds to `decided` the states of a chain, over the draws and its plates.

    Args:
        sweep: The chain's log potentials.
        plates: The size of each plate.
        num_samples: The number of draws.
        paths: How paths are chosen.
        decided: Indices by variable, among them those that the chain's sequences depend on.
    """
    group = sweep.group
    around = {SAMPLE: num_samples} | {plate: plates[plate] for plate in sorted(group.plates - {group.plate})}
    index = _sequence_index(sweep, around, plates, decided)
    unary = sweep.unary[:, index]
    pairs = sweep.pairs[:, index] if sweep.pairs.shape[1] > 1 else sweep.pairs
    chosen = paths(unary, pairs).reshape(group.steps, *around.values())
    axes = (group.plate, *around)
    for name, states in zip(group.states, unravelled(chosen, sweep.state_sizes), strict=True):
        decided[name] = Table(states, axes)


def _sequence_index(
    sweep: ChainTables, around: Mapping[str, int], plates: Mapping[str, int], decided: Mapping[str, Table]
) -> Tensor:
    """Which of the sweep's sequences each draw and plate element is, flat."""
    axes = tuple(around)
    index = torch.zeros((1,) * len(axes), dtype=torch.int64, device=sweep.unary.device)
    for axis, size in zip(sweep.batch, sweep.batch_sizes, strict=True):
        at = decided[axis] if axis in decided else Table(torch.arange(plates[axis], device=index.device), (axis,))
        index = index * size + at.aligned(axes)
    return index.expand(*around.values()).reshape(prod(around.values()))


def at_start(decided: Mapping[str, Table], group: ChainGroup) -> dict[str, Table]:
    """Returns what was decided at the first element of a chain."""
    return {name: table.selected(group.plate, 0) for name, table in decided.items()}


def after_start(decided: Mapping[str, Table], group: ChainGroup) -> dict[str, Table]:
    """Returns what was decided at the other elements, previous states among them."""
    steps = group.steps - 1
    known = {name: table.narrowed(group.plate, 1, steps) for name, table in decided.items()}
    known |= {previous(name): decided[name].narrowed(group.plate, 0, steps) for name in group.states}
    return known


def joined(parts: Sequence[Table], plate: str) -> Table:
    """Returns the first element's indices and the others' as one table."""
    rest = tuple(axis for axis in parts[0].axes if axis != plate)
    aligned = [part.aligned((plate, *rest)) for part in parts]
    return Table(torch.cat(aligned), (plate, *rest))


def unravelled(index: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Returns a flat index as one index per axis."""
    parts: list[Tensor] = []
    for size in reversed(sizes):
        parts.append(index % size)
        index = index // size
    return parts[::-1]
