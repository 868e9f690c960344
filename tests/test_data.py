r"""What a datum is: all that weigh draws agree on it, whatever stands outside of the data's plates.

    F_K  =  - sum over data  E log 1/K sum_k w_k   -   what stands outside

The expectation is over all tuples of K draws, written out by hand for each program; VIMCO, `bounds` and reweighted
wake-sleep are averaged over every outcome of their draws.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import gradients
from outcomes import outcomes
from programs.case import categorical, empty, noise, positive, real, tensor
from pyro import poutine
from torch import Tensor

import pyro_vfe as vfe
from pyro_vfe.errors import PlateKeptError, ScaleError, SpotCheckError

U = tensor([0.5, -1.0])
Y = tensor([0.2])
BITS = tensor([0.0, 1.0])
K = 2


def drawn(name: str, logits: Tensor) -> Tensor:
    return pyro.sample(name, dist.Bernoulli(logits=logits), infer={"enumerate": None})


def data(plate: str = "data", u: Tensor = U, also: Tensor | float = 0.0) -> Tensor:
    """A draw for each datum, and what is seen of it."""
    with pyro.plate(plate, len(u)):
        v = drawn(f"v_{plate}", real("odds"))
        pyro.sample(f"u_{plate}", dist.Normal(real("mean", seed=1) * v + also, 1.0), obs=u)
    return v


def of_data(plate: str = "data", u: Tensor = U) -> Tensor:
    with pyro.plate(plate, len(u)):
        return drawn(f"v_{plate}", real("slope", seed=2) * u)


def prior() -> Tensor:
    return dist.Normal(0.0, 2.0).log_prob(real("mean", seed=1))


def beside_a_factor() -> None:
    pyro.factor("nothing", torch.zeros(()))
    data()


def beside_a_prior() -> None:
    pyro.sample("prior", dist.Normal(0.0, 2.0), obs=real("mean", seed=1))
    data()


def beside_priors_in_a_plate() -> None:
    with pyro.plate("components", 3):
        pyro.sample("prior", dist.Normal(0.0, 2.0), obs=real("mean", seed=1).expand(3))
    data()


def after_a_penalty() -> None:
    data()
    pyro.factor("penalty", -(real("mean", seed=1) ** 2))


def beside_a_point() -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(1), 2.0).to_event(1))
    data(also=w[..., 0])


def and_a_point() -> None:
    pyro.sample("w", dist.Delta(real("w", 1, seed=4)).to_event(1))
    of_data()


def beside_a_measurement() -> None:
    with pyro.plate("others", 3):
        pyro.sample("y", dist.Normal(real("mean", seed=1), 1.0), obs=tensor([0.1, 0.2, 0.3]))
    data()


def of_two_kinds() -> None:
    data("images")
    data("labels", Y)


def guide_of_two_kinds() -> None:
    of_data("images")
    of_data("labels", Y)


def in_a_plate_of_groups() -> None:
    with pyro.plate("groups", 2, dim=-2):
        pyro.sample("level", dist.Normal(real("mean", seed=1), 1.0), obs=tensor([[0.3], [0.4]]))
        data(u=tensor([0.7]))


def guide_in_a_plate_of_groups() -> None:
    with pyro.plate("groups", 2, dim=-2):
        of_data(u=tensor([0.7]))


def in_steps() -> None:
    pyro.factor("penalty", -(real("mean", seed=1) ** 2))
    for i in pyro.plate("data", 2):
        v = drawn(f"v_{i}", real("odds"))
        pyro.sample(f"u_{i}", dist.Normal(real("mean", seed=1) * v, 1.0), obs=U[i])


def guide_in_steps() -> None:
    for i in pyro.plate("data", 2):
        drawn(f"v_{i}", real("slope", seed=2) * U[i])


def read_from_outside() -> None:
    v = data()
    pyro.factor("pull", -1e6 - 0.7 * v.sum(-1, keepdim=True) ** 2)


def under_a_shared_draw() -> None:
    data(also=drawn("shared", real("odds")))


def guide_under_a_shared_draw() -> None:
    drawn("shared", real("slope", seed=2))
    of_data()


def subsampled(program: Callable[[], object]) -> Callable[[], None]:
    """The program on its first datum, which stands for both; what is outside counts once."""

    def half() -> None:
        pyro.sample("prior", dist.Normal(0.0, 2.0), obs=real("mean", seed=1)) if program is data else None
        with pyro.plate("all", 2, subsample=torch.tensor([0]), dim=-2):
            program(u=U[:1])  # type: ignore[call-arg]

    return half


Weights = tuple[Tensor, Tensor, Tensor]
"""The probability of each draw of each datum, its log P and its log Q, all of shape `(data, draws)`."""


def weights_of(u: Tensor = U, also: Tensor | float = 0.0) -> Weights:
    log_q = dist.Bernoulli(logits=real("slope", seed=2) * u[:, None]).log_prob(BITS)
    log_p = dist.Bernoulli(logits=real("odds")).log_prob(BITS)
    log_p = log_p + dist.Normal(real("mean", seed=1) * BITS + also, 1.0).log_prob(u[:, None])
    return log_q.detach().exp(), log_p, log_q


def together(weights: Weights, extra: Tensor | float = 0.0) -> Weights:
    """All data as one datum, whose draws are all tuples of theirs."""
    _, log_p, log_q = weights
    tuples = list(product(range(2), repeat=len(log_p)))
    log_p, log_q = (torch.stack([own[range(len(own)), draw].sum() for draw in tuples]) for own in (log_p, log_q))
    log_p = log_p + extra
    return log_q.detach().exp()[None], log_p[None], log_q[None]


def shared_weights() -> Weights:
    found = []
    for shared in BITS:
        top_p = dist.Bernoulli(logits=real("odds")).log_prob(shared)
        top_q = dist.Bernoulli(logits=real("slope", seed=2)).log_prob(shared)
        _, log_p, log_q = together(weights_of(also=shared))
        found.append((log_p + top_p, log_q + top_q))
    log_p, log_q = (torch.cat(own, -1) for own in zip(*found, strict=True))
    return log_q.detach().exp(), log_p, log_q


@dataclass(frozen=True)
class Case:
    """A pair of programs, and what their data are."""

    model: Callable[[], object]
    guide: Callable[[], object] = of_data
    kinds: Callable[[], list[Weights]] = lambda: [weights_of()]
    outside: Callable[[], Tensor] = lambda: torch.zeros(())
    plates: tuple[str, ...] = ("data",)
    num_data: int = 2
    scale: float = 1.0


def penalty() -> Tensor:
    return -(real("mean", seed=1) ** 2)


CASES = {
    "factor": Case(beside_a_factor),
    "prior": Case(beside_a_prior, outside=prior),
    "priors_in_a_plate": Case(beside_priors_in_a_plate, outside=lambda: 3 * prior()),
    "penalty": Case(after_a_penalty, outside=penalty),
    "point": Case(
        beside_a_point,
        and_a_point,
        lambda: [weights_of(also=real("w", 1, seed=4))],
        lambda: dist.Normal(0.0, 2.0).log_prob(real("w", 1, seed=4)).sum(),
    ),
    "measurement": Case(
        beside_a_measurement,
        outside=lambda: dist.Normal(real("mean", seed=1), 1.0).log_prob(tensor([0.1, 0.2, 0.3])).sum(),
    ),
    "two_kinds": Case(of_two_kinds, guide_of_two_kinds, lambda: [weights_of(), weights_of(Y)], plates=(), num_data=3),
    "nested": Case(
        in_a_plate_of_groups,
        guide_in_a_plate_of_groups,
        lambda: [weights_of(tensor([0.7, 0.7]))],
        lambda: dist.Normal(real("mean", seed=1), 1.0).log_prob(tensor([0.3, 0.4])).sum(),
        ("data", "groups"),
    ),
    "steps": Case(in_steps, guide_in_steps, outside=penalty),
    "read_from_outside": Case(
        read_from_outside,
        kinds=lambda: [together(weights_of(), -1e6 - 0.7 * tensor([0.0, 1.0, 1.0, 4.0]))],
        plates=(),
    ),
    "shared": Case(under_a_shared_draw, guide_under_a_shared_draw, lambda: [shared_weights()], plates=()),
    "subsampled": Case(
        subsampled(data),
        subsampled(of_data),
        lambda: [weights_of(U[:1])],
        prior,
        ("all", "data"),
        scale=2.0,
    ),
    "scaled": Case(
        poutine.scale(after_a_penalty, 3.0), poutine.scale(of_data, 3.0), outside=lambda: 3 * penalty(), scale=3.0
    ),
}


def expected(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """F_K, and the expected losses of model and guide in reweighted wake-sleep: sums over tuples of draws."""
    outside = case.outside()
    bound, of_model, of_guide = -outside, -outside, torch.zeros(())
    for probs, log_p, log_q in case.kinds():
        tuples = torch.tensor(list(product(range(probs.shape[1]), repeat=K)))
        log_weights = (log_p - log_q)[:, tuples]
        # The probability of a tuple, with the gradient that it has in Q.
        score = log_q[:, tuples].sum(-1).exp()
        mean = log_weights.logsumexp(-1) - torch.tensor(float(K)).log()
        bound = bound - case.scale * (score * mean).sum()
        share = probs[:, tuples].prod(-1)[..., None] * log_weights.detach().softmax(-1)
        of_model, of_guide = (
            loss - case.scale * (share * own[:, tuples]).sum() for loss, own in ((of_model, log_p), (of_guide, log_q))
        )
    return bound, of_model, of_guide


def mean_over(draws: Iterator[tuple[float, Tensor]]) -> Tensor:
    return torch.stack([probability * value for probability, value in draws]).sum(0)


@pytest.mark.parametrize("side_by_side", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_vimco_averages_to_the_bound_of_all_tuples_with_its_gradient(name: str, side_by_side: bool) -> None:
    case = CASES[name]
    elbo = vfe.FreeEnergy(
        num_particles=K, vectorize_particles=side_by_side, gradient="vimco", strict_enumeration_warning=False
    )
    elbo.loss(case.model, case.guide)
    bound = expected(case)[0]
    exact = gradients(bound)

    def estimate() -> Tensor:
        loss = elbo.differentiable_loss(case.model, case.guide)
        found = gradients(loss)
        return torch.cat([loss.detach().reshape(1), *(found[parameter].reshape(-1) for parameter in sorted(exact))])

    wanted = torch.cat([bound.detach().reshape(1), *(exact[parameter].reshape(-1) for parameter in sorted(exact))])
    torch.testing.assert_close(mean_over(outcomes(estimate)), wanted)


@pytest.mark.parametrize("name", CASES)
def test_bounds_average_to_the_bound_of_all_tuples(name: str) -> None:
    case = CASES[name]

    def estimate() -> Tensor:
        found = vfe.bounds(case.model, case.guide, num_particles=K, check=False)
        assert found.plates == case.plates and found.num_data == case.num_data
        return found.lower

    torch.testing.assert_close(mean_over(outcomes(estimate)), -expected(case)[0].detach())


@pytest.mark.parametrize("name", CASES)
def test_reweighted_wake_sleep_averages_to_the_same_bound_and_follows_the_weights_of_each_datum(name: str) -> None:
    case = CASES[name]
    machine = vfe.WakeSleep(
        case.model,
        case.guide,
        pyro.optim.SGD({"lr": 1.0}),
        pyro.optim.SGD({"lr": 1.0}),
        num_particles=K,
        reweighted=True,
        insomnia=1.0,
    )
    machine.wake()
    store = pyro.get_param_store()
    before = {parameter: store._params[parameter].detach().clone() for parameter in store}
    bound, of_model, of_guide = expected(case)
    exact = gradients(of_model) | {"slope": gradients(of_guide)["slope"]}
    # A point estimate is the guide's parameter: it learns from log Q alone, which is that of a point.
    learned = sorted(exact.keys() - {"w"})

    def estimate() -> Tensor:
        loss = machine.wake()
        moved = [before[parameter] - store._params[parameter].detach() for parameter in learned]
        with torch.no_grad():
            for parameter, value in before.items():
                store._params[parameter].copy_(value)
        return torch.cat([tensor([loss]), *(own.reshape(-1) for own in moved)])

    wanted = torch.cat([bound.detach().reshape(1), *(exact[parameter].reshape(-1) for parameter in learned)])
    torch.testing.assert_close(mean_over(outcomes(estimate)), wanted)


def summed(case: Case) -> tuple[Callable[[], object], Callable[[], object]]:
    """The programs with all draws enumerated."""
    return tuple(  # type: ignore[return-value]
        poutine.infer_config(program, lambda site: {"enumerate": "parallel"}) for program in (case.model, case.guide)
    )


@pytest.mark.parametrize("name", [name for name in CASES if name != "read_from_outside"])
def test_the_number_of_data_is_that_of_the_weights(name: str) -> None:
    terms = vfe.FreeEnergy().decompose(*summed(CASES[name]))
    assert terms.num_data == CASES[name].num_data
    torch.testing.assert_close(terms.per_datum.surprise, terms.surprise / CASES[name].num_data)


@pytest.mark.parametrize("name", ["factor", "prior", "penalty", "point", "steps"])
def test_a_tree_has_the_likelihood_of_each_datum_without_what_stands_outside(name: str) -> None:
    case = CASES[name]
    tree = vfe.to_datatree(*summed(case), num_samples=4, prior=False, posterior_predictive=False)
    (found,) = tree["log_likelihood"].data_vars.values()
    assert found.name == ("joint" if name == "steps" else "u_data") and found.dims == ("chain", "draw", "data")
    ((_, log_p, _),) = case.kinds()
    torch.testing.assert_close(torch.tensor(found.values[0, 2]), log_p.logsumexp(-1).detach(), rtol=1e-9, atol=1e-9)


def test_a_tree_has_the_likelihood_of_each_datum_given_a_draw_of_numbers_above_them() -> None:
    def model() -> None:
        w = pyro.sample("w", dist.Poisson(2.0))
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("u", dist.Normal(w * z, 1.0), obs=U)

    def guide() -> None:
        pyro.sample("w", dist.Poisson(positive("rate")))

    tree = vfe.to_datatree(model, guide, num_samples=4, prior=False, posterior_predictive=False)
    assert tree["log_likelihood"]["u"].dims == ("chain", "draw", "data")
    w = torch.tensor(tree["posterior"]["w"].values[0])[:, None, None]
    exact = (dist.Bernoulli(0.3).log_prob(BITS) + dist.Normal(w * BITS, 1.0).log_prob(U[:, None])).logsumexp(-1)
    torch.testing.assert_close(torch.tensor(tree["log_likelihood"]["u"].values[0]), exact)


@pytest.mark.parametrize("drawn_too", [False, True])
def test_enumerated_latents_are_summed_inside_of_the_weight_of_their_datum(drawn_too: bool) -> None:
    """A factor outside, and each datum has a draw and a latent that is summed in each weight."""

    def model() -> None:
        pyro.factor("penalty", penalty())
        with pyro.plate("data", 2):
            b = drawn("b", real("odds"))
            v = categorical("v", tensor([0.2, 0.8]))
            pyro.sample("u", dist.Normal(real("mean", seed=1) * b + v, 1.0), obs=U)

    def guide() -> None:
        with pyro.plate("data", 2):
            drawn("b", real("slope", seed=2) * U)
            if drawn_too:
                categorical("v", tensor([0.5, 0.5]))

    log_q = dist.Bernoulli(logits=real("slope", seed=2) * U[:, None]).log_prob(BITS)
    means = real("mean", seed=1) * BITS[:, None] + BITS
    log_p = (tensor([0.2, 0.8]).log() + dist.Normal(means, 1.0).log_prob(U[:, None, None])).logsumexp(-1)
    log_p = log_p + dist.Bernoulli(logits=real("odds")).log_prob(BITS)
    case = Case(model, guide, lambda: [(log_q.detach().exp(), log_p, log_q)], penalty)
    machine = vfe.WakeSleep(
        model, guide, pyro.optim.SGD({"lr": 0.0}), pyro.optim.SGD({"lr": 0.0}), num_particles=K, reweighted=True
    )
    machine.wake()
    found = mean_over(outcomes(lambda: tensor(machine.wake())))
    torch.testing.assert_close(found, expected(case)[0].detach())


@pytest.mark.parametrize("name", ["factor", "penalty", "prior"])
def test_reweighted_wake_sleep_finds_the_components_whatever_stands_outside_of_the_plate(name: str) -> None:
    u = torch.cat([noise(250, seed=5), 4.0 + noise(250, seed=6)])

    def model(u: Tensor, outside: str = name) -> None:
        m = pyro.param("m", tensor([1.0, 3.0]))
        if outside == "prior":
            pyro.sample("prior", dist.Normal(0.0, 10.0).expand([2]).to_event(1), obs=m)
        elif outside:
            pyro.factor(outside, 0.0 * m.sum() if outside == "factor" else -0.01 * m.square().sum())
        with pyro.plate("data", len(u)):
            v = pyro.sample("v", dist.Categorical(tensor([0.5, 0.5])), infer={"enumerate": None})
            pyro.sample("u", dist.Normal(m[v], 1.0), obs=u)

    def guide(u: Tensor, outside: str = name) -> None:
        logits = real("logits", 2)
        with pyro.plate("data", len(u)):
            pyro.sample("v", dist.Categorical(logits=logits), infer={"enumerate": None})

    def found(**options: Any) -> Tensor:
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        machine = vfe.WakeSleep(
            model,
            guide,
            *(pyro.optim.Adam({"lr": 0.1}) for _ in range(2)),
            num_particles=5,
            reweighted=True,
            insomnia=1.0,
        )
        for _ in range(60):
            machine.wake(u, **options)
        return pyro.param("m").detach()

    plain = found(outside="")
    torch.testing.assert_close(plain, torch.stack([u[:250].mean(), u[250:].mean()]), atol=0.3, rtol=0)
    torch.testing.assert_close(found(), plain, atol=0.0 if name == "factor" else 1e-2, rtol=0)


def test_what_is_not_seen_to_read_a_draw_is_refused_and_in_sight_it_is_weighed_with_it() -> None:
    def model(in_sight: bool) -> None:
        v = data()
        if in_sight:
            pyro.factor("pull", -v.sum(-1))
        else:
            with torch._C.DisableTorchFunction():
                pyro.factor("pull", -v.sum(-1))

    def guide(in_sight: bool) -> None:
        of_data()

    calls: list[Callable[[bool], Any]] = [
        lambda in_sight: vfe.bounds(model, guide, in_sight, num_particles=50),
        lambda in_sight: vfe.FreeEnergy(50, gradient="vimco", strict_enumeration_warning=False).loss(
            model, guide, in_sight
        ),
        lambda in_sight: vfe.WakeSleep(
            model, guide, pyro.optim.SGD({"lr": 0.0}), pyro.optim.SGD({"lr": 0.0}), num_particles=50, reweighted=True
        ).wake(in_sight),
    ]
    for call in calls:
        with pytest.raises(SpotCheckError, match="Something outside of the plates of the data differs from draw to dr"):
            call(False)
        call(True)


def test_unlike_weights_outside_of_the_data_are_no_matter_and_inside_of_a_datum_are_refused() -> None:
    def model(inside: bool) -> None:
        with poutine.scale(scale=0.5):
            pyro.factor("penalty", penalty())
        with pyro.plate("data", 2):
            v = drawn("v_data", real("odds"))
            pyro.sample("u", dist.Normal(v, 1.0), obs=U)
            with poutine.scale(scale=3.0 if inside else 1.0):
                pyro.sample("more", dist.Normal(0.0, 1.0), obs=U)

    found = vfe.bounds(model, lambda inside: of_data(), False, num_particles=3)
    torch.testing.assert_close(found.outside, 0.5 * penalty().detach())
    with pytest.raises(ScaleError, match=r"'v_data' and 'more' carry different weights .* belong to one datum"):
        vfe.bounds(model, lambda inside: of_data(), True, num_particles=3)


def test_bounds_of_data_of_two_kinds_stand_side_by_side() -> None:
    found = vfe.bounds(of_two_kinds, guide_of_two_kinds, num_particles=50)
    assert found.log_weights.shape == (50, 3) and found.weight.shape == (3,)
    assert "each datum" in str(found)
    with pytest.raises(PlateKeptError, match="data of several kinds stand side by side"):
        found.by("images")


def test_a_dream_of_two_kinds_of_data_is_bounded_from_both_sides() -> None:
    def model(u: Tensor, y: Tensor) -> None:
        for name, seen in (("u", u), ("y", y)):
            with pyro.plate(f"plate_{name}", len(seen)):
                v = pyro.sample(f"v_{name}", dist.Bernoulli(0.4))
                pyro.sample(name, dist.Normal(2 * v, 1.0), obs=seen)

    def guide(u: Tensor, y: Tensor) -> None:
        for name, seen in (("u", u), ("y", y)):
            with pyro.plate(f"plate_{name}", len(seen)):
                pyro.sample(f"v_{name}", dist.Bernoulli(logits=seen - 1.0))

    dream = vfe.dream(model, torch.zeros(20), torch.zeros(10))
    found = vfe.bounds(model, guide, dream=dream, num_particles=100)
    low, high = found.interval(1 - 1e-6)
    assert found.dream_log_weights is not None and found.dream_log_weights.shape == (30,)
    assert high is not None and low < vfe.posterior(model, *dream.args).log_evidence < high


def test_a_program_without_latents_has_the_data_of_its_plates() -> None:
    def model() -> None:
        pyro.sample("prior", dist.Normal(0.0, 2.0), obs=real("mean", seed=1))
        with pyro.plate("data", 2):
            pyro.sample("u", dist.Normal(real("mean", seed=1), 1.0), obs=U)

    assert vfe.FreeEnergy(strict_enumeration_warning=False).decompose(model, empty).num_data == 2


def test_a_point_estimate_of_independent_numbers_is_not_drawn() -> None:
    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", 2):
            z = categorical("z", tensor([0.5, 0.5]))
            pyro.sample("u", dist.Normal(w[z], 1.0), obs=U)

    def guide(of_one_site: bool) -> Callable[[], None]:
        def points() -> None:
            w = real("w", 2, seed=3)
            pyro.sample("w", dist.Delta(w, event_dim=1) if of_one_site else dist.Delta(w).to_event(1))

        return points

    found = []
    for of_one_site in (True, False):
        pyro.clear_param_store()
        assert vfe.FreeEnergy().decompose(model, guide(of_one_site)).exact
        found.append(vfe.EM(model, guide(of_one_site)).run(progress_bar=False).free_energy)
    assert found[0] == pytest.approx(found[1], abs=1e-12)
