"""Sums over the paths of Markov chains: every path, other libraries, autograd, and where floating point is weakest."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pyro_vfe.engine import chain_solution
from pyro_vfe.engine.chain_logspace import LogChain
from pyro_vfe.engine.chain_plan import Stretch, cost_of, plan_sweep
from pyro_vfe.engine.chain_solution import LinearChain, gradients, solve
from pyro_vfe.engine.chains import (
    chain_log_normalizer,
    chain_marginals,
    chain_mode,
    chain_sample,
    plain_log_normalizer,
    plain_marginals,
)

close = torch.testing.assert_close
INF = float("inf")
VARIANTS = ["homogeneous", "per sequence", "per step", "per step and sequence"]
PLANS = {
    "two chunks": (Stretch(0, 2, 6),),
    "chunks and a rest": (Stretch(0, 3, 3), Stretch(9, 1, 3)),
    "chunks of one step": (Stretch(0, 12, 1),),
    "one long and one short": (Stretch(0, 1, 11), Stretch(11, 1, 1)),
}


def chain(T: int, N: int, K: int, variant: str, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    steps = T - 1 if variant.startswith("per step") else 1
    batch = N if variant.endswith("sequence") else 1
    generator = torch.Generator().manual_seed(T * 100 + N * 10 + K)
    unary = torch.randn(T, N, K, generator=generator, dtype=torch.float64).to(dtype)
    return unary, torch.randn(steps, batch, K, K, generator=generator, dtype=torch.float64).to(dtype)


def paths(unary: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Returns all paths `(P, T)` and their log weights `(P, N)`."""
    T, N, K = unary.shape
    found = torch.tensor(list(itertools.product(range(K), repeat=T)))
    weights = torch.stack([unary[t][:, found[:, t]].T for t in range(T)]).sum(0)
    for t in range(T - 1):
        step = pairs[t if len(pairs) > 1 else 0].expand(N, K, K)
        weights = weights + step[:, found[:, t], found[:, t + 1]].T
    return found, weights


def solved(unary: Tensor, pairs: Tensor, plan: Sequence[Stretch] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the log normalisers and the gradients of their sum."""
    parts = solve(unary, pairs, gradient=True, plan=plan)
    logs = torch.empty_like(unary[0, :, 0])
    for part in parts:
        logs[slice(None) if part.where is None else part.where] = part.chain.log_normalizer.to(unary.dtype)
    return logs, *gradients(parts, torch.ones_like(logs), unary, pairs)


def differentiated(function: object, unary: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    assert callable(function)
    free = [unary.clone().requires_grad_(), pairs.clone().requires_grad_()]
    logs = function(*free)
    return logs.detach(), *torch.autograd.grad(logs.sum(), free, materialize_grads=True)


def ways(unary: Tensor, pairs: Tensor) -> list[type]:
    return [type(part.chain) for part in solve(unary, pairs, gradient=True)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sizes", [(4, 3, 2), (3, 1, 3), (5, 2, 1), (2, 2, 3)])
def test_log_normalizer_sums_over_every_path(sizes: tuple[int, int, int], variant: str) -> None:
    unary, pairs = chain(*sizes, variant)
    close(chain_log_normalizer(unary, pairs), paths(unary, pairs)[1].logsumexp(0))


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_marginals_and_expected_transitions(variant: str) -> None:
    unary, pairs = chain(4, 3, 2, variant)
    found, weights = paths(unary, pairs)
    probabilities = weights.softmax(0)
    _, d_unary, d_pairs = differentiated(chain_log_normalizer, unary, pairs)
    for t in range(4):
        chosen = torch.nn.functional.one_hot(found[:, t], 2).double()
        close(d_unary[t], probabilities.T @ chosen)
    transitions = torch.zeros(3, 3, 2, 2)
    for t in range(3):
        here, there = (torch.nn.functional.one_hot(found[:, s], 2).double() for s in (t, t + 1))
        transitions[t] = torch.einsum("pn,pi,pj->nij", probabilities, here, there)
    close(d_pairs, transitions.sum_to_size(pairs.shape))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("plan", PLANS)
def test_chunks_and_the_sequential_sweep_agree_with_autograd(plan: str, variant: str) -> None:
    unary, pairs = chain(13, 3, 4, variant)
    expected = differentiated(plain_log_normalizer, unary, pairs)
    for steps in (PLANS[plan], (Stretch(0, 1, 12),), None):
        for ours, plain in zip(solved(unary, pairs, steps), expected, strict=True):
            close(ours, plain)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("strength", [1.0, 30.0, 1000.0])
def test_hard_zeros_and_extreme_potentials_agree_with_log_space(strength: float, variant: str) -> None:
    unary, pairs = chain(13, 5, 3, variant)
    unary = (strength * unary).masked_fill(torch.rand(unary.shape) < 0.1, -INF)
    pairs = (strength * pairs).masked_fill(torch.rand(pairs.shape) < 0.2, -INF)
    logs, d_unary, d_pairs = expected = differentiated(plain_log_normalizer, unary, pairs)
    for plan in (None, *PLANS.values()):
        for ours, plain in zip(solved(unary, pairs, plan), expected, strict=True):
            close(ours, plain)
    _, ours_unary, ours_pairs = differentiated(chain_log_normalizer, unary, pairs)
    assert (ours_unary[unary == -INF] == 0).all()
    assert (ours_pairs[pairs == -INF] == 0).all()
    assert d_unary.isfinite().all() and d_pairs.isfinite().all() and not logs.isnan().any()


def never_mixing(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns two values that never mix: one loses at first, wins by far, and loses again."""
    unary = torch.zeros(90, 2, 2, dtype=dtype)
    unary[0:30, 0, 1] = -30.0
    unary[30:60, 0, 1] = 59.0
    unary[60:90, 0, 1] = -29.5
    return unary, torch.eye(2, dtype=dtype).log()[None, None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_underflows_at_first_and_matters_later_is_not_lost(dtype: torch.dtype) -> None:
    unary, pairs = never_mixing(dtype)
    logs, d_unary, d_pairs = differentiated(chain_log_normalizer, unary, pairs)
    ahead = unary[:, 0, 1].double().sum()
    assert unary[:30, 0, 1].double().sum() < -800 and unary[30:60, 0, 1].double().sum() > 1600
    close(logs[0].double(), torch.logaddexp(ahead, torch.zeros(())), rtol=1e-6, atol=1e-4)
    close(d_unary[:, 0, 1].double(), ahead.sigmoid().expand(90), rtol=1e-5, atol=1e-6)
    assert d_pairs[0, 0, 0, 1] == 0
    assert LogChain in ways(unary, pairs)


@pytest.mark.parametrize("start", [-300.0, -690.0, -1400.0])
@pytest.mark.parametrize("plan", [None, (Stretch(0, 4, 2),), (Stretch(0, 8, 1),)])
def test_one_step_may_undo_what_another_made_impossibly_small(start: float, plan: tuple[Stretch, ...] | None) -> None:
    unary = torch.zeros(9, 1, 2)
    unary[0, 0, 1], unary[4, 0, 1], unary[8, 0, 1] = start, -2 * start, start + 0.5
    pairs = torch.eye(2).log()[None, None]
    for ours, plain in zip(solved(unary, pairs, plan), differentiated(plain_log_normalizer, unary, pairs), strict=True):
        close(ours, plain)


@pytest.mark.parametrize("leak", [-20.0, -400.0, -INF])
def test_left_to_right_chains_agree_with_log_space(leak: float) -> None:
    unary, _ = chain(60, 4, 5, "homogeneous")
    unary[0, :, 1:] = unary[-1, :, :-1] = -INF
    step = torch.full((5, 5), leak)
    step.diagonal().fill_(-0.1)
    step.diagonal(1).fill_(-2.0)
    pairs = step[None, None]
    for plan in (None, (Stretch(0, 7, 8), Stretch(56, 1, 3))):
        for ours, plain in zip(
            solved(unary, pairs, plan), differentiated(plain_log_normalizer, unary, pairs), strict=True
        ):
            close(ours, plain)


@pytest.mark.parametrize("seed", [*range(12), 1063, 1065, 1597])
def test_values_that_die_and_come_back_agree_with_log_space(seed: int) -> None:
    torch.manual_seed(seed)
    drift = torch.where(torch.arange(13) < 6, 1.0, -1.0)[:, None, None] * torch.linspace(-1, 1, 6)
    unary = (150 + 150 * (seed % 3)) * torch.randn(13, 4, 6) * drift
    pairs = torch.randn(1, 4, 6, 6).masked_fill(~torch.eye(6, dtype=torch.bool), [-30.0, -700.0][seed % 2])
    expected = differentiated(plain_log_normalizer, unary, pairs)
    for plan in (None, *PLANS.values()):
        for ours, plain in zip(solved(unary, pairs, plan), expected, strict=True):
            close(ours, plain)


def test_small_entries_that_do_not_matter_need_no_log_space() -> None:
    unary, pairs = chain(40, 3, 3, "homogeneous")
    unary[::4, :2, 1] -= 2000.0
    unary[7, 0, 2] = -INF
    assert set(ways(unary, pairs)) == {LinearChain}
    for ours, plain in zip(
        differentiated(chain_log_normalizer, unary, pairs),
        differentiated(plain_log_normalizer, unary, pairs),
        strict=True,
    ):
        close(ours, plain)


@pytest.mark.parametrize("variant", VARIANTS)
def test_impossible_sequences_are_minus_infinity_with_gradient_zero_and_leave_others_alone(variant: str) -> None:
    unary, pairs = chain(6, 3, 2, variant)
    expected = differentiated(plain_log_normalizer, unary[:, [0, 2]], pairs[:, [0, 2]] if pairs.shape[1] > 1 else pairs)
    unary[3, 1] = -INF
    logs, d_unary, d_pairs = differentiated(chain_log_normalizer, unary, pairs)
    assert logs[1] == -INF
    assert (d_unary[:, 1] == 0).all()
    close(logs[[0, 2]], expected[0])
    close(d_unary[:, [0, 2]], expected[1])
    close(d_pairs[:, [0, 2]] if pairs.shape[1] > 1 else d_pairs, expected[2])
    everywhere = differentiated(chain_log_normalizer, unary, torch.full_like(pairs, -INF))
    assert (everywhere[0] == -INF).all() and (everywhere[1] == 0).all() and (everywhere[2] == 0).all()


@pytest.mark.parametrize("wrong", [INF, float("nan")])
@pytest.mark.parametrize("where", ["unary", "pairs"])
def test_what_is_not_a_number_never_comes_out_finite(where: str, wrong: float) -> None:
    unary, pairs = chain(6, 3, 2, "per sequence")
    (unary[4] if where == "unary" else pairs[0])[1, ..., 0] = wrong
    logs, d_unary, _ = differentiated(chain_log_normalizer, unary, pairs)
    assert not logs[1].isfinite() and logs[1] != -INF
    assert logs[[0, 2]].isfinite().all() and d_unary[:, [0, 2]].isfinite().all()


def test_large_log_potentials_lose_no_precision_in_marginals() -> None:
    unary, pairs = chain(50, 2, 3, "homogeneous")
    shift = 1e5 * torch.randn(50, 2, 1)
    logs, d_unary, d_pairs = differentiated(chain_log_normalizer, unary, pairs)
    shifted = differentiated(chain_log_normalizer, unary + shift, pairs - 1e5)
    close(shifted[0], logs + shift.sum((0, 2)) - 49e5)
    close(shifted[1], d_unary, atol=1e-8, rtol=1e-6)
    close(shifted[2], d_pairs, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_is_float64_to_its_precision(variant: str) -> None:
    unary, pairs = chain(200, 3, 4, variant, dtype=torch.float32)
    unary[50:60, 1, 2] -= 150.0
    ours = differentiated(chain_log_normalizer, unary, pairs)
    double = differentiated(plain_log_normalizer, unary.double(), pairs.double())
    for single, exact in zip(ours, double, strict=True):
        assert single.dtype == torch.float32
        close(single.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_first_and_second_derivatives_match_finite_differences(variant: str) -> None:
    unary, pairs = chain(4, 2, 2, variant)
    free = (unary.requires_grad_(), pairs.requires_grad_())
    assert torch.autograd.gradcheck(chain_log_normalizer, free)
    assert torch.autograd.gradgradcheck(chain_log_normalizer, free)
    chances = (unary[0].detach().softmax(-1).requires_grad_(), pairs.detach().softmax(-1).requires_grad_())
    assert torch.autograd.gradcheck(lambda q, p: chain_marginals(q, p, 4), chances)
    assert torch.autograd.gradgradcheck(lambda q, p: chain_marginals(q, p, 4), chances)


def test_second_derivatives_are_right_where_the_inputs_share_a_source() -> None:
    def both(x: Tensor) -> Tensor:
        return chain_log_normalizer(
            x.expand(4, 1, 2) * torch.arange(1.0, 5.0)[:, None, None], torch.stack([x, -x])[None, None]
        )

    x = torch.tensor([0.3, -0.2], requires_grad=True)
    assert torch.autograd.gradgradcheck(both, x)


def test_only_what_needs_a_gradient_gets_one() -> None:
    unary, pairs = chain(5, 2, 3, "homogeneous")
    chain_log_normalizer(unary, pairs.requires_grad_()).sum().backward()
    close(pairs.grad, differentiated(plain_log_normalizer, unary, pairs.detach())[2])
    assert unary.grad is None


@pytest.mark.parametrize("entries", [0, 1])
def test_a_single_step_has_no_pairs(entries: int) -> None:
    unary = torch.randn(1, 3, 2)
    pairs = torch.randn(entries, 1, 2, 2)
    logs, d_unary, d_pairs = differentiated(chain_log_normalizer, unary, pairs)
    close(logs, unary[0].logsumexp(-1))
    close(d_unary[0], unary[0].softmax(-1))
    assert d_pairs.shape == pairs.shape and (d_pairs == 0).all()
    assert chain_mode(unary, pairs).tolist() == [unary[0].argmax(-1).tolist()]
    assert chain_sample(unary, pairs, 4).shape == (4, 1, 3)
    close(chain_marginals(unary[0].softmax(-1), pairs, 1)[0], unary[0].softmax(-1))


def test_no_sequences_are_no_results() -> None:
    unary, pairs = torch.randn(4, 0, 2), torch.randn(1, 1, 2, 2)
    logs, d_unary, d_pairs = differentiated(chain_log_normalizer, unary, pairs)
    assert logs.shape == (0,) and d_unary.shape == unary.shape and (d_pairs == 0).all()
    assert chain_mode(unary, pairs).shape == (4, 0)
    assert chain_sample(unary, pairs, 3).shape == (3, 4, 0)
    assert chain_marginals(unary[0], pairs, 4).shape == (4, 0, 2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_marginals_and_their_gradients_match_matrix_products(variant: str) -> None:
    unary, pairs = chain(7, 3, 4, variant)
    weights = torch.randn(7, 3, 4)

    def ours(q: Tensor, p: Tensor) -> Tensor:
        return chain_marginals(q, p, 7) * weights

    def plain(q: Tensor, p: Tensor) -> Tensor:
        return plain_marginals(q, p, 7) * weights

    inputs = unary[0].softmax(-1), pairs.softmax(-1)
    for one, other in zip(differentiated(ours, *inputs), differentiated(plain, *inputs), strict=True):
        close(one, other)
    close(chain_marginals(*inputs, 7).sum(-1), torch.ones(7, 3))
    if len(pairs) > 1:
        close(chain_marginals(*inputs), chain_marginals(*inputs, 7))


@pytest.mark.parametrize("variant", VARIANTS)
def test_mode_is_the_best_of_all_paths(variant: str) -> None:
    unary, pairs = chain(5, 4, 3, variant)
    unary[2, :, 0] = -INF
    found, weights = paths(unary, pairs)
    assert (found[weights.argmax(0)] == chain_mode(unary, pairs).T).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_samples_have_the_frequencies_of_the_paths(variant: str) -> None:
    unary, pairs = chain(3, 2, 2, variant)
    unary[1, 0, 1] = -INF
    found, weights = paths(unary, pairs)
    drawn = chain_sample(unary, pairs, 4000)
    assert drawn.shape == (4000, 3, 2) and drawn.dtype == torch.int64
    index = (drawn * torch.tensor([4, 2, 1])[:, None]).sum(1)
    for n in range(2):
        counts = torch.bincount(index[:, n], minlength=len(found)).double()
        expected = 4000 * weights[:, n].softmax(0)
        assert (counts[expected == 0] == 0).all()
        possible = expected > 0
        chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
        assert chi_square < 30, "seven degrees of freedom exceed 30 once in ten thousand times"


@pytest.mark.parametrize("plan", PLANS)
def test_without_gradients_the_same_comes_from_the_forward_sweep_alone(plan: str) -> None:
    unary, pairs = chain(13, 3, 4, "per step")
    (part,) = solve(unary, pairs, gradient=False, plan=PLANS[plan])
    assert isinstance(part.chain, LinearChain) and part.chain.counts == ()
    close(part.chain.log_normalizer, plain_log_normalizer(unary, pairs))


def test_decoding_in_float32_keeps_its_precision_along_a_long_chain() -> None:
    unary, pairs = chain(3000, 2, 3, "homogeneous", dtype=torch.float32)
    far = unary - 1000.0
    assert (chain_mode(far, pairs) == chain_mode(far.double(), pairs.double())).float().mean() > 0.999
    drawn = chain_sample(far, pairs, 500)
    marginals = differentiated(chain_log_normalizer, far, pairs)[1]
    often = torch.nn.functional.one_hot(drawn, 3).double().mean(0)
    close(often.mean(0), marginals.double().mean(0), atol=2e-3, rtol=0.0)


def test_mixed_and_half_precision_are_promoted() -> None:
    unary, pairs = chain(6, 2, 3, "homogeneous")
    close(chain_log_normalizer(unary.float(), pairs), chain_log_normalizer(unary.float().double(), pairs))
    half = chain_log_normalizer(unary.bfloat16(), pairs.bfloat16())
    assert half.dtype == torch.bfloat16
    close(half.double(), chain_log_normalizer(unary, pairs), rtol=2e-2, atol=2e-2)


def test_saved_memory_grows_with_steps_and_values_alone() -> None:
    def numbers_kept(T: int, K: int) -> int:
        parts = solve(*chain(T, 2, K, "homogeneous"), gradient=True)
        counts = [c for part in parts if isinstance(part.chain, LinearChain) for c in part.chain.counts]
        kept = (t for c in counts for t in (c.forward, c.backward, c.joint, c.total, c.pair_total))
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // 8 for t in kept}.values())

    for T in (100, 400, 20000):
        assert numbers_kept(T, 8) <= 2 * 6 * T * 8
    assert numbers_kept(400, 32) <= 2 * 6 * 400 * 32


def test_float32_falls_back_to_float64_only_where_it_must() -> None:
    unary, pairs = chain(30, 3, 2, "homogeneous", dtype=torch.float32)
    unary[10, 1, 0] -= 100.0
    parts = solve(unary, pairs, gradient=False)
    assert [part.chain.log_normalizer.dtype for part in parts] == [torch.float32, torch.float64]
    assert [part.where.tolist() for part in parts if part.where is not None] == [[0, 2], [1]]


def test_the_floor_is_where_a_sum_of_products_is_right_to_rounding() -> None:
    for dtype in (torch.float32, torch.float64):
        floor = chain_solution.floor_of(dtype, 8)
        assert 8 * torch.finfo(dtype).tiny / floor < torch.finfo(dtype).eps


def test_many_short_sequences_are_swept_in_sequence_and_long_ones_in_chunks() -> None:
    assert plan_sweep(99, 256, 8, False) == (Stretch(0, 1, 99),)
    assert plan_sweep(999, 64, 32, False) == (Stretch(0, 1, 999),)
    for steps, values in ((19_999, 8), (999_999, 4)):
        plan = plan_sweep(steps, 1, values, False)
        assert plan[0].count > 10
        assert sum(stretch.count * stretch.length for stretch in plan) == steps
        assert all(one.last == other.first for one, other in itertools.pairwise(plan))
        assert cost_of(plan, 1, values, False) < cost_of((Stretch(0, 1, steps),), 1, values, False)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7, 100, 101])
def test_every_plan_covers_every_step(steps: int) -> None:
    plan = plan_sweep(steps, 1, 2, False)
    assert sum(stretch.count * stretch.length for stretch in plan) == steps
    assert plan[0].first == 0 and plan[-1].last == steps


def test_the_cost_of_a_plan_is_linear_in_steps_and_sequences() -> None:
    cost = cost_of((Stretch(0, 1, 1000),), 64, 8, False)
    assert cost_of((Stretch(0, 1, 2000),), 64, 8, False) == pytest.approx(2 * cost)
    assert cost_of((Stretch(0, 1, 1000),), 128, 8, False) < 2 * cost


@pytest.mark.parametrize("sizes", [(5, 40, 4), (1, 3000, 3)])
def test_expected_counts_match_hmmlearn(sizes: tuple[int, int, int]) -> None:
    hmm = pytest.importorskip("hmmlearn.hmm")
    N, T, K = sizes
    start, transition, emission = (torch.rand(*shape).softmax(-1) for shape in ((K,), (K, K), (K, 6)))
    model = hmm.CategoricalHMM(n_components=K, n_features=6, implementation="scaling")
    model.startprob_, model.transmat_, model.emissionprob_ = (x.numpy() for x in (start, transition, emission))
    observed = torch.randint(6, (N, T))
    unary = emission.log().T[observed.T].clone()
    unary[0] += start.log()
    logs, d_unary, d_pairs = differentiated(chain_log_normalizer, unary, transition.log()[None, None])
    posteriors = model.score_samples(observed.reshape(-1, 1).numpy(), [T] * N)
    assert float(logs.sum()) == pytest.approx(posteriors[0])
    close(d_unary.transpose(0, 1).reshape(-1, K), torch.from_numpy(posteriors[1]))
    statistics, _ = model._do_estep(observed.reshape(-1, 1).numpy(), [T] * N)
    close(d_pairs[0, 0], torch.from_numpy(statistics["trans"]))
