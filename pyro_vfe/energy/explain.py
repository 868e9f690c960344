"""What the engine sees in a pair of programs, before any table is made."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pyro_vfe.engine.cost import readable_bytes, table_limit
from pyro_vfe.engine.ordering import listed
from pyro_vfe.engine.outline import Outline, outline
from pyro_vfe.engine.structure import FactorShape, Structure, VariableShape, previous
from pyro_vfe.errors import CostError
from pyro_vfe.program.buffers import unchanged_buffers
from pyro_vfe.program.cost import fits_at_once, table_entries, varying_plates, within_limit
from pyro_vfe.program.entry_points import entry_point
from pyro_vfe.program.given import given_guide
from pyro_vfe.program.given_parameters import reading
from pyro_vfe.program.layout import Layout, Program
from pyro_vfe.program.programs import Programs
from pyro_vfe.program.randomness import undisturbed_randomness
from pyro_vfe.program.site_structure import SiteStructure
from pyro_vfe.program.unobserved import observes_nothing
from pyro_vfe.program.variation import with_variations

_SHOWN_STEPS = 40

_MOST_TRIED = 2.0**24
"""Bytes: programs whose tables take no more are enumerated once, to see whether they broadcast."""


@dataclass(frozen=True, eq=False)
class Explanation:
    """Sites, scopes, who enumerates what, and the plan for log p(u); printable."""

    layout: Layout
    """The sites of guide and model, and the dim each latent takes."""

    outline: Outline
    """How the model's latents are summed out for the surprise: sweeps along chains, then a plan."""

    max_bytes: float
    """What a computation may take before it is refused."""

    @property
    def largest_site(self) -> SiteStructure:
        """The site with the largest table."""
        return max(self.layout.sites.values(), key=self._entries)

    def __str__(self) -> str:
        if not self.layout.sites:
            return "The programs have no sample sites."
        site = self.largest_site
        size = 8 * self._entries(site)
        portioning = self.layout.portioning
        parts = [
            _shortened("\n".join(_aligned([_HEADER, *(_row(s, self.layout) for s in self.layout.sites.values())]))),
            "the model observes nothing: log p(u) = 0, and the guide's F is KL(Q || P)"
            if observes_nothing(self.layout)
            else "",
            f"largest site table: '{site.name}' of the {site.role}, {self._cost(size)}",
            ""
            if portioning is None
            else f"plate '{portioning.plate}' is summed in portions of {portioning.length:,} elements, as all together "
            "would not fit; costs are those of a portion",
            self._runs(),
            f"elimination of the model's latents: {self.outline.flops:,} flops, {self._cost(self.outline.bytes)}, "
            f"largest table over {listed(self.outline.largest.scope) or 'nothing'}",
            _shortened(str(self.outline)),
        ]
        return "\n\n".join(part for part in parts if part)

    def _runs(self) -> str:
        runs = self.layout.num_runs
        if not self.layout.groups:
            return ""
        if set(self.layout.groups) <= set(self.layout.stars.values()):
            return f"latents are read by index from another plate: {runs:,} runs, and tables added up by their elements"
        return f"the programs do not broadcast over all values: {runs:,} runs, one per joint value that some site reads"

    def _entries(self, site: SiteStructure) -> int:
        return table_entries(site, self.layout, self.layout.portioning)

    def _cost(self, size: float) -> str:
        verdict = "" if size <= self.max_bytes else f" (above the limit of {readable_bytes(self.max_bytes)})"
        return readable_bytes(size) + verdict


_HEADER = ("site", "program", "values", "plates", "handled", "reads")


@entry_point()
def explain(
    model: Program,
    guide: Program | None,
    *args: Any,
    max_bytes: float | None = None,
    params: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Explanation:
    """Returns what enumeration would do with a pair of programs: sites, supports, plates, order and cost.

    The programs are run with sampled values; tables are made where they are small, which tells whether the programs
    broadcast over all values.

    Args:
        model: The generative model.
        guide: The guide; None for one without sites.
        *args: Arguments of both programs.
        max_bytes: The limit to hold the costs against; by default half of what is free.
        params: Values of the programs' parameters by name, all of them, such as `run.params`, in place of those in
            Pyro's store, which stays as it is. Names that the programs do not read are left aside.
        **kwargs: Keyword arguments of both programs.

    Raises:
        VFEError: The programs cannot be enumerated. One that would merely not fit is explained.
    """
    own = given_guide(model, guide)
    with reading(params, args, kwargs):
        programs = Programs(check=False, max_bytes=math.inf)
        layout = programs.layout(model, own, args, kwargs)
        if fits_at_once(layout, _MOST_TRIED):
            # What is wrong with them is said where they are used.
            with suppress(Exception), undisturbed_randomness(), unchanged_buffers(model, own):
                layout = Programs().enumerated_layout(model, own, args, kwargs)
        with undisturbed_randomness(), unchanged_buffers(model, own):
            layout = with_variations(layout, model, own, args, kwargs)
    with suppress(CostError):
        layout = within_limit(layout, max_bytes)
    return Explanation(layout, outline(_structure(layout)), table_limit(max_bytes))


def _structure(layout: Layout) -> Structure:
    """The model's graph as the ordinary run saw it: names, sizes and plates."""
    sites = [site for (role, _), site in layout.sites.items() if role == "model"]
    latents = {site.name: site for site in sites if site.kind == "enumerated"}
    factors = [
        FactorShape(site.name, _axes(site, tuple(latents)), frozenset(plate.name for plate in site.plates))
        for site in sites
    ]
    variables = [
        VariableShape(site.name, site.size, frozenset(plate.name for plate in site.plates), site.chain)
        for site in latents.values()
    ]
    sizes = {plate.name: plate.size for site in sites for plate in site.plates}
    if layout.portioning is not None:
        sizes[layout.portioning.plate] = layout.portioning.length
    return Structure(tuple(factors), tuple(variables), tuple(sizes.items()))


def _axes(site: SiteStructure, latents: Sequence[str]) -> tuple[str, ...]:
    scope = [name for name in latents if name in site.scope or name == site.name]
    varying = varying_plates(site)
    plates = [plate.name for plate in site.plates if plate.name in varying and plate.name != site.chain]
    return (*scope, *plates) if site.chain is None else (*scope, previous(site.name), *plates)


def _row(site: SiteStructure, layout: Layout) -> tuple[str, ...]:
    plates = ", ".join(
        f"{plate.name} ({plate.size})"
        if plate.size == plate.full_size
        else f"{plate.name} ({plate.size} of {plate.full_size})"
        for plate in site.plates
    )
    values = str(site.size) if site.kind == "enumerated" else "-"
    reads = sorted(site.scope - {site.name})
    return site.name, site.role, values, plates or "-", _handled(site, layout), listed(reads, 4) or "-"


def _handled(site: SiteStructure, layout: Layout) -> str:
    """Who sums, draws or observes the site."""
    in_guide = ("guide", site.name) in layout.sites
    in_model = ("model", site.name) in layout.sites
    if site.kind == "observed":
        return f"observed ({site.family})"
    if site.kind == "unread":
        return f"read by nothing: it integrates to 1 ({site.family})"
    if site.kind == "sampled":
        return f"drawn ({site.family})"
    where = "under the guide" if in_guide and in_model else "inside the guide" if in_guide else "inside the model"
    how = ", one run per value" if site.name in (layout.sequential | layout.groups.keys()) else ""
    return f"summed {where}{how}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _shortened(text: str) -> str:
    lines = text.splitlines()
    if len(lines) <= _SHOWN_STEPS:
        return text
    half = _SHOWN_STEPS // 2
    return "\n".join([*lines[:half], f"... {len(lines) - 2 * half} more", *lines[-half:]])
