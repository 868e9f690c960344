r"""How a free energy fell, phase by phase.

    d F  =  d surprise  +  d gap

An E-phase moves the gap alone, an M-phase both; a jump of SQUAREM, and a step of SVI, move both at once. A wake phase
moves both as an M-phase does, a sleep phase the gap alone, and that in either direction.

References:
    Neal and Hinton (1998), A view of the EM algorithm that justifies incremental, sparse, and other variants.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import xarray

START = "start"
"""The phase of a row before any phase."""

JUMP = "jump"
"""The phase of a row after a jump of the parameters (SQUAREM) and the E-phase there."""

EPOCH = "epoch"
"""The phase of a row that sums over the batches of an epoch, each at the parameters of its visit."""

FINAL = "final"
"""The phase of a row that sums over all batches at the last parameters."""

BATCH = "batch"
"""The phase of a row of one batch."""

STEP = "step"
"""The phase of a row that a `Monitor` made of a moment in SVI."""

WAKE = "wake"
"""The phase of a row after a wake phase of wake-sleep."""

SLEEP = "sleep"
"""The phase of a row after a sleep phase."""

_SHOWN = 8
"""How many rows a printed history has at its beginning and at its end."""

_CHANGES = ("d F", "= d surprise", "+ d gap")

_UNKNOWN = "\N{EM DASH}"

_ROUNDED = "~0"
"""A change that is none: rounding explains it."""

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """Where one phase ended."""

    iteration: int
    """The number of M-phases (of epochs, of steps of SVI or of wake-sleep) so far, this one included."""
    phase: str
    """'start', 'E', 'M' or 'jump'; of a run on batches 'epoch' or 'final'; of SVI 'step'; of wake-sleep 'wake' or
    'sleep'."""
    free_energy: float
    """F(Q, G) in nats, summed over the data."""
    surprise: float
    """-log p(u | G) in nats; NaN where it cannot be known."""
    gap: float
    """KL(Q || posterior) in nats; NaN where it cannot be known."""
    stderr: float = 0.0
    """The standard error of F over particles, in nats; 0 where F is exact, NaN where it is of one particle."""
    num_data: int | None = None
    """The number of data that this row sums over, where rows differ in it; otherwise the history's."""


@dataclass(frozen=True)
class History:
    """Free energy, surprise and gap after every phase, in nats."""

    rows: tuple[Row, ...]
    """One per phase, in order; the first is the start."""
    num_data: int = 1
    """The number of data that the sums are over."""
    rounding: float = 0.0
    """A change of F, in nats, that rounding explains; printed as ~0. 0 where it is not known."""
    random: tuple[str, ...] = ()
    """What makes readings differ beside what was learned, in words: draws, subsamples, mini-batches."""
    alike: tuple[str, ...] = ()
    """Latents whose values all readings found equally probable: no gradient tells their components apart."""

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def of(self, *phases: str) -> "History":
        """Returns the rows of some phases: `history.of("E", "jump").free_energy` is F after each iteration.

        Args:
            *phases: 'start', 'E', 'M', 'jump'; of a run on batches 'epoch' or 'final'; of SVI 'step'; of wake-sleep
                'wake' or 'sleep'.
        """
        return replace(self, rows=tuple(row for row in self.rows if row.phase in phases))

    @property
    def per_datum(self) -> "History":
        """The same, every row divided by the number of its data."""
        rows = tuple(_per_datum(row, row.num_data or self.num_data) for row in self.rows)
        return replace(self, rows=rows, num_data=1, rounding=self.rounding / self.num_data)

    @property
    def iteration(self) -> NDArray[np.int64]:
        """The iteration of each row."""
        return np.array([row.iteration for row in self.rows], dtype=np.int64)

    @property
    def phase(self) -> tuple[str, ...]:
        """The phase of each row."""
        return tuple(row.phase for row in self.rows)

    @property
    def free_energy(self) -> Numbers:
        """F after each phase, in nats."""
        return np.array([row.free_energy for row in self.rows], dtype=np.float64)

    @property
    def surprise(self) -> Numbers:
        """-log p(u | G) after each phase, in nats."""
        return np.array([row.surprise for row in self.rows], dtype=np.float64)

    @property
    def gap(self) -> Numbers:
        """KL(Q || posterior) after each phase, in nats."""
        return np.array([row.gap for row in self.rows], dtype=np.float64)

    @property
    def stderr(self) -> Numbers:
        """The standard error of F over particles, in nats; 0 where F is exact."""
        return np.array([row.stderr for row in self.rows], dtype=np.float64)

    @property
    def d_free_energy(self) -> Numbers:
        """By how much each row differs in F from the one before; NaN for the first."""
        return _differences(self.free_energy)

    @property
    def d_surprise(self) -> Numbers:
        """The part of `d_free_energy` that is surprise."""
        return _differences(self.surprise)

    @property
    def d_gap(self) -> Numbers:
        """The part of `d_free_energy` that is gap."""
        return _differences(self.gap)

    def to_xarray(self) -> "xarray.Dataset":
        """Returns an `xarray.Dataset` with one entry per row along `step`, and `iteration` and `phase` beside it.

        `free_energy_stderr` is there where F is sampled, the coordinate `num_data` where rows have their own.
        """
        import xarray

        names = ("free_energy", "surprise", "gap", "d_free_energy", "d_surprise", "d_gap")
        coords = {
            "step": np.arange(len(self)),
            "iteration": ("step", self.iteration),
            "phase": ("step", np.array(self.phase, dtype=str)),
        }
        if any(row.num_data is not None for row in self.rows):
            coords["num_data"] = ("step", self._sizes)
        values = {name: ("step", getattr(self, name), {"units": "nats"}) for name in names}
        if np.any(self.stderr != 0):
            values["free_energy_stderr"] = ("step", self.stderr, {"units": "nats"})
        return xarray.Dataset(values, coords=coords, attrs={"units": "nats", "num_data": self.num_data})

    def __str__(self) -> str:
        """An aligned table; the middle of a long one is left out, and what is not known has a dash."""
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
        if self._left_out:
            lines.insert(_SHOWN + 1, f"... {self._left_out} more ...".rjust(len(lines[0])))
        return "\n".join(line.rstrip() for line in [*lines, *self._notes(cells)])

    def _repr_html_(self) -> str:
        style = "style='text-align:right;padding:2px 12px;font-variant-numeric:tabular-nums'"
        header, *cells = self._cells()
        rows = [_html_row("th", style, header), *(_html_row("td", style, row) for row in cells)]
        if self._left_out:
            rows.insert(_SHOWN + 1, f"<tr><td {style} colspan={len(header)}>... {self._left_out} more ...</td></tr>")
        notes = "".join(f"<div>{escape(note)}</div>" for note in self._notes(self._cells()))
        return f"<table>{''.join(rows)}</table>{notes}"

    def _notes(self, cells: Sequence[Sequence[str]]) -> list[str]:
        is_hidden = any(_ROUNDED in row for row in cells)
        return [f"{_ROUNDED}: up to {self.rounding:.1g} nats are rounding"] if is_hidden else []

    def _change(self, value: float) -> str:
        """A signed number of four decimals; a small one keeps its magnitude, and the first row has none."""
        if np.isnan(value):
            return ""
        if 0 < abs(value) <= self.rounding:
            return _ROUNDED
        return f"{value:+.1e}" if value != 0 and abs(value) < 1e-3 else f"{value + 0.0:+,.4f}"

    @property
    def _left_out(self) -> int:
        return max(0, len(self) - 2 * _SHOWN)

    @property
    def _sizes(self) -> NDArray[np.int64]:
        """The number of data of each row."""
        return np.array([row.num_data or self.num_data for row in self.rows], dtype=np.int64)

    def _cells(self) -> list[list[str]]:
        """The printed columns' titles, and the printed rows without those left out."""
        columns = [[title, *column] for title, column in self._columns()]
        return [list(row) for row in zip(*columns, strict=True)]

    def _columns(self) -> list[tuple[str, list[str]]]:
        """Titles and cells: steps have no phases, errors stand where there are any, sizes where they differ."""
        kept = [*range(len(self))]
        if self._left_out:
            kept = kept[:_SHOWN] + kept[-_SHOWN:]
        rows = [self.rows[i] for i in kept]
        steps = bool(self.rows) and set(self.phase) == {STEP}
        of_steps = steps or not {WAKE, SLEEP}.isdisjoint(self.phase)
        columns = [("step" if of_steps else "iteration", [str(row.iteration) for row in rows])]
        if not steps:
            columns.append(("phase", [row.phase for row in rows]))
        columns.append(("F", [_level(row.free_energy) for row in rows]))
        if np.any(np.nan_to_num(self.stderr) != 0):
            columns.append(("\N{PLUS-MINUS SIGN}", [_level(row.stderr) for row in rows]))
        columns += [("surprise", [_level(row.surprise) for row in rows]), ("gap", [_level(row.gap) for row in rows])]
        if len(set(self._sizes)) > 1:
            columns.append(("N", [f"{row.num_data or self.num_data:,}" for row in rows]))
        changes = (self.d_free_energy, self.d_surprise, self.d_gap)
        # Sums over different numbers of data have no difference that means anything.
        comparable = np.diff(self._sizes, prepend=self._sizes[:1]) == 0
        return columns + [
            (title, [self._change(float(change[i])) if comparable[i] else "" for i in kept])
            for title, change in zip(_CHANGES, changes, strict=True)
        ]


def _per_datum(row: Row, num_data: int) -> Row:
    shares = {name: getattr(row, name) / num_data for name in ("free_energy", "surprise", "gap", "stderr")}
    return replace(row, num_data=1, **shares)


def _differences(values: Numbers) -> Numbers:
    with np.errstate(invalid="ignore"):  # From infinite to infinite is no number.
        return np.diff(values, prepend=np.nan)


def _level(value: float) -> str:
    # Rounded first, and added to zero, so that what rounds to zero has no sign.
    return _UNKNOWN if np.isnan(value) else f"{round(value, 4) + 0.0:,.4f}"


def _html_row(tag: str, style: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag} {style}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
