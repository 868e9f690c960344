"""Pictures."""

from typing import Any


def plot_free_energy(*, ax: Any = None) -> Any:
    """Returns the axes."""
    raise NotImplementedError


def plot_decomposition(*, ax: Any = None) -> Any:
    """Returns the axes."""
    raise NotImplementedError


def plot_gap(*, ax: Any = None) -> Any:
    """Returns the axes."""
    raise NotImplementedError
