"""Which dim each latent is enumerated along.

Latents that meet in one tensor need different dims. Few latents get a dim each. Many latents share dims by greedy
colouring of the graph of meetings, in program order: a chain of any length needs two colours. Every later run is
tracked to tell which latent of a colour was read, so that a program may change how it is wired from call to call.
"""

from collections.abc import Iterable, Mapping, Sequence

from pyro_vfe.errors import CostError
from pyro_vfe.program.escapes import Sites

_OWN_DIMS = 12
"""Up to so many latents get a dim each."""

_MAX_DIMS = 60
"""torch's tensors have at most 64 dims; a few are left to events."""


def enumeration_dims(
    latents: Sequence[str], meetings: Mapping[Sites, str], others: Iterable[Sites], nesting: int
) -> dict[str, int]:
    """Returns the dim of each latent, left of the plates'.

    Args:
        latents: The latents in program order.
        meetings: The sets of latents that an operation joined in one tensor, and which one it was.
        others: Further sets of latents that need different dims.
        nesting: How many dims the plates take.

    Raises:
        CostError: Too many latents meet in one tensor.
    """
    own = len(latents) <= _OWN_DIMS
    colours = {name: i for i, name in enumerate(latents)} if own else coloured(latents, (*meetings, *others))
    if not own and max(colours.values()) + 1 + nesting > _MAX_DIMS:
        raise _too_many(set(latents), meetings, max(colours.values()) + 1)
    return {name: -1 - nesting - colour for name, colour in colours.items()}


def coloured(latents: Sequence[str], cliques: Iterable[Sites]) -> dict[str, int]:
    """Returns a number for each latent, by greedy colouring of the graph of those that meet, in program order.

    Args:
        latents: The latents in program order.
        cliques: The sets of those that meet.
    """
    neighbours: dict[str, set[str]] = {name: set() for name in latents}
    for sites in cliques:
        clique = sites & neighbours.keys()
        for name in clique:
            neighbours[name] |= clique
    colours: dict[str, int] = {}
    for name in latents:
        taken = {colours[other] for other in neighbours[name] if other in colours}
        colours[name] = next(colour for colour in range(len(latents) + 1) if colour not in taken)
    return colours


def _too_many(latents: set[str], meetings: Mapping[Sites, str], dims: int) -> CostError:
    clique, operation = max(meetings.items(), key=lambda item: len(item[0] & latents))
    names = sorted(clique & latents)
    return CostError(
        f"{len(names)} latents ('{names[0]}', '{names[1]}', ...) meet in one tensor, made by `{operation}`: "
        f"enumerated together they would need {dims} dims, and torch has 64.",
        hint="Do not join the latents (torch.stack, torch.cat, a running sum); keep a list and use each where "
        "it is needed.",
        sites=names,
    )
