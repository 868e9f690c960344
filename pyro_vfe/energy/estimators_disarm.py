r"""Gradients of Bernoulli draws from antithetic pairs: DisARM.

    b = 1[1 - u < p],  b~ = 1[u < p],  alpha = logit p        u uniform
    gradient by alpha  =  1/2 (f(b) - f(b~)) (-1)^b~ 1[b != b~] sigmoid(|alpha|)

f is the cost downstream of the draw, each element of a vector and of a plate with its own sign. A run of the programs
gives b; b~ is drawn given b, which needs no u:

    P(b~ = 1 | b = 0)  =  exp(min(alpha, 0))        P(b~ = 1 | b = 1)  =  1 - exp(-max(alpha, 0))

Draws that depend on no other draw of this kind are one layer, those that depend on the first layer the second, and so
on. Each layer has a run of its own in which it is mirrored: what does not depend on it is as it was in the first run,
what does is drawn anew. So a pair of programs with T layers is run T + 1 times.

References:
    Dong, Mnih and Tucker (2020), DisARM: an antithetic gradient estimator for binary latent variables.
    Yin, Ho, Yan, Qian and Zhou (2020), Probabilistic best subset selection by gradient-based optimization (the same,
    as U2G).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_vfe.energy.estimators import surrogate_loss
from pyro_vfe.engine.factors import Factor
from pyro_vfe.errors import StructureError
from pyro_vfe.program.enumeration import Enumeration, SiteKey
from pyro_vfe.program.families import unwrapped
from pyro_vfe.program.log_prob import given_as
from pyro_vfe.program.masking import unmasked
from pyro_vfe.program.recorder import Site
from pyro_vfe.program.tables import Scorer

Again = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Enumeration]
"""Runs the programs again, given the values of some draws and the subsamples."""


def disarm_loss(
    particles: Sequence[Sequence[Enumeration]], side_by_side: int = 1, max_bytes: float | None = None
) -> Tensor:
    """Returns the mean of F over particles and the runs of each, whose gradient is an unbiased estimate of F's.

    Draws that are not Bernoulli have the leave-one-out score function in each run.

    Args:
        particles: What `mirrored_runs` made of each run of the programs.
        side_by_side: How many particles each run holds.
        max_bytes: The most memory that intermediate tables may take.

    Raises:
        StructureError: The layers differ from particle to particle.
    """
    if len({len(own) for own in particles}) > 1:
        raise StructureError(
            "Which draws depend on which differs from one particle to the next.",
            hint='Use gradient="leave-one-out", which takes each run as it comes.',
        )
    losses = [surrogate_loss(runs, side_by_side, max_bytes) for runs in zip(*particles, strict=True)]
    return torch.stack(losses).mean()


def mirrored_runs(run: Enumeration, again: Again) -> list[Enumeration]:
    """Returns a run, and for each layer of its Bernoulli draws a run in which that layer is mirrored.

    Args:
        run: One run of the programs.
        again: Runs the programs again, given draws.

    Raises:
        StructureError: The programs branch on a latent.
    """
    bases = {name: _bernoulli(run.sites["guide", name]) for name in run.draws}
    found = {name: base for name, base in bases.items() if base is not None}
    layers = _layers(run, frozenset(found))
    if not layers:
        return [run]
    _check_runs_once(run, layers[0][0])
    weight = (1 + len(layers)) / 2  # a half, in a mean over all runs
    own: dict[str, Tensor] = {}
    images = []
    for layer in layers:
        values = {name: _mirror_image(run.sites["guide", name].value, found[name]) for name in layer}
        mirrored = again({**_unmoved(run, layer), **values}, run.subsamples)
        signs = {name: weight * _sign(run.sites["guide", name].value, values[name], found[name]) for name in layer}
        own |= signs
        images.append(_scored(mirrored, found.keys(), {name: -sign for name, sign in signs.items()}))
    return [_scored(run, found.keys(), own), *images]


def _bernoulli(site: Site) -> Any:
    """The distribution of a Bernoulli draw's elements; None where it is of another family."""
    base = unwrapped(unmasked(site)[0])[0]
    return base if type(base).__name__ == "Bernoulli" else None


def _layers(run: Enumeration, names: frozenset[str]) -> list[list[str]]:
    """Draws by the length of the longest path of draws that leads to each, in order of sampling."""
    depth: dict[str, int] = {}
    for name in (name for role, name in run.sites if role == "guide" and name in run.draws):
        before = [depth[axis] for axis in run.factors["guide", name].axes if axis in depth]
        depth[name] = max(before, default=-1) + (name in names)
    count = max(depth.values(), default=-1) + 1
    return [[name for name, own in depth.items() if name in names and own == layer] for layer in range(count)]


def _unmoved(run: Enumeration, layer: Sequence[str]) -> dict[str, Tensor]:
    """What the guide drew without regard to a layer."""
    drawn = [key for key, site in run.sites.items() if site.role == "guide" and site.kind == "sampled"]
    return {key[1]: run.sites[key].value for key in drawn if set(layer).isdisjoint(run.factors[key].axes)}


def _mirror_image(value: Tensor, base: Any) -> Tensor:
    """b~ given b."""
    alpha, probs = _alpha(base).detach(), base.probs.detach()
    mirrored = torch.where(value > 0, -torch.expm1(-alpha.clamp(min=0)), alpha.clamp(max=0).exp())
    return torch.bernoulli(torch.where((probs > 0) & (probs < 1), mirrored, value))


def _sign(value: Tensor, image: Tensor, base: Any) -> Tensor:
    """(-1)^b~ 1[b != b~] sigmoid(|alpha|)."""
    return (value - image) * torch.sigmoid(_alpha(base).detach().abs())


def _alpha(base: Any) -> Tensor:
    """The logits; of probabilities, where torch clamps them, those of the numbers as they are between 0 and 1."""
    logits: Tensor = base.logits
    if given_as(base) == "logits":
        return logits
    inside = (base.probs > 0) & (base.probs < 1)
    return torch.where(inside, torch.where(inside, base.probs, 0.5).logit(), logits)


def _scored(run: Enumeration, names: Collection[str], signs: Mapping[str, Tensor]) -> Enumeration:
    """The run with the gradients of Bernoulli draws: signs times logits for some, none for the others."""
    scores: dict[str, Factor | None] = dict.fromkeys(names)
    if signs and torch.is_grad_enabled():
        keys: list[SiteKey] = [("guide", name) for name in signs]
        scores |= {key[1]: factor for key, factor in run.rescored(frozenset(keys), _Signed(signs)).items()}
    return replace(run, scores=scores)


@dataclass(frozen=True, eq=False)
class _Signed(Scorer):
    """Scores draws by their logits times given numbers, summed over the event."""

    signs: Mapping[str, Tensor]
    of_draws = True

    def scored(self, site: Site, fn: Any) -> Tensor:
        """The sum, of a shape that broadcasts to the batch.

        Args:
            site: The draw.
            fn: Its distribution, without masks.
        """
        scores: Tensor = self.signs[site.name] * _alpha(_bernoulli(site))
        event = tuple(range(-len(fn.event_shape), 0))
        return scores.sum(event) if event else scores

    def stacked(self, sites: Sequence[Site]) -> Tensor | None:
        """None: each draw has numbers of its own.

        Args:
            sites: Draws with equal distributions.
        """
        return None


def _check_runs_once(run: Enumeration, name: str) -> None:
    if len(run.paths) > 1:
        raise StructureError(
            f"The programs branch on a latent, and draw '{name}' may be another in each branch: there is no pair of "
            "runs for DisARM.",
            hint='Use gradient="leave-one-out", or choose by a table (`table[z]`) in place of the branch.',
        )
