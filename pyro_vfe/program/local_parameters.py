"""Parameters that are local to their modules: Pyro's setting `module_local_params`.

They stand under no name in Pyro's store, where what learns and what reports finds parameters. So for the time of such a
call they do: the setting is off, and the modules' own tensors are in the store. After it they are local again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import ref

import pyro
import torch
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints

from pyro_vfe.errors import NameClashError
from pyro_vfe.program.reach import reach

_Named = dict[str, tuple[Tensor, constraints.Constraint]]
"""Unconstrained parameters and their constraints."""

_present: ContextVar[frozenset[str]] = ContextVar("the names of local parameters in the store", default=frozenset())


def are_local() -> bool:
    """Returns whether modules keep their parameters to themselves."""
    return bool(pyro.settings.get("module_local_params"))


@contextmanager
def in_store(*holders: object) -> Iterator[None]:
    """Runs a block in which Pyro's store has the parameters of modules, under the names that they would have there.

    Args:
        *holders: Programs, and what holds programs.

    Raises:
        NameClashError: Two parameters have one name, which local ones may have.
    """
    roots = [module for module in reach(*holders).modules if isinstance(module, PyroModule)]
    own = _named(roots)
    store = pyro.get_param_store()
    known = store._params, store._constraints, store._param_to_name
    shown = {name: (leaf, known[1][name]) for name, leaf in known[0].items() if name not in own} | own
    store._params = {name: leaf for name, (leaf, _) in shown.items()}
    store._constraints = {name: constraint for name, (_, constraint) in shown.items()}
    store._param_to_name = {leaf: name for name, leaf in store._params.items()}
    token = _present.set(frozenset(own))
    try:
        with pyro.settings.context(module_local_params=False), _OwnNames(own):
            yield
    finally:
        _present.reset(token)
        local = {id(leaf) for root in roots for leaf in root.parameters()}
        for name, leaf in store._params.items():
            if id(leaf) not in local:  # What a function makes, pyro.param or pyro.module, is in the store in any case.
                known[0][name], known[1][name], known[2][leaf] = leaf, store._constraints[name], name
        store._params, store._constraints, store._param_to_name = known


def local_names() -> frozenset[str]:
    """Returns which names in Pyro's store are of parameters that are local otherwise."""
    return _present.get()


def readable_by_svi(value: Any) -> None:
    """Gives a module's tensor what Pyro's SVI asks of each parameter, as Pyro's store does to those that it has.

    Args:
        value: What a program read of a parameter.
    """
    if isinstance(value, torch.nn.Parameter) and not hasattr(value, "unconstrained"):
        value.unconstrained = ref(value)  # type: ignore[attr-defined]


class _OwnNames(Messenger):
    """Refuses a parameter that a function makes under the name of a module's."""

    def __init__(self, own: _Named) -> None:
        super().__init__()
        self.own = own

    def _pyro_param(self, msg: Any) -> None:
        known = self.own.get(msg["name"])
        if known is not None and len(msg["args"]) > 1 and msg["args"][1] is not known[0]:
            raise _two_of_one_name(msg["name"])


def _named(roots: list[PyroModule]) -> _Named:
    """The parameters of modules by the names that Pyro's store would have them under."""
    found: _Named = {}
    for module in dict.fromkeys(part for root in roots for part in root.modules() if isinstance(part, PyroModule)):
        for name, leaf, constraint in _own(module):
            if found.setdefault(name, (leaf, constraint))[0] is not leaf:
                raise _two_of_one_name(name)
    return found


def _own(module: PyroModule) -> Iterator[tuple[str, Tensor, constraints.Constraint]]:
    prefix = f"{module._pyro_name}." if module._pyro_name else ""
    for name, leaf in module._parameters.items():
        constrained = name.removesuffix("_unconstrained")
        if leaf is not None and constrained in module._pyro_params:
            yield prefix + constrained, leaf, module._pyro_params[constrained][0]
        elif leaf is not None:
            yield prefix + name, leaf, constraints.real
    for name, child in module._modules.items():
        if child is not None and not isinstance(child, PyroModule):
            for inner, leaf in child.named_parameters():
                yield f"{prefix}{name}$$${inner}", leaf, constraints.real


def _two_of_one_name(name: str) -> NameClashError:
    return NameClashError(
        f"Two parameters are called '{name}', each local to its module or made by a function (pyro.settings has "
        "module_local_params=True); what learns and what reports knows them by their names.",
        hint='Give the modules names, `super().__init__("guide")` in a PyroModule, or their parts different ones.',
    )
