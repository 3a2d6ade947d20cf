"""The loader ``dali``: the draws of crops, tars in order, what DALI cannot do."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from synthfast.data import ArrayImages, ShardSet
from synthfast.data.loaders import Augment, Wanted, open_loader, stream
from synthfast.data.loaders.dali import draw_crops
from synthfast.data.loaders.in_order import _STATE, InOrder
from synthfast.errors import SynthfastError, UsageError
from synthfast.ops import reference_data

dali = pytest.importorskip("nvidia.dali")
CPU = torch.device("cpu")


@pytest.mark.parametrize("crop", [1, 4, 1000, 2**23 - 1])
def test_crops_are_those_of_gather_augment(crop):
    index = torch.tensor([0, 1, 5, 2**33, -1, 2**62])
    for seed in (0, -7, 2**63 - 1):
        top, left, mirrored = reference_data.draw_crops(index, seed, crop, True)
        start, mirror = draw_crops(index.numpy(), Augment(seed, crop, True))
        assert start.tolist() == torch.stack([top - crop, left - crop], 1).tolist()
        assert mirror.tolist() == mirrored.int().tolist()


def test_only_what_is_asked_for_is_drawn():
    index = np.arange(5)
    assert draw_crops(index, Augment(3)) == []
    assert [part.shape for part in draw_crops(index, Augment(3, crop=2))] == [(5, 2)]
    assert [part.shape for part in draw_crops(index, Augment(3, flip=True))] == [(5,)]


@pytest.mark.parametrize("kind", ["png", "jpg", "grey png", "grey jpg"])
@pytest.mark.parametrize("ranks", [1, 2, 7])
def test_a_pass_in_order_has_every_image_once(made, kind, ranks):
    images, seen = made(kind), []
    for rank in range(ranks):
        for items, pixels in InOrder(images, 8, CPU, rank=rank, world_size=ranks, threads=1):
            assert pixels.shape == (len(items), *images.shape)
            assert np.array_equal(pixels.numpy(), images.read(items))
            seen.append(items)
    assert np.array_equal(np.concatenate(seen), np.arange(len(images)))
    assert ranks > 1 or list(map(len, seen)) == [8] * 7 + [4]


@pytest.mark.parametrize("given", [0, 1, 3, 7])
def test_a_pass_goes_on_from_its_state(made, given):
    images = made("jpg")
    first = InOrder(images, 8, CPU, threads=1)
    for _ in range(given):
        next(first)
    state = first.state()
    again = InOrder(images, 8, CPU, threads=2, state=state)
    for (items, pixels), (other_items, other_pixels) in zip(again, first, strict=True):
        assert np.array_equal(items, other_items) and torch.equal(pixels, other_pixels)
    assert again.state() == first.state() != state and len(state) < 1000


def test_the_state_of_another_pass_is_refused(made):
    state = InOrder(made("jpg"), 8, CPU, threads=1).state()
    for images, size, given in ((made("jpg"), 9, state), (made("jpg"), 8, state[:10]), (made("jpg"), 8, b"")):
        with pytest.raises(SynthfastError, match=r"images: the state is of another pass over images; begin anew$"):
            InOrder(images, size, CPU, threads=1, state=given)


@pytest.mark.parametrize("other", [(1, 2), (0, 1), (0, 3)])
def test_the_state_of_another_rank_is_refused(made, other):
    """Of another number of ranks too: it would leave images out."""
    first = InOrder(made("jpg"), 8, CPU, rank=0, world_size=2, threads=1)
    next(first)
    with pytest.raises(SynthfastError, match=r"images: the state is of another pass over images; begin anew$"):
        InOrder(made("jpg"), 8, CPU, rank=other[0], world_size=other[1], threads=1, state=first.state())


@pytest.mark.parametrize("cut", [-1, -60, "all"])
def test_a_damaged_state_is_one_line(made, cut):
    state = InOrder(made("jpg"), 8, CPU, threads=1).state()
    cut = _STATE.size if cut == "all" else cut
    with pytest.raises(SynthfastError, match=r"images: the state is damaged; begin anew$"):
        InOrder(made("jpg"), 8, CPU, threads=1, state=state[:cut])


def test_more_ranks_than_images_are_refused(made):
    for rank in (0, 60):
        with pytest.raises(
            UsageError, match=r"images: expected at least one image for each of the 61 ranks, found 60; "
        ):
            InOrder(made("jpg"), 8, CPU, rank=rank, world_size=61, threads=1)
    assert [len(list(InOrder(made("jpg"), 8, CPU, rank=rank, world_size=60, threads=1))) for rank in (0, 59)] == [1, 1]


def test_sets_that_are_read_through_are_read_by_dalis_own_reader(made, monkeypatch):
    images, passes = made("jpg"), []
    real = InOrder.__init__
    monkeypatch.setattr(InOrder, "__init__", lambda self, *a, **k: (passes.append(a[1]), real(self, *a, **k))[1])
    whole = [np.arange(first, min(first + 16, 60)) for first in range(0, 60, 16)]
    for augment in (None, Augment()):
        found = list(stream(images, whole, CPU, augment, kind="dali", workers=1))
        expected = list(stream(images, whole, CPU, augment, kind="torch", workers=0))
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
    assert passes == [16, 16]
    others = [
        whole[:-1],
        whole[1:],
        [whole[0], whole[1][:-1], *whole[2:]],
        whole[::-1],
        [*whole[:1], *whole],
        [np.arange(10), np.arange(10, 60)],
    ]
    for batches in others:
        found = list(stream(images, batches, CPU, kind="dali", workers=1))
        assert all(np.array_equal(one.images, images.read(items)) for one, items in zip(found, batches, strict=True))
    assert passes == [16, 16]


def damaged(made, write, tmp_path, codec):
    """A folder of which image 30 has its second half changed."""
    whole = made("memory")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 9, 12, 3), np.uint8)
    more = {"quality": 95} if codec == "jpg" else {}
    images = write(tmp_path / "damaged", pixels, whole.labels, format="wds", codec=codec, **more)
    file = images.encoded(np.array([30]))[0]
    tar = images.tar_paths[1]
    data = tar.read_bytes()
    tar.write_bytes(data.replace(file, file[: len(file) // 2] + bytes(len(file) - len(file) // 2)))
    return ShardSet(tmp_path / "damaged")


@pytest.mark.parametrize("codec", ["png", "jpg"])
@pytest.mark.parametrize("way", ["shuffled", "in order"])
def test_a_damaged_image_of_a_tar_is_named(made, write, tmp_path, codec, way):
    images = damaged(made, write, tmp_path, codec)
    with pytest.raises(SynthfastError, match=r"shard-000001\.tar \(0*30\.(png|jpg)\): not a readable ") as caught:
        if way == "shuffled":
            loader = open_loader("dali", [images], CPU, Augment(0, 1, True), workers=1)
            list(loader.batches(lambda step: Wanted((np.arange(step, step + 4),), np.arange(4)), 20, 40))
        else:
            batches = InOrder(images, 7, CPU, threads=1)
            try:
                list(batches)
            finally:
                assert list(batches) == []
    assert "\n" not in str(caught.value)


def test_what_dali_alone_refuses_is_said_so(made, monkeypatch):
    images = made("png")
    monkeypatch.setattr("synthfast.data.loaders.dali.plain_images", lambda *_: [np.zeros(50, np.uint8)] * 4)
    with pytest.raises(
        SynthfastError, match=r"images: DALI cannot read an image that others can \(.*\); take --loader torch$"
    ) as e:
        open_loader("dali", [images], CPU, workers=1).batch(Wanted((np.arange(4),)))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("way", ["shuffled", "in order"])
def test_a_pipeline_that_cannot_be_made_is_one_line(made, monkeypatch, way):
    def refuse(self):
        raise RuntimeError("Critical error when building pipeline:\nencountered:\n\nCUDA driver is\ntoo old")

    monkeypatch.setattr(dali.Pipeline, "build", refuse)
    with pytest.raises(
        SynthfastError, match=r"^--loader dali: DALI makes no pipeline \(CUDA driver is too old\); take --loader torch$"
    ):
        if way == "shuffled":
            open_loader("dali", [made("png")], CPU, workers=1).batch(Wanted((np.arange(4),)))
        else:
            InOrder(made("png"), 8, CPU, threads=1)


def test_images_of_other_channels_are_refused():
    images = ArrayImages("four", [np.zeros((5, 4, 4, 4), np.uint8)])
    with pytest.raises(
        UsageError, match=r"^--loader dali: expected grey or RGB images, found 4 channels; take --loader"
    ):
        open_loader("dali", [images], CPU)


def test_pipelines_do_not_stay(made):
    """Not even until a collection."""
    loader = open_loader("dali", [made("jpg"), made("memory")], CPU, Augment(0, 1, True), workers=1)
    wanted = Wanted((np.arange(4), np.arange(4)), np.arange(8))

    def pipelines():
        return sum(type(one) is dali.Pipeline for one in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = pipelines()
        loader.batch(wanted)
        assert pipelines() == before
        batches = loader.batches(lambda _: wanted, 0, 9)
        next(batches)
        assert pipelines() == before + 2
        batches.close()
        assert pipelines() == before
    finally:
        gc.enable()
