r"""The expected sufficient statistics of a model's sites, and the parameters that they determine.

    E_Q log P(v, u | theta)  =  sum_sites  sum_n  s_n . eta(p_n) - c_n A(p_n)  +  const        p_n = theta[index_n]

s and c are the gradients of F's expected log joint in eta and -A: sums of T(x) and of ones, weighted by Q. A slot of a
distribution that is a selection of a parameter's entries (the parameter itself, expanded, or indexed by a latent or by
data) is known by the index of each of its entries.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from pyro_vfe.program.families_forms import Family


@dataclass(frozen=True, eq=False)
class Selection:
    """What makes a tensor entries of one parameter: `tensor == parameter.flatten()[index]`."""

    parameter: str
    """The parameter's name in Pyro's store."""
    index: Tensor
    """For each entry of the tensor, which entry of the flattened parameter it is; int64."""
    through: Literal["itself", "sqrt"] = "itself"
    """What was done to the selected entries: nothing, or their square root was taken (a scale given as a variance)."""


@dataclass(frozen=True, eq=False)
class Slot:
    """One parameter of a distribution (loc, probs, ...), or the value of a site that a parameter gives."""

    values: Tensor
    """Its numbers, detached, without the repetitions of plates; `(*batch, *independent, *event)`."""
    selection: Selection | None
    """Which parameter's entries they are; None where they are no plain selection. Probabilities that a distribution
    normalises are those before."""
    depends_on: frozenset[str]
    """The parameters that they were computed from, by any operation; empty for a constant."""


@dataclass(frozen=True, eq=False)
class SiteStatistics:
    """What one site (or several equal ones) says about its distribution's parameters."""

    sites: tuple[str, ...]
    """The names of the sites."""
    family: Family
    """Their exponential family; a MarkovChain stands as two Categoricals, for its first step and for the others."""
    slots: Mapping[str, Slot]
    """The distribution's parameters by name, as they were given: probs or logits, scale_tril or covariance_matrix."""
    counts: Tensor
    """sum_n of Q's weight, float64, shape `(*batch, *independent)`: how many observations each entry has."""
    sums: Tensor
    """sum_n of Q's weight times T(x_n), float64, shape `(*batch, *independent, D)`, of x less the centre."""
    centre: Tensor | None
    """What was taken from x, and is to be taken from the location, `(*independent, *event)`; None for nothing."""


@dataclass(frozen=True, eq=False)
class PriorStatistics:
    """A site of the model whose value is a learned parameter: its prior."""

    site: str
    """The name of the site."""
    family: Family
    """Its exponential family."""
    value: Slot
    """The learned value."""
    slots: Mapping[str, Slot]
    """The parameters of the distribution; one may depend on another learned parameter (normal-inverse-gamma)."""
    weight: Tensor
    """How often the prior counts (its scale), float64, of a shape that broadcasts to the batch."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """All that one E-phase says about the parameters of a model."""

    sites: tuple[SiteStatistics, ...]
    priors: tuple[PriorStatistics, ...]
    indirect: Mapping[str, str]
    """Parameters without a closed form, with the reason in words: some site reads them in another way."""
