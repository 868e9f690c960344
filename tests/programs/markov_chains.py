"""Chains written as one site, vfe.MarkovChain: in models, in guides, in both; masked, plated, coupled, mixed."""

from functools import partial

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_vfe as vfe
from programs.case import Program, categorical, empty, noise, positive, simplex, tensor

COUNTS = tensor([1.0, 4.0, 2.0, 7.0])
TABLE = tensor([[1.0, 4.0, 2.0], [0.0, 3.0, 5.0]])


def hidden_markov(counts: Tensor) -> None:
    rates = positive("rates", 3, seed=2)
    with pyro.plate("time", len(counts)):
        z = pyro.sample("z", vfe.MarkovChain(simplex("initial", 3), simplex("transition", 3, 3, seed=1)))
        pyro.sample("u", dist.Poisson(rates[z]), obs=counts)


def chain_guide(counts: Tensor) -> None:
    initial, transition = simplex("q_initial", 3, seed=4), simplex("q_transition", 3, 3, seed=5)
    with pyro.plate("time", len(counts)):
        pyro.sample("z", vfe.MarkovChain(initial, transition))


def changing_chain_guide(counts: Tensor) -> None:
    initial, transition = simplex("q_initial", 3, seed=4), simplex("q_steps", len(counts) - 1, 3, 3, seed=6)
    with pyro.plate("time", len(counts)):
        pyro.sample("z", vfe.MarkovChain(initial, transition))


def mean_field(counts: Tensor) -> None:
    probs = simplex("q", len(counts), 3, seed=3)
    with pyro.plate("time", len(counts)):
        categorical("z", probs)


def changing_transitions(counts: Tensor) -> None:
    rates, transition = positive("rates", 2, seed=2), simplex("transition", len(counts) - 1, 2, 2, seed=1)
    with pyro.plate("time", len(counts)):
        z = pyro.sample("z", vfe.MarkovChain(simplex("initial", 2), transition))
        pyro.sample("u", dist.Poisson(rates[z]), obs=counts)


def left_to_right(counts: Tensor) -> None:
    upper = torch.ones(3, 3, dtype=torch.float64).triu()
    weights = simplex("transition", 3, 3, seed=1) * upper
    initial = tensor([1.0, 0.0, 0.0])
    rates = positive("rates", 3, seed=2)
    with pyro.plate("time", len(counts)):
        z = pyro.sample("z", vfe.MarkovChain(initial, weights / weights.sum(-1, keepdim=True)))
        pyro.sample("u", dist.Poisson(rates[z]), obs=counts)


def sequences(table: Tensor, own_transitions: bool = False, mask: Tensor | None = None) -> None:
    rates = positive("rates", 2, seed=2)
    transition = simplex("transition", 2, 1, 2, 2, seed=1) if own_transitions else simplex("transition", 2, 2, seed=1)
    with pyro.plate("sequences", len(table), dim=-2), pyro.plate("time", table.shape[-1], dim=-1):
        z = pyro.sample("z", vfe.MarkovChain(simplex("initial", 2), transition))
        with pyro.poutine.mask(mask=True if mask is None else mask):
            pyro.sample("u", dist.Poisson(rates[z]), obs=table)


def sequences_guide(table: Tensor) -> None:
    initial, transition = simplex("q_initial", 2, 2, seed=4), simplex("q_transition", 2, 2, 2, 2, seed=5)
    with pyro.plate("sequences", len(table), dim=-2), pyro.plate("time", table.shape[-1], dim=-1):
        pyro.sample("z", vfe.MarkovChain(initial, transition))


LENGTHS = torch.tensor([[True, True, True], [True, True, False]])


def lengths(table: Tensor) -> None:
    rates = positive("rates", 2, seed=2)
    with (
        pyro.plate("sequences", len(table), dim=-2),
        pyro.plate("time", table.shape[-1], dim=-1),
        pyro.poutine.mask(mask=LENGTHS),
    ):
        z = pyro.sample("z", vfe.MarkovChain(simplex("initial", 2), simplex("transition", 2, 2, seed=1)))
        pyro.sample("u", dist.Poisson(rates[z]), obs=table)


def lengths_guide(table: Tensor) -> None:
    with pyro.poutine.mask(mask=LENGTHS):
        sequences_guide(table)


def subsampled_sequences(table: Tensor) -> None:
    rates = positive("rates", 2, seed=2)
    kept = torch.tensor([1])
    with pyro.plate("sequences", len(table), dim=-2, subsample=kept), pyro.plate("time", table.shape[-1], dim=-1):
        z = pyro.sample("z", vfe.MarkovChain(simplex("initial", 2), simplex("transition", 2, 2, seed=1)))
        pyro.sample("u", dist.Poisson(rates[z]), obs=table[kept])


def classes(table: Tensor) -> None:
    rates, transition = positive("rates", 2, seed=2), simplex("transition", 2, 2, 2, seed=1)
    with pyro.plate("sequences", len(table), dim=-2):
        c = categorical("c", simplex("classes", 2, seed=7))
        with pyro.plate("time", table.shape[-1], dim=-1):
            z = pyro.sample("z", vfe.MarkovChain(simplex("initial", 2, 2)[c].squeeze(-2), transition[c]))
            pyro.sample("u", dist.Poisson(rates[z]), obs=table)


def classes_guide(table: Tensor) -> None:
    initial, transition = simplex("q_initial", 2, 2, seed=4), simplex("q_transition", 2, 2, 2, seed=5)
    with pyro.plate("sequences", len(table), dim=-2):
        c = categorical("c", simplex("q_c", 2, 1, 2, seed=8))
        with pyro.plate("time", table.shape[-1], dim=-1):
            pyro.sample("z", vfe.MarkovChain(initial[c].squeeze(-2), transition[c]))


def classes_of_beginnings(table: Tensor, of_transitions: bool = False) -> None:
    rates, initial, steps = (
        positive("rates", 2, seed=2),
        simplex("initial", 2, 2),
        simplex("transition", 2, 2, 2, seed=1),
    )
    with pyro.plate("sequences", len(table), dim=-2):
        c = categorical("c", simplex("classes", 2, seed=7))
        first, transition = (initial[0], steps[c]) if of_transitions else (initial[c].squeeze(-2), steps[0])
        with pyro.plate("time", table.shape[-1], dim=-1):
            z = pyro.sample("z", vfe.MarkovChain(first, transition))
            pyro.sample("u", dist.Poisson(rates[z]), obs=table)


def classes_of_beginnings_guide(table: Tensor, of_transitions: bool = False) -> None:
    initial, steps = simplex("q_initial", 2, 2, seed=4), simplex("q_transition", 2, 2, 2, seed=5)
    with pyro.plate("sequences", len(table), dim=-2):
        c = categorical("c", simplex("q_c", 2, 1, 2, seed=8))
        first, transition = (initial[0], steps[c]) if of_transitions else (initial[c].squeeze(-2), steps[0])
        with pyro.plate("time", table.shape[-1], dim=-1):
            pyro.sample("z", vfe.MarkovChain(first, transition))


def guide_of_classes(table: Tensor) -> None:
    with pyro.plate("sequences", len(table), dim=-2):
        categorical("c", simplex("q_c", 2, 1, 2, seed=8))


def factorial(counts: Tensor) -> None:
    rates = positive("rates", 2, 3, seed=2)
    with pyro.plate("time", len(counts)):
        a = pyro.sample("a", vfe.MarkovChain(simplex("a_0", 2), simplex("a_step", 2, 2, seed=1)))
        b = pyro.sample("b", vfe.MarkovChain(simplex("b_0", 3, seed=3), simplex("b_step", 3, 3, seed=4)))
        pyro.sample("u", dist.Poisson(rates[a, b]), obs=counts)


def factorial_guide(counts: Tensor) -> None:
    with pyro.plate("time", len(counts)):
        pyro.sample("a", vfe.MarkovChain(simplex("q_a", 2, seed=5), simplex("q_a_step", 2, 2, seed=6)))
        pyro.sample("b", vfe.MarkovChain(simplex("q_b", 3, seed=7), simplex("q_b_step", 3, 3, seed=8)))


def half_mean_field(counts: Tensor) -> None:
    with pyro.plate("time", len(counts)):
        a = pyro.sample("a", vfe.MarkovChain(simplex("q_a", 2, seed=5), simplex("q_a_step", 2, 2, seed=6)))
        categorical("b", simplex("q_b", 2, 3, seed=7)[a])


def chain_on_chain(counts: Tensor) -> None:
    steps, rates = len(counts), positive("rates", 2, seed=2)
    with pyro.plate("time", steps):
        a = pyro.sample("a", vfe.MarkovChain(simplex("a_0", 2), simplex("a_step", 2, 2, seed=1)))
        transition = simplex("b_step", 2, 2, 2, seed=4)[a]
        b = pyro.sample("b", vfe.MarkovChain(simplex("b_0", 2, seed=3), transition, num_steps=steps))
        pyro.sample("u", dist.Poisson(rates[b]), obs=counts)


def chain_on_chain_guide(counts: Tensor) -> None:
    steps = len(counts)
    with pyro.plate("time", steps):
        a = pyro.sample("a", vfe.MarkovChain(simplex("q_a", 2, seed=5), simplex("q_a_step", 2, 2, seed=6)))
        transition = simplex("q_b_step", 2, 2, 2, seed=7)[a]
        pyro.sample("b", vfe.MarkovChain(simplex("q_b", 2, seed=8), transition, num_steps=steps))


def coupled_mean_field(counts: Tensor) -> None:
    with pyro.plate("time", len(counts)):
        a = categorical("a", simplex("q_a", len(counts), 2, seed=5))
        categorical("b", simplex("q_b", 2, 2, seed=6)[a])


def independent_chains_guide(counts: Tensor) -> None:
    with pyro.plate("time", len(counts)):
        pyro.sample("b", vfe.MarkovChain(simplex("q_b", 2, seed=5), simplex("q_b_step", 2, 2, seed=6)))
        pyro.sample("a", vfe.MarkovChain(simplex("q_a", 2, seed=7), simplex("q_a_step", 3, 2, 2, seed=8)))


def independent_mean_field(counts: Tensor) -> None:
    with pyro.plate("time", len(counts)):
        categorical("a", simplex("q_a", len(counts), 2, seed=5))
        categorical("b", simplex("q_b", len(counts), 2, seed=6))


def mixture_emissions(counts: Tensor) -> None:
    rates, weights = positive("rates", 2, 2, seed=2), simplex("weights", 2, 2, seed=3)
    with pyro.plate("time", len(counts)):
        z = pyro.sample("z", vfe.MarkovChain(simplex("initial", 2), simplex("transition", 2, 2, seed=1)))
        w = categorical("w", weights[z])
        pyro.sample("u", dist.Poisson(rates[z, w]), obs=counts)


def guide_of_the_chain(counts: Tensor) -> None:
    with pyro.plate("time", len(counts)):
        pyro.sample("z", vfe.MarkovChain(simplex("q_initial", 2, seed=4), simplex("q_transition", 2, 2, seed=5)))


def guide_of_everything(counts: Tensor) -> None:
    with pyro.plate("time", len(counts)):
        z = pyro.sample("z", vfe.MarkovChain(simplex("q_initial", 2, seed=4), simplex("q_transition", 2, 2, seed=5)))
        categorical("w", simplex("q_w", len(counts), 2, 2, seed=6)[torch.arange(len(counts)), z])


def transitions_by_step(counts: Tensor) -> None:
    steps, rates = len(counts), positive("rates", 2, seed=2)
    with pyro.plate("time", steps):
        w = categorical("w", simplex("weights", 3, seed=3))
        z = pyro.sample("z", vfe.MarkovChain(simplex("initial", 2), simplex("steps", 3, 2, 2)[w], num_steps=steps))
        pyro.sample("u", dist.Poisson(rates[z] + w), obs=counts)


def two_chains(counts: Tensor) -> None:
    rates = positive("rates", 2, 2, seed=2)
    with pyro.plate("time", len(counts)):
        a = pyro.sample("a", vfe.MarkovChain(simplex("a_0", 2), simplex("a_step", 2, 2, seed=1)))
        w = categorical("w", simplex("weights", 2, seed=3))
        b = pyro.sample("b", vfe.MarkovChain(simplex("b_0", 2, seed=4), simplex("b_step", 2, 2, seed=5)))
        pyro.sample("u", dist.Poisson(rates[a, b] + w), obs=counts)


def guide_of_a_chain_by_way_of_a_latent(counts: Tensor, is_chain: bool = True) -> None:
    with pyro.plate("time", len(counts)):
        a = pyro.sample("a", vfe.MarkovChain(simplex("q_a", 2, seed=6), simplex("q_a_step", 2, 2, seed=7)))
        w = categorical("w", simplex("q_w", 2, 2, seed=8)[a])
        if is_chain:
            steps = simplex("q_b_step", 2, 2, 2, seed=9)[w]
            pyro.sample("b", vfe.MarkovChain(simplex("q_b", 2, seed=10), steps, num_steps=len(counts)))
        else:
            categorical("b", simplex("q_b", 2, 2, seed=10)[w])


def wide_emissions(table: Tensor) -> None:
    rates = positive("rates", 2, 2, seed=2)
    with pyro.plate("time", table.shape[-1], dim=-1):
        z = pyro.sample("z", vfe.MarkovChain(simplex("initial", 2), simplex("transition", 2, 2, seed=1)))
        with pyro.plate("channels", len(table), dim=-2):
            channel = torch.arange(len(table))[:, None]
            pyro.sample("u", dist.Poisson(rates[channel, z]), obs=table)
        pyro.sample("x", dist.Normal(noise(2, 2, seed=5)[z], 1.0).to_event(1), obs=noise(table.shape[-1], 2, seed=6))


MARKOV_CHAINS: dict[str, Program] = {
    "markov_chain": Program(hidden_markov, args=(COUNTS,), marginals=(("z",),)),
    "markov_chain_of_one_step": Program(hidden_markov, chain_guide, args=(COUNTS[:1],)),
    "markov_chain_with_chain_guide": Program(hidden_markov, chain_guide, args=(COUNTS,)),
    "markov_chain_with_changing_chain_guide": Program(hidden_markov, changing_chain_guide, args=(COUNTS,)),
    "markov_chain_with_mean_field": Program(hidden_markov, mean_field, args=(COUNTS,)),
    "markov_chain_with_changing_transitions": Program(changing_transitions, args=(COUNTS,), marginals=(("z",),)),
    "left_to_right_markov_chain": Program(left_to_right, args=(COUNTS,), marginals=(("z",),)),
    "markov_chains": Program(sequences, args=(TABLE,), plates=("sequences",), marginals=(("z",),)),
    "markov_chains_with_their_own_transitions": Program(partial(sequences, own_transitions=True), args=(TABLE,)),
    "markov_chains_with_missing_steps": Program(
        partial(sequences, mask=torch.tensor([[True, False, True], [False, True, True]])), args=(TABLE,)
    ),
    "markov_chains_with_chain_guides": Program(sequences, sequences_guide, args=(TABLE,), plates=("sequences",)),
    "markov_chains_of_different_lengths": Program(lengths, args=(TABLE,), plates=("sequences",)),
    "markov_chains_of_different_lengths_with_guide": Program(lengths, lengths_guide, args=(TABLE,)),
    "subsampled_markov_chains": Program(subsampled_sequences, args=(TABLE,), scaled_plate="sequences"),
    "markov_chains_by_class": Program(classes, args=(TABLE,), plates=("sequences",), marginals=(("c",), ("z", "c"))),
    "markov_chains_by_class_with_guide": Program(classes, classes_guide, args=(TABLE,), plates=("sequences",)),
    "markov_chains_by_class_with_guide_of_classes": Program(classes, guide_of_classes, args=(TABLE,)),
    **{
        f"markov_chains_by_class_of_{what}_{whose}": Program(
            partial(classes_of_beginnings, of_transitions=of_transitions), guide, args=(TABLE,), plates=("sequences",)
        )
        for what, of_transitions in (("beginning", False), ("transition", True))
        for whose, guide in (
            ("alone", empty),
            ("with_guide", partial(classes_of_beginnings_guide, of_transitions=of_transitions)),
        )
    },
    "factorial_markov_chain": Program(factorial, args=(COUNTS[:3],), marginals=(("a",), ("a", "b"))),
    "factorial_markov_chain_with_guide": Program(factorial, factorial_guide, args=(COUNTS[:3],)),
    "factorial_markov_chain_with_half_mean_field": Program(factorial, half_mean_field, args=(COUNTS[:3],)),
    "chain_on_chain": Program(chain_on_chain, args=(COUNTS,), marginals=(("a",), ("b",))),
    "chain_on_chain_with_guide": Program(chain_on_chain, chain_on_chain_guide, args=(COUNTS,)),
    "chain_on_chain_with_independent_chains": Program(chain_on_chain, independent_chains_guide, args=(COUNTS,)),
    "chain_on_chain_with_mean_field": Program(chain_on_chain, independent_mean_field, args=(COUNTS,)),
    "chain_on_chain_with_coupled_mean_field": Program(chain_on_chain, coupled_mean_field, args=(COUNTS,)),
    "markov_chain_with_mixture_emissions": Program(mixture_emissions, args=(COUNTS,), marginals=(("w",), ("z", "w"))),
    "markov_chain_with_mixture_emissions_and_chain_guide": Program(
        mixture_emissions, guide_of_the_chain, args=(COUNTS[:3],)
    ),
    "markov_chain_with_mixture_emissions_and_guide": Program(
        mixture_emissions, guide_of_everything, args=(COUNTS[:3],)
    ),
    "markov_chain_with_transitions_by_step": Program(transitions_by_step, args=(COUNTS,), marginals=(("z",), ("w",))),
    "markov_chain_with_transitions_by_step_and_guide_of_the_chain": Program(
        transitions_by_step, guide_of_the_chain, args=(COUNTS,)
    ),
    **{
        f"two_markov_chains_and_{what}_by_way_of_a_latent_in_the_guide": Program(
            two_chains, partial(guide_of_a_chain_by_way_of_a_latent, is_chain=is_chain), args=(COUNTS[:3],)
        )
        for what, is_chain in (("a_chain", True), ("a_mean_field", False))
    },
    "markov_chain_with_wide_emissions": Program(wide_emissions, args=(TABLE,), marginals=(("z",),)),
}
