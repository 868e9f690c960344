r"""Chains of which some states are observed: what is missing is summed out, path by path in the oracle.

p(x, y)  =  sum_z  start[z_0]  prod_t move[z_t-1, z_t]  prod_t N(y_t | mu[z_t])        over z = x where x is seen
"""

import itertools
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs.case import tensor
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

import pyro_vfe as vfe
from pyro_vfe.errors import StructureError

START = tensor([0.5, 0.3, 0.2])
MOVE = tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.3, 0.5]])
MU = tensor([-1.0, 0.5, 2.0])
X = torch.tensor([0, 0, 2, 1, 0])
SEEN = torch.tensor([True, False, True, True, False])
Y = tensor([-0.5, 0.3, 1.0, 0.2, 2.0])
EVERYTHING = torch.ones(5, dtype=torch.bool)

close = torch.testing.assert_close


def paths(seen: Tensor, x: Tensor) -> list[tuple[int, ...]]:
    """All paths through the states that are seen."""
    every = itertools.product(range(3), repeat=len(x))
    return [path for path in every if all(path[t] == x[t] for t in range(len(x)) if seen[t])]


def log_joint(path: tuple[int, ...], y: Tensor | None) -> Tensor:
    moves = [MOVE[a, b].log() for a, b in itertools.pairwise(path)]
    seen = 0.0 if y is None else dist.Normal(MU[list(path)], 1.0).log_prob(y).sum()
    return START[path[0]].log() + sum(moves) + seen


def log_evidence(seen: Tensor, x: Tensor, y: Tensor | None) -> float:
    return float(torch.stack([log_joint(path, y) for path in paths(seen, x)]).logsumexp(0))


def states(way: str, x: Tensor, seen: Tensor) -> Tensor:
    chain = vfe.MarkovChain(START, MOVE)
    if way == "obs_mask":
        return pyro.sample("x", chain, obs=x, obs_mask=seen)
    if way == "mask of its own":
        return pyro.sample("x", chain.mask(seen), obs=x)
    with poutine.mask(mask=seen):
        return pyro.sample("x", chain, obs=x)


def model(way: str, x: Tensor, seen: Tensor, y: Tensor | None = None) -> None:
    with pyro.plate("time", len(x)):
        z = states(way, x, seen)
        if y is not None:
            pyro.sample("y", dist.Normal(MU[z], 1.0), obs=y)


every_way = pytest.mark.parametrize("way", ["mask", "mask of its own", "obs_mask"])
with_and_without = pytest.mark.parametrize("y", [None, Y], ids=["alone", "read"])


def fillers(x: Tensor, seen: Tensor) -> list[Tensor]:
    ints = [torch.where(seen, x, filler) for filler in (0, 1, 2, -1, 7)]
    return [*ints, torch.where(seen, x.double(), torch.nan)]


@every_way
def test_a_missing_state_is_summed_out_whatever_stands_there(way: str) -> None:
    for x in fillers(X, SEEN):
        assert vfe.posterior(model, way, x, SEEN).log_evidence.item() == pytest.approx(-3.61191842, abs=1e-8)


@every_way
@with_and_without
@pytest.mark.parametrize(
    "seen",
    [SEEN, ~SEEN, EVERYTHING, ~EVERYTHING, torch.arange(5) < 3, torch.arange(5) > 2],
    ids=["gaps", "other gaps", "everything", "nothing", "a beginning", "an end"],
)
def test_f_is_that_of_all_paths_through_what_is_seen(way: str, y: Tensor | None, seen: Tensor) -> None:
    free_energy = vfe.FreeEnergy(check="always", strict_enumeration_warning=False)
    for x in fillers(X, seen):
        expected = -log_evidence(seen, X, y)
        assert free_energy.loss(model, None, way, x, seen, y) == pytest.approx(expected, abs=1e-10)


def test_batches_with_gaps_and_with_ends_take_turns() -> None:
    free_energy = vfe.FreeEnergy(strict_enumeration_warning=False)
    for seen in (SEEN, torch.arange(5) < 3, EVERYTHING, SEEN):
        assert free_energy.loss(model, None, "mask", X, seen) == pytest.approx(-log_evidence(seen, X, None))


def test_a_missing_end_that_nothing_reads_is_no_latent() -> None:
    ended = torch.arange(5) < 3
    assert vfe.posterior(model, "mask", X, ended).sites == ()
    assert vfe.posterior(model, "mask", X, ended, Y).sites == ("x_unobserved",)
    assert vfe.posterior(model, "obs_mask", X, ended).sites == ("x_unobserved",)
    free_energy = vfe.FreeEnergy()
    assert free_energy.sample_posterior(returning, None, "mask", X, ended)[:3].tolist() == X[:3].tolist()
    drawn = free_energy.sample_posterior(returning, None, "mask", torch.where(SEEN, X, -1), SEEN)
    assert drawn[SEEN].tolist() == X[SEEN].tolist()
    assert drawn.min() >= 0


def returning(way: str, x: Tensor, seen: Tensor) -> Tensor:
    with pyro.plate("time", len(x)):
        return states(way, x, seen)


@pytest.mark.parametrize("way", ["mask", "obs_mask"])
def test_a_loop_over_the_steps_has_the_same_numbers(way: str) -> None:
    torch.manual_seed(0)
    x, seen, y = torch.randint(3, (12,)), torch.rand(12) < 0.6, torch.randn(12)

    def loop() -> None:
        table = START
        for t in range(12):
            z = pyro.sample(f"x_{t}", dist.Categorical(table), obs=x[t], obs_mask=seen[t])
            pyro.sample(f"y_{t}", dist.Normal(MU[z], 1.0), obs=y[t])
            table = MOVE[z]

    expected = vfe.posterior(loop).log_evidence
    close(vfe.posterior(model, way, torch.where(seen, x, -1), seen, y).log_evidence, expected)


def guide(*args: Any, draws: bool = False, chain: bool = True) -> None:
    fn = vfe.MarkovChain(START.flip(0), MOVE.flip(0)) if chain else dist.Categorical(START.flip(0))
    with pyro.plate("time", 5):
        pyro.sample("x_unobserved", fn, infer={"enumerate": None} if draws else {})


def free_energy_by_hand(chain: bool) -> float:
    """F of the guide, which says nothing of what is seen and goes on from there."""
    total = torch.zeros(())
    for path in paths(SEEN, X):
        steps = [START.flip(0)[path[0]], *(MOVE.flip(0)[a, b] for a, b in itertools.pairwise(path))]
        probs = torch.stack(steps) if chain else START.flip(0)[list(path)]
        log_q = probs.log()[~SEEN].sum()
        total = total + log_q.exp() * (log_q - log_joint(path, Y))
    return float(total)


@every_way
@pytest.mark.parametrize("chain", [True, False], ids=["chain", "mean field"])
def test_a_guide_speaks_of_the_missing_states_alone(way: str, chain: bool) -> None:
    def program(*args: Any) -> None:
        guide(chain=chain)

    terms = vfe.FreeEnergy().decompose(model, program, way, X, SEEN, Y)
    assert terms.free_energy.item() == pytest.approx(free_energy_by_hand(chain))
    assert terms.surprise.item() == pytest.approx(-log_evidence(SEEN, X, Y))


@pytest.mark.parametrize("make", [vfe.AutoMeanField, vfe.AutoStructured, vfe.AutoPosterior])
def test_automatic_guides_take_part_of_the_chain(make: Callable[..., Any]) -> None:
    terms = vfe.FreeEnergy().decompose(model, make(model), "obs_mask", X, SEEN, Y)
    assert terms.surprise.item() == pytest.approx(-log_evidence(SEEN, X, Y))
    assert -1e-12 <= terms.gap.item() < 5


def test_a_drawn_guide_has_the_expectation_of_the_summed_one() -> None:
    def drawn(*args: Any) -> None:
        guide(draws=True, chain=False)

    def chain(*args: Any) -> None:
        guide(draws=True)

    def summed(*args: Any) -> None:
        guide()

    free_energy = vfe.FreeEnergy(strict_enumeration_warning=False)
    losses = tensor([free_energy.loss(model, drawn, "obs_mask", X, SEEN, Y) for _ in range(300)])
    assert abs(losses.mean() - free_energy_by_hand(chain=False)) < 4 * losses.std() / 300**0.5
    with pytest.raises(StructureError, match="'x_unobserved' of the guide is a chain that is drawn"):
        free_energy.loss(model, chain, "obs_mask", X, SEEN, Y)
    assert free_energy.loss(model, summed, "obs_mask", X, SEEN, Y) == pytest.approx(free_energy_by_hand(chain=True))


@pytest.mark.parametrize("padding", [0, 1, -1])
def test_em_of_an_observed_chain_takes_shares_of_its_transitions(padding: int) -> None:
    def program(x: Tensor, there: Tensor | bool = True, in_event: bool = False) -> None:
        initial = pyro.param("initial", tensor([0.4, 0.6]), constraint=constraints.simplex)
        transition = pyro.param("transition", tensor([[0.6, 0.4], [0.3, 0.7]]), constraint=constraints.simplex)
        if in_event:
            pyro.sample("x", vfe.MarkovChain(initial, transition, num_steps=len(x)).to_event(1), obs=x)
            return
        with pyro.plate("time", len(x)), poutine.mask(mask=there):
            pyro.sample("x", vfe.MarkovChain(initial, transition), obs=x)

    x = torch.tensor([0, 0, 1, 1, 0])
    padded = torch.cat([x, torch.full((2,), padding)])
    for args in ((x,), (x, True, True), (padded, torch.arange(7) < 5)):
        pyro.clear_param_store()
        run = vfe.EM(program).run(*args, progress_bar=False)
        close(run.params["initial"], tensor([1.0, 0.0]))
        close(run.params["transition"], tensor([[0.5, 0.5], [0.5, 0.5]]))
        assert all(how.startswith("closed form") for how in run.updates.values())
        assert run.n_iter <= 2


@every_way
def test_dreams_and_predictions_are_of_one_path(way: str) -> None:
    def program(x: Tensor) -> None:
        with pyro.plate("time", 50):
            z = states(way, x, torch.arange(50) % 2 == 0)
            pyro.sample("y", dist.Normal(MU[z], 1e-3), obs=torch.zeros(50))

    x = torch.full((50,), -1).index_fill(0, torch.arange(0, 50, 2), 1)
    dream = vfe.dream(program, x, dream_to_args=lambda dreamt, x: ((x,), {}))
    path = dream.latents["x_unobserved"]
    close(dream.observations["y"], MU[path], atol=0.01, rtol=0)
    name = "x_observed" if way == "obs_mask" else "x"
    assert dream.observations[name].tolist() == [int(path[t]) if t % 2 == 0 else -1 for t in range(50)]
    tree = vfe.to_datatree(program, None, x, num_samples=4, progress_bar=False)
    for group, values in (("posterior", "posterior_predictive"), ("prior", "prior_predictive")):
        if group in tree:
            path = torch.as_tensor(tree[group]["x_unobserved"].values)
            close(torch.as_tensor(tree[values]["y"].values), MU[path], atol=0.01, rtol=0)


def test_chains_read_chains_that_are_seen_in_part() -> None:
    moves = tensor([[[0.9, 0.1], [0.2, 0.8]], [[0.5, 0.5], [0.6, 0.4]], [[0.1, 0.9], [0.3, 0.7]]])
    first, other, known = tensor([0.4, 0.6]), torch.tensor([0, 1, 1, 0, 1]), torch.tensor([1, 0, 1, 1, 0]).bool()

    def program(known: Tensor | bool) -> None:
        with pyro.plate("time", 5):
            z = states("mask", X, SEEN)
            with poutine.mask(mask=known):
                pyro.sample("o", vfe.MarkovChain(first, moves[z], num_steps=5), obs=other)

    for seen in (known, torch.ones(5, dtype=torch.bool)):
        terms = [
            log_joint(path, None) + first[o[0]].log() + sum(moves[path[t], o[t - 1], o[t]].log() for t in range(1, 5))
            for path in paths(SEEN, X)
            for o in itertools.product(range(2), repeat=5)
            if all(o[t] == other[t] for t in range(5) if seen[t])
        ]
        expected = torch.stack(terms).logsumexp(0).item()
        assert vfe.FreeEnergy().loss(program, None, seen) == pytest.approx(-expected)
    assert vfe.FreeEnergy().loss(program, None, True) == pytest.approx(-expected)


def test_a_mask_may_depend_on_a_latent_and_branches_may_differ_in_it() -> None:
    def by_value() -> None:
        c = pyro.sample("c", dist.Bernoulli(0.3))
        model("mask", X, torch.where(c == 1, SEEN, ~SEEN), Y)

    def by_branch() -> None:
        c = pyro.sample("c", dist.Bernoulli(0.3))
        model("mask", X, SEEN if c == 1 else EVERYTHING, Y)

    for program, other in ((by_value, ~SEEN), (by_branch, EVERYTHING)):
        parts = tensor([log_evidence(other, X, Y), log_evidence(SEEN, X, Y)])
        expected = (tensor([0.7, 0.3]).log() + parts).logsumexp(0)
        assert vfe.FreeEnergy().loss(program, None) == pytest.approx(-float(expected))


def test_weights_multiply_the_sum_over_what_is_missing() -> None:
    table = torch.stack([X, X.flip(0)])

    def program(kept: Tensor) -> None:
        sequences, time = pyro.plate("sequences", 2, subsample=kept, dim=-2), pyro.plate("time", 5, dim=-1)
        with poutine.scale(scale=3.0), sequences, time:
            states("mask", table[kept], SEEN)

    expected = log_evidence(SEEN, table[1], None)
    assert vfe.FreeEnergy().loss(program, None, torch.tensor([1])) == pytest.approx(-6 * expected)


def test_an_observed_chain_without_its_neighbours_is_refused() -> None:
    kept = torch.tensor([0, 2, 4])

    def subsampled() -> None:
        with pyro.plate("time", 5, subsample=kept):
            pyro.sample("x", vfe.MarkovChain(START, MOVE), obs=X[kept])

    def in_event(mask: Tensor) -> None:
        pyro.sample("x", vfe.MarkovChain(START, MOVE, num_steps=5).mask(mask).to_event(1), obs=X)

    with pytest.raises(StructureError, match="neighbours in the subsample are no neighbours in time"):
        vfe.posterior(subsampled)
    with pytest.raises(StructureError, match="a mask over its steps in to_event"):
        vfe.posterior(in_event, SEEN)
    with pytest.raises(StructureError, match="around the computation"), poutine.mask(mask=SEEN):
        vfe.posterior(model, "mask", X, True)
    # What the messages say: all steps in a plate, and the mask around the site.
    assert vfe.posterior(model, "mask", X, SEEN).log_evidence.item() == pytest.approx(-3.61191842, abs=1e-8)
