"""The M-phase in closed form inside programs: no search finds better, and what it cannot do it hands on."""

from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from checks import DIFFERENTIABLE
from programs import PROGRAMS
from programs.case import empty, positive, simplex, tensor
from torch import Tensor
from torch.distributions import constraints

from pyro_vfe.errors import DegenerateError, VFEError
from pyro_vfe.learning.closed_form import ClosedForm
from pyro_vfe.learning.e_phases import Exact
from pyro_vfe.learning.guided import guided_belief
from pyro_vfe.learning.numerical import Numerical
from pyro_vfe.learning.pair import Pair
from pyro_vfe.learning.phases import MPhase, Problem
from pyro_vfe.program.parameters import Parameters, restore, snapshot
from pyro_vfe.program.programs import Programs

COUNTS = tensor([1.0, 0.0, 3.0, 9.0, 12.0, 8.0])


def problem_of(model: Any, guide: Any = empty, *args: Any, **kwargs: Any) -> Problem:
    parameters = Parameters()
    watched = parameters.watched(model, "model"), parameters.watched(guide, "guide")
    pair = Pair(*watched, args, kwargs, Programs(), parameters)
    enumeration = pair.enumerate()
    belief = guided_belief(enumeration) if enumeration.guide_latents else Exact().belief(enumeration, 0)
    return Problem(pair, enumeration, belief, pair.learned)


def solved(phase: MPhase, problem: Problem) -> tuple[float, dict[str, str]]:
    """E_Q log P at the phase's solution, and its words."""
    words = dict(phase.update(problem))
    return float(problem.expected_log_joint().detach()), words


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_no_search_finds_a_better_m_phase(name: str) -> None:
    program = PROGRAMS[name]
    pyro.clear_param_store()
    problem = problem_of(program.model, program.guide, *program.args, **program.kwargs)
    if not problem.names:
        pytest.skip("the model has no parameters")
    before, start = snapshot(problem.names), float(problem.expected_log_joint().detach())
    problem = problem_of(program.model, program.guide, *program.args, **program.kwargs)
    try:
        found, _ = solved(ClosedForm(Numerical(max_iter=30)), problem)
    except VFEError as error:
        assert "floor" in str(error) or "prior" in str(error)
        for name_, value in snapshot(problem.names).items():
            assert torch.equal(value, before[name_])
        return
    assert found >= start - 1e-9 * abs(start)
    restore(before)
    searched, _ = solved(
        Numerical(max_iter=30), problem_of(program.model, program.guide, *program.args, **program.kwargs)
    )
    assert found >= searched - 1e-7 * max(1.0, abs(searched))


def words_of(model: Any, *args: Any, guide: Any = empty) -> dict[str, str]:
    pyro.clear_param_store()
    return solved(ClosedForm(), problem_of(model, guide, *args))[1]


def test_an_average_of_equal_entries_is_no_selection() -> None:
    """At the start all rates are equal, so their mean has the value of each: the graph tells them apart."""

    def model(counts: Tensor) -> None:
        rates = pyro.param("rates", torch.full((3,), 4.0), constraint=constraints.positive)
        with pyro.plate("data", len(counts)):
            pyro.sample("u", dist.Poisson(rates.mean()), obs=counts)

    assert words_of(model, COUNTS)["rates"].startswith("L-BFGS")


def test_a_parameter_that_a_network_reads_goes_to_the_search() -> None:
    def model(counts: Tensor) -> None:
        weights, rates = simplex("weights", 2), positive("rates", 2, seed=1)
        slope = pyro.param("slope", torch.tensor(0.1))
        with pyro.plate("data", len(counts)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("u", dist.Poisson(rates[z] * (slope * torch.arange(6.0)).exp()), obs=counts)

    words = words_of(model, COUNTS)
    assert words["weights"].startswith("closed form")
    assert "no closed form: site 'u' computes with it" in words["rates"]
    assert "no closed form: site 'u' computes with it" in words["slope"]


class Hidden(dist.Normal):
    """A distribution that holds a parameter where nobody looks for it."""

    def __init__(self, loc: Tensor, scale: Tensor, secret: Any) -> None:
        super().__init__(loc, scale)
        self.secret = secret

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Hidden":
        return Hidden(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.secret)

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value) - (self.secret() - 2.0) ** 2


def penalised(counts: Tensor) -> None:
    """`rate` feeds a Poisson directly, and a penalty inside a closure as well: the pooled form knows of one only."""
    rate = pyro.param("rate", torch.tensor(3.0), constraint=constraints.positive)
    pyro.sample("penalty", Hidden(torch.tensor(0.0), torch.tensor(1.0), lambda: rate), obs=torch.tensor(0.0))
    with pyro.plate("data", len(counts)):
        pyro.sample("u", dist.Poisson(rate), obs=counts)


def test_a_parameter_used_out_of_sight_is_found_by_the_programs_own_gradient() -> None:
    words = words_of(penalised, COUNTS)
    assert "no closed form: the programs' own gradient does not vanish there" in words["rate"]
    # sum u / r - n - 2 (r - 2) = 0
    n, total = len(COUNTS), float(COUNTS.sum())
    best = ((4 - n) + ((n - 4) ** 2 + 8 * total) ** 0.5) / 4
    assert float(pyro.param("rate").detach()) == pytest.approx(best, rel=1e-8)


def test_a_floor_that_is_not_met_hides_nothing_from_the_programs_own_gradient() -> None:
    problem = problem_of(penalised, empty, COUNTS)
    words = ClosedForm().update(replace(problem, pair=replace(problem.pair, floor=1e-3)))
    assert "the programs' own gradient does not vanish there" in words["rate"]


def test_a_parameter_that_comes_up_later_is_looked_at_too() -> None:
    def model(counts: Tensor, is_penalised: bool) -> None:
        with pyro.plate("days", len(counts)):
            pyro.sample("before", dist.Poisson(positive("other")), obs=counts)
        if is_penalised:
            penalised(counts)

    phase, first = ClosedForm(), problem_of(model, empty, COUNTS, False)
    assert phase.update(first).keys() == {"other"}
    pair = replace(first.pair, args=(COUNTS, True))
    enumeration = pair.enumerate()
    words = phase.update(Problem(pair, enumeration, Exact().belief(enumeration, 0), pair.learned))
    assert words["other"].startswith("closed form")
    assert "the programs' own gradient does not vanish there" in words["rate"]


def test_programs_are_looked_at_after_a_first_m_phase_that_failed() -> None:
    phase, first = ClosedForm(), problem_of(penalised, empty, torch.zeros(3))
    with pytest.raises(DegenerateError):
        phase.update(first)
    pair = replace(first.pair, args=(COUNTS,))
    enumeration = pair.enumerate()
    words = phase.update(Problem(pair, enumeration, Exact().belief(enumeration, 0), pair.learned))
    assert "the programs' own gradient does not vanish there" in words["rate"]


def test_tied_parameters_pool_their_sites() -> None:
    def model(counts: Tensor, waits: Tensor) -> None:
        rate = pyro.param("rate", torch.tensor(3.0), constraint=constraints.positive)
        with pyro.plate("data", len(counts)):
            pyro.sample("u", dist.Poisson(rate), obs=counts)
        with pyro.plate("intervals", len(waits)):
            pyro.sample("w", dist.Exponential(rate), obs=waits)

    waits = tensor([0.2, 0.5, 0.1])
    assert words_of(model, COUNTS, waits)["rate"].startswith("closed form")
    best = (COUNTS.sum() + len(waits)) / (len(COUNTS) + waits.sum())
    torch.testing.assert_close(pyro.param("rate").detach(), best)


def test_a_parameter_in_a_loop_is_pooled_over_its_steps() -> None:
    def model(counts: Tensor) -> None:
        for t, count in enumerate(counts):
            rate = pyro.param("rate", torch.tensor(3.0), constraint=constraints.positive)
            pyro.sample(f"u_{t}", dist.Poisson(rate), obs=count)

    assert words_of(model, COUNTS)["rate"].startswith("closed form")
    torch.testing.assert_close(pyro.param("rate").detach(), COUNTS.mean())


def test_parameters_of_a_module_are_updated_in_place() -> None:
    class Mixture(pyro.nn.PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.logits = torch.nn.Parameter(torch.zeros(2))
            self.rates = pyro.nn.PyroParam(torch.tensor([2.0, 7.0]), constraint=constraints.positive)

        def forward(self, counts: Tensor) -> None:
            with pyro.plate("data", len(counts)):
                z = pyro.sample("z", dist.Categorical(logits=self.logits))
                pyro.sample("u", dist.Poisson(self.rates[z]), obs=counts)

    pyro.clear_param_store()
    model = Mixture()
    kept = model.logits, model.rates_unconstrained
    problem = problem_of(model, empty, COUNTS)
    _, words = solved(ClosedForm(), problem)
    assert {how.split(":")[0] for how in words.values()} == {"closed form"}
    assert kept[0] is model.logits and kept[1] is model.rates_unconstrained
    weights = problem.belief.weights["model", "u"][0]
    weights = weights if weights.shape[0] == 2 else weights.mT
    torch.testing.assert_close(model.rates.detach(), (weights @ COUNTS.double() / weights.sum(1)).to(model.rates))
    torch.testing.assert_close(model.logits.detach().softmax(-1), (weights.sum(1) / 6).to(model.logits))
