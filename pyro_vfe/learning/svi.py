"""SVI with diagnostics."""

from dataclasses import dataclass
from typing import Any

from pyro_vfe.learning.history import History
from pyro_vfe.program.layout import Program


@dataclass(frozen=True, eq=False)
class SVIRun:
    """The end of SVI and the way there."""

    history: History
    """F, surprise and gap."""


def fit(model: Program, guide: Program, *args: Any, **kwargs: Any) -> SVIRun:
    """Returns where SVI led."""
    raise NotImplementedError
