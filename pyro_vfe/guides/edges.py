r"""Which latents a guide lets each latent depend on: a directed graph without cycles, over names.

Q(v)  =  prod_i  Q( v_i | v_parents(i) )
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal

from pyro_vfe.errors import PlateError, StructureError
from pyro_vfe.program.site_structure import SiteStructure

Edges = Literal["model"] | Iterable[tuple[str, str]]

Parents = dict[str, tuple[str, ...]]
"""For each latent its parents; both in an order in which they can be sampled."""


def parents_of(edges: Edges, latents: Mapping[str, SiteStructure], reads: Mapping[str, Collection[str]]) -> Parents:
    """Returns each latent's parents, in an order of sampling that is the model's where the edges allow it.

    Args:
        edges: "model", or pairs (parent, child).
        latents: The model's discrete latents, in its order.
        reads: For each latent, the latents that its prior reads.

    Raises:
        StructureError: An edge names an unknown latent, or leads from a latent to itself, or the edges form a cycle.
        PlateError: An edge leads out of a plate.
    """
    own = edges == "model"
    pairs = [(x, child) for child in latents for x in reads[child]] if own else pairs_of(edges, "AutoStructured")
    for pair in pairs:
        _check_edge(pair, latents)
    parents: dict[str, set[str]] = {name: set() for name in latents}
    for parent, child in pairs:
        parents[child].add(parent)
    order = in_order(parents, "AutoStructured")
    place = {name: index for index, name in enumerate(order)}
    return {name: tuple(sorted(parents[name], key=place.__getitem__)) for name in order}


def pairs_of(edges: object, who: str) -> list[tuple[str, str]]:
    """Returns edges as pairs (parent, child).

    Args:
        edges: What the user gave, if not "model".
        who: The guide.

    Raises:
        StructureError: They are none.
    """
    if isinstance(edges, str) or not isinstance(edges, Iterable):
        raise StructureError(f"{who} was given edges={edges!r}.", hint=_FORMS)
    pairs: list[tuple[str, str]] = []
    for pair in edges:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise StructureError(f"{who} was given the edge {pair!r}, which is no pair.", hint=_FORMS)
        parent, child = pair
        pairs.append((parent, child))
    return pairs


_FORMS = "Use edges='model', or a list of pairs of latents' names (parent, child)."


def _check_edge(pair: tuple[str, str], latents: Mapping[str, SiteStructure]) -> None:
    parent, child = pair
    for name in pair:
        if name not in latents:
            known = ", ".join(f"'{latent}'" for latent in list(latents)[:12])
            raise StructureError(
                f"The edge ('{parent}', '{child}') of AutoStructured names '{name}', which is no discrete latent of "
                "the model.",
                hint=f"The first of its latents are: {known}.",
            )
    if parent == child:
        raise StructureError(
            f"The edge ('{parent}', '{child}') of AutoStructured leads from a latent to itself.",
            hint="Drop it; a vfe.MarkovChain of the model becomes a chain without being named.",
        )
    around = {plate.name for plate in latents[child].plates}
    for plate in latents[parent].plates:
        if plate.name not in around:
            raise PlateError(
                f"The edge ('{parent}', '{child}') of AutoStructured leads out of plate '{plate.name}': '{child}' "
                f"would depend on all elements of '{parent}'.",
                hint=f"Turn it around, ('{child}', '{parent}'), or drop it.",
            )


def in_order(parents: Mapping[str, Collection[str]], who: str) -> list[str]:
    """Returns the names, parents first; in the given order where it does not matter.

    Args:
        parents: The names, and for each what it depends on.
        who: The guide.

    Raises:
        StructureError: Some depend on one another in a cycle.
    """
    order: list[str] = []
    placed: set[str] = set()
    waiting = list(parents)
    while waiting:
        ready = next((name for name in waiting if placed.issuperset(parents[name])), None)
        if ready is None:
            cycle = _cycle(parents, waiting)
            listed = " -> ".join(f"'{name}'" for name in cycle)
            raise StructureError(
                f"The latents of {who} depend on one another in a cycle: {listed}.",
                hint=f"Drop an edge or an input, that from '{cycle[-2]}' to '{cycle[-1]}' say.",
            )
        order.append(ready)
        placed.add(ready)
        waiting.remove(ready)
    return order


def _cycle(parents: Mapping[str, Collection[str]], waiting: Sequence[str]) -> list[str]:
    """A cycle among latents that wait for one another, from a latent back to itself along the edges."""
    left = set(waiting)
    path = [waiting[0]]
    while path[-1] not in path[:-1]:
        path.append(min(left.intersection(parents[path[-1]])))
    backwards = path[path.index(path[-1]) :]
    return backwards[::-1]
