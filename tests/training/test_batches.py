"""What a training step sees: shuffled passes, pixels, flips, read ahead."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from synthfast.data import ArrayImages
from synthfast.training.batches import EpochOrder, flip_half, prefetch, read_batch, to_model

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


def test_few_passes_are_kept_in_memory():
    order = EpochOrder(10, 0)
    for start in range(0, 1000, 4):
        order[start : start + 4]
    assert len(order._passes) <= 2


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


def test_prefetched_items_come_in_order_and_few_ahead():
    made, lock = [], threading.Lock()

    def make(step: int) -> int:
        assert threading.current_thread() is not threading.main_thread()
        with lock:
            made.append(step)
        return step

    for taken, step in enumerate(prefetch(make, 3, 20, ahead=2), start=1):
        assert step == 2 + taken
        time.sleep(0.003)
        assert len(made) <= taken + 3
    assert made == list(range(3, 20))


def test_nothing_to_prefetch():
    assert list(prefetch(int, 5, 5)) == list(prefetch(int, 7, 5)) == []


def test_an_error_in_the_background_comes_to_the_reader():
    def make(step: int) -> int:
        if step == 2:
            raise OSError("unreadable")
        return step

    taken = []
    with pytest.raises(OSError, match="unreadable"):
        for step in prefetch(make, 0, 10):
            taken.append(step)
    assert taken == [0, 1]


def test_a_reader_that_stops_early_stops_the_reading_ahead():
    made, begun, go = [], threading.Event(), threading.Event()

    def make(step: int) -> int:
        made.append(step)
        if step == 1:
            begun.set()
            assert go.wait(10)
        return step

    items = prefetch(make, 0, 100, ahead=5)
    assert next(items) == 0 and begun.wait(10)
    threading.Timer(0.05, go.set).start()  # close() waits for the item being made
    items.close()
    assert made == [0, 1]


def test_a_reader_that_stops_early_leaves_no_thread():
    before = threading.active_count()
    for step in prefetch(lambda step: step, 0, 1_000_000):
        if step == 3:
            break
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
