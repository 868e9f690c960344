r"""A Markov chain as one distribution, whose last batch dimension is time.

    log p(z)  =  sum_t log p(z_t | z_t-1) ,        log_prob(z)[..., t]  =  log p(z_t | z_t-1)        (t = 0: log p(z_0))

Every quantity per step has the shape of the chain, and sums over time to that of the path: log_prob, the entropy
H(z_t | z_t-1), and KL(p || q). The tables stay as they were given: a plate repeats nothing.

References:
    Rabiner (1989), A tutorial on hidden Markov models and selected applications in speech recognition.
    Cover and Thomas (2006), Elements of information theory, sections 2.5 and 4.2 (chain rules, entropy rate).
"""

from collections.abc import Sequence
from math import prod
from typing import ClassVar, NoReturn

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.kl import register_kl

from pyro_vfe.engine.chains import chain_marginals, chain_mode
from pyro_vfe.engine.shapes import broadcast_shapes
from pyro_vfe.errors import ProbabilityError, ShapeError
from pyro_vfe.program.log_prob import exact_log, slim, widened
from pyro_vfe.program.walks import drawn, walk
from pyro_vfe.program.zeros import log_at_zero

_unwatched = torch._C.DisableTorchFunction
"""A context in which no torch function mode looks on."""


class MarkovChain(TorchDistribution):
    """A chain of states 0 to K - 1; the last batch dimension is time.

    `with pyro.plate("time", T): z = pyro.sample("z", MarkovChain(initial, transition))` draws a chain of shape
    `(..., T)`. The elements along time are not independent, although they lie in a plate: the plate's job here is to
    give the chain its length and to let emissions be written for all steps at once.

    With `obs=` it is observed. Under `poutine.mask`, or with `obs_mask=`, it is observed where the mask is True; the
    other states are summed out, whatever stands there, and have a posterior, as a latent site "z_unobserved".

    >>> initial, transition = torch.tensor([0.5, 0.5]), torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    >>> chain = MarkovChain(initial, transition, num_steps=3)
    >>> chain.log_prob(torch.tensor([0, 0, 1])).exp()
    tensor([0.5000, 0.9000, 0.1000])
    """

    arg_constraints: ClassVar = {"initial": constraints.simplex, "transition": constraints.simplex}
    has_enumerate_support = True

    initial: Tensor
    """Probabilities of the first state, normalised, `(*batch, K)`; repeated by no plate."""

    transition: Tensor
    """Probabilities of the next state (last axis) given the one before, normalised: `(K, K)` or `(*batch, S, K, K)`
    with S either 1 or T - 1; repeated by no plate."""

    def __init__(
        self,
        initial: Tensor,
        transition: Tensor,
        *,
        num_steps: int | None = None,
        validate_args: bool | None = None,
    ) -> None:
        """Args:
            initial: Probabilities of the first state, `(*batch, K)`: no time axis. Normalised along the last axis, as
                Categorical does. Where a latent z outside the time plate chooses among several, its shape ends with the
                time plate's size 1: `table[z.reshape(z.shape[:-1])]`.
            transition: Probabilities of the next state (last axis) given the one before, `(K, K)`, or
                `(*batch, S, K, K)` where the third axis from the right is always time: S = 1 (the same at each step),
                S = T - 1 (entry t leads from step t to t + 1) or, where `num_steps` says T, S = T (entry t leads into
                step t, entry 0 is not read: what `transition[x]` is for another chain x).
            num_steps: The length T. By default S + 1 where S > 1, and else 1, which a plate or `expand` makes any T.
            validate_args: Whether to check the probabilities, and the values that are scored.

        Raises:
            ShapeError: If the shapes do not fit together.
            ProbabilityError: If some probability is negative or not finite, or all in a row are zero.
        """
        _check_tables(initial, transition)
        initial, transition = widened(initial), widened(transition)
        given_steps = transition.shape[-3] if transition.dim() > 2 else 1
        default = given_steps + 1 if given_steps != 1 else 1
        length = default if num_steps is None else num_steps
        _check_length(transition, given_steps, length)
        self._length_is_fixed = num_steps is not None or given_steps != 1
        if given_steps == length > 1:
            transition = transition[..., 1:, :, :]
        # The base class would check the tables once more, at the price of another pass over them.
        validates = self._validate_args if validate_args is None else validate_args
        self.initial = _normalised("initial", slim(initial, 1), check=validates)
        self.transition = _normalised("transition", slim(transition, 2), check=validates)
        batch = _broadcast("the batches of initial and transition", initial.shape[:-1], transition.shape[:-3])
        super().__init__(torch.Size((*batch, length)), validate_args=False)
        self._validate_args = validates

    @property
    def num_states(self) -> int:
        """The number of states K."""
        return self.initial.shape[-1]

    @property
    def num_steps(self) -> int:
        """The length T."""
        return self.batch_shape[-1]

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        """The states 0 to K - 1."""
        return constraints.integer_interval(0, self.num_states - 1)

    def expand(self, batch_shape: Sequence[int], _instance: "MarkovChain | None" = None) -> "MarkovChain":
        """Returns the chain with a larger batch shape; the tables are not repeated.

        Args:
            batch_shape: The shape to expand to. The last size is the number of steps: it may grow from 1 where no
                `num_steps` was given and the transition is the same at each step.

        Raises:
            ShapeError: If the batch shape does not expand to this one.
        """
        new = self._get_checked_instance(MarkovChain, _instance)  # type: ignore[no-untyped-call]
        shape = torch.Size(batch_shape)
        self._check_expandable(shape)
        new.initial, new.transition = self.initial, self.transition
        new._length_is_fixed = self._length_is_fixed
        super(MarkovChain, new).__init__(shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_initial(self) -> Tensor:
        """Returns the log-probabilities of the first state, `(*b, K)`: exact at zero, repeated by no plate."""
        return exact_log(self.initial)

    def log_transition(self) -> Tensor:
        """Returns the log-probabilities of the next state, `(*b, S, K, K)` with S either 1 or T - 1.

        Exact at zero, repeated by no plate; entry t leads from step t to step t + 1.
        """
        return exact_log(self._steps())

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(z_t | z_t-1) in nats for each step, of the shape to which `value` and the chain broadcast.

        Exact at zero: an impossible step is -inf, with gradient zero.

        Args:
            value: States, `(*sample, *batch, T)`. A chain of yet open length takes that of the value.

        Raises:
            ShapeError: If the value has one step and the chain several: a state repeated along time is no path that
                anyone means.
            ValueError: If a value is not a state.
        """
        if self._validate_args:
            self._validate_sample(value)
        return log_at_zero(self.read(value, self.initial, self._steps()))

    def read(self, value: Tensor, first: Tensor, later: Tensor) -> Tensor:
        """Returns the entries of tables along paths, of the shape to which `value` and the chain broadcast.

        Args:
            value: States, `(*sample, *batch, T)`.
            first: A number for each first state, `(*b, K)`.
            later: A number for each transition, `(*b, S, K, K)`.

        Raises:
            ShapeError: If the value has one step and the chain several.
        """
        value = value.long()
        shape = _broadcast("the value and the chain", value.shape, self.batch_shape)
        self._check_steps(value, shape)
        moves = value[..., :-1] * self.num_states + value[..., 1:]
        return _along_time(_entries(first, value[..., 0]), _entries(later.flatten(-2), moves)).expand(shape)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Returns states drawn from the chain, int64 `(*sample_shape, *batch, T)`."""
        shape = torch.Size(sample_shape) + self.batch_shape
        dtype = torch.promote_types(self.initial.dtype, torch.float32)
        levels = torch.rand((self.num_steps, prod(shape[:-1])), dtype=dtype, device=self.initial.device)
        initial = self.initial.to(dtype).expand(*shape[:-1], -1).reshape(levels.shape[1], self.num_states)
        steps = self._steps().to(dtype).movedim(-3, 0)
        rows = _positions(steps.shape[1:-2], steps.device).expand(shape[:-1]).flatten()
        start = drawn(initial, levels[0])
        later = walk(start, steps.reshape(len(steps), prod(steps.shape[1:-2]), *steps.shape[-2:]), rows, levels[1:])
        return torch.cat([start[None], later]).T.reshape(shape)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Returns the states of one step, `(K, *batch, T)`, or `(K, 1, ..., 1)` where not expanded.

        These are not the `K**T` paths: who enumerates a chain sums each step given the one before.
        """
        values = torch.arange(self.num_states, device=self.initial.device)
        values = values.reshape((-1,) + (1,) * len(self.batch_shape))
        return values.expand(-1, *self.batch_shape) if expand else values

    def marginals(self) -> Tensor:
        """Returns the probabilities of the state at each step, `(*batch, T, K)`."""
        return self._marginals().expand(*self.batch_shape, -1)

    def entropy(self) -> Tensor:
        """Returns H(z_t | z_t-1) in nats for each step, of the batch shape; the sum over time is the path's entropy."""
        first, later = _row_entropy(self.initial), _row_entropy(self._steps())
        return _along_time(first, (self._marginals()[..., :-1, :] * later).sum(-1)).expand(self.batch_shape)

    @property
    def mode(self) -> Tensor:
        """The most probable path, int64 of the batch shape; of several, any one."""
        initial, transition, batch = self._flattened(self.log_initial(), self.log_transition())
        rest = initial.new_zeros(()).expand(self.num_steps - 1, *initial.shape)
        path = chain_mode(torch.cat([initial[None], rest]), transition)
        return path.T.reshape(*batch, self.num_steps).expand(self.batch_shape)

    def _marginals(self) -> Tensor:
        """Returns the marginals, `(*b, T, K)`, repeated by no plate."""
        initial, transition, batch = self._flattened(self.initial, self._steps())
        marginals = chain_marginals(initial, transition, self.num_steps).movedim(0, 1)
        # Rows sum to 1 but for rounding, which over a million steps of float32 amounts to some per cent.
        return (marginals / marginals.sum(-1, keepdim=True)).reshape(*batch, self.num_steps, self.num_states)

    def _flattened(self, initial: Tensor, transition: Tensor) -> tuple[Tensor, Tensor, torch.Size]:
        """Returns tables with their batch as one axis, `(N, K)` and `(S, N or 1, K, K)`, and the batch."""
        table = transition.shape[-2:]
        batch = broadcast_shapes(initial.shape[:-1], transition.shape[:-3])
        if prod(transition.shape[:-3]) != 1:
            transition = transition.expand(*batch, -1, -1, -1)
        transition = transition.movedim(-3, 0)
        transition = transition.reshape(len(transition), prod(transition.shape[1:-2]), *table)
        return initial.expand(*batch, -1).reshape(prod(batch), table[-1]), transition, batch

    def _steps(self) -> Tensor:
        """Returns the transition with its time axis, `(*b, S, K, K)`."""
        return self.transition if self.transition.dim() > 2 else self.transition[None]

    def _check_expandable(self, shape: torch.Size) -> None:
        old = self.batch_shape
        if len(shape) < len(old) or any(a not in (1, b) for a, b in zip(old[-2::-1], shape[-2::-1], strict=False)):
            raise ShapeError(
                f"A MarkovChain of batch shape {tuple(old)} does not expand to {tuple(shape)}.",
                hint="Sizes can grow from 1 only; the last one is the number of steps.",
            )
        if shape[-1] != old[-1] and (self._length_is_fixed or old[-1] != 1):
            raise ShapeError(
                f"A MarkovChain of {old[-1]} steps does not expand to {shape[-1]} steps.",
                hint="The last batch dimension is time. Only a transition that is the same at each step, (K, K) or "
                "(*batch, 1, K, K), given without num_steps, fits any number; where entry t of the transition leads "
                "into step t, pass num_steps.",
            )

    def _check_steps(self, value: Tensor, shape: torch.Size) -> None:
        steps = value.shape[-1] if value.dim() else 1
        if steps != shape[-1]:
            raise ShapeError(
                f"The value has one step, shape {tuple(value.shape)}, and the MarkovChain has {shape[-1]}: to repeat "
                "one state along time would score constant paths.",
                hint="Give a whole path. If this comes from Pyro's own enumeration (TraceEnum_ELBO), which takes the "
                "steps for independent, use pyro_vfe's FreeEnergy or posterior.",
            )
        if steps != self.num_steps:
            self._check_expandable(shape)


def _check_tables(initial: Tensor, transition: Tensor) -> None:
    if initial.dim() < 1 or transition.dim() < 2 or transition.shape[-2:] != (initial.shape[-1],) * 2:
        raise ShapeError(
            f"MarkovChain got initial of shape {tuple(initial.shape)} and transition of shape "
            f"{tuple(transition.shape)}.",
            hint="With K states they are (*batch, K), and (K, K) or (*batch, S, K, K).",
        )
    if initial.shape[-1] == 0:
        raise ShapeError("MarkovChain got tables of no states.", hint="A chain has at least one state.")


def _check_length(transition: Tensor, given_steps: int, length: int) -> None:
    if length < 1:
        raise ShapeError(f"MarkovChain got num_steps={length}.", hint="A chain has at least one step.")
    if given_steps in (1, length - 1, length):
        return
    as_batch = " If it is a batch of transitions, insert a time dimension: transition[:, None]."
    raise ShapeError(
        f"MarkovChain got a transition of shape {tuple(transition.shape)}, with {given_steps} entries along time, and "
        f"num_steps={length}.",
        hint=f"The third axis from the right is time; it has 1, {length - 1} or {length} entries here."
        + (as_batch if transition.dim() == 3 else ""),
    )


def _broadcast(what: str, *shapes: torch.Size) -> torch.Size:
    try:
        return broadcast_shapes(*shapes)
    except RuntimeError:
        raise ShapeError(
            f"MarkovChain: {what} do not broadcast, {' and '.join(str(tuple(shape)) for shape in shapes)}.",
            hint="Aligned from the right, sizes are equal or 1. The last batch dimension is time, and the third axis "
            "from the right of a transition; a batch of transitions is transition[:, None].",
        ) from None


def _normalised(name: str, probs: Tensor, *, check: bool) -> Tensor:
    total = probs.sum(-1, keepdim=True)
    if check and probs.numel() and not _holds((probs.amin() >= 0) & (total > 0).all() & (total < torch.inf).all()):
        _refuse_probs(name, probs, total.squeeze(-1))
    return probs / total


def _refuse_probs(name: str, probs: Tensor, total: Tensor) -> NoReturn:
    with _unwatched():
        wrong = ~((probs >= 0).all(-1) & (total > 0) & (total < torch.inf))
        row = tuple(wrong.nonzero()[0].tolist())
        values = probs[row].tolist()
    raise ProbabilityError(
        f"MarkovChain got probabilities of {name}, shape {tuple(probs.shape)}, of which row {row} is {values}.",
        hint="Along the last axis they are finite, not negative and not all zero; logits.softmax(-1) is.",
    )


def _holds(condition: Tensor) -> bool:
    """Whether a condition holds, asked so that a program which is enumerated does not count as branching on it."""
    with _unwatched():
        return bool(condition)


def _positions(shape: torch.Size, device: torch.device) -> Tensor:
    """Returns the positions that the entries of a tensor of this shape have when it is flattened."""
    return torch.arange(prod(shape), device=device).reshape(shape)


def _entries(table: Tensor, index: Tensor) -> Tensor:
    """Returns `table[..., index]`, where the batch dimensions of table and index broadcast.

    The gradient is of the table's size: a gather along the last axis would fill that of all repetitions.
    """
    positions = _positions(table.shape[:-1], table.device) * table.shape[-1] + index
    return table.flatten().gather(0, positions.flatten()).reshape(positions.shape)


def _along_time(first: Tensor, later: Tensor) -> Tensor:
    """Returns the terms of all steps, `(*b, T)`, of those of the first, `(*b)`, and of the others, `(*b, T - 1)`."""
    batch = broadcast_shapes(first.shape, later.shape[:-1])
    return torch.cat([first.expand(batch)[..., None], later.expand(*batch, -1)], -1)


def _row_entropy(probs: Tensor) -> Tensor:
    return -(probs * log_at_zero(probs, 0.0)).sum(-1)


@register_kl(MarkovChain, MarkovChain)
def _kl_markov_chains(p: MarkovChain, q: MarkovChain) -> Tensor:
    """Returns the KL divergence in nats, one term per step, of the batch shape; the sum over time is that of the paths.

    KL(p || q)_t  =  E_p [ log p(z_t | z_t-1) - log q(z_t | z_t-1) ] ;  inf where p goes and q cannot.
    """
    if p.num_states != q.num_states:
        raise ShapeError(
            f"The KL divergence is of two MarkovChains with {p.num_states} and {q.num_states} states.",
            hint="Both are over the same states; give those that one chain never visits probability 0.",
        )
    shape = _broadcast("two chains", p.batch_shape, q.batch_shape)
    p, q = p.expand(shape), q.expand(shape)
    before = p._marginals()[..., :-1, :]
    first, first_impossible = _row_divergence(p.initial, q.initial)
    later, later_impossible = _row_divergence(p._steps(), q._steps())
    expected = (before * later).sum(-1)
    if _holds(later_impossible.any()):
        expected = expected.masked_fill((later_impossible & _reachable(p)).any(-1), torch.inf)
    return _along_time(first.masked_fill(first_impossible, torch.inf), expected).expand(shape)


def _reachable(chain: MarkovChain) -> Tensor:
    """Returns which states each step but the last can be in, `(*b, T - 1, K)`; the marginals may underflow to zero."""
    moves = chain._steps() > 0
    batch = broadcast_shapes(chain.initial.shape[:-1], moves.shape[:-3])
    reached = [(chain.initial > 0).expand(*batch, -1)]
    for t in range(chain.num_steps - 2):
        move = moves[..., t if moves.shape[-3] > 1 else 0, :, :]
        reached.append((reached[-1][..., None] & move).any(-2))
    return torch.stack(reached, -2)[..., : chain.num_steps - 1, :]


def _row_divergence(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Returns each row's KL divergence over what q can do, and whether p does what q cannot, both `(*batch,)`."""
    return (p * (log_at_zero(p, 0.0) - log_at_zero(q, 0.0))).sum(-1), ((p > 0) & (q == 0)).any(-1)
