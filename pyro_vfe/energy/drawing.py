r"""Drawing what would not fit: latents of the guide that are sampled because summing them out exactly is too large.

    F  =  E_{Q(v_drawn|u)} [ F given v_drawn ]        the rest stays enumerated

Which latents are drawn is found by trying: what does not fit raises before anything is allocated, and names what is too
large together. The largest of it that the guide can draw is drawn then, and the rest tried again.
"""

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import pyro

from pyro_vfe.errors import CostError, VFEError, VFEWarning, callers_level
from pyro_vfe.program.buffers import Buffers, unchanged_buffers
from pyro_vfe.program.identity import Identities
from pyro_vfe.program.layout import Program
from pyro_vfe.program.randomness import undisturbed_randomness
from pyro_vfe.program.recorder import is_summed
from pyro_vfe.program.supports import support_size

OnCost = Literal["raise", "sample"]

Result = TypeVar("Result")

_MAX_GUIDES = 64


class Drawing:
    """Computes with a guide that draws what would not fit otherwise."""

    def __init__(self, on_cost: OnCost = "raise") -> None:
        """Args:
        on_cost: What to do where an exact computation would not fit: "raise" the error, or "sample" latents.

        Raises:
            VFEError: It is neither.
        """
        if on_cost not in ("raise", "sample"):
            raise VFEError(f"on_cost is {on_cost!r}.", hint="Use on_cost='raise' or on_cost='sample'.")
        self.on_cost = on_cost
        self._guides: OrderedDict[object, _Drawn] = OrderedDict()
        self._identities = Identities()

    def __getstate__(self) -> dict[str, Any]:
        """What is known of programs is found again after copying or loading."""
        return {**self.__dict__, "_guides": OrderedDict(), "_identities": Identities()}

    def __call__(
        self,
        compute: Callable[[Program], Result],
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        purpose: str = "",
    ) -> Result:
        """Returns what `compute` returns for the guide, or for the guide with as many of its latents drawn as it takes.

        Args:
            compute: What is to be done with a guide.
            model: The generative model.
            guide: The guide.
            args: Arguments of both programs.
            kwargs: Keyword arguments of both programs.
            purpose: What it is for: one computation may need more latents drawn than another.

        Raises:
            CostError: It does not fit, and the guide has nothing to draw that would help.
        """
        if self.on_cost == "raise":
            return compute(guide)
        key = (self._identities.of(model), self._identities.of(guide), purpose)
        drawn = self._guides.setdefault(key, _Drawn(model, guide))
        self._guides.move_to_end(key)
        if len(self._guides) > _MAX_GUIDES:
            self._guides.popitem(last=False)
        fitted = drawn.names
        while True:
            try:
                with Buffers():
                    result = compute(drawn.program)
            except CostError as error:
                drawn = drawn.with_more(error, args, kwargs)
                continue
            if drawn.names != fitted:
                self._guides[key] = drawn
                _warn(drawn.names)
            return result


class _Drawn:
    """A guide with some of its latents drawn."""

    def __init__(self, model: Program, guide: Program, names: frozenset[str] = frozenset()) -> None:
        self.model = model
        self.guide = guide
        self.names = names
        self.program = guide if not names else _drawing(guide, names)

    def with_more(self, error: CostError, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "_Drawn":
        """The guide with as many more latents drawn as make what was too large fit, the largest first.

        Raises:
            CostError: The guide sums none of these.
        """
        sizes = _summed_latents(self.program, args, kwargs)
        involved = {site.split("[")[0] for site in error.sites}
        # Where the largest table is not to blame, the sum of many is, and any latent helps.
        candidates = sorted(involved & sizes.keys() or sizes, key=lambda name: (-sizes[name], name))
        if not candidates:
            raise error
        more: set[str] = set()
        saved = 0.0
        for name in candidates:
            more.add(name)
            saved += math.log(max(2, sizes[name]))
            # A table fits before the whole does: more at a time, the more it takes, so that there are few attempts.
            if saved >= math.log(max(1.0, error.excess)) and len(more) >= len(self.names) / 4:
                break
        return _Drawn(self.model, self.guide, self.names | more)


def _drawing(guide: Program, names: frozenset[str]) -> Program:
    """The guide with some of its latents drawn, where they would be summed."""

    def infer(site: Any) -> Any:
        return {"enumerate": None} if site["name"] in names else {}

    program: Program = pyro.poutine.infer_config(guide, infer)
    return program


def _summed_latents(guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, int]:
    """The number of values of each latent that the guide has summed."""
    with undisturbed_randomness(), unchanged_buffers(guide), pyro.poutine.block(), pyro.poutine.trace() as capture:
        guide(*args, **kwargs)
    sites = {name: site for name, site in capture.trace.nodes.items() if site["type"] == "sample"}
    return {
        name: support_size(site["fn"]) for name, site in sites.items() if not site["is_observed"] and is_summed(site)
    }


def _warn(names: frozenset[str]) -> None:
    shown = ", ".join(f"'{name}'" for name in sorted(names)[:5])
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    warnings.warn(
        f"Summing all latents out would not fit, so {shown}{more} are drawn from the guide: F is an estimate now, and "
        "its surprise an upper bound.",
        VFEWarning,
        stacklevel=callers_level(),
    )
