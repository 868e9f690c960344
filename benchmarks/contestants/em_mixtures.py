"""scikit-learn and pomegranate: iterations of EM for a mixture of diagonal Gaussians, always the first ones."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pomegranate.distributions import Normal
from pomegranate.gmm import GeneralMixtureModel
from sklearn.mixture import GaussianMixture
from worker import Prepared
from workloads import evidence_number, mixture, norms

from contestants.laps import Laps

Found = tuple[float, Any, Laps]
"""The log evidence before the last M-step, the model after it, and when each iteration ended."""


def scikit_learn(size: int, components: int, dims: int, iterations: int = 1) -> Prepared:
    """The E-step and the M-step of its `fit`, in float64 and without regularisation."""
    workload = mixture(size, components, dims)

    def fresh() -> GaussianMixture:
        model = GaussianMixture(components, covariance_type="diag", reg_covar=0.0)
        model.weights_, model.means_ = np.full(components, 1 / components), workload.means
        model.covariances_ = model.precisions_cholesky_ = np.ones((components, dims))
        return model

    def call(model: GaussianMixture) -> Found:
        mean_log_evidence, laps = 0.0, Laps()
        for _ in range(iterations):
            mean_log_evidence, log_responsibilities = model._e_step(workload.data)
            model._m_step(workload.data, log_responsibilities)
            laps.end()
        return size * float(mean_log_evidence), model, laps

    def numbers(found: Found) -> Mapping[str, float]:
        log_evidence, model, _ = found
        new = {"weights": model.weights_, "loc": model.means_, "scale": np.sqrt(model.covariances_)}
        return {**evidence_number(log_evidence), **norms(new)}

    return Prepared(call, numbers, fresh, mean_lap if iterations > 1 else None)


def pomegranate(size: int, components: int, dims: int, iterations: int = 1, precision: str = "float32") -> Prepared:
    """Summarising the data and taking the new parameters."""
    workload, dtype = mixture(size, components, dims), getattr(torch, precision)
    data, means = torch.tensor(workload.data, dtype=dtype), torch.tensor(workload.means, dtype=dtype)

    def fresh() -> GeneralMixtureModel:
        unit = torch.ones(dims, dtype=dtype)
        parts = [Normal(means=mean.clone(), covs=unit.clone(), covariance_type="diag") for mean in means]
        return GeneralMixtureModel(parts, priors=torch.full((components,), 1 / components, dtype=dtype))

    def call(model: GeneralMixtureModel) -> Found:
        log_evidence, laps = 0.0, Laps()
        for _ in range(iterations):
            log_evidence = float(model.summarize(data))
            model.from_summaries()
            laps.end()
        return log_evidence, model, laps

    def numbers(found: Found) -> Mapping[str, float]:
        log_evidence, model, _ = found
        parts = model.distributions
        loc, scale = np.stack([part.means for part in parts]), np.sqrt(np.stack([part.covs for part in parts]))
        return {**evidence_number(log_evidence), **norms({"weights": model.priors, "loc": loc, "scale": scale})}

    return Prepared(call, numbers, fresh, mean_lap if iterations > 1 else None)


def mean_lap(found: Found) -> float:
    """Seconds of an iteration after the first."""
    return found[2].mean
