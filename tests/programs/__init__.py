"""The programs that the library is held against, by name."""

from programs.bad import BAD_PROGRAMS
from programs.branching import BRANCHING
from programs.case import BadProgram, Program
from programs.chains import CHAINS
from programs.large import LARGE
from programs.markov_chains import MARKOV_CHAINS
from programs.networks import NETWORKS
from programs.observations import OBSERVATIONS
from programs.plates import PLATES, UNSPLIT
from programs.sampled import POINT_ESTIMATES, SAMPLED_PROGRAMS, SampledProgram
from programs.supports import INFINITE, SUPPORTS

PROGRAMS: dict[str, Program] = {
    **CHAINS,
    **LARGE,
    **MARKOV_CHAINS,
    **PLATES,
    **OBSERVATIONS,
    **SUPPORTS,
    **BRANCHING,
    **NETWORKS,
    **POINT_ESTIMATES,
}

__all__ = [
    "BAD_PROGRAMS",
    "INFINITE",
    "PROGRAMS",
    "SAMPLED_PROGRAMS",
    "UNSPLIT",
    "BadProgram",
    "Program",
    "SampledProgram",
]
