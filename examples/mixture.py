r"""
Old Faithful: a mixture of Gaussians, and how it can collapse
=============================================================

The geyser's eruptions are short or long, and a long one is followed by a long wait. A mixture of Gaussians with full
covariances:

.. math::

    P(v, u) &= \prod_n \text{weight}_{v_n} \, \text{Normal}(u_n \mid \text{loc}_{v_n}, \text{covariance}_{v_n})

    u_n &= (\text{duration}, \text{waiting time}) \text{ of eruption } n

*F* has many local minima, so EM is run from several random starts, and the best end is kept. And *F* has no lower
bound: a component that sits on one eruption alone can become as narrow as it likes. The run stops there, and says what
helps: a floor under the variances, or a prior.

References:

- Azzalini and Bowman (1990), A look at some data on the Old Faithful geyser: the data, as in R's ``faithful``.
- Scrucca, Fop, Murphy and Raftery (2016), mclust 5: clustering, classification and density estimation using Gaussian
  finite mixture models: the log-likelihood of two components (model VVV).
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Ellipse
from pyro import poutine
from pyro.infer.autoguide import AutoDelta
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor
from torch.distributions import constraints

import pyro_vfe as vfe
from pyro_vfe.errors import DegenerateError

# fmt: off
DURATIONS = (
    3600, 1800, 3333, 2283, 4533, 2883, 4700, 3600, 1950, 4350, 1833, 3917, 4200, 1750, 4700, 2167, 1750, 4800,
    1600, 4250, 1800, 1750, 3450, 3067, 4533, 3600, 1967, 4083, 3850, 4433, 4300, 4467, 3367, 4033, 3833, 2017,
    1867, 4833, 1833, 4783, 4350, 1883, 4567, 1750, 4533, 3317, 3833, 2100, 4633, 2000, 4800, 4716, 1833, 4833,
    1733, 4883, 3717, 1667, 4567, 4317, 2233, 4500, 1750, 4800, 1817, 4400, 4167, 4700, 2067, 4700, 4033, 1967,
    4500, 4000, 1983, 5067, 2017, 4567, 3883, 3600, 4133, 4333, 4100, 2633, 4067, 4933, 3950, 4517, 2167, 4000,
    2200, 4333, 1867, 4817, 1833, 4300, 4667, 3750, 1867, 4900, 2483, 4367, 2100, 4500, 4050, 1867, 4700, 1783,
    4850, 3683, 4733, 2300, 4900, 4417, 1700, 4633, 2317, 4600, 1817, 4417, 2617, 4067, 4250, 1967, 4600, 3767,
    1917, 4500, 2267, 4650, 1867, 4167, 2800, 4333, 1833, 4383, 1883, 4933, 2033, 3733, 4233, 2233, 4533, 4817,
    4333, 1983, 4633, 2017, 5100, 1800, 5033, 4000, 2400, 4600, 3567, 4000, 4500, 4083, 1800, 3967, 2200, 4150,
    2000, 3833, 3500, 4583, 2367, 5000, 1933, 4617, 1917, 2083, 4583, 3333, 4167, 4333, 4500, 2417, 4000, 4167,
    1883, 4583, 4250, 3767, 2033, 4433, 4083, 1833, 4417, 2183, 4800, 1833, 4800, 4100, 3966, 4233, 3500, 4366,
    2250, 4667, 2100, 4350, 4133, 1867, 4600, 1783, 4367, 3850, 1933, 4500, 2383, 4700, 1867, 3833, 3417, 4233,
    2400, 4800, 2000, 4150, 1867, 4267, 1750, 4483, 4000, 4117, 4083, 4267, 3917, 4550, 4083, 2417, 4183, 2217,
    4450, 1883, 1850, 4283, 3950, 2333, 4150, 2350, 4933, 2900, 4583, 3833, 2083, 4367, 2133, 4350, 2200, 4450,
    3567, 4500, 4150, 3817, 3917, 4450, 2000, 4283, 4767, 4533, 1850, 4250, 1983, 2250, 4750, 4117, 2150, 4417,
    1817, 4467,
)
"""Thousandths of a minute."""
WAITING_TIMES = (
    79, 54, 74, 62, 85, 55, 88, 85, 51, 85, 54, 84, 78, 47, 83, 52, 62, 84, 52, 79, 51, 47, 78, 69, 74, 83, 55, 76,
    78, 79, 73, 77, 66, 80, 74, 52, 48, 80, 59, 90, 80, 58, 84, 58, 73, 83, 64, 53, 82, 59, 75, 90, 54, 80, 54, 83,
    71, 64, 77, 81, 59, 84, 48, 82, 60, 92, 78, 78, 65, 73, 82, 56, 79, 71, 62, 76, 60, 78, 76, 83, 75, 82, 70, 65,
    73, 88, 76, 80, 48, 86, 60, 90, 50, 78, 63, 72, 84, 75, 51, 82, 62, 88, 49, 83, 81, 47, 84, 52, 86, 81, 75, 59,
    89, 79, 59, 81, 50, 85, 59, 87, 53, 69, 77, 56, 88, 81, 45, 82, 55, 90, 45, 83, 56, 89, 46, 82, 51, 86, 53, 79,
    81, 60, 82, 77, 76, 59, 80, 49, 96, 53, 77, 77, 65, 81, 71, 70, 81, 93, 53, 89, 45, 86, 58, 78, 66, 76, 63, 88,
    52, 93, 49, 57, 77, 68, 81, 81, 73, 50, 85, 74, 55, 77, 83, 83, 51, 78, 84, 46, 83, 55, 81, 57, 76, 84, 77, 81,
    87, 77, 51, 78, 60, 82, 91, 53, 78, 46, 77, 84, 49, 83, 71, 80, 49, 75, 64, 76, 53, 94, 55, 76, 50, 82, 54, 75,
    78, 79, 78, 78, 70, 79, 70, 54, 86, 50, 90, 54, 54, 77, 79, 64, 75, 47, 86, 63, 85, 82, 57, 82, 67, 74, 54, 83,
    73, 73, 88, 80, 71, 83, 56, 79, 78, 84, 58, 83, 43, 60, 75, 81, 46, 90, 46, 74,
)
"""Minutes until the next eruption."""
# fmt: on
KNOWN_SURPRISE = 1130.264
NUM_STARTS, MAX_ITER = 6, 1000
NARROW, FLOOR = 1e-6, 0.01
"""The variance of a component on one eruption, relative to the data's; and the floor, square minutes."""
SAME = 1e-5
"""Ends that differ by fewer nats are the same."""
VISIBLE = 1e-9
"""Nats that still stand out from rounding."""
DARK, LIGHT = "#0b3c5d", "#e69f00"

Program = Callable[[Tensor], None]

# %%
# The data, and the model
# -----------------------


def eruptions() -> Tensor:
    """Returns the data in minutes, shape `(272, 2)`."""
    return torch.stack([torch.tensor(DURATIONS) / 1000, torch.tensor(WAITING_TIMES) * 1.0], -1)


def gaussian_mixture(num_components: int) -> Program:
    """Returns the generative model; its components start as wide as the data, at eruptions of many durations."""

    def model(u: Tensor) -> None:
        levels = (torch.arange(num_components) + 0.5) / num_components
        by_duration = u[u[:, 0].argsort()]
        locs = by_duration[(levels * len(u)).long()]
        covariances = u.T.cov().repeat(num_components, 1, 1)
        weights = pyro.param("weights", torch.ones(num_components) / num_components, constraint=constraints.simplex)
        locs = pyro.param("locs", locs)
        covariances = pyro.param("covariances", covariances, constraint=constraints.positive_definite)
        with pyro.plate("data", len(u)):
            v = pyro.sample("v", dist.Categorical(weights))
            pyro.sample("u", dist.MultivariateNormal(locs[v], covariances[v]), obs=u)

    return model


# %%
# A fit from several starts
# -------------------------


@dataclass(frozen=True, eq=False)
class Fit:
    """A mixture, its components in order of the eruptions' mean duration."""

    run: vfe.EMRun
    locs: np.ndarray
    covariances: np.ndarray
    responsibilities: np.ndarray
    """Q(v_n = k), shape `(N, K)`."""


def fit(num_components: int, u: Tensor) -> Fit:
    """Returns the best of several runs of EM."""
    pyro.clear_param_store()
    model = gaussian_mixture(num_components)
    run = vfe.EM(model).run(u, n_init=NUM_STARTS, max_iter=MAX_ITER, progress_bar=False)
    order = run.params["locs"][:, 0].argsort()
    parts = (run.params["locs"], run.params["covariances"], vfe.posterior(model, u).marginal("v").T)
    return Fit(run, *(part[order].numpy() for part in parts[:2]), parts[2][order].T.numpy())


# %%
# Pictures
# --------


def draw(path: Path, u: np.ndarray, two: Fit, three: Fit) -> None:
    """Draws both mixtures, the phases of the first, and where every run of the second ended; the picture stays open."""
    figure, ((left, right), (bottom_left, bottom_right)) = plt.subplots(
        2, 2, figsize=(10, 8), height_ratios=(3, 2), layout="constrained"
    )
    for axes, fit in ((left, two), (right, three)):
        draw_components(axes, u, fit)
    draw_history(bottom_left, two.run.history)
    draw_ends(bottom_right, three.run)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def draw_components(axes: Axes, u: np.ndarray, fit: Fit) -> None:
    """Draws the data by the components that take them, and an ellipse of two standard deviations for each."""
    vfe.plot_responsibilities(fit.responsibilities, "v", u, ax=axes)
    for loc, covariance in zip(fit.locs, fit.covariances, strict=True):
        variances, directions = np.linalg.eigh(covariance)
        angle = np.degrees(np.arctan2(directions[1, -1], directions[0, -1]))
        width, height = 4 * np.sqrt(variances[::-1])
        axes.add_patch(Ellipse(loc, width, height, angle=angle, fill=False, color=DARK, linewidth=1.8))
    title = f"{len(fit.locs)} components: surprise {fit.run.free_energy:.2f} nats"
    axes.set(title=title, xlabel="duration, minutes", ylabel="minutes until the next eruption")


def draw_history(axes: Axes, history: vfe.History) -> None:
    """Draws, on a log scale, how far F is above its end after each phase, and the gap that each M-phase opened."""
    end = history.free_energy[-1]
    for phase, marker, color in (("E", "o-", DARK), ("M", "D--", LIGHT)):
        rows = history.of(phase)
        above = rows.free_energy - end
        label = f"F above its end, after the {phase}-phase"
        axes.semilogy(rows.iteration[above > VISIBLE], above[above > VISIBLE], marker, color=color, ms=4, label=label)
    opened = history.of("M")
    visible = opened.gap > VISIBLE
    axes.semilogy(
        opened.iteration[visible], opened.gap[visible], ":", color="0.35", label="gap that the M-phase opened"
    )
    axes.set(title="Two components: the fall of F", xlabel="iteration", ylabel="nats")
    axes.legend(fontsize="small")


def draw_ends(axes: Axes, run: vfe.EMRun) -> None:
    """Draws how far above the best run each run ended."""
    ends = np.sort([restart.free_energy for restart in run.restarts if restart.error is None])
    axes.plot(ends - run.free_energy, "o", color=DARK)
    axes.set_xticks(range(len(ends)))
    axes.set(title="Three components: where every run ended", xlabel="run, best first", ylabel="F above the best, nats")


# %%
# A component that collapses, and two ways to hold it
# ---------------------------------------------------
# A component that starts on one eruption has nothing that keeps it wide. A floor does, and so does a prior: the guide
# then has a point estimate for the variances, and F includes the density of the prior.


def start_on_one_eruption(u: Tensor) -> None:
    """Sets the first component on one eruption alone, too narrow to take any other."""
    pyro.clear_param_store()
    gaussian_mixture(2)(u)
    store = pyro.get_param_store()
    locs, covariances = store["locs"].detach().clone(), store["covariances"].detach().clone()
    locs[0] = u[0]
    covariances[0] *= NARROW
    store["locs"], store["covariances"] = locs, covariances


def collapse(u: Tensor) -> str:
    """Returns what EM says when it starts on one eruption."""
    start_on_one_eruption(u)
    try:
        run = vfe.EM(gaussian_mixture(2)).run(u, progress_bar=False)
    except DegenerateError as error:
        return str(error)
    return f"EM ended at {run.free_energy:.4f} nats, and no component collapsed."


def with_floor(u: Tensor) -> vfe.EMRun:
    """Returns the run from the same start, where no variance in any direction may be below the floor."""
    start_on_one_eruption(u)
    return vfe.EM(gaussian_mixture(2), floor={"covariances": FLOOR}).run(u, progress_bar=False)


def mixture_with_priors(u: Tensor) -> None:
    """The generative model of two components without correlations, whose weights and variances have priors."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((2,), 2.0)))
    variances = pyro.sample("variances", dist.InverseGamma(2.0, u.var(0) / 10).expand([2, 2]).to_event(2))
    locs = pyro.param("locs", u[:2].clone())
    with pyro.plate("data", len(u)):
        v = pyro.sample("v", dist.Categorical(weights))
        pyro.sample("u", dist.Normal(locs[v], variances[v].sqrt()).to_event(1), obs=u)


def with_priors(u: Tensor, narrow: float) -> vfe.EMRun:
    """Returns the run to the most probable parameters; the first component starts so much narrower than the data."""
    pyro.clear_param_store()
    variances = u.var(0) * torch.tensor([[narrow], [1.0]])
    start = init_to_value(values={"weights": torch.ones(2) / 2, "variances": variances})
    of_parameters = poutine.block(mixture_with_priors, expose=["weights", "variances"])
    guide = AutoDelta(of_parameters, init_loc_fn=start)
    return vfe.EM(mixture_with_priors, guide).run(u, progress_bar=False)


def in_words(two: Fit, three: Fit, message: str, floored: vfe.EMRun, priors: vfe.EMRun) -> str:
    """Returns what was found, in sentences."""
    ends = np.array([restart.free_energy for restart in three.run.restarts])
    num_best = int(np.sum(ends < three.run.free_energy + SAME))
    best = three.run.free_energy
    found = (
        f"Short and long eruptions: {two.run.free_energy:.2f} nats. A third component takes off "
        f"{two.run.free_energy - best:.2f} nats more, but {num_best} of {len(ends)} starts find that end; the others "
        f"stay up to {np.nanmax(ends) - best:.2f} nats above it. Started on one eruption alone, EM stops:"
    )
    mended = (
        f"With a floor of {FLOOR} square minutes it goes on, and ends {floored.free_energy - two.run.free_energy:.2f} "
        "nats above the best end: the floor holds the component open, but does not free it. With a prior it does: from "
        f"there and from the data's variances alike EM comes to {priors.free_energy:.4f} nats (of another model: "
        "without correlations, and with the prior's density in it)."
    )
    paragraphs = ((found, 2), (message, 4), (mended, 2))
    lines = [fill(text, 116, initial_indent=" " * n, subsequent_indent=" " * n) for text, n in paragraphs]
    return "\n".join(["In words", *lines])


# %%
# All of it
# ---------


def main() -> None:
    """Fits, draws, lets a component collapse, tells, and checks the numbers."""
    parser = argparse.ArgumentParser(description="Mixtures of Gaussians of the eruptions of Old Faithful, by EM.")
    parser.add_argument(
        "--output", type=Path, default=Path(sys.argv[0]).parent / "output", help="folder for the picture"
    )
    picture = parser.parse_args().output / "mixture.png"
    torch.set_default_dtype(torch.float64)
    u = eruptions()

    two, three = fit(2, u), fit(3, u)
    draw(picture, u.numpy(), two, three)
    message = collapse(u)
    floored = with_floor(u)
    wide, narrow = with_priors(u, 1.0), with_priors(u, NARROW)

    print(f"Two components\n{two.run}\n\nThree components\n{three.run}\n\nTwo components with priors\n{narrow}\n")
    print(in_words(two, three, message, floored, narrow))
    print(f"Picture: {picture}")

    assert abs(two.run.free_energy - KNOWN_SURPRISE) < 1e-3
    assert three.run.free_energy < two.run.free_energy
    assert "'covariances'[0]" in message and "floor" in message
    assert torch.linalg.eigvalsh(floored.params["covariances"]).min() > FLOOR * (1 - 1e-9)
    assert abs(wide.free_energy - narrow.free_energy) < SAME
    for run in (two.run, three.run, floored, wide, narrow):
        assert np.all(np.diff(run.history.free_energy) < SAME)


if __name__ == "__main__":
    main()
