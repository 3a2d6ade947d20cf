"""The native operations. This package alone imports the extension; everything else calls these functions."""

from synthfast.ops._extension import build_facts, cpu_capability, cuda_problem, philox4x32
from synthfast.ops.attacks import apgd_step, apgd_step_, ball_start, l2_step, l2_step_, linf_step, linf_step_
from synthfast.ops.data import gather_augment
from synthfast.ops.nn import winograd_conv3x3, winograd_conv3x3_gradient, winograd_weights, winograd_weights_
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
    "apgd_step",
    "apgd_step_",
    "ball_start",
    "build_facts",
    "cpu_capability",
    "cuda_problem",
    "gather_augment",
    "l2_step",
    "l2_step_",
    "linf_step",
    "linf_step_",
    "philox4x32",
    "philox_normal_",
    "philox_uniform_",
    "quantize_uint8",
    "solver_step",
    "solver_step_",
    "winograd_conv3x3",
    "winograd_conv3x3_gradient",
    "winograd_weights",
    "winograd_weights_",
]
