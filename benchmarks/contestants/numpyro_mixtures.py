"""NumPyro: log evidence of a Gaussian mixture and its gradients by unconstrained parameters, jitted."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.funsor import config_enumerate, enum
from numpyro.contrib.funsor import log_density as enumerated_log_density
from numpyro.infer.util import log_density
from numpyro.ops.indexing import Vindex
from worker import Prepared
from workloads import MixtureWorkload, evidence_number, mixture


def marginal(size: int, components: int, dims: int) -> Prepared:
    """The component summed out by the distribution."""

    def model(logits: Any, means: Any, log_scales: Any, data: Any) -> None:
        component = dist.Normal(means, jnp.exp(log_scales)).to_event(1)
        with numpyro.plate("data", size):
            numpyro.sample("x", dist.MixtureSameFamily(dist.Categorical(logits=logits), component), obs=data)

    return _prepared(model, log_density, mixture(size, components, dims))


def enumerated(size: int, components: int, dims: int) -> Prepared:
    """The component a site, enumerated in parallel."""

    def model(logits: Any, means: Any, log_scales: Any, data: Any) -> None:
        with numpyro.plate("data", size, dim=-1):
            z = numpyro.sample("z", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            component = dist.Normal(Vindex(means)[z], jnp.exp(Vindex(log_scales)[z])).to_event(1)
            numpyro.sample("x", component, obs=data)

    def density(model: Any, *arguments: Any) -> Any:
        return enumerated_log_density(enum(config_enumerate(model), -2), *arguments)

    return _prepared(model, density, mixture(size, components, dims))


def _prepared(model: Callable[..., None], density: Callable[..., Any], workload: MixtureWorkload) -> Prepared:
    data, means = jnp.asarray(workload.data), jnp.asarray(workload.means)
    parameters = (jnp.zeros(len(means)), means, jnp.zeros_like(means))

    def log_evidence(*parameters: Any) -> Any:
        return density(model, (*parameters, data), {}, {})[0]

    gradients = jax.jit(jax.value_and_grad(log_evidence, (0, 1, 2)))

    return Prepared(lambda: jax.block_until_ready(gradients(*parameters)), lambda found: evidence_number(found[0]))
