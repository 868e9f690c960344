"""Tensors of programs as xarray variables: a dimension for each plate around a site, in the order of its batch dims."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyro_vfe.engine.factors import Table
from pyro_vfe.errors import NameClashError
from pyro_vfe.program.recorder import Plate, Site

if TYPE_CHECKING:
    import xarray

DRAW = "draw"


def variable(
    name: str, values: Tensor, plates: Sequence[Plate] = (), event_dim: int | None = None, *, draws: bool = False
) -> "xarray.Variable":
    """Returns values with a name for each dim: plates by name, the rest as `name_dim_0`, `name_dim_1`, ...

    Args:
        name: The site's.
        values: Shape `(*batch, *event)`, with draws in front where there are.
        plates: Those around the site.
        event_dim: The number of event dims; all of them by default.
        draws: Whether the first dim is that of draws.
    """
    import xarray

    lead = values.shape[:1] if draws else values.shape[:0]
    shape = values.shape[len(lead) :]
    batch = shape[: len(shape) - (len(shape) if event_dim is None else event_dim)]
    by_dim = {plate.dim: plate for plate in plates}
    nesting = max([len(batch), *(-dim for dim in by_dim)])
    padded = (1,) * (nesting - len(batch)) + batch
    dims, sizes = [], []
    for dim, size in zip(range(-nesting, 0), padded, strict=True):
        if dim in by_dim:
            dims.append(by_dim[dim].name)
            sizes.append(by_dim[dim].size)
        elif size > 1:
            dims.append("")
            sizes.append(size)
    event = shape[len(batch) :]
    target = [by_dim[dim].size if dim in by_dim else size for dim, size in zip(range(-nesting, 0), padded, strict=True)]
    whole = values.reshape((*lead, *padded, *event)).expand((*lead, *target, *event)).reshape((*lead, *sizes, *event))
    dims += [""] * len(event)
    counter = iter(range(len(dims)))
    named = [dim or f"{name}_dim_{next(counter)}" for dim in dims]
    return xarray.Variable(([DRAW] if draws else []) + named, as_array(whole))


def table_variable(table: Table, plates: Sequence[Plate], last: dict[str, str]) -> "xarray.Variable":
    """Returns a table with its plates in the order of their dims, and other axes behind them under new names.

    Args:
        table: Values over plates and other axes.
        plates: Those around the site.
        last: The new names of the other axes.
    """
    import xarray

    order = [plate.name for plate in sorted(plates, key=lambda plate: plate.dim) if plate.name in table.axes]
    axes = (*order, *last)
    return xarray.Variable([last.get(axis, axis) for axis in axes], as_array(table.aligned(axes)))


def as_array(values: Tensor) -> np.ndarray:
    """Returns a NumPy array: booleans and whole numbers as int64, others in their own precision."""
    array: np.ndarray = values.detach().cpu().numpy()
    return array if values.is_floating_point() else array.astype(np.int64)


def whole_numbers(values: Tensor) -> Tensor:
    """Returns values of a discrete latent as int64, where all of them are whole numbers."""
    if not values.is_floating_point():
        return values.to(torch.int64)
    return values.to(torch.int64) if bool((values == values.round()).all()) else values


def repeated(values: "xarray.Variable", count: int) -> "xarray.Variable":
    """Returns the same values for each draw, as a view that takes no memory of its own."""
    import xarray

    shape = (count, *values.shape)
    return xarray.Variable((DRAW, *values.dims), np.broadcast_to(values.values, shape), values.attrs)


def stacked(parts: "Sequence[xarray.Variable]") -> "xarray.Variable":
    """Returns variables of single draws as one, along a new first dim."""
    import xarray

    return xarray.Variable((DRAW, *parts[0].dims), np.stack([part.values for part in parts]), parts[0].attrs)


def joined(parts: "Sequence[xarray.Variable]") -> "xarray.Variable":
    """Returns variables of several draws each as one."""
    import xarray

    if len(parts) == 1:
        return parts[0]
    return xarray.Variable(parts[0].dims, np.concatenate([part.values for part in parts]), parts[0].attrs)


def site_variable(site: Site, *, draws: bool = False, values: Tensor | None = None) -> "xarray.Variable":
    """Returns the value of a site.

    Args:
        site: As it ran.
        draws: Whether the first dim is that of draws.
        values: Others than the site's own, of its shape.
    """
    own = site.value if values is None else values
    return variable(site.name, own, site.plates, site.fn.event_dim, draws=draws)


def presence_variable(site: Site, there: Tensor, *, draws: bool = False) -> "xarray.Variable":
    """Returns whether a site is there, over its plates.

    Args:
        site: As it ran.
        there: Booleans, broadcastable to its batch, with draws in front where there are.
        draws: Whether the first dim is that of draws.
    """
    return variable(site.name, there, site.plates, 0, draws=draws)


def with_presence(
    found: "Mapping[str, xarray.Variable]", present: "Mapping[str, xarray.Variable]", optional: Collection[str]
) -> "dict[str, xarray.Variable]":
    """Returns variables with one more, `<name>_present`, for each that is not always there, and NaN where it is not.

    Whole numbers stay what they are: there is none among them that means nothing.

    Args:
        found: By site.
        present: Whether each site is there.
        optional: Sites that have such a variable even where all draws have them.

    Raises:
        NameClashError: There is a site of that name.
    """
    result = dict(found)
    for name, there in present.items():
        if name in optional or not there.values.all():
            if f"{name}_present" in result:
                raise NameClashError(
                    f"'{name}_present' says of which draws latent '{name}' is, and is a site of the model, too.",
                    hint="Rename the site.",
                )
            result[name], result[f"{name}_present"] = _nothing_elsewhere(found[name], there), there
    return result


def _nothing_elsewhere(values: "xarray.Variable", there: "xarray.Variable") -> "xarray.Variable":
    import xarray

    if values.dtype.kind != "f":
        return values
    where = there.values.reshape(there.shape + (1,) * (values.ndim - there.ndim)).astype(bool)
    return xarray.Variable(values.dims, np.where(where, values.values, np.nan), values.attrs)


def is_one_hot(support: Tensor) -> bool:
    """Whether the values of a latent are the unit vectors in order, each of which says which entry is 1.

    Args:
        support: The values, shape `(K, *event_shape)`.
    """
    flat = support.reshape(len(support), -1)
    return support.dim() > 1 and torch.equal(flat, torch.eye(len(flat)).to(flat))
