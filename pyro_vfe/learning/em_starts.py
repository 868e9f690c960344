"""EM from several starts, of which the best end is kept."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite, nan

import torch
from torch import Tensor

from pyro_vfe.errors import VFEError
from pyro_vfe.learning.alike import WORTH, Alike, alike_states, verdict, worth_saying
from pyro_vfe.learning.em_loop import Loop, State, m_step, params_and_updates
from pyro_vfe.learning.em_run import EMRun, Restart
from pyro_vfe.learning.history import History
from pyro_vfe.learning.pair import Pair
from pyro_vfe.learning.phases import EPhase
from pyro_vfe.learning.restarts import random_belief
from pyro_vfe.learning.start import Start
from pyro_vfe.program.parameters import restore, snapshot
from pyro_vfe.program.randomness import undisturbed_randomness

_TRIES, _LOOKED = 3, 50
"""So many random starts, of so many iterations, are a look at what lies elsewhere."""


@dataclass(frozen=True, eq=False)
class End:
    """Where one start led."""

    loop: Loop
    state: State

    def not_converged(self, max_iter: int, tol: float) -> str:
        """What is said of an end that came too early.

        Args:
            max_iter: The most iterations.
            tol: The tolerance.
        """
        per_datum = self.loop.last_decrease / self.loop.num_data
        moved = "lowered" if per_datum > 0 else "raised"
        last = f"its last iteration {moved} F by {abs(per_datum):.3g} nats per datum, more than tol={tol:g}"
        return (
            f"EM stopped at max_iter={max_iter} before it had converged{': ' + last if max_iter else ''}. Pass a "
            "larger max_iter (or call run again: it goes on from here), a larger tol, or acceleration='squarem'."
        )


@dataclass(eq=False)
class Starts:
    """Runs a loop from the parameters as they are, and from random ones."""

    pair: Pair
    new_loop: Callable[[int], Loop]
    """Makes the loop of a start, by its number."""
    restarts: list[Restart] = field(default_factory=list)
    best: End | None = None

    def run(self, n_init: int, seed: int) -> End:
        """Returns the end with the least F; the parameters are those of it.

        Args:
            n_init: The number of starts; the first takes the parameters as they are.
            seed: Of the random starts.

        Raises:
            VFEError: Every start failed; the error is the last one's.
        """
        generator = torch.Generator().manual_seed(seed)
        initial = snapshot(self.pair.parameters.readers)
        with self._best_kept():
            for start in range(n_init):
                try:
                    self._run_one(start, generator, initial)
                except VFEError as error:
                    self.restarts.append(Restart(start, nan, 0, False, str(error)))
                    if self.best is None and start == n_init - 1:
                        raise
        assert self.best is not None
        return self.best

    def _run_one(self, start: int, generator: torch.Generator, initial: dict[str, Tensor]) -> None:
        loop = self.new_loop(start)
        if start:
            restore(initial)
            loop.e_phase.forget()
            loop.m_phase.forget()
            enumeration = self.pair.enumerate()
            belief = random_belief(enumeration, generator, self.pair.max_bytes)
            m_step(self.pair, loop.m_phase, State(0, enumeration, belief, initial))
        state = loop.run()
        self.restarts.append(Restart(start, state.free_energy, state.iteration, loop.converged))
        # Of ends that the tolerance does not tell apart the first is kept, not the one that rounding favours.
        margin = loop.tol * loop.num_data
        if self.best is None or state.free_energy < self.best.state.free_energy - margin:
            self.best = End(loop, state)

    def told_apart(self, alike: Alike, seed: int) -> tuple[Alike, float | None]:
        """Returns which of the values that are alike at the best end a lower one tells apart, and how much lower it is.

        Where there were no other starts a few are tried: those that more starts would begin with, which stop early.
        Where none is lower all values stay alike; the gain is None where all starts failed.

        Args:
            alike: The values that are alike at the best end.
            seed: Of the random starts.
        """
        assert self.best is not None
        trial = self if len(self.restarts) > 1 else self._tried(seed)
        known = [restart.free_energy for restart in trial.restarts if isfinite(restart.free_energy)]
        if trial is self:
            return alike, self.best.state.free_energy - min(known[1:]) if known[1:] else None
        gain = self.best.state.free_energy - min(known) if known else None
        if gain is None or gain <= WORTH or trial.best is None:
            return alike, gain
        still = alike_states(trial.best.state.enumeration)
        return {name: groups for name, groups in alike.items() if still.get(name) != groups}, gain

    def _tried(self, seed: int) -> "Starts":
        assert self.best is not None
        loop, here = self.best.loop, self.best.state
        generator = torch.Generator().manual_seed(seed)
        trial = Starts(self.pair, lambda _: loop.quietly(_LOOKED))
        with self._best_kept(), undisturbed_randomness(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for start in range(1, 1 + _TRIES):
                try:
                    trial._run_one(start, generator, dict(here.parameters))
                except VFEError:
                    continue
                if trial.best is not None and trial.best.state.free_energy < here.free_energy - WORTH:
                    break
        return trial

    @contextmanager
    def _best_kept(self) -> Iterator[None]:
        """Leaves the parameters at the best end, if there is one, also where the user interrupts."""
        try:
            yield
        finally:
            if self.best is not None:
                restore(self.best.state.parameters)


def run_of(
    end: End, starts: Starts, pair: Pair, e_phase: EPhase, origin: Start, alike: Alike, gain: float | None
) -> EMRun:
    """Returns the result of EM: that of its best start, whose parameters are in the store.

    Args:
        end: The end of the best start.
        starts: All starts.
        pair: The programs.
        e_phase: The E-phase.
        origin: What the first start began with.
        alike: Latents whose values the model does not tell apart.
        gain: What another start would gain, in nats; None where none was tried.
    """
    params, updates = params_and_updates(pair, e_phase, end.loop.updates)
    rises = () if end.loop.rounding.reported is None else (end.loop.rounding.reported,)
    of_alike = [
        f"{fact} {' '.join(verdict(gain))}" for fact in worth_saying(alike, gain, end.state.enumeration).values()
    ]
    stopped = ("stopped by the callback",) if end.loop.stopped else ()
    notes = (*rises, *end.loop.remarks, *of_alike, *stopped, *origin.notes(params))
    return EMRun(
        converged=end.loop.converged,
        n_iter=end.state.iteration,
        history=History(
            tuple(end.loop.rows),
            end.loop.num_data,
            rounding=end.loop.rounding.at(end.state.belief, end.state.enumeration),
            random=() if end.state.belief.sampled is None else ("draws of the E-phase",),
        ),
        params=params,
        updates=updates,
        notes=notes,
        restarts=tuple(starts.restarts),
        enumeration=end.state.enumeration.numbers(),
        belief=end.state.belief,
        max_bytes=pair.max_bytes,
        alike=alike,
        gain_elsewhere=gain,
    )
