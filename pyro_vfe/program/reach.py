"""What the code of a program reaches: modules, and places where it may keep numbers that outlive a run.

    closures, globals that the code names, the object whose method it is; their attributes, and elements of containers

Only what is there when a program is looked at: what it keeps elsewhere is not found.
"""

import dis
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import count
from numbers import Number
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from numpy import ndarray
from torch import Tensor, nn

_MOST = 2000
"""Objects that are looked at."""

_DEPTH = 6
"""How far from a program."""


@dataclass(frozen=True)
class Place:
    """Where a number or a tensor is kept."""

    words: str
    """What it is, as the user knows it."""
    holder: Any
    """A namespace, a container or a cell."""
    key: Any
    """Where in it; of a cell, the name of its variable."""
    named: bool = True
    """Whether the key is a name in the code of programs."""

    @property
    def content(self) -> Any:
        """What is there now; None if nothing is."""
        try:
            return self.holder.cell_contents if isinstance(self.holder, CellType) else self.holder[self.key]
        except (ValueError, LookupError):
            return None


Found = tuple[object, str]
"""Something to look at, and what it is called."""


@dataclass
class Reach:
    """What programs reach."""

    modules: list[nn.Module] = field(default_factory=list)
    """Modules, those inside of them not named again."""
    places: list[Place] = field(default_factory=list)
    """Where numbers and tensors are kept."""
    codes: list[CodeType] = field(default_factory=list)
    """The code of the user's functions."""
    _seen: dict[int, object] = field(default_factory=dict)

    def add(self, value: object, words: str, depth: int = 0) -> None:
        """Adds what a value is or holds.

        Args:
            value: A program, or what one reaches.
            words: What it is called.
            depth: How far it is from a program.
        """
        if id(value) in self._seen or len(self._seen) > _MOST or depth > _DEPTH:
            return
        self._seen[id(value)] = value
        for inner, own in list(self._inside(value, words)):
            self.add(inner, own, depth + 1)

    def _inside(self, value: Any, words: str) -> Iterator[Found]:
        if isinstance(value, FunctionType):
            yield from self._of_function(value)
        elif isinstance(value, MethodType):
            yield from ((value.__self__, words), (value.__func__, words))
        elif isinstance(value, partial):
            yield from ((part, words) for part in (value.func, *value.args, *value.keywords.values()))
        elif isinstance(value, (list, tuple)):
            yield from self._items(enumerate(value), value, words + "[{!r}]", named=False)
        elif isinstance(value, dict):
            yield from self._items(value.items(), value, words + "[{!r}]", named=False)
        elif isinstance(value, type):
            for base in value.__mro__:
                if not _is_foreign(base.__module__):
                    yield from self._items(vars(base).items(), vars(base), f"'{{}}' of class {base.__name__}")
        elif isinstance(value, nn.Module):
            self.modules.append(value)
            for part in value.modules():
                if part is value or id(part) not in self._seen:
                    self._seen[id(part)] = part
                    yield from self._of_object(part)
        elif hasattr(value, "__dict__") and not isinstance(value, (Tensor, ModuleType)):
            yield from self._of_object(value)

    def _items(
        self, items: Iterable[tuple[Any, Any]], holder: Any, form: str, *, named: bool = True
    ) -> Iterator[Found]:
        """Notes places, and gives what else there is."""
        for key, value in list(items):
            if isinstance(value, (Number, Tensor, ndarray, count)):
                self.places.append(Place(form.format(key), holder, key, named))
            else:
                yield value, form.format(key)

    def _of_function(self, function: FunctionType) -> Iterator[Found]:
        code, defaults = function.__code__, (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            content = Place("", cell, name).content
            yield from self._items([(name, content)], cell, f"'{{}}' in the closure of {function.__name__}")
        yield from ((default, f"a default of {function.__name__}") for default in defaults)
        if _is_foreign(function.__module__):
            return
        self.codes.append(code)
        yield from self._items(vars(function).items(), vars(function), f"'{{}}' of {function.__name__}")
        names, space = _names(code), function.__globals__
        named = [(name, space[name]) for name in sorted(names & space.keys())]
        yield from self._items(named, space, "the global '{}'")
        for name, value in named:
            if isinstance(value, ModuleType) and not _is_foreign(value.__name__):
                own = vars(value)
                inner = [(key, own[key]) for key in sorted(names & own.keys())]
                yield from self._items(inner, own, f"'{{}}' of module {name}")

    def _of_object(self, value: object) -> Iterator[Found]:
        """The attributes of an object, and the code of its class; of those of libraries, what they hold of the user."""
        kind, own = type(value), vars(value)
        if _is_foreign(kind.__module__):
            wraps = kind.__module__.split(".")[0] in _WRAP and not isinstance(value, nn.Module)
            yield from ((part, kind.__name__) for part in own.values() if wraps or isinstance(part, tuple))
            yield from ((part, kind.__name__) for part in own.values() if callable(part))
            return
        held = [(name, part) for name, part in own.items() if name not in _ASIDE]
        yield from self._items(held, own, f"'{{}}' of {kind.__name__}")
        yield kind, kind.__name__


_ASIDE = ("training", "_parameters", "_buffers", "_modules")
_WRAP = ("pyro", "pyro_vfe")
"""Who hands out objects that stand for the user's programs."""


def reach(*programs: object) -> Reach:
    """Returns what programs reach.

    Args:
        *programs: Models and guides.
    """
    found = Reach()
    for program in programs:
        found.add(program, getattr(program, "__name__", type(program).__name__))
    return found


def carried(codes: Iterable[CodeType]) -> set[str]:
    """Returns the names that some function reads before it writes them: what they stand for matters to the next run.

    Args:
        codes: The functions'.
    """
    found: set[str] = set()
    for code in codes:
        written: set[object] = set()
        for step in dis.get_instructions(code):
            if step.opname.startswith("STORE_"):
                written.add(step.argval)
            elif step.opname.startswith("LOAD_") and isinstance(step.argval, str) and step.argval not in written:
                found.add(step.argval)
        found |= carried(part for part in code.co_consts if isinstance(part, CodeType))
    return found


def _names(code: CodeType) -> frozenset[str]:
    """The names that a function's code has, functions inside of it included."""
    inner = (part for part in code.co_consts if isinstance(part, CodeType))
    return frozenset(code.co_names).union(*map(_names, inner))


@lru_cache(maxsize=4096)
def _is_foreign(module: str | None) -> bool:
    """Whether a module is none of the user's: the standard library, or installed."""
    root = (module or "").split(".")[0]
    if root == "pyro_vfe" or (root in sys.stdlib_module_names and root != "__main__"):
        return True
    path = getattr(sys.modules.get(root), "__file__", None) or ""
    return "site-packages" in path or "dist-packages" in path
