"""What one sample statement is, as an ordinary run shows it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from torch import Tensor

from pyro_vfe.program.escapes import Sites
from pyro_vfe.program.recorder import Kind, Plate, Role


@dataclass(frozen=True)
class Variation:
    """What the size of a site's table depends on besides its latents."""

    plates: frozenset[str]
    """The plates along which it can vary."""
    elements: int
    """Numbers that are made for each of its entries: the event's elements where no matrix product sums over them."""
    separable: frozenset[str]
    """The plates around it to a stretch of which the site can be restricted."""


@dataclass(frozen=True)
class SiteStructure:
    """What one site is, from an ordinary run."""

    name: str
    role: Role
    kind: Kind
    family: str
    size: int
    """The number of values of an enumerable latent; 1 otherwise."""
    scope: Sites
    """The latents that its log-probability reads, itself included, and draws of the guide."""
    plates: tuple[Plate, ...]
    auxiliary: bool
    """Whether the program says that the other program lacks the site."""
    support: Tensor | None
    """The values of an enumerable latent, shape `(K, *event_shape)`."""
    meets: Sites
    """The latents that meet in the tensors of its log-probability; all values listed at once meet nothing."""
    chain: str | None
    """The plate along which a latent is a chain."""
    elements: int = 1
    """The numbers of which one event has its log-probability."""
    needs_score: bool = False
    """Whether it is a draw of the guide whose gradient needs the score function."""
    variation: Variation | None = None
    """What else the size of its table depends on; None where that has not been looked at."""


def elements_of(name: str, plates: Sequence[Plate]) -> tuple[str, ...]:
    """Returns the names of the elements of a latent that is written out along plates.

    Args:
        name: The latent.
        plates: The plates.
    """
    return tuple(f"{name}[{','.join(map(str, place))}]" for place in places_of(plates))


def places_of(plates: Sequence[Plate]) -> Iterator[tuple[int, ...]]:
    """Returns the elements of plates, each by its index along each of them; the last one runs fastest.

    Args:
        plates: The plates.
    """
    return product(*(range(plate.size) for plate in plates))
