"""pgmpy's VariableElimination: all marginals, a query for each."""

import logging

import numpy as np
from numpy.typing import NDArray
from pgmpy.inference import VariableElimination
from pgmpy.readwrite import BIFReader
from worker import Prepared
from workloads import marginal_numbers, network


def posterior(name: str) -> Prepared:
    """The marginals given the evidence; it offers no P(e)."""
    logging.getLogger("pgmpy").setLevel(logging.ERROR)
    workload = network(name)
    model = BIFReader(string=workload.text).get_model()
    states = {node: model.get_cpds(node).state_names[node][0] for node in workload.observed}
    inference = VariableElimination(model)

    def call() -> list[NDArray[np.float64]]:
        return [inference.query([node], evidence=states, show_progress=False).values for node in workload.latents]

    return Prepared(call, marginal_numbers)
