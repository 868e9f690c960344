r"""
Two coins: the smallest EM
==========================

Five sets of ten tosses, each made with one of two coins of unknown bias, and nobody wrote down which:

.. math::

    P(v, u) = \prod_n \tfrac12 \, \text{Binomial}(u_n \mid 10, \text{bias}_{v_n})

:math:`u_n` is the number of heads in set *n*, and :math:`v_n` its coin. EM finds the biases, one phase at a time:

- The E-phase sets :math:`Q(v) = P(v \mid u, \text{biases})`. The gap goes to 0, and *F* is the surprise.
- The M-phase sets :math:`\text{bias}_k = \sum_n Q(v_n = k) \, u_n \, / \, \sum_n Q(v_n = k) \, 10`. *F* falls, and a
  gap opens: the posterior has moved on.

What an M-phase opens as a gap comes on top of what *F* fell by: the surprise falls by both together.

References:

- Do and Batzoglou (2008), What is the expectation maximization algorithm?, Nature Biotechnology 26: the data, the
  start, and the biases after 1 and after 10 iterations (Figure 1).
- Dempster, Laird and Rubin (1977), Maximum likelihood from incomplete data via the EM algorithm: the rate.
"""

import argparse
import sys
from pathlib import Path
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.axes import Axes
from torch import Tensor
from torch.distributions import constraints

import pyro_vfe as vfe

HEADS = (5, 9, 8, 4, 7)
TOSSES = 10
START = (0.6, 0.5)
PAPER = {1: (0.713, 0.581), 10: (0.79674, 0.51966)}
"""The biases after so many iterations."""
PAPER_RESPONSIBILITIES = (0.45, 0.80, 0.73, 0.35, 0.65)
"""Q(v_n = first coin) after the first E-phase."""
SHOWN_ITERATIONS = 5
VISIBLE = 1e-10
"""Nats that still stand out from rounding."""
DARK = "#0b3c5d"

# %%
# The model, and one iteration at a time
# --------------------------------------
# A parameter for the biases, a latent for the coin of each set, and nothing about EM: ``vfe.EM(coins)`` reads the rest
# off the program. ``e_phase`` and ``m_phase`` do single phases, ``run`` all of them.


def coins(heads: Tensor) -> None:
    """The generative model: each set of tosses is made with one of two coins, either as likely as the other."""
    biases = pyro.param("biases", torch.tensor(START), constraint=constraints.unit_interval)
    with pyro.plate("sets", len(heads)):
        coin = pyro.sample("coin", dist.Categorical(torch.ones(2) / 2))
        pyro.sample("heads", dist.Binomial(TOSSES, biases[coin]), obs=heads)


def one_iteration_at_a_time(heads: Tensor, num_iterations: int) -> np.ndarray:
    """Returns the biases at the start and after each of so many iterations, shape `(num_iterations + 1, 2)`."""
    em = vfe.EM(coins)
    biases = [torch.tensor(START)]
    for _ in range(num_iterations):
        em.e_phase(heads)
        em.m_phase(heads)
        biases.append(pyro.param("biases").detach().clone())
    return torch.stack(biases).numpy()


def excess(history: vfe.History) -> np.ndarray:
    """Returns how far F is above its end after each E-phase, nats, as long as rounding does not show."""
    free_energy = history.of("E").free_energy
    above = free_energy - free_energy[-1]
    return above[above > VISIBLE]


# %%
# Pictures
# --------
# ``vfe.plot_free_energy`` stacks the gap on the surprise: M-phases open it, E-phases close it.


def draw(path: Path, history: vfe.History) -> None:
    """Draws the first phases, and how fast F comes to its end; the picture stays open."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5), width_ratios=(3, 2), layout="constrained")
    phases = tuple(row for row in history.rows if row.phase in "EM")
    vfe.plot_free_energy(vfe.History(phases[: 2 * SHOWN_ITERATIONS], history.num_data), ax=left)
    left.set_title("M-phases lower F and open a gap, E-phases close it")
    draw_rate(right, excess(history))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def draw_rate(axes: Axes, above: np.ndarray) -> None:
    """Draws, on a log scale, how far F is above its end after each E-phase."""
    axes.semilogy(above, "o-", color=DARK, markersize=4, linewidth=1)
    axes.set(title="How fast F comes to its end", ylabel="F above its end, nats", xlabel="iteration")


def as_table(biases: np.ndarray) -> str:
    """Returns the biases after each iteration, in lines."""
    lines = ["iteration  first coin  second coin"]
    lines += [f"{iteration:9}  {first:10.5f}  {second:11.5f}" for iteration, (first, second) in enumerate(biases)]
    return "\n".join(lines)


def in_words(history: vfe.History, above: np.ndarray) -> str:
    """Returns what the phases did, in sentences."""
    first = history.of("M").rows[0]
    start = history.of("E").rows[0].free_energy
    share = above[-1] / above[-2]
    fell, moved = start - first.free_energy, start - first.surprise
    told = (
        f"The first M-phase lowers F by {fell:.4f} nats with Q held. The posterior moves away from Q as the biases "
        f"change, which opens a gap of {first.gap:.4f} nats; so the surprise, F less the gap, falls by {moved:.4f}. "
        f"The next E-phase removes the gap. In the end each iteration leaves {share:.2f} of what F had still to fall, "
        f"and {share**0.5:.2f} of what the biases had still to move: the share of what the coins' names, had they "
        "been written down, would have told about the biases."
    )
    return f"In words\n{fill(told, 116, initial_indent='  ', subsequent_indent='  ')}"


# %%
# All of it
# ---------


def main() -> None:
    """Fits, tells, draws, and checks the numbers against the paper."""
    parser = argparse.ArgumentParser(description="Two coins of unknown bias: the phases of EM, one by one.")
    parser.add_argument(
        "--output", type=Path, default=Path(sys.argv[0]).parent / "output", help="folder for the picture"
    )
    picture = parser.parse_args().output / "coins.png"
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    heads = torch.tensor(HEADS, dtype=torch.float64)

    responsibilities = vfe.posterior(coins, heads).marginal("coin")[:, 0].numpy()
    run = vfe.EM(coins).run(heads, tol=1e-14, progress_bar=False)
    above = excess(run.history)
    draw(picture, run.history)

    pyro.clear_param_store()
    biases = one_iteration_at_a_time(heads, max(PAPER))

    print(f"F, surprise and gap after every phase, nats\n{run.history}\n")
    shares = ", ".join(f"{share:.2f}" for share in responsibilities)
    print(f"The first E-phase: each set is the first coin's with probability {shares}\n")
    print(f"Biases\n{as_table(biases)}\n")
    print(in_words(run.history, above))
    print(f"Picture: {picture}")

    for iteration, known in PAPER.items():
        digits = 5e-4 if iteration == 1 else 5e-6
        assert np.abs(biases[iteration] - known).max() < digits, iteration
    assert np.abs(responsibilities - PAPER_RESPONSIBILITIES).max() < 0.005
    assert run.converged
    assert np.all(run.history.of("E").gap < 1e-12)
    assert np.all(np.diff(run.history.free_energy) < 1e-12)


if __name__ == "__main__":
    main()
