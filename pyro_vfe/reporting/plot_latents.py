"""Pictures."""

from typing import Any


def plot_marginals(*, ax: Any = None) -> Any:
    """Returns the axes."""
    raise NotImplementedError


def plot_responsibilities(*, ax: Any = None) -> Any:
    """Returns the axes."""
    raise NotImplementedError
