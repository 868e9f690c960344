"""Equal computations of one run, done once.

    f(x) at step t  =  f(x) at step s        where the arguments are the same tensors, unwritten since

A loop over steps computes the same tables again and again: `transition[z]` for each z. In an enumerated run the values
of all those z are one tensor under many names, so the second step takes the result of the first. Every result is
handed out as a tensor of its own, which carries its own provenance and remembers its original. Nothing that is shared
may be written to: a program that does so is run again without sharing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyro.distributions.torch
import torch
from pyro.distributions.distribution import DistributionMeta
from torch import Tensor
from torch.distributions import Distribution

T = TypeVar("T")

Key = tuple[object, ...]

PURE = frozenset(
    """
    __getitem__ index_select gather take select narrow diagonal where
    add sub mul div true_divide floor_divide remainder fmod pow neg abs sign square sqrt rsqrt reciprocal
    __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __floordiv__ __rfloordiv__
    __mod__ __rmod__ __pow__ __rpow__ __neg__ __abs__ __invert__ __and__ __rand__ __or__ __ror__ __xor__ __rxor__
    __eq__ __ne__ __lt__ __le__ __gt__ __ge__ eq ne lt le gt ge logical_and logical_or logical_not logical_xor
    __matmul__ __rmatmul__ matmul mm bmm mv dot linear
    exp expm1 log log1p log2 log10 sin cos tan tanh sinh cosh atan sigmoid logit softplus logsigmoid relu erf lgamma
    softmax log_softmax logsumexp sum mean prod cumsum clamp clamp_min clamp_max minimum maximum round floor ceil
    float double half long int short bool to type type_as
    reshape view expand expand_as unsqueeze squeeze permute transpose movedim flatten unflatten contiguous
    cat concat stack one_hot
    """.split()  # noqa: SIM905
)
"""Operations whose result depends on nothing but their arguments."""

FAMILIES = frozenset(
    family for family in vars(pyro.distributions.torch).values() if isinstance(family, DistributionMeta)
)
"""Distributions whose constructors depend on nothing but their arguments."""

_WRITING = frozenset(
    """
    __setitem__ __set__ __iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __imod__ __ipow__ __iand__ __ior__
    __ixor__ register_hook retain_grad register_post_accumulate_grad_hook
    """.split()  # noqa: SIM905
)

_PLAIN = (bool, int, float, str, complex, torch.dtype, torch.device, torch.layout, torch.memory_format, type(Ellipsis))

_ROOM = 2**22
"""How many numbers the results that are kept for others may hold in all."""


class Unshareable(Exception):
    """The program writes into a tensor that others share, or hooks it: it has to be run without sharing."""


def writes(name: str) -> bool:
    """Whether an operation of this name changes its first argument."""
    return name in _WRITING or (name[-1:] == "_" and name[-2:] != "__")


@dataclass(frozen=True, eq=False)
class _Result:
    """A result with what it was computed from, kept alive so that no other tensor takes over an identity."""

    value: Any
    arguments: tuple[tuple[Tensor, int], ...]
    """What it was computed from, with the number of writes into each."""
    made: tuple[tuple[Tensor, int], ...]
    """The tensors that it consists of, likewise."""


class Shared:
    """The results of one run, by what they were computed from."""

    def __init__(self) -> None:
        self._results: dict[Key, _Result] = {}
        self._storages: set[int] = set()
        self._room = _ROOM

    def find(self, key: Key) -> Any:
        """The result of an earlier computation with this key; None if there is none, or an argument has changed."""
        result = self._results.get(key)
        if result is None:
            return None
        for argument, version in result.arguments:
            if argument._version != version:
                return None
        return result.value

    def keep(self, key: Key, value: Any, tensors: Sequence[Tensor], arguments: Sequence[Tensor]) -> None:
        """Keeps a result, which consists of `tensors`, for later computations with this key."""
        size = sum(tensor.numel() for tensor in tensors)
        if size > self._room or any(tensor.layout is not torch.strided for tensor in tensors):
            return
        self._room -= size
        for tensor in tensors:
            self.protect(tensor)
        self._results[key] = _Result(value, _versions(arguments), _versions(tensors))

    def protect(self, tensor: Tensor) -> None:
        """Forbids writes into the memory of a tensor that several others stand for."""
        if tensor.numel():
            self._storages.add(tensor.untyped_storage().data_ptr())

    def check_write(self, target: object) -> None:
        """Checks an operation that changes `target`.

        Raises:
            Unshareable: Others share the memory.
        """
        if isinstance(target, (list, tuple)):
            for part in target:
                self.check_write(part)
        elif isinstance(target, Tensor) and target.layout is torch.strided and target.numel():
            self._check_memory(target.untyped_storage().data_ptr())

    def _check_memory(self, pointer: int) -> None:
        if pointer in self._storages:
            raise Unshareable

    def finish(self) -> None:
        """Checks that nothing that was shared has been written to, and forgets it.

        Raises:
            Unshareable: Something has.
        """
        versions = [(tensor, version) for result in self._results.values() for tensor, version in result.made]
        self._results.clear()
        self._storages.clear()
        if any(tensor._version != version for tensor, version in versions):
            raise Unshareable


def _versions(tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, int], ...]:
    return tuple((tensor, tensor._version) for tensor in tensors)


def describe(values: Any, original: Callable[[Tensor], Tensor], key: list[object], tensors: list[Tensor]) -> bool:
    """Appends what identifies the arguments of a computation to `key`, and the tensors among them to `tensors`.

    Args:
        values: The arguments.
        original: The tensor that an argument stands for.
        key: What is appended to.
        tensors: What is appended to.

    Returns:
        Whether all arguments were of a kind that can be compared.
    """
    for value in values:
        kind = type(value)
        if isinstance(value, Tensor):
            if value.layout is not torch.strided:
                return False
            first = original(value)
            key.append(id(first))
            tensors.append(first)
        elif value is None:
            key.append(None)
        elif isinstance(value, (list, tuple)):
            key += (kind, len(value))
            if not describe(value, original, key, tensors):
                return False
        elif isinstance(value, slice):
            key.append(slice)
            if not describe((value.start, value.stop, value.step), original, key, tensors):
                return False
        elif isinstance(value, _PLAIN):
            # 0.0 and -0.0 are equal, and so are 1, 1.0 and True: none of them does what another does.
            key += (kind, value if value else repr(value))
        else:
            return False
    return True


def circumstances() -> tuple[bool, bool]:
    """What else a result depends on."""
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


def held_tensors(fn: Any) -> list[Tensor] | None:
    """The tensors that a distribution holds; None where it holds anything that may not be copied."""
    tensors: list[Tensor] = []
    for value in fn.__dict__.values():
        if isinstance(value, Tensor):
            if type(value) is not Tensor and type(value) is not torch.nn.Parameter:
                return None
            tensors.append(value)
        elif isinstance(value, Distribution):
            inner = held_tensors(value)
            if inner is None:
                return None
            tensors += inner
        elif value is not None and not isinstance(value, (*_PLAIN, torch.Size)):
            return None
    return tensors


def copied(fn: T, alias: Callable[[Tensor], Tensor]) -> T:
    """A distribution of its own that holds an alias of each tensor of `fn`."""
    made: dict[int, Tensor] = {}
    result = object.__new__(type(fn))
    for name, value in fn.__dict__.items():
        if isinstance(value, Tensor):
            known = made.get(id(value))
            if known is None:
                known = made[id(value)] = alias(value)
            result.__dict__[name] = known
        else:
            result.__dict__[name] = copied(value, alias) if isinstance(value, Distribution) else value
    return result
