"""Pictures."""

from typing import Any


def plot_states(*, ax: Any = None) -> Any:
    """Returns the axes."""
    raise NotImplementedError
