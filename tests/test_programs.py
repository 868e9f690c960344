"""Every program against its oracle, and against Pyro where Pyro can."""

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from checks import (
    DIFFERENTIABLE,
    assert_equal,
    check_gradients,
    check_random_program,
    check_terms,
    expected_of,
    oracle_of,
)
from hypothesis import HealthCheck, given, settings
from oracles import gradients
from programs import BAD_PROGRAMS, INFINITE, PROGRAMS, SAMPLED_PROGRAMS, Program
from programs.case import empty
from pyro.infer import TraceEnum_ELBO
from random_programs import ProgramSpec, program_specs
from torch import Tensor

import pyro_vfe as vfe
from pyro_vfe.errors import VFEError
from pyro_vfe.program.provenance import Provenance

TABLED = {name: program for name, program in PROGRAMS.items() if program.expected is None}
PLATED = [(name, plate) for name, program in TABLED.items() for plate in program.plates]
MARGINALS = [(name, sites) for name, program in TABLED.items() for sites in program.marginals]
PROBS_PER_VALUE = (dist.Bernoulli, dist.Categorical, dist.OneHotCategorical)
PYRO_CAN = {name: program for name, program in PROGRAMS.items() if program.pyro_nesting is not None}


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_term_equals_the_full_joint_table(name: str) -> None:
    check_terms(name)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_loss_equals_the_full_joint_table(name: str) -> None:
    program, (expected, _) = PROGRAMS[name], expected_of(name)
    loss = vfe.FreeEnergy().loss(program.model, program.guide, *program.args, **program.kwargs)
    assert loss == pytest.approx(expected["free_energy"].item(), rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_equal_those_of_the_full_joint_table(name: str) -> None:
    check_gradients(name)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_loss_and_grads_leaves_the_gradients_on_the_parameters(name: str) -> None:
    program, (terms, expected) = PROGRAMS[name], expected_of(name)
    pyro.poutine.trace(program.model).get_trace(*program.args, **program.kwargs)
    for _, leaf in pyro.get_param_store().named_parameters():
        leaf.grad = None
    loss = vfe.FreeEnergy().loss_and_grads(program.model, program.guide, *program.args, **program.kwargs)
    assert loss == pytest.approx(terms["free_energy"].item(), rel=1e-10, abs=1e-10)
    for parameter, leaf in pyro.get_param_store().named_parameters():
        assert_equal(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, expected[parameter], 1e-8)
        leaf.grad = None


@pytest.mark.parametrize(("name", "plate"), PLATED)
def test_the_terms_of_each_datum_equal_those_of_its_own_table(name: str, plate: str) -> None:
    program = PROGRAMS[name]
    scale = _scale_of(program, name)
    terms = vfe.FreeEnergy().decompose(program.model, program.guide, *program.args, **program.kwargs).by(plate)
    for term, values in oracle_of(name).by(plate).items():
        assert_equal(getattr(terms, term), scale * values, 1e-10, scale=expected_of(name)[0]["free_energy"])


def _scale_of(program: Program, name: str) -> Tensor:
    if program.scaled_plate is None:
        return torch.tensor(1.0)
    return torch.stack([site.scale for site in oracle_of(name).model[0].sites.values()])[0]


@pytest.mark.parametrize(("name", "sites"), MARGINALS)
def test_marginals_equal_those_of_the_full_joint_table(name: str, sites: tuple[str, ...]) -> None:
    program = PROGRAMS[name]
    posterior = vfe.posterior(program.model, *program.args, **program.kwargs)
    expected = oracle_of(name).posterior.marginal(*sites)
    assert_equal(posterior.marginal(*sites).reshape(expected.shape), expected, 1e-10)


@pytest.mark.parametrize(("name", "site"), [(name, sites[0]) for name, sites in MARGINALS if len(sites) == 1])
def test_compute_marginals_gives_distributions_over_the_support(name: str, site: str) -> None:
    program = PROGRAMS[name]
    marginal = vfe.FreeEnergy().compute_marginals(program.model, program.guide, *program.args, **program.kwargs)[site]
    expected = oracle_of(name).posterior.marginal(site)
    expected = expected / expected.sum(-1, keepdim=True)
    probs = marginal.log_prob(marginal.enumerate_support()).exp().movedim(0, -1)
    assert_equal(probs.reshape(expected.shape), expected, 1e-10)


@pytest.mark.parametrize("name", [name for name, program in TABLED.items() if program.marginals])
def test_the_posterior_equals_that_of_the_full_joint_table(name: str) -> None:
    program, expected = PROGRAMS[name], oracle_of(name).posterior
    posterior = vfe.posterior(program.model, *program.args, **program.kwargs)
    assert_equal(posterior.log_evidence, expected.log_evidence, 1e-10)
    assert_equal(posterior.entropy(), expected.entropy(), 1e-10, scale=expected.log_evidence)
    assert_equal(expected.log_prob(posterior.mode()), expected.probs.max().log(), 1e-10)
    for row in expected.rows[:: 1 + len(expected.rows) // 5]:
        assert_equal(posterior.log_prob(row.values), expected.log_prob(row.values), 1e-10, scale=expected.log_evidence)


@pytest.mark.parametrize("name", INFINITE)
def test_mass_on_the_impossible_is_an_infinite_gap_and_the_rest_stays_finite(name: str) -> None:
    program = INFINITE[name]
    terms = vfe.FreeEnergy().decompose(program.model, program.guide, *program.args)
    expected = oracle_of(name).terms
    for term in ("free_energy", "energy", "gap"):
        assert getattr(terms, term) == math.inf == expected[term]
    for term in ("surprise", "entropy"):
        assert_equal(getattr(terms, term), expected[term], 1e-10)


def annotated(program: Callable[..., Any], given_sites: set[str]) -> Callable[..., Any]:
    """Marks for Pyro's enumeration every discrete site but those that the guide provides."""

    def mark(site: Any) -> dict[str, str]:
        is_free = site["name"] not in given_sites and not site["is_observed"]
        return {"enumerate": "parallel"} if is_free and getattr(site["fn"], "has_enumerate_support", False) else {}

    return pyro.poutine.infer_config(program, mark)


@contextmanager
def as_pyro_wants_it(program: Program) -> Iterator[tuple[Callable[..., Any], Callable[..., Any]]]:
    """The model and the guide with what Pyro needs to be told."""
    trace = pyro.poutine.trace(program.guide).get_trace(*program.args, **program.kwargs)
    yield annotated(program.model, set(trace.nodes)), annotated(program.guide, set())


@pytest.mark.parametrize("name", PYRO_CAN)
def test_agrees_with_TraceEnum_ELBO(name: str) -> None:
    program = PROGRAMS[name]
    with as_pyro_wants_it(program) as (model, guide):
        elbo = TraceEnum_ELBO(max_plate_nesting=program.pyro_nesting)
        theirs = elbo.differentiable_loss(model, guide, *program.args, **program.kwargs)
    ours = vfe.FreeEnergy().differentiable_loss(program.model, program.guide, *program.args, **program.kwargs)
    assert_equal(ours, theirs, 1e-10)
    found = gradients(ours)
    for parameter, gradient in gradients(theirs).items():
        assert_equal(found[parameter], gradient, 1e-8)


@pytest.mark.parametrize("name", [name for name in PYRO_CAN if PROGRAMS[name].guide is empty])
def test_marginals_agree_with_TraceEnum_ELBO(name: str) -> None:
    program = PROGRAMS[name]
    with as_pyro_wants_it(program) as (model, guide):
        elbo = TraceEnum_ELBO(max_plate_nesting=program.pyro_nesting)
        theirs = elbo.compute_marginals(model, guide, *program.args, **program.kwargs)
    ours = vfe.FreeEnergy().compute_marginals(program.model, program.guide, *program.args, **program.kwargs)
    assert ours.keys() == theirs.keys()
    for site, marginal in theirs.items():
        if not isinstance(marginal, PROBS_PER_VALUE):
            continue  # Of other kinds Pyro makes one with a parameter per value, which they do not take.
        assert_equal(ours[site].probs.reshape(marginal.probs.shape), marginal.probs, 1e-8)


@pytest.mark.parametrize("name", SAMPLED_PROGRAMS)
def test_sampled_latents_give_the_free_energy_on_average(name: str) -> None:
    program = SAMPLED_PROGRAMS[name]
    elbo = vfe.FreeEnergy()
    losses = torch.tensor([elbo.loss(program.model, program.guide, *program.args) for _ in range(200)])
    assert losses.isfinite().all()
    if program.moments is not None:
        mean, spread = program.moments()
        assert abs(losses.mean() - mean) < 5 * spread / math.sqrt(len(losses))


@pytest.mark.parametrize("name", SAMPLED_PROGRAMS)
def test_sampled_latents_are_reported_as_such(name: str) -> None:
    program = SAMPLED_PROGRAMS[name]
    terms = vfe.FreeEnergy(num_particles=10).decompose(program.model, program.guide, *program.args)
    assert not terms.exact
    assert terms.stderr > 0
    assert terms.gap >= -1e-10


@pytest.mark.parametrize("name", BAD_PROGRAMS)
def test_bad_input_names_the_site_and_the_way_out(name: str) -> None:
    program = BAD_PROGRAMS[name]
    elbo = vfe.FreeEnergy()
    with pytest.raises(VFEError) as refusal:
        for _ in range(2):
            elbo.loss_and_grads(program.model, program.guide, *program.args)
    for word in program.words:
        assert word in str(refusal.value)


@pytest.mark.filterwarnings("ignore:The model observes nothing")
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(program_specs())
def test_random_programs(spec: ProgramSpec) -> None:
    check_random_program(spec)


def test_nothing_of_a_run_outlives_its_numbers() -> None:
    left = []
    gc.collect()
    gc.freeze()  # what other tests left is none of this one's
    try:
        for name, program in TABLED.items():
            pyro.clear_param_store()
            vfe.FreeEnergy().decompose(program.model, program.guide, *program.args, **program.kwargs)
            gc.collect()
            left += [name for found in gc.get_objects() if isinstance(found, Provenance)]
    finally:
        gc.unfreeze()
    assert left == []
