r"""
Five doctors, 45 patients: whose word is worth what?
====================================================

Five anaesthetists judged from their records how fit 45 patients were for an operation, on a scale from 1 to 4; the
first did so three times. Nobody knows the truth. Given a patient's true class the judgements are independent, and each
doctor has a table of errors of their own. The data are in the long format, one row per judgement, as they come out of
a data base: a judgement reads the class of its patient by index.

.. math::

    P(v, u) = \prod_i \text{prevalence}_{v_i} \prod_l \text{errors}_{\text{doctor}_l, v_{\text{patient}_l}, u_l}

References:

- Dawid and Skene (1979), Maximum likelihood estimation of observer error-rates using the EM algorithm: the model, the
  data (their table 1) and the prevalences.
"""

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

import pyro_vfe as vfe

JUDGEMENTS = """
1111111 3334334 1122122 2223121 2223222 2223322 1222111 3333433 2222223 2322223 4444444 2223343 1111111 2223212 1211111
1112111 1111111 1111111 2222221 2221322 2222222 2222221 2223222 2212222 1111111 1111111 2322222 1111111 1111111 1121121
1111111 3333233 1111111 2222222 2223232 4334343 2212232 2323233 3333432 1111111 1111111 1212111 2322222 1211111 2222222
"""
"""For each patient the three judgements of the first doctor, and those of the other four."""
DOCTORS = (0, 0, 0, 1, 2, 3, 4)
NUM_CLASSES = 4
PREVALENCE = (0.40, 0.42, 0.11, 0.07)
"""As Dawid and Skene give it."""

# %%
# The judgements, and the model
# -----------------------------


def long_format() -> tuple[Tensor, Tensor, Tensor]:
    """Returns patient, doctor and judgement of each row, each of shape `(315,)`."""
    rows = [
        (patient, doctor, int(said) - 1)
        for patient, line in enumerate(JUDGEMENTS.split())
        for doctor, said in zip(DOCTORS, line, strict=True)
    ]
    patient, doctor, said = torch.tensor(rows).T
    return patient, doctor, said


def votes(patient: Tensor, said: Tensor) -> Tensor:
    """Returns the share of a patient's judgements that each class has, shape `(45, 4)`."""
    counts = torch.zeros(1 + int(patient.max()), NUM_CLASSES)
    counts.index_put_((patient, said), torch.ones(len(said)), accumulate=True)
    return counts / counts.sum(-1, keepdim=True)


def model(patient: Tensor, doctor: Tensor, said: Tensor) -> None:
    """The generative model; its parameters start where the votes are taken for the truth, as Dawid and Skene's do."""
    shares = votes(patient, said)
    start = torch.full((1 + max(DOCTORS), NUM_CLASSES, NUM_CLASSES), 1e-3)
    start = start.permute(0, 2, 1).index_put((doctor, said), shares[patient], accumulate=True).permute(0, 2, 1)
    prevalence = pyro.param("prevalence", shares.mean(0), constraint=constraints.simplex)
    errors = pyro.param("errors", start / start.sum(-1, keepdim=True), constraint=constraints.simplex)
    with pyro.plate("patients", 1 + int(patient.max())):
        v = pyro.sample("class", dist.Categorical(prevalence))
    with pyro.plate("judgements", len(said)):
        pyro.sample("judgement", dist.Categorical(errors[doctor, v[patient]]), obs=said)


# %%
# What each doctor says of each class
# -----------------------------------


def draw(path: Path, errors: Tensor, beliefs: Tensor) -> None:
    """Draws each doctor's table of errors, and what is believed of each patient; the picture stays open."""
    figure, axes = plt.subplots(1, 6, figsize=(13, 3), layout="constrained", width_ratios=[2] * 5 + [3])
    labels = range(1, NUM_CLASSES + 1)
    for doctor, (table, own) in enumerate(zip(errors, axes, strict=False)):
        own.imshow(table, cmap="Blues", vmin=0, vmax=1)
        for true, said in torch.cartesian_prod(torch.arange(NUM_CLASSES), torch.arange(NUM_CLASSES)).tolist():
            if table[true, said] > 0.005:
                color = "white" if table[true, said] > 0.6 else "black"
                own.text(said, true, f"{table[true, said]:.2f}", ha="center", va="center", color=color, fontsize=8)
        own.set(title=f"doctor {doctor + 1}", xlabel="says", xticks=range(NUM_CLASSES), yticks=range(NUM_CLASSES))
        own.set_xticklabels(labels)
        own.set_yticklabels(labels)
    axes[0].set_ylabel("true class")
    axes[-1].imshow(beliefs.T, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes[-1].set(title="P(class | judgements)", xlabel="patient", yticks=range(NUM_CLASSES))
    axes[-1].set_yticklabels(labels)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Fits by EM, draws, tells, and checks the prevalences against the paper."""
    parser = argparse.ArgumentParser(description="Judgements in the long format: Dawid and Skene's doctors.")
    parser.add_argument(
        "--output", type=Path, default=Path(sys.argv[0]).parent / "output", help="folder for the picture"
    )
    picture = parser.parse_args().output / "annotators.png"
    torch.set_default_dtype(torch.float64)
    data = long_format()

    run = vfe.EM(model).run(*data, max_iter=2000, acceleration="squarem", progress_bar=False)
    posterior = vfe.posterior(model, *data)
    beliefs, prevalence = posterior.marginal("class"), run.params["prevalence"]
    right = run.params["errors"].diagonal(dim1=-2, dim2=-1) @ prevalence
    draw(picture, run.params["errors"], beliefs)
    print(run)
    print("\nprevalence:", ", ".join(f"{share:.3f}" for share in prevalence))
    print("how often each doctor is right:", ", ".join(f"{share:.0%}" for share in right))
    unsure = (beliefs.max(-1).values < 0.99).nonzero().squeeze(-1) + 1
    print(f"patients of whose class there is doubt: {unsure.tolist()}\nPicture: {picture}")

    assert all(abs(share - known) < 0.005 for share, known in zip(prevalence.tolist(), PREVALENCE, strict=True))
    assert (beliefs.argmax(-1) == votes(data[0], data[2]).argmax(-1)).sum() >= 40  # The votes are mostly right.


if __name__ == "__main__":
    main()
