"""A dream is what the model without its data draws, and it goes where the data were."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import PROGRAMS
from programs.case import Program, bernoulli, categorical, noise, simplex, tensor, unit
from programs.networks import POINTS, MixtureModule
from pyro import poutine
from torch import Tensor

import pyro_vfe as vfe
from pyro_vfe.errors import StructureError, VFEError

NAN = float("nan")


def pairs(u: Any) -> None:
    """A coin that shows through another, u whatever can be made a tensor."""
    data = torch.as_tensor(u).double()
    with pyro.plate("data", len(data)):
        v = bernoulli("v", 0.3)
        pyro.sample("u", dist.Bernoulli(0.1 + 0.8 * v), obs=data)


def has_factor(program: Program) -> bool:
    trace = poutine.trace(program.model).get_trace(*program.args, **program.kwargs)
    return any(type(site.get("fn")).__name__ == "Unit" for site in trace.nodes.values())


def as_given(observations: Any, *args: Any, **kwargs: Any) -> Any:
    return args, kwargs


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_every_program_dreams_data_that_it_can_observe(name: str) -> None:
    program = PROGRAMS[name]
    if has_factor(program):
        with pytest.raises(StructureError, match=r"pyro\.factor"):
            vfe.dream(program.model, *program.args, dream_to_args=as_given, **program.kwargs)
        return
    made_up = vfe.dream(program.model, *program.args, dream_to_args=as_given, **program.kwargs)
    data = poutine.trace(program.model).get_trace(*program.args, **program.kwargs)
    data.compute_log_prob()
    shapes = {site: data.nodes[site]["value"].shape for site in data.observation_nodes}
    computed = {site for site in shapes if data.nodes[site]["infer"].get("_deterministic")}
    # A program that branches may observe other sites in a dream.
    for site, value in made_up.observations.items():
        assert value.shape == shapes.get(site, value.shape)
        assert not value.requires_grad
    assert computed.isdisjoint(made_up.observations)
    assert not made_up.latents.keys() & made_up.observations.keys()


def test_a_dream_is_drawn_as_pyro_draws_what_is_not_observed() -> None:
    u = torch.zeros(50)
    pyro.set_rng_seed(3)
    made_up = vfe.dream(pairs, u)
    pyro.set_rng_seed(3)
    trace = poutine.trace(poutine.uncondition(pairs)).get_trace(u)
    assert torch.equal(made_up.latents["v"], trace.nodes["v"]["value"])
    assert torch.equal(made_up.observations["u"], trace.nodes["u"]["value"])
    assert torch.equal(made_up.args[0], made_up.observations["u"])


def test_dreams_are_as_frequent_as_the_model_says() -> None:
    number = 40_000
    made_up = vfe.dream(pairs, torch.zeros(number))
    v, u = made_up.latents["v"], made_up.args[0]
    probs = {(0, 0): 0.7 * 0.9, (0, 1): 0.7 * 0.1, (1, 0): 0.3 * 0.1, (1, 1): 0.3 * 0.9}
    for (a, b), prob in probs.items():
        found = float(((v == a) & (u == b)).double().mean())
        assert abs(found - prob) < 4 * (prob * (1 - prob) / number) ** 0.5


@pytest.mark.parametrize(
    "data",
    [
        torch.zeros(6, dtype=torch.bool),
        torch.zeros(6, dtype=torch.long),
        torch.zeros(6, dtype=torch.float32),
        np.zeros(6, dtype=np.int32),
        np.zeros(6, dtype=bool),
        [0, 0, 0, 0, 0, 0],
        (0.0,) * 6,
    ],
    ids=["bool", "int", "float32", "array", "bool array", "list", "tuple"],
)
def test_a_dream_has_the_type_of_the_argument(data: Any) -> None:
    made_up = vfe.dream(pairs, data).args[0]
    assert type(made_up) is type(data)
    assert len(made_up) == len(data)
    assert getattr(made_up, "dtype", type(made_up[0])) == getattr(data, "dtype", type(data[0]))
    assert set(torch.as_tensor(made_up).double().tolist()) <= {0.0, 1.0}


def test_a_number_that_is_observed_is_dreamt_as_a_number() -> None:
    def one(u: float) -> None:
        pyro.sample("u", dist.Normal(7.0, 0.1), obs=torch.tensor(u))

    (dreamt,) = vfe.dream(one, 0.0).args
    assert isinstance(dreamt, float)
    assert abs(dreamt - 7.0) < 1.0


def test_arguments_stay_where_they_are() -> None:
    def two(u: Tensor, size: int, *rest: Any, w: Tensor, **more: Any) -> None:
        with pyro.plate("data", size):
            pyro.sample("u", dist.Normal(1.0, 0.01), obs=u)
            pyro.sample("w", dist.Normal(2.0, 0.01), obs=w)
            pyro.sample("x", dist.Normal(3.0, 0.01), obs=more["x"])

    zeros = torch.zeros(4)
    made_up = vfe.dream(two, zeros, 4, "other", x=zeros, w=zeros, flag=True)
    assert made_up.args[1:] == (4, "other")
    assert list(made_up.kwargs) == ["x", "w", "flag"]
    assert made_up.kwargs["flag"] is True
    for dreamt, mean in ((made_up.args[0], 1.0), (made_up.kwargs["w"], 2.0), (made_up.kwargs["x"], 3.0)):
        assert torch.allclose(dreamt, torch.full((4,), mean), atol=0.2)
    assert torch.equal(zeros, torch.zeros(4))


class _Owner:
    def model(self, u: Tensor) -> None:
        pairs(u)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: poutine.infer_config(model, lambda site: {"enumerate": None}),
        lambda model: poutine.scale(poutine.infer_config(model, lambda site: {}), 2.0),
        pyro.infer.config_enumerate,
        partial,
        lambda model: partial(lambda unused, u: model(u), None),
        lambda model: _Owner().model,
    ],
    ids=["infer_config", "handlers", "config_enumerate", "partial", "bound", "method"],
)
def test_a_signature_is_found_inside_wrappers(wrap: Callable[[Any], Any]) -> None:
    made_up = vfe.dream(wrap(pairs), torch.full((200,), 0.5))
    assert set(made_up.args[0].tolist()) == {0.0, 1.0}


def test_a_module_dreams_by_the_signature_of_its_forward() -> None:
    made_up = vfe.dream(MixtureModule(), points=POINTS, dream_to_args=lambda seen, points: ((), {"points": seen["u"]}))
    assert made_up.kwargs["points"].shape == POINTS.shape
    assert not torch.equal(made_up.kwargs["points"], POINTS)
    assert made_up.latents.keys() == {"flip", "z"}


@pytest.mark.parametrize("given", [True, False])
def test_a_subsample_is_dreamt_and_the_rest_of_the_data_stays(given: bool) -> None:
    chosen = torch.tensor([4, 1]) if given else None

    def model(u: Tensor) -> None:
        with pyro.plate("data", 6, subsample_size=2, subsample=chosen) as index:
            pyro.sample("u", dist.Normal(100.0, 1.0).expand([2, 3]).to_event(1), obs=u[index])

    u = noise(6, 3, seed=1)
    made_up = vfe.dream(model, u)
    index = made_up.subsamples["data"]
    assert chosen is None or torch.equal(index, chosen)
    assert torch.equal(made_up.args[0][index], made_up.observations["u"])
    others = [i for i in range(6) if i not in index.tolist()]
    assert torch.equal(made_up.args[0][others], u[others])
    assert (made_up.args[0][index] > 90).all()


def test_two_subsampled_plates_are_dreamt_where_they_cross() -> None:
    rows, columns = torch.tensor([0, 2]), torch.tensor([3, 1, 0])

    def model(u: Tensor) -> None:
        with pyro.plate("rows", 4, subsample=rows, dim=-2), pyro.plate("columns", 5, subsample=columns, dim=-1):
            pyro.sample("u", dist.Normal(100.0, 1.0), obs=u[rows][:, columns])

    made_up = vfe.dream(model, torch.zeros(4, 5))
    dreamt = torch.zeros(4, 5, dtype=torch.bool)
    dreamt[rows[:, None], columns] = True
    assert torch.equal(made_up.args[0] > 90, dreamt)
    assert torch.equal(made_up.args[0][rows][:, columns], made_up.observations["u"])


def test_what_a_mask_hides_stays_as_it_is() -> None:
    u = tensor([1.0, NAN, 0.0, NAN])

    def model(u: Tensor) -> None:
        with pyro.plate("data", 4), poutine.mask(mask=~u.isnan()):
            pyro.sample("u", dist.Normal(50.0, 1.0), obs=u)

    (dreamt,) = vfe.dream(model, u).args
    assert torch.equal(dreamt.isnan(), u.isnan())
    assert (dreamt[[0, 2]] > 40).all()


def test_a_site_with_an_obs_mask_is_the_argument_of_its_own_name() -> None:
    u = tensor([[1.0, 1.0], [NAN, NAN], [0.0, 0.0]])

    def model(u: Tensor) -> None:
        with pyro.plate("data", 3):
            known = ~u[:, 0].isnan()
            pyro.sample("u", dist.Normal(50.0, 1.0).expand([3, 2]).to_event(1), obs=u, obs_mask=known)

    made_up = vfe.dream(model, u)
    assert torch.equal(made_up.args[0].isnan(), u.isnan())
    assert (made_up.args[0][[0, 2]] > 40).all()
    assert made_up.latents.keys() == {"u_unobserved"}


def test_what_nothing_observes_is_a_latent() -> None:
    def model(u: Tensor, label: Tensor | None = None) -> None:
        with pyro.plate("data", len(u)):
            own = pyro.sample("label", dist.Bernoulli(0.5), obs=label)
            pyro.sample("u", dist.Normal(own, 1.0), obs=u)

    assert vfe.dream(model, torch.zeros(3)).latents.keys() == {"label"}
    assert vfe.dream(model, torch.zeros(3), torch.ones(3)).observations.keys() == {"label", "u"}


def test_computed_sites_are_neither_drawn_nor_arguments() -> None:
    def model(u: Tensor) -> None:
        v = bernoulli("v", 0.5)
        mean = pyro.deterministic("mean", 100.0 * v)
        pyro.sample("u", dist.Normal(mean, 0.1), obs=u)

    made_up = vfe.dream(model, torch.zeros(()))
    assert made_up.latents.keys() == {"v"}
    assert made_up.observations.keys() == {"u"}


def test_a_chain_dreams_of_whole_series() -> None:
    initial, transition = simplex("initial", 2, seed=1), tensor([[0.99, 0.01], [0.02, 0.98]])

    def model(u: Tensor) -> None:
        with pyro.plate("series", 300, dim=-2), pyro.plate("time", 20, dim=-1):
            z = pyro.sample("z", vfe.MarkovChain(initial, transition))
            pyro.sample("u", dist.Normal(10.0 * z, 0.1), obs=u)

    made_up = vfe.dream(model, torch.zeros(300, 20))
    states = (made_up.args[0] > 5).long()
    assert torch.equal(states, made_up.latents["z"])
    changes = (states[:, 1:] != states[:, :-1]).double()
    assert 0 < float(changes.mean()) < 0.04


def test_a_program_that_branches_dreams_of_either_branch() -> None:
    def model(u: Tensor) -> None:
        v = bernoulli("v", 0.5)
        if v.item():
            bernoulli("w", 0.5)
        pyro.sample("u", dist.Normal(v, 0.1), obs=u)

    seen = {frozenset(vfe.dream(model, torch.zeros(())).latents) for _ in range(30)}
    assert seen == {frozenset({"v"}), frozenset({"v", "w"})}


def test_a_function_places_what_names_do_not() -> None:
    def model(data: dict[str, Tensor]) -> None:
        with pyro.plate("data", 3):
            v = categorical("v", simplex("weights", 2))
            pyro.sample("left", dist.Normal(100.0 + v, 0.1), obs=data["pair"][:, 0])
            pyro.sample("right", dist.Normal(200.0 + v, 0.1), obs=data["pair"][:, 1])

    def place(seen: Any, data: Any) -> Any:
        return ({"pair": torch.stack([seen["left"], seen["right"]], -1)},), {}

    with pytest.raises(StructureError, match=r"'left' is observed.*'data'.*dream_to_args"):
        vfe.dream(model, {"pair": torch.zeros(3, 2)})
    made_up = vfe.dream(model, {"pair": torch.zeros(3, 2)}, dream_to_args=place)
    assert torch.equal(made_up.args[0]["pair"][:, 1], made_up.observations["right"])


def _logarithm(u: Tensor) -> None:
    with pyro.plate("data", 3):
        pyro.sample("u", dist.Normal(0.0, 1.0), obs=u.log())


def _columns(u: Tensor) -> None:
    with pyro.plate("data", 3):
        pyro.sample("u", dist.Normal(0.0, 1.0), obs=u[:, 0])


def _factor(u: Tensor) -> None:
    pairs(u)
    pyro.factor("penalty", torch.tensor(-1.0))


def _inside(u: dict[str, Tensor]) -> None:
    with pyro.plate("data", 3):
        pyro.sample("u", dist.Normal(0.0, 1.0), obs=u["u"])


@pytest.mark.parametrize(
    ("model", "args", "words"),
    [
        (_logarithm, (torch.ones(3),), "'u' observes other values than argument 'u'"),
        (_columns, (torch.ones(3, 2),), r"shape \(3,\) and argument 'u' has shape \(3, 2\)"),
        (_factor, (torch.ones(3),), r"'penalty' of the model is a pyro\.factor"),
        (_inside, ({"u": torch.ones(3)},), "no place in argument 'u', which is a dict"),
        (lambda *all_of_them: pairs(all_of_them[0]), (torch.ones(3),), "arguments have no names"),
    ],
    ids=["computed", "cut out", "factor", "dict", "variadic"],
)
def test_a_dream_without_a_place_is_refused(model: Any, args: tuple[Any, ...], words: str) -> None:
    with pytest.raises(StructureError, match=words):
        vfe.dream(model, *args)


@pytest.mark.parametrize("made", [None, torch.zeros(3), (torch.zeros(3), {}), ((), ()), [(), {}]])
def test_a_function_that_returns_no_arguments_is_refused(made: Any) -> None:
    with pytest.raises(StructureError, match="and not the programs' arguments"):
        vfe.dream(pairs, torch.zeros(3), dream_to_args=lambda *args, **kwargs: made)


def test_data_in_the_place_of_a_model_are_refused() -> None:
    with pytest.raises(VFEError, match="cannot be called"):
        vfe.dream(torch.zeros(3))  # type: ignore[arg-type]


def test_dreams_carry_no_gradient_and_leave_parameters_alone() -> None:
    def model(u: Tensor) -> None:
        with pyro.plate("data", 3):
            w = pyro.sample("w", dist.Normal(unit("p"), 1.0))
            pyro.sample("u", dist.Normal(w, 1.0), obs=u)

    made_up = vfe.dream(model, torch.zeros(3))
    assert not made_up.latents["w"].requires_grad
    assert not made_up.args[0].requires_grad
    assert all(leaf.grad is None for leaf in pyro.get_param_store()._params.values())


def test_a_dream_shows_names_and_shapes_in_a_line() -> None:
    def model(u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            v = pyro.sample("v", dist.Bernoulli(0.5))
            pyro.sample("u", dist.Normal(v, 1.0), obs=u)

    assert repr(vfe.dream(model, torch.zeros(7))) == "Dream of 'u' (7,), from 'v' (7,)"
    assert str(vfe.dream(lambda: None)) == "Dream of nothing, from nothing"
