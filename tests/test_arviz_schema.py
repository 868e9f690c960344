"""The tree that ArviZ takes, from groups of named arrays. Runs without torch too: `make test-arviz`."""

from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import xarray
from arviz_trees import NUM_DATA, NUM_DRAWS, PIXELS, K, errors, groups_of_a_mixture, schema
from xarray import Variable

tree_of = schema.tree_of


def a_site(name: str, *dims: str, group: str = "posterior") -> dict[str, dict[str, Variable]]:
    """One variable, three elements along each dim."""
    return {group: {name: Variable(dims, np.zeros([3] * len(dims)))}}


def merged(*parts: dict[str, dict[str, Variable]]) -> dict[str, dict[str, Variable]]:
    """The groups of all parts."""
    found: dict[str, dict[str, Variable]] = {}
    for part in parts:
        for group, variables in part.items():
            found.setdefault(group, {}).update(variables)
    return found


@pytest.mark.parametrize("group", groups_of_a_mixture())
def test_every_value_arrives_with_its_dims(group: str) -> None:
    groups = groups_of_a_mixture()
    tree = tree_of(groups)
    assert list(tree[group].data_vars) == list(groups[group])
    for name, variable in groups[group].items():
        found = tree[group][name]
        leading = {"chain": 1} if group in schema.SAMPLED else {}
        assert dict(found.sizes) == {**leading, **variable.sizes}
        np.testing.assert_array_equal(found.values.reshape(variable.shape), variable.values)


def test_units_stay_with_their_variable() -> None:
    assert tree_of(groups_of_a_mixture())["variational"]["free_energy"].attrs == {"units": "nats"}


def test_dims_without_labels_count_from_zero() -> None:
    tree = tree_of(groups_of_a_mixture())
    sizes = {"chain": 1, "draw": NUM_DRAWS, "data": NUM_DATA, "u_dim_0": PIXELS, "v_value": K, "step": 3}
    for group in tree.children.values():
        for dim in group.dims:
            np.testing.assert_array_equal(group.coords[dim], np.arange(sizes[dim]))
            assert group.coords[dim].dtype == np.int64


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int32", "int64"])
def test_discrete_values_are_int64(dtype: str) -> None:
    values = np.array([0, 1, 1], dtype=dtype)
    found = tree_of({"posterior": {"v": Variable("draw", values)}})["posterior"]["v"]
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found[0], [0, 1, 1])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_continuous_values_keep_their_precision(dtype: str) -> None:
    values = np.array([0.5, 1.5], dtype=dtype)
    assert tree_of({"posterior": {"w": Variable("draw", values)}})["posterior"]["w"].dtype == dtype


def test_strings_of_any_kind_can_be_stored(tmp_path: Path) -> None:
    words = np.array(["ill", "healthy", "naïve"], dtype=object)
    tree = tree_of({"observed_data": {"u": Variable("data", words)}}, coords={"data": words})
    tree.to_netcdf(tmp_path / "words.nc", engine="h5netcdf")
    with xarray.open_datatree(tmp_path / "words.nc", engine="h5netcdf") as back:
        assert back["observed_data"]["u"].values.tolist() == words.tolist()
        assert back["observed_data"].coords["data"].values.tolist() == words.tolist()


def test_what_is_the_same_in_all_draws_takes_no_memory_of_its_own() -> None:
    rates = np.array([1.0, 5.0, 9.0])
    drawn = Variable(("draw", "v_value"), np.broadcast_to(rates, (10**6, 3)))
    assert np.shares_memory(tree_of({"posterior": {"rates": drawn}})["posterior"]["rates"].values, rates)


# Names for dims, labels along them


def test_labels_stand_along_their_dim_in_every_group() -> None:
    states = ["low", "middle", "high"]
    tree = tree_of(groups_of_a_mixture(), coords={"v_value": states, "data": np.arange(100, 112)})
    assert tree["posterior"]["rates"].sel(v_value="middle").values.tolist() == [[5.0] * NUM_DRAWS]
    assert tree["variational"].coords["v_value"].values.tolist() == states
    for group in ("posterior", "log_likelihood", "observed_data", "constant_data", "prior", "variational"):
        assert tree[group].coords["data"].values.tolist() == list(range(100, 112))


def test_the_users_labels_come_before_what_the_programs_give() -> None:
    labels = {"v_value": [10, 20, 30], "data": np.arange(NUM_DATA) + 1, "unheard_of": [1]}
    tree = tree_of(groups_of_a_mixture(), labels=labels, coords={"v_value": ["a", "b", "c"]})
    assert tree["variational"].coords["v_value"].values.tolist() == ["a", "b", "c"]
    assert tree["variational"].coords["data"].values.tolist() == list(range(1, NUM_DATA + 1))


@pytest.mark.parametrize(
    ("names", "dims"),
    [
        (["photo", "pixel"], ("photo", "pixel")),
        (["pixel"], ("data", "pixel")),
        ([None, "pixel"], ("data", "pixel")),
        (["photo", None], ("photo", "u_dim_0")),
        ([], ("data", "u_dim_0")),
    ],
)
def test_the_user_names_all_dims_of_a_variable_or_the_last_ones(names: list[str], dims: tuple[str, ...]) -> None:
    tree = tree_of(groups_of_a_mixture(), dims={"u": names})
    assert tree["observed_data"]["u"].dims == dims
    assert tree["posterior_predictive"]["u"].dims == ("chain", "draw", *dims)
    # One number per datum, whatever its pixels are called
    assert tree["log_likelihood"]["u"].dims == ("chain", "draw", dims[0])
    assert tree["posterior"]["v"].dims == ("chain", "draw", "data")


def test_a_table_about_a_variable_has_no_say_in_what_its_dims_are() -> None:
    groups = groups_of_a_mixture()
    groups["variational"]["v"] = groups["variational"]["q_v"]
    tree = tree_of(groups, dims={"v": ["patient"]})
    assert tree["posterior"]["v"].dims == ("chain", "draw", "patient")
    assert tree["variational"]["v"].dims == ("patient", "v_value")


def test_labels_follow_a_dim_to_its_new_name() -> None:
    given = {"labels": {"v_value": ["a", "b", "c"]}, "dims": {"rates": ["state"], "q_v": ["state"]}}
    tree = tree_of(groups_of_a_mixture(), **given)
    assert tree["posterior"].coords["state"].values.tolist() == ["a", "b", "c"]
    assert tree["variational"].coords["state"].values.tolist() == ["a", "b", "c"]
    again = tree_of(groups_of_a_mixture(), **given, coords={"state": [7, 8, 9]})
    assert again["posterior"].coords["state"].values.tolist() == [7, 8, 9]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"dims": {"nu": ["a"]}}, "VFEError", ["'nu'", "mu, "]),
        ({"dims": {"u": "pixel"}}, "VFEError", ["'u'", r"\['pixel'\]"]),
        ({"dims": {"u": ["a", "b", "c"]}}, "ShapeError", ["'u'", "3 names", "2 dims", "data: 12, u_dim_0: 2"]),
        ({"dims": {"mu": ["a"]}}, "ShapeError", ["'mu'", "1 names", "0 dims", "chain and draw"]),
        ({"dims": {"u": ["data"]}}, "NameClashError", ["'u'", "'data'"]),
        ({"dims": {"rates": ["data"]}}, "ShapeError", ["'data'", "12", "'v'", "3", "'rates'", "posterior", "`dims`"]),
        ({"coords": {"date": [1]}}, "VFEError", ["'date'", r"data \(12\)"]),
        ({"coords": {"data": [1, 2]}}, "ShapeError", ["'data'", "'v'", "12 elements", "2 labels"]),
        ({"coords": {"data": [[1, 2]]}}, "ShapeError", ["'data'", r"\(1, 2\)"]),
        ({"coords": {"data": [object()] * 12}}, "VFEError", ["'data'", "object"]),
        ({"dims": {"v": ["patient"]}, "coords": {"patient": [1]}}, "ShapeError", ["'patient'", "'v'", "12 elements"]),
        ({"labels": {"data": [1, 2]}}, "ShapeError", ["'data'", "2 labels"]),
    ],
)
def test_names_and_labels_that_do_not_fit_are_refused(arguments: dict, error: str, words: list[str]) -> None:
    with pytest.raises(getattr(errors, error)) as refusal:
        tree_of(groups_of_a_mixture(), **arguments)
    for word in words:
        assert refusal.match(word)


# Names that xarray or netCDF could not take


def test_a_plate_called_like_a_site_has_its_name_changed_everywhere() -> None:
    groups = merged(a_site("z", "draw", "z"), a_site("u", "z", group="observed_data"))
    tree = tree_of(groups, coords={"z": ["a", "b", "c"]})
    assert tree["posterior"]["z"].dims == ("chain", "draw", "z_dim")
    assert tree["observed_data"]["u"].dims == ("z_dim",)
    assert tree["observed_data"].coords["z_dim"].values.tolist() == ["a", "b", "c"]


def test_a_constant_called_like_a_plate_gives_way_to_it() -> None:
    groups = merged(a_site("z", "draw", "data"), a_site("data", "data", group="constant_data"))
    tree = tree_of(groups)
    assert tree["posterior"]["z"].dims == ("chain", "draw", "data")
    assert tree["constant_data"]["data_var"].dims == ("data",)
    assert tree["constant_data"]["data_var"].attrs == {"site": "data"}


@pytest.mark.parametrize("name", ["chain", "draw", "sample"])
def test_names_of_arviz_itself_are_not_taken(name: str) -> None:
    groups = merged(a_site(name, "draw"), a_site("u", name, group="observed_data"))
    tree = tree_of(groups)
    assert tree["posterior"][f"{name}_var"].attrs == {"site": name}
    assert tree["observed_data"]["u"].dims == (f"{name}_dim",)


def test_sites_of_a_scope_keep_no_slash(tmp_path: Path) -> None:
    tree = tree_of(a_site("left/z", "draw", "left/data"), dims={"left/z": ["here/datum"]})
    assert tree["posterior"]["left.z"].dims == ("chain", "draw", "here.datum")
    assert tree["posterior"]["left.z"].attrs == {"site": "left/z"}
    tree.to_netcdf(tmp_path / "scope.nc", engine="h5netcdf")


def test_two_names_never_become_one() -> None:
    with pytest.raises(errors.NameClashError, match=r"'a/z' and 'a.z' would both be called 'a.z'"):
        tree_of(merged(a_site("a/z", "draw"), a_site("a.z", "draw")))


# Groups and attributes


def test_groups_come_in_arvizs_order_and_empty_ones_not_at_all() -> None:
    groups = {**groups_of_a_mixture(), "prior": {}, "sample_stats": {}}
    order = ["posterior", "posterior_predictive", "log_likelihood", "prior_predictive"]
    assert list(tree_of(groups).children) == [*order, "observed_data", "constant_data", "variational"]


def test_the_tree_and_every_group_say_when_and_by_what_they_were_made() -> None:
    tree = tree_of(groups_of_a_mixture(), attrs={"guide": "AutoMeanField", "seed": np.int64(3)})
    asked = {"created_at", "creation_library", "creation_library_version", "creation_library_language"}
    for node in (tree, *tree.children.values()):
        assert asked | {"inference_library", "inference_library_version", "guide", "seed"} == set(node.attrs)
        assert datetime.fromisoformat(node.attrs["created_at"]).utcoffset() == timedelta(0)
        assert node.attrs["seed"] == 3


@pytest.mark.parametrize("value", [None, [1, 2], {"a": 1}, np.arange(3)])
def test_attributes_that_netcdf_could_not_store_are_refused(value: object) -> None:
    with pytest.raises(errors.VFEError, match="attribute 'note' of type"):
        tree_of(groups_of_a_mixture(), attrs={"note": value})


def test_a_tree_comes_back_from_netcdf_as_it_was(tmp_path: Path) -> None:
    tree = tree_of(groups_of_a_mixture(), labels={"v_value": ["a", "b", "c"]}, attrs={"seed": 3})
    tree.to_netcdf(tmp_path / "tree.nc", engine="h5netcdf")
    with xarray.open_datatree(tmp_path / "tree.nc", engine="h5netcdf") as back:
        xarray.testing.assert_identical(back.load(), tree)
        for group, node in tree.children.items():
            for name in (*node.data_vars, *node.coords):
                assert back[group][name].dtype == node[name].dtype, f"{group}/{name}"


# Log-likelihoods that no draw moves


def likelihood_of(values: np.ndarray) -> xarray.DataArray:
    return tree_of({"log_likelihood": {"u": Variable(("draw", "data"), values)}})["log_likelihood"]["u"]


def test_log_likelihoods_that_differ_stay_as_they_are() -> None:
    values = np.random.default_rng(0).normal(-3, 1, size=(500, 7))
    values[:, 3] = np.where(np.arange(500) < 5, -5.0, -2.0)
    found = likelihood_of(values)
    np.testing.assert_array_equal(found[0], values)
    assert found.attrs == {}


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1.0, 1e6])
@pytest.mark.parametrize("num_draws", [25, 1000])
def test_log_likelihoods_alike_in_all_draws_are_told_apart_by_roundings(scale: float, num_draws: int) -> None:
    alike = np.array([-1.5, 0.5]) * scale
    values = np.column_stack([np.broadcast_to(alike, (num_draws, 2)), np.random.default_rng(0).normal(size=num_draws)])
    found = likelihood_of(values)
    np.testing.assert_array_equal(found[0, :, 2], values[:, 2])
    np.testing.assert_allclose(found[0, :, :2], values[:, :2], rtol=1e-12, atol=1e-12)
    assert [len(np.unique(found[0, :, datum])) for datum in (0, 1)] == [num_draws, num_draws]
    assert found.attrs["told_apart"].startswith("2 of 3 data")


def test_data_of_probability_zero_stay_impossible() -> None:
    found = likelihood_of(np.full((100, 2), -np.inf))
    assert bool((found == -np.inf).all())
