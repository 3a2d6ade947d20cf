"""gather_augment: the reference, every byte, crops and flips seen one by one, their distribution, sizes, sets beyond 4 GB."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from synthfast import ops
from synthfast.ops import reference_data as reference

EVERY_BYTE = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)
# H, W, C: around the vectors (16 bytes, 16 and 32 floats) and tiles (8192 bytes) of the kernels.
SHAPES = [
    (1, 1, 1),
    (1, 15, 1),
    (3, 16, 1),
    (2, 17, 1),
    (8, 8, 1),
    (4, 5, 2),
    (3, 5, 3),
    (5, 6, 3),
    (32, 32, 3),
    (7, 33, 3),
    (6, 9, 4),
    (3, 7, 5),
    (2, 3, 16),
    (3, 4, 17),
    (96, 96, 3),  # several tiles of rows
    (2, 3001, 3),  # rows longer than a tile
    (2, 8193, 1),
    (2, 3, 5000),  # a pixel a tile
    (2, 3, 8200),  # pixels longer than a tile
]


def draw(
    generator: torch.Generator, shape: tuple[int, ...], n: int = 6, count: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    """A set, items with repetitions, and keys of any sign and size."""
    images = torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)
    items = torch.randint(0, count, (n,), generator=generator)
    return images, items, torch.randint(-(2**62), 2**62, (n,), generator=generator)


def test_every_byte(dtype):
    """byte / 255 rounded once to float32, then to the type: against numpy's division and float64."""
    ours = ops.gather_augment(
        EVERY_BYTE, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 0, dtype=dtype
    )
    single = torch.from_numpy(np.arange(256, dtype=np.float32) / np.float32(255))
    assert torch.equal(single, (torch.arange(256).double() / 255).float())
    assert torch.equal(ours.flatten(), single.to(dtype))
    assert ours.flatten()[0] == 0 and ours.flatten()[255] == 1 and ours.dtype == dtype


def test_every_byte_at_every_place_of_a_vector(dtype, same_bits):
    """The vectorised code and its remainders convert alike, mirrored or not, padded or not."""
    images = torch.stack([EVERY_BYTE.flatten().roll(k) for k in range(0, 256, 5)]).repeat(1, 3).reshape(-1, 4, 64, 3)
    items, index = torch.arange(len(images)), torch.arange(len(images))
    for padding, flip in ((0, False), (0, True), (1, False), (1, True)):
        ours = ops.gather_augment(images, items, index, 3, padding=padding, flip=flip, dtype=dtype)
        same_bits(ours, reference.gather_augment(images, items, index, 3, padding=padding, flip=flip, dtype=dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference(generator, same_bits, dtype, shape):
    images, items, index = draw(generator, shape)
    for padding in (0, 1, 3, max(shape[:2]) + 2):
        for flip in (False, True):
            arguments = {"padding": padding, "flip": flip, "dtype": dtype}
            ours = ops.gather_augment(images, items, index, -5, **arguments)
            expected = reference.gather_augment(images, items, index, -5, **arguments)
            same_bits(ours, expected, (shape, padding, flip))
            assert ours.stride() == expected.stride()
            assert ours.is_contiguous(memory_format=torch.channels_last)


def of_every_shape() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    results = []
    for shape in SHAPES:
        images, items, index = draw(generator, shape, n=12)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            results.append(ops.gather_augment(images, items, index, 1, padding=2, flip=True, dtype=dtype))
    return results


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_instruction_sets_give_the_same_bits(capability, tmp_path, same_bits):
    """The instruction set is chosen once in a process; here it is the best, in the other process one below."""
    program = """
import runpy, sys, torch
torch.save(runpy.run_path(sys.argv[1])["of_every_shape"](), sys.argv[2])
"""
    path = tmp_path / "results.pt"
    environment = {**os.environ, "SYNTHFAST_CPU_CAPABILITY": capability}
    subprocess.run([sys.executable, "-c", program, __file__, str(path)], check=True, env=environment)
    for k, (ours, expected) in enumerate(zip(torch.load(path), of_every_shape(), strict=True)):
        same_bits(ours, expected, k)


def test_words_of_known_blocks():
    """Crop and flip from Philox words as the docstring says, computed here with Python's integers."""
    images = (torch.arange(5 * 7) + 1).to(torch.uint8).reshape(1, 5, 7, 1)
    padding, seed, indices = 3, -(2**60) + 11, [0, 1, -1, 2**33 + 5, -(2**63), *range(7, 40)]
    items = torch.zeros(len(indices), dtype=torch.int64)
    ours = ops.gather_augment(images, items, torch.tensor(indices), seed, padding=padding, flip=True)
    padded = np.zeros((5 + 2 * padding, 7 + 2 * padding), np.float32)
    padded[padding:-padding, padding:-padding] = images[0, :, :, 0].numpy() / np.float32(255)
    for n, i in enumerate(indices):
        counter = (0, i & 0xFFFFFFFF, (i >> 32) & 0xFFFFFFFF, ops.Stream.AUGMENT << 24)
        words = ops.philox4x32(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
        top, left = ((words[k] >> 8) * (2 * padding + 1) >> 24 for k in (0, 1))
        crop = padded[top : top + 5, left : left + 7]
        assert np.array_equal(ours[n, 0].numpy(), crop[:, ::-1] if words[2] < 2**31 else crop), (n, i)


def crops_seen(batch: Tensor, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and flip of each sample, read off images that hold a bright pixel at (4, 4) and a dim one right of it; the
    sample is 9 + 2 padding wide, so that both stay inside."""
    width = batch.shape[-1]
    bright, dim = ((batch[:, 0] == level / 255).flatten(1) for level in (255, 1))
    assert (bright.sum(1) == 1).all() and (dim.sum(1) == 1).all()
    at, beside = bright.long().argmax(1), dim.long().argmax(1)
    flipped = beside < at
    column = at % width
    column = torch.where(flipped, width - 1 - column, column)
    middle = 4 + padding
    return middle + padding - at // width, middle + padding - column, flipped


@pytest.mark.parametrize("padding", [1, 4])
def test_offsets_and_flips_are_uniform_and_independent(padding):
    """Chi-square of all (row, column, flip) together, for a fixed seed: below the 1 - 1e-4 quantile (Wilson and Hilferty)."""
    n, side = 40_000, 9 + 2 * padding
    images = torch.zeros(1, side, side, 1, dtype=torch.uint8)
    images[0, 4 + padding, 4 + padding], images[0, 4 + padding, 5 + padding] = 255, 1
    batch = ops.gather_augment(
        images, torch.zeros(n, dtype=torch.int64), torch.arange(n), 12, padding=padding, flip=True
    )
    top, left, flipped = crops_seen(batch, padding)
    offsets = 2 * padding + 1
    assert sorted(set(top.tolist())) == sorted(set(left.tolist())) == list(range(offsets))
    cells = offsets**2 * 2
    counts = torch.bincount((top * offsets + left) * 2 + flipped.long(), minlength=cells).double()
    statistic = ((counts - n / cells) ** 2 / (n / cells)).sum().item()
    freedom = cells - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert statistic < limit
    # And not suspiciously even: the lower 1e-4 quantile.
    assert statistic > freedom * (1 - 2 / (9 * freedom) - 3.719 * (2 / (9 * freedom)) ** 0.5) ** 3


def test_seeds_give_other_crops():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)
    items, index = torch.zeros(64, dtype=torch.int64), torch.arange(64)
    batches = [ops.gather_augment(images, items, index, seed, padding=4, flip=True) for seed in (0, 1, 2**32)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        same = (batches[a] == batches[b]).flatten(1).all(1).sum().item()
        assert same < 8  # one in 162 by chance


def test_index_decides_not_the_batch(generator, same_bits):
    """Order, batch size and neighbours change nothing; the item does not enter the draw."""
    images, items, index = draw(generator, (9, 11, 3), n=40)
    whole = ops.gather_augment(images, items, index, 7, padding=3, flip=True)
    order = torch.randperm(40, generator=generator)
    same_bits(ops.gather_augment(images, items[order], index[order], 7, padding=3, flip=True), whole[order])
    for at in (0, 17, 39):
        part = slice(at, at + 1)
        same_bits(ops.gather_augment(images, items[part], index[part], 7, padding=3, flip=True), whole[part])
    known = images[:2].clamp(min=1)  # no black pixel, so that the padding shows
    inside = [ops.gather_augment(known, torch.full_like(items, k), index, 7, padding=3, flip=True) > 0 for k in (0, 1)]
    assert torch.equal(*inside)


def test_threads_do_not_matter(generator, same_bits):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for shape, n in (((32, 32, 3), 500), ((300, 301, 3), 3), ((8, 8, 1), 5000), ((1, 70_000, 3), 2)):
            images, items, index = draw(generator, shape, n)
            ours = ops.gather_augment(images, items, index, 3, padding=4, flip=True)
            same_bits(ours, reference.gather_augment(images, items, index, 3, padding=4, flip=True), shape)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("padding", [1000, 2**20, 2**23 - 1])
def test_padding_far_beyond_the_image(generator, same_bits, padding):
    images, items, index = draw(generator, (4, 5, 3), n=50)
    ours = ops.gather_augment(images, items, index, 1, padding=padding, flip=True)
    same_bits(ours, reference.gather_augment(images, items, index, 1, padding=padding, flip=True))


@pytest.mark.parametrize("shape", [(3, 0, 4, 4), (2, 3, 4, 0), (0, 5, 4, 3), (2, 5, 0, 3)])
def test_empty(dtype, shape):
    """(items, H, W, C) with a zero; no items of an empty set among them."""
    n, h, w, c = shape
    images = torch.zeros((2 if n else 0), h, w, c, dtype=torch.uint8)
    zeros = torch.zeros(n, dtype=torch.int64)
    ours = ops.gather_augment(images, zeros, zeros, 0, padding=2, flip=True, dtype=dtype)
    assert ours.shape == (n, c, h, w) and ours.dtype == dtype


def test_items_and_index_with_strides(generator, same_bits):
    images, items, index = draw(generator, (5, 5, 3), n=8)
    strided = torch.stack((items, index), 1)
    ours = ops.gather_augment(images, strided[:, 0], strided[:, 1], 2, padding=1, flip=True)
    same_bits(ours, ops.gather_augment(images, items, index, 2, padding=1, flip=True))


def test_reads_only_the_set():
    """The set ends at an unreadable page: vector loads must not reach over the first or the last image."""
    program = """
import ctypes, mmap, torch
from synthfast import ops
from synthfast.ops import reference_data as reference
libc = ctypes.CDLL(None, use_errno=True)
page = mmap.PAGESIZE
for shape in ((3, 5, 3), (2, 16, 1), (4, 6, 3), (1, 3, 2), (8, 8, 1), (2, 7, 4)):
    n = shape[0] * shape[1] * shape[2] * 2
    room = mmap.mmap(-1, 3 * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(room))
    for guard in (base, base + 2 * page):
        assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
    for offset in (page, 2 * page - n):
        images = torch.frombuffer(room, dtype=torch.uint8, count=n, offset=offset).view(2, *shape)
        images.copy_(torch.arange(n).view(2, *shape) % 251 + 1)
        for padding in (0, 1):
            items = torch.arange(64) % 2
            arguments = (images, items, torch.arange(64), 1)
            ours = ops.gather_augment(*arguments, padding=padding, flip=True)
            assert torch.equal(ours, reference.gather_augment(*arguments, padding=padding, flip=True))
print("done", flush=True)
import os; os._exit(0)  # the protected pages stay as they are
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0 and "done" in run.stdout, (run.returncode, run.stderr[-500:])


def test_set_beyond_4_gigabytes(tmp_path, same_bits):
    """A memory-mapped file with holes, as large as 2 million images of CIFAR's shape: byte offsets beyond 32 bits."""
    shape, count = (32, 32, 3), 2_000_000
    path = tmp_path / "images.bin"
    last = count - 1
    border = 2**32 // 3072  # this image lies on both sides of 4 GiB
    picked = [0, 2**31 // 3072, border, border + 1, last - 1, last]
    with open(path, "wb") as file:
        file.truncate(count * 3072)
    written = torch.randint(
        0, 256, (len(picked), *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    mapped = np.memmap(path, np.uint8, "r+", shape=(count, *shape))
    for k, item in enumerate(picked):
        mapped[item] = written[k].numpy()
    assert path.stat().st_blocks * 512 < 2**24  # the holes take no room
    images = torch.from_numpy(mapped)
    assert images.numel() > 2**32 and border * 3072 < 2**32 < (border + 1) * 3072
    items, index = torch.tensor(picked), torch.arange(len(picked))
    for padding, flip in ((0, False), (4, True)):
        ours = ops.gather_augment(images, items, index, 9, padding=padding, flip=flip)
        expected = reference.gather_augment(written, torch.arange(len(picked)), index, 9, padding=padding, flip=flip)
        same_bits(ours, expected, (padding, flip))
    untouched = ops.gather_augment(images, torch.tensor([border - 1, border + 2]), index[:2], 9)
    assert (untouched == 0).all()
    for item in (count, 2**32 + 5, -1):
        with pytest.raises(RuntimeError, match=rf"items must lie in \[0, 2000000\), .* got {item} at position 1"):
            ops.gather_augment(images, torch.tensor([0, item]), index[:2], 9)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_read_only_set(tmp_path, same_bits):
    """As shards are opened: the operation must not ask for memory it can write to."""
    array = np.random.default_rng(0).integers(0, 256, (10, 6, 6, 3), np.uint8)
    np.save(tmp_path / "set.npy", array)
    images = torch.from_numpy(np.load(tmp_path / "set.npy", mmap_mode="r"))
    items = index = torch.arange(10)
    ours = ops.gather_augment(images, items, index, 1, padding=1, flip=True)
    same_bits(ours, reference.gather_augment(torch.from_numpy(array), items, index, 1, padding=1, flip=True))


def wrong(**changed):
    arguments = {
        "images": torch.zeros(3, 4, 4, 3, dtype=torch.uint8),
        "items": torch.zeros(2, dtype=torch.int64),
        "index": torch.zeros(2, dtype=torch.int64),
        "seed": 0,
        "padding": 1,
        "flip": True,
        "dtype": torch.float32,
    }
    return {**arguments, **changed}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": torch.zeros(3, 4, 4, dtype=torch.uint8)}, r"images must be uint8 \[M, H, W, C\]; got \[3, 4, 4\]"),
        ({"images": torch.zeros(3, 4, 4, 3)}, r"images must be uint8 \[M, H, W, C\]; got .* Float"),
        (
            {"images": torch.zeros(3, 3, 4, 4, dtype=torch.uint8).permute(0, 2, 3, 1)},
            "images must be contiguous, because a set is never copied; got .* call contiguous",
        ),
        ({"images": torch.zeros(6, 4, 4, 3, dtype=torch.uint8)[::2]}, "images must be contiguous"),
        ({"images": torch.zeros(1, dtype=torch.uint8).expand(3, 2**16, 2**15, 1)}, "images must be contiguous"),
        (
            {"items": torch.zeros(2, dtype=torch.int32)},
            r"items must be int64 \[N\] on the device of images; got .* Int",
        ),
        ({"items": torch.zeros(2, 1, dtype=torch.int64)}, r"items must be int64 \[N\]"),
        ({"index": torch.zeros(3, dtype=torch.int64)}, r"index must be int64 \[2\]"),
        ({"index": torch.zeros(2)}, r"index must be int64 \[2\]"),
        ({"padding": -1}, r"padding must lie in \[0, 2\^23\); got -1"),
        ({"padding": 2**23}, r"padding must lie in \[0, 2\^23\); got 8388608"),
        ({"dtype": torch.float64}, "dtype must be float32, bfloat16 or float16; got Double"),
        ({"dtype": torch.uint8}, "dtype must be float32, bfloat16 or float16; got Byte"),
        ({"items": torch.tensor([0, 3])}, r"items must lie in \[0, 3\), the images of the set; got 3 at position 1"),
        ({"items": torch.tensor([-1, 2])}, r"items must lie in \[0, 3\), .* got -1 at position 0"),
        ({"images": torch.zeros(0, 4, 4, 3, dtype=torch.uint8)}, r"items must lie in \[0, 0\)"),
        (
            {"images": torch.zeros(3, 4, 0, 3, dtype=torch.uint8), "items": torch.tensor([0, 3])},
            "items .* got 3 at position 1",
        ),
    ],
)
def test_wrong_arguments(changed, message):
    with pytest.raises(RuntimeError, match=f"gather_augment: {message}"):
        ops.gather_augment(**wrong(**changed))


def test_too_large_an_image():
    """Refused before anything of that size is made. The set has the size in its description only."""
    images = torch.empty(0, 2**16, 2**15, 1, dtype=torch.uint8)
    none = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"gather_augment: an image may have 2\^30 bytes at most"):
        ops.gather_augment(images, none, none, 0)
    assert ops.gather_augment(images[:, :, : 2**14], none, none, 0).shape == (0, 1, 2**16, 2**14)


@pytest.mark.parametrize("shape", [(4, 5, 3), (4, 4, 1), (1, 1, 1), (3, 0, 3)])
def test_opcheck(generator, dtype, shape):
    """The fake kernel must predict shape, type and strides."""
    images, items, index = draw(generator, shape)
    for arguments in ((items, index, -3, 2, True, dtype), (items[:0], index[:0], 5, 0, False, dtype)):
        opcheck(torch.ops.synthfast.gather_augment.default, (images, *arguments))


def test_compiles_whole_and_does_not_recompile(generator, same_bits):
    """A seed that varies is learnt once; batches and items never recompile."""

    def step(images, items, index, seed, dtype):
        return ops.gather_augment(images, items, index, seed, padding=1, flip=True, dtype=dtype) * 2

    images, items, index = draw(generator, (6, 5, 3))
    for backend in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=True)
        for seed in (0, 3, -5, 2**62, 12, -(2**63)):
            arguments = (images, items, index + seed % 7, seed, torch.float32)
            same_bits(compiled(*arguments), step(*arguments), (backend, seed))
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        ours = compiled(images, items, index, 4, torch.bfloat16)
        assert ours.stride() == step(images, items, index, 4, torch.bfloat16).stride()
    torch._dynamo.reset()
