"""A MarkovChain site as one factor over a chain.

    first[z]             =  log p(z_0)
    table[t, z', z]      =  log p(z_t = z | z_{t-1} = z')        without the axis t where the transitions do not vary

Batch dims lie as they do for other sites, with time the rightmost.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from pyro_vfe.engine.factors import Factor, Scale, Table
from pyro_vfe.engine.structure import previous
from pyro_vfe.errors import ScaleError, StructureError
from pyro_vfe.program.escapes import Sites, StructureChanged
from pyro_vfe.program.markov_chain import MarkovChain
from pyro_vfe.program.recorder import Plate, Site
from pyro_vfe.program.supports import unwrapped


class Labels(Protocol):
    """Names the dims of a site's tensors."""

    def labelled(self, values: Tensor, site: Site, scope: Sites | None) -> Table:
        """The table of a tensor whose dims lie as the layout says."""

    def labelled_before(self, values: Tensor, site: Site, scope: Sites | None, trailing: tuple[str, ...]) -> Table:
        """The same for a tensor whose last dims have names."""

    def scale(self, site: Site) -> Scale:
        """The weight of a site."""


def is_chain(site: Site) -> bool:
    """Whether the site is an enumerated chain of more than one step."""
    fn = unwrapped(site.fn)
    return site.kind == "enumerated" and isinstance(fn, MarkovChain) and fn.num_steps > 1


def chain_factor(
    site: Site,
    labels: Labels,
    scope: Sites | None,
    absent: Tensor | bool | None,
    tensors: Callable[[Site, MarkovChain], tuple[Tensor, Tensor]],
) -> Factor:
    """Returns the factor of a chain: the tables of its first element and of the others.

    Args:
        site: A site for which `is_chain` holds.
        labels: Names the dims of tensors.
        scope: The sites that the distribution reads.
        absent: Where a latent of guide and model does not exist: it is pinned there to its first value.
        tensors: What the tables of the first states, `(*b, K)`, and of the transitions, `(*b, S, K, K)`, hold.

    Raises:
        StructureError: The last batch dim is no whole plate.
        ScaleError: Its scale varies along time.
    """
    time = _time_plate(site)
    chain: MarkovChain = unwrapped(site.fn)
    initial, transition = tensors(site, chain)
    try:
        first = labels.labelled_before(initial.unsqueeze(-2), site, scope, (site.name,))
    except (StructureChanged, StructureError) as error:
        raise StructureError(
            f"Site '{site.name}' is a MarkovChain whose initial probabilities, enumerated of shape"
            f" {tuple(chain.initial.shape)}, vary along a dim that is no plate or latent around it.",
            hint="`initial` has no time dim. A latent from outside brings one along: write initial[c].squeeze(-2) in a"
            " plate of sequences, initial[c.reshape(c.shape[:-1])] where c lies in none.",
        ) from error
    pairs = _transition_table(transition, site, labels, scope, time)
    if absent is not None and absent is not False:
        where = labels.labelled(torch.as_tensor(absent, device=pairs.values.device), site, None)
        first = _pinned(first, where.selected(time.name, 0), site.name)
        pairs = _pinned(pairs, where.narrowed(time.name, 1, time.size - 1), site.name)
    return Factor(site.name, pairs, site.plate_names, labels.scale(site), first)


def time_plate(site: Site) -> str | None:
    """The plate along which a site is a chain, if it is one.

    Raises:
        StructureError: It is a chain whose last batch dim is no whole plate.
    """
    if site.kind == "enumerated" and isinstance(unwrapped(site.fn), MarkovChain):
        _time_plate(site)
    return _time_plate(site).name if is_chain(site) else None


def drawn_along(site: Site) -> str | None:
    """The plate along which the elements of a drawn site hang on those before them, if it is a chain.

    Args:
        site: A site that is not enumerated.
    """
    fn = unwrapped(site.fn)
    return _time_plate(site).name if isinstance(fn, MarkovChain) and fn.num_steps > 1 else None


def _time_plate(site: Site) -> Plate:
    plate = next((plate for plate in site.plates if plate.dim == -1), None)
    if plate is None:
        raise StructureError(
            f"Site '{site.name}' is a MarkovChain whose last batch dim, time, is no plate.",
            hint="Sample it inside `with pyro.plate('time', num_steps, dim=-1)`.",
        )
    if plate.size != plate.full_size:
        raise StructureError(
            f"Site '{site.name}' is a MarkovChain along plate '{plate.name}', which is subsampled ({plate.size} of"
            f" {plate.full_size}): neighbours in the subsample are no neighbours in time.",
            hint="Subsample the plate of the sequences, or take windows of whole sequences as data.",
        )
    if isinstance(site.scale, Tensor) and site.scale.dim() and site.scale.shape[-1] > 1:
        raise ScaleError(
            f"Site '{site.name}' is a MarkovChain whose scale varies along its time plate '{plate.name}'.",
            hint="Give all steps one scale; to leave out a step's data, mask the observation.",
        )
    return plate


def _transition_table(values: Tensor, site: Site, labels: Labels, scope: Sites | None, time: Plate) -> Table:
    """The table of log-probabilities `(*batch, steps or 1, K, K)`."""
    names: tuple[str, ...] = (previous(site.name), site.name)
    if values.dim() > 2 and values.shape[-3] > 1:
        return labels.labelled_before(values.unsqueeze(-4), site, scope, (time.name, *names))
    if values.dim() == 2:
        values = values.unsqueeze(0)
    return labels.labelled_before(values, site, scope, names)


def _pinned(table: Table, where: Table, name: str) -> Table:
    """The table with its latent at the first value, at no cost, where it does not exist."""
    axes = (*(axis for axis in where.axes if axis not in table.axes), *table.axes)
    size = table.sizes[name]
    pin = torch.full((size,), -torch.inf, dtype=table.values.dtype, device=table.values.device)
    pin[0] = 0.0
    values = torch.where(where.aligned(axes), Table(pin, (name,)).aligned(axes), table.aligned(axes))
    return Table(values, axes)
