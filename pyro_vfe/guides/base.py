"""What all guides of this library share: how they are copied, and how they make tables that a state is loaded into.

A guide holds its model without owning it: a copy serves the same model, and a file holds none.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Self

from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.utils import deep_setattr
from torch import Tensor, nn

from pyro_vfe.errors import StructureError
from pyro_vfe.program.given import given_guide
from pyro_vfe.program.layout import Program, no_guide


class OwnGuide(AutoGuide):
    """A guide that can be copied and pickled, and still has its model afterwards."""

    holders: tuple[str, ...] = ()
    """The modules whose parameters are made at the first call, or by `load_state_dict` before it."""

    def __init__(self, model: Program, *, create_plates: Callable[..., Any] | None = None) -> None:
        """Args:
            model: The generative model.
            create_plates: As for Pyro's guides, plates to use instead of the model's, for subsampling.

        Raises:
            VFEError: The model is no program.
        """
        given_guide(model, no_guide)
        super().__init__(model, create_plates=create_plates)  # type: ignore[no-untyped-call]

    @property
    def model(self) -> Any:
        """The generative model.

        Raises:
            StructureError: It was left behind when the guide was pickled.
        """
        if self._model is None:
            name = type(self).__name__
            raise StructureError(
                f"{name} was loaded without its model, and is called for the first time or with arguments of shapes "
                "that it has not met before.",
                hint=f"Make it anew, vfe.{name}(model, ...), and load its state_dict.",
            )
        return self._model[0]

    def __getstate__(self) -> dict[str, Any]:
        """All but the model, which need not be something that can be pickled; the guide itself keeps it."""
        # AutoGuide's own method takes the model from the guide that is copied.
        state: dict[str, Any] = super(AutoGuide, self).__getstate__()
        return {**state, "_model": None, "master": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A guide for the same model, with parameters of its own."""
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))  # type: ignore[no-untyped-call]
        made.__dict__["_model"] = self._model
        return made

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.prototype_trace is None:
            for holder in self.holders:
                _make_parameters(getattr(self, holder), state_dict, f"{prefix}{holder}.")
        super()._load_from_state_dict(state_dict, prefix, *args)


def _make_parameters(holder: nn.Module, state: Mapping[str, Tensor], prefix: str) -> None:
    """Makes the parameters of a module that a state is about to be loaded into."""
    for name, value in state.items():
        if name.startswith(prefix):
            deep_setattr(holder, name.removeprefix(prefix), nn.Parameter(value.new_empty(value.shape)))
