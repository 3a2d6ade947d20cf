"""The native operations. This package alone imports the extension; everything else calls these functions."""

from synthfast.ops._extension import build_facts, cpu_capability, cuda_problem, philox4x32
from synthfast.ops.sampling import (
    Stream,
    philox_normal_,
    philox_uniform_,
    quantize_uint8,
    solver_step,
    solver_step_,
)

__all__ = [
    "Stream",
    "build_facts",
    "cpu_capability",
    "cuda_problem",
    "philox4x32",
    "philox_normal_",
    "philox_uniform_",
    "quantize_uint8",
    "solver_step",
    "solver_step_",
]
