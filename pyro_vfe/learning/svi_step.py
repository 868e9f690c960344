r"""One step of SVI that either succeeds or changes nothing.

    theta  <-  theta - step( grad F(theta) )

`pyro.infer.SVI.step` hands any gradient to the optimiser, and one NaN in it makes a parameter NaN for good. Here the
gradients are looked at before they are used, and parameters that an update has spoilt are put back.
"""

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pyro
import torch
from pyro.infer.util import torch_item, zero_grads
from pyro.optim import PyroLRScheduler, PyroOptim
from torch import Tensor
from torch.distributions import transform_to

from pyro_vfe.errors import NotFiniteError, located
from pyro_vfe.learning.svi_report import Loss
from pyro_vfe.program.given_parameters import quoted
from pyro_vfe.program.layout import Program
from pyro_vfe.program.left_over import first_look
from pyro_vfe.program.parameters import Strangers, constraint_of, two_of_one_name, unconstrained


class Stepper:
    """Steps of `pyro.infer.SVI`, with the same results, that leave parameters as they were when they fail."""

    def __init__(
        self, model: Program, guide: Program, optim: PyroOptim | Any, elbo: Any, *, each: str = "step"
    ) -> None:
        """Args:
        model: The generative model.
        guide: The guide.
        optim: What changes the parameters: an optimiser of Pyro's, or what is called like one.
        elbo: What gives loss and gradients: an ELBO.
        each: What one step is called in errors, before its number.
        """
        self.leaves: dict[str, Tensor] = {}
        """The unconstrained value of every parameter that the programs have read, which is a leaf of the graph."""
        self.reached: set[str] = set()
        """The names of those that ever had a gradient."""
        self._before: dict[str, Tensor] = {}
        """Copies of the unconstrained values from before the last update."""
        self._model = model
        self._guide = guide
        self._optim = optim
        self._elbo = elbo
        self._each = each

    @property
    def params(self) -> dict[str, Tensor]:
        """Copies of all parameters that the programs have read, constrained."""
        with torch.no_grad():
            return {name: _constrained(name, leaf).clone() for name, leaf in self.leaves.items()}

    def step(self, number: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Loss:
        """Does a step and returns its loss, which is of the parameters before the step.

        Args:
            number: Of the step, counted from 1.
            args: Arguments of both programs.
            kwargs: Keyword arguments of both programs.

        Raises:
            VFEError: The step failed; the parameters are as they were before it, and have no gradients.
        """
        try:
            with located(f"{self._each} {number}"), self._looking(number, args, kwargs):
                loss, used = self._loss_and_grads(args, kwargs)
        except BaseException as error:
            zero_grads(self.leaves.values())
            if isinstance(error, Exception):
                self.check_update(number - 1, error)
            raise
        self._before = _copied(used, self._before)
        # A tensor with two names is updated once; all in the programs' order, which other processes have too.
        self._update(list(dict.fromkeys(used.values())))
        self._step_scheduler(loss)
        return loss

    def check_update(self, number: int, cause: Exception | None = None) -> None:
        """Checks that the last update left numbers.

        Args:
            number: Of the step that it belongs to.
            cause: The error that made somebody ask.

        Raises:
            NotFiniteError: It did not; the parameters are as they were before it.
        """
        spoilt = [name for name, before in self._before.items() if self._is_spoilt(name, before)]
        if not spoilt:
            return
        self._restore(self._before)
        error = NotFiniteError(
            f"The update by {self.optimiser} made parameter {quoted(spoilt)} infinite or NaN; all "
            "parameters are as they were before that step.",
            hint="Use a smaller learning rate, or an optimiser that limits its steps, such as pyro.optim.ClippedAdam.",
        )
        with located(f"{self._each} {number}"):
            raise error from cause

    def undo(self) -> None:
        """Puts the parameters back to where they were before the last update; the optimiser's memory stays."""
        self._restore(self._before)

    @property
    def optimiser(self) -> str:
        """The name of what changes the parameters."""
        return name_of_optimiser(self._optim)

    def _loss_and_grads(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Loss, dict[str, Tensor]]:
        """The loss as numbers, and the leaves of the parameters that were read, with gradients that can be used."""
        strangers = Strangers(*args, **kwargs)
        with pyro.poutine.trace(param_only=True) as capture, strangers:
            try:
                loss: Any = self._elbo.loss_and_grads(self._model, self._guide, *args, **kwargs)
            finally:
                used = self._meet(capture.trace.nodes)
        _check_in_store(strangers.found)
        gradients = {name: leaf.grad for name, leaf in used.items() if leaf.grad is not None}
        self.reached.update(gradients)
        numbers = tuple(map(torch_item, loss)) if isinstance(loss, tuple) else torch_item(loss)
        _check_finite(numbers, gradients)
        return numbers, used

    def _looking(self, number: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> AbstractContextManager[None]:
        """What the first step runs in: other ELBOs have no look at the programs before."""
        return first_look((self._guide, self._model), args, kwargs) if number == 1 else nullcontext()

    def _update(self, leaves: list[Tensor]) -> None:
        try:
            self._optim(leaves)
        except BaseException:
            self._restore(self._before)
            raise
        finally:
            zero_grads(leaves)

    def _meet(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The leaves of the parameters of a run, which are noted."""
        store = pyro.get_param_store()
        used = {name: unconstrained(name) for name in names if name in store}
        self.leaves.update(used)
        return used

    def _is_spoilt(self, name: str, before: Tensor) -> bool:
        """Whether a parameter has an entry that is no number and was one, as its user sees it."""
        now, then = (_constrained(name, leaf).isfinite() for leaf in (self.leaves[name], before))
        return bool((then & ~now).any())

    def _restore(self, copies: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in copies.items():
                self.leaves[name].copy_(value)

    def _step_scheduler(self, loss: Loss) -> None:
        step_scheduler(self._optim, loss)


def name_of_optimiser(optim: Any) -> str:
    """The name of what changes parameters.

    Args:
        optim: One of Pyro's optimisers.
    """
    constructor = optim.pt_optim_constructor
    return getattr(constructor, "__name__", type(constructor).__name__)


def step_scheduler(optim: object, loss: Loss) -> None:
    """Lets a learning rate take its course, where an optimiser has one that does.

    Args:
        optim: One of Pyro's optimisers.
        loss: Of the step.
    """
    if not isinstance(optim, PyroLRScheduler):
        return
    if optim.pt_scheduler_constructor is torch.optim.lr_scheduler.ReduceLROnPlateau:
        optim.step(loss)
    else:
        optim.step()


def _check_finite(loss: Loss, gradients: Mapping[str, Tensor]) -> None:
    """Checks that there is something to learn from.

    Raises:
        NotFiniteError: The loss or a gradient is not finite.
    """
    if not all(math.isfinite(part) for part in (loss if isinstance(loss, tuple) else (loss,))):
        raise NotFiniteError(
            f"The loss is {loss}.",
            hint="Look for data or draws of probability zero, and for a parameter at the end of its range; train with "
            "vfe.FreeEnergy(), which names the site. This step changed nothing.",
        )
    # One sum tells of any entry; only where it is not finite, which large entries can cause too, all are looked at.
    if all(math.isfinite(gradient.sum().item()) for gradient in gradients.values()):
        return
    bad = [name for name, gradient in gradients.items() if not bool(_entries(gradient).isfinite().all())]
    if bad:
        raise NotFiniteError(
            f"The gradient of parameter {quoted(bad)} is not finite, while the loss is {loss}.",
            hint="Look for an operation without a finite derivative there, such as the square root or logarithm of 0, "
            "or a torch.where around one; move the parameter off that point. This step changed nothing.",
        )


def _check_in_store(strangers: Mapping[str, Tensor]) -> None:
    """Checks that the loss depends on no parameters but those in Pyro's store.

    Raises:
        NameClashError: It does.
    """
    names = [name for name, tensor in strangers.items() if tensor.grad is not None]
    if names:
        zero_grads(strangers.values())
        raise two_of_one_name(names)


def _constrained(name: str, leaf: Tensor) -> Tensor:
    value: Tensor = transform_to(constraint_of(name))(leaf)
    return value.detach()


def _entries(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _copied(leaves: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors, in the memory of older copies where that fits."""
    copies = {}
    for name, leaf in leaves.items():
        known = old.get(name)
        fits = known is not None and known.shape == leaf.shape and known.device == leaf.device
        copies[name] = known.copy_(leaf.detach()) if known is not None and fits else leaf.detach().clone()
    return copies
