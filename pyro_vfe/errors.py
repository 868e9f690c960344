"""What goes wrong, said so that the reader can mend it: the site, the fact, the fix."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType


class VFEError(ValueError):
    """A program or graph that cannot be served: the fact, then the way out."""

    def __init__(self, problem: str, *, hint: str = "") -> None:
        """Args:
        problem: The fact.
        hint: The way out; nothing where Pyro's traces make an error anew of all that it said.
        """
        super().__init__(f"{problem} {hint}".rstrip())
        self.problem = problem


class ArgumentError(VFEError, TypeError):
    """A program that cannot be called with the data that it was given."""


class CostError(VFEError):
    """An exact computation that would not fit; raised before anything large is allocated."""

    def __init__(self, problem: str, *, hint: str, sites: Iterable[str] = (), excess: float = 1.0) -> None:
        """Args:
        problem: The fact.
        hint: The way out.
        sites: What does not fit together: sites and plates.
        excess: How many times too large it is, where that is known.
        """
        super().__init__(problem, hint=hint)
        self.sites = tuple(sites)
        self.excess = excess


class ImpossibleDataError(VFEError):
    """The data have probability zero, so there is no posterior to report."""


class PlateError(VFEError):
    """A site is read from outside one of its plates, or a plate cannot be kept."""


class UnenumerableError(VFEError):
    """A latent whose values cannot be listed."""


class MissingGuideSiteError(VFEError):
    """A latent of the model that has to be drawn, and that the guide does not draw."""

    def __init__(self, latent: str, *, site: str, hint: str) -> None:
        super().__init__(f"{latent}, and no guide draws it.", hint=hint)
        self.latent = latent
        self.site = site


class NameClashError(VFEError):
    """One name for two things."""


class EscapeError(VFEError):
    """A latent leaves torch where the program cannot be run once per value."""


class StructureError(VFEError):
    """The programs' structure is not what it was, or not what enumeration needs."""


class SupportError(VFEError):
    """Guide and model disagree about the values of a site."""


class ScaleError(VFEError):
    """Weights or masks under which the free energy does not split."""


class SpotCheckError(VFEError):
    """The enumerated tables differ from an ordinary run."""


class NotFiniteError(VFEError):
    """A free energy that is infinite or not a number."""


class NotFiniteGradientError(NotFiniteError):
    """A gradient that is infinite or not a number; it has not been written."""


class PlateKeptError(PlateError):
    """A plate for which results per element do not exist."""


class ShapeError(VFEError):
    """Tensors whose shapes do not fit together."""


class ProbabilityError(VFEError):
    """Numbers that are no probabilities."""


class DegenerateError(VFEError):
    """The best value of a parameter lies where its density is infinite, or cannot be written down."""


class VFEWarning(UserWarning):
    """A result that is there and is not what was asked for: the fact, then the way out."""


@contextmanager
def located(where: str) -> Iterator[None]:
    """Says in the library's own errors where they were raised; others pass as they are.

    Args:
        where: In words, such as "the M-phase of iteration 3".
    """
    try:
        yield
    except VFEError as error:
        error.args = (f"In {where}: {error}",)
        raise


def described(given: object) -> str:
    """Something that a user gave, in words: "the class Hard", "a FreeEnergy", "'hard'".

    Args:
        given: Anything.
    """
    if isinstance(given, type):
        return f"the class {given.__name__}"
    if given is None or isinstance(given, (str, bool, int, float)):
        return repr(given)
    if isinstance(given, FunctionType) and given.__name__ != "<lambda>":
        return f"the function {given.__name__}"
    name = type(given).__name__
    return f"{'an' if name[0] in 'AEIOaeiou' or name.startswith('ELBO') else 'a'} {name}"


def callers_level() -> int:
    """How many frames up, from the frame that asks, the first one is that is not of this package: the user's."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("pyro_vfe."):
        level, frame = level + 1, frame.f_back
    return level
