"""Bounds on paper: what was estimated, by how much it is uncertain, and how even the weights are."""

import math
from html import escape
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from pyro_vfe.reporting.bounds import Bounds

_ROWS = (
    ("log p(u) >=", "lower", "estimate of a lower bound: E of the mean weight's log"),
    ("log p(u) <=", "upper", "estimate of an upper bound, from the dream's own latents"),
    ("apart", "width", "upper - lower"),
    ("free energy", "free_energy", "estimate of F, from the same draws"),
    ("gap >=", "gap_at_least", "estimate of a lower bound: F + lower"),
)

Cells = tuple[str, tuple[str, ...], str]
"""A row: its label, its numbers and what they mean."""


def as_text(found: "Bounds") -> str:
    """Returns the bounds as an aligned table in nats, total and per datum, with their standard errors.

    Args:
        found: Bounds.
    """
    header, rows = _table(found)
    width = 2 + max(len(number) for _, numbers, _ in rows for number in (*numbers, *header))
    lines = [" " * 14 + "".join(title.rjust(width) for title in header)]
    lines += [label.ljust(14) + "".join(n.rjust(width) for n in numbers) + "   " + words for label, numbers, words in rows]
    return "\n".join([*lines, _of_the_weights(found), *found.notes])


def as_html(found: "Bounds") -> str:
    """Returns the same table as self-contained HTML.

    Args:
        found: Bounds.
    """
    header, rows = _table(found)
    cell = "style='text-align:right;padding:2px 12px;font-variant-numeric:tabular-nums'"
    left = "style='text-align:left;padding:2px 12px'"
    titles = "".join(f"<th {cell}>{escape(title)}</th>" for title in header)
    body = "".join(
        f"<tr><td {left}>{escape(label)}</td>"
        + "".join(f"<td {cell}>{escape(number)}</td>" for number in numbers)
        + f"<td {left}>{escape(words)}</td></tr>"
        for label, numbers, words in rows
    )
    notes = "".join(f"<div>{escape(note)}</div>" for note in (_of_the_weights(found), *found.notes))
    return f"<div><table><thead><tr><th></th>{titles}<th></th></tr></thead><tbody>{body}</tbody></table>{notes}</div>"


def _table(found: "Bounds") -> tuple[tuple[str, ...], list[Cells]]:
    named = [(label, name, words) for label, name, words in _ROWS if getattr(found, name) is not None]
    if found.plate is not None:
        header: tuple[str, ...] = ("sum, nats", f"mean over {found.lower.numel()}", "smallest", "largest")
        return header, [(label, _over_plate(getattr(found, name)), words) for label, name, words in named]
    per_datum = found.num_data > 1
    header = ("nats", "stderr", *((f"per datum (N={found.num_data:,})",) if per_datum else ()))
    rows = []
    for label, name, words in named:
        value, stderr = float(getattr(found, name)), getattr(found, f"{name}_stderr")
        numbers: tuple[str, ...] = (_number(value), "" if stderr is None else f"{float(stderr):.2g}")
        rows.append((label, (*numbers, *((_number(value / found.num_data),) if per_datum else ())), words))
    return header, rows


def _over_plate(values: Tensor) -> tuple[str, ...]:
    return tuple(_number(float(value)) for value in (values.sum(), values.mean(), values.min(), values.max()))


def _number(value: float) -> str:
    """Four decimals; a small number keeps its magnitude."""
    return f"{value:.1e}" if value != 0 and abs(value) < 1e-4 else f"{value:,.4f}"


def _of_the_weights(found: "Bounds") -> str:
    """How many draws there are, of what, and how many they are worth."""
    of = f"each element of {' and '.join(map(repr, found.plates))}" if found.plates else "all data together"
    worth, k = found.effective_sample_size.flatten(), found.pareto_k.flatten()
    known = k[~k.isnan()]
    tail = f"Pareto k {_extent(known, '.2f', 'max')}" if len(known) else "too few weights for a Pareto k"
    return (
        f"K = {found.num_particles:,} draws, weights for {of}; worth {_extent(worth, ',.1f', 'min')} even ones; {tail}"
    )


def _extent(values: Tensor, form: str, end: str) -> str:
    if len(values) == 1:
        return format(float(values[0]), form)
    worst = float(values.min() if end == "min" else values.max())
    return f"{format(worst, form)} ({end}), {format(float(values.median()), form)} (median)"
