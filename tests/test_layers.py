"""Layered nets as event vectors: exact, layer by layer, and a portion of the data at a time where all would not fit.

The oracle is the full joint table of a small net: every value of every hidden unit, written out in plain torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs.case import empty, noise, tensor
from torch import Tensor

import pyro_vfe as vfe
from pyro_vfe.energy.posterior import Posterior
from pyro_vfe.errors import CostError, ImpossibleDataError, NotFiniteError, VFEError
from pyro_vfe.program.cost import table_entries, within_limit
from pyro_vfe.program.enumeration import Enumeration
from pyro_vfe.program.families_table import product_table
from pyro_vfe.program.layout import Layout, Portioning
from pyro_vfe.program.log_prob import log_prob
from pyro_vfe.program.programs import Programs

NUM_DATA, VISIBLE = 7, 5
DATA = (noise(NUM_DATA, VISIBLE, seed=4) > 0).double()

Values = Mapping[str, Tensor]
"""The value of each layer: one vector, or one for each row of the joint table."""

Logits = Callable[[Values, Tensor, Values], Tensor]
"""The logits of a layer, from the layers before it, the data and the weights."""


@dataclass(frozen=True)
class Net:
    """A net and a guide: the layers of each in the order in which they are sampled."""

    sizes: Mapping[str, int]
    """How many units each hidden layer has."""

    generative: Mapping[str, Logits]
    """The model's layers; 'u' is the data's."""

    recognition: Mapping[str, Logits]
    """The guide's layers; those that it lacks are summed out inside the model."""

    num_values: int = 2
    """How many values a hidden unit has."""

    def family(self, layer: str, logits: Tensor) -> Any:
        """The distribution of a layer."""
        if layer == "u" or self.num_values == 2:
            return dist.Bernoulli(logits=logits).to_event(1)
        return dist.Categorical(logits=logits.reshape(*logits.shape[:-1], -1, self.num_values)).to_event(1)

    def model(self, weights: Values, beside: Callable[[Tensor], None] | None = None) -> Callable[[Tensor], None]:
        """The model as a program of the data, with more sites in their plate if wanted."""
        return self._program(weights, self.generative, beside)

    def guide(self, weights: Values) -> Callable[[Tensor], None]:
        """The guide as a program of the data."""
        return self._program(weights, self.recognition, None)

    def _program(
        self, weights: Values, layers: Mapping[str, Logits], beside: Callable[[Tensor], None] | None
    ) -> Callable[[Tensor], None]:
        def program(u: Tensor) -> None:
            values: dict[str, Tensor] = {}
            with pyro.plate("data", len(u)):
                for layer, logits in layers.items():
                    fn = self.family(layer, logits(values, u, weights))
                    value = pyro.sample(layer, fn, obs=u if layer == "u" else None)
                    values[layer] = value.to(u.dtype)
                if beside is not None:
                    beside(u)

        return program

    def table(self) -> dict[str, Tensor]:
        """Every joint value of the hidden layers, one row each."""
        rows = tensor(list(product(range(self.num_values), repeat=sum(self.sizes.values()))))
        return dict(zip(self.sizes, rows.split(list(self.sizes.values()), -1), strict=True))

    def log_prob(self, layers: Mapping[str, Logits], weights: Values, u: Tensor) -> Tensor:
        """The log-probability of the layers for each datum and row of the table, shape `(N, rows)`."""
        values = self.table()
        total = torch.zeros(len(u), len(values[next(iter(values))]), dtype=torch.float64)
        for layer, logits in layers.items():
            found = logits(values, u[:, None], weights)
            value = u[:, None] if layer == "u" else values[layer]
            if layer == "u" or self.num_values == 2:
                each = -torch.nn.functional.softplus(torch.where(value == 1, -found, found))
            else:
                found = found.reshape(*found.shape[:-1], -1, self.num_values).log_softmax(-1)
                each = (found * torch.nn.functional.one_hot(value.long(), self.num_values)).sum(-1)
            total = total + each.sum(-1)
        return total

    def exact(self, weights: Values, u: Tensor) -> dict[str, Tensor]:
        """log p(u), F and the gap of each datum, from the joint table."""
        log_p = self.log_prob(self.generative, weights, u)
        evidence = log_p.logsumexp(-1)
        log_q = self.log_prob(self.recognition, weights, u)
        alone = self._alone()
        kept, owner = torch.unique(alone, dim=0, return_inverse=True)
        # What the guide lacks is summed out inside the model: rows that agree in the guide's layers make one.
        summed = torch.stack([log_p[:, owner == row].logsumexp(-1) for row in range(len(kept))], -1)
        first = torch.stack([log_q[:, owner == row][:, 0] for row in range(len(kept))], -1)
        free_energy = (first.exp() * (first - summed)).sum(-1)
        return {"surprise": -evidence, "free_energy": free_energy, "gap": free_energy + evidence}

    def _alone(self) -> Tensor:
        """The guide's layers in each row of the table."""
        values = self.table()
        rows = len(values[next(iter(values))])
        return torch.cat([torch.zeros(rows, 1), *(values[layer] for layer in self.recognition)], -1)


def linear(layer: str, *inputs: str) -> Logits:
    """A layer that reads others, or the data, through weights of its own."""

    def logits(values: Values, u: Tensor, weights: Values) -> Tensor:
        total = weights[f"{layer} bias"]
        for name in inputs:
            total = total + (u if name == "u" else values[name]) @ weights[f"{layer} {name}"]
        return total

    return logits


def net(
    sizes: Mapping[str, int],
    generative: Mapping[str, tuple[str, ...]],
    recognition: Mapping[str, tuple[str, ...]],
    num_values: int = 2,
) -> tuple[Net, dict[str, Tensor]]:
    """A net whose layers read the layers that are named, and random weights for it."""
    wide = {layer: size * (num_values if num_values > 2 else 1) for layer, size in sizes.items()} | {"u": VISIBLE}
    units = dict(sizes) | {"u": VISIBLE}
    weights, layers = {}, []
    for part, of in (("p", generative), ("q", recognition)):
        made = {}
        for layer, inputs in of.items():
            key = f"{part} {layer}"
            weights[f"{key} bias"] = noise(wide[layer], seed=len(weights))
            for name in inputs:
                weights[f"{key} {name}"] = noise(units[name], wide[layer], seed=10 + len(weights))
            made[layer] = linear(key, *inputs)
        layers.append(made)
    return Net(sizes, layers[0], layers[1], num_values), weights


TWO = {"top": (), "mid": ("top",), "u": ("mid",)}
THREE = {"top": (), "mid": ("top",), "low": ("mid",), "u": ("low",)}
SKIP = {"top": (), "mid": ("top",), "u": ("mid", "top")}
NETS = {
    "bottom-up guide": net({"top": 3, "mid": 4}, TWO, {"mid": ("u",), "top": ("mid",)}),
    "top-down guide": net({"top": 3, "mid": 4}, TWO, {"top": ("u",), "mid": ("u", "top")}),
    "factorised guide": net({"top": 3, "mid": 4}, TWO, {"top": ("u",), "mid": ("u",)}),
    "guide that ignores the data": net({"top": 3, "mid": 4}, TWO, {"top": (), "mid": ("top",)}),
    "no guide": net({"top": 3, "mid": 4}, TWO, {}),
    "guide of one layer": net({"top": 3, "mid": 4}, TWO, {"mid": ("u",)}),
    "three layers": net({"top": 2, "mid": 3, "low": 4}, THREE, {"low": ("u",), "mid": ("low",), "top": ("mid",)}),
    "three layers, no guide": net({"top": 2, "mid": 3, "low": 4}, THREE, {}),
    "skip connection": net({"top": 3, "mid": 4}, SKIP, {"mid": ("u",), "top": ("mid", "u")}),
    "skip connection, no guide": net({"top": 3, "mid": 4}, SKIP, {}),
    "units of three values": net({"top": 2, "mid": 3}, TWO, {"mid": ("u",), "top": ("mid",)}, 3),
}

WHOLE = None
FEW = 6_000.0
"""So many bytes hold the tables of some of the data, not of all."""


def portioning(elbo: vfe.FreeEnergy) -> Portioning | None:
    """What the estimator found for its only pair of programs."""
    ((_, pair),) = elbo._programs._pairs.items()
    return pair.layout.portioning


def portions_of(length: int, monkeypatch: pytest.MonkeyPatch) -> Portioning:
    """What is planned from now on where not all data fit."""
    wanted = Portioning("data", length)
    monkeypatch.setattr("pyro_vfe.program.cost._portioning", lambda plate, layout, limit: wanted)
    return wanted


@pytest.fixture(params=[WHOLE, FEW], ids=["whole", "portions"])
def limit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float | None:
    """Whether the data are summed together, or in portions."""
    portions_of(3, monkeypatch)
    found: float | None = request.param
    return found


@pytest.mark.parametrize("name", NETS)
def test_every_datum_has_the_surprise_and_gap_of_the_joint_table(name: str, limit: float | None) -> None:
    own, weights = NETS[name]
    exact = own.exact(weights, DATA)
    elbo = vfe.FreeEnergy(max_bytes=limit)
    terms = elbo.decompose(own.model(weights), own.guide(weights), DATA)
    by_datum = terms.by("data")
    assert (portioning(elbo) is None) == (limit is WHOLE)
    for term, expected in exact.items():
        assert torch.allclose(getattr(by_datum, term), expected, rtol=0, atol=1e-12)
        assert getattr(terms, term).item() == pytest.approx(float(expected.sum()), abs=1e-11)
    assert (terms.complexity - terms.accuracy).item() == pytest.approx(float(exact["free_energy"].sum()), abs=1e-11)


@pytest.mark.parametrize("name", NETS)
def test_the_loss_has_the_gradient_of_the_joint_table(name: str, limit: float | None) -> None:
    own, weights = NETS[name]
    leaves = {key: value.clone().requires_grad_() for key, value in weights.items()}
    expected = own.exact(leaves, DATA)["free_energy"].sum()
    gradients = torch.autograd.grad(expected, list(leaves.values()))
    elbo = vfe.FreeEnergy(max_bytes=limit)
    for _ in range(2):  # the first call looks at the programs, later ones know them
        for leaf in leaves.values():
            leaf.grad = None
        assert elbo.loss_and_grads(own.model(leaves), own.guide(leaves), DATA) == pytest.approx(expected.item())
        for leaf, gradient in zip(leaves.values(), gradients, strict=True):
            assert torch.allclose(leaf.grad, gradient, rtol=1e-10, atol=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NETS)
def test_the_posterior_s_evidence_is_that_of_the_joint_table(name: str, limit: float | None) -> None:
    own, weights = NETS[name]
    found = vfe.posterior(own.model(weights), DATA, max_bytes=limit)
    assert found.log_evidence.item() == pytest.approx(-float(own.exact(weights, DATA)["surprise"].sum()), abs=1e-11)


@pytest.mark.parametrize("name", ["bottom-up guide", "skip connection", "units of three values"])
def test_portions_of_any_length_make_the_same_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own, weights = NETS[name]
    programs = own.model(weights), own.guide(weights)
    whole = vfe.FreeEnergy().decompose(*programs, DATA)
    for length in (1, 2, 3, 5):
        wanted = portions_of(length, monkeypatch)
        elbo = vfe.FreeEnergy(max_bytes=FEW)
        terms = elbo.decompose(*programs, DATA)
        assert portioning(elbo) is wanted
        for one, other in ((terms, whole), (terms.by("data"), whole.by("data"))):
            for term in ("energy", "entropy", "surprise", "gap", "complexity", "accuracy"):
                assert torch.allclose(getattr(one, term), getattr(other, term), rtol=1e-13, atol=1e-12)


def enumeration(size: Mapping[str, int], num_data: int, max_bytes: float | None = None) -> tuple[Enumeration, Layout]:
    """What a bottom-up net of other sizes is enumerated as."""
    own, weights = net(size, TWO, {"mid": ("u",), "top": ("mid",)})
    programs = Programs(max_bytes=max_bytes)
    data = DATA[torch.arange(num_data) % NUM_DATA]
    found = programs.enumerate(own.model(weights), own.guide(weights), (data,), {})
    ((_, pair),) = programs._pairs.items()
    return found, pair.layout


def test_no_table_of_a_net_holds_more_than_a_pair_of_layers() -> None:
    """Nor does any that elimination makes: log p(u) of a 6-5-4 net takes sums over 2^5 and 2^4 values, not 2^9."""
    own, weights = net({"top": 4, "mid": 5, "low": 6}, THREE, {"low": ("u",), "mid": ("low",), "top": ("mid",)})
    found = Programs().enumerate(own.model(weights), own.guide(weights), (DATA,), {})
    layers = set(found.supports)
    for factor in found.factors.values():
        assert len(layers & set(factor.axes)) <= 2
        assert not (len(layers & set(factor.axes)) == 2 and "data" in factor.axes)
    from_the_plan = vfe.explain(own.model(weights), own.guide(weights), DATA).outline
    assert len(layers & set(from_the_plan.largest.scope)) <= 2


def test_a_plate_counts_only_where_a_table_can_vary_along_it() -> None:
    """log P(mid | top) is 2^3 by 2^4 numbers however many data there are, log P(u | mid) has 2^4 for each."""
    own, weights = NETS["bottom-up guide"]
    shown = vfe.explain(own.model(weights), own.guide(weights), DATA).layout
    entries = {key: table_entries(site, shown) for key, site in shown.sites.items()}
    assert entries == {
        ("model", "top"): 8,
        ("model", "mid"): 8 * 16,
        ("model", "u"): 16 * NUM_DATA,
        ("guide", "mid"): 16 * NUM_DATA,
        ("guide", "top"): 8 * 16,
    }
    made = Programs().enumerate(own.model(weights), own.guide(weights), (DATA,), {}).factors
    assert entries == {key: factor.table.values.numel() for key, factor in made.items()}


def test_portions_are_planned_to_keep_to_the_limit() -> None:
    """60,000 data and 2^12 values of 12 units would take 2 GB for a single table: planned, not made."""
    own, weights = net({"top": 8, "mid": 12}, TWO, {"mid": ("u",), "top": ("mid",)})
    layout = vfe.explain(own.model(weights), own.guide(weights), DATA[:1].expand(60_000, -1)).layout
    limit = 2**29
    planned = within_limit(layout, limit)
    assert planned.portioning is not None and planned.portioning.plate == "data"
    held = [8 * table_entries(site, planned, planned.portioning) for site in planned.sites.values()]
    whole = [8 * table_entries(site, planned) for site in planned.sites.values()]
    assert sum(held) < limit < max(whole)
    assert 100 < planned.portioning.length < 60_000


def test_portions_are_explained() -> None:
    own, weights = NETS["bottom-up guide"]
    programs = own.model(weights), own.guide(weights)
    shown = vfe.explain(*programs, DATA, max_bytes=FEW)
    assert shown.layout.portioning is not None
    assert f"plate 'data' is summed in portions of {shown.layout.portioning.length} elements" in str(shown)
    assert "portions" not in str(vfe.explain(*programs, DATA, max_bytes=1e6))


def test_tables_of_all_data_are_withheld_where_portions_are_made() -> None:
    found, layout = enumeration({"top": 3, "mid": 4}, NUM_DATA, FEW)
    assert layout.portioning is not None and found.portions is not None
    length = layout.portioning.length
    for part, (_, count) in zip(found.portions, found.portions.stretches, strict=True):
        assert part.plates["data"] == count <= length
        for key, factor in part.factors.items():
            assert factor.table.sizes.get("data", count) == count
            assert found.factors[key].table.sizes == {**factor.table.sizes, **{"data": NUM_DATA}} or (
                "data" not in factor.table.axes
            )
    with pytest.raises(CostError, match=r"site 'u' over .* is made in portions"):
        found.factors["model", "u"].table.values  # noqa: B018


def test_what_needs_a_table_whole_is_refused_where_portions_are_made() -> None:
    own, weights = NETS["no guide"]
    found = vfe.posterior(own.model(weights), DATA, max_bytes=4_000.0)
    assert isinstance(found, Posterior) and bool(found.log_evidence.isfinite())
    with pytest.raises(CostError, match="in portions of its plate"):
        found.marginal("mid")


def test_more_data_in_a_later_call_are_summed_in_portions_too() -> None:
    """The programs are known by then from a call that fitted whole."""
    own, weights = NETS["bottom-up guide"]
    programs = own.model(weights), own.guide(weights)
    elbo = vfe.FreeEnergy(max_bytes=FEW)
    few = elbo.loss(*programs, DATA[:1])
    assert portioning(elbo) is None
    assert few == pytest.approx(float(own.exact(weights, DATA[:1])["free_energy"].sum()))
    many = DATA.repeat(4, 1)
    assert elbo.loss(*programs, many) == pytest.approx(float(own.exact(weights, many)["free_energy"].sum()))
    assert portioning(elbo) is not None


def test_weights_masks_and_what_lies_outside_of_the_plate_are_the_same_in_portions() -> None:
    own, weights = NETS["bottom-up guide"]
    mask, weight = tensor([1, 1, 0, 1, 0, 1, 1]).bool(), noise(NUM_DATA, seed=3).exp()

    def guide(u: Tensor) -> None:
        pyro.sample("rate", dist.Delta(tensor(0.3)))
        pyro.sample("switch", dist.Bernoulli(tensor(0.6)))
        with pyro.poutine.scale(scale=weight):
            own.guide(weights)(u)

    def model(u: Tensor) -> None:
        rate = pyro.sample("rate", dist.Normal(0.0, 1.0))
        switch = pyro.sample("switch", dist.Bernoulli(tensor(0.3)))
        pyro.sample("outside", dist.Normal(rate + switch, 1.0), obs=tensor(0.7))

        def beside(u: Tensor) -> None:
            with pyro.poutine.mask(mask=mask):
                pyro.sample("beside", dist.Normal(rate, 1.0), obs=u[:, 0])

        with pyro.poutine.scale(scale=weight):
            own.model(weights, beside)(u)

    programs = model, guide
    elbo = vfe.FreeEnergy(max_bytes=FEW)
    portions, whole = elbo.decompose(*programs, DATA), vfe.FreeEnergy().decompose(*programs, DATA)
    assert portioning(elbo) is not None
    for term in ("free_energy", "surprise", "gap", "energy", "entropy", "complexity", "accuracy"):
        assert getattr(portions, term).item() == pytest.approx(getattr(whole, term).item(), abs=1e-12)
        assert torch.allclose(getattr(portions.by("data"), term), getattr(whole.by("data"), term), atol=1e-12)
    assert elbo.loss(*programs, DATA) == pytest.approx(whole.free_energy.item(), abs=1e-12)


def test_a_latent_that_ties_the_data_together_keeps_them_in_one_table() -> None:
    def model(u: Tensor) -> None:
        kind = pyro.sample("kind", dist.Bernoulli(tensor(0.4)))
        with pyro.plate("data", len(u)):
            mid = pyro.sample("mid", dist.Bernoulli(logits=kind[..., None] + torch.zeros(4)).to_event(1))
            pyro.sample("u", dist.Bernoulli(logits=mid @ noise(4, VISIBLE, seed=1)).to_event(1), obs=u)

    with pytest.raises(CostError, match="limit"):
        vfe.FreeEnergy(max_bytes=400).loss(model, empty, DATA)


@pytest.mark.parametrize("as_given", ["logits", "probs"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tables_of_large_layers_are_exact_in_either_precision(dtype: torch.dtype, as_given: str) -> None:
    """Large enough for the matrix product, for the data under a latent and for a latent under another."""

    def model(u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            top = pyro.sample("top", bernoulli(noise(7, seed=0).to(dtype)))
            mid = pyro.sample("mid", bernoulli(top @ noise(7, 8, seed=1).to(dtype)))
            pyro.sample("u", bernoulli(mid @ noise(8, VISIBLE, seed=2).to(dtype)), obs=u)

    def bernoulli(logits: Tensor) -> Any:
        given = {"probs": logits.sigmoid()} if as_given == "probs" else {"logits": logits}
        return dist.Bernoulli(**given).to_event(1)

    u = DATA.repeat(30, 1).to(dtype)
    found = Programs().enumerate(model, empty, (u,), {}).factors
    values = tensor(list(product((0, 1), repeat=8)))
    above = tensor(list(product((0, 1), repeat=7)))
    for name, parents, matrix, data in (
        ("u", values, noise(8, VISIBLE, seed=2), u.double()),
        ("mid", above, noise(7, 8, seed=1), values),
    ):
        logits = parents @ matrix.to(dtype).double()
        odds = logits[:, None] * (2 * data[None] - 1)
        expected = torch.nn.functional.logsigmoid(odds).sum(-1)
        table = found["model", name].table
        axes = ("mid" if name == "u" else "top", "data" if name == "u" else "mid")
        assert torch.allclose(table.aligned(axes).double(), expected, atol=1e-12 if dtype is torch.float64 else 2e-4)


def test_a_layer_of_25_units_is_refused_with_a_way_out() -> None:
    def model(u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            mid = pyro.sample("mid", dist.Bernoulli(torch.full((25,), 0.5)).to_event(1))
            pyro.sample("u", dist.Bernoulli(logits=mid @ torch.zeros(25, VISIBLE)).to_event(1), obs=u)

    with pytest.raises(CostError) as refusal:
        vfe.FreeEnergy().loss(model, empty, DATA)
    said = str(refusal.value)
    assert all(part in said for part in ("'mid'", "2 to the power 25", "infer={'enumerate': None}", 'on_cost="sample"'))


def test_impossible_and_missing_numbers_are_named_with_their_element_in_portions() -> None:
    own, weights = NETS["bottom-up guide"]

    def model(u: Tensor, certain: Tensor) -> None:
        def beside(u: Tensor) -> None:
            pyro.sample("sure", dist.Bernoulli(certain), obs=torch.ones(len(u)).double())

        own.model(weights, beside)(u)

    def guide(u: Tensor, certain: Tensor) -> None:
        own.guide(weights)(u)

    certain = torch.ones(NUM_DATA).double()
    elbo = vfe.FreeEnergy(max_bytes=FEW)
    elbo.loss(model, guide, DATA, certain)
    assert portioning(elbo) is not None
    certain[5] = 0.0
    for call in (elbo.loss, elbo.decompose):
        with pytest.raises(ImpossibleDataError, match=r"'sure' \(data element 5\)"):
            call(model, guide, DATA, certain)
    broken = {**weights, "p u bias": weights["p u bias"] * torch.nan}
    with pytest.raises(NotFiniteError, match="'u'"):
        vfe.FreeEnergy(max_bytes=FEW, check=False).decompose(own_unchecked(own, broken), own.guide(weights), DATA)


def own_unchecked(own: Net, weights: Values) -> Callable[[Tensor], None]:
    """The model without the checks of its distributions."""

    def program(u: Tensor) -> None:
        with pyro.validation_enabled(False):
            own.model(weights)(u)

    return program


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_probabilities_of_zero_and_one_are_exact_in_large_layers(dtype: torch.dtype) -> None:
    """A saturated unit has no finite log-odds; what it forbids is -inf, and has no gradient."""
    probs = noise(8, seed=1)[:, None].mul(noise(8, 9, seed=2)).mul(3).sigmoid().round(decimals=1).to(dtype)
    assert bool((probs == 0).any()) and bool((probs == 1).any())
    values = torch.tensor(list(product((0, 1), repeat=9)), dtype=dtype)
    data = torch.cat([probs.round(), values[::4]]).repeat(4, 1)
    fn = dist.Bernoulli(probs.repeat(4, 1)[:, None].requires_grad_()).to_event(1)
    table = product_table(fn, data)
    assert table is not None
    expected = torch.where(data == 1, fn.base_dist.probs, 1 - fn.base_dist.probs).log().sum(-1)
    assert bool(expected.isneginf().any()) and bool(expected.isfinite().any())
    assert torch.equal(table.isneginf(), expected.isneginf())
    possible = expected.isfinite()
    tolerance = 1e-12 if dtype is torch.float64 else 1e-4
    assert torch.allclose(table[possible], expected[possible], atol=tolerance)
    (gradient,) = torch.autograd.grad(table[possible].sum(), fn.base_dist.probs)
    inside = (probs > 0) & (probs < 1)
    (by_hand,) = torch.autograd.grad(log_prob(fn, data)[possible].sum(), fn.base_dist.probs)
    assert torch.allclose(gradient[:8, 0][inside], by_hand[:8, 0][inside], rtol=1e-4)


def kept_for_the_backward_pass(loss: Tensor) -> int:
    """The bytes that the nodes of a graph hold besides what torch saves (which a checkpoint drops)."""
    seen: set[Any] = set()
    storages: dict[int, int] = {}
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [before for before, _ in node.next_functions]
        if (statistics := getattr(node, "statistics", None)) is not None:
            for values in (statistics.x, *statistics.form.parameters.values()):
                storages[values.untyped_storage().data_ptr()] = values.untyped_storage().nbytes()
    assert any(hasattr(node, "statistics") for node in seen), "no matrix product was made"
    return sum(storages.values())


def test_a_table_s_graph_keeps_neither_the_data_nor_the_parameters() -> None:
    """What a checkpoint cannot drop stays for every portion: gigabytes, for many portions."""
    logits = noise(2**9, 1, VISIBLE, seed=0).requires_grad_()
    table = product_table(dist.Bernoulli(logits=logits).to_event(1), DATA.repeat(60, 1))
    assert table is not None
    assert kept_for_the_backward_pass(table.sum()) <= 100
    table.sum().backward()
    assert logits.grad is not None and bool((logits.grad != 0).all())


def test_data_overwritten_before_the_backward_pass_are_noticed_in_portions() -> None:
    """Portions are formed again there: the gradient would be that of other data."""
    own, weights = NETS["no guide"]
    leaves = {key: value.clone().requires_grad_() for key, value in weights.items()}
    data = DATA.clone()
    elbo = vfe.FreeEnergy(max_bytes=4_000.0)
    loss = elbo.differentiable_loss(own.model(leaves), own.guide(leaves), data)
    assert portioning(elbo) is not None
    data.zero_()
    with pytest.raises(VFEError, match="changed in place"):
        loss.backward()
