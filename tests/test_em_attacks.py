"""Legal programs that were tried to make EM wrong without an error: M-phases against the full joint table.

    E_Q log P(v, u | theta')  >=  E_Q log P(v, u | theta)   for all theta,      Q = P(v | u) at the parameters before

Q and E_Q log P are sums over ordinary runs, one per joint assignment; the gradient is autograd's through these runs.
"""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from joint_table import Row, enumerate_runs
from programs.case import categorical, tensor
from pyro.infer.autoguide import AutoDelta
from torch import Tensor
from torch.distributions import constraints

import pyro_vfe as vfe
from examples.earthquakes import COUNTS as EARTHQUAKES
from pyro_vfe.program.parameters import unconstrained

Model = Callable[..., None]

COUNTS = tensor([1.0, 0.0, 7.0])
REALS = tensor([0.3, -1.2, 2.5])
BITS = tensor([1.0, 0.0, 1.0])
POINTS = tensor([[0.3, 1.0], [2.0, -1.0], [3.0, 2.5], [-1.0, -0.5]])
RATES = tensor([1.0, 5.0])


def parameter(name: str, start: Any, constraint: Any = constraints.real) -> Tensor:
    return pyro.param(name, lambda: tensor(start), constraint=constraint)


def weights(start: Any = (0.4, 0.6)) -> Tensor:
    return parameter("weights", start, constraints.simplex)


def rates(start: Any = (1.0, 5.0)) -> Tensor:
    return parameter("rates", start, constraints.positive)


def table(start: Any = ((0.7, 0.3), (0.2, 0.8))) -> Tensor:
    return parameter("table", start, constraints.simplex)


def unit() -> Tensor:
    return parameter("probs", [0.3, 0.6], constraints.unit_interval)


def observed(name: str, fn: Any, value: Tensor) -> None:
    pyro.sample(name, fn, obs=value)


def mixture(emission: Callable[[Tensor, Tensor], Any], weight: Callable[[], Tensor] = weights) -> Model:
    """A latent for each datum; `emission` takes the latent and the data, and says what is observed."""

    def model(data: Tensor) -> None:
        probs = weight()
        with pyro.plate("data", len(data)):
            emission(categorical("z", probs), data)

    return model


def chain(distribution: Callable[[], Any]) -> Model:
    def model(data: Tensor) -> None:
        with pyro.plate("time", len(data)):
            z = pyro.sample("z", distribution())
            observed("u", dist.Poisson(RATES[z]), data)

    return model


def loop(step: Callable[[int, Tensor | int, Tensor], Tensor]) -> Model:
    def model(data: Tensor) -> None:
        z: Tensor | int = 0
        for t in range(len(data)):
            z = step(t, z, data[t])

    return model


def expected_log_joint(rows: list[Row], q: Tensor) -> Tensor:
    """E_Q log P, every site times its scale."""
    totals = [torch.stack([(site.scale * site.log_prob).sum() for site in row.sites.values()]).sum() for row in rows]
    return torch.dot(q, torch.stack(totals))


def check_m_phase(model: Model, data: Tensor, **options: Any) -> dict[str, str]:
    """One iteration of EM: the full joint table's E_Q log P has not fallen and has no gradient, and F is its own.

    Args:
        model: The program.
        data: What it observes.
        options: Of EM.
    """

    em = vfe.EM(model, **options)
    em.e_phase(data)
    with torch.no_grad():
        before = enumerate_runs(model, data)
        q = torch.stack([row.log_joint for row in before]).softmax(0)
        start = expected_log_joint(before, q)
    result = em.m_phase(data)
    end = expected_log_joint(enumerate_runs(model, data), q)
    leaves = [unconstrained(name) for name in pyro.get_param_store() if unconstrained(name).requires_grad]
    gradients = torch.autograd.grad(end, leaves)
    size = float(end.detach().abs())
    assert end.detach() >= start - 1e-10 * size
    assert max(float(gradient.abs().max()) for gradient in gradients if gradient.numel()) < 1e-6 * max(1.0, size)
    assert result.free_energy == pytest.approx(float(torch.xlogy(q, q).sum() - end.detach()), rel=1e-8)
    return dict(result.updates)


def transformed(z: Tensor, u: Tensor) -> None:
    """`rates` feeds a Poisson, and a transform as well."""
    observed("u", dist.Poisson(rates()[z]), u)
    normal = dist.Normal(tensor([0.0, 0.0])[z], 1.0)
    moved = dist.TransformedDistribution(normal, [dist.transforms.AffineTransform(rates()[z], 1.0)])
    observed("moved", moved, u)


def several(*emissions: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor, Tensor], None]:
    def emission(z: Tensor, u: Tensor) -> None:
        for number, fn in enumerate(emissions):
            observed(f"u{number}", fn(z, u), u)

    return emission


def one(fn: Callable[[Tensor], Any]) -> Callable[[Tensor, Tensor], None]:
    return lambda z, u: observed("u", fn(z), u)


def branching(data: Tensor) -> None:
    """Equal rates at the start, one in each branch."""
    for t in range(2):
        z = categorical(f"z{t}", weights())
        observed(f"u{t}", dist.Poisson(rates([2.0, 2.0])[1 if z == 1 else 0]), data[t])
        observed(f"side{t}", dist.Normal(1.0 * z, 1.0), data[t])


def masked_altogether(data: Tensor) -> None:
    observed("first", dist.Poisson(parameter("first_rate", 2.0, constraints.positive)), data[0])
    with pyro.plate("data", len(data)):
        z = categorical("z", weights())
        observed("u", dist.Poisson(rates()[z]), data)
        observed("unseen", dist.Poisson(rates()[1 - z]).mask(False), data)


def second_order(data: Tensor) -> None:
    probs = table([[[0.7, 0.3], [0.2, 0.8]], [[0.5, 0.5], [0.1, 0.9]]])
    before: list[Any] = [0, 0]
    for t in range(len(data)):
        before.append(categorical(f"z{t}", probs[before[-2], before[-1]]))
        observed(f"u{t}", dist.Poisson(RATES[before[-1]]), data[t])


def chosen_chain(data: Tensor) -> None:
    probs = table([[[0.7, 0.3], [0.2, 0.8]], [[0.5, 0.5], [0.1, 0.9]]])
    g = categorical("g", weights())
    with pyro.plate("time", len(data)):
        z = pyro.sample("z", vfe.MarkovChain(tensor([0.4, 0.6]), probs[g]))
        observed("u", dist.Poisson(RATES[z]), data)


def step_of_table(t: int, z: Tensor | int, u: Tensor) -> Tensor:
    now = categorical(f"z{t}", table()[z])
    observed(f"u{t}", dist.Poisson(rates()[now]), u)
    return now


def step_by_data(t: int, _: Tensor | int, u: Tensor) -> Tensor:
    row = int(u) % 2
    now = categorical(f"z{t}", table()[row])
    observed(f"u{t}", dist.Poisson(rates([[1.0, 5.0], [2.0, 3.0]])[row, now]), u)
    return now


def spread(start: Any = (1.0, 2.0)) -> Tensor:
    return parameter("spread", start, constraints.positive)


def loc(start: Any = (0.0, 1.0)) -> Tensor:
    return parameter("loc", start)


PLANE = ((0.0, 0.0), (1.0, 1.0))


def covariance() -> Tensor:
    return parameter("covariance", [[1.0, 0.2], [0.2, 2.0]], constraints.positive_definite)


EYE = torch.eye(2, dtype=torch.float64)
COMPLEMENT = several(lambda z, u: dist.Poisson(rates()[z]))

MODELS: dict[str, tuple[Model, Tensor, dict[str, Any]]] = {
    "transposed_probs": (mixture(one(lambda z: dist.Categorical(table().T[z]))), BITS, {}),
    "flipped_rows": (mixture(one(lambda z: dist.Categorical(table().flip(0, 1)[z]))), BITS, {}),
    "rows_in_other_orders": (
        mixture(one(lambda z: dist.Categorical(weights()[torch.tensor([[1, 0], [0, 1]])][z]))),
        BITS,
        {},
    ),
    "one_minus_itself": (
        mixture(COMPLEMENT, lambda: torch.stack([unit()[0], 1 - unit()[0]])),
        COUNTS,
        {},
    ),
    "times_one": (mixture(one(lambda z: dist.Poisson(1.0 * rates()[z])), lambda: 1.0 * weights()), COUNTS, {}),
    "loc_and_scale": (mixture(one(lambda z: dist.Normal(spread()[z], spread()[z]))), REALS, {}),
    "rate_and_scale": (
        mixture(several(lambda z, u: dist.Poisson(rates()[z]), lambda z, u: dist.Normal(1.0, rates()[z]))),
        COUNTS,
        {},
    ),
    "rates_of_three_families": (
        mixture(
            several(
                lambda z, u: dist.Poisson(rates()[z]),
                lambda z, u: dist.Exponential(rates()[z]),
                lambda z, u: dist.Gamma(1.0, rates()[z]),
            )
        ),
        COUNTS,
        {},
    ),
    "probs_and_logits": (
        mixture(several(lambda z, u: dist.Bernoulli(unit()[z]), lambda z, u: dist.Bernoulli(logits=unit()[z]))),
        BITS,
        {},
    ),
    "positive_weights": (mixture(COMPLEMENT, lambda: spread()), COUNTS, {}),
    "normalised_over_the_other_axis": (
        mixture(one(lambda z: dist.Categorical(parameter("logits", [[2.0, 3.0], [1.0, 0.0]]).softmax(0)[z]))),
        BITS,
        {},
    ),
    "variance_and_scale": (
        mixture(
            several(lambda z, u: dist.Normal(loc()[z], spread()[z].sqrt()), lambda z, u: dist.Normal(0.0, spread()[z]))
        ),
        REALS,
        {},
    ),
    "covariance_and_precision": (
        mixture(
            several(
                lambda z, u: dist.MultivariateNormal(tensor(PLANE)[z], covariance()),
                lambda z, u: dist.MultivariateNormal(torch.zeros(2), precision_matrix=covariance()),
            )
        ),
        POINTS,
        {},
    ),
    "covariance_transposed": (
        mixture(one(lambda z: dist.MultivariateNormal(loc(PLANE)[z].flip(-1), covariance().mT))),
        POINTS,
        {},
    ),
    "one_scale_per_component": (
        mixture(one(lambda z: dist.Normal(loc(PLANE)[z], spread()[z].unsqueeze(-1)).to_event(1))),
        POINTS,
        {},
    ),
    "one_location_per_component": (
        mixture(one(lambda z: dist.Normal(loc()[z].unsqueeze(-1), spread()).to_event(1))),
        POINTS,
        {},
    ),
    "an_event_of_one_number_for_two": (
        mixture(one(lambda z: dist.Normal(loc(0.5), spread()[z].unsqueeze(-1)).to_event(1))),
        POINTS,
        {},
    ),
    "totals_by_latent": (
        mixture(one(lambda z: dist.Binomial(tensor([8.0, 10.0])[z], unit()[z]))),
        COUNTS,
        {},
    ),
    "entry_of_a_simplex_as_a_probability": (mixture(one(lambda z: dist.Bernoulli(table()[z, 1]))), BITS, {}),
    "weights_that_are_probabilities_too": (mixture(one(lambda z: dist.Bernoulli(weights()[z]))), BITS, {}),
    "an_interval_that_binds_nothing": (
        mixture(one(lambda z: dist.Poisson(parameter("rates", [2.0, 5.0], constraints.interval(1.0, 9.0))[z]))),
        COUNTS + 1,
        {},
    ),
    "sorted": (mixture(one(lambda z: dist.Poisson(rates([2.0, 1.0]).sort().values[z]))), COUNTS, {}),
    "in_a_transform_with_a_floor": (mixture(transformed), COUNTS + 1, {"floor": 1e-3}),
    "in_a_mixture_of_its_own": (
        mixture(
            several(
                lambda z, u: dist.Poisson(rates()[z]),
                lambda z, u: dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Poisson(rates())),
            )
        ),
        COUNTS,
        {"floor": 1e-3},
    ),
    "branches_with_equal_rates": (branching, COUNTS, {}),
    "masked_altogether": (masked_altogether, COUNTS, {}),
    "second_order_chain": (second_order, COUNTS, {}),
    "chain_chosen_by_a_latent": (chosen_chain, COUNTS, {}),
    "first_step_is_a_row": (loop(step_of_table), COUNTS, {}),
    "rows_by_data": (loop(step_by_data), COUNTS + 1, {}),
    "chain_of_one_step": (
        chain(lambda: vfe.MarkovChain(weights(), tensor([[0.7, 0.3], [0.2, 0.8]]), num_steps=1)),
        COUNTS[:1],
        {},
    ),
    "chain_that_starts_from_a_row": (chain(lambda: vfe.MarkovChain(table()[0], table())), COUNTS, {}),
    "chain_of_alternating_tables": (
        chain(
            lambda: vfe.MarkovChain(
                weights(), table([[[0.7, 0.3], [0.2, 0.8]], [[0.5, 0.5], [0.1, 0.9]]])[torch.tensor([0, 1])]
            )
        ),
        COUNTS,
        {},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_an_m_phase_is_the_maximum_of_the_full_joint_table(name: str) -> None:
    model, data, options = MODELS[name]
    check_m_phase(model, data, **options)


def hierarchical(data: Tensor) -> None:
    """The prior's parameter is learned too."""
    with pyro.plate("components", 2):
        means = pyro.sample("means", dist.Normal(parameter("centre", 0.5), 1.0))
    with pyro.plate("data", len(data)):
        observed("u", dist.Normal(means[categorical("z", weights())], 1.0), data)


def scaled_prior(data: Tensor) -> None:
    with pyro.poutine.scale(scale=2.5), pyro.plate("components", 2):
        means = pyro.sample("means", dist.Normal(0.0, tensor([1.0, 2.0])))
    with pyro.plate("data", len(data)):
        observed("u", dist.Normal(means[categorical("z", weights())], 1.0), data)


@pytest.mark.parametrize("model", [hierarchical, scaled_prior])
def test_a_posterior_mode_is_the_maximum_of_the_full_joint_table(model: Model) -> None:
    guide = AutoDelta(pyro.poutine.block(model, expose=["means"]))
    em = vfe.EM(model, guide)
    em.e_phase(REALS)
    means, own = pyro.param("AutoDelta.means").detach().clone(), weights().detach().clone()
    share = (own.log() + dist.Normal(means, 1.0).log_prob(REALS[:, None])).softmax(-1)
    em.m_phase(REALS)
    means = pyro.param("AutoDelta.means")
    centre = pyro.param("centre") if model is hierarchical else tensor(0.0)
    prior = dist.Normal(centre, 1.0 if model is hierarchical else tensor([1.0, 2.0])).log_prob(means).sum()
    scale = 1.0 if model is hierarchical else 2.5
    objective = (share * dist.Normal(means, 1.0).log_prob(REALS[:, None])).sum() + scale * prior
    leaves = [unconstrained(name) for name in ("AutoDelta.means", *(["centre"] if model is hierarchical else []))]
    for gradient in torch.autograd.grad(objective, leaves):
        assert gradient.abs().max() < 1e-6


def test_equal_entries_are_told_apart_after_other_data_chose_others() -> None:
    """The numbers of a slot are those that it had before, and come from other entries."""

    def model(data: Tensor, which: Tensor) -> None:
        with pyro.plate("data", len(data)):
            z = categorical("z", weights())
            observed("u", dist.Poisson(rates([2.0, 2.0])[which]), data)
            observed("side", dist.Normal(1.0 * z, 1.0), data)

    em, which = vfe.EM(model), torch.tensor([0, 0, 1])
    em.m_phase(COUNTS, which)
    with torch.no_grad():
        unconstrained("rates").zero_()
    em.m_phase(COUNTS, 1 - which)
    torch.testing.assert_close(pyro.param("rates").detach(), tensor([7.0, 0.5]))


def test_proportional_weights_are_told_apart_after_other_data_chose_others() -> None:
    def model(data: Tensor, row: int) -> None:
        shares = parameter("shares", [[0.25, 0.75], [0.125, 0.375]], constraints.positive)
        with pyro.plate("data", len(data)):
            z = categorical("z", weights())
            observed("u", dist.Categorical(shares[row]), data)
            observed("side", dist.Normal(1.0 * z, 1.0), data)

    em = vfe.EM(model)
    em.m_phase(BITS, 0)
    with torch.no_grad():
        unconstrained("shares").copy_(tensor([[0.25, 0.75], [0.125, 0.375]]).log())
    em.m_phase(BITS, 1)
    found = pyro.param("shares").detach()
    torch.testing.assert_close(found / found.sum(-1, keepdim=True), tensor([[0.25, 0.75], [1 / 3, 2 / 3]]))


def test_a_parameter_that_later_data_use_out_of_sight_is_found() -> None:
    class Penalty(dist.Poisson):
        """A distribution that reads a parameter from the store."""

        def expand(self, batch_shape: Any, _instance: Any = None) -> "Penalty":
            return Penalty(self.rate.expand(batch_shape))

        def log_prob(self, value: Tensor) -> Tensor:
            return super().log_prob(value) - (pyro.get_param_store()["rates"].sum() - 2.0) ** 2

    def model(data: Tensor, is_penalised: bool) -> None:
        own = rates()
        with pyro.plate("data", len(data)):
            observed("u", dist.Poisson(own[categorical("z", weights())]), data)
        if is_penalised:
            observed("penalty", Penalty(tensor(1.0)), tensor(1.0))

    em = vfe.EM(model)
    assert em.m_phase(COUNTS, False).updates["rates"].startswith("closed form")
    assert "no closed form" in em.m_phase(COUNTS, True).updates["rates"]


def test_a_program_that_sees_nothing_keeps_its_parameters() -> None:
    model = mixture(one(lambda z: dist.Poisson(rates()[z]).mask(False)))
    run = vfe.EM(model).run(COUNTS, progress_bar=False)
    torch.testing.assert_close(run.params["rates"], RATES)
    assert "Never visited, and left as before: 'rates'[0], 'rates'[1]." in run.notes


class Penalised(dist.Bernoulli):
    """A distribution that reads a parameter from the store."""

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Penalised":
        return Penalised(self.probs.expand(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value) - 10 * (pyro.get_param_store()["probs"] - 0.5).square().sum()


def test_a_closed_form_at_a_bound_is_none_where_the_program_says_otherwise() -> None:
    """At a bound no slope of an unconstrained parameter is left to tell."""

    def model(data: Tensor) -> None:
        own = unit()
        with pyro.plate("data", len(data)):
            observed("u", dist.Bernoulli(own[categorical("z", weights())]), data)
        observed("penalty", Penalised(tensor(0.5)), tensor(1.0))

    vfe.EM(model).m_phase(torch.ones(3))
    counts = 3 * tensor([0.25, 0.75])  # shares 0.4 * 0.3 : 0.6 * 0.6; then c / p = 20 (p - 0.5)
    torch.testing.assert_close(pyro.param("probs").detach(), (10 + (100 + 80 * counts).sqrt()) / 40, atol=1e-7, rtol=0)


def test_a_start_below_the_floor_is_raised_without_a_warning() -> None:
    model = mixture(one(lambda z: dist.Normal(tensor([0.0, 3.0])[z], spread([0.1, 0.2])[z])))
    run = vfe.EM(model, floor={"spread": 0.5}).run(tensor([0.0, 0.1, 3.0]), progress_bar=False)
    torch.testing.assert_close(run.params["spread"], tensor([0.5, 0.5]))
    assert run.notes == ("At the floor: 'spread'[0], 'spread'[1].",)


def test_a_share_that_single_precision_cannot_hold_is_no_rise() -> None:
    torch.set_default_dtype(torch.float32)
    counts = torch.tensor(EARTHQUAKES, dtype=torch.float32)

    def model(u: Tensor) -> None:
        initial = pyro.param("initial", torch.ones(2) / 2, constraint=constraints.simplex)
        transition = pyro.param("transition", torch.tensor([[0.9, 0.1], [0.1, 0.9]]), constraint=constraints.simplex)
        rates = pyro.param("rates", torch.tensor([10.0, 30.0]), constraint=constraints.positive)
        with pyro.plate("time", len(u)):
            z = pyro.sample("z", vfe.MarkovChain(initial, transition))
            pyro.sample("u", dist.Poisson(rates[z]), obs=u)

    run = vfe.EM(model).run(counts, progress_bar=False)
    assert run.params["initial"].min() == 0
    assert bool(torch.isfinite(torch.as_tensor(run.history.free_energy)).all())
    assert not [note for note in run.notes if "raised F" in note]
