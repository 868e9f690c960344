"""The variance of gradient estimates for a layered net of which some layers are drawn.

    variance  =  sum over the guide's parameters of Var[ gradient estimate ], relative to |gradient of F|^2

A Helmholtz machine 64-12-8 on scikit-learn's digits, binarised, and a guide that draws the middle layer given the image
and the top layer given the middle one. Run it to print the table: python benchmarks/variance_of_gradients.py
"""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pyro_vfe as vfe

SIZES = 64, 12, 8
DRAWS = 100
"""Gradient estimates per row, each of one image batch that is the same for all."""


class Machine(nn.Module):
    """A generative net and a recognition net of the same shape; layers named in `drawn` are drawn by the guide."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        visible, middle, top = SIZES
        torch.manual_seed(seed)
        self.top = nn.Parameter(torch.zeros(top))
        self.middle, self.visible = nn.Linear(top, middle), nn.Linear(middle, visible)
        self.to_middle, self.to_top = nn.Linear(visible, middle), nn.Linear(middle, top)
        self.drawn: tuple[str, ...] = ()

    def layer(self, name: str, logits: Tensor) -> Tensor:
        """A layer of binary units, drawn or enumerated."""
        infer = {"enumerate": None} if name in self.drawn else {}
        value: Tensor = pyro.sample(name, dist.Bernoulli(logits=logits).to_event(1), infer=infer)
        return value

    def model(self, u: Tensor) -> None:
        """Top, middle and image, from above."""
        with pyro.plate("data", len(u)):
            top = self.layer("top", self.top)
            middle = self.layer("middle", self.middle(top))
            pyro.sample("u", dist.Bernoulli(logits=self.visible(middle)).to_event(1), obs=u)

    def guide(self, u: Tensor) -> None:
        """Middle and top, from the image."""
        with pyro.plate("data", len(u)):
            middle = self.layer("middle", self.to_middle(u))
            self.layer("top", self.to_top(middle))

    @property
    def recognition(self) -> list[Tensor]:
        """The parameters of the guide."""
        return [*self.to_middle.parameters(), *self.to_top.parameters()]


ROWS: dict[str, tuple[tuple[str, ...], dict[str, Any], int]] = {
    "score function, no baseline": (("middle", "top"), {}, 1),
    "leave-one-out, K = 2": (("middle", "top"), {"num_particles": 2}, 2),
    "leave-one-out, K = 10": (("middle", "top"), {"num_particles": 10}, 10),
    "DisARM, one pair per layer": (("middle", "top"), {"gradient": "disarm"}, 3),
    "VIMCO, K = 2 (gradient of F_2)": (("middle", "top"), {"num_particles": 2, "gradient": "vimco"}, 2),
    "VIMCO, K = 10 (gradient of F_10)": (("middle", "top"), {"num_particles": 10, "gradient": "vimco"}, 10),
    "top enumerated: score function": (("middle",), {}, 1),
    "top enumerated: leave-one-out, K = 2": (("middle",), {"num_particles": 2}, 2),
    "top enumerated: DisARM": (("middle",), {"gradient": "disarm"}, 2),
    "middle enumerated: DisARM": (("top",), {"gradient": "disarm"}, 2),
    "both enumerated": ((), {}, 1),
}
"""What is drawn, how its gradient is estimated, and how many runs of the programs an estimate takes."""


def digits(count: int) -> Tensor:
    """Images of digits, 1 where a pixel is at least half on, shape `(count, 64)`."""
    return torch.as_tensor(load_digits().data[:count] >= 8, dtype=torch.get_default_dtype())


def trained(u: Tensor, num_steps: int = 100) -> Machine:
    """The machine after some steps down the exact gradient of F: neither random nor at rest."""
    machine, elbo = Machine(), vfe.FreeEnergy(max_bytes=1e12)
    optimizer = torch.optim.Adam(machine.parameters(), lr=0.02)
    for _ in range(num_steps):
        optimizer.zero_grad()
        elbo.loss_and_grads(machine.model, machine.guide, u)
        optimizer.step()
    return machine


def flat_gradient(machine: Machine, loss: Tensor) -> Tensor:
    """The gradient by all of the guide's parameters, in one row."""
    return torch.cat([one.reshape(-1) for one in torch.autograd.grad(loss, machine.recognition)])


def relative_variance(machine: Machine, u: Tensor, drawn: tuple[str, ...], options: dict[str, Any]) -> float:
    """The variance of an estimate, relative to the squared length of the exact gradient of F."""
    common = {"max_bytes": 1e12, "strict_enumeration_warning": False}
    machine.drawn = ()
    exact = flat_gradient(machine, vfe.FreeEnergy(**common).differentiable_loss(machine.model, machine.guide, u))
    machine.drawn = drawn
    elbo = vfe.FreeEnergy(**common, **options, vectorize_particles=options.get("num_particles", 1) > 1)
    losses = (elbo.differentiable_loss(machine.model, machine.guide, u) for _ in range(DRAWS if drawn else 2))
    found = torch.stack([flat_gradient(machine, loss) for loss in losses])
    return float(found.var(0).sum() / exact.square().sum())


def main() -> None:
    """Prints the table."""
    torch.set_default_dtype(torch.float64)
    u = digits(50)
    machine = trained(u)
    pyro.set_rng_seed(1)
    print(f"{'':<38} {'runs':>5} {'variance':>10} {'x runs':>10}")
    for name, (drawn, options, runs) in ROWS.items():
        variance = relative_variance(machine, u, drawn, options)
        print(f"{name:<38} {runs:>5} {variance:>10.3g} {variance * runs:>10.3g}", flush=True)


if __name__ == "__main__":
    main()
