"""What the gallery needs to run examples that are scripts: a fresh start, their arguments, the pictures they save."""

import builtins
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from sphinx_gallery.scrapers import figure_rst


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
        # The gallery gives scripts no __file__, in which ours look for the default of an option.
        vars(builtins)["__file__"] = script


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


@dataclass(frozen=True)
class SavedPictures:
    """Shows the pictures that a block of an example saved, beside those that it drew with pyplot."""

    folder: str
    """Where examples save pictures."""

    def __call__(self, block: Any, block_vars: Mapping[str, Any], gallery_conf: Mapping[str, Any]) -> str:
        """Returns reStructuredText that shows the new pictures.

        Args:
            block: The block of code.
            block_vars: What is known of it.
            gallery_conf: The gallery's configuration.
        """
        shown = []
        for saved in sorted(Path(self.folder).glob("*.png")):
            shown.append(next(block_vars["image_path_iterator"]))
            shutil.move(saved, shown[-1])
        return str(figure_rst(shown, gallery_conf["src_dir"]))
