"""Random programs as data: a specification, the strategy that draws it, and the Pyro functions that it says.

A specification lists sites in the order the program meets them. A site has a kind of support, the plates around it and
parents among earlier sites whose plates it is in. Its table is looked up by the parents' values, and tilted per plate
element, so that an ordinary value of shape `(N,)` and an enumerated one of shape `(K, 1)` both serve as an index.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from hypothesis import strategies as st
from torch import Tensor

MAX_ASSIGNMENTS = 200
"""Of model or guide; a plate's elements count apart."""

KINDS = {"categorical_2": 2, "categorical_3": 3, "logits_3": 3, "bernoulli": 2, "one_hot_3": 3, "binomial_2": 3}


@dataclass(frozen=True)
class SiteSpec:
    """One latent site."""

    name: str
    """The site's name."""

    kind: str
    """A key of KINDS."""

    plates: tuple[str, ...]
    """The plates around the site."""

    parents: tuple[str, ...]
    """Earlier sites of the same program that its table is indexed by."""

    zeros: bool
    """Whether the table holds structural zeros."""

    is_observed: bool
    """Whether a Normal datum hangs on the site, one per element."""

    masks_data: bool
    """Whether some of that data are masked."""


@dataclass(frozen=True)
class ProgramSpec:
    """A model, a guide over some of its sites, and the plates of both."""

    plates: tuple[tuple[str, int, int], ...]
    """Name, size and dim of each plate."""

    model: tuple[SiteSpec, ...]
    """The model's latent sites in order."""

    guide: tuple[SiteSpec, ...]
    """The guide's sites in order."""

    factor: tuple[str, str] | None
    """Two sites outside every plate that a pyro.factor couples."""

    seed: int
    """Of all tables and data."""


def assignments(sites: tuple[SiteSpec, ...], plates: tuple[tuple[str, int, int], ...]) -> int:
    """Returns how many joint assignments the sites have."""
    sizes = {name: size for name, size, _ in plates}
    return prod(KINDS[site.kind] ** prod(sizes[plate] for plate in site.plates) for site in sites)


@st.composite
def program_specs(draw: Callable[..., Any]) -> ProgramSpec:
    """Draws programs of up to 8 latents in up to 2 plates, nested, crossing or apart."""
    count = draw(st.integers(0, 2))
    plates = tuple((f"plate_{n}", draw(st.integers(2, 3)), -1 - n) for n in range(count))
    names = [name for name, _, _ in plates]
    model: list[SiteSpec] = []
    for n in range(draw(st.integers(2, 8))):
        inside = tuple(name for name in names if draw(st.booleans()))
        site = _site(draw, f"v_{n}", draw(st.sampled_from(sorted(KINDS))), inside, model, draw(st.integers(0, 3)) == 0)
        if assignments((*model, site), plates) <= MAX_ASSIGNMENTS:
            model.append(site)
    order = draw(st.permutations(model)) if model else []
    guide: list[SiteSpec] = []
    for site in order:
        if draw(st.booleans()):
            zeros = site.zeros and draw(st.integers(0, 5)) > 0
            guide.append(_site(draw, site.name, site.kind, site.plates, guide, zeros))
    outside = [site.name for site in model if not site.plates]
    factor = (outside[0], outside[-1]) if len(outside) > 1 and draw(st.booleans()) else None
    return ProgramSpec(plates, tuple(model), tuple(guide), factor, draw(st.integers(0, 10_000)))


def _site(
    draw: Callable[..., Any], name: str, kind: str, plates: tuple[str, ...], earlier: list[SiteSpec], zeros: bool
) -> SiteSpec:
    allowed = [site.name for site in earlier if set(site.plates) <= set(plates)]
    parents = draw(st.lists(st.sampled_from(allowed), max_size=2, unique=True)) if allowed else []
    return SiteSpec(name, kind, plates, tuple(parents), zeros, draw(st.booleans()), draw(st.booleans()))


def model_of(spec: ProgramSpec) -> Callable[[], None]:
    """Returns the Pyro model of a specification."""

    def model() -> None:
        generator = torch.Generator().manual_seed(spec.seed)
        values = _run(spec, spec.model, "theta", generator, _observe)
        if spec.factor is not None:
            first, second = (values[name] for name in spec.factor)
            pyro.factor("factor", 0.7 * first * second - 0.4 * first)

    return model


def guide_of(spec: ProgramSpec) -> Callable[[], None]:
    """Returns the Pyro guide of a specification."""

    def guide() -> None:
        generator = torch.Generator().manual_seed(spec.seed + 1)
        _run(spec, spec.guide, "phi", generator, lambda *_: None)

    return guide


def _run(
    spec: ProgramSpec,
    sites: tuple[SiteSpec, ...],
    prefix: str,
    generator: torch.Generator,
    observe: Callable[[ProgramSpec, SiteSpec, Tensor, torch.Generator], None],
) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    kinds = {site.name: KINDS[site.kind] for site in sites}
    plates = {name: pyro.plate(name, size, dim=dim) for name, size, dim in spec.plates}
    for site in sites:
        shape = [kinds[parent] for parent in site.parents]
        batch = _batch_shape(spec, site)
        weights = pyro.param(f"{prefix}_{site.name}", _normal(generator, *shape, KINDS[site.kind]))
        tilt = _normal(generator, *batch, KINDS[site.kind])
        with ExitStack() as stack:
            for name in site.plates:
                stack.enter_context(plates[name])
            logits = weights[tuple(values[parent] for parent in site.parents)] + 0.5 * tilt
            value = pyro.sample(site.name, _distribution(site, logits))
            values[site.name] = value.argmax(-1) if site.kind == "one_hot_3" else value.long()
            observe(spec, site, values[site.name], generator)
    return values


def _observe(spec: ProgramSpec, site: SiteSpec, index: Tensor, generator: torch.Generator) -> None:
    batch = _batch_shape(spec, site)
    datum, means = _normal(generator, *batch), _normal(generator, KINDS[site.kind])
    mask = torch.rand(batch, generator=generator) < 0.6
    if site.is_observed:
        with pyro.poutine.mask(mask=mask if site.masks_data else torch.tensor(True)):
            pyro.sample(f"u_{site.name}", dist.Normal(means[index], 0.8), obs=datum)


def _batch_shape(spec: ProgramSpec, site: SiteSpec) -> tuple[int, ...]:
    sizes = {dim: size for name, size, dim in spec.plates if name in site.plates}
    return tuple(sizes.get(dim, 1) for dim in range(min(sizes), 0)) if sizes else ()


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _distribution(site: SiteSpec, logits: Tensor) -> Any:
    probs = logits.softmax(-1)
    if site.zeros:
        keep = torch.arange(probs.shape[-1]) != 0
        probs = torch.where(keep, probs, 0.0) / torch.where(keep, probs, 0.0).sum(-1, keepdim=True)
    if site.kind == "bernoulli":
        return dist.Bernoulli(probs[..., 1])
    if site.kind == "binomial_2":
        return dist.Binomial(2, probs[..., 1])
    if site.kind == "one_hot_3":
        return dist.OneHotCategorical(probs)
    if site.kind == "logits_3":
        return dist.Categorical(logits=torch.where(probs > 0, logits, -torch.inf))
    return dist.Categorical(probs)
