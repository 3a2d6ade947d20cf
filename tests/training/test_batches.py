"""What a training step sees: shuffled passes, pixels, flips, read ahead."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from synthfast.data import ArrayImages
from synthfast.training.batches import EpochOrder, flip_half, read_batch, to_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_every_pass_holds_every_item_once(count):
    order = EpochOrder(count, seed=3)
    for number in range(4):
        items = order[number * count : (number + 1) * count]
        assert items.dtype == np.int64 and sorted(items) == list(range(count))


def test_passes_differ_from_each_other_and_by_seed_and_stream():
    passes = [EpochOrder(100, 3)[k * 100 : k * 100 + 100] for k in range(3)]
    passes += [EpochOrder(100, 4)[0:100], EpochOrder(100, 3, stream=1)[0:100], EpochOrder(100, -3)[0:100]]
    assert len({tuple(items) for items in passes}) == len(passes)
    assert (passes[0] != np.arange(100)).any()


@pytest.mark.parametrize("size", [1, 3, 10, 23, 50])
def test_a_slice_is_the_same_wherever_reading_began(size):
    whole = EpochOrder(10, seed=0)[0:200]
    order = EpochOrder(10, seed=0)
    for start in [150, 0, 7, 95, 33]:
        assert np.array_equal(order[start : start + size], whole[start : start + size])


def test_an_empty_slice():
    assert EpochOrder(10, 0)[5:5].shape == (0,)


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_a_pass_is_numpys_permutation_of_seed_stream_and_number(count):
    """So that runs go on as they began; every version of the package has drawn it so."""
    order = EpochOrder(count, seed=-5, stream=3)
    for number in range(3):
        expected = np.random.default_rng([2**64 - 5, 3, number]).permutation(count)
        assert np.array_equal(order[number * count : (number + 1) * count], expected)


def test_one_pass_is_kept_in_memory_in_4_bytes_an_item():
    count = 1_000_000
    tracemalloc.start()
    try:
        order = EpochOrder(count, 0)
        for start in range(0, 3 * count, count // 4 + 7):
            order[start : start + 64]
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 4.1 * count and most < 4.3 * count


def test_a_batch_is_read_with_its_labels():
    images = np.arange(5 * 2 * 2 * 3, dtype=np.uint8).reshape(5, 2, 2, 3)
    pixels, labels = read_batch(ArrayImages("toy", [images], np.array([0, 1, 2, 1, 0])), np.array([3, 0]))
    assert torch.equal(pixels, torch.from_numpy(images[[3, 0]])) and labels.tolist() == [1, 0]
    assert read_batch(ArrayImages("toy", [images]), np.array([1]))[1] is None


def test_bytes_become_numbers_from_minus_1_to_1():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(2, 1, 1, 3)
    found = to_model(images, CPU)
    assert found.shape == (2, 3, 16, 16) and found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    expected = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).reshape(16, 16)
    torch.testing.assert_close(found[1, 2].double(), expected, rtol=0, atol=1e-6)
    assert found.min() == -1 and found.max() == 1


def test_half_of_the_images_are_mirrored_by_index_alone():
    images = torch.arange(4.0).expand(4000, 1, 2, 4).contiguous()
    index = torch.arange(4000)
    found = flip_half(images, index, seed=1)
    flipped = found[:, 0, 0, 0] == 3
    assert torch.equal(found[flipped], images[flipped].flip(3)) and torch.equal(found[~flipped], images[~flipped])
    assert 1850 < int(flipped.sum()) < 2150
    some = torch.tensor([17, 3000, 5])
    assert torch.equal(flip_half(images[some], index[some], seed=1), found[some])
    assert not torch.equal(flip_half(images, index, seed=2), found)
