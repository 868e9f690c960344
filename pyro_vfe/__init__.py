"""How much of a Pyro program's loss is the model's and how much the guide's: exact variational free energies."""

from pyro_vfe.energy.decomposition import Decomposition
from pyro_vfe.energy.explain import Explanation, explain
from pyro_vfe.energy.free_energy import FreeEnergy
from pyro_vfe.energy.posterior import Posterior, posterior
from pyro_vfe.energy.presence import Assignment
from pyro_vfe.guides.amortized import AutoAmortized
from pyro_vfe.guides.exact import AutoPosterior
from pyro_vfe.guides.mean_field import AutoMeanField
from pyro_vfe.guides.structured import AutoStructured
from pyro_vfe.learning.batch_run import BatchRun
from pyro_vfe.learning.closed_form import ClosedForm
from pyro_vfe.learning.coordinate import Coordinate
from pyro_vfe.learning.e_phases import Annealed, Exact, Hard, MonteCarlo
from pyro_vfe.learning.em import EM
from pyro_vfe.learning.em_run import EMRun
from pyro_vfe.learning.gradient import Gradient
from pyro_vfe.learning.history import History
from pyro_vfe.learning.minibatch import Incremental, Online
from pyro_vfe.learning.monitor import Monitor
from pyro_vfe.learning.numerical import Numerical
from pyro_vfe.learning.stop_rules import GapBelow, Settled
from pyro_vfe.learning.svi import SVIRun, fit
from pyro_vfe.learning.wake_sleep import WakeSleep
from pyro_vfe.learning.wake_sleep_run import WakeSleepRun
from pyro_vfe.program.dreams import Dream, dream
from pyro_vfe.program.markov_chain import MarkovChain
from pyro_vfe.reporting.bounds import Bounds, bounds
from pyro_vfe.reporting.datatree import to_datatree, to_inference_data
from pyro_vfe.reporting.diagnose import diagnose
from pyro_vfe.reporting.findings import Diagnosis, Finding
from pyro_vfe.reporting.plot_chains import plot_states
from pyro_vfe.reporting.plot_energies import plot_decomposition
from pyro_vfe.reporting.plot_gaps import plot_gap
from pyro_vfe.reporting.plot_history import plot_free_energy
from pyro_vfe.reporting.plot_latents import plot_marginals, plot_responsibilities

__version__ = "0.1.0"

__all__ = [
    "EM",
    "Annealed",
    "Assignment",
    "AutoAmortized",
    "AutoMeanField",
    "AutoPosterior",
    "AutoStructured",
    "BatchRun",
    "Bounds",
    "ClosedForm",
    "Coordinate",
    "Decomposition",
    "Diagnosis",
    "Dream",
    "EMRun",
    "Exact",
    "Explanation",
    "Finding",
    "FreeEnergy",
    "GapBelow",
    "Gradient",
    "Hard",
    "History",
    "Incremental",
    "MarkovChain",
    "Monitor",
    "MonteCarlo",
    "Numerical",
    "Online",
    "Posterior",
    "SVIRun",
    "Settled",
    "WakeSleep",
    "WakeSleepRun",
    "bounds",
    "diagnose",
    "dream",
    "explain",
    "fit",
    "plot_decomposition",
    "plot_free_energy",
    "plot_gap",
    "plot_marginals",
    "plot_responsibilities",
    "plot_states",
    "posterior",
    "to_datatree",
    "to_inference_data",
]
