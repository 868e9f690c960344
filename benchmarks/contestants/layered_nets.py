"""A Helmholtz machine of 64-12-8 units on binarised digits: ours, and the same sums written by hand in torch."""

from collections.abc import Callable, Mapping
from itertools import product

import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import softplus
from worker import Prepared
from workloads import evidence_number

import pyro_vfe as vfe

TOP, MID, PIXELS = 8, 12, 64
CHUNK = 256
"""Images whose tables are made at a time by hand: what a cache holds."""

Weights = Mapping[str, Tensor]


def images(copies: int) -> Tensor:
    """The digits, a pixel being on where it is brighter than half, so many times."""
    return torch.as_tensor(load_digits().images > 7.5).reshape(-1, PIXELS).float().repeat(copies, 1)


def weights() -> dict[str, Tensor]:
    """Random weights of model and guide."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"top": (TOP,), "mid": (TOP, MID), "u": (MID, PIXELS), "up": (PIXELS, MID), "over": (MID, TOP)}
    scales = {"up": 0.1, "over": 0.5}
    return {
        name: (torch.randn(shape, generator=generator) * scales.get(name, 1.0)).requires_grad_()
        for name, shape in shapes.items()
    }


def ours(what: str, copies: int = 1, max_bytes: float | None = None) -> Prepared:
    """FreeEnergy's loss, its gradients, or its decomposition."""
    own, data = weights(), images(copies)

    def layer(logits: Tensor) -> object:
        return dist.Bernoulli(logits=logits).to_event(1)

    def model(u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            top = pyro.sample("top", layer(own["top"]))
            mid = pyro.sample("mid", layer(top @ own["mid"]))
            pyro.sample("u", layer(mid @ own["u"]), obs=u)

    def guide(u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            mid = pyro.sample("mid", layer(u @ own["up"]))
            pyro.sample("top", layer(mid @ own["over"]))

    elbo = vfe.FreeEnergy(max_bytes=max_bytes)

    def gradients() -> float:
        _forget(own)
        return elbo.loss_and_grads(model, guide, data)

    calls: dict[str, Callable[[], float]] = {
        "loss": lambda: elbo.loss(model, guide, data),
        "gradients": gradients,
        "decomposition": lambda: elbo.decompose(model, guide, data).free_energy.item(),
    }
    return Prepared(calls[what], evidence_number)


def by_hand(what: str, copies: int = 1) -> Prepared:
    """The sums over the values of one layer after the other, some images at a time."""
    own, data = weights(), images(copies)

    def run() -> float:
        _forget(own)
        with torch.set_grad_enabled(what == "gradients"):
            loss = free_energy(own, data, backward=what == "gradients")
            if what == "decomposition":
                surprise(own, data)
        return loss

    return Prepared(run, evidence_number)


def free_energy(own: Weights, data: Tensor, *, backward: bool) -> float:
    """F of a bottom-up guide: E[log Q(mid | u) + log Q(top | mid) - log P(top) - log P(mid | top) - log P(u | mid)]."""
    total = 0.0
    top, mid = _values(TOP), _values(MID)
    for chunk in data.split(CHUNK):
        log_q_top = _all(mid @ own["over"], top)
        q_top = log_q_top.exp()
        log_p_mid = _all(top @ own["mid"], mid)
        log_p_top = _all(own["top"][None], top)
        # What is expected over the top layer is one number for each value of the middle one.
        above = (q_top * (log_q_top - log_p_top - log_p_mid.mT)).sum(-1)
        log_q_mid = _all(chunk @ own["up"], mid)
        log_p_u = _all(mid @ own["u"], chunk).mT
        loss = (log_q_mid.exp() * (log_q_mid + above - log_p_u)).sum()
        if backward:
            loss.backward()
        total += loss.item()
    return total


def surprise(own: Weights, data: Tensor) -> float:
    """-log p(u)."""
    total = 0.0
    top, mid = _values(TOP), _values(MID)
    prior = (_all(own["top"][None], top).mT + _all(top @ own["mid"], mid)).logsumexp(0)
    for chunk in data.split(CHUNK):
        total -= (prior + _all(mid @ own["u"], chunk).mT).logsumexp(-1).sum().item()
    return total


def _all(logits: Tensor, values: Tensor) -> Tensor:
    """log P(value | logits) for each row of logits and of values: one matrix product."""
    return logits @ values.mT - softplus(logits).sum(-1, keepdim=True)


def _values(units: int) -> Tensor:
    """Every value of a layer, one row each."""
    return torch.tensor(list(product((0.0, 1.0), repeat=units)))


def _forget(own: Weights) -> None:
    for weight in own.values():
        weight.grad = None
