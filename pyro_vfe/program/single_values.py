"""Programs that run with enumerated values alone: they count on the dims that such a value has, and a draw has not.

    gather(positions, z, -1)        of z of shape (K, 1, 1), and not of the shape of its plates

Where an ordinary run fails on a size, it is done again with one value of each enumerable latent, of size 1 along the
dims that enumeration gives it. All elements of its plates have that value: they cannot be told apart by such runs.
"""

import re
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from pyro_vfe.errors import ShapeError, VFEError, VFEWarning, callers_level
from pyro_vfe.program.escapes import is_library
from pyro_vfe.program.indices import place_of
from pyro_vfe.program.markov_chain import MarkovChain
from pyro_vfe.program.recorder import Plate
from pyro_vfe.program.supports import unwrapped

_OF_SIZES = re.compile(
    "[Ss]izes?\\b|[Dd]im(ension)?s?\\b|[Ss]hapes?\\b|mismatch|broadcast|[Ii]ncompatible|too many indices|"
    "tuple index|to unpack"
)
"""What torch and Python say of sizes that do not fit together, in errors of several kinds."""

_OF_VALUES = ("out of bounds", "out of range in self", "constraint", "support")
"""What is said of numbers, in the same errors."""

_BY_PYTHON = ("tuple index", "to unpack")
"""What Python itself says in a line of the program."""


class Deeper(Exception):
    """Plates take more dims than was known when values were given."""


class Ones:
    """Gives latents single values of the dims that enumerated ones have, where the programs fail with draws."""

    def __init__(self) -> None:
        self.dims = 0
        """How many batch dims a value has; 0 where it is a draw."""
        self._deepest = 0
        self._has_latents = False
        self._first: Exception | None = None

    def drawn(self, fn: Any, value: Tensor, plates: Iterable[Plate]) -> Tensor:
        """Returns a latent's value: a draw, or one value of it.

        Args:
            fn: Its distribution.
            value: A draw.
            plates: The plates around it.
        """
        self._has_latents = True
        self._note(plates)
        if not self.dims:
            return value
        for dim in range(-len(fn.batch_shape), -1 if isinstance(unwrapped(fn), MarkovChain) else 0):
            value = value.narrow(dim - len(fn.event_shape), 0, 1)
        return with_own_dims(value, fn, self.dims).clone()

    def ran(self, plates: Iterable[Plate]) -> None:
        """Notes which plates a run met.

        Args:
            plates: All of them.

        Raises:
            Deeper: The values had fewer dims than enumerated ones will have.
        """
        self._note(plates)
        if 0 < self.dims <= self._deepest:
            raise Deeper
        self._first = None

    def instead(self, error: Exception) -> None:
        """Sees to it that the next run has single values.

        Args:
            error: Why the last one failed.

        Raises:
            Exception: That error, or the first one, where nothing is left to be tried.
        """
        if 0 < self.dims <= self._deepest:
            self.dims = self._deepest + 1
            return
        if self._first is not None:
            self._first._vfe_neither = True  # type: ignore[attr-defined]
            raise self._first
        if self.dims or not self._has_latents or not _is_of_sizes(error):
            raise error
        self._first, self.dims = error, self._deepest + 1

    def _note(self, plates: Iterable[Plate]) -> None:
        self._deepest = max([self._deepest, *(-plate.dim for plate in plates)])


def with_own_dims(value: Tensor, fn: Any, dims: int) -> Tensor:
    """Returns a latent's value with so many batch dims, of size 1 where it lacks them.

    Args:
        value: The value.
        fn: The latent's distribution.
        dims: How many.
    """
    missing = dims + len(fn.event_shape) - value.dim()
    return value.reshape((1,) * max(0, missing) + tuple(value.shape))


def _is_of_sizes(error: Exception) -> bool:
    said = str(error)
    if isinstance(error, VFEError) or any(words in said for words in _OF_VALUES) or not _OF_SIZES.search(said):
        return False
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    return is_library(innermost.f_code.co_filename) or any(words in said for words in _BY_PYTHON)


@contextmanager
def runs_somehow() -> Iterator[None]:
    """Says where programs fail that run neither with sampled values nor with enumerated ones.

    Raises:
        ShapeError: In place of torch's own error.
    """
    try:
        yield
    except (IndexError, RuntimeError, ValueError) as error:
        if not hasattr(error, "_vfe_neither"):
            raise
        raise _unfit("The programs run neither with sampled values nor with enumerated ones", error) from error


@contextmanager
def with_draws(what: str) -> Iterator[None]:
    """Says where a program fails that is run with sampled values, and may be one that takes enumerated ones alone.

    Args:
        what: What it is run for.

    Raises:
        ShapeError: In place of torch's own error.
    """
    try:
        yield
    except (IndexError, RuntimeError, ValueError) as error:
        if not _is_of_sizes(error):
            raise
        raise _unfit(f"The program does not run with sampled values, which {what} takes", error) from error


def _unfit(fact: str, error: Exception) -> ShapeError:
    said, place = str(error).partition("\n")[0].rstrip(". "), place_of(error)
    return ShapeError(
        f"{fact}: {type(error).__name__}: {said}" + (f", at {place}." if place else "."),
        hint="Make the shapes fit that meet there. A sampled value has the shape of the plates around it; an "
        "enumerated one has size 1 there, and dims of its own to the left of the plates. What broadcasts, with dims "
        "counted from the right, fits both.",
    )


def warn_of_single_values() -> None:
    """Says once that programs were compared with single values alone."""
    warnings.warn(
        "The programs run with enumerated values and not with sampled ones, and F is that of enumeration. It was "
        "checked with all elements of a plate at one value, so whether one of them reads another's could not be seen. "
        "Write what reads a latent so that a value of the plates' shape fits too (table[z], dims counted from the "
        "right), and this is not said.",
        VFEWarning,
        stacklevel=callers_level(),
    )
