r"""The variational free energy as a Pyro ELBO.

    F(Q, G)  =  E_{Q(v|u)} [ log Q(v|u) - log P(v, u | G) ]

`FreeEnergy` takes the place of `pyro.infer.TraceEnum_ELBO` in SVI: the same arguments, the same numbers where that
one is exact, and no annotations: every discrete latent with a finite support is enumerated.

References:
    Dayan, Hinton, Neal and Zemel (1995), The Helmholtz machine.
    Neal and Hinton (1998), A view of the EM algorithm that justifies incremental, sparse, and other variants.
    Kool, van Hoof and Welling (2019), Buy 4 REINFORCE samples, get a baseline for free (leave-one-out baseline).
"""

import math
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_vfe.energy.decomposition import Decomposition, decomposition
from pyro_vfe.energy.drawing import Drawing, OnCost
from pyro_vfe.energy.impossible import not_finite
from pyro_vfe.energy.parts import Parts, conditionals_of, log_joint, log_q, negative
from pyro_vfe.energy.responsibilities import marginal_distributions, posterior_run
from pyro_vfe.engine.expectation import Expectation
from pyro_vfe.engine.factors import Factor, Table, total
from pyro_vfe.errors import VFEError
from pyro_vfe.program.enumeration import PARTICLES, Enumeration
from pyro_vfe.program.given import given_guide
from pyro_vfe.program.layout import Program
from pyro_vfe.program.programs import Check, Programs


class FreeEnergy(ELBO):
    """The free energy F = surprise + gap of a guide and a model, with discrete latents summed exactly.

    A `pyro.infer.ELBO`: pass it to `pyro.infer.SVI` as the loss, or call it on two modules. Discrete latents of the
    guide
    are summed under the guide, discrete latents that only the model has are summed inside the model, and what remains
    is
    drawn from the guide: by the pathwise gradient where the distribution allows it, otherwise by the score function,
    with a leave-one-out baseline when there is more than one particle.
    """

    def __init__(
        self,
        num_particles: int = 1,
        max_plate_nesting: float = math.inf,
        max_iarange_nesting: int | None = None,
        vectorize_particles: bool = False,
        strict_enumeration_warning: bool = True,
        ignore_jit_warnings: bool = False,
        jit_options: dict[str, Any] | None = None,
        retain_graph: bool | None = None,
        tail_adaptive_beta: float = -1.0,
        *,
        check: Check = "first",
        max_bytes: float | None = None,
        on_cost: OnCost = "raise",
    ) -> None:
        """Args:
        num_particles: How many draws of what is sampled are averaged.
        max_plate_nesting: Batch dims to reserve for plates; found from the programs by default.
        max_iarange_nesting: Pyro's deprecated name of the same, here so that arguments keep their positions.
        vectorize_particles: Draw all particles in one run, in a plate of their own.
        strict_enumeration_warning: Warn when the programs have no discrete latent to enumerate.
        ignore_jit_warnings: As in Pyro's ELBOs; nothing is traced here.
        jit_options: As in Pyro's ELBOs; nothing is traced here.
        retain_graph: Passed to `backward` in `loss_and_grads`.
        tail_adaptive_beta: As in Pyro's ELBOs; unused.
        check: When the enumerated tables are compared with an ordinary run at a random assignment: at the "first" call
            for a pair of programs, "always", or never (False).
        max_bytes: The most memory that tables may take; by default half of what is free.
        on_cost: What to do where summing all latents out would not fit: "raise" an error, or "sample" as many latents
            of the guide as it takes, with a warning that names them. Loss and decomposition may differ in which: a
            decomposition also sums the model's posterior.
        """
        super().__init__(  # type: ignore[no-untyped-call]
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            max_iarange_nesting=max_iarange_nesting,
            vectorize_particles=vectorize_particles,
            strict_enumeration_warning=strict_enumeration_warning,
            ignore_jit_warnings=ignore_jit_warnings,
            jit_options=jit_options,
            retain_graph=retain_graph,
            tail_adaptive_beta=tail_adaptive_beta,
        )
        if num_particles < 1:
            raise VFEError(f"num_particles is {num_particles}.", hint="Use at least one particle.")
        self.max_bytes = max_bytes
        self._drawing = Drawing(on_cost)
        nesting = max_plate_nesting if max_iarange_nesting is None else max_iarange_nesting
        self._programs = Programs(
            check=check, max_bytes=max_bytes, min_nesting=0 if math.isinf(nesting) else int(nesting)
        )

    def loss(self, model: Program, guide: Program | None, *args: Any, **kwargs: Any) -> float:
        """Returns F in nats, an average over particles where something is sampled.

        Args:
            model: The generative model.
            guide: The guide; None for one without sites.
            *args: Arguments of both programs.
            **kwargs: Keyword arguments of both programs.

        Raises:
            VFEError: The programs cannot be enumerated, or F is not finite; the message says which site and the way
            out.
        """
        with torch.no_grad():
            return float(self._finite_loss(model, guide, args, kwargs))

    def differentiable_loss(self, model: Program, guide: Program | None, *args: Any, **kwargs: Any) -> Tensor:
        """Returns F in nats as a scalar tensor whose gradient is exact for what is enumerated, unbiased for the rest.

        Args:
            model: The generative model.
            guide: The guide; None for one without sites.
            *args: Arguments of both programs.
            **kwargs: Keyword arguments of both programs.

        Raises:
            VFEError: As `loss`.
        """
        return self._finite_loss(model, guide, args, kwargs)

    def loss_and_grads(self, model: Program, guide: Program | None, *args: Any, **kwargs: Any) -> float:
        """Returns F in nats and adds its gradient to the parameters' `.grad`.

        Args:
            model: The generative model.
            guide: The guide; None for one without sites.
            *args: Arguments of both programs.
            **kwargs: Keyword arguments of both programs.

        Raises:
            VFEError: As `loss`; no gradient has been written then.
        """
        loss = self._finite_loss(model, guide, args, kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.item()

    def decompose(self, model: Program, guide: Program | None, *args: Any, **kwargs: Any) -> Decomposition:
        """Returns F taken apart into the model's share and the guide's, in float64 and without gradients.

        Args:
            model: The generative model.
            guide: The guide; None for the exact posterior, which makes F the surprise.
            *args: Arguments of both programs.
            **kwargs: Keyword arguments of both programs.

        Raises:
            ImpossibleDataError: The data have probability zero under the model.
            VFEError: The programs cannot be enumerated.

        References:
            Neal and Hinton (1998), A view of the EM algorithm that justifies incremental, sparse, and other variants.
        """
        with torch.no_grad():

            def decomposed(own: Program) -> Decomposition:
                count = range(self.num_particles)
                runs = [self._programs.enumerate_given_draws(model, own, args, kwargs) for _ in count]
                return decomposition(runs, self.max_bytes)

            return self._drawing(decomposed, model, given_guide(model, guide), args, kwargs, purpose="decompose")

    def compute_marginals(
        self, model: Program, guide: Program | None, *args: Any, **kwargs: Any
    ) -> "OrderedDict[str, torch.distributions.Distribution]":
        """Returns the posterior marginal of each discrete latent that only the model has, by site name.

        Latents of the guide are averaged over the guide, draws are those of one run.

        Args:
            model: The generative model.
            guide: The guide; None for one without sites.
            *args: Arguments of both programs.
            **kwargs: Keyword arguments of both programs.
        """
        return marginal_distributions(self._one_run(model, guide, args, kwargs, "compute_marginals"))

    def sample_posterior(self, model: Program, guide: Program | None, *args: Any, **kwargs: Any) -> Any:
        """Returns what the model returns when its discrete latents are drawn from their joint posterior.

        Args:
            model: The generative model.
            guide: The guide; None for one without sites.
            *args: Arguments of both programs.
            **kwargs: Keyword arguments of both programs.
        """
        return posterior_run(self._one_run(model, guide, args, kwargs, "sample_posterior"), model, args, kwargs)

    def _get_trace(self, model: Program, guide: Program | None, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("FreeEnergy makes factor graphs, not traces.")

    def _one_run(
        self, model: Program, guide: Program | None, args: tuple[Any, ...], kwargs: Mapping[str, Any], what: str
    ) -> Enumeration:
        if self.num_particles != 1:
            raise VFEError(f"{what} was asked of {self.num_particles} particles.", hint="Use num_particles=1.")
        with torch.no_grad():
            return self._programs.enumerate_given_draws(model, given_guide(model, guide), args, kwargs)

    def _finite_loss(
        self, model: Program, guide: Program | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Tensor:
        return self._drawing(
            lambda own: self._loss_of(model, own, args, kwargs), model, given_guide(model, guide), args, kwargs
        )

    def _loss_of(self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        vectorized = self.vectorize_particles and self.num_particles > 1
        side_by_side = self.num_particles if vectorized else 1
        runs = [
            self._programs.enumerate(model, guide, args, kwargs, particles=side_by_side)
            for _ in range(1 if vectorized else self.num_particles)
        ]
        if self.strict_enumeration_warning and not runs[0].supports:
            warnings.warn(
                "FreeEnergy found no discrete latent to enumerate: F is an ordinary sampled ELBO here. Pass "
                "strict_enumeration_warning=False to silence this.",
                stacklevel=3,
            )
        loss = surrogate_loss(runs, side_by_side, self.max_bytes)
        if not math.isfinite(loss.item()):
            raise not_finite(runs[0], loss.item(), (model, guide))
        return loss


def surrogate_loss(runs: Sequence[Enumeration], side_by_side: int = 1, max_bytes: float | None = None) -> Tensor:
    """Returns the mean of F over particles, whose gradient is an unbiased estimate of F's.

    Args:
        runs: One enumeration per run of the programs.
        side_by_side: How many particles each run holds.
        max_bytes: The most memory that intermediate tables may take.
    """
    parts = [free_energy_parts(run, max_bytes) for run in runs]
    results = [
        [part.expectation(downstream_of=run.draws) for part in own] for own, run in zip(parts, runs, strict=True)
    ]
    count = len(runs) * side_by_side
    loss = torch.stack([result.total for own in results for result in own]).sum()
    if count > 1 and runs[0].draws:
        for baseline, run in zip(_baselines(results, runs, count), runs, strict=True):
            loss = loss - _score_cost(run, baseline)
    return loss / count


def free_energy_parts(enumeration: Enumeration, max_bytes: float | None = None) -> list[Parts]:
    """log Q - log P as one part where guide and model share a graph, as two where one had plates written out."""
    q, joint = log_q(enumeration, max_bytes), log_joint(enumeration, max_bytes)
    joint = Parts(joint.graph, joint.conditionals, negative(joint.costs))
    if q.graph.variables.keys() | joint.graph.variables.keys() <= enumeration.variables.keys():
        everything = enumeration.graph(*q.conditionals, *q.costs, *joint.costs)
        return [Parts(everything, q.conditionals, (*q.costs, *joint.costs))]
    return [q, joint]


def _baselines(
    results: Sequence[Sequence[Expectation]], runs: Sequence[Enumeration], count: int
) -> list[dict[str, Table]]:
    """For each run and draw, the mean downstream cost of the other particles: it does not depend on the draw."""
    downstream = [_summed_downstream(own) for own in results]
    if len(runs) == 1:
        return [{name: _mean_of_others(table, count) for name, table in downstream[0].items()}]
    baselines: list[dict[str, Table]] = []
    for i in range(len(runs)):
        others = [own for j, own in enumerate(downstream) if j != i]
        baselines.append({name: _mean([own[name] for own in others if name in own]) for name in downstream[i]})
    return baselines


def _summed_downstream(results: Sequence[Expectation]) -> dict[str, Table]:
    summed: dict[str, Table] = {}
    for result in results:
        for name, table in result.downstream.items():
            summed[name] = _mean([summed[name], table], 1) if name in summed else table
    return summed


def _mean_of_others(table: Table, count: int) -> Table:
    if PARTICLES not in table.axes:
        return table
    values = table.values
    return Table((values.sum(table.axes.index(PARTICLES), keepdim=True) - values) / (count - 1), table.axes)


def _mean(tables: Sequence[Table], divisor: int | None = None) -> Table:
    if not tables:
        return Table(torch.zeros(()), ())
    summed = total(tables)
    return Table(summed.values / (divisor or len(tables)), summed.axes)


def _score_cost(run: Enumeration, baseline: Mapping[str, Table]) -> Tensor:
    """The expected baseline times the score: zero in value and in expected gradient."""
    conditionals = conditionals_of(run)
    costs = []
    for conditional in conditionals:
        if conditional.name in baseline:
            table, level = conditional.table, baseline[conditional.name]
            axes = tuple(dict.fromkeys((*table.axes, *level.axes)))
            costs.append(
                Factor(conditional.name, Table(table.aligned(axes) * level.aligned(axes), axes), conditional.plates)
            )
    return Parts(run.graph(*conditionals), conditionals, tuple(costs)).expectation().total
