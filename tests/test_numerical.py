"""The numerical M-phase against closed formulas, and what it may never do."""

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from programs import PROGRAMS
from programs.case import categorical, empty, noise, positive, real, simplex, tensor
from torch import Tensor
from torch.distributions import constraints

from pyro_vfe.energy.parts import joint_graph
from pyro_vfe.engine.inference import evidence, expected_tables, marginals
from pyro_vfe.errors import DegenerateError, NotFiniteError, VFEError
from pyro_vfe.learning.belief import Belief
from pyro_vfe.learning.numerical import Numerical
from pyro_vfe.learning.pair import Pair
from pyro_vfe.learning.phases import Problem
from pyro_vfe.program.enumeration import Enumeration
from pyro_vfe.program.parameters import Parameters, unconstrained
from pyro_vfe.program.programs import Programs

POINTS = torch.cat([noise(12, seed=1) - 2.0, 0.6 * noise(9, seed=2) + 2.5])


def pair_of(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Pair:
    parameters = Parameters()
    watched = parameters.watched(model, "model"), parameters.watched(empty, "guide")
    return Pair(*watched, args, kwargs, Programs(), parameters)


def exact_belief(enumeration: Enumeration) -> Belief:
    """Q = P(v | u, G): the weights of an exact E-phase, for models without sampled sites."""
    graph = joint_graph(enumeration)
    gradients = iter(expected_tables(graph))
    keys = {id(factor): key for key, factor in enumeration.factors.items()}
    weights = {keys[id(factor)]: tuple(next(gradients) for _ in factor.tables) for factor in graph.factors}
    surprise = -evidence(graph)
    expected = sum(
        torch.where(own != 0, own * table.values, 0.0).sum()
        for factor in graph.factors
        for own, table in zip(weights[keys[id(factor)]], factor.tables, strict=True)
    )
    return Belief(weights, torch.as_tensor(expected) + surprise, surprise, surprise)


def problem_of(model: Callable[..., Any], *args: Any, names: Sequence[str] | None = None, **kwargs: Any) -> Problem:
    pair = pair_of(model, *args, **kwargs)
    enumeration = pair.enumerate()
    names = tuple(pair.parameters.of("model")) if names is None else tuple(names)
    return Problem(pair, enumeration, exact_belief(enumeration), names)


def responsibilities(problem: Problem, site: str) -> Tensor:
    return marginals(joint_graph(problem.enumeration), [(site,)])[(site,)].values


def gaussian_mixture(points: Tensor) -> None:
    weights, locs, scales = simplex("weights", 3), real("locs", 3, seed=1), positive("scales", 3, seed=2)
    with pyro.plate("data", len(points)):
        z = categorical("z", weights)
        pyro.sample("u", dist.Normal(locs[z], scales[z]), obs=points)


def test_a_gaussian_mixture_gets_the_weighted_means_of_its_closed_form() -> None:
    problem = problem_of(gaussian_mixture, POINTS)
    own = responsibilities(problem, "z")
    Numerical().update(problem)
    counts = own.sum(0)
    locs = (own * POINTS[:, None]).sum(0) / counts
    scales = ((own * (POINTS[:, None] - locs) ** 2).sum(0) / counts).sqrt()
    for name, expected in (("weights", counts / len(POINTS)), ("locs", locs), ("scales", scales)):
        torch.testing.assert_close(pyro.param(name).detach(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("distance", [1e-2, 1e-5, 1e-8])
def test_a_start_near_the_optimum_ends_as_near_as_any_other(distance: float) -> None:
    problem = problem_of(gaussian_mixture, POINTS)
    own = responsibilities(problem, "z")
    locs = (own * POINTS[:, None]).sum(0) / own.sum(0)
    with torch.no_grad():
        unconstrained("locs").copy_(locs * (1 + distance))
    Numerical().update(problem)
    torch.testing.assert_close(pyro.param("locs").detach(), locs, rtol=1e-9, atol=1e-9)


SOLVED = ("mixture", "chain", "markov_chains", "global_over_local", "nested", "masked_data", "scaled_per_datum")


@pytest.mark.parametrize("name", SOLVED)
def test_at_the_end_the_gradient_of_the_expected_log_joint_is_zero(name: str) -> None:
    program = PROGRAMS[name]
    problem = problem_of(program.model, *program.args, **program.kwargs)
    Numerical().update(problem)
    leaves = [unconstrained(name) for name in problem.names]
    for gradient in torch.autograd.grad(problem.expected_log_joint(), leaves):
        assert gradient.abs().max() < 1e-9


@pytest.mark.parametrize("name", [*SOLVED, "branch_in_model", "bits", "network", "left_to_right_markov_chain"])
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31), spread=st.floats(0.1, 4.0), max_iter=st.integers(1, 6))
def test_the_expected_log_joint_never_falls(name: str, seed: int, spread: float, max_iter: int) -> None:
    pyro.clear_param_store()
    program = PROGRAMS[name]
    problem = problem_of(program.model, *program.args, **program.kwargs)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for leaf in map(unconstrained, problem.names):
            leaf.add_(spread * torch.randn(leaf.shape, generator=generator))
    before = problem.expected_log_joint().detach()
    Numerical(max_iter=max_iter).update(problem)
    assert problem.expected_log_joint().detach() >= before - 1e-14 * before.abs()


def coin(flips: Tensor) -> None:
    bias = pyro.param("bias", tensor([0.3, 0.6]), constraint=constraints.unit_interval)
    with pyro.plate("coins", 2, dim=-2):
        z = categorical("z", simplex("weights", 2))
        with pyro.plate("flips", flips.shape[-1], dim=-1):
            pyro.sample("u", dist.Bernoulli(bias[z]), obs=flips)


def test_a_probability_whose_optimum_is_zero_goes_there() -> None:
    problem = problem_of(coin, torch.zeros(2, 4))
    Numerical().update(problem)
    assert pyro.param("bias").detach().max() < 1e-9
    assert problem.expected_log_joint().isfinite()


def test_an_exact_zero_stays_and_does_not_disturb_the_rest() -> None:
    def model(points: Tensor) -> None:
        weights = pyro.param("weights", tensor([0.5, 0.0, 0.5]), constraint=constraints.simplex)
        with pyro.plate("data", len(points)):
            z = categorical("z", weights)
            pyro.sample("u", dist.Normal(tensor([-2.0, 0.0, 2.0])[z], 1.0), obs=points)

    problem = problem_of(model, POINTS)
    assert unconstrained("weights")[1] == -torch.inf
    own = responsibilities(problem, "z")
    Numerical().update(problem)
    torch.testing.assert_close(pyro.param("weights").detach(), own.mean(0), rtol=1e-9, atol=0)


def test_the_free_level_of_logits_does_not_drift() -> None:
    problem = problem_of(gaussian_mixture, POINTS)
    before = unconstrained("weights").detach().mean()
    Numerical().update(problem)
    assert unconstrained("weights").detach().mean() == pytest.approx(before.item(), abs=1e-6)


def test_a_network_of_two_layers_reaches_the_logits_that_its_inputs_allow() -> None:
    """One hidden unit per group of inputs: the network can give each group the logit of its mean."""
    inputs = torch.eye(2).repeat(6, 1)
    flips = tensor([1.0, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0, 0])
    network = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))

    def model() -> None:
        pyro.module("network", network)
        with pyro.plate("data", len(flips)):
            pyro.sample("u", dist.Bernoulli(logits=network(inputs).squeeze(-1)), obs=flips)

    problem = problem_of(model)
    words = Numerical().update(problem)
    assert set(words) == set(problem.names) == {f"network$$${name}" for name, _ in network.named_parameters()}
    found = network(torch.eye(2)).squeeze(-1).sigmoid()
    torch.testing.assert_close(found.detach(), torch.stack([flips[::2].mean(), flips[1::2].mean()]), rtol=1e-8, atol=0)


def test_parameters_that_are_not_named_stay_and_get_no_gradient() -> None:
    problem = problem_of(gaussian_mixture, POINTS, names=["locs"])
    before = {name: unconstrained(name).detach().clone() for name in ("weights", "scales")}
    words = Numerical().update(problem)
    assert set(words) == {"locs"}
    assert words["locs"].startswith("L-BFGS, ")
    for name, value in before.items():
        torch.testing.assert_close(unconstrained(name).detach(), value, rtol=0, atol=0)
    assert all(unconstrained(name).grad is None for name in ("weights", "locs", "scales"))


def test_float32_parameters_come_as_near_as_their_rounding_allows() -> None:
    torch.set_default_dtype(torch.float32)

    def model(points: Tensor) -> None:
        locs = pyro.param("locs", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", len(points)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("u", dist.Normal(locs[z], 1.0), obs=points)

    points = POINTS.float()
    problem = problem_of(model, points)
    own = responsibilities(problem, "z")
    Numerical().update(problem)
    expected = (own * points[:, None]).sum(0) / own.sum(0)
    assert pyro.param("locs").dtype == torch.float32
    torch.testing.assert_close(pyro.param("locs").detach().double(), expected, rtol=1e-4, atol=1e-5)


class Failing:
    """A model of one scale that refuses to run at some calls."""

    def __init__(self, refuses: Callable[[int, Tensor], bool]) -> None:
        self.refuses = refuses
        self.calls = 0
        self.armed = False

    def __call__(self, points: Tensor) -> None:
        """Scores the points under a Normal."""
        loc = pyro.param("loc", tensor(8.0))
        self.calls += self.armed
        if self.armed and self.refuses(self.calls, loc.detach()):
            raise ValueError("refused")
        with pyro.plate("data", len(points)):
            pyro.sample("u", dist.Normal(loc, 1.0), obs=points)


def test_a_step_that_the_program_refuses_is_taken_back() -> None:
    """The first step is much too long, and ends where the program does not go."""
    model = Failing(lambda _, loc: bool(loc < POINTS.mean() - 0.5))
    problem = problem_of(model, POINTS)
    model.armed = True
    Numerical().update(problem)
    torch.testing.assert_close(pyro.param("loc").detach(), POINTS.mean(), rtol=1e-9, atol=1e-9)


def test_a_program_that_fails_from_the_start_leaves_its_parameters() -> None:
    model = Failing(lambda call, _: True)
    problem = problem_of(model, POINTS)
    model.armed = True
    with pytest.raises(ValueError, match="refused"):
        Numerical().update(problem)
    assert pyro.param("loc") == 8.0


def test_a_start_where_Q_has_weight_on_the_impossible_is_refused_by_name() -> None:
    def model(points: Tensor) -> None:
        weights = pyro.param("weights", tensor([0.5, 0.5]), constraint=constraints.simplex)
        with pyro.plate("data", len(points)):
            z = categorical("z", weights)
            pyro.sample("u", dist.Normal(tensor([-2.0, 2.0])[z], 1.0), obs=points)

    problem = problem_of(model, POINTS)
    with torch.no_grad():
        unconstrained("weights")[0] = -torch.inf
    with pytest.raises(NotFiniteError, match="'weights'"):
        Numerical().update(problem)


def test_a_scale_that_collapses_onto_one_datum_is_an_error_that_names_it_and_changes_nothing() -> None:
    def model(points: Tensor) -> None:
        locs, scales = real("locs", 2), positive("scales", 2)
        pyro.sample("one", dist.Normal(locs[0], scales[0]), obs=points[0])
        with pyro.plate("data", len(points)):
            pyro.sample("u", dist.Normal(locs[1], scales[1]), obs=points)

    problem = problem_of(model, POINTS)
    before = pyro.param("scales").detach().clone()
    with pytest.raises(DegenerateError, match=r"no lower bound.*'scales'\[0\] goes to zero.*floor="):
        Numerical().update(problem)
    torch.testing.assert_close(pyro.param("scales").detach(), before, rtol=0, atol=0)


def test_a_scale_with_a_lower_bound_goes_there_instead() -> None:
    def model() -> None:
        scale = pyro.param("scale", tensor(0.7), constraint=constraints.greater_than(0.5))
        pyro.sample("u", dist.Normal(pyro.param("loc", tensor(0.0)), scale), obs=tensor(1.0))

    Numerical().update(problem_of(model))
    assert pyro.param("scale").item() == pytest.approx(0.5, abs=1e-6)
    assert pyro.param("loc").item() == pytest.approx(1.0, abs=1e-6)


def test_a_search_that_is_cut_short_says_so() -> None:
    words = Numerical(max_iter=2).update(problem_of(gaussian_mixture, POINTS))
    assert words["locs"].endswith("stopped at max_iter=2")


@pytest.mark.parametrize("options", [{"max_iter": 0}, {"tolerance_grad": -1.0}])
def test_options_without_a_meaning_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(VFEError, match="positive"):
        Numerical(**options)
