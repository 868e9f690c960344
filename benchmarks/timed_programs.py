"""The programs that are timed: each as ours takes it, and as the peer needs it."""

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

Model = Callable[[], None]


def empty() -> None:
    """A guide without latents."""


def gaussian_mixture(size: int, components: int, dims: int) -> Model:
    """A mixture of diagonal Gaussians over data of shape `(size, dims)`."""
    data = torch.randn(size, dims)
    start = torch.randn(components, dims)

    def model() -> None:
        weights = pyro.param("weights", torch.ones(components) / components, constraint=constraints.simplex)
        loc = pyro.param("loc", start.clone)
        scale = pyro.param("scale", torch.ones(components, dims), constraint=constraints.positive)
        with pyro.plate("data", size, dim=-1):
            z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc[z], scale[z]).to_event(1), obs=data)

    return model


def hidden_markov(sequences: int, steps: int, states: int, symbols: int, times: Callable[[range], Any]) -> Model:
    """A hidden Markov model written as a Python loop, over symbols of shape `(steps, sequences)`."""
    data = torch.randint(0, symbols, (steps, sequences))
    start = torch.rand(states, states).softmax(-1)
    start_emission = torch.rand(states, symbols).softmax(-1)

    def model() -> None:
        transition = pyro.param("transition", start.clone, constraint=constraints.simplex)
        emission = pyro.param("emission", start_emission.clone, constraint=constraints.simplex)
        with pyro.plate("sequences", sequences, dim=-1):
            z: Any = 0
            for t in times(range(steps)):
                z = pyro.sample(f"z_{t}", dist.Categorical(transition[z]), infer={"enumerate": "parallel"})
                pyro.sample(f"x_{t}", dist.Categorical(emission[z]), obs=data[t])

    return model


def small_chain(sites: int) -> Model:
    """A chain of few latents, each with a datum: what a step costs where nothing is large."""
    datum = torch.tensor(0.3)

    def model() -> None:
        first = pyro.param("first", torch.tensor([0.3, 0.7]), constraint=constraints.simplex)
        transition = pyro.param("transition", torch.tensor([[0.3, 0.7], [0.6, 0.4]]), constraint=constraints.simplex)
        z: Any = None
        for t in range(sites):
            probs = first if z is None else transition[z]
            z = pyro.sample(f"z_{t}", dist.Categorical(probs), infer={"enumerate": "parallel"})
            pyro.sample(f"x_{t}", dist.Normal(z.float(), 1.0), obs=datum)

    return model


def as_it_is(steps: range) -> Iterator[int]:
    """The loop without annotation."""
    return iter(steps)
