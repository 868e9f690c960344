"""The idioms of Pyro's own examples and tutorials, in programs of our own: the loss and gradients of TraceEnum_ELBO."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs.case import empty, tensor
from pyro import poutine
from pyro.contrib.autoname import scope
from pyro.distributions import constraints
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta
from pyro.ops.indexing import Vindex
from torch import Tensor, nn

import pyro_vfe as vfe


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WORDS = torch.randint(6, (4, 8), generator=torch.Generator().manual_seed(1))


def topics() -> None:
    """Words in documents; which documents are present the guide alone says."""
    with pyro.plate("topics", 3):
        words = pyro.sample("topic_words", dist.Dirichlet(torch.ones(6)))
    with pyro.plate("documents", 8) as ind:
        mixture = pyro.sample("doc_topics", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("words", 4):
            topic = pyro.sample("word_topics", dist.Categorical(mixture), infer={"enumerate": "parallel"})
            pyro.sample("doc_words", dist.Categorical(words[topic]), obs=WORDS[:, ind])


def some_documents() -> None:
    with pyro.plate("topics", 3):
        rate = pyro.param("rate", noise(3, 6).exp(), constraint=constraints.positive)
        pyro.sample("topic_words", dist.Dirichlet(rate))
    weights = pyro.param("weights", noise(6, 3))
    with pyro.plate("documents", 8, 3) as ind:
        counts = nn.functional.one_hot(WORDS[:, ind], 6).sum(0).to(weights)
        pyro.sample("doc_topics", dist.Delta((counts @ weights).softmax(-1), event_dim=1))


POINTS = tensor([0.0, 1.0, 2.0, 20.0, 30.0, 40.0])


def scoped() -> None:
    """Names with a prefix, and a plate without a size."""

    @scope(prefix="local")
    def of_each(weights: Tensor, locs: Tensor) -> None:
        z = pyro.sample("z", dist.Categorical(weights).expand_by([len(POINTS)]))
        pyro.sample("obs", dist.Normal(locs[z], 5.0), obs=POINTS)

    weights = pyro.param("weights", tensor([0.4, 0.6]), constraint=constraints.simplex)
    locs = pyro.param("locs", tensor([0.0, 25.0]))
    with pyro.plate("data"):
        of_each(weights, locs)


def scoped_guide() -> None:
    @scope(prefix="local")
    def of_each(probs: Tensor) -> None:
        pyro.sample("z", dist.Categorical(probs))

    probs = pyro.param("probs", torch.full((6, 2), 0.5), constraint=constraints.simplex)
    with pyro.plate("data"):
        of_each(probs)


NOTES = (noise(3, 5, 4, seed=2) > 0).double()
LENGTHS = torch.tensor([5, 3, 4])


def music(order: int) -> Callable[[], None]:
    """Sequences of several lengths, tones in a plate, states of one or two steps before."""

    def model() -> None:
        move = pyro.param("move", noise(3, 3, 3).softmax(-1), constraint=constraints.simplex)
        tone = pyro.param("tone", noise(3, 4).sigmoid(), constraint=constraints.unit_interval)
        tones = pyro.plate("tones", 4, dim=-1)
        with pyro.plate("sequences", 3, dim=-2):
            before, z = torch.tensor(0), torch.tensor(0)
            for t in pyro.markov(range(5), history=order):
                with poutine.mask(mask=(t < LENGTHS).unsqueeze(-1)):
                    probs = Vindex(move)[before, z] if order == 2 else move[0, z]
                    before, z = z, pyro.sample(f"z_{t}", dist.Categorical(probs))
                    with tones as columns:
                        probs = Vindex(tone)[z, columns]
                        pyro.sample(f"u_{t}", dist.Bernoulli(probs), obs=NOTES[:, t])

    return model


def factorial() -> None:
    """Two chains, of which the tones read both."""
    x = y = torch.tensor(0)
    moves = pyro.param("moves", noise(2, 2, 2).softmax(-1), constraint=constraints.simplex)
    tone = pyro.param("both", noise(2, 2, 4).sigmoid(), constraint=constraints.unit_interval)
    tones = pyro.plate("tones", 4, dim=-1)
    with pyro.plate("sequences", 3, dim=-2):
        for t in pyro.markov(range(4)):
            x = pyro.sample(f"x_{t}", dist.Categorical(moves[0][x]))
            y = pyro.sample(f"y_{t}", dist.Categorical(moves[1][y]))
            with tones as columns:
                pyro.sample(f"u_{t}", dist.Bernoulli(Vindex(tone)[x, y, columns]), obs=NOTES[:, t])


CAPTURED = (noise(6, 4, seed=3) > 0).double()


def recaptures() -> None:
    """Animals that live on or not, from their first capture on."""
    phi = pyro.param("phi", tensor(0.7), constraint=constraints.unit_interval)
    rho = pyro.param("rho", tensor([0.3, 0.4, 0.5, 0.6]), constraint=constraints.unit_interval)
    alive, seen = torch.ones(6), torch.zeros(6, dtype=torch.bool)
    animals = pyro.plate("animals", 6, dim=-1)
    for t in pyro.markov(range(4)):
        with animals, poutine.mask(mask=seen):
            survives = torch.where(seen, phi * alive, 1.0)
            alive = pyro.sample(f"z_{t}", dist.Bernoulli(survives), infer={"enumerate": "parallel"})
            pyro.sample(f"y_{t}", dist.Bernoulli(rho[t] * alive), obs=CAPTURED[:, t])
        seen = seen | CAPTURED[:, t].bool()


IMAGES = (noise(4, 5, seed=4) > 0).double()


def side_by_side(one: Tensor, other: Tensor) -> Tensor:
    batch = torch.broadcast_shapes(one.shape[:-1], other.shape[:-1])
    return torch.cat([part.expand(*batch, part.shape[-1]) for part in (one, other)], -1)


def labels_of_images() -> None:
    """A label that some data lack, and a network that reads it beside a drawn latent."""
    decoder = pyro.param("decoder", noise(5, 5))
    with pyro.plate("data", 4):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        y = pyro.sample("y", dist.OneHotCategorical(tensor([0.2, 0.3, 0.5])))
        both = side_by_side(z, y)
        pyro.sample("x", dist.Bernoulli(logits=both @ decoder).to_event(1), obs=IMAGES)


def recognised() -> None:
    encoder, classifier = pyro.param("encoder", noise(8, 2, seed=5)), pyro.param("classifier", noise(5, 3, seed=6))
    with pyro.plate("data", 4):
        y = pyro.sample("y", dist.OneHotCategorical(logits=IMAGES @ classifier))
        pyro.sample("z", dist.Normal((side_by_side(IMAGES, y) @ encoder).tanh(), 1.0).to_event(1))


def net_of_tables() -> None:
    """Conditional tables as parameters, in a plate of cases."""
    rain = pyro.param("rain", tensor([0.3, 0.7]), constraint=constraints.simplex)
    sprinkler = pyro.param("sprinkler", noise(2, 2).softmax(-1), constraint=constraints.simplex)
    wet = pyro.param("wet", noise(2, 2, 2).softmax(-1), constraint=constraints.simplex)
    with pyro.plate("cases", 5):
        r = pyro.sample("r", dist.Categorical(rain))
        s = pyro.sample("s", dist.Categorical(Vindex(sprinkler)[r]))
        pyro.sample("w", dist.Categorical(Vindex(wet)[s, r]), obs=torch.tensor([0, 1, 1, 0, 1]))


def nested_shapes() -> None:
    """Three plates, and latents at each depth."""
    a = pyro.sample("a", dist.Categorical(torch.ones(2) / 2))
    with pyro.plate("x_axis", 2, dim=-1):
        b = pyro.sample("b", dist.Categorical(tensor([[0.3, 0.7], [0.6, 0.4]])[a]))
        with pyro.plate("y_axis", 3, dim=-2):
            c = pyro.sample("c", dist.Bernoulli(tensor([0.2, 0.8])[b]))
            loc = pyro.param("loc", noise(2, 2))[b, c.long()]
            pyro.sample("o", dist.Normal(loc + a, 1.0), obs=noise(3, 2, seed=7))


def index_idioms() -> None:
    """Tables read by value and by element of the plate."""
    q = pyro.param("q", noise(3, 2).softmax(-1), constraint=constraints.simplex)
    e = pyro.param("e", noise(3, 4))
    with pyro.plate("data", 4) as columns:
        x = pyro.sample("x", dist.Categorical(torch.ones(3) / 3))
        y = pyro.sample("y", dist.Categorical(Vindex(q)[..., x, :]))
        pyro.sample("o", dist.Normal(Vindex(e)[x, columns] + y, 1.0), obs=noise(4, seed=8))


PROGRAMS: dict[str, tuple[Callable[..., None], Callable[..., None], int]] = {
    "topics, a subsample in the guide": (topics, some_documents, 2),
    "scoped names, a plate without a size": (scoped, scoped_guide, 1),
    "lengths and tones": (music(1), empty, 2),
    "two steps of history": (music(2), empty, 2),
    "two chains": (factorial, empty, 2),
    "capture and recapture": (recaptures, empty, 1),
    "labels of images": (labels_of_images, recognised, 1),
    "a net of tables": (net_of_tables, empty, 1),
    "nested shapes": (nested_shapes, empty, 2),
    "indices": (index_idioms, empty, 1),
}


def loss_and_gradients(elbo: Any, model: Any, guide: Any) -> tuple[float, dict[str, Tensor]]:
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    guide(), model()  # The parameters are made before anything is drawn.
    pyro.set_rng_seed(5)
    loss = elbo.loss_and_grads(model, guide)
    named = dict(pyro.get_param_store().named_parameters())
    return loss, {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in named.items()}


@pytest.mark.filterwarnings("ignore:Latent site 'z_1' is masked out where")
@pytest.mark.parametrize("name", PROGRAMS)
def test_loss_and_gradients_are_those_of_trace_enum(name: str) -> None:
    model, guide, nesting = PROGRAMS[name]
    marked, marked_guide = config_enumerate(model), config_enumerate(guide, expand=True)
    theirs = loss_and_gradients(TraceEnum_ELBO(max_plate_nesting=nesting), marked, marked_guide)
    for programs in ((marked, marked_guide), (model, guide)):
        loss, found = loss_and_gradients(vfe.FreeEnergy(), *programs)
        assert loss == pytest.approx(theirs[0], rel=1e-9)
        assert found.keys() == theirs[1].keys()
        for parameter, gradient in found.items():
            torch.testing.assert_close(gradient, theirs[1][parameter], rtol=1e-7, atol=1e-9)


def test_an_autoguide_of_the_continuous_sites_alone() -> None:
    def model() -> None:
        probs = pyro.sample("probs_x", dist.Dirichlet(0.9 * torch.eye(3) + 0.5).to_event(1))
        tone = pyro.sample("probs_y", dist.Beta(tensor(2.0), tensor(3.0)).expand([3]).to_event(1))
        x = torch.tensor(0)
        for t in pyro.markov(range(5)):
            x = pyro.sample(f"x_{t}", dist.Categorical(probs[x]), infer={"enumerate": "parallel"})
            pyro.sample(f"y_{t}", dist.Bernoulli(tone[x]), obs=NOTES[0, t, 0])

    guide = AutoDelta(poutine.block(model, expose_fn=lambda msg: msg["name"].startswith("probs_")))
    losses = []
    for elbo in (TraceEnum_ELBO(max_plate_nesting=0), vfe.FreeEnergy()):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide()
        losses.append(elbo.loss(model, guide))
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
