r"""Sums over the paths of a Markov chain along time, for a batch of sequences at once.

    Z_n  =  sum over x_1 .. x_T of  exp( sum_t unary[t, n, x_t]  +  sum_t pairs[t, n, x_t, x_t+1] )

The backward pass is not autograd through T steps but the forward-backward algorithm: memory is O(T N K), never
O(T N K^2). Only second derivatives, asked for by `create_graph`, come from differentiating the plain sweep.

References:
    Rabiner (1989), A tutorial on hidden Markov models and selected applications in speech recognition.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_vfe.engine.chain_logspace import at_step, filtered_in_logs, relative
from pyro_vfe.engine.chain_solution import SCALED_EVERY, gradients, solve
from pyro_vfe.engine.logspace import log_sum_exp


def plain_log_normalizer(unary: Tensor, pairs: Tensor) -> Tensor:
    """Returns what `chain_log_normalizer` returns, by a broadcast log-sum-exp per step: slow, large and simple."""
    messages, total = filtered_in_logs(unary, pairs)
    return total + log_sum_exp(messages[-1], (1,))


def plain_marginals(initial: Tensor, conditionals: Tensor, num_steps: int | None = None) -> Tensor:
    """Returns what `chain_marginals` returns, by one matrix product per step."""
    marginals = [initial]
    for t in range((len(conditionals) + 1 if num_steps is None else num_steps) - 1):
        marginals.append((marginals[-1][:, None, :] @ at_step(conditionals, t)).squeeze(1))
    return torch.stack(marginals)


def chain_log_normalizer(unary: Tensor, pairs: Tensor) -> Tensor:
    """Returns the log of the sum over all paths of each sequence.

    Args:
        unary: Log potentials of the values, `(T, N, K)`.
        pairs: Log potentials of neighbours, `(T - 1 or 1, N or 1, K, K)`: `[t, n, i, j]` leads from value i at t to
            value j at t + 1. Not read where T = 1.

    Returns:
        Log sums in nats, `(N,)`; -inf with gradient zero where no path is possible. The gradient for `unary` is the
        marginals of the values, the one for `pairs` the expected transitions.

    References:
        Rabiner (1989), section III.A (forward-backward).
    """
    dtype = torch.promote_types(unary.dtype, pairs.dtype)
    if dtype not in SCALED_EVERY:
        return chain_log_normalizer(unary.float(), pairs.float()).to(dtype)
    unary, pairs = unary.to(dtype), pairs.to(dtype)
    if unary.shape[1] == 0 or len(pairs) == 0:
        return plain_log_normalizer(unary, pairs)
    pairs = pairs[: max(1, len(unary) - 1)]
    result: Tensor = _LogNormalizer.apply(unary, pairs)  # type: ignore[no-untyped-call]
    return result


class _LogNormalizer(torch.autograd.Function):
    """`chain_log_normalizer` with the backward pass that the messages give."""

    @staticmethod
    def forward(ctx: Any, unary: Tensor, pairs: Tensor) -> Tensor:
        """Returns the log sums, and keeps the messages if a gradient will be wanted."""
        ctx.save_for_backward(unary, pairs)
        ctx.parts = solve(unary, pairs, gradient=any(ctx.needs_input_grad))
        result = unary.new_empty(unary.shape[1])
        for part in ctx.parts:
            result[part.where if part.where is not None else ...] = part.chain.log_normalizer.to(unary.dtype)
        return result

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the weighted marginals and expected transitions."""
        unary, pairs = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiated(plain_log_normalizer, (unary, pairs), ctx.needs_input_grad, weights[0])
        return gradients(ctx.parts, weights[0], unary, pairs)


def _differentiated(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], wanted: Sequence[bool], weights: Tensor
) -> tuple[Tensor | None, ...]:
    """Returns gradients that can be differentiated again; the inputs may depend on each other."""
    aliases = [x.view_as(x) if want else x.detach() for x, want in zip(inputs, wanted, strict=True)]
    free = [alias for alias, want in zip(aliases, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(function(*aliases), free, weights, create_graph=True, materialize_grads=True))
    return tuple(next(found) if want else None for want in wanted)


def chain_marginals(initial: Tensor, conditionals: Tensor, num_steps: int | None = None) -> Tensor:
    """Returns the marginals q_t of a Markov chain, `(T, N, K)`: q_1 = initial, q_t+1 = q_t @ conditionals[t].

    Args:
        initial: Probabilities of the first value, `(N, K)`.
        conditionals: Probabilities of the next value (last axis) given the one before, `(T - 1 or 1, N or 1, K, K)`.
        num_steps: T; by default one more than there are conditionals.
    """
    steps = len(conditionals) + 1 if num_steps is None else num_steps
    result: Tensor = _Marginals.apply(initial, conditionals[: max(0, steps - 1)], steps)  # type: ignore[no-untyped-call]
    return result


class _Marginals(torch.autograd.Function):
    """`chain_marginals` with the adjoint recursion l_t = g_t + conditionals[t] @ l_t+1 as its backward pass."""

    @staticmethod
    def forward(ctx: Any, initial: Tensor, conditionals: Tensor, num_steps: int) -> Tensor:
        """Returns the marginals."""
        marginals = initial.new_empty(num_steps, *initial.shape)
        marginals[0] = initial
        rows = _rows(marginals, conditionals)
        for t in range(num_steps - 1):
            torch.bmm(rows[t], at_step(conditionals, t), out=rows[t + 1])
        ctx.save_for_backward(initial, conditionals, marginals)
        return marginals

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the adjoint of the first step, and the products of marginals and adjoints."""
        initial, conditionals, marginals = ctx.saved_tensors
        if torch.is_grad_enabled():
            plain = partial(plain_marginals, num_steps=len(marginals))
            return *_differentiated(plain, (initial, conditionals), ctx.needs_input_grad[:2], weights[0]), None
        adjoint = weights[0].clone(memory_format=torch.contiguous_format)
        rows = _rows(adjoint, conditionals)
        for t in range(len(marginals) - 2, -1, -1):
            rows[t].baddbmm_(rows[t + 1], at_step(conditionals, t).mT)
        if len(marginals) == 1:
            return adjoint[0], torch.zeros_like(conditionals), None
        axes = ("t" if len(conditionals) > 1 else "") + ("n" if conditionals.shape[1] > 1 else "") + "ij"
        products = torch.einsum(f"tni,tnj->{axes}", marginals[:-1], adjoint[1:])
        return adjoint[0], products.reshape(conditionals.shape), None


def _rows(messages: Tensor, conditionals: Tensor) -> tuple[Tensor, ...]:
    """Returns the steps of `(T, N, K)` as rows that matrices of the conditionals' shape multiply."""
    return messages.unsqueeze(1 if conditionals.shape[1] == 1 else 2).unbind(0)


@torch.no_grad()
def chain_mode(unary: Tensor, pairs: Tensor) -> Tensor:
    """Returns the most probable path of each sequence, int64 `(T, N)`; of equals, the one of smallest indices last.

    Args:
        unary: As for `chain_log_normalizer`.
        pairs: As for `chain_log_normalizer`.

    References:
        Viterbi (1967), Error bounds for convolutional codes and an asymptotically optimum decoding algorithm.
    """
    best, origins = unary[0], []
    for t in range(1, len(unary)):
        reached, origin = (relative(best)[0][:, :, None] + at_step(pairs, t - 1)).max(1)
        best = reached + unary[t]
        origins.append(origin)
    path = [best.argmax(1)]
    for origin in reversed(origins):
        path.append(origin.gather(1, path[-1][:, None]).squeeze(1))
    return torch.stack(path[::-1])


@torch.no_grad()
def chain_sample(unary: Tensor, pairs: Tensor, num_samples: int) -> Tensor:
    """Returns paths drawn from the chain, int64 `(num_samples, T, N)`: filtered forward, drawn backward.

    Args:
        unary: As for `chain_log_normalizer`; every sequence has a possible path.
        pairs: As for `chain_log_normalizer`.
        num_samples: How many paths are drawn of each sequence.

    References:
        Scott (2002), Bayesian methods for hidden Markov models.
    """
    T, N, K = unary.shape
    messages, _ = filtered_in_logs(unary, pairs)
    rows = torch.arange(N, device=unary.device)
    path = [_drawn(messages[-1].expand(num_samples, N, K))]
    for t in range(T - 2, -1, -1):
        arriving = at_step(pairs, t).expand(N, K, K).mT[rows, path[-1]]
        path.append(_drawn(messages[t] + arriving))
    return torch.stack(path[::-1], 1)


def _drawn(logits: Tensor) -> Tensor:
    """Returns an index per row of `(S, N, K)` logits."""
    return logits.softmax(-1).flatten(0, 1).multinomial(1).reshape(logits.shape[:2])
