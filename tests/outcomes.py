"""Every outcome of what a computation draws, with its probability: expectations without Monte Carlo.

E[ f ]  =  sum over outcomes of  P(outcome) f(outcome)

torch's generators are replaced by a script of choices, and the script is stepped through the tree of all of them. Draws
of a standard normal become +1 or -1, each with probability 1/2: what is linear in the noise's distribution, as a
pathwise gradient is, stays true of these two points.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import permutations
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor

T = TypeVar("T")

MAX_OUTCOMES = 3_000

_fork_rng = torch.random.fork_rng


class _Script:
    """The choices of one run, and what else each of them could have been."""

    def __init__(self, choices: list[int]) -> None:
        self.choices = choices
        self.probabilities: list[list[float]] = []
        self._num_given = len(choices)

    def choose(self, probabilities: list[float]) -> int:
        """The index of one of some values of these probabilities."""
        possible = [n for n, prob in enumerate(probabilities) if prob > 0]
        if len(possible) == 1:
            return possible[0]
        position = len(self.probabilities)
        if position == len(self.choices):
            self.choices.append(0)
        self.probabilities.append([probabilities[n] for n in possible])
        return possible[min(self.choices[position], len(possible) - 1)]  # What is taken back may have fewer.

    @contextmanager
    def fork_rng(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Stands in for torch.random.fork_rng, whose draws are taken back: they are none of the outcome's."""
        position = len(self.probabilities)
        with _fork_rng(*args, **kwargs):
            yield
        del self.probabilities[position:], self.choices[max(position, self._num_given) :]

    @property
    def probability(self) -> float:
        """The probability of all choices together."""
        return math.prod(own[choice] for own, choice in zip(self.probabilities, self.choices, strict=True))

    def following(self) -> list[int] | None:
        """The choices of the next run; None after the last."""
        for position in reversed(range(len(self.choices))):
            if self.choices[position] + 1 < len(self.probabilities[position]):
                return [*self.choices[:position], self.choices[position] + 1]
        return None

    def bernoulli(self, probs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Stands in for torch.bernoulli."""
        with torch._C.DisableTorchFunction():
            chosen = [self.choose([1 - prob, prob]) for prob in probs.detach().reshape(-1).tolist()]
            values = torch.tensor(chosen, dtype=probs.dtype).reshape(probs.shape)
        return values + 0.0 * probs  # computed from what torch's own is computed from

    def multinomial(self, probs: Tensor, num_samples: int, *args: Any, **kwargs: Any) -> Tensor:
        """Stands in for torch.multinomial."""
        assert num_samples == 1
        with torch._C.DisableTorchFunction():
            chosen = [[self.choose(row)] for row in probs.detach().tolist()]
        return torch.tensor(chosen) + (0.0 * probs[:, :1]).long()

    def randperm(self, size: int, *args: Any, **kwargs: Any) -> Tensor:
        """Stands in for torch.randperm, by which a plate draws its subsample."""
        orders = list(permutations(range(size)))
        return torch.tensor(orders[self.choose([1 / len(orders)] * len(orders))])

    def standard_normal(self, shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Stands in for what Normal.rsample draws its noise by."""
        with torch._C.DisableTorchFunction():
            chosen = [2.0 * self.choose([0.5, 0.5]) - 1 for _ in range(math.prod(shape))]
            return torch.tensor(chosen, dtype=dtype).reshape(shape)


def outcomes(function: Callable[[], T]) -> Iterator[tuple[float, T]]:
    """Yields what the function returns for each outcome of its draws, after the outcome's probability."""
    choices: list[int] | None = []
    count = 0
    while choices is not None:
        script = _Script(choices)
        with (
            mock.patch.object(torch, "bernoulli", script.bernoulli),
            mock.patch.object(torch, "multinomial", script.multinomial),
            mock.patch.object(torch, "randperm", script.randperm),
            mock.patch.object(torch.random, "fork_rng", script.fork_rng),
            mock.patch.object(torch.distributions.normal, "_standard_normal", script.standard_normal),
        ):
            result = function()
        yield script.probability, result
        choices = script.following()
        count += 1
        if count > MAX_OUTCOMES:
            raise ValueError(f"more than {MAX_OUTCOMES} outcomes: give this a smaller program")
