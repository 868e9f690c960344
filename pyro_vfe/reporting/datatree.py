r"""Everything that is known of a model, a guide and data, as a tree in ArviZ's schema.

    posterior               v, w ~ Q, or the exact posterior; parameters repeated       (chain, draw, *plates, *event)
    log_likelihood          log p(u_n | w), v summed out                                (chain, draw, *data plates)
    sample_stats            log P(v, w, u), log Q(v, w), log weight
    prior, *_predictive     what the model gives by itself, and at the draws
    variational             Q(v_i), P(v_i | u), F, surprise, gap, history                  no draws

References:
    Kumar, Carroll, Hartikainen and Martin (2019), ArviZ a unified library for exploratory analysis of Bayesian models.
    Merkle, Furr and Rabe-Hesketh (2019), Bayesian comparison of latent variable models: conditional versus marginal
    likelihoods.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from numpy.typing import ArrayLike

from pyro_vfe.errors import VFEError
from pyro_vfe.learning.history import History
from pyro_vfe.program.entry_points import entry_point
from pyro_vfe.program.given import given_guide
from pyro_vfe.program.given_parameters import reading
from pyro_vfe.program.layout import Program
from pyro_vfe.reporting.arviz_schema import tree_of
from pyro_vfe.reporting.gathering import Gatherer
from pyro_vfe.reporting.inference_data import inference_data_of
from pyro_vfe.reporting.pareto import warn_if_unreliable

if TYPE_CHECKING:
    import xarray


@entry_point(names=True)
def to_datatree(
    model: Program,
    guide: Program | None = None,
    *args: Any,
    num_samples: int = 1000,
    prior: bool = True,
    posterior_predictive: bool = True,
    dims: Mapping[str, Sequence[str | None]] | None = None,
    coords: Mapping[str, ArrayLike] | None = None,
    history: Any = None,
    progress_bar: bool = True,
    max_bytes: float | None = None,
    params: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> "xarray.DataTree":
    """Returns draws, exact marginals, log-likelihoods and free energies in ArviZ's schema, with one chain.

    Groups:
        posterior: Discrete latents as int64, drawn from the guide and, where it says nothing of them, from the exact
            posterior; other latents as the guide draws them; point estimates (a Delta in the guide, a parameter of the
            model) repeated for each draw. Weights of networks (`pyro.module`) are left out. A latent `v` that some
            branches of the programs lack, or a mask removes, has a variable `v_present` beside it, 1 or 0; where that
            is 0, `v` is NaN, or an integer that means nothing. So have sites of the groups below.
        log_likelihood: log p(u_n | w) of each datum in nats, discrete latents summed out, so that `arviz.loo` compares
            models. One variable, named like the observed site, or 'joint' where several are observed together. The
            data are the elements of the plates around all that tells of the same latents; a prior of a parameter,
            observed outside of them, is none of them. Without such plates everything is one datum. Where nothing is
            sampled it is the same for every draw: the log score of point estimates, which does not pay for parameters
            that were fitted to the same data.
        sample_stats: `lp` = log P(v, w, u), `log_q` = log Q(v, w) and their difference `log_weight`, the log of each
            draw's importance weight; `lp_marginal` and `log_q_marginal` with v summed out, where w is sampled.
        prior, prior_predictive, posterior_predictive: What the model draws by itself, and given the draws.
        observed_data, constant_data: The data, and the model's other arguments that hold numbers.
        variational: No draws: the exact marginal probabilities of each discrete latent under Q (`v_q`) and under the
            posterior (`v_posterior`), which sum to the probability that it is there; free_energy, surprise, gap, in
            total and `_by_datum`; with a guide the other readings of F too; the history of training. Where w is sampled
            these are averages over its draws.

    Args:
        model: The generative model.
        guide: The guide; without one every latent is drawn from the exact posterior.
        *args: Arguments of both.
        num_samples: How many draws, of each group.
        prior: Whether to draw from the prior.
        posterior_predictive: Whether to simulate data at the draws.
        dims: Names for dims that are no plates, by variable, from the right; `name_dim_0`, ... by default.
        coords: Labels by dim.
        history: Of training: a `History`, or what has one, such as an `EMRun` or an `SVIRun`.
        progress_bar: Whether to show one where the draws take their time: with sampled w, the programs run once each.
        max_bytes: The most memory that tables may take; by default half of what is free.
        params: Values of the programs' parameters by name, all of them, such as `run.params`, in place of those in
            Pyro's store, which stays as it is. Names that the programs do not read are left aside.
        **kwargs: Keyword arguments of both.

    Raises:
        MissingGuideSiteError: A latent is not discrete, and no guide draws it.
        ImpossibleDataError: The data have probability zero under the model.
        StructureError: A plate is subsampled, or a latent carries a weight.
        CostError: The discrete latents cannot be summed out.
        NameClashError: A site has the name of the variable that says where another is.
        VFEError: An option is wrong.
    """
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        raise VFEError(f"num_samples is {num_samples!r}.", hint="Ask for at least one draw.")
    gatherer = Gatherer(model, given_guide(model, guide), args, kwargs, num_samples, max_bytes, progress_bar)
    with reading(params, args, kwargs):
        gathered = gatherer.gather(prior, posterior_predictive, _history_of(history))
    stats = gathered.groups["sample_stats"]
    warn_if_unreliable(stats["log_weight"].values)
    return tree_of(gathered.groups, dims=dims, coords=coords, labels=gathered.coords, attrs=gathered.attrs)


def to_inference_data(model: Program, guide: Program | None = None, *args: Any, **kwargs: Any) -> Any:
    """Returns what `to_datatree` does for the installed ArviZ: an `InferenceData` for 0.2x, the tree itself for 1.x.

    Args:
        model: The generative model.
        guide: The guide; without one every latent is drawn from the exact posterior.
        *args: Arguments of both.
        **kwargs: Keyword arguments of both, and the options of `to_datatree`.

    Raises:
        VFEError: As `to_datatree`.
    """
    return inference_data_of(to_datatree(model, guide, *args, **kwargs))


def _history_of(source: Any) -> History | None:
    if source is None or isinstance(source, History):
        return source
    history = getattr(source, "history", None)
    if not isinstance(history, History):
        raise VFEError(
            f"The history is a {type(source).__name__}.", hint="Pass run.history, monitor.history, or the run itself."
        )
    return history
