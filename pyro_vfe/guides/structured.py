r"""The structured guide: free conditional tables along edges between the latents.

    Q(v)  =  prod_sites  Q( v_site | v_parents(site) )

References:
    Saul and Jordan (1996), Exploiting tractable substructures in intractable networks.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from pyro.infer.autoguide import AutoGuide


class AutoStructured(AutoGuide):
    """A guide with a free conditional table for each discrete latent, given the latents it has edges from."""

    def __init__(
        self, model: Callable[..., Any], edges: Literal["model"] | Sequence[tuple[str, str]] = "model"
    ) -> None:
        """Args:
        model: The generative model.
        edges: "model" for the model's own dependencies, or pairs (parent, child).
        """
        super().__init__(model)  # type: ignore[no-untyped-call]
        raise NotImplementedError
