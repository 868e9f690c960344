"""Programs with other latents w: F is an average over samples of w of a free energy that is exact in v.

E[ F ]  =  integral q(w) [ log q(w) + F(w) ] dw        F(w): the joint table of the programs with w held fixed
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import pyro
import pyro.distributions as dist
import torch
from oracles import oracle
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from programs.case import Program, bernoulli, categorical, empty, noise, positive, real, simplex, tensor, unit

POINTS = tensor([0.5, -1.0, 2.0])
COUNTS = tensor([1.0, 4.0, 2.0])
SEEN = torch.tensor([True, False, True])
WEIGHTED = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class SampledProgram:
    """A model and a guide with sampled latents, and the mean and spread of F over samples."""

    model: Callable[..., Any]
    """The generative model."""

    guide: Callable[..., Any]
    """The variational approximation."""

    args: tuple[Any, ...]
    """What both are called with."""

    moments: Callable[[], WEIGHTED] | None
    """The mean of F and its standard deviation for one particle; None where neither is known."""


def real_line() -> WEIGHTED:
    """Nodes and weights of the trapezoid rule on the line."""
    nodes = torch.linspace(-24.0, 24.0, 161, dtype=torch.float64)
    return nodes, torch.full_like(nodes, 0.3)


def unit_interval() -> WEIGHTED:
    """Nodes and weights of Gauss and Legendre on [0, 1]."""
    nodes, weights = (torch.as_tensor(x) for x in numpy.polynomial.legendre.leggauss(60))
    return (nodes + 1) / 2, weights / 2


def numbers() -> WEIGHTED:
    """0 to 59, each with weight 1."""
    return torch.arange(60.0, dtype=torch.float64), torch.ones(60, dtype=torch.float64)


def averaged(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    site: str,
    fn: Callable[[], Any],
    rule: Callable[[], WEIGHTED],
    shaped: Callable[[Tensor], Tensor] = lambda w: w,
) -> Callable[[], WEIGHTED]:
    """Returns the moments of F where w is the site drawn from fn, whatever v is."""

    def moments() -> WEIGHTED:
        nodes, weights = rule()
        values = []
        log_q = fn().log_prob(nodes)
        for w in nodes:
            held = {site: shaped(w)}
            fixed_guide = pyro.poutine.block(pyro.poutine.condition(guide, data=held), hide=[site])
            values.append(oracle(pyro.poutine.condition(model, data=held), fixed_guide, *args).terms["free_energy"])
        free_energy, probs = log_q + torch.stack(values), weights * log_q.exp()
        mean = (probs * free_energy).sum()
        return mean.detach(), (probs * (free_energy - mean) ** 2).sum().sqrt().detach()

    return moments


def v_depends_on_w(points: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.3, 1.5))
    with pyro.plate("data", 3):
        z = bernoulli("z", torch.sigmoid(w - 0.4))
        pyro.sample("u", dist.Normal(w * (1 + z), positive("sigma")), obs=points)


def normal_w() -> Any:
    return dist.Normal(real("loc", seed=1), positive("scale", seed=2))


def guide_of_w(points: Tensor) -> None:
    pyro.sample("w", normal_w())


def guide_of_w_and_v(points: Tensor) -> None:
    w = pyro.sample("w", normal_w())
    with pyro.plate("data", 3):
        bernoulli("z", torch.sigmoid(real("slope", 3, seed=3) * w))


def guide_of_v_before_w(points: Tensor) -> None:
    with pyro.plate("data", 3):
        bernoulli("z", unit("q_z", 3, seed=3))
    pyro.sample("w", normal_w())


def w_depends_on_v(points: Tensor) -> None:
    z = categorical("z", simplex("z_probs", 3))
    w = pyro.sample("w", dist.Normal(2 * noise(3, seed=4)[z], 0.8))
    pyro.sample("u", dist.Normal(w, 1.0), obs=points[0])


def guide_of_w_given_v(points: Tensor) -> None:
    z = categorical("z", simplex("q_z", 3, seed=5))
    pyro.sample("w", dist.Normal(real("locs", 3, seed=6)[z], positive("scale", seed=2)))


def moments_of_w_given_v() -> WEIGHTED:
    z_probs, q, locs, scale = (
        simplex("z_probs", 3),
        simplex("q_z", 3, seed=5),
        real("locs", 3, seed=6),
        positive("scale", seed=2),
    )
    nodes, weights = (x.unsqueeze(-1) for x in real_line())
    log_q = dist.Normal(locs, scale).log_prob(nodes)
    log_joint = dist.Normal(2 * noise(3, seed=4), 0.8).log_prob(nodes) + dist.Normal(nodes, 1.0).log_prob(POINTS[0])
    cost, probs = log_q - log_joint, weights * log_q.exp()
    by_z = (probs * cost).sum(0)
    spread = (q**2 * (probs * (cost - by_z) ** 2).sum(0)).sum().sqrt()
    return (q * (q.log() - z_probs.log() + by_z)).sum().detach(), spread.detach()


def poisson_w(counts: Tensor) -> None:
    w = pyro.sample("w", dist.Poisson(2.0))
    with pyro.plate("data", 3):
        z = bernoulli("z", unit("z_prob"))
        pyro.sample("u", dist.Poisson(0.5 + w * (1 + z)), obs=counts)


def poisson_guide(counts: Tensor) -> None:
    pyro.sample("w", dist.Poisson(positive("rate", seed=1)))


def beta_w(counts: Tensor) -> None:
    w = pyro.sample("w", dist.Beta(2.0, 2.0))
    with pyro.plate("data", 3):
        z = bernoulli("z", w)
        pyro.sample("u", dist.Poisson(1 + 2 * z), obs=counts)


def score_function_beta() -> Any:
    return dist.Beta(positive("a", seed=1), positive("b", seed=2)).has_rsample_(False)


def beta_guide(counts: Tensor) -> None:
    pyro.sample("w", score_function_beta())


def kept_sampled(counts: Tensor) -> None:
    g = pyro.sample("g", dist.Categorical(simplex("g_probs", 3)), infer={"enumerate": None})
    with pyro.plate("data", 3):
        z = categorical("z", simplex("z_probs", 3, 2, seed=1)[g])
        pyro.sample("u", dist.Poisson(positive("rates", 3, 2, seed=2)[g, z]), obs=counts)


def kept_sampled_fn() -> Any:
    return dist.Categorical(simplex("q_g", 3, seed=3))


def kept_sampled_guide(counts: Tensor) -> None:
    pyro.sample("g", kept_sampled_fn(), infer={"enumerate": None})


def three_values() -> WEIGHTED:
    return torch.arange(3), torch.ones(3, dtype=torch.float64)


def missing_points(points: Tensor) -> None:
    with pyro.plate("data", 3):
        z = categorical("z", simplex("z_probs", 2))
        x = pyro.sample("x", dist.Normal(noise(2, seed=1)[z], 1.0), obs=points, obs_mask=SEEN)
        pyro.sample("u", dist.Normal(x, 0.5), obs=points + 0.3)


def missing_points_guide(points: Tensor) -> None:
    with pyro.plate("data", 3), pyro.poutine.mask(mask=~SEEN):
        pyro.sample("x_unobserved", normal_w())


SAMPLED_PROGRAMS = {
    "v_depends_on_w": SampledProgram(
        v_depends_on_w, guide_of_w, (POINTS,), averaged(v_depends_on_w, guide_of_w, (POINTS,), "w", normal_w, real_line)
    ),
    "v_depends_on_w_both_guided": SampledProgram(
        v_depends_on_w,
        guide_of_w_and_v,
        (POINTS,),
        averaged(v_depends_on_w, guide_of_w_and_v, (POINTS,), "w", normal_w, real_line),
    ),
    "v_guided_before_w": SampledProgram(
        v_depends_on_w,
        guide_of_v_before_w,
        (POINTS,),
        averaged(v_depends_on_w, guide_of_v_before_w, (POINTS,), "w", normal_w, real_line),
    ),
    "w_depends_on_v": SampledProgram(
        w_depends_on_v, guide_of_w, (POINTS,), averaged(w_depends_on_v, guide_of_w, (POINTS,), "w", normal_w, real_line)
    ),
    "w_depends_on_v_both_guided": SampledProgram(w_depends_on_v, guide_of_w_given_v, (POINTS,), moments_of_w_given_v),
    "poisson_w": SampledProgram(
        poisson_w,
        poisson_guide,
        (COUNTS,),
        averaged(poisson_w, poisson_guide, (COUNTS,), "w", lambda: dist.Poisson(positive("rate", seed=1)), numbers),
    ),
    "score_function_w": SampledProgram(
        beta_w, beta_guide, (COUNTS,), averaged(beta_w, beta_guide, (COUNTS,), "w", score_function_beta, unit_interval)
    ),
    "discrete_site_kept_sampled": SampledProgram(
        kept_sampled,
        kept_sampled_guide,
        (COUNTS,),
        averaged(kept_sampled, kept_sampled_guide, (COUNTS,), "g", kept_sampled_fn, three_values),
    ),
    "missing_continuous_data": SampledProgram(
        missing_points,
        missing_points_guide,
        (POINTS,),
        averaged(
            missing_points,
            missing_points_guide,
            (POINTS,),
            "x_unobserved",
            normal_w,
            real_line,
            shaped=lambda w: w.expand(3),
        ),
    ),
    "auto_normal_for_w": SampledProgram(
        v_depends_on_w, AutoNormal(pyro.poutine.block(v_depends_on_w, hide=["z"])), (POINTS,), None
    ),
}


def delta_guide(points: Tensor) -> None:
    pyro.sample("w", dist.Delta(real("point", seed=7)))


def delta_terms() -> dict[str, Tensor]:
    held = {"w": real("point", seed=7)}
    return {
        "free_energy": oracle(pyro.poutine.condition(v_depends_on_w, data=held), empty, POINTS).terms["free_energy"]
    }


POINT_ESTIMATES = {"point_estimate_of_w": Program(v_depends_on_w, delta_guide, (POINTS,), expected=delta_terms)}
"""Nothing is sampled where w is a Delta: exact."""
