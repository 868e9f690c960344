r"""
Handwritten digits: a Helmholtz machine, learned in three ways
==============================================================

Two layers of hidden units explain 8 x 8 pictures of digits, and a recognition network guesses the units from the
pixels. The two are trained by wake-sleep, by reweighted wake-sleep and by descent on *F* itself, from the same start
and on the same mini-batches:

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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
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
BATCH, NUM_STEPS, LONGER = 100, 400, 8
"""Steps of training, and how many times as many wake-sleep does when it is given time."""
RATE, NUM_DRAWS = 0.03, 10
"""Adam's learning rate, and the draws that reweighted wake-sleep weighs."""
NUM_READINGS = 8
SLEEP_RATE, PHASES_OF_SLEEP = 0.01, (0, 5, 10, 20, 50, 100, 200)
"""Of sleep alone: Adam's learning rate, and after how many phases it is looked at."""
PARTICLES = (1, 3, 10, 30, 100)
"""Numbers of draws that bounds are made of."""
NUM_CHECKED = 20
"""So many digits' F is also computed by hand."""
GRID = (6, 10)
"""Rows and columns of digits in a picture."""
COLORS, MARKERS = ("#e69f00", "#56b4e9", "#009e73", "#0b3c5d"), "osD^"
Q_COLOR, P_COLOR = "#0b3c5d", "#d55e00"

# %%
# The digits, and the machine
# ---------------------------
# Each layer is one site, a vector of Bernoullis.


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

    def forward(self, pixels: Tensor) -> None:
        """Says how digits come about."""
        with pyro.plate("digits", len(pixels)):
            top = pyro.sample("top", dist.Bernoulli(logits=self.to_top).to_event(1))
            middle = pyro.sample("middle", dist.Bernoulli(logits=self.to_middle(top)).to_event(1))
            pyro.sample("pixels", dist.Bernoulli(logits=self.to_pixels(middle)).to_event(1), obs=pixels)


class Recognition(PyroModule):
    """The recognition model: from the pixels up."""

    def __init__(self) -> None:
        super().__init__()
        self.from_pixels = PyroModule[nn.Linear](NUM_PIXELS, NUM_MIDDLE)
        self.from_middle = PyroModule[nn.Linear](NUM_MIDDLE, NUM_TOP)

    def forward(self, pixels: Tensor) -> None:
        """Guesses the hidden units behind digits."""
        with pyro.plate("digits", len(pixels)):
            middle = pyro.sample("middle", dist.Bernoulli(logits=self.from_pixels(pixels)).to_event(1))
            pyro.sample("top", dist.Bernoulli(logits=self.from_middle(middle)).to_event(1))


@dataclass(frozen=True, eq=False)
class Machine:
    """A generative model and its recognition model."""

    generative: Generative
    recognition: Recognition

    @property
    def drawing(self) -> Callable[[Tensor], None]:
        """The recognition model, whose units are drawn where a program with enumerable latents has them summed."""
        return poutine.infer_config(self.recognition, lambda site: {"enumerate": None})

    def decompose(self, pixels: Tensor) -> vfe.Decomposition:
        """Returns F of digits taken apart, exactly."""
        return vfe.FreeEnergy().decompose(self.generative, self.recognition, pixels)


def start(digits: Digits) -> Machine:
    """Returns the machine that all ways of learning start from."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    return Machine(Generative(digits.trained), Recognition())


# %%
# Three ways to learn
# -------------------
# Wake-sleep is told to draw what it could sum. The rows of all histories are exact nevertheless, and of held-out
# digits; that of `WakeSleep` notes where *F* stands after each phase.


@dataclass(frozen=True, eq=False)
class Learned:
    """A machine, how it was trained, and what it costs."""

    name: str
    num_steps: int
    machine: Machine
    history: vfe.History
    """F of the held-out digits."""
    trained: vfe.Decomposition
    held_out: vfe.Decomposition


def taken_apart(name: str, num_steps: int, machine: Machine, history: vfe.History, digits: Digits) -> Learned:
    """Returns what a trained machine costs."""
    decompositions = machine.decompose(digits.trained), machine.decompose(digits.held_out)
    return Learned(name, num_steps, machine, history, *decompositions)


def by_wake_sleep(name: str, digits: Digits, num_steps: int, reweighted: bool = False) -> Learned:
    """Returns a machine trained by wake-sleep on drawn hidden units."""
    machine = start(digits)
    wake_sleep = vfe.WakeSleep(
        machine.generative,
        machine.drawing,
        pyro.optim.Adam({"lr": RATE}),
        pyro.optim.Adam({"lr": RATE}),
        num_particles=NUM_DRAWS if reweighted else 1,
        reweighted=reweighted,
    )
    run = wake_sleep.run(
        num_steps=num_steps,
        batches=digits.batches,
        every=max(1, num_steps // NUM_READINGS),
        held_out=(digits.held_out,),
        progress_bar=False,
    )
    return taken_apart(name, num_steps, machine, run.history, digits)


def by_descent(name: str, digits: Digits, num_steps: int) -> Learned:
    """Returns a machine trained by descent on F with exact gradients."""
    machine = start(digits)
    elbo = vfe.FreeEnergy()
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
    return taken_apart(name, num_steps, machine, run.history, digits)


# %%
# What sleep does to F
# --------------------
# The sleep phase descends another divergence than *F* has in it, :math:`\mathrm{KL}(P \Vert Q)` in place of
# :math:`\mathrm{KL}(Q \Vert P)`, and averages it over dreams in place of digits. To see it alone, take the machine that
# descent on *F* has made, hold the generative model, and let the recognition model sleep: it learns from dreams until
# it knows them better, and knows the digits worse.


@dataclass(frozen=True)
class Asleep:
    """A recognition model after some phases of sleep, in nats per digit or dream."""

    num_phases: int
    gap: float
    """KL(Q || P(v|u)) of the digits that the machine had learned from."""
    divergence: float
    """KL(P(v|u) || Q) of dreams: the mean over as many dreams, each with the hidden units that made it."""


def sleep_alone(machine: Machine, digits: Digits, phases: Sequence[int]) -> list[Asleep]:
    """Returns how a recognition model fares that learns by nothing but sleep, from where it is."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    asleep = copy.deepcopy(machine)
    adam = pyro.optim.Adam({"lr": SLEEP_RATE})
    wake_sleep = vfe.WakeSleep(asleep.generative, asleep.drawing, adam, adam)
    dream = vfe.dream(asleep.generative, digits.held_out)
    dreamt = asleep.decompose(*dream.args)
    log_posterior = log_prob(asleep.generative, dream) + float(dreamt.surprise)
    readings = []
    for begun, num_phases in zip((0, *phases), phases, strict=False):
        for _ in range(num_phases - begun):
            wake_sleep.sleep(digits.trained)
        gap = float(asleep.decompose(digits.trained).gap) / len(digits.trained)
        divergence = (log_posterior - log_prob(asleep.recognition, dream)) / len(digits.held_out)
        readings.append(Asleep(num_phases, gap, divergence))
    return readings


def log_prob(program: Generative | Recognition, dream: vfe.Dream) -> float:
    """Returns the log-probability of a dream under either program, nats."""
    dreamt = poutine.condition(program, data=dream.latents)
    with torch.no_grad():
        return float(poutine.trace(dreamt).get_trace(*dream.args).log_prob_sum())


# %%
# F by hand
# ---------
# The same numbers by the formulas of the layers, with all values of both of them written out.


def by_hand(machine: Machine, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns F and surprise of each digit, nats: sums over 256 values of the top layer and 4,096 of the middle one."""
    parameters = {**dict(machine.generative.named_parameters()), **dict(machine.recognition.named_parameters())}
    values = {name: parameter.detach().numpy() for name, parameter in parameters.items()}
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


# %%
# What each costs
# ---------------
# How much of *F* is the recognition model's? The table says it in two ways: the gap as a share of *F*, and as a share
# of gap + complexity. Most of *F* here is the price of 64 noisy pixels, whatever the hidden units are. Complexity,
# :math:`\mathrm{KL}(Q \Vert P(v))`, is what the recognition model says that the pixels told it, and the second share
# does not change when there are more pixels that say nothing.


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
# Where the sums do not fit
# -------------------------
# With a few layers more nothing of this could be summed. What remains are bounds, made of draws from the recognition
# model: a lower one for any digit, and for a dream an upper one as well, since a dream comes with the hidden units that
# made it, a draw from its posterior. Here the exact value stands beside them.


@dataclass(frozen=True)
class Bounded:
    """What is known of log p(u) of dreams from some draws, in nats per dream."""

    num_particles: int
    lower: float
    upper: float
    gap_at_least: float


def bounds_of_dreams(machine: Machine, digits: Digits) -> tuple[list[Bounded], vfe.Decomposition]:
    """Returns bounds on log p(u) of dreams for several numbers of draws, and F of the dreams taken apart exactly."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    dream = vfe.dream(machine.generative, digits.held_out)
    found = []
    for num_particles in PARTICLES:
        bounds = vfe.bounds(machine.generative, machine.recognition, num_particles=num_particles, dream=dream)
        assert bounds.upper is not None
        numbers = (float(value) / bounds.num_data for value in (bounds.lower, bounds.upper, bounds.gap_at_least))
        found.append(Bounded(num_particles, *numbers))
    return found, machine.decompose(*dream.args)


def as_table_of_bounds(bounded: Iterable[Bounded], exact: vfe.Decomposition, num_dreams: int) -> str:
    """Returns what draws say of log p(u) and of the gap, one row for each number of them, and the exact values."""
    lines = ["nats per dream   lower bound   upper bound   gap at least"]
    for one in bounded:
        name = f"{one.num_particles} draw{'s' * (one.num_particles > 1)}"
        lines.append(f"{name:<14} {one.lower:13.3f} {one.upper:13.3f} {one.gap_at_least:14.3f}")
    log_evidence, gap = -float(exact.surprise) / num_dreams, float(exact.gap) / num_dreams
    return "\n".join([*lines, f"{'exact':<14} {log_evidence:13.3f} {log_evidence:13.3f} {gap:14.3f}"])


# %%
# Pictures
# --------


def draw_learning(all_learned: Sequence[Learned]) -> Figure:
    """Draws F of the held-out digits and the surprise below it while the machines learned; the gap lies between."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for one, color, marker in zip(all_learned, COLORS, MARKERS, strict=True):
        rows = [row for row in one.history.per_datum.rows if row.phase != "wake" and row.iteration > 1]
        steps, free_energy, surprise = zip(*((r.iteration, r.free_energy, r.surprise) for r in rows), strict=True)
        axes.fill_between(steps, surprise, free_energy, color=color, alpha=0.25, linewidth=0)
        axes.plot(steps, free_energy, color=color, marker=marker, markersize=5, label=f"F, {one.name}")
        axes.plot(steps, surprise, color=color, linewidth=1, linestyle="--")
    axes.plot([], [], color="0.3", linewidth=1, linestyle="--", label="surprise")
    axes.fill_between([], [], [], color="0.3", alpha=0.25, linewidth=0, label="gap")
    axes.set_xscale("log")
    steps = [all_learned[0].num_steps * 2**power for power in range(-3, 4)]
    axes.set_xticks(steps, [f"{step:g}" for step in steps], minor=False)
    axes.set_xticks([], minor=True)
    axes.set(title="Held-out digits", xlabel="step (a mini-batch of 100 digits)", ylabel="nats per digit")
    axes.legend(fontsize="small")
    return tidy(figure)


def draw_sleep(asleep: Sequence[Asleep]) -> Figure:
    """Draws the gap of the digits, and the divergence that sleep descends, while a recognition model sleeps."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    places = range(len(asleep))
    axes.plot(places, [one.divergence for one in asleep], "s--", color=P_COLOR, label="KL(P(v|u) ‖ Q), dreams")
    axes.plot(places, [one.gap for one in asleep], "o-", color=Q_COLOR, label="KL(Q ‖ P(v|u)), digits: the gap")
    axes.set_xticks(places, [str(one.num_phases) for one in asleep])
    axes.set(title="Sleep alone: the generative model is held", xlabel="phases of sleep")
    axes.set_ylabel("nats per digit, nats per dream")
    axes.legend(fontsize="small")
    return tidy(figure)


def draw_labels(all_learned: Sequence[Learned], digits: Digits) -> Figure:
    """Draws the mean gap of the held-out digits of each label, with its standard error."""
    figure, axes = plt.subplots(figsize=(10, 4.2), layout="constrained")
    width = 0.8 / len(all_learned)
    for turn, (one, color) in enumerate(zip(all_learned, COLORS, strict=True)):
        means, errors = zip(*gaps_by_label(one, digits.held_out_labels), strict=True)
        places = np.arange(10) + (turn - (len(all_learned) - 1) / 2) * width
        axes.bar(places, means, width, yerr=errors, color=color, ecolor="0.2", capsize=2, label=one.name)
    axes.set_xticks(range(10))
    axes.set(title="What the recognition model costs, by digit", xlabel="digit", ylabel="gap, nats per held-out digit")
    axes.legend(fontsize="small")
    return tidy(figure)


def gaps_by_label(one: Learned, labels: np.ndarray) -> list[tuple[float, float]]:
    """Returns the mean gap of the held-out digits of each label and its standard error, nats."""
    gap = one.held_out.by("digits").gap.numpy()
    of_labels = (gap[labels == label] for label in range(10))
    return [(float(gaps.mean()), float(gaps.std(ddof=1) / np.sqrt(gaps.size))) for gaps in of_labels]


def draw_dreams(all_learned: Sequence[Learned], digits: Digits) -> Figure:
    """Draws digits, and dreams of three machines."""
    figure, all_axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    count = GRID[0] * GRID[1]
    draw_grid(all_axes.flat[0], digits.held_out[:count], "digits")
    for axes, one in zip(all_axes.flat[1:], all_learned, strict=True):
        pyro.set_rng_seed(0)
        dreamt = vfe.dream(one.machine.generative, digits.held_out[:count]).observations["pixels"]
        draw_grid(axes, dreamt, one.name)
    return figure


def draw_grid(axes: Axes, pixels: Tensor, title: str) -> None:
    """Draws many digits as one image, with a line of grey between them."""
    rows, columns = GRID
    padded = nn.functional.pad(pixels.reshape(rows, columns, SIDE, SIDE), (1, 1, 1, 1), value=0.3)
    image = padded.permute(0, 2, 1, 3).reshape(rows * (SIDE + 2), columns * (SIDE + 2))
    axes.imshow(image.numpy(), cmap="Greys", vmin=0, vmax=1)
    axes.set_title(title, fontsize="medium")
    axes.set_axis_off()


def draw_bounds(bounded: Sequence[Bounded], exact: float) -> Figure:
    """Draws bounds on log p(u) of dreams by the number of draws, and the exact value."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    counts = [one.num_particles for one in bounded]
    axes.plot(counts, [one.upper for one in bounded], "v-", color=P_COLOR, label="upper bound")
    axes.axhline(exact, color="0.2", linewidth=1, label="exact")
    axes.plot(counts, [one.lower for one in bounded], "^-", color=Q_COLOR, label="lower bound (-F for one draw)")
    axes.set_xscale("log")
    axes.set_xticks(counts, [str(count) for count in counts], minor=False)
    axes.set_xticks([], minor=True)
    axes.set(title="Estimates of bounds, from draws", xlabel="draws for each dream", ylabel="log p(u), nats per dream")
    axes.legend(fontsize="small")
    return tidy(figure)


def tidy(figure: Figure) -> Figure:
    """Returns a figure without the frames that say nothing."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure


# %%
# All of it
# ---------


def in_words(all_learned: Sequence[Learned], asleep: Sequence[Asleep], digits: Digits) -> str:
    """Returns what the comparison shows, in sentences."""
    by_sleep, reweighted, descent, longer = all_learned
    costs = {one.name: nats(one.held_out, digits.held_out) for one in all_learned}
    gaps = [mean for mean, _ in gaps_by_label(longer, digits.held_out_labels)]
    labels = [f"{label} ({gaps[label]:.2f})" for label in np.argsort(gaps)]
    told = (
        f"After as many steps, F of a held-out digit is {costs[descent.name][0]:.2f} nats where F was descended, "
        f"{costs[reweighted.name][0]:.2f} by reweighted wake-sleep and {costs[by_sleep.name][0]:.2f} by wake-sleep. A "
        f"step of wake-sleep is cheap; {LONGER} times as many bring it to {costs[longer.name][0]:.2f}.",
        f"Taken apart, F says more. Reweighted wake-sleep has the surprise {costs[reweighted.name][1]:.2f} and the gap "
        f"{costs[reweighted.name][2]:.2f}, descent on F {costs[descent.name][1]:.2f} and {costs[descent.name][2]:.2f}. "
        "Descent on F holds the generative model where the recognition model can follow. With several weighed draws "
        "the generative model is freer, and the recognition model falls behind it.",
        f"The recognition model's share of F is {shares(descent.held_out)[0]:.1%} to "
        f"{shares(reweighted.held_out)[0]:.1%}, and of gap + complexity {shares(descent.held_out)[1]:.0%} to "
        f"{shares(reweighted.held_out)[1]:.0%}.",
        f"From where descent on F has ended, {asleep[-1].num_phases} phases of sleep take KL(P || Q) of dreams, which "
        f"they descend, from {asleep[0].divergence:.3f} to {asleep[-1].divergence:.3f} nats, and the gap of the "
        f"digits, which they do not, from {asleep[0].gap:.3f} to {asleep[-1].gap:.3f}. The surprise stays, so F goes "
        "where the gap goes.",
        f"To the recognition model of the longer wake-sleep {labels[-1]} and {labels[-2]} are hardest, and "
        f"{labels[0]} and {labels[1]} easiest; in brackets is the gap in nats.",
    )
    return "\n".join(fill(text, 116, initial_indent="  ", subsequent_indent="  ") for text in told)


def nats(terms: vfe.Decomposition, pixels: Tensor) -> tuple[float, float, float]:
    """Returns F, surprise and gap per digit."""
    return float(terms.free_energy) / len(pixels), float(terms.surprise) / len(pixels), float(terms.gap) / len(pixels)


def check(all_learned: Sequence[Learned], digits: Digits) -> None:
    """Checks exact numbers against the formulas."""
    pixels = digits.held_out[:NUM_CHECKED]
    for one in all_learned:
        free_energy, surprise = by_hand(one.machine, pixels.numpy())
        terms = one.held_out.by("digits")
        np.testing.assert_allclose(terms.free_energy[:NUM_CHECKED], free_energy, rtol=1e-9)
        np.testing.assert_allclose(terms.surprise[:NUM_CHECKED], surprise, rtol=1e-9)
        assert terms.gap.min() > -1e-9


def save(figures: dict[str, Figure], folder: Path) -> None:
    """Saves the pictures, and leaves them open for who looks at them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / f"helmholtz_digits_{name}.png", dpi=150)


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

    all_learned = (
        by_wake_sleep("wake-sleep", digits, options.steps),
        by_wake_sleep("reweighted wake-sleep", digits, options.steps, reweighted=True),
        by_descent("descent on F", digits, options.steps),
        by_wake_sleep(f"wake-sleep, {LONGER} times as long", digits, LONGER * options.steps),
    )
    asleep = sleep_alone(all_learned[2].machine, digits, PHASES_OF_SLEEP)
    bounded, dreamt = bounds_of_dreams(all_learned[3].machine, digits)
    exact = -float(dreamt.surprise) / len(digits.held_out)

    print(f"{all_learned[0].history}\n\n{as_table(all_learned)}\n")
    print(f"In words\n{in_words(all_learned, asleep, digits)}\n")
    print(as_table_of_bounds(bounded, dreamt, len(digits.held_out)))
    pictures = {
        "learning": draw_learning(all_learned),
        "sleep": draw_sleep(asleep),
        "labels": draw_labels(all_learned, digits),
        "dreams": draw_dreams(all_learned[1:], digits),
        "bounds": draw_bounds(bounded, exact),
    }
    save(pictures, options.output)
    print(f"Pictures: {options.output}")

    check(all_learned, digits)
    assert all(one.held_out.free_energy < one.history.free_energy[0] for one in all_learned)
    assert asleep[-1].divergence < asleep[0].divergence
    assert bounded[0].lower < exact < bounded[0].upper
    assert abs(bounded[-1].lower - exact) < abs(bounded[0].lower - exact)
    if options.steps >= NUM_STEPS:
        assert asleep[-1].gap > asleep[0].gap
        assert all_learned[2].held_out.gap < all_learned[3].held_out.gap < all_learned[1].held_out.gap


if __name__ == "__main__":
    main()
