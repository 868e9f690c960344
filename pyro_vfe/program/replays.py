"""Ordinary runs of a model at given latents: what it would observe, and how probable it finds what it did.

Draws stand side by side in one run, in a plate of their own, as the values of latents do when they are enumerated.
Where a model does not take them so, it runs once per draw.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vfe.program.chain_gaps import Gaps, closing
from pyro_vfe.program.enumeration import PARTICLES
from pyro_vfe.program.layout import Program
from pyro_vfe.program.log_prob import widened
from pyro_vfe.program.masking import masked, unmasked, without_gaps
from pyro_vfe.program.programs import in_particles
from pyro_vfe.program.recorder import Kind, Site, is_computed, plates_around

Given = Mapping[str, Tensor]
"""Values of latents by site name."""

_ROUNDING = 1e-5
"""By how much of its parts' magnitude a log-probability in single precision may be off."""


@dataclass(frozen=True, eq=False)
class Replay:
    """An ordinary run of a model."""

    sites: Mapping[str, Site]
    """Its random variables by name, in order; what it observes has the kind 'observed'."""
    log_joint: Tensor
    """The log-probability of what was given or observed as the program itself computes it, and the sum of its parts'
    magnitudes: shape `(draws, 2)`."""


class _Replayer(Messenger):
    """Gives latents their values and draws the rest; what is observed too, where it is to be simulated."""

    def __init__(self, given: Given, simulate: bool, draws_dim: int | None) -> None:
        super().__init__()
        self.given = given
        self.simulate = simulate
        self.draws_dim = draws_dim
        self.observed: set[str] = set()
        self.sites: dict[str, Site] = {}
        self.log_joint = torch.zeros(1, 2, dtype=torch.float64)

    def _pyro_sample(self, msg: Any) -> None:
        if not _is_random(msg):
            return
        if msg["name"] in self.given:
            msg["value"], msg["done"] = self.given[msg["name"]].clone(), True
        elif msg["is_observed"]:
            self.observed.add(msg["name"])
            if self.simulate:
                msg["is_observed"], msg["done"], msg["value"] = False, False, None

    def _pyro_post_sample(self, msg: Any) -> None:
        if type(msg["fn"]).__name__ == "_Subsample" or is_computed(msg):
            return
        name = msg["name"]
        plates = tuple(plate for plate in plates_around(msg) if plate.name != PARTICLES)
        kind: Kind = "observed" if name in self.observed else "sampled"
        site = Site(name, "model", kind, msg["fn"], torch.as_tensor(msg["value"]), msg["scale"], msg["mask"], plates)
        if name in self.given or msg["is_observed"]:
            self._add(site)
        if _is_random(msg):
            self.sites[name] = replace(site, value=site.value.clone())  # The model may change it in place.

    def _add(self, site: Site) -> None:
        fn, mask = unmasked(site)
        terms = masked(fn.log_prob(widened(without_gaps(site))), mask).double() * site.scale
        if self.draws_dim is None:
            terms = terms.reshape(1, -1)
        else:
            terms = terms.movedim(self.draws_dim, 0).flatten(1) if terms.dim() > 1 else terms.unsqueeze(1)
        self.log_joint = self.log_joint + torch.stack([terms.sum(1), terms.abs().sum(1)], -1)


def _is_random(msg: Any) -> bool:
    """Whether a site is a random variable: not the indices of a plate, a factor, or a computed value."""
    return type(msg["fn"]).__name__ not in ("_Subsample", "Unit") and not is_computed(msg)


def replayed(
    model: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    given: Given,
    *,
    simulate: bool,
    draws_dim: int | None = None,
) -> Replay:
    """Returns one ordinary run.

    Args:
        model: The generative model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        given: Values of latents; the model draws the others.
        simulate: Whether what is observed is drawn too.
        draws_dim: The batch dim along which draws stand side by side.
    """
    run = _Replayer(given, simulate, draws_dim)
    with torch.no_grad(), run, Gaps(is_whole=given.__contains__):
        closing(model, lambda name: name not in given)(*args, **kwargs)
    return Replay(run.sites, run.log_joint)


def takes_draws_side_by_side(
    model: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    given: Given,
    single: Mapping[int, Given],
    count: int,
    nesting: int,
) -> bool:
    """Whether one run of a model with many draws says of a draw what a run with that draw alone does.

    Args:
        model: The generative model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        given: Values of all its latents, with the draws along batch dim `-nesting`.
        single: Some of the draws by themselves, by their number.
        count: The number of draws.
        nesting: A batch dim that the model's plates leave free, counted from the right.
    """
    wide = in_particles(model, count, nesting)
    try:
        found = replayed(wide, args, kwargs, given, simulate=False, draws_dim=-nesting).log_joint
    except Exception:  # Whatever a program does about a dim that it does not expect.
        return False
    if len(found) != count:
        return False
    for number, own in single.items():
        log_joint, magnitude = replayed(model, args, kwargs, own, simulate=False).log_joint[0]
        if not bool((found[number, 0] - log_joint).abs() <= _ROUNDING * (1 + magnitude)):
            return False
    return True
