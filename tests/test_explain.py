"""What explain says before anything is computed: who is summed by whom, in what order, at what cost."""

import re
import tracemalloc
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import PROGRAMS
from programs.case import bernoulli, categorical, empty, noise, simplex, tensor
from programs.sampled import POINTS, guide_of_w, kept_sampled, kept_sampled_guide, v_depends_on_w

import pyro_vfe as vfe
import pyro_vfe.energy.explain as explaining
from pyro_vfe.errors import CostError


def explained(name: str, **options: Any) -> vfe.Explanation:
    program = PROGRAMS[name]
    return vfe.explain(program.model, program.guide, *program.args, **options)


def rows(text: str) -> dict[tuple[str, str], list[str]]:
    """The table of sites: cells by program and site."""
    lines = text.split("\n\n")[0].splitlines()
    cells = [re.split(r"\s{2,}", line) for line in lines]
    assert cells[0] == ["site", "program", "values", "plates", "handled", "reads"]
    return {(row[1], row[0]): row[2:] for row in cells[1:]}


def test_it_says_who_sums_draws_and_observes_each_site() -> None:
    assert rows(str(explained("global_guided"))) == {
        ("guide", "g"): ["3", "-", "summed under the guide", "-"],
        ("model", "g"): ["3", "-", "summed under the guide", "-"],
        ("model", "z"): ["2", "data (4)", "summed inside the model", "g"],
        ("model", "u"): ["-", "data (4)", "observed (Poisson)", "g, z"],
    }


def test_it_says_what_only_the_guide_has() -> None:
    found = rows(str(explained("auxiliary_site")))
    assert found["guide", "mood"] == ["3", "-", "summed inside the guide", "-"]
    assert found["guide", "a"] == ["2", "-", "summed under the guide", "mood"]


def test_it_says_what_is_drawn() -> None:
    found = rows(str(vfe.explain(v_depends_on_w, guide_of_w, POINTS)))
    assert found["guide", "w"][:3] == ["-", "-", "drawn (Normal)"]
    assert found["model", "z"][2] == "summed inside the model"
    kept = rows(str(vfe.explain(kept_sampled, kept_sampled_guide, POINTS.abs().round())))
    assert kept["guide", "g"][2] == "drawn (Categorical)"
    assert kept["model", "z"][2] == "summed inside the model"


def test_it_says_what_takes_one_run_per_value() -> None:
    found = rows(str(explained("branch_in_both")))
    assert found["model", "a"][2] == "summed under the guide, one run per value"
    assert found["model", "b"][2] == "summed under the guide"


def test_it_says_the_size_of_a_subsample() -> None:
    assert rows(str(explained("subsampled_guided")))["model", "u"][1] == "data (3 of 10)"


@pytest.mark.parametrize(
    ("name", "sites", "entries"),
    [
        ("global_over_local", {"z", "u"}, 3 * 2 * 4),
        ("collider", {"c"}, 3 * 2 * 4),
        ("second_order_chain", {f"z_{t}" for t in range(2, 6)}, 8),
        ("crossing", {"c", "u"}, 2**3 * 4),
        ("bits", {"z", "u", "sum"}, 8),
        ("chain_backward_guide", {f"z_{t}" for t in range(4)}, 9),
    ],
)
def test_the_largest_table_has_an_entry_per_joint_value_and_element(name: str, sites: set[str], entries: int) -> None:
    explanation = explained(name)
    largest = explanation.largest_site
    assert largest.name in sites
    line = f"largest site table: '{largest.name}' of the {largest.role}, {8 * entries}.0 bytes"
    assert line in str(explanation).splitlines()


@pytest.mark.parametrize("name", ["chain", "tree", "global_over_local", "crossing_site_alone", "mixed", "alarm"])
def test_the_order_sums_out_every_latent_of_the_model_once(name: str) -> None:
    explanation = explained(name)
    latents = {site.name for site in explanation.layout.sites.values() if site.kind == "enumerated"}
    order = explanation.outline.variables
    assert sorted(order) == sorted(latents)
    shown = str(explanation).split("\n\n")[-1]
    assert all(name in shown for name in latents)
    assert explanation.outline.flops > 0
    assert f"{explanation.outline.flops:,} flops" in str(explanation)


def test_a_chain_is_summed_at_a_cost_linear_in_its_length() -> None:
    def chain(steps: int) -> None:
        z = torch.tensor(0)
        table = noise(4, 4, seed=1).softmax(-1)
        for t in range(steps):
            z = categorical(f"z_{t}", table[z])
            pyro.sample(f"u_{t}", dist.Normal(z.double(), 1.0), obs=tensor(0.3))

    outlines = {steps: vfe.explain(chain, empty, steps).outline for steps in (20, 40, 80)}
    assert outlines[80].flops - outlines[40].flops == 2 * (outlines[40].flops - outlines[20].flops)
    assert all("(4)" in str(outline) and f"{steps}" in str(outline) for steps, outline in outlines.items())
    assert all(len(outline.sweeps) == 1 and not outline.plan.steps for outline in outlines.values())


def coupled(count: int, size: int) -> None:
    """Every latent is read by one site: a table of size**count entries."""
    total = tensor(0.0)
    for n in range(count):
        total = total + (n + 1) * categorical(f"z_{n}", torch.ones(size) / size)
    pyro.sample("u", dist.Normal(total, 1.0), obs=tensor(2.0))


def test_a_table_that_would_not_fit_is_explained_and_refused_before_it_is_made() -> None:
    """20 latents of 10 values: 8e20 bytes. Nothing near that is touched."""
    tracemalloc.start()
    explanation = vfe.explain(coupled, empty, 20, 10)
    with pytest.raises(CostError) as refusal:
        vfe.FreeEnergy().loss(coupled, empty, 20, 10)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert all(word in str(refusal.value) for word in ("'u'", "'z_0'", "20 latents", "max_bytes"))
    (line,) = (line for line in str(explanation).splitlines() if line.startswith("largest site table"))
    assert f"'u' of the model, {8 * 10**20 / 2**50:.3g} PiB (above the limit of" in line


@pytest.mark.parametrize("call", ["loss", "posterior"])
def test_max_bytes_is_the_limit_of_every_table(call: str) -> None:
    """6 latents of 4 values: 32,768 bytes."""

    def ask(max_bytes: float) -> Any:
        if call == "loss":
            return vfe.FreeEnergy(max_bytes=max_bytes).loss(coupled, empty, 6, 4)
        return vfe.posterior(coupled, 6, 4, max_bytes=max_bytes)

    with pytest.raises(CostError, match="'u'"):
        ask(32_767)
    ask(1e6)
    assert "above the limit" in str(vfe.explain(coupled, empty, 6, 4, max_bytes=32_767))
    assert "above the limit" not in str(vfe.explain(coupled, empty, 6, 4, max_bytes=32_768))


def test_an_elimination_that_would_not_fit_is_seen_in_the_plan_and_refused_when_run() -> None:
    """Each site of a grid reads 3 latents; summing a 12 x 12 grid out needs a table over 12 or so."""

    def grid(side: int) -> None:
        spins = [[bernoulli(f"s_{r}_{c}", 0.5) for c in range(side)] for r in range(side)]
        for r in range(side - 1):
            for c in range(side - 1):
                pyro.factor(f"f_{r}_{c}", spins[r][c] * spins[r + 1][c] - spins[r][c] * spins[r][c + 1])

    explanation = vfe.explain(grid, empty, 8)
    assert 7 <= len(explanation.outline.largest.scope) <= 12
    with pytest.raises(CostError):
        vfe.FreeEnergy(max_bytes=500).loss(grid, empty, 8)


def test_no_large_table_is_made_and_the_program_runs_with_single_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explaining, "_MOST_TRIED", 8.0)
    shapes = []

    def model() -> None:
        with pyro.plate("data", 3):
            z = categorical("z", simplex("probs", 50, seed=1))
            shapes.append(tuple(z.shape))
            pyro.sample("u", dist.Normal(z.double(), 1.0), obs=noise(3, seed=2))

    pyro.set_rng_seed(1)
    vfe.explain(model, empty)
    after = torch.rand(())
    assert set(shapes) == {(3,), (1, 1)}  # a draw for each element, and one value for all
    pyro.set_rng_seed(1)
    assert after == torch.rand(())


def test_a_chain_of_1000_steps_is_printed_on_a_page() -> None:
    def chain() -> None:
        z = torch.tensor(0)
        table = noise(3, 3, seed=1).softmax(-1)
        for t in range(1000):
            z = categorical(f"z_{t}", table[z])

    explanation = vfe.explain(chain, empty)
    text = str(explanation)
    assert len(text.splitlines()) < 100
    assert "more" in text
    assert "z_0 " in text
    assert "z_999 " in text
    assert len(explanation.layout.sites) == 1000


def test_a_model_without_latents_is_explained_too() -> None:
    def model() -> None:
        pyro.sample("u", dist.Normal(0.0, 1.0), obs=tensor(0.3))

    text = str(vfe.explain(model, empty))
    assert rows(text)["model", "u"] == ["-", "-", "observed (Normal)", "-"]


@pytest.mark.parametrize("name", [name for name in PROGRAMS if not name.startswith(("chain_of", "ising", "120"))][::3])
def test_any_program_can_be_explained(name: str) -> None:
    """Its latents are those that decompose enumerates."""
    program = PROGRAMS[name]
    explanation = vfe.explain(program.model, program.guide, *program.args, **program.kwargs)
    runs = vfe.FreeEnergy().decompose(program.model, program.guide, *program.args, **program.kwargs).runs
    enumerated = {site.name for site in explanation.layout.sites.values() if site.kind == "enumerated"}
    assert enumerated == set(runs[0].supports)
    assert {name for _, name in rows(str(explanation))} == {site.name for site in explanation.layout.sites.values()}
