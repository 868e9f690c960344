r"""Whether F rests: two windows of readings side by side, in nats per datum.

    change   =  mean of the last window  -  mean of the one before
    rests:   |change| + 2 sqrt( (s_1^2 + s_2^2) / window )  <=  tol      s of each window, what moves inside of it too
    falls:   -change  >  tol  and  4 sqrt(2 / window) noise
    noise^2  =  2/3 mean_i ( F_i - (F_{i-1} + F_{i+1}) / 2 )^2           what varies beside a trend

Two noisy means are close by chance now and then. That the change counts with its error makes rest something that is
known, rather than something of which the contrary is not. Of a fall the trend is no error. Where neither holds, nobody
knows yet.

References:
    Schuirmann (1987), A comparison of the two one-sided tests procedure and the power approach for assessing the
    equivalence of average bioavailability.
    Gasser, Sroka and Jennen-Steinmetz (1986), Residual variance and residual pattern in nonlinear regression.
"""

import math
from dataclasses import dataclass

import numpy as np

from pyro_vfe.learning.history import Numbers

WINDOW = 5
"""How many readings are averaged, and compared with as many before them."""

_ERRORS = 2.0
"""By how many standard errors a change may be off, for rest."""

_SURE = 4.0
"""A fall by so many standard errors, which are of few readings, is one."""


@dataclass(frozen=True)
class Change:
    """How F per datum changed from one window of readings to the next."""

    nats: float
    """The change of the mean; negative where F fell."""
    error: float
    """Its standard error where F has no trend, nats."""
    noise: float
    """Its standard error beside a trend, nats."""
    window: int
    """How many readings were averaged, twice."""

    def rests(self, tol: float) -> bool:
        """Whether F is known to change by no more than a tolerance.

        Args:
            tol: The change that counts as none, in nats per datum.
        """
        return abs(self.nats) + _ERRORS * self.error <= tol

    def falls(self, tol: float) -> bool:
        """Whether F is known to fall by more than a tolerance.

        Args:
            tol: As for `rests`.
        """
        return -self.nats > max(tol, _SURE * self.noise)


def change_of(free_energies: Numbers, window: int = WINDOW) -> Change | None:
    """Returns the change between the last two windows of readings; None where there are too few, or infinite ones.

    Args:
        free_energies: All readings of F, in nats per datum.
        window: How many are averaged. One where F is exact: a single one is taken to have no noise.
    """
    last = free_energies[-2 * window :]
    if len(last) < 2 * window or not np.isfinite(last).all():
        return None
    before, after = last[:window], last[window:]
    error = noise = 0.0
    if window > 1:
        error = math.sqrt((before.var(ddof=1) + after.var(ddof=1)) / window)
        noise = noise_of(last) * math.sqrt(2 / window)
    return Change(float(after.mean() - before.mean()), error, noise, window)


def noise_of(free_energies: Numbers) -> float:
    """Returns the standard deviation of single readings beside their trend, in nats per datum.

    Args:
        free_energies: At least three readings.
    """
    return float(np.sqrt(np.mean(np.diff(free_energies, 2) ** 2) / 6))
