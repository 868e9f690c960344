"""What an exact computation may cost: a plan that will not fit raises before anything is allocated.

bytes  =  itemsize * sum over steps of entries(step)        raised when above half of the free memory
"""

from collections.abc import Callable
from pathlib import Path

import torch

from pyro_vfe.engine.chain_groups import ChainGroup
from pyro_vfe.engine.ordering import Plan
from pyro_vfe.errors import CostError

_MEMINFO = Path("/proc/meminfo")


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


def check_cost(
    plan: Plan | ChainGroup, itemsize: int, device: torch.device, max_bytes: float | None, *, entries: int | None = None
) -> None:
    """Checks that a plan's tables fit.

    Args:
        plan: What is to be executed.
        itemsize: Bytes per number.
        device: Where the tables will lie.
        max_bytes: The limit; None asks `default_limit`.
        entries: How many numbers are made; the plan's own by default.

    Raises:
        CostError: They do not fit.
    """
    needed = itemsize * (plan.entries if entries is None else entries)
    if max_bytes is None and needed < 2**20:
        return
    limit = table_limit(max_bytes, device)
    if needed <= limit:
        return
    largest = plan.largest
    raise CostError(
        f"Summing the latents out exactly needs {readable_bytes(needed)}, above the limit of {readable_bytes(limit)}."
        f" The largest table is over {_listed(largest.scope)}: {readable_bytes(itemsize * largest.entries)}.",
        hint="Sample one of these sites in the guide, coarsen its support, subsample a plate, or raise max_bytes.",
    )


def _listed(scope: tuple[str, ...]) -> str:
    shown = ", ".join(f"'{axis}'" for axis in scope[:12])
    return shown if len(scope) <= 12 else f"{shown} and {len(scope) - 12} more"
