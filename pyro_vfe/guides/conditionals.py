r"""Sampling a latent from its conditional table, given the values of its parents.

    v  ~  Q( v | v_1, ..., v_M )  =  softmax( logits[..., k_1, ..., k_M, :] ) ,      k_m the index of v_m in its support

All of it stays in torch: parents that are enumerated bring dims of their own, left of the plates.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.ops.indexing import Vindex
from torch import Tensor

from pyro_vfe.energy.conditionals import Conditional
from pyro_vfe.engine.factors import Table
from pyro_vfe.guides.positions import position
from pyro_vfe.guides.tables import Latent, distribution, rows, sampled
from pyro_vfe.program.markov_chain import MarkovChain
from pyro_vfe.program.tables import batch_axes


@dataclass(frozen=True, eq=False)
class Logits:
    """The conditional table of a latent, over whole plates or over what is present of them."""

    table: Tensor
    """Shape `(*batch, *K_parents, K)`; of a chain `(*batch, T - 1, *K_parents, K, K)`, from each state to the next."""

    initial: Tensor | None = None
    """Of a chain, those of the first state: `(*batch, *K_parents, K)`."""


def logits_of(latent: Latent, conditional: Conditional, dtype: torch.dtype | None = None) -> Logits:
    """Returns a conditional as a guide's tables, batch dims where the latent's plates lie.

    Args:
        latent: The latent.
        conditional: Its conditional.
        dtype: The precision; that of the conditional by default.
    """
    batch = batch_axes(latent.plates)
    table = _over(conditional.table, batch).to(dtype)
    return Logits(table, None if conditional.first is None else _over(conditional.first, batch[:-1]).to(dtype))


def _over(table: Table, batch: list[str]) -> Tensor:
    return table.aligned((*batch, *(axis for axis in table.axes if axis not in batch)))


def sample_given(
    latent: Latent, parents: tuple[Latent, ...], values: Mapping[str, Tensor], logits: Logits, plates: Mapping[str, Any]
) -> Tensor:
    """Samples a latent given its parents, and returns its value.

    Args:
        latent: The latent.
        parents: What it is conditioned on, in the order of the table's dims.
        values: The values of latents that have been sampled.
        logits: Its table, of those elements of the plates that are present.
        plates: Pyro's plates by name.
    """
    places = [position(parent.family, parent.support, values[parent.name]) for parent in parents]
    if latent.chain is None:
        return sampled(
            latent.name, latent.plates, lambda: distribution(latent, _entries(logits.table, places, 1)), plates
        )
    assert logits.initial is not None
    initial = _entries(logits.initial, [place[..., 0] if place.dim() else place for place in places], 1).softmax(-1)
    transition = _entries(logits.table, [_from_second(place) for place in places], 2).softmax(-1)
    return sampled(latent.name, latent.plates, lambda: MarkovChain(initial, transition, num_steps=latent.steps), plates)


def present(latent: Latent, logits: Logits, num_parents: int, plates: Mapping[str, Any]) -> Logits:
    """Returns those rows of a table over whole plates that belong to the elements which are present.

    Args:
        latent: The latent.
        logits: Its table over whole plates.
        num_parents: How many parents it has.
        plates: Pyro's plates by name.
    """
    if logits.initial is None:
        return Logits(rows(logits.table, latent.plates, plates, logits.table.dim() - num_parents - 1))
    around = tuple(plate for plate in latent.plates if plate.name != latent.chain)
    batch_dims = logits.table.dim() - num_parents - 2
    # Time is whole, and stands in the dim that the batch of the first state lacks.
    initial = rows(logits.initial.unsqueeze(batch_dims - 1), around, plates, batch_dims).squeeze(batch_dims - 1)
    return Logits(rows(logits.table, around, plates, batch_dims), initial)


def _from_second(place: Tensor) -> Tensor:
    """The indices of a parent at the elements after the first, where it stands along time itself."""
    return place[..., 1:] if place.dim() and place.shape[-1] > 1 else place


def _entries(table: Tensor, places: list[Tensor], own_dims: int) -> Tensor:
    """The rows of a table at its parents' indices; batch dims broadcast with those of the indices."""
    if not places:
        return table
    selected: Tensor = Vindex(table)[(Ellipsis, *places, *(slice(None),) * own_dims)]
    return selected
