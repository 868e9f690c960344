"""What goes into a tree, against ordinary runs, the joint table and averages over draws."""

from functools import cache
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import oracle
from programs import PROGRAMS, SAMPLED_PROGRAMS
from programs.case import Program, empty
from pyro import poutine
from pyro.infer.autoguide import AutoDelta
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor

import pyro_vfe as vfe
from pyro_vfe.errors import MissingGuideSiteError, StructureError
from pyro_vfe.reporting.gathering import Gathered, Gatherer


def one_of_each_model(names: list[str]) -> list[str]:
    """Returns the names without those of programs that differ from another in their guide alone."""
    found: dict[tuple[object, ...], str] = {}
    for name in names:
        program = PROGRAMS[name]
        found.setdefault((program.model, str(program.args), str(program.kwargs)), name)
    return list(found.values())


WEIGHTED = [name for name in PROGRAMS if "subsampled" in name or "scaled" in name]
LARGE = ("1000_steps", "120_", "ising")
HIDDEN = ("masked_latents", "missing_labels", "varying_lengths", "of_different_lengths")
"""Programs with latents behind a mask: an ordinary run leaves out their prior, which the library keeps."""

PLAIN = [name for name in PROGRAMS if name not in WEIGHTED and not any(part in name for part in HIDDEN + LARGE)]
UNWEIGHTED = [name for name in PROGRAMS if name not in WEIGHTED]
NEEDS_A_GUIDE = ("point_estimate",)
EXACT = one_of_each_model(
    [name for name in UNWEIGHTED if not name.startswith(NEEDS_A_GUIDE) and not any(p in name for p in LARGE)]
)
TIED = ("local_guided", "nested_inner_guided", "crossing_one_edge_guided")
"""Programs in which latents of the model alone tie the guide's together."""

AUXILIARY = ("auxiliary_site", "auxiliary_site_in_a_plate", "auxiliary_site_above_a_plate")
STANDARD_ERRORS = 5.0


def gathered(program: Any, guide: Any = None, num_samples: int = 12, **options: Any) -> tuple[Gatherer, Gathered]:
    gatherer = Gatherer(
        program.model, guide or program.guide, program.args, getattr(program, "kwargs", {}), num_samples
    )
    return gatherer, gatherer.gather(**{"prior": False, "posterior_predictive": False, "history": None, **options})


def latents(gatherer: Gatherer) -> list[dict[str, Tensor]]:
    """The drawn values of all latents, draw by draw."""
    return [draw.given(i, 1, 0) for draw in gatherer.draws for i in range(draw.count)]


def ordinary(program: Any, which: str, values: dict[str, Tensor]) -> float:
    conditioned = poutine.condition(getattr(program, which), data=values)
    trace = poutine.trace(conditioned).get_trace(*program.args, **getattr(program, "kwargs", {}))
    return float(trace.log_prob_sum().detach())


def close(actual: Any, expected: Any, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [*PLAIN, *SAMPLED_PROGRAMS])
def test_lp_is_what_an_ordinary_run_gives_each_draw(name: str) -> None:
    program = PROGRAMS.get(name) or SAMPLED_PROGRAMS[name]
    gatherer, found = gathered(program, num_samples=5)
    expected = [ordinary(program, "model", values) for values in latents(gatherer)]
    close(found.groups["sample_stats"]["lp"].values, expected)


FULLY_GUIDED = (
    *("chain_mean_field", "chain_markov_in_both", "mixture_guided", "nested_guided", "crossing_all_guided"),
    *("counted_loop_guided", "markov_chains_with_chain_guides", "v_guided_before_w", "w_depends_on_v_both_guided"),
)


@pytest.mark.parametrize("name", FULLY_GUIDED)
def test_log_q_is_what_an_ordinary_run_of_the_guide_gives_each_draw(name: str) -> None:
    program = PROGRAMS.get(name) or SAMPLED_PROGRAMS[name]
    gatherer, found = gathered(program, num_samples=5)
    expected = [ordinary(program, "guide", values) for values in latents(gatherer)]
    close(found.groups["sample_stats"]["log_q"].values, expected)


@pytest.mark.parametrize("name", EXACT)
def test_weights_of_draws_from_the_exact_posterior_are_the_evidence(name: str) -> None:
    program = PROGRAMS[name]
    _, found = gathered(program, empty, num_samples=4)
    evidence = float(vfe.posterior(program.model, *program.args, **program.kwargs).log_evidence)
    close(found.groups["sample_stats"]["log_weight"].values, evidence)


@cache
def many_draws_of(name: str) -> tuple[Gatherer, Gathered]:
    """Enough for averages; where latents of the model tie the guide's together, each is summed over by itself."""
    return gathered(PROGRAMS[name], num_samples=400)


@pytest.mark.parametrize("name", [*TIED, *AUXILIARY, "chain_mean_field", "mixture_guided"])
def test_weights_of_draws_from_a_guide_average_to_the_evidence(name: str) -> None:
    program = PROGRAMS[name]
    _, found = many_draws_of(name)
    weights = np.exp(found.groups["sample_stats"]["log_weight"].values)
    evidence = float(vfe.posterior(program.model, *program.args, **program.kwargs).log_evidence.exp())
    stderr = weights.std() / len(weights) ** 0.5
    assert stderr > 0
    assert abs(weights.mean() - evidence) < STANDARD_ERRORS * stderr


@pytest.mark.parametrize("name", ["mixture", "mixture_guided", "chain_mean_field", *TIED, "branch_in_both"])
def test_draws_are_as_frequent_as_their_marginals_say(name: str) -> None:
    gatherer, found = many_draws_of(name)
    for site in gatherer.draws[0].indices:
        if f"{site}_q" not in found.groups["variational"]:
            continue
        q = found.groups["variational"][f"{site}_q"].values
        drawn = found.groups["posterior"][site].values
        values = found.coords[f"{site}_value"]
        there = found.groups["posterior"].get(f"{site}_present", np.ones_like(drawn))
        frequencies = ((drawn[..., None] == values) & (np.asarray(there)[..., None] == 1)).mean(0)
        spread = np.sqrt(q * (1 - q) / len(drawn)) + 1e-12
        assert (np.abs(frequencies - q) < STANDARD_ERRORS * spread).all(), site


BY_PLATE = [name for name in EXACT if len(PROGRAMS[name].plates) == 1 and PROGRAMS[name].expected is None]


@pytest.mark.parametrize("name", BY_PLATE)
def test_log_likelihoods_of_data_equal_the_joint_table_s(name: str) -> None:
    program = PROGRAMS[name]
    gatherer, found = gathered(program, empty, num_samples=3)
    (values,) = found.groups["log_likelihood"].values()
    if not gatherer.plates:
        pytest.skip("its observations share no plate")
    assert gatherer.plates == program.plates
    table = oracle(program.model, empty, *program.args, **program.kwargs)
    expected = -table.by(gatherer.plates[0])["surprise"].detach().numpy()
    close(values.values, np.broadcast_to(expected, (3, *expected.shape)))


def test_there_are_plates_to_compare_by() -> None:
    assert len(BY_PLATE) > 10


def test_log_likelihoods_are_given_w_and_leave_its_prior_out() -> None:
    program = SAMPLED_PROGRAMS["v_depends_on_w"]
    gatherer, found = gathered(program, num_samples=3)
    (values,) = found.groups["log_likelihood"].values()
    for i, draw in enumerate(gatherer.draws):
        given = poutine.condition(program.model, data=dict(draw.others))
        with_data = oracle(given, empty, *program.args).by("data")["surprise"]
        # Blocked from outside, an observed site is no part of the run.
        without = oracle(poutine.block(given, hide=["u"]), empty, *program.args).by("data")["surprise"]
        close(values.values[i], (without - with_data).detach().numpy())


def test_several_observed_sites_are_one_likelihood() -> None:
    _, found = gathered(PROGRAMS["mixture"], empty)
    assert list(found.groups["log_likelihood"]) == list(found.groups["observed_data"])
    _, found = gathered(Program(two_instruments, args=(torch.tensor([1.0, 4.0]),)), empty)
    assert list(found.groups["log_likelihood"]) == ["joint"]
    assert found.groups["log_likelihood"]["joint"].dims == ("draw", "data")


def two_instruments(u: Tensor) -> None:
    with pyro.plate("data", len(u)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("first", dist.Poisson(torch.tensor([1.0, 5.0])[z]), obs=u)
        pyro.sample("second", dist.Normal(torch.tensor([0.0, 2.0])[z], 1.0), obs=u)


def mixture(u: Tensor, scale: float = 1.0) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([4.0, 2.0])))
    with pyro.plate("components", 2):
        rates = pyro.sample("rates", dist.Gamma(torch.tensor([4.0, 90.0]), torch.tensor([2.0, 9.0])))
    with pyro.plate("data", len(u)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("u", dist.Poisson(rates[z] * scale), obs=u)


COUNTS = torch.tensor([1.0, 3.0, 12.0, 9.0])


@cache
def mixture_gathered() -> Gathered:
    """1000 draws, each by a run of its own: the prior draws more than what is enumerated."""
    guide = AutoDelta(poutine.block(mixture, hide=["z"]))
    return Gatherer(mixture, guide, (COUNTS,), {"scale": 1.5}, num_samples=1000).gather(True, True, None)


def test_simulated_data_have_the_model_s_moments() -> None:
    found = mixture_gathered()
    prior = found.groups["prior_predictive"]["u"].values
    mean = 1.5 * (4 / 6 * 2.0 + 2 / 6 * 10.0)
    assert (np.abs(prior.mean(0) - mean) < STANDARD_ERRORS * prior.std(0) / len(prior) ** 0.5).all()
    weights, rates = (found.groups["posterior"][name].values for name in ("weights", "rates"))
    assert (weights == weights[0]).all()
    posterior = found.groups["posterior_predictive"]["u"].values
    expected = 1.5 * found.groups["variational"]["z_posterior"].values @ rates[0]
    assert (np.abs(posterior.mean(0) - expected) < STANDARD_ERRORS * posterior.std(0) / len(posterior) ** 0.5).all()


def test_draws_from_the_prior_are_not_mixed_up_with_each_other() -> None:
    found = mixture_gathered()
    rates, z, weights = (found.groups["prior"][name].values for name in ("rates", "z", "weights"))
    assert rates.shape == (1000, 2) and z.shape == (1000, 4) and weights.shape == (1000, 2)
    emitted = found.groups["prior_predictive"]["u"].values
    own = 1.5 * np.take_along_axis(rates, z, 1)
    surplus = (emitted - own) / np.sqrt(own)
    assert abs(surplus.mean()) < STANDARD_ERRORS / surplus.size**0.5
    assert abs(surplus.var() - 1) < 0.2


@pytest.mark.parametrize("name", ["mixture", "chain", "nested", "markov_chain", "counted_loop"])
def test_one_run_for_all_draws_simulates_what_a_run_for_each_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = PROGRAMS[name]
    _, wide = gathered(program, empty, 200, prior=True, posterior_predictive=True)
    monkeypatch.setattr("pyro_vfe.reporting.simulation.takes_draws_side_by_side", lambda *args: False)
    _, single = gathered(program, empty, 200, prior=True, posterior_predictive=True)
    for group in ("prior", "prior_predictive", "posterior_predictive"):
        assert wide.groups[group].keys() == single.groups[group].keys()
        for site, one in wide.groups[group].items():
            other = single.groups[group][site]
            assert (one.dims, one.shape, one.dtype) == (other.dims, other.shape, other.dtype)
            variances = [np.nanvar(own.values, 0) / np.isfinite(own.values).sum(0) for own in (one, other)]
            distance = np.abs(np.nanmean(one.values, 0) - np.nanmean(other.values, 0))
            assert (distance < STANDARD_ERRORS * np.sqrt(sum(variances)) + 1e-12).all()


def test_gaps_in_the_data_stay_gaps() -> None:
    def model(u: Tensor, seen: Tensor) -> None:
        with pyro.plate("data", len(u)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
            with poutine.mask(mask=seen):
                pyro.sample("u", dist.Poisson(torch.tensor([1.0, 5.0])[z]), obs=u)

    u = torch.tensor([2.0, torch.nan, 4.0])
    found = Gatherer(model, empty, (u, ~u.isnan()), {}, 50).gather(True, True, None)
    np.testing.assert_array_equal(found.groups["observed_data"]["u"].values, u.numpy())
    assert np.isfinite(found.groups["posterior_predictive"]["u"].values).all()
    close(found.groups["log_likelihood"]["u"].values[:, 1], 0.0)
    assert found.groups["constant_data"].keys() == {"seen"}
    assert found.groups["constant_data"]["seen"].dtype == np.int64


@pytest.mark.parametrize("name", ["subsampled", "scaled_per_datum"])
def test_weighted_data_are_refused(name: str) -> None:
    with pytest.raises(StructureError, match=r"Plate 'data'|Latent 'z'"):
        gathered(PROGRAMS[name], empty)


def test_a_continuous_latent_needs_a_guide() -> None:
    with pytest.raises(MissingGuideSiteError, match="'weights'"):
        vfe.to_datatree(mixture, None, COUNTS)


def test_a_reparametrised_site_is_no_datum() -> None:
    data = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)

    def model() -> None:
        mean = pyro.sample("mean", dist.Normal(torch.zeros((), dtype=torch.float64), 2.0))
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.4, dtype=torch.float64)))
            pyro.sample("x", dist.Normal(mean * z, 1.0), obs=data)

    centred = poutine.reparam(model, {"mean": LocScaleReparam(0.0)})
    guide = AutoDelta(poutine.block(centred, expose=["mean_decentered"]))
    gatherer = Gatherer(centred, guide, (), {}, 4)
    found = gatherer.gather(prior=True, posterior_predictive=True, history=None)
    for group in ("log_likelihood", "observed_data", "posterior_predictive", "prior_predictive"):
        assert list(found.groups[group]) == ["x"], group
    mean = 2.0 * found.groups["posterior"]["mean_decentered"].values[0]
    z_off, z_on = dist.Normal(0.0, 1.0).log_prob(data).exp(), dist.Normal(float(mean), 1.0).log_prob(data).exp()
    close(found.groups["log_likelihood"]["x"].values[0], (0.6 * z_off + 0.4 * z_on).log())
    assert found.attrs["num_data"] == 3


@pytest.mark.parametrize("scaled", ["model", "guide"])
def test_a_weighted_sampled_latent_is_refused(scaled: str) -> None:
    def model() -> None:
        with poutine.scale(scale=0.2 if scaled == "model" else 1.0):
            mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=torch.zeros(3))

    def guide() -> None:
        with poutine.scale(scale=0.2 if scaled == "guide" else 1.0):
            pyro.sample("mean", dist.Normal(0.3, 1.0))

    with pytest.raises(StructureError, match="'mean' carries a weight"):
        Gatherer(model, guide, (), {}, 4).gather(prior=False, posterior_predictive=False, history=None)
