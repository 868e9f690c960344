"""Pyro programs: what ours and Pyro's own loss are given."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from workloads import chain, mixture

Model = Callable[[], None]


def empty() -> None:
    """A guide without latents."""


def gaussian_mixture(size: int, components: int, dims: int, dtype: torch.dtype = torch.float32) -> Model:
    """A mixture of diagonal Gaussians over data of shape `(size, dims)`."""
    workload = mixture(size, components, dims)
    data, start = torch.tensor(workload.data).to(dtype), torch.tensor(workload.means).to(dtype)

    def model() -> None:
        diagonal_gaussians(data, start)

    return model


def diagonal_gaussians(data: Tensor, start: Tensor) -> None:
    """A mixture of diagonal Gaussians with equal weights, unit scales and given means at the start."""
    ones = torch.ones_like(start)
    weights = pyro.param("weights", ones[:, 0] / len(start), constraint=constraints.simplex)
    loc = pyro.param("loc", start.clone)
    scale = pyro.param("scale", ones, constraint=constraints.positive)
    with pyro.plate("data", len(data), dim=-1):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(loc[z], scale[z]).to_event(1), obs=data)


def hidden_markov(
    sequences: int, steps: int, states: int, times: Callable[[range], Iterable[int]] | None = None
) -> Model:
    """A hidden Markov model written as a Python loop.

    Args:
        sequences: How many sequences.
        steps: How many steps each has.
        states: How many states.
        times: What annotates the loop; None leaves it as it is.
    """
    workload = chain(sequences, steps, states)
    data = torch.tensor(workload.data.T.copy())
    start = [torch.tensor(table).float() for table in (workload.initial, workload.transition, workload.emission)]
    loop = _as_it_is if times is None else times

    def model() -> None:
        initial = pyro.param("initial", start[0].clone, constraint=constraints.simplex)
        transition = pyro.param("transition", start[1].clone, constraint=constraints.simplex)
        emission = pyro.param("emission", start[2].clone, constraint=constraints.simplex)
        with pyro.plate("sequences", sequences, dim=-1):
            z: Any = None
            for t in loop(range(steps)):
                probs = initial if z is None else transition[z]
                z = pyro.sample(f"z_{t}", dist.Categorical(probs), infer={"enumerate": "parallel"})
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


def unlike_sites(sites: int) -> Model:
    """A network in which each latent has a table of its own and reads the latent before: no two sites are alike."""
    tables = torch.rand(sites, 3, 3).softmax(-1)
    locs, data = torch.randn(sites, 3), torch.randn(sites)

    def model() -> None:
        z: Any = torch.tensor(0)
        for t in range(sites):
            z = pyro.sample(f"z_{t}", dist.Categorical(tables[t][z]), infer={"enumerate": "parallel"})
            pyro.sample(f"x_{t}", dist.Normal(locs[t][z], 1.0), obs=data[t])

    return model


def _as_it_is(steps: range) -> Iterator[int]:
    return iter(steps)
