"""Programs that run with enumerated values alone, as Pyro's `gather` wants them."""

import warnings
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from checks import assert_equal
from oracles import TERMS, gradients, oracle
from programs.case import bernoulli, categorical, empty, tensor
from pyro import poutine
from pyro.distributions.util import gather
from torch import Tensor

import pyro_vfe as vfe
from pyro_vfe.errors import ShapeError, SpotCheckError, VFEWarning

Model = Callable[[bool], None]
DETECTIONS = tensor([[0.1, 0.9, 1.7], [2.0, 0.4, 0.2]])


def at(table: Tensor, index: Tensor, ordinarily: bool) -> Tensor:
    """Entries of the last dim; Pyro's `gather` takes an index of size 1 there, as an enumerated value has."""
    if not ordinarily:
        return gather(table, index, -1)
    frames = torch.arange(table.shape[0]).unsqueeze(-1)
    return table[frames, index.expand((*index.shape[:-2], table.shape[0], index.shape[-1]))]


def tracking(ordinarily: bool = False) -> None:
    """Detections over time, each of one of three objects or of none."""
    positions = pyro.param("positions", tensor([[0.0, 1.0, 2.0], [0.5, 1.5, 2.5]]))
    with pyro.plate("frames", 2, dim=-2), pyro.plate("hits", 3, dim=-1):
        assign = pyro.sample("assign", dist.Categorical(torch.ones(4, dtype=torch.float64) / 4))
        is_spurious = assign == 3
        pyro.sample("spurious", dist.Bernoulli(tensor(0.2)), obs=is_spurious.double())
        with poutine.mask(mask=~is_spurious):
            augmented = torch.cat([positions, positions.new_zeros(2, 1)], -1)
            pyro.sample("real", dist.Normal(at(augmented, assign, ordinarily), 1.0), obs=DETECTIONS)
        with poutine.mask(mask=is_spurious):
            pyro.sample("bogus", dist.Normal(tensor(0.0), 3.0), obs=DETECTIONS)


def unpacked(ordinarily: bool = False) -> None:
    """It counts the values by the leading dim, where a draw has none."""
    scales = pyro.param("scales", tensor([0.5, 1.0, 2.0]))
    z = categorical("z", tensor([0.2, 0.3, 0.5]))
    if ordinarily:
        scale = scales[z]
    else:
        (count,) = z.shape
        scale = scales.expand(count, 3).gather(1, z.unsqueeze(-1)).squeeze(-1)
    pyro.sample("o", dist.Normal(0.0, scale), obs=tensor(0.4))


def two_latents(ordinarily: bool = False) -> None:
    """The second is read beside the first, both by `gather`."""
    table = pyro.param("table", tensor([[0.0, 1.0, 2.0], [1.0, -1.0, 0.5]]))
    a = bernoulli("a", 0.3)
    with pyro.plate("frames", 2, dim=-2), pyro.plate("hits", 2, dim=-1):
        z = pyro.sample("z", dist.Categorical(tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])[a.long()]))
        pyro.sample("o", dist.Normal(at(table, z, ordinarily) * (1 + a), 1.0), obs=DETECTIONS[:, :2])


def branching(ordinarily: bool = False) -> None:
    """One branch runs with draws, the other with enumerated values alone."""
    if bernoulli("a", 0.3):
        two_latents_of_a_branch(ordinarily)
    else:
        pyro.sample("o", dist.Normal(tensor(0.0), 1.0), obs=tensor(0.4))


def two_latents_of_a_branch(ordinarily: bool) -> None:
    table = pyro.param("table", tensor([[0.0, 1.0, 2.0], [1.0, -1.0, 0.5]]))
    with pyro.plate("frames", 2, dim=-2), pyro.plate("hits", 2, dim=-1):
        z = categorical("z", tensor([0.2, 0.3, 0.5]))
        pyro.sample("u", dist.Normal(at(table, z, ordinarily), 1.0), obs=DETECTIONS[:, :2])


MODELS = (tracking, unpacked, two_latents, branching)


@pytest.mark.parametrize("model", MODELS)
def test_programs_that_run_enumerated_alone_have_the_numbers_of_the_joint_table(model: Model) -> None:
    exact, elbo = oracle(model, empty, True), vfe.FreeEnergy()
    with pytest.warns(VFEWarning, match="run with enumerated values and not with sampled ones"):
        terms = elbo.decompose(model, empty, False)
    for term in TERMS:
        assert_equal(getattr(terms, term), exact.terms[term], 1e-10)
    expected = exact.gradients()
    for parameter, gradient in gradients(elbo.differentiable_loss(model, empty, False)).items():
        assert_equal(gradient, expected[parameter], 1e-8)
    with pytest.warns(VFEWarning, match="run with enumerated values"):
        posterior = vfe.posterior(model, False)
    for latent in posterior.sites:
        assert_equal(posterior.marginal(latent), exact.posterior.marginal(latent), 1e-10)


@pytest.mark.parametrize("model", MODELS[:3])
def test_guides_em_and_later_calls_take_them_as_the_programs_that_broadcast(model: Model) -> None:
    with pytest.warns(VFEWarning, match="run with enumerated values"):
        guide = vfe.AutoMeanField(model)
        losses = [vfe.FreeEnergy(check="always").loss(model, guide, ordinarily) for ordinarily in (False, True)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    found = []
    for ordinarily in (True, False):
        pyro.clear_param_store()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VFEWarning)  # The limit of iterations is said, too.
            found.append(vfe.EM(model).run(ordinarily, max_iter=5, progress_bar=False).history.free_energy[-1])
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def shifted() -> None:
    """It reads a neighbour of the values, not of the elements."""
    with pyro.plate("n", 2):
        z = categorical("z", tensor([0.2, 0.3, 0.5]))
        _, _ = z.shape
        pyro.sample("o", dist.Normal(tensor([0.0, 1.0, 2.0])[z].flip(0), 1.0), obs=tensor([0.4, 0.1]))


def test_values_that_are_mixed_up_are_found() -> None:
    with pytest.raises(SpotCheckError, match="'o' of the model"):
        vfe.FreeEnergy().loss(shifted, empty)


def unfit() -> None:
    z = categorical("z", tensor([0.2, 0.3, 0.5]))
    rows = tensor([0.0, 1.0, 2.0])[z] + torch.ones(2, dtype=torch.float64)
    pyro.sample("o", dist.Normal(rows @ torch.ones(3, dtype=torch.float64), 1.0), obs=tensor(0.4))


@pytest.mark.parametrize("call", [lambda: vfe.FreeEnergy().loss(unfit, empty), lambda: vfe.posterior(unfit)])
def test_what_runs_neither_way_is_said_with_the_line(call: Callable[[], object]) -> None:
    with pytest.raises(ShapeError, match=r"neither with sampled .*_values\.py:\d+ .*rows @ .*after site 'z'"):
        call()


def test_a_dream_of_what_runs_enumerated_alone_is_refused_in_words() -> None:
    with pytest.raises(ShapeError, match=r"does not run with sampled values, which a dream takes.*test_single_values"):
        vfe.dream(tracking)


def test_what_a_program_raises_itself_is_left_as_it_is() -> None:
    def model() -> None:
        categorical("z", tensor([0.2, 0.8]))
        raise ValueError("the dimension of things is no size")

    with pytest.raises(ValueError, match=r"^the dimension of things is no size$"):
        vfe.FreeEnergy().loss(model, empty)
