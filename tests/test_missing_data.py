"""Missing data that are coded as NaN: the message says which mask hides them, and works when it is followed."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from checks import assert_equal
from programs.case import simplex, tensor
from torch import Tensor

import pyro_vfe as vfe
from pyro_vfe.errors import NotFiniteError, SupportError

NAN = math.nan
P = tensor([0.3, 0.7])
MEANS = tensor([-1.0, 1.5])
PAIRS = tensor([[-1.0, 0.5], [1.5, 2.0]])
COVARIANCE = tensor([[1.0, 0.4], [0.4, 2.0]])
INITIAL, TRANSITION = simplex("initial", 2), simplex("transition", 2, 2, seed=1)

Program = Callable[[Any], None]


def written(source: str, mask: str = "") -> Program:
    """A model from its source, with a mask beside its data or without."""
    scope: dict[str, Any] = dict(globals())
    exec("def model(u):\n" + source.replace("obs=u", f"obs=u{mask}").replace("obs=u[i]", f"obs=u[i]{mask}"), scope)
    model: Program = scope["model"]
    return model


ALONE = """
  z = pyro.sample("z", dist.Categorical(P))
  pyro.sample("u", dist.Normal(MEANS[z], 1.0), obs=u)
"""
IN_A_PLATE = """
  with pyro.plate("data", len(u)):
    z = pyro.sample("z", dist.Categorical(P))
    pyro.sample("u", dist.Normal(MEANS[z], 1.0), obs=u)
"""
UNVALIDATED = IN_A_PLATE.replace("1.0)", "1.0, validate_args=False)")
IN_TWO_PLATES = """
  with pyro.plate("data", u.shape[1], dim=-1):
    z = pyro.sample("z", dist.Categorical(P))
    with pyro.plate("repeats", u.shape[0], dim=-2):
      pyro.sample("u", dist.Normal(MEANS[z], 1.0), obs=u)
"""
COUNTS = IN_A_PLATE.replace("dist.Normal(MEANS[z], 1.0)", "dist.Poisson(MEANS.exp()[z])")
ANSWERS = IN_A_PLATE.replace("dist.Normal(MEANS[z], 1.0)", "dist.Categorical(PAIRS.softmax(-1)[z])")
EVENTS = IN_A_PLATE.replace("dist.Normal(MEANS[z], 1.0)", "dist.Normal(PAIRS[z], 1.0).to_event(1)")
VECTORS = IN_A_PLATE.replace("dist.Normal(MEANS[z], 1.0)", "dist.MultivariateNormal(PAIRS[z], COVARIANCE)")
MATRICES = IN_A_PLATE.replace(
    "dist.Normal(MEANS[z], 1.0)", "dist.Normal(MEANS[z][..., None, None], torch.ones(2, 2)).to_event(2)"
)
HIDDEN_CHAIN = """
  with pyro.plate("time", len(u)):
    z = pyro.sample("z", vfe.MarkovChain(INITIAL, TRANSITION))
    pyro.sample("u", dist.Normal(MEANS[z], 1.0), obs=u)
"""
CHAIN = """
  with pyro.plate("time", len(u)):
    pyro.sample("u", vfe.MarkovChain(INITIAL, TRANSITION), obs=u)
"""


def mixture(log_probs: Callable[[int], Tensor], seen: Tensor) -> Tensor:
    """The log evidence of independent data, those that are seen."""
    log_joint = torch.stack([P[k].log() + torch.where(seen, log_probs(k), 0.0) for k in range(2)])
    return log_joint.logsumexp(0).sum()


def normals(u: Tensor) -> Tensor:
    filled = u.nan_to_num()
    return mixture(lambda k: dist.Normal(MEANS[k], 1.0).log_prob(filled), ~u.isnan())


def repeated(u: Tensor) -> Tensor:
    filled, seen = u.nan_to_num(), ~u.isnan()
    return mixture(lambda k: (dist.Normal(MEANS[k], 1.0).log_prob(filled) * seen).sum(0), torch.tensor(True))


def counts(u: Tensor) -> Tensor:
    return mixture(lambda k: dist.Poisson(MEANS[k].exp()).log_prob(u.nan_to_num()), ~u.isnan())


def answers(u: Tensor) -> Tensor:
    return mixture(lambda k: PAIRS[k].log_softmax(-1)[u.nan_to_num().long()], ~u.isnan())


def events(u: Tensor) -> Tensor:
    filled, seen = u.nan_to_num(), ~u.isnan().any(-1)
    return mixture(lambda k: dist.Normal(PAIRS[k], 1.0).log_prob(filled).sum(-1), seen)


def vectors(u: Tensor) -> Tensor:
    filled, seen = u.nan_to_num(), ~u.isnan().any(-1)
    return mixture(lambda k: torch.distributions.MultivariateNormal(PAIRS[k], COVARIANCE).log_prob(filled), seen)


def matrices(u: Tensor) -> Tensor:
    filled, seen = u.nan_to_num(), ~u.isnan().any(-1).any(-1)
    return mixture(lambda k: dist.Normal(MEANS[k], 1.0).log_prob(filled).sum((-1, -2)), seen)


def path_sums(u: Tensor, emission: Callable[[Tensor], Tensor]) -> Tensor:
    """Sums over all paths of three states."""
    total = torch.zeros(())
    for path in torch.cartesian_prod(*[torch.arange(2)] * 3):
        prior = INITIAL[path[0]] * TRANSITION[path[0], path[1]] * TRANSITION[path[1], path[2]]
        total = total + prior * torch.where(u.isnan(), 1.0, emission(path)).prod()
    return total.log()


def hidden_chain(u: Tensor) -> Tensor:
    return path_sums(u, lambda path: dist.Normal(MEANS[path], 1.0).log_prob(u.nan_to_num()).exp())


def chain(u: Tensor) -> Tensor:
    return path_sums(u, lambda path: (path == u.nan_to_num()).double())


CASES: dict[str, tuple[str, list[Any] | float, Callable[[Tensor], Tensor]]] = {
    "one datum": (ALONE, NAN, normals),
    "in a plate": (IN_A_PLATE, [0.5, NAN, 1.0], normals),
    "nothing but gaps": (IN_A_PLATE, [NAN, NAN], normals),
    "without validation": (UNVALIDATED, [0.5, NAN, 1.0], normals),
    "in two plates": (IN_TWO_PLATES, [[0.5, NAN, 1.0], [NAN, 1.0, 2.0]], repeated),
    "counts": (COUNTS, [1.0, NAN, 4.0], counts),
    "answers": (ANSWERS, [1.0, NAN, 0.0], answers),
    "events": (EVENTS, [[0.5, NAN], [0.1, 1.0], [NAN, NAN]], events),
    "vectors": (VECTORS, [[0.5, NAN], [0.1, 1.0], [NAN, 2.0]], vectors),
    "matrices": (MATRICES, [[[0.5, NAN], [0.1, 1.0]], [[0.5, 1.5], [0.1, 1.0]]], matrices),
    "data of a chain": (HIDDEN_CHAIN, [0.5, NAN, 1.0], hidden_chain),
    "a chain": (CHAIN, [1.0, NAN, 0.0], chain),
}


def line_of(error: BaseException) -> str:
    """The mask that a message says."""
    (line,) = re.findall(r"write `(obs_mask=.*)` beside its obs=, u being the data", str(error))
    return f", {line}"


def refusal(source: str, u: Any) -> str:
    """The line of the message at first use."""
    with pytest.raises(SupportError, match="observes NaN") as caught:
        vfe.posterior(written(source), u)
    assert "'u' of the model" in str(caught.value)
    return line_of(caught.value)


@pytest.mark.parametrize("case", CASES)
def test_the_mask_that_the_message_says_hides_what_is_missing(case: str) -> None:
    source, numbers, expected = CASES[case]
    u = tensor(numbers)
    line = refusal(source, u)
    assert line in (
        ", obs_mask=~u.isnan()",
        ", obs_mask=~u.isnan().any(-1)",
        ", obs_mask=~u.isnan().flatten(-2).any(-1)",
    )
    assert_equal(vfe.posterior(written(source, line), u).log_evidence, expected(u), 1e-10)


@pytest.mark.parametrize("case", [case for case in CASES if case != "in two plates"])
@pytest.mark.parametrize("of", [np.array, lambda numbers: numbers], ids=["numpy", "list"])
def test_data_that_are_no_tensors_have_a_mask_of_their_own(case: str, of: Callable[[Any], Any]) -> None:
    source, numbers, expected = CASES[case]
    line = refusal(source, of(numbers))
    assert_equal(vfe.posterior(written(source, line), of(numbers)).log_evidence, expected(tensor(numbers)), 1e-10)


def test_series_and_frames_have_a_mask_of_their_own() -> None:
    pd = pytest.importorskip("pandas")
    for source, data, expected in (
        (IN_A_PLATE, pd.Series([0.5, NAN, 1.0], index=[3, 1, 2]), normals),
        (IN_A_PLATE, pd.Series([1, None, 2], dtype="Int64"), normals),
        (EVENTS, pd.DataFrame([[0.5, NAN], [0.1, 1.0]], columns=["x", "y"]), events),
    ):
        line = refusal(source, data)
        u = torch.tensor(np.asarray(data, dtype=float))
        assert_equal(vfe.posterior(written(source, line), data).log_evidence, expected(u), 1e-10)


def test_a_mask_that_hides_too_little_is_told_what_it_lacks() -> None:
    u, mask = tensor([0.5, NAN, NAN]), torch.tensor([True, False, True])
    with pytest.raises(SupportError, match="'u_observed' of the model observes NaN, 1 of 3") as caught:
        vfe.posterior(written(IN_A_PLATE, ", obs_mask=torch.tensor([True, False, True])"), u)
    (line,) = re.findall(r"`(obs_mask=.*)`", str(caught.value))
    assert line == "obs_mask=mask & ~u.isnan()"
    line = line.replace("mask &", "torch.tensor([True, False, True]) &")
    assert_equal(vfe.posterior(written(IN_A_PLATE, f", {line}"), u).log_evidence, normals(u), 1e-10)
    assert not bool(mask.all())


def test_gradients_and_estimates_leave_out_what_is_missing() -> None:
    u, line = tensor([0.5, NAN, 1.0, -2.0]), ", obs_mask=~u.isnan()"
    source = IN_A_PLATE.replace("MEANS[z]", 'pyro.param("means", MEANS.clone())[z]')
    loss = vfe.FreeEnergy().differentiable_loss(written(source, line), None, u)
    (gradient,) = torch.autograd.grad(loss, [pyro.param("means").unconstrained()])
    means = MEANS.clone().requires_grad_()
    seen = u[~u.isnan()]
    log_joint = torch.stack([P[k].log() + dist.Normal(means[k], 1.0).log_prob(seen) for k in range(2)])
    assert_equal(gradient, torch.autograd.grad(-log_joint.logsumexp(0).sum(), [means])[0], 1e-8)
    run = vfe.EM(written(source, line)).run(u, progress_bar=False, fresh=True)
    whole = vfe.EM(written(source)).run(seen, progress_bar=False, fresh=True)
    assert_equal(torch.tensor(run.free_energy), torch.tensor(whole.free_energy), 1e-6)
    by_element = vfe.FreeEnergy().decompose(written(source, line), None, u).by("data").surprise
    assert_equal(by_element[1], torch.zeros(()), 1e-12)


@pytest.mark.parametrize("source", [IN_A_PLATE, UNVALIDATED])
def test_nan_in_data_of_a_later_call_is_told_as_at_the_first(source: str) -> None:
    model, elbo = written(source), vfe.FreeEnergy()
    elbo.loss(model, None, tensor([0.5, 2.0, 1.0]))
    with pytest.raises((SupportError, NotFiniteError), match="observes NaN, 1 of 3") as caught:
        elbo.loss(model, None, tensor([0.5, NAN, 1.0]))
    assert line_of(caught.value) == ", obs_mask=~u.isnan()"
    with pytest.raises((SupportError, NotFiniteError), match="observes NaN, 1 of 3"):
        elbo.decompose(model, None, tensor([0.5, NAN, 1.0]))


def test_a_distribution_that_knows_of_gaps_is_left_to_it() -> None:
    class Gappy(dist.Normal):
        """A normal that takes NaN for a missing number."""

        support = torch.distributions.constraints.independent(dist.constraints.dependent, 0)

        def log_prob(self, value: Tensor) -> Tensor:
            return torch.where(value.isnan(), 0.0, super().log_prob(value.nan_to_num()))

    u = tensor([0.5, NAN, 1.0])
    scope = {"Gappy": Gappy}
    exec(
        "def model(u):" + IN_A_PLATE.replace("dist.Normal(MEANS[z], 1.0)", "Gappy(MEANS[z], 1.0, False)"),
        globals() | scope,
        scope,
    )
    assert_equal(vfe.posterior(scope["model"], u).log_evidence, normals(u), 1e-10)
