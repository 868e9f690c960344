"""One plate read by index in another, the long format: labels of items, answers of persons, counts of sites."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from checks import assert_equal, check_pair
from oracles import oracle
from programs.case import categorical, empty, tensor
from pyro.distributions import constraints
from pyro.ops.indexing import Vindex, vindex
from torch import Tensor

import pyro_vfe as vfe
from pyro_vfe.errors import PlateError, PlateKeptError, ScaleError, VFEWarning

ITEMS = torch.tensor([0, 0, 1, 2, 2, 1])
LABELS = tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0])
PROBS = tensor([0.2, 0.7])
RATINGS = [0, 0, 1, 1, 2, 3, 3], [0, 1, 0, 2, 1, 2, 0], [0, 1, 2, 2, 0, 1, 1]
"""Items, who said it, and what."""

IDIOMS: dict[str, Callable[[Tensor], Tensor]] = {
    "z[idx]": lambda z: PROBS[z[ITEMS]],
    "z[..., idx]": lambda z: PROBS[z[..., ITEMS]],
    "table first": lambda z: PROBS[z][ITEMS],
    "index_select": lambda z: PROBS[z.index_select(-1, ITEMS)],
    "gather": lambda z: PROBS[torch.gather(z, -1, ITEMS)],
    "take": lambda z: torch.take(PROBS, z.take(ITEMS)),
    "take_along_dim": lambda z: PROBS[torch.take_along_dim(z, ITEMS, -1)],
    "arithmetic": lambda z: 0.2 + 0.5 * z[ITEMS].to(PROBS),
    "where": lambda z: torch.where(z[ITEMS] == 1, PROBS[1], PROBS[0]),
    "one_hot": lambda z: torch.nn.functional.one_hot(z, 2)[ITEMS].to(PROBS) @ PROBS,
    "Vindex": lambda z: Vindex(PROBS)[Vindex(z)[..., ITEMS]],
    "vindex": lambda z: vindex(PROBS, z[ITEMS]),
    "a list": lambda z: PROBS[z[ITEMS.tolist()]],
    "expanded rows": lambda z: torch.stack([1 - PROBS, PROBS], -1)[z][ITEMS][:, 1],
}


def by_idiom(read: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    def model() -> None:
        with pyro.plate("items", 3):
            z = pyro.sample("z", dist.Categorical(tensor([0.5, 0.5])))
        with pyro.plate("labels", 6):
            pyro.sample("y", dist.Bernoulli(read(z)), obs=LABELS)

    return model


@pytest.mark.parametrize("idiom", IDIOMS)
def test_every_way_of_reading_by_index_gives_the_number_of_the_joint_table(idiom: str) -> None:
    model = by_idiom(IDIOMS[idiom])
    assert vfe.FreeEnergy().loss(model, empty) == pytest.approx(5.06219836, abs=5e-9)
    assert_equal(vfe.posterior(model).marginal("z"), oracle(model, empty).posterior.marginal("z"), 1e-10)


def simplex(name: str, *shape: int) -> Tensor:
    start = torch.rand(*shape, generator=torch.Generator().manual_seed(len(name))) + 0.2
    found: Tensor = pyro.param(name, start / start.sum(-1, keepdim=True), constraint=constraints.simplex)
    return found


def annotators() -> None:
    """Dawid & Skene (1979): each annotator errs in a way of their own."""
    item, who, said = (
        torch.tensor([0, 0, 1, 1, 2, 3, 3]),
        torch.tensor([0, 1, 0, 2, 1, 2, 0]),
        torch.tensor([0, 1, 2, 2, 0, 1, 1]),
    )
    confusion = simplex("confusion", 3, 3, 3)
    with pyro.plate("items", 4):
        z = pyro.sample("z", dist.Categorical(simplex("prevalence", 3)))
    with pyro.plate("labels", 7):
        pyro.sample("y", dist.Categorical(confusion[who, z[item]]), obs=said)


def two_kinds_of_readers() -> None:
    """A reader in the items' plate, one of labels and one of marks, and a latent outside of all plates."""
    g = categorical("g", tensor([0.3, 0.7]))
    mu = pyro.param("mu", tensor([0.0, 1.0, 3.0]))
    with pyro.plate("items", 3):
        z = pyro.sample("z", dist.Categorical(simplex("weights", 2, 3)[g]))
        pyro.sample("x", dist.Normal(mu[z], 1.0), obs=tensor([0.1, 2.0, 3.0]))
    with pyro.plate("labels", 6):
        pyro.sample("y", dist.Normal(mu[z[ITEMS]] + g, 2.0), obs=LABELS)
    with pyro.plate("marks", 2):
        pyro.sample("m", dist.Poisson(mu[z][torch.tensor([2, 0])].exp()), obs=tensor([1.0, 4.0]))


def within_a_plate() -> None:
    """Both plates lie within a third."""
    with pyro.plate("groups", 2, dim=-2):
        with pyro.plate("items", 2, dim=-1):
            z = pyro.sample("z", dist.Categorical(simplex("weights", 3)))
        with pyro.plate("labels", 3, dim=-1):
            loc = pyro.param("mu", tensor([0.0, 1.0, 3.0]))[z[:, torch.tensor([1, 0, 1])]]
            pyro.sample("y", dist.Normal(loc, 1.0), obs=tensor([[0.1, 2.0, 3.0], [1.0, -1.0, 0.4]]))


def masked_and_weighted() -> None:
    with pyro.plate("items", 3):
        z = pyro.sample("z", dist.Categorical(simplex("weights", 2)))
    with pyro.plate("labels", 6), pyro.poutine.mask(mask=torch.tensor([True, True, False, True, True, False])):
        pyro.sample("y", dist.Normal(pyro.param("mu", tensor([0.0, 3.0]))[z[ITEMS]], 1.0), obs=LABELS)


def events() -> None:
    """Each label is a vector."""
    with pyro.plate("items", 3):
        z = pyro.sample("z", dist.Categorical(simplex("weights", 2)))
    with pyro.plate("labels", 6):
        loc = pyro.param("mu", tensor([[0.0, 3.0], [1.0, -1.0]]))[z[ITEMS]]
        pyro.sample("y", dist.Normal(loc, 1.0).to_event(1), obs=torch.stack([LABELS, 1 - LABELS], -1))


def of_the_guide() -> None:
    with pyro.plate("items", 3):
        pyro.sample("z", dist.Categorical(simplex("q", 3, 2)))


def of_annotators() -> None:
    with pyro.plate("items", 4):
        pyro.sample("z", dist.Categorical(simplex("q", 4, 3)))


PROGRAMS: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
    "annotators": (annotators, empty),
    "annotators, with a guide": (annotators, of_annotators),
    "two kinds of readers": (two_kinds_of_readers, empty),
    "within a plate": (within_a_plate, empty),
    "masked": (masked_and_weighted, empty),
    "masked, with a guide": (masked_and_weighted, of_the_guide),
    "events": (events, empty),
    "events, with a guide": (events, of_the_guide),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_terms_gradients_and_posterior_equal_the_joint_table(name: str) -> None:
    model, guide = PROGRAMS[name]
    exact = check_pair(model, guide)
    posterior = vfe.posterior(model)
    for latent in posterior.sites:
        assert_equal(posterior.marginal(latent), exact.posterior.marginal(latent), 1e-10)


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """No word of values apart: reading by index is nothing to be mended."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", VFEWarning)
        yield


def test_each_item_has_its_terms_and_labels_have_none_of_their_own() -> None:
    terms = vfe.FreeEnergy().decompose(annotators, of_annotators)
    by_item = terms.by("items")
    assert_equal(by_item.free_energy.sum(), terms.free_energy, 1e-12)
    for item in range(4):
        exact = _one_item(item)
        assert_equal(by_item.surprise[item], exact, 1e-10)
    with pytest.raises(PlateKeptError, match="'labels' have no free energy of their own"):
        terms.by("labels")


def _one_item(item: int) -> Tensor:
    """-log p of an item's labels, by hand."""
    joint = pyro.param("prevalence").clone()
    for i, a, y in zip(*RATINGS, strict=True):
        if i == item:
            joint = joint * pyro.param("confusion")[a, :, y]
    return -joint.sum().log()


def long_format(item: Tensor, who: Tensor, said: Tensor, num_items: int) -> None:
    with pyro.plate("items", num_items):
        z = pyro.sample("z", dist.Categorical(simplex("prevalence", 3)))
    with pyro.plate("labels", len(said)):
        pyro.sample("y", dist.Categorical(simplex("confusion", 4, 3, 3)[who, z[item]]), obs=said)


def wide_format(said: Tensor) -> None:
    num_items, num_annotators = said.shape
    with pyro.plate("items", num_items, dim=-2):
        z = pyro.sample("z", dist.Categorical(simplex("prevalence", 3)))
        with pyro.plate("annotators", num_annotators, dim=-1):
            table = simplex("confusion", 4, 3, 3)[torch.arange(num_annotators), z]
            pyro.sample("y", dist.Categorical(table), obs=said)


def test_em_in_the_long_format_is_em_in_the_wide_one() -> None:
    said = torch.randint(3, (12, 4), generator=torch.Generator().manual_seed(1))
    item, who = (part.reshape(-1) for part in torch.meshgrid(torch.arange(12), torch.arange(4), indexing="ij"))
    runs = []
    for model, args in ((wide_format, (said,)), (long_format, (item, who, said.reshape(-1), 12))):
        pyro.clear_param_store()
        runs.append(vfe.EM(model).run(*args, max_iter=300, tol=1e-10, progress_bar=False))  # type: ignore[arg-type]
    assert runs[1].free_energy == pytest.approx(runs[0].free_energy, rel=1e-10)
    assert dict(runs[1].updates) == dict(runs[0].updates)
    for name, value in runs[0].params.items():
        assert_equal(runs[1].params[name], value, 1e-6)


def test_labels_may_change_from_call_to_call() -> None:
    elbo = vfe.FreeEnergy()
    generator = torch.Generator().manual_seed(3)
    for size in (5, 8, 8, 3, 6):
        item, who, said = (torch.randint(high, (size,), generator=generator) for high in (3, 4, 3))
        exact = oracle(long_format, empty, item, who, said, 3)
        loss = elbo.differentiable_loss(long_format, empty, item, who, said, 3)
        assert_equal(loss, exact.terms["free_energy"], 1e-10)


def test_a_subsample_of_labels_weighs_them_under_a_guide() -> None:
    chosen = torch.tensor([4, 1, 3])

    def model() -> None:
        with pyro.plate("items", 3):
            z = pyro.sample("z", dist.Categorical(tensor([0.4, 0.6])))
        with pyro.plate("labels", 6, subsample=chosen) as ind:
            pyro.sample("y", dist.Bernoulli(PROBS[z[ITEMS[ind]]]), obs=LABELS[ind])

    by_hand = tensor(0.0)
    for item in range(3):
        q, said = simplex("q", 3, 2)[item], LABELS[chosen[ITEMS[chosen] == item]]
        likelihoods = torch.stack([dist.Bernoulli(prob).log_prob(said).sum() for prob in PROBS])
        by_hand = by_hand + (q * (q.log() - tensor([0.4, 0.6]).log() - 2 * likelihoods)).sum()
    assert vfe.FreeEnergy().loss(model, of_the_guide) == pytest.approx(by_hand.item(), abs=1e-10)
    with pytest.raises(ScaleError, match="'labels', which shows 3 of its 6"):
        vfe.FreeEnergy().loss(model, empty)


@pytest.mark.parametrize(
    "mix", [lambda z: z[ITEMS].cumsum(-1), lambda z: z[ITEMS] + z[ITEMS.roll(1)], lambda z: z[ITEMS] - z[ITEMS].max()]
)
def test_what_reads_several_elements_is_written_out(mix: Callable[[Tensor], Tensor]) -> None:
    def model() -> None:
        with pyro.plate("items", 3):
            z = pyro.sample("z", dist.Categorical(tensor([0.4, 0.6])))
        with pyro.plate("labels", 6):
            pyro.sample("y", dist.Normal(mix(z).to(PROBS), 1.0), obs=LABELS)

    with pytest.warns(VFEWarning, match="run 8 times"):
        loss = vfe.FreeEnergy().loss(model, empty)
    assert loss == pytest.approx(float(oracle(model, empty).terms["free_energy"]), abs=1e-10)


def test_several_elements_of_a_large_plate_are_refused() -> None:
    def model() -> None:
        with pyro.plate("items", 30):
            z = pyro.sample("z", dist.Categorical(tensor([0.4, 0.6])))
        with pyro.plate("labels", 6):
            pyro.sample("y", dist.Normal((z[ITEMS] + z[ITEMS + 1]).to(PROBS), 1.0), obs=LABELS)

    with pytest.raises(PlateError, match="reads latent 'z' from outside plate 'items'"):
        vfe.FreeEnergy().loss(model, empty)


def test_explain_says_how_they_are_read() -> None:
    assert "read by index from another plate" in str(vfe.explain(annotators, None))


def test_svi_learns() -> None:
    svi: Any = pyro.infer.SVI(annotators, of_annotators, pyro.optim.Adam({"lr": 0.1}), vfe.FreeEnergy())
    losses = [svi.step() for _ in range(30)]
    assert losses[-1] < losses[0]
