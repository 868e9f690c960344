"""The exact posterior and what draws from it, against the full joint table."""

from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import combinations
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import Oracle, oracle
from oracles import Posterior as Table
from programs import PROGRAMS, Program
from programs.case import bernoulli, categorical, empty, noise, simplex, tensor, unit
from programs.plates import COUNTS, global_over_local, halved, mixture, scaled
from torch import Tensor

import pyro_vfe as vfe
from pyro_vfe.errors import CostError, ImpossibleDataError, MissingGuideSiteError, VFEError, VFEWarning

WHOLE = (
    *("chain", "tree", "collider", "mixture", "nested", "global_over_local", "crossing", "sequential_under_global"),
    *("masked_latents", "missing_labels", "factors", "mixed", "bits", "left_right_chain", "alarm"),
    *("zeros_in_logits", "impossible_binomial", "branch_over_a_plate", "pyro_module"),
)
MARGINALS = [(name, sites) for name in WHOLE for sites in PROGRAMS[name].marginals]
DRAWN = ("chain", "global_over_local", "crossing", "mixed", "bits", "left_right_chain", "branch_over_a_plate")


def posterior_of(program: Program, **options: Any) -> vfe.Posterior:
    return vfe.posterior(program.model, *program.args, **program.kwargs, **options)


@cache
def table_of(name: str) -> Table:
    program = PROGRAMS[name]
    return oracle(program.model, empty, *program.args, **program.kwargs).posterior


def equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.reshape(expected.shape), expected.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", WHOLE)
def test_evidence_mode_and_entropy_equal_those_of_the_full_joint_table(name: str) -> None:
    posterior, expected = posterior_of(PROGRAMS[name]), table_of(name)
    equal(posterior.log_evidence, expected.log_evidence)
    equal(posterior.entropy(), expected.entropy())
    mode = posterior.mode()
    equal(expected.log_prob(mode), expected.probs.max().log())
    equal(posterior.log_prob(mode), expected.probs.max().log())


@pytest.mark.parametrize("name", WHOLE)
def test_log_prob_equals_that_of_the_full_joint_table_for_every_assignment(name: str) -> None:
    posterior, expected = posterior_of(PROGRAMS[name]), table_of(name)
    for row, prob in list(zip(expected.rows, expected.probs, strict=True))[:: 1 + len(expected.rows) // 12]:
        equal(posterior.log_prob(row.values), prob.log())


@pytest.mark.parametrize(("name", "sites"), MARGINALS)
def test_marginals_are_ordered_as_asked_for(name: str, sites: tuple[str, ...]) -> None:
    posterior, expected = posterior_of(PROGRAMS[name]), table_of(name)
    equal(posterior.marginal(*sites), expected.marginal(*sites))
    backwards = tuple(reversed(sites))
    equal(posterior.marginal(*backwards), expected.marginal(*backwards))
    assert posterior.marginal(*sites).dtype == torch.float64


@pytest.mark.parametrize("name", ["chain", "nested", "global_over_local", "mixed", "left_right_chain", "alarm"])
def test_all_marginals_at_once_equal_those_one_by_one(name: str) -> None:
    posterior, expected = posterior_of(PROGRAMS[name]), table_of(name)
    found = posterior.marginals()
    assert tuple(found) == posterior.sites
    for site, probs in found.items():
        equal(probs, expected.marginal(site))


@pytest.mark.parametrize("name", DRAWN)
def test_samples_have_the_probabilities_of_the_full_joint_table(name: str) -> None:
    """Of each latent element and each pair: 5 standard deviations of a count, plus one for rare values."""
    expected, count = table_of(name), 4000
    draws = posterior_of(PROGRAMS[name]).sample(count)
    shapes = {site: value.shape for site, value in expected.rows[0].values.items()}
    assert {site: value.shape[1:] for site, value in draws.items()} == shapes
    flat = {site: _flat(value, expected, site) for site, value in draws.items()}
    elements = [(site, n) for site, value in flat.items() for n in range(value.shape[1])]
    for pair in [*((one,) for one in elements), *combinations(elements, 2)]:
        found = Counter(zip(*(flat[site][:, n].tolist() for site, n in pair), strict=True))
        probs: dict[Any, float] = Counter()
        for row, prob in zip(expected.rows, expected.probs.tolist(), strict=True):
            probs[tuple(row.assignment.get(element, 0) for element in pair)] += prob
        assert set(found) <= {key for key, prob in probs.items() if prob > 0}
        for key, prob in probs.items():
            assert abs(found[key] - count * prob) < 5 * (count * prob * (1 - prob) + 1) ** 0.5, (pair, key)


def _flat(values: Tensor, expected: Table, site: str) -> Tensor:
    """Values as indices into the support, one column per element."""
    first = expected.rows[0].sites[site]
    support = _support_of(expected, site)
    rows = values.reshape(len(values), max(1, first.log_prob.numel()), 1, -1).to(support)
    return (rows == support.reshape(1, 1, len(support), -1)).all(-1).long().argmax(-1)


def _support_of(expected: Table, site: str) -> Tensor:
    """The value that each index of the table's assignments stands for."""
    values: dict[int, Tensor] = {}
    for row in expected.rows:
        if site in row.values:
            shape = row.sites[site].log_prob.shape
            flat = row.values[site].reshape(max(1, shape.numel()), -1)
            values.update(
                {row.assignment[site, n]: value for n, value in enumerate(flat) if (site, n) in row.assignment}
            )
    return torch.stack([values[index] for index in sorted(values)])


@pytest.mark.parametrize("name", ["chain", "crossing", "mixed", "bits", "masked_latents"])
def test_the_log_probability_of_samples_is_that_of_each_assignment(name: str) -> None:
    posterior = posterior_of(PROGRAMS[name])
    draws = posterior.sample(7)
    together = posterior.log_prob(draws)
    assert together.shape == (7,)
    for n in range(7):
        equal(together[n], table_of(name).log_prob({site: value[n] for site, value in draws.items()}))


def test_support_lists_the_values_in_the_order_of_the_marginals() -> None:
    posterior = posterior_of(PROGRAMS["mixed"])
    assert posterior.sites == ("a", "b", "c", "d")
    torch.testing.assert_close(posterior.support("a"), torch.eye(3))
    torch.testing.assert_close(posterior.support("b"), tensor([0.0, 1.0, 2.0]))
    torch.testing.assert_close(posterior.support("d"), tensor([1.0, 3.0, 7.0]))


def test_an_unknown_or_repeated_name_is_refused_with_the_names_there_are() -> None:
    posterior = posterior_of(PROGRAMS["chain"])
    for question in (posterior.marginal, posterior.support, posterior.marginal_table):
        with pytest.raises(VFEError, match=r"'weather' is no discrete latent.*'z_0', 'z_1'"):
            question("weather")
    with pytest.raises(VFEError):
        posterior.marginal("z_0", "z_0")


def test_an_assignment_that_is_none_is_refused() -> None:
    posterior = posterior_of(PROGRAMS["chain"])
    with pytest.raises(VFEError, match="lacks latent 'z_3'"):
        posterior.log_prob({f"z_{t}": torch.tensor(0) for t in range(3)})
    with pytest.raises(VFEError, match="'z_3' a value that is not in its support"):
        posterior.log_prob({f"z_{t}": torch.tensor(t) for t in range(4)})


def test_the_repr_says_evidence_and_latents() -> None:
    shown = repr(posterior_of(PROGRAMS["collider"]))
    assert f"{table_of('collider').log_evidence.item():.4f} nats" in shown
    assert "['a', 'b', 'c']" in shown


@pytest.mark.parametrize("model", [scaled, halved(mixture)], ids=["per_datum", "as_a_whole"])
def test_a_weighted_model_has_no_entropy_or_log_probability(model: Callable[..., Any]) -> None:
    posterior = vfe.posterior(model, COUNTS)
    mode = {"z": torch.zeros(4, dtype=torch.long)}
    for question in (posterior.entropy, lambda: posterior.log_prob(mode)):
        with pytest.raises(VFEError, match="weights"):
            question()
    with_weights = table_of("mixture").marginal("z") if model is not scaled else None
    assert with_weights is None or posterior.marginal("z").shape == with_weights.shape


def test_a_continuous_latent_is_refused_by_name() -> None:
    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        z = bernoulli("z", 0.3)
        pyro.sample("u", dist.Normal(w + z, 1.0), obs=tensor(0.4))

    with pytest.raises(MissingGuideSiteError, match="'w' is Normal"):
        vfe.posterior(model)


def test_impossible_data_and_too_large_tables_are_refused() -> None:
    def impossible() -> None:
        z = categorical("z", tensor([0.4, 0.6]))
        pyro.sample("u", dist.Categorical(tensor([[1.0, 0.0], [1.0, 0.0]])[z]), obs=torch.tensor(1))

    with pytest.raises(ImpossibleDataError, match="'u'"):
        vfe.posterior(impossible)
    with pytest.raises(CostError, match="limit"):
        posterior_of(PROGRAMS["collider"], max_bytes=100)


def test_the_check_can_be_turned_off() -> None:
    def model() -> None:
        z = categorical("z", tensor([0.4, 0.6]))
        pyro.sample("u", dist.Normal(0.0 if z.dim() else 1.0, 1.0), obs=tensor(0.3))

    with pytest.warns(VFEWarning, match="do not broadcast"):
        evidence = vfe.posterior(model).log_evidence
    torch.testing.assert_close(evidence, dist.Normal(tensor(1.0), 1.0).log_prob(tensor(0.3)))
    expected = dist.Normal(tensor(0.0), 1.0).log_prob(tensor(0.3))
    torch.testing.assert_close(vfe.posterior(model, check=False).log_evidence, expected)


GUIDED = (
    *("chain_guide_of_the_middle", "collider_guide_of_the_child", "nested_outer_guided", "global_guided"),
    *("crossing_edges_guided", "missing_labels_partly_guided", "factors_guided", "mixed_globals_guided"),
    *("alarm_or_summed_out", "two_branches_guided", "branch_in_model_guided_above", "deterministic_guided"),
    *("left_right_chain_guided", "masked_latents_guided", "branch_in_both", "chain_mean_field", "alarm_or_guided"),
)


@cache
def exact_of(name: str) -> Oracle:
    program = PROGRAMS[name]
    return oracle(program.model, program.guide, *program.args)


def responsibilities(exact: Oracle) -> dict[frozenset[Any], float]:
    """R(v) = Q(v_guide) P(v_model | v_guide, u), by assignment of the model's latents."""
    found: dict[frozenset[Any], float] = Counter()
    masses = [(row.assignment, row.log_mass().exp().item()) for row in exact.model]
    for guide_row in exact.guide:
        q = guide_row.log_mass().exp().item()
        chosen = guide_row.assignment.items()
        agreeing = [
            (held, mass) for held, mass in masses if all(held.get(key, value) == value for key, value in chosen)
        ]
        total = sum(mass for _, mass in agreeing)
        for held, mass in agreeing if q else ():
            found[frozenset(held.items())] += q * mass / total
    return found


@pytest.mark.parametrize("name", GUIDED)
def test_compute_marginals_averages_the_models_own_latents_over_the_guide(name: str) -> None:
    program, exact = PROGRAMS[name], exact_of(name)
    expected = responsibilities(exact)
    guided = {site for row in exact.guide for site, _ in row.assignment}
    found = vfe.FreeEnergy().compute_marginals(program.model, program.guide, *program.args)
    assert set(found) == {site for row in exact.model for site, _ in row.assignment} - guided
    for site, marginal in found.items():
        probs = marginal.log_prob(marginal.enumerate_support()).exp().movedim(0, -1)
        flat = probs.reshape(-1, probs.shape[-1])
        table = torch.zeros_like(flat)
        for assignment, prob in expected.items():
            held = dict(assignment)
            for n in range(len(flat)):
                if (site, n) in held:
                    table[n, held[site, n]] += prob
        torch.testing.assert_close(flat, table / table.sum(-1, keepdim=True), rtol=1e-9, atol=1e-10)


def returning(counts: Tensor) -> tuple[Tensor, Tensor]:
    g = categorical("g", simplex("g_probs", 3))
    with pyro.plate("data", 3):
        z = bernoulli("z", unit("z_probs", 3, seed=1)[g])
        pyro.sample("u", dist.Normal(2 * z + noise(3, seed=2)[g], 1.0), obs=counts)
    return g, z


def returning_guide(counts: Tensor) -> None:
    categorical("g", simplex("q_g", 3, seed=3))


@pytest.mark.parametrize("guide", [empty, returning_guide])
def test_sample_posterior_returns_what_the_model_returns_at_posterior_draws(guide: Callable[..., Any]) -> None:
    points, elbo, count = noise(3, seed=4), vfe.FreeEnergy(), 200
    expected = responsibilities(oracle(returning, guide, points))
    found: dict[frozenset[Any], int] = Counter()
    for _ in range(count):
        g, z = elbo.sample_posterior(returning, guide, points)
        assert (g.shape, z.shape) == ((), (3,))
        assert (g.dtype, z.dtype) == (torch.int64, torch.float64)
        values = {("g", 0): int(g), **{("z", n): int(value) for n, value in enumerate(z)}}
        found[frozenset(values.items())] += 1
    assert set(found) <= set(expected)
    for assignment, prob in expected.items():
        assert abs(found[assignment] - count * prob) < 5 * (count * prob * (1 - prob) + 1) ** 0.5


@pytest.mark.parametrize("name", GUIDED)
def test_sample_posterior_draws_only_what_the_guide_and_the_data_allow(name: str) -> None:
    program, exact = PROGRAMS[name], exact_of(name)
    recorded: list[dict[str, Any]] = []

    def model(*args: Any) -> None:
        with pyro.poutine.trace() as seen:
            program.model(*args)
        recorded.append({site: node["value"] for site, node in seen.trace.nodes.items() if node["type"] == "sample"})

    vfe.FreeEnergy().sample_posterior(model, program.guide, *program.args)
    drawn, expected = recorded[-1], responsibilities(exact)
    rows = [row for row in exact.model if all(torch.equal(v, drawn[site].to(v)) for site, v in row.values.items())]
    assert sum(expected[frozenset(row.assignment.items())] for row in rows) > 0


def test_marginals_and_samples_are_of_one_particle() -> None:
    for question in ("compute_marginals", "sample_posterior"):
        with pytest.raises(VFEError, match="num_particles=1"):
            getattr(vfe.FreeEnergy(num_particles=2), question)(global_over_local, empty, COUNTS)
