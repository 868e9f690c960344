r"""What the guides that hold tables share: parameters over whole plates, their own rows of a subsample, distributions.

Q( v_site = value_k | v_parents )  =  softmax( logits[..., v_parents, :] )_k
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from operator import attrgetter
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.utils import deep_setattr
from pyro.nn import PyroModule
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from pyro_vfe.engine.cost import readable_bytes, table_limit
from pyro_vfe.errors import CostError, StructureError
from pyro_vfe.program.buffers import unchanged_buffers
from pyro_vfe.program.finite import Finite
from pyro_vfe.program.layout import latents_and_branches
from pyro_vfe.program.left_over import other_shape
from pyro_vfe.program.randomness import undisturbed_randomness
from pyro_vfe.program.recorder import FOLLOWS_MODEL, Plate
from pyro_vfe.program.site_structure import SiteStructure

Init = Literal["uniform", "posterior"]


@dataclass(frozen=True, eq=False)
class Latent:
    """What a guide has to know of a discrete latent in order to sample it."""

    name: str
    family: str
    """The name of the class of its distribution in the model."""
    plates: tuple[Plate, ...]
    support: Tensor
    """Its values, shape `(K, *event_shape)`."""
    chain: str | None = None
    """The plate along which it is a chain."""

    @property
    def size(self) -> int:
        """The number of its values."""
        return len(self.support)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The sizes of the whole plates around it, where their dims lie."""
        return whole_batch(self.plates)

    @property
    def steps(self) -> int:
        """The length of a chain."""
        return self.batch_shape[-1]


def latent_of(site: SiteStructure) -> Latent:
    """Returns what a guide has to know of a site of the model."""
    assert site.support is not None
    return Latent(site.name, site.family, site.plates, site.support, site.chain)


def whole_batch(plates: tuple[Plate, ...]) -> tuple[int, ...]:
    """Returns the batch shape of what stands once for each element of some plates, before subsampling."""
    shape = [1] * max((-plate.dim for plate in plates), default=0)
    for plate in plates:
        shape[plate.dim] = plate.full_size
    return tuple(shape)


def whole_plates(around: Iterable[tuple[Plate, ...]]) -> tuple[str, ...]:
    """Returns the names of the plates around some latents that are not subsampled, outermost first."""
    plates = [plate for plates in around for plate in plates]
    return tuple(dict.fromkeys(plate.name for plate in plates if plate.size == plate.full_size))


def is_subsampled(latents: Mapping[str, SiteStructure]) -> bool:
    """Whether a plate around some latent holds a part of its elements only."""
    return any(plate.size != plate.full_size for site in latents.values() for plate in site.plates)


def frame(plate: Plate) -> Any:
    """Returns Pyro's frame of a plate, of which an AutoGuide makes the plate again."""
    return CondIndepStackFrame(plate.name, plate.dim, plate.size, 0, plate.full_size)


def distribution(latent: SiteStructure | Latent, logits: Tensor) -> Any:
    """Returns the kind of distribution that has the latent's values.

    Args:
        latent: The latent.
        logits: Unnormalised log-probabilities of its values, shape `(*batch, K)`.
    """
    if latent.family == "Categorical":
        return dist.Categorical(logits=logits)
    if latent.family == "OneHotCategorical":
        return dist.OneHotCategorical(logits=logits)
    assert latent.support is not None
    return Finite(latent.support, logits)


def sampled(
    name: str, around: Iterable[Plate], fn: Callable[[], Any], plates: Mapping[str, Any], *, drawn: bool = False
) -> Tensor:
    """Samples a latent in its plates, with the weight that the model gives it, and returns its value.

    Args:
        name: The latent's site.
        around: The plates around it.
        fn: Makes its distribution, inside the plates.
        plates: Pyro's plates by name.
        drawn: Whether its values are drawn, and not summed.
    """
    with ExitStack() as stack:
        for plate in around:
            stack.enter_context(plates[plate.name])
        infer: Any = {FOLLOWS_MODEL: True, **({"enumerate": None} if drawn else {})}
        value: Tensor = pyro.sample(name, fn(), infer=infer)
    return value


def rows(values: Tensor, around: Iterable[Plate], plates: Mapping[str, Any], batch_dims: int) -> Tensor:
    """Returns those rows of a table over whole plates that belong to the elements which are present.

    Args:
        values: The table, its first dims those of the plates.
        around: The plates.
        plates: Pyro's plates by name.
        batch_dims: How many of the first dims are batch dims, of which the last is the plates' dim -1.
    """
    for plate in around:
        indices = plates[plate.name]._indices
        if indices is not None:
            values = values.index_select(batch_dims + plate.dim, indices.to(values.device))
    return values


def attribute(name: str) -> str:
    """Returns the attribute path of a site: its name, with `_` behind parts that modules use themselves."""
    return ".".join(f"{part}_" if hasattr(PyroModule, part) else part for part in name.split("."))


def read_parameter(holder: PyroModule, name: str, shape: tuple[int, ...]) -> Tensor:
    """Returns the parameter of a site in a module.

    Args:
        holder: The module.
        name: The site.
        shape: Its shape, for the model as it is.

    Raises:
        StructureError: It has another shape.
    """
    value: Tensor = attrgetter(attribute(name))(holder)
    if value.shape != shape:  # The store keeps what it has under the name, that of a guide for other data.
        raise other_shape(str(pyro.get_param_store().param_name(value)), value.shape, torch.Size(shape))
    return value


def find_latents(
    guide: AutoGuide, who: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[dict[str, SiteStructure], frozenset[str]]:
    """Returns the discrete latents of a guide's model, and on which it branches; tells the guide of their plates.

    Args:
        guide: The guide.
        who: Its name, for the error.
        args: The model's arguments.
        kwargs: The model's keyword arguments.

    Raises:
        StructureError: There are none.
    """
    with undisturbed_randomness(), unchanged_buffers(guide.model), pyro.poutine.block():
        latents, branches = latents_and_branches(guide.model, args, kwargs)
    if not latents:
        raise StructureError(
            f"{who} found no discrete latent with a finite support in the model.",
            hint="Use one of Pyro's autoguides for continuous latents; vfe.AutoAmortized or a guide of your own draws "
            "latents that the model marks infer={'enumerate': None}.",
        )
    for site in latents.values():
        for plate in site.plates:
            guide._prototype_frames[plate.name] = frame(plate)
    return latents, branches


def check_start(who: str, init: str, latents: Mapping[str, SiteStructure]) -> None:
    """Checks that the posterior can be had where tables are to start at it.

    Raises:
        StructureError: A plate is subsampled.
    """
    if init == "posterior" and is_subsampled(latents):
        raise StructureError(
            f"{who}(init='posterior') was first called with a subsampled plate.",
            hint="Call it once with the whole data, or use init='uniform'.",
        )


_ITEM_BYTES = 8


def check_size(
    who: str, latent: Latent, parents: Mapping[str, int], entries: int, max_bytes: float | None, way_out: str
) -> None:
    """Checks that a conditional table can be held.

    Args:
        who: The guide.
        latent: The latent.
        parents: The number of values of each of its parents.
        entries: How many numbers the table has.
        max_bytes: The most that one may take.
        way_out: What to do about it.

    Raises:
        CostError: It cannot.
    """
    limit = table_limit(max_bytes)
    if entries * _ITEM_BYTES > limit:
        sizes = " x ".join(f"{size} ('{name}')" for name, size in {**parents, latent.name: latent.size}.items())
        raise CostError(
            f"The table of latent '{latent.name}' in {who} would hold {sizes} values for each of "
            f"{entries // prod((*parents.values(), latent.size))} elements: "
            f"{readable_bytes(entries * _ITEM_BYTES)} (limit {readable_bytes(limit)}).",
            hint=f"{way_out}, or raise max_bytes.",
        )


def create_missing(holder: PyroModule, name: str, start: Callable[[], Tensor]) -> None:
    """Makes a site's parameter in a module, unless `load_state_dict` has made it.

    Args:
        holder: The module.
        name: The site.
        start: Makes the values that it starts from.
    """
    if attribute(name) not in dict(holder.named_parameters()):
        deep_setattr(holder, attribute(name), torch.nn.Parameter(start()))
