"""Ours: P(e) and all marginals of a Bayesian network that an ordinary Pyro program holds."""

import time
from typing import Any

import torch
from bayes_net import first_leaves, given, read_network
from worker import Prepared
from workloads import network, posterior_numbers

from contestants.programs import empty
from pyro_vfe.energy.parts import joint_graph, normalized
from pyro_vfe.engine.inference import log_normalizer_and_marginals
from pyro_vfe.program.programs import Programs


def posterior(name: str) -> Prepared:
    """The engine's two passes; the plan is searched for in the first call, and how long the program ran is told."""
    read = read_network(name)
    model = given(read, first_leaves(read))
    start = time.perf_counter()
    with torch.no_grad():
        enumeration = Programs().enumerate(model, empty, (), {})
    facts = {"program run": time.perf_counter() - start}
    graph = joint_graph(normalized(enumeration, torch.float64))
    scopes = [(node,) for node in network(name).latents]

    def numbers(found: Any) -> dict[str, float]:
        log_evidence, tables = found
        return posterior_numbers(float(log_evidence.exp()), [table.values for table in tables.values()])

    return Prepared(lambda: log_normalizer_and_marginals(graph, scopes), numbers, facts=facts)
