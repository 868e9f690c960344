"""A pair of programs and what is known of them: laid out once, enumerated at every call.

The layout is kept per pair of programs. Nothing else is: every run labels its own tables, and one that does not fit the
layout has the programs laid out again.
"""

from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from weakref import ref

import pyro
import torch
from torch import Tensor
from torch.nn import Module

from pyro_vfe.engine.factors import Factor
from pyro_vfe.errors import CostError, PlateError, SpotCheckError, VFEError
from pyro_vfe.program.agreement import check_reads
from pyro_vfe.program.broadcasting import cannot_broadcast
from pyro_vfe.program.buffers import Buffers, notice, unchanged_buffers
from pyro_vfe.program.calls import one_call
from pyro_vfe.program.cost import fits_at_once, within_limit
from pyro_vfe.program.counters import Counters
from pyro_vfe.program.enumeration import PARTICLES, Enumeration, SiteKey
from pyro_vfe.program.escapes import StructureChanged
from pyro_vfe.program.failures import explained, unstable
from pyro_vfe.program.identity import Identities, Identity, News
from pyro_vfe.program.impossible_values import enumerated
from pyro_vfe.program.keeping import own_value
from pyro_vfe.program.layout import Layout, Program, lay_out
from pyro_vfe.program.masks import warn_of_priors
from pyro_vfe.program.one_by_one import values_apart, warn_of_runs, with_stars
from pyro_vfe.program.operations import KnownPaths
from pyro_vfe.program.parameters import naming_nan
from pyro_vfe.program.randomness import random_state, set_random_state, undisturbed_randomness
from pyro_vfe.program.recorder import Plate, Recorder, Role
from pyro_vfe.program.runs import enumerate_programs, tables_at
from pyro_vfe.program.sharing import Unshareable
from pyro_vfe.program.single_values import warn_of_single_values
from pyro_vfe.program.singular import other_leaves, singular_tables, with_sound_gradients
from pyro_vfe.program.sizeless import SizelessPlates
from pyro_vfe.program.spot_check import agrees_at_random, spot_check
from pyro_vfe.program.unobserved import warn_of_no_data
from pyro_vfe.program.variation import with_variations

Check = Literal["first", "always", False]

_MAX_PAIRS = 64

_PairKey = tuple[Identity, Identity, bool]
"""The identities of a model and a guide, and whether particles stand side by side."""


@dataclass(frozen=True, eq=False)
class _Pair:
    """What is kept of a pair of programs."""

    layout: Layout
    lost: frozenset[tuple[str, str, str]]
    """Reads without variation that the spot check has found to be right."""
    modules: tuple[Module, ...]
    """Modules that the programs run or reach, and that have buffers which may change."""
    shares: bool
    """Whether equal computations of a run may be done once: the programs write into none of the results."""
    paths: KnownPaths
    """The paths of the programs that were checked."""
    singular: frozenset[SiteKey] | None = None
    """The sites of whose tables the backward pass was not finite; None where that has not been asked."""
    leaves: tuple[ref[Tensor], ...] = ()
    """What the tables were computed from besides parameters that Pyro knows."""


class Programs:
    """Enumerates pairs of programs, remembering how each pair is laid out."""

    def __init__(
        self,
        *,
        check: Check = "first",
        max_bytes: float | None = None,
        min_nesting: int = 0,
        pin_masked: bool = False,
        needs_data: bool = False,
        weighs_data: bool = False,
    ) -> None:
        """Args:
        check: When enumerated tables are compared with ordinary runs: at the first call for a pair and where it does
            something new, at every call, or never.
        max_bytes: The most that one table may take; half of the free memory by default.
        min_nesting: Batch dims to reserve for plates even where the programs use fewer.
        pin_masked: Whether a latent that only the model has does not exist where it is masked (`enumerate_programs`).
        needs_data: Whether to say of a model that it observes nothing.
        weighs_data: Whether each datum's draws have importance weights of their own.
        """
        self.check = check
        self.max_bytes = max_bytes
        self.min_nesting = min_nesting
        self.pin_masked = pin_masked
        self.needs_data = needs_data
        self.weighs_data = weighs_data
        self._pairs: OrderedDict[_PairKey, _Pair] = OrderedDict()
        self._identities, self._news = Identities(), News()

    def __getstate__(self) -> dict[str, Any]:
        """What is known of programs is found again after copying or loading."""
        return {**self.__dict__, "_pairs": OrderedDict(), "_identities": Identities(), "_news": News()}

    def layout(
        self,
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        extra_nesting: int = 0,
        by_index: bool = True,
    ) -> Layout:
        """The layout of a pair, from ordinary runs.

        Raises:
            CostError: A table would not fit.
        """
        with undisturbed_randomness(), unchanged_buffers(model, guide), naming_nan(model, guide):
            nesting = {"extra_nesting": extra_nesting, "min_nesting": self.min_nesting}
            layout = with_stars(lay_out(model, guide, args, kwargs, by_index=by_index, **nesting))
            if not fits_at_once(layout, self.max_bytes):
                layout = with_variations(layout, model, guide, args, kwargs)
        return within_limit(layout, self.max_bytes)

    def enumerate(
        self,
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        given: Mapping[str, Tensor] | None = None,
        subsamples: Mapping[str, Tensor] | None = None,
        particles: int = 1,
        differentiable: bool = True,
    ) -> Enumeration:
        """The factors of both programs at these arguments.

        Args:
            model: The generative model.
            guide: The guide.
            args: Arguments of both.
            kwargs: Keyword arguments of both.
            given: Values of draws to use instead of new ones.
            subsamples: Subsample indices to use instead of new ones.
            particles: How many draws of what is sampled stand side by side in a plate of their own.
            differentiable: Whether the tables carry the graph that the programs made; the distributions always do.

        Raises:
            StructureError: The programs' structure changes from run to run.
            SpotCheckError: The enumerated tables differ from an ordinary run.
        """
        options = given or {}, subsamples or {}, particles, differentiable, self.pin_masked, self.weighs_data
        key = self._identities.of(model), self._identities.of(guide), particles > 1
        call = _Call(key, model, guide, args, kwargs, *options)
        known = self._pairs.get(key)
        state = [] if known is not None and known.singular == frozenset() else random_state()
        with one_call(), call.before:
            notice(() if known is None else known.modules, inside=False)
            return self._with_sound_gradients(call, self._enumerate(call), state)

    def enumerated_layout(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Layout:
        """The layout of a pair, from an enumerated run too: whether the programs broadcast shows there."""
        self.enumerate(model, guide, args, kwargs, differentiable=False)
        return next(reversed(self._pairs.values())).layout

    def look_again(self, model: Program, guide: Program) -> None:
        """Asks anew, at the next run, which tables cannot be differentiated as they are.

        Args:
            model: The generative model.
            guide: The guide.
        """
        own = self._identities.of(model), self._identities.of(guide)
        for key, pair in self._pairs.items():
            if key[:2] == own:
                self._pairs[key] = replace(pair, singular=None)

    def _with_sound_gradients(self, call: "_Call", run: Enumeration, state: list[Tensor]) -> Enumeration:
        """The run with tables that can be differentiated where autograd's derivative is not finite."""
        if not call.differentiable or not torch.is_grad_enabled() or run.portions is not None:
            return run
        pair = self._pairs[call.key]
        if pair.singular is None:  # at the first run that is differentiated
            others = tuple(map(ref, other_leaves(run)))
            pair = self._pairs[call.key] = replace(pair, singular=singular_tables(run), leaves=others)
        if pair.leaves:
            run = replace(run, read=(*run.read, *(leaf for leaf in (one() for one in pair.leaves) if leaf is not None)))
        if not pair.singular or run.draws_tell_of_latents:
            return run
        return with_sound_gradients(run, pair.singular, lambda only: call.tables_at(pair.layout, run, only, state))

    def _enumerate(self, call: "_Call") -> Enumeration:
        known = self._pairs.get(call.key)
        if known is None:
            self._news.new((call.model, call.guide), call.key[:2])
        else:
            self._news.known()
            try:
                enumeration = self._enumerate_again(call, known)
            except Exception:  # The programs do not fit what was known of them, or fail: a new look tells which.
                enumeration = None
            if enumeration is not None:
                known.paths.warn_of_new()
                return enumeration
            del self._pairs[call.key]
            call.before.put_back()
        try:
            return self._enumerate_anew(call)
        except Exception as error:
            explanation = explained(error, call.programs, call.args, call.kwargs)
            if explanation is None:
                raise
            raise explanation from error

    def _enumerate_again(self, call: "_Call", known: _Pair) -> Enumeration | None:
        """A run of known programs, checked where its path is new or its turn has come; None where it does not fit."""
        state = random_state() if known.paths.is_due() or self.check == "always" else []
        enumeration, shares = call.enumeration(known.layout, known.shares)
        if not enumeration.lost <= known.lost:
            return None
        if shares != known.shares:
            self._pairs[call.key] = replace(known, shares=shares)
        self._pairs.move_to_end(call.key)
        is_new = self.check == "first" and not known.paths.has(enumeration)
        if is_new or self.check == "always" or (self.check and state and not call.agrees(known, enumeration, state)):
            known.paths.add(enumeration, call.spot_check(known.layout, enumeration, shares), is_new)
        return enumeration

    def _enumerate_anew(self, call: "_Call") -> Enumeration:
        counters = Counters(call.model, call.guide)
        layout = self._layout_of(call)
        counters.looked()
        try:
            layout, enumeration, shares, paths = self._checked(call, layout)
        except StructureChanged as error:
            raise counters.explained(unstable(error), call.before.runs) from error
        except VFEError as error:
            counters.explained(error, call.before.runs)
            raise
        except Exception as error:
            raise (explained(error, call.programs, call.args, call.kwargs) or cannot_broadcast(error)) from error
        warn_of_runs(layout)
        if layout.only_enumerated:
            warn_of_single_values()
        warn_of_priors(enumeration, layout)
        counters.told(call.before.runs)
        if self.needs_data:
            warn_of_no_data(call.model, call.guide, layout, call.args, call.kwargs)
        self._pairs[call.key] = _Pair(layout, enumeration.lost, call.before.to_keep, shares, paths)
        if len(self._pairs) > _MAX_PAIRS:
            self._pairs.popitem(last=False)
        return enumeration

    def _checked(self, call: "_Call", layout: Layout) -> tuple[Layout, Enumeration, bool, KnownPaths]:
        """An enumeration that agrees with ordinary runs; where the programs do not broadcast, of one run per value."""
        first: Exception | None = None
        while True:
            paths = KnownPaths()
            try:
                layout, (enumeration, shares) = enumerated(layout, call.begun_anew)
                if self.check:
                    paths.add(enumeration, call.spot_check(layout, enumeration, shares))
                    check_reads(layout, enumeration)
            except CostError:
                raise
            except Exception as error:
                first = first or error
                apart = self._otherwise(call, layout, error)
                if apart is None:
                    raise first from first.__cause__
                layout = apart
            else:
                return layout, enumeration, shares, paths

    def _otherwise(self, call: "_Call", layout: Layout, error: Exception) -> Layout | None:
        """Another way of enumerating programs that failed; None where there is none."""
        if layout.stars and isinstance(error, (PlateError, SpotCheckError)):
            with suppress(PlateError):  # What reads several elements at once may be written out, where it fits.
                return self._layout_of(call, by_index=False)
        return call.values_apart(layout, error)

    def _layout_of(self, call: "_Call", *, by_index: bool = True) -> Layout:
        extra = 1 if call.particles > 1 else 0
        own = call.model, call.guide, call.args, call.kwargs
        return self.layout(*own, extra_nesting=extra, by_index=by_index)

    def enumerate_given_draws(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Enumeration:
        """The factors of both programs for one draw of all that is sampled, the same for every value of the latents.

        A draw that depends on an enumerated latent is otherwise made once per value of that latent, which serves
        expectations but leaves log q(w) and log p(w, u) without meaning. One that some branches of the guide lack
        tells which of them it took.
        """
        with Buffers() as before:
            enumeration = self.enumerate(model, guide, args, kwargs)
        if not enumeration.draws_tell_of_latents:
            return enumeration
        with before.again():
            draws = ordinary_draws(guide, args, kwargs, enumeration)
        with before.again():
            run = self.enumerate(model, guide, args, kwargs, given=draws, subsamples=enumeration.subsamples)
        return run.holding(draws)


@dataclass(frozen=True, eq=False)
class _Call:
    """A pair of programs with the arguments of one call."""

    key: _PairKey
    """What the pair is remembered by."""
    model: Program
    guide: Program
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    given: Mapping[str, Tensor]
    subsamples: Mapping[str, Tensor]
    particles: int
    differentiable: bool
    pin_masked: bool
    weighs_data: bool
    before: Buffers = field(default_factory=Buffers)
    """The buffers of modules as they were before the call."""
    chance: list[Tensor] = field(default_factory=list)
    """The random state of its first check: what fails there is not given another chance."""

    @property
    def programs(self) -> tuple[Program, Program]:
        """The guide and the model, in the order in which they run."""
        return self.guide, self.model

    def enumeration(self, layout: Layout, share: bool) -> tuple[Enumeration, bool]:
        """One enumerated run, and whether it could share equal computations."""
        model, guide = self._in_particles(layout)
        try:
            enumeration = enumerate_programs(
                model,
                guide,
                self.args,
                self.kwargs,
                layout,
                given=self.given,
                subsamples=self.subsamples,
                share=share,
                differentiable=self.differentiable,
                pin_masked=self.pin_masked,
            )
        except Unshareable:
            self.before.put_back()
            return self.enumeration(layout, False)
        return enumeration, share

    def begun_anew(self, layout: Layout) -> tuple[Enumeration, bool]:
        """An enumerated run, the second too from the buffers that there were before the call."""
        if layout.unvalidated:
            self.before.put_back()
        return self.enumeration(layout, True)

    def tables_at(
        self, layout: Layout, run: Enumeration, only: Mapping[str, int], state: list[Tensor]
    ) -> dict[SiteKey, Factor]:
        """The factors of a run once more, with one value of some latents."""
        model, guide = self._in_particles(layout)
        with one_call(), undisturbed_randomness(), self.before.again():
            set_random_state(state)
            return tables_at(
                model,
                guide,
                self.args,
                self.kwargs,
                layout,
                only,
                given=run.drawn,
                subsamples=run.subsamples,
                pin_masked=self.pin_masked,
            )

    def spot_check(self, layout: Layout, enumeration: Enumeration, share: bool) -> frozenset[str]:
        """Ordinary runs beside the enumerated one; returns the latents whose values meet in some operation."""
        with undisturbed_randomness(), self.before.again():
            self.chance[:] = self.chance or random_state()
            set_random_state(self.chance)
            own = (*self._in_particles(layout), self.args, self.kwargs)
            return spot_check(*own, layout, enumeration, share=share, weighs_data=self.weighs_data)

    def values_apart(self, layout: Layout, error: Exception) -> Layout | None:
        """A layout for programs that failed as they do not broadcast; None where that is not why."""
        with undisturbed_randomness(), self.before.again():
            own = (*self._in_particles(layout), self.args, self.kwargs)
            return values_apart(layout, error, own, self.given)

    def agrees(self, known: _Pair, enumeration: Enumeration, state: list[Tensor]) -> bool:
        """Whether one ordinary run agrees with an enumerated one that was made in a random state."""
        programs = self._in_particles(known.layout)
        with undisturbed_randomness(), self.before.again():
            torch.rand(known.paths.calls)  # Each look has an assignment of its own, also where nothing else is drawn.
            self.chance[:] = random_state()
            return not enumeration.supports or (
                not known.paths.mixed
                and agrees_at_random(*programs, self.args, self.kwargs, known.layout, enumeration, state)
            )

    def _in_particles(self, layout: Layout) -> tuple[Program, Program]:
        return tuple(  # type: ignore[return-value]
            in_particles(program, self.particles, layout.nesting) for program in (self.model, self.guide)
        )


def ordinary_draws(
    guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], run: Enumeration
) -> dict[str, Tensor]:
    """What the guide samples besides its enumerable latents, when all of them are sampled."""

    def draw(name: str, role: Role, fn: Any, plates: tuple[Plate, ...]) -> Tensor:
        value: Tensor = fn.sample()
        return value

    sizeless = SizelessPlates(known=run.plates)
    recorder = Recorder("guide", draw, subsamples=run.subsamples, sizeless=sizeless, look=own_value)
    sites = recorder.run(guide, args, kwargs)
    return {name: site.value for name, site in sites.items() if site.kind == "sampled"}


def in_particles(program: Program, particles: int, nesting: int) -> Program:
    """The program in a plate of particles; itself where there is one.

    Args:
        program: A model or guide.
        particles: How many stand side by side.
        nesting: The batch dim of the plate, counted from the right.
    """
    if particles == 1:
        return program

    def in_particles(*args: Any, **kwargs: Any) -> Any:
        with pyro.plate(PARTICLES, particles, dim=-nesting):
            return program(*args, **kwargs)

    return in_particles
