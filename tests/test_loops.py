"""Every program once more with its loops rolled into chains, however short, and dims that latents share."""

from collections.abc import Iterator

import pyro
import pytest
from hypothesis import HealthCheck, given, settings
from oracles import TERMS, gradients, oracle
from programs import PROGRAMS
from random_programs import ProgramSpec, guide_of, model_of, program_specs
from test_programs import DIFFERENTIABLE, assert_equal, expected_of, free_energy_gradients

import pyro_vfe as vfe
from pyro_vfe.engine import repeats
from pyro_vfe.engine.repeats import find_loop
from pyro_vfe.program import layout


@pytest.fixture(autouse=True, scope="module")
def short_loops_are_rolled() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeats, "FEWEST_STEPS", 2)
        patch.setattr(layout, "_OWN_DIMS", 0)
        find_loop.cache_clear()
        yield
    find_loop.cache_clear()


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_term_equals_the_full_joint_table(name: str) -> None:
    program, (expected, _) = PROGRAMS[name], expected_of(name)
    terms = vfe.FreeEnergy().decompose(program.model, program.guide, *program.args, **program.kwargs)
    for term, value in expected.items():
        assert_equal(getattr(terms, term), value, 1e-10, scale=expected["free_energy"])


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_equal_those_of_the_full_joint_table(name: str) -> None:
    _, expected = expected_of(name)
    found = free_energy_gradients(vfe.FreeEnergy(), PROGRAMS[name])
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert_equal(found[parameter], gradient, 1e-8)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(program_specs())
def test_random_programs(spec: ProgramSpec) -> None:
    pyro.clear_param_store()
    model, guide = model_of(spec), guide_of(spec)
    exact = oracle(model, guide)
    terms = vfe.FreeEnergy().decompose(model, guide)
    for term in TERMS:
        if exact.terms[term].isfinite():
            assert_equal(getattr(terms, term), exact.terms[term], 1e-10)
    if exact.terms["free_energy"].isfinite():
        expected = exact.gradients()
        for parameter, gradient in gradients(vfe.FreeEnergy().differentiable_loss(model, guide)).items():
            assert_equal(gradient, expected[parameter], 1e-8)
