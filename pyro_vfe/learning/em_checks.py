"""What EM cannot serve, said before anything changes: the site or parameter, the fact, the way out."""

from collections.abc import Iterable, Mapping
from math import inf

from pyro_vfe.errors import MissingGuideSiteError, StructureError, UnenumerableError, VFEError
from pyro_vfe.learning.e_phases import Annealed, Exact, Hard, MonteCarlo
from pyro_vfe.learning.em_loop import updates_guide
from pyro_vfe.learning.entries import Floor
from pyro_vfe.learning.pair import Pair
from pyro_vfe.learning.phases import EPhase, MPhase
from pyro_vfe.program.enumeration import Enumeration, is_random
from pyro_vfe.program.given import check_option
from pyro_vfe.program.supports import unwrapped

_POINT_OR_POSTERIOR = (
    "For its most probable value (MAP) give EM a guide with a point estimate of it: "
    "pyro.infer.autoguide.AutoDelta(pyro.poutine.block(model, expose={names})). For a posterior over it use SVI: "
    "pyro.infer.SVI(model, guide, optim, loss=vfe.FreeEnergy())."
)


def first_enumeration(pair: Pair) -> Enumeration:
    """The factors at the first parameters; the programs create them here.

    Args:
        pair: The programs.

    Raises:
        MissingGuideSiteError: A latent of the model has no finite support and the guide lacks it.
    """
    try:
        return pair.enumerate()
    except MissingGuideSiteError as error:
        hint = _POINT_OR_POSTERIOR.replace("{names}", f"['{error.site}']")
        raise MissingGuideSiteError(error.latent, site=error.site, hint=hint) from error


def check_ranges(*ranges: tuple[str, float | None, float]) -> None:
    """Checks that numbers are large enough.

    Args:
        *ranges: Name, value and least value of each option; None is no value.

    Raises:
        VFEError: One is too small, or NaN.
    """
    for name, value, least in ranges:
        if value is not None and not value >= least:
            raise VFEError(f"EM was given {name}={value}.", hint=f"Pass a number of at least {least}.")


def check_run_options(max_iter: int, tol: float, n_init: int, acceleration: str | None) -> None:
    """Checks what a user asks of a run.

    Args:
        max_iter: The most iterations.
        tol: The tolerance.
        n_init: The number of starts.
        acceleration: The name of a way to take larger steps.

    Raises:
        VFEError: It cannot be had.
    """
    check_ranges(("max_iter", max_iter, 0), ("tol", tol, 0), ("n_init", n_init, 1))
    if acceleration not in (None, "squarem"):
        raise VFEError(f"EM knows no acceleration '{acceleration}'.", hint="Pass 'squarem' or None.")


def check_accelerable(e_phase: EPhase) -> None:
    """Checks that an iteration of EM is a function of the model's parameters, along whose path SQUAREM can jump.

    Args:
        e_phase: The E-phase.

    Raises:
        VFEError: It is not.
    """
    if updates_guide(e_phase) or not e_phase.monotone:
        raise VFEError(
            f"SQUAREM was asked for with the E-phase {type(e_phase).__name__}, whose Q is more than a function of "
            "the model's parameters.",
            hint="Use it with Exact() or Hard(), or leave acceleration out.",
        )


def check_floor(floor: Floor) -> None:
    """Checks that floors are floors.

    Args:
        floor: What EM was given.

    Raises:
        VFEError: A floor is no positive number.
    """
    floors = floor if isinstance(floor, Mapping) else {} if floor is None else {"": floor}
    for name, value in floors.items():
        if not 0 < value < inf:
            of = f" for '{name}'" if name else ""
            raise VFEError(f"EM was given the floor {value:g}{of}.", hint="Pass a positive number, such as 1e-3.")


def check_phases(e_phase: object, m_phase: object) -> None:
    """Checks that phases are phases.

    Args:
        e_phase: What EM was given as its E-phase; None for the default.
        m_phase: As its M-phase.

    Raises:
        VFEError: One is none: a class, a name, a phase of the other kind.
    """
    if e_phase is not None:
        ways = "vfe.Exact(), vfe.Hard(), vfe.MonteCarlo(num_samples), vfe.Annealed(betas), vfe.Coordinate() or "
        check_option("e_phase", e_phase, EPhase, "E-phase", ways + "vfe.Gradient(optim, num_steps), or leave it out")
    ways = "vfe.ClosedForm(), vfe.Numerical() or vfe.Gradient(optim, num_steps), or leave it out"
    check_option("m_phase", m_phase, MPhase, "M-phase", ways)


def check_e_phase(e_phase: EPhase, enumeration: Enumeration) -> None:
    """Checks that an E-phase leaves nothing of the guide unread.

    Args:
        e_phase: The phase.
        enumeration: The factors of both programs.

    Raises:
        StructureError: It makes Q of the model alone, and the guide has a latent.
    """
    if isinstance(e_phase, (Exact, Hard, MonteCarlo, Annealed)) and enumeration.guide_latents:
        raise StructureError(
            f"The E-phase {type(e_phase).__name__} makes Q of the model alone, and the guide gives latent site "
            f"'{enumeration.guide_latents[0].name}'.",
            hint="Leave the site out of the guide, or choose an E-phase that reads the guide: Coordinate() for "
            "AutoMeanField, Gradient(optim, num_steps) for any.",
        )


def check_programs(pair: Pair, enumeration: Enumeration, *, whole: bool = True, learns: bool = True) -> None:
    """Checks that EM can learn these programs from these data.

    Args:
        pair: The programs.
        enumeration: Their factors.
        whole: Whether these must be all data.
        learns: Whether there must be something to learn for an M-phase.

    Raises:
        UnenumerableError: The guide draws something at random.
        StructureError: A plate is subsampled.
        VFEError: There is nothing to learn, or an option names what is not there.
    """
    _check_draws(enumeration)
    if whole:
        _check_subsamples(enumeration)
    _check_names(pair)
    if learns:
        check_learned(pair)


def check_learned(pair: Pair) -> None:
    """Checks that there is something for an M-phase to change.

    Args:
        pair: The programs.

    Raises:
        VFEError: There is not.
    """
    if not pair.learned:
        _nothing_to_learn(pair)


def _check_draws(enumeration: Enumeration) -> None:
    for site in enumeration.sites.values():
        if site.role == "guide" and is_random(site):
            family = type(unwrapped(site.fn)).__name__
            raise UnenumerableError(
                f"The guide draws latent site '{site.name}' at random, from {family}: EM sums latents out or sets "
                "them to a point, and does not sample.",
                hint=_POINT_OR_POSTERIOR.replace("{names}", str(_drawn_latents(enumeration))),
            )


def _drawn_latents(enumeration: Enumeration) -> list[str]:
    """The model's latents that the guide draws, or makes from a draw that the model lacks, as Pyro's autoguides do."""
    drawn = {site.name for site in enumeration.sites.values() if site.role == "guide" and is_random(site)}
    points = [site.name for site in enumeration.sites.values() if site.role == "guide" and site.kind == "sampled"]
    both = [name for name in points if ("model", name) in enumeration.sites]
    return [name for name in both if not drawn.isdisjoint(enumeration.reads["model", name])]


def _check_subsamples(enumeration: Enumeration) -> None:
    for name, size, full_size in enumeration.subsampled:
        raise StructureError(
            f"Plate '{name}' shows {size} of its {full_size} elements, and EM needs all data in every iteration.",
            hint="Let the plate have all elements, or learn from mini-batches by run_batches.",
        )


def _check_names(pair: Pair) -> None:
    floors = pair.floor if isinstance(pair.floor, Mapping) else ()
    for option, names in (("fixed", pair.fixed), ("floor", floors)):
        unknown = sorted(set(names) - pair.parameters.readers.keys())
        if unknown:
            raise VFEError(
                f"{option}= names '{unknown[0]}', which is no parameter of the programs.",
                hint=f"Their parameters are: {_listed(pair.parameters.readers)}.",
            )
    changed_by_q = [name for name in pair.recognition if name in floors]
    if changed_by_q:
        raise VFEError(
            f"floor= names '{changed_by_q[0]}', which the E-phase changes: floors are held by the M-phase.",
            hint="Give the guide's parameter a constraint with a lower bound, constraints.greater_than(1e-3).",
        )


def _nothing_to_learn(pair: Pair) -> None:
    of_model = pair.parameters.of("model")
    if of_model:
        raise VFEError(
            f"All parameters of the model ({_listed(of_model)}) are fixed: the M-phase has nothing to change.",
            hint="Leave one out of fixed=, or call vfe.posterior or em.e_phase for Q alone.",
        )
    raise VFEError(
        "The model has no parameters to learn.",
        hint="Write what is to be learned as pyro.param(name, init, constraint=...), or as a PyroModule's parameter. "
        "For Q alone call vfe.posterior.",
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"
