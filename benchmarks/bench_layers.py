"""A layered binary net, 64-12-8, on scikit-learn's 1,797 digits: exact F, beside the same sums written by hand."""

from collections.abc import Callable

import pytest
from contest import Case, Contestant, microseconds_each, peak_gibibytes, ratio

DATA, TOP_VALUES = 1797, 2**8

TARGETS = {
    "loss": (ratio(1.2), microseconds_each(10, DATA * TOP_VALUES), peak_gibibytes(4)),
    "gradients": (ratio(1.2), peak_gibibytes(4)),
    "decomposition": (peak_gibibytes(4),),
}


@pytest.mark.parametrize("what", TARGETS)
def test_digits(contest: Callable[[str, Case], None], what: str) -> None:
    """F of a bottom-up guide, every value of every layer summed: 10 µs for each datum and value of the top layer."""
    ours = Contestant("contestants.layered_nets", "ours", {"what": what})
    peers = {"torch, by hand": Contestant("contestants.layered_nets", "by_hand", {"what": what})}
    name = f"Layers 64-12-8, 1,797 digits, {what}"
    contest(name, Case(ours, peers, {"torch, by hand": TARGETS[what]}))


def test_many_images(contest: Callable[[str, Case], None]) -> None:
    """60,000 images in 512 MiB, in portions."""
    arguments = {"what": "loss", "copies": 60_000 // DATA + 1, "max_bytes": 2**29}
    ours = Contestant("contestants.layered_nets", "ours", arguments)
    by_hand = Contestant("contestants.layered_nets", "by_hand", {"what": "loss", "copies": arguments["copies"]})
    targets = {"torch, by hand": (peak_gibibytes(1),)}
    contest("Layers 64-12-8, 61,098 images, loss in 512 MiB", Case(ours, {"torch, by hand": by_hand}, targets))
