"""The page of results: a row for each comparison, and the machine that it was made on."""

import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from contest import FASTEST, Case, Outcome, Target, ratio

TOLERANCE = 1e-3
"""How far apart, relatively, the contestants' numbers may be: float32 against float64 over a million steps."""

PACKAGES = [
    "torch",
    "pyro-ppl",
    "hmmlearn",
    "dynamax",
    "jax",
    "numpyro",
    "funsor",
    "scikit-learn",
    "pomegranate",
    "pgmpy",
    "pyagrum",
    "pytest-benchmark",
    "numpy",
]


@dataclass(frozen=True)
class Row:
    """Ours against one peer."""

    case: str
    peer: str
    ours: Outcome
    theirs: Outcome
    target: Target | None
    alike: bool = True

    @property
    def complete(self) -> bool:
        """Whether both were measured."""
        return bool(self.ours.times and self.theirs.times)

    @property
    def reading(self) -> float:
        """What the target is held against, or the ratio of the times where there is none."""
        if not self.complete:
            return math.nan
        return (self.target or ratio(math.inf)).reading(self.ours, self.theirs)

    @property
    def differs(self) -> bool:
        """Whether the two found different numbers."""
        if not self.alike:
            return False
        shared = self.ours.numbers.keys() & self.theirs.numbers.keys()
        return any(not math.isclose(self.ours.numbers[k], self.theirs.numbers[k], rel_tol=TOLERANCE) for k in shared)

    @property
    def verdict(self) -> str:
        """Met or missed, where there is a target."""
        if self.target is None:
            return ""
        if self.ours.failed:
            return "missed"
        if self.theirs.failed:
            return "no peer"
        return "met" if self.reading <= self.target.limit else "missed"

    @property
    def notes(self) -> str:
        """How often each was measured, what the preparation took, and why one failed."""
        facts = [f"{name} {seconds:.3g} s" for name, seconds in self.ours.facts.items()]
        failures = [
            f"{who}: {outcome.failed}"
            for who, outcome in (("ours", self.ours), (self.peer, self.theirs))
            if outcome.failed
        ]
        measured = []
        if self.complete:
            measured.append(f"{len(self.ours.times)} and {len(self.theirs.times)} times")
            measured.append(f"first calls {self.ours.first:.3g} and {self.theirs.first:.3g} s")
        numbers = ["other numbers!"] if self.differs else []
        return "; ".join([*measured, *facts, *failures, *numbers]).replace("|", "/")

    def __str__(self) -> str:
        unit = self.target.unit if self.target else ""
        reading = f"{self.reading:.2f}{unit}" if self.complete else ""
        limit = f"{self.target.limit:g}{unit}" if self.target else ""
        cells = [
            self.case,
            self.peer,
            *(_milliseconds(outcome) for outcome in (self.ours, self.theirs)),
            reading,
            limit,
            self.verdict,
            *(_mebibytes(outcome) for outcome in (self.ours, self.theirs)),
            self.notes,
        ]
        return "| " + " | ".join(cells) + " |"


@dataclass(frozen=True)
class GeometricMean:
    """The geometric mean of several rows' readings."""

    case: str
    peer: str
    readings: Sequence[float]
    limit: float

    def __str__(self) -> str:
        mean = math.exp(sum(map(math.log, self.readings)) / len(self.readings))
        verdict = "met" if mean <= self.limit else "missed"
        return f"| {self.case} | {self.peer} | | | {mean:.2f} | {self.limit:g} | {verdict} | | | |"


def rows_of(name: str, case: Case, ours: Outcome, peers: Mapping[str, Outcome]) -> list[Row]:
    """Returns a row for each peer and target."""
    measured = {who: peers[who].seconds for who in case.peers if peers[who].times}
    fastest = min(measured, key=lambda who: measured[who], default=next(iter(peers)))
    rows = []
    for who, peer in peers.items():
        targets = case.targets.get(who, ()) + (case.targets.get(FASTEST, ()) if who == fastest else ())
        rows += [Row(name, who, ours, peer, target, case.alike) for target in targets or (None,)]
    return rows


def page(rows: Sequence[Row | GeometricMean], sections: Sequence[str] = ()) -> str:
    """Returns the page in Markdown.

    Args:
        rows: The rows in order, each printed as a line of the table.
        sections: What follows the table: numbers that no clock gives.
    """
    table = _HEADER.format(machine=machine()) + "".join(f"{row}\n" for row in rows)
    return "\n".join([table, *sections])


def machine() -> str:
    """Returns what the figures depend on, as a list in Markdown."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    lines = {
        "Processor": f"{_processor()}, {os.cpu_count()} cores",
        "Threads": os.environ.get("OMP_NUM_THREADS", "one for each contestant"),
        "Memory": f"{memory:.0f} GiB",
        "System": platform.platform(),
        "Load at the end": " ".join(f"{load:.1f}" for load in os.getloadavg()),
        "Versions": ", ".join([f"Python {platform.python_version()}", *_versions()]),
    }
    return "\n".join(f"- {name}: {text}" for name, text in lines.items())


def _versions() -> list[str]:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} not installed")
    return found


def _processor() -> str:
    named = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return named[1] if named else platform.machine()


def _milliseconds(outcome: Outcome) -> str:
    if not outcome.times:
        return "—"
    milliseconds = 1e3 * outcome.seconds
    return f"{milliseconds:,.{0 if milliseconds >= 100 else 1 if milliseconds >= 1 else 3}f}"


def _mebibytes(outcome: Outcome) -> str:
    return f"{outcome.peak / 2**20:.0f}" if outcome.times else "—"


_HEADER = """# Results

Written by `make bench`: every figure is of one run on one machine,

{machine}

Times are medians in milliseconds, ours and the peers' in turn, each contestant in a process of its own; a contestant
whose calls are long has fewer of them. The reading is ours over the peer's where it has no unit. A target held against
the fastest peer stands in that peer's row. Peak memory, in MiB, is the
most that the process held beyond its imports and data, the first call (our analysis and spot check, jax's
compilation) included. The last column counts the measurements of both, and gives the seconds of the first calls, which
are not among them: in those of networks our plan is searched for. Contestants must agree on the log evidence, and on
counts, marginals and parameters where both give them. What was tried is in [NOTES.md](NOTES.md).

| case | peer | ours | peer's | reading | target | | ours MiB | peer's MiB | |
| --- | --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | --- |
"""
