"""Models that observe nothing: F is then no statement about data, and most often an `obs=` has been forgotten."""

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyro_vfe.engine.ordering import listed
from pyro_vfe.errors import VFEWarning, callers_level
from pyro_vfe.program.layout import Layout, Program
from pyro_vfe.program.signatures import signature_of


def observes_nothing(layout: Layout) -> bool:
    """Whether the model has sites, and none of them is observed or a factor.

    Args:
        layout: What ordinary runs met.
    """
    kinds = {site.kind for site in layout.sites.values() if site.role == "model"}
    return bool(kinds) and "observed" not in kinds


def warn_of_no_data(
    model: Program, guide: Program, layout: Layout, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Says that a model observes nothing, with the sites that nothing reads.

    A model whose latents the guide has, all of them, may be a prior to be approximated: F is KL(Q || P) then, and
    nothing is said, unless a site has the name of an argument, or tensors are given and the guide is automatic: it
    would have the latent that was to be observed, too.

    Args:
        model: The generative model.
        guide: The guide.
        layout: What ordinary runs met.
        args: The programs' arguments.
        kwargs: The programs' keyword arguments.
    """
    if not observes_nothing(layout):
        return
    own = [site for site in layout.sites.values() if site.role == "model"]
    ends = [one.name for one in own if not any(one.name in site.scope for site in own if site.name != one.name)]
    signature = signature_of(model)
    arguments = kwargs.keys() if signature is None else signature.parameters.keys() | kwargs.keys()
    given = any(isinstance(argument, Tensor) for argument in (*args, *kwargs.values()))
    automatic = given and isinstance(inspect.unwrap(guide), AutoGuide)
    told = [name for name in ends if automatic or ("guide", name) not in layout.sites or name in arguments]
    if told:
        name = told[-1]
        warnings.warn(
            "The model observes nothing, so F, surprise and gap say nothing of data, and nothing can be learned from "
            f"any. Nothing reads site {listed(told, 5)}. What the data are of takes them, pyro.sample('{name}', ..., "
            f"obs=data); or condition the model, pyro.condition(model, data={{'{name}': data}}).",
            VFEWarning,
            stacklevel=callers_level(),
        )
