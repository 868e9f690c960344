"""Distributions in a precision that log-probabilities can be computed in.

lgamma(x + 1) of x = 250:    1134.05 in single precision, 1134 in half; 250 + 10 is 4 in eight bits

In which precision data and parameters are stored is no statement about log-probabilities: those of half precision are
scored in the default one, and narrow integers as wide ones.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform

from pyro_vfe.program.log_prob import is_narrow, slim, widened
from pyro_vfe.program.provenance import untracked

_CACHED = ("_inv", "_cached_x_y")
"""What a transform keeps of its last call, and its inverse, which holds it."""


_PLAIN = frozenset([type(None), bool, int, float, str, torch.Size])

_WIDE = frozenset([torch.float32, torch.float64, torch.int64, torch.bool])


def widened_distribution(fn: Any) -> Any:
    """The distribution with the numbers it holds widened; itself where none of them is narrow.

    Args:
        fn: A distribution of torch or Pyro.
    """
    with untracked():
        is_wide = _is_plainly_wide(fn) or not _holds_narrow(fn)
    return fn if is_wide else _widened(fn, {})


def _is_plainly_wide(fn: Any) -> bool:
    """Whether a distribution holds numbers and wide tensors alone: asked of every site of every run."""
    for held in vars(fn).values():
        if type(held) not in _PLAIN and (type(held) is not Tensor or held.dtype not in _WIDE):
            return False
    return True


def _holds_narrow(part: Any) -> bool:
    if isinstance(part, Tensor):
        return is_narrow(part)
    if isinstance(part, (list, tuple)):
        return any(map(_holds_narrow, part))
    if type(part).__name__ == "_InverseTransform":
        return _holds_narrow(part.inv)
    if not isinstance(part, (Distribution, Transform)):
        return False
    return any(_holds_narrow(held) for name, held in vars(part).items() if name not in _CACHED)


def _widened(part: Any, made: dict[int, Any]) -> Any:
    """A copy with wide numbers; what was one tensor stays one, by which a family knows what it was given."""
    if isinstance(part, Tensor):
        if id(part) not in made:
            made[id(part)] = widened(part)
        return made[id(part)]
    if type(part) in (list, tuple):
        return type(part)(_widened(held, made) for held in part)
    if type(part).__name__ == "_InverseTransform":
        return _widened(part.inv, made).inv
    if not isinstance(part, (Distribution, Transform)):
        return part
    result = object.__new__(type(part))
    result.__dict__.update({name: _widened(held, made) for name, held in part.__dict__.items() if name not in _CACHED})
    if isinstance(part, Transform):
        result.__dict__.update({"_inv": None, "_cached_x_y": (None, None)})
    if type(part).__name__ == "Categorical":
        _normalise(result)
    return result


def _normalise(fn: Any) -> None:
    """Makes a Categorical's probabilities, which half precision has rounded, sum to one again."""
    known = fn.__dict__
    given = "probs" if known["_param"] is known.get("probs") else "logits"
    if "probs" in known:
        probs = slim(known["probs"], 1)
        known["probs"] = (probs / probs.sum(-1, keepdim=True)).expand(known["probs"].shape)
    if "logits" in known:
        logits = slim(known["logits"], 1)
        known["logits"] = (logits - logits.logsumexp(-1, keepdim=True)).expand(known["logits"].shape)
    known["_param"] = known[given]
