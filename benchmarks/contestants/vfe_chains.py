"""Ours: a chain as one site of a Pyro program, and the engine's function alone."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from worker import Prepared
from workloads import chain, counts, evidence_number

import pyro_vfe as vfe
from contestants.programs import Model
from contestants.steps import step
from pyro_vfe.engine.chains import chain_log_normalizer


def markov_chain(sequences: int, steps: int, states: int, dtype: torch.dtype = torch.float32) -> Model:
    """A hidden Markov model whose chain is one site."""
    workload = chain(sequences, steps, states)
    data = torch.tensor(workload.data)
    start = [torch.tensor(table).to(dtype) for table in (workload.initial, workload.transition, workload.emission)]

    def model() -> None:
        initial = pyro.param("initial", start[0].clone, constraint=constraints.simplex)
        transition = pyro.param("transition", start[1].clone, constraint=constraints.simplex)
        emission = pyro.param("emission", start[2].clone, constraint=constraints.simplex)
        with pyro.plate("sequences", sequences, dim=-2), pyro.plate("time", steps, dim=-1):
            z = pyro.sample("z", vfe.MarkovChain(initial, transition))
            pyro.sample("x", dist.Categorical(emission[z]), obs=data)

    return model


def program(sequences: int, steps: int, states: int) -> Prepared:
    """The whole of what a user runs: the program, its loss and its gradients."""
    return Prepared(step(vfe.FreeEnergy(), markov_chain(sequences, steps, states)), evidence_number)


def engine(sequences: int, steps: int, states: int) -> Prepared:
    """The engine alone: log evidence and expected counts, which are its gradients by the log tables."""
    workload = chain(sequences, steps, states)
    data = torch.tensor(workload.data.T.copy())
    tables = [torch.tensor(table).float() for table in (workload.initial, workload.transition, workload.emission)]

    def call() -> tuple[Tensor, tuple[Tensor, ...]]:
        initial, transition, emission = logs = [table.log().requires_grad_() for table in tables]
        unary = emission.T.contiguous()[data]
        first = torch.cat([(unary[0] + initial)[None], unary[1:]])
        total = chain_log_normalizer(first, transition[None, None]).sum()
        return total, torch.autograd.grad(total, logs)

    return Prepared(call, lambda found: {**evidence_number(found[0]), **counts(*found[1])})
