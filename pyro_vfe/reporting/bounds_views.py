"""Bounds on paper: what was estimated, by how much it is uncertain, and how even the weights are."""

from typing import TYPE_CHECKING

from torch import Tensor

from pyro_vfe.energy.render import Cells, number, table_html, table_lines

if TYPE_CHECKING:
    from pyro_vfe.reporting.bounds import Bounds

_ROWS = (
    ("lower bound", "lower", "estimate of a lower bound on log p(u)"),
    ("upper bound", "upper", "estimate of an upper bound on log p(u), from the dream's latents"),
    ("width", "width", "upper - lower"),
    ("free energy", "free_energy", "estimate of F"),
    ("gap, at least", "gap_at_least", "estimate of a lower bound on KL(Q || posterior): F + lower"),
)


def as_text(found: "Bounds") -> str:
    """Returns the bounds as an aligned table in nats, total and per datum, with their standard errors.

    Args:
        found: Bounds.
    """
    header, rows = _table(found)
    columns = zip(header, *(numbers for _, numbers, _ in rows), strict=True)
    widths = [2 + max(map(len, column)) for column in columns]
    return "\n".join([*table_lines(header, rows, widths), _of_the_weights(found), *found.notes])


def as_html(found: "Bounds") -> str:
    """Returns the same table as self-contained HTML.

    Args:
        found: Bounds.
    """
    return table_html(*_table(found), (_of_the_weights(found), *found.notes))


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
        numbers: tuple[str, ...] = (number(value), "" if stderr is None else f"{float(stderr):.2g}")
        rows.append((label, (*numbers, *((number(value / found.num_data),) if per_datum else ())), words))
    return header, rows


def _over_plate(values: Tensor) -> tuple[str, ...]:
    return tuple(number(float(value)) for value in (values.sum(), values.mean(), values.min(), values.max()))


def _of_the_weights(found: "Bounds") -> str:
    """How many draws there are, of what, and how many they are worth."""
    of = "each datum" if found.weight.dim() else "all data together"
    if found.plates:
        of = f"each element of {' and '.join(map(repr, found.plates))}"
    k, share = found.worst_pareto_k, found.exact_share
    known = k[~k.isnan()]
    tail = _tail(float(known.max())) if len(known) else "too few different weights for a Pareto k"
    of_many = "" if share is None else f", exactly {_least(share.flatten() * found.num_particles)}"
    worth = f"worth {_least(found.effective_sample_size.flatten())} even ones as far as they tell{of_many}"
    return f"K = {found.num_particles:,} draws, weights for {of}; {worth}; {tail}"


def _least(worth: Tensor) -> str:
    """How many even draws, in words: the least and the middle of several data."""
    least = f"{float(worth.min()):,.1f}"
    return least if len(worth) == 1 else f"{least} (min), {float(worth.median()):,.1f} (median)"


def _tail(largest: float) -> str:
    return "the largest weights are equal" if largest == -float("inf") else f"Pareto k at most {largest:.2f}"
