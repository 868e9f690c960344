r"""
A survey: how many kinds of people answered?
============================================

216 people said what they would do in four situations of conflict between friendship and duty. Given a person's class
the answers are independent; so all that ties the items together is the class. Models of 1, 2 and 3 classes are fitted
by EM from several starts each, since *F* has local minima and flat directions, and compared by AIC and BIC:

.. math::

    P(v, u) &= \prod_n \text{weight}_{v_n} \prod_i \text{Bernoulli}(u_{ni} \mid \text{profile}_{v_n i})

    \text{AIC} &= 2 \, \text{surprise} + 2 k

    \text{BIC} &= 2 \, \text{surprise} + k \log N

:math:`u_{ni}` is person *n*'s answer to item *i*, *k* the number of free parameters, and *N* that of people.

References:

- Stouffer and Toby (1951), Role conflict and personality: the survey.
- Goodman (1974), Exploratory latent structure analysis using both identifiable and unidentifiable models; and
  Linzer and Lewis (2011), poLCA: an R package for polytomous variable latent class analysis: the log-likelihoods of
  the models of 1, 2 and 3 classes (data set ``values``).
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from math import log
from pathlib import Path
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.axes import Axes
from torch import Tensor
from torch.distributions import constraints

import pyro_vfe as vfe

COUNTS = (20, 2, 9, 2, 6, 1, 4, 1, 38, 7, 24, 6, 25, 6, 23, 42)
"""How many people gave the answers 1111, 1112, 1121, ..., 2222; 1 is for the friend, 2 for what holds for everyone."""
ITEMS = ("A", "B", "C", "D")
KNOWN_LOG_LIKELIHOOD = {1: -543.6498, 2: -504.4677, 3: -503.3011}
NUM_STARTS, MAX_ITER = 4, 1000
SAME = 0.01
"""Ends that differ by fewer nats are the same."""
DARK, LIGHT = "#0b3c5d", "#e69f00"

Program = Callable[[Tensor], None]

# %%
# The survey, and the model
# -------------------------


def survey() -> Tensor:
    """Returns the answers, one row per person: 0 for 1, and 1 for 2; shape `(216, 4)`."""
    patterns = torch.tensor(list(product((0.0, 1.0), repeat=len(ITEMS))))
    return patterns.repeat_interleave(torch.tensor(COUNTS), 0)


def latent_class_model(num_classes: int) -> Program:
    """Returns the generative model."""

    def model(u: Tensor) -> None:
        levels = (torch.arange(num_classes) + 1.0) / (num_classes + 1)
        uniform = torch.ones(num_classes) / num_classes
        weights = pyro.param("weights", uniform, constraint=constraints.simplex)
        start = levels[:, None].repeat(1, len(ITEMS))
        profiles = pyro.param("profiles", start, constraint=constraints.unit_interval)
        with pyro.plate("people", len(u)):
            v = pyro.sample("class", dist.Categorical(weights))
            pyro.sample("answers", dist.Bernoulli(profiles[v]).to_event(1), obs=u)

    return model


# %%
# A fit, and what it says of the number of classes
# ------------------------------------------------


@dataclass(frozen=True, eq=False)
class Fit:
    """A model fitted from several starts."""

    weights: np.ndarray
    """How large each class is, smallest first; shape `(K,)`."""
    profiles: np.ndarray
    """The probability of answer 2 to each item in each class; shape `(K, 4)`."""
    surprise: float
    """-log p(u), nats, of the best run."""
    ends: tuple[float, ...]
    """F at the end of every run, nats."""
    num_data: int

    @property
    def num_free(self) -> int:
        """The number of free parameters: weights sum to one."""
        return self.weights.size - 1 + self.profiles.size

    @property
    def aic(self) -> float:
        """Akaike's criterion."""
        return 2 * self.surprise + 2 * self.num_free

    @property
    def bic(self) -> float:
        """The Bayesian information criterion, Schwarz's."""
        return 2 * self.surprise + self.num_free * log(self.num_data)


def saturated_surprise() -> float:
    """Returns -log p(u) of the best possible model: each pattern as probable as it was frequent."""
    counts = np.array(COUNTS)
    return float(-(counts * np.log(counts / counts.sum())).sum())


def as_table(fits: list[Fit]) -> str:
    """Returns the criteria, one row per model; G2 is twice the nats that a model is short of the data's own table."""
    lines = ["classes  parameters   surprise        G2       AIC       BIC"]
    for fit in fits:
        shortfall = 2 * (fit.surprise - saturated_surprise())
        numbers = f"{fit.surprise:11.4f} {shortfall:9.4f} {fit.aic:9.3f} {fit.bic:9.3f}"
        lines.append(f"{len(fit.weights):7} {fit.num_free:11} {numbers}")
    return "\n".join(lines)


# %%
# Pictures
# --------


def draw(path: Path, fits: list[Fit]) -> None:
    """Draws the classes' profiles, the criteria, and where every run ended; the picture stays open."""
    figure = plt.figure(figsize=(10, 7), layout="constrained")
    grid = figure.add_gridspec(2, 6, height_ratios=(3, 2))
    for column, fit in enumerate(fits):
        draw_profiles(figure.add_subplot(grid[0, 2 * column : 2 * column + 2]), fit)
    draw_criteria(figure.add_subplot(grid[1, :3]), fits)
    draw_ends(figure.add_subplot(grid[1, 3:]), fits)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def draw_profiles(axes: Axes, fit: Fit) -> None:
    """Draws each class as a line over the items."""
    styles = (("o-", DARK), ("D--", LIGHT), ("s:", "0.35"))
    for weight, profile, (marker, color) in zip(fit.weights, fit.profiles, styles, strict=False):
        axes.plot(ITEMS, profile, marker, color=color, mec="0.2", mew=0.6)
        axes.annotate(f"{weight:.0%}", (len(ITEMS) - 1, profile[-1]), (8, 0), textcoords="offset points", va="center")
    title = "1 class: everybody" if len(fit.weights) == 1 else f"{len(fit.weights)} classes, and their sizes"
    axes.set(title=title, xlabel="item", ylim=(-0.02, 1.02), ylabel="P(answer 2: for the rule)")


def draw_criteria(axes: Axes, fits: list[Fit]) -> None:
    """Draws AIC and BIC over the number of classes."""
    classes = [len(fit.weights) for fit in fits]
    axes.plot(classes, [fit.aic for fit in fits], "o-", color=DARK, label="AIC")
    axes.plot(classes, [fit.bic for fit in fits], "D--", color=LIGHT, mec="0.2", mew=0.6, label="BIC")
    axes.set(title="Both criteria take two classes", xlabel="classes", ylabel="criterion, 2 x nats", xticks=classes)
    axes.legend()


def draw_ends(axes: Axes, fits: list[Fit]) -> None:
    """Draws how far above the best run each run ended, on a scale that is linear near 0 and logarithmic above."""
    for fit, marker, color in zip(fits[1:], "Ds", (LIGHT, "0.35"), strict=True):
        above = np.sort(fit.ends) - fit.surprise
        axes.plot(above, marker, color=color, mec="0.2", mew=0.6, label=f"{len(fit.weights)}")
    axes.set_yscale("symlog", linthresh=1e-4)
    axes.set_xticks(range(NUM_STARTS))
    axes.set(title="Where every run ended", xlabel="run, best first", ylabel="F above the best, nats")
    axes.legend(title="classes")


def in_words(fits: list[Fit], runs: list[vfe.EMRun]) -> str:
    """Returns what was found, in sentences."""
    one, two, three = fits
    few, many = two.profiles
    same = [sum(end < fit.surprise + SAME for end in fit.ends) for fit in fits]
    iterations = [np.median([restart.n_iter for restart in run.restarts]) for run in runs]
    told = (
        f"A second class lowers the surprise by {one.surprise - two.surprise:.2f} nats, a third by "
        f"{two.surprise - three.surprise:.2f} more, for {three.num_free - two.num_free} parameters each: two classes. "
        f"{two.weights[0]:.0%} of the people are for the rule whatever the situation ({few.min():.0%} and more of "
        f"their answers); the others let the situation decide ({many.min():.0%} to {many.max():.0%}). "
        f"{same[1]} of {len(two.ends)} starts with two classes and {same[2]} of {len(three.ends)} with three come to "
        f"the best end. With three F is nearly flat there: it takes {iterations[2]:.0f} iterations in place of "
        f"{iterations[1]:.0f}, although SQUAREM makes them long."
    )
    return f"In words\n{fill(told, 116, initial_indent='  ', subsequent_indent='  ')}"


def fit(num_classes: int, u: Tensor) -> tuple[Fit, vfe.EMRun]:
    """Returns the best of several runs of EM from random starts, with the classes in order of size."""
    pyro.clear_param_store()
    model = latent_class_model(num_classes)
    em = vfe.EM(model)
    run = em.run(u, n_init=NUM_STARTS, max_iter=MAX_ITER, acceleration="squarem", progress_bar=False)
    weights, profiles = run.params["weights"].numpy(), run.params["profiles"].numpy()
    order = np.argsort(weights)
    ends = tuple(restart.free_energy for restart in run.restarts)
    return Fit(weights[order], profiles[order], run.free_energy, ends, len(u)), run


# %%
# All of it
# ---------


def main() -> None:
    """Fits, compares, draws, tells, and checks the log-likelihoods against the literature."""
    parser = argparse.ArgumentParser(description="Latent classes in a survey, fitted by EM from many starts.")
    parser.add_argument(
        "--output", type=Path, default=Path(sys.argv[0]).parent / "output", help="folder for the picture"
    )
    picture = parser.parse_args().output / "latent_classes.png"
    torch.set_default_dtype(torch.float64)
    u = survey()

    fits, runs = [], []
    for num_classes in KNOWN_LOG_LIKELIHOOD:
        fitted, run = fit(num_classes, u)
        fits.append(fitted)
        runs.append(run)
        print(f"Classes: {num_classes}\n{run}\n")
    draw(picture, fits)
    print(f"{as_table(fits)}\n\n{in_words(fits, runs)}\nPicture: {picture}")

    for fitted in fits:
        assert abs(-fitted.surprise - KNOWN_LOG_LIKELIHOOD[len(fitted.weights)]) < 1e-3
        assert fitted.surprise > saturated_surprise()
    assert min(fits, key=lambda fitted: fitted.aic) is min(fits, key=lambda fitted: fitted.bic) is fits[1]


if __name__ == "__main__":
    main()
