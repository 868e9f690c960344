r"""The exponential families of the usual distributions, one entry each.

    log p(x | theta)  =  T(x) . eta(theta) - A(theta) + log h(x)

The mean parameters E[T(x)] = dA/deta are all that a fit by maximum likelihood needs: where they determine the
distribution in closed form, `from_mean_parameters` says how.

References:
    Wainwright and Jordan (2008), Graphical models, exponential families, and variational inference.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pyro.distributions
import torch
from torch import Tensor

from pyro_vfe.engine.shapes import broadcast_shapes
from pyro_vfe.program.zeros import log_at_zero

Parameters = Mapping[str, Tensor]
"""A distribution's parameters by name, shape `(*batch, *event)`; of `probs` and `logits` the one that was given."""

LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class Family:
    """One exponential family; x has shape `(*x, *event)`, parameters have `(*batch, *event)`."""

    parameters: Mapping[str, int]
    """How many event dims each parameter has; `probs` also stands for `logits`."""
    statistic: Callable[[Tensor, Parameters], Tensor]
    """T(x), shape `(*x, D)`; reads no parameters but the fixed ones, and sizes."""
    natural: Callable[[Parameters], Tensor]
    """eta, shape `(*batch, D)`; -inf where a probability is zero."""
    log_normalizer: Callable[[Parameters], Tensor]
    """A, shape `(*batch)` or one that broadcasts to it."""
    log_base_measure: Callable[[Tensor, Parameters], Tensor]
    """log h(x), shape `(*x)` or one that broadcasts to it; reads no parameters but the fixed ones."""
    from_mean_parameters: Callable[[Tensor, Parameters], dict[str, Tensor]] | None = None
    """The parameters with given E[T(x)], shape `(*batch, D)`, and given fixed parameters; None without closed form."""
    fixed: tuple[str, ...] = ()
    """Parameters that T and h read: they are known, not learned, and A does not read them."""
    event_dim: int = 0
    """How many dims one x has."""
    width: Callable[[int], int] | None = None
    """D as a function of the size of one x; None where a product with T(x) is no gain over a look-up or one product."""
    location: bool = False
    """Whether x - c has the same distribution with loc - c, so that x may be centred."""


def _zero(x: Tensor, _: Parameters) -> Tensor:
    return torch.zeros((), dtype=_float(x), device=x.device)


def _nothing(p: Parameters) -> Tensor:
    return next(iter(p.values())).new_zeros(())


def _float(x: Tensor) -> torch.dtype:
    return x.dtype if x.is_floating_point() else torch.get_default_dtype()


def _itself(x: Tensor, _: Parameters) -> Tensor:
    return x.unsqueeze(-1)


def _log_success(p: Parameters) -> Tensor:
    return log_at_zero(p["probs"]) if "probs" in p else torch.nn.functional.logsigmoid(p["logits"])


def _log_failure(p: Parameters) -> Tensor:
    return log_at_zero(1 - p["probs"]) if "probs" in p else torch.nn.functional.logsigmoid(-p["logits"])


def _log_odds(p: Parameters) -> Tensor:
    return log_at_zero(p["probs"]) - log_at_zero(1 - p["probs"]) if "probs" in p else p["logits"]


def _log_categories(p: Parameters) -> Tensor:
    return log_at_zero(p["probs"]) if "probs" in p else p["logits"].log_softmax(-1)


def _normal_statistic(x: Tensor, _: Parameters) -> Tensor:
    if x.dtype in (torch.float32, torch.float64):
        return torch.view_as_real(torch.complex(x, x * x))  # the same, and six times as fast
    return torch.stack([x, x * x], -1)


def _normal_natural(p: Parameters) -> Tensor:
    precision = p["scale"] ** -2
    return torch.stack(torch.broadcast_tensors(p["loc"] * precision, -precision / 2), -1)


def _normal_log_normalizer(p: Parameters) -> Tensor:
    return (p["loc"] / p["scale"]) ** 2 / 2 + p["scale"].log()


def _normal_from_mean(mean: Tensor, _: Parameters) -> dict[str, Tensor]:
    loc, square = mean.unbind(-1)
    return {"loc": loc, "scale": (square - loc * loc).clamp(min=0).sqrt()}


def _constant(value: float) -> Callable[[Tensor, Parameters], Tensor]:
    return lambda x, _: torch.full((), value, dtype=_float(x), device=x.device)


NORMAL = Family(
    {"loc": 0, "scale": 0},
    _normal_statistic,
    _normal_natural,
    _normal_log_normalizer,
    _constant(-LOG_2PI / 2),
    _normal_from_mean,
    width=lambda size: 2 * size,
    location=True,
)

LOG_NORMAL = Family(
    NORMAL.parameters,
    lambda x, p: _normal_statistic(x.log(), p),
    _normal_natural,
    _normal_log_normalizer,
    lambda x, _: -x.log() - LOG_2PI / 2,
    _normal_from_mean,
    width=lambda size: 2 * size,
)

HALF_NORMAL = Family(
    {"scale": 0},
    lambda x, _: (x * x).unsqueeze(-1),
    lambda p: -(p["scale"] ** -2).unsqueeze(-1) / 2,
    lambda p: p["scale"].log(),
    lambda x, _: torch.where(x >= 0, math.log(2) - LOG_2PI / 2, -torch.inf).to(_float(x)),
    lambda mean, _: {"scale": mean[..., 0].sqrt()},
    width=lambda size: size,
)


def _outer(x: Tensor, _: Parameters) -> Tensor:
    return torch.cat([x, (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)], -1)


def _multivariate_natural(p: Parameters) -> Tensor:
    precision = torch.cholesky_inverse(p["scale_tril"].tril())  # above the diagonal there is no gradient
    first = (precision @ p["loc"].unsqueeze(-1)).squeeze(-1)
    second = -precision.flatten(-2) / 2
    batch = broadcast_shapes(first.shape[:-1], second.shape[:-1])
    return torch.cat([first.expand(*batch, -1), second.expand(*batch, -1)], -1)


def _multivariate_log_normalizer(p: Parameters) -> Tensor:
    white = torch.linalg.solve_triangular(p["scale_tril"], p["loc"].unsqueeze(-1), upper=False).squeeze(-1)
    return (white * white).sum(-1) / 2 + p["scale_tril"].diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _multivariate_from_mean(mean: Tensor, _: Parameters) -> dict[str, Tensor]:
    size = math.isqrt(mean.shape[-1])  # D = size + size^2
    loc, square = mean[..., :size], mean[..., size:].unflatten(-1, (size, size))
    return {"loc": loc, "covariance_matrix": square - loc.unsqueeze(-1) * loc.unsqueeze(-2)}


MULTIVARIATE_NORMAL = Family(
    {"loc": 1, "scale_tril": 2},
    _outer,
    _multivariate_natural,
    _multivariate_log_normalizer,
    lambda x, _: torch.full((), -x.shape[-1] * LOG_2PI / 2, dtype=_float(x), device=x.device),
    _multivariate_from_mean,
    event_dim=1,
    width=lambda size: size + size * size,
    location=True,
)

BERNOULLI = Family(
    {"probs": 0},
    _itself,
    lambda p: _log_odds(p).unsqueeze(-1),
    lambda p: -_log_failure(p),
    _zero,
    lambda mean, _: {"probs": mean[..., 0]},
    width=lambda size: size,
)


def _log_choose(x: Tensor, p: Parameters) -> Tensor:
    n = p["total_count"]
    return torch.lgamma(n + 1) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)


def _log_successes_and_failures(p: Parameters) -> Tensor:
    return torch.stack([_log_success(p), _log_failure(p)], -1)


def _share_of_successes(mean: Tensor, _: Parameters) -> dict[str, Tensor]:
    return {"probs": mean[..., 0] / mean.sum(-1)}


# Counting failures beside successes, A is zero also where the count differs from datum to datum.
BINOMIAL = Family(
    {"probs": 0, "total_count": 0},
    lambda x, p: torch.stack(torch.broadcast_tensors(x, p["total_count"] - x), -1),
    _log_successes_and_failures,
    _nothing,
    _log_choose,
    _share_of_successes,
    fixed=("total_count",),
    width=lambda size: 2 * size,
)

BERNOULLI_OUTCOMES = Family(
    {"probs": 0},
    lambda x, _: torch.stack([x, 1 - x], -1),
    _log_successes_and_failures,
    _nothing,
    _zero,
    width=lambda size: 2 * size,
)
"""Bernoulli with a term for each outcome: probabilities of zero and one have no finite log-odds."""

NEGATIVE_BINOMIAL = Family(
    {"probs": 0, "total_count": 0},
    lambda x, p: torch.stack(torch.broadcast_tensors(x, p["total_count"].to(_float(x))), -1),
    _log_successes_and_failures,
    _nothing,
    lambda x, p: torch.lgamma(p["total_count"] + x) - torch.lgamma(x + 1) - torch.lgamma(p["total_count"]),
    _share_of_successes,
    fixed=("total_count",),
    width=lambda size: 2 * size,
)

GEOMETRIC = Family(
    {"probs": 0},
    _itself,
    lambda p: _log_failure(p).unsqueeze(-1),
    lambda p: -_log_success(p),
    _zero,
    lambda mean, _: {"probs": 1 / (1 + mean[..., 0])},
    width=lambda size: size,
)

POISSON = Family(
    {"rate": 0},
    _itself,
    lambda p: log_at_zero(p["rate"]).unsqueeze(-1),
    lambda p: p["rate"],
    lambda x, _: -torch.lgamma(x + 1),
    lambda mean, _: {"rate": mean[..., 0]},
    width=lambda size: size,
)

EXPONENTIAL = Family(
    {"rate": 0},
    _itself,
    lambda p: -p["rate"].unsqueeze(-1),
    lambda p: -p["rate"].log(),
    _zero,
    lambda mean, _: {"rate": 1 / mean[..., 0]},
)


def _gamma_log_normalizer(p: Parameters) -> Tensor:
    return torch.lgamma(p["concentration"]) - p["concentration"] * p["rate"].log()


GAMMA = Family(
    {"concentration": 0, "rate": 0},
    lambda x, _: torch.stack([x.log(), x], -1),
    lambda p: torch.stack(torch.broadcast_tensors(p["concentration"] - 1, -p["rate"]), -1),
    _gamma_log_normalizer,
    _zero,
    width=lambda size: 2 * size,
)

INVERSE_GAMMA = Family(
    GAMMA.parameters,
    lambda x, _: torch.stack([x.log(), 1 / x], -1),
    lambda p: torch.stack(torch.broadcast_tensors(-p["concentration"] - 1, -p["rate"]), -1),
    _gamma_log_normalizer,
    _zero,
    width=lambda size: 2 * size,
)

BETA = Family(
    {"concentration1": 0, "concentration0": 0},
    lambda x, _: torch.stack([x.log(), torch.log1p(-x)], -1),
    lambda p: torch.stack(torch.broadcast_tensors(p["concentration1"] - 1, p["concentration0"] - 1), -1),
    lambda p: (
        torch.lgamma(p["concentration1"])
        + torch.lgamma(p["concentration0"])
        - torch.lgamma(p["concentration1"] + p["concentration0"])
    ),
    _zero,
    width=lambda size: 2 * size,
)

DIRICHLET = Family(
    {"concentration": 1},
    lambda x, _: x.log(),
    lambda p: p["concentration"] - 1,
    lambda p: torch.lgamma(p["concentration"]).sum(-1) - torch.lgamma(p["concentration"].sum(-1)),
    _zero,
    event_dim=1,
    width=lambda size: size,
)

VON_MISES = Family(
    {"loc": 0, "concentration": 0},
    lambda x, _: torch.stack([x.cos(), x.sin()], -1),
    lambda p: p["concentration"].unsqueeze(-1) * torch.stack([p["loc"].cos(), p["loc"].sin()], -1),
    lambda p: torch.special.i0e(p["concentration"]).log() + p["concentration"] + LOG_2PI,
    _zero,
    width=lambda size: 2 * size,
)


def _one_hot(x: Tensor, p: Parameters) -> Tensor:
    size = next(iter(p.values())).shape[-1]
    return torch.nn.functional.one_hot(x.long(), size)


CATEGORICAL = Family(
    {"probs": 1},
    _one_hot,
    _log_categories,
    _nothing,
    _zero,
    lambda mean, _: {"probs": mean},
)

ONE_HOT_CATEGORICAL = Family(
    {"probs": 1},
    lambda x, _: x,
    _log_categories,
    _nothing,
    _zero,
    lambda mean, _: {"probs": mean},
    event_dim=1,
)

MULTINOMIAL = Family(
    {"probs": 1},
    lambda x, _: x,
    _log_categories,
    _nothing,
    lambda x, _: torch.lgamma(x.sum(-1) + 1) - torch.lgamma(x + 1).sum(-1),
    lambda mean, _: {"probs": mean / mean.sum(-1, keepdim=True)},
    event_dim=1,
    width=lambda size: size,
)

_BY_NAME = {
    "Bernoulli": BERNOULLI,
    "Beta": BETA,
    "Binomial": BINOMIAL,
    "Categorical": CATEGORICAL,
    "Chi2": GAMMA,
    "Dirichlet": DIRICHLET,
    "Exponential": EXPONENTIAL,
    "Gamma": GAMMA,
    "Geometric": GEOMETRIC,
    "HalfNormal": HALF_NORMAL,
    "InverseGamma": INVERSE_GAMMA,
    "LogNormal": LOG_NORMAL,
    "Multinomial": MULTINOMIAL,
    "MultivariateNormal": MULTIVARIATE_NORMAL,
    "NegativeBinomial": NEGATIVE_BINOMIAL,
    "Normal": NORMAL,
    "OneHotCategorical": ONE_HOT_CATEGORICAL,
    "OneHotCategoricalStraightThrough": ONE_HOT_CATEGORICAL,
    "Poisson": POISSON,
    "VonMises": VON_MISES,
}

FAMILIES: Mapping[type, Family] = {
    getattr(library, name): family
    for name, family in _BY_NAME.items()
    for library in (torch.distributions, pyro.distributions)
    if hasattr(library, name)
}
"""The families by class, of torch and of Pyro. A subclass is another distribution, and is not looked up."""
