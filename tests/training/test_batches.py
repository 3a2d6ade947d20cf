from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from synthfast.training.batches import EpochOrder, flip_half, prefetch, to_model


def test_a_pass_sees_every_item_once():
    order = EpochOrder(10, seed=3)
    passes = [order[k * 10 : k * 10 + 10] for k in range(3)]
    for items in passes:
        assert sorted(items) == list(range(10))
    assert not np.array_equal(passes[0], passes[1])


@pytest.mark.parametrize("start", [0, 3, 10, 37])
def test_any_slice_is_a_part_of_one_sequence(start):
    whole = EpochOrder(10, seed=3)[0:80]
    np.testing.assert_array_equal(EpochOrder(10, seed=3)[start : start + 35], whole[start : start + 35])
    assert len(EpochOrder(10, seed=3)[start:start]) == 0


def test_seed_and_stream_decide_the_order():
    base = EpochOrder(50, seed=0)[0:50]
    assert not np.array_equal(base, EpochOrder(50, seed=1)[0:50])
    assert not np.array_equal(base, EpochOrder(50, seed=0, stream=1)[0:50])
    np.testing.assert_array_equal(EpochOrder(50, seed=-1)[0:50], EpochOrder(50, seed=-1)[0:50])


def test_prefetch_keeps_the_order_and_works_ahead_in_another_thread():
    threads = []

    def make(step):
        threads.append(threading.get_ident())
        return step * 10

    assert list(prefetch(make, 2, 7)) == [20, 30, 40, 50, 60]
    assert set(threads) != {threading.get_ident()}
    assert list(prefetch(make, 5, 5)) == []


def test_prefetch_raises_what_the_maker_raises_and_can_be_left_early():
    def make(step):
        if step == 2:
            raise ValueError("item 2")
        return step

    seen = []
    with pytest.raises(ValueError, match="item 2"):
        for item in prefetch(make, 0, 5):
            seen.append(item)
    assert seen == [0, 1]
    endless = prefetch(lambda step: step, 0, 10**9)
    assert next(endless) == 0
    endless.close()


def test_to_model_scales_bytes_to_minus_one_to_one():
    images = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 1, 3, 1).expand(2, 4, 3, 3)
    pixels = to_model(images, torch.device("cpu"))
    assert pixels.shape == (2, 3, 4, 3)
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[0, 0, 0], torch.tensor([-1, 128 / 127.5 - 1, 1]))


def test_flips_are_whole_images_about_half_and_keyed_by_index():
    images = torch.randn(400, 1, 3, 4)
    index = torch.arange(400)
    flipped = flip_half(images, index, seed=5)
    mirrored = torch.tensor([torch.equal(a, b.flip(2)) for a, b in zip(flipped, images, strict=True)])
    same = torch.tensor([torch.equal(a, b) for a, b in zip(flipped, images, strict=True)])
    assert bool((mirrored ^ same).all())
    assert 150 < int(mirrored.sum()) < 250
    assert torch.equal(flip_half(images[100:200], index[100:200], seed=5), flipped[100:200])
    assert not torch.equal(flip_half(images, index, seed=6), flipped)
