r"""Random sigmoid belief nets with nothing on, and the best bounds on log P(nothing on) from factorised Q.

    surprise  =  -log sum_v P(v, u = 0)        F(Q)  =  E_Q[ log Q(v) - log P(v, u = 0) ]

Three layers of 2, 4 and 6 units; weights and biases uniform in [-1, 1]; the six are seen, and off. Q = prod_i Q(v_i)
over the other six. F is exact here, where Saul, Jaakkola and Jordan bound it once more to be able to compute it: for a
unit with input z,

    E_Q[ log(1 + e^z) ]  <=  xi E_Q[z] + log E_Q[ e^(-xi z) + e^((1 - xi) z) ]        for any xi

References:
    Saul, Jaakkola and Jordan (1996), Mean field theory for sigmoid belief networks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from textwrap import fill

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import softplus

import pyro_vfe as vfe

TOP, HIDDEN, VISIBLE = 2, 4, 6
SPREAD = 3.0
"""Standard deviation of the logits that all starts but the first have; the first has all probabilities at one half."""
PUBLISHED = 0.01562
"""The mean of (bound - surprise) / surprise in the paper."""
TOLERANCE = 1e-12
"""A sweep that lowers no net's F by more, in nats, is the last."""
MOST_SWEEPS = 1000
NUM_ITERATIONS = 60
"""Of L-BFGS over the paper's bound; 200 change its mean by a millionth of itself."""
BINS, BAR = 12, 50
"""Bars of the histogram, and the characters of the longest."""


@dataclass(frozen=True, eq=False)
class Nets:
    """Weights and biases of N nets."""

    top_bias: Tensor
    """Shape `(N, 2)`."""
    hidden_weight: Tensor
    """Shape `(N, 2, 4)`."""
    hidden_bias: Tensor
    """Shape `(N, 4)`."""
    visible_weight: Tensor
    """Shape `(N, 4, 6)`."""
    visible_bias: Tensor
    """Shape `(N, 6)`."""

    def __len__(self) -> int:
        """The number of nets."""
        return len(self.top_bias)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Nets":
        """Returns the nets with every tensor changed."""
        return Nets(*(change(getattr(self, field.name)) for field in fields(self)))


def random_nets(num_nets: int, seed: int = 0) -> Nets:
    """Returns nets with all weights and biases uniform in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((TOP,), (TOP, HIDDEN), (HIDDEN,), (HIDDEN, VISIBLE), (VISIBLE,))
    return Nets(*(2 * torch.rand(num_nets, *shape, generator=generator, dtype=torch.float64) - 1 for shape in shapes))


def nothing_on(nets: Nets) -> None:
    """All nets, with no visible unit on; a site for each hidden unit, so that Q is factorised over units."""

    def units(name: str, logits: Tensor) -> list[Tensor]:
        return [pyro.sample(f"{name}_{i}", dist.Bernoulli(logits=logits[..., i])) for i in range(logits.shape[-1])]

    def inputs(values: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
        return bias + sum(value[..., None] * weight[:, i] for i, value in enumerate(values))

    with pyro.plate("nets", len(nets)):
        top = units("top", nets.top_bias)
        hidden = units("hidden", inputs(top, nets.hidden_weight, nets.hidden_bias))
        logits = inputs(hidden, nets.visible_weight, nets.visible_bias)
        pyro.sample("u", dist.Bernoulli(logits=logits).to_event(1), obs=torch.zeros_like(nets.visible_bias))


# The best factorised Q ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Bounds:
    """Surprise and F of each net, in nats, shape `(N,)`."""

    surprise: Tensor
    """-log P(u = 0), exact."""
    free_energy: Tensor
    """F of the best Q that was found."""
    ends: Tensor
    """F where each start ended, shape `(starts, N)`."""
    num_sweeps: int
    """How often coordinate descent went through all units, until no net's F fell."""

    @property
    def looseness(self) -> Tensor:
        """(F - surprise) / surprise of each net."""
        return self.free_energy / self.surprise - 1


def best_bounds(nets: Nets, num_starts: int, seed: int = 0) -> Bounds:
    """Returns the lowest F of each net over some starts of coordinate descent.

    A net is in the plate once for each start, so that all descend at once.

    Args:
        nets: The nets.
        num_starts: The number of starts; the first has all probabilities at one half.
        seed: Of the other starts.
    """
    repeated = nets.mapped(lambda values: values.repeat(num_starts, *[1] * (values.dim() - 1)))
    pyro.clear_param_store()
    guide = started(repeated, num_starts, seed)
    em = vfe.EM(nothing_on, guide, e_phase=vfe.Coordinate())
    elbo, before, fall, num_sweeps = vfe.FreeEnergy(), torch.inf, torch.inf, 0
    while fall > TOLERANCE and num_sweeps < MOST_SWEEPS:
        em.e_phase(repeated)
        terms = elbo.decompose(nothing_on, guide, repeated).by("nets")
        fall, before, num_sweeps = float((before - terms.free_energy).max()), terms.free_energy, num_sweeps + 1
    ends = terms.free_energy.reshape(num_starts, len(nets))
    return Bounds(terms.surprise[: len(nets)], ends.min(0).values, ends, num_sweeps)


def started(nets: Nets, num_starts: int, seed: int) -> vfe.AutoMeanField:
    """Returns a factorised guide at random, and at one half in the first of the repetitions of the nets."""
    guide = vfe.AutoMeanField(nothing_on)
    pyro.set_rng_seed(seed)
    guide(nets)
    with torch.no_grad():
        for logits in guide.parameters():
            logits.normal_(0, SPREAD)
            logits[: len(nets) // num_starts] = 0
    return guide


# What the paper computes ----------------------------------------------------------------------------------------------


def bounded_twice(nets: Nets) -> Tensor:
    """Returns the lowest bound of the paper for each net, in nats, shape `(N,)`: over Q and one xi for each unit.

    Written by the paper's formulas, without programs.
    """
    q_logits = torch.zeros(len(nets), TOP + HIDDEN, dtype=torch.float64, requires_grad=True)
    xi = torch.full((len(nets), HIDDEN + VISIBLE), 0.5, dtype=torch.float64, requires_grad=True)
    optim = torch.optim.LBFGS(
        [q_logits, xi], max_iter=NUM_ITERATIONS, history_size=20, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optim.zero_grad()
        loss = paper_bound(nets, q_logits.sigmoid(), xi).sum()
        loss.backward()
        return loss

    optim.step(closure)
    with torch.no_grad():
        return paper_bound(nets, q_logits.sigmoid(), xi)


def paper_bound(nets: Nets, q: Tensor, xi: Tensor) -> Tensor:
    """Returns the bound of each net.

    Args:
        nets: The nets.
        q: The probability of each unit that is not seen to be on, shape `(N, 6)`.
        xi: The parameter of each unit that has parents, shape `(N, 10)`.
    """
    top, hidden = q.split((TOP, HIDDEN), -1)
    energy = (softplus(nets.top_bias) - top * nets.top_bias).sum(-1)
    mean, log_mean = inputs_under(top, nets.hidden_weight, nets.hidden_bias, xi[:, :HIDDEN])
    energy = energy + (log_mean - hidden * mean).sum(-1)
    energy = energy + inputs_under(hidden, nets.visible_weight, nets.visible_bias, xi[:, HIDDEN:])[1].sum(-1)
    return energy + (torch.xlogy(q, q) + torch.xlogy(1 - q, 1 - q)).sum(-1)


def inputs_under(on: Tensor, weight: Tensor, bias: Tensor, xi: Tensor) -> tuple[Tensor, Tensor]:
    """Returns E[z] of each unit's input z = bias + sum_i v_i weight_i, and what bounds E[log(1 + e^z)]."""
    mean = bias + (on[..., None] * weight).sum(1)

    def log_mean_exp(factor: Tensor) -> Tensor:
        each = 1 - on[..., None] + on[..., None] * (factor[:, None] * weight).exp()
        return factor * bias + each.log().sum(1)

    return mean, xi * mean + torch.logaddexp(log_mean_exp(-xi), log_mean_exp(1 - xi))


# In words -------------------------------------------------------------------------------------------------------------


def section(bounds: Bounds, twice: Tensor) -> str:
    """Returns what the page of results says of the bounds, in Markdown.

    Args:
        bounds: The best F of each net.
        twice: The paper's bound of each net, in nats.
    """
    num_starts, num_nets = bounds.ends.shape
    apart = float((bounds.ends - bounds.free_energy).max())
    told = (
        f"Sigmoid belief nets of {TOP}, {HIDDEN} and {VISIBLE} units, weights and biases uniform in [-1, 1], and the "
        f"surprise of all {VISIBLE} visible units being off, as Saul, Jaakkola and Jordan (1996) had them. In percent, "
        f"(F - surprise) / surprise; the surprise is exact. The published mean, of the paper's own nets and with its "
        f"second bound, is {100 * PUBLISHED:.2f}. {num_starts} starts of coordinate descent ended, after "
        f"{bounds.num_sweeps} sweeps, within {apart:.0e} nats of each other in every net."
    )
    rows = {
        "F of the best factorised Q": bounds.looseness,
        "the same with the paper's second bound": twice / bounds.surprise - 1,
        "all visible states equally probable: size of the error": (VISIBLE * math.log(2) / bounds.surprise - 1).abs(),
    }
    table = [f"| {name} | {_summary(100 * values)} |" for name, values in rows.items()]
    header = ["| | mean | ± | median | 95 % | most |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    bars = ["```text", *_histogram(100 * bounds.looseness), "```"]
    parts = ([fill(told, 116)], [*header, *table], ["How many nets by the first row's number:"], bars)
    return "\n\n".join([f"## Bounds on {num_nets:,} random nets", *("\n".join(lines) for lines in parts)]) + "\n"


def _summary(values: Tensor) -> str:
    """The mean and its standard error, the median, the 95 % quantile and the largest."""
    error = values.std() / len(values) ** 0.5
    numbers = (values.mean(), error, values.median(), values.quantile(0.95), values.max())
    return " | ".join(f"{number:.2f}" if number > 0.1 else f"{number:.3f}" for number in numbers)


def _histogram(values: Tensor) -> list[str]:
    """Lines of bars, one for each interval of equal length."""
    step = math.ceil(2 * float(values.max()) / BINS) / 2
    counts = torch.histc(values, BINS, 0, BINS * step).int().tolist()
    longest = max(counts)
    return [
        f"{i * step:4.1f} to {(i + 1) * step:4.1f} %  {count:5}  {'#' * round(BAR * count / longest)}".rstrip()
        for i, count in enumerate(counts)
    ]
