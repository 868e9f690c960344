"""What the gallery needs to run examples that are scripts: a fresh start, and their arguments."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch


@dataclass(frozen=True)
class FreshStart:
    """Undoes what an example left in torch and in Pyro, since all run in one process."""

    def __call__(self, gallery_conf: Mapping[str, Any], script: str) -> None:
        """Puts back what a new process has.

        Args:
            gallery_conf: The gallery's configuration.
            script: The path of the example that comes.
        """
        pyro.clear_param_store()
        torch.set_default_dtype(torch.float32)
        torch.manual_seed(0)


@dataclass(frozen=True)
class ExampleArguments:
    """The command line that an example is run with."""

    folder: str
    """Where its pictures go."""

    def __call__(self, gallery_conf: Mapping[str, Any], script_vars: Mapping[str, Any]) -> list[str]:
        """Returns the arguments of a script.

        Args:
            gallery_conf: The gallery's configuration.
            script_vars: What is known of the script.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        Path(self.folder).mkdir(parents=True)
        return ["--output", self.folder]
