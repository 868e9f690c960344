"""Programs with a state of their own: steps move it on once, looks do not, and numbers that run ahead are told."""

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.nn import PyroModule
from torch import Tensor, nn

import pyro_vfe as vfe
from pyro_vfe.errors import SpotCheckError, VFEWarning
from pyro_vfe.program import buffers

U = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(autouse=True)
def doubles() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Net(nn.Module):
    """A network that normalises its batch."""

    def __init__(self, out: int = 2, norm: Callable[[], nn.Module] = lambda: nn.BatchNorm1d(4)) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), norm(), nn.Linear(4, out)

    def forward(self, u: Tensor) -> Tensor:
        result: Tensor = self.last(torch.relu(self.norm(self.first(u))))
        return result


class Pair:
    """A mixture whose scale is a network's, and a guide that is a network; both in closures, registered by name."""

    def __init__(self, net: Callable[..., nn.Module] = Net) -> None:
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        encoder, scales = net(), net(1)
        self.nets = encoder, scales

        def model(u: Tensor) -> None:
            pyro.module("scales", scales)
            locs = pyro.param("locs", torch.linspace(-1, 1, 6).reshape(2, 3))
            with pyro.plate("data", len(u)):
                v = pyro.sample("v", dist.Categorical(torch.ones(2) / 2))
                pyro.sample("u", dist.Normal(locs[v], 1 + torch.sigmoid(scales(u))).to_event(1), obs=u)

        def guide(u: Tensor) -> None:
            pyro.module("encoder", encoder)
            with pyro.plate("data", len(u)):
                pyro.sample("v", dist.Categorical(logits=encoder(u)))

        self.model, self.guide = model, guide

    def buffers(self) -> dict[str, Tensor]:
        return {f"{n}.{name}": b.clone() for n, net in enumerate(self.nets) for name, b in net.named_buffers()}

    def batches(self) -> list[int]:
        return [int(b) for name, b in self.buffers().items() if name.endswith("num_batches_tracked")]


def count(norm: nn.BatchNorm1d) -> int:
    assert norm.num_batches_tracked is not None
    return int(norm.num_batches_tracked)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


DRAWN: Any = {"enumerate": None}


def adam() -> Any:
    return pyro.optim.PyroOptim(torch.optim.Adam, {"lr": 0.02})


def test_a_step_moves_running_statistics_on_once_the_first_one_too() -> None:
    pair = Pair()
    svi = SVI(pair.model, pair.guide, adam(), vfe.FreeEnergy())
    for number in range(1, 5):
        svi.step(U)
        assert pair.batches() == [number, number]
    vfe.FreeEnergy().loss(pair.model, pair.guide, U)  # As Pyro's evaluate_loss does.
    assert pair.batches() == [5, 5]


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceEnum_ELBO, vfe.FreeEnergy])
def test_fit_is_SVI_number_for_number_in_buffers_too(elbo: Callable[[], Any]) -> None:
    def trained(fits: bool) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
        pair = Pair()
        guide = config_enumerate(pair.guide) if elbo is TraceEnum_ELBO else pair.guide
        if fits:
            options: dict[str, Any] = {"num_steps": 8, "progress_bar": False, "elbo": elbo()}
            losses = vfe.fit(pair.model, guide, U, optim=adam(), **options).losses.tolist()
        else:
            svi = SVI(pair.model, guide, adam(), elbo())
            losses = [svi.step(U) for _ in range(8)]
        params = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
        return losses, params, pair.buffers()

    (losses, params, buffers), (own, own_params, own_buffers) = trained(True), trained(False)
    assert losses == own
    assert equal(params, own_params)
    assert equal(buffers, own_buffers)
    # Pyro runs the programs once before the first step, to see how plates are nested.
    assert int(buffers["0.norm.num_batches_tracked"]) == 8 + (elbo is TraceEnum_ELBO)


def test_running_statistics_are_those_of_the_network_run_once() -> None:
    pair, alone = Pair(), Net()
    alone.load_state_dict(pair.nets[0].state_dict())
    vfe.FreeEnergy().loss_and_grads(pair.model, pair.guide, U)
    alone(U)
    assert equal(dict(pair.nets[0].named_buffers()), dict(alone.named_buffers()))


MEASURES: dict[str, Callable[[Pair], object]] = {
    "decompose": lambda p: vfe.FreeEnergy(num_particles=2).decompose(p.model, p.guide, U),
    "compute_marginals": lambda p: vfe.FreeEnergy(strict_enumeration_warning=False).compute_marginals(p.model, None, U),
    "sample_posterior": lambda p: vfe.FreeEnergy().sample_posterior(p.model, None, U),
    "posterior": lambda p: vfe.posterior(p.model, U),
    "explain": lambda p: vfe.explain(p.model, p.guide, U),
    "bounds": lambda p: vfe.bounds(p.model, p.guide, U, num_particles=6),
    "dream": lambda p: vfe.dream(p.model, U, dream_to_args=lambda made, u: ((made["u"],), {})),
    "Monitor": lambda p: vfe.Monitor(p.model, p.guide, progress_bar=False).step(1.0, U),
    "a failing step": lambda p: _fails(lambda: vfe.FreeEnergy().loss_and_grads(p.model, p.guide, U * torch.nan)),
}


def _fails(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError):
        call()


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("warm", [False, True])
def test_what_measures_leaves_buffers_as_they_were(measure: str, warm: bool) -> None:
    pair = Pair()
    for _ in range(2 * warm):
        vfe.FreeEnergy().loss_and_grads(pair.model, pair.guide, U)
    before = pair.buffers()
    MEASURES[measure](pair)
    assert equal(pair.buffers(), before)


@pytest.mark.parametrize("options", [{}, {"vectorize_particles": True}, {"gradient": "disarm"}])
def test_each_particle_counts_once_as_with_pyro(options: dict[str, Any]) -> None:
    norm = nn.BatchNorm1d(3)

    def model(u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            v = pyro.sample("v", dist.Bernoulli(0.5))
            pyro.sample("u", dist.Normal(v, 1.0), obs=u[:, 0])

    def guide(u: Tensor) -> None:
        bias = norm(u).sum() * 0.1
        with pyro.plate("data", len(u)):
            logits = bias + pyro.param("b", torch.zeros(()))
            pyro.sample("v", dist.Bernoulli(logits=logits), infer=DRAWN)

    pyro.clear_param_store()
    elbo = vfe.FreeEnergy(num_particles=3, strict_enumeration_warning=False, **options)
    for number in range(1, 3):
        elbo.loss_and_grads(model, guide, U)
        assert count(norm) == number * (1 if options.get("vectorize_particles") else 3)


def test_a_program_that_branches_moves_each_module_on_once() -> None:
    both, one = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def model(u: Tensor) -> None:
        shared = both(u)
        if pyro.sample("z", dist.Bernoulli(0.3)):
            pyro.sample("a", dist.Normal(one(shared).sum(), 1.0), obs=torch.tensor(0.5))
        elif pyro.sample("y", dist.Bernoulli(0.4)):
            pyro.sample("a", dist.Normal(one(shared).mean(), 2.0), obs=torch.tensor(0.5))

    elbo = vfe.FreeEnergy()
    for number in range(1, 4):
        elbo.loss(model, None, U)
        assert count(both) == count(one) == number
    alone = nn.BatchNorm1d(3)
    for _ in range(3):
        alone(U)
    torch.testing.assert_close(both.running_mean, alone.running_mean, rtol=0, atol=0)


def test_values_that_are_differentiated_one_by_one_move_nothing_on() -> None:
    norm = nn.BatchNorm1d(3)

    def model(u: Tensor) -> None:
        rate = pyro.param("rate", torch.tensor(2.0)) + norm(u).mean() * 0
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("n", dist.Poisson(rate * (1 - z)), obs=torch.tensor(0.0))

    pyro.clear_param_store()
    elbo = vfe.FreeEnergy()
    for number in range(1, 4):
        elbo.loss_and_grads(model, None, U)
        assert count(norm) == number


class Annealed(nn.Module):
    """Counts its own steps in a buffer, in place or by a new tensor, and weighs the data by them."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.step: Tensor
        self.register_buffer("step", torch.zeros(()))

    def model(self, u: Tensor) -> None:
        if self.in_place:
            self.step += 1
        else:
            self.step = self.step + 1
        with pyro.plate("data", len(u)):
            v = pyro.sample("v", dist.Bernoulli(0.4))
            with pyro.poutine.scale(scale=torch.clamp(self.step / 10, max=1.0)):
                pyro.sample("u", dist.Normal(v, 1.0), obs=u[:, 0])

    forward = model


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("bound", [True, False])
def test_a_buffer_that_counts_steps_anneals_as_with_pyro(in_place: bool, bound: bool) -> None:
    def losses(elbo: Any) -> list[float]:
        annealed = Annealed(in_place)
        program = annealed.model if bound else annealed

        def guide(u: Tensor) -> None:
            with pyro.plate("data", len(u)):
                pyro.sample("v", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})

        return [elbo.loss(program, guide, U) for _ in range(3)]

    torch.testing.assert_close(losses(vfe.FreeEnergy()), losses(TraceEnum_ELBO(max_plate_nesting=1)))


class Codebook(nn.Module):
    """Vector quantisation whose codes are running means, set up by the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.is_set: Tensor
        self.codes: Tensor
        self.register_buffer("is_set", torch.tensor(False))
        self.register_buffer("codes", torch.zeros(2, 3))

    def forward(self, u: Tensor) -> Tensor:
        if not self.is_set:
            self.codes.copy_(u[:2])
            self.is_set.fill_(True)
        nearest = torch.cdist(u, self.codes).argmin(-1)
        for code in range(2):
            self.codes[code].mul_(0.9).add_(0.1 * u[nearest == code].mean(0))
        return torch.cdist(u, self.codes)


OTHER_NETS: dict[str, Callable[..., nn.Module]] = {
    "power iteration": lambda out=2: nn.utils.parametrizations.spectral_norm(nn.Linear(3, out)),
    "power iteration in a hook": lambda out=2: nn.utils.spectral_norm(nn.Linear(3, out)),
    "a codebook": lambda out=2: nn.Sequential(Codebook(), nn.Linear(2, out)),
    "lazy": lambda out=2: Net(out, nn.LazyBatchNorm1d),
    "instances": lambda out=2: Net(out, lambda: nn.InstanceNorm1d(12, affine=True, track_running_stats=True)),
}


@pytest.mark.parametrize("name", OTHER_NETS)
@pytest.mark.filterwarnings("ignore:Lazy modules", "ignore:.*torch.nn.utils.weight_norm", "ignore:.*spectral_norm")
def test_other_states_of_networks_are_those_of_steps_of_the_network(name: str) -> None:
    pyro.set_rng_seed(0)
    net = OTHER_NETS[name]()

    def model(u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            v = pyro.sample("v", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("u", dist.Normal(v.to(u), 1.0), obs=u[:, 0])

    def guide(u: Tensor) -> None:
        logits = net(u)
        with pyro.plate("data", len(u)):
            pyro.sample("v", dist.Categorical(logits=logits))

    elbo, before = vfe.FreeEnergy(), torch.get_rng_state()
    for _ in range(2):
        elbo.loss_and_grads(model, guide, U)
    found = {key: value.clone() for key, value in net.named_buffers()}
    pyro.set_rng_seed(0)
    alone = OTHER_NETS[name]()
    torch.set_rng_state(before)
    for _ in range(2):
        alone(U)
    torch.testing.assert_close(found, dict(alone.named_buffers()), rtol=1e-12, atol=1e-12)


def test_what_a_flag_says_was_set_up_is_not_undone() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.is_set = False
            self.mean: Tensor
            self.register_buffer("mean", torch.zeros(3))

        def forward(self, u: Tensor) -> Tensor:
            if not self.is_set:
                self.mean.copy_(u.mean(0))
                self.is_set = True
            return u - self.mean

    scaled = Scaled()

    def model(u: Tensor) -> None:
        u = scaled(u)
        with pyro.plate("data", len(u)):
            v = pyro.sample("v", dist.Bernoulli(0.5))
            pyro.sample("u", dist.Normal(v, 1.0), obs=u[:, 0])

    assert vfe.FreeEnergy().loss(model, None, U) == vfe.FreeEnergy().loss(model, None, U)
    torch.testing.assert_close(scaled.mean, U.mean(0), rtol=0, atol=0)


def test_networks_in_evaluation_mode_are_differentiated_after_looks() -> None:
    pair = Pair()
    for net in pair.nets:
        net.eval()
    before = pair.buffers()
    vfe.FreeEnergy(check="always").loss_and_grads(pair.model, pair.guide, U)
    assert equal(pair.buffers(), before)
    gradients = [value.grad for net in pair.nets for value in net.parameters()]
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)


def test_data_that_a_module_holds_are_not_copied_in_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class Holding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.data: Tensor
            self.norm = nn.BatchNorm1d(3)
            self.register_buffer("data", torch.randn(10_000, 3))

        def forward(self) -> None:
            u = self.norm(self.data)
            with pyro.plate("data", len(u)):
                v = pyro.sample("v", dist.Bernoulli(0.5))
                pyro.sample("u", dist.Normal(v, 1.0), obs=u[:, 0])

    holding, elbo, copied, original = Holding(), vfe.FreeEnergy(), list[int](), buffers._copied
    for _ in range(2):  # The second call has a run more, to check.
        elbo.loss_and_grads(holding, None)

    def counted(buffer: Tensor | None) -> Tensor | None:
        copied.append(0 if buffer is None else buffer.numel())
        return original(buffer)

    monkeypatch.setattr(buffers, "_copied", counted)
    elbo.loss_and_grads(holding, None)
    assert sum(copied) == 7  # Means, variances and the number of batches.
    assert count(holding.norm) == 3


def test_EM_moves_statistics_on_once_an_iteration() -> None:
    norm = nn.BatchNorm1d(3)

    def model(u: Tensor) -> None:
        x = norm(u)
        locs = pyro.param("locs", torch.tensor([-0.5, 0.5]))
        with pyro.plate("data", len(u)):
            v = pyro.sample("v", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("u", dist.Normal(locs[v], 1.0), obs=x[:, 0])

    pyro.clear_param_store()
    run = vfe.EM(model).run(U, tol=1e-5, progress_bar=False)
    assert count(norm) == run.n_iter + 1  # One E-phase before the first iteration.


def test_phases_of_wake_sleep_move_on_what_learns_and_leave_what_is_held() -> None:
    pair = Pair()
    machine = vfe.WakeSleep(pair.model, pair.guide, adam(), adam(), dream_to_args=lambda made, u: ((made["u"],), {}))
    machine.run(U, num_steps=4, progress_bar=False)
    assert pair.batches() == [4, 4]


# Numbers


def mixture(u: Tensor, weight: float = 1.0) -> None:
    with pyro.plate("data", len(u)):
        v = pyro.sample("v", dist.Bernoulli(0.4))
        with pyro.poutine.scale(scale=weight):
            pyro.sample("u", dist.Normal(v, 1.0), obs=u[:, 0])


class Counting:
    def __init__(self) -> None:
        self.step = 0

    def model(self, u: Tensor) -> None:
        self.step += 1
        mixture(u)


class CountingModule(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.schedule = Counting()

    def forward(self, u: Tensor) -> None:
        self.schedule.model(u)


def counting_in_a_closure() -> Callable[[Tensor], None]:
    step = 0

    def model(u: Tensor) -> None:
        nonlocal step
        step += 1
        mixture(u)

    return model


def counting_in_a_dict() -> Callable[[Tensor], None]:
    state = {"step": 0.5}

    def model(u: Tensor) -> None:
        state["step"] *= 2
        mixture(u)

    return model


TOTAL = 0


def counting_in_a_global() -> Callable[[Tensor], None]:
    def model(u: Tensor) -> None:
        global TOTAL
        TOTAL += 1
        mixture(u)

    return model


def counting_in_place() -> Callable[[Tensor], None]:
    mean = torch.zeros(3)

    def model(u: Tensor) -> None:
        mean.mul_(0.9).add_(0.1 * u.mean(0))
        mixture(u)

    return model


COUNTERS: dict[str, tuple[Callable[[], Any], str]] = {
    "an attribute": (lambda: Counting().model, r"'step' of Counting \(0 before, (\d+) now\). In this call they ran \1"),
    "an attribute's attribute": (CountingModule, r"'step' of Counting \(0 before"),
    "a closure": (counting_in_a_closure, r"'step' in the closure of model \(0 before"),
    "a dict": (counting_in_a_dict, r"'state' in the closure of model\['step'\] \(0.5 before"),
    "a global": (counting_in_a_global, r"the global 'TOTAL' \(\d+ before"),
    "a tensor": (counting_in_place, r"'mean' in the closure of model"),
    "through handlers": (lambda: pyro.poutine.scale(Counting().model, scale=0.5), r"'step' of Counting"),
}


@pytest.mark.parametrize("name", COUNTERS)
def test_a_number_that_runs_ahead_is_told_once_by_name(name: str) -> None:
    make, words = COUNTERS[name]
    program, elbo = make(), vfe.FreeEnergy()
    with pytest.warns(VFEWarning, match=words):
        elbo.loss(program, None, U)
    elbo.loss(program, None, U)
    if name != "a global":
        vfe.posterior(program, U)


def test_a_difference_between_runs_that_a_counter_makes_is_told_with_its_name() -> None:
    class Annealing(Counting):
        def model(self, u: Tensor) -> None:
            self.step += 1
            mixture(u, self.step / 10)

    with pytest.raises(SpotCheckError, match="'step' of Annealing"):
        vfe.FreeEnergy().loss(Annealing().model, None, U)


def test_what_is_set_up_once_or_only_noted_is_not_told() -> None:
    class Noting:
        def __init__(self) -> None:
            self.size, self.is_ready, self.last = 0, False, 0.0
            self.table: Tensor | None = None

        def model(self, u: Tensor) -> None:
            if not self.is_ready:
                self.size, self.table, self.is_ready = len(u), torch.ones(2) / 2, True
            self.last = float(torch.rand(()))
            mixture(u)

    vfe.FreeEnergy().loss(Noting().model, None, U)
