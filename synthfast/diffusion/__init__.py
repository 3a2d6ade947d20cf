"""Diffusion models: parameterizations, training losses, and solvers as tables of coefficients over one fused step."""

from synthfast.diffusion.guidance import Model
from synthfast.diffusion.losses import EDMLoss, LabelDrop, VPLoss
from synthfast.diffusion.preconditioning import (
    EDM,
    VP,
    Parameterization,
    from_dict,
    from_scheduler_config,
    to_dict,
)
from synthfast.diffusion.sampler import sample
from synthfast.diffusion.solvers import SOLVERS, SolverConfig, SolverTable, make_table

__all__ = [
    "EDM",
    "SOLVERS",
    "VP",
    "EDMLoss",
    "LabelDrop",
    "Model",
    "Parameterization",
    "SolverConfig",
    "SolverTable",
    "VPLoss",
    "from_dict",
    "from_scheduler_config",
    "make_table",
    "sample",
    "to_dict",
]
