r"""What is summed over the elements of a plate, a portion of them at a time.

    F  =  sum over portions of F(portion)            log p(u)  =  sum over portions of log p(u in the portion)

Where gradients are taken nothing but its number is kept of a portion: the backward pass makes its tables again.

References:
    Chen, Xu, Zhang and Guestrin (2016), Training deep nets with sublinear memory cost.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyro_vfe.engine.elimination import LogNormalizer, log_normalizer
from pyro_vfe.engine.expectation import Expectation
from pyro_vfe.engine.factors import FactorGraph, Table
from pyro_vfe.program.enumeration import Enumeration, Portions

NO_PLATES: frozenset[str] = frozenset()


class HasExpectation(Protocol):
    """A term of F."""

    def expectation(self, keep_plates: frozenset[str] = ..., downstream_of: frozenset[str] = ...) -> Expectation:
        """The expectation of the term under the guide."""


@dataclass(frozen=True, eq=False)
class PortionedParts:
    """A term of F that is the sum of those of the portions; they hold no draws that need the score function."""

    portions: Portions
    """The portions."""

    parts: Callable[[Enumeration], Sequence[HasExpectation]]
    """The parts of a portion's term."""

    def expectation(
        self, keep_plates: frozenset[str] = NO_PLATES, downstream_of: frozenset[str] = NO_PLATES
    ) -> Expectation:
        """The expectation under the guide, as a whole.

        Args:
            keep_plates: None: elements are not kept apart here.
            downstream_of: None.
        """
        assert not keep_plates and not downstream_of, "portions are summed, and have no draws to score"

        def total(start: int, length: int) -> Tensor:
            own = self.parts(self.portions.make(start, length))
            return torch.stack([part.expectation().total for part in own]).sum()

        sums = [_formed_again(total, start, length) for start, length in self.portions.stretches]
        whole = torch.stack(sums).sum()
        return Expectation(Table(whole.new_zeros(()), ()), whole, {})


def normalizer_of(
    run: Enumeration,
    graph_of: Callable[[Enumeration], FactorGraph],
    *,
    keep_plates: frozenset[str] = NO_PLATES,
    max_bytes: float | None = None,
) -> LogNormalizer:
    """Returns the log normaliser of a graph of a run, summed in portions where its tables are made so.

    Args:
        run: Enumerated programs.
        graph_of: The graph, of the run or of a portion of it.
        keep_plates: Plates to report by.
        max_bytes: The most memory that tables may take.

    Raises:
        CostError: The plan would not fit.
        PlateError: A variable outside a kept plate is tied to factors inside it.
    """
    found = [log_normalizer(graph_of(part), keep_plates=keep_plates, max_bytes=max_bytes) for part in run.parts]
    if run.portions is None:
        return found[0]
    inside = put_together([one.inside.values for one in found], run.portions, keep_plates)
    return LogNormalizer(Table(inside, tuple(sorted(keep_plates))), torch.stack([one.outside for one in found]).sum())


def put_together(parts: Sequence[Tensor], portions: Portions, keep_plates: frozenset[str]) -> Tensor:
    """Returns what lies inside the kept plates of all portions: side by side along their plate, or summed over it.

    Args:
        parts: One tensor for each portion, with an axis for each kept plate, sorted by name.
        portions: The portions.
        keep_plates: The plates whose elements are kept apart.
    """
    if portions.plate in keep_plates:
        return torch.cat(list(parts), sorted(keep_plates).index(portions.plate))
    return torch.stack(list(parts)).sum(0)


def _formed_again(total: Callable[[int, int], Tensor], start: int, length: int) -> Tensor:
    """Returns a portion's number, and forms the portion again for its gradient."""
    if not torch.is_grad_enabled():
        return total(start, length)
    result = checkpoint(total, start, length, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(result, Tensor)
    return result
