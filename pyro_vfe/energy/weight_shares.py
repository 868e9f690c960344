r"""What draws of a guide are worth, exactly: where their weights can be summed over all that might be drawn.

    share_n  =  E_Q[w_n]^2 / E_Q[w_n^2]  =  ( sum_v P(v, u_n) )^2 / sum_v P(v, u_n)^2 / Q(v | u)        sums over Q's v

K draws are worth K share_n even ones, for large K. The second sum is one elimination of 2 log P - log Q. Draws tell the
same only of what they have met: a mode that the guide hardly ever draws is in neither of their sums.

References:
    Kong (1992), A note on importance sampling using standardized weights.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_vfe.energy.log_weights import weight_of, without_draws
from pyro_vfe.energy.parts import normalized
from pyro_vfe.energy.pointwise import Plates
from pyro_vfe.engine.elimination import eliminate, log_normalizer
from pyro_vfe.engine.factors import Factor, Scale, Table
from pyro_vfe.engine.scales import rescaled
from pyro_vfe.errors import StructureError
from pyro_vfe.program.data import Data
from pyro_vfe.program.enumeration import Enumeration, SiteKey
from pyro_vfe.program.recorder import Role

_BY_DRAWS = "Go by what draws tell."


@dataclass(frozen=True, eq=False)
class WeightShares:
    """Of each datum, as the log weights have them: `(*plates)`, or `(data)` where these are of several kinds."""

    share: Tensor
    """E_Q[w]^2 / E_Q[w^2], between 0 and 1."""
    covered: Tensor
    """The posterior's probability of what the guide can draw at all."""


def weight_shares(run: Enumeration, data: Data, max_bytes: float | None = None) -> WeightShares:
    """Returns what the weights of draws are worth, by sums over all that the guide can draw.

    Args:
        run: Both programs, with all latents of the guide enumerated; point estimates may stand beside them.
        data: What the data are whose weights are independent of each other.
        max_bytes: The most memory that tables may take.

    Raises:
        VFEError: A sum does not fit, or is no sum of weights.
    """
    run = normalized(without_draws(run), torch.float64)
    if any(not run.supports.keys().isdisjoint(table.axes) for table in run.presence.values()):
        raise StructureError("Some values of a latent lack another one.", hint=_BY_DRAWS)
    found = []
    for kind in data.kinds:
        parts = [_of_part(run, part, kind.axes, weight_of(run, part, kind.axes), max_bytes) for part in kind.parts]
        of_kind = parts[0] if kind.axes == kind.plates else torch.stack(parts, -1)
        found.append(of_kind if len(data.kinds) == 1 else of_kind.flatten(1))
    share, covered = torch.cat(found, -1).exp().clamp(max=1.0)
    return WeightShares(share, covered)


def _of_part(
    run: Enumeration, keys: Collection[SiteKey], plates: Plates, weight: Scale, max_bytes: float | None
) -> Tensor:
    """The logs of a datum's share and of what is covered, `(2, *plates)`."""
    log_p, log_q = (_over_shared(run, keys, role, plates, weight, max_bytes) for role in ("model", "guide"))
    allowed = [factor.mapped(_zeros) for factor in log_q]
    squares = [factor.mapped(lambda table: Table(2 * table.values, table.axes)) for factor in log_p]
    over_q = [factor.mapped(_inverse) for factor in log_q]
    first, second, all_of_p = (
        _log_sum(run, factors, plates, max_bytes) for factors in ((*log_p, *allowed), (*squares, *over_q), tuple(log_p))
    )
    return torch.stack([2 * first - second, first - all_of_p])


def _over_shared(
    run: Enumeration, keys: Collection[SiteKey], role: Role, plates: Plates, weight: Scale, max_bytes: float | None
) -> tuple[Factor, ...]:
    """A program's part of a datum over the latents that both have; those of its own are summed out."""
    own = [rescaled(run.factors[key], weight) for key in run.factors if key in keys and key[0] == role]
    factors = [replace(factor, scale=1.0) for factor in own]
    if not factors:
        return ()
    graph = run.graph(*factors)
    graph = replace(graph, variables={name: replace(v, scale=1.0) for name, v in graph.variables.items()})
    summed = graph.variables.keys() - run.guided
    if not summed:
        return tuple(factors)
    kept = frozenset(graph.variables) - summed
    elimination = eliminate(graph, keep=kept, keep_plates=frozenset(plates), max_bytes=max_bytes)
    if elimination.unrollings:
        raise StructureError("Latents of one program alone tie the elements of a plate together.", hint=_BY_DRAWS)
    return elimination.factors


def _log_sum(run: Enumeration, factors: tuple[Factor, ...], plates: Plates, max_bytes: float | None) -> Tensor:
    graph = run.graph(*factors)
    graph = replace(graph, variables={name: replace(v, scale=1.0) for name, v in graph.variables.items()})
    found = log_normalizer(graph, keep_plates=frozenset(plates), max_bytes=max_bytes)
    return found.inside.aligned(plates) if plates else found.outside


def _zeros(table: Table) -> Table:
    """One where the guide has probability, zero elsewhere; logs."""
    return Table(torch.where(table.values.isneginf(), table.values, 0.0), table.axes)


def _inverse(table: Table) -> Table:
    """-log Q; what the guide does not draw is in no sum."""
    return Table(torch.where(table.values.isneginf(), table.values, -table.values), table.axes)
