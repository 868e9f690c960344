r"""E, M, E, M, ... over batches: the loop of EM that sees one batch at a time.

    Q_b  <-  argmin F_b(Q_b, G)         s  <-  s with s_b = E_{Q_b} T         G  <-  argmin F(Q_1, ..., Q_B, G) | s

Between batches nothing is kept but pooled statistics. The priors, which every batch shows, count once.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import nan
from typing import Any

from pyro_vfe.errors import DegenerateError, VFEError, located
from pyro_vfe.learning.alike import Facts, alike_latents
from pyro_vfe.learning.batch_checks import check_e_phase, check_subsamples, no_closed_form
from pyro_vfe.learning.batches import Arguments, fingerprint, numbered
from pyro_vfe.learning.belief import Belief
from pyro_vfe.learning.closed_form import present_values, proposed, uncertified
from pyro_vfe.learning.closed_forms import without_closed_form
from pyro_vfe.learning.data_plate import Share, share_of
from pyro_vfe.learning.e_phases import log_q_of_draws
from pyro_vfe.learning.em_loop import check_finite, e_step
from pyro_vfe.learning.em_run import expected_log_probs
from pyro_vfe.learning.history import BATCH, EPOCH, FINAL, Row
from pyro_vfe.learning.minibatch import BatchMethod
from pyro_vfe.learning.pair import Pair
from pyro_vfe.learning.phases import EPhase, Problem
from pyro_vfe.learning.pools import Pools
from pyro_vfe.learning.prior_pools import prior_pools
from pyro_vfe.learning.rounding import SAFETY, resolution
from pyro_vfe.learning.site_pools import data_pools
from pyro_vfe.program.enumeration import Enumeration
from pyro_vfe.program.extraction import statistics_of
from pyro_vfe.program.parameters import restored_on_error, snapshot, write
from pyro_vfe.program.statistics import Statistics


@dataclass(frozen=True)
class Visit:
    """F of one batch at one moment; numbers only, in nats, each datum counted once."""

    share: Share
    free_energy: float
    """F of the batch's data."""
    surprise: float
    """-log p(u | w) of the batch's data."""
    prior: float
    """-log p(w) of point estimates, log q(w) added: what all batches share."""

    @property
    def gap(self) -> float:
        """KL(Q || posterior) of the batch."""
        return self.free_energy - self.surprise


def visit_of(enumeration: Enumeration, belief: Belief, share: Share, max_bytes: float | None) -> Visit:
    """Takes F of a batch apart into what its data and what the priors say.

    Args:
        enumeration: The programs at the batch.
        belief: Q of the batch.
        share: The part of all data that the batch is.
        max_bytes: The most memory that tables may take.
    """
    prior = float(log_q_of_draws(enumeration, max_bytes) - expected_log_probs(belief, enumeration, "sampled"))
    free_energy, surprise = ((float(value) - prior) * share.factor for value in (belief.free_energy, belief.surprise))
    return Visit(share, free_energy, surprise, prior)


@dataclass(eq=False)
class Tally:
    """Sums over the batches of an epoch."""

    free_energy: float = 0.0
    surprise: float = 0.0
    gap: float = 0.0
    magnitude: float = 0.0
    """The sum of |F| of the batches: what rounding is relative to."""
    prior: float = 0.0
    """That of the last visit."""
    num_data: float = 0.0
    num_elements: int = 0
    num_batches: int = 0

    def add(self, visit: Visit) -> None:
        """Adds a batch.

        Args:
            visit: Its F.
        """
        self.free_energy += visit.free_energy
        self.surprise += visit.surprise
        self.gap += visit.gap
        self.magnitude += abs(visit.free_energy)
        self.prior = visit.prior
        self.num_data += visit.share.num_data
        self.num_elements += visit.share.size
        self.num_batches += 1

    def row(self, epoch: int, phase: str) -> Row:
        """The sums, the priors counted once.

        Args:
            epoch: The number of the epoch.
            phase: Of the row.
        """
        return Row(epoch, phase, self.free_energy + self.prior, self.surprise + self.prior, self.gap)


@dataclass(eq=False)
class BatchLoop:
    """EM on batches from the parameters as they are."""

    new_pair: Callable[[tuple[Any, ...], Mapping[str, Any]], Pair]
    """The programs at the arguments of a batch."""
    look: Callable[[Pair], tuple[Enumeration, EPhase]]
    """Checks the programs at the first batch, and says which E-phase serves them."""
    method: BatchMethod
    tol: float
    num_data: int | None
    """The number of elements of the data plate in all batches, where the user says so."""
    on_row: Callable[[Row], bool]
    """Told of every batch and epoch; true stops the run."""
    rows: list[Row] = field(default_factory=list)
    updates: dict[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    """What the last M-phase had to say of its solution."""
    converged: bool = False
    stopped: bool = False
    epoch: int = 0
    last: Tally = field(default_factory=Tally)
    """The sums of the last whole epoch."""
    pair: Pair | None = None
    """The programs at the last batch."""
    e_phase: EPhase | None = None
    """Known after the first look."""
    full_size: int | None = None
    """The number of elements that the subsampled data plate has."""
    learned: dict[str, None] = field(default_factory=dict)
    """The parameters that the M-phase changes, of all batches so far."""
    alike: Facts = field(default_factory=dict)
    """Latents whose values the last batch did not tell apart, and the fact in words."""
    _eps: float = nan
    _certified: set[str] = field(default_factory=set)
    _doubts: dict[str, str] = field(default_factory=dict)
    _priors: Statistics | None = None

    def run(self, batches: Iterable[object], num_epochs: int) -> None:
        """Learns from the batches until F has stopped falling.

        Args:
            batches: What a user iterates over.
            num_epochs: The most epochs.
        """
        self._memory = self.method.memory()
        while self.epoch < num_epochs and not (self.converged or self.stopped):
            self.epoch += 1
            before, self.last = self.last, Tally()
            self._run_epoch(batches)
            self.rows.append(self.last.row(self.epoch, EPOCH))
            self.stopped = self.on_row(self.rows[-1]) or self.stopped
            self.converged = not self.stopped and self._settled(before)

    def look_once_more(self, batches: Iterable[object]) -> None:
        """Adds the row of all batches at the present parameters, which stay.

        Args:
            batches: What a user iterates over.
        """
        total = Tally()
        assert self.e_phase is not None
        for number, arguments in numbered(batches, self.epoch + 1):
            with located(f"batch {number} of the last look"):
                pair = self.new_pair(*arguments)
                enumeration = pair.enumerate()
                belief = self.e_phase.belief(enumeration, self.epoch, pair.max_bytes)
                check_finite(belief)
                self.alike = alike_latents(enumeration)
                total.add(visit_of(enumeration, belief, self._share(enumeration), pair.max_bytes))
        self.last = total
        self.rows.append(total.row(self.epoch, FINAL))

    @property
    def rounding(self) -> float:
        """A change of F, in nats, that rounding explains."""
        return SAFETY * self._eps * self.last.magnitude

    def _run_epoch(self, batches: Iterable[object]) -> None:
        for number, arguments in numbered(batches, self.epoch):
            with located(f"batch {number} of epoch {self.epoch}"):
                pair = self._pair_at(arguments)
                with restored_on_error(snapshot(pair.parameters.readers)):
                    visit = self._visited(pair)
                    self.last.add(visit)
                    if self._memory.ready:
                        self._m_phase()
            self.stopped = self.on_row(Row(self.epoch, BATCH, visit.free_energy, visit.surprise, visit.gap))
            if self.stopped:
                return
        was_ready = self._memory.ready
        self._memory.end_epoch()
        if self._memory.ready and not was_ready:
            assert self.pair is not None
            before = snapshot(self.pair.parameters.readers)
            with located(f"batch {self.last.num_batches} of epoch {self.epoch}"), restored_on_error(before):
                self._m_phase()

    def _pair_at(self, arguments: Arguments) -> Pair:
        """The programs at a batch, which are looked at if it is the first one."""
        self.pair = self.new_pair(*arguments)
        if self.e_phase is None:
            first, self.e_phase = self.look(self.pair)
            self._eps = resolution(first)
            check_e_phase(self.e_phase, self.pair, share_of(first))
            check_subsamples(first, self.pair)
        return self.pair

    def _visited(self, pair: Pair) -> Visit:
        """The E-phase of a batch; its statistics are learned."""
        assert self.e_phase is not None
        state = e_step(pair, self.e_phase, self.epoch - 1)
        share = self._share(state.enumeration)
        self.learned |= dict.fromkeys(pair.learned)
        visit = visit_of(state.enumeration, state.belief, share, pair.max_bytes)
        weights = state.belief.learned_from
        statistics = statistics_of(state.enumeration, weights, pair.parameters)
        pools = data_pools(statistics, present_values(pair))
        self._check_closed_forms(statistics, pools, share)
        uncertain = tuple(name for name in pair.learned if name not in self._certified)
        if uncertain:
            self._certify(Problem(pair, state.enumeration, state.belief, uncertain), statistics, pools)
        digest = b""
        if self.method.needs_digests:
            digest = fingerprint(pair.args, pair.kwargs, state.enumeration.subsamples)
        self._memory.learn(pools if share.factor == 1 else pools.scaled(share.factor), share.size, digest)
        self._priors = replace(statistics, sites=())
        return visit

    def _m_phase(self) -> None:
        assert self.pair is not None and self._priors is not None
        if self._doubts:
            raise no_closed_form(self._doubts)
        pools = self._memory.pools(self.full_size or self.num_data or self.last.num_elements)
        priors = prior_pools(self._priors, present_values(self.pair), pools)
        proposal = proposed(self.pair, pools, priors, list(self.learned))
        if proposal.refused:
            raise no_closed_form(proposal.refused)
        write(proposal.values)
        self.updates.update(proposal.words)
        self.remarks = proposal.notes

    def _share(self, enumeration: Enumeration) -> Share:
        """The part of all data that a batch is; all that is known of their number has to agree."""
        share = share_of(enumeration)
        known = self.full_size or self.num_data
        if share.full_size is not None and known not in (None, share.full_size):
            raise VFEError(
                f"The data are {share.full_size} elements, {share.words} says, and {known} elements by "
                f"{'num_data=' if self.full_size is None else 'an earlier batch'}.",
                hint="Leave num_data out: a subsampled plate tells the number of data itself.",
            )
        self.full_size = self.full_size or share.full_size
        return share

    def _check_closed_forms(self, statistics: Statistics, pools: Pools, share: Share) -> None:
        assert self.pair is not None
        priors = prior_pools(statistics, present_values(self.pair), pools)
        refused = without_closed_form(pools + priors, self.pair.learned, {})
        if refused:
            raise no_closed_form(refused)
        if statistics.priors and self.method.needs_num_data and self.num_data is None and self.full_size is None:
            raise VFEError(
                f"Site '{statistics.priors[0].site}' is a prior, which counts once next to all data, and "
                f"{type(self.method).__name__} does not know how many they are.",
                hint=f"Pass num_data=, the number of elements of {share.words} in all batches together, or let the "
                "plate be a subsample: pyro.plate(name, num_data, subsample=indices).",
            )

    def _certify(self, problem: Problem, statistics: Statistics, pools: Pools) -> None:
        """Looks whether the programs' own gradient vanishes at the solution of one batch by itself.

        A few data can have no solution, or one at the edge of what numbers can tell; then other batches decide.
        """
        priors = prior_pools(statistics, present_values(problem.pair), pools)
        try:
            proposal = proposed(problem.pair, pools, priors, problem.names)
        except DegenerateError:
            return
        failed = uncertified(problem, proposal)
        self._certified |= proposal.values.keys() - failed.keys()
        self._doubts = {name: why for name, why in {**self._doubts, **failed}.items() if name not in self._certified}

    def _settled(self, before: Tally) -> bool:
        """Whether the last two changes are within the tolerance; one alone may be a turn, as visits have many G."""
        floor = max(SAFETY * self._eps * before.magnitude, self.rounding)
        free_energies = [row.free_energy for row in self.rows[-3:]]
        changes = [abs(last - following) for last, following in pairwise(free_energies)]
        return len(changes) > 1 and max(changes) <= max(self.tol * self.last.num_data, floor)
