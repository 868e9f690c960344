r"""Latents that are not always there: some branch of the model lacks them, or a mask removes them.

    P(x = k, x is there)  =  sum_d P(x = k, d) [x is there | d]            sums to P(x is there) over k

d are the latents that decide it: those that the model branches on, and those that a mask reads.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from pyro_vfe.engine.factors import Factor, FactorGraph, Table
from pyro_vfe.engine.inference import marginals
from pyro_vfe.engine.lookup import read
from pyro_vfe.errors import VFEError
from pyro_vfe.program.enumeration import Enumeration
from pyro_vfe.program.path_axis import PATH

Scope = tuple[str, ...]


class Assignment(dict[str, Tensor]):
    """Values of all latents by site name, as a dict, of one joint assignment or of many draws; and which are there.

    Where a latent is not there, in a branch of the model that lacks it, it has its first value, which means nothing.
    """

    def __init__(self, values: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> None:
        """Args:
        values: By site name.
        there: Whether each latent is there: booleans, of the values' shapes without event dims.
        """
        super().__init__(values)
        self._there = there

    def present(self, name: str) -> Tensor:
        """Returns whether a latent is there: booleans, shape `(num_samples, *batch_shape)`, or `(*batch_shape)` of one.

        Args:
            name: The latent's site.

        Raises:
            VFEError: The name is unknown.
        """
        if name not in self._there:
            known = ", ".join(f"'{site}'" for site in self._there)
            raise VFEError(f"'{name}' is no discrete latent of the model.", hint=f"Its latents are: {known}.")
        return self._there[name]


def marginals_where_present(
    run: Enumeration, graph: FactorGraph, scopes: Iterable[Scope], max_bytes: float | None = None
) -> dict[Scope, Table]:
    """Returns the probabilities of each scope's values and that its latents are there, over plates and the scope.

    Args:
        run: Which latents are not always there.
        graph: Of the joint distribution.
        scopes: Tuples of latents.
        max_bytes: The most memory that tables may take.

    Raises:
        ImpossibleDataError: The data have probability zero.
    """
    wide = {scope: (*_deciders(run, scope), *scope) for scope in scopes}
    found = marginals(graph, wide.values(), max_bytes=max_bytes)
    return {scope: _where_present(found[own], run, scope) for scope, own in wide.items()}


def _deciders(run: Enumeration, scope: Scope) -> Scope:
    """The latents outside of a scope that decide whether those in it are there."""
    axes = (axis for name in scope for axis in _presence(run, name).axes)
    return tuple(dict.fromkeys(axis for axis in axes if (axis in run.supports or axis == PATH) and axis not in scope))


def _where_present(probabilities: Table, run: Enumeration, scope: Scope) -> Table:
    values, axes = probabilities.values, probabilities.axes
    for name in scope:
        if ("model", name) in run.presence:
            values = values * _presence(run, name).aligned(axes)
    summed = _deciders(run, scope)
    rest = tuple(axis for axis in axes if axis not in summed)
    return Table(values.sum([axes.index(name) for name in summed]) if summed else values, rest)


def given_present(run: Enumeration, graph: FactorGraph, name: str) -> FactorGraph:
    """Returns the graph of the joint distribution given that a latent is there.

    Args:
        run: Which latents are not always there.
        graph: Of the joint distribution.
        name: The latent.
    """
    if ("model", name) not in run.presence:
        return graph
    own, table = run.factors["model", name], _presence(run, name)
    log_table = own.table.values.new_zeros(table.values.shape).masked_fill(~table.values, -torch.inf)
    return graph.with_factors(Factor(f"presence of {name}", Table(log_table, table.axes), own.plates, own.scale))


def present_at(run: Enumeration, name: str, indices: Mapping[str, Table], axes: Scope) -> Table:
    """Returns whether a latent is there at some values of the latents: booleans over axes, of size 1 where all agree.

    Args:
        run: Which latents are not always there.
        name: The latent.
        indices: The index of each latent's value in its support.
        axes: What the indices are over: the latent's plates, and draws where there are some.
    """
    return Table(read(_presence(run, name), indices, axes), axes)


def _presence(run: Enumeration, name: str) -> Table:
    known = run.presence.get(("model", name))
    always = run.factors["model", name].table.values.new_ones((), dtype=torch.bool)
    return Table(always, ()) if known is None else known
