"""What a run of training starts from: Pyro's store, the programs' own values, or given ones."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pyro

from pyro_vfe.program.given_parameters import Substitute, quoted
from pyro_vfe.program.local_parameters import local_names


class Start:
    """The values that parameters have before the first step."""

    def __init__(self, params: Mapping[str, Any] | None, fresh: bool = False) -> None:
        """Args:
        params: Constrained values by name to start from; the programs' other parameters start from their own values.
        fresh: Whether all that has no value in `params` starts from the programs' own.

        Raises:
            VFEError: What is given is no mapping from names to numbers.
        """
        self._stored = frozenset(pyro.get_param_store()) - local_names()
        anew = fresh or params is not None
        self._substitute = Substitute(params or {}, is_start=True) if anew else None

    def first(self) -> AbstractContextManager[None]:
        """Within it the programs run for the first time.

        Raises:
            VFEError: What is given does not fit the programs' parameters.
        """
        return nullcontext() if self._substitute is None else self._substitute.reading()

    def undone_on_error(self) -> AbstractContextManager[None]:
        """Within it a run that does not start from Pyro's store leaves it as it was where an error is raised."""
        return nullcontext() if self._substitute is None else self._substitute.undone_on_error()

    def notes(self, names: Iterable[str]) -> list[str]:
        """What a reader should know: which parameters started from what Pyro's store had.

        Args:
            names: Of all parameters that the programs read.
        """
        anew = frozenset() if self._substitute is None else self._substitute.met - self._substitute.kept
        found = [name for name in names if name in self._stored and name not in anew]
        if not found:
            return []
        what = f"Started from what Pyro's store had for parameter{'s' * (len(found) > 1)} {quoted(found)}"
        way_out = (
            "fresh=True starts anew" if self._substitute is None else "a module holds them, or no program makes them"
        )
        return [f"{what}; {way_out}."]
