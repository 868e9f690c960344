r"""What a decomposition tells: where the gap is, how large it is beside what the guide is for, and how sure F is.

    share  =  gap / (gap + complexity)

complexity = KL(Q || prior) is what the guide says the data told it, in nats; the gap is how far that is wrong. Both are
free of the data's units, which a share of F is not: densities move F by any amount, through zero.

References:
    Cremer, Li and Duvenaud (2018), Inference suboptimality in variational autoencoders.
"""

import math

from pyro_vfe.energy.decomposition import Decomposition
from pyro_vfe.energy.impossible import Clash
from pyro_vfe.errors import VFEError
from pyro_vfe.program.enumeration import PARTICLES
from pyro_vfe.reporting.diagnose_notebook import Notebook, nats, percent

_SMALLEST_PLATE = 4
_FEW = 50
"""The worst elements are one, or one in so many."""
_STAND_OUT = 10.0
"""The worst elements have on average so many times the gap of the others."""
_TARGET = 0.5
"""The advised number of particles brings the standard error to this share of its limit."""


def look_at_support(terms: Decomposition, notebook: Notebook) -> bool:
    """Writes down where the guide allows what the model forbids, and returns whether F is infinite.

    Args:
        terms: The whole.
        notebook: Where to write.
    """
    notebook.look("whether Q has mass where the model has none")
    if not bool(terms.gap.isinf().any()):
        return False
    by_latent: dict[str | None, list[str]] = {}
    for clash in dict.fromkeys(terms.clashes) or (Clash("the guide puts mass where the model has none"),):
        by_latent.setdefault(_culprit(clash), []).append(clash.words)
    for latent, places in by_latent.items():
        notebook.find(
            "support-mismatch",
            latent,
            math.inf,
            f"F is infinite: {'; '.join(places)}.",
            "Give the guide the same zeros as the model, or the model a probability that is small instead of zero. A "
            "site that others determine is best left out of the guide: it is then summed out exactly.",
            math.inf,
        )
    return True


def _culprit(clash: Clash) -> str | None:
    """The latent whose values clash: the one that is impossible, or the first that makes another site so."""
    if clash.site in clash.latents or not clash.latents:
        return clash.site
    return clash.latents[0]


def gap_by_site(terms: Decomposition, notebook: Notebook) -> dict[str, float] | None:
    """Returns the gap of each latent in nats; None where it has no shares, and why is written down.

    Args:
        terms: The whole, with a finite gap.
        notebook: Where to write.
    """
    if not terms.runs:
        return None
    try:
        return {name: float(share.sum()) for name, share in terms.gap_by_site().items()}
    except VFEError as error:
        notebook.skip("the gap of each latent", error)
        return None


def look_at_gap(terms: Decomposition, by_site: dict[str, float] | None, may_rest: bool, notebook: Notebook) -> None:
    """Writes down whether the gap is a sizeable share of what the guide is for.

    Args:
        terms: The whole, with a finite gap.
        by_site: The gap of each latent, if it is known.
        may_rest: Whether the guide may be at its best: a history would know if F still falls.
        notebook: Where to write.
    """
    notebook.look("how large the gap is beside the complexity")
    gap, complexity = float(terms.gap), max(float(terms.complexity), 0.0)
    share = gap / (gap + complexity) if gap > 0 else 0.0
    limits = notebook.thresholds
    if share < limits.gap_share or gap < limits.gap_per_datum * terms.num_data:
        return
    if not may_rest:
        notebook.skip("whether the guide is the bottleneck", f"F is not known to rest; the gap is {nats(gap)} so far.")
        return
    worst = max(by_site, key=lambda name: by_site[name]) if by_site else None
    of_each = f" ({nats(gap / terms.num_data)} per datum)" if terms.num_data > 1 else ""
    of_worst = "" if worst is None or by_site is None else f" '{worst}' has {nats(by_site[worst])} of it."
    notebook.find(
        "guide-bottleneck",
        worst,
        gap / terms.num_data,
        f"The gap is {nats(gap)}{of_each}, beside a complexity of {nats(complexity)}: it is {percent(share)} of both "
        f"together.{of_worst}",
        _advice(terms, worst),
        gap,
    )


def _advice(terms: Decomposition, worst: str | None) -> str:
    if not terms.runs:
        return "Q is the E-phase's, and not the exact posterior: end with vfe.Exact(), or let the E-phase do more."
    site = "the latents" if worst is None else f"'{worst}'"
    return (
        "Train the guide further while F falls, which a run tells, given beside these terms. Where it stays, let "
        f"{site} in the guide depend on the data and on other latents, as the posterior does; or leave {site} out of "
        "the guide, to be summed out exactly. Or start it elsewhere: for vfe.AutoMeanField init='posterior', or "
        "init_scale=0.1 where latents are exchangeable; vfe.EM(model, guide, e_phase=vfe.Coordinate()) leads to the "
        "optimum nearby in closed form."
    )


def look_at_elements(terms: Decomposition, notebook: Notebook) -> None:
    """Writes down the elements of a plate that carry most of its gap.

    Args:
        terms: The whole, with a finite gap.
        notebook: Where to write.
    """
    if not terms.runs or not terms.runs[0].guided:
        return
    sizes = {name: terms.runs[0].plates.get(name, _SMALLEST_PLATE) for name in terms.runs[0].all_plates}
    plates = [name for name, size in sizes.items() if name != PARTICLES and size >= _SMALLEST_PLATE]
    if plates:
        notebook.look("whether few elements of a plate carry the gap")
    if float(terms.gap) < notebook.thresholds.element_nats:
        return
    for plate in plates:
        try:
            look_at_plate(terms.by(plate), notebook)
        except VFEError as error:
            notebook.skip(f"the gap of each element of plate '{plate}'", error)


def look_at_plate(elements: Decomposition, notebook: Notebook) -> None:
    """Writes down the elements of one plate that carry most of its gap.

    Args:
        elements: What `by(plate)` gives.
        notebook: Where to write.
    """
    gap = elements.gap.clamp(min=0)
    size, whole = len(gap), float(gap.sum())
    if size < _SMALLEST_PLATE:
        return
    ordered, order = gap.sort(descending=True)
    held = ordered.cumsum(0)
    limits = notebook.thresholds
    few = int((held < limits.element_share * whole).sum()) + 1
    if few > max(1, size // _FEW) or float(held[few - 1]) < limits.element_nats:
        return
    theirs, others = float(held[few - 1]), whole - float(held[few - 1])
    if theirs / few < _STAND_OUT * others / (size - few):
        return
    indices = tuple(int(index) for index in order[:few])
    which = f"Element {indices[0]} of plate '{elements.plate}' has" if few == 1 else _several(indices, elements.plate)
    notebook.find(
        "plate-element",
        elements.plate,
        theirs / whole,
        f"{which} {nats(theirs)} of the plate's gap of {nats(whole)}, which is {percent(theirs / whole)}.",
        "Look at these data: an outlier, a wrong entry, or a case that the guide has not learned. "
        f"terms.by('{elements.plate}').gap has the numbers.",
        theirs,
        indices,
    )


def _several(indices: tuple[int, ...], plate: str | None, most: int = 8) -> str:
    shown = ", ".join(map(str, indices[:most])) + (", ..." if len(indices) > most else "")
    return f"{len(indices)} elements of plate '{plate}' ({shown}) have"


def look_at_spread(terms: Decomposition, notebook: Notebook) -> None:
    """Writes down whether the particles differ too much for F to be read.

    Args:
        terms: The whole.
        notebook: Where to write.
    """
    if not terms.random:
        return
    notebook.look("the spread of F over particles")
    particles, of_what = len(terms.runs), " and ".join(terms.random)
    if terms.stderr is None:
        if not terms.runs[0].is_sampled:  # A subsample that the user chose is what it is.
            return
        notebook.find(
            "spread-unknown",
            None,
            particles,
            f"F hangs on {of_what}, and one particle does not tell how far F and surprise are off.",
            "Ask again with vfe.FreeEnergy(num_particles=10) or more.",
        )
        return
    stderr, gap = float(terms.stderr), float(terms.gap)
    limit = notebook.thresholds.spread * terms.num_data
    hides_gap = gap >= notebook.thresholds.gap_per_datum * terms.num_data
    if hides_gap:
        limit = min(limit, gap)
    if not stderr > limit:
        return
    needed = math.ceil(particles * (stderr / (_TARGET * limit)) ** 2)
    beside = f" beside a gap of {nats(gap)}" if hides_gap else ""
    notebook.find(
        "spread-too-large",
        None,
        stderr,
        f"F = {float(terms.free_energy):,.4g} nats has a standard error of {nats(stderr)} over {particles} particles, "
        f"from {of_what}{beside}: differences of that size mean nothing, and the same goes for the surprise.",
        f"Take about num_particles={needed:,}.",
        stderr,
    )
