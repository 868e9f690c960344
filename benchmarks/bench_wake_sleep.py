"""A step of `vfe.WakeSleep`, beside the two backward passes that it consists of, written by hand in torch."""

from collections.abc import Callable

import pytest
from contest import Case, Contestant, ratio

STEPS = {"drawn": 20, "summed": 1}
"""So many steps are one call."""

SIZES = (100, 1_797)
BY_HAND, TRACES = "torch by hand", "Pyro's traces by hand"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("how", STEPS)
def test_wake_sleep(contest: Callable[[str, Case], None], how: str, size: int) -> None:
    """The parameters after the steps."""
    arguments = {"size": size, "drawn": how == "drawn", "steps": STEPS[how]}
    ours, by_hand, traces = (
        Contestant("contestants.wake_sleep", function, arguments) for function in ("ours", "by_hand", "pyros")
    )
    beside = {TRACES: traces} if how == "drawn" else {}
    name = f"wake-sleep, {STEPS[how]} steps, 64-12-8 with hidden units {how}, N={size:,}"
    contest(name, Case(ours, {BY_HAND: by_hand}, {BY_HAND: (ratio(1.2),)}, beside))
