r"""Random starts: weights that an M-phase turns into parameters, of components that differ.

    latents      uniform over what the model's zeros allow, times exp(noise) for each entry of a conditional table
    data         a part of a component's weight is at random on all data, the larger one on an element drawn for it

Random responsibilities of all data alone would average out, and leave components that are nearly equal; elements alone
may have equal data. Elements that feed the same parameters (steps of a loop, data of a plate) are drawn from together.

References:
    McLachlan and Peel (2000), Finite mixture models, section 2.12 (starting values).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from pyro_vfe.engine.factors import Table
from pyro_vfe.engine.inference import expected_tables
from pyro_vfe.learning.belief import Belief
from pyro_vfe.learning.e_phases import model_keys
from pyro_vfe.program.enumeration import Enumeration, SiteKey
from pyro_vfe.program.extraction import tensors_of
from pyro_vfe.program.selection import Origins

_SPREAD = 0.5
"""Standard deviation of the log noise on conditional tables."""

_SHARE = 0.8
"""The share of a component's weight that is on its own element."""


def random_belief(enumeration: Enumeration, generator: torch.Generator, max_bytes: float | None = None) -> Belief:
    """Returns random weights for an M-phase; there is no Q behind them, and so no F.

    Args:
        enumeration: The factors, with the graph from the parameters to the distributions.
        generator: The source of randomness.
        max_bytes: The most memory that intermediate tables may take.

    Raises:
        ImpossibleDataError: The model's zeros leave nothing possible.
        CostError: The elimination would not fit.
    """
    keys = model_keys(enumeration)
    factors = [enumeration.factors[key].mapped(_zeros) for key in keys]
    found = iter(expected_tables(enumeration.graph(*factors), max_bytes=max_bytes))
    exemplars = _exemplars(enumeration, generator)
    noises: dict[tuple[int, ...], Tensor] = {}
    weights: dict[SiteKey, tuple[Tensor, ...]] = {}
    for key in keys:
        factor, kind = enumeration.factors[key], enumeration.sites[key].kind
        tables = [Table(next(found), table.axes) for table in factor.tables]
        if kind == "enumerated":
            tables = [_noisy(table, factor.name, enumeration, noises, generator) for table in tables]
        if kind == "observed":
            tables = [_focused(table, exemplars) for table in tables]
        weights[key] = tuple(table.values for table in tables)
    nothing = torch.zeros((), dtype=torch.float64)
    return Belief(weights, expected_log_q=nothing, surprise=nothing * torch.nan, free_energy=nothing * torch.nan)


def _zeros(table: Table) -> Table:
    """The table's zeros of probability, and one for every other entry."""
    return Table(torch.where(table.values.isneginf(), table.values, 0.0).detach(), table.axes)


def _noisy(
    table: Table,
    name: str,
    enumeration: Enumeration,
    noises: dict[tuple[int, ...], Tensor],
    generator: torch.Generator,
) -> Table:
    """A conditional's weights times noise, the same for tables of one shape: they may be one parameter's."""
    states = [axis for axis in table.axes if axis not in enumeration.plates and axis != name]
    own = (*states, name) if name in table.axes else tuple(states)
    shape = tuple(table.sizes[axis] for axis in own)
    if shape not in noises:
        noises[shape] = torch.randn(shape, generator=generator, dtype=torch.float64).mul(_SPREAD).exp()
    noise = Table(noises[shape].to(table.values), own)
    axes = tuple(axis for axis in table.axes if axis not in own) + own
    return _reordered(Table(table.aligned(axes) * noise.aligned(axes), axes), table.axes)


def _focused(table: Table, exemplars: Mapping[str, Table]) -> Table:
    """An observation's weights with more on the element that was drawn for a state; the sum stays."""
    gain = torch.ones_like(table.values)
    for axis in table.axes:
        if axis not in exemplars:
            continue
        drawn = exemplars[axis]
        absent = [dim for dim, other in enumerate(drawn.axes) if other not in table.axes]
        values = drawn.values.mean(absent) if absent else drawn.values
        known = Table(values, tuple(other for other in drawn.axes if other in table.axes))
        gain = gain + known.aligned(table.axes).to(gain)
    return Table(table.values * gain, table.axes)


def _reordered(table: Table, axes: tuple[str, ...]) -> Table:
    return Table(table.aligned(axes), axes)


def _exemplars(enumeration: Enumeration, generator: torch.Generator) -> dict[str, Table]:
    """For each latent that data depend on, the extra weight of each of its elements and states."""
    found: dict[str, Table] = {}
    for names in _alike(enumeration):
        variables = [enumeration.variables[name] for name in names]
        plates = [tuple(sorted(variable.plates)) for variable in variables]
        shapes = [tuple(enumeration.plates[plate] for plate in own) for own in plates]
        counts = [prod(shape) for shape in shapes]
        gain = _SHARE / (1 - _SHARE) * sum(counts)
        extra = -torch.rand(sum(counts), variables[0].size, dtype=torch.float64, generator=generator).log() - 1
        extra[_drawn(len(extra), extra.shape[1], generator), torch.arange(extra.shape[1])] += gain
        for name, own, shape, part in zip(names, plates, shapes, extra.split(counts), strict=True):
            found[name] = Table(part.reshape(*shape, part.shape[1]), (*own, name))
    return found


def _drawn(count: int, size: int, generator: torch.Generator) -> Tensor:
    """An element for each state, `(size,)`: different ones as long as there are enough."""
    return torch.randperm(count, generator=generator).repeat(-(-size // count))[:size]


def _alike(enumeration: Enumeration) -> Sequence[list[str]]:
    """The latents that data depend on, those together whose data read the same parameters."""
    origins = Origins(enumeration.parameters)
    read: dict[str, frozenset[str]] = defaultdict(frozenset)
    for key, site in enumeration.sites.items():
        if site.role != "model" or site.kind != "observed":
            continue
        own = origins.of(*tensors_of(site.fn))
        for axis in enumeration.factors[key].axes:
            if axis in enumeration.variables:
                read[axis] |= own
    groups: dict[tuple[int, frozenset[str]], list[str]] = defaultdict(list)
    for name in enumeration.variables:
        if name in read:
            groups[enumeration.variables[name].size, read[name]].append(name)
    return list(groups.values())
