r"""The exact posterior of a model's discrete latents.

    P(v | u, G)  =  P(v, u | G) / p(u | G)

References:
    Koller and Friedman (2009), Probabilistic Graphical Models, chapters 9 and 13 (marginals, mode, samples).
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_vfe.energy.draws import log_prob_at
from pyro_vfe.energy.impossible import check_numbers, impossible_data
from pyro_vfe.energy.marginals import Marginals, single_marginals
from pyro_vfe.energy.parts import joint_graph, normalized
from pyro_vfe.energy.presence import Assignment, marginals_where_present, present_at
from pyro_vfe.engine.chain_decoding import SAMPLE
from pyro_vfe.engine.decoding import mode, sample
from pyro_vfe.engine.factors import FactorGraph, Table
from pyro_vfe.engine.inference import evidence, expected_tables
from pyro_vfe.errors import CostError, MissingGuideSiteError, StructureError, VFEError
from pyro_vfe.program.buffers import unchanged_buffers
from pyro_vfe.program.entry_points import entry_point
from pyro_vfe.program.enumeration import Enumeration
from pyro_vfe.program.given import given_guide
from pyro_vfe.program.given_parameters import reading
from pyro_vfe.program.layout import Program
from pyro_vfe.program.programs import Check, Programs
from pyro_vfe.program.site_structure import places_of
from pyro_vfe.program.tables import batch_axes
from pyro_vfe.program.written_out import joint_of_wholes, sorted_table


@entry_point()
def posterior(
    model: Program,
    *args: Any,
    check: Check = "first",
    max_bytes: float | None = None,
    params: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> "Posterior":
    """Returns the exact posterior of the model's discrete latents given its observations.

    Args:
        model: The generative model; every latent must be discrete with a finite support.
        *args: Arguments of the model.
        check: Whether to compare the enumerated tables with an ordinary run.
        max_bytes: The most memory that tables may take; by default half of what is free.
        params: Values of the model's parameters by name, all of them, such as `run.params`, in place of those in Pyro's
            store, which stays as it is. Names that the model does not read are left aside.
        **kwargs: Keyword arguments of the model.

    Raises:
        MissingGuideSiteError: A latent is not discrete.
        ImpossibleDataError: The data have probability zero.
        CostError: The elimination would not fit.
        VFEError: `params` are not the model's parameters.
    """
    programs = Programs(check=check, max_bytes=max_bytes)
    try:
        with reading(params, args, kwargs), torch.no_grad(), unchanged_buffers():
            enumeration = programs.enumerate(model, given_guide(model, None), args, kwargs)
            return Posterior(enumeration, max_bytes=max_bytes)
    except MissingGuideSiteError as error:
        hint = _GIVEN_A_VALUE.replace("{name}", error.site)
        raise MissingGuideSiteError(error.latent, site=error.site, hint=hint) from error


_GIVEN_A_VALUE = (
    "posterior takes no guide. Give it the model at a value of '{name}', one that a guide was fitted to, say: "
    "vfe.posterior(pyro.poutine.condition(model, data={'{name}': value}), ...). Or take F apart with a guide that "
    "samples '{name}': vfe.FreeEnergy().decompose(model, guide, ...), vfe.to_datatree(model, guide, ...)."
)


class Posterior:
    """The exact posterior of discrete latents, in float64: evidence, marginals, samples, mode, entropy.

    A latent may be there for some values of others only, where the model branches on them (`if z:`). Its probabilities
    are then those of its values and that it is there, and sum to the probability of that; what `sample` and `mode`
    return is a dict whose `present(name)` says for which draws a latent is there.
    """

    def __init__(self, enumeration: Enumeration, *, max_bytes: float | None = None) -> None:
        """Args:
        enumeration: An enumerated run of the model with an empty guide.
        max_bytes: The most memory that tables may take.

        Raises:
            ImpossibleDataError: The data have probability zero.
            NotFiniteError: Some log-probability is NaN or +inf.
        """
        self.enumeration: Enumeration = normalized(enumeration, torch.float64).numbers()
        """The model's factors, in float64."""
        self._max_bytes = max_bytes
        self._graph: FactorGraph = joint_graph(self.enumeration)
        self.log_evidence: Tensor = _log_evidence(self.enumeration, max_bytes)
        """log p(u), a scalar in nats."""
        if bool(self.log_evidence.isneginf()):
            raise impossible_data(self.enumeration)
        if not bool(self.log_evidence.isfinite()):
            check_numbers(self.enumeration)

    def __repr__(self) -> str:
        return f"Posterior(log_evidence={float(self.log_evidence):.4f} nats, latents={list(self.sites)})"

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the latents, in program order."""
        return self.enumeration.folded(factor.name for factor in self.enumeration.model_latents)

    def support(self, name: str) -> Tensor:
        """Returns the values of a latent, shape `(K, *event_shape)`.

        Args:
            name: The latent's site.
        """
        self._check_known((name,))
        return self.enumeration.supports[self.enumeration.parts_of(name)[0]]

    def marginal(self, *names: str) -> Tensor:
        """Returns the joint posterior probabilities of some latents, shape `(*plates, K_1, K_2, ...)`.

        The plates are those of all the latents together, by name; the values are in the order of `support`. They are
        those of the values and that all of these latents are there, and sum to the probability of that.

        Args:
            *names: The latents' sites, in the order of the result's last axes.

        Raises:
            VFEError: A name is unknown or given twice.
        """
        return self.marginal_table(*names).values.clone()

    @entry_point()
    def marginal_table(self, *names: str) -> Table:
        """Returns what `marginal` does, with a name for each axis.

        Args:
            *names: The latents' sites, in the order of the result's last axes.
        """
        self._check_known(names)
        if len(names) == 1:
            return self.marginal_tables(names)[names[0]]
        wholes = self.enumeration.wholes
        if wholes.keys().isdisjoint(names):
            return marginals_where_present(self.enumeration, self._graph, [names], self._max_bytes)[names]
        return joint_of_wholes(names, wholes, self._joint_marginals)

    def _joint_marginals(self, scopes: Sequence[tuple[str, ...]]) -> Mapping[tuple[str, ...], Table]:
        return marginals_where_present(self.enumeration, self._graph, scopes, self._max_bytes)

    def marginals(self) -> dict[str, Tensor]:
        """Returns what `marginal` does for every latent, each of shape `(*plates, K)`, from one backward pass."""
        return {name: table.values.clone() for name, table in self.marginal_tables(self.sites).items()}

    @entry_point()
    def marginal_tables(self, names: Iterable[str]) -> Marginals:
        """Returns what `marginals` does for some latents, with a name for each axis.

        Args:
            names: The latents' sites.
        """
        sites = tuple(names)
        self._check_known(sites)
        run = self.enumeration
        parts = [part for name in sites for part in run.parts_of(name)]
        try:
            found: Marginals = {name: self._all_marginals[name] for name in parts}
        except CostError:  # Where others decide whether a latent is there its own is larger: those asked for may fit.
            found = single_marginals(run, self._graph, parts, self._max_bytes)
        return {name: sorted_table(found, name, run.wholes) for name in sites}

    @cached_property
    def _all_marginals(self) -> Marginals:
        """Those of each latent by itself: one pass gives all, so whoever asks for one after the other waits once."""
        names = [factor.name for factor in self.enumeration.model_latents]
        return single_marginals(self.enumeration, self._graph, names, self._max_bytes)

    @entry_point()
    def sample(self, num_samples: int) -> Assignment:
        """Returns joint draws of all latents, each of shape `(num_samples, *batch_shape, *event_shape)`.

        Args:
            num_samples: How many draws, one at least.
        """
        if num_samples < 1:
            raise VFEError(f"num_samples is {num_samples}.", hint="Draw one at least.")
        with torch.no_grad():
            drawn = sample(self._graph, num_samples, max_bytes=self._max_bytes)
        return self._assignment(drawn, (SAMPLE,))

    def mode(self) -> Assignment:
        """Returns a most probable joint assignment, each latent of shape `(*batch_shape, *event_shape)`."""
        with torch.no_grad():
            best = mode(self._graph, max_bytes=self._max_bytes)
        return self._assignment(best, ())

    @entry_point()
    def entropy(self) -> Tensor:
        """Returns the entropy of the joint posterior, a scalar in nats."""
        self._check_unscaled()
        expected = expected_tables(self._graph, max_bytes=self._max_bytes)
        energy = self.log_evidence.new_zeros(())
        for table, weight in zip(self._graph.tables, expected, strict=True):
            energy = energy - torch.where(weight > 0, weight * table.values, 0.0).sum()
        return energy + self.log_evidence

    def log_prob(self, assignment: Mapping[str, Tensor]) -> Tensor:
        """Returns the log posterior probability of joint assignments, a scalar or `(num_samples,)`, in nats.

        Args:
            assignment: The value of every latent, as `mode` or `sample` give them; what it says of a latent where that
                is not there does not matter, and where it is there for none of them it may be left out.

        Raises:
            VFEError: A latent is missing, or a value is not in its support.
        """
        self._check_unscaled()
        indices = self._indices(assignment)
        counts = [table.sizes[SAMPLE] for table in indices.values() if SAMPLE in table.axes]
        total = log_prob_at(self.enumeration, self._graph.factors, indices, max(counts, default=1))
        log_prob = total - self.log_evidence
        return log_prob if counts else log_prob.reshape(())

    def _check_known(self, names: tuple[str, ...]) -> None:
        for name in names:
            if name not in self.sites:
                known = ", ".join(f"'{site}'" for site in self.sites)
                raise VFEError(f"'{name}' is no discrete latent of the model.", hint=f"Its latents are: {known}.")

    def _check_unscaled(self) -> None:
        if any(variable.scale != 1.0 for variable in self._graph.variables.values()):
            raise StructureError(
                "The model's latents carry weights (a subsampled plate or poutine.scale): they have a free "
                "energy, but no "
                "joint distribution with an entropy or log-probability.",
                hint="Take the posterior of the whole data set, without subsampling or scale.",
            )

    def _assignment(self, indices: Mapping[str, Table], lead: tuple[str, ...]) -> Assignment:
        """Values for indices over plates: batch dims lie where the model has them, draws lead."""
        values, present = {}, {}
        run = self.enumeration
        for name in self.sites:
            parts = run.parts_of(name)
            axes = (*lead, *batch_axes(run.batch_plates(name)))
            written_out = {plate.name for plate in run.wholes.get(name, ())}
            over = [axis for axis in axes if axis not in written_out]
            there = {part: present_at(run, part, indices, tuple(over)) for part in parts}
            index = sorted_table(indices, name, run.wholes).aligned(axes)
            values[name] = run.supports[parts[0]][index]
            present[name] = sorted_table(there, name, run.wholes).aligned(axes).expand(index.shape)
        return Assignment(values, present)

    def _indices(self, assignment: Mapping[str, Tensor]) -> dict[str, Table]:
        """The index of each latent's value in its support, over draws and plates; 0 where it is not there."""
        run = self.enumeration
        found: dict[str, Table] = {}
        for whole in self.sites:
            plates = run.wholes.get(whole, ())
            for place, part in zip(places_of(plates), run.parts_of(whole), strict=True):
                found[part] = self._index(whole, assignment.get(whole))
                for plate, element in zip(plates, place, strict=True):
                    found[part] = found[part].selected(plate.name, element)
        found = run.with_path(found)
        draws = (SAMPLE,) if any(SAMPLE in table.axes for table in found.values()) else ()
        latents = [part for whole in self.sites for part in run.parts_of(whole)]
        result = {name: index for name, index in found.items() if name not in latents}
        for name in latents:
            index = found[name]
            axes = (*draws, *sorted(run.variables[name].plates))
            there, values = present_at(run, name, found, axes).values, index.aligned(axes)
            if bool((there & (values < 0)).any()):
                whole = run.folded((name,))[0]
                raise _no_value(whole, is_given=whole in assignment)
            if not bool(there.all()):
                sizes = [run.plates.get(axis, -1) for axis in axes]
                index = Table(torch.where(there, values, 0).expand(sizes), axes)
            result[name] = index
        return result

    def _index(self, name: str, value: Tensor | None) -> Table:
        """The indices of values in a latent's support, over draws and plates; -1 of what is none of them."""
        support = self.support(name)
        if value is None:
            return Table(torch.tensor(-1, device=support.device), ())
        event_dims = support.dim() - 1
        same = torch.as_tensor(value).unsqueeze(-1 - event_dims) == support
        hit = same.all(tuple(range(-event_dims, 0))) if event_dims else same
        index = torch.where(hit.any(-1), hit.to(torch.int64).argmax(-1), -1)
        names = batch_axes(self.enumeration.batch_plates(name))
        axes = [SAMPLE] * (index.dim() - len(names)) + names
        keep = [
            axis for axis, size in zip(axes, index.shape, strict=True) if not axis.startswith("_") or axis == SAMPLE
        ]
        squeezed = index.reshape([s for axis, s in zip(axes, index.shape, strict=True) if axis in keep])
        return Table(squeezed, tuple(keep))


def _no_value(name: str, *, is_given: bool) -> VFEError:
    if not is_given:
        return VFEError(f"The assignment lacks latent '{name}'.", hint="Give a value for every latent.")
    return VFEError(
        f"The assignment gives latent '{name}' a value that is not in its support.",
        hint=f"See posterior.support('{name}').",
    )


def _log_evidence(run: Enumeration, max_bytes: float | None) -> Tensor:
    """log p(u), from all data together or from portions of them."""
    return torch.stack([evidence(joint_graph(part), max_bytes=max_bytes) for part in run.parts]).sum(0)
