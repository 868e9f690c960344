"""A plate of latents that something outside of it reads as a whole: spike and slab, noisy-or, counts of a plate."""

import warnings
from collections.abc import Callable, Iterator

import pyro
import pyro.distributions as dist
import pytest
import torch
from checks import assert_equal, check_pair
from oracles import oracle
from programs.case import empty, tensor
from pyro.distributions import constraints
from torch import Tensor

import pyro_vfe as vfe
from pyro_vfe.errors import CostError, PlateError, PlateKeptError, VFEWarning

Program = Callable[[], None]

DESIGN = tensor([[1.0, 0.2], [0.5, 1.0], [2.0, 1.0]])


def prior(size: int) -> Tensor:
    found: Tensor = pyro.param("prior", torch.linspace(0.2, 0.7, size), constraint=constraints.unit_interval)
    return found


def spike_and_slab() -> None:
    w = pyro.param("w", tensor([1.0, -2.0, 0.5]))
    with pyro.plate("features", 3):
        z = pyro.sample("z", dist.Bernoulli(prior(3)))
    with pyro.plate("data", 2):
        pyro.sample(
            "o", dist.Normal((z * w) @ tensor([[1.0, 0.2], [0.5, 1.0], [2.0, 1.0]]), 1.0), obs=tensor([1.0, 2.0])
        )


def noisy_or() -> None:
    """The product runs over the last dim and keeps it, so that one run is enough; a reader in the plate beside it."""
    with pyro.plate("causes", 4):
        z = pyro.sample("z", dist.Bernoulli(prior(4)))
        pyro.sample(
            "x", dist.Normal(pyro.param("mu", tensor([0.0, 2.0]))[z.long()], 1.0), obs=tensor([0.1, 0.9, 0.4, 1.0])
        )
    pyro.sample("y", dist.Bernoulli(1 - 0.9 * torch.prod(1 - 0.8 * z, -1, keepdim=True)), obs=tensor([1.0]))


def a_count() -> None:
    """`z.sum()` joins values as well: each joint value has a run of its own."""
    with pyro.plate("n", 3):
        z = pyro.sample("z", dist.Categorical(pyro.param("p", tensor([0.2, 0.3, 0.5]), constraint=constraints.simplex)))
    pyro.sample("y", dist.Poisson(z.sum() + 0.5), obs=tensor(4.0))


def a_latent_of_each() -> None:
    """A second latent of each element, and one outside that the first reads."""
    g = pyro.sample("g", dist.Bernoulli(tensor(0.3)))
    with pyro.plate("n", 3):
        z = pyro.sample("z", dist.Bernoulli(prior(3) * (1 - 0.5 * g)))
        a = pyro.sample("a", dist.Bernoulli(0.2 + 0.6 * z))
        pyro.sample("x", dist.Normal(a, 1.0), obs=tensor([0.1, 0.9, 0.4]))
    pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=tensor(2.0))


def within_another_plate() -> None:
    """Each group reads its own elements."""
    with pyro.plate("groups", 2, dim=-1):
        with pyro.plate("members", 3, dim=-2):
            z = pyro.sample("z", dist.Bernoulli(prior(3)[:, None]))
        pyro.sample("y", dist.Normal(z.sum(-2, keepdim=True).squeeze(-2), 1.0), obs=tensor([2.0, 0.5]))


def two_plates() -> None:
    """Nested plates that are read as one whole, and a row of them as another."""
    with pyro.plate("rows", 2, dim=-2):
        a = pyro.sample("a", dist.Bernoulli(tensor([[0.3], [0.6]])))
        with pyro.plate("cols", 2, dim=-1):
            z = pyro.sample("z", dist.Bernoulli(prior(2) * (0.4 + 0.5 * a)))
    pyro.sample("y", dist.Normal(z.sum((-2, -1)), 1.0), obs=tensor(2.0))
    pyro.sample("x", dist.Normal(z[..., 0, :].sum(-1), 1.0), obs=tensor(0.4))


def neighbours() -> None:
    """A factor between neighbours of a plate: a small Ising chain."""
    with pyro.plate("spins", 4):
        z = pyro.sample("z", dist.Bernoulli(prior(4)))
    pyro.factor("coupling", pyro.param("j", tensor(0.7)) * ((2 * z[..., 1:] - 1) * (2 * z[..., :-1] - 1)).sum(-1))


def two_gathered() -> None:
    """Two latents of different plates in one label: a real graph."""
    item, who = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 1, 1])
    with pyro.plate("items", 3):
        z = pyro.sample("z", dist.Bernoulli(prior(3)))
    with pyro.plate("raters", 2):
        t = pyro.sample("t", dist.Bernoulli(tensor([0.6, 0.4])))
    with pyro.plate("labels", 4):
        loc = z[..., item] * (0.5 + pyro.param("skill", tensor(2.0)) * t[..., who])
        pyro.sample("y", dist.Normal(loc, 1.0), obs=tensor([0.1, 2.0, 0.4, 1.0]))


def by_index_and_as_a_whole() -> None:
    with pyro.plate("items", 3):
        z = pyro.sample("z", dist.Bernoulli(prior(3)))
    with pyro.plate("labels", 4):
        loc = pyro.param("mu", tensor([0.0, 2.0]))[z[..., torch.tensor([0, 1, 1, 2])].long()]
        pyro.sample("y", dist.Normal(loc, 1.0), obs=tensor([0.1, 2.0, 0.4, 1.0]))
    pyro.sample("s", dist.Normal(z.sum(), 1.0), obs=tensor(1.0))


def guide_of(size: int) -> Program:
    def guide() -> None:
        q = pyro.param("q", torch.linspace(0.3, 0.8, size), constraint=constraints.unit_interval)
        with pyro.plate({3: "features", 4: "causes"}[size], size):
            pyro.sample("z", dist.Bernoulli(q))

    return guide


PROGRAMS: dict[str, tuple[Program, Program]] = {
    "spike and slab": (spike_and_slab, empty),
    "spike and slab, with a guide": (spike_and_slab, guide_of(3)),
    "noisy or": (noisy_or, empty),
    "noisy or, with a guide": (noisy_or, guide_of(4)),
    "a count": (a_count, empty),
    "a latent of each": (a_latent_of_each, empty),
    "within another plate": (within_another_plate, empty),
    "neighbours": (neighbours, empty),
    "two plates": (two_plates, empty),
    "two gathered": (two_gathered, empty),
    "by index and as a whole": (by_index_and_as_a_whole, empty),
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The programs do not broadcast")
        yield


@pytest.mark.parametrize("name", PROGRAMS)
def test_terms_and_gradients_equal_the_joint_table(name: str) -> None:
    check_pair(*PROGRAMS[name][:2])


@pytest.mark.parametrize("name", [name for name in PROGRAMS if "guide" not in name])
def test_the_posterior_has_the_latents_in_their_plates(name: str) -> None:
    model, _ = PROGRAMS[name]
    exact, posterior = oracle(model, empty).posterior, vfe.posterior(model)
    assert_equal(posterior.log_evidence, exact.log_evidence, 1e-10)
    assert "z" in posterior.sites and not any("[" in site for site in posterior.sites)
    for latent, found in posterior.marginals().items():
        expected = exact.marginal(latent)
        plates = {"within another plate": "z", "two plates": "z"}  # Ours come by name, the table's by dim.
        assert_equal(found.transpose(0, 1) if plates.get(name) == latent else found, expected, 1e-10)
    assert_equal(posterior.entropy(), exact.entropy(), 1e-10)
    mode = posterior.mode()
    assert_equal(posterior.log_prob(mode), exact.probs.max().log(), 1e-10)
    assert_equal(exact.log_prob(dict(mode)), exact.probs.max().log(), 1e-10)
    draws = posterior.sample(50)
    for index in range(0, 50, 10):
        one = {site: value[index] for site, value in draws.items()}
        assert_equal(posterior.log_prob(draws)[index], exact.log_prob(one), 1e-9)


def test_joint_marginals_are_over_the_plate() -> None:
    exact, posterior = oracle(a_latent_of_each, empty).posterior, vfe.posterior(a_latent_of_each)
    for names in (("z", "a"), ("a", "z"), ("g", "z"), ("z", "a", "g")):
        assert_equal(posterior.marginal(*names), exact.marginal(*names), 1e-10)


def test_the_elements_have_no_terms_of_their_own() -> None:
    with pytest.raises(PlateKeptError):
        vfe.FreeEnergy().decompose(noisy_or, guide_of(4)).by("causes")


def test_one_run_is_enough_where_dims_count_from_the_right() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", VFEWarning)
        for model in (spike_and_slab, noisy_or, two_gathered):
            pyro.clear_param_store()
            vfe.FreeEnergy().loss(model, empty)


def test_em_learns_the_spikes() -> None:
    loops = []
    for vectorised in (True, False):
        pyro.clear_param_store()

        def model(vectorised: bool = vectorised) -> None:
            p = pyro.param("p", tensor(0.3), constraint=constraints.unit_interval)
            w = tensor([1.0, -2.0, 0.5])
            if vectorised:
                with pyro.plate("features", 3):
                    z = pyro.sample("z", dist.Bernoulli(p))
            else:
                z = torch.stack(
                    torch.broadcast_tensors(*[pyro.sample(f"z_{i}", dist.Bernoulli(p)) for i in range(3)]), -1
                )
            with pyro.plate("data", 2):
                pyro.sample("o", dist.Normal((z * w) @ DESIGN, 1.0), obs=tensor([1.0, 2.0]))

        loops.append(vfe.EM(model).run(max_iter=200, progress_bar=False, tol=1e-9))
    assert loops[0].free_energy == pytest.approx(loops[1].free_energy, abs=1e-6)


def test_a_plate_that_does_not_fit_is_refused() -> None:
    def model() -> None:
        with pyro.plate("n", 30):
            z = pyro.sample("z", dist.Bernoulli(tensor(0.3)))
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=tensor(2.0))

    with pytest.raises(PlateError, match="reads latent 'z' from outside plate 'n'"):
        vfe.FreeEnergy().loss(model, empty)


def test_a_guide_of_the_posterior_is_refused_with_two_ways_out() -> None:
    with pytest.raises(PlateError, match="AutoPosterior has no guide for latent 'z'"):
        vfe.FreeEnergy().decompose(spike_and_slab, vfe.AutoPosterior(spike_and_slab))

    def one_by_one() -> None:
        z = [pyro.sample(f"z_{i}", dist.Bernoulli(prior(3)[i])) for i in pyro.plate("features", 3)]
        loc = (torch.stack(torch.broadcast_tensors(*z), -1) * tensor([1.0, -2.0, 0.5])) @ DESIGN
        with pyro.plate("data", 2):
            pyro.sample("o", dist.Normal(loc, 1.0), obs=tensor([1.0, 2.0]))

    terms = vfe.FreeEnergy().decompose(one_by_one, vfe.AutoPosterior(one_by_one))
    assert_equal(terms.gap, tensor(0.0), 1e-10)
    assert_equal(terms.surprise, vfe.FreeEnergy().decompose(spike_and_slab, empty).surprise, 1e-10)


def test_two_large_plates_read_by_index_are_refused_with_their_cost_and_a_way_out() -> None:
    item, who = (torch.randint(20, (30,), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))

    def model() -> None:
        with pyro.plate("items", 20):
            z = pyro.sample("z", dist.Bernoulli(tensor(0.3)))
        with pyro.plate("raters", 20):
            t = pyro.sample("t", dist.Bernoulli(tensor(0.6)))
        with pyro.plate("labels", 30):
            pyro.sample("y", dist.Normal(z[item] + 2.0 * t[who], 1.0), obs=torch.ones(30))

    with pytest.raises(CostError, match=r"'y' of the model reads latents of several plates.*2\^40 joint values"):
        vfe.FreeEnergy().loss(model, empty)

    def guide() -> None:
        with pyro.plate("raters", 20):
            pyro.sample("t", dist.Bernoulli(tensor(0.5)), infer={"enumerate": None})

    def given_raters(t: Tensor) -> Tensor:
        likelihoods = [dist.Normal(value + 2.0 * t[who], 1.0).log_prob(torch.ones(30)) for value in (0.0, 1.0)]
        by_item = torch.zeros(20, 2).index_add(0, item, torch.stack(likelihoods, -1))
        return (tensor([0.7, 0.3]).log() + by_item).logsumexp(-1).sum()

    pyro.set_rng_seed(3)
    loss = vfe.FreeEnergy().loss(model, guide)
    pyro.set_rng_seed(3)
    t = dist.Bernoulli(tensor(0.5)).expand([20]).sample()
    cost = dist.Bernoulli(tensor(0.5)).log_prob(t).sum() - dist.Bernoulli(tensor(0.6)).log_prob(t).sum()
    assert loss == pytest.approx((cost - given_raters(t)).item(), rel=1e-10)
