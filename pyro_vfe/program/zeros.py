r"""Probabilities of exactly zero: their logs, and where a gradient in them can be had.

    d log sum_v P(v) / d P(v)  =  1 / sum_v P(v)            also where P(v) = 0

The log of zero is -inf, and a sum of exponentials has no derivative in it: what is a number in the linear domain is
0 times infinity in logs. So a zero can be filled, while tables are made, with a probability that no sum can tell from
zero. Where it is filled the derivative in the logs is the one in the linear domain.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

_TINY = {torch.float64: 1e-200}


def tiny(dtype: torch.dtype) -> float:
    """Returns what fills a zero: far below rounding in any sum, and far above the smallest number.

    Args:
        dtype: Of the probabilities.
    """
    return _TINY.get(dtype, 1e-25)


@dataclass(eq=False)
class Zeros:
    """What becomes of probabilities of zero while tables are made, and whether there were any."""

    filled: bool = False
    """Whether they are filled."""
    met: list[Tensor] = field(default_factory=list)
    """Where they stand, for each log that carries a gradient."""

    @property
    def any(self) -> bool:
        """Whether a log that carries a gradient met a zero."""
        return bool(self.met) and bool(torch.stack([where.any().cpu() for where in self.met]).any())


_present: ContextVar[Zeros | None] = ContextVar("what becomes of zeros", default=None)


@contextmanager
def watched_zeros() -> Iterator[Zeros]:
    """Runs a block that makes tables; what it yields knows afterwards whether they met zeros."""
    yield from _with(Zeros())


@contextmanager
def filled_zeros() -> Iterator[Zeros]:
    """Runs a block that makes tables, in which zeros are filled where a parameter could move them."""
    yield from _with(Zeros(filled=True))


def are_filled() -> bool:
    """Returns whether tables that are made now have their zeros filled: those made before have not."""
    present = _present.get()
    return present is not None and present.filled


def _with(present: Zeros) -> Iterator[Zeros]:
    token = _present.set(present)
    try:
        yield present
    finally:
        _present.reset(token)


def log_at_zero(probs: Tensor, at_zero: float = -torch.inf) -> Tensor:
    """Returns the log of probabilities, `at_zero` with gradient zero where they are zero, unless zeros are filled.

    Args:
        probs: Probabilities; the log of a negative number is NaN, and is reported.
        at_zero: What stands for the log of zero.
    """
    alive = probs != 0
    present = _present.get()
    if present is not None and probs.requires_grad:
        present.met.append(~alive)
        if present.filled:
            return torch.where(alive, probs, probs + tiny(probs.dtype)).log()
    return probs.where(alive, 1.0).log().where(alive, at_zero)
