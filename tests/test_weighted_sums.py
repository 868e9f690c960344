"""Latents above a subsample, and latents of unlike weight: what F is there, what surprise and gap are not."""

import warnings
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs.case import bernoulli, categorical, empty, noise, simplex, tensor
from programs.plates import SERIES, subsampled_under_global
from pyro.distributions import constraints
from torch import Tensor

import pyro_vfe as vfe
from pyro_vfe.errors import ImpossibleDataError, ScaleError, StructureError, VFEError, VFEWarning

U = tensor([1.2, 0.8, 9.5, 1.1, 2.0, 6.0])
THREE = [torch.tensor(chosen) for chosen in combinations(range(6), 3)]
ALL, SOME = torch.arange(6), torch.tensor([0, 3, 5])
EITHER = tensor([0.5, 0.5])
CLOSE: dict[str, Any] = {"rel": 1e-10, "abs": 1e-10}


def above(index: Tensor) -> None:
    """A latent above a plate of data."""
    a = categorical("a", EITHER)
    with pyro.plate("data", 6, subsample=index):
        pyro.sample("u", dist.Normal(pyro.param("locs", tensor([1.0, 4.0]))[a], 2.0), obs=U[index])


def above_steps(index: Tensor) -> None:
    """The same in a sequential plate."""
    a = categorical("a", EITHER)
    locs = pyro.param("locs", tensor([1.0, 4.0]))
    for n in pyro.plate("data", 6, subsample=index.tolist()):
        pyro.sample(f"u_{n}", dist.Normal(locs[a], 2.0), obs=U[n])


def above_latents(index: Tensor) -> None:
    """A latent above latents of the plate."""
    a, locs = categorical("a", EITHER), pyro.param("locs", tensor([1.0, 4.0]))
    with pyro.plate("data", 6, subsample=index):
        z = categorical("z", tensor([[0.2, 0.8], [0.7, 0.3]])[a])
        pyro.sample("u", dist.Normal(locs[z], 2.0), obs=U[index])


def above_a_nested_plate(index: Tensor) -> None:
    """A latent inside of one plate and above another."""
    with pyro.plate("groups", 2, dim=-2):
        a = categorical("a", EITHER)
        with pyro.plate("data", 6, subsample=index, dim=-1):
            loc = pyro.param("locs", tensor([1.0, 4.0]))[a]
            pyro.sample("u", dist.Normal(loc, 2.0), obs=torch.stack([U, U.flip(0)])[:, index])


def chain_above(index: Tensor) -> None:
    """A chain whose steps are all seen by every datum."""
    with pyro.plate("time", 3, dim=-1):
        a = pyro.sample("a", vfe.MarkovChain(EITHER, tensor([[0.9, 0.1], [0.2, 0.8]])))
        with pyro.plate("data", 6, subsample=index, dim=-2):
            loc = pyro.param("locs", tensor([1.0, 4.0]))[a]
            pyro.sample("u", dist.Normal(loc, 2.0), obs=torch.stack([U, U.flip(0), U + 1], -1)[index])


def one_of_two(index: Tensor) -> None:
    categorical("a", simplex("q", 2, seed=3))


def one_of_two_by_group(index: Tensor) -> None:
    with pyro.plate("groups", 2, dim=-2):
        categorical("a", simplex("q", 2, 1, 2, seed=3))


def chain_of_the_guide(index: Tensor) -> None:
    with pyro.plate("time", 3, dim=-1):
        pyro.sample("a", vfe.MarkovChain(simplex("q", 2, seed=3), simplex("step", 2, 2, seed=4)))


ABOVE: dict[str, tuple[Callable[[Tensor], None], Callable[[Tensor], None]]] = {
    "data": (above, one_of_two),
    "steps": (above_steps, one_of_two),
    "latents": (above_latents, one_of_two),
    "nested": (above_a_nested_plate, one_of_two_by_group),
    "chain": (chain_above, chain_of_the_guide),
}


def surprise_of_a_subsample(index: Tensor) -> Tensor:
    """What was once said to be F: -log sum_a p(a) prod_n p(u_n | a)^(N / B)."""
    log_likelihood = dist.Normal(tensor([1.0, 4.0]), 2.0).log_prob(U[index, None]).sum(0)
    return -(EITHER.log() + 6 / len(index) * log_likelihood).logsumexp(0)


def test_the_log_of_a_sum_over_a_weighted_subsample_is_biased() -> None:
    values = torch.stack([surprise_of_a_subsample(index) for index in THREE])
    assert values.mean().item() == pytest.approx(17.28513, abs=1e-5)
    assert surprise_of_a_subsample(ALL).item() == pytest.approx(18.44328, abs=1e-5)
    assert vfe.FreeEnergy().loss(above, empty, ALL) == pytest.approx(surprise_of_a_subsample(ALL).item(), **CLOSE)


@pytest.mark.parametrize("name", ABOVE)
def test_a_latent_summed_above_a_subsample_is_refused_by_name(name: str) -> None:
    model, _ = ABOVE[name]
    with pytest.raises(ScaleError, match="'a' is summed out above plate 'data', which shows 3 of its 6 elements"):
        vfe.FreeEnergy().loss_and_grads(model, empty, SOME)


@pytest.mark.parametrize("name", ABOVE)
def test_with_the_latent_in_the_guide_F_and_its_gradient_are_unbiased(name: str) -> None:
    model, guide = ABOVE[name]

    def loss_and_gradients(index: Tensor) -> list[Tensor]:
        loss = vfe.FreeEnergy().differentiable_loss(model, guide, index)
        leaves = [leaf for _, leaf in sorted(pyro.get_param_store().named_parameters())]
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    whole, parts = loss_and_gradients(ALL), [loss_and_gradients(index) for index in THREE]
    for expected, *found in zip(whole, *parts, strict=True):
        torch.testing.assert_close(torch.stack(found).mean(0), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ABOVE)
def test_with_the_latent_in_the_guide_surprise_and_gap_are_marked(name: str) -> None:
    model, guide = ABOVE[name]
    terms = vfe.FreeEnergy().decompose(model, guide, SOME)
    assert terms.unsplit is not None and "'a' is summed out above plate 'data'" in terms.unsplit
    assert terms.surprise.isnan() and terms.gap.isnan() and not terms.exact
    assert terms.free_energy.item() == pytest.approx(vfe.FreeEnergy().loss(model, guide, SOME), **CLOSE)
    for reading in (terms.energy - terms.entropy, terms.complexity - terms.accuracy):
        assert reading.item() == pytest.approx(terms.free_energy.item(), **CLOSE)
    whole = vfe.FreeEnergy().decompose(model, guide, ALL)
    assert whole.unsplit is None and whole.exact
    assert (whole.surprise + whole.gap).item() == pytest.approx(whole.free_energy.item(), **CLOSE)
    means = [vfe.FreeEnergy().decompose(model, guide, index) for index in THREE]
    for term in ("energy", "entropy", "complexity", "accuracy"):
        mean = torch.stack([getattr(own, term) for own in means]).mean()
        assert mean.item() == pytest.approx(getattr(whole, term).item(), **CLOSE)
    assert terms.num_data == whole.num_data


def auxiliary_above(index: Tensor) -> None:
    """A latent that only the guide has, above its subsample."""
    b = categorical("b", simplex("q_b", 2, seed=3), is_auxiliary=True)
    with pyro.plate("data", 6, subsample=index):
        categorical("z", simplex("q_z", 2, 2, seed=4)[b])


def independent(index: Tensor) -> None:
    with pyro.plate("data", 6, subsample=index):
        z = categorical("z", EITHER)
        pyro.sample("u", dist.Normal(tensor([1.0, 4.0])[z], 2.0), obs=U[index])


def test_a_latent_of_the_guide_alone_is_not_summed_above_a_subsample_either() -> None:
    with pytest.raises(ScaleError, match="'b' is summed out above plate 'data'"):
        vfe.FreeEnergy().loss(independent, auxiliary_above, SOME)
    assert vfe.FreeEnergy().decompose(independent, auxiliary_above, ALL).unsplit is None


def sampled(index: Tensor) -> None:
    pyro.sample("a", dist.Categorical(simplex("q", 2, seed=3)), infer={"enumerate": None})


def machine(guide: Callable[..., None], **options: Any) -> vfe.WakeSleep:
    sgd = pyro.optim.SGD({"lr": 0.01})
    return vfe.WakeSleep(above, guide, sgd, sgd, **options)


ENTRIES: dict[str, Callable[[], object]] = {
    "decompose": lambda: vfe.FreeEnergy().decompose(above, empty, SOME),
    "compute_marginals": lambda: vfe.FreeEnergy().compute_marginals(above, empty, SOME),
    "sample_posterior": lambda: vfe.FreeEnergy().sample_posterior(above, empty, SOME),
    "posterior": lambda: vfe.posterior(above, SOME),
    "posterior_marginals": lambda: vfe.FreeEnergy().decompose(above, one_of_two, SOME).posterior_marginals(),
    "gap_by_site": lambda: vfe.FreeEnergy().decompose(above, one_of_two, SOME).gap_by_site(),
    "the posterior as a guide": lambda: vfe.FreeEnergy().loss(above, vfe.AutoPosterior(above), SOME),
    "bounds": lambda: vfe.bounds(above, empty, SOME),
    "a reweighted wake phase": lambda: machine(one_of_two, reweighted=True).wake(SOME),
    "a reweighted wake phase of draws": lambda: machine(sampled, reweighted=True, num_particles=3).wake(SOME),
    "fit": lambda: vfe.fit(above, empty, SOME, optim=pyro.optim.SGD({"lr": 0.1}), num_steps=1, progress_bar=False),
    "EM": lambda: vfe.EM(above).run(SOME, progress_bar=False),
    "EM on steps": lambda: vfe.EM(above_steps).run(SOME, progress_bar=False),
    "EM on batches": lambda: vfe.EM(above).run_batches([SOME], progress_bar=False),
    "a tree": lambda: vfe.to_datatree(above_steps, empty, SOME),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_every_way_to_the_sum_over_all_latents_is_closed(name: str) -> None:
    refusals = {"EM": StructureError, "EM on steps": StructureError, "EM on batches": StructureError}
    with pytest.raises(refusals.get(name, StructureError if name == "a tree" else ScaleError), match=r"'data'|'a'"):
        ENTRIES[name]()


def test_weights_that_are_no_subsample_stay_what_they_were() -> None:
    def tempered() -> None:
        a = categorical("a", EITHER)
        with pyro.plate("data", 6), pyro.poutine.scale(scale=2.0):
            pyro.sample("u", dist.Normal(tensor([1.0, 4.0])[a], 2.0), obs=U)

    terms = vfe.FreeEnergy().decompose(tempered, lambda: one_of_two(ALL))
    log_likelihood = dist.Normal(tensor([1.0, 4.0]), 2.0).log_prob(U[:, None]).sum(0)
    assert terms.unsplit is None
    assert terms.surprise.item() == pytest.approx(-(EITHER.log() + 2 * log_likelihood).logsumexp(0).item(), **CLOSE)


def test_marginals_of_Q_have_no_weights() -> None:
    """A guide's latents are what it samples, whatever its plate stands for."""
    guide = two_of_the_guide
    found = vfe.FreeEnergy().decompose(subsampled_under_global, guide, SERIES).q_marginals()
    torch.testing.assert_close(found["g"], guide_probs())
    torch.testing.assert_close(found["z"], (guide_probs()[:, None] * local_probs()).sum(0).expand(3, 2))
    own = vfe.FreeEnergy().compute_marginals(subsampled_under_global, lambda series: guide_of_g(), SERIES)
    assert own["z"].batch_shape == (3,)


def guide_probs() -> Tensor:
    return tensor([0.2, 0.5, 0.3])


def local_probs() -> Tensor:
    return tensor([[0.1, 0.9], [0.6, 0.4], [0.5, 0.5]])


def guide_of_g() -> Tensor:
    return categorical("g", guide_probs())


def two_of_the_guide(series: Tensor) -> None:
    g = guide_of_g()
    with pyro.plate("data", len(series), subsample=torch.tensor([1, 4, 6])):
        categorical("z", local_probs()[g])


# What is shown


def test_what_is_not_known_is_a_dash_with_its_reason() -> None:
    terms = vfe.FreeEnergy().decompose(above, one_of_two, SOME)
    for shown in (terms, terms.per_datum, terms.by("data")):
        lines = {line.split("  ")[0]: line for line in str(shown).splitlines()}
        assert " - " in lines["= surprise"] and " - " in lines["+ gap"] and "nan" not in str(shown)
        assert "surprise and gap, for which the model sums its latents, are not known: Latent 'a'" in str(shown)
        assert ">-</td>" in shown._repr_html_() and "are not known" in shown._repr_html_()
        assert shown.to_xarray().attrs["unsplit"] == terms.unsplit
    assert "unsplit" not in vfe.FreeEnergy().decompose(above, one_of_two, ALL).to_xarray().attrs


def test_a_diagnosis_says_what_it_did_not_look_at() -> None:
    diagnosis = vfe.diagnose(vfe.FreeEnergy().decompose(above, one_of_two, SOME))
    assert not diagnosis.of("guide-bottleneck")
    assert any(what.startswith("the gap. Latent 'a'") for what in diagnosis.not_looked_at)
    assert "how large the gap is" not in " ".join(diagnosis.looked_at)


def test_pictures_show_F_alone() -> None:
    terms = vfe.FreeEnergy().decompose(above_latents, guide_of_both, SOME)
    texts = [text.get_text() for text in vfe.plot_decomposition(terms).texts]
    assert [text for text in texts if "unknown" in text] == ["unknown", "+ unknown"]
    assert vfe.plot_gap(terms.by("data")).get_title() == "The gap is not known"


def guide_of_both(index: Tensor) -> None:
    categorical("a", simplex("q", 2, seed=3))
    with pyro.plate("data", 6, subsample=index):
        categorical("z", simplex("q_z", 2, seed=5))


def test_fit_and_its_history_show_F_and_say_once_what_a_rule_cannot_read(capsys: Any) -> None:
    optim = pyro.optim.SGD({"lr": 0.01})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = vfe.fit(above, one_of_two, SOME, optim=optim, num_steps=45, stop=vfe.GapBelow(0.1))
    (warning,) = caught
    assert "does not split into surprise and gap. Latent 'a'" in str(warning.message)
    assert "GapBelow(bound=0.1, window=1) has no gap to read, and stops nothing" in str(warning.message)
    assert run.num_steps == 45 and bool(torch.tensor(run.history.free_energy).isfinite().all())
    assert bool(torch.tensor(run.history.gap).isnan().all())
    assert "surprise=-, gap=-" in capsys.readouterr().err
    assert "nan" not in str(run) + str(run.history._repr_html_()) and "surprise unknown" in str(run)
    assert vfe.plot_free_energy(run.history).get_title().startswith("F from")


def test_wake_sleep_reads_F_alone_and_its_wake_phase_follows_the_energy() -> None:
    def dream_to_args(observations: dict[str, Tensor], index: Tensor) -> Any:
        return (index,), {}

    energy = vfe.FreeEnergy().decompose(above, one_of_two, SOME).energy.item()
    assert machine(one_of_two).wake(SOME) == pytest.approx(energy, **CLOSE)
    with pytest.warns(VFEWarning, match="does not split into surprise and gap"):
        run = machine(one_of_two, dream_to_args=dream_to_args).run(SOME, num_steps=2, progress_bar=False)
    assert bool(torch.tensor(run.history.free_energy).isfinite().all())
    assert bool(torch.tensor(run.history.surprise).isnan().all())


def seen(possible: Tensor, subsample: Tensor) -> Callable[[], None]:
    """Data that are impossible, or not, under a latent above their subsample."""

    def model() -> None:
        a = bernoulli("a", 0.5)
        with pyro.plate("data", 6, subsample=subsample):
            pyro.sample("u", dist.Categorical(possible[a.long()]), obs=torch.zeros(len(subsample)))

    return model


def coin() -> None:
    bernoulli("a", 0.4)


def test_what_is_impossible_is_named_where_F_does_not_split() -> None:
    for program in (seen(tensor([[0.0, 1.0], [0.0, 1.0]]), SOME), seen(tensor([[0.0, 1.0], [0.0, 1.0]]), ALL)):
        for ask in (vfe.FreeEnergy().loss, vfe.FreeEnergy().decompose):
            with pytest.raises(ImpossibleDataError, match="Observed site 'u'"):
                ask(program, coin)
    clash = seen(tensor([[0.0, 1.0], [0.5, 0.5]]), SOME)
    with pytest.raises(VFEError, match=r"F is .inf: the guide gives positive probability to .*a = 0"):
        vfe.FreeEnergy().loss(clash, coin)
    terms = vfe.FreeEnergy().decompose(clash, coin)
    assert terms.free_energy.isposinf() and terms.gap.isposinf() and terms.surprise.isnan()
    assert "a = 0" in terms.impossible[0]


# Weights without an order

GRID = noise(3, 3, seed=4)


def crossing(rows: int, columns: int) -> None:
    """Two plates that cross, the latents of one under a weight."""
    one, other = pyro.plate("rows", rows, dim=-2), pyro.plate("columns", columns, dim=-1)
    with pyro.poutine.scale(scale=2.0), one:
        a = bernoulli("a", pyro.param("p", tensor(0.3), constraint=constraints.unit_interval))
    with other:
        b = bernoulli("b", 0.6)
    with one, other:
        pyro.sample("u", dist.Normal(a + 2 * b, 1.0), obs=GRID[:rows, :columns])


def both_plates(rows: int, columns: int) -> None:
    with pyro.poutine.scale(scale=2.0), pyro.plate("rows", rows, dim=-2):
        bernoulli("a", tensor(0.2))
    with pyro.plate("columns", columns, dim=-1):
        bernoulli("b", tensor(0.5))


def expected_free_energy(rows: int, columns: int) -> float:
    """By hand: 2 KL of each row, KL of each column, and the expected data."""
    q_a, q_b = tensor([0.8, 0.2]), tensor([0.5, 0.5])
    rows_kl = 2 * rows * (q_a * (q_a / tensor([0.7, 0.3])).log()).sum()
    columns_kl = columns * (q_b * (q_b / tensor([0.4, 0.6])).log()).sum()
    means = tensor([0.0, 1.0])[:, None] + 2 * tensor([0.0, 1.0])
    log_likelihood = dist.Normal(means, 1.0).log_prob(GRID[:rows, :columns, None, None])
    return float(rows_kl + columns_kl - (q_a[:, None] * q_b * log_likelihood).sum())


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_crossing_plates_of_unlike_weight_have_F_under_a_guide_and_no_surprise(columns: int) -> None:
    for ask in (
        lambda: vfe.posterior(crossing, 2, columns),
        lambda: vfe.FreeEnergy().loss(crossing, empty, 2, columns),
    ):
        with pytest.raises(ScaleError, match=r"'a' and 'b' .* scales 2 and 1.*one poutine.scale"):
            ask()
    terms = vfe.FreeEnergy().decompose(crossing, both_plates, 2, columns)
    assert terms.free_energy.item() == pytest.approx(expected_free_energy(2, columns), **CLOSE)
    assert terms.surprise.isnan() and terms.gap.isnan() and "which is summed first" in str(terms.unsplit)
    with pytest.raises(ScaleError, match=r"Give the guide 'b' too\.$"):
        vfe.FreeEnergy().loss(crossing, one_plate, 2, columns)


def one_plate(rows: int, columns: int) -> None:
    with pyro.poutine.scale(scale=2.0), pyro.plate("rows", rows, dim=-2):
        bernoulli("a", tensor(0.2))


def test_under_one_weight_crossing_plates_have_a_surprise() -> None:
    whole = vfe.FreeEnergy().decompose(lambda: pyro.poutine.scale(plain, scale=2.0)(), empty)
    assert whole.surprise.item() == pytest.approx(2 * vfe.FreeEnergy().loss(plain, empty), **CLOSE)


def plain() -> None:
    one, other = pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1)
    with one:
        a = bernoulli("a", 0.3)
    with other:
        b = bernoulli("b", 0.6)
    with one, other:
        pyro.sample("u", dist.Normal(a + 2 * b, 1.0), obs=GRID[:2])


def loop(steps: int) -> None:
    """A chain under a weight, every step of which sees a latent without one."""
    g, z = categorical("g", tensor([0.4, 0.6])), torch.tensor(0)
    with pyro.poutine.scale(scale=2.0):
        for t in range(steps):
            z = categorical(f"z_{t}", tensor([[0.3, 0.7], [0.8, 0.2]])[z])
            pyro.sample(f"u_{t}", dist.Normal((z + g).to(U), 1.0), obs=tensor(0.1 * t))


@pytest.mark.parametrize("steps", [4, 40])
def test_a_long_loop_is_refused_as_a_short_one_is(steps: int) -> None:
    with pytest.raises(ScaleError, match=r"'g' and 'z_\d+' .* scales 1 and 2"):
        vfe.FreeEnergy().loss(loop, empty, steps)


def test_em_with_a_guide_goes_on_without_a_surprise() -> None:
    run = vfe.EM(crossing, vfe.AutoMeanField(crossing)).run(2, 2, tol=1e-3, progress_bar=False)
    assert bool(torch.tensor(run.history.surprise).isnan().all()) and run.free_energy < run.history.free_energy[0]
    terms = run.decomposition()
    assert terms.unsplit is not None and " - " in str(terms) and "nan" not in str(terms)
    assert any(what.startswith("the gap.") for what in vfe.diagnose(run).not_looked_at)
