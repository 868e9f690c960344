r"""The variational free energy as a Pyro ELBO.

    F(Q, G)  =  E_{Q(v|u)} [ log Q(v|u) - log P(v, u | G) ]

`FreeEnergy` takes the place of `pyro.infer.TraceEnum_ELBO` in SVI: the same arguments, the same numbers where that
one is exact, and no annotations: every discrete latent with a finite support is enumerated.

References:
    Dayan, Hinton, Neal and Zemel (1995), The Helmholtz machine.
    Neal and Hinton (1998), A view of the EM algorithm that justifies incremental, sparse, and other variants.
"""

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, SupportsIndex

import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_vfe.energy.at_zeros import with_gradient_at_zeros
from pyro_vfe.energy.decomposition import Decomposition, decomposition
from pyro_vfe.energy.drawing import Drawing, OnCost
from pyro_vfe.energy.estimators import surrogate_loss
from pyro_vfe.energy.estimators_disarm import disarm_loss, mirrored_runs
from pyro_vfe.energy.estimators_vimco import vimco_loss
from pyro_vfe.energy.finite_gradients import backward_or_nothing, watched
from pyro_vfe.energy.impossible import not_finite
from pyro_vfe.energy.responsibilities import marginal_distributions, posterior_run
from pyro_vfe.errors import NotFiniteGradientError, VFEError, callers_level
from pyro_vfe.program.buffers import Buffers, unchanged_buffers
from pyro_vfe.program.entry_points import entry_point
from pyro_vfe.program.enumeration import Enumeration
from pyro_vfe.program.given import check_option, given_guide
from pyro_vfe.program.given_parameters import reading
from pyro_vfe.program.layout import Program
from pyro_vfe.program.programs import Check, Programs
from pyro_vfe.program.singular import parameter_leaves

Gradient = Literal["leave-one-out", "disarm", "vimco"]
"""How the gradients of discrete draws are estimated."""


class FreeEnergy(ELBO):
    """The free energy F = surprise + gap of a guide and a model, with discrete latents summed exactly.

    A `pyro.infer.ELBO`: pass it to `pyro.infer.SVI` as the loss, or call it on two modules. Discrete latents of the
    guide are summed under the guide, discrete latents that only the model has are summed inside the model, and what
    remains is drawn from the guide: sites without a finite support, and those that say `infer={"enumerate": None}`.
    Draws have the pathwise gradient where their distribution allows it; the others have one of three estimators, all
    of them unbiased:

    - "leave-one-out": the score function, each draw with the cost downstream of it. The baseline is the mean of that
      cost over the other particles; one particle has none.
    - "disarm": a Bernoulli draw (a vector, too) is paired with its mirror image, and the gradient is that of the
      difference between the two. A particle is a pair, or T + 1 runs where draws depend on draws in T layers. Draws of
      other families keep the score function, with the baseline of "leave-one-out".
    - "vimco": the loss is no longer F but the importance-weighted bound F_K of all particles, for each datum by
      itself: F >= F_K >= surprise. A datum is an element of the plates around all that reads the same draws; where a
      draw lies outside of all plates, the data as a whole. What reads no draw counts once, beside them.

    References:
        Kool, van Hoof and Welling (2019), Buy 4 REINFORCE samples, get a baseline for free (leave-one-out baseline).
        Dong, Mnih and Tucker (2020), DisARM: an antithetic gradient estimator for binary latent variables.
        Mnih and Rezende (2016), Variational inference for Monte Carlo objectives (VIMCO).
    """

    @entry_point()
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
        gradient: Gradient = "leave-one-out",
    ) -> None:
        """Args:
        num_particles: How many draws of what is sampled are averaged; pairs of draws for "disarm", and for "vimco" the
            K of the bound.
        max_plate_nesting: Batch dims to reserve for plates; found from the programs by default.
        max_iarange_nesting: Pyro's deprecated name of the same, here so that arguments keep their positions.
        vectorize_particles: Draw all particles in one run, in a plate of their own.
        strict_enumeration_warning: Warn when the programs have no discrete latent to enumerate.
        ignore_jit_warnings: As in Pyro's ELBOs; nothing is traced here.
        jit_options: As in Pyro's ELBOs; nothing is traced here.
        retain_graph: Passed to `backward` in `loss_and_grads`.
        tail_adaptive_beta: As in Pyro's ELBOs; unused.
        check: When the enumerated tables are compared with an ordinary run at a random assignment: at the "first" call
            for a pair of programs and where they do something new, "always", or never (False).
        max_bytes: The most memory that tables may take; by default half of what is free.
        on_cost: What to do where summing all latents out would not fit: "raise" an error, or "sample" as many latents
            of the guide as it takes, with a warning that names them. Loss and decomposition may differ in which: a
            decomposition also sums the model's posterior.
        gradient: How the gradients of discrete draws are estimated; what is enumerated has its exact gradient with
            each. "vimco" changes the loss as well; `decompose` is about F whichever it is.

        Raises:
            VFEError: An option is none, or the estimator needs more particles.
        """
        check_option("num_particles", num_particles, SupportsIndex, "number", _AN_INSTANCE)
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
        _check_gradient(gradient, num_particles)
        self.gradient = gradient
        self.max_bytes = max_bytes
        self._drawing = Drawing(on_cost)
        nesting = max_plate_nesting if max_iarange_nesting is None else max_iarange_nesting
        self._programs = Programs(
            check=check,
            max_bytes=max_bytes,
            min_nesting=0 if math.isinf(nesting) else int(nesting),
            needs_data=True,
            weighs_data=gradient == "vimco",
        )

    @entry_point()
    def loss(
        self,
        model: Program,
        guide: Program | None,
        *args: Any,
        params: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> float:
        """Returns F in nats, an average over particles where something is sampled.

        Args:
            model: The generative model.
            guide: The guide; None for one without sites.
            *args: Arguments of both programs.
            params: Values of the programs' parameters by name, all of them, such as `run.params`, in place of those in
                Pyro's store, which stays as it is. Names that the programs do not read are left aside.
            **kwargs: Keyword arguments of both programs.

        Raises:
            VFEError: The programs cannot be enumerated, or F is not finite; the message says which site and the way
            out.
        """
        with reading(params, args, kwargs), torch.no_grad(), Buffers():
            return float(self._finite_loss(model, guide, args, kwargs)[0])

    @entry_point()
    def differentiable_loss(self, model: Program, guide: Program | None, *args: Any, **kwargs: Any) -> Tensor:
        """Returns F in nats as a scalar tensor whose gradient is exact for what is enumerated, unbiased for the rest.

        Args:
            model: The generative model.
            guide: The guide; None for one without sites.
            *args: Arguments of both programs.
            **kwargs: Keyword arguments of both programs.

        Raises:
            VFEError: As `loss`. In the backward pass, a gradient is not finite: it has not been written.
        """
        with Buffers():
            loss, leaves = self._finite_loss(model, guide, args, kwargs)
        return watched(loss, leaves, self._looking_again(model, guide)) if loss.requires_grad else loss

    @entry_point(learns=True)
    def loss_and_grads(self, model: Program, guide: Program | None, *args: Any, **kwargs: Any) -> float:
        """Returns F in nats and adds its gradient to the parameters' `.grad`.

        Args:
            model: The generative model.
            guide: The guide; None for one without sites.
            *args: Arguments of both programs.
            **kwargs: Keyword arguments of both programs.

        Raises:
            VFEError: As `loss`, or a gradient is not finite; no gradient has been written then.
        """
        try:
            return self._backward(model, guide, args, kwargs)
        except NotFiniteGradientError:  # A parameter has come to where it is not: the programs are looked at again.
            return self._backward(model, guide, args, kwargs)

    @entry_point()
    def decompose(
        self,
        model: Program,
        guide: Program | None,
        *args: Any,
        params: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Decomposition:
        """Returns F taken apart into the model's share and the guide's, in float64 and without gradients.

        Args:
            model: The generative model.
            guide: The guide; None for the exact posterior, which makes F the surprise.
            *args: Arguments of both programs.
            params: Values of the programs' parameters by name, all of them, such as `run.params`, in place of those in
                Pyro's store, which stays as it is. Names that the programs do not read are left aside.
            **kwargs: Keyword arguments of both programs.

        Raises:
            ImpossibleDataError: The data have probability zero under the model.
            VFEError: The programs cannot be enumerated.

        References:
            Neal and Hinton (1998), A view of the EM algorithm that justifies incremental, sparse, and other variants.
        """
        with reading(params, args, kwargs), torch.no_grad(), unchanged_buffers():

            def decomposed(own: Program) -> Decomposition:
                count = range(self.num_particles)
                runs = [self._programs.enumerate_given_draws(model, own, args, kwargs) for _ in count]
                return decomposition(runs, self.max_bytes)

            return self._drawing(decomposed, model, given_guide(model, guide), args, kwargs, purpose="decompose")

    @entry_point()
    def compute_marginals(
        self,
        model: Program,
        guide: Program | None,
        *args: Any,
        params: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> "OrderedDict[str, torch.distributions.Distribution]":
        """Returns the posterior marginal of each discrete latent that only the model has, by site name.

        Latents of the guide are averaged over the guide, draws are those of one run. One that some branches of the
        model lack has the marginal given that it is there, and none where it certainly is not.

        Args:
            model: The generative model.
            guide: The guide; None for one without sites.
            *args: Arguments of both programs.
            params: Values of the programs' parameters by name, all of them, such as `run.params`, in place of those in
                Pyro's store, which stays as it is. Names that the programs do not read are left aside.
            **kwargs: Keyword arguments of both programs.
        """
        with reading(params, args, kwargs):
            return marginal_distributions(self._one_run(model, guide, args, kwargs, "compute_marginals"))

    @entry_point()
    def sample_posterior(
        self,
        model: Program,
        guide: Program | None,
        *args: Any,
        params: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Returns what the model returns when its discrete latents are drawn from their joint posterior.

        Args:
            model: The generative model.
            guide: The guide; None for one without sites.
            *args: Arguments of both programs.
            params: Values of the programs' parameters by name, all of them, such as `run.params`, in place of those in
                Pyro's store, which stays as it is. Names that the programs do not read are left aside.
            **kwargs: Keyword arguments of both programs.
        """
        with reading(params, args, kwargs), unchanged_buffers():
            return posterior_run(self._one_run(model, guide, args, kwargs, "sample_posterior"), model, args, kwargs)

    def _get_trace(self, model: Program, guide: Program | None, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("FreeEnergy makes factor graphs, not traces.")

    def _one_run(
        self, model: Program, guide: Program | None, args: tuple[Any, ...], kwargs: Mapping[str, Any], what: str
    ) -> Enumeration:
        if self.num_particles != 1:
            raise VFEError(f"{what} was asked of {self.num_particles} particles.", hint="Use num_particles=1.")
        with torch.no_grad(), unchanged_buffers():
            return self._programs.enumerate_given_draws(model, given_guide(model, guide), args, kwargs)

    def _backward(
        self, model: Program, guide: Program | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> float:
        with Buffers():  # A step that fails leaves the buffers of modules as they were.
            loss, leaves = self._finite_loss(model, guide, args, kwargs)
            if loss.requires_grad:
                backward_or_nothing(loss, leaves, self._looking_again(model, guide), self.retain_graph)
        return loss.item()

    def _looking_again(self, model: Program, guide: Program | None) -> Callable[[], None]:
        return lambda: self._programs.look_again(model, given_guide(model, guide))

    def _finite_loss(
        self, model: Program, guide: Program | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss, and what its gradient is written to."""
        return self._drawing(
            lambda own: self._loss_of(model, own, args, kwargs), model, given_guide(model, guide), args, kwargs
        )

    def _loss_of(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, list[Tensor]]:
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
                stacklevel=callers_level(),
            )
        again = partial(self._again, model, guide, args, kwargs, side_by_side)
        particles = [mirrored_runs(run, again) if self.gradient == "disarm" else [run] for run in runs]
        estimate = partial(self._estimate, side_by_side=side_by_side)
        loss = estimate(particles)
        if not math.isfinite(loss.item()):
            raise not_finite([run for own in particles for run in own], loss.item(), (model, guide))
        return with_gradient_at_zeros(loss, particles, estimate), parameter_leaves(runs)

    def _estimate(self, particles: Sequence[Sequence[Enumeration]], side_by_side: int) -> Tensor:
        """The loss from the runs of each particle."""
        if self.gradient == "disarm":
            return disarm_loss(particles, side_by_side, self.max_bytes)
        estimate = vimco_loss if self.gradient == "vimco" else surrogate_loss
        return estimate([run for own in particles for run in own], side_by_side, self.max_bytes)

    def _again(
        self,
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        side_by_side: int,
        given: Mapping[str, Tensor],
        subsamples: Mapping[str, Tensor],
    ) -> Enumeration:
        with unchanged_buffers():
            return self._programs.enumerate(
                model, guide, args, kwargs, given=given, subsamples=subsamples, particles=side_by_side
            )


_AN_INSTANCE = (
    "a whole number of at least 1; programs go to the methods of an instance, vfe.FreeEnergy().decompose(model, guide, "
    "data), and pyro.infer.SVI takes an instance, loss=vfe.FreeEnergy()"
)


def _check_gradient(gradient: str, num_particles: int) -> None:
    if gradient == "vimco" and num_particles == 1:
        raise VFEError(
            'gradient="vimco" weighs particles against each other, and num_particles is 1.',
            hint='Use num_particles=2 or more, or gradient="leave-one-out" or "disarm", which do with one.',
        )
