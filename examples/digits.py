r"""
Handwritten digits: EM and a recognition network
================================================

A mixture of Bernoullis of 8 x 8 digits is fitted twice: by EM, which computes the exact posterior of every digit, and
by SVI, where a network guesses it from the pixels. The two are compared by surprise and gap, on the digits that they
learned from and on digits that they did not:

.. math::

    P(v, u) &= \prod_n \text{weight}_{v_n} \prod_i \text{Bernoulli}(u_{ni} \mid \text{template}_{v_n i})

    Q(v \mid u) &= \prod_n \text{softmax}(\text{network}(u_n))_{v_n}

:math:`u_{ni}` is pixel *i* of digit *n*, on or off, and :math:`v_n` is the digit's kind. Nobody says which kinds there
are; labels are only looked at when all is done. Each kind has a template: the probability of each pixel to be on.

A network is asked for the posterior of a digit instead of it being computed; what it gets wrong is the gap. On digits
that it was trained with this is the price of having one network for all of them, and of how it was trained; what
held-out digits cost more is the price of never having seen them.

References:

- Alpaydin and Kaynak (1998), Cascading classifiers, Kybernetika 34: the digits, as scikit-learn has them.
- Bishop (2006), Pattern Recognition and Machine Learning, section 9.3.3: mixtures of Bernoullis of digits, by EM.
- Cremer, Li and Duvenaud (2018), Inference suboptimality in variational autoencoders: the amortisation gap.
- Vehtari, Gelman and Gabry (2017), Practical Bayesian model evaluation using leave-one-out cross-validation and WAIC:
  the elpd, and what its Pareto k says.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import lgamma
from pathlib import Path
from textwrap import fill
from typing import Any

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pyro import poutine
from pyro.infer.autoguide import AutoDelta
from pyro.infer.autoguide.initialization import init_to_value
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pyro_vfe as vfe
from pyro_vfe.errors import VFEWarning

SIDE, NUM_PIXELS = 8, 64
DARKEST = 16
"""Pixels are 0 to 16; one that is half as dark, or more, is on."""
NUM_TRAINED = 1200
"""So many of the 1,797 digits are learned from; the others are held out."""
NUM_KINDS, NUMBERS_OF_KINDS = 20, (10, 20, 40)
CONCENTRATION = 1.5
"""Of all priors: as if half a digit of each kind, and half a pixel on and half a pixel off in it, had been seen."""
NUM_STARTS, NUM_STEPS, HIDDEN = 3, 300, 128
FIRST_SHOWN = 60
"""Of the steps of SVI; F falls from far above before."""
NUM_ITERATIONS = 5
"""So many iterations of EM are repeated by hand."""
NETWORK_RATE, TEMPLATE_RATE = {"hidden layer": 0.02, "linear": 0.05}, 0.05
"""Learning rates of Adam; a step in a linear network is not multiplied by another layer, and may be longer."""
LEAST_WEIGHT = 0.005
"""A kind that has no more than this, six digits, is unused."""
NUM_DRAWS = 200
NUM_WORST = 6
"""So many digits with the largest gaps are shown."""
DARK, LIGHT = "#0b3c5d", "#e69f00"

Program = Callable[[Tensor], None]
Values = dict[str, Tensor]

# %%
# The digits, and the model
# -------------------------
# Weights and templates are latents with priors, so that one program serves for point estimates and for a posterior.
# The priors are needed: a corner pixel that no training digit of a kind has on would get the probability 0, and a
# held-out digit with that pixel would then be impossible under the kind, and perhaps under all of them.


@dataclass(frozen=True, eq=False)
class Digits:
    """Binary pixels, shape `(N, 64)`, and labels, shape `(N,)`."""

    trained: Tensor
    held_out: Tensor
    trained_labels: np.ndarray
    held_out_labels: np.ndarray


def binary_digits() -> Digits:
    """Returns scikit-learn's digits, shuffled and split; the same split each time."""
    data = load_digits()
    order = torch.randperm(len(data.data), generator=torch.Generator().manual_seed(0)).numpy()
    pixels = torch.tensor(2 * data.data[order] >= DARKEST).to(torch.get_default_dtype())
    labels = data.target[order]
    return Digits(pixels[:NUM_TRAINED], pixels[NUM_TRAINED:], labels[:NUM_TRAINED], labels[NUM_TRAINED:])


def mixture_of_bernoullis(num_kinds: int) -> Program:
    """Returns the generative model."""

    def model(u: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.full((num_kinds,), CONCENTRATION)))
        prior = dist.Beta(CONCENTRATION, CONCENTRATION).expand([num_kinds, NUM_PIXELS]).to_event(2)
        templates = pyro.sample("templates", prior)
        with pyro.plate("digits", len(u)):
            kind = pyro.sample("kind", dist.Categorical(weights))
            pyro.sample("pixels", dist.Bernoulli(templates[kind]).to_event(1), obs=u)

    return model


def start(num_kinds: int, u: Tensor) -> Values:
    """Returns where all fits start: each template halfway between a digit drawn at random and grey."""
    drawn = torch.randperm(len(u), generator=torch.Generator().manual_seed(0))[:num_kinds]
    return {"weights": torch.ones(num_kinds) / num_kinds, "templates": 0.25 + 0.5 * u[drawn]}


# %%
# EM
# --
# With a guide of point estimates, EM finds the most probable weights and templates: its E-phase is the exact posterior
# of every digit's kind, its M-phase a closed form.


@dataclass(frozen=True, eq=False)
class Fit:
    """A mixture fitted by EM."""

    model: Program
    run: vfe.EMRun

    @property
    def values(self) -> Values:
        """The most probable weights and templates."""
        return {name: self.run.params[f"AutoDelta.{name}"] for name in ("weights", "templates")}


def point_estimates(model: Program, values: Values) -> AutoDelta:
    """Returns a guide that has one value for the weights and the templates each, learned from a start."""
    of_parameters = poutine.block(model, expose=list(values))
    return AutoDelta(of_parameters, init_loc_fn=init_to_value(values=values))


def fit_by_em(num_kinds: int, u: Tensor) -> Fit:
    """Returns the best of several runs of EM; the first one's start is that of SVI."""
    pyro.clear_param_store()
    model = mixture_of_bernoullis(num_kinds)
    guide = point_estimates(model, start(num_kinds, u))
    run = vfe.EM(model, guide).run(u, n_init=NUM_STARTS, acceleration="squarem", progress_bar=False)
    return Fit(model, run)


def held(values: Values) -> Program:
    """Returns a guide that has the weights and templates as they are."""

    def guide(u: Tensor) -> None:
        pyro.sample("weights", dist.Delta(values["weights"], event_dim=1))
        pyro.sample("templates", dist.Delta(values["templates"], event_dim=2))

    return guide


def one_iteration_at_a_time(u: Tensor, num_iterations: int) -> list[float]:
    """Returns F after the first E-phases of EM, nats."""
    pyro.clear_param_store()
    model = mixture_of_bernoullis(NUM_KINDS)
    em = vfe.EM(model, point_estimates(model, start(NUM_KINDS, u)))
    free_energies = []
    for _ in range(num_iterations):
        free_energies.append(em.e_phase(u).free_energy)
        em.m_phase(u)
    return free_energies


def by_hand(u: np.ndarray, weights: np.ndarray, templates: np.ndarray, num_iterations: int) -> list[float]:
    """Returns what `one_iteration_at_a_time` does, by the formulas of a textbook."""
    extra = CONCENTRATION - 1
    constant = lgamma(weights.size * CONCENTRATION) - weights.size * lgamma(CONCENTRATION)
    constant += templates.size * (lgamma(2 * CONCENTRATION) - 2 * lgamma(CONCENTRATION))
    free_energies = []
    for _ in range(num_iterations):
        on, off = np.log(templates), np.log1p(-templates)
        log_joint = np.log(weights) + u @ on.T + (1 - u) @ off.T
        log_evidence = np.logaddexp.reduce(log_joint, axis=1)
        log_prior = constant + extra * (np.log(weights).sum() + on.sum() + off.sum())
        free_energies.append(-(log_evidence.sum() + log_prior))
        responsibilities = np.exp(log_joint - log_evidence[:, None])
        counts = responsibilities.sum(0)
        weights = (counts + extra) / (counts + extra).sum()
        templates = (responsibilities.T @ u + extra) / (counts[:, None] + 2 * extra)
    return free_energies


# %%
# A network as guide
# ------------------
# The network sees a digit's pixels and says which kind it is. It is trained by SVI, with the templates or on those that
# EM found. F is exact, so a step sees all training digits, and no noise.
#
# Which network would do? The posterior of a mixture of Bernoullis is the softmax of a linear function of the pixels,
# so a linear network can have it exactly: `exact_network` writes its weights down.


def network_of(shape: str) -> nn.Module:
    """Returns a network from pixels to the logits of the kinds, which finds each as probable as the other so far."""
    torch.manual_seed(0)
    last = nn.Linear(NUM_PIXELS if shape == "linear" else HIDDEN, NUM_KINDS)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return last if shape == "linear" else nn.Sequential(nn.Linear(NUM_PIXELS, HIDDEN), nn.Tanh(), last)


def exact_network(values: Values) -> nn.Module:
    """Returns the linear network whose softmax is the posterior of the kinds."""
    network = nn.Linear(NUM_PIXELS, NUM_KINDS)
    with torch.no_grad():
        network.weight.copy_(values["templates"].logit())
        network.bias.copy_(values["weights"].log() + (1 - values["templates"]).log().sum(-1))
    return network


def recognition(network: nn.Module, parameters: Program) -> Program:
    """Returns a guide that asks the network for each digit's kind, and another guide for the parameters."""

    def guide(u: Tensor) -> None:
        pyro.module("network", network)
        parameters(u)
        with pyro.plate("digits", len(u)):
            pyro.sample("kind", dist.Categorical(logits=network(u)))

    return guide


def fit_by_svi(guide: Program, model: Program, u: Tensor, shape: str) -> vfe.SVIRun:
    """Returns the run of SVI that fits a network, and the templates where the guide learns them."""
    optim = pyro.optim.Adam(lambda name: {"lr": NETWORK_RATE[shape] if name.startswith("network") else TEMPLATE_RATE})
    return vfe.fit(model, guide, u, optim=optim, num_steps=NUM_STEPS, progress_bar=False)


# %%
# The comparison
# --------------
# F, surprise and gap of each digit, on average over those that were learned from and over the held-out ones.


@dataclass(frozen=True, eq=False)
class Score:
    """The free energy of each digit under a model and a guide, taken apart."""

    name: str
    trained: vfe.Decomposition
    held_out: vfe.Decomposition
    values: Values
    """The weights and templates that the guide gives."""

    @property
    def num_used(self) -> int:
        """The number of kinds that have found digits."""
        return int((self.values["weights"] > LEAST_WEIGHT).sum())


def score(name: str, model: Program, guide: Program, digits: Digits) -> Score:
    """Returns what a guide costs on each digit; the density of the priors belongs to no digit, and is left out."""
    elbo = vfe.FreeEnergy()
    trained, held_out = (elbo.decompose(model, guide, u).by("digits") for u in (digits.trained, digits.held_out))
    nodes = poutine.trace(guide).get_trace(digits.trained).nodes
    return Score(name, trained, held_out, {site: nodes[site]["value"].detach() for site in ("weights", "templates")})


def per_digit(values: Tensor) -> float:
    """Returns the average over digits."""
    return float(values.mean())


def as_table(scores: Iterable[Score]) -> str:
    """Returns the scores, one row each, in nats per digit."""
    lines = [
        f"{'nats per digit':<38} ---- learned from ----   ------ held out ------  kinds",
        f"{'':<38}" + "      F = surprise +   gap" * 2 + "  used",
    ]
    for one in scores:
        numbers = "".join(
            f" {per_digit(terms.free_energy):6.3f}   {per_digit(terms.surprise):8.3f} {abs(per_digit(terms.gap)):7.3f}"
            for terms in (one.trained, one.held_out)
        )
        lines.append(f"{one.name:<38}{numbers} {one.num_used:5}")
    return "\n".join(lines)


def labels_of_kinds(terms: vfe.Decomposition, labels: np.ndarray) -> np.ndarray:
    """Returns the label that each kind has most digits of, shape `(K,)`."""
    by_label = np.eye(labels.max() + 1)[labels].T
    return np.argmax(by_label @ terms.posterior_marginals()["kind"].numpy(), 0)


# %%
# How many kinds?
# ---------------
# A log score of the digits that a model was fitted to is no answer: it rises with every kind. Leaving each digit out in
# turn gives one, and ArviZ's `loo` estimates it from draws of the parameters, by weighing each draw by how little it
# owes to the digit. That needs a distribution of the parameters: of point estimates all draws are the same, and `loo`
# of them is the score on the training digits again. So the weights and templates get a guide of their own: of all
# Dirichlets and Betas those that minimise F given EM's posterior of the kinds; their parameters are the priors' and
# EM's expected counts. The kinds are summed out of the likelihood of every draw.


def conjugate_guide(fitted: Fit, u: Tensor) -> Program:
    """Returns a guide of the weights and templates, from the expected counts of EM's last E-phase."""
    given = poutine.condition(fitted.model, data=fitted.values)
    responsibilities = vfe.posterior(given, u).marginal("kind")
    counts, on = responsibilities.sum(0), responsibilities.T @ u
    of_weights = dist.Dirichlet(CONCENTRATION + counts)
    of_templates = dist.Beta(CONCENTRATION + on, CONCENTRATION + counts[:, None] - on).to_event(2)

    def guide(u: Tensor) -> None:
        pyro.sample("weights", of_weights)
        pyro.sample("templates", of_templates)

    return guide


def log_scores(u: np.ndarray, weights: np.ndarray, templates: np.ndarray) -> np.ndarray:
    """Returns log p(u_n | weights, templates) of each digit for each draw, nats, by the formula; shape `(S, N)`."""
    on, off = np.log(templates).swapaxes(-1, -2), np.log1p(-templates).swapaxes(-1, -2)
    return np.logaddexp.reduce(np.log(weights)[:, None] + u @ on + (1 - u) @ off, axis=-1)


@dataclass(frozen=True, eq=False)
class Unseen:
    """What a digit that was not learned from is expected to cost, in three ways."""

    num_kinds: int
    tree: Any
    """What ArviZ takes: draws, and the log-likelihood of each training digit at each draw."""
    loo: np.ndarray
    """The surprise of each training digit under the draws, reweighted to have been made without it, nats."""
    pareto_k: np.ndarray
    """How heavy the tails of these weights are: above 0.7 the digit's number is not to be relied on."""
    draws: np.ndarray
    """The surprise of each held-out digit under all draws together, nats."""
    point: np.ndarray
    """The surprise of each held-out digit at the point estimates, nats."""
    warned: str
    """What the library says of the guide's draws."""


def unseen(fitted: Fit, digits: Digits) -> Unseen:
    """Returns the scores of a mixture on digits that it has not seen."""
    pyro.set_rng_seed(0)
    guide = conjugate_guide(fitted, digits.trained)
    options = {"num_samples": NUM_DRAWS, "prior": False, "posterior_predictive": False, "progress_bar": False}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tree = vfe.to_inference_data(fitted.model, guide, digits.trained, **options)
        loo = az.loo(tree, pointwise=True)
    drawn = (tree.posterior[name].values[0] for name in ("weights", "templates"))
    log_likelihoods = log_scores(digits.held_out.numpy(), *drawn)
    return Unseen(
        num_kinds=len(fitted.values["weights"]),
        tree=tree,
        loo=-getattr(loo, "loo_i" if hasattr(loo, "loo_i") else "elpd_i").values,  # as ArviZ 0.2x and 1.x call it
        pareto_k=loo.pareto_k.values,
        draws=np.log(NUM_DRAWS) - np.logaddexp.reduce(log_likelihoods, 0),
        point=vfe.FreeEnergy()
        .decompose(fitted.model, held(fitted.values), digits.held_out)
        .by("digits")
        .surprise.numpy(),
        warned="\n".join(str(one.message) for one in said if issubclass(one.category, VFEWarning)),
    )


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Returns the mean and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(values.size))


def as_table_of_kinds(all_unseen: Iterable[Unseen]) -> str:
    """Returns what an unseen digit costs by the number of kinds, one row each."""
    lines = ["kinds   loo, by draws   held out, by draws   held out, by point estimates   Pareto k > 0.7   largest k"]
    for one in all_unseen:
        loo, draws, point = (mean_and_error(values) for values in (one.loo, one.draws, one.point))
        bad = f"{np.sum(one.pareto_k > 0.7)} of {one.pareto_k.size}"
        lines.append(
            f"{one.num_kinds:5}   {loo[0]:6.2f} +- {loo[1]:.2f} {draws[0]:13.2f} +- {draws[1]:.2f}"
            f"{point[0]:23.2f} +- {point[1]:.2f} {bad:>16} {one.pareto_k.max():11.2f}"
        )
    return "\n".join(lines)


# %%
# Pictures
# --------


def draw_templates(em: Score, network: Score, digits: Digits) -> Figure:
    """Draws the templates of two fits, largest weight first: each with the label most of its digits have."""
    figure = plt.figure(figsize=(11, 5.4), layout="constrained")
    for part, one in zip(figure.subfigures(1, 2, wspace=0.04), (em, network), strict=True):
        part.suptitle(f"{one.name}: {one.num_used} kinds in use")
        labels = labels_of_kinds(one.trained, digits.trained_labels)
        order = one.values["weights"].argsort(descending=True)
        for axes, kind in zip(part.subplots(4, 5).flat, order, strict=True):
            weight = float(one.values["weights"][kind])
            title = f"“{labels[kind]}”  {weight:.1%}" if weight > LEAST_WEIGHT else f"unused  {weight:.1%}"
            draw_pixels(axes, one.values["templates"][kind], title)
    return figure


def draw_pixels(axes: Axes, pixels: Tensor, title: str) -> None:
    """Draws probabilities of pixels to be on, or pixels, as an image."""
    axes.imshow(pixels.reshape(SIDE, SIDE).numpy(), cmap="Greys", vmin=0, vmax=1)
    axes.set_title(title, fontsize="small")
    axes.set(xticks=(), yticks=())


def draw_histories(runs: dict[str, vfe.SVIRun], em: vfe.EMRun) -> Figure:
    """Draws F while each network learned, as surprise and gap."""
    figure, all_axes = plt.subplots(1, 3, figsize=(12, 4.6), layout="constrained")
    for axes, (name, run) in zip(all_axes, runs.items(), strict=True):
        shown = tuple(row for row in run.history.rows if row.iteration >= FIRST_SHOWN)
        vfe.plot_free_energy(vfe.History(shown, run.history.num_data).per_datum, ax=axes)
        above = (run.free_energy - em.free_energy) / NUM_TRAINED
        axes.set(
            title=f"{name}:\nF ends {above:.2f} nats per digit above EM's", ylabel="nats per digit, with the priors"
        )
    return figure


def draw_gap(one: Score, digits: Digits) -> Figure:
    """Draws the gap of each held-out digit, and the costliest with the templates that posterior and network take."""
    figure = plt.figure(figsize=(11, 9))
    margins = {"left": 0.08, "right": 0.98, "top": 0.95, "bottom": 0.02, "hspace": 0.35}
    grid = figure.add_gridspec(4, NUM_WORST, height_ratios=(5, 3, 3, 3), **margins)
    grid_of_images = figure.add_gridspec(4, NUM_WORST, height_ratios=(6.5, 3, 3, 3), **margins)
    axes = vfe.plot_gap(one.held_out, ax=figure.add_subplot(grid[0, :]))
    axes.set_title(f"{one.name}, held-out digits. {axes.get_title()}")
    beliefs = one.held_out.posterior_marginals()["kind"], one.held_out.q_marginals()["kind"]
    columns = np.array([[figure.add_subplot(grid_of_images[row, i]) for i in range(NUM_WORST)] for row in (1, 2, 3)])
    for column, n in zip(columns.T, one.held_out.gap.argsort(descending=True)[:NUM_WORST], strict=True):
        draw_pixels(column[0], digits.held_out[n], f"digit {n}: {one.held_out.gap[n]:.1f} nats")
        for axes, probabilities, who in zip(column[1:], beliefs, ("posterior", "network"), strict=True):
            most, kind = probabilities[n].max(-1)
            draw_pixels(axes, one.values["templates"][kind], f"{who}: {most:.0%}")
    return figure


def draw_unseen(all_unseen: list[Unseen]) -> Figure:
    """Draws what an unseen digit costs by the number of kinds, and the Pareto k of every digit."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    styles = (("loo", "o", DARK), ("draws", "D", LIGHT), ("point", "s", "0.45"))
    names = ("leave-one-out, by draws", "held out, by draws", "held out, by point estimates")
    for shift, (field, marker, color), name in zip((-0.1, 0, 0.1), styles, names, strict=True):
        means, errors = zip(*(mean_and_error(getattr(one, field)) for one in all_unseen), strict=True)
        places = np.arange(len(all_unseen)) + shift
        left.errorbar(places, means, errors, fmt=marker, color=color, mec="0.2", capsize=3, label=name)
    left.set(title="What an unseen digit costs", xlabel="kinds", ylabel="surprise per digit, nats")
    left.legend(fontsize="small")
    for place, one in enumerate(all_unseen):
        spread = np.linspace(-0.3, 0.3, one.pareto_k.size)
        right.plot(place + spread, one.pareto_k, ".", color=DARK, ms=3, alpha=0.6)
    right.axhline(0.7, color=LIGHT, linestyle="--", label="not to be relied on above")
    right.set(title="Pareto k of every training digit", xlabel="kinds", ylabel="Pareto k")
    right.legend(fontsize="small", loc="upper left")
    for axes in (left, right):
        axes.set_xticks(range(len(all_unseen)), [str(one.num_kinds) for one in all_unseen])
        axes.spines[["top", "right"]].set_visible(False)
    return figure


# %%
# All of it
# ---------


def train_networks(em: Fit, digits: Digits) -> tuple[list[Score], dict[str, vfe.SVIRun]]:
    """Returns what three networks cost, and how they learned: two together with templates, and one those of EM."""
    scores, runs = [], {}
    for name, shape, values in (
        ("SVI, hidden layer", "hidden layer", None),
        ("SVI, linear", "linear", None),
        ("hidden layer on EM's templates", "hidden layer", em.values),
    ):
        pyro.clear_param_store()
        parameters = held(values) if values else point_estimates(em.model, start(NUM_KINDS, digits.trained))
        guide = recognition(network_of(shape), parameters)
        runs[name] = fit_by_svi(guide, em.model, digits.trained, shape)
        scores.append(score(name, em.model, guide, digits))
    return scores, runs


def in_words(em: Score, networks: list[Score], named: float) -> str:
    """Returns what the comparison of EM and the networks shows, in sentences."""
    costs = [per_digit(one.trained.surprise - em.trained.surprise) for one in networks]
    gaps = [per_digit(one.trained.gap) for one in networks]
    unseen_gaps = [per_digit(one.held_out.gap) for one in networks]
    told = (
        f"EM computes the posterior of every digit, seen or not, and has no gap. {named:.0%} of the held-out digits "
        "are of a kind whose most frequent label is theirs, and EM saw no label.",
        f"The network that learns together with its templates has a gap of {gaps[0]:.3f} nats per digit, as if it were "
        f"exact. But the surprise is {costs[0]:.2f} nats above EM's: the templates have come to where this network can "
        f"follow, and {NUM_KINDS - networks[0].num_used} of its kinds found no digits. On EM's templates, which do not "
        f"move, the same network trained as long has a gap of {gaps[2]:.2f}. "
        f"F is {per_digit(networks[0].trained.free_energy):.2f} and {per_digit(networks[2].trained.free_energy):.2f}, "
        "and does not say that the one is a matter of the model and the other of the guide.",
        f"No network needs to have a gap here: the linear one that is written down has none. Learned together with "
        f"templates it ends {costs[1]:.2f} nats above EM.",
        f"On digits that were not learned from the gaps are {unseen_gaps[0]:.3f} in place of {gaps[0]:.3f} nats "
        f"(hidden layer) and {unseen_gaps[1]:.3f} in place of {gaps[1]:.3f} (linear): that is how well a network "
        "generalises. EM's E-phase has nothing to generalise.",
    )
    return paragraphs("In words", told)


def kinds_in_words(all_unseen: list[Unseen], in_sample: float) -> str:
    """Returns what the comparison of numbers of kinds shows, in sentences."""
    pairs = [(all_unseen[i], all_unseen[i + 1]) for i in range(len(all_unseen) - 1)]
    gains = [
        "{:.2f} +- {:.2f}".format(*mean_and_error(getattr(few, field) - getattr(more, field)))
        for field in ("loo", "draws", "point")
        for few, more in pairs
    ]
    twenty = all_unseen[1]
    told = (
        f"Leaving one digit out, 20 kinds explain it better than 10 by {gains[0]} nats, and 40 better than 20 by "
        f"{gains[1]}. Held-out digits say {gains[2]} and {gains[3]} by the same draws, {gains[4]} and {gains[5]} by "
        "point estimates.",
        f"With 20 kinds leave-one-out takes an unseen digit to cost {twenty.loo.mean():.2f} nats, and the held-out "
        f"ones cost {twenty.draws.mean():.2f} +- {mean_and_error(twenty.draws)[1]:.2f}. The draws are of one guide "
        "around one of many local minima, and reweighting does not leave it: loo says what a digit costs with kinds "
        "that were found with that digit among the others. It is still a better guess than "
        f"{in_sample:.2f}, what the digits learned from cost at the point estimates, and what loo would say of these.",
        f"Of the draws as a whole the library says: {twenty.warned}",
    )
    return paragraphs("How many kinds", told)


def paragraphs(title: str, told: Iterable[str]) -> str:
    """Returns paragraphs under a title, in lines."""
    return "\n".join([title, *(fill(text, 116, initial_indent="  ", subsequent_indent="  ") for text in told)])


def save(figures: dict[str, Figure], folder: Path) -> None:
    """Saves the pictures, and leaves them open for who looks at them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / f"digits_{name}.png", dpi=150)


def main() -> None:
    """Fits, compares, draws, tells, and checks the numbers."""
    parser = argparse.ArgumentParser(description="Mixtures of Bernoullis of handwritten digits, by EM and by SVI.")
    parser.add_argument(
        "--output", type=Path, default=Path(sys.argv[0]).parent / "output", help="folder for the pictures"
    )
    folder = parser.parse_args().output
    torch.set_default_dtype(torch.float64)
    digits = binary_digits()

    fits = {num_kinds: fit_by_em(num_kinds, digits.trained) for num_kinds in NUMBERS_OF_KINDS}
    em = fits[NUM_KINDS]
    of_em = score("EM", em.model, held(em.values), digits)
    networks, runs = train_networks(em, digits)
    exact = recognition(exact_network(em.values), held(em.values))
    of_exact = score("linear, by formula, on EM's templates", em.model, exact, digits)
    all_unseen = [unseen(fitted, digits) for fitted in fits.values()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of high Pareto k, which the table counts
        compared = az.compare({f"{one.num_kinds} kinds": one.tree for one in all_unseen})

    kinds = of_em.held_out.posterior_marginals()["kind"].argmax(-1).numpy()
    named = np.mean(labels_of_kinds(of_em.trained, digits.trained_labels)[kinds] == digits.held_out_labels)
    print(f"{em.run}\n\n{as_table([of_em, *networks, of_exact])}\n")
    print(in_words(of_em, networks, named))
    print(f"\n{as_table_of_kinds(all_unseen)}\n\n{compared.to_string()}\n")
    print(kinds_in_words(all_unseen, per_digit(of_em.trained.surprise)))
    pictures = {
        "templates": draw_templates(of_em, networks[0], digits),
        "free_energy": draw_histories(runs, em.run),
        "gap": draw_gap(networks[2], digits),
        "kinds": draw_unseen(all_unseen),
    }
    save(pictures, folder)
    print(f"Pictures: {folder}")

    begin = start(NUM_KINDS, digits.trained)
    formulas = by_hand(digits.trained.numpy(), begin["weights"].numpy(), begin["templates"].numpy(), NUM_ITERATIONS)
    assert np.abs(np.subtract(one_iteration_at_a_time(digits.trained, NUM_ITERATIONS), formulas)).max() < 1e-6
    assert em.run.history.of("E").gap.max() < 1e-8
    for terms in (of_exact.trained, of_exact.held_out):
        assert terms.gap.abs().max() < 1e-8
    for one in networks:
        assert one.trained.gap.min() > -1e-8 and one.held_out.gap.min() > -1e-8
        assert one.trained.free_energy.sum() > of_em.trained.surprise.sum()
    torch.testing.assert_close(networks[2].held_out.surprise, of_em.held_out.surprise)
    for one in all_unseen:
        drawn = (one.tree.posterior[name].values[0] for name in ("weights", "templates"))
        by_formula = log_scores(digits.trained.numpy(), *drawn)
        np.testing.assert_allclose(one.tree.log_likelihood["pixels"].values[0], by_formula, rtol=1e-9)
    ten, twenty, _ = all_unseen
    for better in (ten.loo - twenty.loo, ten.draws - twenty.draws, ten.point - twenty.point):
        mean, error = mean_and_error(better)
        assert mean > 2 * error


if __name__ == "__main__":
    main()
