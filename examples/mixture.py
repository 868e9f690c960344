r"""Eruptions of Old Faithful: a mixture of Gaussians with full covariances, from many starts, and how one can collapse.

    P(v, u)  =  prod_n  weight[v_n]  Normal(u_n | loc[v_n], covariance[v_n])        u_n = (duration, waiting time)

F has many local minima, so EM is run from several random starts, and the best end is kept. And F has no lower bound: a
component that sits on one eruption alone can become as narrow as it likes. The run stops there, and says what helps: a
floor under the variances, or a prior.

References:
    Azzalini and Bowman (1990), A look at some data on the Old Faithful geyser: the data, in the version of R's `faithful`.
    Scrucca, Fop, Murphy and Raftery (2016), mclust 5: clustering, classification and density estimation using Gaussian
    finite mixture models: the log-likelihood of two components (model VVV).
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from torch import Tensor
from torch.distributions import constraints

import pyro_vfe as vfe

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
DARK, LIGHT = "#0b3c5d", "#e69f00"

Program = Callable[[Tensor], None]


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


def draw_components(axes: Axes, u: np.ndarray, responsibilities: np.ndarray, locs: np.ndarray, cov: np.ndarray) -> None:
    """Draws the data, shaded by the component that takes them, and each component's ellipse of two standard deviations."""
    shade = responsibilities @ np.linspace(0.0, 1.0, responsibilities.shape[1])
    axes.scatter(*u.T, c=shade, cmap="cividis", vmin=0, vmax=1, s=18, edgecolors="0.2", linewidths=0.4)
    for loc, covariance in zip(locs, cov, strict=True):
        variances, directions = np.linalg.eigh(covariance)
        angle = np.degrees(np.arctan2(directions[1, -1], directions[0, -1]))
        width, height = 4 * np.sqrt(variances[::-1])
        axes.add_patch(Ellipse(loc, width, height, angle=angle, fill=False, color=DARK, linewidth=1.6))
    axes.set(xlabel="duration, minutes", ylabel="waiting time, minutes")
