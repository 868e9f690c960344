"""A fresh interpreter that imports."""

import subprocess
import sys

from worker import Prepared


def imported(modules: str) -> Prepared:
    """Starts an interpreter, imports and ends."""

    command = [sys.executable, "-c", f"import {modules}"]
    return Prepared(lambda: subprocess.run(command, check=True), lambda _: {})
