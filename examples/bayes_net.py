r"""
Bayesian networks from BIF files
================================

A Bayesian network as an ordinary Pyro program, for the exact probability of the evidence *e* and for every node's
marginal given it:

.. math::

    P(x) &= \prod_n P(x_n \mid \text{parents}(x_n))

    P(e) &= \sum_{x \text{ that agree with } e} P(x)

There is one sample site per node, in an order in which parents come first; the evidence goes in by
``poutine.condition``. Networks that pgmpy carries are named (asia, alarm, andes, pigs, link, munin, ...); any other is
the path of its BIF file::

    python examples/bayes_net.py asia alarm
    python examples/bayes_net.py asia --evidence smoke=yes --evidence xray=no
    python examples/bayes_net.py path/to/network.bif

Without other evidence the first five leaves of the file are observed to be in their first states.

References:

- Lauritzen and Spiegelhalter (1988), Local computations with probabilities on graphical structures and their
  application to expert systems: the network asia.
- Scutari (2010), Learning Bayesian networks with the bnlearn R package: the repository the files come from.
"""

import argparse
import csv
import gzip
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.axes import Axes
from pgmpy.readwrite import BIFReader
from pyro import poutine
from torch import Tensor

import pyro_vfe as vfe

Program = Callable[[], None]
Evidence = dict[str, str]

EVIDENCE_PROBABILITIES = {
    "asia": 0.0706701044,
    "alarm": 0.005999307001315008,
    "insurance": 0.01756044687081923,
    "hailfinder": 0.0001443533991786794,
    "win95pts": 0.008372844483488306,
    "andes": 3.151578597544268e-06,
    "pigs": 0.00439453125,
}
"""Known answers: P(e) for the first states of the first five leaves."""
SHOWN_NODES = 4
MOST_DRAWN = 12
"""Networks of more nodes are not drawn."""
DARK, PALE = "#0b3c5d", "#b8c4cc"

# %%
# A network, and the program it is
# --------------------------------


@dataclass(frozen=True, eq=False)
class Network:
    """A Bayesian network as its file gives it."""

    name: str
    states: dict[str, list[str]]
    """The names of each node's states, in the order of the file."""

    parents: dict[str, list[str]]
    tables: dict[str, Tensor]
    """P(node | parents), of shape `(*parents, node)`."""

    @property
    def leaves(self) -> list[str]:
        """The nodes without children."""
        with_children = {parent for parents in self.parents.values() for parent in parents}
        return [node for node in self.states if node not in with_children]

    @property
    def parents_first(self) -> list[str]:
        """The nodes in the order of the file, but each after its parents."""
        ordered: dict[str, None] = {}

        def visit(node: str) -> None:
            if node not in ordered:
                for parent in self.parents[node]:
                    visit(parent)
                ordered[node] = None

        for node in self.states:
            visit(node)
        return list(ordered)


def read_network(source: str) -> Network:
    """Returns the network of a BIF file, or the one that pgmpy carries under a name."""
    path = Path(source)
    if path.suffix == ".bif":
        text = path.read_text(encoding="utf-8")
    else:
        packed = files("pgmpy").joinpath(f"utils/example_models/{source}.bif.gz")
        text = gzip.decompress(packed.read_bytes()).decode("utf-8")
    bif = BIFReader(string=text)
    states = {node: bif.variable_states[node] for node in bif.variable_names}
    tables = {}
    for node in states:
        sizes = [len(states[name]) for name in (node, *bif.variable_parents[node])]
        tables[node] = torch.as_tensor(bif.variable_cpds[node], dtype=torch.float64).reshape(sizes).movedim(0, -1)
    return Network(path.stem, states, bif.variable_parents, tables)


def as_program(network: Network) -> Program:
    """Returns the generative model: each node is drawn from the row of its table that its parents select."""
    order = network.parents_first

    def model() -> None:
        values: dict[str, Tensor] = {}
        for node in order:
            row = network.tables[node][tuple(values[parent] for parent in network.parents[node])]
            values[node] = pyro.sample(node, dist.Categorical(row))

    return model


# %%
# What is asked of it
# -------------------


def first_leaves(network: Network) -> Evidence:
    """Returns the evidence that is the default: the first states of the first five leaves."""
    return {leaf: network.states[leaf][0] for leaf in network.leaves[:5]}


def given(network: Network, evidence: Evidence) -> Program:
    """Returns the program of a network with some nodes observed."""
    data = {node: torch.tensor(network.states[node].index(state)) for node, state in evidence.items()}
    return poutine.condition(as_program(network), data=data)


def nothing() -> None:
    """The empty guide: every node is summed out inside the model."""


@dataclass(frozen=True, eq=False)
class Answer:
    """What is asked of a network, and what it took."""

    network: Network
    evidence: Evidence
    log_evidence: float
    marginals: dict[str, Tensor]
    flops: int
    """Multiply-adds of the elimination that gives P(e)."""

    bytes: int
    """Memory of its intermediate tables."""

    seconds: tuple[float, float, float]
    """To read the file, to run the program and find P(e), and to find all marginals."""


def solve(source: str, evidence: Evidence | None = None) -> Answer:
    """Returns P(e) and all marginals of a network."""
    ticks = [time.perf_counter()]
    network = read_network(source)
    evidence = first_leaves(network) if evidence is None else evidence
    model = given(network, evidence)
    ticks.append(time.perf_counter())
    posterior = vfe.posterior(model)
    ticks.append(time.perf_counter())
    marginals = posterior.marginals()
    ticks.append(time.perf_counter())
    plan = vfe.explain(model, nothing).outline
    read, run, propagated = (end - start for start, end in pairwise(ticks))
    return Answer(
        network, evidence, float(posterior.log_evidence), marginals, plan.flops, plan.bytes, (read, run, propagated)
    )


# %%
# Tables and pictures
# -------------------


def in_words(answer: Answer) -> str:
    """Returns the evidence, its probability and the marginals of a few nodes, in lines."""
    seen = ", ".join(f"{node} = {state}" for node, state in answer.evidence.items())
    lines = [f"{answer.network.name}: P({seen}) = {math.exp(answer.log_evidence):.10g}"]
    for node, probs in list(answer.marginals.items())[:SHOWN_NODES]:
        shown = ", ".join(f"{s} {p:.4f}" for s, p in zip(answer.network.states[node], probs.tolist(), strict=True))
        lines.append(f"    {node}: {shown}")
    if len(answer.marginals) > SHOWN_NODES:
        lines.append(f"    and {len(answer.marginals) - SHOWN_NODES} more")
    return "\n".join(lines)


def as_table(answers: Sequence[Answer]) -> str:
    """Returns sizes, costs and times, one row per network."""
    header = ("network", "nodes", "table entries", "P(e)", "flops", "MiB", "read s", "P(e) s", "marginals s")
    rows = [
        (
            answer.network.name,
            f"{len(answer.network.states)}",
            f"{sum(table.numel() for table in answer.network.tables.values()):,}",
            f"{math.exp(answer.log_evidence):.6g}",
            f"{answer.flops:,}",
            f"{answer.bytes / 2**20:.1f}",
            *(f"{seconds:.3f}" for seconds in answer.seconds),
        )
        for answer in answers
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in (header, *rows))


def save(answer: Answer, folder: Path) -> None:
    """Writes all marginals as rows node, state, probability."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{answer.network.name}_marginals.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("node", "state", "probability"))
        for node, probs in answer.marginals.items():
            writer.writerows((node, *pair) for pair in zip(answer.network.states[node], probs.tolist(), strict=True))


def generations(network: Network) -> list[list[str]]:
    """Returns the nodes in layers, each after all of its parents."""
    layer_of: dict[str, int] = {}
    for node in network.parents_first:
        layer_of[node] = 1 + max((layer_of[parent] for parent in network.parents[node]), default=-1)
    return [[node for node in layer_of if layer_of[node] == layer] for layer in range(max(layer_of.values()) + 1)]


def draw(answer: Answer, folder: Path) -> None:
    """Draws a network, each node with its marginals without and with the evidence; the picture stays open."""
    network, layers = answer.network, generations(answer.network)
    places = {
        node: ((i + 0.5) / len(layer), 1 - (depth + 0.5) / len(layers))
        for depth, layer in enumerate(layers)
        for i, node in enumerate(layer)
    }
    figure, axes = plt.subplots(figsize=(10, 7.5), layout="constrained")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.set_title(f"{network.name}: what the evidence tells, of probability {math.exp(answer.log_evidence):.4g}")
    axes.axis("off")
    for node, parents in network.parents.items():
        for parent in parents:
            (x, y), (child_x, child_y) = places[parent], places[node]
            arrow = {"arrowstyle": "-|>", "color": "0.3", "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", (child_x, child_y + 0.085), (x, y - 0.075), arrowprops=arrow)
    prior = vfe.posterior(as_program(network)).marginals()
    for node, (x, y) in places.items():
        axes.add_patch(plt.Rectangle((x - 0.1, y - 0.075), 0.2, 0.16, facecolor="white", edgecolor="0.7", zorder=2))
        states = network.states[node]
        seen = answer.evidence.get(node)
        given_evidence = answer.marginals[node].tolist() if seen is None else [float(state == seen) for state in states]
        draw_node(
            axes.inset_axes((x - 0.06, y - 0.065, 0.15, 0.1), zorder=3), states, prior[node].tolist(), given_evidence
        )
        name = node if seen is None else f"{node} = {seen} (seen)"
        axes.text(x, y + 0.06, name, ha="center", va="center", weight="normal" if seen is None else "bold", zorder=3)
    patches = [plt.Rectangle((0, 0), 1, 1, facecolor=color, edgecolor="0.2") for color in (PALE, DARK)]
    figure.legend(
        patches, ["without evidence", "given the evidence"], loc="outside lower center", ncols=2, frameon=False
    )
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{network.name}.png", dpi=150)


def draw_node(axes: Axes, states: list[str], prior: list[float], given_evidence: list[float]) -> None:
    """Draws the probabilities of a node's states, without and with the evidence."""
    at = np.arange(len(states))
    axes.barh(at - 0.2, prior, 0.4, color=PALE, edgecolor="0.2", linewidth=0.6)
    axes.barh(at + 0.2, given_evidence, 0.4, color=DARK, edgecolor="0.2", linewidth=0.6)
    axes.set_yticks(at, states, fontsize="small")
    axes.set(xlim=(0, 1), ylim=(len(states) - 0.5, -0.5), xticks=())
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(length=0)


# %%
# All of it
# ---------


def main() -> None:
    """Reads, conditions, sums out, tells, and checks the numbers against known answers."""
    parser = argparse.ArgumentParser(description="Exact P(e) and marginals of Bayesian networks in BIF files.")
    parser.add_argument(
        "networks", nargs="*", default=list(EVIDENCE_PROBABILITIES), help="names, or paths of BIF files"
    )
    parser.add_argument("--evidence", action="append", metavar="NODE=STATE", help="an observed node; may be repeated")
    parser.add_argument(
        "--output", type=Path, default=Path(sys.argv[0]).parent / "output", help="folder for the marginals and pictures"
    )
    args = parser.parse_args()
    evidence = dict(pair.split("=", 1) for pair in args.evidence) if args.evidence else None

    answers = []
    for source in args.networks:
        answers.append(solve(source, evidence))
        print(f"{in_words(answers[-1])}\n")
        save(answers[-1], args.output)
        if len(answers[-1].network.states) <= MOST_DRAWN:
            draw(answers[-1], args.output)
    print(as_table(answers))
    print(f"\nAll marginals, and pictures of small networks: {args.output}")

    for answer in answers:
        for probs in answer.marginals.values():
            torch.testing.assert_close(probs.sum(), torch.tensor(1.0, dtype=torch.float64))
        if evidence is None and answer.network.name in EVIDENCE_PROBABILITIES:
            exact = EVIDENCE_PROBABILITIES[answer.network.name]
            assert abs(math.exp(answer.log_evidence) / exact - 1) < 1e-9, answer.network.name


if __name__ == "__main__":
    main()
