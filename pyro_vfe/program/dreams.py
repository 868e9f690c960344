r"""Dreams: what a model makes up when nothing is observed.

    (v, u)  ~  P(v, u | G)

The latents of a dream are a draw from the exact posterior of its own observations.

References:
    Hinton, Dayan, Frey and Neal (1995), The "wake-sleep" algorithm for unsupervised neural networks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vfe.engine.shapes import broadcast_shapes
from pyro_vfe.errors import StructureError
from pyro_vfe.program.buffers import unchanged_buffers
from pyro_vfe.program.chain_gaps import Gaps
from pyro_vfe.program.dream_arguments import DreamtSite, with_dreams
from pyro_vfe.program.entry_points import entry_point
from pyro_vfe.program.given import given_guide
from pyro_vfe.program.given_parameters import reading
from pyro_vfe.program.layout import Program
from pyro_vfe.program.left_over import Arguments, check, first_look, prepare
from pyro_vfe.program.masking import unmasked
from pyro_vfe.program.parameters import naming_nan
from pyro_vfe.program.recorder import Site, is_computed, plates_around
from pyro_vfe.program.returned import check_returned
from pyro_vfe.program.single_values import with_draws

DreamToArgs = Callable[..., tuple[tuple[Any, ...], Mapping[str, Any]]]
"""Called with the dreamt observations by site name and with the programs' arguments; returns `(args, kwargs)`."""


@dataclass(frozen=True, eq=False)
class Dream:
    """Latents and observations drawn from a model, and the arguments that stand for the observations."""

    latents: Mapping[str, Tensor]
    """The value of each latent site: an exact draw from the posterior given the observations."""

    observations: Mapping[str, Tensor]
    """The value of each site that the model observes. Entries that a mask hides are those of the data."""

    args: tuple[Any, ...]
    """Positional arguments of the programs, with the dreamt observations in the data's place."""

    kwargs: Mapping[str, Any]
    """Keyword arguments of the programs, likewise."""

    subsamples: Mapping[str, Tensor] = field(default_factory=dict)
    """The elements of each plate that the dream is of; all of them, where it is not subsampled."""

    masks: Mapping[str, Tensor | bool] = field(default_factory=dict)
    """Where each latent exists that the model masks."""

    def __repr__(self) -> str:
        return f"Dream of {_shapes(self.observations)}, from {_shapes(self.latents)}"


@entry_point()
def dream(
    model: Program,
    *args: Any,
    dream_to_args: DreamToArgs | None = None,
    params: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Dream:
    """Returns latents and observations drawn from the model: one dream for each element of a plate of data.

    The model runs with its data, which say how large its plates are, and what it observes is drawn in their place. So
    the model should read its data by `obs=` alone: what it computes from them otherwise stays what it was. A site that
    nothing observes in this call (`obs=None`) counts as a latent. Draws come from torch's global generator.

    Args:
        model: The generative model.
        *args: Its arguments: the data, for their shapes.
        dream_to_args: Makes the programs' arguments of a dream where names do not tell: called with a dict of the
            dreamt observations by site name and with `*args, **kwargs`, it returns a tuple of positional arguments and
            a dict of keyword arguments. By default the value of an observed site takes the place of the argument of
            its name, in that argument's type; where a plate is subsampled, that of the elements that are present.
        params: Values of the model's parameters by name, all of them, such as `run.params`, in place of those in Pyro's
            store, which stays as it is. Names that the model does not read are left aside.
        **kwargs: Its keyword arguments.

    Raises:
        StructureError: The model has a factor, which no distribution draws; or a site that it observes is no argument
            of its, or not as the argument is.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(u):
        ...     with pyro.plate("data", len(u)):
        ...         v = pyro.sample("v", dist.Bernoulli(0.5))
        ...         pyro.sample("u", dist.Normal(10 * v, 0.1), obs=u)
        >>> made_up = dream(model, torch.zeros(1000))
        >>> (made_up.args[0] > 5).eq(made_up.latents["v"] > 0).all()
        tensor(True)

    References:
        Hinton, Dayan, Frey and Neal (1995), The "wake-sleep" algorithm for unsupervised neural networks.
    """
    given_guide(model, None)
    with reading(params, args, kwargs), unchanged_buffers(model):
        return dreamt(model, model, args, kwargs, dream_to_args)


def dreamt(
    model: Program,
    signed: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dream_to_args: DreamToArgs | None,
) -> Dream:
    """Returns a dream, as `dream` does.

    Args:
        model: What is run.
        signed: The program whose signature names the arguments.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        dream_to_args: Makes the programs' arguments of a dream where names do not tell.
    """
    run = _Dreamer((args, kwargs))
    look = first_look((model,), args, kwargs)
    with torch.no_grad(), naming_nan(signed), look, with_draws("a dream"), run, Gaps(is_whole=lambda name: True):
        returned = model(*args, **kwargs)
    check_returned({**run.latents, **run.observed}, returned, is_guide=False)
    observations = {name: site.value for name, site in run.observed.items()}
    if dream_to_args is None:
        seen = {name: site for name, site in run.observed.items() if site.mask is not False}
        own_args, own_kwargs = with_dreams(signed, seen, run.latents.keys(), run.subsamples, args, kwargs)
    else:
        own_args, own_kwargs = _checked(dream_to_args(dict(observations), *args, **kwargs))
    return Dream(run.latents, observations, own_args, own_kwargs, run.subsamples, run.masks)


def _shapes(values: Mapping[str, Tensor]) -> str:
    """Names and shapes: a cell of a notebook that ends in a dream has no room for its tensors."""
    return ", ".join(f"'{name}' {tuple(value.shape)}" for name, value in values.items()) or "nothing"


class _Dreamer(Messenger):
    """Draws what is observed like everything else, and notes it."""

    def __init__(self, arguments: Arguments) -> None:
        super().__init__()
        self.arguments = arguments
        self.latents: dict[str, Tensor] = {}
        self.observed: dict[str, DreamtSite] = {}
        self.subsamples: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor | bool] = {}
        self._data: dict[str, Tensor] = {}

    def _pyro_param(self, msg: Any) -> None:
        prepare(msg)

    def _pyro_post_param(self, msg: Any) -> None:
        check(msg, self.arguments)

    def _pyro_sample(self, msg: Any) -> None:
        kind = type(msg["fn"]).__name__
        if not msg["is_observed"] or kind == "_Subsample" or is_computed(msg):
            return
        if kind == "Unit":
            raise _cannot_dream(msg["name"])
        data = msg["value"] if isinstance(msg["value"], Tensor) else torch.as_tensor(msg["value"])
        self._data[msg["name"]] = data
        msg["is_observed"], msg["done"], msg["value"] = True, True, _drawn(msg["fn"], data)

    def _pyro_post_sample(self, msg: Any) -> None:
        name, value = msg["name"], msg["value"]
        if type(msg["fn"]).__name__ == "_Subsample":
            self.subsamples[name] = value
        elif name in self._data:
            self.observed[name] = _observation(msg, self._data[name])
        elif not is_computed(msg):
            self.latents[name] = value.clone()  # The model may change it, or the mask, in place.
            site = Site(name, "model", "sampled", msg["fn"], value, 1.0, msg["mask"], plates_around(msg))
            mask = unmasked(site)[1]
            if mask is not None:
                self.masks[name] = mask.clone() if isinstance(mask, Tensor) else mask


def _drawn(fn: Any, data: Tensor) -> Tensor:
    """A draw in the shape of the data, which may have more elements than the distribution says."""
    batch = data.shape[: max(0, data.dim() - len(fn.event_shape))]
    wanted = broadcast_shapes(fn.batch_shape, batch)
    value: Tensor = (fn if wanted == fn.batch_shape else fn.expand(wanted)).sample()
    return value


def _observation(msg: Any, data: Tensor) -> DreamtSite:
    """A dreamt observation; where a mask hides an entry there is none, and the data stay."""
    site = Site(msg["name"], "model", "observed", msg["fn"], msg["value"], 1.0, msg["mask"], plates_around(msg))
    (fn, mask), value = unmasked(site), site.value.clone()  # The model may change either in place.
    if mask is False:
        value = data
    elif mask is not None:
        mask = torch.as_tensor(mask).clone()
        shown = mask.reshape(mask.shape + (1,) * len(fn.event_shape))
        value = torch.where(shown, value.to(data.dtype), data)
    return DreamtSite(value, data, len(fn.event_shape), mask, site.plates)


def _cannot_dream(name: str) -> StructureError:
    return StructureError(
        f"Site '{name}' of the model is a pyro.factor, and no distribution says what it would be in a dream.",
        hint="Write it as pyro.sample(name, distribution, obs=...). What depends on parameters alone, such as a "
        "penalty, can be left out by poutine.block.",
    )


def _checked(made: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if (
        isinstance(made, tuple)
        and len(made) == 2
        and isinstance(made[0], (tuple, list))
        and isinstance(made[1], Mapping)
    ):
        return tuple(made[0]), dict(made[1])
    raise StructureError(
        f"dream_to_args returned a {type(made).__name__}, and not the programs' arguments.",
        hint="Return a tuple of the positional arguments and a dict of the keyword arguments: `return (u,), {}`.",
    )
