"""Which network is called when, for which latents, and what of its output is whose.

Made of names, sizes and plates alone, once for each shape of the arguments.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy
import torch
from torch import nn

from pyro_vfe.errors import StructureError
from pyro_vfe.guides.amortized_inputs import Source, source_of
from pyro_vfe.guides.amortized_latents import Latent
from pyro_vfe.guides.amortized_logits import Share, check_plates
from pyro_vfe.guides.edges import in_order, pairs_of
from pyro_vfe.program.recorder import Plate

Edges = Literal["model"] | Sequence[tuple[str, str]]


class Question:
    """What the user asked for, in one form."""

    def __init__(self, network: nn.Module | Mapping[str, nn.Module], inputs: Any, edges: Edges) -> None:
        """Args:
        network: One module, or a mapping from sites to modules.
        inputs: What it reads, or what each of them reads.
        edges: Pairs (parent, child), or "model".

        Raises:
            StructureError: There is no such network, or the sites of inputs are not those of the networks.
        """
        self.sites = tuple(network) if isinstance(network, Mapping | nn.ModuleDict) else None
        """The sites that have a network of their own; None for one network."""
        self.sources = self._sources(inputs)
        self.edges = edges

    def _sources(self, inputs: Any) -> dict[str | None, Source]:
        if self.sites is None:
            if isinstance(inputs, Mapping):
                raise StructureError(
                    "AutoAmortized was given one network, and a mapping as its inputs.",
                    hint="Give each site a network as well, network={'site': module}, or name what the network reads.",
                )
            return {None: source_of(inputs, "all latents")}
        if not isinstance(inputs, Mapping):
            return {site: source_of(inputs, f"latent site '{site}'") for site in self.sites}
        strange = [site for site in inputs if site not in self.sites]
        if strange:
            raise StructureError(
                f"AutoAmortized was given inputs for '{strange[0]}', which has no network.",
                hint=f"There are networks for {_quoted(self.sites)}.",
            )
        return {site: source_of(inputs.get(site), f"latent site '{site}'") for site in self.sites}


@dataclass(frozen=True, eq=False)
class Step:
    """One call of a network, and the latents that are sampled after it."""

    site: str | None
    """The site whose network it is; None for one network of all."""
    source: Source
    shares: tuple[Share, ...]
    """How the output's last dim is divided."""
    order: tuple[Share, ...]
    """The same in the order of sampling: parents first."""

    @property
    def whose(self) -> str:
        """The network, in words."""
        names = [share.latent.name for share in self.shares]
        return f"latent site{'s' if len(names) > 1 else ''} {_quoted(names)}"

    @property
    def plates(self) -> tuple[Plate, ...]:
        """The plates around its latents, which are the same for all of them."""
        return self.shares[0].latent.plates


@dataclass(frozen=True, eq=False)
class Plan:
    """All calls, in order."""

    latents: Mapping[str, Latent]
    steps: tuple[Step, ...]

    @property
    def plates(self) -> dict[str, Plate]:
        """The plates around the latents, by name."""
        return {plate.name: plate for latent in self.latents.values() for plate in latent.plates}


def plan_of(question: Question, latents: Mapping[str, Latent]) -> Plan:
    """Returns the calls that answer a question about a model's latents.

    Args:
        question: What the user asked for.
        latents: The discrete latents of the model, in its order.

    Raises:
        StructureError: The networks are not those of the latents, or an edge cannot be had.
    """
    if not latents:
        raise StructureError(
            "AutoAmortized found no discrete latent with a finite support in the model.",
            hint="Use one of Pyro's autoguides for continuous latents.",
        )
    parents = _parents(question.edges, latents)
    shares = {
        name: Share(latent, tuple(latents[parent] for parent in parents[name] if parent != name), name in parents[name])
        for name, latent in latents.items()
    }
    if question.sites is None:
        _check_one_network(question.sources[None], latents)
        order = tuple(shares[name] for name in _sorted(latents, parents))
        return Plan(latents, (Step(None, question.sources[None], tuple(shares.values()), order),))
    _check_networks(question.sites, latents)
    reads = {name: [*parents[name], *_latents_read(question.sources[name], name, latents)] for name in latents}
    steps = [Step(name, question.sources[name], (shares[name],), (shares[name],)) for name in _sorted(latents, reads)]
    return Plan(latents, tuple(steps))


def _parents(edges: Edges, latents: Mapping[str, Latent]) -> dict[str, list[str]]:
    """The parents of each latent, itself among them where a chain depends on its state before, in the model's order."""
    if edges == "model":
        pairs = {(parent, name) for name, latent in latents.items() for parent in latent.reads}
        pairs |= {(name, name) for name, latent in latents.items() if latent.chain is not None}
    else:
        pairs = set(pairs_of(edges, "AutoAmortized"))
    for parent, child in pairs:
        for name in (parent, child):
            if name not in latents and edges != "model":
                raise StructureError(
                    f"AutoAmortized was given the edge ('{parent}', '{child}'), and '{name}' is no discrete latent.",
                    hint=f"The latents are {_quoted(latents)}.",
                )
        if parent == child and latents[child].chain is None:
            raise StructureError(
                f"AutoAmortized was given the edge ('{parent}', '{child}'), and '{child}' is no chain.",
                hint="Only a vfe.MarkovChain depends on its own state before.",
            )
    return {child: [parent for parent in latents if (parent, child) in pairs] for child in latents}


def _sorted(latents: Mapping[str, Latent], parents: Mapping[str, Sequence[str]]) -> list[str]:
    """The latents with parents first, otherwise in the model's order."""
    for child in latents:
        for parent in parents[child]:
            check_plates(latents[child], latents[parent])
    # A chain that depends on its own state before waits for nothing.
    return in_order({name: [own for own in parents[name] if own != name] for name in latents}, "AutoAmortized")


def _latents_read(source: Source, name: str, latents: Mapping[str, Latent]) -> list[str]:
    read = [other for other in source if other in latents] if isinstance(source, tuple) else []
    if name in read:
        raise StructureError(
            f"The network of latent site '{name}' reads the site itself.", hint="Let it read data and other latents."
        )
    return read


def _check_one_network(source: Source, latents: Mapping[str, Latent]) -> None:
    read = [name for name in source if name in latents] if isinstance(source, tuple) else []
    if read:
        raise StructureError(
            f"One network for all latents cannot read the value of one of them, '{read[0]}'.",
            hint="Give each site a network of its own, network={'site': module, ...}, or let one latent depend on "
            "another by edges=[('parent', 'child')].",
        )
    if len({frozenset(plate.name for plate in latent.plates) for latent in latents.values()}) > 1:
        where = "; ".join(f"'{name}' in {_quoted([p.name for p in x.plates]) or 'none'}" for name, x in latents.items())
        networks = ", ".join(f"'{name}': ..." for name in latents)
        outside = next((name for name, latent in latents.items() if not latent.plates), None)
        whole = f" That of '{outside}' reads the whole data and returns its logits alone." if outside else ""
        raise StructureError(
            f"One network cannot speak of latents in different plates: {where}.",
            hint=f"Give each a network of its own, network={{{networks}}}.{whole}",
        )


def _check_networks(sites: Sequence[str], latents: Mapping[str, Latent]) -> None:
    for name in sites:
        if name not in latents:
            raise StructureError(
                f"AutoAmortized was given a network for '{name}', which is no discrete latent of the model.",
                hint=f"The latents are {_quoted(latents)}.",
            )
    for name in latents:
        if name not in sites:
            raise StructureError(
                f"AutoAmortized was given no network for latent site '{name}'.",
                hint=f"Add one; or leave the site to be summed inside the model by hiding it from the guide, "
                f"AutoAmortized(pyro.poutine.block(model, hide=['{name}']), ...).",
            )


def _quoted(names: Any) -> str:
    return ", ".join(f"'{name}'" for name in names)


class _Same:
    """An object as a key: equal to itself alone, and kept alive so that no other takes its place."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def shape_key(value: Any) -> object:
    """Returns what two arguments have in common where a program has the same sites and sizes: shapes and counts.

    Args:
        value: An argument of a program, or a collection of them.
    """
    if value is None or isinstance(value, bool | int | str | bytes):
        return type(value), value
    if isinstance(value, float):
        return float
    if isinstance(value, torch.Tensor | numpy.ndarray | numpy.generic):
        number = value.item() if value.ndim == 0 else None
        return type(value), tuple(value.shape), number if isinstance(number, bool | int) else None
    if isinstance(value, Mapping):
        return type(value), tuple((name, shape_key(part)) for name, part in value.items())
    if isinstance(value, list | tuple):
        return type(value), tuple(shape_key(part) for part in value)
    return _Same(value)
