"""Values for the parameters of programs that take the place of those in Pyro's store, for one call or for a start.

While programs run under a `Substitute`, Pyro's store knows none of the parameters that it had: each is made anew when a
program first reads it, as in an empty store, and takes its given value on the way in. So it does not matter whether
`pyro.param`, a `PyroParam` or a module's `Parameter` makes it, nor which handler hides that it is read.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import constraints, transform_to

from pyro_vfe.errors import VFEError
from pyro_vfe.program.left_over import Arguments, is_cut_short

_MOST_NAMED = 5

_TOLERANCE = 1e-4
"""By how much a value may change on its way into the store and back, relative to its largest entry."""


class Substitute:
    """Makes parameters anew, from given values where there are any."""

    def __init__(self, values: Mapping[str, Any], *, is_start: bool, arguments: Arguments = ((), {})) -> None:
        """Args:
        values: Constrained values by name.
        is_start: Whether the parameters stay in Pyro's store: what has no value starts as the programs say, then.
            Otherwise every parameter has to have a value, and modules get their own tensors back.
        arguments: Of the programs: a start that is a stretch of fewer data may be shorter than its value.

        Raises:
            VFEError: This is no mapping from names to numbers.
        """
        self.values = _as_tensors(values)
        self.is_start = is_start
        self.met: set[str] = set()
        """The parameters that were made, or read, anew."""
        self.kept: set[str] = set()
        """Those of them that are what the store had: no program makes them, or a module holds them."""
        self._arguments = arguments
        self._store = pyro.get_param_store()
        self._before: dict[str, tuple[Tensor, constraints.Constraint]] = {}
        self._own: dict[str, Tensor] = {}
        self._modules_own: list[tuple[Tensor, Tensor]] = []

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Runs a block in which programs read the values; after it the store has what it had, and what is to stay."""
        store = self._store
        known = store._params, store._constraints, store._param_to_name
        self._before = {name: (leaf, store._constraints[name]) for name, leaf in store._params.items()}
        store._params, store._constraints, store._param_to_name = _Made(self), {}, {}
        try:
            yield
            self._check_names()
        except BaseException:
            store._params, store._constraints, store._param_to_name = known
            self.met.clear()
            self._give_back()
            raise
        made = {name: (leaf, store._constraints[name]) for name, leaf in store._params.items()}
        store._params, store._constraints, store._param_to_name = known
        if self.is_start:
            self._put(made)
        else:
            self._give_back()

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Runs a block; where an error is raised the store is what it was before all. An interrupt leaves it."""
        try:
            yield
        except Exception:
            for name in self.met - self._before.keys():
                del self._store[name]
            self._put({name: old for name, old in self._before.items() if name in self.met})
            self._give_back()
            raise

    def meet(self, name: str, leaf: Tensor) -> Tensor:
        """Returns what Pyro's store shall have for a parameter that is made.

        Args:
            name: Its name.
            leaf: The unconstrained value that its program starts it from.
        """
        self.met.add(name)
        is_modules = isinstance(leaf, torch.nn.Parameter)
        constraint = self._store._constraints[name]
        if name not in self.values and not self.is_start:
            raise self._lacking(name)
        if self.is_start and not is_modules and name in self._before and leaf is self._before[name][0]:
            raise _changed_outside(name)
        new = leaf.detach().clone()
        self._own[name] = leaf.detach().clone()
        if name in self.values:
            new = _unconstrained(name, self.values[name], constraint, leaf, self._arguments)
        if not is_modules:  # A tensor that is made outside of the program stays as it is.
            return new.requires_grad_()
        self._adopt(leaf, leaf.data)
        if name in self.values:
            self._set(leaf, new)
        elif name in self._before and self._before[name][0] is leaf:
            self.kept.add(name)
        return leaf

    def replace(self, name: str, leaf: Tensor) -> None:
        """Notes that a module has taken over what the store has.

        Args:
            name: The parameter's name.
            leaf: The module's tensor.
        """
        if isinstance(leaf, torch.nn.Parameter):
            self._adopt(leaf, self._own[name])

    def fetch(self, name: str) -> tuple[Tensor, constraints.Constraint]:
        """Returns a parameter that a program reads without a word on how to make it, unconstrained.

        Args:
            name: Its name.

        Raises:
            VFEError: It has no value.
        """
        old, constraint = self._before.get(name, (None, constraints.real))
        if name in self.values:
            self.met.add(name)
            return _unconstrained(
                name, self.values[name], constraint, old, self._arguments
            ).requires_grad_(), constraint
        if not self.is_start:
            raise self._lacking(name)
        if old is None:
            raise KeyError(name)
        self.met.add(name)
        self.kept.add(name)
        return old, constraint

    def _check_names(self) -> None:
        """Checks that the names of the values are those of parameters.

        Raises:
            VFEError: None is; or some are not while parameters of the programs have no value.
        """
        unread, lacking = sorted(self.values.keys() - self.met), sorted(self.met - self.values.keys())
        if self.values and unread and (lacking or self.values.keys().isdisjoint(self.met)):
            without = f" They read {quoted(lacking)}, which it lacks." if lacking else ""
            raise VFEError(
                f"params= names {quoted(unread)}, which the programs do not read.{without}",
                hint="Correct the name, or leave out what is not theirs.",
            )

    def _lacking(self, name: str) -> VFEError:
        return VFEError(
            f"params= lacks parameter '{name}' of the programs; it has {quoted(sorted(self.values)) or 'none'}.",
            hint="Give all of them, as run.params of a run of these programs does. For what Pyro's store has add "
            f"'{name}': pyro.param('{name}').",
        )

    def _put(self, entries: Mapping[str, tuple[Tensor, constraints.Constraint]]) -> None:
        store = self._store
        for name, (leaf, constraint) in entries.items():
            self.met.add(name)
            store._param_to_name.pop(store._params.get(name), None)  # type: ignore[arg-type]
            store._params[name], store._constraints[name], store._param_to_name[leaf] = leaf, constraint, name

    def _adopt(self, leaf: Tensor, own: Tensor) -> None:
        """Notes what a module's tensor has to get back: what a start gives it, training changes in place."""
        self._modules_own.append((leaf, own.clone() if self.is_start else own))

    def _set(self, leaf: Tensor, value: Tensor) -> None:
        """Writes into a module's tensor. For one call it has other memory: what looks into that keeps it."""
        if self.is_start:
            leaf.data.copy_(value)
        else:
            leaf.data = value

    def _give_back(self) -> None:
        for leaf, own in reversed(self._modules_own):
            self._set(leaf, own)
        self._modules_own.clear()


class _Made(dict[str, Tensor]):
    """The unconstrained parameters of Pyro's store while they are made anew."""

    def __init__(self, substitute: Substitute) -> None:
        super().__init__()
        self._substitute = substitute

    def __setitem__(self, name: str, leaf: Tensor) -> None:
        if name in self:
            self._substitute.replace(name, leaf)
        else:
            leaf = self._substitute.meet(name, leaf)
        super().__setitem__(name, leaf)

    def __missing__(self, name: str) -> Tensor:
        leaf, constraint = self._substitute.fetch(name)
        pyro.get_param_store()._constraints[name] = constraint
        super().__setitem__(name, leaf)
        return leaf


@contextmanager
def reading(params: Mapping[str, Any] | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Runs a block in which programs read given values of parameters, all of them; Pyro's store stays as it is.

    Args:
        params: Constrained values by name; None for what the store has.
        args: The programs' arguments.
        kwargs: The programs' keyword arguments.

    Raises:
        VFEError: They are not the programs' parameters, or not of their shapes and constraints.
    """
    if params is None:
        yield
        return
    with Substitute(params, is_start=False, arguments=(args, kwargs)).reading():
        yield


def _unconstrained(
    name: str, value: Tensor, constraint: constraints.Constraint, like: Tensor | None, arguments: Arguments
) -> Tensor:
    """The value as Pyro's store has it.

    Args:
        name: The parameter's name.
        value: Its value.
        constraint: What the program says that it has to be.
        like: Another unconstrained value of its; None where there is none.
        arguments: Of the programs.

    Raises:
        VFEError: It has another shape, or breaks the constraint.
    """
    transform = transform_to(constraint)
    with torch.no_grad():
        own = value if like is None else transform(like)
        if value.shape != own.shape and not is_cut_short(own.shape, value.shape, arguments):
            raise VFEError(
                f"params= has shape {tuple(value.shape)} for parameter '{name}', and the programs make it in shape "
                f"{tuple(own.shape)}.",
                hint="Give values of a run of these programs at these sizes.",
            )
        value = value.to(own)
        try:
            found: Tensor = transform.inv(value).contiguous()
            is_served = bool(constraint.check(value).all()) or _are_close(transform(found), value)
        except (ValueError, RuntimeError):  # of a matrix, say, without a Cholesky factor
            is_served = False
    if not is_served:
        raise VFEError(
            f"params= has a value for parameter '{name}' that breaks its constraint, {constraint}.",
            hint="Give the value as pyro.param returns it, constrained, as run.params has it.",
        )
    return found.detach().clone()


def _are_close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=_TOLERANCE, atol=_TOLERANCE * float(other.abs().max()))


def _as_tensors(values: object) -> dict[str, Tensor]:
    if not isinstance(values, Mapping | type(pyro.get_param_store())):
        way_out = "run.params" if hasattr(values, "params") else "a mapping, such as run.params"
        raise VFEError(f"params= is a {type(values).__name__}.", hint=f"Pass {way_out}.")
    found = {}
    for name, value in values.items():
        try:
            found[name] = torch.as_tensor(value).detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise VFEError(
                f"params= has a {type(value).__name__} for parameter '{name}'.", hint="Give a tensor or a number."
            ) from error
    return found


def _changed_outside(name: str) -> VFEError:
    return VFEError(
        f"Parameter '{name}' starts from a tensor that is made outside of the program, and training has changed that "
        "tensor itself: Pyro makes it the parameter.",
        hint=f"Write pyro.param('{name}', start.clone()), and make the tensor anew.",
    )


def quoted(names: Sequence[str]) -> str:
    """The first few names, and how many more there are.

    Args:
        names: Of parameters.
    """
    shown = ", ".join(f"'{name}'" for name in names[:_MOST_NAMED])
    return shown if len(names) <= _MOST_NAMED else f"{shown} and {len(names) - _MOST_NAMED} more"
