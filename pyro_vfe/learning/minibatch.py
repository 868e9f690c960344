r"""How EM on mini-batches remembers what it has seen: in pooled statistics, of the size of the parameters.

    Incremental    s  =  sum_batches s_b               the old s_b of a batch is replaced by its new one
    Online         s  <-  (1 - g_t) s + g_t s_b        per datum,  g_t = (t + 2)^-alpha

References:
    Neal and Hinton (1998), A view of the EM algorithm that justifies incremental, sparse, and other variants.
    Cappe and Moulines (2009), On-line expectation-maximization algorithm for latent data models.
"""

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from pyro_vfe.errors import VFEError
from pyro_vfe.learning.pools import Pools
from pyro_vfe.program.options import check_fields


class Adds(Protocol):
    """What can be added to its own kind."""

    def __add__(self, other: Any, /) -> Any:
        """The sum."""


T = TypeVar("T", bound=Adds)


class SumTree(Generic[T]):
    """A sum whose terms can be replaced, in log(terms) additions and without subtracting: nothing is left of the old.

    Example:
        >>> tree = SumTree[int]()
        >>> for position, term in enumerate([1, 2, 3]):
        ...     tree.put(position, term)
        >>> tree.put(1, 20)
        >>> tree.total
        24
    """

    def __init__(self) -> None:
        self._levels: list[list[T]] = [[]]

    def put(self, position: int, term: T) -> None:
        """Sets a term, or adds the next one.

        Args:
            position: Which term.
            term: Its value.
        """
        level = 0
        _set(self._levels[0], position, term)
        while len(self._levels[level]) > 1:
            position //= 2
            children = self._levels[level][2 * position : 2 * position + 2]
            level += 1
            if level == len(self._levels):
                self._levels.append([])
            _set(self._levels[level], position, children[0] + children[1] if len(children) > 1 else children[0])

    @property
    def total(self) -> T:
        """The sum of all terms."""
        return self._levels[-1][0]


def _set(values: list[T], position: int, value: T) -> None:
    if position == len(values):
        values.append(value)
    else:
        values[position] = value


class Memory(ABC):
    """The statistics that a method keeps during one run."""

    @abstractmethod
    def learn(self, pools: Pools, size: int, digest: bytes) -> None:
        """Takes in what a batch says.

        Args:
            pools: Its statistics, each datum counted once.
            size: Its number of elements of the data plate.
            digest: What the batch is known by.
        """

    @abstractmethod
    def end_epoch(self) -> None:
        """Notes that all batches have been visited."""

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether there is enough to learn parameters from."""

    @abstractmethod
    def pools(self, num_elements: int) -> Pools:
        """The statistics of all data.

        Args:
            num_elements: The number of elements of the data plate in all batches.
        """


class BatchMethod(ABC):
    """How EM learns from batches."""

    monotone: bool
    """Whether the free energy summed over batches never rises, but for rounding."""
    needs_num_data: bool
    """Whether the weight of the data next to priors has to be told."""
    needs_digests: bool
    """Whether batches are to be recognised."""

    @abstractmethod
    def memory(self) -> Memory:
        """Statistics to begin a run with."""


@dataclass(frozen=True)
class Incremental(BatchMethod):
    r"""Incremental EM: the statistics of every batch are kept, and replaced when the batch is visited again.

    F(Q_1, ..., Q_B, G) = sum_b F_b(Q_b, G), the priors counted once, never rises: an E-phase lowers it over one Q_b,
    the M-phase after it over G. Its fixed points are those of EM with all data. In the first epoch all E-phases come
    before the first M-phase: until then the sum is not defined, and a few data are a bad start. Later epochs have an
    M-phase after each batch.

    Memory: about two times the number of batches times the size of the parameters, whatever the size of the data.
    The batches have to be the same in each epoch, in any order; they are recognised by their contents.

    References:
        Neal and Hinton (1998), A view of the EM algorithm that justifies incremental, sparse, and other variants.
    """

    monotone = True
    needs_num_data = False
    needs_digests = True

    def memory(self) -> Memory:
        """Statistics to begin a run with: none."""
        return KeptStatistics()


@dataclass(frozen=True)
class Online(BatchMethod):
    r"""Online EM: a running mean of statistics per datum, s <- (1 - g) s + g s_b with g = (t + 2)^-alpha.

    The first batch is where s starts; t counts the others from 0. Memory: the size of the parameters. The batches may
    be others in each epoch (a DataLoader that shuffles), or a stream. F may rise, and with a fixed number of data the
    end is near a fixed point of EM, as near as the step size is small.

    References:
        Cappe and Moulines (2009), On-line expectation-maximization algorithm for latent data models.
    """

    alpha: float = 0.7
    """How fast old statistics are forgotten: above 1/2, so that noise is averaged out, at most 1, where each batch
    counts the same."""
    delay: int = 1
    """How many batches at the start are followed by no M-phase: few data make degenerate parameters."""

    monotone = False
    needs_num_data = True
    needs_digests = False

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0.5 < self.alpha <= 1:
            raise VFEError(
                f"Online was given alpha={self.alpha:g}.",
                hint="Above 0.5 the noise of the batches averages out, up to 1 the steps do not end early: pass a "
                "number between, such as 0.7.",
            )
        if self.delay < 0:
            raise VFEError(f"Online was given delay={self.delay}.", hint="Pass a number of batches, at least 0.")

    def memory(self) -> Memory:
        """Statistics to begin a run with: none."""
        return RunningMean(self.alpha, self.delay)


@dataclass(eq=False)
class KeptStatistics(Memory):
    """The statistics of every batch, and their sum."""

    tree: SumTree[Pools] = field(default_factory=SumTree)
    places: dict[tuple[bytes, int], int] = field(default_factory=dict)
    """Where each batch stands in the sum, by its contents and how many equal ones were before it in the epoch."""
    seen: Counter[bytes] = field(default_factory=Counter)
    """How often each digest has come up in this epoch."""
    complete: bool = False
    """Whether all batches have been visited once."""

    def learn(self, pools: Pools, size: int, digest: bytes) -> None:
        """Takes in what a batch says, instead of what it said before.

        Args:
            pools: Its statistics, each datum counted once.
            size: Not read.
            digest: What the batch is known by.

        Raises:
            VFEError: The batch was not there in the first epoch.
        """
        key = digest, self.seen[digest]
        if key not in self.places:
            if self.complete:
                raise _other_batches("A batch comes up that was not there in the first epoch")
            self.places[key] = len(self.places)
        self.tree.put(self.places[key], pools)
        self.seen[digest] += 1

    def end_epoch(self) -> None:
        """Notes that all batches have been visited.

        Raises:
            VFEError: Some that were there in the first epoch were not.
        """
        missing = len(self.places) - self.seen.total() if self.complete else 0
        if missing:
            raise _other_batches(
                f"{missing} of the {len(self.places)} batches of the first epoch did not come up again"
            )
        self.complete = True
        self.seen.clear()

    @property
    def ready(self) -> bool:
        """Whether all batches have been visited once."""
        return self.complete

    def pools(self, num_elements: int) -> Pools:
        """The sum over all batches.

        Args:
            num_elements: Not read.
        """
        return self.tree.total


@dataclass(eq=False)
class RunningMean(Memory):
    """The mean of statistics per element of the data plate, the recent ones counted more."""

    alpha: float
    delay: int
    mean: Pools | None = None
    num_batches: int = 0

    def learn(self, pools: Pools, size: int, digest: bytes) -> None:
        """Moves the mean towards what a batch says.

        Args:
            pools: Its statistics, each datum counted once.
            size: Its number of elements of the data plate.
            digest: Not read.
        """
        step = (self.num_batches + 1) ** -self.alpha
        own = pools.scaled(step / size)
        self.mean = own if self.mean is None else self.mean.scaled(1 - step) + own
        self.num_batches += 1

    def end_epoch(self) -> None:
        """Does nothing: epochs are nothing special here."""

    @property
    def ready(self) -> bool:
        """Whether the delay is over."""
        return self.num_batches > self.delay

    def pools(self, num_elements: int) -> Pools:
        """The mean times the number of elements.

        Args:
            num_elements: The number of elements of the data plate in all batches.
        """
        assert self.mean is not None
        return self.mean.scaled(num_elements)


def _other_batches(fact: str) -> VFEError:
    return VFEError(
        f"{fact}: Incremental replaces what a batch said before, and needs the same batches in each epoch.",
        hint="Let the DataLoader not shuffle (shuffle=False), or shuffle whole batches; for batches that change pass "
        "method=vfe.Online().",
    )
