r"""
Earthquakes: what a guide costs, and what a better model wins
=============================================================

How many major earthquakes there were in each year from 1900 to 2006, as a hidden Markov model. How many nats of its
loss are the model's, and how many the guide's?

.. math::

    P(v, u) = \prod_t P(v_t \mid v_{t-1}) \, \text{Poisson}(u_t \mid \text{rate}_{v_t})

:math:`u_t` is the number of earthquakes in year *t*, and :math:`v_t` the hidden state.

.. math::

    F = \text{surprise} + \text{gap}
    \qquad \text{surprise} = -\log p(u)
    \qquad \text{gap} = \text{KL}( Q(v) \,\|\, P(v \mid u) )

Two states are fitted by EM, whose exact E-phase leaves no gap: *F* is then the surprise alone. Then the model is held,
and two guides are fitted to it: mean field, :math:`\prod_t Q(v_t)`, by gradients and by sweeps of closed-form updates,
and a chain, :math:`\prod_t Q(v_t \mid v_{t-1})`, by gradients. EM with a third state shows what a better model wins.

References:

- Zucchini, MacDonald and Langrock (2016), Hidden Markov Models for Time Series: the numbers of earthquakes of
  magnitude 7 or more in the world (Table 1.1), the surprise of the fitted models and EM's path to it (Tables 4.1 and
  4.2).
- Saul, Jaakkola and Jordan (1996), Mean field theory for sigmoid belief networks: mean field, one site at a time.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI
from torch import Tensor
from torch.distributions import constraints
from tqdm import tqdm

import pyro_vfe as vfe

# fmt: off
COUNTS = (
    13, 14,  8, 10, 16, 26, 32, 27, 18, 32, 36, 24, 22, 23, 22, 18, 25, 21, 21, 14,
     8, 11, 14, 23, 18, 17, 19, 20, 22, 19, 13, 26, 13, 14, 22, 24, 21, 22, 26, 21,
    23, 24, 27, 41, 31, 27, 35, 26, 28, 36, 39, 21, 17, 22, 17, 19, 15, 34, 10, 15,
    22, 18, 15, 20, 15, 22, 19, 16, 30, 27, 29, 23, 20, 16, 21, 21, 25, 16, 18, 15,
    18, 14, 10, 15,  8, 15,  6, 11,  8,  7, 18, 16, 13, 12, 13, 20, 15, 16, 12, 18,
    15, 16, 13, 15, 16, 11, 11,
)
# fmt: on
YEARS, DECADE = range(1900, 2007), 10
BOOK_SURPRISE = {2: 341.8787, 3: 328.5275}
BOOK_PATH = (413.27542, 343.76023, 343.13618)
"""The surprise of two states after 0, 1 and 2 iterations of EM."""
MEAN_FIELD_GAP = 2.031
RATES, CHANGE = (10, 30), 0.1
"""Where EM starts, as in the book: the lowest and the highest rate, and the probability of each change of state."""
MAX_STEPS, TOLERANCE = 100, 1e-3
DARK, LIGHT = "#0b3c5d", "#e69f00"

Program = Callable[[Tensor], None]

# %%
# The model: a plain loop over the years
# --------------------------------------


def poisson_hmm(num_states: int) -> Program:
    """Returns the generative model: a plain loop over the years."""

    def model(u: Tensor) -> None:
        sticky = torch.full((num_states, num_states), CHANGE)
        sticky.fill_diagonal_(1 - (num_states - 1) * CHANGE)
        initial = pyro.param("initial", torch.ones(num_states) / num_states, constraint=constraints.simplex)
        transition = pyro.param("transition", sticky, constraint=constraints.simplex)
        rates = pyro.param("rates", torch.linspace(*RATES, num_states), constraint=constraints.positive)
        probs = initial
        for t in range(len(u)):
            v = pyro.sample(f"v_{t}", dist.Categorical(probs))
            pyro.sample(f"u_{t}", dist.Poisson(rates[v]), obs=u[t])
            probs = transition[v]

    return model


def chain_guide(num_states: int) -> Program:
    """Returns a guide in which each year's state depends on the last year's."""

    def guide(u: Tensor) -> None:
        uniform = torch.ones(len(u), num_states, num_states) / num_states
        first = pyro.param("guide_first", uniform[0, 0], constraint=constraints.simplex)
        later = pyro.param("guide_later", uniform[1:], constraint=constraints.simplex)
        v = pyro.sample("v_0", dist.Categorical(first))
        for t, table in enumerate(later, start=1):
            v = pyro.sample(f"v_{t}", dist.Categorical(table[v]))

    return guide


# %%
# EM, and two guides to the model that it found
# ---------------------------------------------


def learn(num_states: int, u: Tensor) -> vfe.EMRun:
    """Returns the run of EM from the book's start; the model's parameters stay in Pyro's store."""
    pyro.clear_param_store()
    return vfe.EM(poisson_hmm(num_states)).run(u, progress_bar=False)


def sweep(guide: vfe.AutoMeanField, model: Program, u: Tensor) -> list[float]:
    """Returns F after each sweep that fits a mean-field guide to the model as it is, site by site in closed form."""
    em = vfe.EM(model, guide, e_phase=vfe.Coordinate())
    history = [em.e_phase(u).free_energy, em.e_phase(u).free_energy]
    while history[-2] - history[-1] > TOLERANCE:
        history.append(em.e_phase(u).free_energy)
    return history


def descend(title: str, guide: Program, model: Program, u: Tensor) -> tuple[vfe.Decomposition, int]:
    """Returns F taken apart, and the number of steps, once five of SVI have changed F by less than a milli-nat.

    F and its gradient are exact, so there is no noise for the optimiser to average away: Rprop follows the signs of the
    gradient alone. The guide's parameters live as long as the scope: two mean-field guides have them under one name.
    """
    held_fixed = poutine.block(model, hide_types=["param"])
    elbo = vfe.FreeEnergy()
    svi = SVI(held_fixed, guide, pyro.optim.Rprop({"lr": 0.5, "step_sizes": (1e-6, 2.0)}), loss=elbo)
    history: list[float] = []
    store = pyro.get_param_store()
    bar = tqdm(desc=title.ljust(24), bar_format="{desc} {n_fmt:>3} steps  {elapsed}{postfix}")
    with store.scope(store.get_state()), bar as progress:
        while len(history) < MAX_STEPS and (len(history) < 6 or np.ptp(history[-6:]) > TOLERANCE):
            history.append(svi.step(u))
            progress.set_postfix_str(f"F = {history[-1]:.4f} nats", refresh=False)
            progress.update()
        return elbo.decompose(held_fixed, guide, u), len(history)


# %%
# Pictures
# --------


def by_year(values: dict[str, Tensor]) -> np.ndarray:
    """Returns what is known of the sites v_0, v_1, ... as one array, years first."""
    return np.stack([values[f"v_{t}"].numpy() for t in range(len(YEARS))])


def draw(path: Path, u: Tensor, posterior: vfe.Posterior, active: dict[str, np.ndarray], gap: np.ndarray) -> None:
    """Draws the states, how sure of the active one posterior and guide are, and the gap by year; stays open."""
    figure, (top, middle, bottom) = plt.subplots(
        3, 1, figsize=(10, 10), sharex=True, height_ratios=(5, 2, 2), layout="constrained"
    )
    steps = np.arange(len(YEARS))
    vfe.plot_states(posterior, "v_{}", u, ax=top)
    quiet, active_rate = pyro.param("rates").tolist()
    title = f"Major earthquakes in the world: about {quiet:.0f} a year in state 0, {active_rate:.0f} in state 1"
    top.set(title=title, xlabel="", ylabel="earthquakes")
    middle.fill_between(
        steps, active["exact"], step="mid", color=LIGHT, alpha=0.6, linewidth=0, label="exact posterior"
    )
    middle.step(steps, active["mean field"], where="mid", color=DARK, linewidth=1.4, label="mean-field guide")
    middle.set(title="Probability of the active state: mean field is too sure", ylabel="probability", ylim=(0, 1.02))
    middle.legend(loc="center right")
    bottom.bar(steps, gap, width=0.8, color=DARK)
    bottom.set(title=f"What mean field costs: {gap.sum():.2f} nats in all", ylabel="gap, nats", xlabel="year")
    bottom.set_xticks(steps[::DECADE], YEARS[::DECADE])
    for axes in (top, middle, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def in_words(two: vfe.EMRun, three: vfe.EMRun, mean_field: Tensor, chain: Tensor, gap: np.ndarray) -> str:
    """Returns what surprises and gaps mean, in sentences."""
    worst = np.sort(np.argsort(gap)[-4:])
    years = ", ".join(str(YEARS[t]) for t in worst)
    told = (
        f"EM took {two.n_iter} iterations to {two.free_energy:.4f} nats. Its E-phase is exact, so all of this is "
        "surprise, the model's share; both guides invert the same model, and it is the same in both tables.",
        f"Mean field treats the years' states as independent. This costs {mean_field:.2f} nats that the "
        f"chain-structured guide does not cost: the chain's gap is {chain:.1g}. It is lost where the state is in "
        f"doubt, {gap[worst].sum() / gap.sum():.0%} of it in the years {years}.",
        f"A better guide can win no more than these {mean_field:.2f} nats. A better model can: with a third state the "
        f"surprise is {three.free_energy:.4f} nats, {two.free_energy - three.free_energy:.2f} less. F alone would "
        "not have told which of the two to work on.",
    )
    return "\n".join(["In words", *(fill(text, 116, initial_indent="  ", subsequent_indent="  ") for text in told)])


# %%
# All of it
# ---------


def main() -> None:
    """Fits, takes apart, draws, tells, and checks the numbers against the book."""
    parser = argparse.ArgumentParser(description="A hidden Markov model of the earthquake counts, taken apart.")
    parser.add_argument(
        "--output", type=Path, default=Path(sys.argv[0]).parent / "output", help="folder for the picture"
    )
    picture = parser.parse_args().output / "earthquakes.png"
    torch.set_default_dtype(torch.float64)
    u = torch.tensor(COUNTS, dtype=torch.float64)

    three = learn(3, u)
    two = learn(2, u)
    rates = pyro.param("rates").detach().numpy()
    model = poisson_hmm(2)
    mean_field_guide = vfe.AutoMeanField(model)
    descent, num_steps = descend("mean field, by gradients", vfe.AutoMeanField(model), model, u)
    sweeps = sweep(mean_field_guide, model, u)
    mean_field = vfe.FreeEnergy().decompose(model, mean_field_guide, u)
    chain, _ = descend("chain, by gradients", chain_guide(2), model, u)

    posterior = vfe.posterior(model, u)
    gap = by_year(mean_field.gap_by_site())
    exact = by_year(posterior.marginals())[:, 1]
    approximate = by_year({name: mean_field_guide.probabilities(name) for name in posterior.sites})[:, 1]
    draw(picture, u, posterior, {"exact": exact, "mean field": approximate}, gap)

    print(f"\nTwo states by EM, phase by phase\n{two.history}")
    print(f"\nTwo states, {rates[0]:.1f} and {rates[1]:.1f} earthquakes a year: a mean-field guide\n{mean_field}")
    print(
        f"This took {len(sweeps)} sweeps in closed form; {num_steps} gradient steps come to {descent.free_energy:.4f}."
    )
    print(f"\nThe same model: a chain-structured guide\n{chain}\n")
    print(in_words(two, three, mean_field.gap, chain.gap, gap))
    print(f"Picture: {picture}")

    for iteration, known in enumerate(BOOK_PATH):
        assert abs(two.history.of("E").free_energy[iteration] - known) < 1e-5
    assert abs(two.free_energy - BOOK_SURPRISE[2]) < 1e-4
    assert abs(three.free_energy - BOOK_SURPRISE[3]) < 1e-4
    for terms in (mean_field, chain):
        torch.testing.assert_close(terms.free_energy, terms.surprise + terms.gap)
    assert abs(mean_field.gap - MEAN_FIELD_GAP) < 0.01
    assert mean_field.free_energy < descent.free_energy + TOLERANCE
    assert abs(gap.sum() - mean_field.gap) < 1e-9
    assert chain.gap < 0.01


if __name__ == "__main__":
    main()
