"""Plates whose size a latent decides: as many elements as in the largest branch, of which a branch has the first.

    table[z = k, n]  =  what the branch z = k has for element n;  nothing from its size on

What a branch has not is as in a branch without the site: an observation has log-probability 0 there, and a latent is
its first value and does not exist.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from pyro_vfe.engine.factors import Factor, Table
from pyro_vfe.errors import StructureError
from pyro_vfe.program.agreement import check_plate
from pyro_vfe.program.chain_sites import time_plate
from pyro_vfe.program.enumeration import SiteKey
from pyro_vfe.program.recorder import Plate, Site

Sites = Mapping[SiteKey, Site]


def largest_plates(paths: Iterable[Sites]) -> dict[str, Plate]:
    """Returns each plate as the path has it in which it is largest.

    Args:
        paths: The sites of each path of choices.

    Raises:
        NameClashError: A plate has two sizes in one path.
    """
    result: dict[str, Plate] = {}
    for sites in paths:
        for name, plate in _plates(sites).items():
            if name not in result or plate.size > result[name].size:
                result[name] = plate
    return result


def check_uneven(paths: Iterable[Sites]) -> dict[str, int]:
    """Returns the plates that differ in size from path to path, with their largest size.

    Args:
        paths: The sites of each path of choices.

    Raises:
        StructureError: Such a plate is subsampled, or a chain's or a draw's.
    """
    paths = list(paths)
    if len(paths) < 2:
        return {}
    largest = largest_plates(paths)
    own = [_plates(sites) for sites in paths]
    uneven = {
        name: most.size
        for name, most in largest.items()
        if any(name in plates and plates[name].size != most.size for plates in own)
    }
    for sites in paths if uneven else ():
        for site in sites.values():
            for plate in site.plates:
                if plate.name in uneven:
                    _check(site, plate)
    return uneven


def _plates(sites: Sites) -> dict[str, Plate]:
    result: dict[str, Plate] = {}
    for site in sites.values():
        for plate in site.plates:
            check_plate(result.setdefault(plate.name, plate), plate)
    return result


def _check(site: Site, plate: Plate) -> None:
    why = None
    if plate.size != plate.full_size:
        why = f"shows {plate.size} of its {plate.full_size} elements"
    elif time_plate(site) == plate.name:
        why = f"is the time of the chain '{site.name}'"
    elif site.kind == "sampled":
        why = f"has the draw '{site.name}' in it"
    if why is not None:
        raise StructureError(
            f"Plate '{plate.name}' has another size in another branch of the programs, and {why}.",
            hint="Give it the same size in all branches, with poutine.mask for the elements that a branch lacks; or "
            f"write it as a loop with a site for each element (for i in pyro.plate('{plate.name}', ...)).",
        )


def filled(factor: Factor, site: Site, sizes: Mapping[str, int]) -> Factor:
    """Returns a factor of one path with the elements that it lacks.

    Args:
        factor: The factor.
        site: Its site, as that path has it.
        sizes: The largest size of each plate that differs from path to path.
    """
    for plate in site.plates:
        if plate.size < sizes.get(plate.name, 0):
            most = sizes[plate.name]
            fill = partial(_filled, plate=plate, most=most, pinned=site.name if site.kind == "enumerated" else None)
            factor = factor.mapped(fill)
            if isinstance(factor.scale, Table) and plate.name in factor.scale.axes:
                factor = replace(factor, scale=_with_more(factor.scale, plate, most, factor.scale.values.new_ones(())))
    return factor


def _filled(table: Table, plate: Plate, most: int, pinned: str | None) -> Table:
    nothing = table.values.new_zeros(())
    if pinned in table.axes:
        size = table.sizes[pinned]
        first = torch.arange(size, device=nothing.device) == 0
        nothing = table.values.new_zeros(size).masked_fill(~first, -torch.inf)
        nothing = nothing.reshape([size if axis == pinned else 1 for axis in _outer(table, plate)] + [1])
    return _with_more(table, plate, most, nothing)


def present(known: Table | None, site: Site, sizes: Mapping[str, int], like: Tensor) -> Table | None:
    """Returns at which elements a latent of one path exists, of all that some path has; None for everywhere.

    Args:
        known: What masks leave of it; None for all.
        site: Its site, as that path has it.
        sizes: The largest size of each plate that differs from path to path.
        like: A tensor of the device.
    """
    for plate in site.plates:
        if plate.size < sizes.get(plate.name, 0):
            known = Table(like.new_ones((), dtype=torch.bool), ()) if known is None else known
            known = _with_more(known, plate, sizes[plate.name], known.values.new_zeros(()))
    return known


def _outer(table: Table, plate: Plate) -> tuple[str, ...]:
    return tuple(axis for axis in table.axes if axis != plate.name)


def _with_more(table: Table, plate: Plate, most: int, more: Tensor) -> Table:
    """The table with `more` at the elements of a plate from its own size on; the plate becomes its last axis."""
    axes = (*_outer(table, plate), plate.name)
    values = table.aligned(axes)
    shape = values.shape[:-1]
    return Table(torch.cat([values.expand(*shape, plate.size), more.expand(*shape, most - plate.size)], -1), axes)
