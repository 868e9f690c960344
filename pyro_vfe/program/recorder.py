"""One run of a program with its sites written down: the only reader of Pyro's messages.

What value an enumerable latent takes is the choice of the run: a draw, its whole support along a dim, or a given value.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vfe.engine.factors import Subsample
from pyro_vfe.errors import MissingGuideSiteError, NameClashError
from pyro_vfe.program.arrays import as_observed
from pyro_vfe.program.buffers import begin_run
from pyro_vfe.program.chain_gaps import REVEALS, Gaps
from pyro_vfe.program.escapes import NO_SITES, Escaped, Sites
from pyro_vfe.program.left_over import Arguments, check, prepare
from pyro_vfe.program.local_parameters import readable_by_svi
from pyro_vfe.program.masking import without_gaps
from pyro_vfe.program.plate_sizes import check_same_subsample, check_size
from pyro_vfe.program.precision import widened_distribution
from pyro_vfe.program.provenance import Provenance
from pyro_vfe.program.sizeless import SizelessPlates
from pyro_vfe.program.statements import asks_for_runs, expanded, infer_expands, name_value
from pyro_vfe.program.supports import is_enumerable, is_point, unwrapped
from pyro_vfe.program.surroundings import steps_around, subsampled_around

Role = Literal["guide", "model"]
ROLES: tuple[Role, ...] = ("guide", "model")
Kind = Literal["enumerated", "sampled", "observed", "unread"]
"""An unread site is a latent that only the model has, that has no finite support, and that nothing depends on: a
missing value, say. It integrates to one."""


@dataclass(frozen=True)
class Plate:
    """A vectorised plate around a site."""

    name: str
    dim: int
    """Its batch dim, negative."""
    size: int
    """The size of the subsample that is present."""
    full_size: int
    """The size of the whole."""


@dataclass(eq=False)
class Site:
    """A sample statement as it ran."""

    name: str
    role: Role
    kind: Kind
    fn: Any
    value: Tensor
    scale: Tensor | float
    mask: Tensor | bool | None
    plates: tuple[Plate, ...]
    auxiliary: bool = False
    """Whether the program says that the other program lacks the site."""
    steps: Mapping[str, int] = field(default_factory=dict)
    """For each sequential plate around the site, which step of it this is."""
    subsampled: frozenset[Subsample] = frozenset()
    """The plates around the site, vectorised and sequential, of which some elements are present."""
    controls: Sites = NO_SITES
    """Draws that had left torch before the site ran: it may depend on them."""
    follows_model: bool = False
    """Whether a site of the guide takes its weight from the model's site of that name."""
    reveals: str | None = None
    """The latent chain of which it observes states, where its mask holds."""

    def __post_init__(self) -> None:
        self.fn = widened_distribution(self.fn)

    def reads(self, provenance: Provenance) -> Sites:
        """The sites that the log-probability depends on, itself included where it is enumerated."""
        parts = [provenance.of(part) for part in (self.value, self.mask, self.scale)]
        own = {self.name} if self.kind == "enumerated" else NO_SITES
        return provenance.of_distribution(self.fn).union(own, self.controls, *parts)

    @property
    def needs_score(self) -> bool:
        """Whether the site is a draw of the guide whose gradient needs the score function."""
        return self.kind == "sampled" and self.role == "guide" and not is_pathwise(self.fn)

    @cached_property
    def plate_names(self) -> frozenset[str]:
        """The names of the vectorised plates around the site."""
        return frozenset(plate.name for plate in self.plates)


FOLLOWS_MODEL = "_vfe_follows_model"
"""The infer key of a guide site that takes its weight from the model's site of that name."""

LatentValue = Callable[[str, Role, Any, tuple[Plate, ...]], Tensor]
"""Chooses the value of an enumerable latent from its name, role, distribution and plates."""


class Recorder(Messenger):
    """Runs a guide or a model under chosen values and records its sites in order."""

    def __init__(
        self,
        role: Role,
        latent_value: LatentValue,
        *,
        given: Mapping[str, Tensor] | None = None,
        enumerated: frozenset[str] = frozenset(),
        subsamples: Mapping[str, Tensor] | None = None,
        full_sizes: Mapping[str, int] | None = None,
        sizeless: SizelessPlates | None = None,
        sequential: frozenset[str] = frozenset(),
        unread: frozenset[str] | None = None,
        check_given: Callable[[str, Any], None] | None = None,
        provenance: Provenance | None = None,
        look: Callable[["Site"], None] | None = None,
    ) -> None:
        """Args:
        role: Which program this is; a model may not sample what the guide lacks.
        latent_value: The choice of an enumerable latent's value.
        given: Values by site name that this run takes as they are: the guide's, for a model.
        enumerated: The given sites that stand for an enumerated latent of the guide.
        subsamples: Subsample indices by plate name, so that model and guide look at the same data.
        full_sizes: For a model, the size of the whole of each plate of the guide: it takes over the guide's subsample.
        sizeless: What is known of plates without a size.
        sequential: Latents that take one value at a time: the program may branch on them.
        unread: Latents that a model may sample though the guide lacks them, because nothing reads them; None for any.
        check_given: Called with the name and distribution of each given latent that is enumerated.
        provenance: Marks values with their sites, where the run is tracked.
        look: Called with each site at its statement, before the program can change anything in place.
        """
        super().__init__()
        self.role = role
        self.latent_value = latent_value
        self.given = dict(given or {})
        self.enumerated = set(enumerated)
        self.subsamples = dict(subsamples or {})
        self.full_sizes = dict(full_sizes or {})
        self.sizeless = sizeless or SizelessPlates()
        self.sequential = sequential
        self.unread = unread
        self.check_given = check_given
        self.provenance = provenance
        self.look = look
        self.sites: dict[str, Site] = {}
        self.marked: set[str] = set()
        """Latents whose statements ask for a run per value."""
        self.parameters: list[Tensor] = []
        """What the program has read of parameters, as it reads them."""
        self.returned: Any = None
        self._names: dict[str, str] = {}
        self._surroundings: dict[object, tuple[tuple[Plate, ...], dict[str, int], frozenset[Subsample]]] = {}

    def run(self, program: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Site]:
        """Runs `program` once and returns its sites by name, in order."""
        self._arguments: Arguments = args, kwargs
        try:
            gaps = Gaps(is_whole=self.given.__contains__, is_drawn=lambda name: name not in self.enumerated)
            torch.clear_autocast_cache()  # It would hold weights as they were at the step before.
            with self, gaps, self.provenance or nullcontext():
                self.returned = program(*args, **kwargs)
        except Escaped as escape:
            for name in escape.sites & self.sites.keys():
                if self.sites[name].kind == "unread":
                    fn = self.sites[name].fn
                    raise missing_guide_site(name, type(fn).__name__, is_enumerable(fn)) from escape
            raise
        for site in filter(lambda site: site.kind == "observed", self.sites.values()):
            self._fill_gaps(site)
        return self.sites

    def _fill_gaps(self, site: Site) -> None:
        """Replaces the NaN of missing data; after the run, which would take a look at them for a branch."""
        value = without_gaps(site)
        if value is not site.value:
            if self.provenance is not None:
                self.provenance.mark(value, self.provenance.of(site.value))
            site.value = value

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if type(fn).__name__ == "_Subsample":
            self._check_new(name, "plate")
            if msg["value"] is None and name in self.subsamples:
                check_size(name, fn, self.subsamples[name], self.full_sizes)
                msg["value"] = self.subsamples[name]
            self.full_sizes.setdefault(name, fn.size)
            return
        frames = msg["cond_indep_stack"]
        if frames and -1 in [frame.size for frame in frames] and not is_computed(msg):
            self.sizeless.measure(msg, self.role)
        if msg["is_observed"]:
            return
        if name in self.given:
            if self.check_given is not None and name in self.enumerated:
                self.check_given(name, fn)
            msg["value"], msg["done"] = self.given[name], True
            if self.role == "guide" or self.provenance is None:
                msg["value"] = self.given[name].clone()  # It is another run's, and the program may write into it.
            if self.role == "guide" and self.provenance is not None:
                # A draw of an earlier run may hold one value per value of the latents it was made from.
                self.provenance.mark(msg["value"], self.provenance.of_distribution(fn))
        elif msg["value"] is None and is_summed(msg):
            if asks_for_runs(msg):
                self.marked.add(name)
            value = expanded(self.latent_value(name, self.role, fn, self._around(msg)[0]), msg)
            msg["value"], msg["done"] = value, True
            self.enumerated.add(name)
            if self.provenance is not None and name not in self.sequential:
                self.provenance.originate(value, name)
                if infer_expands(msg):  # It has the dims of the latents that its distribution reads.
                    self.provenance.join(value, self.provenance.of_distribution(fn) & self.enumerated)
        elif msg["value"] is not None or self.role == "guide" or name_value(msg):
            return
        elif self.unread is not None and name not in self.unread:
            raise missing_guide_site(name, type(fn).__name__, is_enumerable(fn))

    _pyro_param = staticmethod(prepare)

    def _pyro_post_param(self, msg: Any) -> None:
        check(msg, self._arguments)
        readable_by_svi(msg["value"])
        self.parameters.append(msg["value"])

    def _pyro_post_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if type(fn).__name__ == "_Subsample":
            check_same_subsample(name, self.subsamples.setdefault(name, msg["value"]), msg["value"])
            return
        if is_computed(msg):
            return
        self._check_new(name, "site")
        kind = self._kind(msg)
        if self.provenance is not None and (kind == "unread" or (kind == "sampled" and self._needs_score(fn))):
            self.provenance.mark(msg["value"], frozenset((name,)))
            (self.provenance.watched if kind == "unread" else self.provenance.draws).add(name)
        elif self.provenance is not None and kind == "sampled" and self.role == "guide" and not is_point(fn):
            self.provenance.follow(msg["value"], name)
        infer, value = msg["infer"], msg["value"]
        plates, steps, subsampled = self._around(msg)
        if not isinstance(value, Tensor):
            value = as_observed(name, fn, value, *(() if self.provenance is None else (self.provenance.of,)))
            # Pyro's own handlers compute with arrays, and cannot.
            msg["value"] = msg["value"] if isinstance(msg["value"], (bool, int, float)) else value
        self.sites[name] = Site(
            name,
            self.role,
            kind,
            fn,
            value,
            msg["scale"],
            msg["mask"],
            plates,
            auxiliary=bool(infer.get("is_auxiliary")),
            steps=steps,
            subsampled=subsampled,
            controls=NO_SITES if self.provenance is None else self.provenance.controls,
            follows_model=bool(infer.get(FOLLOWS_MODEL)),
            reveals=infer.get(REVEALS),
        )
        if self.provenance is not None:
            self.provenance.kept.add(self.sites[name])
            self.provenance.observer.reached(self.sites[name])
        if self.look is not None:
            self.look(self.sites[name])

    def _around(self, msg: Any) -> tuple[tuple[Plate, ...], dict[str, int], frozenset[Subsample]]:
        """The vectorised plates around a site, its steps of sequential ones, and what is subsampled; made once."""
        key = tuple([(f.name, f.dim, f.size, f.full_size, f.counter) for f in msg["cond_indep_stack"]])
        known = self._surroundings.get(key)
        if known is None:
            known = self._surroundings[key] = plates_around(msg), steps_around(msg), subsampled_around(msg)
        return known

    def _kind(self, msg: Any) -> Kind:
        if msg["is_observed"]:
            return "observed"
        if msg["name"] in self.enumerated:
            return "enumerated"
        return "unread" if self.role == "model" and msg["name"] not in self.given else "sampled"

    def _needs_score(self, fn: Any) -> bool:
        return self.role == "guide" and not is_pathwise(fn)

    def _check_new(self, name: str, what: str) -> None:
        before = self._names.get(name)
        if before is not None:
            if before == what:
                fact = f"two {what}s of the {self.role} are called '{name}'"
            else:
                fact = f"a site and a plate of the {self.role} are both called '{name}'"
            raise NameClashError(
                f"The name '{name}' stands for two things: {fact}.", hint=_renaming(name, before, what)
            )
        self._names[name] = what


def _renaming(name: str, before: str, what: str) -> str:
    if before != what:
        return "Rename one of them."
    if what == "plate":
        return (
            "If a loop makes the plate in each of its steps, make it once, before the loop, and enter the same one "
            f"each time: plate = pyro.plate('{name}', size), then `with plate:`. Otherwise rename one of them."
        )
    return f"In a loop put the counter into the name: f'{name}_{{t}}'. Otherwise rename one of them."


def record_both(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    latent_value: LatentValue,
    *,
    given: Mapping[str, Tensor] | None = None,
    subsamples: Mapping[str, Tensor] | None = None,
    sizeless: SizelessPlates | None = None,
    sequential: frozenset[str] = frozenset(),
    unread: frozenset[str] | None = None,
    check_given: Callable[[str, Any], None] | None = None,
    provenance: Provenance | None = None,
    look: Callable[[Site], None] | None = None,
) -> tuple[Recorder, Recorder]:
    """Runs the guide, then the model against it, and returns both records; the arguments are those of `Recorder`."""
    begin_run()
    first = Recorder(
        "guide",
        latent_value,
        given=given,
        subsamples=subsamples,
        sizeless=sizeless,
        sequential=sequential,
        provenance=provenance,
        look=look,
    )
    first.run(guide, args, kwargs)
    second = Recorder(
        "model",
        latent_value,
        given={name: site.value for name, site in first.sites.items() if site.kind != "observed"},
        enumerated=frozenset(first.enumerated),
        subsamples=first.subsamples,
        full_sizes=first.full_sizes,
        sizeless=first.sizeless,
        sequential=sequential,
        unread=unread,
        check_given=check_given,
        provenance=provenance,
        look=look,
    )
    second.run(model, args, kwargs)
    return first, second


def at_all_elements(value: Tensor, plates: tuple[Plate, ...]) -> Tensor:
    """Returns one value of a latent at each element of the plates around it, of its own memory.

    Args:
        value: The value, of the shape of an event.
        plates: The plates.
    """
    sizes = {plate.dim: plate.size for plate in plates}
    return value.expand([*(sizes.get(dim, 1) for dim in range(min(sizes, default=0), 0)), *value.shape]).clone()


def is_pathwise(fn: Any) -> bool:
    """Whether draws from `fn` carry gradients to its parameters."""
    return bool(getattr(fn, "has_rsample", False))


def is_computed(msg: Any) -> bool:
    """Whether a site is a value under a name: `pyro.deterministic`, or what a reparametrised site leaves in its place.

    Args:
        msg: Pyro's message, after the site ran.
    """
    fn = msg["fn"]
    stands_in = getattr(fn, "_mask", None) is False and type(unwrapped(fn)).__name__ == "Delta"
    return bool(msg["infer"].get("_deterministic")) or (stands_in and msg["is_observed"])


def is_summed(msg: Any) -> bool:
    """Whether a latent is to be enumerated.

    Args:
        msg: Pyro's message of the site.
    """
    infer = msg["infer"]
    if "enumerate" in infer and infer["enumerate"] is None:
        return False
    return is_enumerable(msg["fn"])


def plates_around(msg: Any) -> tuple[Plate, ...]:
    """The vectorised plates around a site.

    Args:
        msg: Pyro's message of the site.
    """
    return tuple(
        Plate(frame.name, frame.dim, int(frame.size), int(frame.full_size or frame.size))
        for frame in msg["cond_indep_stack"]
        if frame.dim is not None and frame.dim < 0
    )


def missing_guide_site(name: str, family: str, is_finite: bool) -> MissingGuideSiteError:
    """The error for a latent that has to be drawn and that the guide does not draw."""
    if is_finite:
        latent = f"Latent site '{name}' ({family}) is set to be sampled (infer enumerate None)"
    else:
        latent = f"Latent site '{name}' is {family}, which has no finite support"
    return MissingGuideSiteError(latent, site=name, hint=f"Give the guide a site '{name}', or observe it.")
