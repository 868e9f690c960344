"""What every program has to satisfy, however the library goes about it."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pyro
import torch
from oracles import TERMS, Oracle, gradients, oracle
from programs import INFINITE, PROGRAMS, Program
from random_programs import ProgramSpec, guide_of, model_of
from torch import Tensor

import pyro_vfe as vfe

DIFFERENTIABLE = {
    name: program for name, program in PROGRAMS.items() if not name.startswith(("chain_of", "ising", "120"))
}


@cache
def oracle_of(name: str) -> Oracle:
    program = {**PROGRAMS, **INFINITE}[name]
    return oracle(program.model, program.guide, *program.args, scaled_plate=program.scaled_plate, **program.kwargs)


@cache
def expected_of(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The terms and the gradients of F, computed once."""
    expected = PROGRAMS[name].expected
    # Made anew: the gradients are those of the parameters that stand in Pyro's store now.
    terms = oracle_of.__wrapped__(name).terms if expected is None else expected()
    found = gradients(terms["free_energy"])
    return {term: value.detach() for term, value in terms.items()}, found


def assert_equal(actual: Tensor, expected: Tensor, relative: float, scale: Tensor | None = None) -> None:
    """Compares relative to the largest number that went into the result: a gap is a difference of two surprises."""
    size = expected.abs().max() if scale is None else torch.as_tensor(scale).abs().max()
    torch.testing.assert_close(
        torch.as_tensor(actual).detach().to(expected),
        expected.detach(),
        rtol=relative,
        atol=relative * max(1.0, size.item()),
    )


def free_energy_gradients(elbo: Any, program: Program) -> dict[str, Tensor]:
    loss = elbo.differentiable_loss(program.model, program.guide, *program.args, **program.kwargs)
    return gradients(loss)


def check_terms(name: str) -> None:
    """Every term of a program equals the full joint table."""
    program, (expected, _) = PROGRAMS[name], expected_of(name)
    terms = vfe.FreeEnergy().decompose(program.model, program.guide, *program.args, **program.kwargs)
    for term, value in expected.items():
        assert_equal(getattr(terms, term), value, 1e-10, scale=expected["free_energy"])


def check_gradients(name: str) -> None:
    """The gradients of a program equal those of the full joint table."""
    _, expected = expected_of(name)
    found = free_energy_gradients(vfe.FreeEnergy(), PROGRAMS[name])
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert_equal(found[parameter], gradient, 1e-8)


def check_random_program(spec: ProgramSpec) -> None:
    """Terms and gradients of a generated program equal those of the full joint table, infinite ones included."""
    pyro.clear_param_store()
    model, guide = model_of(spec), guide_of(spec)
    exact = oracle(model, guide)
    terms = vfe.FreeEnergy().decompose(model, guide)
    for term in TERMS:
        value = exact.terms[term]
        if value.isfinite():
            assert_equal(getattr(terms, term), value, 1e-10)
        elif term != "accuracy":  # complexity - F is inf - inf there
            assert getattr(terms, term) == value
    if exact.terms["free_energy"].isfinite():
        expected = exact.gradients()
        for parameter, gradient in gradients(vfe.FreeEnergy().differentiable_loss(model, guide)).items():
            assert_equal(gradient, expected[parameter], 1e-8)


def check_pair(model: Callable[[], None], guide: Callable[[], None]) -> Oracle:
    """Terms, and gradients call after call, equal those of the joint table, which is returned."""
    exact, elbo = oracle(model, guide), vfe.FreeEnergy()
    terms = elbo.decompose(model, guide)
    for term in TERMS:
        assert_equal(getattr(terms, term), exact.terms[term], 1e-10)
    expected = exact.gradients()
    for _call in range(3):
        for parameter, gradient in gradients(elbo.differentiable_loss(model, guide)).items():
            assert_equal(gradient, expected[parameter], 1e-8)
    return exact
