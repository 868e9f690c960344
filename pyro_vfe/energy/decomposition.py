r"""A free energy taken apart.

    F  =  surprise + gap  =  energy - entropy  =  complexity - accuracy

    surprise    -log p(u|G)                 what the model cannot explain, whatever the guide
    gap         E KL( Q(v|u) || P(v|u,G) )  what the guide loses, whatever the data
    energy      E_Q[-log P(v,u|G)]          entropy     H[Q]
    complexity  KL( Q(v|u) || P(v|G) )      accuracy    E_Q[log P(u|v,G)]

References:
    Neal and Hinton (1998), A view of the EM algorithm that justifies incremental, sparse, and other variants.
    Friston (2010), The free-energy principle: a unified brain theory? (the four readings).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_vfe.energy.impossible import Clash, check_possible, culprits
from pyro_vfe.energy.marginals import Marginals, posterior_marginals, q_marginals
from pyro_vfe.energy.parts import normalized
from pyro_vfe.energy.pointwise import terms_by
from pyro_vfe.energy.render import as_html, as_text
from pyro_vfe.energy.shares import gap_shares
from pyro_vfe.energy.terms import NAMES, Terms, mean_terms, measured
from pyro_vfe.errors import NotFiniteError, PlateError, PlateKeptError, ScaleError
from pyro_vfe.program.data import number_of_data
from pyro_vfe.program.entry_points import entry_point
from pyro_vfe.program.enumeration import Enumeration, is_random

if TYPE_CHECKING:
    import xarray

_MOST_NAMED = 3
"""So many sites are named; more are too many to read."""


@dataclass(frozen=True, eq=False)
class Decomposition:
    """The four readings of a free energy, in nats and float64: scalars, or one entry per element of a plate."""

    energy: Tensor
    """E_Q[-log P(v, u)]: the expected cost of the guide's account of the data under the model."""

    entropy: Tensor
    """H[Q]: how undecided the guide is."""

    surprise: Tensor
    """-log p(u): the model's share. Where the guide draws latents w, log q(w) - log p(w, u) with the other latents
    summed out: on average above -log p(u), by what the guide loses on w."""

    gap: Tensor
    """KL(Q(v|u) || P(v|u)): the guide's share. Where the guide draws latents w, KL(Q(v|w, u) || P(v|w, u)) of the
    others, exact for each draw; 0 where it draws them all."""

    complexity: Tensor
    """KL(Q(v|u) || P(v)): how far the guide moves from the prior."""

    accuracy: Tensor
    """E_Q[log P(u|v)]: how well the guide's account predicts the data."""

    exact: bool
    """Whether nothing was drawn at random (a point estimate is not) and no plate subsampled. Discrete latents that were
    drawn, by `infer={"enumerate": None}` or `on_cost="sample"`, make it False as continuous ones do."""

    stderr: Tensor | None
    """The standard error of the free energy over particles, each with draws of its own; None where it is exact or there
    is one particle."""

    num_data: int
    """The number of data: elements of the plates that the data share, as the whole data set has them."""

    clashes: tuple[Clash, ...]
    """Where the guide puts mass that the model forbids; then free energy and gap are infinite."""

    unsplit: str | None = None
    """Why F does not split into surprise and gap, which are NaN then, in words; None where it does. Weights (a
    subsample, or poutine.scale) may leave the sum over the model's latents without a value, where Q's F has one."""

    plate: str | None = None
    """The plate that entries are elements of; None for scalars."""

    runs: tuple[Enumeration, ...] = field(default=(), repr=False)
    """What the numbers were computed from."""

    max_bytes: float | None = field(default=None, repr=False)
    """The most memory that further tables may take."""

    @property
    def free_energy(self) -> Tensor:
        """F itself: the negative ELBO."""
        return self.energy - self.entropy

    @property
    def random(self) -> tuple[str, ...]:
        """What was drawn at random for these numbers, in words: draws of the guide, subsamples. None where exact."""
        if self.exact or not self.runs:
            return ()
        return drawn_in_words(self.runs[0])

    @property
    def impossible(self) -> tuple[str, ...]:
        """Where the guide puts mass that the model forbids, in words."""
        return tuple(clash.words for clash in self.clashes)

    @property
    def per_datum(self) -> "Decomposition":
        """The same, divided by the number of data."""
        scaled: dict[str, Any] = {name: getattr(self, name) / self.num_data for name in NAMES}
        stderr = None if self.stderr is None else self.stderr / self.num_data
        return replace(self, stderr=stderr, num_data=1, **scaled)

    @entry_point()
    def by(self, plate: str) -> "Decomposition":
        """Returns the decomposition of each element of a plate, shape `(size,)`.

        Each element carries its weight (of `poutine.scale`, or of a subsample), so that the elements sum to the
        whole; only what belongs to no element, a global draw say, is left out.

        Args:
            plate: The name of a plate, vectorised or sequential.

        Raises:
            PlateKeptError: There is no such plate, or a latent outside of it ties its elements together, or no guide
                gave Q.
        """
        self._check_guided("plate")
        known = self.runs[0].all_plates
        if plate not in known:
            names = ", ".join(f"'{name}'" for name in known)
            hint = (
                f"The plates here are: {names}." if names else "There are none; gap_by_site() splits the gap by latent."
            )
            raise PlateKeptError(f"There is no plate '{plate}' to report by.", hint=hint)
        try:
            inside = [terms_by(run, (plate,), self.max_bytes) for run in self.runs]
        except PlateError as error:
            raise PlateKeptError(
                f"The elements of plate '{plate}' have no free energy of their own: {error.problem}",
                hint=_what_to_ask_for(self.runs[0], plate),
            ) from error
        stderr = None if self.exact else _stderr(inside)
        terms = mean_terms(inside)
        return replace(self, stderr=stderr, num_data=1, plate=plate, unsplit=terms.unsplit, **_fields(terms))

    @entry_point()
    def gap_by_site(self) -> dict[str, Tensor]:
        """Returns each latent site's share of the gap, over its plates (sorted by name); the shares sum to the gap.

        A site's share is the rise of F when that site passes from being summed out inside the model to being handled by
        the guide, in the order in which the guide samples: the chain rule of the KL divergence.

        Raises:
            StructureError: The guide samples a latent of a plate before a latent outside of it that ties its elements,
                or has latents of its own, or draws something that depends on a latent.
            CostError: The elimination that this order forces would not fit.
            NotFiniteError: The gap is infinite.
            ScaleError: F does not split into surprise and gap.
            PlateKeptError: No guide gave Q.
        """
        return {name: share.clone() for name, share in self._gap_shares.items()}

    @cached_property
    def _gap_shares(self) -> dict[str, Tensor]:
        self._check_guided("site")
        if self.unsplit is not None:
            raise ScaleError(f"The gap is not known, and has no shares. {self.unsplit}", hint="Ask for F alone.")
        if bool(self.gap.isinf().any()):
            raise NotFiniteError(
                f"The gap is infinite and has no shares: {'; '.join(self.impossible)}.",
                hint="Give the guide the same zeros as the model.",
            )
        shares = [gap_shares(run, self.max_bytes) for run in self.runs]
        return {name: torch.stack([share[name] for share in shares]).mean(0) for name in shares[0]}

    @entry_point()
    def q_marginals(self) -> dict[str, Tensor]:
        """Returns the probabilities of each latent's values under Q, shape `(*plates, K)`, plates sorted by name.

        They sum to the probability that the latent is there: to less than one where a branch of the model lacks it, and
        to zero where a mask removes it. Where something is sampled they are averages over the particles.

        Raises:
            PlateKeptError: No guide gave Q.
            StructureError: Latents that only the model has tie the elements of a plate of the guide's latents together.
        """
        return {name: table.values.clone() for name, table in self.q_tables.items()}

    @entry_point()
    def posterior_marginals(self) -> dict[str, Tensor]:
        """Returns what `q_marginals` does under the exact posterior: where the two differ, there is the gap.

        Raises:
            PlateKeptError: No guide gave Q.
            ScaleError: Weights leave the sum over the model's latents without a value.
        """
        return {name: table.values.clone() for name, table in self.posterior_tables.items()}

    @cached_property
    def q_tables(self) -> Marginals:
        """What `q_marginals` returns, with a name for each axis; made once, in one pass for all latents."""
        self._check_guided("latent")
        return q_marginals(self.runs, self.max_bytes)

    @cached_property
    def posterior_tables(self) -> Marginals:
        """What `posterior_marginals` returns, with a name for each axis; made once, in one pass for all latents."""
        self._check_guided("latent")
        return posterior_marginals(self.runs, self.max_bytes)

    def _check_guided(self, part: str) -> None:
        if not self.runs:
            raise PlateKeptError(
                f"These terms are of a Q that was computed from the model; no guide says what each {part} has of it.",
                hint="For the surprise of each element of a plate, which is its F under the exact posterior, ask "
                "vfe.FreeEnergy().decompose(model, guide, ...).by(plate) with a guide that has no sites.",
            )

    def to_xarray(self) -> "xarray.Dataset":
        """Returns the terms as an `xarray.Dataset`, in nats, with the plate as dimension where there is one."""
        import xarray

        dims = () if self.plate is None else (self.plate,)
        values = {name: (dims, getattr(self, name).cpu().numpy()) for name in ("free_energy", *NAMES)}
        dataset = xarray.Dataset(values, attrs={"units": "nats", "exact": int(self.exact), "num_data": self.num_data})
        if self.unsplit is not None:
            dataset.attrs["unsplit"] = self.unsplit
        if self.stderr is not None:
            dataset["free_energy_stderr"] = (dims, self.stderr.cpu().numpy())
        return dataset

    def __str__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self)


def decomposition(runs: Sequence[Enumeration], max_bytes: float | None = None) -> Decomposition:
    """Returns the decomposition of the free energy of enumerated programs, averaged over runs.

    Args:
        runs: One enumeration per particle.
        max_bytes: The most memory that intermediate tables may take.

    Raises:
        ImpossibleDataError: The data have probability zero under the model.
    """
    precise = tuple(normalized(run, torch.float64).numbers() for run in runs)
    terms = [measured(run, max_bytes=max_bytes)[1] for run in precise]
    for term, run in zip(terms, precise, strict=True):
        check_possible(term, run)
    first = precise[0]
    exact = not (first.is_sampled or first.subsampled)
    mean = mean_terms(terms)
    return Decomposition(
        energy=mean.energy,
        entropy=mean.entropy,
        surprise=mean.surprise,
        gap=mean.gap,
        complexity=mean.complexity,
        accuracy=mean.accuracy,
        exact=exact,
        stderr=None if exact else _stderr(terms),
        num_data=number_of_data(first),
        clashes=tuple(
            clash for run, term in zip(precise, terms, strict=True) if term.gap.isinf() for clash in culprits(run)
        ),
        unsplit=mean.unsplit,
        runs=precise,
        max_bytes=max_bytes,
    )


def drawn_in_words(run: Enumeration) -> tuple[str, ...]:
    """What of a run is drawn at random, in words.

    Args:
        run: Of both programs.
    """
    drawn = [site.name for site in run.sites.values() if site.role == "guide" and is_random(site)]
    # Pyro's autoguides draw 'w_unconstrained' for 'w'.
    bases = {name: name.removesuffix("_unconstrained") for name in drawn}
    names = [f"'{base if ('model', base) in run.sites else name}'" for name, base in bases.items()]
    shown = ", ".join(names[:_MOST_NAMED]) + (", ..." if len(names) > _MOST_NAMED else "")
    plates = dict.fromkeys(plate for plate, _, _ in run.subsampled)
    return (
        *((f"the guide's draws of {shown}",) if names else ()),
        *(f"the subsample of plate '{plate}'" for plate in plates),
    )


def _fields(terms: Terms) -> dict[str, Any]:
    return {name: getattr(terms, name) for name in NAMES}


def _stderr(terms: Sequence[Terms]) -> Tensor | None:
    if len(terms) < 2:
        return None
    spread: Tensor = torch.stack([term.free_energy for term in terms]).std(0)
    return spread / math.sqrt(len(terms))


def _what_to_ask_for(enumeration: Enumeration, plate: str) -> str:
    """The plates whose elements no latent outside of them ties together, as a hint."""
    fit = []
    for other in enumeration.all_plates:
        if other == plate:
            continue
        try:
            terms_by(enumeration, (other,))
        except PlateError:
            continue
        fit.append(f"'{other}'")
    return f"Ask for the whole, or by {' or '.join(fit)}." if fit else "Ask for the whole instead."
