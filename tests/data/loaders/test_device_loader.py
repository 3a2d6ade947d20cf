"""The loader ``device``: nothing is copied on a CPU that lies in memory, and what is copied must fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from synthfast.data import ArrayImages, Chosen
from synthfast.data.loaders import Augment, Wanted, device, open_loader, resident
from synthfast.errors import SynthfastError, UsageError

CPU = torch.device("cpu")


def test_one_array_is_used_where_it_is(made):
    pixels = np.zeros((50, 4, 4, 3), np.uint8)
    part = Chosen(ArrayImages("toy", [pixels]), np.arange(10, 50))
    loader = open_loader("device", [Chosen(part, np.array([3, 0]))], CPU)
    wanted = Wanted((np.array([0, 1, 0]),))
    assert not loader.batch(wanted).images.any()
    pixels[13], pixels[10] = 7, 9  # in the array, not in a copy
    assert loader.batch(wanted).images[:, 0, 0, 0].tolist() == [7, 9, 7]


def test_files_stay_on_the_disk(made, write, tmp_path, recwarn):
    shards = write(tmp_path / "one", np.ones((20, 4, 4, 1), np.uint8), np.arange(20) % 4)
    loader = open_loader("device", [shards], CPU, Augment())
    assert loader.batch(Wanted((np.arange(20),))).images.unique().tolist() == pytest.approx([1 / 255])
    assert not recwarn.list  # PyTorch warns of arrays that it must not write


def test_what_is_decoded_is_read_once(made, monkeypatch):
    images, reads = made("png"), []
    real = type(images)._read
    monkeypatch.setattr(type(images), "_read", lambda one, items: (reads.append(len(items)), real(one, items))[1])
    monkeypatch.setattr(device, "_CHUNK", 25 * 9 * 12 * 3)
    loader = open_loader("device", [images], CPU)
    assert reads == []  # a run that is finished needs none
    for _ in range(2):
        list(loader.batches(lambda _: Wanted((np.arange(7),)), 0, 3))
    assert reads == [25, 25, 10]


def test_images_that_do_not_fit_are_refused_in_one_line(made, monkeypatch):
    needed = len(made("png")) * 9 * 12 * 3
    monkeypatch.setattr(device, "free_memory", lambda _: int(needed / 0.79))
    assert open_loader("device", [made("png")], CPU).kind == "device"
    monkeypatch.setattr(device, "free_memory", lambda _: int(needed / 0.81))
    with pytest.raises(
        UsageError, match=r"^--loader device: the images take 0\.0 GB, expected at most 80% of the memory"
    ) as e:
        open_loader("device", [made("png")], CPU)
    assert "\n" not in str(e.value) and str(e.value).endswith("found 0.0 GB free; take --loader dali or torch")
    with pytest.raises(SynthfastError, match=r"images: the images take .*; take fewer images$"):
        resident([made("png")], CPU)
    # What stays where it is takes nothing.
    assert open_loader("device", [made("shards"), made("memory")], CPU).kind == "device"


def test_the_memory_of_this_machine_is_known():
    assert 1e6 < device.free_memory(CPU) < 1e14


def test_unknown_memory_is_not_refused(made, monkeypatch):
    monkeypatch.setattr(device, "free_memory", lambda _: None)
    assert device.does_not_fit([made("png")], CPU) is None


def test_all_sets_one_after_the_other(made):
    sets = [made("shards"), made("png")]
    rows = resident(sets, CPU)
    assert rows.dtype == torch.uint8 and len(rows) == sum(map(len, sets))
    assert np.array_equal(rows[60:].numpy(), sets[1].read(np.arange(60)))


def test_sets_of_several_shapes_are_refused():
    sets = [ArrayImages("a", [np.zeros((2, side, 4, 3), np.uint8)]) for side in (4, 5)]
    with pytest.raises(UsageError, match=r"images of one shape, found \[4, 4, 3\], \[5, 4, 3\]; choose sets that fit"):
        open_loader("torch", sets, CPU)
