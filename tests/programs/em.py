"""Programs that EM learns: what they start from is given, so that an oracle can start from the same.

Each factory takes the starting values of its parameters by name and returns a model of the data alone. The names are
those of the oracles.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoDelta, init_to_value
from torch import Tensor
from torch.distributions import constraints

import pyro_vfe as vfe
from programs.case import bernoulli, categorical, tensor

Model = Callable[..., None]
Start = Mapping[str, Any]

CONSTRAINTS = {
    "theta": constraints.unit_interval,
    "probs": constraints.unit_interval,
    "weights": constraints.simplex,
    "initial": constraints.simplex,
    "transition": constraints.simplex,
    "emission": constraints.simplex,
    "rates": constraints.positive,
    "scale": constraints.positive,
    "variance": constraints.positive,
    "loc": constraints.real,
    "means": constraints.real,
    "covariance": constraints.positive_definite,
    "scale_tril": constraints.lower_cholesky,
}

# The four cells of the linkage data, for each value of the latents: the first cell is the sum of two.
CELL_OF_HALF = tensor([1.0, 0.0, 0.0, 0.0])
CELLS_OF_LINKED = tensor([[0.0, 0.5, 0.5, 0.0], [0.5, 0.0, 0.0, 0.5]])
CELLS_OF_FIVE = tensor([[1.0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


def learned(name: str, start: Start) -> Tensor:
    """A parameter of its usual constraint."""
    value = np.array(start[name], dtype=float)
    return pyro.param(name, lambda: torch.tensor(value), constraint=CONSTRAINTS[name])


# Linkage: half of the probability is one cell's; of the rest, theta says whether two genes went together


def linkage(start: Start, where: str) -> Model:
    """Theta feeds a Bernoulli of its own.

    Args:
        start: theta.
        where: How the half that theta says nothing of is left out: `masked` (the site does not exist there) or
            `selected` (it reads an entry of theta there that nothing else reads; theta has two).
    """

    def cell(half: Tensor, linked: Tensor) -> Tensor:
        return torch.where(half.bool().unsqueeze(-1), CELL_OF_HALF, CELLS_OF_LINKED[linked.long()])

    def masked(counts: Tensor) -> None:
        theta = learned("theta", start)
        with pyro.plate("cells", len(counts)), pyro.poutine.scale(scale=counts):
            half = bernoulli("half", 0.5)
            with pyro.poutine.mask(mask=half == 0):
                linked = bernoulli("linked", theta)
            pyro.sample("cell", dist.Categorical(cell(half, linked)), obs=torch.arange(4))

    def selected(counts: Tensor) -> None:
        theta = learned("theta", {"theta": np.full(2, start["theta"])})
        with pyro.plate("cells", len(counts)), pyro.poutine.scale(scale=counts):
            half = bernoulli("half", 0.5)
            linked = bernoulli("linked", theta[half.long()])
            pyro.sample("cell", dist.Categorical(cell(half, linked)), obs=torch.arange(4))

    return {"masked": masked, "selected": selected}[where]


def linkage_indirect(start: Start) -> Model:
    """Theta makes the probabilities of one Categorical over five cells, of which two are seen as one."""

    def model(counts: Tensor) -> None:
        theta = learned("theta", start)
        half = theta.new_tensor(0.5)
        probs = torch.stack([half, theta / 4, (1 - theta) / 4, (1 - theta) / 4, theta / 4])
        with pyro.plate("cells", len(counts)), pyro.poutine.scale(scale=counts):
            five = categorical("five", probs)
            pyro.sample("cell", dist.Categorical(CELLS_OF_FIVE[five]), obs=torch.arange(4))

    return model


# Mixtures


def coins(start: Start) -> Model:
    """Two coins, equally probable; each set of ten tosses is of one of them."""

    def model(heads: Tensor) -> None:
        probs = learned("probs", start)
        with pyro.plate("sets", len(heads)):
            v = categorical("v", tensor([0.5, 0.5]))
            pyro.sample("heads", dist.Binomial(10, probs[v]), obs=heads)

    return model


def poisson_mixture(start: Start) -> Model:
    """A mixture of Poissons; `there` masks components, and not what they emit."""

    def model(counts: Tensor, there: Tensor | bool = True) -> None:
        weights, rates = learned("weights", start), learned("rates", start)
        with pyro.plate("data", len(counts)):
            with pyro.poutine.mask(mask=there):
                z = categorical("z", weights)
            pyro.sample("u", dist.Poisson(rates[z]), obs=counts)

    return model


def latent_classes(start: Start) -> Model:
    """Latent classes of answer patterns, each given as often as `counts` says."""

    def model(answers: Tensor, counts: Tensor) -> None:
        weights, probs = learned("weights", start), learned("probs", start)
        with pyro.plate("patterns", len(answers)), pyro.poutine.scale(scale=counts):
            z = categorical("z", weights)
            pyro.sample("u", dist.Bernoulli(probs[z]).to_event(1), obs=answers)

    return model


def latent_classes_with_gaps(start: Start) -> Model:
    """Latent classes of answers of which some are missing."""

    def model(answers: Tensor, seen: Tensor) -> None:
        weights, probs = learned("weights", start), learned("probs", start)
        items = torch.arange(answers.shape[-1])
        with pyro.plate("people", len(answers), dim=-2):
            z = categorical("z", weights)
            with pyro.plate("items", len(items), dim=-1), pyro.poutine.mask(mask=seen):
                pyro.sample("u", dist.Bernoulli(probs[z, items]), obs=answers)

    return model


def diagonal_mixture(start: Start, *, tied: bool = False) -> Model:
    """A mixture of Gaussians with independent dims; tied where all components have the same scales."""

    def model(points: Tensor) -> None:
        weights, loc, scale = (learned(name, start) for name in ("weights", "loc", "scale"))
        with pyro.plate("data", len(points)):
            z = categorical("z", weights)
            pyro.sample("u", dist.Normal(loc[z], scale if tied else scale[z]).to_event(1), obs=points)

    return model


def variance_mixture(start: Start, square_root: str = "before") -> Model:
    """The same with variances, whose square root is taken before or after the component's is selected."""

    def model(points: Tensor) -> None:
        weights, loc, variance = (learned(name, start) for name in ("weights", "loc", "variance"))
        with pyro.plate("data", len(points)):
            z = categorical("z", weights)
            scale = variance.sqrt()[z] if square_root == "before" else variance[z].sqrt()
            pyro.sample("u", dist.Normal(loc[z], scale).to_event(1), obs=points)

    return model


def diagonal_mixture_with_gaps(start: Start) -> Model:
    """The same, of points of which some dims are missing."""

    def model(points: Tensor, seen: Tensor) -> None:
        weights, loc, scale = (learned(name, start) for name in ("weights", "loc", "scale"))
        dims = torch.arange(points.shape[-1])
        with pyro.plate("data", len(points), dim=-2):
            z = categorical("z", weights)
            with pyro.plate("dims", len(dims), dim=-1), pyro.poutine.mask(mask=seen):
                pyro.sample("u", dist.Normal(loc[z, dims], scale[z, dims]), obs=points)

    return model


def full_mixture(start: Start, slot: str = "covariance", *, tied: bool = False) -> Model:
    """A mixture of Gaussians with full covariances, given as `covariance` or as `scale_tril`."""
    keyword = {"covariance": "covariance_matrix", "scale_tril": "scale_tril"}[slot]

    def model(points: Tensor) -> None:
        weights, loc, matrix = learned("weights", start), learned("loc", start), learned(slot, start)
        with pyro.plate("data", len(points)):
            z = categorical("z", weights)
            own = {keyword: matrix if tied else matrix[z]}
            pyro.sample("u", dist.MultivariateNormal(loc[z], **own), obs=points)

    return model


# Hidden Markov models


def emitted(kind: str, start: Start, z: Tensor) -> Any:
    """The distribution of what a state emits."""
    if kind == "poisson":
        return dist.Poisson(learned("rates", start)[z])
    if kind == "categorical":
        return dist.Categorical(learned("emission", start)[z])
    if kind == "diag":
        return dist.Normal(learned("loc", start)[z], learned("scale", start)[z]).to_event(1)
    matrix = learned("covariance", start)
    return dist.MultivariateNormal(learned("loc", start)[z], matrix if kind == "tied" else matrix[z])


def hidden_markov_loop(start: Start, kind: str) -> Model:
    """A Python loop over the steps of one sequence."""

    def model(sequence: Tensor) -> None:
        probs, transition = learned("initial", start), learned("transition", start)
        for t, observed in enumerate(sequence):
            z = categorical(f"z_{t}", probs)
            pyro.sample(f"u_{t}", emitted(kind, start, z), obs=observed)
            probs = transition[z]

    return model


def hidden_markov(start: Start, kind: str) -> Model:
    """A MarkovChain for each of several sequences; `seen` leaves out observations, `there` the ends of sequences."""

    def model(sequences: Tensor, seen: Tensor | bool = True, there: Tensor | bool = True) -> None:
        batch, steps = sequences.shape[:2]
        initial, transition = learned("initial", start), learned("transition", start)
        with (
            pyro.plate("sequences", batch, dim=-2),
            pyro.plate("time", steps, dim=-1),
            pyro.poutine.mask(mask=there),
        ):
            z = pyro.sample("z", vfe.MarkovChain(initial, transition))
            with pyro.poutine.mask(mask=seen):
                pyro.sample("u", emitted(kind, start, z), obs=sequences)

    return model


# Priors: the parameters are latents, and a guide gives them as points


def point_guide(model: Callable[..., None], start: Start) -> AutoDelta:
    """AutoDelta for all but the discrete latent z, from the starting values."""
    values = {name: tensor(value) for name, value in start.items()}
    return AutoDelta(pyro.poutine.block(model, hide=["z"]), init_loc_fn=init_to_value(values=values))


def delta_guide(start: Start) -> Model:
    """A guide that gives each parameter as a Delta, written by hand."""

    def guide(*args: Any) -> None:
        for name in start:
            value = learned(name, start)
            pyro.sample(name, dist.Delta(value, event_dim=value.dim()))

    return guide


def poisson_mixture_with_priors(states: int, gamma: tuple[float, float], concentration: float) -> Model:
    """A Gamma prior on rates and a Dirichlet prior on weights."""

    def model(counts: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.full((states,), concentration)))
        rates = pyro.sample("rates", dist.Gamma(*gamma).expand([states]).to_event(1))
        with pyro.plate("data", len(counts)):
            z = categorical("z", weights)
            pyro.sample("u", dist.Poisson(rates[z]), obs=counts)

    return model


def latent_classes_with_prior(start: Start, beta: tuple[float, float]) -> Model:
    """A Beta prior on each class's probabilities, in plates; the weights are an ordinary parameter."""
    classes, items = np.shape(start["probs"])

    def model(answers: Tensor, counts: Tensor) -> None:
        weights = learned("weights", start)
        with pyro.plate("classes", classes, dim=-2), pyro.plate("items", items, dim=-1):
            probs = pyro.sample("probs", dist.Beta(*beta))
        with pyro.plate("patterns", len(answers)), pyro.poutine.scale(scale=counts):
            z = categorical("z", weights)
            pyro.sample("u", dist.Bernoulli(probs[z]).to_event(1), obs=answers)

    return model


def known_scale_mixture_with_prior(start: Start, scale: float, prior: tuple[float, float]) -> Model:
    """A Normal prior on the means; the scale is known, and the weights are an ordinary parameter."""

    def model(points: Tensor) -> None:
        weights = learned("weights", start)
        means = pyro.sample("means", dist.Normal(*prior).expand([len(start["means"])]).to_event(1))
        with pyro.plate("data", len(points)):
            z = categorical("z", weights)
            pyro.sample("u", dist.Normal(means[z], scale), obs=points)

    return model


@dataclass(frozen=True)
class NormalInverseGamma:
    """variance ~ InverseGamma(shape, scale), loc ~ Normal(centre, sqrt(variance / weight))."""

    centre: float
    weight: float
    shape: float
    scale: float


def hidden_markov_with_priors(
    start: Start, concentrations: Mapping[str, Any], prior: NormalInverseGamma | None = None
) -> Model:
    """Dirichlet priors on the chain's tables, and a Normal-inverse-gamma prior on what states emit.

    Args:
        start: Starting values; without a prior, `emission` is an ordinary parameter of categorical emissions.
        concentrations: Those of `initial` and of `transition`, by name.
        prior: The prior of `loc` and `variance`.
    """

    def emission() -> Callable[[Tensor], Any]:
        if prior is None:
            return partial(emitted, "categorical", start)
        shape = list(np.shape(start["variance"]))
        variance = pyro.sample("variance", dist.InverseGamma(prior.shape, prior.scale).expand(shape).to_event(2))
        loc = pyro.sample("loc", dist.Normal(prior.centre, (variance / prior.weight).sqrt()).to_event(2))
        return lambda z: dist.Normal(loc[z], variance.sqrt()[z]).to_event(1)

    def model(sequences: Tensor) -> None:
        batch, steps = sequences.shape[:2]
        initial = pyro.sample("initial", dist.Dirichlet(tensor(concentrations["initial"])))
        transition = pyro.sample("transition", dist.Dirichlet(tensor(concentrations["transition"])).to_event(1))
        of_state = emission()
        with pyro.plate("sequences", batch, dim=-2), pyro.plate("time", steps, dim=-1):
            z = pyro.sample("z", vfe.MarkovChain(initial, transition))
            pyro.sample("u", of_state(z), obs=sequences)

    return model
