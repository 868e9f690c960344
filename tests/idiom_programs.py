"""Random programs made of idioms: tables indexed in many ways, plates read by index or as wholes, rows, branches.

A seed says which pieces a program has, in which idiom each is written, and the numbers in it. What the program means is
its ordinary run: the joint table is made of these, one per joint value.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.ops.indexing import Vindex
from torch import Tensor

Program = Callable[[], None]

LOOKUPS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "t[a, b]": lambda t, a, b: t[a, b],
    "t[a][b]": lambda t, a, b: t[a][b],
    "t[a][..., b]": lambda t, a, b: t[a][..., b],
    "Vindex": lambda t, a, b: Vindex(t)[a, b],
    "Vindex, the last": lambda t, a, b: Vindex(t[a])[..., b],
    "take": lambda t, a, b: t.take(a * t.shape[1] + b),
    "flat": lambda t, a, b: t.flatten()[a * t.shape[1] + b],
    "select": lambda t, a, b: t.index_select(0, a.reshape(1))[0].index_select(0, b.reshape(1))[0],
    "one-hot": lambda t, a, b: (
        (torch.nn.functional.one_hot(a, t.shape[0]).to(t) @ t) * torch.nn.functional.one_hot(b, t.shape[1])
    ).sum(-1),
    "where": lambda t, a, b: torch.where(a == 0, t[0, b], t[t.shape[0] - 1, b]),
    "gather": lambda t, a, b: t[a].gather(-1, b.unsqueeze(-1)).squeeze(-1),
    "transposed": lambda t, a, b: t.T[b][a],
    "a loop": lambda t, a, b: sum((t[k, b] * (a == k) for k in range(t.shape[0])), torch.zeros(())),
}

GATHERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "t[z[i]]": lambda t, z, i: t[z[i]],
    "t[z[..., i]]": lambda t, z, i: t[z[..., i]],
    "t[z][i]": lambda t, z, i: t[z][i],
    "gather": lambda t, z, i: t[z.gather(-1, i)],
    "index_select": lambda t, z, i: t[z.index_select(-1, i)],
    "take": lambda t, z, i: t.take(z.take(i)),
    "one-hot": lambda t, z, i: torch.nn.functional.one_hot(z, len(t))[i].to(t) @ t,
    "Vindex": lambda t, z, i: Vindex(t)[z[i]],
    "neighbours": lambda t, z, i: t[z[i]] + t[z[i.roll(1)]],
}

WHOLES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda t, z: t[z].sum(-1),
    "sum of all": lambda t, z: t[z].sum(),
    "product": lambda t, z: (1 + 0.3 * t[z]).prod(-1),
    "largest": lambda t, z: t[z].max(),
    "inner product": lambda t, z: t[z] @ torch.linspace(-1.0, 1.0, z.shape[-1]),
    "first": lambda t, z: t[z[0]],
}

PIECES = ("lookup", "row", "gather", "whole", "branch", "size", "product", "two plates")


@dataclass(frozen=True)
class Idioms:
    """One program."""

    seed: int
    pieces: tuple[str, ...]
    idiom: dict[str, str]
    guided: bool


def idioms_of(seed: int) -> Idioms:
    """The program of a seed."""
    chance = random.Random(seed)
    pieces = tuple(sorted(chance.sample(PIECES, chance.choice((1, 1, 2)))))
    ways: dict[str, list[str]] = {"lookup": [*LOOKUPS], "gather": [*GATHERS], "whole": [*WHOLES]}
    idiom = {name: chance.choice(known) for name, known in ways.items()}
    branches = {"branch", "size"} & set(pieces)
    return Idioms(seed, pieces, idiom, not branches and chance.random() < 0.4)


class Numbers:
    """Parameters and data of a program, by name."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def noise(self, name: str, *shape: int) -> Tensor:
        """Numbers that a name has in this program."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(hash_of(name, self.seed)))

    def real(self, name: str, *shape: int) -> Tensor:
        """A parameter."""
        found: Tensor = pyro.param(name, self.noise(name, *shape))
        return found

    def probs(self, name: str, *shape: int) -> Tensor:
        """A parameter of probabilities."""
        found: Tensor = pyro.param(name, self.noise(name, *shape).softmax(-1), constraint=constraints.simplex)
        return found


def hash_of(name: str, seed: int) -> int:
    """A number of a name and a seed, the same in all processes."""
    return (seed * 1_000_003 + sum(ord(letter) * 31**place for place, letter in enumerate(name))) % 2**31


def model_of(spec: Idioms) -> Program:
    """The model of a program."""
    numbers = Numbers(spec.seed)

    def model() -> None:
        a = pyro.sample("a", dist.Categorical(numbers.probs("p_a", 2)))
        b = pyro.sample("b", dist.Categorical(numbers.probs("p_b", 2, 3)[a]))
        for piece in spec.pieces:
            MAKERS[piece](numbers, spec.idiom, a, b)

    return model


def guide_of(spec: Idioms) -> Program:
    """The guide of a program; one without sites where everything is left to the model."""
    numbers = Numbers(spec.seed)

    def guide() -> None:
        if spec.guided:
            pyro.sample("a", dist.Categorical(numbers.probs("q_a", 2)))
            pyro.sample("b", dist.Categorical(numbers.probs("q_b", 3)))

    return guide


def observe(name: str, loc: Tensor, numbers: Numbers, *shape: int) -> None:
    """A datum or several."""
    pyro.sample(name, dist.Normal(loc, 1.0), obs=numbers.noise(f"data_{name}", *shape))


def lookup(numbers: Numbers, idiom: dict[str, str], a: Tensor, b: Tensor) -> None:
    """A table indexed by two latents."""
    observe("u", LOOKUPS[idiom["lookup"]](numbers.real("t", 2, 3), a, b), numbers)


def row(numbers: Numbers, idiom: dict[str, str], a: Tensor, b: Tensor) -> None:
    """A row of a global latent along a plate, whose elements have a latent too."""
    line = numbers.real("rows", 3, 4)[b]
    with pyro.plate("line", 4):
        w = pyro.sample("w", dist.Categorical(numbers.probs("p_w", 2)))
        observe("v", line + w, numbers, 4)


def items(numbers: Numbers, name: str, a: Tensor) -> Tensor:
    """A plate of latents that read a global one."""
    with pyro.plate(f"items_{name}", 3):
        found: Tensor = pyro.sample(f"z_{name}", dist.Categorical(numbers.probs(f"p_{name}", 2, 2)[a]))
    return found


def gather(numbers: Numbers, idiom: dict[str, str], a: Tensor, b: Tensor) -> None:
    """Labels that read items by index."""
    z = items(numbers, "gather", a)
    with pyro.plate("labels", 4):
        loc = GATHERS[idiom["gather"]](numbers.real("levels", 2), z, torch.tensor([0, 2, 2, 1]))
        observe("y", loc, numbers, 4)


def whole(numbers: Numbers, idiom: dict[str, str], a: Tensor, b: Tensor) -> None:
    """A plate read as a whole."""
    observe("s", WHOLES[idiom["whole"]](numbers.real("weights", 2), items(numbers, "whole", a)), numbers)


def branch(numbers: Numbers, idiom: dict[str, str], a: Tensor, b: Tensor) -> None:
    """Names and sites that depend on latents."""
    level = numbers.real("level", 3)
    for step in range(int(b) + 1):
        c = pyro.sample(f"c_{int(a)}_{step}", dist.Bernoulli(torch.sigmoid(level[step])))
        if c:
            break
    observe(f"r_{int(b)}", level[int(b)] + c, numbers)


def size(numbers: Numbers, idiom: dict[str, str], a: Tensor, b: Tensor) -> None:
    """A change point: two plates whose sizes a latent says."""
    count, data, level = int(b) + 1, numbers.noise("series", 4), numbers.real("levels_of_time", 2, 2)
    for part, stretch in enumerate((data[:count], data[count:])):
        with pyro.plate(f"part_{part}", len(stretch)):
            w = pyro.sample(f"w_{part}", dist.Categorical(numbers.probs("p_part", 2)))
            pyro.sample(f"x_{part}", dist.Normal(level[part][w], 1.0), obs=stretch)


def product(numbers: Numbers, idiom: dict[str, str], a: Tensor, b: Tensor) -> None:
    """A stack of latents through a matrix product."""
    xi = torch.stack([pyro.sample(f"xi_{i}", dist.Bernoulli(0.3 + 0.2 * i)) for i in range(2)])
    loc = (xi * numbers.real("slopes", 2)) @ numbers.noise("X", 3, 2).T
    with pyro.plate("rows_of_X", 3):
        observe("o", loc, numbers, 3)


def two_plates(numbers: Numbers, idiom: dict[str, str], a: Tensor, b: Tensor) -> None:
    """Labels that read items and raters."""
    z, t = items(numbers, "one", a), items(numbers, "other", a)
    with pyro.plate("both", 3):
        loc = z[..., torch.tensor([0, 1, 1])] * (1 + t[..., torch.tensor([2, 2, 0])] * numbers.real("skill"))
        observe("l", loc, numbers, 3)


MAKERS = dict(zip(PIECES, (lookup, row, gather, whole, branch, size, product, two_plates), strict=True))
