"""E-phases and M-phases by the steps of an optimiser: they step as SVI does, on their own side alone."""

from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import PROGRAMS
from programs.case import categorical, empty, noise, positive, simplex, tensor
from programs.plates import COUNTS, mixture, mixture_guide
from pyro.infer import SVI
from test_numerical import exact_belief, problem_of
from torch import Tensor
from torch.distributions import constraints

import pyro_vfe as vfe
from pyro_vfe.errors import NotFiniteError, StructureError, VFEError, VFEWarning
from pyro_vfe.learning.gradient import Gradient
from pyro_vfe.learning.pair import Pair
from pyro_vfe.program.parameters import Parameters, restore, snapshot, unconstrained
from pyro_vfe.program.programs import Programs


def pair_of(model: Any, guide: Any, *args: Any, **options: Any) -> Pair:
    parameters = Parameters()
    watched = parameters.watched(model, "model"), parameters.watched(guide, "guide")
    return Pair(*watched, args, {}, Programs(), parameters, **options)


def values() -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


def test_E_phases_alone_end_where_SVI_of_the_guide_ends_with_the_model_held() -> None:
    vfe.FreeEnergy().loss(mixture, mixture_guide, COUNTS)
    model_values = values()

    def model(counts: Tensor) -> None:
        with pyro.plate("data", len(counts)):
            z = categorical("z", model_values["weights"])
            pyro.sample("u", dist.Poisson(model_values["rates"][z]), obs=counts)

    svi = SVI(model, mixture_guide, pyro.optim.Adam({"lr": 0.05}), loss=vfe.FreeEnergy())
    for _ in range(7):
        svi.step(COUNTS)
    expected = values()["q"]
    pyro.clear_param_store()
    Gradient(pyro.optim.Adam({"lr": 0.05}), 7).update(pair_of(mixture, mixture_guide, COUNTS), 0)
    torch.testing.assert_close(values()["q"], expected, rtol=1e-9, atol=1e-12)


def test_an_E_phase_changes_the_guide_alone_and_leaves_no_gradient() -> None:
    pair = pair_of(mixture, mixture_guide, COUNTS)
    pair.enumerate()
    before = values()
    Gradient(pyro.optim.Adam({"lr": 0.05}), 3).update(pair, 0)
    after = values()
    assert not torch.equal(after["q"], before["q"])
    for name in ("weights", "rates"):
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)
    assert all(unconstrained(name).grad is None for name in after)


def test_an_M_phase_changes_the_named_parameters_alone_and_leaves_no_gradient() -> None:
    problem = problem_of(mixture, COUNTS, names=["rates"])
    before = values()
    words = Gradient(pyro.optim.Adam({"lr": 0.05}), 3).update(problem)
    assert words == {"rates": "3 gradient steps"}
    assert not torch.equal(values()["rates"], before["rates"])
    torch.testing.assert_close(values()["weights"], before["weights"], rtol=0, atol=0)
    assert all(unconstrained(name).grad is None for name in before)


def test_one_step_of_gradient_descent_in_the_M_phase_is_along_the_gradient_of_the_expected_log_joint() -> None:
    problem = problem_of(mixture, COUNTS)
    leaves = [unconstrained(name) for name in problem.names]
    before = [leaf.detach().clone() for leaf in leaves]
    gradients = torch.autograd.grad(problem.expected_log_joint(), leaves)
    Gradient(partial(torch.optim.SGD, lr=1e-3), 1).update(problem)
    for leaf, old, gradient in zip(leaves, before, gradients, strict=True):
        torch.testing.assert_close(leaf.detach(), old + 1e-3 * gradient, rtol=1e-10, atol=1e-12)


def test_the_gradient_of_other_code_on_parameters_of_the_other_side_stays() -> None:
    pair = pair_of(mixture, mixture_guide, COUNTS)
    pair.enumerate()
    unconstrained("rates").grad = torch.full((3,), 5.0)
    Gradient(pyro.optim.Adam({"lr": 0.05}), 2).update(pair, 0)
    assert torch.equal(unconstrained("rates").grad, torch.full((3,), 5.0))


def test_a_random_start_knows_nothing_of_the_starts_before_it() -> None:
    phase = Gradient(pyro.optim.Adam({"lr": 0.05}), 2)
    em = vfe.EM(mixture, mixture_guide, e_phase=phase)
    pair_of(mixture, mixture_guide, COUNTS).enumerate()
    start, ends = snapshot(pyro.get_param_store().keys()), []
    for _ in range(2):
        restore(start)
        with pytest.warns(VFEWarning, match="max_iter"):
            ends.append(em.run(COUNTS, n_init=2, max_iter=3, progress_bar=False).restarts)
    assert ends[0][0].free_energy != ends[1][0].free_energy  # The first start goes on with the optimiser's moments.
    assert ends[0][1].free_energy == ends[1][1].free_energy


def test_its_belief_is_the_guides() -> None:
    pair = pair_of(mixture, mixture_guide, COUNTS)
    phase = Gradient(pyro.optim.Adam({"lr": 0.05}), 2)
    phase.update(pair, 0)
    found = phase.belief(pair.enumerate(), 0)
    terms = vfe.FreeEnergy().decompose(mixture, mixture_guide, COUNTS)
    torch.testing.assert_close(found.free_energy, terms.free_energy)
    torch.testing.assert_close(found.surprise, terms.surprise)


@pytest.mark.parametrize("name", ["network_amortised", "pyro_module_amortised", "chain_mean_field", "nested_guided"])
def test_many_small_steps_lower_F(name: str) -> None:
    program = PROGRAMS[name]
    pair = pair_of(program.model, program.guide, *program.args)
    phase = Gradient(pyro.optim.Adam({"lr": 0.01}), 40)
    before = phase.belief(pair.enumerate(), 0).free_energy
    phase.update(pair, 0)
    assert phase.belief(pair.enumerate(), 0).free_energy < before


def guide_with_a_zero(counts: Tensor) -> None:
    start = tensor([[0.5, 0.5, 0.0]]).repeat(len(counts), 1)
    with pyro.plate("data", len(counts)):
        categorical("z", pyro.param("q", start, constraint=constraints.simplex))


def test_a_probability_of_exactly_zero_stays_zero_and_the_others_move() -> None:
    """The best Q without the third value is the posterior without it."""
    pair = pair_of(mixture, guide_with_a_zero, COUNTS)
    Gradient(pyro.optim.Adam({"lr": 0.05}), 400).update(pair, 0)
    weights, rates = values()["weights"], values()["rates"]
    log_joint = weights.log() + dist.Poisson(rates).log_prob(COUNTS.unsqueeze(-1))
    log_joint[:, 2] = -torch.inf
    torch.testing.assert_close(values()["q"], log_joint.softmax(-1), rtol=1e-3, atol=1e-4)
    assert bool((values()["q"][:, 2] == 0).all())


def test_a_guide_without_parameters_is_refused() -> None:
    with pytest.raises(StructureError, match="no parameters"):
        Gradient(pyro.optim.Adam({"lr": 0.05}), 1).update(pair_of(mixture, empty, COUNTS), 0)


def test_a_guide_whose_parameters_are_all_fixed_is_refused() -> None:
    pair = pair_of(mixture, mixture_guide, COUNTS, fixed=frozenset({"q"}))
    with pytest.raises(StructureError, match="do not fix"):
        Gradient(pyro.optim.Adam({"lr": 0.05}), 1).update(pair, 0)


def test_a_step_that_leads_where_nothing_is_finite_is_taken_back() -> None:
    def model(points: Tensor) -> None:
        rate = pyro.param("rate", tensor(3.0))
        with pyro.plate("data", len(points)):
            pyro.sample("u", dist.Exponential(rate, validate_args=False), obs=points)

    problem = problem_of(model, noise(5, seed=1).exp())
    with pytest.raises(NotFiniteError, match="learning rate"):
        Gradient(partial(torch.optim.SGD, lr=1e3), 3).update(problem)
    assert pyro.param("rate") == 3.0


def test_an_M_phase_with_a_guide_learns_from_its_belief() -> None:
    """With Q = P(v | u), steps of the M-phase lower the surprise as well."""

    def model(counts: Tensor) -> None:
        with pyro.plate("data", len(counts)):
            z = categorical("z", simplex("weights", 2))
            pyro.sample("u", dist.Poisson(positive("rates", 2)[z]), obs=counts)

    problem = problem_of(model, COUNTS)
    before = problem.belief.surprise
    Gradient(partial(torch.optim.SGD, lr=1e-2), 20).update(problem)
    assert exact_belief(problem.pair.enumerate()).surprise < before


def test_no_steps_are_refused() -> None:
    with pytest.raises(VFEError, match="num_steps=0"):
        Gradient(pyro.optim.Adam({"lr": 0.05}), 0)
