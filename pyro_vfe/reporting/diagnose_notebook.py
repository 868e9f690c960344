"""What the looks at one subject write down, and from when on they do."""

from dataclasses import dataclass, field
from math import isfinite

from pyro_vfe.errors import VFEError
from pyro_vfe.reporting.findings import Diagnosis, Finding, sorted_findings

_ROUNDING = 1e-12
"""Less than this is no number of nats that anybody acts on."""


@dataclass(frozen=True)
class Thresholds:
    """From when on something is worth a finding."""

    gap_share: float
    """Of the gap in gap + complexity."""
    gap_per_datum: float
    """Nats."""
    element_share: float
    """Of the gap of a plate, held by its worst elements."""
    element_nats: float
    """The gap that these elements have, together."""
    unused: float
    """The expected count of a state, relative to an equal share of the elements."""
    collapsed: float
    """The share of elements that Q has on one value."""
    flat: float
    """A change of F that is none, nats per datum."""
    spread: float
    """The standard error of F, nats per datum."""
    rounding: float
    """A rise of F that is none, relative to F."""

    def check(self) -> None:
        """Checks that all are positive numbers.

        Raises:
            VFEError: One is not.
        """
        for name, value in vars(self).items():
            if not (isfinite(value) and value >= 0):
                raise VFEError(f"diagnose was given {name}={value}.", hint="Give a number that is not negative.")


@dataclass(eq=False)
class Notebook:
    """Findings and looks so far."""

    thresholds: Thresholds
    findings: list[Finding] = field(default_factory=list)
    looked_at: list[str] = field(default_factory=list)
    not_looked_at: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    may_be_a_saddle: bool = False
    """Whether components are alike and another start may do better."""
    alike: set[str] = field(default_factory=set)
    """The latents of which that was said."""

    def of(self, kind: str) -> list[Finding]:
        """Returns the findings of a kind so far.

        Args:
            kind: Which.
        """
        return [finding for finding in self.findings if finding.kind == kind]

    def find(
        self,
        kind: str,
        site: str | None,
        value: float,
        problem: str,
        advice: str,
        severity: float = 0.0,
        indices: tuple[int, ...] = (),
    ) -> None:
        """Writes a finding down; the arguments are its fields."""
        self.findings.append(Finding(kind, site, float(value), problem, advice, float(severity), indices))

    def look(self, what: str) -> None:
        """Writes down that something was looked at.

        Args:
            what: In words.
        """
        self.looked_at.append(what)

    def skip(self, what: str, why: str | Exception) -> None:
        """Writes down that something was not looked at.

        Args:
            what: In words.
            why: An error that says so, or words.
        """
        reason = why.problem if isinstance(why, VFEError) else str(why)
        self.not_looked_at.append(f"{what}. {reason}")

    def diagnosis(self) -> Diagnosis:
        """Returns what was written down, the worst first."""
        return Diagnosis(
            sorted_findings(self.findings),
            tuple(dict.fromkeys(self.looked_at)),
            tuple(dict.fromkeys(self.not_looked_at)),
            tuple(self.notes),
        )


def nats(value: float) -> str:
    """A number of nats, in words.

    Args:
        value: How many.
    """
    if abs(value) < _ROUNDING:
        return "0 nats"
    return f"{value:,.0f} nats" if abs(value) >= 1000 else f"{value:.3g} nats"


def per_datum(value: float, num_data: int) -> str:
    """A number of nats per datum, in words.

    Args:
        value: How many.
        num_data: How many data there are; of one, nothing is said.
    """
    return nats(value) if num_data == 1 else f"{nats(value)} per datum"


def percent(share: float) -> str:
    """A share, in words.

    Args:
        share: Between 0 and 1.
    """
    return "more than 99.9%" if 0.9995 <= share < 1 else f"{100 * share:.3g}%"
