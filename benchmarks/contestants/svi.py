"""A run of SVI with our loss: `vfe.fit`, which reads F on the way, and the loop that one writes by hand."""

import pyro
from pyro.infer import SVI
from worker import Prepared
from workloads import evidence_number

import pyro_vfe as vfe
from contestants.programs import empty, gaussian_mixture

LEARNING_RATE = 0.01


def fitted(size: int, components: int, dims: int, steps: int) -> Prepared:
    """`vfe.fit` with the readings it takes unasked."""
    model = gaussian_mixture(size, components, dims)

    def call(_: None) -> float:
        optim = pyro.optim.Adam({"lr": LEARNING_RATE})
        run = vfe.fit(model, empty, optim=optim, num_steps=steps, progress_bar=False)
        return -float(run.losses[-1])

    return Prepared(call, evidence_number, before=pyro.clear_param_store)


def by_hand(size: int, components: int, dims: int, steps: int) -> Prepared:
    """Pyro's SVI in a loop."""
    model = gaussian_mixture(size, components, dims)

    def call(_: None) -> float:
        svi = SVI(model, empty, pyro.optim.Adam({"lr": LEARNING_RATE}), vfe.FreeEnergy())
        losses = [svi.step() for _ in range(steps)]
        return -losses[-1]

    return Prepared(call, evidence_number, before=pyro.clear_param_store)
