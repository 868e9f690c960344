"""Where a dreamt observation goes: in the place of the argument of its name, in that argument's type and shape."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vfe.errors import StructureError
from pyro_vfe.program.chain_gaps import OBSERVED, UNOBSERVED
from pyro_vfe.program.layout import Program
from pyro_vfe.program.recorder import Plate
from pyro_vfe.program.signatures import signature_of

_HINT = (
    "Pass dream_to_args=, a function of the dreamt observations by site name and of the arguments that returns "
    "(args, kwargs) with the dream in the data's place."
)


@dataclass(frozen=True, eq=False)
class DreamtSite:
    """An observed site of a dream."""

    value: Tensor
    """What was dreamt; the data, where a mask hides them."""
    data: Tensor
    """What the model observes when it is awake."""
    event_dim: int
    """The number of dims of one event."""
    mask: Tensor | bool | None
    """Where the site counts."""
    plates: tuple[Plate, ...]
    """The vectorised plates around it."""


def with_dreams(
    model: Program,
    dreamt: Mapping[str, DreamtSite],
    latents: Collection[str],
    subsamples: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of the programs with dreamt observations in the place of those of their names.

    Args:
        model: The generative model, whose signature names the arguments.
        dreamt: The observed sites, by name.
        latents: The names of the other sites.
        subsamples: The elements of each plate that are present.
        args: Positional arguments of the data.
        kwargs: Keyword arguments of the data.

    Raises:
        StructureError: An observed site is no argument, or not as the argument is.
    """
    names = _names(model, len(args))
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    placed = {}
    for name, site in dreamt.items():
        argument = _argument_of(name, latents, given)
        if argument is None:
            raise _no_argument(name, given.keys())
        placed[argument] = _in_place(name, argument, site, given[argument], subsamples)
    positional = [placed.get(name, value) for name, value in zip(names, args, strict=False)]
    return (*positional, *args[len(names) :]), {name: placed.get(name, value) for name, value in kwargs.items()}


def _names(model: Program, count: int) -> list[str]:
    """The names of a program's first positional arguments; those in `*args` have none."""
    signature = signature_of(model)
    parameters = () if signature is None else signature.parameters.values()
    return [own.name for own in parameters if own.kind in (own.POSITIONAL_ONLY, own.POSITIONAL_OR_KEYWORD)][:count]


def _argument_of(name: str, latents: Collection[str], arguments: Mapping[str, object]) -> str | None:
    """Which argument an observed site is; what `obs_mask=` split is the one of the name before."""
    if name in arguments:
        return name
    whole = name.removesuffix(OBSERVED)
    return whole if whole != name and whole in arguments and whole + UNOBSERVED in latents else None


def _in_place(name: str, argument: str, site: DreamtSite, given: Any, subsamples: Mapping[str, Tensor]) -> Any:
    """What stands for the dream in place of one argument."""
    try:
        whole = given if isinstance(given, Tensor) else torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise _no_tensor(name, argument, given) from None
    if whole.shape == site.value.shape:
        if site.data is not given and not _same(site.data, whole):
            raise _other_values(name, argument)
        return _like(site.value.to(whole.dtype), given)
    present = _present(site, whole, subsamples)
    if present is None:
        raise _other_shape(name, argument, site.value, whole)
    if not _same(site.data, whole[present]):
        raise _other_values(name, argument)
    whole = whole.clone()
    whole[present] = site.value.to(whole.dtype)
    return _like(whole, given)


def _present(site: DreamtSite, whole: Tensor, subsamples: Mapping[str, Tensor]) -> tuple[Tensor, ...] | None:
    """The index into all data of those that are present in subsampled plates; None where plates do not tell."""
    if whole.dim() != site.value.dim():
        return None
    index = [torch.arange(size) for size in whole.shape]
    for plate in site.plates:
        dim = whole.dim() - site.event_dim + plate.dim
        if dim >= 0 and plate.name in subsamples and whole.shape[dim] == plate.full_size:
            index[dim] = subsamples[plate.name].cpu()
    if [len(own) for own in index] != list(site.value.shape):
        return None
    return tuple(own.reshape((-1,) + (1,) * (whole.dim() - 1 - dim)).to(whole.device) for dim, own in enumerate(index))


def _same(data: Tensor, given: Tensor) -> bool:
    """Whether the model observes what it was given, in whatever type; missing values are equal."""
    if data.shape != given.shape:
        return False
    if data.dtype == given.dtype and not data.is_floating_point():
        return torch.equal(data, given)
    one, two = data.to(torch.float64), given.to(data.dtype).to(torch.float64)
    return bool(((one == two) | (one.isnan() & two.isnan())).all())


def _like(value: Tensor, given: Any) -> Any:
    """The value as what the user gave: an array for an array, a number for a number."""
    if isinstance(given, Tensor):
        return value
    if isinstance(given, np.ndarray):
        return value.cpu().numpy().astype(given.dtype)
    if isinstance(given, np.generic):
        return given.dtype.type(value.item())
    return type(given)(value.tolist())


def _no_argument(name: str, arguments: Collection[str]) -> StructureError:
    has = f"are {', '.join(repr(argument) for argument in arguments)}" if arguments else "have no names"
    return StructureError(
        f"Site '{name}' is observed and is no argument of the model, whose arguments {has}.", hint=_HINT
    )


def _no_tensor(name: str, argument: str, given: object) -> StructureError:
    return StructureError(
        f"The dream of site '{name}' has no place in argument '{argument}', which is a {type(given).__name__}.",
        hint=_HINT,
    )


def _other_values(name: str, argument: str) -> StructureError:
    return StructureError(
        f"Site '{name}' observes other values than argument '{argument}' holds: the model computes what it observes.",
        hint=_HINT,
    )


def _other_shape(name: str, argument: str, value: Tensor, whole: Tensor) -> StructureError:
    return StructureError(
        f"The dream of site '{name}' has shape {tuple(value.shape)} and argument '{argument}' has shape "
        f"{tuple(whole.shape)}.",
        hint=_HINT,
    )
