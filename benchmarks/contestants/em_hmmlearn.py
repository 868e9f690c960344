"""hmmlearn: iterations of EM for a hidden Markov model with categorical emissions, always the first ones."""

from collections.abc import Mapping

import numpy as np
from hmmlearn.hmm import CategoricalHMM
from worker import Prepared
from workloads import SYMBOLS, chain, evidence_number, norms

from contestants.laps import Laps

Found = tuple[float, CategoricalHMM, Laps]


def iterations(sequences: int, steps: int, states: int, implementation: str, iterations: int) -> Prepared:
    """The E-step and the M-step of its `fit`, in float64; timed is the mean of all iterations but the first."""
    workload = chain(sequences, steps, states)
    symbols, lengths = workload.data.reshape(-1, 1), np.full(sequences, steps)

    def fresh() -> CategoricalHMM:
        hmm = CategoricalHMM(states, implementation=implementation, n_features=SYMBOLS)
        hmm.startprob_, hmm.transmat_, hmm.emissionprob_ = workload.initial, workload.transition, workload.emission
        hmm._check()
        return hmm

    def call(hmm: CategoricalHMM) -> Found:
        log_evidence, laps = 0.0, Laps()
        for _ in range(iterations):
            stats, log_evidence = hmm._do_estep(symbols, lengths)
            hmm._do_mstep(stats)
            laps.end()
        return log_evidence, hmm, laps

    def numbers(found: Found) -> Mapping[str, float]:
        log_evidence, hmm, _ = found
        new = {"initial": hmm.startprob_, "transition": hmm.transmat_, "emission": hmm.emissionprob_}
        return {**evidence_number(log_evidence), **norms(new)}

    return Prepared(call, numbers, fresh, lambda found: found[2].mean)
