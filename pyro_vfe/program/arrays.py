"""Data that are no tensors, as tensors: arrays, series, frames, lists and numbers.

Arrays keep the precision that they come in, so nothing is rounded; numbers of Python are made in that of the
distribution. What does not say which numbers it stands for is refused, with the line to write.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import Distribution

from pyro_vfe.errors import StructureError, described
from pyro_vfe.program.escapes import NO_SITES, Sites
from pyro_vfe.program.keeping import tensors_of

_FROM_ARRAY = "_vfe_from_array"


def _codes(u: Any) -> Any:
    """The place of each name among all names, in alphabetical order."""
    if not all(isinstance(name, str) for name in np.asarray(u).flat):
        raise TypeError
    return np.unique(u, return_inverse=True)[1]


def _padded(u: Any) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.as_tensor(row) for row in u], batch_first=True)


_WAYS: tuple[tuple[str, str, Callable[[Any], Any]], ...] = (
    ("holds times", "obs=(u - u.min()) / np.timedelta64(1, 'D')", lambda u: (u - u.min()) / np.timedelta64(1, "D")),
    ("holds complex numbers", "obs=np.stack([u.real, u.imag], -1)", lambda u: u.real if np.iscomplexobj(u) else None),
    ("holds objects", "obs=np.asarray(u, dtype=float)", lambda u: np.asarray(u, dtype=float)),
    (
        "lacks some entries",
        "obs=u.to_numpy(dtype=float, na_value=np.nan)",
        lambda u: u.to_numpy(dtype=float, na_value=np.nan),
    ),
    ("is sparse", "obs=u.toarray()", lambda u: u.toarray()),
    ("has keys", "obs=list(u.values())", lambda u: list(u.values())),
    ("is no sequence", "obs=list(u)", lambda u: list(u)),
    ("holds names", "obs=np.unique(u, return_inverse=True)[1].reshape(np.shape(u))", _codes),
    (
        "has rows of different lengths",
        "obs=torch.nn.utils.rnn.pad_sequence([torch.as_tensor(row) for row in u], batch_first=True), "
        "obs_mask=torch.arange(max(map(len, u))) < torch.tensor([[len(row)] for row in u])",
        _padded,
    ),
)
"""What data may be that are no numbers, what makes numbers of them, in words and as a function of the data."""


def as_observed(name: str, fn: Any, value: Any, sites_of: Callable[[Tensor], Sites] = lambda _: NO_SITES) -> Tensor:
    """Returns an observed value as a tensor: a copy, which stays what it is when an array is written into.

    Args:
        name: The site.
        fn: Its distribution, in its plates.
        value: What it observes.
        sites_of: Says what a tensor is computed from: of latents it may have dims of their values.

    Raises:
        StructureError: It is not clear which numbers these are.
    """
    tensors = list(_tensors(value))
    if any(map(sites_of, tensors)):
        raise StructureError(
            f"Site '{name}' observes {described(value)} of what is computed from latents, whose values have dims too.",
            hint=f"Write a statement for each element, `pyro.sample('{name}_0', ..., obs=u[0])`, u being the data.",
        )
    if tensors:
        try:
            return _stacked(value)
        except RuntimeError as error:
            raise _no_numbers(name, value) from error
    array = _numbers(value)
    if array is None:
        raise _no_numbers(name, value)
    if array.ndim > 1 and array.shape[-1] == 1 and array.size > 1 and array.shape[:-1] == tuple(fn.shape()):
        column = "u.iloc[:, 0]" if hasattr(value, "iloc") else "np.asarray(u)[..., 0]"
        raise _refused(name, value, f"is a column, of shape {array.shape}", f"obs={column}")
    held = tensors_of(fn) if isinstance(fn, Distribution) else []
    dtype = _precision(held) if array.dtype.kind == "f" and not _has_precision(value) else None
    tensor = torch.tensor(array, dtype=dtype, device=held[0].device if held else None)
    setattr(tensor, _FROM_ARRAY, True)
    return tensor


def is_from_array(value: Tensor) -> bool:
    """Whether an observed value has been given as something else than a tensor.

    Args:
        value: What `as_observed` gave, or a tensor of the program.
    """
    return hasattr(value, _FROM_ARRAY)


def no_mask(error: BaseException) -> StructureError | None:
    """Returns the error for a mask that is no tensor of bools, where that is what Pyro refused; else None.

    Args:
        error: What came of running a program.
    """
    trace = error.__traceback__
    while trace is not None and not trace.tb_frame.f_code.co_filename.endswith("mask_messenger.py"):
        trace = trace.tb_next
    if trace is None or "mask" not in trace.tb_frame.f_locals:
        return None
    mask = trace.tb_frame.f_locals["mask"]
    line = "mask.bool()" if isinstance(mask, Tensor) else "torch.tensor(np.asarray(mask, dtype=bool))"
    kind = f"tensor of {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
    return StructureError(f"A mask is a {kind}, and no tensor of bools.", hint=f"Write `{line}` in place of `mask`.")


def _numbers(value: Any) -> NDArray[Any] | None:
    """The numbers of a value, copied, of a type that torch has; None where it does not say which."""
    if isinstance(value, np.ma.MaskedArray) or _is_categorical(value):
        return None
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):  # Rows of different lengths; a tensor that a gradient goes through.
        return None
    kind = array.dtype.kind
    if kind not in "biuf" or array.dtype.itemsize > 8:
        return None
    if kind == "u" and array.size and int(array.max()) > np.iinfo(np.int64).max:
        return None
    return np.array(array, dtype=np.int64 if kind in "iu" else array.dtype.newbyteorder("="), order="C")


def _is_categorical(value: Any) -> bool:
    """Whether it is, or has a column that is, of categories: their codes may be meant, or their names."""
    kinds = getattr(value, "dtypes", None)
    kinds = kinds if isinstance(kinds, Iterable) else [kinds]
    return any(type(kind).__name__ == "CategoricalDtype" for kind in kinds)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a list."""
    if isinstance(value, Tensor):
        yield value
    for part in value if isinstance(value, (list, tuple)) else ():
        yield from _tensors(part)


def _stacked(value: Any) -> Tensor:
    """A list with tensors in it as one, through which gradients go."""
    is_list = isinstance(value, (list, tuple))
    return torch.stack([_stacked(part) for part in value]) if is_list else torch.as_tensor(value)


def _has_precision(value: Any) -> bool:
    """Whether it is an array, or a list that has some in it: numbers of Python take that of the distribution."""
    if isinstance(value, (list, tuple)):
        return any(map(_has_precision, value))
    return hasattr(value, "__array__")


def _precision(held: Iterable[Tensor]) -> torch.dtype:
    """The widest precision of what a distribution holds, and no less than the default one."""
    dtype = torch.get_default_dtype()
    for tensor in held:
        dtype = torch.promote_types(dtype, tensor.dtype) if tensor.is_floating_point() else dtype
    return dtype


def _no_numbers(name: str, value: Any) -> StructureError:
    """The error for what does not say which numbers it stands for, with a line that makes numbers of it."""
    if isinstance(value, np.ma.MaskedArray):
        given = "obs=u.filled(0), obs_mask=torch.tensor(~np.ma.getmaskarray(u))"
        return _refused(name, value, "has a mask", given)
    if _is_categorical(value):
        by_column = "u.apply(lambda c: c.cat.codes if hasattr(c, 'cat') else c)"
        codes = by_column if hasattr(value, "columns") else "u.cat.codes"
        return _refused(name, value, "is categorical", f"obs={codes}")
    for fact, line, way in _WAYS:
        try:
            is_found = np.asarray(way(value)).dtype.kind in "biuf"
        except Exception:  # Whatever the data are: this is no way to make numbers of them.
            continue
        if is_found:
            return _refused(name, value, fact, line)
    return StructureError(
        f"Site '{name}' observes {described(value)}, which is no tensor.", hint="Pass a tensor of the numbers it has."
    )


def _refused(name: str, value: Any, fact: str, line: str) -> StructureError:
    return StructureError(
        f"Site '{name}' observes {described(value)} that {fact}, which makes no tensor as it is.",
        hint=f"Write `{line}`, u being the data.",
    )
