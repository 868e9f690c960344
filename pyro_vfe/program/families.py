r"""A distribution in exponential-family form.

    log p(x | theta)  =  T(x) . eta(theta) - A(theta) + log h(x)

`to_event` sums over its dims: T and eta of all elements stand side by side. Parameters come without the repetitions of
plates, so that what varies along latents alone is small.

References:
    Wainwright and Jordan (2008), Graphical models, exponential families, and variational inference.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent

from pyro_vfe.engine.shapes import broadcast_shapes
from pyro_vfe.program.families_forms import FAMILIES, Family, Parameters
from pyro_vfe.program.log_prob import given_as, slim


@dataclass(frozen=True, eq=False)
class Form:
    """The exponential-family form of one distribution, `to_event` included: its dims are summed over."""

    family: Family
    parameters: Parameters
    """Without the repetitions of plates, shape `(*batch, *independent, *event)`."""
    independent: torch.Size
    """The dims that `to_event` made part of the event."""
    centre: Tensor | None = None
    """What is taken from x and from the location, shape `(*independent, *event)`."""

    def statistic(self, x: Tensor) -> Tensor:
        """The sufficient statistic T(x), shape `(*x, D)`, where D counts the independent elements too."""
        return self.element_statistic(x).flatten(-1 - len(self.independent))

    @property
    def natural(self) -> Tensor:
        """The natural parameters, shape `(*batch, D)`."""
        eta = self.family.natural(self.parameters)
        batch = eta.shape[: eta.dim() - 1 - len(self.independent)]
        return eta.expand(*batch, *self.independent, eta.shape[-1]).flatten(-1 - len(self.independent))

    @property
    def log_normalizer(self) -> Tensor:
        """The log normaliser A, shape `(*batch)`, in nats."""
        return self._summed(self.family.log_normalizer(self.parameters))

    def batch_shape(self, *, fixed: bool = False) -> torch.Size:
        """The batch shape of the parameters that are learned; of the fixed ones on demand."""
        own_dims = len(self.independent)
        shapes = []
        for name, values in self.parameters.items():
            event_dim = self.family.parameters.get("probs" if name == "logits" else name, 0)
            if (name in self.family.fixed) is fixed:
                shapes.append(values.shape[: max(0, values.dim() - own_dims - event_dim)])
        return broadcast_shapes(*shapes)

    def log_base_measure(self, x: Tensor) -> Tensor:
        """log h(x), shape `(*x)`, or no dims where it does not depend on x; in nats."""
        return self._summed(self.family.log_base_measure(self._centred(x), self.parameters))

    def from_mean_parameters(self, mean: Tensor) -> dict[str, Tensor] | None:
        """The parameters whose E[T(x)] is `mean`, shape `(*batch, D)`; None where there is no closed form.

        With the mean of T over data, or its weighted mean, these are the parameters of maximum likelihood. Centre the
        form on the data first: a variance is a small difference of large means otherwise.
        """
        if self.family.from_mean_parameters is None:
            return None
        elements = math.prod(self.independent)
        split = mean.reshape(*mean.shape[:-1], *self.independent, mean.shape[-1] // max(1, elements))
        found = self.family.from_mean_parameters(split, self.parameters)
        if self.centre is not None:
            found["loc"] = found["loc"] + self.centre
        return found

    def centred(self, x: Tensor) -> "Form":
        """The form in terms of x - c, with c the mean of the data x; itself for a family that has no location."""
        if not self.family.location or self.centre is not None:
            return self
        own_dims = len(self.independent) + self.family.event_dim
        dtype = self.parameters["loc"].dtype
        dims = tuple(range(x.dim() - own_dims))
        centre = x.detach().mean(dims, dtype=dtype) if dims else x.detach().to(dtype)
        return replace(self, parameters={**self.parameters, "loc": self.parameters["loc"] - centre}, centre=centre)

    def to(self, dtype: torch.dtype) -> "Form":
        """The form with its parameters in another precision."""
        return replace(self, parameters={name: value.to(dtype) for name, value in self.parameters.items()})

    def element_statistic(self, x: Tensor) -> Tensor:
        """T(x) of each independent element by itself, shape `(*x, *independent, D)`."""
        x = self._centred(x)
        batch = x.dim() - len(self.independent) - self.family.event_dim
        event = x.shape[x.dim() - self.family.event_dim :]
        return self.family.statistic(x.expand(*x.shape[: max(0, batch)], *self.independent, *event), self.parameters)

    def _centred(self, x: Tensor) -> Tensor:
        return x if self.centre is None else x - self.centre

    def _summed(self, values: Tensor) -> Tensor:
        count = len(self.independent)
        if count == 0:
            return values
        batch = values.shape[: max(0, values.dim() - count)]
        return values.expand(*batch, *self.independent).sum(tuple(range(-count, 0)))


def family_of(fn: Any) -> Family | None:
    """The family of a distribution, or of what `expand` and `to_event` wrap; None where it is not registered."""
    return FAMILIES.get(type(unwrapped(fn)[0]))


def form_of(fn: Any) -> Form | None:
    """The exponential-family form of a distribution; None where its family is not registered.

    Args:
        fn: A distribution of torch or Pyro, expanded or with dims declared an event; a mask is not looked through.
    """
    base, own_dims = unwrapped(fn)
    family = FAMILIES.get(type(base))
    if family is None:
        return None
    parameters = {}
    for name, event_dim in family.parameters.items():
        given = given_as(getattr(base, "_categorical", base)) if name == "probs" else name
        parameters[given] = slim(torch.as_tensor(getattr(base, given)), own_dims + event_dim)
    return Form(family, parameters, base.batch_shape[len(base.batch_shape) - own_dims :])


def unwrapped(fn: Any) -> tuple[Any, int]:
    """What `expand` and `to_event` wrap, and how many of its batch dims are part of the event."""
    own_dims = 0
    while True:
        if type(fn).__name__ == "ExpandedDistribution":
            fn = fn.base_dist
        elif isinstance(fn, Independent):
            own_dims += fn.reinterpreted_batch_ndims
            fn = fn.base_dist
        else:
            return fn, own_dims
