"""Random programs of every kind against their tables in the linear domain; `make fuzz` tries any number of them."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from checks import assert_equal
from linear_oracle import Expected
from linear_tables import Block, Weight, log_total, summed
from oracles import TERMS, oracle
from seeded_checks import verdict_on
from seeded_programs import PlateSpec, ProgramSpec, SiteSpec, guide_of, model_of, program_spec

BLOCK = 10


@pytest.mark.parametrize("first", range(0, 200, BLOCK))
def test_seeded_programs_are_right_or_refused_in_words(first: int) -> None:
    verdicts = [verdict_on(program_spec(seed)) for seed in range(first, first + BLOCK)]
    wrong = [str(verdict) for verdict in verdicts if verdict.word == "wrong"]
    assert not wrong, "\n\n".join(wrong)


UNWEIGHTED = ("subsample", "scale", "in_place", "gaps")


@pytest.mark.parametrize("seed", range(300, 340))
def test_the_linear_table_agrees_with_ordinary_runs(seed: int) -> None:
    """The oracle reads the specification, the other one runs the programs: what Pyro makes of a specification."""
    spec = program_spec(seed, UNWEIGHTED)
    expected = Expected(spec)
    if expected.no_free_energy or any(site.mask == "obs_mask" for site in spec.model):  # What is missing has no values
        return
    exact = oracle(model_of(spec), guide_of(spec))
    for term in TERMS:
        if expected.terms[term].isfinite() or exact.terms[term].isfinite():
            assert_equal(expected.terms[term], exact.terms[term], 1e-10)


def test_a_specification_prints_as_the_call_that_makes_it() -> None:
    spec = program_spec(7)
    assert eval(repr(spec), {"ProgramSpec": ProgramSpec, "PlateSpec": PlateSpec, "SiteSpec": SiteSpec}) == spec


def test_a_gap_that_is_defined_is_not_negative() -> None:
    """What the oracle takes for defined is a bound."""
    for seed in range(400, 500):
        pyro.clear_param_store()
        expected = Expected(program_spec(seed))
        if not expected.no_free_energy and not expected.no_surprise and expected.terms["gap"].isfinite():
            assert expected.terms["gap"] > -1e-10


def test_the_linear_table_gives_the_gradient_of_a_probability_of_zero() -> None:
    p = torch.tensor([0.0, 0.4, 0.6], requires_grad=True)
    z = ("z", ())
    prior, likelihood = p / p.sum(), dist.Normal(torch.arange(3.0), 1.0).log_prob(torch.tensor(0.2)).exp()
    blocks = [Block((z,), prior), Block((z,), likelihood)]
    surprise = -log_total(summed(blocks, [z], {z: Weight()}))
    torch.testing.assert_close(surprise.detach(), torch.tensor(1.81249263), rtol=1e-8, atol=0)
    (gradient,) = torch.autograd.grad(surprise, p)
    torch.testing.assert_close(gradient, torch.tensor([-1.39540925, -0.77456282, 0.51637521]), rtol=1e-7, atol=0)
