"""E-phases against the full joint table: Q's weights in every table of the model, F, and what a temperature does."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from checks import DIFFERENTIABLE, assert_equal
from joint_table import Element, Row, ScoredSite
from oracles import Oracle, gradients, log_sum_exp, matches, oracle, scales_of
from programs import INFINITE, PROGRAMS, UNSPLIT, Program
from programs.case import categorical, empty, positive, simplex, tensor
from programs.plates import COUNTS, global_over_local, guide_of_both, halved
from pyro.infer.autoguide import AutoDelta
from torch import Tensor

import pyro_vfe as vfe
from pyro_vfe.energy.parts import normalized
from pyro_vfe.engine.factors import Factor
from pyro_vfe.engine.structure import previous
from pyro_vfe.errors import CostError, ImpossibleDataError, NotFiniteError, VFEError
from pyro_vfe.learning.belief import Belief, Weights, expected_log_joint
from pyro_vfe.learning.e_phases import Annealed, Exact, Hard, MonteCarlo
from pyro_vfe.learning.guided import guided_belief
from pyro_vfe.program.enumeration import Enumeration, SiteKey
from pyro_vfe.program.programs import Programs

WHOLE = [name for name, program in PROGRAMS.items() if program.expected is None]
"""The programs whose joint table can be written out."""

PRECISION = 1e-9

DECOMPOSED = (
    *(name for name in PROGRAMS if name not in WHOLE and name not in UNSPLIT),
    *("mixture_guided", "global_guided", "local_guided", "crossing_one_edge_guided", "missing_labels_guided"),
    *("scaled_global_and_local_guided", "chain_on_chain_with_mean_field"),
)

DRAWN = (
    *("chain", "nested", "global_over_local", "crossing", "scaled_under_global", "subsampled", "markov_chain"),
    *("missing_labels", "branch_over_a_plate", "bits"),
)

TEMPERED = (
    *("mixture", "chain", "tree", "nested", "global_over_local", "crossing", "sequential_under_global", "bits"),
    *("subsampled", "scaled_per_datum", "scaled_under_global", "markov_chain"),
    *("masked_latents", "missing_labels", "factors", "mixed", "left_right_chain", "zeros_in_logits"),
    *("branch_over_a_plate", "global_and_local_guided", "chain_on_chain_with_guide"),
)


def enumeration_of(program: Program, *, differentiable: bool = False) -> Enumeration:
    programs = Programs(check=False)
    with torch.set_grad_enabled(differentiable):
        run = programs.enumerate(program.model, program.guide, program.args, program.kwargs)
    return normalized(run, torch.float64)


@cache
def run_of(name: str) -> Enumeration:
    """The enumeration of a program; its parameters start at the same values each time."""
    return enumeration_of(PROGRAMS[name])


@cache
def brute_force(name: str) -> tuple[Oracle, dict[str, Tensor]]:
    """The full joint tables of a program, and the gradients of the surprise."""
    program = PROGRAMS[name]
    table = oracle(program.model, program.guide, *program.args, scaled_plate=program.scaled_plate, **program.kwargs)
    return table, table.gradients("surprise")


def oracle_of(name: str) -> Oracle:
    return brute_force(name)[0]


@cache
def joint_of(name: str) -> "JointTable":
    return JointTable(oracle_of(name).model, run_of(name))


@dataclass(frozen=True, eq=False)
class JointTable:
    """What the rows of a model's full joint table say of the tables of its enumeration."""

    rows: Sequence[Row]
    enumeration: Enumeration

    @cached_property
    def entries(self) -> dict[SiteKey, list[tuple[int, Tensor, float]]]:
        """For each element of a site: which of its factor's tables it reads, where (for each row), with what scale."""
        found = {}
        for key in self.keys:
            factor, site = self.enumeration.factors[key], self._site(key[1])
            scale = site.scale.expand(site.log_prob.shape).reshape(-1).tolist()
            found[key] = [self._entry(factor, site, flat, scale[flat]) for flat in range(site.log_prob.numel())]
        return found

    @cached_property
    def values(self) -> dict[Element, Tensor]:
        """The value of every latent element in each row; the first where a row lacks it, int64 `(rows,)`."""
        elements = {element for row in self.rows for element in row.assignment}
        return {e: torch.tensor([row.assignment.get(e, 0) for row in self.rows]) for e in elements}

    def counts(self, key: SiteKey) -> tuple[Tensor, ...]:
        """How often each row meets each entry of a factor's tables, times the scale, shape `(rows, *table)`."""
        tables = self.enumeration.factors[key].tables
        found = [torch.zeros(len(self.rows), table.values.numel()) for table in tables]
        for which, index, scale in self.entries[key]:
            found[which][torch.arange(len(self.rows)), index] += scale
        return tuple(count.reshape(-1, *table.values.shape) for count, table in zip(found, tables, strict=True))

    def weights(self, probs: Tensor) -> Weights:
        """The rows' mean of the counts."""
        result = {}
        for key in self.keys:
            tables = self.enumeration.factors[key].tables
            found = [torch.zeros(table.values.numel()) for table in tables]
            for which, index, scale in self.entries[key]:
                found[which].index_put_((index,), probs * scale, accumulate=True)
            result[key] = tuple(w.reshape(t.values.shape) for w, t in zip(found, tables, strict=True))
        return result

    @property
    def keys(self) -> list[SiteKey]:
        return [key for key in self.enumeration.factors if key[0] == "model"]

    def _site(self, name: str) -> ScoredSite:
        return next(row.sites[name] for row in self.rows if name in row.sites)

    def _entry(self, factor: Factor, site: ScoredSite, flat: int, scale: float) -> tuple[int, Tensor, float]:
        place = _place(site, flat)
        time = next((v.chain for n, v in self.enumeration.variables.items() if previous(n) in factor.axes), None)
        is_first = time is not None and place[time] == 0
        table = factor.tables[1 if is_first else 0]
        index = torch.zeros(len(self.rows), dtype=torch.int64)
        for axis, size in table.sizes.items():
            index = index * size + self._position(axis, place, time)
        return int(is_first), index, scale

    def _position(self, axis: str, place: dict[str, int], time: str | None) -> Tensor:
        """Where each row is along an axis: for a plate at the element, for a latent at its value."""
        if axis in self.enumeration.plates:
            return torch.full((len(self.rows),), place[axis] - (axis == time))
        for name in self.enumeration.variables:
            if axis in (name, previous(name)):
                at = place if axis == name else {**place, time or "": place[time or ""] - 1}
                return self.values.get(
                    (name, _flat(self._site(name), at)), torch.zeros(len(self.rows), dtype=torch.int64)
                )
        raise KeyError(axis)


def _place(site: ScoredSite, flat: int) -> dict[str, int]:
    """The plate elements of one element of a site's batch."""
    indices = torch.unravel_index(torch.tensor(flat), site.log_prob.shape) if site.log_prob.dim() else ()
    return {plate: int(indices[dim]) for plate, dim in site.plate_dims.items()}


def _flat(site: ScoredSite, place: dict[str, int]) -> int:
    shape = site.log_prob.shape
    index = [0] * len(shape)
    for plate, dim in site.plate_dims.items():
        index[dim] = place[plate]
    return int(torch.arange(site.log_prob.numel()).reshape(shape)[tuple(index)])


def responsibilities(rows: Sequence[Row], scaled_plate: str | None, beta: float = 1.0) -> tuple[Tensor, Tensor]:
    """Q of each row, shape `(rows,)`, and log Z, where Q is P(v, u)^beta normalised; weights count outside of sums."""
    if scaled_plate is None:
        logs = torch.stack([beta * row.log_mass().detach() for row in rows])
        return (logs - logs.logsumexp(0)).exp(), logs.logsumexp(0)
    scales = scales_of(rows, scaled_plate)
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for n, row in enumerate(rows):
        groups[frozenset(row.outside(scaled_plate).assignment.items())].append(n)
    within = torch.zeros(len(rows))
    log_groups = []
    for members in groups.values():
        log_group = beta * rows[members[0]].outside(scaled_plate).log_mass().detach()
        for index, scale in enumerate(scales):
            inside = [rows[n].inside(scaled_plate, index) for n in members]
            by_value = {frozenset(i.assignment.items()): beta * i.log_mass().detach() for i in inside}
            log_sum = log_sum_exp(by_value.values())
            log_group = log_group + scale * log_sum
            within[members] += torch.stack([by_value[frozenset(i.assignment.items())] for i in inside]) - log_sum
        log_groups.append(log_group)
    log_z = log_sum_exp(log_groups)
    for members, log_group in zip(groups.values(), log_groups, strict=True):
        within[members] += log_group - log_z
    return within.exp(), log_z


def under_the_guide(guide: Sequence[Row], model: Sequence[Row], scaled_plate: str | None) -> Tensor:
    """Q(v) of the guide times P of what only the model has given v, for each row of the model, shape `(rows,)`."""
    position = {id(row): n for n, row in enumerate(model)}
    probs = torch.zeros(len(model))
    for guide_rows, model_rows in matches(guide, model):
        q = log_sum_exp(row.log_mass() for row in guide_rows).exp().detach()
        if q > 0:
            within, _ = responsibilities(model_rows, scaled_plate)
            probs[[position[id(row)] for row in model_rows]] += q * within
    return probs


def log_values(rows: Sequence[Row]) -> Tensor:
    """log P(v, u) of each row with the weights of its terms, shape `(rows,)`."""
    return torch.stack([sum((s.scale * s.log_prob).sum().detach() for s in row.sites.values()) for row in rows])


def mean_log_joint(rows: Sequence[Row], probs: Tensor) -> Tensor:
    return torch.where(probs > 0, probs * log_values(rows), 0.0).sum()


def assert_weights(actual: Weights, expected: Weights) -> None:
    assert actual.keys() == expected.keys()
    for key, tables in expected.items():
        for found, wanted in zip(actual[key], tables, strict=True):
            torch.testing.assert_close(found, wanted, rtol=PRECISION, atol=PRECISION, msg=lambda m, k=key: f"{k}: {m}")


def free_energy_of(belief: Belief, enumeration: Enumeration) -> Tensor:
    """F as an M-phase sees it."""
    return belief.expected_log_q - expected_log_joint(belief.weights, enumeration)


@pytest.mark.parametrize("name", WHOLE)
def test_the_exact_weights_are_the_posterior_of_the_full_joint_table(name: str) -> None:
    table, enumeration = oracle_of(name), run_of(name)
    belief = Exact().belief(enumeration, 0)
    probs, log_z = responsibilities(table.model, table.scaled_plate)
    assert_weights(belief.weights, joint_of(name).weights(probs))
    assert_equal(belief.surprise, -log_z, PRECISION)
    assert_equal(belief.free_energy, -log_z, PRECISION)
    assert_equal(free_energy_of(belief, enumeration), -log_z, PRECISION)
    assert_equal(expected_log_joint(belief.weights, enumeration), mean_log_joint(table.model, probs), PRECISION)


@pytest.mark.parametrize("name", [name for name in DIFFERENTIABLE if name in WHOLE])
def test_the_slope_of_the_surprise_is_that_of_the_expected_energy(name: str) -> None:
    """Fisher's identity: with Q held at the posterior, E_Q[-log P] has the gradient of -log p(u)."""
    _, expected = brute_force(name)
    pyro.clear_param_store()
    enumeration = enumeration_of(PROGRAMS[name], differentiable=True)
    belief = Exact().belief(enumeration, 0)
    found = gradients(-expected_log_joint(belief.weights, enumeration))
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert_equal(found[parameter], gradient, 1e-8)


@pytest.mark.parametrize("name", WHOLE)
def test_the_weights_of_a_guide_are_those_of_its_full_table(name: str) -> None:
    table, enumeration = oracle_of(name), run_of(name)
    belief = guided_belief(enumeration)
    probs = under_the_guide(table.guide, table.model, table.scaled_plate)
    assert_weights(belief.weights, joint_of(name).weights(probs))
    assert_equal(expected_log_joint(belief.weights, enumeration), mean_log_joint(table.model, probs), PRECISION)
    assert_equal(belief.free_energy, table.terms["free_energy"], PRECISION)
    assert_equal(belief.surprise, table.terms["surprise"], PRECISION)


@pytest.mark.parametrize("name", DECOMPOSED)
def test_a_guide_has_the_free_energy_of_its_decomposition(name: str) -> None:
    program, enumeration = PROGRAMS[name], run_of(name)
    belief = guided_belief(enumeration)
    terms = vfe.FreeEnergy().decompose(program.model, program.guide, *program.args, **program.kwargs)
    assert_equal(belief.free_energy, terms.free_energy, PRECISION)
    assert_equal(belief.surprise, terms.surprise, PRECISION)
    assert_equal(free_energy_of(belief, enumeration), terms.free_energy, PRECISION)


@pytest.mark.parametrize("name", [name for name, program in PROGRAMS.items() if program.guide is empty])
def test_without_a_guide_what_the_guide_believes_is_the_exact_posterior(name: str) -> None:
    enumeration = run_of(name)
    guided, exact = guided_belief(enumeration), Exact().belief(enumeration, 0)
    assert_weights(guided.weights, exact.weights)
    assert_equal(guided.expected_log_q, exact.expected_log_q, 1e-8, scale=exact.surprise)


def test_a_scale_around_the_programs_is_in_the_weights() -> None:
    whole = enumeration_of(Program(global_over_local, guide_of_both, (COUNTS,)))
    half = enumeration_of(Program(halved(global_over_local), halved(guide_of_both), (COUNTS,)))
    for belief in (Exact().belief, Hard().belief, lambda enumeration, _: guided_belief(enumeration)):
        full, part = belief(whole, 0), belief(half, 0)
        assert_weights(part.weights, {key: tuple(w / 2 for w in own) for key, own in full.weights.items()})
        assert_equal(part.free_energy, full.free_energy / 2, PRECISION)


@pytest.mark.parametrize("name", WHOLE)
def test_the_hard_weights_are_a_best_row_of_the_full_joint_table(name: str) -> None:
    table, enumeration = oracle_of(name), run_of(name)
    belief = Hard().belief(enumeration, 0)
    values = log_values(table.model)
    assert_equal(belief.free_energy, -values.max(), PRECISION)
    assert_equal(free_energy_of(belief, enumeration), -values.max(), PRECISION)
    assert_equal(belief.surprise, table.terms["surprise"], PRECISION)
    near = [n for n in range(len(values)) if values[n] > values.max() - 1e-9]
    joint = joint_of(name)
    counts = {key: joint.counts(key) for key in joint.keys}
    assert any(
        all(torch.equal(w, c[n]) for key, own in belief.weights.items() for w, c in zip(own, counts[key], strict=True))
        for n in near
    )


@pytest.mark.parametrize("beta", [0.1, 0.6, 1.0])
@pytest.mark.parametrize("name", TEMPERED)
def test_the_annealed_weights_are_those_of_the_tempered_joint_table(name: str, beta: float) -> None:
    table, enumeration = oracle_of(name), run_of(name)
    belief = Annealed([beta]).belief(enumeration, 7)
    probs, log_z = responsibilities(table.model, table.scaled_plate, beta)
    assert_weights(belief.weights, joint_of(name).weights(probs))
    energy = -mean_log_joint(table.model, probs)
    assert_equal(belief.free_energy, (1 - beta) * energy - log_z, PRECISION)
    assert_equal(free_energy_of(belief, enumeration), belief.free_energy, PRECISION)
    assert_equal(belief.surprise, table.terms["surprise"], PRECISION)
    if table.scaled_plate is None:
        assert_equal(belief.expected_log_q, torch.xlogy(probs, probs).sum(), PRECISION, scale=energy)
        gap = torch.special.xlogy(probs, probs / responsibilities(table.model, None)[0]).nan_to_num(0.0).sum()
        assert_equal(belief.free_energy - belief.surprise, gap, PRECISION, scale=energy)


def test_a_schedule_keeps_its_last_inverse_temperature() -> None:
    listed = Annealed((0.2, 0.5, 1.0))
    assert [listed.inverse_temperature(n) for n in range(5)] == [0.2, 0.5, 1.0, 1.0, 1.0]
    computed = Annealed(lambda iteration: min(1.0, 0.25 * (iteration + 1)))
    assert [computed.inverse_temperature(n) for n in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_annealing_at_inverse_temperature_one_is_the_exact_phase() -> None:
    enumeration = enumeration_of(PROGRAMS["global_over_local"])
    annealed, exact = (phase.belief(enumeration, 3) for phase in (Annealed([0.5, 1.0]), Exact()))
    assert_weights(annealed.weights, exact.weights)
    assert torch.equal(annealed.free_energy, exact.surprise)


@pytest.mark.parametrize("schedule", [[], [0.5, 0.0], [1.5], (-0.1,), [float("nan")]])
def test_a_schedule_of_other_numbers_is_refused(schedule: Sequence[float]) -> None:
    with pytest.raises(VFEError, match="schedule"):
        Annealed(schedule)


def test_a_schedule_that_computes_other_numbers_is_refused() -> None:
    with pytest.raises(VFEError, match="inverse temperature 2 for iteration 2"):
        Annealed(lambda iteration: float(iteration)).inverse_temperature(2)


@pytest.mark.parametrize("name", DRAWN)
def test_the_drawn_weights_are_an_unbiased_estimate_of_the_exact_ones(name: str) -> None:
    table, enumeration = oracle_of(name), run_of(name)
    num_samples = 4000
    belief, exact = (phase.belief(enumeration, 0) for phase in (MonteCarlo(num_samples), Exact()))
    assert_weights(belief.weights, exact.weights)
    assert_equal(belief.free_energy, exact.surprise, PRECISION)
    assert belief.sampled is not None
    probs, _ = responsibilities(table.model, table.scaled_plate)
    joint = joint_of(name)
    for key in joint.keys:
        for found, counts in zip(belief.sampled[key], joint.counts(key), strict=True):
            mean = torch.tensordot(probs, counts, 1)
            stderr = (torch.tensordot(probs, (counts - mean) ** 2, 1) / num_samples).sqrt()
            assert ((found - mean).abs() <= 5 * stderr + PRECISION).all(), key


@pytest.mark.parametrize("name", ["mixture", "global_guided"])
def test_what_is_believed_is_in_double_precision_whatever_the_default(name: str) -> None:
    enumeration = run_of(name)
    torch.set_default_dtype(torch.float32)
    phases = (Exact(), Hard(), MonteCarlo(2), Annealed([0.5]))
    for belief in (*(phase.belief(enumeration, 0) for phase in phases), guided_belief(enumeration)):
        scalars = (belief.expected_log_q, belief.surprise, belief.free_energy)
        weights = [w for held in (belief.weights, belief.sampled or {}) for own in held.values() for w in own]
        assert {value.dtype for value in (*scalars, *weights)} == {torch.float64}
        assert not any(value.requires_grad for value in (*scalars, *weights))


def test_draws_come_from_the_global_generator() -> None:
    enumeration = enumeration_of(PROGRAMS["mixture"])
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(MonteCarlo(1).belief(enumeration, 0).sampled)
    first, again, other = found
    assert_weights(again, first)
    assert not all(torch.equal(a, b) for key in first for a, b in zip(first[key], other[key], strict=True))


def test_no_draws_are_refused() -> None:
    with pytest.raises(VFEError, match="num_samples=0"):
        MonteCarlo(0)


def test_point_estimates_of_a_guide_bring_their_prior() -> None:
    """With AutoDelta the surprise is -log p(u, w) at the estimates: what MAP minimises."""

    def model(counts: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(tensor([2.0, 3.0])))
        with pyro.plate("components", 2):
            rates = pyro.sample("rates", dist.Gamma(2.0, 0.5))
        with pyro.plate("data", len(counts)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("u", dist.Poisson(rates[z]), obs=counts)

    guide = AutoDelta(pyro.poutine.block(model, hide=["z"]))
    guide(COUNTS)
    enumeration = enumeration_of(Program(model, guide, (COUNTS,)))
    estimates = {name: value.detach() for name, value in guide.median().items()}
    table = oracle(pyro.poutine.condition(model, data=estimates), empty, COUNTS)
    probs, log_z = responsibilities(table.model, None)
    expected = JointTable(table.model, enumeration).weights(probs)
    for belief in (Exact().belief(enumeration, 0), guided_belief(enumeration), Annealed([1.0]).belief(enumeration, 0)):
        assert_weights(belief.weights, expected)
        assert_equal(belief.surprise, -log_z, PRECISION)
        assert_equal(belief.free_energy, -log_z, PRECISION)
        assert_equal(free_energy_of(belief, enumeration), -log_z, PRECISION)
    hard = Hard().belief(enumeration, 0)
    assert_equal(hard.free_energy, -log_values(table.model).max(), PRECISION)


def test_the_point_estimate_of_a_latent_has_the_free_energy_of_the_model_given_it() -> None:
    program = PROGRAMS["point_estimate_of_w"]
    assert program.expected is not None
    expected = program.expected()["free_energy"]
    enumeration = enumeration_of(program)
    for belief in (Exact().belief(enumeration, 0), guided_belief(enumeration)):
        assert_equal(belief.free_energy, expected, PRECISION)


@pytest.mark.parametrize("phase", [Exact(), Hard(), MonteCarlo(2), Annealed([0.5]), None])
def test_impossible_data_are_an_error_that_names_the_site(phase: Any) -> None:
    def model() -> None:
        z = categorical("z", tensor([0.5, 0.5]))
        pyro.sample("u", dist.Bernoulli(tensor([0.0, 0.0])[z]), obs=tensor(1.0))

    enumeration = enumeration_of(Program(model))
    with pytest.raises(ImpossibleDataError, match=r"The data have probability zero under the model.*'u'"):
        guided_belief(enumeration) if phase is None else phase.belief(enumeration, 0)


def test_a_guide_with_mass_on_the_impossible_is_an_error_that_names_the_site() -> None:
    program = INFINITE["mass_on_the_impossible"]
    with pytest.raises(NotFiniteError, match="positive probability"):
        guided_belief(enumeration_of(program))


def test_a_guide_of_a_model_too_large_to_sum_has_a_free_energy_and_no_surprise() -> None:
    enumeration = enumeration_of(PROGRAMS["ising_10_by_10_mean_field"])
    limit = 4096.0
    with pytest.raises(CostError):
        Exact().belief(enumeration, 0, limit)
    belief, unlimited = guided_belief(enumeration, limit), guided_belief(enumeration)
    assert belief.surprise.isnan()
    assert_equal(belief.free_energy, unlimited.free_energy, PRECISION)
    assert_weights(belief.weights, unlimited.weights)


def em_for_one_parameter(belief_of: Callable[[Enumeration], Belief], num_steps: int) -> list[Tensor]:
    """F after every E-phase of a mixture of Poissons whose M-phase is written out by hand."""

    def model(counts: Tensor) -> None:
        weights, rates = simplex("weights", 3), positive("rates", 3, seed=1)
        with pyro.plate("data", len(counts)):
            z = categorical("z", weights)
            pyro.sample("u", dist.Poisson(rates[z]), obs=counts)

    counts = tensor([1.0, 4.0, 2.0, 7.0, 0.0, 9.0, 12.0])
    path = []
    for _ in range(num_steps):
        belief = belief_of(enumeration_of(Program(model, args=(counts,))))
        path.append(belief.free_energy)
        held = belief.sampled or belief.weights
        q = held["model", "u"][0]
        share = held["model", "z"][0] / len(counts)
        store = pyro.get_param_store()
        # A little is kept of each component, so that none is lost for good.
        store["weights"] = (share + 1e-12) / (share + 1e-12).sum()
        store["rates"] = (q @ counts + 1e-9) / (q.sum(-1) + 1e-9)
    return path


@pytest.mark.parametrize("phase", [Exact(), Hard()])
def test_monotone_phases_never_raise_the_free_energy(phase: Exact | Hard) -> None:
    assert phase.monotone
    path = torch.stack(em_for_one_parameter(lambda enumeration: phase.belief(enumeration, 0), 12))
    assert (path.diff() <= 1e-7).all()
    assert path[-1] < path[0] - 0.1


def test_draws_may_raise_the_free_energy_and_do_not_claim_otherwise() -> None:
    phase = MonteCarlo(1)
    path = torch.stack(em_for_one_parameter(lambda enumeration: phase.belief(enumeration, 0), 12))
    assert not phase.monotone
    assert not Annealed([1.0]).monotone
    assert (path.diff() > 0).any()
