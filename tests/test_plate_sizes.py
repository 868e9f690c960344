"""Plates whose size a latent decides, against sums over branches written in plain Python."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs.case import bernoulli, categorical, empty, tensor
from pyro.distributions import constraints

import pyro_vfe as vfe
from pyro_vfe.errors import PlateKeptError, StructureError, VFEWarning

DATA = [0.1, -0.3, 1.8, 2.4, 2.1]
WEIGHTS, LOCS, PROB = [0.2, 0.3, 0.5], [0.0, 2.0], 0.3


def density(x: float, loc: float) -> float:
    return math.exp(-((x - loc) ** 2) / 2) / math.sqrt(2 * math.pi)


def change_point(latents: bool = True) -> Callable[[], None]:
    """Data of which the first n have one mean and the rest another; n is a latent's value."""

    def model() -> None:
        weights = pyro.param("weights", tensor(WEIGHTS), constraint=constraints.simplex)
        locs = pyro.param("locs", tensor(LOCS))
        prob = pyro.param("prob", tensor(PROB), constraint=constraints.unit_interval)
        n = int(categorical("s", weights)) + 1
        for k, (name, part) in enumerate({"early": tensor(DATA[:n]), "late": tensor(DATA[n:])}.items()):
            with pyro.plate(name, len(part)):
                z = bernoulli(f"z_{name}", prob) if latents else 0
                pyro.sample(f"x_{name}", dist.Normal(locs[k] + z, tensor(1.0)), obs=part)

    return model


def branches_of(
    latents: bool, weights: Any = WEIGHTS, locs: Any = LOCS, prob: Any = PROB
) -> Iterator[tuple[float, list[float], list[int]]]:
    """Joint probability, P(z = 1 | s, x) of each datum, and its component, for each value of s."""
    for s, weight in enumerate(weights):
        total, ones, which = weight, [], []
        for i, x in enumerate(DATA):
            k = int(i > s)
            zero, one = density(x, locs[k]), density(x, locs[k] + 1)
            total *= (1 - prob) * zero + prob * one if latents else zero
            ones.append(prob * one / ((1 - prob) * zero + prob * one))
            which.append(k)
        yield total, ones, which


def surprise_of(latents: bool, **parameters: Any) -> float:
    return -math.log(sum(total for total, _, _ in branches_of(latents, **parameters)))


@pytest.mark.parametrize("latents", [False, True])
def test_a_change_point_in_plates_has_the_free_energy_of_its_branches(latents: bool) -> None:
    model = change_point(latents)
    assert vfe.FreeEnergy().loss(model, empty) == pytest.approx(surprise_of(latents), rel=1e-9)
    terms = vfe.FreeEnergy().decompose(model, empty)
    assert float(terms.surprise) == pytest.approx(surprise_of(latents), rel=1e-9)
    assert terms.num_data == len(DATA)


def test_its_latents_have_the_posterior_of_where_they_are() -> None:
    tree = vfe.posterior(change_point())
    branches = list(branches_of(True))
    evidence = sum(total for total, _, _ in branches)
    assert tree.marginal("s").tolist() == pytest.approx([total / evidence for total, _, _ in branches])
    late = tree.marginal("z_late")
    for j in range(4):
        ones = sum(total * r[s + 1 + j] for s, (total, r, _) in enumerate(branches) if s + 1 + j < 5) / evidence
        there = sum(total for s, (total, _, _) in enumerate(branches) if s + 1 + j < 5) / evidence
        assert late[j].tolist() == pytest.approx([there - ones, ones])
    drawn = tree.sample(50)
    assert torch.equal(drawn.present("z_early").sum(-1), drawn["s"] + 1)
    assert torch.equal(drawn.present("z_late").sum(-1), 4 - drawn["s"])


def test_its_gradients_are_those_of_the_sum_over_branches() -> None:
    vfe.FreeEnergy().loss_and_grads(change_point(), empty)
    found = pyro.param("locs").grad
    assert found is not None
    for k in range(2):
        up, down = ([loc + step * (i == k) for i, loc in enumerate(LOCS)] for step in (1e-5, -1e-5))
        slope = (surprise_of(True, locs=up) - surprise_of(True, locs=down)) / 2e-5
        assert float(found[k]) == pytest.approx(slope, rel=1e-6)


def test_an_iteration_of_em_weighs_the_data_of_each_branch() -> None:
    with pytest.warns(VFEWarning, match="before it had converged"):
        vfe.EM(change_point()).run(max_iter=1, progress_bar=False)
    branches = list(branches_of(True))
    evidence = sum(total for total, _, _ in branches)
    weights = [total / evidence for total, _, _ in branches]
    sums, counts, ones = [0.0, 0.0], [0.0, 0.0], 0.0
    for weight, (_, r, which) in zip(weights, branches, strict=True):
        for x, one, k in zip(DATA, r, which, strict=True):
            sums[k] += weight * (x - one)
            counts[k] += weight
            ones += weight * one
    assert pyro.param("weights").tolist() == pytest.approx(weights)
    assert pyro.param("locs").tolist() == pytest.approx([total / n for total, n in zip(sums, counts, strict=True)])
    assert pyro.param("prob").item() == pytest.approx(ones / 5)


def test_a_guide_with_the_same_branches_has_its_gap() -> None:
    q, probs = [0.5, 0.2, 0.3], {"early": 0.4, "late": 0.2}

    def guide() -> None:
        n = int(categorical("s", tensor(q))) + 1
        for name, size in {"early": n, "late": 5 - n}.items():
            with pyro.plate(name, size):
                bernoulli(f"z_{name}", probs[name])

    expected = 0.0
    for s in range(3):
        cost = math.log(q[s] / WEIGHTS[s])
        for i, x in enumerate(DATA):
            k = int(i > s)
            own = list(probs.values())[k]
            for z, (qz, pz) in enumerate([(1 - own, 1 - PROB), (own, PROB)]):
                cost += qz * math.log(qz / pz / density(x, LOCS[k] + z))
        expected += q[s] * cost
    terms = vfe.FreeEnergy().decompose(change_point(), guide)
    assert float(terms.free_energy) == pytest.approx(expected, rel=1e-9)
    assert float(terms.surprise) == pytest.approx(surprise_of(True), rel=1e-9)


def test_plates_within_plates_and_masks_have_the_sizes_of_their_branch() -> None:
    keep = [True, False, True]

    def model() -> None:
        n = int(categorical("s", tensor([0.3, 0.6, 0.1]))) + 1
        with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", n, dim=-1):
            z = categorical("z", tensor([0.2, 0.5, 0.3]))
            with pyro.poutine.mask(mask=torch.tensor(keep[:n])), pyro.poutine.scale(scale=2.0):
                pyro.sample("x", dist.Normal(z.to(torch.float64), tensor(1.0)), obs=tensor([DATA[:n], DATA[2 : 2 + n]]))

    total = 0.0
    for s, weight in enumerate([0.3, 0.6, 0.1]):
        for row in (DATA[: s + 1], DATA[2 : 3 + s]):
            for x, kept in zip(row, keep, strict=False):
                weight *= sum(p * density(x, z) ** (2 * kept) for z, p in enumerate([0.2, 0.5, 0.3]))
        total += weight
    assert vfe.FreeEnergy().loss(model, empty) == pytest.approx(-math.log(total), rel=1e-9)


def test_two_latents_decide_a_size_and_a_plate_may_lack_in_a_branch() -> None:
    def model() -> None:
        n = int(bernoulli("a", 0.4)) + int(categorical("b", tensor([0.3, 0.5, 0.2])))
        if n:
            with pyro.plate("data", n):
                pyro.sample("x", dist.Normal(bernoulli("z", 0.3), tensor(1.0)), obs=tensor(DATA[:n]))

    total = 0.0
    for a, weight in enumerate([0.6, 0.4]):
        for b, other in enumerate([0.3, 0.5, 0.2]):
            own = weight * other
            for x in DATA[: a + b]:
                own *= 0.7 * density(x, 0) + 0.3 * density(x, 1)
            total += own
    assert vfe.FreeEnergy().loss(model, empty) == pytest.approx(-math.log(total), rel=1e-9)


def test_elements_of_such_a_plate_have_no_terms_of_their_own() -> None:
    with pytest.raises(PlateKeptError, match="'s' is outside plate 'late'"):
        vfe.FreeEnergy().decompose(change_point(), empty).by("late")


def drawn_inside(guide: bool = False) -> None:
    n = int(bernoulli("s", 0.5)) + 1
    with pyro.plate("p", n):
        x = pyro.sample("x", dist.Normal(tensor(0.0), 1.0))
        if not guide:
            pyro.sample("y", dist.Normal(x, 1.0), obs=torch.ones(n, dtype=torch.float64))


def drawn_one_by_one(guide: bool = False) -> None:
    for i in pyro.plate("p", int(bernoulli("s", 0.5)) + 1):
        x = pyro.sample(f"x_{i}", dist.Normal(tensor(0.0), 1.0))
        if not guide:
            pyro.sample(f"y_{i}", dist.Normal(x, 1.0), obs=tensor(1.0))


def test_a_draw_in_such_a_plate_is_refused_and_a_loop_is_taken() -> None:
    with pytest.raises(StructureError, match="'p' has another size in another branch of the programs, and has the dra"):
        vfe.FreeEnergy().loss(drawn_inside, lambda: drawn_inside(guide=True))
    assert math.isfinite(vfe.FreeEnergy().loss(drawn_one_by_one, lambda: drawn_one_by_one(guide=True)))


def test_subsampled_plates_of_several_sizes_are_refused() -> None:
    def model() -> None:
        n = int(bernoulli("s", 0.5)) + 2
        with pyro.plate("p", n, subsample_size=n - 1) as index:
            pyro.sample("y", dist.Normal(tensor(0.0), 1.0), obs=tensor(DATA)[index])

    with pytest.raises(StructureError, match=r"'p' has another size in another branch .* shows . of its . elements"):
        vfe.FreeEnergy().loss(model, empty)


@pytest.mark.parametrize("kind", [vfe.AutoMeanField, vfe.AutoPosterior])
def test_automatic_guides_refuse_latents_in_such_a_plate(kind: Callable[[Any], Any]) -> None:
    with pytest.raises(StructureError, match="'z_early' lies in plate 'early', whose size is 1 in one branch"):
        vfe.FreeEnergy().loss(change_point(), kind(change_point()))
