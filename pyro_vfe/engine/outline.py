"""All that an elimination will do, before any table is made: sweeps along chains, then a plan for the rest.

Names and sizes alone; prints as a table with flops and bytes.
"""

from dataclasses import dataclass

from pyro_vfe.engine.chain_groups import ChainGroup, chain_groups
from pyro_vfe.engine.ordering import Largest, Plan, aligned_rows, listed, plan
from pyro_vfe.engine.repeats import Loop, find_loop, rolled_structure
from pyro_vfe.engine.structure import FactorShape, Structure

NO_NAMES: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Outline:
    """The sweeps and the plan of an elimination, and what they cost."""

    sweeps: tuple[ChainGroup, ...]
    """Chains, loops of the program among them, each summed by one sweep."""

    plan: Plan
    """How what is left is summed."""

    loop: Loop | None
    """The loop of the program that became a chain."""

    @property
    def variables(self) -> tuple[str, ...]:
        """All variables that are summed; those of sweeps first."""
        strands = {strand.name: strand.variables for strand in self.loop.strands} if self.loop else {}
        swept = (name for sweep in self.sweeps for name in (*sweep.states, *sweep.local))
        return (*(name for one in swept for name in strands.get(one, (one,))), *self.plan.variables)

    @property
    def flops(self) -> int:
        """Multiply-adds of sweeps and contractions."""
        return self.plan.flops + sum(sweep.flops for sweep in self.sweeps)

    @property
    def bytes(self) -> int:
        """Memory of all tables, in float64."""
        return self.plan.bytes + 8 * sum(sweep.entries for sweep in self.sweeps)

    @property
    def largest(self) -> Largest:
        """The largest table."""
        return max((self.plan.largest, *(s.largest for s in self.sweeps)), key=lambda table: table.entries)

    def __str__(self) -> str:
        rows = [_row(sweep) for sweep in self.sweeps]
        parts = [aligned_rows([_HEADER, *rows])] if rows else []
        if self.plan.steps or not rows:
            parts.append(str(self.plan))
        return "\n\n".join(parts)


_HEADER = ("sweep along", "states", "steps", "sequences", "flops", "bytes")


def _row(sweep: ChainGroup) -> tuple[str, ...]:
    states = f"{listed(sweep.states)} ({sweep.n_states})"
    numbers = (sweep.steps, sweep.n_sequences, sweep.flops, 8 * sweep.entries)
    return sweep.plate, states, *(f"{number:,}" for number in numbers)


def outline(structure: Structure) -> Outline:
    """Returns how the graph's variables would all be summed.

    Args:
        structure: The graph; where a loop's tables may be one for all steps, it takes them for different ones.

    Raises:
        PlateError: A chain is tied to something inside its plate that cannot be summed with it.
    """
    loop = find_loop(structure, NO_NAMES)
    if loop is not None:
        structure = rolled_structure(structure, loop)
    sweeps = chain_groups(structure, NO_NAMES, NO_NAMES)
    for sweep in sweeps:
        structure = _without(structure, sweep)
    gone = {position for sweep in sweeps for position in sweep.factors}
    left = [factor for position, factor in enumerate(structure.factors) if position not in gone]
    return Outline(sweeps, plan(structure._replace(factors=tuple(left)), NO_NAMES, NO_NAMES), loop)


def _without(structure: Structure, sweep: ChainGroup) -> Structure:
    """The structure with the result of a sweep added and its variables gone; the positions of factors stay."""
    result = FactorShape(f"sum over {listed(sweep.states)}", sweep.batch, sweep.plates - {sweep.plate})
    variables = tuple(v for v in structure.variables if v.name not in sweep.summed)
    return structure._replace(factors=(*structure.factors, result), variables=variables)
