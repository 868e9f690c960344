"""Programs whose joint table is too large: their terms come from a recursion or a closed form."""

import math

import pyro
import pyro.distributions as dist
import torch
from recursions import forward_recursion, ising_transfer_matrix
from torch import Tensor

from programs.case import Program, bernoulli, categorical, noise, tensor

STEPS = 1000
INITIAL = tensor([0.5, 0.3, 0.2])
TRANSITION = tensor([[0.8, 0.15, 0.05], [0.1, 0.7, 0.2], [0.25, 0.15, 0.6]])
MEANS = tensor([-1.0, 0.5, 2.0])
SERIES = noise(STEPS, seed=0) + MEANS[(torch.arange(STEPS) // 7) % 3]
CHAIN_Q = noise(STEPS, 3, seed=1).softmax(-1)


def long_chain(series: Tensor) -> None:
    probs = INITIAL
    for t, x in enumerate(series):
        z = categorical(f"z_{t}", probs)
        pyro.sample(f"u_{t}", dist.Normal(MEANS[z], 1.0), obs=x)
        probs = TRANSITION[z]


def long_chain_mean_field(series: Tensor) -> None:
    for t in range(len(series)):
        categorical(f"z_{t}", CHAIN_Q[t])


def _chain_log_likelihood() -> Tensor:
    return dist.Normal(MEANS, 1.0).log_prob(SERIES.unsqueeze(-1))


def long_chain_terms() -> dict[str, Tensor]:
    surprise = -forward_recursion(INITIAL, TRANSITION, _chain_log_likelihood())
    return {"surprise": surprise, "free_energy": surprise, "gap": tensor(0.0), "entropy": tensor(0.0)}


def long_chain_mean_field_terms() -> dict[str, Tensor]:
    log_prior = CHAIN_Q[0] @ INITIAL.log() + (CHAIN_Q[:-1] @ TRANSITION.log() * CHAIN_Q[1:]).sum()
    return _mean_field_terms(
        entropy=-(CHAIN_Q * CHAIN_Q.log()).sum(),
        log_prior=log_prior,
        accuracy=(CHAIN_Q * _chain_log_likelihood()).sum(),
        surprise=long_chain_terms()["surprise"],
    )


def _mean_field_terms(*, entropy: Tensor, log_prior: Tensor, accuracy: Tensor, surprise: Tensor) -> dict[str, Tensor]:
    energy = -log_prior - accuracy
    return {
        "energy": energy,
        "entropy": entropy,
        "free_energy": energy - entropy,
        "surprise": surprise,
        "gap": energy - entropy - surprise,
        "accuracy": accuracy,
        "complexity": -entropy - log_prior,
    }


COUNT = 120
PRIORS = noise(COUNT, 3, seed=2).softmax(-1)
POINTS = noise(COUNT, seed=3)
INDEPENDENT_Q = noise(COUNT, 3, seed=4).softmax(-1)


def independent(points: Tensor) -> None:
    for n, x in enumerate(points):
        z = categorical(f"z_{n}", PRIORS[n])
        pyro.sample(f"u_{n}", dist.Normal(MEANS[z], 1.0), obs=x)


def independent_guide(points: Tensor) -> None:
    for n in range(len(points)):
        categorical(f"z_{n}", INDEPENDENT_Q[n])


def independent_terms() -> dict[str, Tensor]:
    log_likelihood = dist.Normal(MEANS, 1.0).log_prob(POINTS.unsqueeze(-1))
    return _mean_field_terms(
        entropy=-(INDEPENDENT_Q * INDEPENDENT_Q.log()).sum(),
        log_prior=(INDEPENDENT_Q * PRIORS.log()).sum(),
        accuracy=(INDEPENDENT_Q * log_likelihood).sum(),
        surprise=-(PRIORS.log() + log_likelihood).logsumexp(-1).sum(),
    )


def independent_evidence() -> dict[str, Tensor]:
    surprise = independent_terms()["surprise"]
    return {"surprise": surprise, "free_energy": surprise, "gap": tensor(0.0)}


def root_with_children(points: Tensor) -> None:
    root = categorical("root", INITIAL)
    for n, x in enumerate(points):
        z = categorical(f"z_{n}", TRANSITION[root])
        pyro.sample(f"u_{n}", dist.Normal(MEANS[z], 1.0), obs=x)


def root_with_children_terms() -> dict[str, Tensor]:
    log_likelihood = dist.Normal(MEANS, 1.0).log_prob(POINTS.unsqueeze(-1))
    by_root = (TRANSITION.log() + log_likelihood.unsqueeze(-2)).logsumexp(-1).sum(0)
    surprise = -(INITIAL.log() + by_root).logsumexp(-1)
    return {"surprise": surprise, "free_energy": surprise, "gap": tensor(0.0)}


SIDE = 10
RIGHT, DOWN, FIELDS = (
    0.5 * noise(SIDE, SIDE - 1, seed=5),
    0.5 * noise(SIDE - 1, SIDE, seed=6),
    noise(SIDE, SIDE, seed=7),
)
ISING_Q = noise(SIDE, SIDE, seed=8).sigmoid()


def ising() -> None:
    spins = [[2 * bernoulli(f"s_{r}_{c}", 0.5) - 1 for c in range(SIDE)] for r in range(SIDE)]
    for r in range(SIDE):
        for c in range(SIDE):
            pyro.factor(f"field_{r}_{c}", FIELDS[r, c] * spins[r][c])
            if c + 1 < SIDE:
                pyro.factor(f"right_{r}_{c}", RIGHT[r, c] * spins[r][c] * spins[r][c + 1])
            if r + 1 < SIDE:
                pyro.factor(f"down_{r}_{c}", DOWN[r, c] * spins[r][c] * spins[r + 1][c])


def ising_mean_field() -> None:
    for r in range(SIDE):
        for c in range(SIDE):
            bernoulli(f"s_{r}_{c}", ISING_Q[r, c])


def ising_evidence() -> dict[str, Tensor]:
    surprise = SIDE**2 * math.log(2) - ising_transfer_matrix(RIGHT, DOWN, FIELDS)
    return {"surprise": surprise, "free_energy": surprise, "gap": tensor(0.0)}


def ising_mean_field_terms() -> dict[str, Tensor]:
    mean = 2 * ISING_Q - 1
    pairs = (RIGHT * mean[:, 1:] * mean[:, :-1]).sum() + (DOWN * mean[1:] * mean[:-1]).sum()
    return _mean_field_terms(
        entropy=-(torch.xlogy(ISING_Q, ISING_Q) + torch.xlogy(1 - ISING_Q, 1 - ISING_Q)).sum(),
        log_prior=tensor(-(SIDE**2) * math.log(2)),
        accuracy=(FIELDS * mean).sum() + pairs,
        surprise=ising_evidence()["surprise"],
    )


LARGE = {
    "chain_of_1000_steps": Program(long_chain, args=(SERIES,), expected=long_chain_terms),
    "chain_of_1000_steps_mean_field": Program(
        long_chain, long_chain_mean_field, (SERIES,), expected=long_chain_mean_field_terms
    ),
    "120_independent_latents": Program(independent, args=(POINTS,), expected=independent_evidence),
    "120_independent_latents_guided": Program(independent, independent_guide, (POINTS,), expected=independent_terms),
    "120_children_of_one_root": Program(root_with_children, args=(POINTS,), expected=root_with_children_terms),
    "ising_10_by_10": Program(ising, expected=ising_evidence),
    "ising_10_by_10_mean_field": Program(ising, ising_mean_field, expected=ising_mean_field_terms),
}
