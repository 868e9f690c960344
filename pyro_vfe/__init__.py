"""How much of a Pyro program's loss is the model's and how much the guide's: exact variational free energies."""

from pyro_vfe.energy.decomposition import Decomposition
from pyro_vfe.energy.explain import Explanation, explain
from pyro_vfe.energy.free_energy import FreeEnergy
from pyro_vfe.energy.posterior import Posterior, posterior
from pyro_vfe.learning.batch_run import BatchRun
from pyro_vfe.learning.closed_form import ClosedForm
from pyro_vfe.learning.coordinate import Coordinate
from pyro_vfe.learning.e_phases import Annealed, Exact, Hard, MonteCarlo
from pyro_vfe.learning.em import EM
from pyro_vfe.learning.em_run import EMRun
from pyro_vfe.learning.gradient import Gradient
from pyro_vfe.learning.history import History
from pyro_vfe.learning.mean_field import AutoMeanField
from pyro_vfe.learning.minibatch import Incremental, Online
from pyro_vfe.learning.numerical import Numerical
from pyro_vfe.program.markov_chain import MarkovChain

__version__ = "0.1.0"

__all__ = [
    "EM",
    "Annealed",
    "AutoMeanField",
    "BatchRun",
    "ClosedForm",
    "Coordinate",
    "Decomposition",
    "EMRun",
    "Exact",
    "Explanation",
    "FreeEnergy",
    "Gradient",
    "Hard",
    "History",
    "Incremental",
    "MarkovChain",
    "MonteCarlo",
    "Numerical",
    "Online",
    "Posterior",
    "explain",
    "posterior",
]
