r"""Whether the draws of a guide can stand for the posterior: the tail of their importance weights.

    w_s = P(v_s, u) / Q(v_s),        P(w > x)  ~  x^(-1/k)  for large x

The weights have a variance where k < 1/2 and a mean where k < 1. Above 0.7 no practical number of draws suffices.

References:
    Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling.
    Yao, Vehtari, Simpson and Gelman (2018), Yes, but did it work? Evaluating variational inference.
"""

import warnings
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyro_vfe.errors import VFEWarning, callers_level

GOOD_K = 0.7
"""The largest k at which averages over weighted draws are to be trusted (Vehtari et al. 2024)."""

FEW = 5
"""A tail of fewer different weights has no k (Vehtari et al. 2024 fit to no fewer than five)."""

WORTH = 0.1
"""Where there is no k: the fraction of even weights that the weights should at least be worth."""

_EQUAL = 1e-6
"""Log weights that differ by less are equal but for the rounding of what they are sums of."""


def pareto_k(log_weights: ArrayLike) -> float:
    """Returns the Pareto k of importance weights, as the installed ArviZ estimates it.

    It is -inf where the largest weights are all equal (a guide that is the posterior), and NaN where there is nothing
    to fit: too few draws, or too few different weights among the largest.

    Args:
        log_weights: log P(v, u) - log Q(v) of each draw, up to a constant, in nats; `(draws,)`.
    """
    found = np.asarray(log_weights, dtype=np.float64).ravel()
    tail = _tail(found)
    if len(tail) <= FEW or not np.isfinite(found.max()) or np.isnan(found).any():
        return np.nan
    if tail[-1] - tail[0] < _EQUAL:
        return -np.inf
    if 1 + np.count_nonzero(np.diff(tail) > 0) < FEW:
        return np.nan
    with np.errstate(all="ignore"):
        return float(_fitted(found))


def worth(log_weights: ArrayLike) -> float:
    """Returns how many evenly weighted draws the weighted ones are worth, (sum w)^2 / sum w^2.

    Args:
        log_weights: As for `pareto_k`.

    References:
        Kish (1965), Survey Sampling.
    """
    found = np.asarray(log_weights, dtype=np.float64).ravel()
    if not len(found) or not np.isfinite(found.max()):
        return np.nan
    weights = np.exp(found - found.max())
    return float(weights.sum() ** 2 / (weights**2).sum())


def warn_if_unreliable(log_weights: ArrayLike) -> float:
    """Returns the Pareto k of importance weights, and warns where the draws do not stand for the posterior.

    Args:
        log_weights: As for `pareto_k`.
    """
    k, evenly, num_draws = pareto_k(log_weights), worth(log_weights), np.size(log_weights)
    if k > GOOD_K:
        fact = f"The importance weights of the guide's draws have Pareto k = {k:.2f}, more than {GOOD_K}"
    elif np.isnan(k) and evenly < WORTH * num_draws:
        fact = "The importance weights of the guide's draws are too uneven (and too few to estimate a Pareto k)"
    else:
        return k
    warnings.warn(
        f"{fact}: the {num_draws} draws are worth {evenly:.1f} evenly weighted ones. Averages over them are averages "
        "over the guide and not over the posterior, and reweighting does not mend that. Fit the guide further or give "
        "it a richer family (vfe.diagnose says where the gap is); where all latents are discrete, leave the guide out: "
        "the draws are then from the exact posterior.",
        VFEWarning,
        stacklevel=callers_level(),
    )
    return k


def _tail(log_weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """The largest weights and the one before them, ascending; none where there are too few draws."""
    num_draws = len(log_weights)
    size = int(min(num_draws / 5, 3 * num_draws**0.5))
    return np.sort(log_weights)[num_draws - size - 1 :] if size >= FEW else np.empty(0)


def _fitted(log_weights: NDArray[np.float64]) -> Any:
    """ArviZ's own fit; 1.x takes log-likelihoods, which weigh by their inverse."""
    import xarray

    with warnings.catch_warnings():
        # A diagnosis does not pass on what ArviZ 0.23 announces at its import.
        warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing", FutureWarning)
        import arviz

    library: Any = arviz
    if hasattr(library, "psislw"):
        return library.psislw(log_weights)[1]
    draws: Any = xarray.DataArray(-log_weights, dims="draw")
    return draws.azstats.psislw(dim="draw")[1]
