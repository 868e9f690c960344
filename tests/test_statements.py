"""Values under a name, and marks of how a latent is to be enumerated."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from checks import assert_equal
from oracles import TERMS, gradients, oracle
from programs.case import bernoulli, categorical, empty, tensor
from pyro.distributions import constraints
from pyro.infer import config_enumerate
from torch import Tensor

import pyro_vfe as vfe
import pyro_vfe.program.runs as one_run
from pyro_vfe.program.recorder import record_both

Program = Callable[[], None]
DATA = tensor([0.4, 2.0, -1.0])


def normal(loc: Tensor, value: Tensor = DATA[0]) -> None:
    pyro.sample("o", dist.Normal(loc, 1.0), obs=value)


def the_larger(under_a_name: bool = True) -> None:
    a, b = bernoulli("a", 0.3), bernoulli("b", 0.6)
    larger = torch.maximum(a, b)
    normal(pyro.sample("c", dist.Delta(larger)) if under_a_name else larger)


def in_a_plate(under_a_name: bool = True) -> None:
    mu = pyro.param("mu", tensor([0.0, 2.0]))
    with pyro.plate("n", 3):
        loc = mu[categorical("z", tensor([0.3, 0.7]))]
        normal(pyro.sample("loc", dist.Delta(loc)) if under_a_name else loc, DATA)


def an_event(under_a_name: bool = True) -> None:
    rows = pyro.param("rows", tensor([[0.0, 1.0, 2.0], [1.0, -1.0, 0.5]]))
    row = rows[categorical("z", tensor([0.3, 0.7]))]
    row = pyro.sample("row", dist.Delta(row).to_event(1)) if under_a_name else row
    pyro.sample("o", dist.Normal(row, 1.0).to_event(1), obs=DATA)


def masked(under_a_name: bool = True) -> None:
    a = bernoulli("a", 0.3)
    with pyro.plate("n", 3):
        loc = pyro.sample("c", dist.Delta(a).mask(False)) if under_a_name else a
        normal(loc, DATA)


def with_a_density(under_a_name: bool = True) -> None:
    """Its log-density is a factor."""
    a = bernoulli("a", 0.3)
    density = pyro.param("d", tensor(0.5)) * a
    if under_a_name:
        pyro.sample("c", dist.Delta(a, log_density=density))
    else:
        pyro.factor("c", density)
    normal(a)


def with_a_density_to_be_learned(under_a_name: bool = True) -> None:
    """It is zero to begin with, and has a gradient all the same."""
    b, density = bernoulli("b", 0.6), pyro.param("d", tensor([0.0, 0.0]))
    with pyro.plate("n", 3):
        z = categorical("z", tensor([0.3, 0.7]))
        loc = (b + z).unsqueeze(-1)
        if under_a_name:
            loc = pyro.sample("c", dist.Delta(loc.expand([*loc.shape[:-1], 2]), density[z].unsqueeze(-1)).to_event(1))
        else:
            pyro.factor("c", 2 * density[z])
        normal(loc.sum(-1) if under_a_name else 2 * loc.squeeze(-1), DATA)


NAMED = (the_larger, in_a_plate, an_event, masked, with_a_density, with_a_density_to_be_learned)


@pytest.mark.parametrize("model", NAMED)
def test_a_delta_is_its_value_under_a_name(model: Callable[[bool], None]) -> None:
    exact, elbo = oracle(model, empty, False), vfe.FreeEnergy()
    terms = elbo.decompose(model, empty, True)
    for term in TERMS:
        assert_equal(getattr(terms, term), exact.terms[term], 1e-10)
    expected = exact.gradients()
    for parameter, gradient in gradients(elbo.differentiable_loss(model, empty, True)).items():
        assert_equal(gradient, expected[parameter], 1e-8)
    posterior = vfe.posterior(model, True)
    for latent in posterior.sites:
        assert_equal(posterior.marginal(latent), exact.posterior.marginal(latent), 1e-10)


def test_the_larger_of_two_is_that_of_a_table_on_paper() -> None:
    assert vfe.FreeEnergy().loss(the_larger, empty) == pytest.approx(1.06991594, abs=5e-9)


def test_a_point_estimate_of_the_guide_stays_one() -> None:
    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        normal(w + bernoulli("a", 0.3))

    def guide() -> None:
        pyro.sample("w", dist.Delta(pyro.param("point", tensor(0.7))))

    by_hand = -dist.Normal(0.0, 1.0).log_prob(tensor(0.7))
    likelihood = torch.stack([dist.Normal(0.7 + a, 1.0).log_prob(DATA[0]) for a in (0.0, 1.0)])
    by_hand = by_hand - (tensor([0.7, 0.3]).log() + likelihood).logsumexp(0)
    assert vfe.FreeEnergy().loss(model, guide) == pytest.approx(by_hand.item(), rel=1e-12)


def marked(**infer: object) -> Program:
    def model() -> None:
        a = pyro.sample("a", dist.Bernoulli(tensor(0.3)), infer=dict(infer))
        b = pyro.sample("b", dist.Bernoulli(0.2 + 0.5 * a), infer=dict(infer))
        with pyro.plate("n", 3):
            z = pyro.sample("z", dist.Categorical(tensor([0.3, 0.7])), infer=dict(infer))
            normal(a + b + z, DATA)

    return model


@pytest.mark.parametrize(
    ("infer", "runs"),
    [
        ({"enumerate": "sequential"}, 4),
        ({"enumerate": "parallel"}, 1),
        ({"enumerate": "parallel", "expand": True}, 1),
        ({"enumerate": "parallel", "expand": False}, 1),
        ({}, 1),
    ],
)
def test_marks_are_honoured(infer: dict[str, object], runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, elbo, count = marked(**infer), vfe.FreeEnergy(), list[int]()
    exact = oracle(model, empty).terms["free_energy"].item()
    for _ in range(2):
        assert elbo.loss(model, empty) == pytest.approx(exact, rel=1e-12)

    def counted(*args: object, **kwargs: object) -> object:
        count.append(1)
        return record_both(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(one_run, "record_both", counted)
    elbo.loss(model, empty)
    assert len(count) == runs


@pytest.mark.parametrize("mark", ["sequential", "parallel"])
def test_guides_that_are_configured_give_the_same_terms(mark: str) -> None:
    def guide() -> None:
        a = pyro.sample("a", dist.Bernoulli(pyro.param("q", tensor(0.4), constraint=constraints.unit_interval)))
        pyro.sample("b", dist.Bernoulli(0.3 + 0.2 * a))
        with pyro.plate("n", 3):
            pyro.sample("z", dist.Categorical(tensor([0.5, 0.5])))

    model = marked()
    exact = oracle(model, guide)
    terms = vfe.FreeEnergy().decompose(config_enumerate(model, mark), config_enumerate(guide, mark))
    for term in TERMS:
        assert_equal(getattr(terms, term), exact.terms[term], 1e-10)


def test_values_of_the_whole_batch_shape_can_be_indexed_with() -> None:
    """A program that relies on `expand=True`: the value itself has the plate's size."""

    def model() -> None:
        table = tensor([[0.0, 1.0, 2.0], [1.0, -1.0, 0.5]])
        with pyro.plate("n", 3):
            z = pyro.sample("z", dist.Categorical(tensor([0.3, 0.7])), infer={"enumerate": "parallel", "expand": True})
            assert z.shape[-1] == 3
            normal(torch.gather(table.T.expand(*z.shape, 2), -1, z.unsqueeze(-1)).squeeze(-1), DATA)

    exact = oracle(model, empty).terms["free_energy"].item()
    assert vfe.FreeEnergy().loss(model, empty) == pytest.approx(exact, rel=1e-12)


def test_sequential_marks_on_more_latents_than_there_may_be_runs_are_summed_in_parallel() -> None:
    def model(mark: object) -> None:
        z = tensor(0.0)
        for t in range(14):
            z = pyro.sample(f"z_{t}", dist.Bernoulli(0.2 + 0.6 * z), infer={"enumerate": mark})
            pyro.sample(f"o_{t}", dist.Normal(z, 1.0), obs=DATA[t % 3])

    losses = [vfe.FreeEnergy().loss(model, empty, mark) for mark in ("parallel", "sequential")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def read_by_the_next(expand: bool) -> Program:
    """The distribution of z has the values of a along a dim of theirs, and so have values of its whole batch shape."""

    def model() -> None:
        probs = pyro.param("probs", tensor([[0.3, 0.6, 0.1], [0.2, 0.2, 0.6]]), constraint=constraints.simplex)
        a = bernoulli("a", 0.3)
        with pyro.plate("n", 3):
            z = categorical("z", probs[a.long()])
            assert not expand or z.shape[-1] == 3
            normal(pyro.param("mu", tensor([0.0, 1.0, 2.0]))[z], DATA)

    return config_enumerate(model, "parallel", expand=expand)


def side_by_side(expand: bool) -> Program:
    """What enumeration gives is joined as it is: both have all dims."""

    def model() -> None:
        with pyro.plate("n", 3):
            a = pyro.sample("a", dist.Bernoulli(pyro.param("p", tensor([0.3, 0.4, 0.1]))))
            y = pyro.sample("y", dist.OneHotCategorical(tensor([[0.3, 0.7], [0.2, 0.8]])[a.long()]))
            rows = torch.cat([y, a.unsqueeze(-1).expand(*y.shape[:-1], 1)], -1)
            normal(rows @ tensor([1.0, 2.0, -1.0]), DATA)

    return config_enumerate(model, "parallel", expand=expand)


@pytest.mark.parametrize("program", [read_by_the_next, side_by_side])
def test_values_of_the_whole_batch_shape_take_one_run(program: Callable[[bool], Program]) -> None:
    """They are known to vary with what their distribution reads; pytest would raise the warning of several runs."""
    exact, elbo = oracle(program(False), empty), vfe.FreeEnergy()
    loss = elbo.differentiable_loss(program(True), empty)
    assert loss.item() == pytest.approx(exact.terms["free_energy"].item(), rel=1e-12)
    expected = exact.gradients()
    for parameter, gradient in gradients(loss).items():
        assert_equal(gradient, expected[parameter], 1e-8)
