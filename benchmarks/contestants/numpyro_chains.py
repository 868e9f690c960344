"""NumPyro: log evidence and its gradients, jitted; the chain summed by hand or enumerated by `scan`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import lax
from jax.scipy.special import logsumexp
from numpyro.contrib.control_flow import scan
from numpyro.contrib.funsor import config_enumerate, enum
from numpyro.contrib.funsor import log_density as enumerated_log_density
from numpyro.infer.util import log_density
from numpyro.ops.indexing import Vindex
from worker import Prepared
from workloads import ChainWorkload, chain, counts, evidence_number


def forward(sequences: int, steps: int, states: int) -> Prepared:
    """The forward recursion inside the program, as in NumPyro's own example of a hidden Markov model."""

    def model(initial: Any, transition: Any, emission: Any, data: Any) -> None:
        def step(alpha: Any, symbols: Any) -> Any:
            return logsumexp(alpha[:, :, None] + transition, 1) + emission.T[symbols], None

        last, _ = lax.scan(step, initial + emission.T[data[0]], data[1:])
        numpyro.factor("evidence", logsumexp(last, -1).sum())

    return _prepared(model, log_density, chain(sequences, steps, states))


def enumerated(sequences: int, steps: int, states: int) -> Prepared:
    """The chain as a site in a `scan`, enumerated in parallel."""

    def model(initial: Any, transition: Any, emission: Any, data: Any) -> None:
        def step(carry: Any, symbols: Any) -> Any:
            z, t = carry
            with numpyro.plate("sequences", sequences, dim=-1):
                logits = jnp.where(t == 0, initial, Vindex(transition)[z])
                z = numpyro.sample("z", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
                numpyro.sample("x", dist.Categorical(logits=Vindex(emission)[z]), obs=symbols)
            return (z, t + 1), None

        scan(step, (jnp.zeros(sequences, jnp.int32), 0), data)

    def density(model: Any, *arguments: Any) -> Any:
        return enumerated_log_density(enum(config_enumerate(model), -2), *arguments)

    return _prepared(model, density, chain(sequences, steps, states), normalized=True)


def _prepared(
    model: Callable[..., None], density: Callable[..., Any], workload: ChainWorkload, normalized: bool = False
) -> Prepared:
    """A jitted gradient; those of normalised logits are no counts."""
    data = jnp.asarray(workload.data.T)
    logs = [jnp.log(jnp.asarray(table)) for table in (workload.initial, workload.transition, workload.emission)]

    def log_evidence(*tables: Any) -> Any:
        return density(model, (*tables, data), {}, {})[0]

    gradients = jax.jit(jax.value_and_grad(log_evidence, (0, 1, 2)))

    def numbers(found: Any) -> dict[str, float]:
        value, expected = found
        return {**evidence_number(value), **({} if normalized else counts(*expected))}

    return Prepared(lambda: jax.block_until_ready(gradients(*logs)), numbers)
