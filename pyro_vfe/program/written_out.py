r"""A plate of latents that something outside of the plate reads as a whole, written out: one latent per element.

    z in plate `features` of 3, y reads sum_i w_i z_i:        z[0], z[1], z[2], and y's table over K^3 joint values

A plate says that its elements are independent given what is outside; what reads them together ties them. Elimination
then has a variable per element, where so many joint values fit. What is reported of the latent has its plate again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyro_vfe.engine.factors import Table
from pyro_vfe.errors import PlateError
from pyro_vfe.program.escapes import NO_SITES, Sites
from pyro_vfe.program.narrowing import narrowed_site, stretch
from pyro_vfe.program.recorder import Plate, Role, Site
from pyro_vfe.program.site_structure import SiteStructure, elements_of, places_of

SiteKey = tuple[Role, str]

MOST_JOINT_VALUES = 2**16
"""The most joint values of latents that are read together."""

Wholes = Mapping[str, tuple[Plate, ...]]
"""For each latent that is read as a whole the plates along which it is written out."""


def site_parts(site: Site, wholes: Wholes) -> dict[SiteKey, Site]:
    """Returns a site by its key, or the sites of a latent's elements where it is written out.

    Args:
        site: A site as it ran.
        wholes: The latents that are written out.

    Raises:
        PlateError: Its distribution cannot be taken apart.
    """
    plates = wholes.get(site.name)
    if plates is None or site.kind != "enumerated":
        return {(site.role, site.name): site}
    found: dict[SiteKey, Site] = {}
    names = {plate.name for plate in plates}
    for place, name in zip(places_of(plates), elements_of(site.name, plates), strict=True):
        part = site
        for plate, index in zip(plates, place, strict=True):
            narrow = narrowed_site(part, plate.name, index, 1)
            if narrow is None:
                raise PlateError(
                    f"Latent '{site.name}' is read from outside of plate '{plate.name}', and its distribution, a "
                    f"{type(site.fn).__name__}, cannot be taken apart into elements.",
                    hint=f"Give '{site.name}' a sequential plate (for i in pyro.plate(...)).",
                )
            part = narrow
        others = tuple(one for one in part.plates if one.name not in names)
        found[site.role, name] = replace(part, name=name, plates=others)
    return found


def number_parts(values: Tensor, site: Site, wholes: Wholes) -> dict[SiteKey, Tensor]:
    """Returns a site's log-probabilities by its key, or those of its elements.

    Args:
        values: Numbers over the site's batch.
        site: The site as it ran.
        wholes: The latents that are written out.
    """
    plates = wholes.get(site.name)
    if plates is None or site.kind != "enumerated":
        return {(site.role, site.name): values}
    found = {}
    for place, name in zip(places_of(plates), elements_of(site.name, plates), strict=True):
        part = values
        for plate, index in zip(plates, place, strict=True):
            part = stretch(part, plate.dim, index, 1)
        found[site.role, name] = part
    return found


def put_together(parts: Sequence[Tensor], plates: Sequence[Plate], event_dims: int) -> Tensor:
    """Returns the value of a latent from those of its elements, each with dims of its own at the left.

    Args:
        parts: The values of the elements, in order, of size 1 along the plates.
        plates: The plates.
        event_dims: How many dims belong to an event.
    """
    if not plates:
        return parts[0]
    first, *others = plates
    length = len(parts) // first.size
    stretches = [parts[start : start + length] for start in range(0, len(parts), length)]
    whole = torch.broadcast_tensors(*(put_together(own, others, event_dims) for own in stretches))
    dim = first.dim - event_dims
    lead = max(0, -dim - whole[0].dim())
    return torch.cat([part.reshape((1,) * lead + part.shape) for part in whole], dim)


def folded_table(tables: Mapping[str, Table], name: str, plates: Sequence[Plate]) -> Table:
    """Returns the table of a latent over its plates from those of its elements.

    Args:
        tables: Over the other plates, by element.
        name: The latent, by which its values' axis is called where the tables have one.
        plates: The plates along which it is written out.
    """
    parts = []
    for element in elements_of(name, plates):
        table = tables[element]
        parts.append(Table(table.values, tuple(name if axis == element else axis for axis in table.axes)))
    axes = tuple(dict.fromkeys(axis for part in parts for axis in part.axes))
    shape = torch.broadcast_shapes(*(part.aligned(axes).shape for part in parts))
    whole = torch.stack([part.aligned(axes).expand(shape) for part in parts])
    whole = whole.reshape(*(plate.size for plate in plates), *shape)
    return Table(whole, (*(plate.name for plate in plates), *axes))


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
    plates = list({plate.name: plate for name in names for plate in wholes.get(name, ())}.values())
    scopes = {}
    for place in places_of(plates):
        at = {plate.name: index for plate, index in zip(plates, place, strict=True)}
        scopes[place] = tuple(_element_at(name, wholes[name], at) if name in wholes else name for name in names)
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


def _element_at(name: str, plates: Sequence[Plate], at: Mapping[str, int]) -> str:
    own = tuple(at[plate.name] for plate in plates)
    return dict(zip(places_of(plates), elements_of(name, plates), strict=True))[own]


def structure_parts(sites: Mapping[SiteKey, SiteStructure], wholes: Wholes) -> dict[SiteKey, SiteStructure]:
    """Returns what the sites are once latents are written out.

    Args:
        sites: What they are by themselves.
        wholes: The latents that are written out.
    """
    found: dict[SiteKey, SiteStructure] = {}
    for key, site in sites.items():
        scope, meets = (names_parts(names, wholes) for names in (site.scope, site.meets))
        plates = wholes.get(site.name) if site.kind == "enumerated" else None
        if plates is None:
            found[key] = replace(site, scope=scope, meets=meets)
            continue
        others = tuple(one for one in site.plates if one not in plates)
        elements = elements_of(site.name, plates)
        for name in elements:
            own = {name} if site.name in site.scope else NO_SITES
            meeting = {name} if site.name in site.meets else NO_SITES
            found[site.role, name] = replace(
                site,
                name=name,
                plates=others,
                scope=scope.difference(elements) | own,
                meets=meets.difference(elements) | meeting,
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
