"""Sentences of the pages, each run: what is refused, what is equal, and whether following a message's advice works."""

import builtins
import re
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from test_docs import PAGES
from torch import Tensor
from torch.distributions import constraints

import pyro_vfe as vfe
from pyro_vfe import errors
from pyro_vfe.engine import cost
from pyro_vfe.errors import (
    CostError,
    NotFiniteError,
    PlateError,
    ScaleError,
    SpotCheckError,
    StructureError,
    UnenumerableError,
)

POINTS = torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64)
KNOWN = torch.tensor([True, True, False])
DRAWN: dict[str, Any] = {"enumerate": None}


def no_guide(*args: Any) -> None:
    """All latents are left to the model."""


def sampled(**options: Any) -> vfe.FreeEnergy:
    """For programs without anything to enumerate."""
    return vfe.FreeEnergy(strict_enumeration_warning=False, **options)


def adam() -> Any:
    return pyro.optim.Adam({"lr": 0.01})


# A draw in a plate, read at other elements than its own.


def other_elements(read: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    def model(u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("u", dist.Normal(read(w), 1.0), obs=u)

    return model


def from_outside(u: Tensor) -> None:
    with pyro.plate("draws", len(u)):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(u)):
        pyro.sample("u", dist.Normal(w.flip(-1), 1.0), obs=u)


def each_its_own(u: Tensor) -> None:
    with pyro.plate("data", len(u)):
        pyro.sample("w", dist.Normal(u.flip(-1) / 2, 0.8))


def each_its_own_of_draws(u: Tensor) -> None:
    with pyro.plate("draws", len(u)):
        pyro.sample("w", dist.Normal(u.flip(-1) / 2, 0.8))


def reweighted(model: Any, guide: Any, u: Tensor) -> None:
    machine = vfe.WakeSleep(model, guide, adam(), adam(), reweighted=True, num_particles=3, insomnia=1.0)
    machine.wake(u)


WEIGHING: dict[str, Callable[[Any, Any, Tensor], object]] = {
    "bounds": lambda model, guide, u: vfe.bounds(model, guide, u, num_particles=10),
    "vimco": lambda model, guide, u: sampled(gradient="vimco", num_particles=3).loss(model, guide, u),
    "reweighted wake-sleep": reweighted,
}

READS: dict[str, Callable[[Tensor], Tensor]] = {
    "reversed": lambda w: w.flip(-1),
    "the neighbours": lambda w: w.roll(1, -1),
    "the mean": lambda w: w - w.mean(-1, keepdim=True),
}


@pytest.mark.parametrize("weighing", WEIGHING)
@pytest.mark.parametrize("read", READS)
def test_draws_weighed_by_element_are_not_read_at_others(weighing: str, read: str) -> None:
    with pytest.raises(SpotCheckError, match="reads at one element what was drawn at others"):
        WEIGHING[weighing](other_elements(READS[read]), each_its_own, POINTS)


@pytest.mark.parametrize("weighing", WEIGHING)
def test_a_point_that_an_autoguide_makes_of_a_draw_is_a_draw_too(weighing: str) -> None:
    model = other_elements(READS["reversed"])
    guide = AutoNormal(model)
    with pytest.raises(SpotCheckError, match="reads at one element"):
        WEIGHING[weighing](model, guide, POINTS)


@pytest.mark.parametrize("weighing", ["bounds", "vimco"])
def test_outside_of_its_plate_a_draw_may_be_read_as_one_likes(weighing: str) -> None:
    WEIGHING[weighing](from_outside, each_its_own_of_draws, POINTS)
    WEIGHING[weighing](other_elements(lambda w: 2 * w), each_its_own, POINTS)


def test_a_bound_on_draws_read_from_outside_holds() -> None:
    log_evidence = dist.Normal(0.0, 2.0**0.5).log_prob(POINTS).sum()  # u_n is a sum of two standard normals.
    low, high = vfe.bounds(from_outside, each_its_own_of_draws, POINTS, num_particles=1000).interval(0.999)
    assert low < log_evidence
    assert high is None


def test_the_free_energy_of_a_pathwise_draw_that_is_read_elsewhere_is_no_sum_over_weights_and_has_a_value() -> None:
    loss = sampled(num_particles=400).loss(other_elements(READS["reversed"]), each_its_own, POINTS)
    centre, spread = POINTS.flip(-1) / 2, torch.tensor(0.8)
    energy = -dist.Normal(0.0, 1.0).log_prob(centre) - dist.Normal(0.0, 1.0).log_prob(POINTS - centre.flip(-1))
    expected = energy + spread**2 - dist.Normal(0.0, spread).entropy()  # of a quadratic: half its curvature, 2
    assert abs(loss - expected.sum()) < 0.5


# Masks of single elements of an event.


def bits(u: Tensor) -> None:
    z = pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.5)).mask(KNOWN).to_event(1))
    pyro.sample("u", dist.Normal(z, 1.0).mask(KNOWN).to_event(1), obs=u)


def bits_in_a_plate(u: Tensor) -> None:
    with pyro.plate("bits", 3), pyro.poutine.mask(mask=KNOWN):
        z = pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.5)))
        pyro.sample("u", dist.Normal(z, 1.0), obs=u)


def test_a_latent_event_with_masked_elements_is_refused_and_a_plate_is_the_way_out() -> None:
    with pytest.raises(ScaleError, match=r"'z' is one event.*a plate in place of to_event"):
        vfe.FreeEnergy().loss(bits, no_guide, POINTS)
    with pytest.raises(ScaleError, match="'z' is one event"):
        vfe.posterior(bits, POINTS)
    each = (
        torch.stack([dist.Normal(k, 1.0).log_prob(POINTS) for k in (0.0, 1.0)]).logsumexp(0) + torch.tensor(0.5).log()
    )
    torch.testing.assert_close(vfe.FreeEnergy().loss(bits_in_a_plate, no_guide, POINTS), -each[KNOWN].sum().item())


def vector(masked: bool) -> Callable[[Tensor], None]:
    def model(u: Tensor) -> None:
        prior = dist.Normal(torch.zeros(3), 1.0)
        w = pyro.sample("w", (prior.mask(KNOWN) if masked else prior).to_event(1))
        pyro.sample("u", dist.Normal(w, 1.0).mask(KNOWN).to_event(1), obs=u)

    return model


def vector_guide(masked: bool) -> Callable[[Tensor], None]:
    def guide(u: Tensor) -> None:
        exact = dist.Normal(u / 2, 0.5**0.5)
        pyro.sample("w", (exact.mask(KNOWN) if masked else exact).to_event(1))

    return guide


@pytest.mark.parametrize("masked", [True, False])
def test_elements_of_a_drawn_event_are_masked_alike_or_not_at_all(masked: bool) -> None:
    with pytest.raises(ScaleError, match="hides other elements in the guide than in the model"):
        vfe.FreeEnergy().loss(vector(masked), vector_guide(not masked), POINTS)


def test_with_the_same_elements_masked_in_both_programs_the_exact_posterior_has_the_surprise_as_its_free_energy() -> (
    None
):
    expected = -dist.Normal(0.0, 2.0**0.5).log_prob(POINTS)[KNOWN].sum()
    torch.testing.assert_close(sampled().loss(vector(True), vector_guide(True), POINTS), expected.item())


# Changes in place of an argument that is a site's datum itself.


def adding(u: Tensor) -> None:
    u[0] += 1.0
    with pyro.plate("data", len(u)):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("u", dist.Normal(z, 1.0), obs=u)


IN_PLACE: dict[str, Callable[[Tensor], object]] = {
    "loss": lambda u: vfe.FreeEnergy().loss(adding, no_guide, u),
    "unchecked": lambda u: vfe.FreeEnergy(check=False).loss(adding, no_guide, u),
    "posterior": lambda u: vfe.posterior(adding, u),
    "EM": lambda u: vfe.EM(adding).run(u, progress_bar=False),
}


@pytest.mark.parametrize("call", IN_PLACE)
def test_data_that_a_program_overwrites_are_refused_and_put_back(call: str) -> None:
    u = POINTS.clone()
    with pytest.raises(StructureError, match="change a tensor in place"):
        IN_PLACE[call](u)
    assert torch.equal(u, POINTS)


# Parameters that are NaN.


def mixture(u: Tensor) -> None:
    locs = pyro.param("locs", torch.tensor([0.0, 1.0]))
    with pyro.plate("data", len(u)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
        pyro.sample("u", dist.Normal(locs[z], 1.0), obs=u)


def guessing(infer: dict[str, Any]) -> Callable[[Tensor], None]:
    def guide(u: Tensor) -> None:
        probs = pyro.param("probs", torch.full((len(u), 2), 0.5), constraint=constraints.simplex)
        with pyro.plate("data", len(u)):
            pyro.sample("z", dist.Categorical(probs), infer=infer)

    return guide


ENTRIES: dict[str, Callable[[Any, Tensor], object]] = {
    "decompose": lambda guide, u: vfe.FreeEnergy().decompose(mixture, guide, u),
    "posterior": lambda guide, u: vfe.posterior(mixture, u),
    "explain": lambda guide, u: vfe.explain(mixture, guide, u),
    "bounds": lambda guide, u: vfe.bounds(mixture, guide, u),
    "dream": lambda guide, u: vfe.dream(mixture, u),
    "wake": lambda guide, u: vfe.WakeSleep(mixture, guide, adam(), adam()).wake(u),
    "sleep": lambda guide, u: vfe.WakeSleep(mixture, guide, adam(), adam()).sleep(u),
    "fit": lambda guide, u: vfe.fit(mixture, guide, u, optim=adam(), num_steps=1, progress_bar=False),
    "EM": lambda guide, u: vfe.EM(mixture).run(u, progress_bar=False),
    "tree": lambda guide, u: vfe.to_datatree(mixture, guide, u, num_samples=2, progress_bar=False),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("infer", [{}, DRAWN], ids=["summed", "drawn"])
def test_a_parameter_that_is_nan_is_named_at_every_entry_point(entry: str, infer: dict[str, Any]) -> None:
    guide = guessing(infer)
    mixture(POINTS)
    guide(POINTS)
    pyro.get_param_store().get_param("locs").data[0] = torch.nan
    with pytest.raises(NotFiniteError, match="'locs'"):
        ENTRIES[entry](guide, POINTS)


# Costs.


def sum_of(count: int) -> Callable[[], None]:
    def model() -> None:
        z = [pyro.sample(f"z_{i}", dist.Bernoulli(0.5)) for i in range(count)]
        pyro.sample("u", dist.Normal(sum(z), 1.0), obs=torch.tensor(3.0))

    return model


def test_what_stands_beside_a_table_has_to_fit_too_where_nobody_named_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    table = 8 * 2**12
    vfe.FreeEnergy(max_bytes=4 * table).loss(sum_of(12), no_guide)
    monkeypatch.setattr(cost, "default_limit", lambda device: 4.0 * table)
    with pytest.raises(CostError, match="'u'"):
        vfe.FreeEnergy().loss(sum_of(12), no_guide)
    vfe.FreeEnergy().loss(sum_of(11), no_guide)


# What messages advise.


def regression(u: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
    with pyro.plate("data", len(u)):
        z = pyro.sample("z", dist.Bernoulli(0.4))
        pyro.sample("u", dist.Normal(w + z, scale), obs=u)


@pytest.mark.parametrize("autoguide", [AutoNormal, AutoMultivariateNormal])
def test_em_names_the_latents_of_the_model_that_a_point_guide_is_to_expose(autoguide: Any) -> None:
    names = ["w", "scale"]
    guide = autoguide(pyro.poutine.block(regression, expose=names))
    with pytest.raises(UnenumerableError) as error:
        vfe.EM(regression, guide).run(POINTS, progress_bar=False)
    assert f"expose={names}" in str(error.value)
    points = AutoDelta(pyro.poutine.block(regression, expose=names))
    assert vfe.EM(regression, points).run(POINTS, progress_bar=False).converged


def layer(count: int) -> Callable[[], None]:
    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(torch.full((count,), 0.5)).to_event(1))
        pyro.sample("u", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(3.0))

    return model


def layer_drawn(count: int) -> Callable[[], None]:
    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(torch.full((count,), 0.5)).to_event(1), infer=DRAWN)

    return guide


@pytest.mark.parametrize("count", [40, 2000])  # 2 to the power 2000 is no float.
def test_a_layer_too_wide_to_be_summed_is_drawn_by_a_guide_site_that_says_so(count: int) -> None:
    with pytest.raises(CostError, match=rf"2 to the power {count} .*infer=\{{'enumerate': None\}}"):
        vfe.explain(layer(count), no_guide)
    assert not vfe.FreeEnergy().decompose(layer(1), layer_drawn(1)).exact
    assert vfe.FreeEnergy(strict_enumeration_warning=False).loss(layer(count), layer_drawn(count)) > 0


def test_elements_with_supports_of_their_own_are_named_and_drawn_where_the_guide_says_so() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Binomial(torch.tensor([2, 3]), torch.tensor(0.5)).to_event(1))
        pyro.sample("u", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(3.0))

    def guide() -> None:
        pyro.sample("z", dist.Binomial(torch.tensor([2, 3]), torch.tensor(0.5)).to_event(1), infer=DRAWN)

    with pytest.raises(UnenumerableError, match=r"'z' is Binomial.*the guide draw the site"):
        vfe.FreeEnergy().loss(model, no_guide)
    sampled().loss(model, guide)


def test_only_the_guide_says_whether_a_latent_that_both_have_is_drawn() -> None:
    def model(infer: dict[str, Any]) -> Callable[[], None]:
        def program() -> None:
            z = pyro.sample("z", dist.Bernoulli(0.3), infer=infer)
            pyro.sample("u", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

        return program

    def guide(infer: dict[str, Any]) -> Callable[[], None]:
        return lambda: pyro.sample("z", dist.Bernoulli(0.4), infer=infer)

    elbo = vfe.FreeEnergy()
    assert [elbo.decompose(model(a), guide(b)).exact for a in ({}, DRAWN) for b in ({}, DRAWN)] == [1, 0, 1, 0]


def test_bernoulli_and_categorical_of_two_have_the_same_values() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("u", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    def guide() -> None:
        pyro.sample("z", dist.Categorical(torch.tensor([0.6, 0.4])))

    q, prior = torch.tensor([0.6, 0.4]), torch.tensor([0.7, 0.3])
    joint = prior.log() + dist.Normal(torch.tensor([0.0, 1.0]), 1.0).log_prob(torch.tensor(1.0))
    torch.testing.assert_close(vfe.FreeEnergy().loss(model, guide), (q * (q.log() - joint)).sum().item())


# Advice that led to another error.


def crossing(u: Tensor) -> None:
    across, down = pyro.plate("across", 2, dim=-1), pyro.plate("down", 2, dim=-2)
    with across:
        x = pyro.sample("x", dist.Bernoulli(0.3))
    with down:
        y = pyro.sample("y", dist.Bernoulli(0.3))
    with across, down:
        pyro.sample("u", dist.Normal(x + y, 1.0), obs=u)


def guide_across(u: Tensor) -> None:
    with pyro.plate("across", 2, dim=-1):
        pyro.sample("x", dist.Bernoulli(0.4))


def test_shares_of_plates_that_cross_are_refused_and_the_whole_gap_is_there() -> None:
    terms = vfe.FreeEnergy().decompose(crossing, guide_across, torch.ones(2, 2))
    with pytest.raises(StructureError, match="ask for the whole gap"):
        terms.gap_by_site()
    assert terms.gap > 0


def chains(u: Tensor) -> None:
    initial, transition = torch.ones(2) / 2, torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    time, sequences = pyro.plate("time", 4, dim=-1), pyro.plate("sequences", 3, dim=-2)
    with time:
        shared = pyro.sample("shared", vfe.MarkovChain(initial, transition))
    with sequences, time:
        own = pyro.sample("own", vfe.MarkovChain(initial, transition))
        pyro.sample("u", dist.Normal(own + shared, 1.0), obs=u)


def guide_of_the_shared_chain(infer: dict[str, Any]) -> Callable[[Tensor], None]:
    def guide(u: Tensor) -> None:
        with pyro.plate("time", 4, dim=-1):
            pyro.sample("shared", vfe.MarkovChain(torch.ones(2) / 2, torch.ones(2, 2) / 2), infer=infer)

    return guide


def test_a_chain_that_sequences_share_is_drawn_where_the_guide_marks_it() -> None:
    u = torch.ones(3, 4)
    with pytest.raises(PlateError, match=r"let the guide draw one of them \(infer=\{'enumerate': None\}\)"):
        vfe.FreeEnergy().loss(chains, no_guide, u)
    with pytest.raises(PlateError):
        vfe.FreeEnergy().loss(chains, guide_of_the_shared_chain({}), u)
    assert vfe.FreeEnergy().loss(chains, guide_of_the_shared_chain(DRAWN), u) > 0


def test_a_summed_chain_of_the_guide_goes_on_from_the_states_that_are_known() -> None:
    initial, transition = torch.ones(2) / 2, torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    states, known = torch.tensor([0, 1, 1]), torch.tensor([True, False, False])
    rates, u = torch.tensor([1.0, 5.0]), torch.tensor([1.0, 4.0, 2.0])

    def model() -> None:
        with pyro.plate("time", 3):
            z = pyro.sample("z", vfe.MarkovChain(initial, transition), obs=states, obs_mask=known)
            pyro.sample("u", dist.Poisson(rates[z]), obs=u)

    def guide() -> None:
        with pyro.plate("time", 3):
            pyro.sample("z_unobserved", vfe.MarkovChain(initial, torch.tensor([[0.5, 0.5], [0.4, 0.6]])))

    expected = torch.tensor(0.0)
    for one in range(2):
        for two in range(2):
            q = 0.5 * torch.tensor([[0.5, 0.5], [0.4, 0.6]])[one, two]  # from state 0, which is known
            path = torch.tensor([0, one, two])
            steps = initial[0].log() + transition[0, one].log() + transition[one, two].log()
            expected = expected + q * (q.log() - steps - dist.Poisson(rates[path]).log_prob(u).sum())
    torch.testing.assert_close(vfe.FreeEnergy().loss(model, guide), expected.item())


# Names.


@pytest.mark.parametrize("page", sorted({page.name for page in PAGES}))
def test_names_that_a_page_mentions_exist(page: str) -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES if path.name == page)
    strange = set(re.findall(r"\bvfe\.(\w+)", text)) - {*vfe.__all__, "errors"}
    strange |= set(re.findall(r"`(\w+(?:Error|Warning))`", text)) - {*vars(errors), *vars(builtins)}
    assert not strange
