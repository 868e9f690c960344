"""A program that takes another path at a later call, and one whose values meet: right, or refused."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import oracle
from programs.case import bernoulli, categorical, empty, noise, positive, simplex, tensor
from pyro.optim import Adam
from torch import Tensor, nn
from torch.nn import functional

import pyro_vfe as vfe
from pyro_vfe.errors import SpotCheckError, VFEWarning
from pyro_vfe.program import operations

# They count their runs on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:The programs change what outlives a run")

STATES, FEATURES, MANY = 3, 4, 60
ROOT = noise(STATES, seed=1).softmax(-1)
ROWS = noise(STATES, FEATURES, seed=2)
SQUARE = noise(2, 2, seed=3)
POINT = noise(FEATURES, seed=4)
LEVELS = torch.cat([torch.linspace(-3.0, 2.0, MANY - 1, dtype=torch.float64), tensor([20.0])])

Path = Callable[[Tensor], Tensor]


class Program:
    """A mixture whose mean takes another path from some call on."""

    def __init__(self, plain: Path, other: Path, rows: Tensor = ROWS) -> None:
        self.plain, self.other, self.rows, self.changed, self.runs = plain, other, rows, False, 0

    def __call__(self, *args: Any) -> None:
        self.runs += 1
        z = categorical("z", torch.ones(len(self.rows), dtype=torch.float64) / len(self.rows))
        mean = (self.other if self.changed else self.plain)(self.rows[z])
        pyro.sample("u", dist.Normal(mean, positive("scale")).to_event(1), obs=POINT[: self.rows.shape[-1]])

    def evidence(self) -> float:
        """log sum_z p(z) p(u | z), value by value."""
        terms = []
        for row in self.rows:
            mean = (self.other if self.changed else self.plain)(row)
            terms.append(dist.Normal(mean, positive("scale")).log_prob(POINT[: len(row)]).sum())
        return float((torch.stack(terms).logsumexp(0) - tensor(float(len(self.rows))).log()).detach())


def told(call: Callable[[], Any]) -> float:
    """What a call returns that is the first to take values one at a time."""
    with pytest.warns(VFEWarning, match="do not broadcast over the values of"):
        found = call()
    value = torch.as_tensor(found.free_energy if isinstance(found, vfe.Decomposition) else found)
    return value.detach().item()


def same(h: Tensor) -> Tensor:
    return h


def written(h: Tensor) -> Tensor:
    h = h.clone()
    h[0] = 1.0
    return h


MIXING: dict[str, Path] = {
    "minus the mean": lambda h: h - h.mean(0),
    "minus the mean of all": lambda h: h - h.mean(),
    "over the norm": lambda h: h / h.norm(),
    "softmax": lambda h: h.softmax(0),
    "sort": lambda h: h.sort(0).values,
    "sort of all": lambda h: h.flatten().sort().values.reshape(h.shape),
    "flip": lambda h: h.flip(0),
    "roll": lambda h: h.roll(1, 0),
    "running sum": lambda h: h.cumsum(0),
    "minus the largest": lambda h: h - h.max(),
    "minus the largest of each": lambda h: h - h.amax(0),
    "median": lambda h: h - h.median(),
    "over the spread": lambda h: h / h.std(),
    "logsumexp": lambda h: h - h.logsumexp(0),
    "minus the first": lambda h: h - h[0],
    "normalize": lambda h: functional.normalize(h, dim=0),
    "dropout": lambda h: functional.dropout(h, 0.5, True),
    "inner product": lambda h: h * (h.reshape(-1) @ h.reshape(-1)),
    "einsum": lambda h: h * torch.einsum("...i->", h),
    "topk": lambda h: h - h.flatten().topk(1).values,
    "any": lambda h: torch.where((h > 1).any(), -h, h),
    "count": lambda h: torch.where((h > -10).sum() > FEATURES, -h, h),
    "layer norm": lambda h: functional.layer_norm(h, h.shape),
    "quantile": lambda h: h - h.quantile(0.5),
    "product": lambda h: h * h.prod(),
    "index": lambda h: h.index_select(0, torch.arange(len(h)).flip(0)),
    "in place": written,
}

CALLS: dict[str, Callable[[vfe.FreeEnergy, Any], Any]] = {
    "loss": lambda elbo, model: elbo.loss(model, empty),
    "loss_and_grads": lambda elbo, model: elbo.loss_and_grads(model, empty),
    "decompose": lambda elbo, model: elbo.decompose(model, empty),
}


@pytest.mark.parametrize("number", range(len(MIXING)), ids=MIXING)
def test_a_path_over_which_values_meet_has_them_apart_at_whatever_call_it_is_taken(number: int) -> None:
    name, call = list(MIXING)[number], list(CALLS)[number % len(CALLS)]
    for before in (0, 1, 2):
        model, elbo = Program(same, MIXING[name]), vfe.FreeEnergy()
        for _ in range(before):
            CALLS[call](elbo, model)
        model.changed = True
        if name == "dropout":  # What is random without a site is right for no number of runs.
            with pytest.raises(SpotCheckError, match="'u'"):
                CALLS[call](elbo, model)
        else:
            assert -told(partial(CALLS[call], elbo, model)) == pytest.approx(model.evidence(), rel=1e-12)


ARGUMENTS: dict[str, Callable[[int], Path]] = {
    "softmax": lambda dim: lambda h: h.softmax(dim),
    "sum": lambda dim: lambda h: h - h.sum(dim, keepdim=True),
    "flip": lambda dim: lambda h: h.flip(dim),
    "cumsum": lambda dim: lambda h: h.cumsum(dim=dim),
    "sort": lambda dim: lambda h: h.sort(dim=dim)[0],
    "roll": lambda dim: lambda h: h.roll(1, dim),
    "normalize": lambda dim: lambda h: functional.normalize(h, dim=dim),
    "index": lambda dim: lambda h: h.index_select(dim, torch.tensor([1, 0])),
    "stack": lambda dim: lambda h: torch.stack([h, h], dim).sum(-1),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_same_operation_along_another_dim_of_the_same_size_is_another_path(name: str) -> None:
    model, elbo = Program(ARGUMENTS[name](-1), ARGUMENTS[name](0), SQUARE), vfe.FreeEnergy()
    assert -elbo.loss(model, empty) == pytest.approx(model.evidence(), rel=1e-12)
    model.changed = True
    assert -told(lambda: elbo.loss(model, empty)) == pytest.approx(model.evidence(), rel=1e-12)


FLAGS: dict[str, tuple[Path, Path]] = {
    "a gain that is zero at first": (lambda h: h + 0.0 * h.mean(), lambda h: h + 1.0 * h.mean()),
    "a tensor that is zero at first": (lambda h: h + tensor(0.0) * h.mean(), lambda h: h + tensor(1.0) * h.mean()),
    "a shape": (lambda h: functional.layer_norm(h, h.shape[-1:]), lambda h: functional.layer_norm(h, h.shape)),
    "no shift": (lambda h: h.roll(0, 0), lambda h: h.roll(1, 0)),
    "an equation": (
        lambda h: torch.einsum("...i,ij->...j", h, SQUARE),
        lambda h: torch.einsum("ki,kj->kj" if h.dim() > 1 else "i,ij->j", h, SQUARE),
    ),
    "sides": (lambda h: h @ SQUARE, lambda h: SQUARE @ h),
    "keepdim": (lambda h: h - h.mean(-1, keepdim=True), lambda h: h - h.mean(-1)),
    "rate": (lambda h: functional.dropout(h, 0.0), lambda h: functional.dropout(h, 0.5)),
}


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_of_the_same_operation_is_another_path(name: str) -> None:
    model, elbo = Program(*FLAGS[name], SQUARE), vfe.FreeEnergy()
    assert -elbo.loss(model, empty) == pytest.approx(model.evidence(), rel=1e-12)
    model.changed = True
    if name == "rate":
        with pytest.raises(SpotCheckError, match="'u'"):
            elbo.loss(model, empty)
    else:
        assert -told(lambda: elbo.loss(model, empty)) == pytest.approx(model.evidence(), rel=1e-12)


def test_a_module_that_is_trained_is_another_path() -> None:
    for net in (nn.Dropout(), nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.RReLU()).double(), Centred()):
        model, elbo = Program(net.eval(), net), vfe.FreeEnergy()
        elbo.loss(model, empty)
        net.train()
        if isinstance(net, Centred):  # It draws nothing.
            model.changed = True
            assert -told(partial(elbo.loss, model, empty)) == pytest.approx(model.evidence(), rel=1e-12)
        else:
            with pytest.raises(SpotCheckError, match="'u'"):
                elbo.loss(model, empty)


class Centred(nn.Module):
    """Does something else in training."""

    def forward(self, h: Tensor) -> Tensor:
        """Returns the hidden units."""
        return h - h.mean(0) if self.training else h


def test_a_warm_up_that_ends_is_another_path_for_every_learner() -> None:
    for learn in (
        lambda model: vfe.EM(model).run(max_iter=20, progress_bar=False, callback=after_some(model)),
        lambda model: vfe.fit(
            model, empty, optim=Adam({"lr": 0.01}), num_steps=100, progress_bar=False, callback=after_some(model)
        ),
    ):
        pyro.clear_param_store()
        with pytest.warns(VFEWarning, match="do not broadcast over the values of 'z': they run 3 times"):
            learn(Program(same, MIXING["over the norm"]))
        pyro.clear_param_store()
        with pytest.raises(SpotCheckError, match="'u'"):
            learn(Program(same, MIXING["dropout"]))


RIGHT: dict[str, Path] = {
    "sum": lambda h: h - h.sum(-1, keepdim=True),
    "softmax": lambda h: h.softmax(-1),
    "tanh": lambda h: h.tanh() * 2.0,
    "sort": lambda h: h.sort(-1).values,
    "matmul": lambda h: h @ noise(FEATURES, FEATURES, seed=5),
    "layer norm": lambda h: functional.layer_norm(h, h.shape[-1:]),
    "where": lambda h: torch.where(h > 0, h, h.mean(-1, keepdim=True)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_path_that_keeps_values_apart_may_be_taken_from_any_call_on(name: str) -> None:
    model, elbo = Program(same, RIGHT[name]), vfe.FreeEnergy()
    for changed in (False, True, True, False, True):
        model.changed = changed
        assert -elbo.loss(model, empty) == pytest.approx(model.evidence(), rel=1e-12)
    assert not checked(elbo).mixed


def checked(elbo: vfe.FreeEnergy) -> Any:
    """What is known of the one pair that was run."""
    (pair,) = elbo._programs._pairs.values()
    return pair.paths


def runs_of(model: Any, calls: Iterator[Any] | range, elbo: vfe.FreeEnergy) -> list[int]:
    """How often each call runs the model."""
    counts = [model.runs]
    for argument in calls:
        elbo.loss(model, empty, argument)
        counts.append(model.runs)
    return [after - before for before, after in pairwise(counts)]


def test_a_known_path_is_run_once_but_for_the_calls_whose_turn_it_is() -> None:
    model = Program(same, RIGHT["softmax"])
    found = runs_of(model, range(200), vfe.FreeEnergy())
    assert [number for number, runs in enumerate(found, 1) if runs > 1] == [1, 2, 4, 8, 16, 32, 64, 128, 192]
    assert set(found[1:]) == {1, 2}
    model.changed = True
    elbo = vfe.FreeEnergy()
    before = runs_of(model, range(6), elbo)
    model.changed = False
    after = runs_of(model, range(6), elbo)
    assert before[2] == 1
    assert after[0] > 2
    assert after[2:] == [1, 1, 1, 1]


class Recurrent:
    """Hidden units that are updated once for each datum, from a latent's row on; the data may be of any length."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, steps: int) -> None:
        self.runs += 1
        z = categorical("z", ROOT)
        h = ROWS[z]
        for t in range(steps):
            h = (h @ noise(FEATURES, FEATURES, seed=6) + POINT[t % FEATURES]).tanh()
        pyro.sample("u", dist.Normal(h, 1.0).to_event(1), obs=POINT)


class Batches:
    """A mixture of data that come in batches of any size."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, size: int) -> None:
        self.runs += 1
        data = noise(size, FEATURES, seed=7)
        with pyro.plate("data", size):
            z = categorical("z", ROOT)
            h = ROWS[z].reshape(*z.shape[:-1], -1, FEATURES)
            h = h.expand(*h.shape[:-2], size, FEATURES)
            pyro.sample("u", dist.Normal(h[..., :size, :] * 2, 1.0).to_event(1), obs=data)


@pytest.mark.parametrize("model", [Recurrent(), Batches()], ids=["loops", "batches"])
@pytest.mark.filterwarnings("error")
def test_lengths_and_sizes_are_no_paths(model: Any) -> None:
    elbo = vfe.FreeEnergy()
    runs_of(model, range(5, 9), elbo)
    assert set(runs_of(model, range(9, 40), elbo)) <= {1, 2}


def test_a_program_that_does_something_new_at_each_call_is_told_once() -> None:
    class Rolls:
        def __init__(self, by_index: bool) -> None:
            self.by_index, self.runs = by_index, 0

        def __call__(self, shift: int) -> None:
            self.runs += 1
            h = ROWS[categorical("z", ROOT)]
            h = h[..., (torch.arange(FEATURES) - shift) % FEATURES] if self.by_index else h.roll(shift, -1)
            pyro.sample("u", dist.Normal(h, 1.0).to_event(1), obs=POINT)

    model, elbo = Rolls(by_index=False), vfe.FreeEnergy()
    assert min(runs_of(model, range(100, 115), elbo)) > 2
    with pytest.warns(VFEWarning, match="something new at each of 16 calls") as told:
        runs_of(model, range(115, 140), elbo)
    assert len(told) == 1
    advised, elbo = Rolls(by_index=True), vfe.FreeEnergy()
    assert set(runs_of(advised, range(100, 140), elbo)[1:]) == {1, 2}


def unseen(h: Tensor, lies: bool) -> Tensor:
    """Stands for a compiled function: tracking does not see into it."""
    with torch._C.DisableTorchFunction():
        return h.mean().expand_as(h) if lies else torch.zeros_like(h)


def test_what_no_path_shows_is_found_when_its_turn_comes() -> None:
    model, elbo = Program(lambda h: h + unseen(h, False), lambda h: h + unseen(h, True)), vfe.FreeEnergy()
    for _ in range(10):
        elbo.loss(model, empty)
    model.changed = True
    for _ in range(5):
        elbo.loss(model, empty)
    assert -told(lambda: elbo.loss(model, empty)) == pytest.approx(model.evidence(), rel=1e-12)


def test_checks_take_nothing_from_the_users_random_numbers() -> None:
    def guide() -> None:
        w = pyro.sample("w", dist.Normal(0.0, positive("width")))
        bernoulli("b", torch.sigmoid(w))

    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        b = bernoulli("b", tensor(0.4))
        pyro.sample("u", dist.Normal(w + b, 1.0), obs=tensor(0.7))

    losses = {}
    for check in ("first", "always", False):
        pyro.set_rng_seed(0)
        elbo = vfe.FreeEnergy(check=check)
        losses[check] = [elbo.loss(model, guide) for _ in range(9)]
    assert losses["first"] == losses["always"] == losses[False]


def test_mixing_that_begins_to_matter_as_parameters_move_is_found() -> None:
    """The gain of a branch begins at zero, as residual nets have it."""

    def model() -> None:
        h = ROWS[categorical("z", simplex("probs", STATES))]
        h = h + pyro.param("gain", torch.zeros((), dtype=torch.float64)) * h.softmax(0)
        pyro.sample("u", dist.Normal(h, 1.0).to_event(1), obs=POINT)

    elbo = vfe.FreeEnergy()
    elbo.loss(model, empty)
    pyro.param("gain").data.fill_(0.5)
    exact = oracle(model, empty).terms["surprise"].item()
    assert told(lambda: elbo.loss(model, empty)) == pytest.approx(exact, rel=1e-12)


def where_large(other: Path) -> Path:
    """What makes a difference at the largest of the levels alone."""
    return lambda x: torch.where(x > 10, other(x), x)


RARE: dict[str, Path] = {
    "clamp": lambda x: x.clamp(max=x.mean() + 10.0),
    "max": where_large(lambda x: x - x.max() + x.min()),
    "median": lambda x: x.clamp(max=x.median() + 10.0),
    "std": lambda x: x.clamp(max=x.std(correction=0) * 5 + 3),
    "logsumexp": where_large(lambda x: x.clamp(max=3.0).reshape(-1).logsumexp(0)),
    "first": lambda x: x.clamp(max=x.reshape(-1)[0] + 15.0),
    "cumsum": where_large(lambda x: x.reshape(-1).cumsum(0).reshape(x.shape)),
    "topk": where_large(lambda x: x.reshape(-1).topk(1).values[0] * x.mean()),
    "any": lambda x: torch.where((x < -2.9).any(), x, x.clamp(max=15.0)),
    "all": lambda x: torch.where((x > 10).all(), x - 1, x),
    "amax": where_large(lambda x: x - x.unsqueeze(-1).amax(0, keepdim=True).squeeze(-1) + x.mean()),
    "normalize": where_large(lambda x: functional.normalize(x.reshape(-1), dim=0).reshape(x.shape)),
    "where": where_large(lambda x: x.mean()),
    "matmul": where_large(lambda x: x.reshape(-1) @ x.reshape(-1) - x * x),
    "einsum": where_large(lambda x: torch.einsum("i,i->", x.reshape(-1), x.reshape(-1)) - x * x),
    "sort": where_large(lambda x: x.reshape(-1).sort(descending=True).values.reshape(x.shape)),
    "flip": where_large(lambda x: x.reshape(-1).flip(0).reshape(x.shape)),
    "softmax": where_large(lambda x: x.clamp(max=3.0).reshape(-1).softmax(0).reshape(x.shape)),
}


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a plate"])
@pytest.mark.parametrize("name", RARE)
def test_values_that_meet_are_apart_or_refused_where_one_value_in_sixty_shows_it(name: str, inside: bool) -> None:
    def model() -> None:
        with pyro.plate("data", 5 if inside else 1):
            x = LEVELS[categorical("z", torch.ones(MANY, dtype=torch.float64) / MANY)]
            pyro.sample("u", dist.Normal(RARE[name](x), 1.0), obs=tensor(0.3))

    for seed in range(5 if name == "clamp" else 1):
        pyro.set_rng_seed(seed)
        if inside:  # Elements of the plate meet as well.
            with pytest.raises(SpotCheckError, match="'u'"):
                vfe.FreeEnergy().loss(model, empty)
        else:
            exact = oracle(model, empty).terms["surprise"].detach().item()
            assert told(lambda: vfe.FreeEnergy().loss(model, empty)) == pytest.approx(exact, rel=1e-12)


def test_values_of_two_latents_that_meet_are_apart_where_one_pair_of_values_shows_it() -> None:
    def model() -> None:
        x, y = (torch.arange(15.0)[categorical(name, torch.ones(15) / 15)] for name in "xy")
        total = x + y
        pyro.sample("u", dist.Normal(total.clamp(max=total.mean() + 13.5), 1.0), obs=tensor(0.3))

    for seed in range(5):
        pyro.set_rng_seed(seed)
        exact = oracle(model, empty).terms["surprise"].detach().item()
        assert told(lambda: vfe.FreeEnergy().loss(model, empty)) == pytest.approx(exact, rel=1e-12)


def features(z: Tensor) -> Tensor:
    """Many ways to read a latent."""
    table = noise(MANY, 5, MANY, seed=8)
    h = (
        table[z]
        + functional.one_hot(z, MANY).to(table).unsqueeze(-2)
        + functional.embedding(z, table[..., 0])[..., None]
    )
    h = h.sum(-1).softmax(-1).cumsum(-1).sort(-1).values
    h = torch.cat([h, torch.stack([h[..., 0], h[..., 1]], -1)], -1).reshape(*z.shape, 7).expand(*z.shape, 7)
    h = torch.einsum("...i,ij->...j", h, noise(7, 7, seed=9)) @ noise(7, MANY, seed=10)
    buffer = torch.zeros(*z.shape, 2, dtype=torch.float64)
    buffer[..., 0] = h.amax(-1)
    buffer[..., 1] = torch.where(z > 30, h.norm(dim=-1), h.logsumexp(-1))
    buffer += functional.layer_norm(h, (MANY,))[..., :2]
    return buffer.mul_(2.0).movedim(-1, 0)[0] + h.gather(-1, z.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a plate"])
def test_a_program_that_keeps_values_apart_is_checked_by_few_runs(inside: bool) -> None:
    runs = []
    probs = noise(MANY, seed=11).softmax(-1)
    data = noise(4, seed=12) if inside else tensor(0.3)

    def model() -> None:
        runs.append(1)
        with pyro.plate("data", 4) if inside else pyro.poutine.trace():
            pyro.sample("u", dist.Normal(features(categorical("z", probs)), 1.0), obs=data)

    elbo = vfe.FreeEnergy()
    each = torch.stack([features(torch.tensor(k)) for k in range(MANY)])
    expected = (probs.log() + dist.Normal(each, 1.0).log_prob(data.reshape(-1, 1))).logsumexp(-1).sum()
    assert -elbo.loss(model, empty) == pytest.approx(float(expected), rel=1e-10)
    assert not checked(elbo).mixed
    assert len(runs) <= 10


def test_values_may_meet_where_it_makes_no_difference() -> None:
    """The largest of all is taken out for the sake of precision, and put back."""
    probs = torch.ones(MANY, dtype=torch.float64) / MANY

    def model() -> None:
        x = LEVELS[categorical("z", probs)]
        pyro.sample("u", dist.Normal((x - x.max()) + x.max(), 1.0), obs=tensor(0.3))

    expected = (probs.log() + dist.Normal(LEVELS, 1.0).log_prob(tensor(0.3))).logsumexp(-1)
    assert -vfe.FreeEnergy().loss(model, empty) == pytest.approx(float(expected), rel=1e-12)


def test_what_is_remembered_of_paths_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "_MOST_PATHS", 4)
    monkeypatch.setattr(operations, "_MOST_PAIRS", 4)
    model, elbo = Recurrent(), vfe.FreeEnergy()
    for steps in range(30):
        elbo.loss(model, empty, steps)
    assert len(checked(elbo)._paths) == 4
    assert len(checked(elbo)._pairs) < 20


def after_some(model: Program) -> Callable[..., None]:
    """A callback that changes the program after a few steps."""
    seen: list[Any] = []

    def callback(*args: Any) -> None:
        seen.append(args)
        model.changed = len(seen) > 2

    return callback
