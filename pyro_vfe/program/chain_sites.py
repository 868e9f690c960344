"""A MarkovChain site as one factor over a chain.

    first[z]             =  log p(z_0)
    table[t, z', z]      =  log p(z_t = z | z_{t-1} = z')        without the axis t where the transitions do not vary

Batch dims lie as they do for other sites, with time the rightmost.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.distributions import Independent

from pyro_vfe.engine.factors import Factor, Scale, Table
from pyro_vfe.engine.structure import previous
from pyro_vfe.errors import ScaleError, StructureError
from pyro_vfe.program.escapes import Sites, StructureChanged
from pyro_vfe.program.markov_chain import MarkovChain
from pyro_vfe.program.masking import Pin
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
    pin: Pin | None,
    tensors: Callable[[Site, MarkovChain], tuple[Tensor, Tensor]],
) -> Factor:
    """Returns the factor of a chain: the tables of its first element and of the others.

    Args:
        site: A site for which `is_chain` holds.
        labels: Names the dims of tensors.
        scope: The sites that the distribution reads.
        pin: Where its state is given.
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
    if pin is not None:
        parts = (torch.as_tensor(part, device=pairs.values.device) for part in (pin.where, pin.index))
        where, index = (labels.labelled(part, site, None) for part in parts)
        first = _pinned(first, *(part.selected(time.name, 0) for part in (where, index)))
        pairs = _pinned(pairs, *(part.narrowed(time.name, 1, time.size - 1) for part in (where, index)))
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


def check_observed(site: Site) -> None:
    """Checks that an observed chain is one: that its steps are all there, and that no mask hides some of them unseen.

    Raises:
        StructureError: Its time plate is subsampled, or it is masked where the run cannot make a latent of it.
    """
    fn, mask = site.fn, site.mask
    while hasattr(fn, "base_dist"):
        mask = None if isinstance(fn, Independent) else getattr(fn, "_mask", mask)  # None: it is of whole events
        fn = fn.base_dist
    if site.kind != "observed" or not isinstance(fn, MarkovChain):
        return
    for plate in site.plates:
        if plate.dim == -1 and not isinstance(site.fn, Independent):
            _check_whole(site, plate)
    if isinstance(mask, Tensor):
        raise StructureError(
            f"Site '{site.name}' is an observed MarkovChain with a mask over its steps in to_event, or around the "
            "computation: what is missing cannot be summed out there.",
            hint="Sample it in a time plate, `with pyro.plate('time', num_steps, dim=-1)`, under poutine.mask there.",
        )


def _time_plate(site: Site) -> Plate:
    plate = next((plate for plate in site.plates if plate.dim == -1), None)
    if plate is None:
        raise StructureError(
            f"Site '{site.name}' is a MarkovChain whose last batch dim, time, is no plate.",
            hint="Sample it inside `with pyro.plate('time', num_steps, dim=-1)`.",
        )
    _check_whole(site, plate)
    if isinstance(site.scale, Tensor) and site.scale.dim() and site.scale.shape[-1] > 1:
        raise ScaleError(
            f"Site '{site.name}' is a MarkovChain whose scale varies along its time plate '{plate.name}'.",
            hint="Give all steps one scale; to leave out a step's data, mask the observation.",
        )
    return plate


def _check_whole(site: Site, plate: Plate) -> None:
    if plate.size != plate.full_size:
        raise StructureError(
            f"Site '{site.name}' is a MarkovChain along plate '{plate.name}', which is subsampled ({plate.size} of"
            f" {plate.full_size}): neighbours in the subsample are no neighbours in time.",
            hint="Subsample the plate of the sequences, or take windows of whole sequences as data.",
        )


def _transition_table(values: Tensor, site: Site, labels: Labels, scope: Sites | None, time: Plate) -> Table:
    """The table of log-probabilities `(*batch, steps or 1, K, K)`."""
    names: tuple[str, ...] = (previous(site.name), site.name)
    if values.dim() > 2 and values.shape[-3] > 1:
        return labels.labelled_before(values.unsqueeze(-4), site, scope, (time.name, *names))
    if values.dim() == 2:
        values = values.unsqueeze(0)
    return labels.labelled_before(values, site, scope, names)


def _pinned(table: Table, where: Table, index: Table) -> Table:
    """The table, whose last axis is that of the state, with the given state where there is one."""
    more = dict.fromkeys(axis for axis in (*where.axes, *index.axes) if axis not in table.axes)
    axes = (*more, *table.axes)
    values = table.aligned(axes)
    every = torch.arange(values.shape[-1], device=values.device)
    return Table(torch.where(where.aligned(axes), certain(index.aligned(axes), every, values), values), axes)


def certain(index: Tensor, every: Tensor, like: Tensor) -> Tensor:
    """The log-probabilities of values of which one is certain.

    Args:
        index: Which.
        every: The numbers of the values.
        like: A tensor of the type wanted.
    """
    return torch.where(index == every, like.new_zeros(()), like.new_full((), -torch.inf))
