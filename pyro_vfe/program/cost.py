"""What the tables of a program will take, before any is made."""

import math

from pyro_vfe.engine.cost import readable_bytes, table_limit
from pyro_vfe.errors import CostError
from pyro_vfe.program.layout import Layout, SiteStructure

_ITEM_BYTES = 8


def table_entries(site: SiteStructure, layout: Layout) -> int:
    """The number of entries of a site's log table: one per joint value of its scope and plate element."""
    values = math.prod(layout.sizes.get(name, 1) for name in site.scope | {site.name})
    return values * math.prod(plate.size for plate in site.plates)


def check_cost(layout: Layout, max_bytes: float | None) -> None:
    """Checks that every site's table fits.

    Raises:
        CostError: One does not; its site, latents and size are named.
    """
    limit = table_limit(max_bytes)
    for site in layout.sites.values():
        size = table_entries(site, layout) * _ITEM_BYTES
        if size > limit:
            latents = ", ".join(f"'{name}'" for name in sorted(site.scope)[:8])
            more = f" and {len(site.scope) - 8} more" if len(site.scope) > 8 else ""
            raise CostError(
                f"The table of site '{site.name}' in the {site.role} would take {readable_bytes(size)} (limit "
                f"{readable_bytes(limit)}): it reads {len(site.scope)} latents, {latents}{more}.",
                hint="Let the site depend on fewer latents, sample some of them (infer={'enumerate': None} and a guide "
                "site), or raise max_bytes.",
                sites=site.scope,
                excess=size / limit if limit else 1.0,
            )
