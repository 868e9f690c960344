r"""E, M, E, M, ..., E: the loop of EM from one start.

    F(Q_k, G_k)  >=  F(Q_k, G_{k+1})  >=  F(Q_{k+1}, G_{k+1})

F after an M-phase is a dot product of the last weights with the tables that the next E-phase needs anyway.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf

import pyro
from torch import Tensor

from pyro_vfe.errors import NotFiniteError, VFEWarning, callers_level, located
from pyro_vfe.learning.belief import Belief, expected_log_joint
from pyro_vfe.learning.e_phases import Annealed
from pyro_vfe.learning.floors import hold_floors
from pyro_vfe.learning.guided import surprise_of
from pyro_vfe.learning.history import JUMP, START, Row
from pyro_vfe.learning.pair import Pair
from pyro_vfe.learning.phases import EPhase, MPhase, Problem
from pyro_vfe.learning.rounding import Rounding
from pyro_vfe.learning.squarem import Squarem
from pyro_vfe.program.enumeration import Enumeration
from pyro_vfe.program.parameters import restore, restored_on_error, snapshot

_FINE = 1e-10
"""Programs that round less than this tell all changes apart that a tolerance asks for."""

_NO_RISE = 1e-11
"""A relative rise of F that nobody need look into: a search ends so near its minimum, and no nearer."""

_STILL_COOLING = 1e-6
"""A change of inverse temperature from one iteration to the next that is none."""


@dataclass(frozen=True, eq=False)
class State:
    """Q and G after an E-phase."""

    iteration: int
    """The number of M-phases before it."""
    enumeration: Enumeration
    belief: Belief
    parameters: Mapping[str, Tensor]
    """Copies of the unconstrained parameters of both programs."""

    @property
    def free_energy(self) -> float:
        """F in nats."""
        return float(self.belief.free_energy)


def updates_guide(e_phase: EPhase) -> bool:
    """Whether a phase changes the guide's parameters."""
    return type(e_phase).update is not EPhase.update


def words_of(e_phase: EPhase) -> str:
    """What is said of the parameters that an E-phase changes."""
    return f"E-phase: {type(e_phase).__name__}"


def params_and_updates(
    pair: Pair, e_phase: EPhase, updates: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Copies of all parameters that the programs read, constrained, and how each was updated, in words.

    Args:
        pair: The programs, which have run before.
        e_phase: Theirs.
        updates: What M-phases said.
    """
    store = pyro.get_param_store()
    params = {name: store[name].detach().clone() for name in pair.parameters.readers}
    words = dict.fromkeys(params, "held fixed")
    if updates_guide(e_phase):
        words.update(dict.fromkeys(pair.recognition, words_of(e_phase)))
    words.update(dict.fromkeys(pair.learned, "not updated"))
    words.update(updates)
    return params, words


def e_step(pair: Pair, e_phase: EPhase, iteration: int) -> State:
    """Does an E-phase; where an error is raised the parameters are as they were.

    Args:
        pair: The programs, which have run before.
        e_phase: The phase.
        iteration: The number of iterations before this one.
    """
    with restored_on_error(snapshot(pair.parameters.readers)):
        e_phase.update(pair, iteration)
        enumeration = pair.enumerate(advances=True)
        belief = e_phase.belief(enumeration, iteration, pair.max_bytes)
        check_finite(belief)
    return State(iteration, enumeration, belief, snapshot(pair.parameters.readers))


def m_step(pair: Pair, m_phase: MPhase, state: State, notes: list[str] | None = None) -> Mapping[str, str]:
    """Does an M-phase and returns how parameters were updated; where an error is raised they are as they were.

    Args:
        pair: The programs.
        m_phase: The phase.
        state: The factors at the present parameters, and Q.
        notes: Gets what a user should know of the solution.
    """
    problem = Problem(pair, state.enumeration, state.belief, pair.learned, [] if notes is None else notes)
    with restored_on_error(state.parameters):
        words = m_phase.update(problem)
        hold_floors(pair, state.enumeration)
    return words


def row_after_m_step(belief: Belief, enumeration: Enumeration, surprise: Tensor, iteration: int) -> Row:
    """Where an M-phase led: F of the same Q with the new tables.

    Args:
        belief: Q, as the M-phase had it.
        enumeration: The factors at the new parameters.
        surprise: At the new parameters, in nats.
        iteration: The number of M-phases, this one included.
    """
    free_energy = belief.expected_log_q - expected_log_joint(belief.weights, enumeration).detach()
    return Row(iteration, "M", float(free_energy), float(surprise), float(free_energy - surprise))


def row_of(belief: Belief, iteration: int, phase: str) -> Row:
    """Where Q and G stand."""
    gap = float(belief.free_energy - belief.surprise)
    return Row(iteration, phase, float(belief.free_energy), float(belief.surprise), gap)


def check_finite(belief: Belief) -> None:
    """Checks that F is a number.

    Raises:
        NotFiniteError: It is not.
    """
    if not bool(belief.free_energy.isfinite()):
        raise NotFiniteError(
            f"F is {float(belief.free_energy):g} after the E-phase.",
            hint="Look for a parameter at the end of its range: a scale of 0, or an infinite rate.",
        )


@dataclass(eq=False)
class Loop:
    """EM from one start."""

    pair: Pair
    e_phase: EPhase
    m_phase: MPhase
    tol: float
    """The least decrease of F per datum over an iteration, in nats."""
    max_iter: int
    rounding: Rounding
    num_data: int
    on_row: Callable[[Row], bool]
    """Told of each phase; true stops EM after the E-phase."""
    acceleration: Squarem | None = None
    rows: list[Row] = field(default_factory=list)
    updates: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    """What the last M-phase had to say of its solution."""
    converged: bool = False
    stopped: bool = False
    last_decrease: float = float("nan")
    """How much F fell over the last iteration, in nats."""
    _is_calm: bool = False
    """Whether that was within the tolerance."""

    def quietly(self, max_iter: int) -> "Loop":
        """Returns a loop of as many iterations at most that has not run, tells nobody and warns of nothing.

        Args:
            max_iter: The most iterations.
        """
        jumps = None if self.acceleration is None else Squarem()
        rounding = Rounding(self.pair, self.rounding.eps)
        limit = min(max_iter, self.max_iter)
        return Loop(
            self.pair, self.e_phase, self.m_phase, self.tol, limit, rounding, self.num_data, lambda _: False, jumps
        )

    def run(self) -> State:
        """Iterates until F has stopped falling, and returns the end."""
        if updates_guide(self.e_phase):
            self._record(start_row(self.pair, self.e_phase))
        with located("the E-phase of iteration 0"):
            state = e_step(self.pair, self.e_phase, 0)
        if not self.rows:
            self._record(row_of(state.belief, 0, START))
        self._record(row_of(state.belief, 0, "E"))
        while not (self.converged or self.stopped) and state.iteration < self.max_iter:
            after = self._iterated(state)
            self.last_decrease = state.free_energy - after.free_energy
            self.converged = self._settled(after)
            state = after
        return state

    def _iterated(self, state: State) -> State:
        """One M-phase and the E-phase after it, or a jump and the E-phase there."""
        iteration = state.iteration + 1
        with located(f"the M-phase of iteration {iteration}"):
            self.remarks = []
            self.updates.update(m_step(self.pair, self.m_phase, state, notes=self.remarks))
        after = self._jumped(state, snapshot(self.pair.parameters.readers))
        phase = "E" if after is None else JUMP
        if after is None:
            after = self._e_step_after_m_step(state)
            moved = row_after_m_step(state.belief, after.enumeration, after.belief.surprise, iteration)
            self._check_fall("M", self._m_phase_lowers(state), moved.free_energy, after, state)
            self._record(moved)
            self._check_fall("E", self.e_phase.monotone, after.free_energy, after, state)
        self._record(row_of(after.belief, iteration, phase))
        return after

    def _e_step_after_m_step(self, state: State) -> State:
        """The E-phase; parameters that it cannot serve are taken back, those of an interrupted one stay."""
        try:
            with located(f"the E-phase of iteration {state.iteration + 1}"):
                return e_step(self.pair, self.e_phase, state.iteration + 1)
        except Exception:
            restore(state.parameters)
            raise

    def _jumped(self, state: State, plain: Mapping[str, Tensor]) -> State | None:
        """Where an accelerated step leads; None where there is none, or where F would rise."""
        if self.acceleration is None:
            return None
        names = self.pair.learned
        jump = self.acceleration.proposal(
            {name: state.parameters[name] for name in names}, {name: plain[name] for name in names}
        )
        if jump is None:
            return None
        try:
            restore(jump)
            hold_floors(self.pair, state.enumeration)
            after = e_step(self.pair, self.e_phase, state.iteration + 1)
        except ValueError:  # The programs refuse parameters that EM itself would not have come to.
            after = None
        except BaseException:
            restore(plain)
            raise
        if after is not None and after.free_energy <= state.free_energy:
            return after
        restore(plain)
        return None

    def _record(self, row: Row) -> None:
        self.rows.append(row)
        self.stopped = self.on_row(row) or self.stopped

    def _settled(self, state: State) -> bool:
        """Whether the last decrease is within the tolerance, or F stands still but for rounding."""
        if self._is_cooling(state.iteration):
            return False
        was_calm, self._is_calm = self._is_calm, abs(self.last_decrease) <= self.tol * self.num_data
        # After a jump of the acceleration one small change may be chance.
        if self._is_calm and (was_calm or self.acceleration is None):
            return True
        if self.last_decrease > 0 or not (self.e_phase.monotone and self.m_phase.monotone):
            return False
        rise = -self.last_decrease
        coarse = self.rounding.eps > _FINE
        if coarse and not self.rounding.probed and rise <= self.rounding.eps**0.5 * abs(state.free_energy):
            self.rounding.probe(state.belief)
        return self.rounding.includes(rise, state.belief, state.enumeration)

    def _is_cooling(self, iteration: int) -> bool:
        if not isinstance(self.e_phase, Annealed):
            return False
        before, now, later = (self.e_phase.inverse_temperature(i) for i in (iteration - 1, iteration, iteration + 1))
        return max(abs(now - before), abs(later - now)) > _STILL_COOLING

    def _m_phase_lowers(self, state: State) -> bool:
        """Whether the M-phase after a state may not raise F: it sees Q itself, and no start below a floor."""
        above_floor = self.pair.floor is None or state.iteration > 0
        return self.m_phase.monotone and state.belief.sampled is None and above_floor

    def _check_fall(self, phase: str, monotone: bool, free_energy: float, after: State, before: State) -> None:
        """Reports, once, a phase that should not raise F and did so beyond rounding, that of what F was before too."""
        rise = free_energy - self.rows[-1].free_energy
        if not monotone or not rise > _NO_RISE * abs(free_energy) or self.rounding.reported:
            return
        if any(self.rounding.includes(rise, state.belief, state.enumeration) for state in (after, before)):
            return
        if not self.rounding.probed:
            self.rounding.probe(after.belief)
        if self.rounding.includes(rise, after.belief, after.enumeration):
            return
        self.rounding.reported = _rise_in_words(phase, after.iteration, rise, self.rounding)
        warnings.warn(self.rounding.reported, VFEWarning, stacklevel=callers_level())


def start_row(pair: Pair, e_phase: EPhase) -> Row:
    """Where a guide stands before EM; F is infinite where it gives mass to what the model forbids.

    Args:
        pair: The programs.
        e_phase: The phase that knows how to read Q from the guide.
    """
    enumeration = pair.enumerate()
    try:
        return row_of(e_phase.belief(enumeration, 0, pair.max_bytes), 0, START)
    except NotFiniteError:
        return Row(0, START, inf, float(surprise_of(enumeration, pair.max_bytes)), inf)


def _rise_in_words(phase: str, iteration: int, rise: float, rounding: Rounding) -> str:
    fact = (
        f"The {phase}-phase of iteration {iteration} raised F by {rise:.3g} nats, where rounding explains "
        f"{rounding.floor:.1g}: the program is not what EM takes it for."
    )
    if not rounding.repeats:
        return (
            f"{fact} Run twice at the same parameters it gives different log-probabilities: it draws something at "
            "random outside of sample sites, or depends on how often it is called. Let it depend on its arguments, "
            "its parameters and its latents only."
        )
    return (
        f"{fact} Look for a parameter that the program detaches (.item(), .detach(), numpy) or changes itself, and for "
        "data that change from call to call."
    )
