"""Programs that could pass unseen with a wrong number: each must give the right one, or an error."""

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from math import log
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import gradients, oracle
from programs.case import bernoulli, categorical, empty, simplex, tensor, unit
from torch import Tensor

import pyro_vfe as vfe
from pyro_vfe.errors import SpotCheckError, VFEError, VFEWarning
from pyro_vfe.program.log_prob import log_prob

RATES = tensor([1.0, 5.0, 9.0])
SAMPLED: dict[str, Any] = {"enumerate": None}


def loss_of(model: Callable[..., Any], guide: Callable[..., Any] = empty, *args: Any) -> float:
    return vfe.FreeEnergy(strict_enumeration_warning=False).loss(model, guide, *args)


def branches_on_a_draw() -> None:
    z = pyro.sample("z", dist.Bernoulli(0.5), infer=SAMPLED)
    rate = 1.0 if z.item() == 0 else 5.0
    pyro.sample("u", dist.Poisson(tensor(rate)), obs=tensor(4.0))


def guide_of_the_draw() -> None:
    pyro.sample("z", dist.Bernoulli(unit("p")), infer=SAMPLED)


def test_a_draw_that_leaves_torch_still_gets_its_score() -> None:
    guide_of_the_draw()
    exact = oracle(branches_on_a_draw, lambda: bernoulli("z", unit("p"))).gradients()["p"]
    elbo = vfe.FreeEnergy(strict_enumeration_warning=False)
    draws = [
        gradients(elbo.differentiable_loss(branches_on_a_draw, guide_of_the_draw))["p"].detach() for _ in range(400)
    ]
    spread = torch.stack(draws)
    assert abs(float(spread.mean() - exact)) < 5 * float(spread.std()) / len(draws) ** 0.5
    assert float(spread.std()) > 0


def reads_a_missing_value_in_python() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("u", dist.Poisson(tensor(1.0 if x > 0 else 10.0)), obs=tensor(4.0))


def test_a_latent_missing_from_the_guide_is_missed_also_when_python_reads_it() -> None:
    with pytest.raises(VFEError, match=r"'x' is Normal.*no guide draws it"):
        loss_of(reads_a_missing_value_in_python)


def test_a_latent_that_turns_into_a_draw_gets_its_score_from_then_on() -> None:
    def model(infer: dict[str, Any]) -> None:
        z = pyro.sample("z", dist.Bernoulli(0.5), infer=infer)
        pyro.sample("u", dist.Poisson(RATES[z.long()]), obs=tensor(4.0))

    def guide(infer: dict[str, Any]) -> None:
        pyro.sample("z", dist.Bernoulli(unit("p")), infer=infer)

    elbo = vfe.FreeEnergy(strict_enumeration_warning=False)
    exact = gradients(elbo.differentiable_loss(model, guide, {}))["p"]
    spread = torch.stack([gradients(elbo.differentiable_loss(model, guide, SAMPLED))["p"].detach() for _ in range(400)])
    assert abs(float(spread.mean() - exact)) < 5 * float(spread.std()) / 20


READERS = {
    "equal": lambda z: RATES[0] if torch.equal(z, torch.tensor(1)) else RATES[1],
    "allclose": lambda z: RATES[0] if torch.allclose(z.double(), tensor(1.0)) else RATES[1],
    "where": lambda z: RATES[len(torch.where(z.reshape(-1) == 1)[0])],
    "any": lambda z: 1.0 + (z == 1).any().double(),
    "max": lambda z: RATES[z].max(),
    "select": lambda z: RATES.select(0, z),
    "format": lambda z: RATES[int(f"{z:d}")],
}


@pytest.mark.filterwarnings("ignore:The programs do not broadcast")
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("seed", range(4))
def test_a_latent_read_in_an_odd_way_is_read_right_or_refused(reader: str, seed: int) -> None:
    def model() -> None:
        z = categorical("z", tensor([0.2, 0.3, 0.5]))
        pyro.sample("u", dist.Poisson(READERS[reader](z)), obs=tensor(4.0))

    torch.manual_seed(seed)
    try:
        loss = loss_of(model)
    except VFEError:
        return
    assert loss == pytest.approx(float(oracle(model, empty).terms["surprise"].detach()))


NEIGHBOURS = {
    "mean": lambda z: 1 + z.double().mean(-1, keepdim=True),
    "cumsum": lambda z: 1.0 + z.cumsum(-1),
    "max": lambda z: 1.0 + z.max(-1, keepdim=True).values,
    "flip": lambda z: 1.0 + 2 * z + z.flip(-1),
}


@pytest.mark.parametrize("reader", NEIGHBOURS)
@pytest.mark.parametrize("seed", range(4))
def test_reading_the_neighbours_in_a_plate_is_refused(reader: str, seed: int) -> None:
    def model() -> None:
        with pyro.plate("data", 2):
            z = categorical("z", tensor([0.3, 0.7]))
            pyro.sample("u", dist.Poisson(NEIGHBOURS[reader](z).expand(z.shape)), obs=tensor([1.0, 4.0]))

    torch.manual_seed(seed)
    with pytest.raises(VFEError, match="'u'"):
        loss_of(model)


FAR_ELEMENTS = {
    "flip of three": (2, (3,), lambda z: z.flip(-1)),
    "two further": (2, (4,), lambda z: z.roll(2, -1)),
    "as many further as there are values": (3, (6,), lambda z: z.roll(3, -1)),
    "four further": (2, (7,), lambda z: z.roll(4, -1)),
    "far away": (2, (100,), lambda z: z.roll(64, -1)),
    "far away among many": (3, (1000,), lambda z: z.flip(-1)),
    "transposed": (2, (3, 3), lambda z: z.transpose(-1, -2)),
    "two rows further": (2, (4, 3), lambda z: z.roll(2, -2)),
}


@pytest.mark.parametrize("reader", FAR_ELEMENTS)
@pytest.mark.parametrize("seed", range(4))
def test_reading_other_elements_of_a_plate_is_refused_however_far_they_are(reader: str, seed: int) -> None:
    num_values, shape, read = FAR_ELEMENTS[reader]

    def model() -> None:
        with ExitStack() as stack:
            for dim, size in enumerate(reversed(shape), start=1):
                stack.enter_context(pyro.plate(f"plate_{dim}", size, dim=-dim))
            z = categorical("z", torch.ones(num_values) / num_values)
            pyro.sample("u", dist.Poisson((1.0 + 2 * z + read(z)).expand(z.shape)), obs=torch.ones(shape))

    torch.manual_seed(seed)
    with pytest.raises(VFEError, match="'u'"):
        loss_of(model)


def test_a_path_that_arguments_open_later_is_looked_at_anew() -> None:
    def model(u: Tensor) -> None:
        z = categorical("z", tensor([0.2, 0.3, 0.5]))
        rate = RATES[z]
        if u > 3:
            rate = RATES[0] if (z == 1).any() else RATES[1]
        pyro.sample("u", dist.Poisson(rate), obs=u)

    elbo = vfe.FreeEnergy()
    elbo.loss(model, empty, tensor(2.0))
    expected = float(oracle(model, empty, tensor(4.0)).terms["surprise"].detach())
    assert elbo.loss(model, empty, tensor(4.0)) == pytest.approx(expected)


def test_indices_that_the_model_chooses_must_be_those_of_the_guide() -> None:
    def model(index: Tensor, u: Tensor) -> None:
        with pyro.plate("data", 8, subsample=index):
            z = categorical("z", tensor([0.2, 0.3, 0.5]))
            pyro.sample("u", dist.Poisson(RATES[z]), obs=u[index])

    u, index = torch.arange(8.0), torch.tensor([1, 4, 6])
    guide = vfe.AutoMeanField(model, init_scale=1.0)
    with pytest.raises(VFEError, match="'data' has one subsample in the guide and another in the model"):
        loss_of(model, guide, index, u)


def test_a_guide_of_one_data_set_does_not_fit_another() -> None:
    def model(u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            z = categorical("z", tensor([0.2, 0.3, 0.5]))
            pyro.sample("u", dist.Poisson(RATES[z]), obs=u)

    guide, elbo = vfe.AutoMeanField(model), vfe.FreeEnergy()
    elbo.loss(model, guide, torch.arange(8.0))
    for size in (1, 4):
        with pytest.raises(VFEError, match=f"'data' has 8 elements in the guide and {size} in the model"):
            elbo.loss(model, guide, torch.arange(float(size)))


def test_shares_of_an_infinite_gap_are_refused() -> None:
    def model() -> None:
        categorical("a", tensor([0.5, 0.5, 0.0]))

    terms = vfe.FreeEnergy().decompose(model, lambda: categorical("a", simplex("q", 3)))
    assert terms.gap == torch.inf
    with pytest.raises(VFEError, match="a = 2"):
        terms.gap_by_site()


def test_a_posterior_draw_is_one_joint_value_also_of_what_depends_on_latents() -> None:
    def model() -> tuple[Tensor, Tensor, Tensor]:
        v = categorical("v", tensor([0.2, 0.3, 0.5]))
        k = categorical("k", tensor([0.4, 0.6]))
        w = pyro.sample("w", dist.Normal(100.0 * v, 5.0))
        pyro.sample("u", dist.Normal(w + k, 1.0), obs=tensor(100.0))
        return v, w, k

    def guide() -> None:
        v = categorical("v", simplex("q", 3))
        pyro.sample("w", dist.Normal(100.0 * v, 1.0))

    elbo = vfe.FreeEnergy()
    for _ in range(5):
        v, w, k = elbo.sample_posterior(model, guide)
        assert v.shape == w.shape == k.shape == ()
        assert abs(float(w) - 100 * float(v)) < 10


@pytest.mark.parametrize("look", [False, True])
def test_a_small_probability_stays_what_it_is_when_logits_were_looked_at(look: bool) -> None:
    def model() -> None:
        fn = dist.Categorical(tensor([1.0, 1e-30]))
        if look:
            assert fn.logits.shape == (2,)
        pyro.sample("u", fn, obs=torch.tensor(1))

    assert loss_of(model) == pytest.approx(69.0775527898)


def test_infinite_logits_are_certainties() -> None:
    def model() -> None:
        z = bernoulli("z", 0.3)
        pyro.sample("u", dist.Bernoulli(logits=tensor([-torch.inf, 1.0])[z.long()]), obs=tensor(0.0))

    expected = -torch.log(tensor(0.7) + 0.3 * torch.sigmoid(tensor(-1.0)))
    assert loss_of(model) == pytest.approx(float(expected))


def test_a_missing_value_may_appear_at_a_later_call() -> None:
    def model(u: Tensor | None = None) -> None:
        z = bernoulli("z", 0.3)
        pyro.sample("x", dist.Normal(z, 1.0), obs=u)

    elbo = vfe.FreeEnergy()
    assert elbo.loss(model, empty, tensor(0.3)) > 0
    with pytest.warns(VFEWarning, match="observes nothing"):
        assert elbo.loss(model, empty) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("error", [RuntimeError, IndexError, KeyError, ValueError, TypeError])
def test_the_programs_own_errors_come_through_as_they_are(error: type[Exception]) -> None:
    def model() -> None:
        bernoulli("z", 0.3)
        raise error("mine")

    with pytest.raises(error, match="mine") as caught:
        loss_of(model)
    assert type(caught.value) is error


@pytest.mark.parametrize("name", ["type", "forward", "module.weight", "train"])
def test_a_site_may_have_any_name(name: str) -> None:
    def model() -> None:
        z = categorical(name, tensor([0.2, 0.3, 0.5]))
        pyro.sample("u", dist.Poisson(RATES[z]), obs=tensor(4.0))

    guide = vfe.AutoMeanField(model, init="posterior")
    assert float(vfe.FreeEnergy().decompose(model, guide).gap) == pytest.approx(0.0, abs=1e-12)
    assert guide.probabilities(name).shape == (3,)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_latent_lies_in_the_same_plates_in_both_programs(swapped: bool) -> None:
    def inside() -> None:
        with pyro.plate("data", 3):
            z = categorical("z", tensor([0.2, 0.3, 0.5]))
            pyro.sample("u", dist.Poisson(RATES[z]), obs=tensor([1.0, 2.0, 9.0]))

    def outside() -> None:
        z = categorical("z", tensor([0.2, 0.3, 0.5]))
        with pyro.plate("data", 3):
            pyro.sample("u", dist.Poisson(RATES[z]), obs=tensor([1.0, 2.0, 9.0]))

    def guide() -> None:
        with pyro.plate("data", 3):
            categorical("z", simplex("q", 3))

    model, guide = (outside, guide) if swapped else (inside, lambda: categorical("z", simplex("q", 3)))
    with pytest.raises(VFEError, match="'z' lies in the plates"):
        loss_of(model, guide)


def plain_model() -> None:
    z = categorical("z", tensor([0.2, 0.3, 0.5]))
    pyro.sample("u", dist.Poisson(RATES[z]), obs=tensor(4.0))


def test_a_guide_may_not_weigh_the_values_of_a_latent() -> None:
    def guide() -> None:
        z = categorical("z", simplex("q", 3))
        pyro.factor("weight", RATES[z], has_rsample=False)

    with pytest.raises(VFEError, match="'weight' of the guide weighs the values of latent 'z'"):
        loss_of(plain_model, guide)


def test_a_draw_that_the_model_lacks_is_pointed_out() -> None:
    def guide() -> None:
        pyro.sample("zz", dist.Normal(0.0, 1.0))

    with pytest.warns(UserWarning, match="The guide samples 'zz', which the model lacks"):
        loss_of(plain_model, guide)


@pytest.mark.parametrize("plated", [False, True])
def test_a_scale_that_reads_a_latent_is_part_of_its_table(plated: bool) -> None:
    def model() -> None:
        with pyro.plate("data", 2) if plated else nullcontext():
            z = categorical("z", tensor([0.2, 0.3, 0.5]))
            with pyro.poutine.scale(scale=1.0 + z):
                pyro.sample("u", dist.Poisson(RATES[z]), obs=tensor([4.0, 4.0]) if plated else tensor(4.0))

    log_likelihood = dist.Poisson(RATES).log_prob(tensor(4.0))
    one = -torch.logsumexp(tensor([0.2, 0.3, 0.5]).log() + (1.0 + torch.arange(3)) * log_likelihood, 0)
    assert loss_of(model) == pytest.approx(float(one) * (2 if plated else 1))


def test_a_constant_that_broadcasting_hands_back_is_of_no_latent() -> None:
    """`Normal(loc, scale)` of one shape holds `scale` itself, which does not depend on each loc it stood beside."""
    scale, transition = torch.tensor(1.3), torch.tensor([[0.7, 0.3], [0.2, 0.8]])

    def model(series: torch.Tensor) -> None:
        a = b = torch.tensor(0)
        for t in range(3):
            a = pyro.sample(f"a_{t}", dist.Categorical(transition[a]))
            b = pyro.sample(f"b_{t}", dist.Categorical(transition[b]))
            pyro.sample(f"u_{t}", dist.Normal(a + 2.0 * b, scale), obs=series[t])

    series = torch.tensor([0.3, -0.4, 2.0])
    expected = oracle(model, lambda series: None, series).terms["surprise"]
    torch.testing.assert_close(-vfe.posterior(model, series).log_evidence, expected.double())


def test_a_misspelt_latent_of_the_guide_is_told() -> None:
    def model() -> None:
        z = categorical("z", tensor([0.2, 0.8]))
        pyro.sample("u", dist.Poisson(tensor([2.0, 9.0])[z]), obs=tensor(4.0))

    def guide() -> None:
        categorical("zz", tensor([0.5, 0.5]))

    with pytest.warns(VFEWarning, match="'zz', which the model lacks.*spelling"):
        terms = vfe.FreeEnergy().decompose(model, guide)
    without = vfe.FreeEnergy().decompose(model, None)
    assert float(terms.free_energy) == pytest.approx(float(without.surprise), abs=1e-12)


@pytest.mark.parametrize("cached", [(), ("logits",), ("probs",), ("logits", "probs")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("family", "given", "logs"),
    [
        (dist.Bernoulli, {"probs": [0.0, 1.0, 0.25]}, [[0.0, -torch.inf], [-torch.inf, 0.0], [log(0.75), log(0.25)]]),
        (dist.Bernoulli, {"logits": [-700.0, 40.0, 0.0]}, [[0.0, -700.0], [-40.0, 0.0], [log(0.5), log(0.5)]]),
        (dist.Categorical, {"probs": [[0.0, 0.75, 0.25]]}, [[-torch.inf, log(0.75), log(0.25)]]),
        (dist.Categorical, {"logits": [[0.0, -50.0, -700.0]]}, [[0.0, -50.0, -700.0]]),
    ],
)
def test_what_was_given_is_read_whatever_else_was_looked_at(
    family: Any, given: dict[str, Any], logs: list[list[float]], dtype: torch.dtype, cached: tuple[str, ...]
) -> None:
    fn = family(**{name: torch.tensor(value, dtype=dtype) for name, value in given.items()})
    for name in cached:
        getattr(fn, name)
    fn = fn.expand([2, *fn.batch_shape])
    wanted = torch.tensor(logs, dtype=dtype)
    for value in range(wanted.shape[-1]):
        found = log_prob(fn, torch.tensor(value).to(fn.sample().dtype))
        torch.testing.assert_close(found.expand(fn.batch_shape), wanted[:, value].expand(fn.batch_shape))


def of_the_neighbour(b: Tensor) -> Tensor:
    return b.roll(1, -1)


def of_all(b: Tensor) -> Tensor:
    return b.sum(-1, keepdim=True)


@pytest.mark.parametrize("role", ["model", "guide"])
@pytest.mark.parametrize("read", [of_the_neighbour, of_all])
def test_a_draw_that_is_read_at_another_element_of_its_plate_is_refused(
    read: Callable[[Tensor], Tensor], role: str
) -> None:
    """The score of a draw in a plate has the cost of its own element alone."""
    other, own = (read if role == name else Tensor.clone for name in ("model", "guide"))

    def model() -> None:
        with pyro.plate("data", 3):
            b = pyro.sample("b", dist.Bernoulli(0.5))
            c = pyro.sample("c", dist.Bernoulli(0.5))
            pyro.sample("u", dist.Normal(other(b) + c, 1.0), obs=RATES)

    def guide() -> None:
        with pyro.plate("data", 3):
            b = pyro.sample("b", dist.Bernoulli(unit("q")), infer=SAMPLED)
            pyro.sample("c", dist.Bernoulli(0.2 + 0.2 * own(b)), infer=SAMPLED)

    for compute in (loss_of, lambda *programs: vfe.bounds(*programs, num_particles=3)):
        with pytest.raises(
            SpotCheckError, match=rf"of the {role} lies in plate 'data', and reads.*others \('b', 'c'\)"
        ):
            compute(model, guide)


def test_draws_that_meet_outside_of_their_plate_are_welcome() -> None:
    def model() -> None:
        with pyro.plate("units", 3):
            b = pyro.sample("b", dist.Bernoulli(0.5))
        mean = b.sum(-1, keepdim=True)
        with pyro.plate("data", 3):
            pyro.sample("u", dist.Normal(mean, 1.0), obs=RATES)

    def guide() -> None:
        with pyro.plate("units", 3):
            pyro.sample("b", dist.Bernoulli(unit("q")), infer=SAMPLED)

    assert loss_of(model, guide) > 0
