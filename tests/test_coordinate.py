"""Closed-form mean field: each factor is the best one given the others, F never rises, and SVI ends at the same Q."""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from joint_table import Row
from oracles import log_sum_exp, oracle
from programs import PROGRAMS
from programs.case import bernoulli, categorical, empty, noise, positive, simplex, tensor, unit
from programs.plates import BATCH, COUNTS, SERIES, mixture, mixture_guide, subsampled
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal
from test_gradient_phases import pair_of
from torch import Tensor

import pyro_vfe as vfe
from pyro_vfe.errors import ImpossibleDataError, StructureError, VFEError
from pyro_vfe.learning.coordinate import Coordinate
from pyro_vfe.learning.gradient import Gradient
from pyro_vfe.learning.pair import Pair
from pyro_vfe.program.parameters import Parameters, unconstrained
from pyro_vfe.program.programs import Programs

SMALL = (
    "mixture",
    "nested",
    "global_over_local",
    "crossing",
    "chain",
    "second_order_chain",
    "tree",
    "collider",
    "markov_chain",
    "markov_chain_with_changing_transitions",
    "markov_chains",
    "markov_chains_by_class",
    "factorial_markov_chain",
    "chain_on_chain",
    "masked_data",
    "unobserved_local",
    "one_hot_chain",
    "bits",
    "deterministic",
    "mixed",
    "sequential_under_global",
)
HIDDEN = {
    "global_over_local": [["g"], ["z"]],
    "nested": [["a"], ["b"]],
    "crossing": [["a"], ["b"], ["c"], ["a", "b"]],
    "chain": [["z_1"], ["z_0", "z_2"]],
    "collider": [["a"]],
    "markov_chains_by_class": [["z"]],
}
EVERY = [(name, []) for name in SMALL] + [(name, hide) for name, sets in HIDDEN.items() for hide in sets]


def coordinate_pair(model: Callable[..., Any], guide: Any, args: Any, kwargs: Any = None, **options: Any) -> Pair:
    parameters = Parameters()
    watched = parameters.watched(model, "model"), parameters.watched(guide, "guide")
    return Pair(*watched, args, kwargs or {}, Programs(), parameters, **options)


def mean_field(name: str, hide: list[str], init_scale: float = 1.0) -> tuple[Any, Pair]:
    program = PROGRAMS[name]
    guide = vfe.AutoMeanField(pyro.poutine.block(program.model, hide=hide), init_scale=init_scale)
    return guide, coordinate_pair(program.model, guide, program.args, program.kwargs)


def free_energy(pair: Pair) -> Tensor:
    return Coordinate().belief(pair.enumerate(), 0).free_energy


def rows_of(guide: vfe.AutoMeanField, site: str) -> Tensor:
    """The probabilities of a site's elements, shape `(elements, K)`."""
    probs = guide.probabilities(site)
    return probs.reshape(-1, probs.shape[-1])


Element = tuple[str, int]


class BruteForce:
    """log P(v, u) of the latents that a guide has, as a list of assignments; Q as one table per element."""

    def __init__(self, rows: list[Row], guide: vfe.AutoMeanField) -> None:
        self.q: dict[Element, Tensor] = {}
        for site in guide.latents:
            for n, probs in enumerate(rows_of(guide, site)):
                self.q[site, n] = probs
        groups: dict[frozenset[tuple[Element, int]], list[Tensor]] = defaultdict(list)
        for row in rows:
            own = frozenset((element, value) for element, value in row.assignment.items() if element in self.q)
            groups[own].append(row.log_mass().detach())
        self.log_joint = [(dict(own), log_sum_exp(parts)) for own, parts in groups.items()]

    def improve(self, element: Element) -> None:
        """Sets one element's factor to exp E[log P] over the others, normalised."""
        expected = torch.zeros_like(self.q[element])
        for assignment, log_mass in self.log_joint:
            if element not in assignment:
                return
            others = (self.q[other][value] for other, value in assignment.items() if other != element)
            weight = torch.stack([tensor(1.0), *others]).prod()
            if weight > 0:
                expected[assignment[element]] += weight * log_mass
        self.q[element] = expected.softmax(-1)

    def sweep(self, guide: vfe.AutoMeanField, chains: dict[str, int]) -> None:
        """All elements in turn; of a chain's (the last axis) the even steps before the odd."""
        for site in guide.latents:
            elements = [element for element in self.q if element[0] == site]
            steps = chains.get(site, 1)
            for element in sorted(elements, key=lambda element: element[1] % steps % 2 if steps > 1 else 0):
                self.improve(element)


@pytest.mark.parametrize(
    ("name", "hide"), EVERY, ids=lambda value: "_".join(value) if isinstance(value, list) else value
)
def test_each_factor_is_the_best_one_by_the_full_joint_table(name: str, hide: list[str]) -> None:
    guide, pair = mean_field(name, hide)
    enumeration = pair.enumerate()
    program = PROGRAMS[name]
    brute = BruteForce(oracle(program.model, empty, *program.args, **program.kwargs).model, guide)
    chains = {v.name: enumeration.plates[v.chain] for v in enumeration.variables.values() if v.chain}
    for _ in range(2):
        brute.sweep(guide, chains)
        Coordinate().update(pair, 0)
        for site in guide.latents:
            expected = torch.stack([probs for element, probs in brute.q.items() if element[0] == site])
            torch.testing.assert_close(rows_of(guide, site), expected, rtol=1e-9, atol=1e-11)


REFUSED = ("branch", "branches", "counted", "point", "network", "subsampled", "impossible", "alarm", "zeros")
APPLICABLE = [
    name
    for name, program in PROGRAMS.items()
    if program.guide is empty and not set(name.split("_")) & set(REFUSED) and not name.startswith("left")
]


@pytest.mark.parametrize("name", [name for name in APPLICABLE if name != "chain_of_1000_steps"])
def test_F_never_rises(name: str) -> None:
    _, pair = mean_field(name, [])
    before = free_energy(pair)
    for iteration in range(4):
        Coordinate().update(pair, iteration)
        after = free_energy(pair)
        assert after <= before + 1e-13 * before.abs()
        before = after


@pytest.mark.parametrize(
    "name",
    ["global_over_local", "chain", "markov_chains", "crossing", "scaled_under_global", "masked_latents", "mixed"],
)
def test_at_the_fixed_point_the_gradient_of_F_is_zero(name: str) -> None:
    guide, pair = mean_field(name, [])
    Coordinate(num_sweeps=200).update(pair, 0)
    program = PROGRAMS[name]
    loss = vfe.FreeEnergy().differentiable_loss(program.model, guide, *program.args, **program.kwargs)
    for gradient in torch.autograd.grad(loss, list(guide.logits.parameters())):
        assert gradient.abs().max() < 1e-9


@pytest.mark.parametrize("name", ["global_over_local", "chain", "markov_chain", "nested", "scaled_under_global"])
def test_it_ends_where_training_of_the_same_guide_from_the_same_start_ends(name: str) -> None:
    program = PROGRAMS[name]
    guide, pair = mean_field(name, [], init_scale=0.1)
    pair.enumerate()
    trained = vfe.AutoMeanField(program.model)
    trained(*program.args)
    trained.load_state_dict({key: value.clone() for key, value in guide.state_dict().items()})
    elbo = vfe.FreeEnergy()
    optimizer = torch.optim.LBFGS(trained.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = elbo.differentiable_loss(program.model, trained, *program.args)
        loss.backward()
        return loss

    optimizer.step(closure)
    Coordinate(num_sweeps=200).update(pair, 0)
    expected = elbo.loss(program.model, trained, *program.args)
    assert elbo.loss(program.model, guide, *program.args) == pytest.approx(expected, rel=1e-6)


def test_one_sweep_of_independent_latents_is_the_posterior() -> None:
    guide, pair = mean_field("mixture", [])
    Coordinate().update(pair, 0)
    exact = vfe.posterior(mixture, COUNTS)
    torch.testing.assert_close(guide.probabilities("z"), exact.marginal("z"), rtol=1e-12, atol=1e-14)
    terms = vfe.FreeEnergy().decompose(mixture, guide, COUNTS)
    assert terms.gap == pytest.approx(0.0, abs=1e-12)


def test_its_belief_is_the_guides() -> None:
    guide, pair = mean_field("global_over_local", [])
    Coordinate().update(pair, 0)
    program = PROGRAMS["global_over_local"]
    terms = vfe.FreeEnergy().decompose(program.model, guide, *program.args)
    torch.testing.assert_close(free_energy(pair), terms.free_energy)


def test_a_subsample_changes_the_rows_that_are_present_alone() -> None:
    guide = vfe.AutoMeanField(
        subsampled, init_scale=1.0, create_plates=lambda series: pyro.plate("data", len(series), subsample=BATCH)
    )
    pair = coordinate_pair(subsampled, guide, (SERIES,))
    pair.enumerate()
    before = guide.probabilities("z")
    Coordinate().update(pair, 0)
    weights, means, sigma = simplex("weights", 2).detach(), noise(2, seed=1), positive("sigma").detach()
    expected = before.clone()
    log_joint = weights.log() + dist.Normal(means, sigma).log_prob(SERIES[BATCH].unsqueeze(-1))
    expected[BATCH] = log_joint.softmax(-1)
    torch.testing.assert_close(guide.probabilities("z"), expected, rtol=1e-10, atol=1e-12)


def test_a_random_subsample_reaches_the_posterior_of_every_row_in_time() -> None:
    def model(series: Tensor) -> None:
        with pyro.plate("data", len(series), subsample_size=3) as batch:
            z = categorical("z", simplex("weights", 2))
            pyro.sample("u", dist.Normal(3 * noise(2, seed=1)[z], 1.0), obs=series[batch])

    guide = vfe.AutoMeanField(model, init_scale=1.0)
    pair = coordinate_pair(model, guide, (SERIES,))
    for iteration in range(30):
        Coordinate().update(pair, iteration)
    log_joint = simplex("weights", 2).detach().log() + dist.Normal(3 * noise(2, seed=1), 1.0).log_prob(SERIES[:, None])
    torch.testing.assert_close(guide.probabilities("z"), log_joint.softmax(-1), rtol=1e-10, atol=1e-12)


def test_rows_of_masked_latents_stay() -> None:
    guide, pair = mean_field("masked_latents", [])
    pair.enumerate()
    before = guide.probabilities("z")
    Coordinate().update(pair, 0)
    stays = (guide.probabilities("z") == before).all(-1)
    assert stays.tolist() == (~pair.enumerate().sites["model", "z"].mask).tolist()


def either_or(counts: Tensor) -> None:
    """The first value of z explains no count above zero."""
    with pyro.plate("data", len(counts)):
        z = categorical("z", simplex("weights", 3))
        rates = torch.stack([tensor(0.0), *positive("rates", 2)])
        pyro.sample("u", dist.Poisson(rates[z]), obs=counts)


def test_an_impossible_value_gets_probability_zero_from_a_start_of_infinite_F() -> None:
    guide = vfe.AutoMeanField(either_or)
    counts = tensor([0.0, 3.0, 1.0])
    pair = coordinate_pair(either_or, guide, (counts,))
    Coordinate().update(pair, 0)
    probs = guide.probabilities("z")
    assert (probs == 0).tolist() == [[False, False, False], [True, False, False], [True, False, False]]
    torch.testing.assert_close(probs, vfe.posterior(either_or, counts).marginal("z"), rtol=1e-12, atol=1e-14)
    assert free_energy(pair).isfinite()


def test_logits_of_minus_infinity_are_safe_for_later_phases_of_both_kinds() -> None:
    guide = vfe.AutoMeanField(either_or)
    pair = coordinate_pair(either_or, guide, (tensor([0.0, 3.0, 1.0]),))
    Coordinate().update(pair, 0)
    expected = guide.probabilities("z")
    Gradient(pyro.optim.Adam({"lr": 1e-4}), 5).update(pair, 0)
    torch.testing.assert_close(guide.probabilities("z"), expected, rtol=1e-2, atol=1e-3)
    assert ((guide.probabilities("z") == 0) == (expected == 0)).all()
    Coordinate().update(pair, 0)
    torch.testing.assert_close(guide.probabilities("z"), expected, rtol=1e-10, atol=0)


def test_factors_that_leave_no_possible_value_are_refused_and_stay() -> None:
    def equal(count: Tensor) -> None:
        a = bernoulli("a", unit("a_prob"))
        b = bernoulli("b", a)
        pyro.sample("u", dist.Poisson(1.0 + a + b), obs=count)

    guide = vfe.AutoMeanField(equal, init_scale=0.5)
    pair = coordinate_pair(equal, guide, (tensor(2.0),))
    pair.enumerate()
    before = guide.probabilities("a")
    with pytest.raises(ImpossibleDataError, match=r"'a', 'b'.*summed inside the model"):
        Coordinate().update(pair, 0)
    torch.testing.assert_close(guide.probabilities("a"), before, rtol=0, atol=0)


def test_float32_guides_are_served() -> None:
    torch.set_default_dtype(torch.float32)

    def model(counts: Tensor) -> None:
        with pyro.plate("data", len(counts)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.8])))
            pyro.sample("u", dist.Poisson(torch.tensor([1.0, 6.0])[z]), obs=counts)

    counts = COUNTS.float()
    guide = vfe.AutoMeanField(model)
    Coordinate().update(coordinate_pair(model, guide, (counts,)), 0)
    torch.testing.assert_close(
        guide.probabilities("z").double(), vfe.posterior(model, counts).marginal("z").double(), rtol=1e-5, atol=1e-6
    )


def with_a_location(points: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(points)):
        z = bernoulli("z", tensor(0.4))
        pyro.sample("u", dist.Normal(w * (2 * z - 1), 1.0), obs=points)


def guide_list(other: Callable[..., Any]) -> Any:
    guide = AutoGuideList(with_a_location)
    guide.append(other(pyro.poutine.block(with_a_location, hide=["z"])))
    guide.append(vfe.AutoMeanField(pyro.poutine.block(with_a_location, hide=["w"])))
    return guide


def test_an_AutoGuideList_with_point_estimates_is_served() -> None:
    points = noise(6, seed=3)
    guide = guide_list(partial(AutoDelta, init_loc_fn=lambda site: tensor(1.3)))
    Coordinate().update(coordinate_pair(with_a_location, guide, (points,)), 0)
    log_odds = tensor(0.4).logit() + dist.Normal(1.3, 1.0).log_prob(points) - dist.Normal(-1.3, 1.0).log_prob(points)
    torch.testing.assert_close(guide[1].probabilities("z")[:, 1], log_odds.sigmoid(), rtol=1e-10, atol=1e-12)


def test_a_guide_that_draws_at_random_is_refused() -> None:
    pair = coordinate_pair(with_a_location, guide_list(AutoNormal), (noise(6, seed=3),))
    with pytest.raises(StructureError, match=r"drawn at random.*vfe.Gradient"):
        Coordinate().update(pair, 0)


def test_another_guide_is_refused_with_the_way_out() -> None:
    with pytest.raises(StructureError, match=r"'z' is of another guide.*vfe.Gradient"):
        Coordinate().update(pair_of(mixture, mixture_guide, COUNTS), 0)


def test_a_guide_without_latents_is_refused() -> None:
    with pytest.raises(StructureError, match="AutoMeanField"):
        Coordinate().update(pair_of(mixture, empty, COUNTS), 0)


def test_a_latent_of_one_branch_is_refused_by_name() -> None:
    _, pair = mean_field("branch_in_model", [])
    with pytest.raises(StructureError, match=r"'b'.*for some values of 'a' only.*vfe.Gradient"):
        Coordinate().update(pair, 0)


def test_fixed_logits_stay_and_the_others_are_best_given_them() -> None:
    guide, pair = mean_field("global_over_local", [])
    pair.enumerate()
    (name,) = [name for name in pair.recognition if name.endswith("logits.g")]
    held = coordinate_pair(PROGRAMS["global_over_local"].model, guide, (COUNTS,), fixed=frozenset({name}))
    before = unconstrained(name).detach().clone()
    z_before = guide.probabilities("z")
    Coordinate().update(held, 0)
    torch.testing.assert_close(unconstrained(name).detach(), before, rtol=0, atol=0)
    assert not torch.equal(guide.probabilities("z"), z_before)


def test_the_models_parameters_stay_and_no_gradient_is_left() -> None:
    _, pair = mean_field("mixture", [])
    pair.enumerate()
    before = {name: unconstrained(name).detach().clone() for name in ("weights", "rates")}
    Coordinate().update(pair, 0)
    for name, value in before.items():
        torch.testing.assert_close(unconstrained(name).detach(), value, rtol=0, atol=0)
        assert unconstrained(name).grad is None


def test_no_sweeps_are_refused() -> None:
    with pytest.raises(VFEError, match="num_sweeps=0"):
        Coordinate(num_sweeps=0)
