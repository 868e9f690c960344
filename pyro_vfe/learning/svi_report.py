"""What a person sees of training: a progress bar, values by tag for a callback, and the end on paper."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Protocol

from torch import Tensor
from tqdm.auto import tqdm

from pyro_vfe.errors import VFEError
from pyro_vfe.guides.mean_field import AutoMeanField
from pyro_vfe.guides.structured import AutoStructured
from pyro_vfe.learning.em_report import row_by_tag, row_in_words
from pyro_vfe.learning.em_run import counted, parameter_table
from pyro_vfe.learning.history import History, Row
from pyro_vfe.program.layout import Program

Loss = float | Tensor | tuple[Any, ...]
"""What a step of training returns; a tuple where an ELBO has several losses."""


class Bar:
    """A progress bar of steps."""

    def __init__(self, total: int | None, shown: bool, what: str = "SVI") -> None:
        """Args:
        total: The number of steps that are to come, if it is known.
        shown: Whether there is a bar at all.
        what: What the steps are of.
        """
        self._bar: Any = tqdm(total=total, desc=what, disable=not shown)

    def advance(self, words: str | None = None) -> None:
        """Counts a step.

        Args:
            words: What to show beside the count; None for what was there.
        """
        if self._bar.disable:
            return
        if words is not None:
            self._bar.set_postfix_str(words, refresh=False)
        self._bar.update(1)

    def show(self, words: str) -> None:
        """Shows other words at the same count.

        Args:
            words: What to show beside the count.
        """
        self._bar.set_postfix_str(words)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()


def in_words(row: Row, loss: float | None) -> str:
    """What a bar says of a reading.

    Args:
        row: The reading.
        loss: The training loss, if it is one number.
    """
    return row_in_words(row) if loss is None else f"{row_in_words(row)}, loss={loss:,.4f}"


def by_tag(row: Row, num_data: int, loss: float | None) -> dict[str, float]:
    """The values of a reading by tag, as plain floats.

    Args:
        row: The reading.
        num_data: The number of data that it sums over.
        loss: The training loss, if it is one number.
    """
    values = {**row_by_tag(row), "free_energy/per_datum": row.free_energy / num_data}
    return values if loss is None else {**values, "loss": loss}


def as_float(loss: Loss) -> float | None:
    """A loss as a plain float; None for one of several parts.

    Args:
        loss: What a step returned.
    """
    if isinstance(loss, tuple):
        return None
    return float(loss.detach()) if isinstance(loss, Tensor) else float(loss)


def check_loss(loss: object) -> None:
    """Checks that what should be a loss is one.

    Args:
        loss: What a user gave.

    Raises:
        VFEError: It is not.
    """
    if isinstance(loss, Tensor):
        found = "" if loss.numel() == 1 else f"a tensor of shape {tuple(loss.shape)}"
    elif isinstance(loss, tuple) or hasattr(loss, "__float__"):
        found = ""
    else:
        found = f"a {type(loss).__name__}"
    if found:
        raise VFEError(
            f"Monitor.step was given {found} as the loss.",
            hint="Pass what the step of training returned first, then the arguments of that step: "
            "monitor.step(svi.step(u), u).",
        )


def ending(what: str, num_steps: int, stopped: str | None, history: History) -> list[str]:
    """Where training ended, and why, in lines.

    Args:
        what: The algorithm.
        num_steps: How many steps it did.
        stopped: Why there were fewer than asked for.
        history: Its readings.
    """
    line = f"{what}: {counted(num_steps, 'step')}"
    lines = [line if stopped is None else f"{line}, stopped: {stopped}"]
    if not history.rows:
        return lines
    total, each = history.rows[-1], history.per_datum.rows[-1]
    known = (total.num_data or 1) > 1
    per_datum = f" ({each.free_energy:,.4f} per datum, N={total.num_data:,})" if known else ""
    is_known = not math.isnan(total.free_energy)
    lines.append(f"F = {total.free_energy:,.4f} nats{per_datum}" if is_known else "F is not known")
    for name in ("surprise", "gap"):
        per_datum = f" ({getattr(each, name):,.4f} per datum)" if known else ""
        value = getattr(total, name)
        words = "unknown" if math.isnan(value) else f"{value:,.4f}{per_datum}"
        lines.append(f"  {'=' if name == 'surprise' else '+'} {name} {words}")
    return lines


class Ended(Protocol):
    """A finished run."""

    @property
    def history(self) -> History:
        """Its readings."""

    @property
    def params(self) -> Mapping[str, Tensor]:
        """The values of its parameters."""

    @property
    def updates(self) -> Mapping[str, str]:
        """How each was updated."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know."""


def run_as_text(run: Ended, headline: Sequence[str]) -> str:
    """A finished run on paper: where it ended, its history, its parameters, and what to know.

    Args:
        run: The run.
        headline: Lines of where it ended.
    """
    history = [str(run.history), ""] if run.history.rows else []
    lines = [*headline, "", *history, *parameter_table(run.params, run.updates)]
    return "\n".join([*lines, *(f"note: {note}" for note in run.notes)])


def run_as_html(run: Ended, headline: Sequence[str]) -> str:
    """The same as HTML.

    Args:
        run: The run.
        headline: Lines of where it ended.
    """
    lines = "".join(f"<div>{escape(line)}</div>" for line in headline)
    history = run.history._repr_html_() if run.history.rows else ""
    parameters = escape("\n".join(parameter_table(run.params, run.updates)))
    notes = "".join(f"<div>note: {escape(note)}</div>" for note in run.notes)
    return f"<div>{lines}{history}<pre>{parameters}</pre>{notes}</div>"


def notes_of_own_parameters(guide: Program) -> list[str]:
    """What a reader should know of a guide with parameters for every element of a plate, where data change.

    Args:
        guide: Any guide; only those that tell of their plates are known to have such parameters.
    """
    plates = guide.whole_plates if isinstance(guide, AutoMeanField | AutoStructured) else ()
    return [
        f"{type(guide).__name__} has its own parameters for each element of plate '{name}', the same for all data "
        "that are passed in turn. If the elements are data, Q of one is that of another: subsample the plate, use a "
        "guide that computes Q from the data, or leave the latents out of the guide."
        for name in plates
    ]


class Unmonitored:
    """In the place of a monitor: a bar with the loss, and no readings."""

    history = History(())
    """Of no readings."""
    stopped: str | None = None
    """Nothing stops this."""
    notes: tuple[str, ...] = ()
    """There is nothing to say."""

    def start(self, num_steps: int | None = None, progress_bar: bool = True) -> None:
        """Opens the bar.

        Args:
            num_steps: The number of steps that are to come.
            progress_bar: Whether to show one.
        """
        self._bar = Bar(num_steps, progress_bar)

    def step(self, loss: Loss, *args: Any, **kwargs: Any) -> bool:
        """Counts a step; never asks for an end.

        Args:
            loss: Of the step.
            *args: Of no interest.
            **kwargs: Of no interest.
        """
        value = as_float(loss)
        self._bar.advance(None if value is None else f"loss={value:,.4f}")
        return False

    def close(self, read: bool = True) -> None:
        """Closes the bar.

        Args:
            read: Of no interest.
        """
        self._bar.close()
