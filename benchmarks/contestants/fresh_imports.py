"""A fresh interpreter that imports."""

import subprocess
import sys

from worker import Prepared


def imported(modules: str) -> Prepared:
    """Starts an interpreter, imports and ends."""

    def call() -> dict[str, float]:
        subprocess.run([sys.executable, "-c", f"import {modules}"], check=True)
        return {}

    return Prepared(call)
