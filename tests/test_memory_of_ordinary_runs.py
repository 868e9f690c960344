"""What ordinary runs make: rows of a table for each element of a latent in plates are not all made at once.

Memory is counted by the largest tensor that any operation makes, of what it holds in memory.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from checks import check_gradients, check_terms
from programs import PROGRAMS
from torch import Tensor
from torch.distributions import constraints
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pyro_vfe as vfe
from pyro_vfe.errors import SpotCheckError, StructureError
from pyro_vfe.program import row_sizes

DOCS, WORDS, VOCABULARY, TOPICS = 150, 200, 2000, 3
"""30,000 words, whose rows have 60 million numbers: 480 MB."""

TABLE = TOPICS * WORDS * VOCABULARY
"""What may be made: the rows of one plate's elements, and what enumeration makes."""


class Largest(TorchDispatchMode):
    """Notes the most numbers that any tensor has in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in tree_leaves(result):
            if isinstance(part, Tensor):
                self.numbers = max(self.numbers, part.untyped_storage().nbytes() // part.element_size())
        return result


@contextmanager
def at_most(numbers: int) -> Iterator[None]:
    """Checks how large the tensors are that a block makes."""
    with Largest() as largest:
        yield
    assert largest.numbers <= numbers, f"{largest.numbers:,} numbers"


Read = Callable[[Tensor, Tensor], Tensor]

READS: dict[str, Read] = {
    "indexed": lambda table, z: table[z],
    "indexed at the end": lambda table, z: table[z, ...],
    "selected": lambda table, z: table.index_select(0, z.reshape(-1)).reshape(*z.shape, -1),
    "embedded": lambda table, z: torch.nn.functional.embedding(z, table),
    "of a product": lambda table, z: torch.nn.functional.one_hot(z, TOPICS).to(table) @ table,
}


def topics(read: Read) -> Callable[[Tensor], None]:
    def model(w: Tensor) -> None:
        docs, words = w.shape
        table = pyro.param("table", start, constraint=constraints.simplex)
        with pyro.plate("docs", docs, dim=-2):
            mixture = pyro.param("mixture", lambda: torch.ones(docs, 1, TOPICS) / TOPICS, constraints.simplex)
            with pyro.plate("words", words, dim=-1):
                z = pyro.sample("z", dist.Categorical(mixture))
                pyro.sample("w", dist.Categorical(read(table, z)), obs=w)

    return model


def start() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(TOPICS, VOCABULARY, generator=generator) + 0.1
    return table / table.sum(-1, keepdim=True)


def data() -> Tensor:
    return torch.randint(VOCABULARY, (DOCS, WORDS), generator=torch.Generator().manual_seed(1))


def surprise(w: Tensor) -> Tensor:
    """By the formula, of the parameters in Pyro's store."""
    table, mixture = pyro.param("table"), pyro.param("mixture")
    return -(mixture.log() + table.T[w].log()).logsumexp(-1).sum()


@pytest.mark.parametrize("read", READS)
def test_a_topic_model_makes_no_row_for_each_word(read: str) -> None:
    w, model = data(), topics(READS[read])
    with at_most(TABLE):
        loss = vfe.FreeEnergy().loss_and_grads(model, None, w)
    leaves = dict(pyro.get_param_store()._params)
    expected = surprise(w)
    torch.testing.assert_close(torch.tensor(loss), expected.detach(), rtol=1e-10, atol=0)
    found = torch.autograd.grad(expected, list(leaves.values()))
    for leaf, gradient in zip(leaves.values(), found, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-8, atol=1e-8)


def test_other_calls_make_no_row_for_each_word() -> None:
    w, model = data(), topics(READS["indexed"])
    with at_most(TABLE):
        posterior = vfe.posterior(model, w)
        assert posterior.marginal("z").shape == (DOCS, WORDS, TOPICS)
        guide = vfe.AutoMeanField(model)
        terms = vfe.FreeEnergy().decompose(model, guide, w)
        elbo = vfe.FreeEnergy()
        for _ in range(5):  # Some later calls are compared with an ordinary run.
            elbo.loss(model, guide, w)
        vfe.explain(model, None, w)
        run = vfe.EM(model).run(w, max_iter=2, tol=1e9, progress_bar=False)
    assert terms.gap >= 0
    torch.testing.assert_close(torch.tensor(run.free_energy), surprise(w).detach(), rtol=1e-8, atol=0)


def test_data_that_grow_make_no_row_for_each_word() -> None:
    w, model, elbo = data(), topics(READS["indexed"]), vfe.FreeEnergy(check="always")
    with at_most(TABLE):
        elbo.loss(model, None, w[:2])
        pyro.clear_param_store()
        elbo.loss(model, None, w)


def test_one_plate_of_too_many_elements_takes_one_value() -> None:
    def model(w: Tensor) -> None:
        table = pyro.param("table", start, constraint=constraints.simplex)
        with pyro.plate("words", len(w)):
            z = pyro.sample("z", dist.Categorical(torch.ones(TOPICS) / TOPICS))
            pyro.sample("w", dist.Categorical(table[z]), obs=w)

    w = data().reshape(-1)
    with at_most(TABLE):
        found = vfe.posterior(model, w).log_evidence
    table = pyro.param("table").detach()
    torch.testing.assert_close(found, (table.T[w].mean(-1)).log().sum(), rtol=1e-10, atol=0)


def test_two_latents_whose_rows_meet_are_not_all_made() -> None:
    tables = torch.rand(2, TOPICS, VOCABULARY, generator=torch.Generator().manual_seed(2)) + 0.1

    def model(w: Tensor) -> None:
        docs, words = w.shape
        doc, word = pyro.plate("docs", docs, dim=-2), pyro.plate("words", words, dim=-1)
        with doc:
            y = pyro.sample("y", dist.Categorical(torch.ones(2) / 2))
            with word:
                z = pyro.sample("z", dist.Categorical(torch.ones(TOPICS) / TOPICS))
                pyro.sample("w", dist.Categorical(tables[y, z]), obs=w)

    w = data()
    with at_most(TABLE * 2):
        found = vfe.posterior(model, w).log_evidence
    likelihood = (tables / tables.sum(-1, keepdim=True))[..., w].mean(1)
    expected = (likelihood.log().sum(-1).logsumexp(0) - torch.tensor(2.0).log()).sum()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("other", ["roll(1, -1)", "roll(1, -2)", "flip(-1)", "flip(-2)"])
def test_reading_other_elements_is_found_in_large_plates_too(other: str) -> None:
    def read(table: Tensor, z: Tensor) -> Tensor:
        return table[eval(f"z.{other}", {"z": z})]

    with pytest.raises(SpotCheckError, match="'w'"):
        vfe.FreeEnergy().loss(topics(read), None, data())


def test_what_enumeration_cannot_run_is_told_as_before() -> None:
    def model(w: Tensor) -> None:
        with pyro.plate("docs", DOCS, dim=-2), pyro.plate("words", WORDS, dim=-1):
            z = pyro.sample("z", dist.Categorical(torch.ones(TOPICS) / TOPICS))
            both = torch.stack([z, w % TOPICS], -1)
            pyro.sample("w", dist.Categorical(start()[both].mean(-2)), obs=w)

    with pytest.raises(StructureError, match=r"torch\.broadcast_tensors"):
        vfe.FreeEnergy().loss(model, None, data())


def test_small_runs_are_what_they_were() -> None:
    """The elements of plates differ, all of them, where there is room."""
    seen = []

    def model() -> None:
        with pyro.plate("data", 9):
            z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
            seen.append(tuple(z.shape))
            pyro.sample("x", dist.Normal(torch.arange(3.0)[z], 1.0), obs=torch.zeros(9))

    vfe.FreeEnergy().loss(model, None)
    assert (9,) in seen and (1,) not in seen


SEVERAL = [name for name in PROGRAMS if not name.startswith(("chain_of", "ising", "120"))]


@pytest.mark.parametrize("name", SEVERAL)
def test_all_programs_have_their_terms_where_there_is_no_room(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_sizes, "_MOST_BYTES", 0)
    check_terms(name)
    check_gradients(name)
