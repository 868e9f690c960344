"""A model and a guide at their arguments, as EM sees them."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_vfe.energy.parts import normalized
from pyro_vfe.learning.held_weights import with_weights_in_tables
from pyro_vfe.program.buffers import unchanged_buffers
from pyro_vfe.program.enumeration import Enumeration
from pyro_vfe.program.extraction import parameter_roles
from pyro_vfe.program.layout import Program
from pyro_vfe.program.parameters import Parameters, two_of_one_name
from pyro_vfe.program.programs import Programs
from pyro_vfe.program.selection import Origins


@dataclass(eq=False)
class Pair:
    """A model and a guide with the arguments of one data set; their parameters live in Pyro's store."""

    model: Program
    """The model, watched by `parameters`."""
    guide: Program
    """The guide, watched by `parameters`; one without sites where there is none."""
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    programs: Programs
    parameters: Parameters
    fixed: frozenset[str] = frozenset()
    """Parameters that no phase may change."""
    floor: Mapping[str, float] | float | None = None
    """The least value that a scale, variance, rate or probability may take, for all parameters or by name."""
    max_bytes: float | None = None
    learned: tuple[str, ...] = ()
    """The parameters that the M-phase changes: the model's, and point estimates of the guide. Known after a run."""
    recognition: tuple[str, ...] = ()
    """The parameters that the E-phase changes: those of the guide's distributions of latents. Known after a run."""

    def enumerate(self, *, differentiable: bool = False, advances: bool = False) -> Enumeration:
        """The factors of both programs at the present parameters, in float64.

        Args:
            differentiable: Whether the tables carry the graph to the parameters. Otherwise only the distributions'
                parameters do, which statistics need.
            advances: Whether what modules have in their buffers (the running means of a BatchNorm, say) moves on.

        Raises:
            NameClashError: A module computes with another tensor than Pyro's store has by its name.
            StructureError: A parameter is the model's and the guide's at once.
            ScaleError: A parameter that the M-phase changes decides how much a latent counts.
        """
        self.parameters.forget()
        with torch.enable_grad(), nullcontext() if advances else unchanged_buffers():
            run = self.programs.enumerate(self.model, self.guide, self.args, self.kwargs, differentiable=differentiable)
        if self.parameters.strangers:
            raise two_of_one_name(self.parameters.strangers)
        run = replace(run, parameters=dict(self.parameters.values))
        learned, recognition = parameter_roles(run, self.parameters)
        self.learned = tuple(name for name in learned if name not in self.fixed)
        self.recognition = tuple(name for name in recognition if name not in self.fixed)
        with torch.set_grad_enabled(differentiable):
            return normalized(with_weights_in_tables(run, self._is_learned), torch.float64)

    def _is_learned(self, value: Tensor) -> bool:
        """Whether a tensor was computed from a parameter that the M-phase changes."""
        return not Origins(self.parameters.values).of(value).isdisjoint(self.learned)
