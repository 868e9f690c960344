"""A step of `vfe.WakeSleep`, beside the two backward passes that it consists of, written by hand in torch."""

from collections.abc import Callable

import pytest
from contest import Case, Contestant, ratio

STEPS = {"drawn": 10, "summed": 1}
"""So many steps are one call."""

SIZES = {"drawn": (100, 1_797, 20_000), "summed": (100, 1_797)}
CASES = [(how, size) for how, sizes in SIZES.items() for size in sizes]
BY_HAND, TRACES = "torch by hand", "Pyro's traces by hand"


@pytest.mark.parametrize(("how", "size"), CASES)
def test_wake_sleep(contest: Callable[[str, Case], None], how: str, size: int) -> None:
    """The parameters after the steps."""
    arguments = {"size": size, "drawn": how == "drawn", "steps": STEPS[how]}
    ours, by_hand, traces = (
        Contestant("contestants.wake_sleep", function, arguments) for function in ("ours", "by_hand", "pyros")
    )
    beside = {TRACES: traces} if how == "drawn" else {}
    steps = "a step" if STEPS[how] == 1 else f"{STEPS[how]} steps"
    name = f"Wake-sleep, {steps}, 64-12-8, hidden units {how}, N={size:,}"
    contest(name, Case(ours, {BY_HAND: by_hand}, {BY_HAND: (ratio(1.2),)}, beside))
