"""A decomposition as a result: its laws, its shares, its precision, and what it looks like."""

import math
from html.parser import HTMLParser
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import TERMS, oracle
from programs import INFINITE, PROGRAMS, SAMPLED_PROGRAMS, UNSPLIT, Program
from programs.case import bernoulli, categorical, empty, noise, simplex, tensor, unit
from programs.chains import COUNTS, chain, forward_guide
from programs.plates import mixture, mixture_guide
from torch import Tensor

import pyro_vfe as vfe
from pyro_vfe.errors import ImpossibleDataError, StructureError, VFEError

PLATED = [(name, plate) for name, program in PROGRAMS.items() for plate in program.plates]
UNSHARED = (
    *("auxiliary_site", "auxiliary_site_without_a_mark", "auxiliary_site_in_a_plate", "auxiliary_site_above_a_plate"),
    *("nested_inner_guided", "crossing_one_edge_guided", "crossing_edges_guided", "crossing_all_guided"),
    *("local_guided", "global_and_local_guided_apart", "mixed_guided"),
)
"""Programs whose gap has no shares by site: the guide's own latents, or elements tied by what comes after them."""
GUIDED = [
    name
    for name, program in PROGRAMS.items()
    if program.guide is not empty and "1000" not in name and "ising" not in name and name not in UNSHARED + UNSPLIT
]


def decomposed(program: Program, **options: Any) -> vfe.Decomposition:
    return vfe.FreeEnergy(**options).decompose(program.model, program.guide, *program.args, **program.kwargs)


@pytest.mark.parametrize(
    "name", [name for name in PROGRAMS if not name.startswith(("chain_of", "ising", "120")) and name not in UNSPLIT]
)
def test_the_four_readings_agree(name: str) -> None:
    terms = decomposed(PROGRAMS[name])
    tolerance = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(terms.energy - terms.entropy, terms.free_energy, **tolerance)
    torch.testing.assert_close(terms.surprise + terms.gap, terms.free_energy, **tolerance)
    torch.testing.assert_close(terms.complexity - terms.accuracy, terms.free_energy, **tolerance)
    assert terms.gap >= -1e-10 * max(1.0, abs(terms.free_energy))
    assert all(getattr(terms, term).dtype == torch.float64 and not getattr(terms, term).shape for term in TERMS)


@pytest.mark.parametrize(("name", "plate"), PLATED)
def test_the_elements_of_a_plate_sum_to_the_whole(name: str, plate: str) -> None:
    whole = decomposed(PROGRAMS[name])
    parts = whole.by(plate)
    assert parts.plate == plate
    assert parts.energy.shape == parts.gap.shape != ()
    for term in TERMS:
        torch.testing.assert_close(getattr(parts, term).sum(), getattr(whole, term), rtol=1e-10, atol=1e-9)


def test_an_unknown_plate_is_refused_with_the_plates_there_are() -> None:
    with pytest.raises(VFEError, match=r"'people'.*'data'"):
        vfe.FreeEnergy().decompose(mixture, mixture_guide, COUNTS).by("people")
    with pytest.raises(VFEError, match="no plate 'data'"):
        vfe.FreeEnergy().decompose(chain, forward_guide, COUNTS).by("data")


@pytest.mark.parametrize(
    "name",
    ["global_over_local", "global_guided", "global_and_local_guided", "local_guided", "sequential_under_global"],
)
def test_a_latent_above_the_plate_is_named_with_what_can_be_asked_for(name: str) -> None:
    with pytest.raises(VFEError) as refusal:
        decomposed(PROGRAMS[name]).by("data")
    assert "'data'" in str(refusal.value)
    assert "'g'" in str(refusal.value)
    assert "Ask for the whole" in str(refusal.value)


def test_another_plate_that_fits_is_offered() -> None:
    def model() -> None:
        with pyro.plate("groups", 2, dim=-1):
            g = bernoulli("g", unit("g_prob"))
            with pyro.plate("members", 3, dim=-2):
                pyro.sample("u", dist.Normal(g, 1.0), obs=noise(3, 2, seed=1))

    terms = vfe.FreeEnergy().decompose(model, empty)
    with pytest.raises(VFEError, match=r"'members'.*'g'.*by 'groups'"):
        terms.by("members")
    assert terms.by("groups").surprise.sum() == pytest.approx(terms.surprise.item(), rel=1e-12)


COUPLED_CHAINS = [
    name for name in GUIDED if name.startswith(("factorial_markov", "chain_on_chain", "two_markov_chains_and"))
]
"""Summing one chain given another takes the whole path of the other at once."""


@pytest.mark.parametrize("name", COUPLED_CHAINS)
def test_chains_that_are_coupled_have_no_shares_of_their_own(name: str) -> None:
    with pytest.raises(StructureError, match="no shares by site: the chain"):
        decomposed(PROGRAMS[name]).gap_by_site()


@pytest.mark.parametrize("name", [name for name in GUIDED if name not in COUPLED_CHAINS])
def test_the_sites_shares_sum_to_the_gap(name: str) -> None:
    terms = decomposed(PROGRAMS[name])
    shares = terms.gap_by_site()
    total = sum((share.sum() for share in shares.values()), tensor(0.0))
    torch.testing.assert_close(total, terms.gap, rtol=1e-9, atol=1e-9 * max(1.0, abs(terms.free_energy)))


def test_a_sites_share_is_the_rise_of_F_when_the_guide_takes_it_over() -> None:
    counts = COUNTS[:3]
    names = [f"z_{t}" for t in range(len(counts))]
    shares = vfe.FreeEnergy().decompose(chain, forward_guide, counts).gap_by_site()
    before = oracle(chain, empty, counts).terms["free_energy"].detach()
    for t, name in enumerate(names):
        prefix = pyro.poutine.block(forward_guide, hide=names[t + 1 :])
        after = oracle(chain, prefix, counts).terms["free_energy"].detach()
        torch.testing.assert_close(shares[name], after - before, rtol=1e-9, atol=1e-9)
        before = after


def test_a_plated_sites_shares_are_its_elements_gaps() -> None:
    terms = vfe.FreeEnergy().decompose(mixture, mixture_guide, COUNTS)
    expected = oracle(mixture, mixture_guide, COUNTS).by("data")["gap"].detach()
    torch.testing.assert_close(terms.gap_by_site()["z"], expected, rtol=1e-10, atol=1e-10)


def test_where_the_guide_has_no_discrete_latent_there_are_no_shares() -> None:
    assert vfe.FreeEnergy().decompose(mixture, empty, COUNTS).gap_by_site() == {}


@pytest.mark.parametrize("name", UNSHARED)
def test_shares_by_site_are_refused_where_they_do_not_exist(name: str) -> None:
    with pytest.raises(VFEError, match="shares by site"):
        decomposed(PROGRAMS[name]).gap_by_site()


MEANS = tensor([-0.5, 0.0, 0.5])
FAR = 14.0 + noise(1000, seed=1)


def far_mixture(points: Tensor, perturbation: float) -> None:
    with pyro.plate("data", len(points)):
        z = categorical("z", tensor([0.2, 0.5, 0.3]))
        pyro.sample("u", dist.Normal(MEANS[z], 1.0), obs=points)


def far_log_posterior(points: Tensor) -> Tensor:
    """-(u - m)^2 / 2 + u^2 / 2: what is large cancels."""
    return (tensor([0.2, 0.5, 0.3]).log() + points.unsqueeze(-1) * MEANS - MEANS**2 / 2).log_softmax(-1)


def nearly_exact_guide(points: Tensor, perturbation: float) -> None:
    with pyro.plate("data", len(points)):
        logits = far_log_posterior(points) + perturbation * noise(len(points), 3, seed=2)
        pyro.sample("z", dist.Categorical(logits=logits))


@pytest.mark.parametrize(("perturbation", "tolerance"), [(0.0, 1e-12), (1e-6, 1e-12), (1e-7, 1e-12), (1e-3, 1e-8)])
def test_a_tiny_gap_is_seen_beside_a_surprise_of_1e5(perturbation: float, tolerance: float) -> None:
    """To second order in a perturbation d of the logits, KL(Q || P) is the variance of d under P, halved."""
    terms = vfe.FreeEnergy().decompose(far_mixture, nearly_exact_guide, FAR, perturbation)
    probs, direction = far_log_posterior(FAR).exp(), noise(len(FAR), 3, seed=2)
    variance = (probs * direction**2).sum(-1) - (probs * direction).sum(-1) ** 2
    assert terms.surprise > 9e4
    assert terms.gap.item() == pytest.approx(perturbation**2 * variance.sum().item() / 2, abs=tolerance)
    each = terms.by("data").gap
    torch.testing.assert_close(each, perturbation**2 * variance / 2, rtol=0, atol=max(1e-14, 1e-2 * tolerance))


def test_a_float32_program_is_taken_apart_in_float64() -> None:
    def model(points: Tensor) -> None:
        with pyro.plate("data", len(points)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.5, 0.3], dtype=torch.float32)))
            pyro.sample("u", dist.Normal(MEANS.float()[z], torch.ones((), dtype=torch.float32)), obs=points)

    def guide(points: Tensor) -> None:
        with pyro.plate("data", len(points)):
            pyro.sample("z", dist.Categorical(logits=far_log_posterior(points.double()).float()))

    points = FAR.float()
    terms = vfe.FreeEnergy().decompose(model, guide, points)
    assert all(getattr(terms, term).dtype == torch.float64 for term in TERMS)
    assert -1e-10 < terms.gap < 1e-4
    log_joint = tensor([0.2, 0.5, 0.3]).log() + dist.Normal(MEANS, 1.0).log_prob(points.double().unsqueeze(-1))
    assert terms.surprise.item() == pytest.approx(-log_joint.logsumexp(-1).sum().item(), rel=1e-6)


@pytest.mark.parametrize(("name", "words"), [("mass_on_the_impossible", ()), ("or_missed_by_the_guide", ("rings = ",))])
def test_an_infinite_free_energy_has_an_infinite_gap_and_names_site_and_value(name: str, words: tuple[str]) -> None:
    terms = decomposed(INFINITE[name])
    assert terms.gap == terms.free_energy == math.inf
    assert terms.surprise.isfinite()
    assert terms.impossible
    for line in terms.impossible:
        assert line in str(terms)
    assert all(word in " ".join(terms.impossible) for word in words)
    assert "inf" in str(terms)


def test_the_forbidden_value_is_named_with_its_plate_element() -> None:
    zero_at_2 = tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])

    def model() -> None:
        with pyro.plate("data", 2) as n:
            z = categorical("z", zero_at_2[n])
            pyro.sample("u", dist.Normal(z.double(), 1.0), obs=tensor([0.3, 1.0]))

    def guide() -> None:
        with pyro.plate("data", 2):
            categorical("z", simplex("q", 2, 3))

    (words,) = vfe.FreeEnergy().decompose(model, guide).impossible
    assert "z = 2" in words
    assert "data element 0" in words
    assert "'z'" in words


def test_impossible_data_have_no_decomposition() -> None:
    def model() -> None:
        z = categorical("z", tensor([0.4, 0.6]))
        pyro.sample("u", dist.Categorical(tensor([[1.0, 0.0], [1.0, 0.0]])[z]), obs=torch.tensor(1))

    with pytest.raises(ImpossibleDataError, match="'u'"):
        vfe.FreeEnergy().decompose(model, empty)


@pytest.mark.parametrize("name", ["poisson_w", "v_depends_on_w_both_guided", "w_depends_on_v_both_guided"])
def test_the_standard_error_is_that_of_the_particles(name: str) -> None:
    program = SAMPLED_PROGRAMS[name]
    elbo = vfe.FreeEnergy()
    elbo.loss(program.model, program.guide, *program.args)
    pyro.set_rng_seed(5)
    single = [elbo.decompose(program.model, program.guide, *program.args) for _ in range(8)]
    pyro.set_rng_seed(5)
    terms = vfe.FreeEnergy(num_particles=8).decompose(program.model, program.guide, *program.args)
    assert all(one.stderr is None and not one.exact for one in single)
    for term in TERMS:
        mean = torch.stack([getattr(one, term) for one in single]).mean()
        torch.testing.assert_close(getattr(terms, term), mean, rtol=1e-10, atol=1e-10)
    spread = torch.stack([one.free_energy for one in single]).std() / math.sqrt(8)
    torch.testing.assert_close(terms.stderr, spread)
    torch.testing.assert_close(terms.per_datum.stderr, spread / terms.num_data)
    assert f"standard error of F {spread.item():.2g}" in str(terms)


@pytest.mark.parametrize("name", ["mixture_guided", "chain", "subsampled_guided", "point_estimate_of_w"])
def test_only_what_is_sampled_or_subsampled_is_inexact(name: str) -> None:
    terms = decomposed(PROGRAMS[name])
    assert terms.exact is not name.startswith("subsampled")
    assert ("not exact" in str(terms)) is not terms.exact


@pytest.mark.parametrize(
    ("name", "count"),
    [("mixture_guided", 4), ("subsampled_guided", 10), ("chain", 1), ("nested", 4), ("crossing_all_guided", 4)],
)
def test_per_datum_divides_by_the_number_of_data(name: str, count: int) -> None:
    terms = decomposed(PROGRAMS[name])
    assert terms.num_data == count
    assert terms.per_datum.num_data == 1
    for term in TERMS:
        torch.testing.assert_close(getattr(terms.per_datum, term), getattr(terms, term) / count)


def test_printed_it_shows_every_term_in_nats_in_total_and_per_datum() -> None:
    expected = oracle(mixture, mixture_guide, COUNTS).terms
    lines = str(vfe.FreeEnergy().decompose(mixture, mixture_guide, COUNTS)).splitlines()
    assert lines[0].split() == ["nats", "per", "datum", "(N=4)"]
    order = ("free_energy", "surprise", "gap", "energy", "entropy", "complexity", "accuracy")
    for line, term in zip(lines[1:], order, strict=True):
        total = expected[term].item()
        assert term.replace("_", " ") in line
        assert f" {total:,.4f} " in line
        assert f" {total / 4:,.4f} " in line


class _Tags(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        self.tags.add(tag)
        assert not {name for name, _ in attrs} & {"src", "href", "onload", "onclick"}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.mark.parametrize(
    ("name", "by"),
    [
        ("mixture_guided", True),
        ("mixture_guided", False),
        ("chain", False),
        ("or_missed_by_the_guide", False),
        ("subsampled_guided", True),
    ],
)
def test_the_notebook_form_is_self_contained_and_says_what_the_text_says(name: str, by: bool) -> None:
    terms = decomposed({**PROGRAMS, **INFINITE}[name])
    if (by and "data" not in (*PROGRAMS["mixture"].plates,)) or (by and "data" not in terms.runs[0].all_plates):
        pytest.skip("there is no plate to report by")
    shown = terms.by("data") if by else terms
    html, page = shown._repr_html_(), _Tags()
    page.feed(html)
    assert page.open == []
    assert page.tags <= {"div", "table", "thead", "tbody", "tr", "th", "td", "style", "span"}
    assert "http" not in html
    assert "url(" not in html
    text = " ".join(str(shown).split())
    for part in page.text:
        assert " ".join(part.split()) in text


def test_to_xarray_has_the_terms_in_nats() -> None:
    terms = vfe.FreeEnergy().decompose(mixture, mixture_guide, COUNTS)
    expected = oracle(mixture, mixture_guide, COUNTS)
    whole, parts = terms.to_xarray(), terms.by("data").to_xarray()
    assert whole.attrs["units"] == parts.attrs["units"] == "nats"
    assert (whole.attrs["exact"], whole.attrs["num_data"]) == (1, 4)
    assert set(whole) == set(parts) == set(TERMS)
    by = expected.by("data")
    for term in TERMS:
        assert whole[term].dims == ()
        assert whole[term].item() == pytest.approx(expected.terms[term].item(), rel=1e-10)
        assert parts[term].dims == ("data",)
        assert parts[term].to_numpy() == pytest.approx(by[term].detach().numpy(), rel=1e-10, abs=1e-10)


def test_to_xarray_has_the_standard_error_where_there_is_one() -> None:
    program = SAMPLED_PROGRAMS["poisson_w"]
    terms = vfe.FreeEnergy(num_particles=5).decompose(program.model, program.guide, *program.args)
    dataset = terms.to_xarray()
    assert dataset["free_energy_stderr"].item() == terms.stderr.item()
    assert dataset.attrs["exact"] == 0


def test_a_sequential_plate_has_as_many_data_as_steps() -> None:
    def model(u: Tensor) -> None:
        for i in pyro.plate("data", len(u)):
            z = categorical(f"z_{i}", tensor([0.4, 0.6]))
            pyro.sample(f"u_{i}", dist.Poisson(tensor([1.0, 6.0])[z]), obs=u[i])

    u = tensor([0.0, 3.0, 8.0])
    terms = vfe.FreeEnergy().decompose(model, vfe.AutoMeanField(model), u)
    assert terms.num_data == 3
    by_step = terms.by("data").surprise
    mixture = 0.4 * dist.Poisson(1.0).log_prob(u).exp() + 0.6 * dist.Poisson(6.0).log_prob(u).exp()
    torch.testing.assert_close(by_step, -mixture.log())


def test_a_decomposition_in_single_precision_keeps_the_probabilities_of_draws() -> None:
    data, probs = torch.tensor([0.2, 0.9, 1.5]).float(), torch.tensor([0.2, 0.5, 0.9]).float()

    def model(u: Tensor) -> None:
        with pyro.plate("data", 3):
            v = pyro.sample("v", dist.Bernoulli(torch.full((), 0.3).float()))
            pyro.sample("u", dist.Normal(v, 1.0), obs=u)

    def guide(u: Tensor) -> None:
        with pyro.plate("data", 3):
            pyro.sample("v", dist.Bernoulli(probs), infer={"enumerate": None})

    values = torch.cartesian_prod(*[torch.arange(2.0).float()] * 3)
    log_q = dist.Bernoulli(probs).log_prob(values).sum(-1)
    log_p = (dist.Bernoulli(0.3).log_prob(values) + dist.Normal(values, 1.0).log_prob(data)).sum(-1)
    for _ in range(5):
        found = vfe.FreeEnergy().decompose(model, guide, data).free_energy
        assert torch.isclose(found.float(), log_q - log_p, rtol=1e-6).any()
