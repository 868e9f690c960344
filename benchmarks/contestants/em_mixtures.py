"""scikit-learn and pomegranate: an iteration of EM for a mixture of diagonal Gaussians, always the first."""

import numpy as np
import torch
from pomegranate.distributions import Normal
from pomegranate.gmm import GeneralMixtureModel
from sklearn.mixture import GaussianMixture
from worker import Prepared
from workloads import evidence_number, mixture


def scikit_learn(size: int, components: int, dims: int) -> Prepared:
    """The E-step and the M-step of its `fit`, in float64."""
    workload = mixture(size, components, dims)

    def fresh() -> GaussianMixture:
        model = GaussianMixture(components, covariance_type="diag")
        model.weights_, model.means_ = np.full(components, 1 / components), workload.means
        model.covariances_ = model.precisions_cholesky_ = np.ones((components, dims))
        return model

    def call(model: GaussianMixture) -> float:
        mean_log_evidence, log_responsibilities = model._e_step(workload.data)
        model._m_step(workload.data, log_responsibilities)
        return size * float(mean_log_evidence)

    return Prepared(call, evidence_number, fresh)


def pomegranate(size: int, components: int, dims: int) -> Prepared:
    """Summarising the data and taking the new parameters."""
    workload = mixture(size, components, dims)
    data, means = torch.tensor(workload.data).float(), torch.tensor(workload.means).float()

    def fresh() -> GeneralMixtureModel:
        parts = [Normal(means=mean.clone(), covs=torch.ones(dims), covariance_type="diag") for mean in means]
        return GeneralMixtureModel(parts, priors=torch.full((components,), 1 / components))

    def call(model: GeneralMixtureModel) -> float:
        log_evidence = float(model.summarize(data))
        model.from_summaries()
        return log_evidence

    return Prepared(call, evidence_number, fresh)
