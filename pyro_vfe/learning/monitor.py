"""Free energies while SVI runs."""

from typing import Any

from pyro_vfe.learning.history import History
from pyro_vfe.program.layout import Program


class Monitor:
    """Decomposes F every few steps of a loop of one's own."""

    def __init__(self, model: Program, guide: Program) -> None:
        """Args:
        model: The generative model.
        guide: The guide.
        """
        raise NotImplementedError

    @property
    def history(self) -> History:
        """F, surprise and gap so far."""
        raise NotImplementedError

    def step(self, *args: Any, **kwargs: Any) -> bool:
        """Returns whether to stop."""
        raise NotImplementedError
