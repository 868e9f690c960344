r"""What looks on while wake-sleep runs: F, surprise and gap after its phases, a progress bar, a callback, stop rules.

F after a wake phase, F after the sleep phase of the same step        their difference is what the sleep phase did
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from math import isnan
from typing import Any, SupportsIndex

import pyro

from pyro_vfe.energy.free_energy import FreeEnergy
from pyro_vfe.errors import VFEError, VFEWarning, callers_level
from pyro_vfe.learning.batches import arguments_of, out_of_step
from pyro_vfe.learning.em_report import says_stop
from pyro_vfe.learning.history import SLEEP, START, WAKE, History, Row
from pyro_vfe.learning.machine import Machine
from pyro_vfe.learning.monitor import stop_rules
from pyro_vfe.learning.stop_rules import StopRule, without_a_gap
from pyro_vfe.learning.svi_reading import Reader, Reading
from pyro_vfe.learning.svi_report import Bar, by_tag, in_words
from pyro_vfe.program.layout import Program

WakeSleepCallback = Callable[[int, dict[str, Any]], Any]
"""Called with the number of steps so far and values by tag; what returns True asks for an end, other values do not."""

_READINGS = 50
"""About how many steps of a long run are read by default."""


class Watch:
    """Takes F apart after both phases of every so many steps, and tells of it."""

    def __init__(
        self,
        machine: Machine,
        num_steps: int,
        batches: object,
        every: int | None,
        callback: WakeSleepCallback | None,
        stop: StopRule | Iterable[StopRule],
        held_out: Any,
        *,
        sleeps: bool,
    ) -> None:
        """Args:
        machine: The programs.
        num_steps: How many steps there will be.
        batches: What the steps iterate over, if they do.
        every: The number of steps from one reading to the next, or None.
        callback: The user's function.
        stop: The user's rules.
        held_out: The arguments to read F at, if they are not those of the steps.
        sleeps: Whether steps have sleep phases.

        Raises:
            VFEError: An option is not what it should be.
        """
        if every is not None and (isinstance(every, bool) or not isinstance(every, SupportsIndex) or every < 1):
            raise VFEError(
                f"WakeSleep.run was given every={every!r}.", hint="Pass a whole number of steps of at least 1."
            )
        self._machine = machine
        self._every = every or out_of_step(max(1, -(-num_steps // _READINGS)), batches)
        self._num_steps = num_steps
        self._callback = callback
        self._rules = stop_rules(stop)
        self._held_out = None if held_out is None else arguments_of(held_out)
        self._last_phase = SLEEP if sleeps else WAKE
        self._reader = Reader(
            _Enumerated(machine.given_model),
            _Enumerated(machine.given_guide),
            FreeEnergy(max_bytes=machine.max_bytes, on_cost=machine.on_cost),
        )
        self._unread: tuple[str, int, tuple[Any, ...], Any, float] | None = None
        self._rows: list[Row] = []
        self._num_data: int | None = None
        self.stopped: str | None = None
        """Why the run should end, in words."""
        self._problems: tuple[str, ...] = ()
        self._random = ("the dreams of sleep phases",) if sleeps else ()

    @property
    def history(self) -> History:
        """F, surprise and gap of all readings, in nats."""
        return self._reader.history(self._rows, self._num_data, *self._random)

    @property
    def notes(self) -> tuple[str, ...]:
        """What could not be read, and why, at the first reading that it happened to; and components that are alike."""
        return (*self._problems, *self._reader.notes)

    @property
    def is_held_out(self) -> bool:
        """Whether readings are of arguments of their own."""
        return self._held_out is not None

    def start(self, progress_bar: bool) -> None:
        """Shows the bar.

        Args:
            progress_bar: Whether to.
        """
        self._bar = Bar(self._num_steps, progress_bar, "wake-sleep")
        self._words: str | None = None

    def begin(self, args: tuple[Any, ...], kwargs: Any) -> None:
        """Reads F before the first step.

        Args:
            args: Arguments of both programs.
            kwargs: Keyword arguments of both.
        """
        self._read(START, 0, args, kwargs, None)

    def after(self, phase: str, number: int, args: tuple[Any, ...], kwargs: Any, loss: float) -> None:
        """Reads F after a phase, if this step is to be read.

        Args:
            phase: Which one.
            number: Of the step.
            args: Arguments of both programs.
            kwargs: Keyword arguments of both.
            loss: Of the phase.
        """
        self._unread = phase, number, args, kwargs, loss
        if number == 1 or number % self._every == 0 or number == self._num_steps:
            self.read_last()

    def read_last(self) -> None:
        """Reads F after the last phase, if that was not done."""
        if self._unread is not None:
            last, self._unread = self._unread, None
            self._read(*last)

    def advance(self, wake: float, sleep: float) -> None:
        """Counts a step on the bar.

        Args:
            wake: The loss of its wake phase.
            sleep: The loss of its sleep phase.
        """
        self._bar.advance(self._words or (None if self._rows else f"wake={wake:,.4f}, sleep={sleep:,.4f}"))
        self._words = None

    def close(self) -> None:
        """Closes the bar."""
        self._bar.close()

    def _read(self, phase: str, number: int, args: tuple[Any, ...], kwargs: Any, loss: float | None) -> None:
        own = (args, kwargs) if self._held_out is None else self._held_out
        reading = self._reader.read(own[0], own[1], number, None)
        row = replace(reading.row, phase=phase)
        self._rows.append(row)
        self._num_data = row.num_data or self._num_data
        self._warn_of(reading, phase, number)
        self._words = in_words(row, loss)
        if self._callback is not None:
            values = {**by_tag(row, self._num_data or 1, loss), "phase": phase}
            if says_stop(self._callback(number, values)) and self.stopped is None:
                self.stopped = "the callback asked for it"
        if phase == self._last_phase and self.stopped is None and self._rules:
            history = self.history.of(phase)
            self.stopped = next((words for words in (rule(history) for rule in self._rules) if words), None)

    def _warn_of(self, reading: Reading, phase: str, number: int) -> None:
        """Says once why something is not known."""
        if reading.problem is None or self._problems:
            return
        problem = reading.problem + (without_a_gap(self._rules) if isnan(reading.row.gap) else "")
        data = "the arguments of the step" if self._held_out is None else "the held-out arguments"
        moment = "Before the first step" if phase == START else f"After the {phase} phase of step {number}"
        self._problems = (f"{moment}, at {data}: {problem}",)
        warnings.warn(
            f"{self._problems[0]} Training goes on, and this is said once.", VFEWarning, stacklevel=callers_level()
        )


class _Enumerated:
    """A program whose latents are all to be enumerated, also those set to be sampled."""

    def __init__(self, program: Program) -> None:
        self.program = self.__wrapped__ = program  # whose signature it has

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with pyro.poutine.infer_config(config_fn=_enumerate_too):
            return self.program(*args, **kwargs)


def _enumerate_too(msg: Any) -> Any:
    return {"enumerate": "parallel"} if msg["infer"].get("enumerate", "") is None else {}
