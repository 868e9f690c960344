"""Writes RESULTS.md: each case's time beside its peer's, from one run on one machine."""

import platform
from pathlib import Path
from typing import Any

import pytest
import torch

RESULTS = Path(__file__).parent / "RESULTS.md"


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Called by pytest-benchmark when all cases have run."""
    medians = {(row["group"], row["params"]["who"]): row["stats"]["median"] for row in output_json["benchmarks"]}
    targets = {row["group"]: row["extra_info"]["target"] for row in output_json["benchmarks"]}
    lines = [_HEADER.format(machine=_machine(), torch=torch.__version__)]
    for group in dict.fromkeys(group for group, _ in medians):
        ours, peer = medians[group, "ours"], medians[group, "peer"]
        met = "met" if ours / peer <= targets[group] else "missed"
        lines.append(
            f"| {group} | {1e3 * ours:.1f} | {1e3 * peer:.1f} | {ours / peer:.2f} | {targets[group]:.2f} | {met} |"
        )
    RESULTS.write_text("\n".join(lines) + "\n")


_HEADER = """# Results

Median times in milliseconds, ours and the peer's in turn in one process; the ratio is what counts. Written by
`make bench` on {machine}, torch {torch}. What was tried is in [NOTES.md](NOTES.md).

| case | ours | peer | ratio | target | |
| --- | ---: | ---: | ---: | ---: | --- |"""


def _machine() -> str:
    processor = platform.processor() or platform.machine()
    return f"{platform.system()} {processor}, {torch.get_num_threads()} threads, Python {platform.python_version()}"
