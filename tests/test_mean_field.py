"""The mean-field guide: where it starts, what it holds, and what it costs."""

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import TERMS, oracle
from programs import PROGRAMS
from programs.case import bernoulli, categorical, noise, positive, real, simplex, tensor, unit
from programs.observations import SEEN, masked_latents
from programs.plates import BATCH, COUNTS, SCALES, SERIES, global_over_local, mixture, nested, scaled, subsampled
from programs.supports import Dice, bits, mixed, one_hot_chain, plated_words
from pyro.infer import SVI, TraceEnum_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from torch import Tensor

import pyro_vfe as vfe
from pyro_vfe.errors import StructureError, VFEError
from pyro_vfe.program.finite import Finite
from pyro_vfe.program.supports import finite_support

GRID = noise(2, 2, seed=11)


def dice(counts: Tensor) -> None:
    b = pyro.sample("b", dist.Binomial(2, unit("b_prob")))
    d = pyro.sample("d", Dice(real("dice", 3, 3, seed=2)[b.long()]))
    pyro.sample("u", dist.Poisson(d + b), obs=counts[0])


KINDS = {
    "dice": (dice, (COUNTS,), {"b": (3,), "d": (3,)}),
    "mixture": (mixture, (COUNTS,), {"z": (4, 3)}),
    "nested": (nested, (GRID,), {"a": (2, 2), "b": (2, 2, 2)}),
    "global_over_local": (global_over_local, (COUNTS,), {"g": (3,), "z": (4, 2)}),
    "mixed": (mixed, (COUNTS[:2],), {"a": (3,), "b": (3,), "c": (2, 2), "d": (2, 3)}),
    "one_hot_chain": (one_hot_chain, (COUNTS[:3],), {f"z_{t}": (3,) for t in range(3)}),
    "bits": (bits, (COUNTS[:3],), {"z": (8,)}),
    "plated_words": (plated_words, (COUNTS[:3],), {"z": (3, 9)}),
    "masked_latents": (masked_latents, (COUNTS,), {"z": (4, 3)}),
    "scaled": (scaled, (COUNTS,), {"z": (4, 3)}),
}
INDEPENDENT = ("mixture", "bits", "plated_words", "masked_latents", "scaled")


def table_guide(guide: vfe.AutoMeanField, model: Callable[..., Any], args: Any) -> Callable[..., None]:
    """The same Q as an ordinary guide, for the oracle: the model's own sites, with the guide's probabilities."""
    trace = pyro.poutine.trace(model).get_trace(*args)

    def program(*_: Any) -> None:
        plates: dict[str, Any] = {}
        for name in [name for name, _ in guide.logits.named_parameters()]:
            node, probs = trace.nodes[name], guide.probabilities(name)
            scale, mask = torch.as_tensor(node["scale"]), True if node["mask"] is None else node["mask"]
            with ExitStack() as stack:
                for frame in node["cond_indep_stack"]:
                    if frame.name not in plates:
                        plates[frame.name] = pyro.plate(frame.name, frame.size, dim=frame.dim)
                    stack.enter_context(plates[frame.name])
                with pyro.poutine.scale(scale=scale), pyro.poutine.mask(mask=mask):
                    pyro.sample(name, Finite(finite_support(node["fn"], name), probs.log()))

    return program


@pytest.mark.parametrize("name", KINDS)
def test_it_starts_uniform_over_every_support(name: str) -> None:
    model, args, shapes = KINDS[name]
    guide = vfe.AutoMeanField(model)
    vfe.FreeEnergy().loss(model, guide, *args)
    assert {site: tuple(logits.shape) for site, logits in guide.logits.named_parameters()} == shapes
    for site, shape in shapes.items():
        torch.testing.assert_close(guide.probabilities(site), torch.full(shape, 1 / shape[-1]))


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("plated_words", "mixed")])
def test_every_term_of_a_mean_field_guide_equals_the_full_joint_table(name: str) -> None:
    model, args, _ = KINDS[name]
    guide = vfe.AutoMeanField(model, init_scale=0.7)
    terms = vfe.FreeEnergy(check="always").decompose(model, guide, *args)
    expected = oracle(model, table_guide(guide, model, args), *args, scaled_plate="data" if name == "scaled" else None)
    for term in TERMS:
        torch.testing.assert_close(getattr(terms, term), expected.terms[term].detach(), rtol=1e-10, atol=1e-9)
    assert terms.gap >= -1e-10


@pytest.mark.parametrize("name", INDEPENDENT)
def test_started_at_the_posterior_independent_latents_have_no_gap(name: str) -> None:
    model, args, _ = KINDS[name]
    guide = vfe.AutoMeanField(model, init="posterior")
    terms = vfe.FreeEnergy().decompose(model, guide, *args)
    assert terms.gap.item() == pytest.approx(0.0, abs=1e-10)
    assert terms.free_energy.item() == pytest.approx(terms.surprise.item(), rel=1e-12)


@pytest.mark.parametrize("name", ["nested", "global_over_local", "dice", "one_hot_chain"])
def test_started_at_the_posterior_it_holds_the_exact_marginals(name: str) -> None:
    model, args, shapes = KINDS[name]
    guide = vfe.AutoMeanField(model, init="posterior")
    terms = vfe.FreeEnergy().decompose(model, guide, *args)
    exact = oracle(model, lambda *_: None, *args).posterior
    for site in shapes:
        expected = exact.marginal(site)
        torch.testing.assert_close(guide.probabilities(site).reshape(expected.shape), expected, rtol=1e-9, atol=1e-10)
    assert terms.gap > 1e-6


def test_the_noise_is_drawn_once_and_breaks_the_symmetry() -> None:
    guide = vfe.AutoMeanField(mixture, init_scale=0.5)
    guide(COUNTS)
    first = guide.probabilities("z")
    guide(COUNTS)
    assert first.std() > 0.05
    torch.testing.assert_close(guide.probabilities("z"), first, rtol=0, atol=0)


def test_the_noise_of_its_start_leaves_the_random_stream_of_the_model_alone() -> None:
    pyro.set_rng_seed(1)
    guide = vfe.AutoMeanField(mixture)
    vfe.FreeEnergy().loss(mixture, guide, COUNTS)
    found = torch.rand(())
    pyro.set_rng_seed(1)
    assert found == torch.rand(())


def batch_plate(series: Tensor) -> Any:
    return pyro.plate("data", len(series), subsample=BATCH)


def test_a_subsample_of_the_models_own_has_to_be_given_to_the_guide() -> None:
    with pytest.raises(StructureError, match=r"'data'.*create_plates"):
        vfe.FreeEnergy().loss(subsampled, vfe.AutoMeanField(subsampled), SERIES)


def test_a_subsample_uses_and_trains_its_own_rows_alone() -> None:
    guide = vfe.AutoMeanField(subsampled, init_scale=1.0, create_plates=batch_plate)
    elbo = vfe.FreeEnergy()
    loss = elbo.loss_and_grads(subsampled, guide, SERIES)
    rows = guide.probabilities("z")
    assert rows.shape == (10, 2)
    weights, means, sigma = simplex("weights", 2).detach(), noise(2, seed=1), positive("sigma").detach()
    log_joint = weights.log() + dist.Normal(means, sigma).log_prob(SERIES[BATCH].unsqueeze(-1))
    q = rows[BATCH]
    assert loss == pytest.approx(10 / 3 * (q * (q.log() - log_joint)).sum().item(), rel=1e-12)
    cost = q.log() - log_joint
    expected = torch.zeros(10, 2)
    expected[BATCH] = 10 / 3 * q * (cost - (q * cost).sum(-1, keepdim=True))
    torch.testing.assert_close(guide.logits.z.grad, expected, rtol=1e-9, atol=1e-12)


def test_a_random_subsample_is_the_same_in_guide_and_model() -> None:
    """Every value of F over a subsample of one is N times the free energy of one datum."""

    def model(series: Tensor) -> None:
        with pyro.plate("data", len(series), subsample_size=1) as batch:
            z = categorical("z", simplex("weights", 2))
            pyro.sample("u", dist.Normal(3 * noise(2, seed=1)[z], 1.0), obs=series[batch])

    guide, elbo = vfe.AutoMeanField(model, init_scale=1.0), vfe.FreeEnergy()
    found = {round(elbo.loss(model, guide, SERIES), 8) for _ in range(120)}
    q, weights = guide.probabilities("z"), simplex("weights", 2).detach()
    log_joint = weights.log() + dist.Normal(3 * noise(2, seed=1), 1.0).log_prob(SERIES.unsqueeze(-1))
    expected = {round(value, 8) for value in (10 * (q * (q.log() - log_joint)).sum(-1)).tolist()}
    assert found == expected


def test_the_posterior_start_needs_the_whole_data() -> None:
    with pytest.raises(StructureError, match="subsampled"):
        vfe.FreeEnergy().loss(
            subsampled, vfe.AutoMeanField(subsampled, init="posterior", create_plates=batch_plate), SERIES
        )


def test_an_AutoGuideList_leaves_the_other_latents_to_other_guides() -> None:
    def model(points: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(points)):
            z = bernoulli("z", torch.tensor(0.4))
            pyro.sample("u", dist.Normal(w * (2 * z - 1), 1.0), obs=points)

    points = torch.cat([noise(6, seed=1) + 3, noise(6, seed=2) - 3])
    guide = AutoGuideList(model)
    guide.append(AutoNormal(pyro.poutine.block(model, hide=["z"]), init_loc_fn=lambda site: tensor(1.0)))
    guide.append(vfe.AutoMeanField(pyro.poutine.block(model, hide=["w"])))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), loss=vfe.FreeEnergy())
    for _ in range(120):
        svi.step(points)
    location = abs(guide[0].median(points)["w"].item())
    assert location == pytest.approx(points.abs().mean().item(), abs=0.5)
    sign = 1 if guide[0].median(points)["w"] > 0 else -1
    assert torch.equal(guide[1].probabilities("z")[:, 1] > 0.5, sign * points > 0)
    terms = vfe.FreeEnergy(num_particles=20).decompose(model, guide, points)
    assert not terms.exact
    assert terms.gap >= 0


def masked_and_scaled(counts: Tensor) -> None:
    with pyro.plate("data", 4), pyro.poutine.scale(scale=SCALES), pyro.poutine.mask(mask=SEEN):
        z = categorical("z", simplex("weights", 3))
        pyro.sample("u", dist.Poisson(positive("rates", 3, seed=1)[z]), obs=counts)


def masked_under_global(counts: Tensor) -> None:
    g = bernoulli("g", unit("g_prob"))
    with pyro.plate("data", 4), pyro.poutine.mask(mask=SEEN):
        z = categorical("z", simplex("weights", 2, 3)[g.long()])
        pyro.sample("u", dist.Poisson(positive("rates", 3, seed=1)[z]), obs=counts)


def branch(counts: Tensor) -> None:
    if bernoulli("a", unit("a_prob")):
        b = categorical("b", simplex("b_probs", 3))
        pyro.sample("u", dist.Poisson(positive("rates", 3, seed=1)[b]), obs=counts[1])
    else:
        pyro.sample("u", dist.Poisson(positive("rate", seed=2)), obs=counts[1])


@pytest.mark.parametrize("model", [masked_and_scaled, masked_under_global, scaled, branch])
@pytest.mark.parametrize("init", ["uniform", "posterior"])
def test_masked_scaled_and_branching_models_decompose_with_a_gap_that_training_lowers(
    model: Callable[..., Any], init: Any
) -> None:
    guide, elbo = vfe.AutoMeanField(model, init=init), vfe.FreeEnergy(check="always")
    before = elbo.decompose(model, guide, COUNTS)
    assert before.gap >= -1e-10
    torch.testing.assert_close(before.surprise + before.gap, before.free_energy, rtol=1e-10, atol=1e-10)
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.1)
    for _ in range(25):
        optimizer.zero_grad()
        elbo.differentiable_loss(model, guide, COUNTS).backward()
        optimizer.step()
    after = elbo.decompose(model, guide, COUNTS)
    torch.testing.assert_close(after.surprise, before.surprise, rtol=1e-12, atol=1e-12)
    assert -1e-10 <= after.gap <= before.gap + 1e-3
    assert after.gap < 0.5 * before.gap + 1e-2 or init == "posterior"


def test_a_masked_and_weighted_mean_field_reaches_its_posterior() -> None:
    guide = vfe.AutoMeanField(masked_and_scaled, init="posterior")
    terms = vfe.FreeEnergy().decompose(masked_and_scaled, guide, COUNTS)
    assert terms.gap.item() == pytest.approx(0.0, abs=1e-10)
    weights, rates = simplex("weights", 3).detach(), positive("rates", 3).detach()
    each = (weights.log() + dist.Poisson(rates).log_prob(COUNTS.unsqueeze(-1))).logsumexp(-1)
    assert terms.surprise.item() == pytest.approx(-(SCALES * each)[SEEN].sum().item(), rel=1e-12)


def test_a_branching_model_agrees_with_its_table() -> None:
    guide = vfe.AutoMeanField(branch, init_scale=0.5)
    found = vfe.FreeEnergy().loss(branch, guide, COUNTS)
    a, b = guide.probabilities("a"), guide.probabilities("b")
    prior_a, prior_b = unit("a_prob").detach(), simplex("b_probs", 3).detach()
    on, off = positive("rates", 3).detach(), positive("rate").detach()
    cost_b = (b * (b.log() - prior_b.log() - dist.Poisson(on).log_prob(COUNTS[1]))).sum()
    expected = a[1] * (a[1].log() - prior_a.log() + cost_b)
    expected = expected + a[0] * (a[0].log() - (1 - prior_a).log() - dist.Poisson(off).log_prob(COUNTS[1]))
    assert found == pytest.approx(expected.item(), rel=1e-12)


def test_its_state_can_be_saved_and_loaded() -> None:
    guide = vfe.AutoMeanField(mixed, init_scale=1.0)
    loss = vfe.FreeEnergy().loss(mixed, guide, COUNTS[:2])
    state = {name: value.clone() for name, value in guide.state_dict().items()}
    assert set(state) == {f"logits.{name}" for name in "abcd"}
    other = vfe.AutoMeanField(mixed)
    other(COUNTS[:2])
    other.load_state_dict(state)
    for name in "abcd":
        torch.testing.assert_close(other.probabilities(name), state[f"logits.{name}"].softmax(-1))
    pyro.get_param_store().clear()
    assert vfe.FreeEnergy().loss(mixed, other, COUNTS[:2]) == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("model", ["continuous", "no latent"])
def test_a_model_without_discrete_latents_is_refused(model: str) -> None:
    def program() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0)) if model == "continuous" else tensor(0.0)
        pyro.sample("u", dist.Normal(w, 1.0), obs=tensor(0.4))

    with pytest.raises(VFEError, match="no discrete latent"):
        vfe.AutoMeanField(program)()


def test_its_values_are_drawn_from_its_probabilities() -> None:
    guide = vfe.AutoMeanField(mixture, init_scale=1.0)
    draws = torch.stack([guide(COUNTS)["z"] for _ in range(400)])
    probs = guide.probabilities("z")
    found = torch.stack([(draws == k).double().mean(0) for k in range(3)], -1)
    assert bool(((found - probs).abs() < 5 * (probs * (1 - probs) / 400).sqrt()).all())


def test_TraceEnum_ELBO_takes_it_as_a_guide_too() -> None:
    guide = vfe.AutoMeanField(mixture, init_scale=1.0)
    ours = vfe.FreeEnergy().loss(mixture, guide, COUNTS)
    marked = pyro.infer.config_enumerate(guide.forward, default="parallel")
    theirs = TraceEnum_ELBO(max_plate_nesting=1).loss(mixture, marked, COUNTS)
    assert ours == pytest.approx(theirs, rel=1e-10)


def test_on_a_chain_it_costs_what_independence_costs() -> None:
    """At the best mean field every factor is Q(v_t) prop. to exp E_-t[log P]: coordinate ascent by the joint table."""
    program = PROGRAMS["chain"]
    args = (COUNTS[:3],)
    guide, elbo = vfe.AutoMeanField(program.model, init="posterior"), vfe.FreeEnergy()
    elbo.loss(program.model, guide, *args)
    optimizer = torch.optim.LBFGS(guide.parameters(), max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = elbo.differentiable_loss(program.model, guide, *args)
        loss.backward()
        return loss

    optimizer.step(closure)
    rows = oracle(program.model, lambda *_: None, *args).model
    log_joint = torch.full((3, 3, 3), -torch.inf)
    for row in rows:
        log_joint[tuple(row.assignment[f"z_{t}", 0] for t in range(3))] = row.log_mass().detach()
    q = [guide.probabilities(f"z_{t}") for t in range(3)]
    expected = (
        torch.einsum("abc,b,c->a", log_joint, q[1], q[2]),
        torch.einsum("abc,a,c->b", log_joint, q[0], q[2]),
        torch.einsum("abc,a,b->c", log_joint, q[0], q[1]),
    )
    for found, wanted in zip(q, expected, strict=True):
        torch.testing.assert_close(found, wanted.softmax(-1), rtol=1e-5, atol=1e-6)


# --- Copies, files and failures ---


def coin(u: torch.Tensor) -> None:
    value = pyro.sample("v", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
    pyro.sample("u", dist.Normal(value.to(u), 1.0), obs=u)


GUIDES = [vfe.AutoMeanField, vfe.AutoStructured, vfe.AutoPosterior]


@pytest.mark.parametrize("kind", GUIDES)
def test_copies_serve_the_same_model_and_leave_the_guide_its_own(kind: Any) -> None:
    with pyro.settings.context(module_local_params=True):
        guide, datum = kind(coin), torch.tensor(0.7)
        early = copy.deepcopy(guide)
        loss = vfe.FreeEnergy().loss(coin, guide, datum)
        for made in (copy.deepcopy(guide), early, guide):
            assert made.model is coin
            assert vfe.FreeEnergy().loss(coin, made, datum) == pytest.approx(loss, abs=1e-14)


@pytest.mark.parametrize("kind", GUIDES)
def test_a_pickled_guide_leaves_its_model_behind_and_says_so(kind: Any) -> None:
    guide, datum = kind(coin), torch.tensor(0.7)
    made = pickle.loads(pickle.dumps(guide))
    with pytest.raises(StructureError, match="without its model"):
        made(datum)
    assert guide(datum).keys() == {"v"}


def test_a_state_can_be_loaded_before_the_first_call() -> None:
    with pyro.settings.context(module_local_params=True):
        guide, datum = vfe.AutoMeanField(coin, init_scale=1.0), torch.tensor(0.7)
        loss = vfe.FreeEnergy().loss(coin, guide, datum)
        buffer = io.BytesIO()
        torch.save(guide.state_dict(), buffer)
        buffer.seek(0)
        other = vfe.AutoMeanField(coin, init="posterior")
        other.load_state_dict(torch.load(buffer, weights_only=True))
        assert vfe.FreeEnergy().loss(coin, other, datum) == loss


@pytest.mark.parametrize("kind", [vfe.AutoMeanField, vfe.AutoStructured])
def test_a_first_call_that_fails_is_no_first_call(kind: Any) -> None:
    """The posterior cannot be had from a subsample: the next call must not begin somewhere else instead."""

    def model(u: torch.Tensor, size: int) -> None:
        with pyro.plate("data", len(u), subsample_size=size) as present:
            value = pyro.sample("v", dist.Categorical(torch.tensor([0.2, 0.8])))
            pyro.sample("u", dist.Normal(value.to(u), 1.0), obs=u[present])

    data = torch.tensor([0.1, 0.9, 0.4])
    guide = kind(model, init="posterior")
    for _ in range(2):
        with pytest.raises(StructureError, match="subsampled"):
            guide(data, 2)
    assert float(vfe.FreeEnergy().decompose(model, guide, data, 3).gap) == pytest.approx(0.0, abs=1e-12)
