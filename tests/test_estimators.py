r"""Gradients of draws are unbiased, exactly: the average of the estimator over all outcomes of its draws, weighted by
their probabilities, is the gradient of the loss.

sum over outcomes of  P(outcome) estimate(outcome)  =  gradient of  sum over outcomes of  P(outcome) loss(outcome)

For F the right side is the full joint table, which enumerates what the library was told to draw; for the bound of many
particles it is the sum over all tuples of draws, written out by hand.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import gradients, oracle
from outcomes import outcomes
from programs.case import real, tensor, unit
from torch import Tensor

import pyro_vfe as vfe
from pyro_vfe.errors import NotFiniteError, ScaleError, StructureError, VFEError, VFEWarning

DRAWN = {"enumerate": None}
POINTS = tensor([0.5, -1.0])
Program = Callable[[], Any]


def bernoulli(name: str, logits: Tensor, drawn: bool = True) -> Tensor:
    return pyro.sample(name, dist.Bernoulli(logits=logits), infer=dict(DRAWN) if drawn else {})


def vector(name: str, logits: Tensor, drawn: bool = True) -> Tensor:
    return pyro.sample(name, dist.Bernoulli(logits=logits).to_event(1), infer=dict(DRAWN) if drawn else {})


def categorical(name: str, logits: Tensor) -> Tensor:
    return pyro.sample(name, dist.Categorical(logits=logits), infer=dict(DRAWN))


def observe(mean: Tensor, data: Tensor = POINTS) -> None:
    pyro.sample("u", dist.Normal(mean, 0.8), obs=data)


def in_plate() -> None:
    """A draw per datum, and a latent that the model sums given it."""
    with pyro.plate("data", 2):
        b = bernoulli("b", real("b_logits"))
        v = bernoulli("v", real("v_logits", 2, seed=1)[b.long()], drawn=False)
        observe(real("means", 2, seed=2)[v.long()] + 1.5 * b)


def in_plate_guide() -> None:
    with pyro.plate("data", 2):
        b = bernoulli("b", real("q_b", 2, seed=3))
        bernoulli("v", real("q_v", 2, 2, seed=4)[b.long(), torch.arange(2)], drawn=False)


def by_probs_guide() -> None:
    with pyro.plate("data", 2):
        b = pyro.sample("b", dist.Bernoulli(unit("q_b", 2, seed=3)), infer=dict(DRAWN))
        bernoulli("v", real("q_v", 2, seed=4)[b.long()], drawn=False)


def after_v_guide() -> None:
    """The draw depends on a latent that is enumerated: it is made for each of its values."""
    with pyro.plate("data", 2):
        v = bernoulli("v", real("q_v", 2, seed=4), drawn=False)
        bernoulli("b", real("q_b", 2, seed=3)[v.long()])


def vectors() -> None:
    with pyro.plate("data", 2):
        b = vector("b", real("b_logits", 2))
        observe((b * real("weights", 2, seed=1)).sum(-1) + b.prod(-1))


def vectors_guide() -> None:
    with pyro.plate("data", 2):
        vector("b", real("q_b", 2, 2, seed=3))


def layered(drawn_top: bool = True, drawn_mid: bool = True) -> Program:
    def model() -> None:
        top = bernoulli("top", real("top_logits"), drawn_top)
        mid = vector("mid", real("mid_logits", 2, seed=1) + real("mid_weights", 2, seed=2) * top[..., None], drawn_mid)
        observe((mid * real("weights", 2, seed=5)).sum(-1) + mid.prod(-1), POINTS[0])

    return model


def layered_guide(drawn_top: bool = True, drawn_mid: bool = True) -> Program:
    def guide() -> None:
        mid = vector("mid", real("q_mid", 2, seed=3), drawn_mid)
        bernoulli("top", (mid * real("q_top", 2, seed=4)).sum(-1) + real("q_bias", seed=6), drawn_top)

    return guide


def through_v() -> None:
    """A latent that is enumerated stands between two draws: its probabilities depend on the one, the other on it."""
    a = bernoulli("a", real("a_logits"))
    v = bernoulli("v", real("v_logits", 2, seed=1)[a.long()], drawn=False)
    b = bernoulli("b", real("b_logits", 2, seed=2)[v.long()])
    observe(a + real("means", 2, seed=5)[v.long()] * (1 + b), POINTS[0])


def through_v_guide() -> None:
    a = bernoulli("a", real("q_a", seed=3))
    v = bernoulli("v", real("q_v", 2, seed=4)[a.long()], drawn=False)
    bernoulli("b", real("q_b", 2, seed=6)[v.long()])


def read_from_outside() -> None:
    with pyro.plate("units", 2):
        b = bernoulli("b", real("b_logits"))
    v = bernoulli("v", real("slope", seed=1) * b.sum(-1, keepdim=True), drawn=False)
    observe(b.prod(-1, keepdim=True) + real("mean", seed=2) * v, POINTS[0])


def read_from_outside_guide() -> None:
    with pyro.plate("units", 2):
        b = bernoulli("b", real("q_b", 2, seed=3))
    bernoulli("v", real("q_v", seed=4) * b.sum(-1, keepdim=True), drawn=False)


def families() -> None:
    """Draws of other families before and after a Bernoulli one."""
    c = categorical("c", real("c_logits", 3))
    b = bernoulli("b", real("b_logits", seed=1))
    d = categorical("d", real("d_logits", 2, 2, seed=2)[b.long()])
    observe(real("means", 3, seed=5)[c] * (1 + b) - d, POINTS[0])


def families_guide() -> None:
    c = categorical("c", real("q_c", 3, seed=3))
    b = bernoulli("b", real("q_b", 3, seed=4)[c])
    categorical("d", real("q_d", 2, 2, seed=6)[b.long()])


PROGRAMS: dict[str, tuple[Program, Program]] = {
    "in_plate": (in_plate, in_plate_guide),
    "by_probs": (in_plate, by_probs_guide),
    "after_v": (in_plate, after_v_guide),
    "vectors": (vectors, vectors_guide),
    "layered": (layered(), layered_guide()),
    "top_enumerated": (layered(drawn_top=False), layered_guide(drawn_top=False)),
    "through_v": (through_v, through_v_guide),
    "read_from_outside": (read_from_outside, read_from_outside_guide),
    "families": (families, families_guide),
}

ONE: dict[str, Any] = {}
TWO: dict[str, Any] = {"num_particles": 2}
SIDE_BY_SIDE: dict[str, Any] = {"num_particles": 2, "vectorize_particles": True}


def free_energy(**options: Any) -> vfe.FreeEnergy:
    return vfe.FreeEnergy(check=False, strict_enumeration_warning=False, **options)


def estimates(model: Program, guide: Program, options: dict[str, Any]) -> list[tuple[float, Tensor, dict[str, Tensor]]]:
    """All outcomes: their probabilities, and the estimates of the loss and of its gradient."""
    elbo = free_energy(**options)
    elbo.loss(model, guide)  # the programs are laid out by runs of their own

    def estimate() -> tuple[Tensor, dict[str, Tensor]]:
        loss = elbo.differentiable_loss(model, guide)
        return loss.detach(), gradients(loss)

    return [(probability, *found) for probability, found in outcomes(estimate)]


def averaged(
    found: list[tuple[float, Tensor, dict[str, Tensor]]],
) -> tuple[float, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The sum of the probabilities, the mean loss and gradient, and the gradient's variance."""
    mass = sum(probability for probability, *_ in found)
    loss = torch.stack([probability * value for probability, value, _ in found]).sum()
    mean = {name: torch.stack([p * own[name] for p, _, own in found]).sum(0) for name in found[0][2]}
    square = {name: torch.stack([p * own[name] ** 2 for p, _, own in found]).sum(0) for name in found[0][2]}
    return mass, loss, mean, {name: square[name] - mean[name] ** 2 for name in mean}


def total_variance(model: Program, guide: Program, options: dict[str, Any]) -> float:
    """The variance of the gradient, summed over all parameters."""
    return float(sum(own.sum() for own in averaged(estimates(model, guide, options))[3].values()))


CASES = [
    *((name, "leave-one-out", ONE) for name in PROGRAMS),
    *((name, "leave-one-out", TWO) for name in ("in_plate", "layered", "through_v", "read_from_outside")),
    *((name, "leave-one-out", SIDE_BY_SIDE) for name in PROGRAMS if name != "families"),
    *((name, "disarm", ONE) for name in PROGRAMS),
    *((name, "disarm", SIDE_BY_SIDE) for name in ("top_enumerated", "read_from_outside")),
    *((name, "disarm", TWO) for name in ("top_enumerated", "read_from_outside")),
]


@pytest.mark.parametrize(
    ("name", "gradient", "options"),
    CASES,
    ids=[f"{n}-{g}-{'side_by_side' if 'vectorize_particles' in o else len(o) + 1}" for n, g, o in CASES],
)
def test_the_average_over_all_outcomes_is_the_full_joint_table(
    name: str, gradient: str, options: dict[str, Any]
) -> None:
    model, guide = PROGRAMS[name]
    mass, loss, found, _ = averaged(estimates(model, guide, {"gradient": gradient, **options}))
    exact = oracle(model, guide)
    assert mass == pytest.approx(1.0)
    torch.testing.assert_close(loss, exact.terms["free_energy"].detach())
    assert found.keys() == exact.gradients().keys()
    for parameter, expected in exact.gradients().items():
        torch.testing.assert_close(found[parameter], expected, msg=lambda text, p=parameter: f"{p}: {text}")


def in_batches() -> None:
    with pyro.plate("data", 2, subsample_size=1) as n:
        observe(1.5 * bernoulli("b", real("b_logits")), POINTS[n])


def in_batches_guide() -> None:
    with pyro.plate("data", 2, subsample_size=1) as n:
        bernoulli("b", real("q_b", 2, seed=3)[n])


def whole() -> None:
    with pyro.plate("data", 2):
        observe(1.5 * bernoulli("b", real("b_logits")))


def whole_guide() -> None:
    with pyro.plate("data", 2):
        bernoulli("b", real("q_b", 2, seed=3))


@pytest.mark.parametrize("gradient", ["leave-one-out", "disarm"])
@pytest.mark.parametrize("options", [ONE, SIDE_BY_SIDE], ids=["one", "side_by_side"])
def test_batches_average_to_all_the_data(gradient: str, options: dict[str, Any]) -> None:
    """The mirror image of a batch is of the same batch."""
    mass, loss, found, _ = averaged(estimates(in_batches, in_batches_guide, {"gradient": gradient, **options}))
    exact = oracle(whole, whole_guide)
    assert mass == pytest.approx(1.0)
    torch.testing.assert_close(loss, exact.terms["free_energy"].detach())
    for parameter, expected in exact.gradients().items():
        torch.testing.assert_close(found[parameter], expected)


def test_a_draw_that_the_model_masks_has_no_gradient() -> None:
    mask = tensor([1.0, 0.0]).bool()

    def model() -> None:
        with pyro.plate("data", 2), pyro.poutine.mask(mask=mask):
            b = bernoulli("b", real("b_logits"))
            observe(1.5 * b)

    def guide() -> None:
        with pyro.plate("data", 2):
            bernoulli("b", real("q_b", 2, seed=3))

    for gradient in ("leave-one-out", "disarm"):
        _, loss, found, _ = averaged(estimates(model, guide, {"gradient": gradient}))
        q = real("q_b").sigmoid()[0]
        p = real("b_logits").sigmoid()
        data = dist.Normal(tensor([0.0, 1.5]), 0.8).log_prob(POINTS[0])
        expected = (1 - q) * (torch.log((1 - q) / (1 - p)) - data[0]) + q * (torch.log(q / p) - data[1])
        torch.testing.assert_close(loss, expected.detach())
        for parameter, exact in gradients(expected).items():
            torch.testing.assert_close(found[parameter], exact)


def test_draws_that_are_certain_have_no_image() -> None:
    def model() -> None:
        b = bernoulli("b", tensor(0.3))
        observe(b * real("mean"), POINTS[0])

    def guide() -> None:
        pyro.sample("b", dist.Bernoulli(tensor(1.0)), infer=dict(DRAWN))

    found = estimates(model, guide, {"gradient": "disarm"})
    assert [probability for probability, *_ in found] == [1.0]
    exact = oracle(model, guide)
    torch.testing.assert_close(found[0][1], exact.terms["free_energy"].detach())
    torch.testing.assert_close(found[0][2]["mean"], exact.gradients()["mean"])


def pathwise() -> None:
    with pyro.plate("data", 1):
        z = pyro.sample("z", dist.Normal(0.3, 1.5))
        b = bernoulli("b", real("slope") * z)
        y = pyro.sample("y", dist.Normal(b, 1.0))
        observe(z * (1 + b) + y, POINTS[0])


def pathwise_guide() -> None:
    """A pathwise draw before the discrete one, and one after it."""
    with pyro.plate("data", 1):
        z = pyro.sample("z", dist.Normal(real("loc", seed=1), 0.7))
        b = bernoulli("b", real("tilt", seed=3) * z)
        pyro.sample("y", dist.Normal(real("locs", 2, seed=4)[b.long()], 0.6))


def log_bernoulli(logits: Tensor) -> Tensor:
    """log P(0) and log P(1), shape `(*logits, 2)`."""
    return torch.stack([torch.nn.functional.logsigmoid(-logits), torch.nn.functional.logsigmoid(logits)], -1)


Draws = tuple[Tensor, Tensor]
"""The probability of each outcome of one particle's draws and F given it, shape `(data, outcomes)`."""


def pathwise_draws() -> Draws:
    noises, b = tensor([-1.0, 1.0]), tensor([0.0, 1.0])
    z = real("loc") + 0.7 * noises
    y = real("locs")[:, None] + 0.6 * noises
    log_q_b = log_bernoulli(real("tilt") * z)[:, :, None]
    q_z, q_y = dist.Normal(real("loc"), 0.7), dist.Normal(real("locs")[:, None], 0.6)
    log_q = q_z.log_prob(z)[:, None, None] + log_q_b + q_y.log_prob(y)
    log_p = dist.Normal(0.3, 1.5).log_prob(z)[:, None, None] + log_bernoulli(real("slope") * z)[:, :, None]
    log_p = log_p + dist.Normal(b[:, None], 1.0).log_prob(y)
    log_p = log_p + dist.Normal(z[:, None, None] * (1 + b[:, None]) + y, 0.8).log_prob(POINTS[0])
    return (log_q_b.exp() / 4).expand(2, 2, 2).reshape(1, -1), (log_q - log_p).reshape(1, -1)


@pytest.mark.parametrize("gradient", ["leave-one-out", "disarm"])
def test_pathwise_draws_keep_their_pathwise_gradients(gradient: str) -> None:
    _, loss, found, _ = averaged(estimates(pathwise, pathwise_guide, {"gradient": gradient}))
    probs, free_energies = pathwise_draws()
    expected = (probs * free_energies).sum()
    torch.testing.assert_close(loss, expected.detach())
    for parameter, exact in gradients(expected).items():
        torch.testing.assert_close(found[parameter], exact)


def log_data(means: Tensor) -> Tensor:
    """log P(u | mean) of both data, shape `(2, *means)`."""
    return dist.Normal(means, 0.8).log_prob(POINTS.reshape(2, *(1,) * means.dim()))


def in_plate_draws() -> Draws:
    values = tensor([0.0, 1.0])
    log_q_b, log_q_v = log_bernoulli(real("q_b")), log_bernoulli(real("q_v").T)
    log_p = log_bernoulli(real("b_logits"))[:, None] + log_bernoulli(real("v_logits"))
    log_p = log_p + log_data(real("means") + 1.5 * values[:, None])
    return log_q_b.exp(), log_q_b + (log_q_v.exp() * (log_q_v - log_p)).sum(-1)


def after_v_draws() -> Draws:
    """A draw is a b for each value of v."""
    b = torch.tensor(list(product((0, 1), repeat=2)))
    v = torch.arange(2)
    log_q_v, log_q_b = log_bernoulli(real("q_v")), log_bernoulli(real("q_b"))[v, b]
    log_p = log_bernoulli(real("b_logits"))[b] + log_bernoulli(real("v_logits"))[b, v]
    log_p = log_p + log_data(real("means")[v] + 1.5 * b)
    free_energies = (log_q_v.exp()[:, None] * (log_q_v[:, None] + log_q_b - log_p)).sum(-1)
    return log_q_b.sum(-1).exp().expand(2, 4), free_energies


def vectors_draws() -> Draws:
    b = torch.tensor(list(product((0.0, 1.0), repeat=2)))
    log_q = dist.Bernoulli(logits=real("q_b")[:, None]).to_event(1).log_prob(b)
    log_p = dist.Bernoulli(logits=real("b_logits")).to_event(1).log_prob(b)
    return log_q.exp(), log_q - log_p - log_data(b @ real("weights") + b.prod(-1))


def above_plate() -> None:
    """A draw for all data, and a latent of each that is enumerated given it."""
    b = bernoulli("b", real("b_logits"))
    with pyro.plate("data", 2):
        v = bernoulli("v", real("v_logits", 2, seed=1)[b.long()], drawn=False)
        observe(real("means", 2, seed=2)[v.long()] + 1.5 * b)


def above_plate_guide() -> None:
    b = bernoulli("b", real("q_b", seed=3))
    with pyro.plate("data", 2):
        bernoulli("v", real("q_v", 2, seed=4)[b.long()], drawn=False)


def above_plate_draws() -> Draws:
    values = tensor([0.0, 1.0])
    log_q_b, log_q_v = log_bernoulli(real("q_b")), log_bernoulli(real("q_v"))
    log_p = log_bernoulli(real("v_logits")) + log_data(real("means") + 1.5 * values[:, None])
    given_b = (log_q_v.exp() * (log_q_v - log_p)).sum((0, -1))
    return log_q_b.exp()[None], (log_q_b - log_bernoulli(real("b_logits")) + given_b)[None]


def subsampled(program: Program) -> Program:
    """The program on its second datum, which stands for both."""

    def half() -> None:
        with pyro.plate("data", 2, subsample=torch.tensor([1])):
            program()

    return half


def subsampled_model() -> None:
    b = bernoulli("b", real("b_logits"))
    observe(real("mean", seed=1) * b, POINTS[1:])


def subsampled_guide() -> None:
    bernoulli("b", real("q_b", seed=3))


def subsampled_draws() -> Draws:
    log_q = log_bernoulli(real("q_b"))
    log_p = log_bernoulli(real("b_logits")) + log_data(real("mean") * tensor([0.0, 1.0]))[1]
    return log_q.exp().expand(2, 2), (log_q - log_p).expand(2, 2)


def point_estimate() -> None:
    """What all data share is a point, which is nothing that is drawn: each datum has its own bound."""
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 2):
        observe(slope * bernoulli("b", real("b_logits")))


def point_estimate_guide() -> None:
    pyro.sample("slope", dist.Delta(real("point", seed=1)))
    with pyro.plate("data", 2):
        bernoulli("b", real("q_b", 2, seed=3))


def point_estimate_draws() -> Draws:
    log_q = log_bernoulli(real("q_b"))
    log_p = log_bernoulli(real("b_logits")) + log_data(real("point") * tensor([0.0, 1.0]))
    # Half of the point's own cost with each datum: it moves in and out of the logarithm.
    return log_q.exp(), log_q - log_p - dist.Normal(0.0, 1.0).log_prob(real("point")) / 2


def shared_v() -> None:
    """A latent of all data is enumerated, and each datum has a draw that depends on it."""
    v = bernoulli("v", real("v_logits"), drawn=False)
    with pyro.plate("data", 2):
        observe(bernoulli("b", real("b_logits", 2, seed=1)[v.long()]) + v)


def shared_v_guide() -> None:
    bernoulli("v", real("q_v", seed=2), drawn=False)
    with pyro.plate("data", 2):
        bernoulli("b", real("q_b", 2, seed=3))


def shared_v_draws() -> Draws:
    log_q_v, log_q_b = log_bernoulli(real("q_v")), log_bernoulli(real("q_b"))
    values = tensor([0.0, 1.0])
    log_p = log_bernoulli(real("b_logits")) + log_data(values + values[:, None])
    given_v = log_q_b[:, None] - log_p
    of_v = (log_q_v.exp() * (log_q_v - log_bernoulli(real("v_logits")))).sum()
    return log_q_b.exp(), (log_q_v.exp()[:, None] * given_v).sum(1) + of_v / 2


def whole_draws() -> Draws:
    log_q = log_bernoulli(real("q_b"))
    log_p = log_bernoulli(real("b_logits")) + log_data(1.5 * tensor([0.0, 1.0]))
    return log_q.exp(), log_q - log_p


BOUNDS: dict[str, tuple[Program, Program, Callable[[], Draws]]] = {
    "in_batches": (in_batches, in_batches_guide, whole_draws),
    "in_plate": (in_plate, in_plate_guide, in_plate_draws),
    "after_v": (in_plate, after_v_guide, after_v_draws),
    "vectors": (vectors, vectors_guide, vectors_draws),
    "above_plate": (above_plate, above_plate_guide, above_plate_draws),
    "subsampled": (subsampled(subsampled_model), subsampled(subsampled_guide), subsampled_draws),
    "point_estimate": (point_estimate, point_estimate_guide, point_estimate_draws),
    "shared_v": (shared_v, shared_v_guide, shared_v_draws),
    "pathwise": (pathwise, pathwise_guide, pathwise_draws),
}


def bound_of(draws: Draws, count: int) -> Tensor:
    """F_K, from all tuples of K draws."""
    probs, free_energies = draws
    tuples = torch.tensor(list(product(range(probs.shape[1]), repeat=count)))
    mean_weights = (-free_energies[:, tuples]).logsumexp(-1) - torch.tensor(float(count)).log()
    return -(probs[:, tuples].prod(-1) * mean_weights).sum()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {"num_particles": 2, "vectorize_particles": True}) for name in BOUNDS),
        *((name, {"num_particles": 2}) for name in ("in_plate", "above_plate", "point_estimate", "shared_v")),
        *((name, {"num_particles": 3}) for name in ("above_plate", "subsampled")),
        ("subsampled", {"num_particles": 4, "vectorize_particles": True}),
    ],
)
def test_vimco_averages_to_the_bound_of_all_tuples(name: str, options: dict[str, Any]) -> None:
    model, guide, draws = BOUNDS[name]
    mass, loss, found, _ = averaged(estimates(model, guide, {"gradient": "vimco", **options}))
    expected = bound_of(draws(), options["num_particles"])
    assert mass == pytest.approx(1.0)
    torch.testing.assert_close(loss, expected.detach())
    assert found.keys() == gradients(expected).keys()
    for parameter, exact in gradients(expected).items():
        torch.testing.assert_close(found[parameter], exact, msg=lambda text, p=parameter: f"{p}: {text}")


def test_more_particles_make_the_bound_tighter() -> None:
    model, guide, draws = BOUNDS["in_plate"]
    elbo = free_energy(num_particles=1)
    elbo.loss(model, guide)
    terms = oracle(model, guide).terms
    bounds = [bound_of(draws(), count) for count in (1, 2, 4)]
    torch.testing.assert_close(bounds[0], terms["free_energy"])
    assert bounds[0] > bounds[1] > bounds[2] > terms["surprise"]


def never() -> None:
    """A latent that is never 1."""
    with pyro.plate("data", 2):
        b = pyro.sample("b", dist.Bernoulli(tensor(0.0)), infer=dict(DRAWN))
        observe(b + real("mean"))


def sometimes() -> None:
    with pyro.plate("data", 2):
        bernoulli("b", real("q_b", 2, seed=3))


def test_a_particle_without_weight_leaves_the_gradient_finite() -> None:
    elbo = free_energy(num_particles=2, vectorize_particles=True, gradient="vimco")

    def estimate() -> tuple[Tensor, dict[str, Tensor]] | None:
        try:
            loss = elbo.differentiable_loss(never, sometimes)
        except NotFiniteError as error:
            assert "probability zero to what the guide drew at 'b' (" in str(error)
            return None
        return loss.detach(), gradients(loss)

    estimate()  # the programs are laid out by runs of their own
    found = list(outcomes(estimate))
    q = real("q_b").sigmoid().detach()
    # A datum both of whose particles are impossible has no bound.
    assert sum(probability for probability, one in found if one is None) == pytest.approx(float(1 - (1 - q**2).prod()))
    known = [one for _, one in found if one is not None]
    assert len(known) == 9
    for loss, gradient in known:
        assert bool(loss.isfinite())
        assert all(bool(own.isfinite().all()) for own in gradient.values())


@pytest.mark.parametrize("gradient", ["leave-one-out", "disarm"])
def test_an_impossible_draw_is_named(gradient: str) -> None:
    elbo = free_energy(gradient=gradient)
    with pytest.raises(NotFiniteError, match="what the guide drew at 'b' \\(data element"):
        for _ in range(100):
            elbo.loss(never, sometimes)
    with pytest.raises(NotFiniteError, match="what the guide drew at 'b'"):
        for _ in range(100):
            elbo.decompose(never, sometimes)


NO_DRAWS = layered(False, False), layered_guide(False, False)


@pytest.mark.parametrize("options", [{"gradient": "disarm"}, {"gradient": "vimco", **TWO}, SIDE_BY_SIDE])
def test_what_is_enumerated_is_exact_under_every_estimator(options: dict[str, Any]) -> None:
    exact = oracle(*NO_DRAWS)
    ((_, loss, found),) = estimates(*NO_DRAWS, options)
    torch.testing.assert_close(loss, exact.terms["free_energy"].detach())
    for parameter, expected in exact.gradients().items():
        torch.testing.assert_close(found[parameter], expected)


@pytest.mark.parametrize("gradient", ["leave-one-out", "disarm"])
def test_what_is_enumerated_adds_no_variance(gradient: str) -> None:
    """All drawn, the top alone enumerated, the middle alone, nothing drawn: the same net, the same gradient."""
    enumerated = [(True, True), (False, True), (True, False), (False, False)]
    both, mid, top, none = (
        total_variance(layered(*drawn), layered_guide(*drawn), {"gradient": gradient}) for drawn in enumerated
    )
    assert both > mid > none
    assert both > top > none
    assert none == pytest.approx(0.0, abs=1e-12)


def test_baselines_and_pairs_lower_the_variance() -> None:
    """Two runs of the programs each."""
    model, guide = PROGRAMS["vectors"]
    without_baseline = total_variance(model, guide, ONE) / 2
    leave_one_out = total_variance(model, guide, SIDE_BY_SIDE)
    pair = total_variance(model, guide, {"gradient": "disarm"})
    assert pair < leave_one_out < without_baseline


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gradient": "vimco"}, "num_particles is 1. Use num_particles=2 or more"),
        ({"gradient": "reinforce"}, "gradient=.reinforce."),
    ],
)
def test_an_estimator_that_cannot_be_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(VFEError, match=words):
        vfe.FreeEnergy(**options)


def test_the_bound_of_a_subsample_as_a_whole_is_refused() -> None:
    def model() -> None:
        b = bernoulli("b", tensor(0.0))
        with pyro.plate("data", 2, subsample=torch.tensor([1])):
            observe(b, POINTS[1:])

    def guide() -> None:
        bernoulli("b", real("q_b"))

    with pytest.raises(ScaleError, match="'b' and 'u' carry different weights"):
        free_energy(num_particles=2, gradient="vimco").loss(model, guide)


def test_programs_that_branch_have_no_pairs() -> None:
    def model() -> None:
        v = bernoulli("v", tensor(0.0), drawn=False)
        b = bernoulli("b", tensor(0.5) if v > 0 else tensor(-0.5))
        observe(b + v, POINTS[0])

    def guide() -> None:
        v = bernoulli("v", real("q_v"), drawn=False)
        bernoulli("b", real("q_1") if v > 0 else real("q_0"))

    with pytest.raises(StructureError, match='gradient="leave-one-out"'):
        free_energy(gradient="disarm").loss(model, guide)


@pytest.mark.parametrize("name", ["layered", "read_from_outside"])
def test_the_squared_standard_error_is_the_variance_of_the_mean(name: str) -> None:
    """On average over all outcomes of two independent runs."""
    model, guide = PROGRAMS[name]
    _, mean, *_ = averaged(single := estimates(model, guide, ONE))
    variance = sum(probability * (loss - mean) ** 2 for probability, loss, _ in single)
    elbo = free_energy(num_particles=2)
    elbo.decompose(model, guide)
    squared = torch.zeros(())
    for probability, terms in outcomes(lambda: elbo.decompose(model, guide)):
        assert terms.stderr is not None
        squared = squared + probability * terms.stderr**2
    torch.testing.assert_close(squared, torch.as_tensor(variance) / 2)


@pytest.mark.parametrize("name", ["layered", "through_v"])
def test_the_surprise_of_a_draw_is_an_upper_bound_on_average(name: str) -> None:
    """E[ log q(w) - log p(w, u) ] = surprise + KL( q(w) || p(w | u) ), and the rest of the gap is of v given w."""
    model, guide = PROGRAMS[name]
    elbo = free_energy()
    elbo.decompose(model, guide)
    found = [(probability, terms) for probability, terms in outcomes(lambda: elbo.decompose(model, guide))]
    exact = oracle(model, guide).terms
    surprise = sum(probability * terms.surprise for probability, terms in found)
    assert all(not terms.exact for _, terms in found)
    assert surprise > exact["surprise"]
    assert all("on average above -log p(u)" in str(terms) for _, terms in found)
    torch.testing.assert_close(sum(p * terms.free_energy for p, terms in found), exact["free_energy"].detach())


def undecomposable() -> None:
    with pyro.plate("time", 2):
        z = pyro.sample("z", vfe.MarkovChain(tensor([0.4, 0.6]), tensor([[0.7, 0.3], [0.2, 0.8]])))
        observe(bernoulli("b", real("b_logits", 2)[z.long()]) + z)


def undecomposable_guide() -> None:
    with pyro.plate("time", 2):
        z = pyro.sample("z", vfe.MarkovChain(tensor([0.5, 0.5]), tensor([[0.6, 0.4], [0.5, 0.5]])))
        bernoulli("b", real("q_b", 2, seed=1)[z.long()])


def test_a_history_holds_F_also_where_the_loss_is_another_bound() -> None:
    """F alone is read here, since it cannot be taken apart: not the loss that trains, and not the bound."""
    readings = []
    for gradient in ("leave-one-out", "vimco"):
        pyro.set_rng_seed(1)
        elbo = free_energy(num_particles=3, gradient=gradient)
        monitor = vfe.Monitor(undecomposable, undecomposable_guide, elbo=elbo, progress_bar=False)
        with monitor, pytest.warns(VFEWarning, match="cannot be taken apart"):
            monitor.step(99.0)
        readings.append(monitor.history.free_energy)
    torch.testing.assert_close(torch.as_tensor(readings[0]), torch.as_tensor(readings[1]))
    assert (torch.as_tensor(readings[0]) < 99).all()


def weighed_by_a_latent() -> tuple[Program, Program]:
    """How much a draw counts depends on a latent that is enumerated."""

    def model() -> None:
        v = bernoulli("v", real("v_logits"), drawn=False)
        with pyro.poutine.scale(scale=0.5 + v):
            b = bernoulli("b", real("b_logits"))
        observe(v + 1.5 * b, POINTS[0])

    def guide() -> None:
        v = bernoulli("v", real("q_v", seed=1), drawn=False)
        with pyro.poutine.scale(scale=0.5 + v):
            bernoulli("b", real("q_b", 2, seed=2)[v.long()])

    return model, guide


def masked_where_it_is_read() -> tuple[Program, Program]:
    """A draw costs nothing where it is masked, and is read all the same."""
    mask = tensor([1.0, 0.0]).bool()

    def model() -> None:
        with pyro.plate("data", 2):
            with pyro.poutine.mask(mask=mask):
                b = bernoulli("b", real("b_logits"))
            observe(1.5 * b)

    def guide() -> None:
        with pyro.plate("data", 2), pyro.poutine.mask(mask=mask):
            bernoulli("b", real("q_b", 2, seed=2))

    return model, guide


def summed_by_pyro(model: Program, guide: Program) -> Tensor:
    """The sum over all draws of their probability times what Pyro says that guide and model cost there."""

    def run() -> tuple[Tensor, Tensor]:
        with pyro.poutine.trace() as q:
            guide()
        with pyro.poutine.trace() as p, pyro.poutine.replay(trace=q.trace):
            model()
        cost = q.trace.log_prob_sum() - p.trace.log_prob_sum()
        drawn = [site for site in q.trace.nodes.values() if site["type"] == "sample"]
        bare = [getattr(site["fn"], "base_dist", site["fn"]).log_prob(site["value"]).sum() for site in drawn]
        return torch.stack(bare).sum(), cost

    found = [(prob, log_q, cost) for prob, (log_q, cost) in outcomes(run)]
    return torch.stack([prob * (log_q - log_q.detach()).exp() * cost for prob, log_q, cost in found]).sum()


@pytest.mark.parametrize("options", [ONE, SIDE_BY_SIDE], ids=["one", "side_by_side"])
@pytest.mark.parametrize("gradient", ["leave-one-out", "disarm"])
@pytest.mark.parametrize("programs", [weighed_by_a_latent, masked_where_it_is_read])
def test_a_draw_is_as_probable_as_it_is_however_much_it_counts(
    programs: Callable[[], tuple[Program, Program]], gradient: str, options: dict[str, Any]
) -> None:
    model, guide = programs()
    _, loss, found, _ = averaged(estimates(model, guide, {"gradient": gradient, **options}))
    exact = summed_by_pyro(model, guide)
    torch.testing.assert_close(loss, exact.detach())
    for parameter, expected in gradients(exact).items():
        torch.testing.assert_close(found[parameter], expected, msg=lambda text, p=parameter: f"{p}: {text}")


def test_probabilities_that_torch_clamps_have_the_pairs_that_they_should() -> None:
    def model() -> None:
        observe(1.5 * bernoulli("b", real("b_logits")), POINTS[0])

    def guide() -> None:
        pyro.sample("b", dist.Bernoulli(pyro.param("q", tensor(1e-18))), infer=dict(DRAWN))

    found = [averaged(estimates(model, guide, {"gradient": name}))[2]["q"] for name in ("disarm", "leave-one-out")]
    prior, data = real("b_logits").sigmoid(), dist.Normal(tensor([0.0, 1.5]), 0.8).log_prob(POINTS[0])
    expected = (tensor(1e-18) / prior).log() - data[1] + (1 - prior).log() + data[0]
    torch.testing.assert_close(torch.stack(found), expected.detach().expand(2))


@pytest.mark.parametrize("options", [ONE, SIDE_BY_SIDE], ids=["one", "side_by_side"])
def test_a_chain_of_the_model_makes_its_elements_one_draw(options: dict[str, Any]) -> None:
    """Each element of the guide is drawn by itself, and the model's next one hangs on it."""

    def model() -> None:
        start, step = tensor([0.3, 0.7]), tensor([[0.9, 0.1], [0.2, 0.8]])
        with pyro.plate("time", 2):
            observe(1.5 * pyro.sample("z", vfe.MarkovChain(start, step)))

    def guide() -> None:
        with pyro.plate("time", 2):
            categorical("z", real("q", 2, 2))

    _, loss, found, _ = averaged(estimates(model, guide, options))
    exact = summed_by_pyro(model, guide)
    torch.testing.assert_close(loss, exact.detach())
    torch.testing.assert_close(found["q"], gradients(exact)["q"])
