r"""Marginals as gradients of the log normaliser: one backward pass gives all.

    d log Z / d f(x_s)  =  P(x_s)            for a factor f over the scope s

A scope that no factor has gets a table of zeros, which changes nothing and has the scope's marginal for its gradient.
Without plates and scales the two passes are written out in propagation.py; elsewhere autograd makes the second.

References:
    Darwiche (2003), A differential approach to inference in Bayesian networks.
    Wainwright and Jordan (2008), Graphical models, exponential families, and variational inference, section 3.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyro_vfe.engine.elimination import log_normalizer
from pyro_vfe.engine.execution import reference_tensor
from pyro_vfe.engine.factors import Factor, FactorGraph, Scale, Table
from pyro_vfe.engine.propagation import propagate
from pyro_vfe.errors import ImpossibleDataError, NotFiniteError, VFEError

_FAINT = 1e-30
"""Stands for a scale of zero: below rounding in any sum, and still a conditional distribution to differentiate."""


def marginals(
    graph: FactorGraph, scopes: Iterable[tuple[str, ...]], *, max_bytes: float | None = None
) -> dict[tuple[str, ...], Table]:
    """Returns the joint probabilities of each scope, shape `(*sorted(plates), *scope)`; detached.

    Args:
        graph: The factors.
        scopes: Tuples of variable names; the plates of a scope are those of all its variables together.
        max_bytes: The most memory that intermediate tables may take; half of the free memory by default.

    Raises:
        ImpossibleDataError: The log normaliser is -inf.
        VFEError: A scope names an unknown variable, or one twice.

    References:
        Darwiche (2003), A differential approach to inference in Bayesian networks.
    """
    return log_normalizer_and_marginals(graph, scopes, max_bytes=max_bytes)[1]


def log_normalizer_and_marginals(
    graph: FactorGraph, scopes: Iterable[tuple[str, ...]], *, max_bytes: float | None = None
) -> tuple[Tensor, dict[tuple[str, ...], Table]]:
    """Returns the log normaliser, a scalar in nats, and what `marginals` gives, from the same passes; detached.

    Args:
        graph: The factors.
        scopes: Tuples of variable names; the plates of a scope are those of all its variables together.
        max_bytes: The most memory that intermediate tables may take; half of the free memory by default.

    Raises:
        ImpossibleDataError: The log normaliser is -inf.
        VFEError: A scope names an unknown variable, or one twice.
    """
    wanted = list(dict.fromkeys(scopes))
    for scope in wanted:
        _check_scope(scope, graph)
    found = propagate(graph, wanted, max_bytes=max_bytes)
    if found is None:
        return _by_gradient(graph, wanted, max_bytes)
    tables = (
        Table(probs if len(scope) == 1 else probs.reshape([graph.variables[name].size for name in scope]), scope)
        for scope, probs in zip(wanted, found.probabilities, strict=True)
    )
    return found.log_normalizer, dict(zip(wanted, tables, strict=True))


def evidence(graph: FactorGraph, *, max_bytes: float | None = None) -> Tensor:
    """Returns the log normaliser, a scalar in nats, detached; -inf where nothing is possible.

    Args:
        graph: The factors.
        max_bytes: The most memory that intermediate tables may take; half of the free memory by default.
    """
    found = propagate(graph, (), max_bytes=max_bytes)
    if found is not None:
        return found.log_normalizer
    with torch.no_grad():
        return log_normalizer(_detached(graph), max_bytes=max_bytes).total


def _by_gradient(
    graph: FactorGraph, wanted: Sequence[tuple[str, ...]], max_bytes: float | None
) -> tuple[Tensor, dict[tuple[str, ...], Table]]:
    weighted = _never_zero(_detached(graph))
    probes = [_probe(scope, weighted) for scope in wanted]
    full = weighted.with_factors(*probes)
    log_evidence, gradients = _gradients(full, [probe.table.values for probe in probes], max_bytes)
    tables = (
        _normalised(Table(gradient, probe.table.axes), len(scope))
        for scope, probe, gradient in zip(wanted, probes, gradients, strict=True)
    )
    return log_evidence, dict(zip(wanted, tables, strict=True))


def expected_tables(graph: FactorGraph, *, max_bytes: float | None = None) -> list[Tensor]:
    """Returns the gradient of the log normaliser in each of the graph's tables, shaped like the table; detached.

    This is the probability of each entry, times the scale, summed over the plates whose axes the table lacks; so that
    `(expected * table).sum()` over all tables is the expectation of the exponent. Where a table is -inf the probability
    is zero.

    Raises:
        ImpossibleDataError: The log normaliser is -inf.
    """
    return log_normalizer_and_expected_tables(graph, max_bytes=max_bytes)[1]


def log_normalizer_and_expected_tables(
    graph: FactorGraph, *, max_bytes: float | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Returns the log normaliser, a scalar in nats, and what `expected_tables` gives, from the same passes; detached.

    Args:
        graph: The factors.
        max_bytes: The most memory that intermediate tables may take; half of the free memory by default.

    Raises:
        ImpossibleDataError: The log normaliser is -inf.
    """
    found = propagate(graph, (), own_tables=True, max_bytes=max_bytes)
    if found is not None:
        shapes = (factor.table.values.shape for factor in graph.factors)
        tables = [probs.reshape(shape) for probs, shape in zip(found.probabilities, shapes, strict=True)]
        return found.log_normalizer, tables
    detached = _detached(graph)
    for table in detached.tables:
        table.values.requires_grad_()
    return _gradients(detached, [table.values for table in detached.tables], max_bytes)


def check_possible(log_evidence: Tensor, graph: FactorGraph) -> None:
    """Checks that a log normaliser is finite.

    Raises:
        ImpossibleDataError: It is -inf; the message names the factors that rule every value out, if some do alone.
        NotFiniteError: It is not a number; the message names the factors whose tables are none.
    """
    value = float(log_evidence)
    if value != value or value == torch.inf:
        bad = [f"'{factor.name}'" for factor in graph.factors if not holds_log_probabilities(factor)]
        raise NotFiniteError(
            f"The log normaliser is {'not a number' if value != value else 'infinite'}: the log-probabilities of "
            f"{', '.join(bad[:4]) or 'some sites jointly'} hold NaN or +inf.",
            hint="Look for a parameter that is NaN or at the end of its range, a scale of 0 say.",
        )
    if value == -torch.inf:
        culprits = [f"'{factor.name}'" for factor in graph.factors if _rules_all_out(factor, graph)]
        sites = f"Site {' and '.join(culprits[:4])} has" if culprits else "The sites jointly have"
        raise ImpossibleDataError(
            f"{sites} probability zero whatever the latents, so there is no posterior.",
            hint="Check the data against the supports of the model's distributions.",
        )


def holds_log_probabilities(factor: Factor) -> bool:
    """Returns whether a factor's tables hold neither NaN nor +inf.

    Args:
        factor: The factor.
    """
    return all(bool((table.values < torch.inf).all()) for table in factor.tables)


def _rules_all_out(factor: Factor, graph: FactorGraph) -> bool:
    axes = [n for n, axis in enumerate(factor.table.axes) if axis in graph.variables]
    best = factor.table.values.amax(axes) if axes else factor.table.values
    return bool((best == -torch.inf).any())


def _detached(graph: FactorGraph) -> FactorGraph:
    return graph.with_tables(Table(table.values.detach(), table.axes) for table in graph.tables)


def _never_zero(graph: FactorGraph) -> FactorGraph:
    """Returns the graph with scales of zero made faint, so that an element without weight still has marginals."""
    made: dict[int, Scale] = {}

    def faint(scale: Scale) -> Scale:
        if not isinstance(scale, Table):
            return scale or _FAINT
        if id(scale) not in made:
            made[id(scale)] = Table(scale.values.where(scale.values != 0, _FAINT), scale.axes)
        return made[id(scale)]

    factors = tuple(replace(factor, scale=faint(factor.scale)) for factor in graph.factors)
    variables = {name: replace(variable, scale=faint(variable.scale)) for name, variable in graph.variables.items()}
    return replace(graph, factors=factors, variables=variables)


def _check_scope(scope: tuple[str, ...], graph: FactorGraph) -> None:
    unknown = [name for name in scope if name not in graph.variables]
    if unknown or len(set(scope)) < len(scope):
        raise VFEError(
            f"The scope {scope} names {f'unknown variables {unknown}' if unknown else 'a variable twice'}.",
            hint=f"The variables are {sorted(graph.variables)[:20]}.",
        )


def _probe(scope: tuple[str, ...], graph: FactorGraph) -> Factor:
    """Returns a table of zeros over a scope and its plates, with the scale of its most deeply plated variable."""
    variables = [graph.variables[name] for name in scope]
    plates = frozenset[str]().union(*(variable.plates for variable in variables))
    axes = (*sorted(plates), *scope)
    zeros = reference_tensor(graph).new_zeros([graph.size(axis) for axis in axes]).requires_grad_()
    scale = max(variables, key=lambda variable: len(variable.plates)).scale if variables else 1.0
    return Factor(f"marginal of {scope}", Table(zeros, axes), plates, scale)


def _gradients(graph: FactorGraph, tables: Sequence[Tensor], max_bytes: float | None) -> tuple[Tensor, list[Tensor]]:
    """Returns the log normaliser, detached, and its gradients."""
    with torch.enable_grad():
        log_evidence = log_normalizer(graph, max_bytes=max_bytes).outside
        check_possible(log_evidence.detach(), graph)
        gradients = list(torch.autograd.grad(log_evidence, tables)) if tables else []
    return log_evidence.detach(), gradients


def _normalised(weights: Table, n_variables: int) -> Table:
    """Returns the table divided by its sum over the last axes: removes the scale, and rounding."""
    if not n_variables:
        return Table(torch.ones_like(weights.values), weights.axes)
    total = weights.values.sum(tuple(range(-n_variables, 0)), keepdim=True)
    return Table(weights.values / total, weights.axes)
