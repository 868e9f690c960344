r"""What an enumeration says about the latents: their joint distribution given the data, the guide and the draws.

    R(v)  =  Q(v_guide | w)  P(v_model | v_guide, w, u)

References:
    Chib (1996), Calculating posterior distributions and modal estimates in Markov mixture models (backward sampling).
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vfe.energy.parts import conditionals_of, joint_graph, log_joint, negative
from pyro_vfe.energy.presence import marginals_where_present
from pyro_vfe.engine.decoding import sample
from pyro_vfe.engine.factors import FactorGraph, Table
from pyro_vfe.errors import StructureError
from pyro_vfe.program.chain_gaps import closing
from pyro_vfe.program.enumeration import Enumeration
from pyro_vfe.program.finite import Finite
from pyro_vfe.program.layout import Program
from pyro_vfe.program.recorder import Plate, Recorder, Role, Site
from pyro_vfe.program.single_values import with_draws
from pyro_vfe.program.sizeless import SizelessPlates
from pyro_vfe.program.tables import over_dims
from pyro_vfe.program.written_out import sorted_table


def responsibility_graph(enumeration: Enumeration) -> FactorGraph:
    """The factors of R: the guide's, and the model's given what the guide provides."""
    joint = joint_graph(enumeration)
    if not enumeration.guide_latents:
        return joint
    provided = log_joint(enumeration)
    if provided.graph.variables.keys() - enumeration.variables.keys():
        raise StructureError(
            "Latents that only the model has tie the elements of a plate of guide latents together.",
            hint="Use vfe.posterior(model, ...) for the exact posterior, or give the guide those latents too.",
        )
    guide = (*conditionals_of(enumeration), *enumeration.guide_draws)
    # Where the model gives the guide's values no probability, its own tables say so already.
    divided = (replace(f, table=_finite(f.table)) for f in negative(provided.costs))
    graph = enumeration.graph(*joint.factors, *guide, *divided)
    return replace(graph, normalized=not enumeration.draws_tell_of_latents)


def _finite(table: Table) -> Table:
    return Table(table.values.masked_fill(table.values.isinf(), 0.0), table.axes)


def marginal_distributions(enumeration: Enumeration) -> "OrderedDict[str, torch.distributions.Distribution]":
    """Returns the marginal of each latent that only the model has, where it is there, as its site's distribution.

    A latent that is certainly not there has none.
    """
    names = [factor.name for factor in enumeration.model_latents if factor.name not in enumeration.guided]
    scopes = [(name,) for name in names]
    probabilities = marginals_where_present(enumeration, responsibility_graph(enumeration), scopes)
    return OrderedDict(
        (name, _like(enumeration.sites["model", name], table, enumeration))
        for (name,), table in probabilities.items()
        if bool(table.values.sum(-1).all())
    )


def posterior_run(enumeration: Enumeration, model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Runs the model with its discrete latents drawn from R and returns what it returns."""
    indices = sample(responsibility_graph(enumeration), 1)
    given = {
        site.name: site.value for site in enumeration.sites.values() if site.role == "guide" and site.kind == "sampled"
    }

    def drawn(name: str, role: Role, fn: Any, plates: tuple[Plate, ...]) -> Tensor:
        parts = enumeration.parts_of(name)
        first = {part: Table(indices[part].values[0], indices[part].axes[1:]) for part in parts}
        return enumeration.supports[parts[0]][over_dims(sorted_table(first, name, enumeration.wholes), plates)]

    whole = {plate: full_size for plate, _, full_size in enumeration.subsampled}
    sizeless = SizelessPlates(known=enumeration.plates)
    recorder = Recorder(
        "model", drawn, given=given, subsamples=enumeration.subsamples, full_sizes=whole, sizeless=sizeless
    )
    with with_draws("a run with latents drawn from the posterior"):
        recorder.run(closing(model, enumeration.closed.__contains__), args, kwargs)
    return recorder.returned


def _like(site: Site, probabilities: Table, enumeration: Enumeration) -> torch.distributions.Distribution:
    """A distribution of the site's kind with the given probabilities of its values."""
    logits = over_dims(probabilities, site.plates).log()
    fn = site.fn
    while isinstance(fn, (dist.MaskedDistribution, dist.ExpandedDistribution)):
        fn = fn.base_dist
    if isinstance(fn, dist.Bernoulli):
        binary: torch.distributions.Distribution = dist.Bernoulli(logits=logits[..., 1] - logits[..., 0])
        return binary
    if isinstance(fn, (dist.Categorical, dist.OneHotCategorical)):
        alike: torch.distributions.Distribution = type(fn)(logits=logits)
        return alike
    return Finite(enumeration.supports[site.name], logits)
