"""Steps of wake-sleep on a Helmholtz machine: `vfe.WakeSleep`, and the two backward passes that a step consists of.

wake:   descend  -log P(v, u)  at v drawn from Q, or summed over Q
sleep:  descend  -log Q(v | u)  at a dream (v, u)

All draw in the same order, so that the same seed leads all to the same parameters. The first step, which is not timed,
has our analysis and spot check, and the optimisers' making of their state.
"""

from collections.abc import Callable
from functools import partial
from itertools import product

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from worker import Prepared
from workloads import HelmholtzWorkload, helmholtz, norms

import pyro_vfe as vfe

LEARNING_RATE = 0.01

Step = Callable[[], object]
Machine = tuple[nn.Module, nn.Module]


def linear(weight: np.ndarray, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    """Returns a layer with these weights, and biases of zero."""
    layer = kind(weight.shape[1], weight.shape[0], dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.zero_()
    return layer


class Generative(PyroModule):
    """Top, middle and pixels, each drawn given the one above."""

    def __init__(self, workload: HelmholtzWorkload) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(workload.top))
        kind = PyroModule[nn.Linear]
        self.to_middle, self.to_pixels = (linear(weight, kind) for weight in workload.generative)

    def forward(self, pixels: Tensor, drawn: bool) -> None:
        """Says how pixels come about."""
        infer = {"enumerate": None} if drawn else {}
        with pyro.plate("data", len(pixels)):
            top = pyro.sample("top", dist.Bernoulli(logits=self.bias).to_event(1), infer=infer)
            middle = pyro.sample("middle", dist.Bernoulli(logits=self.to_middle(top)).to_event(1), infer=infer)
            pyro.sample("pixels", dist.Bernoulli(logits=self.to_pixels(middle)).to_event(1), obs=pixels)


class Recognition(PyroModule):
    """Middle and top, guessed from the pixels."""

    def __init__(self, workload: HelmholtzWorkload) -> None:
        super().__init__()
        kind = PyroModule[nn.Linear]
        self.from_pixels, self.from_middle = (linear(weight, kind) for weight in workload.recognition)

    def forward(self, pixels: Tensor, drawn: bool) -> None:
        """Guesses what is behind the pixels."""
        infer = {"enumerate": None} if drawn else {}
        with pyro.plate("data", len(pixels)):
            middle = pyro.sample("middle", dist.Bernoulli(logits=self.from_pixels(pixels)).to_event(1), infer=infer)
            pyro.sample("top", dist.Bernoulli(logits=self.from_middle(middle)).to_event(1), infer=infer)


class GenerativeLayers(nn.Module):
    """The parameters of `Generative` without Pyro."""

    def __init__(self, workload: HelmholtzWorkload) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(workload.top))
        self.to_middle, self.to_pixels = (linear(weight) for weight in workload.generative)


class RecognitionLayers(nn.Module):
    """The parameters of `Recognition` without Pyro."""

    def __init__(self, workload: HelmholtzWorkload) -> None:
        super().__init__()
        self.from_pixels, self.from_middle = (linear(weight) for weight in workload.recognition)


def ours(size: int, drawn: bool, steps: int) -> Prepared:
    """`vfe.WakeSleep.step`, with hidden units drawn in the wake phase, or summed over."""

    def make(workload: HelmholtzWorkload, pixels: Tensor) -> tuple[Step, Machine]:
        machine = Generative(workload), Recognition(workload)
        optims = (pyro.optim.Adam({"lr": LEARNING_RATE}) for _ in machine)
        return partial(vfe.WakeSleep(*machine, *optims).step, pixels, drawn), machine

    return prepared(make, size, steps)


def pyros(size: int, drawn: bool, steps: int) -> Prepared:
    """Traces of Pyro, and its optimisers; with drawn hidden units alone."""
    assert drawn

    def make(workload: HelmholtzWorkload, pixels: Tensor) -> tuple[Step, Machine]:
        machine = Generative(workload), Recognition(workload)
        optims = tuple(pyro.optim.Adam({"lr": LEARNING_RATE}) for _ in machine)
        return partial(step_by_traces, machine, optims, pixels), machine

    return prepared(make, size, steps)


def by_hand(size: int, drawn: bool, steps: int) -> Prepared:
    """The same in torch."""

    tables = states(8), states(12)
    wake = wake_loss if drawn else partial(summed_wake_loss, tables=tables)

    def make(workload: HelmholtzWorkload, pixels: Tensor) -> tuple[Step, Machine]:
        machine = GenerativeLayers(workload), RecognitionLayers(workload)
        optims = tuple(torch.optim.Adam(one.parameters(), LEARNING_RATE) for one in machine)
        return partial(step_by_hand, machine, optims, pixels, wake), machine

    return prepared(make, size, steps)


def prepared(make: Callable[[HelmholtzWorkload, Tensor], tuple[Step, Machine]], size: int, steps: int) -> Prepared:
    """Returns some steps as one call, from the same parameters and seed for all."""
    workload = helmholtz(size)
    pixels = torch.tensor(workload.data)

    def begin() -> tuple[Step, Machine]:
        pyro.clear_param_store()
        step, machine = make(workload, pixels)
        pyro.set_rng_seed(0)
        step()
        return step, machine

    def call(begun: tuple[Step, Machine]) -> Machine:
        step, machine = begun
        for _ in range(steps):
            step()
        return machine

    return Prepared(call, parameter_norms, before=begin)


def parameter_norms(machine: Machine) -> dict[str, float]:
    """Returns numbers that differ where parameters do."""
    return norms(
        {
            f"{which} {name}": parameter.detach().numpy()
            for which, one in zip(("generative", "recognition"), machine, strict=True)
            for name, parameter in one.named_parameters()
        }
    )


def step_by_traces(machine: Machine, optims: tuple[pyro.optim.PyroOptim, ...], pixels: Tensor) -> None:
    """Does one step with Pyro's traces."""
    generative, recognition = machine
    with torch.no_grad():
        guess = poutine.trace(recognition).get_trace(pixels, True)
    awake = poutine.trace(poutine.replay(generative, trace=guess)).get_trace(pixels, True)
    (-awake.log_prob_sum()).backward()
    update(generative, optims[0])
    with torch.no_grad():
        dream = poutine.trace(poutine.uncondition(generative)).get_trace(pixels, True)
    dreamt = dream.nodes["pixels"]["value"]
    asleep = poutine.trace(poutine.replay(recognition, trace=dream)).get_trace(dreamt, True)
    (-asleep.log_prob_sum()).backward()
    update(recognition, optims[1])


def update(module: nn.Module, optim: pyro.optim.PyroOptim) -> None:
    """Steps one of Pyro's optimisers, and forgets the gradients."""
    optim(list(module.parameters()))
    pyro.infer.util.zero_grads(module.parameters())


def step_by_hand(
    machine: tuple[GenerativeLayers, RecognitionLayers],
    optims: tuple[torch.optim.Optimizer, ...],
    pixels: Tensor,
    wake: Callable[[GenerativeLayers, RecognitionLayers, Tensor], Tensor],
) -> None:
    """Does one step in torch."""
    generative, recognition = machine
    optims[0].zero_grad()
    wake(generative, recognition, pixels).backward()
    optims[0].step()
    optims[1].zero_grad()
    sleep_loss(generative, recognition, len(pixels)).backward()
    optims[1].step()


def wake_loss(generative: GenerativeLayers, recognition: RecognitionLayers, pixels: Tensor) -> Tensor:
    """Returns -log P(v, u) at hidden units drawn from the recognition model."""
    with torch.no_grad():
        middle = torch.bernoulli(recognition.from_pixels(pixels).sigmoid())
        top = torch.bernoulli(recognition.from_middle(middle).sigmoid())
    loss = cost(generative.bias.expand_as(top), top) + cost(generative.to_middle(top), middle)
    return loss + cost(generative.to_pixels(middle), pixels)


def sleep_loss(generative: GenerativeLayers, recognition: RecognitionLayers, size: int) -> Tensor:
    """Returns -log Q(v | u) of dreams."""
    with torch.no_grad():
        top = torch.bernoulli(generative.bias.sigmoid().expand(size, -1))
        middle = torch.bernoulli(generative.to_middle(top).sigmoid())
        pixels = torch.bernoulli(generative.to_pixels(middle).sigmoid())
    return cost(recognition.from_pixels(pixels), middle) + cost(recognition.from_middle(middle), top)


def cost(logits: Tensor, values: Tensor) -> Tensor:
    """Returns -log P of binary values, summed over all of them."""
    return binary_cross_entropy_with_logits(logits, values, reduction="sum")


def summed_wake_loss(
    generative: GenerativeLayers, recognition: RecognitionLayers, pixels: Tensor, tables: tuple[Tensor, Tensor]
) -> Tensor:
    """Returns E_Q[-log P(v, u)], summed over all values of both layers.

    Args:
        generative: The generative model.
        recognition: The recognition model.
        pixels: Shape (N, 64).
        tables: All values of the top layer, shape (256, 8), and of the middle one, shape (4096, 12).
    """
    tops, middles = tables
    with torch.no_grad():
        q_middle = log_table(recognition.from_pixels(pixels), middles).exp()
        q_top = log_table(recognition.from_middle(middles), tops).exp()
    log_hidden = log_table(generative.to_middle(tops), middles).T + log_table(generative.bias, tops)
    log_pixels = log_table(generative.to_pixels(middles), pixels).T
    hidden = q_middle.sum(0) @ (q_top * log_hidden).sum(-1)
    return -hidden - (q_middle * log_pixels).sum()


def log_table(logits: Tensor, values: Tensor) -> Tensor:
    """Returns log P of each row of values under each row of logits; shape (rows of logits, rows of values)."""
    off = -nn.functional.softplus(logits).sum(-1, keepdim=logits.dim() > 1)
    return logits @ values.T + off


def states(units: int) -> Tensor:
    """Returns all values of a layer, shape (2 ** units, units)."""
    return torch.tensor(list(product((0.0, 1.0), repeat=units)), dtype=torch.float64)
