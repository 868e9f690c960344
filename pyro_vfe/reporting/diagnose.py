"""From the numbers of a free energy to what is wrong, where, and what to do."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from pyro_vfe.energy.decomposition import Decomposition
from pyro_vfe.energy.marginals import posterior_marginals, prior_marginals, q_marginals
from pyro_vfe.energy.parts import normalized
from pyro_vfe.engine.factors import Table
from pyro_vfe.errors import VFEError
from pyro_vfe.learning.em_run import EMRun
from pyro_vfe.learning.history import History
from pyro_vfe.learning.rounding import SAFETY, magnitude, resolution
from pyro_vfe.program.data import number_of_data
from pyro_vfe.program.entry_points import entry_point
from pyro_vfe.program.enumeration import Enumeration
from pyro_vfe.reporting.diagnose_history import look_at_history, rests, series_of
from pyro_vfe.reporting.diagnose_latents import look_at_alike, look_at_latent, shares_of
from pyro_vfe.reporting.diagnose_notebook import Notebook, Thresholds
from pyro_vfe.reporting.diagnose_terms import (
    gap_by_site,
    look_at_elements,
    look_at_gap,
    look_at_spread,
    look_at_support,
)
from pyro_vfe.reporting.diagnose_views import views_of
from pyro_vfe.reporting.findings import Diagnosis

_PROBED = 10.0
"""EM also measures what the last places of the parameters do to F; that may be so many times the rounding of sums."""
_EXACT = 1e-6
"""A gap below this, in nats per datum, is that of the exact posterior."""


class HasHistory(Protocol):
    """The end of a run: an `SVIRun`, a `BatchRun`, an `EMRun` or a `Monitor`."""

    @property
    def history(self) -> History:
        """F, surprise and gap on the way."""
        ...


Subject = Decomposition | History | HasHistory


@dataclass(eq=False)
class _Subjects:
    """What a diagnosis is made of."""

    terms: Decomposition | None = None
    history: History | None = None
    run: EMRun | None = None
    converged: bool | None = None
    """What the run says of itself; None where it says nothing."""
    notes: tuple[str, ...] = field(default=())

    def add(self, subject: Subject) -> None:
        """Takes one more.

        Raises:
            VFEError: It is of no kind that can be read, or there is one of its kind already.
        """
        if isinstance(subject, Decomposition):
            _check_whole(subject)
            self._check_new(self.terms, "decomposition")
            self.terms = subject
            return
        if isinstance(subject, History):
            history = subject
        elif isinstance(getattr(subject, "history", None), History):
            history = subject.history
            self.notes = (*self.notes, *getattr(subject, "notes", ()))
        else:
            raise VFEError(
                f"diagnose was given {type(subject).__name__}.",
                hint="Give it a Decomposition (vfe.FreeEnergy().decompose(model, guide, ...)), a History, or a run.",
            )
        self._check_new(self.history, "history")
        self.history = history
        self.run = subject if isinstance(subject, EMRun) else self.run
        self.converged = getattr(subject, "converged", None)

    def rests(self, flat: float) -> bool | None:
        """Whether F is known to rest; None without a history.

        Args:
            flat: A change that is none, nats per datum.
        """
        if self.history is None:
            return None
        series = series_of(self.history, self.converged)
        return series is not None and rests(series, self.converged, flat)

    @staticmethod
    def _check_new(known: object, what: str) -> None:
        if known is not None:
            raise VFEError(f"diagnose was given more than one {what}.", hint="Ask for each by itself.")


@entry_point()
def diagnose(
    *subjects: Subject,
    gap_share: float = 0.05,
    gap_per_datum: float = 0.01,
    element_share: float = 0.5,
    element_nats: float = 0.1,
    unused: float = 0.01,
    collapsed: float = 0.99,
    flat: float = 1e-3,
    spread: float = 0.05,
    rounding: float = 1e-6,
) -> Diagnosis:
    """Returns what is wrong with a guide, a model or a run, worst first: the site, the number and the way out.

    `pyro_vfe.reporting.findings.KINDS` lists the kinds of findings. Looking costs a few times what the decomposition
    did: marginals of Q, of the posterior and of the prior, the gap of each latent, and that of each element of a plate.

    Args:
        *subjects: A `Decomposition`, a `History`, or a run that has one (`EMRun`, `BatchRun`, `SVIRun`); or a
            decomposition together with one of the others, which then is taken to be of the same end.
        gap_share: The guide is the bottleneck from this share on: gap / (gap + complexity), where complexity is what
            the guide says that the data told it. A share of F is none: densities move F, through zero.
        gap_per_datum: And from this many nats per datum on. Below it the gap counts as closed.
        element_share: Few elements carry the gap of a plate if one, or one in fifty, have this share of it, and ten
            times the gap of the others on average,
        element_nats: and this many nats together.
        unused: A state is unused if the elements expected in it, under Q, are fewer than this share of N / K: as many
            as each of K states would have of N elements. Not told for less than 5 elements for each state, for counts
            (Binomial), and for a latent without plate, chain or loop; nor for a state that is rare under the prior.
        collapsed: Q has collapsed if this share of the elements is on one value, and five times as many are elsewhere
            under the exact posterior.
        flat: F rests if it changes by no more than this many nats per datum from one iteration of EM to the next, or
            from one window of five other readings to the next, two standard errors included, as `Settled` has it. It
            falls if it does by more than this and four standard errors; in between nobody knows yet. It has risen from
            its lowest by ten times this (beyond six standard errors).
        spread: The standard error of F over particles is too large from this many nats per datum on, or where it is
            larger than a gap that is not closed.
        rounding: A phase of EM may raise F by this share of F, where only a history is known; an `EMRun` tells its own
            rounding.

    Raises:
        VFEError: A subject cannot be read, is the part of another, or comes twice.

    References:
        Cremer, Li and Duvenaud (2018), Inference suboptimality in variational autoencoders.
        Wang, Blei and Cunningham (2021), Posterior collapse and latent variable non-identifiability.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> import pyro_vfe as vfe
        >>> def model(u):
        ...     with pyro.plate("data", len(u)):
        ...         v = pyro.sample("v", dist.Categorical(torch.ones(2)))
        ...         pyro.sample("u", dist.Poisson(torch.tensor([2.0, 9.0])[v]), obs=u)
        >>> def guide(u):
        ...     with pyro.plate("data", len(u)):
        ...         pyro.sample("v", dist.Categorical(torch.tensor([0.6, 0.4])))
        >>> terms = vfe.FreeEnergy().decompose(model, guide, torch.tensor([1.0, 3.0, 11.0, 8.0]))
        >>> [(finding.kind, finding.site) for finding in diagnose(terms)]
        [('guide-bottleneck', 'v'), ('guide-ignores-data', 'v')]
    """
    known = _Subjects()
    for subject in subjects:
        known.add(subject)
    if not subjects:
        raise VFEError("diagnose was given nothing.", hint="Give it a Decomposition, a History or a run.")
    thresholds = Thresholds(
        gap_share=gap_share,
        gap_per_datum=gap_per_datum,
        element_share=element_share,
        element_nats=element_nats,
        unused=unused,
        collapsed=collapsed,
        flat=flat,
        spread=spread,
        rounding=rounding,
    )
    thresholds.check()
    notebook = Notebook(thresholds, notes=list(known.notes))
    with torch.no_grad():
        _look(known, notebook)
    return notebook.diagnosis()


def _look(known: _Subjects, notebook: Notebook) -> None:
    """Looks at everything that the subjects tell."""
    terms = known.terms
    if terms is None and known.run is not None:
        terms = known.run.decomposition()
    if terms is not None:
        _look_at_terms(terms, known.run, known.rests(notebook.thresholds.flat) is not False, notebook)
    if known.history is not None:
        allowed = None if known.run is None else _allowed_rise(known.run)
        gap = None if terms is None else float(terms.gap)
        look_at_history(known.history, allowed, gap, known.converged, notebook)


def _look_at_terms(terms: Decomposition, run: EMRun | None, may_rest: bool, notebook: Notebook) -> None:
    by_site = None
    if not look_at_support(terms, notebook):
        if terms.unsplit is None:
            by_site = gap_by_site(terms, notebook)
            look_at_gap(terms, by_site, may_rest, notebook)
            look_at_elements(terms, notebook)
        else:
            notebook.skip("the gap", terms.unsplit)
        look_at_spread(terms, notebook)
    if run is not None:
        look_at_alike(run.alike, run.gain_elsewhere, run.enumeration, notebook)
    runs = terms.runs
    is_exact = False
    if not runs and run is not None:
        runs = (normalized(run.enumeration, torch.float64),)
        is_exact = abs(float(terms.gap)) <= _EXACT * terms.num_data
        if not is_exact:
            notebook.skip("Q of each latent", "The E-phase of this run is not exact, and its Q is not kept.")
    if runs and runs[0].model_latents:
        _look_at_latents(runs, is_exact, by_site, terms.max_bytes, notebook)


def _look_at_latents(
    runs: tuple[Enumeration, ...],
    is_exact: bool,
    by_site: Mapping[str, float] | None,
    max_bytes: float | None,
    notebook: Notebook,
) -> None:
    try:
        posterior = posterior_marginals(runs, max_bytes)
    except VFEError as error:
        notebook.skip("how the latents' values are used", error)
        return
    q: Mapping[str, Table] | None = posterior if is_exact else None
    prior: Mapping[str, Table] | None = None
    try:
        if q is None and runs[0].guide_latents:
            q = q_marginals(runs, max_bytes)
    except VFEError as error:
        notebook.skip("Q of each latent", error)
    try:
        prior = prior_marginals(runs[0], max_bytes)
    except VFEError as error:
        notebook.skip("what the data tell of each latent", error)
    notebook.look("how Q, the posterior and the prior use each latent's values")
    for view in views_of(runs[0], posterior, q, prior):
        look_at_latent(view, shares_of(view, by_site), notebook)


def _check_whole(terms: Decomposition) -> None:
    if terms.plate is not None:
        raise VFEError(
            f"diagnose was given the elements of plate '{terms.plate}'.",
            hint=f"Give it the whole, terms and not terms.by('{terms.plate}'): it looks at the elements itself.",
        )
    if terms.runs and number_of_data(terms.runs[0]) != terms.num_data:
        raise VFEError(
            "diagnose was given terms per datum.",
            hint="Give it the sums, terms and not terms.per_datum: findings are weighed by the nats of all data.",
        )


def _allowed_rise(run: EMRun) -> float:
    """What rounding may raise F by, nats: about what EM itself allows."""
    return _PROBED * SAFETY * resolution(run.enumeration) * magnitude(run.belief, run.enumeration)
