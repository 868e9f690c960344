"""What is seen and what is not: masks, missing values, factors, deterministic sites, data that a latent shifts."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from programs.case import Program, bernoulli, categorical, noise, positive, simplex, tensor, unit

COUNTS = tensor([1.0, 4.0, 2.0, 7.0])
SEEN = torch.tensor([True, False, True, True])
LENGTHS = torch.tensor([3, 1, 2])
SEQUENCES = noise(3, 3, seed=1)
LABELS = torch.tensor([2, 0, 1, 0])
VECTORS = noise(4, 2, seed=3)


def masked_data(counts: Tensor) -> None:
    with pyro.plate("data", 4):
        z = categorical("z", simplex("weights", 3))
        with pyro.poutine.mask(mask=SEEN):
            pyro.sample("u", dist.Poisson(positive("rates", 3, seed=1)[z]), obs=counts)


def table_guide(counts: Tensor) -> None:
    with pyro.plate("data", 4):
        categorical("z", simplex("q", 4, 3, seed=2))


def masked_fn(counts: Tensor) -> None:
    with pyro.plate("data", 4):
        z = categorical("z", simplex("weights", 3))
        pyro.sample("u", dist.Poisson(positive("rates", 3, seed=1)[z]).mask(SEEN), obs=counts)
        with pyro.poutine.mask(mask=False):
            pyro.sample("ignored", dist.Poisson(1.0 + z), obs=counts)


def masked_latents(counts: Tensor) -> None:
    with pyro.plate("data", 4), pyro.poutine.mask(mask=SEEN):
        z = categorical("z", simplex("weights", 3))
        pyro.sample("u", dist.Poisson(positive("rates", 3, seed=1)[z]), obs=counts)


def masked_latents_guide(counts: Tensor) -> None:
    with pyro.plate("data", 4), pyro.poutine.mask(mask=SEEN):
        categorical("z", simplex("q", 4, 3, seed=2))


def varying_lengths(sequences: Tensor) -> None:
    transition, means = simplex("transition", 2, 2), noise(2, seed=2)
    with pyro.plate("sequences", 3):
        z = torch.tensor(0)
        for t in range(3):
            with pyro.poutine.mask(mask=t < LENGTHS):
                z = categorical(f"z_{t}", transition[z])
                pyro.sample(f"u_{t}", dist.Normal(means[z], positive("sigma", seed=3)), obs=sequences[:, t])


def varying_lengths_guide(sequences: Tensor) -> None:
    with pyro.plate("sequences", 3):
        z = torch.tensor(1)
        for t in range(3):
            with pyro.poutine.mask(mask=t < LENGTHS):
                z = categorical(f"z_{t}", simplex("q", 3, 2, 2, seed=4)[t, z])


def missing_labels(labels: Tensor) -> None:
    with pyro.plate("data", 3):
        x = pyro.sample("x", dist.Categorical(simplex("x_probs", 3)), obs=labels, obs_mask=SEEN[:3])
        y = categorical("y", simplex("y_probs", 3, 2, seed=1)[x])
        pyro.sample("u", dist.Normal(noise(3, 2, seed=2)[x, y], 1.0), obs=COUNTS[:3] / 4)


def missing_labels_guide(labels: Tensor) -> None:
    with pyro.plate("data", 3):
        with pyro.poutine.mask(mask=~SEEN[:3]):
            x = categorical("x_unobserved", simplex("q_x", 3, 3, seed=3))
        x = torch.where(SEEN[:3], labels, x)
        categorical("y", simplex("q_y", 3, 2, seed=4)[x])


def missing_labels_guide_of_y(labels: Tensor) -> None:
    with pyro.plate("data", 3):
        categorical("y", simplex("q_y", 3, 2, seed=4))


def factors(counts: Tensor) -> None:
    a, b = categorical("a", simplex("a_probs", 3)), bernoulli("b", unit("b_prob"))
    pyro.factor("ab", pyro.param("w", lambda: noise(3, 2, seed=1))[a, b.long()])
    with pyro.plate("data", 4):
        c = bernoulli("c", unit("c_prob", seed=2))
        pyro.factor("bc", (b - 0.3) * (c + 0.5) * counts / 3)


def factors_guide(counts: Tensor) -> None:
    b = bernoulli("b", unit("q_b", seed=3))
    categorical("a", simplex("q_a", 2, 3, seed=4)[b.long()])


def deterministic(counts: Tensor) -> None:
    with pyro.plate("data", 4):
        a, b = bernoulli("a", unit("a_prob")), bernoulli("b", unit("b_prob", seed=1))
        total = pyro.deterministic("total", a + 2 * b)
        pyro.sample("u", dist.Poisson(1 + total * positive("rate", seed=2)), obs=counts)


def deterministic_guide(counts: Tensor) -> None:
    with pyro.plate("data", 4):
        bernoulli("a", pyro.deterministic("q", unit("q_a", 4, seed=3)))


def latent_dependent_mask(counts: Tensor) -> None:
    with pyro.plate("data", 4):
        on = bernoulli("on", unit("on_prob"))
        with pyro.poutine.mask(mask=on > 0):
            pyro.sample("u", dist.Poisson(positive("rate", seed=1)), obs=counts)


def latent_dependent_data(counts: Tensor) -> None:
    with pyro.plate("data", 4):
        shift = categorical("shift", simplex("shift_probs", 3))
        pyro.sample("u", dist.Normal(0.0, positive("sigma", seed=1)), obs=counts - 2 * shift)


def vectors(points: Tensor) -> None:
    covariance = tensor([[1.0, 0.3], [0.3, 0.5]])
    with pyro.plate("data", 4):
        z = categorical("z", simplex("weights", 3))
        means = pyro.param("means", lambda: noise(3, 2, seed=1))[z]
        pyro.sample("u", dist.MultivariateNormal(means, covariance), obs=points)
        pyro.sample("v", dist.Normal(means, 1.0).to_event(1), obs=points.flip(0))


def observed_labels(labels: Tensor) -> None:
    with pyro.plate("data", 4):
        z = categorical("z", simplex("weights", 2))
        pyro.sample("u", dist.Categorical(simplex("emission", 2, 3, seed=1)[z]), obs=labels)


DATA = ("data",)

OBSERVATIONS = {
    "masked_data": Program(masked_data, args=(COUNTS,), plates=DATA, pyro_nesting=1, marginals=(("z",),)),
    "masked_data_guided": Program(masked_data, table_guide, (COUNTS,), plates=DATA, pyro_nesting=1),
    "masked_fn": Program(masked_fn, args=(COUNTS,), plates=DATA, pyro_nesting=1),
    "masked_latents": Program(masked_latents, args=(COUNTS,), plates=DATA, pyro_nesting=1, marginals=(("z",),)),
    "masked_latents_guided": Program(masked_latents, masked_latents_guide, (COUNTS,), plates=DATA, pyro_nesting=1),
    "varying_lengths": Program(varying_lengths, args=(SEQUENCES,), plates=("sequences",), pyro_nesting=1),
    "varying_lengths_guided": Program(
        varying_lengths, varying_lengths_guide, (SEQUENCES,), plates=("sequences",), pyro_nesting=1
    ),
    "missing_labels": Program(missing_labels, args=(LABELS[:3],), plates=DATA, pyro_nesting=1, marginals=(("y",),)),
    "missing_labels_guided": Program(missing_labels, missing_labels_guide, (LABELS[:3],), plates=DATA, pyro_nesting=1),
    "missing_labels_partly_guided": Program(
        missing_labels, missing_labels_guide_of_y, (LABELS[:3],), plates=DATA, pyro_nesting=1
    ),
    "factors": Program(factors, args=(COUNTS,), pyro_nesting=1, marginals=(("a", "b"), ("c",))),
    "factors_guided": Program(factors, factors_guide, (COUNTS,), pyro_nesting=1),
    "deterministic": Program(deterministic, args=(COUNTS,), plates=DATA, pyro_nesting=1, marginals=(("a", "b"),)),
    "deterministic_guided": Program(deterministic, deterministic_guide, (COUNTS,), plates=DATA),
    "latent_dependent_mask": Program(latent_dependent_mask, args=(COUNTS,), plates=DATA, pyro_nesting=1),
    "latent_dependent_data": Program(latent_dependent_data, args=(COUNTS,), plates=DATA, pyro_nesting=1),
    "vectors": Program(vectors, args=(VECTORS,), plates=DATA, pyro_nesting=1, marginals=(("z",),)),
    "far_vectors": Program(vectors, args=(200 * VECTORS,), plates=DATA, pyro_nesting=1, marginals=(("z",),)),
    "observed_labels": Program(observed_labels, args=(LABELS,), plates=DATA, pyro_nesting=1),
}
