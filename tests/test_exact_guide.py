"""The exact posterior as a guide: no gap wherever it applies, and a clear word where it does not."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from checks import expected_of
from oracles import oracle
from programs import PROGRAMS
from programs.case import bernoulli, categorical, noise, positive, simplex, tensor, unit
from programs.chains import collider
from programs.plates import BATCH, COUNTS, SERIES, global_over_local, mixture, subsampled
from programs.supports import bits
from pyro.infer import SVI, Predictive
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

import pyro_vfe as vfe
from pyro_vfe.energy.conditionals import Around, separators
from pyro_vfe.errors import (
    CostError,
    ImpossibleDataError,
    MissingGuideSiteError,
    PlateError,
    ScaleError,
    StructureError,
    VFEError,
)
from pyro_vfe.guides import exact as exact_guides

REFUSED: dict[str, tuple[type[VFEError], str]] = {
    "factorial_markov_chain": (PlateError, "ties latent 'b' to latent 'a' at every step"),
    "chain_on_chain": (PlateError, "ties latent 'b' to latent 'a' at every step"),
    "two_markov_chains_and_a_chain_by_way_of_a_latent_in_the_guide": (
        PlateError,
        "ties latent 'b' to latent 'a' at every step",
    ),
    "markov_chain_with_transitions_by_step": (PlateError, "ties latent 'w' to latent 'z' at two steps"),
    "crossing": (PlateError, "ties latent 'b' to latent 'a' at all elements of plate 'i'"),
    "missing_labels": (ScaleError, "'x_unobserved' is masked out where site 'y' still reads it"),
    "subsampled": (StructureError, "'data' has one subsample.*create_plates"),
    "subsampled_under_guided_global": (StructureError, "'data' has one subsample.*create_plates"),
    "subsampled_markov_chains": (StructureError, "'sequences' has one subsample.*create_plates"),
    "point_estimate_of_w": (MissingGuideSiteError, "'w' is Normal.*AutoGuideList"),
}
"""Models whose posterior does not factorise over their plates, cannot be a guide's, or is not of the model alone."""

LARGE = ("chain_of_1000_steps", "ising_10_by_10")
MODELS = {program.model: name for name, program in reversed(PROGRAMS.items()) if not name.startswith(LARGE)}
# Of programs that differ in their guides alone the first stands for all.
DISTINCT = sorted(MODELS.values())
SERVED = [name for name in DISTINCT if name not in REFUSED]


@pytest.mark.parametrize("name", SERVED)
def test_it_has_no_gap(name: str) -> None:
    program = PROGRAMS[name]
    guide = vfe.AutoPosterior(program.model)
    terms = vfe.FreeEnergy().decompose(program.model, guide, *program.args, **program.kwargs)
    assert terms.gap.item() == pytest.approx(0.0, abs=1e-10)
    assert terms.free_energy.item() == pytest.approx(terms.surprise.item(), rel=1e-10, abs=1e-10)


SMALL = (
    "chain",
    "collider",
    "counted_loop",
    "deterministic",
    "global_over_local",
    "markov_chain_with_mixture_emissions",
    "markov_chains_of_different_lengths",
    "mixed",
    "nested",
    "two_branches",
    "zeros_in_logits",
)


@pytest.mark.parametrize("name", SMALL)
def test_its_free_energy_is_the_surprise_of_the_full_joint_table(name: str) -> None:
    program = PROGRAMS[name]
    found = vfe.FreeEnergy().loss(program.model, vfe.AutoPosterior(program.model), *program.args)
    assert found == pytest.approx(expected_of(name)[0]["surprise"].item(), rel=1e-10)


@pytest.mark.parametrize("name", REFUSED)
def test_a_posterior_that_no_table_holds_is_refused(name: str) -> None:
    program = PROGRAMS[name]
    error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        vfe.FreeEnergy().loss(program.model, vfe.AutoPosterior(program.model), *program.args)


@pytest.mark.parametrize("name", ["tree", "collider", "markov_chains_by_class", "branch_in_model", "mixed", "network"])
def test_the_models_gradient_is_that_of_the_surprise(name: str) -> None:
    program, elbo = PROGRAMS[name], vfe.FreeEnergy()
    found = []
    for guide in (vfe.AutoPosterior(program.model), None):
        elbo.differentiable_loss(program.model, guide, *program.args).backward()
        leaves = dict(pyro.get_param_store().named_parameters())
        found.append({key: leaf.grad.clone() for key, leaf in leaves.items()})
        for leaf in leaves.values():
            leaf.grad = None
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[1].items():
        torch.testing.assert_close(found[0][key], gradient, rtol=1e-9, atol=1e-11)


def test_each_latent_is_given_those_that_separate_it_from_the_earlier_ones() -> None:
    """An alarm rung by either of two, and a neighbour who calls: the call is independent of the causes."""
    alone = Around(frozenset(), None)
    scopes = [frozenset(s) for s in ({"a"}, {"b"}, {"a", "b", "alarm"}, {"alarm", "call"})]
    found = separators(scopes, dict.fromkeys(("a", "b", "alarm", "call"), alone))
    assert found == {"a": (), "b": ("a",), "alarm": ("a", "b"), "call": ("alarm",)}


def late_global(counts: Tensor) -> None:
    plate = pyro.plate("data", len(counts))
    with plate:
        z = categorical("z", simplex("z_probs", 2))
    g = categorical("g", simplex("g_probs", 3, seed=1))
    with plate:
        pyro.sample("u", dist.Poisson(positive("rates", 2, 3)[z, g]), obs=counts)


def test_what_stands_outside_of_a_plate_is_sampled_before_what_is_inside() -> None:
    guide = vfe.AutoPosterior(late_global)
    terms = vfe.FreeEnergy().decompose(late_global, guide, COUNTS)
    expected = oracle(late_global, lambda *_: None, COUNTS).terms["surprise"]
    assert list(guide(COUNTS)) == ["g", "z"]
    assert terms.gap.item() == pytest.approx(0.0, abs=1e-10)
    assert terms.surprise.item() == pytest.approx(expected.item(), rel=1e-10)


def test_its_draws_are_from_the_joint_posterior() -> None:
    size = 20_000
    draws = Predictive(collider, guide=vfe.AutoPosterior(collider), num_samples=size, parallel=True)()
    exact = oracle(collider, lambda: None).posterior.marginal("a", "b", "c")
    places = (draws["a"] * 2 + draws["b"]) * 4 + draws["c"]
    found = torch.bincount(places.flatten(), minlength=24).double().reshape(3, 2, 4) / size
    assert bool(((found - exact).abs() < 5 * (exact * (1 - exact) / size).sqrt() + 1e-9).all())


def test_Predictive_calls_it_draw_by_draw_too() -> None:
    program = PROGRAMS["markov_chains_by_class"]
    guide = vfe.AutoPosterior(program.model)
    draws = Predictive(program.model, guide=guide, num_samples=50)(*program.args)
    exact = oracle(program.model, lambda *_: None, *program.args).posterior
    for name in ("c", "z"):
        found, probs = draws[name].double().mean(0).reshape(-1), exact.marginal(name)[..., 1].reshape(-1)
        assert bool(((found - probs).abs() < 5 * (probs * (1 - probs) / 50).sqrt() + 1e-9).all())


@pytest.mark.parametrize("name", ["tree", "two_branches", "markov_chains_by_class"])
def test_the_posterior_is_computed_once_in_each_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, elbo = PROGRAMS[name], vfe.FreeEnergy(check="always")
    guide = vfe.AutoPosterior(program.model)
    computed: list[object] = []
    compute = exact_guides._exact

    def counted(*args: Any) -> Any:
        computed.append(args)
        return compute(*args)

    monkeypatch.setattr(exact_guides, "_exact", counted)
    losses = [elbo.loss(program.model, guide, *program.args) for _ in range(3)]
    assert len(computed) == 3
    assert losses[0] == pytest.approx(losses[2], rel=1e-12)


def test_it_follows_the_models_parameters_and_the_data() -> None:
    guide, elbo = vfe.AutoPosterior(mixture), vfe.FreeEnergy()
    for counts in (COUNTS, COUNTS[:2], COUNTS + 3):
        assert elbo.loss(mixture, guide, counts) == pytest.approx(elbo.loss(mixture, None, counts), rel=1e-12)
    before = elbo.loss(mixture, guide, COUNTS)
    with torch.no_grad():
        pyro.get_param_store()._params["rates"].add_(0.5)
    after = elbo.decompose(mixture, guide, COUNTS)
    assert after.gap.item() == pytest.approx(0.0, abs=1e-10)
    assert abs(after.free_energy.item() - before) > 0.1


def test_SVI_with_it_descends_the_surprise() -> None:
    elbo = vfe.FreeEnergy()
    svi = SVI(global_over_local, vfe.AutoPosterior(global_over_local), pyro.optim.Adam({"lr": 0.1}), loss=elbo)
    start = oracle(global_over_local, lambda *_: None, COUNTS).terms["surprise"].item()
    losses = [svi.step(COUNTS) for _ in range(30)]
    end = oracle(global_over_local, lambda *_: None, COUNTS).terms["surprise"].item()
    assert losses[0] == pytest.approx(start, rel=1e-12)
    assert end < losses[-1] < losses[0] - 0.1


def batch_plate(series: Tensor) -> Any:
    return pyro.plate("data", len(series), subsample=BATCH)


def test_a_subsample_of_the_models_own_is_handed_on_by_create_plates() -> None:
    guide = vfe.AutoPosterior(subsampled, create_plates=batch_plate)
    terms = vfe.FreeEnergy().decompose(subsampled, guide, SERIES)
    expected = oracle(subsampled, lambda *_: None, SERIES, scaled_plate="data").terms["surprise"]
    assert terms.gap.item() == pytest.approx(0.0, abs=1e-10)
    assert terms.surprise.item() == pytest.approx(expected.item(), rel=1e-10)


def test_a_random_subsample_is_the_same_in_guide_and_model() -> None:
    """Every value of F over a subsample of one is N times the surprise of one datum."""

    def model(series: Tensor) -> None:
        with pyro.plate("data", len(series), subsample_size=1) as batch:
            z = categorical("z", simplex("weights", 2))
            pyro.sample("u", dist.Normal(3 * noise(2, seed=1)[z], 1.0), obs=series[batch])

    guide, elbo = vfe.AutoPosterior(model), vfe.FreeEnergy()
    found = {round(elbo.loss(model, guide, SERIES[:4]), 8) for _ in range(40)}
    log_joint = simplex("weights", 2).detach().log() + dist.Normal(3 * noise(2, seed=1), 1.0).log_prob(SERIES[:4, None])
    assert found == {round(value, 8) for value in (-4 * log_joint.logsumexp(-1)).tolist()}


def signs(points: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(points)):
        y = bernoulli("y", torch.tensor(0.4))
        z = bernoulli("z", 0.2 + 0.6 * y)
        pyro.sample("u", dist.Normal(w * (2 * z - 1), 1.0), obs=points)


POINTS = torch.tensor([3.1, 2.2, -2.7, -3.3, 0.1], dtype=torch.float64)


def test_behind_other_guides_it_is_the_posterior_given_what_they_drew() -> None:
    hidden = pyro.poutine.block(signs, hide=["y", "z"])
    both, alone = AutoGuideList(signs), AutoNormal(hidden)
    both.append(AutoNormal(hidden))
    both.append(vfe.AutoPosterior(signs))
    losses, gradients = [], []
    for guide in (both, alone):
        elbo = vfe.FreeEnergy(num_particles=3)
        elbo.loss(signs, guide, POINTS)
        pyro.set_rng_seed(3)
        pyro.get_param_store().clear()
        losses.append(elbo.loss_and_grads(signs, guide, POINTS))
        gradients.append([parameter.grad.clone() for parameter in guide.parameters()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert len(gradients[0]) == len(gradients[1]) > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-12)
    terms = vfe.FreeEnergy(num_particles=3).decompose(signs, both, POINTS)
    assert not terms.exact
    assert terms.gap.item() == pytest.approx(0.0, abs=1e-10)


def test_behind_a_point_estimate_it_trains_the_point() -> None:
    guide = AutoGuideList(signs)
    guide.append(AutoDelta(pyro.poutine.block(signs, hide=["y", "z"]), init_loc_fn=lambda site: tensor(1.0)))
    guide.append(vfe.AutoPosterior(signs))
    svi = SVI(signs, guide, pyro.optim.Adam({"lr": 0.1}), loss=vfe.FreeEnergy())
    for _ in range(60):
        svi.step(POINTS)
    grid = torch.linspace(-5, 5, 2001)
    p_z = tensor([0.6 * 0.8 + 0.4 * 0.2, 0.6 * 0.2 + 0.4 * 0.8]).log()
    means = torch.stack([-grid, grid], -1)[:, None, :]
    log_p = (p_z + dist.Normal(means, 1.0).log_prob(POINTS[:, None])).logsumexp(-1).sum(-1)
    best = grid[(log_p + dist.Normal(0.0, 2.0).log_prob(grid)).argmax()]
    assert guide[0].median(POINTS)["w"].abs().item() == pytest.approx(best.abs().item(), abs=0.1)


def test_draws_side_by_side_are_refused() -> None:
    guide = AutoGuideList(signs)
    guide.append(AutoNormal(pyro.poutine.block(signs, hide=["y", "z"])))
    guide.append(vfe.AutoPosterior(signs))
    with pytest.raises(StructureError, match=r"one draw of 'w' at a time.*vectorize_particles=False"):
        vfe.FreeEnergy(num_particles=3, vectorize_particles=True).loss(signs, guide, POINTS)


def test_a_model_with_a_hidden_latent_is_refused() -> None:
    guide = vfe.AutoPosterior(pyro.poutine.block(signs, hide=["w"]))
    with pytest.raises(StructureError, match=r"out of its sight.*vfe\.AutoPosterior\(model\)"):
        guide(POINTS)


def test_particles_beside_each_other_need_no_draws() -> None:
    elbo = vfe.FreeEnergy(num_particles=3, vectorize_particles=True)
    guide = vfe.AutoPosterior(global_over_local)
    expected = oracle(global_over_local, lambda *_: None, COUNTS).terms["surprise"]
    assert elbo.loss(global_over_local, guide, COUNTS) == pytest.approx(expected.item(), rel=1e-10)


def test_impossible_data_have_no_posterior() -> None:
    def model() -> None:
        z = bernoulli("z", unit("z_prob"))
        pyro.sample("u", dist.Poisson(1 + z), obs=tensor(-1.0))

    with pytest.raises(VFEError), pyro.validation_enabled(False):
        vfe.AutoPosterior(model)()

    def never() -> None:
        z = categorical("z", simplex("z_probs", 2))
        pyro.sample("u", dist.Categorical(tensor([[1.0, 0.0], [1.0, 0.0]])[z]), obs=torch.tensor(1))

    with pytest.raises(ImpossibleDataError, match="'u'"):
        vfe.AutoPosterior(never)()


def test_a_posterior_that_would_not_fit_is_refused() -> None:
    def model() -> None:
        causes = [categorical(f"z_{n}", simplex(f"p_{n}", 10)) for n in range(5)]
        tables = [noise(10, seed=n) for n in range(5)]
        pyro.sample("u", dist.Normal(sum(t[z] for t, z in zip(tables, causes, strict=True)), 1.0), obs=tensor(0.3))

    with pytest.raises(CostError, match="max_bytes"):
        vfe.AutoPosterior(model, max_bytes=1e5)()


def test_a_model_without_discrete_latents_is_refused() -> None:
    with pytest.raises(StructureError, match="AutoPosterior found no discrete latent"):
        vfe.AutoPosterior(lambda: pyro.sample("w", dist.Normal(0.0, 1.0)))()


def test_it_has_nothing_to_save() -> None:
    guide = vfe.AutoPosterior(bits)
    guide(tensor([1.0, 4.0, 2.0]))
    assert list(guide.parameters()) == []
    other = vfe.AutoPosterior(bits)
    other.load_state_dict(guide.state_dict())
    assert guide.state_dict() == {}


def test_it_leaves_the_random_stream_and_the_parameter_store_alone() -> None:
    mixture(COUNTS)
    elbo = vfe.FreeEnergy()
    guide = vfe.AutoPosterior(mixture)
    names = set(pyro.get_param_store())
    pyro.set_rng_seed(1)
    elbo.loss(mixture, guide, COUNTS)
    found = torch.rand(())
    pyro.set_rng_seed(1)
    assert found == torch.rand(())
    assert set(pyro.get_param_store()) == names


def test_its_own_run_is_out_of_sight_of_an_outer_trace() -> None:
    guide = vfe.AutoPosterior(global_over_local)
    trace = pyro.poutine.trace(guide).get_trace(COUNTS)
    assert set(trace.stochastic_nodes) - {"data"} == {"g", "z"}
    assert trace.param_nodes == []


def test_in_single_precision_the_gap_is_its_rounding() -> None:
    torch.set_default_dtype(torch.float32)

    def model(counts: Tensor) -> None:
        g = pyro.sample("g", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        with pyro.plate("data", len(counts)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor([0.1, 0.5, 0.8])[g]))
            pyro.sample("u", dist.Poisson(1 + 2 * z), obs=counts)

    terms = vfe.FreeEnergy().decompose(model, vfe.AutoPosterior(model), COUNTS.float())
    assert terms.gap.item() == pytest.approx(0.0, abs=1e-10)


def test_all_its_latents_can_be_drawn_in_place_of_summed() -> None:
    program = PROGRAMS["markov_chains_by_class"]
    drawn = pyro.poutine.infer_config(vfe.AutoPosterior(program.model), lambda site: {"enumerate": None})
    elbo = vfe.FreeEnergy(num_particles=2, strict_enumeration_warning=False)
    surprise = expected_of("markov_chains_by_class")[0]["surprise"].item()
    assert elbo.loss(program.model, drawn, *program.args) == pytest.approx(surprise, rel=1e-10)


class Mixture(PyroModule):
    """A mixture as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = PyroParam(tensor([2.0, 4.0]), constraint=constraints.positive)

    def forward(self, counts: Tensor) -> None:
        """Generates the counts."""
        with pyro.plate("data", len(counts)):
            z = categorical("z", tensor([0.2, 0.8]))
            pyro.sample("u", dist.Poisson(self.rates[z]), obs=counts)


def test_an_ELBOModule_of_it_trains_the_model() -> None:
    with pyro.settings.context(module_local_params=True):
        losses = []
        for exact in (True, False):
            model = Mixture()
            guide = vfe.AutoPosterior(model) if exact else None
            module = vfe.FreeEnergy()(model, guide) if exact else None
            parameters = model.parameters() if module is None else module.parameters()
            optimizer = torch.optim.Adam(parameters, lr=0.1)
            for _ in range(5):
                optimizer.zero_grad()
                loss = vfe.FreeEnergy().differentiable_loss(model, None, COUNTS) if module is None else module(COUNTS)
                loss.backward()
                optimizer.step()
            losses.append(loss.item())
        assert len(pyro.get_param_store()) == 0
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
