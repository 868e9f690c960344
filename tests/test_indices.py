"""Indices out of range: the message says where, of which tensor and by which latent, whatever has been drawn."""

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from checks import assert_equal
from oracles import oracle
from programs.case import categorical, empty, simplex, tensor
from torch import Tensor

import pyro_vfe as vfe
from pyro_vfe.errors import ShapeError, VFEError, VFEWarning

LENGTH = 2
"""Of the tables below, which want to be of length 4."""


def table(length: int) -> Tensor:
    return torch.linspace(-1.0, 1.0, length)


def looked_up(of: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., None]:
    def model(u: Tensor, length: int = LENGTH) -> None:
        z = categorical("z", torch.ones(4) / 4)
        pyro.sample("u", dist.Normal(of(table(length), z), 1.0), obs=u)

    return model


def in_a_plate(u: Tensor, length: int = LENGTH) -> None:
    with pyro.plate("data", 2):
        z = categorical("z", torch.ones(4) / 4)
        pyro.sample("u", dist.Normal(table(length)[z], 1.0), obs=u)


def rarely(u: Tensor, length: int = LENGTH) -> None:
    """Values that no ordinary run meets."""
    z = categorical("z", tensor([0.5, 0.5 - 1e-30, 5e-31, 5e-31]))
    pyro.sample("u", dist.Normal(table(length)[z], 1.0), obs=u)


def of_two_latents(u: Tensor, length: int = LENGTH) -> None:
    y = categorical("y", simplex("p_y", 2))
    z = categorical("z", torch.ones(4) / 4)
    pyro.sample("u", dist.Normal((table(length) + table(2)[:, None])[y, z], 1.0), obs=u)


def of_probabilities(u: Tensor, length: int = LENGTH) -> None:
    z = categorical("z", torch.ones(4) / 4)
    y = categorical("y", simplex("p_y", length, 2)[z])
    pyro.sample("u", dist.Normal(table(2)[y], 1.0), obs=u)


def written_into(u: Tensor, length: int = LENGTH) -> None:
    z = categorical("z", torch.ones(4) / 4)
    means = torch.zeros(length)
    means[z] = 1.0
    pyro.sample("u", dist.Normal(means.sum(), 1.0), obs=u)


READS: dict[str, Callable[..., None]] = {
    "indexed": looked_up(lambda means, z: means[z]),
    "selected": looked_up(lambda means, z: means.index_select(0, z.reshape(-1)).reshape(z.shape)),
    "gathered": looked_up(lambda means, z: means.gather(0, z.reshape(-1)).reshape(z.shape)),
    "taken": looked_up(lambda means, z: means.take(z)),
    "embedded": looked_up(lambda means, z: torch.nn.functional.embedding(z, means[:, None])[..., 0]),
    "in a plate": in_a_plate,
    "rarely": rarely,
    "of two latents": of_two_latents,
    "of probabilities": of_probabilities,
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("case", READS)
def test_a_table_that_is_too_short_for_a_latent_is_told(case: str, seed: int) -> None:
    """At the look, where the draw is out of range, and in the enumerated run where it is not."""
    pyro.set_rng_seed(seed)
    with pytest.raises(ShapeError) as caught:
        vfe.posterior(READS[case], tensor(0.5))
    said = str(caught.value)
    assert "latent 'z' of 4 values" in said and "in the model after site" in said and "test_indices.py:" in said
    assert "(2," in said or "(2)" in said or "shape (2" in said
    assert isinstance(caught.value.__cause__, (IndexError, RuntimeError))
    pyro.clear_param_store()
    assert_equal(
        vfe.FreeEnergy().decompose(READS[case], None, tensor(0.5), 4).free_energy,
        oracle(READS[case], empty, tensor(0.5), 4).terms["free_energy"],
        1e-10,
    )


def test_a_line_of_the_program_is_shown() -> None:
    with pytest.raises(ShapeError, match=r'`pyro.sample\("u", dist.Normal\(table\(length\)\[z\], 1.0\), obs=u\)`'):
        vfe.posterior(in_a_plate, tensor(0.5))


def test_writes_out_of_range_are_told() -> None:
    with pytest.raises(ShapeError, match=r"`means\[z\] = 1.0`.*latent 'z' of 4 values"):
        vfe.posterior(written_into, tensor(0.5))


def constant(u: Tensor) -> None:
    z = categorical("z", simplex("p_z", 2))
    pyro.sample("u", dist.Normal(table(2)[z] + table(2)[5], 1.0), obs=u)


def constants(u: Tensor) -> None:
    z = categorical("z", simplex("p_z", 2))
    with pyro.plate("data", 3):
        pyro.sample("u", dist.Normal(table(2)[z], 1.0), obs=u.expand(2)[torch.tensor([0, 1, 7])])


def loop(u: Tensor) -> None:
    data = u.expand(2)
    for t in range(3):
        z = categorical(f"z_{t}", simplex("p_z", 2))
        pyro.sample(f"u_{t}", dist.Normal(table(2)[z], 1.0), obs=data[t])


def elements(u: Tensor) -> None:
    with pyro.plate("data", 3):
        z = categorical("z", simplex("p_z", 2))
        pyro.sample("u", dist.Normal(table(2)[z[..., 5]], 1.0), obs=u)


def a_list(u: Tensor) -> None:
    z = categorical("z", torch.ones(4) / 4)
    pyro.sample("u", dist.Normal([0.0, 1.0][z], 1.0), obs=u)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (constant, r"after site 'z': index 5 is out of bounds.*shape \(2,\)"),
        (constants, r"shape \(2,\), and the index goes from 0 to 7"),
        (loop, r"after site 'z_2': index 2 is out of bounds"),
        (elements, r"index 5 is out of bounds for dimension . with size 3"),
        (a_list, r"list index out of range"),
    ],
)
def test_indices_that_are_no_latents_are_told(program: Any, words: str) -> None:
    with pytest.raises(ShapeError, match=words) as caught:
        vfe.FreeEnergy().loss(program, None, tensor(0.5))
    assert isinstance(caught.value.__cause__, IndexError)


def test_an_index_out_of_range_is_told_by_all_that_runs_programs() -> None:
    calls: dict[str, Callable[[], object]] = {
        "explain": lambda: vfe.explain(constant, None, tensor(0.5)),
        "decompose": lambda: vfe.FreeEnergy().decompose(rarely, None, tensor(0.5)),
        "em": lambda: vfe.EM(constant).run(tensor(0.5), progress_bar=False),
        "guide": lambda: vfe.FreeEnergy().loss(constant, vfe.AutoMeanField(constant), tensor(0.5)),
        "bounds": lambda: vfe.bounds(constant, vfe.AutoMeanField(constant), tensor(0.5)),
    }
    for call in calls.values():
        with pytest.raises(VFEError, match="An index is out of range"):
            call()


def test_later_calls_tell_it_as_well() -> None:
    elbo = vfe.FreeEnergy()
    elbo.loss(in_a_plate, None, tensor(0.5), 4)
    with pytest.raises(ShapeError, match="latent 'z' of 4 values"):
        elbo.loss(in_a_plate, None, tensor(0.5), 3)
    elbo.loss(in_a_plate, None, tensor(0.5), 4)


def test_an_index_that_enumerated_values_have_displaced_is_read_right() -> None:
    def model() -> None:
        with pyro.plate("data", 3):
            z = categorical("z", simplex("p_z", 2))
        pyro.sample("x", dist.Normal(z[2].double(), 1.0), obs=tensor(0.5))

    with pytest.warns(VFEWarning, match="do not broadcast"):
        posterior = vfe.posterior(model)
    torch.testing.assert_close(posterior.log_evidence, oracle(model, empty).posterior.log_evidence)


def test_an_IndexError_of_a_users_own_code_stays_one() -> None:
    def batches() -> Iterator[Tensor]:
        yield tensor([0.5, 1.0])
        raise IndexError("no more")

    def guide(u: Tensor, length: int = 4) -> None:
        with pyro.plate("data", 2):
            categorical("z", simplex("q", 4))

    def model(u: Tensor) -> None:
        in_a_plate(u, 4)

    with pytest.raises(IndexError, match="no more") as caught:
        vfe.fit(
            model, guide, optim=pyro.optim.Adam({"lr": 0.1}), num_steps=5, batches=list_of(batches), progress_bar=False
        )
    assert not isinstance(caught.value, VFEError)


class list_of:
    """What can be iterated over again."""

    def __init__(self, batches: Callable[[], Iterator[Tensor]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        return self.batches()
