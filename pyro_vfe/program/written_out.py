r"""A plate of latents that something outside of the plate reads as a whole, written out: one latent per element.

    z in plate `features` of 3, y reads sum_i w_i z_i:        z[0], z[1], z[2], and y's table over K^3 joint values

A plate says that its elements are independent given what is outside; what reads them together ties them. Elimination
then has a variable per element, where so many joint values fit. What is reported of the latent has its plate again.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from pyro_vfe.engine.factors import Table
from pyro_vfe.errors import PlateError
from pyro_vfe.program.escapes import NO_SITES, Sites
from pyro_vfe.program.narrowing import narrowed_site, stretch
from pyro_vfe.program.recorder import Plate, Role, Site
from pyro_vfe.program.site_structure import SiteStructure, elements_of

SiteKey = tuple[Role, str]

MOST_JOINT_VALUES = 2**16
"""The most joint values of latents that are read together."""

Wholes = Mapping[str, Plate]
"""For each latent that is read as a whole the plate along which it is written out."""


def site_parts(site: Site, wholes: Wholes) -> dict[SiteKey, Site]:
    """Returns a site by its key, or the sites of a latent's elements where it is written out.

    Args:
        site: A site as it ran.
        wholes: The latents that are written out.

    Raises:
        PlateError: Its distribution cannot be taken apart.
    """
    plate = wholes.get(site.name)
    if plate is None or site.kind != "enumerated":
        return {(site.role, site.name): site}
    found: dict[SiteKey, Site] = {}
    for index, name in enumerate(elements_of(site.name, plate)):
        part = narrowed_site(site, plate.name, index, 1)
        if part is None:
            raise PlateError(
                f"Latent '{site.name}' is read from outside of plate '{plate.name}', and its distribution, a "
                f"{type(site.fn).__name__}, cannot be taken apart into elements.",
                hint=f"Give '{site.name}' a sequential plate (for i in pyro.plate(...)).",
            )
        others = tuple(one for one in part.plates if one.name != plate.name)
        found[site.role, name] = replace(part, name=name, plates=others)
    return found


def number_parts(values: Tensor, site: Site, wholes: Wholes) -> dict[SiteKey, Tensor]:
    """Returns a site's log-probabilities by its key, or those of its elements.

    Args:
        values: Numbers over the site's batch.
        site: The site as it ran.
        wholes: The latents that are written out.
    """
    plate = wholes.get(site.name)
    if plate is None or site.kind != "enumerated":
        return {(site.role, site.name): values}
    names = elements_of(site.name, plate)
    return {(site.role, name): stretch(values, plate.dim, index, 1) for index, name in enumerate(names)}


def put_together(parts: Iterable[Tensor], plate: Plate, event_dims: int) -> Tensor:
    """Returns the value of a latent from those of its elements, each with dims of its own at the left.

    Args:
        parts: The values of the elements, of size 1 along the plate.
        plate: The plate.
        event_dims: How many dims belong to an event.
    """
    dim = plate.dim - event_dims
    whole = torch.broadcast_tensors(*parts)
    lead = max(0, -dim - whole[0].dim())
    return torch.cat([part.reshape((1,) * lead + part.shape) for part in whole], dim)


def folded_table(tables: Mapping[str, Table], name: str, plate: Plate, own: str | None = None) -> Table:
    """Returns the table of a latent over its plates from those of its elements.

    Args:
        tables: Over the other plates, by element.
        name: The latent.
        plate: The plate along which it is written out.
        own: What its values' axis is to be called, where the tables have one.
    """
    parts = []
    for element in elements_of(name, plate):
        table = tables[element]
        parts.append(Table(table.values, tuple(own or name if axis == element else axis for axis in table.axes)))
    axes = tuple(dict.fromkeys(axis for part in parts for axis in part.axes))
    shape = torch.broadcast_shapes(*(part.aligned(axes).shape for part in parts))
    return Table(torch.stack([part.aligned(axes).expand(shape) for part in parts]), (plate.name, *axes))


def sorted_table(tables: Mapping[str, Table], name: str, wholes: Wholes) -> Table:
    """Returns the table of a latent over its plates, by name, and its values where the tables have an axis for these.

    Args:
        tables: By latent, and by element of those that are written out.
        name: The latent.
        wholes: The latents that are written out.
    """
    if name not in wholes:
        return tables[name]
    table = folded_table(tables, name, wholes[name])
    axes = (*sorted(axis for axis in table.axes if axis != name), *(axis for axis in table.axes if axis == name))
    return Table(table.aligned(axes), axes)


def joint_of_wholes(
    names: tuple[str, ...],
    wholes: Wholes,
    marginals: Callable[[Sequence[tuple[str, ...]]], Mapping[tuple[str, ...], Table]],
) -> Table:
    """Returns the joint table of some latents over the plates of them all, and their values in this order.

    Args:
        names: The latents, of which some are written out.
        wholes: Those that are.
        marginals: Gives the tables of tuples of latents.
    """
    plates = list({wholes[name].name: wholes[name] for name in names if name in wholes}.values())
    scopes = {}
    for place in product(*(range(plate.size) for plate in plates)):
        at = {plate.name: index for plate, index in zip(plates, place, strict=True)}
        parts = (elements_of(name, wholes[name])[at[wholes[name].name]] if name in wholes else name for name in names)
        scopes[place] = tuple(parts)
    found = marginals(list(dict.fromkeys(scopes.values())))
    tables = []
    for place, own in scopes.items():
        table = found[own]
        for plate, index in zip(plates, place, strict=True):  # Another latent may lie in the plate as it is.
            table = table.selected(plate.name, index) if plate.name in table.axes else table
        tables.append(Table(table.values, (*table.axes[: -len(names)], *names)))
    others = tuple(dict.fromkeys(axis for table in tables for axis in table.axes if axis not in names))
    shape = torch.broadcast_shapes(*(table.aligned((*others, *names)).shape for table in tables))
    whole = torch.stack([table.aligned((*others, *names)).expand(shape) for table in tables])
    whole = whole.reshape(*(plate.size for plate in plates), *shape)
    result = Table(whole, (*(plate.name for plate in plates), *others, *names))
    axes = (*sorted(axis for axis in result.axes if axis not in names), *names)
    return Table(result.aligned(axes), axes)


def structure_parts(sites: Mapping[SiteKey, SiteStructure], wholes: Wholes) -> dict[SiteKey, SiteStructure]:
    """Returns what the sites are once latents are written out.

    Args:
        sites: What they are by themselves.
        wholes: The latents that are written out.
    """
    found: dict[SiteKey, SiteStructure] = {}
    for key, site in sites.items():
        scope, meets = (names_parts(names, wholes) for names in (site.scope, site.meets))
        plate = wholes.get(site.name) if site.kind == "enumerated" else None
        if plate is None:
            found[key] = replace(site, scope=scope, meets=meets)
            continue
        others = tuple(one for one in site.plates if one.name != plate.name)
        elements = frozenset(elements_of(site.name, plate))
        for name in elements_of(site.name, plate):
            own = {name} if site.name in site.scope else NO_SITES
            meeting = {name} if site.name in site.meets else NO_SITES
            found[site.role, name] = replace(
                site,
                name=name,
                plates=others,
                scope=(scope - elements) | own,
                meets=(meets - elements) | meeting,
            )
    return found


def names_parts(names: Sites, wholes: Wholes) -> Sites:
    """Returns names with elements in place of latents that are written out.

    Args:
        names: Names of latents.
        wholes: The latents that are written out.
    """
    if names.isdisjoint(wholes):
        return names
    parts = (elements_of(name, wholes[name]) if name in wholes else (name,) for name in names)
    return frozenset(part for own in parts for part in own)
