"""From numbers to findings."""

from pyro_vfe.energy.decomposition import Decomposition
from pyro_vfe.learning.history import History
from pyro_vfe.reporting.findings import Diagnosis


def diagnose(subject: Decomposition | History) -> Diagnosis:
    """Returns findings, worst first."""
    raise NotImplementedError
