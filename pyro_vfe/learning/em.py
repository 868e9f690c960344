r"""Expectation maximisation for any program with discrete latents.

    E-phase    Q  <-  argmin_Q F(Q, G)        M-phase    G  <-  argmin_G F(Q, G)        F  =  surprise + gap

References:
    Dempster, Laird and Rubin (1977), Maximum likelihood from incomplete data via the EM algorithm.
    Neal and Hinton (1998), A view of the EM algorithm that justifies incremental, sparse, and other variants.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pyro.optim import PyroOptim

from pyro_vfe.errors import VFEWarning, callers_level
from pyro_vfe.learning.alike import alike_states
from pyro_vfe.learning.batch_checks import check_options
from pyro_vfe.learning.batch_loop import BatchLoop
from pyro_vfe.learning.batch_run import BatchRun, batch_run
from pyro_vfe.learning.batches import check_batches
from pyro_vfe.learning.closed_form import ClosedForm
from pyro_vfe.learning.coordinate import Coordinate, mean_fields
from pyro_vfe.learning.e_phases import Exact
from pyro_vfe.learning.em_checks import (
    check_accelerable,
    check_e_phase,
    check_floor,
    check_learned,
    check_phases,
    check_programs,
    check_run_options,
    first_enumeration,
)
from pyro_vfe.learning.em_loop import (
    Loop,
    State,
    e_step,
    m_step,
    row_after_m_step,
    row_of,
    words_of,
)
from pyro_vfe.learning.em_report import Callback, Report
from pyro_vfe.learning.em_run import EMRun, PhaseResult
from pyro_vfe.learning.em_starts import Starts, run_of
from pyro_vfe.learning.gradient import Gradient
from pyro_vfe.learning.guided import surprise_of
from pyro_vfe.learning.history import Row
from pyro_vfe.learning.minibatch import BatchMethod, Incremental
from pyro_vfe.learning.pair import Pair
from pyro_vfe.learning.phases import EPhase, MPhase
from pyro_vfe.learning.rounding import Rounding, resolution
from pyro_vfe.learning.squarem import Squarem
from pyro_vfe.learning.start import Start
from pyro_vfe.program.data import number_of_data
from pyro_vfe.program.entry_points import entry_point, same_argument
from pyro_vfe.program.enumeration import Enumeration
from pyro_vfe.program.given import given_guide
from pyro_vfe.program.layout import Program
from pyro_vfe.program.parameters import Parameters, restored_on_error, snapshot
from pyro_vfe.program.programs import Check, Programs

Acceleration = Literal["squarem"]

_LEARNING_RATE = 0.05
"""Of Adam, whose steps are about that long in each logit of a guide."""

_NUM_STEPS = 20
"""Together they can cross one unit of a logit in an E-phase."""


class EM:
    """Expectation maximisation: the guide is fitted with the model held, the model with the guide held, in turn.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from torch.distributions import constraints
        >>> pyro.clear_param_store()
        >>> def model(u):
        ...     rates = pyro.param("rates", torch.tensor([1.0, 9.0]), constraint=constraints.positive)
        ...     with pyro.plate("data", len(u)):
        ...         v = pyro.sample("v", dist.Categorical(torch.ones(2) / 2))
        ...         pyro.sample("u", dist.Poisson(rates[v]), obs=u)
        >>> run = EM(model).run(torch.tensor([2.0, 0.0, 1.0, 12.0, 8.0, 13.0]), progress_bar=False)
        >>> run.converged
        True
        >>> [round(rate, 3) for rate in run.params["rates"].tolist()]
        [0.998, 10.982]

    References:
        Dempster, Laird and Rubin (1977), Maximum likelihood from incomplete data via the EM algorithm.
        Neal and Hinton (1998), A view of the EM algorithm that justifies incremental, sparse, and other variants.
    """

    @entry_point()
    def __init__(
        self,
        model: Program,
        guide: Program | None = None,
        *,
        e_phase: EPhase | None = None,
        m_phase: MPhase | None = None,
        fixed: Iterable[str] = (),
        floor: Mapping[str, float] | float | None = None,
        check: Check = "first",
        max_bytes: float | None = None,
    ) -> None:
        """Args:
        model: The generative model; what it makes by pyro.param, or as a PyroModule, is learned.
        guide: Q; without one it is the exact posterior. A guide's point estimates (AutoDelta) are learned too: MAP.
        e_phase: How Q is chosen. By default `Exact()` where the guide has no discrete latents, `Coordinate()` for
            `AutoMeanField`, for other guides `Gradient` with 20 steps of Adam at a learning rate of 0.05.
        m_phase: How parameters are chosen; by default `ClosedForm()`, which searches where there is no closed form.
        fixed: Names of parameters that no phase may change.
        floor: The least value of a scale, variance, rate or probability, for all parameters or by name. Entries that
            start at exactly 0 stay there.
        check: When enumerated tables are compared with ordinary runs: at the first call, always, or never.
        max_bytes: The most memory that tables may take; half of what is free by default.

        Raises:
            VFEError: A program cannot be called, or a floor is no positive number.
        """
        own_guide = given_guide(model, guide)
        self.model = model
        self.guide = guide
        self._chosen_e_phase = e_phase
        self._m_phase = ClosedForm() if m_phase is None else m_phase
        check_phases(e_phase, self._m_phase)
        check_floor(floor)
        self._fixed = frozenset((fixed,) if isinstance(fixed, str) else fixed)
        self._floor = floor
        self._max_bytes = max_bytes
        self._programs = Programs(check=check, max_bytes=max_bytes, pin_masked=True, needs_data=True)
        self._parameters = Parameters()
        self._watched_model = self._parameters.watched(model, "model")
        self._watched_guide = self._parameters.watched(own_guide, "guide")
        self._default_e_phase: EPhase | None = None
        self._last: _Last | None = None
        self._m_phases = 0

    @entry_point(learns=True, names=True)
    def run(
        self,
        *args: Any,
        max_iter: int = 500,
        tol: float = 1e-8,
        n_init: int = 1,
        progress_bar: bool = True,
        callback: Callback | None = None,
        seed: int = 0,
        acceleration: Acceleration | None = None,
        params: Mapping[str, Any] | None = None,
        fresh: bool = False,
        **kwargs: Any,
    ) -> EMRun:
        """Returns the end of E, M, E, M, ..., E and the way there; the parameters in Pyro's store are those of the end.

        Args:
            *args: The programs' arguments: the data.
            max_iter: The most iterations: M-phases, each with an E-phase after it.
            tol: Converged is a run whose last iteration changed F by no more than this, in nats per datum, or did not
                lower it any more, within what rounding explains.
            n_init: The number of starts: the parameters as they are, then random ones. The best end is kept.
            progress_bar: Whether to show one.
            callback: Called after each phase with its number and a dict of F, surprise, gap (total, in nats), phase,
                iteration and start; where it returns True the start ends with the E-phase.
            seed: Of the random starts, which leave the global random state alone; `MonteCarlo` draws from that.
            acceleration: "squarem" for jumps along the path, which are taken where F falls. A jump and its E-phase are
                one row of the history, 'jump', in the place of those of the M-phase and the E-phase.
            params: Values of parameters by name to start from, such as `run.params` of another run, in place of those
                in Pyro's store; parameters that it lacks start from the programs' own values.
            fresh: Whether all parameters that the programs read start from the programs' own values, not from Pyro's
                store. What a module holds (a `PyroModule`, a guide that has been called) is its own value. With either
                option an error leaves the store as it was before the run.
            **kwargs: The programs' keyword arguments.

        Raises:
            VFEError: The programs are not for EM, or a phase failed; the parameters are those before the failed step.

        References:
            Varadhan and Roland (2008), Simple and globally convergent methods for accelerating the convergence of any
            EM algorithm.
        """
        check_run_options(max_iter, tol, n_init, acceleration)
        self._forget()
        origin = Start(params, fresh)
        with origin.undone_on_error():
            with origin.first():
                pair, first = self._looked_at(args, kwargs)
            e_phase = self._e_phase_for(first)
            if acceleration is not None:
                check_accelerable(e_phase)
            rounding, num_data = Rounding(pair, resolution(first)), number_of_data(first)

            def new_loop(start: int) -> Loop:
                watch = report.of(start)
                jumps = None if acceleration is None else Squarem()
                return Loop(pair, e_phase, self._m_phase, tol, max_iter, rounding, num_data, watch, jumps)

            with Report(max_iter, n_init, progress_bar, callback) as report:
                starts = Starts(pair, new_loop)
                end = starts.run(n_init, int(seed))
            alike = alike_states(end.state.enumeration)
            alike, gain = starts.told_apart(alike, int(seed)) if alike and end.loop.converged else (alike, None)
        if not end.loop.converged and not end.loop.stopped:
            warnings.warn(end.not_converged(max_iter, tol), VFEWarning, stacklevel=callers_level())
        return run_of(end, starts, pair, e_phase, origin, alike, gain)

    @entry_point(learns=True, names=True)
    def run_batches(
        self,
        batches: Iterable[Any],
        *,
        method: BatchMethod | None = None,
        num_epochs: int = 100,
        tol: float = 1e-8,
        num_data: int | None = None,
        progress_bar: bool = True,
        callback: Callback | None = None,
        params: Mapping[str, Any] | None = None,
        fresh: bool = False,
    ) -> BatchRun:
        """Returns the end of EM that sees one batch of data at a time; the parameters in Pyro's store are those of it.

        The model's data plate is either as long as the batch, `pyro.plate("data", len(u))`, or a subsample of all data,
        `pyro.plate("data", num_data, subsample=indices)`. Both lead to the same parameters. Memory does not grow with
        the data.

        Args:
            batches: What is iterated over once per epoch, and once more at the end: a list, a torch DataLoader. Each
                item is a tensor (the only argument), a tuple or list of arguments, or a mapping of keyword arguments.
            method: By default `Incremental()`: it needs no step size, never raises F, and ends where EM with all data
                does; its batches are the same in every epoch. `Online()` for shuffled batches and streams.
            num_epochs: The most passes over the batches. An iterator can be passed over once only.
            tol: Converged is a run whose last two epochs each changed F, summed over the batches as they were visited,
                by no more than this, in nats per datum, or by no more than rounding explains.
            num_data: The number of elements of the data plate in all batches. `Online` needs it where the model has
                priors and the plate is as long as the batch.
            progress_bar: Whether to show one.
            callback: Called after each batch and each epoch, as in `run`; phase is 'batch' (F of its data alone, each
                counted once) or 'epoch', iteration the number of the epoch. Where it returns True the run ends.
            params: Values of parameters to start from, as in `run`.
            fresh: Whether to start from the programs' own values, as in `run`.

        Raises:
            VFEError: The programs are not for EM on batches, or a phase failed; the parameters are those before the
                failing batch.

        References:
            Neal and Hinton (1998), A view of the EM algorithm that justifies incremental, sparse, and other variants.
            Cappe and Moulines (2009), On-line expectation-maximization algorithm for latent data models.
        """

        def look(pair: Pair) -> tuple[Enumeration, EPhase]:
            with origin.first():
                first = first_enumeration(pair)
            check_programs(pair, first, whole=False)
            return first, self._e_phase_for(first)

        chosen = Incremental() if method is None else method
        check_options(self._m_phase, chosen, num_epochs, tol, num_data)
        self._forget()
        origin = Start(params, fresh)
        again = check_batches(batches, num_epochs)
        with origin.undone_on_error(), Report(num_epochs, 1, progress_bar, callback) as report:
            loop = BatchLoop(self._pair, look, chosen, tol, num_data, report.of(0))
            loop.run(batches, num_epochs)
            if again:
                loop.look_once_more(batches)
        return batch_run(loop, again, origin)

    @entry_point(learns=True, names=True)
    def e_phase(self, *args: Any, **kwargs: Any) -> PhaseResult:
        """Does a single E-phase and returns where it led.

        Args:
            *args: The programs' arguments: the data.
            **kwargs: The programs' keyword arguments.
        """
        last = self._at(args, kwargs)
        last.state = e_step(last.pair, last.e_phase, self._m_phases)
        row = row_of(last.state.belief, self._m_phases, "E")
        return _result(row, dict.fromkeys(last.pair.recognition, words_of(last.e_phase)))

    @entry_point(learns=True, names=True)
    def m_phase(self, *args: Any, **kwargs: Any) -> PhaseResult:
        """Does a single M-phase and returns where it led.

        Q is that of the last `e_phase` on the same arguments (the same objects), if no run came after it; otherwise it
        is what the E-phase makes of the present parameters, the guide's parameters left as they are.

        Args:
            *args: The programs' arguments: the data.
            **kwargs: The programs' keyword arguments.
        """
        last = self._at(args, kwargs)
        pair, belief = last.pair, None if last.state is None else last.state.belief
        check_learned(pair)
        before = pair.enumerate()
        if belief is None:
            belief = last.e_phase.belief(before, self._m_phases, self._max_bytes)
        state = State(self._m_phases, before, belief, snapshot(pair.parameters.readers))
        notes: list[str] = []
        updates = m_step(pair, self._m_phase, state, notes)
        with restored_on_error(state.parameters):
            after = pair.enumerate()
            row = row_after_m_step(belief, after, surprise_of(after, self._max_bytes), self._m_phases + 1)
        self._m_phases += 1
        last.state = replace(state, iteration=self._m_phases, enumeration=after)
        return _result(row, updates, tuple(notes))

    def _forget(self) -> None:
        """Forgets the data of single phases, and what the programs read at others."""
        self._last = None
        self._parameters.readers.clear()

    def _pair(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Pair:
        return Pair(
            self._watched_model,
            self._watched_guide,
            args,
            kwargs,
            self._programs,
            self._parameters,
            self._fixed,
            self._floor,
            self._max_bytes,
        )

    def _looked_at(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, learns: bool = True
    ) -> tuple[Pair, Enumeration]:
        """The programs at these data, and what EM found when it first looked at them."""
        pair = self._pair(args, kwargs)
        first = first_enumeration(pair)
        check_programs(pair, first, learns=learns)
        return pair, first

    def _at(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "_Last":
        """What is known of the programs at these data; looked at anew where the data are others than last."""
        if self._last is None or not self._last.is_for(args, kwargs):
            pair, first = self._looked_at(args, kwargs, learns=False)
            self._last = _Last(pair, self._e_phase_for(first))
        return self._last

    def _e_phase_for(self, enumeration: Enumeration) -> EPhase:
        if self._chosen_e_phase is not None:
            check_e_phase(self._chosen_e_phase, enumeration)
            return self._chosen_e_phase
        if not enumeration.guide_latents:
            return Exact()
        if self._default_e_phase is None:
            self._default_e_phase = Coordinate() if any(mean_fields(self.guide)) else _steps_of_adam()
        return self._default_e_phase


@dataclass(eq=False)
class _Last:
    """The data of the last single phase, and what it left."""

    pair: Pair
    e_phase: EPhase
    state: State | None = None

    def is_for(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether these are the same objects."""
        if len(args) != len(self.pair.args) or kwargs.keys() != self.pair.kwargs.keys():
            return False
        same = [same_argument(ours, theirs) for ours, theirs in zip(self.pair.args, args, strict=True)]
        return all(same) and all(same_argument(self.pair.kwargs[name], value) for name, value in kwargs.items())


def _steps_of_adam() -> Gradient:
    return Gradient(PyroOptim(torch.optim.Adam, {"lr": _LEARNING_RATE}), _NUM_STEPS)


def _result(row: Row, updates: Mapping[str, str], notes: tuple[str, ...] = ()) -> PhaseResult:
    return PhaseResult(row.phase, row.free_energy, row.surprise, row.gap, updates, notes)
