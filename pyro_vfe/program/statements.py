"""What a sample statement asks for besides its distribution: values under a name, and marks of how to enumerate.

pyro.sample("c", dist.Delta(v))                        is v under a name; its log_density is a factor
infer={"enumerate": "sequential"}                      one run per value; in a plate the same sums in parallel
infer={"expand": True}, config_enumerate(expand=True)  enumerated values of the whole batch shape
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent

from pyro_vfe.engine.shapes import broadcast_shapes
from pyro_vfe.program.supports import unwrapped


def name_value(msg: Any) -> bool:
    """Makes a Delta that nobody observes a value under a name, or a factor of it where it has a density.

    Returns whether the site is one.

    Args:
        msg: Pyro's message of a site, before it runs.
    """
    fn = msg["fn"]
    point = _point(fn)
    if point is None:
        return False
    with torch._C.DisableTorchFunction():  # A look at a number is no branch of the program.
        density = torch.as_tensor(point.log_density)
        has_density = density.requires_grad or bool((density != 0).any())  # One of zero can be learned.
    if has_density:
        msg["value"], msg["is_observed"] = fn.rsample(), True
    else:
        msg["infer"] = {**msg["infer"], "_deterministic": True}
    return True


def _point(fn: Any) -> Any:
    """The Delta inside of a distribution; None where it is none."""
    inner = unwrapped(fn)
    while isinstance(inner, Independent):
        inner = unwrapped(inner.base_dist)
    return inner if type(inner).__name__ == "Delta" else None


def asks_for_runs(msg: Any) -> bool:
    """Returns whether a latent is marked to take its values one at a time; in a plate its elements cannot.

    Args:
        msg: Pyro's message of the site.
    """
    return msg["infer"].get("enumerate") == "sequential" and all(f.dim is None for f in msg["cond_indep_stack"])


def infer_expands(msg: Any) -> bool:
    """Returns whether a latent's statement asks for values of the whole batch shape.

    Args:
        msg: Pyro's message of the site.
    """
    return bool(msg["infer"].get("expand"))


def expanded(value: Tensor, msg: Any) -> Tensor:
    """Returns a latent's values, of the whole batch shape where its statement asks for that.

    Args:
        value: All values along a dim of their own.
        msg: Pyro's message of the site.
    """
    if not infer_expands(msg):
        return value
    event = len(msg["fn"].event_shape)
    batch = value.shape[: value.dim() - event]
    whole = broadcast_shapes(batch, torch.Size(msg["fn"].batch_shape))
    return value.expand([*whole, *value.shape[value.dim() - event :]])
