"""What to know of bounds beside their numbers, in words."""

from typing import TYPE_CHECKING

from pyro_vfe.energy.particles import Particles, drawn_sites
from pyro_vfe.energy.weight_shares import WeightShares
from pyro_vfe.program.data import number_of_data
from pyro_vfe.program.enumeration import is_random
from pyro_vfe.reporting.pareto import GOOD_K, WORTH

if TYPE_CHECKING:
    from pyro_vfe.reporting.bounds import Bounds

_MISSED = 1e-6
"""A share of the posterior beyond the guide's reach that is none."""


def remarks_on(drawn: Particles, shares: WeightShares | None = None) -> tuple[str, ...]:
    """Returns what the programs give cause to say, in words.

    Args:
        drawn: Particles of the guide.
        shares: What their weights are worth, where that is known.
    """
    run, remarks = drawn.first, []
    own = list(drawn_sites(run).values())
    count = number_of_data(run)
    if drawn.weights.scale.dim() == 0 and count > 1:
        remarks.append(
            f"all {count:,} data are one datum here, with one weight: something that ties them together is "
            "drawn or summed out"
        )
    if not any(is_random(site) for site in own):
        remarks.append("the guide draws nothing: all weights are equal")
    points = [site.name for site in own if not is_random(site)]
    if points and not any(("model", site.name) not in run.sites for site in own):
        remarks.append(
            f"the guide has a point estimate of '{points[0]}': the bounds are on log p(u, {points[0]}) at that point"
        )
    alone = [f.name for f in run.guide_latents if f.name not in run.guided]
    if alone:
        remarks.append(f"the guide's '{alone[0]}', which the model lacks, is summed out of the guide")
    if run.subsampled:
        remarks.append("a plate is subsampled: the numbers are estimates for the whole data from these elements")
    if drawn.ruled_out:
        some = "all draws" if bool(drawn.weights.by_datum.isneginf().all(0).any()) else "some draws"
        remarks.append(f"{some} of a datum have probability zero at site '{drawn.ruled_out[0]}' of the model")
    missed = 0.0 if shares is None else 1 - float(shares.covered.min())
    if missed > _MISSED:
        remarks.append(
            f"the guide gives probability zero to {100 * missed:.2g}% of the posterior"
            f"{' of a datum' if shares is not None and shares.covered.numel() > 1 else ''}: no number of draws finds it"
        )
    return tuple(remarks)


def cautions(found: "Bounds") -> tuple[str, ...]:
    """Returns what the weights give cause to say, in words.

    Args:
        found: Bounds.
    """
    bad = found.worst_pareto_k > GOOD_K
    few = found.effective_sample_size < WORTH * found.num_particles
    words = []
    if found.dream_log_weights is not None and bool(found.dream_log_weights.isposinf().any()):
        words.append("the guide gives the dream's own latents probability zero: there is no upper bound")
    share = found.exact_share
    if share is not None:
        rare = share < WORTH
        if bool(rare.any()):
            words.append(
                f"for {int(rare.sum()):,} of {rare.numel():,} data the draws are worth, exactly, less than a tenth of "
                f"their number (the least {100 * float(share.min()):.2g}%), whatever their own weights say: they "
                "seldom meet what decides, standard errors are too small and the lower bound may be far below "
                "log p(u); a better guide brings it closer, or one that leaves latents out: they are then summed"
            )
    elif bool(bad.any()):
        words.append(
            f"Pareto k exceeds {GOOD_K} for {int(bad.sum()):,} of the {bad.numel():,} data with the least even "
            "weights: a few draws decide there, standard errors are too small and the lower bound may be far below "
            "log p(u); more draws help little, a better guide does"
        )
    elif bool(few.any()):
        words.append(
            f"for {int(few.sum()):,} of {few.numel():,} data the draws are worth less than a tenth of their number: "
            "more draws bring the bounds closer, and a better guide does so faster"
        )
    return tuple(words)
