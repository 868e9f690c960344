"""Guides under DistributedDataParallel: two processes have the gradient of one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("distributed_worker.py")
KINDS = ("AutoAmortized", "AutoMeanField", "AutoPosterior", "AutoStructured")

Gradients = dict[str, dict[str, list[float]]]


def group(size: int, folder: Path) -> list[Gradients]:
    """Returns what each process of a group prints."""
    command = [sys.executable, "-W", "ignore", str(WORKER), str(folder / f"store of {size}")]
    processes = [
        subprocess.Popen([*command, str(rank), str(size), *KINDS], stdout=subprocess.PIPE, text=True)
        for rank in range(size)
    ]
    try:
        return [json.loads(process.communicate(timeout=240)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_two_processes_have_the_gradient_of_one(tmp_path: Path) -> None:
    (alone,) = group(1, tmp_path)
    for own in group(2, tmp_path):
        for kind in KINDS:
            assert own[kind].keys() == alone[kind].keys()
            assert "model.rates_unconstrained" in alone[kind]
            for name, values in alone[kind].items():
                assert max(map(abs, values)) > 0
                assert own[kind][name] == pytest.approx(values, rel=1e-10, abs=1e-13), (kind, name)
