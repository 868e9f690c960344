"""Equal computations of one run, done once.

    f(x) at step t  =  f(x) at step s        where the arguments are the same tensors, unwritten since

A loop over steps computes the same tables again and again: `transition[z]` for each z. In an enumerated run the values
of all those z are one tensor under many names, so the second step takes the result of the first. Every result is
handed out as a tensor of its own, which carries its own provenance and remembers its original. Nothing that is shared
may be written to: a program that does so is run again without sharing.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions.torch
import torch
from pyro.distributions.distribution import DistributionMeta
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

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
    __ixor__ __ilshift__ __irshift__
    """.split()  # noqa: SIM905
)

KEEPS_NUMBERS = frozenset(["register_hook", "retain_grad", "register_post_accumulate_grad_hook", "requires_grad_"])
"""Operations that change of their first argument what its gradient does, and not its numbers."""

_PLAIN = (bool, int, float, str, complex, torch.dtype, torch.device, torch.layout, torch.memory_format, type(Ellipsis))

_HELD = (*_PLAIN, torch.Size, type(None))

_ROOM = 2**22
"""How many numbers the results that are kept for others may hold in all."""


class Unshareable(Exception):
    """The program writes into a tensor that others share, or hooks it: it has to be run without sharing."""


def written_by(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> object:
    """What an operation changes: its first argument, or `out=`; None where it changes nothing."""
    if "out" in kwargs:
        return kwargs["out"]
    if name in _WRITING or name in KEEPS_NUMBERS or (name[-1:] == "_" and name[-2:] != "__") or kwargs.get("inplace"):
        return args[0] if args else next(iter(kwargs.values()), None)
    return None


@dataclass(eq=False, slots=True)
class _Result:
    """A result with what it was computed from, kept alive so that no other tensor takes over an identity."""

    value: Any
    arguments: tuple[tuple[Tensor, int], ...]
    """What it was computed from, with the number of writes into each."""
    made: tuple[tuple[Tensor, int], ...]
    """The tensors that it consists of, likewise."""
    taken: bool = False
    """Whether others have it too."""


class Shared:
    """The results of one run, by what they were computed from."""

    def __init__(self) -> None:
        self._results: dict[Key, _Result] = {}
        self._read: dict[int, list[Key]] = {}
        self._new: list[Key] = []
        self._protected: set[int] = set()
        self._room = _ROOM

    def find(self, key: Key) -> Any:
        """The result of an earlier computation with this key; None if there is none, or something has been written."""
        result = self._results.get(key)
        if result is None:
            return None
        for tensor, version in result.arguments + result.made:
            if tensor._version != version:
                return None
        if not result.taken:
            for tensor, _ in result.made:
                self.protect(tensor)
            result.taken = True
        return result.value

    def keep(self, key: Key, value: Any, tensors: Iterable[Tensor], arguments: Iterable[Tensor]) -> None:
        """Keeps a result, which consists of `tensors`, for later computations with this key."""
        made = _versions(tensors)
        size = sum([tensor.numel() for tensor, _ in made])
        if size <= self._room:
            self._room -= size
            self._results[key] = _Result(value, _versions(arguments), made)
            self._new.append(key)

    def protect(self, tensor: Tensor) -> None:
        """Forbids writes into the memory of a tensor that others stand for."""
        self._protected |= memories_of(tensor)

    def written(self, memories: set[int]) -> None:
        """Takes note of an operation that changes memories: what was computed from them is no longer known.

        Raises:
            Unshareable: Others share them.
        """
        if not memories.isdisjoint(self._protected):
            raise Unshareable
        for key in self._new:
            for argument, _ in self._results[key].arguments:
                for memory in memories_of(argument):
                    self._read.setdefault(memory, []).append(key)
        self._new = []
        for memory in memories:
            for key in self._read.pop(memory, ()):
                self._results.pop(key, None)

    def finish(self) -> None:
        """Checks that nothing that was shared has been written to, and forgets it.

        Raises:
            Unshareable: Something has.
        """
        taken = [result.made for result in self._results.values() if result.taken]
        self.__init__()  # type: ignore[misc]
        if any(tensor._version != version for made in taken for tensor, version in made):
            raise Unshareable


def _versions(tensors: Iterable[Tensor]) -> tuple[tuple[Tensor, int], ...]:
    return tuple([(tensor, tensor._version) for tensor in tensors])


def memories_of(target: object) -> set[int]:
    """Where the numbers lie of a tensor, or of several: views of one tensor have one memory."""
    if isinstance(target, (list, tuple)):
        return set().union(*map(memories_of, target))
    if not isinstance(target, Tensor) or target.layout is not torch.strided or is_functorch_wrapped_tensor(target):
        return set()
    try:
        return {target.untyped_storage().data_ptr()} if target.numel() else set()
    except ValueError:  # A parameter of a lazy module has no memory before its first run.
        return set()


def can_be_shared(tensor: Tensor) -> bool:
    """Whether it can be seen when a tensor is written to, and by whom."""
    return tensor.layout is torch.strided and not tensor.is_inference() and not is_functorch_wrapped_tensor(tensor)


def constant(value: object) -> tuple[object, ...] | None:
    """What tells an argument that is no tensor from others; None for what cannot be compared."""
    if value is None:
        return (None,)
    if isinstance(value, _PLAIN):
        # 0.0 and -0.0 are equal, and so are 1, 1.0 and True: none of them does what another does.
        return type(value), value if value else repr(value)
    return None


def circumstances() -> tuple[bool, bool]:
    """What else a result depends on."""
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


def held_tensors(fn: Any) -> list[Tensor] | None:
    """The tensors that a distribution holds; None where it holds anything that may not be copied."""
    tensors: list[Tensor] = []
    for value in fn.__dict__.values():
        if type(value) is Tensor and can_be_shared(value):
            tensors.append(value)
        elif not isinstance(value, _HELD):
            return None
    return tensors
