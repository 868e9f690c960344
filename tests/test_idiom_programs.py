"""Random programs of idioms against their joint tables: right, and none refused."""

import warnings

import pyro
import pytest
import torch
from checks import assert_equal
from idiom_programs import guide_of, idioms_of, model_of
from oracles import gradients, oracle

import pyro_vfe as vfe
from pyro_vfe.errors import VFEWarning


def check(seed: int) -> None:
    """F, surprise and gradients of the program of a seed equal those of its joint table."""
    spec = idioms_of(seed)
    model, guide = model_of(spec), guide_of(spec)
    exact, elbo = oracle(model, guide), vfe.FreeEnergy()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The programs do not broadcast", VFEWarning)
        terms = elbo.decompose(model, guide)
        found = gradients(elbo.differentiable_loss(model, guide))
    for term in ("free_energy", "surprise", "gap", "entropy"):
        assert_equal(getattr(terms, term), exact.terms[term], 1e-9)
    expected = exact.gradients()
    assert found.keys() == expected.keys()
    for parameter, gradient in found.items():
        assert_equal(gradient, expected[parameter], 1e-8)


@pytest.mark.parametrize("seed", range(200))
def test_a_random_program_of_idioms_equals_its_joint_table(seed: int) -> None:
    check(seed)


if __name__ == "__main__":  # make fuzz-idioms N=2000 SEED=1000
    import sys

    first, count = int(sys.argv[1]), int(sys.argv[2])
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    wrong = 0
    for seed in range(first, first + count):
        pyro.clear_param_store()
        try:
            check(seed)
        except Exception as error:
            wrong += 1
            print(seed, idioms_of(seed), type(error).__name__, str(error)[:300], sep="\n  ", flush=True)
    print(f"seeds {first} to {first + count - 1}: {count - wrong} right, {wrong} refused or wrong")
    sys.exit(wrong > 0)
