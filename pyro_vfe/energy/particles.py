"""Particles: draws of all latents of a guide, and what each is worth.

They are drawn side by side, in a plate of their own, where the programs allow it: where a particle among others has the
log weight that it has alone. Otherwise the programs run once for each.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_vfe.energy.log_weights import LogWeights, check_constant, log_weights, weighed_data
from pyro_vfe.engine.cost import table_limit
from pyro_vfe.errors import CostError, VFEError
from pyro_vfe.program.buffers import unchanged_buffers
from pyro_vfe.program.data import Data
from pyro_vfe.program.drawn_guide import DrawnGuide, of_the_guide_alone, ordinary_sites
from pyro_vfe.program.enumeration import PARTICLES, Enumeration, is_random
from pyro_vfe.program.layout import Program
from pyro_vfe.program.programs import Check, Programs
from pyro_vfe.program.recorder import Site

_CHUNK_BYTES = 2**27
"""About as much as the values and log-probabilities of particles side by side take; more is not faster."""

_ITEM_BYTES = 8


@dataclass(frozen=True, eq=False)
class Particles:
    """Particles of one guide, or a particle of other origin."""

    weights: LogWeights
    """Their log weights."""
    data: Data
    """What the data are."""
    first: Enumeration
    """The run of the first, by itself."""
    ruled_out: tuple[str, ...]
    """Sites of the model that gave some particle probability zero."""


@dataclass(eq=False)
class Sampler:
    """A model and a guide at their arguments, to draw particles from."""

    model: Program
    guide: Program
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    check: Check = "first"
    max_bytes: float | None = None
    subsamples: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._programs = Programs(check=self.check, max_bytes=self.max_bytes, weighs_data=True)
        self._guide = DrawnGuide(self.guide)

    @torch.no_grad()
    def particles(self, count: int) -> Particles:
        """Returns particles drawn from the guide.

        Args:
            count: How many.
        """
        with unchanged_buffers(self.model, self.guide):
            return self._drawn(count)

    def _drawn(self, count: int) -> Particles:
        first = self._alone()
        runs = _Found(first, self.max_bytes)
        side_by_side = count > 2 and not any(site.controls for site in first.sites.values())
        side_by_side = side_by_side and not self._guide.summed
        if not any(is_random(site) for site in drawn_sites(first).values()):
            return runs.particles(repeats=count)
        size = max(1, min(count - 1, self._chunk_bytes() // _bytes_of(first)))
        while runs.count < count:
            chunk = min(size, count - runs.count)
            if not side_by_side or chunk == 1:
                runs.add(self._alone())
                continue
            try:
                found = self._together(chunk, checked=runs.count > 1)
            except CostError:
                size = max(1, size // 2)
                continue
            except VFEError:
                found = None
            if found is None:
                side_by_side = False
            else:
                runs.append(*found)
        return runs.particles()

    @torch.no_grad()
    def given(self, values: Mapping[str, Tensor]) -> Particles:
        """Returns one particle of given values.

        Args:
            values: The values of the latents that guide and model have.
        """
        with unchanged_buffers(self.model, self.guide):
            return _Found(self._alone(values), self.max_bytes).particles()

    def _alone(self, values: Mapping[str, Tensor] | None = None) -> Enumeration:
        """A run of one particle: first an ordinary one, to draw it and to see which latents both programs have."""
        self._guide.values, self._guide.summed = values or {}, frozenset()
        guide, model = ordinary_sites(self.model, self._guide, self.args, self.kwargs, self.subsamples)
        self._guide.summed = of_the_guide_alone(guide, model)
        drawn = {name: site.value for name, site in guide.items() if is_random(site)}
        self._guide.values = {name: value for name, value in drawn.items() if name not in self._guide.summed}
        try:
            return self._enumerated(1)
        finally:
            self._guide.values = {}

    def _together(self, count: int, checked: bool) -> tuple[LogWeights, Enumeration] | None:
        """The log weights of particles side by side; None where they are others than those of each alone."""
        run = self._enumerated(count)
        found = self._log_weights(run)
        compares = self.check == "always" or (self.check == "first" and not checked)
        ends = (0, count - 1) if compares else ()
        alone = [self._log_weights(self._alone(_particle(run, i))) for i in ends]
        close = _TOLERANCE if all(f.table.values.dtype == torch.float64 for f in run.factors.values()) else _ROUGH
        same = [
            _equal(getattr(found, part)[i], getattr(one, part)[0], close)
            for i, one in zip(ends, alone, strict=True)
            for part in ("by_datum", "outside")
        ]
        return (found, run) if all(same) else None

    def _log_weights(self, run: Enumeration) -> LogWeights:
        return log_weights(run, weighed_data(run), self.max_bytes)

    def _enumerated(self, count: int) -> Enumeration:
        run = self._programs.enumerate(
            self.model,
            self._guide,
            self.args,
            self.kwargs,
            subsamples=self.subsamples,
            particles=count,
            differentiable=False,
        )
        self.subsamples = run.subsamples
        return run.numbers()

    def _chunk_bytes(self) -> int:
        return int(min(_CHUNK_BYTES, table_limit(self.max_bytes)))


_TOLERANCE, _ROUGH = 1e-7, 1e-3
"""By how much log weights of one particle may differ, in double precision and otherwise."""


def drawn_sites(run: Enumeration) -> dict[str, Site]:
    """Returns the sites of the guide that hold a draw, or a point estimate, by name.

    Args:
        run: Programs whose guide drew its latents.
    """
    return {name: site for (role, name), site in run.sites.items() if role == "guide" and site.kind == "sampled"}


class _Found:
    """Log weights as they come in."""

    def __init__(self, first: Enumeration, max_bytes: float | None) -> None:
        self.first, self.max_bytes = first, max_bytes
        self.data = weighed_data(first)
        self.found: list[LogWeights] = []
        self.count = 0
        self.ruled_out: dict[str, None] = {}
        self.add(first)

    def add(self, run: Enumeration) -> None:
        """Adds a run."""
        self.append(log_weights(run, weighed_data(run), self.max_bytes), run)

    def append(self, weights: LogWeights, run: Enumeration) -> None:
        """Adds a run's log weights."""
        self.found.append(weights)
        self.count += len(weights.by_datum)
        if bool(weights.by_datum.isneginf().any() | weights.outside.isneginf().any()):
            self.ruled_out |= dict.fromkeys(_ruling_out(run))

    def particles(self, repeats: int = 1) -> Particles:
        """All of them, so many times."""
        weights = LogWeights(
            torch.cat([found.by_datum for found in self.found] * repeats),
            torch.cat([found.outside for found in self.found] * repeats),
            self.found[0].scale,
        )
        check_constant(weights.outside)
        return Particles(weights, self.data, self.first, tuple(self.ruled_out))


def _ruling_out(run: Enumeration) -> list[str]:
    """The model's sites with probability zero at a draw, whatever the latents that are summed out."""
    names = []
    for (role, name), factor in run.factors.items():
        dims = [dim for dim, axis in enumerate(factor.table.axes) if axis in run.supports]
        best = factor.table.values.amax(dims) if dims else factor.table.values
        if role == "model" and bool(best.isneginf().any()):
            names.append(name)
    return names


def _particle(run: Enumeration, index: int) -> dict[str, Tensor]:
    """The draws of one particle of a run."""
    values = {}
    for name, site in drawn_sites(run).items():
        (dim,) = (plate.dim for plate in site.plates if plate.name == PARTICLES)
        position = site.value.dim() - len(site.fn.event_shape) + dim
        values[name] = site.value if position < 0 else site.value.select(position, index)
    return values


def _equal(one: Tensor, other: Tensor, tolerance: float) -> bool:
    one, other = torch.broadcast_tensors(one, other)
    return bool(torch.isclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True).all())


def _bytes_of(run: Enumeration) -> int:
    """What one particle takes: its values, what they are drawn from, and its tables."""
    entries = sum(f.table.values.numel() for f in run.factors.values())
    for site in run.sites.values():
        entries += site.value.numel() + (site.fn.batch_shape + site.fn.event_shape).numel()
    return max(entries, 1) * _ITEM_BYTES
