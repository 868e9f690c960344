"""Programs whose sites are named by a state that latents make, against recursions over states in plain Python.

Few paths of choices, and a table over the joint values of all names would have millions of entries.
"""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs.case import bernoulli, categorical, empty, tensor
from pyro.distributions import constraints

import pyro_vfe as vfe
from pyro_vfe.errors import CostError, NotFiniteError, VFEWarning
from pyro_vfe.program import branches, path_axis

ESCAPES = 0.7
"""The probability of not catching it from one who has it."""


def epidemic(people: int, seen: tuple[int, ...], latents: bool = False) -> Callable[[], None]:
    def model() -> None:
        escapes = pyro.param("escapes", tensor(ESCAPES), constraint=constraints.unit_interval)
        susceptible, infected = people - 1, 1
        for t, y in enumerate(seen):
            state = f"{t}_{susceptible}_{infected}"
            n = pyro.sample(f"n_{state}", dist.Binomial(susceptible, 1 - escapes**infected))
            rate = n + 0.5 + (bernoulli(f"z_{state}", 0.3) if latents else 0)
            pyro.sample(f"y_{state}", dist.Poisson(rate), obs=tensor(float(y)))
            susceptible, infected = susceptible - int(n), int(n)

    return model


def poisson(y: int, rate: float) -> float:
    return math.exp(-rate) * rate**y / math.factorial(y)


def likelihood(
    people: int, seen: tuple[int, ...], latents: bool = False, escapes: float = ESCAPES, first: int | None = None
) -> float:
    """The probability of the counts, and that the first wave has so many, if that is asked for."""

    def later(t: int, susceptible: int, infected: int) -> float:
        if t == len(seen):
            return 1.0
        p, total = 1 - escapes**infected, 0.0
        for n in range(susceptible + 1):
            if t == 0 and first not in (None, n):
                continue
            binomial = math.comb(susceptible, n) * p**n * (1 - p) ** (susceptible - n)
            own = poisson(seen[t], n + 0.5)
            if latents:
                own = 0.7 * own + 0.3 * poisson(seen[t], n + 1.5)
            total += binomial * own * later(t + 1, susceptible - n, n) if binomial else 0.0
        return total

    return later(0, people - 1, 1)


@pytest.mark.parametrize(("people", "seen"), [(4, (1, 2)), (5, (1, 2, 0)), (6, (1, 2, 0, 1))])
@pytest.mark.parametrize("latents", [False, True])
def test_an_epidemic_has_the_free_energy_of_the_recursion(people: int, seen: tuple[int, ...], latents: bool) -> None:
    loss = vfe.FreeEnergy().loss(epidemic(people, seen, latents), empty)
    assert loss == pytest.approx(-math.log(likelihood(people, seen, latents)), rel=1e-9)


def test_its_terms_are_those_of_one_surprise() -> None:
    terms = vfe.FreeEnergy().decompose(epidemic(5, (1, 2, 0), True), empty)
    assert float(terms.surprise) == pytest.approx(-math.log(likelihood(5, (1, 2, 0), True)), rel=1e-9)
    assert float(terms.gap) == pytest.approx(0, abs=1e-12)


def test_its_posterior_is_that_of_the_paths() -> None:
    seen = (1, 2, 0)
    tree = vfe.posterior(epidemic(5, seen, True))
    first = [likelihood(5, seen, True, first=n) / likelihood(5, seen, True) for n in range(5)]
    assert tree.marginal("n_0_4_1").tolist() == pytest.approx(first)
    for n in range(5):
        assert float(tree.marginal(f"n_1_{4 - n}_{n}").sum()) == pytest.approx(first[n])
        assert float(tree.marginal(f"z_1_{4 - n}_{n}").sum()) == pytest.approx(first[n])
    joint = tree.marginal("n_0_4_1", "n_1_3_1")
    assert joint.sum(1).tolist() == pytest.approx([0, first[1], 0, 0, 0])
    drawn = tree.sample(200)
    assert torch.equal(drawn.present("n_1_3_1"), drawn["n_0_4_1"] == 1)
    assert torch.equal(drawn.present("z_1_3_1"), drawn["n_0_4_1"] == 1)
    best = tree.mode()
    assert float(tree.log_prob(best)) >= float(tree.log_prob(drawn).max()) - 1e-9
    assert float(-tree.log_prob(tree.sample(2000)).mean()) == pytest.approx(float(tree.entropy()), rel=0.05)


def test_its_gradient_is_the_slope_of_the_recursion() -> None:
    seen = (1, 2, 0)
    vfe.FreeEnergy().loss_and_grads(epidemic(5, seen), empty)
    up, down = (-math.log(likelihood(5, seen, escapes=ESCAPES + step)) for step in (1e-6, -1e-6))
    slope = (up - down) / 2e-6 * ESCAPES * (1 - ESCAPES)
    assert pyro.param("escapes").unconstrained().grad.item() == pytest.approx(slope, rel=1e-5)  # type: ignore[attr-defined]


def walk(seen: tuple[float, ...]) -> None:
    """A walk over three places, with a site for each step and place."""
    rows = pyro.param(
        "rows", tensor([[0.5, 0.3, 0.2], [0.2, 0.6, 0.2], [0.1, 0.1, 0.8]]), constraint=constraints.simplex
    )
    place = 0
    for t, u in enumerate(seen):
        z = categorical(f"z_{t}_{place}", rows[place])
        place = int(z)
        pyro.sample(f"u_{t}_{place}", dist.Normal(tensor(float(place)), tensor(1.0)), obs=tensor(u))


def walks(seen: tuple[float, ...], rows: list[list[float]]) -> list[tuple[float, list[tuple[int, int]]]]:
    """Joint probability and steps of every walk."""
    found: list[tuple[float, list[tuple[int, int]]]] = [(1.0, [])]
    for u in seen:
        found = [
            (p * rows[own][k] * math.exp(-((u - k) ** 2) / 2) / math.sqrt(2 * math.pi), [*steps, (own, k)])
            for p, steps in found
            for own in [steps[-1][1] if steps else 0]
            for k in range(3)
        ]
    return found


def test_an_iteration_of_em_counts_the_steps_of_every_walk() -> None:
    seen = (0.2, 1.1, 2.3, 1.9)
    rows = [[0.5, 0.3, 0.2], [0.2, 0.6, 0.2], [0.1, 0.1, 0.8]]
    counts = [[0.0] * 3 for _ in range(3)]
    for p, steps in walks(seen, rows):
        for own, k in steps:
            counts[own][k] += p
    with pytest.warns(VFEWarning, match="before it had converged"):
        vfe.EM(walk).run(seen, max_iter=1, progress_bar=False)
    for own, row in enumerate(counts):
        assert pyro.param("rows")[own].tolist() == pytest.approx([n / sum(row) for n in row])


def waits(longest: int) -> Callable[[], None]:
    """How long it takes, up to a limit, by a site for each trial; what is counted is seen with noise."""

    def model() -> None:
        n = 0
        while n < longest and bernoulli(f"again_{n}", 0.6).item():
            n += 1
        for i in range(n):
            pyro.sample(f"y_{n}_{i}", dist.Normal(bernoulli(f"b_{n}_{i}", 0.3), tensor(1.0)), obs=tensor(0.5))
        pyro.sample("total", dist.Poisson(tensor(n + 0.5)), obs=tensor(2.0))

    return model


def test_a_wait_with_a_limit_sums_over_its_lengths() -> None:
    normal = [math.exp(-(0.5**2) / 2) / math.sqrt(2 * math.pi)] * 2
    each = 0.7 * normal[0] + 0.3 * normal[1]
    total = sum(0.6**n * (0.4 if n < 14 else 1.0) * each**n * poisson(2, n + 0.5) for n in range(15))
    assert vfe.FreeEnergy().loss(waits(14), empty) == pytest.approx(-math.log(total), rel=1e-9)


def structures() -> None:
    """Which model it is decides what latents there are."""
    if categorical("model", tensor([0.3, 0.7])) == 0:
        n = int(categorical("n", tensor([0.2, 0.3, 0.5])))
        level = sum((bernoulli(f"a_{n}_{i}", 0.4) for i in range(n)), tensor(0.0))
    else:
        level = 2.0 * bernoulli("b", 0.2)
    pyro.sample("u", dist.Normal(level, tensor(1.0)), obs=tensor(1.3))


def test_a_structure_by_latent_sums_over_structures() -> None:
    def density(level: float) -> float:
        return math.exp(-((1.3 - level) ** 2) / 2) / math.sqrt(2 * math.pi)

    total = 0.7 * (0.8 * density(0) + 0.2 * density(2))
    for n, weight in enumerate([0.2, 0.3, 0.5]):
        total += 0.3 * weight * sum(math.comb(n, k) * 0.4**k * 0.6 ** (n - k) * density(k) for k in range(n + 1))
    assert vfe.FreeEnergy().loss(structures, empty) == pytest.approx(-math.log(total), rel=1e-9)


def test_a_guide_with_such_latents_is_told_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branches, "_MOST_ENTRIES", 2**10)
    model: Any = epidemic(5, (1, 2, 0))

    def guide() -> None:
        susceptible, infected = 4, 1
        for t in range(3):
            n = pyro.sample(f"n_{t}_{susceptible}_{infected}", dist.Binomial(susceptible, tensor(0.5)))
            susceptible, infected = susceptible - int(n), int(n)

    with pytest.raises(CostError, match="Leave these latents out of the guide"):
        vfe.FreeEnergy().loss(model, guide)
    assert math.isfinite(vfe.FreeEnergy().loss(model, empty))


def test_tables_over_all_paths_that_do_not_fit_are_refused_before_they_are_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(path_axis, "table_limit", lambda _: 1000)
    with pytest.raises(CostError, match=r"takes 35 paths .* tables of its 42 sites over all of them would take"):
        vfe.FreeEnergy().loss(epidemic(5, (1, 2, 0)), empty)


def test_a_derivative_that_is_not_finite_on_some_path_is_refused_and_a_clamp_mends_it() -> None:
    def model(least: float = 0.0) -> None:
        level = pyro.param("level", tensor(0.0))
        susceptible, infected = 4, 1
        for t in range(3):
            n = pyro.sample(f"n_{t}_{susceptible}_{infected}", dist.Binomial(susceptible, tensor(0.5)))
            susceptible, infected = susceptible - int(n), int(n)
            rate = ((level * infected) ** 2 + least).sqrt() + 1
            pyro.sample(f"y_{t}_{susceptible}_{infected}", dist.Poisson(rate), obs=tensor(1.0))

    with pytest.raises(NotFiniteError, match="is not finite on one of the 35 paths"):
        vfe.FreeEnergy().loss_and_grads(model, empty)
    pyro.clear_param_store()
    assert math.isfinite(vfe.FreeEnergy().loss_and_grads(lambda: model(1e-6), empty))
