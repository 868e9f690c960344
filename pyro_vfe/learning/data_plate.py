r"""What data a batch has, and that nothing else ties batches together.

    F  =  -log p(w)  +  sum_batches F_b        F_b  =  (size / full size) * (F of the program - (-log p(w)))

Every latent that is summed out and every observation has to be inside of one plate, the data plate. Either it is as
long as the batch, or it is a subsample of a longer one: the program then multiplies its data by full size / size.
"""

from dataclasses import dataclass
from math import prod

from pyro_vfe.errors import StructureError
from pyro_vfe.program.data import number_of_data
from pyro_vfe.program.enumeration import Enumeration
from pyro_vfe.program.recorder import Site

_EACH_BATCH = "EM on batches takes their data to be independent given the parameters"


@dataclass(frozen=True)
class Share:
    """The part of all data that a batch is."""

    plates: frozenset[str]
    """The plates that all data share; one, as a rule."""
    size: int
    """The number of elements in the batch."""
    full_size: int | None
    """The number of elements of all batches, where a subsampled plate tells it."""
    num_data: float
    """The number of data in the batch: elements, and steps of chains that all data share."""

    @property
    def factor(self) -> float:
        """What the program's sums over the batch's data are to be multiplied by, to count each datum once."""
        return 1.0 if self.full_size is None else self.size / self.full_size

    @property
    def words(self) -> str:
        """The plates as text."""
        names = ", ".join(f"'{name}'" for name in sorted(self.plates))
        return f"plate {names}" if len(self.plates) == 1 else f"plates {names}"


def share_of(enumeration: Enumeration) -> Share:
    """The part of all data that a batch is.

    Args:
        enumeration: The programs at the batch.

    Raises:
        StructureError: Something ties batches together: a latent or observation outside of the data plate.
    """
    sites = [site for site in enumeration.sites.values() if site.role == "model"]
    inside = [site for site in sites if site.kind in ("enumerated", "observed")]
    chains = {variable.chain for variable in enumeration.variables.values()}
    plates = {site.name: site.plate_names - chains for site in inside}
    shared = frozenset.intersection(*plates.values()) if plates else frozenset()
    if not shared:
        raise _outside(inside, plates)
    for site in sites:
        if site.kind == "sampled" and site.plate_names & shared:
            raise _local_point(site, shared)
    for name, *_ in enumeration.subsampled:
        if name not in shared:
            raise _subsampled(name, next(site for site in sites if name in site.plate_names or name in site.steps))
    size, full_size = (prod(sizes[name] for name in shared) for sizes in (enumeration.plates, enumeration.full_plates))
    num_data = number_of_data(enumeration) * size / full_size
    return Share(shared, size, None if size == full_size else full_size, num_data)


def _outside(inside: list[Site], plates: dict[str, frozenset[str]]) -> StructureError:
    """The error for programs without a data plate; it names a site that is outside of the plate of most others."""
    names = sorted({name for own in plates.values() for name in own})
    if not names:
        what = "The model has neither data nor latents"
        if inside:
            chain = " but that of a chain" if inside[0].plate_names else ""
            what = f"Site '{inside[0].name}' is in no vectorised plate{chain}"
        return StructureError(
            f"{what}, and {_EACH_BATCH}.",
            hint="Put all latents and observations of a datum inside `with pyro.plate('data', size):`, or call run "
            "with all data.",
        )
    plate = max(names, key=lambda name: sum(name in own for own in plates.values()))
    site = next(site for site in inside if plate not in plates[site.name])
    kind = "latent" if site.kind == "enumerated" else "observed"
    ties = "ties the batches together" if site.kind == "enumerated" else "would count once for each batch"
    return StructureError(
        f"The {kind} site '{site.name}' is outside of plate '{plate}' and {ties}: {_EACH_BATCH}.",
        hint="Move it inside, or call run with all data.",
    )


def _local_point(site: Site, shared: frozenset[str]) -> StructureError:
    plate = sorted(site.plate_names & shared)[0]
    return StructureError(
        f"Site '{site.name}' is a point estimate for each datum of plate '{plate}': it would grow with the data, and "
        f"{_EACH_BATCH}.",
        hint="Call run with all data, or leave the site out of the guide where it can be summed.",
    )


def _subsampled(plate: str, site: Site) -> StructureError:
    return StructureError(
        f"Plate '{plate}' of site '{site.name}' is subsampled, and not all latents and observations are in it.",
        hint="Subsample the plate that holds all data.",
    )
