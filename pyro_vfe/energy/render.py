"""A decomposition on paper: four readings of one number, in text and in a notebook."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from pyro_vfe.energy.decomposition import Decomposition

Cells = tuple[str, tuple[str, ...], str]
"""A row of a table: its label, its numbers and what they mean."""

_ROWS = (
    ("free energy", "free_energy", "F"),
    ("= surprise", "surprise", "the model's share: -log p(u)"),
    ("+ gap", "gap", "the guide's share: KL(Q || posterior)"),
    ("= energy", "energy", "E_Q[-log P(v, u)]"),
    ("- entropy", "entropy", "H[Q]"),
    ("= complexity", "complexity", "KL(Q || prior)"),
    ("- accuracy", "accuracy", "E_Q[log P(u | v)]"),
)

_GIVEN_DRAWS = {
    "surprise": "log q(w) - log p(w, u), w drawn: on average above -log p(u)",
    "gap": "what the guide loses on the rest, given w: KL(Q || posterior)",
}
"""What two of them mean where the guide draws latents w."""


def as_text(terms: "Decomposition") -> str:
    """Returns the terms as an aligned table in nats, total and per datum (or the mean per element of a plate)."""
    header, columns = _columns(terms)
    width = max(len(number) for _, numbers, _ in columns for number in numbers) + 2
    width = max(width, *(len(title) + 2 for title in header))
    return "\n".join([*table_lines(header, columns, [width] * len(header)), *_notes(terms)])


def as_html(terms: "Decomposition") -> str:
    """Returns the same table as self-contained HTML."""
    return table_html(*_columns(terms), _notes(terms))


def table_lines(header: Sequence[str], rows: Sequence[Cells], widths: Sequence[int]) -> list[str]:
    """Returns the lines of a table of numbers.

    Args:
        header: The titles of the numbers.
        rows: The rows.
        widths: The width of each column of numbers.
    """

    def line(label: str, numbers: Sequence[str]) -> str:
        return label.ljust(14) + "".join(cell.rjust(width) for cell, width in zip(numbers, widths, strict=True))

    return [line("", header), *(f"{line(label, numbers)}   {meaning}" for label, numbers, meaning in rows)]


def table_html(header: Sequence[str], rows: Sequence[Cells], notes: Iterable[str]) -> str:
    """Returns a table of numbers as self-contained HTML.

    Args:
        header: The titles of the numbers.
        rows: The rows.
        notes: What stands below it.
    """
    cell = "style='text-align:right;padding:2px 12px;font-variant-numeric:tabular-nums'"
    left = "style='text-align:left;padding:2px 12px'"
    titles = "".join(f"<th {cell}>{escape(title)}</th>" for title in header)
    body = "".join(
        f"<tr><td {left}>{escape(label)}</td>"
        + "".join(f"<td {cell}>{escape(number)}</td>" for number in numbers)
        + f"<td {left}>{escape(meaning)}</td></tr>"
        for label, numbers, meaning in rows
    )
    below = "".join(f"<div>{escape(note)}</div>" for note in notes)
    return f"<div><table><thead><tr><th></th>{titles}<th></th></tr></thead><tbody>{body}</tbody></table>{below}</div>"


def _columns(terms: "Decomposition") -> tuple[tuple[str, ...], list[Cells]]:
    if terms.plate is not None:
        size = terms.energy.numel()
        header: tuple[str, ...] = ("sum, nats", f"mean over {size}", "largest")
        rows = [(label, _over_plate(getattr(terms, name)), meaning) for label, name, meaning in _meanings(terms)]
        return header, rows
    per_datum = terms.num_data > 1
    header = ("nats", f"per datum (N={terms.num_data:,})") if per_datum else ("nats",)
    rows = []
    for label, name, meaning in _meanings(terms):
        total = float(getattr(terms, name))
        numbers = (number(total), number(total / terms.num_data)) if per_datum else (number(total),)
        rows.append((label, numbers, meaning))
    return header, rows


def _meanings(terms: "Decomposition") -> tuple[tuple[str, str, str], ...]:
    if not terms.runs or not terms.runs[0].is_sampled:
        return _ROWS
    return tuple((label, name, _GIVEN_DRAWS.get(name, meaning)) for label, name, meaning in _ROWS)


def _over_plate(values: Tensor) -> tuple[str, ...]:
    return number(float(values.sum())), number(float(values.mean())), number(float(values.max()))


def number(value: float) -> str:
    """Returns a number with four decimals; a small one keeps its magnitude, and rounding below zero shows no sign.

    Args:
        value: In nats, say; NaN for what is not known, which is a dash.
    """
    if math.isnan(value):
        return "-"
    if -1e-9 < value <= 0:  # the zero too, which may be a negative one
        value = 0.0
    if value != 0 and abs(value) < 1e-4:
        return f"{value:.1e}"
    return f"{value:,.4f}"


def _notes(terms: "Decomposition") -> list[str]:
    notes = []
    if not terms.exact:
        spread = (
            "" if terms.stderr is None or terms.stderr.dim() else f"; standard error of F {float(terms.stderr):.2g}"
        )
        notes.append(f"not exact, because of {' and '.join(terms.random) or 'what is drawn'}{spread}")
    if terms.runs and terms.runs[0].supports and not terms.runs[0].guided:
        notes.append(
            "all discrete latents are summed out inside the model: there is nothing for the guide to lose on them"
        )
    if terms.unsplit is not None:
        notes.append(f"surprise and gap, for which the model sums its latents, are not known: {terms.unsplit}")
    notes += list(terms.impossible)
    return notes
