"""What a run does to tensors that were computed from latents: whether a program still takes the path that was checked.

    the path is new        where two operations follow each other that never did in a run that was checked

An operation is its name, the shapes of its tensors, and its other arguments: dims and flags. Numbers that are added or
compared do not count, nor which element an index takes, and a size other than a latent's number of values is but a
symbol. So loops of any length and batches of any size are one path.
"""

import warnings
from collections.abc import Collection, Iterable
from functools import cached_property
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_vfe.errors import VFEWarning
from pyro_vfe.program.escapes import Sites

if TYPE_CHECKING:
    from pyro_vfe.program.enumeration import Enumeration
    from pyro_vfe.program.recorder import Site

_NUMBERS = frozenset(
    """
    add sub mul div true_divide floor_divide remainder fmod pow where clamp clamp_min clamp_max minimum maximum lerp
    __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __floordiv__ __rfloordiv__ __iadd__
    __isub__ __imul__ __itruediv__ __mod__ __rmod__ __pow__ __rpow__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ eq ne lt
    le gt ge add_ sub_ mul_ div_ pow_ clamp_ fill_ masked_fill masked_fill_ full_like __rsub__ float_power
    """.split()  # noqa: SIM905
)
"""Operations in which an integer is a number: no dim, size or flag."""

_INDEXING = frozenset(["__getitem__", "__setitem__"])

_LITERAL = (str, bool, torch.dtype, torch.device, torch.memory_format, type(Ellipsis), type(None))

_MOST_PATHS = 256
"""Paths that are known at first sight."""

_MOST_PAIRS = 2**14
"""Pairs of operations that are remembered."""

_EVERY = 64
"""A call in so many is checked whatever it does."""

_MOST_NEW = 16
"""Calls that all take a new path before a user is told."""

_HELD = 7
"""What is held of a sample statement."""

Step = tuple[Any, ...]


class Observer:
    """Looks at the operations of a run in which latents take part: this one at none."""

    def before(self, written: Any) -> Any:
        """What it needs of what is about to be written into."""

    def will(self, name: str, args: Any, sites: Sites) -> None:
        """Called with each operation that nothing shares, before it is carried out."""

    def did(self, func: Any, name: str, args: Any, kwargs: Any, result: Any, sites: Sites, before: Any = None) -> None:
        """Called with each operation that was carried out."""

    def again(self, result: Tensor) -> None:
        """Called where an earlier result was handed out again."""

    def reached(self, site: "Site") -> None:
        """Called with each sample statement."""


class Operations(Observer):
    """The steps of a run, in order: operations, and sample statements between them."""

    def __init__(self) -> None:
        self._path: list[int] = []
        self._steps: dict[int, Step] = {}
        self._made: dict[int, int] = {}
        self._statements: list[Any] = []
        """How many operations came before each sample statement, and what it is like: few objects for many of them."""
        self._around: dict[int, Step] = {}

    def did(self, func: Any, name: str, args: Any, kwargs: Any, result: Any, sites: Sites, before: Any = None) -> None:
        """Notes an operation."""
        integers = "numbers" if name in _NUMBERS else "places" if name in _INDEXING else "dims"
        given = [_described(value, integers) for value in args]
        if kwargs:
            given += [(key, _described(value, integers)) for key, value in kwargs.items()]
        step = (func, *given, _described(result))
        number = self._made[id(result)] = hash(step)
        self._path.append(number)
        self._steps[number] = step

    def again(self, result: Tensor) -> None:
        """Notes an operation once more whose result was handed out again."""
        self._path.append(self._made[id(result)])

    def reached(self, site: "Site") -> None:
        """Notes a sample statement."""
        around = self._around.get(id(site.plates))
        if around is None:
            sizes = torch.Size([plate.size for plate in site.plates])
            around = self._around[id(site.plates)] = sizes, *[float(-plate.dim) for plate in site.plates]
        with torch._C.DisableTorchFunction():
            fn, mask, scale = site.fn, site.mask, site.scale
            weights = (
                None if mask is None and type(scale) is float else (_described(mask), _described(scale, "numbers"))
            )
            dims = float(site.value.dim())
        self._statements += (len(self._path), type(fn), fn.batch_shape, fn.event_shape, dims, weights, around)

    @cached_property
    def number(self) -> int:
        """Tells the run from others."""
        return hash((tuple(self._path), tuple(self._statements)))

    def pairs(self, kept: Collection[int]) -> set[tuple[int, int]]:
        """The steps that followed each other.

        Args:
            kept: Sizes that tell steps apart: the latents' numbers of values. Any other stands for itself.
        """
        steps, start = [], 0
        for place, *statement in zip(*[iter(self._statements)] * _HELD, strict=True):
            steps += [*map(self._steps.__getitem__, self._path[start:place]), tuple(statement)]
            start = place
        steps += map(self._steps.__getitem__, self._path[start:])
        symbols: dict[int, str] = {}
        for step in dict.fromkeys(steps):
            for size in _sizes(step):
                if size > 1 and size not in kept:
                    symbols.setdefault(size, f"size {len(symbols)}")
        named = {step: hash(_named(step, symbols)) for step in dict.fromkeys(steps)}
        return set(pairwise([0, *map(named.__getitem__, steps), 1]))


def _described(value: Any, integers: str = "dims") -> Any:
    """What counts of an argument or result, in which integers are dims or sizes, numbers, or places along a dim."""
    if isinstance(value, Tensor):
        return value.shape, hasattr(value, "_vfe_sites")
    if isinstance(value, _LITERAL):
        return value
    if isinstance(value, float) or (integers == "numbers" and isinstance(value, int)):
        return float, value == 0
    if isinstance(value, int):
        return (
            int if integers == "places" else value if value >= 0 else str(value)
        )  # The hashes of -1 and -2 are equal.
    if isinstance(value, (list, tuple)):
        return tuple([_described(part, integers) for part in value])
    if isinstance(value, slice):
        return slice, value.start is None, value.stop is None, value.step is None
    return type(value)


def _sizes(step: Iterable[Any]) -> Iterable[int]:
    """The sizes of a step's tensors, and of the plates around it."""
    for part in step:
        if isinstance(part, torch.Size):
            yield from part
        elif isinstance(part, tuple):
            yield from _sizes(part)


def _named(step: Step, symbols: dict[int, str]) -> Step:
    """A step with symbols for sizes; where it names no dim, the latents' dims may lie further apart."""
    squeeze = not _names_dims(step)

    def named(part: Any) -> Any:
        if isinstance(part, torch.Size):
            sizes = [symbols.get(size, size) for size in part]
            return tuple(size for size, run in groupby(sizes) for size in ([1] if squeeze and size == 1 else run))
        if isinstance(part, tuple):
            return tuple(map(named, part))
        return symbols.get(part, part) if type(part) is int else part

    return tuple(map(named, step))


def _names_dims(part: Any) -> bool:
    if isinstance(part, tuple) and not isinstance(part, torch.Size):
        return any(map(_names_dims, part))
    return type(part) in (int, str)


class KnownPaths:
    """The paths of a pair of programs that were checked, and how often it was run."""

    def __init__(self) -> None:
        self.mixed: frozenset[str] = frozenset()
        """Latents whose values were seen to meet in some operation, without effect."""
        self.calls = 1
        self._new = 1
        """How many of the calls took a new path."""
        self._paths: dict[int, None] = {}
        self._pairs: set[tuple[int, int]] = set()

    def is_due(self) -> bool:
        """Counts a call, and tells whether it is to be checked whatever path it takes: the 2nd, 4th, 8th, ..."""
        self.calls += 1
        return self.calls & (self.calls - 1) == 0 or self.calls % _EVERY == 0

    def has(self, run: "Enumeration") -> bool:
        """Whether a run took a path that was checked."""
        number = _number(run)
        if number in self._paths:
            return True
        kept = set(map(len, run.supports.values()))
        if not all(one.pairs(kept) <= self._pairs for one in run.operations):
            return False
        self._remember(number)
        return True

    def add(self, run: "Enumeration", mixed: frozenset[str], is_new: bool = False) -> None:
        """Remembers a run that was checked, and the latents whose values met."""
        kept = set(map(len, run.supports.values()))
        found = set[tuple[int, int]]().union(*(one.pairs(kept) for one in run.operations))
        self._pairs = found if len(self._pairs) > _MOST_PAIRS else self._pairs | found
        self._remember(_number(run))
        self.mixed |= mixed
        self._new += is_new

    def warn_of_new(self) -> None:
        """Tells the user once that every call took a new path."""
        if self._new == self.calls == _MOST_NEW:
            self._new = 0
            warnings.warn(
                f"The programs did something new at each of {_MOST_NEW} calls, and each call checked it against "
                "ordinary runs: it runs the programs several times. Give what changes as a tensor, an index say "
                "(x[..., torch.tensor(i)], torch.gather in place of torch.roll), or pass check=False where you are "
                "sure of them.",
                VFEWarning,
                stacklevel=2,
            )

    def _remember(self, number: int) -> None:
        self._paths[number] = None
        if len(self._paths) > _MOST_PATHS:
            del self._paths[next(iter(self._paths))]


def _number(run: "Enumeration") -> int:
    return hash(tuple([one.number for one in run.operations]))
