"""What the enumerated run takes for each sample site, beyond the program's own code."""

from collections.abc import Callable

import pytest
from contest import Case, Contestant, added_microseconds

PROGRAMS = {
    "Python-loop HMM 256x100x8": ("loop", (256, 100, 8), 200),
    "Python-loop HMM 64x1000x32": ("loop", (64, 1000, 32), 2000),
    "200 small sites": ("small", (100,), 200),
    "200 unlike sites": ("unlike", (100,), 200),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_overhead(contest: Callable[[str, Case], None], program: str) -> None:
    """The run with all tables made, beside the program with its latents set to their supports."""
    kind, sizes, sites = PROGRAMS[program]
    ours, alone = (
        Contestant("contestants.runs", function, {"program": kind, "sizes": sizes}) for function in ("ours", "alone")
    )
    targets = {"the program alone": (added_microseconds(60.0, sites),)}
    contest(f"Run, each site of {program}", Case(ours, {"the program alone": alone}, targets))
