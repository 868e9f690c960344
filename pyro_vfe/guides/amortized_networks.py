"""The networks as parts of the guide: their weights in its state and in Pyro's store are the same tensors."""

import warnings
from collections.abc import Mapping
from operator import attrgetter

import pyro
import torch
from pyro.infer.autoguide.utils import deep_setattr
from pyro.nn import PyroModule
from pyro.params.param_store import param_with_module_name
from torch import nn
from torch.nn.parameter import is_lazy

from pyro_vfe.errors import StructureError, VFEWarning
from pyro_vfe.guides.tables import attribute
from pyro_vfe.program.left_over import other_shape


def registered(network: nn.Module | Mapping[str, nn.Module]) -> nn.Module:
    """Returns the module that holds what the user gave, each site's network under the site's name.

    Args:
        network: One module, or a mapping from sites to modules.

    Raises:
        StructureError: Something in it is no module, or has no weights yet.
    """
    if not isinstance(network, Mapping | nn.ModuleDict):
        return _checked(network, "its network")
    if not network:
        raise StructureError("AutoAmortized was given no network.", hint="Pass one, or one for each latent site.")
    holder = PyroModule()
    for site, module in network.items():
        deep_setattr(holder, attribute(site), _checked(module, f"the network of '{site}'"))
    return holder


def _checked(network: object, what: str) -> nn.Module:
    if not isinstance(network, nn.Module):
        kind = f"the class {network.__name__}" if isinstance(network, type) else f"a {type(network).__name__}"
        raise StructureError(
            f"AutoAmortized was given {kind} as {what}.",
            hint="Pass a torch module, torch.nn.Sequential(...) say: its weights become the guide's.",
        )
    if any(is_lazy(weight) for weight in network.parameters()):
        raise StructureError(
            f"AutoAmortized was given a lazy module as {what}: its weights have no shape yet.",
            hint="Run it once on the data first, or say the sizes.",
        )
    return network


def network_for(guide: PyroModule, site: str | None) -> nn.Module:
    """Returns a network of a running guide, its weights known to Pyro's store.

    Args:
        guide: The guide, which holds it under `network`.
        site: The site whose network it is; None for one network of all.

    Raises:
        StructureError: The store has weights of another shape under the same name.
    """
    path, last = _path(site)
    return _in_store(attrgetter(path)(guide) if path else guide, last)


def unregistered(guide: PyroModule, site: str | None) -> nn.Module:
    """Returns the same network, which Pyro's store hears nothing of.

    Args:
        guide: The guide.
        site: The site whose network it is; None for one network of all.
    """
    module: nn.Module = guide
    for part in ".".join(filter(None, _path(site))).split("."):
        module = module._modules[part]  # type: ignore[assignment]  # getattr would tell the store
    return module


def _path(site: str | None) -> tuple[str, str]:
    """Where a network is: the path of its owner from the guide, and its own name."""
    path, _, last = (f"network.{attribute(site)}" if site is not None else "network").rpartition(".")
    return path, last


def _in_store(owner: PyroModule, child: str) -> nn.Module:
    """A submodule; where the store has its weights already it takes them over, as PyroModule does with its own.

    Pyro registers a plain module's weights and leaves the module as it is: an optimiser that asks the store would then
    train tensors that the module does not use.
    """
    module: nn.Module = getattr(owner, child)
    if isinstance(module, PyroModule):
        # Its plain submodules are known to the store once they are asked for by name, which a Sequential does not do.
        for name, part in module._modules.items():
            if part is not None:
                _in_store(module, name)
        return module
    if not owner._pyro_context.active or pyro.settings.get("module_local_params"):
        return module
    name, store = owner._pyro_get_fullname(child), pyro.get_param_store()._params
    others: dict[nn.Parameter, torch.Tensor] = {}
    for path, own in module.named_parameters():
        stored = store.get(param_with_module_name(name, path), own)
        if stored.shape != own.shape:
            raise other_shape(param_with_module_name(name, path), stored.shape, own.shape)
        if stored is not own:
            others[own] = stored
    if others:
        _replace(module, others, name)
    return module


def _replace(module: nn.Module, others: Mapping[nn.Parameter, torch.Tensor], name: str) -> None:
    if not all(torch.equal(own.detach(), other.detach().to(own.device)) for own, other in others.items()):
        warnings.warn(
            f"The network '{name}' takes over the weights that Pyro's store has under its name, from a guide made "
            "before. Call pyro.clear_param_store() before a new guide, or keep the two apart: "
            "with pyro.get_param_store().scope().",
            VFEWarning,
            stacklevel=2,
        )
    for part in module.modules():
        for leaf, weight in part._parameters.items():
            if weight in others:
                part._parameters[leaf] = others[weight]  # type: ignore[index, assignment]
