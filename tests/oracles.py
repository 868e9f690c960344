r"""The full joint table: every answer of the library, by brute force, in float64.

    F         =  sum_v Q(v) [ log Q(v) - log P(v, u) ]        P(v, u): summed over the latents that only the model has
    surprise  =  -log sum_v P(v, u)
    gap       =  F - surprise,    energy = F + entropy,    accuracy = complexity - F

The guide and the model are run ordinarily once per joint assignment of their discrete latents, every plate element
apart. A run meets its sites in its own order, so the assignments form a tree, and a program that branches counts each
path once. Nothing here comes from the library, from Pyro's enumeration or from a clamped log_prob.

What "prior" and "data" mean: the prior is the product of the latents' probabilities; every observed site, pyro.factor
included, is data. A masked datum contributes 0. A masked latent of the model alone keeps its prior, which sums to 1.
A latent element that the guide masks is masked in the model too: it stays at its first value, at log-probability 0.
In a scaled plate, log P(v, u) = log sum over what is outside of exp( log outside + sum_b scale_b log sum inside_b ).
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import pyro
import torch
from joint_table import Element, Row, enumerate_runs
from torch import Tensor

TERMS = ("energy", "entropy", "free_energy", "surprise", "gap", "accuracy", "complexity")


def log_sum_exp(log_probs: Iterable[Tensor]) -> Tensor:
    """Log of the sum, -inf with no gradient when every part is -inf."""
    stacked = torch.stack(list(log_probs))
    return stacked.logsumexp(0) if (stacked > -torch.inf).any() else torch.tensor(-torch.inf)


def _distinct(rows: Iterable[Row]) -> list[Row]:
    return list({frozenset(row.assignment.items()): row for row in rows}.values())


def _log_mass(rows: Sequence[Row], scaled_plate: str | None = None, of_prior: bool = False) -> Tensor:
    if scaled_plate is None:
        return log_sum_exp(row.log_mass(of_prior) for row in rows)
    scales = scales_of(rows, scaled_plate)
    by_outside: dict[Hashable, list[Row]] = defaultdict(list)
    for row in rows:
        by_outside[frozenset(row.outside(scaled_plate).assignment.items())].append(row)
    log_masses = []
    for group in by_outside.values():
        log_mass = group[0].outside(scaled_plate).log_mass(of_prior)
        for index, scale in enumerate(scales):
            inside = _distinct(row.inside(scaled_plate, index) for row in group)
            log_mass = log_mass + scale * log_sum_exp(row.log_mass(of_prior) for row in inside)
        log_masses.append(log_mass)
    return log_sum_exp(log_masses)


def scales_of(rows: Sequence[Row], plate: str) -> list[float]:
    """The scale of every index of the plate, which all its factors must share."""
    found: list[float] = []
    for site in rows[0].sites.values():
        if plate in site.plate_dims:
            by_index = site.scale.expand(site.log_prob.shape).movedim(site.plate_dims[plate], 0)
            scales = [float(at_index.reshape(-1)[0]) for at_index in by_index]
            if found not in ([], scales):
                raise ValueError(f"the factors of one datum of plate '{plate}' differ in scale")
            found = scales
    return found


def matches(guide: Sequence[Row], model: Sequence[Row]) -> list[tuple[list[Row], list[Row]]]:
    """Groups: guide rows that agree on what the model has, with all model rows that agree with them."""
    by_domain: dict[frozenset[Element], dict[Hashable, list[Row]]] = {}
    groups: dict[Hashable, tuple[list[Row], list[Row]]] = {}
    for row in guide:
        domain = frozenset(row.assignment)
        if domain not in by_domain:
            table = by_domain[domain] = defaultdict(list)
            for other in model:
                table[frozenset((e, v) for e, v in other.assignment.items() if e in domain)].append(other)
        domains = {domain.intersection(other.assignment) for other in model}
        keys = [frozenset((e, row.assignment[e]) for e in shared) for shared in domains]
        keys = [key for key in keys if key in by_domain[domain]]
        if len(keys) != 1:
            raise ValueError("a guide run agrees with model runs that use different sites of it")
        groups.setdefault(keys[0], ([], by_domain[domain][keys[0]]))[0].append(row)
    return list(groups.values())


def terms_of(guide: Sequence[Row], model: Sequence[Row], scaled_plate: str | None = None) -> dict[str, Tensor]:
    """Returns the seven terms of a guide's and a model's rows, scalars in nats that carry gradients."""
    energy = entropy = complexity = torch.zeros(())
    for guide_rows, model_rows in matches(guide, model):
        q = _log_mass(guide_rows).exp()
        if q == 0:
            continue
        log_q = _log_mass(guide_rows, scaled_plate)
        energy = energy - q * _log_mass(model_rows, scaled_plate)
        entropy = entropy - q * log_q
        complexity = complexity + q * (log_q - _log_mass(model_rows, scaled_plate, of_prior=True))
    free_energy = energy - entropy
    surprise = -_log_mass(model, scaled_plate)
    gap, accuracy = free_energy - surprise, complexity - free_energy
    return dict(zip(TERMS, (energy, entropy, free_energy, surprise, gap, accuracy, complexity), strict=True))


@dataclass(frozen=True, eq=False)
class Posterior:
    """P(v | u) of every latent element, from the model's rows."""

    rows: list[Row]
    """The model's full joint table."""

    @cached_property
    def log_evidence(self) -> Tensor:
        """Log p(u), a scalar in nats."""
        return _log_mass(self.rows).detach()

    @cached_property
    def probs(self) -> Tensor:
        """The probability of each row, shape `(rows,)`."""
        return (torch.stack([row.log_mass().detach() for row in self.rows]) - self.log_evidence).exp()

    def marginal(self, *sites: str) -> Tensor:
        """The joint marginal of sites where a run has them all, shape `(*plates, K_1, ..., K_n)`, in support order."""
        shapes = [next(row.sites[site].log_prob.shape for row in self.rows if site in row.sites) for site in sites]
        batch = torch.broadcast_shapes(*shapes)
        flat = [torch.arange(prod(shape)).reshape(shape).expand(batch).reshape(-1).tolist() for shape in shapes]
        sizes = [
            1 + max(v for row in self.rows for (name, _), v in row.assignment.items() if name == site) for site in sites
        ]
        table = torch.zeros(prod(batch), *sizes)
        for row, prob in zip(self.rows, self.probs, strict=True):
            for i in range(prod(batch)):
                elements = [(site, element[i]) for site, element in zip(sites, flat, strict=True)]
                if row.assignment.keys() >= set(elements):
                    table[(i, *(row.assignment[element] for element in elements))] += prob
        return table.reshape(*(size for size in batch if size > 1), *sizes)

    def entropy(self) -> Tensor:
        """H[P(v | u)]."""
        return -torch.xlogy(self.probs, self.probs).sum()

    def mode(self) -> Row:
        """The most probable row (the first of equals)."""
        return self.rows[int(self.probs.argmax())]

    def log_prob(self, values: dict[str, Tensor]) -> Tensor:
        """Log P(v | u) of the row with these values."""
        for row in self.rows:
            same = (torch.equal(value, values[name].to(value)) for name, value in row.values.items() if name in values)
            if row.values.keys() <= values.keys() and all(same):
                return row.log_mass().detach() - self.log_evidence
        raise KeyError("no row has these values")


@dataclass(frozen=True, eq=False)
class Oracle:
    """All that the full joint table knows of a model and a guide."""

    guide: list[Row]
    """The guide's rows; one empty row for an empty guide."""

    model: list[Row]
    """The model's rows."""

    scaled_plate: str | None
    """The plate that carries a scale, if any."""

    @cached_property
    def terms(self) -> dict[str, Tensor]:
        """The seven terms, scalars in nats."""
        return terms_of(self.guide, self.model, self.scaled_plate)

    @cached_property
    def posterior(self) -> Posterior:
        """P(v | u)."""
        return Posterior(self.model)

    def gradients(self, term: str = "free_energy") -> dict[str, Tensor]:
        """The gradient of a term by every parameter in the store, unconstrained; 0 where it does not matter."""
        return gradients(self.terms[term])

    def by(self, plate: str) -> dict[str, Tensor]:
        """The seven terms of each index of a plate with no latent outside it, unscaled, each of shape `(size,)`."""
        sites = [site for site in self.model[0].sites.values() if site.is_in(plate)]
        if plate in sites[0].plate_dims:
            size = sites[0].log_prob.shape[sites[0].plate_dims[plate]]
        else:
            size = 1 + max(site.plate_steps[plate] for site in sites)
        tables = []
        for index in range(size):
            guide, model = (_distinct(row.inside(plate, index) for row in rows) for rows in (self.guide, self.model))
            tables.append(terms_of(guide, model))
        return {name: torch.stack([table[name] for table in tables]) for name in TERMS}


def oracle(
    model: Callable[..., Any], guide: Callable[..., Any], *args: Any, scaled_plate: str | None = None, **kwargs: Any
) -> Oracle:
    """Returns the full joint tables of a guide and a model."""
    pinned: set[Element] = set()
    guide_rows = enumerate_runs(guide, *args, pinned=pinned, is_guide=True, **kwargs)
    return Oracle(guide_rows, enumerate_runs(model, *args, pinned=pinned, **kwargs), scaled_plate)


def gradients(value: Tensor) -> dict[str, Tensor]:
    """Returns the gradient of a scalar by every parameter in Pyro's store, unconstrained."""
    named = dict(pyro.get_param_store().named_parameters())
    if not named or not value.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in named.items()}
    found = torch.autograd.grad(value, list(named.values()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(named.items(), found, strict=True)
    }
