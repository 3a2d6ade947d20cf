"""The operations of csrc/data on a GPU against the CPU: bit for bit, because both compile the same arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from synthfast import ops

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
if ops.cuda_problem is not None:
    pytest.skip(f"no CUDA kernels: {ops.cuda_problem}", allow_module_level=True)

DEVICE = torch.device("cuda")
ENOUGH = 16 << 30
SHAPES = [
    (1, 1, 1),
    (1, 7, 1),
    (4, 4, 1),
    (8, 8, 1),
    (5, 6, 3),
    (32, 32, 3),
    (33, 31, 3),
    (9, 7, 4),
    (2, 3, 300),
    (224, 224, 3),
]


def draw(generator, shape, n=6, count=5):
    images = torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)
    items = torch.randint(0, count, (n,), generator=generator)
    return images, items, torch.randint(-(2**62), 2**62, (n,), generator=generator)


def on_gpu(arguments):
    return tuple(a.to(DEVICE) for a in arguments)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gather_augment(generator, same_bits, dtype, shape):
    arguments = draw(generator, shape)
    for padding, flip in ((0, False), (0, True), (2, False), (2, True), (max(shape) + 3, True), (2**23 - 1, True)):
        expected = ops.gather_augment(*arguments, -5, padding=padding, flip=flip, dtype=dtype)
        ours = ops.gather_augment(*on_gpu(arguments), -5, padding=padding, flip=flip, dtype=dtype)
        assert ours.is_cuda and ours.stride() == expected.stride()
        same_bits(ours.cpu(), expected, (padding, flip))


def test_every_byte(same_bits, dtype):
    """On a GPU the rounding to 16 bits is a machine instruction."""
    images, zero = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1), torch.zeros(1, dtype=torch.int64)
    expected = ops.gather_augment(images, zero, zero, 0, dtype=dtype)
    same_bits(ops.gather_augment(*on_gpu((images, zero, zero)), 0, dtype=dtype).cpu(), expected)


def test_many_samples(generator, same_bits, dtype):
    """More work items than threads, so that the grid-stride loop turns."""
    for shape, n in (((8, 8, 1), 200_000), ((32, 32, 3), 5_000)):
        arguments = draw(generator, shape, n, 100)
        expected = ops.gather_augment(*arguments, 3, padding=4, flip=True, dtype=dtype)
        same_bits(ops.gather_augment(*on_gpu(arguments), 3, padding=4, flip=True, dtype=dtype).cpu(), expected)


def test_set_that_does_not_start_at_16_bytes(generator, same_bits, dtype):
    images, items, index = draw(generator, (8, 8, 3))
    room = torch.zeros(images.numel() + 1, dtype=torch.uint8, device=DEVICE)
    room[1:] = images.flatten()
    shifted = room[1:].view(images.shape)
    ours = ops.gather_augment(shifted, *on_gpu((items, index)), 3, padding=1, flip=True, dtype=dtype)
    same_bits(ours.cpu(), ops.gather_augment(images, items, index, 3, padding=1, flip=True, dtype=dtype))


@pytest.mark.parametrize("item", [5, -1, 2**40, -(2**63), 2**63 - 1])
def test_an_item_outside_the_set_shows_as_nan(generator, same_bits, dtype, item):
    images, items, index = draw(generator, (8, 8, 3))
    expected = ops.gather_augment(images, items, index, 3, padding=1, flip=True, dtype=dtype)
    items[2] = item
    ours = ops.gather_augment(*on_gpu((images, items, index)), 3, padding=1, flip=True, dtype=dtype).cpu()
    assert ours[2].isnan().all()
    kept = [0, 1, 3, 4, 5]
    same_bits(ours[kept], expected[kept])


@pytest.mark.parametrize("shape", [(3, 0, 4, 4), (2, 3, 4, 0), (0, 5, 4, 3)])
def test_empty(shape):
    n, h, w, c = shape
    zeros = torch.zeros(n, dtype=torch.int64, device=DEVICE)
    images = torch.zeros(2, h, w, c, dtype=torch.uint8, device=DEVICE)
    assert ops.gather_augment(images, zeros, zeros, 0, padding=1, flip=True).shape == (n, c, h, w)
    torch.cuda.synchronize()


@pytest.mark.parametrize("stays", range(3))
def test_arguments_on_two_devices(generator, stays):
    arguments = draw(generator, (4, 4, 3))
    mixed = [a if k == stays else a.to(DEVICE) for k, a in enumerate(arguments)]
    with pytest.raises(RuntimeError, match=r"gather_augment: (items|index) must be int64 .* on the device of"):
        ops.gather_augment(*mixed, 0)


def test_another_stream(generator, same_bits):
    """Items queued behind a slow kernel on a side stream: a launch on the default stream would read zeros."""
    images, items, index = draw(generator, (32, 32, 3), 64)
    expected = ops.gather_augment(images, items, index, 1, padding=4, flip=True)
    moved = on_gpu((images, items, index))
    late = torch.zeros_like(moved[1])
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late.copy_(moved[1])
        ours = ops.gather_augment(moved[0], late, moved[2], 1, padding=4, flip=True)
    side.synchronize()
    same_bits(ours.cpu(), expected)


def test_graph_capture_and_replay(generator, same_bits):
    """One captured graph serves every batch: items and index are read on the device."""
    images, items, index = draw(generator, (8, 8, 3), 16)
    moved = on_gpu((images, items, index))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ops.gather_augment(*moved, 1, padding=2, flip=True)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch = ops.gather_augment(*moved, 1, padding=2, flip=True)
    for k in range(3):
        moved[1].copy_((items + k) % 5)
        moved[2].copy_(index + k)
        graph.replay()
        same_bits(batch.cpu(), ops.gather_augment(images, (items + k) % 5, index + k, 1, padding=2, flip=True), k)


def test_compile_and_opcheck(generator, same_bits, dtype):
    arguments = draw(generator, (8, 7, 3))
    moved = on_gpu(arguments)
    opcheck(torch.ops.synthfast.gather_augment.default, (*moved, -3, 2, True, dtype))
    compiled = torch.compile(lambda *a: ops.gather_augment(*a, 4, padding=2, flip=True, dtype=dtype), fullgraph=True)
    same_bits(compiled(*moved).cpu(), ops.gather_augment(*arguments, 4, padding=2, flip=True, dtype=dtype))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_second_device(generator, same_bits):
    """The launch goes to the device of the tensors, whichever is current."""
    arguments = draw(generator, (8, 8, 3))
    ours = ops.gather_augment(*(a.to("cuda:1") for a in arguments), 1, padding=2, flip=True)
    assert ours.device.index == 1 and torch.cuda.current_device() == 0
    same_bits(ours.cpu(), ops.gather_augment(*arguments, 1, padding=2, flip=True))


@pytest.mark.skipif(torch.cuda.get_device_properties(0).total_memory < ENOUGH, reason="needs a GPU of 16 GiB")
def test_set_and_batch_beyond_32_bit_offsets(generator, same_bits):
    """A set of more than 4 GiB, and a batch of more than 2^31 elements in bfloat16."""
    picked, _, index = draw(generator, (32, 32, 3), 4, 4)
    count = 1_500_000
    images = torch.empty(count, 32, 32, 3, dtype=torch.uint8, device=DEVICE)
    at = torch.tensor([0, 2**31 // 3072, 2**32 // 3072, count - 1])
    images[at.to(DEVICE)] = picked.to(DEVICE)
    n = 700_000
    items = torch.zeros(n, dtype=torch.int64, device=DEVICE)
    keys = torch.arange(n, device=DEVICE)
    items[-4:], keys[-4:] = at.to(DEVICE), index.to(DEVICE)
    ours = ops.gather_augment(images, items, keys, 9, padding=4, flip=True, dtype=torch.bfloat16)
    assert images.numel() > 2**32 and ours.numel() > 2**31
    expected = ops.gather_augment(picked, torch.arange(4), index, 9, padding=4, flip=True, dtype=torch.bfloat16)
    same_bits(ours[-4:].cpu(), expected)
