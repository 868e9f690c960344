"""What a user gives: programs that can be run, and options of the kind that they are to be."""

import inspect
from functools import partial
from types import FunctionType

import torch
from pyro.infer import ELBO
from pyro.infer.autoguide import AutoGuide
from pyro.infer.elbo import ELBOModule
from pyro.optim import PyroOptim

from pyro_vfe.errors import VFEError, described
from pyro_vfe.program.layout import Program, no_guide

_NO_PROGRAMS = (ELBO, ELBOModule, PyroOptim, torch.optim.Optimizer, torch.distributions.Distribution)
"""They can be called, and run no program."""


def given_guide(model: object, guide: Program | None) -> Program:
    """Returns the guide; one without sites for None.

    Args:
        model: The generative model.
        guide: What a user gave as the guide.

    Raises:
        VFEError: One of them is no program: data in its place, a class, an optimiser; or the two are swapped.
    """
    if type(model) is not FunctionType:
        check_program(model, "model")
        if isinstance(model, AutoGuide) and guide is not None:
            raise VFEError(
                f"The model is {described(model)}, which is a guide.",
                hint="The programs come first, the model and then the guide, and the data after them.",
            )
    if guide is None:
        return no_guide
    if type(guide) is not FunctionType:
        check_program(guide, "guide")
    return guide


def check_program(program: object, role: str) -> None:
    """Checks that something can be run as a program.

    Args:
        program: What a user gave.
        role: As what.

    Raises:
        VFEError: It cannot be called, is a class, or something else that is no program.
    """
    if not callable(program):
        raise VFEError(
            f"The {role} is {described(program)}, which cannot be called.",
            hint="The programs come first, the model and then the guide, and the data after them. "
            "vfe.AutoMeanField(model) makes a guide; None stands for one without sites, which leaves all discrete "
            "latents to be summed out.",
        )
    own = program.func if isinstance(program, partial) else program
    if isinstance(own, type):
        raise VFEError(
            f"The {role} is {described(own)}, and no instance of it.",
            hint=f"Make one, once, before the call: {role} = {_made(own)}.",
        )
    if isinstance(own, _NO_PROGRAMS):
        raise VFEError(
            f"The {role} is {described(own)}, which is no program.",
            hint="The programs are functions or modules that call pyro.sample: the model comes first, then the guide, "
            "and the data after them.",
        )


def check_option(name: str, given: object, kind: type | tuple[type, ...], what: str, ways: str) -> None:
    """Checks that an option is an instance of what it is to be.

    Args:
        name: The option.
        given: Its value.
        kind: What it is to be an instance of.
        what: That in words.
        ways: What to pass.

    Raises:
        VFEError: It is none.
    """
    if not isinstance(given, kind):
        raise VFEError(f"{name}= is {described(given)}, which is no {what}.", hint=f"Pass {ways}.")


def _made(own: type) -> str:
    """How an instance of a class is made, as code."""
    try:
        parameters = inspect.signature(own).parameters.values()
    except (TypeError, ValueError):
        return f"{own.__name__}(...)"
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [own.name for own in parameters if own.default is own.empty and own.kind in by_position]
    prefix = "vfe." if own.__module__.startswith("pyro_vfe.") else ""
    return f"{prefix}{own.__name__}({', '.join(needed)})"
