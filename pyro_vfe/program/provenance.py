"""Which latent sites a tensor was computed from.

    sites(op(x, y))  =  sites(x) | sites(y)

A torch function mode sees every operation of the program, also those that a tensor subclass misses: a plain table
indexed by a latent, an in-place write, `torch.tensor(z)`. The sites are kept on the tensors themselves, under the
identity of the run, so that nothing outlives the run and the user's tensors stay ordinary.

References:
    Obermeyer et al. (2019), Tensor variable elimination for plated factor graphs (the axes this serves).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pyro.distributions.distribution import COERCIONS
from torch import Tensor
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from pyro_vfe.program.escapes import (
    ESCAPES,
    INTEGER_ARGUMENTS,
    NO_SITES,
    Escaped,
    Sites,
    blame,
    by_the_program,
    user_line,
)
from pyro_vfe.program.keeping import Kept
from pyro_vfe.program.log_prob import slim
from pyro_vfe.program.operations import Observer
from pyro_vfe.program.sharing import (
    FAMILIES,
    KEEPS_NUMBERS,
    PURE,
    Shared,
    can_be_shared,
    circumstances,
    constant,
    held_tensors,
    memories_of,
    written_by,
)

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

_LEAVES = (int, float, str, bool, torch.Size, type(None))
"""What holds no tensors."""

untracked = torch._C.DisableTorchFunction
"""A context in which operations are not looked at."""


@contextmanager
def out_of_sight() -> Iterator[None]:
    """Runs a block that the runs around it do not look at, and that may look at runs of its own."""
    hidden: list[Provenance] = []
    while isinstance(mode := _get_current_function_mode(), Provenance):
        mode.__exit__(None, None, None)
        hidden.append(mode)
    try:
        yield
    finally:
        for mode in reversed(hidden):
            mode.__enter__()


class Provenance(TorchFunctionMode):
    """A torch function mode that knows, within its `with` block, which sites each tensor was computed from."""

    def __init__(
        self,
        on_union: Callable[[Sites, str], None] | None = None,
        *,
        share: bool = False,
        follows: bool = False,
        observer: Observer | None = None,
    ) -> None:
        """Args:
        on_union: Called with every new set of two or more sites that meet in one tensor, and the operation's name.
        share: Do equal computations once.
        follows: Tell who reads a draw of the guide also where its gradient needs no score function.
        observer: Looks at the operations in which sites take part.
        """
        super().__init__()
        self.run = object()
        """What tensors carry, to tell runs apart. It holds nothing: what autograd keeps, no collector sees."""
        self.on_union = on_union
        self.observer = observer or Observer()
        self.shared = Shared() if share else None
        """The results that later computations may take over."""
        self.kept = Kept(self.copied)
        """What the run's statements were given."""
        self.parts: Mapping[str, Sites] = {}
        """The names of a latent's elements, where each is a latent by itself."""
        self.watched: set[str] = set()
        """Sites whose values may not leave torch: those that are enumerated along a dim, or not in the guide."""
        self.draws: set[str] = set()
        """Draws whose gradient needs their readers known."""
        self.followed: set[str] | None = set() if follows else None
        """Other draws, where it is told who reads them."""
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
        if mark is None or mark[0] is not self.run:
            if sites:
                tensor._vfe_sites = (self.run, sites, None)  # type: ignore[attr-defined]
        elif mark[1] is not sites and not sites <= mark[1]:
            tensor._vfe_sites = (self.run, mark[1] | sites, mark[2])  # type: ignore[attr-defined]

    def join(self, tensor: Tensor, sites: Sites) -> None:
        """Adds `sites` to what `tensor` was computed from: they meet in it."""
        self.mark(tensor, sites)
        if sites and self.on_union is not None:
            self.on_union(self.of(tensor), "expand")

    def originate(self, tensor: Tensor, site: str) -> None:
        """Makes `tensor` the value of `site`: it depends on no other site, and may not leave torch."""
        original = self.original(tensor)
        shown = original if original is not tensor else None
        names = self.parts.get(site, frozenset((site,)))
        tensor._vfe_sites = (self.run, names, shown)  # type: ignore[attr-defined]
        self.watched |= names

    def follow(self, tensor: Tensor, site: str) -> None:
        """Marks a draw for its readers: they do not read what it was itself drawn from."""
        if self.followed is not None:
            self.followed.add(site)
            tensor._vfe_sites = (self.run, (self.of(tensor) - self.followed) | {site}, None)  # type: ignore[attr-defined]

    def of(self, tensor: object) -> Sites:
        """The sites that `tensor` was computed from, in this run."""
        mark = getattr(tensor, "_vfe_sites", None)
        return mark[1] if mark is not None and mark[0] is self.run else NO_SITES

    def original(self, tensor: Tensor) -> Tensor:
        """The tensor whose numbers `tensor` was handed out for: equal computations have the same."""
        mark = getattr(tensor, "_vfe_sites", None)
        return mark[2] if mark is not None and mark[0] is self.run and mark[2] is not None else tensor

    def alias(self, original: Tensor, sites: Sites) -> Tensor:
        """A tensor of its own with the numbers of `original`, computed from `sites`."""
        tensor = original.view_as(original)
        tensor._vfe_sites = (self.run, sites, original)  # type: ignore[attr-defined]
        return tensor

    def copied(self, tensor: Tensor) -> Tensor:
        """A copy with memory of its own, computed from the same sites; what `expand` repeated stays repeated."""
        with torch.enable_grad():  # A program may write without gradients into what it wants gradients of.
            copy = slim(tensor, 0).clone().expand(tensor.shape)
        self.mark(copy, self.of(tensor))
        return copy

    def finish(self) -> None:
        """Forgets what was shared, kept or seen: tensors that outlive the run shall not keep all others alive."""
        self.kept.forget()
        self.observer = Observer()
        if self.shared is not None:
            self.shared.finish()

    def of_distribution(self, fn: object) -> Sites:
        """The sites of all tensors that a distribution holds, at any depth: what its log-probability can depend on."""
        return self.look(fn)[0]

    def look(self, fn: object) -> tuple[Sites, tuple[object, ...]]:
        """The sites of a distribution, and what it has in common with those that are the same function."""
        identity: list[object] = []
        return self._look(fn, identity), tuple(identity)

    def _look(self, fn: object, identity: list[object]) -> Sites:
        identity.append(type(fn))
        sites = NO_SITES
        for name, value in fn.__dict__.items():
            if isinstance(value, Tensor):
                mark = getattr(value, "_vfe_sites", None)
                if mark is not None and mark[0] is self.run:
                    if mark[1] is not sites:
                        sites = sites | mark[1] if sites else mark[1]
                    value = value if mark[2] is None else mark[2]
                identity += (name, id(value))
            elif isinstance(value, _LEAVES):
                identity += (name, value)
            elif isinstance(value, Distribution):
                identity.append(name)
                sites = sites | self._look(value, identity)
            else:
                identity.append(object())
                sites = sites | self._held(value, set())
        return sites

    def _held(self, holder: object, seen: set[int]) -> Sites:
        if isinstance(holder, Tensor):
            return self.of(holder)
        if isinstance(holder, _LEAVES) or id(holder) in seen:
            return NO_SITES
        seen.add(id(holder))
        if isinstance(holder, dict):
            parts: Iterable[object] = holder.values()
        elif isinstance(holder, (list, tuple, set, frozenset)):
            parts = holder
        else:
            cells = getattr(holder, "__closure__", None) or ()
            parts = [*getattr(holder, "__dict__", {}).values(), *(cell.cell_contents for cell in cells)]
            parts += [getattr(holder, name, None) for name in ("func", "args", "keywords")]
        return NO_SITES.union(*(self._held(part, seen) for part in parts))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _INERT:
            result = func(*args, **kwargs)
            if isinstance(result, Tensor) and (sites := self.of(args[0])):
                self.observer.did(func, name, args, kwargs, result, sites)
                self._mark_all(result, sites, ())
            return result
        if self.shared is not None and name in PURE and not ("out" in kwargs or kwargs.get("inplace")):
            return self._pure(func, name, args, kwargs)
        sites = self._gather(args)
        if kwargs:
            sites = sites | self._gather(kwargs.values())
        written = written_by(name, args, kwargs)
        if written is not None:
            memories = memories_of(written)
            if self.shared is not None:
                self.shared.written(memories)
            if name not in KEEPS_NUMBERS:
                self.kept.written(memories)
        if not sites:
            return func(*args, **kwargs)
        if self._escapes(name, args) and by_the_program():
            self._escape(name, sites)
        before = None if written is None else self.observer.before(written)
        self.observer.will(name, args, sites)
        try:
            result = func(*args, **kwargs)
        except Exception as error:
            blame(error, sites)
            raise
        self.observer.did(func, name, args, kwargs, result, sites, before)
        if self.on_union is not None and len(sites) > 1 and sites not in self._unions:
            self._unions.add(sites)
            self.on_union(sites, name)
        self._mark_all(result, sites, args)
        if written is not None:
            self._mark_written(written, sites)
        return result

    def _pure(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """What an operation returns that changes nothing: an earlier result, where the arguments were the same."""
        assert self.shared is not None
        parts: list[object] = [func]
        tensors: list[Tensor] = []
        sites = self._describe(args, parts, tensors)
        if kwargs:
            parts += kwargs
            sites = sites | self._describe(kwargs.values(), parts, tensors)
        if not sites:
            return func(*args, **kwargs)
        parts.append(circumstances())
        key = tuple(parts)
        known = self.shared.find(key)
        if known is not None:
            self.observer.again(known)
            return self.alias(known, sites)
        if self._escapes(name, args) and by_the_program(3):
            self._escape(name, sites)
        try:
            result = func(*args, **kwargs)
        except Exception as error:
            blame(error, sites)
            raise
        self.observer.did(func, name, args, kwargs, result, sites)
        if type(result) is Tensor and can_be_shared(result) and id(result) not in map(id, args):
            self.shared.keep(key, result, (result,), tensors)
        self._mark_all(result, sites, args)
        return result

    def _distribution(self, family: Any, args: Any, kwargs: Any) -> Any:
        """Called by Pyro for every distribution that is made: an equal one was checked and normalised before."""
        if self.shared is None or family not in FAMILIES or family in self._refused or len(COERCIONS) > 1:
            return None
        parts: list[object] = [family, family._validate_args, *kwargs]
        tensors: list[Tensor] = []
        with untracked():
            sites = self._describe((*args, *kwargs.values()), parts, tensors)
            if not tensors:
                return None
            parts.append(circumstances())
            key = tuple(parts)
            known = self.shared.find(key)
            if known is not None:
                return self._copy(family, known, sites)
            made = type.__call__(family, *args, **kwargs)
            held = held_tensors(made)
            if held is None:
                self._refused.add(family)
                return None
            given = {id(argument) for argument in tensors}
            for tensor in held if sites else ():
                if id(tensor) not in given:
                    self.mark(tensor, sites)
            self.shared.keep(key, dict(made.__dict__), held, tensors)
            return made

    def _copy(self, family: Any, known: dict[str, Any], sites: Sites) -> Any:
        """A distribution of its own with the same numbers, computed from `sites`."""
        result = object.__new__(family)
        result.__dict__.update(known)
        if sites:
            aliases: dict[int, Tensor] = {}
            for name, value in known.items():
                if isinstance(value, Tensor):
                    alias = aliases.get(id(value))
                    if alias is None:
                        alias = aliases[id(value)] = self.alias(self.original(value), sites)
                    result.__dict__[name] = alias
        return result

    def _describe(self, values: Iterable[Any], parts: list[object], tensors: list[Tensor]) -> Sites:
        """The sites of arguments; appends what identifies them to `parts`, and the tensors among them to `tensors`."""
        sites = NO_SITES
        for value in values:
            if isinstance(value, Tensor):
                mark = getattr(value, "_vfe_sites", None)
                if mark is not None and mark[0] is self.run:
                    if mark[1] is not sites:
                        sites = sites | mark[1] if sites else mark[1]
                    value = value if mark[2] is None else mark[2]
                if can_be_shared(value):
                    tensors.append(value)
                    parts += (id(value), value.requires_grad)
                else:
                    parts.append(object())
            elif isinstance(value, (list, tuple)):
                parts += (type(value), len(value))
                sites = sites | self._describe(value, parts, tensors)
            elif isinstance(value, slice):
                parts.append(slice)
                sites = sites | self._describe((value.start, value.stop, value.step), parts, tensors)
            else:
                parts += constant(value) or (object(),)
        return sites

    def _gather(self, values: Any) -> Sites:
        sites = NO_SITES
        for value in values:
            if isinstance(value, Tensor):
                mark = getattr(value, "_vfe_sites", None)
                if mark is not None and mark[0] is self.run and mark[1] is not sites:
                    sites = sites | mark[1] if sites else mark[1]
            elif isinstance(value, (list, tuple)):
                sites = sites | self._gather(value)
            elif isinstance(value, slice):
                sites = sites | self._gather((value.start, value.stop, value.step))
        return sites

    def _mark_all(self, result: Any, sites: Sites, args: Any) -> None:
        """Marks what an operation made; an argument that it hands back as it is was not made from the others."""
        if isinstance(result, Tensor):
            if not any(result is argument for argument in args):
                self.mark(result, sites)
        elif isinstance(result, (list, tuple)):
            for part in result:
                self._mark_all(part, sites, args)

    def _mark_written(self, target: Any, sites: Sites) -> None:
        if isinstance(target, Tensor):
            self.mark(target, sites)
            if target._is_view() and target._base is not None:
                self.mark(target._base, sites)

    def _escapes(self, name: str, args: Any) -> bool:
        if name in ESCAPES or (name == "where" and len(args) == 1):
            return True
        if name in INTEGER_ARGUMENTS:
            return bool(self._gather(args if name in ("zeros", "ones", "rand", "randn") else args[1:]))
        if name == "__format__":
            return bool(args[1])
        if name in ("tensor", "as_tensor"):
            return bool(args) and isinstance(args[0], (list, tuple))
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            return any(
                (isinstance(i, Tensor) and i.dtype is torch.bool and self.of(i))
                or (isinstance(i, slice) and self._gather((i,)))
                for i in index
            )
        return False

    def _escape(self, operation: str, sites: Sites) -> None:
        if not sites.isdisjoint(self.watched):
            raise Escaped(sites & self.watched, operation.strip("_"), user_line())
        self.controls |= sites & (self.draws | (self.followed or NO_SITES))
