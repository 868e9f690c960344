"""Marginals that are asked for one after the other come from one pass, which is kept."""

from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vfe as vfe
from pyro_vfe.energy import marginals
from pyro_vfe.energy import posterior as posteriors
from pyro_vfe.engine import inference
from pyro_vfe.errors import CostError

U = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)


def mixture(u: Tensor) -> None:
    with pyro.plate("data", len(u)):
        v = pyro.sample("v", dist.Categorical(torch.ones(2).double()))
        pyro.sample("u", dist.Normal(v.double(), 1.0), obs=u)


def grid(size: int) -> None:
    z: dict[tuple[int, int], Tensor] = {}
    for i in range(size):
        for j in range(size):
            z[i, j] = pyro.sample(f"z_{i}_{j}", dist.Bernoulli(torch.tensor(0.3, dtype=torch.float64)))
            for other in ((i - 1, j), (i, j - 1)):
                if other in z:
                    pyro.factor(f"f_{i}_{j}_{other}", 0.4 * (2 * z[i, j] - 1) * (2 * z[other] - 1))


def branching() -> None:
    if pyro.sample("a", dist.Bernoulli(0.3)):
        pyro.sample("b", dist.Bernoulli(0.6))
    pyro.sample("c", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each pass over a graph for marginals."""
    found: list[int] = []
    original = inference.log_normalizer_and_marginals

    def counted(*args: Any, **kwargs: Any) -> Any:
        found.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(inference, "log_normalizer_and_marginals", counted)
    return found


@pytest.mark.parametrize("model", [partial(grid, 4), branching, partial(mixture, U)])
def test_marginals_asked_one_after_the_other_come_from_one_pass(model: Any, passes: list[int]) -> None:
    posterior = vfe.posterior(model)
    names = posterior.sites
    one_by_one = {name: posterior.marginal(name) for name in names}
    assert len(passes) == 1
    for name in names:  # As the sum of a joint one, which is a pass of its own.
        other = next((own for own in names if own != name), None)
        if other is not None and model is not branching:
            torch.testing.assert_close(one_by_one[name], posterior.marginal(name, other).sum(-1))
    posterior.marginal(names[0]).zero_()  # What is handed out is the user's.
    torch.testing.assert_close(posterior.marginals(), one_by_one)


def test_terms_and_pictures_ask_for_their_marginals_once(passes: list[int]) -> None:
    terms = vfe.FreeEnergy().decompose(partial(grid, 3), vfe.AutoMeanField(partial(grid, 3)))
    passes.clear()
    for name in ("z_0_0", "z_1_2", "z_2_2"):
        terms.q_marginals()[name].zero_()
        terms.posterior_marginals()[name].zero_()
    count = len(passes)
    assert count <= 2
    assert bool((terms.posterior_marginals()["z_1_2"].sum(-1) - 1).abs() < 1e-12)
    assert len(passes) == count


def test_where_all_marginals_would_not_fit_those_that_do_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    original = marginals.single_marginals

    def limited(run: Any, graph: Any, names: Any, max_bytes: Any) -> Any:
        if len(list(names)) > 1:
            raise CostError("Too large.", hint="Ask for fewer.")
        return original(run, graph, names, max_bytes)

    expected = vfe.posterior(branching).marginals()
    monkeypatch.setattr(posteriors, "single_marginals", limited)
    torch.testing.assert_close(vfe.posterior(branching).marginal("c"), expected["c"])
