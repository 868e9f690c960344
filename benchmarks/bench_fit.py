"""`vfe.fit` with its readings of F, surprise and gap, beside the loop over SVI's steps that one writes by hand."""

from collections.abc import Callable

import pytest
from contest import FASTEST, Case, Contestant, ratio

SIZES = {
    "N=1,000": {"size": 1_000, "components": 10, "dims": 8},
    "N=100,000": {"size": 100_000, "components": 10, "dims": 8},
}
STEPS = {"N=1,000": 400, "N=100,000": 40}


@pytest.mark.parametrize("size", SIZES)
def test_fit(contest: Callable[[str, Case], None], size: str) -> None:
    """The log evidence before the last step."""
    arguments = {**SIZES[size], "steps": STEPS[size]}
    ours, loop = (Contestant("contestants.svi", function, arguments) for function in ("fitted", "by_hand"))
    name = f"fit, {STEPS[size]} steps, Gaussian mixture {size} K=10 D=8"
    contest(name, Case(ours, {"SVI in a loop": loop}, {FASTEST: (ratio(1.1),)}))
