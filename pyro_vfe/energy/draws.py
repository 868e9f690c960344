r"""Draws of all discrete latents given the data, and how probable each is.

    v ~ R(v)  =  Q(v_guide | w)  P(v_model | v_guide, w, u)

    log weight  =  log P(v, w, u) - log R(v) q(w)        what an importance sampler corrects a draw by

Where the model's own conditional completes Q, it cancels in the weight.

References:
    Yao, Vehtari, Simpson and Gelman (2018), Yes, but did it work?: evaluating variational inference (the weights).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_vfe.energy.parts import Parts, guide_graph, joint_graph, log_joint, log_q
from pyro_vfe.energy.responsibilities import responsibility_graph
from pyro_vfe.engine.chain_decoding import SAMPLE
from pyro_vfe.engine.decoding import sample
from pyro_vfe.engine.elimination import log_normalizer
from pyro_vfe.engine.factors import Factor, FactorGraph, Table
from pyro_vfe.engine.lookup import read, read_factor
from pyro_vfe.engine.scales import applied
from pyro_vfe.engine.structure import previous
from pyro_vfe.errors import StructureError
from pyro_vfe.program.enumeration import Enumeration


@dataclass(frozen=True, eq=False)
class Draws:
    """Draws of the discrete latents of a model, and of one w."""

    indices: Mapping[str, Table]
    """The index of each latent's value in its support, int64, over `SAMPLE` and the latent's plates."""
    log_joint: Tensor
    """log P(v, w, u) of each draw, shape `(draws,)`, in nats."""
    log_q: Tensor
    """log R(v) q(w) of each draw, shape `(draws,)`, in nats."""


def draws_of(run: Enumeration, num_draws: int, max_bytes: float | None = None) -> Draws:
    """Returns joint draws of all discrete latents, from the guide and, where it says nothing, from the posterior.

    Args:
        run: Enumerated programs, in float64.
        num_draws: How many.
        max_bytes: The most memory that tables may take.

    Raises:
        ImpossibleDataError: The data have probability zero.
    """
    indices = _indices(run, num_draws, max_bytes)
    log_p = log_prob_at(run, joint_graph(run).factors, indices, num_draws)
    known = {name: table for name, table in indices.items() if name in run.guided or name in run.draws}
    log_r = _log_marginal(log_q(run, max_bytes), guide_graph(run), run, known, num_draws, max_bytes)
    rest = log_p - _log_marginal(log_joint(run, max_bytes), joint_graph(run), run, known, num_draws, max_bytes)
    return Draws(indices, log_p, log_r + torch.where(rest.isnan(), 0.0, rest))


def _indices(run: Enumeration, num_draws: int, max_bytes: float | None) -> dict[str, Table]:
    try:
        return sample(responsibility_graph(run), num_draws, max_bytes=max_bytes)
    except StructureError:
        return _one_after_the_other(run, num_draws, max_bytes)


def _one_after_the_other(run: Enumeration, num_draws: int, max_bytes: float | None) -> dict[str, Table]:
    """Draws of the guide's latents, and of the model's own given each: where no graph holds both."""
    drawn = sample(guide_graph(run), num_draws, max_bytes=max_bytes)
    known = {name: table for name, table in drawn.items() if name in run.guided or name in run.draws}
    rest = [sample(_given(joint_graph(run), known, i), 1, max_bytes=max_bytes) for i in range(num_draws)]
    own = {name: Table(torch.cat([one[name].values for one in rest]), rest[0][name].axes) for name in rest[0]}
    return {**drawn, **own}


def _log_marginal(
    parts: Parts,
    graph: FactorGraph,
    run: Enumeration,
    known: Mapping[str, Table],
    num_draws: int,
    max_bytes: float | None,
) -> Tensor:
    """The log of a graph with all but some latents summed out, at draws of these."""
    if parts.graph.variables.keys() <= run.variables.keys():
        return log_prob_at(run, parts.costs, known, num_draws)
    sums = [log_normalizer(_given(graph, known, i), max_bytes=max_bytes).total for i in range(num_draws)]
    return torch.stack(sums)


def _given(graph: FactorGraph, known: Mapping[str, Table], draw: int) -> FactorGraph:
    """The graph with some variables at their values of one draw."""
    assignment = {name: table.selected(SAMPLE, draw) for name, table in known.items()}

    def at(table: Table) -> Table:
        if assignment.keys().isdisjoint(table.axes):
            return table
        around = [axis for name in table.axes if name in assignment for axis in assignment[name].axes]
        axes = tuple(dict.fromkeys((*(axis for axis in table.axes if axis not in assignment), *around)))
        return Table(read(table, assignment, axes), axes)

    factors = tuple(factor.mapped(at) for factor in graph.factors)
    return replace(graph, factors=factors, variables={n: v for n, v in graph.variables.items() if n not in assignment})


def log_prob_at(run: Enumeration, factors: Sequence[Factor], indices: Mapping[str, Table], num_draws: int) -> Tensor:
    """Returns the sum of log factors at each of some assignments, shape `(draws,)`, in nats.

    Args:
        run: Whose factors they are.
        factors: What to read.
        indices: Indices of values, over `SAMPLE` or the same for all draws, and over plates.
        num_draws: The number of assignments.
    """
    total = torch.zeros(num_draws, dtype=torch.float64)
    for factor in factors:
        axes = (SAMPLE, *sorted(factor.plates))
        values = read_factor(applied(factor), indices, axes, _time(run, factor))
        shape = [values.shape[0], *(run.plates[plate] for plate in axes[1:])]
        total = total.to(values) + values.expand(shape).reshape(shape[0], -1).sum(-1)
    return total


def _time(run: Enumeration, factor: Factor) -> str | None:
    """The plate along which a factor reads a chain."""
    if factor.first is None:
        return None
    plates = (variable.chain for name, variable in run.variables.items() if previous(name) in factor.table.axes)
    return next((plate for plate in plates if plate is not None), run.chain_plate(factor.name))
