"""What ArviZ itself does with the tree: 0.2x on InferenceData, 1.x on the tree. Runs without torch too."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray
from arviz_trees import NUM_DATA, NUM_DRAWS, K, errors, groups_of_a_mixture, inference_data, pareto, schema
from xarray import Variable

IS_OLD = hasattr(az, "from_datatree")
"""Whether this is ArviZ 0.2x."""

pytestmark = [
    # ArviZ 0.23 with the pandas and the matplotlib of today
    pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.sort_values:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping:DeprecationWarning"),
]

POINT_ESTIMATES = ["rates"]
DRAWN = ["v", "switch", "mu"]


def mixture(shift: float = 0.0) -> Any:
    return inference_data.inference_data_of(schema.tree_of(groups_of_a_mixture(shift)))


def with_likelihood(values: np.ndarray) -> Any:
    groups = groups_of_a_mixture()
    groups["log_likelihood"] = {"u": Variable(("draw", "data"), values)}
    return inference_data.inference_data_of(schema.tree_of(groups))


@contextmanager
def figures() -> Iterator[None]:
    """Closes what was drawn."""
    yield
    plt.close("all")


def elpd(found: Any) -> float:
    return float(found.elpd_loo if IS_OLD else found.elpd)


def effective_parameters(found: Any) -> float:
    return float(found.p_loo if IS_OLD else found.p)


def test_arviz_gets_what_it_works_on() -> None:
    assert isinstance(mixture(), az.InferenceData if IS_OLD else xarray.DataTree)


def test_every_group_arrives_the_packages_own_included() -> None:
    groups = groups_of_a_mixture()
    found = mixture()
    arrived = found.groups() if IS_OLD else list(found.children)
    assert sorted(arrived) == sorted(groups)
    np.testing.assert_array_equal(found["variational"]["q_v"], groups["variational"]["q_v"])


@pytest.mark.filterwarnings("ignore:invalid value encountered in scalar divide:RuntimeWarning")
def test_summary_has_the_moments_of_the_draws() -> None:
    table = az.summary(mixture(), round_to=12) if IS_OLD else az.summary(mixture(), round_to="none")
    draws = groups_of_a_mixture()["posterior"]
    assert len(table) == NUM_DATA + 2 + K
    assert float(table.loc["mu", "mean"]) == pytest.approx(float(draws["mu"].mean()))
    assert float(table.loc["mu", "sd"]) == pytest.approx(float(draws["mu"].std(ddof=1)))
    assert float(table.loc["v[3]", "mean"]) == pytest.approx(float(draws["v"][:, 3].mean()))
    assert float(table.loc["rates[1]", "mean"]) == pytest.approx(5.0)


def test_loo_is_the_sum_of_the_leave_one_out_densities() -> None:
    # 1 / p(u_i | others) is the mean of 1 / p(u_i | draw) over the draws; the Pareto fit smooths the largest few.
    values = groups_of_a_mixture()["log_likelihood"]["u"].values
    harmonic = -(np.log(np.mean(np.exp(-values), axis=0))).sum()
    assert elpd(az.loo(mixture())) == pytest.approx(harmonic, abs=0.02)


@pytest.mark.parametrize("num_draws", [30, 200, 5000])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_loo_of_point_estimates_is_their_log_score(num_draws: int, scale: float) -> None:
    scores = np.random.default_rng(0).normal(-3, 1, size=NUM_DATA) * scale
    found = az.loo(with_likelihood(np.broadcast_to(scores, (num_draws, NUM_DATA))), pointwise=True)
    assert elpd(found) == pytest.approx(scores.sum(), rel=1e-10)
    assert effective_parameters(found) == pytest.approx(0.0, abs=1e-10 * scale)
    assert not found.warning
    assert float(np.max(found.pareto_k)) < 0.5


def test_loo_takes_data_that_no_draw_moves_beside_others() -> None:
    values = groups_of_a_mixture()["log_likelihood"]["u"].values.copy()
    values[:, :4] = -2.0
    found = az.loo(with_likelihood(values), pointwise=True)
    assert not found.warning
    pointwise = found.loo_i if IS_OLD else found.elpd_i
    np.testing.assert_allclose(pointwise[:4], -2.0, rtol=1e-10)


def test_loo_still_warns_of_a_datum_that_few_draws_explain() -> None:
    values = groups_of_a_mixture()["log_likelihood"]["u"].values.copy()
    values[:, 0] = -2.0 + 2.0 * np.log(np.random.default_rng(0).uniform(size=NUM_DRAWS))
    with pytest.warns(UserWarning, match="shape parameter of Pareto distribution"):
        assert az.loo(with_likelihood(values)).warning


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compare_ranks_by_the_log_score() -> None:
    alike = with_likelihood(np.broadcast_to(np.linspace(-3, -1, NUM_DATA), (NUM_DRAWS, NUM_DATA)))
    table = az.compare({"worse": mixture(1.0), "best": alike, "good": mixture()})
    assert list(table.index) == ["best", "good", "worse"]
    scores = table["elpd_loo" if IS_OLD else "elpd"].astype(float)
    assert scores["best"] == pytest.approx(-2.0 * NUM_DATA, rel=0.03)
    assert scores["good"] - scores["worse"] == pytest.approx(NUM_DATA, abs=1.5)


OLD_PLOTS = ["plot_trace", "plot_posterior", "plot_density", "plot_forest", "plot_autocorr", "plot_ess"]
NEW_PLOTS = ["plot_trace_dist", "plot_dist", "plot_trace", "plot_forest", "plot_autocorr", "plot_ess"]


@pytest.mark.parametrize("name", OLD_PLOTS if IS_OLD else NEW_PLOTS)
@pytest.mark.parametrize("variables", [DRAWN, ["v"], ["switch"], ["mu"]], ids="-".join)
def test_draws_can_be_plotted_discrete_ones_included(name: str, variables: list[str]) -> None:
    with figures():
        getattr(az, name)(mixture(), var_names=variables)
        assert plt.get_fignums()


@pytest.mark.filterwarnings("ignore:Your data appears to have a single value:UserWarning")
@pytest.mark.parametrize("name", ["plot_posterior", "plot_forest"] if IS_OLD else ["plot_dist", "plot_forest"])
def test_point_estimates_can_be_plotted(name: str) -> None:
    with figures():
        getattr(az, name)(mixture(), var_names=POINT_ESTIMATES)
        assert plt.get_fignums()


@pytest.mark.filterwarnings("ignore:Variables u in '(observed|predictive)' look discrete:UserWarning")
@pytest.mark.parametrize("group", ["posterior", "prior"])
def test_predictions_can_be_plotted_beside_the_data(group: str) -> None:
    with figures():
        if IS_OLD:
            az.plot_ppc(mixture(), group=group, num_pp_samples=20)
        else:
            az.plot_ppc_dist(mixture(), group=f"{group}_predictive", num_samples=20)
        assert plt.get_fignums()


def test_pareto_ks_can_be_plotted() -> None:
    with figures():
        az.plot_khat(az.loo(mixture(), pointwise=True))
        assert plt.get_fignums()


def test_what_arviz_stored_comes_back_as_it_was(tmp_path: Path) -> None:
    tree = schema.tree_of(groups_of_a_mixture(), labels={"v_value": ["a", "b", "c"]}, attrs={"seed": 3})
    inference_data.inference_data_of(tree).to_netcdf(tmp_path / "mixture.nc")
    back = az.from_netcdf(tmp_path / "mixture.nc")
    assert back.attrs == tree.attrs
    for group, node in tree.children.items():
        found = back[group] if IS_OLD else back[group].to_dataset()
        xarray.testing.assert_identical(found.load(), node.to_dataset())
        for name in (*node.data_vars, *node.coords):
            assert found[name].dtype == node[name].dtype, f"{group}/{name}"


# The Pareto k of importance weights


@pytest.mark.parametrize("variance", [0.1, 0.25, 0.5, 0.8])
def test_k_of_a_narrow_normal_for_a_standard_one_is_one_minus_its_variance(variance: float) -> None:
    # w = exp(x^2 (1/s - 1) / 2) at x ~ N(0, s): P(w > t) falls as t^(-1 / (1 - s)), up to a logarithm.
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(20, 5000)) * variance**0.5
    ks = [pareto.pareto_k(row**2 * (1 / variance - 1) / 2) for row in draws]
    assert np.mean(ks) == pytest.approx(1 - variance, abs=0.12)


@pytest.mark.parametrize("k", [0.2, 0.7, 1.3])
def test_k_of_pareto_weights_is_theirs(k: float) -> None:
    uniform = np.random.default_rng(1).uniform(size=(20, 5000))
    ks = [pareto.pareto_k(1e4 - k * np.log(row)) for row in uniform]
    # ArviZ's fit leans towards 0.5, by ten draws' worth.
    assert np.mean(ks) == pytest.approx((212 * k + 10 * 0.5) / 222, abs=0.06)


@pytest.mark.parametrize(
    "log_weights",
    [
        np.zeros(1000),
        -1e5 + 1e-9 * np.random.default_rng(0).normal(size=1000),
        np.where(np.random.default_rng(0).uniform(size=1000) < 0.5, 3.0, 0.0),
    ],
    ids=["equal", "equal but for rounding", "the largest are equal"],
)
def test_weights_without_a_tail_have_the_best_k(log_weights: np.ndarray) -> None:
    assert pareto.pareto_k(log_weights) == -np.inf
    assert pareto.warn_if_unreliable(log_weights) == -np.inf


@pytest.mark.parametrize(
    "log_weights",
    [np.zeros(0), np.zeros(24), np.full(100, -np.inf), np.full(100, np.nan), np.repeat([0.0, 0.1], [990, 10])],
    ids=["no draws", "few draws", "no weight", "undefined", "two values"],
)
def test_weights_that_allow_no_fit_have_no_k(log_weights: np.ndarray) -> None:
    assert np.isnan(pareto.pareto_k(log_weights))
    assert np.isnan(pareto.warn_if_unreliable(log_weights))


def test_draws_of_weight_zero_do_not_stand_in_the_way() -> None:
    rng = np.random.default_rng(0)
    some = -0.2 * np.log(rng.uniform(size=1000))
    assert pareto.pareto_k(np.append(some, np.full(1000, -np.inf))) < 0.5


def test_even_weights_are_worth_their_number() -> None:
    assert pareto.worth(np.full(7, -1e5)) == pytest.approx(7.0)
    assert pareto.worth(np.array([0.0, -np.inf, -np.inf])) == pytest.approx(1.0)
    assert pareto.worth(np.log([1.0, 3.0])) == pytest.approx(1.6)


def warnings_of(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in found if issubclass(warning.category, errors.VFEWarning)]


def test_a_guide_whose_draws_do_not_stand_for_the_posterior_is_warned_of() -> None:
    rng = np.random.default_rng(0)
    heavy = -1.2 * np.log(rng.uniform(size=1000))
    (words,) = warnings_of(lambda: pareto.warn_if_unreliable(heavy))
    assert f"k = {pareto.pareto_k(heavy):.2f}, more than 0.7" in words
    assert f"1000 draws are worth {pareto.worth(heavy):.1f}" in words
    assert warnings_of(lambda: pareto.warn_if_unreliable(heavy / 4)) == []


def test_a_rare_heavy_value_of_a_discrete_guide_is_warned_of_without_a_k() -> None:
    # Q has 1 % where the posterior has 99 %.
    (words,) = warnings_of(lambda: pareto.warn_if_unreliable(np.log(np.repeat([0.01 / 0.99, 99.0], [990, 10]))))
    assert "too uneven" in words and "worth 10.2" in words
