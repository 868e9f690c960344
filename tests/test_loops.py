"""Every program once more with its loops rolled into chains, however short, and dims that latents share."""

from collections.abc import Iterator

import pytest
from checks import DIFFERENTIABLE, check_gradients, check_random_program, check_terms
from hypothesis import HealthCheck, given, settings
from programs import PROGRAMS
from random_programs import ProgramSpec, program_specs

from pyro_vfe.engine import repeats
from pyro_vfe.engine.repeats import find_loop
from pyro_vfe.program import colouring


@pytest.fixture(autouse=True, scope="module")
def short_loops_are_rolled() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeats, "FEWEST_STEPS", 2)
        patch.setattr(colouring, "_OWN_DIMS", 0)
        find_loop.cache_clear()
        yield
    find_loop.cache_clear()


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_term_equals_the_full_joint_table(name: str) -> None:
    check_terms(name)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_equal_those_of_the_full_joint_table(name: str) -> None:
    check_gradients(name)


@pytest.mark.filterwarnings("ignore:The model observes nothing")
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(program_specs())
def test_random_programs(spec: ProgramSpec) -> None:
    check_random_program(spec)
