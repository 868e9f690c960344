"""A decomposition on paper: four readings of one number, in text and in a notebook."""

from html import escape
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from pyro_vfe.energy.decomposition import Decomposition

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
    lines = [" " * 14 + "".join(title.rjust(width) for title in header)]
    lines += [
        label.ljust(14) + "".join(number.rjust(width) for number in numbers) + "   " + meaning
        for label, numbers, meaning in columns
    ]
    return "\n".join([*lines, *_notes(terms)])


def as_html(terms: "Decomposition") -> str:
    """Returns the same table as self-contained HTML, with bars for surprise and gap."""
    header, columns = _columns(terms)
    cell = "style='text-align:right;padding:2px 12px;font-variant-numeric:tabular-nums'"
    left = "style='text-align:left;padding:2px 12px'"
    titles = "".join(f"<th {cell}>{escape(title)}</th>" for title in header)
    rows = "".join(
        f"<tr><td {left}>{escape(label)}</td>"
        + "".join(f"<td {cell}>{escape(number)}</td>" for number in numbers)
        + f"<td {left}>{escape(meaning)}</td></tr>"
        for label, numbers, meaning in columns
    )
    notes = "".join(f"<div>{escape(note)}</div>" for note in _notes(terms))
    return f"<div><table><thead><tr><th></th>{titles}<th></th></tr></thead><tbody>{rows}</tbody></table>{notes}</div>"


def _columns(terms: "Decomposition") -> tuple[tuple[str, ...], list[tuple[str, tuple[str, ...], str]]]:
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
        numbers = (_number(total), _number(total / terms.num_data)) if per_datum else (_number(total),)
        rows.append((label, numbers, meaning))
    return header, rows


def _meanings(terms: "Decomposition") -> tuple[tuple[str, str, str], ...]:
    if not terms.runs or not terms.runs[0].is_sampled:
        return _ROWS
    return tuple((label, name, _GIVEN_DRAWS.get(name, meaning)) for label, name, meaning in _ROWS)


def _over_plate(values: Tensor) -> tuple[str, ...]:
    return _number(float(values.sum())), _number(float(values.mean())), _number(float(values.max()))


def _number(value: float) -> str:
    """Four decimals; a small positive number keeps its magnitude, and rounding below zero is not shown as a sign."""
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
        notes.append(f"not exact: part of it is sampled{spread}")
    if terms.runs and terms.runs[0].supports and not terms.runs[0].guided:
        notes.append(
            "all discrete latents are summed out inside the model: there is nothing for the guide to lose on them"
        )
    notes += list(terms.impossible)
    return notes
