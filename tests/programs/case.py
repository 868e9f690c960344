"""What a test program is, and the short words that programs are written in."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints


def empty(*args: Any, **kwargs: Any) -> None:
    """A guide without latents: the model sums out everything."""


@dataclass(frozen=True, eq=False)
class Program:
    """A model, a guide and what is known of them. All parameters are made by the programs themselves."""

    model: Callable[..., Any]
    """The generative model, with no enumeration annotation."""

    guide: Callable[..., Any] = empty
    """The variational approximation."""

    args: tuple[Any, ...] = ()
    """What both are called with."""

    kwargs: dict[str, Any] = field(default_factory=dict)
    """What both are called with, by name."""

    plates: tuple[str, ...] = ()
    """Plates by which the terms can be asked for."""

    scaled_plate: str | None = None
    """The plate whose factors carry a scale."""

    marginals: tuple[tuple[str, ...], ...] = ()
    """Sets of sites whose joint posterior marginal can be asked for."""

    pyro_nesting: int | None = None
    """max_plate_nesting with which TraceEnum_ELBO evaluates it exactly; None where it cannot."""

    expected: Callable[[], dict[str, Tensor]] | None = None
    """Some of the terms from another oracle, where the joint table is too large or does not apply."""


@dataclass(frozen=True, eq=False)
class BadProgram:
    """A program that must be refused, and words that the message must hold."""

    model: Callable[..., Any]
    """The generative model."""

    guide: Callable[..., Any]
    """The variational approximation."""

    words: tuple[str, ...]
    """The site, and what is wrong with it."""

    args: tuple[Any, ...] = ()
    """What both are called with."""


def tensor(values: Any) -> Tensor:
    """Returns float64 data, whatever the default dtype is while a module is imported."""
    return torch.tensor(values, dtype=torch.float64)


def noise(*shape: int, seed: int) -> Tensor:
    """Returns standard normal numbers that are always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def simplex(name: str, *shape: int, seed: int = 0) -> Tensor:
    """A parameter of probabilities over its last axis."""
    return pyro.param(name, lambda: noise(*shape, seed=seed).softmax(-1), constraint=constraints.simplex)


def unit(name: str, *shape: int, seed: int = 0) -> Tensor:
    """A parameter of probabilities of yes."""
    return pyro.param(name, lambda: noise(*shape, seed=seed).sigmoid(), constraint=constraints.unit_interval)


def real(name: str, *shape: int, seed: int = 0) -> Tensor:
    """An unconstrained parameter."""
    return pyro.param(name, lambda: noise(*shape, seed=seed))


def positive(name: str, *shape: int, seed: int = 0) -> Tensor:
    """A positive parameter, around 2."""
    return pyro.param(name, lambda: 2 * noise(*shape, seed=seed).exp(), constraint=constraints.positive)


def categorical(name: str, probs: Tensor, is_auxiliary: bool = False) -> Tensor:
    """Samples a Categorical site."""
    return pyro.sample(name, dist.Categorical(probs), infer={"is_auxiliary": True} if is_auxiliary else {})


def bernoulli(name: str, probs: Tensor | float) -> Tensor:
    """Samples a Bernoulli site."""
    return pyro.sample(name, dist.Bernoulli(probs))
