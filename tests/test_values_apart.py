"""Programs that do not broadcast over the values of their latents are run once per value, and the numbers are exact."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from checks import assert_equal, check_pair
from oracles import oracle
from programs.case import bernoulli, categorical, empty, tensor
from pyro.distributions import constraints
from pyro.ops.indexing import Vindex
from torch import Tensor

import pyro_vfe as vfe
import pyro_vfe.program.runs as one_run
from pyro_vfe.errors import CostError, ShapeError, VFEError, VFEWarning
from pyro_vfe.program.recorder import record_both

Program = Callable[[], None]

DATA = tensor([1.0, 4.0, 2.0])
TABLE = tensor([[1.0, 2.0, 3.0], [3.0, 5.0, 1.0]])


def observe(loc: Tensor, value: Tensor = DATA) -> None:
    pyro.sample("o", dist.Normal(loc, 1.0), obs=value)


def table() -> Tensor:
    """A parameter whose rows and columns are all alike at first."""
    found: Tensor = pyro.param("table", torch.ones(2, 3))
    return found


def a_table_indexed_twice() -> None:
    t = pyro.param("t", tensor([[1.0, 2.0], [3.0, 5.0]]))
    a, b = bernoulli("a", 0.7).long(), bernoulli("b", 0.4).long()
    observe(t[a][b], tensor(2.5))


def a_row_read_along_a_plate() -> None:
    row = pyro.param("table", TABLE)[categorical("a", tensor([0.3, 0.7]))]
    with pyro.plate("n", 3):
        observe(row)


def a_row_of_equal_entries() -> None:
    row = table()[categorical("a", tensor([0.3, 0.7]))]
    with pyro.plate("n", 3):
        observe(row)


def a_product_of_spikes() -> None:
    xi = torch.stack([bernoulli(f"xi_{i}", p) for i, p in enumerate((0.3, 0.6))])
    w = pyro.param("w", tensor([1.0, -2.0]))
    loc = (xi * w) @ tensor([[1.0, 0.5], [0.2, 1.0], [1.0, 1.0]]).T
    with pyro.plate("n", 3):
        observe(loc)


def places_of_a_stack() -> None:
    t = torch.stack([categorical(f"t_{i}", tensor([0.2, 0.3, 0.5])) for i in range(3)])
    with pyro.plate("n", 3):
        observe(pyro.param("mu", tensor([0.0, 1.0, 3.0]))[t[torch.tensor([2, 0, 1])]])


def an_event_read_by_index() -> None:

    v = categorical("v", tensor([0.2, 0.8]))
    rows = torch.eye(2)[v]

    with pyro.plate("n", 3):
        observe(pyro.param("mu", tensor([0.5, 3.0]))[0] * rows[torch.tensor([0, 1, 0])])


def entry(t: Tensor, z: Tensor) -> Tensor:
    return t.reshape(-1)[z.long()].reshape(-1)[0]


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    scripted = torch.jit.script(entry)


def a_scripted_function() -> None:
    observe(scripted(pyro.param("t", tensor([1.0, 2.5])), bernoulli("z", 0.4)), tensor(1.5))


def two_scripted_reads() -> None:
    """Two latents that nobody sees the site read: their values have to be taken apart from each other."""
    a, b = bernoulli("a", 0.4), bernoulli("b", 0.3)
    loc = scripted(pyro.param("t", torch.ones(2)), a) + 2 * scripted(pyro.param("s", tensor([0.5, 2.0])), b)
    observe(loc, tensor(1.5))


def a_vectorised_function() -> None:
    z = categorical("z", tensor([0.2, 0.3, 0.5]))
    loc = torch.vmap(lambda m: (m * torch.nn.functional.one_hot(z, 3)).sum())(pyro.param("m", torch.ones(3, 3)))
    with pyro.plate("n", 3):
        observe(loc)


def a_reshaped_plate() -> None:
    """Each element by itself, and the program flattens the plates."""
    with pyro.plate("cols", 3, dim=-1):
        z = categorical("z", tensor([0.2, 0.3, 0.5]))
        observe(pyro.param("mu", tensor([0.0, 1.0, 3.0]))[z.view(3)])


def first_in_a_batch() -> None:
    z = categorical("z", tensor([0.2, 0.3, 0.5]))
    observe(pyro.param("mu", tensor([0.0, 1.0, 3.0])).reshape(3, 1)[z.reshape(-1)[0], 0], tensor(2.5))


def a_chain_of_rows() -> None:
    """Steps of a loop that take rows twice: no site reads more than two states, so three of them take as many runs."""
    z, rows = tensor(0).long(), pyro.param("rows", tensor([[0.8, 0.2], [0.3, 0.7]]), constraint=constraints.simplex)
    for t in range(5):
        z = pyro.sample(f"z_{t}", dist.Categorical(rows[z] if t else rows[0]))
        pyro.sample(f"o_{t}", dist.Normal(tensor([[0.0, 1.0], [2.0, 3.0]])[z][1], 1.0), obs=DATA[t % 3])


def a_guide_too() -> None:
    a = bernoulli("a", 0.7).long()
    b = pyro.sample("b", dist.Bernoulli(tensor([[0.2, 0.9], [0.5, 0.6]])[a][1])).long()
    observe(tensor([[1.0, 2.0], [3.0, 5.0]])[a][b], tensor(2.5))


def guide_of_both() -> None:
    q = pyro.param("q", tensor([[0.3, 0.4], [0.8, 0.1]]), constraint=constraints.unit_interval)
    a = pyro.sample("a", dist.Bernoulli(q[0][1])).long()
    pyro.sample("b", dist.Bernoulli(q[a][1]))


def values_in_the_place_of_a_plate() -> None:
    z = categorical("z", tensor([0.4, 0.6]))
    with pyro.plate("n", 3):
        pyro.sample("x", dist.Normal(z, 1.0), obs=DATA)
    observe(z.reshape(-1)[: z.numel()].squeeze(), tensor(0.3))


def branching_when_enumerated() -> None:
    z = categorical("z", tensor([0.4, 0.6]))
    observe(z.sum().item() if z.dim() else z, tensor(0.3))


PROGRAMS: dict[str, tuple[Program, Program, int]] = {
    "a table indexed twice": (a_table_indexed_twice, empty, 4),
    "a row read along a plate": (a_row_read_along_a_plate, empty, 2),
    "a row of equal entries": (a_row_of_equal_entries, empty, 2),
    "a product of spikes": (a_product_of_spikes, empty, 4),
    "places of a stack": (places_of_a_stack, empty, 27),
    "an event read by index": (an_event_read_by_index, empty, 2),
    "a scripted function": (a_scripted_function, empty, 2),
    "two scripted reads": (two_scripted_reads, empty, 4),
    "a vectorised function": (a_vectorised_function, empty, 3),
    "a reshaped plate": (a_reshaped_plate, empty, 3),
    "first in a batch": (first_in_a_batch, empty, 3),
    "a chain of rows": (a_chain_of_rows, empty, 4),
    "a guide too": (a_guide_too, guide_of_both, 4),
    "values in the place of a plate": (values_in_the_place_of_a_plate, empty, 2),
    "branching when enumerated": (branching_when_enumerated, empty, 2),
}


def counting(count: list[int]) -> Callable[..., Any]:
    def record(*args: Any, **kwargs: Any) -> Any:
        count.append(1)
        return record_both(*args, **kwargs)

    return record


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The programs do not broadcast")
        yield


@pytest.mark.parametrize("name", PROGRAMS)
def test_terms_and_gradients_equal_the_joint_table(name: str) -> None:
    check_pair(*PROGRAMS[name][:2])


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_posterior_equals_the_joint_table(name: str) -> None:
    model, _, _ = PROGRAMS[name]
    exact, posterior = oracle(model, empty).posterior, vfe.posterior(model)
    assert_equal(posterior.log_evidence, exact.log_evidence, 1e-10)
    for latent in posterior.sites:
        assert_equal(posterior.marginal(latent), exact.marginal(latent), 1e-10)


@pytest.mark.parametrize("name", PROGRAMS)
def test_they_run_once_per_joint_value_that_some_site_reads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, guide, runs = PROGRAMS[name]
    elbo, count = vfe.FreeEnergy(), list[int]()
    with pytest.warns(VFEWarning, match=f"run {runs} times, once for each joint value"):
        elbo.loss(model, guide)
    elbo.loss(model, guide)
    monkeypatch.setattr(
        one_run, "record_both", lambda *args, **kwargs: (count.append(1), record_both(*args, **kwargs))[1]
    )
    elbo.loss(model, guide)  # The third call is not one of those that are checked.
    assert len(count) == runs


def test_the_first_numbers_are_those_of_a_joint_table_on_paper() -> None:
    def twice() -> None:
        t, a, b = tensor([[1.0, 2.0], [3.0, 5.0]]), bernoulli("a", 0.7).long(), bernoulli("b", 0.4).long()
        observe(t[a][b], tensor(2.5))

    def along() -> None:
        row = TABLE[categorical("a", tensor([0.3, 0.7]))]
        with pyro.plate("n", 3):
            observe(row)

    assert vfe.FreeEnergy().loss(twice, empty) == pytest.approx(1.52171843, abs=5e-9)
    assert vfe.FreeEnergy().loss(along, empty) == pytest.approx(5.57899049, abs=5e-9)


def test_em_climbs_as_it_does_where_the_program_broadcasts() -> None:
    data = tensor([0.1, 3.2, -0.4, 2.8, 0.3])

    def model(reshaped: bool) -> None:
        weights = pyro.param("weights", tensor([0.4, 0.6]), constraint=constraints.simplex)
        mu = pyro.param("mu", tensor([0.5, 2.0]))
        with pyro.plate("n", 5):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("o", dist.Normal(mu[z.view(5) if reshaped else z], 1.0), obs=data)

    runs = []
    for reshaped in (True, False):
        pyro.clear_param_store()
        runs.append(vfe.EM(model).run(reshaped, max_iter=50, progress_bar=False, tol=1e-9))
    assert runs[0].n_iter == runs[1].n_iter
    assert runs[0].free_energy == pytest.approx(runs[1].free_energy, rel=1e-12)
    for name, value in runs[0].params.items():
        assert_equal(value, runs[1].params[name], 1e-12)


def test_a_chain_that_begins_by_class_is_the_mixture_of_its_classes() -> None:
    initial, move = tensor([[0.9, 0.1], [0.3, 0.7]]), tensor([[0.8, 0.2], [0.4, 0.6]])

    def model(given: int | None) -> None:
        c = given if given is not None else categorical("c", tensor([0.5, 0.5]))
        with pyro.plate("time", 3):
            z = pyro.sample("z", vfe.MarkovChain(initial[c], move))
            observe(z.to(DATA))

    losses = tensor([vfe.FreeEnergy().loss(model, empty, given) for given in (0, 1)])
    expected = -(tensor([0.5, 0.5]).log() - losses).logsumexp(0)
    assert vfe.FreeEnergy().loss(model, empty, None) == pytest.approx(expected.item(), rel=1e-12)


def test_what_is_random_without_a_site_is_refused_as_before() -> None:
    """Two runs at equal values differ: no number of runs mends that."""

    def model() -> None:
        z = categorical("z", tensor([0.2, 0.3, 0.5]))
        observe(tensor([0.0, 1.0, 3.0])[z.reshape(-1)[0]] + torch.randn(()), tensor(2.5))

    with pytest.raises(VFEError):
        vfe.FreeEnergy().loss(model, empty)


def test_too_many_joint_values_are_refused_with_their_number() -> None:
    def model() -> None:
        xi = torch.stack([bernoulli(f"xi_{i}", 0.4) for i in range(13)])
        with pyro.plate("n", 3):
            observe(xi @ torch.ones(13, 3))

    with pytest.raises(CostError, match="8,192 times"):
        vfe.FreeEnergy().loss(model, empty)


def test_a_program_that_is_wrong_for_each_value_says_what_it_said() -> None:
    def model() -> None:
        z = categorical("z", tensor([0.5, 0.5, 1e-12]))
        observe(tensor([0.0, 1.0])[z], tensor(2.5))

    with pytest.raises(ShapeError, match="An index is out of range"):
        vfe.FreeEnergy().loss(model, empty)


def test_explain_shows_the_runs() -> None:
    shown = str(vfe.explain(a_table_indexed_twice, None))
    assert "4 runs" in shown and "one run per value" in shown


def test_programs_that_broadcast_take_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def model() -> None:
        with pyro.plate("n", 3):
            z = categorical("z", tensor([0.2, 0.3, 0.5]))
            q = Vindex(tensor([[0.0, 1.0, 2.0], [1.0, 2.0, 3.0]]).T)[..., z, :]
            e = tensor([0.5, 1.0, 2.0])[..., z]
            pyro.sample("o", dist.Normal(q, e[..., None]).to_event(1), obs=torch.ones(3, 2))

    elbo, count = vfe.FreeEnergy(), list[int]()
    exact = oracle(model, empty)
    assert elbo.loss(model, empty) == pytest.approx(float(exact.terms["free_energy"]), abs=1e-10)
    elbo.loss(model, empty)
    monkeypatch.setattr(
        one_run, "record_both", lambda *args, **kwargs: (count.append(1), record_both(*args, **kwargs))[1]
    )
    elbo.loss(model, empty)
    assert len(count) == 1
