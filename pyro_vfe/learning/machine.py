r"""A Helmholtz machine: a generative and a recognition model, and what the phases of wake-sleep know of them.

    theta    the parameters that the generative model reads        changed by wake phases
    phi      those that the recognition model alone reads          changed by sleep phases

References:
    Dayan, Hinton, Neal and Zemel (1995), The Helmholtz machine.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyro_vfe.energy.drawing import Drawing, OnCost
from pyro_vfe.errors import NotFiniteError, VFEError
from pyro_vfe.program.buffers import unchanged_buffers
from pyro_vfe.program.data import Reads
from pyro_vfe.program.drawing_runs import Handled, IsEnumerable, Look, log_prob_of, run_guide, run_model
from pyro_vfe.program.keeping import AsGiven
from pyro_vfe.program.layout import Program, lay_out
from pyro_vfe.program.masks import mask_guide
from pyro_vfe.program.parameters import Strangers, naming_nan, stored_tensors, two_of_one_name
from pyro_vfe.program.programs import Check, Programs
from pyro_vfe.program.randomness import undisturbed_randomness
from pyro_vfe.program.recorder import Recorder, Site

_Result = TypeVar("_Result")


class Machine:
    """A generative and a recognition model; their parameters live in Pyro's store."""

    def __init__(
        self,
        model: Program,
        guide: Program,
        *,
        check: Check,
        max_bytes: float | None,
        on_cost: OnCost,
        weighs_data: bool,
    ) -> None:
        """Args:
        model: The generative model.
        guide: The recognition model.
        check: When enumerated tables are compared with ordinary runs.
        max_bytes: The most memory that tables may take.
        on_cost: What to do where summing all latents out would not fit: raise, or sample as many as it takes.
        weighs_data: Whether each datum's draws have importance weights of their own.
        """
        self.theta: set[str] = set()
        """The names of the parameters that the model has read."""
        self.read_by_guide: set[str] = set()
        """The names of the parameters that the guide has read, the model's among them."""
        self.max_bytes = max_bytes
        self.given_guide = guide
        self.given_model = model
        self.on_cost: OnCost = on_cost
        self.strangers = Strangers()
        """Parameters of modules that have the name of others in Pyro's store."""
        self.model = Handled(model, self.theta, strangers=self.strangers)
        self.hidden_model = Handled(model, self.theta, hides=lambda name: True, gradients=False)
        self.held_guide = Handled(guide, self.read_by_guide, hides=lambda name: True, gradients=False)
        own, strangers = self.theta.__contains__, self.strangers
        self.learning_guide = Handled(guide, self.read_by_guide, hides=own, detaches=True, strangers=strangers)
        self.guide_at_dreams = Handled(guide, self.read_by_guide, hides=own, strangers=strangers)
        self.reads: Reads = {}
        """What the log-probability of each site depends on."""
        self.programs = Programs(check=check, max_bytes=max_bytes, weighs_data=weighs_data)
        self.as_given = AsGiven()
        """Runs the programs where nothing is enumerated."""
        self._drawing = Drawing(on_cost)
        self._enumerates: bool | None = None
        self._unread: frozenset[str] = frozenset()
        self._checked = False

    @property
    def phi(self) -> set[str]:
        """The names of the parameters that the guide alone has read."""
        return self.read_by_guide - self.theta

    @property
    def shared(self) -> list[str]:
        """The names of the parameters that both have read: the wake phase changes them."""
        return sorted(self.read_by_guide & self.theta)

    def look(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Finds out, once, whether there is anything to enumerate, and which parameters are whose.

        Args:
            args: Arguments of both programs.
            kwargs: Keyword arguments of both.

        Raises:
            VFEError: The programs do not fit each other.
        """
        if self._enumerates is not None:
            return
        with (
            undisturbed_randomness(),
            unchanged_buffers(self.model, self.held_guide),
            naming_nan(self.given_model, self.given_guide),
        ):
            layout = lay_out(self.model, self.held_guide, args, kwargs)
        if not any(site.role == "guide" for site in layout.sites.values()):
            raise no_recognition_model("a guide that samples nothing")
        self._unread, self.reads = layout.unread, layout.reads
        self._enumerates = any(site.kind == "enumerated" for site in layout.sites.values())

    def check_elements(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Checks that elements of plates do not read each other's draws, which are weighed element by element.

        Args:
            args: Arguments of both programs.
            kwargs: Keyword arguments of both.

        Raises:
            SpotCheckError: They do.
        """
        if self.programs.check == "always" or (self.programs.check == "first" and not self._checked):
            with undisturbed_randomness(), unchanged_buffers(), torch.no_grad():
                self.programs.enumerate(self.model, self.held_guide, args, kwargs)
            self._checked = True

    def either(
        self,
        enumerated: Callable[[Program], _Result],
        drawn: Callable[[], _Result],
        guide: Program,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> _Result:
        """Returns what enumerating gives where there is anything to enumerate, otherwise what drawing gives.

        Args:
            enumerated: Is called where the programs have latents to enumerate, with a guide that leaves those that fit.
            drawn: Is called where they have none.
            guide: One of this machine's guides.
            args: Arguments of both programs.
            kwargs: Keyword arguments of both.

        Raises:
            CostError: They do not fit, and are not to be sampled.
        """
        if not self._enumerates:
            try:
                return drawn()
            except IsEnumerable:  # These arguments led to another branch than those before.
                self._enumerates = True
        return self._drawing(enumerated, self.model, guide, args, kwargs)

    def drawn(self, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Recorder, Recorder]:
        """One ordinary run of a guide, and of the model at what it drew.

        Args:
            guide: One of this machine's guides.
            args: Arguments of both programs.
            kwargs: Keyword arguments of both.
        """

        def both(look: Look) -> tuple[Recorder, Recorder]:
            first = run_guide(guide, args, kwargs, look)
            return first, run_model(self.model, args, kwargs, first, self._unread, look)

        first, second = self.as_given.run(both)
        for name, site in first.sites.items():
            if site.follows_model and name in second.sites:
                site.scale = second.sites[name].scale
        mask_guide({(site.role, site.name): site for run in (first, second) for site in run.sites.values()})
        return first, second


def no_recognition_model(instead: str) -> VFEError:
    """The error for a guide from which nothing could be learned.

    Args:
        instead: What was given.
    """
    return VFEError(
        f"WakeSleep was given {instead}: there is nothing that could learn from dreams.",
        hint="Pass a guide that computes Q from the data, such as vfe.AutoAmortized(model, network); to learn a "
        "model with the exact posterior, use vfe.EM(model) or vfe.fit(model, None, ...).",
    )


def gradients(loss: Tensor, names: Iterable[str], strangers: Strangers) -> None:
    """Writes the gradient of a loss to `.grad` of the parameters of some names, and of no others.

    Args:
        loss: A scalar.
        names: In Pyro's store; others have no gradient.
        strangers: Parameters that are not in Pyro's store, though others of their names are.

    Raises:
        NameClashError: The loss depends on one of these.
    """
    leaves = [leaf for leaf in stored_tensors(names) if leaf.requires_grad]
    others = [name for name, tensor in strangers.found.items() if tensor.requires_grad]
    wanted = [*leaves, *(strangers.found[name] for name in others)]
    if not wanted or not loss.requires_grad:
        return
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    clashing = [name for name, gradient in zip(others, found[len(leaves) :], strict=True) if gradient is not None]
    if clashing:
        raise two_of_one_name(clashing)
    for leaf, gradient in zip(leaves, found, strict=False):
        leaf.grad = gradient


def check_finite(loss: Tensor, sites: Iterable[Site]) -> None:
    """Checks that a loss is a number.

    Args:
        loss: Minus a sum of log-probabilities.
        sites: Those whose log-probabilities they are.

    Raises:
        NotFiniteError: It is not; the message names the sites.
    """
    if math.isfinite(loss.item()):
        return
    found = [_fault(site) for site in sites if site.kind != "unread"]
    named = ", ".join(dict.fromkeys(words for words in found if words))
    raise NotFiniteError(
        f"The loss is {loss.item():g}: {named or 'its sites are finite, and their sum is not'}.",
        hint="Give what happens a probability that is small instead of zero (logits instead of probabilities), and "
        "look for parameters at the end of their range. This phase changed nothing.",
    )


def _fault(site: Site) -> str | None:
    values = log_prob_of(site).detach()
    if bool(values.isneginf().any()):
        return f"site '{site.name}' of the {site.role} ({type(site.fn).__name__}) gives it probability zero"
    return None if bool(values.isfinite().all()) else f"site '{site.name}' of the {site.role} has no finite density"
