"""Backward passes that write no gradient that is not finite.

One NaN in an optimiser's memory makes a parameter NaN for good. So a leaf refuses such a gradient before it is written,
in the backward pass of a loss that is watched and of no other.
"""

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from pyro_vfe.errors import NotFiniteGradientError
from pyro_vfe.program.singular import leaves_of, named

_NO_TASK = -1


class Watch:
    """What the leaves of a loss ask in its backward pass."""

    def __init__(self, loss: Tensor, on_failure: Callable[[], None]) -> None:
        """Args:
        loss: A scalar with a graph.
        on_failure: Called where a gradient is not finite, before the error is raised.
        """
        self.leaves = leaves_of([loss])
        """What gradients are written to."""
        self._on_failure = on_failure
        self._task = _NO_TASK

    def watched(self, loss: Tensor) -> Tensor:
        """Returns the loss, whose backward pass is looked at from now on.

        Args:
            loss: What this was made for.
        """
        result: Tensor = _Root.apply(loss, self)  # type: ignore[no-untyped-call]
        handles = [leaf.register_hook(self._asking(leaf)) for leaf in self.leaves]
        weakref.finalize(result.grad_fn, _remove, handles)
        return result

    def begin(self) -> None:
        """Notes that the loss's own backward pass is under way."""
        self._task = torch._C._current_graph_task_id()

    def _asking(self, leaf: Tensor) -> Callable[[Tensor], None]:
        def ask(gradient: Tensor) -> None:
            if self._task == torch._C._current_graph_task_id() and not _is_finite(gradient):
                self._on_failure()
                raise NotFiniteGradientError(
                    f"The gradient of {named([leaf])} is not finite, while the loss is.",
                    hint="Look for an operation without a finite derivative there, such as the square root or "
                    "logarithm of 0, or a torch.where around one; move the parameter off that point.",
                )

        return ask


class _Root(torch.autograd.Function):
    """A loss as it is, which says when its backward pass begins."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, watch: Watch) -> Tensor:
        """The loss."""
        ctx.watch = watch
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Its gradient."""
        ctx.watch.begin()
        return gradients[0], None


def _remove(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _is_finite(gradient: Tensor) -> bool:
    # One sum tells of any entry; only where it is not finite, which large entries can cause too, all are looked at.
    if math.isfinite(gradient.sum().item()):
        return True
    entries = gradient.coalesce().values() if gradient.is_sparse else gradient
    return bool(entries.isfinite().all())


def backward_or_nothing(loss: Tensor, watch: Watch, retain_graph: bool | None) -> None:
    """Adds the gradient of a loss to the leaves' `.grad`; where it is not finite, nothing is written.

    Args:
        loss: A scalar that is watched.
        watch: By this.
        retain_graph: Whether the graph stays.

    Raises:
        NotFiniteGradientError: Some gradient is not finite.
    """
    before = [leaf.grad for leaf in watch.leaves]
    for leaf in watch.leaves:
        leaf.grad = None
    try:
        loss.backward(retain_graph=retain_graph)
    except BaseException:
        for leaf, gradient in zip(watch.leaves, before, strict=True):
            leaf.grad = gradient
        raise
    for leaf, gradient in zip(watch.leaves, before, strict=True):
        if gradient is not None:
            leaf.grad = gradient if leaf.grad is None else gradient.add_(leaf.grad)
