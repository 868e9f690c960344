"""The amortised guide: a network's Q is that of the same network in a guide written by hand, in value and gradient."""

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import TERMS, oracle
from programs.case import categorical, noise, positive, real, simplex, unit
from programs.networks import network
from pyro.infer import SVI, Predictive, TraceEnum_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

import pyro_vfe as vfe
from pyro_vfe.errors import NameClashError, NotFiniteError, ShapeError, StructureError, VFEWarning
from pyro_vfe.program.finite import Finite
from pyro_vfe.program.programs import Programs

COUNTS = torch.tensor([3, 0, 7, 2])
POINTS = noise(4, 2, seed=1)
GRID = noise(3, 4, 2, seed=2)
BITS = (noise(5, 6, seed=3) > 0).double()


@dataclass(frozen=True)
class Case:
    """A model, a network, and the guide that a user would write around the network."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    """Called with the network and the model's arguments."""
    network: Any
    args: tuple[Any, ...] = (POINTS,)
    options: Any = None


def one_latent(prior: Callable[[], Any]) -> Callable[..., Any]:
    def model(points: Tensor) -> None:
        with pyro.plate("data", len(points)):
            v = pyro.sample("v", prior())
            mean = v.flatten(v.dim() - prior().event_dim).sum(-1) if prior().event_dim else v
            pyro.sample("u", dist.Normal(mean[..., None] * real("w", 2), 1.0).to_event(1), obs=points)

    return model


def one_guide(posterior: Callable[[Tensor], Any]) -> Callable[..., Any]:
    def guide(net: nn.Module, points: Tensor) -> None:
        with pyro.plate("data", len(points)):
            pyro.sample("v", posterior(pyro.module("net", net)(points)))

    return guide


def one_case(prior: Callable[[], Any], posterior: Callable[[Tensor], Any], width: int) -> Case:
    return Case(one_latent(prior), one_guide(posterior), network((2, 5, width), seed=3))


KINDS = {
    "categorical": one_case(
        lambda: dist.Categorical(simplex("p", 3)), lambda logits: dist.Categorical(logits=logits), 3
    ),
    "bernoulli": one_case(
        lambda: dist.Bernoulli(unit("p")), lambda logits: dist.Bernoulli(logits=logits.squeeze(-1)), 1
    ),
    "vector": one_case(
        lambda: dist.Bernoulli(unit("p") * torch.ones(3)).to_event(1),
        lambda logits: dist.Bernoulli(logits=logits).to_event(1),
        3,
    ),
    "matrix": one_case(
        lambda: dist.Bernoulli(unit("p") * torch.ones(2, 2)).to_event(2),
        lambda logits: dist.Bernoulli(logits=logits.unflatten(-1, (2, 2))).to_event(2),
        4,
    ),
    "one hot": one_case(
        lambda: dist.OneHotCategorical(simplex("p", 3)), lambda logits: dist.OneHotCategorical(logits=logits), 3
    ),
    "word": one_case(
        lambda: dist.Categorical(simplex("p", 2, 3)).to_event(1),
        lambda logits: dist.Categorical(logits=logits.unflatten(-1, (2, 3))).to_event(1),
        6,
    ),
    "binomial": one_case(lambda: dist.Binomial(2, unit("p")), lambda logits: Finite(torch.arange(3.0), logits), 3),
}


def observe(mean: Tensor, data: Tensor) -> None:
    """Observes two numbers per element around one mean."""
    pyro.sample("u", dist.Normal(mean[..., None] * torch.ones(2), 1.0).to_event(1), obs=data)


def several(points: Tensor) -> None:
    with pyro.plate("data", len(points)):
        a = categorical("a", simplex("p", 3))
        b = pyro.sample("b", dist.Bernoulli(torch.tensor([0.3, 0.6, 0.8])[a]))
        c = pyro.sample("c", dist.Bernoulli(unit("q") * torch.ones(2)).to_event(1))
        mean = noise(3, seed=5)[a] * (1 + b) + c[..., 0] - 2 * c[..., 1]
        observe(mean, points)


def several_guide(net: nn.Module, points: Tensor) -> None:
    logits = pyro.module("net", net)(points)
    with pyro.plate("data", len(points)):
        pyro.sample("a", dist.Categorical(logits=logits[..., :3]))
        pyro.sample("b", dist.Bernoulli(logits=logits[..., 3]))
        pyro.sample("c", dist.Bernoulli(logits=logits[..., 4:]).to_event(1))


def edges_guide(net: nn.Module, points: Tensor) -> None:
    """Q(c) Q(a|c) Q(b|a, c): a table for the 4 joint values of c, one for the 3 x 4 of a and c."""
    logits = pyro.module("net", net)(points)
    with pyro.plate("data", len(points)):
        c = pyro.sample("c", dist.Bernoulli(logits=logits[..., 24:]).to_event(1))
        row = (2 * c[..., 0] + c[..., 1]).long()
        element = torch.arange(len(points))
        a = pyro.sample("a", dist.Categorical(logits=logits[..., :12].unflatten(-1, (4, 3))[element, row]))
        pyro.sample("b", dist.Bernoulli(logits=logits[..., 12:24].unflatten(-1, (3, 4))[element, a, row]))


def model_edges_guide(net: nn.Module, points: Tensor) -> None:
    """Q(a) Q(b|a) Q(c), as the model has it."""
    logits = pyro.module("net", net)(points)
    with pyro.plate("data", len(points)):
        a = pyro.sample("a", dist.Categorical(logits=logits[..., :3]))
        pyro.sample("b", dist.Bernoulli(logits=logits[torch.arange(len(points)), 3 + a]))
        pyro.sample("c", dist.Bernoulli(logits=logits[..., 6:]).to_event(1))


def one_hot_parent(points: Tensor) -> None:
    with pyro.plate("data", len(points)):
        a = pyro.sample("a", dist.OneHotCategorical(simplex("p", 3)))
        n = pyro.sample("n", dist.Binomial(2, (a * torch.tensor([0.2, 0.5, 0.9])).sum(-1)))
        b = pyro.sample("b", dist.Bernoulli(unit("q")))
        mean = (a * noise(3, seed=5)).sum(-1) + n * b
        observe(mean, points)


def one_hot_parent_guide(net: nn.Module, points: Tensor) -> None:
    logits, element = pyro.module("net", net)(points), torch.arange(len(points))
    with pyro.plate("data", len(points)):
        a = pyro.sample("a", dist.OneHotCategorical(logits=logits[..., :3]))
        n = pyro.sample("n", Finite(torch.arange(3.0), logits[..., 3:12].unflatten(-1, (3, 3))[element, a.argmax(-1)]))
        pyro.sample("b", dist.Bernoulli(logits=logits[..., 12:][element, n.long()]))


def nested(grid: Tensor) -> None:
    with pyro.plate("outer", 3, dim=-2), pyro.plate("inner", 4, dim=-1):
        a = categorical("a", simplex("p", 3))
        b = pyro.sample("b", dist.Bernoulli(torch.tensor([0.3, 0.6, 0.8])[a]))
        observe((a + 2 * b), grid)


def nested_guide(net: nn.Module, grid: Tensor) -> None:
    logits = pyro.module("net", net)(grid)
    with pyro.plate("outer", 3, dim=-2), pyro.plate("inner", 4, dim=-1):
        pyro.sample("a", dist.Categorical(logits=logits[..., :3]))
        pyro.sample("b", dist.Bernoulli(logits=logits[..., 3]))


class Pooled(nn.Module):
    """Averages dims of the data away, and passes them through a network."""

    def __init__(self, inner: nn.Module, *dims: int) -> None:
        super().__init__()
        self.inner, self.dims = inner, dims

    def forward(self, data: Tensor) -> Tensor:
        """Returns the logits."""
        return self.inner(data.mean(self.dims, keepdim=len(self.dims) == 1))


def levels(grid: Tensor) -> None:
    g = pyro.sample("g", dist.Bernoulli(unit("g_prob")))
    with pyro.plate("outer", 3, dim=-2):
        a = categorical("a", simplex("p", 2, 3)[g.long()])
        with pyro.plate("inner", 4, dim=-1):
            b = pyro.sample("b", dist.Bernoulli(torch.tensor([0.3, 0.6, 0.8])[a]))
            observe((a + 2 * b), grid)


def levels_guide(net: dict[str, nn.Module], grid: Tensor) -> None:
    nets = {name: pyro.module(name, part) for name, part in net.items()}
    pyro.sample("g", dist.Bernoulli(logits=nets["g"](grid).squeeze(-1)))
    with pyro.plate("outer", 3, dim=-2):
        pyro.sample("a", dist.Categorical(logits=nets["a"](grid)))
        with pyro.plate("inner", 4, dim=-1):
            pyro.sample("b", dist.Bernoulli(logits=nets["b"](grid).squeeze(-1)))


def chain(points: Tensor) -> None:
    with pyro.plate("time", len(points)):
        z = pyro.sample("z", vfe.MarkovChain(simplex("initial", 3), simplex("transition", 3, 3)))
        observe(noise(3, seed=5)[z], points)


def chain_as_independent(net: nn.Module, points: Tensor) -> None:
    with pyro.plate("time", len(points)):
        pyro.sample("z", dist.Categorical(logits=pyro.module("net", net)(points)))


def chain_guide(net: nn.Module, points: Tensor) -> None:
    tables = pyro.module("net", net)(points).unflatten(-1, (3, 3)).softmax(-1)
    with pyro.plate("time", len(points)):
        pyro.sample("z", vfe.MarkovChain(tables[0, 0], tables[1:]))


def switched_chains(grid: Tensor) -> None:
    with pyro.plate("series", len(grid), dim=-2):
        c = pyro.sample("c", dist.Bernoulli(unit("c_prob")))
        initial, transition = simplex("initial", 2, 2), simplex("transition", 2, 2, 2)
        with pyro.plate("time", 4, dim=-1):
            table = transition[c.long()]
            z = pyro.sample("z", vfe.MarkovChain(initial[c.long().squeeze(-1)], table))
            observe(3.0 * z, grid)


def switched_guide(net: dict[str, nn.Module], grid: Tensor) -> None:
    nets = {name: pyro.module(name, part) for name, part in net.items()}
    with pyro.plate("series", len(grid), dim=-2):
        c = pyro.sample("c", dist.Bernoulli(logits=nets["c"](grid).squeeze(-1)))
        tables = nets["z"](grid).unflatten(-1, (2, 2, 2)).softmax(-1)  # (series, time, c, before, z)
        c = c[..., None, None]
        chosen = torch.where(c == 1, tables[:, :, 1], tables[:, :, 0])
        with pyro.plate("time", 4, dim=-1):
            pyro.sample("z", vfe.MarkovChain(chosen[..., 0, 0, :], chosen[..., 1:, :, :]))


def loop(points: Tensor) -> None:
    state, table = 0, simplex("transition", 3, 3)
    for t in range(len(points)):
        state = categorical(f"z_{t}", table[state])
        pyro.sample(f"u_{t}", dist.Normal(noise(3, seed=5)[state], 1.0), obs=points[t, 0])


def loop_guide(net: nn.Module, points: Tensor) -> None:
    logits = pyro.module("net", net)(points.flatten())
    for t in range(len(points)):
        pyro.sample(f"z_{t}", dist.Categorical(logits=logits[3 * t : 3 * t + 3]))


PAIRS = {
    **KINDS,
    "several": Case(several, several_guide, network((2, 5, 6), seed=3)),
    "edges": Case(
        several, edges_guide, network((2, 5, 26), seed=3), options={"edges": [("c", "a"), ("a", "b"), ("c", "b")]}
    ),
    "edges of the model": Case(several, model_edges_guide, network((2, 5, 8), seed=3), options={"edges": "model"}),
    "one-hot and binomial parents": Case(
        one_hot_parent, one_hot_parent_guide, network((2, 5, 15), seed=3), options={"edges": [("a", "n"), ("n", "b")]}
    ),
    "nested": Case(nested, nested_guide, network((2, 5, 4), seed=3), (GRID,)),
    "levels": Case(
        levels,
        levels_guide,
        {
            "b": network((2, 3, 1), seed=3),
            "a": Pooled(network((2, 3, 3), seed=4), -2),
            "g": Pooled(network((2, 3, 1), seed=5), 0, 1),
        },
        (GRID,),
    ),
    "chain, independent steps": Case(chain, chain_as_independent, network((2, 5, 3), seed=3)),
    "chain": Case(chain, chain_guide, network((2, 5, 9), seed=3), options={"edges": [("z", "z")]}),
    "chain of the model": Case(chain, chain_guide, network((2, 5, 9), seed=3), options={"edges": "model"}),
    "chains with a switch": Case(
        switched_chains,
        switched_guide,
        {"c": Pooled(network((2, 3, 1), seed=4), -2), "z": network((2, 3, 8), seed=3)},
        (GRID,),
        options={"edges": "model"},
    ),
    "loop": Case(loop, loop_guide, network((8, 5, 12), seed=3), options={"inputs": lambda points: points.flatten()}),
}


def weights_of(net: Any) -> list[Tensor]:
    return [weight for part in (net.values() if isinstance(net, dict) else [net]) for weight in part.parameters()]


def gradients(model: Any, guide: Any, net: Any, *args: Any) -> list[Tensor]:
    loss = vfe.FreeEnergy(check="always").differentiable_loss(model, guide, *args)
    return list(torch.autograd.grad(loss, weights_of(net)))


@pytest.mark.parametrize("name", PAIRS)
def test_it_is_the_guide_that_one_writes_by_hand_around_the_network(name: str) -> None:
    case = PAIRS[name]
    ours = vfe.AutoAmortized(case.model, case.network, **(case.options or {}))
    theirs = partial(case.guide, case.network)
    elbo = vfe.FreeEnergy(check="always")
    found, expected = elbo.decompose(case.model, ours, *case.args), elbo.decompose(case.model, theirs, *case.args)
    for term in TERMS:
        torch.testing.assert_close(getattr(found, term), getattr(expected, term), rtol=1e-11, atol=1e-11)
    assert found.gap > 1e-3
    found_gradients = gradients(case.model, ours, case.network, *case.args)
    expected_gradients = gradients(case.model, theirs, case.network, *case.args)
    assert any(bool(gradient.any()) for gradient in found_gradients)
    torch.testing.assert_close(found_gradients, expected_gradients, rtol=1e-9, atol=1e-10)
