"""A distribution over a finite table of values.

p(value_k)  =  softmax(logits)_k
"""

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

_NO_SHAPE = torch.Size()


class Finite(TorchDistribution):
    """A categorical distribution whose k-th outcome is `values[k]`, a tensor of any event shape."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {"logits": constraints.real_vector}
    has_enumerate_support = True

    def __init__(self, values: Tensor, logits: Tensor, validate_args: bool | None = None) -> None:
        """Args:
        values: The outcomes, shape `(K, *event_shape)`.
        logits: Their unnormalised log-probabilities, shape `(*batch_shape, K)`.
        """
        self.values = values
        self._categorical = dist.Categorical(logits=logits, validate_args=validate_args)
        super().__init__(self._categorical.batch_shape, values.shape[1:], validate_args=False)

    @property
    def logits(self) -> Tensor:
        """Log-probabilities of the outcomes, shape `(*batch_shape, K)`."""
        return self._categorical.logits

    @property
    def support(self) -> constraints.Constraint:
        """The real numbers, of the values' dims."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Finite":
        """Returns the distribution with its batch shape expanded."""
        return Finite(self.values, self.logits.expand(*batch_shape, len(self.values)), validate_args=False)

    def sample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        """Returns draws, shape `(*sample_shape, *batch_shape, *event_shape)`."""
        return self.values[self._categorical.sample(sample_shape)]

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns the log-probability of `value`, -inf where it is none of the outcomes."""
        event_dims = tuple(range(-len(self.event_shape), 0))
        same = value.unsqueeze(-1 - len(self.event_shape)) == self.values
        hit = same.all(event_dims) if event_dims else same
        return torch.where(hit, self.logits, -torch.inf).amax(-1)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Returns all outcomes, shape `(K, *batch_shape, *event_shape)`, batch dims of size 1 unless expanded."""
        shape = self.values.shape
        values = self.values.reshape(shape[:1] + (1,) * len(self.batch_shape) + shape[1:])
        return values.expand(shape[:1] + self.batch_shape + shape[1:]) if expand else values
