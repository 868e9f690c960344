"""dynamax: its E-step, one jitted function of all sequences."""

from typing import Any

import jax
import jax.numpy as jnp
from dynamax.hidden_markov_model import CategoricalHMM
from worker import Prepared
from workloads import SYMBOLS, chain, counts, evidence_number


def e_step(sequences: int, steps: int, states: int) -> Prepared:
    """Log evidence and expected counts, summed over sequences."""
    workload = chain(sequences, steps, states)
    hmm = CategoricalHMM(states, 1, SYMBOLS)
    params, _ = hmm.initialize(
        initial_probs=jnp.asarray(workload.initial),
        transition_matrix=jnp.asarray(workload.transition),
        emission_probs=jnp.asarray(workload.emission)[:, None],
    )
    data = jnp.asarray(workload.data)[..., None]

    @jax.jit
    def summed() -> Any:
        statistics = jax.vmap(lambda sequence: hmm.e_step(params, sequence))(data)
        return jax.tree.map(lambda leaf: leaf.sum(0), statistics)

    def numbers(found: Any) -> dict[str, float]:
        (initial, transition, emission), log_evidence = found
        return {**evidence_number(log_evidence), **counts(initial, transition, emission["sum_x"])}

    return Prepared(lambda: jax.block_until_ready(summed()), numbers)
