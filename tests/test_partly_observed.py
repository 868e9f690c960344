r"""Discrete sites that are latent, observed, or observed in part: chains, and all else whose values can be listed.

    p(x_seen, y)  =  sum_c mix_c  sum_x  start_c[x_0]  prod_t move_c[x_t-1, x_t]  prod_t N(y_t | mu[x_t])

over the paths x that agree with what is seen, for independent elements too: there every row of `move_c` is `start_c`.
Whatever stands where a datum is missing, the numbers are the same. EM's shares are those of expected counts, which are
the gradient of the logarithm of this sum in the logarithms of the tables.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs.case import tensor
from torch import Tensor
from torch.distributions import constraints

import pyro_vfe as vfe

MU = tensor([-1.0, 0.5, 2.0, 3.0])
Y = tensor([[-0.5, 0.3, 1.0, 2.0], [0.7, -1.2, 0.1, 0.4]])
STATES = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1]])
SEEN = torch.tensor([[True, False, True, False], [False, True, False, True]])
CATEGORIES = torch.arange(3)
MIX = tensor([0.4, 0.6])
TWO = tensor([[0.6, 0.4], [0.3, 0.7]])
THREE = tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
MOVES_OF_TWO = tensor([[[0.7, 0.3], [0.2, 0.8]], [[0.5, 0.5], [0.9, 0.1]]])
MOVES_OF_THREE = tensor(
    [[[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.3, 0.5]], [[0.2, 0.4, 0.4], [0.5, 0.1, 0.4], [0.3, 0.3, 0.4]]]
)


@dataclass(frozen=True)
class Family:
    """A distribution given a class, and the same by hand."""

    make: Callable[[Tensor, Tensor, Tensor], Any]
    """The distribution, of the parameters `start` and `move` and of the class."""
    start: Tensor
    """The parameter, which for a chain holds the probabilities of the first state."""
    move: Tensor | None = None
    """The probabilities of a chain's next state."""
    constraint: Any = constraints.simplex
    """Of `start`."""
    values: Tensor = CATEGORIES
    """The values as the distribution has them."""
    number: Callable[[Tensor], Tensor] = Tensor.long
    """Which value one is."""
    table: Callable[[Tensor], Tensor] = lambda start: start
    """The probabilities of all values given the parameter, `(C, K)`."""
    best: Callable[[Tensor], Tensor] = lambda shares: shares
    """The table of the parameter that fits shares of the values best."""


def bits(chance: Tensor) -> Tensor:
    return torch.stack([1 - chance, chance], -1)


def of_two_bits(chances: Tensor) -> Tensor:
    return torch.einsum("ca,cb->cab", bits(chances[:, 0]), bits(chances[:, 1])).flatten(1)


def of_two_tries(chance: Tensor) -> Tensor:
    return torch.stack([(1 - chance) ** 2, 2 * chance * (1 - chance), chance**2], -1)


def chain(start: Tensor, move: Tensor, c: Tensor) -> Any:
    return vfe.MarkovChain(start[c].squeeze(-2), move[c])


BITS = tensor([0.0, 1.0])
PAIRS = tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
INTERVAL = constraints.unit_interval

FAMILIES = {
    "chain of 2": Family(chain, TWO, MOVES_OF_TWO),
    "chain of 3": Family(chain, THREE, MOVES_OF_THREE),
    "Categorical": Family(lambda start, move, c: dist.Categorical(start[c]), THREE),
    "Categorical of logits": Family(
        lambda start, move, c: dist.Categorical(logits=start[c]),
        THREE.log(),
        constraint=constraints.real,
        table=lambda start: start.softmax(-1),
    ),
    "Bernoulli": Family(
        lambda start, move, c: dist.Bernoulli(start[c]), TWO[:, 0], constraint=INTERVAL, values=BITS, table=bits
    ),
    "Bernoulli of logits": Family(
        lambda start, move, c: dist.Bernoulli(logits=start[c]),
        TWO[:, 0].logit(),
        constraint=constraints.real,
        values=BITS,
        table=lambda start: bits(start.sigmoid()),
    ),
    "OneHotCategorical": Family(
        lambda start, move, c: dist.OneHotCategorical(start[c]),
        THREE,
        values=torch.eye(3, dtype=torch.float64),
        number=lambda x: x.argmax(-1),
    ),
    "Binomial": Family(
        lambda start, move, c: dist.Binomial(2, start[c]),
        TWO[:, 0],
        constraint=INTERVAL,
        values=tensor([0.0, 1.0, 2.0]),
        table=of_two_tries,
        best=lambda shares: of_two_tries(shares @ tensor([0.0, 0.5, 1.0])),
    ),
    "vector of bits": Family(
        lambda start, move, c: dist.Bernoulli(start[c]).to_event(1),
        TWO,
        constraint=INTERVAL,
        values=PAIRS,
        number=lambda x: (2 * x[..., 0] + x[..., 1]).long(),
        table=of_two_bits,
        best=lambda shares: of_two_bits(shares @ PAIRS),
    ),
}

WAYS = ("latent", "observed", "mask", "mask of its own", "obs_mask")


def program(name: str, way: str, x: Tensor, reads: bool) -> None:
    """A mixture of sequences of the family, which y reads or not; x is known as the way says."""
    family = FAMILIES[name]
    mix = pyro.param("mix", MIX.clone(), constraint=constraints.simplex)
    start = pyro.param("start", family.start.clone(), constraint=family.constraint)
    move = start if family.move is None else pyro.param("move", family.move.clone(), constraint=constraints.simplex)
    with pyro.plate("sequences", len(Y), dim=-2):
        c = pyro.sample("c", dist.Categorical(mix))
        with pyro.plate("time", Y.shape[-1], dim=-1):
            fn = family.make(start, move, c)
            if way == "latent":
                x = pyro.sample("x", fn)
            elif way == "obs_mask":
                x = pyro.sample("x", fn, obs=x, obs_mask=SEEN)
            elif way == "mask of its own":
                x = pyro.sample("x", fn.mask(SEEN), obs=x)
            else:
                with pyro.poutine.mask(mask=SEEN if way == "mask" else True):
                    x = pyro.sample("x", fn, obs=x)
            if reads:
                pyro.sample("y", dist.Normal(MU[family.number(x)], 1.0), obs=Y)


def guide(*args: Any) -> None:
    with pyro.plate("sequences", len(Y), dim=-2):
        pyro.sample("c", dist.Categorical(tensor([[0.2, 0.8], [0.7, 0.3]])[:, None]))


@dataclass(frozen=True, eq=False)
class Sum:
    """The sum over all paths, and what its gradient says."""

    log_joint: Tensor
    """The log-probability of each sequence and each class, `(N, C)`."""
    tables: dict[str, Tensor]
    """Leaves: the tables of log-probabilities of mix, start and move, and of the data y given each value."""

    @property
    def log_evidence(self) -> Tensor:
        return self.log_joint.logsumexp(-1).sum()

    def counts(self, name: str) -> Tensor:
        """How often each entry of a table is met."""
        return torch.autograd.grad(self.log_evidence, self.tables[name], retain_graph=True)[0]

    def shares(self, name: str) -> Tensor:
        """The shares of counts in each row; a row that is never met stays as it is."""
        counts = self.counts(name)
        total = counts.sum(-1, keepdim=True)
        return torch.where(total > 0, counts / total, self.tables[name].detach().exp())

    def free_energy(self) -> Tensor:
        q = tensor([[0.2, 0.8], [0.7, 0.3]])
        return (q * (q.log() - self.log_joint)).sum()


def summed(name: str, way: str, reads: bool) -> Sum:
    family = FAMILIES[name]
    start = family.table(family.start)
    log_y = dist.Normal(MU[: start.shape[-1]], 1.0).log_prob(Y[..., None]) * float(reads)
    given = {"mix": MIX.log(), "start": start.log(), "y": log_y}
    given |= {} if family.move is None else {"move": family.move.log()}
    tables = {key: value.clone().requires_grad_() for key, value in given.items()}
    move = tables["move"] if "move" in tables else tables["start"][:, None].expand(-1, start.shape[-1], -1)
    paths = torch.tensor(list(itertools.product(range(start.shape[-1]), repeat=Y.shape[-1])))
    steps = torch.cat([tables["start"][:, paths[:, :1]], move[:, paths[:, :-1], paths[:, 1:]]], -1)
    known = {"latent": torch.zeros_like(SEEN), "observed": torch.ones_like(SEEN)}.get(way, SEEN)
    log_joint = []
    for n in range(len(Y)):
        # What nothing reads is left out, as its counts are; a chain's step is read by the next one.
        used = known[n] | torch.tensor(reads or family.move is not None)
        log_paths = (steps * used).sum(-1) + tables["y"][n, torch.arange(Y.shape[-1]), paths].sum(-1)
        possible = torch.where(known[n], paths == STATES[n], used | (paths == 0)).all(-1)
        log_joint.append(tables["mix"] + log_paths[:, possible].logsumexp(-1))
    return Sum(torch.stack(log_joint), tables)


def data(name: str, way: str) -> Iterator[Tensor]:
    """The data, with one thing and another where they are missing."""
    values = FAMILIES[name].values
    x = values[STATES]
    fillers = [values[-1], torch.full_like(values[0], -1)]
    fillers += [torch.full_like(values[0], torch.nan)] if x.is_floating_point() else []
    seen = SEEN.reshape(SEEN.shape + (1,) * (x.dim() - 2))
    yield x
    if "mask" in way:
        yield from (torch.where(seen, x, filler) for filler in fillers)


def cases() -> Iterator[Any]:
    for name in FAMILIES:
        for way in WAYS:
            # Under a plain mask a program reads what stands there, as in Pyro; unless it is a chain.
            reads = "chain" in name or way in ("latent", "observed", "obs_mask")
            yield pytest.param(name, way, reads, id=f"{name}, {way}")


every_case = pytest.mark.parametrize(("name", "way", "reads"), list(cases()))


@every_case
def test_f_its_parts_and_the_posterior_are_those_of_all_paths(name: str, way: str, reads: bool) -> None:
    expected = summed(name, way, reads)
    log_evidence = expected.log_evidence.detach()
    free_energy = vfe.FreeEnergy()
    for x in data(name, way):
        assert free_energy.loss(program, None, name, way, x, reads) == pytest.approx(-float(log_evidence), abs=1e-10)
    terms = free_energy.decompose(program, guide, name, way, x, reads)
    assert terms.surprise.item() == pytest.approx(-float(log_evidence), abs=1e-10)
    assert terms.free_energy.item() == pytest.approx(float(expected.free_energy().detach()), abs=1e-10)
    posterior = vfe.posterior(program, name, way, x, reads)
    torch.testing.assert_close(posterior.log_evidence, log_evidence)
    torch.testing.assert_close(posterior.marginal("c").squeeze(), expected.log_joint.softmax(-1).detach())
    latent = {"x", "x_unobserved"} & set(posterior.sites)
    assert bool(latent) == (way in ("latent", "obs_mask") or ("chain" in name and way != "observed"))
    for site in latent:
        # Where another site than a chain is observed, its latent part is absent.
        there = ~SEEN if way == "obs_mask" and "chain" not in name else torch.ones_like(SEEN)
        torch.testing.assert_close(posterior.marginal(site)[there], expected.counts("y")[there])


@every_case
@pytest.mark.filterwarnings("ignore:EM stopped at max_iter")
def test_em_takes_shares_of_expected_counts(name: str, way: str, reads: bool) -> None:
    family, expected = FAMILIES[name], summed(name, way, reads)
    shares = {key: expected.shares(key) for key in expected.tables if key != "y"}
    *_, x = data(name, way)
    run = vfe.EM(program).run(name, way, x, reads, max_iter=1, progress_bar=False)
    assert all("closed form" in how for how in run.updates.values())
    torch.testing.assert_close(run.params["mix"], shares["mix"])
    torch.testing.assert_close(family.table(run.params["start"]), family.best(shares["start"]))
    if family.move is not None:
        torch.testing.assert_close(run.params["move"], shares["move"])


@pytest.mark.parametrize(
    ("name", "way", "reads"), [case for case in cases() if "chain" in case.values[0] or case.values[1] == "obs_mask"]
)
def test_fit_and_a_tree_have_the_same_numbers(name: str, way: str, reads: bool) -> None:
    expected = float(summed(name, way, reads).log_evidence.detach())
    *_, x = data(name, way)
    args = (name, way, x, reads)
    tree = vfe.to_datatree(program, None, *args, num_samples=3, progress_bar=False)
    (log_likelihood,) = tree["log_likelihood"].data_vars.values()
    assert log_likelihood.isel(chain=0, draw=0).sum().item() == pytest.approx(expected)
    assert tree["variational"]["surprise"].item() == pytest.approx(-expected)
    optim = pyro.optim.SGD({"lr": 1e-3})
    run = vfe.fit(program, None, *args, optim=optim, num_steps=2, progress_bar=False)
    assert run.losses[0] == pytest.approx(-expected)
    assert run.losses[1] < run.losses[0]
