"""Exponential-family forms, and tables made of them by a matrix product, against the distributions' own log_prob."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import pyro_vfe as vfe
from pyro_vfe.program import families_table, tables
from pyro_vfe.program.families import Form, family_of, form_of
from pyro_vfe.program.families_forms import FAMILIES
from pyro_vfe.program.families_table import product_table

Make = Callable[..., Any]
Shape = tuple[int, ...]


@pytest.fixture(autouse=True)
def _in_double_precision() -> Any:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """Tables of any size are made by products, and what was made is noted."""
    made: list[Tensor | None] = []

    def noted(fn: Any, value: Tensor) -> Tensor | None:
        made.append(product_table(fn, value))
        return made[-1]

    monkeypatch.setattr(families_table, "WORTHWHILE", 1)
    monkeypatch.setattr(families_table, "_is_gain", lambda rows, columns, *_: min(rows, columns) > 1)
    monkeypatch.setattr(tables, "product_table", noted)
    return made


def positive(*shape: int) -> Tensor:
    return torch.rand(shape) * 2 + 0.5


def probability(*shape: int) -> Tensor:
    return torch.rand(shape) * 0.9 + 0.05


def simplex(*shape: int) -> Tensor:
    return torch.rand(*shape, 4).softmax(-1)


def triangular(*shape: int) -> Tensor:
    return torch.randn(*shape, 3, 3).tril(-1) + torch.diag_embed(positive(*shape, 3))


MAKE: dict[str, Make] = {
    "Normal": lambda *s: dist.Normal(torch.randn(s), positive(*s)),
    "LogNormal": lambda *s: dist.LogNormal(torch.randn(s), positive(*s)),
    "HalfNormal": lambda *s: dist.HalfNormal(positive(*s)),
    "Bernoulli of probs": lambda *s: dist.Bernoulli(probability(*s)),
    "Bernoulli of logits": lambda *s: dist.Bernoulli(logits=torch.randn(s)),
    "Binomial": lambda *s: dist.Binomial(7, probability(*s)),
    "Binomial of logits": lambda *s: dist.Binomial(7, logits=torch.randn(s)),
    "NegativeBinomial": lambda *s: dist.NegativeBinomial(3.5, probability(*s)),
    "NegativeBinomial of logits": lambda *s: dist.NegativeBinomial(3.5, logits=torch.randn(s)),
    "Geometric": lambda *s: dist.Geometric(probability(*s)),
    "Geometric of logits": lambda *s: dist.Geometric(logits=torch.randn(s)),
    "Poisson": lambda *s: dist.Poisson(positive(*s)),
    "Exponential": lambda *s: dist.Exponential(positive(*s)),
    "Gamma": lambda *s: dist.Gamma(positive(*s), positive(*s)),
    "InverseGamma": lambda *s: dist.InverseGamma(positive(*s), positive(*s)),
    "Chi2": lambda *s: dist.Chi2(positive(*s)),
    "Beta": lambda *s: dist.Beta(positive(*s), positive(*s)),
    "VonMises": lambda *s: dist.VonMises(torch.randn(s), positive(*s)),
    "Categorical": lambda *s: dist.Categorical(simplex(*s)),
    "Categorical of logits": lambda *s: dist.Categorical(logits=torch.randn(*s, 4)),
    "OneHotCategorical": lambda *s: dist.OneHotCategorical(simplex(*s)),
    "OneHotCategoricalStraightThrough": lambda *s: dist.OneHotCategoricalStraightThrough(simplex(*s)),
    "Multinomial": lambda *s: dist.Multinomial(5, simplex(*s)),
    "Dirichlet": lambda *s: dist.Dirichlet(positive(*s, 4)),
    "MultivariateNormal": lambda *s: dist.MultivariateNormal(torch.randn(*s, 3), scale_tril=triangular(*s)),
}

LOOKED_UP = {
    "Exponential",
    "Categorical",
    "Categorical of logits",
    "OneHotCategorical",
    "OneHotCategoricalStraightThrough",
}
BY_PRODUCT = [name for name in MAKE if name not in LOOKED_UP]


def tolerance(name: str) -> float:
    """Torch's Bessel function is a polynomial that is right to single precision."""
    return 1e-6 if name == "VonMises" else 1e-11


def assert_close(actual: Tensor, expected: Tensor, atol: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=atol, atol=atol)


def bound(fn: Any) -> Form:
    form = form_of(fn)
    assert form is not None
    return form


def test_every_family_is_tested() -> None:
    names = {cls.__name__ for cls in FAMILIES}
    assert names == {name.split(" of ")[0] for name in MAKE}


@pytest.mark.parametrize("events", [0, 1, 2])
@pytest.mark.parametrize("name", MAKE)
def test_form_is_the_log_probability(name: str, events: int) -> None:
    fn = MAKE[name](3, 2, 2).to_event(events)
    x = fn.sample((5,))
    form = bound(fn)
    by_hand = (form.statistic(x) * form.natural).sum(-1) - form.log_normalizer + form.log_base_measure(x)
    assert_close(by_hand, fn.log_prob(x), tolerance(name))


@pytest.mark.parametrize("name", MAKE)
def test_gradient_of_the_log_normalizer_is_the_mean_statistic(name: str) -> None:
    """The score T(x) . d eta - dA has expectation zero."""
    fn = MAKE[name](2)
    form = bound(fn)
    learned = [key for key in form.parameters if key not in form.family.fixed]
    leaves = {key: form.parameters[key].clone().requires_grad_() for key in learned}
    live = Form(form.family, {**form.parameters, **leaves}, form.independent)
    score = (live.statistic(fn.sample((100_000,))) * live.natural).sum(-1) - live.log_normalizer
    for key, gradient in zip(learned, torch.autograd.grad(score.mean(0).sum(), list(leaves.values())), strict=True):
        if key == "probs" and gradient.shape[-1] == 4:
            gradient = gradient - gradient.mean(-1, keepdim=True)  # along the simplex
        assert float(gradient.abs().max()) < 0.06


@pytest.mark.parametrize("name", MAKE)
def test_mean_parameters_give_the_likeliest_parameters(name: str) -> None:
    fn = MAKE[name](2, 3).to_event(1)
    form = bound(fn)
    x, weights = fn.sample((50,)), torch.rand(50, 1)
    mean = (weights.unsqueeze(-1) * form.statistic(x)).sum(0) / weights.sum(0).unsqueeze(-1)
    fitted = form.from_mean_parameters(mean)
    if fitted is None:
        assert name in {"Gamma", "InverseGamma", "Chi2", "Beta", "Dirichlet", "VonMises"}
        return
    fitted = {key: value.requires_grad_() for key, value in fitted.items()}
    known = {"total_count": 7.0} if "Binomial" in name and "Neg" not in name else {}
    known = {"total_count": 3.5} if "Negative" in name else {"total_count": 5} if name == "Multinomial" else known
    likelihood = type(fn.base_dist)(**fitted, **known, validate_args=False).log_prob(x)
    (weights.unsqueeze(-1) * likelihood).sum().backward()
    for key, value in fitted.items():
        gradient = value.grad
        assert gradient is not None
        if key == "probs" and value.shape[-1] == 4:
            seen = value.detach() > 0  # a category that was never seen can only gain a gradient downwards
            peak = gradient.where(seen, -torch.inf).amax(-1, keepdim=True)
            gradient = (gradient - peak).where(seen, 0.0)  # along the simplex
        assert float((gradient * value.detach()).abs().max()) < 1e-8, key


def test_centred_mean_parameters_keep_a_small_variance_of_large_data() -> None:
    x = (1e6 + 1e-3 * torch.randn(1000, 2)).float()
    form = bound(dist.Normal(torch.zeros(2).float(), torch.ones(2).float()).to_event(1)).centred(x)
    fitted = form.from_mean_parameters(form.statistic(x.double()).mean(0))
    assert fitted is not None
    torch.testing.assert_close(fitted["scale"], x.double().std(0, correction=0), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(fitted["loc"], x.double().mean(0), rtol=1e-12, atol=0.0)


def test_multivariate_mean_parameters_are_mean_and_covariance() -> None:
    x = torch.randn(40, 3) @ torch.randn(3, 3) + 5.0
    form = bound(dist.MultivariateNormal(torch.zeros(3), torch.eye(3))).centred(x)
    fitted = form.from_mean_parameters(form.statistic(x).mean(0))
    assert fitted is not None
    assert_close(fitted["loc"], x.mean(0))
    assert_close(fitted["covariance_matrix"], torch.cov(x.T, correction=0))


def test_what_is_not_registered_has_no_form() -> None:
    class Twisted(dist.Normal):
        """A subclass may mean something else."""

    assert family_of(dist.StudentT(3.0)) is None
    assert form_of(Twisted(0.0, 1.0)) is None
    assert form_of(dist.Normal(0.0, 1.0).mask(False)) is None


def expanded(name: str, latents: Shape, plates: Shape, events: int) -> tuple[Any, Any, Tensor]:
    """A distribution as a plate leaves it, the same without repetitions, and data along the plates."""
    event = (2,) * events
    slim_fn = MAKE[name](*latents, *(1,) * len(plates), *event).to_event(events)
    fn = slim_fn.expand((*latents, *plates))
    x = fn.sample()[(0,) * len(latents)]
    return fn, slim_fn, x


@pytest.mark.parametrize(("latents", "plates"), [((3,), (40,)), ((2, 3), (5, 8)), ((3,), (1, 40)), ((3, 1), (40,))])
@pytest.mark.parametrize("events", [0, 1, 2])
@pytest.mark.parametrize("name", BY_PRODUCT)
def test_product_is_the_broadcast_log_probability(
    name: str, events: int, latents: Shape, plates: Shape, products: list[Tensor | None]
) -> None:
    if name == "MultivariateNormal":
        latents = (*latents[:-1], 6)  # outer products are worth their size from four components on
    fn, slim_fn, x = expanded(name, latents, plates, events)
    table = product_table(fn, x)
    assert table is not None
    assert table.shape == slim_fn.log_prob(x).shape
    assert_close(table, fn.log_prob(x), tolerance(name))


@pytest.mark.parametrize("name", sorted(LOOKED_UP))
def test_what_is_one_operation_anyway_is_left_as_it_is(name: str, products: list[Tensor | None]) -> None:
    fn, _, x = expanded(name, (3,), (40,), 1)
    assert product_table(fn, x) is None


@pytest.mark.parametrize("name", ["Normal", "Gamma", "MultivariateNormal"])
def test_product_has_the_gradients_of_log_prob(name: str, products: list[Tensor | None]) -> None:
    fn, slim_fn, x = expanded(name, (5,), (30,), 1)
    form, x = bound(slim_fn), x.requires_grad_()
    leaves = {key: value.clone().requires_grad_() for key, value in form.parameters.items()}
    live = type(slim_fn.base_dist)(**leaves).to_event(1).expand(fn.batch_shape)
    table, weights = product_table(live, x), torch.randn(5, 30)
    assert table is not None
    ours = torch.autograd.grad((weights * table).sum(), [x, *leaves.values()])
    theirs = torch.autograd.grad((weights * live.log_prob(x)).sum(), [x, *leaves.values()])
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other, 1e-9)


def test_a_count_may_differ_from_datum_to_datum(products: list[Tensor | None]) -> None:
    count, probs = torch.arange(1.0, 31.0), probability(4, 1)
    fn = dist.Binomial(count, probs)
    x = fn.sample()[0]
    table = product_table(fn, x)
    assert table is not None
    assert_close(table, fn.log_prob(x))


def test_parameters_may_vary_along_latents_of_their_own(products: list[Tensor | None]) -> None:
    fn = dist.Normal(torch.randn(3, 1, 1, 2), positive(4, 1, 2)).to_event(1).expand((3, 4, 20))
    x = torch.randn(20, 2)
    table = product_table(fn, x)
    assert table is not None
    assert_close(table, fn.log_prob(x))


def test_data_overwritten_before_the_backward_pass_are_noticed(products: list[Tensor | None]) -> None:
    x = torch.randn(20)
    table = product_table(dist.Normal(torch.randn(3, 1, requires_grad=True), 1.0), x)
    assert table is not None
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        table.sum().backward()


@pytest.mark.parametrize("chunk", [1, 40, 2**20])
def test_product_does_not_depend_on_the_chunk(
    chunk: int, monkeypatch: pytest.MonkeyPatch, products: list[Tensor | None]
) -> None:
    monkeypatch.setitem(families_table.CHUNK, "cpu", chunk)
    fn, _, x = expanded("Binomial", (3,), (30,), 1)
    table = product_table(fn, x)
    assert table is not None
    assert_close(table, fn.log_prob(x))


@pytest.mark.parametrize("name", ["Normal", "Gamma", "Binomial"])
def test_product_is_twice_differentiable(name: str, products: list[Tensor | None]) -> None:
    fn, slim_fn, x = expanded(name, (3,), (20,), 1)
    count = {"total_count": 7.0} if name == "Binomial" else {}
    leaves = {k: v.clone().requires_grad_() for k, v in bound(slim_fn).parameters.items() if k not in count}
    live = type(slim_fn.base_dist)(**leaves, **count).to_event(1).expand(fn.batch_shape)
    both = []
    for table in (product_table(live, x), live.log_prob(x)):
        assert table is not None
        first = torch.autograd.grad(table.logsumexp(0).sum(), list(leaves.values()), create_graph=True)
        both.append(torch.autograd.grad(sum(g.sin().sum() for g in first), list(leaves.values())))
    for one, other in zip(*both, strict=True):
        assert_close(one, other, 1e-8)


def test_a_count_that_is_learned_keeps_its_gradient(products: list[Tensor | None]) -> None:
    count = torch.tensor(3.5, requires_grad=True)
    assert product_table(dist.NegativeBinomial(count, probability(3, 1)), torch.arange(20.0)) is None


@pytest.mark.parametrize("probs", [0.0, 1.0])
@pytest.mark.parametrize("outcome", [0.0, 1.0])
def test_certain_outcomes_have_exact_logs(probs: float, outcome: float, products: list[Tensor | None]) -> None:
    column = torch.tensor([[0.5], [probs]])
    table = product_table(dist.Bernoulli(column).expand((2, 40)), torch.full((40,), outcome))
    assert table is not None
    torch.testing.assert_close(table, (column if outcome else 1 - column).log().expand(2, 40))


@pytest.mark.parametrize(
    ("batch", "data"), [((1,), (40,)), ((1, 1), (40,)), ((3, 1), (1,)), ((3, 1), (0,)), ((3, 40), (40,)), ((3,), (3,))]
)
def test_no_product_where_there_is_no_matrix(batch: Shape, data: Shape, products: list[Tensor | None]) -> None:
    fn = dist.Normal(torch.randn(batch), 1.0)
    assert product_table(fn, torch.randn(data)) is None


def test_small_tables_are_broadcast() -> None:
    assert product_table(dist.Normal(torch.randn(3, 1), 1.0), torch.randn(40)) is None


@pytest.mark.parametrize("name", ["Normal", "Poisson", "Binomial", "MultivariateNormal"])
def test_a_value_outside_the_support_is_refused(name: str, products: list[Tensor | None]) -> None:
    fn, _, x = expanded(name, (6,), (40,), 0)
    x[3] = math.nan
    with pytest.raises(ValueError, match="support"):
        product_table(fn, x)


def test_values_that_are_no_numbers_are_left_to_broadcasting(products: list[Tensor | None]) -> None:
    fn = dist.Normal(torch.randn(3, 1), torch.ones(3, 1), validate_args=False)
    for what in (math.nan, math.inf):
        assert product_table(fn, torch.tensor([0.0, what, 1.0])) is None


CLOUDS = {
    "standard": ((0.0,), 1.0, 1.0),
    "far from zero": ((1e4,), 1.0, 1.0),
    "clusters far apart": ((0.0, 1000.0), 0.01, 0.01),
    "wider than they are apart": ((-1.0, 2.0), 3.0, 30.0),
    "narrow": ((3.0,), 1e-4, 1e-4),
    "huge": ((1e6, 2e6), 10.0, 10.0),
    "beyond double precision": ((0.0, 1e6), 1e-3, 1e-3),
}


@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize("dims", [1, 8])
def test_single_precision_loses_no_more_than_broadcasting(cloud: str, dims: int, products: list[Tensor | None]) -> None:
    """Each entry has the error of the broadcast entry or a few units of the last place of one."""
    centres, spread, scale = CLOUDS[cloud]
    centre = torch.tensor(centres)[torch.randint(len(centres), (500, 1))]
    x = (centre + spread * torch.randn(500, dims)).float()
    loc = (torch.tensor(centres).repeat(4)[:, None, None] + spread * torch.randn(4 * len(centres), 1, dims)).float()
    fn = dist.Normal(loc, torch.tensor(scale).float()).to_event(1)
    exact = dist.Normal(loc.double(), torch.tensor(scale).float().double()).to_event(1).log_prob(x.double())
    table, broadcast = product_table(fn, x), fn.log_prob(x)
    if table is None:
        assert cloud in ("beyond double precision", "huge")
        return
    assert table.dtype == torch.float32
    unit = torch.finfo(torch.float32).eps
    error, usual = (table.double() - exact).abs(), (broadcast.double() - exact).abs()
    assert bool((error <= 8 * unit * dims + unit * exact.abs()).all())
    assert float(error.max()) <= 2 * float(usual.max()) + 8 * unit


def test_what_would_lose_digits_is_broadcast(products: list[Tensor | None]) -> None:
    loc, x = torch.tensor([[0.0], [1e6]]), torch.tensor([0.0, 1e6, 1e6])
    assert product_table(dist.Normal(loc.float(), 1e-3), x.float()) is None
    assert product_table(dist.Normal(loc, 1.0), x) is None


def mixture(data: Tensor, mask: Tensor | None = None, obs_mask: Tensor | None = None) -> Callable[[], None]:
    size, dims = data.shape

    def model() -> None:
        weights = pyro.param("weights", torch.tensor([0.2, 0.5, 0.3]))
        loc = pyro.param("loc", torch.tensor([-1.0, 0.5, 2.0])[:, None].expand(3, dims).clone())
        scale = pyro.param("scale", torch.tensor([0.7, 1.0, 1.9])[:, None].expand(3, dims).clone())
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Categorical(weights))
            with poutine.mask(mask=True if mask is None else mask):
                fn = dist.Normal(loc[z], scale[z]).to_event(1)
                pyro.sample("x", fn, obs=data, obs_mask=obs_mask)

    return model


def by_features(data: Tensor) -> Callable[[], None]:
    size, dims = data.shape

    def model() -> None:
        loc = pyro.param("loc", torch.tensor([-1.0, 0.5, 2.0]))
        features = pyro.plate("features", dims, dim=-2)
        rows = pyro.plate("rows", size, dim=-1)
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
        with features, rows:
            pyro.sample("x", dist.Normal(loc[z], 1.5), obs=data.T)

    return model


def gradients_of(model: Callable[[], None], loss: Any) -> tuple[float, dict[str, Tensor]]:
    pyro.clear_param_store()
    value = loss.loss_and_grads(model, lambda: None)
    return value, {name: p.grad.clone() for name, p in pyro.get_param_store().named_parameters() if p.grad is not None}


DATA = torch.randn(60, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
KEPT = torch.arange(60) % 3 > 0
MIXTURES = {
    "plain": lambda: mixture(DATA),
    "masked": lambda: mixture(DATA, mask=KEPT),
    "missing values": lambda: mixture(DATA, obs_mask=KEPT),
    "two plates": lambda: by_features(DATA),
    "one datum": lambda: mixture(DATA[:1]),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_free_energy_and_gradients_do_not_depend_on_how_the_table_is_made(
    name: str, monkeypatch: pytest.MonkeyPatch, products: list[Tensor | None]
) -> None:
    model = MIXTURES[name]()
    ours, gradients = gradients_of(model, vfe.FreeEnergy())
    assert any(made is not None for made in products) == (name != "one datum")
    monkeypatch.setattr(tables, "product_table", lambda fn, value: None)
    theirs, expected = gradients_of(model, vfe.FreeEnergy())
    assert ours == pytest.approx(theirs, rel=1e-12)
    for key, gradient in gradients.items():
        assert_close(gradient, expected[key], 1e-10)
