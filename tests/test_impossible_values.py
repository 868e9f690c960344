"""Numbers that are none, at values of probability zero: they count for nothing, in F and in every gradient.

The oracle is the joint table of the same program with a number in their place: at probability zero it does not matter.
"""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from checks import assert_equal
from oracles import TERMS, oracle
from programs.case import categorical, empty, simplex, tensor
from torch import Tensor
from torch.distributions import constraints

import pyro_vfe as vfe
from pyro_vfe.errors import NotFiniteError, VFEError

NAN = torch.nan
P = tensor([0.3, 0.7, 0.0])
U = tensor([0.1, -0.4, 2.0])

Model = Callable[[float], None]
"""A program with a number at an impossible value."""


def one_datum(at: float) -> None:
    means = pyro.param("means", tensor([0.0, 1.0])) * torch.ones(2)
    scale = pyro.param("scale", tensor(1.3), constraint=constraints.positive)
    z = categorical("z", P)
    pyro.sample("u", dist.Normal(torch.cat([means, tensor([at])])[z], scale), obs=U[0])


def in_a_plate(at: float) -> None:
    means = pyro.param("means", tensor([0.0, 1.0]))
    scale = pyro.param("scale", tensor(1.3), constraint=constraints.positive)
    with pyro.plate("data", 3):
        z = categorical("z", P)
        pyro.sample("u", dist.Normal(torch.cat([means, tensor([at])])[z], scale), obs=U)


def scales(at: float) -> None:
    """An invalid scale, NaN or -1."""
    means = pyro.param("means", tensor([0.0, 1.0, 2.0]))
    with pyro.plate("data", 3):
        z = categorical("z", P)
        pyro.sample("u", dist.Normal(means[z], tensor([1.0, 2.0, at])[z]), obs=U)


def unvalidated(at: float) -> None:
    means = pyro.param("means", tensor([0.0, 1.0]))
    with pyro.plate("data", 3):
        z = categorical("z", P)
        loc = torch.cat([means, tensor([at])])[z]
        pyro.sample("u", dist.Normal(loc, 1.3, validate_args=False), obs=U)


def each_datum_its_own(at: float) -> None:
    """What is impossible differs from element to element."""
    means = pyro.param("means", tensor([0.0, 1.0, 2.0]))
    holes = torch.where(torch.eye(3) == 1, at, 0.0)
    with pyro.plate("data", 3):
        z = categorical("z", (1 - torch.eye(3)) / 2)
        offsets = holes[torch.arange(3), z]
        pyro.sample("u", dist.Normal(means[z] + offsets, 1.0), obs=U)


def below_another_latent(at: float) -> None:
    """What is impossible depends on another latent."""
    shift = pyro.param("shift", tensor(0.2))
    y = categorical("y", simplex("p_y", 2))
    z = categorical("z", tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])[y])
    means = torch.where(tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]) == 1, at, tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]))
    pyro.sample("u", dist.Normal(means[y, z] + shift, 1.0), obs=U[0])


def a_latent_below(at: float) -> None:
    """A latent that has no distribution there."""
    means = pyro.param("means", tensor([0.0, 1.0]))
    z = categorical("z", P)
    y = categorical("y", torch.cat([simplex("rows", 2, 2), tensor([[at, 1 - at]])])[z])
    with pyro.plate("data", 3):
        pyro.sample("u", dist.Normal(means[y], 1.0), obs=U)


def rates(at: float) -> None:
    rate = pyro.param("rate", tensor(1.5), constraint=constraints.positive)
    z = pyro.sample("z", dist.Bernoulli(tensor(0.0)))
    with pyro.plate("data", 3):
        pyro.sample("u", dist.Poisson(torch.where(z == 1, at, rate)), obs=tensor([1.0, 0.0, 3.0]))


def events(at: float) -> None:
    means = pyro.param("means", tensor([[0.0, 1.0], [1.0, 2.0]]))
    with pyro.plate("data", 3):
        z = categorical("z", P)
        table = torch.cat([means, tensor([[at, 0.5]])])
        pyro.sample("u", dist.Normal(table[z], 1.0).to_event(1), obs=torch.stack([U, U + 1], -1))


def logs(at: float) -> None:
    """A distribution that is made of another."""
    means = pyro.param("means", tensor([0.0, 1.0]))
    with pyro.plate("data", 3):
        z = categorical("z", P)
        pyro.sample("u", dist.LogNormal(torch.cat([means, tensor([at])])[z], 0.7), obs=U.exp())


MODELS: dict[str, Model] = {
    model.__name__: model
    for model in (
        one_datum,
        in_a_plate,
        scales,
        unvalidated,
        each_datum_its_own,
        below_another_latent,
        a_latent_below,
        rates,
        events,
        logs,
    )
}
NEGATIVE = {"scales": -1.0, "rates": -2.0, "a_latent_below": -3.0}
"""Numbers that are no NaN, and invalid."""

CASES = [(name, NAN) for name in MODELS] + list(NEGATIVE.items())


@pytest.mark.parametrize(("name", "at"), CASES)
def test_an_impossible_value_contributes_nothing(name: str, at: float) -> None:
    model = MODELS[name]
    exact = oracle(model, empty_of, 0.5)
    gradients = {parameter: gradient.clone() for parameter, gradient in exact.gradients().items()}
    elbo = vfe.FreeEnergy()
    for _ in range(3):  # The second call knows, and the third is compared with an ordinary run.
        for leaf in pyro.get_param_store()._params.values():
            leaf.grad = None
        assert_equal(tensor(elbo.loss_and_grads(model, None, at)), exact.terms["free_energy"], 1e-10)
        for parameter, gradient in gradients.items():
            assert_equal(pyro.get_param_store()._params[parameter].grad, gradient, 1e-8)
    posterior = vfe.posterior(model, at)
    assert_equal(posterior.log_evidence, exact.posterior.log_evidence, 1e-10)
    assert_equal(posterior.marginal("z"), exact.posterior.marginal("z"), 1e-10)
    if name not in ("one_datum", "below_another_latent", "a_latent_below", "rates"):
        found = elbo.decompose(model, None, at).by("data")
        assert_equal(found.surprise, exact.by("data")["surprise"], 1e-10)


def empty_of(at: float) -> None:
    """A guide without sites."""


def chains(at: float) -> None:
    """A state that no path leads to, and one that none leads to at the first step."""
    means = pyro.param("means", tensor([0.0, 1.0]))
    initial = tensor([1.0, 0.0, 0.0])
    transition = torch.cat([simplex("rows", 2, 2), torch.zeros(2, 1)], -1)
    with pyro.plate("time", 3):
        steps = vfe.MarkovChain(initial, torch.cat([transition, tensor([[0.2, 0.3, 0.5]])]))
        z = pyro.sample("z", steps)
        first = torch.where(torch.arange(3) == 0, at, 0.0)
        loc = torch.cat([means, tensor([at])])[z] + torch.where(z == 1, first, 0.0)
        pyro.sample("u", dist.Normal(loc, 1.0), obs=U)


def test_states_that_no_path_leads_to_contribute_nothing() -> None:
    def loop(at: float) -> None:
        means = pyro.param("means", tensor([0.0, 1.0]))
        rows = simplex("rows", 2, 2)
        z = torch.tensor(0)
        for t in range(3):
            z = categorical(f"z_{t}", rows[z] if t else tensor([1.0, 0.0]))
            pyro.sample(f"u_{t}", dist.Normal(means[z], 1.0), obs=U[t])

    exact = oracle(loop, empty_of, 0.5)
    gradients = {parameter: gradient.clone() for parameter, gradient in exact.gradients().items()}
    assert_equal(tensor(vfe.FreeEnergy().loss_and_grads(chains, None, NAN)), exact.terms["free_energy"], 1e-10)
    for parameter, gradient in gradients.items():
        assert_equal(pyro.get_param_store()._params[parameter].grad, gradient, 1e-8)


def steps_in_a_loop(at: float) -> None:
    """A state that only itself leads to, and in which nothing begins."""
    means = pyro.param("means", tensor([0.0, 1.0]))
    rows = torch.cat([torch.cat([simplex("rows", 2, 2), torch.zeros(2, 1)], -1), tensor([[0.2, 0.3, 0.5]])])
    z = torch.tensor(0)
    for t in range(3):
        z = categorical(f"z_{t}", rows[z] if t else P)
        pyro.sample(f"u_{t}", dist.Normal(torch.cat([means, tensor([at])])[z], 1.0), obs=U[t])


def transitions_in_a_loop(at: float) -> None:
    """Steps of which some are impossible, and have no numbers."""
    rows = tensor([[0.4, 0.6], [1.0, 0.0]])
    means = torch.where(rows == 0, at, tensor([[0.0, 1.0], [2.0, 3.0]])) + pyro.param("shift", tensor(0.1))
    z = torch.tensor(0)
    for t in range(4):
        before, z = z, categorical(f"z_{t}", rows[z] if t else tensor([0.5, 0.5]))
        if t:
            pyro.sample(f"u_{t}", dist.Normal(means[before, z], 1.0), obs=U[t - 1])


def transitions_beside_another(at: float, p: float = 0.0) -> None:
    """Another latent may stand along the dim of one that it never meets: possible values must not pass for others."""
    first = categorical("first", tensor([0.5, 0.5]))
    z = categorical("z", tensor([[0.5, 0.5 - p, p], [0.5, 0.5, 0.0]])[first])
    other = categorical("other", tensor([0.4, 0.6]))
    means = torch.stack([tensor([0.0, 1.0, 0.5]), tensor([0.0, 1.0, at])])
    pyro.sample("u", dist.Normal(means[other, z] + pyro.param("shift", tensor(0.1)), 1.0), obs=U[0])


@pytest.mark.parametrize("model", [steps_in_a_loop, transitions_in_a_loop, transitions_beside_another])
def test_what_is_impossible_follows_from_latents_before(model: Model) -> None:
    exact = oracle(model, empty_of, 0.5)
    gradients = {parameter: gradient.clone() for parameter, gradient in exact.gradients().items()}
    assert_equal(tensor(vfe.FreeEnergy().loss_and_grads(model, None, NAN)), exact.terms["free_energy"], 1e-10)
    for parameter, gradient in gradients.items():
        assert_equal(pyro.get_param_store()._params[parameter].grad, gradient, 1e-8)


@pytest.mark.parametrize("p", [1e-9, 0.25])
def test_a_value_that_is_possible_under_one_value_of_another_latent_stays_an_error(p: float) -> None:
    pyro.set_rng_seed(3)
    with pytest.raises(VFEError):
        vfe.FreeEnergy().loss(transitions_beside_another, None, NAN, p)


def guide(at: float) -> None:
    """A guide that knows what is impossible."""
    with pyro.plate("data", 3):
        categorical("z", torch.cat([simplex("q", 3, 2, seed=4), torch.zeros(3, 1)], -1))


@pytest.mark.parametrize(("name", "at"), [("in_a_plate", NAN), ("scales", -1.0), ("scales", NAN), ("events", NAN)])
def test_a_guide_with_the_same_zeros_has_its_terms(name: str, at: float) -> None:
    model = MODELS[name]
    exact = oracle(model, guide, 0.5)
    gradients = {parameter: gradient.clone() for parameter, gradient in exact.gradients().items()}
    terms = vfe.FreeEnergy().decompose(model, guide, at)
    for term in TERMS:
        assert_equal(getattr(terms, term), exact.terms[term], 1e-10)
    vfe.FreeEnergy().loss_and_grads(model, guide, at)
    for parameter, gradient in gradients.items():
        assert_equal(pyro.get_param_store()._params[parameter].grad, gradient, 1e-8)


@pytest.mark.parametrize("name", ["in_a_plate", "scales", "each_datum_its_own"])
def test_em_learns_what_it_learns_from_a_number_in_its_place(name: str) -> None:
    found = []
    for at in (0.5, NAN):
        pyro.clear_param_store()
        run = vfe.EM(MODELS[name], floor=1e-3).run(at, max_iter=500, progress_bar=False)
        found.append(torch.tensor(run.free_energy))
    assert_equal(found[1], found[0], 1e-5)


def test_a_parameter_that_is_NaN_at_an_impossible_value_has_no_part_in_anything() -> None:
    def model(at: float) -> None:
        means = pyro.param("means", tensor([0.0, 1.0, at]))
        with pyro.plate("data", 3):
            z = categorical("z", P)
            pyro.sample("u", dist.Normal(means[z], 1.3), obs=U)

    exact = oracle(model, empty_of, 0.5)
    gradient = exact.gradients()["means"].clone()
    pyro.clear_param_store()
    assert_equal(tensor(vfe.FreeEnergy().loss_and_grads(model, None, NAN)), exact.terms["free_energy"], 1e-10)
    found = pyro.get_param_store()._params["means"].grad
    assert_equal(found[:2], gradient[:2], 1e-8)
    assert found[2] == 0


@pytest.mark.parametrize("least", [1e-300, 1e-9])
@pytest.mark.parametrize("at", [NAN, -1.0])
def test_an_invalid_number_at_a_possible_value_stays_an_error(at: float, least: float) -> None:
    def model(at: float) -> None:
        z = categorical("z", tensor([0.5, 0.5 - least, least]))
        pyro.sample("u", dist.Normal(0.0, tensor([1.0, 2.0, at])[z]), obs=U[0])

    with pytest.raises(VFEError):
        vfe.FreeEnergy().loss(model, None, at)
    with pytest.raises(VFEError):
        vfe.posterior(model, at)


def test_a_value_that_only_the_guide_calls_impossible_stays_an_error() -> None:
    def model(at: float) -> None:
        with pyro.plate("data", 3):
            z = categorical("z", tensor([0.3, 0.6, 0.1]))
            pyro.sample("u", dist.Normal(tensor([0.0, 1.0, at])[z], 1.3), obs=U)

    with pytest.raises(VFEError):
        vfe.FreeEnergy().decompose(model, guide, NAN)


def test_a_probability_that_is_masked_out_makes_nothing_impossible() -> None:
    def model(at: float) -> None:
        with pyro.poutine.mask(mask=False):
            z = categorical("z", P)
        pyro.sample("u", dist.Normal(tensor([0.0, 1.0, at])[z], 1.3), obs=U[0])

    with pytest.raises(VFEError):
        vfe.FreeEnergy().loss(model, None, NAN)


def test_data_that_a_distribution_cannot_take_are_refused_all_the_same() -> None:
    def model(at: float) -> None:
        z = categorical("z", P)
        pyro.sample("u", dist.Normal(tensor([0.0, 1.0, at])[z], 1.3), obs=U[0])
        pyro.sample("b", dist.Bernoulli(tensor([0.2, 0.3, 0.4])[z]), obs=tensor(2.0))

    with pytest.raises(VFEError):
        vfe.FreeEnergy().loss(model, None, NAN)


def test_a_zero_that_moves_has_no_slope_where_nothing_is_defined() -> None:
    """Of two impossible values one has numbers: its probability has the derivative of the sum."""

    def model(at: float) -> None:
        weights = pyro.param("weights", tensor([0.4, 0.6, 0.0, 0.0]))
        z = categorical("z", weights)
        pyro.sample("u", dist.Normal(tensor([0.0, 1.0, 2.0, at])[z], 1.0), obs=U[0])

    vfe.FreeEnergy().loss_and_grads(model, None, NAN)
    found = pyro.get_param_store()._params["weights"].grad
    density = dist.Normal(tensor([0.0, 1.0, 2.0]), 1.0).log_prob(U[0]).exp()
    evidence = (tensor([0.4, 0.6, 0.0]) * density).sum()
    assert_equal(found[:3], 1 - density / evidence, 1e-8)  # of weights that are divided by their sum
    assert found[3].isfinite()


def test_a_call_that_begins_to_be_invalid_is_looked_at_again() -> None:
    elbo, expected = vfe.FreeEnergy(), vfe.FreeEnergy().loss(in_a_plate, None, 0.5)
    assert elbo.loss(in_a_plate, None, 0.5) == expected
    for at in (NAN, 0.5, NAN):
        assert_equal(tensor(elbo.loss(in_a_plate, None, at)), tensor(expected), 1e-10)


def test_the_gradient_of_a_scale_that_all_values_share_is_finite() -> None:
    loss = vfe.FreeEnergy().differentiable_loss(one_datum, None, NAN)
    gradients: Any = torch.autograd.grad(loss, list(pyro.get_param_store()._params.values()))
    assert all(isinstance(one, Tensor) and bool(one.isfinite().all()) for one in gradients)


def test_a_parameter_that_is_NaN_at_a_possible_value_is_named_as_before() -> None:
    def model() -> None:
        means = pyro.param("means", tensor([0.0, NAN]))
        z = categorical("z", tensor([0.5, 0.5]))
        pyro.sample("u", dist.Normal(means[z], 1.0), obs=U[0])

    with pytest.raises(NotFiniteError, match="'means'"):
        vfe.FreeEnergy().loss(model, empty)
