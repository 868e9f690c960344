"""The structured guide: which tables it holds, where they start, what they cost, and what it refuses."""

import io
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import TERMS, oracle
from programs import PROGRAMS
from programs.case import Program, bernoulli, categorical, noise, positive, simplex, tensor, unit
from programs.chains import collider
from programs.markov_chains import classes, transitions_by_step
from programs.plates import BATCH, COUNTS, SERIES, nested
from programs.supports import Dice, mixed
from pyro.infer import SVI, Predictive
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

import pyro_vfe as vfe
from pyro_vfe.errors import CostError, PlateError, StructureError, VFEError
from pyro_vfe.guides.conditionals import position
from pyro_vfe.guides.tables import Latent
from pyro_vfe.program.supports import finite_support

GRID = noise(2, 2, seed=11)
TABLE = tensor([[1.0, 4.0, 2.0], [3.0, 0.0, 6.0]])


def words(counts: Tensor) -> None:
    """Parents of every kind: a vector of bits, words of two letters, faces of a die, one-hot vectors."""
    bits = pyro.sample("bits", dist.Bernoulli(unit("bits_prob", 2)).to_event(1))
    die = pyro.sample("die", Dice(noise(4, 3, seed=1)[(2 * bits[..., 0] + bits[..., 1]).long()]))
    with pyro.plate("data", 2):
        word = pyro.sample("word", dist.Categorical(simplex("letters", 2, 2)).to_event(1))
        mean = die + word.to(counts).sum(-1) * bits.sum(-1)
        pyro.sample("u", dist.Normal(mean, 2.0), obs=counts[:2])


WORDS = Program(words, args=(COUNTS,))

HELD = {
    "chain": ({"z_0": (3,), "z_1": (3, 3), "z_2": (3, 3), "z_3": (3, 3)}, {}),
    "second_order_chain": ({f"z_{t}": (2,) * min(t + 1, 3) for t in range(6)}, {}),
    "collider": ({"a": (3,), "b": (2,), "c": (3, 2, 4)}, {}),
    "nested": ({"a": (2, 2), "b": (2, 2, 2, 2)}, {}),
    "global_over_local": ({"g": (3,), "z": (4, 3, 2)}, {}),
    "plate_at_dim_2": ({"a": (3, 1, 3), "b": (3, 1, 3, 2)}, {}),
    "mixed": ({"a": (3,), "b": (3, 3), "c": (2, 3, 2), "d": (2, 2, 3)}, {}),
    "markov_chain": ({"z": (3, 3, 3)}, {"z": (3,)}),
    "markov_chain_of_one_step": ({"z": (1, 3)}, {}),
    "markov_chains": ({"z": (2, 2, 2, 2)}, {"z": (2, 2)}),
    "markov_chains_by_class": ({"c": (2, 1, 2), "z": (2, 2, 2, 2, 2)}, {"z": (2, 2, 2)}),
    "markov_chain_with_transitions_by_step": ({"w": (4, 3), "z": (3, 3, 2, 2)}, {"z": (3, 2)}),
    "markov_chain_with_mixture_emissions": ({"z": (3, 2, 2), "w": (4, 2, 2)}, {"z": (2,)}),
    "branch_in_guide": ({"a": (2,), "b": (2, 3)}, {}),
    "sequential_around_vectorised": ({"a_0": (2,), "b_0": (2, 2, 2), "a_1": (2,), "b_1": (2, 2, 2)}, {}),
}
"""For each program the shapes of its tables, and of those of chains' first states."""

STEPPED = ("markov_chain_with_mixture_emissions", "markov_chain_with_transitions_by_step")
"""Programs whose joint table is small for few steps only."""

WITHOUT_GAP = (
    "chain",
    "second_order_chain",
    "tree",
    "120_children_of_one_root",
    "markov_chain",
    "markov_chain_with_changing_transitions",
    "left_to_right_markov_chain",
    "markov_chains",
    "markov_chains_with_missing_steps",
    "markov_chains_of_different_lengths",
    "markov_chains_by_class",
    "markov_chains_by_class_of_beginning_alone",
    "markov_chains_by_class_of_transition_alone",
    "markov_chain_with_mixture_emissions",
    "markov_chain_with_wide_emissions",
    "mixture",
    "plate_at_dim_2",
    "nested",
    "global_over_local",
    "sequential_under_global",
    "sequential_around_vectorised",
    "scaled_per_datum",
    "scaled_under_global",
    "masked_latents",
    "varying_lengths",
    "one_hot_chain",
    "left_right_chain",
    "zeros_in_logits",
    "impossible_binomial",
    "branch_in_model",
    "branch_in_guide",
    "two_branches",
    "branch_over_a_plate",
)
"""Programs whose posterior has the dependencies of the prior alone."""

WITH_GAP = (
    "collider",
    "alarm",
    "factorial_chain",
    "factorial_markov_chain",
    "chain_on_chain",
    "crossing",
    "factors",
    "markov_chain_with_transitions_by_step",
)
"""Programs where the data bring dependencies."""


def started(name: str, **options: Any) -> tuple[vfe.AutoStructured, Program]:
    program = PROGRAMS[name]
    return vfe.AutoStructured(program.model, **options), program


def terms_of(guide: Any, program: Program) -> vfe.Decomposition:
    return vfe.FreeEnergy().decompose(program.model, guide, *program.args, **program.kwargs)


def descend(guide: torch.nn.Module, program: Program, steps: int = 100) -> None:
    """Minimises F over the guide's parameters."""
    guide(*program.args)
    optimizer = torch.optim.LBFGS(
        guide.parameters(), max_iter=steps, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )
    elbo = vfe.FreeEnergy()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = elbo.differentiable_loss(program.model, guide, *program.args, **program.kwargs)
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize("name", HELD)
def test_it_holds_a_table_for_each_latent_given_what_its_prior_reads(name: str) -> None:
    guide, program = started(name)
    terms_of(guide, program)
    tables, initials = HELD[name]
    assert {site: tuple(logits.shape) for site, logits in guide.logits.named_parameters()} == tables
    assert {site: tuple(logits.shape) for site, logits in guide.initial_logits.named_parameters()} == initials
    for site, shape in tables.items():
        torch.testing.assert_close(guide.probabilities(site), torch.full(shape, 1 / shape[-1]))
    for site, shape in initials.items():
        torch.testing.assert_close(guide.initial_probabilities(site), torch.full(shape, 1 / shape[-1]))


@pytest.mark.parametrize(
    "name",
    [*(name for name in HELD if name not in ("second_order_chain", "nested")), "words"],
)
def test_every_term_equals_the_full_joint_table(name: str) -> None:
    program = WORDS if name == "words" else PROGRAMS[name]
    args = (COUNTS[:2],) if name in STEPPED else program.args
    guide = vfe.AutoStructured(program.model, init_scale=0.7)
    terms = vfe.FreeEnergy(check="always").decompose(program.model, guide, *args)
    expected = oracle(program.model, guide, *args)
    for term in TERMS:
        torch.testing.assert_close(getattr(terms, term), expected.terms[term].detach(), rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("name", WITHOUT_GAP)
def test_started_at_the_posterior_it_has_no_gap_on_chains_and_trees(name: str) -> None:
    terms = terms_of(*started(name, init="posterior"))
    assert terms.gap.item() == pytest.approx(0.0, abs=1e-10)
    assert terms.free_energy.item() == pytest.approx(terms.surprise.item(), rel=1e-10)


@pytest.mark.parametrize("name", WITH_GAP)
def test_dependencies_that_only_the_data_bring_are_a_gap(name: str) -> None:
    assert terms_of(*started(name, init="posterior")).gap > 1e-6


@pytest.mark.parametrize(
    ("name", "edges"),
    [
        ("collider", [("a", "b"), ("a", "c"), ("b", "c")]),
        ("alarm", [("burglar", "quake"), ("burglar", "rings"), ("quake", "rings")]),
        ("factors", [("a", "b"), ("b", "c")]),
    ],
)
def test_naming_the_missing_edge_closes_the_gap(name: str, edges: list[tuple[str, str]]) -> None:
    terms = terms_of(*started(name, edges=edges, init="posterior"))
    assert terms.gap.item() == pytest.approx(0.0, abs=1e-10)


def test_edges_may_run_against_the_models() -> None:
    guide, program = started("chain", edges=[(f"z_{t + 1}", f"z_{t}") for t in range(3)], init="posterior")
    assert terms_of(guide, program).gap.item() == pytest.approx(0.0, abs=1e-10)
    assert guide.latents == ("z_3", "z_2", "z_1", "z_0")
    assert guide.parents("z_0") == ("z_1",)
    assert guide.logits.z_0.shape == (3, 3)


def test_started_at_the_posterior_it_holds_the_exact_conditionals() -> None:
    guide, program = started("collider", init="posterior")
    terms_of(guide, program)
    joint = oracle(program.model, lambda: None).posterior.marginal("a", "b", "c")
    torch.testing.assert_close(guide.probabilities("b"), joint.sum((0, 2)), rtol=1e-10, atol=1e-12)
    expected = joint / joint.sum(-1, keepdim=True)
    torch.testing.assert_close(guide.probabilities("c"), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["collider", "tree", "global_over_local", "mixed"])
def test_without_edges_it_is_the_mean_field(name: str) -> None:
    guide, program = started(name, edges=[], init_scale=1.0)
    structured = terms_of(guide, program)
    mean_field = vfe.AutoMeanField(program.model)
    mean_field(*program.args)
    with torch.no_grad():
        for site, logits in mean_field.logits.named_parameters():
            logits.copy_(guide.logits.get_parameter(site))
    other = terms_of(mean_field, program)
    for term in TERMS:
        torch.testing.assert_close(getattr(structured, term), getattr(other, term), rtol=1e-12, atol=1e-12)


def test_without_edges_chains_stay_chains_and_are_independent() -> None:
    """Two chains under shared data: the best pair of free chains costs what the data tie."""
    guide, program = started("factorial_markov_chain", edges=[], init="posterior")
    before = terms_of(guide, program)
    assert guide.logits.a.shape[-3:] == (2, 2, 2)
    descend(guide, program)
    after = terms_of(guide, program)
    assert 1e-3 < after.gap < before.gap


@pytest.mark.parametrize(
    "name",
    ["chain", "tree", "markov_chain", "markov_chains_by_class", "global_over_local", "left_to_right_markov_chain"],
)
def test_descent_from_the_uniform_start_closes_the_gap(name: str) -> None:
    guide, program = started(name)
    before = terms_of(guide, program)
    descend(guide, program)
    after = terms_of(guide, program)
    assert before.gap > 0.1
    assert after.gap.item() == pytest.approx(0.0, abs=1e-8)
    torch.testing.assert_close(after.surprise, before.surprise, rtol=1e-12, atol=1e-12)


def test_SVI_trains_guide_and_model_together() -> None:
    guide, program = started("markov_chains_by_class")
    svi = SVI(program.model, guide, pyro.optim.Adam({"lr": 0.1}), loss=vfe.FreeEnergy())
    first = terms_of(guide, program)
    for _ in range(80):
        svi.step(*program.args)
    last = terms_of(guide, program)
    assert last.surprise < first.surprise
    assert last.gap < 0.05 * first.gap


def test_it_is_the_guide_of_a_Gradient_E_phase() -> None:
    guide, program = started("tree")
    before = terms_of(guide, program)
    em = vfe.EM(program.model, guide, e_phase=vfe.Gradient(pyro.optim.Adam({"lr": 0.3}), num_steps=60))
    em.e_phase(*program.args)
    after = terms_of(guide, program)
    assert after.gap < 0.02 < before.gap
    assert after.surprise == before.surprise


def test_what_the_model_rules_out_is_ruled_out_from_the_start() -> None:
    guide, program = started("left_to_right_markov_chain")
    assert terms_of(guide, program).free_energy.isfinite()
    rates = guide.probabilities("z")
    assert torch.equal(rates == 0, impossible_moves(program))


def impossible_moves(program: Program) -> Tensor:
    """Between which states of its one chain the exact posterior never moves, for each step; not where it never is."""
    exact = oracle(program.model, lambda *_: None, *program.args).posterior
    steps = len(program.args[0])
    joint = torch.zeros(steps - 1, 3, 3)
    for row, prob in zip(exact.rows, exact.probs, strict=True):
        for t in range(steps - 1):
            joint[t, row.assignment["z", t], row.assignment["z", t + 1]] += prob
    reached = joint.sum(-1, keepdim=True) > 0
    return (joint == 0) & reached


def test_a_table_that_starts_at_the_posterior_is_trained_past_its_zeros() -> None:
    guide, program = started("left_right_chain", init="posterior", init_scale=0.5)
    descend(guide, program)
    assert terms_of(guide, program).gap.item() == pytest.approx(0.0, abs=1e-8)
    assert all(not logits.isnan().any() for logits in guide.parameters())


SUPPORTS = {
    "Categorical": dist.Categorical(torch.ones(4)),
    "Bernoulli": dist.Bernoulli(tensor(0.3)),
    "Binomial": dist.Binomial(3, tensor(0.3)),
    "Dice": Dice(torch.zeros(3)),
    "one-hot": dist.OneHotCategorical(torch.ones(4)),
    "bits": dist.Bernoulli(tensor([0.3, 0.2, 0.1])).to_event(1),
    "matrices": dist.Bernoulli(torch.full((2, 2), 0.5)).to_event(2),
    "words": dist.Categorical(torch.ones(2, 3)).to_event(1),
    "one-hot words": dist.OneHotCategorical(torch.ones(2, 3)).to_event(1),
    "dice": Dice(torch.zeros(2, 3)).to_event(1),
    "one-hot words too long for a code": dist.OneHotCategorical(torch.ones(2, 40)).to_event(1),
}


@pytest.mark.parametrize("name", SUPPORTS)
def test_the_place_of_a_value_in_its_support_is_found(name: str) -> None:
    fn = SUPPORTS[name]
    support = finite_support(fn, "v")
    latent = Latent("v", type(fn).__name__, (), support)
    indices = torch.randint(len(support), (5, 1, 3))
    assert torch.equal(position(latent.family, support, support[indices]), indices)


@pytest.mark.parametrize(
    ("edges", "error", "words"),
    [
        ([("a", "z")], StructureError, r"\('a', 'z'\).*'z', which is no discrete latent.*'a', 'b', 'c'"),
        ([("a", "a")], StructureError, r"\('a', 'a'\).*to itself"),
        ([("a", "b"), ("b", "c"), ("c", "a")], StructureError, r"cycle: '(.)' -> '(.)' -> '(.)' -> '\1'"),
        ("all", StructureError, "edges='all'"),
        ([("a", "b", "c")], StructureError, "no pair"),
        (["ab"], StructureError, "'ab', which is no pair"),
    ],
)
def test_edges_that_mean_nothing_are_refused(edges: Any, error: type[VFEError], words: str) -> None:
    with pytest.raises(error, match=words):
        vfe.AutoStructured(collider, edges)()


def test_an_edge_may_not_lead_out_of_a_plate() -> None:
    with pytest.raises(PlateError, match=r"\('b', 'a'\).*out of plate 'inner'.*\('a', 'b'\)"):
        vfe.AutoStructured(nested, [("b", "a")])(GRID)


def test_an_unknown_start_is_refused() -> None:
    with pytest.raises(VFEError, match="init='middle'"):
        vfe.AutoStructured(collider, init="middle")  # type: ignore[arg-type]


def test_a_failed_start_leaves_a_guide_that_can_be_called_again() -> None:
    guide = vfe.AutoStructured(collider, [("a", "b"), ("b", "a")])
    with pytest.raises(StructureError):
        guide()
    assert list(guide.parameters()) == []
    with pytest.raises(StructureError, match="cycle"):
        guide()


def test_a_table_that_would_not_fit_is_refused_with_its_sizes() -> None:
    def model() -> None:
        parents = [categorical(f"p_{n}", torch.ones(100) / 100) for n in range(4)]
        child = categorical("child", simplex("probs", 2))
        pyro.sample("u", dist.Normal(child + parents[0], 1.0), obs=tensor(0.3))

    edges = [(f"p_{n}", "child") for n in range(4)]
    with pytest.raises(CostError, match=r"'child'.*100 \('p_0'\) x .* x 2 \('child'\).*edges=\[\.\.\.\]"):
        vfe.AutoStructured(model, edges, max_bytes=1e6)()


def test_a_model_without_discrete_latents_is_refused() -> None:
    with pytest.raises(StructureError, match="AutoStructured found no discrete latent"):
        vfe.AutoStructured(lambda: pyro.sample("w", dist.Normal(0.0, 1.0)))()


def two_levels(series: Tensor) -> None:
    with pyro.plate("data", len(series), subsample_size=3) as batch:
        y = categorical("y", simplex("y_probs", 2))
        z = categorical("z", simplex("z_probs", 2, 3)[y])
        pyro.sample("u", dist.Normal(3 * noise(3, seed=1)[z], 1.0), obs=series[batch])


def test_a_subsample_uses_and_trains_its_own_rows_alone() -> None:
    guide = vfe.AutoStructured(two_levels, init_scale=1.0, create_plates=whole_batch)
    loss = vfe.FreeEnergy().loss_and_grads(two_levels, guide, SERIES)
    q_y, q_z = guide.probabilities("y")[BATCH], guide.probabilities("z")[BATCH]
    assert guide.logits.z.shape == (10, 2, 3)
    log_p = simplex("y_probs", 2).detach().log().unsqueeze(-1) + simplex("z_probs", 2, 3).detach().log()
    log_p = log_p + dist.Normal(3 * noise(3, seed=1), 1.0).log_prob(SERIES[BATCH, None])[:, None, :]
    joint = q_y.unsqueeze(-1) * q_z
    assert loss == pytest.approx(10 / 3 * (joint * (joint.log() - log_p)).sum().item(), rel=1e-12)
    moved = guide.logits.z.grad.abs().sum((1, 2)) > 0
    assert moved.nonzero().squeeze(-1).tolist() == BATCH.tolist()


def whole_batch(series: Tensor) -> Any:
    return pyro.plate("data", len(series), subsample=BATCH)


def test_subsampled_chains_use_their_own_rows() -> None:
    def model(table: Tensor) -> None:
        rates = positive("rates", 2, seed=2)
        with pyro.plate("sequences", len(table), subsample_size=1, dim=-2) as row, pyro.plate("time", 3, dim=-1):
            z = pyro.sample("z", vfe.MarkovChain(simplex("initial", 2), simplex("transition", 2, 2, seed=1)))
            pyro.sample("u", dist.Poisson(rates[z]), obs=table[row])

    guide, elbo = vfe.AutoStructured(model, init_scale=1.0), vfe.FreeEnergy()
    found = {round(elbo.loss(model, guide, TABLE), 8) for _ in range(20)}
    whole = vfe.AutoStructured(sequences_of(model))
    whole(TABLE)
    pyro.get_param_store().clear()
    whole.load_state_dict(guide.state_dict())
    parts = elbo.decompose(sequences_of(model), whole, TABLE).by("sequences").free_energy
    assert found == {round(2 * value, 8) for value in parts.tolist()}


def sequences_of(model: Callable[..., Any]) -> Callable[..., Any]:
    """The same model without its subsample."""

    def whole(table: Tensor) -> None:
        rates = positive("rates", 2, seed=2)
        with pyro.plate("sequences", len(table), dim=-2), pyro.plate("time", 3, dim=-1):
            z = pyro.sample("z", vfe.MarkovChain(simplex("initial", 2), simplex("transition", 2, 2, seed=1)))
            pyro.sample("u", dist.Poisson(rates[z]), obs=table)

    return whole


def test_the_posterior_start_needs_the_whole_data() -> None:
    with pytest.raises(StructureError, match=r"AutoStructured.*subsampled"):
        vfe.AutoStructured(two_levels, init="posterior")(SERIES)


@pytest.mark.parametrize("called", [False, True])
def test_its_state_is_loaded_into_a_fresh_guide_before_or_after_its_first_call(called: bool, tmp_path: Path) -> None:
    guide = vfe.AutoStructured(classes, init_scale=1.0)
    loss = vfe.FreeEnergy().loss(classes, guide, TABLE)
    torch.save(guide.state_dict(), tmp_path / "guide.pt")
    pyro.clear_param_store()
    other = vfe.AutoStructured(classes)
    if called:
        other(TABLE)
        pyro.clear_param_store()
    other.load_state_dict(torch.load(tmp_path / "guide.pt", weights_only=True))
    assert vfe.FreeEnergy().loss(classes, other, TABLE) == pytest.approx(loss, rel=1e-12)
    assert set(other.state_dict()) == {"logits.c", "logits.z", "initial_logits.z"}


def test_a_state_of_other_data_is_refused() -> None:
    guide = vfe.AutoStructured(classes)
    guide(TABLE)
    buffer = io.BytesIO()
    torch.save(guide.state_dict(), buffer)
    buffer.seek(0)
    pyro.clear_param_store()
    other = vfe.AutoStructured(classes)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    with pytest.raises(StructureError, match=r"logits\.c.*\(2, 1, 2\).*\(1, 1, 2\)"):
        other(TABLE[:1])


@pytest.mark.parametrize("parallel", [False, True])
def test_Predictive_draws_from_its_tables(parallel: bool) -> None:
    guide, program = started("markov_chain_with_mixture_emissions", init="posterior")
    guide(*program.args)
    size = 3000 if parallel else 300
    draws = Predictive(program.model, guide=guide, num_samples=size, parallel=parallel)(*program.args)
    exact = oracle(program.model, lambda *_: None, *program.args).posterior
    for name in ("z", "w"):
        found = torch.stack([(draws[name].reshape(size, -1) == k).double().mean(0) for k in range(2)], -1)
        probs = exact.marginal(name)
        assert bool(((found - probs).abs() < 5 * (probs * (1 - probs) / size).sqrt() + 1e-12).all())


def signs(points: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(points)):
        y = bernoulli("y", torch.tensor(0.4))
        z = bernoulli("z", 0.2 + 0.6 * y)
        pyro.sample("u", dist.Normal(w * (2 * z - 1), 1.0), obs=points)


@pytest.mark.parametrize("vectorized", [False, True])
def test_an_AutoGuideList_leaves_the_other_latents_to_other_guides(vectorized: bool) -> None:
    points = torch.cat([noise(6, seed=1) + 3, noise(6, seed=2) - 3])
    guide = AutoGuideList(signs)
    guide.append(AutoNormal(pyro.poutine.block(signs, hide=["y", "z"]), init_loc_fn=lambda site: tensor(1.0)))
    guide.append(vfe.AutoStructured(pyro.poutine.block(signs, hide=["w"])))
    elbo = vfe.FreeEnergy(num_particles=2, vectorize_particles=vectorized)
    svi = SVI(signs, guide, pyro.optim.Adam({"lr": 0.1}), loss=elbo)
    for _ in range(80):
        svi.step(points)
    sign = 1 if guide[0].median(points)["w"] > 0 else -1
    q_y, q_z = guide[1].probabilities("y"), guide[1].probabilities("z")
    assert torch.equal((q_y.unsqueeze(-1) * q_z).sum(1)[:, 1] > 0.5, sign * points > 0)
    terms = vfe.FreeEnergy(num_particles=5).decompose(signs, guide, points)
    assert not terms.exact
    assert terms.gap >= 0


class Mixture(PyroModule):
    """A mixture of mixtures, as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = PyroParam(tensor([2.0, 4.0]), constraint=constraints.positive)

    def forward(self, counts: Tensor) -> None:
        """Generates the counts."""
        with pyro.plate("data", len(counts)):
            y = bernoulli("y", torch.tensor(0.4))
            z = categorical("z", tensor([[0.2, 0.8], [0.6, 0.4]])[y.long()])
            pyro.sample("u", dist.Poisson(self.rates[z]), obs=counts)


def test_an_ELBOModule_of_it_trains() -> None:
    with pyro.settings.context(module_local_params=True):
        model = Mixture()
        module = vfe.FreeEnergy()(model, vfe.AutoStructured(model))
        first = module(COUNTS).item()
        names = {name for name, _ in module.named_parameters()}
        assert names == {"model.rates_unconstrained", "guide.logits.y", "guide.logits.z"}
        optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
        for _ in range(10):
            optimizer.zero_grad()
            loss = module(COUNTS)
            loss.backward()
            optimizer.step()
        assert len(pyro.get_param_store()) == 0
    assert loss.item() < first


def test_its_start_leaves_the_random_stream_alone() -> None:
    pyro.set_rng_seed(1)
    guide, program = started("markov_chains_by_class", init="posterior")
    terms_of(guide, program)
    found = torch.rand(())
    pyro.set_rng_seed(1)
    assert found == torch.rand(())


def test_all_its_latents_can_be_drawn_in_place_of_summed() -> None:
    """At the posterior every draw has the same F: log Q - log P is the surprise whatever v."""
    guide, program = started("markov_chains_by_class", init="posterior")
    exact = terms_of(guide, program)
    drawn = pyro.poutine.infer_config(guide, lambda site: {"enumerate": None})
    elbo = vfe.FreeEnergy(num_particles=3, strict_enumeration_warning=False)
    assert elbo.loss(program.model, drawn, *program.args) == pytest.approx(exact.surprise.item(), rel=1e-10)


def test_a_chain_of_the_guide_may_read_what_is_no_chain_at_its_own_step() -> None:
    guide = vfe.AutoStructured(transitions_by_step, init_scale=1.0)
    args = (COUNTS[:3],)
    terms = vfe.FreeEnergy(check="always").decompose(transitions_by_step, guide, *args)
    q_w, q_z, q_0 = guide.probabilities("w"), guide.probabilities("z"), guide.initial_probabilities("z")

    def same(counts: Tensor) -> None:
        with pyro.plate("time", len(counts)):
            w = categorical("w", q_w)
            first, later = q_0[w[..., 0]], q_z[torch.arange(len(counts) - 1), w[..., 1:]]
            pyro.sample("z", vfe.MarkovChain(first, later, num_steps=len(counts)))

    expected = oracle(transitions_by_step, same, *args)
    for term in TERMS:
        torch.testing.assert_close(getattr(terms, term), expected.terms[term].detach(), rtol=1e-10, atol=1e-9)


def test_the_number_of_parameters_is_that_of_the_tables() -> None:
    guide = vfe.AutoStructured(mixed)
    guide(COUNTS[:2])
    shapes, _ = HELD["mixed"]
    assert sum(logits.numel() for logits in guide.parameters()) == sum(map(prod, shapes.values()))


def three_counts(counts: Tensor) -> None:
    with pyro.plate("data", len(counts)):
        z = categorical("z", simplex("weights", 2))
        pyro.sample("u", dist.Poisson(positive("rates", 2, seed=1)[z]), obs=counts)


def test_batches_as_long_as_its_tables_are_refused_or_noted() -> None:
    batches = [(COUNTS[:2],), (COUNTS[2:],)]
    guide = vfe.AutoStructured(three_counts)
    em = vfe.EM(three_counts, guide, e_phase=vfe.Gradient(pyro.optim.Adam({"lr": 0.1}), 2))
    with pytest.raises(VFEError, match="AutoStructured holds a factor for each element of plate 'data'"):
        em.run_batches(batches, num_epochs=2, progress_bar=False)
    assert guide.whole_plates == ("data",)
    optim = pyro.optim.Adam({"lr": 0.1})
    run = vfe.fit(three_counts, guide, batches=batches, optim=optim, num_steps=2, progress_bar=False)
    assert any("AutoStructured has its own parameters for each element of plate 'data'" in note for note in run.notes)
