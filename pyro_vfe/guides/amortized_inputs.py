"""What a recognition network reads: arguments of the model by name, and values of latents.

input  =  [ argument | ... | value of a latent | ... ]        joined along the last dim, broadcast over all others
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vfe.errors import NameClashError, StructureError
from pyro_vfe.guides.amortized_latents import Latent

Names = tuple[str, ...]
Source = Names | Callable[..., Any] | None
"""Names, a function of the arguments, or the first argument."""


def source_of(inputs: Any, whose: str) -> Source:
    """Returns what a network reads, in one form.

    Args:
        inputs: What the user said: a name, a sequence of names, a callable, or None.
        whose: The network, in words.

    Raises:
        StructureError: It is none of these, or has weights of its own.
    """
    if isinstance(inputs, nn.Module) and any(True for _ in inputs.parameters()):
        raise StructureError(
            f"AutoAmortized was given a module with weights as inputs for the network of {whose}.",
            hint="Put it in front of the network, torch.nn.Sequential(module, network): only the network is trained.",
        )
    if inputs is None or callable(inputs):
        return inputs  # type: ignore[no-any-return]
    names = (inputs,) if isinstance(inputs, str) else inputs
    if isinstance(names, Sequence) and names and all(isinstance(name, str) for name in names):
        return tuple(names)
    raise StructureError(
        f"AutoAmortized was given inputs={inputs!r} for the network of {whose}.",
        hint="Pass the name of an argument of the model, a list of names, or a function of the arguments.",
    )


def arguments_of(
    signature: inspect.Signature | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the arguments of a call by name, in the program's order; unnamed ones by their position, "0", "1", ...

    Args:
        signature: That of the program; None where it is not known.
        args: The program's arguments.
        kwargs: Its keyword arguments.
    """
    if signature is None:
        return {**{str(place): value for place, value in enumerate(args)}, **kwargs}
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named |= {str(place): part for place, part in enumerate(value, len(named))}
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        else:
            named[name] = value
    return named


class Inputs:
    """The inputs of the networks at one call."""

    def __init__(
        self,
        signature: inspect.Signature | None,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        latents: Mapping[str, Latent],
    ) -> None:
        """Args:
        signature: That of the model; None where it is not known.
        args: The arguments of the call.
        kwargs: Its keyword arguments.
        latents: The latents that may be read, by name.
        """
        self.args = args
        self.kwargs = kwargs
        self.arguments = arguments_of(signature, args, kwargs)
        self.latents = latents
        self.values: dict[str, Tensor] = {}
        """The values of the latents that the guide has sampled so far."""

    def read(self, source: Source, network: nn.Module, whose: str, rows: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns the input of a network.

        Args:
            source: What it reads.
            network: The network: bools and integers take its dtype.
            whose: The network, in words.
            rows: Takes of an argument's rows those that are present, where it is joined to values of latents.

        Raises:
            StructureError: A name is that of no argument and no latent, or of no tensor.
        """
        if callable(source):
            return _tensor(source(*self.args, **self.kwargs), "What inputs returns", whose)
        names = self._names(source, whose)
        dtype = _dtype(network)
        if not any(name in self.latents for name in names):
            parts = [self._argument(name, network, dtype, whose) for name in names]
        else:
            parts = [
                self.latents[name].features(self.values[name], dtype)
                if name in self.latents
                else rows(self._argument(name, network, dtype, whose))
                for name in names
            ]
        return parts[0] if len(parts) == 1 else _joined(parts, names, whose)

    def carried(self, source: Source) -> list[torch.Size]:
        """Returns the batch shapes of the latents' values that a network reads.

        Args:
            source: What it reads.
        """
        names = source if isinstance(source, tuple) else ()
        return [self.batch_of(name) for name in names if name in self.latents]

    def batch_of(self, name: str) -> torch.Size:
        """Returns the batch shape of a latent's value.

        Args:
            name: A latent that has been sampled.
        """
        value = self.values[name]
        return value.shape[: value.dim() - self.latents[name].event_dims]

    def _names(self, source: Names | None, whose: str) -> Names:
        if source is None:
            if not self.arguments:
                raise StructureError(
                    f"The network of {whose} reads the model's first argument, and the model was called without one.",
                    hint="Hand the data to the model as an argument, or pass inputs=lambda: data.",
                )
            return (next(iter(self.arguments)),)
        for name in source:
            if name in self.latents and name in self.arguments:
                raise NameClashError(
                    f"The name '{name}' stands for two things: a latent site and an argument of the model, and the "
                    f"network of {whose} reads one of them.",
                    hint="Rename one of them.",
                )
            if name not in self.latents and name not in self.arguments:
                raise StructureError(
                    f"The network of {whose} reads '{name}', which is no argument of the model and no latent.",
                    hint=f"There are the arguments {_quoted(self.arguments)} and the latents {_quoted(self.latents)}.",
                )
        return source

    def _argument(self, name: str, network: nn.Module, dtype: torch.dtype, whose: str) -> Tensor:
        value = _tensor(self.arguments[name], f"Argument '{name}'", whose)
        if value.is_floating_point() or value.is_complex() or _reads_integers(network):
            return value
        return value.to(dtype)


def _tensor(value: Any, what: str, whose: str) -> Tensor:
    if isinstance(value, Tensor):
        return value
    kind = "None" if value is None else f"a {type(value).__name__}"
    raise StructureError(
        f"{what}, which the network of {whose} reads, is {kind} and no tensor.",
        hint="Call the guide with the data, or pass as inputs a function of the model's arguments that returns a "
        "tensor.",
    )


def _joined(parts: Sequence[Tensor], names: Names, whose: str) -> Tensor:
    try:
        leading = torch.broadcast_tensors(*(part[..., :1] for part in parts))[0].shape[:-1]
        return torch.cat([part.expand(*leading, -1) for part in parts], -1)
    except (RuntimeError, IndexError) as error:
        shapes = ", ".join(f"'{name}' {tuple(part.shape)}" for name, part in zip(names, parts, strict=True))
        raise StructureError(
            f"The inputs of the network of {whose} cannot be joined along their last dim: {shapes}.",
            hint="All dims but the last must broadcast; a number per datum needs a last dim of its own: let inputs be "
            "a function that returns one tensor.",
        ) from error


def _dtype(network: nn.Module) -> torch.dtype:
    dtypes = (weight.dtype for weight in network.parameters() if weight.is_floating_point())
    return next(dtypes, torch.get_default_dtype())


def _reads_integers(network: nn.Module) -> bool:
    return any(isinstance(part, nn.Embedding | nn.EmbeddingBag) for part in network.modules())


def _quoted(names: Mapping[str, Any]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "(none)"
