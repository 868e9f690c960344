r"""An observed chain of which steps are missing, as what it is: a latent chain, and data that read its states exactly.

    z  ~  MarkovChain ,        x_t  ~  1[ x_t = z_t ]  where the mask holds        log p(x)  =  log sum_z P(z) P(x | z)

A missing step has a state, which its neighbours read. So it is summed out, whatever stands in its place; where nothing
is observed any more the chain ends. The latent is called what Pyro calls the missing part of a site, `x_unobserved`.

`obs_mask=` makes two sites of one: of a chain, two chains that know nothing of each other. Here they are one again.
Where nothing is missing but ends that no site reads, the chain is scored at its data as it stands, which costs less.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.distributions import Categorical
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK, default_process_message
from torch import Tensor

from pyro_vfe.engine.shapes import broadcast_shapes
from pyro_vfe.program.arrays import as_observed
from pyro_vfe.program.log_prob import slim
from pyro_vfe.program.markov_chain import MarkovChain
from pyro_vfe.program.masking import without_mask

OBSERVED, UNOBSERVED = "_observed", "_unobserved"
"""What Pyro appends to the name of a site with `obs_mask=`, for its two parts."""

REVEALS = "_vfe_reveals"
"""The infer key of an observed site whose data are states of a latent chain: the name of the latent."""

_CLOSED = "_vfe_closed"
"""The infer key of an observed chain that is to stay one."""


@dataclass(frozen=True, eq=False)
class _Path:
    """A latent chain that stands for an observed one."""

    chain: MarkovChain
    states: Tensor
    """Its value: what the program is given."""


class Gaps(Messenger):
    """Makes a latent chain of each observed chain that is under a mask, within the handlers around this one."""

    def __init__(
        self,
        *,
        is_whole: Callable[[str], bool],
        is_drawn: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """Args:
        is_whole: Says of a latent by its name whether it goes on after the last step that is observed, as it does
            where a guide has it; what nothing reads, and nobody else speaks of, is masked.
        is_drawn: Whether a guide gives one path of it, and not the values of each step.
        """
        super().__init__()
        self.is_whole = is_whole
        self.is_drawn = is_drawn
        self._paths: dict[str, _Path] = {}

    def _process_message(self, msg: Any) -> None:
        # At every statement: most programs have no such chain, and pay for a look at what is observed under a mask.
        if msg["type"] != "sample":
            return
        masked = msg["mask"] is not None or type(msg["fn"]).__name__ == "MaskedDistribution"
        if self._paths or (masked and msg["is_observed"]):
            self._pyro_sample(msg)

    def _postprocess_message(self, msg: Any) -> None:
        if self._paths and msg["type"] == "sample":
            self._pyro_post_sample(msg)

    def _pyro_sample(self, msg: Any) -> None:
        chain, mask = without_mask(msg["fn"], msg["mask"])
        if isinstance(chain, MarkovChain) and isinstance(mask, Tensor) and msg["is_observed"]:
            if not msg["infer"].get(_CLOSED):
                self._open(msg, chain, slim(mask, 0))  # A mask of the chain's own was repeated with its tables.
            return
        name = msg["name"] + UNOBSERVED if msg["infer"].get("_deterministic") else msg["name"]
        path = self._paths.get(name)
        if path is not None and (name != msg["name"] or _is_same(chain, path.chain)):
            # The second site of the two, and what they are put together to: no site of their own.
            msg["value"], msg["done"], msg["stop"] = path.states, True, True

    def _pyro_post_sample(self, msg: Any) -> None:
        path = self._paths.get(msg["infer"].get(REVEALS, ""))
        if path is not None:
            msg["value"] = path.states

    def _open(self, msg: Any, chain: MarkovChain, mask: Tensor) -> None:
        """Sends the latent to the handlers around this one, and leaves its data in place of the chain."""
        name = msg["name"].removesuffix(OBSERVED) + UNOBSERVED
        begun = {"value": None, "is_observed": False, "done": False, "stop": False, "continuation": None}
        exists = None if self.is_whole(name) else _up_to_the_last(mask, chain.num_steps)
        latent = {**msg, **begun, "name": name, "fn": chain, "mask": exists, "infer": dict(msg["infer"])}
        with self._beyond(latent):
            if self.is_drawn(name):
                data = msg["value"]
                data = data if isinstance(data, Tensor) else as_observed(name, chain, data)
                data = data.to(latent["value"].dtype)
                latent["value"] = torch.where(mask, data, latent["value"])
        states = latent["value"]
        self._paths[name] = _Path(chain, states)
        certain = torch.eye(chain.num_states, dtype=chain.initial.dtype, device=chain.initial.device)[states.long()]
        msg["fn"] = Categorical(certain, validate_args=chain._validate_args)
        msg["mask"], msg["infer"] = mask, {**msg["infer"], REVEALS: name}

    @contextmanager
    def _beyond(self, msg: Any) -> Iterator[None]:
        """Applies the handlers around this one to a message, as Pyro's `apply_stack` does; then it has its value."""
        reached = []
        for handler in reversed(_PYRO_STACK[: _PYRO_STACK.index(self)]):
            reached.append(handler)
            handler._process_message(msg)
            if msg["stop"]:
                break
        default_process_message(msg)
        yield
        for handler in reversed(reached):
            handler._postprocess_message(msg)


def closing(program: Callable[..., Any], is_closed: Callable[[str], bool]) -> Callable[..., Any]:
    """The program with some of its observed chains as they are, whatever is missing.

    Args:
        program: A model.
        is_closed: Says it by the name of the latent that stands for such a chain otherwise. With `obs_mask=` the latent
            has been asked for, and stays.
    """

    def infer(site: Any) -> Any:
        return {_CLOSED: not site["name"].endswith(OBSERVED) and is_closed(site["name"] + UNOBSERVED)}

    return pyro.poutine.infer_config(program, infer)


def has_gaps(mask: Tensor) -> bool:
    """Whether a step is observed after one that is missing.

    Args:
        mask: Where the steps are observed; time is the last dim.
    """
    return bool((mask[..., 1:] & ~mask[..., :-1]).any()) if mask.dim() else False


def _up_to_the_last(mask: Tensor, num_steps: int) -> Tensor:
    """Where a step is observed or one after it is: what comes then is no part of the data."""
    whole = mask.expand(broadcast_shapes(mask.shape, (num_steps,)))
    return whole.long().flip(-1).cumsum(-1).flip(-1) > 0


def _is_same(one: Any, other: MarkovChain) -> bool:
    return isinstance(one, MarkovChain) and one.initial is other.initial and one.transition is other.transition
