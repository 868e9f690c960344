"""What programs may keep while one call enumerates them: its runs have the same arguments and parameters.

A guide that is costly to make, the exact posterior say, is so made once for all runs of a call: the ordinary ones that
lay the programs out, the enumerated one of each path, and those that check it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_kept: ContextVar[dict[object, Any] | None] = ContextVar("kept for one call", default=None)


@contextmanager
def one_call() -> Iterator[None]:
    """Runs a block as one call: what is kept in it is forgotten after it."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def kept() -> dict[object, Any]:
    """Returns what the present call keeps; outside of a call, a new and empty store."""
    found = _kept.get()
    return {} if found is None else found
