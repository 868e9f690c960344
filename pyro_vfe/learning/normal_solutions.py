r"""The best locations and covariances given pooled moments.

    loc  =  ( sum w S^-1 )^-1  sum w S^-1 x              S  =  sum w (x - loc)(x - loc)' / sum c

The one is the best given the other. Where the data of a location share one covariance it drops out of the first, and
both are had at once; otherwise the two take turns until the gradient is gone, and every turn improves the objective.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vfe.errors import DegenerateError
from pyro_vfe.learning.count_solutions import CANCELLED, at_floor
from pyro_vfe.learning.entries import Floor, floor_of, named
from pyro_vfe.learning.moments import summed_by
from pyro_vfe.learning.pools import ObjectiveForm, Pools

MAX_SWEEPS = 1000
"""How often locations and covariances take turns at most."""

SETTLED = 64
"""The turns end at a gradient of this many roundings."""

Numbers = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class _Normals:
    """Locations `(L, size)` and covariances `(M, size, size)` by parameter, float64."""

    locations: dict[str, Tensor]
    covariances: dict[str, Tensor]
    deviations: dict[str, Tensor]
    """The square roots of the covariances' diagonals: an error that is small next to them is none."""
    precisions: dict[str, Tensor]


def best_normals(pools: Pools, values: Numbers, names: Collection[str], floor: Floor) -> tuple[dict[str, Tensor], int]:
    """The best locations and covariances in the parameters' shapes, and how many turns they took.

    What nothing is known of keeps its old value. Every turn is an improvement, also where the last is not the end.

    Args:
        pools: Data and priors.
        values: All parameters' values: the start, and what is held.
        names: The locations and covariances to change.
        floor: The least scales and variances.

    Raises:
        DegenerateError: A covariance is singular.
    """
    locations = [name for name in names if pools.forms[name].kind == "location"]
    spreads = [name for name in names if pools.forms[name].kind == "spread"]
    current = dict(values)
    sweeps = 0
    settled = False
    while not settled and sweeps < MAX_SWEEPS:
        for name in locations:
            current[name] = _best_location(name, pools, _normals(pools, current)).reshape(values[name].shape)
        for name in spreads:
            current[name] = _best_spread(name, pools, current, floor_of(floor, name))
        sweeps += 1
        slopes = slopes_of_normals(pools, current, names, floor)
        rounding = SETTLED * torch.finfo(torch.float64).eps
        settled = all(bool((gradient.abs() <= rounding * size).all()) for gradient, size in slopes.values())
    return {name: current[name] for name in names}, sweeps


def _normals(pools: Pools, values: Numbers) -> _Normals:
    """The parameters as vectors and matrices."""
    locations, covariances, deviations, precisions = {}, {}, {}, {}
    for name, form in pools.forms.items():
        value = values[name].detach().to(torch.float64)
        if form.kind == "location":
            locations[name] = value.reshape(-1, form.size)
        elif form.kind == "spread":
            covariances[name] = covariance_of(value, form)
            deviations[name] = covariances[name].diagonal(dim1=-2, dim2=-1).sqrt()
            precisions[name] = _inverse(covariances[name])
    return _Normals(locations, covariances, deviations, precisions)


def _location_system(name: str, pools: Pools, now: _Normals) -> tuple[Tensor, Tensor, Tensor]:
    """L and h of the locations about their present values, `(L, size, size)` and `(L, size)`, and the size of h."""
    here = now.locations[name]
    count, size = here.shape
    precision = here.new_zeros(count, size, size)
    information, scale = here.new_zeros(count, size), here.new_zeros(count, size)
    if name in pools.evidence:
        said = pools.evidence[name]
        precision = precision + said.precision
        information = information + said.about(here).information
        reach = said.centre.abs() + here.abs()
        scale = scale + said.information.abs() + (said.precision.abs() @ reach[..., None])[..., 0]
    for (location, spread), moments in pools.moments.items():
        if location != name or spread not in now.precisions:
            continue
        own = now.precisions[spread][moments.spread]
        residual = moments.about(here[moments.location]).first
        place = moments.centre.abs() + here[moments.location].abs() + now.deviations[spread][moments.spread]
        reach = moments.first.abs() + moments.weight[:, None].abs() * place
        precision = precision + summed_by(moments.location, moments.weight[:, None, None] * own, count)
        information = information + summed_by(moments.location, (own @ residual[..., None])[..., 0], count)
        scale = scale + summed_by(moments.location, (own.abs() @ reach[..., None])[..., 0], count)
    return precision, information, scale


def _best_location(name: str, pools: Pools, now: _Normals) -> Tensor:
    precision, information, _ = _location_system(name, pools, now)
    known = is_weighed(precision.diagonal(dim1=-2, dim2=-1).sum(-1))[:, None]
    unit = torch.eye(precision.shape[-1], dtype=precision.dtype, device=precision.device)
    step = _solved(torch.where(known[..., None], precision, unit), information)
    return now.locations[name] + torch.where(known, step, 0.0)


def _scatter(name: str, pools: Pools, now: _Normals) -> tuple[Tensor, Tensor, Tensor]:
    """How often each covariance counts, `(M,)`, the squares about the locations, and the size of what was summed."""
    here = now.covariances[name]
    count, scatter, magnitude = here.new_zeros(len(here)), torch.zeros_like(here), here.new_zeros(here.shape[:-1])
    for (location, spread), moments in pools.moments.items():
        if spread != name:
            continue
        squares, sizes = moments.squares(now.locations[location] if location is not None else None)
        count = count + summed_by(moments.spread, moments.count, len(here))
        scatter = scatter + summed_by(moments.spread, squares, len(here))
        magnitude = magnitude + summed_by(moments.spread, sizes, len(here))
    return count, scatter, magnitude


def _best_spread(name: str, pools: Pools, current: Numbers, floor: float | None) -> Tensor:
    form, old = pools.forms[name], current[name].detach().to(torch.float64)
    count, scatter, magnitude = _scatter(name, pools, _normals(pools, current))
    known = is_weighed(count)
    covariance = scatter / count.where(known, 1.0)[:, None, None]
    if floor is not None:
        covariance = _raised(covariance, _least_variance(floor, form))
        scatter, magnitude = covariance, covariance.diagonal(dim1=-2, dim2=-1)
    singular = known & _is_singular(scatter, magnitude)
    if bool(singular.any()):
        where = named(name, singular, batch_shape(form, old))
        raise DegenerateError(
            f"A variance falls to zero, as its data are all equal, or lie in a plane, to rounding: {where}.",
            hint=f"Give a floor, floor={{'{name}': 1e-3}}, or the parameter a prior; or use fewer components.",
        )
    own = torch.eye(form.size, dtype=old.dtype, device=old.device)
    found = _given(torch.where(known[:, None, None], covariance, own), form)
    blocks = old.reshape(found.shape)
    return torch.where(known.reshape(-1, *(1,) * (found.dim() - 1)), found, blocks).reshape(old.shape)


def slopes_of_normals(
    pools: Pools, values: Numbers, names: Collection[str], floor: Floor
) -> dict[str, tuple[Tensor, Tensor]]:
    """The gradient of the objective and the size of what it is made of, by parameter, in the parameters' shapes.

    Locations count in units of their spread, covariances by the logarithm of their scales.

    Args:
        pools: Data and priors.
        values: All parameters' values.
        names: The locations and covariances of interest.
        floor: Floors, below which no gradient points.
    """
    now = _normals(pools, values)
    slopes = {}
    for name in names:
        shape = values[name].shape
        if pools.forms[name].kind == "location":
            precision, information, size = _location_system(name, pools, now)
            diagonal = precision.diagonal(dim1=-2, dim2=-1)
            unit = diagonal.where(diagonal > 0, 1.0).rsqrt()
            slopes[name] = (information * unit).reshape(shape), (size * unit).reshape(shape)
        else:
            gradient, size = _spread_slope(name, pools, now, values[name].dtype, floor_of(floor, name))
            slopes[name] = gradient.reshape(shape), size.reshape(shape)
    return slopes


def _spread_slope(
    name: str, pools: Pools, now: _Normals, dtype: torch.dtype, floor: float | None
) -> tuple[Tensor, Tensor]:
    count, scatter, magnitude = _scatter(name, pools, now)
    form, covariance = pools.forms[name], now.covariances[name]
    variance, axes = _eigen(covariance)
    root = variance.rsqrt()
    white = root[..., :, None] * (axes.mT @ scatter @ axes) * root[..., None, :]
    gradient = white - torch.diag_embed(count[:, None].expand(root.shape))
    if floor is not None:
        rounding = CANCELLED * torch.finfo(dtype).eps * variance.amax(-1, keepdim=True)
        low = at_floor(variance - rounding, _least_variance(floor, form), dtype)
        both = low[..., :, None] | low[..., None, :]
        gradient = torch.where(both, gradient.clamp(min=0) * torch.eye(form.size, device=low.device), gradient)
    reach = (axes.mT.abs() @ magnitude.sqrt()[..., None])[..., 0] * root
    size = count[:, None, None].abs() + reach[..., :, None] * reach[..., None, :]
    return gradient, size


def is_weighed(weight: Tensor) -> Tensor:
    """Whether there is any weight to divide by.

    Args:
        weight: Sums of weights.
    """
    return weight >= torch.finfo(weight.dtype).tiny / torch.finfo(weight.dtype).eps


def batch_shape(form: ObjectiveForm, value: Tensor) -> tuple[int, ...]:
    """The shape in which the covariances of a parameter are laid out.

    Args:
        form: The parameter's form.
        value: The parameter.
    """
    return tuple(value.shape) if form.given in ("scale", "variance") else tuple(value.shape[:-2])


def covariance_of(value: Tensor, form: ObjectiveForm) -> Tensor:
    """The covariances that a parameter gives, `(M, size, size)`.

    Args:
        value: The parameter.
        form: As what it gives them.
    """
    if form.given in ("scale", "variance"):
        flat = value.reshape(-1, 1, 1)
        return flat * flat if form.given == "scale" else flat
    matrices = value.reshape(-1, form.size, form.size)
    if form.given == "scale_tril":
        return matrices.tril() @ matrices.tril().mT
    return matrices if form.given == "covariance_matrix" else _inverse(matrices)


def _given(covariance: Tensor, form: ObjectiveForm) -> Tensor:
    """Covariances as a parameter gives them."""
    if form.given == "scale":
        return covariance.sqrt()
    if form.given == "scale_tril":
        tril: Tensor = torch.linalg.cholesky(covariance)
        return tril
    return _inverse(covariance) if form.given == "precision_matrix" else covariance


def _least_variance(floor: float, form: ObjectiveForm) -> float:
    return floor * floor if form.given in ("scale", "scale_tril") else floor


def _raised(covariance: Tensor, least: float) -> Tensor:
    """The covariances with their variances along their own axes no smaller than the least."""
    variance, axes = _eigen(covariance)
    raised = (axes * variance.clamp(min=least)[..., None, :]) @ axes.mT
    return torch.where((variance < least).any(-1)[:, None, None], raised, covariance)


def _is_singular(scatter: Tensor, magnitude: Tensor) -> Tensor:
    """Which covariances have a direction without spread, but for rounding, next to what was summed."""
    root = magnitude.where(magnitude > 0, 1.0).rsqrt()
    relative = root[..., :, None] * scatter * root[..., None, :]
    least = _eigen(relative)[0].amin(-1)
    return least <= CANCELLED * torch.finfo(scatter.dtype).eps * scatter.shape[-1]


def _eigen(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors; numbers are their own."""
    if matrices.shape[-1] == 1:
        return matrices[..., 0], torch.ones_like(matrices)
    values, vectors = torch.linalg.eigh(matrices)
    return values, vectors


def _inverse(matrices: Tensor) -> Tensor:
    if matrices.shape[-1] == 1:
        return 1 / matrices
    inverse: Tensor = torch.cholesky_inverse(torch.linalg.cholesky(matrices))
    return inverse


def _solved(matrices: Tensor, vectors: Tensor) -> Tensor:
    if matrices.shape[-1] == 1:
        return vectors / matrices[..., 0]
    return torch.cholesky_solve(vectors[..., None], torch.linalg.cholesky(matrices))[..., 0]
