r"""Weights of sites that parameters decide, in phases that hold Q.

    F  =  E_Q[ c log Q(v) - c log P(v) - s log P(u | v) ]        learning s is easy; learning c moves the first term too

A phase sees expected tables, weights included. A learned weight of data or of a prior is made part of its table; that
of a latent would be learned without what it does to Q's entropy.
"""

from collections.abc import Callable, Collection, Iterable

from torch import Tensor

from pyro_vfe.engine.scales import applied
from pyro_vfe.errors import ScaleError
from pyro_vfe.program.enumeration import Enumeration, is_random
from pyro_vfe.program.recorder import Site


def check_weights(
    sites: Iterable[Site], latents: Collection[str], is_learned: Callable[[Tensor], bool] = lambda scale: True
) -> None:
    """Checks that no parameter decides how much a latent counts.

    Args:
        sites: Sites of the model as they ran.
        latents: The names of those that Q is over.
        is_learned: Says of a weight with a gradient whether it is one to learn.

    Raises:
        ScaleError: One does.
    """
    for site in sites:
        weight = _with_gradient(site)
        if site.name in latents and weight is not None and is_learned(weight):
            raise ScaleError(
                f"The weight of latent site '{site.name}' (poutine.scale) depends on a parameter: a phase that holds Q "
                "would learn it without what it does to Q's entropy.",
                hint="Learn it by gradients of F, vfe.fit(model, guide, ...) or SVI with vfe.FreeEnergy(); or detach "
                "the weight, which holds it.",
            )


def with_weights_in_tables(run: Enumeration, is_learned: Callable[[Tensor], bool] = lambda scale: True) -> Enumeration:
    """Returns the enumeration with the weights that have a gradient in the tables of what they are of.

    Args:
        run: Enumerated programs.
        is_learned: Says of a weight with a gradient whether it is one to learn.

    Raises:
        ScaleError: A parameter decides how much a latent counts.
    """
    keys = {key: None for path in run.paths for key, site in path.items() if _with_gradient(site) is not None}
    if not keys or run.portions is not None:
        return run
    for path in run.paths:
        own = [factor.name for factor in run.model_latents]
        check_weights(path.values(), {*own, *latents_of(path.values())}, is_learned)
    weighed = {key: applied(run.factors[key]) for key in keys if run.sites[key].kind != "enumerated"}
    return run.with_factors({**run.factors, **weighed}, run.variables)


def latents_of(guide: Iterable[Site]) -> set[str]:
    """The names of the latents that a guide enumerates or draws at random.

    Args:
        guide: Its sites as they ran; the model's are passed over.
    """
    return {site.name for site in guide if site.role == "guide" and (site.kind == "enumerated" or is_random(site))}


def _with_gradient(site: Site) -> Tensor | None:
    """The weight of a site, if it has a gradient."""
    return site.scale if isinstance(site.scale, Tensor) and site.scale.requires_grad else None
