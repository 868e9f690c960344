"""M-phases in closed form, against autograd of the log-density that they maximise, and against formulas of textbooks.

    objective(theta)  =  sum_n w_n log p(x_n | theta) + log p(theta)

The statistics are summed here, datum by datum, from T(x); the objective is torch's own log_prob.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import constraints, transform_to

from pyro_vfe.errors import DegenerateError, ProbabilityError
from pyro_vfe.learning.closed_forms import Proposal, certified, gradient, solve
from pyro_vfe.learning.pools import Pools
from pyro_vfe.learning.prior_pools import prior_pools
from pyro_vfe.learning.site_pools import data_pools
from pyro_vfe.program.families import form_of
from pyro_vfe.program.statistics import PriorStatistics, Selection, SiteStatistics, Slot, Statistics

Numbers = Mapping[str, Tensor]
PERTURBATIONS = 200


@dataclass(frozen=True)
class Read:
    """A distribution's parameter that is a selection of a learned one."""

    name: str
    select: Callable[[Tensor], Tensor] = lambda value: value
    sqrt: bool = False

    def value(self, values: Numbers) -> Tensor:
        chosen = self.select(values[self.name])
        return chosen.sqrt() if self.sqrt else chosen

    def slot(self, values: Numbers) -> Slot:
        entries = torch.arange(values[self.name].numel()).reshape(values[self.name].shape)
        through = "sqrt" if self.sqrt else "itself"
        chosen = Selection(self.name, self.select(entries), through)  # type: ignore[arg-type]
        return Slot(self.value(values), chosen, frozenset({self.name}))


@dataclass(frozen=True)
class Computed:
    """A distribution's parameter that is computed from learned ones in another way."""

    names: tuple[str, ...]
    compute: Callable[[Numbers], Tensor]

    def value(self, values: Numbers) -> Tensor:
        return self.compute(values)

    def slot(self, values: Numbers) -> Slot:
        return Slot(self.value(values), None, frozenset(self.names))


Given = Read | Computed | Tensor | float


def value_of(given: Given, values: Numbers) -> Tensor:
    return given.value(values) if isinstance(given, Read | Computed) else torch.as_tensor(given)


def slots_of(given: Mapping[str, Given], values: Numbers) -> dict[str, Slot]:
    return {
        name: own.slot(values) if isinstance(own, Read | Computed) else Slot(torch.as_tensor(own), None, frozenset())
        for name, own in given.items()
    }


@dataclass(frozen=True)
class Site:
    """N data x of one distribution with weights, `(N, *batch)`."""

    make: Callable[..., Any]
    slots: Mapping[str, Given]
    x: Tensor
    weights: Tensor
    events: int = 0

    def distribution(self, values: Numbers) -> Any:
        return self.make(**{name: value_of(own, values) for name, own in self.slots.items()}).to_event(self.events)

    def log_density(self, values: Numbers) -> Tensor:
        return (self.weights * self.distribution(values).log_prob(self.x)).sum()

    def statistics(self, values: Numbers) -> SiteStatistics:
        fn = self.distribution(values)
        form = form_of(fn)
        assert form is not None
        form = form.centred(self.x[:, 0] if fn.batch_shape else self.x)
        statistic = form.statistic(self.x)
        sums = (self.weights.unsqueeze(-1) * statistic).sum(0)
        counts = self.weights.sum(0)
        independent = tuple(form.independent)
        if independent:
            sums = sums.reshape(*counts.shape, *independent, -1)
            counts = counts.reshape(*counts.shape, *(1,) * len(independent)).expand(*counts.shape, *independent)
        slots = slots_of(self.slots, values)
        return SiteStatistics(("x",), form.family, slots, counts, sums, form.centre)


@dataclass(frozen=True)
class Prior:
    """A prior of a parameter."""

    make: Callable[..., Any]
    slots: Mapping[str, Given]
    value: Read
    weight: float = 1.0

    def log_density(self, values: Numbers) -> Tensor:
        fn = self.make(**{name: value_of(own, values) for name, own in self.slots.items()})
        return self.weight * fn.log_prob(self.value.value(values)).sum()

    def statistics(self, values: Numbers) -> PriorStatistics:
        form = form_of(self.make(**{name: value_of(own, values) for name, own in self.slots.items()}))
        assert form is not None
        slots = slots_of(self.slots, values)
        return PriorStatistics("prior", form.family, self.value.slot(values), slots, torch.tensor(self.weight))


@dataclass(frozen=True)
class Problem:
    """Data, priors and where the parameters start."""

    start: Mapping[str, tuple[Tensor, constraints.Constraint]]
    sites: tuple[Site, ...] = ()
    priors: tuple[Prior, ...] = ()
    names: tuple[str, ...] | None = None
    indirect: Mapping[str, str] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, Tensor]:
        return {name: value for name, (value, _) in self.start.items()}

    @property
    def learned(self) -> tuple[str, ...]:
        return self.names or tuple(self.start)

    @property
    def constraints(self) -> dict[str, constraints.Constraint]:
        return {name: constraint for name, (_, constraint) in self.start.items()}

    def objective(self, values: Numbers) -> Tensor:
        parts = [part.log_density(values) for part in (*self.sites, *self.priors)]
        return torch.stack(parts).sum()

    def pools(self) -> tuple[Pools, Pools]:
        statistics = Statistics(
            tuple(site.statistics(self.values) for site in self.sites),
            tuple(prior.statistics(self.values) for prior in self.priors),
            self.indirect,
        )
        data = data_pools(statistics, self.values)
        return data, prior_pools(statistics, self.values, data)

    def solve(self, floor: Any = None) -> Proposal:
        return solve(*self.pools(), self.values, self.learned, floor, self.constraints)

    def unconstrained(self, values: Numbers) -> dict[str, Tensor]:
        return {name: transform_to(self.constraints[name]).inv(values[name]).detach() for name in self.learned}

    def at(self, leaves: Numbers, values: Numbers) -> dict[str, Tensor]:
        return {**values, **{name: transform_to(self.constraints[name])(leaf) for name, leaf in leaves.items()}}

    def slope(self, values: Numbers) -> float:
        """The largest entry of the gradient in unconstrained coordinates."""
        leaves = {name: leaf.requires_grad_() for name, leaf in self.unconstrained(values).items()}
        slopes = torch.autograd.grad(self.objective(self.at(leaves, values)), list(leaves.values()))
        return max(float(slope.abs().max()) for slope in slopes)


def positive(*shape: int) -> Tensor:
    return torch.rand(shape) * 2 + 0.5


def probability(*shape: int) -> Tensor:
    return torch.rand(shape) * 0.8 + 0.1


def simplex(*shape: int) -> Tensor:
    return torch.randn(shape).softmax(-1)


def triangular(*shape: int) -> Tensor:
    return torch.randn(*shape, 2, 2).tril(-1) + torch.diag_embed(positive(*shape, 2))


def covariance(*shape: int) -> Tensor:
    factor = triangular(*shape)
    return factor @ factor.mT


POSITIVE, REAL, SIMPLEX, UNIT = constraints.positive, constraints.real, constraints.simplex, constraints.unit_interval
N, K = 40, 3


def weights(*shape: int) -> Tensor:
    return torch.rand(N, *shape)


def mixture(make: Any, name: str, start: Tensor, constraint: Any, x: Tensor, *priors: Prior, **known: Given) -> Problem:
    """Data of K components, each with its own parameter."""
    return Problem({name: (start, constraint)}, (Site(make, {name: Read(name), **known}, x, weights(K)),), priors)


def prior(make: Any, name: str, weight: float = 1.0, **slots: Given) -> Prior:
    return Prior(make, slots, Read(name), weight)


def binary() -> Tensor:
    return torch.randint(2, (N, 1)).double()


def counts() -> Tensor:
    return torch.randint(1, 9, (N, 1)).double()


def reals(offset: float = 3.0) -> Tensor:
    return torch.randn(N, 1) * 2 + offset


def vectors(offset: float = 3.0) -> Tensor:
    return torch.randn(N, 1, 2) @ triangular() + offset


def normals(loc: Any, scale: Any, /, *priors: Prior, make: Any = dist.Normal, **start: Any) -> Problem:
    x = reals().exp() if make is dist.LogNormal else reals()
    return Problem(start, (Site(make, {"loc": loc, "scale": scale}, x, weights(K)),), priors)


def vector_normals(loc: Any, given: str, spread: Any, /, *priors: Prior, **start: Any) -> Problem:
    return Problem(start, (Site(dist.MultivariateNormal, {"loc": loc, given: spread}, vectors(), weights(K)),), priors)


def tied_probability() -> Problem:
    one = Read("p")
    return Problem(
        {"p": (probability(), UNIT)},
        (
            Site(dist.Bernoulli, {"probs": one}, binary()[:, 0], weights()),
            Site(dist.Binomial, {"total_count": torch.tensor(9.0), "probs": one}, counts()[:, 0], weights()),
            Site(dist.Geometric, {"probs": one}, counts()[:, 0], weights()),
        ),
        (prior(dist.Beta, "p", concentration1=2.0, concentration0=3.5),),
    )


def tied_rate() -> Problem:
    return Problem(
        {"r": (positive(2), POSITIVE)},
        (
            Site(dist.Poisson, {"rate": Read("r")}, counts(), weights(2)),
            Site(dist.Exponential, {"rate": Read("r", lambda r: r[1])}, torch.rand(N) + 0.1, weights()),
            Site(dist.Gamma, {"concentration": 2.5, "rate": Read("r", lambda r: r[:1])}, positive(N, 1), weights(1)),
        ),
        (prior(dist.Gamma, "r", concentration=2.0, rate=torch.tensor([0.5, 3.0])),),
    )


def data_indexed() -> Problem:
    """Each datum has its group's location and its subject's scale."""
    group, subject = torch.randint(4, (N,)), torch.randint(3, (N,))
    slots = {"loc": Read("loc", lambda t: t[group]), "scale": Read("scale", lambda t: t[subject])}
    own = torch.randn(1, N) * subject.add(1)
    site = Site(dist.Normal, slots, own, torch.rand(1, N))
    return Problem({"loc": (torch.randn(4), REAL), "scale": (positive(3), POSITIVE)}, (site,))


def data_indexed_counts() -> Problem:
    """Each datum has the row of a table that another datum selects, and a latent."""
    group = torch.randint(4, (N,))
    site = Site(
        dist.Categorical,
        {"probs": Read("table", lambda t: t[:, group])},
        torch.randint(5, (1, 1, N)),
        torch.rand(1, K, N),
    )
    return Problem({"table": (simplex(K, 4, 5), SIMPLEX)}, (site,))


def diagonal_features() -> Problem:
    """A mixture with diagonal covariances, its features declared an event, one scale shared by all components."""
    slots = {"loc": Read("loc"), "scale": Read("scale")}
    site = Site(dist.Normal, slots, torch.randn(N, 1, 2) + torch.tensor([5.0, -3.0]), weights(K), events=1)
    return Problem({"loc": (torch.randn(K, 2), REAL), "scale": (positive(2), POSITIVE)}, (site,))


def normal_inverse_gamma(shared: bool) -> Problem:
    """A variance for each location, or one for all; the scale of the location's prior follows it."""
    follow = Computed(("variance",), lambda values: (values["variance"] / torch.tensor([2.0, 0.5, 3.0])).sqrt())
    return normals(
        Read("loc"),
        Read("variance", sqrt=True),
        prior(dist.Normal, "loc", loc=torch.tensor([1.0, 2.0, 3.0]), scale=follow),
        prior(dist.InverseGamma, "variance", concentration=2.5, rate=4.0),
        loc=(torch.randn(K), REAL),
        variance=(positive(1 if shared else K), POSITIVE),
    )


CASES: dict[str, Callable[[], Problem]] = {
    "Categorical": lambda: mixture(dist.Categorical, "probs", simplex(K, 4), SIMPLEX, torch.randint(4, (N, 1))),
    "Categorical with unnormalised probabilities": lambda: mixture(
        dist.Categorical, "probs", positive(K, 4), POSITIVE, torch.randint(4, (N, 1))
    ),
    "Categorical of logits": lambda: mixture(
        dist.Categorical, "logits", torch.randn(K, 4), constraints.real_vector, torch.randint(4, (N, 1))
    ),
    "Categorical with Dirichlet prior": lambda: mixture(
        dist.Categorical,
        "probs",
        simplex(K, 4),
        SIMPLEX,
        torch.randint(3, (N, 1)),
        prior(dist.Dirichlet, "probs", 2.0, concentration=positive(K, 4) + 1),
    ),
    "OneHotCategorical": lambda: mixture(
        dist.OneHotCategorical, "probs", simplex(K, 4), SIMPLEX, torch.eye(4)[torch.randint(4, (N, 1))]
    ),
    "Multinomial": lambda: mixture(
        lambda probs: dist.Multinomial(6, probs=probs),
        "probs",
        simplex(K, 4),
        SIMPLEX,
        dist.Multinomial(6, torch.ones(4)).sample((N, 1)),
        prior(dist.Dirichlet, "probs", concentration=torch.tensor([1.0, 2.0, 3.0, 4.0])),
    ),
    "permuted rows": lambda: Problem(
        {"probs": (simplex(K, 4), SIMPLEX)},
        (Site(dist.Categorical, {"probs": Read("probs", lambda t: t.flip(-1))}, torch.randint(4, (N, 1)), weights(K)),),
    ),
    "data-indexed table": data_indexed_counts,
    "Bernoulli": lambda: mixture(dist.Bernoulli, "probs", probability(K), UNIT, binary()),
    "Bernoulli of logits": lambda: mixture(dist.Bernoulli, "logits", torch.randn(K), REAL, binary()),
    "Bernoulli with Beta prior": lambda: mixture(
        dist.Bernoulli,
        "probs",
        probability(K),
        UNIT,
        binary(),
        prior(dist.Beta, "probs", 0.5, concentration1=positive(K) + 1, concentration0=positive(K) + 1),
    ),
    "Binomial": lambda: mixture(dist.Binomial, "probs", probability(K), UNIT, counts(), total_count=torch.tensor(9.0)),
    "Binomial of logits with prior": lambda: mixture(
        dist.Binomial, "logits", torch.randn(K), REAL, counts(), total_count=torch.tensor(9.0)
    ),
    "NegativeBinomial": lambda: mixture(
        dist.NegativeBinomial, "probs", probability(K), UNIT, counts(), total_count=torch.tensor(2.5)
    ),
    "Geometric": lambda: mixture(dist.Geometric, "probs", probability(K), UNIT, counts()),
    "tied probability": tied_probability,
    "Poisson": lambda: mixture(dist.Poisson, "rate", positive(K), POSITIVE, counts()),
    "Exponential": lambda: mixture(dist.Exponential, "rate", positive(K), POSITIVE, torch.rand(N, 1) + 0.1),
    "Exponential with Gamma prior": lambda: mixture(
        dist.Exponential,
        "rate",
        positive(K),
        POSITIVE,
        torch.rand(N, 1) + 0.1,
        prior(dist.Gamma, "rate", 3.0, concentration=2.0, rate=torch.tensor([1.0, 2.0, 3.0])),
    ),
    "Poisson with Exponential prior": lambda: mixture(
        dist.Poisson, "rate", positive(K), POSITIVE, counts(), prior(dist.Exponential, "rate", rate=0.7)
    ),
    "Gamma": lambda: mixture(
        dist.Gamma, "rate", positive(K), POSITIVE, positive(N, 1), concentration=torch.tensor([1.0, 2.0, 3.5])
    ),
    "InverseGamma": lambda: mixture(
        dist.InverseGamma, "rate", positive(K), POSITIVE, positive(N, 1), concentration=torch.tensor(2.0)
    ),
    "tied rate": tied_rate,
    "Normal": lambda: normals(Read("loc"), Read("scale"), loc=(torch.randn(K), REAL), scale=(positive(K), POSITIVE)),
    "LogNormal": lambda: normals(
        Read("loc"), Read("scale"), make=dist.LogNormal, loc=(torch.randn(K), REAL), scale=(positive(K), POSITIVE)
    ),
    "HalfNormal": lambda: mixture(dist.HalfNormal, "scale", positive(K), POSITIVE, reals().abs()),
    "Normal of shared scale": lambda: normals(
        Read("loc"), Read("scale"), loc=(torch.randn(K), REAL), scale=(positive(), POSITIVE)
    ),
    "Normal of shared location": lambda: normals(
        Read("loc"), Read("scale"), loc=(torch.randn(()), REAL), scale=(positive(K), POSITIVE)
    ),
    "Normal of known scale": lambda: normals(Read("loc"), torch.tensor([1.0, 2.0, 0.5]), loc=(torch.randn(()), REAL)),
    "Normal of known location": lambda: normals(
        torch.tensor([1.0, 2.0, 0.5]), Read("scale"), scale=(positive(), POSITIVE)
    ),
    "Normal of variance": lambda: normals(
        Read("loc"), Read("variance", sqrt=True), loc=(torch.randn(K), REAL), variance=(positive(K), POSITIVE)
    ),
    "Normal with Normal prior and known scale": lambda: normals(
        Read("loc"),
        torch.tensor([1.0, 2.0, 0.5]),
        prior(dist.Normal, "loc", 2.0, loc=torch.tensor([0.0, 1.0, 2.0]), scale=0.3),
        loc=(torch.randn(K), REAL),
    ),
    "Normal with Normal prior": lambda: normals(
        Read("loc"),
        Read("scale"),
        prior(dist.Normal, "loc", loc=torch.tensor([0.0, 1.0, 2.0]), scale=0.3),
        loc=(torch.randn(K), REAL),
        scale=(positive(K), POSITIVE),
    ),
    "Normal with InverseGamma prior": lambda: normals(
        torch.tensor(2.0),
        Read("variance", sqrt=True),
        prior(dist.InverseGamma, "variance", concentration=2.0, rate=torch.tensor([1.0, 2.0, 3.0])),
        variance=(positive(K), POSITIVE),
    ),
    "normal-inverse-gamma": lambda: normal_inverse_gamma(shared=False),
    "normal-inverse-gamma of a shared variance": lambda: normal_inverse_gamma(shared=True),
    "normal-inverse-gamma with the data's own scale": lambda: normals(
        Read("loc"),
        Read("variance", sqrt=True),
        prior(dist.Normal, "loc", loc=0.5, scale=Read("variance", sqrt=True)),
        loc=(torch.randn(K), REAL),
        variance=(positive(K), POSITIVE),
    ),
    "crossed groups": data_indexed,
    "diagonal features": diagonal_features,
    "MultivariateNormal of scale_tril": lambda: vector_normals(
        Read("loc"),
        "scale_tril",
        Read("tril"),
        loc=(torch.randn(K, 2), constraints.real_vector),
        tril=(triangular(K), constraints.lower_cholesky),
    ),
    "MultivariateNormal of covariance_matrix": lambda: vector_normals(
        Read("loc"),
        "covariance_matrix",
        Read("cov"),
        loc=(torch.randn(K, 2), constraints.real_vector),
        cov=(covariance(K), constraints.positive_definite),
    ),
    "MultivariateNormal of shared precision_matrix": lambda: vector_normals(
        Read("loc"),
        "precision_matrix",
        Read("precision"),
        loc=(torch.randn(K, 2), constraints.real_vector),
        precision=(covariance(), constraints.positive_definite),
    ),
    "MultivariateNormal of shared location": lambda: vector_normals(
        Read("loc"),
        "scale_tril",
        Read("tril"),
        loc=(torch.randn(2), constraints.real_vector),
        tril=(triangular(K), constraints.lower_cholesky),
    ),
    "MultivariateNormal of known covariance": lambda: vector_normals(
        Read("loc"), "covariance_matrix", covariance(K), loc=(torch.randn(2), constraints.real_vector)
    ),
    "MultivariateNormal of known location": lambda: vector_normals(
        torch.randn(K, 2), "scale_tril", Read("tril"), tril=(triangular(), constraints.lower_cholesky)
    ),
    "MultivariateNormal with MultivariateNormal prior": lambda: vector_normals(
        Read("loc"),
        "scale_tril",
        Read("tril"),
        prior(dist.MultivariateNormal, "loc", loc=torch.zeros(2), scale_tril=triangular() / 5),
        loc=(torch.randn(K, 2), constraints.real_vector),
        tril=(triangular(K), constraints.lower_cholesky),
    ),
    "MultivariateNormal with Normal prior": lambda: vector_normals(
        Read("loc"),
        "covariance_matrix",
        covariance(K),
        prior(dist.Normal, "loc", loc=torch.tensor([0.0, 1.0]), scale=torch.tensor([0.1, 0.3])),
        loc=(torch.randn(K, 2), constraints.real_vector),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_vanishes_at_the_closed_form(name: str) -> None:
    problem = CASES[name]()
    proposal = problem.solve()
    assert not proposal.refused
    assert set(proposal.words) == set(problem.start)
    best = {**problem.values, **proposal.values}
    assert problem.slope(best) < 1e-9 * (1 + problem.slope(problem.values))


@pytest.mark.parametrize("name", CASES)
def test_no_perturbation_beats_the_closed_form(name: str) -> None:
    problem = CASES[name]()
    best = {**problem.values, **problem.solve().values}
    leaves = problem.unconstrained(best)
    worth = problem.objective(best)
    rounding = 1e-12 * float(worth.abs() + 1)
    assert worth > problem.objective(problem.values)
    for number in range(PERTURBATIONS):
        length = 10.0 ** -(number % 5)
        moved = {key: leaf + length * torch.randn(leaf.shape) for key, leaf in leaves.items()}
        assert problem.objective(problem.at(moved, best)) <= worth + rounding


@pytest.mark.parametrize("name", CASES)
def test_the_certificate_tells_the_best_value_from_its_neighbours(name: str) -> None:
    problem = CASES[name]()
    best = {**problem.values, **problem.solve().values}
    assert all(certified(*problem.pools(), best, problem.learned).values())
    leaves = problem.unconstrained(best)
    for key, leaf in leaves.items():
        moved = {**leaves, key: leaf + 1e-7 * torch.randn(leaf.shape)}
        assert not certified(*problem.pools(), problem.at(moved, best), [key])[key]


COORDINATES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "Categorical with Dirichlet prior": (torch.log, lambda t: t.softmax(-1)),
    "Categorical of logits": (lambda t: t, lambda t: t),
    "Multinomial": (torch.log, lambda t: t.softmax(-1)),
    "tied probability": (torch.logit, torch.sigmoid),
    "Bernoulli of logits": (lambda t: t, lambda t: t),
    "tied rate": (torch.log, torch.exp),
    "HalfNormal": (torch.log, torch.exp),
    "Normal of known location": (torch.log, torch.exp),
    "Normal with InverseGamma prior": (lambda t: t.log() / 2, lambda t: (2 * t).exp()),
}
"""A coordinate and its inverse, for problems of one parameter."""


@pytest.mark.parametrize("name", COORDINATES)
def test_the_gradient_is_that_of_the_log_density(name: str) -> None:
    problem = CASES[name]()
    ((key, value),) = problem.values.items()
    to, back = COORDINATES[name]
    leaf = to(value).requires_grad_()
    (slope,) = torch.autograd.grad(problem.objective({key: back(leaf)}), leaf)
    torch.testing.assert_close(gradient(*problem.pools(), problem.values)[key], slope, rtol=1e-10, atol=1e-10)


def halves(problem: Problem) -> list[Problem]:
    """The problem with the first and with the last of its data, without priors."""
    cut = [slice(0, 13), slice(13, None)]
    return [
        Problem(
            problem.start,
            tuple(Site(s.make, s.slots, s.x[c], s.weights[c], s.events) for s in problem.sites),
        )
        for c in cut
    ]


def assert_same(actual: Pools, expected: Pools, problem: Problem, rtol: float = 1e-10) -> None:
    """Both pools have the same gradient anywhere, and the same solution."""
    mine, theirs = gradient(actual, Pools(), problem.values), gradient(expected, Pools(), problem.values)
    assert mine.keys() == theirs.keys()
    for key in mine:
        torch.testing.assert_close(mine[key], theirs[key], rtol=rtol, atol=rtol)
    found, right = (solve(pools, Pools(), problem.values, list(problem.start)) for pools in (actual, expected))
    assert not found.refused
    for key in problem.start:
        torch.testing.assert_close(found.values[key], right.values[key], rtol=rtol, atol=rtol)


DATA_INDEXED = ("crossed groups", "data-indexed table")
SPLIT = [name for name in CASES if name not in DATA_INDEXED]


@pytest.mark.parametrize("name", SPLIT)
def test_the_pools_of_halves_add_to_those_of_the_whole(name: str) -> None:
    problem = CASES[name]()
    first, last = (half.pools()[0] for half in halves(problem))
    assert_same(first + last, problem.pools()[0], problem)


@pytest.mark.parametrize("name", SPLIT)
def test_what_was_added_can_be_decayed_and_taken_away(name: str) -> None:
    problem = CASES[name]()
    first, last = (half.pools()[0] for half in halves(problem))
    assert_same(last + first.scaled(0.25) + last.scaled(-1.0), first.scaled(0.25), problem)


def test_pools_are_of_the_size_of_the_parameters() -> None:
    data, _ = data_indexed().pools()
    (moments,) = data.moments.values()
    assert len(moments.weight) <= 4 * 3


@pytest.mark.parametrize("shared", [False, True])
def test_data_far_from_zero_keep_their_precision(shared: bool) -> None:
    offset = 1e8
    near = torch.randn(N, 1).mul(1024).round() / 1024  # exact also at the offset
    own = weights(K)
    start = {"loc": (torch.zeros(K), REAL), "scale": (torch.ones(1 if shared else K), POSITIVE)}
    slots = {"loc": Read("loc"), "scale": Read("scale")}
    far = Problem(start, (Site(dist.Normal, slots, near + offset, own),))
    first, last = (half.pools()[0] for half in halves(far))
    loc = (own * near).sum(0) / own.sum(0)
    squares = (own * (near - loc) ** 2).sum(0)
    scale = (squares.sum() / own.sum()).sqrt().reshape(1) if shared else (squares / own.sum(0)).sqrt()
    for proposal in (far.solve(), solve(first + last, Pools(), far.values, ["loc", "scale"])):
        assert not proposal.refused
        torch.testing.assert_close(proposal.values["loc"] - offset, loc, rtol=0, atol=2e-8)
        torch.testing.assert_close(proposal.values["scale"], scale, rtol=1e-7, atol=0)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(0, 10), min_size=12, max_size=12).filter(lambda own: min(own[:6]) > 1e-3))
def test_weighted_means_hold_for_any_weights(own: list[float]) -> None:
    torch.set_default_dtype(torch.float64)
    weight = torch.tensor(own).reshape(12, 1)
    x = torch.arange(12.0).reshape(12, 1).square() + 1
    both = Problem(
        {"loc": (torch.zeros(1), REAL), "scale": (torch.ones(1), POSITIVE), "rate": (torch.ones(1), POSITIVE)},
        (
            Site(dist.Normal, {"loc": Read("loc"), "scale": Read("scale")}, x, weight),
            Site(dist.Poisson, {"rate": Read("rate")}, x, weight),
        ),
    )
    values = both.solve().values
    mean = (weight * x).sum() / weight.sum()
    torch.testing.assert_close(values["rate"][0], mean)
    torch.testing.assert_close(values["loc"][0], mean)
    torch.testing.assert_close(values["scale"][0] ** 2, (weight * (x - mean) ** 2).sum() / weight.sum())


def test_modes_are_those_of_the_textbooks() -> None:
    """Gelman et al. (2013), sections 2.4 to 2.6 and 3.4; Murphy (2012), equations 3.27 and 3.47."""
    x, n = counts()[:, 0], float(N)
    ones = torch.ones(N)
    coin = Problem(
        {"p": (probability(), UNIT)},
        (Site(dist.Binomial, {"total_count": torch.tensor(9.0), "probs": Read("p")}, x, ones),),
        (prior(dist.Beta, "p", concentration1=2.0, concentration0=5.0),),
    )
    torch.testing.assert_close(coin.solve().values["p"], (x.sum() + 1) / (9 * n + 5))
    rate = Problem(
        {"r": (positive(), POSITIVE)},
        (Site(dist.Poisson, {"rate": Read("r")}, x, ones),),
        (prior(dist.Gamma, "r", concentration=3.0, rate=2.0),),
    )
    torch.testing.assert_close(rate.solve().values["r"], (x.sum() + 2) / (n + 2))
    alpha = torch.tensor([1.5, 2.0, 4.0])
    z = torch.randint(3, (N,))
    die = Problem(
        {"p": (simplex(3), SIMPLEX)},
        (Site(dist.Categorical, {"probs": Read("p")}, z, ones),),
        (prior(dist.Dirichlet, "p", concentration=alpha),),
    )
    seen = torch.bincount(z, minlength=3)
    torch.testing.assert_close(die.solve().values["p"], (seen + alpha - 1) / (n + alpha.sum() - 3))
    known = Problem(
        {"m": (torch.zeros(()), REAL)},
        (Site(dist.Normal, {"loc": Read("m"), "scale": torch.tensor(2.0)}, x, ones),),
        (prior(dist.Normal, "m", loc=1.0, scale=0.5),),
    )
    torch.testing.assert_close(known.solve().values["m"], (1 / 0.25 + x.sum() / 4) / (1 / 0.25 + n / 4))


def test_the_mode_of_normal_inverse_gamma_is_that_of_the_textbooks() -> None:
    """Gelman et al. (2013), section 3.3: the joint density of location and variance, at its mode."""
    x, n = reals()[:, 0], float(N)
    a, b, m, k = 2.5, 4.0, 1.0, 3.0
    follow = Computed(("v",), lambda values: (values["v"] / k).sqrt())
    problem = Problem(
        {"m": (torch.zeros(()), REAL), "v": (positive(), POSITIVE)},
        (Site(dist.Normal, {"loc": Read("m"), "scale": Read("v", sqrt=True)}, x, torch.ones(N)),),
        (prior(dist.Normal, "m", loc=m, scale=follow), prior(dist.InverseGamma, "v", concentration=a, rate=b)),
    )
    proposal = problem.solve()
    squares = ((x - x.mean()) ** 2).sum() + k * n / (k + n) * (x.mean() - m) ** 2
    torch.testing.assert_close(proposal.values["m"], (k * m + x.sum()) / (k + n))
    torch.testing.assert_close(proposal.values["v"], (2 * b + squares) / (n + 2 * a + 3))
    assert "InverseGamma prior" in proposal.words["v"] and "Normal prior" in proposal.words["m"]


def test_what_was_never_visited_keeps_its_old_value() -> None:
    own = torch.rand(N, K)
    own[:, 1] = 0.0
    slots = {"loc": Read("loc"), "scale": Read("scale")}
    problem = Problem(
        {
            "probs": (simplex(K, 4), SIMPLEX),
            "p": (probability(K), UNIT),
            "rate": (positive(K), POSITIVE),
            "loc": (torch.randn(K), REAL),
            "scale": (positive(K), POSITIVE),
            "mean": (torch.randn(K, 2), constraints.real_vector),
            "tril": (triangular(K), constraints.lower_cholesky),
        },
        (
            Site(dist.Categorical, {"probs": Read("probs")}, torch.randint(4, (N, 1)), own),
            Site(dist.Bernoulli, {"probs": Read("p")}, binary(), own),
            Site(dist.Poisson, {"rate": Read("rate")}, counts(), own),
            Site(dist.Normal, slots, reals(), own),
            Site(dist.MultivariateNormal, {"loc": Read("mean"), "scale_tril": Read("tril")}, vectors(), own),
        ),
    )
    proposal = problem.solve()
    assert not proposal.refused
    for name, value in problem.values.items():
        assert torch.equal(proposal.values[name][1], value[1])
        assert not any(torch.allclose(proposal.values[name][row], value[row]) for row in (0, 2))
        assert f"Never visited, and left as before: '{name}'[1]." in proposal.notes
    assert all(certified(*problem.pools(), proposal.values, problem.learned).values())


def one_datum(*shape: int) -> Tensor:
    """Weights of which the second component has one datum alone."""
    own = torch.rand(N, *shape)
    own[1:, 1] = 0.0
    return own


DEGENERATE: dict[str, tuple[Callable[[], Problem], str]] = {
    "a variance": (
        lambda: Problem(
            {"loc": (torch.zeros(K), REAL), "scale": (torch.ones(K), POSITIVE)},
            (Site(dist.Normal, {"loc": Read("loc"), "scale": Read("scale")}, reals(), one_datum(K)),),
        ),
        r"A variance falls to zero, .*: 'scale'\[1\]\.",
    ),
    "a covariance": (
        lambda: Problem(
            {
                "loc": (torch.zeros(2), constraints.real_vector),
                "cov": (torch.eye(2), constraints.positive_definite),
            },
            (
                Site(
                    dist.MultivariateNormal,
                    {"loc": Read("loc"), "covariance_matrix": Read("cov")},
                    torch.randn(N, 1) * torch.tensor([1.0, 2.0]),
                    weights(),
                ),
            ),
        ),
        r"A variance falls to zero, .*: 'cov'\.",
    ),
    "no events": (
        lambda: mixture(dist.Poisson, "rate", positive(K), POSITIVE, torch.zeros(N, 1)),
        r"A rate falls to zero, .*: 'rate'\[0\], 'rate'\[1\], 'rate'\[2\]\.",
    ),
    "no exposure": (
        lambda: mixture(dist.Exponential, "rate", positive(K), POSITIVE, torch.zeros(N, 1)),
        r"A rate grows beyond all numbers",
    ),
    "log-odds": (
        lambda: mixture(dist.Bernoulli, "logits", torch.randn(K), REAL, torch.ones(N, 1)),
        r"Log-odds are infinite",
    ),
    "a Dirichlet below one": (
        lambda: mixture(
            dist.Categorical,
            "probs",
            simplex(K, 4),
            SIMPLEX,
            torch.randint(3, (N, 1)),
            prior(dist.Dirichlet, "probs", concentration=torch.full((4,), 0.5)),
        ),
        r"The best probability is zero, .*: 'probs'\[0, 3\], 'probs'\[1, 3\], 'probs'\[2, 3\]\.",
    ),
    "a Beta below one": (
        lambda: mixture(
            dist.Bernoulli,
            "probs",
            probability(K),
            UNIT,
            torch.zeros(N, 1),
            prior(dist.Beta, "probs", concentration1=0.5, concentration0=0.5),
        ),
        r"The best probability is 0 or 1",
    ),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_parameters_are_named_and_a_floor_mends_them(name: str) -> None:
    make, words = DEGENERATE[name]
    with pytest.raises(DegenerateError, match=words) as caught:
        make().solve()
    assert ("floor=" in str(caught.value)) == (name != "no exposure")
    if name == "no exposure":
        return  # a floor is no ceiling
    torch.manual_seed(0)
    problem = make()
    floor = 0.01
    proposal = problem.solve(floor)
    assert not proposal.refused
    assert any("At the floor" in note for note in proposal.notes)
    best = {**problem.values, **proposal.values}
    assert all(bool(value.isfinite().all()) for value in best.values())
    assert all(certified(*problem.pools(), best, problem.learned, floor).values())


def test_a_prior_without_a_mode_and_without_data_is_named_also_with_a_floor() -> None:
    own = torch.rand(N, K)
    own[:, 1] = 0.0
    problem = Problem(
        {"probs": (simplex(K, 4), SIMPLEX)},
        (Site(dist.Categorical, {"probs": Read("probs")}, torch.randint(4, (N, 1)), own),),
        (prior(dist.Dirichlet, "probs", concentration=torch.full((4,), 0.9)),),
    )
    with pytest.raises(DegenerateError, match=r"without counts, .*: 'probs'\[1, 0\], 'probs'\[1, 1\]"):
        problem.solve(0.01)


def raised(name: str, value: Tensor, floor: float) -> Tensor:
    """A value that respects the floor, near the given one."""
    if name == "probs of a simplex":
        return floor + (1 - value.shape[-1] * floor) * value
    if name == "probs":
        return value.clamp(floor, 1 - floor)
    if name in ("scale_tril", "covariance_matrix", "precision_matrix"):
        tril = name == "scale_tril"
        variance, axes = torch.linalg.eigh(value @ value.mT if tril else value)
        variance = 1 / variance if name == "precision_matrix" else variance
        variance = variance.clamp(min=floor**2 if tril else floor)
        variance = 1 / variance if name == "precision_matrix" else variance
        matrix = axes @ torch.diag_embed(variance) @ axes.mT
        return torch.linalg.cholesky(matrix) if tril else matrix
    return value.clamp(min=floor)


FLOORS: dict[str, tuple[str, float]] = {
    "Categorical with Dirichlet prior": ("probs of a simplex", 0.2),
    "Multinomial": ("probs of a simplex", 0.24),
    "Bernoulli": ("probs", 0.495),
    "Poisson": ("rate", 4.5),
    "Normal of shared location": ("scale", 2.0),
    "Normal of variance": ("variance", 8.0),
    "MultivariateNormal of scale_tril": ("scale_tril", 1.0),
    "MultivariateNormal of covariance_matrix": ("covariance_matrix", 1.5),
    "MultivariateNormal of shared precision_matrix": ("precision_matrix", 1.5),
}


@pytest.mark.parametrize("name", FLOORS)
def test_the_floored_value_is_the_best_of_those_above_the_floor(name: str) -> None:
    problem = CASES[name]()
    kind, floor = FLOORS[name]
    proposal = problem.solve(floor)
    assert not proposal.refused
    assert any("At the floor" in note for note in proposal.notes)
    assert problem.objective({**problem.values, **problem.solve().values}) > problem.objective(proposal.values)
    best = {**problem.values, **proposal.values}
    leaves = problem.unconstrained(best)
    worth = problem.objective(best)
    for number in range(PERTURBATIONS):
        length = 10.0 ** -(number % 5)
        moved = problem.at({key: leaf + length * torch.randn(leaf.shape) for key, leaf in leaves.items()}, best)
        moved = {key: value if key == "loc" else raised(kind, value, floor) for key, value in moved.items()}
        assert problem.objective(moved) <= worth + 1e-12 * worth.abs()


def test_a_floor_that_leaves_no_probabilities_is_refused() -> None:
    with pytest.raises(ProbabilityError, match=r"floor 0\.3 of 'probs'"):
        CASES["Categorical"]().solve(0.3)
    with pytest.raises(ProbabilityError, match=r"floor 0\.6 of 'probs'"):
        CASES["Bernoulli"]().solve({"probs": 0.6})


def test_a_floor_for_another_parameter_changes_nothing() -> None:
    problem = CASES["Poisson"]()
    assert torch.equal(problem.solve({"other": 100.0}).values["rate"], problem.solve().values["rate"])


def gamma_of_both() -> Problem:
    slots = {"concentration": Read("shape"), "rate": Read("rate")}
    start = {"shape": (positive(K), POSITIVE), "rate": (positive(K), POSITIVE)}
    return Problem(start, (Site(dist.Gamma, slots, positive(N, 1), weights(K)),))


def beside_a_product(names: tuple[str, ...] | None = None) -> Problem:
    loc = Computed(("slope",), lambda values: values["slope"] * torch.arange(3.0))
    start = {"slope": (torch.ones(()), REAL), "scale": (positive(), POSITIVE)}
    return Problem(start, (Site(dist.Normal, {"loc": loc, "scale": Read("scale")}, reals(), weights(K)),), (), names)


def of_two_forms() -> Problem:
    slots = {"loc": Read("a"), "scale": Read("scale")}
    start = {"a": (positive(K), POSITIVE), "scale": (positive(), POSITIVE)}
    sites = (
        Site(dist.Poisson, {"rate": Read("a")}, counts(), weights(K)),
        Site(dist.Normal, slots, reals(), weights(K)),
    )
    return Problem(start, sites)


def of_part_of_a_row() -> Problem:
    slots = {"probs": Read("p", lambda t: t[:2])}
    return Problem({"p": (simplex(3), SIMPLEX)}, (Site(dist.Categorical, slots, torch.randint(2, (N,)), weights()),))


def of_one_entry_of_a_simplex() -> Problem:
    slots = {"probs": Read("p", lambda t: t[0])}
    return Problem({"p": (simplex(3), SIMPLEX)}, (Site(dist.Bernoulli, slots, binary()[:, 0], weights()),))


def with_prior(own: Prior, name: str, start: Tensor, constraint: Any, make: Any, x: Tensor) -> Problem:
    return mixture(make, name, start, constraint, x, own)


REFUSED: dict[str, tuple[Callable[[], Problem], dict[str, str]]] = {
    "a concentration": (
        gamma_of_both,
        {"shape": "no closed form for the concentration of site 'x'", "rate": "'shape', which a site reads beside it"},
    ),
    "a product": (
        beside_a_product,
        {"slope": "otherwise than by selecting entries", "scale": "'slope', which a site reads beside it"},
    ),
    "two forms": (
        of_two_forms,
        {"a": "it is the rate of a rate in one place and the loc of a location in another", "scale": "'a', which"},
    ),
    "part of a row": (of_part_of_a_row, {"p": "does not select whole rows"}),
    "one entry of a simplex": (of_one_entry_of_a_simplex, {"p": "violates its constraint"}),
    "a narrow interval": (
        lambda: mixture(dist.Poisson, "rate", positive(K), constraints.interval(0.1, 3.0), counts()),
        {"rate": "violates its constraint"},
    ),
    "another prior": (
        lambda: mixture(
            dist.Poisson, "rate", positive(K), POSITIVE, counts(), prior(dist.LogNormal, "rate", loc=0.0, scale=1.0)
        ),
        {"rate": "its prior, site 'prior', is not conjugate to the rate of a rate"},
    ),
    "an inverse gamma of a scale": (
        lambda: mixture(
            dist.HalfNormal,
            "scale",
            positive(K),
            POSITIVE,
            reals().abs(),
            prior(dist.InverseGamma, "scale", concentration=2.0, rate=1.0),
        ),
        {"scale": "is not conjugate to the scale of a spread"},
    ),
    "a learned prior": (
        lambda: Problem(
            {"loc": (torch.randn(K), REAL), "mean": (torch.zeros(()), REAL)},
            (Site(dist.Normal, {"loc": Read("loc"), "scale": torch.tensor(1.0)}, reals(), weights(K)),),
            (prior(dist.Normal, "loc", loc=Read("mean"), scale=1.0),),
        ),
        {"loc": "is not conjugate", "mean": "the prior of 'loc', site 'prior', reads it"},
    ),
    "indirect": (
        lambda: Problem(
            {"rate": (positive(), POSITIVE)},
            (Site(dist.Poisson, {"rate": Read("rate")}, counts()[:, 0], weights()),),
            indirect={"rate": "site 'y' computes with it"},
        ),
        {"rate": "site 'y' computes with it"},
    ),
    "a root": (
        lambda: Problem(
            {"rate": (positive(), POSITIVE)},
            (Site(dist.Poisson, {"rate": Read("rate", sqrt=True)}, counts()[:, 0], weights()),),
        ),
        {"rate": "takes its sqrt as rate"},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_closed_form_is_refused_with_the_reason(name: str) -> None:
    make, reasons = REFUSED[name]
    proposal = make().solve()
    assert proposal.refused.keys() == reasons.keys()
    assert not proposal.values
    for key, words in reasons.items():
        assert words in proposal.refused[key]


def test_what_is_held_beside_a_parameter_takes_no_closed_form_from_it() -> None:
    problem = beside_a_product(("scale",))
    proposal = problem.solve()
    assert not proposal.refused
    best = {**problem.values, **proposal.values}
    assert problem.slope(best) < 1e-9 * (1 + problem.slope(problem.values))


@pytest.mark.parametrize("held", ["loc", "scale"])
def test_one_is_best_given_the_other_that_is_held(held: str) -> None:
    whole = CASES["Normal of shared location"]()
    problem = Problem(whole.start, whole.sites, names=tuple({"loc", "scale"} - {held}))
    best = {**problem.values, **problem.solve().values}
    assert torch.equal(best[held], problem.values[held])
    assert problem.slope(best) < 1e-9 * (1 + problem.slope(problem.values))


def test_single_precision_is_kept_and_certified() -> None:
    problem = CASES["Normal"]()
    data, priors = problem.pools()
    single = {name: value.float() for name, value in problem.values.items()}
    proposal = solve(data, priors, single, ["loc", "scale"])
    assert not proposal.refused
    for name, value in problem.solve().values.items():
        assert proposal.values[name].dtype == torch.float32
        torch.testing.assert_close(proposal.values[name], value.float())
