"""A process that prepares one contestant and runs it on request: a line of JSON in, a line of JSON out.

One process per contestant: the thread pools of torch and jax do not meet, and what the process comes to hold beyond
its imports and data is the contestant's own memory.
"""

import ctypes
import gc
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

SHARE = 0.8
"""How much of the free memory a contestant may take."""


@dataclass(frozen=True)
class Prepared:
    """What a contestant's factory returns: imports done, data in memory."""

    call: Callable[..., Any]
    """What is timed; it takes what `before` returns."""

    numbers: Callable[[Any], Mapping[str, float]]
    """From what a call returns, untimed, the numbers that all contestants must agree on."""

    before: Callable[[], Any] | None = None
    """What must be made anew for each call and is not timed."""

    seconds: Callable[[Any], float] | None = None
    """From what a call returns, the seconds of it that count; all by default."""

    facts: Mapping[str, float] = field(default_factory=dict)
    """Seconds of the preparation, by name, to be reported beside the times."""


def memory(name: str) -> int:
    """Returns a memory figure of this process in bytes: VmRSS is what it holds, VmHWM the most it has held."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def limit_memory() -> None:
    """Has what would not fit fail in this process, instead of having the system end some process."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    most = int(SHARE * 1024 * int(found[1]))
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def timed_calls(prepared: Prepared, repeats: int) -> tuple[float, Mapping[str, float]]:
    """Returns the mean seconds of some calls, and the numbers of the last."""
    seconds, result = 0.0, None
    for _ in range(repeats):
        arguments = () if prepared.before is None else (prepared.before(),)
        start = time.perf_counter()
        result = prepared.call(*arguments)
        elapsed = time.perf_counter() - start
        seconds += elapsed if prepared.seconds is None else prepared.seconds(result)
    return seconds / repeats, prepared.numbers(result)


def serve() -> None:
    """Prepares the contestant of the first line, then answers every further line, a number of calls."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    try:
        limit_memory()
        task = json.loads(sys.stdin.readline())
        prepared = getattr(import_module(task["module"]), task["function"])(**task["arguments"])
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        held = memory("VmRSS")
        answer(facts=dict(prepared.facts))
        for line in sys.stdin:
            seconds, numbers = timed_calls(prepared, int(line))
            children = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            answer(seconds=seconds, numbers=dict(numbers), peak=max(memory("VmHWM") - held, children))
    except BaseException as error:
        answer(failed=f"{type(error).__name__}: {error}".splitlines()[0])
        raise


if __name__ == "__main__":
    serve()
