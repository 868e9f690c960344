r"""Which variables form chains along a plate, and what a sweep over them costs: from names and sizes alone.

    state_t  =  (x_t, z_t, ...)          summed along the plate, its plates otherwise batched
    flops    =  steps * batch * K^2      K = number of joint states

A group is closed: what else lies in the plate and is tied to it is summed at each step, before the sweep.

References:
    Rabiner (1989), A tutorial on hidden Markov models and selected applications in speech recognition.
    Ghahramani and Jordan (1997), Factorial hidden Markov models (chains that share their data).
"""

from functools import lru_cache
from math import prod
from typing import NamedTuple

from pyro_vfe.engine.ordering import Largest
from pyro_vfe.engine.structure import FactorShape, Structure, VariableShape, previous
from pyro_vfe.errors import PlateError


class ChainGroup(NamedTuple):
    """Chains that are summed together, along one plate."""

    plate: str
    """The plate along which they run: time."""

    states: tuple[str, ...]
    """The variables that make up the state, in the program's order."""

    local: tuple[str, ...]
    """Variables that are summed at each step by themselves."""

    plates: frozenset[str]
    """The plates of the states, time included."""

    factors: tuple[int, ...]
    """Positions of the factors that read any of them."""

    batch: tuple[str, ...]
    """Other axes of these factors: plates around the chains, and variables outside of time."""

    steps: int
    """The number of elements along time."""

    n_states: int
    """The number of joint states."""

    n_sequences: int
    """The product of the sizes of `batch`."""

    n_transitions: int
    """The number of transition matrices: one, or as many as vary along time and `batch`."""

    @classmethod
    def of_kept(
        cls, plate: str, states: tuple[str, ...], local: tuple[str, ...], plates: frozenset[str], steps: int
    ) -> "ChainGroup":
        """Returns chains that stay, with what is summed at their steps; nothing is swept."""
        return cls(plate, states, local, plates, (), (), steps, 1, 1, 1)

    @property
    def flops(self) -> int:
        """Multiply-adds of one sweep."""
        return self.steps * self.n_sequences * self.n_states**2

    @property
    def entries(self) -> int:
        """Numbers that are held: log potentials, messages of both directions, transitions."""
        return 3 * self.steps * self.n_sequences * self.n_states + self.n_transitions * self.n_states**2

    @property
    def held(self) -> int:
        """Numbers that are held at once: all of them, for the gradient."""
        return self.entries

    @property
    def largest(self) -> Largest:
        """The largest table."""
        messages = Largest((self.plate, *self.batch, *self.states), self.steps * self.n_sequences * self.n_states)
        pairs = Largest((*map(previous, self.states), *self.states), self.n_transitions * self.n_states**2)
        return max(messages, pairs, key=lambda table: table.entries)

    @property
    def summed(self) -> frozenset[str]:
        """All variables that the sweep sums out."""
        return frozenset((*self.states, *self.local))


def chain_variables(structure: Structure) -> dict[str, VariableShape]:
    """Returns the variables whose previous values some factor reads."""
    read = {axis for factor in structure.factors for axis in factor.axes}
    return {v.name: v for v in structure.variables if v.chain is not None and previous(v.name) in read}


@lru_cache(maxsize=512)
def chain_groups(structure: Structure, keep: frozenset[str], keep_plates: frozenset[str]) -> tuple[ChainGroup, ...]:
    """Returns the groups of chains to be summed.

    Args:
        structure: The graph.
        keep: Variables that stay.
        keep_plates: Plates whose elements are kept apart.

    Raises:
        PlateError: A chain is tied to something inside its plate that cannot be summed with it.
    """
    chains = {name: v for name, v in chain_variables(structure).items() if name not in keep}
    groups: list[ChainGroup] = []
    while chains:
        start = next(iter(chains.values()))
        if start.chain in keep_plates:
            raise PlateError(
                f"Site '{start.name}' ties the elements of plate '{start.chain}' into a chain, so they have no terms of"
                " their own.",
                hint="Ask for the total, or for another plate.",
            )
        group = _group(structure, start, frozenset(chains), keep)
        groups.append(group)
        chains = {name: v for name, v in chains.items() if name not in group.states}
    return tuple(groups)


def _group(structure: Structure, start: VariableShape, chains: frozenset[str], keep: frozenset[str]) -> ChainGroup:
    assert start.chain is not None
    shapes = {v.name: v for v in structure.variables}
    inside = {v.name for v in structure.variables if start.chain in v.plates}
    members, touching = _tied(structure, start.name, inside)
    for name in members:
        _check_member(start, shapes[name], name in chains, keep)
    states = tuple(v.name for v in structure.variables if v.name in members and v.name in chains)
    own = {*members, *map(previous, members), start.chain}
    axes = [axis for position in touching for axis in structure.factors[position].axes]
    batch = tuple(dict.fromkeys(axis for axis in axes if axis not in own and (axis in start.plates or axis in shapes)))
    for axis in batch:
        if axis in shapes and not shapes[axis].plates <= start.plates:
            raise PlateError(
                f"The chain '{start.name}' in the plates {sorted(start.plates)} is tied to '{axis}' in the plates"
                f" {sorted(shapes[axis].plates)}, which is not summed: its sum would depend on all their elements.",
                hint=f"Give the guide '{start.name}' too, or leave '{axis}' out of it.",
            )
    sizes = {v.name: v.size for v in structure.variables} | dict(structure.plates)
    pairs = [structure.factors[position] for position in touching if _is_pair(structure.factors[position], states)]
    varying = {axis for factor in pairs for axis in factor.axes if axis in batch or axis == start.chain}
    return ChainGroup(
        plate=start.chain,
        states=states,
        local=tuple(v.name for v in structure.variables if v.name in members and v.name not in chains),
        plates=start.plates,
        factors=tuple(touching),
        batch=batch,
        steps=sizes[start.chain],
        n_states=prod(sizes[name] for name in states),
        n_sequences=prod(sizes[axis] for axis in batch),
        n_transitions=prod(sizes[axis] for axis in varying),
    )


def _is_pair(factor: FactorShape, states: tuple[str, ...]) -> bool:
    return any(previous(name) in factor.axes for name in states)


def _tied(structure: Structure, start: str, inside: set[str]) -> tuple[set[str], list[int]]:
    """Returns what lies inside the plate and is tied to a chain there, and the positions of the factors between."""
    earlier = {previous(name): name for name in inside}
    scopes = [{earlier.get(axis, axis) for axis in factor.axes} & inside for factor in structure.factors]
    readers: dict[str, list[int]] = {}
    for position, scope in enumerate(scopes):
        for name in scope:
            readers.setdefault(name, []).append(position)
    members, queue = {start}, [start]
    touching: set[int] = set()
    while queue:
        for position in readers.get(queue.pop(), ()):
            touching.add(position)
            fresh = scopes[position] - members
            members |= fresh
            queue.extend(fresh)
    return members, sorted(touching)


def _check_member(start: VariableShape, member: VariableShape, is_chain: bool, keep: frozenset[str]) -> None:
    if member.name in keep:
        raise PlateError(
            f"The chain '{start.name}' is to be summed out while '{member.name}', which it is tied to at every step of"
            f" plate '{start.chain}', is not: its sum would depend on all steps at once.",
            hint=f"Give the guide a site '{start.name}' too (vfe.MarkovChain), or leave '{member.name}' out of it.",
        )
    fits = member.plates == start.plates and member.chain == start.chain if is_chain else member.plates >= start.plates
    if not fits:
        raise PlateError(
            f"The chain '{start.name}' in the plates {sorted(start.plates)} is tied to '{member.name}' in the plates"
            f" {sorted(member.plates)}: all elements of the plates they do not share would form one state.",
            hint="Put both in the same plates, or let the guide draw one of them (infer={'enumerate': None}).",
        )
