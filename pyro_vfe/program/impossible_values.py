"""Values of latents that are impossible, where the programs make distributions of numbers that are none.

    P(z = k) = 0        what reads z contributes nothing there, whatever its parameters are: log p(x | z = k) = -inf

An ordinary run never meets such a value, and an enumerated one makes it with all others. So where an enumerated run
fails, or has NaN, it is done once more without validation. Each distribution is validated then where it is possible,
and takes valid parameters elsewhere, so that no gradient is NaN. What is invalid at a possible value stays an error.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, constraints
from torch.distributions.utils import lazy_property

from pyro_vfe.engine.shapes import broadcast_shapes
from pyro_vfe.errors import SupportError, VFEError
from pyro_vfe.program.chain_sites import is_chain
from pyro_vfe.program.enumeration import Enumeration, SiteKey
from pyro_vfe.program.keeping import replaced
from pyro_vfe.program.layout import Layout
from pyro_vfe.program.log_prob import is_listed, listed, log_prob
from pyro_vfe.program.markov_chain import MarkovChain
from pyro_vfe.program.masking import unmasked
from pyro_vfe.program.provenance import Provenance
from pyro_vfe.program.recorder import Site
from pyro_vfe.program.supports import unwrapped


class InvalidError(ValueError):
    """A distribution is invalid at values that are possible."""


Ran = tuple[Enumeration, bool]
"""An enumeration, and whether it could share equal computations."""


def enumerated(layout: Layout, run: Callable[[Layout], Ran]) -> tuple[Layout, Ran]:
    """Returns an enumeration and its layout; without impossible values, where what is made at them has no numbers.

    Args:
        layout: The layout of the programs.
        run: Enumerates them.

    Raises:
        ValueError: They make distributions that are invalid at possible values.
    """
    ran, error = None, None
    try:
        ran = run(layout)
    except ValueError as failure:
        if isinstance(failure, VFEError) and not isinstance(failure, SupportError):
            raise
        error = failure
    if ran is not None and _has_numbers(ran[0]):
        return layout, ran
    unvalidated = replace(layout, unvalidated=True)
    try:
        again = run(unvalidated)
    except Exception:  # What the first run said is why.
        again = None
    if again is not None and _has_numbers(again[0]):
        return unvalidated, again
    if ran is not None:
        return layout, ran
    assert error is not None
    raise error


def _has_numbers(run: Enumeration) -> bool:
    tables = (table.values for factor in run.factors.values() for table in factor.tables)
    return run.portions is not None or not any(bool(values.isnan().any()) for values in tables)


def without_impossible(
    sites: Mapping[SiteKey, Site], layout: Layout, provenance: Provenance
) -> tuple[dict[SiteKey, Site], dict[SiteKey, Tensor]]:
    """Returns the sites of an unvalidated run with valid distributions, and where the impossible ones had none.

    Args:
        sites: As they ran, guide before model, with all values of the latents.
        layout: Where each latent is enumerated.
        provenance: Of the run.

    Raises:
        InvalidError: One is invalid at possible values.
    """
    found: dict[SiteKey, Site] = {}
    without: dict[SiteKey, Tensor] = {}
    impossible: dict[SiteKey, _Impossible] = {}
    for (role, name), site in sites.items():
        key = role, name
        reads = (site.reads(provenance) - {name}) & layout.dims.keys()
        around = [impossible[role, one].among(reads) for one in sorted(reads) if (role, one) in impossible]
        fn, bad = _valid(site.fn, around)
        found[key] = replace(site, fn=fn)
        if bad is not None:
            without[key] = bad
        if site.kind == "enumerated" and name in layout.dims:
            where = _impossible(found[key], layout.dims[name])
            for one in around:
                where = where | one
            impossible[key] = _Impossible(where, {latent: layout.dims[latent] for latent in (*reads, name)})
    return found, without


@dataclass(frozen=True, eq=False)
class _Impossible:
    """Where a latent has a value of probability zero."""

    where: Tensor
    """For each value, along the dims of it and of the latents that it reads."""
    dims: Mapping[str, int]
    """The dim of each of these; later latents may have the same."""

    def among(self, latents: Collection[str]) -> Tensor:
        """Where it is so whatever latents besides some are: these alone keep their dims."""
        where = self.where
        for latent, dim in self.dims.items():
            if latent not in latents and where.dim() >= -dim:
                where = where.all(dim, keepdim=True)
        return where


def nowhere(values: Tensor, where: Tensor | None, is_own: bool = False) -> Tensor:
    """Returns log-probabilities that are -inf at impossible values, whatever moves.

    Args:
        values: Log-probabilities.
        where: The impossible values; None where there are none.
        is_own: Whether the last dim of the log-probabilities is that of the site's own values.
    """
    if where is None:
        return values
    return values.masked_fill(where[..., None] if is_own else where, -torch.inf)


def invalid(fn: Any) -> Tensor:
    """Returns where a distribution has parameters that break its constraints, over its batch.

    Args:
        fn: A distribution of torch or Pyro.
    """
    if type(fn).__name__ in ("ExpandedDistribution", "MaskedDistribution"):
        return invalid(fn.base_dist).expand(fn.batch_shape)
    if isinstance(fn, Independent):
        inner = invalid(fn.base_dist)
        return inner.flatten(len(fn.batch_shape)).any(-1) if fn.reinterpreted_batch_ndims else inner
    found = torch.zeros(fn.batch_shape, dtype=torch.bool)
    for name, constraint in fn.arg_constraints.items():
        if name not in vars(fn) and isinstance(getattr(type(fn), name, None), lazy_property):
            continue  # made of another one
        value = getattr(fn, name)
        if not isinstance(value, Tensor):
            continue
        if constraints.is_dependent(constraint):
            kept = min(value.dim(), len(fn.batch_shape))
            broken = value.isnan().reshape(*value.shape[:kept], -1).any(-1)
        else:
            broken = ~constraint.check(value)
        found = found.to(broken.device) | broken
    return found


def _valid(fn: Any, impossible: list[Tensor]) -> tuple[Any, Tensor | None]:
    """The distribution with valid parameters at impossible values, and where they were not."""
    if type(fn).__name__ in ("ExpandedDistribution", "MaskedDistribution"):
        base, bad = _valid(fn.base_dist, impossible)
        return _with(fn, base_dist=base), bad
    if isinstance(fn, Independent):
        inner = [where[(..., *(None,) * fn.reinterpreted_batch_ndims)] for where in impossible]
        base, bad = _valid(fn.base_dist, inner)
        if bad is not None and fn.reinterpreted_batch_ndims:
            bad = bad.flatten(len(fn.batch_shape)).any(-1)
        return _with(fn, base_dist=base), bad
    bad = invalid(fn)
    if not bool(bad.any()):
        return _with(fn), None
    where = torch.zeros_like(bad)
    for one in impossible:
        where = where | _everywhere(one.to(bad.device), bad.shape)
    if bool((bad & ~where).any()) or bool(bad.all()) or isinstance(fn, MarkovChain):
        raise InvalidError(f"{type(fn).__name__} has invalid parameters at possible values")
    valid, made = tuple((~bad).nonzero()[0].tolist()), {}

    def filled(tensor: Tensor) -> Tensor:
        if tensor.shape[: bad.dim()] != bad.shape:
            return tensor
        if id(tensor) not in made:  # one tensor may have two names, by which a family knows what it was given
            events = bad.reshape(bad.shape + (1,) * (tensor.dim() - bad.dim()))
            made[id(tensor)] = torch.where(events, tensor[valid], tensor)
        return made[id(tensor)]

    result = _with(replaced(fn, filled))
    if bool(invalid(result).any()):
        raise InvalidError(f"{type(fn).__name__} has parameters that are not known to be of its batch")
    return result, bad


def _with(fn: Any, **changed: Any) -> Any:
    """A copy of a distribution that validates what it scores."""
    result = object.__new__(type(fn))
    result.__dict__.update({**vars(fn), "_validate_args": True, **changed})
    return result


def _impossible(site: Site, dim: int) -> Tensor:
    """Where a latent has a value of probability zero, given those that it reads, its values along its own dim."""
    fn, mask = unmasked(site)
    with torch.no_grad():
        if is_chain(site):
            values = _along(_reached(unwrapped(fn)), dim)
        elif is_listed(fn):
            values = _along(listed(fn), dim)
        else:
            values = log_prob(fn, site.value)
    found = values.isneginf() & (torch.as_tensor(site.scale, device=values.device) > 0)
    return found if mask is None else found & torch.as_tensor(mask, device=found.device)


def _reached(chain: MarkovChain) -> Tensor:
    """Minus infinity for each step and state of a chain that no path leads to, 0 elsewhere, shape `(*batch, T, K)`."""
    reached, leads = ~chain.log_initial().isneginf(), ~chain.log_transition().isneginf()
    steps = [reached]
    for step in range(chain.num_steps - 1):
        reached = (steps[-1][..., None] & leads[..., min(step, leads.shape[-3] - 1), :, :]).any(-2)
        steps.append(reached)
    whole = torch.stack(torch.broadcast_tensors(*steps), -2)
    return torch.zeros(whole.shape, device=whole.device).masked_fill(~whole, -torch.inf)


def _along(values: Tensor, dim: int) -> Tensor:
    """A table `(*batch, K)` with its last dim among those of the batch, where it has none of its own."""
    batch = values.shape[:-1]
    padded = values.reshape((1,) * (-dim - len(batch)) + tuple(values.shape))
    return padded.transpose(dim - 1, -1).squeeze(-1)


def _everywhere(where: Tensor, shape: torch.Size) -> Tensor:
    """Whether something holds for all elements along the dims that a shape lacks."""
    whole = where.expand(broadcast_shapes(where.shape, shape))
    return (~whole).long().sum_to_size(shape) == 0
