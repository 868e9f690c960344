r"""The latents that a recognition network speaks of, and the logits that each of them takes.

    Q(v_site)  =  prod_elements  softmax( logits[element] )_v            one logit for a Bernoulli: the other one is 0

A vector that is one site (`to_event`) is factorised inside: n Bernoulli elements take n logits, and no table of 2^n.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Independent

from pyro_vfe.guides.positions import COUNTED, ONE_HOT, position
from pyro_vfe.program.finite import Finite
from pyro_vfe.program.layout import latents_and_branches
from pyro_vfe.program.markov_chain import MarkovChain
from pyro_vfe.program.provenance import untracked
from pyro_vfe.program.recorder import Plate, plates_around
from pyro_vfe.program.supports import MAX_VALUES, finite_support, is_enumerable, support_size, unwrapped


@dataclass(frozen=True, eq=False)
class Latent:
    """A discrete latent of the model, as a network has to know it."""

    name: str
    family: str
    """That of one element."""
    elements: torch.Size
    """The shape of the independent elements that are one site (`to_event`); empty where it is one element."""
    size: int
    """The number of values K of an element."""
    support: Tensor
    """The values of an element, shape `(K, *event_shape)`."""
    drawn: bool
    """Whether its values are drawn, by the model's wish or because there are too many to list."""
    plates: tuple[Plate, ...]
    """The vectorised plates around it."""
    reads: frozenset[str] = frozenset()
    """The latents that its log-probability reads in the model."""
    chain: str | None = None
    """The plate along which it is a chain."""

    @property
    def num_logits(self) -> int:
        """The number of logits of the site at one plate element, its parents' values given."""
        return prod(self.elements) * (1 if self.family == "Bernoulli" else self.size)

    @property
    def num_values(self) -> int:
        """The number of joint values of the elements."""
        return int(self.size ** prod(self.elements))

    @property
    def event_dims(self) -> int:
        """The number of dims of a value."""
        return len(self.elements) + self.support.dim() - 1

    def distribution(self, logits: Tensor) -> Any:
        """Returns the distribution of the site, factorised over its elements.

        Args:
            logits: Shape `(*batch, num_logits)`.
        """
        if not self.elements:
            return self._of_elements(logits.squeeze(-1) if self.family == "Bernoulli" else logits)
        own = () if self.family == "Bernoulli" else (self.size,)
        each = logits.reshape(*logits.shape[:-1], *self.elements, *own)
        return self._of_elements(each).to_event(len(self.elements))

    def _of_elements(self, logits: Tensor) -> Any:
        if self.family == "Bernoulli":
            return dist.Bernoulli(logits=logits)
        if self.family in COUNTED:
            return dist.Categorical(logits=logits)
        return dist.OneHotCategorical(logits=logits) if self.family in ONE_HOT else Finite(self.support, logits)

    def index(self, value: Tensor) -> Tensor:
        """Returns the positions of values among the joint values, int64, shape `(*batch)`.

        Args:
            value: Values of the site, `(*batch, *event_shape)`.
        """
        digits = position(self.family, self.support, value)
        if not self.elements:
            return digits
        count = prod(self.elements)
        powers = self.size ** torch.arange(count - 1, -1, -1, device=value.device)
        return (digits.flatten(-len(self.elements)) * powers).sum(-1)

    def features(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns values as a network reads them, `(*batch, num_features)`: categories as one-hot vectors.

        Args:
            value: Values of the site, `(*batch, *event_shape)`.
            dtype: That of the network.
        """
        if self.family in COUNTED:
            value = torch.eye(self.size, dtype=dtype, device=value.device)[value.long()]
            return value.flatten(-1 - len(self.elements)) if self.elements else value
        value = value.to(dtype)
        return value.flatten(-self.event_dims) if self.event_dims else value.unsqueeze(-1)

    def __str__(self) -> str:
        vector = f" vector of shape {tuple(self.elements)}" if self.elements else ""
        return f"{self.family}{vector}"


def latents_of(program: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Latent]:
    """Returns the discrete latents of a program in its order, those that are to be drawn as well.

    Args:
        program: A model.
        args: Its arguments.
        kwargs: Its keyword arguments.
    """
    look = _Look()

    def watched(*args: Any, **kwargs: Any) -> Any:
        with look:
            return program(*args, **kwargs)

    structures, _ = latents_and_branches(watched, args, kwargs)
    reads = {name: structure.scope - {name} for name, structure in structures.items()}
    return {name: replace(latent, reads=reads.get(name, frozenset())) for name, latent in look.found.items()}


class _Look(Messenger):
    """Writes down the discrete latents of a run, and has those with too many values to list drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Latent] = {}

    def _pyro_sample(self, msg: Any) -> None:
        fn, infer = msg["fn"], msg["infer"]
        if msg["is_observed"] or type(fn).__name__ == "_Subsample" or not is_enumerable(fn):
            return
        with untracked():
            too_many = support_size(fn) > MAX_VALUES
            element, elements = _element(fn)
            support = finite_support(element, msg["name"]).detach()
        plates = plates_around(msg)
        time = next((plate.name for plate in plates if plate.dim == -1), None)
        latent = Latent(
            name=msg["name"],
            family=type(element).__name__,
            elements=elements,
            size=len(support),
            support=support,
            drawn=too_many or ("enumerate" in infer and infer["enumerate"] is None),
            plates=plates,
            chain=time if isinstance(element, MarkovChain) else None,
        )
        self.found.setdefault(latent.name, latent)
        others = {key: value for key, value in infer.items() if key != "enumerate"}
        msg["infer"] = {**others, "enumerate": None} if too_many else others


def _element(fn: Any) -> tuple[Any, torch.Size]:
    """The distribution of one element, and the shape of the elements that are one site."""
    elements: tuple[int, ...] = ()
    fn = unwrapped(fn)
    while isinstance(fn, Independent):
        count, batch = fn.reinterpreted_batch_ndims, fn.base_dist.batch_shape
        elements = (*elements, *batch[len(batch) - count :])
        fn = unwrapped(fn.base_dist)
    return fn, torch.Size(elements)


def chain_of(latent: Latent, logits: Tensor) -> MarkovChain:
    """Returns the chain whose transition into step t is the table of step t.

    Args:
        latent: A latent along a time plate.
        logits: Shape `(*batch, T or 1, K * K)`, a row for each state before; the first step's row 0 is that of the
            first state.
    """
    table = logits.reshape(*logits.shape[:-1], latent.size, latent.size).softmax(-1)
    steps = next(plate.size for plate in latent.plates if plate.name == latent.chain)
    return MarkovChain(table[..., 0, 0, :], table, num_steps=steps)
