r"""Averages of importance weights on the log scale, and how uncertain they are.

    L  =  log 1/K sum_k w_k            L_-k: the same without w_k

    stderr^2  =  (K-1)/K sum_k ( L_-k - mean_k L_-k )^2            (jackknife)

Where one weight outweighs the others, the delta method says that L is uncertain by 1 nat at most; the jackknife sees
how far L falls without that weight.

References:
    Efron and Stein (1981), The jackknife estimate of variance.
    Kish (1965), Survey Sampling (the effective sample size).
"""

import math

import torch
from torch import Tensor


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """Returns the log of the mean weight over the first dim, `(*data)`; -inf where all weights are zero.

    Args:
        log_weights: `(K, *data)`, in nats.
    """
    return log_weights.logsumexp(0) - math.log(len(log_weights))


def log_means_without_each(log_weights: Tensor) -> Tensor:
    """Returns the log of the mean weight of the others, for each weight, `(K, *data)`; K is 2 at least.

    Args:
        log_weights: `(K, *data)`, in nats.
    """
    total = log_weights.logsumexp(0)
    share = torch.where(total.isneginf(), 0.0, (log_weights - total).exp())
    largest = log_weights.argmax(0, keepdim=True)
    rest = log_weights.scatter(0, largest, -math.inf).logsumexp(0, keepdim=True)
    # Without the largest weight a difference from the total would be rounding.
    others = (total + torch.log1p(-share)).scatter(0, largest, rest)
    return others - math.log(len(log_weights) - 1)


def means_without_each(values: Tensor) -> Tensor:
    """Returns the mean of the others, for each value, `(K, *data)`; K is 2 at least.

    Args:
        values: `(K, *data)`.
    """
    return (values.sum(0) - values) / (len(values) - 1)


def jackknife(without_each: Tensor) -> Tensor:
    """Returns the standard error of a statistic, `(*data)`; inf where it is infinite without one of the draws.

    Args:
        without_each: The statistic without each of the draws, `(K, *data)`.
    """
    count = len(without_each)
    spread = ((without_each - without_each.mean(0)) ** 2).sum(0)
    stderr: Tensor = ((count - 1) / count * spread).sqrt()
    return torch.where(stderr.isnan(), math.inf, stderr)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """Returns how many even weights the weights are worth, (sum w)^2 / sum w^2, `(*data)`; 0 where all are zero.

    Args:
        log_weights: `(K, *data)`, in nats.
    """
    total = log_weights.logsumexp(0)
    worth = (2 * total - (2 * log_weights).logsumexp(0)).exp()
    return torch.where(total.isneginf(), 0.0, worth)
