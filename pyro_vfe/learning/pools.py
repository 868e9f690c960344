r"""Expected statistics pooled by parameter: sums of the size of the parameters, which can be added and decayed.

    simplex   sum_k a_k log theta_k                    unit   a log theta + b log (1 - theta)
    rate      a log theta - b theta                    loc, covariance: see `moments`

The objective of every family that has a closed form is one of these in its parameter. All sites that a parameter feeds
add to the same coefficients, and so does a conjugate prior.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from torch import Tensor

from pyro_vfe.learning.moments import Evidence, Moments, joined

Kind = Literal["simplex", "unit", "rate", "location", "spread", "several"]

LocationAndCovariance = tuple[str | None, str]
"""The parameters that give a location (None: it is known) and a covariance."""

T = TypeVar("T")


@dataclass(frozen=True)
class ObjectiveForm:
    """The form of the objective in one parameter, and how the parameter is given."""

    kind: Kind
    given: str
    """probs, logits, rate, loc; for a covariance scale, variance, scale_tril, covariance_matrix, precision_matrix."""
    size: int = 1
    """The size of one simplex, location or covariance, for which the parameter has that many (squared) entries."""

    def __str__(self) -> str:
        size = f" of size {self.size}" if self.size > 1 else ""
        return f"the {self.given}{size} of a {self.kind}"


SEVERAL = ObjectiveForm("several", "parameter")
"""The form of a parameter that is used in several forms: nothing can be pooled."""


@dataclass(frozen=True, eq=False)
class Pools:
    """The coefficients of the objective in each parameter; adds, and scales."""

    forms: Mapping[str, ObjectiveForm] = field(default_factory=dict)
    """The form that each parameter's objective has."""
    coefficients: Mapping[str, Tensor] = field(default_factory=dict)
    """a, or a and b, by parameter, `(1, entries)` or `(2, entries)`; float64."""
    moments: Mapping[LocationAndCovariance, Moments] = field(default_factory=dict)
    """What data say about locations and covariances that are learned."""
    evidence: Mapping[str, Evidence] = field(default_factory=dict)
    """What data of known covariance say about locations."""
    partners: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Parameters that are read beside a parameter, on whose values its own best value may depend."""
    refusals: Mapping[str, str] = field(default_factory=dict)
    """Parameters without a closed form, with the reason in words."""
    priors: Mapping[str, str] = field(default_factory=dict)
    """The families of the priors that were pooled, by parameter."""

    def __add__(self, other: "Pools") -> "Pools":
        """The pools of the data of both."""
        if not other.forms and not other.refusals:
            return self
        clashes = {
            name: f"it is {form} in one place and {other.forms[name]} in another"
            for name, form in self.forms.items()
            if other.forms.get(name, form) != form
        }
        return Pools(
            {**other.forms, **self.forms, **dict.fromkeys(clashes, SEVERAL)},
            _merged(self.coefficients, other.coefficients, lambda a, b: a + b, clashes),
            _merged(self.moments, other.moments, lambda a, b: joined([a, b]), clashes),
            _merged(self.evidence, other.evidence, lambda a, b: a + b, clashes),
            _merged(self.partners, other.partners, lambda a, b: a | b, {}),
            {**clashes, **other.refusals, **self.refusals},
            {**other.priors, **self.priors},
        )

    def scaled(self, factor: float) -> "Pools":
        """The pools with every datum counted so many times.

        Args:
            factor: What to multiply the weights by.
        """
        return Pools(
            self.forms,
            {name: values * factor for name, values in self.coefficients.items()},
            {pair: values.scaled(factor) for pair, values in self.moments.items()},
            {name: values.scaled(factor) for name, values in self.evidence.items()},
            self.partners,
            self.refusals,
            self.priors,
        )


Key = TypeVar("Key", str, LocationAndCovariance)


def _merged(
    mine: Mapping[Key, T], theirs: Mapping[Key, T], add: Callable[[T, T], T], clashes: Mapping[str, str]
) -> dict[Key, T]:
    """The union of both, added where both have a key; the first's where a parameter has two forms."""
    merged = {**theirs, **mine}
    for key in mine.keys() & theirs.keys():
        names = key if isinstance(key, tuple) else (key,)
        if not any(name in clashes for name in names):
            merged[key] = add(mine[key], theirs[key])
    return merged
