r"""
Bars: what a Helmholtz machine dreams of
========================================

Images of 4 x 4 pixels show horizontal bars or vertical ones: a coin says which, and each of the four bars is on with
probability 0.3. A Helmholtz machine, which knows nothing of bars, learns them: a generative model that turns one unit
into eight and these into an image, and a recognition model that goes the other way:

.. math::

    P(v, u) &= P(\text{top}) \prod_j P(\text{hidden}_j \mid \text{top}) \prod_i P(u_i \mid \text{hidden})

    Q(v \mid u) &= \prod_j Q(\text{hidden}_j \mid u) \; Q(\text{top} \mid \text{hidden})

Every factor is a Bernoulli whose logit is linear in the layer before. Three ways of learning start from the same
machine: the wake-sleep algorithm, its reweighted form, and descent on *F*. There are 30 different images, so what a
machine costs per image is a sum over them, and exact:

.. math::

    F = \text{entropy of the images} + \text{KL}(\text{images} \, \| \, P(u)) + \text{gap}

No machine can go below the entropy. The rest, the excess, has two parts: the generative model's, surprise less entropy,
and the recognition model's, the gap.

References:

- Hinton, Dayan, Frey and Neal (1995), The "wake-sleep" algorithm for unsupervised neural networks: the machine, and
  bars to teach it.
- Dayan, Hinton, Neal and Zemel (1995), The Helmholtz machine.
- Bornschein and Bengio (2015), Reweighted wake-sleep.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
from matplotlib.ticker import LogLocator, NullFormatter
from pyro import poutine
from torch import Tensor, nn

import pyro_vfe as vfe

SIDE, NUM_HIDDEN = 4, 8
NUM_PIXELS = SIDE * SIDE
ON = 0.3
"""The probability of a bar to be on."""
NUM_STEPS = {"wake-sleep": 2000, "reweighted wake-sleep": 1200, "descent on F": 1200}
"""Steps of learning, each way in its own time."""
AT_REST = -3.0
"""The logit of a pixel that no hidden unit turns on, at the start: units that turn pixels on have most to gain."""
BATCH = 200
"""Fresh images for each step of wake-sleep."""
NUM_PARTICLES = 5
"""Draws that reweighted wake-sleep weighs against each other, for each image."""
NUM_READINGS = 50
RATES = {"wake-sleep": 0.2, "reweighted wake-sleep": 0.1, "descent on F": 0.1}
"""Learning rates of Adam at the first step."""
LAST = 0.05
"""What is left of them at the last step."""
NUM_SHOWN, NUM_IN_A_ROW = 40, 10
SEED = 0
DARK, LIGHT, GREY = "#0b3c5d", "#e69f00", "0.45"

# %%
# The bars, all of them
# ---------------------
# Each orientation has 16 images. No bar and four bars look alike in both, so there are 30 images.


@dataclass(frozen=True, eq=False)
class Bars:
    """All images of bars."""

    images: Tensor
    """Pixels, 0 or 1, shape `(30, 16)`."""
    probs: Tensor
    """How probable each image is, shape `(30,)`."""

    @property
    def entropy(self) -> float:
        """What an image costs that is drawn from these, nats."""
        return float(-(self.probs * self.probs.log()).sum())

    def drawn(self, num_images: int) -> Tensor:
        """Returns images drawn at random, shape `(num_images, 16)`."""
        return self.images[torch.multinomial(self.probs, num_images, replacement=True)]

    def batches(self, num_steps: int) -> Iterator[Tensor]:
        """Yields fresh images for each step."""
        for _ in range(num_steps):
            yield self.drawn(BATCH)


def bars() -> Bars:
    """Returns all images, by going through all ways to make one."""
    probability: dict[tuple[float, ...], float] = {}
    for is_vertical, on in product((False, True), product((0.0, 1.0), repeat=SIDE)):
        image = tuple(on[column if is_vertical else row] for row in range(SIDE) for column in range(SIDE))
        of_bars = ON ** sum(on) * (1 - ON) ** (SIDE - sum(on))
        probability[image] = probability.get(image, 0.0) + of_bars / 2
    return Bars(torch.tensor(list(probability)), torch.tensor(list(probability.values())))


# %%
# The machine
# -----------
# Two Pyro programs with the same arguments. A layer is a vector of Bernoullis, and *F* sums over all of its values.
# `weights` says how often each image counts: once for images that were drawn; by its probability where all images are
# given, so that sums over images are expectations.


class Generative(nn.Module):
    """The generative model's parameters: logits of the top unit, and of each layer given the one above."""

    def __init__(self) -> None:
        super().__init__()
        self.top = nn.Parameter(torch.zeros(1))
        self.hidden = nn.Linear(1, NUM_HIDDEN)
        self.u = nn.Linear(NUM_HIDDEN, NUM_PIXELS)


class Recognition(nn.Module):
    """The recognition model's parameters: logits of each layer given the one below."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(NUM_PIXELS, NUM_HIDDEN)
        self.top = nn.Linear(NUM_HIDDEN, 1)


class Machine:
    """A Helmholtz machine, which has learned nothing so far; the same one each time."""

    def __init__(self) -> None:
        torch.manual_seed(SEED)
        self.generative, self.recognition = Generative(), Recognition()
        nn.init.constant_(self.generative.u.bias, AT_REST)

    def model(self, u: Tensor, weights: Tensor | float = 1.0) -> None:
        """From the top unit down to the image."""
        down = pyro.module("generative", self.generative)
        with pyro.plate("images", len(u)), poutine.scale(scale=weights):
            top = pyro.sample("top", dist.Bernoulli(logits=down.top).to_event(1))
            hidden = pyro.sample("hidden", dist.Bernoulli(logits=down.hidden(top)).to_event(1))
            pyro.sample("u", dist.Bernoulli(logits=down.u(hidden)).to_event(1), obs=u)

    def guide(self, u: Tensor, weights: Tensor | float = 1.0) -> None:
        """From the image up to the top unit."""
        up = pyro.module("recognition", self.recognition)
        with pyro.plate("images", len(u)), poutine.scale(scale=weights):
            hidden = pyro.sample("hidden", dist.Bernoulli(logits=up.hidden(u)).to_event(1))
            pyro.sample("top", dist.Bernoulli(logits=up.top(hidden)).to_event(1))


# %%
# How well such a machine can do is known, because a good one can be written down: a hidden unit for each bar, and a top
# unit that says which four of them may be on. What is left is the gap of the image with all pixels on, which four
# horizontal bars have made or four vertical ones: a factorised *Q* can only name one of the two.

SURE = 30.0
"""The logit of what is as good as certain."""


@torch.no_grad()
def written_down() -> Machine:
    """Returns a machine that knows bars; hidden units are rows first, then columns."""
    machine = Machine()
    is_row = torch.arange(NUM_HIDDEN) < SIDE
    rare = np.log(ON / (1 - ON))
    rows, columns = torch.eye(SIDE).repeat_interleave(SIDE, 1), torch.eye(SIDE).repeat(1, SIDE)
    down, up = machine.generative, machine.recognition
    down.hidden.weight.copy_(torch.where(is_row, -SURE, SURE)[:, None])
    down.hidden.bias.copy_(torch.where(is_row, rare, rare - SURE))
    down.u.weight.copy_(2 * SURE * torch.cat([rows, columns]).T)
    down.u.bias.fill_(-SURE)
    # Four pixels of a row make a bar; four of a column too, if some others are off: where all are on, they are rows.
    up.hidden.weight.copy_(SURE * torch.cat([2 * rows, 4 * columns - 1]))
    up.hidden.bias.copy_(SURE * torch.where(is_row, -7.0, -1.0))
    up.top.weight.copy_(torch.where(is_row, -SURE, SURE))
    up.top.bias.fill_(0)
    return machine


# %%
# Three ways to learn
# -------------------
# Wake-sleep sees fresh images in each step. In its wake phase the recognition model draws what an image may come from,
# and the generative model learns to make that image of it; in its sleep phase the generative model dreams an image, and
# the recognition model learns to tell what the dream came from. Reweighted, several draws for an image count by how
# well they explain it, and the recognition model learns from these, too.
#
# Descent on *F* needs neither draws nor dreams: gradients are exact, and all images are there, by their probabilities.
#
# Readings of *F* are of all images, whatever a step saw.

Run = vfe.SVIRun | vfe.WakeSleepRun


def falling_adam(name: str, num_steps: int) -> pyro.optim.PyroOptim:
    """Returns Adam with a learning rate that falls to a twentieth."""
    of_adam = {"optimizer": torch.optim.Adam, "optim_args": {"lr": RATES[name]}}
    return pyro.optim.LinearLR({**of_adam, "start_factor": 1.0, "end_factor": LAST, "total_iters": num_steps})


def by_wake_sleep(name: str, machine: Machine, data: Bars, num_steps: int) -> vfe.WakeSleepRun:
    """Returns the run of wake-sleep, plain or reweighted, on fresh images."""
    draws = poutine.infer_config(machine.guide, lambda site: {"enumerate": None})
    reweighted = name.startswith("reweighted")
    wake_sleep = vfe.WakeSleep(
        machine.model,
        draws,
        falling_adam(name, num_steps),
        falling_adam(name, num_steps),
        num_particles=NUM_PARTICLES if reweighted else 1,
        reweighted=reweighted,
    )
    return wake_sleep.run(
        num_steps=num_steps,
        batches=data.batches(num_steps),
        every=-(-num_steps // NUM_READINGS),
        held_out=(data.images, data.probs),
        progress_bar=False,
    )


def by_descent(name: str, machine: Machine, data: Bars, num_steps: int) -> vfe.SVIRun:
    """Returns the run of SVI on all images, with exact gradients."""
    optim = falling_adam(name, num_steps)
    arguments = data.images, data.probs
    return vfe.fit(machine.model, machine.guide, *arguments, optim=optim, num_steps=num_steps, progress_bar=False)


def learn(name: str, data: Bars, num_steps: int) -> tuple["Score", Run]:
    """Returns what a machine has become that learned in one of the three ways, from the same start, and how."""
    pyro.clear_param_store()
    machine = Machine()
    pyro.set_rng_seed(SEED)
    run = (by_descent if name == "descent on F" else by_wake_sleep)(name, machine, data, num_steps)
    return score(name, machine, data), run


# %%
# Whose fault the excess is
# -------------------------


@dataclass(frozen=True, eq=False)
class Score:
    """What a machine costs, and what it does."""

    name: str
    entropy: float
    """Of the images, nats."""
    terms: vfe.Decomposition
    """F per image, taken apart, nats."""
    image_probs: Tensor
    """How probable the machine finds each image of bars, shape `(30,)`."""
    dreams: Tensor
    """Images that it dreamt, shape `(NUM_SHOWN, 16)`."""
    units: Tensor
    """The probability of each pixel to be on where no hidden unit is, and where one alone is; shape `(9, 16)`."""

    @property
    def excess(self) -> float:
        """F less the entropy: what the machine costs per image beyond what any must, nats."""
        return float(self.terms.free_energy) - self.entropy

    @property
    def model_excess(self) -> float:
        """The generative model's part of it: KL(images || P(u)), nats."""
        return float(self.terms.surprise) - self.entropy

    @property
    def bars_dreamt(self) -> float:
        """The probability that a dream is an image of bars."""
        return float(self.image_probs.sum())


@torch.no_grad()
def score(name: str, machine: Machine, data: Bars) -> Score:
    """Returns what a machine costs per image, exactly, and what it dreams."""
    elbo = vfe.FreeEnergy()
    none_and_one = torch.eye(NUM_HIDDEN + 1)[:, 1:]
    return Score(
        name=name,
        entropy=data.entropy,
        terms=elbo.decompose(machine.model, machine.guide, data.images, data.probs),
        image_probs=elbo.decompose(machine.model, machine.guide, data.images).by("images").surprise.neg().exp(),
        dreams=vfe.dream(machine.model, torch.zeros(NUM_SHOWN, NUM_PIXELS)).observations["u"],
        units=machine.generative.u(none_and_one).sigmoid(),
    )


def as_table(scores: list[Score]) -> str:
    """Returns the machines, one row each, nats per image."""
    lines = [f"{'nats per image':<22}     F = surprise +   gap   excess = model's + recognition's   dreams of bars"]
    for one in scores:
        free_energy, surprise, gap = (float(getattr(one.terms, field)) for field in ("free_energy", "surprise", "gap"))
        share = one.model_excess / one.excess
        lines.append(
            f"{one.name:<22} {free_energy:5.3f}   {surprise:8.3f} {gap:7.4f} {one.excess:8.4f} {share:9.1%} "
            f"{1 - share:15.1%} {one.bars_dreamt:16.1%}"
        )
    return "\n".join(lines)


def rises_in_sleep(run: Run) -> tuple[int, int]:
    """Returns how often F was higher after a sleep phase than before it, and how often this was looked at."""
    history = run.history
    changes = history.d_free_energy[np.array(history.phase) == "sleep"]
    return int((changes > 0).sum()), len(changes)


def in_words(scores: list[Score], runs: dict[str, Run], known: Score) -> str:
    """Returns what was found, in sentences."""
    best, worst = (choose(scores, key=lambda one: one.excess) for choose in (min, max))
    rose, looked_at = rises_in_sleep(runs["wake-sleep"])
    told = (
        f"An image costs {known.entropy:.4f} nats at least, {known.entropy / np.log(2):.4f} bits. The machine that was "
        f"written down costs {known.excess:.4f} more, which is the gap of one image in {1 / ON**SIDE:.0f}; so nobody "
        "needs to have a larger excess than that.",
        f"{best.name.capitalize()} comes nearest, {best.excess:.3f} nats above the entropy, and {worst.name} ends "
        f"{worst.excess:.3f} above. F alone does not say why. Of the excess the generative models own "
        + ", ".join(f"{one.model_excess / one.excess:.0%} ({one.name})" for one in scores)
        + ": the recognition models keep up with what they are to invert. What is missing is in the generative models: "
        "bars that have a unit to themselves.",
        f"A sleep phase does not descend F: F rose in {rose} of the {looked_at} that were looked at. It never moves "
        "the surprise, only the gap.",
    )
    return "\n".join(["In words", *(fill(text, 116, initial_indent="  ", subsequent_indent="  ") for text in told)])


# %%
# Pictures
# --------


def draw_images(data: Bars, scores: list[Score]) -> Figure:
    """Draws images and the dreams of each machine; what is no image of bars is framed."""
    figure = plt.figure(figsize=(11, 7), layout="constrained")
    bars_alone = {tuple(image) for image in data.images.tolist()}
    figure.supxlabel("framed: not an image of bars", fontsize="medium")
    titled = {"images of bars": data.drawn(NUM_SHOWN)}
    titled |= {f"{one.name}: {one.bars_dreamt:.0%} of its dreams are bars": one.dreams for one in scores}
    parts = figure.subfigures(2, 2, wspace=0.05, hspace=0.05).flat
    for part, (title, images) in zip(parts, titled.items(), strict=True):
        part.suptitle(title)
        for axes, image in zip(part.subplots(NUM_SHOWN // NUM_IN_A_ROW, NUM_IN_A_ROW).flat, images, strict=True):
            draw_pixels(axes, image, is_framed=tuple(image.tolist()) not in bars_alone)
    return figure


def draw_pixels(axes: Axes, pixels: Tensor, is_framed: bool = False) -> None:
    """Draws an image, or probabilities of pixels to be on."""
    axes.imshow(pixels.reshape(SIDE, SIDE).numpy(), cmap="Greys", vmin=0, vmax=1)
    axes.set(xticks=(), yticks=())
    for spine in axes.spines.values():
        spine.set(color=LIGHT if is_framed else "0.8", linewidth=2.5 if is_framed else 0.8)


def draw_units(scores: list[Score]) -> Figure:
    """Draws what the hidden units of each machine do: the image where none is on, and where one alone is."""
    figure, all_axes = plt.subplots(len(scores), NUM_HIDDEN + 1, figsize=(11, 5.4), layout="constrained")
    for row, one in zip(all_axes, scores, strict=True):
        row[0].set_ylabel(one.name.replace("reweighted ", "reweighted\n"))
        for i, (axes, pixels) in enumerate(zip(row, one.units, strict=True)):
            draw_pixels(axes, pixels)
            axes.set_title(f"unit {i}" if i else "none on", fontsize="small")
    return figure


def above_entropy(run: Run, entropy: float) -> vfe.History:
    """Returns the last nine tenths of a run, after sleep phases or steps, with the entropy taken off the surprise."""
    rows = [row for row in run.history.rows if row.phase != "wake" and 10 * row.iteration >= run.num_steps]
    changed = (replace(row, free_energy=row.free_energy - entropy, surprise=row.surprise - entropy) for row in rows)
    return vfe.History(tuple(changed))


def draw_histories(scores: list[Score], runs: dict[str, Run]) -> Figure:
    """Draws how far each machine was above the entropy while it learned, as the two models' parts."""
    figure, all_axes = plt.subplots(1, len(scores), figsize=(12, 4.6), sharey=True, layout="constrained")
    for axes, one in zip(all_axes, scores, strict=True):
        vfe.plot_free_energy(above_entropy(runs[one.name], one.entropy), ax=axes)
        title = f"{one.name}:\nF ends {one.excess:.2f} nats above the entropy"
        axes.set(title=title, ylabel="nats per image above the entropy", xlabel="step", ylim=(0, None))
        axes.label_outer()
    return figure


def draw_excess(scores: list[Score], runs: dict[str, Run]) -> Figure:
    """Draws both parts of the excess while the machines learned."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for one, color, style in zip(scores, (DARK, LIGHT, GREY), ("-", "--", "-"), strict=True):
        # After wake phases there is a reading too: at the same step, before the recognition model has slept on it.
        history = vfe.History(tuple(row for row in runs[one.name].history.rows if row.phase != "wake"))
        left.plot(history.iteration, history.surprise - one.entropy, style, color=color, label=one.name)
        right.plot(history.iteration, history.gap, style, color=color, label=one.name)
    left.set_title("The generative model's: surprise less entropy")
    right.set_title("The recognition model's: the gap")
    for axes in (left, right):
        axes.set(xlabel="step", ylabel="nats per image", yscale="log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize="small")
    return figure


def save(figures: dict[str, Figure], folder: Path) -> None:
    """Saves the pictures, and leaves them open for who looks at them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / f"helmholtz_bars_{name}.png", dpi=150)


# %%
# All of it
# ---------


def main() -> None:
    """Learns, compares, draws, tells, and checks the numbers."""
    parser = argparse.ArgumentParser(description="A Helmholtz machine learns bars, in three ways.")
    parser.add_argument("--steps", type=int, help="steps of learning, fewer for a quick look")
    parser.add_argument(
        "--output", type=Path, default=Path(sys.argv[0]).parent / "output", help="folder for the pictures"
    )
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    data = bars()

    scores, runs = [], {}
    for name in RATES:
        one, runs[name] = learn(name, data, args.steps or NUM_STEPS[name])
        scores.append(one)
    pyro.clear_param_store()
    known = score("written down", written_down(), data)

    print(f"{as_table([*scores, known])}\n\n{in_words(scores, runs, known)}")
    pictures = {
        "dreams": draw_images(data, scores),
        "units": draw_units([*scores, known]),
        "free_energy": draw_histories(scores, runs),
        "excess": draw_excess(scores, runs),
    }
    save(pictures, args.output)
    print(f"Pictures: {args.output}")

    # A coin and four bars, less the coin where the image does not show how it fell.
    of_a_bar = -ON * np.log(ON) - (1 - ON) * np.log(1 - ON)
    unseen = (1 - ON) ** SIDE + ON**SIDE
    assert abs(data.entropy - ((1 - unseen) * np.log(2) + SIDE * of_a_bar)) < 1e-12
    assert abs(known.model_excess) < 1e-6
    assert abs(known.terms.gap - ON**SIDE * np.log(2)) < 1e-6
    for one in scores:
        torch.testing.assert_close(one.terms.free_energy, one.terms.surprise + one.terms.gap)
        kl_divergence = (data.probs * (data.probs / one.image_probs).log()).sum()
        assert abs(one.model_excess - kl_divergence) < 1e-9
        assert known.excess < one.excess
        history = runs[one.name].history
        assert abs(history.free_energy[-1] - one.terms.free_energy) < 1e-9
        assert one.terms.free_energy < history.free_energy[0]


if __name__ == "__main__":
    main()
