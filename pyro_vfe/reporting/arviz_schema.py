"""ArviZ's schema: from arrays with named dims to a tree that every ArviZ reads, plots and stores.

    posterior, prior, log_likelihood, sample_stats, ...     (chain=1, draw, *plates, *event)
    observed_data, constant_data, variational               (*plates, ...)

Needs NumPy and xarray alone, and knows neither torch nor Pyro nor ArviZ.

References:
    Kumar, Carroll, Hartikainen and Martin (2019), ArviZ a unified library for exploratory analysis of Bayesian models.
    The InferenceData schema specification, https://python.arviz.org/en/stable/schema/schema.html.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyro_vfe.errors import NameClashError, ShapeError, VFEError

if TYPE_CHECKING:
    import xarray

SAMPLED = (
    "posterior",
    "posterior_predictive",
    "log_likelihood",
    "sample_stats",
    "prior",
    "prior_predictive",
    "sample_stats_prior",
)
"""The groups of which every variable has one value per draw."""

ORDER = (*SAMPLED, "observed_data", "constant_data")
"""How ArviZ orders its groups; others follow."""

_RESERVED = ("chain", "draw", "sample")
"""Names that ArviZ gives to dims of its own."""

_CONSTANTS = "constant_data"
_LIKELIHOOD = "log_likelihood"

Variables = dict[str, "xarray.Variable"]
Groups = dict[str, Variables]
Labels = dict[str, NDArray[Any]]


def tree_of(
    groups: Mapping[str, Mapping[str, "xarray.Variable"]],
    *,
    dims: Mapping[str, Sequence[str | None]] | None = None,
    coords: Mapping[str, ArrayLike] | None = None,
    labels: Mapping[str, ArrayLike] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> "xarray.DataTree":
    """Returns a tree in ArviZ's schema: one chain, integers where a dim has no labels, no empty groups.

    Booleans and integers become int64. Names that xarray or ArviZ could not take are changed: "/" becomes ".", a dim
    that is called like a variable or like one of ArviZ's own dims gets the suffix "_dim", a variable that is called
    like one of ArviZ's dims (or a constant that is called like a plate) gets "_var"; its attribute `site` then has the
    name it had. Where the draws do not move the log-likelihood of a datum (point estimates, all else summed out), its
    values are told apart by some 1e-12 of themselves, because ArviZ's Pareto fit takes no equal numbers: what `loo`
    says stays right to as many digits, and the variable's attribute `told_apart` says what was done.

    Args:
        groups: Variables by name, by group; in the groups of `SAMPLED` the first dim of each is "draw".
        dims: Names for a variable's dims besides chain and draw, in every group that has it: for all of them, or for
            the last ones. None leaves a name as it is.
        coords: Labels along a dim, by its name (the new one where `dims` has one).
        labels: The same, where `coords` has none; a dim that is not there is ignored, and a renamed one followed.
        attrs: More attributes of the tree and of each group: strings and numbers.

    Raises:
        VFEError: `dims` or `coords` name nothing that is there, or values cannot be stored.
        ShapeError: Names or labels are not as many as there are dims or elements, or one dim has two sizes.
        NameClashError: Two names become one.
    """
    import xarray

    kept = {group: dict(groups[group]) for group in sorted(groups, key=_place) if groups[group]}
    renamed = _user_names(kept, dims or {})
    kept = {group: _with_dims(variables, renamed) for group, variables in kept.items()}
    names = _stored_names(kept)
    stored = {group: _stored(group, variables, names) for group, variables in kept.items()}
    given = dict(labels or {})
    followed = {new: given[old] for of in renamed.values() for old, new in of.items() if old in given}
    along = {names.dims[dim]: _labels(dim, of) for dim, of in {**given, **followed}.items() if dim in names.dims}
    along |= {_known_dim(dim, names, stored): _labels(dim, of) for dim, of in (coords or {}).items()}
    about = {**_standard_attrs(), **_storable(attrs or {}, "The tree")}
    datasets = {group: _dataset(group, variables, along, about) for group, variables in stored.items()}
    return xarray.DataTree.from_dict({"/": xarray.Dataset(attrs=about), **datasets})


def _place(group: str) -> int:
    return ORDER.index(group) if group in ORDER else len(ORDER)


def _own_dims(group: str, variable: "xarray.Variable") -> tuple[str, ...]:
    """The dims besides the draws."""
    found = tuple(str(dim) for dim in variable.dims)
    if group not in SAMPLED:
        return found
    assert found[:1] == ("draw",), f"{group}: {found} does not begin with the draws"
    return found[1:]


def _shape(variable: "xarray.Variable") -> str:
    return ", ".join(f"{dim}: {size}" for dim, size in variable.sizes.items()) or "a scalar"


def _user_names(groups: Groups, dims: Mapping[str, Sequence[str | None]]) -> dict[str, dict[str, str]]:
    """The user's name for each dim, by variable: read off where the variable has most dims."""
    known = {name for variables in groups.values() for name in variables}
    found = {}
    for name, chosen in dims.items():
        if name not in known:
            raise VFEError(f"`dims` names '{name}', and there is no such variable.", hint=_one_of("Variables", known))
        if isinstance(chosen, str):
            raise VFEError(f"`dims` gives '{name}' the string '{chosen}'.", hint=f"Give a list of names: ['{chosen}'].")
        holders = [(group, variables[name]) for group, variables in groups.items() if name in variables]
        # What is in a group of this package's own may be about the variable, and have more dims than it has.
        holders = [held for held in holders if held[0] in ORDER] or holders
        group, widest = max(holders, key=lambda held: len(_own_dims(*held)))
        own = _own_dims(group, widest)
        if len(chosen) > len(own):
            raise ShapeError(
                f"`dims` gives '{name}' {len(chosen)} names ({', '.join(map(str, chosen))}) for {len(own)} dims "
                f"({_shape(widest)} in {group}).",
                hint="Name the dims besides chain and draw: all of them, or the last ones.",
            )
        last = own[len(own) - len(chosen) :]
        found[name] = {old: new for old, new in zip(last, chosen, strict=True) if new is not None}
        _check_one_each([found[name].get(dim, dim) for dim in own], name)
    return found


def _check_one_each(names: Sequence[str], variable: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise NameClashError(
                f"Two dims of variable '{variable}' are called '{name}' ({', '.join(names)}).",
                hint="Give each a name of its own in `dims`.",
            )


def _with_dims(variables: Variables, renamed: Mapping[str, Mapping[str, str]]) -> Variables:
    return {name: _renamed(variable, renamed.get(name, {})) for name, variable in variables.items()}


def _renamed(variable: "xarray.Variable", names: Mapping[str, str]) -> "xarray.Variable":
    return type(variable)(tuple(names.get(str(dim), str(dim)) for dim in variable.dims), variable.data, variable.attrs)


@dataclass(frozen=True)
class _Names:
    """What things are called in the tree."""

    variables: dict[str, str]
    """By the name of a site or quantity."""
    constants: dict[str, str]
    """By the name of a constant; these give way to plates."""
    dims: dict[str, str]
    """By the name of a plate, or the user's name of a dim."""

    def of(self, group: str) -> dict[str, str]:
        """The names of a group's variables."""
        return self.constants if group == _CONSTANTS else self.variables


def _stored_names(groups: Groups) -> _Names:
    """Sites keep their names before plates, and plates before constants."""
    sites = _unique(name for group, variables in groups.items() if group != _CONSTANTS for name in variables)
    constants = _unique(groups.get(_CONSTANTS, ()))
    plates = _unique(dim for group, of in groups.items() for v in of.values() for dim in _own_dims(group, v))
    variables = {name: _free(name, _RESERVED, "_var") for name in sites}
    dims = {dim: _free(dim, {*_RESERVED, *variables.values()}, "_dim") for dim in plates}
    taken = {*_RESERVED, *dims.values()}
    names = _Names(variables, {name: _free(name, taken, "_var") for name in constants}, dims)
    for of in (names.variables, names.constants, names.dims):
        _check_distinct(of)
    return names


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _free(name: str, taken: Iterable[str], suffix: str) -> str:
    """The name without slashes, which are groups in netCDF, and with suffixes until it is free."""
    found = name.replace("/", ".")
    while found in taken:
        found += suffix
    return found


def _check_distinct(names: Mapping[str, str]) -> None:
    first: dict[str, str] = {}
    for name, stored in names.items():
        if first.setdefault(stored, name) != name:
            raise NameClashError(
                f"'{first[stored]}' and '{name}' would both be called '{stored}' in the tree.", hint="Rename one."
            )


def _stored(group: str, variables: Variables, names: _Names) -> Variables:
    found = {}
    for name, variable in variables.items():
        stored = names.of(group)[name]
        values = _values(np.asarray(variable.data), f"Variable '{name}' of {group}")
        attrs = _storable(variable.attrs, f"Variable '{name}' of {group}")
        if stored != name:
            attrs["site"] = name
        if group == _LIKELIHOOD:
            values, moved = _told_apart(values.astype(np.float64, copy=False))
            if moved:
                attrs["told_apart"] = moved
        dims = tuple(names.dims[dim] for dim in _own_dims(group, variable))
        if group in SAMPLED:
            dims, values = ("chain", "draw", *dims), values[None]
        found[stored] = type(variable)(dims, values, attrs)
    return found


def _values(values: NDArray[Any], where: str) -> NDArray[Any]:
    """Values in a type that ArviZ expects and netCDF stores."""
    if values.dtype.kind in "biu":
        return values.astype(np.int64, copy=False)
    if values.dtype.kind == "O" and all(isinstance(value, str) for value in values.flat):
        return values.astype(np.str_)
    if values.dtype.kind in "OcV":
        raise VFEError(f"{where} holds {values.dtype}, which cannot be stored.", hint="Give numbers or strings.")
    return values


def _told_apart(log_likelihood: NDArray[np.float64]) -> tuple[NDArray[np.float64], str]:
    """Log-likelihoods whose lowest draws differ, and in words what was done for that, if anything.

    `loo` weighs draws by 1 / likelihood and fits a Pareto distribution to the largest weights. Where these are equal
    there is nothing to fit and nothing to worry about; yet ArviZ 0.2x reports k = inf and warns, and 1.x raises. Even
    steps of a few roundings make a bounded tail, k < 0.5, and leave the weights equal.
    """
    num_draws = len(log_likelihood)
    if num_draws < 2 or not log_likelihood.size:
        return log_likelihood, ""
    width = 4 * num_draws * np.finfo(np.float64).eps * np.maximum(1.0, np.abs(log_likelihood[0]))
    in_tail = min(num_draws, 2 + int(min(num_draws / 5, 3 * num_draws**0.5)))
    tail = np.partition(log_likelihood, in_tail - 1, axis=0)[:in_tail]
    finite = np.isfinite(tail).all(0)
    equal = finite & (np.ptp(np.where(finite, tail, 0.0), axis=0) < width)
    if not equal.any():
        return log_likelihood, ""
    # The golden ratio's multiples, modulo 1, fill the unit interval evenly and in no order.
    places = np.arange(num_draws) * (np.sqrt(5) - 1) / 2 % 1 - 0.5
    moved = np.where(equal, width, 0.0)
    words = f"{equal.sum()} of {equal.size} data, alike in all draws, were told apart by {moved.max():.0e} nats"
    return log_likelihood + places.reshape(-1, *(1,) * equal.ndim) * moved, words


def _known_dim(dim: str, names: _Names, groups: Groups) -> str:
    sizes = {str(d): size for variables in groups.values() for v in variables.values() for d, size in v.sizes.items()}
    stored = names.dims.get(dim, dim)
    if stored not in sizes:
        known = {f"{name} ({size})" for name, size in sizes.items()}
        raise VFEError(f"`coords` names '{dim}', and there is no such dim.", hint=_one_of("Dims", known))
    return stored


def _one_of(what: str, known: Iterable[str]) -> str:
    return f"{what} are: {', '.join(sorted(known))}."


def _labels(dim: str, labels: ArrayLike) -> NDArray[Any]:
    found = _values(np.asarray(labels), f"The labels of dim '{dim}'")
    if found.ndim != 1:
        raise ShapeError(f"The labels of dim '{dim}' have shape {found.shape}.", hint="Give a flat list of labels.")
    return found


def _dataset(group: str, variables: Variables, labels: Labels, attrs: Mapping[str, Any]) -> "xarray.Dataset":
    import xarray

    sizes: dict[str, int] = {}
    holders: dict[str, str] = {}
    for name, dim, size in _sizes(variables):
        if sizes.setdefault(dim, size) != size:
            raise ShapeError(
                f"Dim '{dim}' has {sizes[dim]} elements in variable '{holders[dim]}' and {size} in '{name}' ({group}).",
                hint="Give one of them another name in `dims`.",
            )
        holders.setdefault(dim, name)
    for dim, size in sizes.items():
        if dim in labels and len(labels[dim]) != size:
            raise ShapeError(
                f"Dim '{dim}' of variable '{holders[dim]}' ({group}) has {size} elements, and there are "
                f"{len(labels[dim])} labels.",
                hint="Give one label per element in `coords`.",
            )
    coords = {dim: labels.get(dim, np.arange(size)) for dim, size in sizes.items()}
    return xarray.Dataset(variables, coords=coords, attrs=attrs)


def _sizes(variables: Variables) -> Iterator[tuple[str, str, int]]:
    for name, variable in variables.items():
        for dim, size in variable.sizes.items():
            yield name, str(dim), size


def _storable(attrs: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """Attributes as strings and numbers, which netCDF stores and reads back as they were."""
    found: dict[str, Any] = {}
    for key, value in attrs.items():
        plain = value.item() if isinstance(value, np.generic) else value
        if not isinstance(plain, str | int | float):
            raise VFEError(
                f"{where} has attribute '{key}' of type {type(value).__name__}, which cannot be stored.",
                hint="Give a string or a number.",
            )
        found[str(key)] = int(plain) if isinstance(plain, bool) else plain
    return found


def _standard_attrs() -> dict[str, str]:
    """What the schema asks for of every group."""
    try:
        own = version("pyro-vfe")
    except PackageNotFoundError:
        own = "unknown"
    return {
        "created_at": datetime.now(timezone.utc).isoformat(),
        "creation_library": "pyro_vfe",
        "creation_library_version": own,
        "creation_library_language": "Python",
        "inference_library": "pyro_vfe",
        "inference_library_version": own,
    }
