"""What the benchmarks of the attack operations share: inputs, peers in plain PyTorch, and their check."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bench import harness

SHAPE = (128, 3, 32, 32)
LARGE_CPU = (4096, 3, 32, 32)  # 50 MB a tensor: beyond the caches of most processors
LARGE_CUDA = (65536, 3, 32, 32)  # 805 MB a tensor: beyond a GPU's cache
LO, HI = 0.0, 1.0


@dataclasses.dataclass
class Inputs:
    """Images of an attack under way, with one radius, step size and momentum a sample: [N] for ours, [N, 1, 1, 1] for peers."""

    x: Tensor
    previous: Tensor
    gradient: Tensor
    origin: Tensor
    eps: Tensor
    step_size: Tensor
    momentum: Tensor

    def column(self, value: Tensor) -> Tensor:
        return value.reshape(-1, *[1] * (self.x.dim() - 1)).to(self.x.dtype)


def make_inputs(
    device: torch.device, shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype, norm: str
) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    origin = torch.rand(shape, device=device, generator=generator)
    size = math.sqrt(origin[0].numel()) if norm == "l2" else 1.0
    draw = [torch.randn(shape, device=device, generator=generator) for _ in range(3)]
    images = [origin + 0.02 * draw[0], origin + 0.02 * draw[1], draw[2], origin]
    images[0], images[1] = images[0].clamp(LO, HI), images[1].clamp(LO, HI)
    values = [torch.full(shape[:1], value, device=device) for value in (8 / 255 * size, 2 / 255 * size, 0.75)]
    return Inputs(*(image.to(dtype).contiguous(memory_format=layout) for image in images), *values)


def large(device: torch.device) -> tuple[int, ...]:
    return LARGE_CUDA if device.type == "cuda" else LARGE_CPU


def norm_of(t: Tensor) -> Tensor:
    """Of each sample, [N, 1, ...]."""
    return torch.linalg.vector_norm(t, dim=tuple(range(1, t.dim())), keepdim=True)


def check(
    name: str, ours: Callable[[], Tensor], peers: Mapping[str, Callable[[], Tensor]], expected: Tensor, tolerance: float
) -> None:
    """Ours against the reference, and every peer against ours."""
    result = ours()
    harness.close(result, expected, tolerance, f"{name}: against the reference")
    for peer, function in peers.items():
        harness.close(function(), result, tolerance, f"{name}: {peer}")


def settings(device: torch.device, shape: tuple[int, ...]) -> dict[str, dict[str, str]]:
    """Name to arguments of torch.compile: its default, and where it may matter its autotuning."""
    found = {"torch.compile": {}}
    if device.type == "cuda" and shape == LARGE_CUDA:
        found["torch.compile max-autotune"] = {"mode": "max-autotune-no-cudagraphs"}
    return found
