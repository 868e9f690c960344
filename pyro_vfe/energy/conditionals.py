r"""The exact conditionals of a joint distribution's latents: tables for who wants to sample it site by site.

    P(v_i | v_S, u)  =  P(v_i, v_S | u) / sum_{v_i} P(v_i, v_S | u)

A chain has two: P(z_0 | v_S, u), and P(z_t | z_{t-1}, v_S, u) for the elements after the first.

Which earlier latents S separate a latent from the others before it is read off the graph: summing the latents out in
reverse order leaves each with its neighbours among those before it.

References:
    Koller and Friedman (2009), Probabilistic Graphical Models, chapters 4 and 9 (separation, elimination).
    Chib (1996), Calculating posterior distributions and modal estimates in Markov mixture models (chains backwards).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vfe.engine.execution import reference_tensor
from pyro_vfe.engine.factors import Factor, FactorGraph, Table
from pyro_vfe.engine.inference import expected_tables, marginals
from pyro_vfe.engine.structure import previous
from pyro_vfe.errors import PlateError

Parents = Mapping[str, tuple[str, ...]]
"""For each latent, the latents that it is conditioned on."""


@dataclass(frozen=True, eq=False)
class Conditional:
    """The log-probabilities of a latent's values given its parents, in nats."""

    table: Table
    """Axes `(*plates, *parents, latent)`; of a chain `(*plates, *parents, previous, latent)`, from its second element
    on."""

    first: Table | None
    """Of a chain, the table of its first element: axes `(*plates but time, *parents, latent)`."""


def conditionals(graph: FactorGraph, parents: Parents, *, max_bytes: float | None = None) -> dict[str, Conditional]:
    """Returns the conditionals of latents under a joint distribution, each row normalised.

    A value that cannot be, whatever the plate's other elements, has log-probability -inf; where the parents' values
    cannot be, all values are equally probable.

    Args:
        graph: The factors of the joint distribution.
        parents: The latents that are wanted, and what each is conditioned on: their plates are among its own.
        max_bytes: The most memory that intermediate tables may take.

    Raises:
        ImpossibleDataError: The log normaliser is -inf.
        CostError: The elimination would not fit.
    """
    joint = _joint_tables(graph, parents, max_bytes)
    possible = _possible_tables(graph, parents, max_bytes)
    return {name: _from_joint(tables, possible[name] if possible else None) for name, tables in joint.items()}


def uniform_conditionals(
    graph: FactorGraph, parents: Parents, *, max_bytes: float | None = None
) -> dict[str, Conditional] | None:
    """Returns conditionals that give equal probabilities to all values that can be; None where nothing is ruled out.

    Args:
        graph: The factors of the joint distribution.
        parents: The latents that are wanted, and what each is conditioned on: their plates are among its own.
        max_bytes: The most memory that intermediate tables may take.

    Raises:
        ImpossibleDataError: The log normaliser is -inf.
        CostError: The elimination would not fit.
    """
    possible = _possible_tables(graph, parents, max_bytes)
    if possible is None:
        return None
    equal = {name: [Table(torch.ones_like(t.values), t.axes) for t in tables] for name, tables in possible.items()}
    return {name: _from_joint(equal[name], tables) for name, tables in possible.items()}


def _possible_tables(
    graph: FactorGraph, parents: Parents, max_bytes: float | None
) -> dict[str, tuple[Table, ...]] | None:
    """Tables that are zero where a latent's value, with those of its parents, cannot be; None where all can."""
    if not any(bool(table.values.isneginf().any()) for table in graph.tables):
        return None
    flat = graph.with_tables(Table(_flattened(table.values), table.axes) for table in graph.tables)
    return _joint_tables(flat, parents, max_bytes)


def _from_joint(joint: Sequence[Table], possible: Sequence[Table] | None) -> Conditional:
    logs = [_conditional(table, possible[n] if possible else None) for n, table in enumerate(joint)]
    return Conditional(logs[0], logs[1] if len(logs) > 1 else None)


def _flattened(values: Tensor) -> Tensor:
    """Log tables that tell only what can be."""
    return torch.zeros_like(values).masked_fill(values.isneginf(), -torch.inf)


def _conditional(joint: Table, possible: Table | None) -> Table:
    """The logs of joint probabilities, normalised over the last axis."""
    # What is possible and lost to underflow stays possible: else nothing could ever bring it back.
    logs = joint.values.clamp(min=torch.finfo(joint.values.dtype).tiny).log()
    if possible is not None:
        logs = logs.masked_fill(possible.values == 0, -torch.inf)
        logs = logs.masked_fill(logs.isneginf().all(-1, keepdim=True), 0.0)
    return Table(logs.log_softmax(-1), joint.axes)


def _joint_tables(graph: FactorGraph, parents: Parents, max_bytes: float | None) -> dict[str, tuple[Table, ...]]:
    """Joint probabilities of each latent and its parents; of a chain two tables."""
    chains = [name for name in parents if graph.variables[name].chain is not None]
    others = [name for name in parents if name not in chains]
    result: dict[str, tuple[Table, ...]] = {}
    if others:
        scopes = {name: (*parents[name], name) for name in others}
        found = marginals(graph, scopes.values(), max_bytes=max_bytes)
        result = {name: (found[scope],) for name, scope in scopes.items()}
    if chains:
        probes = [_chain_probe(name, parents[name], graph) for name in chains]
        gradients = expected_tables(graph.with_factors(*probes), max_bytes=max_bytes)[-2 * len(probes) :]
        for index, (name, probe) in enumerate(zip(chains, probes, strict=True)):
            pair = zip(probe.tables, gradients[2 * index : 2 * index + 2], strict=True)
            result[name] = tuple(Table(_weights(values, len(parents[name])), table.axes) for table, values in pair)
    return {name: result[name] for name in parents}


def _chain_probe(name: str, parents: tuple[str, ...], graph: FactorGraph) -> Factor:
    """Tables of zeros over a chain's states, those before, and its parents: their gradients are joint probabilities."""
    variable = graph.variables[name]
    time = variable.chain
    around = sorted(variable.plates - {time})
    like = reference_tensor(graph)
    sizes = [graph.plates[plate] for plate in around]
    given = [graph.size(parent) for parent in parents]
    states = variable.size
    assert time is not None
    table = like.new_zeros([*sizes, graph.plates[time] - 1, *given, states, states])
    first = like.new_zeros([*sizes, *given, states])
    return Factor(
        f"conditional of {name}",
        Table(table, (*around, time, *parents, previous(name), name)),
        variable.plates,
        variable.scale,
        Table(first, (*around, *parents, name)),
    )


def _weights(gradient: Tensor, num_parents: int) -> Tensor:
    """Joint probabilities, whatever the weight of the plate's element was."""
    dims = tuple(range(-1 - num_parents, 0))
    largest = gradient.amax(dims, keepdim=True)
    return gradient / largest.where(largest > 0, 1.0)


@dataclass(frozen=True)
class Around:
    """Where a latent stands."""

    plates: frozenset[str]
    chain: str | None
    optional: bool = False
    """Whether some branch of the model lacks it."""


def separators(scopes: Sequence[frozenset[str]], latents: Mapping[str, Around]) -> dict[str, tuple[str, ...]]:
    """Returns, in an order of sampling, each latent with those before it that separate it from the rest before it.

    Args:
        scopes: The axes of each factor: latents, and the previous values of chains.
        latents: The latents in the order of the model.

    Raises:
        PlateError: The elements of a plate, or the steps of a chain, are not independent of one another given what
            stands outside.
    """
    order = _sampling_order(latents)
    place = {name: index for index, name in enumerate(order)}
    earlier = {previous(name): name for name, around in latents.items() if around.chain is not None}
    left = [scope & (latents.keys() | earlier.keys()) for scope in scopes]
    found: dict[str, tuple[str, ...]] = {}
    for name in reversed(order):
        own = {name, previous(name)} if latents[name].chain is not None else {name}
        touching = [scope for scope in left if not own.isdisjoint(scope)]
        neighbours = frozenset[str]().union(*touching) - own
        _check_neighbours(name, neighbours, latents, earlier)
        left = [scope for scope in left if own.isdisjoint(scope)] + [neighbours]
        found[name] = tuple(sorted(neighbours, key=place.__getitem__))
    return {name: found[name] for name in order}


def _sampling_order(latents: Mapping[str, Around]) -> list[str]:
    """What stands outside comes first, chains before what else is at their steps, and last what some branches lack.

    Otherwise the order is the model's.
    """

    def place(name: str) -> tuple[int, bool, bool]:
        own = latents[name]
        return len(own.plates), own.chain is None, own.optional

    return sorted(latents, key=place)


def _check_neighbours(
    name: str, neighbours: frozenset[str], latents: Mapping[str, Around], earlier: Mapping[str, str]
) -> None:
    own = latents[name]
    for other in sorted(neighbours):
        if other in earlier:
            raise _tied(name, earlier[other], own.chain or latents[earlier[other]].chain or "time", "two steps of it")
        outside = latents[other].plates - own.plates
        if outside:
            raise _tied(name, other, min(outside), f"all elements of plate '{min(outside)}'")
        if own.chain is not None and own.chain in latents[other].plates:
            raise _tied(name, other, own.chain, "every step")


def _tied(name: str, other: str, plate: str, where: str) -> PlateError:
    return PlateError(
        f"The posterior ties latent '{name}' to latent '{other}' at {where}: given the data it does not factorise over "
        f"plate '{plate}', and a guide with tables per element cannot hold it.",
        hint="Leave the latents out of the guide, which sums them exactly inside the model; or use "
        "vfe.AutoStructured, which shows what a guide of this kind costs.",
    )
