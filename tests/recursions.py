r"""Exact answers for programs whose joint table is too large: chains and grids.

    log p(u)  =  log  1^T  diag(p(u_T|z)) A^T ... A^T diag(p(u_1|z)) pi          forward recursion
    log Z     =  log  sum over columns of spins of the product of column-to-column weights      transfer matrix

References:
    Rabiner (1989), A tutorial on hidden Markov models and selected applications in speech recognition.
    Onsager (1944), Crystal statistics I: a two-dimensional model with an order-disorder transition.
"""

import torch
from torch import Tensor


def forward_recursion(initial: Tensor, transition: Tensor, log_likelihood: Tensor) -> Tensor:
    """Returns log p(u) of a hidden Markov model, a scalar in nats.

    Args:
        initial: Probabilities of the first state, shape `(K,)`.
        transition: Row-stochastic, shape `(K, K)`.
        log_likelihood: log p(u_t | z_t), shape `(T, K)`.
    """
    log_alpha = initial.log() + log_likelihood[0]
    for step in log_likelihood[1:]:
        log_alpha = (log_alpha.unsqueeze(-1) + transition.log()).logsumexp(-2) + step
    return log_alpha.logsumexp(-1)


def ising_transfer_matrix(right: Tensor, down: Tensor, fields: Tensor) -> Tensor:
    """Returns log sum over all spins s in {-1, 1} of exp( sum J s s' + sum h s ), a scalar in nats.

    Args:
        right: Couplings of (r, c) with (r, c + 1), shape `(rows, columns - 1)`.
        down: Couplings of (r, c) with (r + 1, c), shape `(rows - 1, columns)`.
        fields: Field h of each spin, shape `(rows, columns)`.
    """
    rows, columns = fields.shape
    spins = 1.0 - 2.0 * ((torch.arange(2**rows).unsqueeze(-1) >> torch.arange(rows)) & 1)
    within = spins @ fields + (spins[:, :-1] * spins[:, 1:]) @ down
    log_alpha = within[:, 0]
    for column in range(1, columns):
        between = (spins * right[:, column - 1]) @ spins.T
        log_alpha = (log_alpha.unsqueeze(-1) + between).logsumexp(0) + within[:, column]
    return log_alpha.logsumexp(0)
