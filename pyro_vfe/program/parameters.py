"""What is wrong with parameters, for error messages."""

import pyro
import torch

from pyro_vfe.program.layout import Program


def nan_parameters(*programs: Program) -> list[str]:
    """Returns the quoted names of parameters that hold NaN, in Pyro's store and in programs that are modules."""
    names = [f"'{name}'" for name, value in pyro.get_param_store().items() if bool(value.isnan().any())]
    for program in programs:
        if isinstance(program, torch.nn.Module):
            names += [f"'{name}'" for name, value in program.named_parameters() if bool(value.isnan().any())]
    return list(dict.fromkeys(names))
