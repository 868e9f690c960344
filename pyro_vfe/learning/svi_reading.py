r"""One look at F in the midst of training, which leaves everything as it was.

    F(Q, G)  =  surprise + gap

Looking must not steer: random states, gradients and the buffers of modules (the running means of a BatchNorm, say) are
the same after it as before.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from math import inf, isfinite, nan
from typing import Any

from pyro_vfe.energy.decomposition import Decomposition
from pyro_vfe.energy.free_energy import FreeEnergy
from pyro_vfe.errors import ArgumentError, ImpossibleDataError, NotFiniteError, VFEError
from pyro_vfe.learning.alike import Facts, alike_latents, note_on
from pyro_vfe.learning.batches import Arguments, fingerprint
from pyro_vfe.learning.history import STEP, History, Row
from pyro_vfe.learning.rounding import SAFETY, resolution
from pyro_vfe.program.buffers import unchanged_buffers
from pyro_vfe.program.layout import Program
from pyro_vfe.program.randomness import undisturbed_randomness

_BATCHES = "the mini-batch of each reading"


@dataclass(frozen=True)
class Reading:
    """F at one moment, and why something of it is missing."""

    row: Row
    """What is known, NaN for the rest."""
    problem: str | None = None
    """Why something is not known or infinite, in words."""


class Reader:
    """Takes F of two programs apart; where that is refused, which can take long to find out, it seldom tries again."""

    def __init__(self, model: Program, guide: Program, elbo: FreeEnergy) -> None:
        """Args:
        model: The generative model.
        guide: The guide.
        elbo: What takes F apart.
        """
        self._model = model
        self._guide = guide
        self._elbo = elbo
        self._trains_on_F = elbo.gradient != "vimco"
        if not self._trains_on_F:  # Its loss is another bound; what is wanted is F, and no gradient.
            self._elbo = copy(elbo)
            self._elbo.gradient = "leave-one-out"
        self._random: dict[str, None] = {}
        self._last: Arguments | None = None
        self._may_be_alike = True
        self.alike: Facts = {}
        """Latents whose values no reading told apart, and the fact in words."""
        self.rounding = 0.0
        """A change of F, in nats, that rounding explains."""
        self._to_skip = 0
        self._next_skip = 1
        self._knows_total = True

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the history should know, in words."""
        return tuple(map(note_on, self.alike.values()))

    def history(self, rows: Sequence[Row], num_data: int | None, *random: str) -> History:
        """Returns the readings with what is known of them all.

        Args:
            rows: The readings.
            num_data: The number of data of the last one, if it is known.
            *random: What else makes them differ, in words.
        """
        drawn = (*self._random, *random)
        return History(
            tuple(rows),
            num_data or 1,
            rounding=self.rounding,
            random=drawn,
            alike=tuple(name for names in self.alike for name in names),
        )

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], step: int, loss: float | None) -> Reading:
        """Returns F, surprise and gap at the present parameters.

        Args:
            args: Arguments of both programs.
            kwargs: Keyword arguments of both programs.
            step: The number of steps so far.
            loss: What training has of F at these arguments, in nats, for where F cannot be summed; None for nothing.
        """
        self._look_at_data((args, kwargs))
        with undisturbed_randomness(), unchanged_buffers():
            if self._to_skip:
                self._to_skip -= 1
                return Reading(self._total_alone(args, kwargs, step, loss))
            try:
                terms = self._elbo.decompose(self._model, self._guide, *args, **kwargs)
            except ImpossibleDataError as error:
                return Reading(Row(step, STEP, inf, inf, nan, nan), str(error))
            except NotFiniteError as error:
                return Reading(Row(step, STEP, nan, nan, nan, nan), str(error))
            except ArgumentError:
                raise  # It is the loop's own mistake, and comes again at each reading.
            except VFEError as error:
                self._to_skip, self._next_skip = self._next_skip, 2 * self._next_skip
                self._knows_total = True
                row = self._total_alone(args, kwargs, step, loss)
                return Reading(row, f"F cannot be taken apart. {error}")
        self._look_at(terms)
        problem = f"F is infinite: {'; '.join(terms.impossible)}." if terms.impossible else None
        if terms.unsplit is not None:
            problem = f"{problem or 'F does not split into surprise and gap.'} {terms.unsplit}"
        return Reading(_row_of(terms, step), problem)

    def _look_at_data(self, own: Arguments) -> None:
        """Notices data that change from reading to reading."""
        last, self._last = self._last, own
        if last is not None and _BATCHES not in self._random and _are_others(last, own):
            self._random[_BATCHES] = None

    def _look_at(self, terms: Decomposition) -> None:
        """Remembers what a reader of the history should know of its readings."""
        self._random |= dict.fromkeys(terms.random)
        run = terms.runs[0]
        size = abs(float(terms.energy)) + abs(float(terms.entropy))
        if isfinite(size):
            self.rounding = max(self.rounding, SAFETY * resolution(run) * size)
        if self._may_be_alike:  # What has been told apart once stays so.
            self.alike = alike_latents(run)
            self._may_be_alike = bool(self.alike)

    def _total_alone(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], step: int, loss: float | None) -> Row:
        """F where its parts cannot be told: as one number, or else what training has of it."""
        free_energy = loss if loss is not None and self._trains_on_F else nan
        if self._knows_total:
            try:
                free_energy = self._elbo.loss(self._model, self._guide, *args, **kwargs)
            except VFEError:
                self._knows_total = False
        return Row(step, STEP, free_energy, nan, nan, nan)


def _are_others(one: Arguments, two: Arguments) -> bool:
    """Whether two readings are of different data; not where nobody can tell."""
    pairs = zip((*one[0], *one[1].values()), (*two[0], *two[1].values()), strict=False)
    try:
        return any(own is not other and fingerprint(own) != fingerprint(other) for own, other in pairs)
    except VFEError:
        return False


def _row_of(terms: Decomposition, step: int) -> Row:
    spread = 0.0 if terms.exact else nan
    return Row(
        iteration=step,
        phase=STEP,
        free_energy=float(terms.free_energy),
        surprise=float(terms.surprise),
        gap=float(terms.gap),
        stderr=spread if terms.stderr is None else float(terms.stderr),
        num_data=terms.num_data,
    )
