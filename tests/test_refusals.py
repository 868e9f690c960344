"""Refusals that no other test provokes: each, switched off, would leave a number without a word."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import oracle
from programs.case import bernoulli, categorical, empty, positive, simplex, tensor, unit
from programs.supports import COUNTS as CALLS
from programs.supports import alarm, guide_that_misses_the_or
from torch import Tensor
from torch.distributions import constraints

import pyro_vfe as vfe
from pyro_vfe.engine import Factor, FactorGraph, Table, Variable, log_normalizer
from pyro_vfe.engine.structure import previous
from pyro_vfe.errors import (
    CostError,
    MissingGuideSiteError,
    NotFiniteError,
    PlateError,
    ScaleError,
    StructureError,
    SupportError,
    UnenumerableError,
    VFEError,
    VFEWarning,
)
from pyro_vfe.program import branches

RATES = tensor([1.0, 5.0, 9.0])
COUNTS = tensor([4.0, 0.0, 7.0])
HALF = tensor([0.5, 0.5])
DRAWN: dict[str, Any] = {"enumerate": None}

# A read that stops varying: what provenance says of a site, and its table no longer shows.

COLLAPSED: dict[str, Callable[[Tensor], Tensor]] = {
    "the first entry": lambda z: z.reshape(-1)[0],
    "the largest of all values": lambda z: z.max(),
    "the sum of all values": lambda z: z.sum() % 3,
}


@pytest.mark.parametrize("ask", ["loss", "decompose", "differentiable_loss"])
@pytest.mark.parametrize("read", COLLAPSED)
def test_a_read_that_stops_varying_at_a_later_call_is_looked_at_anew(read: str, ask: str) -> None:
    """Scalars in an ordinary run, all of these are the latent itself; enumerated, they are one of its values."""

    def model(collapses: bool) -> None:
        z = categorical("z", tensor([0.2, 0.3, 0.5]))
        pyro.sample("u", dist.Poisson(RATES[COLLAPSED[read](z) if collapses else z]), obs=tensor(4.0))

    elbo = vfe.FreeEnergy()
    before = getattr(elbo, ask)(model, empty, False)
    with pytest.warns(VFEWarning, match="they run 3 times"):
        after = getattr(elbo, ask)(model, empty, True)
    one, other = (float(getattr(found, "free_energy", found)) for found in (before, after))
    assert one == pytest.approx(other, rel=1e-12)


def test_a_read_that_rightly_stops_varying_keeps_its_number() -> None:
    def model(rates: Tensor) -> None:
        z = categorical("z", tensor([0.2, 0.3, 0.5]))
        pyro.sample("u", dist.Poisson(rates[z]), obs=tensor(4.0))

    elbo = vfe.FreeEnergy()
    for rates in (RATES, torch.full((3,), 5.0), RATES):
        expected = float(oracle(model, empty, rates).terms["surprise"].detach())
        assert elbo.loss(model, empty, rates) == pytest.approx(expected)


# Weights of the guide's latents inside a plate, under a latent that only the model has.


def weighted(scale: float, with_group: bool, is_model: bool) -> None:
    g = categorical("g", simplex("groups" if is_model else "q_g", 2, seed=1)) if with_group else torch.tensor(0)
    with pyro.plate("data", 3), pyro.poutine.scale(scale=scale):
        probs = simplex("members", 2, 3, seed=2)[g] if is_model else simplex("q_z", 3, 3, seed=3)
        z = categorical("z", probs)
        if is_model:
            pyro.sample("u", dist.Poisson(RATES[z]), obs=COUNTS)


def weighted_model(scale: float) -> None:
    weighted(scale, True, True)


def guide_of_members(scale: float) -> None:
    weighted(scale, False, False)


def guide_of_both(scale: float) -> None:
    weighted(scale, True, False)


@pytest.mark.parametrize("ask", ["loss", "loss_and_grads", "decompose"])
def test_weighted_latents_of_the_guide_may_not_lie_under_a_latent_of_the_model_alone(ask: str) -> None:
    with pytest.raises(ScaleError, match="'g'"):
        getattr(vfe.FreeEnergy(), ask)(weighted_model, guide_of_members, 2.0)


@pytest.mark.parametrize(("scale", "guide"), [(2.0, guide_of_both), (1.0, guide_of_members)])
def test_the_guide_may_have_both_or_the_plate_no_weight(scale: float, guide: Callable[..., Any]) -> None:
    expected = oracle(weighted_model, guide, scale, scaled_plate="data").terms["free_energy"]
    assert vfe.FreeEnergy().loss(weighted_model, guide, scale) == pytest.approx(float(expected.detach()))


# Programs that no look can serve.


def loss_of(model: Callable[..., Any], guide: Callable[..., Any] = empty) -> float:
    return vfe.FreeEnergy(strict_enumeration_warning=False).loss(model, guide)


def normal(name: str, loc: Tensor | float, *shape: int) -> None:
    """A datum that is zero."""
    pyro.sample(name, dist.Normal(torch.as_tensor(loc).double(), 1.0), obs=torch.zeros(shape))


def scaled(name: str, scale: float) -> Tensor:
    with pyro.poutine.scale(scale=scale):
        return categorical("z", simplex(name, 2))


def in_branches_of_two_sizes() -> None:
    size = 2 if bernoulli("a", 0.4).item() else 3
    with pyro.plate("data", size, subsample_size=size - 1):
        normal(f"u_{size}", 0.0, size - 1)


def in_branches_of_two_orders() -> None:
    names = ("x", "y") if bernoulli("a", 0.4).item() else ("y", "x")
    for name in names:
        bernoulli(name, 0.3)


def in_branches_of_two_supports() -> None:
    categorical("x", torch.ones(3 if bernoulli("a", 0.4).item() else 2))


def branching() -> Tensor:
    a = bernoulli("a", 0.4)
    return a + bernoulli("b", 0.3) if a.item() else a


def branching_the_other_way() -> None:
    if bernoulli("a", unit("q_a")).item() == 0:
        bernoulli("b", unit("q_b"))


def read_after_the_branch() -> None:
    branching()
    bernoulli("c", 0.5)


def guide_of_all_branches() -> None:
    bernoulli("a", unit("q_a"))
    bernoulli("c", unit("q_c", 2)[bernoulli("b", unit("q_b")).long()])


def unequal_counts() -> None:
    with pyro.plate("data", 2):
        pyro.sample("n", dist.Binomial(tensor([1.0, 2.0]), tensor(0.5)))


def chain(name: str, transition: Tensor, num_steps: int | None = None) -> Tensor:
    return pyro.sample(name, vfe.MarkovChain(HALF, transition, num_steps=num_steps))


def chain_scaled_by_step() -> None:
    with pyro.plate("time", 3), pyro.poutine.scale(scale=tensor([1.0, 2.0, 1.0])):
        chain("z", simplex("transition", 2, 2))


def chains_of_unlike_plates(prefix: str) -> None:
    with pyro.plate("time", 3, dim=-1):
        a = chain("a", simplex(f"{prefix}_a", 2, 2))
        with pyro.plate("sequences", 2, dim=-2):
            chain("b", simplex(f"{prefix}_b", 2, 2, 2, seed=1)[a], 3)


def chain_beside_sequences() -> None:
    sequences, time = pyro.plate("sequences", 2, dim=-2), pyro.plate("time", 3, dim=-1)
    with sequences:
        c = categorical("c", HALF)
    with time:
        z = chain("z", simplex("transition", 2, 2))
        with sequences:
            normal("u", z + 2 * c, 2, 3)


def guide_of_sequences() -> None:
    with pyro.plate("sequences", 2, dim=-2):
        categorical("c", simplex("q_c", 2, 1, 2))


def chain_under_crossing_latents() -> None:
    sequences, time = pyro.plate("sequences", 2, dim=-2), pyro.plate("time", 3, dim=-1)
    with sequences:
        b = categorical("b", HALF)
    with time:
        a = categorical("a", simplex("a", 2, 2)[chain("z", simplex("transition", 2, 2))])
        with sequences:
            normal("u", a + 2 * b, 2, 3)


def guide_of_the_chain() -> None:
    with pyro.plate("time", 3):
        chain("z", simplex("q", 2, 2))


def draw_above_crossing_latents() -> None:
    rows, columns = pyro.plate("rows", 2, dim=-1), pyro.plate("columns", 2, dim=-2)
    with rows:
        v, a = categorical("v", HALF), bernoulli("a", 0.3)
        w = pyro.sample("w", dist.Normal(v.double(), 1.0))
    with columns:
        b = bernoulli("b", 0.4)
    with rows, columns:
        normal("u", a + b + w + v, 2, 2)


def guide_of_the_draw() -> None:
    with pyro.plate("rows", 2):
        pyro.sample("w", dist.Normal(categorical("v", simplex("q", 2)).double(), 1.0))


def two_draws() -> None:
    pyro.sample("a", dist.Bernoulli(0.5))
    pyro.sample("b", dist.Bernoulli(0.5))


def guide_of_changing_layers() -> None:
    a = pyro.sample("a", dist.Bernoulli(unit("p")), infer=DRAWN)
    probs = unit("q", 2)[a.long()] if torch.rand(()) < 0.5 else unit("r")
    pyro.sample("b", dist.Bernoulli(probs), infer=DRAWN)


def disarm(model: Callable[..., Any], guide: Callable[..., Any]) -> float:
    elbo = vfe.FreeEnergy(gradient="disarm", num_particles=20, strict_enumeration_warning=False)
    return elbo.loss(model, guide)


def branching_four_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branches, "MAX_RUNS", 8)
    loss_of(lambda: [bernoulli(f"z_{n}", 0.3).item() for n in range(4)])


# Learning


def mixture(u: Tensor, name: str = "p") -> None:
    z = categorical("z", simplex(name, 2))
    pyro.sample("u", dist.Poisson(positive("rates", 2)[z]), obs=u)


def guide_of_the_mixture(u: Tensor) -> None:
    categorical("z", simplex("p", 2))


def with_a_probability(u: Tensor) -> None:
    r = pyro.sample("r", dist.Beta(2.0, 2.0))
    pyro.sample("u", dist.Bernoulli(r * (0.5 + 0.5 * categorical("z", HALF))), obs=u)


def point_that_feeds_a_latent(u: Tensor) -> None:
    r = unit("point")
    pyro.sample("r", dist.Delta(r))
    categorical("z", torch.stack([r, 1 - r]))


def point_of_infinite_density(u: Tensor) -> None:
    pyro.sample("r", dist.Delta(unit("point"), log_density=tensor(torch.inf)))


def auxiliary_draw(u: Tensor) -> None:
    probs = pyro.sample("own", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True}).sigmoid()
    mood = categorical("mood", HALF, is_auxiliary=True)
    yes = probs * unit("q") * (0.5 + 0.5 * mood)
    categorical("z", torch.stack([yes, 1 - yes], -1))


def with_bounded_rates(u: Tensor) -> None:
    rates = pyro.param("rates", tensor([1.0, 2.0]), constraint=constraints.interval(0.0, 5.0))
    with pyro.plate("data", len(u)):
        pyro.sample("u", dist.Poisson(rates[categorical("z", HALF)]), obs=u)


def em(model: Callable[..., Any], guide: Callable[..., Any] | None, *args: Any, **options: Any) -> Any:
    return vfe.EM(model, guide, **options).run(*args, max_iter=2, progress_bar=False)


def wake_sleep(model: Callable[..., Any], guide: Callable[..., Any], *args: Any) -> Any:
    adam = pyro.optim.Adam({"lr": 0.1})
    return vfe.WakeSleep(model, guide, adam, adam).run(*args, num_steps=1, progress_bar=False)


def doubled(u: Tensor) -> None:
    with pyro.plate("data", 4, subsample=torch.tensor([1, 3])) as index:
        pyro.sample("u", dist.Normal(0.0, 1.0), obs=2 * u[index])


def structured_marginals() -> Tensor:
    guide = vfe.AutoStructured(mixture)
    guide(tensor(3.0))
    return guide.initial_probabilities("z")


# The engine, by itself

NOWHERE, TIME = frozenset[str](), frozenset(["time"])
BY_STEP = Table(tensor([1.0, 2.0, 1.0]), ("time",))


def graph(*factors: Factor, **plates: frozenset[str]) -> FactorGraph:
    variables = {name: Variable(name, 2, own) for name, own in plates.items()}
    return FactorGraph(factors, variables, {})


def scaled_by_step() -> FactorGraph:
    pairs = Table(torch.zeros(2, 2), (previous("z"), "z"))
    z = Variable("z", 2, TIME, BY_STEP, "time")
    return FactorGraph((Factor("z", pairs, TIME, BY_STEP, Table(torch.zeros(2), ("z",))),), {"z": z}, {"time": 3})


Refusal = tuple[Callable[[], Any], type[Exception], str]

REFUSALS: dict[str, Refusal] = {
    "scales": (
        lambda: loss_of(lambda: scaled("p", 2.0), lambda: scaled("q", 1.0)),
        ScaleError,
        "'z' has different scales",
    ),
    "sizes of a plate": (lambda: loss_of(in_branches_of_two_sizes), StructureError, "'data' has another size"),
    "orders of sites": (lambda: loss_of(in_branches_of_two_orders), StructureError, "'x'.*the other order"),
    "supports in branches": (lambda: loss_of(in_branches_of_two_supports), SupportError, "'x' has 2 values.*3"),
    "other branches of the guide": (
        lambda: loss_of(branching, branching_the_other_way),
        StructureError,
        "model has latent site 'b' in a branch where the guide",
    ),
    "a latent read where the model lacks it": (
        lambda: loss_of(read_after_the_branch, guide_of_all_branches),
        StructureError,
        "'b' in a branch where the model has not, and 'c' reads it",
    ),
    "unequal supports in a plate": (
        lambda: loss_of(unequal_counts),
        UnenumerableError,
        "'n' is Binomial, whose elements",
    ),
    "chains of unlike plates in the guide": (
        lambda: loss_of(lambda: chains_of_unlike_plates("p"), lambda: chains_of_unlike_plates("q")),
        PlateError,
        "'a' in the plates.*'b' in the plates.*depend on each other",
    ),
    "a chain under a latent of sequences": (
        lambda: loss_of(chain_beside_sequences, guide_of_sequences),
        PlateError,
        "'z'.*is tied to 'c'.*which is not summed",
    ),
    "a chain that would be written out": (
        lambda: loss_of(chain_under_crossing_latents, guide_of_the_chain),
        PlateError,
        "'z' is a chain along plate 'time'.*written out",
    ),
    "a draw above crossing latents": (
        lambda: vfe.FreeEnergy().decompose(draw_above_crossing_latents, guide_of_the_draw),
        StructureError,
        "has no decomposition here",
    ),
    "layers of particles": (
        lambda: disarm(two_draws, guide_of_changing_layers),
        StructureError,
        "differs from one particle",
    ),
    "no particles": (lambda: vfe.FreeEnergy(0), VFEError, "num_particles is 0"),
    "traces": (lambda: vfe.FreeEnergy()._get_trace(two_draws, empty, (), {}), NotImplementedError, "not traces"),
    "a parameter of both programs": (
        lambda: em(mixture, guide_of_the_mixture, tensor(3.0)),
        StructureError,
        "'p' is read by the model and by the guide's site 'z'",
    ),
    "a point that feeds a latent": (
        lambda: em(with_a_probability, point_that_feeds_a_latent, tensor(1.0)),
        StructureError,
        "'point' of the guide is a point estimate and feeds its site 'z'",
    ),
    "a point of infinite density": (
        lambda: em(with_a_probability, point_of_infinite_density, tensor(1.0)),
        NotFiniteError,
        "F is inf after the E-phase",
    ),
    "mass on the impossible in an E-phase": (
        lambda: em(
            alarm,
            guide_that_misses_the_or,
            CALLS,
            e_phase=vfe.Gradient(pyro.optim.Adam({"lr": 0.1}), 1),
        ),
        NotFiniteError,
        "'rings' has probability zero",
    ),
    "a bound that a batch crosses": (
        lambda: vfe.EM(with_bounded_rates).run_batches([COUNTS // 3, 10 * COUNTS], progress_bar=False),
        VFEError,
        "'rates' .the closed form violates its constraint",
    ),
    "a draw that no dream has": (
        lambda: wake_sleep(mixture, auxiliary_draw, tensor(3.0)),
        StructureError,
        "'own' of the guide.*a dream has no value for it",
    ),
    "data computed from a subsample": (
        lambda: vfe.dream(doubled, torch.ones(4)),
        StructureError,
        "'u' observes other values",
    ),
    "a scale along a chain of the program": (
        lambda: loss_of(chain_scaled_by_step),
        ScaleError,
        "'z' is a MarkovChain whose scale varies",
    ),
    "the beginning of no chain": (structured_marginals, StructureError, "'z' is no chain"),
    "no networks": (lambda: vfe.AutoAmortized(mixture, {}), StructureError, "given no network"),
    "an axis named twice": (lambda: Table(torch.zeros(2, 2), ("a", "a")), VFEError, "the axes"),
    "a plate without a size": (lambda: graph(a=TIME).check(), VFEError, "'a' is in the plates .'time'., whose sizes"),
    "an axis of nothing": (
        lambda: graph(Factor("f", Table(torch.zeros(2), ("b",)), NOWHERE)).check(),
        VFEError,
        "'f' has an axis 'b'",
    ),
    "a scale of another plate": (
        lambda: FactorGraph((), {"a": Variable("a", 2, NOWHERE, BY_STEP)}, {"time": 3}).check(),
        VFEError,
        "'a' has a scale that varies with 'time'",
    ),
    "a scale along a chain": (lambda: log_normalizer(scaled_by_step()), VFEError, "'z' is a chain.*its scale varies"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_has_no_answer_is_refused_in_words(name: str) -> None:
    ask, error, words = REFUSALS[name]
    with pytest.raises(error, match=words):
        ask()


def test_a_program_of_too_many_paths_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CostError, match=r"'z_0'.*more than 8 times"):
        branching_four_times(monkeypatch)


@pytest.mark.parametrize("check", ["first", False])
def test_a_latent_of_the_guide_that_the_model_observes_is_refused_also_without_a_check(check: Any) -> None:
    """A latent that was enumerated stays observed where the model says so."""

    def model() -> None:
        pyro.sample("z", dist.Categorical(HALF), obs=torch.tensor(1))

    with pytest.raises(StructureError, match="'z' is observed in the model and sampled in the guide"):
        vfe.FreeEnergy(check=check).loss(model, lambda: categorical("z", simplex("q", 2)))


# Programs that are no longer what they were at the first call.


def missing_value(is_read: bool) -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    normal("u", bernoulli("z", 0.3) + (x if is_read else 0.0))


def later_latent(is_there: bool) -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0)) if is_there else tensor(0.0)
    normal("u", bernoulli("z", 0.3) + x)


def plated(is_left: bool) -> None:
    with pyro.plate("data", 30):
        z = categorical("z", HALF)
        if not is_left:
            normal("u", z, 30)
    if is_left:
        normal("u", z[..., 0])


def data(is_alone: bool) -> None:
    z = categorical("z", HALF)
    if is_alone:
        normal("u", z, 3)
    else:
        with pyro.plate("data", 3):
            normal("u", z, 3)


def values_without_a_latent(is_gone: bool) -> None:
    z = torch.arange(2)[:, None] if is_gone else categorical("z", HALF)
    with pyro.plate("data", 3):
        normal("u", z, 3)


def in_a_plate(is_outside: bool) -> None:
    with pyro.plate("data", 3):
        normal("u", categorical("z", HALF), 3)


def guide_that_leaves_the_plate(is_outside: bool) -> None:
    if is_outside:
        categorical("z", simplex("q", 2))
    else:
        with pyro.plate("data", 3):
            categorical("z", simplex("q", 2))


LATER: dict[str, tuple[Callable[[bool], None], Callable[[bool], None], type[VFEError], str]] = {
    "a missing value is read": (missing_value, empty, MissingGuideSiteError, "'x' is Normal"),
    "a latent that nobody draws appears": (later_latent, empty, MissingGuideSiteError, "'x' is Normal"),
    "a reader leaves the plate": (
        plated,
        empty,
        PlateError,
        "'u' of the model reads latent 'z' from outside plate 'data'",
    ),
    "data leave the plate": (data, empty, StructureError, "'u'.*its dim -1 is no plate around it"),
    "a latent goes and its values stay": (values_without_a_latent, empty, StructureError, "'u'.*dim -2 is no plate"),
    "a latent of the guide leaves the plate": (
        in_a_plate,
        guide_that_leaves_the_plate,
        StructureError,
        "'z' lies in the plates",
    ),
}


@pytest.mark.parametrize("check", ["first", False])
@pytest.mark.parametrize("name", LATER)
def test_a_program_that_changes_for_the_worse_is_refused_at_the_next_call(name: str, check: Any) -> None:
    model, guide, error, words = LATER[name]
    elbo = vfe.FreeEnergy(check=check)
    assert elbo.loss(model, guide, False) > 0
    with pytest.raises(error, match=words):
        elbo.loss(model, guide, True)


def test_a_latent_may_move_to_a_plate_further_left() -> None:
    """To a dim that was a latent's, and as long as its values are many."""

    def model(is_far: bool) -> None:
        with pyro.plate("data", 2, dim=-2 if is_far else -1):
            z = categorical("z", tensor([0.2, 0.8]))
            pyro.sample("u", dist.Normal(z.double(), 1.0), obs=tensor([[0.5], [3.0]] if is_far else [0.5, 3.0]))

    elbo = vfe.FreeEnergy(check=False)
    near, far = (elbo.loss(model, empty, is_far) for is_far in (False, True))
    assert near == pytest.approx(far)
