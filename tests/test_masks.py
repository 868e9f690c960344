"""Masked latents that only one program has: below a latent that does not exist, and read by what is present."""

import math
import warnings
from collections.abc import Callable
from itertools import combinations

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import TERMS, gradients, oracle
from programs.case import bernoulli, categorical, empty, noise, simplex, tensor
from torch import Tensor

import pyro_vfe as vfe
from pyro_vfe.errors import ScaleError, StructureError, VFEWarning

U = tensor([0.1, 1.2])
SEEN, OTHER = torch.tensor([True, False]), torch.tensor([False, True])
EVERYWHERE, NOWHERE = SEEN | OTHER, SEEN & OTHER


def masked(where: Tensor) -> pyro.poutine.mask:
    return pyro.poutine.mask(mask=where)


def guide_of(x: Tensor) -> Callable[[], None]:
    def guide() -> None:
        with pyro.plate("data", 2), masked(x):
            categorical("x", simplex("q", 2, 2, seed=9))

    return guide


def datum(name: str, mean: Tensor) -> None:
    pyro.sample(name, dist.Normal(mean.double(), 1.0), obs=U)


def below_in_a_chain() -> None:
    with pyro.plate("data", 2), masked(SEEN):
        x = categorical("x", simplex("p_x", 2))
        y = categorical("y", simplex("p_y", 2, 3, seed=1)[x])
        z = categorical("z", simplex("p_z", 3, 2, seed=2)[y])
        datum("u", x + y + 2 * z)


def below_under_a_part_of_the_mask() -> None:
    with pyro.plate("data", 2):
        with masked(SEEN):
            x = categorical("x", simplex("p_x", 2))
        with masked(NOWHERE):
            y = categorical("y", simplex("p_y", 2, 3, seed=1)[x])
        with masked(SEEN):
            z = categorical("z", simplex("p_z", 3, 2, seed=2)[y])
            datum("u", x + y + 2 * z)


def below_in_more_plates() -> None:
    more = torch.tensor([[True], [False]])
    with pyro.plate("data", 2, dim=-1), masked(SEEN):
        x = categorical("x", simplex("p_x", 2))
        with pyro.plate("answers", 2, dim=-2), masked(more):
            y = categorical("y", simplex("p_y", 2, 3, seed=1)[x])
            pyro.sample("u", dist.Normal((x + y).double(), 1.0), obs=U.expand(2, 2))


def above_and_below() -> None:
    with pyro.plate("data", 2), masked(SEEN):
        y = bernoulli("y", simplex("p_y", 2)[0])
        x = categorical("x", simplex("p_x", 2, 2, seed=1)[y.long()])
        z = categorical("z", simplex("p_z", 2, 2, 2, seed=2)[x, y.long()])
        datum("u", y + 2 * z)


def below_where_it_is_not_read() -> None:
    """`y` reads `x` where `x` is, and is present everywhere."""
    with pyro.plate("data", 2):
        with masked(SEEN):
            x = categorical("x", simplex("p_x", 2))
        y = categorical("y", simplex("p_y", 2, 3, seed=1)[torch.where(SEEN, x, 1)])
        datum("u", y)


BELOW = [
    below_in_a_chain,
    below_under_a_part_of_the_mask,
    below_in_more_plates,
    above_and_below,
    below_where_it_is_not_read,
]


def check(model: Callable[[], None], guide: Callable[[], None]) -> None:
    """All terms, and the gradients of F, are those of the full joint table."""
    exact = oracle(model, guide)
    found = vfe.FreeEnergy().decompose(model, guide)
    for term in TERMS:
        torch.testing.assert_close(torch.as_tensor(getattr(found, term)), exact.terms[term].detach(), msg=term)
    expected = exact.gradients()
    for name, gradient in gradients(vfe.FreeEnergy().differentiable_loss(model, guide)).items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.filterwarnings("ignore:Latent site 'y' is masked out where site 'z' reads it:pyro_vfe.errors.VFEWarning")
@pytest.mark.parametrize("model", BELOW)
def test_a_masked_latent_of_the_model_alone_is_absent_below_an_absent_one(model: Callable[[], None]) -> None:
    check(model, guide_of(SEEN))


def test_a_masked_latent_of_the_guide_alone_is_absent_below_an_absent_one() -> None:
    def model() -> None:
        with pyro.plate("data", 2), masked(SEEN):
            datum("u", categorical("x", simplex("p_x", 2)))

    def guide() -> None:
        with pyro.plate("data", 2), masked(SEEN):
            x = categorical("x", simplex("q", 2, 2, seed=9))
            pyro.sample("a", dist.Categorical(simplex("q_a", 2, 3, seed=3)[x]), infer={"is_auxiliary": True})

    check(model, guide)


def of_masks(x: Tensor, y: Tensor, z: Tensor, u: Tensor) -> Callable[[], None]:
    def model() -> None:
        with pyro.plate("data", 2):
            with masked(x):
                v = categorical("x", simplex("p_x", 2))
            with masked(y):
                v = categorical("y", simplex("p_y", 2, 3, seed=1)[v])
            with masked(z):
                v = categorical("z", simplex("p_z", 3, 2, seed=2)[v])
            with masked(u):
                datum("u", v)

    return model


@pytest.mark.filterwarnings("ignore:Latent site '.' is masked out:pyro_vfe.errors.VFEWarning")
@pytest.mark.parametrize("u", [SEEN, EVERYWHERE])
@pytest.mark.parametrize("z", [SEEN, EVERYWHERE])
@pytest.mark.parametrize("y", [SEEN, EVERYWHERE])
def test_masks_along_a_chain_are_exact_or_refused_and_what_the_refusal_advises_is_exact(
    y: Tensor, z: Tensor, u: Tensor
) -> None:
    if not bool((~SEEN & (y | z | u)).any()):
        check(of_masks(SEEN, y, z, u), guide_of(SEEN))
        return
    with pytest.raises(ScaleError, match="'x' is masked out where site 'y' still reads it"):
        vfe.FreeEnergy().loss(of_masks(SEEN, y, z, u), guide_of(SEEN))
    check(of_masks(SEEN, y & SEEN, z & SEEN, u & SEEN), guide_of(SEEN))
    check(of_masks(EVERYWHERE, y, z, u), guide_of(EVERYWHERE))


@pytest.mark.parametrize("between", [SEEN, EVERYWHERE])
def test_the_refusal_names_what_is_present_and_what_is_between(between: Tensor) -> None:
    words = " 'y' is masked out too, but 'u' reads it. Mask 'u'" if between is SEEN else " Mask 'y'"

    def model() -> None:
        with pyro.plate("data", 2):
            with masked(SEEN):
                x = categorical("x", simplex("p_x", 2))
            with masked(between):
                y = categorical("y", simplex("p_y", 2, 3, seed=1)[x])
            datum("u", y)

    with pytest.raises(ScaleError, match=f"'x' is masked out where site 'y' still reads it.{words} there as well"):
        vfe.FreeEnergy().loss(model, guide_of(SEEN))


# The prior of a latent that is masked out and read


def read_by(mask_z: Tensor, mask_u: Tensor, value: int | None = None) -> Callable[[], None]:
    def model() -> None:
        with pyro.plate("data", 2):
            with masked(mask_z):
                z = categorical("z", simplex("p_z", 3))
            if value is not None:
                z = torch.where(mask_z, z, value)
            with masked(mask_u):
                datum("u", 2 * z)

    return model


def surprise_of(model: Callable[[], None]) -> float:
    """The surprise, which is that of the full joint table."""
    found = vfe.FreeEnergy().loss(model, empty)
    assert found == pytest.approx(float(oracle(model, empty).terms["surprise"].detach()), rel=1e-12)
    return found


def test_a_masked_latent_that_is_read_keeps_its_prior_with_a_word_and_each_way_out_gives_its_number() -> None:
    elbo = vfe.FreeEnergy()
    with pytest.warns(VFEWarning, match=r"'z' is masked out where site 'u' reads it.*torch.where\(mask, z, value\)"):
        loss = elbo.loss(read_by(SEEN, EVERYWHERE), empty)
    with pytest.warns(VFEWarning) as found:
        elbo, model = vfe.FreeEnergy(), read_by(SEEN, EVERYWHERE)
        assert [elbo.loss(model, empty) for _ in range(3)] == [loss] * 3
    assert len(found) == 1
    assert surprise_of(read_by(EVERYWHERE, EVERYWHERE)) == pytest.approx(loss, rel=1e-12)
    without = surprise_of(read_by(SEEN, SEEN))
    at_value = surprise_of(read_by(SEEN, EVERYWHERE, value=1))
    assert min(abs(one - other) for one, other in combinations((loss, without, at_value), 2)) > 0.1


def test_a_masked_latent_that_is_absent_at_some_elements_and_read_at_others_is_told_how_to_be_masked() -> None:
    with pytest.warns(VFEWarning, match="'y' masked only where what it reads is"):
        loss = vfe.FreeEnergy().loss(of_masks(SEEN, NOWHERE, SEEN, SEEN), guide_of(SEEN))
    assert vfe.FreeEnergy().loss(of_masks(SEEN, SEEN, SEEN, SEEN), guide_of(SEEN)) == pytest.approx(loss, rel=1e-12)


def test_masked_latents_that_nothing_present_reads_need_no_word() -> None:
    def model() -> None:
        with pyro.plate("data", 2):
            with masked(SEEN):
                z = categorical("z", simplex("p_z", 3))
                w = categorical("w", simplex("p_w", 3, 2, seed=1)[z])
                datum("u", w)
            pyro.sample("x", dist.Categorical(simplex("p_x", 2)), obs=torch.tensor([0, 1]), obs_mask=SEEN)
            datum("v", tensor(0.0))

    surprise_of(model)


def test_a_chain_of_masked_latents_that_is_read_at_its_end_is_told_from_its_end() -> None:
    def model() -> None:
        with pyro.plate("data", 2):
            with masked(SEEN):
                z = categorical("z", simplex("p_z", 3))
                w = categorical("w", simplex("p_w", 3, 2, seed=1)[z])
            datum("u", w)

    with pytest.warns(VFEWarning, match="'w' is masked out where site 'u' reads it") as found:
        vfe.posterior(model)
    assert len(found) == 1


def test_what_a_later_portion_of_the_data_reads_is_told_too() -> None:
    data, there = noise(400, seed=3), torch.arange(400) < 390

    def model() -> None:
        with pyro.plate("data", 400):
            with masked(there):
                z = categorical("z", simplex("p_z", 4))
            pyro.sample("u", dist.Normal(z.double(), 1.0), obs=data)

    elbo = vfe.FreeEnergy(max_bytes=3000.0)
    with pytest.warns(VFEWarning, match="'z' is masked out where site 'u' reads it"):
        found = elbo.loss(model, empty)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VFEWarning)
        assert found == pytest.approx(vfe.FreeEnergy().loss(model, empty), rel=1e-12)


def test_em_counts_a_masked_element_where_it_is_read_and_no_other() -> None:
    data, means = tensor([0.1, 1.2, 0.3, 0.7]), tensor([0.0, 1.0, 3.0])

    def model() -> None:
        with pyro.plate("data", 4):
            with masked(torch.tensor([False, False, True, True])):
                z = categorical("z", simplex("weights", 3))
            with masked(torch.tensor([False, True, True, True])):
                pyro.sample("u", dist.Normal(means[z], 1.0), obs=data)

    joint = noise(3, seed=0).softmax(-1) * (-0.5 * (data[1:, None] - means) ** 2).exp()
    with pytest.warns(VFEWarning, match="stopped at max_iter|'z' is masked out"):
        vfe.EM(model).run(max_iter=1, progress_bar=False)
    torch.testing.assert_close(pyro.param("weights").detach(), (joint / joint.sum(-1, keepdim=True)).mean(0))


def masked_by_a_latent() -> None:
    a = pyro.sample("a", dist.Bernoulli(tensor(0.3)))
    with masked(a.bool()):
        b = pyro.sample("b", dist.Bernoulli(tensor(0.6)))
        pyro.sample("o", dist.Normal(b + a, 1.0), obs=tensor(0.4))
    pyro.sample("w", dist.Normal(a, 1.0), obs=tensor(0.1))


@pytest.mark.parametrize("masks_too", [False, True])
def test_the_guide_has_a_latent_where_the_model_says_though_a_latent_decides(masks_too: bool) -> None:
    def guide() -> None:
        a = pyro.sample("a", dist.Bernoulli(tensor(0.5)))
        with masked(a.bool() if masks_too else True):
            pyro.sample("b", dist.Bernoulli(tensor(0.2)))

    def normal(value: float, mean: float) -> float:
        return -0.5 * (value - mean) ** 2 - 0.5 * math.log(2 * math.pi)

    without = math.log(0.5 / 0.7) - normal(0.1, 0)
    with_b = 0.2 * (math.log(0.2 / 0.6) - normal(0.4, 2)) + 0.8 * (math.log(0.8 / 0.4) - normal(0.4, 1))
    expected = 0.5 * without + 0.5 * (math.log(0.5 / 0.3) - normal(0.1, 1) + with_b)
    terms = vfe.FreeEnergy().decompose(masked_by_a_latent, guide)
    assert terms.free_energy.item() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(terms.q_marginals()["b"], tensor([0.4, 0.1]))


@pytest.mark.parametrize("draw", [{}, {"enumerate": None}])
def test_a_guide_that_lacks_what_decides_whether_its_latent_exists_is_told_so(draw: dict[str, None]) -> None:
    def guide(with_a: bool = False) -> None:
        if with_a:
            pyro.sample("a", dist.Bernoulli(tensor(0.5)))
        pyro.sample("b", dist.Bernoulli(tensor(0.2)), infer=dict(draw))

    with pytest.raises(StructureError, match=r"masks latent 'b' by the value of 'a'.*Give the guide a site 'a' too"):
        vfe.FreeEnergy().loss(lambda with_a: masked_by_a_latent(), guide, False)
    assert math.isfinite(vfe.FreeEnergy().loss(lambda with_a: masked_by_a_latent(), guide, True))
