r"""
Handwritten digits: a Helmholtz machine, learned in three ways
==============================================================

Two layers of hidden units explain 8 x 8 pictures of digits, and a recognition network guesses the units from the
pixels. The two are trained by wake-sleep, by reweighted wake-sleep and by descent on *F* itself, from the same start and
on the same mini-batches:

.. math::

    P(v, u) &= \prod_n P(\text{top}_n) \, P(\text{middle}_n \mid \text{top}_n) \, P(u_n \mid \text{middle}_n)

    Q(v \mid u) &= \prod_n Q(\text{middle}_n \mid u_n) \, Q(\text{top}_n \mid \text{middle}_n)

All units are binary: 8 at the top, 12 in the middle, 64 pixels; given the layer that it reads, each unit is a logistic
regression of its own. A digit has :math:`2^{20}` explanations. They are summed exactly, layer by layer, so that *F* of
each digit is known, and how much of it is surprise, the generative model's share, and how much gap, the recognition
model's.

What each of the three descends:

.. math::

    \text{wake-sleep} \quad & \mathbb{E}_{Q(v|u)} [ - \log P(v, u) ] \text{ in } P, \qquad
    \mathbb{E}_{P(v,u)} [ - \log Q(v \mid u) ] \text{ in } Q

    \text{descent on F} \quad & \mathbb{E}_{Q(v|u)} [ \log Q(v \mid u) - \log P(v, u) ] \text{ in both}

Reweighted wake-sleep is wake-sleep with several draws from *Q* for each digit, weighed by how well they explain it; in
the wake phase *Q* learns from them as well. Wake-sleep and its reweighted form draw the hidden units, as they do where
there are too many to be summed; a step of theirs takes a small part of the time that one with exact gradients takes.

References:

- Hinton, Dayan, Frey and Neal (1995), The "wake-sleep" algorithm for unsupervised neural networks.
- Dayan, Hinton, Neal and Zemel (1995), The Helmholtz machine.
- Bornschein and Bengio (2015), Reweighted wake-sleep.
- Alpaydin and Kaynak (1998), Cascading classifiers, Kybernetika 34: the digits, as scikit-learn has them.
"""

import argparse
import copy
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pyro import poutine
from pyro.nn import PyroModule
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pyro_vfe as vfe

NUM_TOP, NUM_MIDDLE, NUM_PIXELS, SIDE = 8, 12, 64, 8
DARKEST = 16
"""Pixels are 0 to 16; one that is half as dark, or more, is on."""
NUM_TRAINED = 1200
"""So many of the 1,797 digits are learned from; the others are held out."""
BATCH, NUM_STEPS, LONGER = 100, 480, 10
"""Steps of each, and by how many times more wake-sleep does when it is given time."""
RATE, NUM_DRAWS = 0.03, 10
"""Adam's learning rate, and the draws that reweighted wake-sleep weighs."""
NUM_READINGS = 12
SLEEP_RATE, PHASES_OF_SLEEP = 0.01, (0, 5, 10, 20, 40, 80, 160)
"""Of sleep alone; after so many phases it is looked at."""
NUM_CHECKED = 20
"""So many digits' F is also computed by hand."""
GRID = (6, 8)
"""Rows and columns of digits in a picture."""
ENOUGH = 1e12
"""Bytes that tables may be thought to take; those that are really made stay far below."""
COLORS = ("#e69f00", "#56b4e9", "#009e73", "#0b3c5d")

# %%
# The digits, and the machine
# ---------------------------
# Each layer is one site, a vector of Bernoullis. With `drawn` its units are drawn, and otherwise summed over: that
# is how one pair of programs serves for training by draws and for exact numbers.


@dataclass(frozen=True, eq=False)
class Digits:
    """Binary pixels, shape `(N, 64)`, and labels, shape `(N,)`."""

    trained: Tensor
    held_out: Tensor
    held_out_labels: np.ndarray

    @property
    def batches(self) -> list[Tensor]:
        """The digits that are learned from, in mini-batches."""
        return list(self.trained.split(BATCH))


def binary_digits() -> Digits:
    """Returns scikit-learn's digits, shuffled and split; the same split each time."""
    data = load_digits()
    order = torch.randperm(len(data.data), generator=torch.Generator().manual_seed(0)).numpy()
    pixels = torch.tensor(2 * data.data[order] >= DARKEST).to(torch.get_default_dtype())
    return Digits(pixels[:NUM_TRAINED], pixels[NUM_TRAINED:], data.target[order][NUM_TRAINED:])


class Generative(PyroModule):
    """The generative model: from the top down."""

    def __init__(self, pixels: Tensor) -> None:
        """Args:
        pixels: Digits; each pixel is at first as often on as in these.
        """
        super().__init__()
        self.to_top = nn.Parameter(torch.zeros(NUM_TOP))
        self.to_middle = PyroModule[nn.Linear](NUM_TOP, NUM_MIDDLE)
        self.to_pixels = PyroModule[nn.Linear](NUM_MIDDLE, NUM_PIXELS)
        with torch.no_grad():
            self.to_pixels.bias.copy_(((pixels.sum(0) + 1) / (len(pixels) + 2)).logit())

    def forward(self, pixels: Tensor, drawn: bool = False) -> None:
        """Says how digits come about."""
        infer = how(drawn)
        with pyro.plate("digits", len(pixels)):
            top = pyro.sample("top", dist.Bernoulli(logits=self.to_top).to_event(1), infer=infer)
            middle = pyro.sample("middle", dist.Bernoulli(logits=self.to_middle(top)).to_event(1), infer=infer)
            pyro.sample("pixels", dist.Bernoulli(logits=self.to_pixels(middle)).to_event(1), obs=pixels)


class Recognition(PyroModule):
    """The recognition model: from the pixels up."""

    def __init__(self) -> None:
        super().__init__()
        self.from_pixels = PyroModule[nn.Linear](NUM_PIXELS, NUM_MIDDLE)
        self.from_middle = PyroModule[nn.Linear](NUM_MIDDLE, NUM_TOP)

    def forward(self, pixels: Tensor, drawn: bool = False) -> None:
        """Guesses the hidden units behind digits."""
        infer = how(drawn)
        with pyro.plate("digits", len(pixels)):
            middle = pyro.sample("middle", dist.Bernoulli(logits=self.from_pixels(pixels)).to_event(1), infer=infer)
            pyro.sample("top", dist.Bernoulli(logits=self.from_middle(middle)).to_event(1), infer=infer)


def how(drawn: bool) -> dict[str, None]:
    """Returns what a site is told: to be drawn, or nothing, and then it is summed over."""
    return {"enumerate": None} if drawn else {}


@dataclass(frozen=True, eq=False)
class Machine:
    """A generative model and its recognition model."""

    generative: Generative
    recognition: Recognition

    def decompose(self, pixels: Tensor) -> vfe.Decomposition:
        """Returns F of digits taken apart, exactly."""
        return vfe.FreeEnergy(max_bytes=ENOUGH).decompose(self.generative, self.recognition, pixels)


def start(digits: Digits) -> Machine:
    """Returns the machine that all ways of learning start from."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    return Machine(Generative(digits.trained), Recognition())


# %%
# Three ways to learn
# -------------------
# Every row of a history is exact, and of the held-out digits, also where training draws: their arguments do not say
# `drawn`. `WakeSleep` notes where *F* stands after each phase.


@dataclass(frozen=True, eq=False)
class Learned:
    """A machine, how it was trained, and what it costs."""

    name: str
    num_steps: int
    machine: Machine
    history: vfe.History
    """F of the held-out digits."""
    trained: vfe.Decomposition = field(init=False)
    held_out: vfe.Decomposition = field(init=False)

    def look(self, digits: Digits) -> "Learned":
        """Takes F apart, now that the machine is trained."""
        object.__setattr__(self, "trained", self.machine.decompose(digits.trained))
        object.__setattr__(self, "held_out", self.machine.decompose(digits.held_out))
        return self


def by_wake_sleep(name: str, digits: Digits, num_steps: int, reweighted: bool = False) -> Learned:
    """Returns a machine trained by wake-sleep on drawn hidden units."""
    machine = start(digits)
    wake_sleep = vfe.WakeSleep(
        machine.generative,
        machine.recognition,
        pyro.optim.Adam({"lr": RATE}),
        pyro.optim.Adam({"lr": RATE}),
        num_particles=NUM_DRAWS if reweighted else 1,
        reweighted=reweighted,
        max_bytes=ENOUGH,
    )
    run = wake_sleep.run(
        num_steps=num_steps,
        batches=[(pixels, True) for pixels in digits.batches],
        every=max(1, num_steps // NUM_READINGS),
        held_out=(digits.held_out,),
        progress_bar=False,
    )
    return Learned(name, num_steps, machine, run.history).look(digits)


def by_descent(name: str, digits: Digits, num_steps: int) -> Learned:
    """Returns a machine trained by descent on F with exact gradients."""
    machine = start(digits)
    elbo = vfe.FreeEnergy(max_bytes=ENOUGH)
    programs = machine.generative, machine.recognition
    monitor = vfe.Monitor(
        *programs, every=max(1, num_steps // NUM_READINGS), held_out=(digits.held_out,), elbo=elbo, progress_bar=False
    )
    run = vfe.fit(
        *programs,
        optim=pyro.optim.Adam({"lr": RATE}),
        num_steps=num_steps,
        elbo=elbo,
        batches=digits.batches,
        monitor=monitor,
        progress_bar=False,
    )
    return Learned(name, num_steps, machine, run.history).look(digits)


# %%
# What sleep does to F
# --------------------
# The sleep phase descends another divergence than *F* has in it, :math:`\mathrm{KL}(P \Vert Q)` in place of
# :math:`\mathrm{KL}(Q \Vert P)`, and averages it over dreams in place of digits. To see it alone, take the machine that
# descent on *F* has made, hold the generative model, and let the recognition model sleep: it learns from dreams until it
# knows them better, and knows the digits worse.


@dataclass(frozen=True)
class Asleep:
    """A recognition model after some phases of sleep, in nats per digit or dream."""

    num_phases: int
    gap: float
    """KL(Q || P(v|u)) of the held-out digits."""
    divergence: float
    """KL(P(v|u) || Q) of dreams: the mean over as many dreams, each with the hidden units that made it."""


def sleep_alone(machine: Machine, digits: Digits, phases: Iterable[int]) -> list[Asleep]:
    """Returns how a recognition model fares that learns by nothing but sleep, from where it is."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    asleep = copy.deepcopy(machine)
    programs = asleep.generative, asleep.recognition
    wake_sleep = vfe.WakeSleep(*programs, pyro.optim.Adam({"lr": 0.0}), pyro.optim.Adam({"lr": SLEEP_RATE}))
    dream = vfe.dream(asleep.generative, digits.held_out)
    dreamt = asleep.decompose(*dream.args)
    log_posterior = log_prob(asleep.generative, dream) + float(dreamt.surprise)
    readings, done = [], 0
    for num_phases in phases:
        for _ in range(num_phases - done):
            wake_sleep.sleep(digits.trained, True)
        done = num_phases
        divergence = log_posterior - log_prob(asleep.recognition, dream)
        gap = float(asleep.decompose(digits.held_out).gap)
        readings.append(Asleep(num_phases, gap / len(digits.held_out), divergence / len(digits.held_out)))
    return readings


def log_prob(program: Generative | Recognition, dream: vfe.Dream) -> float:
    """Returns the log-probability of a dream under either program, nats."""
    dreamt = poutine.condition(program, data=dream.latents)
    with torch.no_grad():
        return float(poutine.trace(dreamt).get_trace(*dream.args).log_prob_sum())


def rises(history: vfe.History) -> tuple[int, int]:
    """Returns after how many of the sleep phases that were looked at F was higher than before, and of how many."""
    changes = [
        after.free_energy - before.free_energy
        for before, after in zip(history.rows, history.rows[1:], strict=False)
        if (before.phase, after.phase) == ("wake", "sleep") and before.iteration == after.iteration
    ]
    return sum(change > 0 for change in changes), len(changes)


# %%
# F by hand
# ---------
# The same numbers by the formulas of the layers, with all values of both of them written out.


def by_hand(machine: Machine, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns F and surprise of each digit, nats: sums over 256 values of the top layer and 4,096 of the middle one."""
    values = {name: p.detach().numpy() for one in (machine.generative, machine.recognition) for name, p in named(one)}
    tops, middles = (np.array(list(product((0.0, 1.0), repeat=units))) for units in (NUM_TOP, NUM_MIDDLE))

    def log_table(reads: np.ndarray, layer: str, given: np.ndarray) -> np.ndarray:
        logits = given @ values[f"{layer}.weight"].T + values[f"{layer}.bias"]
        return logits @ reads.T - np.logaddexp(0, logits).sum(-1, keepdims=True)

    log_top = tops @ values["to_top"] - np.logaddexp(0, values["to_top"]).sum()
    log_hidden = log_table(middles, "to_middle", tops).T + log_top
    log_pixels = log_table(pixels, "to_pixels", middles).T
    surprise = -np.logaddexp.reduce(log_pixels + np.logaddexp.reduce(log_hidden, 1), 1)
    log_q_middle, log_q_top = log_table(middles, "from_pixels", pixels), log_table(tops, "from_middle", middles)
    of_middle = (np.exp(log_q_top) * (log_q_top - log_hidden)).sum(1)
    return (np.exp(log_q_middle) * (log_q_middle - log_pixels + of_middle)).sum(1), surprise


def named(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Returns a program's parameters by name."""
    return module.named_parameters()


# %%
# What each costs
# ---------------
# How much of *F* is the recognition model's? The table says it in two ways: the gap as a share of *F*, and as a share of
# gap + complexity. Most of *F* here is the price of 64 noisy pixels whatever the hidden units are. Complexity,
# :math:`\mathrm{KL}(Q \Vert P(v))`, is what the recognition model says that the pixels told it; the second share is of
# that, and does not change with the number of pixels.


def as_table(all_learned: Iterable[Learned]) -> str:
    """Returns what the machines cost, one row each, in nats per digit."""
    lines = [
        f"{'nats per digit':<28}        ------- learned from ------   -------- held out ---------   gap / F   gap /",
        f"{'':<28} steps       F = surprise +   gap         F = surprise +   gap             (gap + complexity)",
    ]
    for one in all_learned:
        numbers = "".join(
            f"  {float(terms.free_energy) / n:7.3f}   {float(terms.surprise) / n:8.3f} {float(terms.gap) / n:7.3f}"
            for terms, n in ((one.trained, NUM_TRAINED), (one.held_out, one.history.num_data))
        )
        lines.append(f"{one.name:<28} {one.num_steps:5}{numbers} {' '.join(f'{s:9.1%}' for s in shares(one.held_out))}")
    return "\n".join(lines)


def shares(terms: vfe.Decomposition) -> tuple[float, float]:
    """Returns the gap as a share of F, and of what the recognition model moved."""
    gap = float(terms.gap)
    return gap / float(terms.free_energy), gap / (gap + float(terms.complexity))


# %%
# All of it
# ---------


def main() -> None:
    """Trains, compares, draws, tells, and checks the numbers."""
    parser = argparse.ArgumentParser(description="A Helmholtz machine of handwritten digits, learned in three ways.")
    parser.add_argument(
        "--output", type=Path, default=Path(sys.argv[0]).parent / "output", help="folder for the pictures"
    )
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="steps of training; few of them for a quick look")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    digits = binary_digits()
    import time
    t = time.time()
    all_learned = []
    for make in (lambda: by_wake_sleep("wake-sleep", digits, options.steps),
        lambda: by_wake_sleep("reweighted wake-sleep", digits, options.steps, reweighted=True),
        lambda: by_descent("descent on F", digits, options.steps),
        lambda: by_wake_sleep("wake-sleep, longer", digits, LONGER * options.steps)):
        all_learned.append(make())
        print(all_learned[-1].name, time.time() - t); t = time.time()
        print(all_learned[-1].history)
    print(as_table(all_learned))
    for a in sleep_alone(all_learned[2].machine, digits, PHASES_OF_SLEEP): print(a, time.time() - t)
    print([rises(l.history) for l in all_learned])
    f, s = by_hand(all_learned[0].machine, digits.held_out[:20].numpy())
    d = all_learned[0].held_out.by("digits")
    print(abs(f - d.free_energy[:20].numpy()).max(), abs(s - d.surprise[:20].numpy()).max(), time.time() - t)


if __name__ == "__main__":
    main()
