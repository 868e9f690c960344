"""Chains, trees and grids in plain Python loops, with no pyro.markov unless its name says so."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from programs.case import Program, categorical, noise, positive, simplex, tensor

COUNTS = tensor([1.0, 4.0, 2.0, 7.0])
PAIRS = tensor([[0.3, -1.0], [1.2, 0.4], [-0.7, 2.0]])


def chain(counts: Tensor) -> None:
    transition, rates = simplex("transition", 3, 3, seed=1), positive("rates", 3, seed=2)
    z = categorical("z_0", simplex("initial", 3))
    for t, count in enumerate(counts):
        if t:
            z = categorical(f"z_{t}", transition[z])
        pyro.sample(f"u_{t}", dist.Poisson(rates[z]), obs=count)


def chain_with_markov(counts: Tensor) -> None:
    initial, transition, rates = (
        simplex("initial", 3),
        simplex("transition", 3, 3, seed=1),
        positive("rates", 3, seed=2),
    )
    z = torch.tensor(0)
    for t in pyro.markov(range(len(counts))):
        z = categorical(f"z_{t}", transition[z] if t else initial)
        pyro.sample(f"u_{t}", dist.Poisson(rates[z]), obs=counts[t])


def mean_field(counts: Tensor) -> None:
    probs = simplex("q", len(counts), 3, seed=3)
    for t in range(len(counts)):
        categorical(f"z_{t}", probs[t])


def backward_guide(counts: Tensor) -> None:
    last = len(counts) - 1
    transition = simplex("q_transition", 3, 3, seed=5)
    z = categorical(f"z_{last}", simplex("q_last", 3, seed=4))
    for t in reversed(range(last)):
        z = categorical(f"z_{t}", transition[z])


def forward_guide_with_markov(counts: Tensor) -> None:
    first, transition = simplex("q_first", 3, seed=4), simplex("q_transition", len(counts), 3, 3, seed=5)
    z = torch.tensor(0)
    for t in pyro.markov(range(len(counts))):
        z = categorical(f"z_{t}", transition[t, z] if t else first)


def forward_guide(counts: Tensor) -> None:
    transition = simplex("q_transition", len(counts), 3, 3, seed=5)
    z = categorical("z_0", simplex("q_first", 3, seed=4))
    for t in range(1, len(counts)):
        z = categorical(f"z_{t}", transition[t, z])


def guide_of_the_middle(counts: Tensor) -> None:
    z = categorical("z_2", simplex("q_2", 3, seed=6))
    categorical("z_1", simplex("q_1", 3, 3, seed=7)[z])


def second_order_chain(counts: Tensor) -> None:
    transition, rates = simplex("transition", 2, 2, 2, seed=1), positive("rates", 2, seed=2)
    before, last = torch.tensor(0), torch.tensor(1)
    for t in range(6):
        before, last = last, categorical(f"z_{t}", transition[before, last])
        if t < len(counts):
            pyro.sample(f"u_{t}", dist.Poisson(rates[last]), obs=counts[t])


def second_order_guide(counts: Tensor) -> None:
    transition = simplex("q_transition", 2, 2, 2, seed=8)
    after, next_ = torch.tensor(0), torch.tensor(0)
    for t in reversed(range(6)):
        after, next_ = next_, categorical(f"z_{t}", transition[after, next_])


def factorial_chain(pairs: Tensor) -> None:
    slow, fast, means = simplex("slow", 2, 2, seed=1), simplex("fast", 3, 3, seed=2), noise(2, 3, 2, seed=3)
    a, b = torch.tensor(0), torch.tensor(0)
    for t, pair in enumerate(pairs):
        a, b = categorical(f"a_{t}", slow[a]), categorical(f"b_{t}", fast[b])
        pyro.sample(f"u_{t}", dist.Normal(means[a, b], positive("sigma", 2, seed=4)).to_event(1), obs=pair)


def factorial_guide(pairs: Tensor) -> None:
    slow, fast = simplex("q_slow", 3, 2, seed=5), simplex("q_fast", 3, 2, 3, seed=6)
    for t in range(len(pairs)):
        a = categorical(f"a_{t}", slow[t])
        categorical(f"b_{t}", fast[t, a])


def tree(leaves: Tensor) -> None:
    root, edges, means = simplex("root", 2), simplex("edges", 7, 2, 2, seed=1), noise(2, seed=2)
    nodes = [categorical("z_0", root)]
    for child in range(1, 7):
        nodes.append(categorical(f"z_{child}", edges[child, nodes[(child - 1) // 2]]))
    for n, (node, leaf) in enumerate(zip(nodes[3:], leaves, strict=True)):
        pyro.sample(f"u_{n}", dist.Normal(means[node], 1.0), obs=leaf)


def tree_guide_from_the_leaves(leaves: Tensor) -> None:
    leaf, inner = simplex("q_leaf", 4, 2, seed=3), simplex("q_inner", 3, 2, 2, 2, seed=4)
    nodes = {child: categorical(f"z_{child}", leaf[child - 3]) for child in (3, 4, 5, 6)}
    for parent in (2, 1, 0):
        nodes[parent] = categorical(f"z_{parent}", inner[parent, nodes[2 * parent + 1], nodes[2 * parent + 2]])


def collider() -> None:
    a, b = categorical("a", simplex("a_probs", 3)), categorical("b", simplex("b_probs", 2, seed=1))
    c = categorical("c", simplex("c_probs", 3, 2, 4, seed=2)[a, b])
    pyro.sample("u", dist.Normal(noise(4, seed=3)[c], 0.5), obs=tensor(0.4))


def collider_guide() -> None:
    c = categorical("c", simplex("q_c", 4, seed=4))
    b = categorical("b", simplex("q_b", 4, 2, seed=5)[c])
    categorical("a", simplex("q_a", 4, 2, 3, seed=6)[c, b])


def collider_guide_of_the_child() -> None:
    categorical("c", simplex("q_c", 4, seed=4))


LEAVES = tensor([0.2, -1.0, 0.9, 1.7])

CHAINS = {
    "chain": Program(chain, args=(COUNTS,), pyro_nesting=0, marginals=(("z_0",), ("z_1", "z_2"), ("z_3", "z_0"))),
    "chain_mean_field": Program(chain, mean_field, (COUNTS,), pyro_nesting=0),
    "chain_backward_guide": Program(chain, backward_guide, (COUNTS,), pyro_nesting=0),
    "chain_forward_guide": Program(chain, forward_guide, (COUNTS,), pyro_nesting=0),
    "chain_guide_of_the_middle": Program(chain, guide_of_the_middle, (COUNTS,), pyro_nesting=0),
    "chain_markov_in_guide": Program(chain, forward_guide_with_markov, (COUNTS,)),
    "chain_markov_in_model": Program(chain_with_markov, forward_guide, (COUNTS,), pyro_nesting=0),
    "chain_markov_in_model_backward_guide": Program(chain_with_markov, backward_guide, (COUNTS,), pyro_nesting=0),
    "chain_markov_in_both": Program(chain_with_markov, forward_guide_with_markov, (COUNTS,), pyro_nesting=0),
    "second_order_chain": Program(
        second_order_chain, args=(COUNTS,), pyro_nesting=0, marginals=(("z_5", "z_0", "z_2"),)
    ),
    "second_order_chain_guided": Program(second_order_chain, second_order_guide, (COUNTS,), pyro_nesting=0),
    "factorial_chain": Program(factorial_chain, args=(PAIRS,), pyro_nesting=0, marginals=(("a_1", "b_1"),)),
    "factorial_chain_guided": Program(factorial_chain, factorial_guide, (PAIRS,), pyro_nesting=0),
    "tree": Program(tree, args=(LEAVES,), pyro_nesting=0, marginals=(("z_0",), ("z_3", "z_6"))),
    "tree_guide_from_the_leaves": Program(tree, tree_guide_from_the_leaves, (LEAVES,), pyro_nesting=0),
    "collider": Program(collider, pyro_nesting=0, marginals=(("a", "b"), ("b", "c", "a"))),
    "collider_guided_in_reverse": Program(collider, collider_guide, pyro_nesting=0),
    "collider_guide_of_the_child": Program(collider, collider_guide_of_the_child, pyro_nesting=0),
}
