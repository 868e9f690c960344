"""The parameters of programs: read once in a run, written back without moving, and what is wrong with them.

A parameter is what `pyro.param`, a `PyroParam` or a module's `Parameter` gives under a name in Pyro's store. Programs
see its constrained value; gradients and optimisers see the unconstrained one.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints, transform_to

from pyro_vfe.errors import NameClashError, NotFiniteError, VFEError
from pyro_vfe.program.layout import Program
from pyro_vfe.program.left_over import check, prepare
from pyro_vfe.program.recorder import Role
from pyro_vfe.program.singular import is_moving


class Parameters:
    """The parameters that watched programs read: each is one tensor until `forget`, however often it is read."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        """The constrained value of each parameter, in the graph of its unconstrained one."""
        self.readers: dict[str, set[Role]] = {}
        """Which programs read each parameter."""
        self.known: dict[object, Tensor] = {}
        """For slots of distributions that were selections before, the index of their entries."""
        self.strangers: dict[str, Tensor] = {}
        """What modules compute with where Pyro's store has another tensor by the name, when they ran last."""

    def watched(self, program: Program, role: Role) -> Program:
        """The program, whose parameters are noted when it runs.

        Args:
            program: A model or guide.
            role: Which of the two it is.
        """

        @wraps(program, updated=())
        def watched_program(*args: Any, **kwargs: Any) -> Any:
            with _Reader(self, role):
                return program(*args, **kwargs)

        return watched_program

    def forget(self) -> None:
        """Forgets the tensors: the parameters have changed, or their graph has been used."""
        self.values.clear()

    def of(self, role: Role) -> tuple[str, ...]:
        """The names of the parameters that a program reads."""
        return tuple(name for name, roles in self.readers.items() if role in roles)


class _Reader(Messenger):
    """Hands out one tensor per parameter and run."""

    def __init__(self, parameters: Parameters, role: Role) -> None:
        super().__init__()
        self.parameters = parameters
        self.role: Role = role

    def _pyro_post_param(self, msg: Any) -> None:
        name, value = msg["name"], msg["value"]
        if name not in pyro.get_param_store():
            return
        self.parameters.readers.setdefault(name, set()).add(self.role)
        stranger = stranger_of(msg)
        if stranger is not None:
            self.parameters.strangers[name] = stranger
        else:  # a module that took the store's over in its first run is none any more
            self.parameters.strangers.pop(name, None)
        known = self.parameters.values.get(name)
        if is_moving():
            return  # what was computed before is not what it is now
        if known is None or (torch.is_grad_enabled() and not known.requires_grad and value.requires_grad):
            self.parameters.values[name] = value
        else:
            msg["value"] = known


def unconstrained(name: str) -> Tensor:
    """The tensor of a parameter that optimisers change, which is a leaf of the graph.

    Args:
        name: A name in Pyro's store.
    """
    value: Tensor = pyro.get_param_store()._params[name]
    return value


def stored_tensors(names: Iterable[str]) -> list[Tensor]:
    """The unconstrained tensors of parameters, each once: two names may stand for one tensor.

    Args:
        names: Of parameters; those that are not in Pyro's store are left out.
    """
    store = pyro.get_param_store()
    return list({id(leaf): leaf for leaf in (unconstrained(name) for name in names if name in store)}.values())


def constraint_of(name: str) -> constraints.Constraint:
    """The constraint of a parameter.

    Args:
        name: A name in Pyro's store.
    """
    return pyro.get_param_store()._constraints[name]


def write(values: Mapping[str, Tensor]) -> None:
    """Sets parameters to constrained values, in place: modules and optimisers keep their tensors.

    Args:
        values: New values by name, in the shape of the old ones.
    """
    with torch.no_grad():
        for name, value in values.items():
            target = unconstrained(name)
            target.copy_(transform_to(constraint_of(name)).inv(value.to(target)))


def snapshot(names: Iterable[str]) -> dict[str, Tensor]:
    """Copies of the unconstrained values of parameters.

    Args:
        names: Names in Pyro's store.
    """
    return {name: unconstrained(name).detach().clone() for name in names}


def restore(copies: Mapping[str, Tensor]) -> None:
    """Puts copies of unconstrained values back, in place.

    Args:
        copies: What `snapshot` gave.
    """
    with torch.no_grad():
        for name, value in copies.items():
            unconstrained(name).copy_(value)


@contextmanager
def restored_on_error(copies: Mapping[str, Tensor]) -> Iterator[None]:
    """Puts copies of unconstrained values back where an error is raised, an interrupt too.

    Args:
        copies: What `snapshot` gave.
    """
    try:
        yield
    except BaseException:
        restore(copies)
        raise


class Strangers(Messenger):
    """Notes tensors of modules that have the name of another tensor in Pyro's store.

    A module computes with its own parameters, whatever Pyro's store has by their names, and optimisers change what is
    in the store. So a stranger that a loss depends on would not be learned.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Args:
        *args: Of the programs.
        **kwargs: Of the programs, by name.
        """
        super().__init__()
        self.found: dict[str, Tensor] = {}
        """The last stranger by each name."""
        self._arguments = args, kwargs

    def _pyro_param(self, msg: Any) -> None:
        prepare(msg)

    def _pyro_post_param(self, msg: Any) -> None:
        check(msg, self._arguments)
        self.meet(msg)

    def meet(self, msg: Any) -> None:
        """Notes the parameter of a message, if it is a stranger.

        Args:
            msg: What Pyro says of a parameter that was read.
        """
        if (stranger := stranger_of(msg)) is not None:
            self.found[msg["name"]] = stranger


def stranger_of(msg: Any) -> Tensor | None:
    """The tensor of a module whose name stands for another one in Pyro's store; None for what is no stranger.

    Args:
        msg: What Pyro says of a parameter that was read.
    """
    name, store = msg["name"], pyro.get_param_store()._params
    start = msg["args"][1] if len(msg["args"]) > 1 else None
    return start if isinstance(start, torch.nn.Parameter) and store.get(name, start) is not start else None


def two_of_one_name(names: Iterable[str]) -> NameClashError:
    """The error for parameters of modules that a loss depends on and that Pyro's store does not have.

    Args:
        names: Their names.
    """
    quoted = ", ".join(f"'{name}'" for name in sorted(names)[:5])
    return NameClashError(
        f"A module computes with a tensor of its own for parameter {quoted}, and Pyro's store has another by that "
        "name, of another module: no optimiser would change the first.",
        hint='Give the modules names, `super().__init__("guide")` in a PyroModule, or their parts different ones; '
        "where the store holds parameters of earlier modules, start with fresh=True (EM, fit, WakeSleep), or call "
        "pyro.clear_param_store() first.",
    )


@contextmanager
def naming_nan(*programs: Program) -> Iterator[None]:
    """Says which parameters hold NaN where a distribution refuses them.

    Args:
        *programs: What runs.

    Raises:
        NotFiniteError: In place of a distribution's own error.
    """
    try:
        yield
    except ValueError as error:
        explanation = None if isinstance(error, VFEError) else nan_explained(error, *programs)
        if explanation is None:
            raise
        raise explanation from error


def nan_explained(error: Exception, *programs: Program) -> NotFiniteError | None:
    """Returns what is to be said in place of an error that parameters cause which hold NaN; None where none does.

    Args:
        error: What a distribution or an operation said.
        *programs: What ran.
    """
    names = nan_parameters(*programs)
    return (
        NotFiniteError(
            f"The parameters {', '.join(names)} hold NaN ({str(error).splitlines()[0]}).",
            hint="Set them to finite values (a smaller learning rate keeps them there); this step changed nothing.",
        )
        if names
        else None
    )


def nan_parameters(*programs: Program) -> list[str]:
    """Returns the quoted names of parameters that hold NaN, in Pyro's store and in programs that are modules."""
    names = [f"'{name}'" for name, value in pyro.get_param_store().items() if bool(value.isnan().any())]
    for program in programs:
        if isinstance(program, torch.nn.Module):
            names += [f"'{name}'" for name, value in program.named_parameters() if bool(value.isnan().any())]
    return list(dict.fromkeys(names))
