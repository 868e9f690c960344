"""Bayesian networks of up to 441 nodes as Pyro programs: P(e) and every marginal against what others find."""

import math
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from examples.bayes_net import EVIDENCE_PROBABILITIES, Answer, Network, solve

close = torch.testing.assert_close

SPRINKLER = """network sprinkler {
}
variable grass {
  type discrete [ 2 ] { dry, wet };
}
variable rain {
  type discrete [ 3 ] { none, light, heavy };
}
probability ( grass | rain ) {
  (none) 0.9, 0.1;
  (light) 0.25, 0.75;
  (heavy) 0.0, 1.0;
}
probability ( rain ) {
  table 0.5, 0.3, 0.2;
}
"""


@cache
def answer_of(name: str) -> Answer:
    return solve(name)


@pytest.mark.parametrize("name", EVIDENCE_PROBABILITIES)
def test_the_probability_of_the_evidence_is_the_known_one(name: str) -> None:
    found = math.exp(answer_of(name).log_evidence)
    assert found == pytest.approx(EVIDENCE_PROBABILITIES[name], rel=1e-9, abs=0)


@pytest.mark.parametrize("name", EVIDENCE_PROBABILITIES)
def test_every_marginal_is_pyagrums(name: str) -> None:
    answer = answer_of(name)
    expected = by_pyagrum(answer.network, answer.evidence)
    assert answer.marginals.keys() == expected.keys()
    for node, probs in answer.marginals.items():
        close(probs, expected[node], rtol=1e-10, atol=1e-12)


def test_asia_equals_the_full_joint_table() -> None:
    answer = answer_of("asia")
    network = answer.network
    nodes = list(network.states)
    joint = torch.zeros([len(network.states[node]) for node in nodes], dtype=torch.float64)
    for assignment in product(*(range(size) for size in joint.shape)):
        at = dict(zip(nodes, assignment, strict=True))
        if all(network.states[node][at[node]] == state for node, state in answer.evidence.items()):
            rows = (network.tables[n][tuple(at[p] for p in (*network.parents[n], n))] for n in nodes)
            joint[assignment] = math.prod(map(float, rows))
    assert math.exp(answer.log_evidence) == pytest.approx(float(joint.sum()), rel=1e-12)
    for node, probs in answer.marginals.items():
        others = [dim for dim, other in enumerate(nodes) if other != node]
        close(probs, joint.sum(others) / joint.sum())


def test_a_file_is_read_by_its_path_and_children_may_stand_before_their_parents(tmp_path: Path) -> None:
    path = tmp_path / "sprinkler.bif"
    path.write_text(SPRINKLER, encoding="utf-8")
    assert solve(str(path)).evidence == {"grass": "dry"}
    answer = solve(str(path), {"grass": "wet"})
    wet = torch.tensor([0.5 * 0.1, 0.3 * 0.75, 0.2 * 1.0], dtype=torch.float64)
    assert math.exp(answer.log_evidence) == pytest.approx(float(wet.sum()), rel=1e-12)
    close(answer.marginals["rain"], wet / wet.sum())


def by_pyagrum(network: Network, evidence: dict[str, str]) -> dict[str, Tensor]:
    """The marginals by lazy propagation, from the same tables in double precision."""
    gum = pytest.importorskip("pyagrum")
    bayes_net = gum.BayesNet()
    for node, states in network.states.items():
        bayes_net.add(gum.LabelizedVariable(node, node, len(states)))
    for node, parents in network.parents.items():
        for parent in parents:
            bayes_net.addArc(parent, node)
    for node, table in network.tables.items():
        axes = (*network.parents[node], node)
        probs = table / table.sum(-1, keepdim=True)
        # pyAgrum's first variable runs fastest.
        dims = [axes.index(name) for name in reversed(bayes_net.cpt(node).names)]
        bayes_net.cpt(node)[:] = probs.permute(dims).contiguous().numpy()
    engine = gum.LazyPropagation(bayes_net)
    engine.setEvidence({node: network.states[node].index(state) for node, state in evidence.items()})
    engine.makeInference()
    hidden = (node for node in network.states if node not in evidence)
    return {node: torch.from_numpy(engine.posterior(node).toarray()) for node in hidden}
