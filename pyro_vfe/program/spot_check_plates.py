r"""Whether what is drawn at an element of a plate is read at that element alone.

    log p(site) at element i  =  the same,  whatever was drawn at elements j != i

The gradient of a draw in a plate has the cost of its own element, and importance weights are taken element by element.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from pyro_vfe.engine.factors import Table
from pyro_vfe.errors import SpotCheckError
from pyro_vfe.program.data import data_of
from pyro_vfe.program.enumeration import PARTICLES, Enumeration, SiteKey, is_random
from pyro_vfe.program.impossible_values import invalid, nowhere
from pyro_vfe.program.log_prob import log_prob
from pyro_vfe.program.masking import masked, unmasked, without_gaps
from pyro_vfe.program.recorder import Plate, Site

Ordinary = tuple[Mapping[SiteKey, Site], Mapping[SiteKey, Tensor]]
"""The sites of an ordinary run, and the log-probability of each."""

_MOST_TRIES = 64
"""A draw is made so often until it is another."""

_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}


def check_elements(
    enumeration: Enumeration, ordinary: Callable[[Mapping[str, Tensor]], Ordinary], weighs_data: bool
) -> None:
    """Draws some elements of each plate anew, and looks whether the others notice.

    Args:
        enumeration: Programs with draws.
        ordinary: Runs the programs again, with other values of some draws.
        weighs_data: Whether each datum's draws have importance weights of their own: then all kinds of draws count.

    Raises:
        SpotCheckError: Some site reads draws of other elements of its plate.
    """
    for plate, names in sorted(_drawn_inside(enumeration, weighs_data).items()):
        sites, before = ordinary({})
        drawn = {name: sites["guide", name] for name in names if ("guide", name) in sites}
        for changed in _some(enumeration.plates[plate]):
            _, after = ordinary({name: _anew(site, plate, changed) for name, site in drawn.items()})
            for key, site in sites.items():
                if plate in site.plate_names and key in after:
                    dim = _dim(site, plate)
                    if not agree(*(_selected(values, dim, ~changed) for values in (before[key], after[key]))):
                        raise _reads_others(site, plate, sorted(names))


def _drawn_inside(enumeration: Enumeration, weighs_data: bool) -> dict[str, set[str]]:
    """For each plate the draws that nothing reads from outside of it."""
    inside = [(plate, name) for name in enumeration.draws for plate in enumeration.variables[name].plates]
    if weighs_data:
        data = data_of(enumeration.sites, enumeration.reads, enumeration.supports.keys() - enumeration.guided)
        plates = {plate for kind in data.kinds for plate in kind.axes}
        drawn = [site for (role, _), site in enumeration.sites.items() if role == "guide" and is_random(site)]
        inside += [(plate, site.name) for site in drawn for plate in plates & site.plate_names]
    found: dict[str, set[str]] = {}
    for plate, name in inside:
        if plate != PARTICLES and enumeration.plates[plate] > 1:
            found.setdefault(plate, set()).add(name)
    return found


def _some(size: int) -> Iterator[Tensor]:
    """Elements to change: every second one, the others, a half at random, and one alone, which moves any sum."""
    even = torch.arange(size) % 2 == 0
    yield even
    yield ~even
    if size > 2:
        order = torch.randperm(size)
        yield order < (size + 1) // 2
        yield order == 0


def _dim(site: Site, plate: str) -> int:
    return next(around.dim for around in site.plates if around.name == plate)


def _anew(site: Site, plate: str, changed: Tensor) -> Tensor:
    """The draw with some of its elements drawn again."""
    event_dims = len(site.fn.event_shape)
    dim = _dim(site, plate) - event_dims
    value = site.value.detach().clone()
    wanted = changed.to(value.device).reshape([-1] + [1] * (-dim - 1))
    with torch.no_grad():
        for _ in range(_MOST_TRIES):
            same = value == site.value
            if event_dims:
                same = same.flatten(-event_dims).all(-1)[(..., *[None] * event_dims)]
            if not bool((wanted & same).any()):
                break
            value = torch.where(wanted & same, site.fn.sample().to(value).expand(value.shape), value)
    return value


def _selected(values: Tensor, dim: int, kept: Tensor) -> Tensor:
    """The kept elements along a dim; all, where the values do not vary along it."""
    if -dim > values.dim() or values.shape[dim] == 1:
        return values
    return values.index_select(dim, kept.nonzero().squeeze(-1).to(values.device))


def own_stretch(table: Table, plate: Plate) -> Table:
    """Returns what a table has of the elements that a plate has in a branch."""
    return table.narrowed(plate.name, 0, plate.size)


def own_elements(values: Tensor, site: Site) -> Tensor:
    """Returns the elements that a site has in its branch, which come first, of those that it has in some branch.

    Args:
        values: Numbers, shape `(*batch_shape)`.
        site: The site as the branch has it.
    """
    for plate in site.plates:
        if values.dim() >= -plate.dim and values.shape[plate.dim] > plate.size:
            values = values.narrow(plate.dim, 0, plate.size)
    return values


def agree(one: Tensor, other: Tensor, *, slack: float = 1.0) -> bool:
    """Returns whether log-probabilities are equal, but for rounding.

    Args:
        one: Log-probabilities.
        other: Others.
        slack: How many times the tolerance they may differ.
    """
    try:
        one, other = torch.broadcast_tensors(one, other)
    except RuntimeError:
        return False
    tolerance = slack * max(_TOLERANCE.get(values.dtype, 1e-2) for values in (one, other))
    wide = torch.promote_types(one.dtype, other.dtype)
    return bool(torch.isclose(one.to(wide), other.to(wide), rtol=tolerance, atol=tolerance, equal_nan=True).all())


def _reads_others(site: Site, plate: str, names: list[str]) -> SpotCheckError:
    return SpotCheckError(
        f"Site '{site.name}' of the {site.role} lies in plate '{plate}', and reads at one element what was drawn at "
        f"others ({', '.join(repr(name) for name in names)}): a plate says that its elements are independent, and the "
        "gradients and weights of draws rely on it.",
        hint=f"Leave plate '{plate}' before its elements meet, and read them from outside of it; or draw them as one "
        "vector, `.to_event(1)` outside of the plate. If you are sure, pass check=False.",
    )


def ordinary_log_prob(site: Site, unvalidated: bool) -> Tensor:
    """Returns what a site of an ordinary run says of its value, in nats.

    Args:
        site: The site, when it is reached.
        unvalidated: Whether its distribution may be invalid, where a latent has an impossible value.
    """
    fn, mask = unmasked(site)
    values = log_prob(fn, without_gaps(site))
    if site.kind != "enumerated":
        values = masked(values, mask)
    return nowhere(values, invalid(fn)) if unvalidated else values
