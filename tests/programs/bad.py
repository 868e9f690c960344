"""Programs that have no free energy, or none that can be computed: each must be refused in words that help."""

from itertools import count

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

import pyro_vfe as vfe
from programs.case import BadProgram, bernoulli, categorical, empty, simplex, tensor, unit
from programs.supports import COUNTS, alarm, guide_that_misses_the_or

POINTS = tensor([0.3, -0.2, 1.0])
RUNS = count()


def countless_latent() -> None:
    n = pyro.sample("n", dist.Poisson(3.0))
    pyro.sample("u", dist.Normal(n, 1.0), obs=tensor(2.0))


def waiting_time() -> None:
    n = pyro.sample("n", dist.Geometric(0.3))
    pyro.sample("u", dist.Normal(n, 1.0), obs=tensor(2.0))


def continuous_latent() -> None:
    weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
    z = bernoulli("z", 0.3)
    pyro.sample("u", dist.Normal(weight + z, 1.0), obs=tensor(2.0))


def guide_without_the_weight() -> None:
    bernoulli("z", unit("q"))


def read_from_outside_its_plate() -> None:
    with pyro.plate("data", 30):
        z = bernoulli("z", 0.3)
    pyro.sample("u", dist.Normal(z.sum(), 1.0), obs=tensor(2.0))


def latent_read_from_outside_its_plate() -> None:
    with pyro.plate("data", 30):
        z = bernoulli("z", 0.3)
    bernoulli("any", 0.1 + 0.8 * (z.sum() > 0))


def array_of_a_plate() -> None:
    with pyro.plate("data", 3):
        z = bernoulli("z", 0.3)
        pyro.sample("u", dist.Normal(torch.as_tensor(z.numpy() * 2.0), 1.0), obs=POINTS)


def branch_on_a_plate() -> None:
    with pyro.plate("data", 3):
        z = bernoulli("z", 0.3)
        loc = tensor(1.0) if (z > 0).any() else tensor(0.0)
        pyro.sample("u", dist.Normal(loc, 1.0), obs=POINTS)


def clique_of_forty() -> None:
    total = tensor(0.0)
    for n in range(40):
        total = total + (n + 1) * bernoulli(f"z_{n}", 0.3)
    pyro.sample("u", dist.Normal(total, 1.0), obs=tensor(2.0))


def impossible_data() -> None:
    z = categorical("z", simplex("z_probs", 2))
    emission = tensor([[0.5, 0.5, 0.0], [0.9, 0.1, 0.0]])
    pyro.sample("u", dist.Categorical(emission[z]), obs=torch.tensor(2))


def nan_parameter() -> None:
    rate = pyro.param("rate", tensor([1.0, torch.nan]))
    z = categorical("z", tensor([0.4, 0.6]))
    pyro.sample("u", dist.Normal(rate[z], 1.0), obs=tensor(2.0))


def nan_factor() -> None:
    z = categorical("z", tensor([0.4, 0.6]))
    pyro.factor("bias", pyro.param("weight", tensor([1.0, torch.nan]))[z])


def three_values() -> None:
    z = categorical("z", tensor([0.2, 0.3, 0.5]))
    pyro.sample("u", dist.Normal(z.to(POINTS), 1.0), obs=tensor(2.0))


def guide_of_two_values() -> None:
    categorical("z", simplex("q", 2))


def guide_of_another_kind() -> None:
    pyro.sample("z", dist.OneHotCategorical(simplex("q", 3)))


def plate_named_like_a_site() -> None:
    with pyro.plate("z", 3):
        bernoulli("z", 0.3)


def site_named_twice() -> None:
    z = bernoulli("z", 0.3)
    z = bernoulli("z", 0.2 + 0.5 * z)
    pyro.sample("u", dist.Normal(z, 1.0), obs=tensor(2.0))


def changing_structure() -> None:
    z = bernoulli("z", 0.3)
    if next(RUNS) % 2:
        z = z + bernoulli("extra", 0.4)
    pyro.sample("u", dist.Normal(z, 1.0), obs=tensor(2.0))


def chain_without_a_time_plate() -> None:
    z = pyro.sample("z", vfe.MarkovChain(tensor([0.5, 0.5]), simplex("transition", 2, 2), num_steps=3))
    pyro.sample("u", dist.Normal(z.to(POINTS), 1.0).to_event(1), obs=torch.zeros(3))


def chain_in_another_plate() -> None:
    with pyro.plate("time", 3, dim=-2):
        z = pyro.sample("z", vfe.MarkovChain(tensor([0.5, 0.5]), simplex("transition", 2, 2)))
        pyro.sample("u", dist.Normal(z.to(POINTS), 1.0), obs=torch.zeros(3, 1))


def chain_along_a_subsample() -> None:
    with pyro.plate("time", 6, subsample_size=3):
        z = pyro.sample("z", vfe.MarkovChain(tensor([0.5, 0.5]), simplex("transition", 2, 2)))
        pyro.sample("u", dist.Normal(z.to(POINTS), 1.0), obs=torch.zeros(3))


def chain_with_changing_scale() -> None:
    with pyro.plate("time", 3), poutine.scale(scale=tensor([1.0, 2.0, 1.0])):
        pyro.sample("z", vfe.MarkovChain(tensor([0.5, 0.5]), simplex("transition", 2, 2)))


def chain_masked_in_the_middle() -> None:
    with pyro.plate("time", 3), poutine.mask(mask=torch.tensor([True, False, True])):
        pyro.sample("z", vfe.MarkovChain(tensor([0.5, 0.5]), simplex("transition", 2, 2)))


def chain_of_mixtures() -> None:
    with pyro.plate("time", 3):
        z = pyro.sample("z", vfe.MarkovChain(tensor([0.5, 0.5]), simplex("transition", 2, 2)))
        w = categorical("w", simplex("weights", 2, 2, seed=1)[z])
        pyro.sample("u", dist.Normal(w.to(POINTS), 1.0), obs=torch.zeros(3))


def guide_of_the_mixtures() -> None:
    with pyro.plate("time", 3):
        categorical("w", simplex("q", 2, seed=2))


def chain_of_a_class() -> None:
    c = categorical("c", simplex("classes", 2, seed=2))
    with pyro.plate("time", 3):
        z = pyro.sample("z", vfe.MarkovChain(tensor([0.5, 0.5]), simplex("transition", 2, 2, 2)[c]))
        pyro.sample("u", dist.Normal(z.to(POINTS), 1.0), obs=torch.zeros(3))


def guide_of_the_chain_alone() -> None:
    with pyro.plate("time", 3):
        pyro.sample("z", vfe.MarkovChain(tensor([0.5, 0.5]), simplex("q", 2, 2, seed=3)))


def chain_shared_by_sequences() -> None:
    with pyro.plate("time", 3, dim=-1):
        a = pyro.sample("a", vfe.MarkovChain(tensor([0.5, 0.5]), simplex("a_step", 2, 2)))
        with pyro.plate("sequences", 2, dim=-2):
            transition = simplex("b_step", 2, 2, 2, seed=1)[a]
            b = pyro.sample("b", vfe.MarkovChain(tensor([0.5, 0.5]), transition, num_steps=3))
            pyro.sample("u", dist.Normal(b.to(POINTS), 1.0), obs=torch.zeros(2, 3))


def chain_read_at_its_end() -> None:
    with pyro.plate("time", 3):
        z = pyro.sample("z", vfe.MarkovChain(tensor([0.5, 0.5]), simplex("transition", 2, 2)))
    pyro.sample("u", dist.Normal(z[..., -1].to(POINTS), 1.0), obs=tensor(0.5))


def chain_read_at_its_start() -> None:
    with pyro.plate("time", 3):
        z = pyro.sample("z", vfe.MarkovChain(tensor([0.5, 0.5]), simplex("transition", 2, 2)))
        pyro.sample("u", dist.Normal(z[..., :1].to(POINTS), 1.0), obs=torch.zeros(3))


BAD_PROGRAMS = {
    "countless_support": BadProgram(countless_latent, empty, ("'n'", "Poisson")),
    "waiting_time": BadProgram(waiting_time, empty, ("'n'", "Geometric")),
    "missing_guide_site": BadProgram(continuous_latent, guide_without_the_weight, ("'weight'", "Normal")),
    "plate_violation": BadProgram(read_from_outside_its_plate, empty, ("'z'", "'data'", "'u'")),
    "plate_violation_by_a_latent": BadProgram(latent_read_from_outside_its_plate, empty, ("'z'", "'data'", "'any'")),
    "escape_in_a_plate": BadProgram(array_of_a_plate, empty, ("'z'", "'data'")),
    "branch_on_a_plate": BadProgram(branch_on_a_plate, empty, ("'z'", "'data'")),
    "cost": BadProgram(clique_of_forty, empty, ("z_0",)),
    "impossible_data": BadProgram(impossible_data, empty, ("'u'",)),
    "nan_parameter": BadProgram(nan_parameter, empty, ("'rate'", "NaN")),
    "nan_factor": BadProgram(nan_factor, empty, ("'weight'", "NaN")),
    "fewer_values_in_the_guide": BadProgram(three_values, guide_of_two_values, ("'z'", "2", "3")),
    "another_support_in_the_guide": BadProgram(three_values, guide_of_another_kind, ("'z'", "OneHotCategorical")),
    "plate_named_like_a_site": BadProgram(plate_named_like_a_site, empty, ("'z'", "plate")),
    "site_named_twice": BadProgram(site_named_twice, empty, ("'z'",)),
    "changing_structure": BadProgram(changing_structure, empty, ("'extra'",)),
    "chain_without_a_time_plate": BadProgram(chain_without_a_time_plate, empty, ("'z'", "time")),
    "chain_in_another_plate": BadProgram(chain_in_another_plate, empty, ("'z'", "time", "dim=-1")),
    "chain_along_a_subsample": BadProgram(chain_along_a_subsample, empty, ("'z'", "'time'", "subsample")),
    "chain_with_changing_scale": BadProgram(chain_with_changing_scale, empty, ("'z'", "'time'", "scale")),
    "chain_masked_in_the_middle": BadProgram(
        chain_masked_in_the_middle, chain_masked_in_the_middle, ("'z'", "'time'", "tail")
    ),
    "chain_summed_above_a_guided_latent": BadProgram(
        chain_of_mixtures, guide_of_the_mixtures, ("'z'", "'w'", "'time'")
    ),
    "chain_shared_by_sequences": BadProgram(chain_shared_by_sequences, empty, ("'a'", "'b'", "sequences")),
    "class_above_a_guided_chain": BadProgram(chain_of_a_class, guide_of_the_chain_alone, ("'c'", "'z'", "'time'")),
    "chain_read_at_its_end": BadProgram(chain_read_at_its_end, empty, ("'u'", "'z'", "'time'")),
    "chain_read_at_its_start": BadProgram(chain_read_at_its_start, empty, ("'u'",)),
    "mass_on_the_impossible": BadProgram(alarm, guide_that_misses_the_or, ("'rings'",), (COUNTS,)),
}
