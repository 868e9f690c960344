"""What a person sees of SVI while it runs: a progress bar, and values by tag for a callback."""

from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from pyro_vfe.errors import VFEError
from pyro_vfe.guides.mean_field import AutoMeanField
from pyro_vfe.guides.structured import AutoStructured
from pyro_vfe.learning.em_report import row_by_tag, row_in_words
from pyro_vfe.learning.history import History, Row
from pyro_vfe.program.layout import Program

Loss = float | Tensor | tuple[Any, ...]
"""What a step of training returns; a tuple where an ELBO has several losses."""


class Bar:
    """A progress bar of steps."""

    def __init__(self, total: int | None, shown: bool) -> None:
        """Args:
        total: The number of steps that are to come, if it is known.
        shown: Whether there is a bar at all.
        """
        self._bar: Any = tqdm(total=total, desc="SVI", disable=not shown)

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
