"""Batches of data as a user hands them over: as arguments of the programs, and told apart without being kept."""

import math
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from pyro_vfe.errors import VFEError
from pyro_vfe.program.entry_points import ordinary

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional and keyword arguments of the programs."""

_DIGEST_BYTES = 16


def arguments_of(batch: object) -> Arguments:
    """The arguments that a batch is: a mapping by keyword, a tuple or list in order, anything else as the only one.

    Args:
        batch: One item of what a user iterates over.
    """
    batch = ordinary(batch)
    if isinstance(batch, Mapping):
        return (), batch
    return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})


def check_batches(batches: object, num_epochs: int) -> bool:
    """Whether the batches can be read again and again.

    Args:
        batches: What a user iterates over.
        num_epochs: How often it is to be read.

    Raises:
        VFEError: It is no iterable of batches, or can be read only once and more is asked for.
    """
    if isinstance(batches, (Tensor, Mapping)) or not isinstance(batches, Iterable):
        raise VFEError(
            f"The batches are a {type(batches).__name__}, which is no iterable of batches.",
            hint="Pass a list of batches, such as u.split(100), or a torch DataLoader.",
        )
    once = isinstance(batches, Iterator)
    if once and num_epochs > 1:
        raise VFEError(
            f"The batches are a {type(batches).__name__}, which can be read only once, and num_epochs={num_epochs}.",
            hint="Pass a list, a DataLoader, or an object whose __iter__ starts anew; for one pass over a stream "
            "num_epochs=1 with method=vfe.Online().",
        )
    return not once


def are_several(batches: object) -> bool:
    """Whether steps differ in their data.

    Args:
        batches: What they iterate over; None where all have the same arguments.
    """
    try:
        return batches is not None and not (isinstance(batches, Sized) and len(batches) == 1)
    except TypeError:  # A DataLoader of a stream.
        return True


def out_of_step(every: int, batches: object) -> int:
    """The next number of steps that shares no divisor with the number of batches: so that what is done every so many
    steps comes to every batch, not to the last one of each epoch again.

    Args:
        every: The least number.
        batches: What a user iterates over; None where all steps have the same arguments.
    """
    try:
        num_batches = len(batches) if isinstance(batches, Sized) else 1
    except TypeError:  # A DataLoader of a stream.
        num_batches = 1
    while num_batches and math.gcd(every, num_batches) > 1:  # None at all is an error of the first step.
        every += 1
    return every


def numbered(batches: Iterable[object], epoch: int) -> Iterator[tuple[int, Arguments]]:
    """Yields the batches of an epoch as arguments, counted from 1.

    Args:
        batches: What a user iterates over.
        epoch: The number of the epoch, for the error.

    Raises:
        VFEError: There are none.
    """
    number = 0
    for number, batch in enumerate(batches, 1):
        yield number, arguments_of(batch)
    if not number:
        size = f" (of length {len(batches)})" if isinstance(batches, Sized) else ""
        raise VFEError(
            f"The {type(batches).__name__} of batches{size} gave none in epoch {epoch}.",
            hint="Pass an iterable that gives the batches each time it is iterated over.",
        )


def fingerprint(*contents: object) -> bytes:
    """A digest that equal data share: of a fixed size, whatever the size of the data.

    Args:
        *contents: Tensors, what holds them, and what can be pickled.

    Raises:
        VFEError: Something cannot.
    """
    digest = blake2b(digest_size=_DIGEST_BYTES)
    for piece in _pieces(contents):
        digest.update(piece)
    return digest.digest()


def _pieces(content: object) -> Iterator[bytes]:
    if isinstance(content, Tensor) and content.layout is torch.strided:
        yield f"{content.dtype}{tuple(content.shape)}".encode()
        flat = content.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().tobytes()
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield repr(key).encode()
            yield from _pieces(value)
    elif isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        yield f"{type(content).__name__}{len(content)}".encode()
        for value in content:
            yield from _pieces(value)
    else:
        yield _pickled(content)


def _pickled(content: object) -> bytes:
    try:
        return pickle.dumps(content)
    except Exception as error:
        raise VFEError(
            f"Incremental recognises batches by their contents, and an argument of type {type(content).__name__} "
            f"cannot be read: {error}.",
            hint="Let batches hold tensors, numbers and text, and let the model know the rest; or pass "
            "method=vfe.Online().",
        ) from error
