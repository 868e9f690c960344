"""MarkovChain against all of its paths, listed by brute force, and against a Python loop of Categoricals."""

import copy
import pickle
from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer import TraceEnum_ELBO
from torch import Tensor
from torch.distributions import kl_divergence

import pyro_vfe as vfe
from pyro_vfe.errors import ProbabilityError, ShapeError, VFEError
from pyro_vfe.program import walks
from pyro_vfe.program.markov_chain import MarkovChain

close = torch.testing.assert_close
INF = float("inf")


def simplex(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).add(0.05)


def with_zeros(probs: Tensor, seed: int = 0) -> Tensor:
    """Returns probabilities of which about a third are exactly zero, the last of a row never."""
    dead = torch.rand(probs.shape, generator=torch.Generator().manual_seed(seed)) < 0.35
    return probs.masked_fill(dead & (torch.arange(probs.shape[-1]) < probs.shape[-1] - 1), 0.0)


def left_right() -> MarkovChain:
    return MarkovChain(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.3, 0.7], [0.0, 0.0, 1.0]]))


CHAINS: dict[str, Callable[[], MarkovChain]] = {
    "homogeneous": lambda: MarkovChain(simplex(3), simplex(3, 3), num_steps=4),
    "expanded": lambda: MarkovChain(simplex(3), simplex(3, 3)).expand((4,)),
    "expanded_over_a_batch": lambda: MarkovChain(simplex(3), simplex(3, 3)).expand((2, 4)),
    "time_varying": lambda: MarkovChain(simplex(3), simplex(3, 3, 3)),
    "leading_into_each_step": lambda: MarkovChain(simplex(3), simplex(4, 3, 3), num_steps=4),
    "one_entry": lambda: MarkovChain(simplex(3), simplex(1, 3, 3), num_steps=2),
    "batch": lambda: MarkovChain(simplex(2, 3), simplex(2, 3, 3, 3)),
    "batch_of_initials": lambda: MarkovChain(simplex(2, 3), simplex(3, 3), num_steps=3),
    "batch_of_homogeneous": lambda: MarkovChain(simplex(3), simplex(2, 1, 3, 3), num_steps=3),
    "crossing_batches": lambda: MarkovChain(simplex(2, 1, 2), simplex(3, 2, 2, 2)),
    "repeated_by_expand": lambda: MarkovChain(simplex(3).expand(2, 3), simplex(3, 3).expand(2, 3, 3, 3)),
    "one_step": lambda: MarkovChain(simplex(3), simplex(3, 3)),
    "one_step_of_a_batch": lambda: MarkovChain(simplex(2, 3), simplex(3, 3), num_steps=1),
    "no_transition": lambda: MarkovChain(simplex(3), simplex(0, 3, 3)),
    "one_state": lambda: MarkovChain(simplex(1), simplex(1, 1), num_steps=3),
    "zeros": lambda: MarkovChain(with_zeros(simplex(2, 3)), with_zeros(simplex(2, 3, 3, 3))),
    "left_right": lambda: left_right().expand((5,)),
    "cycle": lambda: MarkovChain(torch.tensor([1.0, 0.0]), torch.eye(2).flip(0), num_steps=4),
}

OTHERS: dict[str, Callable[[], MarkovChain]] = {
    "homogeneous": lambda: MarkovChain(simplex(3, seed=1), simplex(3, 3, seed=1)),
    "time_varying": lambda: MarkovChain(simplex(3, seed=1), simplex(3, 3, 3, seed=1)),
    "batch": lambda: MarkovChain(simplex(2, 3, seed=1), simplex(2, 3, 3, 3, seed=1)),
    "zeros": lambda: MarkovChain(with_zeros(simplex(3, seed=1), 1), with_zeros(simplex(3, 3, seed=1), 1)),
    "left_right": left_right,
}


class Paths:
    """All paths of each chain of a batch with their probabilities, from the tables in plain Python."""

    def __init__(self, chain: MarkovChain) -> None:
        K, (*batch, T) = chain.num_states, chain.batch_shape
        self.values = torch.tensor(list(product(range(K), repeat=T)))
        initial = chain.initial.expand(*batch, K)
        steps = chain.transition if chain.transition.dim() > 2 else chain.transition[None]
        steps = steps.expand(*batch, T - 1, K, K)
        self.terms = torch.ones(len(self.values), *batch, T)
        for n, path in enumerate(self.values.tolist()):
            self.terms[n, ..., 0] = initial[..., path[0]]
            for t in range(1, T):
                self.terms[n, ..., t] = steps[..., t - 1, path[t - 1], path[t]]
        self.probs = self.terms.prod(-1)

    def expectation(self, values: Tensor) -> Tensor:
        """Returns the expected value, per step, of `(paths, *batch, T)`; what has probability zero counts nothing."""
        return (self.probs[..., None] * values).where(self.probs[..., None] > 0, 0.0).sum(0)

    def repeated(self) -> Tensor:
        """Returns the paths as values, `(paths, *batch, T)`."""
        n, T = self.values.shape
        return self.values.reshape(n, *(1,) * (self.probs.dim() - 1), T).expand(self.terms.shape)


@pytest.fixture(params=CHAINS, ids=str)
def chain(request: pytest.FixtureRequest) -> MarkovChain:
    return CHAINS[request.param]()


def test_paths_have_probabilities_that_sum_to_one(chain: MarkovChain) -> None:
    close(Paths(chain).probs.sum(0), torch.ones(chain.batch_shape[:-1]))


def test_log_prob_is_that_of_each_step(chain: MarkovChain) -> None:
    paths = Paths(chain)
    log_prob = chain.log_prob(paths.repeated())
    assert log_prob.shape == paths.terms.shape
    close(log_prob, paths.terms.log())
    assert torch.equal(log_prob == -INF, paths.terms == 0)


def test_entropy_sums_to_that_of_all_paths(chain: MarkovChain) -> None:
    paths = Paths(chain)
    entropy = chain.entropy()
    assert entropy.shape == chain.batch_shape
    close(entropy, paths.expectation(-paths.terms.log()))
    close(entropy.sum(-1), -torch.xlogy(paths.probs, paths.probs).sum(0))


def test_marginals_are_sums_over_all_paths(chain: MarkovChain) -> None:
    paths = Paths(chain)
    marginals = chain.marginals()
    assert marginals.shape == (*chain.batch_shape, chain.num_states)
    for k in range(chain.num_states):
        close(marginals[..., k], paths.expectation((paths.repeated() == k).double()))


def test_mode_is_a_most_probable_path(chain: MarkovChain) -> None:
    mode = chain.mode
    assert mode.shape == chain.batch_shape
    assert mode.dtype == torch.int64
    close(chain.log_prob(mode).sum(-1), Paths(chain).probs.amax(0).log())


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", ["expanded", "time_varying", "leading_into_each_step", "batch", "zeros"])
def test_kl_sums_to_that_of_all_paths(name: str, other: str) -> None:
    p, q = CHAINS[name](), OTHERS[other]()
    kl = kl_divergence(p, q)
    shape = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    assert kl.shape == shape
    paths = Paths(p.expand(shape))
    log_ratio = paths.terms.log() - Paths(q.expand(shape)).terms.log()
    close(kl, paths.expectation(log_ratio))
    close(kl.sum(-1), paths.expectation(log_ratio.sum(-1, keepdim=True)).squeeze(-1))


def test_kl_to_itself_is_zero(chain: MarkovChain) -> None:
    close(kl_divergence(chain, chain), torch.zeros(chain.batch_shape))


def test_kl_is_infinite_only_where_the_other_chain_cannot_follow_a_possible_move() -> None:
    first, q = torch.tensor([1.0, 0.0, 0.0]), left_right().expand((4,))
    moves = torch.eye(3).repeat(3, 1, 1)
    moves[1, 2] = first  # back to state 0, which q cannot do, from a state where the chain never is
    p = MarkovChain(first, moves)
    close(kl_divergence(p, q), -q.log_prob(torch.zeros(4)))
    moves[0, 0] = torch.tensor([0.5, 0.0, 0.5])  # now it may be there, and q cannot go there either
    assert kl_divergence(MarkovChain(first, moves), q).isinf().tolist() == [False, True, True, False]


def test_kl_is_infinite_although_the_probability_of_the_impossible_step_underflows() -> None:
    tiny = torch.tensor([[1.0, 1e-30, 0.0], [0.0, 1.0, 1e-30], [1e-30, 0.0, 1.0]], dtype=torch.float32)
    p = MarkovChain(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float32), tiny, num_steps=4)
    assert p.marginals()[2, 2] == 0
    q = tiny.clone()
    q[2] = torch.tensor([0.0, 0.0, 1.0])
    assert kl_divergence(p, MarkovChain(p.initial, q)).isinf().tolist() == [False, False, False, True]


def test_states_are_drawn_with_their_probabilities(chain: MarkovChain) -> None:
    paths, draws = Paths(chain), chain.sample((20_000,))
    assert draws.shape == (20_000, *chain.batch_shape)
    assert draws.dtype == torch.int64
    index = (draws[:, None] == paths.repeated()[None]).all(-1) if paths.repeated().shape[0] <= 81 else None
    for k in range(chain.num_states):
        frequency = (draws == k).double().mean(0)
        close(frequency, chain.marginals()[..., k], rtol=0, atol=0.02)
        for j in range(chain.num_states):
            both = lambda z, k=k, j=j: ((z[..., :-1] == k) & (z[..., 1:] == j)).double()  # noqa: E731
            expected = (paths.probs[..., None] * both(paths.repeated())).sum(0)
            close(both(draws).mean(0), expected, rtol=0, atol=0.02)
    if index is not None:
        close(index.double().mean(0), paths.probs, rtol=0, atol=0.02)


def test_what_is_impossible_is_never_drawn(chain: MarkovChain) -> None:
    assert chain.log_prob(chain.sample((5_000,))).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rounding_of_a_row_draws_no_state_beyond_the_last_possible_one(dtype: torch.dtype) -> None:
    probs = torch.cat([torch.full((999,), 1e-3), torch.tensor([1e-3, 0.0, 0.0])]).to(dtype)
    draws = MarkovChain(probs, probs.expand(1002, 1002)).expand((200,)).sample((2_000,))
    assert draws.min() >= 0
    assert draws.max() <= 999


WALKS = {"same": (1, 1), "varying": (50, 1), "same_of_each": (1, 3), "varying_of_each": (50, 3)}


@pytest.mark.parametrize("sizes", WALKS.values(), ids=WALKS)
@pytest.mark.parametrize("block", [7 * 3 * 16, 2**22])
def test_composed_maps_draw_the_path_that_single_steps_draw(
    sizes: tuple[int, int], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    conditionals, start = with_zeros(simplex(*sizes, 4, 4)), torch.tensor([0, 3, 1])
    conditionals /= conditionals.sum(-1, keepdim=True)
    rows, levels = torch.arange(3) % sizes[1], torch.rand(50, 3)
    expected, state = [], start.tolist()
    for t in range(50):
        for m in range(3):
            shares = conditionals[t % sizes[0], rows[m], state[m]].cumsum(-1)
            state[m] = next((k for k in range(4) if levels[t, m] < shares[k]), 3)
        expected.append(list(state))
    monkeypatch.setattr(walks, "BLOCK", block)
    assert walks.walk(start, conditionals, rows, levels).tolist() == expected
    monkeypatch.setattr(walks, "WIDE", 0)
    assert walks.walk(start, conditionals, rows, levels).tolist() == expected


def test_a_chain_equals_a_loop_of_categoricals() -> None:
    initial, transition, locs = simplex(2, 3), simplex(2, 4, 3, 3), torch.tensor([-1.0, 0.0, 2.0])
    data = torch.randn(2, 5)

    def chained() -> Tensor:
        with pyro.plate("sequences", 2, dim=-2), pyro.plate("time", 5, dim=-1):
            z = pyro.sample("z", MarkovChain(initial, transition))
            pyro.sample("x", dist.Normal(locs[z], 1.0), obs=data)
        return z

    def looped() -> None:
        with pyro.plate("sequences", 2):
            probs = initial
            for t in range(5):
                z = pyro.sample(f"z_{t}", dist.Categorical(probs))
                pyro.sample(f"x_{t}", dist.Normal(locs[z], 1.0), obs=data[:, t])
                probs = transition[torch.arange(2), min(t, 3), z]

    trace = pyro.poutine.trace(chained).get_trace()
    z = trace.nodes["z"]["value"]
    loop = pyro.poutine.trace(pyro.poutine.condition(looped, {f"z_{t}": z[:, t] for t in range(5)})).get_trace()
    trace.compute_log_prob()
    loop.compute_log_prob()
    assert z.shape == (2, 5)
    assert trace.nodes["z"]["log_prob"].shape == (2, 5)
    close(trace.nodes["z"]["log_prob"], torch.stack([loop.nodes[f"z_{t}"]["log_prob"] for t in range(5)], -1))
    close(trace.log_prob_sum(), loop.log_prob_sum())


def test_a_plate_gives_the_chain_its_length_and_repeats_no_table() -> None:
    def model() -> None:
        with pyro.plate("sequences", 1000, dim=-2), pyro.plate("time", 50, dim=-1):
            pyro.sample("z", MarkovChain(simplex(3), simplex(3, 3)))

    fn = pyro.poutine.trace(model).get_trace().nodes["z"]["fn"]
    assert fn.batch_shape == (1000, 50)
    assert (fn.num_steps, fn.num_states) == (50, 3)
    assert fn.initial.shape == fn.log_initial().shape == (3,)
    assert fn.transition.shape == (3, 3)
    assert fn.log_transition().shape == (1, 3, 3)


def test_a_mask_drops_steps_and_missing_sequences() -> None:
    mask = torch.tensor([[True, True, False], [False, False, False]])
    value = torch.tensor([[0, 1, 1], [2, 0, 1]])

    def model() -> None:
        with pyro.plate("sequences", 2, dim=-2), pyro.plate("time", 3, dim=-1), pyro.poutine.mask(mask=mask):
            pyro.sample("z", MarkovChain(simplex(3), simplex(3, 3)), obs=value)

    chain = MarkovChain(simplex(3), simplex(3, 3))
    expected = chain.log_prob(value).where(mask, 0.0)
    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    close(trace.nodes["z"]["log_prob"], expected)
    close(chain.mask(mask).log_prob(value), expected)


def test_time_as_event_sums_the_steps() -> None:
    p, q = CHAINS["batch"](), OTHERS["batch"]()
    path, z = p.to_event(1), p.sample((6,))
    assert path.batch_shape == (2,)
    assert path.event_shape == (4,)
    close(path.log_prob(z), p.log_prob(z).sum(-1))
    close(path.entropy(), p.entropy().sum(-1))
    close(kl_divergence(path, q.to_event(1)), kl_divergence(p, q).sum(-1))
    assert path.expand((5, 2)).sample().shape == (5, 2, 4)


def test_a_guide_takes_its_tables_from_a_network() -> None:
    torch.manual_seed(0)
    network = torch.nn.Linear(2, 3 + 4 * 9)
    inputs = torch.randn(7, 2)

    def guide() -> Tensor:
        numbers = network(inputs).unflatten(-1, (-1, 3)).softmax(-1)
        with pyro.plate("sequences", 7, dim=-2), pyro.plate("time", 5, dim=-1):
            return pyro.sample("z", MarkovChain(numbers[:, 0], numbers[:, 1:].unflatten(-2, (4, 3))))

    trace = pyro.poutine.trace(guide).get_trace()
    trace.log_prob_sum().backward()
    assert trace.nodes["z"]["value"].shape == (7, 5)
    assert network.weight.grad.isfinite().all()
    assert (network.weight.grad != 0).any()


def test_a_chain_may_lead_another_chain() -> None:
    weather = MarkovChain(simplex(2), simplex(2, 2), num_steps=5)
    moods = simplex(2, 3, 3)
    x = weather.sample((4,))
    z = MarkovChain(simplex(3), moods[x], num_steps=5)
    assert z.batch_shape == (4, 5)
    value = z.sample()
    rows = dist.Categorical(moods[x[:, 1:], value[:, :-1]]).log_prob(value[:, 1:])
    close(z.log_prob(value)[:, 1:], rows)


def test_a_latent_may_choose_the_tables_of_an_observed_chain() -> None:
    weights, initial, transition, other = simplex(2), simplex(2, 3), simplex(2, 3, 3), OTHERS["homogeneous"]()
    value = MarkovChain(initial[0], transition[0], num_steps=6).expand((4, 6)).sample()

    def model() -> None:
        with pyro.plate("sequences", 4, dim=-2):
            z = pyro.sample("z", dist.Categorical(weights))
            with pyro.plate("time", 6, dim=-1):
                chain = MarkovChain(initial[z.reshape(z.shape[:-1])], transition[z], num_steps=6)
                pyro.sample("x", chain, obs=value)
                pyro.factor("f", chain.entropy() - kl_divergence(chain, other))

    chains = [MarkovChain(initial[k], transition[k], num_steps=6) for k in range(2)]
    factors = [chain.entropy() - kl_divergence(chain, other) for chain in chains]
    terms = [(chain.log_prob(value) + factor).sum(-1) for chain, factor in zip(chains, factors, strict=True)]
    log_joint = dist.Categorical(weights).logits + torch.stack(terms, -1)
    close(vfe.posterior(model).log_evidence, log_joint.logsumexp(-1).sum())
    close(vfe.posterior(model).marginal("z").reshape(4, 2), log_joint.softmax(-1))


def test_the_entry_that_leads_into_the_first_step_is_not_read() -> None:
    transition = simplex(4, 3, 3).index_fill(0, torch.tensor(0), 0.0).requires_grad_()
    chain = MarkovChain(simplex(3), transition, num_steps=4)
    close(chain.transition, MarkovChain(simplex(3), transition[1:]).transition)
    chain.log_prob(torch.tensor([0, 1, 2, 0])).sum().backward()
    assert transition.grad.isfinite().all()


TABLES = {"homogeneous": (3, 3), "time_varying": (3, 3, 3), "batch": (2, 1, 3, 3)}


@pytest.mark.parametrize("shape", TABLES.values(), ids=TABLES)
def test_gradients_are_right(shape: tuple[int, ...]) -> None:
    value = torch.tensor([[0, 2, 2, 1], [1, 1, 0, 0]])
    tables = [t.requires_grad_() for t in (simplex(3), simplex(*shape), simplex(3, seed=1), simplex(*shape, seed=1))]

    def chain(initial: Tensor, transition: Tensor) -> MarkovChain:
        return MarkovChain(initial, transition, num_steps=4)

    assert torch.autograd.gradcheck(lambda i, t: chain(i, t).log_prob(value), tables[:2])
    assert torch.autograd.gradcheck(lambda i, t: chain(i, t).entropy(), tables[:2])
    assert torch.autograd.gradcheck(lambda i, t: chain(i, t).marginals(), tables[:2])
    assert torch.autograd.gradcheck(lambda i, t, j, s: kl_divergence(chain(i, t), chain(j, s)), tables)


def test_gradients_at_exact_zeros_are_finite() -> None:
    initial, transition = with_zeros(simplex(3)).requires_grad_(), with_zeros(simplex(4, 3, 3)).requires_grad_()
    q = OTHERS["left_right"]()
    paths = Paths(MarkovChain(initial.detach(), transition.detach())).values
    for result in (
        lambda p: p.log_prob(paths),
        lambda p: p.entropy(),
        lambda p: kl_divergence(p, q),
        lambda p: kl_divergence(q, p),
    ):
        initial.grad = transition.grad = None
        result(MarkovChain(initial, transition)).sum().backward()
        assert initial.grad.isfinite().all()
        assert transition.grad.isfinite().all()


def test_the_gradient_of_log_prob_counts_transitions() -> None:
    transition = (simplex(3, 3) / simplex(3, 3).sum(-1, keepdim=True)).requires_grad_()
    chain = MarkovChain(simplex(3), transition)
    z = chain.expand((6, 5)).sample()
    counts = torch.zeros(3, 3)
    for path in z.tolist():
        for i, j in pairwise(path):
            counts[i, j] += 1
    chain.log_prob(z).sum().backward()
    close(transition.grad, counts / transition.detach() - counts.sum(-1, keepdim=True))


def test_probabilities_are_normalised_as_categorical_does() -> None:
    initial, transition = 7 * simplex(3), 0.2 * simplex(3, 3)
    chain = MarkovChain(initial, transition)
    close(chain.initial, dist.Categorical(initial).probs)
    close(chain.transition, dist.Categorical(transition).probs)


def test_a_value_broadcasts_over_extra_dims_on_the_left() -> None:
    chain = CHAINS["batch"]()
    value = torch.randint(3, (5, 1, 4))
    close(chain.log_prob(value), chain.log_prob(value.expand(5, 2, 4)))
    one = MarkovChain(simplex(3), simplex(3, 3))
    close(one.log_prob(value), one.expand((4,)).log_prob(value))
    close(chain.log_prob(value[0, 0].float()), chain.log_prob(value[0, 0]))


def test_the_support_of_a_step_is_enumerated() -> None:
    chain = CHAINS["batch"]()
    assert chain.has_enumerate_support
    assert not chain.has_rsample
    assert chain.event_shape == ()
    assert chain.support.check(torch.tensor([-1, 0, 2, 3])).tolist() == [False, True, True, False]
    assert MarkovChain.support.is_discrete
    assert chain.enumerate_support().shape == (3, 2, 4)
    assert chain.enumerate_support(expand=False).shape == (3, 1, 1)
    assert torch.equal(chain.enumerate_support(expand=False).flatten(), torch.arange(3))


@pytest.mark.parametrize("remade", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_copy_is_the_same_chain(remade: Callable[[Any], MarkovChain]) -> None:
    for chain in (CHAINS["zeros"](), CHAINS["one_step"]()):
        other, z = remade(chain), chain.sample((3,))
        close(other.log_prob(z), chain.log_prob(z), rtol=0, atol=0)
        close(other.expand((2, *chain.batch_shape)).entropy(), chain.expand((2, *chain.batch_shape)).entropy())


def test_float32_stays_float32_and_right_over_many_steps() -> None:
    initial, transition = simplex(4), simplex(4, 4)
    exact, single = (
        MarkovChain(initial.to(d), transition.to(d)).expand((5000,)) for d in (torch.float64, torch.float32)
    )
    assert single.entropy().dtype == single.marginals().dtype == torch.float32
    assert single.log_prob(single.sample()).dtype == torch.float32
    close(single.marginals().double(), exact.marginals(), rtol=1e-5, atol=1e-6)
    close(single.entropy().double(), exact.entropy(), rtol=1e-5, atol=1e-6)


def test_an_empty_batch_has_empty_results() -> None:
    chain = MarkovChain(torch.ones(0, 3), torch.ones(3, 3), num_steps=4)
    assert chain.sample().shape == chain.entropy().shape == chain.mode.shape == (0, 4)
    assert chain.marginals().shape == (0, 4, 3)
    assert chain.log_prob(chain.sample()).shape == kl_divergence(chain, chain).shape == (0, 4)


BAD: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "states": (lambda: MarkovChain(simplex(3), simplex(2, 2)), ("(3,)", "(2, 2)", "(K, K)")),
    "no_matrix": (lambda: MarkovChain(simplex(3), simplex(3)), ("transition of shape (3,)", "(K, K)")),
    "scalar": (lambda: MarkovChain(torch.tensor(1.0), simplex(1, 1)), ("shape ()", "(*batch, K)")),
    "no_states": (lambda: MarkovChain(torch.ones(0), torch.ones(0, 0)), ("no states", "at least one state")),
    "no_steps": (lambda: MarkovChain(simplex(3), simplex(3, 3), num_steps=0), ("num_steps=0", "at least one step")),
    "batch_without_time": (
        lambda: MarkovChain(simplex(8, 3), simplex(8, 3, 3), num_steps=4),
        ("(8, 3, 3)", "8 entries along time", "num_steps=4", "transition[:, None]"),
    ),
    "wrong_number_of_entries": (
        lambda: MarkovChain(simplex(8, 3), simplex(8, 5, 3, 3), num_steps=4),
        ("5 entries along time", "num_steps=4", "1, 3 or 4"),
    ),
    "batches": (
        lambda: MarkovChain(simplex(8, 3), simplex(5, 1, 3, 3)),
        ("batches of initial and transition", "(8,) and (5,)", "transition[:, None]"),
    ),
    "time_varying_does_not_grow": (lambda: CHAINS["time_varying"]().expand((5,)), ("4 steps", "5 steps", "num_steps")),
    "fixed_length_does_not_grow": (
        lambda: MarkovChain(simplex(3), simplex(3, 3), num_steps=1).expand((5,)),
        ("1 steps", "5 steps", "without num_steps"),
    ),
    "empty_transition_does_not_grow": (lambda: CHAINS["no_transition"]().expand((2,)), ("1 steps", "2 steps")),
    "batch_does_not_shrink": (lambda: CHAINS["batch"]().expand((1, 4)), ("(2, 4)", "(1, 4)", "grow from 1 only")),
    "dims_do_not_shrink": (lambda: CHAINS["batch"]().expand((4,)), ("(2, 4)", "(4,)", "grow from 1 only")),
    "constant_path": (
        lambda: CHAINS["homogeneous"]().log_prob(torch.tensor([1])),
        ("one step", "has 4", "whole path", "FreeEnergy"),
    ),
    "scalar_value": (lambda: CHAINS["homogeneous"]().log_prob(torch.tensor(1)), ("one step", "shape ()")),
    "long_value_of_fixed_length": (
        lambda: MarkovChain(simplex(3), simplex(3, 3), num_steps=1).log_prob(torch.tensor([1, 0])),
        ("1 steps", "2 steps"),
    ),
    "short_value_unvalidated": (
        lambda: MarkovChain(simplex(3), simplex(3, 3), num_steps=4, validate_args=False).log_prob(torch.zeros(3)),
        ("value and the chain", "(3,) and (4,)"),
    ),
    "kl_of_other_states": (
        lambda: kl_divergence(CHAINS["homogeneous"](), CHAINS["crossing_batches"]()),
        ("3 and 2 states", "probability 0"),
    ),
    "kl_of_other_lengths": (
        lambda: kl_divergence(CHAINS["homogeneous"](), CHAINS["batch_of_initials"]()),
        ("two chains", "(4,) and (2, 3)"),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_name_the_fact_and_the_fix(name: str) -> None:
    wrong, words = BAD[name]
    with pytest.raises(ShapeError) as caught:
        wrong()
    assert issubclass(ShapeError, VFEError)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("bad", [[1.0, -0.5], [0.0, 0.0], [INF, 1.0], [float("nan"), 1.0]], ids=str)
def test_numbers_that_are_no_probabilities_are_refused(bad: list[float]) -> None:
    good = torch.ones(2)
    with pytest.raises(ProbabilityError) as caught:
        MarkovChain(good, torch.stack([good, torch.tensor(bad)]))
    for word in ("transition", "(2, 2)", "row (1,)", str(bad), "softmax"):
        assert word in str(caught.value)
    with pytest.raises(ProbabilityError, match=r"initial, shape \(2,\), of which row \(\)"):
        MarkovChain(torch.tensor(bad), torch.ones(2, 2))
    assert MarkovChain(torch.tensor(bad), torch.ones(2, 2), validate_args=False).batch_shape == (1,)


@pytest.mark.parametrize("value", [[0, 3], [-1, 0], [0.5, 0.0]], ids=str)
def test_values_that_are_no_states_are_refused(value: list[float]) -> None:
    with pytest.raises(ValueError, match="support"):
        MarkovChain(simplex(3), simplex(3, 3), num_steps=2).log_prob(torch.tensor(value))


def test_enumeration_by_pyro_is_refused_and_not_wrong() -> None:
    @pyro.infer.config_enumerate
    def model() -> None:
        with pyro.plate("time", 3):
            z = pyro.sample("z", MarkovChain(simplex(2), simplex(2, 2)))
            pyro.sample("x", dist.Normal(z.double(), 1.0), obs=torch.zeros(3))

    with pytest.raises(ValueError, match="FreeEnergy"):
        TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda: None)


@st.composite
def chains(draw: st.DrawFn) -> MarkovChain:
    K, T, N = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    seed, kind = draw(st.integers(0, 10_000)), draw(st.sampled_from([0, 1, 2, 3]))
    shape = [(K, K), (T - 1, K, K), (N, 1, K, K), (N, T, K, K)][kind]
    tables = [simplex(N, K, seed=seed), simplex(*shape, seed=seed + 1)]
    if draw(st.booleans()):
        tables = [with_zeros(table, seed) for table in tables]
    return MarkovChain(*tables, num_steps=T)


@given(chains())
@settings(deadline=None, max_examples=60)
def test_entropy_is_the_expected_surprise_of_the_paths(chain: MarkovChain) -> None:
    paths = Paths(chain)
    close(chain.entropy(), paths.expectation(-chain.log_prob(paths.repeated())))


@given(chains(), st.data())
@settings(deadline=None, max_examples=60)
def test_kl_is_at_least_zero_per_step_and_the_cross_entropy_less_the_entropy(chain: MarkovChain, data: Any) -> None:
    K, T = chain.num_states, chain.num_steps
    other = MarkovChain(simplex(K, seed=data.draw(st.integers(0, 10_000))), simplex(K, K, seed=7), num_steps=T)
    kl, paths = kl_divergence(chain, other), Paths(chain)
    assert (kl >= -1e-12).all()
    cross_entropy = paths.expectation(-other.log_prob(paths.repeated()))
    close(kl, cross_entropy - chain.entropy())
