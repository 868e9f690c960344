"""Data that are no tensors: numbers of NumPy and pandas, lists and scalars count as what they are, or are refused."""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from checks import assert_equal
from oracles import TERMS, oracle
from programs.case import categorical, empty, simplex, tensor
from torch import Tensor
from torch.distributions import constraints

import pyro_vfe as vfe
from pyro_vfe.errors import StructureError

X = [0.1, -1.2, 2.7]
"""None of them has a finite binary expansion."""
K, B = [0, 2, 1], [True, False, True]


class Column:
    """An array of another library: numbers that come by `__array__`."""

    def __init__(self, values: Any) -> None:
        self.values = np.asarray(values)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.values if dtype is None else self.values.astype(dtype)

    def __len__(self) -> int:
        return len(self.values)


def model(x: Any, k: Any, b: Any) -> None:
    means = pyro.param("means", tensor([-1.0, 1.5]))
    chances = pyro.param("chances", tensor([0.2, 0.7]), constraint=constraints.unit_interval)
    with pyro.plate("data", 3):
        z = categorical("z", simplex("p_z", 2))
        pyro.sample("x", dist.Normal(means[z], 0.7), obs=x)
        pyro.sample("k", dist.Categorical(simplex("p_k", 2, 3, seed=1)[z]), obs=k)
        pyro.sample("b", dist.Bernoulli(chances[z]), obs=b)


def guide(x: Any, k: Any, b: Any) -> None:
    with pyro.plate("data", 3):
        categorical("z", simplex("q", 3, 2, seed=2))


def vectors(x: Any) -> None:
    """Events: pairs, of which each datum is one."""
    means = pyro.param("means", tensor([[-1.0, 0.3], [1.5, 0.1]]))
    with pyro.plate("data", 3):
        z = categorical("z", simplex("p_z", 2))
        pyro.sample("x", dist.Normal(means[z], 0.7).to_event(1), obs=x)


PAIRS = [[0.1, 2.0], [-1.3, 0.7], [0.4, 0.4]]

KINDS: dict[str, Callable[[Any], Any]] = {
    "list": list,
    "tuple": tuple,
    "numpy": np.array,
    "reversed numpy": lambda values: np.array(values[::-1])[::-1],
    "foreign bytes": lambda values: np.array(values).astype(np.array(values).dtype.newbyteorder(">")),
    "numpy scalars": lambda values: list(np.array(values)),
    "tensors": lambda values: [torch.tensor(value) for value in values],
    "another library": Column,
}


def read_only(values: Any) -> Any:
    array = np.array(values)
    array.setflags(write=False)
    return array


KINDS["read-only"] = read_only


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_count_as_the_tensors_of_their_numbers(kind: str) -> None:
    data = [KINDS[kind](values) for values in (X, K, B)]
    expected = oracle(model, guide, tensor(X), torch.tensor(K), tensor(B))
    terms = vfe.FreeEnergy().decompose(model, guide, *data)
    for term in TERMS:
        assert_equal(getattr(terms, term), expected.terms[term], 1e-10)
    for term, values in expected.by("data").items():
        assert_equal(getattr(terms.by("data"), term), values, 1e-10)
    vfe.FreeEnergy().loss_and_grads(model, guide, *data)
    for name, gradient in expected.gradients().items():
        assert_equal(pyro.get_param_store()._params[name].grad, gradient, 1e-8)
    posterior = vfe.posterior(model, *data)
    assert_equal(posterior.log_evidence, expected.posterior.log_evidence, 1e-10)
    assert_equal(posterior.marginal("z"), expected.posterior.marginal("z"), 1e-10)


@pytest.mark.parametrize("kind", ["list", "numpy", "reversed numpy", "numpy scalars", "another library", "tensors"])
def test_events_of_arrays_count_as_those_of_tensors(kind: str) -> None:
    expected = oracle(vectors, empty, tensor(PAIRS)).terms["free_energy"]
    assert_equal(vfe.FreeEnergy().decompose(vectors, None, KINDS[kind](PAIRS)).free_energy, expected, 1e-10)


def test_series_and_frames_count_as_the_tensors_of_their_numbers() -> None:
    pd = pytest.importorskip("pandas")
    expected = oracle(model, guide, tensor(X), torch.tensor(K), tensor(B)).terms["free_energy"]
    index = [7, 3, 5]  # What a series is labelled with is nothing to the data.
    for x, k, b in (
        (pd.Series(X, index), pd.Series(K, index), pd.Series(B, index)),
        (pd.Series(X, dtype="Float64"), pd.Series(K, dtype="Int8"), pd.Series(B, dtype="boolean")),
        (pd.DataFrame({"x": X, "k": K})["x"], pd.DataFrame({"k": K, "s": ["a", "b", "c"]}).k, pd.array(B)),
    ):
        assert_equal(vfe.FreeEnergy().decompose(model, guide, x, k, b).free_energy, expected, 1e-10)
    pyro.clear_param_store()
    frame = pd.DataFrame(PAIRS, columns=["one", "two"])
    assert_equal(
        vfe.FreeEnergy().decompose(vectors, None, frame).free_energy,
        oracle(vectors, empty, tensor(PAIRS)).terms["free_energy"],
        1e-10,
    )


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("of", [list, np.array, Column, lambda values: [np.float64(value) for value in values]])
def test_no_number_is_rounded(default: torch.dtype, of: Callable[[Any], Any]) -> None:
    torch.set_default_dtype(default)

    def sharp(x: Any) -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Categorical(torch.ones(2, dtype=torch.float64) / 2))
            means = torch.tensor([1.0, 1.0 + 1e-9], dtype=torch.float64)
            pyro.sample("x", dist.Normal(means[z], torch.tensor(1e-9, dtype=torch.float64)), obs=x)

    numbers = [1.0 + 3e-10, 1.0 + 7e-10, 1.0]
    exact = torch.tensor(numbers, dtype=torch.float64)
    components = [dist.Normal(mean, torch.tensor(1e-9, dtype=torch.float64)) for mean in (1.0, 1.0 + 1e-9)]
    expected = torch.stack([0.5 * one.log_prob(exact).exp() for one in components]).sum(0).log().sum()
    assert_equal(vfe.posterior(sharp, of(numbers)).log_evidence, expected, 1e-6)


@pytest.mark.parametrize("of", [float, np.float64, np.float32, np.array])
def test_scalars_count_as_numbers(of: Callable[[float], Any]) -> None:
    def one(x: Any, k: Any, b: Any) -> None:
        z = categorical("z", simplex("p_z", 2))
        pyro.sample("x", dist.Normal(tensor([-1.0, 1.5])[z], 0.7), obs=x)
        pyro.sample("k", dist.Categorical(simplex("p_k", 2, 3, seed=1)[z]), obs=k)
        pyro.sample("b", dist.Bernoulli(tensor([0.2, 0.7])[z]), obs=b)

    expected = oracle(one, empty, tensor(0.25), torch.tensor(2), tensor(1.0)).terms["free_energy"]
    found = vfe.FreeEnergy().decompose(one, None, of(0.25), np.int64(2), np.bool_(True)).free_energy
    assert_equal(found, expected, 1e-10)


def test_numbers_of_python_have_the_precision_of_the_distribution() -> None:
    torch.set_default_dtype(torch.float32)

    def sharp(x: Any) -> None:
        z = pyro.sample("z", dist.Categorical(torch.ones(2, dtype=torch.float64) / 2))
        pyro.sample("x", dist.Normal(torch.tensor([0.0, 1.0], dtype=torch.float64)[z], 1e-4), obs=x)

    def density(x: Tensor) -> Tensor:
        return 0.5 * dist.Normal(torch.zeros((), dtype=torch.float64), 1e-4).log_prob(x).exp()

    assert_equal(vfe.posterior(sharp, 1e-4 / 3).log_evidence, density(torch.tensor(1e-4 / 3).double()).log(), 1e-7)


def test_em_and_svi_learn_from_arrays_what_they_learn_from_tensors() -> None:
    x, k, b = tensor(X), torch.tensor(K), tensor(B)
    expected = vfe.EM(model).run(x, k, b, max_iter=60, tol=1e-4, fresh=True, progress_bar=False).free_energy
    arrays = (np.array(X), np.array(K), np.array(B))
    found = vfe.EM(model).run(*arrays, max_iter=60, tol=1e-4, fresh=True, progress_bar=False).free_energy
    assert_equal(torch.tensor(found), torch.tensor(expected), 1e-10)
    losses = []
    for data in ((x, k, b), arrays, (X, K, B)):
        pyro.clear_param_store()
        svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), vfe.FreeEnergy())
        losses.append([svi.step(*data) for _ in range(5)])
    assert_equal(torch.tensor(losses[1]), torch.tensor(losses[0]), 1e-10)
    assert_equal(torch.tensor(losses[2]), torch.tensor(losses[0]), 1e-10)


def test_conditioned_models_and_dreams_take_arrays() -> None:
    def joint() -> None:
        with pyro.plate("data", 3):
            z = categorical("z", simplex("p_z", 2))
            pyro.sample("x", dist.Normal(tensor([-1.0, 1.5])[z], 0.7))

    given = pyro.condition(joint, data={"x": np.array(X)})
    expected = oracle(pyro.condition(joint, data={"x": tensor(X)}), empty).posterior
    assert_equal(vfe.posterior(given).marginal("z"), expected.marginal("z"), 1e-10)


def test_data_of_a_chain_may_be_an_array_under_a_mask() -> None:
    states, seen = np.array([0, 1, 1, 0]), torch.tensor([True, False, True, True])

    def chain(states: Any) -> None:
        with pyro.plate("time", 4):
            steps = vfe.MarkovChain(simplex("initial", 2), simplex("transition", 2, 2, seed=1))
            pyro.sample("s", steps, obs=states, obs_mask=seen)

    initial, transition = simplex("initial", 2), simplex("transition", 2, 2, seed=1)
    paths = [initial[0] * transition[0, middle] * transition[middle, 1] * transition[1, 0] for middle in (0, 1)]
    assert_equal(vfe.posterior(chain, states).log_evidence, sum(paths[1:], paths[0]).log(), 1e-10)
    assert_equal(vfe.posterior(chain, states.tolist()).log_evidence, sum(paths[1:], paths[0]).log(), 1e-10)


def test_what_is_computed_from_a_latent_has_a_statement_of_its_own() -> None:
    def model(of: Callable[[Tensor, Tensor], Any]) -> None:
        z = pyro.sample("z", dist.Bernoulli(tensor(0.3)))
        with pyro.plate("pair", 2):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=of(z, tensor(0.5)))

    def followed(u: Any) -> None:
        z = pyro.sample("z", dist.Bernoulli(tensor(0.3)))
        for i, x in enumerate([z, 0.5]):
            pyro.sample(f"x_{i}", dist.Normal(0.0, 1.0), obs=x)

    for of in (lambda z, other: [z, other], lambda z, other: (0.5, z)):
        with pytest.raises(StructureError, match=r"computed from latents.*Write a statement for each element"):
            vfe.FreeEnergy().decompose(model, None, of)
    expected = oracle(model, empty, lambda z, other: torch.stack([z, other])).terms["free_energy"]
    assert_equal(vfe.FreeEnergy().decompose(followed, None, None).free_energy, expected, 1e-10)


def test_an_array_that_the_program_writes_into_counts_as_it_was_given() -> None:
    def model(x: Any) -> None:
        x = x.copy()
        with pyro.plate("data", 3):
            z = categorical("z", simplex("p_z", 2))
            pyro.sample("x", dist.Normal(tensor([-1.0, 1.5])[z], 0.7), obs=x)
            x[:] = 17.0

    def unwritten(x: Any) -> None:
        with pyro.plate("data", 3):
            z = categorical("z", simplex("p_z", 2))
            pyro.sample("x", dist.Normal(tensor([-1.0, 1.5])[z], 0.7), obs=x)

    expected = oracle(unwritten, empty, tensor(X)).terms["free_energy"]
    assert_equal(vfe.FreeEnergy().decompose(model, None, np.array(X)).free_energy, expected, 1e-10)


def followed(u: Any, error: str, plates: tuple[int, ...] = (3,), family: Any = None) -> Tensor:
    """The log evidence where the message's line stands in the place of `obs=u`, pasted as it is."""
    (line,) = re.findall(r"Write `(.*)`, u being the data", error)
    fn = family or dist.Normal
    scope = {"u": u, "np": np, "torch": torch, "pyro": pyro, "parameters": PARAMETERS[fn], "fn": fn}
    exec(
        f"def model(u):\n z = pyro.sample('z', {CATEGORICAL})\n pyro.sample('x', fn(*parameters(z)), {line})",
        scope | {"dist": dist},
        scope,
    )
    return evidence_in(plates, scope["model"], u)


CATEGORICAL = "dist.Categorical(torch.tensor([0.3, 0.7]))"

PARAMETERS: dict[Any, Callable[[Tensor], tuple[Any, ...]]] = {
    dist.Normal: lambda z: (tensor([-1.0, 1.5])[z], 0.7),
    dist.Categorical: lambda z: (tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])[z],),
}


def evidence_in(plates: tuple[int, ...], inner: Callable[[Any], Any], u: Any) -> Tensor:
    def model(u: Any) -> None:
        with around(plates):
            inner(u)

    return vfe.posterior(model, u).log_evidence


class around:
    """Plates of these sizes, the last of them innermost."""

    def __init__(self, plates: tuple[int, ...]) -> None:
        self.plates = [pyro.plate(f"plate_{dim}", size, dim=-dim - 1) for dim, size in enumerate(plates[::-1])]

    def __enter__(self) -> None:
        for plate in self.plates:
            plate.__enter__()

    def __exit__(self, *error: Any) -> None:
        for plate in self.plates[::-1]:
            plate.__exit__(*error)


def density(x: Tensor) -> Tensor:
    """The log-probability of each datum under the mixture of two normals."""
    parts = [dist.Normal(mean, 0.7).log_prob(x.double()) for mean in (-1.0, 1.5)]
    return torch.logaddexp(parts[0] + math.log(0.3), parts[1] + math.log(0.7))


def chance(k: Tensor) -> Tensor:
    """The log-probability of each datum under the mixture of two categoricals."""
    return (tensor([0.3, 0.7]) @ tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]]))[k].log()


SPARSE = type("Sparse", (), {"toarray": lambda self: np.array(X)})

WIDE = [2.0**63, 1.0, 2.0]

REFUSED: dict[str, tuple[Callable[[], Any], str, list[float]]] = {
    "objects": (lambda: np.array(X, dtype=object), "holds objects", X),
    "numbers in words": (lambda: ["0.1", "-1.2", "2.7"], "holds objects", X),
    "wide numbers": (lambda: np.array([2**63, 1, 2], dtype=np.uint64), "holds objects", WIDE),
    "a masked array": (lambda: np.ma.MaskedArray(X, [0, 1, 0]), "has a mask", [0.1, 2.7]),
    "a dict": (lambda: dict(zip("abc", X, strict=True)), "has keys", X),
    "a view of a dict": (lambda: dict(zip("abc", X, strict=True)).values(), "no sequence", X),
    "sparse": (SPARSE, "is sparse", X),
    "a column": (lambda: np.array(X)[:, None], "is a column, of shape (3, 1)", X),
    "times": (
        lambda: np.array(["2020-01-02", "2020-01-01", "2020-01-03"], dtype="M8[D]"),
        "holds times",
        [1.0, 0.0, 2.0],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_answered_with_the_line_that_the_message_gives(case: str) -> None:
    made, words, expected = REFUSED[case]
    with pytest.raises(StructureError, match=re.escape(words)) as refusal:
        evidence_in((3,), of_normals, made())
    assert "'x'" in str(refusal.value)
    assert_equal(followed(made(), str(refusal.value)), density(tensor(expected)).sum(), 1e-10)


def of_normals(u: Any) -> None:
    z = categorical("z", tensor([0.3, 0.7]))
    pyro.sample("x", dist.Normal(tensor([-1.0, 1.5])[z], 0.7), obs=u)


def of_categories(u: Any) -> None:
    z = categorical("z", tensor([0.3, 0.7]))
    pyro.sample("x", dist.Categorical(tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])[z]), obs=u)


@pytest.mark.parametrize("of", [list, np.array, lambda names: np.array(names, dtype=object)])
def test_names_are_answered_with_their_codes(of: Callable[[Any], Any]) -> None:
    names = of(["b", "c", "a", "b"])
    with pytest.raises(StructureError, match="holds names") as refusal:
        evidence_in((4,), of_categories, names)
    found = followed(names, str(refusal.value), (4,), dist.Categorical)
    assert_equal(found, chance(torch.tensor([1, 2, 0, 1])).sum(), 1e-10)


@pytest.mark.parametrize("row", [list, torch.tensor, np.array])
def test_rows_of_different_lengths_are_padded_under_a_mask(row: Callable[[Any], Any]) -> None:
    u = [row([0.1, 1.0]), row([0.7]), row([0.2, 0.4])]
    with pytest.raises(StructureError, match="rows of different lengths") as refusal:
        evidence_in((3, 2), of_normals, u)
    expected = density(tensor([0.1, 1.0, 0.7, 0.2, 0.4])).sum()
    assert_equal(followed(u, str(refusal.value), (3, 2)), expected, 1e-10)


def cases_of_pandas() -> Iterator[tuple[str, Any, Any, Any, Tensor, tuple[int, ...]]]:
    pd = pytest.importorskip("pandas")
    named = pd.Series(["b", "c", "a"], dtype="category")
    codes = torch.tensor([1, 2, 0])
    yield "is categorical", of_categories, named, dist.Categorical, chance(codes).sum(), (3,)
    both = pd.DataFrame({"one": named, "two": [2, 2, 1]})
    both_codes = torch.stack([codes, torch.tensor([2, 2, 1])], -1)
    yield "is categorical", of_categories, both, dist.Categorical, chance(both_codes).sum(), (3, 2)
    names = pd.Series(["b", "c", "a"])
    yield "holds names", of_categories, names, dist.Categorical, chance(codes).sum(), (3,)
    yield "is a column", of_normals, pd.DataFrame({"x": X}), dist.Normal, density(tensor(X)).sum(), (3,)
    days = pd.Series(pd.to_datetime(["2020-01-02", "2020-01-01", "2020-01-03"]))
    yield "holds times", of_normals, days, dist.Normal, density(tensor([1.0, 0.0, 2.0])).sum(), (3,)


def test_series_and_frames_that_are_refused_are_answered_with_the_line_that_the_message_gives() -> None:
    for words, inner, u, family, expected, plates in cases_of_pandas():
        with pytest.raises(StructureError, match=words) as refusal:
            evidence_in(plates, inner, u)
        assert_equal(followed(u, str(refusal.value), plates, family), expected, 1e-10)


@pytest.mark.parametrize("u", [object(), "words", [None, object()], {"a": object()}])
def test_what_has_no_numbers_is_named(u: Any) -> None:
    with pytest.raises(StructureError, match="Site 'x' observes"):
        evidence_in((3,), of_normals, u)


MASK = [True, False, True]


@pytest.mark.parametrize("of", [np.array, list, lambda mask: tensor(mask), lambda mask: torch.tensor(mask).int()])
@pytest.mark.parametrize("around", [True, False])
def test_masks_that_are_no_tensors_of_bools_are_told(of: Callable[[Any], Any], around: bool) -> None:
    def model(mask: Any) -> None:
        with pyro.plate("data", 3):
            z = categorical("z", tensor([0.3, 0.7]))
            if around:
                with pyro.poutine.mask(mask=mask):
                    pyro.sample("x", dist.Normal(tensor([-1.0, 1.5])[z], 0.7), obs=tensor(X))
            else:
                pyro.sample("x", dist.Normal(tensor([-1.0, 1.5])[z], 0.7), obs=tensor(X), obs_mask=mask)

    with pytest.raises((StructureError, TypeError), match="A mask is a") as refusal:
        vfe.posterior(model, of(MASK))
    (line,) = re.findall(r"Write `(.*)` in place", str(refusal.value))
    mask = eval(line, {"np": np, "torch": torch, "mask": of(MASK)})
    assert_equal(vfe.posterior(model, mask).log_evidence, density(tensor([X[0], X[2]])).sum(), 1e-10)
