r"""Expectation maximisation for any program with discrete latents.

    E-phase    Q  <-  argmin_Q F(Q, G)        M-phase    G  <-  argmin_G F(Q, G)        F  =  surprise + gap

References:
    Dempster, Laird and Rubin (1977), Maximum likelihood from incomplete data via the EM algorithm.
    Neal and Hinton (1998), A view of the EM algorithm that justifies incremental, sparse, and other variants.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import pyro
from pyro.infer.autoguide import AutoGuideList
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vfe.errors import VFEError, VFEWarning
from pyro_vfe.learning.coordinate import Coordinate
from pyro_vfe.learning.e_phases import Exact
from pyro_vfe.learning.em_checks import check_programs, first_enumeration
from pyro_vfe.learning.em_loop import Loop, State, e_step, m_step, row_after_m_step, updates_guide
from pyro_vfe.learning.em_run import EMRun, PhaseResult, Restart
from pyro_vfe.learning.gradient import Gradient
from pyro_vfe.learning.guided import surprise_of
from pyro_vfe.learning.history import History, Row
from pyro_vfe.learning.mean_field import AutoMeanField
from pyro_vfe.learning.numerical import Numerical
from pyro_vfe.learning.pair import Pair
from pyro_vfe.learning.phases import EPhase, MPhase
from pyro_vfe.learning.restarts import random_starts
from pyro_vfe.learning.rounding import Rounding, resolution
from pyro_vfe.learning.squarem import Squarem
from pyro_vfe.program.enumeration import Enumeration
from pyro_vfe.program.layout import Program
from pyro_vfe.program.parameters import Parameters, restore, snapshot
from pyro_vfe.program.programs import Check, Programs

Callback = Callable[[int, dict[str, Any]], Any]
"""Called with the number of phases before this one and with where it led; true stops EM."""
