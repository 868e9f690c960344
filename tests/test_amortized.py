"""The amortised guide: a network's Q is that of the same network in a guide written by hand, in value and gradient."""

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import TERMS
from programs.case import categorical, noise, real, simplex, unit
from programs.networks import network
from pyro.infer import SVI, Predictive, TraceEnum_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

import pyro_vfe as vfe
from pyro_vfe.errors import NameClashError, NotFiniteError, ShapeError, SpotCheckError, StructureError, VFEWarning
from pyro_vfe.program.finite import Finite
from pyro_vfe.program.programs import Programs

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


SEEN, SCALES = torch.tensor([True, False, True, True]), torch.tensor([1.0, 1.0, 2.5, 0.5])


def masked_and_scaled(points: Tensor) -> None:
    with pyro.plate("data", 4), pyro.poutine.scale(scale=SCALES.to(points)), pyro.poutine.mask(mask=SEEN):
        a = categorical("a", simplex("p", 3))
        observe(noise(3, seed=5)[a], points)


def test_masks_and_weights_of_a_latent_are_those_of_the_model() -> None:
    net = KINDS["categorical"].network

    def by_hand(points: Tensor) -> None:
        with pyro.plate("data", 4), pyro.poutine.scale(scale=SCALES.to(points)), pyro.poutine.mask(mask=SEEN):
            pyro.sample("a", dist.Categorical(logits=net(points)))

    elbo = vfe.FreeEnergy(check="always")
    found = elbo.decompose(masked_and_scaled, vfe.AutoAmortized(masked_and_scaled, net), POINTS)
    expected = elbo.decompose(masked_and_scaled, by_hand, POINTS)
    for term in TERMS:
        torch.testing.assert_close(getattr(found, term), getattr(expected, term), rtol=1e-11, atol=1e-11)


def branching(points: Tensor) -> None:
    if pyro.sample("a", dist.Bernoulli(unit("q"))):
        b = categorical("b", simplex("p", 3))
        pyro.sample("u", dist.Normal(noise(3, seed=5)[b], 1.0), obs=points[0, 0])
    else:
        pyro.sample("u", dist.Normal(0.5, 1.0), obs=points[0, 0])


def test_of_a_branching_model_it_has_the_latents_of_all_branches() -> None:
    net = network((2, 4), seed=3)
    guide = vfe.AutoAmortized(branching, net, inputs=lambda points: points[0])

    def by_hand(points: Tensor) -> None:
        logits = net(points[0])
        pyro.sample("a", dist.Bernoulli(logits=logits[0]))
        pyro.sample("b", dist.Categorical(logits=logits[1:]))

    elbo = vfe.FreeEnergy(check="always")
    assert elbo.loss(branching, guide, POINTS) == pytest.approx(elbo.loss(branching, by_hand, POINTS), rel=1e-12)
    assert guide.latents == ("a", "b")


@pytest.mark.parametrize("length", [1, 2, 4])
def test_a_chain_may_have_any_length(length: int) -> None:
    net, elbo = PAIRS["chain"].network, vfe.FreeEnergy(check="always")
    guide = vfe.AutoAmortized(chain, net, edges="model")
    elbo.loss(chain, guide, POINTS[:3])
    tables = net(POINTS[:length]).unflatten(-1, (3, 3)).softmax(-1).detach()
    probs = [simplex("initial", 3).detach(), *[simplex("transition", 3, 3).detach()] * (length - 1)]
    expected, paths = 0.0, torch.cartesian_prod(*[torch.arange(3)] * length).reshape(-1, length)
    for path in paths:
        q, p = tables[0, 0, path[0]], probs[0][path[0]]
        for t in range(1, length):
            q, p = q * tables[t, path[t - 1], path[t]], p * probs[t][path[t - 1], path[t]]
        seen = dist.Normal(noise(3, seed=5)[path][:, None], 1.0).log_prob(POINTS[:length]).sum()
        expected += (q * (q.log() - p.log() - seen)).item()
    assert elbo.loss(chain, guide, POINTS[:length]) == pytest.approx(expected, rel=1e-11)


# --- A Helmholtz machine: Q(mid|u) Q(top|mid) against sums written out ---

LAYERED = {"mid": network((6, 4, 3), seed=6), "top": network((3, 4, 2), seed=7)}
INPUTS = {"mid": "u", "top": "mid"}
TOP_BIAS, MID_WEIGHT, U_WEIGHT = noise(2, seed=8), noise(2, 3, seed=9), noise(3, 6, seed=10)


def machine(u: Tensor) -> None:
    with pyro.plate("data", len(u)):
        top = pyro.sample("top", dist.Bernoulli(logits=TOP_BIAS).to_event(1))
        mid = pyro.sample("mid", dist.Bernoulli(logits=top @ MID_WEIGHT).to_event(1))
        pyro.sample("u", dist.Bernoulli(logits=mid @ U_WEIGHT).to_event(1), obs=u)


def words(count: int) -> Tensor:
    """All binary words, `(2**count, count)`."""
    return torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * count)


def log_bernoulli(logits: Tensor, value: Tensor) -> Tensor:
    return (value * logits - nn.functional.softplus(logits)).sum(-1)


def machine_by_hand(u: Tensor) -> tuple[Tensor, Tensor]:
    """F and the surprise, by the tables of all words of mid and top."""
    mid, top = words(3), words(2)
    log_q_mid = log_bernoulli(LAYERED["mid"](u)[:, None], mid)  # (data, mid)
    log_q = log_q_mid[..., None] + log_bernoulli(LAYERED["top"](mid)[:, None], top)  # (data, mid, top)
    log_prior = log_bernoulli(TOP_BIAS, top) + log_bernoulli(top @ MID_WEIGHT, mid[:, None])  # (mid, top)
    log_joint = log_prior + log_bernoulli(mid @ U_WEIGHT, u[:, None])[..., None]
    return (log_q.exp() * (log_q - log_joint)).sum(), -log_joint.logsumexp((-2, -1)).sum()


def test_a_layered_recognition_model_has_the_free_energy_of_the_tables_of_all_words() -> None:
    guide, elbo = vfe.AutoAmortized(machine, LAYERED, INPUTS), vfe.FreeEnergy(check="always")
    expected, surprise = machine_by_hand(BITS)
    terms = elbo.decompose(machine, guide, BITS)
    torch.testing.assert_close(terms.free_energy, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms.surprise, surprise.detach(), rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(elbo.differentiable_loss(machine, guide, BITS), weights_of(LAYERED))
    torch.testing.assert_close(found, torch.autograd.grad(expected, weights_of(LAYERED)), rtol=1e-9, atol=1e-10)


def test_in_layers_only_the_first_table_varies_along_the_data() -> None:
    guide = vfe.AutoAmortized(machine, LAYERED, INPUTS)
    factors = Programs().enumerate(machine, guide, (BITS,), {}).factors
    assert factors["guide", "mid"].table.sizes == {"data": 5, "mid": 8}
    assert factors["guide", "top"].table.sizes == {"mid": 8, "top": 4}


def test_given_values_of_the_latents_it_scores_them() -> None:
    dreamt = pyro.poutine.trace(machine).get_trace(BITS)
    values = {name: dreamt.nodes[name]["value"] for name in ("mid", "top")}
    guide = vfe.AutoAmortized(machine, LAYERED, INPUTS)
    found = pyro.poutine.trace(pyro.condition(guide, values)).get_trace(BITS).log_prob_sum()
    expected = log_bernoulli(LAYERED["mid"](BITS), values["mid"]) + log_bernoulli(
        LAYERED["top"](values["mid"]), values["top"]
    )
    assert found.item() == pytest.approx(expected.sum().item(), rel=1e-12)


def test_a_network_may_read_data_and_latents_side_by_side() -> None:
    top = network((9, 4, 2), seed=7)
    guide = vfe.AutoAmortized(machine, {"top": top, "mid": LAYERED["mid"]}, {"top": ["u", "mid"]})

    def by_hand(u: Tensor) -> None:
        nets = pyro.module("mid", LAYERED["mid"]), pyro.module("top", top)
        with pyro.plate("data", len(u)):
            mid = pyro.sample("mid", dist.Bernoulli(logits=nets[0](u)).to_event(1))
            both = torch.broadcast_tensors(u[..., :1], mid[..., :1])[0].shape[:-1]
            pairs = torch.cat([u.expand(*both, 6), mid.expand(*both, 3)], -1)
            pyro.sample("top", dist.Bernoulli(logits=nets[1](pairs)).to_event(1))

    elbo = vfe.FreeEnergy(check="always")
    found, expected = elbo.decompose(machine, guide, BITS), elbo.decompose(machine, by_hand, BITS)
    assert found.gap.item() == pytest.approx(expected.gap.item(), rel=1e-12)


def test_values_of_categories_come_in_as_one_hot_vectors_and_numbers_as_one_number() -> None:
    nets = {"a": network((2, 3), seed=1), "b": network((3, 4, 1), seed=2), "c": network((4, 2), seed=3)}
    guide = vfe.AutoAmortized(several, nets, {"b": "a", "c": ["b", "a"]})

    def by_hand(points: Tensor) -> None:
        a_net, b_net, c_net = (pyro.module(name, net) for name, net in nets.items())
        with pyro.plate("data", len(points)):
            a = pyro.sample("a", dist.Categorical(logits=a_net(points)))
            hot = torch.eye(3)[a]
            b = pyro.sample("b", dist.Bernoulli(logits=b_net(hot).squeeze(-1)))
            number, hot = torch.broadcast_tensors(b[..., None], hot)
            pyro.sample("c", dist.Bernoulli(logits=c_net(torch.cat([number[..., :1], hot], -1))).to_event(1))

    elbo = vfe.FreeEnergy(check="always")
    assert elbo.loss(several, guide, POINTS) == pytest.approx(elbo.loss(several, by_hand, POINTS), rel=1e-12)


# --- Plates that change ---


@pytest.mark.parametrize("count", [1, 3, 5])
def test_it_serves_data_of_any_length(count: int) -> None:
    guide, elbo = vfe.AutoAmortized(machine, LAYERED, INPUTS), vfe.FreeEnergy()
    elbo.loss(machine, guide, BITS[:2])
    expected, _ = machine_by_hand(BITS[:count])
    assert elbo.loss(machine, guide, BITS[:count]) == pytest.approx(expected.item(), rel=1e-12)


ROWS = torch.tensor([3, 0, 4])


def subsampled(u: Tensor, rows: Tensor) -> None:
    with pyro.plate("data", 5, subsample=rows):
        mid = pyro.sample("mid", dist.Bernoulli(unit("p") * torch.ones(3)).to_event(1))
        pyro.sample("u", dist.Bernoulli(logits=mid @ U_WEIGHT).to_event(1), obs=u[rows] if len(u) == 5 else u)


@pytest.mark.parametrize("whole", [True, False])
def test_of_a_subsampled_plate_the_network_gives_all_rows_or_those_present(whole: bool) -> None:
    net = LAYERED["mid"]
    guide = vfe.AutoAmortized(subsampled, net, create_plates=lambda u, rows: pyro.plate("data", 5, subsample=rows))

    def by_hand(u: Tensor, rows: Tensor) -> None:
        with pyro.plate("data", 5, subsample=rows):
            pyro.sample("mid", dist.Bernoulli(logits=net(BITS[rows])).to_event(1))

    elbo, args = vfe.FreeEnergy(check="always"), (BITS if whole else BITS[ROWS], ROWS)
    assert elbo.loss(subsampled, guide, *args) == pytest.approx(elbo.loss(subsampled, by_hand, *args), rel=1e-12)


def drawn_subsample(u: Tensor) -> None:
    with pyro.plate("data", 5, subsample_size=1) as rows:
        top = pyro.sample("top", dist.Bernoulli(logits=TOP_BIAS).to_event(1))
        mid = pyro.sample("mid", dist.Bernoulli(logits=top @ MID_WEIGHT).to_event(1))
        pyro.sample("u", dist.Bernoulli(logits=mid @ U_WEIGHT).to_event(1), obs=u[rows])


@pytest.mark.parametrize("reads", ["mid", ["mid", "u"]])
def test_a_random_subsample_is_that_of_the_model(reads: Any) -> None:
    """Every value of F is 5 times that of one datum."""
    nets = {**LAYERED, "top": network((3 if reads == "mid" else 9, 2), seed=7)}
    guide, elbo = vfe.AutoAmortized(drawn_subsample, nets, {"mid": "u", "top": reads}), vfe.FreeEnergy()
    found = {round(elbo.loss(drawn_subsample, guide, BITS), 8) for _ in range(60)}
    single = vfe.AutoAmortized(machine, nets, {"mid": "u", "top": reads})
    expected = {round(5 * elbo.loss(machine, single, BITS[n : n + 1]), 8) for n in range(5)}
    assert found == expected


def test_a_subsample_that_is_the_whole_plate_in_another_order_is_refused() -> None:
    guide = vfe.AutoAmortized(
        subsampled, LAYERED["mid"], create_plates=lambda u, rows: pyro.plate("data", 5, subsample=rows)
    )
    with pytest.raises(StructureError, match=r"'data' is the whole plate in another order"):
        guide(BITS, torch.tensor([1, 0, 2, 3, 4]))


# --- What the network reads ---


class Machine(PyroModule):
    """A model with a keyword argument, and parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(U_WEIGHT.clone())
        self.on = PyroParam(torch.tensor(0.4), constraint=dist.constraints.unit_interval)

    def forward(self, scale: float = 1.0, *, u: Tensor, extra: Tensor | None = None) -> None:
        """Generates binary data."""
        with pyro.plate("data", len(u)):
            mid = pyro.sample("mid", dist.Bernoulli(self.on * torch.ones(3)).to_event(1))
            pyro.sample("u", dist.Bernoulli(logits=scale * mid @ self.weight).to_event(1), obs=u)


WIDE = network((8, 3), seed=11)
READINGS: dict[str, tuple[Any, nn.Module, dict[str, Any]]] = {
    "a keyword": ("u", LAYERED["mid"], {"u": BITS}),
    "bools": ("u", LAYERED["mid"], {"u": BITS.bool()}),
    "integers": ("u", LAYERED["mid"], {"u": BITS.long()}),
    "a function": (lambda scale=1.0, *, u, extra=None: 2 * u - 1, LAYERED["mid"], {"u": BITS}),
    "two arguments": (["u", "extra"], WIDE, {"u": BITS, "extra": noise(5, 2, seed=1)}),
    "two arguments, one the same for all": (("u", "extra"), WIDE, {"u": BITS, "extra": noise(2, seed=1)}),
}


@pytest.mark.parametrize("name", READINGS)
def test_inputs_are_arguments_by_name_or_a_function_of_them(name: str) -> None:
    inputs, net, kwargs = READINGS[name]
    model, elbo = Machine(), vfe.FreeEnergy(check="always")
    guide = vfe.AutoAmortized(model, net, inputs)
    u, extra = kwargs["u"].double(), kwargs.get("extra")
    reads = 2 * u - 1 if name == "a function" else u if extra is None else torch.cat([u, extra.expand(5, 2)], -1)

    def by_hand(scale: float = 1.0, **_: Any) -> None:
        with pyro.plate("data", 5):
            pyro.sample("mid", dist.Bernoulli(logits=net(reads)).to_event(1))

    found = elbo.loss(pyro.poutine.block(model, hide_fn=lambda site: False), guide, 2.0, **kwargs)
    assert found == pytest.approx(elbo.loss(model, by_hand, 2.0, **kwargs), rel=1e-12)


def test_the_first_argument_is_found_behind_pyros_handlers() -> None:
    def model(*data: Tensor) -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))
        machine(data[0])

    guide = AutoGuideList(model)
    guide.append(AutoNormal(pyro.poutine.block(model, expose=["w"])))
    guide.append(vfe.AutoAmortized(pyro.poutine.block(model, hide=["w"]), LAYERED, {"top": "mid"}))
    assert any(name.startswith("1.network.mid.") for name in guide.state_dict())
    terms = vfe.FreeEnergy(num_particles=2).decompose(model, guide, BITS)
    expected, surprise = machine_by_hand(BITS)
    assert terms.gap.item() == pytest.approx((expected - surprise).item(), rel=1e-10)


def test_an_embedding_keeps_its_integers() -> None:
    net = nn.Sequential(nn.Embedding(8, 3))
    counts = torch.tensor([3, 0, 7, 2])

    def model(counts: Tensor) -> None:
        with pyro.plate("data", 4):
            z = categorical("z", simplex("p", 3))
            pyro.sample("u", dist.Poisson(torch.tensor([1.0, 3.0, 9.0])[z]), obs=counts)

    q = net(counts).softmax(-1).detach()
    log_joint = noise(3, seed=0).softmax(-1).log() + dist.Poisson(torch.tensor([1.0, 3.0, 9.0])).log_prob(
        counts[:, None]
    )
    found = vfe.FreeEnergy().loss(model, vfe.AutoAmortized(model, net), counts)
    assert found == pytest.approx((q * (q.log() - log_joint)).sum().item(), rel=1e-12)


# --- What it holds: weights, in its state and in Pyro's store ---


def fresh() -> nn.Sequential:
    return network((6, 5, 5), seed=20)


def new_guide(net: Any = None) -> vfe.AutoAmortized:
    return vfe.AutoAmortized(machine, fresh() if net is None else net)


def test_its_state_is_that_of_the_networks_before_any_call() -> None:
    net = fresh()
    state = vfe.AutoAmortized(machine, net).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        f"network.{name}": tuple(value.shape) for name, value in net.state_dict().items()
    }
    layered = vfe.AutoAmortized(machine, nn.ModuleDict(LAYERED), INPUTS).state_dict()
    assert set(layered) == {f"network.{site}.{name}" for site, part in LAYERED.items() for name in part.state_dict()}
    assert layered.keys() == vfe.AutoAmortized(machine, LAYERED, INPUTS).state_dict().keys()


@pytest.mark.parametrize("local", [True, False])
def test_its_state_can_be_saved_and_loaded_into_a_guide_that_was_never_called(local: bool) -> None:
    with pyro.settings.context(module_local_params=local):
        guide, file = new_guide(), io.BytesIO()
        loss = vfe.FreeEnergy().loss(machine, guide, BITS)
        torch.save(guide.state_dict(), file)
        file.seek(0)
        pyro.clear_param_store()
        other = new_guide(network((6, 5, 5), seed=30))
        other.load_state_dict(torch.load(file, weights_only=True))
        assert vfe.FreeEnergy().loss(machine, other, BITS) == pytest.approx(loss, rel=1e-14)


def test_names_with_dots_and_names_of_modules_own_make_no_trouble() -> None:
    def model(u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            a = pyro.sample("layer.z", dist.Bernoulli(0.3))
            b = pyro.sample("forward", dist.Bernoulli(0.2 + 0.5 * a))
            pyro.sample("u", dist.Bernoulli(logits=(a + b)[..., None] * U_WEIGHT[0]).to_event(1), obs=u)

    nets = {"layer.z": network((6, 1), seed=1), "forward": network((6, 1), seed=2)}
    guide = vfe.AutoAmortized(model, nets)
    assert set(guide.state_dict()) == {
        f"network.{n}.0.{p}" for n in ("layer.z", "forward_") for p in ("weight", "bias")
    }
    vfe.FreeEnergy().loss_and_grads(model, guide, BITS)
    assert all(bool(weight.grad.any()) for weight in guide.parameters())


STORED = [f"AutoAmortized.network$$${layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")]


def test_the_store_has_the_weights_that_the_network_computes_with() -> None:
    guide = new_guide()
    guide(BITS)
    assert list(pyro.get_param_store().keys()) == STORED
    for name, weight in zip(STORED, guide.network.parameters(), strict=True):
        assert pyro.get_param_store()._params[name] is weight


@pytest.mark.parametrize("networks", ["one", "layers", "PyroModule"])
def test_SVI_trains_the_networks(networks: str) -> None:
    if networks == "layers":
        guide = vfe.AutoAmortized(machine, copy.deepcopy(LAYERED), INPUTS)
    else:
        net = fresh()
        guide = new_guide(PyroModule[nn.Sequential](*net) if networks == "PyroModule" else net)
    before = [weight.detach().clone() for weight in guide.parameters()]
    svi = SVI(machine, guide, pyro.optim.Adam({"lr": 0.05}), loss=vfe.FreeEnergy())
    losses = [svi.step(BITS) for _ in range(40)]
    assert all(not torch.equal(old, new) for old, new in zip(before, guide.parameters(), strict=True))
    assert vfe.FreeEnergy().decompose(machine, guide, BITS).gap < 0.5 * (losses[0] - machine_by_hand(BITS)[1].item())


def learned(u: Tensor) -> None:
    bias = pyro.param("bias", TOP_BIAS.clone())
    with pyro.plate("data", len(u)):
        top = pyro.sample("top", dist.Bernoulli(logits=bias).to_event(1))
        mid = pyro.sample("mid", dist.Bernoulli(logits=top @ MID_WEIGHT).to_event(1))
        pyro.sample("u", dist.Bernoulli(logits=mid @ U_WEIGHT).to_event(1), obs=u)


def test_fit_trains_it_and_reports_its_weights() -> None:
    guide = vfe.AutoAmortized(learned, fresh())
    run = vfe.fit(learned, guide, BITS, optim=pyro.optim.Adam({"lr": 0.05}), num_steps=20, progress_bar=False)
    assert set(STORED) <= set(run.params)
    torch.testing.assert_close(run.params[STORED[0]], guide.network[0].weight.detach())
    assert not torch.equal(guide.network[0].weight, fresh()[0].weight)


def test_it_is_the_guide_of_a_gradient_E_phase() -> None:
    guide = vfe.AutoAmortized(learned, fresh())
    e_phase = vfe.Gradient(partial(torch.optim.Adam, lr=0.02), num_steps=5)
    with pytest.warns(VFEWarning, match="max_iter"):
        run = vfe.EM(learned, guide, e_phase=e_phase).run(BITS, max_iter=3, progress_bar=False)
    assert run.history.of("E").gap[0] < run.history.of("start").gap[0]
    assert run.history.free_energy[-1] < run.history.free_energy[0]
    assert not torch.equal(guide.network[0].weight, fresh()[0].weight)


def test_a_second_guide_of_the_name_takes_the_stored_weights_over_and_says_so() -> None:
    first, second = new_guide(), new_guide(network((6, 5, 5), seed=30))
    first(BITS)
    with pytest.warns(VFEWarning, match="takes over the weights"):
        second(BITS)
    assert all(a is b for a, b in zip(first.parameters(), second.parameters(), strict=True))
    with pytest.raises(StructureError, match=r"AutoAmortized.network\$\$\$0.weight.*clear_param_store"):
        new_guide(network((6, 7, 5), seed=30))(BITS)


def test_with_local_parameters_two_guides_are_apart() -> None:
    with pyro.settings.context(module_local_params=True):
        first, second = new_guide(), new_guide(network((6, 5, 5), seed=30))
        one, other = (vfe.FreeEnergy().loss(machine, guide, BITS) for guide in (first, second))
        assert abs(one - other) > 1e-3
        assert vfe.FreeEnergy().loss(machine, first, BITS) == one
    assert not list(pyro.get_param_store().keys())


def test_a_network_that_does_not_fit_leaves_nothing_in_the_store() -> None:
    with pytest.raises(ShapeError):
        new_guide(network((6, 6), seed=1))(BITS)
    assert not list(pyro.get_param_store().keys())
    assert new_guide()(BITS)["mid"].shape == (5, 3)


def test_weights_that_two_layers_share_stay_shared() -> None:
    def tied() -> nn.Sequential:
        net = network((6, 6, 5), seed=1)
        layer = nn.Linear(6, 6)
        return nn.Sequential(layer, layer, *net)

    first, second = new_guide(tied()), new_guide(tied())
    first(BITS)
    with pytest.warns(VFEWarning, match="takes over"):
        second(BITS)
    assert second.network[0].weight is second.network[1].weight is first.network[0].weight


def test_a_copy_has_weights_of_its_own_and_serves_new_data() -> None:
    with pyro.settings.context(module_local_params=True):
        guide = new_guide()
        loss = vfe.FreeEnergy().loss(machine, guide, BITS[:2])
        made = copy.deepcopy(guide)
        with torch.no_grad():
            for weight in guide.parameters():
                weight.zero_()
        assert vfe.FreeEnergy().loss(machine, made, BITS[:2]) == loss
        assert vfe.FreeEnergy().loss(machine, made, BITS) > 0
        assert vfe.FreeEnergy().loss(machine, guide, BITS) > 0


def test_pickled_it_leaves_its_model_behind_and_keeps_its_own() -> None:
    guide = new_guide()
    loss = vfe.FreeEnergy().loss(machine, guide, BITS)
    made = pickle.loads(pickle.dumps(guide))
    assert vfe.FreeEnergy().loss(machine, made, BITS) == loss
    with pytest.raises(StructureError, match="without its model"):
        made(BITS[:2])
    assert guide(BITS[:2])["top"].shape == (2, 2)


# --- What else runs it ---


class Counted(nn.Module):
    """Counts its calls."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, data: Tensor) -> Tensor:
        """Returns the logits."""
        self.calls += 1
        return self.inner(data)


@pytest.mark.filterwarnings("ignore:The programs change what outlives a run")
def test_a_step_calls_each_network_once() -> None:
    nets = {name: Counted(net) for name, net in LAYERED.items()}
    single = Counted(fresh())
    for guide, counted in (
        (vfe.AutoAmortized(machine, nets, INPUTS), list(nets.values())),
        (vfe.AutoAmortized(machine, single), [single]),
    ):
        elbo = vfe.FreeEnergy()
        elbo.loss(machine, guide, BITS)
        before = [net.calls for net in counted]
        for _ in range(3):
            elbo.loss(machine, guide, BITS)
        # The second and fourth call are checked by one more run.
        assert [net.calls - calls for net, calls in zip(counted, before, strict=True)] == [3 + 2] * len(counted)


def test_its_first_look_leaves_the_random_stream_alone() -> None:
    guide = new_guide()
    pyro.set_rng_seed(1)
    vfe.FreeEnergy().loss(machine, guide, BITS)
    found = torch.rand(())
    pyro.set_rng_seed(1)
    assert found == torch.rand(())


@pytest.mark.parametrize("parallel", [True, False])
def test_Predictive_draws_from_it(parallel: bool) -> None:
    guide = vfe.AutoAmortized(machine, LAYERED, INPUTS)
    draws = Predictive(machine, guide=guide, num_samples=300, parallel=parallel)(BITS[:2])
    assert draws["u"].shape == (300, 2, 6)
    q_mid, q_top = LAYERED["mid"](BITS[:2]).sigmoid(), LAYERED["top"](words(3)).sigmoid()
    q_word = log_bernoulli(LAYERED["mid"](BITS[:2])[:, None], words(3)).exp()
    for name, expected in (("mid", q_mid), ("top", q_word @ q_top)):
        error = (expected * (1 - expected) / 300).sqrt()
        assert bool(((draws[name].mean(0) - expected).abs() < 5 * error).all())


def test_TraceEnum_ELBO_takes_it_as_a_guide_too() -> None:
    guide = vfe.AutoAmortized(nested, PAIRS["nested"].network)
    marked = pyro.infer.config_enumerate(guide.forward, default="parallel")
    ours = vfe.FreeEnergy().loss(nested, guide, GRID)
    assert ours == pytest.approx(TraceEnum_ELBO(max_plate_nesting=2).loss(nested, marked, GRID), rel=1e-10)


# --- Latents that are drawn ---


def wide(u: Tensor) -> None:
    with pyro.plate("data", len(u)):
        top = pyro.sample("top", dist.Bernoulli(logits=TOP_BIAS).to_event(1))
        mid = pyro.sample("mid", dist.Bernoulli(logits=(top @ noise(2, 24, seed=1))).to_event(1))
        pyro.sample("u", dist.Bernoulli(logits=mid @ noise(24, 6, seed=2)).to_event(1), obs=u)


def test_a_layer_with_too_many_values_to_list_is_drawn_by_the_guide() -> None:
    nets = {"mid": network((6, 24), seed=3), "top": network((24, 2), seed=4)}
    guide = vfe.AutoAmortized(wide, nets, INPUTS)
    seen = Programs().enumerate(wide, guide, (BITS,), {})
    assert (set(seen.supports), set(seen.draws)) == ({"top"}, {"mid"})
    svi = SVI(
        wide, guide, pyro.optim.Adam({"lr": 0.05}), loss=vfe.FreeEnergy(num_particles=4, vectorize_particles=True)
    )
    losses = torch.tensor([svi.step(BITS) for _ in range(60)])
    assert losses[-20:].mean() < losses[:20].mean()


def test_a_latent_that_the_model_wants_drawn_is_drawn() -> None:
    def model(u: Tensor) -> None:
        machine_with = pyro.poutine.infer_config(
            machine, lambda site: {"enumerate": None} if site["name"] == "mid" else {}
        )
        machine_with(u)

    guide = vfe.AutoAmortized(model, LAYERED, INPUTS)
    seen = Programs().enumerate(model, guide, (BITS,), {})
    assert (set(seen.supports), set(seen.draws)) == ({"top"}, {"mid"})
    expected, _ = machine_by_hand(BITS)
    elbo = vfe.FreeEnergy(num_particles=3000, vectorize_particles=True)
    assert elbo.loss(model, guide, BITS) == pytest.approx(expected.item(), rel=0.02)


# --- Errors ---


def in_two_plates(u: Tensor) -> None:
    g = pyro.sample("g", dist.Categorical(torch.ones(3) / 3))
    with pyro.plate("data", len(u)):
        z = pyro.sample("z", dist.Bernoulli(0.2 + 0.2 * g))
        pyro.sample("u", dist.Bernoulli(logits=z[..., None] * U_WEIGHT[0]).to_event(1), obs=u)


def continuous(u: Tensor) -> None:
    pyro.sample("w", dist.Normal(0.0, 1.0))


def clashing(mid: Tensor) -> None:
    machine(mid)


def with_bias(net: Any, element: int, bias: float) -> nn.Module:
    with torch.no_grad():
        net[-1].bias[element] = bias
    return net


class Summed(nn.Module):
    """A network that forgets its dims."""

    def forward(self, data: Tensor) -> Tensor:
        """Returns one number."""
        return data.sum()


def amortized(model: Any, net: Any, *args: Any, **options: Any) -> Callable[[], Any]:
    """A call of the guide on the data."""
    return lambda: vfe.AutoAmortized(model, net() if inspect.isfunction(net) else net, **options)(*args or (BITS,))


ERRORS: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "last dim": (
        ShapeError,
        r"'top', 'mid' returned shape \(5, 3\) where \(5, 5\) is wanted: plate 'data' \(5\), then 5 logits: 'top' 2 "
        r"\(Bernoulli vector of shape \(2,\)\), 'mid' 3 \(Bernoulli vector.*last layer 5 outputs",
        amortized(machine, lambda: nn.Linear(6, 3)),
    ),
    "last dim with edges": (
        ShapeError,
        r"\(5, 5\) where \(5, 14\) is wanted.* 'top' 2 .*'mid' 12 \(.* = 4 x 3, given 'top'\)",
        amortized(machine, fresh, edges="model"),
    ),
    "last dim of a chain": (
        ShapeError,
        r"\(4, 3\) where \(4, 9\) is wanted: plate 'time' \(4\), then 9 .*'z' 9 \(MarkovChain = 3 x 3, given the state",
        amortized(chain, lambda: nn.Linear(2, 3), POINTS, edges="model"),
    ),
    "batch": (
        ShapeError,
        r"returned shape \(3, 5\) where \(5, 5\) is wanted.*dims but the last are the plates'",
        amortized(machine, fresh, inputs=lambda u: u[:3]),
    ),
    "batch of a network of a latent": (
        ShapeError,
        r"latent site 'top' returned shape \(8, 2\) where \(8, 5, 2\) is wanted",
        lambda: vfe.FreeEnergy().loss(
            machine,
            vfe.AutoAmortized(machine, {**LAYERED, "top": nn.Sequential(nn.Flatten(), LAYERED["top"])}, INPUTS),
            BITS,
        ),
    ),
    "batch of a global latent": (
        ShapeError,
        r"'g' returned shape \(5, 3\) where \(3,\) is wanted: no plate, then 3 logits: 'g' 3 \(Categorical\)",
        amortized(in_two_plates, lambda: {"g": nn.Linear(6, 3), "z": nn.Linear(6, 1)}),
    ),
    "batch of a subsample": (
        ShapeError,
        r"returned shape \(4, 3\) where \(3, 3\) is wanted: plate 'data' \(3 of 5\)",
        amortized(
            subsampled,
            LAYERED["mid"],
            BITS,
            ROWS,
            inputs=lambda u, rows: u[:4],
            create_plates=lambda u, rows: pyro.plate("data", 5, subsample=rows),
        ),
    ),
    "input": (
        ShapeError,
        r"'top', 'mid' cannot read its input, float64 of shape \(5, 6\): .*multiplied.* Let inputs be",
        amortized(machine, lambda: nn.Linear(4, 5)),
    ),
    "dtype": (ShapeError, "float32 of shape", amortized(machine, fresh, BITS.float())),
    "a tuple": (ShapeError, "returned a tuple where", amortized(machine, lambda: nn.LSTM(6, 5))),
    "a number": (ShapeError, "returned a number where", amortized(machine, Summed())),
    "NaN": (
        NotFiniteError,
        "NaN or infinity for 5 of 10 logits of latent site 'top'",
        lambda: amortized(machine, with_bias(fresh(), 1, torch.nan))(),
    ),
    "infinity": (
        NotFiniteError,
        "infinity for 4 of 12 logits of latent site 'z'",
        lambda: amortized(chain, with_bias(network((2, 3), seed=1), 0, torch.inf), POINTS)(),
    ),
    "NaN in a chain": (
        NotFiniteError,
        "NaN or infinity for 4 of 36 logits of latent site 'z'",
        lambda: vfe.AutoAmortized(chain, with_bias(network((2, 9), seed=1), 2, torch.nan), edges="model")(POINTS),
    ),
    "two plates": (
        StructureError,
        r"in different plates: 'g' in none; 'z' in 'data'.*network=\{'g': ..., 'z': ...\}. That of 'g' reads the whole",
        amortized(in_two_plates, fresh),
    ),
    "no latent": (StructureError, "no discrete latent", amortized(continuous, fresh)),
    "no network of a latent": (
        StructureError,
        r"no network for latent site 'top'.*hide=\['top'\]",
        amortized(machine, {"mid": LAYERED["mid"]}),
    ),
    "a network of nothing": (
        StructureError,
        "a network for 'bottom', which is no discrete latent.*'top', 'mid'",
        amortized(machine, {**LAYERED, "bottom": nn.Linear(6, 1)}),
    ),
    "no module": (StructureError, "given a function as its network", lambda: vfe.AutoAmortized(machine, fresh)),
    "a class": (StructureError, "the class Tanh as the network of 'mid'", amortized(machine, {"mid": nn.Tanh})),
    "a lazy module": (StructureError, "a lazy module", amortized(machine, lambda: nn.LazyLinear(5))),
    "no networks": (StructureError, "given no network", amortized(machine, {})),
    "inputs of no network": (
        StructureError,
        "inputs for 'u', which has no network.*'mid', 'top'",
        amortized(machine, LAYERED, inputs={"u": "u"}),
    ),
    "a mapping of inputs for one network": (
        StructureError,
        "a mapping as its inputs",
        amortized(machine, fresh, inputs=INPUTS),
    ),
    "inputs with weights": (
        StructureError,
        r"a module with weights as inputs.*Sequential",
        lambda: vfe.AutoAmortized(machine, fresh(), inputs=nn.Linear(6, 6)),
    ),
    "strange inputs": (StructureError, r"inputs=3 for", amortized(machine, fresh, inputs=3)),
    "an unknown input": (
        StructureError,
        "reads 'x', which is no argument.* arguments 'u' and the latents 'top', 'mid'",
        amortized(machine, fresh, inputs="x"),
    ),
    "a latent for one network": (
        StructureError,
        "cannot read the value of one of them, 'mid'",
        amortized(machine, fresh, inputs=["u", "mid"]),
    ),
    "itself": (
        StructureError,
        "'mid' reads the site itself",
        amortized(machine, LAYERED, inputs={"mid": ["u", "mid"]}),
    ),
    "a circle of inputs": (
        StructureError,
        "in a cycle: 'top' -> 'mid' -> 'top'",
        amortized(machine, LAYERED, inputs={"mid": "top", "top": "mid"}),
    ),
    "a circle of edges": (
        StructureError,
        "in a cycle: 'top' -> 'mid' -> 'top'",
        amortized(machine, fresh, edges=[("top", "mid"), ("mid", "top")]),
    ),
    "an edge out of a plate": (
        StructureError,
        "'g' cannot depend on 'z', which has a value for each element of plate 'data'",
        amortized(in_two_plates, lambda: {"g": nn.Linear(6, 3), "z": nn.Linear(6, 1)}, edges=[("z", "g")]),
    ),
    "an edge from nowhere": (
        StructureError,
        r"the edge \('u', 'mid'\), and 'u' is no",
        amortized(machine, fresh, edges=[("u", "mid")]),
    ),
    "an edge to itself": (StructureError, "'mid' is no chain", amortized(machine, fresh, edges=[("mid", "mid")])),
    "no edge": (StructureError, "the edge 'mid'", amortized(machine, fresh, edges=["mid"])),
    "edges of nothing": (StructureError, "edges='tree'", amortized(machine, fresh, edges="tree")),
    "one name for two": (
        NameClashError,
        "'mid' stands for two things",
        amortized(clashing, LAYERED, inputs={"mid": lambda mid: mid, "top": "mid"}),
    ),
    "no argument": (StructureError, "called without one", lambda: vfe.AutoAmortized(lambda: machine(BITS), fresh())()),
    "None": (
        StructureError,
        "Argument 'extra'.* is None",
        lambda: vfe.AutoAmortized(Machine(), fresh(), "extra")(u=BITS),
    ),
    "a list": (
        StructureError,
        "'data'.* is a list",
        lambda: vfe.AutoAmortized(lambda data: machine(data[0]), fresh())([BITS]),
    ),
    "inputs that do not join": (
        StructureError,
        r"cannot be joined.*'u' \(5, 6\), 'extra' \(4, 2\)",
        lambda: vfe.AutoAmortized(Machine(), WIDE, ["u", "extra"])(u=BITS, extra=POINTS),
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_names_the_site_the_fact_and_the_way_out(name: str) -> None:
    kind, message, call = ERRORS[name]
    with pytest.raises(kind, match=message) as caught:
        call()
    assert type(caught.value) is kind


def test_dropout_behind_a_latent_is_found_by_the_spot_check_and_before_it_is_not_random_within_a_run() -> None:
    dropping = nn.Sequential(nn.Dropout(0.5), LAYERED["mid"])
    vfe.FreeEnergy(check="always").loss(machine, vfe.AutoAmortized(machine, {**LAYERED, "mid": dropping}, INPUTS), BITS)
    guide = vfe.AutoAmortized(machine, {**LAYERED, "top": nn.Sequential(nn.Dropout(0.5), LAYERED["top"])}, INPUTS)
    with pytest.raises(SpotCheckError, match=r"'top'.*Dropout"):
        vfe.FreeEnergy().loss(machine, guide, BITS)
    guide.eval()
    expected, _ = machine_by_hand(BITS)
    assert vfe.FreeEnergy().loss(machine, guide, BITS) == pytest.approx(expected.item(), rel=1e-12)
