"""How values leave torch: the operations by which a program branches on them, and where it did so."""

import os
import sys
from types import FrameType

import pyro
import torch

Sites = frozenset[str]
NO_SITES: Sites = frozenset()

ESCAPES = frozenset(
    [
        "item",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "__complex__",
        "__contains__",
        "tolist",
        "numpy",
        "__array__",
        "is_nonzero",
        "equal",
        "allclose",
        "nonzero",
        "argwhere",
        "unique",
        "unique_consecutive",
        "masked_select",
        "bincount",
        "full",
        "arange",
        "linspace",
        "range",
        "eye",
    ]
)
"""Operations that turn a value into something that torch cannot vectorise: a Python number, a numpy array, a shape."""

INTEGER_ARGUMENTS = frozenset(
    [
        "select",
        "narrow",
        "roll",
        "repeat",
        "tril",
        "triu",
        "zeros",
        "ones",
        "rand",
        "randn",
        "repeat_interleave",
        "split",
    ]
)
"""Operations whose later arguments are sizes or positions: a tensor there is read as a Python integer."""

_LIBRARIES = tuple(os.path.dirname(os.path.abspath(package.__file__ or "")) + os.sep for package in (torch, pyro))
_CHECKING = tuple(os.path.join(library, part) for library in _LIBRARIES for part in ("distributions", "poutine"))
_OWN = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_FORWARDERS = tuple(os.path.join(_LIBRARIES[0], name) for name in ("overrides.py", "_tensor.py"))


class Escaped(Exception):
    """The program took a latent out of torch: it can only be enumerated by running the program once per value."""

    def __init__(self, sites: Sites, operation: str, line: str) -> None:
        super().__init__(f"{operation} at {line}")
        self.sites = sites
        self.operation = operation
        self.line = line


def blame(error: Exception, sites: Sites) -> None:
    """Notes at which latents' values a program was at work when it failed; the innermost one who knows says it.

    Args:
        error: What was raised.
        sites: The latents.
    """
    if not hasattr(error, "_vfe_at_work_on"):
        error._vfe_at_work_on = sites  # type: ignore[attr-defined]


def blamed(error: BaseException | None) -> Sites | None:
    """Returns the latents at whose values a program was at work when it failed; None where nobody knows.

    Args:
        error: What was raised, perhaps from another error.
    """
    while error is not None:
        sites: Sites | None = getattr(error, "_vfe_at_work_on", None)
        if sites is not None:
            return sites
        error = error.__cause__
    return None


class StructureChanged(Exception):
    """A run did not fit the layout: the programs are to be laid out again."""


def is_library(file: str) -> bool:
    """Whether code is of torch, Pyro or this package, and not of a user.

    Args:
        file: Where the code is.
    """
    return file.startswith((*_LIBRARIES, _OWN))


def by_the_program(depth: int = 2) -> bool:
    """Whether the program itself asked: checks inside torch.distributions and Pyro look at values without branching."""
    frame: FrameType | None = sys._getframe(depth)
    while frame is not None and frame.f_code.co_filename.startswith(_FORWARDERS):
        frame = frame.f_back
    return frame is None or not frame.f_code.co_filename.startswith(_LIBRARIES)


def by_a_statement() -> bool:
    """Whether a sample statement or its distribution asked, which know their batch dims and check what they get."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and is_library(frame.f_code.co_filename):
        if frame.f_code.co_filename.startswith(_CHECKING):
            return True
        frame = frame.f_back
    return False


def user_line() -> str:
    """The innermost line of the user's program that is running, as "file.py:12"."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and is_library(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return "an unknown line"
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
