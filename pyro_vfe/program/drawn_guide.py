"""A guide that draws all its latents, also those whose values could be listed.

Draws are new ones at each run, or given ones: a dream's, or those of an earlier run.
"""

from collections.abc import Mapping
from typing import Any

from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor

from pyro_vfe.program.keeping import own_value
from pyro_vfe.program.layout import Program
from pyro_vfe.program.left_over import first_look
from pyro_vfe.program.parameters import naming_nan
from pyro_vfe.program.recorder import Recorder, Site, record_both
from pyro_vfe.program.supports import is_enumerable


class DrawnGuide:
    """A guide with every latent drawn, but for those to be summed; one object, so that what is known of it is found."""

    def __init__(self, guide: Program) -> None:
        """Args:
        guide: The guide.
        """
        self.guide = guide
        self.values: Mapping[str, Tensor] = {}
        """Values to take instead of new draws, by site name."""
        self.summed: frozenset[str] = frozenset()
        """Discrete latents that stay enumerated: the model lacks them, and they are summed out of the guide."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Drawing(self.values, self.summed):
            return self.guide(*args, **kwargs)


class _Drawing(Messenger):
    def __init__(self, values: Mapping[str, Tensor], summed: frozenset[str]) -> None:
        super().__init__()
        self.values = values
        self.summed = summed

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or type(msg["fn"]).__name__ == "_Subsample":
            return
        if msg["name"] in self.summed:
            msg["infer"] = {**msg["infer"], "is_auxiliary": True}
            return
        msg["infer"] = {**msg["infer"], "enumerate": None}
        if msg["name"] in self.values:
            # A tensor of its own: runs mark the values of their sites.
            msg["value"], msg["done"] = self.values[msg["name"]].clone(), True


def ordinary_sites(
    model: Program,
    guide: DrawnGuide,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    subsamples: Mapping[str, Tensor],
) -> tuple[dict[str, Site], dict[str, Site]]:
    """Returns the sites of one ordinary run of the guide, and of the model against it.

    Args:
        model: The generative model.
        guide: The guide.
        args: Arguments of both.
        kwargs: Keyword arguments of both.
        subsamples: Subsample indices by plate name, to use instead of new ones.
    """

    with naming_nan(model, guide), first_look((guide, model), args, kwargs):
        first, second = record_both(
            model,
            guide,
            args,
            kwargs,
            lambda name, role, fn, plates: fn.sample(),
            subsamples=subsamples,
            look=own_value,
        )
    return first.sites, second.sites


def of_the_guide_alone(guide: Mapping[str, Site], model: Mapping[str, Site]) -> frozenset[str]:
    """Returns the discrete latents that the guide draws and the model lacks.

    Args:
        guide: The guide's sites.
        model: The model's sites.
    """
    return frozenset(
        name for name, site in guide.items() if site.kind != "observed" and name not in model and is_enumerable(site.fn)
    )


def draws_so_far() -> dict[str, tuple[Tensor, frozenset[str]]]:
    """Returns what the guide under way has drawn of latents that are not enumerated: by site name, value and plates.

    They are read off the handlers around it: a run of this library, or one of Pyro's traces.
    """
    draws: dict[str, tuple[Tensor, frozenset[str]]] = {}
    for handler in _PYRO_STACK:
        if isinstance(handler, Recorder):
            for name, site in handler.sites.items():
                if site.kind == "sampled":
                    draws[name] = site.value, site.plate_names
        elif isinstance(handler, TraceMessenger):
            for name, node in handler.trace.iter_stochastic_nodes():
                value: Any = node["value"]
                if not is_enumerable(node["fn"]):
                    draws[name] = value, frozenset(frame.name for frame in node["cond_indep_stack"])
    return draws
