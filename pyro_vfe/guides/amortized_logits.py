r"""From a network's output to the logits of each latent: checked, of the rows that are present, read at the parents.

output[..., n, :]  =  [ logits of site 1 | logits of site 2 | ... ]
logits of a site   =  a row for each joint value of its parents; without parents, one row
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vfe.engine.shapes import broadcast_shapes
from pyro_vfe.errors import NotFiniteError, ShapeError, StructureError, VFEError
from pyro_vfe.guides.amortized_latents import Latent, chain_of
from pyro_vfe.program.log_prob import looked_up
from pyro_vfe.program.provenance import untracked

_BATCH_DIMS = (
    "Values of latents come in with further dims at the left: to a network that reads them all dims but the last are "
    "batch dims."
)


@dataclass(frozen=True, eq=False)
class Share:
    """The part of a network's output that is one latent's."""

    latent: Latent
    parents: tuple[Latent, ...]
    """The latents whose joint value chooses a row of the site's table."""
    chained: bool = False
    """Whether the state before chooses as well."""

    @property
    def num_rows(self) -> int:
        """The number of joint values of the parents, the state before included."""
        return prod(parent.num_values for parent in self.parents) * (self.latent.size if self.chained else 1)

    @property
    def width(self) -> int:
        """How many numbers per plate element the site takes."""
        return self.num_rows * self.latent.num_logits

    def distribution(self, logits: Tensor, values: Mapping[str, Tensor]) -> Any:
        """Returns the site's distribution given its parents' values.

        Args:
            logits: Shape `(*batch, width)`.
            values: The values of the latents sampled so far.

        Raises:
            NotFiniteError: The logits hold NaN or infinity.
        """
        if self.parents:
            logits = _at(logits, self.parents, values)
        try:
            return chain_of(self.latent, logits) if self.chained else self.latent.distribution(logits)
        except ValueError as error:
            raise _not_a_number(self.latent.name, logits) or error from error

    def __str__(self) -> str:
        given = " and ".join([*(f"'{p.name}'" for p in self.parents), *(["the state before"] if self.chained else [])])
        rows = f" = {self.num_rows} x {self.latent.num_logits}, given {given}" if given else ""
        return f"'{self.latent.name}' {self.width} ({self.latent}{rows})"


def _at(logits: Tensor, parents: Sequence[Latent], values: Mapping[str, Tensor]) -> Tensor:
    """The rows of a table `(*batch, rows * numbers)` at the parents' joint value, `(*batch, numbers)`."""
    row: Tensor | int = 0
    for parent in parents:
        row = row * parent.num_values + parent.index(values[parent.name])
    assert isinstance(row, Tensor)
    num_rows = prod(parent.num_values for parent in parents)
    by_row = logits.reshape(*logits.shape[:-1], num_rows, -1).movedim(-2, -1)
    return looked_up(by_row, row.unsqueeze(-1))


def _not_a_number(name: str, logits: Tensor) -> NotFiniteError | None:
    with untracked():
        lost = int((logits.isnan() | logits.isposinf()).sum())
    if not lost:
        return None
    return NotFiniteError(
        f"The network returned NaN or infinity for {lost} of {logits.numel()} logits of latent site '{name}'.",
        hint="Look for NaN in its inputs (missing data?) and in its weights (a learning rate that is too large?).",
    )


@dataclass(frozen=True)
class Rows:
    """One plate around the latents of a network, as it is at this call."""

    name: str
    dim: int
    present: int
    """The number of elements that are present."""
    full: int
    """The number of all elements."""
    indices: Tensor | None
    """Which ones are present; None for all."""

    def taken(self, tensor: Tensor) -> Tensor:
        """Returns the present rows of a tensor `(*plates, numbers)` that has all of the plate's."""
        at = self.dim - 1
        if self.indices is None or self.present == self.full or tensor.dim() < -at or tensor.shape[at] != self.full:
            return tensor
        return tensor.index_select(at, self.indices.to(tensor.device))


def called(network: nn.Module, inputs: Tensor, whose: str) -> Tensor:
    """Returns a network's output.

    Args:
        network: The network.
        inputs: What it reads.
        whose: The network, in words.

    Raises:
        ShapeError: The network cannot read its input, or returns no tensor.
    """
    try:
        output = network(inputs)
    except (VFEError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ShapeError(
            f"The network of {whose} cannot read its input, {_described(inputs)}: {said.rstrip('.')}.",
            hint="Give its first layer as many inputs as the last dim of that shape has. Let inputs be a function of "
            "the model's arguments where the network reads something else, such as "
            f"lambda u: u.unsqueeze(-1).float(). {_BATCH_DIMS}",
        ) from error
    if isinstance(output, Tensor) and output.dim():
        return output
    what = "a number" if isinstance(output, Tensor) else f"a {type(output).__name__}"
    raise ShapeError(
        f"The network of {whose} returned {what} where a tensor of logits is wanted.",
        hint="Return one tensor whose last dim holds the logits.",
    )


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def divided(
    output: Tensor, shares: Sequence[Share], rows: Sequence[Rows], carried: Sequence[torch.Size], whose: str
) -> dict[str, Tensor]:
    """Returns each latent's logits, of the rows that are present, by site.

    Args:
        output: What the network returned, `(*batch, numbers)`.
        shares: The latents in the order in which they share the last dim.
        rows: The plates around them.
        carried: Batch shapes of the values of latents that the network read.
        whose: The network, in words.

    Raises:
        ShapeError: The output has another shape than is wanted.
    """
    widths = [share.width for share in shares]
    if output.shape[-1] != sum(widths) or not _fits(output.shape[:-1], rows, carried):
        raise _wrong_shape(output.shape, shares, rows, carried, whose)
    for plate in rows:
        output = plate.taken(output)
    parts = output.split(widths, -1) if len(widths) > 1 else (output,)
    return {share.latent.name: part for share, part in zip(shares, parts, strict=True)}


def _fits(batch: torch.Size, rows: Sequence[Rows], carried: Sequence[torch.Size]) -> bool:
    """Whether each batch dim is of size 1, of a plate (whole or as subsampled), or of a value that was read."""
    allowed: dict[int, set[int]] = {}
    for plate in rows:
        allowed[plate.dim] = {plate.present, plate.full}
    for shape in carried:
        for dim, size in enumerate(shape, -len(shape)):
            allowed.setdefault(dim, set()).add(size)
    return all(size == 1 or size in allowed.get(dim, ()) for dim, size in enumerate(batch, -len(batch)))


def _wrong_shape(
    got: torch.Size, shares: Sequence[Share], rows: Sequence[Rows], carried: Sequence[torch.Size], whose: str
) -> ShapeError:
    width = sum(share.width for share in shares)
    by_dim = {plate.dim: plate for plate in rows}
    plates = [by_dim[dim].present if dim in by_dim else 1 for dim in range(min(by_dim, default=0), 0)]
    wanted = (*broadcast_shapes(plates, *carried), width)
    around = ", ".join(
        f"plate '{plate.name}' ({plate.present}{f' of {plate.full}' if plate.full != plate.present else ''})"
        for plate in sorted(rows, key=lambda plate: plate.dim)
    )
    logits = f"{width} logits: {', '.join(map(str, shares))}"
    if got[-1] != width:
        hint = f"Give its last layer {width} outputs."
    else:
        hint = (
            "Its dims but the last are the plates', counted from the right, of the size of the plate, of its subsample "
            "or 1; what the network reads by default is the model's first argument as it is (see inputs=). "
            f"{_BATCH_DIMS}"
        )
    return ShapeError(
        f"The network of {whose} returned shape {tuple(got)} where {wanted} is wanted: {around or 'no plate'}, then "
        f"{logits}.",
        hint=hint,
    )


def check_plates(child: Latent, parent: Latent) -> None:
    """Checks that a latent may depend on another.

    Args:
        child: The one that depends.
        parent: The one that it depends on.

    Raises:
        StructureError: The parent lies in a plate that the child is not in.
    """
    outside = [plate.name for plate in parent.plates if plate.name not in {own.name for own in child.plates}]
    if outside:
        raise StructureError(
            f"Latent site '{child.name}' cannot depend on '{parent.name}', which has a value for each element of plate "
            f"'{outside[0]}'; '{child.name}' lies outside of it.",
            hint=f"Let '{parent.name}' depend on '{child.name}', or let the network of '{child.name}' read the data.",
        )
