"""The fixture that holds a contest, and the page of results: `--results PATH` says where it goes."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from contest import Case, Worker
from report import GeometricMean, Row, page, rows_of

FEWEST_ROUNDS, MOST_ROUNDS = 3, 40
ROWS: pytest.StashKey[list[Row | GeometricMean]] = pytest.StashKey()
SECTIONS: pytest.StashKey[list[str]] = pytest.StashKey()


class Stopwatch:
    """The seconds that our worker has spent on calls, for pytest-benchmark to read as its clock."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def read(self) -> float:
        """Returns the seconds so far."""
        return self.seconds


STOPWATCH = Stopwatch()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the path of the page."""
    parser.addoption("--results", help="where to write the page of results")


def pytest_configure(config: pytest.Config) -> None:
    """Starts with no rows and no sections."""
    config.stash[ROWS] = []
    config.stash[SECTIONS] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Has pytest-benchmark read our worker's clock instead of this process's."""
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=STOPWATCH.read))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Prints the page, and writes it where it was asked for."""
    text = page(config.stash[ROWS], config.stash[SECTIONS])
    terminalreporter.write_line(text)
    if config.getoption("--results"):
        Path(config.getoption("--results")).write_text(text)


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> list[Row | GeometricMean]:
    """The rows of the page so far."""
    return request.config.stash[ROWS]


@pytest.fixture
def sections(request: pytest.FixtureRequest) -> list[str]:
    """What the page says behind its table so far, in Markdown."""
    return request.config.stash[SECTIONS]


@pytest.fixture
def contest(request: pytest.FixtureRequest, rows: list[Row | GeometricMean]) -> Iterator[Callable[[str, Case], None]]:
    """Measures a case: before each call of ours the peers run once each, as long as their budgets last."""
    with ExitStack() as stack:

        def hold(name: str, case: Case) -> None:
            ours = stack.enter_context(Worker(case.ours))
            peers = {who: stack.enter_context(Worker(peer)) for who, peer in {**case.peers, **case.beside}.items()}
            expected = ours.warm_up()
            for peer in peers.values():
                peer.warm_up()

            def peers_turn() -> None:
                for peer in peers.values():
                    if not peer.failed and peer.spent < case.budget:
                        peer.call()

            def our_turn() -> None:
                STOPWATCH.seconds += ours.call()

            if not ours.failed:
                rounds = min(MOST_ROUNDS, max(FEWEST_ROUNDS, int(case.budget / expected)))
                benchmark = request.getfixturevalue("benchmark")
                benchmark.group = name
                benchmark.pedantic(our_turn, setup=peers_turn, rounds=rounds)
            found = rows_of(name, case, ours.outcome, {who: peer.outcome for who, peer in peers.items()})
            rows.extend(found)
            if ours.failed:
                pytest.fail(f"{name}: {ours.outcome.failed}")
            differing = [row.peer for row in found if row.differs]
            assert not differing, f"{name}: {differing} found other numbers: {found}"

        yield hold
