"""The CUDA kernels, compiled for the host (tests/shim) and run thread by thread: bit for bit what the CPU operations give.

Launch code (.cu) is not covered here: test_cuda.py runs it on a GPU.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from synthfast import ops
from synthfast.ops import reference

SHIM = Path(__file__).parent.parent / "shim" / "sampling.cpp"
FORWARD, REVERSE, RANDOM = range(3)
# 4 and 8 elements make a chunk of 16 bytes, 16 a chunk of quantize_uint8; 256 threads make a block.
SIZES = (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 255, 256, 257, 1023, 1024, 1025, 3072)


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("shim") / "sampling.so"
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-shared"]
    subprocess.run([*compiler, *flags, str(SHIM), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    assert tensor is None or tensor.is_contiguous()
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def numbers(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


def solver_step(shim, arguments, *, grid=1, order=FORWARD, misalign=0, in_place=False):
    """The kernel's results for arguments of ops.solver_step, flat samples."""
    x, m, p = arguments["x"], arguments["model_output"], arguments["previous"]
    if in_place:
        x, p = x.clone(), None if p is None else p.clone()
    out, denoised = (x, p) if in_place else (torch.full_like(x, 7), torch.full_like(x, 7))
    function = getattr(shim, f"solver_step_{name(x.dtype)}_{name(m.dtype)}")
    pointers = (x, m, arguments["unconditional"], p, out, denoised, arguments["coefficients"], arguments["index"])
    function(
        *map(address, pointers),
        *numbers(*x.shape, arguments["seed"]),
        ctypes.c_uint32(arguments["step"]),
        ctypes.c_uint(grid),
        ctypes.c_int(order),
        ctypes.c_int64(misalign),
    )
    return out, denoised


def philox(shim, fill, dtype, shape, index, seed, stream, step, grid=1, order=FORWARD):
    out = torch.full(shape, 7, dtype=dtype)
    getattr(shim, f"philox_{fill}_{name(dtype)}")(
        address(out),
        address(index),
        *numbers(*shape, seed),
        ctypes.c_uint32(stream << 24 | step),
        ctypes.c_uint(grid),
        order,
    )
    return out


def quantize(shim, x, grid=1, order=FORWARD):
    n, c, h, w = x.shape
    planar = x.is_contiguous()
    values = x if planar else x.permute(0, 2, 3, 1)
    out = torch.full((n, h, w, c), 77, dtype=torch.uint8)
    getattr(shim, f"quantize_uint8_{name(x.dtype)}")(
        address(values),
        address(out),
        *numbers(n, c * h * w),
        ctypes.c_uint32(c),
        int(planar),
        ctypes.c_uint(grid),
        order,
    )
    return out


def test_solver_step_at_every_size(shim, solver_inputs, same_bits, pair, rows):
    for elements in SIZES:
        arguments = solver_inputs((2, elements), pair, rows["all"])
        ours, expected = solver_step(shim, arguments), ops.solver_step(**arguments)
        same_bits(ours[0], expected[0], elements)
        same_bits(ours[1], expected[1], elements)


def test_solver_step_with_and_without_optional_inputs(shim, solver_inputs, same_bits, pair, row):
    for elements in (12, 77):
        arguments = solver_inputs((3, elements), pair, row)
        expected = ops.solver_step(**arguments)
        for in_place in (False, True):
            ours = solver_step(shim, arguments, in_place=in_place)
            same_bits(ours[0], expected[0], (elements, in_place))
            if ours[1] is not None:
                same_bits(ours[1], expected[1], (elements, in_place))


def test_solver_step_grid_and_thread_order(shim, solver_inputs, same_bits, rows):
    """More samples and chunks than threads, in any order of blocks and threads."""
    pair = (torch.float32, torch.bfloat16)
    for shape in ((3, 1500), (900, 5), (70_000, 1)):
        arguments = solver_inputs(shape, pair, rows["all"])
        expected = ops.solver_step(**arguments)
        for grid, order in itertools.product((1, 2, 5) if shape[1] > 1 else (3,), (FORWARD, REVERSE, RANDOM)):
            ours = solver_step(shim, arguments, grid=grid, order=order)
            same_bits(ours[0], expected[0], (shape, grid, order))
            same_bits(ours[1], expected[1], (shape, grid, order))


def test_solver_step_in_place_handles_every_element_once(shim, solver_inputs, same_bits, rows):
    arguments = solver_inputs((5, 1100), (torch.float32, torch.float32), rows["all"])
    expected = ops.solver_step(**arguments)
    for grid, order in itertools.product((1, 2, 7), (FORWARD, REVERSE, RANDOM)):
        ours = solver_step(shim, arguments, grid=grid, order=order, in_place=True)
        same_bits(ours[0], expected[0], (grid, order))
        same_bits(ours[1], expected[1], (grid, order))


def test_solver_step_does_not_read_an_unused_history(shim, solver_inputs, same_bits, pair, rows):
    arguments = solver_inputs((2, 20), pair, rows["noise"])
    expected = ops.solver_step(**arguments)
    arguments["previous"] = torch.full_like(arguments["x"], torch.nan)
    ours = solver_step(shim, arguments, in_place=True)
    same_bits(ours[0], expected[0])
    same_bits(ours[1], expected[1])


def test_solver_step_on_misaligned_memory(shim, solver_inputs, same_bits, pair, rows):
    for misalign in (4, 8, 12):
        for elements in (16, 21):
            arguments = solver_inputs((2, elements), pair, rows["all"])
            expected = ops.solver_step(**arguments)
            ours = solver_step(shim, arguments, misalign=misalign)
            same_bits(ours[0], expected[0], (misalign, elements))
            same_bits(ours[1], expected[1], (misalign, elements))


def test_solver_step_shows_a_missing_history(shim, solver_inputs, pair, rows):
    """The coefficients lie in device memory, so the host cannot refuse: the result is NaN and not plausible."""
    arguments = {**solver_inputs((2, 20), pair, rows["all"]), "previous": None}
    assert solver_step(shim, arguments)[0].isnan().all()
    assert not solver_step(shim, {**arguments, "coefficients": torch.tensor(rows["noise"])})[0].isnan().any()


@pytest.mark.parametrize("fill", ["normal", "uniform"])
def test_philox(shim, same_bits, dtype, fill):
    operation = {"normal": ops.philox_normal_, "uniform": ops.philox_uniform_}[fill]
    index = torch.tensor([2**40 + 1, -1, 0])
    cases = [(elements, 1, FORWARD) for elements in SIZES]
    cases += [(2500, grid, order) for grid in (1, 3) for order in (FORWARD, REVERSE, RANDOM)]
    for elements, grid, order in cases:
        where = (-(2**62) + 3, 200, 2**24 - 2)
        ours = philox(shim, fill, dtype, (3, elements), index, *where, grid, order)
        same_bits(ours, operation(torch.empty(3, elements, dtype=dtype), index, *where), (elements, grid, order))


def test_quantize_uint8(shim, generator, same_bits, lay_out, dtype):
    shapes = [(2, c, h, w) for c in (1, 2, 3, 4, 5) for h, w in ((2, 1), (2, 3), (4, 4), (5, 7), (16, 16))]
    for shape, layout in itertools.product(shapes, ("contiguous", "channels_last")):
        x = lay_out(torch.randn(shape, generator=generator).to(dtype), layout)
        x[0, 0, 0, 0], x[-1, -1, -1, -1] = torch.nan, torch.inf
        if dtype == torch.float32:
            x[0, 0].view(torch.int32)[-1, -1] = 0x7FC000FF  # a NaN with a payload in its low bits
        same_bits(quantize(shim, x), ops.quantize_uint8(x), (shape, layout))
    for layout, grid, order in itertools.product(("contiguous", "channels_last"), (1, 3), (FORWARD, REVERSE, RANDOM)):
        x = lay_out(torch.randn(3, 3, 47, 41, generator=generator).to(dtype), layout)
        same_bits(quantize(shim, x, grid, order), ops.quantize_uint8(x), (layout, grid, order))


def test_normals_of_extreme_words(shim):
    """Largest and smallest radius, and the edges and axis of every quadrant, against float64."""
    words = {0, 0xFF, 0x100, 0x1FF, 0xFFFFFEFF, 0xFFFFFF00, 0xFFFFFFFF}
    for quadrant in range(4):
        for within in (0, 1, 63, 64, 0x1FFFFFFF, 0x20000000, 0x20000040, 0x3FFFFFBF, 0x3FFFFFFF):
            words.add(quadrant << 30 | within)
    pairs = torch.cartesian_prod(*[torch.tensor(sorted(words))] * 2).reshape(1, -1)
    pairs = torch.cat((pairs, pairs.flip(1)), 1)  # also as the other pair of a block
    z, bits = torch.empty(pairs.shape), pairs.to(torch.int32)
    shim.normals_of_words(address(bits), address(z), ctypes.c_int64(pairs.numel() // 4))
    expected = reference.normals(pairs)
    assert 5.88 < z.abs().max() < 5.9
    torch.testing.assert_close(z, expected, rtol=4 * 2.0**-24, atol=4e-7)


@pytest.mark.parametrize("order", [FORWARD, REVERSE, RANDOM])
def test_shim_runs_barriers_and_shuffles(shim, order):
    for threads in (32, 64, 256):
        values = torch.arange(threads, dtype=torch.float32) + 1
        total = torch.zeros(1)
        arguments = (address(values), address(total), ctypes.c_uint(threads), order)
        assert shim.shim_block_sum(*arguments, threads) == 0
        assert total.item() == threads * (threads + 1) / 2


@pytest.mark.parametrize("order", [FORWARD, REVERSE, RANDOM])
def test_shim_reports_a_barrier_that_some_threads_skip(shim, order):
    values, total = torch.ones(64), torch.zeros(1)
    assert shim.shim_block_sum(address(values), address(total), ctypes.c_uint(64), order, 40) == 1


def test_shim_shows_a_missing_barrier(shim):
    """Without the barrier the sum depends on who runs first: wrong in forward order, right by luck in reverse."""
    values = torch.ones(256)
    totals = []
    for order in (FORWARD, REVERSE):
        total = torch.zeros(1)
        assert shim.shim_block_sum(address(values), address(total), ctypes.c_uint(256), order, 0) == 0
        totals.append(total.item())
    assert totals[0] != totals[1] == 256
