"""What one enumeration of the programs says for a tree: draws, probabilities of data, terms of F, marginals."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vfe.energy.draws import Draws, draws_of
from pyro_vfe.energy.impossible import impossible_data
from pyro_vfe.energy.log_weights import without_draws
from pyro_vfe.energy.marginals import Marginals, posterior_marginals, q_marginals
from pyro_vfe.energy.parts import guide_graph
from pyro_vfe.energy.pointwise import Plates, log_joint_and_likelihood, terms_in_all_and_by
from pyro_vfe.energy.terms import NAMES, Terms
from pyro_vfe.engine.elimination import log_normalizer
from pyro_vfe.engine.factors import Table
from pyro_vfe.errors import StructureError
from pyro_vfe.program.enumeration import Enumeration


@dataclass(frozen=True, eq=False)
class Moment:
    """What is computed at one draw of w."""

    draws: Draws
    """Of the discrete latents."""
    log_likelihood: Tensor
    """log p(u_n | w) of each datum, discrete latents summed out."""
    log_joint: Tensor
    """log p(w, u), discrete latents summed out."""
    log_q: Tensor
    """log q(w), discrete latents summed out."""
    terms: Terms | None
    """Of F; None where they are refused."""
    data_terms: Terms | None
    """Of F, by datum; None where they are refused, or everything is one datum."""
    q: Marginals | None
    """Of each discrete latent under Q; None where they are refused."""
    posterior: Marginals
    """Of each discrete latent under the posterior."""


def moment(run: Enumeration, num_draws: int, plates: Plates, max_bytes: float | None) -> Moment:
    """Returns what is computed at one draw of w.

    Args:
        run: Enumerated programs, in float64.
        num_draws: How many draws of the discrete latents.
        plates: What the data are elements of.
        max_bytes: The most memory that tables may take.

    Raises:
        ImpossibleDataError: The data have probability zero under the model.
        StructureError: Latents that only the model has tie the elements of a plate of the guide's latents together.
    """
    log_joint, log_likelihood = log_joint_and_likelihood(without_draws(run), plates, max_bytes)
    if bool(log_joint.isneginf()):
        raise impossible_data(run)
    posterior = posterior_marginals((run,), max_bytes)
    terms, data_terms, q = _terms_and_marginals(run, plates, posterior, max_bytes)
    return Moment(
        draws=draws_of(run, num_draws, max_bytes),
        log_likelihood=log_likelihood,
        log_joint=log_joint,
        log_q=log_normalizer(guide_graph(run), max_bytes=max_bytes).total,
        terms=terms,
        data_terms=data_terms,
        q=q,
        posterior=posterior,
    )


def _terms_and_marginals(
    run: Enumeration, plates: Plates, posterior: Marginals, max_bytes: float | None
) -> tuple[Terms | None, Terms | None, Marginals | None]:
    try:
        # Where the guide has no latents, Q's are the posterior's.
        q = q_marginals((run,), max_bytes) if run.guide_latents else posterior
        return (*terms_in_all_and_by(run, plates, max_bytes), q)
    except StructureError:
        return None, None, None


class Averages:
    """Means over draws of w of what a moment says, one moment at a time."""

    def __init__(self) -> None:
        self.count = 0
        self.free_energies: list[Tensor] = []
        self._sums: dict[tuple[str, str], Tensor] = {}
        self._axes: dict[tuple[str, str], tuple[str, ...]] = {}
        self._refused: set[str] = set()

    def add(self, found: Moment) -> None:
        """Adds what is computed at one draw.

        Args:
            found: The moment.
        """
        self.count += 1
        if found.terms is not None:
            self.free_energies.append(found.terms.free_energy)
        self._add("terms", _named(found.terms))
        self._add("data_terms", _named(found.data_terms))
        self._add("q", None if found.q is None else {name: table.values for name, table in found.q.items()})
        self._add("posterior", {name: table.values for name, table in found.posterior.items()})
        for name, table in found.posterior.items():
            self._axes["posterior", name] = table.axes
        for name, table in (found.q or {}).items():
            self._axes["q", name] = table.axes

    def _add(self, group: str, values: Mapping[str, Tensor] | None) -> None:
        if values is None:
            self._refused.add(group)
            return
        for name, value in values.items():
            key = group, name
            self._sums[key] = self._sums[key] + value if key in self._sums else value

    def terms(self, group: str) -> dict[str, Tensor] | None:
        """Returns the mean terms of a group by name; None where they were refused.

        Args:
            group: 'terms' or 'data_terms'.
        """
        if group in self._refused:
            return None
        return {name: total / self.count for (own, name), total in self._sums.items() if own == group}

    def marginals(self, group: str) -> Marginals | None:
        """Returns the mean marginals of a group by site name; None where they were refused.

        Args:
            group: 'q' or 'posterior'.
        """
        if group in self._refused:
            return None
        return {
            name: Table(total / self.count, self._axes[own, name])
            for (own, name), total in self._sums.items()
            if own == group
        }

    @property
    def stderr(self) -> Tensor | None:
        """The standard error of F over draws; None where there is one."""
        if len(self.free_energies) < 2:
            return None
        spread: Tensor = torch.stack(self.free_energies).std()
        return spread / math.sqrt(len(self.free_energies))


def _named(terms: Terms | None) -> dict[str, Tensor] | None:
    if terms is None:
        return None
    return {"free_energy": terms.free_energy} | {name: getattr(terms, name) for name in NAMES}
