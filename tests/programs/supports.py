"""Kinds of finite support, and values that cannot happen."""

from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from programs.case import Program, bernoulli, categorical, positive, real, simplex, tensor, unit

COUNTS = tensor([1.0, 4.0, 2.0])
LABELS = torch.tensor([1, 1, 2, 0])


class Dice(dist.TorchDistribution):
    """A loaded die with faces 1, 3 and 7: a finite support that is not a range."""

    arg_constraints: ClassVar[dict[str, Any]] = {"logits": constraints.real_vector}
    has_enumerate_support = True
    faces = (1.0, 3.0, 7.0)

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits - logits.logsumexp(-1, keepdim=True)
        super().__init__(logits.shape[:-1], validate_args=False)

    @property
    def support(self) -> Any:
        """The numbers between the least and the greatest face."""
        return constraints.interval(1, 7)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Dice":
        """Returns the same die for a larger batch."""
        return Dice(self.logits.expand(*batch_shape, 3))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Returns faces."""
        index = torch.distributions.Categorical(logits=self.logits).sample(sample_shape)
        return torch.tensor(self.faces)[index]

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns the log-probability of faces."""
        index = (value > 2).long() + (value > 5).long()
        shape = torch.broadcast_shapes(index.shape, self.batch_shape)
        return self.logits.expand(*shape, 3).gather(-1, index.expand(shape).unsqueeze(-1)).squeeze(-1)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Returns all faces."""
        faces = torch.tensor(self.faces).reshape(-1, *(1 for _ in self.batch_shape))
        return faces.expand(-1, *self.batch_shape) if expand else faces


def mixed(counts: Tensor) -> None:
    a = pyro.sample("a", dist.OneHotCategorical(simplex("a_probs", 3)))
    b = pyro.sample("b", dist.Binomial(2, a @ unit("b_prob", 3, seed=1)))
    with pyro.plate("data", 2):
        c = bernoulli("c", 0.1 + 0.4 * b)
        d = pyro.sample("d", Dice(real("dice", 2, 3, seed=2)[c.long()]))
        pyro.sample("u", dist.Poisson(d + b * positive("rate", seed=3)), obs=counts)


def mixed_guide(counts: Tensor) -> None:
    with pyro.plate("data", 2):
        d = pyro.sample("d", Dice(real("q_d", 2, 3, seed=4)))
        bernoulli("c", 0.2 + d / 10)
    b = pyro.sample("b", dist.Binomial(2, unit("q_b", seed=5)))
    pyro.sample("a", dist.OneHotCategorical(simplex("q_a", 3, 3, seed=6)[b.long()]))


def mixed_guide_of_the_globals(counts: Tensor) -> None:
    a = pyro.sample("a", dist.OneHotCategorical(logits=real("q_a", 3, seed=6)))
    pyro.sample("b", dist.Binomial(2, logits=a @ real("q_b", 3, seed=5)))


def one_hot_chain(counts: Tensor) -> None:
    transition, rates = simplex("transition", 3, 3), positive("rates", 3, seed=1)
    z = tensor([1.0, 0.0, 0.0])
    for t, count in enumerate(counts):
        z = pyro.sample(f"z_{t}", dist.OneHotCategorical(z @ transition))
        pyro.sample(f"u_{t}", dist.Poisson(z @ rates), obs=count)


def bits(counts: Tensor) -> None:
    z = pyro.sample("z", dist.Bernoulli(unit("z_probs", 3)).to_event(1))
    pyro.sample("u", dist.Normal(z * real("w", 3, seed=1), 1.0).to_event(1), obs=counts / 3)
    pyro.sample("sum", dist.Poisson(0.5 + z.sum(-1)), obs=counts[0])


def bits_guide(counts: Tensor) -> None:
    pyro.sample("z", dist.Bernoulli(unit("q", 3, seed=2)).to_event(1))


def plated_words(counts: Tensor) -> None:
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Categorical(simplex("z_probs", 2, 3)).to_event(1))
        rates = positive("rates", 3, seed=1)[z].prod(-1)
        pyro.sample("u", dist.Poisson(rates), obs=counts)


def plated_words_guide(counts: Tensor) -> None:
    with pyro.plate("data", 3):
        pyro.sample("z", dist.Categorical(logits=real("q", 3, 2, 3, seed=2)).to_event(1))


LEFT_RIGHT = tensor([[0.6, 0.4, 0.0], [0.0, 0.7, 0.3], [0.0, 0.0, 1.0]])
EMISSION = tensor([[0.5, 0.5, 0.0], [0.0, 0.4, 0.6], [0.3, 0.0, 0.7]])


def left_right_chain(labels: Tensor) -> None:
    z = torch.tensor(0)
    for t, label in enumerate(labels):
        z = categorical(f"z_{t}", LEFT_RIGHT[z] if t else tensor([1.0, 0.0, 0.0]))
        pyro.sample(f"u_{t}", dist.Categorical(EMISSION[z] * simplex("tilt", 3, seed=1)), obs=label)


def left_right_guide(labels: Tensor) -> None:
    first, second = unit("q_first", seed=2), unit("q_second", seed=3)
    zero = torch.zeros(())
    categorical("z_0", tensor([1.0, 0.0, 0.0]))
    z = categorical("z_1", torch.stack([first, 1 - first, zero]))
    stays = torch.stack([zero, second, 1 - second])
    z = categorical("z_2", torch.stack([tensor([0.0, 1.0, 0.0]), stays, stays])[z])
    categorical("z_3", tensor([0.0, 0.0, 1.0]))


def guide_with_mass_on_the_impossible(labels: Tensor) -> None:
    categorical("z_1", simplex("q_1", 3, seed=1))


def zeros_in_logits(counts: Tensor) -> None:
    logits = torch.where(EMISSION > 0, real("logits", 3, 3), -torch.inf)
    a = categorical("a", simplex("a_probs", 3))
    with pyro.plate("data", 3):
        b = pyro.sample("b", dist.Categorical(logits=logits[a]))
        pyro.sample("u", dist.Poisson(positive("rates", 3, seed=1)[b]), obs=counts)


def zeros_in_logits_guide(counts: Tensor) -> None:
    a = categorical("a", tensor([0.4, 0.0, 0.6]))
    with pyro.plate("data", 3) as n:
        categorical("b", torch.where(EMISSION > 0, simplex("q", 3, 3, 3, seed=2), 0.0)[n, a])


def alarm(counts: Tensor) -> None:
    burglar, quake = bernoulli("burglar", unit("burglar_prob")), bernoulli("quake", unit("quake_prob", seed=1))
    rings = bernoulli("rings", (burglar + quake).clamp(max=1.0))
    with pyro.plate("calls", 3):
        pyro.sample("u", dist.Poisson(0.5 + rings * positive("rate", seed=2)), obs=counts)


def alarm_guide(counts: Tensor) -> None:
    quake = bernoulli("quake", unit("q_quake", seed=3))
    bernoulli("burglar", unit("q_burglar", 2, seed=4)[quake.long()])


def alarm_guide_with_the_or(counts: Tensor) -> None:
    quake = bernoulli("quake", unit("q_quake", seed=3))
    burglar = bernoulli("burglar", unit("q_burglar", 2, seed=4)[quake.long()])
    bernoulli("rings", torch.maximum(quake, burglar))


def guide_that_misses_the_or(counts: Tensor) -> None:
    alarm_guide(counts)
    bernoulli("rings", unit("q_rings", seed=5))


def impossible_binomial(counts: Tensor) -> None:
    z = bernoulli("z", unit("z_prob"))
    b = pyro.sample("b", dist.Binomial(2, tensor([0.0, 0.6])[z.long()]))
    pyro.sample("u", dist.Poisson(1 + b), obs=counts[1])


CALLS = (COUNTS,)

SUPPORTS = {
    "mixed": Program(mixed, args=(COUNTS[:2],), pyro_nesting=1, marginals=(("a",), ("b", "a"), ("d",), ("c", "b"))),
    "mixed_guided": Program(mixed, mixed_guide, (COUNTS[:2],)),
    "mixed_globals_guided": Program(mixed, mixed_guide_of_the_globals, (COUNTS[:2],), pyro_nesting=1),
    "one_hot_chain": Program(one_hot_chain, args=CALLS, pyro_nesting=0, marginals=(("z_0", "z_2"),)),
    "bits": Program(bits, args=CALLS, marginals=(("z",),)),
    "bits_guided": Program(bits, bits_guide, CALLS),
    "plated_words": Program(plated_words, args=CALLS, plates=("data",), marginals=(("z",),)),
    "plated_words_guided": Program(plated_words, plated_words_guide, CALLS, plates=("data",)),
    "left_right_chain": Program(left_right_chain, args=(LABELS,), pyro_nesting=0, marginals=(("z_1",), ("z_2", "z_3"))),
    "left_right_chain_guided": Program(left_right_chain, left_right_guide, (LABELS,), pyro_nesting=0),
    "zeros_in_logits": Program(zeros_in_logits, args=CALLS, pyro_nesting=1, marginals=(("a", "b"),)),
    "zeros_in_logits_guided": Program(zeros_in_logits, zeros_in_logits_guide, CALLS),
    "alarm": Program(alarm, args=CALLS, pyro_nesting=1, marginals=(("rings",), ("burglar", "quake"))),
    "alarm_or_summed_out": Program(alarm, alarm_guide, CALLS, pyro_nesting=1),
    "alarm_or_guided": Program(alarm, alarm_guide_with_the_or, CALLS, pyro_nesting=1),
    "impossible_binomial": Program(impossible_binomial, args=CALLS, pyro_nesting=0, marginals=(("z", "b"),)),
}

INFINITE = {
    "mass_on_the_impossible": Program(left_right_chain, guide_with_mass_on_the_impossible, (LABELS,)),
    "or_missed_by_the_guide": Program(alarm, guide_that_misses_the_or, CALLS),
}
"""Programs of infinite free energy: Q puts mass where P is 0."""
