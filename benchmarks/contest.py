"""Contestants measured in turn, each in a process of its own.

reading  =  median time of ours / median time of the peer        target: reading <= limit
"""

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent

FASTEST = "the fastest"
"""Stands for the peer with the smallest median in a case's targets."""

SHORTEST = 0.005
"""Seconds that one measurement takes at least: shorter calls are repeated within it."""

LONGEST = 30.0
"""Seconds from which on a first call is a measurement, and not repeated to have a warm one."""


@dataclass(frozen=True)
class Contestant:
    """Who runs: a factory `module.function(**arguments)` that returns a `worker.Prepared`."""

    module: str
    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What one contestant took; `failed` says why it took nothing."""

    times: tuple[float, ...] = ()
    first: float = 0.0
    """Seconds of the first call, which is not among `times` unless it took very long."""

    peak: int = 0
    numbers: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, float] = field(default_factory=dict)
    failed: str = ""

    @property
    def seconds(self) -> float:
        """The median time of a call."""
        return median(self.times)


@dataclass(frozen=True)
class Target:
    """What must not be exceeded."""

    limit: float
    reading: Callable[[Outcome, Outcome], float]
    unit: str = ""


def ratio(limit: float) -> Target:
    """Our time over the peer's."""
    return Target(limit, lambda ours, peer: ours.seconds / peer.seconds)


def added_seconds(limit: float) -> Target:
    """Our time less the peer's."""
    return Target(limit, lambda ours, peer: ours.seconds - peer.seconds, " s")


def added_microseconds(limit: float, items: int) -> Target:
    """Our time less the peer's, for each of some items."""
    return Target(limit, lambda ours, peer: 1e6 * (ours.seconds - peer.seconds) / items, " µs")


def microseconds_each(limit: float, items: int) -> Target:
    """Our time for each of some items."""
    return Target(limit, lambda ours, peer: 1e6 * ours.seconds / items, " µs each")


def first_call_seconds(limit: float) -> Target:
    """What our first call takes beyond a later one: the search for a plan."""
    return Target(limit, lambda ours, peer: ours.first - ours.seconds, " s first")


def peak_gibibytes(limit: float) -> Target:
    """Our peak memory."""
    return Target(limit, lambda ours, peer: ours.peak / 2**30, " GiB")


def peak_ratio(limit: float) -> Target:
    """Our peak memory over the peer's."""
    return Target(limit, lambda ours, peer: ours.peak / peer.peak, " × memory")


@dataclass(frozen=True)
class Case:
    """One comparison: ours, the peers, and what the targets are held against (a peer's name, or FASTEST)."""

    ours: Contestant
    peers: Mapping[str, Contestant]
    targets: Mapping[str, tuple[Target, ...]] = field(default_factory=dict)
    beside: Mapping[str, Contestant] = field(default_factory=dict)
    """Further contestants, for orientation: never the fastest peer."""

    alike: bool = True
    """Whether all contestants do the same work, and must agree on its numbers."""

    budget: float = 8.0
    """Seconds of calls for each contestant."""


ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}
"""What gives each contestant one thread, unless the environment says otherwise: on a small or shared machine, thread
pools that wake for each call in turn measure the scheduler."""


class Worker:
    """A contestant's process."""

    def __init__(self, contestant: Contestant, patience: float = 120.0) -> None:
        """Starts the process; it prepares in the background.

        Args:
            contestant: Who runs.
            patience: Seconds to wait for an answer before the contestant counts as failed.
        """
        self.times: list[float] = []
        self.repeats = 1
        self._patience = patience
        self._outcome = Outcome()
        path = os.pathsep.join([str(HERE.parent / "examples"), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**ONE_THREAD, **os.environ, "PYTHONPATH": path},
        )
        task = {"module": contestant.module, "function": contestant.function, "arguments": dict(contestant.arguments)}
        self._say(json.dumps(task))

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    @property
    def outcome(self) -> Outcome:
        """What was measured so far."""
        return self._outcome

    @property
    def failed(self) -> bool:
        """Whether the contestant gave up."""
        return bool(self._outcome.failed)

    @property
    def spent(self) -> float:
        """Seconds of calls so far."""
        return self.repeats * sum(self.times)

    def warm_up(self) -> float:
        """Waits until the process is ready and has run, and returns the seconds that a measurement will take.

        A first call that takes very long counts as a measurement.
        """
        facts = self._answer().get("facts", {})
        seconds = first = self.call()
        if 0 < seconds < LONGEST:
            self.times.clear()
            seconds = self.call()
            self.repeats = max(1, round(SHORTEST / seconds)) if seconds else 1
        self._note(facts=facts, first=first)
        return self.repeats * seconds

    def call(self) -> float:
        """Runs once, and returns the seconds; zero where the contestant failed."""
        if self.failed:
            return 0.0
        self._say(str(self.repeats))
        answer = self._answer()
        if self.failed:
            return 0.0
        self.times.append(answer["seconds"])
        self._note(numbers=answer["numbers"], peak=answer["peak"], times=tuple(self.times))
        return self.times[-1]

    def _note(self, **content: Any) -> None:
        self._outcome = Outcome(**{**self._outcome.__dict__, **content})

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._note(failed="the process ended")

    def _answer(self) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None
        if not select.select([stdout], [], [], self._patience)[0]:
            self._note(failed=f"no answer within {self._patience:.0f} s")
            return {}
        line = stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"failed": f"ended with {self._process.wait()}"}
        if "failed" in answer:
            self._note(failed=answer["failed"])
        return answer
