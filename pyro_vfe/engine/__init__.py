"""Factors to numbers: exact sums over plated factor graphs, in pure torch.

log Z                    =  log sum_x exp( sum_f f(x) )
marginals, expectations  =  gradients of log Z
mode, samples            =  the steps that summed it, undone
"""

from pyro_vfe.engine.chain_decoding import SAMPLE
from pyro_vfe.engine.decoding import mode, sample
from pyro_vfe.engine.elimination import Elimination, LogNormalizer, eliminate, log_normalizer, plan_of
from pyro_vfe.engine.factors import Factor, FactorGraph, Scale, Subsample, Table, Variable
from pyro_vfe.engine.inference import expected_tables, marginals
from pyro_vfe.engine.ordering import Plan, plan
from pyro_vfe.engine.structure import FactorShape, Structure, Unrolling, VariableShape
from pyro_vfe.engine.unrolling import apply_unrolling, structure_of, unroll

__all__ = [
    "SAMPLE",
    "Elimination",
    "Factor",
    "FactorGraph",
    "FactorShape",
    "LogNormalizer",
    "Plan",
    "Scale",
    "Structure",
    "Subsample",
    "Table",
    "Unrolling",
    "Variable",
    "VariableShape",
    "apply_unrolling",
    "eliminate",
    "expected_tables",
    "log_normalizer",
    "marginals",
    "mode",
    "plan",
    "plan_of",
    "sample",
    "structure_of",
    "unroll",
]
