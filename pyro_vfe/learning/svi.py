r"""Stochastic variational inference, with the free energy taken apart on the way.

    theta, phi  <-  descend F(Q, G)        F  =  surprise + gap

References:
    Hoffman, Blei, Wang and Paisley (2013), Stochastic variational inference.
"""

import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_vfe.energy.free_energy import FreeEnergy
from pyro_vfe.errors import VFEError, VFEWarning, callers_level
from pyro_vfe.learning.batches import are_several, out_of_step
from pyro_vfe.learning.history import History, Numbers
from pyro_vfe.learning.monitor import Monitor, SVICallback
from pyro_vfe.learning.start import Start
from pyro_vfe.learning.stop_rules import StopRule
from pyro_vfe.learning.svi_checks import arguments_of_steps, check_elbo, check_num_steps, check_optim
from pyro_vfe.learning.svi_report import Unmonitored, ending, notes_of_own_parameters, run_as_html, run_as_text
from pyro_vfe.learning.svi_step import Stepper
from pyro_vfe.program.entry_points import entry_point
from pyro_vfe.program.given import given_guide
from pyro_vfe.program.layout import Program

_READINGS = 50
"""About how many readings a long run has by default."""

_LEAST_EVERY = 20
"""A reading costs about as much as a step: so that all of them cost a few percent."""

_MOST_EVERY = 50
"""Where rules wait for readings, a long run has more of them, which still cost a few percent."""


@dataclass(frozen=True, eq=False)
class SVIRun:
    """The end of SVI and the way there."""

    params: Mapping[str, Tensor]
    """Copies of all parameters that the programs read, constrained."""
    history: History
    """F, surprise and gap of all readings, in nats: after the first step, every so many steps, and at the end."""
    losses: Numbers
    """The loss of every step as `pyro.infer.SVI.step` returns it, shape `(num_steps,)`: at the parameters before it."""
    num_steps: int
    """The number of steps that were done."""
    stopped: str | None
    """Why there were fewer than asked for, in words; None if there were not."""
    updates: Mapping[str, str]
    """How each parameter was updated, in words."""
    notes: tuple[str, ...] = ()
    """What a reader should know."""

    @property
    def free_energy(self) -> float:
        """F at the end, in nats: that of the last reading; NaN without readings."""
        return self.history.rows[-1].free_energy if self.history.rows else float("nan")

    def __str__(self) -> str:
        return run_as_text(self, self._headline())

    def _repr_html_(self) -> str:
        return run_as_html(self, self._headline())

    def _headline(self) -> list[str]:
        """Where it ended, and why."""
        lines = ending("SVI", self.num_steps, self.stopped, self.history)
        if not self.history.rows:
            lines.append(f"loss {np.array2string(self.losses[-1], precision=4)} at the last step")
        return lines


@entry_point(learns=True, names=True)
def fit(
    model: Program,
    guide: Program | None,
    *args: Any,
    optim: PyroOptim,
    num_steps: int,
    elbo: ELBO | None = None,
    batches: Iterable[Any] | None = None,
    progress_bar: bool = True,
    monitor: Monitor | Literal[False] | None = None,
    callback: SVICallback | None = None,
    stop: StopRule | Iterable[StopRule] = (),
    params: Mapping[str, Any] | None = None,
    fresh: bool = False,
    **kwargs: Any,
) -> SVIRun:
    """Returns the end of SVI and the way there; the parameters in Pyro's store are those of the end.

    The steps are those of `pyro.infer.SVI`, number for number; what is added looks on. A program's keyword arguments
    that are called as options here (`num_steps`, `stop`, ...) cannot be passed: bind them with `functools.partial`.
    After an interrupt (Ctrl-C) the parameters in Pyro's store are those of the last whole step.

    Args:
        model: The generative model.
        guide: The guide; None for one without sites.
        *args: The programs' arguments: the data.
        optim: One of Pyro's optimisers, such as `pyro.optim.Adam({"lr": 0.01})`. A scheduler of learning rates is
            stepped after every step; `pyro.optim.ReduceLROnPlateau` is shown its loss.
        num_steps: The number of steps, if no rule stops earlier.
        elbo: The loss; by default `FreeEnergy()`. Any of Pyro's ELBOs.
        batches: What is iterated over, from the start again when it ends: a list, a torch DataLoader. Each item is a
            tensor (the only argument), a tuple or list of arguments, or a mapping of keyword arguments. An iterator,
            which cannot start again, ends the run where it ends.
        progress_bar: Whether to show one.
        monitor: What reads F, surprise and gap. By default a `Monitor` of the training arguments, which reads at the
            first step, at the end, and about 50 times between, but no more often than every 20 steps; with stop=, which
            waits for readings, at least every 50 steps. Readings of mini-batches are as noisy as these are, where a
            `Monitor(model, guide, held_out=...)` reads the same data each time. False for none; then the history is
            empty. A bar is shown if both fit and the monitor want one.
        callback: Called after each reading with the number of steps and a dict of floats, as `Monitor` has it. Where it
            returns True the run ends.
        stop: One or several rules when to end, such as `Settled()` or `GapBelow(0.01)`, asked after each reading.
        params: Values of parameters by name to start from, such as `run.params` of another run, in place of those
            in Pyro's store; parameters that it lacks start from the programs' own values.
        fresh: Whether all parameters that the programs read start from the programs' own values, not from Pyro's
            store. What a module holds (a `PyroModule`, a guide that has been called) is its own value. With either
            option an error leaves the store as it was before the run.
        **kwargs: The programs' keyword arguments.

    Raises:
        VFEError: An option is not what it should be, or a step failed; the message says which one, and the parameters
            are those before it.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> import pyro_vfe as vfe
        >>> pyro.clear_param_store()
        >>> def model(u):
        ...     rates = pyro.param("rates", torch.tensor([1.0, 9.0]))
        ...     with pyro.plate("data", len(u)):
        ...         v = pyro.sample("v", dist.Categorical(torch.ones(2) / 2))
        ...         pyro.sample("u", dist.Poisson(rates[v]), obs=u)
        >>> u = torch.tensor([2.0, 0.0, 1.0, 12.0, 8.0, 13.0])
        >>> optim = pyro.optim.Adam({"lr": 0.1})
        >>> run = fit(model, vfe.AutoMeanField(model), u, optim=optim, num_steps=400, progress_bar=False)
        >>> [round(rate, 1) for rate in run.params["rates"].tolist()]
        [1.0, 11.0]
        >>> run.history.iteration[:4].tolist(), len(run.losses)
        ([1, 20, 40, 60], 400)

    References:
        Hoffman, Blei, Wang and Paisley (2013), Stochastic variational inference.
    """
    guide = given_guide(model, guide)
    check_optim(optim)
    check_num_steps(num_steps)
    loss = FreeEnergy() if elbo is None else elbo
    check_elbo(loss)
    source = arguments_of_steps(args, kwargs, batches)
    origin = Start(params, fresh)
    watch = _watch(model, guide, loss, monitor, callback, stop, _every(num_steps, stop != (), batches))
    stepper, losses, stopped, done = Stepper(model, guide, optim, loss), [], None, False
    watch.start(num_steps, progress_bar)
    with origin.undone_on_error():
        try:
            for number in range(1, num_steps + 1):
                arguments = next(source, None)
                if arguments is None:
                    stopped = f"the {type(batches).__name__} of batches ended, and cannot be read again"
                    break
                with origin.first() if number == 1 else nullcontext():
                    losses.append(stepper.step(number, *arguments))
                if number == 1 and not stepper.leaves:
                    raise _nothing_to_learn()
                if watch.step(losses[-1], *arguments[0], **arguments[1]) and number < num_steps:
                    stopped = watch.stopped
                    break
            stepper.check_update(len(losses))
            done = True
        finally:
            watch.close(read=done)
    if len(losses) < num_steps and watch.stopped is None:
        words = f"fit did {len(losses)} of num_steps={num_steps} steps: {stopped}."
        warnings.warn(words, VFEWarning, stacklevel=callers_level())
    return _run_of(stepper, losses, watch, stopped, guide, are_several(batches), origin)


def _watch(
    model: Program,
    guide: Program,
    elbo: ELBO,
    monitor: object,
    callback: SVICallback | None,
    stop: StopRule | Iterable[StopRule],
    every: int,
) -> Monitor | Unmonitored:
    """What looks on: the user's, or one that reads F about as often as it is worth."""
    if monitor is None:
        own = elbo if isinstance(elbo, FreeEnergy) else None
        return Monitor(model, guide, every=every, elbo=own, callback=callback, stop=stop)
    if monitor is not False and not isinstance(monitor, Monitor):
        raise VFEError(
            f"monitor= is {monitor!r}.",
            hint="Leave it out, or pass a vfe.Monitor(model, guide, every=...), or False for none.",
        )
    if callback is not None or stop != ():
        option = "stop=" if callback is None else "callback="
        problem = "takes no readings" if monitor is False else "has its own"
        way_out = "Leave monitor= out." if monitor is False else f"Give {option} to the Monitor."
        raise VFEError(f"fit was given {option}, which is for readings, and a monitor= that {problem}.", hint=way_out)
    return monitor or Unmonitored()


def _every(num_steps: int, rules_wait: bool, batches: object) -> int:
    """The number of steps between readings, which come to every batch."""
    every = max(_LEAST_EVERY, -(-num_steps // _READINGS))
    return out_of_step(min(every, _MOST_EVERY) if rules_wait else every, batches)


def _nothing_to_learn() -> VFEError:
    return VFEError(
        "The programs have no parameters: SVI has nothing to change.",
        hint="Write what is to be learned as pyro.param(name, init, constraint=...), or as a PyroModule's parameter.",
    )


def _run_of(
    stepper: Stepper,
    losses: list[Any],
    watch: Monitor | Unmonitored,
    stopped: str | None,
    guide: Program,
    in_batches: bool,
    origin: Start,
) -> SVIRun:
    updates = {
        name: f"by {stepper.optimiser}" if name in stepper.reached else "not: F has no gradient in it"
        for name in stepper.leaves
    }
    held_out = isinstance(watch, Monitor) and watch.is_held_out
    notes = [*watch.notes]
    if in_batches and isinstance(watch, Monitor) and not held_out:
        notes.append("Each reading of F is of the batch of its step.")
    if in_batches or held_out:
        notes += notes_of_own_parameters(guide)
    return SVIRun(
        params=stepper.params,
        history=watch.history,
        losses=np.array(losses, dtype=np.float64),
        num_steps=len(losses),
        stopped=stopped,
        updates=updates,
        notes=(*notes, *origin.notes(stepper.leaves)),
    )
