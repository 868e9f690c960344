"""Programs whose structure follows their arguments, and what tracking cannot see: right, or refused."""

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gradients, oracle
from programs.case import bernoulli, categorical, empty, noise, positive, simplex, tensor, unit
from torch import Tensor
from torch.nn import functional

import pyro_vfe as vfe
from pyro_vfe.errors import CostError, SpotCheckError, StructureError, VFEError

NODES, MANY, STATES = 24, 110, 3
ROOT = noise(STATES, seed=1).softmax(-1)
EDGE = noise(STATES, STATES, seed=2).softmax(-1)
MEANS = tensor([-1.0, 0.5, 2.0])
POINTS = noise(MANY, seed=3)


def tree(parents: list[int]) -> None:
    """Node n hangs on node parents[n], which comes before it; a root on -1."""
    nodes: list[Tensor] = []
    for n, parent in enumerate(parents):
        probs = ROOT if parent < 0 else EDGE[nodes[parent]]
        nodes.append(categorical(f"z_{n}", probs))
        pyro.sample(f"u_{n}", dist.Normal(MEANS[nodes[n]], 1.0), obs=POINTS[n])


def tree_evidence(parents: list[int]) -> Tensor:
    """Messages from the leaves to the roots: m_n(z) = p(u_n | z) prod_children sum_z' p(z' | z) m_child(z')."""
    messages = [dist.Normal(MEANS, 1.0).log_prob(POINTS[n]) for n in range(len(parents))]
    total = tensor(0.0)
    for n in reversed(range(len(parents))):
        if parents[n] < 0:
            total = total + (ROOT.log() + messages[n]).logsumexp(-1)
        else:
            messages[parents[n]] = messages[parents[n]] + (EDGE.log() + messages[n]).logsumexp(-1)
    return total


WIRINGS = {
    "chain": [n - 1 for n in range(NODES)],
    "binary": [(n - 1) // 2 for n in range(NODES)],
    "star": [-1] + [0] * (NODES - 1),
    "skipping": [-1, 0, *range(NODES - 2)],
    "forest": [n - 4 for n in range(NODES)],
}


def test_one_free_energy_follows_the_wiring_from_call_to_call() -> None:
    elbo = vfe.FreeEnergy()
    for name in (*WIRINGS, *reversed(WIRINGS)):
        parents = [max(-1, parent) for parent in WIRINGS[name]]
        assert elbo.loss(tree, empty, parents) == pytest.approx(-tree_evidence(parents).item(), rel=1e-12)


def parent_lists(size: int) -> st.SearchStrategy[list[int]]:
    return st.tuples(*(st.integers(-1, n - 1) for n in range(size))).map(list)


ONE_FOR_ALL = vfe.FreeEnergy()


@settings(max_examples=10, deadline=None, derandomize=True)
@given(parent_lists(NODES))
def test_any_wiring_of_the_same_length_is_right(parents: list[int]) -> None:
    assert ONE_FOR_ALL.loss(tree, empty, parents) == pytest.approx(-tree_evidence(parents).item(), rel=1e-12)


def test_a_hundred_latents_rewired_are_right_in_decompose_and_posterior_too() -> None:
    elbo = vfe.FreeEnergy()
    for parents in ([n - 1 for n in range(MANY)], [-1, *(n // 3 for n in range(MANY - 1))]):
        expected = tree_evidence(parents).item()
        assert elbo.decompose(tree, empty, parents).surprise.item() == pytest.approx(-expected, rel=1e-12)
        assert vfe.posterior(tree, parents).log_evidence.item() == pytest.approx(expected, rel=1e-12)


class Flags:
    """What a program looks at from outside: what may change between calls."""

    def __init__(self, **flags: Any) -> None:
        self.__dict__.update(flags)


STANDARD = {"b": False, "c_reads_nothing": False, "size": 3, "observed": True, "nested": False}


def switched(flags: Any) -> Callable[[], None]:
    def model() -> None:
        a = bernoulli("a", unit("a_prob"))
        if flags.b:
            a = a + categorical("b", simplex("b_probs", 3, seed=1))
        data = pyro.plate("data", flags.size, dim=-1)
        with data:
            c = bernoulli("c", unit("c_prob", seed=2) if flags.c_reads_nothing else 0.2 + 0.2 * a)
            if flags.observed:
                pyro.sample("u", dist.Normal(a + c, positive("sigma", seed=3)), obs=noise(flags.size, seed=4))
        if flags.nested:
            with pyro.plate("groups", 2, dim=-2), data:
                d = bernoulli("d", 0.3 + 0.1 * c)
                pyro.sample("v", dist.Normal(d, 1.0), obs=noise(2, flags.size, seed=5))

    return model


SETTINGS = (
    {},
    {"b": True},
    {"c_reads_nothing": True},
    {"size": 2},
    {"size": 1},
    {"b": True, "size": 4},
    {"nested": True, "size": 2},
    {"observed": False},
    {"nested": True, "size": 1},
    {},
)


@pytest.mark.parametrize("check", ["first", False])
@pytest.mark.parametrize("guided", [False, True])
def test_sites_plates_and_edges_may_come_and_go_between_calls(guided: bool, check: Any) -> None:
    flags = Flags()
    model, elbo = switched(flags), vfe.FreeEnergy(check=check)

    def guide() -> None:
        if guided and flags.b:
            categorical("b", simplex("q_b", 3, seed=6))

    for setting in SETTINGS:
        flags.__dict__.update(STANDARD, **setting)
        expected = oracle(model, guide).terms["free_energy"]
        found = elbo.differentiable_loss(model, guide)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradients(found), gradients(expected), rtol=1e-8, atol=1e-8)


def test_two_latents_may_trade_places_between_calls() -> None:
    """The same sites, dims and shapes: only the edges differ."""
    flags = Flags(swapped=False)
    tables = noise(3, 3, seed=1).softmax(-1), noise(3, seed=2).softmax(-1)

    def model() -> None:
        first, second = ("b", "a") if flags.swapped else ("a", "b")
        x = categorical(first, tables[1])
        y = categorical(second, tables[0][x])
        pyro.sample("u", dist.Normal(MEANS[x] * 2, 1.0), obs=tensor(0.3))
        pyro.sample("v", dist.Normal(MEANS[y], 1.0), obs=tensor(0.9))

    def guide() -> None:
        categorical("a", simplex("q", 3, seed=3))

    elbo = vfe.FreeEnergy()
    for swapped in (False, True, False, True):
        flags.swapped = swapped
        expected = oracle(model, guide).terms["free_energy"].item()
        assert elbo.loss(model, guide) == pytest.approx(expected, rel=1e-12)


def test_a_chain_may_grow_and_shrink_between_calls() -> None:
    def model(steps: int) -> None:
        tree([n - 1 for n in range(steps)])

    elbo = vfe.FreeEnergy()
    for steps in (2, 24, 5, 13, 12, 1):
        expected = -tree_evidence([n - 1 for n in range(steps)])
        assert elbo.loss(model, empty, steps) == pytest.approx(expected.item(), rel=1e-12)


def test_a_program_that_draws_its_structure_at_random_is_refused() -> None:
    def model() -> None:
        nodes = [categorical("z_0", ROOT)]
        for n in range(1, 16):
            nodes.append(categorical(f"z_{n}", EDGE[nodes[int(torch.randint(n, ()))]]))
            pyro.sample(f"u_{n}", dist.Normal(MEANS[nodes[n]], 1.0), obs=POINTS[n])
        if torch.rand(()) < 0.5:
            pyro.sample("more", dist.Normal(MEANS[nodes[-1]], 1.0), obs=POINTS[0])

    elbo, refused = vfe.FreeEnergy(check="always"), 0
    for _ in range(8):
        try:
            elbo.loss(model, empty)
        except VFEError as error:
            refused += 1
            assert isinstance(error, StructureError | SpotCheckError)
    assert refused == 8


SCRIPTED: Any = None


def scripted(table: Tensor, z: Tensor) -> Tensor:
    return table[z]


def blind_by_script(z: Tensor) -> Tensor:
    global SCRIPTED
    SCRIPTED = SCRIPTED or torch.jit.trace(scripted, (MEANS, torch.tensor(1)), check_trace=False)
    return SCRIPTED(MEANS, z)


def blind_by_vmap(z: Tensor) -> Tensor:
    return torch.vmap(lambda k: MEANS.index_select(0, k.reshape(1)).reshape(()))(z.reshape(1)).reshape(())


def blind_by_reshape(z: Tensor) -> Tensor:
    return MEANS[z.reshape(-1)[0]]


def blind_to_dims(z: Tensor) -> Tensor:
    return MEANS[0] if z.dim() else MEANS[z]


BLIND = {
    "script": blind_by_script,
    "vmap": blind_by_vmap,
    "reshape": blind_by_reshape,
    "dims": blind_to_dims,
}


@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize("name", BLIND)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_tracking_cannot_see_is_right(name: str, count: int) -> None:
    """20 latents share dims and are tracked; one latent has a dim of its own."""

    def model() -> None:
        for n in range(count):
            z = categorical(f"z_{n}", ROOT)
            pyro.sample(f"u_{n}", dist.Normal(BLIND[name](z), 1.0), obs=POINTS[n])

    expected = -(ROOT.log() + dist.Normal(MEANS, 1.0).log_prob(POINTS[:count].unsqueeze(-1))).logsumexp(-1).sum().item()
    for seed in range(3):
        pyro.set_rng_seed(seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The programs do not broadcast over the values")
            assert vfe.FreeEnergy(check="always").loss(model, empty) == pytest.approx(expected, rel=1e-12)


def test_numbers_taken_from_a_latent_are_enumerated_one_by_one() -> None:
    def model() -> None:
        for n in range(3):
            z = categorical(f"z_{n}", ROOT)
            mean = torch.full((), float(MEANS[z.flatten()[-1].numpy().item()]))
            pyro.sample(f"u_{n}", dist.Normal(mean, 1.0), obs=POINTS[n])

    expected = -(ROOT.log() + dist.Normal(MEANS, 1.0).log_prob(POINTS[:3].unsqueeze(-1))).logsumexp(-1).sum().item()
    assert vfe.FreeEnergy().loss(model, empty) == pytest.approx(expected, rel=1e-12)


class Counted:
    """A model that counts its runs, and lies where its latent has more than one value at once, or in other runs."""

    def __init__(self, lies: bool) -> None:
        self.lies, self.runs = lies, 0

    def __call__(self) -> None:
        self.runs += 1
        z = categorical("z", ROOT)
        noise = torch.rand(()) if self.lies else 0.0  # so that no run per value mends it
        pyro.sample("u", dist.Normal((blind_to_dims(z) if self.lies else MEANS[z]) + 1e-3 * noise, 1.0), obs=POINTS[0])


@pytest.mark.filterwarnings("ignore:The programs change what outlives a run")
def test_a_failed_spot_check_names_the_site_and_both_values() -> None:
    with pytest.raises(SpotCheckError) as refusal:
        for seed in range(10):
            pyro.set_rng_seed(seed)
            vfe.FreeEnergy().loss(Counted(lies=True), empty)
    assert "'u'" in str(refusal.value)
    assert f"{dist.Normal(MEANS[0], 1.0).log_prob(POINTS[0]).item():.4f}"[:6] in str(refusal.value)


@pytest.mark.filterwarnings("ignore:The programs change what outlives a run")
def test_check_says_how_often_the_program_is_checked() -> None:
    runs = {}
    for check in ("first", "always", False):
        model, elbo = Counted(lies=False), vfe.FreeEnergy(check=check)
        counts = [model.runs]
        for _ in range(4):
            elbo.loss(model, empty)
            counts.append(model.runs)
        runs[check] = [after - before for before, after in pairwise(counts)]
    assert runs[False][1:] == [1, 1, 1]
    assert runs["first"][1:] == [2, 1, 2]
    assert len(set(runs["always"][1:])) == 1
    assert runs["always"][1] > 1
    assert runs["first"][0] == runs["always"][0] > runs[False][0]


@pytest.mark.filterwarnings("ignore:The programs change what outlives a run")
def test_without_a_check_the_user_is_trusted() -> None:
    def lies() -> None:
        pyro.sample("u", dist.Normal(blind_to_dims(categorical("z", ROOT)), 1.0), obs=POINTS[0])

    wrong = -dist.Normal(MEANS[0], 1.0).log_prob(POINTS[0]).item()
    assert vfe.FreeEnergy(check=False).loss(lies, empty) == pytest.approx(wrong, rel=1e-12)


@pytest.mark.filterwarnings("ignore:The programs change what outlives a run")
def test_a_program_that_begins_to_lie_is_caught_by_check_always() -> None:
    model, elbo = Counted(lies=False), vfe.FreeEnergy(check="always")
    elbo.loss(model, empty)
    model.lies = True
    with pytest.raises(SpotCheckError, match="'u'"):
        for _ in range(20):
            elbo.loss(model, empty)


TABLE = noise(3, 2, seed=4)


def written_in_place(a: Tensor, b: Tensor) -> Tensor:
    x = torch.zeros((*torch.broadcast_shapes(a.shape, b.shape), 2))
    x[..., 0] = a.double()
    x[..., 1] = b.double()
    return (x * tensor([1.0, 3.0])).sum(-1)


LOOKUPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "in_place": written_in_place,
    "stack": lambda a, b: torch.stack(torch.broadcast_tensors(a.double(), b.double()), -1) @ tensor([1.0, 3.0]),
    "index": lambda a, b: TABLE[a, b],
    "embedding": lambda a, b: (functional.embedding(a, TABLE) * functional.one_hot(b, 2)).sum(-1),
    "one_hot": lambda a, b: ((functional.one_hot(a, 3).double() @ TABLE) * functional.one_hot(b, 2)).sum(-1),
    "where": lambda a, b: torch.where(b > 0, TABLE[a, 1], TABLE[a, 0]),
    "einsum": lambda a, b: torch.einsum("...i,...j,ij->...", _hot(a, 3), _hot(b, 2), TABLE),
}


def _hot(z: Tensor, size: int) -> Tensor:
    return functional.one_hot(z, size).double()


@pytest.mark.parametrize("padding", [0, 14])
@pytest.mark.parametrize("name", LOOKUPS)
def test_ordinary_ways_of_reading_latents_are_right(name: str, padding: int) -> None:
    """With 14 more latents dims are shared, and runs are tracked."""

    def pair() -> None:
        a = categorical("a", simplex("a_probs", 3))
        b = categorical("b", simplex("b_probs", 2, seed=1))
        pyro.sample("u", dist.Normal(LOOKUPS[name](a, b), 1.0), obs=tensor(0.4))

    def model() -> None:
        pair()
        for n in range(padding):
            categorical(f"pad_{n}", ROOT)

    expected = oracle(pair, empty).terms["free_energy"]
    found = vfe.FreeEnergy(check="always").differentiable_loss(model, empty)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(found), gradients(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["stack", "cat"])
def test_joining_70_latents_is_refused_naming_the_operation(name: str) -> None:
    def model() -> None:
        together = getattr(torch, name)([bernoulli(f"z_{n}", 0.3).reshape(1) for n in range(70)])
        pyro.sample("u", dist.Normal(together.sum(0), 1.0), obs=tensor(9.0))

    with pytest.raises(CostError, match=f"`{name}`"):
        vfe.FreeEnergy().loss(model, empty)


@pytest.mark.parametrize("dims", [(-1, -3), (-4, -2), (-2, -5), (-3, -3)])
def test_plates_may_lie_at_any_dims_with_gaps(dims: tuple[int, int]) -> None:
    outer_dim, inner_dim = dims
    grid = noise(2, 2, seed=5)

    def at(values: Tensor, *places: int) -> Tensor:
        shape = [1] * -min(places)
        for place, size in zip(places, values.shape, strict=True):
            shape[place] = size
        order = sorted(range(len(places)), key=lambda n: places[n])
        return values.permute(order).reshape(shape)

    def model() -> None:
        with pyro.plate("outer", 2, dim=outer_dim):
            a = bernoulli("a", at(unit("a_prob", 2), outer_dim))
            if inner_dim == outer_dim:
                pyro.sample("u", dist.Normal(a, 1.0), obs=at(grid[:, 0], outer_dim))
                return
            with pyro.plate("inner", 2, dim=inner_dim):
                b = categorical("b", simplex("b_probs", 2, 2, seed=1)[a.long()])
                pyro.sample("u", dist.Normal(a + MEANS[b], 1.0), obs=at(grid, outer_dim, inner_dim))

    def guide() -> None:
        with pyro.plate("outer", 2, dim=outer_dim):
            bernoulli("a", at(unit("q_a", 2, seed=2), outer_dim))

    exact = oracle(model, guide)
    terms = vfe.FreeEnergy().decompose(model, guide)
    for term, value in exact.terms.items():
        torch.testing.assert_close(getattr(terms, term), value.detach(), rtol=1e-10, atol=1e-10)
    by = terms.by("outer")
    torch.testing.assert_close(by.gap.reshape(-1), exact.by("outer")["gap"].detach(), rtol=1e-10, atol=1e-10)
