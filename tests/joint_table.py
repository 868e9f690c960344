"""One ordinary run per joint assignment of a program's discrete latents: the rows of its full joint table.

A run meets its sites in its own order, so the assignments form a tree: after each run the last choice that has another
value left takes it. A program that branches counts each path once.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import pyro
import torch
from exact_log_prob import exact_log_prob, support_of
from pyro.poutine.messenger import Messenger
from torch import Tensor

Element = tuple[str, int]
"""A latent site and the flat index of one element of its batch shape."""

Assignment = dict[Element, int]
"""Which value of its support every latent element has."""

MAX_ASSIGNMENTS = 20_000


@dataclass(frozen=True, eq=False)
class ScoredSite:
    """One site of one ordinary run, with its exact unscaled log-probability."""

    log_prob: Tensor
    """Shape of the site's batch; masked elements are 0."""

    is_latent: bool
    """Whether the site was set by the assignment (the prior) or observed (the data)."""

    plate_dims: dict[str, int]
    """The batch dim of each vectorised plate around the site."""

    plate_steps: dict[str, int]
    """The step of each sequential plate around the site."""

    scale: Tensor
    """Pyro's scale of the site, broadcastable to log_prob."""

    def is_in(self, plate: str) -> bool:
        """Whether the site is in the plate."""
        return plate in self.plate_dims or plate in self.plate_steps

    def index_of(self, flat: int, plate: str) -> int:
        """The plate index of the site's flat batch element."""
        if plate in self.plate_steps:
            return self.plate_steps[plate]
        return int(torch.unravel_index(torch.tensor(flat), self.log_prob.shape)[self.plate_dims[plate]])

    def at(self, plate: str, index: int) -> Tensor | None:
        """The site's log-probability at one index of the plate, None where the site is not there."""
        if plate in self.plate_steps:
            return self.log_prob.sum() if self.plate_steps[plate] == index else None
        return self.log_prob.select(self.plate_dims[plate], index).sum()


@dataclass(frozen=True, eq=False)
class Row:
    """One joint assignment with the log-probabilities that one ordinary run gave it."""

    assignment: Assignment
    """The chosen value of every latent element."""

    sites: dict[str, ScoredSite]
    """All sites of the run."""

    values: dict[str, Tensor]
    """The values of the latent sites."""

    @cached_property
    def log_joint(self) -> Tensor:
        """The log-probability of the run."""
        return _total(site.log_prob for site in self.sites.values())

    @cached_property
    def log_prior(self) -> Tensor:
        """The log-probability of its latents alone."""
        return _total(site.log_prob for site in self.sites.values() if site.is_latent)

    def log_mass(self, of_prior: bool = False) -> Tensor:
        """One or the other."""
        return self.log_prior if of_prior else self.log_joint

    def inside(self, plate: str, index: int) -> "Row":
        """The row of one plate index: what the run did there, as a run of its own."""
        sites = {}
        for name, site in self.sites.items():
            log_prob = site.at(plate, index) if site.is_in(plate) else None
            if log_prob is not None:
                sites[name] = ScoredSite(log_prob, site.is_latent, {}, {}, site.scale)
        return Row({e: v for e, v in self.assignment.items() if self._index(e, plate) == index}, sites, {})

    def outside(self, plate: str) -> "Row":
        """The row of what is not in the plate."""
        sites = {name: site for name, site in self.sites.items() if not site.is_in(plate)}
        return Row({e: v for e, v in self.assignment.items() if e[0] in sites}, sites, {})

    def _index(self, element: Element, plate: str) -> int | None:
        site = self.sites[element[0]]
        return site.index_of(element[1], plate) if site.is_in(plate) else None


def _total(log_probs: Iterable[Tensor]) -> Tensor:
    return sum((log_prob.sum() for log_prob in log_probs), torch.zeros(()))


class _Assign(Messenger):
    """Sets every discrete latent of a run: by the script as far as it goes, then to the first value."""

    def __init__(self, script: list[int], pinned: set[Element]) -> None:
        super().__init__()
        self.script, self.pinned = script, pinned
        self.assignment: Assignment = {}
        self.sizes: list[int] = []
        self.supports: dict[str, Tensor] = {}
        self.masked: set[Element] = set()

    def _pyro_sample(self, message: Any) -> None:
        if message["is_observed"] or type(message["fn"]).__name__ == "_Subsample":
            return
        name, fn = message["name"], message["fn"]
        support = self.supports[name] = support_of(fn)
        mask = torch.as_tensor(True if message["mask"] is None else message["mask"]).expand(fn.batch_shape).reshape(-1)
        indices = [self._choose((name, i), len(support), bool(mask[i])) for i in range(prod(fn.batch_shape))]
        message["value"] = support[torch.tensor(indices)].reshape(fn.batch_shape + fn.event_shape)
        message["infer"] = dict(message["infer"], assigned=True)
        message["done"] = True

    def _choose(self, element: Element, size: int, unmasked: bool) -> int:
        if not unmasked:
            self.masked.add(element)
        if element in self.pinned:
            if unmasked:
                raise ValueError(f"the guide masks element {element}, the model does not")
            return 0
        position = len(self.sizes)
        if position == len(self.script):
            self.script.append(0)
        self.sizes.append(size)
        self.assignment[element] = self.script[position]
        return self.script[position]


def _next_script(script: list[int], sizes: list[int]) -> list[int] | None:
    for position in reversed(range(len(sizes))):
        if script[position] + 1 < sizes[position]:
            return [*script[:position], script[position] + 1]
    return None


def enumerate_runs(
    program: Callable[..., Any], *args: Any, pinned: set[Element] | None = None, is_guide: bool = False, **kwargs: Any
) -> list[Row]:
    """Returns one row per joint assignment of the program's discrete latents.

    Args:
        program: A model or guide whose latents all have finite support.
        pinned: Elements held at their first value with log-probability 0; collected here when the program is a guide.
        is_guide: Whether masked latents are to be pinned, which adds them to `pinned`.
    """
    pinned = set() if pinned is None else pinned
    rows: list[Row] = []
    script: list[int] | None = []
    with pyro.validation_enabled(False):
        while script is not None:
            assign = _Assign(script, pinned)
            trace = pyro.poutine.trace(assign(program)).get_trace(*args, **kwargs)
            if is_guide and not assign.masked <= pinned:
                pinned |= assign.masked
                rows, script = [], []
                continue
            rows.append(_row(trace, assign, pinned))
            script = _next_script(assign.script, assign.sizes)
            if len(rows) > MAX_ASSIGNMENTS:
                raise ValueError(f"more than {MAX_ASSIGNMENTS} assignments: give this program another oracle")
    return rows


def _row(trace: Any, assign: _Assign, pinned: set[Element]) -> Row:
    sites: dict[str, ScoredSite] = {}
    values: dict[str, Tensor] = {}
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or type(node["fn"]).__name__ == "_Subsample":
            continue
        is_latent = bool(node["infer"].get("assigned"))
        log_prob = exact_log_prob(node["fn"], node["value"])
        if is_latent:
            values[name] = node["value"]
            if pinned:
                keep = torch.tensor([(name, i) not in pinned for i in range(log_prob.numel())], dtype=torch.bool)
                log_prob = torch.where(keep.reshape(log_prob.shape), log_prob, 0.0)
        elif node["mask"] is not None:
            log_prob = torch.where(torch.as_tensor(node["mask"]), log_prob, 0.0)
        frames = node["cond_indep_stack"]
        sites[name] = ScoredSite(
            log_prob,
            is_latent,
            {frame.name: frame.dim for frame in frames if frame.vectorized},
            {frame.name: frame.counter - 1 for frame in frames if not frame.vectorized},
            torch.as_tensor(node["scale"], dtype=log_prob.dtype),
        )
    return Row(assign.assignment, sites, values)
