"""Which programs are the same: what is known of one is not to be found out again.

    for u in batches: svi.step(u)  with  lambda u: guide(u, net)        one program, though each lambda is a new object

The same object is the same program, whatever its closure comes to hold: each run tells what is in it. New objects are
the same where they are made from the same code and hold the same things.
"""

import warnings
from collections import OrderedDict
from functools import partial
from numbers import Number
from types import CodeType, FunctionType, MethodType
from typing import Any
from weakref import ref

from pyro.poutine.messenger import Messenger

from pyro_vfe.errors import VFEWarning, callers_level
from pyro_vfe.program.layout import Program

_MOST = 256
"""Programs that are remembered, and what they are made of."""

_FEW = 100
"""Names in a list that is compared name by name."""

_MANY = 8
"""New programs of the same code in a row, after which a user is told."""

Identity = object
"""Equal for programs that are the same."""


class _Held:
    """An object that is equal to itself alone; it is kept, so that nothing else comes to have its identity."""

    def __init__(self, content: object) -> None:
        self.content = content

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held) and self.content is other.content

    def __hash__(self) -> int:
        return id(self.content)


class _Made:
    """What is made of other things, and equal to what is made of the same; its hash is taken once."""

    def __init__(self, *parts: Identity) -> None:
        self.parts = parts
        self._hash = hash(parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Made) and self._hash == other._hash and self.parts == other.parts

    def __hash__(self) -> int:
        return self._hash


class Identities:
    """The identities of the programs that it has met."""

    def __init__(self) -> None:
        self._known: OrderedDict[int, tuple[ref[Any], Identity]] = OrderedDict()

    def of(self, program: Any) -> Identity:
        """The identity of a program, or of what a program holds.

        Args:
            program: A model or guide.
        """
        if isinstance(program, (FunctionType, partial)):
            return self._of_made(program)
        if isinstance(program, MethodType):
            return MethodType, _Held(program.__self__), _Held(program.__func__)
        if isinstance(program, (Number, str, bytes, type(None))):
            return type(program), program
        if type(program) is tuple:
            return tuple(map(self.of, program))
        if type(program) is list and len(program) < _FEW and all(isinstance(one, str) for one in program):
            return list, tuple(program)  # Names, as handlers of Pyro's take them.
        if isinstance(program, Messenger):
            return type(program), self._of_all(vars(program), inside=True)
        return _Held(program)

    def _of_made(self, made: Any) -> Identity:
        """The identity of what is often made anew: a function, or one with some of its arguments given."""
        known = self._known.get(id(made))
        if known is not None and known[0]() is made:
            self._known.move_to_end(id(made))
            return known[1]
        self._known[id(made)] = ref(made), _Held(made)  # It may hold itself.
        if isinstance(made, partial):
            given = self.of(made.args), self._of_all(made.keywords | vars(made))
            itself = _Made(type(made), self.of(made.func), *given)
        else:
            cells = tuple(self._of_cell(cell) for cell in made.__closure__ or ())
            rest = (self.of(made.__defaults__), self._of_all(made.__kwdefaults__ or {}), self._of_all(vars(made)))
            itself = _Made(_Held(made.__code__), _Held(made.__globals__), cells, rest)
        self._known[id(made)] = ref(made), itself
        if len(self._known) > _MOST:
            self._known.popitem(last=False)
        return itself

    def _of_cell(self, cell: Any) -> Identity:
        try:
            return self.of(cell.cell_contents)
        except ValueError:  # It is empty.
            return None

    def _of_all(self, named: dict[str, Any], *, inside: bool = False) -> Identity:
        """The identity of named things; of what is in containers too, where these are made anew with their holder."""
        return tuple((name, self._of_items(value) if inside else self.of(value)) for name, value in named.items())

    def _of_items(self, value: Any) -> Identity:
        if type(value) is dict:
            return dict, tuple((self.of(key), self.of(own)) for key, own in value.items())
        return (list, self.of(tuple(value))) if type(value) is list else self.of(value)


class News:
    """Programs that are new at each call, though their code is not: each is looked at, which takes long."""

    def __init__(self) -> None:
        self._last: tuple[object, tuple[Identity, Identity]] = None, (None, None)
        self._count = 0

    def known(self) -> None:
        """Tells of a call of programs that have been met before."""
        self._count = 0

    def new(self, programs: tuple[Program, Program], identities: tuple[Identity, Identity]) -> None:
        """Tells of a call of programs that have not; warns where there were many in a row.

        Args:
            programs: The model and the guide.
            identities: Theirs.
        """
        codes = tuple(map(_code_of, programs))
        (last_codes, before), self._last = self._last, (codes, identities)
        changed = [place for place in (0, 1) if identities[place] != before[place]]
        is_again = codes == last_codes and changed and all(codes[place] is not None for place in changed)
        self._count = self._count + 1 if is_again else 0
        if self._count == _MANY:
            place = changed[0]
            names = _other_variables(before[place], identities[place])
            warnings.warn(_said(place, codes[place], names), VFEWarning, stacklevel=callers_level())


def _said(place: int, code: CodeType | None, names: list[str]) -> str:
    assert code is not None, "what is new each time has code"
    where = f"{code.co_name}, {code.co_filename}:{code.co_firstlineno}"
    shown = ", ".join(f"'{name}'" for name in dict.fromkeys(names))
    differs = f", with another {shown} in its closure" if names else ""
    return (
        f"At each of the last {_MANY + 1} calls the {('model', 'guide')[place]} was a new function of the same code "
        f"({where}){differs}. Each is looked at and checked anew, which takes several times as long as the call. Make "
        "the function once, and pass as an argument what changes, svi.step(u, beta); if they are different models, it "
        "has to be so."
    )


def _code_of(program: Program) -> CodeType | None:
    """The code that a program runs, where it is a function or made of one."""
    while isinstance(program, partial):
        is_handled = len(program.args) > 1 and isinstance(program.args[0], Messenger)
        program = program.args[1] if is_handled else program.func
    return getattr(program, "__code__", None)


def _other_variables(one: Identity, other: Identity) -> list[str]:
    """The names of what two functions of the same code hold, and in which they differ."""
    if not (isinstance(one, _Made) and isinstance(other, _Made) and one.parts[0] == other.parts[0]):
        return []
    code = getattr(one.parts[0], "content", None)
    if not isinstance(code, CodeType):
        return []
    names = []
    for name, ours, theirs in zip(code.co_freevars, one.parts[2], other.parts[2], strict=True):  # type: ignore[call-overload]
        if ours != theirs:
            names += _other_variables(ours, theirs) or [name]
    return names
