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


def mixture(
    make: Any, name: str, start: Tensor, constraint: Any, x: Tensor, *priors: Prior, **known: Given
) -> Problem:
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
    "Categorical": lambda: mixture(
        dist.Categorical, "probs", simplex(K, 4), SIMPLEX, torch.randint(4, (N, 1))
    ),
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
    "Binomial": lambda: mixture(
        dist.Binomial, "probs", probability(K), UNIT, counts(), total_count=torch.tensor(9.0)
    ),
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
    "Normal": lambda: normals(
        Read("loc"), Read("scale"), loc=(torch.randn(K), REAL), scale=(positive(K), POSITIVE)
    ),
    "LogNormal": lambda: normals(
        Read("loc"), Read("scale"), make=dist.LogNormal, loc=(torch.randn(K), REAL), scale=(positive(K), POSITIVE)
    ),
    "HalfNormal": lambda: mixture(
        dist.HalfNormal, "scale", positive(K), POSITIVE, reals().abs()
    ),
    "Normal of shared scale": lambda: normals(
        Read("loc"), Read("scale"), loc=(torch.randn(K), REAL), scale=(positive(), POSITIVE)
    ),
    "Normal of shared location": lambda: normals(
        Read("loc"), Read("scale"), loc=(torch.randn(()), REAL), scale=(positive(K), POSITIVE)
    ),
    "Normal of known scale": lambda: normals(
        Read("loc"), torch.tensor([1.0, 2.0, 0.5]), loc=(torch.randn(()), REAL)
    ),
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
