"""A subsample that the guide alone states: the model takes the guide's indices over, and the weight N/B with them."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, tensor

import pyro_vfe as vfe
from pyro_vfe.errors import StructureError

N, B = 7, 3
LOC = tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
IND = tensor([5, 0, 3])


@pytest.fixture(autouse=True)
def _clean() -> None:
    pyro.clear_param_store()
    pyro.set_rng_seed(3)


def _data() -> Tensor:
    return torch.linspace(-2.0, 3.0, N, dtype=torch.float64)


def _weights() -> Tensor:
    start = tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    return pyro.param("weights", start, constraint=dist.constraints.simplex)


def _beliefs() -> Tensor:
    start = torch.softmax(torch.arange(N * 3, dtype=torch.float64).reshape(N, 3).sin(), -1)
    return pyro.param("beliefs", start, constraint=dist.constraints.simplex)


def _programs(in_model: dict[str, Any], in_guide: dict[str, Any], again: bool = False) -> tuple[Any, Any]:
    """A mixture; `again` enters one plate object twice."""

    def model(x: Tensor) -> None:
        w = _weights()
        plate = pyro.plate("documents", N, **in_model)
        with plate as ind:
            z = pyro.sample("z", dist.Categorical(w))
            if not again:
                pyro.sample("x", dist.Normal(LOC[z], 1.0), obs=x[ind])
        if again:
            with plate as ind:
                pyro.sample("x", dist.Normal(LOC[z], 1.0), obs=x[ind])

    def guide(x: Tensor) -> None:
        q = _beliefs()
        with pyro.plate("documents", N, **in_guide) as ind:
            pyro.sample("z", dist.Categorical(q[ind]))

    return model, guide


def _by_hand(x: Tensor, ind: Tensor) -> tuple[Tensor, Tensor]:
    """F and the surprise, by each document's table of z, and N/B of each."""
    w, q = _weights(), _beliefs()[ind]
    joint = w.log() + dist.Normal(LOC, 1.0).log_prob(x[ind][:, None])
    return N / len(ind) * (q * (q.log() - joint)).sum(), -N / len(ind) * joint.logsumexp(-1).sum()


CASES = [
    ({}, {"subsample": IND}, False),
    ({}, {"subsample": IND}, True),
    ({"dim": -1}, {"subsample": IND, "dim": -1}, False),
]


@pytest.mark.parametrize(("in_model", "in_guide", "again"), CASES)
def test_a_subsample_of_the_guide_is_the_models(in_model: Any, in_guide: Any, again: bool) -> None:
    x, (model, guide) = _data(), _programs(in_model, in_guide, again)
    expected, surprise = _by_hand(x, IND)
    names = ("weights", "beliefs")
    leaves = [pyro.param(name).unconstrained() for name in names]
    gradients = torch.autograd.grad(expected, leaves)
    for _ in range(2):
        loss = vfe.FreeEnergy().differentiable_loss(model, guide, x)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, leaves), gradients)
    parts = vfe.FreeEnergy().decompose(model, guide, x)
    assert float(parts.surprise) == pytest.approx(surprise.item())
    assert parts.by("documents").free_energy.shape == (B,)
    assert float(parts.by("documents").free_energy.sum()) == pytest.approx(expected.item())


def test_it_is_the_subsample_stated_in_both() -> None:
    x = _data()
    values = []
    for stated in ({}, {"subsample_size": B}):
        pyro.set_rng_seed(11)
        model, guide = _programs(stated, {"subsample_size": B})
        energy = vfe.FreeEnergy()
        values.append([energy.loss(model, guide, x) for _ in range(5)])
    assert values[0] == values[1]
    assert len(set(values[0])) > 1


def test_a_drawn_subsample_averages_to_the_whole() -> None:
    x, (model, guide) = _data(), _programs({}, {"subsample_size": B})
    energy, whole = vfe.FreeEnergy(), _by_hand(x, torch.arange(N))[0]
    values = tensor([energy.loss(model, guide, x) for _ in range(300)])
    assert float(values.mean()) == pytest.approx(whole.item(), abs=4 * float(values.std()) / 300**0.5)


def _topics(both: bool) -> tuple[Callable[..., None], Callable[..., None]]:
    """Documents of words: a subsampled plate inside of a whole one, and a topic that the guide draws."""
    table = torch.softmax(torch.arange(12, dtype=torch.float64).reshape(3, 4).cos(), -1)

    def model(words: Tensor) -> None:
        w = _weights()
        documents = pyro.plate("documents", N, subsample=IND if both else None, dim=-1)
        with documents as ind, pyro.plate("words", 2, dim=-2):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("word", dist.Categorical(table[z]), obs=words[:, ind])

    def guide(words: Tensor) -> None:
        q = _beliefs()
        with pyro.plate("documents", N, subsample=IND, dim=-1) as ind, pyro.plate("words", 2, dim=-2):
            pyro.sample("z", dist.Categorical(q[ind].expand(2, B, 3)))

    return model, guide


def test_nested_plates_of_which_one_is_subsampled() -> None:
    words = torch.arange(2 * N).reshape(2, N) % 4
    table = torch.softmax(torch.arange(12, dtype=torch.float64).reshape(3, 4).cos(), -1)
    joint = _weights().log() + table.log()[:, words[:, IND]].permute(1, 2, 0)
    q = _beliefs()[IND]
    expected = N / B * (q * (q.log() - joint)).sum()
    for both in (False, True):
        model, guide = _topics(both)
        assert vfe.FreeEnergy().loss(model, guide, words) == pytest.approx(expected.item())
        parts = vfe.FreeEnergy().decompose(model, guide, words)
        assert float(parts.surprise) == pytest.approx((-N / B * joint.logsumexp(-1).sum()).item())


def test_a_drawn_latent_of_a_subsampled_plate() -> None:
    x = _data()

    def model(x: Tensor, stated: Any) -> None:
        with pyro.plate("documents", N, subsample=stated) as ind:
            u = pyro.sample("u", dist.Normal(0.0, torch.ones((), dtype=torch.float64)))
            z = pyro.sample("z", dist.Categorical(torch.softmax(u[..., None] * LOC, -1)))
            pyro.sample("x", dist.Normal(LOC[z], 1.0), obs=x[ind])

    def guide(x: Tensor, stated: Any) -> None:
        with pyro.plate("documents", N, subsample=IND) as ind:
            pyro.sample("u", dist.Normal(x[ind], 0.5))
            pyro.sample("z", dist.Categorical(_beliefs()[ind]))

    values = []
    for stated in (None, IND):
        pyro.set_rng_seed(5)
        values.append(vfe.FreeEnergy(num_particles=3, vectorize_particles=True).loss(model, guide, x, stated))
    assert values[0] == pytest.approx(values[1])


def test_the_posterior_is_that_of_the_documents_that_are_present() -> None:
    x, (model, guide) = _data(), _programs({}, {"subsample": IND})
    joint = _weights().log() + dist.Normal(LOC, 1.0).log_prob(x[IND][:, None])
    expected = joint.softmax(-1).detach()
    torch.testing.assert_close(vfe.FreeEnergy().decompose(model, guide, x).posterior_marginals()["z"], expected)
    vfe.FreeEnergy().sample_posterior(model, guide, x)


@pytest.mark.filterwarnings("ignore:EM stopped at num_epochs")
@pytest.mark.filterwarnings("ignore:The batches of an epoch")  # They are the same three documents twice.
@pytest.mark.parametrize("learn", ["em", "svi"])
def test_learning_takes_the_steps_of_a_subsample_stated_in_both(learn: str) -> None:
    x, ends = _data(), []
    for stated in ({}, {"subsample": IND}):
        pyro.clear_param_store()
        model, guide = _programs(stated, {"subsample": IND})
        if learn == "em":
            vfe.EM(model, guide).run_batches([x, x], num_epochs=2, progress_bar=False)
        else:
            vfe.fit(model, guide, x, optim=pyro.optim.Adam({"lr": 0.05}), num_steps=4, progress_bar=False)
        ends.append(pyro.param("weights").detach().clone())
    torch.testing.assert_close(ends[0], ends[1])
    assert not torch.allclose(ends[0], tensor([0.2, 0.3, 0.5], dtype=torch.float64))


def test_a_sequential_plate_takes_the_guides_steps() -> None:
    def model(x: Tensor) -> None:
        for i in pyro.plate("documents", N):
            z = pyro.sample(f"z_{i}", dist.Categorical(_weights()))
            pyro.sample(f"x_{i}", dist.Normal(LOC[z], 1.0), obs=x[i])

    def guide(x: Tensor) -> None:
        for i in pyro.plate("documents", N, subsample=IND):
            pyro.sample(f"z_{i}", dist.Categorical(_beliefs()[i]))

    assert vfe.FreeEnergy().loss(model, guide, _data()) == pytest.approx(_by_hand(_data(), IND)[0].item())


@pytest.mark.parametrize("stated", [{}, {"subsample_size": B}])
def test_wholes_of_two_sizes_are_refused(stated: dict[str, int]) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("documents", N - 1, **stated):
            pyro.sample("z", dist.Categorical(_weights()))

    _, guide = _programs({}, {"subsample_size": B})
    with pytest.raises(StructureError, match="'documents' has 7 elements in the guide and 6 in the model"):
        vfe.FreeEnergy().loss(model, guide, _data())


def test_a_subsample_of_the_model_alone_is_refused_with_a_way_out() -> None:
    model, guide = _programs({"subsample_size": B}, {})
    with pytest.raises(StructureError, match=r"State the subsample in the guide: pyro.plate\('documents', 7, 3\)"):
        vfe.FreeEnergy().loss(model, guide, _data())
    for stated in ({"subsample_size": B}, {}):
        model, guide = _programs(stated, {"subsample_size": B})
        assert vfe.FreeEnergy().loss(model, guide, _data()) > 0
