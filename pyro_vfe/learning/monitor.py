r"""The free energy of a training loop, taken apart every few steps.

    F(Q, G)  =  surprise + gap        at the parameters after step 1, every, 2 every, ..., and after the last

A falling loss does not say whether the model or the guide improved; these readings do.
"""

import warnings
from collections.abc import Callable, Iterable
from math import isnan
from types import TracebackType
from typing import Any, SupportsIndex

from pyro_vfe.energy.free_energy import FreeEnergy
from pyro_vfe.errors import VFEError, VFEWarning, callers_level
from pyro_vfe.learning.batches import Arguments, arguments_of
from pyro_vfe.learning.em_report import says_stop
from pyro_vfe.learning.history import History, Row
from pyro_vfe.learning.stop_rules import StopRule, without_a_gap
from pyro_vfe.learning.svi_reading import Reader, Reading
from pyro_vfe.learning.svi_report import Bar, Loss, as_float, by_tag, check_loss, in_words
from pyro_vfe.program.entry_points import entry_point
from pyro_vfe.program.given import given_guide
from pyro_vfe.program.layout import Program

SVICallback = Callable[[int, dict[str, float]], Any]
"""Called with the number of steps so far and values by tag; what returns True asks for an end, other values do not."""


class Monitor:
    """Takes F apart every few steps of a training loop: what it reads is a history, a bar, and calls of a function.

    For loops of one's own, of `pyro.infer.SVI` or of a torch optimiser on `FreeEnergy()(model, guide)`; `fit` has one
    built in. A reading changes nothing: not the parameters or their gradients, not the random state, not the buffers
    of the modules that the programs run. Whether a module is in training or evaluation mode is left as it is; call
    `eval()` around readings if that makes a difference. A reading costs about as much as a step.

    Where F cannot be taken apart (it is too large to sum, or has no decomposition), training goes on: the row has NaN
    as surprise and gap, and a `VFEWarning` says why, once. Then it is tried again after 1, 2, 4, ... readings.

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
        >>> guide = vfe.AutoMeanField(model)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), loss=vfe.FreeEnergy())
        >>> with vfe.Monitor(model, guide, every=20, stop=vfe.GapBelow(0.1), progress_bar=False) as monitor:
        ...     for _ in range(1000):
        ...         if monitor.step(svi.step(u), u):
        ...             break
        >>> monitor.stopped
        'the gap per datum is ... nats, below 0.1'
        >>> monitor.history.iteration.tolist()
        [1, 20, 40]
    """

    @entry_point()
    def __init__(
        self,
        model: Program,
        guide: Program | None,
        *,
        every: int = 50,
        held_out: Any = None,
        elbo: FreeEnergy | None = None,
        callback: SVICallback | None = None,
        stop: StopRule | Iterable[StopRule] = (),
        progress_bar: bool = True,
    ) -> None:
        """Args:
        model: The generative model.
        guide: The guide; None for one without sites.
        every: The number of steps from one reading to the next. The first step is read too, and the last one on
            `close`. Where batches are cycled, let it share no divisor with their number: otherwise the same few are
            read in every epoch.
        held_out: The arguments to read F at: a tensor (the only argument), a tuple or list of arguments, a mapping of
            keyword arguments. By default those of the step. A guide with parameters for every datum has none for
            others; readings of held-out data are for guides that compute Q from the data.
        elbo: What takes F apart; by default `FreeEnergy()`. `FreeEnergy(num_particles=k)` averages over k draws of
            what is sampled, and tells their standard error.
        callback: Called after each reading with the number of steps and a dict of floats: 'free_energy/total',
            'free_energy/surprise', 'free_energy/gap' (nats, summed over the data), 'free_energy/per_datum', and 'loss',
            that of the step. Where it returns True, `step` does.
        stop: One or several rules that say from the history why to stop, such as `Settled()` or `GapBelow(0.01)`: any
            function of a `History` that returns words, or None to go on.
        progress_bar: Whether to show one.

        Raises:
            VFEError: An option is not what it should be.
        """
        if isinstance(every, bool) or not isinstance(every, SupportsIndex) or every < 1:
            raise VFEError(f"Monitor was given every={every!r}.", hint="Pass a whole number of steps of at least 1.")
        if elbo is not None and not isinstance(elbo, FreeEnergy):
            raise VFEError(
                f"Monitor was given a {type(elbo).__name__} as elbo=, which takes no F apart.",
                hint="Leave it out, or pass vfe.FreeEnergy(num_particles=...); the loop may train with another ELBO.",
            )
        self.every = every
        self._held_out = None if held_out is None else arguments_of(held_out)
        self._reader = Reader(model, given_guide(model, guide), elbo or FreeEnergy())
        self._callback = callback
        self._rules = stop_rules(stop)
        self._shows = progress_bar
        self._bar: Bar | None = None
        self._rows: list[Row] = []
        self._first_row = 0
        self._num_data: int | None = None
        self._num_steps = 0
        self._unread: tuple[Loss, Arguments] | None = None
        self._notes: tuple[str, ...] = ()
        self._stopped: str | None = None

    @property
    def history(self) -> History:
        """F, surprise and gap of all readings, in nats; `iteration` is the number of steps before each."""
        return self._reader.history(self._rows, self._num_data)

    @property
    def stopped(self) -> str | None:
        """Why `step` asked for an end, in words; None if it did not."""
        return self._stopped

    @property
    def notes(self) -> tuple[str, ...]:
        """What could not be read, and why, at the first reading that it happened to; and components that are alike."""
        return (*self._notes, *self._reader.notes)

    @property
    def is_held_out(self) -> bool:
        """Whether readings are of arguments of their own, not of those of the steps."""
        return self._held_out is not None

    def start(self, num_steps: int | None = None, progress_bar: bool = True) -> None:
        """Begins a run of steps: forgets why the last was stopped, and shows a bar. Only for what these do.

        Args:
            num_steps: The number of steps that are to come, for the bar.
            progress_bar: False for none, whatever the monitor was told before.
        """
        self.close()
        self._stopped = None
        self._first_row = len(self._rows)
        self._bar = Bar(num_steps, progress_bar and self._shows)

    def step(self, loss: Loss, *args: Any, **kwargs: Any) -> bool:
        """Returns whether to stop: whether a rule was met, or the callback asked for it, now or before.

        Args:
            loss: What the step of training returned.
            *args: The arguments of both programs at that step.
            **kwargs: Their keyword arguments.

        Raises:
            VFEError: The loss is none.
        """
        check_loss(loss)
        self._num_steps += 1
        self._unread = loss, (args, kwargs)
        if self._bar is None:
            self._bar = Bar(None, self._shows)
        words = None
        if self._num_steps == 1 or self._num_steps % self.every == 0:
            words = self._read(asks=True)
        self._bar.advance(words)
        return self._stopped is not None

    def close(self, read: bool = True) -> None:
        """Reads F after the last step, if that was not done, and closes the bar. Leaving a `with` does it.

        Args:
            read: False to close the bar only.
        """
        if read and self._unread is not None:
            words = self._read(asks=False)
            if self._bar is not None:
                self._bar.show(words)
        self._unread = None
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(read=error is None)

    def _read(self, asks: bool) -> str:
        """Takes a reading, tells of it, and returns it in words.

        Args:
            asks: Whether somebody wants to know if it is time to stop.
        """
        assert self._unread is not None
        (loss, own), self._unread = self._unread, None
        args, kwargs = own if self._held_out is None else self._held_out
        value = as_float(loss)
        reading = self._reader.read(args, kwargs, self._num_steps, value if self._held_out is None else None)
        row = reading.row
        self._rows.append(row)
        self._num_data = row.num_data or self._num_data
        self._warn_of(reading)
        wants_stop = self._callback is not None and says_stop(
            self._callback(self._num_steps, by_tag(row, self._num_data or 1, value))
        )
        if asks and self._stopped is None:
            self._stopped = "the callback asked for it" if wants_stop else self._what_rules_say()
        return in_words(row, value)

    def _what_rules_say(self) -> str | None:
        if not self._rules:
            return None
        history = History(tuple(self._rows[self._first_row :]), self._num_data or 1)
        return next((words for words in (rule(history) for rule in self._rules) if words), None)

    def _warn_of(self, reading: Reading) -> None:
        """Says once why something is not known; the same again, in other numbers, would be noise."""
        if reading.problem is None or self._notes:
            return
        problem = reading.problem + (without_a_gap(self._rules) if isnan(reading.row.gap) else "")
        data = "the arguments of the step" if self._held_out is None else "the held-out arguments"
        self._notes = (f"After step {self._num_steps}, at {data}: {problem}",)
        warnings.warn(
            f"{self._notes[0]} Training goes on, and this is said once.", VFEWarning, stacklevel=callers_level()
        )


def stop_rules(stop: StopRule | Iterable[StopRule]) -> tuple[StopRule, ...]:
    """The rules as a tuple.

    Args:
        stop: One, or several.

    Raises:
        VFEError: Something is no rule.
    """
    rules = (stop,) if callable(stop) else tuple(stop) if isinstance(stop, Iterable) else (stop,)
    for rule in rules:
        if not callable(rule) or isinstance(rule, type):
            raise VFEError(
                f"stop= holds {rule!r}, which is no stop rule.",
                hint="Pass vfe.Settled(), vfe.GapBelow(0.01), or a function of a History that returns words or None.",
            )
    return rules
