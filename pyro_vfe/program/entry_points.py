"""What every entry point does before its own work: misspelt options are told, and torch is in its ordinary state.

no_grad           what learns has gradients all the same; what evaluates leaves them off, as it was told to
inference_mode    marginals, entropies and searches are gradients, in which its tensors cannot take part: entry
                  points leave it, and see copies of arguments that were made in it
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from difflib import get_close_matches
from functools import wraps
from typing import Any, ParamSpec, TypeVar, get_args

import pyro
import torch
from torch import Tensor

from pyro_vfe.errors import ArgumentError, VFEError, described
from pyro_vfe.program.indices import out_of_range
from pyro_vfe.program.local_parameters import are_local, in_store
from pyro_vfe.program.options import check_kind, kind_of
from pyro_vfe.program.signatures import signature_of

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_ELSEWHERE = {
    "loss": "elbo",
    "optimizer": "optim",
    "optimiser": "optim",
    "verbose": "progress_bar",
    "random_state": "seed",
    "n_iter": "max_iter",
    "num_iterations": "max_iter",
    "epochs": "num_epochs",
    "draws": "num_samples",
}
"""What other libraries, and Pyro's SVI, call the options."""


_TAKEN_ELSEWHERE = ("model", "guide", "params")
"""What is checked where it is taken, in more words."""


def entry_point(
    *, learns: bool = False, names: bool = False
) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """Returns a decorator of what a user calls.

    Args:
        learns: Whether it changes parameters or writes gradients, and so has them whatever torch's state.
        names: Whether it knows parameters by their names, also those that are local to their modules.
    """

    def decorated(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        call = _Call(function)

        @wraps(function)
        def entered(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
            call.check(args, kwargs)
            own: Any = {name: call.whole(name, ordinary(value)) for name, value in kwargs.items()} if kwargs else {}
            if learns and any(leaf.is_inference() for leaf in pyro.get_param_store()._params.values()):
                raise _made_in_inference_mode(call.programs(args, kwargs))
            is_ordinary = not torch.is_inference_mode_enabled() and (not learns or torch.is_grad_enabled())
            is_local = (names or kwargs.get("params") is not None) and are_local()
            with (
                _NOTHING if is_ordinary else ordinary_state(learns=learns),
                in_store(*args, *kwargs.values()) if is_local else _NOTHING,
            ):
                try:
                    return function(*map(ordinary, args), **own)
                except (RuntimeError, IndexError, VFEError) as error:
                    if (index := out_of_range(error)) is not None:
                        raise index from error
                    if "nference tensor" in str(error):  # Torch's words, at the beginning of a sentence or within.
                        raise _made_in_inference_mode(call.programs(args, kwargs)) from error
                    raise
                except TypeError as error:
                    found = call.unfit(args, kwargs)
                    if found is None:
                        raise
                    raise found from error

        return entered

    return decorated


_NOTHING = nullcontext()


@contextmanager
def ordinary_state(*, learns: bool) -> Iterator[None]:
    """Runs a block outside of torch's inference mode; with gradients where something learns.

    Args:
        learns: Whether something does. Otherwise there are gradients if there were any.
    """
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.set_grad_enabled(learns):
            for leaf in pyro.get_param_store()._params.values() if learns else ():
                leaf.grad = ordinary(leaf.grad)  # What SVI made in inference mode to add gradients to.
            yield
    else:
        with torch.set_grad_enabled(learns or torch.is_grad_enabled()):
            yield


def ordinary(argument: Any) -> Any:
    """Returns an argument; a copy of it where it holds tensors that were made in inference mode.

    Args:
        argument: Anything; lists, tuples and dicts are looked into.
    """
    if isinstance(argument, Tensor):
        return _copied(argument) if argument.is_inference() else argument
    if type(argument) in (list, tuple):
        parts = [ordinary(part) for part in argument]
        return argument if all(map(_is, parts, argument)) else type(argument)(parts)
    if type(argument) is dict:
        parts = [ordinary(part) for part in argument.values()]
        return argument if all(map(_is, parts, argument.values())) else dict(zip(argument, parts, strict=True))
    return argument


def same_argument(one: object, other: object) -> bool:
    """Whether two arguments are the same object, or copies of the same that was made in inference mode.

    Args:
        one: As an entry point had it.
        other: As another had it.
    """
    return getattr(one, _ORIGINAL, one) is getattr(other, _ORIGINAL, other)


_ORIGINAL = "_vfe_copy_of"


def _copied(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False):
        copy = tensor.clone()
    setattr(copy, _ORIGINAL, tensor)
    return copy


def _is(one: object, other: object) -> bool:
    return one is other


def _made_in_inference_mode(programs: Mapping[str, object]) -> VFEError:
    """The error for a parameter, or a tensor that a program holds, that can take part in no gradient."""
    names = [name for name, value in pyro.get_param_store()._params.items() if value.is_inference()]
    for program in programs.values():
        if isinstance(program, torch.nn.Module):
            tensors = (*program.named_parameters(), *program.named_buffers())
            names += [name for name, value in tensors if value.is_inference()]
    listed = ", ".join(f"'{name}'" for name in dict.fromkeys(names)) or "a tensor that the programs hold"
    return VFEError(
        f"Torch lets nothing that was made under torch.inference_mode take part in a gradient, as here {listed}.",
        hint="Make what the programs hold outside of torch.inference_mode, or copy it there, tensor.clone(), and call "
        "pyro.clear_param_store() to forget parameters that were made inside. Arguments are copied for you.",
    )


class _Call:
    """An entry point as it is written, to compare calls with."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.who = function.__qualname__.removesuffix(".__init__")
        self.owner = self.who.rpartition(".")[0] if not function.__qualname__.endswith(".__init__") else ""
        self.signature = inspect.signature(function)
        self.parameters = dict(self.signature.parameters)
        own = self.parameters.values()
        self.positional = [p.name for p in own if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        self.takes_data = any(p.kind is p.VAR_POSITIONAL for p in own)
        self.hands_on = any(p.kind is p.VAR_KEYWORD for p in own)
        self.options = [p.name for p in own if p.kind is p.KEYWORD_ONLY]
        kinds = {p.name: kind_of(p.annotation) for p in own if p.name not in _TAKEN_ELSEWHERE}
        self._kinds = {name: kind for name, kind in kinds.items() if kind is not None}
        self._places = [(place, name) for place, name in enumerate(self.positional) if name in self._kinds]
        self._counts = {p.name for p in own if int in (p.annotation, *get_args(p.annotation))}
        self._instances: set[type] = set()

    def check(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Checks what Python does not, or says in words of its own.

        Raises:
            VFEError: The method is called on the class; there is a program among the data, or an unknown option.
        """
        if self.owner and args and type(args[0]) not in self._instances:
            self._check_instance(args[0])
        rest = args[len(self.positional) :]
        if rest and (not self.takes_data or any(callable(part) for part in rest)):
            self._check_rest(args, rest, kwargs)
        for place, name in self._places:
            if place < len(args) and not callable(args[place]):  # A program is out of place: told where it is taken.
                check_kind(self.who, name, args[place], self._kinds[name])
        for name, value in kwargs.items():
            if name in self._kinds:
                check_kind(self.who, name, value, self._kinds[name])
            elif name not in self.parameters:
                self._check_keyword(name, args, kwargs)

    def whole(self, name: str, value: Any) -> Any:
        """Returns an argument; an int for an option that is one, 1000 for 1e3."""
        return int(value) if isinstance(value, float) and name in self._counts and value.is_integer() else value

    def programs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, object]:
        """The model and the guide of a call, those that there are."""
        given = {**dict(zip(self.positional, args, strict=False)), **kwargs}
        owner = given.get("self")
        found = {role: given.get(role, getattr(owner, role, None)) for role in ("model", "guide")}
        return {role: program for role, program in found.items() if program is not None}

    def _check_instance(self, owner: object) -> None:
        if not any(kind.__name__ == self.owner for kind in type(owner).__mro__):
            method = self.who.rpartition(".")[2]
            raise VFEError(
                f"{self.who} was called on the class {self.owner}, and no instance of it.",
                hint=f"Make one first: vfe.{self.owner}(...).{method}(...).",
            )
        self._instances.add(type(owner))

    def _check_rest(self, args: tuple[Any, ...], rest: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not self.takes_data:
            names = ", ".join(name for name in self.positional if name != "self")
            raise VFEError(
                f"{self.who} was given {described(rest[0])} after its positional arguments ({names}).",
                hint="Its options go by keyword, and the data to the calls that run the programs.",
            )
        if self._unbound("model", args, kwargs):
            stranger = next(part for part in rest if callable(part))
            before = " and ".join(role for role in ("model", "guide") if role in self.parameters)
            first = f"After the {before} come" if before else "It has its programs: pass"
            raise VFEError(
                f"{self.who} was given {described(stranger)} among the data, and the model cannot be called with that: "
                f"{self._unbound('model', args, kwargs)}.",
                hint=f"{first} the data alone.",
            )

    def unfit(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ArgumentError | None:
        """The error for a call that lacks something, or for data that a program does not take, if it is that."""
        try:
            self.signature.bind(*args, **kwargs)
        except TypeError as lack:
            own = ", ".join([name for name in self.parameters if name not in ("self", "args", "kwargs")])
            return ArgumentError(f"{self.who} is {lack}.", hint=f"Its arguments are: {own}.")
        for role in ("model", "guide") if self.takes_data and kwargs.get("batches") is None else ():
            mismatch = self._unbound(role, args, kwargs)
            if mismatch:
                signature = signature_of(self.programs(args, kwargs)[role])  # type: ignore[arg-type]
                return ArgumentError(
                    f"The {role}, which takes {signature}, cannot be called with the data that {self.who} was given: "
                    f"{mismatch}.",
                    hint="Pass the data as the model takes them."
                    if role == "model"
                    else "Let the guide take what the model takes: both are called with the same data.",
                )
        return None

    def _unbound(self, role: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """Why a program cannot be called with the data, in Python's words; nothing where it can."""
        program = self.programs(args, kwargs).get(role)
        signature = signature_of(program) if callable(program) else None
        try:
            if signature is not None:
                own = {name: value for name, value in kwargs.items() if name not in self.parameters}
                signature.bind(*args[len(self.positional) :], **own)
        except TypeError as error:
            return str(error)
        return ""

    def _check_keyword(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        model = self.programs(args, kwargs).get("model")
        if self.hands_on and not (callable(model) and _refuses(model, name)):
            return
        meant = _meant(name, self.options)
        elsewhere = self._elsewhere(name, args)
        fact = f"{self.who} was given {name}=, which is none of its options"
        if self.hands_on:
            fact += ", and the model takes no such argument"
        options = f"Its options are: {', '.join(self.options)}."
        hint = elsewhere or (f"Did you mean {meant}=?" if meant else options)
        raise VFEError(f"{fact}.", hint=hint)

    def _elsewhere(self, name: str, args: tuple[Any, ...]) -> str:
        """Which other entry point of the same class has the option, in words."""
        if "self" not in self.parameters:
            return ""
        for kind in type(args[0]).__mro__:
            for method, function in vars(kind).items():
                found = inspect.unwrap(function) if inspect.isfunction(function) else None
                own = [] if found is None else [p for p in inspect.signature(found).parameters if p != "self"]
                if found is not None and (method == "__init__" or not method.startswith("_")) and name in own:
                    who = found.__qualname__.removesuffix(".__init__")
                    return f"It is an option of {who}: vfe.{_written(who)}{name}=...)."
        return ""


def _written(who: str) -> str:
    owner, _, method = who.rpartition(".")
    return f"{owner}(...).{method}(..., " if owner else f"{method}(..., "


def _meant(name: str, options: list[str]) -> str | None:
    """The option that a name is near to."""
    if _ELSEWHERE.get(name) in options:
        return _ELSEWHERE[name]
    return next(iter(get_close_matches(name, options, 1)), None)


def _refuses(program: Callable[..., Any], name: str) -> bool:
    """Whether a program certainly takes no keyword argument of a name."""
    signature = signature_of(program)
    if signature is None:
        return False
    own = signature.parameters
    if any(p.kind is p.VAR_KEYWORD for p in own.values()):
        return False
    return name not in own and name not in _outermost(program)


def _outermost(program: Callable[..., Any]) -> Mapping[str, object]:
    """The arguments of a decorated program as its decorator has them."""
    try:
        return inspect.signature(program, follow_wrapped=False).parameters
    except (TypeError, ValueError):
        return {}
