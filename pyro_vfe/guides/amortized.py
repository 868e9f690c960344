r"""The recognition model: a network from the data to Q.

    Q(v|u)  =  prod_sites  Q( v_site | network(u) )                     factorised
    Q(v|u)  =  prod_sites  Q( v_site | v_parents, network(u) )          along edges: a table for the parents' values
    Q(v|u)  =  prod_sites  Q( v_site | network_site(u, v_parents) )     in layers: a network for each site

References:
    Dayan, Hinton, Neal and Zemel (1995), The Helmholtz machine.
    Kingma and Welling (2014), Auto-encoding variational Bayes (amortised inference).
    Gershman and Goodman (2014), Amortized inference in probabilistic reasoning.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vfe.errors import StructureError
from pyro_vfe.guides.amortized_inputs import Inputs
from pyro_vfe.guides.amortized_latents import latents_of
from pyro_vfe.guides.amortized_logits import Rows, called, divided
from pyro_vfe.guides.amortized_networks import network_for, registered, unregistered
from pyro_vfe.guides.amortized_plan import Plan, Question, Step, plan_of, shape_key
from pyro_vfe.guides.base import OwnGuide
from pyro_vfe.guides.tables import frame, sampled
from pyro_vfe.program.buffers import unchanged_buffers
from pyro_vfe.program.entry_points import entry_point
from pyro_vfe.program.layout import Program
from pyro_vfe.program.randomness import undisturbed_randomness
from pyro_vfe.program.recorder import Plate
from pyro_vfe.program.signatures import signature_of

Chosen = Callable[[PyroModule, str | None], nn.Module]
"""Finds a guide's network of a site."""

_MAX_PLANS = 32
"""How many shapes of data are remembered."""


class AutoAmortized(OwnGuide):
    """A guide whose probabilities are a network's function of the data: it serves any data, those never seen as well.

    A `pyro.infer.autoguide.AutoGuide`. One network speaks of all discrete latents: the last dim of its output holds
    their logits in the model's order, K for a site of K values, 1 for a Bernoulli, one each for the elements of a
    Bernoulli vector (`to_event`); the dims before it are those of the plates around the latents. What the network
    returns is checked, and an error says the shape that is wanted. Or a mapping gives each site a network of its own,
    which may read the values of latents that come before: Q(mid|u) Q(top|mid).

    A site with more than a million joint values, or one that the model marks `infer={"enumerate": None}`, is drawn; all
    others leave it to the loss to sum them.

    The weights are registered as `network` at once: `state_dict`, `load_state_dict`, `parameters` and `to` work before
    the first call. Pyro's store knows them by the guide's name, as those of any PyroModule.

    >>> import torch, pyro, pyro.distributions as dist, pyro_vfe as vfe
    >>> def model(u):
    ...     with pyro.plate("data", len(u)):
    ...         v = pyro.sample("v", dist.Bernoulli(0.3 * torch.ones(4)).to_event(1))
    ...         pyro.sample("u", dist.Bernoulli(logits=v @ torch.ones(4, 9)).to_event(1), obs=u)
    >>> guide = vfe.AutoAmortized(model, torch.nn.Linear(9, 4))
    >>> guide(torch.zeros(5, 9))["v"].shape
    torch.Size([5, 4])
    """

    @entry_point()
    def __init__(
        self,
        model: Program,
        network: nn.Module | Mapping[str, nn.Module],
        inputs: Any = None,
        edges: Literal["model"] | Sequence[tuple[str, str]] = (),
        *,
        create_plates: Program | None = None,
    ) -> None:
        """Args:
            model: The generative model; its discrete latents are found when the guide is called.
            network: A module from the data to logits, for latents that lie in the same plates. Or a mapping from each
                latent site to a module; one for a latent outside of all plates reads the whole data and returns the
                site's logits alone.
            inputs: What the network reads: the name of an argument of the model (by default its first one), a list of
                names, whose tensors are joined along their last dim, or a function of the model's arguments, whose
                tensor goes in as it is. Bools and integers in named arguments take the dtype of the network's weights,
                unless it has an Embedding. With a mapping of networks a mapping from sites to any of these; names may
                then be those of latents, whose values are joined in: a Bernoulli as 0 or 1, a category as a one-hot
                vector. In enumeration these values have further dims at the left, so to such a network all dims but
                the last are batch dims; batch norm and, in training mode, Dropout do not fit that.
            edges: Pairs (parent, child) of latents, or "model" for the dependencies that the model has: the child then
                takes as many logits for each joint value of its parents, in the model's order with the last one
                fastest. A chain (`vfe.MarkovChain`) is factorised over time, K logits for each step; with the edge
                from it to itself, or "model", it takes K x K for each step, a row for each state before, and row 0 of
                the first step for the first state.
            create_plates: As for Pyro's guides, plates to use instead of the model's, for subsampling.

        Raises:
            StructureError: The network is no module, or inputs do not fit it.
        """
        super().__init__(model, create_plates=create_plates)
        self._question = Question(network, inputs, edges)
        self.network: nn.Module = registered(network)
        self._signature = signature_of(model)
        self._plans: OrderedDict[object, Plan] = OrderedDict()

    @property
    def latents(self) -> tuple[str, ...]:
        """The sites that it samples, in the model's order; known after its first call."""
        return tuple(next(reversed(self._plans.values())).latents) if self._plans else ()

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Samples every discrete latent and returns the values by site name.

        Args:
            *args: The model's arguments.
            **kwargs: The model's keyword arguments.

        Raises:
            StructureError: The networks do not fit the latents of the model.
            ShapeError: A network cannot read its input, or returns another shape than is wanted.
            NotFiniteError: A network returns NaN or infinity.
        """
        return self._run(self._plan(args, kwargs), args, kwargs, network_for)

    def _run(self, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any], network: Chosen) -> dict[str, Tensor]:
        plates = self._create_plates(*args, **kwargs)  # type: ignore[no-untyped-call]
        given = self.master is not None or self.create_plates is not None
        rows = {name: _rows(plate, plates[name], given) for name, plate in plan.plates.items()}
        inputs = Inputs(self._signature, args, kwargs, plan.latents)
        for step in plan.steps:
            logits = _logits(network(self, step.site), step, inputs, [rows[plate.name] for plate in step.plates])
            for share in step.order:
                latent = share.latent
                fn = partial(share.distribution, logits[latent.name], inputs.values)
                inputs.values[latent.name] = sampled(latent.name, latent.plates, fn, plates, drawn=latent.drawn)
        return {name: inputs.values[name] for name in plan.latents}

    def _plan(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan:
        """The plan for arguments of these shapes; the model is looked at where they are new."""
        key = shape_key((args, kwargs))
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._rehearsed(args, kwargs)
            if len(self._plans) > _MAX_PLANS:
                self._plans.popitem(last=False)
        self._prototype_frames = _frames(plan)
        return plan

    def _rehearsed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan:
        """A plan that has been carried out once, so that a network which does not fit leaves nothing in the store."""
        with undisturbed_randomness(), unchanged_buffers(self.model), pyro.poutine.block(), torch.no_grad():
            plan = plan_of(self._question, latents_of(self.model, args, kwargs))
            self._prototype_frames = _frames(plan)
            self._run(plan, args, kwargs, unregistered)
        self.prototype_trace = pyro.poutine.Trace()
        return plan


def _frames(plan: Plan) -> dict[str, Any]:
    """What Pyro's guides make their plates from."""
    return {name: frame(plate) for name, plate in plan.plates.items()}


def _logits(network: nn.Module, step: Step, inputs: Inputs, rows: Sequence[Rows]) -> dict[str, Tensor]:
    """The output of one network, by site."""

    def present(argument: Tensor) -> Tensor:
        for plate in rows:
            argument = plate.taken(argument)
        return argument

    output = called(network, inputs.read(step.source, network, step.whose, present), step.whose)
    return divided(output, step.shares, rows, inputs.carried(step.source), step.whose)


def _rows(plate: Plate, live: Any, given: bool) -> Rows:
    """A plate of the latents as it is at this call; `given` by the user, or made by Pyro's guide.

    Raises:
        StructureError: Its elements are all there, in another order.
    """
    present, full = int(live.subsample_size), int(live.size)
    indices = torch.as_tensor(live._indices) if given or present != full else None
    if present == full and indices is not None and not torch.equal(indices.cpu(), torch.arange(full, device="cpu")):
        raise StructureError(
            f"The subsample of plate '{plate.name}' is the whole plate in another order: whether row n of a network's "
            "output is of element n, or of the n-th one present, cannot be told from shapes.",
            hint="Leave the subsample out where all elements are present.",
        )
    return Rows(plate.name, plate.dim, present, full, indices)
