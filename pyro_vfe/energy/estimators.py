r"""Estimates of F whose gradients are unbiased, where the guide draws what it does not enumerate.

    gradient of E[F]  =  E[ sum over draws w of  (cost downstream of w - baseline)  gradient of log q(w)
                            + gradient of F at w ]

The cost downstream of a draw is what reads the draw or what was computed from it, with the enumerated latents summed.
The baseline is the mean of that cost over the other particles.

References:
    Kool, van Hoof and Welling (2019), Buy 4 REINFORCE samples, get a baseline for free (leave-one-out baseline).
    Schulman, Heess, Weber and Abbeel (2015), Gradient estimation using stochastic computation graphs (what is
    downstream).
    Foerster et al. (2018), DiCE: the infinitely differentiable Monte Carlo estimator (draws as variables of one value).
"""

from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from pyro_vfe.energy.parts import Parts, conditionals_of, free_energy_parts
from pyro_vfe.engine.expectation import Expectation
from pyro_vfe.engine.factors import Factor, Table, total
from pyro_vfe.program.enumeration import PARTICLES, Enumeration


def surrogate_loss(runs: Sequence[Enumeration], side_by_side: int = 1, max_bytes: float | None = None) -> Tensor:
    """Returns the mean of F over particles, whose gradient is an unbiased estimate of F's.

    Args:
        runs: One enumeration per run of the programs.
        side_by_side: How many particles each run holds.
        max_bytes: The most memory that intermediate tables may take.
    """
    parts = [free_energy_parts(run, max_bytes) for run in runs]
    scored = [run.draws - run.scores.keys() for run in runs]
    results = [
        [part.expectation(downstream_of=draws) for part in own] for own, draws in zip(parts, scored, strict=True)
    ]
    count = len(runs) * side_by_side
    loss = reduce(torch.add, [result.total for own in results for result in own])
    if count > 1 and scored[0]:
        for baseline, run in zip(_baselines(results, runs, count), runs, strict=True):
            loss = loss - _score_cost(run, baseline)
    return loss / count if count > 1 else loss


def _baselines(
    results: Sequence[Sequence[Expectation]], runs: Sequence[Enumeration], count: int
) -> list[dict[str, Table]]:
    """For each run and draw, the mean downstream cost of the other particles: it does not depend on the draw."""
    downstream = [_summed_downstream(own) for own in results]
    if len(runs) == 1:
        return [{name: _mean_of_others(table, count) for name, table in downstream[0].items()}]
    baselines: list[dict[str, Table]] = []
    for i in range(len(runs)):
        others = [own for j, own in enumerate(downstream) if j != i]
        baselines.append({name: _mean([own[name] for own in others if name in own]) for name in downstream[i]})
    return baselines


def _summed_downstream(results: Sequence[Expectation]) -> dict[str, Table]:
    summed: dict[str, Table] = {}
    for result in results:
        for name, table in result.downstream.items():
            summed[name] = _mean([summed[name], table], 1) if name in summed else table
    return summed


def _mean_of_others(table: Table, count: int) -> Table:
    if PARTICLES not in table.axes:
        return table
    values = table.values
    return Table((values.sum(table.axes.index(PARTICLES), keepdim=True) - values) / (count - 1), table.axes)


def _mean(tables: Sequence[Table], divisor: int | None = None) -> Table:
    if not tables:
        return Table(torch.zeros(()), ())
    summed = total(tables)
    return Table(summed.values / (divisor or len(tables)), summed.axes)


def _score_cost(run: Enumeration, baseline: Mapping[str, Table]) -> Tensor:
    """The expected baseline times the score: zero in value and in expected gradient."""
    conditionals = conditionals_of(run)
    costs = []
    for conditional in conditionals:
        if conditional.name in baseline:
            table, level = conditional.table, baseline[conditional.name]
            axes = tuple(dict.fromkeys((*table.axes, *level.axes)))
            costs.append(
                Factor(conditional.name, Table(table.aligned(axes) * level.aligned(axes), axes), conditional.plates)
            )
    return Parts(run.graph(*conditionals), conditionals, tuple(costs)).expectation().total
