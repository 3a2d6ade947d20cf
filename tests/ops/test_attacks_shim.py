"""The CUDA kernels of the attacks, compiled for the host (tests/shim) and run thread by thread: bit for bit what the CPU
operations give, norms included, because both add squares in one order.

Launch code (.cu) is not covered here: test_cuda_attacks.py runs it on a GPU.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from synthfast import ops

SHIM = Path(__file__).parent.parent / "shim" / "attacks.cpp"
FORWARD, REVERSE, RANDOM, GREEDY = range(4)
# Chunks of 4 and 8 elements, tiles of 512 (a warp each), blocks of 8 warps, and the two normals more of ball_start.
SIZES = (1, 3, 4, 7, 8, 9, 31, 256, 510, 511, 513, 1500, 4095, 4097, 9000)


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("shim") / "attacks.so"
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-shared"]
    subprocess.run([*compiler, *flags, str(SHIM), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(params=["linf", "l2"])
def norm(request):
    return request.param


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    assert tensor is None or tensor.is_contiguous()
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def tail(shape, lo, hi, grid, order, misalign):
    """The arguments that both functions end with."""
    sizes = [ctypes.c_int64(size) for size in shape]
    return *sizes, ctypes.c_double(lo), ctypes.c_double(hi), ctypes.c_uint(grid), order, ctypes.c_int64(misalign)


def run_step(shim, a, norm, *, apgd=False, grid=1, order=FORWARD, misalign=0, in_place=False, lo=0.0, hi=1.0):
    """The kernel's result; in place it replaces x, or previous for apgd_step."""
    x, previous = a["x"].clone(), a["previous"].clone() if apgd else None
    out = (previous if apgd else x) if in_place else torch.full_like(x, 7)
    function = getattr(shim, f"step_{str(x.dtype).removeprefix('torch.')}")
    pointers = (x, previous, a["gradient"], a["origin"], out, a["eps"], a["step_size"], a["momentum"] if apgd else None)
    function(*map(address, pointers), int(norm == "l2"), *tail(x.shape, lo, hi, grid, order, misalign))
    return out


def expected_step(a, norm, apgd=False, lo=0.0, hi=1.0):
    common = [a[name] for name in ("gradient", "origin", "eps", "step_size")]
    if apgd:
        return ops.apgd_step(a["x"], a["previous"], *common, a["momentum"], norm, lo, hi)
    return (ops.linf_step if norm == "linf" else ops.l2_step)(a["x"], *common, lo, hi)


def run_start(shim, origin, index, eps, norm, seed, step, *, grid=1, order=FORWARD, misalign=0, lo=0.0, hi=1.0):
    out = torch.full_like(origin, 7)
    getattr(shim, f"start_{str(origin.dtype).removeprefix('torch.')}")(
        address(origin),
        address(out),
        address(eps),
        address(index),
        int(norm == "l2"),
        ctypes.c_int64(seed),
        ctypes.c_uint32(ops.Stream.ATTACK << 24 | step),
        *tail(origin.shape, lo, hi, grid, order, misalign),
    )
    return out


def sized(a, norm):
    size = math.sqrt(a["x"][0].numel()) if norm == "l2" else 1.0
    return {**a, "eps": a["eps"] * size, "step_size": a["step_size"] * size}


@pytest.mark.parametrize("apgd", [False, True], ids=["step", "apgd"])
def test_steps_at_every_size(shim, attack_inputs, same_bits, dtype, norm, apgd):
    for elements in SIZES:
        a = sized(attack_inputs((3, elements), dtype), norm)
        expected = expected_step(a, norm, apgd)
        for in_place in (False, True):
            same_bits(run_step(shim, a, norm, apgd=apgd, in_place=in_place), expected, (elements, in_place))


@pytest.mark.parametrize("apgd", [False, True], ids=["step", "apgd"])
def test_steps_grid_and_thread_order(shim, attack_inputs, same_bits, norm, apgd):
    """More samples than blocks, in any order of blocks and threads."""
    for shape in ((5, 1100), (3, 4500), (40, 5)):
        a = sized(attack_inputs(shape, torch.float32), norm)
        expected = expected_step(a, norm, apgd)
        for grid, order in ((1, FORWARD), (2, FORWARD), (2, REVERSE), (2, RANDOM), (2, GREEDY)):
            ours = run_step(shim, a, norm, apgd=apgd, grid=grid, order=order, in_place=True)
            same_bits(ours, expected, (shape, grid, order))


@pytest.mark.parametrize("apgd", [False, True], ids=["step", "apgd"])
def test_steps_on_misaligned_memory(shim, attack_inputs, same_bits, dtype, norm, apgd):
    for misalign, elements in itertools.product((4, 8, 12), (16, 21, 520)):
        a = sized(attack_inputs((2, elements), dtype), norm)
        ours = run_step(shim, a, norm, apgd=apgd, misalign=misalign)
        same_bits(ours, expected_step(a, norm, apgd), (misalign, elements))


@pytest.mark.parametrize("apgd", [False, True], ids=["step", "apgd"])
def test_steps_in_other_boxes(shim, attack_inputs, same_bits, dtype, norm, apgd):
    for lo, hi in ((0.1, 0.9), (-math.inf, math.inf), (0.5, 0.5)):
        a = sized(attack_inputs((6, 60), dtype), norm)
        ours = run_step(shim, a, norm, apgd=apgd, lo=lo, hi=hi)
        same_bits(ours, expected_step(a, norm, apgd, lo, hi), (lo, hi))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value(shim, every_16_bit_value, same_bits, dtype, norm):
    every = every_16_bit_value(dtype).reshape(16, -1)
    finite = every.nan_to_num(0.25, 0.5, 0.75)
    a = {"x": every, "gradient": every.flip(0), "origin": finite, "step_size": torch.full((16,), 0.1)}
    for eps in (1e-40, 8 / 255, 1000.1):
        a["eps"] = torch.full((16,), eps)
        box = {"lo": -math.inf, "hi": math.inf}
        same_bits(run_step(shim, a, norm, **box), expected_step(a, norm, **box), eps)


def test_starts(shim, attack_inputs, same_bits, dtype, norm):
    index = torch.tensor([2**40 + 1, -1, 0])
    for elements in SIZES:
        a = sized(attack_inputs((3, elements), dtype), norm)
        arguments = (a["origin"], index, a["eps"], norm, -(2**62) + 3, 2**24 - 2)
        same_bits(run_start(shim, *arguments), ops.ball_start(*arguments), elements)
    for grid, order, misalign in itertools.product((1, 2), (FORWARD, REVERSE, RANDOM, GREEDY), (0, 4)):
        ours = run_start(shim, *arguments, grid=grid, order=order, misalign=misalign, lo=0.1, hi=0.9)
        same_bits(ours, ops.ball_start(*arguments, 0.1, 0.9), (grid, order, misalign))
