"""Programs that are modules: PyroModule models and guides, amortised by torch.nn networks."""

from itertools import pairwise

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn
from torch.distributions import constraints

from programs.case import Program, noise

POINTS = noise(4, 2, seed=21)


def network(sizes: tuple[int, ...], seed: int) -> nn.Sequential:
    """A small float64 network whose weights are always the same."""
    layers: list[nn.Module] = []
    for n, (width, next_width) in enumerate(pairwise(sizes)):
        linear = nn.Linear(width, next_width, dtype=torch.float64)
        linear.weight.data = noise(next_width, width, seed=seed + n)
        linear.bias.data = noise(next_width, seed=seed + n + 100)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class MixtureModule(PyroModule):
    """A mixture whose components' means are decoded by a network."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = PyroParam(noise(3, seed=1).softmax(-1), constraint=constraints.simplex)
        self.decoder = network((3, 4, 2), seed=2)
        self.flip = PyroSample(lambda self: dist.Bernoulli(torch.tensor(0.3, dtype=torch.float64)))

    def forward(self, points: Tensor) -> None:
        """Generates the points."""
        sign = 1 - 2 * self.flip
        with pyro.plate("data", len(points)):
            z = pyro.sample("z", dist.OneHotCategorical(self.weights))
            means = self.decoder(z) * sign.unsqueeze(-1)
            pyro.sample("u", dist.Normal(means, 1.0).to_event(1), obs=points)


class RecognitionModule(PyroModule):
    """Logits of the component from the point itself."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = network((2, 5, 3), seed=5)
        self.flip_logit = nn.Parameter(noise(1, seed=6)[0])

    def forward(self, points: Tensor) -> None:
        """Infers the components."""
        pyro.sample("flip", dist.Bernoulli(logits=self.flip_logit))
        with pyro.plate("data", len(points)):
            pyro.sample("z", dist.OneHotCategorical(logits=self.encoder(points)))


DECODER, ENCODER = network((2, 3, 2), seed=8), network((3, 4, 2), seed=9)
COMPONENTS = noise(2, 2, seed=10)


def model(points: Tensor) -> None:
    decoder = pyro.module("decoder", DECODER)
    with pyro.plate("data", len(points)):
        a = pyro.sample("a", dist.Bernoulli(0.4))
        b = pyro.sample("b", dist.Categorical(logits=COMPONENTS[a.long()]))
        means = decoder(COMPONENTS[b] * (1 + a).unsqueeze(-1))
        pyro.sample("u", dist.Normal(means, 1.0).to_event(1), obs=points)


def autoregressive_guide(points: Tensor) -> None:
    encoder = pyro.module("encoder", ENCODER)
    with pyro.plate("data", len(points)):
        b = pyro.sample("b", dist.Categorical(logits=encoder(nn.functional.pad(points, (0, 1)))))
        pairs = torch.broadcast_tensors(b.unsqueeze(-1).to(points), points)
        known = torch.cat([pairs[1], pairs[0][..., :1]], -1)
        pyro.sample("a", dist.Bernoulli(logits=encoder(known)[..., 0]))


NETWORKS = {
    "pyro_module": Program(MixtureModule(), args=(POINTS[:3],), pyro_nesting=1, marginals=(("flip", "z"),)),
    "pyro_module_amortised": Program(MixtureModule(), RecognitionModule(), (POINTS[:3],), pyro_nesting=1),
    "network": Program(model, args=(POINTS,), plates=("data",), pyro_nesting=1, marginals=(("a", "b"),)),
    "network_amortised": Program(model, autoregressive_guide, (POINTS,), plates=("data",), pyro_nesting=1),
}
