"""What a person sees of EM while it runs: a progress bar, and calls of a function of their own."""

from collections.abc import Callable
from math import isnan
from types import TracebackType
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from pyro_vfe.learning.history import EPOCH, JUMP, Row

Callback = Callable[[int, dict[str, Any]], Any]
"""Called with the number of phases before this one and with where it led; what returns True stops EM. Other values do
not: a lambda that lists what it logged shall not stop anything."""


class Report:
    """Tells of every phase of every start."""

    def __init__(self, max_iter: int, n_init: int, progress_bar: bool, callback: Callback | None) -> None:
        """Args:
        max_iter: The most iterations of one start.
        n_init: The number of starts.
        progress_bar: Whether to show one.
        callback: The user's function.
        """
        self.max_iter = max_iter
        self.n_init = n_init
        self.callback = callback
        self.bar: Any = tqdm(total=max_iter, desc="EM", disable=not progress_bar)

    def of(self, start: int) -> Callable[[Row], bool]:
        """Returns what is to be told of the rows of a start, and says whether the user wants to stop.

        Args:
            start: Its number.
        """
        self.bar.reset(total=self.max_iter)
        if self.n_init > 1:
            self.bar.set_description(f"EM {start + 1}/{self.n_init}")
        count = 0

        def tell(row: Row) -> bool:
            nonlocal count
            self._show(row)
            if self.callback is None:
                return False
            wants_stop: object = self.callback(count, _as_dict(row, start))
            count += 1
            return says_stop(wants_stop)

        return tell

    def _show(self, row: Row) -> None:
        if row.phase not in ("E", JUMP, EPOCH):
            return
        self.bar.set_postfix_str(row_in_words(row))
        self.bar.update(row.iteration - self.bar.n)

    def __enter__(self) -> "Report":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()


def says_stop(returned: object) -> bool:
    """Whether what a callback returned asks for an end.

    Args:
        returned: True does, a comparison of NumPy's too; anything else does not.
    """
    return isinstance(returned, (bool, np.bool_)) and bool(returned)


def row_in_words(row: Row) -> str:
    """What a bar says of a row.

    Args:
        row: Of a history.
    """
    surprise, gap = (
        "-" if isnan(value) else f"{value:{style}}" for value, style in ((row.surprise, ",.4f"), (row.gap, ".3g"))
    )
    return f"F={row.free_energy:,.4f}, surprise={surprise}, gap={gap}"


def row_by_tag(row: Row) -> dict[str, float]:
    """The nats of a row by the tags that callbacks get.

    Args:
        row: Of a history.
    """
    return {
        "free_energy/total": row.free_energy,
        "free_energy/surprise": row.surprise,
        "free_energy/gap": row.gap,
    }


def _as_dict(row: Row, start: int) -> dict[str, Any]:
    return {**row_by_tag(row), "phase": row.phase, "iteration": row.iteration, "start": start}
