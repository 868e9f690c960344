"""Parameters whose best value is none that they can have, and the floors that keep them from it, in both M-phases."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs.case import noise, tensor
from pyro.infer.autoguide import AutoDelta
from scipy.optimize import minimize
from scipy.special import digamma
from torch import Tensor
from torch.distributions import constraints

import pyro_vfe as vfe
from pyro_vfe.errors import DegenerateError, ProbabilityError, VFEError

Model = Callable[..., None]
Component = Callable[[Tensor, Tensor], Any]

X = noise(40, seed=1)
NOISE = noise(40, seed=2)
HALF = torch.arange(40) < 20
LINE = 0.5 * X + 2 + 0.3 * NOISE


def real(name: str, *values: float) -> Tensor:
    return pyro.param(name, tensor(list(values)))


def positive(name: str, *values: float) -> Tensor:
    return pyro.param(name, tensor(list(values)), constraint=constraints.positive)


def weights(*values: float) -> Tensor:
    return pyro.param("weights", tensor(list(values or (0.5, 0.5))), constraint=constraints.simplex)


def line(z: Tensor, x: Tensor) -> Tensor:
    return real("a", 1.0, -1.0)[z] + real("b", 0.1, 0.2)[z] * x


def scale(z: Tensor) -> Tensor:
    return positive("s", 1.0, 1.0)[z]


def regression(z: Tensor, x: Tensor) -> Any:
    return dist.Normal(line(z, x), scale(z))


def mixture(component: Component) -> Model:
    def model(x: Tensor, y: Tensor) -> None:
        own = weights()
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(own))
            pyro.sample("y", component(z, x), obs=y)

    return model


def grouped(component: Component) -> Model:
    """Each datum's component is known: one M-phase is maximum likelihood."""

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("y", component((~HALF[: len(y)]).long(), x), obs=y)

    return model


def chained(component: Component) -> Model:
    def model(x: Tensor, y: Tensor) -> None:
        initial = weights()
        transition = pyro.param("transition", tensor([[0.9, 0.1], [0.2, 0.8]]), constraint=constraints.simplex)
        with pyro.plate("time", len(y)):
            z = pyro.sample("z", vfe.MarkovChain(initial, transition))
            pyro.sample("y", component(z, x), obs=y)

    return model


def looped(component: Component) -> Model:
    def model(x: Tensor, y: Tensor) -> None:
        transition = pyro.param("transition", tensor([[0.9, 0.1], [0.2, 0.8]]), constraint=constraints.simplex)
        z = torch.tensor(0)
        for t in pyro.markov(range(10, 30)):
            z = pyro.sample(f"z{t}", dist.Categorical(transition[z]))
            pyro.sample(f"y{t}", component(z, x[t]), obs=y[t])

    return model


def halves(first: Tensor, second: Tensor | float) -> Tensor:
    return torch.where(HALF, first, torch.as_tensor(second))


def quiet(em: vfe.EM, *args: Any, **options: Any) -> vfe.EMRun:
    return em.run(*args, progress_bar=False, **options)


def never_rises(run: vfe.EMRun) -> bool:
    path = torch.tensor([row.free_energy for row in run.history.rows if row.phase == "E"])
    return bool((path.diff() <= 1e-9 * path[1:].abs()).all())


CONSTANT = halves(LINE, -1.25)

COLLAPSING: dict[str, tuple[Model, Tensor, str]] = {
    "constant": (mixture(regression), CONSTANT, r"'s'\[1\] goes to zero"),
    "a line without noise": (mixture(regression), halves(LINE, 3 * X - 5), r"'s'\[1\] goes to zero"),
    "zeros": (mixture(regression), CONSTANT.where(HALF, 0.0) + 0.0, r"'s'\[1\] goes to zero"),
    "small units": (
        mixture(lambda z, x: dist.Normal(1e-4 * line(z, x), 1e-4 * scale(z))),
        1e-4 * CONSTANT,
        r"'s'\[1\] goes to zero",
    ),
    "far from zero": (
        mixture(lambda z, x: dist.Normal(1e4 + line(z, x), scale(z))),
        1e4 + CONSTANT,
        r"'s'\[1\] goes to zero",
    ),
    "a Markov chain": (chained(regression), CONSTANT, r"'s'\[1\] goes to zero"),
    "a loop": (looped(regression), CONSTANT, r"'s'\[1\] goes to zero"),
    "the log of a scale": (
        mixture(lambda z, x: dist.Normal(line(z, x), real("log_s", 0.0, 0.0)[z].exp())),
        CONSTANT,
        r"'log_s'\[1\] falls",
    ),
    "softplus of a scale": (
        mixture(lambda z, x: dist.Normal(line(z, x), torch.nn.functional.softplus(real("raw", 0.0, 0.0)[z]))),
        CONSTANT,
        r"'raw'\[1\] falls",
    ),
    "Student's t": (
        mixture(lambda z, x: dist.StudentT(4.0, real("a", 1.0, -1.0)[z], scale(z))),
        CONSTANT,
        r"'s'\[1\] goes to zero",
    ),
    "log-normal": (mixture(lambda z, x: dist.LogNormal(line(z, x), scale(z))), CONSTANT.exp(), r"'s'\[1\] goes to"),
    "gamma": (
        grouped(lambda z, x: dist.Gamma(positive("c", 1.0, 4e12)[z], positive("r", 1.0, 1e12)[z])),
        halves(X.exp(), 4.0),
        r"'[cr]'\[1\] grows",
    ),
    "von Mises": (
        mixture(lambda z, x: dist.VonMises(real("a", 1.0, -1.0)[z], positive("k", 1.0, 1.0)[z])),
        halves(1 + 0.5 * X, -1.25),
        r"'k'\[1\] grows",
    ),
    "exponential": (
        grouped(lambda z, x: dist.Exponential(real("log_r", 0.0, 2.0)[z].exp())),
        halves(X.exp(), 0.0),
        r"'log_r'\[1\] grows",
    ),
}


@pytest.mark.parametrize("name", COLLAPSING)
def test_a_density_that_collapses_onto_its_data_is_an_error_that_names_it(name: str) -> None:
    model, y, entry = COLLAPSING[name]
    with pytest.raises(DegenerateError, match=rf"F has no lower bound.*{entry}"):
        quiet(vfe.EM(model), X, y)


def below(x: Tensor, y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=real("a", 0.0) + real("b", 0.1) * x), obs=y)


RUNNING_OFF: dict[str, tuple[Model, Tensor, str]] = {
    "log-odds": (below, (X > 0.1).double(), r"'b'\[0\] grows"),
    "a rate": (
        grouped(lambda z, x: dist.Poisson(positive("r", 1.0, 1.0)[z] * (1 + x**2))),
        halves(torch.ones(40), 0.0),
        r"'r'\[1\] goes to zero",
    ),
    "the log of a rate": (
        grouped(lambda z, x: dist.Poisson((real("a", 0.0, 0.0)[z] + 0.1 * x).exp())),
        halves(torch.ones(40), 0.0),
        r"'a'\[1\] falls",
    ),
    "degrees of freedom of normal data": (
        grouped(lambda z, x: dist.StudentT(positive("df", 3.0), real("loc", 0.5), positive("s", 1.0))),
        torch.linspace(-1.0, 1.0, 40, dtype=torch.float64),
        r"as long as 'df'\[0\] grows\.",
    ),
    "counts with too little variance": (
        grouped(lambda z, x: dist.NegativeBinomial(positive("r", 3.0), logits=real("l", 0.0))),
        4 + torch.arange(40.0) % 3,
        r"'r'\[0\] grows, 'l'\[0\] falls",
    ),
}


@pytest.mark.parametrize("name", RUNNING_OFF)
def test_a_parameter_that_runs_to_where_it_has_no_value_is_an_error_that_names_it(name: str) -> None:
    model, y, entry = RUNNING_OFF[name]
    with pytest.raises(DegenerateError, match=rf"F has no minimum.*{entry}"):
        quiet(vfe.EM(model), X, y)


def test_a_probability_may_run_to_the_end_of_its_range() -> None:
    def model(y: Tensor) -> None:
        p = pyro.param("p", tensor([0.3, 0.6]), constraint=constraints.unit_interval)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Bernoulli(p[(~HALF).long()] ** 2), obs=y)

    run = quiet(vfe.EM(model), HALF.double())
    torch.testing.assert_close(run.params["p"], tensor([1.0, 0.0]), rtol=0, atol=1e-5)


def test_a_prior_without_a_mode_is_an_error_in_a_search_too_and_a_floor_mends_it() -> None:
    def model(y: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(0.5, 0.5))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Bernoulli(p), obs=y)

    guide = AutoDelta(model)
    for m_phase in (None, vfe.Numerical()):
        pyro.clear_param_store()
        with pytest.raises(DegenerateError, match=r"'AutoDelta\.p'.*floor="):
            quiet(vfe.EM(model, guide, m_phase=m_phase), torch.zeros(5))
        run = quiet(vfe.EM(model, guide, m_phase=m_phase, floor={"AutoDelta.p": 1e-3}), torch.zeros(5))
        assert run.params["AutoDelta.p"].item() == pytest.approx(1e-3, rel=1e-9)


def test_after_the_error_parameters_are_as_they_were() -> None:
    with pytest.raises(DegenerateError, match=r"'s'\[1\]"):
        vfe.EM(grouped(regression)).m_phase(X, CONSTANT)
    for name, start in (("a", [1.0, -1.0]), ("b", [0.1, 0.2]), ("s", [1.0, 1.0])):
        assert pyro.param(name).tolist() == start


PLANE = torch.stack([X, 2 * X], -1) - tensor([1.0, 0.0])
POINTS = torch.where(HALF[:, None], torch.stack([LINE, NOISE], -1), PLANE)


def normals(given: str) -> Component:
    constraint = constraints.lower_cholesky if given == "scale_tril" else constraints.positive_definite

    def component(z: Tensor, x: Tensor) -> Any:
        matrices = pyro.param("matrices", torch.eye(2).repeat(2, 1, 1), constraint=constraint)
        locs = pyro.param("locs", tensor([[2.0, 0.0], [-1.0, 0.0]]))
        return dist.MultivariateNormal(locs[z], **{given: matrices[z]})

    return component


SAME: dict[str, tuple[Component, Tensor, str, float]] = {
    "scale": (lambda z, x: dist.Normal(real("a", 1.0, -1.0)[z], scale(z)), CONSTANT, r"'s'\[1\]", 0.05),
    "variance": (lambda z, x: dist.Normal(real("a", 1.0, -1.0)[z], scale(z).sqrt()), CONSTANT, r"'s'\[1\]", 0.05),
    "scale_tril": (normals("scale_tril"), POINTS, r"'matrices'\[1\]", 0.3),
    "covariance_matrix": (normals("covariance_matrix"), POINTS, r"'matrices'\[1\]", 0.1),
    "precision_matrix": (normals("precision_matrix"), POINTS, r"'matrices'\[1\]", 0.1),
}


@pytest.mark.parametrize("name", SAME)
def test_closed_form_and_search_give_the_same_verdict_and_the_same_floored_optimum(name: str) -> None:
    component, y, entry, floor = SAME[name]
    ends, places = [], []
    for m_phase in (None, vfe.Numerical()):
        pyro.clear_param_store()
        with pytest.raises(DegenerateError, match=entry) as caught:
            quiet(vfe.EM(mixture(component), m_phase=m_phase), X, y)
        places.append(str(caught.value).split(":")[0])
        pyro.clear_param_store()
        run = quiet(vfe.EM(mixture(component), m_phase=m_phase, floor=floor), X, y)
        assert any(note.startswith("At the floor") for note in run.notes)
        assert never_rises(run)
        ends.append(run)
    assert places[0] == places[1]
    for parameter, value in ends[0].params.items():
        torch.testing.assert_close(value, ends[1].params[parameter], rtol=1e-5, atol=1e-5)
    assert ends[0].free_energy == pytest.approx(ends[1].free_energy, abs=1e-9)


@pytest.mark.parametrize("spread", [1e-3, 1e-5])
def test_a_small_scale_is_no_collapse(spread: float) -> None:
    y = halves(LINE, -1.25 + spread * NOISE)
    runs = []
    for m_phase in (None, vfe.Numerical()):
        pyro.clear_param_store()
        runs.append(quiet(vfe.EM(mixture(SAME["scale"][0]), m_phase=m_phase), X, y))
    assert runs[1].params["s"][1].item() == pytest.approx((spread * NOISE[~HALF]).std(correction=0).item(), rel=1e-4)
    assert runs[0].free_energy == pytest.approx(runs[1].free_energy, abs=1e-6)


LOOP = looped(regression)


@pytest.mark.parametrize("model", [mixture(regression), chained(regression), LOOP])
@pytest.mark.parametrize("floor", [{"s": 0.01}, 0.01])
def test_the_floor_that_the_error_names_is_held_and_F_has_an_end(model: Model, floor: Any) -> None:
    run = quiet(vfe.EM(model, floor=floor), X, CONSTANT)
    assert run.converged
    assert never_rises(run)
    assert "At the floor: 's'[1]." in run.notes
    assert run.params["s"].min() >= 0.01
    seen = HALF if model is not LOOP else HALF & (torch.arange(40) >= 10)
    own = X[seen], LINE[seen]
    slope, intercept = np.polyfit(*(part.numpy() for part in own), 1)
    residual = own[1] - intercept - slope * own[0]
    ones = torch.ones(())
    expected = {
        "a": torch.stack([intercept * ones, -1.25 * ones]),
        "b": torch.stack([slope * ones, 0 * ones]),
        "s": torch.stack([residual.square().mean().sqrt(), 0.01 * ones]),
    }
    for name, value in expected.items():
        torch.testing.assert_close(run.params[name], value, rtol=1e-3, atol=1e-3)


def test_a_floored_search_ends_where_scipy_does() -> None:
    """Two scales and one line: the floor of one scale moves the line, by weighted least squares."""

    def component(z: Tensor, x: Tensor) -> Any:
        return dist.Normal(real("a", 1.0) + real("b", 0.1) * x, scale(z))

    y = halves(LINE, 0.6 * X + 1.8 + 0.01 * NOISE)
    run = quiet(vfe.EM(grouped(component), floor={"s": 0.1}), X, y)

    def energy(point: np.ndarray) -> float:
        a, b, *logs = point
        logs = np.where(HALF.numpy(), *logs)
        return float((logs + 0.5 * ((y.numpy() - a - b * X.numpy()) * np.exp(-logs)) ** 2).sum())

    bounds = [(None, None), (None, None), (np.log(0.1), None), (np.log(0.1), None)]
    best = minimize(energy, np.zeros(4), bounds=bounds, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-10})
    found = torch.cat([run.params["a"], run.params["b"], run.params["s"].log()])
    torch.testing.assert_close(found, torch.as_tensor(best.x), rtol=1e-4, atol=1e-4)
    assert energy(found.numpy()) <= best.fun + 1e-9
    assert run.params["s"][1].item() == pytest.approx(0.1, rel=1e-12)


def test_a_floor_on_a_rate_moves_the_concentration_beside_it() -> None:
    def component(z: Tensor, x: Tensor) -> Any:
        return dist.Gamma(positive("c", 1.0), positive("r", 1.0))

    y = X.exp()
    run = quiet(vfe.EM(grouped(component), floor={"r": 5.0}, m_phase=vfe.Numerical()), X, y)
    assert run.params["r"].item() == pytest.approx(5.0, rel=1e-12)
    assert digamma(run.params["c"].item()) == pytest.approx(np.log(5.0) + y.log().mean().item(), abs=1e-9)


@pytest.mark.parametrize("start", [0.02, 0.1, 0.10001, 3.0])
def test_an_entry_at_or_below_its_floor_leaves_it_where_F_falls(start: float) -> None:
    def component(z: Tensor, x: Tensor) -> Any:
        return dist.Normal(real("a", 2.0, -1.0)[z] + real("b", 0.5, 0.0)[z] * x, positive("s", start, start)[z])

    run = quiet(vfe.EM(grouped(component), floor={"s": 0.1}), X, CONSTANT)
    assert run.params["s"][0].item() > 0.2
    assert run.params["s"][1].item() == pytest.approx(0.1, rel=1e-12)


COUNTS = tensor([30.0, 6.0, 3.0, 1.0, 0.0])


def test_searched_shares_have_the_floor_each_and_zeros_stay() -> None:
    """Counts of categories with shares in turn, and one answer that reads the first share by its square."""

    def model() -> None:
        shares = weights(0.2, 0.2, 0.2, 0.4, 0.0)
        pyro.sample("counts", dist.Multinomial(40, shares), obs=COUNTS)
        pyro.sample("answer", dist.Bernoulli(shares[0] ** 2), obs=tensor(0.0))

    run = quiet(vfe.EM(model, floor=0.05), max_iter=3)
    found = run.params["weights"]
    assert found[4] == 0
    assert found[:4].min() >= 0.05

    def energy(first: np.ndarray) -> float:
        return float(-(COUNTS.numpy()[:4] * np.log(first)).sum() - np.log1p(-(first[0] ** 2)))

    sum_to_one = {"type": "eq", "fun": lambda first: first.sum() - 1}
    best = minimize(energy, np.full(4, 0.25), bounds=[(0.05, 1)] * 4, constraints=[sum_to_one], tol=1e-12)
    torch.testing.assert_close(found[:4], torch.as_tensor(best.x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("answer", [0.0, 1.0])
def test_a_searched_probability_has_the_floor_from_both_sides(answer: float) -> None:
    def model() -> None:
        p = pyro.param("p", tensor(0.3), constraint=constraints.unit_interval)
        with pyro.plate("data", 4):
            pyro.sample("u", dist.Bernoulli(p**2), obs=torch.full((4,), answer))

    run = quiet(vfe.EM(model, floor=0.01))
    assert run.params["p"].item() == pytest.approx(0.01 if answer == 0 else 0.99, rel=1e-9)


LEFT_TO_RIGHT = tensor([[0.7, 0.3, 0.0], [0.0, 0.6, 0.4], [0.0, 0.0, 1.0]])
STEPS = torch.cat([NOISE[:10], tensor([3.0] * 10), 6 + 0.5 * NOISE[20:]])


def left_to_right(y: Tensor) -> None:
    transition = pyro.param("transition", LEFT_TO_RIGHT.clone(), constraint=constraints.simplex)
    initial = pyro.param("initial", tensor([1.0, 0.0, 0.0]), constraint=constraints.simplex)
    with pyro.plate("time", len(y)):
        z = pyro.sample("z", vfe.MarkovChain(initial, transition))
        pyro.sample("y", dist.Normal(real("a", 0.0, 2.5, 5.0)[z], positive("s", 1.0, 1.0, 1.0)[z]), obs=y)


@pytest.mark.parametrize(
    ("m_phase", "options"),
    [
        (None, {}),
        (None, {"n_init": 3}),
        (None, {"acceleration": "squarem"}),
        (vfe.Numerical(), {}),
        (vfe.Numerical(), {"acceleration": "squarem"}),
    ],
)
def test_what_starts_at_zero_stays_there_and_the_rest_has_the_floor(m_phase: Any, options: dict[str, Any]) -> None:
    run = quiet(vfe.EM(left_to_right, floor=0.15, m_phase=m_phase), STEPS, **options)
    transition = run.params["transition"]
    assert bool((transition[LEFT_TO_RIGHT == 0] == 0).all())
    assert transition[LEFT_TO_RIGHT != 0].min() >= 0.15 * (1 - 1e-12)
    torch.testing.assert_close(transition.sum(-1), torch.ones(3))
    torch.testing.assert_close(transition[0], tensor([0.85, 0.15, 0.0]), rtol=1e-3, atol=1e-3)
    assert run.params["initial"].tolist() == [1.0, 0.0, 0.0]
    assert run.params["s"].min() >= 0.15


@pytest.mark.parametrize("method", [vfe.Incremental(), vfe.Online(delay=0)])
def test_what_starts_at_zero_stays_there_on_batches(method: Any) -> None:
    def model(y: Tensor) -> None:
        p = pyro.param("p", tensor([0.5, 1.0, 0.2]), constraint=constraints.unit_interval)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(weights(0.5, 0.5, 0.0)))
            pyro.sample("y", dist.Bernoulli(p[z]), obs=y)

    batches = (torch.arange(40) % 4 > 0).double().split(10)
    run = vfe.EM(model, floor=1e-3).run_batches(batches, method=method, tol=1.0, progress_bar=False)
    assert run.params["weights"][2] == 0
    assert run.params["weights"][:2].min() >= 1e-3
    assert run.params["p"][1] == pytest.approx(1, abs=1e-15)


def test_a_global_floor_is_none_for_what_it_would_say_nothing_of() -> None:
    run = quiet(vfe.EM(grouped(regression), floor=0.01), X, CONSTANT)
    assert run.params["b"][1].abs() < 1e-9
    assert run.params["a"][1] < 0


REFUSED: dict[str, tuple[Model, dict[str, Any], type[VFEError], str]] = {
    "a coefficient": (grouped(regression), {"b": 0.1}, VFEError, r"floor for 'b'.*Real.*does not say"),
    "a location in closed form": (grouped(SAME["scale"][0]), {"a": 0.1}, VFEError, r"floor for 'a'.*does not say"),
    "shares in a search": (
        lambda x, y: pyro.sample("n", dist.Multinomial(2, weights() * torch.ones(2).cumsum(0)), obs=tensor([1.0, 1.0])),
        {"weights": 0.5},
        ProbabilityError,
        r"floor 0\.5 of 'weights' leaves no probabilities",
    ),
    "shares in closed form": (mixture(regression), {"weights": 0.5}, ProbabilityError, r"leaves no probabilities"),
    "more than the constraint": (
        grouped(
            lambda z, x: dist.Normal(x, pyro.param("s", tensor(0.5), constraint=constraints.interval(0.1, 2.0)) ** 2)
        ),
        {"s": 3.0},
        ProbabilityError,
        r"floor 3 of 's' leaves nothing",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_floor_that_cannot_be_held_is_refused(name: str) -> None:
    model, floor, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        quiet(vfe.EM(model, floor=floor), X, CONSTANT)


def test_a_floor_of_what_the_E_phase_changes_is_refused() -> None:
    def guide(x: Tensor, y: Tensor) -> None:
        q = pyro.param("q", tensor([0.5, 0.5]), constraint=constraints.simplex)
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Categorical(q))

    with pytest.raises(VFEError, match="'q', which the E-phase changes"):
        quiet(vfe.EM(mixture(regression), guide, floor={"q": 0.1}), X, CONSTANT)


# Each way out that an error names


def test_bounds_keep_a_concentration_from_running_off() -> None:
    def component(z: Tensor, x: Tensor) -> Any:
        rate = pyro.param("r", tensor([1.0, 10.0]), constraint=constraints.interval(0.0, 1e3))
        return dist.Gamma(positive("c", 1.0, 40.0)[z], rate[z])

    run = quiet(vfe.EM(mixture(component)), X, halves(X.exp(), 4.0))
    assert run.converged
    assert run.params["r"][1].item() == pytest.approx(1e3, rel=1e-6)


def test_a_prior_keeps_log_odds_finite() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        a, b = pyro.sample("a", dist.Normal(0.0, 10.0)), pyro.sample("b", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=a + b * x), obs=y)

    y = (X > 0.1).double()
    run = quiet(vfe.EM(model, AutoDelta(model)), X, y)

    def energy(point: np.ndarray) -> float:
        logits = point[0] + point[1] * X.numpy()
        return float((point**2).sum() / 200 + np.logaddexp(0, np.where(y.numpy() == 1, -logits, logits)).sum())

    best = minimize(energy, np.zeros(2), tol=1e-12)
    found = torch.stack([run.params["AutoDelta.a"], run.params["AutoDelta.b"]])
    torch.testing.assert_close(found, torch.as_tensor(best.x), rtol=1e-4, atol=1e-4)


def test_a_prior_keeps_a_scale_from_collapsing() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("components", 2):
            variance = pyro.sample("variance", dist.InverseGamma(2.0, 0.1))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(weights()))
            pyro.sample("y", dist.Normal(line(z, x), variance[z].sqrt()), obs=y)

    guide = AutoDelta(pyro.poutine.block(model, expose=["variance"]))
    run = quiet(vfe.EM(model, guide), X, CONSTANT)
    assert run.converged
    count = run.params["weights"][1] * 40
    torch.testing.assert_close(run.params["AutoDelta.variance"][1], 0.1 / (count / 2 + 3), rtol=1e-3, atol=0)


@pytest.mark.filterwarnings("ignore:The M-phase of iteration")  # F moves by roundings of so small a variance.
def test_a_floor_of_one_rounding_is_the_users_own_and_no_collapse() -> None:
    def model(y: Tensor) -> None:
        tril = pyro.param("tril", torch.eye(2).repeat(2, 1, 1), constraint=constraints.lower_cholesky)
        locs = pyro.param("locs", torch.zeros(2, 2))
        z = (~HALF).long()
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.MultivariateNormal(locs[z], scale_tril=tril[z]), obs=y)

    run = quiet(vfe.EM(model, floor=1e-8, m_phase=vfe.Numerical()), POINTS, max_iter=2, tol=1.0)
    assert "At the floor: 'tril'[1]." in run.notes


def test_a_search_in_single_precision_holds_floors_and_sees_collapses() -> None:
    torch.set_default_dtype(torch.float32)

    def model(x: Tensor, y: Tensor) -> None:
        a, b = pyro.param("a", torch.tensor([1.0, -1.0])), pyro.param("b", torch.tensor([0.1, 0.2]))
        s = pyro.param("s", torch.ones(2), constraint=constraints.positive)
        z = (~HALF).long()
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(a[z] + b[z] * x, s[z]), obs=y)

    x, y = X.float(), CONSTANT.float()
    with pytest.raises(DegenerateError, match=r"'s'\[1\] goes to zero"):
        quiet(vfe.EM(model), x, y)
    run = quiet(vfe.EM(model, floor={"s": 0.01}), x, y)
    assert run.params["s"][1].item() == pytest.approx(0.01, rel=1e-5)
