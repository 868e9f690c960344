"""What is worth a person's attention, as data; printed, in plain words.

Worst first: an infinite F, then what costs nats, by how many; then observations that have no price in nats.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from textwrap import fill
from typing import TYPE_CHECKING

from pyro_vfe.errors import VFEError

if TYPE_CHECKING:
    import xarray

_WIDTH = 110


@dataclass(frozen=True)
class Kind:
    """What findings of a kind have in common."""

    title: str
    """What is wrong, in a few words."""
    value: str
    """What the value of a finding is, with its unit."""
    severity: str = "none: 0"
    """Which nats the severity counts."""


KINDS = {
    "support-mismatch": Kind("The guide allows what the model forbids", "the gap, nats", "infinite"),
    "not-finite": Kind("F is not a number", "F at the last reading, nats", "infinite"),
    "guide-bottleneck": Kind("The guide leaves a gap", "the gap, nats per datum", "the gap"),
    "guide-collapsed": Kind(
        "Q has collapsed to one value", "the share of elements that Q has on it", "the gap of the latent"
    ),
    "guide-ignores-data": Kind(
        "Q ignores its input", "how much Q's elements differ, mean nats per element", "the gap of the latent"
    ),
    "plate-element": Kind("Few elements of a plate carry the gap", "their share of the gap", "their gap"),
    "phase-raised": Kind("F rose in a phase", "the largest rise, nats", "the largest rise"),
    "diverging": Kind("F has risen from its lowest", "the rise, nats per datum", "the rise"),
    "not-settled": Kind("F is still falling", "the last fall, nats per datum", "the last fall"),
    "spread-too-large": Kind(
        "The spread over particles is too large", "the standard error of F, nats", "the standard error"
    ),
    "unused-state": Kind(
        "A state is never used", "how many elements Q expects in such states", "the gap of the latent if Q is to blame"
    ),
    "states-alike": Kind(
        "The data do not tell the states apart",
        "what they tell of them, mean nats per element",
        "how much lower a random start of EM ended, where one was made",
    ),
    "spread-unknown": Kind("The spread over particles is not known", "the number of particles"),
    "model-bottleneck": Kind("The model is the bottleneck", "the surprise, nats per datum"),
}
"""The kinds of findings by slug; those of equal severity come in this order."""


@dataclass(frozen=True)
class Finding:
    """One thing to know, and what to do about it."""

    kind: str
    """Which kind: a slug of `KINDS`."""
    site: str | None
    """The latent, plate or phase that it is about; None where it is about the whole."""
    value: float
    """The number, in the unit that `KINDS[kind].value` says."""
    problem: str
    """What is wrong, in words."""
    advice: str
    """What to do."""
    severity: float
    """The nats at stake, summed over the data: infinite where F is, 0 where it has no price in nats."""
    indices: tuple[int, ...] = ()
    """Which elements of the plate, or which values in the latent's support, where it is about some of them."""

    @property
    def title(self) -> str:
        """The kind, in a few words."""
        return KINDS[self.kind].title

    def __str__(self) -> str:
        return self._in_words(self.advice)

    def _in_words(self, advice: str) -> str:
        indent = "   "
        about = "" if self.site is None else f"  ({self.site})"
        return "\n".join(
            (
                f"{self.title}{about}  [{self.kind}]",
                fill(self.problem, _WIDTH, initial_indent=indent, subsequent_indent=indent),
                fill(f"-> {advice}", _WIDTH, initial_indent=indent, subsequent_indent=indent * 2),
            )
        )


@dataclass(frozen=True)
class Diagnosis:
    """Findings, worst first, and what was looked at."""

    findings: tuple[Finding, ...]
    """Worst first: infinite F, then by nats, then what has no price in nats."""
    looked_at: tuple[str, ...] = ()
    """What was looked at, in words."""
    not_looked_at: tuple[str, ...] = ()
    """What was not looked at, and why."""
    notes: tuple[str, ...] = field(default=())
    """What the run itself had to say."""

    def __len__(self) -> int:
        """The number of findings; a diagnosis without any is false."""
        return len(self.findings)

    def __iter__(self) -> Iterator[Finding]:
        """The findings, worst first."""
        return iter(self.findings)

    def __getitem__(self, index: int) -> Finding:
        """One of them; the worst is the first."""
        return self.findings[index]

    def of(self, kind: str) -> tuple[Finding, ...]:
        """Returns the findings of one kind, worst first.

        Args:
            kind: A slug of `KINDS`.

        Raises:
            VFEError: There is no such kind.
        """
        if kind not in KINDS:
            raise VFEError(f"There are no findings of kind '{kind}'.", hint=f"The kinds are: {', '.join(KINDS)}.")
        return tuple(finding for finding in self.findings if finding.kind == kind)

    def to_xarray(self) -> "xarray.Dataset":
        """Returns an `xarray.Dataset` with one entry per finding along `finding`, worst first."""
        import numpy as np
        import xarray

        words = {
            name: ("finding", np.array([getattr(f, name) or "" for f in self.findings], dtype=str))
            for name in ("kind", "site", "problem", "advice")
        }
        numbers = {
            name: ("finding", np.array([getattr(f, name) for f in self.findings], dtype=float))
            for name in ("value", "severity")
        }
        return xarray.Dataset({**words, **numbers})

    def __str__(self) -> str:
        blocks = [self._summary()]
        known = ""
        for number, finding in enumerate(self.findings, start=1):
            blocks.append(f"{number}. {finding._in_words('As above.' if finding.advice == known else finding.advice)}")
            known = finding.advice
        blocks += ["\n".join(_wrapped(line) for line in lines) for lines in (self._footers(),) if lines]
        return "\n\n".join(blocks)

    def _repr_html_(self) -> str:
        items = "".join(
            f"<li style='margin:8px 0'><b>{escape(f.title)}</b>"
            f"{'' if f.site is None else f' ({escape(f.site)})'} <code>{escape(f.kind)}</code>"
            f"<div>{escape(f.problem)}</div><div>&rarr; {escape(f.advice)}</div></li>"
            for f in self.findings
        )
        shown = f"<ol>{items}</ol>" if items else ""
        footers = "".join(f"<div style='opacity:.75'>{escape(line)}</div>" for line in self._footers())
        summary = escape(self._summary())
        return f"<div style='max-width:60em'><p>{summary}</p>{shown}{footers}</div>"

    def _summary(self) -> str:
        """The first line: how many findings there are, and whether they cost nats."""
        if not self.findings:
            return "Nothing could be looked at." if self.not_looked_at and not self.looked_at else "Nothing found."
        count = "1 finding" if len(self.findings) == 1 else f"{len(self.findings)} findings, worst first"
        priced = [finding.severity for finding in self.findings if finding.severity > 0]
        if any(math.isinf(nats) for nats in priced):
            return f"{count}: F is infinite or not a number."
        return f"{count}." if priced else f"{count}, without a price in nats."

    def _footers(self) -> list[str]:
        """What comes after the findings, a paragraph each."""
        lines = [f"Looked at: {'; '.join(self.looked_at)}."] if self.looked_at else []
        lines += [f"Not looked at: {line}" for line in self.not_looked_at]
        return lines + [f"The run notes: {note}" for note in self.notes]


def sorted_findings(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Returns findings worst first; equally bad ones in the order of `KINDS`, then as they came.

    Args:
        findings: In any order.
    """
    order = {kind: rank for rank, kind in enumerate(KINDS)}
    return tuple(sorted(findings, key=lambda finding: (-finding.severity, order[finding.kind])))


def _wrapped(line: str) -> str:
    return fill(line, _WIDTH, subsequent_indent="   ")
