"""What an exact computation may cost: a plan that will not fit raises before anything is allocated.

bytes  =  itemsize * sum over steps of held(step)        raised when above half of the free memory

Where nobody named a limit, what the largest step makes and throws away again has to fit beside it.

What would exceed it is first cut into slices, if the caller can execute these.
"""

from collections.abc import Callable
from math import floor, log2
from pathlib import Path

import torch

from pyro_vfe.engine.chain_groups import ChainGroup
from pyro_vfe.engine.ordering import Plan, plan
from pyro_vfe.engine.structure import Structure
from pyro_vfe.errors import CostError

_MEMINFO = Path("/proc/meminfo")


UNASKED = 2**20
"""So few bytes fit without asking how many are free."""


def free_bytes(device: torch.device) -> float:
    """Returns the free memory of a device in bytes; infinity where it cannot be told."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu" or not _MEMINFO.exists():
        return float("inf")
    available = (line.split() for line in _MEMINFO.read_text().splitlines() if line.startswith("MemAvailable"))
    return next((1024.0 * int(words[1]) for words in available), float("inf"))


def half_of_free_bytes(device: torch.device) -> float:
    """Returns half of the free memory: intermediates come back once more as gradients."""
    return free_bytes(device) / 2


_TEMPORARIES = 3
"""Tables of a step's size that come and go while it runs: sums, which of them underflowed, their logs."""

default_limit: Callable[[torch.device], float] = half_of_free_bytes
"""The limit in bytes where the caller names none; set it to another function to change the policy."""


def table_limit(max_bytes: float | None, device: torch.device | None = None) -> float:
    """Returns the limit in bytes: the caller's, or the default one of the device, by default the CPU."""
    return default_limit(device or torch.device("cpu")) if max_bytes is None else max_bytes


def readable_bytes(count: float) -> str:
    """Returns a number of bytes in a unit that a person reads.

    Examples:
        >>> readable_bytes(3 * 2**30)
        '3.0 GiB'
    """
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.3g} PiB"


def plan_within(
    structure: Structure,
    keep: frozenset[str],
    keep_plates: frozenset[str],
    itemsize: int,
    device: torch.device,
    max_bytes: float | None,
) -> Plan:
    """Returns the plan of a graph, cut into slices where it would not fit and that helps.

    Args:
        structure: Names and sizes of the factor graph.
        keep: Variables that stay.
        keep_plates: Plates that are never multiplied out.
        itemsize: Bytes per number.
        device: Where the tables will lie.
        max_bytes: The limit; None asks `default_limit`.
    """
    found = plan(structure, keep, keep_plates)
    needed = itemsize * found.held
    if max_bytes is None and needed < UNASKED:
        return found
    limit = table_limit(max_bytes, device) / itemsize
    if found.held + _passing(found, max_bytes) <= limit or limit < 1:
        return found
    room = limit if max_bytes is not None else limit / (1 + _TEMPORARIES)
    # Free memory differs at every call: few limits, so that few plans are searched for.
    return plan(structure, keep, keep_plates, 2 ** (floor(4 * log2(max(room, 1.0))) / 4))


def _passing(found: Plan | ChainGroup, max_bytes: float | None) -> int:
    """Numbers that are held for a moment beside the tables, if the caller did not name a limit for these alone."""
    return _TEMPORARIES * found.largest.entries if max_bytes is None else 0


def check_cost(
    plan: Plan | ChainGroup, itemsize: int, device: torch.device, max_bytes: float | None, *, entries: int | None = None
) -> None:
    """Checks that a plan's tables fit.

    Args:
        plan: What is to be executed.
        itemsize: Bytes per number.
        device: Where the tables will lie.
        max_bytes: The limit; None asks `default_limit`.
        entries: How many numbers are held; the plan's own by default.

    Raises:
        CostError: They do not fit.
    """
    needed = itemsize * ((plan.held if entries is None else entries) + _passing(plan, max_bytes))
    if max_bytes is None and needed < UNASKED:
        return
    limit = table_limit(max_bytes, device)
    if needed <= limit:
        return
    largest = plan.largest
    raise CostError(
        f"Summing the latents out exactly needs {readable_bytes(needed)}, above the limit of {readable_bytes(limit)}."
        f" The largest table is over {_listed(largest.scope)}: {readable_bytes(itemsize * largest.entries)}.",
        hint="Let the guide draw one of these sites (infer={'enumerate': None}), coarsen its support, subsample a "
        "plate, or raise max_bytes.",
        sites=largest.scope,
        excess=needed / limit if limit else 1.0,
    )


def _listed(scope: tuple[str, ...]) -> str:
    shown = ", ".join(f"'{axis}'" for axis in scope[:12])
    return shown if len(scope) <= 12 else f"{shown} and {len(scope) - 12} more"
