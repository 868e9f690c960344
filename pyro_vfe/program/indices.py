"""Indices out of range: where in a program, of which tensor, and which latent they are computed from.

Torch says it in words of its own, and at what time depends on what has been drawn. All else is found when it has been
said, in the frames that the error went through; a run that works pays nothing.
"""

import linecache
import os
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from pyro_vfe.errors import ShapeError, VFEError
from pyro_vfe.program.escapes import is_library
from pyro_vfe.program.provenance import Provenance
from pyro_vfe.program.supports import support_size

_WORDS = ("out of bounds", "out of range", "smaller than num_classes")
"""What torch and Python say of an index that they cannot follow, in errors of several kinds."""


def out_of_range(error: BaseException) -> ShapeError | None:
    """Returns what is to be said in place of an error that an index out of range has caused; None for other errors.

    In an enumerated run a tensor that is computed from latents has dims of their values, and another index there may
    have been meant: nothing is said of that.

    Args:
        error: What came of running a program.
    """
    said = str(error).partition("\n")[0].rstrip(". ")
    is_meant = isinstance(error, (IndexError, RuntimeError, ValueError)) and any(words in said for words in _WORDS)
    if isinstance(error, VFEError) or not is_meant:
        return None
    frames = list(_frames(error))
    operation = next((frame.f_locals for frame, _ in reversed(frames) if _is_tracked(frame)), None)
    recorder = next((frame.f_locals["self"] for frame, _ in frames if _is_recorded(frame)), None)
    place = place_of(error)
    if place is None or recorder is None:  # The user's own, in a callback say.
        return None
    table, index, names = (None, None, []) if operation is None else _parts(operation)
    if operation is not None and operation["self"].on_union is None and operation["self"].of(table):
        return None
    shapes = "" if table is None else f" The tensor has shape {tuple(table.shape)}{_range(index)}."
    return ShapeError(
        f"An index is out of range at {place}: {said}.{shapes}{_origin(names, recorder.sites)}",
        hint="Make the tensor as long as the index asks, one entry for each value, or correct the index: along a dim "
        "of size n it goes from 0 to n - 1.",
    )


def place_of(error: BaseException) -> str | None:
    """Returns where in a program an error came up: the line, and where that is known after which site of which program.

    Args:
        error: What came of running a program.
    """
    frames = list(_frames(error))
    line = next((found for frame, number in reversed(frames) if (found := _line(frame, number))), None)
    recorder = next((frame.f_locals["self"] for frame, _ in frames if _is_recorded(frame)), None)
    return line if line is None or recorder is None else f"{line}, in the {recorder.role} {_since(recorder)}"


def _frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """The frames that an error went through, outermost first, and the line of each."""
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next


def _line(frame: FrameType, number: int) -> str | None:
    """A line of the user's program, "file.py:12 (`x = table[z]`)"; None where the frame is of a library."""
    name = frame.f_code.co_filename
    if is_library(name):
        return None
    code = linecache.getline(name, number, frame.f_globals).strip()
    return f"{os.path.basename(name)}:{number}" + (f" (`{code}`)" if code else "")


def _is_tracked(frame: FrameType) -> bool:
    own = frame.f_locals
    return isinstance(own.get("self"), Provenance) and {"func", "args", "kwargs"} <= own.keys()


def _is_recorded(frame: FrameType) -> bool:
    own = frame.f_locals.get("self")
    return hasattr(own, "sites") and hasattr(own, "role") and frame.f_code.co_name == "run"


def _parts(operation: dict[str, Any]) -> tuple[Tensor | None, Tensor | None, list[str]]:
    """What is indexed, the index that is furthest out where it is a tensor, and the latents that this is made from."""
    tensors = list(_tensors((operation["args"], operation["kwargs"])))
    whole = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    is_item = operation.get("name") in ("__getitem__", "__setitem__", "take")
    table = tensors[0] if is_item and tensors else next((one for one in tensors if one.dtype not in whole), None)
    indices = [one for one in tensors if one is not table and one.dtype in whole and one.numel()]
    index = max(indices, key=lambda one: int(one.abs().max()), default=None)
    return table, index, sorted(operation["self"].of(index)) if index is not None else []


def _tensors(part: Any) -> Iterator[Tensor]:
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, dict):
        yield from _tensors(tuple(part.values()))
    elif isinstance(part, (list, tuple)):
        for inner in part:
            yield from _tensors(inner)


def _range(index: Tensor | None) -> str:
    if index is None:
        return ""
    low, high = int(index.min()), int(index.max())
    return f", and the index is {low}" if low == high else f", and the index goes from {low} to {high}"


def _since(recorder: Any) -> str:
    return f"after site '{next(reversed(recorder.sites))}'" if recorder.sites else "before its first site"


def _origin(names: list[str], sites: Mapping[str, Any]) -> str:
    """Which latents an index is computed from, and how many values these have."""
    found = []
    for name in names:
        is_finite = name in sites and sites[name].kind == "enumerated"
        found.append(f"'{name}'" + (f" of {support_size(sites[name].fn)} values" if is_finite else ""))
    return f" The index is computed from latent {', '.join(found)}." if found else ""
