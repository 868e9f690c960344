"""hmmlearn: the E-step of its `fit`, without the M-step."""

from typing import Any

import numpy as np
from hmmlearn.hmm import CategoricalHMM
from worker import Prepared
from workloads import SYMBOLS, chain, counts, evidence_number


def e_step(sequences: int, steps: int, states: int, implementation: str) -> Prepared:
    """Log evidence and expected counts, in float64."""
    workload = chain(sequences, steps, states)
    hmm = CategoricalHMM(states, implementation=implementation, n_features=SYMBOLS)
    hmm.startprob_, hmm.transmat_, hmm.emissionprob_ = workload.initial, workload.transition, workload.emission
    symbols, lengths = workload.data.reshape(-1, 1), np.full(sequences, steps)
    hmm._check()

    def numbers(found: Any) -> dict[str, float]:
        stats, log_evidence = found
        return {**evidence_number(log_evidence), **counts(stats["start"], stats["trans"], stats["obs"])}

    return Prepared(lambda: hmm._do_estep(symbols, lengths), numbers)
