"""Log-probabilities and supports as the distributions define them: no clamp, so that what cannot happen is at -inf.

torch clamps `probs` to machine epsilon inside log_prob. Here `probs` is read as it was given.
"""

from itertools import product
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor


def exact_log_prob(fn: Any, value: Tensor) -> Tensor:
    """Returns the log-probability of a value, of the distribution's batch shape, -inf where it is impossible."""
    if isinstance(fn, ExpandedDistribution):
        return exact_log_prob(fn.base_dist, value).expand(fn.batch_shape)
    if isinstance(fn, MaskedDistribution):
        log_prob = exact_log_prob(fn.base_dist, value)
        return torch.where(torch.as_tensor(fn._mask), log_prob, 0.0)
    if isinstance(fn, dist.Independent | torch.distributions.Independent):
        log_prob = exact_log_prob(fn.base_dist, value)
        return log_prob.flatten(-fn.reinterpreted_batch_ndims).sum(-1) if fn.reinterpreted_batch_ndims else log_prob
    if isinstance(fn, torch.distributions.OneHotCategorical):
        return _categorical(fn._categorical, value.argmax(-1))
    if isinstance(fn, torch.distributions.Categorical):
        return _categorical(fn, value)
    if isinstance(fn, torch.distributions.Bernoulli) and _has_probs(fn):
        return _safe_xlogy(value, fn.probs) + _safe_xlogy(1 - value, 1 - fn.probs)
    if isinstance(fn, torch.distributions.Binomial) and _has_probs(fn):
        n = fn.total_count
        ways = torch.lgamma(n + 1) - torch.lgamma(value + 1) - torch.lgamma(n - value + 1)
        return ways + _safe_xlogy(value, fn.probs) + _safe_xlogy(n - value, 1 - fn.probs)
    return fn.log_prob(value)


def support_of(fn: Any) -> Tensor:
    """Returns all values of one batch element, shape `(K, *event_shape)`; cartesian over `.to_event` dims."""
    if isinstance(fn, ExpandedDistribution | MaskedDistribution):
        return support_of(fn.base_dist)
    if isinstance(fn, dist.Independent | torch.distributions.Independent) and fn.reinterpreted_batch_ndims:
        base = support_of(fn.base_dist)
        inner = fn.base_dist.event_shape
        outer = fn.event_shape[: len(fn.event_shape) - len(inner)]
        picks = torch.tensor(list(product(range(len(base)), repeat=outer.numel())))
        return base[picks].reshape(len(picks), *outer, *inner)
    return fn.enumerate_support(expand=False).reshape(-1, *fn.event_shape)


def _has_probs(fn: Any) -> bool:
    return fn._param is fn.__dict__.get("probs")


def _categorical(fn: Any, index: Tensor) -> Tensor:
    probs = fn.probs
    log_table = torch.where(probs > 0, torch.where(probs > 0, probs, 1.0).log(), -torch.inf)
    if not _has_probs(fn):
        log_table = fn.logits
    index = index.long().unsqueeze(-1)
    if log_table.shape[:-1] != index.shape[:-1]:
        shape = torch.broadcast_shapes(log_table.shape[:-1], index.shape[:-1])
        log_table, index = log_table.expand(*shape, log_table.shape[-1]), index.expand(*shape, 1)
    return log_table.gather(-1, index).squeeze(-1)


def _safe_xlogy(x: Tensor, y: Tensor) -> Tensor:
    """x log y with 0 log 0 = 0 and x log 0 = -inf, in value and gradient."""
    impossible = (y <= 0) & (x != 0)
    log_y = torch.where(y > 0, y, 1.0).log()
    return torch.where(impossible, -torch.inf, x * log_y)
