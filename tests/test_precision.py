"""Log-probabilities in a precision that holds, in whatever type data and parameters are stored and however extreme."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, tensor

import pyro_vfe as vfe
from pyro_vfe.errors import NotFiniteError
from pyro_vfe.program.drawing_runs import run_guide_at, total_log_prob
from pyro_vfe.program.log_prob import log_prob

Family = Callable[..., Any]

COUNTS = tensor([3.0, 17.0, 120.0, 250.0, 8.0])
DTYPE = {"half": torch.float16, "bfloat16": torch.bfloat16, "uint8": torch.uint8, "int16": torch.int16}

FAMILIES: dict[str, tuple[Family, dict[str, list[float]]]] = {
    "Poisson": (dist.Poisson, {"rate": [2.0, 20.0, 200.0]}),
    "NegativeBinomial": (dist.NegativeBinomial, {"total_count": [2.0, 10.0, 60.0], "probs": [0.125, 0.5, 0.75]}),
    "Binomial": (dist.Binomial, {"total_count": [255.0], "probs": [0.125, 0.5, 0.75]}),
    "Geometric": (dist.Geometric, {"probs": [0.125, 0.5, 0.0625]}),
    "Gamma": (dist.Gamma, {"concentration": [0.5, 3.0, 40.0], "rate": [1.0, 0.5, 2.0]}),
    "LogNormal": (dist.LogNormal, {"loc": [0.5, 2.0, 4.0], "scale": [1.0, 0.5, 2.0]}),
    "StudentT": (dist.StudentT, {"df": [3.0], "loc": [0.5, 20.0, 100.0], "scale": [1.0, 0.5, 2.0]}),
    "Normal": (dist.Normal, {"loc": [100.0, 20.0, 3.0], "scale": [12.0, 20.0, 60.0]}),
}


def mixture(family: Family, parameters: dict[str, Tensor], data: Tensor) -> Callable[[], None]:
    def model() -> None:
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
            pyro.sample("u", family(**{k: v[z] if len(v) > 1 else v for k, v in parameters.items()}), obs=data)

    return model


def surprise_in_double(family: Family, parameters: dict[str, Tensor], data: Tensor) -> float:
    """By torch's own log_prob in float64, on the full joint table."""
    fn = family(**{name: values.double()[:, None] for name, values in parameters.items()}, validate_args=False)
    table = fn.log_prob(data.double()) - torch.log(tensor(3.0, dtype=torch.float64))
    return float(-table.logsumexp(0).sum())


def surprises(model: Callable[[], None]) -> list[float]:
    """At three entry points."""
    terms = vfe.FreeEnergy().decompose(model, None)
    return [vfe.FreeEnergy().loss(model, None), float(terms.surprise), -float(vfe.posterior(model).log_evidence)]


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("stored", DTYPE)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_type_of_the_data_does_not_decide_how_precisely_they_are_scored(
    name: str, stored: str, default: torch.dtype
) -> None:
    torch.set_default_dtype(default)
    family, given = FAMILIES[name]
    parameters, data = {k: tensor(v) for k, v in given.items()}, COUNTS.to(DTYPE[stored])
    expected = surprise_in_double(family, parameters, data)
    for found in surprises(mixture(family, parameters, data)):
        assert found == pytest.approx(expected, rel=3e-6 if default == torch.float32 else 1e-12)


@pytest.mark.parametrize("stored", ["half", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_in_half_precision_are_what_they_are_and_are_computed_with_in_full(name: str, stored: str) -> None:
    family, given = FAMILIES[name]
    parameters, data = {k: tensor(v).to(DTYPE[stored]) for k, v in given.items()}, COUNTS.to(DTYPE[stored])
    expected = surprise_in_double(family, parameters, data)
    for found in surprises(mixture(family, parameters, data)):
        assert found == pytest.approx(expected, rel=1e-12)


def test_narrow_integers_do_not_overflow() -> None:
    """255 + 1 is 0 in eight bits, and 12 squared is negative."""
    cases: list[tuple[Family, dict[str, Tensor], Tensor]] = [
        (dist.Poisson, {"rate": tensor([20.0, 45.0, 255.0])}, tensor([255, 254], dtype=torch.uint8)),
        (dist.Binomial, {"total_count": tensor([255], dtype=torch.uint8), "probs": tensor([0.1, 0.5, 0.9])}, COUNTS),
        (
            dist.Normal,
            {"loc": tensor([-100, 0, 100], dtype=torch.int8), "scale": tensor([12, 20, 11], dtype=torch.int8)},
            tensor([127, -120, 12], dtype=torch.int8),
        ),
    ]
    for family, parameters, data in cases:
        expected = surprise_in_double(family, parameters, data)
        for found in surprises(mixture(family, parameters, data)):
            assert found == pytest.approx(expected)


def test_a_large_table_of_half_precision_data_and_whole_parameters_is_scored_in_full() -> None:
    data = torch.poisson(torch.full((60_000,), 40.0)).half()
    parameters = {"rate": tensor([20, 45, 60])}
    assert vfe.FreeEnergy().loss(mixture(dist.Poisson, parameters, data), None) == pytest.approx(
        surprise_in_double(dist.Poisson, parameters, data), rel=1e-12
    )


def test_probabilities_in_half_precision_sum_to_one_again() -> None:
    probs = tensor([[0.011, 0.489, 0.5], [0.3, 0.3, 0.4], [0.2, 0.5, 0.3]]).half()

    def guide(by: str) -> None:
        pyro.sample("z", dist.Categorical(probs[1]))

    def model(by: str) -> None:
        z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
        own = probs if by == "probs" else probs.log()
        pyro.sample("u", dist.Categorical(**{by: own[z]}), obs=tensor(0))

    for by in ("probs", "logits"):
        terms = vfe.FreeEnergy().decompose(model, guide, by)
        q = dist.Categorical(probs[1]).probs.double()
        q = q / q.sum()
        own = dist.Categorical(**{by: probs if by == "probs" else probs.log()})
        tables = own.probs.double() if by == "probs" else own.logits.double().exp()
        log_u = (tables / tables.sum(-1, keepdim=True)).log()[:, 0]
        free_energy = (q * (q.log() + torch.log(tensor(3.0)) - log_u)).sum()
        torch.testing.assert_close(terms.free_energy, free_energy)
        torch.testing.assert_close(terms.entropy, -(q * q.log()).sum())


@pytest.mark.parametrize("others", [torch.float32, torch.float64])
def test_a_loop_may_have_data_of_another_type_than_its_tables(others: torch.dtype) -> None:
    transition = tensor([[0.7, 0.3], [0.2, 0.8]], dtype=torch.float32)
    loc, series = tensor([-1.0, 1.0], dtype=torch.float32), torch.randn(12, dtype=torch.float64)

    def model(stored: torch.dtype) -> None:
        z = tensor(0)
        for t in range(12):
            z = pyro.sample(f"z_{t}", dist.Categorical(transition[z]))
            pyro.sample(f"u_{t}", dist.Normal(loc[z], 1.0), obs=series[t].to(stored))

    torch.set_default_dtype(others)
    for stored in (torch.float64, torch.float16):
        x = series.to(stored).double()
        alpha = tensor([0.7, 0.3], dtype=torch.float64).log()
        for t in range(12):
            emitted = alpha + dist.Normal(loc.double(), 1.0).log_prob(x[t])
            alpha = (emitted[:, None] + transition.double().log()).logsumexp(0)
        found = vfe.FreeEnergy().loss(model, None, stored)
        assert found == pytest.approx(-float(emitted.logsumexp(0)), rel=1e-6)


def test_a_chain_of_half_precision_is_normalised_in_full() -> None:
    initial, transition = tensor([0.011, 0.989]).half(), tensor([[0.333, 0.667], [0.101, 0.899]]).half()
    chain = vfe.MarkovChain(initial, transition)
    assert chain.initial.dtype == chain.transition.dtype == torch.float64
    torch.testing.assert_close(chain.transition.sum(-1), torch.ones(2))


def test_what_is_drawn_in_half_precision_is_scored_in_full() -> None:
    def guide() -> None:
        pyro.sample("n", dist.Poisson(tensor(200.0).half()))
        pyro.sample("b", dist.Bernoulli(logits=tensor([0.3, -2.0]).half()).to_event(1))

    given = {"n": tensor(250.0).half(), "b": tensor([1.0, 0.0]).half()}
    sites = run_guide_at(guide, (), {}, given, {}, lambda *_: None).sites
    bits = dist.Bernoulli(logits=tensor([0.3, -2.0]).half().double()).log_prob(given["b"].double()).sum()
    expected = dist.Poisson(tensor(200.0)).log_prob(tensor(250.0)) + bits
    torch.testing.assert_close(total_log_prob(sites.values()), expected)


EXTREMES: dict[str, tuple[Family, list[float], Callable[[Tensor], Tensor]]] = {
    "Normal at its location": (lambda s: dist.Normal(0.5, s), [1e-25, 1e-13, 1e-38], lambda s: torch.full_like(s, 0.5)),
    "Normal nearby": (lambda s: dist.Normal(0.0, s), [1e-25, 3e-22, 1e25], lambda s: 1.5 * s),
    "HalfNormal": (dist.HalfNormal, [1e-25, 3e-22, 1e25], lambda s: 1.5 * s),
    "LogNormal": (lambda s: dist.LogNormal(0.0, s), [1e-25, 1e-13, 1.0], torch.ones_like),
    "Cauchy afar": (lambda s: dist.Cauchy(0.0, s), [1e-25, 1e-13, 1.0], torch.ones_like),
    "HalfCauchy afar": (dist.HalfCauchy, [1e-25, 1e-13, 1.0], torch.ones_like),
    "StudentT afar": (lambda s: dist.StudentT(3.0, 0.0, s), [1e-25, 1e-13, 1.0], torch.ones_like),
    "StudentT nearly normal": (lambda s: dist.StudentT(300.0, 0.0, s), [1e-25, 1.0, 1e25], lambda s: 1.5 * s),
    "InverseGamma": (lambda b: dist.InverseGamma(2.0, b), [1e-20, 1.0, 1e25], lambda b: 0.7 * b),
    "Gamma": (lambda b: dist.Gamma(2.0, b), [1e-25, 1.0, 1e25], lambda b: 0.7 / b),
    "Poisson": (dist.Poisson, [1e-30, 1e-3, 5.0], lambda rate: torch.full_like(rate, 2.0)),
    "VonMises": (lambda k: dist.VonMises(0.5, k), [1e-3, 10.0, 1e6], lambda k: 0.5 + 0.7 / (1 + k).sqrt()),
    "MultivariateNormal": (
        lambda s: dist.MultivariateNormal(
            torch.zeros(2).to(s), scale_tril=torch.diag_embed(torch.stack([s, 2 * s], -1))
        ),
        [1e-25, 1.0, 1e15],
        lambda s: torch.stack([0.5 * s, s], -1),
    ),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_parameters_are_scored_as_in_double_precision(name: str) -> None:
    family, given, data_of = EXTREMES[name]
    torch.set_default_dtype(torch.float32)
    parameter = tensor(given)
    data = data_of(parameter)
    with torch.no_grad():
        double = torch.stack(
            [family(own.double()).log_prob(x.double()) for own, x in zip(parameter, data, strict=True)]
        )
    assert double.isfinite().all()
    single = log_prob(family(parameter), data)
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=2e-5)

    def model() -> None:
        z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
        for k in range(3):
            pyro.sample(f"u_{k}", family(parameter[k] * torch.ones(3)[z]), obs=data[k])

    for found in surprises(model):
        assert found == pytest.approx(-float(double.sum()), rel=1e-5, abs=1e-4)


def test_the_gradient_in_a_tiny_variance_is_that_of_double_precision() -> None:
    def gradient(dtype: torch.dtype) -> tuple[Tensor, ...]:
        scale = tensor([1e-25, 2e-25], dtype=dtype, requires_grad=True)
        loc = tensor([0.0, 1e-25], dtype=dtype, requires_grad=True)

        def model() -> None:
            z = pyro.sample("z", dist.Categorical(torch.ones(2, dtype=dtype) / 2))
            pyro.sample("u", dist.Normal(loc[z], scale[z]), obs=tensor(1.5e-25, dtype=dtype))

        return torch.autograd.grad(vfe.FreeEnergy().differentiable_loss(model, lambda: None), [loc, scale])

    for single, double in zip(gradient(torch.float32), gradient(torch.float64), strict=True):
        torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=0.0)


def test_em_fits_components_of_tiny_variance() -> None:
    data = 1e-13 * torch.cat([torch.randn(50), 40.0 + torch.randn(50)])

    def model() -> None:
        loc = pyro.param("loc", tensor([0.0, 3e-12]))
        spread = pyro.param("spread", tensor([1e-12, 1e-12]), constraint=dist.constraints.positive)
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("u", dist.Normal(loc[z], spread[z]), obs=data)

    run = vfe.EM(model).run(progress_bar=False)
    torch.testing.assert_close(run.params["spread"], torch.stack([part.std(correction=0) for part in data.split(50)]))


class Broken(dist.Normal):  # type: ignore[misc]
    """A distribution whose density is no number."""

    value = torch.nan

    def log_prob(self, value: Tensor) -> Tensor:
        """No number."""
        result: Tensor = super().log_prob(value) + self.value
        return result


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_site_whose_log_probability_is_no_number_is_named(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Broken, "value", value)

    def model() -> None:
        loc = pyro.param("loc", tensor([0.0, 1.0]))
        z = pyro.sample("z", dist.Categorical(tensor([0.5, 0.5])))
        pyro.sample("broken", Broken(loc[z], 1.0), obs=tensor(1.0))

    def guide() -> None:
        pyro.sample("z", dist.Categorical(tensor([0.5, 0.5])))

    for asked in (
        lambda: vfe.FreeEnergy().loss(model, guide),
        lambda: vfe.FreeEnergy().decompose(model, guide),
        lambda: vfe.posterior(model),
        lambda: vfe.EM(model).run(progress_bar=False),
        lambda: vfe.EM(model, e_phase=vfe.Hard()).run(progress_bar=False),
        lambda: vfe.bounds(model, guide),
        lambda: vfe.FreeEnergy().compute_marginals(model, None),
    ):
        with pytest.raises(NotFiniteError, match="'broken'"):
            asked()
