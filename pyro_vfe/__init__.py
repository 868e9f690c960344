"""How much of a Pyro program's loss is the model's and how much the guide's: exact variational free energies."""

from pyro_vfe.energy.decomposition import Decomposition
from pyro_vfe.energy.explain import Explanation, explain
from pyro_vfe.energy.free_energy import FreeEnergy
from pyro_vfe.energy.posterior import Posterior, posterior
from pyro_vfe.learning.mean_field import AutoMeanField
from pyro_vfe.program.markov_chain import MarkovChain

__version__ = "0.1.0"

__all__ = [
    "AutoMeanField",
    "Decomposition",
    "Explanation",
    "FreeEnergy",
    "MarkovChain",
    "Posterior",
    "explain",
    "posterior",
]
