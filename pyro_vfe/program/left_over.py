"""Parameters that an earlier program has left in Pyro's store, in another shape than the present one makes them in.

Pyro gives what the store has under a name, whatever a program would start from: a model of three components would go on
with the two of the model before. One that broadcasts never fails.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from types import FunctionType, ModuleType
from typing import Any

import pyro
import torch
from numpy import ndarray
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints, transform_to

from pyro_vfe.errors import StructureError, VFEError
from pyro_vfe.program.buffers import unchanged_buffers
from pyro_vfe.program.provenance import out_of_sight
from pyro_vfe.program.randomness import undisturbed_randomness
from pyro_vfe.program.reach import reach

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Of a program, positional and by name."""

_MAX_KNOWN = 4096

_MAX_NUMBERS = 16
"""Of a list or mapping, sizes say; longer ones are data."""

_NO_HOLDERS = (FunctionType, type, Tensor)
"""Whose attributes are no numbers that a model is made with."""

_known: OrderedDict[object, torch.Size] = OrderedDict()
"""The shape that a function makes a parameter in, by the parameter's name and what the function reads."""


def other_shape(name: str, stored: torch.Size, own: torch.Size) -> StructureError:
    """The error for a parameter that earlier programs, or data, have left in another shape.

    Args:
        name: Its name in Pyro's store.
        stored: The shape that it has there.
        own: The shape that the program would make it in.
    """
    return StructureError(
        f"Parameter '{name}' in Pyro's store has shape {tuple(stored)}, and the program would make it in shape "
        f"{tuple(own)}: it is left from other data or another program.",
        hint=_CURE,
    )


_CURE = (
    "Let EM, fit or WakeSleep start from the program's own values, fresh=True, and read the result by "
    "params=run.params; or clear the store first, pyro.clear_param_store(); or give the parameter another name, or a "
    "start whose shape does not depend on the number of data."
)


def prepare(msg: Any) -> None:
    """Lets a new parameter start from a copy: training would change a tensor that is made outside of the program.

    Args:
        msg: What Pyro says of a parameter that is about to be read.
    """
    name, args = msg["name"], msg["args"]
    if len(args) < 2 or msg["value"] is not None or name in pyro.get_param_store()._params:
        return
    start = args[1]
    if not isinstance(start, Tensor):
        if not callable(start):
            return
        function, start = start, start()
        _remember((name, _numbers_read(function)), start.shape)
    if not isinstance(start, torch.nn.Parameter) and not start.requires_grad:
        start = start.clone()
    msg["args"] = (name, start, *args[2:])


def difference(msg: Any, arguments: Arguments = ((), {})) -> StructureError | None:
    """The error for a parameter that its program would make in another shape, or in another range, if it would.

    What a module holds as its own it computes with, whatever the store has.

    Args:
        msg: What Pyro says of a parameter that was read.
        arguments: Of the program, where fewer data make no difference.
    """
    name, args, shape = msg["name"], msg["args"], msg["value"].shape
    start = args[1] if len(args) > 1 else None
    if isinstance(start, Tensor):
        own = start.shape
    elif callable(start):
        own = _made_shape(name, start, shape)
    else:
        return None
    if own == shape:
        return _out_of_range(name, msg["kwargs"].get("constraint"))
    if isinstance(start, torch.nn.Parameter):
        return None
    store = pyro.get_param_store()
    if name not in store or (stored := store[name].shape) == own:  # the value is a handler's
        return None
    if is_cut_short(own, stored, arguments):
        return None
    return other_shape(name, stored, own)


def _out_of_range(name: str, constraint: constraints.Constraint | None) -> StructureError | None:
    """The error for a parameter of another constraint whose value breaks the one that its program gives it."""
    store = pyro.get_param_store()
    known = store._constraints.get(name)
    if constraint is known or constraint is None or known is None or type(constraint) is type(known):
        return None
    with torch.no_grad():
        if bool(constraint.check(store[name]).all()):
            return None
    return StructureError(
        f"Parameter '{name}' in Pyro's store has the constraint {known} and a value that breaks {constraint}, which "
        "the program gives it: it is left from another program.",
        hint=_CURE,
    )


def check(msg: Any, arguments: Arguments) -> None:
    """Checks that a parameter is in the shape that its program would make it in.

    Args:
        msg: What Pyro says of a parameter that was read.
        arguments: Of the program: with fewer data than the parameter has entries, `u[:3]` is shorter than it was.

    Raises:
        StructureError: It is not.
    """
    found = difference(msg, arguments)
    if found is not None:
        raise found


def is_cut_short(own: torch.Size, known: torch.Size, arguments: Arguments) -> bool:
    """Whether a start has another shape because the data that it is taken from are fewer than it has entries.

    Args:
        own: The shape that the program would make a parameter in.
        known: The shape that it has.
        arguments: Of the program.
    """
    args, kwargs = arguments
    lengths = {len(data) for data in (*args, *kwargs.values()) if isinstance(data, (Tensor, ndarray)) and data.ndim}
    return len(own) == len(known) and all(
        mine == theirs or (mine < theirs and mine in lengths) for mine, theirs in zip(own, known, strict=True)
    )


def stale_parameter(
    programs: Iterable[Callable[..., Any]], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> StructureError | None:
    """Returns the error for a parameter in the store that has another shape than programs would make it in, if any.

    Args:
        programs: Programs, one of which failed: each is run as far as it goes.
        args: Their arguments.
        kwargs: Their keyword arguments.
    """
    shapes = _Shapes()
    for program in programs:
        try:
            with undisturbed_randomness(), unchanged_buffers(program), torch.no_grad(), pyro.poutine.block(), shapes:
                program(*args, **kwargs)
        except Exception:
            continue
    return shapes.found


class _Shapes(Messenger):
    """Notes the first parameter that is left over."""

    def __init__(self) -> None:
        super().__init__()
        self.found: StructureError | None = None

    def _pyro_post_param(self, msg: Any) -> None:
        self.found = self.found or difference(msg)


@contextmanager
def first_look(
    programs: Sequence[Callable[..., Any]], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[None]:
    """Runs a block in which programs may run for the first time.

    A module's `PyroParam` takes over what the store has as soon as it is read: it gets its own tensor back where that
    has another shape. A guide whose first call fails sets itself up again at the next one.

    Args:
        programs: Guides and models.
        args: Their arguments.
        kwargs: Their keyword arguments.

    Raises:
        StructureError: A parameter is left over.
    """
    modules = [part for module in reach(*programs).modules for part in module.modules()]
    own = [at_stake for module in modules for at_stake in _at_stake(module)]
    new = [module for module in modules if isinstance(module, AutoGuide) and module.prototype_trace is None]
    try:
        yield
    except Exception as error:
        for guide in new:
            guide.prototype_trace = None
        # What a guide runs to set itself up nobody sees.
        found = _taken_over(own) or (None if isinstance(error, VFEError) else stale_parameter(programs, args, kwargs))
        if found is None:
            raise
        raise found from error
    found = _taken_over(own)
    if found is not None:
        raise found


@dataclass(frozen=True, eq=False)
class _Own:
    """A parameter of a module that Pyro's store has in another shape."""

    module: PyroModule
    attribute: str
    leaf: torch.nn.Parameter
    error: StructureError

    def put_back(self) -> bool:
        """Gives the module its own tensor, and says whether it had another."""
        taken = self.module._parameters.get(self.attribute) is not self.leaf
        self.module._parameters[self.attribute] = self.leaf
        return taken


def _at_stake(module: torch.nn.Module) -> Iterator[_Own]:
    if not isinstance(module, PyroModule) or pyro.settings.get("module_local_params"):
        return
    store = pyro.get_param_store()
    for name, (constraint, _) in module._pyro_params.items():
        full, attribute = f"{module._pyro_name}.{name}" if module._pyro_name else name, f"{name}_unconstrained"
        stored, own = store._params.get(full), module._parameters.get(attribute)
        if stored is not None and own is not None and stored.shape != own.shape:
            with torch.no_grad():
                error = other_shape(full, store[full].shape, transform_to(constraint)(own).shape)
            yield _Own(module, attribute, own, error)


def _taken_over(own: Iterable[_Own]) -> StructureError | None:
    return next(iter([one.error for one in own if one.put_back()]), None)


def _named(function: FunctionType) -> list[Any]:
    """What the code of a function reads from outside: globals, but for modules of Python, and variables around it."""
    outside = function.__globals__
    found = [part for part in map(outside.get, function.__code__.co_names) if not isinstance(part, ModuleType)]
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # not yet assigned
            continue
    return found


def _made_shape(name: str, function: Callable[[], Tensor], stored: torch.Size) -> torch.Size:
    """The shape that a function makes a parameter in; it is called where what it reads is new, or seems to differ."""
    key = (name, _numbers_read(function))
    known = _known.get(key)
    if known == stored:
        return known
    try:
        with out_of_sight(), undisturbed_randomness(), torch.no_grad(), pyro.poutine.block():
            own = function().shape
    except Exception:  # It has never been called, and is not needed.
        own = stored
    _remember(key, own)
    return own


def _remember(key: object, shape: torch.Size) -> None:
    _known[key] = shape
    if len(_known) > _MAX_KNOWN:
        _known.popitem(last=False)


def _numbers_read(function: Any, depth: int = 2) -> object:
    """What the shape that a function makes can depend on, as far as it shows: its code, and numbers that it reads.

    Args:
        function: What makes a parameter.
        depth: How many functions and containers deep to look.
    """
    if isinstance(function, partial):
        return tuple([_number(part, depth) for part in (function.func, *function.args, *function.keywords.values())])
    owner, function = getattr(function, "__self__", None), getattr(function, "__func__", function)
    if not isinstance(function, FunctionType):
        return type(function), _number(getattr(function, "__dict__", None), depth)
    code = function.__code__
    found: list[object] = [id(code)]  # to hash the code itself takes longer than all else
    for part in (owner, *_named(function), *(function.__defaults__ or ())):
        found.append(_number(part, depth))
        if hasattr(part, "__dict__") and not isinstance(part, _NO_HOLDERS):
            holder = vars(part)
            found += [_number(holder.get(name), depth) for name in code.co_names]
    return tuple(found)


def _number(value: object, depth: int) -> object:
    """A whole number, a shape, or what a container or function has of them; None of anything else."""
    if value is None or isinstance(value, (int, str, Integral)):
        return value
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if depth and isinstance(value, (FunctionType, partial)):
        return _numbers_read(value, depth - 1)
    parts = list(value.values()) if isinstance(value, dict) else value
    if isinstance(parts, (tuple, list)):
        return len(parts), tuple(_number(part, depth - 1) for part in parts[:_MAX_NUMBERS] if depth)
    return tuple(value.shape) if isinstance(value, ndarray) else None
