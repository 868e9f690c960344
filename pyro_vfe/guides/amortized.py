r"""The recognition model: a network from the data to Q.

    Q(v|u)  =  prod_sites  Q( v_site | network(u) )

References:
    Dayan, Hinton, Neal and Zemel (1995), The Helmholtz machine.
    Kingma and Welling (2014), Auto-encoding variational Bayes (amortised inference).
"""

from collections.abc import Callable
from typing import Any

from pyro.infer.autoguide import AutoGuide


class AutoAmortized(AutoGuide):
    """A guide whose probabilities are a network's function of the data."""

    def __init__(self, model: Callable[..., Any], network: Any, inputs: Any = None, edges: Any = ()) -> None:
        """Args:
        model: The generative model.
        network: What maps the data to logits.
        inputs: Which arguments of the model the network reads.
        edges: Which latents a latent's probabilities depend on besides.
        """
        super().__init__(model)  # type: ignore[no-untyped-call]
        raise NotImplementedError
