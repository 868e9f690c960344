"""Backward passes that write no gradient that is not finite.

One NaN in an optimiser's memory makes a parameter NaN for good. So a leaf refuses such a gradient before it is written,
in the backward pass of a loss that is watched and of no other.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import finalize, ref

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from pyro_vfe.errors import NotFiniteGradientError
from pyro_vfe.program.singular import named

_NO_TASK = -1


OnFailure = Callable[[], None]
"""What is done where a gradient is not finite, before the error is raised."""


def watched(loss: Tensor, leaves: Sequence[Tensor], on_failure: OnFailure) -> Tensor:
    """Returns a loss in whose backward pass leaves refuse gradients that are not finite.

    Args:
        loss: A scalar with a graph.
        leaves: What gradients are written to.
        on_failure: Called where one is not finite.
    """
    watch = _Watch(on_failure)
    result: Tensor = _Root.apply(loss, watch)  # type: ignore[no-untyped-call]
    handles = [leaf.register_hook(partial(watch.ask, ref(leaf))) for leaf in leaves]
    finalize(result.grad_fn, _remove, handles)
    return result


class _Watch:
    """What leaves ask in a backward pass: whether it is that of the loss, and whether they can take the gradient."""

    def __init__(self, on_failure: OnFailure) -> None:
        self._on_failure = on_failure
        self._task = _NO_TASK

    def begin(self) -> None:
        """Notes that the loss's own backward pass is under way."""
        self._task = torch._C._current_graph_task_id()

    def ask(self, leaf: "ref[Tensor]", gradient: Tensor) -> None:
        """Raises where the leaf is not to have the gradient."""
        if self._task == torch._C._current_graph_task_id() and not _is_finite(gradient):
            self._on_failure()
            raise _not_finite([one for one in [leaf()] if one is not None])


class _Root(torch.autograd.Function):
    """A loss as it is, which says when its backward pass begins."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, watch: _Watch) -> Tensor:
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


def backward_or_nothing(
    loss: Tensor, leaves: Sequence[Tensor], on_failure: OnFailure, retain_graph: bool | None = None
) -> None:
    """Adds the gradient of a loss to the leaves' `.grad`; where it is not finite, nothing is written.

    Args:
        loss: A scalar with a graph.
        leaves: What gradients are written to.
        on_failure: Called where one is not finite.
        retain_graph: Whether the graph stays.

    Raises:
        NotFiniteGradientError: Some gradient is not finite.
    """
    before = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    try:
        loss.backward(retain_graph=retain_graph)
        bad = [leaf for leaf in leaves if leaf.grad is not None and not _is_finite(leaf.grad)]
        if bad:
            on_failure()
            raise _not_finite(bad)
    except BaseException:
        for leaf, gradient in zip(leaves, before, strict=True):
            leaf.grad = gradient
        raise
    for leaf, gradient in zip(leaves, before, strict=True):
        if gradient is not None:
            leaf.grad = gradient if leaf.grad is None else gradient.add_(leaf.grad)


def _not_finite(leaves: Sequence[Tensor]) -> NotFiniteGradientError:
    return NotFiniteGradientError(
        f"The gradient of {named(leaves)} is not finite, while the loss is.",
        hint="Look for an operation without a finite derivative there, such as the square root or logarithm of 0, or a "
        "torch.where around one; move the parameter off that point.",
    )
