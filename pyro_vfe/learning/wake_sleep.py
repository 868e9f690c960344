r"""The wake-sleep algorithm.

    wake     theta  <-  descend  E_{Q(v|u)} [ -log P(v, u | theta) ],        u the data
    sleep    phi    <-  descend  E_{P(v,u)} [ -log Q(v | u; phi) ],          (v, u) a dream

References:
    Hinton, Dayan, Frey and Neal (1995), The "wake-sleep" algorithm for unsupervised neural networks.
    Bornschein and Bengio (2015), Reweighted wake-sleep.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_vfe.energy.drawing import OnCost
from pyro_vfe.errors import VFEError, VFEWarning, callers_level
from pyro_vfe.learning.batches import Arguments, are_several
from pyro_vfe.learning.history import SLEEP, WAKE
from pyro_vfe.learning.machine import Machine, no_recognition_model
from pyro_vfe.learning.sleep_phase import Sleep
from pyro_vfe.learning.start import Start
from pyro_vfe.learning.stop_rules import StopRule
from pyro_vfe.learning.svi_checks import arguments_of_steps, check_num_steps, check_optim
from pyro_vfe.learning.svi_report import notes_of_own_parameters
from pyro_vfe.learning.svi_step import Stepper, name_of_optimiser
from pyro_vfe.learning.wake_phase import ReweightedWake, Wake
from pyro_vfe.learning.wake_sleep_optim import Both
from pyro_vfe.learning.wake_sleep_run import WakeSleepRun
from pyro_vfe.learning.wake_sleep_watch import WakeSleepCallback, Watch
from pyro_vfe.program.dreams import DreamToArgs
from pyro_vfe.program.entry_points import entry_point
from pyro_vfe.program.given import given_guide
from pyro_vfe.program.layout import Program
from pyro_vfe.program.programs import Check


class WakeSleepLosses(NamedTuple):
    """What the two phases of a step descended, in nats, at the parameters before each."""

    wake: float
    """E_Q[-log P(v, u)] of the data, summed over them; reweighted, the estimate of -log p(u)."""
    sleep: float
    """-log Q(v | u) of the dream; NaN where there was no sleep phase."""


class WakeSleep:
    """Learns a generative model and its recognition model from each other.

    A wake phase shows the data to the guide, and the model learns log P(v, u) of what the guide makes of them. A sleep
    phase lets the model dream, and the guide learns log Q(v | u) of the dream. Latents that can be enumerated are
    summed in the wake phase, not drawn; with `infer={"enumerate": None}` they are drawn:
    `pyro.poutine.infer_config(guide, lambda site: {"enumerate": None})` makes any guide draw all of its.

    A wake phase descends F in the model's parameters. A sleep phase does not descend F: it descends KL(P || Q) over
    dreams, and the history shows by how much F rose.

    A parameter that both programs read is the model's: wake phases change it, sleep phases do not.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> pyro.clear_param_store()
        >>> def model(u):
        ...     rate, noise = pyro.param("rate", torch.tensor(0.0)), pyro.param("noise", torch.tensor(0.0))
        ...     with pyro.plate("data", len(u)):
        ...         v = pyro.sample("v", dist.Bernoulli(logits=rate))
        ...         pyro.sample("u", dist.Bernoulli(logits=noise + 4 * v), obs=u)
        >>> def guide(u):
        ...     logits = pyro.param("logits", torch.zeros(2))
        ...     with pyro.plate("data", len(u)):
        ...         pyro.sample("v", dist.Bernoulli(logits=logits[u.long()]))
        >>> u = torch.tensor([0.0, 0.0, 0.0, 1.0] * 25)
        >>> adam = pyro.optim.Adam({"lr": 0.05})
        >>> machine = WakeSleep(model, guide, adam, pyro.optim.Adam({"lr": 0.05}))
        >>> pyro.set_rng_seed(0)
        >>> run = machine.run(u, num_steps=200, progress_bar=False)
        >>> bool(run.history.gap[-1] < 1.0 < run.history.gap[0])
        True

    References:
        Hinton, Dayan, Frey and Neal (1995), The "wake-sleep" algorithm for unsupervised neural networks.
        Bornschein and Bengio (2015), Reweighted wake-sleep.
    """

    @entry_point()
    def __init__(
        self,
        model: Program,
        guide: Program,
        optim_model: PyroOptim,
        optim_guide: PyroOptim,
        *,
        num_particles: int = 1,
        reweighted: bool = False,
        insomnia: float = 0.5,
        num_dreams: int = 1,
        dream_to_args: DreamToArgs | None = None,
        check: Check = "first",
        max_bytes: float | None = None,
        on_cost: OnCost = "raise",
    ) -> None:
        """Args:
        model: The generative model.
        guide: The recognition model: it has to compute Q from the data.
        optim_model: What changes the model's parameters: one of `pyro.optim`.
        optim_guide: What changes the guide's.
        num_particles: How many draws of what is sampled are averaged in a wake phase, or weighed.
        reweighted: Whether draws of the wake phase count by their importance weights, each datum by itself, and the
            guide learns from them too. Where everything is enumerated the weights are the exact posterior: the model
            descends its surprise, and the guide KL(P || Q) at the data.
        insomnia: With `reweighted`, the weight of the guide's gradient in a wake phase; in a sleep phase it is
            `1 - insomnia`. At 1 there are no sleep phases, at 0 the guide learns in its sleep only.
        num_dreams: How many dreams a sleep phase averages over; each has one dream for every datum.
        dream_to_args: Makes the programs' arguments of a dream where names do not tell, as in `dream`.
        check: When enumerated tables are compared with ordinary runs: at the "first" call, "always", or never (False).
        max_bytes: The most memory that tables may take; by default half of what is free.
        on_cost: What to do where summing all latents out would not fit: "raise" an error, or "sample" as many of the
            guide's latents as it takes.

        Raises:
            VFEError: An option is not what it should be.
        """
        given_guide(model, guide)
        check_optim(optim_model, "optim_model")
        check_optim(optim_guide, "optim_guide")
        _check_options(guide, num_particles, num_dreams, insomnia)
        self.model = model
        self.guide = guide
        options: dict[str, Any] = {"check": check, "max_bytes": max_bytes, "on_cost": on_cost}
        self._machine = Machine(model, guide, **options, weighs_data=reweighted)
        self._optims = optim_model, optim_guide
        self._both = Both(*self._optims, self._machine) if reweighted and insomnia > 0 else None
        awake = (
            ReweightedWake(self._machine, num_particles, insomnia) if reweighted else Wake(self._machine, num_particles)
        )
        self._wake = Stepper(model, guide, self._both or optim_model, awake, each="the wake phase of step")
        asleep = Sleep(self._machine, num_dreams, dream_to_args, 1 - insomnia if reweighted else 1.0)
        self._sleep = Stepper(model, guide, optim_guide, asleep, each="the sleep phase of step")
        self._sleeps = not reweighted or insomnia < 1
        self._phases = [0, 0]

    @entry_point(learns=True, names=True)
    def step(self, *args: Any, **kwargs: Any) -> WakeSleepLosses:
        """Does a wake phase and then a sleep phase, and returns the loss of each.

        Args:
            *args: The programs' arguments: the data.
            **kwargs: The programs' keyword arguments.

        Raises:
            VFEError: A phase failed; the parameters are as they were before the step.
        """
        return self._step(args, kwargs, lambda phase, loss: None)

    @entry_point(learns=True, names=True)
    def wake(self, *args: Any, **kwargs: Any) -> float:
        """Does a wake phase and returns its loss in nats: E_Q[-log P(v, u)]; reweighted, the estimate of -log p(u).

        Args:
            *args: The programs' arguments: the data.
            **kwargs: The programs' keyword arguments.

        Raises:
            VFEError: The phase failed; the parameters are as they were before it.
        """
        return self._phase(0, self._wake, self._sleep, args, kwargs)

    @entry_point(learns=True, names=True)
    def sleep(self, *args: Any, **kwargs: Any) -> float:
        """Does a sleep phase and returns its loss in nats: -log Q(v | u) of the dream.

        Args:
            *args: The programs' arguments: the data, for their shapes.
            **kwargs: The programs' keyword arguments.

        Raises:
            VFEError: The phase failed; the parameters are as they were before it.
        """
        return self._phase(1, self._sleep, self._wake, args, kwargs)

    @entry_point(learns=True, names=True)
    def run(
        self,
        *args: Any,
        num_steps: int,
        batches: Iterable[Any] | None = None,
        every: int | None = None,
        progress_bar: bool = True,
        callback: WakeSleepCallback | None = None,
        stop: StopRule | Iterable[StopRule] = (),
        held_out: Any = None,
        params: Mapping[str, Any] | None = None,
        fresh: bool = False,
        **kwargs: Any,
    ) -> WakeSleepRun:
        """Returns the end of wake, sleep, wake, sleep, ... and the way there; parameters in Pyro's store are the end's.

        F, surprise and gap are read before the first step, and after both phases of every so many steps. Readings are
        exact where that fits the memory, also of latents that training draws; they leave the random state alone. Where
        F cannot be known a row has NaN, and a `VFEWarning` says why, once.

        Args:
            *args: The programs' arguments at every step: the data.
            num_steps: How many steps to take.
            batches: What is iterated over instead, again and again: a list, a torch DataLoader. Each item is a tensor
                (the only argument), a tuple or list of arguments, or a mapping of keyword arguments.
            every: The number of steps from one reading to the next; by default there are about 50 of them. With 1, the
                changes of F in all phases add up.
            progress_bar: Whether to show one.
            callback: Called after each reading with the number of steps and a dict: 'free_energy/total',
                'free_energy/surprise', 'free_energy/gap' (nats, summed over the data), 'free_energy/per_datum', 'loss'
                of the phase and 'phase'. Where it returns True the run ends with the step.
            stop: One or several rules that say why to stop from the history of the sleep rows, such as
                `Settled()` or `GapBelow(0.01)`.
            held_out: The arguments to read F at, as `batches` has them; by default those of the step.
            params: Values of parameters by name to start from, such as `run.params` of another run, in place of those
                in Pyro's store; parameters that it lacks start from the programs' own values.
            fresh: Whether all parameters that the programs read start from the programs' own values, not from Pyro's
                store. What a module holds (a `PyroModule`, a guide that has been called) is its own value. With either
                option an error leaves the store as it was before the run.
            **kwargs: The programs' keyword arguments.

        Raises:
            VFEError: An option is not what it should be, or a step failed; the message says which one and in which
                phase, and the parameters are those before it.
        """
        check_num_steps(num_steps, "WakeSleep.run")
        source = arguments_of_steps(args, kwargs, batches, "WakeSleep.run")
        watch = Watch(self._machine, num_steps, batches, every, callback, stop, held_out, sleeps=self._sleeps)
        self._phases = [0, 0]
        origin = Start(params, fresh)
        with origin.undone_on_error():
            losses, ended = self._steps(watch, source, num_steps, progress_bar, type(batches).__name__, origin)
        if len(losses) < num_steps and watch.stopped is None:
            words = f"WakeSleep.run did {len(losses)} of num_steps={num_steps} steps: {ended}."
            warnings.warn(words, VFEWarning, stacklevel=callers_level())
        return WakeSleepRun(
            params=self._params(),
            history=watch.history,
            losses=np.array(losses, dtype=np.float64).reshape(-1, 2),
            num_steps=len(losses),
            stopped=ended,
            updates=self._how(),
            notes=(
                *watch.notes,
                *self._notes(are_several(batches) and not watch.is_held_out),
                *origin.notes(self._params()),
            ),
        )

    def _steps(
        self,
        watch: Watch,
        source: Iterator[Arguments],
        num_steps: int,
        progress_bar: bool,
        kind: str,
        origin: Start,
    ) -> tuple[list[WakeSleepLosses], str | None]:
        """The losses of all steps, and why there were fewer than asked for; `kind` is that of the batches."""
        losses: list[WakeSleepLosses] = []
        ended: str | None = None
        watch.start(progress_bar)
        try:
            for number in range(1, num_steps + 1):
                arguments = next(source, None)
                if arguments is None:
                    ended = f"the {kind} of batches ended, and cannot be read again"
                    break
                with origin.first() if number == 1 else nullcontext():
                    losses.append(self._watched_step(watch, number, *arguments))
                if number == 1:
                    self._check_learns()
                if watch.stopped is not None and number < num_steps:
                    ended = watch.stopped
                    break
            for stepper, count in zip((self._wake, self._sleep), self._phases, strict=True):
                stepper.check_update(count)
            watch.read_last()
        finally:
            watch.close()
        return losses, ended

    def _watched_step(
        self, watch: Watch, number: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> WakeSleepLosses:
        """A step that is looked at after each of its phases."""
        if number == 1:
            self._machine.look(args, kwargs)
            watch.begin(args, kwargs)
        losses = self._step(args, kwargs, lambda phase, loss: watch.after(phase, number, args, kwargs, loss))
        watch.advance(losses.wake, losses.sleep)
        return losses

    def _step(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], after: Callable[[str, float], None]
    ) -> WakeSleepLosses:
        """Both phases; a sleep phase that fails takes the wake phase back."""
        wake = self.wake(*args, **kwargs)
        after(WAKE, wake)
        if not self._sleeps:
            return WakeSleepLosses(wake, math.nan)
        try:
            sleep = self.sleep(*args, **kwargs)
        except BaseException:
            self._wake.undo()
            self._phases[0] -= 1
            raise
        after(SLEEP, sleep)
        return WakeSleepLosses(wake, sleep)

    def _phase(
        self, which: int, stepper: Stepper, other: Stepper, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> float:
        try:
            loss = stepper.step(self._phases[which] + 1, args, kwargs)
        except Exception as error:
            other.check_update(self._phases[1 - which], error)
            raise
        self._phases[which] += 1
        if which == 0 and self._both is not None:
            self._both.step_schedulers(loss, alone=not self._sleeps)
        assert isinstance(loss, float)
        return loss

    def _check_learns(self) -> None:
        if not self._machine.theta and not self._machine.phi:
            raise VFEError(
                "The programs have no parameters: wake-sleep has nothing to change.",
                hint="Write what is to be learned as pyro.param(name, init, constraint=...), or as a PyroModule's "
                "parameter.",
            )

    def _params(self) -> dict[str, Tensor]:
        return {**self._wake.params, **self._sleep.params}

    def _notes(self, of_batches: bool) -> list[str]:
        notes = ["Each reading of F is of the batch of its step."] if of_batches else []
        if not self._machine.phi:
            notes.append("The guide has no parameters of its own: sleep phases change nothing.")
        notes += [
            f"Parameter '{name}' is read by both programs: it is the model's, and sleep phases leave it as it is."
            for name in self._machine.shared
        ]
        return notes + notes_of_own_parameters(self.guide)

    def _how(self) -> dict[str, str]:
        """How each parameter was updated, in words."""
        reached = self._wake.reached | self._sleep.reached
        machine, (model, guide) = self._machine, map(name_of_optimiser, self._optims)
        phases = "awake and asleep" if self._both and self._sleeps else "awake" if self._both else "asleep"
        return {
            name: "not: neither phase has a gradient in it"
            if name not in reached
            else f"awake, by {model}"
            if name in machine.theta
            else f"{phases}, by {guide}"
            for name in self._params()
        }


def _check_options(guide: object, num_particles: int, num_dreams: int, insomnia: float) -> None:
    if guide is None:
        raise no_recognition_model("no guide")
    for name, number in (("num_particles", num_particles), ("num_dreams", num_dreams)):
        if number < 1:
            raise VFEError(f"{name} is {number}.", hint="Use at least one.")
    if not 0 <= insomnia <= 1:
        raise VFEError(f"insomnia is {insomnia}.", hint="Pass a weight from 0 (learn asleep) to 1 (learn awake).")
