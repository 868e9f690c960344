"""Every test starts from an empty parameter store, float64, the same seed, and networks that nobody has trained."""

from collections.abc import Iterator

import pyro
import pytest
import torch
from programs import networks

MODULES = [module for module in vars(networks).values() if isinstance(module, torch.nn.Module)]
MODULES += [
    program
    for pair in networks.NETWORKS.values()
    for program in (pair.model, pair.guide)
    if isinstance(program, torch.nn.Module)
]


@pytest.fixture(autouse=True)
def fresh_pyro() -> Iterator[None]:
    """Clears what Pyro and torch hold globally, before and after."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    weights = [(weight, weight.detach().clone()) for module in MODULES for weight in module.parameters()]
    yield
    with torch.no_grad():
        for weight, before in weights:
            weight.copy_(before)
    pyro.clear_param_store()
    torch.set_default_dtype(dtype)
