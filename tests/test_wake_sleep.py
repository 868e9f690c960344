"""Each phase of wake-sleep follows the gradient that its equation says, and the history tells what it did to F."""

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import gradients, log_sum_exp, matches, oracle
from programs import PROGRAMS
from programs.case import bernoulli, categorical, noise, real, simplex, tensor
from programs.networks import POINTS, MixtureModule, RecognitionModule
from pyro import poutine
from pyro.infer import ReweightedWakeSleep
from pyro.nn import PyroModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import pyro_vfe as vfe
from pyro_vfe.errors import (
    CostError,
    NameClashError,
    NotFiniteError,
    SpotCheckError,
    StructureError,
    VFEError,
    VFEWarning,
)
from pyro_vfe.learning.machine import Machine
from pyro_vfe.learning.sleep_phase import Sleep
from pyro_vfe.program.dreams import Dream

GUIDED = """
    chain_mean_field chain_guide_of_the_middle chain_markov_in_both tree_guide_from_the_leaves
    collider_guide_of_the_child markov_chains_with_chain_guides markov_chain_with_changing_chain_guide mixture_guided
    mixture_called_by_name nested_outer_guided global_and_local_guided global_guided local_guided
    crossing_one_edge_guided sequential_guided subsampled_guided scaled_per_datum_guided
    masked_data_guided masked_latents_guided missing_labels_partly_guided factors_guided deterministic_guided
    bits_guided left_right_chain_guided zeros_in_logits_guided branch_in_both branch_over_a_plate_guided
    counted_loop_guided auxiliary_site auxiliary_site_in_a_plate pyro_module_amortised network_amortised
""".split()  # noqa: SIM905
"""Programs whose joint table is quickly listed."""

FIRST = tensor([0.0, 1.0, 1.0, 0.0, 1.0])
BITS = torch.stack([FIRST, FIRST.flip(0)], -1)


def sgd(rate: float = 1.0) -> Any:
    return pyro.optim.SGD({"lr": rate})


def draws(program: Any) -> Any:
    return poutine.infer_config(program, lambda site: {"enumerate": None})


def leaves() -> dict[str, Tensor]:
    store = pyro.get_param_store()
    return {name: store._params[name].detach().clone() for name in store}


def followed(phase: Callable[[], Any]) -> dict[str, Tensor]:
    """The gradient that a phase followed with a rate of 1, by parameter; unconstrained. Parameters are put back."""
    before = leaves()
    phase()
    after = leaves()
    with torch.no_grad():
        for name, value in before.items():
            pyro.get_param_store()._params[name].copy_(value)
    return {name: before[name] - after[name] for name in before}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], atol: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


def of(names: Any, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values at some names, zero elsewhere."""
    return {name: value if name in names else torch.zeros_like(value) for name, value in values.items()}


def read_by(program: Any, *args: Any, **kwargs: Any) -> set[str]:
    """The parameters that a program reads, in whichever branch."""
    runs = [poutine.trace(program, param_only=True).get_trace(*args, **kwargs) for _ in range(40)]
    return {name for run in runs for name in run.param_nodes}


def net(u: Tensor) -> None:
    """Two layers: three causes, two of them bits of a vector, and two visible bits."""
    with pyro.plate("data", len(u)):
        top = categorical("top", simplex("top_probs", 2, seed=1))
        mid = pyro.sample("mid", dist.Bernoulli(logits=real("down", 2, 2, seed=2)[top]).to_event(1))
        logits = mid @ real("weight", 2, 2, seed=3) + real("bias", 2, seed=4)
        pyro.sample("u", dist.Bernoulli(logits=logits).to_event(1), obs=u)


def net_guide(u: Tensor) -> None:
    with pyro.plate("data", len(u)):
        logits = u @ real("up", 2, 2, seed=5) + real("up_bias", 2, seed=6)
        mid = pyro.sample("mid", dist.Bernoulli(logits=logits).to_event(1))
        pyro.sample("top", dist.Categorical(logits=mid @ real("further_up", 2, 2, seed=7)))


def half_drawn_guide(u: Tensor) -> None:
    """`net_guide` with one layer drawn and one enumerated."""
    with pyro.plate("data", len(u)):
        logits = u @ real("up", 2, 2, seed=5) + real("up_bias", 2, seed=6)
        mid = pyro.sample("mid", dist.Bernoulli(logits=logits).to_event(1), infer={"enumerate": None})
        pyro.sample("top", dist.Categorical(logits=mid @ real("further_up", 2, 2, seed=7)))


def batched(u: Tensor, index: Tensor) -> None:
    """A mini-batch of 12 data."""
    with pyro.plate("data", 12, subsample=index):
        z = categorical("z", simplex("weights", 3, seed=1))
        pyro.sample("u", dist.Normal(real("means", 3, seed=2)[z], 1.0), obs=u)


def batched_guide(u: Tensor, index: Tensor) -> None:
    with pyro.plate("data", 12, subsample=index):
        logits = u.unsqueeze(-1) * real("slope", 3, seed=3) + real("level", 3, seed=4)
        pyro.sample("z", dist.Categorical(logits=logits))


BATCH = (noise(4, seed=9), torch.tensor([3, 7, 0, 11]))


@pytest.mark.parametrize("name", GUIDED)
def test_wake_phases_follow_the_gradients_of_energy_and_surprise(name: str) -> None:
    program = PROGRAMS[name]
    args, kwargs = program.args, program.kwargs
    table = oracle(program.model, program.guide, *args, scaled_plate=program.scaled_plate, **kwargs)
    of_model = read_by(program.model, *args, **kwargs)
    # Before a phase writes into the parameters.
    expected = {term: table.gradients(term) for term in ("energy", "surprise")}
    of_guide = {key: 0.25 * value for key, value in gradients(expected_guide_loss(table)).items()}
    for term, options in (("energy", {}), ("surprise", {"reweighted": True, "insomnia": 0.0})):
        machine = vfe.WakeSleep(program.model, program.guide, sgd(), sgd(), **options)
        losses: list[float] = []
        found = followed(lambda machine=machine, losses=losses: losses.append(machine.wake(*args, **kwargs)))
        assert losses[0] == pytest.approx(table.terms[term].item(), rel=1e-9, abs=1e-9)
        assert_same(found, of(of_model, expected[term]))
    if program.scaled_plate is None and name != "zeros_in_logits_guided":
        machine = vfe.WakeSleep(program.model, program.guide, sgd(), sgd(), reweighted=True, insomnia=0.25)
        found = followed(lambda: machine.wake(*args, **kwargs))
        assert_same(of(found.keys() - of_model, found), of(found.keys() - of_model, of_guide))


def expected_guide_loss(table: Any) -> Tensor:
    """-E log Q under the exact posterior, held fixed."""
    expected = torch.zeros(())
    for guide_rows, model_rows in matches(table.guide, table.model):
        log_joint = log_sum_exp(row.log_joint for row in model_rows).detach()
        probability = (log_joint - table.posterior.log_evidence).exp()
        log_q = log_sum_exp(row.log_joint for row in guide_rows)
        expected = expected + torch.where(probability > 0, probability * log_q, 0.0)
    return -expected


def test_a_drawn_wake_phase_is_the_gradient_at_its_draw() -> None:
    machine = vfe.WakeSleep(net, draws(net_guide), sgd(), sgd(), num_particles=2)
    machine._machine.look((BITS,), {})
    pyro.set_rng_seed(4)
    energies = []
    for _ in range(2):
        run = poutine.trace(draws(net_guide)).get_trace(BITS)
        energies.append(-poutine.trace(poutine.replay(net, run)).get_trace(BITS).log_prob_sum())
    energy = torch.stack(energies).mean()
    expected = of(read_by(net, BITS), gradients(energy))
    pyro.set_rng_seed(4)
    losses: list[float] = []
    assert_same(followed(lambda: losses.append(machine.wake(BITS))), expected)
    assert losses[0] == pytest.approx(energy.item())


def log_ratios(model: Any, guide: Any, args: tuple[Any, ...], count: int) -> tuple[Tensor, Tensor]:
    """Unscaled log P and log Q of draws by Pyro's own handlers, shape `(count, data)`, with gradients."""
    joint, recognised = [], []
    for _ in range(count):
        one = poutine.trace(guide).get_trace(*args)
        two = poutine.trace(poutine.replay(model, one)).get_trace(*args)
        for trace, into in ((one, recognised), (two, joint)):
            trace.compute_log_prob()
            sites = [site for site in trace.nodes.values() if site["type"] == "sample" and "unscaled_log_prob" in site]
            scored = [s["unscaled_log_prob"] for s in sites if type(s["fn"]).__name__ != "_Subsample"]
            into.append(sum(scored, torch.zeros(())))
    return torch.stack(joint), torch.stack(recognised)


@pytest.mark.parametrize(
    ("model", "guide", "args", "scale"),
    [(net, net_guide, (BITS,), 1.0), (batched, batched_guide, BATCH, 3.0)],
    ids=["net", "mini-batch"],
)
def test_draws_are_weighed_datum_by_datum(model: Any, guide: Any, args: tuple[Any, ...], scale: float) -> None:
    machine = vfe.WakeSleep(model, draws(guide), sgd(), sgd(), num_particles=4, reweighted=True, insomnia=0.3)
    machine._machine.look(args, {})
    pyro.set_rng_seed(5)
    log_p, log_q = log_ratios(model, guide, args, 4)
    weights = (log_p - log_q).detach().softmax(0)
    of_model = read_by(model, *args)
    by_model, by_guide = (gradients(-scale * (weights * own).sum()) for own in (log_p, log_q))
    expected = {name: by_model[name] if name in of_model else 0.3 * by_guide[name] for name in by_model}
    surprise = -scale * ((log_p - log_q).logsumexp(0) - np.log(4)).sum()
    pyro.set_rng_seed(5)
    losses: list[float] = []
    assert_same(followed(lambda: losses.append(machine.wake(*args))), expected)
    assert losses[0] == pytest.approx(surprise.item())


def test_a_latent_outside_of_the_data_makes_them_one_datum() -> None:
    def model(u: Tensor) -> None:
        shift = bernoulli("shift", real("odds").sigmoid())
        with pyro.plate("data", 4):
            z = bernoulli("z", 0.4)
            pyro.sample("u", dist.Normal(shift + real("size", seed=1) * z, 1.0), obs=u)

    def guide(u: Tensor) -> None:
        bernoulli("shift", real("q_odds", seed=2).sigmoid())
        with pyro.plate("data", 4):
            bernoulli("z", (real("q_size", seed=3) * u).sigmoid())

    u = noise(4, seed=1)
    machine = vfe.WakeSleep(model, draws(guide), sgd(), sgd(), num_particles=3, reweighted=True, insomnia=1.0)
    machine._machine.look((u,), {})
    pyro.set_rng_seed(5)
    pairs = []
    for _ in range(3):
        one = poutine.trace(draws(guide)).get_trace(u)
        pairs.append((poutine.trace(poutine.replay(model, one)).get_trace(u).log_prob_sum(), one.log_prob_sum()))
    log_p, log_q = (torch.stack(own) for own in zip(*pairs, strict=True))
    weights = (log_p - log_q).detach().softmax(0)
    by_model, by_guide = (gradients(-(weights * own).sum()) for own in (log_p, log_q))
    of_model = read_by(model, u)
    expected = {name: (by_model if name in of_model else by_guide)[name] for name in by_model}
    pyro.set_rng_seed(5)
    assert_same(followed(lambda: machine.wake(u)), expected)


def test_what_is_enumerated_is_summed_inside_each_weighted_draw() -> None:
    machine = vfe.WakeSleep(net, half_drawn_guide, sgd(), sgd(), num_particles=3, reweighted=True, insomnia=1.0)
    machine._machine.look((BITS,), {})

    def joint(mid: Tensor, top: int) -> tuple[Tensor, Tensor]:
        values = {"mid": mid, "top": torch.full((len(BITS),), top)}
        both = []
        for program in (net, half_drawn_guide):
            trace = poutine.trace(poutine.condition(program, data=values)).get_trace(BITS)
            trace.compute_log_prob()
            both.append(sum(trace.nodes[s]["unscaled_log_prob"] for s in ("mid", "top", "u") if s in trace.nodes))
        return both[0], both[1]

    machine.wake(BITS)  # The first look, which draws nothing, is behind.
    pyro.set_rng_seed(6)
    log_weights, by_draw = [], []
    for _ in range(3):
        mid = poutine.trace(half_drawn_guide).get_trace(BITS).nodes["mid"]["value"]
        pyro.set_rng_seed(int(torch.randint(10**6, ())))
        log_p, log_q = (torch.stack(own) for own in zip(*(joint(mid, top) for top in (0, 1)), strict=True))
        posterior = log_p.detach().softmax(0)
        log_weights.append((log_p.logsumexp(0) - log_q.logsumexp(0)).detach())
        by_draw.append((mid, log_p.logsumexp(0), (posterior * log_q).sum(0)))
    drawn = iter([mid for mid, _, _ in by_draw])

    class Fixed(poutine.messenger.Messenger):
        def _pyro_sample(self, msg: Any) -> None:
            if msg["name"] == "mid" and not msg["is_observed"]:
                msg["value"], msg["done"] = next(drawn), True

    weights = torch.stack(log_weights).softmax(0)
    of_model = read_by(net, BITS)
    model = -sum((weight * own).sum() for weight, (_, own, _) in zip(weights, by_draw, strict=True))
    guide = -sum((weight * own).sum() for weight, (_, _, own) in zip(weights, by_draw, strict=True))
    by_model, by_guide = gradients(model), gradients(guide)
    expected = {name: (by_model if name in of_model else by_guide)[name] for name in by_model}
    fixed = Fixed()(half_drawn_guide)
    again = vfe.WakeSleep(net, fixed, sgd(), sgd(), num_particles=3, reweighted=True, insomnia=1.0, check=False)
    look = iter([torch.zeros(len(BITS), 2)] * 100)
    held, drawn = drawn, look
    again._machine.look((BITS,), {})
    again._machine.programs.enumerate(again._machine.model, again._machine.learning_guide, (BITS,), {})
    drawn = held
    assert_same(followed(lambda: again.wake(BITS)), expected)


def test_reweighted_gradients_are_those_of_pyro_where_it_applies() -> None:
    def model(u: Tensor) -> None:
        z = categorical("z", simplex("weights", 3, seed=1))
        pyro.sample("u", dist.Normal(real("means", 3, seed=2)[z], 1.0), obs=u)

    def guide(u: Tensor) -> None:
        pyro.sample("z", dist.Categorical(logits=u * real("slope", 3, seed=3)), infer={"enumerate": None})

    u = tensor(0.7)
    machine = vfe.WakeSleep(model, guide, sgd(), sgd(), num_particles=5, reweighted=True, insomnia=1.0)
    machine._machine.look((u,), {})
    pyro.set_rng_seed(8)
    theirs, _ = ReweightedWakeSleep(num_particles=5, insomnia=1.0, vectorize_particles=False).loss_and_grads(
        model, guide, u
    )
    store = pyro.get_param_store()
    expected = {name: store._params[name].grad.clone() for name in store}
    for name in store:
        store._params[name].grad = None
    pyro.set_rng_seed(8)
    losses: list[float] = []
    assert_same(followed(lambda: losses.append(machine.wake(u))), expected)
    assert losses[0] == pytest.approx(theirs)


def test_a_guide_that_rules_out_what_the_data_do_not_cannot_learn_from_them() -> None:
    program = PROGRAMS["zeros_in_logits_guided"]
    machine = vfe.WakeSleep(program.model, program.guide, sgd(), sgd(), reweighted=True)
    with pytest.raises(NotFiniteError, match=r"wake phase of step 1.*probability zero to values of the latents"):
        machine.wake(*program.args)
    machine = vfe.WakeSleep(program.model, program.guide, sgd(), sgd(), reweighted=True, insomnia=0.0)
    assert np.isfinite(machine.wake(*program.args))


def test_latents_of_the_guide_alone_above_a_plate_are_refused_where_they_cannot_be_summed() -> None:
    program = PROGRAMS["auxiliary_site_above_a_plate"]
    machine = vfe.WakeSleep(program.model, program.guide, sgd(), sgd(), reweighted=True)
    with pytest.raises(StructureError, match="latents of its own that tie the elements of a plate"):
        machine.wake(*program.args)


def small(u: Tensor) -> None:
    with pyro.plate("data", len(u)):
        v = categorical("v", simplex("v_probs", 3, seed=1))
        pyro.sample("u", dist.Categorical(simplex("u_probs", 3, 2, seed=2)[v]), obs=u)


def small_guide(u: Tensor) -> None:
    with pyro.plate("data", len(u)):
        categorical("v", simplex("q", 2, 3, seed=3)[u])


def expected_sleep_gradient() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradient of E_P[-log Q] of one dream, and its standard deviation over dreams, from all dreams."""
    u = torch.zeros(1, dtype=torch.long)
    small(u), small_guide(u)  # Makes the parameters.
    prior, emission = pyro.param("v_probs").detach(), pyro.param("u_probs").detach()
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    for v, seen in product(range(3), range(2)):
        found = gradients(-pyro.param("q")[seen, v].log())
        for name, gradient in found.items():
            probability = prior[v] * emission[v, seen]
            first[name] = first.get(name, 0) + probability * gradient
            second[name] = second.get(name, 0) + probability * gradient**2
    return first, {name: (second[name] - first[name] ** 2).clamp(min=0).sqrt() for name in first}


def test_a_sleep_phase_follows_the_gradient_over_all_dreams() -> None:
    expected, spread = expected_sleep_gradient()
    number = 20_000
    machine = vfe.WakeSleep(small, small_guide, sgd(), sgd())
    found = followed(lambda: machine.sleep(torch.zeros(number, dtype=torch.long)))
    for name, gradient in expected.items():
        assert bool(((found[name] / number - gradient).abs() <= 5 * spread[name] / number**0.5).all())
    assert bool((spread["q"] > 0).any())
    assert not found["v_probs"].any()
    assert not found["u_probs"].any()


def test_the_loss_of_given_dreams_averages_to_the_expectation_over_all_of_them() -> None:
    expected, _ = expected_sleep_gradient()
    machine = Machine(small, small_guide, check="first", max_bytes=None, on_cost="raise", weighs_data=False)
    sleep = Sleep(machine, 1, None, 1.0)
    prior, emission = pyro.param("v_probs").detach(), pyro.param("u_probs").detach()
    loss = torch.zeros(())
    for v, seen in product(range(3), range(2)):
        u = torch.tensor([seen])
        made_up = Dream({"v": torch.tensor([v])}, {"u": u}, (u,), {})
        loss = loss + prior[v] * emission[v, seen] * sleep.loss(made_up)
    assert_same(gradients(loss), of({"q"}, expected))


def test_sleep_phases_average_over_dreams() -> None:
    u = torch.zeros(6, dtype=torch.long)
    machine = vfe.WakeSleep(small, small_guide, sgd(0.0), sgd(0.0), num_dreams=3)
    machine.sleep(u)
    pyro.set_rng_seed(2)
    losses = []
    for _ in range(3):
        made_up = vfe.dream(small, u)
        guided = poutine.condition(small_guide, data=dict(made_up.latents))
        losses.append(-poutine.trace(guided).get_trace(*made_up.args).log_prob_sum().item())
    pyro.set_rng_seed(2)
    assert machine.sleep(u) == pytest.approx(sum(losses) / 3)


def test_a_sleep_phase_of_a_mini_batch_counts_for_all_data() -> None:
    machine = vfe.WakeSleep(batched, batched_guide, sgd(0.0), sgd(0.0))
    machine.sleep(*BATCH)
    pyro.set_rng_seed(2)
    made_up = vfe.dream(batched, *BATCH)
    trace = poutine.trace(poutine.condition(batched_guide, data=dict(made_up.latents))).get_trace(*made_up.args)
    pyro.set_rng_seed(2)
    assert machine.sleep(*BATCH) == pytest.approx(-trace.log_prob_sum().item())
    trace.compute_log_prob()
    assert trace.log_prob_sum().item() == pytest.approx(3 * trace.nodes["z"]["unscaled_log_prob"].sum().item())


def test_model_and_guide_dream_of_the_same_elements_of_a_plate() -> None:
    def model(u: Tensor) -> None:
        with pyro.plate("data", 8, subsample_size=3) as index:
            z = categorical("z", simplex("weights", 2))
            pyro.sample("u", dist.Normal(10.0 * z, 0.1), obs=u[index])

    def guide(u: Tensor) -> None:
        with pyro.plate("data", 8, subsample_size=3) as index:
            pyro.sample("z", dist.Categorical(logits=torch.stack([torch.zeros(3), 10 * (u[index] - 5)], -1)))
        real("unused")

    machine = vfe.WakeSleep(model, guide, sgd(0.0), sgd(0.0))
    # Q sees the dreamt data of its own elements, or else it would be sure of the wrong component.
    assert max(machine.sleep(torch.full((8,), 10.0)) for _ in range(10)) < 1e-6


def test_latents_that_only_the_guide_has_are_summed_out_asleep() -> None:
    def guide(u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            coin = categorical("coin", simplex("coin_probs", 2, seed=4), is_auxiliary=True)
            categorical("v", simplex("q", 2, 2, 3, seed=3)[coin, u])

    u = torch.zeros(5, dtype=torch.long)
    machine = vfe.WakeSleep(small, guide, sgd(), sgd())
    machine._machine.look((u,), {})
    machine._sleep.step(1, (u,), {})
    pyro.set_rng_seed(3)
    made_up = vfe.dream(small, u)
    (dreamt,), v = made_up.args, made_up.latents["v"]
    log_q = (pyro.param("coin_probs") @ pyro.param("q")[:, dreamt, v]).log().sum()
    expected = of({"coin_probs", "q"}, gradients(-log_q))
    pyro.set_rng_seed(3)
    losses: list[float] = []
    assert_same(followed(lambda: losses.append(machine.sleep(u))), expected)
    assert losses[0] == pytest.approx(-log_q.item())


def test_latents_that_only_the_model_has_are_summed_awake_and_left_out_asleep() -> None:
    def guide(u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            pyro.sample("mid", dist.Bernoulli(logits=u @ real("up", 2, 2, seed=5)).to_event(1))

    table = oracle(net, guide, BITS[:1])
    expected = of(read_by(net, BITS), table.gradients("energy"))
    machine = vfe.WakeSleep(net, guide, sgd(), sgd())
    assert_same(followed(lambda: machine.wake(BITS[:1])), expected)
    before = leaves()
    assert np.isfinite(machine.sleep(BITS))
    assert [name for name, value in leaves().items() if not torch.equal(value, before[name])] == ["up"]


def test_a_parameter_of_both_programs_is_learned_awake() -> None:
    def model(u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            v = bernoulli("v", real("odds").sigmoid())
            pyro.sample("u", dist.Normal(v * real("size", seed=1), 1.0), obs=u)

    def guide(u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            bernoulli("v", (real("size", seed=1) * u + real("level", seed=2)).sigmoid())

    u = noise(5, seed=3)
    expected = gradients(poutine.trace(poutine.condition(model, data={"v": torch.ones(5)})).get_trace(u).log_prob_sum())
    assert expected["size"] != 0
    machine = vfe.WakeSleep(model, guide, sgd(0.1), sgd(0.1))
    held = poutine.trace(guide).get_trace(u).nodes["v"]["fn"].probs.detach()
    energy = torch.zeros(())
    for value in (0.0, 1.0):
        trace = poutine.trace(poutine.condition(model, data={"v": torch.full((5,), value)})).get_trace(u)
        trace.compute_log_prob()
        log_p = trace.nodes["v"]["log_prob"] + trace.nodes["u"]["log_prob"]
        energy = energy - (torch.where(torch.tensor(value > 0), held, 1 - held) * log_p).sum()
    expected = of({"odds", "size"}, {name: 0.1 * value for name, value in gradients(energy).items()})
    assert_same(followed(lambda: machine.wake(u)), {**expected, "level": torch.zeros(1)[0]})
    before = leaves()
    run = machine.run(u, num_steps=1, progress_bar=False)
    assert run.notes[:1] == (
        "Parameter 'size' is read by both programs: it is the model's, and sleep phases leave it as it is.",
    )
    before = leaves()
    machine.sleep(u)
    assert [name for name, value in leaves().items() if not torch.equal(value, before[name])] == ["level"]
    assert all(leaf.grad is None or not leaf.grad.any() for leaf in pyro.get_param_store()._params.values())


def adam(rate: float = 0.02) -> Any:
    return pyro.optim.Adam({"lr": rate})


def run_of(machine: vfe.WakeSleep, *args: Any, **options: Any) -> vfe.WakeSleepRun:
    return machine.run(*args, progress_bar=False, **options)


def same_leaves(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_is_a_loop_of_steps_and_looking_changes_nothing() -> None:
    ends = []
    for every in (1, 100, None):
        pyro.clear_param_store()
        machine = vfe.WakeSleep(net, draws(net_guide), adam(), adam(), num_particles=2, reweighted=True)
        machine._machine.look((BITS,), {})
        pyro.set_rng_seed(1)
        if every is None:
            losses = [machine.step(BITS) for _ in range(7)]
        else:
            losses = run_of(machine, BITS, num_steps=7, every=every).losses.tolist()
        ends.append((np.array(losses), leaves()))
    for losses, parameters in ends[1:]:
        np.testing.assert_array_equal(losses, ends[0][0])
        assert same_leaves(parameters, ends[0][1])


@pytest.mark.parametrize("guide", [net_guide, draws(net_guide), half_drawn_guide], ids=["summed", "drawn", "half"])
def test_the_history_has_the_exact_free_energy_after_each_phase(guide: Any) -> None:
    machine = vfe.WakeSleep(net, guide, adam(), adam())
    run = run_of(machine, BITS, num_steps=3, every=1)
    assert run.history.phase == ("start", "wake", "sleep", "wake", "sleep", "wake", "sleep")
    assert run.history.iteration.tolist() == [0, 1, 1, 2, 2, 3, 3]
    terms = vfe.FreeEnergy().decompose(net, net_guide, BITS)
    last = run.history.rows[-1]
    assert (last.free_energy, last.surprise, last.gap) == pytest.approx(
        tuple(float(term) for term in (terms.free_energy, terms.surprise, terms.gap))
    )
    assert run.history.num_data == len(BITS)
    assert not run.history.stderr.any()
    changes = run.history.d_free_energy
    np.testing.assert_allclose(changes[1:].sum(), run.history.free_energy[-1] - run.history.free_energy[0])
    np.testing.assert_allclose(run.changes_asleep, changes[2::2])
    np.testing.assert_allclose(run.history.of("sleep").surprise, run.history.of("wake").surprise)


def test_a_sleep_phase_raises_the_free_energy_where_dreams_are_unlike_the_data() -> None:
    def model(u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            v = bernoulli("v", 0.1)
            pyro.sample("u", dist.Normal(v, pyro.param("noise", torch.tensor(0.3))), obs=u)

    def guide(u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            bernoulli("v", pyro.param("logit", torch.tensor(2.0)).sigmoid())

    u = torch.ones(50)  # The data say v = 1, the dreams v = 0; Q is one number for both.
    machine = vfe.WakeSleep(model, guide, sgd(0.0), sgd(0.01))
    run = run_of(machine, u, num_steps=5, every=1)
    assert (run.changes_asleep > 0).all()
    np.testing.assert_allclose(run.history.d_gap[2::2], run.changes_asleep)
    np.testing.assert_allclose(run.history.of("wake").d_surprise[1:], 0.0, atol=1e-12)
    printed = str(run)
    assert (
        f"5 sleep phases read: together they changed F by {run.changes_asleep.sum():+,.4f} nats, 5 raised it" in printed
    )
    assert "phases" in run._repr_html_()
    assert "<table>" in run._repr_html_()


@pytest.mark.parametrize("options", [{}, {"reweighted": True, "insomnia": 0.5}], ids=["wake-sleep", "reweighted"])
def test_what_can_be_inverted_is_inverted(options: dict[str, Any]) -> None:
    u = torch.tensor([0, 0, 0, 1] * 500)
    machine = vfe.WakeSleep(small, small_guide, sgd(1e-4), sgd(2e-4), **options)
    start = vfe.FreeEnergy().decompose(small, small_guide, u).per_datum
    run_of(machine, u, num_steps=150, every=150)
    run = run_of(vfe.WakeSleep(small, small_guide, sgd(1e-4), sgd(2e-5), **options), u, num_steps=100, every=100)
    assert float(start.gap) > 0.05
    assert run.history.per_datum.gap[-1] < 1e-3
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert run.history.per_datum.surprise[-1] == pytest.approx(entropy, abs=1e-3)


def test_modules_learn_from_each_other() -> None:
    model, guide = MixtureModule(), RecognitionModule()
    points = POINTS.repeat(5, 1)

    def place(seen: Any, points: Tensor) -> Any:
        return (seen["u"],), {}

    machine = vfe.WakeSleep(model, guide, adam(0.01), adam(0.01), dream_to_args=place)
    run = run_of(machine, points, num_steps=60, every=20)
    assert run.history.surprise[-1] < run.history.surprise[0] - 1
    assert {name for name, how in run.updates.items() if how == "awake, by Adam"} == {
        name for name in run.params if name.startswith(("weights", "decoder"))
    }
    assert {name for name, how in run.updates.items() if how == "asleep, by Adam"} == {
        name for name in run.params if name.startswith(("encoder", "flip_logit"))
    }
    assert dict(model.named_parameters())["decoder.0.weight"].grad is None or not any(
        weight.grad is not None and weight.grad.any() for weight in model.parameters()
    )


class _Net(PyroModule):
    """A part called "net", in a module with a name or without."""

    def __init__(self, name: str, inputs: int, outputs: int) -> None:
        super().__init__(name)
        self.net = PyroModule[torch.nn.Linear](inputs, outputs)


class _Generative(_Net):
    def forward(self, u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            v = pyro.sample("v", dist.Bernoulli(0.5))
            pyro.sample("u", dist.Bernoulli(logits=self.net(v[..., None])).to_event(1), obs=u)


class _Recognition(_Net):
    def forward(self, u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            pyro.sample("v", dist.Bernoulli(logits=self.net(u).squeeze(-1)))


def train_by_wake_sleep(model: Any, guide: Any, u: Tensor) -> None:
    run_of(vfe.WakeSleep(model, guide, adam(0.01), adam(0.01)), u, num_steps=2)


def train_by_fit(model: Any, guide: Any, u: Tensor) -> None:
    vfe.fit(model, guide, u, optim=adam(0.01), num_steps=2, progress_bar=False)


@pytest.mark.parametrize("model_first", [True, False])
@pytest.mark.parametrize("train", [train_by_wake_sleep, train_by_fit])
def test_parts_of_two_modules_with_one_name_are_refused(train: Callable[..., None], model_first: bool) -> None:
    u = torch.eye(3)
    model, guide = _Generative("", 1, 3), _Recognition("", 3, 1)
    before = [own.detach().clone() for own in (*model.parameters(), *guide.parameters())]
    if model_first:
        model(u)
    with pytest.raises(NameClashError, match=r"'net\.bias', 'net\.weight'.*another by that name"):
        train(model, guide, u)
    after = [*model.parameters(), *guide.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    pyro.clear_param_store()
    model, guide = _Generative("model", 1, 3), _Recognition("guide", 3, 1)
    before = [own.detach().clone() for own in (*model.parameters(), *guide.parameters())]
    train(model, guide, u)
    after = [*model.parameters(), *guide.parameters()]
    assert not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_batches_are_cycled_and_read_at_held_out_data_where_there_are_any() -> None:
    everything = torch.arange(12)
    loader = DataLoader(TensorDataset(noise(12, seed=1), everything), batch_size=4, shuffle=True)
    machine = vfe.WakeSleep(batched, batched_guide, adam(), adam())
    run = run_of(machine, num_steps=7, batches=loader, every=1)
    assert run.losses.shape == (7, 2)
    assert run.notes == ("Each reading of F is of the batch of its step.",)
    held_out = (noise(12, seed=1), everything)
    run = run_of(machine, num_steps=3, batches=loader, held_out=held_out)
    terms = vfe.FreeEnergy().decompose(batched, batched_guide, *held_out)
    assert run.free_energy == pytest.approx(float(terms.free_energy))
    assert len(run.notes) == 1 and "Pyro's store had" in run.notes[0]
    with pytest.warns(VFEWarning, match=r"WakeSleep\.run did 2 of num_steps=5 steps.*batches ended"):
        run = run_of(machine, num_steps=5, batches=iter([BATCH, BATCH]), every=10)
    assert run.history.iteration.tolist() == [0, 1, 1, 2]
    assert run.stopped is not None


def test_a_run_tells_a_callback_and_stops_when_it_is_told() -> None:
    told: list[tuple[int, dict[str, Any]]] = []

    def stop(number: int, values: dict[str, Any]) -> bool:
        told.append((number, values))
        return number == 3

    machine = vfe.WakeSleep(net, net_guide, adam(), adam())
    run = run_of(machine, BITS, num_steps=10, every=1, callback=stop)
    assert (run.num_steps, run.stopped) == (3, "the callback asked for it")
    assert [(number, values["phase"]) for number, values in told][:3] == [(0, "start"), (1, "wake"), (1, "sleep")]
    assert told[-1][1]["free_energy/total"] == run.history.free_energy[-1]
    assert told[-1][1]["loss"] == run.losses[-1, 1]
    run = run_of(machine, BITS, num_steps=10, every=2, stop=vfe.GapBelow(1e6))
    assert run.num_steps == 1
    assert "below" in str(run.stopped)
    assert "wake-sleep: 1 step, stopped: the gap" in str(run)


def test_insomnia_leaves_sleep_phases_out() -> None:
    machine = vfe.WakeSleep(net, net_guide, adam(), adam(), reweighted=True, insomnia=1.0)
    losses = machine.step(BITS)
    assert np.isfinite(losses.wake)
    assert np.isnan(losses.sleep)
    run = run_of(machine, BITS, num_steps=40, every=1)
    assert set(run.history.phase) == {"start", "wake"}
    assert run.history.gap[-1] < run.history.gap[0]
    assert run.changes_asleep.size == 0
    assert "sleep phase" not in str(run)
    assert set(run.updates.values()) == {"awake, by Adam"}


def test_schedulers_take_one_step_per_step() -> None:
    def decaying() -> Any:
        return pyro.optim.ExponentialLR({"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.1}, "gamma": 0.5})

    def rates(optim: Any) -> set[float]:
        return {group["lr"] for own in optim.optim_objs.values() for group in own.optimizer.param_groups}

    for options in ({}, {"reweighted": True}, {"reweighted": True, "insomnia": 1.0}):
        pyro.clear_param_store()
        optims = decaying(), decaying()
        machine = vfe.WakeSleep(net, net_guide, *optims, **options)
        for _ in range(3):
            machine.step(BITS)
        assert [rates(optim) for optim in optims] == [{0.1 / 8}, {0.1 / 8}]


def test_a_failed_sleep_phase_takes_the_whole_step_back() -> None:
    def misnamed(data: Tensor) -> None:
        net(data)

    def guide(data: Tensor) -> None:
        net_guide(data)

    machine = vfe.WakeSleep(misnamed, guide, sgd(0.1), sgd(0.1))
    machine.wake(BITS)
    before = leaves()
    with pytest.raises(StructureError, match=r"In the sleep phase of step 1.*'u' is observed.*'data'.*dream_to_args"):
        machine.step(BITS)
    assert same_leaves(leaves(), before)
    assert all(leaf.grad is None or not leaf.grad.any() for leaf in pyro.get_param_store()._params.values())
    works = vfe.WakeSleep(misnamed, guide, sgd(0.1), sgd(0.1), dream_to_args=lambda seen, data: ((seen["u"],), {}))
    assert all(np.isfinite(works.step(BITS)))


@pytest.mark.parametrize("which", [0, 1])
def test_an_update_that_spoils_parameters_is_taken_back(which: int) -> None:
    rates = [0.1, 0.1]
    rates[which] = 1e308
    machine = vfe.WakeSleep(net, net_guide, *map(sgd, rates))
    machine._machine.look((BITS,), {})
    before = leaves()
    phase = ("wake", "sleep")[which]
    with pytest.raises(NotFiniteError, match=rf"In the {phase} phase of step \d.*infinite or NaN"):
        for _ in range(4):
            machine.step(BITS)
    assert all(bool(value.isfinite().all()) for value in leaves().values())
    assert before.keys() == leaves().keys()


def test_data_of_probability_zero_are_named_and_change_nothing() -> None:
    def model(u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            v = bernoulli("v", real("odds").sigmoid())
            pyro.sample("u", dist.Bernoulli(probs=torch.stack([torch.zeros(()), v.new_tensor(0.5)])[v.long()]), obs=u)

    def guide(u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            bernoulli("v", real("q").sigmoid())

    for own in (guide, draws(guide)):
        pyro.clear_param_store()
        machine = vfe.WakeSleep(model, own, sgd(), sgd())
        machine._machine.look((torch.ones(20),), {})
        before = leaves()
        with pytest.raises(NotFiniteError, match=r"In the wake phase of step 1.*'u'"):
            machine.step(torch.ones(20))
        assert same_leaves(leaves(), before)


def test_a_guide_that_rules_a_dream_out_is_named() -> None:
    def guide(u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            pyro.sample("v", dist.Categorical(tensor([0.5, 0.5, 0.0])))
        real("q")

    machine = vfe.WakeSleep(small, guide, sgd(0.0), sgd(0.0))
    with pytest.raises(NotFiniteError, match=r"In the sleep phase of step 1.*'v' of the guide.*probability zero"):
        machine.step(torch.zeros(50, dtype=torch.long))


def test_a_guide_with_continuous_sites_of_its_own_cannot_dream() -> None:
    def guide(u: Tensor) -> None:
        pyro.sample("noise", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        small_guide(u)

    machine = vfe.WakeSleep(small, guide, sgd(), sgd())
    with pytest.raises(StructureError, match=r"'noise' of the guide \(Normal\) is none of the model's"):
        machine.sleep(torch.zeros(3, dtype=torch.long))


TOO_SMALL = 50
"""Bytes that hold the tables of one layer of `net` for one datum, not of two."""

ONE = BITS[:1]


def test_what_fits_in_portions_of_the_data_is_summed_in_portions() -> None:
    def after_a_wake_phase(max_bytes: float | None) -> tuple[float, Tensor]:
        pyro.clear_param_store()
        machine = vfe.WakeSleep(net, net_guide, sgd(0.1), sgd(0.1), max_bytes=max_bytes)
        return machine.wake(BITS), torch.cat([pyro.param(name).detach().flatten() for name in ("down", "weight")])

    loss, parameters = after_a_wake_phase(None)
    with pytest.raises(CostError, match="made in portions"):
        vfe.posterior(net, BITS, max_bytes=100).marginal("top")
    portioned, same = after_a_wake_phase(100)
    assert portioned == pytest.approx(loss, rel=1e-12)
    assert torch.allclose(same, parameters, rtol=0, atol=1e-12)


def test_what_does_not_fit_is_sampled_where_that_is_wanted() -> None:
    with pytest.raises(CostError):
        vfe.WakeSleep(net, net_guide, sgd(0.1), sgd(0.1), max_bytes=TOO_SMALL).step(ONE)
    machine = vfe.WakeSleep(net, net_guide, adam(), adam(), max_bytes=TOO_SMALL, on_cost="sample")
    with pytest.warns(VFEWarning, match="would not fit, so .* drawn from the guide"):
        first = machine.step(ONE)
    exact = vfe.FreeEnergy().decompose(net, net_guide, ONE)
    energies = [vfe.WakeSleep.wake(machine, ONE) for _ in range(10)]
    assert np.isfinite(first).all()
    assert np.std(energies) > 0
    assert abs(np.mean(energies) - float(exact.energy)) < 10


def test_a_run_says_once_where_the_free_energy_is_an_estimate() -> None:
    machine = vfe.WakeSleep(net, net_guide, adam(), adam(), max_bytes=TOO_SMALL, on_cost="sample")
    with pytest.warns(VFEWarning, match="F is an estimate now"):
        run = run_of(machine, ONE, num_steps=3, every=1)
    assert np.isnan(run.history.stderr).all()
    assert run.changes_asleep.size == 0
    assert "sleep phases read" not in str(run)


def test_a_run_says_once_where_the_free_energy_cannot_be_known() -> None:
    """The wake phase draws what a reading would have to sum."""
    machine = vfe.WakeSleep(net, draws(net_guide), adam(), adam(), max_bytes=TOO_SMALL)
    with pytest.warns(VFEWarning, match=r"Before the first step.*cannot be taken apart") as warned:
        run = run_of(machine, ONE, num_steps=3, every=1)
    assert len(warned) == 1
    assert np.isnan(run.history.free_energy).all()
    assert len(run.notes) == 1
    assert "F is not known" in str(run)


def test_a_particle_alone_cannot_be_weighed() -> None:
    with pytest.raises(VFEError, match="one particle: weights that sum to 1"):
        vfe.WakeSleep(net, draws(net_guide), sgd(), sgd(), reweighted=True).step(BITS)


def test_programs_without_parameters_are_refused() -> None:
    def model(u: Tensor) -> None:
        bernoulli("v", 0.5)
        pyro.sample("u", dist.Bernoulli(0.5), obs=u)

    def guide(u: Tensor) -> None:
        bernoulli("v", 0.5)

    with pytest.raises(VFEError, match="wake-sleep has nothing to change"):
        run_of(vfe.WakeSleep(model, guide, sgd(), sgd()), tensor(1.0), num_steps=2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"guide": None}, "no guide"),
        ({"model": BITS}, "cannot be called"),
        ({"optim_guide": torch.optim.Adam}, "optim_guide= is torch's own Adam"),
        ({"optim_model": 0.1}, r"optim_model= is 0\.1"),
        ({"num_particles": 0}, "num_particles is 0"),
        ({"num_dreams": 0}, "num_dreams is 0"),
        ({"insomnia": 1.5}, "insomnia is 1.5"),
        ({"on_cost": "ignore"}, "on_cost='ignore'"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_options_that_mean_nothing_are_refused(change: dict[str, Any], words: str) -> None:
    options = {"model": net, "guide": net_guide, "optim_model": sgd(), "optim_guide": sgd(), **change}
    with pytest.raises(VFEError, match=words):
        vfe.WakeSleep(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_steps": 0}, r"WakeSleep\.run was given num_steps=0"),
        ({"num_steps": 2, "every": 0}, r"every=0"),
        ({"num_steps": 2, "batches": [BITS]}, r"batches= and 1 positional"),
        ({"num_steps": 2, "stop": "now"}, "no stop rule"),
    ],
    ids=["num_steps", "every", "batches", "stop"],
)
def test_runs_that_mean_nothing_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(VFEError, match=words):
        run_of(vfe.WakeSleep(net, net_guide, sgd(), sgd()), BITS, **options)


def test_a_history_of_wake_and_sleep_is_printed_drawn_and_kept_by_step() -> None:
    from matplotlib import pyplot

    run = run_of(vfe.WakeSleep(net, net_guide, adam(), adam()), BITS, num_steps=4, every=1)
    assert str(run.history).split()[:3] == ["step", "phase", "F"]
    dataset = run.history.to_xarray()
    assert dataset.phase.values.tolist() == list(run.history.phase)
    np.testing.assert_array_equal(dataset.d_free_energy[2::2], run.changes_asleep)
    ax = vfe.plot_free_energy(run.history)
    assert ax.get_xlabel() == "step"
    marks = {str(line.get_label()): line.get_xdata() for line in ax.get_lines()}
    np.testing.assert_array_equal(marks["after a wake phase"], [0.5, 1.5, 2.5, 3.5])
    np.testing.assert_array_equal(marks["after a sleep phase"], [1, 2, 3, 4])
    pyplot.close(ax.figure)


@pytest.mark.parametrize("learns", [False, True], ids=["the exact posterior", "tables of its own"])
def test_a_run_notes_a_guide_that_has_nothing_to_learn(learns: bool) -> None:
    def model(u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            v = pyro.sample("v", dist.Bernoulli(pyro.param("p", tensor(0.4))))
            pyro.sample("u", dist.Bernoulli(0.2 + 0.6 * v), obs=u)

    guide = vfe.AutoMeanField(model) if learns else vfe.AutoPosterior(model)
    machine = vfe.WakeSleep(model, guide, pyro.optim.Adam({"lr": 0.01}), pyro.optim.Adam({"lr": 0.01}))
    run = machine.run(FIRST, num_steps=1, progress_bar=False)
    assert any("no parameters of its own" in note for note in run.notes) == (not learns)


PRESENT = torch.tensor([True, True, False, True, False])


def masked_model(u: Tensor) -> None:
    with pyro.plate("data", len(u)), poutine.mask(mask=PRESENT):
        v = bernoulli("v", 0.3)
        pyro.sample("u", dist.Normal(2 * v, 1.0), obs=u)


def unmasked_guide(u: Tensor) -> None:
    with pyro.plate("data", len(u)):
        pyro.sample("v", dist.Bernoulli(logits=real("slope") * u))


def guide_masked_alike(u: Tensor) -> None:
    with poutine.mask(mask=PRESENT):
        unmasked_guide(u)


@pytest.mark.parametrize("phase", ["wake", "sleep"])
def test_a_guide_that_draws_needs_no_mask_of_its_own(phase: str) -> None:
    """What the model masks does not exist: the guide's log-probability of it counts nowhere."""
    u, found = tensor([0.5, -1.0, 2.0, 0.3, 1.1]), []
    for guide in (unmasked_guide, guide_masked_alike):
        pyro.set_rng_seed(0)
        machine = vfe.WakeSleep(masked_model, draws(guide), sgd(), sgd(), reweighted=True, num_particles=4)
        loss = getattr(machine, phase)(u)
        found.append(
            torch.stack([tensor(loss), *(value.detach().sum() for _, value in pyro.get_param_store().items())])
        )
        pyro.clear_param_store()
    torch.testing.assert_close(*found)


def test_draws_that_the_model_alone_masks_pass_the_spot_check() -> None:
    u, found = tensor([0.5, -1.0, 2.0, 0.3, 1.1]), []
    for guide in (unmasked_guide, guide_masked_alike):
        pyro.set_rng_seed(0)
        found.append(vfe.bounds(masked_model, draws(guide), u, num_particles=5).lower)
    torch.testing.assert_close(*found)


def test_elements_that_read_each_others_draws_are_refused_where_each_is_weighed() -> None:
    def model(u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            v = bernoulli("v", 0.3)
            pyro.sample("u", dist.Normal(v.roll(1, -1), 1.0), obs=u)

    machine = vfe.WakeSleep(model, draws(unmasked_guide), sgd(), sgd(), reweighted=True, num_particles=4)
    before = torch.get_rng_state()
    with pytest.raises(SpotCheckError, match="'data'"):
        machine.wake(tensor([0.5, -1.0, 2.0]))
    assert torch.equal(before, torch.get_rng_state())
