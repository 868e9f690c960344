"""pyAgrum's LazyPropagation: P(e) and all marginals."""

import tempfile
from pathlib import Path

import pyagrum
from worker import Prepared
from workloads import network, posterior_numbers


def posterior(name: str) -> Prepared:
    """A fresh propagation each time, its junction tree made before the clock starts.

    The evidence is asked for first, and propagation left to the first marginal: the quickest order.
    """
    workload = network(name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.bif"
        path.write_text(workload.text)
        net = pyagrum.loadBN(str(path))

    def fresh() -> pyagrum.LazyPropagation:
        inference = pyagrum.LazyPropagation(net)
        inference.setEvidence(dict.fromkeys(workload.observed, 0))
        inference.junctionTree()
        return inference

    def call(inference: pyagrum.LazyPropagation) -> tuple[float, list[pyagrum.Tensor]]:
        return inference.evidenceProbability(), [inference.posterior(node) for node in workload.latents]

    return Prepared(call, lambda found: posterior_numbers(*found), fresh)
