"""Sites restricted to a stretch of a plate: what a distribution says of some data is what it said of all, or nothing.

The oracle is torch: the log-probability of all data, narrowed.
"""

from typing import Any

import pyro.distributions as dist
import pytest
import torch
from programs.case import noise, tensor
from torch import Tensor
from torch.distributions import AffineTransform, ExpTransform, Independent, Normal

from pyro_vfe.program.narrowing import narrowed, stretch

N = 6


def real(*shape: int) -> Tensor:
    return noise(*shape, seed=len(shape))


def positive(*shape: int) -> Tensor:
    return noise(*shape, seed=7).exp()


class Shifted(dist.Normal):  # type: ignore[misc]
    """Holds a tensor where nobody looks for one."""

    def __init__(self, loc: Tensor, shift: Tensor, where: str) -> None:
        super().__init__(loc, torch.ones_like(loc))
        self.held: Any = {"list": [shift], "mapping": {"shift": shift}, "function": lambda: shift}[where]

    def log_prob(self, value: Tensor) -> Tensor:
        """Of the value less the shift."""
        held = self.held
        shift = held() if callable(held) else held[0 if isinstance(held, list) else "shift"]
        return torch.as_tensor(super().log_prob(value - shift))


RESTRICTED = {
    "independent of independent": lambda: Independent(Independent(Normal(real(N, 3, 4), positive(N, 3, 4)), 1), 1),
    "expanded, then a vector": lambda: dist.Categorical(positive(4, 3)).expand([N, 4]).to_event(1),
    "log-normal": lambda: dist.LogNormal(real(N), positive(N)),
    "transformed without parameters": lambda: dist.TransformedDistribution(dist.Normal(real(N), 1.0), [ExpTransform()]),
    "mixture": lambda: dist.MixtureSameFamily(dist.Categorical(positive(N, 3)), dist.Normal(real(N, 3), 1.0)),
    "multinomial": lambda: dist.Multinomial(5, positive(N, 3)),
    "Dirichlet-multinomial": lambda: dist.DirichletMultinomial(positive(N, 3), total_count=tensor(5.0)),
    "masked vectors": lambda: dist.Normal(real(N, 3), 1.0).to_event(1).mask(real(N) > 0),
    "correlation matrices": lambda: dist.LKJCholesky(3, positive(N)),
}

REFUSED = {
    "transformed by tensors": lambda: dist.TransformedDistribution(
        dist.Normal(real(N), 1.0), [AffineTransform(real(N), positive(N))]
    ),
    "Pareto": lambda: dist.Pareto(positive(N), positive(N)),
    "hidden Markov model": lambda: dist.DiscreteHMM(real(N, 2), real(N, 4, 2, 2), dist.Normal(real(N, 4, 2), 1.0)),
    "tensor in a list": lambda: Shifted(real(N), real(N), "list"),
    "tensor in a mapping": lambda: Shifted(real(N), real(N), "mapping"),
    "tensor in a function": lambda: Shifted(real(N), real(N), "function"),
}


@pytest.mark.parametrize("name", RESTRICTED)
@pytest.mark.parametrize(("start", "length"), [(0, 2), (3, 3), (5, 1)])
def test_a_stretch_has_the_log_probabilities_of_its_elements(name: str, start: int, length: int) -> None:
    fn = RESTRICTED[name]()  # type: ignore[no-untyped-call]
    data = fn.sample()
    whole = fn.log_prob(data)
    part = narrowed(fn, -1, start, length)
    found = part.log_prob(stretch(data, -1 - len(fn.event_shape), start, length))
    assert part.batch_shape == found.shape
    torch.testing.assert_close(found, whole[start : start + length], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_told_apart_by_its_elements_is_not_restricted(name: str) -> None:
    fn = REFUSED[name]()  # type: ignore[no-untyped-call]
    fn.log_prob(fn.sample())
    assert narrowed(fn, -1, 0, 2) is None
