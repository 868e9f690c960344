"""The torch-free half of the reports: its modules, found with or without torch, and groups as programs would give them.

`import pyro_vfe` needs torch; the schema, its conversion and the Pareto diagnosis do not. Where torch is missing (a
Python with ArviZ 1.x and little else) an empty package stands in for `pyro_vfe/__init__.py`, and its modules import
each other as ever.
"""

import importlib
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from xarray import Variable

PACKAGE = Path(__file__).resolve().parents[1] / "pyro_vfe"

if find_spec("torch") is None:
    package = types.ModuleType("pyro_vfe")
    package.__path__ = [str(PACKAGE)]
    sys.modules.setdefault("pyro_vfe", package)

errors = importlib.import_module("pyro_vfe.errors")
schema = importlib.import_module("pyro_vfe.reporting.arviz_schema")
inference_data = importlib.import_module("pyro_vfe.reporting.inference_data")
pareto = importlib.import_module("pyro_vfe.reporting.pareto")

NUM_DRAWS, NUM_DATA, K, PIXELS = 200, 12, 3, 2

Groups = dict[str, dict[str, Variable]]


def groups_of_a_mixture(shift: float = 0.0) -> Groups:
    """Returns what a mixture gives: discrete v and point-estimated rates, sampled mu, data u of two pixels each.

    Args:
        shift: How much worse than its best the log-likelihood of each datum is.
    """
    rng = np.random.default_rng(0)
    mu = rng.normal(size=NUM_DRAWS)
    v = rng.integers(K, size=(NUM_DRAWS, NUM_DATA))
    u = rng.integers(10, size=(NUM_DATA, PIXELS))
    best = rng.normal(-3, 1, size=NUM_DATA) - shift
    per_draw, over_data = ("draw",), ("draw", "data")
    predicted = rng.poisson(5, size=(NUM_DRAWS, NUM_DATA, PIXELS))
    return {
        "observed_data": {"u": Variable(("data", "u_dim_0"), u)},
        "constant_data": {"exposure": Variable(("data",), np.linspace(0, 1, NUM_DATA))},
        "variational": {
            "q_v": Variable(("data", "v_value"), rng.dirichlet(np.ones(K), size=NUM_DATA), {"units": "probability"}),
            "free_energy": Variable((), np.float64(12.5), {"units": "nats"}),
            "phase": Variable(("step",), np.array(["start", "E", "M"])),
        },
        "posterior": {
            "v": Variable(over_data, v),
            "switch": Variable(per_draw, rng.integers(2, size=NUM_DRAWS).astype(bool)),
            "mu": Variable(per_draw, mu),
            "rates": Variable(("draw", "v_value"), np.broadcast_to(np.array([1.0, 5.0, 9.0]), (NUM_DRAWS, K))),
        },
        "log_likelihood": {"u": Variable(over_data, best - 0.05 * mu[:, None] ** 2)},
        "sample_stats": {"lp": Variable(per_draw, rng.normal(-40, 1, size=NUM_DRAWS))},
        "posterior_predictive": {"u": Variable((*over_data, "u_dim_0"), predicted)},
        "prior": {"v": Variable(over_data, v[::-1]), "mu": Variable(per_draw, mu[::-1])},
        "prior_predictive": {"u": Variable((*over_data, "u_dim_0"), predicted[::-1])},
    }
