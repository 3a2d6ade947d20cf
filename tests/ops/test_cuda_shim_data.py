"""The CUDA kernels of csrc/data, compiled for the host (tests/shim) and run thread by thread: bit for bit what the CPU
operations give. Launch code (.cu) is not covered here: test_cuda_data.py runs it on a GPU."""

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
from synthfast.ops import reference_data as reference

SHIM = Path(__file__).parent.parent / "shim" / "data.cpp"
FORWARD, REVERSE, RANDOM = range(3)
# H, W, C: elements around chunks of 4 and 8, threads of 16 and 32, blocks of 256 threads; rows that chunks cross.
SHAPES = [
    (1, 1, 1),
    (1, 1, 3),
    (2, 2, 1),
    (1, 7, 1),
    (2, 4, 1),
    (3, 1, 3),
    (3, 5, 1),
    (4, 4, 1),
    (1, 17, 1),
    (5, 1, 5),
    (1, 31, 1),
    (4, 8, 1),
    (3, 3, 4),
    (5, 6, 3),
    (8, 8, 3),
    (7, 9, 2),
    (32, 32, 3),
    (33, 31, 3),
    (2, 3, 300),
]


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("shim") / "data.so"
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-shared"]
    subprocess.run([*compiler, *flags, str(SHIM), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def address(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def gather_augment(
    shim, images, items, index, seed, *, padding=0, flip=False, dtype=torch.float32, grid=1, order=FORWARD, misalign=0
):
    """The kernel's result for arguments of ops.gather_augment."""
    count, *shape = images.shape
    out = torch.full((len(items), *shape), 7, dtype=dtype)
    getattr(shim, f"gather_augment_{str(dtype).removeprefix('torch.')}")(
        address(images),
        ctypes.c_int64(count),
        address(items),
        address(index),
        address(out),
        *(ctypes.c_int64(value) for value in (len(items), *shape, seed)),
        ctypes.c_int32(padding),
        int(flip),
        ctypes.c_uint(grid),
        order,
        ctypes.c_int64(misalign),
    )
    return out.permute(0, 3, 1, 2)


def draw(generator, shape, n=5, count=3):
    images = torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)
    return (
        images,
        torch.randint(0, count, (n,), generator=generator),
        torch.randint(-(2**62), 2**62, (n,), generator=generator),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shim, generator, same_bits, dtype, shape):
    arguments = (*draw(generator, shape), -(2**62) + 3)
    for padding, flip in ((0, False), (0, True), (2, False), (2, True), (max(shape) + 3, True), (2**23 - 1, True)):
        ours = gather_augment(shim, *arguments, padding=padding, flip=flip, dtype=dtype)
        expected = ops.gather_augment(*arguments, padding=padding, flip=flip, dtype=dtype)
        same_bits(ours, expected, (padding, flip))


def test_every_byte(shim, same_bits, dtype):
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)
    zero = torch.zeros(1, dtype=torch.int64)
    same_bits(
        gather_augment(shim, images, zero, zero, 0, dtype=dtype),
        ops.gather_augment(images, zero, zero, 0, dtype=dtype),
    )


@pytest.mark.parametrize("padding", [0, 1, 4, 1000, 2**22, 2**23 - 1])
def test_crops(shim, generator, padding):
    """All 24 bits of the words count where the padding is large, and the last offset is reached but not passed."""
    n, seed = 100_000, -(2**62) + 7
    index = torch.randint(-(2**62), 2**62, (n,), generator=generator)
    top, left, flip = (
        torch.empty(n, dtype=torch.int64),
        torch.empty(n, dtype=torch.int64),
        torch.empty(n, dtype=torch.bool),
    )
    shim.draw_crops(
        address(index),
        *(ctypes.c_int64(value) for value in (n, seed)),
        ctypes.c_int32(padding),
        *map(address, (top, left, flip)),
    )
    expected = reference.draw_crops(index, seed, padding, True)
    assert all(torch.equal(*pair) for pair in zip((top, left, flip), expected, strict=True))
    for offsets in (top, left):
        assert offsets.min() >= 0 and offsets.max() <= 2 * padding
        assert offsets.max() >= 1.999 * padding and offsets.min() <= 0.001 * padding


def test_grid_and_thread_order(shim, generator, same_bits, dtype):
    """More samples and chunks than threads, in any order of blocks and threads."""
    for shape, n in (((32, 33, 3), 7), ((3, 3, 1), 900)):
        arguments = (*draw(generator, shape, n), 5)
        expected = ops.gather_augment(*arguments, padding=2, flip=True, dtype=dtype)
        for grid, order in itertools.product((1, 2, 5), (FORWARD, REVERSE, RANDOM)):
            ours = gather_augment(shim, *arguments, padding=2, flip=True, dtype=dtype, grid=grid, order=order)
            same_bits(ours, expected, (shape, grid, order))


def test_misaligned_output(shim, generator, same_bits, dtype):
    for shape, misalign in itertools.product(((8, 8, 3), (5, 5, 3)), (4, 8, 12)):
        arguments = (*draw(generator, shape), 5)
        ours = gather_augment(shim, *arguments, padding=1, flip=True, dtype=dtype, misalign=misalign)
        same_bits(ours, ops.gather_augment(*arguments, padding=1, flip=True, dtype=dtype), (shape, misalign))


@pytest.mark.parametrize("item", [3, -1, 2**40, -(2**63), 2**63 - 1])
def test_an_item_outside_the_set_shows_as_nan(shim, generator, same_bits, dtype, item):
    """The kernel cannot refuse; the other samples of the batch are as they should be."""
    for shape in ((8, 8, 3), (5, 5, 3)):
        images, items, index = draw(generator, shape)
        expected = ops.gather_augment(images, items, index, 5, padding=1, flip=True, dtype=dtype)
        items[2] = item
        ours = gather_augment(shim, images, items, index, 5, padding=1, flip=True, dtype=dtype)
        assert ours[2].isnan().all()
        kept = [0, 1, 3, 4]
        same_bits(ours[kept], expected[kept])


def test_no_item_of_an_empty_set(shim):
    zeros = torch.zeros(2, dtype=torch.int64)
    assert gather_augment(shim, torch.zeros(0, 4, 4, 3, dtype=torch.uint8), zeros, zeros, 0).isnan().all()
