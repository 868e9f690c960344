"""Numbers that programs change themselves: they run ahead, as programs run more often than steps are done.

    self.step += 1        after four steps of training, twenty runs

Numbers are compared, and not put back: they may say what something else holds, which would stay.
"""

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from itertools import count
from numbers import Number
from typing import Any

import torch
from numpy import ndarray
from torch import Tensor

from pyro_vfe.errors import VFEError, VFEWarning, callers_level
from pyro_vfe.program.layout import Program
from pyro_vfe.program.reach import Place, carried, reach

_MOST_NAMED = 4
_MOST_TOLD = 256
_MOST_ENTRIES = 1000
"""Of an array that is compared; data are larger."""

_told: OrderedDict[tuple[int, object], object] = OrderedDict()
"""The numbers that have been told of, by what holds them; that is kept, so that its identity is not given to others."""


class Counters:
    """The numbers that a pair of programs may change, at three moments of the first call."""

    def __init__(self, model: Program, guide: Program) -> None:
        """Args:
        model: The generative model.
        guide: The guide.
        """
        self._programs = guide, model
        self._find()
        self._before = {_key(place): noted for place, noted in zip(self._places, self._looked, strict=True)}

    def looked(self) -> None:
        """Tells that the programs have run: what changes no more was set up by that, and what is new may change."""
        self._find()

    def _find(self) -> None:
        found = reach(*self._programs)
        self._places, self._codes = found.places, found.codes
        self._looked = self._contents()

    def told(self, runs: int) -> None:
        """Warns of numbers that each run changes, once of each.

        Args:
            runs: How many times the programs have run.
        """
        moved = [(place, words) for place, words in self._moved() if _key(place) not in _told]
        if moved:
            for place, _ in moved:
                _told[_key(place)] = place.holder
                if len(_told) > _MOST_TOLD:
                    _told.popitem(last=False)
            said = _said([words for _, words in moved], runs)
            warnings.warn(said, VFEWarning, stacklevel=callers_level())

    def explained(self, error: VFEError, runs: int) -> VFEError:
        """Returns an error, which says that programs changed numbers where they did.

        Args:
            error: What came of comparing their runs.
            runs: How many times the programs have run.
        """
        moved = self._moved()
        if moved:
            error.args = (f"{error} {_said([words for _, words in moved], runs)}",)
        return error

    def _contents(self) -> list[tuple[Any, object]]:
        with torch._C.DisableTorchFunction():
            return [_noted(place.content) for place in self._places]

    def _moved(self) -> list[tuple[Place, str]]:
        """The numbers that change with each run, and in words how."""
        moments = zip(self._places, self._looked, self._contents(), strict=True)
        moved = [(place, last) for place, first, last in moments if _differs(first, last)]
        read = carried(self._codes) if moved else set()
        return [
            (place, f"{place.words} ({_shown(self._before.get(_key(place)))} before, {_shown(last)} now)")
            for place, last in moved
            if not place.named or place.key in read
        ]


def _key(place: Place) -> tuple[int, object]:
    return id(place.holder), place.key


def _noted(content: Any) -> tuple[Any, object]:
    """What is there, and what tells that it has changed."""
    if isinstance(content, Tensor):
        return content, None if content.is_inference() else content._version
    if isinstance(content, ndarray):
        return content, content.tobytes() if content.size <= _MOST_ENTRIES else None
    return content, repr(content) if isinstance(content, (Number, count)) else None


def _differs(one: tuple[Any, object], other: tuple[Any, object]) -> bool:
    """Whether a number is another; a new tensor counts where it is like the old one and has other numbers."""
    (old, was), (new, now) = one, other
    if old is new or type(old) is not type(new) or not isinstance(new, Tensor):
        return was != now and type(old) is type(new)
    if old.requires_grad or new.requires_grad or old.shape != new.shape or old.dtype != new.dtype:
        return False
    with torch._C.DisableTorchFunction():
        return old.device == new.device and not torch.equal(old, new)


def _shown(noted: tuple[Any, object] | None) -> object:
    if noted is None:
        return "nothing"
    content, text = noted
    return f"shape {tuple(content.shape)}" if isinstance(content, (Tensor, ndarray)) else text


def _said(moved: Sequence[str], runs: int) -> str:
    """The fact, and the way out."""
    more = f" and {len(moved) - _MOST_NAMED} more" if len(moved) > _MOST_NAMED else ""
    return (
        f"The programs change what outlives a run: {', '.join(moved[:_MOST_NAMED])}{more}. In this call they ran "
        f"{runs} times: they are run to be looked at, checked and read, too, so that what they count runs ahead of the "
        "steps. Pass it as an argument instead (svi.step(u, step)), or keep it in a buffer of a module, which is put "
        "back."
    )
