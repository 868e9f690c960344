"""Which latent sites a tensor was computed from.

    sites(op(x, y))  =  sites(x) | sites(y)

A torch function mode sees every operation of the program, also those that a tensor subclass misses: a plain table
indexed by a latent, an in-place write, `torch.tensor(z)`. The sites are kept on the tensors themselves, under the
identity of the run, so that nothing outlives the run and the user's tensors stay ordinary.

References:
    Obermeyer et al. (2019), Tensor variable elimination for plated factor graphs (the axes this serves).
"""

import os
import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import pyro
import torch
from pyro.distributions.distribution import COERCIONS
from torch import Tensor
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode

from pyro_vfe.program.sharing import FAMILIES, PURE, Shared, circumstances, copied, describe, held_tensors, writes

Sites = frozenset[str]
NO_SITES: Sites = frozenset()

_ESCAPES = frozenset(
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

_INTEGER_ARGUMENTS = frozenset(
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

_INERT = frozenset(
    [
        "dim",
        "size",
        "shape",
        "__get__",
        "stride",
        "numel",
        "element_size",
        "is_floating_point",
        "__len__",
        "__hash__",
        "__repr__",
    ]
)
"""Operations that return no tensor; attributes such as `T` come through `__get__` and are looked at again."""

_LIBRARIES = tuple(os.path.dirname(os.path.abspath(package.__file__ or "")) + os.sep for package in (torch, pyro))
_OWN = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_FORWARDERS = tuple(os.path.join(_LIBRARIES[0], name) for name in ("overrides.py", "_tensor.py"))


_LEAVES = (int, float, str, bool, torch.Size, type(None))
"""What holds no tensors."""

untracked = torch._C.DisableTorchFunction
"""A context in which operations are not looked at."""


class Escaped(Exception):
    """The program took a latent out of torch: it can only be enumerated by running the program once per value."""

    def __init__(self, sites: Sites, operation: str, line: str) -> None:
        super().__init__(f"{operation} at {line}")
        self.sites = sites
        self.operation = operation
        self.line = line


class Provenance(TorchFunctionMode):
    """A torch function mode that knows, within its `with` block, which sites each tensor was computed from."""

    def __init__(self, on_union: Callable[[Sites, str], None] | None = None, *, share: bool = False) -> None:
        """Args:
        on_union: Called with every new set of two or more sites that meet in one tensor, and the operation's name.
        share: Do equal computations once.
        """
        super().__init__()
        self.on_union = on_union
        self.shared = Shared() if share else None
        """The results that later computations may take over."""
        self.watched: set[str] = set()
        """Sites whose values may not leave torch: those that are enumerated along a dim, or not in the guide."""
        self.draws: set[str] = set()
        """Draws whose gradient needs their readers known."""
        self.controls: Sites = NO_SITES
        """Draws that have left torch: whatever comes later may depend on them."""
        self._unions: set[Sites] = set()
        self._refused: set[Any] = set()

    def __enter__(self) -> "Provenance":
        if self.shared is not None:
            COERCIONS.append(self._distribution)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        if self.shared is not None:
            COERCIONS.remove(self._distribution)

    def mark(self, tensor: Tensor, sites: Sites) -> None:
        """Adds `sites` to what `tensor` was computed from."""
        mark = getattr(tensor, "_vfe_sites", None)
        if mark is None or mark[0] is not self:
            if sites:
                tensor._vfe_sites = (self, sites, None)  # type: ignore[attr-defined]
        elif mark[1] is not sites and not sites <= mark[1]:
            tensor._vfe_sites = (self, mark[1] | sites, mark[2])  # type: ignore[attr-defined]

    def originate(self, tensor: Tensor, site: str) -> None:
        """Makes `tensor` the value of `site`: it depends on no other site, and may not leave torch."""
        original = self.original(tensor)
        shown = original if original is not tensor else None
        tensor._vfe_sites = (self, frozenset((site,)), shown)  # type: ignore[attr-defined]
        self.watched.add(site)

    def of(self, tensor: object) -> Sites:
        """The sites that `tensor` was computed from, in this run."""
        mark = getattr(tensor, "_vfe_sites", None)
        return mark[1] if mark is not None and mark[0] is self else NO_SITES

    def original(self, tensor: Tensor) -> Tensor:
        """The tensor whose numbers `tensor` was handed out for: equal computations have the same."""
        mark = getattr(tensor, "_vfe_sites", None)
        return mark[2] if mark is not None and mark[0] is self and mark[2] is not None else tensor

    def alias(self, original: Tensor, sites: Sites) -> Tensor:
        """A tensor of its own with the numbers of `original`, computed from `sites`."""
        tensor = original.view_as(original)
        tensor._vfe_sites = (self, sites, original)  # type: ignore[attr-defined]
        return tensor

    def lent(self, original: Tensor) -> Tensor:
        """A tensor of its own with the numbers of `original`, which may not be written to from now on."""
        if self.shared is not None:
            self.shared.protect(original)
        return self.alias(original, NO_SITES)

    def finish(self) -> None:
        """Forgets what was shared: tensors that outlive the run shall not keep all others alive."""
        if self.shared is not None:
            self.shared.finish()

    def of_distribution(self, fn: object) -> Sites:
        """The sites of all tensors that a distribution holds, at any depth: what its log-probability can depend on."""
        return self._held(fn, set())

    def _held(self, holder: object, seen: set[int]) -> Sites:
        if isinstance(holder, Tensor):
            return self.of(holder)
        if isinstance(holder, _LEAVES) or id(holder) in seen:
            return NO_SITES
        seen.add(id(holder))
        if isinstance(holder, Distribution):
            parts: Iterable[object] = holder.__dict__.values()
        elif isinstance(holder, dict):
            parts = holder.values()
        elif isinstance(holder, (list, tuple, set, frozenset)):
            parts = holder
        else:
            cells = getattr(holder, "__closure__", None) or ()
            parts = [*getattr(holder, "__dict__", {}).values(), *(cell.cell_contents for cell in cells)]
            parts += [getattr(holder, name, None) for name in ("func", "args", "keywords")]
        sites = NO_SITES
        for part in parts:
            if not isinstance(part, _LEAVES):
                sites = sites | self._held(part, seen)
        return sites

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _INERT:
            result = func(*args, **kwargs)
            if isinstance(result, Tensor):
                self._mark_all(result, self.of(args[0]))
            return result
        sites = self._gather(args)
        if kwargs:
            sites = sites | self._gather(kwargs.values())
        written = writes(name)
        if self.shared is not None and (written or "out" in kwargs):
            self.shared.check_write(kwargs.get("out", args[0] if args else None))
        if not sites:
            return func(*args, **kwargs)
        if self._escapes(name, args) and _by_the_program():
            self._escape(name, sites)
        result = self._result(func, name, args, kwargs, sites)
        if self.on_union is not None and len(sites) > 1 and sites not in self._unions:
            self._unions.add(sites)
            self.on_union(sites, name)
        self._mark_all(result, sites)
        if written:
            self._mark_written(args[0], sites)
        return result

    def _result(self, func: Any, name: str, args: Any, kwargs: Any, sites: Sites) -> Any:
        """What the operation returns: that of an earlier one with the same arguments if there was one."""
        if self.shared is None or name not in PURE:
            return func(*args, **kwargs)
        key: list[object] = [func, circumstances()]
        tensors: list[Tensor] = []
        if "out" in kwargs or not describe((*args, *kwargs, *kwargs.values()), self.original, key, tensors):
            return func(*args, **kwargs)
        known = self.shared.find(whole := tuple(key))
        if known is not None:
            return self.alias(known, sites)
        result = func(*args, **kwargs)
        if type(result) is Tensor and all(result is not argument for argument in args):
            self.shared.keep(whole, result, (result,), tensors)
        return result

    def _distribution(self, family: Any, args: Any, kwargs: Any) -> Any:
        """Called by Pyro for every distribution that is made: an equal one was checked and normalised before."""
        if self.shared is None or family not in FAMILIES or family in self._refused or len(COERCIONS) > 1:
            return None
        key: list[object] = [family, family._validate_args, circumstances()]
        tensors: list[Tensor] = []
        with untracked():
            if not describe((*args, *kwargs, *kwargs.values()), self.original, key, tensors) or not tensors:
                return None
            known = self.shared.find(whole := tuple(key))
            if known is None:
                known = type.__call__(family, *args, **kwargs)
                held = held_tensors(known)
                if held is None:
                    self._refused.add(family)
                    return None
                self.shared.keep(whole, known, held, tensors)
            sites = self._gather(args).union(self._gather(kwargs.values()))
            return copied(known, lambda tensor: self.alias(self.original(tensor), sites) if sites else tensor)

    def _gather(self, values: Any) -> Sites:
        sites = NO_SITES
        for value in values:
            if isinstance(value, Tensor):
                mark = getattr(value, "_vfe_sites", None)
                if mark is not None and mark[0] is self and mark[1] is not sites:
                    sites = sites | mark[1] if sites else mark[1]
            elif isinstance(value, (list, tuple)):
                sites = sites | self._gather(value)
            elif isinstance(value, slice):
                sites = sites | self._gather((value.start, value.stop, value.step))
        return sites

    def _mark_all(self, result: Any, sites: Sites) -> None:
        if isinstance(result, Tensor):
            self.mark(result, sites)
        elif isinstance(result, (list, tuple)):
            for part in result:
                self._mark_all(part, sites)

    def _mark_written(self, target: Any, sites: Sites) -> None:
        if isinstance(target, Tensor):
            self.mark(target, sites)
            if target._is_view() and target._base is not None:
                self.mark(target._base, sites)

    def _escapes(self, name: str, args: Any) -> bool:
        if name in _ESCAPES or (name == "where" and len(args) == 1):
            return True
        if name in _INTEGER_ARGUMENTS:
            return bool(self._gather(args if name in ("zeros", "ones", "rand", "randn") else args[1:]))
        if name == "__format__":
            return bool(args[1])
        if name in ("tensor", "as_tensor"):
            return bool(args) and isinstance(args[0], (list, tuple))
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            return any(
                (isinstance(i, Tensor) and i.dtype is torch.bool and self.of(i)) or isinstance(i, slice) for i in index
            ) and bool(self._gather(index))
        return False

    def _escape(self, operation: str, sites: Sites) -> None:
        if not sites.isdisjoint(self.watched):
            raise Escaped(sites & self.watched, operation.strip("_"), user_line())
        self.controls |= sites & self.draws


def _by_the_program() -> bool:
    """Whether the program itself asked: checks inside torch.distributions and Pyro look at values without branching."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(_FORWARDERS):
        frame = frame.f_back
    return frame is None or not frame.f_code.co_filename.startswith(_LIBRARIES)


def user_line() -> str:
    """The innermost line of the user's program that is running, as "file.py:12"."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((*_LIBRARIES, _OWN)):
        frame = frame.f_back
    if frame is None:
        return "an unknown line"
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
