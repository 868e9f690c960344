r"""Ordinary runs of a guide and of a model against it: every latent has one value, and every site a log-probability.

    v  ~  Q(v | u),        log P(v, u | G)  =  sum of the model's sites,        log Q(v | u)  =  sum of the guide's

Nothing is enumerated, so that a run costs what the programs themselves cost.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from pyro.distributions import Bernoulli, Independent
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from pyro_vfe.engine.shapes import broadcast_shapes
from pyro_vfe.program.bits import are_bits
from pyro_vfe.program.buffers import notice, unchanged_buffers
from pyro_vfe.program.layout import Program
from pyro_vfe.program.left_over import Arguments, check, prepare
from pyro_vfe.program.log_prob import log_prob, widened
from pyro_vfe.program.masking import masked, unmasked
from pyro_vfe.program.parameters import Strangers
from pyro_vfe.program.reach import reach
from pyro_vfe.program.recorder import Plate, Recorder, Role, Site, is_pathwise, is_summed


class IsEnumerable(Exception):
    """A run met a latent that is to be enumerated: it needs another kind of run."""


class Handled:
    """A program whose parameters are noted as it reads them."""

    def __init__(
        self,
        program: Program,
        names: set[str],
        *,
        hides: Callable[[str], bool] = lambda name: False,
        gradients: bool = True,
        detaches: bool = False,
        strangers: Strangers | None = None,
    ) -> None:
        """Args:
        program: A model or guide.
        names: Where the names of its parameters are noted.
        hides: Says of a parameter whether nobody outside shall see that it was read.
        gradients: Whether the program runs with gradients; otherwise it is held, the buffers of its modules too.
        detaches: Whether what it draws is held fixed when its parameters change.
        strangers: Where parameters of its modules are noted that Pyro's store does not have.
        """
        self.program = program
        self.names = names
        self.hides = hides
        self.gradients = gradients
        self.detaches = detaches
        self.strangers = strangers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the program returns."""
        with _Handler(self, (args, kwargs)):
            return self.program(*args, **kwargs) if self.gradients else self._held(*args, **kwargs)

    def _held(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), unchanged_buffers():
            notice(self._modules)
            return self.program(*args, **kwargs)

    @cached_property
    def _modules(self) -> tuple[torch.nn.Module, ...]:
        return tuple(reach(self.program).modules)


class _Handler(Messenger):
    def __init__(self, handled: Handled, arguments: Arguments) -> None:
        super().__init__()
        self.arguments = arguments
        self.handled = handled

    def _pyro_param(self, msg: Any) -> None:
        prepare(msg)
        self.handled.names.add(msg["name"])
        if self.handled.hides(msg["name"]):
            msg["stop"] = True

    def _pyro_post_param(self, msg: Any) -> None:
        check(msg, self.arguments)
        if self.handled.strangers is not None:
            self.handled.strangers.meet(msg)

    def _pyro_sample(self, msg: Any) -> None:
        if not self.handled.detaches or msg["value"] is not None or type(msg["fn"]).__name__ == "_Subsample":
            return
        if not is_summed(msg) and is_pathwise(msg["fn"]):
            msg["value"], msg["done"] = msg["fn"].sample(), True


Look = Callable[[Site], None]
"""Is called with each site at its statement."""


def run_guide(guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], look: Look) -> Recorder:
    """Returns an ordinary run of a guide.

    Args:
        guide: The guide.
        args: Its arguments.
        kwargs: Its keyword arguments.
        look: What looks at each site at its statement.

    Raises:
        IsEnumerable: The guide has a latent that is to be enumerated.
    """
    run = Recorder("guide", _refused, look=look)
    run.run(guide, args, kwargs)
    return run


def run_model(
    model: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    guide: Recorder,
    unread: frozenset[str],
    look: Look,
) -> Recorder:
    """Returns an ordinary run of a model at what a guide has drawn.

    Args:
        model: The generative model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        guide: A run of the guide at the same arguments.
        unread: Latents that the model may sample though the guide lacks them, because nothing reads them.
        look: What looks at each site at its statement.

    Raises:
        IsEnumerable: The model has a latent of its own that is to be enumerated.
        MissingGuideSiteError: It has one that cannot be.
    """
    given = {name: site.value for name, site in guide.sites.items() if site.kind != "observed"}
    run = Recorder(
        "model",
        _refused,
        given=given,
        subsamples=guide.subsamples,
        full_sizes=guide.full_sizes,
        sizeless=guide.sizeless,
        unread=unread,
        look=look,
    )
    run.run(model, args, kwargs)
    return run


def run_guide_at(
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    given: Mapping[str, Tensor],
    subsamples: Mapping[str, Tensor],
    look: Look,
) -> Recorder:
    """Returns an ordinary run of a guide at given values of its latents.

    Args:
        guide: The guide.
        args: Its arguments.
        kwargs: Its keyword arguments.
        given: Values by site name.
        subsamples: The elements of each plate that are present.
        look: What looks at each site at its statement.

    Raises:
        IsEnumerable: The guide has a latent of finite support that is not given.
    """
    run = Recorder("guide", _refused, given=given, subsamples=subsamples, look=look)
    run.run(guide, args, kwargs)
    return run


def _refused(name: str, role: Role, fn: Any, plates: tuple[Plate, ...]) -> Tensor:
    raise IsEnumerable(name)


def total_log_prob(sites: Iterable[Site]) -> Tensor:
    """Returns the sum of the sites' weighted log-probabilities, a scalar in nats.

    Args:
        sites: Of an ordinary run.
    """
    return torch.stack([log_prob_of(site).sum() for site in sites if site.kind != "unread"]).sum()


def _of_bits(fn: Any, value: Tensor) -> Tensor | None:
    """The log-probabilities of bits given by logits, in one fused operation; None of anything else."""
    dims = 0
    if type(fn) is Independent:
        fn, dims = fn.base_dist, fn.reinterpreted_batch_ndims
    logits = fn.__dict__.get("logits") if type(fn) is Bernoulli else None
    if logits is None or "probs" in fn.__dict__:  # Of two, one was derived: logits of 0 and 1 are clamped.
        return None
    if logits.shape != value.shape or not value.is_floating_point():
        return None
    if fn._validate_args and not are_bits(value):
        fn._validate_sample(value)
    costs = binary_cross_entropy_with_logits(logits, value, reduction="none")
    # The sign comes last: to negate every bit would take another large tensor here, and one in the gradient.
    return -(costs.sum(tuple(range(-dims, 0))) if dims else costs)


def log_prob_of(site: Site) -> Tensor:
    """Returns the weighted log-probability of each element of a site, in nats, of the whole batch shape.

    Args:
        site: Of an ordinary run.
    """
    fn, mask = unmasked(site)
    value = widened(site.value)
    values = _of_bits(fn, value)
    if values is None:
        values = log_prob(fn, value)
    event_dim = len(fn.event_shape)
    shape = site.value.shape[: site.value.dim() - event_dim]
    if values.shape != shape or fn.batch_shape != shape:
        values = values.expand(broadcast_shapes(values.shape, fn.batch_shape, shape))
    values = masked(values, mask)
    return values if isinstance(site.scale, float) and site.scale == 1.0 else values * site.scale
