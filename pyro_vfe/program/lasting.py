"""Changes in place that outlive a run: a program that makes them says something else each time it runs.

seen |= captured[:, t]        where `seen` is an argument, or is made outside of the program
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pyro_vfe.errors import StructureError
from pyro_vfe.program.keeping import tensors_of
from pyro_vfe.program.provenance import Provenance
from pyro_vfe.program.randomness import random_state
from pyro_vfe.program.recorder import Role, Site

Sites = Mapping[tuple[Role, str], Site]
Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]
Ran = tuple[Sites, Provenance, bool]
"""The sites of a run, what they were made from, and whether the programs overwrite what gradients need."""


def ran_twice(run: Callable[[Provenance], Sites], provenance: Callable[[], Provenance], arguments: Arguments) -> Ran:
    """The sites of a run; where its programs write in place, of a run that gives the same when it is done again.

    Args:
        run: Runs the programs, from one state of the generators.
        provenance: Makes the provenance of a run.
        arguments: The programs' arguments.

    Raises:
        StructureError: A site was given something else the second time. The arguments are put back.
    """
    for is_last in (False, True):
        first, before = provenance(), SimpleNamespace(arguments=arguments)
        first.kept.add(before)
        sites, second = run(first), Provenance()
        if not first.kept.has_writes:
            break
        state = random_state()
        for holder in (before, *sites.values()):  # An argument may be a site's datum itself.
            second.kept.add(holder)
        with torch.enable_grad(), second.kept.saving():
            again = run(second)
        second.finish()
        changed = [site for key, site in sites.items() if key not in again or not _given_the_same(site, again[key])]
        if not changed:
            break
        _put_back(arguments, before.arguments)
        # A first run may set something up at random, and draw other values after that than any run that follows.
        if is_last or all(map(torch.equal, state, random_state())):
            raise StructureError(
                f"Site '{changed[0].name}' of the {changed[0].role} was given something else when the programs ran a "
                "second time: they change a tensor in place that outlives a run.",
                hint="Change a copy (`seen = seen.clone()` at the start), or write `seen = seen | new` in place of "
                "`seen |= new`.",
            )
    return sites, first, second.kept.has_overwritten_saved


def _given_the_same(one: Site, other: Site) -> bool:
    pairs = tensors_of(one), tensors_of(other)
    return one is other or (len(pairs[0]) == len(pairs[1]) and all(map(_equal, *pairs)))


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    return bool(torch.isclose(one, other, equal_nan=True).all())


def _put_back(arguments: Arguments, before: Arguments) -> None:
    now, then = (tensors_of(SimpleNamespace(arguments=own)) for own in (arguments, before))
    with torch.no_grad():
        for tensor, kept in zip(now, then, strict=True):
            if tensor is not kept:
                tensor.copy_(kept)
