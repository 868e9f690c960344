r"""A run whose tables would not fit, a portion of a plate at a time.

    F  =  sum over portions of F(portion)            where nothing ties the plate's elements together

A portion's tables are made of the sites restricted to its elements. A table that does not vary along the plate,
log P(mid | top) say, is made once and is the same in all portions.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from pyro_vfe.engine.cost import readable_bytes
from pyro_vfe.engine.factors import Factor, Scale, Table
from pyro_vfe.errors import CostError, VFEError
from pyro_vfe.program.cost import TOO_LARGE
from pyro_vfe.program.enumeration import SiteKey
from pyro_vfe.program.escapes import StructureChanged
from pyro_vfe.program.narrowing import narrowed_site
from pyro_vfe.program.recorder import Site
from pyro_vfe.program.zeros import are_filled

Sites = Mapping[SiteKey, Site]
Labelled = Callable[[Collection[SiteKey], Sites], dict[SiteKey, Factor]]
"""Makes the factors of some of the sites of a portion."""


class WithheldTable(Table):
    """A table that is too large to be made: its axes and sizes are known, and its values are to be had in portions."""

    site: str
    """The site it is of."""

    shape: tuple[int, ...]
    """The size of each axis, in order."""

    def __init__(self, site: str, sizes: Mapping[str, int]) -> None:
        """Args:
        site: The site it is of.
        sizes: The size of each axis, in order.
        """
        for name, value in (("site", site), ("axes", tuple(sizes)), ("shape", tuple(sizes.values()))):
            object.__setattr__(self, name, value)

    @property
    def values(self) -> Tensor:
        """Never there.

        Raises:
            CostError: Always.
        """
        size = readable_bytes(8 * math.prod(self.sizes.values()))
        raise withheld([self.site], f" over {', '.join(map(repr, self.axes))}, of {size}", self.axes)

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each axis."""
        return dict(zip(self.axes, self.shape, strict=True))


def withheld(sites: Sequence[str], what: str = "", axes: Sequence[str] = ()) -> CostError:
    """The error for who asks for tables that are made in portions only.

    Args:
        sites: The sites they are of.
        what: What is known of them.
        axes: What they vary along.
    """
    return CostError(
        f"The table of site '{sites[0]}'{what}, is made in portions of its plate, as it would not fit whole. F, its "
        "terms and log p(u) are summed so; what was asked for needs it whole.",
        hint=TOO_LARGE,
        sites=axes,
    )


class PortionedRun:
    """The sites of a run with their factors, for some elements of a plate at a time.

    Args:
        sites: The sites as they ran.
        plate: The plate.
        labelled: Makes the factors of all or some sites of a portion: the keys of those, and the portion's sites.
        scale: The weight of a site.
    """

    def __init__(self, sites: Sites, plate: str, labelled: Labelled, scale: Callable[[Site], Scale]) -> None:
        self.sites = sites
        self.plate = plate
        self.size = next(p.size for site in sites.values() for p in site.plates if p.name == plate)
        self._labelled = labelled
        self._scale = scale
        self._versions = [(site.name, held, held._version) for site in sites.values() for held in _tensors(site)]
        self.scores: Callable[[Sites], dict[SiteKey, Factor]] = lambda portion: {}
        """Makes the log-probabilities of those draws whose factors are something else."""
        few = self.restricted(0, 2)
        self._few = labelled(few.keys(), few)
        """Factors of two elements: how many axes tables have, at little cost."""

    def restricted(self, start: int, length: int) -> dict[SiteKey, Site]:
        """The sites of some elements; what lies outside of the plate counts with the first of them.

        Args:
            start: The first element.
            length: How many.

        Raises:
            StructureChanged: A distribution cannot be restricted to them.
            VFEError: What the sites hold has been overwritten since they ran.
        """
        self._check_unchanged()
        found: dict[SiteKey, Site] = {}
        for key, site in self.sites.items():
            if self.plate in site.plate_names:
                part = narrowed_site(site, self.plate, start, length)
                if part is None:
                    raise StructureChanged(f"site '{site.name}' cannot be restricted to a part of '{self.plate}'")
                found[key] = part
            elif start == 0:
                found[key] = site
        return found

    def _check_unchanged(self) -> None:
        """Portions are formed when they are asked for, in a backward pass too: what they are of must be there still."""
        for name, held, version in self._versions:
            if held._version != version:
                raise VFEError(
                    f"The data or parameters of site '{name}' were changed in place after the programs ran, and its "
                    "table is made in portions, which are formed again from them.",
                    hint="Take gradients, and read results, before they change; or change a copy; or raise max_bytes.",
                )

    def factors(self, portion: Sites) -> dict[SiteKey, Factor]:
        """The factors of a portion, those that do not vary along the plate made once for all.

        Args:
            portion: What `restricted` gives.
        """
        varying = [key for key in portion if self._varies(key) or are_filled()]
        made = self._labelled(varying, portion)
        return {key: made[key] if key in made else self._weighed(self._few[key], portion[key]) for key in portion}

    def withheld(self) -> dict[SiteKey, Factor]:
        """The factors of all elements, whose tables along the plate are not made."""
        return {
            key: self._withheld(key) if self._varies(key) else self._weighed(self._few[key], self.sites[key])
            for key in self.sites
        }

    def _varies(self, key: SiteKey) -> bool:
        return self.plate in self._few[key].axes

    def _weighed(self, factor: Factor, site: Site) -> Factor:
        """The factor with the weights of the site's own elements, where they have weights of their own."""
        varies = isinstance(factor.scale, Table) and self.plate in factor.scale.axes
        return replace(factor, scale=self._scale(site)) if varies else factor

    def _withheld(self, key: SiteKey) -> Factor:
        factor = self._weighed(self._few[key], self.sites[key])
        return factor.mapped(lambda table: WithheldTable(factor.name, {**table.sizes, self.plate: self.size}))


def _tensors(site: Site) -> Iterator[Tensor]:
    """The tensors that a site's log-probability is made of."""
    fn: Any = site.fn
    held: list[Any] = [site.value, site.mask, site.scale]
    while fn is not None:
        held += fn.__dict__.values()
        fn = fn.__dict__.get("base_dist")
    return (part for part in held if isinstance(part, Tensor) and not part.is_inference())
