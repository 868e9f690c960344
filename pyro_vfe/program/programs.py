"""A pair of programs and what is known of them: laid out once, enumerated at every call.

The layout is kept per pair of programs. Nothing else is: every run labels its own tables, and one that does not fit the
layout has the programs laid out again.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Literal

import pyro
from torch import Tensor

from pyro_vfe.errors import NotFiniteError, StructureError, VFEError
from pyro_vfe.program.cost import check_cost
from pyro_vfe.program.enumeration import PARTICLES, Enumeration
from pyro_vfe.program.layout import Layout, Program, lay_out
from pyro_vfe.program.parameters import nan_parameters
from pyro_vfe.program.randomness import undisturbed_randomness
from pyro_vfe.program.recorder import Plate, Recorder, Role
from pyro_vfe.program.runs import enumerate_programs
from pyro_vfe.program.spot_check import spot_check
from pyro_vfe.program.tables import StructureChanged

Check = Literal["first", "always", False]

_MAX_PAIRS = 64


class Programs:
    """Enumerates pairs of programs, remembering how each pair is laid out."""

    def __init__(self, *, check: Check = "first", max_bytes: float | None = None, min_nesting: int = 0) -> None:
        """Args:
        check: When enumerated tables are compared with an ordinary run: at the first call for a pair, at every call,
            or never.
        max_bytes: The most that one table may take; half of the free memory by default.
        min_nesting: Batch dims to reserve for plates even where the programs use fewer.
        """
        self.check = check
        self.max_bytes = max_bytes
        self.min_nesting = min_nesting
        self._layouts: OrderedDict[object, tuple[Layout, Program, Program]] = OrderedDict()

    def layout(
        self,
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        extra_nesting: int = 0,
    ) -> Layout:
        """The layout of a pair, from memory or from an ordinary run."""
        key = (_identity(model), _identity(guide), extra_nesting)
        known = self._layouts.get(key)
        if known is not None:
            self._layouts.move_to_end(key)
            return known[0]
        with undisturbed_randomness():
            layout = lay_out(model, guide, args, kwargs, extra_nesting=extra_nesting, min_nesting=self.min_nesting)
        check_cost(layout, self.max_bytes)
        # The programs are kept beside the layout so that their identities are not given to others.
        self._layouts[key] = (layout, model, guide)
        if len(self._layouts) > _MAX_PAIRS:
            self._layouts.popitem(last=False)
        return layout

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

        Raises:
            StructureError: The programs' structure changes from run to run.
            SpotCheckError: The enumerated tables differ from an ordinary run.
        """
        extra = 1 if particles > 1 else 0
        key = (_identity(model), _identity(guide), extra)
        new = key not in self._layouts
        try:
            layout, enumeration = self._run(model, guide, args, kwargs, given, subsamples, particles)
        except ValueError as error:
            raise _explained(error, model, guide) from error
        except (StructureChanged, RuntimeError, IndexError) as error:
            # What was known of the programs does not fit them any more, or never did: look at them once again.
            if new and not isinstance(error, StructureChanged):
                raise _cannot_broadcast(error) from error
            self._layouts.pop(key, None)
            new = True
            try:
                layout, enumeration = self._run(model, guide, args, kwargs, given, subsamples, particles)
            except StructureChanged as again:
                raise _unstable(again) from again
        if self.check == "always" or (self.check == "first" and new):
            with undisturbed_randomness():
                wrapped = [_in_particles(program, particles, layout.nesting) for program in (model, guide)]
                try:
                    spot_check(wrapped[0], wrapped[1], args, kwargs, layout, enumeration)
                except StructureChanged as error:
                    raise _unstable(error) from error
        return enumeration

    def enumerate_given_draws(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Enumeration:
        """The factors of both programs for one draw of all that is sampled, the same for every value of the latents.

        A draw that depends on an enumerated latent is otherwise made once per value of that latent, which serves
        expectations but leaves log q(w) and log p(w, u) without meaning.
        """
        enumeration = self.enumerate(model, guide, args, kwargs)
        if not enumeration.draws_tell_of_latents:
            return enumeration
        draws = ordinary_draws(guide, args, kwargs, enumeration.subsamples)
        return self.enumerate(model, guide, args, kwargs, given=draws, subsamples=enumeration.subsamples)

    def _run(
        self,
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        given: Mapping[str, Tensor] | None,
        subsamples: Mapping[str, Tensor] | None,
        particles: int,
    ) -> tuple[Layout, Enumeration]:
        layout = self.layout(model, guide, args, kwargs, extra_nesting=1 if particles > 1 else 0)
        model, guide = (_in_particles(program, particles, layout.nesting) for program in (model, guide))
        return layout, enumerate_programs(
            model, guide, args, kwargs, layout, given=given, subsamples=subsamples, track=self.check == "always"
        )


def _explained(error: ValueError, model: Program, guide: Program) -> ValueError:
    """The error of a distribution that was given NaN, with the parameters it came from; others as they are."""
    names = [] if isinstance(error, VFEError) else nan_parameters(model, guide)
    if not names:
        return error
    return NotFiniteError(
        f"The parameters {', '.join(names)} hold NaN ({str(error).splitlines()[0]}).",
        hint="Set them to finite values (a smaller learning rate keeps them there); this step changed nothing.",
    )


def _cannot_broadcast(error: Exception) -> StructureError:
    return StructureError(
        f"The programs run with sampled values but not with enumerated ones: {error}.",
        hint="Enumerated values carry extra dims to the left of the plates: index with `table[z]`, broadcast, use "
        "`[..., None]` and dims counted from the right, not `view`, `flatten`, `x[:, z]` or sums over dim 0.",
    )


def _unstable(error: Exception) -> StructureError:
    return StructureError(
        f"The structure of the programs changes from one run to the next: {error}.",
        hint="Let the sites depend on the arguments and on the latents only, not on other randomness.",
    )


def ordinary_draws(
    guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], subsamples: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What the guide samples besides its enumerable latents, when all of them are sampled."""

    def draw(name: str, role: Role, fn: Any, plates: tuple[Plate, ...]) -> Tensor:
        value: Tensor = fn.sample()
        return value

    sites = Recorder("guide", draw, subsamples=subsamples).run(guide, args, kwargs)
    return {name: site.value for name, site in sites.items() if site.kind == "sampled"}


def _identity(program: Program) -> object:
    """What makes two programs the same: the function, and for a bound method its object."""
    owner = getattr(program, "__self__", None)
    return (id(owner), id(program.__func__)) if owner is not None and hasattr(program, "__func__") else id(program)


def _in_particles(program: Program, particles: int, nesting: int) -> Program:
    if particles == 1:
        return program

    def in_particles(*args: Any, **kwargs: Any) -> Any:
        with pyro.plate(PARTICLES, particles, dim=-nesting):
            return program(*args, **kwargs)

    return in_particles
