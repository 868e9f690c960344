"""Bayesian networks: P(e) and the marginals of all nodes, beside pyAgrum's LazyPropagation."""

import math
from collections.abc import Callable

import pytest
from contest import Case, Contestant, first_call_seconds, ratio
from report import GeometricMean, Row

USUAL = ("asia", "alarm", "insurance", "hailfinder", "win95pts", "andes", "pigs")
HARD = ("munin1", "link", "munin", "barley", "mildew", "pathfinder", "diabetes", "hepar2")
SMALL = ("asia", "alarm", "insurance")
PEER = "pyAgrum"
MEAN_LIMIT = 0.6


def _name(network: str) -> str:
    return f"Network {network}"


@pytest.mark.parametrize("network", [*USUAL, *HARD])
def test_network(contest: Callable[[str, Case], None], network: str) -> None:
    """The evidence is the first state of the first five leaves; plans and programs are made before."""
    ours, peer, small = (
        Contestant(f"contestants.{module}_networks", "posterior", {"name": network})
        for module in ("vfe", "pyagrum", "pgmpy")
    )
    targets = {PEER: (ratio(1.0), first_call_seconds(10.0))} if network in HARD else {}
    contest(_name(network), Case(ours, {PEER: peer}, targets, {"pgmpy": small} if network in SMALL else {}, budget=4.0))


def test_geometric_mean_of_the_usual_networks(rows: list[Row | GeometricMean]) -> None:
    """One figure for the seven networks measured above."""
    names = {_name(network) for network in USUAL}
    measured = [row for row in rows if isinstance(row, Row) and row.case in names and row.peer == PEER]
    if len(measured) < len(USUAL):
        pytest.skip("not all of the networks were measured")
    readings = [row.reading for row in measured]
    rows.append(GeometricMean("Networks, geometric mean of the first seven", PEER, readings, MEAN_LIMIT))
    assert not any(map(math.isnan, readings)), readings
