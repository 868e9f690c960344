"""What the examples of EM end at, against scikit-learn, densities written out by hand and the paper's tables."""

import numpy as np
import pyro
import pytest
import torch
import torch.distributions as td
from sklearn.mixture import GaussianMixture

import pyro_vfe as vfe
from examples import coins, earthquakes, latent_classes, mixture

close = torch.testing.assert_close


@pytest.mark.parametrize("num_components", [2, 3])
def test_scikit_learn_finds_nothing_better_near_the_end_of_a_mixture(num_components: int) -> None:
    u = mixture.eruptions()
    run = vfe.EM(mixture.gaussian_mixture(num_components)).run(u, progress_bar=False, max_iter=1000)
    start = {name: value.numpy() for name, value in run.params.items()}
    peer = GaussianMixture(
        num_components,
        weights_init=start["weights"],
        means_init=start["locs"],
        precisions_init=np.linalg.inv(start["covariances"]),
        reg_covar=0,
        tol=1e-12,
        max_iter=1000,
    ).fit(u.numpy())
    assert run.free_energy == pytest.approx(-peer.score(u.numpy()) * len(u), abs=1e-4)


def test_F_of_the_mixture_with_priors_is_its_density_written_out() -> None:
    u = mixture.eruptions()
    run = mixture.with_priors(u, 1.0)
    weights, variances = run.params["AutoDelta.weights"], run.params["AutoDelta.variances"]
    component = td.Independent(td.Normal(run.params["locs"], variances.sqrt()), 1)
    log_density = td.MixtureSameFamily(td.Categorical(weights), component).log_prob(u).sum()
    log_density += td.Dirichlet(torch.full((2,), 2.0)).log_prob(weights)
    log_density += td.InverseGamma(2.0, u.var(0) / 10).log_prob(variances).sum()
    assert run.free_energy == pytest.approx(-float(log_density), abs=1e-8)


def test_a_floor_holds_every_direction_of_a_covariance_and_is_met() -> None:
    run = mixture.with_floor(mixture.eruptions())
    least = torch.linalg.eigvalsh(run.params["covariances"]).min()
    close(least, torch.tensor(mixture.FLOOR))


def test_the_survey_has_as_many_people_of_each_pattern_as_were_counted() -> None:
    patterns, counts = latent_classes.survey().unique(dim=0, return_counts=True)
    assert counts.tolist() == list(latent_classes.COUNTS)
    assert patterns.tolist() == sorted(patterns.tolist())


def test_two_classes_are_those_that_Goodman_found() -> None:
    fit, _ = latent_classes.fit(2, latent_classes.survey())
    np.testing.assert_allclose(fit.weights, [0.279, 0.721], atol=1e-3)
    profiles = [[0.993, 0.940, 0.926, 0.769], [0.714, 0.330, 0.354, 0.132]]
    np.testing.assert_allclose(fit.profiles, profiles, atol=1e-3)


def test_single_phases_take_the_path_of_a_run() -> None:
    heads = torch.tensor(coins.HEADS, dtype=torch.float64)
    biases = coins.one_iteration_at_a_time(heads, 4)
    pyro.clear_param_store()
    with pytest.warns(match="max_iter=4"):
        run = vfe.EM(coins.coins).run(heads, max_iter=4, progress_bar=False)
    np.testing.assert_allclose(biases[-1], run.params["biases"], rtol=1e-12)


def test_sweeps_of_a_mean_field_guide_never_raise_F() -> None:
    u = torch.tensor(earthquakes.COUNTS, dtype=torch.float64)
    model = earthquakes.poisson_hmm(2)
    history = earthquakes.sweep(vfe.AutoMeanField(model), model, u)
    assert np.all(np.diff(history) < 1e-9)
