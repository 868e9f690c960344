"""SQUAREM jumps along the parabola of two steps, and EM with it ends where EM ends, sooner."""

from functools import cache, partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs.case import noise, tensor
from torch import Tensor
from torch.distributions import constraints

import pyro_vfe as vfe
from pyro_vfe.errors import VFEError
from pyro_vfe.learning.squarem import Squarem, extrapolated

SLOW = torch.cat([noise(60, seed=1) - 0.7, noise(40, seed=2) + 0.7])
"""Two clusters that overlap: EM crawls."""


def overlapping(points: Tensor) -> None:
    weights = pyro.param("weights", tensor([0.5, 0.5]), constraint=constraints.simplex)
    means = pyro.param("means", tensor([-1.0, 1.0]))
    with pyro.plate("data", len(points)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(means[z], 1.0), obs=points)


@cache
def run(acceleration: str | None) -> vfe.EMRun:
    pyro.clear_param_store()
    em = vfe.EM(overlapping)
    return em.run(SLOW, acceleration=acceleration, tol=1e-10, max_iter=5000, progress_bar=False)


def test_it_reaches_the_optimum_of_EM_in_fewer_iterations() -> None:
    plain, fast = run(None), run("squarem")
    assert plain.converged and fast.converged
    assert fast.free_energy == pytest.approx(plain.free_energy, abs=1e-6)
    assert fast.free_energy <= plain.free_energy + 1e-9
    assert 2 * fast.n_iter < plain.n_iter
    torch.testing.assert_close(fast.params["means"], plain.params["means"], rtol=0, atol=1e-2)


def test_F_never_rises() -> None:
    history = run("squarem").history
    assert np.nanmax(history.d_free_energy) <= 1e-10
    assert len(history.of("E")) > len(history.of("M"))


def test_on_a_straight_geometric_path_one_jump_reaches_the_limit() -> None:
    limit, rate = tensor([1.0, -2.0]), 0.9
    path = [{"theta": limit + rate**k * tensor([3.0, 4.0])} for k in range(3)]
    torch.testing.assert_close(extrapolated(*path)["theta"], limit)


def test_entries_that_are_not_finite_stay_as_in_the_plain_step() -> None:
    path = [{"theta": tensor([0.9**k, -torch.inf if k else 5.0])} for k in range(3)]
    found = extrapolated(*path)["theta"]
    assert found[0] == pytest.approx(0.0, abs=1e-12)
    assert found[1] == -torch.inf


@pytest.mark.parametrize("points", [(1.0, 1.0, 1.0), (0.0, 1.0, 0.5)])
def test_there_is_no_jump_where_it_would_lead_no_further(points: tuple[float, ...]) -> None:
    assert extrapolated(*({"theta": tensor([point])} for point in points)) is None


def test_it_proposes_after_every_second_step() -> None:
    squarem = Squarem()
    points = [{"theta": tensor([0.9**k])} for k in range(5)]
    proposals = [squarem.proposal(points[k], points[k + 1]) for k in range(4)]
    assert [proposal is None for proposal in proposals] == [True, False, True, False]


def test_a_jump_that_raises_F_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def far_away(self: Squarem, before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value + 50.0 for name, value in after.items()}

    plain = run(None)
    monkeypatch.setattr(Squarem, "proposal", far_away)
    kept = run.__wrapped__("squarem")
    together = len(plain.history.free_energy)
    np.testing.assert_array_equal(kept.history.free_energy[:together], plain.history.free_energy)


def test_a_jump_that_the_program_refuses_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(self: Squarem, before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.full_like(value, torch.nan) for name, value in after.items()}

    plain = run(None)
    monkeypatch.setattr(Squarem, "proposal", nowhere)
    assert run.__wrapped__("squarem").free_energy == pytest.approx(plain.free_energy, abs=1e-6)


def test_it_is_refused_where_Q_is_more_than_a_function_of_the_model() -> None:
    em = partial(vfe.EM(overlapping, vfe.AutoMeanField(overlapping)).run, SLOW, progress_bar=False)
    with pytest.raises(VFEError, match="Coordinate"):
        em(acceleration="squarem")
    with pytest.raises(VFEError, match=r"acceleration='anderson'\. Pass 'squarem' or None"):
        em(acceleration="anderson")
