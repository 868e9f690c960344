r"""Sufficient statistics against the programs themselves.

    d/d theta <weights, log P tables>  =  d/d theta sum_sites [ sums . eta(theta[index]) - counts . A(theta[index]) ]

The left side is autograd through the enumerated program; the right side knows the statistics and the index only.
"""

from typing import Any

import pyro
import pytest
import torch
from checks import DIFFERENTIABLE, assert_equal
from programs import PROGRAMS, UNSPLIT
from programs.case import empty
from torch import Tensor

import pyro_vfe.errors as vfe_errors
from pyro_vfe.learning.belief import Belief, expected_log_joint
from pyro_vfe.learning.e_phases import Exact
from pyro_vfe.learning.guided import guided_belief
from pyro_vfe.learning.pair import Pair
from pyro_vfe.program.enumeration import Enumeration
from pyro_vfe.program.extraction import statistics_of
from pyro_vfe.program.families_forms import CATEGORICAL, MULTINOMIAL, ONE_HOT_CATEGORICAL
from pyro_vfe.program.parameters import Parameters, unconstrained
from pyro_vfe.program.programs import Programs
from pyro_vfe.program.statistics import SiteStatistics, Slot, Statistics

dist = pyro.distributions


def pair_of(model: Any, guide: Any, *args: Any, **kwargs: Any) -> Pair:
    parameters = Parameters()
    return Pair(
        parameters.watched(model, "model"), parameters.watched(guide, "guide"), args, kwargs, Programs(), parameters
    )


def belief_of(enumeration: Enumeration) -> Belief:
    return guided_belief(enumeration) if enumeration.guide_latents else Exact().belief(enumeration, 0)


def found_by(pair: Pair) -> tuple[Belief, Statistics]:
    enumeration = pair.enumerate()
    belief = belief_of(enumeration)
    return belief, statistics_of(enumeration, belief.weights, pair.parameters)


def rebuilt(slot: Slot, normalised: bool) -> Tensor:
    """The slot from the parameter, by its index alone."""
    if slot.selection is None:
        return slot.values
    values = pyro.param(slot.selection.parameter).flatten()[slot.selection.index]
    values = values.sqrt() if slot.selection.through == "sqrt" else values
    return values / values.sum(-1, keepdim=True) if normalised else values


def expected_score(statistics: SiteStatistics) -> Tensor:
    """E_Q log P of one site's values, up to what does not depend on parameters."""
    family = statistics.family
    simplex = family in (CATEGORICAL, ONE_HOT_CATEGORICAL, MULTINOMIAL)
    slots = {name: rebuilt(slot, simplex and name == "probs") for name, slot in statistics.slots.items()}
    if statistics.centre is not None:
        slots["loc"] = slots["loc"] - statistics.centre
    if "covariance_matrix" in slots:
        slots["scale_tril"] = torch.linalg.cholesky(slots.pop("covariance_matrix"))
    natural, log_normalizer = family.natural(slots), family.log_normalizer(slots)
    weighted = torch.where(statistics.sums != 0, statistics.sums * natural, 0.0)
    return weighted.sum() - (statistics.counts * log_normalizer).expand(statistics.counts.shape).sum()


def check(pair: Pair) -> Statistics:
    belief, statistics = found_by(pair)
    direct = [name for name in pair.learned if name not in statistics.indirect]
    leaves = [unconstrained(name) for name in direct]
    if not leaves:
        pytest.skip("no parameter feeds a distribution directly")
    whole = expected_log_joint(belief.weights, pair.enumerate(differentiable=True))
    expected = torch.autograd.grad(whole, leaves, allow_unused=True, materialize_grads=True)
    parts = [expected_score(site) for site in statistics.sites]
    actual = torch.autograd.grad(sum(parts), leaves, allow_unused=True, materialize_grads=True)
    for name, one, other in zip(direct, actual, expected, strict=True):
        assert torch.isfinite(other).all(), name
        assert_equal(one, other, 1e-8, scale=torch.cat([other.flatten().abs(), torch.ones(1)]))
    return statistics


@pytest.mark.parametrize("name", [name for name in DIFFERENTIABLE if name not in UNSPLIT])
def test_statistics_give_the_gradient_of_the_expected_log_joint_without_a_guide(name: str) -> None:
    program = PROGRAMS[name]
    pyro.clear_param_store()
    try:
        check(pair_of(program.model, empty, *program.args, **program.kwargs))
    except vfe_errors.MissingGuideSiteError:
        check(pair_of(program.model, program.guide, *program.args, **program.kwargs))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_statistics_give_the_gradient_of_the_expected_log_joint_under_a_guide(name: str) -> None:
    program = PROGRAMS[name]
    pyro.clear_param_store()
    check(pair_of(program.model, program.guide, *program.args, **program.kwargs))
