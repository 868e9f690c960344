"""Programs that change in place what a statement was given: it counts as it was when the statement was reached."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import gradients, oracle
from programs.case import bernoulli, categorical, empty, noise, simplex, tensor, unit
from torch import Tensor

import pyro_vfe as vfe
from pyro_vfe.errors import SpotCheckError, StructureError, VFEError, VFEWarning
from pyro_vfe.learning.machine import Machine
from pyro_vfe.program.drawing_runs import total_log_prob
from pyro_vfe.program.dreams import dream
from pyro_vfe.program.programs import Programs
from pyro_vfe.program.replays import replayed

CAPTURED = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0], [0, 1, 1, 0]]).double()
DATA = tensor([0.1, 1.2, 0.7])
SAMPLED: dict[str, Any] = {"enumerate": None}


def capture_recapture(in_place: bool, mask_latents: bool = True) -> Callable[[Tensor], None]:
    """Cormack, Jolly and Seber: an animal counts from its first capture on, survives or not, and is caught or not."""

    def model(captured: Tensor) -> None:
        survival, catching = unit("survival"), unit("catching", seed=1)
        with pyro.plate("animals", len(captured)):
            alive, seen = torch.ones(len(captured)), torch.zeros(len(captured), dtype=torch.bool)
            for t in range(captured.shape[1]):
                with pyro.poutine.mask(mask=seen if mask_latents else True):
                    alive = bernoulli(f"alive_{t}", torch.where(seen, survival * alive, 1.0))
                with pyro.poutine.mask(mask=seen):
                    pyro.sample(f"caught_{t}", dist.Bernoulli(catching * alive), obs=captured[:, t])
                if in_place:
                    seen |= captured[:, t].bool()
                else:
                    seen = seen | captured[:, t].bool()

    return model


@pytest.mark.parametrize("check", ["first", False])
def test_capture_recapture_written_in_place_equals_the_full_joint_table(check: Any) -> None:
    data = CAPTURED[1:]
    exact = oracle(capture_recapture(False), empty, data)
    with pytest.warns(VFEWarning, match="'alive_.' is masked out"):
        loss = vfe.FreeEnergy(check=check).differentiable_loss(capture_recapture(True), empty, data)
    torch.testing.assert_close(loss, exact.terms["free_energy"])
    expected = exact.gradients()
    for name, gradient in gradients(loss).items():
        torch.testing.assert_close(gradient, expected[name])


def test_the_posterior_and_em_of_capture_recapture_are_the_same_in_place() -> None:
    found, runs = [], []
    for in_place in (True, False):
        pyro.clear_param_store()
        model = capture_recapture(in_place, mask_latents=False)
        posterior = vfe.posterior(model, CAPTURED)
        found.append(torch.stack([posterior.marginal(f"alive_{t}") for t in range(4)]))
        with pytest.warns(VFEWarning, match="stopped at max_iter"):
            run = vfe.EM(model).run(CAPTURED, max_iter=2, progress_bar=False)
        runs.append(run.history.free_energy)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)
    assert len(runs[0]) > 2
    np.testing.assert_allclose(*runs, rtol=1e-12)


class Given:
    """What the statements of a program are given, and what it does with them between two statements."""

    def __init__(self) -> None:
        self.mask = torch.tensor([True, False, True])
        self.scale = tensor(1.0)
        self.data = DATA.clone()
        self.logits = noise(2, 3, seed=1) - 0.5
        self.loc = tensor([0.0, 1.0])


def model_of(change: Callable[[Given], object]) -> Callable[[], None]:
    """A model whose statements all have the same tensors, which are changed between them."""

    def model() -> None:
        given = Given()
        with pyro.plate("data", 3):
            for step in range(3):
                with pyro.poutine.scale(scale=given.scale):
                    z = pyro.sample(f"z_{step}", dist.Bernoulli(logits=given.logits[0]))
                    with pyro.poutine.mask(mask=given.mask):
                        pyro.sample(f"u_{step}", dist.Normal(given.loc[0] + z * given.loc[1], 1.0), obs=given.data)
                        pyro.sample(f"v_{step}", dist.Normal(given.loc[1], 1.0).mask(given.mask), obs=given.data)
                change(given)

    return model


def set_(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Given], object]:
    return lambda given: setattr(given, name, change(getattr(given, name)))


NEW = torch.tensor([False, True, False])
CHANGES: dict[str, tuple[Callable[[Given], object], Callable[[Given], object]]] = {
    "a mask, by an operator": (lambda g: g.mask.__ior__(NEW), set_("mask", lambda m: m | NEW)),
    "a mask, at an element": (
        lambda g: g.mask.__setitem__(0, ~g.mask[0]),
        set_("mask", lambda m: m ^ torch.tensor([True, False, False])),
    ),
    "a mask, behind its back": (lambda g: g.mask.data.logical_not_(), set_("mask", torch.Tensor.logical_not)),
    "a mask, exchanged": (lambda g: setattr(g.mask, "data", ~g.mask), set_("mask", torch.Tensor.logical_not)),
    "a scale": (lambda g: g.scale.add_(0.5), set_("scale", lambda s: s + 0.5)),
    "data, copied over": (lambda g: g.data.copy_(g.data.flip(0)), set_("data", lambda d: d.flip(0))),
    "data, put at places": (
        lambda g: g.data.index_put_((torch.tensor([2]),), tensor([3.0])),
        set_("data", lambda d: torch.where(torch.arange(3) == 2, 3.0, d)),
    ),
    "logits, through a view": (lambda g: g.logits[:, 1:].mul_(2), set_("logits", lambda x: x * tensor([1.0, 2, 2]))),
    "logits, by out=": (
        lambda g: torch.add(g.logits, 0.5, out=g.logits),
        set_("logits", lambda x: x + 0.5),
    ),
    "logits, by inplace=": (
        lambda g: torch.nn.functional.relu(g.logits, inplace=True),
        set_("logits", torch.Tensor.relu),
    ),
    "a location": (lambda g: g.loc.sub_(1.0), set_("loc", lambda x: x - 1.0)),
}


@pytest.mark.parametrize("check", ["first", False])
@pytest.mark.parametrize("name", CHANGES)
def test_what_a_statement_was_given_counts_as_it_was_then(name: str, check: Any) -> None:
    in_place, anew = map(model_of, CHANGES[name])
    elbo, expected = vfe.FreeEnergy(check=check), vfe.FreeEnergy().loss(anew, empty)
    assert [elbo.loss(in_place, empty) for _ in range(2)] == [expected] * 2
    assert abs(vfe.FreeEnergy().loss(model_of(lambda given: None), empty) - expected) > 0.01


def test_what_is_expanded_along_a_plate_stays_small() -> None:
    def model(in_place: bool) -> None:
        probs, there = tensor(0.2), torch.zeros(1, 4, dtype=torch.bool)
        with pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 4, dim=-1):
            for step in range(3):
                z = bernoulli(f"z_{step}", probs.expand(3, 4))
                with pyro.poutine.mask(mask=there.expand(3, 4)):
                    pyro.sample(f"u_{step}", dist.Normal(z.double(), 1.0), obs=DATA[step].expand(3, 4))
                if in_place:
                    probs.add_(0.1)
                    there[:, step] = True
                else:
                    probs, there = probs + 0.1, there | (torch.arange(4) == step)

    loss = vfe.FreeEnergy().loss(model, empty, True)
    assert loss == pytest.approx(vfe.FreeEnergy().loss(model, empty, False), rel=1e-12)
    run = Programs().enumerate(model, empty, (True,), {})
    assert all(run.factors["model", f"z_{step}"].table.axes == (f"z_{step}",) for step in range(3))


def test_gradients_are_those_of_what_was_given_then() -> None:
    def model(in_place: bool) -> None:
        logits = pyro.param("logits", lambda: noise(3, seed=2)) * 1.0
        with pyro.plate("data", 3):
            a = pyro.sample("a", dist.Bernoulli(logits=logits))
            if in_place:
                with torch.no_grad():  # the write has no gradient, what was given before it has
                    logits[0] = 0.3
                logits *= 2.0
            else:
                logits = torch.where(torch.arange(3) == 0, 0.3 + 0 * logits.detach(), logits) * 2.0
            b = pyro.sample("b", dist.Bernoulli(logits=logits))
            pyro.sample("u", dist.Normal(a + 2 * b, 1.0), obs=DATA)

    first = gradients(vfe.FreeEnergy().differentiable_loss(lambda: model(False), empty))["logits"]
    second = gradients(vfe.FreeEnergy().differentiable_loss(lambda: model(True), empty))["logits"]
    torch.testing.assert_close(second[1:], first[1:])
    exact = gradients(oracle(lambda: model(False), empty).terms["free_energy"])["logits"]
    torch.testing.assert_close(first, exact)


FAMILIES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "MixtureSameFamily": lambda z, p: dist.MixtureSameFamily(
        dist.Categorical(tensor([0.3, 0.7])), dist.Normal(torch.stack([z, 2 * z], -1), p[..., None])
    ),
    "TransformedDistribution": lambda z, p: dist.TransformedDistribution(
        dist.Normal(z, 1.0), [dist.transforms.AffineTransform(p, 2.0)]
    ),
    "its inverse": lambda z, p: dist.TransformedDistribution(
        dist.Normal(z, 1.0), [dist.transforms.AffineTransform(p, 2.0).inv]
    ),
    "Delta": lambda z, p: dist.Delta(DATA[0], log_density=z * p),
    "MaskedDistribution": lambda z, p: dist.Normal(z, 1.0).mask(p > 0.5),
    "Independent": lambda z, p: dist.Normal(z[..., None] * tensor([1.0, 2.0]), p).to_event(1),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_distribution_keeps_what_it_holds_at_any_depth(family: str) -> None:
    def model(in_place: bool) -> None:
        p = tensor(0.4)
        for step in range(3):
            z = bernoulli(f"z_{step}", tensor(0.3))
            fn = FAMILIES[family](z, p)
            pyro.sample(f"u_{step}", fn, obs=DATA[0].expand(fn.event_shape))
            p = p.add_(0.3) if in_place else p + 0.3

    found = [vfe.FreeEnergy().loss(model, empty, in_place) for in_place in (True, False)]
    assert found[0] == found[1]
    assert found[1] == pytest.approx(float(oracle(model, empty, False).terms["free_energy"]))


@pytest.mark.parametrize("family", ["Categorical", "Bernoulli", "branch"])
def test_a_latent_whose_value_is_changed_in_place_keeps_its_probability(family: str) -> None:
    def sampled() -> Tensor:
        if family == "Categorical":
            return categorical("z", tensor([0.2, 0.3, 0.5]))
        return bernoulli("z", tensor(0.2))

    def model(in_place: bool) -> None:
        z = sampled()
        shift = 2 if family == "branch" and z > 0 else 1
        w = z.add_(shift) if in_place else z + shift
        pyro.sample("u", dist.Normal(w.double(), 1.0), obs=DATA[0])

    def guide(in_place: bool) -> None:
        z = sampled()
        if in_place:
            z += 1

    for own in (empty, guide):
        found, exact = (vfe.FreeEnergy().decompose(model, own, in_place) for in_place in (True, False))
        assert float(found.free_energy) == float(exact.free_energy)
        assert float(exact.free_energy) == pytest.approx(float(oracle(model, own, False).terms["free_energy"]))
    posterior = vfe.posterior(model, True)
    torch.testing.assert_close(posterior.marginal("z"), vfe.posterior(model, False).marginal("z"))
    assert set(posterior.sample(20)["z"].unique().tolist()) <= {0.0, 1.0, 2.0}


def test_draws_that_a_program_changes_in_place_are_those_that_were_drawn() -> None:
    def guide(in_place: bool) -> None:
        w = pyro.sample("w", dist.Normal(0.3, 1.0))
        if in_place:
            w.mul_(2.0)

    def model(in_place: bool) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        w = w.add_(1.0) if in_place else w + 1.0
        z = bernoulli("z", tensor(0.3))
        pyro.sample("u", dist.Normal(w + z, 1.0), obs=DATA[0])

    found = []
    for in_place in (True, False):
        pyro.set_rng_seed(1)
        elbo = vfe.FreeEnergy()
        terms = elbo.decompose(model, guide, in_place)
        found.append([float(terms.free_energy), elbo.loss(model, guide, in_place), elbo.loss(model, guide, in_place)])
    np.testing.assert_allclose(*found, rtol=1e-12)


def test_what_is_summed_in_portions_counts_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def model(in_place: bool, data: Tensor) -> None:
        there, probs = data > 0, simplex("probs", 4)
        with pyro.plate("data", len(data)):
            for step in range(2):
                z = categorical(f"z_{step}", probs)
                with pyro.poutine.mask(mask=there):
                    pyro.sample(f"u_{step}", dist.Normal(z.double(), 1.0), obs=data)
                if in_place:
                    there |= data < -0.5
                else:
                    there = there | (data < -0.5)

    data = noise(400, seed=3)
    whole = vfe.FreeEnergy().loss(model, empty, False, data)
    elbo = vfe.FreeEnergy(max_bytes=3000.0)
    assert elbo.loss(model, empty, True, data) == pytest.approx(whole, rel=1e-12)
    (pair,) = elbo._programs._pairs.values()
    assert pair.layout.portioning is not None


def drawn_and_masked(in_place: bool) -> None:
    there = torch.tensor([True, False, True])
    with pyro.plate("data", 3):
        for step in range(2):
            with pyro.poutine.mask(mask=there):
                z = pyro.sample(f"z_{step}", dist.Bernoulli(0.3), infer=SAMPLED)
                pyro.sample(f"u_{step}", dist.Normal(z, 1.0), obs=DATA)
            if in_place:
                z.mul_(2.0)
                there |= torch.tensor([False, True, False])
            else:
                there = there | torch.tensor([False, True, False])


def guide_that_draws(in_place: bool) -> None:
    with pyro.plate("data", 3):
        for step in range(2):
            z = pyro.sample(f"z_{step}", dist.Bernoulli(0.6), infer=SAMPLED)
            if in_place:
                z.add_(1.0)


def test_runs_in_which_all_is_drawn_score_what_was_given_then() -> None:
    found = []
    for in_place in (True, False):
        options = {"check": "first", "max_bytes": None, "on_cost": "raise", "weighs_data": False}
        machine = Machine(drawn_and_masked, guide_that_draws, **options)
        machine.look((in_place,), {})
        machine.drawn(machine.held_guide, (in_place,), {})  # The first such run finds that they write.
        pyro.set_rng_seed(2)
        for _ in range(3):
            runs = machine.drawn(machine.held_guide, (in_place,), {})
            found.append([float(total_log_prob(run.sites.values())) for run in runs])
    assert found[:3] == found[3:]
    assert len({tuple(pair) for pair in found}) > 1


def test_dreams_and_replays_hold_what_was_drawn() -> None:
    def model(u: Tensor, in_place: bool) -> None:
        there = torch.tensor([True, False, True])
        with pyro.plate("data", 3), pyro.poutine.mask(mask=there):
            z = bernoulli("z", tensor(0.5))
            drawn = pyro.sample("u", dist.Normal(z, 0.1), obs=u)
        if in_place:
            there.logical_not_()
            z += 5.0
            if drawn is not u:
                drawn += 5.0

    dreams = []
    for in_place in (True, False):
        pyro.set_rng_seed(3)
        dreams.append(dream(model, DATA, in_place, dream_to_args=lambda made_up, *args: ((made_up["u"], args[1]), {})))
    for part in ("latents", "observations", "masks"):
        one, other = (dict(getattr(made_up, part)) for made_up in dreams)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    given = {"z": torch.ones(3)}
    for _ in range(2):
        sites = replayed(model, (DATA, True), {}, given, simulate=True).sites
        assert torch.equal(given["z"], torch.ones(3))
        assert (sites["u"].value - 1.0).abs().max() < 1.0


SEEN = torch.tensor([True, False, False])


def from_outside(seen: Tensor, in_place: bool = True) -> None:
    """Changes its argument, and reads what is computed of it."""
    with pyro.plate("data", 3):
        for step in range(3):
            z = bernoulli(f"z_{step}", tensor(0.3))
            with pyro.poutine.mask(mask=~seen):
                pyro.sample(f"u_{step}", dist.Normal(z, 1.0), obs=DATA)
            if in_place:
                seen |= torch.arange(3) == step
            else:
                seen = seen | (torch.arange(3) == step)


OUTLIVES: dict[str, Callable[[bool], Callable[[Tensor], None]]] = {
    "an argument": lambda copies: lambda seen: from_outside(seen.clone() if copies else seen),
    "a tensor of the module": lambda copies: lambda seen: from_outside(SEEN.clone() if copies else SEEN),
}


@pytest.mark.parametrize("origin", OUTLIVES)
@pytest.mark.parametrize(
    "entry", [vfe.posterior, lambda model, seen: vfe.FreeEnergy(check=False).loss(model, None, seen)]
)
def test_changes_that_outlive_a_run_are_refused_and_a_copy_is_right(origin: str, entry: Callable[..., Any]) -> None:
    seen = SEEN.clone()
    with pytest.raises(StructureError, match=r"'u_0' of the model was given something else.*seen.clone\(\)"):
        entry(OUTLIVES[origin](False), seen)
    assert torch.equal(seen, torch.tensor([True, False, False]))
    SEEN.copy_(seen)
    exact = vfe.FreeEnergy().loss(from_outside, empty, seen, False)
    assert exact == pytest.approx(float(oracle(from_outside, empty, seen, False).terms["surprise"]))
    assert vfe.FreeEnergy().loss(OUTLIVES[origin](True), empty, seen) == exact


def test_a_mend_of_the_data_in_place_is_made_once() -> None:
    def model(data: Tensor) -> None:
        data[data.isnan()] = 0.0
        data.clamp_(-1.0, 1.0)
        with pyro.plate("data", 3):
            z = bernoulli("z", tensor(0.3))
            pyro.sample("u", dist.Normal(z, 1.0), obs=data)

    found = vfe.FreeEnergy().loss(model, empty, tensor([torch.nan, 0.5, 3.0]))
    assert found == vfe.FreeEnergy().loss(model, empty, tensor([0.0, 0.5, 1.0]))


def test_what_numpy_changes_is_refused_and_a_copy_is_right() -> None:
    def model(copies: bool) -> None:
        seen = np.zeros(3, dtype=bool)
        with pyro.plate("data", 3):
            for step in range(2):
                z = bernoulli(f"z_{step}", tensor(0.3))
                with pyro.poutine.mask(mask=torch.tensor(seen) if copies else torch.from_numpy(seen)):
                    pyro.sample(f"u_{step}", dist.Normal(z, 1.0), obs=DATA)
                seen |= np.arange(3) > 0

    with pytest.raises(SpotCheckError, match=r"NumPy.*give it a copy"):
        vfe.FreeEnergy().loss(model, empty, False)
    assert vfe.FreeEnergy().loss(model, empty, True) > 0


def test_a_program_that_writes_before_its_statements_shares_its_tensors_with_its_sites() -> None:
    data = DATA.clone()

    def model() -> None:
        scale = torch.ones(3)
        scale[0] = 2.0
        with pyro.plate("data", 3):
            z = bernoulli("z", tensor(0.3))
            pyro.sample("u", dist.Normal(z, scale), obs=data)
            torch.zeros(3).add_(1.0)

    run = Programs().enumerate(model, empty, (), {})
    assert run.sites["model", "u"].value is data


def test_a_fresh_setup_at_random_is_no_change_that_outlives_a_run() -> None:
    store: dict[str, Tensor] = {}

    def model() -> None:
        if not store:
            store["table"] = torch.empty(2, 3).normal_()
        z = categorical("z", tensor([0.4, 0.6]))
        with pyro.plate("data", 3):
            pyro.sample("u", dist.Normal(store["table"][z].sum(-1), 1.0).mask(torch.rand(()) >= 0), obs=DATA)
            pyro.sample("v", dist.Bernoulli(torch.rand(3)), obs=torch.ones(3))

    try:
        vfe.FreeEnergy().loss(model, empty)
    except VFEError as error:
        raise AssertionError("a sound program was refused") from error
