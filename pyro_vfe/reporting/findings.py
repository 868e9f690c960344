"""What is worth a person's attention."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be."""


@dataclass(frozen=True)
class Diagnosis:
    """Findings, worst first."""

    findings: tuple[Finding, ...]
    """Worst first."""
