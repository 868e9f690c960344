r"""How a chain's steps are swept: one after another, or in chunks side by side. A plan sees sizes only.

    num_steps  =  sum over stretches of count * length

A sequential sweep is one chunk. C chunks of length L first need their K x K transfer matrices, C K rows swept at once
for L steps, then C short steps over the chunks, then all chunks again, from the right messages: K times the work in L
instead of C L calls. Few long sequences gain, many short ones lose.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

CALL = 2.5
"""Microseconds that a step costs before any arithmetic: one matrix product and one product of entries."""

ENTRY = 4e-4
"""Microseconds per entry of a message that is written."""

TERM = 1e-4
"""Microseconds per term of a matrix product."""

OWN_MATRIX = 0.1
"""Microseconds more per matrix where every row has its own."""


@dataclass(frozen=True)
class Stretch:
    """Steps that are cut into chunks of one length, swept side by side."""

    first: int
    """The step that it begins with: time `first` is its first message."""

    count: int
    """The number of chunks."""

    length: int
    """Steps per chunk."""

    @property
    def last(self) -> int:
        """The time of its last message."""
        return self.first + self.count * self.length


@lru_cache(maxsize=2**12)
def plan_sweep(num_steps: int, num_sequences: int, num_values: int, own_matrices: bool) -> tuple[Stretch, ...]:
    """Returns the stretches that cost least; a single chunk is a sequential sweep.

    Args:
        num_steps: Transitions per sequence, T - 1.
        num_sequences: Sequences swept side by side, N.
        num_values: Values of the chain, K.
        own_matrices: Whether steps or sequences have matrices of their own.
    """
    sizes = (num_sequences, num_values, own_matrices)
    sequential = (Stretch(0, 1, num_steps),)
    rough = [_cut(num_steps, length) for length in _grid(num_steps)]
    if not rough:
        return sequential
    length = min(rough, key=lambda plan: cost_of(plan, *sizes))[0].length
    near = [_cut(num_steps, other) for other in range(length - length // 8, length + length // 8 + 1)]
    return min([sequential, *near], key=lambda plan: cost_of(plan, *sizes))


def cost_of(plan: tuple[Stretch, ...], num_sequences: int, num_values: int, own_matrices: bool) -> float:
    """Returns the expected microseconds of a forward and a backward sweep.

    Args:
        plan: What is swept.
        num_sequences: As for `plan_sweep`.
        num_values: As for `plan_sweep`.
        own_matrices: As for `plan_sweep`.
    """
    chunks = sum(stretch.count for stretch in plan)
    total = 0.0
    for stretch in plan:
        groups = stretch.count * num_sequences
        total += stretch.length * _step(2 * groups, 1, num_values, own_matrices)
        if chunks > 1:
            total += stretch.length * _step(groups, num_values, num_values, own_matrices)
    if chunks > 1:
        total += chunks * _step(2 * num_sequences, 1, num_values, True)
    return total


def _step(groups: int, rows: int, num_values: int, own_matrices: bool) -> float:
    entries = groups * rows * num_values
    return CALL + entries * (ENTRY + TERM * num_values) + (OWN_MATRIX * groups if own_matrices else 0.0)


def _cut(num_steps: int, length: int) -> tuple[Stretch, ...]:
    count, rest = divmod(num_steps, length)
    chunks = Stretch(0, count, length)
    return (chunks, Stretch(chunks.last, 1, rest)) if rest else (chunks,)


def _grid(num_steps: int) -> Iterable[int]:
    length = 2
    while 2 * length <= num_steps:
        yield length
        length += max(1, length // 4)
