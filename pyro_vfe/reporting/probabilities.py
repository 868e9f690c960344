r"""What is known of a latent's values, from whatever knows it, in arrays for pictures.

    Q(v_i)        of a Decomposition             P(v_i | u)        of a Posterior, or of a Decomposition beside its Q

A latent of a Python loop has one site per step (`z_0`, `z_1`, ...): a list of sites, or a pattern such as `z_{}`, is
read as one latent along the steps.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pyro_vfe.energy.decomposition import Decomposition
from pyro_vfe.energy.posterior import Posterior
from pyro_vfe.engine.factors import Table
from pyro_vfe.errors import PlateKeptError, ProbabilityError, ShapeError, VFEError
from pyro_vfe.program.enumeration import Enumeration
from pyro_vfe.reporting.palette import Numbers, array, article, shortened, signed_minus
from pyro_vfe.reporting.variables import is_one_hot

Sites = str | Sequence[str]
"""One site, a pattern with `{}` for the step's number, or the sites of the steps in order."""

Q_NAME = "Q"
POSTERIOR_NAME = "exact posterior"

_ABSENT = "absent"
"""What is said of a latent where it is not there."""

_STEP = "step"
"""The axis along the sites of a Python loop."""

_SYMBOL = 16
"""The most letters of a latent in a legend."""

_TOLERANCE = 1e-3
"""By how much probabilities given by the user, perhaps in float32, may miss the sum of one."""


@dataclass(frozen=True, eq=False)
class Probabilities:
    """The probabilities of a latent's values, for every element of its plates."""

    values: Numbers
    """Shape `(*plates, K)`."""
    plates: tuple[str, ...]
    """The name of each leading dim."""
    labels: tuple[str, ...]
    """The latent's values in words, K of them."""
    site: str
    """The latent, in words: 'v', or 'v_0 to v_9' of a loop."""
    symbol: str
    """The latent in few letters: 'v'."""
    name: str
    """Whose probabilities they are: 'Q' or 'exact posterior'; empty where nobody says."""
    is_sequence: bool
    """Whether the order of the elements has a meaning: those of a chain or of a loop."""

    @property
    def rows(self) -> Numbers:
        """The same as a matrix, shape `(N, K)`: the last plate runs fastest."""
        return self.values.reshape(-1, self.values.shape[-1])


def known_sets(source: object, site: Sites) -> tuple[Probabilities, ...]:
    """Returns what is known of a latent: Q and the exact posterior of a decomposition, or a posterior alone.

    Args:
        source: A Decomposition or a Posterior.
        site: The latent.

    Raises:
        VFEError: The source is something else, or knows no such site.
        PlateKeptError: The decomposition is of a Q that no guide gave.
        ShapeError: The sites of a list differ in their shape.
    """
    if isinstance(source, Posterior):
        return (_of_posterior(source, site),)
    if not isinstance(source, Decomposition):
        raise VFEError(
            f"Marginals are those of a Decomposition or of a Posterior, and this is {article(source)}.",
            hint="Pass vfe.FreeEnergy().decompose(model, guide, ...) or vfe.posterior(model, ...).",
        )
    of_q = _of_q(source, site)
    return of_q, _named(source.posterior_tables, source.runs, site, POSTERIOR_NAME)


def probabilities(source: object, site: Sites) -> Probabilities:
    """Returns one set of probabilities: Q's of a decomposition, a posterior's, or those of a tensor.

    Args:
        source: A Decomposition, a Posterior, or numbers of shape `(*plates, K)`.
        site: The latent; a tensor's is only named by it.

    Raises:
        VFEError: The source is something else, or knows no such site.
        ProbabilityError: The numbers do not sum to one, or are negative.
        ShapeError: The numbers are no table.
    """
    if isinstance(source, Posterior):
        return _of_posterior(source, site)
    if isinstance(source, Decomposition):
        return _of_q(source, site)
    if not isinstance(source, Tensor | np.ndarray | list | tuple):
        raise VFEError(
            f"Probabilities are those of a Posterior, a Decomposition or a tensor, and this is {article(source)}.",
            hint="Pass vfe.posterior(model, ...), or vfe.FreeEnergy().decompose(model, guide, ...) for those of Q.",
        )
    values = array(source)
    name = site if isinstance(site, str) else "latent"
    _check_probabilities(values, name)
    plates = tuple(f"dim {dim}" for dim in range(values.ndim - 1))
    labels = tuple(map(str, range(values.shape[-1])))
    return Probabilities(values, plates, labels, name, name, "", is_sequence=False)


def state_labels(probs: Probabilities) -> list[str]:
    """Returns the values of a latent as a legend says them, such as 'v = 0'.

    Args:
        probs: Of the latent.
    """
    return [f"{shortened(probs.symbol, _SYMBOL)} = {label}" for label in probs.labels]


def elements(probs: Probabilities) -> Numbers:
    """Returns probabilities of a latent with one plate, shape `(N, K)`.

    Args:
        probs: Of any latent; plates of one element do not count.

    Raises:
        ShapeError: It has more plates.
    """
    sizes = {plate: size for plate, size in zip(probs.plates, probs.values.shape, strict=False) if size > 1}
    if len(sizes) > 1:
        plates = " and ".join(f"'{plate}' ({size})" for plate, size in sizes.items())
        raise ShapeError(
            f"Latent '{probs.site}' has several plates: {plates}. This picture is of one.",
            hint=f"Take the rest at one element, such as vfe.posterior(model, ...).marginal('{probs.site}')[0].",
        )
    return probs.rows


def _of_posterior(posterior: Posterior, site: Sites) -> Probabilities:
    tables = posterior.marginal_tables(_sites(posterior.sites, site))
    return _named(tables, (posterior.enumeration,), site, POSTERIOR_NAME)


def _of_q(terms: Decomposition, site: Sites) -> Probabilities:
    if not terms.runs:
        raise PlateKeptError(
            "These terms are of a Q that was computed from the model, and say nothing of single latents.",
            hint="Pass vfe.posterior(model, ...): an exact E-phase ends there.",
        )
    return _named(terms.q_tables, terms.runs, site, Q_NAME)


def _sites(known: Collection[str], site: Sites) -> tuple[str, ...]:
    """The sites that are meant, in order."""
    if not isinstance(site, str):
        sites = tuple(site)
    elif "{}" in site and site not in known:
        pattern = re.compile(re.escape(site).replace(re.escape("{}"), r"(\d+)"))
        found = {int(hit[1]): name for name in known if (hit := pattern.fullmatch(name))}
        sites = tuple(found[step] for step in sorted(found)) or (site,)
    else:
        sites = (site,)
    for name in sites:
        if name not in known:
            names = shortened(", ".join(f"'{other}'" for other in known), 200)
            raise VFEError(
                f"'{name}' is no enumerated latent here.",
                hint=f"There are: {names}. The sites of a loop are one latent as a pattern, such as 'z_{{}}'."
                if known
                else "There are none at all.",
            )
    return sites


def _named(tables: Mapping[str, Table], runs: Sequence[Enumeration], site: Sites, name: str) -> Probabilities:
    """The tables of one site, or of the sites of a loop one after the other."""
    sites = _sites(tables, site)
    optional = any(("model", own) in run.presence or own not in run.supports for own in sites for run in runs)
    known = [next(run for run in runs if own in run.supports) for own in sites]
    parts = [_one(tables[own], run, own, name, optional) for own, run in zip(sites, known, strict=True)]
    if isinstance(site, str) and len(sites) == 1 and sites[0] == site:
        return parts[0]
    _check_alike(sites, bool(parts) and all(part.values.shape == parts[0].values.shape for part in parts))
    first = parts[0]
    title = f"{sites[0]} to {sites[-1]}" if len(sites) > 1 else sites[0]
    symbol = _common_start(sites).rstrip("_0123456789") or title
    stacked = np.stack([part.values for part in parts], axis=first.values.ndim - 1)
    plates = (*first.plates, _STEP)
    return replace(first, values=stacked, plates=plates, site=title, symbol=symbol, is_sequence=True)


def _common_start(names: Sequence[str]) -> str:
    """What all names begin with."""
    first, last = min(names), max(names)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:same]


def _check_alike(sites: Sequence[str], alike: bool) -> None:
    if not alike or not sites:
        raise ShapeError(
            f"The sites {shortened(', '.join(sites) or 'of an empty list', 60)} are no steps of one latent: they differ"
            " in their plates or values.",
            hint="Pass the names of sites that are alike.",
        )


def _one(table: Table, run: Enumeration, site: str, name: str, optional: bool) -> Probabilities:
    """One site's; where it is not always there, that it is not is one more value."""
    plates = tuple(axis for axis in table.axes if axis != site)
    values = array(table.aligned((*plates, site)))
    assert np.isfinite(values).all(), "marginals of an impossible or undefined sum are refused where they are made"
    chains = {variable.chain for variable in run.variables.values()}
    support = run.supports[site]
    labels = tuple(map(str, range(len(support)))) if is_one_hot(support) else tuple(map(_value, support))
    if optional:
        values = np.concatenate([values, np.clip(1.0 - values.sum(-1, keepdims=True), 0.0, 1.0)], -1)
        labels = (*labels, _ABSENT)
    return Probabilities(values, plates, labels, site, site, name, is_sequence=not chains.isdisjoint(plates))


def _value(value: Tensor) -> str:
    """A value of a support in few letters."""
    if value.dim() == 0:
        return signed_minus(f"{float(value):g}")
    flat = [f"{float(entry):g}" for entry in value.reshape(-1)]
    one_digit = all(len(entry) == 1 for entry in flat)
    return shortened("".join(flat) if one_digit else "(" + ", ".join(map(signed_minus, flat)) + ")", 16)


def _check_probabilities(values: Numbers, name: str) -> None:
    if values.ndim == 0 or values.shape[-1] == 0 or values.size == 0:
        raise ShapeError(
            f"The probabilities of '{name}' have the shape {values.shape}.", hint="Give them the shape (N, K)."
        )
    off = np.abs(values.sum(-1) - 1.0)
    if not (np.isfinite(values).all() and (values >= -_TOLERANCE).all() and (off <= _TOLERANCE).all()):
        raise ProbabilityError(
            f"The probabilities of '{name}' are negative, not finite, or do not sum to 1 over the last dim "
            f"(shape {values.shape}).",
            hint="Pass the probabilities of the K values in the last dim, not logits.",
        )


def most_probable(posterior: Posterior, site: Sites) -> Numbers:
    """Returns the indices of the values that a latent has on the most probable joint assignment, shape `(T,)`.

    Where it is not there, that is the last of its values.

    Args:
        posterior: The exact posterior.
        site: The latent; one value per step.
    """
    sites = _sites(posterior.sites, site)
    best = posterior.mode()
    found = []
    for name in sites:
        support = posterior.support(name)
        values = best[name].reshape(-1, *support.shape[1:])
        same = (values.unsqueeze(1) == support).reshape(len(values), len(support), -1).all(-1)
        index = same.to(torch.int64).argmax(-1)
        found.append(array(torch.where(best.present(name).reshape(-1), index, len(support))))
    return np.concatenate(found)
