r"""One axis for all paths of choices, where most joint values of the latents that decide the path belong to none.

    P(v, u)  =  sum_c  prod_sites table_site[path = c, v_site]

Sites that are named by a state are absent from most paths, and a table over all of them would be mostly of absences. On
path c a latent that decides it has its value of c and no other, so that the values of all fit one path: the sum over c
is that one term. What is summed in parallel within a path has its own axis beside the paths'.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import reduce
from math import prod

import torch

from pyro_vfe.engine.cost import readable_bytes, table_limit
from pyro_vfe.engine.factors import Factor, Table
from pyro_vfe.engine.scales import applied
from pyro_vfe.errors import CostError, NotFiniteError
from pyro_vfe.program.branches import MAX_RUNS, Assignment, deciding, stacked
from pyro_vfe.program.recorder import Role, Site

PATH = "path of choices"
"""The name of the axis."""

SiteKey = tuple[Role, str]


def is_sparse(paths: Collection[Assignment], sizes: Mapping[str, int]) -> bool:
    """Returns whether most joint values of the latents that decide the path are those of latents that are absent.

    Args:
        paths: All paths of choices.
        sizes: The number of values of each latent.
    """
    names = {name for path in paths for name, _ in deciding(path)}
    if any(len(deciding(path)) < len(path) for path in paths):  # Groups of latents take their values in runs, too.
        return False
    return prod(sizes[name] for name in names) > max(MAX_RUNS, 16 * len(paths))


def path_at(paths: Sequence[Assignment], indices: Mapping[str, Table]) -> Table:
    """Returns which path the values of latents lead to.

    Args:
        paths: All paths of choices.
        indices: The index of each latent's value, a scalar or over draws.
    """
    axes = tuple(dict.fromkeys(axis for path in paths for name, _ in deciding(path) for axis in indices[name].axes))
    nowhere = torch.zeros((1,) * len(axes), dtype=torch.bool)
    fits = [
        reduce(torch.logical_and, [indices[name].aligned(axes).cpu() == k for name, k in deciding(path)], ~nowhere)
        for path in paths
    ]
    return Table(torch.stack(torch.broadcast_tensors(*fits)).to(torch.int64).argmax(0), axes)


def side_by_side(tables: Mapping[Assignment, Table | None], absent: Table) -> Table:
    """Returns one table over the paths of choices.

    Args:
        tables: By path; None where the run lacks the site.
        absent: What stands there.
    """
    parts = [absent if table is None else table for table in tables.values()]
    return parts[0] if all(part is parts[0] for part in parts) else stacked(parts, PATH)


def at_choice(table: Table, name: str, index: int, size: int) -> Table:
    """Returns a table of a site at the value that it has on a path, as one over its values: others are impossible.

    Args:
        table: At that value.
        name: The site.
        index: The value's index.
        size: The number of values.
    """
    values = table.values.unsqueeze(-1)
    here = torch.arange(size, device=values.device) == index
    return Table(torch.where(here, values, -torch.inf), (*table.axes, name))


def by_path(paths: Mapping[Assignment, Mapping[SiteKey, Site]], sizes: Mapping[str, int]) -> bool:
    """Returns whether the tables have one axis for all paths: most joint values are none's, and the model has them all.

    Args:
        paths: The sites of each path of choices.
        sizes: The number of values of each latent.
    """
    return is_sparse(paths, sizes) and not any(
        (role == "guide" and site.kind != "observed")
        or (site.kind == "enumerated" and not bool((torch.as_tensor(site.scale) == 1).all()))
        for sites in paths.values()
        for (role, _), site in sites.items()
    )


def over_paths(
    site: Site, some: Factor, found: Mapping[Assignment, Factor | None], absent: Table, sizes: Mapping[str, int]
) -> Factor:
    """Returns a factor over all paths; what decides them has its value of the path, and so values fit one path only.

    Args:
        site: Its site.
        some: The factor on some path.
        found: The factor on each path; None where the run lacks the site.
        absent: The table that stands there.
        sizes: The number of values of each latent.
    """
    whole = {path: None if factor is None else applied(factor) for path, factor in found.items()}

    def of(number: int) -> Table:
        tables = {path: None if factor is None else factor.tables[number] for path, factor in whole.items()}
        for path, table in tables.items():
            if table is not None and site.name in (chosen := dict(deciding(path))):
                tables[path] = at_choice(table, site.name, chosen[site.name], sizes[site.name])
        return side_by_side(tables, absent)

    return Factor(site.name, of(0), some.plates, 1.0, None if some.first is None else of(1))


def check_room(paths: Mapping[Assignment, Mapping[SiteKey, Factor]], sizes: Mapping[str, int]) -> None:
    """Checks that the tables of all sites over all paths fit.

    Args:
        paths: The factors of each path of choices.
        sizes: The number of values of each latent.

    Raises:
        CostError: They do not.
    """
    entries: dict[SiteKey, int] = {}
    for path, factors in paths.items():
        chosen = dict(deciding(path))
        for key, factor in factors.items():
            own = factor.table.values.numel() * (sizes[key[1]] if key[1] in chosen else 1)
            entries[key] = max(own, entries.get(key, 0))
    needed, limit = 8 * len(paths) * sum(entries.values()), table_limit(None)
    if needed > limit:
        raise CostError(
            f"The program takes {len(paths):,} paths for the values of its latents, and the tables of its "
            f"{len(entries):,} sites over all of them would take {readable_bytes(needed)} (limit "
            f"{readable_bytes(limit)}).",
            hint="Let fewer latents decide names and branches: one name for what has one role in all states, and the "
            "state in an indexed table or torch.where.",
            sites=[name for path in list(paths)[:1] for name, _ in deciding(path)],
        )


def not_finite_on_a_path(name: str, num_paths: int) -> NotFiniteError:
    """Returns the error for a derivative that is not finite, where there are too many paths to look at each value.

    Args:
        name: The site.
        num_paths: The number of paths.
    """
    return NotFiniteError(
        f"The derivative of the log-probability of site '{name}' is not finite on one of the {num_paths:,} paths that "
        "the program takes.",
        hint=f"Keep the arguments of '{name}' off that point, by probs.clamp(1e-6, 1 - 1e-6) say.",
    )
