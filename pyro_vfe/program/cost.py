r"""What the tables of a program will take, before any is made.

    entries(site)  =  prod of size over its latents, and over the plates along which its table can vary
    needed(n)      =  8 bytes * ( sum_sites WORKING * entries + the most numbers that are made for a table on the way )

where n is how many elements of a plate are summed at a time. All, if they fit; otherwise as many as do, where a plate's
elements can be summed in portions: inside a plate everything that F is made of is additive over elements.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import replace

from pyro_vfe.engine.cost import readable_bytes, table_limit
from pyro_vfe.errors import CostError
from pyro_vfe.program.layout import Layout, Portioning
from pyro_vfe.program.site_structure import SiteStructure

_ITEM_BYTES = 8

WORKING = 6
"""Tables that stand beside each site's own while it is summed: costs, weights, their products, gradients."""

TOO_LARGE = (
    "Let the site depend on fewer latents, sample some of them (guide sites of their names with infer={'enumerate': "
    'None}, or vfe.FreeEnergy(on_cost="sample") with a guide that has them all), or raise max_bytes.'
)


def varying_plates(site: SiteStructure) -> frozenset[str]:
    """The plates along which a site's table can vary: all around it where nobody has looked."""
    if site.variation is None:
        return frozenset(plate.name for plate in site.plates)
    return site.variation.plates


def table_entries(site: SiteStructure, layout: Layout, portion: Portioning | None = None) -> int:
    """The number of entries of a site's log table: one per joint value of its scope and plate element it varies along.

    Args:
        site: The site.
        layout: Where each latent went.
        portion: Which plate is summed in portions.
    """
    values = math.prod(layout.sizes.get(name, 1) for name in site.scope | {site.name})
    plates = varying_plates(site)
    sizes = (
        portion.length if portion is not None and plate.name == portion.plate else plate.size
        for plate in site.plates
        if plate.name in plates
    )
    return values * math.prod(sizes)


def fits_at_once(layout: Layout, max_bytes: float | None) -> bool:
    """Whether the tables certainly fit, even if they vary along all plates around their sites."""
    return _needed(layout) <= table_limit(max_bytes)


def within_limit(layout: Layout, max_bytes: float | None) -> Layout:
    """The layout, with the portions in which a plate is to be summed where all tables together would not fit.

    Args:
        layout: A layout with the variations of its sites.
        max_bytes: The most that tables may take; half of the free memory by default.

    Raises:
        CostError: A table would not fit however few elements are summed at a time; its site, latents and size are
            named.
    """
    limit = table_limit(max_bytes)
    needed = _needed(layout)
    if needed <= limit:
        return replace(layout, room=limit / max(1, needed))
    portions = [found for plate in _separable_plates(layout) if (found := _portioning(plate, layout, limit))]
    layout = replace(layout, portioning=max(portions, key=lambda found: found.length, default=None), room=1.0)
    # Who names a limit names that of tables alone; otherwise what stands beside them has to fit, too.
    _check_each(layout, limit if max_bytes is not None else limit / WORKING)
    return layout


def _needed(layout: Layout, portion: Portioning | None = None) -> int:
    """The bytes that tables and temporaries take."""
    sites = [(table_entries(site, layout, portion), site) for site in layout.sites.values()]
    on_the_way = max((entries * _elements(site) for entries, site in sites), default=0)
    return _ITEM_BYTES * (WORKING * sum(entries for entries, _ in sites) + on_the_way)


def _elements(site: SiteStructure) -> int:
    """Numbers that are made for each entry of a table."""
    return site.elements if site.variation is None else site.variation.elements


def _portioning(plate: str, layout: Layout, limit: float) -> Portioning | None:
    """The largest portion of a plate that fits; None where portions are of no use."""
    one, two = (_needed(layout, Portioning(plate, length)) for length in (1, 2))
    if two == one:
        return None
    # Where what does not vary along the plate leaves no room, the tables that do are held to the limit by themselves.
    room = limit - (2 * one - two) if one <= limit else limit
    length = max(1, int(room // (two - one)))
    return Portioning(plate, length) if length < layout.plate_sizes[plate] else None


def _separable_plates(layout: Layout) -> Iterator[str]:
    """The plates whose elements nothing ties together: what is inside reads only latents that are inside too."""
    if layout.sequential or layout.groups:
        return
    homes = {s.name: {plate.name for plate in s.plates} for s in layout.sites.values() if s.kind == "enumerated"}
    for plate in layout.plate_sizes:
        inside = [site for site in layout.sites.values() if any(plate == around.name for around in site.plates)]
        if all(_is_separable(site, plate, homes) for site in inside) and not _any_scored(layout):
            yield plate


def _is_separable(site: SiteStructure, plate: str, homes: dict[str, set[str]]) -> bool:
    if site.kind == "unread":
        return True
    known = site.variation is not None and plate in site.variation.separable and site.chain != plate
    return known and all(plate in homes.get(name, {plate}) for name in site.scope)


def _any_scored(layout: Layout) -> bool:
    """Whether the guide draws something whose gradient needs the costs downstream of it."""
    return any(site.needs_score for site in layout.sites.values())


def _check_each(layout: Layout, limit: float) -> None:
    """Checks that each site's table fits by itself."""
    for site in layout.sites.values():
        size = table_entries(site, layout, layout.portioning) * _elements(site) * _ITEM_BYTES
        if size > limit:
            latents = listed_latents(site.scope)
            raise CostError(
                f"The table of site '{site.name}' in the {site.role} would take {readable_bytes(size)} (limit "
                f"{readable_bytes(limit)}): it reads {len(site.scope)} latents, {latents}.",
                hint=TOO_LARGE,
                sites=site.scope,
                excess=size / limit if limit else 1.0,
            )


def listed_latents(scope: Collection[str]) -> str:
    """The first few names of a scope."""
    latents = ", ".join(f"'{name}'" for name in sorted(scope)[:8])
    return latents + (f" and {len(scope) - 8} more" if len(scope) > 8 else "")
