"""One process of a group: the gradient that DistributedDataParallel gives an ELBOModule, printed as JSON."""

import json
import os
import sys

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.parallel import DistributedDataParallel

import pyro_vfe as vfe

COUNTS = torch.tensor([[1.0], [4.0], [2.0], [7.0]], dtype=torch.float64)


class Mixture(PyroModule):
    """A mixture of Poissons, as a module."""

    def __init__(self) -> None:
        super().__init__()
        rates = torch.tensor([1.0, 5.0], dtype=torch.float64)
        self.rates = PyroParam(rates, constraint=constraints.positive)

    def forward(self, u: Tensor) -> None:
        """Generates the counts."""
        with pyro.plate("data", len(u)):
            v = pyro.sample("v", dist.Categorical(torch.tensor([0.3, 0.7], dtype=torch.float64)))
            pyro.sample("u", dist.Poisson(self.rates[v, None]).to_event(1), obs=u)


def elbo_module(kind: str) -> nn.Module:
    """Returns F of the mixture with a guide of this kind, as a module whose parameters are its own."""
    model = Mixture()
    if kind == "AutoAmortized":
        network = nn.Linear(1, 2).double()
        with torch.no_grad():
            network.weight.copy_(torch.tensor([[-0.5], [0.5]]))
            network.bias.copy_(torch.tensor([1.0, -1.0]))
        guide = vfe.AutoAmortized(model, network)
    else:
        guide = getattr(vfe, kind)(model)
    return vfe.FreeEnergy()(model, guide)


def gradient(kind: str, rank: int, size: int) -> dict[str, list[float]]:
    """Returns the gradient over the group, each process with its share of the data; that of one alone for size 1."""
    whole_tables = kind in ("AutoMeanField", "AutoStructured")  # They have a table for each datum: all see all data.
    u = COUNTS if whole_tables else COUNTS[rank::size]
    module = elbo_module(kind)
    module(u)  # Parameters are made at the first call.
    parameters = dict(module.named_parameters())
    trained = DistributedDataParallel(module) if size > 1 else module
    trained(u).backward()
    shares = 1 if whole_tables else size  # The group averages over processes, and F is a sum over data.
    return {name: (shares * p.grad).flatten().tolist() for name, p in parameters.items() if p.grad is not None}


if __name__ == "__main__":
    path, rank, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_default_dtype(torch.float64)
    if size > 1:
        store = torch.distributed.FileStore(path, size)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    with pyro.settings.context(module_local_params=True):
        print(json.dumps({kind: gradient(kind, rank, size) for kind in sys.argv[4:]}), flush=True)
    os._exit(0)  # The group's threads may wait for each other when it is taken apart.
