"""How a program names its arguments."""

import inspect
from functools import partial
from typing import Any

import torch

from pyro_vfe.program.layout import Program


def signature_of(program: Program) -> inspect.Signature | None:
    """Returns the signature of what the user wrote, without its annotations; None where there is none to be had.

    That of a module is its `forward`'s, and Pyro's handlers around a program are looked through.

    Args:
        program: A function, a module, or either with Pyro's handlers around it.
    """
    own: Any = program
    while True:
        if isinstance(own, torch.nn.Module):
            own = own.forward
        elif type(own).__name__ == "_bound_partial":
            own = own.func
        elif isinstance(own, partial) and getattr(own.func, "__name__", "") == "_context_wrap":
            own = own.args[1]
        else:
            break
    try:
        found = inspect.signature(own)
    except (TypeError, ValueError):
        return None
    empty = inspect.Parameter.empty  # Annotations need not be something that can be pickled.
    return inspect.Signature([parameter.replace(annotation=empty) for parameter in found.parameters.values()])
