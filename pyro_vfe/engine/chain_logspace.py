r"""Chains whose messages span more than floating point does: the same recursions on logs.

    log a_t+1(j)  =  unary_t+1(j) + log sum_i exp( log a_t(i) + pairs_t(i, j) )

Every message is kept relative to its largest entry, so that no precision goes into what all entries share.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vfe.engine.logspace import log_sum_exp


@dataclass(frozen=True)
class LogChain:
    """Log messages of sequences, and what follows from them."""

    unary: Tensor
    """Log potentials, `(T, N, K)`."""

    pairs: Tensor
    """Log potentials, `(T - 1 or 1, N or 1, K, K)`."""

    forward: Tensor
    """log a, with the emission at its own time, `(T, N, K)`."""

    backward: Tensor
    """log b, without it, `(T, N, K)`."""

    log_normalizer: Tensor
    """Log sums over paths, `(N,)`."""

    def gradients(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gradients of `weights @ log_normalizer` for `unary` and `pairs`."""
        weights = weights[:, None].where(self.log_normalizer[:, None] != -torch.inf, 0.0)
        unary = _weighted_softmax(self.forward + self.backward, weights)
        pairs = torch.zeros_like(self.pairs)
        for t in range(len(self.unary) - 1):
            arriving = self.unary[t + 1] + self.backward[t + 1]
            joint = self.forward[t][:, :, None] + at_step(self.pairs, t) + arriving[:, None, :]
            counts = _weighted_softmax(joint.flatten(1), weights).view_as(joint)
            at_step(pairs, t).add_(counts.sum(0, keepdim=True) if pairs.shape[1] == 1 else counts)
        return unary, pairs


def swept_in_logs(unary: Tensor, pairs: Tensor) -> LogChain:
    """Returns the log messages of all sequences.

    Args:
        unary: Log potentials, `(T, N, K)`.
        pairs: Log potentials, `(T - 1 or 1, N or 1, K, K)`.
    """
    messages, total = filtered_in_logs(unary, pairs)
    forward, backward = torch.stack(messages), torch.zeros_like(unary)
    for t in range(len(unary) - 2, -1, -1):
        message, _ = relative(unary[t + 1] + backward[t + 1])
        backward[t] = log_sum_exp(message[:, None, :] + at_step(pairs, t), (2,))
    return LogChain(unary, pairs, forward, backward, total + log_sum_exp(forward[-1], (1,)))


def at_step(pairs: Tensor, t: int) -> Tensor:
    """Returns the potentials of the step from t to t + 1, `(N or 1, K, K)`."""
    return pairs[t if len(pairs) > 1 else 0]


def filtered_in_logs(unary: Tensor, pairs: Tensor) -> tuple[list[Tensor], Tensor]:
    """Returns the forward log messages, `(N, K)` each, and what the last one lacks to its true size, `(N,)`.

    Args:
        unary: Log potentials, `(T, N, K)`.
        pairs: Log potentials, `(T - 1 or 1, N or 1, K, K)`.
    """
    messages, total = [unary[0]], torch.zeros_like(unary[0, :, 0])
    for t in range(1, len(unary)):
        message, peak = relative(messages[-1])
        total = total + peak
        messages.append(unary[t] + log_sum_exp(message[:, :, None] + at_step(pairs, t - 1), (1,)))
    return messages, total


def relative(message: Tensor) -> tuple[Tensor, Tensor]:
    """Returns log entries `(N, K)` less their largest, and the largest; of -inf alone, themselves and a number."""
    peak = message.detach().amax(1).clamp(min=torch.finfo(message.dtype).min)
    return message - peak[:, None], peak


def _weighted_softmax(logits: Tensor, weights: Tensor) -> Tensor:
    """Returns probabilities along the last axis times weights; where a weight is 0, 0."""
    return (logits.softmax(-1) * weights).where(weights != 0, 0.0)
