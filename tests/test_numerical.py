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
from pyro_vfe.errors import NotFiniteError, VFEError
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


@pytest.mark.parametrize("name", ["mixture", "chain", "hmm_chain", "two_series", "global_over_local"])
def test_at_the_end_the_gradient_of_the_expected_log_joint_is_zero(name: str) -> None:
    if name not in PROGRAMS:
        pytest.skip("no such program")
    program = PROGRAMS[name]
    problem = problem_of(program.model, *program.args, **program.kwargs)
    Numerical().update(problem)
    leaves = [unconstrained(name) for name in problem.names]
    for gradient in torch.autograd.grad(problem.expected_log_joint(), leaves):
        assert gradient.abs().max() < 1e-9
