"""EM against EM by hand, scikit-learn and hmmlearn: the same path, and the numbers of the books."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import em_oracles as by_hand
import numpy as np
import pyro
import pytest
import torch
from em_oracles import Point, Values
from programs import em
from programs.case import empty, tensor
from programs.em_cases import CASES, EARTHQUAKES, HALF, LINKAGE, PATTERNS, QUAKES, SURVEY, Case, classes, path_of

import pyro_vfe as vfe

close = np.testing.assert_allclose

pytestmark = pytest.mark.filterwarnings("ignore:Latent site 'z' is masked out:pyro_vfe.errors.VFEWarning")
"""Some cases mask a latent that something reads."""

DIRECT = pytest.mark.parametrize("kind", ["masked", "selected"])


def parameters(read: Callable[[Values], Values] = lambda found: found) -> Values:
    """What Pyro's store holds, by the oracle's names."""
    store = pyro.get_param_store()
    return read({name.split(".")[-1]: value.detach().numpy().copy() for name, value in store.items()})


def made(case: Case) -> tuple["vfe.EM", Any]:
    """EM for a case, and its guide; a program without sites stands for no guide."""
    guide = case.guide()
    return vfe.EM(case.model, None if guide is empty else guide), guide


def walked(case: Case, iterations: int) -> list[Point]:
    """The points after each iteration, taken phase by phase."""
    (em_of_case, guide), points = made(case), []
    for _ in range(iterations):
        em_of_case.e_phase(*case.args)
        em_of_case.m_phase(*case.args)
        free_energy = float(vfe.FreeEnergy().loss(case.model, guide, *case.args))
        points.append(Point(parameters(case.read), free_energy))
    return points


def run_for(case: Case, iterations: int, **options: Any) -> Any:
    """A run of so many iterations, which is not to converge."""
    with pytest.warns(UserWarning, match="converge"):
        return made(case)[0].run(*case.args, max_iter=iterations, tol=0.0, progress_bar=False, **options)


def assert_same_point(found: Point, expected: Point, tolerance: float) -> None:
    for name, value in expected.parameters.items():
        close(found.parameters[name], value, rtol=tolerance, atol=tolerance, err_msg=name)
    close(found.free_energy, expected.free_energy, rtol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_free_energy_at_the_start_is_the_oracles(name: str) -> None:
    case = CASES[name]
    found = vfe.FreeEnergy().loss(case.model, case.guide(), *case.args)
    close(found, path_of(name)[0].free_energy, rtol=1e-10)
    for parameter, value in parameters(case.read).items():
        close(value, case.start[parameter], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", CASES)
def test_every_iteration_is_the_oracles(name: str) -> None:
    case, expected = CASES[name], path_of(name)[1:]
    for found, point in zip(walked(case, case.iterations), expected, strict=True):
        assert_same_point(found, point, case.tolerance)


@pytest.mark.parametrize("name", CASES)
def test_a_run_goes_the_same_way_and_its_history_says_how(name: str) -> None:
    case, expected = CASES[name], path_of(name)
    run = run_for(case, case.iterations)
    assert not run.converged
    assert run.n_iter == case.iterations
    assert_same_point(Point(parameters(case.read), run.free_energy), expected[-1], case.tolerance)
    last = {parameter.split(".")[-1]: value.detach().numpy() for parameter, value in run.params.items()}
    assert_same_point(Point(case.read(last), run.free_energy), expected[-1], case.tolerance)
    seen = run.history.of("E").free_energy
    close(seen, [point.free_energy for point in expected], rtol=case.tolerance)
    is_searched = {words.startswith("L-BFGS") for words in run.updates.values()}
    assert is_searched == {name == "linkage_indirect"}, run.updates


# Linkage


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("linkage")])
def test_linkage_takes_the_steps_of_dempster_laird_and_rubin(name: str) -> None:
    case = CASES[name]
    printed = [0.608247423, 0.624321050, 0.626488879]
    found = [float(point.parameters["theta"]) for point in walked(case, len(printed))]
    close(found, printed, rtol=0, atol=max(5.1e-10, case.tolerance))


@DIRECT
def test_linkage_ends_at_the_root_of_the_likelihood_equation(kind: str) -> None:
    run = vfe.EM(em.linkage(HALF, kind)).run(tensor(LINKAGE), tol=1e-14, progress_bar=False)
    root = (15 + math.sqrt(53809)) / 394
    assert run.converged
    close(run.params["theta"].flatten()[0].item(), root, rtol=1e-7)
    close(root, 0.6268214979, atol=5e-11)


@DIRECT
def test_linkage_converges_at_the_rate_of_the_missing_information(kind: str) -> None:
    case, root = CASES[f"linkage_{kind}"], (15 + math.sqrt(53809)) / 394
    errors = [float(point.parameters["theta"]) - root for point in walked(case, 7)]
    close(errors[-1] / errors[-2], 0.1328, atol=5e-5)


# Coins


def test_coins_come_to_the_numbers_of_do_and_batzoglou() -> None:
    points = walked(CASES["coins"], 10)
    close(points[0].parameters["probs"], [0.713, 0.581], atol=5e-4)
    close(points[9].parameters["probs"], [0.79674, 0.51966], atol=5e-6)


# Earthquakes


@pytest.mark.parametrize("name", ["earthquakes_loop", "earthquakes_chain"])
def test_earthquakes_come_to_the_surprises_of_the_book(name: str) -> None:
    case = CASES[name]
    found = run_for(case, 2).history
    close(found.of("E").free_energy, [413.27542, 343.76023, 343.13618], atol=5.1e-6)


def test_earthquakes_end_at_the_best_surprise() -> None:
    counts = tensor(EARTHQUAKES[None])
    run = vfe.EM(em.hidden_markov(QUAKES, "poisson")).run(counts, tol=1e-12, max_iter=2000, progress_bar=False)
    assert run.converged
    close(run.free_energy, 341.87870, atol=5e-6)
    expected = by_hand.limit(CASES["earthquakes_chain"].step, QUAKES)
    close(parameters()["rates"], expected.parameters["rates"], rtol=1e-4)


# Latent classes


@pytest.mark.parametrize(
    ("number", "log_likelihood", "starts"), [(1, -543.6498, 2), (2, -504.4677, 4), (3, -503.3011, 2)]
)
def test_latent_classes_reach_the_best_likelihood_of_several_starts(
    number: int, log_likelihood: float, starts: int
) -> None:
    step = by_hand.latent_classes(PATTERNS, SURVEY)
    best = by_hand.best_of(step, lambda seed: classes(number, seed), restarts=8)
    close(-best.free_energy, log_likelihood, atol=5e-5)
    run = vfe.EM(em.latent_classes(classes(number))).run(
        tensor(PATTERNS),
        tensor(SURVEY),
        tol=1e-7,
        max_iter=3000,
        n_init=starts,
        acceleration="squarem",
        progress_bar=False,
    )
    assert run.converged
    assert len(run.restarts) == starts
    close(-run.free_energy, log_likelihood, atol=1e-4)


# Missing values


WITH_GAPS = [name for name in CASES if name.endswith("with_gaps")]


def filled(case: Case, filler: torch.Tensor) -> Case:
    """The case with something else where values are missing."""
    values, seen = case.args
    here = seen.reshape(seen.shape + (1,) * (values.dim() - seen.dim()))
    return replace(case, args=(torch.where(here, values, filler), seen))


@pytest.mark.parametrize("filler", [1.0, math.nan])
@pytest.mark.parametrize("name", WITH_GAPS)
def test_what_stands_where_a_value_is_missing_does_not_matter(name: str, filler: float) -> None:
    other = filled(CASES[name], tensor(filler))
    found = float(vfe.FreeEnergy().loss(other.model, empty, *other.args))
    close(found, path_of(name)[0].free_energy, rtol=1e-10)
    for point, expected in zip(walked(other, 2), path_of(name)[1:], strict=False):
        assert_same_point(point, expected, other.tolerance)
